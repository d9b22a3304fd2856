//! The examples as they stand, each against a server in this process: what it prints with a key, and that it fails without one.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{FutureExt, SinkExt, StreamExt};
use reqwest::Method;
use serde_json::{Value, json};
use server::{Case, NEVER, Server, text};
use tokio_tungstenite::tungstenite::Message;

const SETTINGS: &str = "default_template = \"python\"\ndoors.classic.enabled = true\n";

/// What runs an example by itself, where it runs, and what it prints.
const PROGRAMS: [(&str, &str, &str); 8] = [
    ("curl.sh", "bash", r#""stdout":"42\n""#),
    ("httpx_sync.py", "target/clients/bin/python", "ok \nok 42\n"),
    ("httpx_async.py", "target/clients/bin/python", "ok 0\nok 1\nok 4\n"),
    ("httpx_stream.py", "target/clients/bin/python", "stdout step 0\nstdout step 1\nstdout step 2\n"),
    ("fetch.mjs", "node", "ok 42\n"),
    ("kernel_client.py", "target/jupyter/bin/python", "ok 42\n"),
    ("mcp_client.py", "target/clients/bin/python", "42\n"),
    ("classic.py", "target/clients/bin/python", "Session started successfully\n42\nSession ended successfully\n"),
];

/// Those that are for another program.
const OTHERS: [&str; 2] = ["jupyterlab.sh", "open-webui.env"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn example(name: &str) -> PathBuf {
    root().join("examples").join(name)
}

/// A command with the server's address and this key in its environment, and what `scripts/test-kernel` has made before all else.
fn command(program: &str, server: &Server, key: &str) -> Command {
    let path = if program.contains('/') { root().join(program) } else { program.into() };
    assert!(!program.contains('/') || path.exists(), "{} is not there; `make test-kernel` makes it", path.display());
    let mut command = Command::new(path);
    command.env("CELLBLOCK_URL", &server.url).env("CELLBLOCK_API_KEY", key).env("NO_PROXY", "127.0.0.1");
    command
}

async fn run(program: &'static str, server: &Server, key: &str, name: &str) -> Output {
    let mut command = command(program, server, key);
    // Without the script's folder among Python's modules.
    command.args(program.ends_with("python").then_some("-P")).arg(example(name));
    tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn examples_do_what_they_say() {
    all_are_run_and_told_of();
    let server = Server::start(SETTINGS).await;
    let programs = PROGRAMS
        .map(|(name, program, prints)| -> Case { (name, works(Arc::clone(&server), name, program, prints).boxed()) });
    let others = cases!(server; jupyterlab_has_its_kernels_here, open_webui_gets_through);
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
