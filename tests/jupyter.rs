//! The Jupyter door: REST models and codes, both WebSocket subprotocols, and what becomes of clients that are cut off, or hostile.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::sync::Arc;

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use server::{Reply, Server, text};

const SETTINGS: &str = "default_template = \"python\"\n";

/// A request with the key where Jupyter's clients put it.
fn asks(server: &Server, method: Method, path: &str) -> RequestBuilder {
    server.bare(method, path).header("authorization", format!("token {}", server.key))
}

async fn get(server: &Server, path: &str) -> Reply {
    server.send(asks(server, Method::GET, path)).await
}

async fn post(server: &Server, path: &str, body: Value) -> Reply {
    let request = asks(server, Method::POST, path);
    server.send(if body.is_null() { request } else { request.body(body.to_string()) }).await
}

async fn delete(server: &Server, path: &str) -> u16 {
    server.send(asks(server, Method::DELETE, path)).await.status
}

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
    assert_eq!(specs.keys().map(String::as_str).collect::<Vec<_>>(), ["data", "python", "python3"]);
    for (name, one) in specs {
        assert_eq!(&one["name"], name);
        assert_eq!(one["spec"]["language"], "python");
        assert!(one["spec"]["argv"].is_array() && one["spec"]["display_name"].is_string(), "{one}");
        let picture = server.send(server.bare(Method::GET, &text(&one["resources"]["logo-svg"]))).await;
        assert_eq!((picture.status, picture.header("content-type")), (200, "image/svg+xml"));
    }
    assert_eq!(get(&server, "/api/kernelspecs/python3").await.json["name"], "python3");
    is_error(&get(&server, "/api/kernelspecs/none").await, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_door_can_be_closed_and_tells_no_key() {
    let server = Server::start("[jupyter]\nenabled = false\n").await;
    for path in ["/api", "/api/kernels", "/jupyter/api", "/t/x/api"] {
        get(&server, path).await.problem(404, "not-found");
    }
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}
