//! The Jupyter door, seen by others' clients as they come: the suite that kernels are tested with, JupyterLab's library, widgets, agents' executors, and
//! JupyterLab itself in a browser. `scripts/test-kernel` has put them into `target/`; what each must get is said in `tests/jupyter/`.

#[path = "support/server.rs"]
mod server;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use server::Server;

/// Clients that print three megabytes in one piece hear all of it.
const SETTINGS: &str = "default_template = \"data\"\n[template_defaults.output]\ntext = \"4MiB\"\n";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Something that `make test-kernel` has put into the target folder.
fn installed(path: &str) -> PathBuf {
    let path = root().join("target").join(path);
    assert!(path.exists(), "{} is not there; `make test-kernel` makes it", path.display());
    path
}

fn script(name: &str) -> PathBuf {
    root().join("tests/jupyter").join(name)
}

/// The Python with the clients, without the script's folder among its modules.
fn python(name: &str) -> Command {
    let mut command = Command::new(installed("jupyter/bin/python"));
    command.arg("-P").arg(script(name));
    command
}

/// Runs a program to its end, which must be a good one.
async fn ends_well(mut command: Command) -> Output {
    // What is on this machine is not spoken to through a proxy.
    command.env("NO_PROXY", "127.0.0.1,localhost").env("no_proxy", "127.0.0.1,localhost");
    let said = format!("{command:?}");
    let ran = tokio::task::spawn_blocking(move || command.output()).await.expect("a task").expect("a program");
    let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "{said} ended with {}:\n{out}\n{err}", ran.status);
    ran
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kernels_behind_the_door_pass_what_they_pass_alone() {
    let server = Server::start(SETTINGS).await;
    let cases = cases!(server; python_suite, bash_suite, r_suite, deno_suite);
    server.run_and_finish(2, cases).await;
}

async fn python_suite(server: Arc<Server>) {
    passes_what_it_passes_alone(&server, "python", 18).await;
}

async fn bash_suite(server: Arc<Server>) {
    passes_what_it_passes_alone(&server, "bash", 4).await;
}

async fn r_suite(server: Arc<Server>) {
    passes_what_it_passes_alone(&server, "r", 10).await;
}

async fn deno_suite(server: Arc<Server>) {
    passes_what_it_passes_alone(&server, "deno", 9).await;
}

/// What came of each test of the suite, and of each part of one.
type Outcomes = BTreeMap<String, String>;

/// The baseline is the same kernel of the same image, started by jupyter_client beside the suite in a container without any of our programs. So what a kernel
/// fails by itself is found anew in each run, with the versions in the image, and is written down nowhere.
async fn passes_what_it_passes_alone(server: &Server, language: &str, at_least: usize) {
    let (alone, mut behind) = (suite_alone(language).await, suite_behind(server, language).await);
    let passed = |outcomes: &Outcomes| outcomes.values().filter(|outcome| *outcome == "passed").count();
    println!("{language}: {} pass alone, {} behind the door", passed(&alone), passed(&behind));
    assert!(passed(&alone) >= at_least, "the baseline is no baseline: {alone:#?}");
    let failed_behind = |behind: &Outcomes| -> Vec<String> {
        let of = |test: &String| behind.get(test).map_or("not run", String::as_str).to_owned();
        let passed = alone.iter().filter(|(_, outcome)| *outcome == "passed").map(|(test, _)| test);
        passed.filter(|test| of(test) != "passed").map(|test| format!("{test}: {}", of(test))).collect()
    };
    if !failed_behind(&behind).is_empty() {
        // The suite waits a tenth of a second for each message, which a busy machine may not keep.
        for (test, outcome) in suite_behind(server, language).await {
            behind.entry(test).and_modify(|before| {
                if outcome == "passed" {
                    *before = outcome
                }
            });
        }
    }
    let worse = failed_behind(&behind);
    assert!(worse.is_empty(), "{language} passes these alone, and not behind the door:\n{}", worse.join("\n"));
}

async fn suite_behind(server: &Server, language: &str) -> Outcomes {
    let mut command = python("kernel_suite.py");
    command.args([language, &server.url, &server.key]);
    outcomes(&ends_well(command).await)
}

async fn suite_alone(language: &str) -> Outcomes {
    let docker = |arguments: &[&str]| {
        let mut command = Command::new("docker");
        command.args(arguments);
        command
    };
    let said = |output: Output| String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let runs = ["python", "-P", "/suite/kernel_suite.py", language];
    let create =
        ["create", "--rm", "--network=none", "--tmpfs=/tmp", "--memory=1g", "--env=PYTHONPATH=/suite/packages"];
    let container = said(ends_well(docker(&[&create[..], &["cellblock/polyglot:latest"], &runs].concat())).await);
    let copy = |from: PathBuf, to: &str| docker(&["cp", &from.to_string_lossy(), &format!("{container}:{to}")]);
    ends_well(copy(installed("jupyter-bare"), "/suite")).await;
    ends_well(copy(script("kernel_suite.py"), "/suite/kernel_suite.py")).await;
    outcomes(&ends_well(docker(&["start", "--attach", &container])).await)
}

fn outcomes(ran: &Output) -> Outcomes {
    let line = String::from_utf8_lossy(&ran.stdout);
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_others_work_as_they_come() {
    let server = Server::start(SETTINGS).await;
    let cases = cases!(server; jupyterlab_in_a_browser, jupyterlabs_library, widgets, autogen, smolagents, open_webui);
    server.run_and_finish(2, cases).await;
}

async fn jupyterlabs_library(server: Arc<Server>) {
    let mut node = Command::new("node");
    node.arg(script("services.js")).arg(installed("jupyter-node")).args([&server.url, &server.key]);
    ends_well(node).await;
}

/// Where a browser can't be had, `scripts/setup test` leaves a note that says so.
async fn jupyterlab_in_a_browser(server: Arc<Server>) {
    let chromium = Path::new("/usr/bin/chromium");
    if !chromium.exists() {
        let note = std::fs::read_to_string(root().join("target/without-chromium"));
        let why = note
            .unwrap_or_else(|_| panic!("there is no chromium; `make test-kernel` installs it, or notes why it can't"));
        println!("NOT TESTED, JupyterLab in a browser: {why}");
        return;
    }
    let mut node = Command::new("node");
    node.arg(script("lab.js")).arg(installed("jupyter-node")).arg(installed("jupyter/bin/python")).arg(chromium);
    node.arg(root().join("target/jupyterlab.png")).args([&server.url, &server.key]);
    ends_well(node).await;
}

async fn widgets(server: Arc<Server>) {
    let mut client = python("widgets.py");
    client.args([&server.url, &server.key]);
    ends_well(client).await;
}

async fn autogen(server: Arc<Server>) {
    agent_works(&server, "autogen").await;
}

async fn smolagents(server: Arc<Server>) {
    agent_works(&server, "smolagents").await;
}

async fn open_webui(server: Arc<Server>) {
    installed("open-webui");
    agent_works(&server, "open_webui").await;
}

async fn agent_works(server: &Server, name: &str) {
    let mut client = python("agents.py");
    client.args([&server.url, &server.key, name]);
    ends_well(client).await;
}
