//! Many of E2B's own clients at once, as they come: each makes a sandbox, works in it and ends it. The short form runs with all tests; `make soak` runs the long one. With real containers.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/e2b.rs"]
mod e2b;
#[path = "support/server.rs"]
mod server;
#[path = "support/watch.rs"]
mod watch;

use std::io::{BufRead, BufReader};
use std::process::{ChildStdout, Stdio};
use std::time::Instant;

use e2b::client;
use server::{Server, text};
use watch::resident;

/// Sandboxes as small as those of such clients can be, and creates that wait for their turn.
const SETTINGS: &str = r#"
[limits]
sessions = 100
queued_creates = 100
create_wait = "10m"
[templates.e2b.default]
memory = "256MiB"
disk = "24MiB"
tmp = "16MiB"
"#;
const MIB: u64 = 1 << 20;

/// A process in which some clients are.
struct Process {
    child: std::process::Child,
    out: BufReader<ChildStdout>,
    name: String,
}

impl Process {
    fn start(server: &Server, script: &str, (count, first): (usize, usize)) -> Self {
        let mut command = client(server, script, &count.to_string(), &[&first.to_string()]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out, name: format!("{script} from {first}") }
    }

    /// Waits until all its sandboxes are there; an error is what it said instead.
    fn made(mut self) -> Result<Self, String> {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        if line.trim() == "made" { Ok(self) } else { Err(self.ended().unwrap_err()) }
    }

    /// Lets it go on, and waits until it has ended; an error is what it said, if it is not all well.
    fn ended(self) -> Result<(), String> {
        // It stays open to the end, or who writes to it is ended for that. `wait_with_output` closes the input.
        let Self { child, out, name } = self;
        let ran = child.wait_with_output().unwrap();
        drop(out);
        if ran.status.success() { Ok(()) } else { Err(format!("{name}: {}", String::from_utf8_lossy(&ran.stderr))) }
    }
}

/// Does something with each process at the same time; an error is what those said that failed.
async fn each<T: Send + 'static>(
    processes: Vec<Process>,
    act: impl Fn(Process) -> Result<T, String> + Copy + Send + 'static,
) -> Result<Vec<T>, String> {
    let acting = processes.into_iter().map(|process| tokio::task::spawn_blocking(move || act(process)));
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    for acted in futures_util::future::join_all(acting).await {
        match acted.unwrap() {
            Ok(value) => done.push(value),
            Err(said) => failed.push(said),
        }
    }
    if failed.is_empty() { Ok(done) } else { Err(failed.join("\n")) }
}

async fn live(server: &Server) -> usize {
    let sessions = server.get("/v1/sessions?limit=200").await.json["sessions"].as_array().unwrap().clone();
    sessions.iter().filter(|session| text(&session["state"]) != "ended").count()
}

/// How many there are in each of some processes of Python, and in one of JavaScript.
#[derive(Clone, Copy)]
struct Crowd {
    pythons: usize,
    in_each: usize,
    scripts: usize,
}

impl Crowd {
    fn count(self) -> usize {
        self.pythons * self.in_each + self.scripts
    }

    /// Has all work, and counts what is there meanwhile and afterwards; an error is what went wrong.
    async fn work(self, server: &Server) -> Result<(), String> {
        let Self { pythons, in_each, scripts } = self;
        let began = Instant::now();
        let processes = (0..pythons).map(|at| Process::start(server, "crowd.py", (in_each, at * in_each)));
        let processes = processes.chain([Process::start(server, "crowd.mjs", (scripts, pythons * in_each))]);
        let processes = each(processes.collect(), Process::made).await?;
        let (made, there) = (began.elapsed(), live(server).await);
        each(processes, Process::ended).await?;
        let left = live(server).await;
        println!(
            "{} clients at once: all have a sandbox after {made:?}, and have ended after {:?}",
            self.count(),
            began.elapsed()
        );
        if (there, left) == (self.count(), 0) {
            return Ok(());
        }
        Err(format!("there were {there} sandboxes when all were made, and {left} when all had ended"))
    }
}

async fn at_once(crowd: Crowd, most_memory: u64) {
    let (server, pid) = Server::spawn(SETTINGS).await;
    let before = resident(Some(pid));
    let worked = crowd.work(&server).await;
    let (held, containers) = (resident(Some(pid)), server.containers("").await);
    println!("the server holds {} MiB, {} before", held / MIB, before / MIB);
    let finished = server.finish().await;
    worked.unwrap_or_else(|said| panic!("{said}"));
    assert_eq!(containers, Vec::<String>::new(), "each sandbox has gone by its own client's kill");
    finished.unwrap_or_else(|left| panic!("{left}"));
    assert!(held < most_memory, "the server holds {} MiB", held / MIB);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_clients_at_once() {
    at_once(Crowd { pythons: 2, in_each: 3, scripts: 2 }, 200 * MIB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes and 10 GiB; `make soak` runs it"]
async fn sixty_clients_at_once() {
    at_once(Crowd { pythons: 4, in_each: 13, scripts: 8 }, 300 * MIB).await;
}
