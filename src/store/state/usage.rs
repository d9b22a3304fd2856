//! What tenants have used of their CPU time, each of its last day only.

use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, Transaction, params};

use super::StateError;

/// How their table is made.
pub(super) const TABLE: &str = "CREATE TABLE usage (
        tenant TEXT PRIMARY KEY,
        day INTEGER NOT NULL,
        cpu_us INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;";

/// A tenant's day.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageRecord {
    /// Whose it is.
    pub tenant: Arc<str>,
    /// In days since 1970, of UTC.
    pub day: i64,
    /// CPU time of all executions that ended on it.
    pub cpu: Duration,
}

pub(super) fn write(record: &UsageRecord, to: &Transaction<'_>) -> rusqlite::Result<()> {
    let UsageRecord { tenant, day, cpu } = record;
    let micros = i64::try_from(cpu.as_micros()).unwrap_or(i64::MAX);
    to.prepare_cached(
        "INSERT INTO usage (tenant, day, cpu_us) VALUES (?1, ?2, ?3)
         ON CONFLICT (tenant) DO UPDATE SET day = ?2, cpu_us = ?3",
    )?
    .execute(params![&**tenant, day, micros])?;
    Ok(())
}

/// Forgets what was used before a day.
pub(super) fn forget_before(day: i64, to: &Transaction<'_>) -> rusqlite::Result<()> {
    to.prepare_cached("DELETE FROM usage WHERE day < ?1")?.execute([day])?;
    Ok(())
}

pub(super) fn read_all(connection: &Connection) -> Result<Vec<UsageRecord>, StateError> {
    let mut statement = connection.prepare("SELECT tenant, day, cpu_us FROM usage ORDER BY tenant")?;
    let rows = statement.query_map([], |row| {
        let cpu = Duration::from_micros(row.get::<_, i64>(2)?.unsigned_abs());
        Ok(UsageRecord { tenant: Arc::from(row.get::<_, String>(0)?), day: row.get(1)?, cpu })
    })?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}
