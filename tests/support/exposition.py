"""Reads what /metrics answers (stdin) as Prometheus does, with its own client library, and judges names as `promtool check metrics` does.

Prints {"types": {name: type}, "samples": [[name, labels, value]], "mistakes": [text]} as JSON. NaN and infinities are texts.
"""

import json
import math
import re
import sys

from prometheus_client.parser import text_string_to_metric_families

# Words for units that are not base units, or short for one.
NOT_BASE = {
    "milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "weeks", "kilobytes", "megabytes", "gigabytes", "kibibytes",
    "mebibytes", "gibibytes", "bits", "percent", "millis", "s", "ms", "us", "ns", "sec", "secs", "b", "kb", "mb", "gb", "m", "h", "d",
}
TYPES = {"counter", "gauge", "histogram", "summary", "untyped"}


def mistakes_of(name, kind, help_text, labels):
    words = set(name.split("_"))
    if not name.startswith("cellblock_"):
        yield "is not one of ours"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        yield "is not in snake case"
    if not help_text:
        yield "has no help"
    if kind not in ("counter", "gauge", "histogram"):
        yield f"is of the type {kind}"
    if (kind == "counter") != name.endswith("_total"):
        yield "ends with _total if it is a counter, and only then"
    if kind != "histogram" and (name.endswith(("_bucket", "_count", "_sum")) or "le" in labels):
        yield "looks like a part of a histogram"
    if words & NOT_BASE:
        yield f"has a unit that is not a base unit: {sorted(words & NOT_BASE)}"
    if words & TYPES:
        yield "has its type in its name"
    for label in labels:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", label):
            yield f"has a label that is not in snake case: {label}"


def number(value):
    return value if math.isfinite(value) else str(value)


def main():
    text = sys.stdin.read()
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.M))
    declared = re.findall(r"^# TYPE (\S+) ", text, re.M)
    mistakes = [f"{name} is declared twice" for name in types if declared.count(name) > 1]
    samples, labels, seen = [], {name: set() for name in types}, set()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            base = sample.name if sample.name in types else re.sub(r"_(bucket|count|sum)$", "", sample.name)
            if base not in types:
                mistakes.append(f"{sample.name} has no type")
                continue
            # `le` is what makes a bucket one.
            labels[base] |= set(sample.labels) - ({"le"} if types[base] == "histogram" else set())
            key = (sample.name, tuple(sorted(sample.labels.items())))
            if key in seen:
                mistakes.append(f"{key} is there twice")
            seen.add(key)
            samples.append([sample.name, sample.labels, number(sample.value)])
    for name, kind in types.items():
        mistakes += [f"{name} {mistake}" for mistake in mistakes_of(name, kind, helps.get(name), labels[name])]
    json.dump({"types": types, "samples": samples, "mistakes": mistakes}, sys.stdout)


main()
