//! Ports of sessions: what code serves on its loopback, asked through the API. The code is hostile; so are some callers. With real containers.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use server::{Case, Cell, NEVER, Server, text};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const SERVERS: &str = include_str!("support/port_servers.py");
const SETTINGS: &str =
    "[server]\nports_timeout = \"2s\"\nports_domain = \"ports.test\"\n[templates.python]\nports = [\"8000-8005\"]\n";

async fn serving(server: &Arc<Server>) -> Cell {
    let cell = server.create(json!({ "template": "python" })).await;
    let ran = cell.run(SERVERS).await;
    assert_eq!(ran["status"], "ok", "{ran}");
    cell
}

fn address(server: &Server) -> &str {
    server.url.strip_prefix("http://").unwrap()
}

/// Sends a head (and what follows it) as it stands, with a key if there is none, and gives the connection.
async fn raw(server: &Server, target: &str, headers: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address(server)).await.unwrap();
    let host = if headers.to_ascii_lowercase().contains("host:") { "" } else { "Host: api.test\r\n" };
    let request = format!("{target} HTTP/1.1\r\n{host}X-API-Key: {}\r\n{headers}\r\n", server.key);
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

/// The whole answer to that, in small letters but for its body.
async fn raw_answer(server: &Server, target: &str, headers: &str) -> (String, String) {
    let mut stream = raw(server, target, &format!("{headers}Connection: close\r\n")).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(NEVER, stream.read_to_end(&mut answer)).await.expect("an answer");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    (head.to_ascii_lowercase(), body.to_owned())
}

fn header_of(told: &Value, name: &str) -> Vec<String> {
    let pairs = told["headers"].as_array().unwrap().iter();
    pairs.filter(|pair| text(&pair[0]).eq_ignore_ascii_case(name)).map(|pair| text(&pair[1])).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports() {
    let server = Server::start(SETTINGS).await;
    let cell = Arc::new(serving(&server).await);
    macro_rules! case {
        ($name:ident) => {{
            let (server, cell) = (Arc::clone(&server), Arc::clone(&cell));
            let case: Case = (stringify!($name), Box::pin(async move { $name(&server, &cell).await }));
            case
        }};
    }
    let cases = vec![
        case!(requests_arrive_whole_and_without_the_key),
        case!(bodies_of_any_size_arrive_whole),
        case!(an_answer_comes_as_it_is_written),
        case!(what_is_not_allowed_or_not_there_is_told_apart),
        case!(a_hostile_server_costs_its_own_request_only),
        case!(redirections_stay_within_the_port),
        case!(a_websocket_is_passed_through_to_programs_and_not_to_pages),
        case!(a_websocket_ends_with_the_key_that_has_opened_it),
        case!(a_host_of_its_own_has_its_own_paths_and_never_the_api),
        case!(a_caller_that_leaves_takes_the_connection_along),
    ];
    server.run_and_finish(1, cases).await;
}

async fn requests_arrive_whole_and_without_the_key(server: &Arc<Server>, cell: &Cell) {
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"] {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let request =
            server.request(method.clone(), &cell.path("/ports/8000/a%2Fb/../c?x=%20&y")).header("x-mine", "1");
        let reply = server.send(request.header("cookie", "a=b").body("hello")).await;
        assert_eq!(reply.status, 200, "{method}: {}", reply.text);
        assert_eq!(reply.json["method"], method.as_str());
        assert_eq!(reply.json["length"], 5, "{}", reply.text);
        assert_eq!(header_of(&reply.json, "x-mine"), ["1"]);
        for never in ["authorization", "x-api-key", "cookie"] {
            assert_eq!(header_of(&reply.json, never), Vec::<String>::new(), "{never}");
        }
        assert!(!reply.text.contains(&server.key));
        assert_eq!(header_of(&reply.json, "x-forwarded-for"), ["127.0.0.1"]);
        assert_eq!(header_of(&reply.json, "host"), ["localhost:8000"]);
        assert_eq!(header_of(&reply.json, "x-forwarded-proto"), ["http"]);
        assert_eq!(reply.header("x-of-code"), "1");
        assert_eq!(reply.header("content-security-policy"), "sandbox");
        assert_eq!(reply.header("x-content-type-options"), "nosniff");
        for never in ["set-cookie", "access-control-allow-origin"] {
            assert_eq!(reply.header(never), "", "{never}");
        }
    }
    // As it was written: nothing is decoded, nothing is followed.
    let (_, body) =
        raw_answer(server, &format!("GET {}", cell.path("/ports/8000/a%2Fb/../%2e%2e/c//d?x=%20&y")), "").await;
    let told: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(told["path"], "/a%2Fb/../%2e%2e/c//d?x=%20&y");
    for (path, expected) in [("/ports/8000", "/"), ("/ports/8000/", "/"), ("/ports/8000?q", "/?q")] {
        assert_eq!(server.get(&cell.path(path)).await.json["path"], expected, "{path}");
    }
    assert_eq!(server.get(&cell.path("/ports/8000/odd")).await.status, 299, "its own statuses");
    let head = server.send(server.request(Method::HEAD, &cell.path("/ports/8000/x"))).await;
    assert_eq!((head.status, head.text.as_str()), (200, ""));
    assert_eq!(server.get(&cell.path("/ports/8003/")).await.text, "six", "the other family");
}

async fn bodies_of_any_size_arrive_whole(server: &Arc<Server>, cell: &Cell) {
    // More than any window or buffer on the way, and than server.max_body.
    let block = bytes::Bytes::from((0..1 << 20).map(|n| (n % 251) as u8).collect::<Vec<_>>());
    let blocks = vec![block.clone(); 40];
    let digest = blocks.iter().fold(Sha256::new(), |hash, block| hash.chain_update(block)).finalize();
    let digest: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    let body = reqwest::Body::wrap_stream(futures_util::stream::iter(blocks.into_iter().map(std::io::Result::Ok)));
    let reply = server.send(server.request(Method::PUT, &cell.path("/ports/8000/up")).body(body)).await;
    assert_eq!((&reply.json["length"], &reply.json["sha256"]), (&json!(40 << 20), &json!(digest)), "{}", reply.text);

    let response = server.request(Method::GET, &cell.path("/ports/8000/big")).send().await.unwrap();
    assert_eq!(response.headers()["content-length"], (32 << 20).to_string().as_str());
    let (mut stream, mut length) = (response.bytes_stream(), 0_usize);
    while let Some(piece) = stream.next().await {
        length += piece.unwrap().len();
    }
    assert_eq!(length, 32 << 20);
}

async fn an_answer_comes_as_it_is_written(server: &Arc<Server>, cell: &Cell) {
    let began = Instant::now();
    let response = server.request(Method::GET, &cell.path("/ports/8000/stream?6")).send().await.unwrap();
    let mut stream = response.bytes_stream();
    let first = stream.next().await.unwrap().unwrap();
    assert_eq!(first, "0\n");
    assert!(began.elapsed() < Duration::from_secs(2), "the first piece comes before the last is written");
    let mut rest = Vec::new();
    while let Some(piece) = stream.next().await {
        rest.extend_from_slice(&piece.unwrap());
    }
    assert_eq!(rest, b"1\n2\n3\n4\n5\n");
    assert!(began.elapsed() > Duration::from_secs(2), "which takes longer than an answer may take to begin");
}

async fn what_is_not_allowed_or_not_there_is_told_apart(server: &Arc<Server>, cell: &Cell) {
    let ask = async |path: &str| server.get(&cell.path(path)).await;
    let refused = ask("/ports/9000/closes").await;
    assert!(text(&refused.problem(403, "port-not-allowed")["detail"]).contains("8000-8005"), "something listens there");
    ask("/ports/8004/").await.problem(502, "port-closed");
    for none in ["/ports/0/", "/ports/65536/", "/ports/x/", "/ports/+8000/", "/ports/-1/", "/ports/8000.0/"] {
        ask(none).await.problem(404, "not-found");
    }
    server.send(server.bare(Method::GET, &cell.path("/ports/8000/"))).await.problem(401, "unauthenticated");
    let with_cookie =
        server.bare(Method::GET, &cell.path("/ports/8000/")).header("cookie", format!("x-api-key={}", server.key));
    server.send(with_cookie).await.problem(401, "unauthenticated");
    let other = server.create(json!({ "template": "data" })).await;
    let off = server.get(&other.path("/ports/8000/")).await;
    assert!(text(&off.problem(403, "port-not-allowed")["detail"]).contains("none"), "off by default");
    other.delete().await;
}

async fn a_hostile_server_costs_its_own_request_only(server: &Arc<Server>, cell: &Cell) {
    for garbled in [
        "garbage", "closes", "old", "status", "number", "headers", "header", "lengths", "negative", "switches",
        "splits",
    ] {
        let reply = server.get(&cell.path(&format!("/ports/8001/{garbled}"))).await;
        assert_eq!((reply.status, &reply.json["code"]), (502, &json!("port-failed")), "{garbled}: {}", reply.text);
        reply.is_a_problem();
        assert!(reply.text.len() < 2000 && !reply.text.contains("xxxx"), "{garbled}: {}", reply.text);
    }
    for silent in ["silent", "informs"] {
        let began = Instant::now();
        server.get(&cell.path(&format!("/ports/8001/{silent}"))).await.problem(504, "port-silent");
        assert!(began.elapsed() < Duration::from_secs(10), "{silent}");
    }
    // A server that takes no body.
    let endless = futures_util::stream::repeat_with(|| std::io::Result::Ok(vec![0_u8; 1 << 16]));
    let body = reqwest::Body::wrap_stream(endless);
    let stuck = server.request(Method::POST, &cell.path("/ports/8001/silent")).body(body).send().await;
    assert!(stuck.is_err() || stuck.unwrap().status() == 504);

    let (head, body) = raw_answer(server, &format!("GET {}", cell.path("/ports/8001/both")), "").await;
    assert!(!head.contains("content-length: 500") && body.contains("hello"), "{head}\n{body}");
    let (head, body) = raw_answer(server, &format!("GET {}", cell.path("/ports/8001/second")), "").await;
    assert!(head.contains("content-length: 5\r") && body == "hello", "{head}\n{body}");
    for broken in ["short", "chunk"] {
        let begun = server.request(Method::GET, &cell.path(&format!("/ports/8001/{broken}"))).send().await;
        assert!(
            begun.is_err() || begun.unwrap().bytes().await.is_err(),
            "{broken}: a body that breaks off is not taken for a whole one"
        );
    }
    assert_eq!(server.get(&cell.path("/ports/8000/after")).await.status, 200);
    assert_eq!(cell.value("6 * 7").await, "42");
}

async fn redirections_stay_within_the_port(server: &Arc<Server>, cell: &Cell) {
    let (head, _) =
        raw_answer(server, &format!("POST {}", cell.path("/ports/8001/moves")), "Content-Length: 0\r\n").await;
    let location = format!("location: {}\r\n", cell.path("/ports/8001/v1/sessions"));
    assert!(head.starts_with("http/1.1 307") && format!("{head}\r\n").contains(&location), "{head}");
    assert!(!head.contains("x-own"), "what is of one hop: {head}");
    let (head, _) = raw_answer(server, &format!("GET {}", cell.path("/ports/8001/leads")), "").await;
    assert!(head.starts_with("http/1.1 302") && !head.contains("location"), "{head}");
}

const UPGRADE: &str =
    "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: abc\r\n";

async fn head_of(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let reading = async {
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
    };
    tokio::time::timeout(NEVER, reading).await.expect("a head");
    String::from_utf8(head).unwrap().to_ascii_lowercase()
}

async fn a_websocket_is_passed_through_to_programs_and_not_to_pages(server: &Arc<Server>, cell: &Cell) {
    let target = format!("GET {}", cell.path("/ports/8002/socket"));
    let mut stream = raw(server, &target, UPGRADE).await;
    let head = head_of(&mut stream).await;
    assert!(head.starts_with("http/1.1 101") && head.contains("sec-websocket-accept: abc\r\n"), "{head}");
    let (mut from, mut to) = stream.split();
    let sent: Vec<u8> = (0..3_000_000).map(|n| (n % 253) as u8).collect();
    let mut back = vec![0; sent.len()];
    let (written, read) = tokio::join!(to.write_all(&sent), from.read_exact(&mut back));
    assert!(written.is_ok() && read.is_ok() && back == sent, "bytes cross as they are, both ways at once");
    to.shutdown().await.unwrap();
    assert_eq!(from.read(&mut [0]).await.unwrap(), 0, "and the end does too");

    let (head, body) = raw_answer(server, &target, &format!("{UPGRADE}Origin: https://elsewhere.example\r\n")).await;
    assert!(head.starts_with("http/1.1 403") && body.contains("forbidden"), "{head}\n{body}");
    let (head, _) = raw_answer(server, &format!("GET {}", cell.path("/ports/8000/")), "Upgrade: h2c\r\n").await;
    assert!(head.starts_with("http/1.1 200"), "no other protocol is passed on: {head}");
}

async fn a_websocket_ends_with_the_key_that_has_opened_it(server: &Arc<Server>, cell: &Cell) {
    let asked = json!({"name": "brief", "tenant": "default", "scopes": ["sessions"]});
    let key = server.post("/v1/keys", &asked).await;
    assert_eq!(key.status, 201, "{}", key.text);
    let target = format!("GET {}", cell.path("/ports/8002/socket"));
    let mut ours = raw(server, &target, UPGRADE).await;
    let mut theirs = TcpStream::connect(address(server)).await.unwrap();
    let request =
        format!("{target} HTTP/1.1\r\nHost: api.test\r\nX-API-Key: {}\r\n{UPGRADE}\r\n", text(&key.json["key"]));
    theirs.write_all(request.as_bytes()).await.unwrap();
    for stream in [&mut ours, &mut theirs] {
        let head = head_of(stream).await;
        assert!(head.starts_with("http/1.1 101"), "{head}");
        stream.write_all(b"x").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'x');
    }
    assert_eq!(server.delete(&format!("/v1/keys/{}", text(&key.json["id"]))).await.status, 204);
    let end = tokio::time::timeout(Duration::from_secs(5), theirs.read(&mut [0; 8])).await;
    assert!(matches!(end, Ok(Ok(0) | Err(_))), "{end:?}");
    ours.write_all(b"y").await.unwrap();
    assert_eq!(ours.read_u8().await.unwrap(), b'y', "that of another key goes on");
}

async fn a_host_of_its_own_has_its_own_paths_and_never_the_api(server: &Arc<Server>, cell: &Cell) {
    let host = format!("Host: 8000-{}.ports.test\r\n", cell.id);
    let (head, body) = raw_answer(server, "GET /v1/sessions?x=1", &format!("{host}Cookie: own=1\r\n")).await;
    let told: Value = serde_json::from_str(&body).unwrap_or_else(|_| panic!("{head}\n{body}"));
    assert_eq!(told["path"], "/v1/sessions?x=1", "its own paths");
    assert_eq!(header_of(&told, "host"), [format!("8000-{}.ports.test", cell.id)]);
    assert_eq!(header_of(&told, "cookie"), ["own=1"]);
    assert!(!body.contains(&server.key));
    assert!(head.contains("set-cookie: a=b") && !head.contains("content-security-policy"), "{head}");
    for odd in ["ports.test", "x.ports.test", "80000-x.ports.test"] {
        let (head, _) = raw_answer(server, "GET /v1/sessions", &format!("Host: {odd}\r\n")).await;
        assert!(head.starts_with("http/1.1 404"), "{odd}: {head}");
    }
    let mut nobody = TcpStream::connect(address(server)).await.unwrap();
    nobody.write_all(format!("GET / HTTP/1.1\r\n{host}Connection: close\r\n\r\n").as_bytes()).await.unwrap();
    assert!(head_of(&mut nobody).await.starts_with("http/1.1 401"), "a host is no key");
}

async fn a_caller_that_leaves_takes_the_connection_along(server: &Arc<Server>, cell: &Cell) {
    let closed = async || cell.value("seen['closed']").await.parse::<u32>().unwrap();
    let before = closed().await;
    let response = server.request(Method::GET, &cell.path("/ports/8000/stream?1000")).send().await.unwrap();
    let mut stream = response.bytes_stream();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    let noticed = async {
        while closed().await == before {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(NEVER, noticed).await.expect("the code's connection ends");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_in_use_while_it_is_asked_and_a_paused_one_is_resumed() {
    let server = Server::start(SETTINGS).await;
    let cell = server.create(json!({ "template": "python", "timeouts": { "idle_seconds": 3 } })).await;
    assert_eq!(cell.run(SERVERS).await["status"], "ok");
    let reply = server.get(&cell.path("/ports/8000/stream?12")).await;
    assert_eq!(reply.text.lines().count(), 12, "six seconds: {}", reply.text);
    assert_eq!(cell.look().await["state"], "ready");
    let paused = server.post(&cell.path("/pause"), &Value::Null).await;
    assert_eq!(paused.json["state"], "paused", "{}", paused.text);
    assert_eq!(server.get(&cell.path("/ports/8000/x")).await.status, 200);
    let ended = cell.wait("ended").await;
    assert_eq!(ended["end_reason"], "idle", "{ended}");
    server.finish().await.unwrap();
}
