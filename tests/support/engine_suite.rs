//! What every engine promises, as one suite over `&dyn Engine`. Nothing here is true of Docker alone.
#![allow(dead_code, reason = "each test takes a part of it")]

use std::time::Duration;

use cellblock::domain::data::DataMount;
use cellblock::domain::ids::{InstallationId, SessionId};
use cellblock::domain::spec::{MIB, Resources};
use cellblock::engine::{
    ByteStream, CellName, CellSpec, CellState, Engine, EngineError, EngineEvent, EngineEventKind, Pull, WorkspaceName,
    WorkspaceSpec, WorkspaceVolume, pack,
};
use cellblock_wire::marker::{LinkSecret, Marker, MarkerScanner, Scanned};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use uuid::Uuid;

/// How long anything in this suite may take before it counts as never.
const NEVER: Duration = Duration::from_secs(30);

/// An engine under test. Its cells run a guest that answers reset markers.
pub struct Subject<'a> {
    /// The engine.
    pub engine: &'a dyn Engine,
    /// The same one for operators, where it is another way to it.
    pub operator: &'a dyn Engine,
    /// Its instance.
    pub instance: &'a str,
    /// A reference that it can resolve.
    pub image: &'a str,
    /// Ends a cell's first process behind the engine's back.
    pub kill: &'a (dyn Fn(CellName) -> BoxFuture<'static, ()> + Sync),
}

/// The whole suite.
pub async fn run(subject: &Subject<'_>) {
    info_and_images(subject).await;
    absent_cells_are_no_error_to_look_at(subject).await;
    a_life(subject).await;
    streams_follow_each_other(subject).await;
    another_specification_is_a_conflict(subject).await;
    events_tell_of_beginnings_and_ends(subject).await;
    a_killed_guest_is_seen(subject).await;
    a_paused_cell_keeps_all_and_takes_no_link(subject).await;
    a_paused_cell_is_removed(subject).await;
    a_name_is_one_installations(subject).await;
    data_is_there_as_it_was_imported_last(subject).await;
    a_workspace_is_one_cells_after_the_other(subject).await;
    assert_eq!(subject.engine.list().await, Ok(vec![]), "the suite leaves nothing");
}

/// A specification that no other cell has.
pub async fn spec(subject: &Subject<'_>) -> CellSpec {
    let session = SessionId::from_uuid(Uuid::now_v7());
    let image = subject.engine.resolve_image(subject.image, Pull::Never).await.expect("the image is there");
    CellSpec {
        name: CellName::new(subject.instance, session, 0),
        session,
        image: image.id,
        runtime: String::new(),
        resources: resources(),
        data: vec![],
        workdir: "/workspace".to_owned(),
        workspace: None,
    }
}

/// Small, but enough for a kernel.
pub fn resources() -> Resources {
    Resources {
        cpu_millis: 1000,
        memory_bytes: 256 * MIB,
        disk_bytes: 64 * MIB,
        tmp_bytes: 32 * MIB,
        pids: 64,
        open_files: 1024,
    }
}

/// Sends a marker and waits for its echo, throwing away what comes before it.
pub async fn echo(stream: &mut ByteStream, secret: LinkSecret) {
    let marker = Marker { secret, nonce: *Uuid::new_v4().as_bytes() };
    let exchange = async {
        stream.write_all(&marker.to_bytes()).await.expect("writing to a cell");
        stream.flush().await.expect("writing to a cell");
        let mut scanner = MarkerScanner::default();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let read = stream.read(&mut buffer).await.expect("reading from a cell");
            assert_ne!(read, 0, "the stream ended before the echo");
            if scanner.push(&buffer[..read], |m| *m == marker).contains(&Scanned::Marker(marker)) {
                return;
            }
        }
    };
    tokio::time::timeout(NEVER, exchange).await.expect("an echo of the marker");
}

/// A secret for one cell.
pub fn secret() -> LinkSecret {
    LinkSecret(*Uuid::new_v4().as_bytes())
}

async fn info_and_images(subject: &Subject<'_>) {
    let info = subject.engine.info().await.expect("information");
    assert!(info.cpus > 0 && info.memory_bytes > 64 * MIB && !info.version.is_empty(), "{info:?}");

    let image = subject.engine.resolve_image(subject.image, Pull::Never).await.expect("the image is there");
    assert!(!image.id.is_empty());
    let by_id = subject.engine.resolve_image(&image.id, Pull::Never).await.expect("an id is a reference as well");
    assert_eq!(by_id.id, image.id);
    let missing = subject.engine.resolve_image("cellblock-no-such-image:none", Pull::Never).await;
    assert!(matches!(missing, Err(EngineError::Absent { .. })), "{missing:?}");
}

async fn absent_cells_are_no_error_to_look_at(subject: &Subject<'_>) {
    let name = CellName::new(subject.instance, SessionId::from_uuid(Uuid::now_v7()), 0);
    assert_eq!(subject.engine.observe(&name).await, Ok(None));
    assert_eq!(subject.engine.remove(&name).await, Ok(()), "what is not there is removed");
    let link = subject.engine.link(&name).await.err();
    assert!(matches!(link, Some(EngineError::Absent { .. })), "{link:?}");

    let mut cell = spec(subject).await;
    cell.image = format!("sha256:{}", "0".repeat(64));
    let ensured = subject.engine.ensure(&cell).await.err();
    assert!(matches!(ensured, Some(EngineError::Absent { .. })), "{ensured:?}");
    assert_eq!(subject.engine.remove(&cell.name).await, Ok(()));
}

async fn a_life(subject: &Subject<'_>) {
    let cell = spec(subject).await;
    let secret = secret();
    let mut stream = subject.engine.ensure(&cell).await.expect("a cell");
    echo(&mut stream, secret).await;

    let seen = subject.engine.observe(&cell.name).await.expect("a look").expect("a cell");
    assert_eq!((seen.state, seen.session), (CellState::Running, Some(cell.session)));
    assert_eq!(subject.engine.list().await, Ok(vec![seen]));

    drop(stream);
    let mut stream = subject.engine.ensure(&cell).await.expect("the same cell");
    echo(&mut stream, secret).await;
    assert_eq!(subject.engine.list().await.expect("a list").len(), 1, "made twice is made once");

    assert_eq!(subject.engine.remove(&cell.name).await, Ok(()));
    assert_eq!(subject.engine.observe(&cell.name).await, Ok(None), "removed means gone");
    assert_eq!(subject.engine.remove(&cell.name).await, Ok(()), "removed twice is removed");
    end_of(stream).await;
}

async fn streams_follow_each_other(subject: &Subject<'_>) {
    let cell = spec(subject).await;
    let secret = secret();
    let mut stream = subject.engine.ensure(&cell).await.expect("a cell");
    echo(&mut stream, secret).await;
    for _ in 0..10 {
        drop(stream);
        let link = tokio::time::timeout(Duration::from_secs(3), subject.engine.link(&cell.name)).await;
        stream = link.expect("a link answers at once").expect("a link");
        echo(&mut stream, secret).await;
    }
    drop(stream);
    assert_eq!(subject.engine.remove(&cell.name).await, Ok(()));
}

async fn another_specification_is_a_conflict(subject: &Subject<'_>) {
    let cell = spec(subject).await;
    let stream = subject.engine.ensure(&cell).await.expect("a cell");
    drop(stream);
    let mut other = cell.clone();
    other.resources.memory_bytes += MIB;
    let refused = subject.engine.ensure(&other).await.err();
    assert!(matches!(refused, Some(EngineError::Conflict { .. })), "{refused:?}");
    let state = subject.engine.observe(&cell.name).await.expect("a look").map(|seen| seen.state);
    assert_eq!(state, Some(CellState::Running), "the first one is undisturbed");
    assert_eq!(subject.engine.remove(&cell.name).await, Ok(()));
}

async fn events_tell_of_beginnings_and_ends(subject: &Subject<'_>) {
    let cell = spec(subject).await;
    let mut events = subject.engine.watch();
    let life = async {
        // Nobody can wait for a watch to have begun; events are hints.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut stream = subject.engine.ensure(&cell).await.expect("a cell");
        echo(&mut stream, secret()).await;
        assert_eq!(subject.engine.remove(&cell.name).await, Ok(()));
    };
    let seen = async {
        let mut kinds = Vec::new();
        while !kinds.contains(&EngineEventKind::Removed) {
            let EngineEvent { name, kind } = events.next().await.expect("a watch never ends");
            if name == cell.name {
                kinds.push(kind);
            }
        }
        kinds
    };
    let (kinds, ()) = tokio::time::timeout(NEVER, async { tokio::join!(seen, life) }).await.expect("events");
    assert_eq!(kinds.first(), Some(&EngineEventKind::Created), "{kinds:?}");
    assert!(kinds.contains(&EngineEventKind::Exited), "{kinds:?}");
}

async fn a_killed_guest_is_seen(subject: &Subject<'_>) {
    let cell = spec(subject).await;
    let mut stream = subject.engine.ensure(&cell).await.expect("a cell");
    echo(&mut stream, secret()).await;
    (subject.kill)(cell.name.clone()).await;
    end_of(stream).await;
    let state =
        subject.engine.observe(&cell.name).await.expect("a look").expect("a cell that ended is still there").state;
    assert!(matches!(state, CellState::Exited { oom: false, .. }), "{state:?}");
    let listed = subject.engine.list().await.expect("a list");
    assert_eq!(listed.iter().map(|o| (&o.name, o.state)).collect::<Vec<_>>(), [(&cell.name, state)]);
    let link = subject.engine.link(&cell.name).await.err();
    assert!(matches!(link, Some(EngineError::Conflict { .. })), "{link:?}");
    let again = subject.engine.ensure(&cell).await.err();
    assert!(matches!(again, Some(EngineError::Conflict { .. })), "{again:?}");
    assert_eq!(subject.engine.remove(&cell.name).await, Ok(()));
}

async fn a_paused_cell_keeps_all_and_takes_no_link(subject: &Subject<'_>) {
    let name = CellName::new(subject.instance, SessionId::from_uuid(Uuid::now_v7()), 0);
    for absent in [subject.engine.pause(&name).await, subject.engine.resume(&name).await] {
        assert!(matches!(absent, Err(EngineError::Absent { .. })), "{absent:?}");
    }
    let cell = spec(subject).await;
    let secret = secret();
    let mut stream = subject.engine.ensure(&cell).await.expect("a cell");
    echo(&mut stream, secret).await;
    drop(stream);
    let mut events = subject.engine.watch();
    assert_eq!(subject.engine.resume(&cell.name).await, Ok(()), "what runs needs no thaw");
    let mut told = Vec::new();
    for _ in 0..2 {
        // As above: nobody can wait for a watch to have begun.
        tokio::time::sleep(Duration::from_millis(100)).await;
        for _ in 0..2 {
            assert_eq!(subject.engine.pause(&cell.name).await, Ok(()), "paused twice is paused");
        }
        let seen = subject.engine.observe(&cell.name).await.expect("a look").expect("a cell");
        assert_eq!(seen.state, CellState::Paused);
        assert_eq!(subject.engine.list().await, Ok(vec![seen]));
        let link = subject.engine.link(&cell.name).await.err();
        assert!(matches!(link, Some(EngineError::Conflict { .. })), "{link:?}");
        for _ in 0..2 {
            assert_eq!(subject.engine.resume(&cell.name).await, Ok(()), "resumed twice is resumed");
        }
        let mut stream = subject.engine.link(&cell.name).await.expect("a link");
        echo(&mut stream, secret).await;
        drop(stream);
    }
    let seen = async {
        while !(told.contains(&EngineEventKind::Paused) && told.contains(&EngineEventKind::Resumed)) {
            let EngineEvent { name, kind } = events.next().await.expect("a watch never ends");
            if name == cell.name {
                told.push(kind);
            }
        }
    };
    tokio::time::timeout(NEVER, seen).await.expect("events of a pause and its end");
    assert_eq!(subject.engine.remove(&cell.name).await, Ok(()));
}

async fn a_paused_cell_is_removed(subject: &Subject<'_>) {
    let cell = spec(subject).await;
    let mut stream = subject.engine.ensure(&cell).await.expect("a cell");
    echo(&mut stream, secret()).await;
    assert_eq!(subject.engine.pause(&cell.name).await, Ok(()), "an open link is no reason not to");
    let removal = tokio::time::timeout(NEVER, subject.engine.remove(&cell.name)).await;
    assert_eq!(removal.expect("a removal in time"), Ok(()));
    assert_eq!(subject.engine.observe(&cell.name).await, Ok(None));
    end_of(stream).await;
}

async fn a_name_is_one_installations(subject: &Subject<'_>) {
    let [first, second] = [(); 2].map(|()| InstallationId::from_uuid(Uuid::new_v4()));
    let engine = subject.engine;
    assert_eq!(engine.release(first).await, Ok(()), "what nobody has is given back");
    // Both at once: one has it.
    let (one, other) = tokio::join!(engine.claim(first), engine.claim(second));
    let (holder, late, refused) = if one.is_ok() { (first, second, other) } else { (second, first, one) };
    for refused in [refused, engine.claim(late).await] {
        let Err(EngineError::Claimed { holder: named, remedy }) = refused else { panic!("{refused:?}") };
        assert_eq!(named, Some(holder));
        assert!(!remedy.is_empty());
    }
    assert_eq!(engine.claim(holder).await, Ok(()), "taken twice is taken once");
    assert_eq!(engine.list().await, Ok(vec![]), "it is no cell");
    assert_eq!(engine.release(late).await, Ok(()));
    assert!(engine.claim(late).await.is_err(), "only the holder gives it back");
    assert_eq!(engine.release(holder).await, Ok(()));
    assert_eq!(engine.claim(late).await, Ok(()), "given back is free");
    assert_eq!(engine.release(late).await, Ok(()));
    assert_eq!(engine.sweep().await, Ok(vec![]), "there is no earlier version");
}

/// Reads to the end, or to the error that a broken connection is.
async fn end_of(mut stream: ByteStream) {
    let mut buffer = vec![0; 64 * 1024];
    let reading = async { while !matches!(stream.read(&mut buffer).await, Ok(0) | Err(_)) {} };
    tokio::time::timeout(NEVER, reading).await.expect("the end of the stream of a cell that is gone");
}

async fn a_workspace_is_one_cells_after_the_other(subject: &Subject<'_>) {
    let engine = subject.engine;
    let name = WorkspaceName::new(subject.instance, Uuid::now_v7().into());
    let with_workspace = async || CellSpec { workspace: Some(name.clone()), ..spec(subject).await };
    let cell = with_workspace().await;
    let refused = engine.ensure(&cell).await.err();
    assert!(matches!(refused, Some(EngineError::Absent { .. })), "a workspace that is not there: {refused:?}");
    engine.remove(&cell.name).await.expect("a removal");
    engine.remove_workspace(&name).await.expect("one that is not there is removed");

    let wanted = WorkspaceSpec { name: name.clone(), image: cell.image.clone(), quota_bytes: None };
    let foreign = WorkspaceName::new("another", Uuid::now_v7().into());
    let refused = engine.ensure_workspace(&WorkspaceSpec { name: foreign.clone(), ..wanted.clone() }).await;
    assert!(matches!(refused, Err(EngineError::Rejected { .. })), "{refused:?}");
    let refused = engine.remove_workspace(&foreign).await;
    assert!(matches!(refused, Err(EngineError::Rejected { .. })), "{refused:?}");

    let made = engine.ensure_workspace(&wanted).await.expect("a workspace");
    assert!(made.is_new);
    let again = engine.ensure_workspace(&wanted).await.expect("the same one");
    assert_eq!(again, WorkspaceVolume { is_new: false, ..made });
    assert_eq!(engine.list_workspaces().await, Ok(vec![name.clone()]));
    drop(engine.ensure(&cell).await.expect("a cell with a workspace"));
    drop(engine.ensure(&cell).await.expect("it is taken as it is"));
    let other = with_workspace().await;
    let refused = engine.ensure(&other).await.err();
    assert!(matches!(refused, Some(EngineError::Conflict { .. })), "two at one time: {refused:?}");
    engine.remove(&other.name).await.expect("a removal");
    let refused = engine.remove_workspace(&name).await;
    assert!(matches!(refused, Err(EngineError::Conflict { .. })), "a cell has it: {refused:?}");
    engine.remove(&cell.name).await.expect("a removal");
    drop(engine.ensure(&other).await.expect("the next cell with it"));
    engine.remove(&other.name).await.expect("a removal");
    engine.remove_workspace(&name).await.expect("a removal");
    assert_eq!(engine.list_workspaces().await, Ok(vec![]));
}

/// The data that the suite imports, and where its cells have it.
pub fn data() -> DataMount {
    DataMount { name: "suite".to_owned(), path: "/mnt/suite".to_owned() }
}

/// An archive of one file.
pub fn archive(name: &str, content: &str) -> cellblock::engine::ArchiveStream {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join(name), content).expect("a file");
    let (to, stream) = pack::pipe();
    std::thread::spawn(move || pack::pack(folder.path(), to));
    stream
}

async fn data_is_there_as_it_was_imported_last(subject: &Subject<'_>) {
    let (engine, operator) = (subject.engine, subject.operator);
    let with_data = async || CellSpec { data: vec![data()], ..spec(subject).await };
    let cell = with_data().await;
    let refused = engine.ensure(&cell).await.err();
    assert!(matches!(refused, Some(EngineError::Absent { .. })), "data that is not there: {refused:?}");
    engine.remove(&cell.name).await.expect("a removal");

    let name = data().name;
    let refused = operator.import_data("../x", &cell.image, archive("a", "1")).await;
    assert!(matches!(refused, Err(EngineError::Rejected { .. })), "{refused:?}");
    let broken = futures_util::stream::iter([Err(std::io::Error::other("it broke"))]).boxed();
    assert!(operator.import_data(&name, &cell.image, broken).await.is_err(), "half an archive");
    assert_eq!(engine.list_data().await, Ok(vec![]), "what is not whole is not there");

    let first = operator.import_data(&name, &cell.image, archive("a", "1")).await.expect("an import");
    assert_eq!(engine.list_data().await, Ok(vec![first.clone()]));
    drop(engine.ensure(&cell).await.expect("a cell with data"));
    let second = operator.import_data(&name, &cell.image, archive("a", "2")).await.expect("another import");
    assert_ne!(first.version, second.version);
    assert_eq!(engine.list_data().await, Ok(vec![second]), "the name means the last one");
    drop(engine.link(&cell.name).await.expect("the cell goes on with what it has"));
    let other = with_data().await;
    drop(engine.ensure(&other).await.expect("a cell with the other data"));

    operator.remove_data(&name).await.expect("a removal of data that cells have");
    let gone = operator.remove_data(&name).await;
    assert!(matches!(gone, Err(EngineError::Absent { .. })), "{gone:?}");
    assert_eq!(engine.list_data().await, Ok(vec![]));
    for name in [cell.name, other.name] {
        engine.remove(&name).await.expect("a removal");
    }
    engine.sweep().await.expect("a sweep");
}
