//! What is left of a session: its notebook as Jupyter's own libraries read it and run it again, the blobs of its
//! executions, and how long both last. What single executions answer is held elsewhere.

#[path = "support/server.rs"]
mod server;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bollard::query_parameters::RemoveContainerOptionsBuilder;
use reqwest::Method;
use serde_json::{Value, json};
use server::{Cell, Form, NEVER, Reply, Server, text};
use sha2::{Digest, Sha256};

const SETTINGS: &str = r#"
[executions]
inline = "32KiB"
"#;

/// Held by the test that runs: a machine with a few cells is slow enough.
static MACHINE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A session with one of everything; then its notebook is read, run again and outlives it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_of_everything_is_a_notebook() {
    let _alone = MACHINE.lock().await;
    let server = Server::start_with_tenants(SETTINGS).await;
    // A kernel holds what it has printed up to four times before it is sent.
    let cell = server.create(json!({"template": "data", "resources": {"memory_mb": 2048}})).await;
    let mut told = Vec::new();
    let steps = Instant::now();
    told.extend(rich_results(&cell).await);
    told.extend(a_line_that_is_rewritten(&cell).await);
    told.extend(three_hundred_megabytes(&cell).await);
    told.extend(an_exception_from_a_nested_function(&cell).await);
    told.extend(input_in_three_ways(&cell).await);
    told.extend(displays_that_change_in_place(&cell).await);
    told.extend(named_values_and_payloads(&cell).await);
    told.extend(cells_of_two_contexts(&cell).await);
    let quiet = cells_that_keep_quiet(&cell).await;
    told.extend(quiet);
    told.extend(ends_by_force(&cell).await);
    println!("the cells: {:.1} s", steps.elapsed().as_secs_f64());
    let read = notebook(&cell).await;
    is_what_was_answered(&server, &read, &told).await;
    has_its_updates(&read);
    let text_of_it = read.to_string();
    for absent in ["nobody sees this", "hunter2"] {
        assert!(!text_of_it.contains(absent), "{absent}");
    }
    let file = server.data().join("read.ipynb");
    std::fs::write(&file, &text_of_it).expect("a file");
    let checked = jupyter("check", &file).await;
    assert_eq!(checked, json!({"nbformat": [4, 5], "cells": told.len()}));
    let began = Instant::now();
    let again = jupyter("rerun", &file).await;
    println!("running it again: {:.1} s", began.elapsed().as_secs_f64());
    let number = |what: &str| again[what].as_array().map_or(0, Vec::len);
    assert_eq!(again["differences"], json!([]), "{again:#}");
    assert_eq!(number("ran") + number("left_out"), told.len());
    // Left out are those that ask, that end by force, and nothing else.
    assert_eq!(number("left_out"), 5, "{again:#}");
    cell.delete().await;
    is_unchanged(&notebook(&cell).await, &read);
    let kernelspec = json!({"name": "python3", "display_name": "Python 3", "language": "python"});
    assert_eq!(read["metadata"]["kernelspec"], kernelspec, "as the image has it");
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

async fn rich_results(cell: &Cell) -> Vec<Told> {
    let plot = "import matplotlib.pyplot as plt\nplt.plot([1, 4, 9])\nplt.show()";
    let plot = tell(cell, json!({"code": plot})).await;
    assert_eq!(plot.ended["status"], "ok", "{}", plot.ended);
    assert_eq!(&part(&cell.server, &plot.ended["results"][0]["data"]["image/png"]).await[..8], PNG);
    let noise =
        "import numpy as np\nplt.figure(figsize=(6, 6), dpi=120)\nplt.imshow(np.random.rand(300, 300))\nplt.show()";
    let noise = tell(cell, json!({"code": noise})).await;
    assert!(noise.ended["results"][0]["data"]["image/png"]["$ref"].is_string(), "{}", noise.ended);
    let frame = "import pandas as pd\npd.DataFrame({'city': ['Oslo', 'Bergen'], 'people': [717710, 291940]})";
    let frame = tell(cell, json!({"code": frame})).await;
    let shown = &frame.ended["results"][0];
    assert_eq!(shown["kind"], "execute_result", "{}", frame.ended);
    assert!(text(&shown["data"]["text/html"]).contains("<table"), "{shown}");
    assert!(text(&shown["data"]["text/plain"]).contains("Bergen  291940"), "{shown}");
    let figure = "import plotly.graph_objects as go\ngo.Figure(go.Bar(x=['a', 'b'], y=[3, 4]))";
    let figure = tell(cell, json!({"code": figure})).await;
    let plotly = figure.ended["results"].as_array().expect("results").iter();
    let plotly = plotly.map(|r| &r["data"]["application/vnd.plotly.v1+json"]).find(|d| !d.is_null());
    let plotly = part(&cell.server, plotly.unwrap_or_else(|| panic!("no figure in {}", figure.ended))).await;
    let plotly: Value = serde_json::from_slice(&plotly).expect("JSON");
    assert_eq!((&plotly["data"][0]["type"], &plotly["data"][0]["y"]), (&json!("bar"), &json!([3, 4])));
    let objects = "from IPython.display import HTML, JSON, Latex, Markdown, Math, SVG, clear_output, display, update_display\n\
        display(HTML('<b>h</b>'), JSON({'a': [1, None, {'b': 'å'}]}), Latex('$x^2$'), Math('y'), Markdown('*m*'))\n\
        display(SVG('<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"3\"/>'), metadata={'isolated': True})\n\
        display({'application/json': [1, 'two'], 'text/plain': 'a list'}, raw=True)";
    let objects = tell(cell, json!({"code": objects})).await;
    let shown: Vec<_> = objects.ended["results"].as_array().expect("results").iter().map(|r| &r["data"]).collect();
    assert_eq!(shown.len(), 7, "{}", objects.ended);
    assert_eq!(
        (&shown[0]["text/html"], &shown[1]["application/json"]),
        (&json!("<b>h</b>"), &json!({"a": [1, null, {"b": "å"}]}))
    );
    assert_eq!((&shown[2]["text/latex"], &shown[4]["text/markdown"]), (&json!("$x^2$"), &json!("*m*")));
    assert!(text(&shown[5]["image/svg+xml"]).starts_with("<svg"), "{}", shown[5]);
    assert_eq!(shown[6]["application/json"], json!([1, "two"]));
    vec![plot, noise, frame, figure, objects]
}

async fn a_line_that_is_rewritten(cell: &Cell) -> Vec<Told> {
    let bar = "for n in range(0, 101, 10):\n    print(f'\\r{n:3d} %', end='', flush=True)";
    let bar = tell(cell, json!({"code": bar})).await;
    let printed = text(&bar.ended["stdout"]);
    assert_eq!(printed.rsplit('\r').next(), Some("100 %"), "{printed:?}");
    let cleared = "for n in range(5):\n    clear_output(wait=True)\n    print('step', n, flush=True)";
    let cleared = tell(cell, json!({"code": cleared})).await;
    assert_eq!(cleared.ended["stdout"], "step 4\n");
    vec![bar, cleared]
}

async fn three_hundred_megabytes(cell: &Cell) -> Vec<Told> {
    let code = "for n in range(300):\n    print((f'{n:04d} ' + '.' * 94 + '\\n') * 10_000, end='')";
    let began = Instant::now();
    let print = tell(cell, json!({"code": code})).await;
    println!("300 MB: {:.1} s", began.elapsed().as_secs_f64());
    let ended = &print.ended;
    let printed = text(&ended["stdout"]);
    assert_eq!(ended["status"], "ok", "{} {}", ended["error"], ended["detail"]);
    assert_eq!(ended["output"]["stdout"], json!({"bytes": 300_000_000, "truncated": true}));
    assert_eq!(ended["limits_hit"], json!(["output"]));
    assert!(printed.len() < (1 << 20) + 100, "{} bytes are kept", printed.len());
    assert!(printed.starts_with("0000 ...") && printed.ends_with("...\n"), "head and tail");
    let last = printed.trim_end().rsplit('\n').next().expect("a line");
    assert_eq!((last.len(), &last[..5]), (99, "0299 "));
    assert_eq!(printed.matches(" bytes left out …]\n").count(), 1);
    vec![print]
}

async fn an_exception_from_a_nested_function(cell: &Cell) -> Vec<Told> {
    let code = "def outer(n):\n    def inner(m):\n        return 1 / m\n    return inner(n)\nprint('before')\nouter(0)";
    let failed = tell(cell, json!({"code": code})).await;
    let (ended, error) = (&failed.ended, &failed.ended["error"]);
    assert_eq!((&ended["status"], &ended["stdout"]), (&json!("error"), &json!("before\n")));
    assert_eq!((&error["name"], &error["value"]), (&json!("ZeroDivisionError"), &json!("division by zero")));
    let coloured: Vec<_> = error["traceback"].as_array().expect("lines").iter().map(text).collect();
    assert!(coloured.iter().any(|line| line.contains("\u{1b}[")), "ANSI stays: {coloured:?}");
    let plain = text(&error["traceback_text"]);
    assert!(!plain.contains('\u{1b}'), "{plain:?}");
    for part in ["in outer(n)", "in outer.<locals>.inner(m)", "return 1 / m", "ZeroDivisionError: division by zero"] {
        assert!(plain.contains(part), "{part} is not in {plain}");
    }
    assert_eq!(ended["detail"], Value::Null);
    vec![failed]
}

async fn input_in_three_ways(cell: &Cell) -> Vec<Told> {
    let denied = tell(cell, json!({"code": "denied = input('name? ')"})).await;
    let error = &denied.ended["error"];
    assert_eq!(denied.ended["status"], "input_denied", "{}", denied.ended);
    assert_eq!(error["name"], "StdinNotImplementedError", "{error}");
    assert!(
        text(&error["traceback_text"]).contains("denied = input('name? ')"),
        "it is raised where it was asked: {error}"
    );
    let lines = json!({"code": "name = input('name? ')\nage = int(input('age? '))\nf'{name} is {age}'", "stdin": ["Ada å", "36"]});
    let lines = tell(cell, lines).await;
    assert_eq!(shown(&lines), "'Ada å is 36'", "{}", lines.ended);
    let request = json!({"code": "import getpass\ncolour = input('colour? ')\nword = getpass.getpass('word? ')\n(colour, len(word))",
        "stdin": "interactive"});
    let mut follow = cell.stream(request.clone(), Form::Sse).await;
    let id = text(&follow.next().await.expect("an event").data["execution_id"]);
    for (prompt, password, answer) in [("colour? ", false, "red"), ("word? ", true, "hunter2")] {
        let asked = follow.until("input.requested").await;
        assert_eq!(asked.data, json!({"prompt": prompt, "password": password}));
        let reply = cell.server.post(&format!("/v1/executions/{id}/input"), &json!({"text": answer})).await;
        assert_eq!((reply.status, &reply.json["id"]), (200, &json!(id)), "{}", reply.text);
    }
    let rest = follow.rest().await;
    let asked = Told { code: text(&request["code"]), ended: rest[rest.len() - 1].data["execution"].clone() };
    assert_eq!(shown(&asked), "('red', 7)", "{}", asked.ended);
    vec![denied, lines, asked]
}

async fn displays_that_change_in_place(cell: &Cell) -> Vec<Told> {
    let code =
        "display(HTML('old'), display_id='here')\nprint('between')\nupdate_display(HTML('new'), display_id='here')";
    let same = tell(cell, json!({"code": code})).await;
    let results = same.ended["results"].as_array().expect("results");
    assert_eq!((results.len(), &results[0]["data"]["text/html"]), (1, &json!("new")), "{}", same.ended);
    let first =
        tell(cell, json!({"code": "handle = display({'text/plain': 'first'}, raw=True, display_id='later')"})).await;
    assert_eq!(first.ended["results"][0]["display_id"], "later");
    let events = cell.stream(json!({"code": UPDATE}), Form::Lines).await.rest().await;
    let update = events.iter().find(|e| e.kind == "result.update").expect("an update");
    assert_eq!((&update.data["display_id"], &update.data["data"]["text/plain"]), (&json!("later"), &json!("second")));
    let later = Told { code: UPDATE.to_owned(), ended: events[events.len() - 1].data["execution"].clone() };
    assert_eq!((&later.ended["status"], &later.ended["results"]), (&json!("ok"), &json!([])));
    vec![same, first, later]
}

const UPDATE: &str = "handle.update({'text/plain': 'second'}, raw=True)";

async fn named_values_and_payloads(cell: &Cell) -> Vec<Told> {
    let request = json!({"code": "six = 6", "user_expressions": {"answer": "six * 7", "wrong": "six / 0"}});
    let named = tell(cell, request).await;
    let values = &named.ended["user_expressions"];
    assert_eq!(
        (&values["answer"]["status"], &values["answer"]["data"]["text/plain"]),
        (&json!("ok"), &json!("42")),
        "{values}"
    );
    assert_eq!(
        (&values["wrong"]["status"], &values["wrong"]["ename"]),
        (&json!("error"), &json!("ZeroDivisionError")),
        "{values}"
    );
    let help = tell(cell, json!({"code": "len?"})).await;
    let page = &help.ended["payloads"][0];
    assert_eq!(page["source"], "page", "{}", help.ended);
    assert!(text(&page["data"]["text/plain"]).contains("Return the number of items"), "{page}");
    let next = tell(cell, json!({"code": "get_ipython().set_next_input('x = 99')"})).await;
    assert_eq!(next.ended["payloads"], json!([{"source": "set_next_input", "text": "x = 99", "replace": false}]));
    let written = tell(cell, json!({"code": "print(open('loaded.py', 'w').write('y = 5\\n'))"})).await;
    let load = tell(cell, json!({"code": "%load loaded.py"})).await;
    let payload = &load.ended["payloads"][0];
    assert_eq!((&payload["source"], &payload["replace"]), (&json!("set_next_input"), &json!(true)), "{}", load.ended);
    assert!(text(&payload["text"]).contains("y = 5"), "{payload}");
    vec![named, help, next, written, load]
}

async fn cells_of_two_contexts(cell: &Cell) -> Vec<Told> {
    let reply = cell.server.post(&cell.path("/contexts"), &json!({})).await;
    assert_eq!(reply.status, 201, "{}", reply.text);
    let other = &reply.json["id"];
    let here = tell(cell, json!({"code": "z = 'here'"})).await;
    let there = tell(cell, json!({"code": "z = 'there'", "context_id": other})).await;
    let ask_here = tell(cell, json!({"code": "z"})).await;
    let ask_there = tell(cell, json!({"code": "z", "context_id": other})).await;
    assert_eq!((shown(&ask_here), shown(&ask_there)), ("'here'".to_owned(), "'there'".to_owned()));
    assert_eq!((&there.ended["execution_count"], &ask_there.ended["execution_count"]), (&json!(1), &json!(2)));
    assert_eq!(&there.ended["context_id"], other);
    vec![here, there, ask_here, ask_there]
}

/// What is silent is no cell of a notebook; what is only not counted was seen by its caller, and is.
async fn cells_that_keep_quiet(cell: &Cell) -> Vec<Told> {
    let silent = cell.execute(json!({"code": "quiet = 'nobody sees this'\nquiet", "silent": true})).await;
    assert_eq!((&silent["status"], &silent["results"]), (&json!("ok"), &json!([])), "{silent}");
    let uncounted = tell(cell, json!({"code": "uncounted = 1\nprint('uncounted')", "store_history": false})).await;
    assert_eq!((&uncounted.ended["status"], &uncounted.ended["stdout"]), (&json!("ok"), &json!("uncounted\n")));
    vec![uncounted]
}

async fn ends_by_force(cell: &Cell) -> Vec<Told> {
    let slow =
        json!({"code": "import time\nprint('slow', flush=True)\nwhile True: time.sleep(0.05)", "timeout_seconds": 1});
    let slow = tell(cell, slow).await;
    assert_eq!(
        (&slow.ended["status"], &slow.ended["stop"]["step"]),
        (&json!("timeout"), &json!("interrupt")),
        "{}",
        slow.ended
    );
    assert!(slow.ended["detail"].is_string(), "{}", slow.ended);
    let kept = tell(cell, json!({"code": "six"})).await;
    assert_eq!(shown(&kept), "6");
    let died = tell(cell, json!({"code": "import os\nprint('last words', flush=True)\nos._exit(3)"})).await;
    assert_eq!((&died.ended["status"], &died.ended["kernel"]["exit_status"]), (&json!("kernel_died"), &json!(3)));
    let fresh = tell(cell, json!({"code": "6 * 7"})).await;
    assert_eq!((shown(&fresh).as_str(), &fresh.ended["execution_count"]), ("42", &json!(1)));
    vec![slow, kept, died, fresh]
}

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";

/// Code, and what came of it.
struct Told {
    code: String,
    ended: Value,
}

async fn tell(cell: &Cell, request: Value) -> Told {
    let ended = cell.execute(request.clone()).await;
    Told { code: text(&request["code"]), ended }
}

/// The text of the last value.
fn shown(told: &Told) -> String {
    assert_eq!(told.ended["status"], "ok", "{}", told.ended);
    let results = told.ended["results"].as_array().expect("results");
    text(&results.last().unwrap_or_else(|| panic!("no result in {}", told.ended))["data"]["text/plain"])
}

/// The bytes of a MIME part, wherever they are.
async fn part(server: &Server, part: &Value) -> Vec<u8> {
    let Some(path) = part["$ref"].as_str() else {
        let inline = text(part);
        return BASE64.decode(inline.trim()).unwrap_or(inline.into_bytes());
    };
    let (status, _, bytes) = fetched(server, path).await;
    assert_eq!(
        (status, bytes.len() as u64, hash(&bytes)),
        (200, number(&part["bytes"]), text(&part["sha256"])),
        "{part}"
    );
    bytes
}

/// A blob: status, type and bytes.
async fn fetched(server: &Server, path: &str) -> (u16, String, Vec<u8>) {
    let response = server.request(Method::GET, path).send().await.expect("an answer");
    let kind = response.headers().get("content-type").and_then(|t| t.to_str().ok()).unwrap_or_default().to_owned();
    (response.status().as_u16(), kind, response.bytes().await.expect("a whole answer").to_vec())
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

async fn asked(cell: &Cell) -> Reply {
    cell.server.get(&cell.path("/notebook")).await
}

async fn notebook(cell: &Cell) -> Value {
    let reply = asked(cell).await;
    assert_eq!((reply.status, reply.header("content-type")), (200, "application/x-ipynb+json"), "{}", reply.text);
    assert!(reply.json.is_object(), "{}", reply.text);
    reply.json
}

fn cells(notebook: &Value) -> &Vec<Value> {
    notebook["cells"].as_array().unwrap_or_else(|| panic!("no cells in {notebook}"))
}

/// A session's end adds when it was, and nothing else.
fn is_unchanged(now: &Value, before: &Value) {
    let without_end = |notebook: &Value| {
        let mut notebook = notebook.clone();
        notebook["metadata"]["cellblock"]["ended_at"].take();
        notebook
    };
    assert!(without_end(now) == without_end(before), "{} {}", now["metadata"], before["metadata"]);
}

/// Every cell that was told is there, once, in order, and has what its caller was answered.
async fn is_what_was_answered(server: &Server, notebook: &Value, told: &[Told]) {
    let sources = |cells: &[Value]| cells.iter().map(|c| text(&c["source"])).collect::<Vec<_>>();
    assert_eq!(sources(cells(notebook)), told.iter().map(|t| t.code.clone()).collect::<Vec<_>>());
    let ids: BTreeSet<_> = cells(notebook).iter().map(|c| text(&c["id"])).collect();
    assert_eq!(ids.len(), told.len(), "ids are unique");
    let language = &notebook["metadata"]["language_info"];
    assert_eq!((&language["name"], &language["file_extension"]), (&json!("python"), &json!(".py")), "{language}");
    for (cell, Told { code, ended }) in cells(notebook).iter().zip(told) {
        let ours = &cell["metadata"]["cellblock"];
        assert_eq!((&cell["cell_type"], &ours["execution"]), (&json!("code"), &ended["id"]), "{code}");
        assert_eq!((&ours["status"], &ours["context"]), (&ended["status"], &ended["context_id"]), "{code}");
        if code != "uncounted = 1\nprint('uncounted')" {
            assert_eq!(cell["execution_count"], ended["execution_count"], "{code}");
        }
        has_its_times(cell);
        has_its_outputs(server, cell, ended).await;
    }
}

fn has_its_times(cell: &Value) {
    let times = cell["metadata"]["execution"].as_object().unwrap_or_else(|| panic!("no times in {}", cell["metadata"]));
    let at = |name: &str| -> jiff::Timestamp {
        let time = text(times.get(name).unwrap_or_else(|| panic!("no {name} in {times:?}")));
        time.parse().unwrap_or_else(|e| panic!("{name}: {time}: {e}"))
    };
    // A kernel that went away has not replied.
    let end = if times.contains_key("execution_failed") { "execution_failed" } else { "shell.execute_reply" };
    assert!(at("iopub.execute_input") <= at(end), "{times:?}");
}

async fn has_its_outputs(server: &Server, cell: &Value, ended: &Value) {
    let outputs = cell["outputs"].as_array().expect("outputs");
    let of = |kind: &str| outputs.iter().filter(|o| o["output_type"] == kind).collect::<Vec<_>>();
    for name in ["stdout", "stderr"] {
        let streams = of("stream");
        let written: String = streams.iter().filter(|o| o["name"] == name).map(|o| text(&o["text"])).collect();
        assert!(written == text(&ended[name]), "{}: {name} is another in the notebook", cell["source"]);
    }
    let shown: Vec<_> = outputs.iter().filter(|o| o["data"].is_object()).collect();
    let results = ended["results"].as_array().expect("results");
    assert_eq!(shown.len(), results.len(), "{}", cell["source"]);
    for (shown, result) in shown.iter().zip(results).filter(|(_, result)| result["display_id"] != "later") {
        assert_eq!((&shown["output_type"], &shown["metadata"]), (&result["kind"], &result["metadata"]));
        let parts = result["data"].as_object().expect("an object");
        assert!(parts.keys().eq(shown["data"].as_object().expect("an object").keys()), "{shown} {result}");
        for (mime, there) in parts {
            let here = part(server, &shown["data"][mime]).await;
            let same = if mime.ends_with("json") {
                let read = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).expect("JSON");
                read(&here) == read(&part(server, there).await)
            } else {
                here == part(server, there).await
            };
            assert!(same, "{}: {mime} is another in the notebook", cell["source"]);
        }
    }
    let failures = of("error");
    if ended["status"] == "ok" {
        assert_eq!(failures, Vec::<&Value>::new());
    } else if ended["error"].is_object() {
        let error = &ended["error"];
        let told = json!({"output_type": "error", "ename": error["name"], "evalue": error["value"], "traceback": error["traceback"]});
        assert!(failures.contains(&&told), "{failures:?} {told}");
    } else {
        assert_eq!(failures.len(), 1, "{}: it says how it ended", cell["source"]);
        assert!(text(&failures[0]["evalue"]).contains(&text(&ended["detail"])), "{} {}", failures[0], ended["detail"]);
    }
}

/// What a later cell updated is changed where it was shown, and the later cell shows nothing.
fn has_its_updates(notebook: &Value) {
    let of = |source: &str| cells(notebook).iter().find(|c| text(&c["source"]).starts_with(source)).expect("a cell");
    let first = &of("handle = display(")["outputs"];
    assert_eq!(
        (first.as_array().map(Vec::len), &first[0]["data"]["text/plain"]),
        (Some(1), &json!("second")),
        "{first}"
    );
    assert_eq!(of(UPDATE)["outputs"], json!([]));
}

/// What Jupyter's libraries say of a notebook.
async fn jupyter(verb: &str, file: &Path) -> Value {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = here.join("target/notebook/bin/python");
    assert!(python.exists(), "{} is not there; `make test-kernel` makes it", python.display());
    let mut command = Command::new(python);
    command.arg(here.join("tests/support/notebook.py")).arg(verb).arg(file);
    let output = tokio::task::spawn_blocking(move || command.output()).await.expect("a thread").expect("a process");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {said}"))
}

const PICTURE: &str = "import base64, os, struct, zlib
def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
def picture(side):
    rows = b''.join(b'\\0' + os.urandom(side) for _ in range(side))
    return b'\\x89PNG\\r\\n\\x1a\\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(rows, 0)) + chunk(b'IEND', b'')
def show(side): display({'image/png': base64.b64encode(picture(side)).decode(), 'text/plain': str(side)}, raw=True)
";

/// A session that can make pictures of about n * n bytes with `show(n)`.
async fn painter(server: &Arc<Server>, request: Value) -> Cell {
    let cell = server.create(request).await;
    cell.value(PICTURE).await;
    cell
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_of_sessions() {
    let _alone = MACHINE.lock().await;
    let server =
        Server::start_with_tenants("[executions]\ninline = \"32KiB\"\n[limits]\nsession_retention = \"8s\"\n").await;
    let cases = cases![server;
        a_long_part_is_a_blob_of_its_tenant,
        long_parts_of_other_types_are_blobs,
        a_notebook_outlives_an_idle_session,
        a_notebook_outlives_a_lost_session,
        a_notebook_outlives_the_memory_of_its_session,
        a_notebook_is_its_tenants_alone,
        a_deleted_notebook_is_gone,
        kernels_json_does_not_break_a_notebook,
        a_session_without_cells_has_a_notebook,
    ];
    server.run_and_finish(3, cases).await;
}

async fn a_long_part_is_a_blob_of_its_tenant(server: Arc<Server>) {
    let cell = painter(&server, json!({"template": "python"})).await;
    let ran = cell.run("show(16)\nshow(400)\nshow(300)").await;
    let results = ran["results"].as_array().expect("results");
    assert!(results[0]["data"]["image/png"].is_string(), "a short one stays where it is: {ran}");
    for (result, side) in results.iter().zip([16, 400, 300]).skip(1) {
        let there = &result["data"]["image/png"];
        let path = text(&there["$ref"]);
        assert!(path.starts_with(&format!("/v1/executions/{}/blobs/", text(&ran["id"]))), "{there}");
        let (status, kind, bytes) = fetched(&server, &path).await;
        assert_eq!((status, kind.as_str(), bytes.len() as u64), (200, "image/png", number(&there["bytes"])), "{there}");
        assert_eq!((&bytes[..8], hash(&bytes)), (PNG, text(&there["sha256"])));
        assert_eq!(u32::from_be_bytes(bytes[16..20].try_into().expect("four bytes")), side);
        assert_eq!(result["data"]["text/plain"], side.to_string());
        server.send(server.foreign(Method::GET, &path)).await.problem(404, "not-found");
        server.send(server.bare(Method::GET, &path)).await.problem(401, "unauthenticated");
    }
    for absent in ["blobs/99", "blobs/0", "blobs/x", "blobs/-1", "blobs/..%2f1"] {
        let reply = server.get(&format!("/v1/executions/{}/{absent}", text(&ran["id"]))).await;
        assert!((400..500).contains(&reply.status), "{absent}: {}", reply.text);
        reply.is_a_problem();
    }
    // It stands in events as it does in the answer, and lasts longer than the session.
    let events = server.follow(&text(&ran["id"]), 0).await.rest().await;
    let second = events.iter().filter(|e| e.kind == "result").nth(1).expect("a result");
    assert_eq!(second.data["data"], results[1]["data"]);
    cell.delete().await;
    assert_eq!(fetched(&server, &text(&results[1]["data"]["image/png"]["$ref"])).await.0, 200);
}

async fn long_parts_of_other_types_are_blobs(server: Arc<Server>) {
    let cell = server.cell().await;
    let ran = cell.run("display({'text/html': 'å' * 40_000, 'application/json': {'n': list(range(20_000))}, 'text/plain': 'short'}, raw=True)").await;
    let data = &ran["results"][0]["data"];
    assert_eq!(data["text/plain"], "short", "{ran}");
    let (status, kind, html) = fetched(&server, &text(&data["text/html"]["$ref"])).await;
    assert_eq!((status, html == "å".repeat(40_000).as_bytes()), (200, true), "{kind}");
    // A page of a caller's must not run as one of ours.
    let response = server.request(Method::GET, &text(&data["text/html"]["$ref"])).send().await.expect("an answer");
    let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    assert_eq!(header("x-content-type-options"), "nosniff");
    assert!(
        header("content-disposition").starts_with("attachment")
            || header("content-security-policy").contains("sandbox")
    );
    let (status, kind, bytes) = fetched(&server, &text(&data["application/json"]["$ref"])).await;
    assert_eq!((status, kind.as_str()), (200, "application/json"));
    let read: Value = serde_json::from_slice(&bytes).expect("JSON");
    assert_eq!(read["n"].as_array().map(Vec::len), Some(20_000));
    let there = notebook(&cell).await["cells"][0]["outputs"][0]["data"].clone();
    assert_eq!((text(&there["text/html"]).chars().count(), &there["application/json"]), (40_000, &read));
}

async fn a_notebook_outlives_an_idle_session(server: Arc<Server>) {
    let cell = server.create(json!({"template": "python", "timeouts": {"idle_seconds": 1}})).await;
    cell.value("'before it was idle'").await;
    assert_eq!(cell.wait("ended").await["end_reason"], "idle");
    let read = notebook(&cell).await;
    assert_eq!(cells(&read)[0]["outputs"][0]["data"]["text/plain"], "'before it was idle'");
}

async fn a_notebook_outlives_a_lost_session(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("1 + 1").await;
    let running = cell.background_until_output("print('under way', flush=True)\nimport time\ntime.sleep(60)").await;
    let waiting = cell.background("'never ran'").await;
    let options = RemoveContainerOptionsBuilder::default().force(true).build();
    server.docker.remove_container(&cell.containers().await[0], Some(options)).await.expect("a removal");
    assert_eq!(cell.wait("ended").await["end_reason"], "lost");
    assert_eq!(server.ended(&running).await["status"], "lost");
    let read = notebook(&cell).await;
    let lost = &cells(&read)[1];
    assert_eq!(
        (&lost["metadata"]["cellblock"]["status"], &lost["outputs"][0]["text"]),
        (&json!("lost"), &json!("under way\n"))
    );
    assert_eq!(lost["outputs"][1]["output_type"], "error", "it says how it ended: {lost}");
    // What never ran is no cell with an outcome.
    let never = cells(&read).iter().find(|c| c["metadata"]["cellblock"]["execution"] == json!(waiting));
    assert!(never.is_none_or(|c| c["execution_count"].is_null()), "{never:?}");
    valid(&server, &read, "lost").await;
}

async fn a_notebook_outlives_the_memory_of_its_session(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("'remembered'").await;
    cell.delete().await;
    let read = notebook(&cell).await;
    until(|| async { server.get(&cell.path("")).await.status == 404 }).await;
    is_unchanged(&notebook(&cell).await, &read);
    server.send(server.foreign(Method::GET, &cell.path("/notebook"))).await.problem(404, "not-found");
    assert!((200..300).contains(&server.delete(&cell.path("/notebook")).await.status));
    asked(&cell).await.problem(404, "not-found");
}

async fn a_notebook_is_its_tenants_alone(server: Arc<Server>) {
    let cell = server.cell().await;
    cell.value("'mine'").await;
    let path = cell.path("/notebook");
    for method in [Method::GET, Method::DELETE] {
        let foreign = server.send(server.foreign(method.clone(), &path)).await;
        foreign.problem(404, "not-found");
        let unknown = cell.id.replace("ses0", "ses7");
        assert_ne!(unknown, cell.id);
        let unknown = server.send(server.foreign(method.clone(), &format!("/v1/sessions/{unknown}/notebook"))).await;
        assert_eq!(unknown.problem(404, "not-found")["detail"], foreign.json["detail"], "both look alike");
        server.send(server.bare(method, &path)).await.problem(401, "unauthenticated");
    }
    let powerless = server.bare(Method::DELETE, &path).bearer_auth(&server.powerless_key);
    server.send(powerless).await.problem(403, "forbidden");
    assert_eq!(cells(&notebook(&cell).await).len(), 1, "nobody else could delete it");
}

async fn a_deleted_notebook_is_gone(server: Arc<Server>) {
    let cell = server.cell().await;
    let marker = format!("marker{}", cell.id);
    cell.value(&format!("'{marker}'")).await;
    assert_eq!(cells(&notebook(&cell).await).len(), 1);
    let folder = server.data().join("notebooks");
    assert!(is_on_disk(&folder, &marker), "the control: it is there to be found");
    assert!((200..300).contains(&server.delete(&cell.path("/notebook")).await.status));
    assert!(!is_on_disk(&folder, &marker));
    server.delete(&cell.path("/notebook")).await.problem(404, "not-found");
    asked(&cell).await.problem(404, "not-found");
    // The session lives, and what comes next is another notebook.
    cell.value("'next'").await;
    let next = notebook(&cell).await;
    assert_eq!(cells(&next).iter().map(|c| text(&c["source"])).collect::<Vec<_>>(), ["'next'"]);
    cell.delete().await;
    assert!((200..300).contains(&server.delete(&cell.path("/notebook")).await.status));
    asked(&cell).await.problem(404, "not-found");
}

/// What a kernel may say as JSON, and readers of notebooks choke on.
async fn kernels_json_does_not_break_a_notebook(server: Arc<Server>) {
    let cell = server.cell().await;
    let code = r#"
deep = []
for _ in range(400): deep = [deep]
for data in ({"application/json": float("nan")}, {"application/json": float("inf")}, {"application/json": 10 ** 400},
             {"text/plain": "\ud800"}, {"text/html": 5}, {"text/html": None}, {"image/png": ["a", "b"]}, {"image/png": "no base64"},
             {"application/json": deep}, {"application/json": {"\ud800": 1}}, {"": "x"}, {"text/plain": "\0\x1b\u2028"},
             {"no type": "x"}, {"application/vnd.x+json": "a text"}):
    try: display(data, raw=True)
    except Exception as error: print(type(error).__name__)
display({"text/plain": "m"}, raw=True, metadata={"n": float("nan"), "deep": 1})
"the end"
"#;
    // The answer itself has what the kernel said, which is more than this test can read.
    let reply = server.post(&cell.path("/executions"), &json!({"code": code})).await;
    assert!(reply.status == 200 && reply.text.contains("\"status\":\"ok\""), "{}", reply.text);
    cell.run("raise ValueError('\\ud800 \\0')").await;
    cell.run("print('\\ud800')").await;
    let source = "# \u{2028}\u{0} \u{1b} 𝄞\n'source'";
    cell.run(source).await;
    cell.works().await;
    let read = notebook(&cell).await;
    assert_eq!(cells(&read).len(), 5);
    assert_eq!(cells(&read)[3]["source"], source);
    valid(&server, &read, "odd").await;
}

async fn a_session_without_cells_has_a_notebook(server: Arc<Server>) {
    let cell = server.cell().await;
    let read = notebook(&cell).await;
    assert_eq!((&read["cells"], &read["metadata"]["cellblock"]["session"]), (&json!([]), &json!(cell.id)));
    valid(&server, &read, "empty").await;
}

/// The answer's own text is read, so that nothing is made right on the way.
async fn valid(server: &Server, notebook: &Value, name: &str) {
    let path = format!("/v1/sessions/{}/notebook", text(&notebook["metadata"]["cellblock"]["session"]));
    let (_, _, bytes) = fetched(server, &path).await;
    let file = server.data().join(format!("{name}.ipynb"));
    std::fs::write(&file, bytes).expect("a file");
    let checked = jupyter("check", &file).await;
    assert_eq!(checked, json!({"nbformat": [4, 5], "cells": cells(notebook).len()}));
}

fn is_on_disk(folder: &Path, marker: &str) -> bool {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path());
    entries.into_iter().any(|path| match path.is_dir() {
        true => is_on_disk(&path, marker),
        false => std::fs::read(&path).is_ok_and(|b| b.windows(marker.len()).any(|w| w == marker.as_bytes())),
    })
}

/// Waits until something holds, or fails.
async fn until<F: Future<Output = bool>>(holds: impl Fn() -> F) {
    let began = Instant::now();
    while !holds().await {
        // What is looked at every half a minute is seen by then.
        assert!(began.elapsed() < 3 * NEVER / 2, "it never came to hold");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retention_ends_blobs_and_then_notebooks() {
    let _alone = MACHINE.lock().await;
    let settings = "[executions]\ninline = \"32KiB\"\nblob_retention = \"4s\"\nnotebook_retention = \"8s\"\n";
    let server = Server::start(settings).await;
    let cell = painter(&server, json!({"template": "python"})).await;
    let ran = cell.run("show(300)").await;
    let path = text(&ran["results"][0]["data"]["image/png"]["$ref"]);
    assert_eq!(fetched(&server, &path).await.0, 200, "{ran}");
    until(|| async { fetched(&server, &path).await.0 == 404 }).await;
    // A session that lives keeps its notebook, and the notebook its pictures.
    let read = notebook(&cell).await;
    let png = BASE64.decode(text(&cells(&read)[1]["outputs"][0]["data"]["image/png"]).trim()).expect("base64");
    assert_eq!(&png[..8], PNG);
    cell.delete().await;
    let began = Instant::now();
    is_unchanged(&notebook(&cell).await, &read);
    until(|| async { asked(&cell).await.status == 404 }).await;
    assert!((6.0..40.0).contains(&began.elapsed().as_secs_f64()), "{:?}", began.elapsed());
    until(|| async { !is_on_disk(&server.data().join("notebooks"), &cell.id) }).await;
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_oldest_blobs_make_room() {
    let _alone = MACHINE.lock().await;
    let settings = "[executions]\ninline = \"32KiB\"\nblob_size = \"16MiB\"\n\
        [template_defaults.output]\nresults = \"40MiB\"\ntotal = \"48MiB\"\n";
    let server = Server::start(settings).await;
    let cell = painter(&server, json!({"template": "python"})).await;
    let mut paths = Vec::new();
    for _ in 0..5 {
        let ran = cell.run("show(2200)").await;
        paths.push(text(&ran["results"][0]["data"]["image/png"]["$ref"]));
    }
    let mut there = Vec::new();
    for path in &paths {
        there.push(fetched(&server, path).await.0 == 200);
    }
    assert_eq!(there, [false, false, true, true, true], "3 of 4.8 MB fit into 16 MiB: {paths:?}");
    // One that fits nowhere is not kept, and the answer says so.
    let ran = cell.run("show(4200)").await;
    assert_eq!((&ran["status"], &ran["limits_hit"]), (&json!("ok"), &json!(["output"])), "{}", ran["output"]);
    assert!(number(&ran["output"]["results_omitted_bytes"]) > 16 << 20, "{}", ran["output"]);
    assert_eq!(fetched(&server, &paths[4]).await.0, 200, "and nothing goes for it");
    assert_eq!(cells(&notebook(&cell).await).len(), 7);
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn notebooks_and_blobs_outlive_the_server() {
    let _alone = MACHINE.lock().await;
    let first = Server::start(SETTINGS).await;
    let cell = painter(&first, json!({"template": "python"})).await;
    let ran = cell.run("show(300)\n'kept'").await;
    let blob = &ran["results"][0]["data"]["image/png"];
    let read = notebook(&cell).await;
    let second = first.start_again(|_| ()).await;
    let again = Cell { server: Arc::clone(&second), id: cell.id.clone(), view: Value::Null };
    is_unchanged(&notebook(&again).await, &read);
    assert_eq!(hash(&fetched(&second, &text(&blob["$ref"])).await.2), text(&blob["sha256"]));
    // A server that is killed has not written that anything ended, and its last line is half a line.
    let alive = second.cell().await;
    alive.value("'before the kill'").await;
    // Read after it was added, so it is written.
    assert_eq!(cells(&notebook(&alive).await).len(), 1);
    let files = second.data().join("notebooks");
    let file = std::fs::read_dir(&files).expect("a folder").map(|e| e.expect("an entry").path());
    let file = file.into_iter().find(|f| f.to_string_lossy().contains(&alive.id)).expect("a file of the notebook");
    let mut bytes = std::fs::read(&file).expect("a file");
    bytes.extend_from_slice(b"{\"execution\": \"exe");
    let third = second.start_again(|_| std::fs::write(&file, &bytes).expect("a file")).await;
    let again = Cell { server: Arc::clone(&third), id: alive.id.clone(), view: Value::Null };
    let read = notebook(&again).await;
    assert_eq!(cells(&read).iter().map(|c| text(&c["source"])).collect::<Vec<_>>(), ["'before the kill'"]);
    valid(&third, &read, "torn").await;
    assert!((200..300).contains(&third.delete(&again.path("/notebook")).await.status));
    let fourth = third.start_again(|_| ()).await;
    let again = Cell { server: Arc::clone(&fourth), id: alive.id.clone(), view: Value::Null };
    asked(&again).await.problem(404, "not-found");
    let again = Cell { server: Arc::clone(&fourth), id: cell.id.clone(), view: Value::Null };
    assert_eq!(cells(&notebook(&again).await).len(), 2, "the other is still there");
    fourth.finish().await.unwrap_or_else(|left| panic!("{left}"));
}
