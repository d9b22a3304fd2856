use std::collections::BTreeMap;

use super::*;
use crate::domain::access::{KeyHash, Scope};
use crate::domain::data::DataMount;
use crate::domain::egress::{Network, NetworkMode, NetworkOffer, Rule, Upstream};
use crate::domain::execution::{AskedBy, Asker, ExecutionRequest, OnTimeout, Stdin};
use crate::domain::output::{
    BlobRef, Change, Comm, CommKind, Effects, ErrorInfo, ExecutionEvent, FileChange, MimeBundle, MimePart, Process,
    Report, RestartCause, ResultKind, RichOutput, Status, Stop, StopStep, TextStream, Truncated,
};
use crate::domain::packages::{PackagePolicy, Requirement};
use crate::domain::ports::Ports;
use crate::domain::spec::{
    KernelTransport, OnExpiry, OnGuestLost, OnIdle, OnKernelDeath, OutputLimits, Resources, Timeouts,
};
use crate::domain::workspace::{WorkspaceOffer, WorkspaceUse};

fn network(rule: &str) -> Network {
    Network { mode: NetworkMode::Allowlist, allow: Rule::parse(rule).unwrap().into() }
}

fn offer() -> NetworkOffer {
    NetworkOffer {
        initial: network("*.example.org:443"),
        usual: network("pypi").allow,
        may_allow: network("93.184.216.34").allow,
        upstreams: Arc::from([Upstream {
            name: "llm".to_owned(),
            host: "api.example.org".to_owned(),
            port: 443,
            path: "/v1".to_owned(),
            header: "Authorization".to_owned(),
            secret_file: "/run/secrets/llm".into(),
        }]),
        packages: PackagePolicy::Listed(Arc::from([Requirement::parse("numpy[x]>=2,<3").unwrap()])),
    }
}

fn record(n: u128) -> SessionRecord {
    let id = |n| uuid::Uuid::from_u128(n);
    let moment = |second| Timestamp::from_second(second).unwrap();
    let spec = SessionSpec {
        template: "t".to_owned(),
        image: "sha256:1".to_owned(),
        runtime: String::new(),
        kernelspec: None,
        transport: KernelTransport::Tcp,
        name: Some("chat".to_owned()),
        env: BTreeMap::new(),
        labels: BTreeMap::new(),
        resources: Resources {
            cpu_millis: 1,
            memory_bytes: u64::MAX,
            disk_bytes: 3,
            tmp_bytes: 4,
            pids: 5,
            open_files: 6,
        },
        timeouts: Timeouts {
            idle: Duration::from_millis(1500),
            lifetime: Duration::from_secs(2),
            execution: Duration::MAX,
            paused: Duration::from_secs(3),
        },
        max_execution: Duration::from_secs(4),
        max_lifetime: Duration::from_secs(5),
        max_idle: Duration::from_secs(6),
        output: OutputLimits { text_bytes: 1, result_bytes: 2, total_bytes: 3, messages: 4, messages_per_second: 5 },
        network: offer(),
        ports: Ports::parse(&["3000", "8000-8010"]).unwrap(),
        data: vec![DataMount { name: "maps".to_owned(), path: "/mnt/maps".to_owned() }],
        workspace: Some(WorkspaceUse {
            name: "mine".to_owned(),
            offer: WorkspaceOffer { max_age: Duration::from_secs(8), quota_bytes: Some(9) },
        }),
        setup: Arc::from(["a = 1\n".to_owned(), "é\u{0}".to_owned()]),
        on_kernel_death: OnKernelDeath::End,
        on_guest_lost: OnGuestLost::Replace,
        on_idle: OnIdle::Pause,
        on_expiry: OnExpiry::Pause,
        metadata: BTreeMap::from([("a b".to_owned(), "c&d".to_owned())]),
        workdir: "/home/user".to_owned(),
    };
    let context = ContextRecord {
        born: 3,
        is_ready: true,
        cwd: Some("/workspace/x".to_owned()),
        kernelspec: "python3".to_owned(),
        display_name: "Python 3".to_owned(),
        language: "python".to_owned(),
        language_info: Some(JsonText(r#"{"name": "python", "n": 1e400}"#.to_owned())),
        oom_seen: 2,
        oom_told: 1,
        replaced: Some(RestartCause::Died { status: Some(3), signal: None }),
        ..ContextRecord::new(id(n + 100).into(), moment(7), Some("python3".to_owned()))
    };
    SessionRecord {
        network: network("a.example.org:443"),
        id: id(n).into(),
        revision: 1,
        tenant: Arc::from("one"),
        spec: Arc::new(spec),
        stage: Stage::Live,
        lasting: Lasting::OnceReady,
        workspace: Some(id(n + 200).into()),
        is_warm: true,
        secret: LinkSecret([0xa5; 16]),
        created_at: moment(1),
        expires_at: moment(2),
        last_active: moment(3),
        idle: Duration::from_secs(8),
        labels: BTreeMap::from([("run".to_owned(), "42".to_owned())]),
        env: BTreeMap::from([("A".to_owned(), "1".to_owned())]),
        cells: 2,
        loss: Some("gone".to_owned()),
        default_context: context.id,
        contexts: vec![context],
    }
}

fn turn(record: SessionRecord) -> Turn {
    Turn { session: record.id, heard: (record.cells, 0), record: Some(record), executions: Vec::new() }
}

/// Opens it, does something, and gives what is there afterwards.
async fn left_after(folder: &Path, change: impl FnOnce(&State)) -> Left {
    let (state, _) = State::open(folder, None).unwrap();
    change(&state);
    state.settle().await.unwrap();
    drop(state);
    State::open(folder, None).unwrap().1
}

/// The same of sessions alone.
async fn after(folder: &Path, change: impl FnOnce(&State)) -> Vec<SessionRecord> {
    left_after(folder, change).await.sessions
}

fn logged(seq: u64, event: ExecutionEvent) -> Arc<Logged> {
    Arc::new(Logged { seq, at: Timestamp::from_microsecond(1_000_000 + seq as i64).unwrap(), event })
}

/// One of each kind, with what is awkward to write.
fn every_event() -> Vec<ExecutionEvent> {
    let json = |text: &str| JsonText(text.to_owned());
    let blob = BlobRef { number: 3, bytes: 7, sha256: "00".to_owned() };
    let data = MimeBundle::from([
        ("text/plain".to_owned(), MimePart::Inline(json("\"\\ud800 \""))),
        ("application/json".to_owned(), MimePart::Inline(JsonText("9".repeat(400)))),
        ("image/png".to_owned(), MimePart::Blob(blob)),
    ]);
    let rich = RichOutput {
        kind: ResultKind::DisplayData,
        data: data.clone(),
        metadata: json("{}"),
        display_id: Some("d".to_owned()),
    };
    let error =
        ErrorInfo { name: "E".to_owned(), value: "\u{0}\u{1b}[31m".to_owned(), traceback: vec!["t".to_owned()] };
    let cause = RestartCause::Died { status: None, signal: Some(9) };
    let comm = Comm {
        kind: CommKind::Message,
        content: json("[1]"),
        metadata: json("{}"),
        buffers: vec![vec![0, 255], Vec::new()],
    };
    vec![
        ExecutionEvent::Queued { position: 2 },
        ExecutionEvent::Started,
        ExecutionEvent::Text { stream: TextStream::Stderr, text: "a\r\n\u{0}é".to_owned() },
        ExecutionEvent::Result(rich),
        ExecutionEvent::ResultUpdate { display_id: "d".to_owned(), data, metadata: json("{\"a\": 1e400}") },
        ExecutionEvent::OutputClear { wait: true },
        ExecutionEvent::InputRequested { prompt: "?".to_owned(), password: true },
        ExecutionEvent::Error(error),
        ExecutionEvent::OutputTruncated { what: Truncated::Results, omitted_bytes: u64::MAX, total_bytes: 1 },
        ExecutionEvent::KernelRestarted { cause },
        ExecutionEvent::Comm(comm),
        ExecutionEvent::Completed,
    ]
}

fn change(id: ExecutionId) -> ExecutionChange {
    ExecutionChange { id, birth: None, progress: None, running: None, events: Vec::new() }
}

fn birth(output: OutputLimits) -> Birth {
    let request = ExecutionRequest {
        code: "1 + 1\u{0}".to_owned(),
        timeout: Duration::from_millis(1500),
        stdin: Stdin::Lines(vec!["a".to_owned()]),
        user_expressions: BTreeMap::from([("x".to_owned(), "y".to_owned())]),
        on_timeout: OnTimeout::Restart,
        stop_on_error: true,
        asked_by: Some(AskedBy {
            asker: Asker::Named("me".to_owned()),
            header: JsonText("{\"msg_id\": \"1\"}".to_owned()),
        }),
        ..ExecutionRequest::for_tests(output)
    };
    let created_at = Timestamp::from_second(5).unwrap();
    Birth {
        context: uuid::Uuid::from_u128(101).into(),
        language: "python".to_owned(),
        created_at,
        request: Arc::new(request),
    }
}

fn progress(status: Status) -> Progress {
    let process = Process { pid: 7, command: "sleep".to_owned() };
    let file =
        FileChange { path: "a/é".to_owned(), change: Change::Deleted, bytes: None, sha256: Some("ab".to_owned()) };
    let effects = Effects { files: vec![file], processes: vec![process], pids_hit: true, ..Effects::default() };
    let stop = Stop {
        step: StopStep::Replace,
        took: Duration::from_micros(7),
        also_ended: vec![uuid::Uuid::from_u128(9).into()],
    };
    let report = Report {
        execution_count: Some(4),
        kernel_end: Some(RestartCause::Swept),
        stop: Some(stop),
        detail: Some("why".to_owned()),
        effects,
        user_expressions: BTreeMap::from([("x".to_owned(), JsonText("[1e999]".to_owned()))]),
        payloads: vec![JsonText("{}".to_owned())],
    };
    let started_at = Some(Timestamp::from_second(6).unwrap());
    Progress { status, started_at, finished_at: None, report }
}

#[tokio::test]
async fn executions_come_back_as_they_were_with_their_events_and_how_far_was_heard() {
    let folder = tempfile::tempdir().unwrap();
    let session = record(1);
    let id: ExecutionId = uuid::Uuid::from_u128(7).into();
    let (birth, queued, running) = (birth(session.spec.output), progress(Status::Queued), progress(Status::Running));
    let kept = RunningRecord {
        reply: Some("{\"status\": \"ok\"}".to_owned()),
        is_idle: true,
        lines_given: 2,
        ends_told: 1,
        asked: Some("{}".to_owned()),
        error_told: true,
        memory_hit: true,
        verdict: Some((Status::Timeout, Timestamp::from_second(8).unwrap())),
        replacing: Some((Status::Oom, RestartCause::Oom, "memory".to_owned())),
    };
    let events: Vec<_> = every_event().into_iter().zip(1..).map(|(event, seq)| logged(seq, event)).collect();
    let put = |state: &State, heard: u64, executions: Vec<ExecutionChange>| {
        state.put(Turn { session: session.id, record: None, heard: (2, heard), executions });
    };
    let first = left_after(folder.path(), |state| {
        state.put(turn(session.clone()));
        let of = ExecutionChange { birth: Some(birth.clone()), progress: Some(queued), ..change(id) };
        put(state, 3, vec![ExecutionChange { events: events[..2].to_vec(), ..of }]);
        put(state, 4, vec![ExecutionChange { progress: Some(running.clone()), ..change(id) }]);
        let rest = events[2..].to_vec();
        put(state, 9, vec![ExecutionChange { running: Some(kept.clone()), events: rest, ..change(id) }]);
    })
    .await;
    let expected = ExecutionRecord {
        id,
        session: session.id,
        birth,
        progress: running,
        running: Some(kept),
        events: events.clone(),
    };
    assert_eq!(first.executions, [expected]);
    assert_eq!(first.heard, HashMap::from([(session.id, (2, 9))]));

    // A mark that was changed afterwards takes the place of what it was, and what has ended does not run.
    let mark = ExecutionEvent::OutputTruncated { what: Truncated::Stdout, omitted_bytes: 5, total_bytes: 5 };
    let ended = progress(Status::Ok);
    let second = left_after(folder.path(), |state| {
        let events = vec![logged(9, mark.clone())];
        put(state, 10, vec![ExecutionChange { progress: Some(ended.clone()), events, ..change(id) }]);
    });
    let [found] = <[_; 1]>::try_from(second.await.executions).unwrap();
    assert_eq!((&found.progress, &found.running, &found.events[8].event), (&ended, &None, &mark));
    assert_eq!(found.events.len(), events.len());

    let third = left_after(folder.path(), |state| state.forget_executions(&[id]));
    assert_eq!(third.await.executions, []);
    let connection = Connection::open(path_in(folder.path())).unwrap();
    let events: i64 = connection.query_row("SELECT count(*) FROM events", [], |row| row.get(0)).unwrap();
    assert_eq!(events, 0, "events go with their execution");
}

#[tokio::test]
async fn what_could_not_be_committed_of_an_execution_goes_before_what_came_later() {
    let folder = tempfile::tempdir().unwrap();
    let (session, id) = (record(1), ExecutionId::from(uuid::Uuid::from_u128(7)));
    let (state, _) = State::open(folder.path(), None).unwrap();
    let other = Connection::open(path_in(folder.path())).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let put = |heard, change| {
        state.put(Turn { session: session.id, record: None, heard: (2, heard), executions: vec![change] });
    };
    let born = ExecutionChange {
        birth: Some(birth(session.spec.output)),
        progress: Some(progress(Status::Running)),
        events: vec![logged(1, ExecutionEvent::Started)],
        ..change(id)
    };
    state.put(turn(session.clone()));
    put(1, born);
    assert!(state.settle().await.is_err(), "another has it");
    let events = vec![logged(2, ExecutionEvent::Completed)];
    put(2, ExecutionChange { progress: Some(progress(Status::Ok)), events, ..change(id) });
    other.execute_batch("ROLLBACK").unwrap();
    while state.settle().await.is_err() {}
    drop(state);
    let left = State::open(folder.path(), None).unwrap().1;
    assert_eq!(left.heard[&session.id], (2, 2));
    assert_eq!(left.executions[0].progress.status, Status::Ok);
    let events: Vec<_> = left.executions[0].events.iter().map(|logged| &logged.event).collect();
    assert_eq!(events, [&ExecutionEvent::Started, &ExecutionEvent::Completed]);
}

#[tokio::test]
async fn keys_are_kept_until_they_are_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let id = |n| uuid::Uuid::from_u128(n);
    let mades = [
        Made::Session(id(1).into()),
        Made::Execution(id(2).into()),
        Made::Context(id(1).into(), id(3).into()),
        Made::Command(id(1).into(), id(4).into()),
    ];
    let key = |n: usize, is_answered| KeyRecord {
        tenant: Arc::from("one"),
        key: format!("k{n}"),
        fingerprint: "f".to_owned(),
        made: mades[n],
        at: Timestamp::from_second(n as i64 + 1).unwrap(),
        is_answered,
    };
    let kept = left_after(folder.path(), |state| {
        for n in 0..3 {
            state.put_key(key(n, false));
        }
        state.put_key(key(0, true));
        state.forget_key(Arc::from("one"), "k1".to_owned());
    });
    assert_eq!(kept.await.keys, [key(0, true), key(2, false)]);
    let kept = left_after(folder.path(), |state| state.forget_keys(Timestamp::from_second(2).unwrap()));
    assert_eq!(kept.await.keys, [key(2, false)]);
}

#[test]
fn a_database_of_the_first_version_is_brought_up() {
    let folder = tempfile::tempdir().unwrap();
    let connection = Connection::open(path_in(folder.path())).unwrap();
    connection.execute_batch(SESSIONS).unwrap();
    connection.pragma_update(None, "application_id", APPLICATION_ID).unwrap();
    connection.pragma_update(None, "user_version", 1).unwrap();
    let body = form::write(&record(1)).unwrap();
    connection
        .execute("INSERT INTO sessions VALUES (?1, 1, NULL, ?2)", params![record(1).id.to_string(), body])
        .unwrap();
    drop(connection);
    assert_eq!(State::open(folder.path(), None).unwrap().1.sessions, [record(1)]);
}

#[tokio::test]
async fn records_are_there_again_in_their_newest_form() {
    let folder = tempfile::tempdir().unwrap();
    let newest = SessionRecord { revision: 3, cells: 9, ..record(1) };
    let found = after(folder.path(), |state| {
        for record in [record(1), newest.clone(), SessionRecord { revision: 2, ..record(1) }, record(2)] {
            state.put(turn(record));
        }
    });
    assert_eq!(found.await, [newest, record(2)]);
}

#[tokio::test]
async fn every_stage_is_kept_and_what_has_ended_is_forgotten_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let at = Timestamp::from_second(100).unwrap();
    let stages =
        [Stage::Starting, Stage::Paused(at), Stage::Ending(EndReason::KernelDied), Stage::Ended(EndReason::Idle, at)];
    let all: Vec<_> = stages.iter().zip(1..).map(|(stage, n)| SessionRecord { stage: *stage, ..record(n) }).collect();
    let found = after(folder.path(), |state| all.iter().for_each(|record| state.put(turn(record.clone())))).await;
    assert_eq!(found, all);
    let found = after(folder.path(), |state| state.forget_ended(at)).await;
    assert_eq!(found.len(), 4, "nothing ended before that");
    let found = after(folder.path(), |state| state.forget_ended(Timestamp::from_second(101).unwrap())).await;
    assert_eq!(found, all[..3]);
}

#[tokio::test]
async fn a_record_of_a_server_that_could_not_pause_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let found = after(folder.path(), |state| state.put(turn(record(1)))).await;
    assert_eq!(found, [record(1)]);
    let connection = Connection::open(path_in(folder.path())).unwrap();
    for newer in [r#","on_idle":"pause""#, r#","paused":{"secs":3,"nanos":0}"#] {
        let older = "UPDATE sessions SET body = replace(body, ?1, '') WHERE instr(body, ?1)";
        assert_eq!(connection.execute(older, [newer]).unwrap(), 1, "{newer}");
    }
    drop(connection);
    let found = State::open(folder.path(), None).unwrap().1.sessions;
    let mut expected = record(1);
    let spec = Arc::make_mut(&mut expected.spec);
    (spec.on_idle, spec.timeouts.paused) = (OnIdle::Delete, Duration::from_secs(3600));
    assert_eq!(found, [expected]);
}

#[test]
fn a_newer_a_foreign_and_a_damaged_database_are_left_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = path_in(folder.path());
    // Not with the thread that writes, which closes the file only after it was told to.
    drop(open(&path).unwrap());
    let alter = |sql: &str| Connection::open(&path).unwrap().execute_batch(sql).unwrap();
    let refused = || State::open(folder.path(), None).map(|_| ()).unwrap_err().to_string();
    alter("PRAGMA user_version = 99");
    assert!(refused().contains("version 99"), "{}", refused());
    alter(&format!("PRAGMA user_version = {}; PRAGMA application_id = 7", MIGRATIONS.len()));
    assert!(refused().contains("another program"));
    alter(&format!(
        "PRAGMA application_id = {APPLICATION_ID}; INSERT INTO sessions VALUES ('{}', 1, NULL, '{{}}')",
        record(1).id
    ));
    assert!(refused().contains("damaged") && refused().contains(&record(1).id.to_string()));
    let bytes = vec![b'x'; 8192];
    std::fs::write(&path, &bytes).unwrap();
    assert!(refused().contains("damaged"), "{}", refused());
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

#[tokio::test]
async fn a_database_is_examined_beside_a_server_and_without_one_and_nothing_is_changed() {
    // A name that means something in an address.
    let folder = tempfile::Builder::new().prefix("what?#%20").tempdir().unwrap();
    assert_eq!(examine(folder.path()).unwrap(), None);
    let (state, _) = State::open(folder.path(), None).unwrap();
    state.put(turn(record(1)));
    state.settle().await.unwrap();
    let newest = MIGRATIONS.len();
    assert_eq!(examine(folder.path()).unwrap(), Some((newest, newest)));
    let at_rest = tempfile::tempdir().unwrap();
    backup(folder.path(), &path_in(at_rest.path())).unwrap();
    let alter = |sql: &str| Connection::open(path_in(at_rest.path())).unwrap().execute_batch(sql).unwrap();
    alter("PRAGMA journal_mode = WAL; PRAGMA user_version = 1");
    let files = || std::fs::read_dir(at_rest.path()).unwrap().map(|f| f.unwrap().file_name()).collect::<Vec<_>>();
    let before = (files(), std::fs::read(path_in(at_rest.path())).unwrap());
    assert_eq!(examine(at_rest.path()).unwrap(), Some((1, newest)), "it is not brought up");
    assert_eq!((files(), std::fs::read(path_in(at_rest.path())).unwrap()), before);
    std::fs::write(path_in(at_rest.path()), vec![b'x'; 8192]).unwrap();
    assert!(matches!(examine(at_rest.path()), Err(StateError::Damaged(_))));
    assert_eq!(files(), before.0);
}

#[tokio::test]
async fn a_copy_is_made_while_a_server_works_and_opens_like_the_original() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (state, _) = State::open(folder.path(), None).unwrap();
    state.put(turn(record(1)));
    state.settle().await.unwrap();
    backup(folder.path(), &path_in(other.path())).unwrap();
    assert_eq!(State::open(other.path(), None).unwrap().1.sessions, [record(1)]);
    assert!(backup(folder.path(), &path_in(other.path())).is_err(), "nothing is overwritten");
}

#[tokio::test]
async fn what_can_not_be_committed_is_told_and_stays_until_it_can() {
    let folder = tempfile::tempdir().unwrap();
    let (state, _) = State::open(folder.path(), None).unwrap();
    let other = Connection::open(path_in(folder.path())).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    state.put(turn(record(1)));
    assert!(state.settle().await.is_err(), "another has it");
    assert!(!state.is_written());
    state.put(turn(SessionRecord { revision: 2, ..record(1) }));
    other.execute_batch("ROLLBACK").unwrap();
    while state.settle().await.is_err() {}
    assert!(state.is_written());
    drop(state);
    assert_eq!(State::open(folder.path(), None).unwrap().1.sessions, [SessionRecord { revision: 2, ..record(1) }]);
}

#[test]
fn nobody_else_may_read_it() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    drop(State::open(folder.path(), None).unwrap());
    let mode = std::fs::metadata(path_in(folder.path())).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn workspaces_are_kept_as_they_were_put_last_until_they_are_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let moment = |second| Timestamp::from_second(second).unwrap();
    let workspace = |n: u128, uid, is_deleted| WorkspaceRecord {
        id: uuid::Uuid::from_u128(n).into(),
        tenant: Arc::from("one"),
        name: format!("w{n}"),
        template: "t".to_owned(),
        uid,
        quota_bytes: uid.map(u64::from),
        max_age: Duration::from_millis(1500),
        created_at: moment(1),
        last_used: moment(n as i64),
        is_deleted,
    };
    let kept = left_after(folder.path(), |state| (1..4).for_each(|n| state.put_workspace(workspace(n, None, false))));
    assert_eq!(kept.await.workspaces, [1, 2, 3].map(|n| workspace(n, None, false)));
    let kept = left_after(folder.path(), |state| {
        state.put_workspace(workspace(1, Some(7), true));
        state.forget_workspace(workspace(2, None, false).id);
    });
    assert_eq!(kept.await.workspaces, [workspace(1, Some(7), true), workspace(3, None, false)]);
}

#[tokio::test]
async fn api_keys_are_kept_until_they_are_revoked() {
    let folder = tempfile::tempdir().unwrap();
    let key = |n: u8| ApiKeyRecord {
        id: uuid::Uuid::from_u128(n.into()).into(),
        tenant: Arc::from("one"),
        name: format!("key-{n}"),
        scopes: Arc::new([Scope::Sessions, Scope::Admin]),
        templates: (n > 1).then(|| Arc::from(["data".to_owned(), "python".to_owned()])),
        hash: KeyHash([n; 32]),
        created_at: Timestamp::from_second(1).unwrap(),
        expires_at: (n > 1).then(|| Timestamp::from_second(2).unwrap()),
    };
    let kept = left_after(folder.path(), |state| (1..4).for_each(|n| state.put_api_key(key(n)))).await;
    assert_eq!(kept.api_keys, [key(1), key(2), key(3)]);
    let kept = left_after(folder.path(), |state| {
        state.forget_api_key(key(1).id);
        // Nobody has heard of this one.
        state.put_api_key(key(4));
        state.forget_api_key(key(4).id);
    });
    assert_eq!(kept.await.api_keys, [key(2), key(3)]);
}

#[tokio::test]
async fn of_what_a_tenant_has_used_the_last_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let used =
        |tenant: &str, day, millis| UsageRecord { tenant: Arc::from(tenant), day, cpu: Duration::from_millis(millis) };
    let kept = left_after(folder.path(), |state| {
        [used("a", 1, 10), used("b", 1, 20), used("a", 1, 30)].into_iter().for_each(|record| state.put_usage(record));
    });
    assert_eq!(kept.await.usage, [used("a", 1, 30), used("b", 1, 20)]);
    let kept = left_after(folder.path(), |state| state.put_usage(used("a", 2, 5))).await;
    assert_eq!(kept.usage, [used("a", 2, 5), used("b", 1, 20)]);
}
