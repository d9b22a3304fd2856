"""Runs inside a container: starts kernels and asks them with Jupyter's own client. Told what to do by its argument and by stdin.

    start   a kernel as jupyter_client starts one, and a line on stdout at its first answer
    race    the same without jupyter_client's leisure: over unix sockets, its import hidden behind the kernel's boot
    serve   a JSON line on stdout for every JSON line on stdin, see `serve`

Each ends with its stdin.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

STOCK = [sys.executable, "-m", "ipykernel_launcher"]
# The guest's volume, which a copy of a cell has mounted as well.
OURS = [sys.executable, "/cellblock/ipykernel_launcher.py"]
LAUNCHERS = {"stock": STOCK, "ours": OURS}
PORTS = ("shell", "iopub", "stdin", "control", "hb")


class Kernel:
    """A kernel on unix sockets, in a folder of its own."""

    def __init__(self, launcher, ipython_folder=None):
        self.folder = tempfile.mkdtemp()
        self.file = os.path.join(self.folder, "connection.json")
        self.sockets = os.path.join(self.folder, "k")
        ports = {f"{port}_port": number for number, port in enumerate(PORTS, 1)}
        settings = {"transport": "ipc", "ip": self.sockets, "key": "0" * 64, "signature_scheme": "hmac-sha256"}
        with open(self.file, "w") as file:
            json.dump(settings | ports, file)
        env = os.environ | {"IPYTHONDIR": ipython_folder or os.path.join(self.folder, "ipython")}
        self.process = subprocess.Popen([*launcher, "-f", self.file], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def client(self, **channels):
        """Jupyter's client, connected without a retry: a retry would come 100 ms later. `channels` leaves some out."""
        from jupyter_client import BlockingKernelClient

        for number in range(1, len(PORTS) + 1):
            while not os.path.exists(f"{self.sockets}-{number}"):
                time.sleep(0.001)
        client = BlockingKernelClient(connection_file=self.file)
        client.load_connection_file()
        client.start_channels(**channels)
        return client

    def end(self):
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder)


def first_answer(client):
    asked = client.kernel_info()
    while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != asked:
        pass


def round_trip(client):
    """Seconds from an execution's request to its reply and to idle, whichever is later."""
    started = time.perf_counter()
    asked = client.execute("1+1")
    is_idle = False
    while not is_idle:
        message = client.get_iopub_msg(timeout=60)
        mine = message["parent_header"].get("msg_id") == asked
        is_idle = mine and message["content"].get("execution_state") == "idle"
    while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != asked:
        pass
    return time.perf_counter() - started


def boot(launcher, ipython_folder):
    """Seconds from the kernel's exec to its first answer."""
    started = time.perf_counter()
    kernel = Kernel(launcher, ipython_folder)
    client = kernel.client(iopub=False, stdin=False, hb=False, control=False)
    first_answer(client)
    elapsed = time.perf_counter() - started
    client.stop_channels()
    kernel.end()
    return elapsed


def start():
    from jupyter_client import KernelManager

    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    first_answer(client)
    print("answered", flush=True)
    sys.stdin.read()
    manager.shutdown_kernel(now=True)


def race():
    kernel = Kernel(STOCK)
    first_answer(kernel.client(iopub=False, stdin=False, hb=False, control=False))
    print("answered", flush=True)
    sys.stdin.read()
    kernel.end()


def serve():
    """`{"boot": LAUNCHER, "fresh": BOOL}` tells seconds; `{"rounds": N, "kernel": LAUNCHER}` a list of them."""
    clients = {}
    lasting = tempfile.mkdtemp()
    for line in sys.stdin:
        order = json.loads(line)
        if "boot" in order:
            answer = boot(LAUNCHERS[order["boot"]], None if order["fresh"] else lasting)
        else:
            name = order["kernel"]
            if name not in clients:
                clients[name] = Kernel(LAUNCHERS[name]).client()
                first_answer(clients[name])
            answer = [round_trip(clients[name]) for _ in range(order["rounds"])]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    {"start": start, "race": race, "serve": serve}[sys.argv[1]]()
