//! The examples as they stand, each against a server in this process: what it prints with a key, and that it fails without one.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock::connect::{self, CLIENTS, Key};
use futures_util::{FutureExt, SinkExt, StreamExt};
use reqwest::Method;
use serde_json::{Value, json};
use server::{Case, NEVER, Server, text};
use tokio_tungstenite::tungstenite::Message;

const SETTINGS: &str = "default_template = \"python\"\ndoors.classic.enabled = true\n";

/// What runs an example by itself, where it runs, and what it prints.
const PROGRAMS: [(&str, &str, &str); 10] = [
    ("curl.sh", "bash", r#""stdout":"42\n""#),
    ("httpx_sync.py", "target/clients/bin/python", "ok \nok 42\n"),
    ("httpx_async.py", "target/clients/bin/python", "ok 0\nok 1\nok 4\n"),
    ("httpx_stream.py", "target/clients/bin/python", "stdout step 0\nstdout step 1\nstdout step 2\n"),
    ("fetch.mjs", "node", "ok 42\n"),
    ("kernel_client.py", "target/jupyter/bin/python", "ok 42\n"),
    ("mcp_client.py", "target/clients/bin/python", "42\n"),
    ("e2b.py", "target/e2b/bin/python", "42\n"),
    (SCRIPT_OF_E2B, "node", "42\n"),
    ("classic.py", "target/clients/bin/python", "Session started successfully\n42\nSession ended successfully\n"),
];

/// The one whose packages have to stand beside it.
const SCRIPT_OF_E2B: &str = "e2b.mjs";

/// Those that are for another program.
const OTHERS: [&str; 3] = ["jupyterlab.sh", "open-webui.env", "mcp.json"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn example(name: &str) -> PathBuf {
    root().join("examples").join(name)
}

/// The lines that a person pastes before all else.
fn variables(server: &Server, key: &str) -> String {
    connect::environment(&server.url, &Key::Told(key.to_owned()), true)
}

/// A command in a shell that was told the server's address and this key as a person tells it, and what `scripts/test-kernel` has made before all else.
fn command(program: &str, server: &Server, key: &str) -> Command {
    let path = if program.contains('/') { root().join(program) } else { program.into() };
    assert!(!program.contains('/') || path.exists(), "{} is not there; `make test-kernel` makes it", path.display());
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{}exec \"$@\"", variables(server, key)), "sh"]).arg(path);
    command.env("NO_PROXY", "127.0.0.1");
    command
}

/// The example beside its packages, as it stands where somebody has installed them.
fn beside_its_packages(folder: &Path) -> PathBuf {
    let (packages, script) = (root().join("target/e2b-js/node_modules"), folder.join(SCRIPT_OF_E2B));
    assert!(packages.exists(), "{} is not there; `make test-kernel` makes it", packages.display());
    std::os::unix::fs::symlink(packages, folder.join("node_modules")).unwrap();
    std::fs::copy(example(SCRIPT_OF_E2B), &script).unwrap();
    script
}

async fn run(program: &'static str, server: &Server, key: &str, name: &str) -> Output {
    let mut command = command(program, server, key);
    let folder = tempfile::tempdir().unwrap();
    let file = if name == SCRIPT_OF_E2B { beside_its_packages(folder.path()) } else { example(name) };
    // Without the script's folder among Python's modules.
    command.args(program.ends_with("python").then_some("-P")).arg(file);
    tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn examples_do_what_they_say() {
    all_are_run_and_told_of();
    let server = Server::start(SETTINGS).await;
    let programs = PROGRAMS
        .map(|(name, program, prints)| -> Case { (name, works(Arc::clone(&server), name, program, prints).boxed()) });
    let others = cases!(
        server;
        jupyterlab_has_its_kernels_here, open_webui_gets_through, an_mcp_client_gets_through, what_is_shown_is_what_is_run_here
    );
    let cases = programs.into_iter().chain(others).collect();
    let failed = server::run(2, cases).await;
    let sessions = server.get("/v1/sessions").await.json;
    let live = sessions["sessions"].as_array().unwrap().iter().filter(|session| session["state"] != "ended").count();
    let left = server.finish().await;
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    assert_eq!((live, left), (0, Ok(())), "an example has left its session");
}

fn all_are_run_and_told_of() {
    let names = std::fs::read_dir(root().join("examples")).unwrap();
    let names: BTreeSet<_> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let run: BTreeSet<_> =
        PROGRAMS.iter().map(|(name, ..)| *name).chain(OTHERS).chain(["README.md"]).map(str::to_owned).collect();
    assert_eq!(names, run);
    let readme = std::fs::read_to_string(example("README.md")).unwrap();
    let told: BTreeSet<_> = names.iter().filter(|name| readme.contains(&format!("[`{name}`]({name})"))).collect();
    assert_eq!(told.len() + 1, names.len(), "{told:?}");
}

async fn works(server: Arc<Server>, name: &'static str, program: &'static str, prints: &'static str) {
    let ran = run(program, &server, &server.key, name).await;
    let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success() && out.contains(prints), "{out}\n{err}");
    let refused = run(program, &server, "cb_none", name).await;
    assert!(!refused.status.success(), "it goes on without a key: {}", String::from_utf8_lossy(&refused.stdout));
}

/// A program that does not outlive its test.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        // One that has ended is not there to be killed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn jupyterlab_has_its_kernels_here(server: Arc<Server>) {
    let folder = tempfile::tempdir().unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).unwrap();
    let log = std::fs::File::create(folder.path().join("log")).unwrap();
    let mut command = command("bash", &server, &server.key);
    assert!(root().join("target/jupyter/bin/jupyter-lab").exists(), "`make test-kernel` makes it");
    let path = format!("{}:/usr/bin:/bin", root().join("target/jupyter/bin").display());
    let options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--IdentityProvider.token=lab"];
    command.arg(example("jupyterlab.sh")).args(options).arg(format!("--port={}", free.port()));
    command.current_dir(&folder).env("PATH", path).env("HOME", folder.path()).stdin(Stdio::null());
    let mut lab = Program(command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap());
    let said = || std::fs::read_to_string(folder.path().join("log")).unwrap();
    let url = format!("http://{free}/");
    let began = Instant::now();
    while server.bare_at(Method::GET, &format!("{url}api")).send().await.is_err() {
        assert!(lab.0.try_wait().unwrap().is_none() && began.elapsed() < NEVER, "{}", said());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let page = server.bare_at(Method::GET, &format!("{url}lab?token=lab")).send().await.unwrap();
    assert!(page.status().is_success() && page.text().await.unwrap().contains("JupyterLab"));
    assert_eq!(cell(&server, &url, "lab").await, "42\n", "{}", said());
}

/// Goes Open WebUI's way with its settings: a token is a parameter of every request, a kernel is asked for with an empty body, and the socket has no headers.
async fn open_webui_gets_through(server: Arc<Server>) {
    let mut command = command("bash", &server, &server.key);
    // As Docker Compose reads it.
    command.args(["-ac", "source \"$0\" && env"]).arg(example("open-webui.env"));
    let told = String::from_utf8(command.output().unwrap().stdout).unwrap();
    for engine in ["CODE_EXECUTION", "CODE_INTERPRETER"] {
        let setting = |name: &str| {
            let begin = format!("{engine}_{name}=");
            told.lines().find_map(|line| line.strip_prefix(&begin)).unwrap_or_else(|| panic!("{begin}")).to_owned()
        };
        assert_eq!((setting("ENGINE").as_str(), setting("JUPYTER_AUTH").as_str()), ("jupyter", "token"));
        assert!(setting("JUPYTER_TIMEOUT").parse::<u32>().is_ok());
        let (url, token) = (setting("JUPYTER_URL"), setting("JUPYTER_AUTH_TOKEN"));
        assert_eq!(cell(&server, &format!("{url}/"), &token).await, "42\n");
        let refused = server.bare_at(Method::POST, &format!("{url}/api/kernels?token=wrong")).send().await.unwrap();
        assert_eq!(refused.status(), 403);
    }
}

/// Goes the way of a client with this configuration, which fills in variables of its environment.
async fn an_mcp_client_gets_through(server: Arc<Server>) {
    let mut settings = std::fs::read_to_string(example("mcp.json")).unwrap();
    for name in ["CELLBLOCK_URL", "CELLBLOCK_API_KEY"] {
        let told = command("printenv", &server, &server.key).arg(name).output().unwrap();
        settings = settings.replace(&format!("${{{name}}}"), String::from_utf8(told.stdout).unwrap().trim());
    }
    let entry = serde_json::from_str::<Value>(&settings).unwrap()["mcpServers"]["cellblock"].take();
    assert_eq!(entry["type"], "http");
    let ask = |key: &str, message: Value| {
        let mut request = server.bare_at(Method::POST, entry["url"].as_str().unwrap());
        for (name, value) in entry["headers"].as_object().unwrap() {
            request = request.header(name, text(value).replace(&server.key, key));
        }
        request.header("accept", "application/json, text/event-stream").json(&message).send()
    };
    let params =
        json!({"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}});
    let greeting = json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params});
    assert_eq!(ask("cb_none", greeting.clone()).await.unwrap().status(), 401);
    assert!(ask(&server.key, greeting).await.unwrap().status().is_success());
    let call = |name: &str, arguments: Value| json!({"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": name, "arguments": arguments}});
    let ran = ask(&server.key, call("run_code", json!({"code": "print(40 + 2)"}))).await.unwrap();
    let ran: Value = serde_json::from_str(&ran.text().await.unwrap()).unwrap();
    assert!(text(&ran["result"]["content"][0]["text"]).contains("42"), "{ran}");
    let session = &ran["result"]["structuredContent"]["session_id"];
    let closed = ask(&server.key, call("close_session", json!({"session_id": session}))).await.unwrap();
    assert!(!closed.text().await.unwrap().contains("\"isError\":true"));
}

/// What the command prints, and the page shows, is what is run here.
async fn what_is_shown_is_what_is_run_here(server: Arc<Server>) {
    let ask = async |given: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
        command.arg("connect").args(given).args(["--url", &server.url]);
        command.env_remove("CELLBLOCK_API_KEY_FILE").env("CELLBLOCK_API_KEY", &server.key);
        let ran = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let said = String::from_utf8(ran.stderr).unwrap();
        assert!(ran.status.success() && said.is_empty(), "{given:?}: {said}");
        String::from_utf8(ran.stdout).unwrap()
    };
    let page = server.send(server.bare(Method::GET, "/connect")).await;
    assert_eq!(page.status, 200);
    let page = page.text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&#39;", "'");
    let page = page.replace("&amp;", "&");
    let (all, env) = (ask(&[]).await, ask(&["env"]).await);
    assert_eq!(env, variables(&server, &server.key));
    assert!(all.contains(&env) && page.contains(&env.replace(&server.key, connect::PLACEHOLDER)), "{all}\n{page}");
    for client in CLIENTS {
        let file = std::fs::read_to_string(example(client.file)).unwrap();
        assert_eq!(ask(&[client.word]).await, file, "{}", client.word);
        assert!(all.contains(&file) && page.contains(&format!("<pre>{file}</pre>")), "{}", client.word);
    }
    let told: Value = serde_json::from_str(&ask(&["--json"]).await).unwrap();
    let clients = told["clients"].as_array().unwrap();
    assert_eq!((clients.len(), &told["url"], &told["closed"]), (CLIENTS.len(), &json!(server.url), &json!([])));
    assert_eq!(clients[0]["text"], json!(std::fs::read_to_string(example("curl.sh")).unwrap()));
}

/// Runs a cell in a kernel of its own: what it has printed.
async fn cell(server: &Server, url: &str, token: &str) -> String {
    let asked = server.bare_at(Method::POST, &format!("{url}api/kernels?token={token}")).send().await.unwrap();
    let (status, told) = (asked.status(), asked.text().await.unwrap());
    assert_eq!(status, 201, "{told}");
    let kernel = text(&serde_json::from_str::<Value>(&told).unwrap()["id"]);
    let socket = format!("{}api/kernels/{kernel}/channels?token={token}", url.replacen("http", "ws", 1));
    let (mut socket, _) = tokio_tungstenite::connect_async(socket).await.unwrap();
    let header = json!({"msg_id": "m", "msg_type": "execute_request", "username": "user", "session": "s", "date": "", "version": "5.3"});
    let content = json!({
        "code": "print(40 + 2)", "silent": false, "store_history": true, "user_expressions": {}, "allow_stdin": false, "stop_on_error": true,
    });
    let message =
        json!({"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"});
    socket.send(Message::text(message.to_string())).await.unwrap();
    let mut printed = String::new();
    loop {
        let frame = tokio::time::timeout(NEVER, socket.next()).await.expect("a message in time").unwrap().unwrap();
        let Message::Text(frame) = frame else { continue };
        let said: Value = serde_json::from_str(&frame).unwrap();
        if said["parent_header"]["msg_id"] != "m" {
            continue;
        }
        match said["msg_type"].as_str() {
            Some("stream") => printed += &text(&said["content"]["text"]),
            Some("status") if said["content"]["execution_state"] == "idle" => break,
            _ => {}
        }
    }
    let gone =
        server.bare_at(Method::DELETE, &format!("{url}api/kernels/{kernel}?token={token}")).send().await.unwrap();
    assert_eq!(gone.status(), 204);
    printed
}
