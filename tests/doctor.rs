//! `cellblock doctor` as an operator runs it: what it finds on this host, and on one where something is broken.

#[path = "support/server.rs"]
mod server;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bollard::Docker;
use bollard::query_parameters::{ListContainersOptionsBuilder, ListVolumesOptionsBuilder};
use serde_json::{Value, json};
use server::{NEVER, Server};

/// What is looked at on every host with an engine, whatever its templates.
const EVERYWHERE: [&str; 11] = [
    "open files",
    "data folder",
    "database",
    "guest",
    "engine",
    "cgroups",
    "users",
    "runtimes",
    "clock",
    "disk quota",
    "engine's disk",
];
/// What is looked at for every runtime.
const LOCKS: [&str; 14] = [
    "memory",
    "memory-swap",
    "pids",
    "cpu",
    "tmpfs-size",
    "tmpfs-inodes",
    "mount-flags",
    "network",
    "read-only-root",
    "seccomp",
    "no-new-privileges",
    "capabilities",
    "uid",
    "attestation",
];

fn doctor(folder: &Path, settings: &str) -> Command {
    let file = folder.join("doctor.toml");
    std::fs::write(&file, settings).expect("a file");
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
    command.args(["doctor", "--json", "--config"]).arg(file).arg("--data-dir").arg(folder);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

async fn examine(folder: &Path, settings: &str) -> Output {
    let mut command = doctor(folder, settings);
    let running = tokio::task::spawn_blocking(move || command.output());
    tokio::time::timeout(2 * NEVER, running).await.expect("an end").expect("a wait").expect("the program")
}

/// Its findings by name.
fn findings(output: &Output) -> BTreeMap<String, Value> {
    let json: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    let worst = json["checks"].as_array().expect("checks").iter().map(|check| match check["verdict"].as_str() {
        Some("ok") => 0,
        Some("weak") => 1,
        _ => 2,
    });
    assert_eq!(output.status.code(), worst.max(), "{json:#}");
    let checks = json["checks"].as_array().expect("checks").iter();
    checks.map(|check| (check["name"].as_str().expect("a name").to_owned(), check.clone())).collect()
}

/// Names of containers and volumes that doctors have made and not removed.
async fn left() -> Vec<String> {
    let docker = Docker::connect_with_socket_defaults().expect("an engine");
    let filters = HashMap::from([("label", vec!["io.cellblock.instance"])]);
    let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
    let containers = docker.list_containers(Some(options)).await.expect("a list");
    let options = ListVolumesOptionsBuilder::default().filters(&filters).build();
    let volumes = docker.list_volumes(Some(options)).await.expect("a list").volumes.unwrap_or_default();
    let is_doctors = |labels: &HashMap<String, String>| labels["io.cellblock.instance"].starts_with("doctor-");
    let containers = containers.into_iter().filter(|c| c.labels.as_ref().is_some_and(is_doctors));
    let containers = containers.flat_map(|c| c.names.unwrap_or_default());
    containers.chain(volumes.into_iter().filter(|v| is_doctors(&v.labels)).map(|v| v.name)).collect()
}

#[tokio::test]
async fn this_host_is_well_and_nothing_is_left_on_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let found = findings(&examine(folder.path(), "").await);
    let locks = LOCKS.map(|lock| format!("{lock} (runc)"));
    for name in
        EVERYWHERE.into_iter().chain(locks.iter().map(String::as_str)).chain(["image of data", "image of python"])
    {
        let check = found.get(name).unwrap_or_else(|| panic!("{name} was not looked at: {found:#?}"));
        assert!(check["seen"].as_str().is_some_and(|seen| !seen.is_empty()), "{check}");
        // A developer's disk may be full, and their shell's limits low.
        let may_be_weak = ["open files", "data folder", "engine's disk"].contains(&name);
        assert!(check["verdict"] == "ok" || (may_be_weak && check["verdict"] == "weak"), "{check}");
    }
    assert!(!folder.path().join("state.db").exists(), "it only looks");
    assert_eq!(left().await, Vec::<String>::new());
}

#[tokio::test]
async fn an_engine_that_is_not_there_is_broken() {
    let folder = tempfile::tempdir().expect("a folder");
    let found = findings(&examine(folder.path(), "[engine]\nhost = \"unix:///nonexistent/docker.sock\"\n").await);
    assert_eq!(found["engine"]["verdict"], "broken");
    assert!(
        found["engine"]["seen"].as_str().is_some_and(|seen| seen.contains("/nonexistent/docker.sock")),
        "{found:#?}"
    );
    assert!(found["engine"]["remedy"].as_str().is_some_and(|remedy| remedy.contains("engine.host")), "{found:#?}");
    assert_eq!(found["database"]["verdict"], "ok", "what needs no engine is looked at all the same");
}

/// Nothing is tried past a guard, and that is said.
#[tokio::test]
async fn behind_a_guard_its_own_host_is_to_be_tried() {
    let folder = tempfile::tempdir().expect("a folder");
    let found = findings(&examine(folder.path(), "[engine]\nhost = \"guard:///nonexistent/guard.sock\"\n").await);
    assert_eq!(found["guard"]["verdict"], "broken", "{found:#?}");
    assert!(found["guard"]["seen"].as_str().is_some_and(|seen| seen.contains("/nonexistent/guard.sock")), "{found:#?}");
    assert_eq!(found["locks"]["verdict"], "weak", "{found:#?}");
}

#[tokio::test]
async fn what_is_missing_or_damaged_is_broken_and_stays_as_it_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let database = folder.path().join("state.db");
    std::fs::write(&database, "this is no database, and it is long enough to be looked at as one").expect("a file");
    let settings = "[templates.gone]\nimage = \"cellblock/no-such-image:1\"\n[templates.odd]\nimage = \"cellblock/python:latest\"\nruntime = \"runsc-that-nobody-has\"\n[guest]\nbinary = \"/nonexistent/guest\"\n";
    let found = findings(&examine(folder.path(), settings).await);
    for (name, said) in [
        ("image of gone", "cellblock/no-such-image:1"),
        ("database", "state.db"),
        ("template odd", "runsc-that-nobody-has"),
        ("guest", "/nonexistent/guest"),
    ] {
        assert_eq!(found[name]["verdict"], "broken", "{found:#?}");
        assert!(found[name]["seen"].as_str().is_some_and(|seen| seen.contains(said)), "{found:#?}");
    }
    assert!(found["database"]["remedy"].as_str().is_some_and(|remedy| remedy.contains("backup")), "{found:#?}");
    let text = std::fs::read_to_string(&database).expect("a file");
    assert!(text.starts_with("this is no database"));
    let mut files: Vec<_> =
        std::fs::read_dir(folder.path()).expect("a folder").map(|f| f.expect("a file").file_name()).collect();
    files.sort();
    assert_eq!(files, ["doctor.toml", "state.db"], "it makes nothing");
    assert_eq!(left().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_mistake_in_the_configuration_is_broken() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = examine(folder.path(), "[template_defaults]\naccept_unenforced = [\"network\"]\n").await;
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("accept_unenforced") && said.contains("memory-swap"), "{said}");
}

/// Waits until a doctor has something on the engine.
async fn until_it_tries() {
    let began = Instant::now();
    while left().await.is_empty() {
        assert!(began.elapsed() < NEVER, "nothing is tried");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn one_that_is_interrupted_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let child = doctor(folder.path(), "").spawn().expect("the program");
    until_it_tries().await;
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("a command").success());
    let output = tokio::task::spawn_blocking(|| child.wait_with_output()).await.expect("a wait").expect("an end");
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert_eq!(left().await, Vec::<String>::new());
}

/// A server of the same name and folder neither sweeps it away nor is disturbed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_and_a_doctor_leave_each_other_alone() {
    let server = Server::start("").await;
    let cell = server.cell().await;
    cell.value("x = 41").await;
    let settings = format!("[engine]\ninstance = \"{}\"\n", server.instance);
    let data = server.data().to_owned();
    let over = AtomicBool::new(false);
    let examining = async {
        let output = examine(&data, &settings).await;
        over.store(true, Ordering::Relaxed);
        output
    };
    let reconciling = async {
        until_it_tries().await;
        while !over.load(Ordering::Relaxed) {
            let reply = server.post("/v1/admin/reconcile", &Value::Null).await;
            for removed in ["cells_removed", "volumes_removed", "errors"] {
                assert_eq!((reply.status, &reply.json[removed]), (200, &json!([])), "{}", reply.text);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let (output, ()) = tokio::join!(examining, reconciling);
    let found = findings(&output);
    for lock in LOCKS.map(|lock| format!("{lock} (runc)")) {
        assert_eq!(found[&lock]["verdict"], "ok", "{found:#?}");
    }
    assert!(found["database"]["seen"].as_str().is_some_and(|seen| seen.contains("sound")), "{found:#?}");
    assert_eq!(cell.value("x + 1").await, "42");
    cell.delete().await;
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}
