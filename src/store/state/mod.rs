//! What sessions and their executions leave for the next process, in an SQLite database behind one thread that commits. It knows nothing of engines,
//! and never says what should become of a session.
//!
//! Durability is against the end of the process, not of the machine's power (WAL, `synchronous=NORMAL`).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cellblock_wire::marker::LinkSecret;
use jiff::Timestamp;
use rusqlite::{Connection, params};
use tokio::sync::{mpsc, oneshot};

use crate::domain::egress::Network;
use crate::domain::ids::{ContextId, ExecutionId, KeyId, SessionId, WorkspaceId};
use crate::domain::lifecycle::EndReason;
use crate::domain::output::{JsonText, RestartCause};
use crate::domain::spec::SessionSpec;
use crate::metrics::Commits;
use crate::store::Archive;

mod api_keys;
mod audit;
mod audit_file;
mod execution_form;
mod executions;
mod form;
mod keys;
mod network_form;
#[cfg(test)]
mod tests;
mod usage;
mod workspaces;

pub use api_keys::ApiKeyRecord;
pub use audit::{AuditEvent, AuditFound, AuditQuery};
use audit_file::Copying;
use executions::Pending;
pub use executions::{Birth, ExecutionChange, ExecutionRecord, Logged, Progress, RunningRecord};
pub use keys::{KeyRecord, Made};
pub use usage::UsageRecord;
pub use workspaces::WorkspaceRecord;

/// The database's name in the data folder.
const FILE: &str = "state.db";
/// Marks the file as ours, in its header (`PRAGMA application_id`): "cell".
const APPLICATION_ID: i32 = 0x6365_6c6c;
/// How the tables are made: each step brings the database from the version of its place to the next.
const MIGRATIONS: [&str; 8] = [
    SESSIONS,
    executions::TABLES,
    keys::TABLE,
    api_keys::TABLE,
    usage::TABLE,
    audit::TABLE,
    audit_file::TABLE,
    workspaces::TABLE,
];
const SESSIONS: &str = "CREATE TABLE sessions (
        id TEXT PRIMARY KEY,
        revision INTEGER NOT NULL,
        ended_at INTEGER,
        body TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX sessions_ended ON sessions (ended_at) WHERE ended_at IS NOT NULL;";
/// Longest wait for another process that has the database open.
const PATIENCE: Duration = Duration::from_secs(5);
/// Who may wait for a commit.
const QUEUE: usize = 1024;
/// What could not be committed is tried again after this long.
const RETRY: Duration = Duration::from_millis(500);

/// Why there is no database to work with. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It can't be read or written.
    #[error("{0}")]
    Database(#[from] rusqlite::Error),
    /// A newer server has written it.
    #[error(
        "it has version {found}, and this server knows versions up to {known}: start the newer server, or restore a copy"
    )]
    Newer {
        /// The version of the file.
        found: i64,
        /// The newest that is known here.
        known: usize,
    },
    /// Something else is in the file.
    #[error("it is the database of another program")]
    Foreign,
    /// What is in it contradicts itself.
    #[error(
        "it is damaged ({0}): restore a copy made with `cellblock backup`, or move it away to begin anew, which ends the sessions in it"
    )]
    Damaged(String),
    /// A copy can't be made there.
    #[error("a copy can't be made there: {0}")]
    Copy(String),
    /// The thread that writes it is gone, or could not write.
    #[error("it can't be written")]
    Unwritten,
}

/// What a session leaves.
#[derive(Debug, Clone, PartialEq)]
pub struct SessionRecord {
    /// Its id.
    pub id: SessionId,
    /// Rises with every change; an older one never takes the place of a newer.
    pub revision: u64,
    /// Whose it is.
    pub tenant: Arc<str>,
    /// What it is, but for its environment and labels.
    pub spec: Arc<SessionSpec>,
    /// Where it is in its life.
    pub stage: Stage,
    /// Whether it outlives the process.
    pub lasting: Lasting,
    /// Its working folder, if that outlives it.
    pub workspace: Option<WorkspaceId>,
    /// It was there before it was asked for.
    pub is_warm: bool,
    /// What opens the link to its guest.
    pub secret: LinkSecret,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it ends for its age.
    pub expires_at: Timestamp,
    /// When something was last asked of it.
    pub last_active: Timestamp,
    /// It ends after this long without work.
    pub idle: Duration,
    /// For finding it again.
    pub labels: std::collections::BTreeMap<String, String>,
    /// What it may reach.
    pub network: Network,
    /// Set for every process.
    pub env: std::collections::BTreeMap<String, String>,
    /// How many cells it has had.
    pub cells: u32,
    /// What became of the last one, for people, where that ended it.
    pub loss: Option<String>,
    /// The context of executions that name none.
    pub default_context: ContextId,
    /// Its contexts in the order of their creation.
    pub contexts: Vec<ContextRecord>,
}

/// What a context leaves.
#[derive(Debug, Clone, PartialEq)]
pub struct ContextRecord {
    /// Its id.
    pub id: ContextId,
    /// When it was created.
    pub created_at: Timestamp,
    /// How many kernels it has had; the last one has the number in its name.
    pub born: u32,
    /// Whether that one was up and prepared.
    pub is_ready: bool,
    /// The kernelspec that was asked for.
    pub asked_kernelspec: Option<String>,
    /// The working folder that was asked for.
    pub cwd: Option<String>,
    /// The image's kernelspec.
    pub kernelspec: String,
    /// Its name for people.
    pub display_name: String,
    /// Its language.
    pub language: String,
    /// What it says of its language.
    pub language_info: Option<JsonText>,
    /// Processes of the cell ended for want of memory, as far as it has heard.
    pub oom_seen: u64,
    /// Kernels of the cell that were told to be among them.
    pub oom_told: u64,
    /// Why the kernel is another one, if the next execution is still to be told.
    pub replaced: Option<RestartCause>,
}

impl ContextRecord {
    /// One that has no kernel yet.
    #[must_use]
    pub fn new(id: ContextId, created_at: Timestamp, asked_kernelspec: Option<String>) -> Self {
        Self {
            id,
            created_at,
            born: 0,
            is_ready: false,
            asked_kernelspec,
            cwd: None,
            kernelspec: String::new(),
            display_name: String::new(),
            language: String::new(),
            language_info: None,
            oom_seen: 0,
            oom_told: 0,
            replaced: None,
        }
    }
}

/// Whether a session outlives the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lasting {
    /// It does: somebody has heard of it.
    Always,
    /// Once it is ready: until then, whoever asked for it waits for that, and is not there any more afterwards.
    OnceReady,
    /// It does not, unless something still runs in it: it is for one caller, who waits for its end, or is nobody's yet.
    Never,
}

/// Where a session is in its life, as far as the next process needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// It has no kernel that answers yet, or has none any more and is to get another container.
    Starting,
    /// Code can run.
    Live,
    /// Its container is frozen, or is to be; nothing runs in it.
    Paused(Timestamp),
    /// Its container is to go.
    Ending(EndReason),
    /// Its container was seen to be gone.
    Ended(EndReason, Timestamp),
}

/// The database. Clones are the same; the last one to go ends the thread, once what it was told is committed.
#[derive(Debug, Clone)]
pub struct State {
    waiting: Waiting,
    commands: mpsc::Sender<Command>,
    is_written: Arc<AtomicBool>,
    commits: Commits,
    folder: Arc<Path>,
}

/// What one turn of a session's task has brought. It is committed whole.
#[derive(Debug)]
pub struct Turn {
    /// The session.
    pub session: SessionId,
    /// What it leaves, if that has changed.
    pub record: Option<SessionRecord>,
    /// Which of its cells it hears, and the number of the last event of its guest that is in here or in an earlier turn.
    pub heard: (u32, u64),
    /// What has changed of its executions.
    pub executions: Vec<ExecutionChange>,
}

/// What an earlier process has left.
#[derive(Debug, Default, PartialEq)]
pub struct Left {
    /// Sessions in the order of their creation.
    pub sessions: Vec<SessionRecord>,
    /// Executions in the order in which they were accepted.
    pub executions: Vec<ExecutionRecord>,
    /// Which cell each session has heard last, and how far.
    pub heard: HashMap<SessionId, (u32, u64)>,
    /// Keys of requests.
    pub keys: Vec<KeyRecord>,
    /// Keys of callers.
    pub api_keys: Vec<ApiKeyRecord>,
    /// What tenants have used.
    pub usage: Vec<UsageRecord>,
    /// Workspaces that outlive sessions.
    pub workspaces: Vec<WorkspaceRecord>,
}

/// What is to be committed: of each session the newest record only, so that many changes of one are one. It stays until it is committed.
#[derive(Debug, Clone, Default)]
struct Waiting(Arc<Mutex<Changes>>);

#[derive(Debug, Default)]
struct Changes {
    records: HashMap<SessionId, SessionRecord>,
    heard: HashMap<SessionId, (u32, u64)>,
    executions: HashMap<ExecutionId, Pending>,
    forget_executions: Vec<ExecutionId>,
    /// Of each key of a tenant what it is for now, or that it is free.
    keys: HashMap<(Arc<str>, String), Option<KeyRecord>>,
    forget_keys_before: Option<Timestamp>,
    /// Of each API key what it is, or that it is none any more.
    api_keys: HashMap<KeyId, Option<ApiKeyRecord>>,
    usage: HashMap<Arc<str>, UsageRecord>,
    /// Of each workspace what it is, or that it is none any more.
    workspaces: HashMap<WorkspaceId, Option<WorkspaceRecord>>,
    /// Days before this one go.
    forget_usage_before: Option<i64>,
    forget_before: Option<Timestamp>,
    /// In their order.
    audit: Vec<AuditEvent>,
    forget_audit: Option<(Timestamp, u64)>,
    /// Where events are copied to from now on.
    audit_file: Option<File>,
}

#[derive(Debug)]
enum Command {
    /// Something waits.
    Commit,
    /// Something waits, and somebody for it.
    Settle(oneshot::Sender<bool>),
}

impl Waiting {
    fn changes(&self) -> MutexGuard<'_, Changes> {
        // Every change is a single call, so a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Changes {
    fn add(&mut self, record: SessionRecord) {
        let is_newer = self.records.get(&record.id).is_none_or(|known| known.revision < record.revision);
        if is_newer {
            self.records.insert(record.id, record);
        }
    }

    fn add_turn(&mut self, turn: Turn) {
        let Turn { session, record, heard, executions } = turn;
        if let Some(record) = record {
            self.add(record);
        }
        self.heard.insert(session, heard);
        for change in executions {
            self.executions.entry(change.id).or_insert_with(|| Pending::new(session)).add(change);
        }
    }

    fn is_empty(&self) -> bool {
        self.records.is_empty()
            && self.heard.is_empty()
            && self.executions.is_empty()
            && self.forget_executions.is_empty()
            && self.keys.is_empty()
            && self.forget_keys_before.is_none()
            && self.api_keys.is_empty()
            && self.usage.is_empty()
            && self.workspaces.is_empty()
            && self.forget_usage_before.is_none()
            && self.forget_before.is_none()
            && self.audit.is_empty()
            && self.forget_audit.is_none()
            && self.audit_file.is_none()
    }

    /// What could not be committed goes before what came meanwhile.
    fn put_back(&mut self, earlier: Self) {
        earlier.records.into_values().for_each(|record| self.add(record));
        for (session, heard) in earlier.heard {
            self.heard.entry(session).or_insert(heard);
        }
        let forgotten = std::mem::replace(&mut self.forget_executions, earlier.forget_executions);
        self.forget_executions.extend(forgotten);
        for (id, pending) in earlier.executions {
            match self.executions.entry(id) {
                Entry::Occupied(mut later) => later.get_mut().put_back(pending),
                Entry::Vacant(free) => drop(free.insert(pending)),
            }
        }
        for (key, record) in earlier.keys {
            self.keys.entry(key).or_insert(record);
        }
        self.forget_keys_before = self.forget_keys_before.or(earlier.forget_keys_before);
        for (id, record) in earlier.api_keys {
            self.api_keys.entry(id).or_insert(record);
        }
        for (tenant, record) in earlier.usage {
            self.usage.entry(tenant).or_insert(record);
        }
        for (id, record) in earlier.workspaces {
            self.workspaces.entry(id).or_insert(record);
        }
        self.forget_usage_before = self.forget_usage_before.or(earlier.forget_usage_before);
        self.forget_before = self.forget_before.or(earlier.forget_before);
        let later = std::mem::replace(&mut self.audit, earlier.audit);
        self.audit.extend(later);
        self.forget_audit = self.forget_audit.or(earlier.forget_audit);
        self.audit_file = self.audit_file.take().or(earlier.audit_file);
    }
}

impl State {
    /// Opens the database in the data folder, making or migrating it, and says what is in it. What refers to the archive, or is not told to it again, is
    /// committed only after what the archive was told before. Waits for the disk.
    ///
    /// # Errors
    /// See [`StateError`]; with one, nothing was changed.
    pub fn open(folder: &Path, first: Option<Archive>) -> Result<(Self, Left), StateError> {
        let connection = open(&path_in(folder))?;
        let left = Left {
            sessions: read_all(&connection)?,
            executions: executions::read_all(&connection)?,
            heard: executions::read_heard(&connection)?,
            keys: keys::read_all(&connection)?,
            api_keys: api_keys::read_all(&connection)?,
            usage: usage::read_all(&connection)?,
            workspaces: workspaces::read_all(&connection)?,
        };
        let (commands, received) = mpsc::channel(QUEUE);
        let waiting = Waiting::default();
        let is_written = Arc::new(AtomicBool::new(true));
        let commits = Commits::default();
        let writer = Writer {
            connection,
            waiting: waiting.clone(),
            first,
            is_written: Arc::clone(&is_written),
            commits: commits.clone(),
            copying: None,
        };
        let thread = std::thread::Builder::new().name("state".to_owned());
        thread.spawn(move || writer.run(received)).map_err(|_| StateError::Unwritten)?;
        Ok((Self { waiting, commands, is_written, commits, folder: Arc::from(folder) }, left))
    }

    /// Has what a turn has brought committed: soon, or, where the guest has a copy until it is told otherwise, with what comes after it. Never waits.
    pub fn put(&self, turn: Turn) {
        let is_urgent = turn.record.is_some() || turn.executions.iter().any(ExecutionChange::is_urgent);
        self.waiting.changes().add_turn(turn);
        if is_urgent {
            self.wake();
        }
    }

    /// Forgets executions. Never waits.
    pub fn forget_executions(&self, ids: &[ExecutionId]) {
        if ids.is_empty() {
            return;
        }
        let mut changes = self.waiting.changes();
        for id in ids {
            changes.executions.remove(id);
        }
        changes.forget_executions.extend(ids);
        drop(changes);
        self.wake();
    }

    /// Keeps a key, not later than what is put after it. Never waits.
    pub fn put_key(&self, record: KeyRecord) {
        self.waiting.changes().keys.insert((Arc::clone(&record.tenant), record.key.clone()), Some(record));
        self.wake();
    }

    /// Frees a key. Never waits.
    pub fn forget_key(&self, tenant: Arc<str>, key: String) {
        self.waiting.changes().keys.insert((tenant, key), None);
        self.wake();
    }

    /// Frees keys from before a moment. Never waits.
    pub fn forget_keys(&self, before: Timestamp) {
        self.waiting.changes().forget_keys_before = Some(before);
        self.wake();
    }

    /// Keeps an API key. Never waits.
    pub fn put_api_key(&self, record: ApiKeyRecord) {
        self.waiting.changes().api_keys.insert(record.id, Some(record));
        self.wake();
    }

    /// Forgets an API key. Never waits.
    pub fn forget_api_key(&self, id: KeyId) {
        self.waiting.changes().api_keys.insert(id, None);
        self.wake();
    }

    /// Keeps what a tenant has used, in place of what was kept of it before. Never waits.
    pub fn put_usage(&self, record: UsageRecord) {
        self.waiting.changes().usage.insert(Arc::clone(&record.tenant), record);
        self.wake();
    }

    /// Keeps a workspace, in place of what was kept of it before. Never waits.
    pub fn put_workspace(&self, record: WorkspaceRecord) {
        self.waiting.changes().workspaces.insert(record.id, Some(record));
        self.wake();
    }

    /// Forgets a workspace. Never waits.
    pub fn forget_workspace(&self, id: WorkspaceId) {
        self.waiting.changes().workspaces.insert(id, None);
        self.wake();
    }

    /// Forgets what tenants have used on days before one, in days since 1970. Never waits.
    pub fn forget_usage(&self, before: i64) {
        self.waiting.changes().forget_usage_before = Some(before);
        self.wake();
    }

    /// Forgets sessions that ended before a moment. Never waits.
    pub fn forget_ended(&self, before: Timestamp) {
        self.waiting.changes().forget_before = Some(before);
        self.wake();
    }

    /// A full queue has somebody in it who will have everything committed.
    fn wake(&self) {
        let _ = self.commands.try_send(Command::Commit);
    }

    /// What is counted of its commits.
    #[must_use]
    pub fn commits(&self) -> &Commits {
        &self.commits
    }

    /// Whether the last commit was one.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.is_written.load(Ordering::Relaxed)
    }

    /// Waits until all that was put before is committed.
    ///
    /// # Errors
    /// When it could not be; it is tried again, but nobody should rely on it.
    pub async fn settle(&self) -> Result<(), StateError> {
        let (reply, settled) = oneshot::channel();
        self.commands.send(Command::Settle(reply)).await.map_err(|_| StateError::Unwritten)?;
        if settled.await.unwrap_or(false) { Ok(()) } else { Err(StateError::Unwritten) }
    }
}

/// Where the database of a data folder is.
#[must_use]
pub fn path_in(folder: &Path) -> PathBuf {
    folder.join(FILE)
}

/// Copies the database of a data folder, whether a server works with it or not. `to` must not be there yet.
///
/// # Errors
/// See [`StateError`].
pub fn backup(folder: &Path, to: &Path) -> Result<(), StateError> {
    let from = Connection::open_with_flags(path_in(folder), rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    from.busy_timeout(PATIENCE)?;
    version_of(&from)?;
    // Made first, with nobody else's eyes on it: a copy of nothing is what may be written into.
    create_private(to)?;
    let copied = from.execute("VACUUM INTO ?1", [to.to_string_lossy()]);
    if copied.is_err() {
        // An empty one would be in the way of the next try; that it can't be removed says nothing new.
        let _ = std::fs::remove_file(to);
    }
    Ok(copied.map(drop)?)
}

/// Reads a database through, whether a server works with it or not, and changes nothing: its version and the newest one that is known here; `None` where
/// there is none.
///
/// # Errors
/// See [`StateError`].
pub fn examine(folder: &Path) -> Result<Option<(usize, usize)>, StateError> {
    let path = path_in(folder);
    if !path.exists() {
        return Ok(None);
    }
    // Where nobody has a journal open, one would be made, and left, for the sake of reading.
    let is_at_rest = !path.with_extension("db-wal").exists();
    let escaped = path.to_string_lossy().replace('%', "%25").replace('?', "%3f").replace('#', "%23");
    let address = format!("file:{escaped}?immutable={}", u8::from(is_at_rest));
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY | rusqlite::OpenFlags::SQLITE_OPEN_URI;
    let connection = Connection::open_with_flags(address, flags)?;
    connection.busy_timeout(PATIENCE)?;
    check(&connection)?;
    Ok(Some((version_of(&connection)?, MIGRATIONS.len())))
}

/// Reads all pages.
fn check(connection: &Connection) -> Result<(), StateError> {
    let damaged = |e: rusqlite::Error| match e.sqlite_error_code() {
        Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt) => {
            StateError::Damaged(e.to_string())
        }
        _ => StateError::Database(e),
    };
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(damaged)?;
    if verdict == "ok" { Ok(()) } else { Err(StateError::Damaged(verdict)) }
}

fn open(path: &Path) -> Result<Connection, StateError> {
    let mut connection = Connection::open(path)?;
    private(path)?;
    connection.busy_timeout(PATIENCE)?;
    check(&connection)?;
    let version = version_of(&connection)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    // What is forgotten is not to stand in the file: environments hold secrets.
    connection.pragma_update(None, "secure_delete", "ON")?;
    connection.pragma_update(None, "foreign_keys", "ON")?;
    let migration = connection.transaction()?;
    for step in &MIGRATIONS[version..] {
        migration.execute_batch(step)?;
    }
    migration.pragma_update(None, "application_id", APPLICATION_ID)?;
    migration.pragma_update(None, "user_version", MIGRATIONS.len() as i64)?;
    migration.commit()?;
    Ok(connection)
}

/// The version of a database that is ours, or empty.
fn version_of(connection: &Connection) -> Result<usize, StateError> {
    let number = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let (application, found) = (number("application_id")?, number("user_version")?);
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    if tables > 0 && application != i64::from(APPLICATION_ID) {
        return Err(StateError::Foreign);
    }
    let newer = StateError::Newer { found, known: MIGRATIONS.len() };
    usize::try_from(found).ok().filter(|found| *found <= MIGRATIONS.len()).ok_or(newer)
}

fn create_private(path: &Path) -> Result<(), StateError> {
    use std::os::unix::fs::OpenOptionsExt;
    let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    made.map(drop).map_err(|e| StateError::Copy(e.to_string()))
}

/// It holds what opens links, and environments.
fn private(path: &Path) -> Result<(), StateError> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(|_| StateError::Unwritten)
}

fn read_all(connection: &Connection) -> Result<Vec<SessionRecord>, StateError> {
    let mut statement = connection.prepare("SELECT id, revision, body FROM sessions ORDER BY id")?;
    let rows = statement
        .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?, row.get::<_, String>(2)?)))?;
    let read = |row: rusqlite::Result<(String, i64, String)>| {
        let (id, revision, body) = row?;
        form::read(&id, revision.unsigned_abs(), &body)
            .map_err(|e| StateError::Damaged(format!("the record of {id} can't be read: {e}")))
    };
    rows.map(read).collect()
}

struct Writer {
    connection: Connection,
    waiting: Waiting,
    first: Option<Archive>,
    is_written: Arc<AtomicBool>,
    commits: Commits,
    copying: Option<Copying>,
}

impl Writer {
    /// Commits what waits until nobody can ask any more; what could not be committed stays, and is tried again.
    fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut asking = Vec::new();
        loop {
            let is_behind = self.copying.as_ref().is_some_and(|copying| copying.is_due(Instant::now()));
            let first = if self.waiting.changes().is_empty() && !is_behind {
                commands.blocking_recv()
            } else {
                match commands.try_recv() {
                    Ok(first) => Some(first),
                    Err(mpsc::error::TryRecvError::Empty) => Some(Command::Commit),
                    Err(mpsc::error::TryRecvError::Disconnected) => None,
                }
            };
            let is_over = first.is_none();
            let others = std::iter::from_fn(|| commands.try_recv().ok()).take(QUEUE);
            asking.extend(first.into_iter().chain(others).filter_map(|command| match command {
                Command::Settle(reply) => Some(reply),
                Command::Commit => None,
            }));
            let committed = self.commit();
            self.is_written.store(committed.is_ok(), Ordering::Relaxed);
            if let Err(error) = &committed {
                tracing::error!(%error, "the database can't be written; it is tried again");
            }
            for reply in asking.drain(..) {
                // Whoever waited may have left.
                let _ = reply.send(committed.is_ok());
            }
            if is_over {
                return;
            }
            if committed.is_err() {
                std::thread::sleep(RETRY);
            }
        }
    }

    /// Commits everything that waits, or puts it back; and copies of the audit what is not copied.
    fn commit(&mut self) -> rusqlite::Result<()> {
        let mut changes = std::mem::take(&mut *self.waiting.changes());
        if changes.is_empty() {
            self.copy_audit(false);
            return Ok(());
        }
        if let Some(archive) = self.first.as_ref().filter(|_| changes.executions.values().any(Pending::needs_archive)) {
            archive.flush_now();
        }
        let began = Instant::now();
        // Copying begins before: what comes with it is to be copied.
        let committed = self.begin_copying(&mut changes).and_then(|()| self.write(&changes));
        self.commits.committed(committed.is_ok(), began.elapsed());
        if committed.is_err() {
            self.waiting.changes().put_back(changes);
        } else {
            self.copy_audit(!changes.audit.is_empty());
        }
        committed
    }

    fn begin_copying(&mut self, changes: &mut Changes) -> rusqlite::Result<()> {
        if changes.audit_file.is_some() {
            let last = audit_file::last_copied(&self.connection)?;
            self.copying = changes.audit_file.take().map(|file| Copying::new(file, last));
        }
        Ok(())
    }

    fn copy_audit(&mut self, has_new: bool) {
        if let Some(copying) = &mut self.copying {
            copying.go_on(has_new, &self.connection, Instant::now());
        }
    }

    fn write(&mut self, changes: &Changes) -> rusqlite::Result<()> {
        let transaction = self.connection.transaction()?;
        for record in changes.records.values() {
            put(&transaction, record)?;
        }
        for (session, heard) in &changes.heard {
            executions::write_heard(*session, *heard, &transaction)?;
        }
        for (id, pending) in &changes.executions {
            pending.write(*id, &transaction)?;
        }
        for ((tenant, key), record) in &changes.keys {
            match record {
                Some(record) => keys::write(record, &transaction)?,
                None => keys::forget(tenant, key, &transaction)?,
            }
        }
        for event in &changes.audit {
            audit::write(event, &transaction)?;
        }
        if let Some(bounds) = changes.forget_audit {
            audit::forget(bounds, &transaction)?;
        }
        if let Some(before) = changes.forget_keys_before {
            keys::forget_before(before, &transaction)?;
        }
        for (id, record) in &changes.api_keys {
            match record {
                Some(record) => api_keys::write(record, &transaction)?,
                None => api_keys::forget(*id, &transaction)?,
            }
        }
        for record in changes.usage.values() {
            usage::write(record, &transaction)?;
        }
        for (id, record) in &changes.workspaces {
            match record {
                Some(record) => workspaces::write(record, &transaction)?,
                None => workspaces::forget(*id, &transaction)?,
            }
        }
        if let Some(before) = changes.forget_usage_before {
            usage::forget_before(before, &transaction)?;
        }
        for id in &changes.forget_executions {
            transaction.prepare_cached("DELETE FROM executions WHERE id = ?1")?.execute([id.to_string()])?;
        }
        if let Some(before) = changes.forget_before {
            let mut forget = transaction.prepare_cached("DELETE FROM sessions WHERE ended_at < ?1")?;
            forget.execute([before.as_millisecond()])?;
        }
        transaction.commit()
    }
}

fn put(transaction: &rusqlite::Transaction<'_>, record: &SessionRecord) -> rusqlite::Result<()> {
    let body = form::write(record).map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))?;
    let ended_at = match record.stage {
        Stage::Ended(_, at) => Some(at.as_millisecond()),
        _ => None,
    };
    transaction
        .prepare_cached(
            "INSERT INTO sessions (id, revision, ended_at, body) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (id) DO UPDATE SET revision = ?2, ended_at = ?3, body = ?4 WHERE ?2 > revision",
        )?
        .execute(params![record.id.to_string(), record.revision.cast_signed(), ended_at, body])?;
    Ok(())
}
