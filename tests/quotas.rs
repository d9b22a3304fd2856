//! How much a tenant may have and do: what is above is refused with the words and fields that clients wait by, and others do not notice.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use server::{NEVER, Reply, Server, text};

const SETTINGS: &str = r#"
[limits]
# So that creates wait for one another, and are counted meanwhile.
concurrent_starts = 1
[templates.ahead]
image = "cellblock/python:latest"
[templates.ahead.pool]
min = 1
max = 1
[tenants.pooled]
sessions = 1
[classes.small]
sessions = 2
[tenants.sessions]
class = "small"
[tenants.cpus]
cpu = 1.5
[tenants.executions]
executions = 1
[tenants.time]
cpu_seconds_a_day = 1
[tenants.storage]
storage = "64KiB"
[tenants.requests]
requests_per_second = 0.01
request_burst = 3
"#;

/// A tenant with its key.
#[derive(Clone)]
struct Tenant {
    server: Arc<Server>,
    key: String,
}

impl Tenant {
    async fn new(server: &Arc<Server>, name: &str) -> Self {
        let made = server.post("/v1/keys", &json!({"name": name, "tenant": name, "scopes": ["sessions"]})).await;
        assert_eq!(made.status, 201, "{}", made.text);
        Self { server: Arc::clone(server), key: text(&made.json["key"]) }
    }

    async fn ask(&self, method: Method, path: &str, body: Value) -> Reply {
        let request = self.server.bare(method, path).bearer_auth(&self.key);
        self.server.send(if body.is_null() { request } else { request.json(&body) }).await
    }

    async fn create(&self, body: Value) -> Reply {
        self.ask(Method::POST, "/v1/sessions", body).await
    }

    async fn session(&self) -> String {
        let made = self.create(json!({"template": "python"})).await;
        assert_eq!(made.status, 201, "{}", made.text);
        text(&made.json["id"])
    }

    async fn execute(&self, session: &str, body: Value) -> Reply {
        self.ask(Method::POST, &format!("/v1/sessions/{session}/executions"), body).await
    }

    /// What it uses, once that is what is waited for: an execution is counted just after its end.
    async fn usage(&self, is_so: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let usage = self.ask(Method::GET, "/v1/usage", Value::Null).await;
            assert_eq!(usage.status, 200, "{}", usage.text);
            if is_so(&usage.json) {
                return usage.json;
            }
            assert!(began.elapsed() < NEVER, "{}", usage.text);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quotas() {
    let server = Server::start(SETTINGS).await;
    let cases = cases![server;
        live_sessions_are_counted_also_while_they_start,
        what_was_made_ahead_is_counted_once_it_is_claimed,
        what_is_promised_is_counted,
        executions_are_counted_until_they_end,
        what_is_stored_is_counted_until_it_is_deleted,
        requests_come_at_a_rate,
    ];
    server.run_and_finish(2, cases).await;
}

async fn live_sessions_are_counted_also_while_they_start(server: Arc<Server>) {
    let tenant = Tenant::new(&server, "sessions").await;
    let made = join_all((0..6).map(|_| tenant.create(json!({"template": "python"})))).await;
    let (made, refused): (Vec<_>, Vec<_>) = made.into_iter().partition(|reply| reply.status == 201);
    assert_eq!((made.len(), refused.len()), (2, 4), "as many as may be, and no more");
    for reply in &refused {
        let told = reply.problem(429, "quota-exceeded");
        assert!(text(&told["detail"]).contains("sessions, 2"), "{told}");
        assert_eq!(reply.header("ratelimit-policy"), "\"sessions\";q=2");
        assert_eq!(reply.header("ratelimit"), format!("\"sessions\";r=0;t={}", reply.header("retry-after")));
    }
    let usage = tenant.usage(|_| true).await;
    assert_eq!(usage["sessions"], json!({"limit": 2, "used": 2}));
    assert_eq!(usage["memory_mb"], json!({"limit": null, "used": 1024}));
    // One that is there is found again, and one that has ended is not counted.
    let named = json!({"template": "python", "name": "mine", "if_exists": "reuse"});
    tenant.create(named.clone()).await.problem(429, "quota-exceeded");
    let path = format!("/v1/sessions/{}", text(&made[0].json["id"]));
    assert_eq!(tenant.ask(Method::DELETE, &path, Value::Null).await.status, 200);
    assert_eq!(tenant.create(named.clone()).await.status, 201);
    assert_eq!(tenant.create(named).await.status, 200, "it needs no other place");
    let run = tenant.ask(Method::POST, "/v1/runs", json!({"template": "python", "code": "1"})).await;
    run.problem(429, "quota-exceeded");
    server.cell().await.delete().await;
}

async fn what_was_made_ahead_is_counted_once_it_is_claimed(server: Arc<Server>) {
    let tenant = Tenant::new(&server, "pooled").await;
    let is_ready = async || {
        let began = Instant::now();
        while server.get("/v1/pools").await.json["pools"][0]["ready"] != 1 {
            assert!(began.elapsed() < NEVER, "the pool is not filled");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    is_ready().await;
    assert_eq!(tenant.usage(|_| true).await["sessions"], json!({"limit": 1, "used": 0}));
    let made = tenant.create(json!({"template": "ahead"})).await;
    assert_eq!((made.status, &made.json["source"]), (201, &json!("warm")), "{}", made.text);
    is_ready().await;
    tenant.create(json!({"template": "ahead"})).await.problem(429, "quota-exceeded");
    assert_eq!(tenant.usage(|_| true).await["sessions"], json!({"limit": 1, "used": 1}));
    assert_eq!(server.get("/v1/pools").await.json["pools"][0]["ready"], 1, "who may not have it takes none");
}

async fn what_is_promised_is_counted(server: Arc<Server>) {
    let tenant = Tenant::new(&server, "cpus").await;
    let of = |cpu: f64| json!({"template": "python", "resources": {"cpu": cpu}});
    let alone = tenant.create(of(2.0)).await;
    alone.problem(422, "spec-rejected");
    assert_eq!(alone.pointers(), ["/resources/cpu"], "{}", alone.text);
    assert_eq!(tenant.create(of(1.0)).await.status, 201);
    tenant.create(of(1.0)).await.problem(429, "quota-exceeded");
    assert_eq!(tenant.create(of(0.5)).await.status, 201);
    assert_eq!(tenant.usage(|_| true).await["cpu"], json!({"limit": 1.5, "used": 1.5}));
}

async fn executions_are_counted_until_they_end(server: Arc<Server>) {
    let tenant = Tenant::new(&server, "executions").await;
    let (one, two) = (tenant.session().await, tenant.session().await);
    let runs = tenant.execute(&one, json!({"code": "import time; time.sleep(600)", "background": true})).await;
    assert_eq!(runs.status, 202, "{}", runs.text);
    let refused = tenant.execute(&two, json!({"code": "1"})).await;
    refused.problem(429, "quota-exceeded");
    assert_eq!(refused.header("ratelimit-policy"), "\"executions\";q=1");
    let cancel = format!("/v1/executions/{}/cancel", text(&runs.json["id"]));
    assert_eq!(tenant.ask(Method::POST, &cancel, Value::Null).await.status, 200);
    tenant.usage(|usage| usage["executions"]["used"] == 0).await;
    assert_eq!(tenant.execute(&two, json!({"code": "1"})).await.status, 200);
}

async fn what_is_stored_is_counted_until_it_is_deleted(server: Arc<Server>) {
    let tenant = Tenant::new(&server, "storage").await;
    let (one, two) = (tenant.session().await, tenant.session().await);
    assert_eq!(tenant.execute(&one, json!({"code": "print('x' * 100_000)"})).await.status, 200);
    let usage = tenant.usage(|usage| usage["stored_bytes"]["used"].as_u64() > Some(100_000)).await;
    assert_eq!(usage["stored_bytes"]["limit"], 64 * 1024);
    let refused = tenant.execute(&two, json!({"code": "1"})).await;
    refused.problem(429, "quota-exceeded");
    assert_eq!(refused.header("ratelimit-policy"), "\"storage\";q=65536");
    let notebook = format!("/v1/sessions/{one}/notebook");
    assert_eq!(tenant.ask(Method::DELETE, &notebook, Value::Null).await.status, 204);
    tenant.usage(|usage| usage["stored_bytes"]["used"].as_u64() < Some(64 * 1024)).await;
    assert_eq!(tenant.execute(&two, json!({"code": "1"})).await.status, 200);
}

async fn requests_come_at_a_rate(server: Arc<Server>) {
    let tenant = Tenant::new(&server, "requests").await;
    for left in [2, 1, 0] {
        let reply = tenant.ask(Method::GET, "/v1/usage", Value::Null).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        assert_eq!(reply.json["requests"], json!({"per_second": 0.01, "burst": 3}));
        assert_eq!(reply.header("ratelimit-policy"), "\"requests\";q=3;w=300");
        let told = reply.header("ratelimit");
        assert!(told.starts_with(&format!("\"requests\";r={left};t=")), "{told}");
    }
    let refused = tenant.ask(Method::GET, "/v1/sessions", Value::Null).await;
    refused.problem(429, "rate-limited");
    let seconds: u64 = refused.header("retry-after").parse().unwrap();
    assert!((1..=100).contains(&seconds), "{seconds}");
    assert_eq!(refused.header("ratelimit"), format!("\"requests\";r=0;t={seconds}"));
    let other = server.get("/v1/sessions").await;
    assert_eq!((other.status, other.header("ratelimit")), (200, ""), "others are not held to it");
    tenant.ask(Method::POST, "/v1/sessions", json!({})).await.problem(429, "rate-limited");
    let told = server.get("/v1/audit?tenant=requests").await.json["events"].clone();
    let first = &told[0];
    assert_eq!((&first["action"], &first["outcome"]), (&json!("create_session"), &json!("rate-limited")), "{told}");
    assert!(text(&first["key"]).starts_with("key"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cpu_time_of_a_day_is_used_up_and_a_restart_gives_nothing_back() {
    let server = Server::start(SETTINGS).await;
    let tenant = Tenant::new(&server, "time").await;
    let session = tenant.session().await;
    let burn = "import time\nwhile time.process_time() < 2.5: pass";
    let ran = tenant.execute(&session, json!({"code": burn})).await;
    assert_eq!((ran.status, &ran.json["status"]), (200, &json!("ok")), "what runs goes on: {}", ran.text);
    let is_used_up = |usage: &Value| usage["cpu_seconds_today"]["used"].as_f64().is_some_and(|used| used >= 1.0);
    let usage = tenant.usage(is_used_up).await;
    assert_eq!(usage["cpu_seconds_today"]["limit"], 1);
    let told = ran.json["usage"]["cpu_ms"].as_f64().unwrap() / 1000.0;
    let used = usage["cpu_seconds_today"]["used"].as_f64().unwrap();
    assert!((told - used).abs() < 0.01, "{told} {used}");
    let refused = async |tenant: &Tenant, reply: Reply| {
        reply.problem(429, "quota-exceeded");
        let seconds: i64 = reply.header("retry-after").parse().unwrap();
        assert!((1..=24 * 3600).contains(&seconds), "{seconds}");
        assert_eq!(reply.header("ratelimit-policy"), "\"cpu_seconds_a_day\";q=1");
        let path = format!("/v1/sessions?label={}", "a:b");
        assert_eq!(tenant.ask(Method::GET, &path, Value::Null).await.status, 200, "the rest goes on");
    };
    refused(&tenant, tenant.execute(&session, json!({"code": "1"})).await).await;
    let next = server.start_again(|_| {}).await;
    let tenant = Tenant { server: Arc::clone(&next), ..tenant };
    let run = json!({"template": "python", "code": "1"});
    refused(&tenant, tenant.ask(Method::POST, "/v1/runs", run).await).await;
    next.finish().await.unwrap_or_else(|left| panic!("{left}"));
}
