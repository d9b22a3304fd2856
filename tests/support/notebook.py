"""What somebody with Jupyter does with a notebook: `check FILE` reads and validates it, `rerun FILE` runs it again and compares.

Runs in target/notebook. Prints JSON; knows of Cellblock only the metadata that it puts into cells.
"""

import json
import re
import sys
import tempfile
import warnings

import nbformat
from nbclient import NotebookClient

# What shows the same wherever it runs: no pictures, no addresses, no random ids.
COMPARED = ("text/plain", "text/html", "text/latex", "text/markdown", "application/json", "image/svg+xml", "application/vnd.plotly.v1+json")
GAP = re.compile(r"\n\[… [0-9]+ bytes left out …\]\n")


def check(path):
    # nbformat only warns of ids that are absent or twice there.
    warnings.simplefilter("error")
    with open(path, encoding="utf-8") as file:
        json.load(file, parse_constant=lambda word: sys.exit(f"{word} is no JSON"))
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook, relax_add_props=False)
    # Writing and reading it again changes nothing.
    assert nbformat.reads(nbformat.writes(notebook), as_version=nbformat.NO_CONVERT) == notebook
    return {"nbformat": [notebook.nbformat, notebook.nbformat_minor], "cells": len(notebook.cells)}


def of_its_own_accord(cell):
    """Whether a cell came to its end, and did so without anybody at the keyboard."""
    ended = cell.metadata.cellblock.status in ("ok", "error")
    return ended and not re.search(r"\b(input|getpass)\(", cell.source)


def texts(cell):
    """What a cell printed, by stream; what it showed, in order; and how it failed."""
    streams, shown, failed = {}, [], None
    for output in cell.outputs:
        if output.output_type == "stream":
            streams[output.name] = streams.get(output.name, "") + output.text
        elif output.output_type == "error":
            failed = [output.ename, output.evalue]
        else:
            shown.append({mime: output.data[mime] for mime in COMPARED if mime in output.data})
    return {"streams": streams, "shown": shown, "failed": failed}


def is_same_text(was, now):
    """Where a part was left out, what is there is the beginning and the end. Of so much text Jupyter itself loses some: its kernel drops what
    nobody takes from it in time. The beginning is there."""
    head, *tail = GAP.split(was)
    return now.startswith(head) if tail else now == was


def differences(was, now):
    was, now = texts(was), texts(now)
    streams = was["streams"].keys() | now["streams"].keys()
    for name in streams:
        before, after = was["streams"].get(name, ""), now["streams"].get(name, "")
        if not is_same_text(before, after):
            yield {name: [before[:500], after[:500]]}
    for what in ("shown", "failed"):
        if was[what] != now[what]:
            yield {what: [was[what], now[what]]}


def rerun(path):
    """Runs the cells of each context in a kernel of their own, as they did run."""
    notebook = nbformat.read(path, as_version=4)
    contexts = list(dict.fromkeys(cell.metadata.cellblock.context for cell in notebook.cells))
    ran, left_out, found = [], [], []
    for context in contexts:
        own = [cell for cell in notebook.cells if cell.metadata.cellblock.context == context]
        again = nbformat.from_dict(notebook)
        again.cells = [nbformat.from_dict(json.loads(json.dumps(cell))) for cell in own if of_its_own_accord(cell)]
        left_out += [cell.id for cell in own if not of_its_own_accord(cell)]
        for cell in again.cells:
            cell.outputs, cell.execution_count = [], None
            if cell.metadata.cellblock.status == "error":
                cell.metadata.tags = ["raises-exception"]
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(again, timeout=120, resources={"metadata": {"path": folder}}).execute()
        before = {cell.id: cell for cell in own}
        for cell in again.cells:
            ran.append(cell.id)
            found += [{"cell": cell.source[:200], **difference} for difference in differences(before[cell.id], cell)]
    return {"ran": ran, "left_out": left_out, "differences": found}


print(json.dumps({"check": check, "rerun": rerun}[sys.argv[1]](sys.argv[2])))
