//! The door for programs written for E2B: which way a request goes, whose it is, what refusals look like, and E2B's own clients, as they come. With real containers.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/e2b.rs"]
mod e2b;
#[path = "support/server.rs"]
mod server;

use std::sync::Arc;

use cellblock::domain::ids::SessionId;
use e2b::{AGENT, INTERPRETER, Sandbox, aimed, asks, clients_work, is_gone, is_numbered};
use reqwest::Method;
use serde_json::json;
use server::{Server, text};

const SETTINGS: &str = "[e2b]\ndomain = \"boxes.test\"\n";

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
        for path in ["/v2/nothing", "/v3/templates", "/templates", "/sandboxes/x/nothing"] {
            is_numbered(&server.send(asks(&server, Method::GET, &format!("{place}{path}"))).await, 404);
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
async fn e2bs_own_clients_work_as_they_come() {
    let server = Server::start(SETTINGS).await;
    let cases = cases!(server; the_python_clients, the_javascript_clients);
    server.run_and_finish(2, cases).await;
}

async fn the_python_clients(server: Arc<Server>) {
    clients_work(&server, "clients.py", "versions,a_wrong_key_is_told_as_one", &[]).await;
}

async fn the_javascript_clients(server: Arc<Server>) {
    clients_work(&server, "clients.mjs", "versions,a_wrong_key_is_told_as_one", &[]).await;
}
