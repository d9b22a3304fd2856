//! The front door from outside, with sockets by hand: who is slow, greedy, malformed or in disguise is turned away, and others do not notice.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;
#[path = "support/withheld.rs"]
mod withheld;

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cellblock::app::Process;
use cellblock::config::{self, Inputs};
use cellblock::task::Executor;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper_util::rt::TokioIo;
use reqwest::Method;
use serde_json::{Value, json};
use server::{NEVER, Reply, Server, text};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use withheld::{End, Streams};

/// Callers are told apart by these addresses, all of this machine.
const fn from(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 0, last)
}

async fn connect(server: &Server, from: Ipv4Addr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from((from, 0))).unwrap();
    socket.connect(server.url.trim_start_matches("http://").parse().unwrap()).await.unwrap()
}

/// All that comes until the other side ends the connection, which it must.
async fn rest(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
    let reading = async {
        // A connection that is reset has ended too.
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            all.extend_from_slice(&buffer[..count]);
        }
    };
    tokio::time::timeout(NEVER, reading).await.expect("the connection is not ended");
    all
}

/// Asks on a connection of its own, which the other side ends after its answer.
async fn ask(server: &Server, from: Ipv4Addr, request: impl AsRef<[u8]>) -> String {
    let mut stream = connect(server, from).await;
    // A server that has heard enough hears no more of it.
    let _ = stream.write_all(request.as_ref()).await;
    String::from_utf8_lossy(&rest(&mut stream).await).into_owned()
}

/// A `GET` whose answer ends the connection.
fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: box\r\nconnection: close\r\n{headers}\r\n")
}

/// Asks on a connection that stays, and reads the answer's head and its body.
async fn ask_on(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let (mut answer, mut buffer) = (String::new(), [0; 4096]);
    let whole = |answer: &str| {
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "))?.parse::<usize>().ok()?;
        (body.len() >= length).then_some(())
    };
    while whole(&answer).is_none() {
        let read = tokio::time::timeout(NEVER, stream.read(&mut buffer)).await.expect("an answer in time");
        let count = read.unwrap();
        assert!(count > 0, "the connection ended after {answer:?}");
        answer.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
    }
    answer
}

const KEPT: &str = "GET /livez HTTP/1.1\r\nhost: box\r\n\r\n";

fn is_ok(answer: &str) -> bool {
    answer.starts_with("HTTP/1.1 200 ")
}

/// A request over HTTP/2, by a client that does as it should.
async fn over_http2(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Result<(u16, String), hyper::Error> {
    let (mut sender, connection) = hyper::client::conn::http2::handshake(Executor, TokioIo::new(io)).await?;
    cellblock::task::spawn("client", async move {
        // It ends as the request does.
        let _ = connection.await;
    });
    let answer = tokio::time::timeout(NEVER, sender.send_request(request)).await.expect("an answer in time")?;
    let status = answer.status().as_u16();
    let body = answer.into_body().collect().await?.to_bytes();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

const PATIENCE: &str = r#"
[server]
header_timeout = "1s"
request_timeout = "1s"
write_timeout = "2s"
max_header = "16KiB"
connections_per_address = 8
cors_origins = ["https://app.example", "http://localhost:3000"]
[executions]
inline = "32KiB"
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slow_and_the_malformed() {
    let server = Server::start(PATIENCE).await;
    let cases = cases![server;
        who_sends_no_head_is_cut_off,
        who_sends_a_slow_body_is_told,
        who_does_not_read_is_cut_off,
        who_does_not_read_over_http2_loses_its_streams,
        what_takes_long_is_not_cut_off,
        heads_that_are_too_large,
        heads_that_are_malformed,
        http2_that_means_harm,
        pages_of_other_sites,
        nothing_tells_what_runs_here,
        what_to_paste_is_shown_for_hosts_alone,
    ];
    server.run_and_finish(2, cases).await;
}

async fn who_sends_no_head_is_cut_off(server: Arc<Server>) {
    let own = from(2);
    let slow = async |first: &str, then: &str| {
        let mut stream = connect(&server, own).await;
        stream.write_all(first.as_bytes()).await.unwrap();
        let (mut reader, mut writer) = stream.split();
        let dripping = async {
            for byte in then.bytes().cycle() {
                tokio::time::sleep(Duration::from_millis(100)).await;
                if writer.write_all(&[byte]).await.is_err() {
                    break;
                }
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            answer = rest(&mut reader) => answer,
            () = dripping => unreachable!("it waits for ever"),
        }
    };
    let heads = [
        ("", ""),
        ("GET /livez HT", ""),
        ("GET /livez HTTP/1.1\r\nhost: box\r\n", ""),
        ("GET /livez HTTP/1.1\r\nx: ", "y"),
        ("PRI * HTTP/2.0\r\n", ""),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ""),
    ];
    for answer in join_all(heads.iter().map(|(first, then)| slow(first, then))).await {
        let answer = String::from_utf8_lossy(&answer);
        assert!(!answer.contains(" 200 "), "{answer}");
    }
    // One that has been answered, and asks nothing more.
    let mut stream = connect(&server, own).await;
    assert!(is_ok(&ask_on(&mut stream, KEPT).await));
    assert!(rest(&mut stream).await.is_empty());
    // One whose caller has said all that it will.
    let mut stream = connect(&server, own).await;
    stream.shutdown().await.unwrap();
    assert!(rest(&mut stream).await.is_empty());
}

async fn who_sends_a_slow_body_is_told(server: Arc<Server>) {
    let mut stream = connect(&server, from(3)).await;
    let head = format!(
        "POST /v1/sessions HTTP/1.1\r\nhost: box\r\nauthorization: Bearer {}\r\ntransfer-encoding: chunked\r\n\r\n",
        server.key
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut reader, mut writer) = stream.split();
    let dripping = async {
        while writer.write_all(b"1\r\n \r\n").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        std::future::pending::<()>().await;
    };
    let answer = tokio::select! {
        answer = rest(&mut reader) => String::from_utf8_lossy(&answer).into_owned(),
        () = dripping => unreachable!("it waits for ever"),
    };
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("request-timeout"), "{answer}");
}

async fn who_does_not_read_is_cut_off(server: Arc<Server>) {
    let own = from(4);
    // It costs nothing to make, and 40 of it fit in no buffer.
    let once = ask(&server, own, get("/docs/swagger-ui-bundle.js", "")).await;
    assert!(is_ok(&once) && once.len() > 1 << 20, "{} bytes", once.len());
    let questions = "GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: box\r\n\r\n".repeat(40);
    let open = async || {
        let mut stream = connect(&server, own).await;
        stream.write_all(questions.as_bytes()).await.unwrap();
        stream
    };
    let _held = join_all((0..8).map(|_| open())).await;
    let refused = ask(&server, own, get("/livez", "")).await;
    assert!(refused.starts_with("HTTP/1.1 429 "), "the control: all places are taken: {refused}");
    let began = Instant::now();
    while !is_ok(&ask(&server, own, get("/livez", "")).await) {
        assert!(began.elapsed() < NEVER, "the places stay taken");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn who_does_not_read_over_http2_loses_its_streams(server: Arc<Server>) {
    let cell = server.cell().await;
    let run = cell.run("'x' * 400_000").await;
    let blob = text(&run["results"][0]["data"]["text/plain"]["$ref"]);
    let paths = [cell.path("/notebook"), blob, "/docs/swagger-ui-bundle.js".to_owned()];
    let connection = Streams::open(connect(&server, from(10)).await, 20_000).await;
    let asked = Instant::now();
    let unread = paths.iter().map(async |path| {
        let mut answer = connection.get(path, &server.key, &[]).await;
        assert_eq!(answer.status, 200, "{path}");
        (path, answer.unread(NEVER).await)
    });
    for (path, end) in join_all(unread).await {
        assert_eq!(end, End::Reset(h2::Reason::CANCEL), "{path}");
    }
    assert!(asked.elapsed() >= Duration::from_secs(2), "{:?}", asked.elapsed());
    // The control: who takes them has them. The first connection takes no more requests after `header_timeout`.
    let connection = Streams::open(connect(&server, from(10)).await, 20_000).await;
    for path in &paths {
        let taken = connection.get(path, &server.key, &[]).await.taken(Duration::ZERO, NEVER).await;
        assert!(matches!(taken, End::Whole(400_000..)), "{path}: {taken:?}");
    }
    cell.delete().await;
}

async fn what_takes_long_is_not_cut_off(server: Arc<Server>) {
    let cell = server.cell().await;
    let path = cell.path("/executions");
    let body = json!({"code": "import time; time.sleep(3); 'slept'"}).to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: box\r\nauthorization: Bearer {}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        server.key,
        body.len()
    );
    let request = Request::post(format!("http://box{path}"))
        .header("authorization", format!("Bearer {}", server.key))
        .header("content-type", "application/json")
        .body(Full::from(body.clone()))
        .unwrap();
    let one = ask(&server, from(5), head + &body);
    let two = async { over_http2(connect(&server, from(5)).await, request).await.unwrap() };
    let (one, (status, two)) = tokio::join!(one, two);
    assert!(is_ok(&one) && one.contains("slept"), "{one}");
    assert!(status == 200 && two.contains("slept"), "{status} {two}");
    cell.delete().await;
}

async fn heads_that_are_too_large(server: Arc<Server>) {
    let own = from(6);
    let many: String = (0..200).map(|n| format!("x-many-{n}: x\r\n")).collect();
    for (what, request) in [
        ("a long line", get("/livez", &format!("x-large: {}\r\n", "x".repeat(100_000)))),
        ("a long path", get(&format!("/{}", "x".repeat(100_000)), "")),
        ("many lines", get("/livez", &many)),
        ("a long key", get("/v1/sessions", &format!("authorization: Bearer {}\r\n", "x".repeat(1 << 20)))),
    ] {
        let answer = ask(&server, own, request).await;
        let status = answer.get(9..12).unwrap_or_default();
        // The answer may be lost where the rest of the request is still on its way.
        assert!(["431", "414", ""].contains(&status), "{what}: {answer}");
    }
    let answer = ask(&server, own, get("/livez", &format!("x: {}\r\n", "x".repeat(15_000)))).await;
    assert!(is_ok(&answer), "the control: below it is fine: {answer}");
    let large = Request::get("http://box/livez").header("x-large", "x".repeat(100_000)).body(Full::default()).unwrap();
    let answer = over_http2(connect(&server, own).await, large).await;
    assert!(answer.as_ref().map_or(true, |(status, _)| *status == 431), "{answer:?}");
}

async fn heads_that_are_malformed(server: Arc<Server>) {
    let own = from(7);
    for head in [
        "GET /livez HTTP/1.1\r\nhost: box\r\nx: a\0b\r\n\r\n",
        "GET /livez HTTP/1.1\r\nhost: box\r\nx : y\r\n\r\n",
        "GET /livez HTTP/1.1\r\nhost: box\r\nx: y\r\n z\r\n\r\n",
        "GET /livez HTTP/1.1\r\nhost: box\r\nx: a\rb\r\n\r\n",
        "GET /li vez HTTP/1.1\r\nhost: box\r\n\r\n",
        "GET /livez HTTP/3.0\r\nhost: box\r\n\r\n",
        "G\u{e9}T /livez HTTP/1.1\r\nhost: box\r\n\r\n",
        "POST /v1/sessions HTTP/1.1\r\nhost: box\r\ncontent-length: -1\r\n\r\n",
        "POST /v1/sessions HTTP/1.1\r\nhost: box\r\ncontent-length: 1, 2\r\n\r\n",
        "POST /v1/sessions HTTP/1.1\r\nhost: box\r\ntransfer-encoding: gzip\r\n\r\n",
        "POST /v1/sessions HTTP/1.0\r\nhost: box\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ] {
        let answer = ask(&server, own, head).await;
        assert!(answer.starts_with("HTTP/1.1 400 ") || answer.is_empty(), "{head:?}: {answer}");
    }
    let everything = ask(&server, own, "OPTIONS * HTTP/1.1\r\nhost: box\r\nconnection: close\r\n\r\n").await;
    assert!(!everything.contains("openapi") && !everything.contains(" 500 "), "{everything}");
    // What tries to leave its line for another's stays in it: the id is not taken, and nothing is added.
    let answer = ask(&server, own, get("/livez", "x-request-id: a%0d%0aset-cookie: b\r\n")).await;
    assert!(is_ok(&answer) && !answer.contains("set-cookie"), "{answer}");
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GO_AWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// A frame of HTTP/2 (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A head in HPACK's plain form (RFC 7541): method, scheme, path, host, and the key.
fn head(method: &str, path: &str, key: &str) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    let named = |index: u8, value: &str| [vec![index], text(value)].concat();
    let key = [vec![0], text("authorization"), text(&format!("Bearer {key}"))].concat();
    [named(2, method), vec![0x86], named(4, path), named(1, "box"), key].concat()
}

/// The frames of a connection's answer: kind, stream and payload.
fn frames(mut bytes: &[u8]) -> Vec<(u8, u32, Vec<u8>)> {
    let mut found = Vec::new();
    while let Some((head, rest)) = bytes.split_at_checked(9) {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let Some((payload, rest)) = rest.split_at_checked(length) else { break };
        found.push((head[3], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload.to_vec()));
        bytes = rest;
    }
    found
}

/// Streams of a client, in their order.
fn streams(count: u32) -> impl Iterator<Item = u32> {
    (0..count).map(|n| 2 * n + 1)
}

async fn http2_that_means_harm(server: Arc<Server>) {
    let own = from(8);
    let begin = || [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    let asked = |stream| frame(HEADERS, END_HEADERS | END_STREAM, stream, &head("GET", "/v1/sessions", "none"));
    // What is given up as soon as it was asked.
    let resets = streams(2000).flat_map(|n| [asked(n), frame(RST_STREAM, 0, n, &8_u32.to_be_bytes())].concat());
    // A head that does not end.
    let first = frame(HEADERS, END_STREAM, 1, &head("GET", "/livez", "none"));
    let endless = first.into_iter().chain((0..5000).flat_map(|_| frame(CONTINUATION, 0, 1, &[0, 1, b'x', 1, b'y'])));
    for (what, bytes) in [
        ("rapid resets", resets.collect::<Vec<u8>>()),
        ("an endless head", endless.collect()),
        ("a frame of 16 MiB", [&[0xff, 0xff, 0xff, HEADERS, 0][..], &1_u32.to_be_bytes(), &[0; 1000]].concat()),
        ("a head of no stream", frame(HEADERS, END_HEADERS, 0, &head("GET", "/livez", "none"))),
        ("a head that is none", frame(HEADERS, END_HEADERS, 1, &[0xff; 64])),
        ("an end of what was not begun", frame(RST_STREAM, 0, 7, &8_u32.to_be_bytes())),
        ("settings that are none", frame(SETTINGS, 0, 0, &[1, 2, 3])),
    ] {
        let mut stream = connect(&server, own).await;
        let _ = stream.write_all(&[begin(), bytes].concat()).await;
        let answer = frames(&rest(&mut stream).await);
        // Its reason, where the end has not overtaken it: anything but "no error".
        let reason = answer.iter().find(|(kind, ..)| *kind == GO_AWAY).map(|(.., payload)| payload[4..8].to_vec());
        assert!(reason.is_none_or(|reason| reason != [0; 4]), "{what} was not refused: {answer:?}");
        assert!(answer.iter().filter(|(kind, ..)| *kind == HEADERS).count() < 2000, "{what} was answered");
    }
    // More at a time than may be: the rest is refused, one by one.
    let begun = streams(260).flat_map(|n| frame(HEADERS, END_HEADERS, n, &head("POST", "/v1/sessions", &server.key)));
    let mut stream = connect(&server, own).await;
    stream.write_all(&[begin(), begun.collect()].concat()).await.unwrap();
    let (mut all, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
    let refused = |all: &[u8]| {
        let refused = 7_u32.to_be_bytes();
        frames(all).iter().filter(|(kind, _, code)| *kind == RST_STREAM && code[..] == refused).count()
    };
    let began = Instant::now();
    while refused(&all) < 60 {
        assert!(began.elapsed() < NEVER, "{:?}", frames(&all));
        let count = tokio::time::timeout(NEVER, stream.read(&mut buffer)).await.expect("an answer in time").unwrap();
        assert!(count > 0, "the connection ended after {:?}", frames(&all));
        all.extend_from_slice(&buffer[..count]);
    }
    assert_eq!(refused(&all), 60);
    let good = Request::get("http://box/livez").body(Full::default()).unwrap();
    assert_eq!(over_http2(connect(&server, own).await, good).await.unwrap().0, 200, "the control");
}

async fn pages_of_other_sites(server: Arc<Server>) {
    let send = async |method: &str, path: &str, headers: &[(&str, &str)], key: bool| -> Reply {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = if key { server.request(method, path) } else { server.bare(method, path) };
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        server.send(request).await
    };
    let foreign = [
        "https://evil.example",
        "null",
        "http://app.example",
        "https://app.example.evil.example",
        "https://app.example:8443",
    ];
    for origin in ["https://app.example", "http://localhost:3000"] {
        for (method, path) in [
            ("POST", "/v1/sessions"),
            ("DELETE", "/v1/sessions/x"),
            ("PATCH", "/v1/sessions/x"),
            ("PUT", "/v1/admin/log"),
            ("GET", "/v1/usage"),
        ] {
            let asked = [
                ("origin", origin),
                ("access-control-request-method", method),
                ("access-control-request-headers", "authorization,content-type"),
            ];
            let reply = send("OPTIONS", path, &asked, false).await;
            assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, origin), "{method} {path}");
            assert!(reply.header("access-control-allow-methods").contains(method), "{:?}", reply.headers);
            for header in ["authorization", "content-type", "idempotency-key", "last-event-id", "traceparent"] {
                assert!(reply.header("access-control-allow-headers").contains(header), "{:?}", reply.headers);
            }
            assert_eq!(reply.header("access-control-allow-credentials"), "", "keys are not cookies");
            assert!(reply.header("vary").contains("origin"), "{:?}", reply.headers);
        }
        let problem = send("POST", "/v1/sessions", &[("origin", origin)], false).await;
        problem.problem(401, "unauthenticated");
        assert_eq!(problem.header("access-control-allow-origin"), origin, "a page can read why");
        assert!(problem.header("access-control-expose-headers").contains("retry-after"));
        let reply = send("POST", "/v1/sessions", &[("origin", origin), ("content-type", "text/plain")], true).await;
        reply.problem(415, "unsupported-media-type");
    }
    for origin in foreign {
        let asked = [("origin", origin), ("access-control-request-method", "POST")];
        let reply = send("OPTIONS", "/v1/sessions", &asked, false).await;
        assert_eq!(reply.header("access-control-allow-origin"), "", "{origin}");
        for (method, path) in [("POST", "/v1/sessions"), ("DELETE", "/v1/sessions/x"), ("POST", "/v1/admin/drain")] {
            let reply = send(method, path, &[("origin", origin)], true).await;
            reply.problem(403, "forbidden");
            assert_eq!(reply.header("access-control-allow-origin"), "", "{origin}");
        }
        let reply = send("GET", "/v1/sessions", &[("origin", origin)], true).await;
        assert_eq!(
            (reply.status, reply.header("access-control-allow-origin")),
            (200, ""),
            "{origin}: it can't be read"
        );
    }
    let own = server.url.clone();
    let reply = send("DELETE", "/v1/sessions/x", &[("origin", &own)], true).await;
    reply.problem(404, "not-found");
}

async fn nothing_tells_what_runs_here(server: Arc<Server>) {
    let own = from(9);
    let large = format!("x: {}\r\n", "x".repeat(20_000));
    for request in [
        get("/livez", ""),
        get("/readyz", ""),
        get("/v1/sessions", ""),
        get("/nothing", ""),
        get("/v1/sessions", &format!("authorization: Bearer {}\r\n", server.key)),
        get("/livez", &large),
        "PUT /v1/sessions HTTP/1.1\r\nhost: box\r\nconnection: close\r\n\r\n".to_owned(),
        "what\r\n\r\n".to_owned(),
    ] {
        let answer = ask(&server, own, request).await.to_ascii_lowercase();
        assert!(answer.starts_with("http/1.1 "), "{answer}");
        let told = ["\r\nserver:", "\r\nvia:", "\r\nx-powered-by:", "hyper", "axum", "rust", env!("CARGO_PKG_VERSION")];
        assert_eq!(told.into_iter().find(|word| answer.contains(word)), None, "{answer}");
    }
}

async fn what_to_paste_is_shown_for_hosts_alone(server: Arc<Server>) {
    let own = from(10);
    let at = |host: &str| format!("GET /connect HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    let shown = ask(&server, own, at("Box.example:8080")).await;
    assert!(is_ok(&shown) && shown.contains("CELLBLOCK_URL=&#39;http://box.example:8080&#39;"), "{shown}");
    let (head, page) = shown.split_once("\r\n\r\n").unwrap();
    let value = |name: &str| head.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).unwrap_or_default();
    let policy = value("content-security-policy");
    assert!(policy.starts_with("default-src 'none'; style-src 'sha256-") && !policy.contains("unsafe"), "{policy}");
    assert!(policy.ends_with("; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"), "{policy}");
    let told = ["referrer-policy", "cache-control", "x-content-type-options", "content-type"].map(value);
    assert_eq!(told, ["no-referrer", "no-store", "nosniff", "text/html; charset=utf-8"]);
    assert!(!page.contains("<script") && !page.contains(&server.key), "{page}");
    assert_eq!(page.matches("http://").count() - page.matches("http://box.example:8080").count(), 0, "{page}");
    let with_query = ask(&server, own, get("/connect?key=planted%3Cb%3E", "x-forwarded-proto: https\r\n")).await;
    assert!(is_ok(&with_query) && !with_query.contains("planted") && with_query.contains("http://box"), "{with_query}");
    for hostile in [
        "<script>alert(1)</script>",
        "a\"onmouseover=planted",
        "box'; planted '",
        "$(planted)",
        "planted@box",
        "box/planted",
        "box:80:planted",
        "",
    ] {
        let refused = ask(&server, own, at(hostile)).await;
        assert!(refused.starts_with("HTTP/1.1 400 "), "{hostile}: {refused}");
        assert!(!refused.contains("planted") && !refused.contains("<script"), "{hostile}: {refused}");
    }
    let twice = ask(&server, own, get("/connect", "host: planted.example\r\n")).await;
    assert!(twice.starts_with("HTTP/1.1 400 ") && !twice.contains("planted"), "{twice}");
    // For programs: which doors are open.
    let doors = ask(&server, own, get("/connect", "accept: application/json\r\n")).await;
    assert!(doors.ends_with(r#"{"doors":{"classic":false,"e2b":true,"jupyter":true,"mcp":true}}"#), "{doors}");
    assert!(page.contains("doors.classic.enabled") && !page.contains("classic.py"), "{page}");
}

const CEILINGS: &str = r#"
[server]
connections = 20
connections_per_address = 6
trusted_proxies = ["127.0.0.3"]
[auth]
failures = 2
failure_window = "1h"
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_greedy_and_the_disguised() {
    let server = Server::start(CEILINGS).await;
    let cases = cases![server; tls_is_believed_of_proxies_only, one_address_does_not_keep_others_out, all_places_can_be_taken_and_come_back, addresses_are_believed_from_proxies_only, a_websocket_keeps_its_place];
    server.run_and_finish(1, cases).await;
}

/// Connections that stay and have been answered, so they have their places.
async fn take(server: &Server, from: Ipv4Addr, count: usize) -> Vec<TcpStream> {
    let one = async || {
        let mut stream = connect(server, from).await;
        let answer = ask_on(&mut stream, KEPT).await;
        assert!(is_ok(&answer), "{answer}");
        stream
    };
    join_all((0..count).map(|_| one())).await
}

/// Asks until it is answered well: places come back just after their connections have ended.
async fn let_in_again(server: &Server, from: Ipv4Addr) {
    let began = Instant::now();
    while !is_ok(&ask(server, from, get("/livez", "")).await) {
        assert!(began.elapsed() < NEVER, "the places stay taken");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn one_address_does_not_keep_others_out(server: Arc<Server>) {
    let (greedy, other) = (from(2), from(4));
    let held = take(&server, greedy, 6).await;
    let refused = ask(&server, greedy, get("/livez", "")).await;
    assert!(refused.starts_with("HTTP/1.1 429 ") && refused.contains("rate-limited"), "{refused}");
    assert!(
        refused.contains("retry-after: 1") && refused.contains("connection: close") && refused.contains("\"req"),
        "{refused}"
    );
    let request = Request::get("http://box/livez").body(Full::default()).unwrap();
    let refused = over_http2(connect(&server, greedy).await, request).await;
    assert!(refused.as_ref().map_or(true, |(status, _)| *status == 429), "{refused:?}");
    let key = format!("authorization: Bearer {}\r\n", server.key);
    let mut crowd = Vec::new();
    for _ in 0..200 {
        crowd.push(connect(&server, greedy).await);
        if crowd.len() % 20 == 0 {
            let answer = ask(&server, other, get("/v1/sessions", &key)).await;
            assert!(is_ok(&answer), "{answer}");
        }
    }
    drop((held, crowd));
    let_in_again(&server, greedy).await;
}

/// What is no HTTP any more keeps its place for as long as it lasts.
async fn a_websocket_keeps_its_place(server: Arc<Server>) {
    let (caller, cell) = (from(5), server.cell().await);
    let held = take(&server, caller, 5).await;
    let upgrade = format!(
        "Authorization: Bearer {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
        server.key
    );
    let mut terminal = connect(&server, caller).await;
    let head = format!("GET {} HTTP/1.1\r\nHost: box\r\n{upgrade}\r\n", cell.path("/terminal"));
    terminal.write_all(head.as_bytes()).await.unwrap();
    let mut begun = [0; 12];
    terminal.read_exact(&mut begun).await.unwrap();
    assert_eq!(&begun, b"HTTP/1.1 101");
    let refused = ask(&server, caller, get("/livez", "")).await;
    assert!(refused.starts_with("HTTP/1.1 429 "), "{refused}");
    drop(terminal);
    let_in_again(&server, caller).await;
    drop(held);
    cell.delete().await;
}

async fn all_places_can_be_taken_and_come_back(server: Arc<Server>) {
    let mut held = Vec::new();
    for last in 20..23 {
        held.extend(take(&server, from(last), 6).await);
    }
    // A proxy has as many as there are.
    held.extend(take(&server, from(3), 2).await);
    let refused = ask(&server, from(30), get("/livez", "")).await;
    assert!(refused.starts_with("HTTP/1.1 503 ") && refused.contains("at-capacity"), "{refused}");
    drop(held);
    let_in_again(&server, from(30)).await;
    drop(take(&server, from(3), 12).await);
}

async fn tls_is_believed_of_proxies_only(server: Arc<Server>) {
    for (peer, expected) in [(from(3), "https://box&#39;"), (from(50), "http://box&#39;")] {
        let shown = ask(&server, peer, get("/connect", "x-forwarded-proto: https\r\n")).await;
        assert!(shown.contains(expected), "{peer}: {shown}");
    }
}

async fn addresses_are_believed_from_proxies_only(server: Arc<Server>) {
    let ask_as = async |peer: Ipv4Addr, forwarded: String| {
        let answer = ask(&server, peer, get("/v1/sessions", &format!("{forwarded}x-api-key: wrong\r\n"))).await;
        answer[9..12].to_owned()
    };
    let statuses = async |peer: Ipv4Addr, forwarded: &(dyn Fn(usize) -> String + Sync)| {
        let mut statuses = Vec::new();
        for n in 0..4 {
            statuses.push(ask_as(peer, forwarded(n)).await);
        }
        statuses
    };
    let (counted, not_counted) = (["401", "401", "429", "429"], ["401"; 4]);
    let each = |n: usize| format!("x-forwarded-for: 198.51.100.{n}\r\nforwarded: for=198.51.100.{n}\r\n");
    assert_eq!(statuses(from(40), &each).await, counted, "nobody is believed who is no proxy");
    assert_eq!(statuses(from(3), &each).await, not_counted, "a proxy is");
    let spoofed = |n: usize| format!("x-forwarded-for: 198.51.100.{n}\r\nx-forwarded-for: 203.0.113.1\r\n");
    assert_eq!(statuses(from(3), &spoofed).await, counted, "what its caller wrote is not");
    let longer = |n: usize| format!("x-forwarded-for: 198.51.100.{n}, 203.0.113.2, 127.0.0.3\r\n");
    assert_eq!(statuses(from(3), &longer).await, counted, "nor behind two proxies");
    let other = |n: usize| format!("forwarded: for=198.51.100.{n}\r\nx-forwarded-for: 203.0.113.3\r\n");
    assert_eq!(statuses(from(3), &other).await, counted, "nor in the header that proxies do not set");
}

/// Writes a certificate of its own making for this name, and its key.
fn certify(folder: &Path, name: &str) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
    for (file, text) in [("cert.pem", made.cert.pem()), ("key.pem", made.signing_key.serialize_pem())] {
        // As tools do it that exchange certificates.
        let (path, next) = (folder.join(file), folder.join("next"));
        std::fs::write(&next, text).unwrap();
        std::fs::set_permissions(&next, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::rename(next, path).unwrap();
    }
    made.cert.der().clone()
}

async fn shake(
    server: &Server,
    trusted: &CertificateDer<'static>,
    name: &'static str,
    protocols: &[&str],
) -> std::io::Result<TlsStream<TcpStream>> {
    shake_on(connect(server, from(1)).await, trusted, name, protocols).await
}

async fn shake_on(
    stream: TcpStream,
    trusted: &CertificateDer<'static>,
    name: &'static str,
    protocols: &[&str],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    let shaking = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(name).unwrap(), stream);
    tokio::time::timeout(NEVER, shaking).await.expect("a handshake in time")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_tls() {
    let folder = tempfile::tempdir().unwrap();
    let first = certify(folder.path(), "box.example");
    let path = |file: &str| folder.path().join(file);
    let settings = format!(
        "[server]\nheader_timeout = \"2s\"\ntls_cert_file = {:?}\ntls_key_file = {:?}\n",
        path("cert.pem"),
        path("key.pem")
    );
    let server = Server::start(&settings).await;
    // Both protocols.
    let mut one = shake(&server, &first, "box.example", &["http/1.1"]).await.unwrap();
    assert_eq!(one.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    assert!(is_ok(&ask_on(&mut one, KEPT).await));
    let two = shake(&server, &first, "box.example", &["h2", "http/1.1"]).await.unwrap();
    assert_eq!(two.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let request = Request::get("https://box.example/connect").body(Full::default()).unwrap();
    let (status, shown) = over_http2(two, request).await.unwrap();
    assert!(status == 200 && shown.contains("CELLBLOCK_URL=&#39;https://box.example&#39;"), "{status} {shown}");
    assert!(shake(&server, &first, "box.example", &["spdy/1"]).await.is_err(), "a protocol that nobody speaks");
    // Who asks for another server gets a certificate that is not for it.
    let wrong = shake(&server, &first, "evil.example", &[]).await.unwrap_err();
    assert!(wrong.to_string().contains("certificate"), "{wrong}");
    // What is no TLS, and what stops halfway, ends.
    let hello: &[u8] = &[0x16, 3, 1, 0x02, 0x00, 1, 0, 1, 0xfc, 3, 3];
    let garbage = [0xff; 4096];
    for bytes in [&b""[..], KEPT.as_bytes(), PREFACE, hello, &garbage, &[0x16, 3, 1, 0xff, 0xff]] {
        let mut stream = connect(&server, from(2)).await;
        stream.write_all(bytes).await.unwrap();
        let answer = rest(&mut stream).await;
        assert!(!String::from_utf8_lossy(&answer).contains("HTTP/"), "{answer:?}");
    }
    // A handshake after which nothing is asked.
    let mut silent = shake(&server, &first, "box.example", &[]).await.unwrap();
    assert!(rest(&mut silent).await.is_empty());
    // Another certificate, while the server runs.
    let second = certify(folder.path(), "box.example");
    let began = Instant::now();
    while shake(&server, &second, "box.example", &[]).await.is_err() {
        assert!(began.elapsed() < NEVER, "the certificate stays the first one");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(shake(&server, &first, "box.example", &[]).await.is_err());
    // One that can't be used leaves the other in force, past the time in which it is looked at.
    std::fs::write(path("cert.pem"), "nothing").unwrap();
    tokio::time::sleep(Duration::from_secs(11)).await;
    assert!(shake(&server, &second, "box.example", &[]).await.is_ok());
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
    // Nor does a server start with it.
    let (_folder, config) = server::configuration(&settings);
    let refused =
        cellblock::app::serve(&config, cellblock::app::Process::default(), |_| panic!("it can't be ready")).await;
    assert!(refused.is_err_and(|error| error.to_string().contains("cert.pem")));
}

/// A server with TLS, and its operator's key and files.
struct Operated {
    address: SocketAddr,
    key: String,
    files: tempfile::TempDir,
    process: cellblock::app::Process,
    ended: tokio::task::JoinHandle<()>,
}

impl Operated {
    async fn start(certificates: &Path) -> Self {
        let key = format!("cb_{}", uuid::Uuid::new_v4().simple().to_string().repeat(2));
        let file = certificates.join("key");
        std::fs::write(&file, &key).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let path = |file: &str| certificates.join(file);
        let settings = format!(
            "[doors]\nconnect = false\n[server]\napi_key_file = {file:?}\ntls_cert_file = {:?}\ntls_key_file = {:?}\n",
            path("cert.pem"),
            path("key.pem")
        );
        let (files, config) = server::configuration(&settings);
        let read = ["base.toml", "test.toml"].map(|name| files.path().join(name)).to_vec();
        let inputs = Inputs { files: read, ..Inputs::default() };
        let loaded = config::load(&inputs).unwrap();
        let process = Process { read: Some((inputs, loaded)), ..Process::default() };
        let (stop, reload) = (process.stop.clone(), Arc::clone(&process.reload));
        let (ready, address) = tokio::sync::oneshot::channel();
        let ended = cellblock::task::spawn("server", async move {
            let served = cellblock::app::serve(&config, process, |address| ready.send(address).unwrap()).await;
            served.unwrap_or_else(|error| panic!("{error}"));
        });
        let address = address.await.expect("a server");
        Self { address, key, files, process: Process { stop, reload, ..Process::default() }, ended }
    }

    async fn shows(&self, certificate: &CertificateDer<'static>) -> std::io::Result<TlsStream<TcpStream>> {
        shake_on(TcpStream::connect(self.address).await.unwrap(), certificate, "box.example", &["h2"]).await
    }

    /// Status and answer of a reload, which is asked for by whoever trusts this certificate.
    async fn reload(&self, trusted: &CertificateDer<'static>) -> (u16, Value) {
        let request = Request::post("https://box.example/v1/admin/reload").header("content-type", "application/json");
        let request = request.header("authorization", format!("Bearer {}", self.key));
        let connection = self.shows(trusted).await.expect("a handshake");
        let (status, text) = over_http2(connection, request.body(Full::from("{}")).unwrap()).await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}")))
    }

    fn limit_sessions(&self, to: u32) {
        let file = self.files.path().join("test.toml");
        let text = std::fs::read_to_string(&file).unwrap();
        let text = text.split("[limits]").next().unwrap();
        std::fs::write(&file, format!("{text}[limits]\nsessions = {to}\n")).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_takes_a_certificate_over_at_once_or_nothing_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let first = certify(folder.path(), "box.example");
    let server = Operated::start(folder.path()).await;
    assert_eq!(server.reload(&first).await, (200, json!({"changes": []})));
    let connect = Request::get("https://box.example/connect").body(Full::default()).unwrap();
    let there = over_http2(server.shows(&first).await.unwrap(), connect).await.unwrap();
    assert_eq!(there.0, 404, "it is switched off: {}", there.1);

    let sum = || {
        let sum = std::process::Command::new("sha256sum").arg(folder.path().join("cert.pem")).output().unwrap();
        format!("\"sha256:{}\"", &String::from_utf8(sum.stdout).unwrap()[..64])
    };
    let (before, second) = (sum(), certify(folder.path(), "box.example"));
    let changed = json!({"changes": [{"key": "server.tls_cert_file", "before": before, "after": sum()}]});
    assert_eq!(server.reload(&first).await, (200, changed));
    assert!(server.shows(&first).await.is_err() && server.shows(&second).await.is_ok());

    // One that can't be used: each reload says so, and takes over nothing else.
    let (before, good) = (sum(), std::fs::read(folder.path().join("cert.pem")).unwrap());
    std::fs::write(folder.path().join("cert.pem"), "nothing").unwrap();
    server.limit_sessions(7);
    for _ in 0..2 {
        let (status, problem) = server.reload(&second).await;
        assert_eq!((status, problem["errors"].as_array().map(Vec::len)), (422, Some(1)), "{problem}");
        let line = server::text(&problem["errors"][0]["message"]);
        assert!(line.starts_with("server.tls_cert_file: ") && line.contains("cert.pem: there is no cert"), "{line}");
    }
    std::fs::write(folder.path().join("cert.pem"), good).unwrap();
    let limits = json!({"key": "limits.sessions", "before": "100", "after": "7"});
    assert_eq!(server.reload(&second).await, (200, json!({"changes": [limits]})));
    // And one that is right is not taken over beside a mistake.
    let third = certify(folder.path(), "box.example");
    server.limit_sessions(0);
    assert_eq!(server.reload(&second).await.0, 422);
    assert!(server.shows(&second).await.is_ok());
    server.limit_sessions(8);
    let (status, both) = server.reload(&second).await;
    let third_shown = json!({"key": "server.tls_cert_file", "before": before, "after": sum()});
    assert_eq!((status, &both["changes"][1]), (200, &third_shown), "{both}");
    assert!(server.shows(&third).await.is_ok());

    // By a signal.
    let fourth = certify(folder.path(), "box.example");
    let began = Instant::now();
    server.process.reload.notify_one();
    while server.shows(&fourth).await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(5), "it is not looked at with a reload");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    server.process.stop.at_once();
    tokio::time::timeout(NEVER, server.ended).await.expect("an end").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_good_key_the_server_does_not_start() {
    let good = format!("cb_{}", "0f".repeat(32));
    for (key, mode, said) in [
        ("", 0o600, "put one in"),
        ("\n", 0o600, "put one in"),
        ("cb_0f0f", 0o600, "put one in"),
        (&good[..good.len() - 1], 0o600, "put one in"),
        ("changeme", 0o600, "put one in"),
        (good.as_str(), 0o644, "chmod 600"),
        (good.as_str(), 0o640, "chmod 600"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key");
        std::fs::write(&file, key).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        let (_folder, config) = server::configuration(&format!("[server]\napi_key_file = {file:?}\n"));
        let started =
            cellblock::app::serve(&config, cellblock::app::Process::default(), |_| panic!("it can't be ready"));
        let refused = tokio::time::timeout(NEVER, started).await.expect("an answer in time");
        let Err(error @ cellblock::app::StartError::Key { .. }) = refused else { panic!("{key:?}: {refused:?}") };
        let words = error.to_string();
        assert!(words.contains(said) && (key.is_empty() || key == "\n" || !words.contains(key)), "{words}");
    }
}
