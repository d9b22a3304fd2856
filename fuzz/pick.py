#!/usr/bin/env python3
"""Picks the inputs of a corpus that together reach the most: fuzz/pick.py CONTROL_FILE MOST FOLDER

Reads what libFuzzer writes with -set_cover_merge and -merge_control_file, and copies at most MOST inputs into FOLDER, each named by its
content.
"""

import hashlib
import sys
from pathlib import Path


def read(control):
    """Each input's path with its features: an edge, and one of eight ranges of how often it was passed."""
    lines = control.read_text().splitlines()
    paths = lines[2 : 2 + int(lines[0])]
    features = [set() for _ in paths]
    for line in lines[2 + len(paths) :]:
        kind, at, *numbers = line.split()
        if kind == "FT":
            features[int(at)] = {int(number) for number in numbers}
    return [(Path(path), {number // 8 for number in found}, found) for path, found in zip(paths, features)]


def pick(inputs, most):
    """Takes what adds the most edges, then the most counts, then the shortest, for as long as anything is added."""
    edges, counts, picked = set(), set(), []
    sized = [(-path.stat().st_size, path, its_edges, its_counts) for path, its_edges, its_counts in inputs]
    while sized and len(picked) < most:
        best = max(sized, key=lambda i: (len(i[2] - edges), len(i[3] - counts), i[0]))
        if not best[2] - edges and not best[3] - counts:
            break
        edges |= best[2]
        counts |= best[3]
        picked.append(best[1])
        sized.remove(best)
    return picked


def main():
    control, most, folder = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    for path in pick(read(control), most):
        content = path.read_bytes()
        (folder / hashlib.sha1(content).hexdigest()).write_bytes(content)


main()
