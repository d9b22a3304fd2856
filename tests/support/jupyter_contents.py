"""Asks a server and Jupyter Server's own manager of contents the same, and compares what they say: `jupyter_contents.py URL KEY KERNEL`. Ends with 0 if they agree."""

import base64
import json
import sys
import tempfile
import urllib.error
import urllib.request

from jupyter_server.services.contents.handlers import validate_model
from jupyter_server.services.contents.largefilemanager import LargeFileManager
from tornado.web import HTTPError

# What differs between any two places.
NOT_COMPARED = {"created", "last_modified"}


class Ours:
    def __init__(self, url, key, kernel):
        self.url, self.key, self.kernel = url, key, kernel

    def ask(self, method, path, body=None, query=""):
        data = None if body is None else json.dumps(body).encode()
        url = f"{self.url}/api/contents/{self.kernel}/{path}{query}"
        request = urllib.request.Request(url, data, {"Authorization": f"token {self.key}"}, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                text = answer.read()
                return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            assert json.loads(error.read())["message"], "an error says what is wrong"
            return error.code

    def get(self, path, type=None, content=1, format=None, require_hash=0):
        given = {"type": type, "content": content, "format": format, "hash": require_hash}
        query = "&".join(f"{name}={value}" for name, value in given.items() if value is not None)
        return self.ask("GET", path, query=f"?{query}")

    def save(self, model, path):
        return self.ask("PUT", path, model)

    def new_untitled(self, path, type="", ext=""):
        return self.ask("POST", path, {"type": type, "ext": ext} if type or ext else {})

    def copy(self, source, path):
        return self.ask("POST", path, {"copy_from": f"{self.kernel}/{source}"})

    def rename(self, path, new):
        return self.ask("PATCH", path, {"path": f"{self.kernel}/{new}"})

    def delete(self, path):
        return self.ask("DELETE", path)


class Theirs:
    def __init__(self, folder):
        # Without a bin, a folder with something in it is not removed.
        self.manager = LargeFileManager(root_dir=folder, delete_to_trash=False, allow_hidden=True)

    def __getattr__(self, name):
        asked = getattr(self.manager, "rename_file" if name == "rename" else name)

        def ask(*given, **named):
            try:
                answer = asked(*given, **named)
                # As its handler answers.
                return self.manager.get(given[1], content=False) if name == "rename" else answer
            except HTTPError as error:
                return error.status_code

        return ask


def comparable(model, kernel):
    """A model as both should have it."""
    if not isinstance(model, dict):
        return model
    told = {name: value for name, value in model.items() if name not in NOT_COMPARED}
    assert NOT_COMPARED <= model.keys(), model
    told["path"] = told["path"].removeprefix(f"{kernel}/").removeprefix(kernel).strip("/")
    if told["path"] == "":
        told["name"] = ""
    if told["format"] == "base64":
        # Theirs has it in lines.
        told["content"] = "".join(told["content"].split())
    if told["type"] == "directory" and told["content"] is not None:
        entries = [comparable(entry, kernel) for entry in told["content"]]
        told["content"] = sorted(entries, key=lambda entry: entry["name"])
    return json.loads(json.dumps(told))


def main(url, key, kernel):
    ours = Ours(url, key, kernel)
    asked = 0
    with tempfile.TemporaryDirectory() as folder:
        theirs = Theirs(folder)

        def both(name, *given, **named):
            nonlocal asked
            asked += 1
            told = [comparable(getattr(who, name)(*given, **named), kernel) for who in (ours, theirs)]
            assert told[0] == told[1], f"{name}{given}{named}:\nours   {told[0]}\ntheirs {told[1]}"
            return told[0]

        text = {"type": "file", "format": "text", "content": "é\n"}
        picture = {"type": "file", "format": "base64", "content": base64.encodebytes(bytes(range(256))).decode()}
        cell = {"cell_type": "code", "source": "1 +\\\n1", "metadata": {"trusted": True}, "outputs": [], "execution_count": None, "id": "a"}
        notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]}
        book = {"type": "notebook", "format": "json", "content": notebook}
        both("save", {"type": "directory"}, "d")
        both("save", {"type": "directory"}, "d")
        both("save", text, "d/a.txt")
        both("save", {**text, "content": "é!\n"}, "d/a.txt")
        both("save", picture, "d/p.png")
        both("save", {**text, "content": ""}, "d/none")
        for wrong in ({}, {"type": "file"}, {"type": "file", "content": "x"}):
            # A manager that is asked without its handler says 500 to the last one.
            assert ours.save(wrong, "d/wrong") == 400
        for path in ("", "d", "d/a.txt", "d/p.png", "d/none", "nothing", "d/nothing", "d/a.txt/x"):
            for kind in (None, "directory", "file"):
                for content in (0, 1):
                    both("get", path, type=kind, content=content)
        for path in ("d/a.txt", "d/p.png"):
            for form in ("text", "base64"):
                both("get", path, format=form, type="file")
            for content in (0, 1):
                both("get", path, content=content, require_hash=1)
        both("new_untitled", "d")
        both("new_untitled", "d", ext=".txt")
        both("new_untitled", "d", ext=".txt")
        both("new_untitled", "d", type="notebook")
        both("new_untitled", "d", type="notebook")
        both("new_untitled", "d", type="directory")
        both("new_untitled", "d", type="directory")
        both("copy", "d/a.txt", "d")
        both("copy", "d/a.txt", "d")
        both("copy", "d/a-Copy1.txt", "d")
        both("copy", "d/Untitled.ipynb", "d")
        both("rename", "d/none", "d/some")
        both("rename", "d/some", "d/a.txt")
        both("delete", "d/nothing")
        both("delete", "d/some")
        assert ours.get("d/some") == 404
        # In pieces of 100 bytes.
        whole = bytes(range(256))
        chunks = [whole[at : at + 100] for at in range(0, len(whole), 100)]
        for number, chunk in enumerate(chunks, 1):
            model = {"type": "file", "format": "base64", "content": base64.b64encode(chunk).decode()}
            model["chunk"] = -1 if number == len(chunks) else number
            both("save", model, "d/pieces.bin")
        both("get", "d/pieces.bin", content=1)
        assert ours.save({**text, "chunk": 2}, "d/other") == 400, "it follows none"
        # Files of notebooks differ in their white space, and ours are kept as they are sent.
        saved = ours.save(book, "d/n.ipynb")
        validate_model(saved)
        theirs.save(book, "d/n.ipynb")
        told = [comparable(who.get("d/n.ipynb"), kernel) for who in (ours, theirs)]
        for model in told:
            del model["size"]
        # Theirs believes what it has written itself.
        trusted = [model["content"]["cells"][0]["metadata"].pop("trusted") for model in told]
        assert told[0] == told[1] and trusted == [False, True], told
        for path in ("", "d", "d/a.txt", "d/n.ipynb", "d/p.png"):
            for content in (0, 1):
                validate_model(ours.get(path, content=content), expect_content=bool(content))
            if "." in path:
                validate_model(ours.get(path, require_hash=1), expect_content=True, expect_hash=True)
        assert ours.ask("GET", "d/a.txt/checkpoints") == []
        assert ours.ask("POST", "d/a.txt/checkpoints") == 403
        assert ours.ask("DELETE", "d") == 400, "there is something in it"
        # A folder may be called so.
        assert ours.save({"type": "directory"}, "checkpoints")["type"] == "directory"
        assert ours.get("checkpoints")["content"] == []
    print(f"{asked} questions have the same answers")


main(*sys.argv[1:])
