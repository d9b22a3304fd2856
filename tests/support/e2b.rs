//! A sandbox of the door for programs written for E2B, its requests, how errors are told there, and E2B's own clients. Knows nothing of what is tested.
#![allow(dead_code, reason = "each test takes a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use cellblock::domain::ids::SessionId;
use cellblock::service::bearer::{Purpose, Tokens};
use cellblock::store::secret;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use crate::server::{Cell, Reply, Server, text};

pub const AGENT: &str = "49983";
pub const INTERPRETER: &str = "49999";

/// A sandbox, and the tokens that its creator was told.
pub struct Sandbox {
    pub cell: Cell,
    pub agent: String,
    pub traffic: String,
}

impl Sandbox {
    pub async fn new(server: &Arc<Server>) -> Self {
        Self::of(server, json!({"templateID": "base", "timeout": 900})).await
    }

    /// One that is asked for in this way.
    pub async fn of(server: &Arc<Server>, asked: Value) -> Self {
        let made = server.send(asks(server, Method::POST, "/v2/sandboxes").json(&asked)).await;
        assert_eq!(made.status, 201, "{asked}: {}", made.text);
        let id = text(&made.json["sandboxID"]);
        let tokens = Tokens::new(secret::ensure(server.data()).unwrap());
        let session: SessionId = id.parse().unwrap();
        let (agent, traffic) = (tokens.of(Purpose::Agent, session), tokens.of(Purpose::Traffic, session));
        let told = (&made.json["envdAccessToken"], &made.json["trafficAccessToken"]);
        assert_eq!(told, (&json!(agent), &json!(traffic)), "{}", made.text);
        let view = server.get(&format!("/v1/sessions/{id}")).await.json;
        Self { cell: Cell { server: Arc::clone(server), id, view }, agent, traffic }
    }

    /// A request to one of its ports, as E2B's clients send it to a server of one address.
    pub fn ask(&self, method: Method, path: &str, port: &str) -> RequestBuilder {
        aimed(&self.cell.server, method, path, (&self.cell.id, port))
    }

    /// A request to the control API that is about it.
    pub fn control(&self, method: Method, below: &str) -> RequestBuilder {
        asks(&self.cell.server, method, &format!("/sandboxes/{}{below}", self.cell.id))
    }
}

pub fn aimed(server: &Server, method: Method, path: &str, (sandbox, port): (&str, &str)) -> RequestBuilder {
    server.bare(method, path).header("E2b-Sandbox-Id", sandbox).header("E2b-Sandbox-Port", port)
}

/// A request to the control API.
pub fn asks(server: &Server, method: Method, path: &str) -> RequestBuilder {
    server.bare(method, path).header("x-api-key", key(server))
}

/// The key in the form that older clients ask for.
pub fn key(server: &Server) -> String {
    server.key.replace("cb_", "e2b_")
}

/// An error as the control API and the agent's files tell it.
#[track_caller]
pub fn is_numbered(reply: &Reply, status: u16) {
    assert_eq!((reply.status, &reply.json["code"]), (status, &json!(status)), "{}", reply.text);
    assert_eq!(reply.header("content-type"), "application/json", "{}", reply.text);
    assert!(reply.json["message"].is_string(), "{}", reply.text);
}

/// An error as the proxy before sandboxes tells it.
#[track_caller]
pub fn is_gone(reply: &Reply) {
    is_numbered(reply, 502);
    assert!(text(&reply.json["message"]).contains("was not found"), "{}", reply.text);
}

/// E2B's client in the language of a script of `tests/e2b`, as `scripts/test-kernel` has put it there, told of the server, its cases and what else it is `given`.
pub fn client(server: &Server, script: &str, cases: &str, given: &[&str]) -> Command {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (made, mut command) = match script.strip_suffix(".mjs") {
        None => {
            let python = root.join("target/e2b/bin/python");
            let mut command = Command::new(&python);
            command.env("PYTHONDONTWRITEBYTECODE", "1").arg(root.join("tests/e2b/python").join(script));
            (python, command)
        }
        Some(_) => {
            let folder = root.join("target/e2b-js");
            let mut command = Command::new("node");
            // The script is seen where its packages are, beside which it is a link.
            command.args(["--preserve-symlinks", "--preserve-symlinks-main"]).arg(folder.join("js").join(script));
            (folder.join("node_modules"), command)
        }
    };
    assert!(made.exists(), "{} is not there; `make test-kernel` makes it", made.display());
    command.args([&server.url, &key(server), cases]).args(given).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs cases of a script, and fails with what it says.
pub async fn clients_work(server: &Server, script: &str, cases: &str, given: &[&str]) {
    let mut command = client(server, script, cases, given);
    let ran = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    println!("{script} {cases}: {}", String::from_utf8_lossy(&ran.stdout));
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{script}, {cases}: {}: {said}", ran.status);
}
