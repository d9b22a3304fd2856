//! The door for programs written for E2B: which way a request goes, whose it is, what refusals look like, and E2B's own clients, as they come. With real containers.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/e2b.rs"]
mod e2b;
#[path = "support/server.rs"]
mod server;

use std::sync::Arc;

use cellblock::domain::ids::SessionId;
use e2b::{AGENT, INTERPRETER, Sandbox, aimed, asks, clients_work, is_gone, is_numbered};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use server::{Server, text};

const SETTINGS: &str = "[e2b]\ndomain = \"boxes.test\"\n";
/// What stands beside it, and sandboxes that may reach something.
const OTHERS: &str = r#"
[doors.classic]
enabled = true
[templates.outward]
image = "cellblock/python:latest"
[templates.outward.network]
may_allow = ["*.example.org", "pypi"]
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_door() {
    let server = Server::start(SETTINGS).await;
    let cases = cases!(
        server;
        the_control_api_speaks_e2bs_words, requests_go_where_their_headers_say, a_sandbox_opens_to_its_own_tokens, hosts_of_the_domain_are_sandboxes,
        home_is_where_e2bs_programs_take_it_for, what_a_sandbox_serves_is_reached_by_its_port
    );
    server.run_and_finish(2, cases).await;
}

async fn the_control_api_speaks_e2bs_words(server: Arc<Server>) {
    for place in ["", "/e2b/api"] {
        for path in ["/sandboxes", "/v2/sandboxes", "/sandboxes/x/metrics", "/snapshots"] {
            let path = format!("{place}{path}");
            is_numbered(&server.send(server.bare(Method::GET, &path)).await, 401);
            let wrong = server.bare(Method::GET, &path).header("x-api-key", format!("e2b_{}", "0".repeat(64)));
            is_numbered(&server.send(wrong).await, 401);
        }
        for path in ["/v2/nothing", "/v3/nothing", "/sandboxes/x/nothing", "/sandboxes/x", "/sandboxes/x/metrics"] {
            is_numbered(&server.send(asks(&server, Method::GET, &format!("{place}{path}"))).await, 404);
        }
        for path in
            ["/snapshots", "/templates", "/templates/x", "/v2/templates", "/v3/templates", "/volumes", "/secrets/x"]
        {
            is_numbered(&server.send(asks(&server, Method::GET, &format!("{place}{path}"))).await, 501);
        }
        is_numbered(&server.send(asks(&server, Method::PATCH, &format!("{place}/v2/sandboxes"))).await, 405);
    }
    for path in ["/e2b/api/anything", "/e2b/api/"] {
        is_numbered(&server.send(asks(&server, Method::GET, path)).await, 404);
    }
    // What belongs to other doors is answered in their words.
    server.send(server.bare(Method::GET, "/health")).await.problem(404, "not-found");
    server.send(server.bare(Method::GET, "/v1/sessions")).await.problem(401, "unauthenticated");
}

async fn requests_go_where_their_headers_say(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    for place in ["", "/e2b/box"] {
        let health = server.send(sandbox.ask(Method::GET, &format!("{place}/health"), AGENT)).await;
        assert_eq!((health.status, health.text.as_str()), (204, ""));
        let health = server.send(sandbox.ask(Method::GET, &format!("{place}/health"), INTERPRETER)).await;
        assert_eq!((health.status, health.text.as_str()), (200, "\"OK\""));
    }
    let half = server.bare(Method::GET, "/health").header("E2b-Sandbox-Id", &sandbox.cell.id);
    is_numbered(&server.send(half).await, 400);
    is_numbered(&server.send(server.bare(Method::GET, "/e2b/box/health")).await, 400);
    is_numbered(&server.send(server.bare(Method::GET, "/e2b/envd/health")).await, 400);
    let unknown = SessionId::from_uuid(uuid::Uuid::from_u128(7)).to_string();
    for id in [unknown.as_str(), "sbx1"] {
        for port in [AGENT, INTERPRETER, "8000"] {
            is_gone(&server.send(aimed(&server, Method::GET, "/health", (id, port))).await);
        }
    }
    // As everything that is no repetition of itself: E2B's clients would send it again and again.
    let start = aimed(&server, Method::POST, "/process.Process/Start", (&unknown, AGENT));
    let refused = server.send(start).await;
    is_gone(&refused);
    assert_eq!(refused.header("should-retry"), "false");

    assert_eq!(server.post(&format!("/v1/sessions/{}/pause", sandbox.cell.id), &json!({})).await.status, 200);
    is_gone(&server.send(sandbox.ask(Method::GET, "/health", AGENT)).await);
    assert_eq!(server.post(&format!("/v1/sessions/{}/resume", sandbox.cell.id), &json!({})).await.status, 200);
    assert_eq!(server.send(sandbox.ask(Method::GET, "/health", AGENT)).await.status, 204);
    let id = sandbox.cell.id.clone();
    assert_eq!(server.delete(&format!("/v1/sessions/{id}")).await.status, 200);
    is_gone(&server.send(sandbox.ask(Method::GET, "/health", AGENT)).await);
}

async fn a_sandbox_opens_to_its_own_tokens(server: Arc<Server>) {
    let (one, two) = (Sandbox::new(&server).await, Sandbox::new(&server).await);
    let list = |token: Option<&str>| {
        let request = one.ask(Method::POST, "/process.Process/NoSuchMethod", AGENT);
        server.send(match token {
            Some(token) => request.header("x-access-token", token),
            None => request,
        })
    };
    is_numbered(&list(Some(&one.agent)).await, 404);
    let no_token = [None, Some(""), Some(two.agent.as_str()), Some(one.traffic.as_str()), Some(server.key.as_str())];
    for token in no_token {
        is_numbered(&list(token).await, 401);
        let rpc = one.ask(Method::POST, "/filesystem.Filesystem/Stat", AGENT);
        let rpc = token.iter().fold(rpc, |request, token| request.header("x-access-token", *token));
        let refused = server.send(rpc).await;
        assert_eq!((refused.status, &refused.json["code"]), (401, &json!("unauthenticated")), "{}", refused.text);
    }
    let contexts = |name: &str, token: &str| {
        server.send(one.ask(Method::GET, "/contexts/nothing/there", INTERPRETER).header(name, token))
    };
    assert_eq!(contexts("e2b-traffic-access-token", &one.traffic).await.status, 404);
    for (name, token) in [
        ("e2b-traffic-access-token", &two.traffic),
        ("e2b-traffic-access-token", &one.agent),
        ("x-access-token", &one.traffic),
    ] {
        let refused = contexts(name, token).await;
        assert_eq!((refused.status, refused.header("content-type")), (403, "text/plain; charset=utf-8"));
    }
    let twice = one.ask(Method::POST, "/filesystem.Filesystem/Stat", AGENT);
    let twice = twice.header("x-access-token", &one.agent).header("x-access-token", &one.agent);
    assert_eq!(server.send(twice).await.status, 401, "of two tokens none counts");
}

async fn hosts_of_the_domain_are_sandboxes(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let at = |host: String, path: &str| server.send(server.bare(Method::GET, path).header("host", host));
    let id = &sandbox.cell.id;
    assert_eq!(at(format!("{AGENT}-{id}.boxes.test"), "/health").await.status, 204);
    assert_eq!(at(format!("{INTERPRETER}-{id}.boxes.test:8443"), "/health").await.text, "\"OK\"");
    is_numbered(&at("api.boxes.test".to_owned(), "/v2/sandboxes").await, 401);
    is_numbered(&at("api.boxes.test".to_owned(), "/v1/sessions").await, 404);
    assert_eq!(at("x.boxes.test".to_owned(), "/v1/sessions").await.status, 404, "there is nothing on this host");
    assert_eq!(at("boxes.test".to_owned(), "/livez").await.status, 200, "the server's own name");
}

async fn home_is_where_e2bs_programs_take_it_for(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    assert_eq!(sandbox.cell.view["workdir"], "/home/user");
    let ran = sandbox
        .cell
        .run(
            "import os, pwd, subprocess\nopen('/home/user/a.txt', 'w').write('here')\n\
             print(os.getcwd(), os.path.expanduser('~'), open('a.txt').read(), pwd.getpwuid(os.getuid()).pw_name)\n\
             sh = lambda line: subprocess.run(['/bin/bash', '-l', '-c', line], capture_output=True, text=True).stdout.strip()\n\
             print(sh('pwd'), sh('whoami'), sh('git --version').split()[0], sh('curl --version').split()[0])\n\
             print(sh('command -v python'), sh('command -v python3'), sh('stat -c %U a.txt'))",
        )
        .await;
    assert_eq!(ran["status"], "ok", "{ran}");
    let expected =
        "/home/user /home/user here user\n/home/user user git curl\n/opt/venv/bin/python /opt/venv/bin/python3 user\n";
    assert_eq!(ran["stdout"], expected, "{ran}");
    let read = server.get(&format!("/v1/sessions/{}/files/a.txt", sandbox.cell.id)).await;
    assert_eq!((read.status, read.text.as_str()), (200, "here"));
    let commands = format!("/v1/sessions/{}/commands", sandbox.cell.id);
    let ran = server.post(&commands, &json!({"argv": ["pwd"], "cwd": "/home/user"})).await;
    assert_eq!((ran.status, &ran.json["stdout"]), (200, &json!("/home/user\n")), "{}", ran.text);
    let elsewhere = server.post(&commands, &json!({"argv": ["pwd"], "cwd": "/workspace"})).await;
    assert_eq!(elsewhere.pointers(), ["/cwd"], "{}", elsewhere.text);
}

async fn what_a_sandbox_serves_is_reached_by_its_port(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let started = sandbox
        .cell
        .run("import subprocess, time, socket\nsubprocess.Popen(['python', '-m', 'http.server', '3000', '-d', '/home/user'])\nopen('/home/user/index.html', 'w').write('served')\nfor _ in range(200):\n    with socket.socket() as s:\n        if s.connect_ex(('127.0.0.1', 3000)) == 0: break\n    time.sleep(0.05)")
        .await;
    assert_eq!(started["status"], "ok", "{started}");
    let ask = |path: &str| sandbox.ask(Method::GET, path, "3000");
    let served = server.send(ask("/index.html").header("e2b-traffic-access-token", &sandbox.traffic)).await;
    assert_eq!((served.status, served.text.as_str()), (200, "served"));
    let by_host = server.bare(Method::GET, "/").header("host", format!("3000-{}.boxes.test", sandbox.cell.id));
    let by_host = server.send(by_host.header("e2b-traffic-access-token", &sandbox.traffic)).await;
    assert_eq!((by_host.status, by_host.text.as_str()), (200, "served"));
    assert_eq!(server.send(ask("/")).await.status, 403, "who has no token is nobody");
    let closed = sandbox.ask(Method::GET, "/", "3001").header("e2b-traffic-access-token", &sandbox.traffic);
    let closed = server.send(closed).await;
    is_numbered(&closed, 502);
    assert!(text(&closed.json["message"]).contains("port is not open"), "{}", closed.text);
    assert_eq!(closed.json["port"], json!(3001));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_control_api() {
    let server = Server::start_with_tenants(&format!("{SETTINGS}{OTHERS}")).await;
    let cases = cases!(
        server;
        others_see_nothing_of_a_sandbox, older_clients_are_served, rules_are_taken_where_they_mean_something, what_is_wrong_is_said,
        a_sandbox_is_a_session_of_the_other_doors, the_classic_routes_stand_beside_it
    );
    server.run_and_finish(2, cases).await;
}

async fn others_see_nothing_of_a_sandbox(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let id = &sandbox.cell.id;
    let below = [
        (Method::GET, ""),
        (Method::DELETE, ""),
        (Method::POST, "/connect"),
        (Method::POST, "/resume"),
        (Method::POST, "/timeout"),
        (Method::POST, "/pause"),
        (Method::GET, "/metrics"),
        (Method::PUT, "/network"),
        (Method::POST, "/snapshots"),
        (Method::POST, "/fork"),
    ];
    for (method, below) in below {
        for place in ["/sandboxes", "/e2b/api/sandboxes"] {
            let path = format!("{place}/{id}{below}");
            let ask = |request: RequestBuilder| {
                if method == Method::GET { request } else { request.json(&json!({"timeout": 1})) }
            };
            is_numbered(&server.send(ask(server.foreign(method.clone(), &path))).await, 404);
            let powerless = server.bare(method.clone(), &path).header("x-api-key", &server.powerless_key);
            is_numbered(&server.send(ask(powerless)).await, 403);
        }
    }
    let connect = server.foreign(Method::POST, &format!("/v2/sandboxes/{id}/connect")).json(&json!({}));
    is_numbered(&server.send(connect).await, 404);
    for path in ["/sandboxes", "/v2/sandboxes"] {
        assert_eq!(server.send(server.foreign(Method::GET, path)).await.json, json!([]));
        let powerless = server.bare(Method::GET, path).header("x-api-key", &server.powerless_key);
        is_numbered(&server.send(powerless).await, 403);
        let create = server.bare(Method::POST, path).header("x-api-key", &server.powerless_key);
        is_numbered(&server.send(create.json(&json!({"templateID": "base"}))).await, 403);
    }
    assert_eq!(server.send(sandbox.ask(Method::GET, "/health", AGENT)).await.status, 204, "nothing has happened to it");
}

async fn older_clients_are_served(server: Arc<Server>) {
    // They say by themselves that they want the internet.
    let asked = json!({
        "templateID": "code-interpreter-v1", "metadata": {"older": "yes"}, "secure": true, "allow_internet_access": true, "timeout": 300, "autoPause": false
    });
    let made = server.send(asks(&server, Method::POST, "/sandboxes").json(&asked)).await;
    assert_eq!(made.status, 201, "{}", made.text);
    let id = text(&made.json["sandboxID"]);
    let list = || server.send(asks(&server, Method::GET, "/sandboxes?metadata=older%3Dyes"));
    let listed = list().await;
    assert_eq!((listed.status, &listed.json[0]["sandboxID"], &listed.json[1]), (200, &json!(id), &Value::Null));
    let ask = |below: &str, body: Value| {
        server.send(asks(&server, Method::POST, &format!("/sandboxes/{id}{below}")).json(&body))
    };
    is_numbered(&ask("/resume", json!({"timeout": 60})).await, 409);
    let connected = ask("/connect", json!({"timeout": 60})).await;
    assert_eq!(connected.status, 200, "{}", connected.text);
    assert_eq!(ask("/pause", json!({})).await.status, 204);
    is_numbered(&ask("/pause", json!({})).await, 409);
    assert_eq!(list().await.json, json!([]), "only what runs is listed there");
    let resumed = ask("/resume", json!({"timeout": 60, "autoPause": false})).await;
    assert_eq!((resumed.status, &resumed.json["envdAccessToken"]), (201, &made.json["envdAccessToken"]));
    let removed = server.send(asks(&server, Method::DELETE, &format!("/sandboxes/{id}"))).await;
    assert_eq!((removed.status, removed.text.as_str()), (204, ""));
    is_numbered(&server.send(asks(&server, Method::DELETE, &format!("/sandboxes/{id}"))).await, 404);
}

async fn rules_are_taken_where_they_mean_something(server: Arc<Server>) {
    let rules = json!({"allowOut": ["files.example.org", "pypi"], "denyOut": ["0.0.0.0/0"]});
    let sandbox = Sandbox::of(&server, json!({"templateID": "outward", "network": rules})).await;
    let look = async || server.send(sandbox.control(Method::GET, "")).await.json;
    let now = look().await;
    assert_eq!(now["allowInternetAccess"], true, "{now}");
    assert!(now["network"]["allowOut"].as_array().unwrap().contains(&json!("files.example.org")), "{now}");
    let change = |network: Value| server.send(sandbox.control(Method::PUT, "/network").json(&network));
    let changed = change(json!({"allowOut": ["a.example.org"], "denyOut": ["0.0.0.0/0"]})).await;
    assert_eq!(changed.status, 204, "{}", changed.text);
    assert_eq!(look().await["network"], json!({"allowOut": ["a.example.org"], "denyOut": ["0.0.0.0/0"]}));
    for (network, word) in [
        (json!({"allowOut": ["elsewhere.test"]}), "/allowOut/0"),
        (json!({"denyOut": ["10.0.0.0/8"]}), "/denyOut/0"),
        (json!({"allow_internet_access": true}), "/allow_internet_access"),
    ] {
        let refused = change(network).await;
        is_numbered(&refused, 400);
        assert!(text(&refused.json["message"]).contains(word), "{}", refused.text);
    }
    assert_eq!(change(json!({})).await.status, 204, "what its template gives by itself, which is nothing");
    assert_eq!(look().await["allowInternetAccess"], false);
    assert_eq!(change(json!({"allowOut": ["a.example.org"]})).await.status, 204);
    assert_eq!(change(json!({"allow_internet_access": false})).await.status, 204);
    let now = look().await;
    assert_eq!((&now["allowInternetAccess"], &now["network"]["allowOut"]), (&json!(false), &json!([])));
}

async fn what_is_wrong_is_said(server: Arc<Server>) {
    let create = |body: Value| server.send(asks(&server, Method::POST, "/v2/sandboxes").json(&body));
    for (body, status, word) in [
        (json!({}), 400, "/templateID"),
        (json!({"templateID": "none"}), 404, "/templateID"),
        (json!({"templateID": 1}), 400, "/templateID"),
        (json!({"templateID": "base", "gpu": 1}), 400, "/gpu"),
        (json!({"templateID": "base", "timeout": -1}), 400, "/timeout"),
        (json!({"templateID": "base", "timeout": 0}), 400, "/timeout"),
        (json!({"templateID": "base", "metadata": {"a": 1}}), 400, "/metadata/a"),
        (json!({"templateID": "base", "envVars": {"LD_PRELOAD": "x"}}), 400, "/envVars/LD_PRELOAD"),
        (json!({"templateID": "base", "autoResume": {"enabled": true}}), 400, "/autoResume"),
        (
            json!({"templateID": "base", "network": {"rules": {"a": [{}]}, "denyOut": ["1.1.1.1"]}}),
            400,
            "/network/denyOut/0",
        ),
    ] {
        let refused = create(body.clone()).await;
        is_numbered(&refused, status);
        assert!(text(&refused.json["message"]).contains(word), "{body}: {}", refused.text);
    }
    let odd = asks(&server, Method::POST, "/v2/sandboxes").header("content-type", "text/plain").body("{}");
    is_numbered(&server.send(odd).await, 400);
    let broken = asks(&server, Method::POST, "/v2/sandboxes").header("content-type", "application/json").body("{");
    is_numbered(&server.send(broken).await, 400);
    for query in [
        "limit=0",
        "limit=101",
        "order=up",
        "state=ended",
        "nextToken=x",
        "nextToken=1-x",
        "startedAfter=now",
        "metadata=a",
        "more=1",
    ] {
        is_numbered(&server.send(asks(&server, Method::GET, &format!("/v2/sandboxes?{query}"))).await, 400);
    }
    let sandbox = Sandbox::new(&server).await;
    for (below, body) in [
        ("/timeout", json!({})),
        ("/timeout", json!({"timeout": -1})),
        ("/timeout", json!({"timeout": 1e300})),
        ("/connect", json!({"timeout": -1})),
        ("/resume", json!({"autoPause": true})),
        ("/pause", json!({"memory": false})),
        ("/pause", json!({"memory": "no"})),
    ] {
        is_numbered(&server.send(sandbox.control(Method::POST, below).json(&body)).await, 400);
    }
    is_numbered(&server.send(sandbox.control(Method::GET, "/metrics?start=now")).await, 400);
    assert_eq!(server.send(sandbox.control(Method::POST, "/timeout").json(&json!({"timeout": 0}))).await.status, 204);
    assert_eq!(sandbox.cell.wait("ended").await["end_reason"], "lifetime");
    is_numbered(&server.send(sandbox.control(Method::POST, "/timeout").json(&json!({"timeout": 60}))).await, 404);
}

async fn a_sandbox_is_a_session_of_the_other_doors(server: Arc<Server>) {
    let sandbox =
        Sandbox::of(&server, json!({"templateID": "base", "timeout": 900, "metadata": {"a": "1"}, "autoPause": true}))
            .await;
    let view = &sandbox.cell.view;
    let seen = (&view["template"], &view["on_idle"], &view["on_expiry"], &view["metadata"]);
    assert_eq!(seen, (&json!("e2b"), &json!("keep"), &json!("pause"), &json!({"a": "1"})), "{view}");
    let session = server.create(json!({"template": "e2b", "metadata": {"native": "yes"}})).await;
    let listed = server.send(asks(&server, Method::GET, "/v2/sandboxes?metadata=native%3Dyes")).await;
    assert_eq!(listed.json[0]["sandboxID"], json!(session.id), "{}", listed.text);
    assert!(listed.json[0].get("alias").is_none(), "nobody has named its template otherwise");
    let connected = asks(&server, Method::POST, &format!("/v2/sandboxes/{}/connect", session.id)).json(&json!({}));
    let connected = server.send(connected).await;
    assert_eq!(connected.status, 200, "{}", connected.text);
    let health = aimed(&server, Method::GET, "/contexts", (&session.id, INTERPRETER));
    let health = health.header("e2b-traffic-access-token", text(&connected.json["trafficAccessToken"]));
    assert_eq!(server.send(health).await.status, 200);
}

async fn the_classic_routes_stand_beside_it(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    let started = server.send(server.request(Method::POST, "/start_session").form(&[("user_id", "ada")])).await;
    assert_eq!(started.status, 200, "{}", started.text);
    let classic = server.request(Method::POST, "/execute").json(&json!({"user_id": "ada", "code": "print('classic')"}));
    let classic = server.send(classic).await;
    assert!(classic.status == 200 && classic.json.is_object() && classic.text.contains("classic"), "{}", classic.text);
    let ask = sandbox.ask(Method::POST, "/execute", INTERPRETER).header("e2b-traffic-access-token", &sandbox.traffic);
    let ran = server.send(ask.json(&json!({"code": "print('interpreted')"}))).await;
    assert_eq!((ran.status, ran.header("content-type")), (200, "application/x-ndjson"), "{}", ran.text);
    assert!(ran.text.contains("interpreted"), "{}", ran.text);
    let unaimed = server.send(server.request(Method::POST, "/execute").json(&json!({"code": "1"}))).await;
    assert_eq!(unaimed.status, 422, "{}", unaimed.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e2bs_own_clients_work_as_they_come() {
    let server = Server::start(SETTINGS).await;
    let cases = cases!(
        server;
        the_python_clients, the_javascript_clients, the_python_client_makes_and_ends_sandboxes, the_python_client_finds_sandboxes,
        a_process_comes_back_to_what_another_made, the_javascript_client_makes_and_finds_sandboxes
    );
    server.run_and_finish(2, cases).await;
}

async fn the_python_clients(server: Arc<Server>) {
    clients_work(&server, "clients.py", "versions,a_wrong_key_is_told_as_one", &[]).await;
}

async fn the_python_client_makes_and_ends_sandboxes(server: Arc<Server>) {
    let cases = "a_sandbox_is_what_was_asked_for,a_sandbox_is_measured,what_is_killed_is_gone,what_there_never_was_is_not_there,a_pause_keeps_everything,\
                 time_is_over,what_can_not_be_had_is_said,the_same_key_makes_one,the_asynchronous_client";
    clients_work(&server, "control.py", cases, &[]).await;
}

async fn the_python_client_finds_sandboxes(server: Arc<Server>) {
    clients_work(&server, "control.py", "sandboxes_are_found", &[]).await;
}

async fn a_process_comes_back_to_what_another_made(server: Arc<Server>) {
    let sandbox = Sandbox::new(&server).await;
    for case in ["begin", "come_back"] {
        clients_work(&server, "control.py", case, &[&sandbox.cell.id]).await;
    }
}

async fn the_javascript_client_makes_and_finds_sandboxes(server: Arc<Server>) {
    clients_work(&server, "control.mjs", "life,lists,refusals", &[]).await;
}

async fn the_javascript_clients(server: Arc<Server>) {
    clients_work(&server, "clients.mjs", "versions,a_wrong_key_is_told_as_one", &[]).await;
}
