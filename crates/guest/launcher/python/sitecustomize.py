"""Imported by each Python of a cell as it starts. Packages that the session has installed are found behind all others, and pip installs them there. Python 3.8 or later."""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGES = os.environ.get("CELLBLOCK_WORKDIR", "/workspace") + "/.packages"
SITE = f"{PACKAGES}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"


class PipFinder:
    """What every way to start pip imports is our own, which does the rest with pip's."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "pip._internal.cli.main":
            return None
        import importlib.util

        return importlib.util.spec_from_file_location(name, f"{HERE}/cellblock_packages.py")


def prepare():
    if SITE not in sys.path:
        # At the end: what the image has is what its kernel works with.
        sys.path.append(SITE)
    if os.environ.get("CELLBLOCK_PACKAGES", "none") != "none" or "HTTPS_PROXY" in os.environ:
        try:
            # A folder that is not there when it is looked for first is not looked for again.
            os.makedirs(SITE, 0o700, exist_ok=True)
        except OSError:
            pass
    sys.meta_path.insert(0, PipFinder)


def go_on():
    """An image may have such a file too."""
    from importlib.machinery import PathFinder

    others = [place for place in sys.path if os.path.abspath(place or ".") != HERE]
    spec = PathFinder.find_spec(__name__, others)
    if spec is not None and spec.loader is not None:
        module = type(sys)(__name__)
        module.__spec__, module.__file__ = spec, spec.origin
        spec.loader.exec_module(module)


prepare()
go_on()
