//! Hostile code behind the Jupyter door: whatever a cell does, its client is told of one end, in time and as the record has it; the kernel goes on, or another one
//! does; and nobody else notices. Python's cells are the table of `tests/hostile_code.rs`; what they do is done in the other languages too.

#[path = "support/hostile_cells.rs"]
mod cells;
#[path = "support/jupyter.rs"]
mod jupyter;
#[path = "support/hostile_languages.rs"]
mod languages;
#[path = "support/server.rs"]
mod server;
#[path = "support/watch.rs"]
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cells::{Row, Then};
use jupyter::{Client, Frame, Got, delete, post, printed};
use languages::Deed;
use serde_json::{Value, json};
use server::{Case, Server, text};
use watch::{Canary, shortened, untruths};

const SETTINGS: &str = "default_template = \"python\"\n[executions]\ninterrupt_grace = \"1s\"\n";
/// What is set above, and what a busy machine may add: the end of a kernel, and the answer's way.
const GRACE: f64 = 1.0;
const SLACK: f64 = 8.0;
/// A new kernel, on a busy machine.
const NEXT: Duration = Duration::from_secs(25);
/// The time limit of cells in other languages than Python, in seconds.
const LIMIT: f64 = 2.0;

/// A template for each limit that cells of Python have: a Jupyter client can't ask for one.
fn settings(rows: &[Row]) -> String {
    let limits: BTreeMap<String, &Row> = rows.iter().map(|row| (template_of(row), row)).collect();
    let templates =
        limits.into_iter().map(|(name, row)| template(&name, "python", "python3", row.memory_mb, row.limit));
    std::iter::once(SETTINGS.to_owned()).chain(templates).collect()
}

/// A template for each of the other languages.
fn settings_of_others() -> String {
    let of = |language: languages::Language| {
        let (image, kernelspec) = (language.image, language.kernelspec);
        template(&format!("hostile-{image}"), image, kernelspec, 512, LIMIT)
    };
    // What is printed without end is more than this in that time, on a busy machine too.
    let output = "[template_defaults.output]\ntext = \"64KiB\"\n".to_owned();
    [SETTINGS.to_owned(), output].into_iter().chain(languages::all().map(of)).collect()
}

fn template(name: &str, image: &str, kernelspec: &str, memory: u64, limit: f64) -> String {
    format!(
        "[templates.{name}]\nimage = \"cellblock/{image}:latest\"\nkernelspec = \"{kernelspec}\"\n[templates.{name}.default]\nexecution = \"{limit}s\"\nmemory = \"{memory}MiB\"\ndisk = \"16MiB\"\ntmp = \"16MiB\"\npids = 64\n"
    )
}

fn template_of(row: &Row) -> String {
    format!("hostile-{}-{}", row.limit, row.memory_mb)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_cells_of_python_that_speak_behind_the_door() {
    hostile_cells_of_python(cells::that_speak()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes, for what tests/hostile_code.rs runs by another door; make soak runs it"]
async fn all_hostile_cells_of_python_behind_the_door() {
    hostile_cells_of_python(cells::all()).await;
}

/// Runs them, without those that ask for what Jupyter's messages have no words for.
async fn hostile_cells_of_python(mut rows: Vec<Row>) {
    rows.retain(|row| row.request == json!({}));
    assert!(rows.len() >= 70, "{}", rows.len());
    let server = Server::start(&settings(&rows)).await;
    let case = |row: Row| -> Case { (row.name, Box::pin(a_row_holds(Arc::clone(&server), row))) };
    let cases = rows.into_iter().map(case).collect();
    beside_a_canary(server, cases).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_cells_of_other_languages_behind_the_door() {
    let server = Server::start(&settings_of_others()).await;
    let mut cases: Vec<Case> = Vec::new();
    for language in languages::all() {
        for deed in language.deeds {
            let (server, image, works) = (Arc::clone(&server), language.image, language.works);
            cases.push((deed.name, Box::pin(a_deed_is_survived(server, image, works, deed))));
        }
    }
    beside_a_canary(server, cases).await;
}

async fn beside_a_canary(server: Arc<Server>, cases: Vec<Case>) {
    let canary = Canary::start(&server, &server.key).await;
    let mut failed = server::run(3, cases).await;
    if let Err(noticed) = canary.stop().await {
        failed.push(format!("  the canary: {noticed}"));
    }
    let finished = server.finish().await;
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
    finished.unwrap_or_else(|left| panic!("{left}"));
}

/// A kernel, and one who speaks to it.
struct Notebook {
    server: Arc<Server>,
    kernel: String,
    client: Client,
    /// What was asked before: nobody may be told of another end of it.
    ended: BTreeSet<String>,
}

impl Notebook {
    async fn open(server: &Arc<Server>, template: &str) -> Self {
        let made = post(server, "/api/kernels", json!({"name": template})).await;
        assert_eq!(made.status, 201, "{}", made.text);
        let kernel = text(&made.json["id"]);
        let client = Client::open(server, &kernel, "?session_id=mine", false).await;
        Self { server: Arc::clone(server), kernel, client, ended: BTreeSet::new() }
    }

    /// Runs code to its end; answers with what was told of it. What is told of an earlier one's end is written down as broken.
    async fn run(&mut self, code: &str, broken: &mut Vec<String>) -> Vec<Got> {
        let content = json!({"code": code, "silent": false, "store_history": true, "user_expressions": {}, "allow_stdin": false, "stop_on_error": true});
        let header = self.client.send("shell", "execute_request", content, &[]).await;
        let (mut told, mut is_answered, mut is_idle) = (Vec::new(), false, false);
        while !(is_answered && is_idle) {
            let got = match self.client.next().await {
                Frame::Got(got) => *got,
                Frame::Closed(code) => panic!("the connection was closed with {code:?}"),
            };
            let is_end = got.msg_type == "execute_reply" || got.content["execution_state"] == "idle";
            if got.parent == header {
                broken.extend((is_end && is_idle).then(|| format!("{} after it was idle", got.msg_type)));
                is_answered |= got.msg_type == "execute_reply";
                is_idle |= got.msg_type == "status" && got.content["execution_state"] == "idle";
                told.push(got);
            } else if is_end && self.ended.contains(&text(&got.parent["msg_id"])) {
                broken.push(format!("another {} of an execution that has ended", got.msg_type));
            }
        }
        self.ended.insert(text(&header["msg_id"]));
        told
    }

    /// The next cell is answered with what it was asked, and nothing else.
    async fn answers(&mut self, code: &str, expected: &str, broken: &mut Vec<String>) {
        let began = Instant::now();
        let told = self.run(code, broken).await;
        let words = |name| printed(&told, name);
        let result = told.iter().find(|got| got.msg_type == "execute_result");
        let result = result.map(|got| text(&got.content["data"]["text/plain"])).unwrap_or_default();
        let (out, err) = (format!("{}{result}", words("stdout")), words("stderr"));
        if out.trim() != expected || !err.is_empty() || began.elapsed() > NEXT {
            broken.push(format!("{code:?} was answered after {:?} with {out:?} and {err:?}", began.elapsed()));
        }
    }

    async fn restart(&self) {
        let reply = post(&self.server, &format!("/api/kernels/{}/restart", self.kernel), Value::Null).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
    }

    async fn end(self, broken: &mut Vec<String>) {
        let began = Instant::now();
        let status = delete(&self.server, &format!("/api/kernels/{}", self.kernel)).await;
        if status != 204 || began.elapsed() > Duration::from_secs(10) {
            broken.push(format!("ending the kernel was answered with {status} after {:?}", began.elapsed()));
        }
    }
}

/// The record of what was told; and what was told that is not in it, or the other way round.
async fn compared(server: &Server, told: &[Got], broken: &mut Vec<String>) -> Value {
    let reply = told.iter().find(|got| got.msg_type == "execute_reply").expect("a reply");
    let id = reply.msg_id.strip_suffix("-reply").expect("the id of an execution");
    let record = server.execution(id).await;
    let mut must = |holds: bool, what: &str| {
        if !holds {
            broken.push(what.to_owned());
        }
    };
    let (replied, ran) = (text(&reply.content["status"]), text(&record["status"]));
    must((replied == "ok") == (ran == "ok"), &format!("the reply says {replied} of what ended with {ran}"));
    // What a kernel says just before it dies, or is stopped for good, may die with it.
    let is_cut_off = ran == "kernel_died" || record["kernel"]["restarted"] == true;
    let began = told[0].content["execution_state"] == "busy" || is_cut_off;
    must(began, "it did not begin with being busy");
    let count = |wanted: &dyn Fn(&Got) -> bool| told.iter().filter(|got| wanted(got)).count();
    must(count(&|got| got.msg_type == "execute_reply") == 1, "not one reply");
    must(count(&|got| got.content["execution_state"] == "idle") == 1, "not idle once");
    let is_long = |got: &Got| got.msg_type == "stream" && text(&got.content["text"]).len() > 256 * 1024;
    must(count(&is_long) == 0, "text in longer pieces than clients take");
    let cut = &record["output"]["stdout"]["truncated"];
    must(*cut == true || printed(told, "stdout") == text(&record["stdout"]), "another stdout than the record's");
    let is_cut = record["limits_hit"].as_array().is_some_and(|limits| limits.contains(&json!("output")));
    must(!is_cut || printed(told, "stderr").contains("were left out here"), "what was left out is not told");
    broken.extend(untruths(&record));
    record
}

fn in_time(began: Instant, limit: f64, broken: &mut Vec<String>) {
    let took = began.elapsed().as_secs_f64();
    if took > limit + GRACE + SLACK {
        broken.push(format!("it took {took:.1} s with a limit of {limit} s"));
    }
}

async fn a_row_holds(server: Arc<Server>, row: Row) {
    let mut broken = Vec::new();
    let mut notebook = Notebook::open(&server, &template_of(&row)).await;
    let began = Instant::now();
    let told = notebook.run(&row.code, &mut broken).await;
    in_time(began, row.limit, &mut broken);
    let record = compared(&server, &told, &mut broken).await;
    broken.extend(row.broken(&record));
    if row.spoils {
        notebook.restart().await;
    }
    notebook.answers("1+1", "2", &mut broken).await;
    for then in &row.then {
        match then {
            Then::Prints(code, printed) => notebook.answers(code, printed.trim(), &mut broken).await,
            Then::Restart => {
                notebook.restart().await;
                notebook.answers("1+1", "2", &mut broken).await;
            }
        }
    }
    notebook.end(&mut broken).await;
    assert!(broken.is_empty(), "{}\n    {}", broken.join("\n    "), shortened(&record));
}

async fn a_deed_is_survived(server: Arc<Server>, image: &'static str, works: &'static str, deed: Deed) {
    let mut broken = Vec::new();
    let mut notebook = Notebook::open(&server, &format!("hostile-{image}")).await;
    let began = Instant::now();
    let told = notebook.run(deed.code, &mut broken).await;
    in_time(began, LIMIT, &mut broken);
    let record = compared(&server, &told, &mut broken).await;
    let status = text(&record["status"]);
    if !deed.ends.split(" or ").any(|word| word == status) {
        broken.push(format!("it ended with {status}, not {}", deed.ends));
    }
    let hit = record["limits_hit"].as_array().cloned().unwrap_or_default();
    let is_late = |limit: &str| limit == "memory" && status == "timeout";
    if let Some(limit) = deed.hits.filter(|limit| !hit.contains(&json!(limit)) && !is_late(limit)) {
        broken.push(format!("it hit {hit:?}, not {limit}"));
    }
    if deed.spoils {
        notebook.restart().await;
    }
    notebook.answers(works, "42", &mut broken).await;
    notebook.end(&mut broken).await;
    assert!(broken.is_empty(), "{image}: {}\n    {}", broken.join("\n    "), shortened(&record));
}
