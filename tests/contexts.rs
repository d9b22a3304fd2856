//! What surrounds code in a session: several kernels with a queue each, code that sets them up, runs of one call, answers to
//! `input()`, what a kernel is asked beside code, and what each call has cost and changed.

#[path = "support/server.rs"]
mod server;

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use reqwest::Method;
use serde_json::{Value, json};
use server::{Cell, Form, NEVER, Reply, Server, text};

const SETTINGS: &str = r#"
[limits]
contexts = 3
queued_executions = 3
[executions]
interrupt_grace = "4s"
[templates.prepared]
image = "cellblock/python:latest"
setup = """
import math
preset = 41
def greet(name):
    return 'hej ' + name
print('words of the setup')
"""
[templates.broken]
image = "cellblock/python:latest"
setup = "def look(): return {}['absent']\nlook()"
[templates.fragile]
image = "cellblock/python:latest"
on_kernel_death = "end"
"#;

/// Held by the test that runs: both measure time.
static MACHINE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contexts() {
    let _alone = MACHINE.lock().await;
    let server = Server::start_with_tenants(SETTINGS).await;
    let alone = cases![server; contexts_run_beside_each_other, a_bomb_in_one_context_says_what_else_died];
    let cases = cases![server;
        contexts_are_created_listed_and_deleted,
        what_is_no_context_is_not_found,
        a_key_without_the_scope_is_forbidden,
        contexts_are_bounded_in_number,
        a_context_has_variables_of_its_own,
        a_context_starts_where_it_was_asked_to,
        a_context_has_a_queue_of_its_own,
        an_interrupt_of_one_context_leaves_others,
        a_restart_of_one_context_leaves_others,
        a_deleted_context_ends_what_runs_in_it,
        a_death_in_one_context_leaves_others,
        completion_is_answered,
        inspection_is_answered,
        completeness_is_answered,
        questions_to_a_busy_kernel_are_answered,
        user_expressions_are_answered,
        comm_messages_are_events,
    ];
    let mut failed = server::run(1, alone).await;
    failed.extend(server::run(3, cases).await);
    let left = server.finish().await;
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
    left.unwrap_or_else(|left| panic!("{left}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn setup_runs_and_input() {
    let _alone = MACHINE.lock().await;
    let server = Server::start_with_tenants(SETTINGS).await;
    let cases = cases![server;
        setup_of_a_template_comes_before_the_first_cell,
        setup_of_a_create_comes_after_the_templates,
        setup_runs_for_every_kernel,
        setup_that_fails_is_the_creates_error,
        setup_that_ends_its_kernel_is_the_creates_error,
        setup_that_asks_for_input_is_refused,
        a_run_is_one_call,
        a_run_streams,
        a_run_says_how_it_failed,
        a_run_in_the_background,
        a_run_that_is_wrong_starts_nothing,
        a_run_ends_with_its_caller_if_that_was_asked,
        a_run_outlives_its_caller_and_then_goes,
        input_is_answered_once,
        input_that_nobody_asked_for_is_refused,
        one_of_two_answers_is_taken,
        a_time_limit_ends_a_wait_for_input,
        a_cancel_ends_a_wait_for_input,
        an_interrupt_ends_a_wait_for_input,
        a_death_ends_a_wait_for_input,
        lines_are_fed_in_order_and_run_out,
        input_has_bounds,
        a_timeout_may_go_straight_to_a_restart,
        a_death_ends_the_session_where_the_template_says_so,
        effects_of_a_cell_are_told,
        many_files_are_counted,
        effects_of_a_cell_that_dies_are_told,
        limits_that_were_hit_are_told,
    ];
    server.run_and_finish(3, cases).await;
}

/// Creates a context and answers with its id.
async fn context(cell: &Cell) -> String {
    let reply = cell.server.post(&cell.path("/contexts"), &json!({})).await;
    assert_eq!(reply.status, 201, "{}", reply.text);
    text(&reply.json["id"])
}

fn within(context: &str, code: &str) -> Value {
    json!({"code": code, "context_id": context})
}

async fn run_in(cell: &Cell, context: &str, code: &str) -> Value {
    cell.execute(within(context, code)).await
}

async fn value_in(cell: &Cell, context: &str, code: &str) -> String {
    let ran = run_in(cell, context, code).await;
    assert_eq!(ran["status"], "ok", "{code}: {ran}");
    text(&ran["results"][0]["data"]["text/plain"])
}

/// Starts code in a context and waits until it has printed something.
async fn start_in(cell: &Cell, context: &str, code: &str) -> String {
    let mut follow = cell.stream(within(context, code), Form::Lines).await;
    let id = text(&follow.next().await.expect("an event").data["execution_id"]);
    follow.until("stdout").await;
    id
}

async fn waiting_in(cell: &Cell, context: &str, code: &str) -> Reply {
    let mut request = within(context, code);
    request["background"] = json!(true);
    cell.server.post(&cell.path("/executions"), &request).await
}

async fn listed(cell: &Cell) -> Vec<Value> {
    let reply = cell.server.get(&cell.path("/contexts")).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    reply.json["contexts"].as_array().expect("contexts").clone()
}

fn default_of(cell: &Cell) -> String {
    text(&cell.view["default_context"])
}

const LOOP: &str = "print(1, flush=True)\nwhile True: pass";

async fn contexts_are_created_listed_and_deleted(server: Arc<Server>) {
    let cell = server.cell().await;
    let alone = listed(&cell).await;
    assert_eq!(alone.len(), 1, "{alone:?}");
    let default = &alone[0];
    assert_eq!((&default["id"], &default["is_default"]), (&cell.view["default_context"], &json!(true)));
    let reply = server.post(&cell.path("/contexts"), &json!({})).await;
    let created = &reply.json;
    assert_eq!((reply.status, &created["is_default"]), (201, &json!(false)), "{}", reply.text);
    for view in [default, created] {
        assert_eq!((&view["language"], &view["kernelspec"]), (&json!("python"), &json!("python3")), "{view}");
        assert_eq!((&view["state"], &view["queued"]), (&json!("ready"), &json!(0)), "{view}");
        assert!(text(&view["created_at"]).parse::<jiff::Timestamp>().is_ok(), "{view}");
    }
    let second = text(&created["id"]);
    // Naming the kernelspec that there is changes nothing; no body is as good as an empty one.
    let third = server.post(&cell.path("/contexts"), &json!({"kernelspec": "python3"})).await;
    assert_eq!(third.status, 201, "{}", third.text);
    let ids: Vec<_> = listed(&cell).await.iter().map(|c| text(&c["id"])).collect();
    assert_eq!(ids, [default_of(&cell), second.clone(), text(&third.json["id"])]);
    let ran = run_in(&cell, &second, "6 * 7").await;
    assert_eq!((&ran["context_id"], &ran["results"][0]["data"]["text/plain"]), (&json!(second), &json!("42")));
    let deleted = server.delete(&cell.path(&format!("/contexts/{second}"))).await;
    assert!((200..300).contains(&deleted.status), "{}", deleted.text);
    let ids: Vec<_> = listed(&cell).await.iter().map(|c| text(&c["id"])).collect();
    assert_eq!(ids, [default_of(&cell), text(&third.json["id"])]);
    server.delete(&cell.path(&format!("/contexts/{second}"))).await.problem(404, "not-found");
    server.post(&cell.path("/executions"), &within(&second, "1")).await.problem(404, "not-found");
    let refused = server.delete(&cell.path(&format!("/contexts/{}", default_of(&cell)))).await;
    refused.problem(409, "state-conflict");
    cell.works().await;
    cell.delete().await;
    server.post(&cell.path("/contexts"), &json!({})).await.problem(410, "session-ended");
}

async fn what_is_no_context_is_not_found(server: Arc<Server>) {
    let (cell, other) = tokio::join!(server.cell(), server.cell());
    let own = context(&cell).await;
    let ask = async |id: &str, code: u16, word: &str| {
        let path = |below: &str| cell.path(&format!("/contexts/{id}{below}"));
        server.delete(&path("")).await.problem(code, word);
        for below in ["/interrupt", "/restart"] {
            server.post(&path(below), &Value::Null).await.problem(code, word);
        }
        for below in ["/complete", "/inspect", "/is_complete"] {
            server.post(&path(below), &json!({"code": "1"})).await.problem(code, word);
        }
        server.post(&cell.path("/executions"), &within(id, "1")).await.problem(code, word);
    };
    ask(&default_of(&other), 404, "not-found").await;
    ask(&own.replace("ctx0", "ctx7"), 404, "not-found").await;
    let nonsense = server.delete(&cell.path("/contexts/nonsense")).await;
    assert!((400..500).contains(&nonsense.status), "{}", nonsense.text);
    nonsense.is_a_problem();
    // Another tenant finds nothing at all.
    let contexts = cell.path("/contexts");
    for (method, below) in [(Method::GET, ""), (Method::POST, "")] {
        server
            .send(server.foreign(method, &format!("{contexts}{below}")).json(&json!({})))
            .await
            .problem(404, "not-found");
    }
    let path = format!("{contexts}/{own}");
    server.send(server.foreign(Method::DELETE, &path)).await.problem(404, "not-found");
    server.send(server.foreign(Method::POST, &format!("{path}/restart"))).await.problem(404, "not-found");
    let complete = server.foreign(Method::POST, &format!("{path}/complete")).json(&json!({"code": "1"}));
    server.send(complete).await.problem(404, "not-found");
    assert_eq!(value_in(&cell, &own, "1").await, "1", "nobody else could delete it");
    for wrong in [json!({"kernelspec": 5}), json!({"cwd": ["a"]}), json!({"unknown": 1})] {
        let reply = server.post(&contexts, &wrong).await;
        assert!([400, 422].contains(&reply.status), "{wrong}: {}", reply.text);
        reply.is_a_problem();
    }
    let absent = server.post(&contexts, &json!({"kernelspec": "fortran"})).await;
    assert!(absent.status >= 400, "{}", absent.text);
    absent.is_a_problem();
    assert_eq!(listed(&cell).await.len(), 2, "what failed is no context");
    cell.works().await;
}

async fn a_key_without_the_scope_is_forbidden(server: Arc<Server>) {
    let cell = server.cell().await;
    let own = context(&cell).await;
    let (id, follow) = asking(&cell, "input()", json!({})).await;
    let code = json!({"code": "1"});
    let of = |below: &str| cell.path(&format!("/contexts/{own}{below}"));
    let rows = [
        (Method::POST, cell.path("/contexts"), json!({})),
        (Method::DELETE, of(""), json!({})),
        (Method::POST, of("/interrupt"), json!({})),
        (Method::POST, of("/restart"), json!({})),
        (Method::POST, of("/complete"), code.clone()),
        (Method::POST, of("/inspect"), code.clone()),
        (Method::POST, of("/is_complete"), code.clone()),
        (Method::POST, "/v1/runs".to_owned(), code),
        (Method::POST, format!("/v1/executions/{id}/input"), json!({"text": "x"})),
        (Method::DELETE, cell.path("/notebook"), json!({})),
    ];
    for (method, path, body) in rows {
        let request = server.bare(method.clone(), &path).bearer_auth(&server.powerless_key);
        let reply = server.send(if method == Method::POST { request.json(&body) } else { request }).await;
        assert_eq!(reply.status, 403, "{method} {path}: {}", reply.text);
        reply.problem(403, "forbidden");
    }
    assert_eq!(answer(&server, &id, "mine").await.status, 200);
    assert_eq!(last(follow).await["results"][0]["data"]["text/plain"], "'mine'");
}

async fn contexts_are_bounded_in_number(server: Arc<Server>) {
    let cell = server.cell().await;
    let (second, _) = (context(&cell).await, context(&cell).await);
    let reply = server.post(&cell.path("/contexts"), &json!({})).await;
    assert!((400..500).contains(&reply.status), "{}", reply.text);
    reply.is_a_problem();
    assert!(
        text(&reply.json["detail"]).contains('3') || reply.json["errors"].to_string().contains('3'),
        "{}",
        reply.text
    );
    assert_eq!(listed(&cell).await.len(), 3);
    server.delete(&cell.path(&format!("/contexts/{second}"))).await;
    // Many at once get no more than there is room for.
    let path = cell.path("/contexts");
    let asked = (0..4).map(|_| async { server.post(&path, &json!({})).await.status });
    let created = futures_util::future::join_all(asked).await.into_iter().filter(|status| *status == 201).count();
    assert_eq!((created, listed(&cell).await.len()), (1, 3));
    cell.works().await;
}

async fn contexts_run_beside_each_other(server: Arc<Server>) {
    let cell = server.cell().await;
    let other = context(&cell).await;
    let began = Instant::now();
    let sleep = "import time; time.sleep(2)";
    let (a, b) = tokio::join!(cell.run(sleep), run_in(&cell, &other, sleep));
    assert_eq!((&a["status"], &b["status"]), (&json!("ok"), &json!("ok")));
    assert!(began.elapsed() < Duration::from_millis(3500), "{:?}", began.elapsed());
    // One that computes for ever holds nobody up.
    let loops = start_in(&cell, &other, LOOP).await;
    cell.works().await;
    assert_eq!(cell.look().await["state"], "busy");
    assert_eq!(server.execution(&loops).await["status"], "running");
    server.post(&format!("/v1/executions/{loops}/cancel"), &Value::Null).await;
    assert_eq!(server.ended(&loops).await["status"], "cancelled");
    cell.wait("ready").await;
}

async fn a_context_has_variables_of_its_own(server: Arc<Server>) {
    let cell = server.cell().await;
    let other = context(&cell).await;
    cell.value("x = 'default'; open('shared', 'w').write('a file'); x").await;
    assert_eq!(value_in(&cell, &other, "'x' in globals(), open('shared').read()").await, "(False, 'a file')");
    value_in(&cell, &other, "x = 'other'; x").await;
    assert_eq!(cell.value("x").await, "'default'");
    let processes = value_in(&cell, &other, "import os; os.getpid()").await;
    assert_ne!(cell.value("import os; os.getpid()").await, processes);
    assert_eq!(cell.containers().await.len(), 1, "all in one container");
}

async fn a_context_starts_where_it_was_asked_to(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("import os; os.makedirs('/workspace/deep/down')").await;
    let reply = server.post(&cell.path("/contexts"), &json!({"cwd": "/workspace/deep/down"})).await;
    assert_eq!(reply.status, 201, "{}", reply.text);
    let id = text(&reply.json["id"]);
    assert_eq!(value_in(&cell, &id, "import os; os.getcwd()").await, "'/workspace/deep/down'");
    server.post(&cell.path(&format!("/contexts/{id}/restart")), &Value::Null).await;
    assert_eq!(value_in(&cell, &id, "import os; os.getcwd()").await, "'/workspace/deep/down'", "after a restart too");
    let nowhere = server.post(&cell.path("/contexts"), &json!({"cwd": "/nowhere/at/all"})).await;
    assert!(nowhere.status >= 400, "{}", nowhere.text);
    nowhere.is_a_problem();
    assert_eq!(listed(&cell).await.len(), 2);
}

async fn a_context_has_a_queue_of_its_own(server: Arc<Server>) {
    let cell = server.cell().await;
    let other = context(&cell).await;
    let running = start_in(&cell, &other, LOOP).await;
    for n in 0..3 {
        assert_eq!(waiting_in(&cell, &other, &format!("x = {n}")).await.status, 202);
    }
    waiting_in(&cell, &other, "x = 'too many'").await.problem(429, "queue-full");
    let queued = |contexts: Vec<Value>| contexts.iter().map(|c| c["queued"].clone()).collect::<Vec<_>>();
    assert_eq!(queued(listed(&cell).await), [json!(0), json!(3)]);
    cell.works().await;
    server.post(&format!("/v1/executions/{running}/cancel"), &Value::Null).await;
    cell.wait("ready").await;
    assert_eq!(value_in(&cell, &other, "x").await, "2");
    assert_eq!(queued(listed(&cell).await), [json!(0), json!(0)]);
}

async fn an_interrupt_of_one_context_leaves_others(server: Arc<Server>) {
    let cell = server.cell().await;
    let other = context(&cell).await;
    value_in(&cell, &other, "x = 1; x").await;
    let default = default_of(&cell);
    let (here, there) = tokio::join!(start_in(&cell, &default, LOOP), start_in(&cell, &other, LOOP));
    let interrupt = async |context: &str| {
        let reply = server.post(&cell.path(&format!("/contexts/{context}/interrupt")), &Value::Null).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
    };
    interrupt(&other).await;
    let ended = server.ended(&there).await;
    assert_eq!((&ended["status"], &ended["error"]["name"]), (&json!("error"), &json!("KeyboardInterrupt")), "{ended}");
    assert_eq!(value_in(&cell, &other, "x").await, "1");
    assert_eq!(server.execution(&here).await["status"], "running");
    interrupt(&default).await;
    assert_eq!(server.ended(&here).await["error"]["name"], "KeyboardInterrupt");
}

async fn a_restart_of_one_context_leaves_others(server: Arc<Server>) {
    let cell = server.cell().await;
    let other = context(&cell).await;
    cell.value("x = 'stays'; x").await;
    value_in(&cell, &other, "x = 'goes'; x").await;
    let default = default_of(&cell);
    let (here, there) = tokio::join!(start_in(&cell, &default, LOOP), start_in(&cell, &other, LOOP));
    let waits = text(&waiting_in(&cell, &other, "x").await.json["id"]);
    let reply = server.post(&cell.path(&format!("/contexts/{other}/restart")), &Value::Null).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let ended = server.ended(&there).await;
    assert_eq!((&ended["status"], &ended["kernel"]["cause"]), (&json!("cancelled"), &json!("requested")), "{ended}");
    assert_eq!(server.ended(&waits).await["status"], "cancelled");
    assert_eq!(value_in(&cell, &other, "'x' in globals()").await, "False");
    assert_eq!(server.execution(&here).await["status"], "running");
    server.post(&format!("/v1/executions/{here}/cancel"), &Value::Null).await;
    server.ended(&here).await;
    assert_eq!(cell.value("x").await, "'stays'");
}

async fn a_deleted_context_ends_what_runs_in_it(server: Arc<Server>) {
    let cell = server.cell().await;
    let other = context(&cell).await;
    let pid = value_in(&cell, &other, "import os; os.getpid()").await;
    let spawn = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True).pid";
    let child = value_in(&cell, &other, spawn).await;
    let alive = format!("import os; [os.path.exists(f'/proc/{{p}}') for p in ({pid}, {child})]");
    assert_eq!(cell.value(&alive).await, "[True, True]");
    let running = start_in(&cell, &other, LOOP).await;
    let waiting = text(&waiting_in(&cell, &other, "1").await.json["id"]);
    let began = Instant::now();
    let deleted = server.delete(&cell.path(&format!("/contexts/{other}"))).await;
    assert!((200..300).contains(&deleted.status), "{}", deleted.text);
    for id in [running, waiting] {
        assert_eq!(server.ended(&id).await["status"], "cancelled");
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(cell.value(&alive).await, "[False, False]", "its processes are gone");
    assert_eq!(listed(&cell).await.len(), 1);
}

async fn a_death_in_one_context_leaves_others(server: Arc<Server>) {
    let cell = server.cell().await;
    let other = context(&cell).await;
    cell.value("x = 1").await;
    let died = run_in(&cell, &other, "import os; os._exit(7)").await;
    assert_eq!((&died["status"], &died["kernel"]["exit_status"]), (&json!("kernel_died"), &json!(7)), "{died}");
    assert_eq!(cell.value("x").await, "1");
    assert_eq!(value_in(&cell, &other, "40 + 2").await, "42");
}

/// Forks until there are no processes left, and takes no interrupt.
const BOMB: &str = "import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True:\n    try: os.fork()\n    except OSError: pass";

async fn a_bomb_in_one_context_says_what_else_died(server: Arc<Server>) {
    let cell = server.create(json!({"template": "python", "resources": {"pids": 80}})).await;
    let (other, quiet) = (context(&cell).await, context(&cell).await);
    for id in [&other, &quiet] {
        value_in(&cell, id, "x = 'kept?'; open('kept', 'w').write('kept'); x").await;
    }
    let bystander = start_in(&cell, &other, "print(1, flush=True)\nimport time\ntime.sleep(60)").await;
    let ran = cell.execute(json!({"code": BOMB, "timeout_seconds": 1})).await;
    assert_eq!((&ran["status"], &ran["kernel"]["cause"]), (&json!("timeout"), &json!("timeout")), "{ran}");
    assert_eq!((&ran["stop"]["step"], &ran["stop"]["variables_kept"]), (&json!("restart"), &json!(false)), "{ran}");
    assert!(ran["limits_hit"].as_array().expect("limits").contains(&json!("pids")), "{ran}");
    let mut also = ran["stop"]["also_ended"].as_array().expect("contexts").clone();
    also.sort_by_key(text);
    assert_eq!(json!(also), json!([other, quiet]), "{ran}");
    let detail = text(&ran["detail"]);
    assert!(detail.len() > 10 && ran["stop"]["took_ms"].as_u64().is_some_and(|ms| ms < 15_000), "{ran}");
    let ended = server.ended(&bystander).await;
    assert_eq!((&ended["status"], &ended["kernel"]["cause"]), (&json!("kernel_died"), &json!("swept")), "{ended}");
    assert!(text(&ended["detail"]).len() > 10, "{ended}");
    for id in [&default_of(&cell), &other, &quiet] {
        assert_eq!(value_in(&cell, id, "'x' in globals(), open('kept').read()").await, "(False, 'kept')");
    }
    let left = cell.value("import os; len([p for p in os.listdir('/proc') if p.isdigit()])").await;
    assert!(left.parse::<u32>().is_ok_and(|n| n < 10), "{left} processes");
    cell.works().await;
    cell.delete().await;
}

async fn asked(cell: &Cell, verb: &str, body: Value) -> Value {
    let path = cell.path(&format!("/contexts/{}/{verb}", default_of(cell)));
    let reply = cell.server.post(&path, &body).await;
    assert_eq!(reply.status, 200, "{verb} {body}: {}", reply.text);
    reply.json
}

async fn completion_is_answered(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("alpha_beta = 1; import math").await;
    let found = asked(&cell, "complete", json!({"code": "print(alpha_be", "cursor": 14})).await;
    assert_eq!(found["status"], "ok", "{found}");
    assert!(found["matches"].as_array().expect("matches").iter().any(|m| text(m).contains("alpha_beta")), "{found}");
    assert_eq!((&found["cursor_start"], &found["cursor_end"]), (&json!(6), &json!(14)), "{found}");
    // Without a cursor it is the end, counted in characters as the protocol has it.
    let found = asked(&cell, "complete", json!({"code": "'å𝄞'; alpha_be"})).await;
    assert_eq!((&found["cursor_start"], &found["cursor_end"]), (&json!(6), &json!(14)), "{found}");
    let found = asked(&cell, "complete", json!({"code": "math.fl\nx = 2", "cursor": 7})).await;
    assert!(found["matches"].to_string().contains("floor"), "{found}");
    let path = cell.path(&format!("/contexts/{}/complete", default_of(&cell)));
    for wrong in [
        json!({}),
        json!({"code": 5}),
        json!({"code": "x", "cursor": -1}),
        json!({"code": "x", "cursor": 99}),
        json!({"code": "x", "more": 1}),
    ] {
        let reply = server.post(&path, &wrong).await;
        assert!([400, 422].contains(&reply.status), "{wrong}: {}", reply.text);
        reply.is_a_problem();
    }
    // A question is no execution.
    assert_eq!(cell.run("1").await["execution_count"], 2);
}

async fn inspection_is_answered(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("def documented(a, b=2):\n    'Says what it does.'\n    return a + b").await;
    let found = asked(&cell, "inspect", json!({"code": "documented", "cursor": 4})).await;
    let said = text(&found["data"]["text/plain"]);
    assert_eq!((&found["status"], &found["found"]), (&json!("ok"), &json!(true)), "{found}");
    assert!(said.contains("Says what it does.") && !said.contains("return a + b"), "{said}");
    let more = asked(&cell, "inspect", json!({"code": "documented", "detail_level": 1})).await;
    assert!(text(&more["data"]["text/plain"]).contains("Source:"), "{more}");
    let nothing = asked(&cell, "inspect", json!({"code": "no_such_name"})).await;
    assert_eq!(nothing["found"], false, "{nothing}");
    let path = cell.path(&format!("/contexts/{}/inspect", default_of(&cell)));
    let reply = server.post(&path, &json!({"code": "x", "detail_level": 7})).await;
    assert!([400, 422].contains(&reply.status), "{}", reply.text);
}

async fn completeness_is_answered(server: Arc<Server>) {
    let cell = server.cell().await;
    for (code, status) in [("1 + 1", "complete"), ("for x in y:", "incomplete"), ("1 +* ", "invalid")] {
        let found = asked(&cell, "is_complete", json!({"code": code})).await;
        assert_eq!(found["status"], status, "{code}: {found}");
    }
    assert_eq!(asked(&cell, "is_complete", json!({"code": "if x:"})).await["indent"], "    ");
}

/// The kernel answers in order, so these wait; whoever asks is told something in time, and the cell isn't disturbed.
async fn questions_to_a_busy_kernel_are_answered(server: Arc<Server>) {
    let cell = server.cell().await;
    let running = cell.background_until_output("print(1, flush=True)\nimport time\ntime.sleep(2)\n'undisturbed'").await;
    let path = cell.path(&format!("/contexts/{}/complete", default_of(&cell)));
    let began = Instant::now();
    let reply = server.post(&path, &json!({"code": "pri"})).await;
    assert!(began.elapsed() < NEVER / 2, "{:?}", began.elapsed());
    if reply.status == 200 {
        assert!(reply.json["matches"].to_string().contains("print"), "{}", reply.text);
    } else {
        reply.is_a_problem();
    }
    let ended = server.ended(&running).await;
    assert_eq!((&ended["status"], &ended["results"][0]["data"]["text/plain"]), (&json!("ok"), &json!("'undisturbed'")));
    // A loop without an end costs the asker a while and nothing else.
    let running = cell.background_until_output(LOOP).await;
    let began = Instant::now();
    server.post(&path, &json!({"code": "pri"})).await.is_a_problem();
    assert!(began.elapsed() < NEVER, "{:?}", began.elapsed());
    assert_eq!(server.execution(&running).await["status"], "running");
    server.post(&format!("/v1/executions/{running}/cancel"), &Value::Null).await;
    assert_eq!(server.ended(&running).await["status"], "cancelled");
    cell.works().await;
    let found = asked(&cell, "complete", json!({"code": "pri"})).await;
    assert!(found["matches"].to_string().contains("print"), "{found}");
}

async fn user_expressions_are_answered(server: Arc<Server>) {
    let cell = server.cell().await;
    let asked = json!({"x": "x", "both": "(x, x)", "absent": "no_such_name", "broken": "1 +", "shown": "Shown()"});
    let code = "x = 'å'\nclass Shown:\n    def _repr_html_(self): return '<b>'\n    def __repr__(self): return 'plain'";
    let ran = cell.execute(json!({"code": code, "user_expressions": asked})).await;
    let values = &ran["user_expressions"];
    assert_eq!((&ran["status"], values.as_object().map(serde_json::Map::len)), (&json!("ok"), Some(5)), "{ran}");
    assert_eq!(values["x"], json!({"status": "ok", "data": {"text/plain": "'å'"}, "metadata": {}}));
    assert_eq!(values["both"]["data"]["text/plain"], "('å', 'å')");
    assert_eq!(values["shown"]["data"], json!({"text/html": "<b>", "text/plain": "plain"}));
    for (name, error) in [("absent", "NameError"), ("broken", "SyntaxError")] {
        let value = &values[name];
        assert_eq!((&value["status"], &value["ename"]), (&json!("error"), &json!(error)), "{value}");
        assert!(value["evalue"].is_string() && value["traceback"].is_array(), "{value}");
    }
    // Code that fails has no values, and none were asked for here.
    let failed = cell.execute(json!({"code": "1/0", "user_expressions": {"x": "x"}})).await;
    assert_eq!((&failed["status"], &failed["user_expressions"]), (&json!("error"), &json!({})), "{failed}");
    assert_eq!(cell.run("1").await["user_expressions"], json!({}));
    // They are part of the time limit.
    let slow = json!({"code": "1", "user_expressions": {"slow": "__import__('time').sleep(60)"}, "timeout_seconds": 1});
    let slow = cell.execute(slow).await;
    assert!(slow["duration_ms"].as_u64().is_some_and(|ms| ms < 10_000), "{slow}");
    for wrong in [json!(["x"]), json!({"x": 5}), json!("x")] {
        let reply = server.post(&cell.path("/executions"), &json!({"code": "1", "user_expressions": wrong})).await;
        assert!([400, 422].contains(&reply.status), "{wrong}: {}", reply.text);
    }
    cell.works().await;
}

async fn comm_messages_are_events(server: Arc<Server>) {
    let cell = server.cell().await;
    let code = "from comm import create_comm\n\
        c = create_comm(target_name='t', data={'a': [1, 'å']}, metadata={'m': 2}, buffers=[b'\\x00\\xff', b''])\n\
        c.send({'b': 2}, buffers=[bytes(range(256))])\nprint('between', flush=True)\nc.close({'last': True})\nc.comm_id";
    let events = cell.stream(json!({"code": code}), Form::Sse).await.rest().await;
    let ran = &events[events.len() - 1].data["execution"];
    assert_eq!(ran["status"], "ok", "{ran}");
    let id = text(&ran["results"][0]["data"]["text/plain"]).replace('\'', "");
    let comms: Vec<_> = events.iter().filter(|e| e.kind == "comm").map(|e| &e.data).collect();
    let kinds: Vec<_> = comms.iter().map(|c| text(&c["msg_type"])).collect();
    assert_eq!(kinds, ["comm_open", "comm_msg", "comm_close"], "{comms:?}");
    assert!(comms.iter().all(|c| c["content"]["comm_id"] == json!(id)), "{comms:?} {id}");
    let [open, message, close] = comms[..] else { panic!("three of them") };
    assert_eq!((&open["content"]["target_name"], &open["content"]["data"]), (&json!("t"), &json!({"a": [1, "å"]})));
    assert_eq!((&open["metadata"], &open["buffers_base64"]), (&json!({"m": 2}), &json!(["AP8=", ""])));
    let bytes = BASE64.decode(text(&message["buffers_base64"][0])).expect("base64");
    assert!(bytes.iter().copied().eq(0..=255), "{message}");
    assert_eq!((&message["content"]["data"], &close["content"]["data"]), (&json!({"b": 2}), &json!({"last": true})));
    // In the order in which they were sent, with what was printed between them.
    let order: Vec<_> = events.iter().map(|e| e.kind.as_str()).filter(|k| ["comm", "stdout"].contains(k)).collect();
    assert_eq!(order, ["comm", "comm", "stdout", "comm"]);
    // They are events only, and they are bounded.
    let flood = "for n in range(20_000): c = create_comm(target_name='t', data={'x': 'y' * 1000})\n'over'";
    let ran = cell.run(flood).await;
    assert_eq!((&ran["status"], &ran["limits_hit"]), (&json!("ok"), &json!(["output"])), "{ran}");
    cell.works().await;
}

async fn setup_of_a_template_comes_before_the_first_cell(server: Arc<Server>) {
    let cell = server.create(json!({"template": "prepared"})).await;
    let ran = cell.run("greet('du'), preset + 1, math.floor(2.5)").await;
    assert_eq!(ran["results"][0]["data"]["text/plain"], "('hej du', 42, 2)", "{ran}");
    assert_eq!((&ran["execution_count"], &ran["stdout"]), (&json!(1), &json!("")), "setup is nobody's cell");
    // Without it the notebook would not run again.
    let notebook = server.get(&cell.path("/notebook")).await;
    assert_eq!(notebook.json["cells"].as_array().map(Vec::len), Some(2), "{}", notebook.text);
    assert_eq!(notebook.json["cells"][0]["execution_count"], Value::Null, "{}", notebook.text);
    assert!(text(&notebook.json["cells"][0]["source"]).contains("words of the setup"), "{}", notebook.text);
}

async fn setup_of_a_create_comes_after_the_templates(server: Arc<Server>) {
    let setup = "preset += 1\nfrom_create = greet('create')\nopen('made', 'w').write('by setup')";
    let cell = server.create(json!({"template": "prepared", "setup": setup})).await;
    assert_eq!(cell.value("preset, from_create, open('made').read()").await, "(42, 'hej create', 'by setup')");
    // What it has written is not a change of the first cell.
    assert_eq!(cell.run("1").await["files"], json!([]));
}

async fn setup_runs_for_every_kernel(server: Arc<Server>) {
    let cell = server.create(json!({"template": "prepared", "setup": "own = preset * 2"})).await;
    let look = "preset, own, 'x' in globals()";
    cell.value("x = 1; preset = 0; x").await;
    assert_eq!(server.post(&cell.path("/restart"), &Value::Null).await.status, 200);
    let ran = cell.run(look).await;
    assert_eq!(ran["results"][0]["data"]["text/plain"], "(41, 82, False)", "after a restart: {ran}");
    assert_eq!(ran["execution_count"], 1);
    assert_eq!(cell.run("import os; os._exit(1)").await["status"], "kernel_died");
    assert_eq!(cell.value(look).await, "(41, 82, False)", "after a death");
    let ignores = "import time\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass";
    let ran = cell.execute(json!({"code": ignores, "timeout_seconds": 0.5, "on_timeout": "restart"})).await;
    assert_eq!(ran["status"], "timeout", "{ran}");
    assert_eq!(cell.value(look).await, "(41, 82, False)", "after a time limit");
    let other = context(&cell).await;
    assert_eq!(value_in(&cell, &other, look).await, "(41, 82, False)", "in another context");
}

/// A session that a create made before it failed is over, with the reason, and nothing of it is left.
async fn leaves_nothing(server: &Server, label: &str) {
    let reply = server.get(&format!("/v1/sessions?label=made:{label}")).await;
    let sessions = reply.json["sessions"].as_array().expect("sessions").clone();
    assert_eq!(sessions.len(), 1, "{}", reply.text);
    assert_eq!((&sessions[0]["state"], &sessions[0]["end_reason"]), (&json!("ended"), &json!("start_failed")));
    assert!(sessions[0]["start_error"].is_string(), "{}", sessions[0]);
    assert_eq!(server.containers(&text(&sessions[0]["id"])).await, Vec::<String>::new());
}

async fn setup_that_fails_is_the_creates_error(server: Arc<Server>) {
    let rows = [
        ("template", json!({"template": "broken"}), "KeyError", "absent"),
        (
            "create",
            json!({"template": "python", "setup": "x = 1\nraise ValueError('no luck')"}),
            "ValueError",
            "no luck",
        ),
        ("syntax", json!({"template": "python", "setup": "1 +"}), "SyntaxError", ""),
        ("exit", json!({"template": "python", "setup": "import sys; sys.exit('bye')"}), "SystemExit", "bye"),
    ];
    for (label, mut request, name, value) in rows {
        request["labels"] = json!({"made": label});
        let reply = server.post("/v1/sessions", &request).await;
        assert_eq!(reply.status, 422, "{label}: {}", reply.text);
        reply.is_a_problem();
        let detail = text(&reply.json["detail"]);
        assert!(detail.contains(name) && detail.contains(value), "{label}: {detail}");
        assert!(!detail.contains('\u{1b}'), "{label}: {detail:?}");
        assert_eq!(reply.json["retryable"], false, "{label}: {}", reply.text);
        leaves_nothing(&server, label).await;
    }
    let long = server.post("/v1/sessions", &json!({"template": "python", "setup": "#".repeat(8 << 20)})).await;
    assert_eq!((long.status, long.pointers()), (422, vec!["/setup".to_owned()]), "{}", long.text);
    let wrong = server.post("/v1/sessions", &json!({"template": "python", "setup": 5})).await;
    assert_eq!(wrong.status, 400, "{}", wrong.text);
}

async fn setup_that_ends_its_kernel_is_the_creates_error(server: Arc<Server>) {
    let request = json!({"template": "python", "setup": "import os; os._exit(3)", "labels": {"made": "dead"}});
    let reply = server.post("/v1/sessions", &request).await;
    assert!([422, 502].contains(&reply.status), "{}", reply.text);
    reply.is_a_problem();
    let detail = text(&reply.json["detail"]);
    assert!(detail.contains("setup") && detail.contains('3'), "{detail}");
    leaves_nothing(&server, "dead").await;
}

async fn setup_that_asks_for_input_is_refused(server: Arc<Server>) {
    let request = json!({"template": "python", "setup": "input('name? ')", "labels": {"made": "asks"}});
    let reply = server.post("/v1/sessions", &request).await;
    assert_eq!(reply.status, 422, "{}", reply.text);
    assert!(text(&reply.json["detail"]).contains("StdinNotImplementedError"), "{}", reply.text);
    leaves_nothing(&server, "asks").await;
}

/// Two on a server that waits for eight seconds at most, since the limit is the server's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn setup_that_does_not_end() {
    let _alone = MACHINE.lock().await;
    let server = Server::start("[engine]\nstart_timeout = \"8s\"\n").await;
    let cases =
        cases![server; setup_that_sleeps_ends_at_the_start_timeout, setup_that_holds_on_ends_at_the_start_timeout];
    server.run_and_finish(2, cases).await;
}

async fn setup_that_sleeps_ends_at_the_start_timeout(server: Arc<Server>) {
    is_given_up(&server, "sleeps", "import time; time.sleep(600)").await;
}

async fn setup_that_holds_on_ends_at_the_start_timeout(server: Arc<Server>) {
    let code =
        "import time\nprint('x' * 10_000_000)\nwhile True:\n    try: time.sleep(10)\n    except BaseException: pass";
    is_given_up(&server, "holds", code).await;
}

async fn is_given_up(server: &Server, label: &str, setup: &str) {
    let began = Instant::now();
    let request = json!({"template": "python", "setup": setup, "labels": {"made": label}});
    let reply = server.post("/v1/sessions", &request).await;
    assert!((6.0..14.0).contains(&began.elapsed().as_secs_f64()), "{:?}", began.elapsed());
    assert!([422, 504].contains(&reply.status), "{}", reply.text);
    reply.is_a_problem();
    assert!(text(&reply.json["detail"]).contains("setup"), "{}", reply.text);
    leaves_nothing(server, label).await;
}

/// Waits until the run with a label is over and its container is gone.
async fn is_over(server: &Server, label: &str) -> Value {
    let began = Instant::now();
    loop {
        let sessions = server.get(&format!("/v1/sessions?label=run:{label}")).await.json["sessions"].clone();
        let ended = sessions[0]["state"] == "ended";
        if ended && server.containers(&text(&sessions[0]["id"])).await.is_empty() {
            assert_eq!(sessions.as_array().map(Vec::len), Some(1), "{sessions}");
            return sessions[0].clone();
        }
        assert!(began.elapsed() < NEVER, "{sessions}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn a_run_is_one_call(server: Arc<Server>) {
    let request = json!({"template": "prepared", "labels": {"run": "whole"}, "env": {"WORD": "env"},
        "resources": {"memory_mb": 600}, "timeouts": {"execution_seconds": 30}, "network": {"mode": "none"}, "setup": "extra = preset + 1",
        "stdin": ["a line"], "user_expressions": {"extra": "extra"}, "timeout_seconds": 20, "max_output_bytes": 4096, "on_timeout": "restart",
        "code": "import os\nprint(os.environ['WORD'], input(), open('new', 'w').write('four'))\nextra"});
    let reply = server.post("/v1/runs", &request).await;
    let ran = &reply.json;
    assert_eq!((reply.status, &ran["status"]), (200, &json!("ok")), "{}", reply.text);
    assert!(text(&ran["stdout"]).contains("env a line 4\n"), "{ran}");
    assert_eq!(
        (&ran["results"][0]["data"]["text/plain"], &ran["files"][0]["path"]),
        (&json!("42"), &json!("new")),
        "{ran}"
    );
    assert_eq!(ran["user_expressions"]["extra"]["data"]["text/plain"], "42", "{ran}");
    let session = is_over(&server, "whole").await;
    assert_eq!(session["id"], ran["session_id"]);
    // The record stays, as does the notebook; the container doesn't.
    assert_eq!(&server.execution(&text(&ran["id"])).await, ran);
    let notebook = server.get(&format!("/v1/sessions/{}/notebook", text(&session["id"]))).await;
    assert_eq!((notebook.status, notebook.json["cells"].as_array().map(Vec::len)), (200, Some(3)), "{}", notebook.text);
    // Everything but the code has a default, and nothing is left of one run in the next.
    for _ in 0..2 {
        let reply =
            server.post("/v1/runs", &json!({"template": "python", "code": "n = globals().get('n', 0) + 1\nn"})).await;
        assert_eq!(reply.json["results"][0]["data"]["text/plain"], "1", "{}", reply.text);
    }
    let named = json!({"template": "python", "code": "1", "name": "once", "labels": {"run": "named"}});
    let reply = server.post("/v1/runs", &named).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    assert_eq!(is_over(&server, "named").await["name"], "once");
}

async fn a_run_streams(server: Arc<Server>) {
    for (accept, form) in [("text/event-stream", "events"), ("application/x-ndjson", "lines")] {
        let request = json!({"template": "python", "code": "print(6 * 7)", "labels": {"run": form}});
        let reply = server.send(server.request(Method::POST, "/v1/runs").header("accept", accept).json(&request)).await;
        assert!(reply.status == 200 && reply.header("content-type").starts_with(accept), "{}", reply.text);
        for word in ["execution.queued", "execution.started", "42\\n", "execution.completed", "\"status\":\"ok\""] {
            assert!(reply.text.contains(word), "{word} is not in {}", reply.text);
        }
        is_over(&server, form).await;
    }
}

async fn a_run_says_how_it_failed(server: Arc<Server>) {
    let run = async |label: &str, more: Value| {
        let mut request = json!({"template": "python", "labels": {"run": label}});
        request.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let reply = server.post("/v1/runs", &request).await;
        assert_eq!(reply.status, 200, "{label}: {}", reply.text);
        is_over(&server, label).await;
        reply.json
    };
    let failed = run("fails", json!({"code": "1/0"})).await;
    assert_eq!((&failed["status"], &failed["error"]["name"]), (&json!("error"), &json!("ZeroDivisionError")));
    let late = run("late", json!({"code": "while True: pass", "timeout_seconds": 1})).await;
    assert_eq!((&late["status"], &late["stop"]["step"]), (&json!("timeout"), &json!("interrupt")), "{late}");
    let died = run("dies", json!({"code": "import os; os._exit(3)"})).await;
    assert_eq!((&died["status"], &died["kernel"]["exit_status"]), (&json!("kernel_died"), &json!(3)), "{died}");
    let full = run("full", json!({"code": "x = bytearray(2 << 30)"})).await;
    assert_eq!((&full["status"], &full["limits_hit"]), (&json!("oom"), &json!(["memory"])), "{full}");
}

async fn a_run_in_the_background(server: Arc<Server>) {
    let request = json!({"template": "python", "code": "6 * 7", "background": true, "labels": {"run": "background"}});
    let reply = server.post("/v1/runs", &request).await;
    assert_eq!(reply.status, 202, "{}", reply.text);
    let id = text(&reply.json["id"]);
    assert_eq!(reply.header("location"), format!("/v1/executions/{id}"));
    assert_eq!(server.ended(&id).await["results"][0]["data"]["text/plain"], "42");
    is_over(&server, "background").await;
}

async fn a_run_that_is_wrong_starts_nothing(server: Arc<Server>) {
    let rows = [
        (json!({"template": "python"}), 400),
        (json!({"template": "python", "code": 5}), 400),
        (json!({"template": "python", "code": "1", "unknown": 1}), 400),
        (json!({"template": "python", "code": "1", "context_id": "ctx"}), 400),
        (json!({"template": "absent", "code": "1"}), 422),
        (json!({"template": "python", "code": "1", "timeout_seconds": 1e9}), 422),
        (json!({"template": "python", "code": "1", "resources": {"memory_mb": 1}}), 422),
    ];
    for (mut request, status) in rows {
        request["labels"] = json!({"run": "wrong"});
        let reply = server.post("/v1/runs", &request).await;
        assert_eq!(reply.status, status, "{request}: {}", reply.text);
        reply.is_a_problem();
    }
    let sessions = server.get("/v1/sessions?label=run:wrong").await.json;
    assert_eq!(sessions["sessions"], json!([]), "none was begun");
    // Its setup's failure is its own.
    let request =
        json!({"template": "python", "code": "1", "setup": "raise LookupError('setup')", "labels": {"run": "setup"}});
    let reply = server.post("/v1/runs", &request).await;
    assert_eq!(reply.status, 422, "{}", reply.text);
    assert!(text(&reply.json["detail"]).contains("LookupError"), "{}", reply.text);
    is_over(&server, "setup").await;
}

async fn a_run_ends_with_its_caller_if_that_was_asked(server: Arc<Server>) {
    let request =
        json!({"template": "python", "code": LOOP, "on_disconnect": "interrupt", "labels": {"run": "stream"}});
    let asked = server.request(Method::POST, "/v1/runs").header("accept", "text/event-stream").json(&request);
    let mut response = asked.send().await.expect("an answer");
    let mut seen = String::new();
    while !seen.contains("event: stdout") {
        seen.push_str(&String::from_utf8_lossy(&response.chunk().await.expect("a part").expect("a part")));
    }
    drop(response);
    is_over(&server, "stream").await;
    // Those who wait for the whole answer hang up while it runs, and while it starts.
    for label in ["running", "starting"] {
        let request =
            json!({"template": "python", "code": LOOP, "on_disconnect": "interrupt", "labels": {"run": label}});
        let asked = server.request(Method::POST, "/v1/runs").json(&request).send();
        let state = if label == "running" { "busy" } else { "starting" };
        tokio::select! {
            answer = asked => panic!("it can't have ended: {answer:?}"),
            () = is_seen(&server, label, state) => {}
        }
        let began = Instant::now();
        is_over(&server, label).await;
        assert!(began.elapsed() < Duration::from_secs(15), "{label}: {:?}", began.elapsed());
    }
}

/// Waits until the session of a run is in a state.
async fn is_seen(server: &Server, label: &str, state: &str) {
    let began = Instant::now();
    while server.get(&format!("/v1/sessions?label=run:{label}")).await.json["sessions"][0]["state"] != state {
        assert!(began.elapsed() < NEVER, "{label} was never {state}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn a_run_outlives_its_caller_and_then_goes(server: Arc<Server>) {
    for (label, state) in [("left-early", "starting"), ("left-late", "busy")] {
        let code = "import time; time.sleep(3); open('done', 'w').close(); print('done')";
        let request = json!({"template": "python", "code": code, "labels": {"run": label}});
        let asked = server.request(Method::POST, "/v1/runs").json(&request).send();
        tokio::select! {
            answer = asked => panic!("it can't have ended: {answer:?}"),
            () = is_seen(&server, label, state) => {}
        }
        let session = is_over(&server, label).await;
        let notebook = server.get(&format!("/v1/sessions/{}/notebook", text(&session["id"]))).await;
        assert_eq!(notebook.json["cells"][0]["outputs"][0]["text"], "done\n", "{label}: {}", notebook.text);
    }
}

/// Starts code that asks, and waits until it does. Answers with the execution's id and its further events.
async fn asking(cell: &Cell, code: &str, more: Value) -> (String, server::Follow) {
    let mut request = json!({"code": code, "stdin": "interactive"});
    request.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let mut follow = cell.stream(request, Form::Sse).await;
    let id = text(&follow.next().await.expect("an event").data["execution_id"]);
    follow.until("input.requested").await;
    (id, follow)
}

/// The execution as the last of its events tells it.
async fn last(follow: server::Follow) -> Value {
    let mut events = follow.rest().await;
    events.pop().expect("an event").data["execution"].take()
}

async fn answer(server: &Server, execution: &str, line: &str) -> Reply {
    server.post(&format!("/v1/executions/{execution}/input"), &json!({"text": line})).await
}

async fn input_is_answered_once(server: Arc<Server>) {
    let cell = server.cell().await;
    let (id, follow) = asking(&cell, "import time\nx = input('x? ')\ntime.sleep(2)\nx", json!({})).await;
    let view = answer(&server, &id, "å 𝄞").await;
    assert_eq!(
        (view.status, &view.json["id"], &view.json["status"]),
        (200, &json!(id), &json!("running")),
        "{}",
        view.text
    );
    answer(&server, &id, "again").await.problem(409, "state-conflict");
    let ran = last(follow).await;
    assert_eq!((&ran["status"], &ran["results"][0]["data"]["text/plain"]), (&json!("ok"), &json!("'å 𝄞'")), "{ran}");
    answer(&server, &id, "late").await.problem(409, "state-conflict");
    // The question is replayed, the answer is nowhere.
    let replayed = server.follow(&id, 0).await.rest().await;
    let asked: Vec<_> = replayed.iter().filter(|e| e.kind == "input.requested").map(|e| e.data.clone()).collect();
    assert_eq!(asked, [json!({"prompt": "x? ", "password": false})]);
    let (id, follow) = asking(&cell, "import getpass\nlen(getpass.getpass('secret? '))", json!({})).await;
    answer(&server, &id, "p4ssw0rd!").await;
    assert_eq!(last(follow).await["results"][0]["data"]["text/plain"], "9");
    let replayed = server.follow(&id, 0).await.rest().await;
    assert!(!format!("{replayed:?}").contains("p4ssw0rd!"));
    assert_eq!(replayed.iter().find(|e| e.kind == "input.requested").expect("a question").data["password"], true);
    let (id, follow) = asking(&cell, "input()", json!({})).await;
    answer(&server, &id, "").await;
    assert_eq!(last(follow).await["results"][0]["data"]["text/plain"], "''", "an empty line is a line");
}

async fn input_that_nobody_asked_for_is_refused(server: Arc<Server>) {
    let cell = server.cell().await;
    let done = text(&cell.run("1").await["id"]);
    answer(&server, &done, "x").await.problem(409, "state-conflict");
    let running = cell.background_until_output(LOOP).await;
    let waiting = cell.background("input()").await;
    for id in [&running, &waiting] {
        answer(&server, id, "x").await.problem(409, "state-conflict");
    }
    server.post(&format!("/v1/executions/{running}/cancel"), &Value::Null).await;
    assert_eq!(server.ended(&waiting).await["status"], "input_denied", "nothing was kept for later");
    answer(&server, &running.replace("exe0", "exe7"), "x").await.problem(404, "not-found");
    let (id, follow) = asking(&cell, "input()", json!({})).await;
    let path = format!("/v1/executions/{id}/input");
    server.send(server.foreign(Method::POST, &path).json(&json!({"text": "x"}))).await.problem(404, "not-found");
    for wrong in [json!({}), json!({"text": 5}), json!({"text": null}), json!({"text": "x", "more": 1}), json!("x")] {
        let reply = server.post(&path, &wrong).await;
        assert!([400, 422].contains(&reply.status), "{wrong}: {}", reply.text);
    }
    assert_eq!(answer(&server, &id, "right").await.status, 200);
    assert_eq!(last(follow).await["results"][0]["data"]["text/plain"], "'right'");
}

async fn one_of_two_answers_is_taken(server: Arc<Server>) {
    let cell = server.cell().await;
    for _ in 0..5 {
        let (id, follow) = asking(&cell, "import time\nx = input()\ntime.sleep(0.3)\nx", json!({})).await;
        let answers = ["a", "b", "c", "d"].map(|line| {
            let (server, id) = (Arc::clone(&server), id.clone());
            async move { (answer(&server, &id, line).await.status, line) }
        });
        let taken = futures_util::future::join_all(answers).await;
        let taken: Vec<_> = taken.into_iter().filter(|(status, _)| *status == 200).collect();
        assert_eq!(taken.len(), 1, "{taken:?}");
        let ran = last(follow).await;
        assert_eq!(ran["results"][0]["data"]["text/plain"], format!("'{}'", taken[0].1), "{ran}");
    }
}

/// The end of an execution that waited for input and got none; the next one works and is asked nothing.
async fn ends_without_an_answer(cell: &Cell, id: &str, status: &str) -> Value {
    let ended = cell.server.ended(id).await;
    assert_eq!(ended["status"], status, "{ended}");
    answer(&cell.server, id, "too late").await.problem(409, "state-conflict");
    cell.works().await;
    ended
}

async fn a_time_limit_ends_a_wait_for_input(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("kept = 1").await;
    let (id, _follow) = asking(&cell, "x = input('x? ')", json!({"timeout_seconds": 1})).await;
    let ended = ends_without_an_answer(&cell, &id, "timeout").await;
    assert!(ended["duration_ms"].as_u64().is_some_and(|ms| (1000..5000).contains(&ms)), "{ended}");
    assert_eq!(
        (&ended["stop"]["step"], &ended["stop"]["variables_kept"]),
        (&json!("interrupt"), &json!(true)),
        "{ended}"
    );
    assert_eq!(cell.value("kept, 'x' in globals()").await, "(1, False)");
}

async fn a_cancel_ends_a_wait_for_input(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("kept = 1").await;
    let (id, _follow) = asking(&cell, "x = input('x? ')", json!({})).await;
    assert_eq!(server.post(&format!("/v1/executions/{id}/cancel"), &Value::Null).await.status, 200);
    let ended = ends_without_an_answer(&cell, &id, "cancelled").await;
    assert_eq!(
        (&ended["stop"]["step"], &ended["kernel"]["restarted"]),
        (&json!("interrupt"), &json!(false)),
        "{ended}"
    );
    assert_eq!(cell.value("kept").await, "1");
    // What asks again next is asked for by itself.
    let (id, follow) = asking(&cell, "input('y? ')", json!({})).await;
    answer(&server, &id, "fresh").await;
    assert_eq!(last(follow).await["results"][0]["data"]["text/plain"], "'fresh'");
}

async fn an_interrupt_ends_a_wait_for_input(server: Arc<Server>) {
    let cell = server.cell().await;
    let (id, _follow) = asking(&cell, "x = input('x? ')", json!({})).await;
    assert_eq!(server.post(&cell.path("/interrupt"), &Value::Null).await.status, 200);
    let ended = ends_without_an_answer(&cell, &id, "error").await;
    assert_eq!(ended["error"]["name"], "KeyboardInterrupt", "{ended}");
}

async fn a_death_ends_a_wait_for_input(server: Arc<Server>) {
    let cell = server.cell().await;
    let code = "import os, threading\nthreading.Timer(0.5, lambda: os._exit(3)).start()\ninput()";
    let (id, _follow) = asking(&cell, code, json!({})).await;
    let ended = ends_without_an_answer(&cell, &id, "kernel_died").await;
    assert_eq!(ended["kernel"]["exit_status"], 3, "{ended}");
}

async fn lines_are_fed_in_order_and_run_out(server: Arc<Server>) {
    let cell = server.cell().await;
    let ran =
        cell.execute(json!({"code": "a, b = input('a? '), input('b? ')\na, b", "stdin": ["eins", "", "drei"]})).await;
    assert_eq!(ran["results"][0]["data"]["text/plain"], "('eins', '')", "{ran}");
    // What was left over is not for the next one.
    assert_eq!(cell.run("input()").await["status"], "input_denied");
    let ran = cell.execute(json!({"code": "seen = [input()]\nseen.append(input())", "stdin": ["only"]})).await;
    assert_eq!((&ran["status"], &ran["error"]["name"]), (&json!("error"), &json!("EOFError")), "{ran}");
    assert_eq!(cell.value("seen").await, "['only']");
    let caught = "try:\n    while True: print(input())\nexcept EOFError: print('end')";
    let ran = cell.execute(json!({"code": caught, "stdin": ["1", "2"]})).await;
    assert_eq!((&ran["status"], &ran["stdout"]), (&json!("ok"), &json!("1\n2\nend\n")), "{ran}");
    let ran = cell.execute(json!({"code": "input()", "stdin": []})).await;
    assert_eq!(ran["error"]["name"], "EOFError", "no lines are lines that have run out: {ran}");
    let ran = cell.execute(json!({"code": "import getpass\ngetpass.getpass()", "stdin": ["word"]})).await;
    assert_eq!(ran["results"][0]["data"]["text/plain"], "'word'", "{ran}");
    let lines: Vec<_> = (0..500).map(|n| n.to_string()).collect();
    let ran = cell.execute(json!({"code": "sum(int(input()) for _ in range(500))", "stdin": lines})).await;
    assert_eq!(ran["results"][0]["data"]["text/plain"], "124750", "{ran}");
    cell.works().await;
}

async fn input_has_bounds(server: Arc<Server>) {
    let cell = server.cell().await;
    let (id, follow) = asking(&cell, "len(input())", json!({})).await;
    let reply = answer(&server, &id, &"x".repeat(8 << 20)).await;
    assert!((400..500).contains(&reply.status), "{}", reply.text);
    reply.is_a_problem();
    assert_eq!(answer(&server, &id, &"x".repeat(1000)).await.status, 200, "it still waits");
    assert_eq!(last(follow).await["results"][0]["data"]["text/plain"], "1000");
    let path = cell.path("/executions");
    for (what, stdin) in [
        ("long", json!(["x".repeat(8 << 20)])),
        ("many", json!(vec!["x"; 1_000_000])),
        ("word", json!("allow")),
        ("number", json!(5)),
        ("numbers", json!([5])),
        ("object", json!({"lines": []})),
    ] {
        let reply = server.post(&path, &json!({"code": "1", "stdin": stdin})).await;
        assert!((400..500).contains(&reply.status), "{what}: {}", reply.text);
        reply.is_a_problem();
    }
    assert_eq!(cell.run("2").await["execution_count"], 2, "none of them ran");
}

async fn a_timeout_may_go_straight_to_a_restart(server: Arc<Server>) {
    let cell = server.cell().await;
    let ran = cell.execute(json!({"code": "x = 1\nwhile True: pass", "timeout_seconds": 0.5})).await;
    let stop = &ran["stop"];
    assert_eq!(
        (&stop["step"], &stop["variables_kept"], &stop["also_ended"]),
        (&json!("interrupt"), &json!(true), &json!([])),
        "{ran}"
    );
    assert!(stop["took_ms"].as_u64().is_some_and(|ms| ms < 4000) && ran["detail"].is_string(), "{ran}");
    assert_eq!(cell.value("x").await, "1");
    let code = "open('kept', 'w').write('kept')\nwhile True: pass";
    let ran = cell.execute(json!({"code": code, "timeout_seconds": 0.5, "on_timeout": "restart"})).await;
    let stop = &ran["stop"];
    assert_eq!((&ran["status"], &ran["kernel"]["cause"]), (&json!("timeout"), &json!("timeout")), "{ran}");
    assert_eq!(
        (&stop["step"], &stop["variables_kept"], &stop["also_ended"]),
        (&json!("restart"), &json!(false), &json!([])),
        "{ran}"
    );
    // The grace of an interrupt is four seconds here.
    assert!(stop["took_ms"].as_u64().is_some_and(|ms| ms < 3000), "{ran}");
    assert_eq!(cell.value("'x' in globals(), open('kept').read()").await, "(False, 'kept')");
    let ended = cell.execute(json!({"code": "1", "on_timeout": "restart"})).await;
    assert_eq!((&ended["status"], &ended["stop"]), (&json!("ok"), &Value::Null), "nothing had to be stopped");
    let reply = server.post(&cell.path("/executions"), &json!({"code": "1", "on_timeout": "explode"})).await;
    assert_eq!(reply.status, 400, "{}", reply.text);
}

async fn a_death_ends_the_session_where_the_template_says_so(server: Arc<Server>) {
    let cell = server.create(json!({"template": "fragile"})).await;
    cell.works().await;
    let died = cell.run("import os; os._exit(3)").await;
    assert_eq!((&died["status"], &died["kernel"]["exit_status"]), (&json!("kernel_died"), &json!(3)), "{died}");
    assert_eq!(cell.wait("ended").await["end_reason"], "kernel_died");
    assert_eq!(cell.containers().await, Vec::<String>::new());
    let late = server.post(&cell.path("/executions"), &json!({"code": "1"})).await;
    assert_eq!(late.problem(410, "session-ended")["end_reason"], "kernel_died");
    let notebook = server.get(&cell.path("/notebook")).await;
    assert_eq!(notebook.json["cells"].as_array().map(Vec::len), Some(2), "{}", notebook.text);
    let cell = server.create(json!({"template": "fragile", "resources": {"memory_mb": 256, "disk_mb": 32}})).await;
    let full = cell.run("x = bytearray(1 << 30)").await;
    assert_eq!(full["status"], "oom", "{full}");
    assert_eq!(cell.wait("ended").await["end_reason"], "oom");
    // What is said is what happened: there is no new kernel, and no file is kept.
    for ended in [died, full] {
        assert_eq!(ended["kernel"]["restarted"], false, "{ended}");
        assert!(!text(&ended["detail"]).contains("files are kept"), "{ended}");
    }
}

async fn effects_of_a_cell_are_told(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value(
        "import os, subprocess, sys, time\nfor n in ('old', 'gone', 'same', 'rewritten'): open(n, 'w').write('before')",
    )
    .await;
    let code = "open('new.txt', 'w').write('hello')\nopen('old', 'a').write(' and after')\nos.remove('gone')\n\
        open('same').read()\nopen('rewritten', 'w').write('behind')\nos.makedirs('sub/deep')\n\
        open('sub/deep/p.png', 'wb').write(b'\\x89PNG\\r\\n\\x1a\\n' + bytes(8))\nopen('passing', 'w').close(); os.remove('passing')\n\
        block = bytearray(64 << 20)\nuntil = time.process_time() + 0.5\nwhile time.process_time() < until: pass\n\
        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\nprint(child.pid)";
    let ran = cell.run(code).await;
    assert_eq!(ran["status"], "ok", "{ran}");
    let files = ran["files"].as_array().expect("files");
    let mut seen: Vec<_> = files.iter().map(|f| (text(&f["path"]), text(&f["change"]), f["size"].as_u64())).collect();
    seen.sort();
    let row = |path: &str, change: &str, size| (path.to_owned(), change.to_owned(), size);
    let expected = [
        row("gone", "deleted", None),
        row("new.txt", "created", Some(5)),
        row("old", "changed", Some(16)),
        row("rewritten", "changed", Some(6)),
        row("sub/deep/p.png", "created", Some(16)),
    ];
    assert_eq!(seen, expected, "{ran}");
    assert_eq!(ran["files_omitted"], 0);
    let file = |path: &str| files.iter().find(|f| f["path"] == path).expect("a file");
    let hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
    assert_eq!((&file("new.txt")["sha256"], &file("gone")["sha256"]), (&json!(hello), &Value::Null));
    assert_eq!(file("sub/deep/p.png")["mime"], "image/png");
    let processes = ran["processes"].as_array().expect("processes");
    assert_eq!(processes.len(), 1, "{ran}");
    assert_eq!(processes[0]["pid"].as_i64().map(|p| p.to_string()), Some(text(&ran["stdout"]).trim().to_owned()));
    assert!(text(&processes[0]["command"]).contains("time.sleep(600)"), "{ran}");
    let usage = &ran["usage"];
    assert!(usage["cpu_ms"].as_u64().is_some_and(|ms| (450..5000).contains(&ms)), "{usage}");
    assert!(usage["peak_memory_mb"].as_f64().is_some_and(|mb| (80.0..512.0).contains(&mb)), "{usage}");
    assert!(usage["approximate"].is_boolean(), "{usage}");
    // The next one has done nothing of this.
    let next = cell.run("1 + 1").await;
    assert_eq!(
        (&next["files"], &next["processes"], &next["processes_omitted"]),
        (&json!([]), &json!([]), &json!(0)),
        "{next}"
    );
    assert!(next["usage"]["cpu_ms"].as_u64().is_some_and(|ms| ms < 400), "{next}");
    assert_eq!(cell.value("child.poll() is None").await, "True", "what was left behind lives on");
}

async fn many_files_are_counted(server: Arc<Server>) {
    let cell = server.cell().await;
    let ran = cell.run("import os\nos.makedirs('many')\nfor n in range(5000): open(f'many/{n}', 'w').close()").await;
    assert_eq!(ran["status"], "ok", "{ran}");
    let told = ran["files"].as_array().expect("files").len() as u64;
    let omitted = ran["files_omitted"].as_u64().expect("a number");
    assert!((100..5000).contains(&told) && told + omitted >= 5000, "{told} told, {omitted} omitted");
    // Names are text of a caller's code, and stay harmless; one that is no text is counted at least.
    let odd =
        "for n in (b'\\xff\\xfe', b'a\\nb', '\\u202e'.encode(), b'\\x1b[31m'): open(b'/workspace/' + n, 'w').close()";
    let ran = cell.run(odd).await;
    let told = ran["files"].as_array().expect("files").len() as u64;
    let omitted = ran["files_omitted"].as_u64().expect("a number");
    assert!(ran["status"] == "ok" && told >= 3 && told + omitted == 4, "{ran}");
    let processes = "import subprocess, sys\nl = [subprocess.Popen(['sleep', '600']) for _ in range(60)]";
    let ran = cell.run(processes).await;
    let told = ran["processes"].as_array().expect("processes").len() as u64;
    assert_eq!(told + ran["processes_omitted"].as_u64().expect("a number"), 60, "{ran}");
}

async fn effects_of_a_cell_that_dies_are_told(server: Arc<Server>) {
    let cell = server.cell().await;
    let died = cell.run("open('last', 'w').write('words')\nimport os; os._exit(3)").await;
    assert_eq!((&died["status"], &died["files"][0]["path"]), (&json!("kernel_died"), &json!("last")), "{died}");
    let code = "import subprocess\nsubprocess.Popen(['sleep', '600'])\nopen('late', 'w').write('x')\nwhile True: pass";
    let ran = cell.execute(json!({"code": code, "timeout_seconds": 1, "on_timeout": "restart"})).await;
    assert_eq!((&ran["status"], &ran["files"][0]["path"]), (&json!("timeout"), &json!("late")), "{ran}");
    let left =
        "import os; [open(f'/proc/{p}/comm').read() for p in os.listdir('/proc') if p.isdigit()].count('sleep\\n')";
    assert_eq!(cell.value(left).await, "0", "what it left behind died with its kernel");
    assert_eq!(cell.run("1").await["files"], json!([]), "it is told once");
}

async fn limits_that_were_hit_are_told(server: Arc<Server>) {
    let cell =
        server.create(json!({"template": "python", "resources": {"pids": 60, "disk_mb": 16, "memory_mb": 256}})).await;
    assert_eq!(cell.run("1").await["limits_hit"], json!([]));
    let full = cell.run("open('big', 'wb').write(bytes(20 << 20))").await;
    assert_eq!((&full["status"], &full["error"]["name"]), (&json!("error"), &json!("OSError")), "{full}");
    assert_eq!(full["limits_hit"], json!(["disk"]), "{full}");
    assert_eq!(cell.run("import os; os.remove('big')").await["limits_hit"], json!([]));
    let forks = "import os, signal\nchildren = []\ntry:\n    while True:\n        pid = os.fork()\n        if pid == 0: signal.pause()\n        children.append(pid)\n\
        except BlockingIOError as error: print(type(error).__name__)\nfor pid in children:\n    os.kill(pid, 9); os.waitpid(pid, 0)";
    let many = cell.run(forks).await;
    assert_eq!((&many["status"], &many["limits_hit"]), (&json!("ok"), &json!(["pids"])), "{many}");
    assert_eq!(cell.run("1").await["limits_hit"], json!([]), "told once, where it happened");
    let long = cell.run("print('x' * 5_000_000)").await;
    assert_eq!(long["limits_hit"], json!(["output"]), "{}", long["output"]);
    let large = cell.run("x = bytearray(600 << 20)").await;
    assert_eq!((&large["status"], &large["limits_hit"]), (&json!("oom"), &json!(["memory"])), "{large}");
    assert!(large["detail"].is_string(), "{large}");
    cell.works().await;
}
