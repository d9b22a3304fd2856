//! The Jupyter door: REST models and codes, both WebSocket subprotocols, and what becomes of clients that are cut off, or hostile.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/jupyter.rs"]
mod jupyter;
#[path = "support/server.rs"]
mod server;

use std::sync::Arc;

use futures_util::SinkExt;
use jupyter::{Client, Frame, Got, asks, delete, get, kernel, one, post, printed, types};
use reqwest::Method;
use serde_json::{Value, json};
use server::{NEVER, Reply, Server, text};
use tokio_tungstenite::tungstenite;

const SETTINGS: &str = "default_template = \"python\"\n";

fn is_error(reply: &Reply, status: u16) {
    assert_eq!(reply.status, status, "{}", reply.text);
    assert_eq!(reply.header("content-type"), "application/json", "{}", reply.text);
    assert!(reply.json["message"].is_string() && reply.json.get("reason").is_some(), "{}", reply.text);
}

fn is_kernel(model: &Value) {
    let keys: Vec<_> = model.as_object().expect("a model").keys().map(String::as_str).collect();
    assert_eq!(keys, ["connections", "execution_state", "id", "last_activity", "name"], "{model}");
    let at = text(&model["last_activity"]);
    let fraction = at.strip_suffix('Z').and_then(|at| at.split_once('.')).map(|(_, fraction)| fraction.len());
    assert_eq!(fraction, Some(6), "{at}");
    assert_eq!(text(&model["id"]).split('-').count(), 5, "{model}");
    assert!(model["connections"].is_u64(), "{model}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rest_api_is_jupyter_servers() {
    let server = Server::start(SETTINGS).await;
    let cases = cases!(server; keys_are_taken_in_every_place, kernels_are_sessions, documents_are_labels, kernelspecs_are_templates);
    server.run_and_finish(2, cases).await;
}

async fn keys_are_taken_in_every_place(server: Arc<Server>) {
    let bare = |path: &str| server.bare(Method::GET, path);
    let version = server.send(bare("/api")).await;
    assert_eq!((version.status, version.json["version"].is_string()), (200, true), "{}", version.text);
    let key = &server.key;
    for base in ["".to_owned(), "/jupyter".to_owned(), format!("/t/{key}"), format!("/t/{key}/jupyter")] {
        let path = format!("{base}/api/kernels");
        let has_key = base.contains("/t/");
        assert_eq!(server.send(bare(&path)).await.status, if has_key { 200 } else { 403 }, "{path}");
        for header in [format!("token {key}"), format!("Token {key}"), format!("Bearer {key}")] {
            assert_eq!(server.send(bare(&path).header("authorization", header)).await.status, 200, "{path}");
        }
        assert_eq!(server.send(bare(&format!("{path}?token={key}"))).await.status, 200, "{path}");
        let both = bare(&format!("{path}?token={key}&123")).header("authorization", format!("token {key}"));
        assert_eq!(server.send(both).await.status, 200, "{path}");
        let differ = bare(&format!("{path}?token={key}")).header("authorization", "token cb_other");
        assert_eq!(server.send(differ).await.status, 403, "{path}");
    }
    // As GatewayClient sends it without a token.
    let empty = bare(&format!("/t/{key}/api/kernels")).header("authorization", "token ");
    assert_eq!(server.send(empty).await.status, 200);
    let refused = server.send(bare("/api/kernels").header("authorization", "token wrong")).await;
    is_error(&refused, 403);
    assert_eq!(refused.json, json!({"message": "Forbidden", "reason": null}));
    let preflight = server.send(server.bare(Method::OPTIONS, "/api/kernels")).await;
    assert_eq!(preflight.status, 204, "{}", preflight.text);
    assert!(preflight.header("access-control-allow-headers").contains("x-xsrftoken"));
    assert!(preflight.header("access-control-allow-origin").is_empty());
    let page = asks(&server, Method::POST, "/api/kernels").header("origin", "https://evil.example");
    assert_eq!(server.send(page).await.status, 403, "a page of another site");
    is_error(&get(&server, "/api/contents/x").await, 404);
    assert_eq!(get(&server, "/api/terminals").await.json, json!([]));
    let me = get(&server, "/api/me").await.json;
    assert!(me["identity"]["username"].is_string() && me["permissions"].is_object(), "{me}");
}

async fn kernels_are_sessions(server: Arc<Server>) {
    let made = post(&server, "/t/x/api/kernels", json!({})).await;
    assert_eq!(made.status, 403, "another key in the path");
    let odd = server.send(server.bare(Method::GET, "/api/kernels?%74oken=cb_not_one")).await;
    is_error(&odd, 403);
    let refused = server.get("/v1/audit?action=refuse_key").await.text;
    assert!(refused.contains("/api/kernels") && !refused.contains("cb_not_one"), "{refused}");
    let path = format!("/t/{}/api/kernels", server.key);
    let made = server.send(server.bare(Method::POST, &path)).await;
    assert_eq!(made.status, 201, "{}", made.text);
    is_kernel(&made.json);
    let id = text(&made.json["id"]);
    assert_eq!(made.header("location"), format!("{path}/{id}"));
    assert_eq!(
        (&made.json["name"], &made.json["execution_state"], &made.json["connections"]),
        (&json!("python"), &json!("idle"), &json!(0))
    );
    let audit = server.get("/v1/audit?action=create_session").await;
    assert!(audit.text.contains("/t/…/api/kernels/") && !audit.text.contains(&server.key), "{}", audit.text);
    let one = format!("/api/kernels/{id}");
    assert_eq!(get(&server, &one).await.json["id"], json!(id));
    let all = get(&server, "/api/kernels").await.json;
    assert!(all.as_array().unwrap().iter().any(|model| model["id"] == json!(id)), "{all}");
    let status = get(&server, "/api/status").await.json;
    assert!(status["kernels"].as_u64() >= Some(1) && status["started"].is_string(), "{status}");

    assert_eq!(post(&server, &format!("{one}/interrupt"), Value::Null).await.status, 204);
    let again = post(&server, &format!("{one}/restart"), json!({})).await;
    assert_eq!(again.status, 200, "{}", again.text);
    is_kernel(&again.json);
    assert_eq!(delete(&server, &one).await, 204);
    for gone in [get(&server, &one).await, post(&server, &format!("{one}/restart"), Value::Null).await] {
        is_error(&gone, 404);
    }
    assert_eq!(delete(&server, &one).await, 404);

    let given = "01890b5a-0000-7abc-8def-0123456789ab";
    let body = json!({"name": "python3", "kernel_id": given, "env": {"KERNEL_USERNAME": "me"}, "path": "x.ipynb"});
    let made = post(&server, "/jupyter/api/kernels", body.clone()).await;
    assert_eq!((made.status, &made.json["id"]), (201, &json!(given)), "{}", made.text);
    assert_eq!(made.header("location"), format!("/jupyter/api/kernels/{given}"));
    assert_eq!(made.json["name"], "python3", "as it was asked for");
    is_error(&post(&server, "/api/kernels", body).await, 409);
    assert_eq!(delete(&server, &format!("/api/kernels/{given}")).await, 204);

    is_error(&post(&server, "/api/kernels", json!({"kernel_id": "../x"})).await, 400);
    is_error(&post(&server, "/api/kernels", json!({"name": "there-is-none"})).await, 404);
    is_error(&post(&server, "/api/kernels", json!({"env": {"LD_PRELOAD": "x"}})).await, 400);
    is_error(&server.send(asks(&server, Method::POST, "/api/kernels").body("{\"a")).await, 400);
    for id in ["x", "01890b5a-0000-7abc-8def-0123456789ab", "01890B5A-0000-7abc-8def-0123456789ab"] {
        is_error(&get(&server, &format!("/api/kernels/{id}")).await, 404);
    }
}

async fn documents_are_labels(server: Arc<Server>) {
    let path = "/api/sessions";
    let body = json!({"path": "a/b.ipynb", "name": "b", "type": "notebook", "kernel": {"name": "python"}});
    let made = post(&server, path, body.clone()).await;
    assert_eq!(made.status, 201, "{}", made.text);
    let (session, kernel) = (made.json.clone(), text(&made.json["kernel"]["id"]));
    is_kernel(&session["kernel"]);
    assert_eq!(session["notebook"], json!({"path": "a/b.ipynb", "name": "b"}));
    let one = format!("{path}/{}", text(&session["id"]));
    assert_eq!(made.header("location"), one);
    let again = post(&server, path, body).await;
    assert_eq!((again.status, &again.json["id"]), (201, &session["id"]), "the one of that path");
    let other = json!({"path": "c", "name": "c", "type": "console", "kernel": {"id": kernel}});
    let other = post(&server, path, other).await;
    assert_eq!((other.status, &other.json["kernel"]["id"]), (201, &json!(kernel)), "{}", other.text);
    assert!(other.json.get("notebook").is_none());
    let ids = |list: &Value| list.as_array().unwrap().iter().map(|one| text(&one["id"])).collect::<Vec<_>>();
    let listed = ids(&get(&server, path).await.json);
    assert!([&session, &other.json].iter().all(|one| listed.contains(&text(&one["id"]))), "{listed:?}");

    let patch = |body: Value| server.send(asks(&server, Method::PATCH, &one).body(body.to_string()));
    let moved = patch(json!({"path": "new.ipynb", "name": "new"})).await;
    assert_eq!((moved.status, &moved.json["path"]), (200, &json!("new.ipynb")), "{}", moved.text);
    assert_eq!(moved.json["kernel"]["id"], json!(kernel));
    let replaced = patch(json!({"kernel": {"name": "python3"}})).await;
    assert_eq!(replaced.status, 200, "{}", replaced.text);
    assert_ne!(replaced.json["kernel"]["id"], json!(kernel));
    is_error(&get(&server, &format!("/api/kernels/{kernel}")).await, 404);
    // One request, and both kernels are in the audit.
    let native = |id: &str| cellblock::domain::ids::SessionId::from_uuid(id.parse().unwrap()).to_string();
    let new = text(&replaced.json["kernel"]["id"]);
    for (action, id) in [("delete_session", &kernel), ("create_session", &new), ("patch_session", &new)] {
        let found = server.get(&format!("/v1/audit?action={action}&session={}", native(id))).await;
        let events = found.json["events"].as_array().map(Vec::len);
        assert_eq!(events, Some(1), "{action}: {}", found.text);
    }
    is_error(&patch(json!({"kernel": {"id": kernel}})).await, 400);
    assert_eq!(get(&server, &one).await.json["path"], "new.ipynb");

    is_error(&post(&server, path, json!({"type": "notebook"})).await, 400);
    is_error(&post(&server, path, json!({"path": "x"})).await, 400);
    is_error(&post(&server, path, json!({"path": "x".repeat(300), "type": "t"})).await, 400);
    let unknown = json!({"path": "x", "type": "notebook", "kernel": {"name": "there-is-none"}});
    let unknown = post(&server, path, unknown).await;
    is_error(&unknown, 501);
    assert!(unknown.json["short_message"].is_string());
    assert_eq!(delete(&server, &one).await, 204);
    assert_eq!(delete(&server, &one).await, 404);
    is_error(&get(&server, &format!("/api/kernels/{}", text(&replaced.json["kernel"]["id"]))).await, 404);
}

async fn kernelspecs_are_templates(server: Arc<Server>) {
    let list = get(&server, &format!("/t/{}/api/kernelspecs", server.key)).await;
    assert_eq!((list.status, &list.json["default"]), (200, &json!("python3")), "{}", list.text);
    let specs = list.json["kernelspecs"].as_object().unwrap();
    let languages: Vec<_> = specs.iter().map(|(name, one)| (name.as_str(), text(&one["spec"]["language"]))).collect();
    let expected = [
        ("bash", "bash"),
        ("data", "python"),
        ("deno", "typescript"),
        ("e2b", "python"),
        ("polyglot", "python"),
        ("python", "python"),
        ("python3", "python"),
        ("r", "R"),
    ];
    assert_eq!(languages, expected.map(|(name, language)| (name, language.to_owned())));
    for (name, one) in specs {
        assert_eq!(&one["name"], name);
        assert!(one["spec"]["argv"].is_array() && one["spec"]["display_name"].is_string(), "{one}");
        let picture = server.send(server.bare(Method::GET, &text(&one["resources"]["logo-svg"]))).await;
        assert_eq!((picture.status, picture.header("content-type")), (200, "image/svg+xml"));
    }
    assert_eq!(get(&server, "/api/kernelspecs/python3").await.json["name"], "python3");
    is_error(&get(&server, "/api/kernelspecs/none").await, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_door_can_be_closed_and_tells_no_key() {
    let server = Server::start("[doors]\njupyter = false\n").await;
    for path in ["/api", "/api/kernels", "/jupyter/api", "/t/x/api"] {
        get(&server, path).await.problem(404, "not-found");
    }
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kernels_are_spoken_to_in_both_subprotocols() {
    let server = Server::start(SETTINGS).await;
    let cases = cases!(server; both_forms_run_code, errors_abort_what_follows, input_finds_its_asker, comms_carry_buffers, messages_find_their_askers, control_is_the_sessions);
    server.run_and_finish(2, cases).await;
}

async fn both_forms_run_code(server: Arc<Server>) {
    let kernel = kernel(&server).await;
    for is_v1 in [false, true] {
        let mut client = Client::open(&server, &kernel, "", is_v1).await;
        let header = client.send("shell", "kernel_info_request", json!({}), &[]).await;
        let info = client.all_of(&header).await;
        assert_eq!(one(&info, "kernel_info_reply").content["status"], "ok");
        assert_eq!(one(&info, "kernel_info_reply").channel, "shell");

        let all = client.run("print('a')\nfrom IPython.display import display\ndisplay({'x/y': 1, 'text/plain': 'é'}, raw=True, display_id='d')\n6 * 7").await;
        assert_eq!(
            types(&all),
            ["status", "execute_input", "stream", "display_data", "execute_result", "execute_reply", "status"]
        );
        assert_eq!(one(&all, "display_data").content["data"], json!({"x/y": 1, "text/plain": "é"}));
        assert_eq!(one(&all, "display_data").content["transient"]["display_id"], "d");
        assert_eq!(one(&all, "execute_result").content["data"]["text/plain"], "42");
        let reply = one(&all, "execute_reply");
        assert_eq!((&reply.content["status"], reply.channel.as_str()), (&json!("ok"), "shell"));
        assert_eq!(reply.content["execution_count"], one(&all, "execute_input").content["execution_count"]);
        let ids: std::collections::BTreeSet<_> = all.iter().map(|got| &got.msg_id).collect();
        assert_eq!(ids.len(), all.len(), "each has an id of its own");

        let complete = client.send("shell", "complete_request", json!({"code": "prin", "cursor_pos": 4}), &[]).await;
        let complete = client.all_of(&complete).await;
        assert!(one(&complete, "complete_reply").content["matches"].to_string().contains("print"));
        let values = json!({"code": "", "silent": true, "user_expressions": {"x": "1 + 1"}});
        let values = client.send("shell", "execute_request", values, &[]).await;
        let values = client.all_of(&values).await;
        assert_eq!(one(&values, "execute_reply").content["user_expressions"]["x"]["data"]["text/plain"], "2");
    }
    let session = cellblock::domain::ids::SessionId::from_uuid(kernel.parse().unwrap());
    // Its clients hear the end a moment before the session has taken note of it.
    let ready = server.get(&format!("/v1/sessions/{session}/wait?state=ready&timeout_seconds=30")).await;
    assert_eq!(ready.json["state"], "ready", "{}", ready.text);
    let model = get(&server, &format!("/api/kernels/{kernel}")).await.json;
    assert_eq!(model["execution_state"], "idle", "{model}");
    // Executions are executions like any other.
    let notebook = server.get(&format!("/v1/sessions/{session}/notebook")).await.json;
    assert_eq!(notebook["cells"].as_array().map(Vec::len), Some(2), "{notebook}");
    let audit = server.get(&format!("/v1/audit?session={session}&action=create_execution")).await;
    assert_eq!(audit.json["events"].as_array().map(Vec::len), Some(4), "{}", audit.text);
    assert!(!audit.text.contains(&server.key), "a key is not told");
}

async fn errors_abort_what_follows(server: Arc<Server>) {
    let kernel = kernel(&server).await;
    let mut client = Client::open(&server, &kernel, "", false).await;
    let failing = client.execute("import time; time.sleep(0.5); 1/0").await;
    let follows = client.execute("print('never')").await;
    let failed = client.all_of(&failing).await;
    assert_eq!(one(&failed, "error").content["ename"], "ZeroDivisionError");
    assert_eq!(one(&failed, "execute_reply").content["status"], "error");
    let aborted = client.all_of(&follows).await;
    assert_eq!(types(&aborted), ["status", "execute_reply", "status"]);
    assert_eq!(one(&aborted, "execute_reply").content["status"], "aborted");
    assert_eq!(printed(&client.run("print('again')").await, "stdout"), "again\n");

    // Who asks once it has heard of the error, as clients do that wait for no more than that, knows what it does.
    client.run("import time; get_ipython().events.register('post_run_cell', lambda *_: time.sleep(0.5))").await;
    client.execute("1/0").await;
    while client.got().await.msg_type != "error" {}
    let all = client.run("print('all the same')").await;
    assert_eq!(printed(&all, "stdout"), "all the same\n", "{:?}", types(&all));
}

async fn input_finds_its_asker(server: Arc<Server>) {
    let kernel = kernel(&server).await;
    let mut asker = Client::open(&server, &kernel, "", false).await;
    let mut other = Client::open(&server, &kernel, "", true).await;
    let header = asker.execute("print('Hello', input('Name: '))").await;
    loop {
        let got = asker.got().await;
        if got.msg_type == "input_request" {
            assert_eq!(
                (got.channel.as_str(), &got.content["prompt"], &got.parent),
                ("stdin", &json!("Name: "), &header)
            );
            break;
        }
    }
    other.send("stdin", "input_reply", json!({"value": "forged"}), &[]).await;
    asker.send("stdin", "input_reply", json!({"value": "you"}), &[]).await;
    let all = asker.all_of(&header).await;
    assert_eq!(printed(&all, "stdout"), "Hello you\n");
    let mut heard = Vec::new();
    loop {
        let got = other.got().await;
        let is_end = got.content["execution_state"] == "idle";
        heard.push(got);
        if is_end {
            break;
        }
    }
    assert_eq!(printed(&heard, "stdout"), "Hello you\n", "all hear what is published");
    assert!(heard.iter().all(|got| got.channel == "iopub" && got.parent == header));
}

async fn comms_carry_buffers(server: Arc<Server>) {
    let kernel = kernel(&server).await;
    for is_v1 in [false, true] {
        let mut client = Client::open(&server, &kernel, "", is_v1).await;
        client
            .run(
                "def opened(comm, msg):\n    @comm.on_msg\n    def _(msg):\n        comm.send({'sum': sum(bytes(msg['buffers'][0])), 'is': msg['content']['data']}, buffers=[b'\\x00\\x01\\xff', b''])\n        print('worked')\n\
                 get_ipython().kernel.comm_manager.register_target('t', opened)",
            )
            .await;
        let open =
            client.send("shell", "comm_open", json!({"comm_id": "c", "target_name": "t", "data": {}}), &[]).await;
        client.all_of(&open).await;
        let message =
            client.send("shell", "comm_msg", json!({"comm_id": "c", "data": {"a": [1]}}), &[b"\x01\x02\xff"]).await;
        let answer = client.all_of(&message).await;
        let comm = one(&answer, "comm_msg");
        assert_eq!(comm.content["data"], json!({"sum": 258, "is": {"a": [1]}}));
        assert_eq!(comm.buffers, [b"\x00\x01\xff".to_vec(), Vec::new()]);
        assert_eq!(printed(&answer, "stdout"), "worked\n");
        let info = client.send("shell", "comm_info_request", json!({}), &[]).await;
        assert!(one(&client.all_of(&info).await, "comm_info_reply").content["comms"]["c"].is_object());
        let close = client.send("shell", "comm_close", json!({"comm_id": "c", "data": {}}), &[]).await;
        client.all_of(&close).await;
    }
}

async fn messages_find_their_askers(server: Arc<Server>) {
    let kernel = kernel(&server).await;
    let (mut one_client, mut two) = (
        Client::open(&server, &kernel, "", false).await,
        Client::open(&server, &kernel, "?session_id=two", true).await,
    );
    // Who says that it is somebody else is answered itself.
    two.session.clone_from(&one_client.session);
    let header = two.execute("print('two')").await;
    let all = two.all_of(&header).await;
    assert_eq!(one(&all, "execute_reply").content["status"], "ok");
    // Nor does a name in a header make anybody somebody else: whose key it is stands in the audit.
    let forged =
        json!({"msg_id": "f", "msg_type": "execute_request", "session": one_client.session, "username": "admin"});
    let parts = ["shell", &forged.to_string(), "{}", "{}", "{\"code\": \"1\"}"].map(|part| part.as_bytes().to_vec());
    two.socket.send(tungstenite::Message::Binary(v1_frame(&parts))).await.unwrap();
    assert_eq!(one(&two.all_of(&forged).await, "execute_reply").content["status"], "ok");
    let audit = server.get("/v1/audit?action=create_execution").await;
    let events = audit.json["events"].as_array().expect("events");
    assert!(!events.is_empty() && events.iter().all(|event| event["tenant"] == "default"), "{}", audit.text);
    assert!(!audit.text.contains("admin"), "{}", audit.text);
    let header = one_client.execute("print('one')").await;
    let mut heard = Vec::new();
    while heard.last().is_none_or(|got: &Got| !(got.parent == header && got.msg_type == "execute_reply")) {
        heard.push(one_client.got().await);
    }
    let replies = heard.iter().filter(|got| got.channel == "shell").count();
    assert_eq!(replies, 1, "the other's reply is not for it: {:?}", types(&heard));
    assert_eq!(printed(&heard, "stdout"), "two\none\n");
    // What a thread says after its cell has ended is told under the cell's header.
    let late = one_client.execute("import threading, time\nthreading.Thread(target=lambda: (time.sleep(1), print('late', flush=True))).start()").await;
    one_client.all_of(&late).await;
    let got = one_client.got().await;
    assert_eq!((got.msg_type.as_str(), &got.parent), ("stream", &late));
    // The native API's executions are heard too.
    let session = cellblock::domain::ids::SessionId::from_uuid(kernel.parse().unwrap());
    server.post(&format!("/v1/sessions/{session}/executions"), &json!({"code": "print('native')"})).await;
    while printed(&[one_client.got().await], "stdout") != "native\n" {}
}

async fn control_is_the_sessions(server: Arc<Server>) {
    let kernel = kernel(&server).await;
    let mut client = Client::open(&server, &kernel, "", false).await;
    client.run("x = 1").await;
    let sleeping = client.execute("import time; time.sleep(60)").await;
    while client.got().await.msg_type != "execute_input" {}
    let interrupt = client.send("control", "interrupt_request", json!({}), &[]).await;
    let mut all = Vec::new();
    let is_end = |got: &Got| got.parent == sleeping && got.content["execution_state"] == "idle";
    while !all.last().is_some_and(is_end) {
        all.push(client.got().await);
    }
    assert!(all.iter().any(|got| got.parent == interrupt && got.msg_type == "interrupt_reply"));
    assert_eq!(one(&all, "error").content["ename"], "KeyboardInterrupt");
    let usage = client.send("control", "kernel_info_request", json!({}), &[]).await;
    assert_eq!(one(&client.all_of(&usage).await, "kernel_info_reply").channel, "control");

    assert_eq!(post(&server, &format!("/api/kernels/{kernel}/restart"), Value::Null).await.status, 200);
    let gone = client.run("x").await;
    assert_eq!(one(&gone, "error").content["ename"], "NameError");
    let restart = client.send("control", "shutdown_request", json!({"restart": true}), &[]).await;
    while client.got().await.parent != restart {}
    // A kernel that dies is said to.
    let died = client.execute("import os; os._exit(3)").await;
    let died = client.all_of(&died).await;
    assert_eq!(one(&died, "execute_reply").content["status"], "error");
    assert!(printed(&died, "stderr").contains("exited with status 3"), "{died:?}");
    let restarting = loop {
        let got = client.got().await;
        if got.msg_type == "status" && got.parent == json!({}) {
            break got;
        }
    };
    assert_eq!(restarting.content["execution_state"], "restarting");
    assert_eq!(printed(&client.run("print(1)").await, "stdout"), "1\n");

    let end = client.send("control", "shutdown_request", json!({"restart": false}), &[]).await;
    let mut seen = Vec::new();
    let code = loop {
        match client.next().await {
            Frame::Got(got) => seen.push(*got),
            Frame::Closed(code) => break code,
        }
    };
    assert_eq!(code, Some(1000));
    assert!(seen.iter().any(|got| got.parent == end && got.msg_type == "shutdown_reply"), "{seen:?}");
    assert_eq!(seen.last().map(|got| &got.content["execution_state"]), Some(&json!("dead")));
    assert!(matches!(Client::try_open(&server, &kernel, "", false).await, Err(404)));
}

/// Numbers that were printed one a message.
fn numbers(all: &[Got]) -> Vec<u64> {
    assert_eq!(printed(all, "stderr"), "");
    // A line may come in two messages.
    printed(all, "stdout").lines().map(|line| line.parse().unwrap_or_else(|_| panic!("{line:?}"))).collect()
}

/// Leaves out what has come before under the same id.
fn once(all: Vec<Got>) -> Vec<Got> {
    let mut seen = std::collections::HashSet::new();
    all.into_iter().filter(|got| seen.insert(got.msg_id.clone())).collect()
}

/// Prints so many numbers, each in a message of its own.
fn counting(to: u64, pause: f64) -> String {
    format!("import time\nfor n in range({to}):\n    print(n, flush=True)\n    if n % 50 == 0: time.sleep({pause})")
}

/// Reads what comes until so many messages have come, or the end of what was asked.
async fn read_some(client: &mut Client, header: &Value, most: usize, all: &mut Vec<Got>) -> bool {
    let is_reply = |got: &Got| got.msg_type == "execute_reply";
    let is_idle = |got: &Got| got.content["execution_state"] == "idle";
    for _ in 0..most {
        match client.next().await {
            Frame::Got(got) if got.parent == *header => all.push(*got),
            Frame::Got(_) => {}
            Frame::Closed(_) => return false,
        }
        if all.iter().rev().take(50).any(is_idle) && all.iter().any(is_reply) {
            return true;
        }
    }
    false
}

const COUNTING: &str = "default_template = \"python\"\n[template_defaults.output]\nmessages = 20000\nmessages_per_second = 20000\n[template_defaults.default]\nexecution = \"300s\"\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_cut_off_hears_the_rest_and_nothing_is_lost() {
    const MANY: u64 = 10_000;
    let server = Server::start(COUNTING).await;
    let kernel = kernel(&server).await;
    let query = "?session_id=mine";
    let mut client = Client::open(&server, &kernel, query, false).await;
    let header = client.execute(&counting(MANY, 0.01)).await;
    let mut all = Vec::new();
    // Cut without a word, again and again.
    let mut cuts = 0;
    while !read_some(&mut client, &header, 2500, &mut all).await {
        cuts += 1;
        drop(client);
        client = Client::open(&server, &kernel, query, false).await;
    }
    assert!(cuts >= 3, "{cuts}");
    let again = all.len();
    let all = once(all);
    assert_eq!(numbers(&all), (0..MANY).collect::<Vec<_>>());
    assert!(
        again - all.len() < 4 * 1200,
        "only what follows the last answered ping comes again: {}",
        again - all.len()
    );
    assert_eq!(all.iter().filter(|got| got.msg_type == "execute_reply").count(), 1);

    // What nobody was there for is told to who comes back, and to nobody else.
    let header = client.execute("import time; time.sleep(0.5); print('in between')").await;
    drop(client);
    let began = std::time::Instant::now();
    while get(&server, &format!("/api/kernels/{kernel}")).await.json["execution_state"] != "idle" {
        assert!(began.elapsed() < NEVER);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let mut other = Client::open(&server, &kernel, "?session_id=other", false).await;
    let own = other.run("print('own')").await;
    assert_eq!(printed(&own, "stdout"), "own\n");
    let mut client = Client::open(&server, &kernel, query, false).await;
    assert_eq!(printed(&client.all_of(&header).await, "stdout"), "in between\n");
    // The same name again takes the first one's place.
    let mut second = Client::open(&server, &kernel, query, false).await;
    assert_eq!(client.closed().await, Some(1000));
    assert_eq!(printed(&second.run("print(2)").await, "stdout"), "2\n");
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_costs_a_client_nothing_that_comes_back() {
    const MANY: u64 = 10_000;
    let (server, pid) = Server::spawn(&format!("{COUNTING}[drain]\ncontainers = \"keep\"\n")).await;
    let kernel = kernel(&server).await;
    let query = "?session_id=mine";
    let mut client = Client::open(&server, &kernel, query, true).await;
    client.run("before = 1").await;
    let header = client
        .execute(&format!(
            "print(repr(before - 1))\n{}\nbytes(3 * 1024 * 1024).hex()",
            counting(MANY, 0.05).replace("range(", "range(1, ")
        ))
        .await;
    let mut all = Vec::new();
    assert!(!read_some(&mut client, &header, 3000, &mut all).await);
    server.kill(pid).await;
    // What was on its way counts as well.
    read_some(&mut client, &header, usize::MAX, &mut all).await;
    let heard = once(all.clone()).len();
    assert!(heard < MANY as usize, "it ended too early for this test: {heard}");
    let (server, _) = server.spawn_again().await;
    let mut client = Client::open(&server, &kernel, query, true).await;
    let is_over = read_some(&mut client, &header, usize::MAX, &mut all).await;
    assert!(is_over);
    let all = once(all);
    assert_eq!(numbers(&all), (0..MANY).collect::<Vec<_>>());
    assert_eq!(one(&all, "execute_reply").content["status"], "ok");
    assert_eq!(text(&one(&all, "execute_result").content["data"]["text/plain"]).len(), 6 * 1024 * 1024 + 2);
    assert_eq!(printed(&client.run("print(before)").await, "stdout"), "1\n");
    let by_path = server.bare(Method::DELETE, &format!("/t/{}/api/kernels/{kernel}?token={}", server.key, server.key));
    assert_eq!(server.send(by_path).await.status, 204);
    let log = std::fs::read_to_string(server.data().with_file_name("log")).unwrap();
    assert!(log.contains("/t/{key}/api/kernels/{kernel}") && !log.contains(&server.key), "no line has a key in it");
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_says_that_clients_may_come_back() {
    let server = Server::start(&format!("{SETTINGS}[drain]\ncontainers = \"keep\"\n")).await;
    let kernel = kernel(&server).await;
    let mut client = Client::open(&server, &kernel, "?session_id=mine", false).await;
    client.run("x = 7").await;
    let next = server.start_again_keeping();
    let (next, code) = tokio::join!(next, client.closed());
    assert_eq!(code, Some(1012));
    let mut client = Client::open(&next, &kernel, "?session_id=mine", false).await;
    assert_eq!(printed(&client.run("print(x)").await, "stdout"), "7\n");
    assert_eq!(delete(&next, &format!("/api/kernels/{kernel}")).await, 204);
    next.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_clients_cost_their_own_connections_only() {
    let server = Server::start(
        "default_template = \"python\"\n[jupyter]\nmax_message = \"1MiB\"\nconnections_per_session = 4\nconnections_per_tenant = 8\nbuffer_size = \"1MiB\"\n",
    )
    .await;
    let cases = cases!(server; garbage_is_closed_with_the_right_code, a_connection_ends_with_its_key, connections_are_bounded, output_is_cut_in_pieces_and_said_to_be, who_never_reads_is_cut_off);
    server.run_and_finish(1, cases).await;
}

async fn garbage_is_closed_with_the_right_code(server: Arc<Server>) {
    let kernel = kernel(&server).await;
    let binary = |bytes: Vec<u8>| tungstenite::Message::Binary(bytes.into());
    let text = |text: &str| tungstenite::Message::Text(text.into());
    for (is_v1, frame, code) in [
        (false, text("{\"header\": "), 1007),
        (false, text("[]"), 1007),
        (false, binary(vec![0xff; 64]), 1009),
        (false, binary(vec![0, 0, 0, 1]), 1007),
        (true, text("{}"), 1003),
        (true, binary(vec![2; 64]), 1009),
        (true, binary(Vec::new()), 1007),
    ] {
        let mut client = Client::open(&server, &kernel, "", is_v1).await;
        client.socket.send(frame.clone()).await.unwrap();
        assert_eq!(client.closed().await, Some(code), "{frame:?}");
    }
    // Longer than may be: the connection ends, whatever the client sends on.
    let mut client = Client::open(&server, &kernel, "", false).await;
    let _ = client.socket.send(text(&"x".repeat(1 << 21))).await;
    let code = client.closed().await;
    assert_eq!(code, Some(1009));
    let mut client = Client::open(&server, &kernel, "", false).await;
    let _ = client.socket.send(binary(vec![0; 100_000_000])).await;
    assert!(matches!(client.closed().await, Some(1009) | None));

    // What is not understood, but is a message, is left out; and what asks for too much is answered.
    let mut client = Client::open(&server, &kernel, "", false).await;
    for ignored in ["{\"header\": {}}", "{\"header\": {\"msg_id\": \"a\", \"msg_type\": \"x\"}, \"channel\": \"hb\"}"] {
        client.socket.send(text(ignored)).await.unwrap();
    }
    client.send("stdin", "input_reply", json!({"value": "nobody asked"}), &[]).await;
    client.send("shell", "execute_request", json!({"code": 1}), &[]).await;
    let refused = client.send("shell", "execute_request", json!({}), &[]).await;
    let refused = client.all_of(&refused).await;
    assert_eq!(one(&refused, "execute_reply").content["status"], "error");
    let subshell = json!({"msg_id": "s", "msg_type": "execute_request", "subshell_id": "x"});
    let message = json!({"header": subshell, "content": {"code": "1"}, "channel": "shell"});
    client.socket.send(text(&message.to_string())).await.unwrap();
    let refused = client.all_of(&subshell).await;
    assert!(one(&refused, "error").content["evalue"].to_string().contains("subshell"));
    // What would run code that is no execution, and what would give it a place, is answered as refused, and not offered.
    let evaluate = json!({"type": "request", "seq": 1, "command": "evaluate", "arguments": {"expression": "1"}});
    for (kind, content) in [("debug_request", evaluate), ("create_subshell_request", json!({}))] {
        let asked = client.send("control", kind, content, &[]).await;
        let reply = client.all_of(&asked).await.into_iter().find(|got| got.channel == "control").expect("a reply");
        assert_eq!((&reply.content["status"], &reply.content["ename"]), (&json!("error"), &json!("invalid-request")));
    }
    let info = client.send("shell", "kernel_info_request", json!({}), &[]).await;
    let info = client.all_of(&info).await;
    let info = &one(&info, "kernel_info_reply").content;
    assert!(info.get("debugger").is_none() && !info["supported_features"].to_string().contains("subshell"), "{info}");
    // Header and code that look like JSON's end, or are none of Unicode.
    let odd = client.run("print('\\ud800 \"}]'.encode('utf-8', 'surrogatepass'))\n'\\ud800'").await;
    assert_eq!(one(&odd, "execute_reply").content["status"], "ok");
    assert_eq!(printed(&client.run("print(1)").await, "stdout"), "1\n");
    assert_eq!(delete(&server, &format!("/api/kernels/{kernel}")).await, 204);
}

async fn a_connection_ends_with_its_key(server: Arc<Server>) {
    let kernel = kernel(&server).await;
    let key = server.post("/v1/keys", &json!({"name": "brief", "tenant": "default", "scopes": ["sessions"]})).await;
    assert_eq!(key.status, 201, "{}", key.text);
    let mut theirs = Client::open_with(&server, &text(&key.json["key"]), (&kernel, ""), false).await.unwrap();
    let mut ours = Client::open(&server, &kernel, "", false).await;
    let asked = theirs.execute("1").await;
    theirs.all_of(&asked).await;
    let began = std::time::Instant::now();
    assert_eq!(server.delete(&format!("/v1/keys/{}", text(&key.json["id"]))).await.status, 204);
    assert_eq!(theirs.closed().await, Some(1008));
    assert!(began.elapsed() < std::time::Duration::from_secs(5), "{:?}", began.elapsed());
    let asked = ours.execute("2").await;
    ours.all_of(&asked).await;
}

async fn connections_are_bounded(server: Arc<Server>) {
    let (kernel, other) = (kernel(&server).await, kernel(&server).await);
    let mut open = Vec::new();
    let mut client = Client::open(&server, &kernel, "", false).await;
    // A thousand at once, or nearly: all but a few are told why not, and who is there goes on.
    let tries = (0..1000).map(|_| Client::try_open(&server, &kernel, "", false));
    let mut tries = futures_util::stream::iter(tries).buffer_unordered(100);
    let mut refused = 0;
    while let Some(tried) = tries.next().await {
        match tried {
            Ok(client) => open.push(client),
            Err(status) => {
                assert_eq!(status, 429);
                refused += 1;
            }
        }
    }
    drop(tries);
    assert_eq!((open.len(), refused), (3, 997), "of the kernel");
    assert_eq!(printed(&client.run("print(1)").await, "stdout"), "1\n");
    open.push(client);
    for _ in 0..4 {
        open.push(Client::open(&server, &other, "", false).await);
    }
    assert!(matches!(Client::try_open(&server, &other, "", false).await, Err(429)), "of the tenant");
    let model = get(&server, &format!("/api/kernels/{kernel}")).await.json;
    assert_eq!(model["connections"], 4);
    drop(open);
    let began = std::time::Instant::now();
    while get(&server, &format!("/api/kernels/{kernel}")).await.json["connections"] != 0 {
        assert!(began.elapsed() < NEVER);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let mut client = Client::open(&server, &kernel, "", false).await;
    assert_eq!(printed(&client.run("print(1)").await, "stdout"), "1\n");
    for path in [format!("/api/kernels/{kernel}/channels"), "/api/kernels/x/channels".to_owned()] {
        is_error(&get(&server, &path).await, if path.contains("/x/") { 404 } else { 400 });
        assert_eq!(server.send(server.bare(Method::GET, &path)).await.status, 403);
    }
    for kernel in [kernel, other] {
        assert_eq!(delete(&server, &format!("/api/kernels/{kernel}")).await, 204);
    }
}

async fn output_is_cut_in_pieces_and_said_to_be(server: Arc<Server>) {
    let kernel = kernel(&server).await;
    let mut client = Client::open(&server, &kernel, "", false).await;
    let all = client.run("print('x' * 50_000_000)").await;
    let pieces: Vec<_> =
        all.iter().filter(|got| got.content["name"] == "stdout").map(|got| text(&got.content["text"]).len()).collect();
    assert!(pieces.iter().all(|piece| *piece <= 256 * 1024), "{pieces:?}");
    assert!(pieces.iter().sum::<usize>() >= 512 * 1024, "{pieces:?}");
    let said = printed(&all, "stderr");
    assert!(said.contains("of 50000001 bytes of stdout were left out"), "{said}");
    let omitted: usize = said.split(' ').find_map(|word| word.parse().ok()).expect("a number");
    assert_eq!(pieces.iter().sum::<usize>() + omitted, 50_000_001, "{said}");
    assert_eq!(delete(&server, &format!("/api/kernels/{kernel}")).await, 204);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_arrives_whole_up_to_its_limit() {
    // As much as there may be.
    let output = "[template_defaults.output]\ntext = \"8MiB\"\ntotal = \"10MiB\"\n";
    let server = Server::start(&format!("{SETTINGS}{output}")).await;
    let kernel = kernel(&server).await;
    let mut client = Client::open(&server, &kernel, "?session_id=mine", true).await;
    for times in [800_000, 5_000_000] {
        let all = client.run(&format!("print('0123456789' * {times})")).await;
        let of_text = |got: &Got| got.content["text"].as_str().map(str::len);
        assert!(all.iter().filter_map(of_text).all(|length| length <= 256 * 1024), "{:?}", types(&all));
        let (whole, said) = (printed(&all, "stdout"), printed(&all, "stderr"));
        let omitted: usize = said.split(' ').find_map(|word| word.parse().ok()).unwrap_or_default();
        assert_eq!((whole.len() + omitted, said.is_empty()), (10 * times + 1, times == 800_000), "{said}");
        assert!(whole.len() > 7 << 20 && whole.ends_with("9\n"), "{}", whole.len());
        assert!(omitted > 0 || whole.as_bytes().chunks(10).all(|ten| ten == b"0123456789" || ten == b"\n"));
    }
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

async fn who_never_reads_is_cut_off(server: Arc<Server>) {
    let kernel = kernel(&server).await;
    let mut deaf = Client::open(&server, &kernel, "?session_id=deaf", false).await;
    let mut client = Client::open(&server, &kernel, "", false).await;
    for _ in 0..20 {
        let all = client.run("for n in range(12): print('x' * 60_000, flush=True)").await;
        assert_eq!(one(&all, "execute_reply").content["status"], "ok");
    }
    let began = std::time::Instant::now();
    // What is on its way to the deaf one is not more than what its connection holds.
    let code = deaf.closed().await;
    assert_eq!(code, Some(1013), "after {:?}", began.elapsed());
    assert_eq!(printed(&client.run("print(1)").await, "stdout"), "1\n");
    assert_eq!(delete(&server, &format!("/api/kernels/{kernel}")).await, 204);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_from_the_registry_work_as_they_come() {
    let server = Server::start(SETTINGS).await;
    let cases = cases!(server; nbclient_through_the_gateway, papermill_through_the_gateway, jupyter_kernel_client);
    server.run_and_finish(2, cases).await;
}

async fn nbclient_through_the_gateway(server: Arc<Server>) {
    client_works(&server, "nbclient").await;
}

async fn papermill_through_the_gateway(server: Arc<Server>) {
    client_works(&server, "papermill").await;
}

async fn jupyter_kernel_client(server: Arc<Server>) {
    client_works(&server, "jupyter_kernel_client").await;
}

/// Runs a client in the Python that `scripts/test-kernel` has made.
async fn client_works(server: &Server, name: &str) {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/jupyter/bin/python");
    assert!(python.exists(), "{} is not there; `make test-kernel` makes it", python.display());
    let mut command = std::process::Command::new(python);
    // Without the script's folder among the modules: its neighbours have names of packages.
    command.arg("-P").arg(root.join("tests/support/jupyter_clients.py")).args([&server.url, &server.key, name]);
    let ran = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}
