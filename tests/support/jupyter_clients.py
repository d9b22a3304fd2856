"""Runs unmodified clients of Jupyter Server's API against a server: `jupyter_clients.py URL KEY CLIENT`. Ends with 0 if the client got what it should."""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

GATEWAY = "jupyter_server.gateway.managers.GatewayKernelManager"
CELLS = [
    "x = 20",
    "print('printed')\nx + 1",
    "from IPython.display import display\ndisplay({'image/png': 'aGk=', 'text/plain': 'p'}, raw=True)",
]


def notebook(*more):
    cells = [new_code_cell(code) for code in [*CELLS, *more]]
    return new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})


def check(executed):
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    kinds = [output.output_type for output in outputs]
    assert kinds[:3] == ["stream", "execute_result", "display_data"], kinds
    assert outputs[0].text == "printed\n" and outputs[1].data["text/plain"] == "21", outputs
    return outputs


def nbclient(url, key):
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    client = NotebookClient(notebook(), kernel_manager_class=GATEWAY, timeout=60)
    check(client.execute())
    failing = NotebookClient(notebook("1/0", "never = 1"), kernel_manager_class=GATEWAY, timeout=60)
    try:
        failing.execute()
    except CellExecutionError as error:
        assert error.ename == "ZeroDivisionError", error
    else:
        raise AssertionError("the error did not arrive")


def papermill(url, key):
    import papermill

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.ipynb"), Path(folder, "out.ipynb")
        nb = notebook("print(parameter)")
        nb.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(nb, source)
        # The name of a manager that papermill passes on to nbclient.
        papermill.execute_notebook(source, target, {"parameter": "given"}, kernel_manager_class=GATEWAY, progress_bar=False)
        outputs = check(nbformat.read(target, 4))
        assert outputs[-1].text == "given\n", outputs


def jupyter_kernel_client(url, key):
    from jupyter_kernel_client import JupyterKernelClient

    with JupyterKernelClient(server_url=url, token=key) as kernel:
        reply = kernel.execute("print('printed')\n20 + 1")
        assert reply["status"] == "ok", reply
        kinds = [output["output_type"] for output in reply["outputs"]]
        assert kinds == ["stream", "execute_result"], reply
        assert kernel.execute("1/0")["status"] == "error"
        kernel.interrupt()
        kernel.restart()
        assert kernel.execute("x")["outputs"][0]["ename"] == "NameError"


if __name__ == "__main__":
    url, key, name = sys.argv[1:]
    # Its WebSockets carry no key but the one in the path.
    os.environ["JUPYTER_GATEWAY_URL"] = f"{url}/t/{key}"
    from jupyter_server.gateway.gateway_client import GatewayClient

    GatewayClient.instance().url = f"{url}/t/{key}"
    globals()[name](url, key)
