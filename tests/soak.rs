//! Sessions one after another, with code that behaves and code that doesn't: afterwards the server holds what it held before. The short form
//! runs with all tests; `make soak` runs the long one, for SOAK_SECONDS.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use server::Server;

/// Callers at once.
const WORKERS: u64 = 4;
/// The process may grow by this much: its allocator keeps some of what it had, and records of executions are kept for a while.
const GROWTH: u64 = 96 * 1024 * 1024;

/// What a cell may do, and how it must end.
const CELLS: [(&str, &str); 10] = [
    ("x = 1", "ok"),
    ("print('a' * 3_000_000)", "ok"),
    ("1/0", "error"),
    ("import os; os._exit(3)", "kernel_died"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    ("while True: pass", "timeout"),
    ("x = bytearray(1 << 30)", "oom"),
    ("import os\nfor i in range(200):\n    open(f'{i}', 'w').write('x' * 1000)", "ok"),
    ("input()", "input_denied"),
    ("import subprocess; subprocess.Popen(['sleep', '1000'])", "ok"),
];

/// Numbers that look random and come again for the same seed (xorshift).
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).unwrap()
    }
}

async fn one_session(server: &Arc<Server>, chance: &mut Chance) {
    let resources = json!({"memory_mb": 160, "disk_mb": 16, "pids": 64});
    let cell = server.create(json!({"template": "small", "resources": resources})).await;
    for _ in 0..=chance.below(4) {
        let (code, expected) = CELLS[chance.below(CELLS.len())];
        let limit = if expected == "timeout" { 0.5 } else { 30.0 };
        let ran = cell.execute(json!({"code": code, "timeout_seconds": limit})).await;
        assert_eq!(ran["status"], expected, "{code}: {ran}");
        cell.works().await;
    }
    cell.delete().await;
}

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

async fn soak(seed: u64, enough: impl Fn(u64) -> bool + Clone) {
    let settings = "[executions]\ninterrupt_grace = \"1s\"\n[templates.small]\nimage = \"cellblock/python:latest\"\n\
        [templates.small.default]\nmemory = \"160MiB\"\ndisk = \"16MiB\"\ntmp = \"16MiB\"\n";
    let server = Server::start(settings).await;
    one_session(&server, &mut Chance(seed | 1)).await;
    let (memory, files) = (resident(), open_files());
    let workers = (0..WORKERS).map(|worker| {
        let (server, enough) = (Arc::clone(&server), enough.clone());
        async move {
            let mut chance = Chance((seed + worker + 1) << 8 | 1);
            let mut sessions = 0;
            while !enough(sessions) {
                one_session(&server, &mut chance).await;
                sessions += 1;
            }
            sessions
        }
    });
    let sessions: u64 = futures_util::future::join_all(workers).await.into_iter().sum();
    let grown = resident().saturating_sub(memory);
    println!(
        "seed {seed}: {sessions} sessions; memory grew by {} KiB, open files {files} -> {}",
        grown / 1024,
        open_files()
    );
    assert!(grown < GROWTH, "the server grew by {} MiB", grown >> 20);
    assert!(open_files() <= files + 16, "open files: {files} -> {}", open_files());
    server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_soak() {
    soak(20, |sessions| sessions >= 3).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes as long as SOAK_SECONDS says; `make soak` runs it"]
#[expect(clippy::disallowed_methods, reason = "a test has no configuration of its own")]
async fn a_long_soak() {
    let seconds = std::env::var("SOAK_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(600);
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let end = Instant::now() + Duration::from_secs(seconds);
    soak(seed, move |_| Instant::now() >= end).await;
}
