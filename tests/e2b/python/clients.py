"""Runs E2B's own Python clients, as they come, against a server: `clients.py URL KEY CASES`. Ends with 0 if the client got what it should.

They find the server by the environment alone, as programs do that are moved. A case is a function of this module; what it asserts is what E2B's programs rely on."""

import importlib.metadata
import os
import re
import sys
import time


def surroundings(url, key):
    """The three variables that move a program, and nothing else of E2B's."""
    for name in [name for name in os.environ if name.startswith("E2B_")]:
        del os.environ[name]
    os.environ.update(E2B_API_URL=url, E2B_SANDBOX_URL=url, E2B_API_KEY=key)


def refused(kind, call, *args, **named):
    try:
        call(*args, **named)
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def until(what, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come")


def leave():
    """Ends well. Not by way of the interpreter's own end: there a native thread of the client's sometimes aborts, when all is done (SIGABRT without a Python frame)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def versions(key):
    assert re.fullmatch("e2b_[0-9a-f]+", key), "older clients take no other form"
    assert importlib.metadata.version("e2b") == "2.63.0"
    assert importlib.metadata.version("e2b-code-interpreter") == "2.11.5"


def a_wrong_key_is_told_as_one(_key):
    import e2b

    for name in ("base", "code-interpreter-v1"):
        try:
            e2b.Sandbox.create(name, api_key="e2b_" + "0" * 64)
        except e2b.AuthenticationException as error:
            assert "key" in str(error), error
        else:
            raise AssertionError("a wrong key was taken")


def main():
    url, key, cases = sys.argv[1:]
    surroundings(url, key)
    for case in cases.split(","):
        globals()[case](key)


if __name__ == "__main__":
    main()
