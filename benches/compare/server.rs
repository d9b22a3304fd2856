//! A Cellblock server of the bench's own, on a free port, and requests to it.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{INSTANCE, Result, TEMPLATE};

const START: Duration = Duration::from_secs(30);

/// The server. Killed when dropped, without a drain: what it leaves on the engine is [`Engine`](crate::engine::Engine)'s.
pub struct Server {
    process: Child,
    /// Holds its data.
    _folder: TempDir,
    url: String,
    authorization: String,
    http: reqwest::Client,
}

impl Server {
    /// Starts it with its default configuration but for some settings, whatever stands in this machine's, and waits until it is ready.
    pub async fn start(settings: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let config = folder.path().join("bench.toml");
        fs::write(&config, settings)?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let process = Command::new(env!("CARGO_BIN_EXE_cellblock"))
            .args(["serve", "--set", &format!("engine.instance={INSTANCE}"), "--set", "log.level=warn"])
            .args(["--set", "drain.containers=remove"])
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .arg("--data-dir")
            .arg(folder.path())
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .spawn()?;
        let url = format!("http://127.0.0.1:{port}");
        let mut server =
            Self { process, _folder: folder, url, authorization: String::new(), http: reqwest::Client::new() };
        server.await_ready().await?;
        let key = fs::read_to_string(server._folder.path().join("api-key"))?;
        server.authorization = format!("Bearer {}", key.trim());
        Ok(server)
    }

    async fn await_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START;
        let url = format!("{}/readyz", self.url);
        while !self.http.get(&url).send().await.is_ok_and(|answer| answer.status().is_success()) {
            if let Some(status) = self.process.try_wait()? {
                return Err(format!("the server ended with {status}").into());
            }
            if Instant::now() > deadline {
                return Err("the server is not ready in time".into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Ends it in order, so that another can have the instance's name.
    pub async fn stop(mut self) -> Result<()> {
        Command::new("kill").args(["-INT", &self.process.id().to_string()]).status()?;
        let deadline = Instant::now() + START;
        while self.process.try_wait()?.is_none() {
            if Instant::now() > deadline {
                return Err("the server does not stop".into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Where it listens.
    pub fn address(&self) -> Result<SocketAddr> {
        Ok(self.url.trim_start_matches("http://").parse()?)
    }

    /// Sends all requests that follow to another address, which leads to it.
    pub fn reach_by(&mut self, address: SocketAddr) {
        self.url = format!("http://{address}");
    }

    /// What its routes stand under.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A key for all of it.
    pub fn key(&self) -> &str {
        self.authorization.trim_start_matches("Bearer ")
    }

    /// Its process.
    pub fn pid(&self) -> i64 {
        self.process.id().into()
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<Value> {
        let answer = request.header("authorization", &self.authorization).send().await?;
        let status = answer.status();
        let body: Value = answer.json().await?;
        if status.is_success() { Ok(body) } else { Err(format!("{status}: {body}").into()) }
    }

    /// Creates a session and waits until it is ready; its id.
    pub async fn create(&self) -> Result<String> {
        self.create_from(&json!({"template": TEMPLATE})).await
    }

    /// The same with so much memory and disk, in MiB.
    pub async fn create_with(&self, memory: u64, disk: u64) -> Result<String> {
        self.create_from(&json!({"template": TEMPLATE, "resources": {"memory_mb": memory, "disk_mb": disk}})).await
    }

    async fn create_from(&self, body: &Value) -> Result<String> {
        let session = self.send(self.http.post(format!("{}/v1/sessions", self.url)).json(body)).await?;
        match (&session["id"], session["state"].as_str()) {
            (Value::String(id), Some("ready")) => Ok(id.clone()),
            _ => Err(format!("a session is not ready: {session}").into()),
        }
    }

    /// Whether the create of a session found it ready.
    pub async fn is_warm(&self, session: &str) -> Result<bool> {
        let view = self.send(self.http.get(format!("{}/v1/sessions/{session}", self.url))).await?;
        Ok(view["source"] == "warm")
    }

    /// Waits until the pool of the template is as full as it is to be; how many are in it.
    pub async fn pool_is_full(&self) -> Result<u64> {
        let deadline = Instant::now() + START;
        loop {
            let pools = self.send(self.http.get(format!("{}/v1/pools", self.url))).await?;
            let pool = &pools["pools"][0];
            if let (Some(ready), true) = (pool["ready"].as_u64(), pool["ready"] == pool["target"]) {
                return Ok(ready);
            }
            if Instant::now() > deadline {
                return Err(format!("the pool does not fill: {pools}").into());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Runs `1+1`.
    pub async fn execute(&self, session: &str) -> Result<()> {
        let request = self.http.post(format!("{}/v1/sessions/{session}/executions", self.url));
        let execution = self.send(request.json(&json!({"code": "1+1"}))).await?;
        match execution.pointer("/results/0/data/text~1plain").and_then(Value::as_str) {
            Some("2") => Ok(()),
            _ => Err(format!("1+1 came to this: {execution}").into()),
        }
    }

    /// Writes a file of so many bytes.
    pub async fn put_file(&self, session: &str, bytes: usize) -> Result<()> {
        const PIECE: usize = 256 << 10;
        let piece = bytes::Bytes::from(vec![b'x'; PIECE]);
        let pieces = (0..bytes / PIECE).map(move |_| Ok::<_, std::io::Error>(piece.clone()));
        let body = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
        self.send(self.http.put(format!("{}/v1/sessions/{session}/files/file", self.url)).body(body)).await?;
        Ok(())
    }

    /// Reads it.
    pub async fn get_file(&self, session: &str, bytes: usize) -> Result<()> {
        let request = self.http.get(format!("{}/v1/sessions/{session}/files/file", self.url));
        let mut answer = request.header("authorization", &self.authorization).send().await?.error_for_status()?;
        let mut read = 0;
        while let Some(chunk) = answer.chunk().await? {
            read += chunk.len();
        }
        if read == bytes { Ok(()) } else { Err(format!("of {bytes} bytes {read} came").into()) }
    }

    /// Runs a program to its end.
    pub async fn command(&self, session: &str, argv: &[&str]) -> Result<()> {
        let request = self.http.post(format!("{}/v1/sessions/{session}/commands", self.url));
        let command = self.send(request.json(&json!({"argv": argv}))).await?;
        match command["exit_code"].as_i64() {
            Some(0) => Ok(()),
            _ => Err(format!("{argv:?} came to this: {command}").into()),
        }
    }

    /// Runs code that prints JSON.
    pub async fn printed(&self, session: &str, code: &str) -> Result<Value> {
        let request = self.http.post(format!("{}/v1/sessions/{session}/executions", self.url));
        let execution = self.send(request.json(&json!({"code": code}))).await?;
        Ok(serde_json::from_str(execution["stdout"].as_str().unwrap_or_default())?)
    }

    /// Ends a session; answered once its container is gone.
    pub async fn delete(&self, session: &str) -> Result<()> {
        self.send(self.http.delete(format!("{}/v1/sessions/{session}", self.url))).await?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
