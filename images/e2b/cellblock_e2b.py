"""What E2B's kernels show beside what IPython does: the data of frames and of charts, and pictures that are saved. Their types have forms that notebooks take.

An extension of IPython. It imports nothing that a program has not asked for, so that a kernel starts as fast as without it."""

import datetime
import functools
import importlib.abc
import importlib.util
import math
import numbers
import os
import sys
import warnings

from IPython.core.formatters import BaseFormatter
from traitlets import ObjectName, Unicode

# A frame with more cells than this is shown, but its data is not told: it would push everything else out of what a result may hold.
MAX_CELLS = 200_000


class DataFormatter(BaseFormatter):
    """Frames as columns."""

    format_type = Unicode("application/vnd.e2b.data+json")
    print_method = ObjectName("_repr_e2b_data_")
    _return_type = dict


class ChartFormatter(BaseFormatter):
    """Figures as what is drawn in them."""

    format_type = Unicode("application/vnd.e2b.chart+json")
    print_method = ObjectName("_repr_e2b_chart_")
    _return_type = dict


def plain(value):
    """A value as JSON has it: moments in ISO 8601, and nothing for what is none."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (datetime.date, datetime.time)):
        # Of pandas, one that is none is a date as well.
        return value.isoformat() if value == value else None
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(part) for part in value]
    is_missing = "pandas" in sys.modules and value is sys.modules["pandas"].NA
    return None if is_missing else str(value)


def frame_data(frame):
    if frame.size > MAX_CELLS:
        return None
    return {str(name): plain(frame.iloc[:, at].tolist()) for at, name in enumerate(frame.columns)}


def chart_data(figure):
    from e2b_charts import chart_figure_to_dict

    try:
        with warnings.catch_warnings():
            # It says of some numbers that they are not the kind it expected.
            warnings.simplefilter("ignore")
            return plain(chart_figure_to_dict(figure)) or None
    except Exception:
        # The picture is shown whatever can be said of it.
        return None


class Patching(importlib.abc.MetaPathFinder):
    """Waits for one module, and is told once it is there."""

    def __init__(self, name, then):
        self.name, self.then = name, then

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            self.then(module)

        spec.loader.exec_module = exec_module
        return spec


def show_saved(module):
    """A picture that a program saves under a name is shown too."""
    from IPython.display import display

    save = module.Image.save

    @functools.wraps(save)
    def save_and_show(self, fp, *args, **kwargs):
        saved = save(self, fp, *args, **kwargs)
        if isinstance(fp, (str, os.PathLike)):
            display(self)
        return saved

    module.Image.save = save_and_show


def load_ipython_extension(shell):
    formatter = shell.display_formatter
    for kind in (DataFormatter, ChartFormatter):
        formatter.formatters[kind.format_type.default_value] = kind(parent=formatter)
    # Methods, since IPython's own settings for figures take away what is registered for them.
    sys.meta_path[:0] = [
        Patching("pandas.core.frame", lambda module: setattr(module.DataFrame, "_repr_e2b_data_", frame_data)),
        Patching("matplotlib.figure", lambda module: setattr(module.Figure, "_repr_e2b_chart_", chart_data)),
        Patching("PIL.Image", show_saved),
    ]
