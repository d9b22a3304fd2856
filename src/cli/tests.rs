//! The commands against a small server that answers as the API says.
#![expect(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "what holds for the server is not meant for its stand-in"
)]

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, post};
use clap::Parser as _;
use serde_json::{Value, json};

use super::*;
use crate::domain::ids::SessionId;

/// Requests as `METHOD path?query`, with what came in them.
type Seen = Arc<Mutex<Vec<String>>>;

struct Server {
    url: String,
    seen: Seen,
}

fn id(number: u128) -> String {
    SessionId::from_uuid(uuid::Uuid::from_u128(number)).to_string()
}

async fn record(State(seen): State<Seen>, request: Request, next: Next) -> Response {
    if request.headers().get(header::AUTHORIZATION).is_none_or(|key| key != "Bearer cb_1") {
        return problem(401, json!({"title": "A key is missing"}));
    }
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let line = format!("{} {} {}", parts.method, parts.uri, String::from_utf8_lossy(&body));
    seen.lock().unwrap().push(line.trim().to_owned());
    next.run(Request::from_parts(parts, body.into())).await
}

fn problem(status: u16, body: Value) -> Response {
    let head = [(header::CONTENT_TYPE, "application/problem+json")];
    (StatusCode::from_u16(status).unwrap(), head, body.to_string()).into_response()
}

async fn sessions(Query(query): Query<std::collections::HashMap<String, String>>) -> axum::Json<Value> {
    let session =
        |n: u128, name: &str, state: &str| json!({"id": id(n), "name": name, "state": state, "template": "data"});
    axum::Json(match query.get("cursor").map(String::as_str) {
        None => json!({"items": [session(1, "one", "ready"), session(2, "two", "ended")], "next_cursor": "c2"}),
        Some("c2") => json!({"items": [session(3, "three", "busy")], "next_cursor": null}),
        Some(_) => json!({"items": []}),
    })
}

async fn keys() -> axum::Json<Value> {
    let key =
        json!({"id": "key1", "name": "ci", "tenant": "t", "scopes": ["read"], "templates": null, "source": "database"});
    axum::Json(json!({"keys": [key], "next_cursor": null}))
}

async fn execute(body: axum::Json<Value>) -> Response {
    let events = match body["code"].as_str().unwrap_or_default() {
        "slow" => vec![completed("timeout")],
        "cut" => vec![json!({"type": "stdout", "text": "half"})],
        "full" => return problem(429, json!({"title": "The queue is full", "code": "queue-full"})),
        "plot" => vec![
            json!({"type": "result", "data": {"image/png": {"$ref": "/v1/executions/exe1/blobs/3", "bytes": 5}}}),
            completed("ok"),
        ],
        _ => vec![json!({"type": "stdout", "text": "hi\n"}), completed("ok")],
    };
    let lines: String = events.iter().map(|event| format!("{event}\n")).collect();
    ([(header::CONTENT_TYPE, "application/x-ndjson")], lines).into_response()
}

fn completed(status: &str) -> Value {
    json!({"type": "execution.completed", "execution": {"status": status}})
}

/// Tells a caller without a key which doors are open.
async fn doors(headers: axum::http::HeaderMap) -> axum::Json<Value> {
    let is_open = !headers.contains_key(header::AUTHORIZATION);
    axum::Json(if is_open { json!({"doors": {"mcp": true, "jupyter": true, "e2b": false}}) } else { json!({}) })
}

async fn start() -> Server {
    let seen = Seen::default();
    let gone = || async { problem(404, json!({"title": "There is no such session"})) };
    let api = Router::new()
        .route("/v1/sessions", get(sessions).post(|| async { axum::Json(json!({"id": id(9)})) }))
        .route(&format!("/v1/sessions/{}", id(7)), delete(gone))
        .route("/v1/sessions/{id}", delete(|| async { StatusCode::NO_CONTENT }))
        .route("/v1/sessions/{id}/executions", post(execute))
        .route("/v1/sessions/{id}/pause", post(|| async { axum::Json(json!({"state": "paused"})) }))
        .route(&format!("/v1/sessions/{}/resume", id(7)), post(gone))
        .route("/v1/sessions/{id}/resume", post(|| async { axum::Json(json!({"state": "ready"})) }))
        .route("/v1/executions/exe1/blobs/3", get(|| async { "bytes" }))
        .route("/v1/templates", get(|| async { axum::Json(json!({"items": [{"name": "data"}]})) }))
        .route("/v1/keys", get(keys).post(|| async { axum::Json(json!({"id": "key1", "tenant": "t", "key": "cb_9"})) }))
        .route("/v1/keys/{id}", delete(|| async { StatusCode::NO_CONTENT }))
        .route("/v1/keys/gone", delete(gone))
        .route("/readyz", get(|| async { "ready" }))
        .layer(axum::middleware::from_fn_with_state(seen.clone(), record))
        .route("/connect", get(doors));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, api).await });
    Server { url, seen }
}

impl Server {
    async fn run(&self, arguments: &[&str]) -> u8 {
        self.run_with_key("cb_1", arguments).await
    }

    async fn run_with_key(&self, key: &str, arguments: &[&str]) -> u8 {
        let environment: Environment =
            [("CELLBLOCK_URL", self.url.as_str()), ("CELLBLOCK_API_KEY", key), ("CELLBLOCK_CONFIG", "/dev/null")]
                .into_iter()
                .collect();
        let cli = Cli::try_parse_from(["cellblock"].iter().chain(arguments)).unwrap();
        perform(&cli, &environment).await.unwrap()
    }

    fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

#[tokio::test]
async fn lists_follow_their_cursors() {
    let server = start().await;
    assert_eq!(server.run(&["ps", "--label", "run=4 2"]).await, OK);
    let query = "GET /v1/sessions?label=run%3A4+2";
    assert_eq!(server.seen(), [query.to_owned(), format!("{query}&cursor=c2")]);
}

#[tokio::test]
async fn exec_makes_a_session_runs_and_ends_it() {
    let server = start().await;
    let line = ["exec", "--new", "--rm", "--template", "python", "--timeout", "5s", "-c", "x"];
    assert_eq!(server.run(&line).await, OK);
    let sessions = format!("/v1/sessions/{}", id(9));
    assert_eq!(
        server.seen(),
        [
            "POST /v1/sessions {\"template\":\"python\"}".to_owned(),
            format!("POST {sessions}/executions {{\"code\":\"x\",\"timeout_seconds\":5.0}}"),
            format!("DELETE {sessions}"),
        ]
    );
}

#[tokio::test]
async fn exec_exits_as_the_code_ended() {
    let server = start().await;
    for (code, exit) in [("fine", OK), ("slow", TIMED_OUT), ("cut", FAILED), ("full", FAILED)] {
        assert_eq!(server.run(&["exec", "one", "-c", code]).await, exit, "{code}");
    }
    assert_eq!(server.run(&["exec", "nobody", "-c", "x"]).await, FAILED);
    assert_eq!(server.run(&["exec", "one", "/no/such/file"]).await, FAILED);
}

#[tokio::test]
async fn large_images_are_fetched_and_saved() {
    let (server, folder) = (start().await, tempfile::tempdir().unwrap());
    let out = folder.path().join("plots");
    assert_eq!(server.run(&["exec", &id(1), "-c", "plot", "--out", out.to_str().unwrap()]).await, OK);
    assert_eq!(std::fs::read(out.join("image-1.png")).unwrap(), b"bytes");
}

#[tokio::test]
async fn rm_goes_on_after_a_failure() {
    let server = start().await;
    assert_eq!(server.run(&["rm", &id(7), "nobody", &id(1)]).await, FAILED);
    assert_eq!(server.seen().last().unwrap(), &format!("DELETE /v1/sessions/{}", id(1)));
}

#[tokio::test]
async fn sessions_are_paused_and_resumed_by_name_or_id() {
    let server = start().await;
    assert_eq!(server.run(&["pause", "three"]).await, OK);
    assert_eq!(server.seen().last().unwrap(), &format!("POST /v1/sessions/{}/pause", id(3)));
    assert_eq!(server.run(&["resume", &id(7), &id(1)]).await, FAILED);
    assert_eq!(server.seen().last().unwrap(), &format!("POST /v1/sessions/{}/resume", id(1)));
}

#[tokio::test]
async fn rm_all_ends_the_live_ones() {
    let server = start().await;
    assert_eq!(server.run(&["rm", "--all"]).await, OK);
    let deleted: Vec<String> = server.seen().into_iter().filter(|line| line.starts_with("DELETE")).collect();
    assert_eq!(deleted, [format!("DELETE /v1/sessions/{}", id(1)), format!("DELETE /v1/sessions/{}", id(3))]);
}

#[tokio::test]
async fn health_and_images_answer() {
    let server = start().await;
    assert_eq!(server.run(&["images"]).await, OK);
    assert_eq!(server.run(&["health"]).await, 0);
    let nowhere = Server { url: "http://127.0.0.1:1".to_owned(), seen: Seen::default() };
    assert_eq!(nowhere.run(&["health"]).await, 1);
    assert_eq!(nowhere.run(&["ps"]).await, FAILED);
}

#[tokio::test]
async fn a_refused_key_is_a_failure() {
    let server = start().await;
    assert_eq!(server.run_with_key("cb_2", &["ps"]).await, FAILED);
}

#[tokio::test]
async fn commands_that_need_no_server() {
    let server = start().await;
    assert_eq!(server.run(&["check-config", "--set", "server.data_dir=/d"]).await, OK);
    assert_eq!(server.run(&["check-config", "--set", "server.data_dir=/d", "--set", "limits.sessions=0"]).await, 1);
    assert!(String::from_utf8(completion_script(clap_complete::Shell::Bash)).unwrap().contains("check-config"));
    let cli = Cli::try_parse_from(["cellblock", "openapi"]).unwrap();
    assert_eq!(perform(&cli, &Environment::default()).await, None);
}

#[tokio::test]
async fn connect_asks_without_the_key_and_gives_nothing_for_a_closed_door() {
    let server = start().await;
    for line in
        [&["connect"][..], &["--json", "connect"], &["connect", "env"], &["connect", "curl"], &["connect", "mcp"]]
    {
        assert_eq!(server.run(line).await, OK, "{line:?}");
    }
    for closed in ["e2b-python", "classic"] {
        assert_eq!(server.run(&["connect", closed]).await, FAILED, "{closed}");
    }
    let nowhere = Server { url: "http://127.0.0.1:1".to_owned(), seen: Seen::default() };
    assert_eq!(nowhere.run(&["connect", "e2b-python"]).await, OK, "nobody has said that it is closed");
    assert!(Cli::try_parse_from(["cellblock", "connect", "cobol"]).is_err());
}

#[tokio::test]
async fn keys_are_made_listed_and_revoked() {
    let server = start().await;
    assert_eq!(server.run(&["keys", "create", "ci"]).await, OK);
    let full = ["keys", "create", "ci", "--tenant", "t", "--scope", "read", "--template", "data", "--expires", "90d"];
    assert_eq!(server.run(&full).await, OK);
    assert_eq!(
        server.seen(),
        [
            r#"POST /v1/keys {"name":"ci","scopes":["sessions"]}"#,
            r#"POST /v1/keys {"expires_in_seconds":7776000.0,"name":"ci","scopes":["read"],"templates":["data"],"tenant":"t"}"#,
        ]
    );
    assert_eq!(server.run(&["keys", "list", "--tenant", "t"]).await, OK);
    assert_eq!(server.run(&["--json", "keys", "list"]).await, OK);
    assert_eq!(server.run(&["keys", "revoke", "key1", "gone"]).await, FAILED, "one of them is not there");
    assert_eq!(
        server.seen(),
        ["GET /v1/keys?tenant=t", "GET /v1/keys", "DELETE /v1/keys/key1", "DELETE /v1/keys/gone"]
    );
}
