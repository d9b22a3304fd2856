//! The table of hostile and awkward cells: what each does, how it must end, and what must be true of its answer. Runs nothing.

use serde_json::{Value, json};

/// A cell and what must come of it.
pub struct Row {
    /// What it does, for people.
    pub name: &'static str,
    /// Its code.
    pub code: String,
    /// Its time limit.
    pub limit: f64,
    /// What else its request says.
    pub request: Value,
    /// Memory of its session.
    pub memory_mb: u64,
    /// It leaves a kernel that can't run anything until it is replaced.
    pub spoils: bool,
    /// What is done after the next cell has run.
    pub then: Vec<Then>,
    checks: Vec<Check>,
}

/// What is done after a hostile cell.
pub enum Then {
    /// Code that must end well and print exactly this.
    Prints(&'static str, &'static str),
    /// The kernel is replaced; the next cell must run as if nothing had been.
    Restart,
}

enum Check {
    OneOf(&'static str, &'static str),
    Is(&'static str, Value),
    Contains(&'static str, &'static str),
    Holds(&'static str, fn(&Value) -> bool),
}

impl Check {
    /// Nothing when it holds, else a sentence.
    fn broken(&self, ran: &Value) -> Option<String> {
        let at = |pointer: &str| ran.pointer(pointer).unwrap_or(&Value::Null);
        let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        match self {
            Self::OneOf(pointer, allowed) => {
                let found = plain(at(pointer));
                let fits = allowed.split(" or ").any(|word| word == found);
                (!fits).then(|| format!("{pointer} is {found}, not {allowed}"))
            }
            Self::Is(pointer, value) => (at(pointer) != value).then(|| format!("{pointer} is not {value}")),
            Self::Contains(pointer, words) => {
                (!plain(at(pointer)).contains(words)).then(|| format!("{pointer} does not say {words:?}"))
            }
            Self::Holds(what, check) => (!check(ran)).then(|| (*what).to_owned()),
        }
    }
}

fn row(name: &'static str, code: impl Into<String>) -> Row {
    Row {
        name,
        code: code.into(),
        limit: 20.0,
        request: json!({}),
        memory_mb: 256,
        spoils: false,
        then: Vec::new(),
        checks: Vec::new(),
    }
}

impl Row {
    /// What is not as it must be.
    pub fn broken(&self, ran: &Value) -> Vec<String> {
        let mut checks: Vec<&Check> = self.checks.iter().collect();
        let (ok, none) = (Check::OneOf("/status", "ok"), Check::Is("/limits_hit", json!([])));
        let says = |pointer: &str| {
            self.checks.iter().any(|check| match check {
                Check::OneOf(p, _) | Check::Is(p, _) | Check::Contains(p, _) => *p == pointer,
                Check::Holds(..) => false,
            })
        };
        if !says("/status") {
            checks.push(&ok);
        }
        if !says("/limits_hit") {
            checks.push(&none);
        }
        checks.into_iter().filter_map(|check| check.broken(ran)).collect()
    }

    /// How it may end: one word, or several with ` or ` between; `ok` unless said.
    fn ends(self, statuses: &'static str) -> Self {
        self.one_of("/status", statuses)
    }

    /// Ends at a time limit, in one of these steps.
    fn times_out(mut self, limit: f64, steps: &'static str) -> Self {
        self.limit = limit;
        self.ends("timeout").one_of("/stop/step", steps)
    }

    /// Its kernel dies with this exit status.
    fn exits(self, status: i32) -> Self {
        self.ends("kernel_died").is("/kernel", json!({"restarted": true, "cause": "died", "exit_status": status}))
    }

    /// Its kernel dies from this signal.
    fn dies(self, signal: i32) -> Self {
        self.ends("kernel_died").is("/kernel", json!({"restarted": true, "cause": "died", "signal": signal}))
    }

    /// Ends with this exception.
    fn raises(self, name: &'static str) -> Self {
        self.ends("error").is("/error/name", json!(name))
    }

    /// The limits that it runs into; none unless said.
    fn hits(self, limits: Value) -> Self {
        self.is("/limits_hit", limits)
    }

    fn is(mut self, pointer: &'static str, value: Value) -> Self {
        self.checks.push(Check::Is(pointer, value));
        self
    }

    fn one_of(mut self, pointer: &'static str, allowed: &'static str) -> Self {
        self.checks.push(Check::OneOf(pointer, allowed));
        self
    }

    fn says(mut self, pointer: &'static str, words: &'static str) -> Self {
        self.checks.push(Check::Contains(pointer, words));
        self
    }

    fn holds(mut self, what: &'static str, check: fn(&Value) -> bool) -> Self {
        self.checks.push(Check::Holds(what, check));
        self
    }

    fn limit(mut self, seconds: f64) -> Self {
        self.limit = seconds;
        self
    }

    fn memory(mut self, mb: u64) -> Self {
        self.memory_mb = mb;
        self
    }

    fn with(mut self, request: Value) -> Self {
        self.request = request;
        self
    }

    fn spoils_its_kernel(mut self) -> Self {
        self.spoils = true;
        self
    }

    fn then_prints(mut self, code: &'static str, text: &'static str) -> Self {
        self.then.push(Then::Prints(code, text));
        self
    }

    fn then_restarts(mut self) -> Self {
        self.then.push(Then::Restart);
        self
    }
}

/// Those that say what is not so, say too much, or end what speaks: whoever is told of executions by another way is to be tried with these.
#[allow(dead_code, reason = "each test takes a part of it")]
pub fn that_speak() -> Vec<Row> {
    let parts = [
        deaths(),
        polite_ends(),
        what_ignores_interrupts(),
        text(),
        rich_output(),
        streams(),
        forged_status(),
        forged_content(),
        patched_machinery(),
        late_words(),
        exceptions(),
    ];
    parts.into_iter().flatten().collect()
}

/// All of them.
#[allow(dead_code, reason = "each test takes a part of it")]
pub fn all() -> Vec<Row> {
    let parts = [
        deaths(),
        polite_ends(),
        what_ignores_interrupts(),
        what_keeps_the_interpreter(),
        processes(),
        what_outlives_its_cell(),
        memory(),
        folders(),
        files(),
        text(),
        rich_output(),
        streams(),
        forged_status(),
        forged_content(),
        patched_machinery(),
        late_words(),
        exceptions(),
        awkward_code(),
        its_own_folders(),
        the_guest(),
    ];
    parts.into_iter().flatten().collect()
}

/// Prints how many processes carry the mark 9871 on their command lines.
const COUNT_MARKED: &str = "import glob
def lines():
    for path in glob.glob('/proc/[0-9]*/cmdline'):
        try: yield open(path, 'rb').read()
        except OSError: pass
print(sum(b'9871' in line for line in lines()))";

/// Names for speaking as the kernel does, signed with its key.
const FORGE: &str = "import json, time
from ipykernel.connect import get_connection_file
kernel = get_ipython().kernel
assert json.load(open(get_connection_file()))['key'].encode() == kernel.session.key
me, ident = kernel.get_parent('shell'), kernel._parent_ident['shell']
shell = kernel.shell_channel_thread.manager.get_subshell_to_shell_channel_socket(None)
def publish(kind, content, parent=me):
    kernel.session.send(kernel.iopub_socket, kind, content, parent=parent, ident=b'x')
def reply(content):
    kernel.session.send(shell, 'execute_reply', content, parent=me, ident=ident)
";

fn forging(code: &str) -> String {
    format!("{FORGE}{code}")
}

fn deaths() -> Vec<Row> {
    vec![
        row("leaves with a status", "import os; os._exit(3)").exits(3).says("/detail", "3"),
        row("reads from address zero", "import ctypes; ctypes.string_at(0)").dies(11).says("/detail", "11"),
        row("aborts", "import os; os.abort()").dies(6),
        row("kills itself", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)").dies(9),
        row(
            "is killed by a limit of its own on CPU time",
            "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
        )
        .ends("kernel_died")
        .one_of("/kernel/signal", "9 or 24"),
        row(
            "has a child kill everybody",
            "import os, signal, time\nif os.fork() == 0: os.kill(-1, signal.SIGKILL)\ntime.sleep(30)",
        )
        .dies(9),
        row("kills everybody but itself, which is nobody", "import os; os.kill(-1, 9)").raises("ProcessLookupError"),
        row("closes every file of the kernel", "import os; os.closerange(3, 4096)")
            .limit(2.0)
            .ends("kernel_died or timeout"),
        row(
            "forks, and the kernel leaves",
            "import os, time\nif os.fork(): os._exit(0)\nos.execv('/bin/sleep', ['sleep', '9871'])",
        )
        .exits(0)
        .then_prints(COUNT_MARKED, "0\n"),
        row("becomes another program", "import os; os.execv('/bin/sleep', ['sleep', '9871'])")
            .limit(2.0)
            .ends("kernel_died or timeout")
            .is("/kernel/restarted", json!(true))
            .then_prints(COUNT_MARKED, "0\n"),
    ]
}

fn polite_ends() -> Vec<Row> {
    vec![
        row("sys.exit", "import sys; sys.exit(3)").raises("SystemExit").is("/kernel/restarted", json!(false)),
        row("exit()", "exit()"),
        row("quit()", "quit()"),
        // It leaves without a word a moment after its answer, perhaps with the next cell.
        row("asks its kernel to shut down", "get_ipython().kernel.do_shutdown(False)").spoils_its_kernel(),
        row(
            "exits while a thread goes on",
            "import threading, time; threading.Thread(target=time.sleep, args=(9871,)).start(); exit()",
        ),
        row("exits, and sleeps on the way out", "import atexit, time; atexit.register(time.sleep, 9871); exit()"),
    ]
}

/// Loops in `try` are `for _ in iter(int, 1)`: CPython 3.11 lets an interrupt escape from the `try` around a bare `while True: pass`.
fn what_ignores_interrupts() -> Vec<Row> {
    vec![
        row("a loop", "x = 1\nwhile True: pass").times_out(1.0, "interrupt").then_prints("print(x)", "1\n"),
        row("a sleep", "import time; time.sleep(60)").times_out(1.0, "interrupt"),
        row("a loop that is to cost its kernel", "while True: pass")
            .with(json!({"on_timeout": "restart"}))
            .times_out(1.0, "restart"),
        row("a loop with except BaseException", "while True:\n    try:\n        for _ in iter(int, 1): pass\n    except BaseException: pass")
            .times_out(1.0, "restart"),
        row("SIGINT ignored", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass")
            .times_out(1.0, "restart"),
        row(
            "SIGINT blocked in the thread that runs",
            "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [2])\nwhile True: pass",
        )
        .times_out(1.0, "interrupt"),
        row(
            "an interrupt handler that loops",
            "import signal\ndef loop(*_):\n    while True: pass\nsignal.signal(signal.SIGINT, loop)\nwhile True: pass",
        )
        .times_out(1.0, "restart"),
        row("a finally that takes its time", "import time\ntry:\n    for _ in iter(int, 1): pass\nfinally:\n    time.sleep(.2); print('left')")
            .times_out(1.0, "interrupt")
            .is("/stdout", json!("left\n")),
        row("a finally that never ends", "import time\ntry:\n    for _ in iter(int, 1): pass\nfinally:\n    while True:\n        try: time.sleep(60)\n        except BaseException: pass")
            .times_out(1.0, "restart"),
        row(
            "a shell that ignores interrupts",
            "import os; os.system(\"trap '' INT TERM HUP; sleep 9871; sleep 9871\")",
        )
        .times_out(1.0, "restart")
        .then_prints(COUNT_MARKED, "0\n"),
        row("stops itself", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)").times_out(1.0, "restart"),
        row(
            "has a child stop everybody",
            "import os, signal, time\nif os.fork() == 0:\n    os.kill(-1, signal.SIGSTOP)\n    os._exit(0)\ntime.sleep(30)",
        )
        .times_out(1.0, "restart"),
        row(
            "is stopped again and again",
            "import os, signal\nkernel = os.getpid()\nif os.fork() == 0:\n    os.setsid()\n    while True: os.kill(kernel, signal.SIGSTOP)\nwhile True: pass",
        )
        .times_out(1.0, "restart"),
        row(
            "answers interrupts and goes on",
            forging(
                "import signal
async def pretend(stream, ident, parent):
    kernel.session.send(stream, 'interrupt_reply', {'status': 'ok'}, parent, ident=ident)
kernel.control_handlers['interrupt_request'] = pretend
signal.signal(signal.SIGINT, signal.SIG_IGN)
while True: pass",
            ),
        )
        .times_out(1.0, "restart"),
        row(
            "hears nothing after its interrupt",
            "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: get_ipython().kernel.shell_handlers.clear()",
        )
        .times_out(1.0, "interrupt"),
    ]
}

fn what_keeps_the_interpreter() -> Vec<Row> {
    vec![
        row("holds the interpreter's lock in C for ever", "import itertools; 1 in itertools.repeat(0)")
            .times_out(1.0, "restart"),
        row("a regular expression that explodes", "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')")
            .times_out(1.0, "interrupt or restart"),
        row("sleeps in C with the lock held", "import ctypes; ctypes.PyDLL(None).sleep(60)")
            .times_out(1.0, "interrupt or restart"),
        row("a huge power", "x = 7 ** 7 ** 9").times_out(1.0, "interrupt or restart"),
        row("a tracer that sleeps", "import sys, time\ndef trace(*_): time.sleep(60)\nsys.settrace(trace)")
            .times_out(1.0, "interrupt or restart"),
        row("a __repr__ that loops", "class R:\n    def __repr__(self):\n        while True: pass\nR()")
            .times_out(1.0, "interrupt or restart"),
        row(
            "an exception whose text loops",
            "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        )
        .times_out(1.0, "interrupt or restart"),
        row("shell code that waits", "!sleep 60").times_out(1.0, "interrupt or restart"),
    ]
}

fn processes() -> Vec<Row> {
    vec![
        row("forks until it can't", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
            .memory(512)
            .limit(2.0)
            .ends("timeout or kernel_died")
            .hits(json!(["pids"])),
        row("forks until it can't, and lets itself be interrupted", "import os, time\ntry:\n    while True:\n        try: os.fork()\n        except OSError: time.sleep(60)\nexcept KeyboardInterrupt: pass")
            .memory(512)
            .limit(2.0)
            .ends("timeout or kernel_died")
            .hits(json!(["pids"])),
        row(
            "a fork bomb in the shell",
            "import subprocess, time; subprocess.Popen('bomb() { bomb | bomb & }; bomb', shell=True, stdin=-3, stdout=-3, stderr=-3); time.sleep(1)",
        )
        .memory(512)
        .hits(json!(["pids"])),
        row(
            "ten thousand threads",
            "import threading\nlock = threading.Lock(); lock.acquire()\nfor _ in range(10_000): threading.Thread(target=lock.acquire, daemon=True).start()",
        )
        .raises("RuntimeError")
        .hits(json!(["pids"]))
        .then_restarts(),
        row(
            "processes that spin, and the guest made the last to run",
            "import os
for attempt in (lambda: os.setpriority(os.PRIO_PROCESS, 1, 19), lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))):
    try: attempt()
    except OSError as refused: print(refused)
for _ in range(8):
    if os.fork() == 0:
        while True: pass
while True:
    try:
        for _ in iter(int, 1): pass
    except BaseException: pass",
        )
        .times_out(2.0, "restart"),
        row("asks for real time", "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))").raises("PermissionError"),
        row("asks to be preferred", "import os; os.nice(-5)").raises("PermissionError"),
        row("makes itself the last to run", "import os; os.nice(19)"),
        row("a fork that comes back", "import os; os.fork(); 'both'")
            .is("/results/0/data/text~1plain", json!("'both'"))
            .holds("one result, and the child is listed", |ran| {
                ran["results"].as_array().is_some_and(|r| r.len() == 1)
                    && ran["processes"].as_array().is_some_and(|p| p.len() == 1)
            }),
    ]
}

fn what_outlives_its_cell() -> Vec<Row> {
    let one_is_listed: fn(&Value) -> bool = |ran| {
        let listed = ran["processes"].as_array().cloned().unwrap_or_default();
        listed.len() == 1
            // A shell's child has the shell's name until it is what it was started for.
            && listed[0]["command"].as_str().is_some_and(|command| command.contains("sleep 9871"))
            && listed[0]["pid"].as_u64().is_some_and(|pid| pid > 1)
    };
    vec![
        row("a daemon", "import subprocess; subprocess.Popen(['sleep', '9871'], start_new_session=True); print('on')")
            .holds("the daemon is listed", one_is_listed)
            .then_prints(COUNT_MARKED, "1\n")
            .then_restarts()
            .then_prints(COUNT_MARKED, "0\n"),
        row(
            "a daemon that forgot where it came from",
            "import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: os.execve('/bin/sleep', ['sleep', '9871'], {})
    os._exit(0)
os.wait(); print('on')",
        )
        .holds("the daemon is listed", one_is_listed)
        .then_prints(COUNT_MARKED, "1\n")
        .then_restarts()
        .then_prints(COUNT_MARKED, "0\n"),
        row(
            "a daemon beside a loop that costs its kernel",
            "import subprocess; subprocess.Popen(['sleep', '9871'], start_new_session=True, env={})\nwhile True:\n    try:\n        for _ in iter(int, 1): pass\n    except BaseException: pass",
        )
        .times_out(1.0, "restart")
        .then_prints(COUNT_MARKED, "0\n"),
        row("a child that keeps the output open", "import os; os.system('sleep 9871 &'); print('on')")
            .holds("the child is listed", one_is_listed)
            .is("/stdout", json!("on\n"))
            .then_restarts(),
        row(
            "a hundred short lives",
            "import subprocess\nfor _ in range(100): subprocess.run(['true'])",
        )
        .is("/processes", json!([])),
    ]
}

fn memory() -> Vec<Row> {
    vec![
        row("asks for a terabyte", "bytearray(1 << 40)").raises("MemoryError"),
        row("grows slowly", "x = []\nwhile True: x.append(bytearray(1 << 20))")
            .ends("oom")
            .is("/kernel", json!({"restarted": true, "cause": "oom"}))
            .hits(json!(["memory"])),
        row(
            "has a child that grows",
            "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(400 << 20)']).returncode",
        )
        .is("/results/0/data/text~1plain", json!("-9"))
        .is("/kernel/restarted", json!(false))
        .hits(json!(["memory"])),
        row(
            "has a child that grows and would rather have somebody else go",
            "import subprocess, sys
subprocess.run([sys.executable, '-c', '''
for score in range(-1000, 1001, 50):
    try: open(\"/proc/self/oom_score_adj\", \"w\").write(str(score)); break
    except OSError: pass
x = bytearray(400 << 20)
'''])",
        )
        .ends("ok or oom")
        .hits(json!(["memory"])),
        row(
            "takes away its own memory",
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20)); bytearray(8 << 20)",
        )
        .limit(3.0)
        .ends("error or kernel_died or timeout")
        .spoils_its_kernel(),
    ]
}

/// Code that fills a folder to its last byte.
const FILL: &str = "import os
def fill(folder):
    full = 0
    for number in range(1000):
        try:
            with open(f'{folder}/{number}', 'wb', buffering=0) as file:
                while file.write(bytes(1 << 16 if full < 3 else 4096)): pass
        except OSError as error:
            full += 1
            if full > 6: return error
";

fn folders() -> Vec<Row> {
    let full = |name, folder: &str| {
        row(name, format!("{FILL}raise fill('{folder}')"))
            .raises("OSError")
            .says("/error/value", "No space left")
            .hits(json!(["disk"]))
    };
    vec![
        full("fills its working folder", "/workspace"),
        full("fills the folder for temporary files", "/tmp"),
        full("fills the shared memory", "/dev/shm"),
        row("fills all three", format!("{FILL}for folder in ('/workspace', '/tmp', '/dev/shm'): fill(folder)"))
            .hits(json!(["disk"]))
            .then_restarts()
            .then_prints("import os; print(os.getcwd())", "/workspace\n"),
        row("makes files until there is no room for a name", "for n in range(100_000): open(str(n), 'w').close()")
            .raises("OSError")
            .says("/error/value", "No space left")
            .hits(json!(["disk"]))
            .holds("the list of files is bounded and what is left out is counted", |ran| {
                let listed = ran["files"].as_array().map_or(0, Vec::len) as u64;
                let omitted = ran["files_omitted"].as_u64().unwrap_or(0);
                (1..=1000).contains(&listed) && listed + omitted > 4000
            })
            .then_restarts(),
        row(
            "makes temporary files until there is no room for a name",
            "import os\nfor n in range(100_000): os.mkdir(f'/tmp/{n}')",
        )
        .raises("OSError")
        .hits(json!(["disk"]))
        .then_restarts(),
    ]
}

fn files() -> Vec<Row> {
    let listed = |name, code: &str| row(name, code).limit(10.0);
    vec![
        row("a file of a terabyte", "open('big', 'wb').truncate(1 << 40)").raises("OSError").says("/error/value", "too large"),
        row("opens files until it can't", "kept = [open('/dev/null') for _ in range(5000)]")
            .raises("OSError")
            .says("/error/value", "Too many open files"),
        row("gives up all files that it may still open", "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))")
            .ends("ok or kernel_died"),
        listed("a pipe and links out of its folder", "import os; os.mkfifo('pipe'); os.symlink('/dev/zero', 'zero'); os.symlink('.', 'self'); os.symlink('/proc', 'proc')"),
        listed("names that are no text", "open(b'\\xff\\n<b>\"', 'wb').close(); open('\\u202e' + 'x' * 80, 'w').close()")
            .holds("what has no name that can be told is counted", |ran| {
                ran["files"].as_array().is_some_and(|f| f.len() == 1) && ran["files_omitted"] == 1
            }),
        listed("folders a thousand deep", "import os\nfor _ in range(1000): os.mkdir('d'); os.chdir('d')\nopen('deep', 'w').close()")
            .then_restarts(),
        listed(
            "a file that always changes",
            "import subprocess; subprocess.Popen('while :; do head -c 1000000 /dev/urandom > grows; done', shell=True); import time; time.sleep(.5)",
        )
        .holds("its writer is listed", |ran| ran["processes"].as_array().is_some_and(|p| !p.is_empty())),
        listed("a file that nobody may read", "import os; open('closed', 'w').write('x'); os.chmod('closed', 0); os.mkdir('dark'); os.chmod('dark', 0)"),
    ]
}

/// Text that fills what is kept of a head was cut, and then that is said.
fn nothing_is_lost_silently(ran: &Value) -> bool {
    let kept = ran["stdout"].as_str().map_or(0, str::len) as u64;
    let (output, cut) = (&ran["output"]["stdout"], ran["limits_hit"] == json!(["output"]));
    output["truncated"] == cut && (output["bytes"] == kept) != cut && (cut || kept != 768 << 10)
}

fn text() -> Vec<Row> {
    let output = || json!(["output"]);
    vec![
        row("prints for ever", "while True: print('x' * 100)")
            .times_out(2.0, "interrupt or restart")
            .one_of("/limits_hit", r#"[] or ["output"]"#)
            .holds("what is left out is counted", nothing_is_lost_silently),
        row(
            "prints a lot, and its kernel dies",
            // What it has handed over and not sent dies with it: it stays until most is sent.
            "import os, sys, time\nfor n in range(20_000): print('x' * 100)\nsys.stdout.flush(); time.sleep(1); os._exit(3)",
        )
        .exits(3)
        .hits(output())
        .holds("what is left out is counted", nothing_is_lost_silently),
        row("prints 300 MB", "for n in range(300): print('x' * 999_999)")
            .hits(output())
            .is("/output/stdout", json!({"bytes": 300_000_000, "truncated": true})),
        row("prints a line of 100 MB", "print('x' * 99_999_999)")
            .memory(1536)
            .hits(output())
            .is("/output/stdout", json!({"bytes": 100_000_000, "truncated": true})),
        row("prints lines of 100 kB for ever", "import sys\nwhile True: print('x' * 99_999, file=sys.stderr)")
            .times_out(3.0, "interrupt or restart")
            .hits(output()),
        row("has a shell that prints for ever", "!yes zzzzzzzz").times_out(3.0, "interrupt or restart").hits(output()),
        row("prints 300 MB at once", "print('x' * 299_999_999)")
            .memory(2048)
            .hits(output())
            .is("/output/stdout", json!({"bytes": 300_000_000, "truncated": true})),
        row("half a character", "print('\\udc80')").holds("a mark stands for it", |ran| {
            let stdout = ran["stdout"].as_str().unwrap_or_default();
            stdout.ends_with('\n') && (2..8).contains(&stdout.len())
        }),
        row("a progress bar that never rests", "for n in range(5000): print(f'\\r{n}', end='', flush=True)")
            .one_of("/limits_hit", r#"[] or ["output"]"#)
            .holds("the last word is kept", |ran| ran["stdout"].as_str().is_some_and(|s| s.ends_with("4999"))),
        row(
            "control characters",
            "print('\\x1b[2J\\x00\\x07\\r\\n\\u202e data: x\\n\\nevent: execution.completed\\n\\n')",
        )
        .says("/stdout", "event: execution.completed"),
        row(
            "clears what it shows again and again",
            "from IPython.display import clear_output\nfor _ in range(5000): clear_output()\nprint('end')",
        )
        .one_of("/limits_hit", r#"[] or ["output"]"#),
    ]
}

fn rich_output() -> Vec<Row> {
    let display = |code: &str| format!("from IPython.display import display\n{code}");
    vec![
        row("a hundred thousand displays", display("for n in range(100_000): display({'text/plain': str(n)}, raw=True)"))
            .limit(8.0)
            .ends("ok or timeout")
            .one_of("/limits_hit", r#"[] or ["output"]"#)
            .holds("results are bounded", |ran| ran["results"].as_array().is_some_and(|r| r.len() <= 2000)),
        row("a bundle of 100 MB", display("display({'text/html': 'x' * 100_000_000}, raw=True)"))
            .memory(1536)
            .hits(json!(["output"]))
            .holds("what is left out is counted", |ran| {
                ran["output"]["results_omitted_bytes"].as_u64().is_some_and(|bytes| bytes >= 100_000_000)
            }),
        row("a __repr__ of 100 MB", "class R:\n    def __repr__(self): return 'x' * 100_000_000\nR()")
            .memory(1536)
            .hits(json!(["output"])),
        row("ten thousand types in a bundle", display("display({f'a/b{n}': 'x' for n in range(10_000)}, raw=True)"))
            .one_of("/limits_hit", r#"[] or ["output"]"#)
            .holds("types are bounded", |ran| {
                ran["results"].as_array().is_some_and(|r| r.iter().all(|r| r["data"].as_object().is_some_and(|d| d.len() <= 64)))
            }),
        row(
            "types that are none",
            display("display({'text/plain\\r\\nx-evil: 1': 'x', '../../etc': 'x', 'text/' + 'x' * 100_000: 'x', 'text/plain': 'good'}, raw=True)"),
        )
        .is("/results/0/data", json!({"text/plain": "good"})),
        row(
            "JSON a few thousand deep",
            display("import sys; sys.setrecursionlimit(100_000)\nx = 1\nfor _ in range(3000): x = [x]\ndisplay({'application/json': x, 'text/plain': 'deep'}, raw=True)"),
        )
        .limit(5.0)
        .ends("ok or error"),
        row("numbers that JSON lacks", display("display({'application/json': {'a': float('nan'), 'b': float('inf'), 'c': 10 ** 400}, 'text/plain': 'p'}, raw=True)"))
            .ends("ok or error"),
    ]
}

fn streams() -> Vec<Row> {
    vec![
        row("closes its output", "import sys; sys.stdout.close()"),
        row("has no output", "import sys; sys.stdout = sys.stderr = None").spoils_its_kernel(),
        row("closes the descriptors of its output", "import os; os.close(1); os.close(2)"),
        row("writes past Python", "import os, time; os.write(1, b'raw\\n'); time.sleep(.3)")
            .is("/stdout", json!("raw\n")),
        row("writes what is no text past Python", "import os; os.write(1, bytes(range(256)) * 100)")
            .one_of("/limits_hit", r#"[] or ["output"]"#),
        row("reads without an input", "import sys; sys.stdin.read()").ends("ok or error or input_denied").limit(5.0),
        row("asks for input", "input('name? ')")
            .ends("input_denied")
            .is("/error/name", json!("StdinNotImplementedError")),
        row("asks within a question", "input(input('one? '))").ends("input_denied"),
        row("asks for a password", "import getpass; getpass.getpass()").ends("input_denied"),
        row("asks, and does not care", "try: input()\nexcept Exception as e: print(type(e).__name__)")
            .is("/stdout", json!("StdinNotImplementedError\n")),
    ]
}

fn forged_status() -> Vec<Row> {
    vec![
        row(
            "says that it is idle, and goes on",
            forging("print('before', flush=True)\npublish('status', {'execution_state': 'idle'})\ntime.sleep(.5)\nprint('after', flush=True)"),
        )
        .says("/stdout", "before\n")
        .holds("a forged status does not end it", |ran| ran["duration_ms"].as_u64().is_some_and(|ms| ms >= 450)),
        row(
            "says that it is done, and goes on",
            forging("reply({'status': 'ok', 'execution_count': 1, 'user_expressions': {}, 'payload': []})\npublish('status', {'execution_state': 'idle'})\ntime.sleep(1)\nprint('late', flush=True)"),
        ),
        row(
            "says that it failed, and succeeds",
            forging("reply({'status': 'error', 'ename': 'Forged', 'evalue': 'x', 'traceback': []})\n'fine'"),
        )
        .ends("ok or error"),
        row(
            "replies with nonsense",
            forging("for nonsense in [{}, {'status': ['x']}, {'status': 'ok', 'execution_count': 'many', 'payload': {}, 'user_expressions': []}, {'status': None}]: reply(nonsense)"),
        )
        .ends("ok or error"),
        row("ten thousand replies", forging("for _ in range(10_000): reply({'status': 'ok', 'execution_count': 1})")),
        row("ten thousand times busy and idle", forging("for n in range(10_000): publish('status', {'execution_state': ('busy', 'idle')[n % 2]})\nprint('end')")),
        row("never says that it is idle", "kernel = get_ipython().kernel\nsaid = kernel._publish_status\nkernel._publish_status = lambda status, *a, **k: None if status == 'idle' else said(status, *a, **k)"),
        row("never says anything", "get_ipython().kernel.session.send = lambda *a, **k: None").times_out(1.0, "restart"),
    ]
}

fn forged_content() -> Vec<Row> {
    vec![
        row("asks for input in its kernel's name", forging("kernel.session.send(kernel.stdin_socket, 'input_request', {'prompt': 'key? ', 'password': True}, me, ident=ident)\ntime.sleep(.3)\n'done'"))
            .is("/results/0/data/text~1plain", json!("'done'")),
        row("messages that nobody knows", forging("for kind in ['comm_open', 'x' * 5000, '\\r\\nevent: x', '', 'shutdown_reply']: publish(kind, {'comm_id': 'x'})")),
        row("outputs of the wrong shape", forging("for kind in ['stream', 'display_data', 'execute_result', 'error', 'clear_output', 'update_display_data', 'execute_input', 'status']:\n    for content in [{}, {'name': 7, 'text': []}, {'data': 'x'}, {'data': {'text/plain': {}}, 'metadata': [], 'transient': 3}, {'traceback': 'x' * 100, 'ename': 1}]: publish(kind, content)"))
            .one_of("/limits_hit", r#"[] or ["output"]"#),
        row(
            "content that is no JSON, well signed",
            forging("frames = [kernel.session.pack(kernel.session.msg_header('stream')), kernel.session.pack(me['header']), b'{}', b'\\xff{\"name\": \"stdout\", \"text\"']\nkernel.iopub_socket.send_multipart([b'x', b'<IDS|MSG>', kernel.session.sign(frames)] + frames)\ntime.sleep(.3)"),
        )
        .ends("ok or kernel_died"),
        row(
            "a message with a wrong signature",
            forging("frames = [kernel.session.pack(x) for x in (kernel.session.msg_header('stream'), me['header'], {}, {'name': 'stdout', 'text': 'forged'})]\nkernel.iopub_socket.send_multipart([b'x', b'<IDS|MSG>', b'0' * 64] + frames)\ntime.sleep(.3)"),
        )
        .is("/stdout", json!("")),
        row("parts without end", forging("kernel.iopub_socket.send_multipart([b'x', b'<IDS|MSG>', b''] + [b''] * 5000)\ntime.sleep(.3)"))
            .ends("ok or kernel_died"),
        row("counts to a huge number", "get_ipython().execution_count = 10 ** 400"),
        row("counts backwards", "get_ipython().execution_count = -5"),
    ]
}

fn patched_machinery() -> Vec<Row> {
    const REFUSE: &str = "def refuse(*a, **k): raise RuntimeError('no')\n";
    vec![
        row("json that refuses", format!("import json\n{REFUSE}json.dumps = json.loads = refuse")).limit(2.0).ends("timeout or kernel_died"),
        row("sockets that refuse", format!("import zmq\n{REFUSE}zmq.Socket.send_multipart = zmq.Socket.send = refuse"))
            .limit(2.0)
            .ends("timeout or kernel_died"),
        row("no time any more", format!("import time\n{REFUSE}time.sleep = time.monotonic = time.time = refuse"))
            .limit(2.0)
            .ends("ok or error or timeout or kernel_died")
            .spoils_its_kernel(),
        row("fails after it is done", "def after():\n    get_ipython().events.unregister('post_execute', after)\n    raise RuntimeError('after')\nget_ipython().events.register('post_execute', after)\n7")
            .is("/results/0/data/text~1plain", json!("7")),
        row("a shell that runs nothing any more", "get_ipython().run_cell = lambda *a, **k: None").spoils_its_kernel(),
        row("no builtins", "del __builtins__"),
        row("builtins without content", "import builtins; builtins.__dict__.clear()")
            .limit(2.0)
            .ends("timeout or kernel_died or error")
            .spoils_its_kernel(),
        row("modules without content", "import sys; sys.modules.clear()").ends("ok or error or kernel_died or timeout").limit(2.0).spoils_its_kernel(),
        row("a loop that is closed", "import asyncio; asyncio.get_running_loop().stop()").ends("ok or error or kernel_died or timeout").limit(2.0)
            // The kernel ends a moment later. What it has taken by then may have begun, so it is not run again.
            .spoils_its_kernel(),
    ]
}

fn late_words() -> Vec<Row> {
    const MINE: &str = "import asyncio\nawait asyncio.sleep(.8)\nprint('mine')";
    vec![
        row(
            "a task that speaks after its cell",
            "import asyncio\nasync def late():\n    await asyncio.sleep(.4)\n    print('late', flush=True)\nkept = asyncio.get_running_loop().create_task(late())",
        )
        .then_prints(MINE, "mine\n"),
        row(
            "a thread that speaks after its cell",
            "import threading, time\ndef late():\n    for _ in range(10):\n        time.sleep(.1)\n        print('late', flush=True)\nthreading.Thread(target=late).start()",
        )
        .then_prints(MINE, "mine\n"),
    ]
}

fn exceptions() -> Vec<Row> {
    vec![
        row("a recursion without end", "def f(): f()\nf()").raises("RecursionError"),
        row("a recursion of a million", "import sys; sys.setrecursionlimit(10 ** 6)\nclass R:\n    def __repr__(self): return repr([self])\nrepr(R())")
            .limit(10.0)
            .one_of("/limits_hit", r#"[] or ["memory"]"#)
            .ends("error or kernel_died or oom or timeout"),
        row("a traceback through nine hundred functions", "for n in range(900): exec(f'def f{n}(): return f{n + 1}()')\nf900 = lambda: 1 / 0\nimport sys; sys.setrecursionlimit(5000)\nf0()")
            .raises("ZeroDivisionError")
            .limit(30.0)
            .one_of("/limits_hit", r#"[] or ["output"]"#),
        row("an exception that says 10 MB", "raise ValueError('x' * 10_000_000)")
            .raises("ValueError")
            .one_of("/limits_hit", r#"[] or ["output"]"#)
            .holds("the answer is bounded", |ran| ran["error"].to_string().len() < 4 << 20),
        row("an exception whose text fails", "class E(Exception):\n    def __str__(self): raise ValueError('inner')\nraise E")
            .ends("error")
            .one_of("/error/name", "E or ValueError"),
        row("an exception whose text is another", "class E(Exception):\n    def __str__(self): raise E\nraise E")
            .limit(5.0)
            .ends("error or timeout"),
        row("an exception with a name of its own", "raise type('\\n<b>\\x1b[31m' + 'n' * 100_000, (Exception,), {})('x')")
            .ends("error")
            .one_of("/limits_hit", r#"[] or ["output"]"#),
        row("a group of exceptions", "raise ExceptionGroup('group', [ValueError(n) for n in range(1000)])").raises("ExceptionGroup"),
    ]
}

fn awkward_code() -> Vec<Row> {
    vec![
        row("code with a zero byte", "x = 1\0").ends("error"),
        row("code that reads backwards", "\u{202e}print(1)").ends("error"),
        row("code of a megabyte", format!("x = '{}'\nlen(x)", "y".repeat(1_000_000)))
            .is("/results/0/data/text~1plain", json!("1000000")),
        row("brackets without end", format!("{}{}", "(".repeat(100_000), ")".repeat(100_000)))
            .ends("error or kernel_died"),
        row("a hundred thousand signs", format!("{}1", "-".repeat(100_000)))
            .ends("error or kernel_died or oom")
            .one_of("/limits_hit", r#"[] or ["memory"]"#),
        row("forgets everything", "%reset -f"),
        row("an assertion in its own exit", "import sys; sys.excepthook = sys.displayhook = None; 1")
            .ends("ok or error")
            .spoils_its_kernel(),
    ]
}

/// The folder of the kernel, with its sockets and its connection file.
const FOLDER: &str = "import json, os, shutil
from ipykernel.connect import get_connection_file
folder = os.path.dirname(get_connection_file())
";

fn its_own_folders() -> Vec<Row> {
    let inside = |code: &str| format!("{FOLDER}{code}");
    vec![
        row("removes all it can", "import shutil\nfor folder in ('/workspace', '/tmp', '/dev/shm'): shutil.rmtree(folder, ignore_errors=True)")
            .then_restarts(),
        row("closes its working folder", "import os; os.chmod('/workspace', 0)")
            .then_restarts()
            .then_prints("open('x', 'w').write('x'); print(open('x').read())", "x\n"),
        row("closes the folder for temporary files", "import os; os.chmod('/tmp', 0)").then_restarts(),
        row(
            "puts other things where its sockets are",
            inside("for n, name in enumerate(os.listdir(folder)):\n    path = f'{folder}/{name}'\n    os.unlink(path)\n    os.symlink('/proc/1/mem', path) if n % 2 else os.mkfifo(path)\nos.chmod(folder, 0)"),
        )
        .then_restarts(),
        row(
            "takes the places of the kernels to come",
            inside("stem, number = folder.rsplit('n', 1)\nfor n in range(int(number) + 1, int(number) + 50): os.mkdir(f'{stem}n{n}')"),
        )
        .then_restarts(),
        row(
            "empties the folder of the kernels' folders, and closes it",
            inside("state = os.path.dirname(folder)\nshutil.rmtree(state, ignore_errors=True)\nos.chmod(state, 0)"),
        )
        .then_restarts(),
        row("fills the folder of the kernels' folders", format!("{FILL}{FOLDER}fill(os.path.dirname(folder))"))
            .one_of("/limits_hit", r#"[] or ["disk"]"#)
            .then_restarts(),
        row(
            "leaves Python traps in its folder",
            "for name in ('json', 'os', 'zmq', 'ipykernel', 'sitecustomize', 'usercustomize', 'site'): open(f'{name}.py', 'w').write('import time; time.sleep(9871)')",
        )
        .then_restarts(),
    ]
}

fn the_guest() -> Vec<Row> {
    vec![
        row("kills the first process", "import os; os.kill(1, 9)").raises("PermissionError"),
        row("stops the first process", "import os; os.kill(1, 19)").raises("PermissionError"),
        row(
            "sends the first process every signal",
            "import os\nfor n in range(1, 65):\n    try: os.kill(1, n)\n    except OSError: pass",
        ),
        row("writes on the wire", "open('/proc/1/fd/1', 'wb').write(bytes(1000))").raises("PermissionError"),
        row("takes the first process's files", "import resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (8, 8))")
            .raises("PermissionError"),
        row(
            "traces the first process",
            "import ctypes; libc = ctypes.CDLL(None, use_errno=True); libc.ptrace(16, 1, 0, 0), ctypes.get_errno()",
        )
        .is("/results/0/data/text~1plain", json!("(-1, 1)")),
        row("reads the first process's memory", "open('/proc/1/mem', 'rb').read(1)").raises("PermissionError"),
    ]
}
