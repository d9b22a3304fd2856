//! What hostile cells of Python do, as far as it can be said in the other languages: what each does, and how it may end. Runs nothing.

/// A language, and how a cell says in it that its kernel works.
pub struct Language {
    /// The folder of its image.
    pub image: &'static str,
    /// The name of its kernel there.
    pub kernelspec: &'static str,
    /// Prints 42.
    pub works: &'static str,
    /// What its cells do.
    pub deeds: Vec<Deed>,
}

/// A cell.
pub struct Deed {
    /// What it does, for people.
    pub name: &'static str,
    /// Its code.
    pub code: &'static str,
    /// How its execution may end: one word, or several with ` or ` between.
    pub ends: &'static str,
    /// The limit that it must be said to have hit, unless its time was over before.
    pub hits: Option<&'static str>,
    /// It leaves a kernel that can't run anything until it is replaced.
    pub spoils: bool,
}

const fn deed(name: &'static str, code: &'static str, ends: &'static str) -> Deed {
    Deed { name, code, ends, hits: None, spoils: false }
}

impl Deed {
    const fn hits(self, limit: &'static str) -> Self {
        Self { hits: Some(limit), ..self }
    }

    const fn spoils_its_kernel(self) -> Self {
        Self { spoils: true, ..self }
    }
}

/// All of them.
pub fn all() -> [Language; 3] {
    [bash(), r(), deno()]
}

/// Bash's kernel is a Python that drives a Bash: what befalls the Bash does not befall the kernel, which may start another one and say nothing.
fn bash() -> Language {
    let deeds = vec![
        deed("a loop without end", "while :; do :; done", "timeout"),
        deed("ignores interrupts", "trap '' INT TERM HUP; while :; do :; done", "timeout"),
        // What it has started goes on in the background, and a Bash that can't fork says so with whatever it runs.
        deed("a fork bomb", "bomb() { bomb | bomb & }; bomb; sleep 60", "ok or error or timeout or kernel_died")
            .hits("pids")
            .spoils_its_kernel(),
        deed(
            "takes memory",
            "x=$(head -c 3000000000 /dev/zero | tr '\\0' x)",
            "ok or error or oom or timeout or kernel_died",
        )
        .hits("memory"),
        deed("prints without end", "yes 0123456789012345678901234567890123456789", "timeout").hits("output"),
        deed("calls itself without end", "f() { f; }; f", "ok or error or oom or timeout or kernel_died"),
        deed("kills its kernel", "kill -9 $PPID", "kernel_died"),
        deed("kills itself", "kill -9 $$", "ok or error or timeout or kernel_died"),
        deed("stops itself", "kill -STOP $$", "timeout or kernel_died"),
        deed("stops its kernel", "kill -STOP $PPID; sleep 60", "timeout"),
        deed("kills everybody", "kill -9 -1", "ok or error or kernel_died"),
        deed("leaves", "exit 3", "ok or error or kernel_died or timeout"),
        deed("closes its output", "exec 1>&- 2>&-", "ok or error or timeout or kernel_died").spoils_its_kernel(),
        deed("becomes another program", "exec sleep 9871", "ok or timeout or kernel_died").spoils_its_kernel(),
        deed("changes what it is known by", "PS1= PS2= PROMPT_COMMAND=", "ok or timeout or kernel_died")
            .spoils_its_kernel(),
        deed("prints what is no text", "head -c 5000 /dev/urandom; echo", "ok or error or kernel_died or timeout"),
    ];
    Language { image: "bash", kernelspec: "bash", works: "echo 42", deeds }
}

fn r() -> Language {
    let deeds = vec![
        deed("a loop without end", "while (TRUE) {}", "timeout"),
        deed("ignores interrupts", "while (TRUE) tryCatch(repeat {}, interrupt = function(e) NULL)", "timeout"),
        deed("suspends interrupts", "suspendInterrupts(repeat {})", "timeout"),
        deed("forks until it can't", "repeat parallel::mcparallel(Sys.sleep(60))", "error or timeout or kernel_died"),
        deed("takes memory", "all <- list(); repeat all[[length(all) + 1]] <- rep(1, 1e7)", "oom or error or timeout")
            .hits("memory"),
        deed(
            "prints without end",
            "repeat cat('0123456789012345678901234567890123456789\\n')",
            "timeout or oom or kernel_died",
        ),
        deed("calls itself without end", "f <- function() f(); f()", "ok or error"),
        deed("kills its kernel", "tools::pskill(Sys.getpid(), 9)", "kernel_died"),
        deed("stops itself", "tools::pskill(Sys.getpid(), 19)", "timeout"),
        deed("leaves", "quit('no', 3)", "kernel_died or error or ok"),
        deed(
            "closes every connection",
            "closeAllConnections(); for (n in 0:9) try(close(getConnection(n)), silent = TRUE)",
            "ok or error or timeout or kernel_died",
        )
        .spoils_its_kernel(),
        deed("sends its output elsewhere", "sink('/dev/null')", "ok or error").spoils_its_kernel(),
        deed(
            "forgets everything",
            "rm(list = ls(all.names = TRUE, envir = globalenv()), envir = globalenv()); detach('package:stats')",
            "ok or error",
        ),
        deed("prints what is no text", "cat(rawToChar(as.raw(128:255)))", "ok or error or kernel_died or timeout"),
        deed("sleeps past its limit", "Sys.sleep(60)", "timeout"),
    ];
    Language { image: "r", kernelspec: "ir", works: "cat(42)", deeds }
}

/// A loop that never waits lets Deno send nothing, so that its end is told late.
fn deno() -> Language {
    let deeds = vec![
        deed("a loop without end", "while (true) {}", "timeout"),
        deed("ignores interrupts", "Deno.addSignalListener('SIGINT', () => {}); while (true) {}", "timeout"),
        deed("catches all there is", "while (true) { try { while (true) {} } catch {} }", "timeout"),
        deed(
            "starts processes until it can't",
            "while (true) new Deno.Command('sleep', {args: ['60']}).spawn()",
            "error or timeout or kernel_died",
        )
        .hits("pids"),
        deed(
            "takes memory",
            "const all = []; while (true) all.push(new Uint8Array(1 << 24).fill(1))",
            "oom or error or timeout",
        )
        .hits("memory"),
        deed(
            "prints without end",
            "while (true) { console.log('0123456789'.repeat(100)); await new Promise(r => setTimeout(r)); }",
            "timeout",
        )
        .hits("output"),
        deed("calls itself without end", "function f() { f() }; f()", "error"),
        deed("kills its kernel", "Deno.kill(Deno.pid, 'SIGKILL'); while (true) {}", "kernel_died"),
        deed("stops itself", "Deno.kill(Deno.pid, 'SIGSTOP'); while (true) {}", "timeout"),
        deed("leaves", "Deno.exit(3)", "kernel_died or error or ok"),
        deed("closes its output", "Deno.stdout.close(); Deno.stderr.close()", "ok or error or timeout or kernel_died")
            .spoils_its_kernel(),
        deed("has no console any more", "globalThis.console = undefined", "ok or error").spoils_its_kernel(),
        deed("a promise that never comes", "await new Promise(() => {})", "ok or error or timeout or kernel_died"),
        deed("a regular expression that explodes", "/(a+)+$/.test('a'.repeat(40) + 'b')", "timeout"),
    ];
    Language { image: "deno", kernelspec: "deno", works: "console.log(42)", deeds }
}
