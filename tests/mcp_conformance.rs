//! What others hold servers of the Model Context Protocol to: its conformance suite and its Inspector, as they come, against the server itself and against a fixture
//! behind the same door, which has the tools, resources and prompts that the suite asks for. `scripts/test-kernel` installs both.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/bench.rs"]
mod bench;
#[path = "support/engine_fake.rs"]
mod engine_fake;
#[path = "support/mcp_fixture.rs"]
mod mcp_fixture;
#[path = "support/server.rs"]
mod server;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bench::{Bench, INSTANCE};
use cellblock::http::mcp::Mcp;
use cellblock::http::{self, App};
use cellblock::service::keys::{self, ConfiguredKey};
use cellblock::task;
use engine_fake::FakeEngine;
use mcp_fixture::Fixture;
use rmcp::transport::streamable_http_server::StreamableHttpService;
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use server::{NEVER, Server};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// The revisions that the suite knows by what they require.
const REVISIONS: [&str; 2] = ["2025-11-25", "2026-07-28"];

/// A program of `target/mcp-node`, in its own Node.
fn node(program: &str) -> Command {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    let (node, modules) = (target.join("mcp-node/node"), target.join("mcp-node/node_modules"));
    assert!(node.exists(), "{} is not there; scripts/test-kernel makes it", node.display());
    let mut command = Command::new(node);
    command.arg(modules.join(".bin").join(program));
    command
}

/// What a program has put out, and whether it was content.
async fn ran(mut command: Command) -> (bool, String) {
    let running = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = tokio::time::timeout(NEVER * 4, running).await.expect("an end").unwrap();
    let both = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&both).into_owned())
}

/// The suite says no key: this adds one to whatever is asked, and changes nothing else.
async fn keyed(url: &str, key: &str) -> String {
    #[derive(Clone)]
    struct Way(reqwest::Client, String, String);
    async fn pass(State(Way(client, url, key)): State<Way>, request: Request) -> Response {
        let (head, body) = request.into_parts();
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        let Ok(body) = axum::body::to_bytes(body, 1 << 20).await else {
            return StatusCode::PAYLOAD_TOO_LARGE.into_response();
        };
        let asked = client.request(head.method, format!("{url}{path}")).headers(head.headers).bearer_auth(key);
        let Ok(answer) = asked.body(body).send().await else { return StatusCode::BAD_GATEWAY.into_response() };
        let (status, headers) = (answer.status(), answer.headers().clone());
        let mut response = (status, Body::from_stream(answer.bytes_stream())).into_response();
        *response.headers_mut() = headers;
        response
    }
    let way = Way(reqwest::Client::new(), url.to_owned(), key.to_owned());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    task::spawn("way", async move {
        let _ = axum::serve(listener, Router::new().fallback(pass).with_state(way)).await;
    });
    format!("http://{address}/mcp")
}

/// A whole front door on the fake engine, with a fixture behind this door; its address and a key.
async fn fixture(bench: &Bench) -> (String, String) {
    let key = keys::generate().unwrap();
    let configured = ConfiguredKey {
        hash: keys::hash(&key).unwrap(),
        name: "k".to_owned(),
        principal: bench.who.clone(),
        expires_at: None,
    };
    bench.keys.add(configured).unwrap();
    // Of the older revision the suite wants tools that ask their client while they run: within a session of the protocol, which no tool of the product needs.
    let sessions = Arc::new(LocalSessionManager::default());
    let mcp = Mcp::answered_by(Vec::new(), move |_, config, request| {
        let config = config.with_legacy_session_mode(true);
        let service = StreamableHttpService::new(|| Ok(Fixture), Arc::clone(&sessions), config);
        Box::pin(async move { service.handle(request).await.map(Body::new) })
    });
    let app = App { mcp: Some(mcp), ..bench.app() };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    task::spawn("server", http::serve(listener, app, bench.connections(NEVER), CancellationToken::new()));
    (format!("http://{address}"), key)
}

fn baseline(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/mcp").join(name)
}

/// Has the suite judge a server by a revision. What fails has to stand in the baseline, and nothing may stand there that passes.
async fn conforms(url: &str, revision: &str, baseline: &Path) {
    let results = tempfile::tempdir().unwrap();
    let mut suite = node("conformance");
    suite.args(["server", "--url", url, "--requirements", revision, "--timeout", "20000"]);
    suite.arg("--expected-failures").arg(baseline).arg("--output-dir").arg(results.path());
    let (is_well, told) = ran(suite).await;
    assert!(is_well, "{revision} by {}:\n{told}", baseline.display());
    // A suite that asks nothing would be content with everything.
    assert!(told.contains("tools-list"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fixture_behind_this_door_conforms() {
    let bench = Bench::on(Arc::new(FakeEngine::new(INSTANCE)), None, |_, _| {});
    let (url, key) = fixture(&bench).await;
    let url = keyed(&url, &key).await;
    for revision in REVISIONS {
        conforms(&url, revision, &baseline(&format!("fixture-{revision}.yaml"))).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_itself_conforms_but_for_what_only_a_fixture_has() {
    // The small set is the beginning of the full one.
    let server = Server::start("[doors]\nmcp_tools = \"full\"\n").await;
    let url = keyed(&server.url, &server.key).await;
    for revision in REVISIONS {
        conforms(&url, revision, &baseline(&format!("server-{revision}.yaml"))).await;
    }
    tools_are_portable(&server).await;
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

/// The Inspector finds nothing in the tools that a client could not take, in either era, and calls one.
async fn tools_are_portable(server: &Server) {
    let (url, key) = (format!("{}/mcp", server.url), format!("Authorization: Bearer {}", server.key));
    for era in ["legacy", "modern"] {
        let ask = |more: &[&str]| {
            let mut inspector = node("mcp-inspector");
            inspector.args(["--cli", &url, "--transport", "http", "--header", &key, "--protocol-era", era]).args(more);
            ran(inspector)
        };
        let (is_well, told) = ask(&["--method", "tools/list", "--strict"]).await;
        assert!(is_well && told.contains("\"run_code\"") && told.contains("\"export_notebook\""), "{era}: {told}");
        // What is only worth a warning is content with an exit status of 0.
        assert!(!told.contains("  Suggestion: "), "{era}: {told}");
        let (is_well, told) = ask(&["--method", "tools/call", "--tool-name", "list_sessions"]).await;
        assert!(is_well && told.contains("There is no session"), "{era}: {told}");
    }
}
