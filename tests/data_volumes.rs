//! Data that operators put onto the engine: whole or not at all, the same for every session, and nothing that code inside can change. With real containers.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use cellblock::app::data;
use cellblock::config::Config;
use reqwest::Method;
use serde_json::{Value, json};
use server::Server;

const SETTINGS: &str = "[templates.python]\ndata = [{ name = \"maps\", path = \"/mnt/maps\" }]\n";

/// A folder as an operator may have it: odd names, rights of all kinds, a link, a program.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir_all(at("deep/er")).unwrap();
    for (name, content, mode) in [
        ("private", "for nobody", 0o600),
        ("a name\nof \u{1f600}", "odd", 0o644),
        ("deep/er/program", "#!/bin/sh\necho it runs as $(id -u)\n", 0o6700),
    ] {
        std::fs::write(at(name), content).unwrap();
        std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(mode)).unwrap();
    }
    std::fs::set_permissions(at("deep"), std::fs::Permissions::from_mode(0o700)).unwrap();
    symlink("../private", at("deep/link")).unwrap();
    folder
}

async fn import(config: &Config, folder: &Path) -> data::Imported {
    data::import(config, folder, "maps").await.unwrap_or_else(|error| panic!("{error}"))
}

/// The program with this configuration: what it prints, what it complains of, and its exit code.
fn program(config: &Config, arguments: &[&str]) -> (String, String, i32) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
    command.args(arguments).env_clear();
    for (key, value) in [
        ("engine.instance", config.engine.instance.clone()),
        ("server.data_dir", config.server.data_dir.display().to_string()),
        ("server.listen", "127.0.0.1:0".to_owned()),
        ("guest.binary", config.guest.binary.as_ref().unwrap().display().to_string()),
    ] {
        command.arg("--set").arg(format!("{key}={value}"));
    }
    let file = config.server.data_dir.with_file_name("test.toml");
    let done = command.arg("--config").arg(file).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&done.stdout), text(&done.stderr), done.status.code().unwrap_or(-1))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_session_reads_the_data_and_none_can_change_it() {
    let (home, config) = server::configuration(SETTINGS);
    let first = folder();
    let imported = import(&config, first.path()).await;
    assert_eq!(imported.packed.files, 3);
    let server = Server::try_serve(config.clone(), Arc::new(home)).await.unwrap();
    let template = server.get("/v1/templates").await.json["templates"]
        .as_array()
        .unwrap()
        .iter()
        .find(|template| template["name"] == "python")
        .cloned()
        .unwrap();
    assert_eq!(template["data"], json!([{ "name": "maps", "path": "/mnt/maps" }]));

    let cell = server.create(json!({ "template": "python" })).await;
    let found = cell
        .json(
            "import json, os, stat, subprocess\n\
             def see(p):\n    s = os.lstat(p)\n    return [oct(stat.S_IMODE(s.st_mode)), s.st_uid, s.st_gid]\n\
             top = '/mnt/maps/'\n\
             print(json.dumps({'names': sorted(os.listdir(top)), 'private': open(top + 'private').read(), 'link': open(top + 'deep/link').read(),\n\
             'seen': [see(top + n) for n in ['private', 'deep', 'deep/er/program']],\n\
             'ran': subprocess.run([top + 'deep/er/program'], capture_output=True, text=True).stdout, 'uid': os.getuid()}))",
        )
        .await;
    assert_eq!(found["names"], json!(["a name\nof \u{1f600}", "deep", "private"]));
    assert_eq!((&found["private"], &found["link"]), (&json!("for nobody"), &json!("for nobody")));
    assert_eq!(found["seen"], json!([["0o444", 0, 0], ["0o555", 0, 0], ["0o555", 0, 0]]), "root's, and no setuid bit");
    assert_eq!(found["ran"], json!(format!("it runs as {}\n", found["uid"])));

    let refused = cell
        .json(
            "import json, os\n\
             def tried(f):\n    try:\n        f()\n        return 'done'\n    except OSError as e:\n        return type(e).__name__\n\
             t = '/mnt/maps/'\n\
             print(json.dumps([tried(f) for f in [lambda: open(t + 'new', 'w'), lambda: open(t + 'private', 'a'), lambda: os.remove(t + 'private'),\n\
             lambda: os.chmod(t + 'private', 0o777), lambda: os.rename(t + 'private', t + 'x'), lambda: os.mkdir(t + 'deep/x'),\n\
             lambda: os.symlink('/etc', t + 'etc'), lambda: os.link(t + 'private', '/workspace/x'), lambda: os.mknod(t + 'dev')]]))",
        )
        .await;
    assert!(refused.as_array().unwrap().iter().all(|outcome| outcome != "done"), "{refused}");

    // The next content is for the next session; whoever has the first one keeps it.
    let second = tempfile::tempdir().unwrap();
    std::fs::write(second.path().join("private"), "another").unwrap();
    let again = import(&config, second.path()).await;
    assert_ne!(imported.volume.version, again.volume.version);
    let read = "open('/mnt/maps/private').read()";
    assert_eq!(cell.value(read).await, "'for nobody'");
    let other = server.create(json!({ "template": "python" })).await;
    assert_eq!(other.value(read).await, "'another'");
    assert!(server.volumes().await.iter().any(|name| name.contains(&imported.volume.version)), "in use");
    cell.delete().await;
    // Any import or round of the server removes what nobody has.
    import(&config, second.path()).await;
    let volumes = server.volumes().await;
    assert!(!volumes.iter().any(|name| name.contains(&imported.volume.version)), "{volumes:?}");
    other.delete().await;
    server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_template_without_its_data_is_refused_and_says_what_to_do() {
    let (home, config) = server::configuration(SETTINGS);
    let remedy = "cellblock data import DIR maps";
    let refused = Server::try_serve(config.clone(), Arc::new(home)).await.err().unwrap();
    assert!(refused.contains(remedy) && refused.contains("\"python\""), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_imports_lists_and_removes() {
    let (home, config) = server::configuration(SETTINGS);
    let (_, complaint, code) = program(&config, &["check-config"]);
    assert!(code == 1 && complaint.contains("cellblock data import DIR maps"), "{code} {complaint}");

    let from = folder();
    let path = from.path().display().to_string();
    let (said, complaint, code) = program(&config, &["data", "import", &path, "maps"]);
    assert_eq!((code, complaint.as_str()), (0, ""), "{said}");
    assert!(said.starts_with("maps: 3 files"), "{said}");
    assert_eq!(program(&config, &["check-config"]).2, 0);
    let (listed, _, code) = program(&config, &["--json", "data", "list"]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!((code, &listed[0]["name"], listed.as_array().unwrap().len()), (0, &json!("maps"), 1));

    // What can't be imported leaves what was there, and nothing beside it.
    symlink("/etc/passwd", from.path().join("out")).unwrap();
    for (arguments, word) in [
        (["data", "import", &path, "maps"], "leads out"),
        (["data", "import", "/nowhere", "maps"], "No such file"),
        (["data", "import", &path, "../maps"], "not the name"),
    ] {
        let (_, complaint, code) = program(&config, &arguments);
        assert!(code == 125 && complaint.contains(word), "{arguments:?}: {code} {complaint}");
    }
    let (again, _, _) = program(&config, &["--json", "data", "list"]);
    assert_eq!(serde_json::from_str::<Value>(&again).unwrap(), listed);

    let server = Server::try_serve(config.clone(), Arc::new(home)).await.unwrap();
    assert_eq!(
        server.volumes().await.iter().filter(|name| name.contains("-data-")).count(),
        2,
        "one, and that it is whole"
    );
    let (_, warning, code) = program(&config, &["data", "remove", "maps"]);
    assert!(code == 0 && warning.contains("python"), "{code} {warning}");
    let (_, complaint, code) = program(&config, &["data", "remove", "maps"]);
    assert!(code == 125 && complaint.contains("does not exist"), "{code} {complaint}");
    let late = server.send(server.request(Method::POST, "/v1/sessions").json(&json!({ "template": "python" }))).await;
    assert!(late.status >= 400 && late.text.contains("data or a workspace that it names"), "{}", late.text);
    server.finish().await.unwrap();
}
