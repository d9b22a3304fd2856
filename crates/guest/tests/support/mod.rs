//! The other end of the guest's link, as small as it can be: a real guest process, its pipes, an HTTP/2 client.

use std::ffi::{OsStr, OsString};
use std::io::Cursor;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use cellblock_wire::frame::{Decoder, Frame, encode};
use cellblock_wire::link::{
    Channel, Effects, Event, KernelDeleted, KernelStarted, Numbered, Outbound, OutputCap, Refusal, StartKernel,
    Transport,
};
use cellblock_wire::marker::{LinkSecret, MARKER_LEN, Marker};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{self, SendRequest};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// The fake kernel's kernelspec.
pub const FAKE: &str = "fake";
/// Names another guest's file to be tested, the one that is shipped for example.
pub const GUEST: &str = "CELLBLOCK_TEST_GUEST";
const FIGURES: [(&str, &str); 5] = [
    ("cpu.stat", "usage_usec 1000000\n"),
    ("pids.current", "10\n"),
    ("pids.max", "128\n"),
    ("pids.events", "max 0\n"),
    ("memory.events", "oom 0\noom_kill 0\n"),
];
const SECRET: LinkSecret = LinkSecret([9; 16]);
const PATIENCE: Duration = Duration::from_secs(60);

/// An event with its parts.
pub type Told = Frame<Numbered>;

/// A guest process and the present connection to it.
pub struct Cell {
    guest: std::process::Child,
    root: PathBuf,
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    tasks: JoinSet<()>,
    client: Option<SendRequest<Full<Bytes>>>,
    events: Option<mpsc::UnboundedReceiver<Told>>,
    nonce: u8,
    /// All events so far.
    pub seen: Vec<Told>,
    /// Whether events are acknowledged.
    pub acknowledges: bool,
}

/// A message as it was told.
pub struct Message {
    pub msg_type: String,
    pub content: Value,
}

impl Cell {
    pub fn start() -> Self {
        Self::start_with(OsStr::new("python3"))
    }

    /// A guest that is the first process of a namespace of its own and has made-up figures, as in a container; `None` where this
    /// machine lets nobody make one.
    pub fn start_as_init() -> Option<Self> {
        let mount = "mount --bind \"$CELL/c\" /sys/fs/cgroup && exec \"$@\"";
        let unshare = [
            "unshare",
            "--user",
            "--map-root-user",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            mount,
            "sh",
        ];
        let works =
            Command::new(unshare[0]).args(&unshare[1..7]).arg("true").status().is_ok_and(|status| status.success());
        if !works {
            println!("skipped: no namespace can be made here");
        }
        works.then(|| Self::start_behind(&unshare, OsStr::new("python3")))
    }

    /// A guest with the fake kernel, and `real`, which is this Python's `ipykernel`.
    pub fn start_with(python: &OsStr) -> Self {
        Self::start_behind(&[], python)
    }

    fn start_behind(wrapper: &[&str], python: &OsStr) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("cbg-{}-{number}", std::process::id()));
        let crate_root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let fake = crate_root.join("tests/support/fake_kernel.py");
        let python = python.to_str().unwrap();
        for (name, argv) in [
            (FAKE, json!(["python3", fake, "{connection_file}"])),
            ("real", json!([python, "-m", "ipykernel_launcher", "-f", "{connection_file}"])),
        ] {
            let folder = root.join("jupyter/kernels").join(name);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("kernel.json"), json!({"argv": argv, "language": "python"}).to_string())
                .unwrap();
        }
        std::fs::create_dir(root.join("w")).unwrap();
        std::fs::create_dir(root.join("c")).unwrap();
        for (figure, text) in FIGURES {
            std::fs::write(root.join("c").join(figure), text).unwrap();
        }
        let guest = std::env::var_os(GUEST).unwrap_or(env!("CARGO_BIN_EXE_guest").into());
        let mut line = wrapper.iter().map(OsString::from).chain([guest]);
        let mut guest = Command::new(line.next().unwrap())
            .args(line)
            .args([root.join("w"), root.join("s"), crate_root.join("launcher/ipykernel_launcher.py")])
            .env("JUPYTER_PATH", root.join("jupyter"))
            .env("CELL", &root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            stdin: Some(guest.stdin.take().unwrap().into()),
            stdout: guest.stdout.take().unwrap().into(),
            guest,
            root,
            tasks: JoinSet::new(),
            client: None,
            events: None,
            nonce: 0,
            seen: Vec::new(),
            acknowledges: true,
        }
    }

    pub fn state(&self) -> PathBuf {
        self.root.join("s")
    }

    /// Begins a connection, and an event stream on it.
    pub async fn attach(&mut self) {
        self.attach_after(&[]).await;
    }

    /// Takes over as a new control plane does whose predecessor died in the middle of a write.
    pub async fn attach_after_garbage(&mut self, _seen: u64) {
        let half = Marker { secret: SECRET, nonce: [1; 16] }.to_bytes();
        let garbage =
            [vec![0, 0, 255, 0, 0, 0, 0, 0, 1], vec![0xce; 300], half[..20 + usize::from(self.nonce)].to_vec()]
                .concat();
        self.attach_after(&garbage).await;
    }

    async fn attach_after(&mut self, garbage: &[u8]) {
        self.tasks.shutdown().await;
        (self.client, self.events) = (None, None);
        let (mut stdin, mut stdout) = self.pipes();
        stdin.write_all(garbage).await.unwrap();
        self.nonce += 1;
        let marker = Marker { secret: SECRET, nonce: [self.nonce; 16] }.to_bytes();
        stdin.write_all(&marker).await.unwrap();
        let rest = tokio::time::timeout(PATIENCE, await_echo(&mut stdout, &marker)).await.unwrap().unwrap();
        let io = TokioIo::new(tokio::io::join(Cursor::new(rest).chain(stdout), stdin));
        let (client, connection) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(16 << 20)
            .handshake(io)
            .await
            .unwrap();
        self.tasks.spawn(async move { drop(connection.await) });
        self.client = Some(client);
        self.subscribe().await;
    }

    fn pipes(&self) -> (pipe::Sender, pipe::Receiver) {
        let stdin = self.stdin.as_ref().unwrap().try_clone().unwrap();
        (
            pipe::Sender::from_owned_fd(stdin).unwrap(),
            pipe::Receiver::from_owned_fd(self.stdout.try_clone().unwrap()).unwrap(),
        )
    }

    pub async fn stranger_is_echoed(&mut self) -> bool {
        self.tasks.shutdown().await;
        let (mut stdin, mut stdout) = self.pipes();
        let marker = Marker { secret: LinkSecret([1; 16]), nonce: [200; 16] }.to_bytes();
        stdin.write_all(&marker).await.unwrap();
        let echo = await_echo(&mut stdout, &marker);
        matches!(tokio::time::timeout(Duration::from_millis(200), echo).await, Ok(Some(_)))
    }

    async fn subscribe(&mut self) {
        let request = Request::get(format!("/events?after={}", self.last_seen())).body(Full::default()).unwrap();
        let response = self.client.as_mut().unwrap().send_request(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let (sender, receiver) = mpsc::unbounded_channel();
        self.events = Some(receiver);
        self.tasks.spawn(async move {
            let (mut body, mut decoder) = (response.into_body(), Decoder::default());
            while let Some(Ok(frame)) = body.frame().await {
                decoder.push(&frame.into_data().unwrap_or_default());
                while let Some(told) = decoder.next_frame::<Numbered>().unwrap() {
                    let _ = sender.send(told);
                }
            }
        });
    }

    pub fn last_seen(&self) -> u64 {
        self.seen.last().map_or(0, |event| event.head.seq)
    }

    pub async fn request(&mut self, method: Method, path: &str, body: Bytes) -> (StatusCode, Bytes) {
        let request = Request::builder().method(method).uri(path).body(Full::new(body)).unwrap();
        let answer = async {
            let response = self.client.as_mut().unwrap().send_request(request).await.unwrap();
            (response.status(), response.into_body().collect().await.unwrap().to_bytes())
        };
        tokio::time::timeout(PATIENCE, answer).await.unwrap()
    }

    pub async fn get<T: DeserializeOwned>(&mut self, path: &str) -> T {
        let (status, body) = self.request(Method::GET, path, Bytes::new()).await;
        assert_eq!(status, StatusCode::OK);
        serde_json::from_slice(&body).unwrap()
    }

    /// A path of the link about files, with what is asked.
    pub fn about(path: &str, asked: &impl serde::Serialize) -> String {
        let json = serde_json::to_string(asked).unwrap();
        let escaped: String = json.bytes().map(|byte| format!("%{byte:02X}")).collect();
        format!("{path}?q={escaped}")
    }

    pub async fn refused(&mut self, method: Method, path: &str, body: Bytes) -> (StatusCode, Refusal) {
        let (status, body) = self.request(method, path, body).await;
        (status, serde_json::from_slice(&body).unwrap())
    }

    /// Deletes a kernel. The number of the newest event is left out.
    pub async fn delete(&mut self, kernel: &str) -> KernelDeleted {
        let (status, body) = self.request(Method::DELETE, &format!("/kernels/{kernel}"), Bytes::new()).await;
        assert_eq!(status, StatusCode::OK);
        let gone: KernelDeleted = serde_json::from_slice(&body).unwrap();
        KernelDeleted { last_seq: 0, ..gone }
    }

    pub async fn init<T: DeserializeOwned>(&mut self, orphan_timeout: u64) -> T {
        let init = json!({"generation": 1, "orphan_timeout_seconds": orphan_timeout, "env": {"CELL": self.root}});
        let (status, body) = self.request(Method::POST, "/init", init.to_string().into()).await;
        assert_eq!(status, StatusCode::OK);
        serde_json::from_slice(&body).unwrap()
    }

    pub async fn try_start(
        &mut self,
        kernel: &str,
        spec: &str,
        transport: Transport,
        env: &[(&str, &str)],
        connect_timeout_ms: u64,
    ) -> Result<KernelStarted, Refusal> {
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let start = StartKernel {
            kernel: kernel.into(),
            kernelspec: Some(spec.into()),
            transport,
            env,
            cwd: None,
            connect_timeout_ms,
        };
        let (status, body) = self.request(Method::POST, "/kernels", serde_json::to_vec(&start).unwrap().into()).await;
        if status == StatusCode::OK {
            Ok(serde_json::from_slice(&body).unwrap())
        } else {
            Err(serde_json::from_slice(&body).unwrap())
        }
    }

    pub async fn start_kernel(&mut self, kernel: &str, spec: &str, transport: Transport, env: &[(&str, &str)]) {
        let started = self.try_start(kernel, spec, transport, env, 30_000).await.unwrap();
        assert_eq!((started.kernelspec.as_str(), started.language.as_str()), (spec, "python"));
    }

    /// The next event.
    pub async fn next(&mut self) -> Told {
        let events = self.events.as_mut().unwrap();
        let told = match tokio::time::timeout(PATIENCE, events.recv()).await {
            Ok(told) => told.expect("the event stream ended"),
            Err(_) => panic!("nothing after {:?}", self.seen.last().map(|told| &told.head)),
        };
        assert_eq!(told.head.seq, self.last_seen() + 1);
        self.seen.push(told.clone());
        if self.acknowledges && told.head.seq.is_multiple_of(8) {
            let ack = json!({"seq": told.head.seq}).to_string();
            assert_eq!(self.request(Method::POST, "/ack", ack.into()).await.0, StatusCode::NO_CONTENT);
        }
        told
    }

    /// Events up to the first that is wanted.
    pub async fn until(&mut self, wanted: impl Fn(&Event) -> bool) -> Vec<Told> {
        let mut told = Vec::new();
        loop {
            told.push(self.next().await);
            if told.last().is_some_and(|told| wanted(&told.head.event)) {
                return told;
            }
        }
    }

    /// Events up to the execution's idle status.
    pub async fn until_idle(&mut self, id: &str) -> Vec<Told> {
        let mut told = Vec::new();
        loop {
            told.push(self.next().await);
            if told.last().is_some_and(|told| is_idle(told, id)) {
                return told;
            }
        }
    }

    /// The execution's messages, up to its reply and idle status.
    pub async fn until_done(&mut self, id: &str) -> Vec<Message> {
        let mut told = Vec::new();
        while !(told.iter().any(|t| is_idle(t, id)) && told.iter().any(|t| is_reply(t, id))) {
            told.push(self.next().await);
        }
        told.retain(|told| matches!(&told.head.event, Event::Message { parent_id, .. } if parent_id == id));
        messages(&told)
    }

    pub fn memory_peak_kb(&self) -> u64 {
        self.memory_kb("VmHWM:")
    }

    pub fn memory_kb(&self, figure: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.guest.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(figure)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Living fake kernels of this guest.
    pub fn fake_kernels(&self) -> Vec<u32> {
        let state = self.state();
        pids().filter(|pid| has_in_line(*pid, state.to_str().unwrap()) && has_in_line(*pid, "fake_kernel")).collect()
    }

    /// Processes other than the guest in its namespace.
    pub fn neighbours(&self) -> usize {
        let first =
            pids().find(|pid| status_of(*pid, "PPid:").as_deref() == Some(&self.guest.id().to_string())).unwrap();
        let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        pids().filter(|pid| *pid != first && namespace(*pid) == namespace(first)).count()
    }

    /// Sets a figure of a guest's that was started as the first process.
    pub fn figure(&self, figure: &str, text: &str) {
        std::fs::write(self.root.join("c").join(figure), text).unwrap();
    }

    pub fn workdir(&self) -> PathBuf {
        self.root.join("w")
    }

    /// The effects of an execution among these events; the only ones, and before its reply.
    pub fn effects(told: &[Told], id: &str) -> Effects {
        let of = |told: &Told| match &told.head.event {
            Event::Effects { parent_id, effects } if parent_id == id => Some((**effects).clone()),
            _ => None,
        };
        let at = told.iter().position(|told| of(told).is_some()).unwrap();
        let reply = told.iter().position(|told| is_reply(told, id));
        assert!(reply.is_none_or(|reply| at < reply), "after the reply");
        assert_eq!(told.iter().filter_map(of).count(), 1);
        of(&told[at]).unwrap()
    }

    /// Runs code to its end and returns what was told meanwhile.
    pub async fn run(&mut self, kernel: &str, id: &str, code: &str, cap: OutputCap) -> Vec<Told> {
        let before = self.seen.len();
        execute(self, kernel, id, code, cap).await;
        self.until_done(id).await;
        self.seen[before..].to_vec()
    }

    pub fn signal_guest(&self, signals: &[&str]) {
        for signal in signals {
            assert!(
                Command::new("kill")
                    .args([&format!("-{signal}"), &self.guest.id().to_string()])
                    .status()
                    .unwrap()
                    .success()
            );
        }
    }

    pub fn close_stdin(&mut self) {
        self.tasks.abort_all();
        self.client = None;
        self.stdin = None;
    }

    pub async fn wait_exit(&mut self, limit: Duration) -> ExitStatus {
        let end = tokio::time::Instant::now() + limit;
        loop {
            if let Some(status) = self.guest.try_wait().unwrap() {
                return status;
            }
            assert!(tokio::time::Instant::now() < end, "the guest still runs");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends all kernels, and the guest.
    pub async fn end(mut self) {
        let names: std::collections::BTreeSet<String> = self.seen.iter().map(|told| told.head.kernel.clone()).collect();
        for name in names {
            self.request(Method::DELETE, &format!("/kernels/{name}"), Bytes::new()).await;
        }
        assert!(self.guest.try_wait().unwrap().is_none(), "the guest has ended by itself");
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        let _ = self.guest.kill();
        let _ = self.guest.wait();
        for pid in self.fake_kernels() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

async fn await_echo(stdout: &mut pipe::Receiver, marker: &[u8; MARKER_LEN]) -> Option<Vec<u8>> {
    let mut read = Vec::new();
    loop {
        if let Some(at) = read.windows(MARKER_LEN).position(|window| window == marker) {
            return Some(read.split_off(at + MARKER_LEN));
        }
        read.drain(..read.len().saturating_sub(MARKER_LEN));
        if stdout.read_buf(&mut read).await.ok()? == 0 {
            return None;
        }
    }
}

fn pids() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn has_in_line(pid: u32, text: &str) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(text))
}

fn status_of(pid: u32, field: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(status.lines().find_map(|line| line.strip_prefix(field))?.trim().to_owned())
}

fn is_reply(told: &Told, id: &str) -> bool {
    matches!(&told.head.event, Event::Message { msg_type, parent_id, .. } if msg_type == "execute_reply" && parent_id == id)
}

fn is_idle(told: &Told, id: &str) -> bool {
    matches!(&told.head.event, Event::Message { msg_type, parent_id, .. } if msg_type == "status" && parent_id == id && told.parts[3].windows(6).any(|w| w == b"\"idle\""))
}

pub fn messages(told: &[Told]) -> Vec<Message> {
    let message = |told: &Told| match &told.head.event {
        Event::Message { msg_type, .. } => {
            Some(Message { msg_type: msg_type.clone(), content: serde_json::from_slice(&told.parts[3]).unwrap() })
        }
        _ => None,
    };
    told.iter().filter_map(message).collect()
}

pub fn text_of(messages: &[Message]) -> String {
    messages
        .iter()
        .filter(|message| message.msg_type == "stream")
        .filter_map(|message| message.content["text"].as_str())
        .collect()
}

pub fn is_alive(pid: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').unwrap().1.starts_with(" Z"))
}

pub async fn send(
    cell: &mut Cell,
    kernel: &str,
    channel: Channel,
    msg_type: &str,
    id: &str,
    content: &Value,
    cap: Option<OutputCap>,
) -> (StatusCode, Bytes) {
    let header = json!({"msg_id": id, "msg_type": msg_type, "session": "s", "username": "u", "date": "2026-01-01T00:00:00Z", "version": "5.3"});
    let parts = [header.to_string(), "{}".into(), "{}".into(), content.to_string()].map(Bytes::from);
    let mut body = BytesMut::new();
    encode(&Outbound { channel, msg_id: id.into(), cap, is_aside: false }, &parts, &mut body).unwrap();
    cell.request(Method::POST, &format!("/kernels/{kernel}/messages"), body.freeze()).await
}

fn request(code: &str) -> Value {
    json!({"code": code, "silent": false, "store_history": true, "user_expressions": {}, "allow_stdin": true, "stop_on_error": true})
}

pub async fn execute(cell: &mut Cell, kernel: &str, id: &str, code: &str, cap: OutputCap) {
    let (status, _) = send(cell, kernel, Channel::Shell, "execute_request", id, &request(code), Some(cap)).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
}

pub async fn try_execute(cell: &mut Cell, kernel: &str, id: &str, code: &str, cap: OutputCap) -> (StatusCode, Refusal) {
    let (status, body) = send(cell, kernel, Channel::Shell, "execute_request", id, &request(code), Some(cap)).await;
    (status, serde_json::from_slice(&body).unwrap())
}
