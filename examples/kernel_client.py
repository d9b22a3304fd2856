"""A cell with jupyter_kernel_client, which speaks to this server as to a Jupyter Server."""

import os

from jupyter_kernel_client import JupyterKernelClient

URL = os.environ["CELLBLOCK_URL"]
KEY = os.environ["CELLBLOCK_API_KEY"]

with JupyterKernelClient(server_url=URL, token=KEY) as kernel:
    kernel.execute("x = 40")
    reply = kernel.execute("print(x + 2)")
    print(reply["status"], reply["outputs"][0]["text"], end="")
