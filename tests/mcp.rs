//! The door for the Model Context Protocol: a scripted client of each era against a real server and real containers, and what such a client may not do.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use reqwest::header::HeaderMap;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use server::{NEVER, Server, text};

/// A picture of one point.
const PICTURE: &str =
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Era {
    /// With `initialize` and a session of the protocol's own.
    Old,
    /// Each request by itself.
    New,
}

/// A client.
struct Client {
    server: Arc<Server>,
    era: Era,
    key: String,
    session: Option<String>,
    id: AtomicU64,
}

/// What comes of a request.
#[derive(Debug)]
struct Heard {
    status: u16,
    headers: HeaderMap,
    /// All messages, the answer last.
    messages: Vec<Value>,
    body: String,
}

impl Heard {
    async fn of(request: RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = response.text().await.unwrap();
        let data = body.lines().filter_map(|line| line.strip_prefix("data:"));
        let messages = match serde_json::from_str(&body) {
            Ok(message) => vec![message],
            Err(_) => data.filter_map(|data| serde_json::from_str(data).ok()).collect(),
        };
        Self { status, headers, messages, body }
    }

    #[track_caller]
    fn result(&self) -> &Value {
        let last = self.messages.last().unwrap_or_else(|| panic!("no message: {} {}", self.status, self.body));
        assert!(last["result"].is_object(), "{last}");
        &last["result"]
    }

    #[track_caller]
    fn error(&self) -> &Value {
        let last = self.messages.last().unwrap_or_else(|| panic!("no message: {} {}", self.status, self.body));
        assert!(last["error"].is_object(), "{last}");
        &last["error"]
    }
}

impl Client {
    async fn greet(server: &Arc<Server>, era: Era, key: &str) -> Self {
        let (server, key, id) = (Arc::clone(server), key.to_owned(), AtomicU64::new(1));
        let mut client = Self { server, era, key, session: None, id };
        let heard = match era {
            Era::Old => {
                let params = json!({"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}});
                client.ask("initialize", params).await
            }
            Era::New => client.ask("server/discover", json!({})).await,
        };
        let result = heard.result().clone();
        match era {
            Era::Old => {
                client.session = Some(heard.headers["mcp-session-id"].to_str().unwrap().to_owned());
                assert_eq!(result["protocolVersion"], "2025-11-25");
                let told = client.request(&json!({"jsonrpc": "2.0", "method": "notifications/initialized"}));
                assert_eq!(told.send().await.unwrap().status(), 202);
            }
            Era::New => {
                assert!(heard.headers.get("mcp-session-id").is_none());
                assert_eq!(result["resultType"], "complete");
                assert!(result["supportedVersions"].as_array().unwrap().contains(&json!("2026-07-28")), "{result}");
            }
        }
        assert!(result["capabilities"]["tools"].is_object() && result["capabilities"]["resources"].is_object());
        assert_eq!(text(&result["instructions"]).lines().count(), 6);
        let said = result.to_string();
        assert!(
            said.contains("\"cellblock\"") && !said.contains("rmcp") && !said.contains(env!("CARGO_PKG_VERSION")),
            "{said}"
        );
        client
    }

    /// A message with the headers of the era.
    fn request(&self, message: &Value) -> RequestBuilder {
        let request = self.server.bare(Method::POST, "/mcp").bearer_auth(&self.key);
        let mut request = request.header("accept", "application/json, text/event-stream").json(message);
        let params = &message["params"];
        match self.era {
            Era::Old => {
                if let Some(session) = &self.session {
                    request = request.header("mcp-session-id", session).header("mcp-protocol-version", "2025-11-25");
                }
            }
            Era::New => {
                request =
                    request.header("mcp-protocol-version", "2026-07-28").header("mcp-method", text(&message["method"]));
                for name in [&params["name"], &params["uri"], &params["taskId"]] {
                    if let Some(name) = name.as_str() {
                        request = request.header("mcp-name", name);
                    }
                }
                if let Some(id) = params["arguments"]["session_id"].as_str() {
                    request = request.header("mcp-param-session-id", id);
                }
            }
        }
        request
    }

    fn message(&self, method: &str, mut params: Value) -> Value {
        if self.era == Era::New {
            params["_meta"]["io.modelcontextprotocol/protocolVersion"] = json!("2026-07-28");
            params["_meta"]["io.modelcontextprotocol/clientCapabilities"] = json!({});
            params["_meta"]["io.modelcontextprotocol/clientInfo"] = json!({"name": "t", "version": "1"});
        }
        json!({"jsonrpc": "2.0", "id": self.id.fetch_add(1, Ordering::Relaxed), "method": method, "params": params})
    }

    async fn ask(&self, method: &str, params: Value) -> Heard {
        Heard::of(self.request(&self.message(method, params))).await
    }

    async fn call(&self, tool: &str, arguments: Value) -> Value {
        let heard = self.ask("tools/call", json!({"name": tool, "arguments": arguments})).await;
        assert_eq!(heard.status, 200, "{}", heard.body);
        heard.result().clone()
    }

    async fn read(&self, uri: &str) -> Heard {
        self.ask("resources/read", json!({"uri": uri})).await
    }
}

fn said(result: &Value) -> String {
    let blocks = result["content"].as_array().unwrap().iter();
    blocks.filter(|block| block["type"] == "text").map(|block| text(&block["text"])).collect::<Vec<_>>().join("\n")
}

fn links(result: &Value) -> Vec<&Value> {
    result["content"].as_array().unwrap().iter().filter(|block| block["type"] == "resource_link").collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_each_era_works_in_sessions() {
    let server = Server::start("").await;
    let key = server.key.clone();
    for era in [Era::Old, Era::New] {
        let client = Client::greet(&server, era, &key).await;
        tools_are_listed(&client).await;
        let session = variables_stay(&client).await;
        output_is_shown(&client, &session).await;
        a_long_execution_is_read_in_parts(&client, &session).await;
        files_go_both_ways(&client, &session).await;
        ends_are_told(&client, &session).await;
        progress_is_told(&client, &session).await;
        a_call_is_taken_back(&client, &session).await;
        mistakes_are_for_the_model(&client, &session).await;
        let closed = client.call("close_session", json!({"session_id": session})).await;
        assert_eq!(closed["structuredContent"]["state"], "ended", "{closed}");
        let gone = client.call("run_code", json!({"code": "1", "session_id": session})).await;
        assert!(gone["isError"] == true && said(&gone).contains("session-ended"), "{gone}");
    }
    let audit = server.get("/v1/audit?limit=200").await;
    let event = |action: &str| audit.json["events"].as_array().unwrap().iter().find(|e| e["action"] == action).cloned();
    for action in ["create_execution", "create_session", "create_command", "write_file", "delete_session"] {
        let event = event(action).unwrap_or_else(|| panic!("{action}: {}", audit.text));
        assert!(event["target"] == "/mcp" && event["tenant"].is_string(), "{event}");
    }
    let refused = audit.json["events"].as_array().unwrap().iter().filter(|e| e["outcome"] == "session-ended").count();
    assert_eq!(refused, 2, "one in each era: {}", audit.text);
    assert!(event("create_execution").is_some_and(|event| event["session_id"].is_string()), "{}", audit.text);
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

async fn tools_are_listed(client: &Client) {
    let heard = client.ask("tools/list", json!({})).await;
    let tools = heard.result()["tools"].as_array().unwrap();
    let names: Vec<_> = tools.iter().map(|tool| text(&tool["name"])).collect();
    let expected =
        ["run_code", "run_command", "create_session", "list_sessions", "close_session", "read_file", "write_file"];
    assert_eq!(names, expected);
    let templates = client.ask("resources/templates/list", json!({})).await;
    let uris: Vec<_> =
        templates.result()["resourceTemplates"].as_array().unwrap().iter().map(|t| text(&t["uriTemplate"])).collect();
    assert_eq!(uris[..3], ["session://{id}/files/{+path}", "session://{id}/log", "execution://{id}"]);
}

/// Without a session one is made; an old client stays in it, and a new one names it.
async fn variables_stay(client: &Client) -> String {
    let first = client.call("run_code", json!({"code": "x = 41"})).await;
    assert_eq!((&first["isError"], &first["structuredContent"]["status"]), (&json!(false), &json!("ok")), "{first}");
    let session = text(&first["structuredContent"]["session_id"]);
    let again = match client.era {
        Era::Old => json!({"code": "x + 1"}),
        Era::New => json!({"code": "x + 1", "session_id": session}),
    };
    assert_eq!(said(&first).contains(&format!("Pass session_id \"{session}\"")), client.era == Era::New, "{first}");
    let second = client.call("run_code", again).await;
    assert_eq!(text(&second["structuredContent"]["session_id"]), session);
    assert!(said(&second).starts_with("42\n"), "{second}");
    if client.era == Era::New {
        let message = client
            .message("tools/call", json!({"name": "run_code", "arguments": {"code": "1", "session_id": session}}));
        let bare = client.server.bare(Method::POST, "/mcp").bearer_auth(&client.key).json(&message);
        let bare =
            bare.header("accept", "application/json, text/event-stream").header("mcp-protocol-version", "2026-07-28");
        let unrouted = bare.header("mcp-method", "tools/call").header("mcp-name", "run_code");
        let heard = Heard::of(unrouted.header("mcp-param-session-id", "ses-of-another")).await;
        assert_eq!(heard.status, 400, "a routing header that says something else: {}", heard.body);
        // A name brings clients together, whatever era they are of.
        let pinned = client.message("tools/call", json!({"name": "run_code", "arguments": {"code": "1"}}));
        let heard = Heard::of(client.request(&pinned).header("x-cellblock-session", &session)).await;
        assert_eq!(text(&heard.result()["structuredContent"]["session_id"]), session);
    }
    session
}

async fn output_is_shown(client: &Client, session: &str) {
    let run = async |code: &str| client.call("run_code", json!({"code": code, "session_id": session})).await;
    let long = run("print('y' * 50_000 + 'end')").await;
    let shown = said(&long);
    assert!(shown.chars().count() <= 8000 && shown.contains("left out") && shown.contains("yend\n"), "{}", shown.len());
    let link = text(&links(&long)[0]["uri"]);
    let whole = client.read(&link).await;
    let whole: Value = serde_json::from_str(&text(&whole.result()["contents"][0]["text"])).unwrap();
    assert_eq!(text(&whole["stdout"]).len(), 50_004);
    let picture = run(&format!(
        "import base64\nfrom IPython.display import Image, display\nfor n in range(10): display(Image(data=base64.b64decode('{PICTURE}')))"
    ))
    .await;
    let images: Vec<_> = picture["content"].as_array().unwrap().iter().filter(|b| b["type"] == "image").collect();
    assert_eq!((images.len(), &images[0]["mimeType"]), (8, &json!("image/png")), "{picture}");
    assert!(text(&images[0]["data"]).starts_with("iVBOR"));
    assert!(said(&picture).contains("2 pictures are not shown"), "{picture}");
    let told = picture["structuredContent"].to_string();
    assert!(!told.contains("iVBOR") && told.contains("omitted_bytes"), "{told}");
    let hostile = run(
        "from IPython.display import display\ndisplay({'image/png': 'no base64!', 'application/json': {}}, raw=True)",
    )
    .await;
    assert_eq!(hostile["isError"], false, "{hostile}");
    let log = client.read(&format!("session://{session}/log")).await;
    let log = text(&log.result()["contents"][0]["text"]);
    assert!(log.contains("x + 1") && log.contains("42"), "{log}");
    let listed = client.ask("resources/list", json!({})).await;
    assert!(listed.result().to_string().contains(session));
}

/// Of an execution that is too long for one resource, the short of it says where the parts are.
async fn a_long_execution_is_read_in_parts(client: &Client, session: &str) {
    let code = "from IPython.display import display\nprint('é' * 400_000 + 'end')\nfor n in range(5): display({'text/plain': 'y' * 900_000}, raw=True)";
    let ran = client.call("run_code", json!({"code": code, "session_id": session})).await;
    let link = text(&links(&ran)[0]["uri"]);
    let read = client.read(&link).await;
    let told: Value = serde_json::from_str(&text(&read.result()["contents"][0]["text"])).unwrap();
    assert!(told["bounded"]["bytes"].as_u64().unwrap() > 4 << 20, "{}", told["bounded"]);
    assert!(read.body.len() < 5 << 20 && told["results"].as_array().unwrap().len() == 5, "{}", read.body.len());
    assert_eq!(told["bounded"]["read"][0], format!("{link}/stdout?offset=0"));
    let part = client.read(&format!("{link}/stdout?offset=799_998").replace('_', "")).await;
    let contents = &part.result()["contents"][0];
    assert_eq!((&contents["text"], &contents["_meta"]["size"]), (&json!("éend\n"), &json!(800_004)), "{contents}");
}

async fn files_go_both_ways(client: &Client, session: &str) {
    let code = "open('out put.txt', 'w').write('zwölf')";
    let wrote = client.call("run_code", json!({"code": code, "session_id": session})).await;
    let uri = text(&links(&wrote)[0]["uri"]);
    assert_eq!(uri, format!("session://{session}/files/out%20put.txt"));
    assert_eq!((&links(&wrote)[0]["size"], &links(&wrote)[0]["mimeType"]), (&json!(6), &json!("text/plain")));
    assert_eq!(client.read(&uri).await.result()["contents"][0]["text"], "zwölf");
    let write = async |content: &str, append: bool, encoding: &str| {
        let arguments = json!({"session_id": session, "path": "in/data.txt", "content": content, "append": append, "encoding": encoding});
        client.call("write_file", arguments).await
    };
    assert_eq!(write("one\n", false, "utf-8").await["structuredContent"]["size"], 4);
    assert_eq!(write("dHdvCg==", true, "base64").await["structuredContent"]["size"], 8);
    let read = async |path: &str, offset: u64, limit: u64| {
        client.call("read_file", json!({"session_id": session, "path": path, "offset": offset, "limit": limit})).await
    };
    let part = read("in/data.txt", 4, 2).await;
    assert_eq!(
        (&part["content"][0]["text"], &part["structuredContent"]["next_offset"]),
        (&json!("tw"), &json!(6)),
        "{part}"
    );
    assert!(said(&read("in", 0, 100).await).contains("in/data.txt  8 bytes"));
    let command = json!({"command": "wc -l < in/data.txt; echo wrong >&2; exit 3", "session_id": session});
    let ran = client.call("run_command", command).await;
    assert_eq!((&ran["isError"], &ran["structuredContent"]["exit_code"]), (&json!(true), &json!(3)), "{ran}");
    assert!(said(&ran).starts_with("2\n[stderr]\nwrong\n[exit code 3"), "{ran}");
    for trick in ["../../../etc/passwd", "/etc/passwd", "in/../../x", "no-such-file"] {
        let refused = read(trick, 0, 100).await;
        assert_eq!(refused["isError"], true, "{trick}: {refused}");
        let error = client.read(&format!("session://{session}/files/{}", trick.replace("../", "%2e%2e%2f"))).await;
        assert!([-32002, -32602].contains(&error.error()["code"].as_i64().unwrap()), "{trick}: {}", error.body);
    }
}

async fn ends_are_told(client: &Client, session: &str) {
    let run = async |mut arguments: Value| {
        arguments["session_id"] = json!(session);
        client.call("run_code", arguments).await
    };
    let failed = run(json!({"code": "print('before'); 1/0"})).await;
    assert!(failed["isError"] == true && said(&failed).contains("ZeroDivisionError"), "{failed}");
    assert!(!said(&failed).contains('\u{1b}') && said(&failed).starts_with("before\n"), "{failed}");
    let late = run(json!({"code": "while True: pass", "timeout_seconds": 1})).await;
    assert_eq!((&late["isError"], &late["structuredContent"]["status"]), (&json!(true), &json!("timeout")), "{late}");
    let begun = run(json!({"code": "import time; time.sleep(0.5); 'done'", "background": true})).await;
    let id = text(&begun["structuredContent"]["id"]);
    client.server.ended(&id).await;
    assert!(client.read(&format!("execution://{id}")).await.body.contains("done"));
}

async fn progress_is_told(client: &Client, session: &str) {
    let code = "import time\nfor i in range(20): print('line', i, flush=True); time.sleep(0.1)";
    let began = Instant::now();
    let arguments = json!({"code": code, "session_id": session});
    let heard = client
        .ask("tools/call", json!({"name": "run_code", "arguments": arguments, "_meta": {"progressToken": "p"}}))
        .await;
    let took = began.elapsed().as_secs_f64();
    let told: Vec<_> =
        heard.messages.iter().filter(|m| m["method"] == "notifications/progress").map(|m| &m["params"]).collect();
    assert!(told.len() >= 3 && told.len() as f64 <= took * 4.0 + 1.0, "{} in {took} s", told.len());
    assert!(told.windows(2).all(|two| two[0]["progress"].as_f64() < two[1]["progress"].as_f64()), "{told:?}");
    assert!(told.iter().all(|p| p["progressToken"] == "p" && text(&p["message"]).starts_with("line ")), "{told:?}");
    assert_eq!(heard.result()["structuredContent"]["status"], "ok");
}

/// An old client says so; a new one hangs up.
async fn a_call_is_taken_back(client: &Client, session: &str) {
    let sleeps =
        json!({"name": "run_code", "arguments": {"code": "import time; time.sleep(90)", "session_id": session}});
    let message = client.message("tools/call", sleeps);
    let call = Heard::of(client.request(&message));
    let state = async || text(&client.server.get(&format!("/v1/sessions/{session}")).await.json["state"]);
    let began = Instant::now();
    match client.era {
        Era::Old => {
            let cancel = async {
                while state().await != "busy" {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                // The same id once more, while it is under way, has its own answer and changes nothing.
                let twice = Heard::of(client.request(&message)).await;
                assert_eq!((twice.status, &twice.error()["code"]), (400, &json!(-32600)), "{}", twice.body);
                assert_eq!(twice.messages[0]["id"], message["id"], "{}", twice.body);
                let params = json!({"requestId": message["id"], "reason": "enough"});
                let cancel = json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params});
                assert_eq!(client.request(&cancel).send().await.unwrap().status(), 202);
            };
            let (heard, ()) = tokio::join!(call, cancel);
            assert_eq!(heard.result()["structuredContent"]["status"], "cancelled", "{}", heard.body);
        }
        Era::New => {
            let busy = async {
                while state().await != "busy" {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::select! {
                heard = call => panic!("{}", heard.body),
                () = busy => {}
            }
        }
    }
    if client.era == Era::Old {
        // Once it has its answer, an id may be taken again, as often as one likes.
        let mut message = message;
        message["params"] = json!({"name": "list_sessions", "arguments": {}});
        for _ in 0..50 {
            assert_eq!(Heard::of(client.request(&message)).await.result()["isError"], false);
        }
    }
    while state().await != "ready" {
        assert!(began.elapsed() < NEVER, "it still runs");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let after = client.call("run_code", json!({"code": "x", "session_id": session})).await;
    assert!(said(&after).starts_with("41\n"), "variables survive: {after}");
}

async fn mistakes_are_for_the_model(client: &Client, session: &str) {
    for (tool, arguments, pointers) in [
        ("run_code", json!({}), vec!["/code"]),
        ("run_code", json!({"code": 1, "nonsense": true}), vec!["/code", "/nonsense"]),
        ("run_code", json!({"code": "1", "session_id": session, "timeout_seconds": -1}), vec!["/timeout_seconds"]),
        ("create_session", json!({"template": "there-is-none"}), vec!["/template"]),
        ("create_session", json!({"network": {"mode": "allowlist", "allow": ["example.org"]}}), vec!["/network/mode"]),
        ("create_session", json!({"network": ["x"], "packages": "polars"}), vec!["/network", "/packages"]),
        ("create_session", json!({"packages": ["polars"]}), vec!["/packages"]),
        ("read_file", json!({"session_id": session, "path": "x", "limit": 0}), vec!["/limit"]),
        (
            "write_file",
            json!({"session_id": session, "path": "x", "content": "?", "encoding": "base64"}),
            vec!["/content"],
        ),
    ] {
        let refused = client.call(tool, arguments).await;
        assert_eq!(refused["isError"], true, "{tool}: {refused}");
        assert!(pointers.iter().all(|pointer| said(&refused).contains(&format!("- {pointer}: "))), "{tool}: {refused}");
    }
    let unknown = client.ask("tools/call", json!({"name": "rm_rf", "arguments": {}})).await;
    assert_eq!(unknown.error()["code"], -32602, "{}", unknown.body);
    let unknown = client.ask("no/such/method", json!({})).await;
    assert_eq!(unknown.error()["code"], -32601, "{}", unknown.body);
    let made =
        client.call("create_session", json!({"env": {"WHO": "me"}, "name": format!("named-{:?}", client.era)})).await;
    let id = text(&made["structuredContent"]["id"]);
    assert!(client.call("list_sessions", json!({})).await["structuredContent"]["sessions"].to_string().contains(&id));
    let who = client.call("run_code", json!({"code": "import os; os.environ['WHO']", "session_id": id})).await;
    assert!(said(&who).starts_with("'me'\n"), "{who}");
    client.call("close_session", json!({"session_id": id})).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_ones_own_is_not_there_and_hostile_messages_harm_nobody() {
    let server = Server::start_with_tenants("[server]\nmax_body = \"1MiB\"\n[doors]\nmcp_tools = \"full\"\n").await;
    for era in [Era::Old, Era::New] {
        let own = Client::greet(&server, era, &server.key).await;
        let made = own.call("run_code", json!({"code": "open('secret.txt', 'w').write('mine'); 'theirs'"})).await;
        let (session, execution) =
            (text(&made["structuredContent"]["session_id"]), text(&made["structuredContent"]["id"]));
        let foreign = Client { session: own.session.clone(), ..Client::greet(&server, era, &server.other_key).await };
        for uri in [
            format!("session://{session}/files/secret.txt"),
            format!("session://{session}/log"),
            format!("execution://{execution}"),
            format!("execution://{execution}/stdout"),
            format!("execution://{execution}/blobs/1"),
            format!("session://{session}/notebook"),
        ] {
            let heard = foreign.read(&uri).await;
            let code = if era == Era::Old { -32002 } else { -32602 };
            assert_eq!(heard.error()["code"], code, "{uri}: {}", heard.body);
            assert!(!heard.body.contains("mine") && !heard.body.contains("theirs"), "{}", heard.body);
        }
        for (tool, arguments) in [
            ("run_code", json!({"code": "1", "session_id": session})),
            ("run_command", json!({"command": "true", "session_id": session})),
            ("read_file", json!({"path": "secret.txt", "session_id": session})),
            ("write_file", json!({"path": "secret.txt", "content": "x", "session_id": session})),
            ("list_files", json!({"session_id": session})),
            ("edit_file", json!({"path": "secret.txt", "old": "mine", "new": "x", "session_id": session})),
            ("delete_file", json!({"path": "secret.txt", "session_id": session})),
            ("interrupt_session", json!({"session_id": session})),
            ("restart_session", json!({"session_id": session})),
            ("install_packages", json!({"packages": ["x"], "session_id": session})),
            ("list_packages", json!({"session_id": session})),
            ("get_execution", json!({"execution_id": execution})),
            ("export_notebook", json!({"session_id": session})),
            ("close_session", json!({"session_id": session})),
        ] {
            let refused = foreign.call(tool, arguments).await;
            assert!(refused["isError"] == true && said(&refused).contains("not-found"), "{tool}: {refused}");
        }
        let listed = foreign.call("list_sessions", json!({})).await;
        assert!(!listed.to_string().contains(&session), "{listed}");
        if era == Era::Old {
            // With the first tenant's name it is in a session of its own.
            let ran = foreign.call("run_code", json!({"code": "import os; os.path.exists('secret.txt')"})).await;
            assert_ne!(text(&ran["structuredContent"]["session_id"]), session);
            assert!(said(&ran).starts_with("False"), "{ran}");
        }
        refused_at_the_door(&own).await;
        let powerless = Client {
            key: server.powerless_key.clone(),
            session: None,
            id: AtomicU64::new(1),
            server: Arc::clone(&server),
            era,
        };
        let refused = powerless.call("run_code", json!({"code": "1"})).await;
        assert!(said(&refused).contains("forbidden"), "{refused}");
        let after = own.call("run_code", json!({"code": "open('secret.txt').read()", "session_id": session})).await;
        assert!(said(&after).starts_with("'mine'"), "nobody was harmed: {after}");
    }
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

async fn refused_at_the_door(client: &Client) {
    let server = &client.server;
    let message = client.message("tools/list", json!({}));
    let without = server.send(server.bare(Method::POST, "/mcp").json(&message)).await;
    without.problem(401, "unauthenticated");
    let page = client.request(&message).header("origin", "https://evil.example");
    server.send(page).await.problem(403, "forbidden");
    let rebound = client.request(&message).header("origin", "http://evil.example").header("host", "evil.example");
    server.send(rebound).await.problem(403, "forbidden");
    let own = client.request(&message).header("origin", &server.url);
    assert_eq!(server.send(own).await.status, 200);
    assert_eq!(server.send(server.request(Method::GET, "/mcp")).await.status, 405);
    let raw = |body: String| {
        let request = server.request(Method::POST, "/mcp").header("content-type", "application/json");
        request.header("accept", "application/json, text/event-stream").body(body)
    };
    for body in [
        "no JSON".to_owned(),
        String::new(),
        "[".repeat(100_000),
        format!("{}1{}", "{\"a\":".repeat(50_000), "}".repeat(50_000)),
        "[{\"jsonrpc\": \"2.0\", \"id\": 1, \"method\": \"ping\"}]".to_owned(),
        "\"\u{1}\"".to_owned(),
    ] {
        let heard = Heard::of(raw(body.clone())).await;
        assert_eq!(heard.status, 400, "{:.40}: {}", body, heard.body);
        assert!([-32700, -32600].contains(&heard.error()["code"].as_i64().unwrap()), "{}", heard.body);
    }
    for body in
        ["{}", "{\"jsonrpc\": \"2.0\", \"id\": {}, \"method\": 7}", "{\"jsonrpc\": \"2.0\", \"id\": 1, \"result\": {}}"]
    {
        let heard = Heard::of(raw(body.to_owned())).await;
        assert!((400..500).contains(&heard.status), "{body}: {} {}", heard.status, heard.body);
    }
    server.send(raw(format!("\"{}\"", "x".repeat(1024 * 1024)))).await.problem(413, "payload-too-large");
    let plain = server.request(Method::POST, "/mcp").header("accept", "application/json, text/event-stream");
    assert_eq!(server.send(plain.header("content-type", "text/plain").body(message.to_string())).await.status, 415);
    for uri in ["file:///etc/passwd", "session://../log", "execution://", "session://%00/log", "x"] {
        let code = client.read(uri).await.error()["code"].as_i64().unwrap();
        assert!([-32002, -32602].contains(&code), "{uri}: {code}");
    }
    // A stream that nobody reads holds up nobody else.
    let floods = json!({"name": "run_code", "arguments": {"code": "for i in range(3000): print('z' * 300, flush=True)"}, "_meta": {"progressToken": 1}});
    let unread = client.request(&client.message("tools/call", floods)).send().await.unwrap();
    assert_eq!(client.call("list_sessions", json!({})).await["isError"], false);
    drop(unread);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_says_whether_there_is_this_door_and_under_which_names() {
    let named = Server::start("[doors]\nmcp_hosts = [\"cells.example.com\"]\n").await;
    let ping = json!({"jsonrpc": "2.0", "id": 1, "method": "ping"});
    let request = |server: &Server| {
        server.request(Method::POST, "/mcp").header("accept", "application/json, text/event-stream").json(&ping)
    };
    assert_eq!(named.send(request(&named)).await.status, 403);
    assert_eq!(named.send(request(&named).header("host", "cells.example.com")).await.status, 200);
    named.finish().await.unwrap();
    let closed = Server::start("[doors]\nmcp = false\n").await;
    closed.send(request(&closed)).await.problem(404, "not-found");
    closed.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_may_offer_the_full_set_of_tools() {
    let server = Server::start("[doors]\nmcp_tools = \"full\"\n").await;
    for era in [Era::Old, Era::New] {
        let client = Client::greet(&server, era, &server.key).await;
        let heard = client.ask("tools/list", json!({})).await;
        let tools = heard.result()["tools"].as_array().unwrap();
        assert_eq!(tools.len(), 16);
        assert!(tools.iter().all(|tool| tool["annotations"]["readOnlyHint"].is_boolean()), "{}", heard.body);
        let made = client.call("run_code", json!({"code": "x = 41; import os; os.makedirs('a/b'); x"})).await;
        let session = text(&made["structuredContent"]["session_id"]);
        let call = async |tool: &str, mut arguments: Value| {
            arguments["session_id"] = json!(session);
            client.call(tool, arguments).await
        };
        files_are_changed(&call).await;
        let execution = json!({"execution_id": made["structuredContent"]["id"]});
        let found = client.call("get_execution", execution).await;
        assert!(said(&found).starts_with("41\n") && found["structuredContent"]["status"] == "ok", "{found}");
        let sleeps = call("run_code", json!({"code": "import time; time.sleep(90)", "background": true})).await;
        let running = json!({"execution_id": sleeps["structuredContent"]["id"]});
        let found = client.call("get_execution", running.clone()).await;
        assert!(said(&found).contains("It has not ended yet.") && found["isError"] == false, "{found}");
        while server.get(&format!("/v1/sessions/{session}")).await.json["state"] != "busy" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(call("interrupt_session", json!({})).await["isError"], false);
        server.ended(&text(&running["execution_id"])).await;
        assert!(said(&call("run_code", json!({"code": "x"})).await).starts_with("41\n"), "variables stay");
        let packages = call("list_packages", json!({})).await;
        assert!(packages["structuredContent"].to_string().contains("\"ipykernel\""), "{packages}");
        let refused = call("install_packages", json!({"packages": ["polars"]})).await;
        assert!(refused["isError"] == true && said(&refused).contains("- /packages"), "{refused}");
        let notebook = call("export_notebook", json!({"path": "run.ipynb"})).await;
        let read = client.read(&format!("session://{session}/notebook")).await;
        assert!(read.body.contains("x = 41") && links(&notebook).len() == 2, "{notebook} {}", read.body);
        let file = client.read(&text(&links(&notebook)[0]["uri"])).await;
        assert!(file.body.contains("nbformat"), "{}", file.body);
        assert_eq!(call("restart_session", json!({})).await["isError"], false);
        let after = call("run_code", json!({"code": "x"})).await;
        assert!(said(&after).contains("NameError"), "{after}");
        call("close_session", json!({})).await;
    }
    let audit = server.get("/v1/audit?limit=200").await;
    for action in ["delete_file", "interrupt_session", "restart_session", "install_packages"] {
        let is_there = audit.json["events"].as_array().unwrap().iter().any(|event| event["action"] == action);
        assert!(is_there, "{action}: {}", audit.text);
    }
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

async fn files_are_changed(call: &impl AsyncFn(&str, Value) -> Value) {
    call("write_file", json!({"path": "a/b/c.txt", "content": "one two one"})).await;
    let listed = call("list_files", json!({"path": "a", "depth": 2})).await;
    assert!(said(&listed).contains("a/b/c.txt  11 bytes"), "{listed}");
    for (old, all, pointer) in [("one", false, "/old"), ("three", true, "/old"), ("", true, "/old")] {
        let refused = call("edit_file", json!({"path": "a/b/c.txt", "old": old, "new": "x", "all": all})).await;
        assert!(refused["isError"] == true && said(&refused).contains(&format!("- {pointer}: ")), "{old}: {refused}");
    }
    let edited = call("edit_file", json!({"path": "a/b/c.txt", "old": "two", "new": "zwölf"})).await;
    assert_eq!(edited["structuredContent"], json!({"path": "a/b/c.txt", "size": 14, "replaced": 1}), "{edited}");
    assert_eq!(said(&call("read_file", json!({"path": "a/b/c.txt"})).await), "one zwölf one");
    let refused = call("delete_file", json!({"path": "a"})).await;
    assert_eq!(refused["isError"], true, "something is in it: {refused}");
    assert_eq!(call("delete_file", json!({"path": "a", "recursive": true})).await["isError"], false);
    assert_eq!(call("list_files", json!({"path": "a"})).await["isError"], true);
    for trick in ["../../etc", "/etc"] {
        for tool in ["list_files", "delete_file"] {
            assert_eq!(call(tool, json!({"path": trick})).await["isError"], true, "{tool}: {trick}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_line_of_the_log_has_code_or_a_key_in_it() {
    let (server, _) = Server::spawn("[log]\nlevel = \"debug\"\n").await;
    for era in [Era::Old, Era::New] {
        let client = Client::greet(&server, era, &server.key).await;
        let ran = client.call("run_code", json!({"code": "print('mark' + 'er')  # a secret"})).await;
        assert!(said(&ran).starts_with("marker"), "{ran}");
        client.ask("tools/call", json!({"name": "no_such_tool_marker", "arguments": {"code": "a secret"}})).await;
    }
    let log = std::fs::read_to_string(server.data().parent().unwrap().join("log")).unwrap();
    assert!(log.contains("route=\"/mcp\""), "{log}");
    for told in ["a secret", "marker", server.key.as_str()] {
        let line = log.lines().find(|line| line.contains(told));
        assert_eq!(line, None);
    }
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

/// A client that knows tasks asks.
async fn ask_with_tasks(client: &Client, method: &str, params: Value) -> Heard {
    let mut message = client.message(method, params);
    message["params"]["_meta"]["io.modelcontextprotocol/clientCapabilities"] =
        json!({"extensions": {"io.modelcontextprotocol/tasks": {}}});
    Heard::of(client.request(&message)).await
}

async fn task_ends(client: &Client, id: &str) -> Value {
    let began = Instant::now();
    loop {
        let heard = ask_with_tasks(client, "tasks/get", json!({"taskId": id})).await;
        let task = heard.result().clone();
        assert_eq!((&task["resultType"], &task["taskId"]), (&json!("complete"), &json!(id)), "{task}");
        if task["status"] != "working" {
            return task;
        }
        assert!(began.elapsed() < NEVER && task["ttlMs"].is_null() && task["pollIntervalMs"].is_u64(), "{task}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_work_is_a_task_of_a_client_that_knows_them() {
    let server = Server::start_with_tenants("").await;
    let client = Client::greet(&server, Era::New, &server.key).await;
    let run = async |arguments: Value| {
        let heard = ask_with_tasks(&client, "tools/call", json!({"name": "run_code", "arguments": arguments})).await;
        heard.result().clone()
    };
    // What is done at once is answered at once.
    let quick = run(json!({"code": "x = 41"})).await;
    let session = text(&quick["structuredContent"]["session_id"]);
    let code = "import time\nfor n in range(70): print('line', n, flush=True); time.sleep(.1)\nx + 1";
    let made = run(json!({"code": code, "session_id": session})).await;
    assert_eq!((&made["resultType"], &made["status"]), (&json!("task"), &json!("working")), "{made}");
    assert!(text(&made["statusMessage"]).starts_with("line "), "{made}");
    let id = text(&made["taskId"]);
    assert!(id.starts_with("exe"), "{made}");
    let ended = task_ends(&client, &id).await;
    assert_eq!(ended["status"], "completed", "{ended}");
    assert!(said(&ended["result"]).contains("line 69\n42\n") && ended["result"]["isError"] == false, "{ended}");
    assert!(ended["ttlMs"].as_u64().is_some_and(|ttl| ttl > 7000), "{ended}");
    // An error of the code is a result; who takes a task back finds it cancelled, and its variables there.
    let fails = run(json!({"code": "1/0", "session_id": session, "background": true})).await;
    let failed = task_ends(&client, &text(&fails["taskId"])).await;
    assert_eq!((&failed["status"], &failed["result"]["isError"]), (&json!("completed"), &json!(true)), "{failed}");
    let sleeps = run(json!({"code": "time.sleep(90)", "session_id": session, "background": true})).await;
    let id = text(&sleeps["taskId"]);
    let acknowledged = ask_with_tasks(&client, "tasks/cancel", json!({"taskId": id})).await;
    assert_eq!(acknowledged.result()["resultType"], "complete", "{}", acknowledged.body);
    assert_eq!(task_ends(&client, &id).await["status"], "cancelled");
    let after = run(json!({"code": "x", "session_id": session})).await;
    assert!(said(&after).starts_with("41\n"), "{after}");
    // A client that has not said that it knows tasks gets none, and nobody has one of another's.
    let plain = client.call("run_code", json!({"code": "1", "session_id": session, "background": true})).await;
    assert!(plain["taskId"].is_null() && said(&plain).contains("execution://"), "{plain}");
    assert_eq!(client.ask("tasks/get", json!({"taskId": id})).await.error()["code"], -32021);
    let foreign = Client::greet(&server, Era::New, &server.other_key).await;
    for method in ["tasks/get", "tasks/cancel"] {
        for (client, id) in [(&foreign, id.as_str()), (&client, "exe00000000000000000000000000"), (&client, "../x")] {
            let refused = ask_with_tasks(client, method, json!({"taskId": id})).await;
            assert_eq!(refused.error()["code"], -32602, "{method} {id}: {}", refused.body);
        }
    }
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

/// What a program that is started by its client answers on its standard output.
fn over_stdio(arguments: &[&str], messages: &[Value]) -> Vec<Value> {
    let mut program = Command::new(env!("CARGO_BIN_EXE_cellblock"));
    program.env_remove("CELLBLOCK_URL").env("CELLBLOCK_CONFIG", "/dev/null").args(["mcp", "--stdio"]).args(arguments);
    let mut program = program.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = program.stdin.take().unwrap();
    for message in messages {
        writeln!(input, "{message}").unwrap();
    }
    drop(input);
    let output = program.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_only_starts_programs_is_served_with_a_server_and_without() {
    let server = Server::start("").await;
    let meta = json!({"io.modelcontextprotocol/protocolVersion": "2026-07-28", "io.modelcontextprotocol/clientCapabilities": {},
        "io.modelcontextprotocol/clientInfo": {"name": "t", "version": "1"}});
    let params = json!({"name": "run_code", "arguments": {"code": "6 * 7"}, "_meta": meta});
    let messages = [json!({"jsonrpc": "2.0", "id": "a", "method": "tools/call", "params": params})];
    let (url, key) = (server.url.clone(), server.key.clone());
    let heard = tokio::task::spawn_blocking({
        let messages = messages.clone();
        move || over_stdio(&["--url", &url, "--key", &key], &messages)
    });
    let heard = heard.await.unwrap();
    assert_eq!((heard.len(), &heard[0]["id"]), (1, &json!("a")), "{heard:?}");
    assert!(said(&heard[0]["result"]).starts_with("42\n"), "{heard:?}");
    let wrong = over_stdio(&["--url", &server.url, "--key", "cb_wrong"], &messages);
    assert!(text(&wrong[0]["error"]["message"]).contains("401"), "{wrong:?}");
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));

    let alone = tokio::task::spawn_blocking(move || over_stdio(&[], &messages)).await.unwrap();
    assert!(said(&alone[0]["result"]).starts_with("42\n"), "{alone:?}");
}
