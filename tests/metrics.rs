//! What the admin listener tells, with real containers: that Prometheus can read it, that work moves it, that it names nobody, and that the dashboard and the
//! alerts ask for nothing else.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use server::Server;

const SETTINGS: &str = r#"
default_template = "small"
[limits]
cpu = 8.0
memory = "4GiB"
[templates.small]
image = "cellblock/python:latest"
[templates.small.default]
memory = "160MiB"
disk = "16MiB"
tmp = "16MiB"
[templates.small.output]
text = "4KiB"
[templates.small.pool]
min = 1
max = 1
"#;

/// Every label that a figure may have. None of them is an id or a tenant.
const LABELS: [&str; 15] = [
    "action",
    "le",
    "method",
    "operation",
    "outcome",
    "output",
    "phase",
    "reason",
    "result",
    "route",
    "source",
    "state",
    "status",
    "template",
    "version",
];

/// What was scraped, as Prometheus's own library reads it.
#[derive(Debug, Deserialize)]
struct Scrape {
    types: BTreeMap<String, String>,
    samples: Vec<(String, BTreeMap<String, String>, Value)>,
    mistakes: Vec<String>,
}

impl Scrape {
    fn read(text: &str) -> Self {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = here.join("target/metrics/bin/python");
        assert!(python.exists(), "{} is not there; `make test-kernel` makes it", python.display());
        let mut reader = Command::new(python);
        reader.arg(here.join("tests/support/exposition.py")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut reader = reader.spawn().unwrap();
        reader.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = reader.wait_with_output().unwrap();
        assert!(output.status.success(), "Prometheus can't read this:\n{text}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The sum of all figures of that name that have these labels.
    fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let fits = |found: &BTreeMap<String, String>| {
            labels.iter().all(|(label, value)| found.get(*label).is_some_and(|found| found == value))
        };
        let of_name: Vec<_> = self.samples.iter().filter(|(n, l, _)| n == name && fits(l)).collect();
        assert!(!of_name.is_empty(), "there is no {name} with {labels:?}");
        of_name.iter().map(|(_, _, value)| value.as_f64().unwrap()).sum()
    }

    /// Whether a query that names this finds something.
    fn has(&self, queried: &str) -> bool {
        let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|part| queried.strip_suffix(part));
        let is_histogram = |name: &str| self.types.get(name).is_some_and(|kind| kind == "histogram");
        match of_histogram {
            Some(name) => is_histogram(name),
            None => self.types.contains_key(queried) && !is_histogram(queried),
        }
    }
}

fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).unwrap()
}

async fn scrape(server: &Server, admin: SocketAddr) -> String {
    let response = server.bare_at(Method::GET, &format!("http://{admin}/metrics")).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    response.text().await.unwrap()
}

async fn pool_is_full(server: &Server) {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let pools = server.get("/v1/pools").await.json["pools"].clone();
        if pools[0]["ready"] == 1 && pools[0]["starting"] == 0 {
            return;
        }
        assert!(Instant::now() < end, "{pools}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_moves_what_prometheus_reads() {
    let admin = free_address();
    let server = Server::start(&format!("server.admin_listen = \"{admin}\"\n{SETTINGS}")).await;
    pool_is_full(&server).await;
    let before = Scrape::read(&scrape(&server, admin).await);
    nothing_was_done(&before);

    let ids = work(&server).await;
    pool_is_full(&server).await;
    let text = scrape(&server, admin).await;
    let after = Scrape::read(&text);
    assert_eq!(after.mistakes, Vec::<String>::new());
    work_was_counted(&after);
    nobody_is_named(&server, &text, &after, &ids);
    what_operators_are_given_asks_for_what_is_there(&after);
    admin_listener_answers_its_own_only(&server, admin).await;
    server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_are_named_where_an_operator_wants_it() {
    let admin = free_address();
    let wanted = "[metrics]\ntenant_label = true";
    let server = Server::start(&format!("server.admin_listen = \"{admin}\"\n{SETTINGS}\n{wanted}\n")).await;
    let cell = server.create(json!({})).await;
    cell.run("n = sum(range(10**6))").await;
    let of = [("tenant", "default")];
    // An execution is counted for its tenant at its end, beside its answer.
    let end = Instant::now() + Duration::from_secs(60);
    let text = loop {
        let text = scrape(&server, admin).await;
        if text.contains("cellblock_tenant_cpu_seconds_total{") {
            break text;
        }
        assert!(Instant::now() < end, "{text}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let seen = Scrape::read(&text);
    assert_eq!(seen.mistakes, Vec::<String>::new());
    assert_eq!(seen.sum("cellblock_tenant_sessions", &of), 1.0);
    assert_eq!(seen.sum("cellblock_tenant_sessions", &[]), 1.0, "what is nobody's yet is not counted");
    assert_eq!(seen.sum("cellblock_tenant_executions_total", &[of[0], ("status", "ok")]), 1.0);
    assert!(seen.sum("cellblock_tenant_cpu_seconds_total", &of) > 0.0);
    cell.delete().await;
    server.finish().await.unwrap();
}

/// Two sessions, one from the pool and one not; executions that end in three ways; and requests that are refused.
async fn work(server: &Arc<Server>) -> Vec<String> {
    let warm = server.create(json!({})).await;
    let cold = server.create(json!({"resources": {"memory_mb": 192}})).await;
    assert_eq!((&warm.view["source"], &cold.view["source"]), (&json!("warm"), &json!("cold")));
    let mut ids = vec![warm.id.clone(), cold.id.clone(), server::text(&warm.view["default_context"])];
    for (code, status) in [("1 + 1", "ok"), ("1 / 0", "error"), ("print('x' * 100_000)", "ok")] {
        let execution = warm.run(code).await;
        assert_eq!(execution["status"], status);
        ids.push(server::text(&execution["id"]));
    }
    server.get(&format!("/v1/sessions/{}x", warm.id)).await.problem(404, "not-found");
    server.send(server.bare(Method::GET, "/no/such/path/at/all")).await.problem(404, "not-found");
    warm.delete().await;
    cold.delete().await;
    ids
}

fn nothing_was_done(scrape: &Scrape) {
    assert_eq!(scrape.mistakes, Vec::<String>::new());
    assert_eq!(scrape.sum("cellblock_executions_total", &[]), 0.0);
    assert_eq!(scrape.sum("cellblock_session_ends_total", &[]), 0.0);
    assert_eq!(scrape.sum("cellblock_session_starts_total", &[("source", "pool"), ("outcome", "ok")]), 1.0);
    assert_eq!(scrape.sum("cellblock_session_starts_total", &[]), 1.0);
    assert_eq!(scrape.sum("cellblock_sessions", &[("phase", "ready")]), 1.0);
    assert_eq!(scrape.sum("cellblock_pool_sessions", &[("template", "small"), ("state", "ready")]), 1.0);
    assert_eq!(scrape.sum("cellblock_promised_memory_bytes", &[]), f64::from(160 << 20));
    assert_eq!(scrape.sum("cellblock_ceiling_memory_bytes", &[]), 4.0 * f64::from(1 << 30));
    assert_eq!((scrape.sum("cellblock_promised_cpus", &[]), scrape.sum("cellblock_ceiling_cpus", &[])), (1.0, 8.0));
}

fn work_was_counted(scrape: &Scrape) {
    let sum = |name: &str, labels: &[(&str, &str)]| scrape.sum(&format!("cellblock_{name}"), labels);
    assert_eq!(sum("session_starts_total", &[("source", "warm"), ("outcome", "ok")]), 1.0);
    assert_eq!(sum("session_starts_total", &[("source", "cold"), ("outcome", "ok")]), 1.0);
    assert_eq!(sum("session_starts_total", &[("outcome", "failed")]), 0.0);
    assert_eq!(sum("session_start_duration_seconds_count", &[("source", "cold")]), 1.0);
    assert!(sum("session_start_duration_seconds_sum", &[("source", "cold")]) > 0.05, "a container in no time");
    assert_eq!(sum("session_ends_total", &[("reason", "deleted")]), 2.0);
    assert_eq!(sum("executions_total", &[("status", "ok")]), 2.0);
    assert_eq!(sum("executions_total", &[("status", "error")]), 1.0);
    assert_eq!(sum("executions_total", &[]), 3.0);
    assert_eq!(sum("execution_duration_seconds_count", &[]), 3.0);
    assert_eq!(sum("execution_queue_wait_duration_seconds_count", &[]), 3.0);
    assert_eq!(sum("create_queue_wait_duration_seconds_count", &[]), 1.0);
    assert_eq!(sum("output_truncations_total", &[("output", "stdout")]), 1.0);
    assert_eq!((sum("pool_hits_total", &[]), sum("pool_misses_total", &[])), (1.0, 0.0));
    assert!(sum("engine_calls_total", &[("operation", "ensure"), ("result", "ok")]) >= 3.0);
    assert!(sum("engine_calls_total", &[("operation", "remove"), ("result", "ok")]) >= 2.0);
    assert!(sum("engine_call_duration_seconds_count", &[("operation", "attest")]) >= 3.0);
    assert!(sum("link_received_bytes_total", &[]) > 4096.0 && sum("link_sent_bytes_total", &[]) > 100.0);
    assert!(sum("reconcile_rounds_total", &[("result", "ok")]) >= 1.0);
    assert!(sum("database_commits_total", &[("result", "ok")]) >= 2.0);
    assert_eq!(sum("unfinished_executions", &[]), 0.0);
    assert_eq!(sum("busy_sessions", &[]), 0.0);
    let requests =
        |route, method, status| sum("http_requests_total", &[("route", route), ("method", method), ("status", status)]);
    assert_eq!(requests("/v1/sessions", "POST", "2xx"), 2.0);
    assert_eq!(requests("/v1/sessions/{id}/executions", "POST", "2xx"), 3.0);
    assert_eq!(requests("/v1/sessions/{id}", "DELETE", "2xx"), 2.0);
    assert_eq!(requests("/v1/sessions/{id}", "GET", "4xx"), 1.0);
    assert_eq!(requests("none", "GET", "4xx"), 1.0);
    assert_eq!(sum("build_info", &[("version", env!("CARGO_PKG_VERSION"))]), 1.0);
}

fn nobody_is_named(server: &Server, text: &str, scrape: &Scrape, ids: &[String]) {
    for id in ids.iter().chain([&server.key, &server.instance]) {
        assert!(!text.contains(id.as_str()), "{id} stands in the metrics");
    }
    let labels: BTreeSet<&str> =
        scrape.samples.iter().flat_map(|(_, labels, _)| labels.keys()).map(String::as_str).collect();
    let unknown: Vec<_> = labels.iter().filter(|label| !LABELS.contains(label)).collect();
    assert!(unknown.is_empty(), "labels that nobody has thought about: {unknown:?}");
    let mut values = scrape.samples.iter().flat_map(|(_, labels, _)| labels.values());
    // The tenant of the first key is called that.
    assert!(values.all(|value| value != "default"), "a tenant is a label");
}

fn what_operators_are_given_asks_for_what_is_there(scrape: &Scrape) {
    for (file, least) in [("deploy/grafana/cellblock.json", 25), ("deploy/prometheus/alerts.yml", 12)] {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
        let words = text.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'));
        let names: BTreeSet<&str> = words.filter(|word| word.starts_with("cellblock_")).collect();
        assert!(names.len() >= least, "{file} names {names:?} only");
        let missing: Vec<_> = names.iter().filter(|name| !scrape.has(name)).collect();
        assert!(missing.is_empty(), "{file} asks for what the server does not tell: {missing:?}");
    }
    let dashboard = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/grafana/cellblock.json")).unwrap();
    let dashboard: Value = serde_json::from_slice(&dashboard).unwrap();
    let shown = dashboard["panels"].to_string();
    let unseen: Vec<_> = scrape.types.keys().filter(|name| !shown.contains(name.as_str())).collect();
    assert!(unseen.is_empty(), "the dashboard does not show {unseen:?}");
}

async fn admin_listener_answers_its_own_only(server: &Server, admin: SocketAddr) {
    let status = async |path: &str| {
        let request = server.bare_at(Method::GET, &format!("http://{admin}{path}")).bearer_auth(&server.key);
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!((status("/livez").await, status("/readyz").await), (200, 200));
    assert_eq!((status("/v1/sessions").await, status("/docs").await), (404, 404));
    server.get("/metrics").await.problem(404, "not-found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_tells_what_it_uses_and_is_not_resumed_for_it() {
    let server = Server::start_with_tenants(&SETTINGS.replace("min = 1\nmax = 1", "")).await;
    let cell = server.create(json!({})).await;
    let path = cell.path("/metrics");
    let before = server.get(&path).await;
    assert_eq!(before.status, 200, "{}", before.text);
    let of = |view: &Value, name: &str| view[name].as_f64().unwrap_or_else(|| panic!("{name} in {view}"));
    let limits =
        ["memory_limit_bytes", "cpu_limit", "pids_limit", "disk_limit_bytes"].map(|name| of(&before.json, name));
    assert_eq!(limits, [f64::from(160 << 20), 1.0, 128.0, f64::from(16 << 20)]);
    assert!((1.0..128.0).contains(&of(&before.json, "pids")));
    assert!((8e6..160e6).contains(&of(&before.json, "memory_bytes")));

    cell.run("open('four', 'wb').write(b'x' * (4 << 20)); held = b'y' * (32 << 20); n = sum(range(10**6))").await;
    let after = server.get(&path).await.json;
    assert!(of(&after, "memory_bytes") - of(&before.json, "memory_bytes") > 30e6);
    assert!(of(&after, "memory_peak_bytes") >= of(&after, "memory_bytes"));
    assert!(of(&after, "cpu_seconds") > of(&before.json, "cpu_seconds"));
    assert_eq!(of(&after, "disk_bytes") - of(&before.json, "disk_bytes"), f64::from(4 << 20));

    let request =
        server.request(Method::GET, &format!("{path}?interval_seconds=1")).header("accept", "text/event-stream");
    let mut follow = server.events_of(request).await;
    for _ in 0..2 {
        let seen = follow.next().await.expect("an event");
        assert_eq!((seen.kind.as_str(), &seen.data["pids_limit"]), ("metrics", &json!(128)));
    }
    assert_eq!(server.post(&cell.path("/pause"), &Value::Null).await.status, 200);
    follow.rest().await;
    server.get(&path).await.problem(409, "state-conflict");
    assert_eq!(cell.look().await["state"], "paused");
    server.send(server.foreign(Method::GET, &path)).await.problem(404, "not-found");
    server.get(&format!("{path}?interval_seconds=0")).await.problem(400, "invalid-request");
    cell.delete().await;
    server.get(&path).await.problem(410, "session-ended");
    server.finish().await.unwrap();
}
