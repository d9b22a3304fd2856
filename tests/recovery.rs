//! A server that is killed, at any moment: the next one goes on with what lives, and nothing is left of what does not.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;
#[path = "support/watch.rs"]
mod watch;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use server::{Cell, Server, text};
use watch::Chance;

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
    working.background_until_output("import time\nprint('on', flush=True)\ntime.sleep(3)\nz = 9").await;
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

/// What callers were told, and so must find.
#[derive(Default)]
struct Told {
    /// The word in each live session's memory.
    words: Mutex<BTreeMap<String, String>>,
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
            let made = ask(Method::POST, "/v1/sessions", json!({"template": "small"})).await;
            let Some((201, made)) = made else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
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

async fn kills(seed: u64, count: usize) {
    println!("seed {seed}");
    let mut chance = Chance::new(seed);
    let (mut server, mut pid) = Server::spawn(SETTINGS).await;
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
    }
    // Those whose creation or end was not answered may be there or not; then they are whole.
    let listed = server.get("/v1/sessions?limit=100").await.json["sessions"].clone();
    for session in listed.as_array().unwrap().iter().filter(|session| session["state"] != "ended") {
        let id = text(&session["id"]);
        let cell = Cell { server: Arc::clone(&server), id: id.clone(), view: Value::Null };
        cell.wait("ready").await;
        assert_eq!(cell.containers().await.len(), 1, "{id}");
        cell.works().await;
        cell.delete().await;
    }
    server.finish().await.unwrap();
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
