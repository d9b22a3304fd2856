//! Who has asked for what, and what came of it: events that are added and never changed, the oldest of which go in time. It does not know what is worth an event.

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use jiff::{Timestamp, Unit};
use rusqlite::{Connection, OpenFlags, Transaction, named_params, params};
use serde::{Deserialize, Serialize};

use super::{PATIENCE, State, StateError, audit_file, path_in};
use crate::domain::ids::SessionId;

/// How the table is made. Numbers are not given twice, so that a reader who goes on after one misses nothing.
pub(super) const TABLE: &str = "CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at INTEGER NOT NULL,
        tenant TEXT,
        action TEXT NOT NULL,
        session TEXT,
        body TEXT NOT NULL
    ) STRICT;
    CREATE INDEX audit_at ON audit (at);
    CREATE INDEX audit_tenant ON audit (tenant, id);
    CREATE INDEX audit_action ON audit (action, id);
    CREATE INDEX audit_session ON audit (session, id) WHERE session IS NOT NULL;";

/// Events that may wait for a commit, and bytes of code in them. They do so only while the database can't be written.
const MAX_WAITING: (usize, usize) = (10_000, 64 * 1024 * 1024);

/// Bytes of events that are looked up at once, as they are kept; one event is always found, however long it is.
const MAX_FOUND: usize = 4 * 1024 * 1024;

/// One event. Written as JSON it is one line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditEvent {
    /// When it was over.
    pub at: Timestamp,
    /// Whose key it was; nothing for a key that is not valid.
    pub tenant: Option<String>,
    /// Which key it was, where that is known.
    pub key: Option<String>,
    /// Where the request came from.
    pub address: Option<IpAddr>,
    /// The request's id, as in the log; empty where there was no request.
    pub request: String,
    /// What was asked for: an operation of the API, or `refuse_key`; or what has happened: `end_session`, `leave_out_refused`.
    pub action: String,
    /// The path of what was asked for, or of what was made.
    pub target: String,
    /// The session that it was about.
    pub session: Option<String>,
    /// The context.
    pub context: Option<String>,
    /// The execution.
    pub execution: Option<String>,
    /// Bytes of code that was sent.
    pub code_bytes: Option<usize>,
    /// SHA-256 of that code, in hexadecimal digits.
    pub code_sha256: Option<String>,
    /// The code itself, where it is to be recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// The HTTP status of the answer; nothing if the caller left before it.
    pub status: Option<u16>,
    /// `ok`, the code of the problem, or `unanswered`; of what nobody has asked for, why.
    pub outcome: String,
    /// How many requests it stands for, where that is not one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
}

impl AuditEvent {
    /// One of this moment, of which nothing else is known yet.
    #[must_use]
    pub fn now(action: &str, outcome: &str) -> Self {
        let now = Timestamp::now();
        let at = now.round(Unit::Millisecond).unwrap_or(now);
        Self { at, action: action.to_owned(), outcome: outcome.to_owned(), ..Self::default() }
    }
}

/// Events in their order, with their numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditFound {
    /// As many as were wanted, or as fit.
    pub events: Vec<(i64, AuditEvent)>,
    /// Whether there are more after them.
    pub has_more: bool,
}

/// Which events are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditQuery {
    /// Of this tenant.
    pub tenant: Option<String>,
    /// About this session.
    pub session: Option<SessionId>,
    /// Of this action.
    pub action: Option<String>,
    /// Not before.
    pub since: Option<Timestamp>,
    /// Before.
    pub until: Option<Timestamp>,
    /// After the event of this number.
    pub after: i64,
    /// At most so many.
    pub limit: usize,
}

impl State {
    /// Adds an event. Never waits. Says whether there was room for it, as there is while the database can be written.
    pub fn put_audit(&self, event: AuditEvent) -> bool {
        let mut changes = self.waiting.changes();
        let code = |event: &AuditEvent| event.code.as_ref().map_or(0, String::len);
        let bytes = changes.audit.iter().map(code).sum::<usize>() + code(&event);
        let has_room = changes.audit.len() < MAX_WAITING.0 && bytes <= MAX_WAITING.1;
        if has_room {
            changes.audit.push(event);
        }
        drop(changes);
        self.wake();
        has_room
    }

    /// Forgets events from before a moment, and the oldest beyond a number. Never waits.
    pub fn forget_audit(&self, before: Timestamp, keep: u64) {
        self.waiting.changes().forget_audit = Some((before, keep));
        self.wake();
    }

    /// Has each event written to a file as well, a line of JSON each, once it is committed: those after the last that was copied to any file, or from now on.
    ///
    /// # Errors
    /// When the file can't be opened for adding to it.
    pub fn copy_audit_to(&self, path: &Path) -> io::Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut file = std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        audit_file::begin_line(path, &mut file)?;
        self.waiting.changes().audit_file = Some(file);
        self.wake();
        Ok(())
    }

    /// Events that are wanted; those that were put before are among them.
    ///
    /// # Errors
    /// See [`StateError`].
    pub async fn audit(&self, query: AuditQuery) -> Result<AuditFound, StateError> {
        self.settle().await?;
        let folder = Arc::clone(&self.folder);
        // A connection of its own: the thread that commits is not to wait for a long look.
        tokio::task::spawn_blocking(move || read(&folder, &query)).await.map_err(|_| StateError::Unwritten)?
    }
}

fn read(folder: &Path, query: &AuditQuery) -> Result<AuditFound, StateError> {
    let connection = Connection::open_with_flags(path_in(folder), OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    connection.busy_timeout(PATIENCE)?;
    let mut text = "SELECT id, body FROM audit WHERE id > :after".to_owned();
    let filters = [
        (query.tenant.is_some(), " AND tenant = :tenant"),
        (query.session.is_some(), " AND session = :session"),
        (query.action.is_some(), " AND action = :action"),
    ];
    filters.iter().filter(|(is_there, _)| *is_there).for_each(|(_, filter)| text.push_str(filter));
    text.push_str(" AND at >= :since AND at < :until ORDER BY id LIMIT :limit");
    let mut statement = connection.prepare(&text)?;
    let session = query.session.map(|id| id.to_string());
    let mut values: Vec<(&str, &dyn rusqlite::ToSql)> = Vec::new();
    let (since, until) = (
        query.since.map_or(i64::MIN, |at| at.as_millisecond()),
        query.until.map_or(i64::MAX, |at| at.as_millisecond()),
    );
    // One more tells whether there are more.
    let limit = i64::try_from(query.limit).unwrap_or(i64::MAX).saturating_add(1);
    values.extend_from_slice(named_params! {":after": query.after, ":since": since, ":until": until, ":limit": limit});
    for (name, value) in [(":tenant", &query.tenant), (":session", &session), (":action", &query.action)] {
        if let Some(value) = value {
            values.push((name, value));
        }
    }
    let mut rows = statement.query(values.as_slice())?;
    let (mut found, mut bytes) = (AuditFound::default(), 0);
    while let Some(row) = rows.next()? {
        let (id, body): (i64, String) = (row.get(0)?, row.get(1)?);
        bytes += body.len();
        found.has_more = found.events.len() == query.limit || (bytes > MAX_FOUND && !found.events.is_empty());
        if found.has_more {
            break;
        }
        let event = serde_json::from_str(&body)
            .map_err(|e| StateError::Damaged(format!("the audit event {id} can't be read: {e}")))?;
        found.events.push((id, event));
    }
    Ok(found)
}

pub(super) fn write(event: &AuditEvent, to: &Transaction<'_>) -> rusqlite::Result<()> {
    let mut add =
        to.prepare_cached("INSERT INTO audit (at, tenant, action, session, body) VALUES (?1, ?2, ?3, ?4, ?5)")?;
    add.execute(params![event.at.as_millisecond(), event.tenant, event.action, event.session, line(event)])?;
    Ok(())
}

/// What comes later has the higher number, so the oldest beyond `keep` are those that far below the newest.
pub(super) fn forget((before, keep): (Timestamp, u64), to: &Transaction<'_>) -> rusqlite::Result<()> {
    to.prepare_cached("DELETE FROM audit WHERE at < ?1")?.execute([before.as_millisecond()])?;
    let keep = i64::try_from(keep).unwrap_or(i64::MAX);
    to.prepare_cached("DELETE FROM audit WHERE id <= (SELECT max(id) FROM audit) - ?1")?.execute([keep])?;
    Ok(())
}

fn line(event: &AuditEvent) -> String {
    // A plain structure of texts and numbers: writing it can't fail.
    serde_json::to_string(event).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(second: i64, tenant: &str, action: &str, session: Option<u128>) -> AuditEvent {
        AuditEvent {
            at: Timestamp::from_second(second).unwrap(),
            tenant: Some(tenant.to_owned()),
            address: "192.0.2.7".parse().ok(),
            request: format!("req{second}"),
            target: "/v1/sessions".to_owned(),
            session: session.map(|id| SessionId::from(uuid::Uuid::from_u128(id)).to_string()),
            code_bytes: Some(3),
            code_sha256: Some("abc".to_owned()),
            status: Some(200),
            ..AuditEvent::now(action, "ok")
        }
    }

    fn events() -> Vec<AuditEvent> {
        vec![
            event(1, "one", "create_session", Some(1)),
            event(2, "two", "create_session", Some(2)),
            event(3, "one", "create_execution", Some(1)),
            event(4, "one", "delete_session", Some(1)),
            event(5, "two", "delete_session", Some(2)),
        ]
    }

    /// The requests of the events that are found.
    async fn found(state: &State, query: AuditQuery) -> Vec<String> {
        let found = state.audit(query).await.unwrap();
        found.events.into_iter().map(|(_, event)| event.request).collect()
    }

    fn all() -> AuditQuery {
        AuditQuery { limit: 100, ..AuditQuery::default() }
    }

    #[tokio::test]
    async fn events_are_found_by_who_what_where_and_when_over_restarts() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path(), None).unwrap().0;
        events().into_iter().for_each(|event| assert!(state.put_audit(event)));
        let whole = state.audit(all()).await.unwrap().events;
        assert_eq!(whole.iter().map(|(_, event)| event.clone()).collect::<Vec<_>>(), events());
        drop(state);

        let state = State::open(folder.path(), None).unwrap().0;
        let second = |second| Timestamp::from_second(second).ok();
        for (query, wanted) in [
            (AuditQuery { tenant: Some("two".to_owned()), ..all() }, vec!["req2", "req5"]),
            (AuditQuery { session: Some(uuid::Uuid::from_u128(1).into()), ..all() }, vec!["req1", "req3", "req4"]),
            (AuditQuery { action: Some("delete_session".to_owned()), ..all() }, vec!["req4", "req5"]),
            (AuditQuery { since: second(2), until: second(4), ..all() }, vec!["req2", "req3"]),
            (AuditQuery { tenant: Some("one".to_owned()), since: second(3), limit: 1, ..all() }, vec!["req3"]),
            (AuditQuery { after: whole[2].0, limit: 1, ..all() }, vec!["req4"]),
            (AuditQuery { tenant: Some("' OR 1 --".to_owned()), ..all() }, vec![]),
        ] {
            assert_eq!(found(&state, query.clone()).await, wanted, "{query:?}");
        }
    }

    #[tokio::test]
    async fn the_oldest_go_by_age_and_by_number_and_no_number_comes_again() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path(), None).unwrap().0;
        events().into_iter().for_each(|event| assert!(state.put_audit(event)));
        let last = state.audit(all()).await.unwrap().events[4].0;
        state.forget_audit(Timestamp::from_second(3).unwrap(), 100);
        assert_eq!(found(&state, all()).await, ["req3", "req4", "req5"]);
        state.forget_audit(Timestamp::MIN, 2);
        assert_eq!(found(&state, all()).await, ["req4", "req5"]);
        state.forget_audit(Timestamp::MAX, 0);
        assert_eq!(found(&state, all()).await, Vec::<String>::new());
        assert!(state.put_audit(event(6, "one", "create_session", None)));
        assert!(state.audit(all()).await.unwrap().events[0].0 > last);
    }

    #[tokio::test]
    async fn what_is_found_at_once_is_bounded_by_number_and_by_bytes_and_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path(), None).unwrap().0;
        let code = |bytes: usize| AuditEvent { code: Some("x".repeat(bytes)), ..event(1, "one", "create_run", None) };
        let lengths = [MAX_FOUND / 2, MAX_FOUND / 4, MAX_FOUND / 2, MAX_FOUND + 1, 1, 1];
        lengths.iter().for_each(|bytes| assert!(state.put_audit(code(*bytes))));
        let (mut pages, mut query) = (Vec::new(), AuditQuery { limit: 2, ..AuditQuery::default() });
        loop {
            let AuditFound { events, has_more } = state.audit(query.clone()).await.unwrap();
            pages.push(events.len());
            query.after = events.last().unwrap().0;
            if !has_more {
                break;
            }
        }
        assert_eq!(pages, [2, 1, 1, 2]);
        query.after = 0;
        query.limit = 100;
        assert_eq!(state.audit(query).await.unwrap().events.len(), 2);
    }

    #[tokio::test]
    async fn what_could_not_be_committed_is_kept_in_order_and_copied_once() {
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("audit.jsonl");
        let state = State::open(folder.path(), None).unwrap().0;
        state.copy_audit_to(&copy).unwrap();
        let other = Connection::open(path_in(folder.path())).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let mut events = events().into_iter();
        assert!(state.put_audit(events.next().unwrap()));
        assert!(state.settle().await.is_err(), "another has it");
        events.for_each(|event| assert!(state.put_audit(event)));
        other.execute_batch("ROLLBACK").unwrap();
        while state.settle().await.is_err() {}
        assert_eq!(found(&state, all()).await, ["req1", "req2", "req3", "req4", "req5"]);
        let lines = std::fs::read_to_string(&copy).unwrap();
        let requests = lines.lines().map(|line| serde_json::from_str::<AuditEvent>(line).unwrap().request);
        assert_eq!(requests.collect::<Vec<_>>(), ["req1", "req2", "req3", "req4", "req5"]);
    }

    #[tokio::test]
    async fn only_so_many_events_wait_for_a_database_that_can_not_be_written() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path(), None).unwrap().0;
        let other = Connection::open(path_in(folder.path())).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let large = || AuditEvent { code: Some("x".repeat(MAX_WAITING.1 / 4)), ..event(1, "one", "create_run", None) };
        let kept = (0..8).filter(|_| state.put_audit(large())).count();
        // The thread may hold some of them, which it could not commit yet.
        assert!((4..8).contains(&kept), "{kept}");
        drop(other);
    }
}
