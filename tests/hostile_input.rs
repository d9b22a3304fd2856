//! Whatever is sent to the server: each refusal is a problem that says what to do, and nobody else notices.

#[path = "support/server.rs"]
mod server;
#[path = "support/watch.rs"]
mod watch;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock::app::{self, Process, StartError};
use cellblock::task;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use server::{Form, NEVER, Server, text};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use watch::Canary;

const SETTINGS: &str = r#"
[server]
max_body = "1MiB"
request_timeout = "2s"
[executions]
interrupt_grace = "1s"
[templates.imageless]
image = "cellblock/there-is-no-such-image:latest"
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_input() {
    let server = Server::start_with_tenants(SETTINGS).await;
    let canary = Canary::start(&server, &server.key).await;
    let cases = cases![server;
        bodies_that_are_not_understood,
        every_wrong_field_is_named,
        wrong_values_are_named_with_what_is_allowed,
        wrong_executions_are_named_too,
        bodies_that_are_too_large_or_too_slow,
        keys_that_are_none,
        a_key_without_the_scope_is_forbidden,
        what_is_another_tenants_is_not_there,
        wrong_queries_and_paths,
        headers_that_mean_harm,
        templates_that_can_not_be_used,
        code_of_every_kind_stays_code,
        requests_that_are_not_http,
    ];
    let failed = server::run(2, cases).await;
    let canary = canary.stop().await;
    let left = server.finish().await;
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
    canary.unwrap_or_else(|broken| panic!("the canary: {broken}"));
    left.unwrap_or_else(|left| panic!("{left}"));
}

fn post(server: &Server, body: impl Into<reqwest::Body>) -> RequestBuilder {
    server.request(Method::POST, "/v1/sessions").header("content-type", "application/json").body(body)
}

async fn bodies_that_are_not_understood(server: Arc<Server>) {
    let deep = |open: &str, close: &str| format!("{}{}", open.repeat(100_000), close.repeat(100_000));
    let utf16: Vec<u8> = "{}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let bodies: Vec<(&str, Vec<u8>)> = vec![
        ("cut off", b"{\"template\": \"py".to_vec()),
        ("no JSON", b"template=python".to_vec()),
        ("trailing garbage", b"{} x".to_vec()),
        ("two objects", b"{}{}".to_vec()),
        ("a byte order mark", b"\xef\xbb\xbf{}".to_vec()),
        ("UTF-16", utf16),
        ("bad UTF-8", b"{\"template\": \"\xff\xfe\"}".to_vec()),
        ("a lone surrogate", br#"{"template": "\ud800"}"#.to_vec()),
        ("zero bytes", vec![0; 100]),
        ("NaN", br#"{"timeouts": {"idle_seconds": NaN}}"#.to_vec()),
        ("Infinity", br#"{"timeouts": {"idle_seconds": Infinity}}"#.to_vec()),
        ("1e400", br#"{"timeouts": {"idle_seconds": 1e400}}"#.to_vec()),
        ("deep lists", deep("[", "]").into_bytes()),
        ("deep objects", deep("{\"a\":", "1}").replace("1}", "}").into_bytes()),
        ("a list", b"[]".to_vec()),
        ("a list of values", br#"["python"]"#.to_vec()),
        ("a list in it", br#"{"resources": [1.0, 512], "timeouts": [], "network": ["none"]}"#.to_vec()),
        ("null", b"null".to_vec()),
        ("a text", b"\"python\"".to_vec()),
        ("compressed", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03".to_vec()),
    ];
    for (what, body) in bodies {
        let began = Instant::now();
        let reply = server.send(post(&server, body)).await;
        assert_eq!(reply.status, 400, "{what}: {}", reply.text);
        reply.problem(400, "invalid-request");
        assert!(began.elapsed() < Duration::from_secs(2), "{what}: {:?}", began.elapsed());
    }
    for given in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "application/json2",
        "text/json",
    ] {
        let request = server.request(Method::POST, "/v1/sessions").header("content-type", given).body("{}");
        server.send(request).await.problem(415, "unsupported-media-type");
    }
    // The control: the same route takes what is right, whatever its character set is said to be.
    let request =
        server.request(Method::POST, "/v1/sessions").header("content-type", "application/json; charset=utf-8");
    let reply = server.send(request.body(r#"{"template": "python"}"#)).await;
    assert_eq!(reply.status, 201, "{}", reply.text);
    server.delete(&format!("/v1/sessions/{}", text(&reply.json["id"]))).await;
}

async fn every_wrong_field_is_named(server: Arc<Server>) {
    let body = json!({
        "privileged": true, "binds": ["/:/host"], "image": "../../x@sha256:0", "runtime": "x", "__proto__": {}, "a/b~c": 1,
        "resources": {"memory_mb": "big", "gpus": 8, "cpu": null},
        "timeouts": {"idle_seconds": [], "lifetime_seconds": "NaN"}, "on_idle": "sleep",
        "network": {"mode": "host"}, "env": {"A": 1}, "if_exists": "steal", "name": 7
    });
    let reply = server.post("/v1/sessions", &body).await;
    reply.problem(400, "invalid-request");
    assert_eq!(
        reply.pointers(),
        [
            "/__proto__",
            "/a~1b~0c",
            "/binds",
            "/env/A",
            "/if_exists",
            "/image",
            "/name",
            "/network/mode",
            "/on_idle",
            "/privileged",
            "/resources/gpus",
            "/resources/memory_mb",
            "/runtime",
            "/timeouts/idle_seconds",
            "/timeouts/lifetime_seconds",
        ]
    );
    let twice = server.send(post(&server, r#"{"name": "a", "name": 3}"#)).await;
    assert_eq!(twice.status, 400, "{}", twice.text);
    // However many there are, the answer has an end.
    let many: serde_json::Map<_, _> = (0..10_000).map(|n| (format!("field{n}"), json!(1))).collect();
    let reply = server.post("/v1/sessions", &Value::Object(many)).await;
    reply.problem(400, "invalid-request");
    assert!((2..=100).contains(&reply.pointers().len()) && reply.text.len() < 50_000, "{}", reply.text.len());
    let long = json!({"x".repeat(500_000): 1});
    let reply = server.post("/v1/sessions", &long).await;
    reply.problem(400, "invalid-request");
}

async fn wrong_values_are_named_with_what_is_allowed(server: Arc<Server>) {
    // What is asked for, the field that is named, and the ceiling that is.
    let rows = [
        (json!({"resources": {"memory_mb": 4097}}), "/resources/memory_mb", "4096"),
        (json!({"resources": {"memory_mb": u64::MAX}}), "/resources/memory_mb", "4096"),
        (json!({"resources": {"memory_mb": 0}}), "/resources/memory_mb", "4096"),
        (json!({"resources": {"disk_mb": 1025, "memory_mb": 4096}}), "/resources/disk_mb", "1024"),
        (json!({"resources": {"disk_mb": 1024, "memory_mb": 300}}), "/resources/disk_mb", "300"),
        (json!({"resources": {"cpu": 2.5}}), "/resources/cpu", "2"),
        (json!({"resources": {"cpu": 0}}), "/resources/cpu", "0.05"),
        (json!({"resources": {"cpu": -1.0}}), "/resources/cpu", "2"),
        (json!({"resources": {"cpu": 1e308}}), "/resources/cpu", "2"),
        (json!({"resources": {"pids": 513}}), "/resources/pids", "512"),
        (json!({"resources": {"pids": 1}}), "/resources/pids", "512"),
        (json!({"timeouts": {"idle_seconds": 14401}}), "/timeouts/idle_seconds", "14400"),
        (json!({"timeouts": {"paused_seconds": 86401}}), "/timeouts/paused_seconds", "86400"),
        (json!({"timeouts": {"lifetime_seconds": 86400.5}}), "/timeouts/lifetime_seconds", "86400"),
        (json!({"timeouts": {"execution_seconds": 3601}}), "/timeouts/execution_seconds", "3600"),
        (json!({"timeouts": {"execution_seconds": 0}}), "/timeouts/execution_seconds", "3600"),
        (json!({"timeouts": {"idle_seconds": -0.0}}), "/timeouts/idle_seconds", "14400"),
        (json!({"template": "nope"}), "/template", "\"python\""),
        (json!({"template": ""}), "/template", "\"python\""),
        (json!({"name": "a b"}), "/name", "64"),
        (json!({"name": "x".repeat(65)}), "/name", "64"),
        (json!({"env": {"1A": "x"}}), "/env/1A", "letters"),
        (json!({"env": {"A=B": "x"}}), "/env/A=B", "letters"),
        (json!({"env": {"A": "\0"}}), "/env/A", "zero"),
        (json!({"env": {"A": "x".repeat(100_000)}}), "/env/A", "bytes"),
        (json!({"labels": {"a/b": "x"}}), "/labels/a~1b", "letters"),
        (json!({"labels": {"a": "x\r\ny"}}), "/labels/a", "control"),
    ];
    for (mut body, field, allowed) in rows {
        if body["template"].is_null() {
            body["template"] = json!("python");
        }
        let reply = server.post("/v1/sessions", &body).await;
        let problem = reply.problem(422, "spec-rejected");
        assert_eq!(problem["errors"][0]["pointer"], field, "{}", reply.text);
        assert!(text(&problem["errors"][0]["message"]).contains(allowed), "{allowed}: {}", reply.text);
    }
    for wrong in [json!(-1), json!(1.5), json!("512"), json!(true), json!([512]), json!(1e30)] {
        let reply = server.post("/v1/sessions", &json!({"resources": {"memory_mb": wrong}})).await;
        reply.problem(400, "invalid-request");
        assert_eq!(reply.pointers(), ["/resources/memory_mb"], "{}", reply.text);
    }
    let several = json!({"template": "python", "name": "?", "resources": {"cpu": 99, "pids": 9999}, "timeouts": {"idle_seconds": 1e9}});
    let reply = server.post("/v1/sessions", &several).await;
    reply.problem(422, "spec-rejected");
    assert_eq!(reply.pointers(), ["/name", "/resources/cpu", "/resources/pids", "/timeouts/idle_seconds"]);
}

async fn wrong_executions_are_named_too(server: Arc<Server>) {
    let cell = server.cell().await;
    let rows = [
        (json!({}), 400, vec!["/code"]),
        (json!({"code": 1}), 400, vec!["/code"]),
        (json!({"code": "1", "timeout": 1, "stdin": "x"}), 400, vec!["/stdin", "/timeout"]),
        (json!({"code": "1", "on_disconnect": "explode"}), 400, vec!["/on_disconnect"]),
        (json!({"code": "1", "timeout_seconds": 0}), 422, vec!["/timeout_seconds"]),
        (
            json!({"code": "1", "timeout_seconds": -5, "max_output_bytes": 0}),
            422,
            vec!["/max_output_bytes", "/timeout_seconds"],
        ),
        (json!({"code": "1", "timeout_seconds": 3601}), 422, vec!["/timeout_seconds"]),
        (json!({"code": "1", "max_output_bytes": 1_u64 << 40}), 422, vec!["/max_output_bytes"]),
        (json!({"code": "1", "max_output_bytes": -1}), 400, vec!["/max_output_bytes"]),
    ];
    for (body, status, pointers) in rows {
        let reply = server.post(&cell.path("/executions"), &body).await;
        reply.problem(status, if status == 400 { "invalid-request" } else { "spec-rejected" });
        assert_eq!(reply.pointers(), pointers, "{body}: {}", reply.text);
    }
    for context in ["", "ctx", "../x", cell.id.as_str(), "ctx01m82z7pkpeaw99p32zj28hnjb"] {
        server
            .post(&cell.path("/executions"), &json!({"code": "1", "context_id": context}))
            .await
            .problem(404, "not-found");
    }
    for body in [json!({"idle_seconds": -1}), json!({"expires_in_seconds": 1e12}), json!({"labels": {"": "x"}})] {
        server.patch(&cell.path(""), &body).await.problem(422, "spec-rejected");
    }
    server.patch(&cell.path(""), &json!({"resources": {"cpu": 2}})).await.problem(400, "invalid-request");
    cell.works().await;
}

async fn bodies_that_are_too_large_or_too_slow(server: Arc<Server>) {
    let cell = server.cell().await;
    let code = |bytes: usize| json!({"code": "#".repeat(bytes)});
    server.post(&cell.path("/executions"), &code(1 << 20)).await.problem(413, "payload-too-large");
    assert_eq!(
        server.post(&cell.path("/executions"), &code((1 << 20) - 100)).await.status,
        200,
        "the control: below it is fine"
    );
    // Without a length that could be looked at first.
    let chunks = futures_util::stream::iter((0..40).map(|_| Ok::<_, std::io::Error>(vec![b' '; 64 * 1024])));
    server.send(post(&server, reqwest::Body::wrap_stream(chunks))).await.problem(413, "payload-too-large");
    // One that lies about its length, and one that never comes to its end.
    let began = Instant::now();
    let head = format!(
        "POST /v1/sessions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n",
        server.key
    );
    let answer = raw(&server, &format!("{head}content-length: 99999999999\r\n\r\n{{")).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    let answer = raw(&server, &format!("{head}content-length: 100\r\n\r\n{{")).await;
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("request-timeout"), "{answer}");
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    cell.works().await;
}

/// Sends bytes and reads what comes back until nothing does for a while.
async fn raw(server: &Server, request: &str) -> String {
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).await.expect("a connection");
    stream.write_all(request.as_bytes()).await.expect("a server that listens");
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    // The whole head and body of these answers come in one write.
    let first = tokio::time::timeout(NEVER, stream.read(&mut buffer)).await.expect("an answer in time");
    answer.extend_from_slice(&buffer[..first.unwrap_or(0)]);
    String::from_utf8_lossy(&answer).into_owned()
}

async fn keys_that_are_none(server: Arc<Server>) {
    let with = |name: &str, value: &str| vec![(name.to_owned(), value.to_owned())];
    let key = server.key.clone();
    let other = format!("cb_{}", "0".repeat(64));
    let rows: Vec<(&str, Vec<(String, String)>)> = vec![
        ("none", vec![]),
        ("empty", with("authorization", "")),
        ("no key", with("authorization", "Bearer")),
        ("an empty key", with("authorization", "Bearer ")),
        ("no scheme", with("authorization", &key)),
        ("another scheme", with("authorization", &format!("Basic {key}"))),
        ("two spaces", with("authorization", &format!("Bearer  {key}"))),
        ("more behind it", with("authorization", &format!("Bearer {key} x"))),
        ("in quotes", with("authorization", &format!("Bearer \"{key}\""))),
        ("upper case", with("authorization", &format!("Bearer {}", key.to_uppercase()))),
        ("another", with("authorization", &format!("Bearer {other}"))),
        ("cut short", with("authorization", &format!("Bearer {}", &key[..key.len() - 1]))),
        ("a character more", with("x-api-key", &format!("{key}0"))),
        ("without its prefix", with("x-api-key", key.trim_start_matches("cb_"))),
        ("a long one", with("x-api-key", &"c".repeat(16_000))),
        ("not ASCII", with("x-api-key", "cb_é")),
        (
            "twice",
            [with("authorization", &format!("Bearer {key}")), with("authorization", &format!("Bearer {key}"))].concat(),
        ),
        ("by both headers", [with("authorization", &format!("Bearer {key}")), with("x-api-key", &key)].concat()),
        (
            "a right and a wrong one",
            [with("authorization", &format!("Bearer {key}")), with("x-api-key", &other)].concat(),
        ),
        ("as a cookie", with("cookie", &format!("key={key}"))),
    ];
    let mut bodies = Vec::new();
    for (what, headers) in rows {
        let mut request = server.bare(Method::GET, "/v1/sessions");
        for (name, value) in &headers {
            request = request.header(name, value.as_bytes());
        }
        let reply = server.send(request).await;
        assert_eq!(reply.status, 401, "{what}: {}", reply.text);
        reply.problem(401, "unauthenticated");
        assert_eq!(reply.header("www-authenticate"), "Bearer");
        assert!(
            headers.iter().all(|(_, v)| v.len() < 20 || !reply.text.contains(v.trim_start_matches("Bearer "))),
            "{what} is echoed"
        );
        let mut body = reply.json.clone();
        body["request_id"] = Value::Null;
        bodies.push(body);
    }
    assert!(bodies.windows(2).all(|w| w[0] == w[1]), "the answer depends on the key: {bodies:?}");
    let in_query = server.bare(Method::GET, &format!("/v1/sessions?api_key={key}"));
    server.send(in_query).await.problem(401, "unauthenticated");
    // The controls: by either header, in either spelling.
    let spelled = [
        ("authorization", format!("bearer {key}")),
        ("x-api-key", key.clone()),
        ("x-api-key", key.replace("cb_", "e2b_")),
    ];
    for (name, value) in spelled {
        assert_eq!(server.send(server.bare(Method::GET, "/v1/sessions").header(name, value)).await.status, 200);
    }
    // Every route wants it; which those are, the document says.
    let document = server.send(server.bare(Method::GET, "/openapi.json")).await.json;
    let paths = document["paths"].as_object().expect("paths");
    let mut routes = 0;
    for (path, methods) in paths.iter().filter(|(path, _)| path.starts_with("/v1/")) {
        let path = path.replace("{id}", "ses01m82z7pkpeaw99p32zcpb6jvx");
        for method in methods.as_object().expect("methods").keys().filter(|m| *m != "parameters") {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).expect("a method");
            let reply = server.send(server.bare(method.clone(), &path)).await;
            assert_eq!(reply.status, 401, "{method} {path}: {}", reply.text);
            routes += 1;
        }
    }
    assert!(routes >= 15, "{routes} routes");
}

async fn a_key_without_the_scope_is_forbidden(server: Arc<Server>) {
    let cell = server.cell().await;
    let execution = text(&cell.run("1").await["id"]);
    let rows = [
        (Method::POST, "/v1/sessions".to_owned()),
        (Method::DELETE, cell.path("")),
        (Method::DELETE, "/v1/sessions?label=a:b".to_owned()),
        (Method::PATCH, cell.path("")),
        (Method::POST, cell.path("/keepalive")),
        (Method::POST, cell.path("/interrupt")),
        (Method::POST, cell.path("/restart")),
        (Method::POST, cell.path("/pause")),
        (Method::POST, cell.path("/resume")),
        (Method::POST, cell.path("/executions")),
        (Method::POST, format!("/v1/executions/{execution}/cancel")),
    ];
    for (method, path) in rows {
        let request = server.bare(method.clone(), &path).bearer_auth(&server.powerless_key);
        let request = if path.ends_with("/executions") { request.json(&json!({"code": "1"})) } else { request };
        let reply = server.send(request).await;
        assert_eq!(reply.status, 403, "{method} {path}: {}", reply.text);
        reply.problem(403, "forbidden");
    }
    cell.works().await;
}

async fn what_is_another_tenants_is_not_there(server: Arc<Server>) {
    let cell = server.cell().await;
    let execution = text(&cell.run("secret = 42").await["id"]);
    let swapped = |id: &str| {
        let (rest, last) = id.split_at(id.len() - 1);
        format!("{rest}{}", if last == "0" { "1" } else { "0" })
    };
    let routes: Vec<(Method, String, Value)> = vec![
        (Method::GET, "/v1/sessions/ID".into(), Value::Null),
        (Method::PATCH, "/v1/sessions/ID".into(), json!({})),
        (Method::DELETE, "/v1/sessions/ID".into(), Value::Null),
        (Method::GET, "/v1/sessions/ID/wait".into(), Value::Null),
        (Method::POST, "/v1/sessions/ID/keepalive".into(), Value::Null),
        (Method::POST, "/v1/sessions/ID/interrupt".into(), Value::Null),
        (Method::POST, "/v1/sessions/ID/restart".into(), Value::Null),
        (Method::POST, "/v1/sessions/ID/pause".into(), Value::Null),
        (Method::POST, "/v1/sessions/ID/resume".into(), Value::Null),
        (Method::POST, "/v1/sessions/ID/executions".into(), json!({"code": "secret"})),
        (Method::GET, "/v1/executions/EXE".into(), Value::Null),
        (Method::GET, "/v1/executions/EXE/events".into(), Value::Null),
        (Method::POST, "/v1/executions/EXE/cancel".into(), Value::Null),
    ];
    for (method, route, body) in routes {
        let ask = async |session: &str, execution: &str, key: &str| {
            let request =
                server.bare(method.clone(), &route.replace("ID", session).replace("EXE", execution)).bearer_auth(key);
            let reply = server.send(if body.is_null() { request } else { request.json(&body) }).await;
            assert_eq!(reply.status, 404, "{method} {route}: {}", reply.text);
            let mut seen = reply.problem(404, "not-found").clone();
            seen["request_id"] = Value::Null;
            seen
        };
        let foreign = ask(&cell.id, &execution, &server.other_key).await;
        let unknown = ask(&swapped(&cell.id), &swapped(&execution), &server.other_key).await;
        assert_eq!(foreign, unknown, "{method} {route}: a foreign id can be told from an unknown one");
        for (session, execution) in [
            (cell.id.to_uppercase(), execution.to_uppercase()),
            (cell.id[..10].to_owned(), execution[..10].to_owned()),
            (format!("{}x", cell.id), format!("{execution}x")),
            (execution.clone(), cell.id.clone()),
            (cell.id.replace("ses", "%E2%80%8Bses"), execution.replace("exe", "%E2%80%8Bexe")),
            ("%00".into(), "%00".into()),
            ("%ff".into(), "%ff".into()),
            ("..%2f..%2fetc".into(), "..%2f..%2fetc".into()),
            ("x".repeat(5000), "x".repeat(5000)),
        ] {
            ask(&session, &execution, &server.key).await;
        }
    }
    let list = server.send(server.bare(Method::GET, "/v1/sessions").bearer_auth(&server.other_key)).await;
    assert_eq!(list.json["sessions"], json!([]));
    // A name is a tenant's own.
    let named = json!({"template": "python", "name": "mine", "if_exists": "reuse"});
    let mine = server.create(named.clone()).await;
    let theirs =
        server.send(server.bare(Method::POST, "/v1/sessions").bearer_auth(&server.other_key).json(&named)).await;
    assert_eq!(theirs.status, 201, "{}", theirs.text);
    assert_ne!(theirs.json["id"], json!(mine.id));
    assert_eq!(cell.value("secret").await, "42");
}

async fn wrong_queries_and_paths(server: Arc<Server>) {
    let cell = server.cell().await;
    let queries = [
        ("/v1/sessions?what=1&limit=1", "?what"),
        ("/v1/sessions?limit=0", "?limit"),
        ("/v1/sessions?limit=201", "?limit"),
        ("/v1/sessions?limit=-1", "?limit"),
        ("/v1/sessions?limit=1e1", "?limit"),
        ("/v1/sessions?state=happy", "?state"),
        ("/v1/sessions?label=x", "?label"),
        ("/v1/sessions?cursor=x", "?cursor"),
        ("/v1/templates?x=", "?x"),
    ];
    for (path, field) in queries {
        let reply = server.get(path).await;
        reply.problem(400, "invalid-request");
        assert_eq!(reply.pointers(), [field], "{}", reply.text);
    }
    for below in [
        "/wait?state=happy",
        "/wait?timeout_seconds=-1",
        "/wait?timeout_seconds=301",
        "/wait?timeout_seconds=NaN",
        "/wait?timeout_seconds=1e400",
        "/wait?x=1",
    ] {
        let reply = server.get(&cell.path(below)).await;
        assert_eq!(reply.status, 400, "{below}: {}", reply.text);
        reply.problem(400, "invalid-request");
    }
    server.post("/v1/sessions?wait=maybe", &Value::Null).await.problem(400, "invalid-request");
    server.post("/v1/sessions?wait=true&privileged=1", &Value::Null).await.problem(400, "invalid-request");
    server.delete("/v1/sessions").await.problem(400, "invalid-request");
    server.delete("/v1/sessions?all=1").await.problem(400, "invalid-request");
    server.get("/v1/sessions?%ff=%ff").await.problem(400, "invalid-request");
    for path in ["/v1", "/v1/", "/v1/nothing", "/v1/sessions/", "/v1//sessions", "/debug/pprof", "/metrics", "/.env"] {
        server.get(path).await.problem(404, "not-found");
    }
    // As it is, without a client that tidies it up.
    let head = format!("HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\nconnection: close\r\n\r\n", server.key);
    for path in [
        "/v1/sessions/%2e%2e/templates",
        "/v1/sessions/../templates",
        "/v1/x/../templates",
        "/v1/templates%00",
        "/v1/templates/..",
    ] {
        let answer = raw(&server, &format!("GET {path} {head}")).await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{path}: {answer}");
    }
    server.get(&format!("{}/", cell.path(""))).await.problem(404, "not-found");
    for (method, path) in [
        (Method::PUT, "/v1/sessions".to_owned()),
        (Method::POST, cell.path("")),
        (Method::GET, cell.path("/executions")),
        (Method::DELETE, cell.path("/interrupt")),
        (Method::POST, "/v1/templates".to_owned()),
        (Method::TRACE, "/v1/sessions".to_owned()),
        (Method::OPTIONS, "/v1/sessions".to_owned()),
        (Method::from_bytes(b"BREW").expect("a method"), "/v1/sessions".to_owned()),
    ] {
        let reply = server.send(server.request(method.clone(), &path)).await;
        assert_eq!(reply.status, 405, "{method} {path}: {}", reply.text);
        reply.problem(405, "method-not-allowed");
        assert!(!reply.header("allow").is_empty(), "{method} {path}");
        assert!(reply.headers.keys().all(|name| !name.as_str().starts_with("access-control")));
    }
    cell.works().await;
}

async fn headers_that_mean_harm(server: Arc<Server>) {
    let list = || server.request(Method::GET, "/v1/sessions");
    let kept = server.send(list().header("x-request-id", "abc-DEF_1.2")).await;
    assert_eq!(kept.header("x-request-id"), "abc-DEF_1.2");
    for id in ["", "a b", "<script>", "a\"b", "é", &"x".repeat(129), "a;b"] {
        let reply = server.send(list().header("x-request-id", id.as_bytes())).await;
        assert_eq!(reply.status, 200);
        assert!(reply.header("x-request-id").starts_with("req"), "{id:?} became {:?}", reply.header("x-request-id"));
    }
    let spoofed = list()
        .header("x-forwarded-for", "127.0.0.1")
        .header("x-forwarded-host", "evil")
        .header("host", "evil")
        .header("origin", "https://evil");
    let reply = server.send(spoofed).await;
    assert_eq!(reply.status, 200);
    assert!(reply.headers.keys().all(|name| !name.as_str().starts_with("access-control")));
    assert_eq!((reply.header("x-content-type-options"), reply.header("cache-control")), ("nosniff", "no-store"));
    let mut many = list();
    for n in 0..300 {
        many = many.header(format!("x-many-{n}"), "x");
    }
    assert!([200, 431].contains(&many.send().await.expect("an answer").status().as_u16()));
    // More than is ever read at once, however late the server comes to it.
    let large = list().header("x-large", "x".repeat(2_000_000)).send().await;
    assert!(large.map_or(true, |r| r.status().as_u16() == 431));
    let accept =
        server.request(Method::GET, "/v1/sessions").header("accept", "text/html;q=\u{7f}".replace('\u{7f}', "1e400"));
    assert_eq!(server.send(accept).await.header("content-type"), "application/json");
}

async fn templates_that_can_not_be_used(server: Arc<Server>) {
    let reply = server.post("/v1/sessions", &json!({"template": "imageless"})).await;
    let problem = reply.problem(422, "image-rejected");
    assert!(text(&problem["detail"]).contains("imageless"), "{}", reply.text);
    assert_eq!(problem["retryable"], false);
    server.post("/v1/sessions?wait=false", &json!({"template": "imageless"})).await.problem(422, "image-rejected");
    let templates = server.get("/v1/templates").await.json;
    let listed = templates["templates"].as_array().expect("templates");
    let image = |name: &str| listed.iter().find(|t| t["name"] == name).map(|t| t["image"]["id"].clone());
    assert_eq!(image("imageless"), Some(Value::Null));
    assert!(image("python").is_some_and(|id| text(&id).starts_with("sha256:")));
}

async fn code_of_every_kind_stays_code(server: Arc<Server>) {
    let cell = server.cell().await;
    for (code, status) in [
        ("", "ok"),
        ("   \n\t", "ok"),
        ("\0", "error"),
        ("\u{202e}print(1)", "error"),
        ("'\u{ffff}\u{10ffff}\u{feff}'", "ok"),
        ("print('\\x1b[2J\\x00\\r\\n data: x\\n\\nevent: execution.completed\\n\\n')", "ok"),
        ("print('\\ud800')", "ok"),
        ("def f(:", "error"),
        ("%nosuchmagic", "error"),
        ("!echo shell", "ok"),
        ("raise SystemExit(3)", "error"),
        ("raise type('\\n<b>', (Exception,), {})('x' * 3_000_000)", "error"),
        // IPython asks it for its text again and again, and forgets the reply over it; a slow machine reaches the limit first.
        ("class E(Exception):\n    def __str__(self): raise E\nraise E", "error or timeout"),
        ("import sys; sys.stdout.close()", "ok"),
    ] {
        let events = cell.stream(json!({"code": code, "timeout_seconds": 5}), Form::Sse).await.rest().await;
        let last = &events[events.len() - 1];
        let ended = last.data["execution"]["status"].as_str().unwrap_or_default();
        assert_eq!(last.kind, "execution.completed", "{code:?}");
        assert!(status.split(" or ").any(|allowed| allowed == ended), "{code:?} ended as {ended:?}, not {status:?}");
        assert_eq!(events.iter().filter(|e| e.kind == "execution.completed").count(), 1, "{code:?} forged an event");
    }
    let big = format!("x = '{}'", "y".repeat(900_000));
    assert_eq!(cell.run(&big).await["status"], "ok");
    assert_eq!(cell.value("len(x)").await, "900000");
    cell.delete().await;
}

async fn requests_that_are_not_http(server: Arc<Server>) {
    for bytes in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "\u{16}\u{3}\u{1}\0\u{1}\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
        "POST /v1/sessions HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx",
        "POST /v1/sessions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
    ] {
        let answer = raw(&server, bytes).await;
        let status: u16 = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(400);
        assert!((400..500).contains(&status) || status == 505, "{bytes:?}: {answer}");
        assert!(!answer.contains("panicked"), "{answer}");
    }
    assert_eq!(server.get("/livez").await.status, 200);
}

/// A way to the engine that can be cut and restored.
struct Way {
    socket: PathBuf,
    cut: CancellationToken,
}

impl Way {
    fn open(socket: &Path) -> Self {
        let listener = UnixListener::bind(socket).expect("a socket");
        let cut = CancellationToken::new();
        let cutting = cut.clone();
        task::spawn("way", async move {
            while let Some(Ok((near, _))) = cutting.run_until_cancelled(listener.accept()).await {
                let cutting = cutting.clone();
                task::spawn("connection", async move {
                    let mut near = near;
                    let Ok(mut far) = UnixStream::connect("/var/run/docker.sock").await else { return };
                    // Whichever way it ends, both sides are closed.
                    let _ = cutting.run_until_cancelled(tokio::io::copy_bidirectional(&mut near, &mut far)).await;
                });
            }
        });
        Self { socket: socket.to_owned(), cut }
    }

    fn cut(&self) {
        self.cut.cancel();
        std::fs::remove_file(&self.socket).expect("a socket");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_engine_the_server_does_not_start() {
    let folder = tempfile::tempdir().expect("a folder");
    for host in [format!("unix://{}/docker.sock", folder.path().display()), "tcp://127.0.0.1:1".to_owned()] {
        let (_folder, config) = server::configuration(&format!("[engine]\nhost = {host:?}\n"));
        let started = app::serve(&config, Process::default(), |_| panic!("it can't be ready"));
        let refused = tokio::time::timeout(NEVER, started).await.expect("an answer in time");
        let Err(error @ StartError::Engine { .. }) = refused else { panic!("{refused:?}") };
        let said = error.to_string();
        assert!(said.contains(&host) && said.contains("docker info") && said.contains("make setup"), "{said}");
    }
}

/// Asks until it answers with this status: what was seen of the engine counts for a moment.
async fn readyz(server: &Arc<Server>, status: u16) -> server::Reply {
    let began = Instant::now();
    loop {
        let reply = server.get("/readyz").await;
        if reply.status == status || began.elapsed() > Duration::from_secs(5) {
            assert_eq!(reply.status, status, "{}", reply.text);
            return reply;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_goes_away_and_comes_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("docker.sock");
    let way = Way::open(&socket);
    let server = Server::start(&format!("[engine]\nhost = \"unix://{}\"\n", socket.display())).await;
    let cell = server.cell().await;
    let running = cell.background_until_output("print(1, flush=True)\nwhile True: pass").await;
    assert_eq!(server.get("/readyz").await.status, 200);

    way.cut();
    let began = Instant::now();
    let reply = server.post("/v1/sessions", &json!({"template": "python"})).await;
    let problem = reply.problem(503, "engine-unavailable");
    assert_eq!((&problem["retryable"], reply.header("retry-after").is_empty()), (&json!(true), false));
    readyz(&server, 503).await.problem(503, "engine-unavailable");
    assert_eq!(server.get("/livez").await.status, 200);
    assert_eq!(server.get("/v1/templates").await.status, 200);
    assert_eq!(server.get("/v1/sessions").await.status, 200);
    // What can't be heard of now goes on; what is asked for meanwhile is accepted, and so is its end.
    assert_eq!(server.execution(&running).await["status"], "running");
    let late = cell.background("x = 41").await;
    let cancelled = server.post(&format!("/v1/executions/{running}/cancel"), &Value::Null).await;
    assert!(cancelled.status < 300, "{}", cancelled.text);
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());

    let way = Way::open(&socket);
    assert_eq!(server.ended(&running).await["status"], "cancelled");
    assert_eq!(server.ended(&late).await["status"], "ok");
    assert_eq!(cell.value("x + 1").await, "42");
    readyz(&server, 200).await;
    server.cell().await.works().await;
    let left = server.finish().await;
    way.cut();
    left.unwrap_or_else(|left| panic!("{left}"));
}
