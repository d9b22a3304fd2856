"""Makes, finds, changes and ends sandboxes as E2B's own Python clients do, as they come: `control.py URL KEY CASES [SANDBOX]`. Ends with 0 if the client got what it should."""

import asyncio
import datetime
import sys
import time
import uuid

import e2b
from clients import leave, refused, surroundings, until
from e2b import Sandbox, SandboxQuery, SandboxState
from e2b_code_interpreter import Sandbox as CodeInterpreter

GONE = "9" * 26


def left(sandbox):
    """Seconds until it ends."""
    return (sandbox.get_info().end_at - datetime.datetime.now(datetime.timezone.utc)).total_seconds()


def a_sandbox_is_what_was_asked_for():
    metadata = {"a b": "c&d", "user": "ada"}
    sandbox = Sandbox.create(timeout=120, metadata=metadata, envs={"MINE": "a b"})
    info = sandbox.get_info()
    assert (info.sandbox_id, info.template_id, info.name) == (sandbox.sandbox_id, "e2b", "base"), info
    assert (info.metadata, info.state, info.memory_mb) == (metadata, SandboxState.RUNNING, 1024), info
    assert info.cpu_count >= 1 and info.envd_version == "0.6.13", info
    assert abs((info.end_at - info.started_at).total_seconds() - 120) < 5, info
    assert info.lifecycle == {"on_timeout": "kill", "auto_resume": False}, info.lifecycle
    assert info.allow_internet_access is False, info
    assert sandbox.commands.run("echo $MINE").stdout == "a b\n"
    sandbox.set_timeout(600)
    assert 590 < left(sandbox) <= 600, left(sandbox)
    sandbox.set_timeout(60)
    assert 50 < left(sandbox) <= 60, left(sandbox)
    error = refused(e2b.SandboxException, sandbox.set_timeout, 10_000_000)
    assert "/timeout" in str(error) and "allowed" in str(error), error
    assert sandbox.kill()


def a_sandbox_is_measured():
    sandbox = Sandbox.create(timeout=120)
    (metric,) = sandbox.get_metrics()
    assert metric.cpu_count >= 1 and 0 <= metric.cpu_used_pct <= 100, metric
    assert 0 < metric.mem_used <= metric.mem_total == 1024**3 and metric.disk_total > 0, metric
    now, hour = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(hours=1)
    assert abs((metric.timestamp - now).total_seconds()) < 30, metric
    assert len(sandbox.get_metrics(start=now - hour, end=now + hour)) == 1
    assert sandbox.get_metrics(end=now - hour) == [] == sandbox.get_metrics(start=now + hour)
    assert Sandbox.kill(sandbox.sandbox_id)


def what_is_killed_is_gone():
    sandbox = Sandbox.create(timeout=120)
    assert sandbox.is_running()
    assert sandbox.kill() is True
    assert sandbox.kill() is False and Sandbox.kill(sandbox.sandbox_id) is False
    assert not sandbox.is_running()
    is_gone(sandbox)


def is_gone(sandbox):
    for call in (sandbox.get_info, sandbox.connect, sandbox.pause, sandbox.get_metrics):
        refused(e2b.SandboxNotFoundException, call)
    refused(e2b.SandboxNotFoundException, sandbox.set_timeout, 60)
    for call in (sandbox.files.read, sandbox.commands.run):
        refused(e2b.SandboxNotRunningException, call, "true")


def what_there_never_was_is_not_there():
    for unknown in (GONE, "x", "sbx-1"):
        assert Sandbox.kill(unknown) is False
        for call in (Sandbox.get_info, Sandbox.connect, Sandbox.pause, Sandbox.get_metrics):
            refused(e2b.SandboxNotFoundException, call, unknown)
        refused(e2b.SandboxNotFoundException, Sandbox.set_timeout, unknown, 60)


def pages(paginator):
    """All ids, page by page."""
    found = []
    while paginator.has_next:
        found.append([info.sandbox_id for info in paginator.next_items()])
    return found


def sandboxes_are_found():
    run = f"run 50% & {uuid.uuid4()}"
    began = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=5)
    made = [Sandbox.create(timeout=300, metadata={"run": run, "n": str(n)}) for n in range(3)]
    ids = [sandbox.sandbox_id for sandbox in made]
    listed = lambda limit=None, order=None, **query: pages(Sandbox.list(SandboxQuery(**query), limit=limit, order=order))
    mine = {"run": run}
    assert listed(metadata=mine) == [ids[::-1]], "the newest first"
    assert listed(metadata=mine, order="asc") == [ids]
    assert listed(metadata=mine, limit=2) == [ids[:0:-1], ids[:1]]
    assert listed(metadata=mine, limit=1, order="asc") == [[one] for one in ids]
    assert listed(metadata=mine | {"n": "1"}) == [[ids[1]]] and listed(metadata=mine | {"n": "7"}) == [[]]
    made[1].pause()
    assert listed(metadata=mine, state=[SandboxState.PAUSED]) == [[ids[1]]]
    assert listed(metadata=mine, state=[SandboxState.RUNNING]) == [[ids[2], ids[0]]]
    assert listed(metadata=mine, state=[SandboxState.RUNNING, SandboxState.PAUSED]) == [ids[::-1]]
    for template, found in {"base": [ids[::-1]], "e2b": [ids[::-1]], "code-interpreter-v1": [[]]}.items():
        assert listed(metadata=mine, template=template) == found, template
    assert listed(metadata=mine, started_after=began) == [ids[::-1]]
    assert listed(metadata=mine, started_after=datetime.datetime.now() + datetime.timedelta(minutes=1)) == [[]]
    made[2].kill()
    assert listed(metadata=mine) == [[ids[1], ids[0]]]
    refused(e2b.SandboxException, Sandbox.list(limit=1000).next_items)
    (info,) = Sandbox.list(SandboxQuery(metadata=mine | {"n": "0"})).next_items()
    assert (info.metadata, info.name, info.state) == (mine | {"n": "0"}, "base", SandboxState.RUNNING), info
    for sandbox in made[:2]:
        assert sandbox.kill()


def begin(sandbox_id):
    sandbox = CodeInterpreter.connect(sandbox_id, timeout=600)
    sandbox.run_code("x = 20")
    sandbox.files.write("left.txt", "here")
    assert 590 < left(sandbox), left(sandbox)


def come_back(sandbox_id):
    """Another process, of which no time is made shorter."""
    sandbox = CodeInterpreter.connect(sandbox_id, timeout=5)
    assert 500 < left(sandbox), left(sandbox)
    assert sandbox.run_code("x + 1").text == "21" and sandbox.files.read("left.txt") == "here"
    sandbox.connect(timeout=1200)
    assert 1190 < left(sandbox), left(sandbox)


def a_pause_keeps_everything():
    sandbox = CodeInterpreter.create(timeout=60)
    sandbox.run_code("import os; x = 20; pid = os.getpid()")
    assert sandbox.pause() is True
    assert sandbox.pause() is False, "it is paused already"
    assert not sandbox.is_running() and sandbox.get_info().state == SandboxState.PAUSED
    assert left(sandbox) > 3600, "its time stands still"
    assert sandbox.get_metrics() == []
    refused(e2b.SandboxNotFoundException, sandbox.set_timeout, 60)
    refused(e2b.SandboxException, sandbox.connect, on_resume="reboot")
    again = CodeInterpreter.connect(sandbox.sandbox_id, timeout=100)
    assert again.is_running() and 90 < left(again) <= 100, left(again)
    assert again.run_code("x, pid == os.getpid()").text == "(20, True)"
    assert sandbox.run_code("x").text == "20", "its tokens are what they were"
    running = again.commands.run("sleep 1000", background=True)
    error = refused(e2b.ServiceBusyException, again.pause)
    assert "runs" in str(error), error
    running.kill()

    def pauses():
        try:
            return again.pause()
        except e2b.ServiceBusyException:
            return False

    until(pauses)
    error = refused(e2b.SandboxException, Sandbox.pause, again.sandbox_id, mode="filesystem")
    assert "memory" in str(error), error
    assert again.kill() is True


def time_is_over():
    ending = Sandbox.create(timeout=300)
    resting = CodeInterpreter.create(timeout=300, lifecycle={"on_timeout": "pause"})
    waking = Sandbox.create(timeout=300, lifecycle={"on_timeout": "pause", "auto_resume": True})
    waking.files.write("left.txt", "here")
    for sandbox in (ending, resting, waking):
        sandbox.set_timeout(3)
    until(lambda: not ending.is_running())
    is_gone(ending)
    assert ending.kill() is False
    until(lambda: resting.get_info().state == SandboxState.PAUSED)
    assert resting.get_info().lifecycle == {"on_timeout": "pause", "auto_resume": False}
    assert not resting.is_running()
    resting.connect(timeout=120)
    assert resting.run_code("1+1").text == "2" and 110 < left(resting) <= 120, left(resting)
    until(lambda: waking.get_info().state == SandboxState.PAUSED)
    assert waking.files.read("left.txt") == "here", "whoever asks for it wakes it"
    assert 290 < left(waking) <= 300, left(waking)
    assert resting.kill() and waking.kill()


def what_can_not_be_had_is_said():
    def says(word, call, *args, **named):
        error = refused(e2b.SandboxException, call, *args, **named)
        assert word in str(error), (word, error)

    create = Sandbox.create
    says("404", create, "nothing-of-that-name")
    says("/timeout", create, timeout=10_000_000)
    says("/envVars/1x", create, envs={"1x": "a"})
    says("/allow_internet_access", create, allow_internet_access=True)
    says("/volumeMounts", create, volume_mounts={"/data": "volume"})
    says("/mcp", create, mcp={"exa": {"apiKey": "x"}})
    says("/autoPauseMemory", create, lifecycle={"on_timeout": {"action": "pause", "mode": "filesystem"}})
    says("/network/allowOut", create, network={"allow_out": ["pypi.org"], "deny_out": [e2b.ALL_TRAFFIC]})
    says("/network/denyOut/0", create, network={"deny_out": ["10.0.0.0/8"]})
    says("/network/allowPublicTraffic", create, network={"allow_public_traffic": True})
    sandbox = create(timeout=120, allow_internet_access=False, secure=True, network={"allow_public_traffic": False})
    says("/allowOut", sandbox.update_network, {"allow_out": ["pypi.org"]})
    sandbox.update_network({"allow_internet_access": False})
    for call in (sandbox.create_snapshot, sandbox.fork, Sandbox.list_snapshots().next_items):
        says("container", call)
    says("container", Sandbox.delete_snapshot, "team/snapshot:v1")
    assert sandbox.kill()


def the_same_key_makes_one():
    key = str(uuid.uuid4())
    first, again = (Sandbox.create(timeout=120, metadata={"a": "1"}, idempotency_key=key) for _ in range(2))
    assert first.sandbox_id == again.sandbox_id
    error = refused(e2b.SandboxException, Sandbox.create, timeout=121, idempotency_key=key)
    assert "Idempotency-Key" in str(error), error
    assert first.kill()


def the_asynchronous_client():
    async def run():
        made = await asyncio.gather(*(e2b.AsyncSandbox.create(timeout=120) for _ in range(2)))
        one, two = made
        assert one.sandbox_id != two.sandbox_id and await one.is_running()
        await one.set_timeout(300)
        again = await e2b.AsyncSandbox.connect(one.sandbox_id, timeout=10)
        assert (await again.commands.run("echo on")).stdout == "on\n"
        found = [info.sandbox_id for info in await e2b.AsyncSandbox.list(limit=100).next_items()]
        assert {one.sandbox_id, two.sandbox_id} <= set(found), found
        assert await two.pause() is True and not await two.is_running()
        assert [await one.kill(), await one.kill(), await two.kill()] == [True, False, True]

    asyncio.run(run())


def main():
    url, key, cases, *named = sys.argv[1:]
    surroundings(url, key)
    for case in cases.split(","):
        began = time.monotonic()
        globals()[case](*named)
        print(f"{case}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
    leave()
