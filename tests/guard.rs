//! The guard: it keeps the contract of an engine, gives hostile callers nothing, and may die and come back under a whole server.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/engine_docker.rs"]
mod engine_docker;
#[path = "support/engine_fake.rs"]
mod engine_fake;
#[path = "support/engine_suite.rs"]
mod engine_suite;
#[path = "support/server.rs"]
mod server;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bollard::models::ContainerCreateBody;
use bollard::query_parameters::CreateContainerOptionsBuilder;
use cellblock::domain::ids::SessionId;
use cellblock::domain::spec::{MIB, Resources};
use cellblock::engine::guard::{Guard, GuardEngine, Needs, Permitted, Policy, bind};
use cellblock::engine::{ByteStream, CellName, CellSpec, Engine, EngineError, Pull, WorkspaceName, WorkspaceSpec};
use cellblock::task;
use engine_docker::{Bench, IMAGE, on_docker, real_guest, scripted_guest};
use engine_fake::FakeEngine;
use engine_suite::{Subject, echo, secret};
use serde_json::{Value, json};
use server::{Cell, NEVER, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// An image that the engine has, and that no template names.
const UNLISTED: &str = "cellblock/base:latest";

/// A guard in this process before a bench's engine, which ends with this.
struct Guarded {
    engine: GuardEngine,
    socket: PathBuf,
    stop: CancellationToken,
    _folder: tempfile::TempDir,
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn policy(bench: &Bench) -> Policy {
    let most = Resources { memory_bytes: 512 * MIB, ..engine_suite::resources() };
    let permitted = |image: &str| {
        let (image, runtime) = (image.to_owned(), String::new());
        Permitted { image, runtime, most, data: vec![], workspace: Some(None) }
    };
    // The second one is what the suite looks for in vain.
    let with_data = Permitted { data: vec![engine_suite::data()], ..permitted(IMAGE) };
    policy_of(&bench.instance, vec![permitted(IMAGE), permitted("cellblock-no-such-image:none"), with_data])
}

fn policy_of(instance: &str, templates: Vec<Permitted>) -> Policy {
    Policy {
        instance: instance.to_owned(),
        templates,
        pull: Pull::Never,
        cells: 4,
        cpu_millis: None,
        memory_bytes: None,
        workspaces: 2,
        creates_per_minute: 1000,
    }
}

fn own_user() -> u32 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").unwrap().uid()
}

async fn guarded_for(bench: &Bench, policy: Policy, users: Vec<u32>) -> Result<Guarded, EngineError> {
    guarded(Arc::new(bench.engine.clone()), policy, users).await
}

async fn guarded(engine: Arc<dyn Engine>, policy: Policy, users: Vec<u32>) -> Result<Guarded, EngineError> {
    let instance = policy.instance.clone();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("of its own").join("guard.sock");
    let listener = bind(&socket, false).await.unwrap();
    let guard = Guard::new(engine, policy).await.unwrap();
    let stop = CancellationToken::new();
    task::spawn("guard", Arc::new(guard).serve(listener, users, stop.clone()));
    let stopped = stop.clone().drop_guard();
    let engine = GuardEngine::connect(socket.clone(), &instance).await?;
    stopped.disarm();
    Ok(Guarded { engine, socket, stop, _folder: folder })
}

async fn guarded_by(bench: &Bench, policy: Policy) -> Guarded {
    guarded_for(bench, policy, vec![own_user()]).await.expect("a guard")
}

fn subject<'a>(
    bench: &'a Bench,
    guarded: &'a Guarded,
    kill: &'a (dyn Fn(CellName) -> futures_util::future::BoxFuture<'static, ()> + Sync),
) -> Subject<'a> {
    Subject { engine: &guarded.engine, operator: &bench.engine, instance: &bench.instance, image: IMAGE, kill }
}

async fn spec(bench: &Bench, guarded: &Guarded) -> CellSpec {
    let kill = bench.killer();
    engine_suite::spec(&subject(bench, guarded, &kill)).await
}

#[tokio::test]
async fn the_contract_holds_through_a_guard() {
    for guest in [real_guest(), scripted_guest()] {
        on_docker(guest, |bench| async move {
            let guarded = guarded_by(&bench, policy(&bench)).await;
            let kill = bench.killer();
            engine_suite::run(&subject(&bench, &guarded, &kill)).await;
        })
        .await;
    }
}

#[tokio::test]
async fn a_stream_that_is_dropped_is_closed_whole_behind_the_guard_too() {
    on_docker(scripted_guest(), |bench| async move {
        let guarded = guarded_by(&bench, policy(&bench)).await;
        let cell = spec(&bench, &guarded).await;
        let secret = secret();
        let mut stream = guarded.engine.ensure(&cell).await.expect("a cell");
        echo(&mut stream, secret).await;
        for round in 0..8 {
            match round % 4 {
                // Output in flight, of which nothing is read, or a part.
                0 => stream.write_all(b"flood 3\n").await.unwrap(),
                1 => {
                    stream.write_all(b"flood 3\n").await.unwrap();
                    stream.read_exact(&mut vec![0; 10_000]).await.unwrap();
                }
                // Nothing more is said, and then it is dropped.
                2 => stream.shutdown().await.unwrap(),
                _ => {}
            }
            drop(stream);
            let link = tokio::time::timeout(Duration::from_secs(3), guarded.engine.link(&cell.name)).await;
            stream = link.expect("a link answers at once").expect("a link after one that was dropped");
            echo(&mut stream, secret).await;
        }
        // Input that the cell does not take must not keep the stream either: a frozen one reads nothing.
        bench.engine.pause(&cell.name).await.expect("a pause");
        let block = vec![0; 1 << 20];
        let full = async { while stream.write_all(&block).await.is_ok() {} };
        assert!(tokio::time::timeout(Duration::from_millis(500), full).await.is_err(), "it takes everything");
        drop(stream);
        bench.engine.resume(&cell.name).await.expect("a resume");
        let link = tokio::time::timeout(Duration::from_secs(3), guarded.engine.link(&cell.name)).await;
        drop(link.expect("a link answers at once").expect("a link after one that was stuck"));
        guarded.engine.remove(&cell.name).await.expect("a removal");
    })
    .await;
}

#[tokio::test]
async fn a_guard_that_ends_closes_its_streams_and_leaves_the_cells() {
    on_docker(scripted_guest(), |bench| async move {
        let guarded = guarded_by(&bench, policy(&bench)).await;
        let cell = spec(&bench, &guarded).await;
        let mut stream = guarded.engine.ensure(&cell).await.expect("a cell");
        echo(&mut stream, secret()).await;
        guarded.stop.cancel();
        let end = tokio::time::timeout(NEVER, stream.read(&mut [0])).await.expect("the end of the stream");
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
        let refused = guarded.engine.link(&cell.name).await.err();
        assert!(matches!(refused, Some(EngineError::Unavailable { .. })), "{refused:?}");
        // The next one has it all.
        let next = guarded_by(&bench, policy(&bench)).await;
        let mut stream = next.engine.link(&cell.name).await.expect("a link");
        echo(&mut stream, secret()).await;
        next.engine.remove(&cell.name).await.expect("a removal");
    })
    .await;
}

/// MiB a second out of a cell and into it.
async fn speed(mut stream: ByteStream) -> (f64, f64) {
    const MEBIBYTES: usize = 256;
    echo(&mut stream, secret()).await;
    let began = Instant::now();
    stream.write_all(format!("flood {MEBIBYTES}\n").as_bytes()).await.unwrap();
    let (mut left, mut buffer) = (MEBIBYTES << 20, vec![0; 256 * 1024]);
    while left > 0 {
        left -= stream.read(&mut buffer).await.unwrap();
    }
    let out = MEBIBYTES as f64 / began.elapsed().as_secs_f64();
    let began = Instant::now();
    stream.write_all(format!("swallow {MEBIBYTES}\n").as_bytes()).await.unwrap();
    let block = vec![0; 1 << 20];
    for _ in 0..MEBIBYTES {
        stream.write_all(&block).await.unwrap();
    }
    stream.read_exact(&mut [0; 4]).await.unwrap();
    (out, MEBIBYTES as f64 / began.elapsed().as_secs_f64())
}

/// Microseconds for a marker to come back: the median of many.
async fn round_trip(stream: &mut ByteStream) -> u128 {
    let secret = secret();
    let mut took = Vec::new();
    for _ in 0..300 {
        let began = Instant::now();
        echo(stream, secret).await;
        took.push(began.elapsed().as_micros());
    }
    took.sort_unstable();
    took[took.len() / 2]
}

/// What the guard's copying costs; the figures are printed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_through_the_guard_is_fast_enough_for_files() {
    on_docker(scripted_guest(), |bench| async move {
        let guarded = guarded_by(&bench, policy(&bench)).await;
        let cell = spec(&bench, &guarded).await;
        let mut direct = bench.engine.ensure(&cell).await.expect("a cell");
        let there_and_back = round_trip(&mut direct).await;
        let (out, into) = speed(direct).await;
        println!("direct: out {out:.0} MiB/s, in {into:.0} MiB/s, there and back {there_and_back} µs");
        let mut through = guarded.engine.link(&cell.name).await.expect("a link");
        let there_and_back = round_trip(&mut through).await;
        let (out, into) = speed(through).await;
        println!("through the guard: out {out:.0} MiB/s, in {into:.0} MiB/s, there and back {there_and_back} µs");
        assert!(out > 20.0 && into > 20.0, "out {out:.0} MiB/s, in {into:.0} MiB/s");
        guarded.engine.remove(&cell.name).await.expect("a removal");
    })
    .await;
}

/// Says something to the guard, and answers with what it says.
async fn say(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).await.expect("a connection");
    // A guard that has heard enough closes while we write.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(NEVER, stream.read_to_end(&mut answer)).await.expect("the end of the connection");
    String::from_utf8_lossy(answer.get(4..).unwrap_or_default()).into_owned()
}

fn frame(text: &str) -> Vec<u8> {
    let mut frame = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    frame.extend_from_slice(text.as_bytes());
    frame
}

/// A cell as it crosses the socket.
fn as_json(cell: &CellSpec) -> Value {
    let of = &cell.resources;
    json!({"name": cell.name.as_str(), "session": cell.session.to_string(), "image": cell.image, "runtime": cell.runtime,
        "cpu_millis": of.cpu_millis, "memory_bytes": of.memory_bytes, "disk_bytes": of.disk_bytes,
        "tmp_bytes": of.tmp_bytes, "pids": of.pids, "open_files": of.open_files})
}

/// A guard before an engine without containers, which counts what it is asked.
async fn before_a_fake(change: impl FnOnce(&mut Policy)) -> (Guarded, Arc<FakeEngine>) {
    let most = engine_suite::resources();
    let (image, runtime) = (engine_fake::IMAGE.to_owned(), String::new());
    let listed = Permitted { image, runtime, most, data: vec![], workspace: Some(Some(MIB)) };
    let mut policy = policy_of("fake", vec![listed]);
    change(&mut policy);
    let fake = Arc::new(FakeEngine::new("fake"));
    let engine: Arc<dyn Engine> = Arc::<FakeEngine>::clone(&fake);
    (guarded(engine, policy, vec![own_user()]).await.expect("a guard"), fake)
}

fn fake_cell() -> CellSpec {
    let session = SessionId::from_uuid(Uuid::now_v7());
    let (name, image) = (CellName::new("fake", session, 0), "sha256:fake".to_owned());
    let resources = engine_suite::resources();
    CellSpec { name, session, image, runtime: String::new(), resources, data: vec![], workspace: None }
}

fn unavailable<T>(outcome: Result<T, EngineError>, word: &str) {
    let refused = outcome.err();
    assert!(
        matches!(&refused, Some(EngineError::Unavailable { detail, .. }) if detail.contains(word)),
        "{word}: {refused:?}"
    );
}

#[tokio::test]
async fn workspaces_that_are_made_at_once_are_no_more_than_permitted_and_one_that_nobody_waits_for_is_made() {
    let (guarded, fake) = before_a_fake(|policy| policy.workspaces = 2).await;
    let engine = &guarded.engine;
    engine.resolve_image(engine_fake::IMAGE, Pull::Never).await.expect("a listed image");
    let spec = || WorkspaceSpec {
        name: WorkspaceName::new("fake", Uuid::now_v7().into()),
        image: "sha256:fake".to_owned(),
        quota_bytes: Some(MIB),
    };
    fake.faults(|faults| faults.workspace_takes = Duration::from_millis(300));
    let there = spec();
    let unheard = tokio::time::timeout(Duration::from_millis(150), engine.ensure_workspace(&there)).await;
    assert!(unheard.is_err(), "the caller has gone");
    let began = std::time::Instant::now();
    while fake.list_workspaces().await.expect("a list").is_empty() {
        assert!(began.elapsed() < NEVER, "it went with its caller");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (a, b, c) = (spec(), spec(), spec());
    let made = tokio::join!(engine.ensure_workspace(&a), engine.ensure_workspace(&b), engine.ensure_workspace(&c));
    assert_eq!([&made.0, &made.1, &made.2].iter().filter(|made| made.is_ok()).count(), 1, "{made:?}");
    assert_eq!(fake.list_workspaces().await.expect("a list").len(), 2);

    // Those that are there are looked for at the same time.
    engine.remove_workspace(&there.name).await.expect("a removal");
    fake.faults(|faults| faults.workspace_takes = Duration::from_secs(3));
    let new = spec();
    let made = [&a, &b, &c].into_iter().zip([&made.0, &made.1, &made.2]).find(|(_, made)| made.is_ok()).expect("one").0;
    let slow = engine.ensure_workspace(&new);
    let quick = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        fake.faults(|faults| faults.workspace_takes = Duration::ZERO);
        tokio::time::timeout(Duration::from_secs(1), engine.ensure_workspace(made)).await
    };
    let (slow, quick) = tokio::join!(slow, quick);
    slow.expect("a new one");
    quick.expect("it waits for a new one").expect("one that is there");
}

#[tokio::test]
async fn workspaces_are_of_templates_that_have_them_and_no_more_than_permitted() {
    let (guarded, fake) = before_a_fake(|policy| policy.workspaces = 2).await;
    let engine = &guarded.engine;
    engine.resolve_image(engine_fake::IMAGE, Pull::Never).await.expect("a listed image");
    let spec = |instance: &str| WorkspaceSpec {
        name: WorkspaceName::new(instance, Uuid::now_v7().into()),
        image: "sha256:fake".to_owned(),
        quota_bytes: Some(MIB),
    };
    let first = spec("fake");
    engine.ensure_workspace(&first).await.expect("a workspace");
    for wrong in [
        WorkspaceSpec { quota_bytes: None, ..spec("fake") },
        WorkspaceSpec { quota_bytes: Some(2 * MIB), ..spec("fake") },
        WorkspaceSpec { image: "sha256:other".to_owned(), ..spec("fake") },
        spec("another"),
    ] {
        let refused = engine.ensure_workspace(&wrong).await;
        assert!(matches!(refused, Err(EngineError::Rejected { .. })), "{wrong:?}: {refused:?}");
    }
    let refused = engine.remove_workspace(&spec("another").name).await;
    assert!(matches!(refused, Err(EngineError::Rejected { .. })), "{refused:?}");
    let foreign = CellSpec { workspace: Some(spec("another").name), ..fake_cell() };
    let refused = engine.ensure(&foreign).await.err();
    assert!(matches!(refused, Some(EngineError::Rejected { .. })), "{refused:?}");
    engine.ensure_workspace(&spec("fake")).await.expect("a second one");
    unavailable(engine.ensure_workspace(&spec("fake")).await, "2 workspaces");
    engine.ensure_workspace(&first).await.expect("one that is there already");
    assert_eq!(fake.list_workspaces().await.expect("a list").len(), 2);
    engine.remove_workspace(&first.name).await.expect("a removal");
    engine.ensure_workspace(&spec("fake")).await.expect("there is a place again");

    let (guarded, _fake) = before_a_fake(|policy| policy.templates[0].workspace = None).await;
    guarded.engine.resolve_image(engine_fake::IMAGE, Pull::Never).await.expect("a listed image");
    let refused = guarded.engine.ensure(&CellSpec { workspace: Some(first.name), ..fake_cell() }).await.err();
    assert!(matches!(refused, Some(EngineError::Rejected { .. })), "{refused:?}");
}

#[tokio::test]
async fn callers_that_hang_up_leave_no_more_cells_than_are_permitted() {
    let (guarded, fake) = before_a_fake(|policy| policy.cells = 3).await;
    fake.faults(|faults| faults.ensure_takes = Duration::from_secs(3));
    let ask = async |cell: &CellSpec| {
        let mut stream = UnixStream::connect(&guarded.socket).await.expect("a connection");
        let request = json!({"version": 2, "instance": "fake", "call": {"ensure": {"cell": as_json(cell)}}});
        stream.write_all(&frame(&request.to_string())).await.unwrap();
        stream
    };
    let mut first = Vec::new();
    for count in 1..=3 {
        let cell = fake_cell();
        let stream = ask(&cell).await;
        until("the engine is at it", async || fake.asked("make a cell") == count).await;
        drop(stream);
        first.push(cell.name);
    }
    // Each look finds no cell, as none is there yet; those that hang up go on being counted.
    for _ in 0..40 {
        drop(ask(&fake_cell()).await);
    }
    for _ in 0..5 {
        unavailable(guarded.engine.ensure(&fake_cell()).await, "3 cells");
    }
    // Nor can one be forgotten while it is being made.
    unavailable(guarded.engine.remove(&first[0]).await, "being made");
    until("they are made", async || guarded.engine.list().await.is_ok_and(|cells| cells.len() == 3)).await;
    unavailable(guarded.engine.ensure(&fake_cell()).await, "3 cells");
    let mut there: Vec<_> = fake.list().await.unwrap().into_iter().map(|seen| seen.name).collect();
    there.sort_unstable();
    first.sort_unstable();
    assert_eq!((there, fake.asked("make a cell")), (first.clone(), 3));
    // Their places are there again, once they are gone.
    fake.faults(|faults| faults.ensure_takes = Duration::ZERO);
    for name in &first {
        until("it is settled", async || guarded.engine.remove(name).await.is_ok()).await;
        guarded.engine.ensure(&fake_cell()).await.expect("a cell in its place");
    }
}

#[tokio::test]
async fn what_is_refused_costs_the_engine_no_more_than_is_paid_for() {
    let (guarded, fake) = before_a_fake(|policy| (policy.cells, policy.creates_per_minute) = (1, 3)).await;
    let asked = || (fake.asked("list"), fake.asked("find an image"));
    let cell = fake_cell();
    guarded.engine.ensure(&cell).await.expect("a cell");
    // What is never permitted, and what is permitted, ask for no look.
    let mut above = fake_cell();
    above.resources.pids += 1;
    let before = asked();
    assert!(matches!(guarded.engine.ensure(&above).await.err(), Some(EngineError::Rejected { .. })));
    assert_eq!(asked(), before);
    // There are three looks, whatever they are for; after that the refusal comes without one.
    let mut unlisted = fake_cell();
    unlisted.image = "sha256:other".to_owned();
    for _ in 0..20 {
        let absent = guarded.engine.ensure(&unlisted).await.err();
        assert!(matches!(absent, Some(EngineError::Absent { .. })), "{absent:?}");
        unavailable(guarded.engine.ensure(&fake_cell()).await, "1 cells");
    }
    let after = asked();
    assert_eq!((after.0 - before.0) + (after.1 - before.1), 3, "{before:?} {after:?}");
    // Those that were refused have taken nobody's creates; and above the rate there is no look either.
    for _ in 0..2 {
        guarded.engine.remove(&cell.name).await.expect("a removal");
        guarded.engine.ensure(&cell).await.expect("a cell");
    }
    guarded.engine.remove(&cell.name).await.expect("a removal");
    let before = asked();
    for cell in [&cell, &unlisted] {
        unavailable(guarded.engine.ensure(cell).await, "3 creates a minute");
    }
    assert_eq!(asked(), before);
}

#[tokio::test]
async fn requests_that_do_not_end_are_held_up_by_their_bytes() {
    let (guarded, _fake) = before_a_fake(|policy| policy.cells = 100).await;
    let half = {
        let mut half = (512_u32 << 10).to_be_bytes().to_vec();
        half.resize(400 << 10, b' ');
        half
    };
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut stream = UnixStream::connect(&guarded.socket).await.expect("a connection");
        tokio::time::timeout(NEVER, stream.write_all(&half)).await.expect("a guard that reads").unwrap();
        held.push(stream);
    }
    // There is no room for the fifth, of which the guard takes nothing; and not for ever.
    let mut fifth = UnixStream::connect(&guarded.socket).await.expect("a connection");
    let taken = tokio::time::timeout(Duration::from_secs(1), fifth.write_all(&half)).await;
    assert!(taken.is_err(), "more is read than there is room for: {taken:?}");
    until("there is room again", async || guarded.engine.info().await.is_ok()).await;
    for mut stream in held {
        let end = tokio::time::timeout(NEVER, stream.read(&mut [0])).await.expect("the end");
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    }
}

#[tokio::test]
async fn what_is_no_request_is_refused_and_costs_only_its_connection() {
    on_docker(scripted_guest(), |bench| async move {
        let guarded = guarded_by(&bench, policy(&bench)).await;
        let cell = spec(&bench, &guarded).await;
        let call = |call: Value| json!({"version": 2, "instance": bench.instance, "call": call}).to_string();
        let sound = call(json!("list"));
        assert_eq!(say_whole(&guarded.socket, &frame(&sound)).await, r#"{"Ok":[]}"#, "the probe itself is understood");
        let ensure = call(json!({"ensure": {"cell": as_json(&cell)}}));
        let with = |from: &str, to: &str| {
            let changed = ensure.replacen(from, to, 1);
            assert_ne!(changed, ensure, "{from}");
            frame(&changed)
        };
        let mut giant = u32::MAX.to_be_bytes().to_vec();
        giant.resize(1 << 20, b'x');
        for (what, bytes) in [
            ("Docker's API", b"POST /v1.41/containers/create HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
            ("garbage", frame("\u{0}\u{1}{]")),
            ("an empty frame", frame("")),
            ("a giant frame", giant),
            ("a field too many", with("\"pids\":", "\"HostConfig\":{\"Privileged\":true},\"pids\":")),
            ("a field twice", with("\"memory_bytes\":", "\"memory_bytes\":1,\"memory_bytes\":")),
            ("a field in other letters", with("\"memory_bytes\":", "\"Memory_Bytes\":1,\"memory_bytes\":")),
            ("a verb that there is not", frame(&call(json!({"exec": {"name": cell.name.as_str()}})))),
            ("two calls in one", with("{\"ensure\":", "{\"list\":null,\"ensure\":")),
            ("something behind the end", frame(&format!("{sound}{sound}"))),
            ("another version", frame(&sound.replace("\"version\":2", "\"version\":1"))),
            ("another instance", frame(&sound.replace(&bench.instance, "another"))),
            ("a negative amount", with("\"pids\":64", "\"pids\":-1")),
            ("data of no template", with("\"pids\":", "\"data\":[{\"name\":\"x\",\"path\":\"/usr\"}],\"pids\":")),
            ("an import", frame(&call(json!({"import-data": {"name": "suite"}})))),
            ("a removal of data", frame(&call(json!({"remove-data": {"name": "suite"}})))),
            ("an id that is none", frame(&call(json!({"claim": {"installation": "../x"}})))),
        ] {
            let answer = say_whole(&guarded.socket, &bytes).await;
            assert!(answer.starts_with(r#"{"Err":{"rejected""#), "{what}: {answer}");
        }
        // One that ends early, and one that says nothing.
        assert_eq!(say(&guarded.socket, &frame(&sound)[..20]).await, "");
        assert_eq!(say(&guarded.socket, &[]).await, "");
        assert_eq!(guarded.engine.list().await, Ok(vec![]), "nothing was made, and the guard answers");
    })
    .await;
}

/// As [`say`], but waits for the answer before it closes.
async fn say_whole(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).await.expect("a connection");
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(NEVER, stream.read_to_end(&mut answer)).await.expect("the end of the connection");
    String::from_utf8_lossy(answer.get(4..).unwrap_or_default()).into_owned()
}

async fn canary(bench: &Bench, name: &str) {
    let body = ContainerCreateBody { image: Some(bench.image.clone()), ..ContainerCreateBody::default() };
    let options = CreateContainerOptionsBuilder::default().name(name).build();
    bench.docker.create_container(Some(options), body).await.expect("a container");
}

#[tokio::test]
async fn nothing_is_done_to_a_container_that_is_not_this_instances() {
    on_docker(scripted_guest(), |bench| async move {
        let guarded = guarded_by(&bench, policy(&bench)).await;
        let session = SessionId::from_uuid(Uuid::now_v7());
        let ours = CellName::new(&bench.instance, session, 0).to_string();
        // Whose name is not a cell's, whose name is another instance's, and whose name is ours without our label.
        let names =
            [format!("canary-{}", bench.instance), format!("cellblock-{}x-{session}-0", bench.instance), ours.clone()];
        for name in &names {
            canary(&bench, name).await;
            let call = |verb: &str| json!({"version": 2, "instance": bench.instance, "call": {verb: {"name": name}}});
            for verb in ["remove", "pause", "resume", "link", "observe"] {
                let answer = say_whole(&guarded.socket, &frame(&call(verb).to_string())).await;
                assert!(answer.starts_with(r#"{"Err":{"rejected""#), "{verb} {name}: {answer}");
            }
        }
        for odd in ["", "/", &format!("../{ours}"), &format!("{ours}?force=1"), &ours.to_uppercase(), &"a".repeat(5000)]
        {
            let call = json!({"version": 2, "instance": bench.instance, "call": {"remove": {"name": odd}}});
            let answer = say_whole(&guarded.socket, &frame(&call.to_string())).await;
            assert!(answer.starts_with(r#"{"Err":{"rejected""#), "{odd:.100}: {answer}");
        }
        // A cell of one session under the name of another.
        let mut other = spec(&bench, &guarded).await;
        other.session = session;
        assert!(matches!(guarded.engine.ensure(&other).await.err(), Some(EngineError::Rejected { .. })));
        // A name that is taken by what is none of ours.
        let mut taken = spec(&bench, &guarded).await;
        (taken.name, taken.session) = (CellName::new(&bench.instance, session, 0), session);
        let refused = guarded.engine.ensure(&taken).await.err();
        assert!(matches!(refused, Some(EngineError::Conflict { .. })), "{refused:?}");
        for name in &names {
            assert!(bench.docker.inspect_container(name, None).await.is_ok(), "{name} is gone");
            engine_docker::remove(&bench, name).await;
        }
    })
    .await;
}

#[tokio::test]
async fn images_amounts_and_rates_are_the_guards_to_permit() {
    on_docker(scripted_guest(), |bench| async move {
        let policy = Policy { cells: 2, memory_bytes: Some(700 * MIB), creates_per_minute: 4, ..policy(&bench) };
        let guarded = guarded_by(&bench, policy.clone()).await;
        let engine = &guarded.engine;
        let rejected = |outcome: Option<EngineError>, word: &str| {
            assert!(
                matches!(&outcome, Some(EngineError::Rejected { detail, .. }) if detail.contains(word)),
                "{word}: {outcome:?}"
            );
        };
        rejected(engine.resolve_image(UNLISTED, Pull::Missing).await.err(), "templates");
        let unlisted = bench.engine.resolve_image(UNLISTED, Pull::Never).await.expect("the image is there").id;
        rejected(engine.resolve_image(&unlisted, Pull::Never).await.err(), "templates");
        let good = spec(&bench, &guarded).await;
        let with = |change: &dyn Fn(&mut CellSpec)| {
            let mut cell = good.clone();
            change(&mut cell);
            cell
        };
        // Each of these costs a look at the engine, of which the other guard has as few as creates.
        let lenient = guarded_by(&bench, self::policy(&bench)).await;
        let absent = lenient.engine.ensure(&with(&|c| c.image.clone_from(&unlisted))).await.err();
        assert!(matches!(absent, Some(EngineError::Absent { .. })), "{absent:?}");
        let by_name = lenient.engine.ensure(&with(&|c| c.image = IMAGE.to_owned())).await.err();
        assert!(matches!(by_name, Some(EngineError::Absent { .. })), "an id is wanted: {by_name:?}");
        rejected(engine.ensure(&with(&|c| c.runtime = "runc".to_owned())).await.err(), "runtime");
        rejected(engine.ensure(&with(&|c| c.resources.memory_bytes = 513 * MIB)).await.err(), "memory_bytes");
        rejected(engine.ensure(&with(&|c| c.resources.pids = 0)).await.err(), "pids");
        rejected(engine.ensure(&with(&|c| c.resources.disk_bytes = u64::MAX)).await.err(), "disk_bytes");
        assert_eq!(engine.list().await, Ok(vec![]), "nothing was made");

        let unavailable = |outcome: Option<EngineError>, word: &str| {
            assert!(
                matches!(&outcome, Some(EngineError::Unavailable { detail, .. }) if detail.contains(word)),
                "{word}: {outcome:?}"
            );
        };
        drop(engine.ensure(&good).await.expect("a cell"));
        let mut second = spec(&bench, &guarded).await;
        second.resources.memory_bytes = 512 * MIB;
        unavailable(engine.ensure(&second).await.err(), "memory");
        second.resources.memory_bytes = 256 * MIB;
        drop(engine.ensure(&second).await.expect("a cell"));
        let third = spec(&bench, &guarded).await;
        unavailable(engine.ensure(&third).await.err(), "2 cells");
        // Another guard counts those that it finds.
        let successor = guarded_by(&bench, policy).await;
        unavailable(successor.engine.ensure(&third).await.err(), "2 cells");
        // What others have removed is not counted any more.
        bench.engine.remove(&second.name).await.expect("a removal");
        drop(engine.ensure(&third).await.expect("a cell"));
        engine.remove(&third.name).await.expect("a removal");
        drop(engine.ensure(&third).await.expect("a cell"));
        engine.remove(&third.name).await.expect("a removal");
        unavailable(engine.ensure(&third).await.err(), "4 creates a minute");
        engine.remove(&good.name).await.expect("a removal");
    })
    .await;
}

/// Requests as they are dearest: short texts in long lists, on every connection that there may be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_said_to_a_guard_fits_into_its_memory() {
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("guard.sock");
    let (folder, _) = server::configuration("[limits]\nsessions = 100\n");
    let guard = Program::start(folder.path(), &socket).await;
    let lists = r#""x","#.repeat(130_000);
    let report = format!(r#"{{"interfaces":[{}]}}"#, lists.trim_end_matches(','));
    let call = format!(r#"{{"version":2,"instance":"x","call":{{"attest":{{"report":{report},"cell":{{}}}}}}}}"#);
    let whole = frame(&call);
    // Each is read as it comes; and without its last byte it is in hand for as long as it may be.
    for said in [whole.as_slice(), &whole[..whole.len() - 1]] {
        let mut saying = Vec::new();
        for _ in 0..456 {
            let mut stream = UnixStream::connect(&socket).await.expect("a connection");
            saying.push(async move {
                // A guard that has no room for it closes while we write.
                let _ = stream.write_all(said).await;
                let _ = stream.read(&mut [0]).await;
            });
        }
        let all = futures_util::future::join_all(saying);
        tokio::time::timeout(NEVER, all).await.expect("an end of all connections");
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", guard.0.id())).unwrap();
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim();
    let most: usize = most.strip_suffix(" kB").unwrap().parse().unwrap();
    println!("at most {most} KiB resident");
    assert!(most << 10 < Needs::of(100).memory, "{most} KiB");
}

#[tokio::test]
async fn a_user_that_was_not_named_gets_no_answer() {
    on_docker(scripted_guest(), |bench| async move {
        let refused = guarded_for(&bench, policy(&bench), vec![own_user() + 1]).await.err();
        assert!(matches!(refused, Some(EngineError::Unavailable { .. })), "{refused:?}");
    })
    .await;
}

#[tokio::test]
async fn many_connections_that_say_nothing_do_not_keep_the_guard() {
    on_docker(scripted_guest(), |bench| async move {
        let guarded = guarded_by(&bench, Policy { cells: 1, ..policy(&bench) }).await;
        let mut silent = Vec::new();
        for _ in 0..400 {
            silent.push(UnixStream::connect(&guarded.socket).await.expect("a connection"));
        }
        // Those beyond the permitted number are closed at once, and so is whoever comes next …
        let refused = guarded.engine.info().await;
        assert!(matches!(refused, Err(EngineError::Unavailable { .. })), "{refused:?}");
        // … until the silent ones have had their time, though they go on being silent.
        let answered = async { while guarded.engine.info().await.is_err() {} };
        tokio::time::timeout(NEVER, answered).await.expect("an answer");
        for mut stream in silent {
            let ended = tokio::time::timeout(NEVER, stream.read(&mut [0])).await.expect("the end");
            assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_socket_has_one_guard_and_a_dead_ones_is_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("guard.sock");
    let first = bind(&socket, true).await.unwrap();
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);
    let second = bind(&socket, true).await.unwrap_err().to_string();
    assert!(second.contains("another guard"), "{second}");
    drop(first);
    drop(bind(&socket, false).await.unwrap());
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let file = folder.path().join("file");
    std::fs::write(&file, "kept").unwrap();
    assert!(bind(&file, false).await.is_err());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
}

#[test]
fn a_start_that_can_not_be_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let nowhere = "engine.host=guard:///nonexistent/guard.sock";
    let serve = ["serve", "--listen", "127.0.0.1:0", "--data-dir", data.to_str().unwrap(), "--set", nowhere];
    let table: [(&[&str], &str); 3] = [
        (&["guard", "--set", nowhere], "a guard needs the engine's own address"),
        (&["guard", "--check", "--socket", "/nonexistent/guard.sock"], "does `cellblock guard` run there"),
        (&serve, "does `cellblock guard` run there"),
    ];
    for (arguments, words) in table {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
        let output = command.args(arguments).env("CELLBLOCK_CONFIG", "/dev/null").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(words), "{arguments:?}: {said}");
    }
}

/// `cellblock guard`, killed when this is dropped.
struct Program(std::process::Child);

impl Program {
    /// Starts one with a test's configuration, and waits until it answers.
    async fn start(folder: &Path, socket: &Path) -> Self {
        let command = |check: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
            command.arg("guard").args(check).arg("--socket").arg(socket);
            for name in ["base.toml", "test.toml"] {
                command.arg("--config").arg(folder.join(name));
            }
            let log = std::fs::OpenOptions::new().create(true).append(true).open(folder.join("guard.log")).unwrap();
            command.args(["--set", "engine.host=unix:///var/run/docker.sock"]).stderr(log);
            command
        };
        let mut program = Self(command(&[]).spawn().expect("the program"));
        let began = Instant::now();
        while !command(&["--check"]).status().expect("the program").success() {
            let log = || std::fs::read_to_string(folder.join("guard.log")).unwrap_or_default();
            assert!(program.0.try_wait().unwrap().is_none(), "the guard has ended: {}", log());
            assert!(began.elapsed() < NEVER, "the guard does not answer: {}", log());
        }
        program
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // One that has ended is not there to be killed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(NEVER, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Processes of kernels in a container.
async fn kernels_in(server: &Server, container: &str) -> usize {
    let inside = server.docker.top_processes(container, None).await.expect("processes").processes.unwrap_or_default();
    inside.iter().filter(|process| process.iter().any(|part| part.contains("ipykernel"))).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_server_works_through_a_guard_that_may_be_killed() {
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("guard.sock");
    let settings = format!(
        "default_template = \"small\"\n[engine]\nhost = \"guard://{}\"\n[templates.data]\nenabled = false\n[templates.small]\nimage = \"{IMAGE}\"\n[templates.small.default]\n\
         memory = \"160MiB\"\ndisk = \"16MiB\"\ntmp = \"16MiB\"\n",
        socket.display()
    );
    let (folder, config) = server::configuration(&settings);
    let folder = Arc::new(folder);
    let guard = Program::start(folder.path(), &socket).await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).unwrap();
    let (first, pid) = Server::spawn_in(config, Arc::clone(&folder), free).await;

    let cell = first.create(json!({"template": "small"})).await;
    assert_eq!(cell.value("6 * 7").await, "42");
    let sockets_inside = "import os, stat
[os.path.join(d, f) for d, _, fs in os.walk('/', onerror=None) for f in fs if not d.startswith('/proc')
 and os.path.lexists(os.path.join(d, f)) and stat.S_ISSOCK(os.lstat(os.path.join(d, f)).st_mode)
 and ('docker' in f or 'guard' in f)]";
    assert_eq!(cell.value(sockets_inside).await, "[]", "no way to the guard or the engine from inside");
    cell.delete().await;
    until("the container is gone", async || first.containers(&cell.id).await.is_empty()).await;

    // The server is killed: the guard goes on, and the next server goes on with what lives.
    let cell = first.create(json!({"template": "small"})).await;
    cell.value("x = 41").await;
    first.kill(pid).await;
    let (second, pid) = first.spawn_again().await;
    let cell = Cell { server: Arc::clone(&second), id: cell.id.clone(), view: Value::Null };
    assert_eq!(cell.value("x + 1").await, "42");

    // A context is deleted while there is no link, and then there is no server either: the next one ends the kernel that nobody was told to end.
    let context = server::text(&second.post(&cell.path("/contexts"), &json!({})).await.json["id"]);
    let container = cell.containers().await.remove(0);
    drop(guard);
    let deleted = second.delete(&cell.path(&format!("/contexts/{context}"))).await;
    assert_eq!(deleted.status, 200, "{}", deleted.text);
    second.kill(pid).await;
    assert_eq!(kernels_in(&second, &container).await, 2, "nobody has ended it");
    let guard = Program::start(folder.path(), &socket).await;
    let (second, _) = second.spawn_again().await;
    let cell = Cell { server: Arc::clone(&second), id: cell.id.clone(), view: Value::Null };
    until("one kernel is left", async || kernels_in(&second, &container).await == 1).await;
    assert_eq!(cell.value("x + 1").await, "42");

    // The guard is killed: callers are told so, and the server goes on.
    drop(guard);
    second.post("/v1/sessions", &json!({"template": "small"})).await.problem(503, "engine-unavailable");
    assert_eq!(second.get("/readyz").await.status, 503);
    assert_eq!(second.get("/livez").await.status, 200);
    let guard = Program::start(folder.path(), &socket).await;
    until("the server is ready again", async || second.get("/readyz").await.status == 200).await;
    let next = second.create(json!({"template": "small"})).await;
    assert_eq!(next.value("6 * 7").await, "42");
    next.delete().await;
    // A session whose link the guard held is linked again.
    assert_eq!(cell.value("x + 2").await, "43");
    cell.delete().await;

    // An operator offers another image: to the server, which the guard does not believe, and then to the guard.
    let offered = settings.replace("enabled = false", "enabled = true");
    std::fs::write(folder.path().join("test.toml"), offered).unwrap();
    assert_eq!(second.post("/v1/admin/reload", &Value::Null).await.status, 200);
    let asked = json!({"template": "data", "resources": {"memory_mb": 512}});
    let refused = second.post("/v1/sessions", &asked).await;
    assert_eq!(refused.status, 422, "{}", refused.text);
    refused.is_a_problem();
    assert!(Command::new("kill").args(["-HUP", &guard.0.id().to_string()]).status().unwrap().success());
    until("the guard permits it", async || {
        let made = second.post("/v1/sessions", &asked).await;
        if made.status == 201 {
            second.delete(&format!("/v1/sessions/{}", server::text(&made.json["id"]))).await;
        }
        made.status == 201
    })
    .await;
    until("no container is left", async || second.containers("").await.is_empty()).await;
    second.finish().await.unwrap_or_else(|left| panic!("{left}"));
}
