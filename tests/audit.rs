//! Who has asked for what, as the audit and the log of the program tell it, with real containers: everything that changes something, and never the code or a key.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use server::{Server, text};
use sha2::{Digest, Sha256};

/// The log tells as much as it can.
const SETTINGS: &str = r#"
default_template = "small"
[log]
level = "trace"
format = "json"
[templates.small]
image = "cellblock/python:latest"
[templates.small.default]
memory = "192MiB"
disk = "16MiB"
tmp = "16MiB"
"#;
/// Stands in all code, and in nothing else.
const MARK: &str = "n0body_may_read_this";

/// Pages of two, until there are no more.
async fn events(server: &Server, filter: &str) -> Vec<Value> {
    let (mut found, mut cursor) = (Vec::new(), String::new());
    loop {
        let reply = server.get(&format!("/v1/audit?limit=2{filter}{cursor}")).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        let page = reply.json["events"].as_array().unwrap().clone();
        assert!(page.len() <= 2);
        found.extend(page);
        match reply.json["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return found,
        }
    }
}

fn what(events: &[Value]) -> Vec<(&str, &str)> {
    events.iter().map(|event| (event["action"].as_str().unwrap(), event["outcome"].as_str().unwrap())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_that_changes_something_is_told_but_no_code_and_no_key() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("audit.jsonl");
    let (server, _) = Server::spawn(&format!("audit.file = {copy:?}\n{SETTINGS}")).await;
    let code = format!("{MARK} = 6 * 7\n{MARK}");
    let wrong = format!("cb_{}", "0123456789abcdef".repeat(4));

    let cell = server.create(json!({})).await;
    let execution = cell.run(&code).await;
    assert_eq!(execution["status"], "ok");
    cell.execute(json!({"code": format!("raise ValueError('{MARK}')")})).await;
    let request = server.bare(Method::GET, "/v1/sessions").bearer_auth(&wrong);
    server.send(request).await.problem(401, "unauthenticated");
    server.send(server.bare(Method::GET, "/v1/sessions")).await.problem(401, "unauthenticated");
    let left = server.request(Method::POST, &cell.path("/executions")).header("x-request-id", "left");
    let body = json!({"code": format!("import time; time.sleep(1); '{MARK}'")});
    let hung_up = left.json(&body).timeout(Duration::from_millis(300)).send().await;
    assert!(hung_up.unwrap_err().is_timeout());
    let end = Instant::now() + server::NEVER;
    while !events(&server, "&action=create_execution").await.iter().any(|event| event["request_id"] == "left") {
        assert!(Instant::now() < end, "a request whose caller has left is not told");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let long = json!({"code": MARK, "timeout_seconds": 1e9});
    server.post(&cell.path("/executions"), &long).await.problem(422, "spec-rejected");
    let request = server.request(Method::DELETE, "/v1/sessions/ses00000000000000000000000000");
    server.send(request.header("x-request-id", "mine")).await.problem(404, "not-found");
    cell.look().await;
    cell.delete().await;
    let made = server.post("/v1/keys", &json!({"name": "mine", "scopes": ["read"]})).await.json;
    let key_place = format!("/v1/keys/{}", text(&made["id"]));
    assert_eq!(server.delete(&key_place).await.status, 204);

    let all = events(&server, "").await;
    let expected = [
        ("create_session", "ok"),
        ("create_execution", "ok"),
        ("create_execution", "ok"),
        ("refuse_key", "unauthenticated"),
        ("create_execution", "unanswered"),
        ("create_execution", "spec-rejected"),
        ("delete_session", "not-found"),
        ("delete_session", "ok"),
        ("create_key", "ok"),
        ("revoke_key", "ok"),
    ];
    assert_eq!(what(&all), expected);
    let first = &all[1];
    let sha256: String = Sha256::digest(&code).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!((&first["code_sha256"], &first["code_bytes"]), (&json!(sha256), &json!(code.len())));
    assert_eq!((&first["session_id"], &first["execution_id"]), (&json!(cell.id), &execution["id"]));
    assert_eq!(
        (&first["tenant"], &first["address"], &first["status"]),
        (&json!("default"), &json!("127.0.0.1"), &json!(200))
    );
    assert_eq!((&all[3]["tenant"], &all[3]["address"]), (&Value::Null, &json!("127.0.0.1")));
    let place = format!("/v1/sessions/{}", cell.id);
    assert_eq!((&all[0]["target"], &all[7]["target"]), (&json!(place), &json!(place)));
    assert_eq!((&all[4]["request_id"], &all[6]["request_id"]), (&json!("left"), &json!("mine")));
    assert!(text(&all[4]["execution_id"]).starts_with("exe") && all[4]["status"].is_null(), "{}", all[4]);
    assert_eq!((&all[8]["target"], &all[9]["target"]), (&json!(key_place), &json!(key_place)));
    assert!(text(&all[0]["key"]).starts_with("key") && all[3]["key"].is_null(), "{} {}", all[0], all[3]);
    filters_hold(&server, &cell.id, &all).await;

    let log = std::fs::read_to_string(server.data().parent().unwrap().join("log")).unwrap();
    requests_are_logged(&log, &cell.id);
    let copied = std::fs::read_to_string(&copy).unwrap();
    assert_eq!(copied.lines().count(), all.len());
    let numbers = copied.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["number"].as_u64().unwrap());
    assert!(numbers.is_sorted_by(|one, next| one < next));
    let digits = server.key.trim_start_matches("cb_").to_owned();
    for (place, told) in [("the log", log), ("audit.file", copied), ("the audit", json!(all).to_string())] {
        for secret in [MARK, &digits, text(&made["key"]).trim_start_matches("cb_"), wrong.trim_start_matches("cb_")] {
            let line = told.lines().find(|line| line.contains(secret));
            assert_eq!(line, None, "{place} tells what it must not");
        }
    }
    server.finish().await.unwrap();
}

async fn filters_hold(server: &Arc<Server>, session: &str, all: &[Value]) {
    assert_eq!(events(server, &format!("&session={session}")).await.len(), 6);
    assert_eq!(events(server, "&action=create_execution").await.len(), 4);
    assert_eq!(events(server, "&tenant=default").await.len(), 9);
    assert_eq!(events(server, "&tenant=other").await, Vec::<Value>::new());
    let since = text(&all[5]["at"]);
    let later: Vec<_> = all.iter().filter(|event| text(&event["at"]) >= since).cloned().collect();
    assert_eq!(events(server, &format!("&since={since}")).await, later);
    assert_eq!(events(server, &format!("&until={since}")).await.len(), all.len() - later.len());
    for wrong in ["session=x", "since=yesterday", "limit=0", "limit=1001", "cursor=!", "who=me"] {
        server.get(&format!("/v1/audit?{wrong}")).await.problem(400, "invalid-request");
    }
}

/// One line a request, with what an operator looks for.
fn requests_are_logged(log: &str, session: &str) {
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let requests: Vec<_> = lines.iter().filter(|line| line["message"] == "request").collect();
    let of = |route: &str, method: &str| -> Vec<&Value> {
        requests.iter().filter(|l| l["route"] == route && l["method"] == method).copied().collect()
    };
    let ran = of("/v1/sessions/{id}/executions", "POST");
    assert_eq!(ran.len(), 3);
    let first = ran[0];
    assert_eq!(
        (&first["status"], &first["session"], &first["tenant"]),
        (&json!(200), &json!(session), &json!("default"))
    );
    assert_eq!((&first["address"], &first["level"]), (&json!("127.0.0.1"), &json!("INFO")));
    assert!(text(&first["execution"]).starts_with("exe") && text(&first["request_id"]).starts_with("req"));
    assert!(first["elapsed_ms"].as_f64().unwrap() > 0.0);
    assert!(first["bytes_in"].as_u64().unwrap() > 10 && first["bytes_out"].as_u64().unwrap() > 100);
    assert_eq!((&ran[2]["status"], &ran[2]["problem"]), (&json!(422), &json!("spec-rejected")));
    let left: Vec<_> = lines.iter().filter(|line| line["request_id"] == "left").collect();
    assert_eq!((left.len(), left[0].get("status"), &left[0]["session"]), (1, None, &json!(session)));
    let foreign = of("/v1/sessions", "GET")[0];
    assert_eq!((&foreign["status"], foreign.get("tenant")), (&json!(401), None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_tells_more_or_less_while_the_server_runs() {
    let (server, _) = Server::spawn(SETTINGS).await;
    let set = async |level: &str| {
        let request = server.request(Method::PUT, "/v1/admin/log").json(&json!({"level": level}));
        server.send(request).await
    };
    let ask =
        async |id: &str| server.send(server.request(Method::GET, "/v1/templates").header("x-request-id", id)).await;
    assert_eq!(server.get("/v1/admin/log").await.json, json!({"level": "trace"}));
    assert_eq!(set("warn,h2=off").await.json, json!({"level": "warn,h2=off"}));
    ask("unheard").await;
    let refused = set("loud").await;
    refused.problem(422, "spec-rejected");
    assert_eq!(refused.pointers(), ["/level"]);
    assert_eq!(server.get("/v1/admin/log").await.json, json!({"level": "warn,h2=off"}), "a mistake changes nothing");
    assert_eq!(set("info").await.status, 200);
    ask("heard").await;
    let log = std::fs::read_to_string(server.data().parent().unwrap().join("log")).unwrap();
    assert!(log.contains("\"request_id\":\"heard\"") && !log.contains("unheard"), "{log}");
    server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_audit_is_for_operators() {
    let server = Server::start_with_tenants(SETTINGS).await;
    server.get("/v1/audit").await.problem(403, "forbidden");
    server.get("/v1/admin/log").await.problem(403, "forbidden");
    server.send(server.foreign(Method::GET, "/v1/audit")).await.problem(403, "forbidden");
    server.send(server.bare(Method::GET, "/v1/audit")).await.problem(401, "unauthenticated");
    server.finish().await.unwrap();
}
