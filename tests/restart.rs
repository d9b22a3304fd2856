//! A whole server whose engine restarts: an engine of its own, in a network namespace of its own, so that nobody else's stops. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use server::{Cell, Server, joined, text};

const SETTINGS: &str = r#"
[limits]
sessions = 2
create_wait = "2s"
[templates.small]
image = "cellblock/python:latest"
[templates.small.default]
memory = "160MiB"
disk = "16MiB"
tmp = "16MiB"
"#;

/// Numbers that are printed while the engine is away and after it.
const NUMBERS: usize = 15;

/// An engine that belongs to one test. What holds its containers is a process of its own, as where a service manager starts both.
struct Engine {
    runtime: Child,
    daemon: Child,
    folder: PathBuf,
}

impl Engine {
    fn start(folder: &Path) -> Self {
        let at = |name: &str| folder.join(name).display().to_string();
        std::fs::write(at("containerd.toml"), "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n")
            .unwrap();
        std::fs::write(at("daemon.json"), "{}").unwrap();
        let mut command = logged("containerd", folder);
        command.args(["--config", &at("containerd.toml"), "--address", &at("containerd.sock")]);
        let runtime = command.args(["--root", &at("root"), "--state", &at("state")]).spawn().unwrap();
        let daemon = Self::daemon(folder, true);
        let engine = Self { runtime, daemon, folder: folder.to_owned() };
        engine.answers();
        engine
    }

    /// With `live_restore`, containers live on when it ends.
    fn daemon(folder: &Path, live_restore: bool) -> Child {
        let at = |name: &str| folder.join(name).display().to_string();
        let mut command = logged("unshare", folder);
        command
            .args(["--net", "dockerd", "--bridge", "none", "--iptables=false", "--ip-forward=false", "--ip-masq=false"])
            .args([
                "--containerd",
                &at("containerd.sock"),
                "--config-file",
                &at("daemon.json"),
                "--pidfile",
                &at("pid"),
            ])
            .args(["--data-root", &at("data"), "--exec-root", &at("exec")])
            .args(["--host", &format!("unix://{}", at("docker.sock")), &format!("--live-restore={live_restore}")])
            .spawn()
            .unwrap()
    }

    fn answers(&self) {
        let began = Instant::now();
        while !self.docker(&["version"]).status().unwrap().success() {
            let log = || std::fs::read_to_string(self.folder.join("log")).unwrap();
            assert!(began.elapsed() < Duration::from_secs(60), "{}", log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn again(&mut self, live_restore: bool) {
        self.daemon = Self::daemon(&self.folder, live_restore);
        self.answers();
    }

    fn docker(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        let host = format!("unix://{}", self.folder.join("docker.sock").display());
        command.env("DOCKER_HOST", host).args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// The image, from the engine that has it.
    fn load(&self, image: &str) {
        let mut from = Command::new("docker").args(["save", image]).stdout(Stdio::piped()).spawn().unwrap();
        let loaded = self.docker(&["load"]).stdin(from.stdout.take().unwrap()).status().unwrap();
        assert!(
            from.wait().unwrap().success() && loaded.success(),
            "{image} could not be copied; `make images` builds it"
        );
    }

    fn end(&mut self, signal: &str) {
        end(&mut self.daemon, signal);
    }

    fn names(&self) -> String {
        let all = self.docker(&["ps", "--all", "--format", "{{.Names}}"]).stdout(Stdio::piped()).output().unwrap();
        String::from_utf8(all.stdout).unwrap()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // A test that fails must not leave containers, nor what was mounted for them.
        let names = self.names();
        let names: Vec<&str> = names.split_whitespace().collect();
        let _ = self.docker(&[&["rm", "--force"], names.as_slice()].concat()).status();
        end(&mut self.daemon, "-TERM");
        end(&mut self.runtime, "-TERM");
        // It has mounted its folder on itself.
        let _ = Command::new("umount").arg(self.folder.join("data")).stderr(Stdio::null()).status();
    }
}

fn logged(program: &str, folder: &Path) -> Command {
    let log = std::fs::File::options().create(true).append(true).open(folder.join("log")).unwrap();
    let mut command = Command::new(program);
    command.stdout(log.try_clone().unwrap()).stderr(log);
    command
}

fn end(process: &mut Child, signal: &str) {
    let _ = Command::new("kill").args([signal, &process.id().to_string()]).status();
    let _ = process.wait();
}

async fn create(server: &Arc<Server>) -> Cell {
    let reply = server.post("/v1/sessions", &json!({"template": "small"})).await;
    assert_eq!((reply.status, &reply.json["state"]), (201, &json!("ready")), "{}", reply.text);
    Cell { server: Arc::clone(server), id: text(&reply.json["id"]), view: reply.json.clone() }
}

async fn readiness(server: &Arc<Server>, status: u16) {
    let became = async {
        while server.get("/readyz").await.status != status {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), became).await.expect("another readiness");
}

/// The engine ends and comes back while code runs, and its containers live on.
async fn goes_on(server: &Arc<Server>, engine: &mut Engine, signal: &str) {
    let (busy, quiet) = (create(server).await, create(server).await);
    quiet.run("x = 41").await;
    let code = format!("import time\nfor i in range({NUMBERS}):\n    print(i)\n    time.sleep(1)");
    let printed = busy.background_until_output(&code).await;
    engine.end(signal);
    readiness(server, 503).await;
    let asked = quiet.execute(json!({"code": "x + 1", "timeout_seconds": 120}));
    let restarted = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        tokio::task::block_in_place(|| engine.again(true));
    };
    let (answer, ()) = tokio::join!(asked, restarted);
    assert_eq!(answer["results"][0]["data"]["text/plain"], "42", "{signal}: {answer}");
    let events = server.follow(&printed, 0).await.rest().await;
    let expected: String = (0..NUMBERS).map(|i| format!("{i}\n")).collect();
    assert_eq!(joined(&events, "stdout"), expected, "{signal}");
    readiness(server, 200).await;
    for cell in [busy, quiet] {
        assert_eq!(cell.look().await["end_reason"], Value::Null);
        cell.delete().await;
    }
}

/// The engine stops its containers as it ends, which it does by itself without `live-restore`.
async fn ends(server: &Arc<Server>, engine: &mut Engine) {
    engine.end("-TERM");
    tokio::task::block_in_place(|| engine.again(false));
    readiness(server, 200).await;
    let (busy, quiet) = (create(server).await, create(server).await);
    let running = busy.background_until_output("import time\nprint(1)\ntime.sleep(100)").await;
    tokio::task::block_in_place(|| engine.end("-TERM"));
    tokio::task::block_in_place(|| engine.again(false));
    for cell in [busy, quiet] {
        let ended = cell.wait("ended").await;
        assert_eq!(ended["end_reason"], "lost", "{ended}");
    }
    assert_eq!(server.ended(&running).await["status"], "lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_restarts_costs_what_it_stops_and_nothing_else() {
    let id = Command::new("id").arg("-u").output().unwrap();
    if id.stdout != b"0\n" {
        println!("skipped: only root can start an engine of a test's own");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(folder.path());
    engine.load("cellblock/python:latest");
    let socket = folder.path().join("docker.sock");
    let server = Server::start(&format!("{SETTINGS}\n[engine]\nhost = \"unix://{}\"", socket.display())).await;
    goes_on(&server, &mut engine, "-TERM").await;
    goes_on(&server, &mut engine, "-KILL").await;
    ends(&server, &mut engine).await;
    // Every place can be had again, without a restart of ours.
    let cells = [create(&server).await, create(&server).await];
    for cell in cells {
        cell.works().await;
        cell.delete().await;
    }
    let round = server.post("/v1/admin/reconcile", &Value::Null).await;
    assert_eq!(round.json["errors"], json!([]), "{}", round.text);
    server.finish().await.unwrap();
    assert_eq!(engine.names(), "");
}
