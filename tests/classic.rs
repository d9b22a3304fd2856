//! The classic routes in real containers: a client of theirs that knows nothing of this server, two tenants, hostile requests, and many at once.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::multipart::{Form, Part};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use server::{Reply, Server, text};

const SETTINGS: &str = r#"
default_template = "python"
[server]
max_body = "5MiB"
[doors.classic]
enabled = true
template = "classic"
imports = ["json", "datetime as dt"]
idle = "1h"
[templates.classic]
image = "cellblock/python:latest"
packages = ["ipython", "tzdata"]
[templates.classic.default]
memory = "192MiB"
disk = "16MiB"
tmp = "16MiB"
execution = "3s"
"#;

/// Bytes of a body in these tests.
const MAX_BODY: usize = 5 << 20;

fn at(server: &Server, path: &str) -> RequestBuilder {
    server.bare(Method::POST, &format!("/t/{}{path}", server.key))
}

async fn form(server: &Server, path: &str, user: &str) -> Reply {
    server.send(at(server, path).form(&[("user_id", user)])).await
}

async fn run(server: &Server, user: &str, code: &str) -> Reply {
    server.send(at(server, "/execute").json(&json!({"user_id": user, "code": code}))).await
}

/// Starts a session and answers with its id.
async fn start(server: &Server, user: &str) -> String {
    let started = form(server, "/start_session", user).await;
    assert_eq!(
        (started.status, &started.json["message"]),
        (200, &json!("Session started successfully")),
        "{}",
        started.text
    );
    started.header("x-cellblock-session").to_owned()
}

#[track_caller]
fn is_detail(reply: &Reply, status: u16) {
    assert_eq!(reply.status, status, "{}", reply.text);
    assert_eq!(reply.header("content-type"), "application/json", "{}", reply.text);
    let keys: Vec<_> = reply.json.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["detail"], "{}", reply.text);
}

/// What of a body was not understood, in FastAPI's form: the kind of the mistake and the field.
#[track_caller]
fn wrong(reply: &Reply) -> Vec<(String, String)> {
    is_detail(reply, 422);
    let one = |wrong: &Value| {
        let keys: Vec<_> = wrong.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["input", "loc", "msg", "type"], "{wrong}");
        assert_eq!(wrong["loc"][0], "body");
        (text(&wrong["type"]), wrong["loc"].get(1).map(text).unwrap_or_default())
    };
    reply.json["detail"].as_array().unwrap().iter().map(one).collect()
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(kind, field)| ((*kind).to_owned(), (*field).to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_the_classic_routes_move_by_url() {
    let server = Server::start(SETTINGS).await;
    let cases = cases!(server; a_client_works, images_and_both_streams_are_one_text, what_ends_under_code_is_told, what_is_installed_is_imported, what_is_no_form_is_told, uploads_stay_in_their_folder, many_start_at_once, nothing_tells_the_key);
    server.run_and_finish(2, cases).await;
}

/// Runs a client in the Python that `scripts/test-kernel` has made.
async fn a_client_works(server: Arc<Server>) {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/clients/bin/python");
    assert!(python.exists(), "{} is not there; `make test-kernel` makes it", python.display());
    let mut command = std::process::Command::new(python);
    command.arg("-P").arg(root.join("tests/support/classic_client.py")).arg(format!("{}/t/{}", server.url, server.key));
    let ran = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}

async fn images_and_both_streams_are_one_text(server: Arc<Server>) {
    start(&server, "text").await;
    let code = "import sys\nprint('one')\nsys.stdout.flush()\nprint('two', file=sys.stderr)\nsys.stderr.flush()\n\
                from IPython.display import display\ndisplay({'image/png': 'aGk=', 'text/plain': 'a plot'}, raw=True)\n\
                display({'image/png': 'aGk='}, raw=True)\ndt.date(2026, 1, 2).isoformat()";
    let ran = run(&server, "text", code).await;
    assert_eq!(ran.json, json!({"output": "one\ntwo\na plot\n'2026-01-02'"}), "{}", ran.text);
    let asked = run(&server, "text", "input('?')").await;
    is_detail(&asked, 400);
    assert_eq!(asked.json["detail"]["error"], "Execution error");
    assert!(text(&asked.json["detail"]["traceback"]).contains("StdinNotImplementedError"), "{}", asked.text);
    let long = "x".repeat(4 << 20);
    assert_eq!(wrong(&run(&server, "text", &long).await), pairs(&[("string_too_long", "code")]));
    let died = run(&server, "text", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)").await;
    is_detail(&died, 500);
    assert_eq!(run(&server, "text", "print(1)").await.json, json!({"output": "1\n"}), "another kernel");
    assert_eq!(form(&server, "/end_session", "text").await.status, 200);
}

async fn what_ends_under_code_is_told(server: Arc<Server>) {
    start(&server, "ends").await;
    let (running, ended) = tokio::join!(run(&server, "ends", "import time; time.sleep(2.5)"), async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        form(&server, "/end_session", "ends").await
    });
    assert_eq!(ended.status, 200, "{}", ended.text);
    is_detail(&running, 409);
    is_detail(&run(&server, "ends", "1").await, 404);
    is_detail(&form(&server, "/reset", "ends").await, 404);
    // What has run is still there.
    let path = format!("/t/{}/notebook/ends", server.key);
    let notebook = server.send(server.bare(Method::GET, &path)).await;
    assert_eq!((notebook.status, &notebook.json["nbformat"]), (200, &json!(4)), "{}", notebook.text);
    // A user's next session has a notebook of its own, and the last one counts.
    let id = start(&server, "ends").await;
    assert_eq!(form(&server, "/end_session", "ends").await.status, 200);
    let notebook = server.send(server.bare(Method::GET, &path)).await;
    assert_eq!(notebook.json["metadata"]["cellblock"]["session"], id, "{}", notebook.text);
    is_detail(&server.send(server.bare(Method::GET, &format!("{path}-not"))).await, 404);
}

async fn what_is_installed_is_imported(server: Arc<Server>) {
    start(&server, "imports").await;
    let install = || async {
        let body = json!({"user_id": "imports", "package_name": "tzdata"});
        server.send(at(&server, "/install_package").json(&body)).await
    };
    run(&server, "imports", "import sys; sys.modules['tzdata'] = None").await;
    let broken = install().await;
    is_detail(&broken, 500);
    assert!(text(&broken.json["detail"]).contains("can't be imported: ModuleNotFoundError"), "{}", broken.text);
    // By the distribution's own name where no other is known.
    run(
        &server,
        "imports",
        "del sys.modules['tzdata']\nimport importlib.metadata\nimportlib.metadata.packages_distributions = dict",
    )
    .await;
    let installed = install().await;
    assert_eq!(installed.status, 200, "{}", installed.text);
    assert_eq!(run(&server, "imports", "tzdata.__name__").await.json, json!({"output": "'tzdata'"}));
    assert_eq!(form(&server, "/end_session", "imports").await.status, 200);
}

async fn what_is_no_form_is_told(server: Arc<Server>) {
    let missing = pairs(&[("missing", "user_id")]);
    for request in [
        at(&server, "/start_session"),
        at(&server, "/start_session").json(&json!({"user_id": "x"})),
        at(&server, "/reset").form(&[("user", "x")]),
        at(&server, "/end_session").form(&[("user_id", "")]),
        at(&server, "/start_session").multipart(Form::new().text("other", "x")),
        at(&server, "/start_session").header("content-type", "multipart/form-data").body("user_id=x"),
    ] {
        assert_eq!(wrong(&server.send(request).await), missing);
    }
    let both = pairs(&[("missing", "user_id"), ("missing", "code")]);
    assert_eq!(wrong(&server.send(at(&server, "/execute").json(&json!({"x": 1}))).await), both);
    let types = json!({"user_id": 7, "code": ["1"]});
    let types = wrong(&server.send(at(&server, "/execute").json(&types)).await);
    assert_eq!(types, pairs(&[("string_type", "user_id"), ("string_type", "code")]));
    let body =
        |kind: &str, body: &'static str| server.send(at(&server, "/execute").header("content-type", kind).body(body));
    assert_eq!(wrong(&body("application/json", "{\"user_id\": x").await), pairs(&[("json_invalid", "12")]));
    for (kind, text) in
        [("application/json", "[1]"), ("application/x-www-form-urlencoded", "user_id=x&code=1"), ("text/plain", "{}")]
    {
        assert_eq!(wrong(&body(kind, text).await), pairs(&[("model_attributes_type", "")]), "{kind}");
    }
    assert_eq!(wrong(&body("application/json", "").await), pairs(&[("missing", "")]));
    let long = "u".repeat(257);
    assert_eq!(wrong(&form(&server, "/start_session", &long).await), pairs(&[("string_too_long", "user_id")]));
    let huge = at(&server, "/start_session").form(&[("user_id", "x".repeat(MAX_BODY + 100))]);
    is_detail(&server.send(huge).await, 413);
    let broken = at(&server, "/start_session").header("content-type", "multipart/form-data; boundary=b");
    assert_eq!(wrong(&server.send(broken.body("--b\r\nContent-Disp")).await), pairs(&[("form_invalid", "")]));
    let bytes =
        at(&server, "/reset").header("content-type", "application/x-www-form-urlencoded").body("user_id=%ff%fe");
    assert_eq!(wrong(&server.send(bytes).await), pairs(&[("string_unicode", "user_id")]));
    is_detail(&server.send(server.bare(Method::POST, "/start_session").form(&[("user_id", "x")])).await, 401);
    is_detail(&server.send(server.bare(Method::POST, "/t/cb_wrong/execute").json(&json!({}))).await, 401);
    assert_eq!(server.send(server.bare(Method::GET, "/execute")).await.status, 405);
    let page = at(&server, "/start_session").header("origin", "https://evil.example").form(&[("user_id", "x")]);
    assert_eq!(server.send(page).await.status, 403, "a page of another site");
}

async fn uploads_stay_in_their_folder(server: Arc<Server>) {
    start(&server, "files").await;
    let send = |form: Form| server.send(at(&server, "/upload_file").multipart(form));
    let part = |name: &str| Part::bytes(b"content".to_vec()).file_name(name.to_owned());
    let sent = send(Form::new().text("user_id", "files").part("file", part("ä b.txt"))).await;
    assert_eq!((sent.status, &sent.json["file_path"]), (200, &json!("/workspace/ä b.txt")), "{}", sent.text);
    let after = send(Form::new().part("file", part("early.txt")).text("user_id", "files")).await;
    assert_eq!(after.status, 200, "{}", after.text);
    // More than a body may have elsewhere: it goes through as it comes, and ends at the session's disk.
    let large = Part::bytes(vec![b'x'; 14 << 20]).file_name("large");
    assert_eq!(send(Form::new().text("user_id", "files").part("file", large)).await.status, 200);
    let full = Part::bytes(vec![b'x'; 6 << 20]).file_name("full");
    is_detail(&send(Form::new().text("user_id", "files").part("file", full)).await, 507);
    let early = Part::bytes(vec![b'x'; MAX_BODY + 1000]).file_name("early");
    is_detail(&send(Form::new().part("file", early).text("user_id", "files")).await, 413);
    for name in ["../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "..", "."] {
        assert_eq!(
            wrong(&send(Form::new().text("user_id", "files").part("file", part(name))).await),
            pairs(&[("value_error", "file")]),
            "{name}"
        );
    }
    let many = (0..100).fold(Form::new(), |form, n| form.text(format!("f{n}"), "x"));
    assert_eq!(wrong(&send(many.text("user_id", "files")).await), pairs(&[("form_invalid", "")]));
    let none = send(Form::new().text("user_id", "files").text("file", "content")).await;
    assert_eq!(wrong(&none), pairs(&[("value_error", "file")]));
    let twice = Form::new().text("user_id", "files").part("file", part("one")).part("file", part("two"));
    assert_eq!(wrong(&send(twice).await), pairs(&[("too_many", "file")]));
    assert_eq!(wrong(&send(Form::new().text("user_id", "files")).await), pairs(&[("missing", "file")]));
    assert_eq!(wrong(&send(Form::new().part("file", part("x"))).await), pairs(&[("missing", "user_id")]));
    let no_form = server.send(at(&server, "/upload_file").json(&json!({"user_id": "files"}))).await;
    assert_eq!(wrong(&no_form), pairs(&[("missing", "user_id"), ("missing", "file")]));
    is_detail(&send(Form::new().text("user_id", "nobody").part("file", part("x"))).await, 404);
    let listed = run(&server, "files", "import glob; print(sorted(glob.glob('*')))").await;
    assert_eq!(listed.json["output"], "['early.txt', 'large', 'one', 'ä b.txt']\n", "{}", listed.text);
    assert_eq!(form(&server, "/end_session", "files").await.status, 200);
}

async fn many_start_at_once(server: Arc<Server>) {
    let user = "../é 漢字/'\";--\u{1f600}";
    let started = join_all((0..100).map(|_| form(&server, "/start_session", user))).await;
    let statuses: Vec<_> = started.iter().map(|reply| reply.status).collect();
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
    let path = text(&started[0].json["notebook_path"]);
    assert_eq!(run(&server, user, "print(1)").await.json, json!({"output": "1\n"}));
    let notebook = server.send(server.bare(Method::GET, &format!("/t/{}{path}", server.key))).await;
    let cells = notebook.json["cells"].as_array().unwrap();
    assert_eq!((notebook.status, cells.len()), (200, 2), "what is imported, and what was run: {}", notebook.text);
    let live = server.get("/v1/sessions").await.json;
    let live = live["sessions"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|one| one["state"] != "ended" && one["labels"]["classic.user_id"] == *user)
        .count();
    assert_eq!(live, 1);
    let (one, other) = tokio::join!(form(&server, "/end_session", user), form(&server, "/start_session", user));
    assert!([200, 404].contains(&one.status) && other.status == 200, "{} {}", one.text, other.text);
    form(&server, "/end_session", user).await;
}

async fn nothing_tells_the_key(server: Arc<Server>) {
    start(&server, "audited").await;
    run(&server, "audited", "1").await;
    assert_eq!(form(&server, "/end_session", "audited").await.status, 200);
    for action in ["create_session", "create_execution", "delete_session"] {
        let audit = server.get(&format!("/v1/audit?action={action}")).await;
        assert!(audit.text.contains("/t/…/") && !audit.text.contains(&server.key), "{action}: {}", audit.text);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_is_one_of_its_tenants() {
    let server = Server::start_with_tenants(SETTINGS).await;
    let post = |path: &str, key: &str| server.bare(Method::POST, path).bearer_auth(key);
    let form = |path: &'static str, key: &str| server.send(post(path, key).form(&[("user_id", "same")]));
    let execute =
        |key: &str, code: &str| server.send(post("/execute", key).json(&json!({"user_id": "same", "code": code})));
    let (mine, other, powerless) = (&server.key, &server.other_key, &server.powerless_key);
    assert_eq!(form("/start_session", mine).await.status, 200);
    assert_eq!(execute(mine, "x = 1").await.json, json!({"output": ""}));
    for path in ["/reset", "/end_session"] {
        is_detail(&form(path, other).await, 404);
    }
    is_detail(&execute(other, "x").await, 404);
    is_detail(&server.send(server.bare(Method::GET, "/notebook/same").bearer_auth(other)).await, 404);
    let upload = Form::new().text("user_id", "same").part("file", Part::bytes(b"x".to_vec()).file_name("x"));
    is_detail(&server.send(post("/upload_file", other).multipart(upload)).await, 404);
    is_detail(
        &server
            .send(post("/install_package", other).json(&json!({"user_id": "same", "package_name": "ipython"})))
            .await,
        404,
    );
    for path in ["/start_session", "/reset", "/end_session"] {
        is_detail(&form(path, powerless).await, 403);
    }
    is_detail(&execute(powerless, "x").await, 403);
    assert_eq!(form("/start_session", other).await.status, 200);
    is_detail(&execute(other, "x").await, 400);
    assert_eq!(execute(mine, "x").await.json, json!({"output": "1"}), "nobody has touched it");
    assert_eq!(form("/end_session", other).await.status, 200);
    assert_eq!(execute(mine, "x").await.status, 200);
    assert_eq!(form("/end_session", mine).await.status, 200);
    server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_found_again_by_the_next_server_and_no_route_is_there_unasked() {
    let settings = format!("{SETTINGS}[drain]\ncontainers = \"keep\"\n");
    let server = Server::start(&settings).await;
    let id = start(&server, "stays").await;
    assert_eq!(run(&server, "stays", "x = 7").await.status, 200);
    let server = server.start_again_keeping().await;
    assert_eq!(run(&server, "stays", "x").await.json, json!({"output": "7"}));
    assert_eq!(form(&server, "/end_session", "stays").await.status, 200);
    // By its user, and by its own id, which leads to it when its user is forgotten.
    for name in ["stays", &id] {
        let path = format!("/t/{}/notebook/{name}", server.key);
        let kept = server.send(server.bare(Method::GET, &path)).await;
        assert_eq!((kept.status, &kept.json["metadata"]["cellblock"]["session"]), (200, &json!(id)), "{}", kept.text);
    }
    server.finish().await.unwrap();

    let server = Server::start("default_template = \"python\"\n").await;
    for path in ["/start_session", "/execute", "/upload_file"] {
        assert_eq!(server.send(server.request(Method::POST, path)).await.status, 404, "{path}");
    }
    server.finish().await.unwrap();
}
