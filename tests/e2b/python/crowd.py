"""Works with many sandboxes at once as E2B's own asynchronous Python client does, as it comes: `crowd.py URL KEY COUNT FIRST`. Ends with 0 if each client got what is its own.

Says "made" when all sandboxes are there, and goes on when its input ends. Each client has a number of its own, the first of them FIRST."""

import asyncio
import sys

from clients import leave, surroundings
from e2b_code_interpreter import AsyncSandbox

PATIENCE = 500


async def works(sandbox, number):
    ran = await sandbox.run_code(f"x = {number}\nprint('code', x)\nx * x", timeout=PATIENCE, request_timeout=PATIENCE)
    assert (ran.text, "".join(ran.logs.stdout), ran.error) == (str(number * number), f"code {number}\n", None), ran
    command = await sandbox.commands.run(f"echo command {number}", timeout=PATIENCE, request_timeout=PATIENCE)
    assert (command.exit_code, command.stdout) == (0, f"command {number}\n"), command
    written = await sandbox.files.write("mine/file.txt", f"file {number}" * 1000, request_timeout=PATIENCE)
    assert written.path == "/home/user/mine/file.txt", written
    assert await sandbox.files.read("mine/file.txt", request_timeout=PATIENCE) == f"file {number}" * 1000
    assert await sandbox.kill(request_timeout=PATIENCE) is True
    assert not await sandbox.is_running(request_timeout=PATIENCE)


async def crowd(numbers):
    made = await asyncio.gather(*(AsyncSandbox.create(timeout=1200, request_timeout=PATIENCE) for _ in numbers))
    print("made", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await asyncio.gather(*(works(sandbox, number) for sandbox, number in zip(made, numbers, strict=True)))


def main():
    url, key, count, first = sys.argv[1:]
    surroundings(url, key)
    asyncio.run(crowd(range(int(first), int(first) + int(count))))


if __name__ == "__main__":
    main()
    leave()
