//! Executions of random kinds, with random limits, cancels and callers that hang up: each ends in time, and every answer belongs to its
//! call. The seed is printed; CELLBLOCK_SEED runs it again.

#[path = "support/server.rs"]
mod server;
#[path = "support/watch.rs"]
mod watch;

use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock::config::Environment;
use reqwest::Method;
use serde_json::{Value, json};
use server::{Cell, Form, Server, text};
use watch::{Chance, open_files, resident, shortened, untruths};

const SETTINGS: &str = r#"
[limits]
session_retention = "2s"
[executions]
interrupt_grace = "1s"
retention_size = "16MiB"
[templates.small]
image = "cellblock/python:latest"
[templates.small.default]
memory = "320MiB"
disk = "16MiB"
tmp = "16MiB"
pids = 96
"#;
/// What is set above, and what a busy machine may add to it: the end of a kernel and the start of the next.
const GRACE: f64 = 1.0;
const SLACK: f64 = 8.0;
/// A kernel that takes the place of one that ended before may still be starting.
const BOOT: f64 = 20.0;
/// A limit that code which ends by itself does not reach.
const ENOUGH: f64 = 30.0;
/// An allocator keeps some of what it had.
const GROWTH: u64 = 96 * 1024 * 1024;
/// Connections that are kept for the next request, and the like.
const MORE_FILES: usize = 24;

/// A kind of cell. `TOKEN` in its code and request is a word that no other execution has.
struct Kind {
    name: &'static str,
    code: &'static str,
    /// How it ends when nobody disturbs it.
    ends: &'static str,
    /// What its answer shows when it has ended so.
    shows: bool,
    request: fn(&str) -> Value,
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

const fn kind(name: &'static str, ends: &'static str, code: &'static str) -> Kind {
    Kind { name, code, ends, shows: true, request: |_| Value::Null }
}

static KINDS: [Kind; 20] = [
    kind("value", "ok", "'TOKEN'"),
    kind("print", "ok", "for n in range(200): print('TOKEN', n)"),
    kind("flood", "ok", "for n in range(3000): print('TOKEN' + 'y' * 500)"),
    kind("error", "error", "def f(): raise ValueError('TOKEN')\nf()"),
    kind("sleep", "ok", "import time; print('TOKEN', flush=True); time.sleep(.3)"),
    kind("await", "ok", "import asyncio\nawait asyncio.sleep(.1)\nprint('TOKEN')"),
    kind("exit", "kernel_died", "import os; print('TOKEN', flush=True); os._exit(3)"),
    kind("kill", "kernel_died", "import os; os.kill(os.getpid(), 9)  # TOKEN"),
    kind("leave", "ok", "print('TOKEN'); exit()"),
    kind("memory", "oom", "x = []  # TOKEN\nwhile True: x.append(bytearray(1 << 20))"),
    kind(
        "daemon",
        "ok",
        "import subprocess; subprocess.Popen(['sleep', '30'], start_new_session=True); print('TOKEN')",
    ),
    kind(
        "display",
        "ok",
        "from IPython.display import display\nfor n in range(5): display({'text/html': 'TOKEN'}, raw=True, display_id='TOKEN', update=n > 0)",
    ),
    Kind {
        request: |token| json!({"stdin": [token, token]}),
        ..kind("input", "ok", "print(input(), input(), 'TOKEN')")
    },
    kind("question", "input_denied", "print('TOKEN', flush=True); input('TOKEN')"),
    Kind {
        request: |token| json!({"user_expressions": {"asked": format!("'{token}'")}}),
        ..kind("expression", "ok", "x = 1  # TOKEN")
    },
    Kind { shows: false, request: |_| json!({"silent": true}), ..kind("silent", "ok", "y = 'TOKEN'; y") },
    kind(
        "late",
        "ok",
        "import threading\nthreading.Timer(.3, lambda: print('TOKEN late', flush=True)).start(); print('TOKEN')",
    ),
    kind("loop", "timeout", "while True: pass  # TOKEN"),
    kind(
        "stubborn",
        "timeout",
        "print('TOKEN', flush=True)\nwhile True:\n    try:\n        for _ in iter(int, 1): pass\n    except BaseException: pass",
    ),
    kind("stop", "timeout", "import os; os.kill(os.getpid(), 19)  # TOKEN"),
];

/// How a caller listens, and for how long.
#[derive(Debug, Clone, Copy)]
enum Way {
    Answer,
    Events(Form),
    Background,
    /// Cancelled after this many milliseconds.
    Cancelled(u64),
    /// The caller hangs up after this many milliseconds.
    HungUp {
        after: u64,
        interrupt: bool,
    },
}

/// An execution before it is asked for.
#[derive(Debug)]
struct Plan {
    kind: &'static Kind,
    token: String,
    limit: f64,
    restart: bool,
    second_context: bool,
    way: Way,
}

impl Plan {
    fn random(chance: &mut Chance, token: String) -> Self {
        let kind = chance.one_of(&KINDS);
        let short = kind.ends == "timeout" || chance.percent(15);
        let limit = if short { 0.1 + chance.below(9) as f64 / 10.0 } else { ENOUGH };
        let after = [0, 0, 5, 50, 300, 800][chance.below(6)];
        let way = match chance.below(8) {
            0 | 1 => Way::Answer,
            2 => Way::Events(Form::Sse),
            3 => Way::Events(Form::Lines),
            4 => Way::Background,
            5 => Way::Cancelled(after),
            6 => Way::HungUp { after, interrupt: true },
            _ => Way::HungUp { after, interrupt: false },
        };
        Self { kind, token, limit, restart: chance.percent(20), second_context: chance.percent(35), way }
    }

    fn plain(kind: &'static Kind, token: String) -> Self {
        let limit = if kind.ends == "timeout" { 0.5 } else { ENOUGH };
        Self { kind, token, limit, restart: false, second_context: false, way: Way::Answer }
    }

    fn request(&self, contexts: &[String; 2]) -> Value {
        let mut request = (self.kind.request)(&self.token);
        request["code"] = json!(self.kind.code.replace("TOKEN", &self.token));
        request["timeout_seconds"] = json!(self.limit);
        request["context_id"] = json!(contexts[usize::from(self.second_context)]);
        if self.restart {
            request["on_timeout"] = json!("restart");
        }
        request
    }

    /// Runs it and answers with its final record, and with what was wrong on the way.
    async fn run(&self, cell: &Cell, contexts: &[String; 2]) -> (Value, Option<String>) {
        let mut wrong = None;
        let ran = self.run_as_planned(cell, contexts, &mut wrong).await;
        (ran, wrong)
    }

    async fn run_as_planned(&self, cell: &Cell, contexts: &[String; 2], wrong: &mut Option<String>) -> Value {
        let mut request = self.request(contexts);
        match self.way {
            Way::Answer => cell.execute(request).await,
            Way::Events(form) => {
                let events = cell.stream(request, form).await.rest().await;
                let last = events.last().unwrap_or_else(|| panic!("no events: {self:?}"));
                assert_eq!(last.kind, "execution.completed", "{self:?}");
                assert!(events.iter().map(|e| e.seq).eq(1..=events.len() as u64), "{self:?}: numbers have a gap");
                let foreign = events.iter().find(|e| !self.is_own(&e.data.to_string()));
                *wrong = foreign.map(|event| format!("an event carries another's words: {}", shortened(&event.data)));
                last.data["execution"].clone()
            }
            Way::Background | Way::Cancelled(_) => {
                request["background"] = json!(true);
                let reply = cell.server.post(&cell.path("/executions"), &request).await;
                assert_eq!(reply.status, 202, "{self:?}: {}", reply.text);
                let id = text(&reply.json["id"]);
                if let Way::Cancelled(after) = self.way {
                    tokio::time::sleep(Duration::from_millis(after)).await;
                    let reply = cell.server.post(&format!("/v1/executions/{id}/cancel"), &Value::Null).await;
                    assert_eq!(reply.status, 200, "{self:?}: {}", reply.text);
                }
                cell.server.ended(&id).await
            }
            Way::HungUp { after, interrupt } => {
                request["on_disconnect"] = json!(if interrupt { "interrupt" } else { "continue" });
                let mut stream = cell.stream(request, Form::Sse).await;
                let first = stream.next().await.unwrap_or_else(|| panic!("no events: {self:?}"));
                tokio::time::sleep(Duration::from_millis(after)).await;
                drop(stream);
                cell.server.ended(&text(&first.data["execution_id"])).await
            }
        }
    }

    /// Whether every token in a text is this execution's. One may be cut where output was left out.
    fn is_own(&self, text: &str) -> bool {
        let token = |at: usize| {
            let rest = &text[at..];
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '-').unwrap_or(rest.len());
            &rest[..end]
        };
        let own = |found: &str| found.starts_with(&self.token) || self.token.starts_with(found);
        text.match_indices("tok-").all(|(at, _)| own(token(at)))
    }

    /// What is not as it must be.
    fn broken(&self, ran: &Value) -> Vec<String> {
        let mut broken = untruths(ran);
        let mut must = |holds: bool, what: String| {
            if !holds {
                broken.push(what);
            }
        };
        let status = ran["status"].as_str().unwrap_or_default();
        // What shares its container may be ended with it, and says so then.
        let swept = ran["kernel"]["cause"] == "swept" && ["kernel_died", "cancelled", "timeout"].contains(&status);
        // Contexts share their container's memory: where another takes it all, either of them may be the one that ends.
        let starved = status == "oom" && ran["usage"]["approximate"] == true;
        let allowed = status == self.kind.ends
            || swept
            || starved
            || self.limit < ENOUGH && status == "timeout"
            || status == "cancelled" && matches!(self.way, Way::Cancelled(_) | Way::HungUp { interrupt: true, .. });
        must(allowed, format!("it ended as {status}"));
        let said = ran.to_string();
        must(self.is_own(&said), "it carries another's words".to_owned());
        let shown = status == self.kind.ends && ["ok", "error", "input_denied"].contains(&status) && self.kind.shows;
        must(!shown || said.contains(&self.token), "it does not carry its own words".to_owned());
        let ran_for = ran["duration_ms"].as_u64().unwrap_or(u64::MAX) as f64 / 1000.0;
        must(ran_for <= self.limit + GRACE + SLACK, format!("it ran for {ran_for} s"));
        broken
    }

    /// The most that it may take of its context's time.
    fn longest(&self) -> f64 {
        self.limit + GRACE + SLACK
    }
}

/// Runs this many executions in a session, a few at once, and answers with what went wrong.
async fn one_session(server: Arc<Server>, seed: u64, number: u64, count: usize) -> Vec<String> {
    let mut chance = Chance::new(seed * 1000 + number);
    let cell = server.create(json!({"template": "small"})).await;
    let contexts = contexts(&cell).await;
    let (mut broken, mut planned) = (Vec::new(), 0);
    while planned < count {
        let plans: Vec<Plan> = (0..(1 + chance.below(5)).min(count - planned))
            .map(|n| Plan::random(&mut chance, format!("tok-{number}-{:05}-", planned + n)))
            .collect();
        planned += plans.len();
        let began = Instant::now();
        let answers = futures_util::future::join_all(plans.iter().map(|plan| plan.run(&cell, &contexts))).await;
        let longest = BOOT + plans.iter().map(Plan::longest).sum::<f64>();
        for (plan, (ran, told)) in plans.iter().zip(answers) {
            let mut wrong: Vec<String> = plan.broken(&ran).into_iter().chain(told).collect();
            let queued = ran["queued_ms"].as_u64().unwrap_or(u64::MAX) as f64 / 1000.0;
            if queued > longest || began.elapsed().as_secs_f64() > longest {
                wrong.push(format!("it waited for {queued} s"));
            }
            if !wrong.is_empty() {
                broken.push(format!("  {plan:?}\n    {}\n    {}", wrong.join("; "), shortened(&ran)));
            }
        }
    }
    broken.extend(is_as_new(&cell, &contexts).await.map(|what| format!("  session {number}: {what}")));
    cell.delete().await;
    broken
}

/// The session's own context and one more.
async fn contexts(cell: &Cell) -> [String; 2] {
    let reply = cell.server.post(&cell.path("/contexts"), &json!({})).await;
    assert_eq!(reply.status, 201, "{}", reply.text);
    [text(&cell.view["default_context"]), text(&reply.json["id"])]
}

/// With nothing to do, nothing waits and nothing is held back.
async fn is_as_new(cell: &Cell, contexts: &[String; 2]) -> Option<String> {
    cell.wait("ready").await;
    for context in contexts {
        // The first one may have to wait for a kernel that takes the place of one that left.
        cell.execute(json!({"code": "1+1", "context_id": context, "timeout_seconds": 20})).await;
        let ran = cell.execute(json!({"code": "1+1", "context_id": context, "timeout_seconds": 20})).await;
        let right = ran["status"] == "ok" && ran["results"][0]["data"]["text/plain"] == "2";
        if !right || ran["queued_ms"].as_u64().is_none_or(|ms| ms > 1000) {
            return Some(format!("1+1 was answered with {}", shortened(&ran)));
        }
    }
    let listed = cell.server.get(&cell.path("/contexts")).await.json;
    let quiet = listed["contexts"].as_array().is_some_and(|l| l.len() == 2 && l.iter().all(|c| c["queued"] == 0));
    (!quiet).then(|| format!("contexts: {listed}"))
}

/// Every kind once, undisturbed: what the random ones are measured against.
async fn every_kind_once(server: &Arc<Server>) -> Vec<String> {
    let cell = server.create(json!({"template": "small"})).await;
    let contexts = contexts(&cell).await;
    let mut broken = Vec::new();
    for (n, kind) in KINDS.iter().enumerate() {
        let plan = Plan::plain(kind, format!("tok-x-{n:05}-"));
        let (ran, told) = plan.run(&cell, &contexts).await;
        let mut wrong: Vec<String> = plan.broken(&ran).into_iter().chain(told).collect();
        wrong.extend((ran["status"] != plan.kind.ends).then(|| "undisturbed, it ended otherwise".to_owned()));
        if !wrong.is_empty() {
            broken.push(format!("  {plan:?}\n    {}\n    {}", wrong.join("; "), shortened(&ran)));
        }
    }
    cell.delete().await;
    broken
}

async fn random_executions(seed: u64, sessions: u64, each: usize) {
    println!("CELLBLOCK_SEED={seed}");
    let server = Server::start(SETTINGS).await;
    let mut broken = every_kind_once(&server).await;
    let (memory, files) = (resident(None), open_files());
    let began = Instant::now();
    let running = (0..sessions).map(|number| one_session(Arc::clone(&server), seed, number, each));
    broken.extend(futures_util::future::join_all(running).await.into_iter().flatten());
    println!("{} executions in {:.1} s", sessions as usize * each, began.elapsed().as_secs_f64());

    // What was kept of the sessions goes with them.
    let settled = Instant::now();
    while settled.elapsed() < Duration::from_secs(30)
        && (resident(None) > memory + GROWTH / 2 || open_files() > files + MORE_FILES)
    {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let (grown, open) = (resident(None).saturating_sub(memory), open_files());
    println!("memory grew by {} MiB, open files {files} -> {open}", grown >> 20);
    if grown > GROWTH || open > files + MORE_FILES {
        broken.push(format!("  left over: {} MiB, open files {files} -> {open}", grown >> 20));
    }
    let listed = server.send(server.request(Method::GET, "/v1/sessions")).await.json;
    let live = listed["sessions"].as_array().map_or(0, |l| l.iter().filter(|s| s["state"] != "ended").count());
    if live > 0 {
        broken.push(format!("  left over: {live} sessions"));
    }
    let finished = server.finish().await;
    assert!(broken.is_empty(), "CELLBLOCK_SEED={seed}: {} went wrong:\n{}", broken.len(), broken.join("\n"));
    finished.unwrap_or_else(|left| panic!("{left}"));
}

fn seed_or(default: u64) -> u64 {
    Environment::capture().get("CELLBLOCK_SEED").and_then(|seed| seed.parse().ok()).unwrap_or(default)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_executions() {
    random_executions(seed_or(20), 5, 24).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes; `make soak` runs it"]
async fn a_thousand_executions() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |t| t.as_secs());
    random_executions(seed_or(now), 10, 100).await;
}
