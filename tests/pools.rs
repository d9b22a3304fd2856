//! Sessions that are made before anybody asks for them, with real containers.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use server::{Cell, Server, text};

const SETTINGS: &str = r#"
default_template = "small"
[limits]
sessions = 6
[templates.small]
image = "cellblock/python:latest"
setup = "import json\nprepared = ['template']"
env = { OWN = "template" }
[templates.small.default]
memory = "160MiB"
disk = "16MiB"
tmp = "16MiB"
[templates.small.pool]
min = 2
max = 4
[templates.bare]
image = "cellblock/python:latest"
[templates.bare.default]
memory = "160MiB"
disk = "16MiB"
tmp = "16MiB"
"#;

/// The pool of the template, once it is as it should be.
async fn pool_when(server: &Arc<Server>, is_so: impl Fn(&Value) -> bool) -> Value {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let pools = server.get("/v1/pools").await.json["pools"].clone();
        assert_eq!(pools.as_array().unwrap().len(), 1, "{pools}");
        if is_so(&pools[0]) {
            return pools[0].clone();
        }
        assert!(Instant::now() < end, "{pools}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn full(server: &Arc<Server>) -> Value {
    pool_when(server, |pool| pool["ready"] == pool["target"] && pool["starting"] == 0).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claimed_session_is_what_a_cold_one_would_be() {
    let server = Server::start_with_tenants(SETTINGS).await;
    let pool = full(&server).await;
    assert_eq!((&pool["template"], &pool["ready"], &pool["hits"]), (&json!("small"), &json!(2), &json!(0)));
    assert_eq!(server.get("/v1/sessions").await.json["sessions"], json!([]), "they are nobody's");

    let before = jiff::Timestamp::now();
    let request = json!({"name": "chat", "labels": {"run": "1"}, "env": {"GREETING": "hej \"'\\ é\n", "OWN": "caller"},
        "setup": "prepared.append('caller')", "timeouts": {"idle_seconds": 500}});
    let cell = server.create(request).await;
    let view = cell.look().await;
    assert_eq!((&view["source"], &view["state"], &view["name"]), (&json!("warm"), &json!("ready"), &json!("chat")));
    assert_eq!((&view["labels"]["run"], &view["timeouts"]["idle_seconds"]), (&json!("1"), &json!(500.0)));
    assert!(
        text(&view["created_at"]).parse::<jiff::Timestamp>().unwrap() >= before - jiff::Span::new().milliseconds(1)
    );
    assert_eq!(cell.value("prepared").await, "['template', 'caller']");
    let env = "import os; [os.environ[name] for name in ('GREETING', 'OWN')]";
    assert_eq!(cell.value(env).await, r#"['hej "\'\\ é\n', 'caller']"#);
    assert_eq!(cell.value("sorted(n for n in globals() if not n.startswith('_'))[:4]").await, cell_names());
    let ran = cell.execute(json!({"code": "1 + 1"})).await;
    assert_eq!(ran["execution_count"], 4, "what came before it is not counted");
    let another = server.post(&cell.path("/contexts"), &json!({})).await.json["id"].clone();
    let there = cell.execute(json!({"code": env, "context_id": another})).await;
    assert_eq!(there["results"][0]["data"]["text/plain"], r#"['hej "\'\\ é\n', 'caller']"#, "{there}");

    let notebook = server.get(&cell.path("/notebook")).await.json;
    let sources: Vec<String> = notebook["cells"].as_array().unwrap().iter().map(|c| text(&c["source"])).collect();
    assert_eq!(sources[..2], ["import json\nprepared = ['template']", "prepared.append('caller')"]);
    assert!(!notebook.to_string().contains("environ.update"), "nothing of ours stands in it");

    assert_eq!(server.post(&cell.path("/restart"), &Value::Null).await.status, 200);
    assert_eq!(cell.value(&format!("{env} + prepared")).await, r#"['hej "\'\\ é\n', 'caller', 'template', 'caller']"#);

    // What asks for something else of the engine starts cold.
    let other = server.create(json!({"resources": {"memory_mb": 200}})).await;
    assert_eq!(other.look().await["source"], "cold");
    let bare = server.create(json!({"template": "bare"})).await;
    assert_eq!(bare.look().await["source"], "cold");
    // A setup that fails is the create's error, and costs nothing else.
    full(&server).await;
    server.post("/v1/sessions", &json!({"setup": "1 / 0"})).await.problem(422, "setup-failed");
    server.finish().await.unwrap();
}

/// What a new kernel has by itself, with the names of the setup code.
fn cell_names() -> &'static str {
    "['In', 'Out', 'exit', 'get_ipython']"
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_is_claimed_once_and_broken_ones_are_replaced() {
    let server = Server::start_with_tenants(SETTINGS).await;
    full(&server).await;
    let foreign = async {
        let created = server.send(server.foreign(Method::POST, "/v1/sessions").json(&json!({}))).await;
        assert_eq!(created.status, 201, "{}", created.text);
        created.json
    };
    let own = server.create(json!({}));
    let (foreign, own) = tokio::join!(foreign, own);
    let own = own.look().await;
    assert_eq!((&foreign["source"], &own["source"]), (&json!("warm"), &json!("warm")));
    assert_ne!(foreign["id"], own["id"]);
    let path = format!("/v1/sessions/{}", text(&foreign["id"]));
    server.get(&path).await.problem(404, "not-found");

    full(&server).await;
    let containers = server.containers("").await;
    let claimed = [text(&foreign["id"]), text(&own["id"])];
    let broken = containers.iter().find(|name| !claimed.iter().any(|id| name.contains(id))).unwrap();
    let options = bollard::query_parameters::RemoveContainerOptionsBuilder::default().force(true).v(true).build();
    server.docker.remove_container(broken, Some(options)).await.unwrap();
    pool_when(&server, |pool| pool["ready"] != pool["target"]).await;
    full(&server).await;
    for _ in 0..2 {
        server.create(json!({})).await.works().await;
    }
    server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn demand_fills_a_pool_and_callers_come_before_it() {
    let server = Server::start(SETTINGS).await;
    full(&server).await;
    // More than the pool has, and as many as there may be at all: what waits on the shelf gives its place up.
    let mut made = Vec::new();
    for _ in 0..6 {
        made.push(server.create(json!({})).await);
    }
    let views = futures_util::future::join_all(made.iter().map(Cell::look)).await;
    let warm = views.iter().filter(|view| view["source"] == "warm").count();
    assert!(warm >= 2, "{views:?}");
    let pool = pool_when(&server, |pool| pool["starting"] == 0).await;
    assert_eq!((&pool["target"], &pool["ready"]), (&json!(4), &json!(0)), "there is no place for it");
    assert_eq!(pool["hits"].as_u64().unwrap() + pool["misses"].as_u64().unwrap(), 6);
    for cell in &made {
        cell.delete().await;
    }
    let pool = full(&server).await;
    assert_eq!(pool["ready"], 4, "so many were asked for");
    let containers: BTreeSet<String> = server.containers("").await.into_iter().collect();
    assert_eq!(containers.len(), 4, "{containers:?}");
    // They hold places, and give them up for what they can't be.
    let others: Vec<_> = (0..6).map(|_| server.create(json!({"template": "bare"}))).collect();
    let others = futures_util::future::join_all(others).await;
    assert_eq!(others.len(), 6);
    server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_leaves_nothing_of_its_pool() {
    let (first, pid) = Server::spawn(SETTINGS).await;
    full(&first).await;
    let claimed = first.create(json!({})).await;
    assert_eq!(claimed.value("x = 5; x").await, "5");
    full(&first).await;
    first.kill(pid).await;
    let (second, _) = first.spawn_again().await;
    full(&second).await;
    let claimed = Cell { server: Arc::clone(&second), id: claimed.id.clone(), view: Value::Null };
    assert_eq!(claimed.value("x, prepared").await, "(5, ['template'])");
    assert_eq!(claimed.look().await["source"], "warm");
    assert_eq!(second.containers("").await.len(), 3, "the claimed one, and a pool of its own");
    second.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_holds_what_its_resources_are_asked_for() {
    let other = "other = [{ memory = \"224MiB\", pids = 64, max = 1, min = 1 }]\n[templates.bare]";
    let server = Server::start(&SETTINGS.replace("min = 2", "min = 1").replace("[templates.bare]", other)).await;
    let both_ready = async {
        loop {
            let pools = server.get("/v1/pools").await.json["pools"].clone();
            if pools.as_array().unwrap().iter().all(|pool| pool["ready"] == 1) {
                return pools;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let pools = tokio::time::timeout(Duration::from_secs(60), both_ready).await.unwrap();
    let resources: Vec<_> = pools.as_array().unwrap().iter().map(|p| p["resources"]["memory_mb"].clone()).collect();
    assert_eq!(resources, [160, 224]);
    for (asked, source, memory) in [
        (json!({}), "warm", 160),
        (json!({"memory_mb": 224, "pids": 64}), "warm", 224),
        (json!({"memory_mb": 224}), "cold", 224),
    ] {
        let cell = server.create(json!({"resources": asked})).await;
        let view = &cell.view;
        assert_eq!((&view["source"], &view["resources"]["memory_mb"]), (&json!(source), &json!(memory)), "{view}");
        let seen = "open(next(p for p in ('/sys/fs/cgroup/memory/memory.limit_in_bytes', '/sys/fs/cgroup/memory.max') if os.path.exists(p))).read()";
        let limit = cell.value(&format!("import os\nint({seen}) >> 20")).await;
        assert_eq!(limit, memory.to_string(), "as its container has it");
    }
    server.finish().await.unwrap();
}
