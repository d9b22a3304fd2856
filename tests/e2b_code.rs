//! The code interpreter of the door for programs written for E2B, as E2B's own clients use it, and as nobody should. With real containers.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/e2b.rs"]
mod e2b;
#[path = "support/server.rs"]
mod server;

use std::sync::Arc;
use std::time::{Duration, Instant};

use e2b::{INTERPRETER, Sandbox, clients_work};
use futures_util::StreamExt;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use server::{NEVER, Server, text};

const SETTINGS: &str = "[e2b]\ndomain = \"boxes.test\"\n[executions]\ninline = \"64KiB\"\n";

/// What the code interpreter's tests ask of a sandbox.
trait Interpreter {
    /// A request to its code interpreter.
    fn interpret(&self, method: Method, path: &str) -> RequestBuilder;
    /// Runs code to its end; its lines.
    async fn run(&self, body: &Value) -> Vec<Value>;
}

impl Interpreter for Sandbox {
    fn interpret(&self, method: Method, path: &str) -> RequestBuilder {
        self.ask(method, path, INTERPRETER).header("e2b-traffic-access-token", &self.traffic)
    }

    async fn run(&self, body: &Value) -> Vec<Value> {
        let reply = self.cell.server.send(self.interpret(Method::POST, "/execute").json(body)).await;
        assert_eq!((reply.status, reply.header("content-type")), (200, "application/x-ndjson"), "{}", reply.text);
        assert!(reply.text.is_ascii() && !reply.text.contains("\n\n"), "{}", reply.text);
        reply.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn kinds(lines: &[Value]) -> Vec<String> {
    lines.iter().map(|line| text(&line["type"])).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_code_interpreter() {
    let server = Server::start(SETTINGS).await;
    let cases = cases!(
        server;
        the_python_client_runs_code, the_javascript_client_runs_code, a_process_finds_what_another_left, strangers_are_told_so,
        what_is_wrong_is_said, an_execution_ends_when_its_caller_leaves, an_answer_breaks_off_with_its_sandbox
    );
    server.run_and_finish(2, cases).await;
}

async fn the_python_client_runs_code(server: Arc<Server>) {
    clients_work(&server, "code.py", "all", &[]).await;
}

async fn the_javascript_client_runs_code(server: Arc<Server>) {
    clients_work(&server, "code.mjs", "all", &[]).await;
}

async fn a_process_finds_what_another_left(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    for case in ["begin", "connect", "async"] {
        clients_work(&server, "code.py", case, &[&sandbox.cell.id]).await;
    }
}

async fn strangers_are_told_so(server: Arc<Server>) {
    let (one, two) = (Sandbox::new(&server).await, Sandbox::new(&server).await);
    // The agent's token is sent along, and opens nothing here.
    for traffic in [&two.traffic, &one.agent] {
        clients_work(&server, "code.py", "stranger", &[&one.cell.id, &one.agent, traffic]).await;
    }
    let context = two.run(&json!({"code": "1"})).await;
    assert_eq!(kinds(&context), ["number_of_executions", "result", "end_of_execution"]);
    let theirs = server.get(&format!("/v1/sessions/{}/contexts", two.cell.id)).await;
    let theirs = text(&theirs.json["contexts"][0]["id"]);
    let refused =
        server.send(one.interpret(Method::POST, "/execute").json(&json!({"code": "1", "context_id": theirs}))).await;
    assert_eq!((refused.status, refused.header("content-type")), (404, "text/plain; charset=utf-8"));
    for (method, path) in
        [(Method::DELETE, format!("/contexts/{theirs}")), (Method::POST, format!("/contexts/{theirs}/restart"))]
    {
        assert_eq!(server.send(one.interpret(method, &path)).await.status, 404);
    }
}

async fn what_is_wrong_is_said(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let listed = server.send(sandbox.interpret(Method::GET, "/contexts")).await;
    let own = text(&listed.json[0]["id"]);
    assert_eq!(listed.json, json!([{"id": own, "language": "python", "cwd": "/home/user"}]));
    for (body, status, word) in [
        (json!({"code": "1", "context_id": own, "language": "python"}), 400, "name one of the two"),
        (json!({"code": "1", "language": "co bol"}), 400, "/language"),
        (json!({"code": "1", "env_vars": {"1x": "a"}}), 400, "/env/1x"),
        (json!({"code": "1", "env_vars": {"A": 1}}), 400, "not understood"),
        (json!({"code": "1", "context_id": "x"}), 404, "no such context"),
        (json!({}), 400, "code"),
    ] {
        let refused = server.send(sandbox.interpret(Method::POST, "/execute").json(&body)).await;
        assert_eq!(refused.status, status, "{body}: {}", refused.text);
        assert!(
            refused.text.contains(word) && refused.header("content-type").starts_with("text/plain"),
            "{}",
            refused.text
        );
    }
    let refused = server.send(sandbox.interpret(Method::DELETE, &format!("/contexts/{own}"))).await;
    assert_eq!(refused.status, 409, "the first context stays: {}", refused.text);
    // Newer clients may say more; older ones leave out what they do not want.
    let ran = sandbox
        .run(&json!({"code": "'é'", "context_id": null, "language": " Python ", "env_vars": null, "more": 1}))
        .await;
    assert_eq!(ran[1]["text"], "é");
    assert!(ran[1].get("extra").is_none() && ran[1].get("html").is_none(), "{ran:?}");
    // JSON that no reader takes is left out.
    let code = "x = []\nfor _ in range(120): x = [x]\nfrom IPython.display import display\ndisplay({'application/json': x, 'text/plain': 'deep'}, raw=True)";
    let ran = sandbox.run(&json!({"code": code})).await;
    assert!(ran[1]["text"] == "deep" && ran[1].get("json").is_none(), "{ran:?}");
    // A connection on which more comes than is taken is not one to go on with.
    let large =
        sandbox.interpret(Method::POST, "/execute").header("connection", "close").body(vec![b' '; 17 * 1024 * 1024]);
    assert_eq!(server.send(large).await.status, 413);
}

async fn an_execution_ends_when_its_caller_leaves(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let request =
        sandbox.interpret(Method::POST, "/execute").json(&json!({"code": "import time\nprint('on')\ntime.sleep(50)"}));
    let mut answer = request.send().await.unwrap().bytes_stream();
    let (mut heard, began) = (String::new(), Instant::now());
    while !heard.contains("keepalive") {
        heard.push_str(std::str::from_utf8(&answer.next().await.unwrap().unwrap()).unwrap());
    }
    assert!(began.elapsed() >= Duration::from_secs(5) && heard.contains("\"stdout\""), "{heard}");
    drop(answer);
    let began = Instant::now();
    assert_eq!(sandbox.run(&json!({"code": "1+1"})).await[1]["text"], "2");
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    // One that waits is taken back as well, and so is one whose variables were to be set.
    let queued = async |expected: u64| {
        let began = Instant::now();
        loop {
            let contexts = server.get(&sandbox.cell.path("/contexts")).await.json;
            let all: u64 = contexts["contexts"].as_array().unwrap().iter().filter_map(|c| c["queued"].as_u64()).sum();
            if all == expected {
                return;
            }
            assert!(began.elapsed() < NEVER, "{contexts}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let asked = |code: &str| {
        let body = json!({"code": code, "env_vars": {"A": "1"}});
        sandbox.interpret(Method::POST, "/execute").json(&body).send()
    };
    let runs = asked("time.sleep(50)").await.unwrap();
    sandbox.cell.wait("busy").await;
    let waits = asked("open('ran', 'w')").await.unwrap();
    // Each has one of ours before it and behind it, for the variables.
    queued(4).await;
    drop(waits);
    queued(3).await;
    drop(runs);
    let ran = sandbox.run(&json!({"code": "import os; (os.path.exists('ran'), 'A' in os.environ)"})).await;
    assert_eq!(ran[1]["text"], "(False, False)", "{ran:?}");
}

async fn an_answer_breaks_off_with_its_sandbox(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let request =
        sandbox.interpret(Method::POST, "/execute").json(&json!({"code": "print('on')\nimport time\ntime.sleep(50)"}));
    let mut answer = request.send().await.unwrap().bytes_stream();
    let mut heard = String::new();
    while !heard.contains("\"stdout\"") {
        heard.push_str(std::str::from_utf8(&answer.next().await.unwrap().unwrap()).unwrap());
    }
    let path = format!("/v1/sessions/{}", sandbox.cell.id);
    let deleting = server.delete(&path);
    let ending = async {
        tokio::time::timeout(NEVER, async {
            loop {
                match answer.next().await {
                    Some(Ok(piece)) => assert!(!piece.starts_with(b"{\"type\":\"end"), "it ends as if all were well"),
                    other => return other,
                }
            }
        })
        .await
        .unwrap()
    };
    let (deleted, end) = tokio::join!(deleting, ending);
    assert_eq!(deleted.status, 200);
    assert!(matches!(end, Some(Err(_))), "the connection is broken off");
    let gone = server.send(sandbox.interpret(Method::POST, "/execute").json(&json!({"code": "1"}))).await;
    assert!(gone.status == 502 && gone.text.contains("was not found"), "{}", gone.text);
}
