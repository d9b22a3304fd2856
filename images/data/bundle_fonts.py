"""Lists matplotlib's fonts at build time and makes matplotlib read that list.

It keeps such a list in a cache folder, and every session starts with an empty one: the first plot would look at each font
file anew, 0.3 s each time. There is no setting for a list that is read-only, hence the edit, which fails the
build if matplotlib's text is not the expected one.
"""

import os
import pathlib
import py_compile
import shutil
import tempfile

cache = tempfile.mkdtemp()
os.environ["MPLCONFIGDIR"] = cache

import matplotlib.font_manager as font_manager  # noqa: E402  (reads the environment)

[listed] = pathlib.Path(cache).glob("fontlist-*.json")
bundled = pathlib.Path(font_manager.mpl.get_data_path(), "fontlist.json")
shutil.copyfile(listed, bundled)
shutil.rmtree(cache)

ANCHOR = """\
    if try_read_cache:
        try:
            fm = json_load(fm_path)
"""
EDITED = """\
    if try_read_cache:
        # Written when this image was built; the folder of the cache is empty in a new session.
        if not fm_path.exists():
            fm_path = Path(mpl.get_data_path(), "fontlist.json")
        try:
            fm = json_load(fm_path)
"""
source = pathlib.Path(font_manager.__file__)
text = source.read_text()
assert text.count(ANCHOR) == 1, f"{source} has changed: adapt {__file__}"
source.write_text(text.replace(ANCHOR, EDITED))
py_compile.compile(str(source), doraise=True)
