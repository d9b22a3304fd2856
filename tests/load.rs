//! Five tenants that all want more than they may have, 200 requests a second in all: each gets the same, nobody gets anything but an answer or a 429, and the
//! server's memory stays as it is. The short form runs with all tests; `make soak` runs the long one.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;
#[path = "support/watch.rs"]
mod watch;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cellblock::task;
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::json;
use server::{Server, text};
use tokio_util::task::TaskTracker;
use watch::{Chance, resident};

const SETTINGS: &str = r#"
[limits]
sessions = 30
concurrent_starts = 2
create_wait = "5m"
# What records hold is no leak.
session_retention = "2s"
[executions]
retention_count = 100
notebook_retention = "2s"
[classes.default]
sessions = 2
executions = 2
storage = "1GiB"
cpu_seconds_a_day = 100000
requests_per_second = 30.0
request_burst = 30
[tenants.default]
requests_per_second = 0.0
[template_defaults.default]
idle = "4h"
[templates.python.default]
memory = "96MiB"
disk = "24MiB"
tmp = "16MiB"
"#;
const TENANTS: usize = 5;
/// Requests a second, all tenants together: each asks for a third more than it may have.
const RATE: u64 = 200;
/// The server may hold so much more in the last quarter than in the first, on average: its allocator keeps some of what it had.
const GROWTH: u64 = 24 << 20;
/// Fairness (Jain's index: 1 where all get the same, 1/5 where one gets all) of what tenants were given.
const FAIR: f64 = 0.98;

/// What a caller asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Ask {
    List,
    Look,
    Usage,
    Execute,
    Create,
    Delete,
}

/// In a hundred requests.
const MIX: [(Ask, usize); 6] =
    [(Ask::List, 40), (Ask::Look, 25), (Ask::Usage, 21), (Ask::Execute, 10), (Ask::Create, 3), (Ask::Delete, 1)];

struct Tenant {
    server: Arc<Server>,
    key: String,
    /// Its sessions; whoever uses one holds it as well.
    sessions: Mutex<Vec<Arc<str>>>,
    /// What was answered, how often.
    answers: Mutex<BTreeMap<(Ask, u16), usize>>,
    wrong: Mutex<Vec<String>>,
    waits: Mutex<Vec<Duration>>,
}

impl Tenant {
    async fn new(server: &Arc<Server>, name: String) -> Arc<Self> {
        let made = server.post("/v1/keys", &json!({"name": name, "tenant": name, "scopes": ["sessions"]})).await;
        assert_eq!(made.status, 201, "{}", made.text);
        Arc::new(Self {
            server: Arc::clone(server),
            key: text(&made.json["key"]),
            sessions: Mutex::default(),
            answers: Mutex::default(),
            wrong: Mutex::default(),
            waits: Mutex::default(),
        })
    }

    /// One of its sessions; to end it, one that nobody uses, which is not its own any more.
    fn session(&self, ask: Ask, chance: &mut Chance) -> Option<Arc<str>> {
        let mut sessions = self.sessions.lock().unwrap();
        if ask == Ask::Delete {
            let free = sessions.iter().position(|session| Arc::strong_count(session) == 1)?;
            return Some(sessions.swap_remove(free));
        }
        (!sessions.is_empty()).then(|| Arc::clone(chance.one_of(&sessions)))
    }

    async fn ask(self: Arc<Self>, wish: Ask, session: Option<Arc<str>>) {
        // Who has no session looks for one.
        let (ask, id) = match (&session, wish) {
            (None, Ask::Look | Ask::Execute | Ask::Delete) => (Ask::List, ""),
            (Some(id), _) => (wish, &**id),
            (None, _) => (wish, ""),
        };
        let of = format!("/v1/sessions/{id}");
        let (method, path, body) = match ask {
            Ask::List => (Method::GET, "/v1/sessions".to_owned(), None),
            Ask::Look => (Method::GET, of, None),
            Ask::Usage => (Method::GET, "/v1/usage".to_owned(), None),
            Ask::Execute => (Method::POST, format!("{of}/executions"), Some(json!({"code": "1 + 1"}))),
            Ask::Create => (Method::POST, "/v1/sessions".to_owned(), Some(json!({"template": "python"}))),
            Ask::Delete => (Method::DELETE, of, None),
        };
        let request = self.server.bare(method, &path).bearer_auth(&self.key);
        let began = Instant::now();
        let reply = self.server.send(if let Some(body) = body { request.json(&body) } else { request }).await;
        if matches!(ask, Ask::List | Ask::Look | Ask::Usage) {
            self.waits.lock().unwrap().push(began.elapsed());
        }
        *self.answers.lock().unwrap().entry((ask, reply.status)).or_default() += 1;
        match (ask, reply.status) {
            (Ask::Create, 201) => self.sessions.lock().unwrap().push(text(&reply.json["id"]).into()),
            // It was refused before anything was done, so it is there still.
            (Ask::Delete, 429) => self.sessions.lock().unwrap().extend(session),
            (_, 200..300) => {}
            (_, 429) if !reply.header("retry-after").is_empty() => {}
            _ => self.wrong.lock().unwrap().push(format!("{ask:?}: {} {}", reply.status, reply.text)),
        }
    }

    fn given(&self, which: impl Fn(Ask) -> bool) -> usize {
        let answers = self.answers.lock().unwrap();
        answers.iter().filter(|((ask, status), _)| which(*ask) && *status < 300).map(|(_, count)| count).sum()
    }
}

/// Jain's index of fairness.
fn fairness(shares: &[usize]) -> f64 {
    let (sum, squares) = shares.iter().fold((0.0, 0.0), |(sum, squares), share| {
        let share = *share as f64;
        (sum + share, squares + share * share)
    });
    sum * sum / (shares.len() as f64 * squares)
}

fn mean(values: &[u64]) -> u64 {
    values.iter().sum::<u64>() / values.len() as u64
}

async fn load(seconds: u64) {
    let (server, pid) = Server::spawn(SETTINGS).await;
    let tenants = join_all((0..TENANTS).map(|n| Tenant::new(&server, format!("tenant-{n}")))).await;
    // Each begins with a session, so that memory is measured between like and like.
    join_all(tenants.iter().map(|tenant| Arc::clone(tenant).ask(Ask::Create, None))).await;
    let asked = TaskTracker::new();
    let mut chances: Vec<Chance> = (0..TENANTS).map(|n| Chance::new(n as u64 + 1)).collect();
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / RATE as u32);
    let mut memory = Vec::new();
    let began = Instant::now();
    for n in 0..seconds * RATE {
        ticks.tick().await;
        let who = n as usize % TENANTS;
        let (tenant, chance) = (&tenants[who], &mut chances[who]);
        let mut left = chance.below(100);
        let pick = |(_, share): &&(Ask, usize)| {
            let is_it = left < *share;
            left = left.saturating_sub(*share);
            is_it
        };
        let (ask, _) = MIX.iter().find(pick).unwrap();
        let session = tenant.session(*ask, chance);
        task::spawn("request", asked.track_future(Arc::clone(tenant).ask(*ask, session)));
        if n % (RATE / 4) == 0 {
            memory.push(resident(Some(pid)));
        }
    }
    let took = began.elapsed();
    asked.close();
    asked.wait().await;

    let shares = |which: fn(Ask) -> bool| tenants.iter().map(|tenant| tenant.given(which)).collect::<Vec<_>>();
    let (all, created) = (shares(|_| true), shares(|ask| ask == Ask::Create));
    let executed = shares(|ask| ask == Ask::Execute);
    let quarter = memory.len() / 4;
    let (first, last) = (mean(&memory[..quarter]), mean(&memory[memory.len() - quarter..]));
    let mut waits: Vec<_> = tenants.iter().flat_map(|tenant| tenant.waits.lock().unwrap().clone()).collect();
    waits.sort();
    let mut answers = BTreeMap::new();
    for tenant in &tenants {
        for (kind, count) in tenant.answers.lock().unwrap().iter() {
            *answers.entry(*kind).or_insert(0) += count;
        }
    }
    println!(
        "{:.0} requests a second for {seconds} s; given to each: {all:?}, fairness {:.4}; executions {executed:?}, {:.4}; sessions {created:?}, {:.4}",
        (seconds * RATE) as f64 / took.as_secs_f64(),
        fairness(&all),
        fairness(&executed),
        fairness(&created),
    );
    println!("answers: {answers:?}");
    println!(
        "what reads took: median {:?}, 99 in a hundred {:?}, at most {:?}; the server held {} KiB in the first quarter, {} KiB in the last",
        waits[waits.len() / 2],
        waits[waits.len() / 100 * 99],
        waits[waits.len() - 1],
        first / 1024,
        last / 1024
    );
    let wrong: Vec<_> = tenants.iter().flat_map(|tenant| tenant.wrong.lock().unwrap().clone()).collect();
    assert!(
        wrong.is_empty(),
        "{} answers are neither 2xx nor 429:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(10)].join("\n")
    );
    assert!(answers.keys().any(|(_, status)| *status == 429), "the control: the quotas were on");
    assert!(created.iter().chain(&executed).all(|count| *count > 0), "{created:?} {executed:?}");
    assert!(fairness(&all) > FAIR, "{all:?}");
    assert!(last < first + GROWTH, "the server's memory grew by {} MiB", (last - first) >> 20);
    server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_seconds_of_greed() {
    load(10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes two minutes; `make soak` runs it"]
async fn two_minutes_of_greed() {
    load(120).await;
}
