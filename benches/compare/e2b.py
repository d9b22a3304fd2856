"""Asks a server as E2B's own client does and as its native API is asked, in turns: `e2b.py URL KEY ROUNDS`. One JSON object on stdout: milliseconds of each kind.

The template's pool is full before each create, so that what is measured is the door and not a container's start."""

import json
import os
import random
import sys
import time

url, key, rounds = sys.argv[1:]
for name in [name for name in os.environ if name.startswith("E2B_")]:
    del os.environ[name]
# Older clients take no other form of a key.
os.environ.update(E2B_API_URL=url, E2B_SANDBOX_URL=url, E2B_API_KEY=key.replace("cb_", "e2b_"))

import httpx
from e2b_code_interpreter import Sandbox

native = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
taken = {f"{what}, {door}": [] for door in ("e2b", "native") for what in ("create", "first", "run")}
# Executions in one sandbox, after the first: what a program that goes on waits for.
RUNS = 20


def pool_is_full():
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pool = native.get("/v1/pools").json()["pools"][0]
        if pool["ready"] == pool["target"] > 0:
            return
        time.sleep(0.01)
    sys.exit("the pool does not fill")


def timed(what, act):
    began = time.perf_counter()
    done = act()
    taken[what].append((time.perf_counter() - began) * 1000)
    return done


def by_e2b():
    sandbox = timed("create, e2b", Sandbox.create)
    for at in range(1 + RUNS):
        ran = timed("run, e2b" if at else "first, e2b", lambda: sandbox.run_code("1+1"))
        assert ran.text == "2", ran
    sandbox.kill()


def natively():
    def create():
        return native.post("/v1/sessions", json={"template": "e2b"}).raise_for_status().json()

    session = timed("create, native", create)
    assert session["source"] == "warm", session
    path = f"/v1/sessions/{session['id']}"

    # As E2B's client asks: told line by line, to the last one.
    def run():
        with native.stream("POST", f"{path}/executions", json={"code": "1+1"}, headers={"Accept": "application/x-ndjson"}) as answer:
            return [json.loads(line) for line in answer.raise_for_status().iter_lines()]

    for at in range(1 + RUNS):
        ran = timed("run, native" if at else "first, native", run)
        (result,) = [event for event in ran if event["type"] == "result"]
        assert result["data"]["text/plain"] == "2", ran
    native.delete(path).raise_for_status()


for _ in range(int(rounds)):
    doors = [by_e2b, natively]
    random.shuffle(doors)
    for door in doors:
        pool_is_full()
        # What is made for the pool has just ended; its last traces settle.
        time.sleep(0.2)
        door()
print(json.dumps(taken))
