"""Runs the suite that kernels are tested with (jupyter_kernel_test, as it comes) against one kernel, and prints what came of each of its tests as JSON.

    kernel_suite.py LANGUAGE            a kernel that stands alone: started here by jupyter_client, over ZeroMQ
    kernel_suite.py LANGUAGE URL KEY    the same kernel behind the door: started by jupyter_server's gateway client, over HTTP and a WebSocket

The suite's tests are the same code in both, with the same samples. Between them and the door is only what is jupyter_server's, but for `get_shell_msg`: it is a
coroutine in the gateway's client, and the suite waits for it as in a client that blocks.
"""

import json
import sys
import unittest

import jupyter_kernel_test

SHOWS_HTML = "from IPython.display import HTML, display\ndisplay(HTML('<b>bold</b>'))"
# What the suite asks of each language; what a language has no sample of is skipped, in both places.
SAMPLES = {
    "python": {
        "kernel_name": "python3",
        "language_name": "python",
        "file_extension": ".py",
        "code_hello_world": "print('hello, world')",
        "code_stderr": "import sys\nprint('test', file=sys.stderr)",
        "completion_samples": [{"text": "zi", "matches": {"zip"}}],
        "complete_code_samples": ["1", "print('hello, world')", "def f(x):\n  return x*2\n\n\n"],
        "incomplete_code_samples": ["print('''hello", "def f(x):\n  x*2"],
        "invalid_code_samples": ["import = 7q"],
        "code_page_something": "zip?",
        "code_generate_error": "raise",
        "code_execute_result": [{"code": "1+2+3", "result": "6"}, {"code": "[n*n for n in range(1, 4)]", "result": "[1, 4, 9]"}],
        "code_display_data": [{"code": SHOWS_HTML, "mime": "text/html"}],
        "code_history_pattern": "1?2*",
        "supported_history_operations": ("tail", "range", "search"),
        "code_inspect_sample": "zip",
        "code_clear_output": "from IPython.display import clear_output\nclear_output()",
    },
    "bash": {
        "kernel_name": "bash",
        "language_name": "bash",
        "file_extension": ".sh",
        "code_hello_world": "echo 'hello, world'",
        "code_stderr": "echo test >&2",
        "completion_samples": [{"text": "readar", "matches": {"readarray"}}],
        "complete_code_samples": ["echo 1"],
        "incomplete_code_samples": ["for n in 1 2"],
        "code_generate_error": "false",
        "code_inspect_sample": "echo",
    },
    "r": {
        "kernel_name": "ir",
        "language_name": "R",
        "file_extension": ".r",
        "code_hello_world": "cat('hello, world')",
        "code_stderr": "message('test')",
        "completion_samples": [{"text": "zi", "matches": {"zip"}}],
        "complete_code_samples": ["1", "print('hello, world')", "f <- function(x) {x*2}"],
        "incomplete_code_samples": ["print('hello", "f <- function(x) {"],
        "invalid_code_samples": ["a b"],
        "code_page_something": "help(cat)",
        "code_generate_error": "stop('x')",
        "code_execute_result": [{"code": "1+2+3", "result": "[1] 6"}],
        "code_display_data": [{"code": "IRdisplay::display_html('<b>bold</b>')", "mime": "text/html"}],
        "supported_history_operations": (),
        "code_inspect_sample": "cat",
        "code_clear_output": "IRdisplay::clear_output()",
    },
    "deno": {
        "kernel_name": "deno",
        "language_name": "typescript",
        "file_extension": ".ts",
        "code_hello_world": "console.log('hello, world')",
        "code_stderr": "console.error('test')",
        "completion_samples": [{"text": "encodeURIC", "matches": {"encodeURIComponent"}}],
        "complete_code_samples": ["1"],
        "incomplete_code_samples": ["function f() {"],
        "invalid_code_samples": ["let = 7q"],
        "code_generate_error": "throw new Error('x')",
        "code_execute_result": [{"code": "1+2+3", "result": "6"}],
        "code_display_data": [{"code": "await Deno.jupyter.display({'text/html': '<b>bold</b>'}, {raw: true})", "mime": "text/html"}],
        "code_inspect_sample": "encodeURIComponent",
        "code_clear_output": "await Deno.jupyter.broadcast('clear_output', {wait: false})",
    },
}
# The names that the door has for the images with these kernels.
TEMPLATES = {"python": "python", "bash": "bash", "r": "r", "deno": "deno"}


def alone(language):
    return type("Alone", (jupyter_kernel_test.KernelTests,), SAMPLES[language])


def behind_the_door(language, url, key):
    from jupyter_client.utils import run_sync
    from jupyter_server.gateway.gateway_client import GatewayClient
    from jupyter_server.gateway.managers import GatewayKernelManager

    GatewayClient.instance().url = f"{url}/t/{key}"

    class BehindTheDoor(jupyter_kernel_test.KernelTests):
        @classmethod
        def setUpClass(cls):
            cls.manager = GatewayKernelManager()
            run_sync(cls.manager.start_kernel)(kernel_name=TEMPLATES[language])
            cls.kc = cls.manager.client()
            run_sync(cls.kc.start_channels)()
            run_sync(cls.kc.wait_for_ready)(timeout=60)
            cls.kc.get_shell_msg = run_sync(cls.kc.get_shell_msg)

        @classmethod
        def tearDownClass(cls):
            cls.kc.stop_channels()
            run_sync(cls.manager.shutdown_kernel)()

    return type("Behind", (BehindTheDoor,), SAMPLES[language])


class Outcomes(unittest.TestResult):
    """What came of each test, and of each part of one: `passed`, `skipped`, or the end of its traceback."""

    def __init__(self):
        super().__init__()
        self.of = {}

    def note(self, test, outcome):
        # The first that is told of a test stays: one whose part failed is told of as one that went well otherwise.
        part, whole = getattr(test, "_subDescription", str)(), getattr(test, "test_case", test)
        self.of.setdefault(f"{getattr(whole, '_testMethodName', whole)} {part}".strip(), outcome)

    def addSuccess(self, test):
        self.note(test, "passed")

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.note(test, "skipped")

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.note(test, self.failures[-1][1][-600:])

    def addError(self, test, error):
        super().addError(test, error)
        self.note(test, self.errors[-1][1][-600:])

    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        if error is None:
            self.note(subtest, "passed")
        else:
            said = (self.failures if issubclass(error[0], test.failureException) else self.errors)[-1][1][-600:]
            self.note(subtest, said)
            self.note(test, said)


if __name__ == "__main__":
    language, *door = sys.argv[1:]
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(behind_the_door(language, *door) if door else alone(language))
    outcomes = Outcomes()
    suite.run(outcomes)
    print(json.dumps(outcomes.of))
