//! Whoever means no good at the door for programs written for E2B: other tenants, forged ways in, requests that are cut off, sent on, or never read. Each is refused in
//! the words of the part that it came to, and nobody else notices. With real containers.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/e2b.rs"]
mod e2b;
#[path = "support/server.rs"]
mod server;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use e2b::{AGENT, INTERPRETER, Sandbox, aimed, is_numbered};
use reqwest::Method;
use serde_json::{Value, json};
use server::{NEVER, Reply, Server, text};
use sha2::{Digest, Sha256};

/// Who dawdles is not waited for.
const SETTINGS: &str = "[server]\nrequest_timeout = \"3s\"\nwrite_timeout = \"3s\"\n[e2b]\ndomain = \"boxes.test\"\n";
const START: &str = "/process.Process/Start";
const MEGABYTE: usize = 1_000_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whoever_means_no_good() {
    let server = Server::start_with_tenants(SETTINGS).await;
    let cases = cases!(
        server;
        tenants_have_nothing_of_each_other, forged_ways_lead_nowhere, who_sends_on_hears_why, what_is_cut_off_does_nothing, who_never_reads_ends_nothing_but_his_own,
        answers_come_at_once_and_as_they_are
    );
    server.run_and_finish(2, cases).await;
}

/// A stream's message, or the beginning of one.
fn enveloped(length: u32, message: &[u8]) -> Vec<u8> {
    [&[0], &length.to_be_bytes()[..], message].concat()
}

fn envelope(message: &Value) -> Vec<u8> {
    let message = message.to_string().into_bytes();
    enveloped(u32::try_from(message.len()).unwrap(), &message)
}

fn encoded(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect()
}

/// What a tenant knows of its own sandbox.
struct Known {
    id: String,
    agent: String,
    traffic: String,
}

/// One of the other tenant.
async fn foreign(server: &Server) -> Known {
    let made = server.foreign(Method::POST, "/v2/sandboxes").json(&json!({"templateID": "base", "timeout": 900}));
    let made = server.send(made).await;
    assert_eq!(made.status, 201, "{}", made.text);
    let [id, agent, traffic] =
        ["sandboxID", "envdAccessToken", "trafficAccessToken"].map(|name| text(&made.json[name]));
    Known { id, agent, traffic }
}

async fn tenants_have_nothing_of_each_other(server: Arc<Server>) {
    let (mine, other) = (Sandbox::new(&server).await, foreign(&server).await);
    let put = |sandbox: &str, token: &str, text: &str| {
        let request =
            aimed(&server, Method::POST, "/files?path=kept", (sandbox, AGENT)).header("x-access-token", token);
        server.send(request.header("content-type", "application/octet-stream").body(text.to_owned()))
    };
    assert_eq!(put(&mine.cell.id, &mine.agent, "mine").await.status, 200);
    assert_eq!(put(&other.id, &other.agent, "other's").await.status, 200, "it has one of its own");
    let keys = [&server.other_key, &other.agent, &other.traffic];
    for (method, path, port, status, code) in [
        (Method::GET, "/files?path=kept", AGENT, 401, Some(json!(401))),
        (Method::POST, "/files?path=kept", AGENT, 401, Some(json!(401))),
        (Method::GET, "/envs", AGENT, 401, Some(json!(401))),
        (Method::POST, "/filesystem.Filesystem/Remove", AGENT, 401, Some(json!("unauthenticated"))),
        (Method::POST, START, AGENT, 401, Some(json!("unauthenticated"))),
        (Method::GET, "/contexts", INTERPRETER, 403, None),
        (Method::POST, "/execute", INTERPRETER, 403, None),
        (Method::GET, "/", "3000", 403, None),
    ] {
        for key in keys {
            let request = mine.ask(method.clone(), path, port).bearer_auth(key).header("x-api-key", key);
            let request = request.header("x-access-token", key).header("e2b-traffic-access-token", key);
            let request = if method == Method::GET { request } else { request.json(&json!({"path": "kept"})) };
            let refused = server.send(request).await;
            let told = refused.json.get("code").cloned();
            assert_eq!((refused.status, told), (status, code.clone()), "{method} {path}: {}", refused.text);
        }
    }
    // What one's own token has signed opens nothing of another's, named or not.
    for (token, at, status) in
        [(&other.agent, &mine.cell.id, 401), (&other.agent, &other.id, 200), (&mine.agent, &other.id, 401)]
    {
        let signature = format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(format!("kept:read::{token}"))));
        let path = format!("/files?path=kept&signature={}", encoded(&signature));
        assert_eq!(server.send(aimed(&server, Method::GET, &path, (at, AGENT))).await.status, status);
    }
    let listed = server.send(server.foreign(Method::GET, "/v2/sandboxes")).await;
    let ids: Vec<_> = listed.json.as_array().unwrap().iter().map(|sandbox| text(&sandbox["sandboxID"])).collect();
    assert_eq!(ids, [other.id.as_str()]);
    let kept =
        server.send(mine.ask(Method::GET, "/files?path=kept", AGENT).header("x-access-token", &mine.agent)).await;
    assert_eq!((kept.status, kept.text.as_str()), (200, "mine"));
    mine.cell.works().await;
    assert_eq!(server.send(server.foreign(Method::DELETE, &format!("/sandboxes/{}", other.id))).await.status, 204);
}

async fn forged_ways_lead_nowhere(server: Arc<Server>) {
    let (mine, other) = (Sandbox::new(&server).await, Sandbox::new(&server).await);
    let key = &server.key;
    // A sandbox that is named is what is asked, whatever the path and the key.
    for path in [
        "/v2/sandboxes",
        "/v1/sessions",
        "/e2b/api/v2/sandboxes",
        "/e2b/envd/files?path=a",
        "/e2b/interpreter/contexts",
        "/e2b/box/e2b/envd/envs",
    ] {
        for (port, status) in [(AGENT, 401), (INTERPRETER, 403), ("3000", 403)] {
            let refused =
                server.send(mine.ask(Method::GET, path, port).bearer_auth(key).header("x-api-key", key)).await;
            assert_eq!(refused.status, status, "{path} of {port}: {}", refused.text);
        }
    }
    // The rooms behind have no door of their own.
    for path in [
        "/e2b/envd/files?path=a",
        "/e2b/envd/envs",
        "/e2b/interpreter/contexts",
        "/e2b/ports/",
        "/e2b/box/files?path=a",
    ] {
        let bare = server.bare(Method::GET, path).bearer_auth(key);
        let bare = bare.header("x-access-token", &mine.agent).header("e2b-traffic-access-token", &mine.traffic);
        is_numbered(&server.send(bare).await, 400);
    }
    // Of a host and headers the host counts, and what says it was another host does not.
    let host = format!("{AGENT}-{}.boxes.test", other.cell.id);
    let envs = |token: &str| mine.ask(Method::GET, "/envs", AGENT).header("x-access-token", token);
    is_numbered(&server.send(envs(&mine.agent).header("host", &host)).await, 401);
    for name in ["x-forwarded-host", "forwarded", "x-original-host", "x-original-url", "x-rewrite-url"] {
        assert_eq!(server.send(envs(&mine.agent).header(name, &host)).await.status, 200, "{name}");
        is_numbered(&server.send(envs(&other.agent).header(name, &host)).await, 401);
    }
    let id = &mine.cell.id;
    for (sandbox, port) in [
        (format!("{id}, {}", other.cell.id), AGENT),
        (id.to_uppercase(), AGENT),
        (id.clone(), "49983, 3000"),
        (id.clone(), "049983"),
        ("*".to_owned(), AGENT),
    ] {
        is_numbered(&server.send(aimed(&server, Method::GET, "/health", (&sandbox, port))).await, 400);
    }
    for (method, path, port) in
        [(Method::GET, START, AGENT), (Method::DELETE, "/files", AGENT), (Method::GET, "/execute", INTERPRETER)]
    {
        let refused = server.send(mine.ask(method, path, port)).await;
        assert_eq!(refused.status, 405, "{path}");
        assert_ne!(refused.header("content-type"), "application/problem+json", "{path}: {}", refused.text);
    }
}

/// A connection of its own, on which a head and a body go out before anybody looks up.
struct Raw {
    read: BufReader<TcpStream>,
    write: TcpStream,
    host: String,
}

impl Raw {
    fn open(url: &str) -> Self {
        let host = url.strip_prefix("http://").unwrap().to_owned();
        let write = TcpStream::connect(&host).unwrap();
        write.set_read_timeout(Some(NEVER)).unwrap();
        write.set_write_timeout(Some(NEVER)).unwrap();
        Self { read: BufReader::new(write.try_clone().unwrap()), write, host }
    }

    /// Sends a request of so many bytes, of which these are the first ones; the others are not sent here.
    fn begin(&mut self, line: &str, headers: &[(&str, &str)], length: usize, first: &[u8]) {
        let mut head = format!("{line} HTTP/1.1\r\nhost: {}\r\ncontent-length: {length}\r\n", self.host);
        headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        self.write.write_all(&[head.as_bytes(), b"\r\n", first].concat()).unwrap();
    }

    /// The status and the body of an answer that says how long it is, or comes in chunks.
    fn answer(&mut self) -> std::io::Result<(u16, String)> {
        let mut line = || {
            let mut line = String::new();
            self.read.read_line(&mut line).map(|_| line.trim_end().to_owned())
        };
        let status = line()?.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let (mut length, mut is_chunked) = (0, false);
        loop {
            let header = line()?.to_ascii_lowercase();
            match header.split_once(": ") {
                Some(("content-length", value)) => length = value.parse().unwrap(),
                Some(("transfer-encoding", _)) => is_chunked = true,
                Some(_) => {}
                None => break,
            }
        }
        let mut body = Vec::new();
        if !is_chunked {
            self.read.by_ref().take(length).read_to_end(&mut body)?;
        }
        while is_chunked {
            let mut size = String::new();
            self.read.read_line(&mut size)?;
            let size = u64::from_str_radix(size.trim_end(), 16).unwrap();
            let before = body.len();
            self.read.by_ref().take(size + 2).read_to_end(&mut body)?;
            body.truncate(before + usize::try_from(size).unwrap());
            is_chunked = size > 0;
        }
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }
}

async fn who_sends_on_hears_why(server: Arc<Server>) {
    let mine = Sandbox::new(&server).await;
    let id = mine.cell.id.clone();
    let nobody = "0".repeat(id.len());
    let stream = ("content-type", "application/connect+json");
    let to = |id: &str, port: &str| [("e2b-sandbox-id", id.to_owned()), ("e2b-sandbox-port", port.to_owned())];
    let timeout = format!("POST /sandboxes/{id}/timeout");
    let huge = enveloped(u32::MAX, &[b' '; MEGABYTE]);
    let files = "POST /files?path=a";
    let agent = ("x-access-token", mine.agent.as_str());
    let wrong = ("x-access-token", "cba_wrong");
    for (line, aim, header, status, word) in [
        (files, Some(to(&id, AGENT)), wrong, 401, "\"code\":401"),
        (files, Some(to(&nobody, AGENT)), agent, 502, "was not found"),
        (files, Some(to(&id, AGENT)), agent, 400, "multipart"),
        ("POST /files?path=a&signature=v1_x", None, stream, 401, "\"code\":401"),
        (&format!("POST {START}"), Some(to(&id, AGENT)), wrong, 401, "\"unauthenticated\""),
        (&format!("POST {START}"), Some(to(&nobody, AGENT)), agent, 502, "was not found"),
        (&format!("POST {START}"), Some(to(&id, AGENT)), agent, 200, "resource_exhausted"),
        ("POST /process.Process/StreamInput", Some(to(&id, AGENT)), agent, 200, "resource_exhausted"),
        ("POST /filesystem.Filesystem/Stat", Some(to(&id, AGENT)), wrong, 401, "\"unauthenticated\""),
        ("POST /execute", Some(to(&id, INTERPRETER)), wrong, 403, "token"),
        ("POST /execute", Some(to(&nobody, INTERPRETER)), wrong, 502, "was not found"),
        ("POST /anything", Some(to(&id, "3000")), wrong, 403, "token"),
        ("POST /v2/sandboxes", None, stream, 401, "\"code\":401"),
        ("POST /e2b/box/files", None, stream, 400, "E2b-Sandbox-Id"),
        (&timeout, None, ("x-api-key", server.other_key.as_str()), 404, "\"code\":404"),
    ] {
        let (url, line, huge) = (server.url.clone(), line.to_owned(), huge.clone());
        let aim: Vec<_> = aim.into_iter().flatten().collect();
        let header = (header.0, header.1.to_owned());
        let asked = format!("{line} {header:?}");
        let heard = tokio::task::spawn_blocking(move || {
            let mut raw = Raw::open(&url);
            let mut headers: Vec<(&str, &str)> = aim.iter().map(|(name, value)| (*name, value.as_str())).collect();
            headers.push((header.0, &header.1));
            if header.0 != stream.0 && line.contains("Process/") {
                headers.push(stream);
            }
            raw.begin(&line, &headers, huge.len(), &huge);
            let first = raw.answer()?;
            // Its connection is good for more.
            raw.begin("GET /livez", &[], 0, b"");
            Ok::<_, std::io::Error>((first, raw.answer()?.0))
        });
        let heard = heard.await.unwrap();
        let ((told, body), next) = heard.unwrap_or_else(|error| panic!("{asked}: {error}"));
        assert!(told == status && body.contains(word), "{asked}: {told} {body}");
        assert_eq!(next, 200, "{asked}");
    }
    mine.cell.works().await;
}

/// The tags of the processes that run in a sandbox.
async fn running(sandbox: &Sandbox) -> Vec<String> {
    let list = sandbox.ask(Method::POST, "/process.Process/List", AGENT).header("x-access-token", &sandbox.agent);
    let listed = sandbox.cell.server.send(list.json(&json!({}))).await;
    listed.json["processes"].as_array().into_iter().flatten().map(|process| text(&process["tag"])).collect()
}

async fn start(sandbox: &Sandbox, process: Value) -> reqwest::Response {
    let request = sandbox.ask(Method::POST, START, AGENT).header("x-access-token", &sandbox.agent);
    request.header("content-type", "application/connect+json").body(envelope(&process)).send().await.unwrap()
}

async fn rpc(sandbox: &Sandbox, method: &str, message: Value) -> Reply {
    let request = sandbox.ask(Method::POST, method, AGENT).header("x-access-token", &sandbox.agent);
    sandbox.cell.server.send(request.json(&message)).await
}

async fn what_is_cut_off_does_nothing(server: Arc<Server>) {
    let mine = Sandbox::new(&server).await;
    let cat = start(&mine, json!({"process": {"cmd": "cat"}, "tag": "cat"})).await;
    let begin = |path: &str, first: Vec<u8>| {
        let mut raw = Raw::open(&server.url);
        let headers = [
            ("e2b-sandbox-id", mine.cell.id.as_str()),
            ("e2b-sandbox-port", AGENT),
            ("x-access-token", &mine.agent),
            ("content-type", "application/connect+json"),
        ];
        raw.begin(&format!("POST {path}"), &headers, first.len() * 2, &first);
        raw
    };
    let whole = envelope(&json!({"process": {"cmd": "sleep", "args": ["1000"]}, "tag": "half"}));
    let half = whole[..whole.len() / 2].to_vec();
    // Who hangs up within a message, and who says nothing more of it.
    drop(begin(START, half.clone()));
    let mut silent = begin(START, half);
    let input = json!({"data": {"input": {"stdin": "bm8="}}});
    let (begun, input) = (envelope(&json!({"start": {"process": {"tag": "cat"}}})), envelope(&input));
    drop(begin("/process.Process/StreamInput", [&begun, &input[..input.len() - 1]].concat()));
    let told = tokio::task::spawn_blocking(move || silent.answer()).await.unwrap().unwrap();
    assert!(told.0 == 200 && told.1.contains("deadline_exceeded"), "{told:?}");
    assert_eq!(running(&mine).await, ["cat"], "nothing of it has begun");
    let which = json!({"process": {"tag": "cat"}});
    let sent =
        rpc(&mine, "/process.Process/SendInput", json!({"process": {"tag": "cat"}, "input": {"stdin": "eWVz"}})).await;
    assert_eq!(sent.status, 200, "{}", sent.text);
    assert_eq!(rpc(&mine, "/process.Process/CloseStdin", which).await.status, 200);
    let told = cat.text().await.unwrap();
    assert!(told.contains("\"eWVz\"") && !told.contains("bm8=") && told.contains("exit status 0"), "{told}");
}

async fn who_never_reads_ends_nothing_but_his_own(server: Arc<Server>) {
    let mine = Sandbox::new(&server).await;
    let code = json!({"code": "while True: print('\\0' * 1_000_000, flush=True)"}).to_string();
    let mut lazy = Raw::open(&server.url);
    let headers = [
        ("e2b-sandbox-id", mine.cell.id.as_str()),
        ("e2b-sandbox-port", INTERPRETER),
        ("e2b-traffic-access-token", &mine.traffic),
        ("content-type", "application/json"),
    ];
    lazy.begin("POST /execute", &headers, code.len(), code.as_bytes());
    let agents = start(&mine, json!({"process": {"cmd": "echo", "args": ["on"]}})).await.text().await.unwrap();
    assert!(agents.contains("exit status 0"), "{agents}");
    // Its turn comes, since the other is cut off, and its code with it.
    let next = mine.ask(Method::POST, "/execute", INTERPRETER).header("e2b-traffic-access-token", &mine.traffic);
    let next = next.json(&json!({"code": "1 + 1"})).timeout(NEVER);
    let ran = server.send(next).await;
    assert!(ran.status == 200 && ran.text.contains("\"text\":\"2\""), "{}", ran.text);
    drop(lazy);
}

async fn answers_come_at_once_and_as_they_are(server: Arc<Server>) {
    let mine = Sandbox::new(&server).await;
    let squeezes = "gzip, deflate, br, zstd";
    let list = mine.ask(Method::POST, "/process.Process/List", AGENT).header("x-access-token", &mine.agent);
    let list = list.header("content-encoding", "identity").header("accept-encoding", squeezes);
    let listed = server.send(list.json(&json!({}))).await;
    assert_eq!((listed.status, listed.header("content-encoding")), (200, ""), "{}", listed.text);
    let code = json!({"code": "print('x' * 100_000)"});
    let ran = mine.ask(Method::POST, "/execute", INTERPRETER).header("e2b-traffic-access-token", &mine.traffic);
    let ran = server.send(ran.header("accept-encoding", squeezes).json(&code)).await;
    assert_eq!((ran.status, ran.header("content-encoding")), (200, ""));
    assert!(ran.text.contains("xxxx"));
    let line = "echo one; read line; echo $line";
    let asked = json!({"process": {"cmd": "/bin/sh", "args": ["-c", line]}, "tag": "waits"});
    let request = mine.ask(Method::POST, START, AGENT).header("x-access-token", &mine.agent);
    let request = request.header("accept-encoding", squeezes).header("content-type", "application/connect+json");
    let mut answer = request.body(envelope(&asked)).send().await.unwrap();
    assert!(answer.headers().get("content-encoding").is_none());
    let mut heard = String::new();
    // What a process has said is told while it waits for what to say next.
    while !heard.contains("\"b25lCg==\"") {
        let piece = tokio::time::timeout(Duration::from_secs(10), answer.chunk()).await.unwrap().unwrap().unwrap();
        heard.push_str(&String::from_utf8_lossy(&piece));
    }
    assert_eq!(running(&mine).await, ["waits"]);
    let input = json!({"process": {"tag": "waits"}, "input": {"stdin": "dHdvCg=="}});
    assert_eq!(rpc(&mine, "/process.Process/SendInput", input).await.status, 200);
    assert!(answer.text().await.unwrap().contains("dHdvCg=="));
}
