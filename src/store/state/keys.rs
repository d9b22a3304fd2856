//! Keys that callers have given to requests, and what came of those.

use std::sync::Arc;

use jiff::Timestamp;
use rusqlite::{Connection, Transaction, params};

use super::{StateError, execution_form::parsed};
use crate::domain::ids::{CommandId, ContextId, ExecutionId, SessionId};

/// How their table is made.
pub(super) const TABLE: &str = "CREATE TABLE keys (
        tenant TEXT NOT NULL,
        key TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        made TEXT NOT NULL,
        at INTEGER NOT NULL,
        is_answered INTEGER NOT NULL,
        PRIMARY KEY (tenant, key)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX keys_at ON keys (at);";

/// What a request has made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// A session.
    Session(SessionId),
    /// An execution.
    Execution(ExecutionId),
    /// A context of a session.
    Context(SessionId, ContextId),
    /// A command of a session.
    Command(SessionId, CommandId),
}

/// A caller's key for a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRecord {
    /// Whose it is.
    pub tenant: Arc<str>,
    /// As the caller gave it.
    pub key: String,
    /// Of the request.
    pub fingerprint: String,
    /// What came of it, or was to come.
    pub made: Made,
    /// When it came.
    pub at: Timestamp,
    /// Its caller was told, or is about to be.
    pub is_answered: bool,
}

fn made_text(made: Made) -> String {
    match made {
        Made::Session(id) => id.to_string(),
        Made::Execution(id) => id.to_string(),
        Made::Context(session, context) => format!("{session}/{context}"),
        Made::Command(session, command) => format!("{session}/{command}"),
    }
}

fn read_made(text: &str) -> serde_json::Result<Made> {
    match text.split_once('/') {
        Some((session, part)) => {
            let session = parsed(session)?;
            let context = part.parse().map(|context| Made::Context(session, context));
            context.or_else(|_| Ok(Made::Command(session, parsed(part)?)))
        }
        None => text.parse().map(Made::Session).or_else(|_| parsed(text).map(Made::Execution)),
    }
}

pub(super) fn write(record: &KeyRecord, to: &Transaction<'_>) -> rusqlite::Result<()> {
    let KeyRecord { tenant, key, fingerprint, made, at, is_answered } = record;
    to.prepare_cached(
        "INSERT INTO keys (tenant, key, fingerprint, made, at, is_answered) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (tenant, key) DO UPDATE SET fingerprint = ?3, made = ?4, at = ?5, is_answered = ?6",
    )?
    .execute(params![&**tenant, key, fingerprint, made_text(*made), at.as_millisecond(), is_answered])?;
    Ok(())
}

pub(super) fn forget(tenant: &str, key: &str, to: &Transaction<'_>) -> rusqlite::Result<()> {
    to.prepare_cached("DELETE FROM keys WHERE tenant = ?1 AND key = ?2")?.execute([tenant, key])?;
    Ok(())
}

pub(super) fn forget_before(moment: Timestamp, to: &Transaction<'_>) -> rusqlite::Result<()> {
    to.prepare_cached("DELETE FROM keys WHERE at < ?1")?.execute([moment.as_millisecond()])?;
    Ok(())
}

pub(super) fn read_all(connection: &Connection) -> Result<Vec<KeyRecord>, StateError> {
    let mut statement =
        connection.prepare("SELECT tenant, key, fingerprint, made, at, is_answered FROM keys ORDER BY tenant, key")?;
    let rows = statement.query_map([], |row| {
        let text = |n| row.get::<_, String>(n);
        Ok(([text(0)?, text(1)?, text(2)?, text(3)?], row.get::<_, i64>(4)?, row.get(5)?))
    })?;
    let mut records = Vec::new();
    for row in rows {
        let ([tenant, key, fingerprint, made], at, is_answered) = row?;
        let damaged = |why: String| StateError::Damaged(format!("an idempotency key can't be read: {why}"));
        let made = read_made(&made).map_err(|e| damaged(e.to_string()))?;
        let at = Timestamp::from_millisecond(at).map_err(|e| damaged(e.to_string()))?;
        records.push(KeyRecord { tenant: Arc::from(tenant), key, fingerprint, made, at, is_answered });
    }
    Ok(records)
}
