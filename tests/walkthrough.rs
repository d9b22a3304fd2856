//! The first session of the README, line by line as it stands there, and the command line against the same server.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use serde_json::Value;
use server::{Server, configuration};

const CELLBLOCK: &str = env!("CARGO_BIN_EXE_cellblock");

/// The first shell block after the heading.
fn readme_block(heading: &str) -> String {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let section = readme.split(heading).nth(1).expect("the heading stands in the README");
    section.split("```sh\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a shell block").to_owned()
}

async fn bash(script: String, folder: &Path) -> Output {
    let folder = folder.to_owned();
    let run =
        move || Command::new("bash").args(["-euo", "pipefail", "-c", &script]).current_dir(folder).output().unwrap();
    tokio::task::spawn_blocking(run).await.unwrap()
}

fn key_folder(server: &Server) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join(".data")).unwrap();
    std::fs::write(folder.path().join(".data/api-key"), &server.key).unwrap();
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn the_readme_and_the_commands_do_what_they_say() {
    let server = Server::start("").await;
    the_first_session(&server).await;
    commands_against_a_server(&server).await;
    server.finish().await.unwrap();
}

async fn the_first_session(server: &Arc<Server>) {
    let folder = key_folder(server);
    let script = readme_block("## A first session").replace("http://127.0.0.1:8080", &server.url);
    assert!(script.contains(&server.url), "the README's address has changed");
    let output = bash(script, folder.path()).await;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains(r#""text/plain":"42""#), "{out}");
    assert_eq!(out.matches("event: stdout").count(), 3, "a line each, as it is printed: {out}");
    assert!(out.contains(r#""state":"ended","template":"data""#), "{out}");
    let png = std::fs::read(folder.path().join("plot.png")).unwrap();
    assert!(png.starts_with(b"\x89PNG\r\n\x1a\n") && png.len() > 1000);
}

/// Runs the command with the server's address and key.
async fn cellblock(server: &Server, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(CELLBLOCK);
    command.args(arguments).env("CELLBLOCK_URL", &server.url).env("CELLBLOCK_API_KEY", &server.key);
    finish(command).await
}

async fn finish(mut command: Command) -> (i32, String, String) {
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

async fn commands_against_a_server(server: &Server) {
    assert_eq!(cellblock(server, &["health"]).await.0, 0);
    let (code, out, err) =
        cellblock(server, &["exec", "--new", "--template", "python", "-c", "x = 6\nprint(x * 7)"]).await;
    assert_eq!((code, out.as_str()), (0, "42\n"), "{err}");
    let (_, listed, _) = cellblock(server, &["ps", "--json"]).await;
    let id = listed.split('"').find(|word| word.starts_with("ses")).expect("the session is listed").to_owned();
    assert_eq!(cellblock(server, &["exec", &id, "-c", "print(x)"]).await.1, "6\n", "it goes on in that session");
    let (code, _, err) = cellblock(server, &["exec", &id, "-c", "1/0"]).await;
    assert!(code == 1 && err.contains("ZeroDivisionError"), "{code} {err}");
    let (code, _, _) = cellblock(server, &["exec", &id, "--timeout", "0.5", "-c", "while True: pass"]).await;
    assert_eq!(code, 124);
    let (code, _, err) = cellblock(server, &["exec", &id, "--timeout", "99999", "-c", "1"]).await;
    assert!(code == 125 && err.contains("/timeout_seconds"), "{code} {err}");
    let (code, _, err) = cellblock(server, &["rm", &id]).await;
    assert_eq!(code, 0, "{err}");
    assert!(!cellblock(server, &["ps"]).await.1.contains(&id));
    let (code, images, _) = cellblock(server, &["images"]).await;
    assert!(code == 0 && images.contains("python") && images.contains("data"), "{images}");
    let (code, _, err) = cellblock(server, &["ps", "--key", "cb_wrong"]).await;
    assert!(code == 125 && err.contains("key"), "{code} {err}");
    let (code, _, err) = cellblock(server, &["ps", "--url", "http://127.0.0.1:1"]).await;
    assert!(code == 125 && err.contains("127.0.0.1:1"), "{code} {err}");
}

/// A run with the guest that was built for the tests, and nothing of this machine's own configuration.
fn run(arguments: &[&str]) -> Command {
    let (_, config) = configuration("");
    let mut command = Command::new(CELLBLOCK);
    command.arg("run").args(arguments).env("CELLBLOCK_CONFIG", "/dev/null");
    if let Some(guest) = config.guest.binary {
        command.env("CELLBLOCK__GUEST__BINARY", guest);
    }
    command
}

#[tokio::test]
async fn run_needs_no_server() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let code =
        "import matplotlib.pyplot as plt\nopen('a.txt', 'w').write('hello')\nprint('made')\nplt.plot([1]); plt.show()";
    let (status, stdout, err) = finish(run(&["--out", out.to_str().unwrap(), "-c", code])).await;
    assert!(status == 0 && stdout.starts_with("made\n"), "{status} {stdout} {err}");
    assert_eq!(std::fs::read_to_string(out.join("a.txt")).unwrap(), "hello");
    let saved: Vec<_> = std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(saved.iter().any(|p| p.extension().is_some_and(|e| e == "png")), "{saved:?}");

    let script = folder.path().join("script.py");
    std::fs::write(&script, "raise ValueError('no')").unwrap();
    let (status, _, err) = finish(run(&["--template", "python", script.to_str().unwrap()])).await;
    assert!(status == 1 && err.contains("ValueError"), "{status} {err}");
    let (status, _, _) = finish(run(&["--template", "python", "--timeout", "1", "-c", "while True: pass"])).await;
    assert_eq!(status, 124);
    let (status, out, err) = finish(run(&["--template", "python", "-c", "1 + 1"])).await;
    assert_eq!((status, out.as_str()), (0, "2\n"), "{err}");
    let (status, _, err) = finish(run(&["--template", "nothing", "-c", "1"])).await;
    assert!(status == 125 && err.contains("/template") && err.contains("\"python\""), "{status} {err}");
    let (status, _, err) = finish(run(&["--memory-mb", "99999999", "-c", "1"])).await;
    assert!(status == 125 && err.contains("/resources/memory_mb"), "{status} {err}");
}

fn serve(settings: &[(&str, &str)]) -> Command {
    let mut command = Command::new(CELLBLOCK);
    command.arg("serve").env("CELLBLOCK_CONFIG", "/dev/null").env("CELLBLOCK__ENGINE__INSTANCE", "refused");
    command.envs(settings.iter().copied());
    command
}

#[tokio::test]
async fn a_server_that_should_not_start_says_why() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    let open_key = folder.path().join("open-key");
    std::fs::write(&open_key, format!("cb_{}", "0".repeat(64))).unwrap();
    std::fs::set_permissions(&open_key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let short_key = folder.path().join("short-key");
    std::fs::write(&short_key, "cb_123").unwrap();
    std::fs::set_permissions(&short_key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_address = taken.local_addr().unwrap().to_string();
    let free = ("CELLBLOCK__SERVER__LISTEN", "127.0.0.1:0");
    type Settings<'a> = &'a [(&'a str, &'a str)];
    let table: [(Settings<'_>, &[&str]); 7] = [
        (&[("CELLBLOCK__SERVER__LISTEN", "0.0.0.0:0")], &["allow_plain_http"]),
        (&[free, ("CELLBLOCK__SERVER__API_KEY_FILE", open_key.to_str().unwrap())], &["644", "chmod 600"]),
        (&[free, ("CELLBLOCK__SERVER__API_KEY_FILE", short_key.to_str().unwrap())], &["64 lower-case"]),
        (&[("CELLBLOCK__SERVER__LISTEN", &taken_address)], &[&taken_address, "--listen"]),
        (&[free, ("CELLBLOCK__SERVER__ADMIN_LISTEN", &taken_address)], &[&taken_address, "server.admin_listen"]),
        (
            &[free, ("CELLBLOCK__ENGINE__HOST", "unix:///nowhere/docker.sock")],
            &["/nowhere/docker.sock", "Docker running"],
        ),
        (
            &[free, ("CELLBLOCK__LIMITS__SESSIONS", "many"), ("CELLBLOCK__SERVER__LISTNE", "x")],
            &["limits.sessions", "server.listne", "listen"],
        ),
    ];
    for (settings, words) in table {
        let mut command = serve(settings);
        command.env("CELLBLOCK__SERVER__DATA_DIR", data);
        let ended = tokio::time::timeout(server::NEVER, finish(command)).await;
        let (status, _, err) = ended.unwrap_or_else(|_| panic!("{settings:?}: it runs"));
        assert_ne!(status, 0, "{settings:?}");
        for word in words {
            assert!(err.contains(word), "{settings:?}: no {word:?} in {err}");
        }
    }
}

#[tokio::test]
async fn a_data_folder_has_one_server() {
    let folder = tempfile::tempdir().unwrap();
    let held = std::fs::File::create(folder.path().join("lock")).unwrap();
    held.try_lock().unwrap();
    let mut command = serve(&[("CELLBLOCK__SERVER__LISTEN", "127.0.0.1:0")]);
    command.env("CELLBLOCK__SERVER__DATA_DIR", folder.path());
    let ended = tokio::time::timeout(server::NEVER, finish(command)).await;
    let (status, _, err) = ended.expect("it runs beside the other one");
    assert!(status != 0 && err.contains("another server works with this folder"), "{status} {err}");
}

#[tokio::test]
async fn the_configuration_is_explained() {
    let mut command = Command::new(CELLBLOCK);
    command
        .args(["check-config", "--json"])
        .env("CELLBLOCK_CONFIG", "/dev/null")
        .env("CELLBLOCK__LIMITS__SESSIONS", "7");
    let (status, out, err) = finish(command).await;
    assert_eq!(status, 0, "{err}");
    let values: Value = serde_json::from_str(&out).unwrap();
    let sessions = values["values"].as_array().unwrap().iter().find(|v| v["key"] == "limits.sessions").unwrap();
    assert!(
        sessions["value"] == "7" && sessions["source"].as_str().unwrap().contains("CELLBLOCK__LIMITS__SESSIONS"),
        "{sessions}"
    );
}
