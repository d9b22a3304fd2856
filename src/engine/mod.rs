//! The engine: what runs cells. [`Engine`] is all that the rest of the control plane knows of it.
//!
//! Everything is idempotent by the cell's name, and nothing in the contract is a word of Docker's: a cell could as well be a pod.
//! What an engine must promise is in `tests/engine_contract.rs`, which every implementation passes.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use cellblock_wire::link::Report;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::domain::data::DataMount;
use crate::domain::ids::{InstallationId, SessionId, WorkspaceId};
use crate::domain::spec::Resources;

pub mod docker;
pub mod guard;
pub mod lockdown;
pub mod metered;
pub mod pack;

/// A byte stream in both directions. Dropping it closes it whole, at once.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A cell's standard input and output, as one stream.
pub type ByteStream = Box<dyn Duplex>;

/// Name of a cell: `cellblock-<instance>-<session>-<n>`, where `n` counts the cells of one session.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CellName(String);

impl CellName {
    /// The name of a session's `n`th cell.
    #[must_use]
    pub fn new(instance: &str, session: SessionId, n: u32) -> Self {
        Self(format!("cellblock-{instance}-{session}-{n}"))
    }

    /// The name as the engine has it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A name that somebody else says. [`CellName::session`] tells whether it is one of an instance.
    #[must_use]
    pub(crate) fn listed(name: String) -> Self {
        Self(name)
    }

    /// Whose cell this is, if the name is one of this instance and exactly as [`CellName::new`] makes it.
    #[must_use]
    pub fn session(&self, instance: &str) -> Option<SessionId> {
        let rest = self.0.strip_prefix("cellblock-")?.strip_prefix(instance)?.strip_prefix('-')?;
        let (session, n) = rest.split_once('-')?;
        let (session, n) = (session.parse().ok()?, n.parse().ok()?);
        (*self == Self::new(instance, session, n)).then_some(session)
    }
}

impl fmt::Display for CellName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Name of a workspace that outlives cells: `cellblock-workspace-<instance>-<id>`. No caller's text is in it, and none comes twice.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkspaceName(String);

impl WorkspaceName {
    /// The name of a workspace.
    #[must_use]
    pub fn new(instance: &str, workspace: WorkspaceId) -> Self {
        Self(format!("cellblock-workspace-{instance}-{workspace}"))
    }

    /// The name as the engine has it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A name that somebody else says. [`WorkspaceName::id`] tells whether it is one of an instance.
    #[must_use]
    pub(crate) fn listed(name: String) -> Self {
        Self(name)
    }

    /// Which workspace this is, if the name is one of this instance and exactly as [`WorkspaceName::new`] makes it.
    #[must_use]
    pub fn id(&self, instance: &str) -> Option<WorkspaceId> {
        let rest = self.0.strip_prefix("cellblock-workspace-")?.strip_prefix(instance)?.strip_prefix('-')?;
        let id = rest.parse().ok()?;
        (*self == Self::new(instance, id)).then_some(id)
    }
}

impl fmt::Display for WorkspaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a workspace is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkspaceSpec {
    /// Its name.
    pub name: WorkspaceName,
    /// The id of any image that the engine has.
    pub image: String,
    /// The most bytes that it may hold; of one that is there already, what it was made with stays.
    pub quota_bytes: Option<u64>,
}

/// A workspace that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkspaceVolume {
    /// Whose its files are: the uid of every cell that has it, and of no other cell while it exists.
    pub uid: u32,
    /// It was not there before.
    pub is_new: bool,
}

/// Everything an engine needs to know of a cell. What locks it is the engine's own business and not for the caller to choose.
#[derive(Debug, Clone, PartialEq)]
pub struct CellSpec {
    /// Its name.
    pub name: CellName,
    /// Whose it is.
    pub session: SessionId,
    /// The engine's id of the image, from [`Engine::resolve_image`].
    pub image: String,
    /// The engine's runtime; its default when empty.
    pub runtime: String,
    /// What it may use.
    pub resources: Resources,
    /// Data that it can read.
    pub data: Vec<DataMount>,
    /// Its working folder.
    pub workdir: String,
    /// Its working folder, where that is not its own: from [`Engine::ensure_workspace`].
    pub workspace: Option<WorkspaceName>,
}

/// A cell as the engine sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    /// Its name.
    pub name: CellName,
    /// Whose it is, if its label can be read.
    pub session: Option<SessionId>,
    /// What it does.
    pub state: CellState,
    /// What it may use, if its labels can be read.
    pub promised: Option<Promised>,
}

/// What a cell takes of its machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Promised {
    /// CPU time a second, in thousandths of a CPU.
    pub cpu_millis: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
}

impl From<&Resources> for Promised {
    fn from(resources: &Resources) -> Self {
        Self { cpu_millis: resources.cpu_millis, memory_bytes: resources.memory_bytes }
    }
}

/// What a cell does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CellState {
    /// It exists and was never started.
    Created,
    /// It runs.
    Running,
    /// It is frozen.
    Paused,
    /// Its first process has ended.
    Exited {
        /// The exit status.
        status: i64,
        /// Whether memory ran out.
        oom: bool,
    },
}

/// Something happened to a cell.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineEvent {
    /// The cell.
    pub name: CellName,
    /// What happened.
    pub kind: EngineEventKind,
}

/// What happened to a cell. Events may be lost or come twice: they are hints to look again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EngineEventKind {
    /// It was made.
    Created,
    /// Its first process ended.
    Exited,
    /// A process in it was ended because memory ran out.
    OutOfMemory,
    /// It was removed.
    Removed,
    /// It was frozen.
    Paused,
    /// It was thawed.
    Resumed,
}

/// An image that the engine has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// The engine's id: the content, whatever a tag says later.
    pub id: String,
    /// The reference that was resolved.
    pub reference: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// Data on the engine, for cells to read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataVolume {
    /// Its name.
    pub name: String,
    /// Which of all that had the name: every import makes another.
    pub version: String,
    /// Bytes of the archive that it was made from.
    pub bytes: u64,
    /// SHA-256 of the archive, in hexadecimal.
    pub sha256: String,
}

/// A tar archive in pieces. An error in it is the failure of whatever reads it.
pub type ArchiveStream = BoxStream<'static, io::Result<Bytes>>;

/// What the engine is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineInfo {
    /// Name and version, for people.
    pub version: String,
    /// CPUs of its machine.
    pub cpus: u32,
    /// Memory of its machine, in bytes.
    pub memory_bytes: u64,
}

/// Whether an image that is missing may be fetched from its registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pull {
    /// What is not there is refused.
    Never,
    /// What is not there is pulled, with the operator's credentials.
    Missing,
}

/// Why an engine could not do what it was asked. Classified where it enters; nobody above sees an engine's own type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The cell or image does not exist.
    #[error("{attempt}: {what} does not exist")]
    Absent {
        /// What was attempted.
        attempt: &'static str,
        /// What is not there.
        what: String,
    },
    /// It exists already, in another form.
    #[error("{attempt}: {detail}")]
    Conflict {
        /// What was attempted.
        attempt: &'static str,
        /// The engine's words.
        detail: String,
    },
    /// The engine refuses, and would again.
    #[error("{attempt}: the engine refused: {detail}")]
    Rejected {
        /// What was attempted.
        attempt: &'static str,
        /// The engine's words.
        detail: String,
    },
    /// The engine can't be reached.
    #[error("{attempt}: the engine can't be reached: {detail}")]
    Unavailable {
        /// What was attempted.
        attempt: &'static str,
        /// Why.
        detail: String,
    },
    /// The engine did not answer in time.
    #[error("{attempt}: no answer within {limit:?}")]
    TimedOut {
        /// What was attempted.
        attempt: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The instance's name is another installation's.
    #[error("the name is taken by {}; if that one is gone for good, `{remedy}` frees it", holder.map_or_else(|| "something else".to_owned(), |id| format!("the installation {id}")))]
    Claimed {
        /// Who has it, if that can be read.
        holder: Option<InstallationId>,
        /// What an operator does to free it, if the holder is gone for good.
        remedy: String,
    },
    /// A cell is not confined as it was asked to be.
    #[error("the cell is not confined as specified: {}", mismatches.join("; "))]
    Unverified {
        /// Each difference, for an operator.
        mismatches: Vec<String>,
    },
    /// Anything else.
    #[error("{attempt}: {detail}")]
    Unexpected {
        /// What was attempted.
        attempt: &'static str,
        /// The engine's words.
        detail: String,
    },
}

/// Runs cells.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// Says what the engine is, if it answers.
    async fn info(&self) -> Result<EngineInfo, EngineError>;

    /// Finds an image and says its id, which stays the same content for ever.
    async fn resolve_image(&self, reference: &str, pull: Pull) -> Result<ImageInfo, EngineError>;

    /// Puts in place what cells need, ahead of the first one. `image` is the id of any image that the engine has.
    async fn prepare(&self, image: &str) -> Result<(), EngineError>;

    /// Makes sure that this cell runs, and opens its stream. A cell of that name that was made from the same
    /// specification is taken as it is; one made from another is a [`EngineError::Conflict`], and so is a workspace that another cell has. Data or a
    /// workspace that is not there is [`EngineError::Absent`].
    ///
    /// When this fails the cell may or may not exist: [`Engine::remove`] it.
    async fn ensure(&self, cell: &CellSpec) -> Result<ByteStream, EngineError>;

    /// Opens the stream of a running cell; one that is frozen is a [`EngineError::Conflict`]. There must be no other open stream to it.
    async fn link(&self, name: &CellName) -> Result<ByteStream, EngineError>;

    /// Compares the running cell, as the engine shows it and as the guest reports it, with its specification.
    ///
    /// # Errors
    /// [`EngineError::Unverified`] with every difference.
    async fn attest(&self, cell: &CellSpec, report: &Report) -> Result<(), EngineError>;

    /// Freezes a running cell: its processes get no CPU and keep their memory. One that is frozen is left alone. There is no link to a frozen cell.
    ///
    /// When this fails the cell may be frozen or not: [`Engine::resume`] it.
    async fn pause(&self, name: &CellName) -> Result<(), EngineError>;

    /// Thaws a frozen cell. One that runs is left alone.
    async fn resume(&self, name: &CellName) -> Result<(), EngineError>;

    /// Removes a cell, whatever it does. Success means that its absence was seen.
    async fn remove(&self, name: &CellName) -> Result<(), EngineError>;

    /// Looks at one cell; `None` when it does not exist.
    async fn observe(&self, name: &CellName) -> Result<Option<Observed>, EngineError>;

    /// Takes the instance's name for an installation, until it is given back; taking it again changes nothing. It holds against every other
    /// installation on this engine, whether or not the holder runs.
    ///
    /// # Errors
    /// [`EngineError::Claimed`] when another installation has it; [`EngineError::Absent`] when the engine has nothing yet that could hold it, and
    /// so can run no cell either.
    async fn claim(&self, installation: InstallationId) -> Result<(), EngineError>;

    /// Gives the instance's name back, if this installation has it.
    async fn release(&self, installation: InstallationId) -> Result<(), EngineError>;

    /// Removes what earlier versions of this instance have left beside cells and nobody uses; says what it was.
    async fn sweep(&self) -> Result<Vec<String>, EngineError>;

    /// Puts an archive's content onto the engine under a name of [`DataMount`]s. Cells that are made later have it, those that have an earlier content of
    /// that name keep that. When this fails, nothing has changed for anybody. `image` is the id of any image that the engine has.
    async fn import_data(&self, name: &str, image: &str, archive: ArchiveStream) -> Result<DataVolume, EngineError>;

    /// All data of this instance that is whole, by name.
    async fn list_data(&self) -> Result<Vec<DataVolume>, EngineError>;

    /// Takes a name's data away: no cell that is made later has it, and what is left goes with the last cell that has.
    ///
    /// # Errors
    /// [`EngineError::Absent`] where there is none of that name.
    async fn remove_data(&self, name: &str) -> Result<(), EngineError>;

    /// Makes sure that a workspace exists, with files that survive the cells that have it one after the other. As long as it exists it keeps its uid, which no
    /// cell without it gets.
    ///
    /// # Errors
    /// [`EngineError::Rejected`] where its quota can't be enforced and that is not accepted. When this fails it may exist or not:
    /// [`Engine::remove_workspace`] it.
    async fn ensure_workspace(&self, workspace: &WorkspaceSpec) -> Result<WorkspaceVolume, EngineError>;

    /// Removes a workspace with all that is in it. Success means that its absence was seen; one that a cell has is a [`EngineError::Conflict`].
    async fn remove_workspace(&self, name: &WorkspaceName) -> Result<(), EngineError>;

    /// All workspaces of this instance.
    async fn list_workspaces(&self) -> Result<Vec<WorkspaceName>, EngineError>;

    /// All cells of this instance.
    async fn list(&self) -> Result<Vec<Observed>, EngineError>;

    /// Events of this instance's cells from now on. Never ends: it reconnects by itself.
    fn watch(&self) -> BoxStream<'static, EngineEvent> {
        self.watch_since(SystemTime::now())
    }

    /// The same from an earlier moment on, as far as the engine remembers.
    fn watch_since(&self, since: SystemTime) -> BoxStream<'static, EngineEvent>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn a_workspaces_name_is_read_as_it_is_made_and_in_no_other_form() {
        let id = WorkspaceId::from_uuid(Uuid::from_u128(7));
        assert_eq!(WorkspaceName::new("one", id).id("one"), Some(id));
        for wrong in [
            format!("cellblock-workspace-two-{id}"),
            format!("cellblock-workspace-one-{id}/x"),
            format!("cellblock-workspace-one-{id}-0"),
            format!("cellblock-workspace-one-{}", id.to_string().to_uppercase()),
            format!("cellblock-data-one-{id}"),
            String::new(),
        ] {
            assert_eq!(WorkspaceName::listed(wrong.clone()).id("one"), None, "{wrong}");
        }
    }

    #[test]
    fn a_name_is_read_as_it_is_made_and_in_no_other_form() {
        let session = SessionId::from_uuid(Uuid::from_u128(7));
        assert_eq!(CellName::new("one", session, 12).session("one"), Some(session));
        let of = |text: String| CellName::listed(text).session("one");
        for wrong in [
            format!("cellblock-one-ses-{session}-0"),
            format!("cellblock-two-{session}-0"),
            format!("cellblock-one-{session}-00"),
            format!("cellblock-one-{session}-+1"),
            format!("cellblock-one-{session}-0/x"),
            format!("cellblock-one-{session}"),
            format!("Cellblock-one-{session}-0"),
            format!("cellblock-one-{}-0", session.to_string().to_uppercase()),
            format!("/cellblock-one-{session}-0"),
            "cellblock-one-lock".to_owned(),
            String::new(),
        ] {
            assert_eq!(of(wrong.clone()), None, "{wrong}");
        }
    }
}
