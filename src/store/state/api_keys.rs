//! API keys that operators have made at run time. Their hashes only: a key itself is shown once and kept nowhere.

use std::sync::Arc;

use jiff::Timestamp;
use rusqlite::{Connection, Row, Transaction, params};

use super::StateError;
use crate::domain::access::{KeyHash, Scope};
use crate::domain::ids::KeyId;

/// How their table is made.
pub(super) const TABLE: &str = "CREATE TABLE api_keys (
        id TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        name TEXT NOT NULL,
        scopes TEXT NOT NULL,
        templates TEXT,
        hash TEXT NOT NULL UNIQUE,
        created_at INTEGER NOT NULL,
        expires_at INTEGER
    ) STRICT, WITHOUT ROWID;";

/// A key, but for the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKeyRecord {
    /// Its id.
    pub id: KeyId,
    /// Whose it is.
    pub tenant: Arc<str>,
    /// For people.
    pub name: String,
    /// What it allows.
    pub scopes: Arc<[Scope]>,
    /// The templates that it allows; nothing: all.
    pub templates: Option<Arc<[String]>>,
    /// Of the key.
    pub hash: KeyHash,
    /// When it was made.
    pub created_at: Timestamp,
    /// It is none any more from then on.
    pub expires_at: Option<Timestamp>,
}

pub(super) fn write(record: &ApiKeyRecord, to: &Transaction<'_>) -> rusqlite::Result<()> {
    let ApiKeyRecord { id, tenant, name, scopes, templates, hash, created_at, expires_at } = record;
    let scopes = scopes.iter().map(|scope| scope.name()).collect::<Vec<_>>().join(" ");
    to.prepare_cached(
        "INSERT INTO api_keys (id, tenant, name, scopes, templates, hash, created_at, expires_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT (id) DO NOTHING",
    )?
    .execute(params![
        id.to_string(),
        &**tenant,
        name,
        scopes,
        // Names of templates have no blanks.
        templates.as_ref().map(|names| names.join(" ")),
        hash.to_string(),
        created_at.as_millisecond(),
        expires_at.map(Timestamp::as_millisecond),
    ])?;
    Ok(())
}

pub(super) fn forget(id: KeyId, to: &Transaction<'_>) -> rusqlite::Result<()> {
    to.prepare_cached("DELETE FROM api_keys WHERE id = ?1")?.execute([id.to_string()])?;
    Ok(())
}

pub(super) fn read_all(connection: &Connection) -> Result<Vec<ApiKeyRecord>, StateError> {
    let mut statement = connection.prepare(
        "SELECT id, tenant, name, scopes, hash, templates, created_at, expires_at FROM api_keys ORDER BY id",
    )?;
    let mut rows = statement.query([])?;
    let mut records = Vec::new();
    while let Some(row) = rows.next()? {
        records.push(read(row)?);
    }
    Ok(records)
}

fn read(row: &Row<'_>) -> Result<ApiKeyRecord, StateError> {
    let text = |n| row.get::<_, String>(n);
    let damaged = |why: String| StateError::Damaged(format!("an API key can't be read: {why}"));
    let moment = |at: i64| Timestamp::from_millisecond(at).map_err(|e| damaged(e.to_string()));
    let scopes = text(3)?.split_whitespace().map(str::parse).collect::<Result<Vec<Scope>, _>>();
    let templates = row.get::<_, Option<String>>(5)?;
    Ok(ApiKeyRecord {
        id: text(0)?.parse().map_err(|e: crate::domain::ids::InvalidId| damaged(e.to_string()))?,
        tenant: Arc::from(text(1)?),
        name: text(2)?,
        scopes: scopes.map_err(|e| damaged(e.to_string()))?.into(),
        templates: templates.map(|names| names.split_whitespace().map(str::to_owned).collect()),
        hash: text(4)?.parse().map_err(|e: crate::domain::access::MalformedHash| damaged(e.to_string()))?,
        created_at: moment(row.get(6)?)?,
        expires_at: row.get::<_, Option<i64>>(7)?.map(moment).transpose()?,
    })
}
