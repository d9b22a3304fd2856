//! Pause and resume with real containers: what a frozen one uses and keeps, who resumes it, and what becomes of it when servers come and go.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use server::{Cell, NEVER, Server, text};

/// A thread that never rests, and something to remember.
const SPIN: &str = "
import threading
kept, turns = 'kept', 0
def spin():
    global turns
    while True:
        turns += 1
threading.Thread(target=spin, daemon=True).start()
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paused_cells() {
    let server = Server::start("").await;
    let cases = cases![server;
        a_paused_session_gets_no_cpu_and_keeps_its_memory,
        a_pause_that_is_longer_than_a_links_patience_breaks_nothing,
        what_runs_is_not_paused,
        looks_leave_it_paused_and_work_resumes_it,
        a_paused_session_is_deleted,
        containers_that_others_pause_or_resume,
        an_idle_session_is_paused_and_ends_later,
    ];
    server.run_and_finish(4, cases).await;
}

async fn pause(cell: &Cell) -> Value {
    let reply = cell.server.post(&cell.path("/pause"), &Value::Null).await;
    assert_eq!((reply.status, &reply.json["state"]), (200, &json!("paused")), "{}", reply.text);
    reply.json
}

/// The machine's number of the process of a cell's kernel.
async fn kernel(cell: &Cell) -> u32 {
    let name = &cell.containers().await[0];
    let inside = cell.server.docker.top_processes(name, None).await.unwrap().processes.unwrap();
    let kernel = inside.into_iter().find(|p| p.iter().any(|part| part.contains("ipykernel"))).expect("a kernel");
    kernel[1].parse().unwrap()
}

/// CPU time that a process has used, in ticks of the machine's clock.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // After the name, which may hold anything: proc(5), fields 14 and 15.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

async fn is_frozen(cell: &Cell) -> bool {
    let name = &cell.containers().await[0];
    cell.server.docker.inspect_container(name, None).await.unwrap().state.unwrap().paused.unwrap()
}

async fn a_paused_session_gets_no_cpu_and_keeps_its_memory(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value(SPIN).await;
    let pid = kernel(&cell).await;
    let used = |before: u64| ticks(pid) - before;
    let second = Duration::from_secs(1);
    let before = ticks(pid);
    tokio::time::sleep(second).await;
    assert!(used(before) > 5, "the thread spins");
    let paused = pause(&cell).await;
    assert!(text(&paused["idle_deadline"]) > text(&cell.view["created_at"]), "{paused}");
    assert!(is_frozen(&cell).await);
    let before = ticks(pid);
    tokio::time::sleep(2 * second).await;
    assert_eq!(used(before), 0, "a frozen process runs");
    assert_eq!(cell.value("kept").await, "'kept'");
    assert_eq!((&cell.look().await["state"], kernel(&cell).await), (&json!("ready"), pid));
    assert!(used(before) > 0, "the thread spins again");
    assert!(!is_frozen(&cell).await);
    let turns = cell.value("turns").await;
    assert!(turns.parse::<u64>().unwrap() > 0, "{turns}");
}

/// The link is asked every ten seconds whether it lives, and is dead fifteen seconds later.
async fn a_pause_that_is_longer_than_a_links_patience_breaks_nothing(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("x = 1").await;
    pause(&cell).await;
    tokio::time::sleep(Duration::from_secs(32)).await;
    assert_eq!(cell.look().await["state"], "paused");
    let began = Instant::now();
    assert_eq!(cell.value("x").await, "1");
    let took = began.elapsed();
    println!("resumed and answered in {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
}

async fn what_runs_is_not_paused(server: Arc<Server>) {
    let cell = server.cell().await;
    let running = cell.background_until_output("print(1, flush=True)\nwhile True: pass").await;
    let refused = server.post(&cell.path("/pause"), &Value::Null).await;
    let detail = text(&refused.problem(409, "state-conflict")["detail"]);
    assert!(detail.contains("something runs or waits"), "{detail}");
    server.post(&format!("/v1/executions/{running}/cancel"), &Value::Null).await;
    assert_eq!(server.ended(&running).await["status"], "cancelled");
    pause(&cell).await;
    cell.works().await;
}

async fn looks_leave_it_paused_and_work_resumes_it(server: Arc<Server>) {
    let cell = server.create(json!({"template": "python", "labels": {"paused": "looked-at"}})).await;
    cell.value("open('kept.txt', 'w').write('x')").await;
    pause(&cell).await;
    for path in ["", "/wait?state=paused", "/contexts", "/notebook"] {
        let reply = server.get(&cell.path(path)).await;
        assert_eq!(reply.status, 200, "{path}: {}", reply.text);
    }
    let listed = server.get("/v1/sessions?state=paused&label=paused:looked-at").await;
    assert_eq!(listed.json["sessions"][0]["id"], json!(cell.id), "{}", listed.text);
    assert_eq!(server.patch(&cell.path(""), &json!({"idle_seconds": 500})).await.json["state"], "paused");
    assert_eq!(server.post(&cell.path("/keepalive"), &Value::Null).await.json["state"], "paused");
    assert!(is_frozen(&cell).await);
    for path in ["/resume", "/resume", "/interrupt", "/restart"] {
        let reply = server.post(&cell.path(path), &Value::Null).await;
        assert_eq!((reply.status, &reply.json["state"]), (200, &json!("ready")), "{path}: {}", reply.text);
        pause(&cell).await;
    }
    let made = server.post(&cell.path("/contexts"), &json!({})).await;
    assert_eq!(made.status, 201, "{}", made.text);
    pause(&cell).await;
    assert_eq!(server.delete(&cell.path(&format!("/contexts/{}", text(&made.json["id"])))).await.status, 200);
    pause(&cell).await;
    // Several at once share one resume, and come in their order.
    let three = ["n = [1]", "n.append(2)", "n.append(3)"].map(|code| cell.background(code));
    for execution in futures_util::future::join_all(three).await {
        assert!(["ok", "error"].contains(&text(&server.ended(&execution).await["status"]).as_str()));
    }
    assert_eq!(cell.value("open('kept.txt').read()").await, "'x'");
}

async fn a_paused_session_is_deleted(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value(SPIN).await;
    pause(&cell).await;
    let began = Instant::now();
    cell.delete().await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(cell.containers().await, Vec::<String>::new());
    server.post(&cell.path("/resume"), &Value::Null).await.problem(410, "session-ended");
    server.post(&cell.path("/pause"), &Value::Null).await.problem(410, "session-ended");
}

async fn containers_that_others_pause_or_resume(server: Arc<Server>) {
    let cell = server.cell().await;
    let name = cell.containers().await[0].clone();
    let counting = "import time\nfor n in range(20):\n    print(n, flush=True)\n    time.sleep(0.1)\n";
    let running = cell.background_until_output(counting).await;
    server.docker.pause_container(&name).await.unwrap();
    let ran = server.ended(&running).await;
    assert_eq!((&ran["status"], text(&ran["stdout"]).lines().count()), (&json!("ok"), 20), "{ran}");
    assert_eq!(ran["kernel"]["restarted"], json!(false));
    assert!(!is_frozen(&cell).await);

    pause(&cell).await;
    server.docker.unpause_container(&name).await.unwrap();
    cell.wait("ready").await;
    cell.works().await;
}

async fn an_idle_session_is_paused_and_ends_later(server: Arc<Server>) {
    let timeouts = json!({"idle_seconds": 2, "paused_seconds": 4});
    let cell = server.create(json!({"template": "python", "on_idle": "pause", "timeouts": timeouts})).await;
    assert_eq!((&cell.view["on_idle"], &cell.view["timeouts"]["paused_seconds"]), (&json!("pause"), &json!(4.0)));
    cell.value("x = 1").await;
    cell.wait("paused").await;
    assert_eq!(cell.value("x").await, "1");
    let paused = cell.wait("paused").await;
    let began = Instant::now();
    assert!(!paused["idle_deadline"].is_null(), "{paused}");
    let ended = tokio::time::timeout(NEVER, cell.wait("ended")).await.unwrap();
    assert_eq!(ended["end_reason"], "idle");
    assert!((2.0..8.0).contains(&began.elapsed().as_secs_f64()), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_session_outlives_its_server_and_its_lease() {
    // Longer than the ten seconds after which a quiet link is asked whether it lives, which is what the guest hears of it.
    let settings = "[engine]\norphan_timeout = \"15s\"";
    let (first, pid) = Server::spawn(settings).await;
    let cell = first.create(json!({"template": "python"})).await;
    let busy = first.create(json!({"template": "python"})).await;
    busy.value(SPIN).await;
    cell.value("x = 41; open('kept.txt', 'w').write('y')").await;
    let paused = pause(&cell).await;
    pause(&busy).await;
    let left = first.create(json!({"template": "python"})).await;
    let endless = left.background_until_output("print('on', flush=True)\nwhile True: pass").await;
    let container = left.containers().await.remove(0);
    first.kill(pid).await;
    // Longer than the lease: what is frozen does not count it.
    tokio::time::sleep(Duration::from_secs(18)).await;
    // One that is not frozen has ended by itself, whatever it was doing.
    let state = first.docker.inspect_container(&container, None).await.unwrap().state.unwrap();
    assert_eq!(state.running, Some(false), "{state:?}");
    let (second, pid) = first.spawn_again().await;
    let ended = second.ended(&endless).await;
    assert_eq!(ended["status"], "lost", "{ended}");
    let left = second.get(&left.path("")).await.json;
    assert_eq!(left["end_reason"], "lost", "{left}");
    assert!(text(&left["end_detail"]).contains("stopped from outside"), "{left}");
    let again =
        |server: &Arc<Server>, cell: &Cell| Cell { server: Arc::clone(server), id: cell.id.clone(), view: Value::Null };
    let (cell, busy) = (again(&second, &cell), again(&second, &busy));
    let seen = cell.wait("paused").await;
    for field in ["idle_deadline", "expires_at"] {
        assert_eq!(text(&seen[field])[..19], text(&paused[field])[..19], "{field}");
    }
    assert!(is_frozen(&cell).await);
    assert_eq!(cell.value("x + 1, open('kept.txt').read()").await, "(42, 'y')");
    assert_eq!(busy.value("kept").await, "'kept'");

    // A server that is killed while it pauses and resumes: whatever it got to, the session goes on.
    let mut server = second;
    let mut pid = pid;
    for wait in [0, 10, 20, 40, 80, 160] {
        let cell = again(&server, &cell);
        let hammer = async {
            loop {
                for path in ["/pause", "/resume"] {
                    // The server is killed meanwhile.
                    let _ = server.request(Method::POST, &cell.path(path)).send().await;
                }
            }
        };
        tokio::select! {
            () = hammer => {}
            () = tokio::time::sleep(Duration::from_millis(200 + wait)) => {}
        }
        server.kill(pid).await;
        (server, pid) = server.spawn_again().await;
        let cell = again(&server, &cell);
        assert_eq!(cell.value("x").await, "41", "after a kill {wait} ms in");
    }
    server.finish().await.unwrap();
}
