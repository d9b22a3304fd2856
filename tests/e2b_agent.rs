//! What E2B's agent answers in the door for programs written for E2B: to E2B's own clients, as they come, and to nobody's. With real containers.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/e2b.rs"]
mod e2b;
#[path = "support/server.rs"]
mod server;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use e2b::{AGENT, Sandbox, client, clients_work};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use server::{Reply, Server, text};

/// What the agent's tests ask of a sandbox.
trait Agent {
    fn ask_as(&self, method: Method, path: &str, token: &str) -> RequestBuilder;
    async fn rpc(&self, method: &str, message: Value) -> Reply;
    /// Sends a stream of envelopes, and tells how its answer ended.
    async fn stream(&self, method: &str, body: Vec<u8>) -> Value;
}

impl Agent for Sandbox {
    fn ask_as(&self, method: Method, path: &str, token: &str) -> RequestBuilder {
        self.ask(method, path, AGENT).header("x-access-token", token)
    }

    async fn rpc(&self, method: &str, message: Value) -> Reply {
        self.cell.server.send(self.ask_as(Method::POST, method, &self.agent).json(&message)).await
    }

    async fn stream(&self, method: &str, body: Vec<u8>) -> Value {
        let request = self.ask_as(Method::POST, method, &self.agent).header("content-type", "application/connect+json");
        let answer = request.body(body).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 200);
        let mut bytes = &answer.bytes().await.unwrap()[..];
        let mut last = Value::Null;
        while let Some((head, rest)) = bytes.split_first_chunk::<5>() {
            let (message, rest) = rest.split_at(u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize);
            (last, bytes) = (serde_json::from_slice(message).unwrap(), rest);
            if head[0] == 2 {
                assert!(bytes.is_empty());
                return last;
            }
        }
        panic!("the answer has no end: {last}");
    }
}

fn enveloped(length: u32, message: &[u8]) -> Vec<u8> {
    [&[0], &length.to_be_bytes()[..], message].concat()
}

/// A form of files, as E2B's clients write it.
fn form(request: RequestBuilder, names: &[&str]) -> RequestBuilder {
    let part =
        |name: &&str| format!("--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\nx\r\n");
    let body: String = names.iter().map(part).chain(["--x--\r\n".to_owned()]).collect();
    request.header("content-type", "multipart/form-data; boundary=x").body(body)
}

/// How long a body would be that is one whole envelope.
fn whole_of(body: &[u8]) -> usize {
    body.split_first_chunk::<5>()
        .map_or(0, |(head, _)| 5 + u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize)
}

fn envelope(message: &Value) -> Vec<u8> {
    let message = message.to_string().into_bytes();
    enveloped(u32::try_from(message.len()).unwrap(), &message)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agent_and_e2bs_own_clients() {
    let server = Server::start("").await;
    let cases = cases!(
        server;
        the_python_client_has_files, the_python_client_runs_commands, the_javascript_client_works, a_client_hears_that_its_sandbox_is_killed
    );
    server.run_and_finish(2, cases).await;
}

async fn the_python_client_has_files(server: Arc<Server>) {
    let cases = "files_go_up_and_come_down,big_files_are_whole,urls_are_signed,folders_are_looked_at_and_changed,changes_are_told,changes_stream";
    clients_work(&server, "agent.py", cases, &[]).await;
}

async fn the_python_client_runs_commands(server: Arc<Server>) {
    clients_work(&server, "agent.py", "commands_run,commands_go_on,terminals", &[]).await;
    let sandbox = Sandbox::new(&server).await;
    for case in ["begin", "come_back"] {
        clients_work(&server, "agent.py", case, &[&sandbox.cell.id]).await;
    }
}

async fn the_javascript_client_works(server: Arc<Server>) {
    clients_work(&server, "agent.mjs", "files,changes,commands,terminals", &[]).await;
}

async fn a_client_hears_that_its_sandbox_is_killed(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let mut client = client(&server, "agent.py", "it_is_killed", &[&sandbox.cell.id]).spawn().unwrap();
    let mut out = client.stdout.take().unwrap();
    let said = tokio::task::spawn_blocking(move || {
        let mut said = [0; 5];
        // It stays open, or who writes to it is ended for that.
        out.read_exact(&mut said).map(|()| (said, out))
    });
    let (said, _out) = said.await.unwrap().unwrap();
    assert_eq!(&said, b"waits");
    assert_eq!(server.delete(&format!("/v1/sessions/{}", sandbox.cell.id)).await.status, 200);
    let ran = tokio::task::spawn_blocking(move || client.wait_with_output()).await.unwrap().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agent_and_whoever_means_no_good() {
    let server = Server::start("").await;
    let cases = cases!(
        server;
        tokens_and_headers_of_others_open_nothing, paths_lead_nowhere_else, frames_are_what_they_say, who_never_reads_is_cut_off, what_is_wrong_is_said
    );
    server.run_and_finish(2, cases).await;
}

async fn tokens_and_headers_of_others_open_nothing(server: Arc<Server>) {
    let (one, two) = (Sandbox::new(&server).await, Sandbox::new(&server).await);
    let list = "/process.Process/List";
    assert_eq!(one.rpc(list, json!({})).await.status, 200);
    for token in [two.agent.as_str(), server.key.as_str(), ""] {
        let refused = server.send(one.ask_as(Method::POST, list, token).json(&json!({}))).await;
        assert_eq!((refused.status, &refused.json["code"]), (401, &json!("unauthenticated")), "{}", refused.text);
        let refused = server.send(one.ask_as(Method::GET, "/files?path=a", token)).await;
        assert_eq!((refused.status, &refused.json["code"]), (401, &json!(401)), "{}", refused.text);
        assert_eq!(server.send(one.ask_as(Method::GET, "/envs", token)).await.status, 401);
    }
    // A second name of a sandbox makes none of both.
    let forged = one.ask_as(Method::POST, list, &two.agent).header("E2b-Sandbox-Id", &two.cell.id).json(&json!({}));
    assert_eq!(server.send(forged).await.status, 400);
    let forged =
        one.ask_as(Method::GET, "/files?path=a&signature=v1_x", "").header("host", format!("49983-{}.x", two.cell.id));
    assert_eq!(server.send(forged).await.status, 401);
    // Somebody else's process is none here.
    let started = two.cell.background("import subprocess; subprocess.run(['sleep', '1000'])").await;
    assert!(!started.is_empty());
    for (method, message) in [
        ("SendSignal", json!({"process": {"pid": 1}, "signal": "SIGNAL_SIGKILL"})),
        ("SendInput", json!({"process": {"pid": 1}, "input": {"stdin": ""}})),
        ("CloseStdin", json!({"process": {"tag": "x"}})),
        ("Update", json!({"process": {"pid": 4_294_967_295_u32}, "pty": {"size": {"cols": 1, "rows": 1}}})),
    ] {
        let refused = one.rpc(&format!("/process.Process/{method}"), message).await;
        assert_eq!((refused.status, &refused.json["code"]), (404, &json!("not_found")), "{method}: {}", refused.text);
    }
    let watcher = one.rpc("/filesystem.Filesystem/CreateWatcher", json!({"path": ""})).await;
    let foreign = two.rpc("/filesystem.Filesystem/GetWatcherEvents", watcher.json.clone()).await;
    assert_eq!((foreign.status, &foreign.json["code"]), (404, &json!("not_found")), "{}", foreign.text);
    assert_eq!(one.rpc("/filesystem.Filesystem/GetWatcherEvents", watcher.json).await.json, json!({"events": []}));
}

async fn paths_lead_nowhere_else(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let made = sandbox.cell.run("import os\nos.symlink('/etc', 'out')\nos.symlink('/etc/passwd', '/tmp/out')").await;
    assert_eq!(made["status"], "ok", "{made}");
    let read = async |path: &str| {
        let encoded: String = url::form_urlencoded::byte_serialize(path.as_bytes()).collect();
        server.send(sandbox.ask_as(Method::GET, &format!("/files?path={encoded}"), &sandbox.agent)).await
    };
    for path in [
        "/etc/passwd",
        "../../etc/passwd",
        "out/passwd",
        "/tmp/out",
        "/proc/self/environ",
        "/home/user/../../proc/1/mem",
        "~root/x",
        "a\0b",
    ] {
        let refused = read(path).await;
        assert!(
            matches!(refused.status, 400 | 403 | 404) && !refused.text.contains("root:"),
            "{path}: {}",
            refused.text
        );
        let said = sandbox.rpc("/filesystem.Filesystem/Remove", json!({"path": path})).await;
        assert!(said.status == 200 || said.json["code"] != "internal", "{path}: {}", said.text);
    }
    for (method, message) in [
        ("Stat", json!({"path": "/etc/passwd"})),
        ("ListDir", json!({"path": "/"})),
        ("MakeDir", json!({"path": "/opt/x"})),
        ("Move", json!({"source": "/etc/hosts", "destination": "/tmp/hosts"})),
        ("Remove", json!({"path": "~"})),
        ("CreateWatcher", json!({"path": "/etc"})),
        ("ListDir", json!({"path": "", "depth": 4_000_000_000_u32})),
    ] {
        let refused = sandbox.rpc(&format!("/filesystem.Filesystem/{method}"), message).await;
        assert!(matches!(refused.status, 400 | 403), "{method}: {} {}", refused.status, refused.text);
    }
    let put = |name: &str| server.send(form(sandbox.ask_as(Method::POST, "/files", &sandbox.agent), &[name]));
    for path in ["/etc/x", "../../x", "out/x", "x/"] {
        let refused = put(path).await;
        assert!(matches!(refused.status, 400 | 403), "{path}: {} {}", refused.status, refused.text);
    }
    assert_eq!(put("/tmp/in/x").await.json[0]["path"], "/tmp/in/x");
}

async fn frames_are_what_they_say(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let start = json!({"process": {"cmd": "/bin/echo", "args": ["hi"]}});
    assert_eq!(sandbox.stream("/process.Process/Start", envelope(&start)).await, json!({}));
    let whole = envelope(&start);
    for (body, code) in [
        (enveloped(u32::MAX, b"{}"), "resource_exhausted"),
        (whole[..whole.len() - 3].to_vec(), "invalid_argument"),
        (whole[..3].to_vec(), "invalid_argument"),
        (Vec::new(), "invalid_argument"),
        (envelope(&json!([1])), "invalid_argument"),
        ([&[1_u8], &whole[1..]].concat(), "unimplemented"),
        (envelope(&json!({"process": {"cmd": ""}})), "invalid_argument"),
        (envelope(&json!({"process": {"cmd": "/no/such"}})), "invalid_argument"),
    ] {
        let end = sandbox.stream("/process.Process/Start", body.clone()).await;
        assert_eq!(end["error"]["code"], code, "{end}");
        // What is whole may be understood otherwise there.
        if body.len() != whole_of(&body) {
            let end = sandbox.stream("/filesystem.Filesystem/WatchDir", body.clone()).await;
            assert_eq!(end["error"]["code"], code, "{end}");
        }
        let end = sandbox.stream("/process.Process/StreamInput", body.clone()).await;
        // Who says nothing at all has said all.
        assert_eq!(end["error"].is_object(), !body.is_empty(), "{end}");
    }
    let plain = sandbox.ask_as(Method::POST, "/process.Process/Start", &sandbox.agent).json(&start);
    assert_eq!(server.send(plain).await.status, 415);
    // A client stream, in one go.
    let cat = sandbox.ask_as(Method::POST, "/process.Process/Start", &sandbox.agent);
    let cat = cat.header("content-type", "application/connect+json");
    let cat = cat.body(envelope(&json!({"process": {"cmd": "cat"}, "tag": "cat"}))).send().await.unwrap();
    let which = json!({"process": {"tag": "cat"}});
    let messages = [
        json!({"start": which}),
        json!({"data": {"input": {"stdin": "aGVs"}}}),
        json!({"keepalive": {}}),
        json!({"data": {"input": {"stdin": "bG8="}}}),
    ];
    let sent = sandbox.stream("/process.Process/StreamInput", messages.iter().flat_map(envelope).collect()).await;
    assert_eq!(sent, json!({}));
    assert_eq!(sandbox.rpc("/process.Process/CloseStdin", which).await.status, 200);
    let told = cat.text().await.unwrap();
    assert!(told.contains("exit status 0") && told.contains("aGVs"), "{told}");
}

async fn who_never_reads_is_cut_off(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let body =
        envelope(&json!({"process": {"cmd": "/bin/sh", "args": ["-c", "yes | head -c 300000000"]}, "tag": "yes"}));
    let address = server.url.strip_prefix("http://").unwrap().to_owned();
    let head = format!(
        "POST /process.Process/Start HTTP/1.1\r\nhost: {address}\r\ne2b-sandbox-id: {}\r\ne2b-sandbox-port: 49983\r\nx-access-token: {}\r\n\
         content-type: application/connect+json\r\ncontent-length: {}\r\n\r\n",
        sandbox.cell.id,
        sandbox.agent,
        body.len()
    );
    let mut lazy = TcpStream::connect(address).unwrap();
    lazy.write_all(&[head.as_bytes(), &body].concat()).unwrap();
    // The command does not wait for its reader, and neither does anybody else.
    let began = Instant::now();
    loop {
        let known = sandbox.rpc("/process.Process/List", json!({})).await.json;
        let is_running = known["processes"].as_array().unwrap().iter().any(|process| process["tag"] == "yes");
        if !is_running && began.elapsed() > Duration::from_secs(2) {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{known}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop(lazy);
    assert_eq!(
        sandbox.stream("/process.Process/Start", envelope(&json!({"process": {"cmd": "true"}}))).await,
        json!({})
    );
}

async fn what_is_wrong_is_said(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let post = |path: &str| sandbox.ask_as(Method::POST, path, &sandbox.agent);
    let sized = "application/octet-stream";
    for (request, status, word) in [
        (post("/files").header("content-type", sized).body("x"), 400, "?path="),
        (post("/files?path=a").header("content-type", "text/plain").body("x"), 400, "multipart"),
        (post("/files?path=a").header("content-type", sized).header("content-encoding", "br").body("x"), 400, "gzip"),
        (
            post("/files?path=a").header("content-type", sized).header("content-encoding", "gzip").body("no gzip"),
            400,
            "broke off",
        ),
        (
            post("/files?path=a").header("content-type", sized).header("x-metadata-a", "x".repeat(5000)).body("x"),
            400,
            "4096",
        ),
        (post("/files?path=a&username=root").header("content-type", sized).body("x"), 401, "root"),
        (sandbox.ask_as(Method::GET, "/files?path=", &sandbox.agent), 400, ""),
        (sandbox.ask_as(Method::GET, "/nothing", &sandbox.agent), 404, "docs/E2B.md"),
    ] {
        let refused = server.send(request).await;
        assert_eq!((refused.status, &refused.json["code"]), (status, &json!(status)), "{}", refused.text);
        assert!(text(&refused.json["message"]).contains(word), "{word}: {}", refused.text);
    }
    let refused = server.send(form(post("/files"), &["same", "./same"])).await;
    assert_eq!((refused.status, &refused.json["code"]), (400, &json!(400)), "{}", refused.text);
    let root =
        sandbox.ask_as(Method::POST, "/process.Process/List", &sandbox.agent).header("authorization", "Basic cm9vdDo=");
    let refused = server.send(root.json(&json!({}))).await;
    assert_eq!((refused.status, &refused.json["code"]), (401, &json!("unauthenticated")), "{}", refused.text);
    let envs = server.send(sandbox.ask_as(Method::GET, "/envs", &sandbox.agent)).await;
    assert!(envs.status == 200 && envs.json.is_object(), "{}", envs.text);
}
