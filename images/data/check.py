"""Uses every package once, at build time: what `prune` takes away must be missed here, not in a session."""

import importlib
import io
import tempfile

for name in """
    scipy.stats scipy.optimize scipy.signal scipy.sparse.linalg sklearn.ensemble statsmodels.api numpy.testing pandas.testing
    pyarrow.parquet pyarrow.dataset pyarrow.fs pyarrow.compute pyarrow.csv mpl_toolkits.mplot3d networkx xlrd pypdf docx
    lxml.etree bs4 html5lib yaml jinja2 nbformat requests tqdm PIL.Image
""".split():
    importlib.import_module(name)

import duckdb
import ipywidgets
import pandas as pd
import plotly.express as px
import seaborn as sns
import statsmodels.formula.api as smf
import sympy

frame = pd.DataFrame({"n": [1, 2], "letter": ["a", "b"]})
with tempfile.TemporaryDirectory() as folder:
    for kind, read in {"parquet": pd.read_parquet, "feather": pd.read_feather, "excel": pd.read_excel}.items():
        path = f"{folder}/frame.{'xlsx' if kind == 'excel' else kind}"
        getattr(frame, f"to_{kind}")(path, **({"index": False} if kind == "excel" else {}))
        assert read(path).equals(frame), kind
assert len(pd.read_html(io.StringIO(frame.to_html()))) == 1
assert "| letter" in frame.to_markdown()
assert duckdb.sql("select sum(n) from frame").fetchall() == [(3,)]
assert "plotly" in px.bar(frame, x="letter", y="n").to_html()
sns.barplot(frame, x="letter", y="n").figure.savefig(io.BytesIO(), format="png")
assert round(smf.ols("n ~ 1", frame).fit().params.iloc[0], 3) == 1.5
x = sympy.Symbol("x")
assert sympy.integrate(x**2, x) == x**3 / 3
assert ipywidgets.interactive(lambda n: n, n=3).children[0].value == 3
