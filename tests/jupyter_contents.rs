//! Files of sessions over Jupyter's contents API: answers are the reference's, what code leaves in its folder is read within bounds, and documents find their kernel.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::sync::Arc;

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use server::{Reply, Server, text};

const SETTINGS: &str = "default_template = \"python\"\n[server]\nmax_body = \"1MiB\"\n[templates.other]\nimage = \"cellblock/python:latest\"\n";

fn asks(server: &Server, method: Method, path: &str) -> RequestBuilder {
    server.bare(method, path).header("authorization", format!("token {}", server.key))
}

async fn get(server: &Server, path: &str) -> Reply {
    server.send(asks(server, Method::GET, path)).await
}

async fn send(server: &Server, method: Method, path: &str, body: &Value) -> Reply {
    server.send(asks(server, method, path).body(body.to_string())).await
}

async fn kernel(server: &Server) -> String {
    let made = send(server, Method::POST, "/api/kernels", &json!({})).await;
    assert_eq!(made.status, 201, "{}", made.text);
    text(&made.json["id"])
}

/// The session of a kernel, as the native API has it.
fn native(kernel: &str) -> String {
    cellblock::domain::ids::SessionId::from_uuid(kernel.parse().unwrap()).to_string()
}

async fn run(server: &Server, kernel: &str, code: &str) -> String {
    let ran = server.post(&format!("/v1/sessions/{}/executions", native(kernel)), &json!({"code": code})).await;
    assert_eq!(ran.json["status"], "ok", "{}", ran.text);
    text(&ran.json["stdout"])
}

fn is_error(reply: &Reply, status: u16) {
    assert_eq!(reply.status, status, "{}", reply.text);
    assert!(reply.json["message"].is_string() && reply.json.get("reason").is_some(), "{}", reply.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_of_sessions_are_contents() {
    let server = Server::start(SETTINGS).await;
    let cases = cases!(server; answers_are_the_references, sessions_are_folders, what_code_leaves_is_read_within_bounds, documents_find_their_kernel);
    server.run_and_finish(2, cases).await;
}

async fn answers_are_the_references(server: Arc<Server>) {
    let kernel = kernel(&server).await;
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/jupyter/bin/python");
    assert!(python.exists(), "{} is not there; `make test-kernel` makes it", python.display());
    let mut command = std::process::Command::new(python);
    command.arg("-P").arg(root.join("tests/support/jupyter_contents.py")).args([&server.url, &server.key, &kernel]);
    let ran = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    // What changed something is in the audit, and what looked is not.
    for (action, least) in [("write_file", 5), ("make_folder", 2), ("move_file", 1), ("delete_file", 1)] {
        let found = server.get(&format!("/v1/audit?action={action}&session={}", native(&kernel))).await;
        assert!(found.json["events"].as_array().map(Vec::len) >= Some(least), "{action}: {}", found.text);
    }
}

async fn sessions_are_folders(server: Arc<Server>) {
    let kernel = kernel(&server).await;
    let named = server.post("/v1/sessions", &json!({"template": "python", "name": "mine"})).await;
    assert_eq!(named.status, 201, "{}", named.text);
    for path in ["/api/contents", "/api/contents/"] {
        let root = get(&server, path).await.json;
        assert_eq!((&root["path"], &root["type"], &root["writable"]), (&json!(""), &json!("directory"), &json!(false)));
        let entries = root["content"].as_array().unwrap();
        let paths: Vec<_> = entries.iter().map(|entry| text(&entry["path"])).collect();
        assert!(paths.contains(&kernel) && paths.contains(&"mine".to_owned()), "{paths:?}");
        assert!(entries.iter().all(|entry| entry["type"] == "directory" && entry["content"] == Value::Null));
    }
    let body = json!({"type": "file", "format": "text", "content": "x = 1"});
    let made = send(&server, Method::PUT, "/api/contents/mine/a%20b/c.py", &body).await;
    assert_eq!((made.status, &made.json["path"]), (201, &json!("mine/a b/c.py")), "{}", made.text);
    assert_eq!(made.header("location"), "/api/contents/mine/a%20b/c.py");
    assert_eq!(get(&server, "/api/contents/mine/a%20b/c.py").await.json["content"], "x = 1");
    // A copy may go to another session, a move not.
    let copied =
        send(&server, Method::POST, &format!("/api/contents/{kernel}"), &json!({"copy_from": "mine/a b/c.py"})).await;
    assert_eq!((copied.status, &copied.json["path"]), (201, &json!(format!("{kernel}/c.py"))), "{}", copied.text);
    assert_eq!(run(&server, &kernel, "print(open('c.py').read())").await, "x = 1\n");
    let moved =
        send(&server, Method::PATCH, "/api/contents/mine/a%20b/c.py", &json!({"path": format!("{kernel}/d.py")})).await;
    is_error(&moved, 400);
    // The folders of sessions are made and removed with their kernels.
    for (method, path, status) in [
        (Method::PUT, "/api/contents/new", 404),
        (Method::PUT, "/api/contents/mine", 400),
        (Method::PATCH, "/api/contents/mine", 400),
        (Method::DELETE, "/api/contents/mine", 400),
        (Method::POST, "/api/contents", 403),
    ] {
        is_error(&send(&server, method, path, &json!({"type": "directory", "path": "x"})).await, status);
    }
    for (path, status) in [
        ("none", 404),
        ("none/x", 404),
        ("mine/none", 404),
        ("mine/..%2F..%2Fetc%2Fpasswd", 400),
        ("mine/%2Fetc%2Fpasswd", 404),
        ("mine/a%00b", 400),
    ] {
        let refused = get(&server, &format!("/api/contents/{path}")).await;
        assert_eq!(refused.status, status, "{path}: {}", refused.text);
    }
    for query in ["?type=file", "?format=x", "?content=2", "?hash=x"] {
        is_error(&get(&server, &format!("/api/contents/mine{query}")).await, 400);
    }
    let id = text(&named.json["id"]);
    assert_eq!(server.delete(&format!("/v1/sessions/{id}")).await.status, 200);
    is_error(&get(&server, "/api/contents/mine/a%20b/c.py").await, 404);
}

async fn what_code_leaves_is_read_within_bounds(server: Arc<Server>) {
    let kernel = kernel(&server).await;
    let code = "import os, json\n\
        with open('long', 'wb') as f: f.truncate(33 << 20)\n\
        with open('fits', 'wb') as f: f.truncate(20 << 20)\n\
        os.mkfifo('fifo'); os.mkdir('d'); os.symlink('d', 'to-d'); os.symlink('/etc/passwd', 'out'); os.symlink('x.txt', 'to-x')\n\
        open('x.txt', 'w').write('x'); open('bad.ipynb', 'w').write('{'); open('deep.ipynb', 'w').write('[' * 100000)\n\
        open('d/hostile.ipynb', 'w').write(json.dumps({'nbformat': 4, 'nbformat_minor': 5, 'metadata': {}, 'cells': [{'cell_type': 'code', 'source': ['a\\n', 'b'], 'metadata': {'trusted': True}, 'outputs': []}]}))\n\
        os.mkdir('many')\n\
        for n in range(4500): open(f'many/{n:05}', 'w').close()";
    run(&server, &kernel, code).await;
    let at = |path: &str| format!("/api/contents/{kernel}/{path}");
    let long = get(&server, &at("long")).await;
    is_error(&long, 413);
    assert!(text(&long.json["message"]).contains("33554432"), "{}", long.text);
    let looked = get(&server, &at("long?content=0")).await;
    assert_eq!((looked.status, &looked.json["size"]), (200, &json!(33 << 20)), "{}", looked.text);
    assert_eq!(get(&server, &at("fits?format=base64")).await.json["content"].as_str().map(str::len), Some(27_962_028));
    is_error(&get(&server, &at("fifo")).await, 400);
    is_error(&get(&server, &at("bad.ipynb")).await, 400);
    is_error(&get(&server, &at("deep.ipynb")).await, 400);
    assert_eq!(get(&server, &at("bad.ipynb?type=file")).await.json["content"], "{");
    let hostile = get(&server, &at("d/hostile.ipynb")).await.json;
    let cell = &hostile["content"]["cells"][0];
    assert_eq!((&cell["metadata"]["trusted"], &cell["source"]), (&json!(false), &json!("a\nb")));
    assert_eq!(get(&server, &at("to-x")).await.json["content"], "x");
    let listed = get(&server, &at("to-d")).await;
    assert_eq!(listed.json["content"][0]["path"], format!("{kernel}/to-d/hostile.ipynb"), "{}", listed.text);
    is_error(&get(&server, &at("out")).await, 403);
    is_error(&get(&server, &at("long?content=0&hash=1")).await, 413);
    // All cells of a notebook in as few bytes as they can have.
    run(
        &server,
        &kernel,
        "open('cells.ipynb', 'w').write('{\"nbformat\":4,\"cells\":[' + ','.join(['{\"a\":0}'] * 100000) + ']}')",
    )
    .await;
    let cells = get(&server, &at("cells.ipynb")).await.json;
    assert_eq!(cells["content"]["cells"].as_array().map(Vec::len), Some(100_000));
    // The first of a file's chunks is 1, and the last -1.
    let chunk = |n: i64| json!({"type": "file", "format": "text", "content": "x", "chunk": n});
    assert_eq!(send(&server, Method::PUT, &at("chunks"), &chunk(1)).await.status, 200);
    for n in [0, -2] {
        is_error(&send(&server, Method::PUT, &at("chunks"), &chunk(n)).await, 400);
    }
    send(&server, Method::PUT, &at("chunks"), &chunk(-1)).await;
    assert_eq!(get(&server, &at("chunks")).await.json["content"], "xx");
    let many = get(&server, &at("many")).await.json;
    assert_eq!(many["content"].as_array().map(Vec::len), Some(4500));
    let body = json!({"type": "file", "format": "text", "content": "x".repeat(2 << 20)});
    is_error(&send(&server, Method::PUT, &at("large"), &body).await, 413);
    is_error(&get(&server, &at("large")).await, 404);
    is_error(&server.send(asks(&server, Method::PUT, &at("x")).body("{")).await, 400);
    assert_eq!(run(&server, &kernel, "print(1)").await, "1\n");
}

async fn documents_find_their_kernel(server: Arc<Server>) {
    let kernel = kernel(&server).await;
    let document =
        |name: &str| json!({"path": format!("{kernel}/n.ipynb"), "type": "notebook", "kernel": {"name": name}});
    let opened = send(&server, Method::POST, "/api/sessions", &document("python3")).await;
    assert_eq!((opened.status, &opened.json["kernel"]["id"]), (201, &json!(kernel)), "{}", opened.text);
    // Documents that are opened at once are all there.
    let others = (0..8).map(|n| {
        let body = json!({"path": format!("{kernel}/{n}.ipynb"), "type": "notebook", "kernel": {"id": kernel}});
        let server = &server;
        async move { send(server, Method::POST, "/api/sessions", &body).await.status }
    });
    assert_eq!(futures_util::future::join_all(others).await, [201; 8]);
    let listed = get(&server, "/api/sessions").await.json;
    let of_kernel = listed.as_array().unwrap().iter().filter(|one| one["kernel"]["id"] == *kernel).count();
    assert_eq!(of_kernel, 9, "{listed}");
    // What wants a kernel of another kind does not get that one.
    let mut body = document("other");
    body["path"] = json!(format!("{kernel}/o.ipynb"));
    let other = send(&server, Method::POST, "/api/sessions", &body).await;
    assert_eq!((other.status, &other.json["kernel"]["name"]), (201, &json!("other")), "{}", other.text);
    assert_ne!(other.json["kernel"]["id"], json!(kernel));
    assert_eq!(
        server.send(asks(&server, Method::DELETE, &format!("/api/sessions/{}", text(&opened.json["id"])))).await.status,
        204
    );
    is_error(&get(&server, &format!("/api/contents/{kernel}")).await, 404);
    let again = send(&server, Method::POST, "/api/sessions", &document("python3")).await;
    assert_eq!(again.status, 201, "{}", again.text);
    assert_ne!(again.json["kernel"]["id"], json!(kernel), "there is no such folder any more");
}
