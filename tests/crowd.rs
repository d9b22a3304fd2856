//! Many at once: creates that come in the same moment, and sessions that live side by side. The short form runs with all tests; `make soak` runs the
//! long ones.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;
#[path = "support/watch.rs"]
mod watch;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::json;
use server::{Cell, Server, text};
use watch::resident;

/// As small as a session with a Python can be, with all its files full.
const SETTINGS: &str = r#"
[limits]
queued_creates = 300
create_wait = "10m"
[template_defaults.default]
idle = "4h"
[templates.python.default]
memory = "96MiB"
disk = "24MiB"
tmp = "16MiB"
"#;
/// What a caller waits for an answer.
const PATIENCE: Duration = Duration::from_secs(600);
const MIB: u64 = 1 << 20;

/// Creates so many at once, all of which must be answered with a session that is ready; and how long each took.
async fn create(server: &Arc<Server>, count: usize) -> (Vec<Cell>, Vec<Duration>) {
    let began = Instant::now();
    let one = async || {
        let request = server.request(Method::POST, "/v1/sessions").json(&json!({"template": "python"}));
        let created = server.send(request.timeout(PATIENCE)).await;
        assert_eq!(created.status, 201, "{}", created.text);
        let id = text(&created.json["id"]);
        (Cell { server: Arc::clone(server), id, view: created.json }, began.elapsed())
    };
    join_all((0..count).map(|_| one())).await.into_iter().unzip()
}

async fn end(cells: &[Cell]) {
    for some in cells.chunks(8) {
        join_all(some.iter().map(Cell::delete)).await;
    }
}

/// Memory of the machine: all (`MemTotal`), or what can still be had (`MemAvailable`).
fn memory(of: &str) -> u64 {
    let figures = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = figures.lines().find_map(|line| line.strip_prefix(of)?.strip_prefix(':')).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

async fn at_once(count: usize, most_memory: u64) {
    let limits = format!("[limits]\nsessions = {count}\n");
    let (server, pid) = Server::spawn(&SETTINGS.replacen("[limits]\n", &limits, 1)).await;
    let (cells, times) = create(&server, count).await;
    let last = times.iter().max().unwrap();
    let held = resident(Some(pid));
    println!("{count} creates at once: the last is ready after {last:?}; the server holds {} MiB", held / MIB);
    assert!(held < most_memory, "the server holds {} MiB", held / MIB);
    end(&cells).await;
    server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dozen_creates_at_once() {
    at_once(12, 200 * MIB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes a minute and an optimised server; `make soak` runs it"]
async fn a_hundred_creates_at_once() {
    at_once(100, 100 * MIB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes and 24 GiB; `make soak` runs it"]
async fn two_hundred_live_at_once() {
    const COUNT: usize = 200;
    // What all may use is promised within 85 parts in a hundred of what there is.
    let budget = memory("MemTotal") / 100 * 85 / MIB;
    let limits = format!("[limits]\nsessions = {COUNT}\nmemory = \"{budget}MiB\"\n");
    let (server, pid) = Server::spawn(&SETTINGS.replacen("[limits]\n", &limits, 1)).await;
    let before = memory("MemAvailable");
    let (cells, _) = create(&server, COUNT).await;
    for cell in &cells {
        cell.works().await;
    }
    let each = before.saturating_sub(memory("MemAvailable")) / COUNT as u64;
    let held = resident(Some(pid));
    println!(
        "{COUNT} live sessions: {:.1} MiB of the machine each, with shim, guest and kernel; the server holds {} MiB",
        each as f64 / MIB as f64,
        held / MIB
    );
    assert!(each < 96 * MIB, "each takes {} MiB", each / MIB);
    end(&cells).await;
    server.finish().await.unwrap();
}
