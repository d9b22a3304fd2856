//! The guarded way out, from inside real containers: a table of attempts of which only the allowed ones get anywhere, the tools that people use, limits, changes and the
//! end of the server. The world is a resolver and a dialer of the test's own; nothing is sent to any other machine.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;
#[path = "support/world.rs"]
mod world;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::{any, get};
use serde_json::{Value, json};
use server::{Cell, NEVER, Server, text};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use world::{Authority, PUBLIC, World};

const SMALL: &str = r#"
default_template = "small"
[templates.small]
image = "cellblock/python:latest"
[templates.small.default]
memory = "256MiB"
disk = "32MiB"
tmp = "32MiB"
[templates.small.network]
may_allow = ["*.example.org", "*.example.org:8443", "93.184.216.40", "pypi"]
"#;
/// Helpers of the code that tries to get out. Each answers with one line.
const HELPERS: &str = r#"
import errno, json, socket, ssl, urllib.request, urllib.error
PROXY = ("127.0.0.1", 3128)
def open_proxy():
    s = socket.create_connection(PROXY, 10); s.settimeout(60); return s
def first_line(s):
    data = b""
    while b"\r\n" not in data:
        more = s.recv(4096)
        if not more: break
        data += more
    return data.split(b"\r\n")[0].decode("latin-1") or "closed"
def raw(data):
    s = open_proxy(); s.sendall(data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape")); line = first_line(s); s.close(); return line
def connect(target):
    return raw(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n")
def get(url):
    try:
        with urllib.request.urlopen(url, timeout=60) as r: return f"{r.status} {r.read().decode()}"
    except urllib.error.HTTPError as e: return f"{e.code} {e.read().decode()}"
    except urllib.error.URLError as e: return f"failed {e.reason}"
def direct(address, port, family=socket.AF_INET, kind=socket.SOCK_STREAM):
    try:
        s = socket.socket(family, kind); s.settimeout(5); s.connect((address, port)); s.send(b"x"); return "sent"
    except OSError as e: return errno.errorcode.get(e.errno, str(e))
def name(host):
    try: return str(socket.getaddrinfo(host, 80))
    except socket.gaierror as e: return "no name"
def sock(*args):
    try: socket.socket(*args).close(); return "opened"
    except OSError as e: return errno.errorcode[e.errno]
"#;

/// Each attempt in Python, and what its line contains when all is as it should be.
const ATTEMPTS: [(&str, &str); 64] = [
    // What is allowed works, in each of its ways.
    ("get('http://allowed.example.org/')", "200 hello"),
    ("get('http://ALLOWED.example.org./')", "200 hello"),
    ("get('http://sub.wild.example.org/')", "200 hello"),
    ("connect('allowed.example.org:80')", "HTTP/1.1 200"),
    ("get('http://93.184.216.40/')", "200 hello"),
    // Other names, ports and spellings are not.
    (
        "get('http://other.example.org/')",
        "403 cellblock: other.example.org:80 is not within what this session may reach (network.allow)",
    ),
    ("connect('other.example.org:443')", "403 other.example.org:443 is not within"),
    ("connect('wild.example.org:80')", "403"),
    ("connect('allowed.example.org.evil.net:80')", "403"),
    ("connect('notallowed.example.org:80')", "403"),
    ("connect('allowed.example.org:22')", "403"),
    ("connect('allowed.example.org:8080')", "403"),
    ("connect('allowed.example.org:0')", "403"),
    ("connect('allowed.example.org')", "400"),
    ("connect('allowed.example.org:99999')", "400"),
    // The address of an allowed name is not the name.
    ("get('http://93.184.216.34/')", "403"),
    ("connect('93.184.216.34:443')", "403"),
    ("connect('0x5db8d822:443')", "403"),
    ("connect('[::ffff:93.184.216.34]:443')", "403"),
    // Inside, in every spelling.
    ("connect('127.0.0.1:80')", "403"),
    ("connect('localhost:80')", "403"),
    ("connect('2130706433:80')", "403"),
    ("connect('0177.0.0.1:80')", "403"),
    ("connect('127.1:80')", "403"),
    ("connect('[::1]:80')", "403"),
    ("connect('[::ffff:127.0.0.1]:80')", "403"),
    ("connect('169.254.169.254:80')", "403"),
    ("connect('[fd00:ec2::254]:80')", "403"),
    ("connect('metadata.google.internal:80')", "403"),
    ("connect('10.0.0.1:443')", "403"),
    // Allowed names that lead inside.
    ("get('http://loop.example.org/')", "403 cellblock: loop.example.org is not at a public address (loopback)"),
    ("get('http://loop6.example.org/')", "403"),
    ("get('http://mapped.example.org/')", "(link-local)"),
    ("get('http://meta.example.org/')", "(link-local)"),
    ("get('http://private.example.org/')", "(private)"),
    ("get('http://shared.example.org/')", "403"),
    ("get('http://nat64.example.org/')", "403"),
    ("get('http://sixtofour.example.org/')", "403"),
    ("get('http://teredo.example.org/')", "403"),
    ("get('http://azure.example.org/')", "403"),
    ("get('http://both.example.org/')", "403"),
    (
        "get('http://own.example.org/')",
        "403 cellblock: own.example.org is at an address that nobody may reach from here",
    ),
    ("get('http://denied.example.org/')", "403"),
    // A name that changes its mind: the first time it is public, and that connection goes there; the second time it is not.
    ("get('http://flips.example.org/')", "200 hello"),
    ("get('http://flips.example.org/')", "403"),
    // Redirects lead nowhere else.
    ("get('http://allowed.example.org/to-metadata')", "403"),
    ("get('http://allowed.example.org/to-loopback')", "403"),
    // What can't be reached says so.
    ("get('http://missing.example.org/')", "502 cellblock: the name missing.example.org can't be resolved"),
    ("get('http://dead.example.org/')", "502 cellblock: dead.example.org:80 can't be reached"),
    // Requests that are meant to be read in two ways.
    (
        "raw('GET http://allowed.example.org/host HTTP/1.1\\r\\nHost: other.example.org\\r\\nConnection: close\\r\\n\\r\\n')",
        "200",
    ),
    ("raw('CONNECT user:pw@allowed.example.org:80 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')", "400"),
    ("raw('GET http://user@allowed.example.org/ HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')", "400"),
    ("raw('GET / HTTP/1.1\\r\\nHost: allowed.example.org\\r\\n\\r\\n')", "400"),
    ("raw('GET https://allowed.example.org/ HTTP/1.1\\r\\nHost: allowed.example.org\\r\\n\\r\\n')", "400"),
    (
        "raw('GET http://allowed.example.org/ HTTP/1.1\\r\\nHost: allowed.example.org\\r\\nX: ' + 'y' * 20000 + '\\r\\n\\r\\n')",
        "431",
    ),
    ("raw('CONNECT b\\u00fccher.example.org:80 HTTP/1.1\\r\\n\\r\\n')", "400"),
    // Ways around the proxy.
    ("direct('93.184.216.34', 80)", "ENETUNREACH"),
    ("direct('2606:4700:4700::1111', 80, socket.AF_INET6)", "E"),
    ("direct('172.17.0.1', 80)", "ENETUNREACH"),
    ("direct('198.51.100.1', 53, kind=socket.SOCK_DGRAM)", "ENETUNREACH"),
    ("name('allowed.example.org')", "no name"),
    ("sock(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)", "EPERM"),
    ("sock(socket.AF_PACKET, socket.SOCK_RAW)", "E"),
    ("sock(40, socket.SOCK_STREAM)", "E"),
];

fn pages() -> Router {
    let to = |place: &'static str| get(move || async move { (StatusCode::FOUND, [(header::LOCATION, place)]) });
    Router::new()
        .route("/", get(|| async { "hello" }))
        .route("/to-metadata", to("http://169.254.169.254/latest/meta-data/"))
        .route("/to-loopback", to("http://loop.example.org/"))
        .route("/host", get(|headers: HeaderMap| async move { text(&json!(headers[header::HOST].to_str().unwrap())) }))
        .route("/big", get(|| async { vec![b'x'; 300_000] }))
        .route("/echo", any(|request: Request| async move { request.into_body() }))
}

fn world(to: SocketAddr) -> World {
    let world = World::default();
    world
        .server(PUBLIC, 80, to)
        .server("93.184.216.35", 80, to)
        .server("93.184.216.40", 80, to)
        // They would be answered, if they were dialled.
        .server("127.0.0.1", 80, to)
        .server("169.254.169.254", 80, to)
        .server("93.184.216.99", 80, to)
        .name("allowed.example.org", &[PUBLIC])
        .name("sub.wild.example.org", &["93.184.216.35"])
        .name("other.example.org", &[PUBLIC])
        .name("loop.example.org", &["127.0.0.1"])
        .name("loop6.example.org", &["::1"])
        .name("mapped.example.org", &["::ffff:169.254.169.254"])
        .name("meta.example.org", &["169.254.169.254"])
        .name("private.example.org", &["10.0.0.1"])
        .name("shared.example.org", &["100.100.100.200"])
        .name("nat64.example.org", &["64:ff9b::7f00:1"])
        .name("sixtofour.example.org", &["2002:7f00:1::"])
        .name("teredo.example.org", &["2001:0:7f00:1::"])
        .name("azure.example.org", &["168.63.129.16"])
        .name("both.example.org", &[PUBLIC, "127.0.0.1"])
        .name("own.example.org", &["93.184.216.99"])
        .name("denied.example.org", &["93.184.217.1"])
        .name("flips.example.org", &[PUBLIC])
        .name("flips.example.org", &["127.0.0.1"])
        .name("dead.example.org", &["93.184.216.98"])
        .own("93.184.216.99");
    world
}

const ALLOW: [&str; 20] = [
    "allowed.example.org",
    "*.wild.example.org",
    "93.184.216.40",
    "loop.example.org",
    "loop6.example.org",
    "mapped.example.org",
    "meta.example.org",
    "private.example.org",
    "shared.example.org",
    "nat64.example.org",
    "sixtofour.example.org",
    "teredo.example.org",
    "azure.example.org",
    "both.example.org",
    "own.example.org",
    "denied.example.org",
    "flips.example.org",
    "missing.example.org",
    "dead.example.org",
    "b.example.org",
];

async fn allowing(server: &Arc<Server>, rules: &[&str]) -> Cell {
    let cell = server.create(json!({"network": {"mode": "allowlist", "allow": rules}})).await;
    cell.value(HELPERS).await;
    cell
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_one_way_out_is_the_allowed_one() {
    let decoy = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&decoy);
    let inside = world::listen(move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
        async {}
    })
    .await;
    let world = world(world::serve(pages()).await);
    let settings = format!("egress.deny = [\"93.184.217.0/24\"]\n{SMALL}");
    let server = Server::start_within(&settings, world.outside()).await;
    let cell = allowing(&server, &ALLOW).await;

    let calls: Vec<&str> = ATTEMPTS.iter().map(|(call, _)| *call).collect();
    let lines = cell.json(&format!("print(json.dumps([{}]))", calls.join(",\n"))).await;
    let wrong: Vec<String> = ATTEMPTS
        .iter()
        .zip(lines.as_array().unwrap())
        .filter(|((_, expected), line)| !text(line).contains(expected))
        .map(|((call, expected), line)| format!("{call}\n    expected {expected}, got {line}"))
        .collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), ATTEMPTS.len(), wrong.join("\n"));
    assert_eq!(cell.value(&format!("direct('127.0.0.1', {})", inside.port())).await, "'ECONNREFUSED'");
    assert_eq!(decoy.load(Ordering::Relaxed), 0, "a server of the host was reached");
    assert_eq!(cell.value("get('http://allowed.example.org/host')").await, "'200 allowed.example.org'");

    let dialled: BTreeSet<String> = world.dialled().iter().map(ToString::to_string).collect();
    let expected = ["93.184.216.34:80", "93.184.216.35:80", "93.184.216.40:80", "93.184.216.98:80"];
    assert_eq!(dialled, expected.map(str::to_owned).into());
    assert!(!world.resolved().iter().any(|name| name == "other.example.org"), "what is not allowed was asked for");

    the_owner_and_the_audit_see_it(&server, &cell).await;
    // Nothing of it where nothing was asked for.
    let closed = server.create(json!({})).await;
    assert_eq!(closed.value("import os; [v for v in os.environ if 'proxy' in v.lower()]").await, "[]");
    closed.value(HELPERS).await;
    assert_eq!(closed.value("direct('127.0.0.1', 3128)").await, "'ECONNREFUSED'");
    server.finish().await.unwrap();
}

async fn the_owner_and_the_audit_see_it(server: &Arc<Server>, cell: &Cell) {
    let seen = server.get(&cell.path("/egress")).await.json;
    assert_eq!(seen["network"]["mode"], "allowlist");
    let decisions = seen["decisions"].as_array().unwrap();
    assert_eq!(seen["made"].as_u64().unwrap() + seen["refused"].as_u64().unwrap(), decisions.len() as u64);
    let of = |host: &str| decisions.iter().find(|decision| decision["host"] == host).unwrap_or(&Value::Null);
    assert_eq!(of("allowed.example.org")["allowed"], true);
    assert_eq!(of("allowed.example.org")["address"], PUBLIC);
    assert!(of("allowed.example.org")["received_bytes"].as_u64().unwrap() > 5);
    assert_eq!(of("allowed.example.org")["ended"], "done");
    assert_eq!(of("other.example.org")["reason"], "not-allowed");
    assert_eq!(
        (&of("both.example.org")["reason"], &of("both.example.org")["address"]),
        (&json!("not-public"), &json!("127.0.0.1"))
    );
    let audit = server.get("/v1/audit?action=egress&limit=200").await.json;
    let events = audit["events"].as_array().unwrap();
    assert_eq!(events.len(), decisions.len());
    let told =
        |target: &str| events.iter().find(|event| event["target"] == target).map(|event| text(&event["outcome"]));
    assert_eq!(told("allowed.example.org:80 (93.184.216.34)").as_deref(), Some("ok"));
    assert_eq!(told("meta.example.org:80 (169.254.169.254)").as_deref(), Some("not-public"));
    assert!(events.iter().all(|event| event["session_id"] == cell.id.as_str() && event["tenant"] == "default"));
}

/// Python that makes a wheel and prints it.
const WHEEL: &str = r#"
import base64, io, zipfile
out = io.BytesIO()
with zipfile.ZipFile(out, "w") as z:
    z.writestr("tiny_cell.py", "answer = 42\n")
    z.writestr("tiny_cell-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-cell\nVersion: 1.0\n")
    z.writestr("tiny_cell-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    z.writestr("tiny_cell-1.0.dist-info/RECORD", "tiny_cell.py,,\ntiny_cell-1.0.dist-info/METADATA,,\ntiny_cell-1.0.dist-info/WHEEL,,\ntiny_cell-1.0.dist-info/RECORD,,\n")
print(base64.b64encode(out.getvalue()).decode())
"#;

/// The index of packages as far as pip needs it. The wheel comes later.
fn index(wheel: &Arc<Mutex<Vec<u8>>>) -> Router {
    let file = "https://files.pythonhosted.org/packages/tiny_cell-1.0-py3-none-any.whl";
    let page =
        format!("<!DOCTYPE html><html><body><a href=\"{file}\">tiny_cell-1.0-py3-none-any.whl</a></body></html>");
    let wheel = Arc::clone(wheel);
    Router::new()
        .route("/simple/tiny-cell/", get(move || async move { ([(header::CONTENT_TYPE, "text/html")], page) }))
        .route("/packages/{file}", get(move || async move { wheel.lock().unwrap().clone() }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tools_that_people_use_work_with_no_configuration_of_their_own() {
    let (authority, wheel) = (Authority::new(), Arc::default());
    let names = ["pypi.org", "files.pythonhosted.org"];
    let world = World::default();
    let to = authority.serve(&names, index(&wheel)).await;
    world.server(PUBLIC, 443, to).name(names[0], &[PUBLIC]).name(names[1], &[PUBLIC]);
    let data = "[templates.data.network]\nmay_allow = [\"pypi\"]\n";
    let server = Server::start_within(&format!("{SMALL}{data}"), world.outside()).await;
    // Nothing is looked into on the way, so that the authority of the test is for the code to know.
    let variables = ["PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"];
    let env: Value = variables
        .iter()
        .map(|name| ((*name).to_owned(), json!("/tmp/ca.pem")))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let put = format!("print(open('/tmp/ca.pem', 'w').write({:?}))", authority.pem());

    let request = json!({"network": {"mode": "allowlist", "allow": ["pypi"]}, "env": env});
    let cell = server.create(request.clone()).await;
    cell.value(&put).await;
    cell.value(HELPERS).await;
    *wheel.lock().unwrap() = {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.decode(cell.value(WHEEL).await).unwrap()
    };
    let page = cell.value("get('https://pypi.org/simple/tiny-cell/')").await;
    assert!(page.contains("tiny_cell-1.0"), "{page}");
    let installed = cell
        .value("import subprocess, sys\nr = subprocess.run([sys.executable, '-m', 'pip', 'install', '--no-cache-dir', '--target', '/workspace/site', 'tiny-cell'], capture_output=True, text=True)\nsys.path.insert(0, '/workspace/site')\nprint(r.returncode, r.stdout[-300:], r.stderr[-900:])")
        .await;
    assert!(installed.starts_with('0'), "{installed}");
    assert_eq!(cell.value("import tiny_cell; tiny_cell.answer").await, "42");
    let refused = cell
        .value("r = subprocess.run([sys.executable, '-m', 'pip', 'download', '--retries', '1', '--index-url', 'https://other.org/simple', 'tiny-cell'], capture_output=True, text=True)\nprint(r.returncode, r.stderr)")
        .await;
    assert!(refused.contains("other.org:443 is not within what this session may reach"), "{refused}");
    // Who is at the same address, and is not allowed, is not reached by naming it later.
    let fronted = r#"
def tls(target, name):
    s = open_proxy(); s.sendall(f"CONNECT {target}:443 HTTP/1.1\r\n\r\n".encode()); assert "200" in first_line(s)
    context = ssl.create_default_context(cafile="/tmp/ca.pem")
    try:
        with context.wrap_socket(s, server_hostname=name) as t: return t.getpeercert()["subjectAltName"][0][1]
    except (OSError, ssl.SSLError) as e: return type(e).__name__
print(tls("pypi.org", "pypi.org"), tls("pypi.org", "files.pythonhosted.org"))"#;
    let fronted = cell.value(fronted).await;
    assert!(fronted.starts_with("pypi.org SSL") || fronted.starts_with("pypi.org ConnectionReset"), "{fronted}");
    let seen = server.get(&cell.path("/egress")).await.json;
    assert_eq!(seen["decisions"].as_array().unwrap().last().unwrap()["ended"], "wrong-name", "{seen}");

    let mut request = request;
    request["template"] = json!("data");
    let cell = server.create(request).await;
    cell.value(&put).await;
    let asked = "import requests\nr = requests.get('https://pypi.org/simple/tiny-cell/'); print(r.status_code, len(r.text) > 20)";
    assert_eq!(cell.value(asked).await, "200 True");
    server.finish().await.unwrap();
}

/// What an upstream was asked.
type Heard = Arc<Mutex<Vec<(String, HeaderMap)>>>;

fn api(heard: &Heard) -> Router {
    let heard = Arc::clone(heard);
    let tell = move |request: Request| {
        let (head, body) = request.into_parts();
        heard.lock().unwrap().push((format!("{} {}", head.method, head.uri), head.headers.clone()));
        async move {
            match head.uri.path() {
                "/v1/echo" => body.into_response(),
                "/v1/away" => {
                    (StatusCode::FOUND, [(header::LOCATION, "https://api.example.org/v1/headers")]).into_response()
                }
                _ => {
                    let told = head.headers.iter().map(|(n, v)| format!("{n}: {}\n", v.to_str().unwrap()));
                    let shown = head.headers.get("authorization").cloned().unwrap();
                    ([("x-echo", shown)], told.collect::<String>()).into_response()
                }
            }
        }
    };
    Router::new().fallback(any(tell))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn code_uses_a_credential_that_it_never_sees() {
    const SECRET: &str = "Bearer n0body-in-a-cell-may-read-this";
    let (authority, heard, folder) = (Authority::new(), Heard::default(), tempfile::tempdir().unwrap());
    let world = World::default();
    let to = authority.serve(&["api.example.org"], api(&heard)).await;
    world.server(PUBLIC, 443, to).name("api.example.org", &[PUBLIC]).name("inside.example.org", &["10.0.0.1"]);
    let file = |name: &str, content: &str| {
        use std::os::unix::fs::OpenOptionsExt as _;
        let path = folder.path().join(name);
        let mut file =
            std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&path).unwrap();
        file.write_all(content.as_bytes()).unwrap();
        path
    };
    let (ca, secret) = (file("ca.pem", &authority.pem()), file("secret", &format!("{SECRET}\n")));
    let settings = format!(
        "egress.ca_file = {ca:?}\n{SMALL}upstreams = [\n{{ name = \"llm\", url = \"https://api.example.org/v1\", header = \"Authorization\", secret_file = {secret:?} }},\n{{ name = \"in\", url = \"https://inside.example.org\", header = \"X-Key\", secret_file = {secret:?} }},\n]\n"
    );
    let server = Server::start_within(&settings, world.outside()).await;
    let cell = allowing(&server, &[]).await;
    let told = cell.value("print(get('http://llm.upstream/headers'))").await;
    assert!(told.contains("authorization: *********") && told.contains("host: api.example.org"), "{told}");
    let (asked, headers) = heard.lock().unwrap().pop().unwrap();
    assert_eq!((asked.as_str(), headers["authorization"].to_str().unwrap()), ("GET /v1/headers", SECRET));
    let echoed = "import hashlib\nbody = b'x' * 3_000_000 + b'end'\nwith urllib.request.urlopen('http://llm.upstream/echo?q=1', data=body, timeout=60) as r: print(r.read() == body)";
    assert_eq!(cell.value(echoed).await, "True");
    assert_eq!(heard.lock().unwrap().pop().unwrap().0, "POST /v1/echo?q=1");

    let one = |head: &str| format!("raw('{head}\\r\\nConnection: close\\r\\n\\r\\n')");
    let inner = |request: &str| {
        format!(
            "(lambda s: (s.sendall(b'CONNECT llm.upstream:80 HTTP/1.1\\r\\n\\r\\n'), first_line(s), s.sendall(b'{request}'), first_line(s))[3])(open_proxy())"
        )
    };
    for (call, expected) in [
        (one("GET http://llm.upstream/headers HTTP/1.1\\r\\nHost: evil.org\\r\\nAuthorization: mine"), "200"),
        (one("GET http://llm.upstream/%2e%2e/admin HTTP/1.1\\r\\nHost: x"), "400"),
        (one("GET http://llm.upstream/a/..%2f..%2fadmin HTTP/1.1\\r\\nHost: x"), "400"),
        (one("TRACE http://llm.upstream/ HTTP/1.1\\r\\nHost: x"), "405"),
        (inner("GET /headers HTTP/1.1\\r\\nHost: evil.org\\r\\n\\r\\n"), "400"),
        (inner("GET /headers HTTP/1.1\\r\\nHost: llm.upstream\\r\\nHost: evil.org\\r\\n\\r\\n"), "400"),
        (inner("GET http://evil.org/headers HTTP/1.1\\r\\nHost: llm.upstream\\r\\n\\r\\n"), "400"),
        (
            inner(
                "GET /headers HTTP/1.1\\r\\nHost: llm.upstream\\r\\nAuthorization: one\\r\\nauthorization: two\\r\\n\\r\\n",
            ),
            "200",
        ),
        ("get('http://llm.upstream/away')".to_owned(), "403"),
        ("connect('llm.upstream:443')".to_owned(), "403"),
        ("connect('none.upstream:80')".to_owned(), "403"),
        ("connect('api.example.org:443')".to_owned(), "403"),
        ("get('http://in.upstream/')".to_owned(), "403 cellblock: in.upstream is not at a public address (private)"),
    ] {
        let line = cell.value(&call).await;
        assert!(line.contains(expected), "{call}: {line}");
    }
    let smuggled = inner(
        "POST /echo HTTP/1.1\\r\\nHost: llm.upstream\\r\\nContent-Length: 4\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n0\\r\\n\\r\\nGET /smuggled HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n",
    );
    cell.value(&smuggled).await;
    for (asked, headers) in heard.lock().unwrap().iter() {
        assert!(!asked.contains("smuggled") && !asked.contains("admin"), "{asked}");
        let shown: Vec<_> = headers.get_all("authorization").iter().map(|value| value.to_str().unwrap()).collect();
        assert_eq!(shown, [SECRET], "{asked}");
        assert_eq!(headers["host"], "api.example.org");
    }
    assert_eq!(server.get(&cell.path("/egress")).await.json["upstreams"], json!(["llm", "in"]));
    // Nowhere in the cell, not even in what the server has said back.
    let search = r#"
import glob, os
found = [k for k, v in os.environ.items() if "n0body" in v]
for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/run/cellblock/**", recursive=True) + glob.glob("/workspace/**", recursive=True):
    try: found += [path] if b"n0body" in open(path, "rb").read() else []
    except OSError: pass
with urllib.request.urlopen("http://llm.upstream/headers") as r: found += ["answer"] if "n0body" in str(r.headers) + r.read().decode() else []
print(found)"#;
    assert_eq!(cell.value(search).await, "[]");
    // A key that was exchanged is shown from the next request on.
    file("secret", "Bearer another-secret-of-the-operator");
    cell.value("get('http://llm.upstream/headers')").await;
    assert_eq!(heard.lock().unwrap().last().unwrap().1["authorization"], "Bearer another-secret-of-the-operator");
    server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_much_or_too_slow_is_ended() {
    let world = world(world::serve(pages()).await);
    let limits = "[egress]\nsession_connections = 3\nsession_connections_per_minute = 12\nsession_received = \"512KiB\"\nidle_timeout = \"2s\"\n";
    let server = Server::start_within(&format!("{SMALL}{limits}"), world.outside()).await;
    let held = "held = [open_proxy() for _ in range(4)]\nfor s in held: s.sendall(b'CONNECT allowed.example.org:80 HTTP/1.1\\r\\n\\r\\n')\nprint(json.dumps(sorted(first_line(s)[9:12] for s in held)))";
    let bytes = async {
        let cell = allowing(&server, &ALLOW).await;
        assert!(cell.value("len(get('http://allowed.example.org/big'))").await.starts_with("300"));
        let cut = cell.value("import http.client\ntry: print(len(get('http://allowed.example.org/big')))\nexcept (OSError, http.client.HTTPException) as e: print('broken', type(e).__name__)").await;
        // In the middle, or before an answer began, which the proxy tells in a few words.
        assert!(cut.starts_with("broken") || cut.parse::<usize>().is_ok_and(|length| length < 1000), "{cut}");
        let more = cell
            .value("raw('GET http://allowed.example.org/big HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n')")
            .await;
        assert!(more.contains("200") || more.contains("429") || more.contains("502"), "{more}");
        let seen = server.get(&cell.path("/egress")).await.json;
        assert!(seen["received_bytes"].as_u64().unwrap() <= 512 * 1024, "{seen}");
        assert_eq!(seen["decisions"][1]["ended"], "too-many-bytes", "{seen}");
    };
    let connections = async {
        let cell = allowing(&server, &ALLOW).await;
        assert_eq!(cell.json(held).await, json!(["200", "200", "200", "429"]));
        // Nothing moves on them, so that they are broken off, and there is room again.
        assert_eq!(cell.value("print([s.recv(10) for s in held if s.settimeout(30) is None][:1])").await, "[b'']");
        assert!(cell.value("get('http://allowed.example.org/')").await.contains("200"));
        let many = cell.json("print(json.dumps([get('http://other.example.org/')[:3] for _ in range(12)]))").await;
        assert_eq!(many.as_array().unwrap().last().unwrap(), "429");
    };
    let slow = async {
        let cell = allowing(&server, &ALLOW).await;
        let body =
            "raw('POST http://allowed.example.org/echo HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 100\\r\\n\\r\\nabc')";
        let line = cell
            .value(&format!("import time; began = time.time(); line = {body}; print(line, time.time() - began < 20)"))
            .await;
        assert!(
            line.ends_with("True") && (line.contains("200") || line.contains("502") || line.contains("closed")),
            "{line}"
        );
        let head = "s = open_proxy(); s.sendall(b'GET http://allowed'); began = time.time()\nprint(first_line(s), 15 < time.time() - began < 40)";
        let line = cell.value(head).await;
        assert!(line.ends_with("True") && !line.contains("200"), "{line}");
        // What waits for nothing is bounded too: the one beyond is told so, and the others go.
        let many = "socks = [socket.create_connection(PROXY, 10) for _ in range(200)]\ntime.sleep(0.5)\nsocks[-1].settimeout(5); print(first_line(socks[-1])); [s.close() for s in socks]; time.sleep(0.5)\nprint(get('http://allowed.example.org/'))";
        let lines = cell.value(many).await;
        assert!(lines.starts_with("HTTP/1.1 503") && lines.ends_with("200 hello"), "{lines}");
    };
    tokio::join!(bytes, connections, slow);
    server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_counts_for_the_next_connection_and_cuts_what_is_open() {
    let world = world(world::serve(pages()).await);
    let pool = "[templates.small.pool]\nmin = 1\nmax = 1\n";
    let server = Server::start_within(
        &format!(
            "{}{pool}",
            SMALL.replace(
                "[templates.small.network]\n",
                "[templates.small.network]\nmode = \"allowlist\"\nallow = [\"allowed.example.org\"]\n"
            )
        ),
        world.outside(),
    )
    .await;
    let began = Instant::now();
    while server.get("/v1/pools").await.json["pools"][0]["ready"] != 1 {
        assert!(began.elapsed() < NEVER, "the pool is not filled");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let cell = server.create(json!({"network": {"allow": ["allowed.example.org", "sub.wild.example.org"]}})).await;
    assert_eq!(cell.view["source"], "warm");
    assert_eq!(
        cell.view["network"],
        json!({"mode": "allowlist", "allow": ["allowed.example.org", "sub.wild.example.org"]})
    );
    cell.value(HELPERS).await;
    let hold =
        "held = open_proxy(); held.sendall(b'CONNECT allowed.example.org:80 HTTP/1.1\\r\\n\\r\\n'); first_line(held)";
    assert!(cell.value(hold).await.contains("200"));
    let other =
        "kept = open_proxy(); kept.sendall(b'CONNECT sub.wild.example.org:80 HTTP/1.1\\r\\n\\r\\n'); first_line(kept)";
    assert!(cell.value(other).await.contains("200"));

    for (body, pointer) in [
        (json!({"network": {"allow": ["example.net"]}}), "/network/allow/0"),
        (json!({"network": {"mode": "none", "allow": []}}), "/network/allow"),
        (json!({"network": {"allow": ["127.0.0.1"]}}), "/network/allow/0"),
    ] {
        let refused = server.patch(&cell.path(""), &body).await;
        refused.problem(422, "spec-rejected");
        assert_eq!(refused.pointers(), [pointer]);
        let refused = server.post("/v1/sessions", &body).await;
        assert_eq!(refused.pointers(), [pointer], "{}", refused.text);
    }
    let changed = server.patch(&cell.path(""), &json!({"network": {"allow": ["sub.wild.example.org"]}})).await;
    assert_eq!(changed.json["network"]["allow"], json!(["sub.wild.example.org"]), "{}", changed.text);
    let read = "def over(s):\n    s.settimeout(20)\n    try: return s.recv(10) == b''\n    except ConnectionResetError: return True\nprint(over(held))";
    assert_eq!(cell.value(read).await, "True");
    assert!(cell.value("get('http://allowed.example.org/')").await.contains("403"));
    let through = "kept.sendall(b'GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'); first_line(kept)";
    assert!(cell.value(through).await.contains("200"), "what is still allowed was cut");
    let seen = server.get(&cell.path("/egress")).await.json;
    assert_eq!((&seen["decisions"][0]["ended"], &seen["open"]), (&json!("cut"), &json!(1)), "{seen}");

    let changed = server.patch(&cell.path(""), &json!({"network": {"mode": "none"}})).await;
    assert_eq!(changed.json["network"], json!({"mode": "none", "allow": []}));
    assert_eq!(cell.value("print(over(kept))").await, "True");
    assert!(cell.value("get('http://sub.wild.example.org/')").await.contains("no way out"));
    server.patch(&cell.path(""), &json!({"network": {"mode": "allowlist"}})).await;
    assert!(
        cell.value("get('http://allowed.example.org/')").await.contains("200"),
        "the template's own rules are back"
    );
    server.finish().await.unwrap();
}

/// A proxy that finds the servers of a world; it stands for the one that an operator has.
async fn operators_proxy(to: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::<Mutex<Vec<String>>>::default();
    let noted = Arc::clone(&asked);
    let address = world::listen(move |mut stream| {
        let noted = Arc::clone(&noted);
        async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let line = String::from_utf8(head).unwrap().lines().next().unwrap().to_owned();
            let is_there = line.contains("allowed");
            noted.lock().unwrap().push(line);
            if !is_there {
                return stream.write_all(b"HTTP/1.1 503 None\r\n\r\n").await.unwrap();
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            let mut server = TcpStream::connect(to).await.unwrap();
            // Either side may break it off.
            let _ = tokio::io::copy_bidirectional(&mut stream, &mut server).await;
        }
    })
    .await;
    (address, asked)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_breaks_what_is_open_and_the_next_goes_on() {
    let (proxy, asked) = operators_proxy(world::serve(pages()).await).await;
    let (server, pid) = Server::spawn(&format!("egress.proxy = \"http://{proxy}\"\n{SMALL}")).await;
    let cell = allowing(&server, &["allowed.example.org", "dead.example.org", "93.184.216.40"]).await;
    let hold =
        "held = open_proxy(); held.sendall(b'CONNECT allowed.example.org:80 HTTP/1.1\\r\\n\\r\\n'); first_line(held)";
    assert!(cell.value(hold).await.contains("200"));
    assert!(cell.value("get('http://dead.example.org/')").await.contains("502"));
    for refused in ["other.example.org:80", "127.0.0.1:80", "2130706433:80"] {
        assert!(cell.value(&format!("connect('{refused}')")).await.contains("403"), "{refused}");
    }
    server.kill(pid).await;
    let (again, _) = server.spawn_again().await;
    let cell = Cell { server: Arc::clone(&again), id: cell.id.clone(), view: cell.view.clone() };
    cell.wait("ready").await;
    let read = "held.settimeout(30)\ntry: print(held.recv(10) == b'')\nexcept ConnectionResetError: print(True)";
    assert_eq!(cell.value(read).await, "True");
    assert!(cell.value("get('http://allowed.example.org/')").await.contains("200 hello"));
    assert!(cell.value("get('http://other.example.org/')").await.contains("403"), "its rules are kept");
    let asked: BTreeSet<String> = asked.lock().unwrap().drain(..).collect();
    let lines = ["CONNECT allowed.example.org:80 HTTP/1.1", "CONNECT dead.example.org:80 HTTP/1.1"];
    assert_eq!(asked, lines.map(str::to_owned).into());
    again.finish().await.unwrap();
}
