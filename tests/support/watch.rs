//! What is watched beside a test: sessions that count, processes of the machine, and what a process of ours holds.
#![allow(dead_code, reason = "each test takes a part of it")]

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock::task;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::server::{Follow, Server, text};

/// A canary that was silent for longer than this has noticed something.
const SILENCE: Duration = Duration::from_secs(3);
/// Longer than any test.
const FOR_EVER: u64 = 3000;

/// A session that counts for as long as everything else goes on, seen through one open stream of events.
pub struct Canary {
    server: Arc<Server>,
    key: String,
    path: String,
    stop: CancellationToken,
    counted: oneshot::Receiver<Result<(), String>>,
}

impl Canary {
    /// Starts one for whoever has the key.
    pub async fn start(server: &Arc<Server>, key: &str) -> Self {
        let created = server.bare(Method::POST, "/v1/sessions").bearer_auth(key).json(&json!({"template": "python"}));
        let created = server.send(created).await;
        assert_eq!(created.status, 201, "{}", created.text);
        let path = format!("/v1/sessions/{}", text(&created.json["id"]));
        let code = "import time\nn = 0\nwhile True:\n    n += 1\n    print(n, flush=True)\n    time.sleep(0.4)";
        let request = server.bare(Method::POST, &format!("{path}/executions")).bearer_auth(key);
        let request = request.header("accept", "text/event-stream").timeout(Duration::from_secs(FOR_EVER));
        let follow = server.events_of(request.json(&json!({"code": code, "timeout_seconds": FOR_EVER}))).await;
        let stop = CancellationToken::new();
        let (counted_in, counted) = oneshot::channel();
        let stopped = stop.clone();
        task::spawn("canary", async move {
            let _ = counted_in.send(count(follow, stopped).await);
        });
        Self { server: Arc::clone(server), key: key.to_owned(), path, stop, counted }
    }

    /// Whether it has counted to now without a gap, and still does.
    pub async fn stop(self) -> Result<(), String> {
        self.stop.cancel();
        self.counted.await.map_err(|_| "its task ended".to_owned())??;
        let look = self.server.bare(Method::GET, &self.path).bearer_auth(&self.key);
        let state = self.server.send(look).await.json["state"].clone();
        if state == "busy" { Ok(()) } else { Err(format!("it does not run any more: {state}")) }
    }
}

async fn count(mut follow: Follow, stop: CancellationToken) -> Result<(), String> {
    let (mut next, mut last, mut rest) = (1_u64, Instant::now(), String::new());
    loop {
        let seen = tokio::select! {
            () = stop.cancelled() => break,
            seen = follow.next() => seen.ok_or("its stream ended")?,
        };
        if seen.kind.starts_with("execution.") && seen.kind != "execution.completed" {
            continue;
        }
        if seen.kind != "stdout" {
            return Err(format!("it was told {}", seen.data));
        }
        let gap = last.elapsed();
        if gap > SILENCE {
            return Err(format!("nothing for {gap:?} after {next}"));
        }
        last = Instant::now();
        rest.push_str(&text(&seen.data["text"]));
        while let Some((line, more)) = rest.split_once('\n') {
            if line != next.to_string() {
                return Err(format!("it was told {line:?} where {next} follows"));
            }
            next += 1;
            rest = more.to_owned();
        }
    }
    if next > 4 { Ok(()) } else { Err(format!("it counted only to {next}")) }
}

/// Bytes of memory that a process holds; this one's without a pid.
pub fn resident(pid: Option<u32>) -> u64 {
    let process = pid.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("a process");
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("its size");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

/// Files that this process has open.
pub fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("a folder").count()
}

/// Command lines of the machine's processes that run as one of these users.
pub fn processes_of(uids: &RangeInclusive<u32>) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").expect("a folder").flatten();
    let command = |entry: std::fs::DirEntry| {
        let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
        let line = status.lines().find_map(|l| l.strip_prefix("Uid:"))?;
        let ours = line.split_whitespace().filter_map(|uid| uid.parse().ok()).any(|uid: u32| uids.contains(&uid));
        ours.then(|| format!("{}: {}", entry.file_name().display(), status.lines().next().unwrap_or_default()))
    };
    entries.filter_map(command).collect()
}

/// Numbers that look random and come again for the same seed (xorshift).
#[derive(Debug, Clone)]
pub struct Chance(u64);

impl Chance {
    /// Those of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below a limit.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from((self.0 >> 16) % limit as u64).expect("a small number")
    }

    /// One of several.
    pub fn one_of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }

    /// True in so many of a hundred cases.
    pub fn percent(&mut self, often: usize) -> bool {
        self.below(100) < often
    }
}

/// What an answer about a finished execution must say, whatever the code did; sentences about what it does not.
pub fn untruths(ran: &Value) -> Vec<String> {
    let status = ran["status"].as_str().unwrap_or_default();
    let mut broken = Vec::new();
    let mut must = |holds: bool, what: &str| {
        if !holds {
            broken.push(what.to_owned());
        }
    };
    let present = ["detail", "error", "kernel", "stop", "limits_hit", "files", "files_omitted", "processes"];
    let more = ["processes_omitted", "usage", "user_expressions", "payloads", "stdout", "stderr", "output", "results"];
    for field in present.into_iter().chain(more) {
        must(ran.get(field).is_some(), &format!("{field} is absent"));
    }
    let (stop, kernel) = (&ran["stop"], &ran["kernel"]);
    let stopped = ["timeout", "cancelled"].contains(&status);
    must(stopped || stop.is_null(), "stop is told of what was not stopped");
    if let (true, Some(step)) = (stopped, stop["step"].as_str()) {
        must(stop["variables_kept"] == (step == "interrupt"), "only an interrupt keeps variables");
        must(
            stop["took_ms"].is_u64() && stop["also_ended"].is_array(),
            "stop does not say how long it took, or who went too",
        );
        must(step != "restart" || kernel["restarted"] == true, "a restart without a new kernel");
        must(step != "interrupt" || kernel["restarted"] == false, "a new kernel after an interrupt");
    }
    let told = ran["detail"].as_str().is_some_and(|words| words.len() > 10);
    let plain = ["ok", "error"].contains(&status);
    must(
        plain == ran["detail"].is_null() && (plain || told),
        "a detail stands where the status does not say all, and only there",
    );
    must(status != "error" || ran["error"]["name"].is_string(), "an error without its name");
    if ran["error"].is_object() {
        let text = ran["error"]["traceback_text"].as_str();
        must(text.is_some_and(|text| !text.contains('\u{1b}')), "the traceback has no plain form");
    }
    match status {
        "oom" => {
            must(kernel["restarted"] == true && kernel["cause"] == "oom", "oom without its kernel's end");
            must(ran["limits_hit"].as_array().is_some_and(|l| l.contains(&json!("memory"))), "oom without the limit");
        }
        "kernel_died" => must(kernel["restarted"] == true && kernel["cause"].is_string(), "a death without its cause"),
        _ => {}
    }
    broken
}

/// What an answer says, for messages to people: without ids and times, and with long texts and lists cut.
pub fn shortened(value: &Value) -> Value {
    const LEFT_OUT: [&str; 6] = ["context_id", "created_at", "id", "session_id", "language", "traceback"];
    match value {
        Value::String(text) if text.len() > 400 => {
            let (head, tail) = (text.chars().take(200), text.chars().rev().take(100));
            let tail: Vec<char> = tail.collect();
            let (head, tail): (String, String) = (head.collect(), tail.into_iter().rev().collect());
            json!(format!("{head} [… of {} bytes …] {tail}", text.len()))
        }
        Value::Array(items) => {
            let more = (items.len() > 5).then(|| json!(format!("… {} in all", items.len())));
            items.iter().take(5).map(shortened).chain(more).collect()
        }
        Value::Object(fields) => {
            let said = fields.iter().filter(|(name, _)| !LEFT_OUT.contains(&name.as_str())).take(40);
            said.map(|(name, value)| (name.clone(), shortened(value))).collect()
        }
        other => other.clone(),
    }
}
