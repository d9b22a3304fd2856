"""Works with files, commands and terminals as E2B's own Python clients do, as they come: `agent.py URL KEY CASES [SANDBOX]`. Ends with 0 if the client got what it should.

In a sandbox that is named it works as a process does that was told of one; otherwise it makes one."""

import asyncio
import hashlib
import os
import sys
import time
import urllib.error
import urllib.request

import e2b
from clients import leave, refused, surroundings, until


def files_go_up_and_come_down(sandbox):
    files = sandbox.files
    written = files.write("a/b c/ü😀.txt", "here ü")
    assert (written.path, written.name) == ("/home/user/a/b c/ü😀.txt", "ü😀.txt"), written
    assert files.read("a/b c/ü😀.txt") == files.read("/home/user/a/b c/ü😀.txt") == files.read("~/a/b c/ü😀.txt") == "here ü"
    assert files.read("a/x/../b c/./ü😀.txt") == "here ü", "steps are taken before anything is looked at"
    files.write("a/b c/ü😀.txt", b"")
    assert files.read("a/b c/ü😀.txt", format="bytes") == b""
    files.write('/tmp/"quoted" %41.txt', "x")
    assert files.read('/tmp/"quoted" %41.txt') == "x"
    several = files.write_files([{"path": "/tmp/one/x.txt", "data": "1"}, {"path": 'two/"y".txt', "data": b"2"}])
    assert [file.path for file in several] == ["/tmp/one/x.txt", '/home/user/two/"y".txt'], several
    assert (files.read("/tmp/one/x.txt"), files.read('two/"y".txt')) == ("1", "2")
    for missing in ("nothing", "/tmp/nothing/x"):
        refused(e2b.FileNotFoundException, files.read, missing)
    refused(e2b.InvalidArgumentException, files.read, "a")
    for outside in ("/etc/passwd", "../../etc/passwd", "/proc/self/environ"):
        refused(e2b.SandboxException, files.read, outside)
        refused(e2b.SandboxException, files.write, outside, "x")
    refused(e2b.AuthenticationException, files.read, "a", user="root")
    assert files.read("two/\"y\".txt", user="user") == "2"


def big_files_are_whole(sandbox):
    files = sandbox.files
    big = os.urandom(1024 * 1024) * 20
    files.write("big", big)
    assert hashlib.sha256(files.read("big", format="bytes")).digest() == hashlib.sha256(big).digest()
    packed = b"little that becomes much " * 400_000
    files.write("packed", packed, gzip=True)
    assert files.read("packed", format="bytes", gzip=True) == packed
    assert b"".join(files.read("packed", format="stream")) == packed
    with open("/proc/self/exe", "rb") as source:
        files.write("stream", source, use_octet_stream=True)
    assert files.get_info("stream").size == os.path.getsize("/proc/self/exe")


def urls_are_signed(sandbox):
    def ask(url, data=None, **headers):
        request = urllib.request.Request(url, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    sandbox.files.write("signed.txt", "signed")
    url = sandbox.download_url("signed.txt")
    assert "X-Access" not in url and ask(url) == (200, b"signed"), ask(url)
    assert ask(sandbox.download_url("signed.txt", use_signature_expiration=60)) == (200, b"signed")
    status, body = ask(sandbox.download_url("signed.txt", use_signature_expiration=-60))
    assert (status, body) == (401, b'{"code":401,"message":"signature is already expired"}'), body
    assert ask(url.replace("signed.txt", "other.txt"))[0] == 401
    assert ask(url.split("&signature")[0])[0] == 401
    up = sandbox.upload_url("up.txt")
    kind = {"Content-Type": "application/octet-stream"}
    assert ask(up, b"by url", **kind)[0] == 200 and sandbox.files.read("up.txt") == "by url"
    assert ask(url, b"no", **kind)[0] == 401, "what was signed for reading does not write"


def folders_are_looked_at_and_changed(sandbox):
    files = sandbox.files
    assert files.make_dir("d/e/f") is True and files.make_dir("d/e/f") is False
    files.write("d/x.txt", "12345")
    refused(e2b.InvalidArgumentException, files.make_dir, "d/x.txt")
    names = lambda found: [(entry.name, entry.type.value, entry.path) for entry in found]
    file, folder = ("x.txt", "file", "/home/user/d/x.txt"), ("e", "dir", "/home/user/d/e")
    assert names(files.list("d")) == [folder, file], files.list("d")
    assert names(files.list("d", depth=3)) == [folder, ("f", "dir", "/home/user/d/e/f"), file]
    refused(e2b.FileNotFoundException, files.list, "nothing")
    refused(e2b.InvalidArgumentException, files.list, "d/x.txt")
    info = files.get_info("d/x.txt")
    assert (info.size, info.mode, info.permissions, info.owner, info.group) == (5, 0o644, "-rw-r--r--", "user", "user"), info
    assert abs(info.modified_time.timestamp() - time.time()) < 60, info
    assert files.exists("d/x.txt") and files.exists("d") and not files.exists("d/y.txt")
    sandbox.commands.run("ln -s d/x.txt link && ln -s /nowhere dangling")
    link = files.get_info("link")
    assert (link.type.value, link.symlink_target) == ("symlink", "/home/user/d/x.txt"), link
    assert files.get_info("dangling").symlink_target == "/nowhere"
    moved = files.rename("d/x.txt", "new/y.txt")
    assert moved.path == "/home/user/new/y.txt" and files.read("new/y.txt") == "12345" and not files.exists("d/x.txt")
    refused(e2b.FileNotFoundException, files.rename, "d/x.txt", "z")
    files.remove("d")
    files.remove("d")
    assert not files.exists("d")
    refused(e2b.SandboxException, files.remove, "/etc")
    files.write("said", "x", metadata={"Author": "me", "empty": ""})
    assert files.get_info("said").metadata == {"author": "me", "empty": ""}, files.get_info("said")
    files.write("said", "y")
    assert not files.get_info("said").metadata, "each write says all"


def changes_are_told(sandbox):
    files = sandbox.files
    files.make_dir("w/in")
    files.write("w/there", "1")
    plain, deep = files.watch_dir("w"), files.watch_dir("w", recursive=True, include_entry=True)
    files.write("w/there", "22")
    files.write("w/in/deep", "3")
    sandbox.commands.run("cd w; echo 1 > made; mv made moved; rm moved")
    heard, heard_deep = [], []

    def both():
        heard.extend((event.name, event.type.value) for event in plain.get_new_events())
        heard_deep.extend(deep.get_new_events())
        return ("moved", "remove") in heard and any(e.name == "moved" and e.type.value == "remove" for e in heard_deep)

    until(both)
    for expected in [("there", "write"), ("made", "create"), ("made", "write"), ("made", "rename"), ("moved", "create")]:
        assert expected in heard, (expected, heard)
    assert not any(name.startswith("in/") for name, _ in heard), heard
    written = [event for event in heard_deep if event.name == "in/deep" and event.type.value == "write"]
    assert written and written[0].entry.path == "/home/user/w/in/deep" and written[0].entry.size == 1, heard_deep
    assert plain.get_new_events() == []
    plain.stop()
    refused(e2b.SandboxException, plain.get_new_events)
    refused(e2b.FileNotFoundException, files.watch_dir, "nothing")
    refused(e2b.InvalidArgumentException, files.watch_dir, "w/there")


def changes_stream(sandbox):
    sandbox_id = sandbox.sandbox_id

    async def run():
        sandbox, heard, left = await e2b.AsyncSandbox.connect(sandbox_id, timeout=600), [], []
        await sandbox.files.make_dir("s")
        handle = await sandbox.files.watch_dir("s", on_event=heard.append, on_exit=left.append, include_entry=True)
        await sandbox.files.write("s/x", "1")
        for _ in range(200):
            if any(event.type.value == "write" for event in heard):
                break
            await asyncio.sleep(0.1)
        assert [(event.name, event.type.value) for event in heard] == [("x", "create"), ("x", "write")], heard
        assert heard[1].entry.size == 1, heard
        await handle.stop()
        ran = await sandbox.commands.run("echo $((6 * 7))")
        assert ran.stdout == "42\n", ran

    asyncio.run(run())


def commands_run(sandbox):
    run = sandbox.commands.run
    assert run("pwd; whoami; echo $HOME").stdout == "/home/user\nuser\n/home/user\n"
    assert run("pwd", cwd="/tmp").stdout == "/tmp\n" and run("pwd", cwd="/").stdout == "/\n"
    assert run('echo "$A|é😀"', envs={"A": "a b"}).stdout == "a b|é😀\n"
    heard = {"out": [], "err": []}
    ran = run("echo one; sleep 0.5; echo two >&2; sleep 0.5; echo three", on_stdout=heard["out"].append, on_stderr=heard["err"].append)
    assert (ran.exit_code, ran.stdout, ran.stderr) == (0, "one\nthree\n", "two\n"), ran
    assert (heard["out"], heard["err"]) == (["one\n", "three\n"], ["two\n"]), heard
    failed = refused(e2b.CommandExitException, run, "echo lost >&2; exit 3")
    assert (failed.exit_code, failed.stderr, failed.error) == (3, "lost\n", "exit status 3"), failed
    began = time.monotonic()
    refused(e2b.TimeoutException, run, "sleep 4242", timeout=2)
    assert time.monotonic() - began < 20
    assert run("sleep 2; echo late", timeout=0).stdout == "late\n", "0 is no time limit"
    until(lambda: "4242" not in run("ps -ef | grep '[4]242' || true").stdout)
    error = refused(e2b.InvalidArgumentException, run, "pwd", cwd="/nowhere")
    assert "cwd '/nowhere' does not exist" in str(error), error
    refused(e2b.AuthenticationException, run, "id", user="root")
    long = run("head -c 400000 /dev/zero | tr '\\0' x").stdout
    assert len(long) == 400_000 and set(long) == {"x"}


def commands_go_on(sandbox):
    commands = sandbox.commands
    cat = commands.run("cat", background=True, stdin=True)
    assert cat.pid in [process.pid for process in commands.list()]
    commands.send_stdin(cat.pid, "hello ")
    commands.send_stdin(cat.pid, "é" * 300_000)
    commands.close_stdin(cat.pid)
    ended = cat.wait()
    assert ended.exit_code == 0 and ended.stdout == "hello " + "é" * 300_000, len(ended.stdout)
    sleeping = commands.run("sleep 1000", background=True)
    assert commands.kill(sleeping.pid) is True
    killed = refused(e2b.CommandExitException, sleeping.wait)
    assert (killed.exit_code, killed.error) == (-1, "signal: killed"), killed
    assert commands.kill(sleeping.pid) is False and commands.kill(999_999) is False
    refused(e2b.NotFoundException, commands.connect, 999_999)
    refused(e2b.NotFoundException, commands.send_stdin, 999_999, "x")
    assert all(process.pid != sleeping.pid for process in commands.list())
    # Whoever leaves ends nothing.
    ticking = commands.run("for n in $(seq 1 30); do echo $n; sleep 0.2; done", background=True)
    ticking.disconnect()
    time.sleep(1)
    assert ticking.pid in [process.pid for process in commands.list()]


def begin(sandbox):
    command = sandbox.commands.run("echo early; read line; echo got $line; exit 7", background=True, stdin=True)
    print(command.pid)


def come_back(sandbox):
    """Another process finds what the first has begun."""
    [process] = [p for p in sandbox.commands.list() if "read line" in " ".join(p.args)]
    assert (process.cmd, process.args[:2], process.cwd) == ("/bin/bash", ["-l", "-c"], "/home/user"), process
    command = sandbox.commands.connect(process.pid)
    sandbox.commands.send_stdin(process.pid, "this\n")
    ended = refused(e2b.CommandExitException, command.wait)
    assert (ended.exit_code, ended.stdout) == (7, "got this\n"), ended
    again = refused(e2b.CommandExitException, sandbox.commands.connect(process.pid).wait)
    assert again.exit_code == 7, again


def terminals(sandbox):
    terminal = sandbox.pty.create(e2b.PtySize(rows=30, cols=100), envs={"A": "set"}, cwd="/tmp")
    sandbox.pty.resize(terminal.pid, e2b.PtySize(rows=24, cols=77))
    sandbox.pty.send_stdin(terminal.pid, b"echo $A $(stty size) $PWD; exit 5\n")
    shown = []
    ended = refused(e2b.CommandExitException, terminal.wait, on_pty=shown.append)
    assert ended.exit_code == 5 and b"set 24 77 /tmp" in b"".join(shown), shown
    terminal = sandbox.pty.create(e2b.PtySize(rows=30, cols=100))
    assert sandbox.pty.kill(terminal.pid) is True
    assert sandbox.pty.kill(terminal.pid) is False


def it_is_killed(sandbox):
    """Somebody else ends the sandbox while this waits."""
    assert sandbox.is_running()
    command = sandbox.commands.run("sleep 1000", background=True)
    print("waits", flush=True)
    refused(e2b.SandboxNotRunningException, command.wait)
    assert not sandbox.is_running()
    for call in (sandbox.files.read, sandbox.commands.run, sandbox.files.exists):
        refused(e2b.SandboxNotRunningException, call, "true")


def main():
    url, key, cases, *named = sys.argv[1:]
    surroundings(url, key)
    sandbox = e2b.Sandbox.connect(*named, timeout=600) if named else e2b.Sandbox.create(timeout=600)
    for case in cases.split(","):
        globals()[case](sandbox)
    if not named:
        assert sandbox.kill()


if __name__ == "__main__":
    main()
    leave()
