"""Installs packages into the session's own environment, with the pip of the image: into a folder beside it first, so that what fails leaves nothing behind, and never over what
the image has. Stands for `pip._internal.cli.main` in a cell, and is a program: `install REQUIREMENT…` and `list`. It protects nobody from the code in the cell, which
could do without it: what may be fetched is decided outside. Python 3.8 or later."""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import threading

PACKAGES = os.environ.get("CELLBLOCK_WORKDIR", "/workspace") + "/.packages"
VERSION = f"python{sys.version_info[0]}.{sys.version_info[1]}"
SITE = f"{PACKAGES}/lib/{VERSION}/site-packages"
INDEX = "http://packages.upstream"
POLICY = os.environ.get("CELLBLOCK_PACKAGES", "none")
# How often it is looked how much was added, in seconds: nothing tells of it.
LOOK = 0.25
# Options that say where to install, so that it is not ours to say.
PLACES = ("-t", "--target", "--prefix", "--root", "--user", "--dry-run", "--python", "-h", "--help")
# Names that packages.upstream and its proxy are behind.
PROXY = "http://127.0.0.1:3128"


def say(text):
    print(f"cellblock: {text}", file=sys.stderr, flush=True)


def own_pip():
    """The image's own `pip._internal.cli.main`."""
    import importlib.util
    from importlib.machinery import PathFinder

    import pip._internal.cli

    spec = PathFinder.find_spec("pip._internal.cli.main", pip._internal.cli.__path__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def normal(name):
    import re

    return re.sub(r"[-_.]+", "-", name or "").lower()


def dists(*folders):
    """Packages by their names, the first of each."""
    from importlib.metadata import distributions

    found = {}
    for dist in distributions(path=list(folders)):
        with contextlib.suppress(Exception):
            found.setdefault(normal(dist.metadata["Name"]), dist)
    return found


def folders_of_image():
    return [place for place in sys.path if place and os.path.abspath(place) != SITE]


def size_of(folder):
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def remove(dist):
    """Takes a package of the session's out again."""
    for file in dist.files or []:
        path = os.path.abspath(os.path.join(SITE, str(file)))
        if path.startswith(PACKAGES + "/"):
            with contextlib.suppress(OSError):
                os.unlink(path)
            with contextlib.suppress(OSError):
                os.removedirs(os.path.dirname(path))
    folder = getattr(dist, "_path", None)
    if folder is not None and os.path.abspath(folder).startswith(SITE + "/"):
        shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(SITE, 0o700, exist_ok=True)


def merge(source, target):
    os.makedirs(target, 0o700, exist_ok=True)
    for entry in list(os.scandir(source)):
        there = os.path.join(target, entry.name)
        if entry.is_dir(follow_symlinks=False) and os.path.isdir(there):
            merge(entry.path, there)
        else:
            os.replace(entry.path, there)


def clean():
    """Removes what an installation that was killed has left; nobody installs now."""
    for entry in os.scandir(PACKAGES):
        if entry.name.startswith(".new-"):
            shutil.rmtree(entry.path, ignore_errors=True)


class Watch:
    """Ends an installation that adds too much."""

    def __init__(self, folder):
        self.folder, self.most, self.is_over = folder, int(os.environ.get("CELLBLOCK_PACKAGES_BYTES", "0") or 0), False
        self.done = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.look, daemon=True).start()
        return self

    def look(self):
        import _thread

        while not self.done.wait(LOOK):
            if self.exceeds():
                _thread.interrupt_main()
                return

    def exceeds(self):
        if self.most and not self.is_over and size_of(self.folder) > self.most:
            self.is_over = True
        return self.is_over

    def __exit__(self, *error):
        self.done.set()


def why():
    """What the server has to say of packages that it did not give."""
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": PROXY}))
    with contextlib.suppress(Exception), opener.open(f"{INDEX}/why", timeout=10) as answer:
        for line in answer.read(65536).decode("utf-8", "replace").splitlines():
            say(line)


def options():
    """What every pip of a cell keeps to, where its caller does not say otherwise."""
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    os.environ.setdefault("PIP_NO_CACHE_DIR", "1")
    os.environ.setdefault("PIP_NO_INPUT", "1")
    os.environ.setdefault("PIP_ROOT_USER_ACTION", "ignore")
    if POLICY != "none":
        os.environ.setdefault("PIP_INDEX_URL", f"{INDEX}/simple/")
        os.environ.setdefault("PIP_TRUSTED_HOST", "packages.upstream")
        # Also where the session's own network is none, so that its environment names no proxy.
        os.environ.setdefault("HTTP_PROXY", PROXY)
        os.environ.setdefault("http_proxy", PROXY)


def refuse():
    if POLICY != "none" or any(name.lower() == "https_proxy" for name in os.environ):
        return False
    say('nothing can be installed here: the packages policy of this session\'s template is "none", and it has no network.')
    return True


def install(arguments):
    """The status, and what was added."""
    os.makedirs(SITE, 0o700, exist_ok=True)
    with open(f"{PACKAGES}/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clean()
        new = f"{PACKAGES}/.new-{os.getpid()}"
        os.makedirs(f"{new}/tmp", 0o700)
        try:
            return install_into(new, arguments)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def install_into(new, arguments):
    import tempfile

    image = dists(*folders_of_image())
    constraints = f"{new}/constraints.txt"
    with open(constraints, "w") as file:
        for name, dist in image.items():
            file.write(f"{name}=={dist.version}\n")
    # Downloads are not to fill the small folder for temporary files.
    os.environ["TMPDIR"] = tempfile.tempdir = f"{new}/tmp"
    ours = ["--prefix", f"{new}/prefix", "--no-warn-script-location", "--only-binary", ":all:", "--constraint", constraints]
    with Watch(f"{new}/prefix") as watch:
        try:
            status = own_pip()(["install", *ours, *arguments])
        except KeyboardInterrupt:
            status = 1
        except OSError as error:
            say(f"the installation failed: {error}")
            status = 1
    if watch.exceeds():
        say(f"the installation would add more than {watch.most} bytes (packages.size), and was undone.")
        return 1, []
    if status:
        if POLICY != "none":
            why()
        return status, []
    return 0, take_over(new, image)


def take_over(new, image):
    site = f"{new}/prefix/lib/{VERSION}/site-packages"
    added = {name: dist for name, dist in dists(site).items()} if os.path.isdir(site) else {}
    known = dists(SITE)
    told = []
    for name, dist in sorted(added.items()):
        told.append({"name": name, "version": dist.version})
        if name in known:
            remove(known[name])
    if os.path.isdir(f"{new}/prefix"):
        merge(f"{new}/prefix", PACKAGES)
    return told


def uninstall(arguments):
    """Those of the session's own; nothing if others are meant too, which is pip's to answer."""
    known = dists(SITE)
    names = [normal(argument) for argument in arguments if not argument.startswith("-")]
    if not names or any(name not in known for name in names):
        return None
    for name in names:
        # It is read from what is about to go.
        version = known[name].version
        remove(known[name])
        print(f"Removed {name} {version}")
    return 0


def main(arguments=None):
    """As pip's own."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else ""
    if command in ("install", "download", "wheel") and "--help" not in arguments and refuse():
        return 1
    options()
    is_ours = not any(argument.split("=")[0] in PLACES for argument in arguments)
    if command == "install" and is_ours:
        status, _ = install(arguments[1:])
        return status
    if command == "uninstall":
        status = uninstall(arguments[1:])
        if status is not None:
            return status
    return own_pip()(arguments)


def listed():
    own, image = dists(SITE), dists(*folders_of_image())
    rows = [{"name": n, "version": d.version, "source": "session"} for n, d in own.items() if n not in image]
    rows += [{"name": n, "version": d.version, "source": "image"} for n, d in image.items()]
    return sorted(rows, key=lambda row: row["name"])


def program(arguments):
    """What the server has run; its last line is for the server to read."""
    if arguments[:1] == ["list"]:
        print(json.dumps({"packages": listed()}))
        return 0
    if refuse():
        return 1
    options()
    status, added = install(["--progress-bar", "off", *arguments[1:]])
    print(json.dumps({"added": added}), flush=True)
    return status


# What newer ones are started by.
cli = main

if __name__ == "__main__":
    sys.exit(program(sys.argv[1:]))
