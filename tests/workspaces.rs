//! Working folders that outlive sessions: the same files and the same uid in the next one, for one session of one tenant at a time, whatever dies on the way, until
//! they are deleted. With real containers, but for what an engine has to be told to do wrong.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/bench.rs"]
mod bench;
#[path = "support/engine_fake.rs"]
mod engine_fake;
#[path = "support/server.rs"]
mod server;

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bench::{Bench, bounded};
use bollard::models::{ContainerCreateBody, HostConfig, Mount, MountType, VolumeCreateRequest};
use bollard::query_parameters::{CreateContainerOptions, RemoveVolumeOptions};
use cellblock::domain::ids::InstallationId;
use cellblock::domain::spec::SessionRequest;
use cellblock::domain::workspace::WorkspaceOffer;
use cellblock::engine::docker::{DockerEngine, DockerSettings};
use cellblock::engine::{Engine, EngineError, Pull, WorkspaceName, WorkspaceSpec};
use cellblock::service::Error;
use cellblock::service::keys::Principal;
use cellblock::session::Session;
use cellblock::session::registry::Created;
use cellblock::store::state::State;
use engine_fake::FakeEngine;
use reqwest::Method;
use serde_json::{Value, json};
use server::{Cell, NEVER, Server};

/// What this machine's engine can't enforce is accepted.
const SETTINGS: &str = "[templates.python.workspace]\nkind = \"volume\"\naccept_unenforced = true\n";

/// Users of sessions and workspaces, which no other test's have.
const FEW_USERS: &str = "[engine]\nuid_first = 64100\nuid_last = 64104\n[limits]\nsessions = 2\nworkspaces = 3\n";

fn asked(name: &str) -> Value {
    json!({"template": "python", "workspace": name})
}

async fn uid(cell: &Cell) -> Value {
    cell.json("import json, os; print(json.dumps(os.getuid()))").await
}

async fn write(cell: &Cell, path: &str, content: &str) {
    let put = cell.server.request(Method::PUT, &cell.path(&format!("/files/{path}"))).body(content.to_owned());
    let put = cell.server.send(put).await;
    assert!([200, 201].contains(&put.status), "{}", put.text);
}

async fn read(cell: &Cell, path: &str) -> String {
    let got = cell.server.get(&cell.path(&format!("/files/{path}"))).await;
    assert_eq!(got.status, 200, "{}", got.text);
    got.text
}

/// The same session at another server.
fn on(server: &Arc<Server>, cell: Cell) -> Cell {
    Cell { server: Arc::clone(server), ..cell }
}

/// Names of the volumes that are workspaces.
async fn volumes(server: &Server) -> Vec<String> {
    server.volumes().await.into_iter().filter(|name| name.starts_with("cellblock-workspace-")).collect()
}

async fn reconcile(server: &Server) {
    let done = server.post("/v1/admin/reconcile", &Value::Null).await;
    assert_eq!(done.status, 200, "{}", done.text);
}

async fn delete_and_finish(server: &Server, names: &[&str]) {
    for name in names {
        let deleted = server.delete(&format!("/v1/workspaces/{name}")).await;
        assert_eq!(deleted.status, 204, "{}", deleted.text);
    }
    assert_eq!(volumes(server).await, Vec::<String>::new());
    server.finish().await.unwrap_or_else(|left| panic!("{left}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_and_uid_stay_from_one_session_to_the_next_and_are_nobody_elses() {
    let server = Server::start_with_tenants(SETTINGS).await;
    let first = server.create(asked("mine")).await;
    assert_eq!((&first.view["workspace"], &first.view["source"]), (&json!("mine"), &json!("cold")));
    let mount = first.json("import json; print(json.dumps([l.split()[2:4] for l in open('/proc/mounts') if l.split()[1] == '/workspace']))").await;
    assert_ne!(mount[0][0], json!("tmpfs"), "it is on the engine's disk: {mount}");
    let owner = uid(&first).await;
    let made = first.run("open('by-code', 'w').write('1'); import os; os.mkdir('d')").await;
    assert_eq!(
        (&made["files"][0]["path"], &made["files"][0]["change"]),
        (&json!("by-code"), &json!("created")),
        "{made}"
    );
    write(&first, "d/by-call", "2").await;
    let stat = first
        .json("import json, os; s = os.stat('/workspace'); print(json.dumps([oct(s.st_mode), s.st_uid, s.st_gid]))")
        .await;
    assert_eq!(stat, json!(["0o40700", owner, owner]));

    // One session at a time, and whoever comes second is told which has it.
    let refused = server.post("/v1/sessions", &asked("mine")).await;
    let told = refused.problem(409, "workspace-in-use")["detail"].as_str().unwrap().to_owned();
    assert!(told.contains(&first.id), "{told}");
    let refused = server.delete("/v1/workspaces/mine").await;
    assert!(refused.problem(409, "workspace-in-use")["detail"].as_str().unwrap().contains(&first.id));
    let seen = server.get("/v1/workspaces/mine").await.json;
    assert_eq!((&seen["session"], &seen["expires_at"]), (&json!(first.id), &Value::Null), "{seen}");

    // The same name of another tenant is another workspace, and this one is not there for it.
    let foreign = |method, path: &str| server.send(server.foreign(method, path));
    foreign(Method::GET, "/v1/workspaces/mine").await.problem(404, "not-found");
    foreign(Method::DELETE, "/v1/workspaces/mine").await.problem(404, "not-found");
    assert_eq!(foreign(Method::GET, "/v1/workspaces").await.json["workspaces"], json!([]));
    let theirs = server.send(server.foreign(Method::POST, "/v1/sessions").json(&asked("mine"))).await;
    assert_eq!(theirs.status, 201, "{}", theirs.text);
    let their_path = format!("/v1/sessions/{}", theirs.json["id"].as_str().unwrap());
    let listed = foreign(Method::GET, &format!("{their_path}/files")).await;
    assert!(!listed.text.contains("by-code"), "{}", listed.text);
    assert_eq!(volumes(&server).await.len(), 2);
    assert_eq!(foreign(Method::DELETE, &their_path).await.status, 200);
    assert_eq!(foreign(Method::DELETE, "/v1/workspaces/mine").await.status, 204);

    first.delete().await;
    let seen = server.get("/v1/workspaces/mine").await.json;
    assert!(seen["session"].is_null() && seen["expires_at"].is_string(), "{seen}");
    // While nobody has it, its uid is nobody's.
    let other = server.cell().await;
    assert_ne!(uid(&other).await, owner);
    assert_eq!(other.view["workspace"], Value::Null);
    other.delete().await;
    let second = server.create(asked("mine")).await;
    assert_eq!(uid(&second).await, owner);
    assert_eq!((read(&second, "by-code").await, read(&second, "d/by-call").await), ("1".to_owned(), "2".to_owned()));
    assert_eq!(second.value("open('by-code', 'a').write('1')").await, "1", "it can be written");

    // What becomes of a name that is deleted is another workspace.
    second.delete().await;
    assert_eq!(server.delete("/v1/workspaces/mine").await.status, 204);
    server.delete("/v1/workspaces/mine").await.problem(404, "not-found");
    assert_eq!(volumes(&server).await, Vec::<String>::new(), "deleted with all that was in it");
    let third = server.create(asked("mine")).await;
    assert_eq!(third.json("import json, os; print(json.dumps(os.listdir('/workspace')))").await, json!([]));
    third.delete().await;
    delete_and_finish(&server, &["mine"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_offered_is_refused_and_says_what_is() {
    let settings = format!(
        "{SETTINGS}[templates.python.pool]\nmin = 1\nmax = 1\n[classes.default]\nworkspaces = 1\n[templates.other]\nimage = \"cellblock/python:latest\"\n{}",
        SETTINGS.replace("python", "other")
    );
    let server = Server::start(&settings).await;
    let refused = server.post("/v1/sessions", &json!({"template": "data", "workspace": "w"})).await;
    refused.problem(422, "spec-rejected");
    assert!(refused.pointers() == ["/workspace"] && refused.text.contains("data"), "{}", refused.text);
    for name in ["", "a/b", "../x", "x y", &"x".repeat(65)] {
        let refused = server.post("/v1/sessions", &asked(name)).await;
        refused.problem(422, "spec-rejected");
        assert_eq!(refused.pointers(), ["/workspace"], "{name:?}");
    }
    assert_eq!(volumes(&server).await, Vec::<String>::new());

    // One that was made ahead has memory of its own for a working folder.
    let began = Instant::now();
    while server.get("/v1/pools").await.json["pools"][0]["ready"] != json!(1) {
        assert!(began.elapsed() < NEVER, "the pool is never full");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let cell = server.create(asked("w")).await;
    assert_eq!((&cell.view["workspace"], &cell.view["source"]), (&json!("w"), &json!("cold")));
    assert_eq!(volumes(&server).await.len(), 1);
    cell.delete().await;
    let refused = server.post("/v1/sessions", &json!({"template": "other", "workspace": "w"})).await;
    refused.problem(422, "spec-rejected");
    assert!(refused.text.contains("python"), "it is of that template: {}", refused.text);
    let refused = server.post("/v1/sessions", &asked("another")).await;
    assert!(refused.problem(429, "quota-exceeded")["detail"].as_str().unwrap().contains("workspaces"));
    let usage = server.get("/v1/usage").await.json;
    assert_eq!(usage["workspaces"], json!({"limit": 1, "used": 1}));
    let page = server.get("/v1/workspaces?limit=1").await.json;
    assert_eq!((&page["workspaces"][0]["name"], &page["next_cursor"]), (&json!("w"), &Value::Null), "{page}");
    delete_and_finish(&server, &["w"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_loses_no_workspace_and_gives_its_uid_to_nobody() {
    let settings = format!("{SETTINGS}[drain]\ncontainers = \"keep\"\n{FEW_USERS}");
    let (first, pid) = Server::spawn(&settings).await;
    let held = first.create(asked("held")).await;
    write(&held, "kept", "1").await;
    let (holder, owner) = (held.id.clone(), uid(&held).await);
    let free = first.create(asked("free")).await;
    write(&free, "kept", "2").await;
    let other_owner = uid(&free).await;
    free.delete().await;
    first.kill(pid).await;

    let (second, pid) = first.spawn_again().await;
    let held = on(&second, held);
    assert_eq!((read(&held, "kept").await, uid(&held).await), ("1".to_owned(), owner.clone()), "it goes on");
    let refused = second.post("/v1/sessions", &asked("held")).await;
    assert!(refused.problem(409, "workspace-in-use")["detail"].as_str().unwrap().contains(&holder));
    // As many as there are users, which come in turn.
    for _ in 0..4 {
        let other = second.cell().await;
        assert!(![&owner, &other_owner].contains(&&uid(&other).await), "both are reserved");
        other.delete().await;
    }
    let free = second.create(asked("free")).await;
    assert_eq!((read(&free, "kept").await, uid(&free).await), ("2".to_owned(), other_owner.clone()));

    // Killed while one is being made: it is there, whole, or not at all.
    free.delete().await;
    let (making, body) = (Arc::clone(&second), asked("making"));
    let create = cellblock::task::spawn("create", async move {
        drop(making.request(Method::POST, "/v1/sessions").json(&body).send().await);
    });
    let began = Instant::now();
    while volumes(&second).await.len() < 3 {
        assert!(began.elapsed() < NEVER, "it is never made");
    }
    second.kill(pid).await;
    let _ = create.await;
    let (third, _) = second.spawn_again().await;
    // A volume of this instance that nobody knows, as a lost database would leave it, goes; those that are known stay.
    let stray = WorkspaceName::new(&third.instance, uuid::Uuid::now_v7().into()).as_str().to_owned();
    let labels = [("instance", third.instance.as_str()), ("role", "workspace"), ("uid", "64999")];
    let labels = labels.map(|(name, value)| (format!("io.cellblock.{name}"), value.to_owned())).into();
    let request =
        VolumeCreateRequest { name: Some(stray.clone()), labels: Some(labels), ..VolumeCreateRequest::default() };
    third.docker.create_volume(request).await.unwrap();
    reconcile(&third).await;
    let there = volumes(&third).await;
    assert!(!there.contains(&stray) && there.len() >= 2, "{there:?}");
    let made = third.create(asked("making")).await;
    write(&made, "x", "1").await;
    made.delete().await;
    let held = on(&third, held);
    assert_eq!(read(&held, "kept").await, "1");
    held.delete().await;
    leave_a_helper(&third).await;
    delete_and_finish(&third, &["held", "free", "making"]).await;
}

/// A server that is killed while a workspace is being made leaves a container that has its volume.
async fn leave_a_helper(server: &Server) {
    let labels = [("instance", server.instance.as_str()), ("role", "workspace-helper")];
    let labels = labels.map(|(name, value)| (format!("io.cellblock.{name}"), value.to_owned())).into();
    let mount = Mount {
        typ: Some(MountType::VOLUME),
        source: Some(volumes(server).await.remove(0)),
        target: Some("/mnt".to_owned()),
        ..Mount::default()
    };
    let body = ContainerCreateBody {
        image: Some("cellblock/python:latest".to_owned()),
        labels: Some(labels),
        host_config: Some(HostConfig { mounts: Some(vec![mount]), ..HostConfig::default() }),
        ..ContainerCreateBody::default()
    };
    server.docker.create_container(None::<CreateContainerOptions>, body).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_nobody_has_used_for_its_age_goes_and_no_other() {
    let server = Server::start(&format!("{SETTINGS}max_age = \"2s\"\n")).await;
    let used = server.create(asked("used")).await;
    let left = server.create(asked("left")).await;
    let page = server.get("/v1/workspaces?limit=1").await.json;
    let after = page["next_cursor"].as_str().unwrap();
    let next = server.get(&format!("/v1/workspaces?limit=1&cursor={after}")).await.json;
    let names = [&page, &next].map(|page| page["workspaces"][0]["name"].clone());
    assert_eq!((names, &next["next_cursor"]), ([json!("used"), json!("left")], &Value::Null));
    left.delete().await;
    tokio::time::sleep(Duration::from_millis(2100)).await;
    reconcile(&server).await;
    server.get("/v1/workspaces/left").await.problem(404, "not-found");
    assert_eq!(server.get("/v1/workspaces/used").await.status, 200);
    assert_eq!(volumes(&server).await.len(), 1);
    let audit = server.get("/v1/audit?action=expire_workspace").await.json;
    assert_eq!(audit["events"][0]["target"], json!("/v1/workspaces/left"), "{audit}");
    used.delete().await;
    delete_and_finish(&server, &["used"]).await;
}

/// What code leaves in its workspace is there for the next session of the same tenant, which runs it as its own: it can make that one's kernels start strangely, and
/// no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_content_is_its_tenants_own_problem_only() {
    let server = Server::start(SETTINGS).await;
    let first = server.create(asked("w")).await;
    let planted = first
        .run("\
import os, site, subprocess, sys
os.symlink('/etc', 'files'); os.symlink('/workspace/../etc/passwd', 'passwd'); os.symlink('loop', 'loop'); os.mkfifo('fifo')
home = site.getusersitepackages(); os.makedirs(home)
open(home + '/usercustomize.py', 'w').write('import builtins; builtins.planted = True')
open(home + '/planted.pth', 'w').write('import builtins; builtins.planted_too = True')
for name in ['.bashrc', '.profile', 'sitecustomize.py']: open(name, 'w').write('planted = True')
os.makedirs('.ipython/profile_default/startup'); open('.ipython/profile_default/startup/00.py', 'w').write('planted_by_startup = True')
open('shell', 'wb').write(open('/bin/sh', 'rb').read()); os.chmod('shell', 0o6755)
os.chmod('/workspace', 0o777)
")
        .await;
    assert_eq!(planted["status"], json!("ok"), "{planted}");
    first.delete().await;

    let second = server.create(asked("w")).await;
    for path in ["files/passwd", "passwd", "loop", "fifo"] {
        let got = server.get(&second.path(&format!("/files/{path}"))).await;
        assert!((400..500).contains(&got.status) && !got.text.contains("root:"), "{path}: {} {}", got.status, got.text);
    }
    let put = server.send(server.request(Method::PUT, &second.path("/files/files/planted")).body("x")).await;
    assert!((400..500).contains(&put.status), "{}", put.text);
    let seen = second
        .json(
            "import json, os, subprocess\n\
             s = os.stat('/workspace')\n\
             ids = subprocess.run(['./shell', '-c', 'id -u; id -g; grep CapEff /proc/self/status'], capture_output=True, text=True).stdout.split()\n\
             def tried(f):\n    try:\n        f()\n        return 'done'\n    except OSError as e:\n        return type(e).__name__\n\
             print(json.dumps({'mode': oct(s.st_mode), 'ids': ids, 'uid': os.getuid(), 'startup': 'planted_by_startup' in globals(),\n\
             'mknod': tried(lambda: os.mknod('dev', 0o60660, os.makedev(8, 0))), 'root': tried(lambda: open('/etc/planted', 'w'))}))",
        )
        .await;
    let owner = seen["uid"].to_string();
    assert_eq!(seen["mode"], json!("0o40700"), "it is its owner's again");
    assert_eq!(seen["ids"], json!([owner, owner, "CapEff:", "0000000000000000"]), "a setuid file gives nothing");
    assert_eq!((&seen["mknod"], &seen["root"]), (&json!("PermissionError"), &json!("OSError")), "{seen}");
    assert_eq!(seen["startup"], json!(false), "what IPython starts with is not looked for in the workspace");
    second.delete().await;
    delete_and_finish(&server, &["w"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_that_is_not_enforced_is_refused_unless_that_is_accepted() {
    let refusal = |settings: &str| {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("test.toml");
        let data = folder.path().join("data");
        std::fs::write(&file, format!("{settings}[server]\ndata_dir = {data:?}\n")).unwrap();
        let inputs = cellblock::config::Inputs { files: vec![file], ..cellblock::config::Inputs::default() };
        cellblock::config::load(&inputs).err().map(|mistakes| mistakes.to_string()).unwrap_or_default()
    };
    let without = "[templates.python.workspace]\nkind = \"volume\"\n";
    let told = refusal(without);
    assert!(told.contains("templates.python.workspace.quota") && told.contains("accept_unenforced"), "{told}");
    assert_eq!(
        refusal("[templates.python.workspace]\nkind = \"volume\"\nquota = \"1GiB\"\n"),
        "",
        "the engine decides"
    );

    // Whether this machine's engine enforces one is tried here too.
    let settings = DockerSettings::new("quota-trial");
    let enforces = cellblock::engine::docker::trial::Host::connect(settings)
        .await
        .unwrap()
        .lacks_quotas()
        .await
        .unwrap()
        .is_none();
    let (home, config) = server::configuration(&format!("{without}quota = \"8MiB\"\n"));
    let started = Server::try_serve(config, Arc::new(home)).await;
    match (enforces, started) {
        (true, Ok(server)) => {
            let cell = server.create(asked("w")).await;
            let ran = cell.run("open('big', 'wb').write(bytes(1 << 24))").await;
            assert_eq!(ran["error"]["name"], json!("OSError"), "{ran}");
            cell.delete().await;
            delete_and_finish(&server, &["w"]).await;
        }
        (false, Err(told)) => {
            assert!(told.contains("\"python\"") && told.contains("workspace.accept_unenforced = true"), "{told}");
        }
        (enforces, started) => panic!("enforces: {enforces}, starts: {}", started.is_ok()),
    }
    let engine = DockerEngine::connect(DockerSettings::new("quota-trial")).await.unwrap();
    if !enforces {
        // Nobody had accepted it when the engine was asked.
        let asked = WorkspaceSpec { quota_bytes: Some(8 << 20), ..spec("quota-trial", "") };
        let refused = engine.ensure_workspace(&asked).await;
        let Err(EngineError::Rejected { detail, .. }) = &refused else { panic!("{refused:?}") };
        assert!(detail.contains("workspace.accept_unenforced = true"), "{detail}");
    }
    assert_eq!(engine.list_workspaces().await, Ok(vec![]));
}

fn spec(instance: &str, image: &str) -> WorkspaceSpec {
    let name = WorkspaceName::new(instance, uuid::Uuid::now_v7().into());
    WorkspaceSpec { name, image: image.to_owned(), quota_bytes: None }
}

#[tokio::test]
async fn two_instances_on_one_engine_give_no_uid_to_two_workspaces() {
    let connect = async |instance: &str, uids: RangeInclusive<u32>| {
        DockerEngine::connect(DockerSettings { uids, ..DockerSettings::new(instance) }).await.unwrap()
    };
    let (one, other) = (connect("twin-one", 64_110..=64_111).await, connect("twin-other", 64_110..=64_111).await);
    let image = one.resolve_image("cellblock/python:latest", Pull::Never).await.unwrap().id;
    let (a, b, c) = (spec("twin-one", &image), spec("twin-other", &image), spec("twin-other", &image));
    let made = [one.ensure_workspace(&a).await.unwrap(), other.ensure_workspace(&b).await.unwrap()];
    assert_ne!(made[0].uid, made[1].uid, "neither knew of the other when it began");
    let refused = other.ensure_workspace(&c).await;
    assert!(matches!(refused, Err(EngineError::Unavailable { .. })), "both are taken: {refused:?}");

    // The next process knows its own, which are free again when they are gone.
    let one = connect("twin-one", 64_110..=64_111).await;
    one.remove_workspace(&a.name).await.unwrap();
    let again = spec("twin-one", &image);
    assert_eq!(one.ensure_workspace(&again).await.unwrap().uid, made[0].uid);
    one.remove_workspace(&again.name).await.unwrap();
    other.remove_workspace(&b.name).await.unwrap();
    assert_eq!(other.list_workspaces().await, Ok(vec![]));
}

#[tokio::test]
async fn a_long_run_of_another_instances_workspaces_is_passed_at_once() {
    let settings = DockerSettings { uids: 64_112..=64_211, ..DockerSettings::new("twin-late") };
    let engine = DockerEngine::connect(settings).await.unwrap();
    let image = engine.resolve_image("cellblock/python:latest", Pull::Never).await.unwrap().id;
    let docker = bollard::Docker::connect_with_defaults().unwrap();
    let run: Vec<_> = (64_112..64_211u32).map(|uid| (spec("twin-early", "").name.to_string(), uid)).collect();
    for (name, uid) in &run {
        let labels = [("instance", "twin-early"), ("role", "workspace"), ("uid", &uid.to_string())];
        let labels = labels.map(|(name, value)| (format!("io.cellblock.{name}"), value.to_owned())).into();
        let (name, labels) = (Some(name.clone()), Some(labels));
        docker.create_volume(VolumeCreateRequest { name, labels, ..VolumeCreateRequest::default() }).await.unwrap();
    }
    let asked = spec("twin-late", &image);
    let made = engine.ensure_workspace(&asked).await;
    for (name, _) in &run {
        docker.remove_volume(name, None::<RemoveVolumeOptions>).await.unwrap();
    }
    engine.remove_workspace(&asked.name).await.unwrap();
    assert_eq!(made.map(|made| made.uid), Ok(64_211));
}

/// On an engine that is told what to do wrong.
fn with_workspaces(engine: &Arc<FakeEngine>, state: Option<State>) -> Bench {
    Bench::on(Arc::clone(engine), state, |_, template| {
        template.workspace = Some(WorkspaceOffer { max_age: NEVER, quota_bytes: None });
    })
}

async fn session(bench: &Bench, name: &str) -> Result<Session, Error> {
    let request = SessionRequest { workspace: Some(name.to_owned()), ..SessionRequest::default() };
    match bounded(bench.service.create_session(&bench.who, &request, true, None)).await? {
        Created::New(session) | Created::Reused(session) => Ok(session),
    }
}

#[tokio::test]
async fn what_was_deleted_is_removed_when_the_engine_does_it_and_what_nobody_knows_too() {
    let engine = Arc::new(FakeEngine::new(bench::INSTANCE));
    let folder = tempfile::tempdir().unwrap();
    let (state, _) = State::open(folder.path(), None).unwrap();
    let first = with_workspaces(&engine, Some(state));
    let made = session(&first, "w").await.unwrap();
    first.service.delete_session(&first.who, made.id).await.unwrap();
    engine.faults(|faults| faults.workspace_removals_fail = 1);
    first.service.delete_workspace(&first.who, "w").await.unwrap();
    assert_eq!(engine.list_workspaces().await.unwrap().len(), 1, "accepted, and not done yet");
    assert_eq!(first.service.workspace(&first.who, "w").unwrap_err(), Error::NotFound("workspace"));
    first.registry.settle().await;
    drop(first);

    // The next process does it.
    let (state, left) = State::open(folder.path(), None).unwrap();
    let second = with_workspaces(&engine, Some(state));
    second.registry.take_over(left);
    let stray = WorkspaceName::new(bench::INSTANCE, uuid::Uuid::now_v7().into());
    engine.leave_workspace(stray.clone());
    let known = session(&second, "w").await.unwrap();
    let report = second.reconciler().round().await.unwrap();
    assert_eq!(report.swept, [stray.to_string()]);
    assert_eq!(engine.list_workspaces().await.unwrap().len(), 1, "the one that a session has");
    assert_eq!(second.registry.workspaces().all(), 1);
    second.service.delete_session(&second.who, known.id).await.unwrap();
}

#[tokio::test]
async fn a_start_that_fails_gives_the_workspace_back_and_one_that_was_never_made_goes() {
    let engine = Arc::new(FakeEngine::new(bench::INSTANCE));
    let bench = with_workspaces(&engine, None);
    engine.faults(|faults| faults.ensure_fails = true);
    assert!(session(&bench, "w").await.is_err());
    engine.faults(|faults| faults.ensure_fails = false);
    let made = session(&bench, "w").await.unwrap();
    let refused = session(&bench, "w").await.unwrap_err();
    assert_eq!(refused, Error::WorkspaceInUse(Some(made.id)));
    bench.service.delete_session(&bench.who, made.id).await.unwrap();

    engine.faults(|faults| faults.unreachable = true);
    assert!(session(&bench, "v").await.is_err());
    engine.faults(|faults| faults.unreachable = false);
    bounded(bench.reconciler().round()).await.unwrap();
    let there: Vec<_> = bench.service.list_workspaces(&bench.who, None).unwrap();
    assert_eq!(there.iter().map(|view| view.record.name.as_str()).collect::<Vec<_>>(), ["w"]);
}

#[tokio::test]
async fn a_delete_removes_its_own_and_one_that_is_not_answered_for_keeps_none_of_the_others() {
    let engine = Arc::new(FakeEngine::new(bench::INSTANCE));
    let bench = with_workspaces(&engine, None);
    for name in ["v", "w", "x"] {
        let made = session(&bench, name).await.unwrap();
        bench.service.delete_session(&bench.who, made.id).await.unwrap();
    }
    engine.faults(|faults| faults.workspace_removals_fail = 2);
    let removals = || engine.asked("remove a workspace");
    for (at, name) in ["v", "w", "x"].iter().enumerate() {
        bench.service.delete_workspace(&bench.who, name).await.unwrap();
        assert_eq!(removals(), at + 1, "who deletes one does not wait for those of others");
    }
    assert_eq!(engine.list_workspaces().await.unwrap().len(), 2);
    engine.faults(|faults| faults.workspace_removals_fail = 1);
    let reconciler = bench.reconciler();
    bounded(reconciler.round()).await.unwrap();
    assert_eq!(engine.list_workspaces().await.unwrap().len(), 1, "the second is removed all the same");
    bounded(reconciler.round()).await.unwrap();
    assert_eq!(bench.registry.workspaces().all(), 0);
}

#[tokio::test]
async fn the_name_of_an_instance_is_not_free_while_it_has_workspaces() {
    let engine = Arc::new(FakeEngine::new(bench::INSTANCE));
    let bench = with_workspaces(&engine, None);
    let made = session(&bench, "w").await.unwrap();
    bench.service.delete_session(&bench.who, made.id).await.unwrap();
    let other = InstallationId::from_uuid(uuid::Uuid::from_u128(2));
    bounded(bench.reconciler().clear()).await.unwrap();
    assert!(matches!(engine.claim(other).await, Err(EngineError::Claimed { .. })), "it would take them for nobody's");
    bench.service.delete_workspace(&bench.who, "w").await.unwrap();
    bounded(bench.reconciler().clear()).await.unwrap();
    assert_eq!(engine.claim(other).await, Ok(()));
}

#[tokio::test]
async fn a_key_is_told_of_no_template_that_it_does_not_allow() {
    let engine = Arc::new(FakeEngine::new(bench::INSTANCE));
    let bench = with_workspaces(&engine, None);
    let made = session(&bench, "w").await.unwrap();
    bench.service.delete_session(&bench.who, made.id).await.unwrap();
    let narrow = Principal { templates: Some(Arc::from(["u".to_owned()])), ..bench.who.clone() };
    let request =
        SessionRequest { template: Some("u".to_owned()), workspace: Some("w".to_owned()), ..SessionRequest::default() };
    for (who, is_told) in [(&bench.who, true), (&narrow, false)] {
        let refused = bounded(bench.service.create_session(who, &request, true, None)).await.unwrap_err();
        let Error::SpecRejected(fields) = &refused else { panic!("{refused:?}") };
        assert_eq!(fields[0].message.contains("\"t\""), is_told, "{fields:?}");
    }
    assert_eq!(bench.service.workspace(&narrow, "w").unwrap_err(), Error::NotFound("workspace"));
}
