//! Whatever code does: its execution ends in time and says what happened, the session goes on, and nobody else notices.

#[path = "support/hostile_cells.rs"]
mod cells;
#[path = "support/server.rs"]
mod server;
#[path = "support/watch.rs"]
mod watch;

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cells::{Row, Then};
use reqwest::Method;
use serde_json::{Value, json};
use server::{Case, Cell, Server, text};
use watch::{Canary, open_files, processes_of, resident, shortened, untruths};

/// Away from where other servers on this machine have theirs, so that a process is known by its user.
const UIDS: RangeInclusive<u32> = 52_000..=52_999;
const SETTINGS: &str = r#"
[engine]
uid_first = 52000
uid_last = 52999
[executions]
interrupt_grace = "1s"
retention_size = "16MiB"
[templates.small]
image = "cellblock/python:latest"
[templates.small.default]
memory = "256MiB"
disk = "16MiB"
tmp = "16MiB"
pids = 64
"#;
/// What is set above, and what a busy machine may add: the end of a kernel, and the answer's way.
const GRACE: f64 = 1.0;
const SLACK: f64 = 6.0;
/// A new kernel, on a busy machine, and one that doesn't say when it is done.
const NEXT: Duration = Duration::from_secs(25);
/// This process is the caller too, which reads answers of many megabytes whole; `tests/soak.rs` measures a server alone.
const GROWTH: u64 = 192 * 1024 * 1024;
/// Connections that are kept for the next request, and the like.
const MORE_FILES: usize = 24;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_code() {
    let server = Server::start_with_tenants(SETTINGS).await;
    let canaries = [Canary::start(&server, &server.key).await, Canary::start(&server, &server.other_key).await];
    for _ in 0..2 {
        let warm = || async { small(&server, 256).await.delete().await };
        tokio::join!(warm(), warm(), warm());
    }
    let (memory, files, volumes) = (resident(None), open_files(), server.volumes().await);

    let rows = cells::all();
    let names: BTreeSet<&str> = rows.iter().map(|row| row.name).collect();
    assert!(rows.len() >= 48 && names.len() == rows.len(), "{} rows, {} names", rows.len(), names.len());
    let mut cases: Vec<Case> = cases![server;
        words_for_another_execution_reach_nobody,
        half_a_character_of_code_is_refused,
        code_that_will_not_be_cancelled_is,
        hostile_setup_code_ends_its_own_session_only,
    ];
    cases.extend(rows.into_iter().map(|row| -> Case { (row.name, Box::pin(a_row_holds(Arc::clone(&server), row))) }));
    let mut failed = server::run(3, cases).await;

    for (whose, canary) in ["same", "other"].into_iter().zip(canaries) {
        if let Err(noticed) = canary.stop().await {
            failed.push(format!("  the canary of the {whose} tenant: {noticed}"));
        }
    }
    let (grown, open, left) = (resident(None).saturating_sub(memory), open_files(), server.volumes().await);
    println!("memory grew by {} MiB; open files {files} -> {open}", grown >> 20);
    if grown > GROWTH || open > files + MORE_FILES || left != volumes {
        failed.push(format!("  left over: {} MiB, {files} -> {open} open files, {volumes:?} -> {left:?}", grown >> 20));
    }
    let finished = server.finish().await;
    let processes = processes_of(&UIDS);
    if !processes.is_empty() {
        failed.push(format!("  left over: {processes:?}"));
    }
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
    finished.unwrap_or_else(|left| panic!("{left}"));
}

async fn small(server: &Arc<Server>, memory_mb: u64) -> Cell {
    server.create(json!({"template": "small", "resources": {"memory_mb": memory_mb}})).await
}

async fn a_row_holds(server: Arc<Server>, row: Row) {
    let cell = small(&server, row.memory_mb).await;
    let mut request = row.request.clone();
    request["code"] = json!(row.code);
    request["timeout_seconds"] = json!(row.limit);
    let began = Instant::now();
    let ran = cell.execute(request).await;
    let took = began.elapsed().as_secs_f64();
    let mut broken = if ran.is_null() { vec!["the answer is no JSON".to_owned()] } else { untruths(&ran) };
    broken.extend(row.broken(&ran));
    if took > row.limit + GRACE + SLACK {
        broken.push(format!("it took {took:.1} s with a limit of {} s", row.limit));
    }
    if row.spoils {
        broken.extend(ends_somehow(&cell).await);
        restart(&cell).await;
    }
    broken.extend(next_is_answered(&cell).await);
    for then in &row.then {
        match then {
            Then::Prints(code, printed) => broken.extend(prints(&cell, code, printed).await),
            Then::Restart => {
                restart(&cell).await;
                broken.extend(next_is_answered(&cell).await.map(|broken| format!("after a restart: {broken}")));
            }
        }
    }
    let began = Instant::now();
    cell.delete().await;
    let left = cell.containers().await;
    if !left.is_empty() || began.elapsed() > Duration::from_secs(10) {
        broken.push(format!("ending the session left {left:?} after {:?}", began.elapsed()));
    }
    assert!(broken.is_empty(), "{}\n    {}", broken.join("\n    "), shortened(&ran));
}

async fn restart(cell: &Cell) {
    let reply = cell.server.post(&cell.path("/restart"), &Value::Null).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
}

/// The next cell answers what it was asked, and nothing else.
async fn next_is_answered(cell: &Cell) -> Option<String> {
    let began = Instant::now();
    let reply = cell.server.post(&cell.path("/executions"), &json!({"code": "1+1", "timeout_seconds": 20})).await;
    let (ran, results) = (&reply.json, &reply.json["results"]);
    let right = (reply.status, &ran["status"]) == (200, &json!("ok"))
        && results.as_array().is_some_and(|r| r.len() == 1)
        && results[0]["data"] == json!({"text/plain": "2"})
        && (&ran["stdout"], &ran["stderr"]) == (&json!(""), &json!(""));
    let took = began.elapsed();
    (!right || took > NEXT).then(|| format!("1+1 was answered after {took:?} with {} {}", reply.status, shortened(ran)))
}

/// A kernel that was broken on purpose may fail, but not hang, and not answer something else.
async fn ends_somehow(cell: &Cell) -> Option<String> {
    let began = Instant::now();
    let ran = cell.execute(json!({"code": "1+1", "timeout_seconds": 3})).await;
    let lies = ran["status"] == "ok"
        && ran["results"].as_array().is_some_and(|r| r.iter().any(|r| r["data"]["text/plain"] != "2"));
    let took = began.elapsed();
    let late = took.as_secs_f64() > 3.0 + GRACE + SLACK + NEXT.as_secs_f64();
    let mut broken = untruths(&ran);
    broken.extend((lies || late).then(|| "1+1 in the broken kernel".to_owned()));
    (!broken.is_empty()).then(|| format!("{} after {took:?}: {}", broken.join("; "), shortened(&ran)))
}

async fn prints(cell: &Cell, code: &str, printed: &str) -> Option<String> {
    let ran = cell.execute(json!({"code": code, "timeout_seconds": 20})).await;
    let right = (&ran["status"], &ran["stdout"]) == (&json!("ok"), &json!(printed));
    (!right).then(|| format!("{code:?} should have printed {printed:?}: {}", shortened(&ran)))
}

/// Messages that name an execution of another session, an earlier one, or one that waits, are for nobody.
async fn words_for_another_execution_reach_nobody(server: Arc<Server>) {
    let (victim, attacker) = (small(&server, 256).await, small(&server, 256).await);
    let before = attacker.run("print('before')").await;
    let elsewhere = victim.background_until_output("print('mine', flush=True)\nimport time\ntime.sleep(3)").await;
    let forging = "kernel = get_ipython().kernel
shell = kernel.shell_channel_thread.manager.get_subshell_to_shell_channel_socket(None)
ident = kernel._parent_ident['shell']
for name in input().split():
    parent = {'header': {'msg_id': name, 'msg_type': 'execute_request', 'session': name, 'username': '', 'version': '5.3', 'date': '2020-01-01T00:00:00Z'}}
    def publish(kind, content): kernel.session.send(kernel.iopub_socket, kind, content, parent=parent, ident=b'x')
    publish('stream', {'name': 'stdout', 'text': 'forged'})
    publish('display_data', {'data': {'text/plain': 'forged'}, 'metadata': {}, 'transient': {}})
    publish('execute_result', {'data': {'text/plain': 'forged'}, 'metadata': {}, 'execution_count': 1})
    publish('error', {'ename': 'Forged', 'evalue': '', 'traceback': []})
    kernel.session.send(shell, 'execute_reply', {'status': 'ok', 'execution_count': 1}, parent=parent, ident=ident)
    publish('status', {'execution_state': 'idle'})
print('told')";
    let asking = json!({"code": forging, "stdin": "interactive", "background": true, "timeout_seconds": 30});
    let lying = server.post(&attacker.path("/executions"), &asking).await;
    assert_eq!(lying.status, 202, "{}", lying.text);
    let lying = text(&lying.json["id"]);
    let waiting = attacker.background("print('mine too')").await;
    server.follow(&lying, 0).await.until("input.requested").await;
    let names = json!({"text": format!("{elsewhere} {} {waiting}", text(&before["id"]))});
    let reply = server.post(&format!("/v1/executions/{lying}/input"), &names).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let told = server.ended(&lying).await;
    assert_eq!((&told["status"], &told["stdout"]), (&json!("ok"), &json!("told\n")), "{told}");
    for (execution, stdout) in [(&elsewhere, "mine\n"), (&waiting, "mine too\n"), (&text(&before["id"]), "before\n")] {
        let ran = server.ended(execution).await;
        let said = (&ran["status"], &ran["stdout"], &ran["results"], &ran["error"]);
        assert_eq!(said, (&json!("ok"), &json!(stdout), &json!([]), &Value::Null), "{ran}");
    }
    victim.works().await;
    attacker.works().await;
    victim.delete().await;
    attacker.delete().await;
}

async fn half_a_character_of_code_is_refused(server: Arc<Server>) {
    let cell = small(&server, 256).await;
    let request = server.request(Method::POST, &cell.path("/executions")).header("content-type", "application/json");
    let reply = server.send(request.body(r#"{"code": "print('\ud800')"}"#)).await;
    reply.problem(400, "invalid-request");
    cell.works().await;
    cell.delete().await;
}

async fn code_that_will_not_be_cancelled_is(server: Arc<Server>) {
    let cell = small(&server, 256).await;
    let code = "print('in', flush=True)\nwhile True:\n    try:\n        for _ in iter(int, 1): pass\n    except BaseException: pass";
    let running = cell.background_until_output(code).await;
    let waiting = cell.background("print('next')").await;
    let began = Instant::now();
    let reply = server.post(&format!("/v1/executions/{running}/cancel"), &Value::Null).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let ran = server.ended(&running).await;
    assert!(began.elapsed().as_secs_f64() < GRACE + SLACK, "{:?}: {ran}", began.elapsed());
    assert_eq!((&ran["status"], &ran["stop"]["step"]), (&json!("cancelled"), &json!("restart")), "{ran}");
    assert_eq!(untruths(&ran), Vec::<String>::new(), "{ran}");
    let next = server.ended(&waiting).await;
    assert_eq!((&next["status"], &next["stdout"]), (&json!("ok"), &json!("next\n")), "{next}");
    cell.works().await;
    cell.delete().await;
}

async fn hostile_setup_code_ends_its_own_session_only(server: Arc<Server>) {
    for (setup, word) in [
        ("raise ValueError('not today')", "not today"),
        ("import os; os._exit(3)", "3"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
    ] {
        let reply = server.post("/v1/sessions", &json!({"template": "small", "setup": setup})).await;
        assert!((400..500).contains(&reply.status), "{setup}: {}", reply.text);
        reply.is_a_problem();
        assert!(text(&reply.json["detail"]).contains(word), "{setup}: {}", reply.text);
    }
}
