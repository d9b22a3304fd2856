//! What executions leave: what is to be run once, how far it is whenever that changes, and each event as it comes.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use rusqlite::{Connection, Transaction, params};

use super::{StateError, execution_form as form};
use crate::domain::execution::ExecutionRequest;
use crate::domain::ids::{ContextId, ExecutionId, SessionId};
use crate::domain::output::{ExecutionEvent, Report, RestartCause, Status};

/// How their tables are made.
pub(super) const TABLES: &str = "CREATE TABLE executions (
        id TEXT PRIMARY KEY,
        session TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
        birth TEXT NOT NULL,
        progress TEXT NOT NULL,
        running TEXT
    ) STRICT;
    CREATE INDEX executions_session ON executions (session);
    CREATE TABLE events (
        execution TEXT NOT NULL REFERENCES executions (id) ON DELETE CASCADE,
        seq INTEGER NOT NULL,
        at INTEGER NOT NULL,
        body TEXT NOT NULL,
        PRIMARY KEY (execution, seq)
    ) STRICT;
    CREATE TABLE heard (
        session TEXT PRIMARY KEY REFERENCES sessions (id) ON DELETE CASCADE,
        cell INTEGER NOT NULL,
        seq INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;";

/// An event with its place in the order.
#[derive(Debug, Clone, PartialEq)]
pub struct Logged {
    /// Rises by one from 1.
    pub seq: u64,
    /// When the control plane had it.
    pub at: Timestamp,
    /// What happened.
    pub event: ExecutionEvent,
}

/// What an execution is, and stays.
#[derive(Debug, Clone, PartialEq)]
pub struct Birth {
    /// Its context.
    pub context: ContextId,
    /// Its context's language.
    pub language: String,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// What is to be run.
    pub request: Arc<ExecutionRequest>,
}

/// How far an execution is, beside its events.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// How far it is, or how it ended.
    pub status: Status,
    /// When it began to run.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// What is known of it.
    pub report: Report,
}

/// What is known of an execution that runs, beside its events: what the next process could not hear again.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RunningRecord {
    /// The content of the kernel's reply, which has come before the kernel was idle.
    pub reply: Option<String>,
    /// The kernel is idle again, and has not replied.
    pub is_idle: bool,
    /// Lines of its input that it was given.
    pub lines_given: usize,
    /// How often it was told that there are no more.
    pub ends_told: u32,
    /// The header of the request for input that waits for a caller.
    pub asked: Option<String>,
    /// Its exception is among its events.
    pub error_told: bool,
    /// A process of the cell was ended for want of memory while it ran.
    pub memory_hit: bool,
    /// Why it is being stopped, and since when.
    pub verdict: Option<(Status, Timestamp)>,
    /// Its kernel is being replaced: how that ends it, why, and what has happened to the kernel, for people.
    pub replacing: Option<(Status, RestartCause, String)>,
}

/// An execution as an earlier process has left it.
#[derive(Debug, Clone, PartialEq)]
pub struct ExecutionRecord {
    /// Its id.
    pub id: ExecutionId,
    /// Its session.
    pub session: SessionId,
    /// What it is.
    pub birth: Birth,
    /// How far it is.
    pub progress: Progress,
    /// What is known of it while it runs.
    pub running: Option<RunningRecord>,
    /// Its events in order.
    pub events: Vec<Arc<Logged>>,
}

/// What has changed of an execution.
#[derive(Debug, Clone, PartialEq)]
pub struct ExecutionChange {
    /// Its id.
    pub id: ExecutionId,
    /// What it is, the first time.
    pub birth: Option<Birth>,
    /// How far it is, if that has changed; always the first time.
    pub progress: Option<Progress>,
    /// What is known of it while it runs, if that has changed.
    pub running: Option<RunningRecord>,
    /// Events that are new, or are not as they were.
    pub events: Vec<Arc<Logged>>,
}

impl ExecutionChange {
    /// Whether nobody else knows of it: what a kernel has told, its guest tells the next process again.
    pub(super) fn is_urgent(&self) -> bool {
        let is_told_by_its_kernel = |status| matches!(status, Status::Ok | Status::Error | Status::InputDenied);
        let is_end = |progress: &Progress| progress.status.is_final() && !is_told_by_its_kernel(progress.status);
        self.birth.is_some() || self.progress.as_ref().is_some_and(is_end)
    }
}

/// What waits to be committed of one execution. Events are shared with the record, so waiting takes no room for them.
#[derive(Debug)]
pub(super) struct Pending {
    session: SessionId,
    birth: Option<Birth>,
    progress: Option<Progress>,
    running: Option<RunningRecord>,
    events: Vec<Arc<Logged>>,
}

impl Pending {
    pub(super) fn new(session: SessionId) -> Self {
        Self { session, birth: None, progress: None, running: None, events: Vec::new() }
    }

    /// Adds what came after it.
    pub(super) fn add(&mut self, later: ExecutionChange) {
        self.birth = later.birth.or(self.birth.take());
        self.progress = later.progress.or(self.progress.take());
        self.running = later.running.or(self.running.take());
        self.events.extend(later.events);
    }

    /// Puts back what came before it, and could not be committed.
    pub(super) fn put_back(&mut self, earlier: Self) {
        self.birth = self.birth.take().or(earlier.birth);
        self.progress = self.progress.take().or(earlier.progress);
        self.running = self.running.take().or(earlier.running);
        let later = std::mem::replace(&mut self.events, earlier.events);
        self.events.extend(later);
    }

    /// Whether it refers to what the archive has, or its cell in the notebook is not written again after this.
    pub(super) fn needs_archive(&self) -> bool {
        let is_over = self.progress.as_ref().is_some_and(|progress| progress.status.is_final());
        is_over || self.events.iter().any(|logged| logged.event.blobs().next().is_some())
    }

    pub(super) fn write(&self, id: ExecutionId, to: &Transaction<'_>) -> rusqlite::Result<()> {
        let id = id.to_string();
        if let (Some(birth), Some(progress)) = (&self.birth, &self.progress) {
            to.prepare_cached(
                "INSERT INTO executions (id, session, birth, progress) SELECT ?1, ?2, ?3, ?4
                 WHERE EXISTS (SELECT 1 FROM sessions WHERE id = ?2) ON CONFLICT (id) DO NOTHING",
            )?
            .execute(params![
                id,
                self.session.to_string(),
                written(form::birth_text(birth))?,
                written(form::progress_text(progress))?
            ])?;
        } else if let Some(progress) = &self.progress {
            to.prepare_cached("UPDATE executions SET progress = ?2 WHERE id = ?1")?
                .execute(params![id, written(form::progress_text(progress))?])?;
        }
        let is_over = self.progress.as_ref().is_some_and(|progress| progress.status.is_final());
        if is_over || self.running.is_some() {
            let running = self.running.as_ref().filter(|_| !is_over).map(form::running_text).transpose();
            to.prepare_cached("UPDATE executions SET running = ?2 WHERE id = ?1")?
                .execute(params![id, written(running)?])?;
        }
        // What was forgotten meanwhile has no row any more.
        let mut put = to.prepare_cached(
            "INSERT INTO events (execution, seq, at, body) SELECT ?1, ?2, ?3, ?4
             WHERE EXISTS (SELECT 1 FROM executions WHERE id = ?1)
             ON CONFLICT (execution, seq) DO UPDATE SET body = ?4",
        )?;
        for logged in &self.events {
            let body = written(form::event_text(&logged.event))?;
            put.execute(params![id, logged.seq.cast_signed(), logged.at.as_microsecond(), body])?;
        }
        Ok(())
    }
}

fn written<T>(text: serde_json::Result<T>) -> rusqlite::Result<T> {
    text.map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))
}

/// The number of the last event that a session has heard of the guest in a cell.
pub(super) fn write_heard(session: SessionId, (cell, seq): (u32, u64), to: &Transaction<'_>) -> rusqlite::Result<()> {
    to.prepare_cached(
        "INSERT INTO heard (session, cell, seq) SELECT ?1, ?2, ?3 WHERE EXISTS (SELECT 1 FROM sessions WHERE id = ?1)
         ON CONFLICT (session) DO UPDATE SET cell = ?2, seq = ?3",
    )?
    .execute(params![session.to_string(), cell, seq.cast_signed()])?;
    Ok(())
}

/// How far each session has heard the guest of its cell.
pub(super) fn read_heard(connection: &Connection) -> Result<HashMap<SessionId, (u32, u64)>, StateError> {
    let mut statement = connection.prepare("SELECT session, cell, seq FROM heard")?;
    let rows = statement.query_map([], |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, u32>(1)?, row.get::<_, i64>(2)?.cast_unsigned()))
    })?;
    let read = |row: rusqlite::Result<(String, u32, u64)>| {
        let (session, cell, seq) = row?;
        let session = session.parse().map_err(|_| StateError::Damaged(format!("{session} is no session's id")))?;
        Ok((session, (cell, seq)))
    };
    rows.map(read).collect()
}

/// All executions in the order in which they were accepted.
pub(super) fn read_all(connection: &Connection) -> Result<Vec<ExecutionRecord>, StateError> {
    let mut events = events_of(connection)?;
    let mut statement =
        connection.prepare("SELECT id, session, birth, progress, running FROM executions ORDER BY id")?;
    let rows = statement.query_map([], |row| {
        let text = |n| row.get::<_, String>(n);
        Ok(([text(0)?, text(1)?, text(2)?, text(3)?], row.get::<_, Option<String>>(4)?))
    })?;
    let mut records = Vec::new();
    for row in rows {
        let ([id, session, birth, progress], running) = row?;
        let damaged = |e: serde_json::Error| StateError::Damaged(format!("the record of {id} can't be read: {e}"));
        records.push(ExecutionRecord {
            events: events.remove(&id).unwrap_or_default(),
            id: form::parsed(&id).map_err(damaged)?,
            session: form::parsed(&session).map_err(damaged)?,
            birth: form::read_birth(&birth).map_err(damaged)?,
            progress: form::read_progress(&progress).map_err(damaged)?,
            running: running.as_deref().map(form::read_running).transpose().map_err(damaged)?,
        });
    }
    Ok(records)
}

fn events_of(connection: &Connection) -> Result<HashMap<String, Vec<Arc<Logged>>>, StateError> {
    let mut statement = connection.prepare("SELECT execution, seq, at, body FROM events ORDER BY execution, seq")?;
    let rows = statement.query_map([], |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?, row.get::<_, String>(3)?))
    })?;
    let mut events: HashMap<String, Vec<Arc<Logged>>> = HashMap::new();
    for row in rows {
        let (execution, seq, at, body) = row?;
        let damaged = |why: String| StateError::Damaged(format!("event {seq} of {execution} can't be read: {why}"));
        let event = form::read_event(&body).map_err(|e| damaged(e.to_string()))?;
        let at = Timestamp::from_microsecond(at).map_err(|e| damaged(e.to_string()))?;
        let of_one = events.entry(execution.clone()).or_default();
        // A reader finds an event by its number.
        if of_one.len() as i64 + 1 != seq {
            return Err(damaged(format!("it comes after event {}", of_one.len())));
        }
        of_one.push(Arc::new(Logged { seq: seq.cast_unsigned(), at, event }));
    }
    Ok(events)
}
