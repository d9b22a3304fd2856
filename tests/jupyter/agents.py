"""Runs what agents execute code with, as it comes, against a server: `agents.py URL KEY CLIENT`. Ends with 0 if the client got what it should."""

import asyncio
import pathlib
import sys
import tempfile
import types
from urllib.parse import urlsplit

PNG = "iVBORw0KGgo="
SHOWS_PNG = f"from IPython.display import display\ndisplay({{'image/png': '{PNG}', 'text/plain': 'p'}}, raw=True)"
# More than a frame that `websockets` takes (1 MiB), in one piece.
PRINTS_MUCH = "print('x' * 3_000_000)"


def autogen(url, key):
    """AutoGen's executor for a Jupyter Kernel Gateway: told where the server is, it starts no container of its own."""
    from autogen_core import CancellationToken
    from autogen_core.code_executor import CodeBlock
    from autogen_ext.code_executors.docker_jupyter import DockerJupyterCodeExecutor
    from autogen_ext.code_executors.docker_jupyter._jupyter_server import JupyterConnectionInfo

    where = urlsplit(url)
    server = JupyterConnectionInfo(host=where.hostname, use_https=False, port=where.port, token=key)

    async def run():
        with tempfile.TemporaryDirectory() as folder:
            async with DockerJupyterCodeExecutor(server, kernel_name="python", output_dir=pathlib.Path(folder)) as executor:

                async def executed(*codes):
                    blocks = [CodeBlock(code=code, language="python") for code in codes]
                    return await executor.execute_code_blocks(blocks, CancellationToken())

                got = await executed("x = 20", "print('printed')\nx + 1")
                assert (got.exit_code, got.output.split()) == (0, ["printed", "21"]), got
                got = await executed("x", SHOWS_PNG)
                assert got.exit_code == 0 and "20" in got.output, got
                assert [file.read_bytes()[:4] for file in got.output_files] == [b"\x89PNG"], got
                got = await executed("1/0", "never = 1")
                assert got.exit_code == 1 and "ZeroDivisionError" in got.output, got
                got = await executed("never")
                assert got.exit_code == 1 and "NameError" in got.output, got
                got = await executed(PRINTS_MUCH)
                assert got.exit_code == 0 and got.output.count("x") == 3_000_000, (got.exit_code, got.output[-300:])
                await executor.restart()
                got = await executed("x")
                assert got.exit_code == 1 and "NameError" in got.output, got
            try:
                await DockerJupyterCodeExecutor(server, kernel_name="fortran").start()
            except ValueError as error:
                assert "fortran" in str(error), error
            else:
                raise AssertionError("a kernel that is not there was started")

    asyncio.run(run())


def smolagents(url, key):
    """smolagents' executor for a Jupyter Kernel Gateway. Its constructor starts a container with one; all that it does then is done here, as it does it."""
    import requests
    from smolagents.default_tools import FinalAnswerTool
    from smolagents.monitoring import AgentLogger, LogLevel
    from smolagents.remote_executors import DockerExecutor, _create_kernel_http
    from smolagents.utils import AgentError

    class Executor(DockerExecutor):
        def __init__(self, logger):
            super(DockerExecutor, self).__init__([], logger, False)
            self.base_url = url
            self._wait_for_server(key)
            self.kernel_id = _create_kernel_http(f"{self.base_url}/api/kernels?token={key}", self.logger)
            self.ws_url = f"ws://{urlsplit(url).netloc}/api/kernels/{self.kernel_id}/channels?token={key}"

    executor = Executor(AgentLogger(level=LogLevel.OFF))
    got = executor("x = 20\nprint('printed')\nx + 1")
    assert (got.output, got.logs, got.is_final_answer) == ("21", "printed\n", False), got
    # Each execution has a connection of its own, and the kernel stays.
    assert executor("x").output == "20"
    executor.send_variables({"given": [1, "two"]})
    assert executor("given").output == "[1, 'two']"
    # How an agent ends: its last words are an exception of the kernel's, and are read out of it.
    executor.send_tools({"final_answer": FinalAnswerTool()})
    got = executor("final_answer({'sum': x + 1})")
    assert (got.output, got.is_final_answer) == ({"sum": 21}, True), got
    try:
        executor("1/0")
    except AgentError as error:
        assert "ZeroDivisionError" in str(error), error
    else:
        raise AssertionError("the error did not arrive")
    got = executor(PRINTS_MUCH)
    assert got.logs.count("x") == 3_000_000, got.logs[-300:]
    ended = requests.delete(f"{url}/api/kernels/{executor.kernel_id}?token={key}", timeout=30)
    assert ended.status_code == 204, ended


def open_webui(url, key):
    """Open WebUI's code interpreter: the file of the package, with what it imports of the rest of the package put in its place."""
    import json

    package = pathlib.Path(__file__).parents[2] / "target" / "open-webui" / "open_webui"
    for name, content in {
        "open_webui": {"__path__": [str(package)]},
        "open_webui.utils": {"__path__": [str(package / "utils")]},
        # As it is unless an operator says otherwise.
        "open_webui.env": {"AIOHTTP_CLIENT_ALLOW_REDIRECTS": False},
        # There a choice of libraries for JSON.
        "open_webui.utils.json_codec": {"JSONCodec": json},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(content)
    from open_webui.utils.code_interpreter import execute_code_jupyter

    def executed(code, token=key, base=url, **more):
        return asyncio.run(execute_code_jupyter(base, code, token, **more))

    got = executed("print('printed')\nimport sys\nprint('said', file=sys.stderr)\n20 + 1")
    assert got == {"stdout": "printed", "stderr": "said", "result": "21"}, got
    got = executed(SHOWS_PNG, base=f"{url}/jupyter/")
    assert got["result"] == f"data:image/png;base64,{PNG}", got
    assert "ZeroDivisionError" in executed("1/0")["stderr"]
    got = executed(PRINTS_MUCH)
    assert got["stdout"].count("x") == 3_000_000, got["stderr"][-300:]
    got = executed("import time\ntime.sleep(60)", timeout=2)
    assert "Execution timed out" in got["stderr"], got
    assert "403" in executed("1", token="wrong")["stderr"]
    # It starts a kernel for each execution, and ends it, also the one that it gave up.
    import requests

    left = requests.get(f"{url}/api/kernels?token={key}", timeout=30).json()
    assert not [kernel for kernel in left if kernel["execution_state"] == "busy"], left


if __name__ == "__main__":
    url, key, name = sys.argv[1:]
    globals()[name](url, key)
