//! Commands and terminals of real sessions: what they put out and take, how they end, and that nobody else pays for one.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use reqwest::Method;
use serde_json::{Value, json};
use server::{Cell, Follow, NEVER, Seen, Server, joined, text};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

const SETTINGS: &str = r#"
[templates.shell]
image = "cellblock/python:latest"
[templates.shell.default]
memory = "320MiB"
disk = "32MiB"
tmp = "16MiB"
pids = 512
"#;

async fn cell(server: &Arc<Server>) -> Cell {
    server.create(json!({"template": "shell", "env": {"OF_SESSION": "yes"}})).await
}

/// Runs a command to its end.
async fn run(cell: &Cell, body: Value) -> Value {
    let reply = cell.server.post(&cell.path("/commands"), &body).await;
    assert_eq!(reply.status, 200, "{body}: {}", reply.text);
    assert_eq!(reply.json["state"], "ended", "{body}: {}", reply.text);
    reply.json
}

async fn sh(cell: &Cell, line: &str) -> Value {
    run(cell, json!({"command": line})).await
}

/// Starts a command in the background and answers with its path.
async fn begin(cell: &Cell, mut body: Value) -> String {
    body["background"] = json!(true);
    let reply = cell.server.post(&cell.path("/commands"), &body).await;
    assert_eq!((reply.status, &reply.json["state"]), (202, &json!("running")), "{}", reply.text);
    let path = cell.path(&format!("/commands/{}", text(&reply.json["id"])));
    assert_eq!(reply.header("location"), path);
    path
}

async fn follow(server: &Server, path: &str, after: u64) -> Follow {
    let request = server.request(Method::GET, &format!("{path}/events"));
    server.events_of(if after > 0 { request.header("last-event-id", after) } else { request }).await
}

/// Waits for a command's end.
async fn ended(server: &Server, path: &str) -> Value {
    follow(server, path, 0).await.rest().await;
    server.get(path).await.json
}

/// Waits until a command has put out a text.
async fn until_output(server: &Server, path: &str, wanted: &str) -> u64 {
    let mut follow = follow(server, path, 0).await;
    let mut all = String::new();
    while let Some(seen) = follow.next().await {
        assert_ne!(seen.kind, "command.completed", "{wanted} was not said: {}", seen.data);
        all.push_str(seen.data["text"].as_str().unwrap_or_default());
        if all.contains(wanted) {
            return seen.seq;
        }
    }
    panic!("the events broke off before {wanted}");
}

/// Processes in the cell whose command line holds a text; this looks with a kernel, which is no command.
async fn processes(cell: &Cell, wanted: &str) -> usize {
    let code = format!(
        "import glob\ndef line(p):\n    try: return open(p, 'rb').read().replace(b'\\0', b' ').decode()\n    except OSError: return ''\n\
         print(sum({wanted:?} in line(p) for p in glob.glob('/proc/[0-9]*/cmdline')))"
    );
    cell.value(&code).await.parse().unwrap()
}

async fn a_command_says_all_of_how_it_went(server: Arc<Server>) {
    let cell = cell(&server).await;
    let ran = sh(&cell, "echo out; echo err >&2; pwd; exit 3").await;
    assert_eq!((&ran["stdout"], &ran["stderr"]), (&json!("out\n/workspace\n"), &json!("err\n")), "{ran}");
    assert_eq!((&ran["exit_code"], &ran["signal"], &ran["ended_by"]), (&json!(3), &Value::Null, &json!("exit")));
    assert_eq!(ran["output"]["stdout"], json!({"bytes": 15, "truncated": false}));
    let spin =
        "x = bytearray(60 << 20)\nimport time\nt = time.process_time()\nwhile time.process_time() - t < 0.3: pass";
    let ran = run(&cell, json!({"argv": ["python3", "-c", spin]})).await;
    assert!((250..3000).contains(&ran["cpu_ms"].as_u64().unwrap()), "{ran}");
    assert!((60.0..200.0).contains(&ran["peak_memory_mb"].as_f64().unwrap()), "{ran}");
    let ran = sh(&cell, "kill -USR1 $$").await;
    assert_eq!((&ran["exit_code"], &ran["signal"]), (&Value::Null, &json!(10)), "{ran}");

    // An environment and a folder of its own.
    let body =
        json!({"command": "mkdir -p /tmp/a; echo $OF_SESSION $MINE $PWD", "env": {"MINE": "é x"}, "cwd": "/tmp"});
    assert_eq!(run(&cell, body).await["stdout"], "yes é x /tmp\n");
    sh(&cell, "mkdir -p deep/er").await;
    assert_eq!(run(&cell, json!({"argv": ["pwd"], "cwd": "deep/er"})).await["stdout"], "/workspace/deep/er\n");

    // What is no UTF-8.
    let raw = json!({"command": r"printf 'a\377b\303'", "encoding": "base64"});
    assert_eq!(run(&cell, raw).await["stdout"], "Yf9iww==");
    assert_eq!(sh(&cell, r"printf 'a\377b\303'").await["stdout"], "a\u{fffd}b\u{fffd}");

    // A stdin at its end, a text on it, and one that is never read.
    assert_eq!(sh(&cell, "cat; echo end").await["stdout"], "end\n");
    assert_eq!(run(&cell, json!({"argv": ["cat"], "stdin": "söme\ntext"})).await["stdout"], "söme\ntext");
    let much = "x".repeat(500_000);
    assert_eq!(run(&cell, json!({"argv": ["true"], "stdin": much})).await["exit_code"], 0);
    assert_eq!(run(&cell, json!({"command": "sleep 0.2; wc -c", "stdin": much})).await["stdout"], "500000\n");
    cell.delete().await;
}

async fn what_is_not_allowed_is_told_by_field(server: Arc<Server>) {
    let cell = cell(&server).await;
    let refused = async |body: Value| {
        let reply = server.post(&cell.path("/commands"), &body).await;
        reply.problem(422, "spec-rejected");
        reply.pointers()
    };
    assert_eq!(refused(json!({})).await, ["/argv"]);
    assert_eq!(refused(json!({"argv": ["ls"], "command": "ls"})).await, ["/argv"]);
    assert_eq!(refused(json!({"argv": ["there-is-no-such"]})).await, ["/argv/0"]);
    assert_eq!(refused(json!({"argv": ["/etc/passwd"]})).await, ["/argv/0"]);
    assert_eq!(
        refused(json!({"argv": ["echo", "a".repeat(100_000), "b".repeat(100_000), "c".repeat(100_000)]})).await,
        ["/argv"]
    );
    assert_eq!(refused(json!({"command": "ls", "cwd": "/etc"})).await, ["/cwd"]);
    assert_eq!(refused(json!({"command": "ls", "cwd": "not-there"})).await, ["/cwd"]);
    let wrong = json!({"command": "", "timeout_seconds": 1e9, "env": {"1": ""}, "max_output_bytes": 0, "tty": {"cols": 0, "rows": 5000}});
    assert_eq!(
        refused(wrong).await,
        ["/command", "/env/1", "/max_output_bytes", "/timeout_seconds", "/tty/cols", "/tty/rows"]
    );
    let unknown = cell.path("/commands/cmd00000000000000000000000000");
    for path in [unknown.clone(), format!("{unknown}/events")] {
        server.get(&path).await.problem(404, "not-found");
    }
    server.delete(&unknown).await.problem(404, "not-found");
    let path = begin(&cell, json!({"command": "exec sleep 1000"})).await;
    let signalled = server.post(&format!("{path}/signal"), &json!({"signal": "SIGSEGV"})).await;
    signalled.problem(422, "spec-rejected");
    server.post(&format!("{path}/stdin"), &json!({"data": "x"})).await.problem(409, "state-conflict");
    server.post(&format!("{path}/resize"), &json!({"cols": 10, "rows": 10})).await.problem(409, "state-conflict");
    server.delete(&path).await;
    server.post(&format!("{path}/signal"), &json!({"signal": "SIGINT"})).await.problem(409, "state-conflict");
    cell.delete().await;
}

async fn events_come_as_they_happen_and_again(server: Arc<Server>) {
    let cell = cell(&server).await;
    let body = json!({"command": "echo one; read line; echo got $line >&2; read line; echo end", "stdin": true});
    let path = begin(&cell, body).await;
    let mut first = follow(&server, &path, 0).await;
    let started = first.next().await.unwrap();
    assert_eq!((started.kind.as_str(), started.seq), ("command.started", 1));
    let one = first.next().await.unwrap();
    assert_eq!((one.kind.as_str(), &one.data["text"]), ("stdout", &json!("one\n")));
    let looked = server.get(&path).await.json;
    assert_eq!(
        (&looked["state"], &looked["stdout"], &looked["pid"]),
        (&json!("running"), &json!("one\n"), &started.data["pid"])
    );
    let taken = server.post(&format!("{path}/stdin"), &json!({"data": "wörd\n"})).await.json;
    assert_eq!(taken, json!({"bytes": 6, "closed": false}));
    assert_eq!(first.next().await.unwrap().data["text"], "got wörd\n");
    let taken = server.post(&format!("{path}/stdin"), &json!({"data_base64": "Cg==", "close": true})).await.json;
    assert_eq!(taken, json!({"bytes": 1, "closed": true}));
    let rest = first.rest().await;
    assert_eq!(rest.last().unwrap().kind, "command.completed");
    assert_eq!(rest.last().unwrap().data["command"]["exit_code"], 0);
    // Another reader, from the middle on, and one that has it all.
    let again = follow(&server, &path, one.seq).await.rest().await;
    assert_eq!((joined(&again, "stderr").as_str(), joined(&again, "stdout").as_str()), ("got wörd\n", "end\n"));
    let last = again.last().unwrap().seq;
    let kinds = |seen: Vec<Seen>| seen.into_iter().map(|seen| seen.kind).collect::<Vec<_>>();
    assert_eq!(kinds(follow(&server, &path, last).await.rest().await), ["command.completed"]);

    // In the answer itself.
    let request = server.request(Method::POST, &cell.path("/commands")).header("accept", "text/event-stream");
    let streamed =
        server.events_of(request.json(&json!({"command": "echo a; sleep 0.3; echo b; exit 4"}))).await.rest().await;
    assert_eq!(joined(&streamed, "stdout"), "a\nb\n");
    let (a, b) = (&streamed[1], streamed.iter().rfind(|seen| seen.kind == "stdout").unwrap());
    assert!(b.at - a.at > Duration::from_millis(200), "as they happen");
    assert_eq!(streamed.last().unwrap().data["command"]["exit_code"], 4);

    let listed = server.get(&cell.path("/commands")).await.json;
    let told: Vec<_> =
        listed["commands"].as_array().unwrap().iter().map(|told| (&told["argv"][1], &told["exit_code"])).collect();
    assert_eq!(told, [(&json!("-c"), &json!(0)), (&json!("-c"), &json!(4))], "the oldest first: {listed}");
    cell.delete().await;
}

async fn the_same_request_starts_one_command(server: Arc<Server>) {
    let cell = cell(&server).await;
    let send = async || {
        let request = server.request(Method::POST, &cell.path("/commands")).header("idempotency-key", "k");
        server.send(request.json(&json!({"command": "echo x >> log; cat log"}))).await.json
    };
    let (first, second) = (send().await, send().await);
    assert_eq!((&first["id"], &first["stdout"]), (&second["id"], &second["stdout"]));
    assert_eq!(sh(&cell, "cat log").await["stdout"], "x\n");
    cell.delete().await;
}

async fn output_is_cut_with_exact_counts_and_floods_cost_nobody_else(server: Arc<Server>) {
    let cell = cell(&server).await;
    let ran = run(&cell, json!({"command": "seq 1 100000", "max_output_bytes": 1000})).await;
    let all: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    let out = text(&ran["stdout"]);
    let (head, rest) = out.split_once("\n[… ").unwrap();
    let (omitted, tail) = rest.split_once(" bytes left out …]\n").unwrap();
    let omitted: usize = omitted.parse().unwrap();
    assert!(all.starts_with(head) && all.ends_with(tail), "{out}");
    assert_eq!(head.len() + tail.len() + omitted, all.len());
    assert!((990..=1000).contains(&(head.len() + tail.len())), "{out}");
    assert_eq!(ran["output"]["stdout"], json!({"bytes": all.len(), "truncated": true}));
    let whole = run(&cell, json!({"command": "seq 1 100", "max_output_bytes": 292})).await;
    assert_eq!(whole["output"]["stdout"], json!({"bytes": 292, "truncated": false}), "what just fits is whole");

    // A gigabyte, while code runs beside it, and nobody reads.
    let path = begin(&cell, json!({"command": "head -c 1000000000 /dev/zero | tr '\\0' x; echo; echo end"})).await;
    let began = Instant::now();
    cell.works().await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let flood = ended(&server, &path).await;
    assert_eq!(flood["output"]["stdout"], json!({"bytes": 1_000_000_005, "truncated": true}), "{}", flood["output"]);
    assert!(text(&flood["stdout"]).ends_with("x\nend\n"));

    // Of one that still runs, what there is of its head; it never waits for a reader.
    let path = begin(&cell, json!({"command": "yes | head -c 3000000; touch done; exec sleep 1000"})).await;
    let written = async {
        while sh(&cell, "ls done").await["exit_code"] != 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(NEVER, written).await.unwrap();
    let looked = server.get(&path).await.json;
    assert_eq!((&looked["state"], text(&looked["stdout"]).len()), (&json!("running"), 786_432));
    server.delete(&path).await;
    cell.delete().await;
}

async fn a_whole_tree_ends_with_its_command(server: Arc<Server>) {
    let cell = cell(&server).await;
    // Children, one that has left the session and the group, one that has cleared its environment and has no parent, and none that listens.
    let line = "trap '' TERM; sleep 7001 & (setsid sh -c 'trap \"\" TERM; sleep 7002' &) ; \
                (env -i setsid sh -c 'sleep 7003 & exec sleep 7003' &) ; echo ready; while :; do sleep 7004; done";
    for how in ["timeout", "request"] {
        let seconds = if how == "timeout" { 1.0 } else { 100.0 };
        let path = begin(&cell, json!({"command": line, "timeout_seconds": seconds})).await;
        until_output(&server, &path, "ready").await;
        if how == "request" {
            let deleted = server.delete(&path).await;
            assert_eq!((deleted.status, &deleted.json["state"]), (200, &json!("ended")), "{}", deleted.text);
        }
        let ran = ended(&server, &path).await;
        assert_eq!((&ran["ended_by"], &ran["timed_out"]), (&json!(how), &json!(how == "timeout")), "{ran}");
        assert_eq!(processes(&cell, "sleep 70").await, 0, "{how}");
    }
    // What a command leaves behind that ended by itself lives on, and holds nobody up; it ends on request.
    let began = Instant::now();
    let left = sh(&cell, "sleep 7005 & echo done").await;
    assert_eq!(left["stdout"], "done\n");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(processes(&cell, "sleep 7005").await, 1);
    server.post(&cell.path("/restart"), &Value::Null).await;
    assert_eq!(processes(&cell, "sleep 7005").await, 1, "a kernel that ends takes only its own along");
    server.delete(&cell.path(&format!("/commands/{}", text(&left["id"])))).await;
    assert_eq!(processes(&cell, "sleep 7005").await, 0);

    // One whose caller hangs up.
    let body = json!({"command": "echo ready; sleep 7006", "on_disconnect": "kill"});
    let request = server.request(Method::POST, &cell.path("/commands")).header("accept", "text/event-stream");
    let mut heard = server.events_of(request.json(&body)).await;
    while heard.next().await.unwrap().kind != "stdout" {}
    drop(heard);
    let gone = async {
        while processes(&cell, "sleep 7006").await > 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(NEVER, gone).await.unwrap();
    cell.delete().await;
}

async fn signals_reach_the_group(server: Arc<Server>) {
    let cell = cell(&server).await;
    let line = "trap 'echo one; exit 5' USR1; echo ready; sleep 1000";
    let path = begin(&cell, json!({"command": line})).await;
    until_output(&server, &path, "ready").await;
    assert_eq!(server.post(&format!("{path}/signal"), &json!({"signal": "SIGUSR1"})).await.status, 204);
    let ran = ended(&server, &path).await;
    // The sleep in its group has the signal too: the shell waits for it before it does what the trap says.
    assert_eq!((&ran["exit_code"], &ran["stdout"]), (&json!(5), &json!("ready\none\n")), "{ran}");
    let path = begin(&cell, json!({"argv": ["sleep", "1000"]})).await;
    assert_eq!(server.post(&format!("{path}/signal"), &json!({"signal": "SIGKILL"})).await.status, 204);
    let ran = ended(&server, &path).await;
    assert_eq!((&ran["signal"], &ran["ended_by"], &ran["oom"]), (&json!(9), &json!("exit"), &json!(false)), "{ran}");
    cell.delete().await;
}

async fn hostile_commands_cost_nobody_else(server: Arc<Server>) {
    let cell = cell(&server).await;
    // One that closes its output goes on, and ends as it does.
    let ran = run(&cell, json!({"command": "exec >&- 2>&-; sleep 0.3; exit 6"})).await;
    assert_eq!((&ran["exit_code"], &ran["stdout"]), (&json!(6), &json!("")), "{ran}");
    assert!(ran["duration_ms"].as_u64().unwrap() >= 300);
    // One that never reads gets what its pipe holds, and then nothing.
    let path = begin(&cell, json!({"argv": ["sleep", "1000"], "stdin": true})).await;
    let much = json!({"data": "x".repeat(500_000)});
    let taken = server.post(&format!("{path}/stdin"), &much).await.json;
    assert_eq!(taken, json!({"bytes": 65536, "closed": false}));
    server.post(&format!("{path}/stdin"), &json!({"data": "x"})).await.problem(409, "state-conflict");
    server.delete(&path).await;
    // One that fills the cell with processes: the next is refused, and this one ends with all of them.
    let bomb = "f() { f | f & }; f; echo ready; while :; do sleep 1; done";
    let path = begin(&cell, json!({"command": bomb, "timeout_seconds": 100})).await;
    let refused = async {
        loop {
            let reply = server.post(&cell.path("/commands"), &json!({"argv": ["true"]})).await;
            if reply.status == 409 {
                break reply;
            }
            assert_eq!(reply.status, 200, "{}", reply.text);
        }
    };
    if let Ok(reply) = tokio::time::timeout(Duration::from_secs(20), refused).await {
        reply.problem(409, "spawn-failed");
    } else {
        println!("the bomb has burnt out before the cell was full");
    }
    assert_eq!(server.delete(&path).await.status, 200);
    assert_eq!(sh(&cell, "echo still").await["stdout"], "still\n");
    cell.works().await;
    cell.delete().await;
}

/// Code that fills the cell takes its kernel's time, until all is ended that could be its own; who is ended with it is told why.
async fn a_sweep_says_that_it_was_one(server: Arc<Server>) {
    let body = json!({"template": "shell", "resources": {"pids": 64}});
    let cell = server.create(body).await;
    let path = begin(&cell, json!({"argv": ["sleep", "1000"]})).await;
    let bomb = "import os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True:\n    try:\n        os.fork()\n    \
                except OSError:\n        time.sleep(0.001)";
    let ran = cell.execute(json!({"code": bomb, "timeout_seconds": 2})).await;
    assert_eq!(ran["status"], "timeout", "{ran}");
    let swept = ended(&server, &path).await;
    assert_eq!((&swept["ended_by"], &swept["signal"]), (&json!("swept"), &json!(9)), "{swept}");
    assert_eq!(sh(&cell, "echo on").await["stdout"], "on\n");
    cell.works().await;
    cell.delete().await;
}

/// A frozen cell has no time: neither the command's own nor that of its limit.
async fn a_pause_is_no_time_of_a_commands(server: Arc<Server>) {
    let cell = cell(&server).await;
    let count = "for i in 1 2 3 4 5 6 7 8 9 10; do echo $i; sleep 0.3; done";
    let path = begin(&cell, json!({"command": count, "timeout_seconds": 10})).await;
    // Nobody follows it, so the session may be paused.
    let paused = server.post(&cell.path("/pause"), &Value::Null).await;
    assert_eq!(paused.status, 200, "{}", paused.text);
    tokio::time::sleep(Duration::from_secs(12)).await;
    let ran = ended(&server, &path).await;
    assert_eq!((&ran["ended_by"], text(&ran["stdout"]).lines().count()), (&json!("exit"), 10), "{ran}");
    cell.delete().await;
}

async fn five_hundred_commands_a_hundred_at_once(server: Arc<Server>) {
    let cell = Arc::new(cell(&server).await);
    let began = Instant::now();
    let ran: Vec<Value> = futures_util::stream::iter(0..500)
        .map(|n| {
            let cell = Arc::clone(&cell);
            async move { run(&cell, json!({"argv": ["sh", "-c", format!("echo {n}; exit {}", n % 7)]})).await }
        })
        .buffered(100)
        .collect()
        .await;
    println!("five hundred commands: {:?}", began.elapsed());
    for (n, ran) in ran.iter().enumerate() {
        assert_eq!((&ran["stdout"], &ran["exit_code"]), (&json!(format!("{n}\n")), &json!(n % 7)), "{ran}");
    }
    let listed = server.get(&cell.path("/commands")).await.json;
    let listed = listed["commands"].as_array().unwrap();
    assert!(listed.len() == 256 && listed.iter().all(|command| command["state"] == "ended"), "{}", listed.len());
    // As many as may live at once, and one more.
    let all = (0..200).map(|_| begin(&cell, json!({"argv": ["sleep", "1000"]})));
    let paths: Vec<String> = futures_util::stream::iter(all).buffered(20).collect().await;
    let one_more = server.post(&cell.path("/commands"), &json!({"argv": ["true"]})).await;
    one_more.problem(429, "queue-full");
    cell.works().await;
    server.delete(&paths[0]).await;
    assert_eq!(run(&cell, json!({"argv": ["true"]})).await["exit_code"], 0);
    cell.delete().await;
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn open(server: &Server, path: &str, origin: Option<&str>) -> Result<Socket, WsError> {
    let url = format!("{}{path}", server.url.replacen("http", "ws", 1));
    let mut request = url.into_client_request().unwrap();
    let headers = request.headers_mut();
    headers.insert("authorization", HeaderValue::from_str(&format!("Bearer {}", server.key)).unwrap());
    if let Some(origin) = origin {
        headers.insert("origin", HeaderValue::from_str(origin).unwrap());
    }
    Ok(connect_async(request).await?.0)
}

async fn status(server: &Server, path: &str, origin: Option<&str>) -> u16 {
    match open(server, path, origin).await {
        Err(WsError::Http(response)) => response.status().as_u16(),
        other => panic!("{other:?}"),
    }
}

/// What a terminal shows until it has shown a text, and its words meanwhile.
async fn shows(socket: &mut Socket, wanted: &str) -> (String, Vec<Value>) {
    let (mut shown, mut words) = (Vec::new(), Vec::new());
    while !String::from_utf8_lossy(&shown).contains(wanted) {
        let next = tokio::time::timeout(NEVER, socket.next()).await;
        let next = next.unwrap_or_else(|_| panic!("no {wanted} in {}", String::from_utf8_lossy(&shown)));
        match next.unwrap().unwrap() {
            Message::Binary(bytes) => shown.extend_from_slice(&bytes),
            Message::Text(text) => words.push(serde_json::from_str(&text).unwrap()),
            Message::Close(frame) => panic!("closed before {wanted}: {frame:?}: {}", String::from_utf8_lossy(&shown)),
            _ => {}
        }
    }
    (String::from_utf8_lossy(&shown).into_owned(), words)
}

async fn closes(mut socket: Socket) -> (u16, String, Vec<Value>) {
    let mut words = Vec::new();
    loop {
        match tokio::time::timeout(NEVER, socket.next()).await.unwrap().unwrap().unwrap() {
            Message::Close(frame) => {
                let frame = frame.unwrap();
                return (frame.code.into(), frame.reason.to_string(), words);
            }
            Message::Text(text) => words.push(serde_json::from_str(&text).unwrap()),
            _ => {}
        }
    }
}

async fn types(socket: &mut Socket, keys: &str) {
    socket.send(Message::Binary(keys.as_bytes().to_vec().into())).await.unwrap();
}

async fn a_terminal_is_one(server: Arc<Server>) {
    let cell = cell(&server).await;
    let path = cell.path("/terminal");
    let mut one = open(&server, &format!("{path}?cols=101&rows=33"), None).await.unwrap();
    types(&mut one, "stty size; tty; echo $((40 + 2)); echo $TERM\r").await;
    let (shown, words) = shows(&mut one, "xterm-256color").await;
    assert!(shown.contains("33 101") && shown.contains("/dev/pts/") && shown.contains("42"), "{shown}");
    let id = text(&words[0]["command_id"]);
    one.send(Message::Text(r#"{"cols": 77, "rows": 22}"#.into())).await.unwrap();
    types(&mut one, "stty size\r").await;
    shows(&mut one, "22 77").await;
    // The keys that a terminal has for signals work, so it is the controlling one.
    types(&mut one, "sleep 1000; echo after=$?\r").await;
    shows(&mut one, "sleep 1000").await;
    let asleep = async {
        while processes(&cell, "sleep 1000").await == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(NEVER, asleep).await.unwrap();
    types(&mut one, "\u{3}").await;
    types(&mut one, "echo then=$?\r").await;
    shows(&mut one, "then=130").await;

    // A second one sees the same, from what was there on; a third one is a page of another site.
    let again = format!("{path}?id={id}");
    let mut two = open(&server, &again, None).await.unwrap();
    shows(&mut two, "then=130").await;
    types(&mut one, "echo se''en\r").await;
    shows(&mut two, "seen").await;
    assert_eq!(status(&server, &again, Some("https://evil.example")).await, 403);
    let own = server.url.clone();
    drop(open(&server, &again, Some(&own)).await.unwrap());
    assert_eq!(status(&server, &format!("{path}?id=cmd00000000000000000000000000"), None).await, 404);
    assert_eq!(status(&server, &format!("{path}?rows=0"), None).await, 422);
    let not_one = begin(&cell, json!({"argv": ["sleep", "1000"]})).await;
    let not_one = not_one.rsplit('/').next().unwrap();
    assert_eq!(status(&server, &format!("{path}?id={not_one}"), None).await, 409);
    assert_eq!(server.get(&path).await.status, 426);

    // Words that are none, and keys that are too many.
    let mut three = open(&server, &again, None).await.unwrap();
    three.send(Message::Text("hello".into())).await.unwrap();
    assert_eq!(closes(three).await.0, 1003);
    let mut four = open(&server, &again, None).await.unwrap();
    let _ = four.send(Message::Binary(vec![b'x'; 100_000].into())).await;
    assert_eq!(closes(four).await.0, 1009);

    // The end is told to all.
    types(&mut one, "exit 7\r").await;
    for socket in [one, two] {
        let (code, reason, words) = closes(socket).await;
        assert_eq!((code, reason.as_str()), (1000, "exit status 7"));
        assert_eq!(words.last().unwrap()["command"]["exit_code"], 7);
    }
    // Who reads nothing does not hold the terminal up, and is cut off.
    let mut flood = open(&server, &format!("{path}?command=cat+/dev/urandom"), None).await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    cell.works().await;
    let mut bytes = 0;
    let code = loop {
        match tokio::time::timeout(NEVER, flood.next()).await.unwrap().unwrap() {
            Ok(Message::Binary(shown)) => bytes += shown.len(),
            Ok(Message::Close(frame)) => break u16::from(frame.unwrap().code),
            Ok(_) => {}
            // Nothing was read of what it waited for, so it could not even be told.
            Err(_) => break 0,
        }
    };
    assert!([1008, 0].contains(&code), "{code} after {bytes} bytes");
    let last = open(&server, &path, None).await.unwrap();
    cell.delete().await;
    assert_eq!(closes(last).await.0, 1001);
}

/// Callers that follow a flood and never read hold a small part of the session's link each, so code runs beside them as if they were not there.
async fn a_hundred_followers_that_never_read_cost_nobody_else(server: Arc<Server>) {
    let cell = cell(&server).await;
    let flood = "yes%20xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx";
    let mut terminal = open(&server, &cell.path(&format!("/terminal?command={flood}")), None).await.unwrap();
    let (_, words) = shows(&mut terminal, "xxx").await;
    let events = cell.path(&format!("/commands/{}/events", text(&words[0]["command_id"])));
    // Sockets that take little, lest the megabytes wait there.
    let follower = async || {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut stream = socket.connect(server.url.trim_start_matches("http://").parse().unwrap()).await.unwrap();
        let head = format!("GET {events} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n\r\n", server.key);
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut begun = [0; 12];
        stream.read_exact(&mut begun).await.unwrap();
        assert_eq!(&begun, b"HTTP/1.1 200");
        stream
    };
    let unread: Vec<TcpStream> =
        futures_util::stream::iter((0..100).map(|_| follower())).buffer_unordered(20).collect().await;
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    while began.elapsed() < Duration::from_secs(6) {
        let asked = Instant::now();
        tokio::time::timeout(Duration::from_secs(20), cell.works()).await.expect("an answer beside them");
        slowest = slowest.max(asked.elapsed());
    }
    println!("the slowest execution beside a hundred followers: {slowest:?}");
    drop((unread, terminal));
    cell.delete().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_and_terminals() {
    let server = Server::start(SETTINGS).await;
    let cases = cases!(server;
        a_command_says_all_of_how_it_went,
        what_is_not_allowed_is_told_by_field,
        events_come_as_they_happen_and_again,
        the_same_request_starts_one_command,
        output_is_cut_with_exact_counts_and_floods_cost_nobody_else,
        a_whole_tree_ends_with_its_command,
        signals_reach_the_group,
        hostile_commands_cost_nobody_else,
        a_sweep_says_that_it_was_one,
        a_pause_is_no_time_of_a_commands,
        five_hundred_commands_a_hundred_at_once,
        a_hundred_followers_that_never_read_cost_nobody_else,
        a_terminal_is_one,
    );
    server.run_and_finish(2, cases).await;
}

/// What redraws a screen again and again, as `top` does, with what the image has.
const TOP: &str = "python3 -c 'import time\nfor n in range(100000):\n    print(f\"\\x1b[Hround {n} of it\", flush=True)\n    time.sleep(0.1)'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn they_outlive_the_control_plane() {
    let (server, pid) = Server::spawn(&format!("{SETTINGS}\n[drain]\ncontainers = \"keep\"")).await;
    let cell = cell(&server).await;
    let has_top = sh(&cell, "command -v top").await["exit_code"] == 0;
    let line = if has_top { "top -d 0.3" } else { TOP };
    let encoded: String = line.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let mut terminal = open(&server, &cell.path(&format!("/terminal?command={encoded}")), None).await.unwrap();
    let (_, words) = shows(&mut terminal, if has_top { "load average" } else { "round 3 " }).await;
    let terminal_id = text(&words[0]["command_id"]);
    let count = "for i in $(seq 1 40); do echo number $i; sleep 0.2; done; read line; echo got $line";
    let path = begin(&cell, json!({"command": count, "stdin": true})).await;
    let seen = until_output(&server, &path, "number 3\n").await;
    let mut broken = follow(&server, &path, 0).await;
    broken.next().await;
    server.kill(pid).await;
    drop((terminal, broken));

    let (server, _pid) = server.spawn_again().await;
    let cell = Cell { server: Arc::clone(&server), id: cell.id.clone(), view: Value::Null };
    let following = follow(&server, &path, seen).await;
    let mut again =
        open(&server, &cell.path(&format!("/terminal?id={terminal_id}&cols=60&rows=20")), None).await.unwrap();
    // Old and new: what there was, and what comes now.
    shows(&mut again, if has_top { "load average" } else { "round 3 " }).await;
    shows(&mut again, if has_top { "load average" } else { "of it" }).await;
    types(&mut again, "\u{3}").await;
    let (code, reason, _) = closes(again).await;
    assert_eq!(code, 1000, "{reason}");
    let taken = server.post(&format!("{path}/stdin"), &json!({"data": "it\n"})).await.json;
    assert_eq!(taken["bytes"], 3);
    let rest = following.rest().await;
    let all = joined(&follow(&server, &path, 0).await.rest().await, "stdout");
    let expected: String = (1..=40).map(|i| format!("number {i}\n")).collect::<String>() + "got it\n";
    assert_eq!(all, expected);
    assert!(expected.ends_with(&joined(&rest, "stdout")) && joined(&rest, "stdout").starts_with("number 4\n"));
    assert_eq!(rest.last().unwrap().kind, "command.completed");
    cell.delete().await;
    // One that keeps its containers has none left.
    let _ = server.finish().await;
}
