"""What people run in a session, in four portions, for trace.sh. A library or tool that the image lacks is left out."""

import importlib
import os
import shutil
import subprocess
import sys


def optional(name):
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library may fail in more ways than being absent
        print(f"{name}: {error}")
        return None


def kernel():
    from jupyter_client import KernelManager

    manager = KernelManager(transport="ipc")
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=120)
    for code in ("1 + 1", "import time; time.sleep(0.1)", "raise ValueError", "%pwd", "!echo shell", "import asyncio; await asyncio.sleep(0)"):
        client.execute_interactive(code, timeout=60, output_hook=lambda _: None)
    manager.interrupt_kernel()
    manager.restart_kernel()
    client.stop_channels()
    manager.shutdown_kernel()


def libraries():
    if numpy := optional("numpy"):
        a = numpy.random.rand(300, 300)
        numpy.linalg.inv(a) @ a
        numpy.save("/workspace/a.npy", a)
        numpy.load("/workspace/a.npy", mmap_mode="r+").flush()
    if pandas := optional("pandas"):
        frame = pandas.DataFrame({"a": range(1000), "b": range(1000)})
        frame.to_csv("/workspace/a.csv")
        pandas.read_csv("/workspace/a.csv").groupby("a").sum()
        if optional("pyarrow"):
            frame.to_parquet("/workspace/a.parquet")
            pandas.read_parquet("/workspace/a.parquet")
        if optional("openpyxl"):
            frame.to_excel("/workspace/a.xlsx")
    if matplotlib := optional("matplotlib"):
        matplotlib.use("agg")
        pyplot = optional("matplotlib.pyplot")
        pyplot.plot([1, 2, 3])
        pyplot.savefig("/workspace/a.png")
    if optional("scipy"):
        optional("scipy.optimize").minimize(lambda x: (x - 1) ** 2, 0)
    if optional("sklearn"):
        forest = optional("sklearn.ensemble").RandomForestClassifier(n_estimators=8, n_jobs=2)
        forest.fit([[i] for i in range(50)], [i % 2 for i in range(50)])
    for name in ("polars", "duckdb", "torch", "PIL", "sympy", "requests", "lxml", "bs4", "plotly", "statsmodels.api", "seaborn"):
        optional(name)
    if polars := sys.modules.get("polars"):
        polars.DataFrame({"a": [1, 2]}).group_by("a").len()
    if duckdb := sys.modules.get("duckdb"):
        duckdb.sql("select 1").fetchall()


def double(n):
    return n * 2


def system():
    import asyncio
    import concurrent.futures
    import fcntl
    import mmap
    import multiprocessing
    import pathlib
    import pty
    import select
    import signal
    import socket
    import sqlite3
    import tempfile
    import threading
    import time
    from multiprocessing import shared_memory

    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            pool.map(double, range(8))
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        list(pool.map(double, range(4)))
    block = shared_memory.SharedMemory(create=True, size=4096)
    block.close()
    block.unlink()
    lock = multiprocessing.Lock()
    with lock:
        pass
    threads = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]

    async def talk():
        child = await asyncio.create_subprocess_exec("sh", "-c", "cat; sleep 0.05", stdin=-1, stdout=-1)
        await child.communicate(b"x")
        server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await reader.read()
        server.close()
        server = await asyncio.start_unix_server(lambda r, w: w.close(), "/tmp/s")
        await (await asyncio.open_unix_connection("/tmp/s"))[0].read()
        await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.01)

    asyncio.run(talk())
    database = sqlite3.connect("/workspace/a.db")
    database.execute("pragma journal_mode=wal")
    database.execute("create table t (a)")
    database.executemany("insert into t values (?)", [(i,) for i in range(1000)])
    database.commit()
    database.close()

    folder = pathlib.Path(tempfile.mkdtemp(dir="/workspace"))
    (folder / "a").write_text("x")
    (folder / "b").symlink_to("a")
    os.link(folder / "a", folder / "c")
    os.mkfifo(folder / "d")
    os.rename(folder / "c", folder / "e")
    os.utime(folder / "a")
    os.chmod(folder / "a", 0o600)
    os.truncate(folder / "a", 100)
    os.access(folder / "a", os.R_OK)
    os.statvfs("/workspace")
    list(os.scandir(folder))
    shutil.copy2(folder / "a", folder / "f")
    shutil.make_archive("/workspace/z", "gztar", folder)
    with open(folder / "a", "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_EX)
        os.posix_fallocate(file.fileno(), 0, 1 << 16)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
        os.pread(file.fileno(), 1, 0)
        os.pwritev(file.fileno(), [b"x"], 0)
        mapped = mmap.mmap(file.fileno(), 0)
        mapped.madvise(mmap.MADV_WILLNEED)
        mapped.flush()
    shutil.rmtree(folder)
    os.memfd_create("m")
    os.eventfd(0)
    os.getloadavg(), os.getpriority(os.PRIO_PROCESS, 0), os.nice(1)
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    os.getrandom(8)
    child = subprocess.Popen(["sleep", "5"])
    os.pidfd_open(child.pid)
    child.kill(), child.wait()
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    signal.pause()
    signal.sigtimedwait([signal.SIGUSR1], 0.01)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    a, b = socket.socketpair()
    socket.send_fds(a, [b"x"], [0])
    socket.recv_fds(b, 1, 1)
    for family in (socket.AF_INET, socket.AF_INET6):
        udp = socket.socket(family, socket.SOCK_DGRAM)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        udp.close()
    try:
        socket.getaddrinfo("localhost", 80)
        socket.create_connection(("203.0.113.1", 9), timeout=0.1)
    except OSError:
        pass
    select.select([a], [], [], 0)
    poller = select.epoll()
    poller.register(a)
    poller.poll(0)
    pty.spawn(["true"])
    subprocess.run(["sleep", "0"], preexec_fn=os.setsid, check=True)
    try:
        subprocess.run(["sleep", "9"], timeout=0.1)
    except subprocess.TimeoutExpired:
        pass
    os.wait3(os.WNOHANG) if os.fork() == 0 and os._exit(0) else os.wait()


TOOLS = """
echo a | sort | uniq -c | sed s/a/b/ | awk '{print $1}' | grep -c 1
mkdir -p w/x && cp -a /etc/passwd w/x/p && mv w/x/p w/x/q && ln -s q w/x/r && touch w/x/t && stat w/x/q && ls -laR w && du -sh w
tar czf w.tgz w && tar xzf w.tgz && find w -name q -exec cat {} + && chmod -R go-w w && rm -rf w
(sleep 0.1 & wait) ; timeout 1 sleep 0 ; nice true ; df -h ; ps ax ; id ; date ; uname -a ; nproc ; free ; env
head -c 100000 /dev/urandom | sha256sum ; dd if=/dev/zero of=z bs=4k count=9 ; split -b 4k z ; diff z z ; cmp z z
bash -c 'trap "echo t" EXIT; read -t 0.1 < <(echo x); ulimit -a; shopt; coproc cat; echo $RANDOM; exec 3<>/dev/null'
git init r && cd r && git config user.email a@b && git config user.name a && echo 1 > f && git add . && git commit -m 1 && git log && git status && git gc && git clone . ../r2
curl -m 1 http://127.0.0.1:9/
wget -T 1 -t 1 http://127.0.0.1:9/
node -e 'const t = require("worker_threads"); require("fs").writeFileSync("n", "1"); require("child_process").execSync("true"); setTimeout(() => 1, 10)'
deno eval 'console.log(1)'
R --vanilla -e 'x <- rnorm(100); summary(lm(x ~ seq_along(x)))'
perl -e 'print 1' ; gcc --version ; make --version ; less /etc/passwd ; vi --version ; top -bn1 ; unzip -v ; zip -v
python3 -m venv --without-pip v && v/bin/python -c 1
pip --version ; python3 -m http.server --help ; jq . /dev/null ; sqlite3 :memory: 'select 1' ; rg --version ; ffmpeg -version
"""


def tools():
    for line in TOOLS.strip().splitlines():
        subprocess.run(["sh", "-c", line], cwd="/workspace", timeout=120, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    {"kernel": kernel, "libraries": libraries, "system": system, "tools": tools}[sys.argv[1]]()
