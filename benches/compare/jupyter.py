"""Asks kernels as Jupyter's clients come from the registry: `jupyter.py URL KEY`. For every JSON line on stdin one on stdout, with milliseconds:

    {"rounds": N, "side": SIDE}   round trips of `1+1`: the request, its reply and idle, one after the other
    {"ready": N, "side": SIDE}    from POST /api/kernels until kernel_info_reply, each with a kernel of its own
    {"idle": N}                   waits, so that what was ended settles

A side is `cellblock` at that URL, `gateway`, a Jupyter Kernel Gateway that is started here, or `direct`: jupyter_client and a kernel of this machine's, over unix
sockets. The first two are asked by the same client.
"""

import contextlib
import json
import queue
import socket
import subprocess
import sys
import time
import urllib.request

from jupyter_client import KernelManager
from jupyter_kernel_client.manager import KernelHttpManager


def first_answer(client):
    asked = client.kernel_info()
    while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != asked:
        pass


def round_trip(client):
    """As `stock.py` has it."""
    started = time.perf_counter()
    asked = client.execute("1+1")
    is_idle = False
    while not is_idle:
        message = client.get_iopub_msg(timeout=60)
        mine = message["parent_header"].get("msg_id") == asked
        is_idle = mine and message["content"].get("execution_state") == "idle"
    while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != asked:
        pass
    return (time.perf_counter() - started) * 1000


class Direct:
    def __init__(self):
        self.manager = KernelManager(kernel_name="python3", transport="ipc")
        self.manager.start_kernel()
        self.client = self.manager.client()
        self.client.start_channels(hb=False, control=False)
        # What a kernel says before it knows of who listens is lost.
        is_heard = False
        while not is_heard:
            first_answer(self.client)
            with contextlib.suppress(queue.Empty):
                self.client.get_iopub_msg(timeout=0.2)
                is_heard = True

    def end(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


class Remote:
    """A kernel at a server."""

    def __init__(self, url, token):
        self.manager = KernelHttpManager(server_url=url, token=token)
        self.manager.start_kernel("python3")
        self.client = self.manager.client
        self.client.start_channels()
        first_answer(self.client)

    def end(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


class Gateway:
    """A server that is started here. It has no key: the client sends one in words that this server does not take."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "kernel_gateway", f"--KernelGatewayApp.port={port}", "--KernelGatewayApp.ip=127.0.0.1"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/api").read()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def end(self):
        self.process.terminate()
        self.process.wait()


def serve(url, key):
    gateway = Gateway()
    begin = {"cellblock": lambda: Remote(url, key), "gateway": lambda: Remote(gateway.url, None), "direct": Direct}
    kernels = {}
    try:
        for line in sys.stdin:
            order = json.loads(line)
            if "idle" in order:
                time.sleep(order["idle"])
                answer = []
            elif "ready" in order:
                answer = []
                for _ in range(order["ready"]):
                    started = time.perf_counter()
                    kernel = begin[order["side"]]()
                    answer.append((time.perf_counter() - started) * 1000)
                    kernel.end()
            else:
                side = order["side"]
                if side not in kernels:
                    kernels[side] = begin[side]()
                answer = [round_trip(kernels[side].client) for _ in range(order["rounds"])]
            print(json.dumps(answer), flush=True)
    finally:
        for kernel in kernels.values():
            kernel.end()
        gateway.end()


serve(*sys.argv[1:])
