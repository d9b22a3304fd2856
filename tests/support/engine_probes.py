"""Tries to get through each lock from inside. Usage: engine_probes.py NAME...; prints one JSON object, name to what it found.

A probe returns None when the lock held, and otherwise a word for what it reached.
"""

import ctypes
import errno
import json
import mmap
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading

LIBC = ctypes.CDLL(None, use_errno=True)
MIB = 1 << 20
X86 = platform.machine() == "x86_64"
PROBES = {}


def probe(function):
    PROBES[function.__name__] = function
    return function


def syscall(number, *args):
    """0, or the errno."""
    arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return 0 if LIBC.syscall(ctypes.c_long(number), *arguments) >= 0 else ctypes.get_errno()


def reached(code, *refusals):
    """A refusal by the filter is EPERM or ENOSYS; everything else came from behind it."""
    return None if code in (refusals or (errno.EPERM, errno.ENOSYS)) else errno.errorcode.get(code, "success")


def attempt(function, *refusals):
    try:
        function()
    except OSError as error:
        return None if error.errno in refusals else errno.errorcode[error.errno]
    return "success"


def status(field):
    with open("/proc/self/status") as file:
        return next(line.split()[1] for line in file if line.startswith(field + ":"))


def first_line(*paths):
    for path in paths:
        try:
            with open(path) as file:
                return file.readline().strip()
        except OSError:
            pass
    return None


# Namespaces and network.


@probe
def network_device():
    return " ".join(set(os.listdir("/sys/class/net")) - {"lo"}) or None


@probe
def route():
    with open("/proc/net/route") as file:
        return "a route" if len(file.readlines()) > 1 else None


@probe
def resolver():
    return first_line("/etc/resolv.conf") or None


@probe
def machine_namespaces():
    """The machine's own are given as ipc:[1],uts:[2],..."""
    machine = os.environ["MACHINE_NAMESPACES"].split(",")
    mine = [os.readlink(f"/proc/self/ns/{link.split(':')[0]}") for link in machine]
    return ",".join(set(machine) & set(mine)) or None


@probe
def machine_processes():
    return None if os.getpid() == 1 else f"pid {os.getpid()}"


@probe
def machine_name():
    return None if socket.gethostname() == "cell" else socket.gethostname()


# Identity.


@probe
def capabilities():
    return None if int(status("CapBnd"), 16) == int(status("CapEff"), 16) == 0 else status("CapBnd")


@probe
def new_privileges():
    return None if status("NoNewPrivs") == "1" else "setuid files work"


@probe
def privileged_user():
    return None if os.getuid() >= 200000 and os.getgid() == os.getuid() else f"uid {os.getuid()}"


@probe
def other_groups():
    return str(set(os.getgroups()) - {os.getgid()}) if set(os.getgroups()) - {os.getgid()} else None


# Files.


@probe
def root_file_system():
    return None if os.statvfs("/").f_flag & os.ST_RDONLY else "writable"


@probe
def guest_folder():
    return attempt(lambda: open("/cellblock/x", "w"), errno.EROFS)


@probe
def writable_folders():
    """Every folder in which a file can be made, but for the three that are meant for it."""
    found = set()
    for folder, below, _ in os.walk("/"):
        below[:] = [] if folder in ("/proc", "/sys") else below
        try:
            os.close(os.open(f"{folder}/.probe", os.O_CREAT | os.O_WRONLY))
            os.unlink(f"{folder}/.probe")
            found.add(folder)
        except OSError:
            pass
    return " ".join(found - {"/tmp", "/workspace", "/dev/shm", "/run/cellblock"}) or None


def fill(folder, megabytes):
    block = bytes(MIB)
    try:
        for n in range(megabytes // 8 + 1):
            with open(f"{folder}/fill{n}", "wb") as file:
                for _ in range(8):
                    file.write(block)
    finally:
        for name in os.listdir(folder):
            if name.startswith("fill"):
                os.unlink(f"{folder}/{name}")


@probe
def work_size():
    return attempt(lambda: fill("/workspace", 24), errno.ENOSPC)


@probe
def tmp_size():
    return attempt(lambda: fill("/tmp", 24), errno.ENOSPC)


@probe
def shm_size():
    return attempt(lambda: fill("/dev/shm", 40), errno.ENOSPC)


def make_files(folder, count):
    def create():
        for n in range(count):
            os.close(os.open(f"{folder}/n{n}", os.O_CREAT | os.O_WRONLY))

    outcome = attempt(create, errno.ENOSPC)
    for name in os.listdir(folder):
        if name.startswith("n"):
            os.unlink(f"{folder}/{name}")
    return outcome


@probe
def work_inodes():
    return make_files("/workspace", 4200)


@probe
def shm_inodes():
    return make_files("/dev/shm", 1100)


@probe
def state_inodes():
    return make_files("/run/cellblock", 600)


@probe
def state_size():
    return attempt(lambda: fill("/run/cellblock", 8), errno.ENOSPC)


def execute_in(folder):
    with open(f"{folder}/program", "w") as file:
        file.write("#!/bin/sh\n")
    os.chmod(f"{folder}/program", 0o700)
    subprocess.run([f"{folder}/program"], check=True)


@probe
def tmp_programs():
    return attempt(lambda: execute_in("/tmp"), errno.EACCES)


@probe
def shm_programs():
    return attempt(lambda: execute_in("/dev/shm"), errno.EACCES)


@probe
def setuid_and_devices():
    flags = os.statvfs("/tmp").f_flag & os.statvfs("/workspace").f_flag & os.statvfs("/dev/shm").f_flag
    return None if flags & os.ST_NOSUID and flags & os.ST_NODEV else "setuid files or devices"


@probe
def device_list():
    usual = "stderr stdout stdin fd ptmx urandom zero tty full random null shm mqueue pts console"
    return " ".join(set(os.listdir("/dev")) - set(usual.split())) or None


@probe
def machine_files():
    """What of the machine's own can be read: a byte of a file, or a name in a folder."""
    found = []
    for path in "/proc/cmdline /proc/diskstats /proc/interrupts /proc/kallsyms /proc/partitions /proc/modules".split():
        found += [path] if first_line(path) else []
    for path in "/sys/kernel /sys/block /sys/module /sys/class/block /sys/bus /proc/fs /proc/irq".split():
        found += [path] if os.path.isdir(path) and os.listdir(path) else []
    return " ".join(found) or None


@probe
def machine_settings():
    return attempt(lambda: open("/proc/sys/kernel/domainname", "w"), errno.EROFS)


# Limits.


@probe
def memory():
    child = subprocess.run([sys.executable, "-c", "x = bytearray(300 << 20); print(len(x))"], capture_output=True)
    return None if child.returncode == -signal.SIGKILL else f"exit status {child.returncode}"


@probe
def swap():
    v1 = "/sys/fs/cgroup/memory/memory."
    if limit := first_line(v1 + "limit_in_bytes"):
        both = first_line(v1 + "memsw.limit_in_bytes")
        return None if both == limit else f"{both} with swap"
    return None if first_line("/sys/fs/cgroup/memory.swap.max") == "0" else "swap"


@probe
def swappiness():
    found = first_line("/sys/fs/cgroup/memory/memory.swappiness")
    return None if found in ("0", None) else found


@probe
def processes():
    release = threading.Event()
    started = 0
    try:
        for _ in range(80):
            threading.Thread(target=release.wait, daemon=True).start()
            started += 1
    except RuntimeError:
        pass
    release.set()
    return f"{started} threads" if started == 80 else None


@probe
def open_files():
    files = []
    outcome = attempt(lambda: files.extend(os.dup(0) for _ in range(1100)), errno.EMFILE)
    # `extend` keeps what was made before an error.
    for file in files:
        os.close(file)
    return outcome


@probe
def file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return attempt(lambda: os.truncate(tempfile.mkstemp(dir="/workspace")[1], 1 << 40), errno.EFBIG)


def soft_limit(limit):
    found = resource.getrlimit(limit)
    return None if found == (0, 0) else str(found)


@probe
def core_files():
    return soft_limit(resource.RLIMIT_CORE)


@probe
def locked_memory():
    return soft_limit(resource.RLIMIT_MEMLOCK)


@probe
def message_queues():
    return soft_limit(resource.RLIMIT_MSGQUEUE)


@probe
def pending_signals():
    found = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    return None if found == (256, 256) else str(found)


@probe
def cpu():
    """Half a CPU: a loop of more than one period is throttled."""

    def throttled():
        for path in "/sys/fs/cgroup/cpu/cpu.stat /sys/fs/cgroup/cpu,cpuacct/cpu.stat /sys/fs/cgroup/cpu.stat".split():
            if os.path.exists(path):
                with open(path) as file:
                    return int(next(line.split()[1] for line in file if line.startswith("nr_throttled")))

    before = throttled()
    end = os.times().user + 0.4
    while os.times().user < end:
        pass
    return None if throttled() > before else "not throttled"


@probe
def cpu_weight():
    shares = first_line("/sys/fs/cgroup/cpu/cpu.shares", "/sys/fs/cgroup/cpu.weight")
    return None if shares and int(shares) <= 128 and shares != "100" else str(shares)


@probe
def oom_order():
    return None if first_line("/proc/self/oom_score_adj") == "500" else first_line("/proc/self/oom_score_adj")


# System calls: which are refused before the kernel looks at their arguments.

if X86:
    BAD = -1
    PATH = ctypes.c_char_p(b"/")
    NUMBERS = {
        "ptrace": (101, 16, 999999, 0, 0),
        "process_vm_readv": (310, os.getpid(), 0, 0, 0, 0, 0),
        "pidfd_getfd": (438, BAD, 0, 0),
        "kcmp": (312, os.getpid(), os.getpid(), 0, 0, 0),
        "splice": (275, BAD, 0, BAD, 0, 1, 0),
        "tee": (276, BAD, BAD, 1, 0),
        "vmsplice": (278, BAD, 0, 1, 0),
        "setns": (308, BAD, 0),
        "clone3": (435, 0, 0),
        "perf_event_open": (298, 0, 0, -1, -1, 0),
        "userfaultfd": (323, 1),
        "io_uring_setup": (425, 1, 0),
        "io_uring_enter": (426, BAD, 1, 0, 0, 0, 0),
        "io_uring_register": (427, BAD, 0, 0, 0),
        "keyctl": (250, 0, -3, 0),
        "add_key": (248, ctypes.c_char_p(b"user"), ctypes.c_char_p(b"x"), ctypes.c_char_p(b"x"), 1, -2),
        "request_key": (249, ctypes.c_char_p(b"user"), ctypes.c_char_p(b"none"), 0, 0),
        "name_to_handle_at": (303, BAD, PATH, 0, 0, 0),
        "fanotify_init": (300, 0x200, 0),
        "mq_open": (240, 0, 0, 0, 0),
        "msgget": (68, 0, 0o600),
        "semget": (64, 0, 1, 0o600),
        "shmget": (29, 0, 4096, 0o600),
        "mbind": (237, 0, 0, 0, 0, 0, 0),
        "modify_ldt": (154, 0, 0, 0),
        "clock_adjtime": (305, 0, 0),
        "seccomp": (317, 99, 0, 0),
        "personality(ADDR_NO_RANDOMIZE)": (135, 0x40000),
        "prlimit64(another)": (302, os.getpid(), 7, 0, 0),
        "clone(NEWUSER)": (56, 0x10000000 | 0x80000000, 0, 0, 0, 0),
        "unshare": (272, 0),
        "socket(AF_VSOCK)": (41, 40, 1, 0),
        "socket(AF_ALG)": (41, 38, 5, 0),
        "socket(NETLINK_NETFILTER)": (41, 16, 3, 12),
        "socket(SCTP)": (41, 2, 1, 132),
        "socket(ICMP)": (41, 2, 2, 1),
        "mknod(device)": (133, ctypes.c_char_p(b"/nonexistent/x"), 0o20600, 0x103),
    }

    def call(arguments):
        return lambda: reached(syscall(*arguments))

    for name, arguments in NUMBERS.items():
        PROBES[name] = call(arguments)

    @probe
    def old_calls():
        """getpid as a 32-bit program asks for it: filters of 64-bit arguments would not see such calls."""
        if (child := os.fork()) == 0:
            code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
            code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
            ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        return None if os.WIFSIGNALED(ended) else "answered"


@probe
def socket_families():
    found = set()
    for family in range(46):
        for kind in (1, 2, 3, 5):
            if syscall({"x86_64": 41}.get(platform.machine(), 198), family, kind, 0) == 0:
                found.add(family)
    return str(sorted(found - {1, 2, 10, 16})) if found - {1, 2, 10, 16} else None


# What must go on working.


@probe
def inotify():
    return None if LIBC.inotify_init1(0) >= 0 else "refused"


if __name__ == "__main__":
    names = sys.argv[1:] or PROBES
    print(json.dumps({name: PROBES[name]() for name in names}))
