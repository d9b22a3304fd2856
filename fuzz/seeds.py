#!/usr/bin/env python3
"""Writes first inputs for every fuzz target: fuzz/seeds.py FOLDER

What a real kernel says, in the form in which a target takes it. `scripts/fuzz --grow` puts them, and what it finds, into fuzz/corpus; they
are needed again only when a target reads its input in another way.
"""

import json
import struct
import sys
from pathlib import Path

RED, END = "\x1b[31m", "\x1b[39m"
ERROR = {
    "ename": "ZeroDivisionError",
    "evalue": "division by zero",
    "traceback": [f"{RED}-----{END}", f"Cell {RED}In[2]{END}, line 1\n-> 1/0", f"{RED}ZeroDivisionError{END}: division by zero"],
}
VALUES = {"v": {"status": "ok", "data": {"text/plain": "2"}, "metadata": {}}, "w": {"status": "error", **ERROR}}
REPLY = {"status": "ok", "execution_count": 1, "user_expressions": VALUES, "payload": []}
LANGUAGE = {"name": "python", "version": "3.11.2", "mimetype": "text/x-python", "codemirror_mode": {"name": "ipython", "version": 3}}
TABLE = {
    "text/plain": "   a\n0  1",
    "text/html": "<table>\n<td>1</td></table>",
    "image/png": "iVBORw0KGgo=\n",
    "application/json": {"a": [1, 2.5e3, None]},
}
PAYLOADS = [{"source": "ask_exit", "keepkernel": False}, {"source": "page", "data": {"text/plain": "x"}, "start": 0}]

# What ipykernel says, in the order of the protocol target's kinds where it says it.
MESSAGES = [
    ("status", {"execution_state": "busy"}),
    ("execute_input", {"code": "print('hé\\u2028')", "execution_count": 1}),
    ("stream", {"name": "stdout", "text": "hé\u2028llo \U0001f600\n"}),
    ("stream", {"name": "stderr", "text": "w\x1b[31m \"quoted\" \\\n"}),
    ("display_data", {"data": TABLE, "metadata": {"image/png": {"width": 3}}, "transient": {"display_id": "50ad87e9"}}),
    ("update_display_data", {"data": {"text/html": "<b>2</b>"}, "metadata": {}, "transient": {"display_id": "50ad87e9"}}),
    ("execute_result", {"data": {"text/plain": "4"}, "metadata": {}, "execution_count": 3}),
    ("clear_output", {"wait": True}),
    ("error", ERROR),
    ("comm_open", {"comm_id": "c", "target_name": "jupyter.widget", "data": {"state": {"value": 0.5}, "buffer_paths": [["state", "x"]]}}),
    ("comm_msg", {"comm_id": "c", "data": {"method": "update", "state": {"value": 1}}}),
    ("comm_close", {"comm_id": "c", "data": {}}),
    ("input_request", {"prompt": "name? ", "password": False}),
    ("execute_reply", REPLY),
    ("execute_reply", {"status": "error", "execution_count": 2, **ERROR, "payload": [], "user_expressions": {}}),
    ("execute_reply", {**REPLY, "payload": PAYLOADS}),
    ("kernel_info_reply", {"status": "ok", "protocol_version": "5.3", "language_info": LANGUAGE, "banner": "Python 3.11.2"}),
    ("status", {"execution_state": "idle"}),
]
# As `Filler` has them: runs of text, of two-byte characters, and of escaped line ends.
RUN, WIDE, LINES = "\x1a", "\x1b", "\x1c"
READS = [bytes([255] * 4), bytes([0] * 4), bytes([2, 9, 0, 40])]


def texts(content):
    """The ways in which a kernel may write a content."""
    yield json.dumps(content, ensure_ascii=False).encode()
    yield json.dumps(content, separators=(",", ":")).encode()


def json_seeds():
    odd = [
        rb'{"a":{"text":"no"},"b":[{"text":"no"}],"x":NaN,"text":"one","t\u0065xt":"tw\udc80o","name":["p",["q"],"r"]}',
        b'{"text":"\xff\xf0\x9f\x98\xed\xb2\x80"}',
        b'["text","a"]',
        rb'{"text":"\ud83d\n\ud83d\ud83d\ude00\ude00x\ud83d","name":"\ud83d\u0041\ud83d"}',
        rb'{"status":"error","evalue":"\ud83d\ude00\ud83d","traceback":["a","\u00e9\/\b\f\r\t"],"name":"x","name":"y"}',
    ]
    for at, text in enumerate([text for _, content in MESSAGES for text in texts(content)] + odd):
        yield READS[at % 3] + text


KINDS = ["stream", "display_data", "execute_result", "update_display_data", "error", "clear_output", "status", "execute_input",
         "execute_reply", "kernel_info_reply", "input_request", "comm_open", "comm_msg", "comm_close"]


def protocol_seeds():
    for kind, content in MESSAGES:
        for text in texts(content):
            yield bytes([KINDS.index(kind), 0]) + text
    many = {"data": {f"a/{n}": n for n in range(40)}, "transient": None}
    yield bytes([1, 0]) + json.dumps(many).encode()
    yield bytes([4, 0]) + json.dumps({"ename": "E", "traceback": [""] * 1010}, separators=(",", ":")).encode()
    odd = [b"[1e999]", b'"\\ud800"', b"[" * 101 + b"]" * 101, b'[ "\\ud83d\\ude00\\n" ,\n -1.50E+2 ]', b'{"a":{"a":"\\udc00"}}']
    for text in odd:
        yield bytes([1, 0]) + b'{"data":{"application/json":' + text + b'},"metadata":{"x":' + text + b"}}"
        yield bytes([12, 0]) + b'{"data":' + text + b"}"
        yield bytes([8, 0]) + b'{"status":"ok","user_expressions":{"v":' + text + b'},"payload":[' + text + b"]}"
    yield bytes([1, 12]) + b'{"data":{},"transient":{"display_id":"' + WIDE.encode() + b'"}}'
    yield bytes([9, 13]) + b'{"language_info":{"name":"python","x":"' + RUN.encode() + b'"}}'
    yield bytes([10, 12]) + b'{"prompt":"' + WIDE.encode() + b'","password":true}'


def frame(body, more=False, command=False):
    flags = more | command << 2
    if len(body) < 256:
        return bytes([flags, len(body)]) + body
    return bytes([flags | 2]) + struct.pack(">Q", len(body)) + body


def zmtp_seeds():
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER\x08Identity\x00\x00\x00\x00"
    ping = b"\x04PING\x00\x0acontext"
    message = frame(b"topic", True) + frame(b"<IDS|MSG>", True) + frame(b"{}" * 200)
    streams = [
        greeting + frame(ready, command=True) + message + frame(ping, command=True),
        greeting + frame(ping, command=True) * 7 + frame(ready, command=True),
        greeting + frame(ping, command=True) * 8 + frame(ready, command=True),
        greeting + frame(b"\x05ERROR\x03no.", command=True),
        greeting + b"\x06" + struct.pack(">Q", 1 << 40),
        greeting + frame(b"x" * 1024, command=True) + frame(ready, command=True) + b"\x03",
        greeting[:10] + b"\x01",
        message + frame(ping, command=True) + frame(ping * 4, command=True),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        frame(b"", True) + frame(b"") + b"\x05\x00",
    ]
    for stream in streams:
        yield from (reads + stream for reads in READS)


def part(body):
    return struct.pack(">I", len(body)) + body


def link_frame(head, *parts):
    return part(part(head) + b"".join(part(p) for p in parts))


def wire_frame_seeds():
    heads = [
        {"type": "message", "channel": "iopub", "msg_type": "stream", "parent_id": "e"},
        {"type": "gap", "parent_id": "e", "stream": "stdout", "total_bytes": 9, "omitted_bytes": 3},
        {"type": "kernel_connected"},
        {"type": "kernel_exited", "status": 1, "signal": None, "oom_kills": 0, "swept": False, "stderr_tail": "x"},
        {"type": "effects", "parent_id": "e", "effects": {"files": [{"path": "a", "change": "created", "size_bytes": 3, "sha256": "0f"}],
                                                          "processes": [{"pid": 7, "command": "sleep 9"}], "cpu_usec": 5}},
    ]
    numbered = [json.dumps({"seq": at, "kernel": "k", **head}).encode() for at, head in enumerate(heads, 1)]
    frames = [link_frame(head, b"{}", b'{"msg_id":"e"}', b"{}", b'{"name":"stdout","text":"x"}') for head in numbered]
    marker = bytes.fromhex("ce11b10c00ff5aa59d3e71c428f60bd7") + bytes([7] * 16) + bytes(range(16))
    stranger = marker[:16] + bytes([8] * 16) + marker[32:]
    streams = frames + [
        b"".join(frames),
        link_frame(b"1", *[b""] * 73),
        b"\x01\x80\x00\x01",
        part(b"\x00\x04\x00\x01"),
        b"PRI * HTTP/2" + marker + b"PRI * HTTP/2" + marker[:20],
        stranger + marker + marker[:16] + marker,
        marker[:1] + marker[:47] + marker[:1],
    ]
    for stream in streams:
        yield from (reads + stream for reads in READS)


TYPES = ["stream", "display_data", "execute_result", "error", "status", "execute_input", "execute_reply", "input_request", "comm_msg",
         "clear_output", "iopub_welcome"]
PLENTY = bytes([12, 12, 12, 11, 6])
TIGHT = bytes([5, 5, 6, 3, 3])
SHARED = bytes([7, 7, 6, 11, 6])


def step(kind, text, what=0, parent=0, sign=0, place=0, length=0, buffer=0, buffers=0):
    """A message of a script, see `Script`. Room is plenty where what and kind make it 3."""
    number = TYPES.index(kind) if kind in TYPES else 11
    return bytes([what, number, parent | sign << 2 | place << 4, length | buffer << 4, buffers]) + text + b"\0"


def message_seeds():
    said = [(kind, text) for kind, content in MESSAGES for text in texts(content)]
    cell = b"".join(step(kind, text, what=3) for kind, text in said if kind in TYPES and not kind.endswith(("_reply", "_request")))
    replies = b"".join(step(kind, text, what=4) for kind, text in said if kind == "execute_reply")
    asked = step("input_request", b'{"prompt":"name? ","password":false}', what=5)
    idle = step("status", b'{"execution_state":"idle"}', what=3)
    printed = [step("stream", f'{{"name":"{name}","text":"{run}"}}'.encode(), what=3, length=length)
               for name in ["stdout", "stderr"] for run in [RUN, WIDE, LINES] for length in [4, 9, 14]]
    error = f'{{"ename":"E","evalue":"a{WIDE}{"é" * 17}{"éa" * 200}","traceback":["{RUN}","{RUN}","{RUN}","{RUN}"]}}'
    long = [
        *[b"".join(printed[at::3]) + idle for at in range(3)],
        printed[1] + printed[10].replace(b"\x03", b"\x00", 1) + idle,
        printed[5] + printed[14] + idle + replies,
        step("error", json.dumps(ERROR).replace("division", RUN * 2).encode(), what=3, length=15) + idle,
        step("stream", b'{"name":"' + RUN.encode() + b'","text":"x"}', what=3, length=8) + idle,
        step("stream", b'{"name":"' + RUN.encode() + b'","text":"x"}', what=3, length=14) + idle,
        step("error", error.encode(), what=3, length=14) + idle,
        step("display_data", b'{"data":{}}', what=3, length=0, buffer=8, buffers=3) + idle,
        step("stream", b'{"name":"stdout","text":"x"}', what=3, buffer=14, buffers=2) + idle,
        step("comm_msg", b"{}", what=3, buffers=60) + step("", b'{"msg_type":"x"}', what=3, place=4) + step("", b"{", what=3, place=5),
        step("stream", b'{"name":"stdout","text":"late"}', parent=3) * 5 + bytes([7, 0, 0, 0, 0]) + b"\0" + idle,
        step("stream", b'{"name":"stdout","text":""}', what=3) * 12 + idle,
    ]
    wrong = step("stream", b'{"name":"stdout","text":"x"}', sign=2) + step("stream", b"{}", sign=3)
    loose = bytes([6, 0, 0, 0, 0]) + b"topic\x1d<IDS|MSG>\x1dx\x1d{}\x1d{}\x1d{}\x1d{}\0"
    endless = bytes([6, 1, 0, 0, 0]) + b"\x1d" * 65 + b"\0"
    scripts = [cell + replies, cell.replace(b"idle", b"busy") + asked + idle, wrong + loose + cell, endless + cell, *long]
    for at, script in enumerate(scripts):
        for cap in [PLENTY, TIGHT, SHARED]:
            yield READS[at % 3] + cap + script


def main():
    folder = Path(sys.argv[1])
    seeds = {"json": json_seeds, "message": message_seeds, "protocol": protocol_seeds, "wire_frame": wire_frame_seeds, "zmtp": zmtp_seeds}
    for target, inputs in seeds.items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for at, seed in enumerate(inputs()):
            (folder / target / f"seed-{at:03}").write_bytes(seed[:4096])


main()
