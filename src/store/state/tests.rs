use std::collections::BTreeMap;

use super::*;
use crate::domain::spec::{
    KernelTransport, NetworkMode, OnGuestLost, OnIdle, OnKernelDeath, OutputLimits, Resources, Timeouts,
};

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
        network: NetworkMode::None,
        setup: Arc::from(["a = 1\n".to_owned(), "é\u{0}".to_owned()]),
        on_kernel_death: OnKernelDeath::End,
        on_guest_lost: OnGuestLost::Replace,
        on_idle: OnIdle::Pause,
    };
    let context = ContextRecord {
        born: 3,
        is_ready: true,
        busy_until: Some(moment(9)),
        cwd: Some("/workspace/x".to_owned()),
        kernelspec: "python3".to_owned(),
        display_name: "Python 3".to_owned(),
        language: "python".to_owned(),
        language_info: Some(JsonText(r#"{"name": "python", "n": 1e400}"#.to_owned())),
        oom_seen: 2,
        oom_told: 1,
        ..ContextRecord::new(id(n + 100).into(), moment(7), Some("python3".to_owned()))
    };
    SessionRecord {
        id: id(n).into(),
        revision: 1,
        tenant: Arc::from("one"),
        spec: Arc::new(spec),
        stage: Stage::Live,
        lasting: Lasting::OnceReady,
        secret: LinkSecret([0xa5; 16]),
        created_at: moment(1),
        expires_at: moment(2),
        last_active: moment(3),
        idle: Duration::from_secs(8),
        labels: BTreeMap::from([("run".to_owned(), "42".to_owned())]),
        env: BTreeMap::from([("A".to_owned(), "1".to_owned())]),
        cells: 2,
        default_context: context.id,
        contexts: vec![context],
    }
}

/// Opens it, does something, and gives what is there afterwards.
async fn after(folder: &Path, change: impl FnOnce(&State)) -> Vec<SessionRecord> {
    let (state, _) = State::open(folder).unwrap();
    change(&state);
    state.settle().await.unwrap();
    drop(state);
    State::open(folder).unwrap().1
}

#[tokio::test]
async fn records_are_there_again_in_their_newest_form() {
    let folder = tempfile::tempdir().unwrap();
    let newest = SessionRecord { revision: 3, cells: 9, ..record(1) };
    let found = after(folder.path(), |state| {
        for record in [record(1), newest.clone(), SessionRecord { revision: 2, ..record(1) }, record(2)] {
            state.put(record);
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
    let found = after(folder.path(), |state| all.iter().for_each(|record| state.put(record.clone()))).await;
    assert_eq!(found, all);
    let found = after(folder.path(), |state| state.forget_ended(at)).await;
    assert_eq!(found.len(), 4, "nothing ended before that");
    let found = after(folder.path(), |state| state.forget_ended(Timestamp::from_second(101).unwrap())).await;
    assert_eq!(found, all[..3]);
}

#[tokio::test]
async fn a_record_of_a_server_that_could_not_pause_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let found = after(folder.path(), |state| state.put(record(1))).await;
    assert_eq!(found, [record(1)]);
    let connection = Connection::open(path_in(folder.path())).unwrap();
    for newer in [r#","on_idle":"pause""#, r#","paused":{"secs":3,"nanos":0}"#] {
        let older = "UPDATE sessions SET body = replace(body, ?1, '') WHERE instr(body, ?1)";
        assert_eq!(connection.execute(older, [newer]).unwrap(), 1, "{newer}");
    }
    drop(connection);
    let found = State::open(folder.path()).unwrap().1;
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
    let refused = || State::open(folder.path()).map(|_| ()).unwrap_err().to_string();
    alter("PRAGMA user_version = 99");
    assert!(refused().contains("version 99"), "{}", refused());
    alter("PRAGMA user_version = 1; PRAGMA application_id = 7");
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
async fn a_copy_is_made_while_a_server_works_and_opens_like_the_original() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (state, _) = State::open(folder.path()).unwrap();
    state.put(record(1));
    state.settle().await.unwrap();
    backup(folder.path(), &path_in(other.path())).unwrap();
    assert_eq!(State::open(other.path()).unwrap().1, [record(1)]);
    assert!(backup(folder.path(), &path_in(other.path())).is_err(), "nothing is overwritten");
}

#[tokio::test]
async fn what_can_not_be_committed_is_told_and_stays_until_it_can() {
    let folder = tempfile::tempdir().unwrap();
    let (state, _) = State::open(folder.path()).unwrap();
    let other = Connection::open(path_in(folder.path())).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    state.put(record(1));
    assert!(state.settle().await.is_err(), "another has it");
    state.put(SessionRecord { revision: 2, ..record(1) });
    other.execute_batch("ROLLBACK").unwrap();
    while state.settle().await.is_err() {}
    drop(state);
    assert_eq!(State::open(folder.path()).unwrap().1, [SessionRecord { revision: 2, ..record(1) }]);
}

#[test]
fn nobody_else_may_read_it() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    drop(State::open(folder.path()).unwrap());
    let mode = std::fs::metadata(path_in(folder.path())).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}
