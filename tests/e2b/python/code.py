"""Runs code as E2B's own Python clients do, as they come: `code.py URL KEY CASE [SANDBOX [AGENT TRAFFIC]]`. Ends with 0 if the client got what it should.

In a sandbox that is named it works as a process does that was told of one, with tokens as somebody who has stolen or made them up; otherwise it makes one."""

import asyncio
import base64
import sys
import threading
import time

import e2b
from clients import leave, surroundings
from e2b_code_interpreter import AsyncSandbox, Sandbox
from packaging.version import Version


def of(kind, named):
    """A sandbox's client; of the asynchronous kind what it will be."""
    match named:
        case []:
            return kind.create(timeout=600)
        case [sandbox_id]:
            return kind.connect(sandbox_id, timeout=600)
    sandbox_id, agent, traffic = named
    headers = {"E2b-Sandbox-Id": sandbox_id, "E2b-Sandbox-Port": "49983", "X-Access-Token": agent}
    return kind(
        sandbox_id=sandbox_id,
        sandbox_domain=None,
        envd_version=Version("0.6.13"),
        envd_access_token=agent,
        traffic_access_token=traffic,
        connection_config=e2b.ConnectionConfig(extra_sandbox_headers=headers),
    )


def code_has_state_and_says_what_it_does(sandbox):
    assert sandbox.run_code("x = 20").text is None
    heard = {"stdout": [], "stderr": [], "result": [], "error": []}
    ran = sandbox.run_code(
        "import sys\nprint('out')\nprint('err', file=sys.stderr)\ndisplay('shown')\nx + 1",
        on_stdout=heard["stdout"].append,
        on_stderr=heard["stderr"].append,
        on_result=heard["result"].append,
        on_error=heard["error"].append,
    )
    assert ran.text == "21" and ran.error is None, ran
    assert ran.execution_count == 2, ran.execution_count
    assert (ran.logs.stdout, ran.logs.stderr) == (["out\n"], ["err\n"]), ran.logs
    assert [line.line for line in heard["stdout"]] == ["out\n"] and heard["stdout"][0].timestamp
    assert [line.line for line in heard["stderr"]] == ["err\n"] and heard["stderr"][0].error
    assert [(r.text, r.is_main_result) for r in heard["result"]] == [("shown", False), ("21", True)], heard
    assert not heard["error"]


def what_another_process_left_is_there(sandbox):
    assert sandbox.run_code("x").text == "20"


def errors_are_told_whole(sandbox):
    told = []
    ran = sandbox.run_code("def f():\n    return absent\nf()", on_error=told.append)
    assert (ran.error.name, ran.error.value) == ("NameError", "name 'absent' is not defined"), ran.error
    assert "return absent" in ran.error.traceback and "\x1b" not in ran.error.traceback, ran.error.traceback
    assert told == [ran.error]
    assert sandbox.run_code("1 +").error.name == "SyntaxError"
    assert sandbox.run_code("input()").error.name == "StdinNotImplementedError"
    ran = sandbox.run_code("import os\nprint('last words', flush=True)\nos._exit(3)")
    assert ran.error.name == "UnexpectedEndOfExecution" and ran.error.value, ran.error
    assert sandbox.run_code("1+1").text == "2"


def pictures_and_charts_are_told(sandbox):
    ran = sandbox.run_code("import matplotlib.pyplot as plt\nplt.plot([1, 2, 3], [4, 5, 6], label='rise')\nplt.title('up')\nplt.xlabel('x')\nplt.show()")
    (result,) = ran.results
    assert base64.b64decode(result.png).startswith(b"\x89PNG"), ran
    chart = result.chart
    assert (chart.type.value, chart.title, chart.x_label) == ("line", "up", "x"), chart.to_dict()
    assert [(e.label, [tuple(p) for p in e.points]) for e in chart.elements] == [("rise", [(1, 4), (2, 5), (3, 6)])]
    assert not ran.logs.stderr, ran.logs
    for draw, kind in {
        "ax.scatter([1, 2], [3, 4])": "scatter",
        "ax.bar(['a', 'b'], [3, 4])": "bar",
        "ax.pie([1, 2], labels=['a', 'b'])": "pie",
        "ax.boxplot([[1, 2, 3], [2, 3, 9]], tick_labels=['a', 'b'], patch_artist=True)": "box_and_whisker",
    }.items():
        (result,) = sandbox.run_code(f"fig, ax = plt.subplots()\n{draw}\nplt.show()").results
        assert result.chart.type.value == kind and result.chart.elements and result.png, (draw, result)
    (result,) = sandbox.run_code("fig, ax = plt.subplots(1, 2)\nax[0].plot([1, 2])\nax[1].bar(['a'], [2])\nplt.show()").results
    assert result.chart.type.value == "superchart" and len(result.chart.elements) == 2, result.chart.to_dict()
    ran = sandbox.run_code("from PIL import Image\nImage.new('RGB', (4, 4)).save('/home/user/p.png')")
    assert len(ran.results) == 1 and ran.results[0].png, ran


def results_have_all_their_forms(sandbox):
    ran = sandbox.run_code("import pandas as pd\npd.DataFrame({'n': [1, 2], 'at': pd.to_datetime(['2024-01-02', None]), 'x': [0.5, float('nan')]})")
    (frame,) = ran.results
    assert frame.data == {"n": [1, 2], "at": ["2024-01-02T00:00:00", None], "x": [0.5, None]}, frame.data
    assert frame.html.startswith("<div>") and "2024-01-02" in frame.text and frame.is_main_result
    code = """
class All:
    def _repr_mimebundle_(self, include=None, exclude=None):
        return {'text/plain': "'quoted'", 'text/html': '<b>é</b>', 'text/markdown': '*m*', 'image/svg+xml': '<svg/>', 'text/latex': '$x$',
                'application/json': {'a': [1, None]}, 'application/javascript': 'j()', 'application/x-own': 'mine'}
display(All())
"""
    (shown,) = sandbox.run_code(code).results
    assert (shown.text, shown.html, shown.markdown, shown.svg) == ("quoted", "<b>é</b>", "*m*", "<svg/>"), shown
    assert (shown.latex, shown.json, shown.javascript) == ("$x$", {"a": [1, None]}, "j()")
    assert shown.extra == {"application/x-own": "mine"} and not shown.is_main_result, shown.extra
    # Long enough to stand beside its record.
    (long,) = sandbox.run_code("from IPython.display import HTML\nHTML('é' * 2_000_000)").results
    assert long.html == "é" * 2_000_000


def text_comes_as_it_was_written(sandbox):
    text = "a\u2028b\u2029c\x85d\x0b\x0c\x1ce\U0001f600é\r\nend\ttab \x7f \x00"
    ran = sandbox.run_code(f"print({text!r}, end='')\n{text!r}")
    assert "".join(ran.logs.stdout) == text, ran.logs
    assert ran.text == repr(text)[1:-1], ran.text
    ran = sandbox.run_code("import sys\nfor i in range(50):\n    print('\\U0001f600é' * 1000)\n    sys.stdout.flush()")
    assert "".join(ran.logs.stdout) == "\U0001f600é" * 1000 + "\n" + ("\U0001f600é" * 1000 + "\n") * 49


def a_flood_of_text_is_cut_in_the_middle(sandbox):
    ran = sandbox.run_code("print('a' * 25_000_000 + 'b' * 25_000_000)\n'whole'", timeout=100)
    text = "".join(ran.logs.stdout)
    assert text.startswith("aaa") and text.endswith("bbb\n") and "bytes left out" in text, (text[:50], text[-50:])
    assert ran.text == "whole" and len(text) < 50_000_000
    assert sandbox.run_code("1+1").text == "2"


def contexts_are_apart(sandbox):
    first = sandbox.list_code_contexts()
    assert [(c.language, c.cwd) for c in first[:1]] == [("python", "/home/user")], first
    made = sandbox.create_code_context(cwd="/tmp")
    assert (made.language, made.cwd) == ("python", "/tmp")
    assert [c.id for c in sandbox.list_code_contexts()] == [c.id for c in first] + [made.id]
    sandbox.run_code("y = 1")
    ran = sandbox.run_code("import os\nprint(os.getcwd(), 'y' in globals())\nz = 3", context=made)
    assert ran.logs.stdout == ["/tmp False\n"], ran.logs
    assert sandbox.run_code("'z' in globals()").text == "False"
    sandbox.restart_code_context(made)
    assert sandbox.run_code("'z' in globals()", context=made).text == "False"
    scripts = sandbox.create_code_context(language="JS")
    assert scripts.language == "javascript" and sandbox.list_code_contexts()[-1].language == "javascript"
    assert sandbox.run_code("[1, 2].map((n) => n + 1).join()", context=scripts).text == "2,3"
    for context in (made, scripts.id):
        sandbox.remove_code_context(context)
    assert [c.id for c in sandbox.list_code_contexts()] == [c.id for c in first]
    for missing in (lambda: sandbox.run_code("1", context=made), lambda: sandbox.remove_code_context(made), lambda: sandbox.restart_code_context("absent")):
        try:
            missing()
        except e2b.NotFoundException:
            continue
        raise AssertionError("what is not there was found")


def languages_are_known_by_their_names(sandbox):
    assert sandbox.run_code("console.log('js'); const a = 6; a * 7", language="js").text == "42"
    ran = sandbox.run_code("const n: number = 41; n + 1", language="typescript")
    assert ran.text == "42", ran
    ran = sandbox.run_code("x <- c(1, 2, 3)\nprint(sum(x))", language="r")
    assert "".join(ran.logs.stdout) == "[1] 6\n", ran
    ran = sandbox.run_code("cd /tmp; pwd; echo err >&2", language="bash")
    assert "/tmp" in "".join(ran.logs.stdout), ran
    assert sandbox.run_code("import os; os.getcwd()", language="python").text == "/home/user"
    assert sandbox.run_code("throw new TypeError('no')", language="javascript").error.name == "TypeError"
    try:
        sandbox.run_code("1", language="cobol")
    except e2b.SandboxException as error:
        assert "python" in str(error), error
    else:
        raise AssertionError("a language that is not there was taken")


def variables_are_an_executions_own(sandbox):
    value = "it's \"a\" $HOME \\ \n\u00e9\U0001f600"
    envs = {"MINE": value, "HOME": "/elsewhere"}
    reads = {
        "python": ("import os\nprint(os.environ.get('MINE', 'none') + '|' + os.environ['HOME'], end='')", str),
        "javascript": ("console.log((Deno.env.get('MINE') ?? 'none') + '|' + Deno.env.get('HOME'))", lambda text: text.removesuffix("\n")),
        "bash": ("printf '%s|%s' \"${MINE-none}\" \"$HOME\"", str.strip),
        "r": ("cat(Sys.getenv('MINE', 'none'), Sys.getenv('HOME'), sep='|')", str),
    }
    for language, (code, form) in reads.items():
        for sent, expected in ((envs, f"{value}|/elsewhere"), (None, "none|/home/user"), ({"MINE": "two"}, "two|/home/user")):
            ran = sandbox.run_code(code, language=language, envs=sent)
            said = form("".join(ran.logs.stdout).replace("\r\n", "\n"))
            assert said == expected and ran.error is None, (language, sent, said, ran)
    failed = sandbox.run_code("raise ValueError(1)", envs={"MINE": "three"})
    assert failed.error.name == "ValueError" and "line 1" in failed.error.traceback, failed.error
    assert sandbox.run_code("import os; 'MINE' in os.environ").text == "False"
    assert sandbox.run_code("[n for n in dir() if 'cellblock' in n or n in ('wanted', 'kept')]").text == "[]"


def what_is_given_up_does_not_stand_in_the_way(sandbox):
    sandbox.run_code("import time")
    began = time.monotonic()
    try:
        sandbox.run_code("kept = 5\ntime.sleep(60)", timeout=3)
    except e2b.TimeoutException:
        pass
    else:
        raise AssertionError("it did not end in time")
    assert time.monotonic() - began < 10
    began = time.monotonic()
    assert sandbox.run_code("kept + 1", timeout=10).text == "6"
    assert time.monotonic() - began < 6


def code_takes_turns_and_may_be_silent(sandbox):
    said = []
    waits = threading.Thread(target=lambda: said.append(sandbox.run_code("import time\ntime.sleep(7)\nprint('late')")))
    waits.start()
    time.sleep(1)
    began = time.monotonic()
    assert sandbox.run_code("'next'").text == "next"
    assert time.monotonic() - began > 4, "it waited for its turn"
    waits.join()
    assert said[0].logs.stdout == ["late\n"], said


def a_stranger_is_told_so(sandbox):
    for act in (lambda: sandbox.run_code("1"), sandbox.list_code_contexts, sandbox.create_code_context):
        try:
            act()
        except e2b.SandboxException as error:
            assert "403" in str(error), error
        else:
            raise AssertionError("a stranger came in")


async def the_asynchronous_client(named):
    sandbox, heard = await of(AsyncSandbox, named), []

    async def hear(line):
        heard.append(line.line)

    ran = await sandbox.run_code("print('one')\n1 + 1", on_stdout=hear)
    assert (ran.text, heard) == ("2", ["one\n"]), ran
    both = await asyncio.gather(sandbox.run_code("'a'"), sandbox.run_code("console.log('b')", language="js"))
    assert both[0].text == "a" and both[1].logs.stdout == ["b\n"], both


CASES = {
    "all": [
        code_has_state_and_says_what_it_does,
        what_another_process_left_is_there,
        pictures_and_charts_are_told,
        results_have_all_their_forms,
        text_comes_as_it_was_written,
        contexts_are_apart,
        languages_are_known_by_their_names,
        variables_are_an_executions_own,
        a_flood_of_text_is_cut_in_the_middle,
        what_is_given_up_does_not_stand_in_the_way,
        code_takes_turns_and_may_be_silent,
        errors_are_told_whole,
    ],
    "begin": [code_has_state_and_says_what_it_does],
    "connect": [what_another_process_left_is_there],
    "stranger": [a_stranger_is_told_so],
}


def main():
    url, key, case, *named = sys.argv[1:]
    surroundings(url, key)
    if case == "async":
        return asyncio.run(the_asynchronous_client(named))
    sandbox = of(Sandbox, named)
    for act in CASES.get(case) or [globals()[case]]:
        began = time.monotonic()
        act(sandbox)
        print(f"{act.__name__}: {time.monotonic() - began:.1f} s", flush=True)
    if not named:
        assert sandbox.kill()


if __name__ == "__main__":
    main()
    leave()
