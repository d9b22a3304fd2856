//! The code interpreter of the door for programs written for E2B, as E2B's own clients use it, and as nobody should. With real containers.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock::domain::ids::SessionId;
use cellblock::service::bearer::{Purpose, Tokens};
use cellblock::store::secret;
use futures_util::StreamExt;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use server::{Cell, NEVER, Server, text};

const SETTINGS: &str = "[e2b]\ndomain = \"boxes.test\"\n[executions]\ninline = \"64KiB\"\n";

/// A session that is a sandbox, and the tokens that its creator would have been told.
struct Sandbox {
    cell: Cell,
    agent: String,
    traffic: String,
}

impl Sandbox {
    async fn new(server: &Arc<Server>) -> Self {
        let cell = server.create(json!({"template": "e2b"})).await;
        let tokens = Tokens::new(secret::ensure(server.data()).unwrap());
        let id: SessionId = cell.id.parse().unwrap();
        Self { agent: tokens.of(Purpose::Agent, id), traffic: tokens.of(Purpose::Traffic, id), cell }
    }

    /// A request to its code interpreter.
    fn ask(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.cell.server.bare(method, path);
        let request = request.header("E2b-Sandbox-Id", &self.cell.id).header("E2b-Sandbox-Port", "49999");
        request.header("e2b-traffic-access-token", &self.traffic)
    }

    /// Runs code to its end; its lines.
    async fn run(&self, body: &Value) -> Vec<Value> {
        let reply = self.cell.server.send(self.ask(Method::POST, "/execute").json(body)).await;
        assert_eq!((reply.status, reply.header("content-type")), (200, "application/x-ndjson"), "{}", reply.text);
        assert!(reply.text.is_ascii() && !reply.text.contains("\n\n"), "{}", reply.text);
        reply.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Runs cases of a script in `tests/e2b` here, and fails with what it says.
    async fn clients_work(&self, script: &str, case: &str, given: [&str; 3]) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let (made, mut command) = match script.strip_suffix(".mjs") {
            None => {
                let python = root.join("target/e2b/bin/python");
                let mut command = Command::new(&python);
                command.arg(root.join("tests/e2b/python").join(script));
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
        let key = self.cell.server.key.replace("cb_", "e2b_");
        command.env("PYTHONDONTWRITEBYTECODE", "1").args([&self.cell.server.url, &key, case]).args(given);
        let ran = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        println!("{script} {case}: {}", String::from_utf8_lossy(&ran.stdout));
        let said = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success(), "{script}, {case}: {}: {said}", ran.status);
    }

    async fn python(&self, case: &str) {
        self.clients_work("code.py", case, [&self.cell.id, &self.agent, &self.traffic]).await;
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
    Sandbox::new(&server).await.python("all").await;
}

async fn the_javascript_client_runs_code(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let given = [&sandbox.cell.id, &sandbox.agent, &sandbox.traffic].map(String::as_str);
    sandbox.clients_work("code.mjs", "all", given).await;
}

async fn a_process_finds_what_another_left(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    for case in ["begin", "connect", "async"] {
        sandbox.python(case).await;
    }
}

async fn strangers_are_told_so(server: Arc<Server>) {
    let (one, two) = (Sandbox::new(&server).await, Sandbox::new(&server).await);
    // The agent's token is sent along, and opens nothing here.
    for traffic in [&two.traffic, &one.agent] {
        one.clients_work("code.py", "stranger", [&one.cell.id, &one.agent, traffic]).await;
    }
    let context = two.run(&json!({"code": "1"})).await;
    assert_eq!(kinds(&context), ["number_of_executions", "result", "end_of_execution"]);
    let theirs = server.get(&format!("/v1/sessions/{}/contexts", two.cell.id)).await;
    let theirs = text(&theirs.json["contexts"][0]["id"]);
    let refused =
        server.send(one.ask(Method::POST, "/execute").json(&json!({"code": "1", "context_id": theirs}))).await;
    assert_eq!((refused.status, refused.header("content-type")), (404, "text/plain; charset=utf-8"));
    for (method, path) in
        [(Method::DELETE, format!("/contexts/{theirs}")), (Method::POST, format!("/contexts/{theirs}/restart"))]
    {
        assert_eq!(server.send(one.ask(method, &path)).await.status, 404);
    }
}

async fn what_is_wrong_is_said(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let listed = server.send(sandbox.ask(Method::GET, "/contexts")).await;
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
        let refused = server.send(sandbox.ask(Method::POST, "/execute").json(&body)).await;
        assert_eq!(refused.status, status, "{body}: {}", refused.text);
        assert!(
            refused.text.contains(word) && refused.header("content-type").starts_with("text/plain"),
            "{}",
            refused.text
        );
    }
    let refused = server.send(sandbox.ask(Method::DELETE, &format!("/contexts/{own}"))).await;
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
    let large = sandbox.ask(Method::POST, "/execute").header("connection", "close").body(vec![b' '; 17 * 1024 * 1024]);
    assert_eq!(server.send(large).await.status, 413);
}

async fn an_execution_ends_when_its_caller_leaves(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let request =
        sandbox.ask(Method::POST, "/execute").json(&json!({"code": "import time\nprint('on')\ntime.sleep(50)"}));
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
    let waiting: Vec<_> = ["time.sleep(50)", "open('ran', 'w')"]
        .map(|code| {
            let body = json!({"code": code, "env_vars": {"A": "1"}});
            sandbox.ask(Method::POST, "/execute").json(&body).send()
        })
        .into_iter()
        .collect();
    let answers = futures_util::future::join_all(waiting).await;
    drop(answers);
    let ran = sandbox.run(&json!({"code": "import os; (os.path.exists('ran'), 'A' in os.environ)"})).await;
    assert_eq!(ran[1]["text"], "(False, False)", "{ran:?}");
}

async fn an_answer_breaks_off_with_its_sandbox(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let request =
        sandbox.ask(Method::POST, "/execute").json(&json!({"code": "print('on')\nimport time\ntime.sleep(50)"}));
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
    let gone = server.send(sandbox.ask(Method::POST, "/execute").json(&json!({"code": "1"}))).await;
    assert!(gone.status == 502 && gone.text.contains("was not found"), "{}", gone.text);
}
