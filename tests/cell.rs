//! One session at a time, over HTTP: what code gets to see, how it ends, what it puts out, and what it can't reach.

#[path = "support/server.rs"]
mod server;

use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bollard::container::LogOutput;
use bollard::models::{ContainerCreateBody, DeviceMapping, HostConfig};
use bollard::query_parameters::{AttachContainerOptionsBuilder, CreateContainerOptionsBuilder};
use cellblock::config::Environment;
use futures_util::StreamExt;
use serde_json::{Value, json};
use server::{Cell, Form, NEVER, Seen, Server, joined, text};

const SETTINGS: &str = r#"
[executions]
interrupt_grace = "4s"
[templates.tcp]
image = "cellblock/python:latest"
transport = "tcp"
[templates.narrow]
image = "cellblock/python:latest"
[templates.narrow.default]
tmp = "16MiB"
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_cell() {
    let server = Server::start(SETTINGS).await;
    let streams = cases![server; server_sent_events_arrive_as_they_happen, lines_of_json_arrive_as_they_happen];
    let cases = cases![server;
        values_are_kept_from_cell_to_cell,
        a_plot_is_a_png,
        a_figure_of_plotly_is_json,
        rich_results_come_in_every_form,
        an_interrupt_ends_the_loop_and_nothing_else,
        a_time_limit_ends_the_loop_and_nothing_else,
        an_interrupt_in_any_moment_ends_the_cell_at_once,
        a_cancel_in_any_moment_leaves_the_kernel,
        a_cell_that_awaits_is_left_alone,
        a_kernel_that_died_unseen_is_told,
        code_that_ignores_interrupts_costs_its_kernel,
        a_failed_cell_keeps_what_it_did_before,
        a_deleted_session_leaves_no_container,
        text_comes_in_order,
        executions_are_counted,
        output_above_the_cap_keeps_head_and_tail,
        results_above_the_cap_are_left_out,
        input_is_denied,
        a_kernel_that_ends_is_replaced,
        memory_ends_at_the_limit,
        processes_end_at_the_limit,
        the_cell_is_as_narrow_as_was_asked,
        environment_comes_along_and_no_secret_does,
        no_probe_finds_an_open_lock,
        escapes_fail_that_a_free_container_allows,
        nothing_of_the_machine_can_be_called,
        kernels_are_reached_over_tcp,
    ];
    // Arrival times mean nothing on a machine that is busy with other cases.
    let mut failed = server::run(1, streams).await;
    failed.extend(server::run(4, cases).await);
    let left = server.finish().await;
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
    left.unwrap_or_else(|left| panic!("{left}"));
}

async fn values_are_kept_from_cell_to_cell(server: Arc<Server>) {
    let cell = server.cell().await;
    let first = cell.run("x = 40").await;
    assert_eq!((&first["status"], &first["results"]), (&json!("ok"), &json!([])));
    let second = cell.run("x + 2").await;
    assert_eq!(second["status"], "ok");
    assert_eq!(second["language"], "python");
    assert_eq!(
        second["results"],
        json!([
            {"kind": "execute_result", "data": {"text/plain": "42"}, "metadata": {}, "display_id": null}
        ])
    );
}

async fn an_interrupt_in_any_moment_ends_the_cell_at_once(server: Arc<Server>) {
    let cell = server.cell().await;
    for n in 0..40 {
        let running = cell.background("import time; time.sleep(.003)").await;
        tokio::time::sleep(Duration::from_micros(400 * n)).await;
        assert_eq!(server.post(&cell.path("/interrupt"), &Value::Null).await.status, 200);
        let ran = server.ended(&running).await;
        assert!(ran["duration_ms"].as_u64().is_some_and(|ms| ms < 4000), "{n}: {ran}");
        assert!(["ok", "error"].contains(&ran["status"].as_str().unwrap_or_default()), "{n}: {ran}");
        assert_eq!(ran["kernel"]["restarted"], false, "{n}: {ran}");
    }
    cell.works().await;
    cell.delete().await;
}

async fn a_cancel_in_any_moment_leaves_the_kernel(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("x = 41; x").await;
    for n in 0..40 {
        let running = cell.background("import time; time.sleep(90)").await;
        tokio::time::sleep(Duration::from_micros(200 * n)).await;
        let began = Instant::now();
        server.post(&format!("/v1/executions/{running}/cancel"), &Value::Null).await;
        let ran = server.ended(&running).await;
        assert_eq!(ran["status"], "cancelled", "{n}: {ran}");
        assert!(began.elapsed() < Duration::from_secs(4), "{n}, after {:?}: {ran}", began.elapsed());
        assert_eq!(cell.value("x").await, "41", "{n}");
    }
    cell.delete().await;
}

/// The kernel answers other requests while it awaits; that is not its end.
async fn a_cell_that_awaits_is_left_alone(server: Arc<Server>) {
    let cell = server.cell().await;
    let code = "import asyncio\nfor _ in range(30):\n    try:\n        await asyncio.sleep(.1)\n    except (KeyboardInterrupt, asyncio.CancelledError):\n        pass\n'done'";
    let running = cell.background(code).await;
    cell.wait("busy").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    server.post(&cell.path("/interrupt"), &Value::Null).await;
    let ran = server.ended(&running).await;
    let done = ran["results"][0]["data"]["text/plain"] == "'done'";
    assert!(done || ran["error"]["name"].is_string(), "{ran}");
    assert_ne!(ran["error"]["value"], "the kernel ended it without a reply", "{ran}");
    cell.works().await;
    cell.delete().await;
}

async fn a_kernel_that_died_unseen_is_told(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("import os, threading; x = 1; threading.Timer(.2, lambda: os._exit(3)).start(); x").await;
    let began = Instant::now();
    loop {
        let ran = cell.run("'x' in globals()").await;
        if ran["kernel"]["restarted"] == true {
            assert_eq!((&ran["kernel"]["cause"], &ran["kernel"]["exit_status"]), (&json!("died"), &json!(3)), "{ran}");
            break;
        }
        assert!(began.elapsed() < NEVER, "{ran}");
    }
    cell.delete().await;
}

async fn a_figure_of_plotly_is_json(server: Arc<Server>) {
    let cell = server.create(json!({"template": "data"})).await;
    let ran = cell.run("import plotly.express as px\npx.bar(x=[1, 2], y=[3, 4])").await;
    assert_eq!(ran["status"], "ok", "{ran}");
    let figure = &ran["results"][0]["data"]["application/vnd.plotly.v1+json"];
    assert_eq!(figure["data"][0]["type"], "bar", "{ran}");
    cell.delete().await;
}

async fn a_plot_is_a_png(server: Arc<Server>) {
    let cell = server.create(json!({"template": "data"})).await;
    let ran = cell.run("import matplotlib.pyplot as plt\nplt.plot([1, 4, 9])\nplt.show()").await;
    assert_eq!(ran["status"], "ok", "{ran}");
    let image = ran["results"].as_array().expect("results").iter().find_map(|r| r["data"]["image/png"].as_str());
    let png = BASE64.decode(image.expect("an image").trim()).expect("base64");
    assert_eq!(&png[..8], b"\x89PNG\r\n\x1a\n");
    let mut chunks = Vec::new();
    let mut rest = &png[8..];
    while !rest.is_empty() {
        let length = u32::from_be_bytes(rest[..4].try_into().expect("four bytes")) as usize;
        assert_eq!(crc32(&rest[4..8 + length]).to_be_bytes(), rest[8 + length..12 + length], "a damaged chunk");
        chunks.push(String::from_utf8_lossy(&rest[4..8]).into_owned());
        rest = &rest[12 + length..];
    }
    assert_eq!((chunks.first().map(String::as_str), chunks.last().map(String::as_str)), (Some("IHDR"), Some("IEND")));
    assert!(chunks.iter().any(|c| c == "IDAT"));
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

async fn rich_results_come_in_every_form(server: Arc<Server>) {
    let cell = server.create(json!({"template": "data"})).await;
    let code = r##"
from IPython.display import HTML, JSON, Latex, Markdown, SVG, display, update_display
display(HTML("<b>h</b>"), SVG('<svg xmlns="http://www.w3.org/2000/svg"/>'), JSON({"a": [1, None]}), Latex("$x$"), Markdown("*m*"))
display({"image/png": "iVBORw0KGgo=", "text/plain": "p"}, raw=True, metadata={"image/png": {"width": 1}})
display({"application/vnd.plotly.v1+json": {"data": [{"y": [1, 2]}], "layout": {}}}, raw=True)
display(HTML("old"), display_id="d")
update_display(HTML("new"), display_id="d")
import pandas
pandas.DataFrame({"a": [1]})
"##;
    let ran = cell.run(code).await;
    assert_eq!(ran["status"], "ok", "{ran}");
    let results = ran["results"].as_array().expect("results");
    let shown =
        |mime: &str| results.iter().map(|r| &r["data"][mime]).find(|d| !d.is_null()).cloned().unwrap_or_default();
    assert_eq!(shown("text/html"), "<b>h</b>");
    assert!(text(&shown("image/svg+xml")).starts_with("<svg"));
    assert_eq!(shown("application/json"), json!({"a": [1, null]}));
    assert_eq!(shown("text/latex"), "$x$");
    assert_eq!(shown("text/markdown"), "*m*");
    assert_eq!(shown("image/png"), "iVBORw0KGgo=");
    assert_eq!(shown("application/vnd.plotly.v1+json"), json!({"data": [{"y": [1, 2]}], "layout": {}}));
    assert_eq!(results[5]["metadata"], json!({"image/png": {"width": 1}}));
    assert_eq!((&results[7]["display_id"], &results[7]["data"]["text/html"]), (&json!("d"), &json!("new")));
    let frame = &results[8];
    assert_eq!(frame["kind"], "execute_result");
    assert!(text(&frame["data"]["text/html"]).contains("<table") && frame["data"]["text/plain"].is_string());
}

async fn server_sent_events_arrive_as_they_happen(server: Arc<Server>) {
    events_arrive_as_they_happen(&server.cell().await, Form::Sse).await;
}

async fn lines_of_json_arrive_as_they_happen(server: Arc<Server>) {
    events_arrive_as_they_happen(&server.cell().await, Form::Lines).await;
}

async fn events_arrive_as_they_happen(cell: &Cell, form: Form) {
    let code = "import time\nfor n in range(6):\n    print(n)\n    time.sleep(0.1)\n'end'";
    let events = cell.stream(json!({"code": code}), form).await.rest().await;
    let kinds: Vec<_> = events.iter().map(|e| e.kind.as_str()).collect();
    assert_eq!(&kinds[..3], ["execution.queued", "execution.started", "stdout"], "{kinds:?}");
    assert_eq!(&kinds[kinds.len() - 2..], ["result", "execution.completed"], "{kinds:?}");
    assert!(events.iter().map(|e| e.seq).eq(1..=events.len() as u64), "numbers without a gap");
    assert_eq!(joined(&events, "stdout"), "0\n1\n2\n3\n4\n5\n");
    let prints: Vec<&Seen> = events.iter().filter(|e| e.kind == "stdout").collect();
    let apart = prints.windows(2).filter(|w| w[1].at - w[0].at >= Duration::from_millis(40)).count();
    let spread = prints[prints.len() - 1].at - prints[0].at;
    assert!(apart >= 3 && spread >= Duration::from_millis(300), "{apart} arrivals apart, spread over {spread:?}");
    let last = &events[events.len() - 1].data["execution"];
    assert_eq!((&last["status"], &last["stdout"]), (&json!("ok"), &json!("0\n1\n2\n3\n4\n5\n")));
    let took = last["duration_ms"].as_u64().expect("a number");
    assert!((600..5000).contains(&took), "the end was not noticed: {took} ms");
}

async fn an_interrupt_ends_the_loop_and_nothing_else(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("x = 1").await;
    let id = cell.background_until_output("print('in', flush=True)\nwhile True: pass").await;
    assert_eq!(cell.look().await["state"], "busy");
    let began = Instant::now();
    assert_eq!(server.post(&cell.path("/interrupt"), &Value::Null).await.status, 200);
    let ended = server.ended(&id).await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!((&ended["status"], &ended["error"]["name"]), (&json!("error"), &json!("KeyboardInterrupt")), "{ended}");
    assert_eq!(ended["kernel"]["restarted"], false);
    assert_eq!(cell.value("x + 41").await, "42");
    // With nothing to interrupt it does nothing.
    assert_eq!(server.post(&cell.path("/interrupt"), &Value::Null).await.status, 200);
    assert_eq!(cell.value("x + 41").await, "42");
}

async fn a_time_limit_ends_the_loop_and_nothing_else(server: Arc<Server>) {
    let cell = server.create(json!({"template": "python", "timeouts": {"execution_seconds": 1}})).await;
    cell.value("x = 1").await;
    let of_its_own = cell.execute(json!({"code": "while True: pass", "timeout_seconds": 0.5})).await;
    let of_the_session = cell.run("import time; time.sleep(60)").await;
    for (ran, limit) in [(of_its_own, 500), (of_the_session, 1000)] {
        assert_eq!((&ran["status"], &ran["kernel"]["restarted"]), (&json!("timeout"), &json!(false)), "{ran}");
        let took = ran["duration_ms"].as_u64().expect("a number");
        assert!((limit..limit + 4000).contains(&took), "{limit}: {took}");
    }
    assert_eq!(cell.value("x + 41").await, "42");
}

async fn code_that_ignores_interrupts_costs_its_kernel(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("x = 1; open('kept', 'w').close()").await;
    let code = "import time\nwhile True:\n    try: time.sleep(10)\n    except BaseException: pass";
    let ran = cell.execute(json!({"code": code, "timeout_seconds": 0.5})).await;
    assert_eq!(ran["status"], "timeout", "{ran}");
    assert_eq!(ran["kernel"], json!({"restarted": true, "cause": "timeout"}));
    assert_eq!(cell.value("import os; 'x' in globals(), os.path.exists('kept')").await, "(False, True)");
}

async fn a_failed_cell_keeps_what_it_did_before(server: Arc<Server>) {
    let cell = server.cell().await;
    let ran = cell.run("def f(): return 1 / 0\ny = 42\nf()\ny = 0").await;
    assert_eq!(ran["status"], "error");
    assert_eq!(
        (&ran["error"]["name"], &ran["error"]["value"]),
        (&json!("ZeroDivisionError"), &json!("division by zero"))
    );
    let traceback = ran["error"]["traceback"].to_string();
    assert!(traceback.contains("1 / 0") || traceback.contains("division by zero"), "{traceback}");
    assert_eq!(cell.value("y").await, "42");
    let unreadable = cell.run("x =").await;
    assert_eq!((&unreadable["status"], &unreadable["error"]["name"]), (&json!("error"), &json!("SyntaxError")));
    assert_eq!(cell.value("y").await, "42");
}

async fn a_deleted_session_leaves_no_container(server: Arc<Server>) {
    let cell = server.cell().await;
    assert_eq!(cell.containers().await.len(), 1);
    let running = cell.background_until_output("print(1, flush=True)\nwhile True: pass").await;
    let began = Instant::now();
    cell.delete().await;
    assert_eq!(cell.containers().await, Vec::<String>::new());
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(server.ended(&running).await["status"], "cancelled");
    assert_eq!(cell.look().await["end_reason"], "deleted");
    cell.delete().await;
    let late = server.post(&cell.path("/executions"), &json!({"code": "1"})).await;
    assert_eq!(late.problem(410, "session-ended")["end_reason"], "deleted");
    for action in ["/interrupt", "/restart", "/keepalive", "/pause", "/resume"] {
        server.post(&cell.path(action), &Value::Null).await.problem(410, "session-ended");
    }
}

async fn text_comes_in_order(server: Arc<Server>) {
    let cell = server.cell().await;
    let code = "import sys\nfor n in range(3):\n    print('out', n, flush=True)\n    print('err', n, file=sys.stderr, flush=True)\nimport os\nos.system('echo shell')\nprint('ü€𝄞')";
    let events = cell.stream(json!({"code": code}), Form::Lines).await.rest().await;
    let order: String = events.iter().filter(|e| e.kind.starts_with("std")).map(|e| text(&e.data["text"])).collect();
    assert!(order.starts_with("out 0\nerr 0\nout 1\nerr 1\nout 2\nerr 2\n"), "{order}");
    let ran = &events[events.len() - 1].data["execution"];
    assert_eq!(ran["stderr"], "err 0\nerr 1\nerr 2\n");
    let stdout = text(&ran["stdout"]);
    assert!(
        stdout.starts_with("out 0\nout 1\nout 2\n") && stdout.contains("ü€𝄞\n") && stdout.contains("shell\n"),
        "{stdout}"
    );
    assert_eq!(ran["output"]["stdout"], json!({"bytes": stdout.len(), "truncated": false}));
}

async fn executions_are_counted(server: Arc<Server>) {
    let cell = server.cell().await;
    let count = async |request: Value| cell.execute(request).await["execution_count"].clone();
    assert_eq!(count(json!({"code": "1"})).await, 1);
    assert_eq!(count(json!({"code": "2"})).await, 2);
    count(json!({"code": "3", "store_history": false})).await;
    let silent = cell.execute(json!({"code": "y = 4\ny", "silent": true})).await;
    assert_eq!((&silent["status"], &silent["results"]), (&json!("ok"), &json!([])));
    assert_eq!(count(json!({"code": "y"})).await, 3);
}

async fn output_above_the_cap_keeps_head_and_tail(server: Arc<Server>) {
    let cell = server.cell().await;
    let check = |ran: &Value, stream: &str, bytes: usize, cap: usize| {
        assert_eq!(ran["status"], "ok", "{}", ran["status"]);
        assert_eq!(ran["output"][stream], json!({"bytes": bytes, "truncated": true}));
        let kept = text(&ran[stream]);
        assert!(kept.starts_with(&format!("{:049}\n{:049}\n", 0, 1)), "the head is lost");
        assert!(kept.ends_with(&format!("{:049}\n", bytes / 50 - 1)), "the tail is lost");
        let (before, after) = kept.split_once("\n[… ").expect("a mark");
        let (left_out, after) = after.split_once(" bytes left out …]\n").expect("a mark");
        let left_out: usize = left_out.parse().expect("a number");
        assert_eq!(before.len() + after.len() + left_out, bytes, "every byte is kept or counted");
        assert!(
            before.len() + after.len() <= cap && before.len() + after.len() > cap / 2,
            "{} of {cap}",
            before.len() + after.len()
        );
        assert_eq!(ran["limits_hit"], json!(["output"]));
    };
    check(&cell.run("for n in range(100_000): print(f'{n:049}')").await, "stdout", 5_000_000, 1 << 20);
    check(
        &cell.run("import sys\nfor n in range(40_000): print(f'{n:049}', file=sys.stderr)").await,
        "stderr",
        2_000_000,
        1 << 20,
    );
    check(&cell.run("print('\\n'.join(f'{n:049}' for n in range(100_000)))").await, "stdout", 5_000_000, 1 << 20);
    let narrow = json!({"code": "for n in range(1000): print(f'{n:049}')", "max_output_bytes": 1000});
    check(&cell.execute(narrow).await, "stdout", 50_000, 1000);
    let within = cell.execute(json!({"code": "print('x' * 999)", "max_output_bytes": 1000})).await;
    assert_eq!(
        (&within["output"]["stdout"], &within["limits_hit"]),
        (&json!({"bytes": 1000, "truncated": false}), &json!([]))
    );
    cell.works().await;
}

async fn results_above_the_cap_are_left_out(server: Arc<Server>) {
    let cell = server.cell().await;
    let ran = cell.run("from IPython.display import display\nfor n in range(5):\n    display({'text/html': str(n) * (3 << 20)}, raw=True)").await;
    assert_eq!((&ran["status"], &ran["limits_hit"]), (&json!("ok"), &json!(["output"])));
    let kept = ran["results"].as_array().expect("results").len();
    assert!((1..=3).contains(&kept), "{kept} results kept");
    let omitted = ran["output"]["results_omitted_bytes"].as_u64().expect("a number");
    assert!(omitted >= (5 - kept as u64) * (3 << 20), "{omitted}");
    // Messages are bounded in number as well.
    let ran = cell.run("for n in range(5000): display({'text/plain': ''}, raw=True)").await;
    assert_eq!(ran["status"], "ok");
    assert!(ran["results"].as_array().expect("results").len() <= 2000);
    cell.works().await;
}

async fn input_is_denied(server: Arc<Server>) {
    let cell = server.cell().await;
    let ran = cell.run("x = input('name? ')").await;
    assert_eq!(
        (&ran["status"], &ran["error"]["name"]),
        (&json!("input_denied"), &json!("StdinNotImplementedError")),
        "{ran}"
    );
    let caught =
        cell.run("import getpass\ntry: getpass.getpass()\nexcept Exception as e: print(type(e).__name__)").await;
    assert_eq!((&caught["status"], &caught["stdout"]), (&json!("ok"), &json!("StdinNotImplementedError\n")));
    cell.works().await;
}

async fn a_kernel_that_ends_is_replaced(server: Arc<Server>) {
    let cell = server.cell().await;
    let rows = [
        ("import os; print('last words', flush=True); os._exit(3)", json!({"exit_status": 3})),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", json!({"signal": 9})),
        ("import ctypes; ctypes.string_at(0)", json!({"signal": 11})),
        ("import os; os.abort()", json!({"signal": 6})),
        ("import os; os.execv('/bin/true', ['true'])", json!({"exit_status": 0})),
    ];
    for (code, ended) in rows {
        cell.value("x = 1; open('kept', 'w').close()").await;
        let began = Instant::now();
        let events = cell.stream(json!({"code": code}), Form::Sse).await.rest().await;
        assert!(began.elapsed() < Duration::from_secs(5), "{code}: {:?}", began.elapsed());
        let kinds: Vec<_> = events.iter().map(|e| e.kind.as_str()).collect();
        assert_eq!(&kinds[kinds.len() - 2..], ["kernel.restarted", "execution.completed"], "{code}: {kinds:?}");
        let ran = &events[events.len() - 1].data["execution"];
        let mut kernel = json!({"restarted": true, "cause": "died"});
        kernel.as_object_mut().expect("an object").extend(ended.as_object().expect("an object").clone());
        assert_eq!((&ran["status"], &ran["kernel"]), (&json!("kernel_died"), &kernel), "{code}");
        assert_eq!(cell.value("import os; 'x' in globals(), os.path.exists('kept')").await, "(False, True)", "{code}");
    }
    // These ask more politely; what comes of it is IPython's business, but the session goes on.
    for code in
        ["import sys; sys.exit(1)", "exit()", "get_ipython().kernel.do_shutdown(False)", "import os; os.setsid()"]
    {
        let cell = server.cell().await;
        let ran = cell.run(code).await;
        assert!(["ok", "error", "kernel_died"].contains(&text(&ran["status"]).as_str()), "{code}: {ran}");
        // A kernel that is on its way out takes with it what comes next, and nothing after that.
        let mut deaths = 0;
        for _ in 0..4 {
            deaths += u32::from(cell.run("40 + 2").await["status"] == "kernel_died");
        }
        assert!(deaths <= 1, "{code}: {deaths} kernels died");
        assert_eq!(cell.wait("ready").await["state"], "ready");
        cell.delete().await;
    }
}

async fn memory_ends_at_the_limit(server: Arc<Server>) {
    let cell = server.create(json!({"template": "python", "resources": {"memory_mb": 256, "disk_mb": 32}})).await;
    // The control: what fits, fits.
    assert_eq!(cell.value("len(bytearray(64 << 20))").await, (64 << 20).to_string());
    let ran = cell.run("x = bytearray(400 << 20)").await;
    assert_eq!((&ran["status"], &ran["limits_hit"]), (&json!("oom"), &json!(["memory"])), "{ran}");
    assert_eq!(ran["kernel"], json!({"restarted": true, "cause": "oom"}));
    cell.works().await;
    let impossible = cell.run("bytearray(1 << 50)").await;
    assert_eq!((&impossible["status"], &impossible["error"]["name"]), (&json!("error"), &json!("MemoryError")));
    // Files are memory: the working folder is full long before anything is ended for it.
    let full = cell.run("open('big', 'wb').write(bytes(40 << 20))").await;
    assert_eq!((&full["status"], &full["error"]["name"]), (&json!("error"), &json!("OSError")), "{full}");
    assert_eq!(cell.value("import os; os.path.getsize('big') <= 32 << 20").await, "True");
}

async fn processes_end_at_the_limit(server: Arc<Server>) {
    let code = r#"
import os, signal, subprocess, sys, threading
def threads():
    release, started = threading.Event(), 0
    try:
        for _ in range(100):
            threading.Thread(target=release.wait).start()
            started += 1
    except RuntimeError:
        pass
    release.set()
    return started
def forks():
    children = []
    try:
        for _ in range(100):
            pid = os.fork()
            if pid == 0:
                signal.pause()
            children.append(pid)
    except BlockingIOError:
        pass
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(children)
import json
print(json.dumps([forks(), threads()]))
"#;
    let narrow = server.create(json!({"template": "python", "resources": {"pids": 60}})).await;
    let counted = narrow.json(code).await;
    assert!(
        counted.as_array().expect("two numbers").iter().all(|n| (20..60).contains(&n.as_u64().unwrap_or(0))),
        "{counted}"
    );
    let wide = server.create(json!({"template": "python", "resources": {"pids": 160}})).await;
    assert_eq!(wide.json(code).await, json!([100, 100]), "the control: with room for them they all start");
    let bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass";
    let ran = narrow.execute(json!({"code": bomb, "timeout_seconds": 1})).await;
    assert!(["timeout", "kernel_died"].contains(&text(&ran["status"]).as_str()), "{ran}");
    let began = Instant::now();
    narrow.delete().await;
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(narrow.containers().await, Vec::<String>::new());
}

async fn the_cell_is_as_narrow_as_was_asked(server: Arc<Server>) {
    let code = r#"
import json, os
def read(*paths):
    for path in paths:
        if os.path.exists(path):
            return open(path).read().split()
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines())
v1 = "/sys/fs/cgroup/memory/memory.limit_in_bytes"
quota = read("/sys/fs/cgroup/cpu.max") or read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") + read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
work = os.statvfs("/workspace")
print(json.dumps({
    "interfaces": os.listdir("/sys/class/net"),
    "capabilities": [int(status[s], 16) for s in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no_new_privileges": status["NoNewPrivs"], "seccomp": status["Seccomp"],
    "uids": sorted(set(status["Uid"].split())), "gids": sorted(set(status["Gid"].split() + status["Groups"].split())),
    "root_read_only": bool(os.statvfs("/").f_flag & os.ST_RDONLY),
    "memory": int(read("/sys/fs/cgroup/memory.max", v1)[0]),
    "swap": [int(x) for x in read("/sys/fs/cgroup/memory.swap.max") or []],
    "pids": int(read("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max")[0]),
    "cpu": int(quota[0]) / int(quota[1]),
    "disk": work.f_blocks * work.f_frsize,
    "cwd": os.getcwd(), "hostname": os.uname().nodename,
}))
"#;
    let asked = json!({"template": "python", "resources": {"cpu": 0.5, "memory_mb": 300, "disk_mb": 40, "pids": 70}});
    let cell = server.create(asked).await;
    let seen = cell.json(code).await;
    assert_eq!(seen["interfaces"], json!(["lo"]));
    assert_eq!(seen["capabilities"], json!([0, 0, 0, 0, 0]));
    assert_eq!((&seen["no_new_privileges"], &seen["seccomp"]), (&json!("1"), &json!("2")));
    let uid: u32 = text(&seen["uids"][0]).parse().expect("a number");
    assert!(uid >= 1000 && seen["uids"].as_array().map(Vec::len) == Some(1) && seen["gids"] == seen["uids"], "{seen}");
    assert_eq!(seen["root_read_only"], true);
    assert_eq!(seen["memory"], 300 << 20);
    assert!(seen["swap"] == json!([]) || seen["swap"] == json!([0]));
    assert_eq!((&seen["pids"], &seen["cpu"], &seen["disk"]), (&json!(70), &json!(0.5), &json!(40 << 20)));
    assert_eq!((&seen["cwd"], &seen["hostname"]), (&json!("/workspace"), &json!("cell")));
    assert_eq!(cell.view["resources"], json!({"cpu": 0.5, "memory_mb": 300, "disk_mb": 40, "pids": 70}));
    // Half a CPU is half a CPU: a second of it takes two.
    let took: f64 = cell.value("import time\nt = time.monotonic()\nwhile time.process_time() < t: \n    if time.process_time() > (globals().setdefault('s', time.process_time()) + 0.5): break\ntime.monotonic() - t").await.parse().expect("a number");
    assert!(took > 0.8, "half a second of computing took {took} s");
}

async fn environment_comes_along_and_no_secret_does(server: Arc<Server>) {
    let cell = server.create(json!({"template": "python", "env": {"GREETING": "hej å"}})).await;
    let seen = cell.json("import json, os; print(json.dumps(dict(os.environ)))").await;
    assert_eq!((&seen["GREETING"], &seen["HOME"]), (&json!("hej å"), &json!("/workspace")));
    assert!(!seen.to_string().contains(&server.key) && !seen.to_string().contains("cb_"), "{seen}");
    let here = Environment::capture();
    let outside: Vec<_> = here.with_prefix("CARGO").map(|(name, _)| format!("CARGO{name}")).collect();
    assert!(
        !outside.is_empty() && outside.iter().all(|name| seen[name].is_null()),
        "this process's environment is inside"
    );
    // Memory that runs out costs the kernel, which may not change that, and not the first process.
    let order = cell.json(
        "import json; print(json.dumps([open(f'/proc/{pid}/oom_score_adj').read().strip() for pid in (1, 'self')]))",
    );
    assert_eq!(order.await, json!(["0", "1000"]));
}

/// The probes that `tests/probes.rs` proves to see an open lock, run by a caller's code.
async fn no_probe_finds_an_open_lock(server: Arc<Server>) {
    const PROBES: &str = include_str!("support/engine_probes.py");
    // These speak of a first process without anything beside it, or of what another case looks at.
    const ELSEWHERE: [&str; 7] =
        ["machine_processes", "privileged_user", "writable_folders", "oom_order", "memory", "processes", "cpu"];
    let request = json!({"template": "narrow", "resources": {"memory_mb": 256, "disk_mb": 16, "cpu": 0.5},
        "env": {"MACHINE_NAMESPACES": machine_namespaces()}});
    let cell = server.create(request).await;
    cell.value(&format!("probes = {}", json!(PROBES))).await;
    let names = cell.json("import json, re; print(json.dumps(re.findall(r'^def (\\w+)|^        \"(\\S+)\": \\(', probes, re.M) and sorted(set(re.findall(r'@probe\\n *def (\\w+)', probes)) | set(re.findall(r'^        \"(\\S+)\": \\(', probes, re.M)))))").await;
    let names: Vec<String> = serde_json::from_value(names).expect("names");
    let chosen: Vec<_> = names.iter().filter(|n| !ELSEWHERE.contains(&n.as_str())).collect();
    assert!(chosen.len() > 50, "{} probes: {chosen:?}", chosen.len());
    let code = format!(
        "import subprocess, sys\nopen('/dev/shm/p.py', 'w').write(probes)\nran = subprocess.run([sys.executable, '/dev/shm/p.py', *{}], capture_output=True, text=True)\nprint(ran.stdout.strip().splitlines()[-1] if ran.stdout else ran)",
        json!(chosen)
    );
    let found = cell.json(&code).await;
    let open: Vec<_> = found.as_object().expect("an object").iter().filter(|(_, f)| !f.is_null()).collect();
    assert!(open.is_empty(), "open: {open:?}");
    assert_eq!(found.as_object().map(serde_json::Map::len), Some(chosen.len()));
}

fn machine_namespaces() -> String {
    let link = |kind| std::fs::read_link(format!("/proc/self/ns/{kind}")).map(|l| l.display().to_string());
    ["ipc", "uts", "pid", "cgroup", "net", "mnt"]
        .into_iter()
        .filter_map(|kind| link(kind).ok())
        .collect::<Vec<_>>()
        .join(",")
}

/// Rows of the catalogue that need no lock but all of them together, as a program; "open" or why not.
const ESCAPES: &str = r#"
import ctypes, glob, json, os, resource, signal, subprocess, sys, tempfile
libc = ctypes.CDLL(None, use_errno=True)
def attempt(function, *arguments):
    try:
        result = function(*arguments)
        return "open" if result is None else result
    except OSError as error:
        return os.strerror(error.errno)
def opened(path, flags):
    return attempt(lambda: os.close(os.open(path, flags)))
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "")
def in_child(function, *arguments):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, attempt(function, *arguments).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    return os.read(reader, 1000).decode() or "killed"
def effective_uid_of_setuid():
    path = "/workspace/suid"
    os.makedirs("/workspace", exist_ok=True)
    with open(path, "wb") as file:
        file.write(open("/bin/cat", "rb").read())
    os.chmod(path, 0o4755)
    real = os.getuid() or 12345
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        if os.getuid() == 0:
            os.chmod("/workspace", 0o755)
            os.setuid(real)
        os.dup2(writer, 1)
        os.execv(path, ["cat", "/proc/self/status"])
    os.close(writer)
    text = os.fdopen(reader).read()
    os.waitpid(pid, 0)
    uids = next(line for line in text.splitlines() if line.startswith("Uid")).split()[1:]
    return "open" if "0" in uids else "same user"
def core_dumped():
    child = subprocess.run([sys.executable, "-c", "x = bytearray(50 << 20); import os; os.abort()"], cwd=tempfile.mkdtemp(dir="/workspace"), stderr=subprocess.DEVNULL)
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    return "open" if hard != 0 else "no core"
def new_namespace(flag):
    call("unshare", flag)
def join_namespace(kind):
    call("setns", os.open("/proc/1/ns/" + kind, os.O_RDONLY), 0)
def mount():
    call("mount", b"none", b"/tmp", b"tmpfs", 0, None)
def chroot():
    os.chroot("/tmp")
def device():
    os.mknod("/tmp/null", 0o020666, os.makedev(1, 3))
def trace():
    call("ptrace", 0x4206, 1, 0, 0)
def renice():
    os.setpriority(os.PRIO_PROCESS, 0, -10)
def host_name():
    import socket
    socket.sethostname(socket.gethostname())
def raw_socket():
    import socket
    socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close()
def packet_socket():
    import socket
    socket.socket(17, socket.SOCK_RAW, 0).close()
def writable_folders():
    for folder, below, _ in os.walk("/"):
        ours = folder in ("/tmp", "/workspace", "/dev/shm", "/run/cellblock")
        below[:] = [] if ours or folder in ("/proc", "/sys") else below
        if ours:
            continue
        try:
            os.close(os.open(folder + "/.probe", os.O_CREAT | os.O_WRONLY))
            os.unlink(folder + "/.probe")
            return
        except OSError:
            pass
    return "none"
def first(*paths):
    return next((path for path in paths if os.path.exists(path)), "/nonexistent")
print(json.dumps({
    "unshare users": in_child(new_namespace, 0x10000000), "unshare mounts": in_child(new_namespace, 0x20000),
    "unshare network": in_child(new_namespace, 0x40000000), "setns": in_child(join_namespace, "mnt"),
    "mount": in_child(mount), "chroot": in_child(chroot), "mknod": in_child(device), "trace": in_child(trace),
    "renice": in_child(renice), "host name": in_child(host_name),
    "raw socket": attempt(raw_socket), "packet socket": attempt(packet_socket),
    "1/mem": opened("/proc/1/mem", os.O_RDWR), "1/environ": opened("/proc/1/environ", os.O_RDONLY),
    "1/maps": opened("/proc/1/maps", os.O_RDONLY), "1/fd": attempt(lambda: None if os.listdir("/proc/1/fd") else None),
    "1/root": attempt(lambda: None if os.listdir("/proc/1/root") else None),
    "core_pattern": opened("/proc/sys/kernel/core_pattern", os.O_WRONLY), "sysrq": opened("/proc/sysrq-trigger", os.O_WRONLY),
    "cgroup": opened(first("/sys/fs/cgroup/pids/pids.max", "/sys/fs/cgroup/cgroup.procs"), os.O_WRONLY),
    "uevent_helper": opened(first("/sys/kernel/uevent_helper", "/sys/kernel/profiling", "/sys/kernel/mm/transparent_hugepage/enabled"), os.O_WRONLY),
    "folders": attempt(writable_folders),
    "kmsg": opened("/dev/kmsg", os.O_RDONLY), "root folder": opened("/etc/x", os.O_WRONLY | os.O_CREAT),
    "shadow": opened("/etc/shadow", os.O_RDONLY), "setuid": effective_uid_of_setuid(), "core": core_dumped(),
}))
"#;

async fn escapes_fail_that_a_free_container_allows(server: Arc<Server>) {
    let cell = server.cell().await;
    let shut = cell.json(ESCAPES).await;
    let printed = in_a_free_container(&server, ESCAPES).await;
    let free: Value =
        printed.lines().last().and_then(|l| serde_json::from_str(l).ok()).unwrap_or_else(|| panic!("{printed}"));
    let rows = shut.as_object().expect("an object");
    let open: Vec<_> = rows.iter().filter(|(_, found)| *found == "open").collect();
    assert!(open.is_empty(), "open in a session: {open:?}");
    // What this machine has not got at all can't be opened by anybody.
    let there = rows.keys().filter(|row| free[*row] != "No such file or directory");
    let blind: Vec<_> = there.filter(|row| free[*row] != "open").map(|row| (row, &free[row])).collect();
    assert!(blind.is_empty(), "these probes are blind: {blind:?}");
    cell.works().await;
}

/// What a program prints in a container with every right, which is the control for what fails in a session.
async fn in_a_free_container(server: &Server, code: &str) -> String {
    const PROGRAM: &str = "for folder in /sys /sys/fs/cgroup /sys/fs/cgroup/pids; do
        mount -o remount,rw $folder; mount -o remount,bind,rw $folder; done 2>/dev/null; python3 -c \"$CODE\"; true";
    let docker = &server.docker;
    let words = |words: &[&str]| Some(words.iter().map(ToString::to_string).collect::<Vec<_>>());
    let body = ContainerCreateBody {
        image: Some("cellblock/python:latest".to_owned()),
        entrypoint: words(&["sh", "-c", PROGRAM]),
        env: Some(vec![format!("CODE={code}")]),
        user: Some("0:0".to_owned()),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        labels: Some([("io.cellblock.instance".to_owned(), server.instance.clone())].into()),
        host_config: Some(HostConfig {
            // Not `privileged`, which an engine inside a container may not give.
            cap_add: words(&["SYS_ADMIN", "SYS_PTRACE", "SYS_NICE", "SYSLOG", "NET_ADMIN", "DAC_READ_SEARCH"]),
            security_opt: words(&["seccomp=unconfined", "apparmor=unconfined"]),
            masked_paths: Some(vec![]),
            readonly_paths: Some(vec![]),
            devices: Some(vec![DeviceMapping {
                path_on_host: Some("/dev/kmsg".to_owned()),
                path_in_container: Some("/dev/kmsg".to_owned()),
                cgroup_permissions: Some("r".to_owned()),
            }]),
            network_mode: Some("none".to_owned()),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    };
    let name = format!("{}-free", server.instance);
    let options = CreateContainerOptionsBuilder::default().name(&name).build();
    docker.create_container(Some(options), body).await.expect("a container");
    let options = AttachContainerOptionsBuilder::default().stream(true).stdout(true).stderr(true).build();
    let mut attached = docker.attach_container(&name, Some(options)).await.expect("a stream");
    docker.start_container(&name, None).await.expect("a start");
    let mut printed = String::new();
    while let Some(Ok(LogOutput::StdOut { message } | LogOutput::StdErr { message })) = attached.output.next().await {
        printed.push_str(&String::from_utf8_lossy(&message));
    }
    let options = bollard::query_parameters::RemoveContainerOptionsBuilder::default().force(true).v(true).build();
    docker.remove_container(&name, Some(options)).await.expect("a removal");
    printed
}

async fn nothing_of_the_machine_can_be_called(server: Arc<Server>) {
    let listener = TcpListener::bind("0.0.0.0:0").expect("a listener");
    let port = listener.local_addr().expect("an address").port();
    let own = own_address();
    // The control: whoever is on the machine gets through, by loopback and by its other address.
    for address in ["127.0.0.1", own.as_str()] {
        TcpStream::connect((address, port)).expect("a connection");
        listener.accept().expect("a connection");
    }
    listener.set_nonblocking(true).expect("a listener");
    let cell = server.cell().await;
    let code = format!(
        r#"
import json, socket, time
def call(address, port, kind=socket.SOCK_STREAM):
    began = time.monotonic()
    try:
        s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        s.settimeout(3)
        s.connect((address, port))
        if kind == socket.SOCK_DGRAM: s.send(b"x"); s.recv(1)
        return "open"
    except OSError as error:
        return "refused" if time.monotonic() - began < 1 else "slow"
def name(n):
    try: return socket.getaddrinfo(n, 80) and "open"
    except OSError: return "refused"
mine = socket.create_server(("127.0.0.1", 0))
print(json.dumps({{"loopback": call("127.0.0.1", {port}), "own": call("{own}", {port}), "bridge": call("172.17.0.1", {port}),
    "docker dns": call("127.0.0.11", 53, socket.SOCK_DGRAM), "v6": call("::1", {port}), "name": name("host.docker.internal"),
    "routes": len(open("/proc/net/route").readlines()) - 1, "control": call("127.0.0.1", mine.getsockname()[1])}}))
"#
    );
    let mut seen = cell.json(&code).await;
    let control = seen.as_object_mut().and_then(|s| s.remove("control"));
    assert_eq!(control, Some(json!("open")), "loopback inside works");
    assert_eq!(seen.as_object_mut().and_then(|s| s.remove("routes")), Some(json!(0)));
    assert!(seen.as_object().expect("an object").values().all(|v| v == "refused"), "{seen}");
    assert!(listener.accept().is_err(), "somebody came through");
}

/// An address of this machine that is not its loopback, or else loopback. Nothing is sent.
fn own_address() -> String {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    let routed = socket.connect("192.0.2.1:9").and_then(|()| socket.local_addr());
    routed.map_or_else(|_| "127.0.0.1".to_owned(), |a| a.ip().to_string())
}

async fn kernels_are_reached_over_tcp(server: Arc<Server>) {
    let cell = server.create(json!({"template": "tcp"})).await;
    cell.value("x = 41").await;
    assert_eq!(cell.value("x + 1").await, "42");
    let transport = "import json, ipykernel\nprint(json.load(open(ipykernel.get_connection_file()))['transport'])";
    assert_eq!(cell.value(transport).await, "tcp");
    assert_eq!(server.cell().await.value(transport).await, "ipc", "the control");
    let id = cell.background_until_output("print(1, flush=True)\nwhile True: pass").await;
    server.post(&cell.path("/interrupt"), &Value::Null).await;
    assert_eq!(server.ended(&id).await["error"]["name"], "KeyboardInterrupt");
    assert_eq!(cell.run("import os; os._exit(1)").await["status"], "kernel_died");
    cell.works().await;
}
