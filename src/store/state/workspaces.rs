//! Workspaces that outlive sessions: what each is, and what is left to do about it. Which session has one stands in the session's record.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::{Connection, Row, Transaction, params};

use super::StateError;
use crate::domain::ids::WorkspaceId;

/// How their table is made.
pub(super) const TABLE: &str = "CREATE TABLE workspaces (
        id TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        name TEXT NOT NULL,
        template TEXT NOT NULL,
        uid INTEGER,
        quota_bytes INTEGER,
        max_age_ms INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        last_used INTEGER NOT NULL,
        is_deleted INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;";

/// A workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkspaceRecord {
    /// Its id, which is a part of its name on the engine.
    pub id: WorkspaceId,
    /// Whose it is.
    pub tenant: Arc<str>,
    /// What its tenant calls it.
    pub name: String,
    /// The template whose sessions may have it.
    pub template: String,
    /// Whose its files are; nothing until the engine was heard to have made it.
    pub uid: Option<u32>,
    /// The most bytes that it may hold.
    pub quota_bytes: Option<u64>,
    /// It goes when no session has had it for this long.
    pub max_age: Duration,
    /// When it was made.
    pub created_at: Timestamp,
    /// When a session last got it or gave it back.
    pub last_used: Timestamp,
    /// It is its tenant's no more, and is to be removed.
    pub is_deleted: bool,
}

pub(super) fn write(record: &WorkspaceRecord, to: &Transaction<'_>) -> rusqlite::Result<()> {
    let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    to.prepare_cached(
        "INSERT INTO workspaces (id, tenant, name, template, uid, quota_bytes, max_age_ms, created_at, last_used, is_deleted)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
         ON CONFLICT (id) DO UPDATE SET uid = ?5, quota_bytes = ?6, max_age_ms = ?7, last_used = ?9, is_deleted = ?10",
    )?
    .execute(params![
        record.id.to_string(),
        &*record.tenant,
        record.name,
        record.template,
        record.uid,
        record.quota_bytes.map(whole),
        i64::try_from(record.max_age.as_millis()).unwrap_or(i64::MAX),
        record.created_at.as_millisecond(),
        record.last_used.as_millisecond(),
        record.is_deleted,
    ])?;
    Ok(())
}

pub(super) fn forget(id: WorkspaceId, to: &Transaction<'_>) -> rusqlite::Result<()> {
    to.prepare_cached("DELETE FROM workspaces WHERE id = ?1")?.execute([id.to_string()])?;
    Ok(())
}

pub(super) fn read_all(connection: &Connection) -> Result<Vec<WorkspaceRecord>, StateError> {
    let mut statement = connection.prepare(
        "SELECT id, tenant, name, template, uid, quota_bytes, max_age_ms, created_at, last_used, is_deleted
         FROM workspaces ORDER BY id",
    )?;
    let mut rows = statement.query([])?;
    let mut records = Vec::new();
    while let Some(row) = rows.next()? {
        records.push(read(row)?);
    }
    Ok(records)
}

fn read(row: &Row<'_>) -> Result<WorkspaceRecord, StateError> {
    let damaged = |why: String| StateError::Damaged(format!("a workspace can't be read: {why}"));
    let moment = |at: i64| Timestamp::from_millisecond(at).map_err(|e| damaged(e.to_string()));
    Ok(WorkspaceRecord {
        id: row.get::<_, String>(0)?.parse().map_err(|e: crate::domain::ids::InvalidId| damaged(e.to_string()))?,
        tenant: Arc::from(row.get::<_, String>(1)?),
        name: row.get(2)?,
        template: row.get(3)?,
        uid: row.get(4)?,
        quota_bytes: row.get::<_, Option<i64>>(5)?.map(i64::unsigned_abs),
        max_age: Duration::from_millis(row.get::<_, i64>(6)?.unsigned_abs()),
        created_at: moment(row.get(7)?)?,
        last_used: moment(row.get(8)?)?,
        is_deleted: row.get(9)?,
    })
}
