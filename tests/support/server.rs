//! A whole server in this process, under an instance's name of its own, and what tests need to speak HTTP to it.
//!
//! [`Server::finish`] stops it and fails if a container is left. Nothing here knows what is tested.
#![allow(dead_code, reason = "each test takes a part of it")]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bollard::Docker;
use bollard::query_parameters::{
    ListContainersOptionsBuilder, ListVolumesOptionsBuilder, RemoveContainerOptionsBuilder, RemoveVolumeOptionsBuilder,
};
use cellblock::app::{self, Plane, Process, Stop, front};
use cellblock::config::{self, Config, Drain, DrainContainers, Environment, Inputs};
use cellblock::egress::Outside;
use cellblock::http;
use cellblock::service::keys::{self, ConfiguredKey, Principal, Scope};
use cellblock::task;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use reqwest::header::HeaderMap;
use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// How long anything may take before it counts as never.
pub const NEVER: Duration = Duration::from_secs(60);

/// A server that runs in this process.
pub struct Server {
    /// `http://127.0.0.1:…`
    pub url: String,
    /// The key that requests carry unless they say otherwise.
    pub key: String,
    /// Key of another tenant, where there is one.
    pub other_key: String,
    /// Key of the first tenant that may not work with sessions, where there is one.
    pub powerless_key: String,
    /// The name of this server on the engine.
    pub instance: String,
    /// Docker without anything between.
    pub docker: Docker,
    http: reqwest::Client,
    stop: CancellationToken,
    ended: Mutex<Option<oneshot::Receiver<Result<(), String>>>>,
    config: Config,
    folder: Arc<tempfile::TempDir>,
}

/// Where a server runs that is started in this process.
struct Ground {
    folder: Arc<tempfile::TempDir>,
    outside: Outside,
}

impl From<Arc<tempfile::TempDir>> for Ground {
    fn from(folder: Arc<tempfile::TempDir>) -> Self {
        Self { folder, outside: Outside::default() }
    }
}

impl Server {
    /// Starts one as `cellblock serve` does. `settings` is a configuration file laid over what every test needs.
    pub async fn start(settings: &str) -> Arc<Self> {
        let (folder, config) = configured(settings);
        Self::serve(config, Arc::new(folder)).await
    }

    /// The same, whose sessions' connections meet this instead of the world.
    pub async fn start_within(settings: &str, outside: Outside) -> Arc<Self> {
        let (folder, config) = configured(settings);
        let ground = Ground { folder: Arc::new(folder), outside };
        Self::serve_on(config, ground).await.unwrap_or_else(|error| panic!("the server did not start: {error}"))
    }

    /// Ends this one, then starts one with the same configuration, folder and key; `between` is called when neither runs. Only
    /// for what [`Server::start`] started.
    pub async fn start_again(&self, between: impl FnOnce(&Path)) -> Arc<Self> {
        self.finish().await.unwrap_or_else(|left| panic!("{left}"));
        between(self.data());
        Self::serve(self.config.clone(), Arc::clone(&self.folder)).await
    }

    /// The same where containers stay.
    pub async fn start_again_keeping(&self) -> Arc<Self> {
        let ended = self.ended.lock().expect("a lock").take().expect("a server that was not stopped before");
        self.stop.cancel();
        ended.await.expect("an end").unwrap_or_else(|error| panic!("{error}"));
        let config = Config { drain: Drain { containers: DrainContainers::Remove }, ..self.config.clone() };
        Self::serve(config, Arc::clone(&self.folder)).await
    }

    /// The same with another build of the guest, as after an upgrade.
    pub async fn start_newer_keeping(&self) -> Arc<Self> {
        let ended = self.ended.lock().expect("a lock").take().expect("a server that was not stopped before");
        self.stop.cancel();
        ended.await.expect("an end").unwrap_or_else(|error| panic!("{error}"));
        let mut config = Config { drain: Drain { containers: DrainContainers::Remove }, ..self.config.clone() };
        let mut guest = std::fs::read(config.guest.binary.as_ref().expect("a guest")).expect("a guest");
        // What comes after a program's end is no part of it.
        guest.push(0);
        let newer = self.folder.path().join("newer-guest");
        std::fs::write(&newer, guest).expect("a file");
        config.guest.binary = Some(newer);
        Self::serve(config, Arc::clone(&self.folder)).await
    }

    /// Starts one of the same name on the same engine, with a data folder of its own.
    pub async fn rival(&self) -> Result<Arc<Self>, String> {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = self.config.clone();
        config.server.data_dir = folder.path().join("data");
        config.server.api_key_file = None;
        Self::try_serve(config, Arc::new(folder)).await
    }

    async fn serve(config: Config, folder: Arc<tempfile::TempDir>) -> Arc<Self> {
        Self::try_serve(config, folder).await.unwrap_or_else(|error| panic!("the server did not start: {error}"))
    }

    /// Starts one of a configuration that was read before; an error is why it did not start.
    pub async fn try_serve(config: Config, folder: Arc<tempfile::TempDir>) -> Result<Arc<Self>, String> {
        Self::serve_on(config, folder.into()).await
    }

    async fn serve_on(config: Config, ground: Ground) -> Result<Arc<Self>, String> {
        let Ground { folder, outside } = ground;
        let (address_in, address) = oneshot::channel();
        let (ended_in, ended) = oneshot::channel();
        let stop = CancellationToken::new();
        let (serving, asked, told) = (config.clone(), stop.clone(), Stop::default());
        let wish = told.clone();
        task::spawn("stop", async move {
            asked.cancelled().await;
            wish.at_once();
        });
        task::spawn("server", async move {
            let ready = |address| {
                let _ = address_in.send(address);
            };
            let served = app::serve(&serving, Process { stop: told, outside, ..Process::default() }, ready).await;
            let _ = ended_in.send(served.map_err(|e| e.to_string()));
        });
        let Ok(address) = address.await else {
            return Err(ended.await.expect("an end").expect_err("it ended before it was ready"));
        };
        let key = std::fs::read_to_string(config.server.key_file()).expect("a key file").trim().to_owned();
        Ok(Self::new(address, [key, String::new(), String::new()], config, (stop, ended), folder))
    }

    /// Starts one with three keys: two tenants', and one without scopes.
    pub async fn start_with_tenants(settings: &str) -> Arc<Self> {
        let (folder, config) = configured(settings);
        let keys = [(); 3].map(|()| keys::generate().expect("random bytes"));
        let plane = Plane::start(&config, true).await.unwrap_or_else(|e| panic!("the server did not start: {e}"));
        for (key, (tenant, scopes)) in keys.iter().zip([("one", 1), ("two", 1), ("one", 0)]) {
            let principal = Principal::new(tenant, vec![Scope::Sessions; scopes]);
            let hash = keys::hash(key).expect("a key");
            plane
                .keys
                .add(ConfiguredKey { hash, name: tenant.to_owned(), principal, expires_at: None })
                .expect("a key");
        }
        let listener = TcpListener::bind(config.server.listen).await.expect("an address");
        let address = listener.local_addr().expect("an address");
        let connections = front::connections(&config).expect("a certificate");
        let app = front::app(&config, &plane);
        let (stop, closing) = (CancellationToken::new(), CancellationToken::new());
        let (ended_in, ended) = oneshot::channel();
        let (asked, closed) = (stop.clone(), closing.clone());
        task::spawn("server", async move {
            let drain = async {
                asked.cancelled().await;
                let left = plane.stop(std::future::ready(())).await;
                closing.cancel();
                left
            };
            let ((), left) = tokio::join!(http::serve(listener, app, connections, closed), drain);
            let _ = ended_in.send(if left == 0 { Ok(()) } else { Err(format!("{left} sessions are left")) });
        });
        Self::new(address, keys, config, (stop, ended), Arc::new(folder))
    }

    /// Starts the program itself, and answers with its process id too.
    pub async fn spawn(settings: &str) -> (Arc<Self>, u32) {
        let (folder, config) = configured(settings);
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
        Self::spawn_in(config, Arc::new(folder), free).await
    }

    /// Kills the program with this process id, and waits until it is gone.
    pub async fn kill(&self, pid: u32) {
        let killed = Command::new("kill").args(["-9", &pid.to_string()]).status().expect("a command");
        assert!(killed.success());
        let ended = self.ended.lock().expect("a lock").take().expect("a server that was not stopped before");
        self.stop.cancel();
        // It has not ended as it should, which was wanted.
        let _ = tokio::time::timeout(NEVER, ended).await.expect("an end");
    }

    /// Waits until the program with this process id has ended by itself; an error says how, if not well.
    pub async fn gone(&self, pid: u32) -> Result<(), String> {
        let began = Instant::now();
        // Its parent takes note of the end below; until then it is a zombie.
        while !std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z ")) {
            assert!(began.elapsed() < NEVER, "the program does not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let ended = self.ended.lock().expect("a lock").take().expect("a server that was not stopped before");
        self.stop.cancel();
        tokio::time::timeout(NEVER, ended).await.expect("an end").expect("an end")
    }

    /// Starts the program again, after a [`Server::kill`], with the same configuration, folder, key and address.
    pub async fn spawn_again(&self) -> (Arc<Self>, u32) {
        let address = self.url.trim_start_matches("http://").parse().expect("an address");
        Self::spawn_in(self.config.clone(), Arc::clone(&self.folder), address).await
    }

    /// Starts the program with what [`configuration`] has made, at an address that is free.
    pub async fn spawn_in(config: Config, folder: Arc<tempfile::TempDir>, address: SocketAddr) -> (Arc<Self>, u32) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
        let log = folder.path().join("log");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(log).expect("a file");
        command.args(["serve", "--listen", &address.to_string()]).stderr(log);
        for name in ["base.toml", "test.toml"] {
            command.arg("--config").arg(folder.path().join(name));
        }
        let mut program = Program(command.spawn().expect("the program"));
        let pid = program.0.id();
        let began = Instant::now();
        while reqwest::get(format!("http://{address}/livez")).await.is_err() {
            assert!(program.0.try_wait().is_ok_and(|ended| ended.is_none()), "the program has ended");
            assert!(began.elapsed() < NEVER, "the program does not answer");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let (stop, (ended_in, ended)) = (CancellationToken::new(), oneshot::channel());
        let asked = stop.clone();
        task::spawn("program", async move {
            asked.cancelled().await;
            let ended = Command::new("kill").args(["-INT", &pid.to_string()]).status();
            let ended = ended.and_then(|_| tokio::task::block_in_place(|| program.0.wait()));
            let _ = ended_in.send(match ended {
                Ok(status) if status.success() => Ok(()),
                other => Err(format!("the program: {other:?}")),
            });
        });
        let key = std::fs::read_to_string(config.server.key_file()).expect("a key file").trim().to_owned();
        (Self::new(address, [key, String::new(), String::new()], config, (stop, ended), folder), pid)
    }

    fn new(
        address: SocketAddr,
        [key, other_key, powerless_key]: [String; 3],
        config: Config,
        (stop, ended): (CancellationToken, oneshot::Receiver<Result<(), String>>),
        folder: Arc<tempfile::TempDir>,
    ) -> Arc<Self> {
        let http = reqwest::Client::builder().timeout(2 * NEVER).no_proxy().build().expect("a client");
        Arc::new(Self {
            url: format!("http://{address}"),
            key,
            other_key,
            powerless_key,
            instance: config.engine.instance.clone(),
            docker: Docker::connect_with_socket_defaults().expect("a Docker engine on this machine"),
            http,
            stop,
            ended: Mutex::new(Some(ended)),
            config,
            folder,
        })
    }

    /// The folder of what it keeps.
    pub fn data(&self) -> &Path {
        &self.config.server.data_dir
    }

    /// Runs cases, some at once; then ends the server, looks for leftovers, and fails with the names of all cases that failed.
    pub async fn run_and_finish(self: Arc<Self>, at_once: usize, cases: Vec<Case>) {
        let failed = run(at_once, cases).await;
        let left = self.finish().await;
        assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
        left.unwrap_or_else(|left| panic!("{left}"));
    }

    /// Ends the server. An error says what it left, which is removed then.
    pub async fn finish(&self) -> Result<(), String> {
        let ended = self.ended.lock().expect("a lock").take().expect("a server that was not stopped before");
        self.stop.cancel();
        let outcome = tokio::time::timeout(NEVER, ended).await.map_err(|_| "the server does not stop".to_owned());
        let mut left = Vec::new();
        for name in self.on_engine(&self.label()).await {
            let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
            match self.docker.remove_container(&name, Some(options)).await {
                Ok(()) => left.push(name),
                // A busy engine may still be at the removal that the server has asked for.
                Err(bollard::errors::Error::DockerResponseServerError { status_code: 404 | 409, .. }) => {}
                Err(error) => panic!("{name}: {error}"),
            }
        }
        self.remove_volumes().await;
        outcome?.map_err(|_| "the server's task panicked".to_owned())??;
        // The instance's name stays taken by one that keeps its containers.
        let kept = (self.config.drain.containers == DrainContainers::Keep)
            .then(|| format!("cellblock-{}-lock", self.instance));
        let left: Vec<_> = left.into_iter().filter(|name| Some(name) != kept.as_ref()).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("the server left containers: {left:?}")) }
    }

    async fn remove_volumes(&self) {
        let options = ListVolumesOptionsBuilder::default().filters(&self.label()).build();
        let volumes = self.docker.list_volumes(Some(options)).await.expect("a list").volumes;
        for volume in volumes.into_iter().flatten() {
            let options = RemoveVolumeOptionsBuilder::default().build();
            self.docker.remove_volume(&volume.name, Some(options)).await.expect("a removal");
        }
    }

    fn label(&self) -> HashMap<&'static str, Vec<String>> {
        HashMap::from([("label", vec![format!("io.cellblock.instance={}", self.instance)])])
    }

    /// Names of this server's volumes, sorted.
    pub async fn volumes(&self) -> Vec<String> {
        let options = ListVolumesOptionsBuilder::default().filters(&self.label()).build();
        let found = self.docker.list_volumes(Some(options)).await.expect("a list").volumes;
        let mut names: Vec<String> = found.into_iter().flatten().map(|volume| volume.name).collect();
        names.sort();
        names
    }

    /// Names of this server's sessions' containers, running or not, that contain a text.
    pub async fn containers(&self, text: &str) -> Vec<String> {
        let mut labels = self.label();
        labels.entry("label").or_default().push("io.cellblock.role=cell".to_owned());
        self.on_engine(&labels).await.into_iter().filter(|name| name.contains(text)).collect()
    }

    async fn on_engine(&self, labels: &HashMap<&'static str, Vec<String>>) -> Vec<String> {
        let options = ListContainersOptionsBuilder::default().all(true).filters(labels).build();
        let found = self.docker.list_containers(Some(options)).await.expect("a list");
        let names = found.into_iter().flat_map(|c| c.names.unwrap_or_default());
        names.map(|n| n.trim_start_matches('/').to_owned()).collect()
    }

    /// A request without a key.
    pub fn bare(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url))
    }

    /// A request without a key to another address.
    pub fn bare_at(&self, method: Method, url: &str) -> RequestBuilder {
        self.http.request(method, url)
    }

    /// A request with the key.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.bare(method, path).bearer_auth(&self.key)
    }

    /// A request with the key of the other tenant.
    pub fn foreign(&self, method: Method, path: &str) -> RequestBuilder {
        self.bare(method, path).bearer_auth(&self.other_key)
    }

    /// Sends a request and reads the whole answer.
    pub async fn send(&self, request: RequestBuilder) -> Reply {
        let response = request.send().await.expect("an answer");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.expect("a whole answer");
        let json = serde_json::from_str(&text).unwrap_or(Value::Null);
        let reply = Reply { status, headers, text, json };
        reply.tells_nothing_of_the_inside(self);
        reply
    }

    /// `GET`.
    pub async fn get(&self, path: &str) -> Reply {
        self.send(self.request(Method::GET, path)).await
    }

    /// `POST` with a body; null stands for none.
    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        let request = self.request(Method::POST, path);
        self.send(if body.is_null() { request } else { request.json(body) }).await
    }

    /// `PATCH`.
    pub async fn patch(&self, path: &str, body: &Value) -> Reply {
        self.send(self.request(Method::PATCH, path).json(body)).await
    }

    /// `DELETE`.
    pub async fn delete(&self, path: &str) -> Reply {
        self.send(self.request(Method::DELETE, path)).await
    }

    /// Creates a session that is ready.
    pub async fn create(self: &Arc<Self>, body: Value) -> Cell {
        let reply = self.post("/v1/sessions", &body).await;
        assert_eq!((reply.status, &reply.json["state"]), (201, &json!("ready")), "{body}: {}", reply.text);
        Cell { server: Arc::clone(self), id: text(&reply.json["id"]), view: reply.json }
    }

    /// Creates a session of the smallest template.
    pub async fn cell(self: &Arc<Self>) -> Cell {
        self.create(json!({"template": "python"})).await
    }

    /// Sends a request that is answered with server-sent events.
    pub async fn events_of(&self, request: RequestBuilder) -> Follow {
        Follow::new(request.send().await.expect("an answer"), Form::Sse)
    }

    /// Follows an execution's events from after number `after` on.
    pub async fn follow(&self, execution: &str, after: u64) -> Follow {
        let request = self.request(Method::GET, &format!("/v1/executions/{execution}/events"));
        let request = if after > 0 { request.header("last-event-id", after) } else { request };
        Follow::new(request.send().await.expect("an answer"), Form::Sse)
    }

    /// An execution as it is.
    pub async fn execution(&self, execution: &str) -> Value {
        let reply = self.get(&format!("/v1/executions/{execution}")).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        reply.json
    }

    /// Waits for the end of an execution and answers with it.
    pub async fn ended(&self, execution: &str) -> Value {
        self.follow(execution, 0).await.rest().await;
        let reply = self.get(&format!("/v1/executions/{execution}")).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        reply.json
    }
}

impl Drop for Server {
    /// A test that panics early still stops its server; the task does the rest while the runtime lives.
    fn drop(&mut self) {
        self.stop.cancel();
        let finished = self.ended.lock().map(|e| e.is_none()).unwrap_or(true);
        assert!(finished || std::thread::panicking(), "a test forgot to finish its server");
    }
}

/// A process that does not outlive its test.
struct Program(std::process::Child);

impl Drop for Program {
    fn drop(&mut self) {
        // One that has ended is not there to be killed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The configuration of a test: a name and a folder of its own, any free port, the guest that was built for tests.
fn configured(settings: &str) -> (tempfile::TempDir, Config) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path
    };
    let id = uuid::Uuid::new_v4().simple().to_string();
    let base = format!(
        "[server]\nlisten = \"127.0.0.1:0\"\ndata_dir = {:?}\n[engine]\ninstance = \"t{}\"\norphan_timeout = \"3m\"\n[drain]\ncontainers = \"remove\"\n[guest]\nbinary = {:?}\n",
        folder.path().join("data"),
        &id[..12],
        guest(),
    );
    let inputs = Inputs { files: vec![file("base.toml", &base), file("test.toml", settings)], ..Inputs::default() };
    let loaded = config::load(&inputs).unwrap_or_else(|mistakes| panic!("{mistakes}"));
    (folder, loaded.config)
}

/// Reads a test's configuration without starting anything.
pub fn configuration(settings: &str) -> (tempfile::TempDir, Config) {
    configured(settings)
}

/// The guest as it is built for containers, where the server looks for it too: beside the binary.
fn guest() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_cellblock")).with_file_name("cellblock-guest");
    assert!(path.exists(), "{} is not there; run `make guest`", path.display());
    path
}

/// An answer, read whole.
pub struct Reply {
    /// Its status.
    pub status: u16,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub text: String,
    /// Its body as JSON; null when it is none.
    pub json: Value,
}

impl Reply {
    /// A header, empty when absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
    }

    /// Checks that this is a well-formed problem of a kind, and answers with its body.
    #[track_caller]
    pub fn problem(&self, status: u16, code: &str) -> &Value {
        let body = &self.json;
        assert_eq!((self.status, body["code"].as_str()), (status, Some(code)), "{}", self.text);
        self.is_a_problem();
        body
    }

    /// Checks that this is a well-formed problem, of whatever kind.
    #[track_caller]
    pub fn is_a_problem(&self) {
        let body = &self.json;
        assert_eq!(self.header("content-type"), "application/problem+json", "{}", self.text);
        assert_eq!(body["status"], json!(self.status), "{}", self.text);
        let code = body["code"].as_str().expect("a code");
        assert!(text(&body["type"]).ends_with(&format!("/problems/{code}")), "{}", self.text);
        assert!(
            ["title", "detail", "request_id"].iter().all(|k| body[k].as_str().is_some_and(|v| !v.is_empty())),
            "{}",
            self.text
        );
        assert_eq!(body["request_id"], self.header("x-request-id"), "{}", self.text);
        assert!(body["retryable"].is_boolean(), "{}", self.text);
        assert_eq!(self.header("retry-after").is_empty(), body["retry_after_seconds"].is_null(), "{}", self.text);
    }

    /// The pointers of the fields that are wrong, sorted.
    pub fn pointers(&self) -> Vec<String> {
        let errors = self.json["errors"].as_array().cloned().unwrap_or_default();
        let mut pointers: Vec<_> = errors.iter().map(|e| text(&e["pointer"])).collect();
        pointers.sort();
        pointers
    }

    /// No refusal says where things are on this machine, what the engine said, or what the key is.
    #[track_caller]
    fn tells_nothing_of_the_inside(&self, server: &Server) {
        if self.status < 400 {
            return;
        }
        let secrets = [&server.key, &server.other_key, &server.powerless_key];
        let inside = [
            "docker.sock",
            "/var/lib",
            env!("CARGO_MANIFEST_DIR"),
            ".rs:",
            "panicked",
            "hyper",
            "bollard",
            "io.cellblock",
            "cellblock-t",
        ];
        let told = inside
            .into_iter()
            .chain(secrets.into_iter().map(String::as_str))
            .find(|s| !s.is_empty() && self.text.contains(s));
        assert_eq!(told, None, "a problem tells of the inside: {}", self.text);
    }
}

/// A session.
pub struct Cell {
    /// Its server.
    pub server: Arc<Server>,
    /// Its id.
    pub id: String,
    /// What the server said of it when it was created.
    pub view: Value,
}

impl Cell {
    /// A path below this session's.
    pub fn path(&self, below: &str) -> String {
        format!("/v1/sessions/{}{below}", self.id)
    }

    /// Runs code to its end.
    pub async fn run(&self, code: &str) -> Value {
        self.execute(json!({"code": code})).await
    }

    /// Runs code to its end, with more than code in the request.
    pub async fn execute(&self, request: Value) -> Value {
        let reply = self.server.post(&self.path("/executions"), &request).await;
        assert_eq!(reply.status, 200, "{request}: {}", reply.text);
        reply.json
    }

    /// Runs code that must end well; answers with what it printed, or else with the text of its last value.
    pub async fn value(&self, code: &str) -> String {
        let ran = self.run(code).await;
        assert_eq!(ran["status"], "ok", "{code}: {ran}");
        match ran["results"].as_array().and_then(|r| r.last()) {
            Some(result) => text(&result["data"]["text/plain"]),
            None => text(&ran["stdout"]).trim().to_owned(),
        }
    }

    /// Runs code that must end well and print JSON.
    pub async fn json(&self, code: &str) -> Value {
        let printed = self.value(code).await;
        serde_json::from_str(&printed).unwrap_or_else(|_| panic!("{printed}"))
    }

    /// Starts code and answers with the execution's id.
    pub async fn background(&self, code: &str) -> String {
        let reply = self.server.post(&self.path("/executions"), &json!({"code": code, "background": true})).await;
        assert_eq!(reply.status, 202, "{}", reply.text);
        assert_eq!(reply.header("location"), format!("/v1/executions/{}", text(&reply.json["id"])));
        text(&reply.json["id"])
    }

    /// Starts code and waits until it has printed something.
    pub async fn background_until_output(&self, code: &str) -> String {
        let id = self.background(code).await;
        let mut follow = self.server.follow(&id, 0).await;
        while let Some(seen) = follow.next().await {
            if seen.kind == "stdout" {
                return id;
            }
            assert_ne!(seen.kind, "execution.completed", "{}", seen.data);
        }
        panic!("the events of {id} broke off");
    }

    /// Runs code and follows its events in the answer itself.
    pub async fn stream(&self, request: Value, form: Form) -> Follow {
        let accept = match form {
            Form::Sse => "text/event-stream",
            Form::Lines => "application/x-ndjson",
        };
        let request =
            self.server.request(Method::POST, &self.path("/executions")).header("accept", accept).json(&request);
        let response = request.send().await.expect("an answer");
        assert_eq!(response.status(), 200);
        assert!(response.headers()["content-type"].to_str().is_ok_and(|t| t.starts_with(accept)));
        Follow::new(response, form)
    }

    /// What the server says of it now.
    pub async fn look(&self) -> Value {
        self.server.get(&self.path("")).await.json
    }

    /// Waits for a state and answers with what the server says of it then.
    pub async fn wait(&self, state: &str) -> Value {
        let reply = self.server.get(&self.path(&format!("/wait?state={state}&timeout_seconds=60"))).await;
        assert_eq!((reply.status, &reply.json["state"]), (200, &json!(state)), "{}", reply.text);
        reply.json
    }

    /// Its containers.
    pub async fn containers(&self) -> Vec<String> {
        self.server.containers(&self.id).await
    }

    /// Checks that it still works.
    pub async fn works(&self) {
        assert_eq!(self.value("40 + 2").await, "42");
    }

    /// Ends it.
    pub async fn delete(&self) {
        let reply = self.server.delete(&self.path("")).await;
        assert_eq!((reply.status, &reply.json["state"]), (200, &json!("ended")), "{}", reply.text);
    }
}

/// How events are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Server-sent events.
    Sse,
    /// A JSON object a line.
    Lines,
}

/// An event as it arrived.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Its type.
    pub kind: String,
    /// Its number.
    pub seq: u64,
    /// Its body.
    pub data: Value,
    /// When it arrived.
    pub at: Instant,
}

/// The events of an execution, as they arrive.
pub struct Follow {
    response: Response,
    form: Form,
    buffer: String,
}

impl Follow {
    fn new(response: Response, form: Form) -> Self {
        assert_eq!(response.status(), 200);
        Self { response, form, buffer: String::new() }
    }

    /// The next event; nothing after the last.
    pub async fn next(&mut self) -> Option<Seen> {
        let end = if self.form == Form::Sse { "\n\n" } else { "\n" };
        loop {
            if let Some(at) = self.buffer.find(end) {
                let rest = self.buffer.split_off(at + end.len());
                let block = std::mem::replace(&mut self.buffer, rest);
                if let Some(seen) = self.read(block.trim_end()) {
                    return Some(seen);
                }
                continue;
            }
            let chunk = tokio::time::timeout(NEVER, self.response.chunk()).await.expect("an event in time");
            let Some(chunk) = chunk.expect("a whole answer") else {
                assert_eq!(self.buffer, "", "the stream broke off within an event");
                return None;
            };
            self.buffer.push_str(std::str::from_utf8(&chunk).expect("no event is cut within a character"));
        }
    }

    /// Reads on to the next event of a kind.
    pub async fn until(&mut self, kind: &str) -> Seen {
        while let Some(seen) = self.next().await {
            if seen.kind == kind {
                return seen;
            }
            assert_ne!(seen.kind, "execution.completed", "there was no {kind}: {}", seen.data);
        }
        panic!("the events broke off before a {kind}");
    }

    /// All events that are still to come.
    pub async fn rest(mut self) -> Vec<Seen> {
        let mut all = Vec::new();
        while let Some(seen) = self.next().await {
            all.push(seen);
        }
        all
    }

    fn read(&self, block: &str) -> Option<Seen> {
        let at = Instant::now();
        if self.form == Form::Lines {
            let data: Value = serde_json::from_str(block).expect("a line of JSON");
            return Some(Seen { kind: text(&data["type"]), seq: data["seq"].as_u64().expect("a number"), data, at });
        }
        let field = |name: &str| block.lines().find_map(|l| l.strip_prefix(name)).map(|v| v.trim_start().to_owned());
        let data = serde_json::from_str(&field("data:")?).expect("data that is JSON");
        // Events that can't be taken up again have no number.
        let seq = field("id:").map_or(0, |id| id.parse().expect("a number"));
        Some(Seen { kind: field("event:")?, seq, data, at })
    }
}

/// The text of a JSON string; anything else as JSON.
pub fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// The text of one stream in events.
pub fn joined(events: &[Seen], kind: &str) -> String {
    events.iter().filter(|e| e.kind == kind).map(|e| text(&e.data["text"])).collect()
}

/// Something to be tested, and its name.
pub type Case = (&'static str, BoxFuture<'static, ()>);

/// Functions of a server as cases, by their names.
#[macro_export]
macro_rules! cases {
    ($server:expr; $($name:ident),* $(,)?) => {
        vec![$((stringify!($name), Box::pin($name(std::sync::Arc::clone(&$server))) as futures_util::future::BoxFuture<'static, ()>)),*]
    };
}

/// Runs cases, some at once. Answers with what failed. `CASES=word` runs only those with the word in their names.
pub async fn run(at_once: usize, cases: Vec<Case>) -> Vec<String> {
    let environment = Environment::capture();
    let wanted = environment.get("CASES").unwrap_or_default();
    let chosen = cases.into_iter().filter(|(name, _)| name.contains(wanted));
    let running = futures_util::stream::iter(chosen).map(|(name, case)| async move {
        let began = Instant::now();
        let outcome = tokio::time::timeout(2 * NEVER, AssertUnwindSafe(case).catch_unwind()).await;
        println!("{name}: {:.1} s", began.elapsed().as_secs_f64());
        match outcome {
            Ok(Ok(())) => None,
            Ok(Err(panic)) => Some(format!("  {name}: {}", said(&*panic))),
            Err(_) => Some(format!("  {name}: did not end")),
        }
    });
    running.buffer_unordered(at_once).filter_map(|failed| async { failed }).collect().await
}

fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let owned = panic.downcast_ref::<String>().cloned();
    owned.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_else(|| "a panic".to_owned())
}
