"""A Jupyter kernel that needs nothing but Python, and misbehaves when told to. Its code is a word and arguments."""

import hashlib
import hmac
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid

HOPPER = """
import os, sys, time
while True:
    if os.fork():
        os._exit(0)
    os.setsid()
    time.sleep(float(sys.argv[1]))
"""
CONFIG = json.load(open(sys.argv[-1]))
CHANNELS = {"shell": "shell", "iopub": "iopub", "stdin": "stdin", "control": "control", "heartbeat": "hb"}
PEERS = {}
READY = threading.Condition()


def frame(body, more):
    flags = 1 if more else 0
    head = bytes([flags, len(body)]) if len(body) < 256 else bytes([flags | 2]) + len(body).to_bytes(8, "big")
    return head + body


def send(peer, frames):
    peer.sendall(b"".join(frame(f, n + 1 < len(frames)) for n, f in enumerate(frames)))


def read(peer, count):
    data = b""
    while len(data) < count:
        piece = peer.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def receive(peer):
    frames = []
    while True:
        flags = read(peer, 1)[0]
        body = read(peer, int.from_bytes(read(peer, 8), "big") if flags & 2 else read(peer, 1)[0])
        if not flags & 4:
            frames.append(body)
            if not flags & 1:
                return frames


def message(kind, parent, content, key=None, buffers=()):
    header = {"msg_id": uuid.uuid4().hex, "msg_type": kind, "session": "s", "username": "u", "date": "", "version": "5.3"}
    parts = [json.dumps(p).encode() for p in (header, parent, {}, content)]
    signature = hmac.new((key or CONFIG["key"]).encode(), b"".join(parts), hashlib.sha256).hexdigest().encode()
    return [b"<IDS|MSG>", signature, *parts, *buffers]


def publish(*arguments, **more):
    send(PEERS["iopub"], [b"topic", *message(*arguments, **more)])


def out(parent, text, **more):
    publish("stream", parent, {"name": "stdout", "text": text}, **more)


def run(code, parent):
    word, *rest = code.split(" ")
    if word == "echo":
        out(parent, " ".join(rest))
    elif word == "one":
        out(parent, "begin" + "x" * (int(rest[0]) - 8) + "end")
    elif word == "many":
        count, size = map(int, rest)
        for n in range(count):
            text = ("begin" if n == 0 else "") + "x" * size
            out(parent, text[:size] if n + 1 < count else text[: size - 3] + "end")
    elif word == "display":
        publish("display_data", parent, {"data": {"text/plain": "x" * int(rest[0])}, "metadata": {}})
    elif word in ("exit", "abort"):
        out(parent, "going")
        sys.stderr.write("x" * 5000 + "last words\n")
        sys.stderr.flush()
        os._exit(int(rest[0])) if word == "exit" else os.abort()
    elif word == "daemon":
        out(parent, subprocess.check_output(["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!"], text=True).strip())
    elif word == "write":
        with open(rest[0], "w") as file:
            file.write("x" * int(rest[1]))
    elif word == "later":
        time.sleep(0.5)
        run(" ".join(rest), parent)
    elif word == "spill":
        run(f"many {rest[0]} {rest[1]}", parent)
        time.sleep(1000)
    elif word == "hang":
        out(parent, "hanging")
        time.sleep(1000)
    elif word == "hop":
        # Processes that hide, each replaced by another before anybody has read where it is.
        for _ in range(int(rest[0])):
            if os.fork() == 0:
                os.setsid()
                os.execve(sys.executable, [sys.executable, "-c", HOPPER, rest[1]], {})
        out(parent, "hopping")
        time.sleep(1000)
    elif word == "break":
        PEERS[rest[0]].sendall(b"\xff" * 100)
        time.sleep(100)
    elif word == "forge":
        out(parent, "forged", key="other")
        out(parent, "forged" * 50000, key="other")
        publish("iopub_welcome", {}, {})
        out(parent, "genuine")


def serve_requests(peer):
    while True:
        frames = receive(peer)
        at = frames.index(b"<IDS|MSG>")
        parent, content = json.loads(frames[at + 2]), json.loads(frames[at + 5])
        publish("status", parent, {"execution_state": "busy"})
        if parent["msg_type"] == "execute_request":
            run(content["code"], parent)
        kind = parent["msg_type"].replace("_request", "_reply")
        send(peer, message(kind, parent, {"status": "ok"}))
        publish("status", parent, {"execution_state": "idle"})


def serve(channel, listener):
    peer, _ = listener.accept()
    if os.environ.get("FAKE_SILENT") == channel:
        return time.sleep(1000)
    if os.environ.get("FAKE_GARBAGE") == channel:
        return peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), time.sleep(1000)
    peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + bytes(32))
    assert read(peer, 64)[12:16] == b"NULL"
    read(peer, 1), read(peer, read(peer, 1)[0])
    kind = b"XPUB" if channel == "iopub" else b"ROUTER"
    ready = b"\x05READY\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind
    peer.sendall(bytes([4, len(ready)]) + ready)
    if channel == "iopub":
        assert receive(peer) == [b"\x01"]
    with READY:
        PEERS[channel] = peer
        READY.notify_all()
        READY.wait_for(lambda: "iopub" in PEERS)
    if channel in ("shell", "control"):
        serve_requests(peer)
    while True:
        frames = receive(peer)
        if channel == "heartbeat":
            send(peer, frames)


def main():
    for channel, name in CHANNELS.items():
        if os.environ.get("FAKE_CLOSED") == channel:
            continue
        port = CONFIG[name + "_port"]
        if CONFIG["transport"] == "ipc":
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{CONFIG['ip']}-{port}")
        else:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((CONFIG["ip"], port))
        listener.listen()
        threading.Thread(target=serve, args=(channel, listener)).start()


main()
