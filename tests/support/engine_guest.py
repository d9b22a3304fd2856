#!/opt/venv/bin/python3
"""Stands in for the guest where a test needs what the real one never does: answers markers, floods, swallows, stays silent."""

import os

MAGIC = bytes.fromhex("ce11b10c00ff5aa59d3e71c428f60bd7")


def write(data):
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


held = b""
while True:
    read = os.read(0, 1 << 16)
    if not read:
        break
    held += read
    while True:
        at = held.find(MAGIC)
        if at >= 0 and len(held) >= at + 48:
            write(held[at : at + 48])
            held = held[at + 48 :]
        elif held.startswith(b"flood ") and b"\n" in held:
            line, held = held.split(b"\n", 1)
            block = bytes(1 << 20)
            for _ in range(int(line.split()[1])):
                write(block)
        elif held.startswith(b"swallow ") and b"\n" in held:
            line, held = held.split(b"\n", 1)
            left = int(line.split()[1]) << 20
            left -= min(left, len(held))
            while left:
                left -= len(os.read(0, min(left, 1 << 20)))
            held = b""
            write(b"done")
        else:
            break
