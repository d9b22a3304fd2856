//! Whose is what: every route of the API's document with every kind of key, and the life of keys.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Arc;

use cellblock::service::keys;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use server::{Cell, Server, text};

/// A file of the session.
const FILE: &str = "file.txt";
const WORKSPACE: &str = "kept-by-one";

/// What a route is about, which says who may do what with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum About {
    /// Looks at something of a tenant's.
    Look,
    /// Changes something of a tenant's.
    Change,
    /// Looks at all that a tenant has.
    List,
    /// Ends all of a tenant's that a filter admits.
    EndMany,
    /// Makes something; asked for with a template that is not there.
    Make,
    /// What the server offers to everybody.
    Offer,
    /// Commands of operators.
    Operate,
    /// The one that ends the server.
    Drain,
}

/// Every route of the document, in an order in which the owner can ask for all of them.
fn routes() -> Vec<(&'static str, &'static str, About, Value)> {
    use About::{Change, Drain, EndMany, List, Look, Make, Offer, Operate};
    let (none, code) = (Value::Null, json!({"code": "1"}));
    let comm = json!({"msg_type": "comm_open", "content": {"comm_id": "c", "target_name": "t", "data": {}}});
    let key = json!({"name": "made", "scopes": ["read"], "tenant": "three"});
    let unknown = json!({"template": "there-is-none", "code": "1"});
    vec![
        ("GET", "/v1/templates", Offer, none.clone()),
        ("GET", "/v1/pools", Offer, none.clone()),
        ("GET", "/v1/usage", Offer, none.clone()),
        ("GET", "/v1/workspaces", List, none.clone()),
        ("GET", "/v1/workspaces/{name}", Look, none.clone()),
        ("GET", "/v1/sessions", List, none.clone()),
        ("POST", "/v1/sessions", Make, json!({"template": "there-is-none"})),
        ("POST", "/v1/runs", Make, unknown),
        ("GET", "/v1/sessions/{id}", Look, none.clone()),
        ("PATCH", "/v1/sessions/{id}", Change, json!({"labels": {"of": "one"}})),
        ("GET", "/v1/sessions/{id}/wait", Look, none.clone()),
        ("POST", "/v1/sessions/{id}/keepalive", Change, none.clone()),
        ("POST", "/v1/sessions/{id}/pause", Change, none.clone()),
        ("POST", "/v1/sessions/{id}/resume", Change, none.clone()),
        ("POST", "/v1/sessions/{id}/interrupt", Change, none.clone()),
        ("GET", "/v1/sessions/{id}/contexts", Look, none.clone()),
        ("POST", "/v1/sessions/{id}/contexts", Change, json!({})),
        ("POST", "/v1/sessions/{id}/contexts/{context}/complete", Change, code.clone()),
        ("POST", "/v1/sessions/{id}/contexts/{context}/inspect", Change, code.clone()),
        ("POST", "/v1/sessions/{id}/contexts/{context}/is_complete", Change, code.clone()),
        ("POST", "/v1/sessions/{id}/contexts/{context}/comms", Change, comm),
        ("POST", "/v1/sessions/{id}/contexts/{context}/interrupt", Change, none.clone()),
        ("POST", "/v1/sessions/{id}/contexts/{context}/restart", Change, none.clone()),
        ("POST", "/v1/sessions/{id}/executions", Change, code),
        ("GET", "/v1/executions/{id}", Look, none.clone()),
        ("GET", "/v1/executions/{id}/events", Look, none.clone()),
        ("GET", "/v1/executions/{id}/blobs/{number}", Look, none.clone()),
        ("POST", "/v1/executions/{id}/cancel", Change, none.clone()),
        ("POST", "/v1/executions/{id}/input", Change, json!({"text": "x"})),
        ("POST", "/v1/sessions/{id}/commands", Change, json!({"argv": ["true"]})),
        ("GET", "/v1/sessions/{id}/commands", Look, none.clone()),
        ("POST", "/v1/sessions/{id}/packages", Change, json!({"packages": ["x"]})),
        ("GET", "/v1/sessions/{id}/packages", Look, none.clone()),
        ("GET", "/v1/sessions/{id}/commands/{command}", Look, none.clone()),
        ("POST", "/v1/sessions/{id}/commands/{command}/stdin", Change, json!({"data": "x"})),
        ("POST", "/v1/sessions/{id}/commands/{command}/signal", Change, json!({"signal": "SIGCONT"})),
        ("POST", "/v1/sessions/{id}/commands/{command}/resize", Change, json!({"cols": 80, "rows": 24})),
        ("DELETE", "/v1/sessions/{id}/commands/{command}", Change, none.clone()),
        ("GET", "/v1/sessions/{id}/commands/{command}/events", Look, none.clone()),
        ("GET", "/v1/sessions/{id}/terminal", Change, none.clone()),
        ("POST", "/v1/sessions/{id}/restart", Change, none.clone()),
        ("GET", "/v1/sessions/{id}/metrics", Look, none.clone()),
        ("GET", "/v1/sessions/{id}/egress", Look, none.clone()),
        ("GET", "/v1/sessions/{id}/notebook", Look, none.clone()),
        ("GET", "/v1/sessions/{id}/ports/{port}/{path}", Change, none.clone()),
        ("POST", "/v1/sessions/{id}/files:mkdir", Change, json!({"path": "folder"})),
        ("PUT", "/v1/sessions/{id}/files/{path}", Change, json!("content")),
        ("POST", "/v1/sessions/{id}/files:move", Change, json!({"from": FILE, "to": FILE})),
        ("GET", "/v1/sessions/{id}/files", Look, none.clone()),
        ("HEAD", "/v1/sessions/{id}/files/{path}", Look, none.clone()),
        ("GET", "/v1/sessions/{id}/files/{path}", Look, none.clone()),
        ("GET", "/v1/sessions/{id}/archive", Look, none.clone()),
        ("PUT", "/v1/sessions/{id}/archive", Change, json!("no archive")),
        ("POST", "/v1/sessions/{id}/files", Change, json!("no form")),
        // Of a file it is refused, so that it ends.
        ("GET", "/v1/sessions/{id}/files:watch", Look, none.clone()),
        ("DELETE", "/v1/sessions/{id}/files/{path}", Change, none.clone()),
        ("DELETE", "/v1/sessions/{id}/contexts/{context}", Change, none.clone()),
        ("DELETE", "/v1/sessions/{id}/notebook", Change, none.clone()),
        ("DELETE", "/v1/sessions/{id}", Change, none.clone()),
        ("DELETE", "/v1/sessions", EndMany, none.clone()),
        ("DELETE", "/v1/workspaces/{name}", Change, none.clone()),
        ("POST", "/v1/keys", Operate, key),
        ("GET", "/v1/keys", Operate, none.clone()),
        ("DELETE", "/v1/keys/{id}", Operate, none.clone()),
        ("GET", "/v1/audit", Operate, none.clone()),
        ("GET", "/v1/admin/log", Operate, none.clone()),
        ("PUT", "/v1/admin/log", Operate, json!({"level": "warn"})),
        ("POST", "/v1/admin/reconcile", Operate, none.clone()),
        ("POST", "/v1/admin/reload", Operate, none.clone()),
        ("POST", "/v1/admin/drain", Drain, none),
    ]
}

/// Every route of the Jupyter door, in an order in which the owner can ask for all of them. `{kernel}` and `{session}` are of one session of the first tenant's,
/// `{another}` is another one.
fn jupyter_routes() -> Vec<(&'static str, &'static str, About, Value)> {
    use About::{Change, List, Look, Make, Offer};
    let (none, unknown) = (Value::Null, json!({"name": "there-is-none"}));
    let document = json!({"path": "x", "type": "notebook", "kernel": {"name": "there-is-none"}});
    vec![
        ("GET", "/api/me", Offer, none.clone()),
        ("GET", "/api/terminals", Offer, none.clone()),
        ("GET", "/api/kernelspecs", Offer, none.clone()),
        ("GET", "/api/kernelspecs/{name}", Offer, none.clone()),
        ("GET", "/kernelspecs/{name}/logo-svg.svg", Offer, none.clone()),
        ("GET", "/api/status", List, none.clone()),
        ("GET", "/api/kernels", List, none.clone()),
        ("GET", "/api/sessions", List, none.clone()),
        ("POST", "/api/kernels", Make, unknown),
        ("POST", "/api/sessions", Make, document),
        ("GET", "/api/kernels/{kernel}", Look, none.clone()),
        ("GET", "/api/kernels/{kernel}/channels", Change, none.clone()),
        ("POST", "/api/kernels/{kernel}/interrupt", Change, none.clone()),
        ("POST", "/api/kernels/{kernel}/restart", Change, none.clone()),
        ("GET", "/api/sessions/{session}", Look, none.clone()),
        ("PATCH", "/api/sessions/{session}", Change, json!({"name": "renamed"})),
        ("GET", "/api/contents", List, none.clone()),
        ("GET", "/api/contents/{kernel}", Look, none.clone()),
        ("PUT", "/api/contents/{kernel}/a.txt", Change, json!({"type": "file", "format": "text", "content": "x"})),
        ("GET", "/api/contents/{kernel}/a.txt", Look, none.clone()),
        ("POST", "/api/contents/{kernel}", Change, json!({"copy_from": "{kernel}/a.txt"})),
        ("PATCH", "/api/contents/{kernel}/a.txt", Change, json!({"path": "{kernel}/b.txt"})),
        ("DELETE", "/api/contents/{kernel}/b.txt", Change, none.clone()),
        ("DELETE", "/api/sessions/{session}", Change, none.clone()),
        ("DELETE", "/api/kernels/{another}", Change, none),
    ]
}

/// Asks for all of the Jupyter door's routes with every kind of key. What the owner has made is gone afterwards.
async fn jupyter_door(server: &Arc<Server>, callers: &[(Who, Option<String>)], owner: &str) {
    let make = async |path: &str, body: Value| {
        let made = server.send(server.bare(Method::POST, path).bearer_auth(owner).json(&body)).await;
        assert_eq!(made.status, 201, "{}", made.text);
        made.json
    };
    let document = make("/api/sessions", json!({"path": "p", "type": "notebook", "kernel": {"name": "python"}})).await;
    let (session, kernel) = (text(&document["id"]), text(&document["kernel"]["id"]));
    let another = text(&make("/api/kernels", json!({"name": "python"})).await["id"]);
    let file = server.bare(Method::PUT, &format!("/api/contents/{kernel}/a.txt")).bearer_auth(owner);
    let file = file.json(&json!({"type": "file", "format": "text", "content": "x"}));
    assert_eq!(server.send(file).await.status, 201);
    for (who, key) in callers {
        for (at, (method, route, about, body)) in jupyter_routes().into_iter().enumerate() {
            // In all the places where it is, one after the other.
            let base = ["", "/jupyter"][at % 2];
            let path = route.replace("{kernel}", &kernel).replace("{session}", &session).replace("{another}", &another);
            let path = path.replace("{name}", if *who == Who::Limited { "data" } else { "python" });
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            let request = with(server.bare(method, &format!("{base}{path}")), key.as_deref());
            let body = body.to_string().replace("{kernel}", &kernel);
            let reply = server.send(if body == "null" { request } else { request.body(body) }).await;
            let what = format!("{who:?}: {route}: {} {}", reply.status, reply.text);
            let allowed: &[u16] = match (expected(*who, about), about) {
                (Answer::Refused(401), _) => &[403],
                // What is not there is said before what is not allowed.
                (Answer::Refused(403), About::Change) => &[403, 404],
                (Answer::Refused(422) | Answer::Granted, About::Make) => &[404, 501],
                (Answer::Refused(403), _) => &[403],
                (Answer::Refused(404), _) => &[404],
                (Answer::Refused(_), _) => &[],
                (Answer::Nothing, _) => &[200],
                // A connection is asked for otherwise.
                (Answer::Granted, _) if route.ends_with("/channels") => &[400],
                (Answer::Granted, _) => &[200, 201, 204],
            };
            assert!(allowed.contains(&reply.status), "{what}");
            let may_hear = matches!(expected(*who, about), Answer::Granted | Answer::Refused(422));
            let is_told = [&session, &kernel, &another].iter().any(|id| reply.text.contains(id.as_str()));
            // Who names a thing may be told that there is none of that name.
            assert!(may_hear || !is_told || reply.status == 404, "{what}");
        }
    }
}

/// Every route of the classic door, about the user `same` of the first tenant, in an order in which the owner can ask for all of them.
fn classic_routes() -> Vec<(&'static str, &'static str, About)> {
    use About::{Change, Look};
    vec![
        ("POST", "/execute", Change),
        ("POST", "/install_package", Change),
        ("POST", "/reset", Change),
        ("POST", "/upload_file", Change),
        ("GET", "/notebook/same", Look),
        ("GET", "/notebook/same/notebook_same.ipynb", Look),
        ("POST", "/end_session", Change),
    ]
}

/// Asks for all of the classic door's routes with every kind of key.
async fn classic_door(server: &Arc<Server>, callers: &[(Who, Option<String>)]) {
    let form = [("user_id", "same")];
    let json = json!({"user_id": "same", "code": "1", "package_name": "x"});
    let parts = "--b\r\nContent-Disposition: form-data; name=\"user_id\"\r\n\r\nsame\r\n\
        --b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\nx\r\n--b--\r\n";
    let owner = callers.iter().find(|(who, _)| *who == Who::Owner).and_then(|(_, key)| key.as_deref());
    let start = |key: Option<&str>| server.send(with(server.bare(Method::POST, "/start_session"), key).form(&form));
    assert_eq!(start(owner).await.status, 200);
    for (who, key) in callers {
        match who {
            Who::Owner | Who::Other => {}
            Who::Limited => assert_eq!(start(key.as_deref()).await.status, 400, "its key allows another template"),
            Who::Nobody | Who::Expired | Who::Revoked => assert_eq!(start(key.as_deref()).await.status, 401, "{who:?}"),
            Who::Reader | Who::OtherReader | Who::Operator => {
                assert_eq!(start(key.as_deref()).await.status, 403, "{who:?}");
            }
        }
        for (method, path, about) in classic_routes() {
            let request = with(server.bare(Method::from_bytes(method.as_bytes()).unwrap(), path), key.as_deref());
            let reply = server.send(match path {
                "/execute" | "/install_package" => request.json(&json),
                "/upload_file" => request.header("content-type", "multipart/form-data; boundary=b").body(parts),
                "/reset" | "/end_session" => request.form(&form),
                _ => request,
            });
            let reply = reply.await;
            let what = format!("{who:?}: {path}: {} {}", reply.status, reply.text);
            match expected(*who, about) {
                // The template has no packages to install.
                Answer::Granted if path == "/install_package" => assert_eq!(reply.status, 403, "{what}"),
                Answer::Granted | Answer::Nothing => assert_eq!(reply.status, 200, "{what}"),
                Answer::Refused(status) => {
                    assert_eq!(reply.status, status, "{what}");
                    let detail = text(&reply.json["detail"]);
                    assert!(!detail.is_empty() && !detail.contains("ses0"), "{what}");
                }
            }
        }
    }
}

/// Who asks. The first tenant has everything that paths name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    /// The first tenant, with a key that may do all with its own.
    Owner,
    /// The first tenant, with a key that may only look.
    Reader,
    /// The first tenant, with a key for other templates.
    Limited,
    /// The first tenant, with a key for commands of operators only.
    Operator,
    /// The second tenant.
    Other,
    /// The second tenant, with a key that may only look.
    OtherReader,
    /// Without a key.
    Nobody,
    /// With a key that is over.
    Expired,
    /// With a key that was revoked.
    Revoked,
}

/// What is expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// It is done, or refused for another reason than who asks.
    Granted,
    /// Nothing of the first tenant's is in it.
    Nothing,
    /// A problem.
    Refused(u16),
}

fn expected(who: Who, about: About) -> Answer {
    use About::{Change, Drain, EndMany, List, Look, Make, Offer, Operate};
    use Answer::{Granted, Nothing, Refused};
    match (who, about) {
        (Who::Nobody | Who::Expired | Who::Revoked, _) => Refused(401),
        (Who::Operator, Operate | Drain | Offer) => Granted,
        (Who::Operator, _) | (_, Operate | Drain) => Refused(403),
        (_, Offer) => Nothing,
        (Who::Owner, _) | (Who::Reader, Look | List) => Granted,
        (Who::Reader | Who::OtherReader, Change | EndMany | Make) => Refused(403),
        (Who::Other | Who::OtherReader | Who::Limited, Look | Change) => Refused(404),
        (Who::Other | Who::OtherReader | Who::Limited, List | EndMany) => Nothing,
        (Who::Other | Who::Limited, Make) => Refused(422),
    }
}

/// Every tool of the MCP door, with arguments about the first tenant's things.
fn tools(things: &Things) -> Vec<(&'static str, About, Value)> {
    use About::{Change, List, Look, Make};
    let id = &things.cell.id;
    vec![
        ("run_code", Change, json!({"session_id": id, "code": "1"})),
        ("run_command", Change, json!({"session_id": id, "command": "true"})),
        ("create_session", Make, json!({"template": "there-is-none"})),
        ("list_sessions", List, json!({})),
        ("read_file", Look, json!({"session_id": id, "path": FILE})),
        ("write_file", Change, json!({"session_id": id, "path": FILE, "content": "x"})),
        ("close_session", Change, json!({"session_id": id})),
    ]
}

/// Asks for every tool as everybody who may not change the first tenant's things.
async fn tools_answer_as_routes_do(server: &Server, things: &Things, callers: &[(Who, Option<String>)]) {
    let accepted = "application/json, text/event-stream";
    let ask = async |key: Option<&str>, method: &str, params: Value| {
        let message = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        server.send(with(server.bare(Method::POST, "/mcp"), key).header("accept", accepted).json(&message)).await
    };
    let owner = callers.iter().find(|(who, _)| *who == Who::Owner).and_then(|(_, key)| key.as_deref());
    let listed = ask(owner, "tools/list", json!({})).await.json;
    let listed: BTreeSet<_> = listed["result"]["tools"].as_array().unwrap().iter().map(|t| text(&t["name"])).collect();
    assert_eq!(listed, tools(things).iter().map(|(name, ..)| (*name).to_owned()).collect(), "each tool has its row");
    for (who, key) in callers.iter().filter(|(who, _)| *who != Who::Owner) {
        for (tool, about, arguments) in tools(things) {
            let reply = ask(key.as_deref(), "tools/call", json!({"name": tool, "arguments": arguments})).await;
            let what = format!("{who:?}: {tool}: {} {}", reply.status, reply.text);
            let (is_error, told) = (&reply.json["result"]["isError"], &reply.json["result"]["content"][0]["text"]);
            let code = match expected(*who, about) {
                Answer::Refused(401) => {
                    assert_eq!(reply.status, 401, "{what}");
                    continue;
                }
                Answer::Granted | Answer::Nothing => {
                    assert_eq!(is_error, false, "{what}");
                    assert!(expected(*who, about) == Answer::Granted || !things.is_told_of_in(&reply.text), "{what}");
                    continue;
                }
                Answer::Refused(403) => "(forbidden)",
                Answer::Refused(404) => "(not-found)",
                Answer::Refused(status) => {
                    assert_eq!(status, 422, "{what}");
                    "(spec-rejected)"
                }
            };
            assert!(is_error == true && text(told).contains(code), "{what}");
        }
    }
}

/// What the first tenant has, and a key for operators to revoke.
struct Things {
    cell: Cell,
    context: String,
    execution: String,
    command: String,
    blob: String,
    spare_key: String,
}

impl Things {
    async fn new(server: &Arc<Server>, owner: &str) -> Self {
        let as_owner = |method, path: &str| server.bare(method, path).bearer_auth(owner);
        let body = json!({"template": "python", "name": "mine", "workspace": WORKSPACE, "labels": {"of": "one"}});
        let made = server.send(as_owner(Method::POST, "/v1/sessions").json(&body)).await;
        assert_eq!(made.status, 201, "{}", made.text);
        let cell = Cell { server: Arc::clone(server), id: text(&made.json["id"]), view: made.json };
        let context = server.send(as_owner(Method::POST, &cell.path("/contexts")).json(&json!({}))).await;
        // One that has ended, so that its events do.
        let command =
            server.send(as_owner(Method::POST, &cell.path("/commands")).json(&json!({"argv": ["true"]}))).await;
        let run = json!({"code": "'x' * 5000"});
        let file = server.send(as_owner(Method::PUT, &cell.path(&format!("/files/{FILE}"))).body("x")).await;
        assert_eq!(file.status, 201, "{}", file.text);
        let execution = server.send(as_owner(Method::POST, &cell.path("/executions")).json(&run)).await.json;
        let blob = text(&execution["results"][0]["data"]["text/plain"]["$ref"]);
        Self {
            context: text(&context.json["id"]),
            blob: blob.rsplit('/').next().expect("a number").to_owned(),
            execution: text(&execution["id"]),
            command: text(&command.json["id"]),
            spare_key: text(&new_key(server, json!({"name": "spare", "scopes": ["read"]})).await["id"]),
            cell,
        }
    }

    /// The path with what it names. One that names what is not known here is a mistake of this test.
    fn path(&self, route: &str) -> String {
        let id = match route.split('/').nth(2) {
            Some("sessions") => &self.cell.id,
            Some("executions") => &self.execution,
            Some("keys") => &self.spare_key,
            _ => "{id}",
        };
        let path = route.replace("{id}", id).replace("{context}", &self.context).replace("{number}", &self.blob);
        let path = path
            .replace("{port}", "8000")
            .replace("{name}", WORKSPACE)
            .replace("{path}", FILE)
            .replace("{command}", &self.command);
        assert!(!path.contains('{'), "{route} names something that this test has not got");
        path
    }

    fn is_told_of_in(&self, text: &str) -> bool {
        let ids = [&self.cell.id, &self.context, &self.execution, &self.command];
        ids.iter().any(|id| text.contains(id.as_str())) || text.contains(WORKSPACE)
    }
}

async fn new_key(server: &Server, body: Value) -> Value {
    let made = server.post("/v1/keys", &body).await;
    assert_eq!(made.status, 201, "{body}: {}", made.text);
    assert_eq!(made.header("location"), format!("/v1/keys/{}", text(&made.json["id"])));
    made.json
}

fn with(request: RequestBuilder, key: Option<&str>) -> RequestBuilder {
    match key {
        Some(key) => request.bearer_auth(key),
        None => request,
    }
}

async fn each_route_has_its_row(server: &Server) {
    let document = server.send(server.bare(Method::GET, "/openapi.json")).await.json;
    let paths = document["paths"].as_object().expect("paths").iter();
    let methods = paths.flat_map(|(path, methods)| {
        let methods = methods.as_object().expect("methods").keys().filter(|name| *name != "parameters");
        methods.map(move |method| (method.to_uppercase(), path.clone()))
    });
    let documented: BTreeSet<(String, String)> = methods.collect();
    let known = routes().iter().map(|(method, path, ..)| ((*method).to_owned(), (*path).to_owned())).collect();
    assert_eq!(documented, known, "each route of the document has its row in this test");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_route_of_the_document_answers_each_kind_of_key_as_it_should() {
    let over = keys::generate().unwrap();
    let hash = keys::hash(&over).unwrap();
    let server = Server::start(&format!(
        "[templates.python]\nports = [\"8000\"]\nworkspace = {{ kind = \"volume\", accept_unenforced = true }}\n[doors.classic]\nenabled = true\ntemplate = \"python\"\n[auth]\nfailures = 1000\n[executions]\ninline = \"1KiB\"\n[[keys]]\nname = \"over\"\ntenant = \"one\"\nscopes = [\"sessions\", \"admin\"]\n\
         hash = \"{hash}\"\nexpires_at = \"2020-01-01T00:00:00Z\"\n"
    ))
    .await;
    let key = async |tenant: &str, scopes: &[&str], templates: Option<&str>| {
        let mut body = json!({"name": "k", "tenant": tenant, "scopes": scopes});
        if let Some(template) = templates {
            body["templates"] = json!([template]);
        }
        let made = new_key(&server, body).await;
        (text(&made["key"]), text(&made["id"]))
    };
    let revoked = key("one", &["sessions", "admin"], None).await;
    let callers = [
        (Who::Nobody, None),
        (Who::Expired, Some(over)),
        (Who::Revoked, Some(revoked.0.clone())),
        (Who::Other, Some(key("two", &["sessions"], None).await.0)),
        (Who::OtherReader, Some(key("two", &["read"], None).await.0)),
        (Who::Limited, Some(key("one", &["sessions"], Some("data")).await.0)),
        (Who::Reader, Some(key("one", &["read"], None).await.0)),
        (Who::Operator, Some(key("one", &["admin"], None).await.0)),
        (Who::Owner, Some(key("one", &["sessions"], None).await.0)),
    ];
    let owner = callers[8].1.clone().expect("a key");
    let list = |key: &str| server.send(server.bare(Method::GET, "/v1/sessions").bearer_auth(key));
    assert_eq!(list(&revoked.0).await.status, 200, "it is one until it is revoked");
    assert_eq!(server.delete(&format!("/v1/keys/{}", revoked.1)).await.status, 204);

    each_route_has_its_row(&server).await;
    jupyter_door(&server, &callers, &owner).await;
    classic_door(&server, &callers).await;
    let things = Things::new(&server, &owner).await;
    tools_answer_as_routes_do(&server, &things, &callers).await;
    let mut asked = 0;
    for (who, key) in &callers {
        for (method, route, about, body) in routes() {
            if about == About::Drain && *who == Who::Operator {
                continue;
            }
            let query = match about {
                About::EndMany => "?label=of:one",
                _ if route.ends_with("files:watch") => "?path=file.txt",
                _ => "",
            };
            let path = format!("{}{query}", things.path(route));
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            let request = with(server.bare(method.clone(), &path), key.as_deref());
            let reply = server.send(if body.is_null() { request } else { request.json(&body) }).await;
            asked += 1;
            let what = format!("{who:?}: {method} {route}: {} {}", reply.status, reply.text);
            match expected(*who, about) {
                Answer::Granted => assert!(![401, 403, 404, 405].contains(&reply.status), "{what}"),
                Answer::Nothing => assert_eq!(reply.status, 200, "{what}"),
                Answer::Refused(status) => {
                    assert_eq!(reply.status, status, "{what}");
                    if method != Method::HEAD {
                        reply.is_a_problem();
                    }
                }
            }
            let may_hear = matches!(expected(*who, about), Answer::Granted);
            assert!(may_hear || !things.is_told_of_in(&reply.text), "{what}");
        }
        if *who == Who::Operator {
            // All before has changed nothing: the owner is next.
            untouched(&server, &things, &owner).await;
        }
    }
    assert_eq!(asked, callers.len() * routes().len() - 1);

    let limited = callers[5].1.as_deref().expect("a key");
    a_name_of_another_templates_session_is_not_given_away(&server, &owner, limited).await;

    let operator = callers[7].1.as_deref().expect("a key");
    let drained = server.send(server.bare(Method::POST, "/v1/admin/drain").bearer_auth(operator)).await;
    assert_eq!(drained.status, 202, "{}", drained.text);
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

/// A name is a tenant's own, and who has it is not told to a key that may not see that session.
async fn a_name_of_another_templates_session_is_not_given_away(server: &Server, owner: &str, limited: &str) {
    let named = json!({"template": "data", "name": "mine", "if_exists": "reuse"});
    let body = json!({"template": "python", "name": "mine"});
    let again = server.send(server.bare(Method::POST, "/v1/sessions").bearer_auth(owner).json(&body)).await;
    assert_eq!(again.status, 201, "{}", again.text);
    let limited = server.bare(Method::POST, "/v1/sessions").bearer_auth(limited);
    let refused = server.send(limited.json(&named)).await;
    refused.problem(409, "name-in-use");
    assert!(!refused.text.contains(&text(&again.json["id"])), "{}", refused.text);
}

/// What the first tenant has is as it was made.
async fn untouched(server: &Server, things: &Things, owner: &str) {
    let look = async |path: &str| {
        let reply = server.send(server.bare(Method::GET, path).bearer_auth(owner)).await;
        assert_eq!(reply.status, 200, "{path}: {}", reply.text);
        reply.json
    };
    let session = look(&things.cell.path("")).await;
    assert_eq!((&session["state"], &session["labels"]), (&json!("ready"), &json!({"of": "one"})), "{session}");
    let contexts = look(&things.cell.path("/contexts")).await;
    assert_eq!(contexts["contexts"].as_array().map(Vec::len), Some(2), "{contexts}");
    assert_eq!(look(&format!("/v1/executions/{}", things.execution)).await["status"], "ok");
    let cells = look(&things.cell.path("/notebook")).await;
    assert_eq!(cells["cells"].as_array().map(Vec::len), Some(1), "nobody else's code has run: {cells}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_shown_once_outlive_the_server_and_end_at_once() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (secret, path) = (keys::generate().unwrap(), folder.path().join("key"));
    std::fs::write(&path, &secret).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let server = Server::start(&format!(
        "[auth]\nfailures = 5\nfailure_window = \"1h\"\n[[keys]]\nname = \"of-a-file\"\ntenant = \"three\"\nscopes = [\"read\"]\nfile = {path:?}\n"
    ))
    .await;
    let asks = async |server: &Server, key: &str| {
        server.send(server.bare(Method::GET, "/v1/sessions").bearer_auth(key)).await.status
    };
    assert_eq!(asks(&server, &secret).await, 200);

    let stays =
        new_key(&server, json!({"name": "stays", "tenant": "two", "scopes": ["read", "sessions", "read"]})).await;
    let goes = new_key(
        &server,
        json!({"name": "goes", "scopes": ["admin"], "templates": ["data"], "expires_in_seconds": 3600}),
    )
    .await;
    assert_eq!((&stays["scopes"], &stays["tenant"]), (&json!(["sessions", "read"]), &json!("two")));
    assert_eq!((&goes["tenant"], &goes["templates"]), (&json!("default"), &json!(["data"])));
    assert!(text(&stays["key"]).starts_with("cb_") && stays["expires_at"].is_null() && goes["expires_at"].is_string());
    let listed = server.get("/v1/keys").await;
    for key in [&stays, &goes] {
        assert!(!listed.text.contains(&text(&key["key"])), "it is shown once");
        assert!(listed.text.contains(&text(&key["id"])), "{}", listed.text);
    }
    let sources = |name: &str| {
        let keys = listed.json["keys"].as_array().expect("keys").iter();
        keys.filter(|key| key["name"] == name).map(|key| text(&key["source"])).collect::<Vec<_>>()
    };
    assert_eq!(
        [sources("stays"), sources("of-a-file"), sources("api-key-file")].concat(),
        ["database", "configuration", "configuration"]
    );
    let page = server.get("/v1/keys?limit=1").await.json;
    let rest = server.get(&format!("/v1/keys?cursor={}", text(&page["next_cursor"]))).await.json;
    assert_eq!(rest["keys"].as_array().map(Vec::len), Some(3), "{rest}");
    assert_eq!(server.get("/v1/keys?tenant=two").await.json["keys"].as_array().map(Vec::len), Some(1));

    let configured = listed.json["keys"].as_array().unwrap().iter().find(|key| key["name"] == "of-a-file").unwrap();
    let refused = server.delete(&format!("/v1/keys/{}", text(&configured["id"]))).await;
    assert!(text(&refused.problem(409, "state-conflict")["detail"]).contains("of-a-file"));
    assert_eq!(asks(&server, &secret).await, 200);
    let wrong =
        json!({"name": "a b", "tenant": "", "scopes": ["root"], "templates": ["none"], "expires_in_seconds": 0});
    let refused = server.post("/v1/keys", &wrong).await;
    refused.problem(422, "spec-rejected");
    assert_eq!(refused.pointers(), ["/expires_in_seconds", "/name", "/scopes/0", "/templates/0", "/tenant"]);

    let gone = text(&goes["key"]);
    assert_eq!(asks(&server, &gone).await, 403, "it is a key, of another scope");
    assert_eq!(server.delete(&format!("/v1/keys/{}", text(&goes["id"]))).await.status, 204);
    assert_eq!(asks(&server, &gone).await, 401);
    server.delete(&format!("/v1/keys/{}", text(&goes["id"]))).await.problem(404, "not-found");

    let next = server.start_again(|_| {}).await;
    assert_eq!(asks(&next, &text(&stays["key"])).await, 200, "it outlives the server");
    for _ in 0..5 {
        assert_eq!(asks(&next, &gone).await, 401, "and so does its end");
    }
    let refused = next.send(next.bare(Method::GET, "/v1/sessions").bearer_auth(&gone)).await;
    refused.problem(429, "rate-limited");
    let seconds: u64 = refused.header("retry-after").parse().unwrap();
    assert!((1..=3601).contains(&seconds), "{seconds}");
    next.send(next.bare(Method::GET, "/v1/sessions")).await.problem(401, "unauthenticated");
    assert_eq!(asks(&next, &text(&stays["key"])).await, 200, "a valid one is taken from the same address");

    commands(&next).await;
    next.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

async fn commands(server: &Arc<Server>) {
    let run = async |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
        command.args(arguments).env("CELLBLOCK_URL", &server.url).env("CELLBLOCK_API_KEY", &server.key);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let key = run(&["keys", "create", "by-command", "--tenant", "four", "--scope", "read", "--expires", "1h"]).await;
    let asks = async || server.send(server.bare(Method::GET, "/v1/sessions").bearer_auth(key.trim())).await.status;
    assert_eq!(asks().await, 200);
    let listed = run(&["keys", "list", "--tenant", "four"]).await;
    assert!(listed.contains("by-command") && !listed.contains(key.trim()), "{listed}");
    let id = listed.split_whitespace().find(|word| word.starts_with("key0")).expect("an id").to_owned();
    assert_eq!(run(&["keys", "revoke", &id]).await.trim(), id);
    assert_eq!(asks().await, 429, "too many have failed before, and this one is none any more");
}
