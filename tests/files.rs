//! Files with real containers: round trips of all sizes and names, ways out that are none, full disks, archives, uploads that go on, watches, and the files that
//! a session begins with.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;
#[path = "support/watch.rs"]
mod watch;

use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use cellblock_wire::link::escape_path;
use reqwest::{Body, Method};
use serde_json::{Value, json};
use server::{Cell, NEVER, Reply, Server, text};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use watch::resident;

const MIB: usize = 1024 * 1024;
/// A container with little room, whose disk is soon full.
const SETTINGS: &str = r#"
[limits]
session_retention = "2s"
[templates.small]
image = "cellblock/python:latest"
[templates.small.default]
memory = "256MiB"
disk = "24MiB"
tmp = "16MiB"
[templates.pooled]
image = "cellblock/python:latest"
setup = "ready = True"
[templates.pooled.pool]
min = 1
max = 1
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files() {
    let server = Server::start(SETTINGS).await;
    let cases = cases![server;
        files_come_back_whatever_their_size_and_name,
        no_path_and_no_link_leads_out,
        a_link_that_is_swapped_meanwhile_leads_nowhere,
        parts_and_conditions,
        ten_thousand_files_as_an_archive_both_ways,
        what_is_refused_of_an_archive_leaves_nothing,
        a_full_disk_is_told_and_the_session_goes_on,
        an_upload_goes_on_and_known_content_is_not_read,
        what_breaks_off_leaves_nothing,
        changes_are_told,
        a_form_brings_many_files,
        callers_changes_are_not_the_codes,
        a_session_begins_with_files,
        executions_go_on_while_files_are_on_their_way,
    ];
    server.run_and_finish(3, cases).await;
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn at(cell: &Cell, path: &str) -> String {
    cell.path(&format!("/files/{}", escape_path(path)))
}

async fn put(cell: &Cell, path: &str, content: impl Into<Body>) -> Reply {
    put_at(cell, &at(cell, path), content).await
}

async fn put_at(cell: &Cell, path: &str, content: impl Into<Body>) -> Reply {
    cell.server.send(cell.server.request(Method::PUT, path).body(content)).await
}

async fn get(cell: &Cell, path: &str) -> Vec<u8> {
    let response = cell.server.request(Method::GET, &at(cell, path)).send().await.unwrap();
    assert_eq!(response.status(), 200, "{path}");
    response.bytes().await.unwrap().to_vec()
}

/// Paths of all that is there.
async fn listed(cell: &Cell) -> Vec<String> {
    let reply = cell.server.get(&cell.path("/files?depth=32&limit=2000")).await;
    assert_eq!((reply.status, &reply.json["truncated"]), (200, &json!(false)), "{}", reply.text);
    reply.json["files"].as_array().unwrap().iter().map(|file| text(&file["path"])).collect()
}

/// Everything below the working folder as code inside sees it.
async fn seen_inside(cell: &Cell) -> Vec<String> {
    let code = "import os, json\nprint(json.dumps(sorted(os.path.relpath(os.path.join(d, n), '/workspace') for d, ds, fs in os.walk('/workspace') for n in ds + fs)))";
    serde_json::from_value(cell.json(code).await).unwrap()
}

async fn files_come_back_whatever_their_size_and_name(server: Arc<Server>) {
    let cell = server.cell().await;
    let long = "x".repeat(255);
    let names = [
        "empty",
        "one",
        "a b/c d",
        "new\nline",
        "é/日本/😀",
        "-rf",
        "%2e%2e",
        "a\\b",
        "q?x=1&y#z",
        "<script>.html",
        &long,
    ];
    for (number, name) in names.iter().enumerate() {
        let content: Vec<u8> = (0..number * 70_000 / 2).map(|n| (n * 7) as u8).collect();
        let content = if *name == "one" { vec![1] } else { content };
        let made = put(&cell, name, content.clone()).await;
        assert_eq!(made.status, 201, "{name}: {}", made.text);
        assert_eq!((&made.json["path"], &made.json["size"]), (&json!(name), &json!(content.len())), "{}", made.text);
        assert_eq!(get(&cell, name).await, content, "{name}");
        assert_eq!(put(&cell, name, content.clone()).await.status, 200, "it was there");
        let head = server.send(server.request(Method::HEAD, &at(&cell, name))).await;
        assert_eq!(
            (head.status, head.header("etag")),
            (
                200,
                text(
                    &server
                        .get(&cell.path(&format!("/files?path={}", escape_path(name).replace('+', "%2B"))))
                        .await
                        .json["files"][0]["etag"]
                )
                .as_str()
            ),
            "{name}"
        );
        assert_eq!(head.header("content-length"), content.len().to_string());
    }
    let mut expected: Vec<String> = names.iter().map(ToString::to_string).collect();
    expected.extend(["a b", "é", "é/日本"].map(str::to_owned));
    expected.sort();
    let mut found = listed(&cell).await;
    found.sort();
    assert_eq!(found, expected);
    assert_eq!(seen_inside(&cell).await, expected);
    let page = server.get(&cell.path("/files?limit=2")).await.json;
    assert_eq!((page["files"].as_array().unwrap().len(), &page["truncated"]), (2, &json!(true)), "{page}");

    let html = server.send(server.request(Method::GET, &at(&cell, "<script>.html"))).await;
    assert_eq!(html.header("content-disposition"), "attachment; filename*=UTF-8''%3Cscript%3E.html");
    assert_eq!(
        (html.header("x-content-type-options"), html.header("content-security-policy")),
        ("nosniff", "sandbox; default-src 'none'")
    );

    let made = server.post(&cell.path("/files:mkdir"), &json!({"path": "f/o/l/d"})).await;
    assert_eq!((made.status, &made.json["kind"]), (201, &json!("directory")), "{}", made.text);
    assert_eq!(server.post(&cell.path("/files:mkdir"), &json!({"path": "f/o/l/d"})).await.status, 200);
    let moved = server.post(&cell.path("/files:move"), &json!({"from": "one", "to": "f/two"})).await;
    assert_eq!((moved.status, &moved.json["path"]), (201, &json!("f/two")), "{}", moved.text);
    server.post(&cell.path("/files:move"), &json!({"from": "empty", "to": "f/two"})).await.problem(409, "exists");
    let over = json!({"from": "empty", "to": "f/two", "overwrite": true});
    assert_eq!(server.post(&cell.path("/files:move"), &over).await.status, 200);
    let away = json!({"from": "f/two", "to": "/tmp/two"});
    assert_eq!(server.post(&cell.path("/files:move"), &away).await.json["path"], "/tmp/two");
    assert_eq!(cell.value("open('/tmp/two').read()").await, "''");
    assert_eq!(get(&cell, "/tmp/two").await, b"");
    server.delete(&at(&cell, "f")).await.problem(409, "is-a-directory");
    assert_eq!(server.delete(&format!("{}?recursive=true", at(&cell, "f"))).await.status, 204);
    server.delete(&at(&cell, "f")).await.problem(404, "not-found");
    put(&cell, "a b", "x").await.problem(409, "is-a-directory");
    put(&cell, "-rf/x", "x").await.problem(409, "not-a-directory");
    let set = put_at(&cell, &format!("{}?mode=0755", at(&cell, "run.sh")), "echo").await;
    assert_eq!(set.json["mode"], "0755");
    put_at(&cell, &format!("{}?mode=4755", at(&cell, "run.sh")), "echo").await.problem(400, "invalid-request");
    assert_eq!(put(&cell, "run.sh", "again").await.json["mode"], "0755", "what is replaced leaves its mode");
}

/// Asks with a path as it is, which a client would make plain.
async fn raw(server: &Server, method: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: 4\r\nConnection: close\r\n\r\nevil",
        server.key
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(NEVER, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

/// Paths that lead nowhere, as they stand in a URL, and how each is answered.
const HOSTILE: &[(&str, u16)] = &[
    ("..", 400),
    ("../evil", 400),
    ("a/../../evil", 400),
    ("%2e%2e/evil", 400),
    ("%2e%2e%2fevil", 400),
    ("..%2fevil", 400),
    ("a//b", 400),
    ("./evil", 400),
    ("%2e/evil", 400),
    ("evil%00", 400),
    ("%c0%ae%c0%ae/evil", 400),
    ("%ff", 400),
    ("evil/", 400),
    ("/etc/evil", 403),
    ("%2Fetc%2Fevil", 403),
    ("/proc/self/root/tmp/evil", 403),
    ("/dev/shm/evil", 403),
    ("/run/cellblock/evil", 403),
    ("/cellblock/guest", 403),
    ("etc/evil", 403),
    ("root/tmp/evil", 403),
    ("one/tmp/evil", 403),
    ("up/evil", 403),
    ("fds/0", 403),
    ("loop/evil", 403),
    ("d/evil", 403),
];

async fn no_path_and_no_link_leads_out(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value(
        "import os, socket
open('real', 'w').write('inside')
for link, to in [('etc', '/etc'), ('passwd', '/etc/passwd'), ('root', '/proc/self/root'), ('one', '/proc/1/root'), ('up', '..'), ('fds', '/proc/self/fd'), ('in', 'real'), ('loop', 'loop')]:
    os.symlink(to, link)
os.mkfifo('fifo')
socket.socket(socket.AF_UNIX).bind('socket')
os.link('real', 'hard')
os.makedirs('d'); os.chmod('d', 0)
os.listdir('.')",
    )
    .await;
    let before = seen_inside(&cell).await;
    let deep = vec!["d"; 2500].join("/");
    for (path, status) in HOSTILE.iter().copied().chain([(deep.as_str(), 400)]) {
        for method in ["PUT", "GET", "DELETE"] {
            let answer = raw(&server, method, &cell.path(&format!("/files/{path}"))).await;
            let found = answer.split(' ').nth(1).unwrap_or_default().to_owned();
            assert_eq!(found, status.to_string(), "{method} {}: {answer}", path.chars().take(60).collect::<String>());
        }
    }
    for (path, status, code) in [
        ("passwd", 403, "permission-denied"),
        ("etc/passwd", 403, "permission-denied"),
        ("one/etc/shadow", 403, "permission-denied"),
        ("fifo", 400, "invalid-request"),
        ("socket", 400, "invalid-request"),
        ("loop", 403, "permission-denied"),
        ("none", 404, "not-found"),
        ("up", 403, "permission-denied"),
    ] {
        let began = Instant::now();
        server.get(&at(&cell, path)).await.problem(status, code);
        assert!(began.elapsed() < Duration::from_secs(5), "{path}");
    }
    assert_eq!(get(&cell, "in").await, b"inside");
    let head = server.send(server.request(Method::HEAD, &at(&cell, "in"))).await;
    assert_eq!((head.header("content-length"), head.header("x-file-kind")), ("6", "file"));
    assert_eq!(get(&cell, "hard").await, b"inside");
    for query in ["path=..", "path=/etc", "path=up", "path=etc", "path=/proc/1/root", "path=root/etc"] {
        for path in ["/files", "/archive", "/files:watch"] {
            let reply = server.get(&cell.path(&format!("{path}?{query}"))).await;
            let is_link_itself = reply.status == 200 && reply.json["files"][0]["kind"] == "symlink";
            assert!([400, 403, 409].contains(&reply.status) || is_link_itself, "{path}?{query}: {}", reply.text);
        }
    }
    for (from, to) in [
        ("real", "../evil"),
        ("real", "/etc/evil"),
        ("real", "up/evil"),
        ("/etc/passwd", "evil"),
        ("etc/passwd", "evil"),
        (".", "x"),
        ("real", "/workspace"),
    ] {
        let reply = server.post(&cell.path("/files:move"), &json!({"from": from, "to": to})).await;
        assert!([400, 403].contains(&reply.status), "{from} to {to}: {}", reply.text);
    }
    assert_eq!(seen_inside(&cell).await, before, "nothing was written");
    assert_eq!(cell.value("import glob; glob.glob('/tmp/**/evil', recursive=True) + glob.glob('/dev/shm/*') + glob.glob('/run/cellblock/evil')").await, "[]");
    // A link itself is replaced, not what it leads to.
    assert_eq!(put(&cell, "passwd", "mine").await.status, 200);
    assert_eq!(cell.value("os.path.islink('passwd'), open('passwd').read()").await, "(False, 'mine')");
    assert_eq!(server.delete(&at(&cell, "etc")).await.status, 204);
    assert_eq!(cell.value("os.path.exists('/etc/passwd')").await, "True");
}

async fn a_link_that_is_swapped_meanwhile_leads_nowhere(server: Arc<Server>) {
    let cell = server.cell().await;
    let swapping = "import os
os.makedirs('/tmp/out', exist_ok=True)
os.symlink('/tmp/out', 'link'); os.mkdir('dir'); print('on', flush=True)
while True:
    try:
        os.rename('dir', 'd2'); os.rename('link', 'dir'); os.rename('dir', 'link'); os.rename('d2', 'dir')
    except OSError: pass
";
    let running = cell.background_until_output(swapping).await;
    for number in 0..150 {
        let reply = put(&cell, &format!("dir/f{number}"), "x").await;
        assert!([200, 201, 403, 404, 409].contains(&reply.status), "{}", reply.text);
    }
    server.post(&format!("/v1/executions/{running}/cancel"), &Value::Null).await;
    server.ended(&running).await;
    assert_eq!(cell.value("os.listdir('/tmp/out')").await, "[]");
}

async fn parts_and_conditions(server: Arc<Server>) {
    let cell = server.cell().await;
    let content: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
    let etag = text(&put(&cell, "f", content.clone()).await.json["etag"]);
    for (range, status, expected, part) in [
        ("bytes=0-0", 206, &content[..1], "bytes 0-0/100000"),
        ("bytes=99990-", 206, &content[99_990..], "bytes 99990-99999/100000"),
        ("bytes=-10", 206, &content[99_990..], "bytes 99990-99999/100000"),
        ("bytes=0-999999", 206, &content[..], "bytes 0-99999/100000"),
        ("bytes=5-2", 200, &content[..], ""),
        ("bytes=0-1,5-6", 200, &content[..], ""),
    ] {
        let request = server.request(Method::GET, &at(&cell, "f")).header("range", range);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status, "{range}");
        let told = response.headers().get("content-range").map_or("", |v| v.to_str().unwrap()).to_owned();
        assert_eq!((told.as_str(), &response.bytes().await.unwrap()[..]), (part, expected), "{range}");
    }
    let ask = async |method: Method, name: &'static str, value: String, more: &[(&'static str, &str)]| {
        let mut request = server.request(method.clone(), &at(&cell, "f")).header(name, value);
        for (name, value) in more {
            request = request.header(*name, *value);
        }
        server.send(if method == Method::PUT { request.body("new") } else { request }).await
    };
    let beyond = ask(Method::GET, "range", "bytes=100000-".to_owned(), &[]).await;
    beyond.problem(416, "range-not-satisfiable");
    assert_eq!(beyond.header("content-range"), "bytes */100000");
    assert_eq!(ask(Method::GET, "if-none-match", etag.clone(), &[]).await.status, 304);
    assert_eq!(ask(Method::HEAD, "if-none-match", format!("W/{etag}"), &[]).await.status, 304);
    assert_eq!(ask(Method::GET, "if-none-match", "\"other\"".to_owned(), &[]).await.status, 200);
    assert_eq!(ask(Method::GET, "if-range", etag.clone(), &[("range", "bytes=0-1")]).await.status, 206);
    assert_eq!(ask(Method::GET, "if-range", "\"x\"".to_owned(), &[("range", "bytes=0-1")]).await.status, 200);
    for (method, name, value) in [
        (Method::GET, "if-match", "\"x\""),
        (Method::PUT, "if-match", "\"x\""),
        (Method::PUT, "if-none-match", "*"),
        (Method::DELETE, "if-match", "\"x\""),
    ] {
        ask(method, name, value.to_owned(), &[]).await.problem(412, "precondition-failed");
    }
    ask(Method::GET, "if-match", "unquoted".to_owned(), &[]).await.problem(400, "invalid-request");
    assert_eq!(get(&cell, "f").await, content);
    let written = ask(Method::PUT, "if-match", etag.clone(), &[]).await;
    assert_eq!((written.status, written.header("etag") == etag), (200, false), "{}", written.text);
    ask(Method::PUT, "if-match", etag, &[]).await.problem(412, "precondition-failed");
    assert_eq!(ask(Method::DELETE, "if-match", written.header("etag").to_owned(), &[]).await.status, 204);
    // Of a thousand who want to be the first, one is.
    let firsts = (0..8).map(|n| {
        let request = server.request(Method::PUT, &at(&cell, "first")).header("if-none-match", "*");
        server.send(request.body(n.to_string()))
    });
    let mut statuses: Vec<u16> = futures_util::future::join_all(firsts).await.iter().map(|r| r.status).collect();
    statuses.sort_unstable();
    assert!(statuses.starts_with(&[201]) && statuses[1..].iter().all(|s| [412, 429].contains(s)), "{statuses:?}");
}

async fn ten_thousand_files_as_an_archive_both_ways(server: Arc<Server>) {
    // Room for them twice: a file system has an inode for each 16 KiB.
    let cell = server.create(json!({"template": "python", "resources": {"memory_mb": 1024, "disk_mb": 600}})).await;
    let mut archive = tar::Builder::new(Vec::new());
    for number in 0..10_000u32 {
        let mut head = tar::Header::new_gnu();
        let content = format!("content of {number}");
        head.set_size(content.len() as u64);
        head.set_mode(0o644);
        let name = format!("folder {}/é {}\n/{number}.txt", number % 100, "long".repeat(number as usize % 30));
        archive.append_data(&mut head, name, content.as_bytes()).unwrap();
    }
    let archive = archive.into_inner().unwrap();
    let began = Instant::now();
    let put = server.send(server.request(Method::PUT, &cell.path("/archive?path=in/here")).body(archive)).await;
    assert_eq!((put.status, &put.json["entries"]), (200, &json!(10_000)), "{}", put.text);
    println!("unpacked in {:?}", began.elapsed());
    let counted = "import os\nsum(len(fs) for _, _, fs in os.walk('in/here')), open('in/here/folder 7/é ' + 'long' * (4207 % 30) + '\\n/4207.txt').read()";
    assert_eq!(cell.value(counted).await, "(10000, 'content of 4207')");
    let began = Instant::now();
    let back = server.request(Method::GET, &cell.path("/archive?path=in/here")).send().await.unwrap();
    assert_eq!(back.status(), 200);
    let back = back.bytes().await.unwrap();
    println!("packed in {:?}", began.elapsed());
    let mut read = tar::Archive::new(&back[..]);
    let mut files = 0;
    for entry in read.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.header().entry_type().is_file() {
            let mut content = String::new();
            entry.read_to_string(&mut content).unwrap();
            let number = entry.path().unwrap().file_stem().unwrap().to_str().unwrap().to_owned();
            assert_eq!(content, format!("content of {number}"));
            files += 1;
        }
    }
    assert_eq!(files, 10_000);
    let zipped = server.request(Method::GET, &cell.path("/archive?path=in&format=tar.gz")).send().await.unwrap();
    let zipped = zipped.bytes().await.unwrap();
    assert!(zipped.len() * 4 < back.len(), "{} of {}", zipped.len(), back.len());
    let put =
        server.send(server.request(Method::PUT, &cell.path("/archive?path=again&format=tar.gz")).body(zipped)).await;
    assert_eq!(put.status, 200, "{}", put.text);
    let same = "import subprocess\nsubprocess.run(['diff', '-r', 'in', 'again']).returncode";
    assert_eq!(cell.value(same).await, "0");
    assert_eq!(server.delete(&format!("{}?recursive=true", at(&cell, "again"))).await.status, 204);
    // Pages of a list make the whole.
    let (mut cursor, mut told) = (String::new(), 0);
    loop {
        let page = server.get(&cell.path(&format!("/files?depth=9&limit=2000{cursor}"))).await.json;
        told += page["files"].as_array().unwrap().len();
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={}", escape_path(next));
    }
    assert!(told > 10_100, "{told}");
}

/// An archive with a good file, and then this.
fn tarred(kind: tar::EntryType, name: &str, link: &str, content: &[u8]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (kind, name, link, content) in [(tar::EntryType::Regular, "good", "", &b"x"[..]), (kind, name, link, content)] {
        let mut head = tar::Header::new_gnu();
        head.set_entry_type(kind);
        head.set_size(content.len() as u64);
        head.set_mode(0o644);
        head.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        head.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        head.set_cksum();
        archive.append(&head, content).unwrap();
    }
    archive.into_inner().unwrap()
}

async fn what_is_refused_of_an_archive_leaves_nothing(server: Arc<Server>) {
    use tar::EntryType::{Block, Char, Fifo, GNUSparse, Link, Regular, Symlink};
    let cell = server.cell().await;
    cell.value("import os; os.symlink('/tmp', 'out'); os.mkdir('folder'); open('file', 'w').write('1')").await;
    let before = seen_inside(&cell).await;
    for (kind, name, link) in [
        (Regular, "../evil", ""),
        (Regular, "/tmp/evil", ""),
        (Regular, "a/../../evil", ""),
        (Regular, "out/evil", ""),
        (Regular, "folder", ""),
        (Symlink, "l", "/etc/passwd"),
        (Symlink, "l", "../up"),
        (Link, "l", "/etc/passwd"),
        (Link, "l", "file"),
        (Char, "c", ""),
        (Block, "b", ""),
        (Fifo, "f", ""),
        (GNUSparse, "s", ""),
    ] {
        let archive = tarred(kind, name, link, if kind == Regular { b"evil" } else { b"" });
        let reply = server.send(server.request(Method::PUT, &cell.path("/archive")).body(archive)).await;
        let code = text(&reply.json["code"]);
        assert!(reply.status == 422 && code == "archive-refused" || code == "is-a-directory", "{name}: {}", reply.text);
        assert_eq!(seen_inside(&cell).await, before, "{name}");
    }
    let none = server.send(server.request(Method::PUT, &cell.path("/archive?path=new")).body("no archive")).await;
    none.problem(422, "archive-refused");
    let none = server.send(server.request(Method::PUT, &cell.path("/archive?format=tar.gz")).body("no archive")).await;
    none.problem(422, "archive-refused");
    assert_eq!(seen_inside(&cell).await, before);
    assert!(!cell.value("os.listdir('/tmp'), open('file').read()").await.contains("evil"));
}

async fn a_full_disk_is_told_and_the_session_goes_on(server: Arc<Server>) {
    let cell = server.create(json!({"template": "small"})).await;
    put(&cell, "kept", "x").await;
    let much = vec![7u8; 30 * MIB];
    // Its length is told, so that nothing of it is read.
    let told = put(&cell, "big", much.clone()).await;
    let detail = text(&told.problem(507, "no-space")["detail"]);
    assert!(detail.contains("bytes are left"), "{detail}");
    let pieces: Vec<Result<Bytes, std::io::Error>> = much.chunks(MIB).map(|c| Ok(Bytes::copy_from_slice(c))).collect();
    let stream = Body::wrap_stream(futures_util::stream::iter(pieces));
    let detail = text(&put(&cell, "big", stream).await.problem(507, "no-space")["detail"]);
    let left: u64 = detail.chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap();
    assert!((20 * MIB as u64..24 * MIB as u64 + 1).contains(&left), "{detail}");
    let mut archive = tar::Builder::new(Vec::new());
    for name in ["a", "b", "c"] {
        let mut head = tar::Header::new_gnu();
        head.set_size(10 * MIB as u64);
        archive.append_data(&mut head, format!("folder/{name}"), &much[..10 * MIB]).unwrap();
    }
    let archive = archive.into_inner().unwrap();
    let refused = server.send(server.request(Method::PUT, &cell.path("/archive")).body(archive)).await;
    refused.problem(507, "no-space");
    assert_eq!(listed(&cell).await, ["kept"], "nothing of it is left");
    cell.works().await;
    let filled = cell.run("f = open('fill', 'wb')\nwhile True: f.write(b'x' * 100000)").await;
    assert_eq!((&filled["status"], &filled["limits_hit"]), (&json!("error"), &json!(["disk"])), "{filled}");
    put(&cell, "more", vec![1u8; 100_000]).await.problem(507, "no-space");
    assert_eq!(server.delete(&at(&cell, "fill")).await.status, 204);
    assert_eq!(cell.value("f.close()").await, "");
    assert_eq!(put(&cell, "more", "fits").await.status, 201);
    cell.works().await;
}

async fn an_upload_goes_on_and_known_content_is_not_read(server: Arc<Server>) {
    let cell = server.cell().await;
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
    let part = async |from: usize, to: usize, complete: &str, sha256: &str| {
        let path = format!("{}?upload=up-1{sha256}", at(&cell, "big"));
        let request =
            server.request(Method::PUT, &path).header("upload-offset", from).header("upload-complete", complete);
        server.send(request.body(content[from..to].to_vec())).await
    };
    let first = part(0, 1_000_000, "?0", "").await;
    assert_eq!((first.status, first.header("upload-offset")), (202, "1000000"), "{}", first.text);
    let elsewhere = part(500_000, 600_000, "?0", "").await;
    elsewhere.problem(409, "offset-mismatch");
    assert_eq!(elsewhere.header("upload-offset"), "1000000");
    // This one breaks off.
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap();
    let head = format!(
        "PUT {}?upload=up-1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nUpload-Offset: 1000000\r\nContent-Length: 2000000\r\n\r\n",
        at(&cell, "big"),
        server.key
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&content[1_000_000..1_500_000]).await.unwrap();
    let status = async || {
        let reply = server.send(server.request(Method::HEAD, &format!("{}?upload=up-1", at(&cell, "big")))).await;
        (reply.status, reply.header("upload-offset").parse::<usize>().unwrap_or_default())
    };
    drop(stream);
    // It is there again once it is known to have broken off, with what has reached the container.
    let mut found = (0, 0);
    for _ in 0..200 {
        found = status().await;
        if found.0 == 204 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let offset = found.1;
    assert!(found.0 == 204 && (1_000_000..=1_500_000).contains(&offset), "{found:?}");
    assert_eq!(listed(&cell).await, Vec::<String>::new(), "it is not to be seen");
    let wrong = async |offset| part(offset, content.len(), "?1", &format!("&sha256={}", "0".repeat(64))).await;
    let mut answered = wrong(offset).await;
    // What had broken off was perhaps still on its way when it was asked about.
    while answered.status == 409 {
        answered = wrong(answered.header("upload-offset").parse().unwrap()).await;
    }
    answered.problem(422, "digest-mismatch");
    assert_eq!(part(0, 1_000_000, "?0", "").await.status, 202);
    let done = part(1_000_000, content.len(), "?1", &format!("&sha256={}", hex(&content))).await;
    assert_eq!((done.status, &done.json["sha256"]), (201, &json!(hex(&content))), "{}", done.text);
    assert_eq!(get(&cell, "big").await, content);
    assert_eq!(status().await.0, 404);

    let path = format!("{}?sha256={}", at(&cell, "big"), hex(&content));
    let request = server.request(Method::PUT, &path).header("content-length", "0");
    assert_eq!(server.send(request.body("")).await.status, 200, "it is there, so nothing need be sent");
    let digest = format!("sha-256=:{}:", BASE64.encode(Sha256::digest(b"new")));
    let with = |content: &'static str| {
        let request = server.request(Method::PUT, &at(&cell, "new")).header("repr-digest", &digest);
        server.send(request.body(content))
    };
    with("other").await.problem(422, "digest-mismatch");
    server.get(&at(&cell, "new")).await.problem(404, "not-found");
    assert_eq!(with("new").await.status, 201);
    let etag = text(&server.get(&cell.path("/files?path=new")).await.json["files"][0]["etag"]);
    assert_eq!(with("new").await.json["etag"], etag.as_str(), "it was not written again");
}

async fn what_breaks_off_leaves_nothing(server: Arc<Server>) {
    let cell = server.cell().await;
    put(&cell, "f", "before").await;
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap();
    let head = format!(
        "PUT {} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: 20000000\r\n\r\n",
        at(&cell, "f"),
        server.key
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&vec![1; 3_000_000]).await.unwrap();
    let hidden = "import glob; len(glob.glob('.cellblock-upload-*'))";
    assert_eq!(cell.value(hidden).await, "1");
    assert_eq!(listed(&cell).await, ["f"]);
    drop(stream);
    for _ in 0..100 {
        if cell.value(hidden).await == "0" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(cell.value(hidden).await, "0");
    assert_eq!(get(&cell, "f").await, b"before");

    // The container goes while files are on their way.
    cell.value("open('big', 'wb').write(b'x' * 60_000_000); None").await;
    let mut down = server.request(Method::GET, &at(&cell, "big")).send().await.unwrap();
    assert!(down.chunk().await.unwrap().is_some());
    let endless = futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from_static(&[0; 1000])));
    let endless = futures_util::StreamExt::then(endless, |piece| async {
        tokio::time::sleep(Duration::from_millis(5)).await;
        piece
    });
    let up = put(&cell, "up", Body::wrap_stream(endless));
    let container = cell.containers().await.remove(0);
    let kill = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        server.docker.kill_container(&container, None).await.unwrap();
    };
    let (up, ()) = tokio::join!(up, kill);
    up.problem(502, "guest-unreachable");
    let rest = async {
        loop {
            match down.chunk().await {
                Ok(Some(_)) => {}
                other => return other,
            }
        }
    };
    assert!(tokio::time::timeout(NEVER, rest).await.unwrap().is_err(), "a body that broke off ends with an error");
}

async fn changes_are_told(server: Arc<Server>) {
    let cell = server.cell().await;
    let mut told = server.events_of(server.request(Method::GET, &cell.path("/files:watch?recursive=true"))).await;
    let first = told.next().await.unwrap();
    assert_eq!((first.kind.as_str(), &first.data["polls_ms"]), ("watching", &Value::Null));
    put(&cell, "é\n", "x").await;
    assert_eq!(told.until("created").await.data["path"], "é\n");
    cell.value("import os; os.makedirs('a/b'); open('a/b/c', 'w').write('x')").await;
    let mut next = async |kind: &str, path: &str| loop {
        let seen = told.next().await.unwrap();
        if seen.kind == kind && seen.data["path"] == path {
            return seen.data;
        }
    };
    next("created", "a/b/c").await;
    cell.value("open('a/b/c', 'a').write('more')").await;
    next("modified", "a/b/c").await;
    server.post(&cell.path("/files:move"), &json!({"from": "a/b/c", "to": "d"})).await;
    assert_eq!(next("moved", "a/b/c").await["to"], "d");
    server.delete(&at(&cell, "d")).await;
    next("deleted", "d").await;
    // More than anybody has room for, while nobody listens.
    let mut deaf = server.request(Method::GET, &cell.path("/files:watch")).send().await.unwrap();
    let first = deaf.chunk().await.unwrap().unwrap();
    assert!(first.starts_with(b"event: watching"), "{first:?}");
    cell.value("for n in range(40000): open('x' * 250, 'w').close(); os.remove('x' * 250)").await;
    let mut tail = String::new();
    while !tail.contains("event: overflow") {
        let chunk =
            tokio::time::timeout(NEVER, deaf.chunk()).await.expect("an overflow").unwrap().expect("an overflow");
        tail = tail.split_off(tail.len().saturating_sub(32)) + std::str::from_utf8(&chunk).unwrap();
    }
    drop(deaf);
    server.get(&cell.path("/files:watch?path=none")).await.problem(404, "not-found");
    put(&cell, "file", "x").await;
    server.get(&cell.path("/files:watch?path=file")).await.problem(409, "not-a-directory");
    cell.delete().await;
    // Its end may be without an end of the body.
    let over = async { while told.next().await.is_some() {} };
    let _ =
        futures_util::FutureExt::catch_unwind(std::panic::AssertUnwindSafe(tokio::time::timeout(NEVER, over))).await;
}

async fn a_form_brings_many_files(server: Arc<Server>) {
    let cell = server.cell().await;
    let form = |files: &[(&str, &[u8])]| {
        let mut body = Vec::new();
        for (name, content) in files {
            body.extend(format!("--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\nContent-Type: text/plain\r\n\r\n").as_bytes());
            body.extend(*content);
            body.extend(b"\r\n");
        }
        body.extend(b"--x--\r\n");
        body
    };
    let post = |body: Vec<u8>| {
        let request = server.request(Method::POST, &cell.path("/files?path=in"));
        server.send(request.header("content-type", "multipart/form-data; boundary=x").body(body))
    };
    let big = vec![9u8; 5 * MIB];
    let sent = post(form(&[("a.txt", b"1"), ("sub/é 😀", b""), ("big", &big)])).await;
    assert_eq!(sent.status, 201, "{}", sent.text);
    assert_eq!(get(&cell, "in/big").await, big);
    assert_eq!(listed(&cell).await, ["in", "in/a.txt", "in/big", "in/sub", "in/sub/é 😀"]);
    post(form(&[("../evil", b"1")])).await.problem(400, "invalid-request");
    post(form(&[("/etc/evil", b"1")])).await.is_a_problem();
    let mut cut = form(&[("cut", &big)]);
    cut.truncate(cut.len() - 20);
    post(cut).await.problem(400, "invalid-request");
    let mut endless = b"--x\r\nContent-Disposition: ".to_vec();
    endless.extend(vec![b'a'; 4 * MIB]);
    post(endless).await.problem(400, "invalid-request");
    assert_eq!(listed(&cell).await.len(), 5);
    server
        .send(server.request(Method::POST, &cell.path("/files")).json(&json!({})))
        .await
        .problem(415, "unsupported-media-type");
}

async fn callers_changes_are_not_the_codes(server: Arc<Server>) {
    let cell = server.cell().await;
    for path in ["old", "dir/a", "dir/b", "gone"] {
        put(&cell, path, path).await;
    }
    let waiting = "import os, time\nopen('code', 'w').write('x')\nprint('on', flush=True)\nwhile not os.path.exists('go'): time.sleep(.02)\nos.remove('go')";
    let running = cell.background_until_output(waiting).await;
    put(&cell, "new", "x").await;
    put(&cell, "old", "other").await;
    assert_eq!(server.delete(&at(&cell, "gone")).await.status, 204);
    server.post(&cell.path("/files:move"), &json!({"from": "dir", "to": "moved"})).await;
    let archive = tarred(tar::EntryType::Regular, "sub/other", "", b"y");
    assert_eq!(
        server.send(server.request(Method::PUT, &cell.path("/archive?path=tarred")).body(archive)).await.status,
        200
    );
    put(&cell, "go", "").await;
    let ended = server.ended(&running).await;
    let files: Vec<_> = ended["files"].as_array().unwrap().iter().map(|f| text(&f["path"])).collect();
    assert!(
        files.contains(&"code".to_owned()) && files.iter().all(|f| ["code", "go"].contains(&f.as_str())),
        "{files:?}"
    );
}

async fn a_session_begins_with_files(server: Arc<Server>) {
    let file = |path: &str, content: &str| json!({"path": path, "content_base64": BASE64.encode(content)});
    let files = json!([file("in.csv", "1,2"), file("deep/é 😀", ""), file("/tmp/t", "t")]);
    let setup = "first = open('in.csv').read()";
    for template in ["python", "pooled", "pooled"] {
        let cell = server.create(json!({"template": template, "files": files, "setup": setup})).await;
        assert_eq!(cell.value("first, open('deep/é 😀').read(), open('/tmp/t').read()").await, "('1,2', '', 't')");
        let ran = cell.run("open('mine', 'w').write('x')").await;
        assert_eq!(ran["files"].as_array().map(Vec::len), Some(1), "the files are nobody's change: {ran}");
        println!("{template}: {}", cell.view["source"]);
        cell.delete().await;
    }
    let body = json!({"template": "python", "files": files});
    let again =
        || server.send(server.request(Method::POST, "/v1/sessions").header("idempotency-key", "files-1").json(&body));
    let (one, two) = (again().await, again().await);
    assert_eq!((one.status, &one.json["id"]), (201, &two.json["id"]), "{}", one.text);
    server.delete(&format!("/v1/sessions/{}", text(&one.json["id"]))).await;
    let run =
        server.post("/v1/runs", &json!({"code": "open('in.csv').read()", "template": "python", "files": files})).await;
    assert_eq!(run.json["results"][0]["data"]["text/plain"], "'1,2'", "{}", run.text);
    let wrong = json!({"template": "python", "files": [file("../x", ""), file("a", ""), file("a", ""), file("/etc/x", ""), file("x/", "")]});
    let refused = server.post("/v1/sessions", &wrong).await;
    refused.problem(422, "spec-rejected");
    assert_eq!(refused.pointers(), ["/files/0/path", "/files/2/path", "/files/3/path", "/files/4/path"]);
    let refused = server.post("/v1/sessions", &json!({"files": [{"path": "a", "content_base64": "!"}]})).await;
    refused.problem(400, "invalid-request");
    assert_eq!(refused.pointers(), ["/files/0/content_base64"]);
    let way = json!({"template": "python", "files": [file("a", ""), file("a/b", "")]});
    server.post("/v1/sessions", &way).await.problem(422, "setup-failed");
    let little = json!({"template": "python", "resources": {"memory_mb": 256, "disk_mb": 200}});
    let refused = server.post("/v1/sessions", &little).await;
    refused.problem(422, "spec-rejected");
    assert_eq!(refused.pointers(), ["/resources/disk_mb"]);
}

async fn executions_go_on_while_files_are_on_their_way(server: Arc<Server>) {
    let cell = server.cell().await;
    let sends = async {
        for _ in 0..4 {
            let content = vec![5u8; 40 * MIB];
            assert!([200, 201].contains(&put(&cell, "big", content.clone()).await.status));
            assert_eq!(get(&cell, "big").await.len(), content.len());
        }
    };
    let mut most = Duration::ZERO;
    let runs = async {
        for number in 0..30 {
            let began = Instant::now();
            assert_eq!(cell.value(&number.to_string()).await, number.to_string());
            most = most.max(began.elapsed());
        }
    };
    tokio::join!(sends, runs);
    println!("longest execution beside transfers: {most:?}");
    assert!(most < Duration::from_secs(5), "{most:?}");
}

/// A tenant whose uploads stand still has its part of the places and no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_tenant_leaves_places_for_others() {
    const OF_SESSION: usize = 8;
    let server = Server::start_with_tenants(SETTINGS).await;
    let create = || server.create(json!({"template": "small"}));
    let cells = [create().await, create().await, create().await, create().await];
    let standing = async |cell: &Cell, number: usize| {
        let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap();
        let head = format!(
            "PUT {} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: application/octet-stream\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n",
            at(cell, &format!("standing-{number}")),
            server.key
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        // It is listened to, so it has its place.
        let mut begun = [0; 12];
        stream.read_exact(&mut begun).await.unwrap();
        assert_eq!(&begun, b"HTTP/1.1 100");
        stream.write_all(b"begun").await.unwrap();
        stream
    };
    let until = async |cell: &Cell, wanted: u16| {
        let asking = async {
            loop {
                let reply = put(cell, "one-more", "x").await;
                if reply.status == wanted {
                    return reply;
                }
            }
        };
        tokio::time::timeout(NEVER, asking).await.unwrap_or_else(|_| panic!("no {wanted}"))
    };
    let mut held = Vec::new();
    for cell in &cells[..3] {
        for number in 0..OF_SESSION {
            held.push(standing(cell, number).await);
        }
        let refused = until(cell, if held.len() < 24 { 429 } else { 503 }).await;
        refused.problem(refused.status, if held.len() < 24 { "queue-full" } else { "at-capacity" });
    }
    let refused = put(&cells[3], "a", "x").await;
    assert_eq!(refused.problem(503, "at-capacity")["retryable"], true);
    assert!(!refused.header("retry-after").is_empty());
    let theirs = server.send(server.foreign(Method::POST, "/v1/sessions").json(&json!({"template": "small"}))).await;
    let path = format!("/v1/sessions/{}/files/a", text(&theirs.json["id"]));
    let sent = server.send(server.foreign(Method::PUT, &path).body("x")).await;
    assert_eq!(sent.status, 201, "{}", sent.text);
    drop(held);
    assert_eq!(until(&cells[3], 201).await.status, 201);
    server.send(server.foreign(Method::DELETE, &format!("/v1/sessions/{}", text(&theirs.json["id"])))).await;
    for cell in cells {
        cell.delete().await;
    }
    server.finish().await.unwrap();
}

/// In a process of its own, whose memory is looked at.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn much_goes_through_in_little_memory() {
    const SIZE: usize = 300 * MIB;
    let (server, pid) = Server::spawn("").await;
    let cell = server.create(json!({"template": "python", "resources": {"memory_mb": 1024, "disk_mb": 700}})).await;
    let piece = |n: usize| Bytes::from((0..MIB).map(|at| (at / 3 + n * 31) as u8).collect::<Vec<_>>());
    let mut hash = Sha256::new();
    (0..SIZE / MIB).for_each(|n| hash.update(piece(n)));
    let expected: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    put(&cell, "warm", vec![0u8; 20 * MIB]).await;
    let before = resident(Some(pid));
    let (most, watching) = (Arc::new(AtomicU64::new(0)), tokio_util::sync::CancellationToken::new());
    let watcher = {
        let (most, watching) = (Arc::clone(&most), watching.clone());
        async move {
            while !watching.is_cancelled() {
                most.fetch_max(resident(Some(pid)), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    };
    let transfers = async {
        let began = Instant::now();
        let pieces = futures_util::stream::iter((0..SIZE / MIB).map(move |n| Ok::<_, std::io::Error>(piece(n))));
        let path = format!("{}?sha256={expected}", at(&cell, "big"));
        let sent = server.send(server.request(Method::PUT, &path).body(Body::wrap_stream(pieces))).await;
        assert_eq!((sent.status, &sent.json["sha256"]), (201, &json!(expected)), "{}", sent.text);
        println!("in: {:.0} MB/s (dev build)", SIZE as f64 / 1e6 / began.elapsed().as_secs_f64());
        let began = Instant::now();
        let mut down = server.request(Method::GET, &at(&cell, "big")).send().await.unwrap();
        let (mut hash, mut length) = (Sha256::new(), 0);
        while let Some(chunk) = down.chunk().await.unwrap() {
            length += chunk.len();
            hash.update(&chunk);
        }
        println!("out: {:.0} MB/s (dev build)", SIZE as f64 / 1e6 / began.elapsed().as_secs_f64());
        let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!((length, found), (SIZE, expected.clone()));
        watching.cancel();
    };
    tokio::join!(watcher, transfers);
    let inside = cell.value("import hashlib; hashlib.sha256(open('big', 'rb').read()).hexdigest()").await;
    assert_eq!(inside, format!("'{expected}'"));
    let grown = most.load(Ordering::Relaxed).saturating_sub(before);
    println!("the server grew by {} MiB", grown / MIB as u64);
    assert!(grown < 64 * MIB as u64, "the server grew by {grown} bytes");
    cell.works().await;
    server.kill(pid).await;
}
