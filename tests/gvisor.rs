//! Sessions under gVisor: what its table says is enforced holds, and what isn't is refused unless it is accepted by name.
//!
//! `scripts/setup test` makes gVisor a runtime of this machine's engine. Where it can't, it says so and leaves a note, and then nothing is tested here.

#[path = "support/server.rs"]
mod server;

use std::sync::Arc;

use cellblock::app::Plane;
use serde_json::json;
use server::{Server, configuration};

const SETTINGS: &str = r#"
default_template = "guarded"
[templates.guarded]
image = "cellblock/python:latest"
runtime = "runsc"
accept_unenforced = ["pids", "seccomp", "tmpfs-inodes", "mount-flags"]
"#;

/// Whether gVisor is there; the note of a setup that could not have it is told.
fn is_there() -> bool {
    let note = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/target/without-gvisor"));
    if let Ok(why) = &note {
        println!("NOT TESTED, gVisor is missing: {why}");
    }
    note.is_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_under_gvisor() {
    if !is_there() {
        return;
    }
    let server = Server::start(SETTINGS).await;
    let cases = cases![server;
        the_kernel_is_gvisors,
        memory_ends_the_session_at_its_limit,
        folders_end_at_their_size,
        nothing_is_reached,
        code_is_interrupted_and_the_session_goes_on,
    ];
    server.run_and_finish(2, cases).await;
}

async fn the_kernel_is_gvisors(server: Arc<Server>) {
    let cell = server.create(json!({})).await;
    let names = cell.containers().await;
    let shown = server.docker.inspect_container(&names[0], None).await.expect("a container");
    assert_eq!(shown.host_config.and_then(|host| host.runtime).as_deref(), Some("runsc"));
    let told =
        cell.value("import subprocess; print(subprocess.run(['dmesg'], capture_output=True, text=True).stdout)").await;
    assert!(told.contains("gVisor"), "{told}");
    assert_eq!(cell.value("x = 40").await, "");
    assert_eq!(cell.value("x + 2").await, "42");
    cell.delete().await;
    assert_eq!(cell.containers().await, Vec::<String>::new());
}

async fn memory_ends_the_session_at_its_limit(server: Arc<Server>) {
    let cell = server.create(json!({})).await;
    cell.value("x = bytearray(200 << 20); len(x)").await;
    let ran = cell.run("x = bytearray(800 << 20)").await;
    // All of it is killed at once, so the engine does not always hear why.
    assert!(["oom", "lost"].contains(&ran["status"].as_str().unwrap_or_default()), "{ran}");
    let ended = cell.wait("ended").await;
    assert_eq!(ended["end_reason"], ran["status"], "{ended}");
}

async fn folders_end_at_their_size(server: Arc<Server>) {
    let cell = server.create(json!({"resources": {"disk_mb": 16}})).await;
    let code = "import os\ntry:\n    for n in range(9):\n        with open(f'f{n}', 'wb') as file:\n            for _ in range(5): file.write(bytes(1 << 20))\nexcept OSError as error:\n    print(error.errno, sum(os.path.getsize(f) for f in os.listdir('.')) <= 16 << 20)";
    assert_eq!(cell.value(code).await, "28 True");
    cell.delete().await;
}

async fn nothing_is_reached(server: Arc<Server>) {
    let cell = server.create(json!({})).await;
    let code = "import socket\ntry: socket.create_connection(('192.0.2.1', 80), 3)\nexcept OSError as error: print(error.errno)";
    assert_eq!(cell.value(code).await, "113");
    let code = "try: open('/x', 'w')\nexcept OSError as error: print(type(error).__name__, error.errno in (13, 30))";
    assert!(cell.value(code).await.ends_with("True"));
    assert_eq!(cell.value("import os; 0 in (os.getuid(), os.geteuid())").await, "False");
    cell.delete().await;
}

async fn code_is_interrupted_and_the_session_goes_on(server: Arc<Server>) {
    let cell = server.create(json!({})).await;
    cell.value("x = 1").await;
    let ran = cell.execute(json!({"code": "while True: pass", "timeout_seconds": 1})).await;
    assert_eq!((&ran["status"], &ran["kernel"]["restarted"]), (&json!("timeout"), &json!(false)), "{ran}");
    assert_eq!(cell.value("x + 41").await, "42");
    cell.delete().await;
}

/// Each name counts, and what is accepted for one template is not for another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_enforced_is_refused_unless_it_is_accepted() {
    if !is_there() {
        return;
    }
    let without_seccomp = SETTINGS.replace("\"seccomp\", ", "");
    let none = SETTINGS.lines().filter(|line| !line.starts_with("accept_")).collect::<Vec<_>>().join("\n");
    let other = format!("{SETTINGS}[templates.other]\nimage = \"cellblock/python:latest\"\nruntime = \"runsc\"\n");
    let unknown = SETTINGS.replace("\"runsc\"", "\"runsc-that-nobody-has\"");
    for (settings, said) in [
        (without_seccomp, "template \"guarded\": \"seccomp\" not enforced"),
        (none, "accept_unenforced = [\"pids\", \"seccomp\", \"tmpfs-inodes\", \"mount-flags\"]"),
        (other, "template \"other\": \"pids\""),
        (unknown, "has no runtime \"runsc-that-nobody-has\""),
    ] {
        let (_folder, config) = configuration(&settings);
        let refused = Plane::start(&config, true).await.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(refused.contains(said), "{settings}\n{refused}");
        assert!(refused.contains("cellblock doctor"), "{refused}");
    }
}
