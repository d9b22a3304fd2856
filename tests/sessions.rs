//! Sessions and executions beside each other, over HTTP: who sees whom, what waits for what, and how things end.

#[path = "support/server.rs"]
mod server;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bollard::body_full;
use bollard::models::ContainerCreateBody;
use bollard::query_parameters::{
    CommitContainerOptionsBuilder, CreateContainerOptionsBuilder, RemoveContainerOptionsBuilder,
    RemoveImageOptionsBuilder, UploadToContainerOptionsBuilder,
};
use futures_util::future::join_all;
use serde_json::{Value, json};
use server::{Cell, Form, NEVER, Server, joined, text};

const SETTINGS: &str = r#"
[limits]
queued_executions = 3
"#;

/// Held by the test that runs: both measure time.
static MACHINE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_cells() {
    let _alone = MACHINE.lock().await;
    let server = Server::start(SETTINGS).await;
    let alone = cases![server; ten_sessions_at_once_see_nothing_of_each_other];
    let cases = cases![server;
        two_executions_at_once_run_in_order,
        sessions_run_beside_each_other,
        an_execution_outlives_its_caller,
        an_execution_ends_with_its_caller_if_that_was_asked,
        events_are_replayed_from_anywhere,
        waiting_and_running_executions_are_cancelled,
        a_full_queue_refuses,
        a_restart_keeps_files_and_loses_variables,
        a_container_that_is_removed_from_outside_is_lost,
        a_first_process_that_is_killed_from_outside_is_lost,
        sessions_are_found_by_name_and_label,
        a_session_that_is_starting_says_so,
        a_session_that_is_deleted_while_it_starts_leaves_nothing,
    ];
    let times = cases![server;
        an_idle_session_ends,
        an_old_session_ends_even_if_busy,
        a_busy_session_is_not_idle,
        a_keepalive_moves_the_idle_deadline,
        a_patch_moves_both_deadlines,
    ];
    let mut failed = server::run(1, alone).await;
    failed.extend(server::run(4, cases).await);
    failed.extend(server::run(5, times).await);
    let left = server.finish().await;
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
    left.unwrap_or_else(|left| panic!("{left}"));
}

async fn ten_sessions_at_once_see_nothing_of_each_other(server: Arc<Server>) {
    let own = |n: u64| {
        let server = Arc::clone(&server);
        async move {
            let resources =
                json!({"memory_mb": 260 + n, "disk_mb": 20 + n, "pids": 60 + n, "cpu": 1.0 + n as f64 / 20.0});
            let cell = server
                .create(json!({"template": "python", "env": {"OWN": n.to_string()}, "resources": resources}))
                .await;
            cell.value(&format!("only_{n} = {n}; open('/workspace/file-{n}', 'w').write('{n}'); open('/tmp/file-{n}', 'w').close(); open('/dev/shm/file-{n}', 'w').close()")).await;
            cell
        }
    };
    let cells = join_all((0..10).map(own)).await;
    assert_eq!(server.containers("").await.len(), 10);
    let look = r#"
import glob, json, os
def read(*paths):
    return next(int(open(p).read().split()[0]) for p in paths if os.path.exists(p))
work = os.statvfs("/workspace")
print(json.dumps({
    "uid": os.getuid(), "own": os.environ["OWN"],
    "names": sorted(n for n in globals() if n.startswith("only_")),
    "files": sorted(glob.glob("/workspace/*") + glob.glob("/tmp/file*") + glob.glob("/dev/shm/*")),
    "memory": read("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes") >> 20,
    "pids": read("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max"), "disk": work.f_blocks * work.f_frsize >> 20,
    "processes": sorted(int(p) for p in os.listdir("/proc") if p.isdigit())[:1] + [len([p for p in os.listdir("/proc") if p.isdigit()]) < 10],
    "abstract sockets": [l for l in open("/proc/net/unix").read().splitlines()[1:] if " @" in l],
}))
"#;
    let seen = join_all(cells.iter().map(|cell| cell.json(look))).await;
    for (n, seen) in (0_u64..).zip(&seen) {
        assert_eq!(seen["own"], n.to_string());
        assert_eq!(seen["names"], json!([format!("only_{n}")]));
        assert_eq!(
            seen["files"],
            json!([format!("/dev/shm/file-{n}"), format!("/tmp/file-{n}"), format!("/workspace/file-{n}")])
        );
        assert_eq!((&seen["memory"], &seen["pids"], &seen["disk"]), (&json!(260 + n), &json!(60 + n), &json!(20 + n)));
        assert_eq!((&seen["processes"], &seen["abstract sockets"]), (&json!([1, true]), &json!([])));
    }
    let uids: BTreeSet<_> = seen.iter().map(|s| text(&s["uid"])).collect();
    assert_eq!(uids.len(), 10, "{uids:?}");
    // One that dies, one that is deleted and one that fills its memory are nothing to the others.
    let (died, full, ()) = tokio::join!(
        cells[0].run("import os; os.kill(os.getpid(), 9)"),
        cells[1].run("bytearray(600 << 20)"),
        cells[2].delete(),
    );
    assert_eq!((&died["status"], &full["status"]), (&json!("kernel_died"), &json!("oom")));
    let still = join_all((3..10).map(|n| cells[n].value_of(n))).await;
    assert_eq!(still, (3..10).map(|n| n.to_string()).collect::<Vec<_>>());
    join_all(cells.iter().map(Cell::delete)).await;
    assert_eq!(server.containers("").await, Vec::<String>::new());
}

impl Cell {
    async fn value_of(&self, n: usize) -> String {
        self.value(&format!("only_{n}")).await
    }
}

async fn two_executions_at_once_run_in_order(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("seen = []").await;
    let first =
        cell.background_until_output("print(1, flush=True)\nimport time\ntime.sleep(0.5)\nseen.append(1)").await;
    let second = cell.stream(json!({"code": "seen.append(2)\nseen"}), Form::Sse);
    let (mut second, third) = tokio::join!(second, async { cell.background("seen.append(3)").await });
    let queued = second.next().await.expect("an event");
    assert_eq!(queued.kind, "execution.queued");
    assert!(queued.data["position"].as_u64().is_some_and(|p| p >= 1), "{}", queued.data);
    assert_eq!(server.get(&format!("/v1/executions/{third}")).await.json["status"], "queued");
    let rest = second.rest().await;
    let second = &rest[rest.len() - 1].data["execution"];
    let [first, third] = [server.ended(&first).await, server.ended(&third).await];
    assert!([&first, second, &third].iter().all(|e| e["status"] == "ok"), "{first} {second} {third}");
    assert!(second["queued_ms"].as_u64().is_some_and(|ms| ms > 100), "{second}");
    let seen = cell.value("seen").await;
    assert!(["[1, 2, 3]", "[1, 3, 2]"].contains(&seen.as_str()), "{seen}");
    // Those of one caller, one after the other, in exactly that order.
    cell.value("seen.clear()").await;
    let blocker = cell.background_until_output("print(1, flush=True)\ntime.sleep(0.5)").await;
    for n in 0..3 {
        cell.background(&format!("seen.append({n})")).await;
    }
    server.ended(&blocker).await;
    assert_eq!(cell.value("seen").await, "[0, 1, 2]");
}

async fn sessions_run_beside_each_other(server: Arc<Server>) {
    let (one, two) = tokio::join!(server.cell(), server.cell());
    let began = Instant::now();
    let (a, b) = tokio::join!(one.run("import time; time.sleep(2)"), two.run("import time; time.sleep(2)"));
    assert_eq!((&a["status"], &b["status"]), (&json!("ok"), &json!("ok")));
    assert!(began.elapsed() < Duration::from_millis(3900), "{:?}", began.elapsed());
    let loops = one.background_until_output("print(1, flush=True)\nwhile True: pass").await;
    two.works().await;
    assert_eq!(server.get(&format!("/v1/executions/{loops}")).await.json["status"], "running");
    server.post(&format!("/v1/executions/{loops}/cancel"), &Value::Null).await;
    assert_eq!(server.ended(&loops).await["status"], "cancelled");
}

const COUNT: &str = "import time\nfor n in range(8):\n    print(n, flush=True)\n    time.sleep(0.1)\ndone = True";

async fn an_execution_outlives_its_caller(server: Arc<Server>) {
    let cell = server.cell().await;
    let mut follow = cell.stream(json!({"code": COUNT}), Form::Sse).await;
    let id = text(&follow.next().await.expect("an event").data["execution_id"]);
    follow.next().await.expect("an event");
    drop(follow);
    let ended = server.ended(&id).await;
    assert_eq!((&ended["status"], &ended["stdout"]), (&json!("ok"), &json!("0\n1\n2\n3\n4\n5\n6\n7\n")));
    assert_eq!(cell.value("done").await, "True");
    // In the background nobody listens from the start.
    let id = cell.background("done = 42").await;
    let ended = server.ended(&id).await;
    assert_eq!((&ended["status"], &ended["session_id"]), (&json!("ok"), &json!(cell.id)));
    assert_eq!((cell.value("done").await, &ended["context_id"]), ("42".to_owned(), &cell.view["default_context"]));
    cell.delete().await;
    assert_eq!(server.get(&format!("/v1/executions/{id}")).await.json["status"], "ok", "it outlives its session");
}

async fn an_execution_ends_with_its_caller_if_that_was_asked(server: Arc<Server>) {
    let cell = server.cell().await;
    let code = "print(1, flush=True)\nwhile True: pass";
    let mut follow = cell.stream(json!({"code": code, "on_disconnect": "interrupt"}), Form::Lines).await;
    let id = text(&follow.next().await.expect("an event").data["execution_id"]);
    while follow.next().await.expect("an event").kind != "stdout" {}
    drop(follow);
    assert_eq!(server.ended(&id).await["status"], "cancelled");
    // The same for one who waits for the whole answer, and hangs up.
    let request = server.request(reqwest::Method::POST, &cell.path("/executions"));
    let asked = request.json(&json!({"code": "marker = 1\nwhile True: pass", "on_disconnect": "interrupt"})).send();
    assert!(tokio::time::timeout(Duration::from_millis(700), asked).await.is_err(), "it can't have ended");
    cell.wait("ready").await;
    assert_eq!(cell.value("marker").await, "1");
}

async fn events_are_replayed_from_anywhere(server: Arc<Server>) {
    let cell = server.cell().await;
    let live = cell.stream(json!({"code": COUNT}), Form::Sse).await.rest().await;
    let id = text(&live[0].data["execution_id"]);
    let kinds = |events: &[server::Seen]| {
        events.iter().map(|e| (e.seq, e.kind.clone(), e.data.to_string())).collect::<Vec<_>>()
    };
    let all = server.follow(&id, 0).await.rest().await;
    assert_eq!(kinds(&all), kinds(&live));
    for after in [1, 3, live.len() as u64 - 1] {
        let rest = server.follow(&id, after).await.rest().await;
        assert_eq!(kinds(&rest), kinds(&live[after as usize..]), "after {after}");
    }
    assert!(server.follow(&id, live.len() as u64).await.rest().await.is_empty());
    // Who names what never happened has seen no end, and is told it.
    for after in [live.len() as u64 + 1, 1_000_000] {
        let rest = server.follow(&id, after).await.rest().await;
        assert_eq!(kinds(&rest), kinds(&live[live.len() - 1..]));
    }
    // A reader that comes back in the middle misses nothing and sees nothing twice.
    let id = cell.background(COUNT).await;
    let mut follow = server.follow(&id, 0).await;
    let mut seen = Vec::new();
    while seen.len() < 4 {
        seen.push(follow.next().await.expect("an event"));
    }
    drop(follow);
    seen.extend(server.follow(&id, seen[3].seq).await.rest().await);
    assert!(seen.iter().map(|e| e.seq).eq(1..=seen.len() as u64));
    assert_eq!(joined(&seen, "stdout"), "0\n1\n2\n3\n4\n5\n6\n7\n");
    let reply = server
        .send(server.request(reqwest::Method::GET, &format!("/v1/executions/{id}/events")).header("last-event-id", "x"))
        .await;
    reply.problem(400, "invalid-request");
}

async fn waiting_and_running_executions_are_cancelled(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("x = 1").await;
    let running = cell.background_until_output("print(1, flush=True)\nwhile True: pass").await;
    let waiting = cell.background("x = 2").await;
    let cancel = async |id: &str| {
        let reply = server.post(&format!("/v1/executions/{id}/cancel"), &Value::Null).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
    };
    cancel(&waiting).await;
    let ended = server.ended(&waiting).await;
    assert_eq!((&ended["status"], &ended["duration_ms"]), (&json!("cancelled"), &json!(0)));
    assert_eq!(server.get(&format!("/v1/executions/{running}")).await.json["status"], "running");
    cancel(&running).await;
    let events = server.follow(&running, 0).await.rest().await;
    assert_eq!(events[events.len() - 1].kind, "execution.completed");
    assert_eq!(server.ended(&running).await["status"], "cancelled");
    assert_eq!(cell.value("x").await, "1", "what waited never ran, and the kernel is the same");
    cancel(&running).await;
    assert_eq!(server.ended(&running).await["status"], "cancelled", "an end is an end");
}

async fn a_full_queue_refuses(server: Arc<Server>) {
    let cell = server.cell().await;
    let running = cell.background_until_output("print(1, flush=True)\nwhile True: pass").await;
    for n in 0..3 {
        cell.background(&format!("x = {n}")).await;
    }
    let reply = server.post(&cell.path("/executions"), &json!({"code": "x = 'too many'"})).await;
    reply.problem(429, "queue-full");
    server.post(&format!("/v1/executions/{running}/cancel"), &Value::Null).await;
    assert_eq!(cell.wait("ready").await["state"], "ready");
    assert_eq!(cell.value("x").await, "2");
}

async fn a_restart_keeps_files_and_loses_variables(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("x = 1; open('kept', 'w').write('kept')").await;
    let running = cell.background_until_output("print(1, flush=True)\nimport time\ntime.sleep(60)").await;
    let waiting = cell.background("x = 2").await;
    let reply = server.post(&cell.path("/restart"), &Value::Null).await;
    assert_eq!((reply.status, &reply.json["state"]), (200, &json!("ready")), "{}", reply.text);
    let ended = server.ended(&running).await;
    assert_eq!((&ended["status"], &ended["kernel"]["cause"]), (&json!("cancelled"), &json!("requested")), "{ended}");
    assert_eq!(server.ended(&waiting).await["status"], "cancelled");
    let ran = cell.run("import os; 'x' in globals(), open('kept').read(), len([p for p in os.listdir('/proc') if p.isdigit()]) < 5").await;
    assert_eq!(ran["results"][0]["data"]["text/plain"], "(False, 'kept', True)", "{ran}");
    assert_eq!(ran["execution_count"], 1);
    assert_eq!(cell.containers().await.len(), 1);
}

async fn a_container_that_is_removed_from_outside_is_lost(server: Arc<Server>) {
    let cell = server.cell().await;
    let running = cell.background_until_output("print(1, flush=True)\nimport time\ntime.sleep(60)").await;
    let name = cell.containers().await.remove(0);
    let options = RemoveContainerOptionsBuilder::default().force(true).build();
    server.docker.remove_container(&name, Some(options)).await.expect("a removal");
    is_lost(&cell, &running).await;
}

async fn a_first_process_that_is_killed_from_outside_is_lost(server: Arc<Server>) {
    let cell = server.cell().await;
    let running = cell.background_until_output("print(1, flush=True)\nimport time\ntime.sleep(60)").await;
    server.docker.kill_container(&cell.containers().await[0], None).await.expect("a kill");
    is_lost(&cell, &running).await;
}

async fn is_lost(cell: &Cell, running: &str) {
    let began = Instant::now();
    assert_eq!(cell.server.ended(running).await["status"], "lost");
    assert_eq!(cell.wait("ended").await["end_reason"], "lost");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let late = cell.server.post(&cell.path("/executions"), &json!({"code": "1"})).await;
    assert_eq!(late.problem(410, "session-ended")["end_reason"], "lost");
    assert_eq!(cell.containers().await, Vec::<String>::new());
}

async fn sessions_are_found_by_name_and_label(server: Arc<Server>) {
    let named = json!({"template": "python", "name": "found", "labels": {"kind": "a", "of": "b c"}});
    let cell = server.create(named.clone()).await;
    let other = server.create(json!({"template": "python", "labels": {"kind": "b"}})).await;
    let ids = async |query: &str| {
        let reply = server.get(&format!("/v1/sessions?{query}")).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        let sessions = reply.json["sessions"].as_array().expect("sessions");
        sessions.iter().map(|s| text(&s["id"])).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(ids("name=found").await, cell.id);
    assert_eq!(ids("label=kind:a&label=of:b%20c").await, cell.id);
    assert_eq!(ids("label=kind:b").await, other.id);
    assert_eq!(ids("label=kind:c").await, "");
    assert_eq!(ids("label=kind:a&state=ended").await, "");
    server.post("/v1/sessions", &named).await.problem(409, "name-in-use");
    let again = server.post("/v1/sessions", &json!({"name": "found", "if_exists": "reuse"})).await;
    assert_eq!((again.status, &again.json["id"]), (200, &json!(cell.id)));
    let page = server.get("/v1/sessions?limit=1").await.json;
    let cursor = text(&page["next_cursor"]);
    assert_eq!(page["sessions"].as_array().map(Vec::len), Some(1));
    assert!(!ids(&format!("limit=200&cursor={cursor}")).await.contains(&text(&page["sessions"][0]["id"])));
    let ended = server.delete("/v1/sessions?label=kind:a").await;
    assert_eq!((ended.status, ended.json["sessions"].as_array().map(Vec::len)), (200, Some(1)), "{}", ended.text);
    assert_eq!(cell.containers().await, Vec::<String>::new());
    other.works().await;
    server.create(named).await;
}

async fn a_session_that_is_starting_says_so(server: Arc<Server>) {
    let reply = server.post("/v1/sessions?wait=false", &json!({"template": "python"})).await;
    assert_eq!((reply.status, &reply.json["state"]), (201, &json!("starting")), "{}", reply.text);
    let cell = Cell { server: Arc::clone(&server), id: text(&reply.json["id"]), view: reply.json };
    assert_eq!(server.get(&cell.path("/wait?timeout_seconds=0")).await.json["state"], "starting", "it answers in time");
    server.post(&cell.path("/executions"), &json!({"code": "1"})).await.problem(409, "session-not-ready");
    cell.wait("ready").await;
    cell.works().await;
}

async fn a_session_that_is_deleted_while_it_starts_leaves_nothing(server: Arc<Server>) {
    let create = || async {
        let reply = server.post("/v1/sessions?wait=false", &json!({"template": "python"})).await;
        assert_eq!(reply.status, 201);
        let id = text(&reply.json["id"]);
        let cell = Cell { server: Arc::clone(&server), id, view: reply.json };
        cell.delete().await;
        assert_eq!(cell.containers().await, Vec::<String>::new());
        assert_eq!(cell.look().await["end_reason"], "deleted");
    };
    join_all((0..3).map(|_| create())).await;
}

/// Measures when a session's container is gone, from now on.
async fn gone(cell: &Cell) -> (Duration, Value) {
    let began = Instant::now();
    let ended = cell.wait("ended").await;
    assert_eq!(cell.containers().await, Vec::<String>::new());
    (began.elapsed(), ended)
}

/// That long, and at most two seconds more.
fn is_due(took: Duration, seconds: f64) {
    let due = Duration::from_secs_f64(seconds);
    assert!(
        took + Duration::from_millis(100) >= due && took < due + Duration::from_secs(2),
        "after {took:?}; {due:?} was due"
    );
}

async fn an_idle_session_ends(server: Arc<Server>) {
    let cell = server.create(json!({"template": "python", "timeouts": {"idle_seconds": 2}})).await;
    let (took, ended) = gone(&cell).await;
    is_due(took, 2.0);
    assert_eq!(ended["end_reason"], "idle");
}

async fn an_old_session_ends_even_if_busy(server: Arc<Server>) {
    let began = Instant::now();
    let cell = server.create(json!({"template": "python", "timeouts": {"lifetime_seconds": 10}})).await;
    let running = cell.background_until_output("print(1, flush=True)\nwhile True: pass").await;
    let (_, ended) = gone(&cell).await;
    is_due(began.elapsed(), 10.0);
    assert_eq!(ended["end_reason"], "lifetime");
    assert_eq!(server.ended(&running).await["status"], "cancelled");
}

async fn a_busy_session_is_not_idle(server: Arc<Server>) {
    let cell = server.create(json!({"template": "python", "timeouts": {"idle_seconds": 2}})).await;
    let running = cell.background("import time; time.sleep(5); print('awake')").await;
    assert_eq!(cell.look().await["idle_deadline"], Value::Null);
    let ran = server.ended(&running).await;
    assert_eq!((&ran["status"], &ran["stdout"]), (&json!("ok"), &json!("awake\n")));
    let (took, ended) = gone(&cell).await;
    is_due(took, 2.0);
    assert_eq!(ended["end_reason"], "idle");
}

async fn a_keepalive_moves_the_idle_deadline(server: Arc<Server>) {
    let cell = server.create(json!({"template": "python", "timeouts": {"idle_seconds": 3}})).await;
    let before = text(&cell.look().await["idle_deadline"]);
    // Past the first deadline; a look is no activity.
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(1800)).await;
        assert_eq!(cell.look().await["state"], "ready");
        let reply = server.post(&cell.path("/keepalive"), &Value::Null).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        assert!(text(&reply.json["idle_deadline"]) > before, "{} {before}", reply.text);
    }
    let (took, ended) = gone(&cell).await;
    is_due(took, 3.0);
    assert_eq!(ended["end_reason"], "idle");
}

async fn a_patch_moves_both_deadlines(server: Arc<Server>) {
    let cell = server.create(json!({"template": "python"})).await;
    let labels = json!({"labels": {"a": "b"}});
    assert_eq!(server.patch(&cell.path(""), &labels).await.json["labels"], labels["labels"]);
    let reply = server.patch(&cell.path(""), &json!({"expires_in_seconds": 3})).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    assert!(text(&reply.json["expires_at"]) < text(&cell.view["expires_at"]));
    assert_eq!(reply.json["labels"], labels["labels"], "what is not named stays");
    let (took, ended) = gone(&cell).await;
    is_due(took, 3.0);
    assert_eq!(ended["end_reason"], "lifetime");
    let cell = server.create(json!({"template": "python", "timeouts": {"idle_seconds": 3}})).await;
    assert_eq!(server.patch(&cell.path(""), &json!({"idle_seconds": 1})).await.json["timeouts"]["idle_seconds"], 1.0);
    let (took, ended) = gone(&cell).await;
    is_due(took, 1.0);
    assert_eq!(ended["end_reason"], "idle");
    server.patch(&cell.path(""), &json!({"idle_seconds": 1})).await.problem(410, "session-ended");
}

/// A kernel that does not come up, in each of its ways, on a server that waits for ten seconds at most.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kernels_that_do_not_start() {
    let _alone = MACHINE.lock().await;
    let tag = format!("cellblock-test-{}", uuid::Uuid::new_v4().simple());
    let kernels = [
        ("exits", "import sys; print('no kernel today', file=sys.stderr); sys.exit(3)"),
        ("stalls", "import sys, time; print('still thinking', file=sys.stderr, flush=True); time.sleep(600)"),
        ("works", "import runpy; runpy.run_module('ipykernel_launcher', run_name='__main__')"),
    ];
    let mut settings = "[engine]\nstart_timeout = \"10s\"\n".to_owned();
    for (name, program) in kernels {
        image(&format!("{tag}:{name}"), &json!(["/opt/venv/bin/python", "-c", program, "-f", "{connection_file}"]))
            .await;
        settings.push_str(&format!("[templates.{name}]\nimage = \"{tag}:{name}\"\n"));
    }
    image(&format!("{tag}:absent"), &json!(["/nowhere/python", "{connection_file}"])).await;
    settings.push_str(&format!("[templates.absent]\nimage = \"{tag}:absent\"\n"));
    let server = Server::start(&settings).await;
    let cases = cases![server; a_kernel_that_exits_says_its_last_words, a_kernel_that_stalls_is_given_up, a_kernel_that_is_not_there, another_kernelspec_works];
    let failed = server::run(4, cases).await;
    let left = server.finish().await;
    for name in ["exits", "stalls", "works", "absent"] {
        let options = RemoveImageOptionsBuilder::default().force(true).build();
        server.docker.remove_image(&format!("{tag}:{name}"), Some(options), None).await.expect("a removal");
    }
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
    left.unwrap_or_else(|left| panic!("{left}"));
}

/// The image for plain Python with another command for its kernel, and without a resolver of its own for `localhost`.
async fn image(reference: &str, argv: &Value) {
    let docker = bollard::Docker::connect_with_socket_defaults().expect("a Docker engine on this machine");
    let name = reference.replace(':', "-");
    let body =
        ContainerCreateBody { image: Some("cellblock/python:latest".to_owned()), ..ContainerCreateBody::default() };
    let options = CreateContainerOptionsBuilder::default().name(&name).build();
    docker.create_container(Some(options), body).await.expect("a container");
    let spec =
        json!({"argv": argv, "display_name": "x", "language": "python", "interrupt_mode": "message"}).to_string();
    let mut archive = tar::Builder::new(Vec::new());
    for (path, text) in [
        ("opt/venv/share/jupyter/kernels/python3/kernel.json", spec.as_str()),
        ("etc/nsswitch.conf", "hosts: files dns\n"),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, path, text.as_bytes()).expect("an archive");
    }
    let archive = archive.into_inner().expect("an archive");
    let options = UploadToContainerOptionsBuilder::default().path("/").build();
    docker.upload_to_container(&name, Some(options), body_full(archive.into())).await.expect("an upload");
    let (repo, tag) = reference.split_once(':').expect("a tag");
    let options = CommitContainerOptionsBuilder::default().container(&name).repo(repo).tag(tag).build();
    docker.commit_container(options, bollard::models::ContainerConfig::default()).await.expect("a commit");
    let options = RemoveContainerOptionsBuilder::default().force(true).build();
    docker.remove_container(&name, Some(options)).await.expect("a removal");
}

async fn a_kernel_that_exits_says_its_last_words(server: Arc<Server>) {
    let reply = server.post("/v1/sessions", &json!({"template": "exits"})).await;
    let problem = reply.problem(502, "kernel-failed");
    let detail = text(&problem["detail"]);
    assert!(detail.contains("status 3") && detail.contains("no kernel today"), "{detail}");
    assert_eq!(problem["retryable"], false);
    ended_without_a_container(&server, "exits", &detail).await;
    // It can be asked for without waiting as well.
    let reply = server.post("/v1/sessions?wait=false", &json!({"template": "exits"})).await;
    assert_eq!(reply.status, 201);
    let cell = Cell { server: Arc::clone(&server), id: text(&reply.json["id"]), view: reply.json };
    let ended = tokio::time::timeout(NEVER, cell.wait("ended")).await.expect("an end in time");
    assert_eq!(ended["end_reason"], "start_failed");
    assert_eq!(cell.containers().await, Vec::<String>::new());
}

async fn a_kernel_that_stalls_is_given_up(server: Arc<Server>) {
    let began = Instant::now();
    let reply = server.post("/v1/sessions", &json!({"template": "stalls"})).await;
    assert!((7.0..20.0).contains(&began.elapsed().as_secs_f64()), "{:?}", began.elapsed());
    let detail = text(&reply.problem(502, "kernel-failed")["detail"]);
    assert!(detail.contains("still thinking"), "{detail}");
    ended_without_a_container(&server, "stalls", &detail).await;
}

async fn a_kernel_that_is_not_there(server: Arc<Server>) {
    let reply = server.post("/v1/sessions", &json!({"template": "absent"})).await;
    let detail = text(&reply.problem(502, "kernel-failed")["detail"]);
    ended_without_a_container(&server, "absent", &detail).await;
}

async fn another_kernelspec_works(server: Arc<Server>) {
    let cell = server.create(json!({"template": "works"})).await;
    cell.works().await;
    // This image resolves names from files and by asking, as most do, and there is no file.
    let names = "import json, socket, time\nbegan = time.monotonic()\ntry: outside = socket.gethostbyname('example.org')\n\
        except OSError as error: outside = None\n\
        print(json.dumps([open('/etc/hosts').read(), sorted({i[4][0] for i in socket.getaddrinfo('localhost', 1)}), outside, time.monotonic() - began]))";
    let seen = cell.json(names).await;
    assert_eq!((&seen[0], &seen[1], &seen[2]), (&json!(""), &json!(["127.0.0.1", "::1"]), &Value::Null));
    assert!(seen[3].as_f64().is_some_and(|seconds| seconds < 1.0), "names of the world fail at once: {seen}");
}

/// The session of a template that failed is kept with the reason, and nothing of it is left.
async fn ended_without_a_container(server: &Arc<Server>, template: &str, detail: &str) {
    let sessions = server.get("/v1/sessions?state=ended").await.json;
    let session =
        sessions["sessions"].as_array().expect("sessions").iter().find(|s| s["template"] == template).cloned();
    let session = session.expect("a session that is kept");
    assert_eq!((&session["end_reason"], &session["start_error"]), (&json!("start_failed"), &json!(detail)));
    assert_eq!(server.containers(&text(&session["id"])).await, Vec::<String>::new());
}
