//! A server that is killed, at any moment: the next one goes on with what lives, and nothing is left of what does not.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;
#[path = "support/watch.rs"]
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cellblock::store::state::{self, Stage, State};
use reqwest::Method;
use serde_json::{Value, json};
use server::{Cell, Server, text};
use watch::{Chance, processes_of};

const SETTINGS: &str = r#"
[limits]
sessions = 40
[executions]
interrupt_grace = "1s"
[templates.small]
image = "cellblock/python:latest"
[templates.small.default]
memory = "160MiB"
disk = "16MiB"
tmp = "16MiB"
"#;
/// Users of sessions under kills, which no other test's sessions have.
const USERS: RangeInclusive<u32> = 47_000..=47_999;
/// Callers at once.
const WORKERS: u64 = 3;

fn again(server: &Arc<Server>, cell: &Cell) -> Cell {
    Cell { server: Arc::clone(server), id: cell.id.clone(), view: Value::Null }
}

async fn remove(server: &Server, name: &str) {
    let options = bollard::query_parameters::RemoveContainerOptionsBuilder::default().force(true).v(true).build();
    server.docker.remove_container(name, Some(options)).await.expect("a removal");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lives_goes_on_after_a_kill() {
    let (first, pid) = Server::spawn(SETTINGS).await;
    let request = json!({"template": "small", "name": "chat", "labels": {"run": "1"}, "env": {"GREETING": "hej"},
        "setup": "prepared = 1", "timeouts": {"idle_seconds": 500}});
    let cell = first.create(request.clone()).await;
    cell.value("x = prepared + 40; open('kept.txt', 'w').write('in the file'); x").await;
    let contexts = cell.path("/contexts");
    let context = first.post(&contexts, &json!({})).await.json["id"].clone();
    cell.execute(json!({"code": "y = 7", "context_id": context})).await;
    let patch = json!({"expires_in_seconds": 5000, "labels": {"run": "2"}});
    assert_eq!(first.patch(&cell.path(""), &patch).await.status, 200);
    let deleted = first.create(json!({"template": "small"})).await;
    deleted.delete().await;
    let removed = first.create(json!({"template": "small"})).await;
    let working = first.create(json!({"template": "small"})).await;
    let at_work = working.background_until_output("import time\nprint('on', flush=True)\ntime.sleep(3)\nz = 9").await;
    let dying = first.create(json!({"template": "small"})).await;
    let before = cell.look().await;

    first.kill(pid).await;
    remove(&first, &removed.containers().await[0]).await;
    let (second, pid) = first.spawn_again().await;

    let cell = again(&second, &cell);
    let after = cell.look().await;
    for field in ["state", "name", "labels", "template", "created_at", "default_context", "resources", "timeouts"] {
        assert_eq!(after[field], before[field], "{field}");
    }
    assert!(text(&after["expires_at"])[..19] == text(&before["expires_at"])[..19], "{after} {before}");
    assert_eq!(
        cell.value("x, open('kept.txt').read(), __import__('os').environ['GREETING']").await,
        "(41, 'in the file', 'hej')"
    );
    let seen = cell.execute(json!({"code": "y", "context_id": context})).await;
    assert_eq!(seen["results"][0]["data"]["text/plain"], "7");
    let reuse = json!({"name": "chat", "template": "small", "if_exists": "reuse"});
    let reused = second.post("/v1/sessions", &reuse).await;
    assert_eq!((reused.status, &reused.json["id"]), (200, &json!(cell.id)));
    second.post("/v1/sessions", &request).await.problem(409, "name-in-use");

    let gone = |cell: &Cell| second.request(Method::POST, &cell.path("/executions")).json(&json!({"code": "1"}));
    assert_eq!(second.send(gone(&deleted)).await.problem(410, "session-ended")["end_reason"], "deleted");
    let removed = again(&second, &removed);
    removed.wait("ended").await;
    assert_eq!(second.send(gone(&removed)).await.problem(410, "session-ended")["end_reason"], "lost");
    // What ran goes on in its kernel, and what comes after it waits for it.
    assert_eq!(again(&second, &working).value("z").await, "9");
    assert_eq!(second.ended(&at_work).await["status"], "ok");
    let restarted = second.post(&cell.path("/restart"), &Value::Null).await;
    assert_eq!(restarted.status, 200, "{}", restarted.text);
    assert_eq!(cell.value("prepared").await, "1");

    // A kernel that dies while nobody looks is told of afterwards.
    second.kill(pid).await;
    let inside = second.docker.top_processes(&dying.containers().await[0], None).await.expect("processes");
    let kernel =
        inside.processes.unwrap_or_default().into_iter().find(|p| p.iter().any(|part| part.contains("ipykernel")));
    let killed = std::process::Command::new("kill").args(["-9", &kernel.expect("a kernel")[1]]).status();
    assert!(killed.expect("a command").success());
    let (third, _) = second.spawn_again().await;
    let ran = again(&third, &dying).execute(json!({"code": "1 + 1"})).await;
    assert_eq!(ran["results"][0]["data"]["text/plain"], "2");
    assert_eq!(ran["kernel"]["restarted"], json!(true), "{ran}");
    let notebook = third.get(&again(&third, &cell).path("/notebook")).await;
    let sources: Vec<String> = notebook.json["cells"].as_array().unwrap().iter().map(|c| text(&c["source"])).collect();
    assert!(sources.iter().any(|s| s.contains("kept.txt")) && sources.iter().any(|s| s == "prepared"), "{sources:?}");
    third.finish().await.unwrap();
}

const ONE_A_SECOND: &str = "import time
for n in range(6):
    print(n, flush=True)
    open('lines', 'a').write(f'{n} ')
    time.sleep(1)
x = open('lines').read()
x";

/// All of an execution's events, each by its number.
async fn whole_log(server: &Arc<Server>, execution: &str) -> Vec<server::Seen> {
    let events = server.follow(execution, 0).await.rest().await;
    let numbers: Vec<u64> = events.iter().map(|event| event.seq).collect();
    assert_eq!(numbers, (1..=events.len() as u64).collect::<Vec<_>>(), "{events:?}");
    assert_eq!(events.last().unwrap().kind, "execution.completed");
    events
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_and_what_waits_goes_on_after_a_kill_and_nothing_runs_twice() {
    let (first, pid) = Server::spawn(SETTINGS).await;
    let cell = first.create(json!({"template": "small"})).await;
    let running = cell.background_until_output(ONE_A_SECOND).await;
    let mut follower = first.follow(&running, 0).await;
    let mut seen = vec![];
    while server::joined(&seen, "stdout") != "0\n1\n" {
        seen.push(follower.next().await.expect("an event"));
    }
    let waiting = cell.background("x + 'and once more'").await;
    let asking = first.create(json!({"template": "small"})).await;
    let request = json!({"code": "print(input('name? '), input('age? '))", "stdin": "interactive", "background": true});
    let asking_id = text(&first.post(&asking.path("/executions"), &request).await.json["id"]);
    first.follow(&asking_id, 0).await.until("input.requested").await;
    first.kill(pid).await;

    let (second, pid) = first.spawn_again().await;
    // From where the reader was.
    let last = seen.last().unwrap().seq;
    let rest = second.follow(&running, last).await.rest().await;
    assert_eq!(rest[0].seq, last + 1);
    assert_eq!(server::joined(&rest, "stdout"), "2\n3\n4\n5\n");
    let log = whole_log(&second, &running).await;
    assert_eq!(server::joined(&log, "stdout"), "0\n1\n2\n3\n4\n5\n");
    let ran = second.execution(&running).await;
    assert_eq!(ran["status"], "ok", "{ran}");
    assert_eq!(ran["results"][0]["data"]["text/plain"], "'0 1 2 3 4 5 '", "once");
    let waited = second.ended(&waiting).await;
    assert_eq!(waited["results"][0]["data"]["text/plain"], "'0 1 2 3 4 5 and once more'", "{waited}");
    // What was asked can be answered still.
    let answer = async |server: &Arc<Server>, line: &str| {
        let path = format!("/v1/executions/{asking_id}/input");
        let answered = server.post(&path, &json!({"text": line})).await;
        assert_eq!(answered.status, 200, "{}", answered.text);
    };
    answer(&second, "Ada").await;
    let mut follower = second.follow(&asking_id, 0).await;
    let mut asked = 0;
    while asked < 2 {
        asked += usize::from(follower.next().await.expect("an event").kind == "input.requested");
    }
    second.kill(pid).await;

    // What has ended is there too, with its events, and so is what is asked.
    let (third, _) = second.spawn_again().await;
    assert_eq!(third.execution(&running).await, ran);
    assert_eq!(whole_log(&third, &running).await.len(), log.len());
    answer(&third, "36").await;
    assert_eq!(third.ended(&asking_id).await["stdout"], "Ada 36\n");
    third.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_asked_twice_with_a_key_is_made_once() {
    let (first, pid) = Server::spawn(SETTINGS).await;
    let ask = async |server: &Arc<Server>, path: &str, key: &str, body: Value| {
        server.send(server.request(Method::POST, path).header("idempotency-key", key).json(&body)).await
    };
    let small = json!({"template": "small"});
    // Two at once: one is told to come again, or gets what the other made.
    let (one, two) = tokio::join!(
        ask(&first, "/v1/sessions", "create", small.clone()),
        ask(&first, "/v1/sessions", "create", small.clone())
    );
    let (made, other) = if one.status == 201 { (one, two) } else { (two, one) };
    other.problem(409, "idempotency-in-flight");
    let again = ask(&first, "/v1/sessions", "create", small.clone()).await;
    assert_eq!((again.status, &again.json["id"]), (201, &made.json["id"]));
    let other = json!({"template": "small", "labels": {"a": "b"}});
    ask(&first, "/v1/sessions", "create", other).await.problem(422, "idempotency-mismatch");
    let executions = format!("/v1/sessions/{}/executions", text(&made.json["id"]));
    ask(&first, &executions, "create", json!({"code": "1"})).await.problem(422, "idempotency-mismatch");
    let bad = first.request(Method::POST, "/v1/sessions").header("idempotency-key", "").json(&small);
    assert_eq!(first.send(bad).await.pointers(), ["Idempotency-Key"]);

    let count = json!({"code": "n = globals().get('n', 0) + 1\nn"});
    let ran = ask(&first, &executions, "count", count.clone()).await.json;
    assert_eq!(ask(&first, &executions, "count", count.clone()).await.json, ran);
    // What failed may be tried again.
    let path = "/v1/sessions";
    let failing = json!({"template": "small", "setup": "1 / 0"});
    ask(&first, path, "fail", failing.clone()).await.problem(422, "setup-failed");
    assert_eq!(ask(&first, path, "fail", small.clone()).await.status, 201);
    let contexts = format!("/v1/sessions/{}/contexts", text(&made.json["id"]));
    let context = ask(&first, &contexts, "context", json!({})).await;
    let run = json!({"template": "small", "code": "import time\ntime.sleep(1)\n6 * 7", "background": true});
    let running = ask(&first, "/v1/runs", "run", run.clone()).await;
    assert_eq!((context.status, running.status), (201, 202));
    first.kill(pid).await;

    let (second, _) = first.spawn_again().await;
    let again = ask(&second, "/v1/sessions", "create", small).await;
    assert_eq!((again.status, &again.json["id"]), (201, &made.json["id"]));
    assert_eq!(ask(&second, &executions, "count", count).await.json["results"], ran["results"]);
    let cell = Cell { server: Arc::clone(&second), id: text(&made.json["id"]), view: Value::Null };
    assert_eq!(cell.value("n").await, "1");
    assert_eq!(ask(&second, &contexts, "context", json!({})).await.json["id"], context.json["id"]);
    assert_eq!(ask(&second, "/v1/runs", "run", run).await.json["id"], running.json["id"]);
    assert_eq!(second.ended(&text(&running.json["id"])).await["status"], "ok");
    second.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ends_while_no_server_is_there_is_told_by_the_next() {
    let (first, pid) = Server::spawn(SETTINGS).await;
    let cell = first.create(json!({"template": "small"})).await;
    let code = "import time\nprint('a', flush=True)\ntime.sleep(1)\nprint('b')\n1 / 0";
    let failing = cell.background_until_output(code).await;
    let late = first.create(json!({"template": "small"})).await;
    let request = json!({"code": "print('a', flush=True)\nimport time\ntime.sleep(60)", "timeout_seconds": 1.5, "background": true});
    let late = text(&first.post(&late.path("/executions"), &request).await.json["id"]);
    first.follow(&late, 0).await.until("stdout").await;
    let run = json!({"template": "small", "code": "import time\ntime.sleep(2)\n6 * 7", "background": true});
    let run = text(&first.post("/v1/runs", &run).await.json["id"]);
    first.kill(pid).await;
    tokio::time::sleep(Duration::from_secs(3)).await;

    let (second, _) = first.spawn_again().await;
    let failed = second.ended(&failing).await;
    assert_eq!((&failed["status"], &failed["error"]["name"]), (&json!("error"), &json!("ZeroDivisionError")));
    assert_eq!(failed["stdout"], "a\nb\n");
    let late = second.ended(&late).await;
    assert_eq!((&late["status"], &late["stop"]["step"]), (&json!("timeout"), &json!("interrupt")), "{late}");
    // A run goes on too, and its container goes with it.
    let ran = second.ended(&run).await;
    assert_eq!(ran["results"][0]["data"]["text/plain"], "42", "{ran}");
    let of_run = Cell { server: Arc::clone(&second), id: text(&ran["session_id"]), view: Value::Null };
    of_run.wait("ended").await;
    second.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_who_waits_while_the_server_stops_is_told_where_to_go_on() {
    let settings = format!("{SETTINGS}\n[server]\ndrain_timeout = \"1s\"\n[drain]\ncontainers = \"keep\"");
    let first = Server::start(&settings).await;
    let cell = first.create(json!({"template": "small"})).await;
    let request = first.request(Method::POST, &cell.path("/executions")).json(&json!({"code": ONE_A_SECOND}));
    let stopping = async {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        first.start_again_keeping().await
    };
    let (told, second) = tokio::join!(request.send(), stopping);
    let told = told.expect("an answer");
    assert_eq!(told.status(), 202);
    let location = text(&json!(told.headers()["location"].to_str().unwrap()));
    let told: Value = told.json().await.expect("an execution");
    assert_eq!((told["status"].clone(), location), (json!("running"), format!("/v1/executions/{}", text(&told["id"]))));
    let ran = second.ended(&text(&told["id"])).await;
    assert_eq!((&ran["status"], &ran["stdout"]), (&json!("ok"), &json!("0\n1\n2\n3\n4\n5\n")));
    again(&second, &cell).delete().await;
    second.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_told_to_leaves_sessions_for_the_next() {
    let first = Server::start(&format!("{SETTINGS}\n[drain]\ncontainers = \"keep\"")).await;
    let cell = first.create(json!({"template": "small"})).await;
    cell.value("x = 3; x").await;
    let second = first.start_again_keeping().await;
    assert_eq!(again(&second, &cell).value("x").await, "3");
    again(&second, &cell).delete().await;
    second.finish().await.unwrap();
}

/// The name on the engine is one installation's, also while that one does not run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_is_free_for_another_data_folder_only_when_nothing_is_left() {
    let (first, pid) = Server::spawn(SETTINGS).await;
    let cell = first.create(json!({"template": "small"})).await;
    cell.value("x = 5; x").await;
    let lock = format!("cellblock-{}-lock", first.instance);
    let refused = async |server: &Server, when: &str| {
        let told = server.rival().await.err().unwrap_or_else(|| panic!("{when}: a second server started"));
        let words = [format!("engine.instance = \"{}\"", server.instance), format!("`docker rm {lock}`")];
        assert!(words.iter().all(|word| told.contains(word)), "{when}: {told}");
        assert_eq!(cell.containers().await.len(), 1, "{when}");
    };
    refused(&first, "while the first runs").await;
    assert_eq!(cell.value("x").await, "5");

    // Somebody tidies up: it is made again.
    remove(&first, &lock).await;
    let report = first.post("/v1/admin/reconcile", &Value::Null).await;
    assert_eq!((report.status, &report.json["cells_removed"]), (200, &json!([])), "{}", report.text);
    refused(&first, "after the lock was removed").await;

    first.kill(pid).await;
    refused(&first, "while nobody runs").await;
    let (second, _) = first.spawn_again().await;
    assert_eq!(again(&second, &cell).value("x").await, "5");
    let rival = second.rival().await.err().expect("a refusal");
    assert!(rival.contains(&lock), "{rival}");
    second.finish().await.unwrap();

    let fresh = second.rival().await.unwrap();
    fresh.cell().await.works().await;
    fresh.finish().await.unwrap();
}

fn signal(pid: u32, name: &str) {
    let sent = std::process::Command::new("kill").args([name, &pid.to_string()]).status();
    assert!(sent.expect("a command").success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_drains_a_server_as_a_signal_does() {
    let settings = format!("{SETTINGS}\n[server]\ndrain_timeout = \"50s\"\n[drain]\ncontainers = \"keep\"");
    let (first, pid) = Server::spawn(&settings).await;
    let cell = first.create(json!({"template": "small"})).await;
    cell.value("x = 3; x").await;
    let code = "import time\nprint('on', flush=True)\ntime.sleep(2)\ny = 9";
    let running = cell.background_until_output(code).await;
    let events = first.follow(&running, 0).await;
    let began = Instant::now();
    let told = first.post("/v1/admin/drain", &Value::Null).await;
    assert_eq!(told.status, 202, "{}", told.text);
    let expected =
        json!({"status": "draining", "sessions": 1, "executions": 1, "grace_seconds": 50.0, "containers": "keep"});
    assert_eq!(told.json, expected);
    first.send(first.bare(Method::GET, "/readyz")).await.problem(503, "draining");
    first.post("/v1/sessions", &json!({"template": "small"})).await.problem(503, "draining");
    assert_eq!(first.post("/v1/admin/drain", &Value::Null).await.json, expected, "twice is once");
    let last = events.rest().await.pop().unwrap();
    assert_eq!(
        (last.kind.as_str(), &last.data["execution"]["status"]),
        ("execution.completed", &json!("ok")),
        "{}",
        last.data
    );
    first.gone(pid).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(30), "the grace ends with what runs: {:?}", began.elapsed());

    // A signal from a terminal takes the grace away, and the end is an orderly one all the same.
    let (second, pid) = first.spawn_again().await;
    let cell = again(&second, &cell);
    assert_eq!(cell.value("x, y").await, "(3, 9)");
    let endless = "import time\nprint('on', flush=True)\ntime.sleep(500)";
    cell.background_until_output(endless).await;
    let began = Instant::now();
    assert_eq!(second.post("/v1/admin/drain", &Value::Null).await.status, 202);
    signal(pid, "-INT");
    second.gone(pid).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());

    // The second signal ends the process at once, whichever it is.
    let (third, pid) = second.spawn_again().await;
    let cell = again(&third, &cell);
    assert_eq!(third.post(&cell.path("/restart"), &Value::Null).await.status, 200);
    cell.background_until_output(endless).await;
    signal(pid, "-TERM");
    let ready = || third.send(third.bare(Method::GET, "/readyz"));
    while ready().await.status == 200 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let began = Instant::now();
    signal(pid, "-TERM");
    let ended = third.gone(pid).await.unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    // As the system writes an exit status of 130.
    assert!(ended.contains("(33280)"), "{ended}");

    let (last, _) = third.spawn_again().await;
    again(&last, &cell).delete().await;
    last.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_of_operators_need_their_scope() {
    let server = Server::start_with_tenants(SETTINGS).await;
    for path in ["/v1/admin/drain", "/v1/admin/reconcile"] {
        server.send(server.bare(Method::POST, path)).await.problem(401, "unauthenticated");
        for request in [server.request(Method::POST, path), server.foreign(Method::POST, path)] {
            let refused = server.send(request).await;
            assert!(text(&refused.problem(403, "forbidden")["detail"]).contains("admin"), "{}", refused.text);
        }
    }
    assert_eq!(server.get("/readyz").await.status, 200, "nothing has happened");
    server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_round_on_demand_removes_what_nobody_knows() {
    let server = Server::start(SETTINGS).await;
    let cell = server.create(json!({"template": "small"})).await;
    let labels = |role: &str| {
        let labels = [("io.cellblock.instance", server.instance.as_str()), ("io.cellblock.role", role)];
        labels.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    };
    // A cell and a volume of an earlier process, as the engine would have them.
    let orphan = format!("cellblock-{}-ses00000000000000000000000000-1", server.instance);
    let body = bollard::models::ContainerCreateBody {
        image: Some("cellblock/python:latest".to_owned()),
        labels: Some(labels("cell")),
        ..Default::default()
    };
    // Under another name at first: what appears under one of ours that nobody waits for is gone before it is looked for.
    let other = format!("other-{}", server.instance);
    let options = bollard::query_parameters::CreateContainerOptionsBuilder::default().name(&other).build();
    server.docker.create_container(Some(options), body).await.unwrap();
    let options = bollard::query_parameters::RenameContainerOptionsBuilder::default().name(&orphan).build();
    server.docker.rename_container(&other, options).await.unwrap();
    let volume = format!("cellblock-guest-{}-000000000000", server.instance);
    let request = bollard::models::VolumeCreateRequest {
        name: Some(volume.clone()),
        labels: Some(labels("guest")),
        ..Default::default()
    };
    server.docker.create_volume(request).await.unwrap();

    let report = server.post("/v1/admin/reconcile", &Value::Null).await;
    let found = json!({"cells_seen": 2, "cells_removed": [orphan], "sessions_told": [], "volumes_removed": [volume], "errors": []});
    assert_eq!((report.status, &report.json), (200, &found), "{}", report.text);
    assert_eq!(server.volumes().await.len(), 1, "the guest's own stays");
    assert_eq!(server.containers("").await, cell.containers().await);
    let again = server.post("/v1/admin/reconcile", &Value::Null).await.json;
    assert_eq!((&again["cells_seen"], &again["cells_removed"]), (&json!(1), &json!([])), "{again}");
    cell.works().await;
    server.finish().await.unwrap();
}

/// A word that a session was told to note, and the execution that was accepted for it, if that was heard.
type Note = (String, Option<String>);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_go_on_with_a_newer_server() {
    let first = Server::start(&format!("{SETTINGS}\n[drain]\ncontainers = \"keep\"")).await;
    let old = first.create(json!({"template": "small"})).await;
    old.value("x = 3; x").await;
    let second = first.start_newer_keeping().await;
    let old = again(&second, &old);
    assert_eq!(old.value("x").await, "3");
    let new = second.create(json!({"template": "small"})).await;
    new.works().await;
    assert_eq!(second.volumes().await.len(), 2, "each has the guest that it began with");
    assert_eq!(second.post(&old.path("/restart"), &Value::Null).await.status, 200);
    old.works().await;
    old.delete().await;
    assert_eq!(second.post("/v1/admin/reconcile", &Value::Null).await.status, 200);
    assert_eq!(second.volumes().await.len(), 1);
    new.delete().await;
    second.finish().await.unwrap();
}

/// The database knows of nothing that is not over: it agrees with an engine that has no container.
fn all_is_over(server: &Server) {
    let copy = tempfile::tempdir().unwrap();
    state::backup(server.data(), &state::path_in(copy.path())).unwrap();
    let (_, left) = State::open(copy.path(), None).unwrap();
    let live: Vec<_> = left.sessions.iter().filter(|s| !matches!(s.stage, Stage::Ended(..))).map(|s| s.id).collect();
    assert!(live.is_empty(), "{live:?}");
    let open: Vec<_> = left.executions.iter().filter(|e| !e.progress.status.is_final()).map(|e| e.id).collect();
    assert!(open.is_empty(), "{open:?}");
}

/// What callers were told, and so must find.
#[derive(Default)]
struct Told {
    /// The word in each live session's memory.
    words: Mutex<BTreeMap<String, String>>,
    /// What each live session was told to note.
    notes: Mutex<BTreeMap<String, Vec<Note>>>,
    deleted: Mutex<Vec<String>>,
    over: AtomicBool,
}

/// One caller. It tries everything again that was not answered, but what must not be done twice.
async fn caller(server: Arc<Server>, told: Arc<Told>, seed: u64) {
    let mut chance = Chance::new(seed);
    let ask = async |method: Method, path: &str, body: Value| {
        let request = server.request(method, path).json(&body).timeout(Duration::from_secs(30));
        let reply = request.send().await.ok()?;
        let status = reply.status().as_u16();
        Some((status, reply.json::<Value>().await.ok()?))
    };
    while !told.over.load(Ordering::Relaxed) {
        let mine: Vec<String> = told.words.lock().unwrap().keys().cloned().collect();
        if mine.len() < 4 || chance.percent(25) {
            // Said again with its key, it makes no second one.
            let key = format!("{seed}-{}", chance.below(1 << 30));
            let made = loop {
                let request = server.request(Method::POST, "/v1/sessions").header("idempotency-key", &key);
                let request = request.json(&json!({"template": "small"})).timeout(Duration::from_secs(30));
                match request.send().await {
                    Ok(reply) if reply.status() == 201 => {
                        let Ok(made) = reply.json::<Value>().await else { continue };
                        break made;
                    }
                    _ if told.over.load(Ordering::Relaxed) => return,
                    _ => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            };
            let (id, word) = (text(&made["id"]), format!("w{}", chance.below(1 << 30)));
            let path = format!("/v1/sessions/{id}/executions");
            // Saying it again changes nothing, so it is said until it was heard.
            loop {
                let said = ask(Method::POST, &path, json!({"code": format!("word = '{word}'")})).await;
                match said {
                    Some((200, ran)) if ran["status"] == "ok" => break,
                    Some((status @ (404 | 410), problem)) => {
                        panic!("{id} was acknowledged and is gone: {status} {problem}")
                    }
                    _ if told.over.load(Ordering::Relaxed) => return,
                    _ => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
            told.words.lock().unwrap().insert(id, word);
        } else if mine.len() > 6 {
            // Out of the books first: whether it was heard is not known.
            let id = chance.one_of(&mine).clone();
            if told.words.lock().unwrap().remove(&id).is_some() {
                told.deleted.lock().unwrap().push(id.clone());
                let _ = ask(Method::DELETE, &format!("/v1/sessions/{id}"), json!({})).await;
            }
        } else if chance.percent(40) {
            let id = chance.one_of(&mine).clone();
            let note = format!("n{}", chance.below(1 << 30));
            let code = format!("import time\ntime.sleep({})\n_ = open('notes', 'a').write('{note} ')", chance.below(3));
            let path = format!("/v1/sessions/{id}/executions");
            let accepted = ask(Method::POST, &path, json!({"code": code, "background": true})).await;
            let execution = accepted.filter(|(status, _)| *status == 202).map(|(_, view)| text(&view["id"]));
            told.notes.lock().unwrap().entry(id).or_default().push((note, execution));
        } else {
            let id = chance.one_of(&mine).clone();
            let Some(word) = told.words.lock().unwrap().get(&id).cloned() else { continue };
            let path = format!("/v1/sessions/{id}/executions");
            if let Some((200, ran)) = ask(Method::POST, &path, json!({"code": "print(word)"})).await
                && ran["status"] == "ok"
            {
                assert_eq!(ran["stdout"], format!("{word}\n"), "{id}");
            }
        }
    }
}

/// What was accepted has run once, and what was not heard of once at most.
async fn noted_once(cell: &Cell, notes: Vec<Note>) {
    let noted = cell.value("__import__('os').path.exists('notes') and open('notes').read()").await;
    for (note, execution) in notes {
        let times = noted.matches(&note).count();
        let Some(execution) = execution else {
            assert!(times <= 1, "{note}, of which nothing was heard, ran {times} times");
            continue;
        };
        let ended = cell.server.ended(&execution).await;
        assert_eq!((&ended["status"], times), (&json!("ok"), 1), "{execution}: {ended}");
    }
}

/// Of all pages.
async fn all_sessions(server: &Server) -> Vec<Value> {
    let (mut found, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = server.get(&format!("/v1/sessions?limit=100{cursor}")).await.json;
        found.extend(page["sessions"].as_array().unwrap().clone());
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return found,
        }
    }
}

async fn kills(seed: u64, count: usize) {
    println!("seed {seed}");
    let mut chance = Chance::new(seed);
    // Some are claimed, some are started for their callers, and both are killed at.
    let users = format!("[engine]\nuid_first = {}\nuid_last = {}\n", USERS.start(), USERS.end());
    let pooled = format!("{SETTINGS}[templates.small.pool]\nmin = 1\nmax = 3\n{users}");
    let (mut server, mut pid) = Server::spawn(&pooled).await;
    let told = Arc::new(Told::default());
    // Callers keep the address and the key of the first; both stay.
    let callers: Vec<_> = (1..=WORKERS)
        .map(|n| cellblock::task::spawn("caller", caller(Arc::clone(&server), Arc::clone(&told), seed + n)))
        .collect();
    for _ in 0..count {
        tokio::time::sleep(Duration::from_millis(50 + chance.below(2500) as u64)).await;
        server.kill(pid).await;
        (server, pid) = server.spawn_again().await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    told.over.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.await.unwrap();
    }
    let words = std::mem::take(&mut *told.words.lock().unwrap());
    println!("{} sessions live, {} were ended", words.len(), told.deleted.lock().unwrap().len());
    assert!(!words.is_empty());
    for (id, word) in &words {
        let cell = Cell { server: Arc::clone(&server), id: id.clone(), view: Value::Null };
        assert_eq!(cell.value("word").await, format!("'{word}'"), "{id}");
        let notes = told.notes.lock().unwrap().remove(id).unwrap_or_default();
        noted_once(&cell, notes).await;
    }
    // Those whose creation or end was not answered may be there or not; then they are whole.
    for session in all_sessions(&server).await.into_iter().filter(|session| session["state"] != "ended") {
        let id = text(&session["id"]);
        let cell = Cell { server: Arc::clone(&server), id: id.clone(), view: Value::Null };
        cell.wait("ready").await;
        assert_eq!(cell.containers().await.len(), 1, "{id}");
        cell.works().await;
        cell.delete().await;
    }
    let ids = server.containers("").await.into_iter().map(|name| name.rsplit_once('-').unwrap().0.to_owned());
    let ids: Vec<_> = ids.collect();
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len(), "none of the pool's is there twice");
    assert!(ids.len() <= 3, "{ids:?}");
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    assert!(files < 64, "the server holds {files} files open");
    assert_eq!(server.volumes().await.len(), 1, "the guest's");
    server.finish().await.unwrap();
    all_is_over(&server);
    assert_eq!(processes_of(&USERS), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_kills_at_random() {
    kills(1, 5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes; `make soak` runs it"]
async fn a_hundred_kills_at_random() {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    kills(seed, 100).await;
}
