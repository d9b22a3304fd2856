//! What the data folder holds beside the key: blobs, which are long contents of executions, notebooks of sessions, and what sessions leave for the
//! next process ([`state`]). Who may ask is decided above; tenants are told apart here once more.
//!
//! ```text
//! caller ──reserves its share──▶ bounded channel ──▶ one thread ──▶ blobs/, notebooks/
//! ```
//!
//! Nothing here waits for the disk in a caller's thread. What finds no room is refused, or kept in part with a line that says so.

mod blobs;
mod cells;
mod content;
mod files;
pub mod installation;
mod ipynb;
mod journal;
mod ledger;
mod moment;
mod notebooks;
pub mod secret;
pub mod state;
#[cfg(test)]
mod tests;
mod writer;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::domain::ids::{ContextId, ExecutionId, SessionId};
use crate::domain::output::{BlobRef, JsonText, MimeBundle, Shown, Status};
use blobs::{Blobs, Header};
use cells::{CODE_START, Kept};
pub use content::{Form, content_text, decoded};
use journal::start_of;
use ledger::Sums;
use notebooks::{Bounds, Notebooks};
use writer::{Command, Reply, Shared, WaitingBlob, Writer};

/// Bytes of contents that may wait to be written, and of cells.
const WAITING_BYTES: u32 = 64 << 20;
/// What each of them is counted as at least, so that the number is bounded, too.
const LEAST_SHARE: u32 = 16 << 10;
/// Cells that may wait beyond that, when all that is left of them is the start of their code.
const SPARE_CELLS: usize = 1024;
/// Longest queue. Contents and cells cannot fill it: there is place for what begins and ends notebooks, and for what is read.
const QUEUE: usize = 2 * (WAITING_BYTES / LEAST_SHARE) as usize + SPARE_CELLS + READS + 4096;
/// How many may wait for an answer.
const READS: usize = 256;
/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Sessions whose missed cells are counted.
const MOST_MISSED: usize = 4096;

/// How much is kept, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveLimits {
    /// Bytes of all blobs.
    pub blob_bytes: u64,
    /// A blob is kept for this long.
    pub blob_retention: Duration,
    /// Bytes of one notebook.
    pub notebook_bytes: u64,
    /// Bytes of all notebooks.
    pub notebooks_bytes: u64,
    /// A notebook is kept for this long after its session's end.
    pub notebook_retention: Duration,
}

/// Whose a blob is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Who may read it.
    pub tenant: Arc<str>,
    /// The session it came from.
    pub session: SessionId,
    /// The execution it came from.
    pub execution: ExecutionId,
}

/// A blob that is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// It is larger than one may be.
    #[error("a content of {bytes} bytes is not kept: {allowed} are allowed")]
    Larger {
        /// Its length.
        bytes: u64,
        /// The largest that is kept.
        allowed: u64,
    },
    /// Too much waits to be written.
    #[error("a content is not kept: too much waits to be written")]
    Waiting,
}

/// A blob, ready to be sent.
#[derive(Debug)]
pub struct Blob {
    /// Its MIME type.
    pub mime: String,
    /// SHA-256 of its bytes in hex.
    pub sha256: String,
    /// Its length.
    pub bytes: u64,
    /// Its bytes.
    pub body: BlobBody,
}

/// Where the bytes of a blob are.
#[derive(Debug)]
pub enum BlobBody {
    /// They are not written yet.
    Memory(Bytes),
    /// From here to the end of the file.
    File(tokio::fs::File),
}

/// What a notebook says of its kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotebookKernel {
    /// The kernelspec's name.
    pub kernelspec: String,
    /// Its name for people.
    pub display_name: String,
    /// Its language.
    pub language: String,
    /// `language_info` of its `kernel_info_reply`; the empty object where it is not known.
    pub language_info: JsonText,
}

/// A finished execution, as a notebook keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct NotebookCell {
    /// Which.
    pub execution: ExecutionId,
    /// Where it ran.
    pub context: ContextId,
    /// Its code.
    pub code: String,
    /// The language of its code.
    pub language: String,
    /// The kernel's count.
    pub execution_count: Option<u64>,
    /// How it ended.
    pub status: Status,
    /// What it put out, updates of its own applied.
    pub shown: Vec<Shown>,
    /// What it changed in cells before it: `display_id`, data, metadata.
    pub updates: Vec<(String, MimeBundle, JsonText)>,
    /// How it ended, for people.
    pub detail: Option<String>,
    /// When it was asked for.
    pub queued_at: Timestamp,
    /// When it began to run.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Timestamp,
}

impl NotebookCell {
    /// Bytes that it holds beside its code.
    fn output_bytes(&self) -> usize {
        let bundle = |data: &MimeBundle| data.iter().map(|(mime, part)| 64 + mime.len() + part.len()).sum::<usize>();
        let shown = self.shown.iter().map(|shown| match shown {
            Shown::Text { text, .. } => 64 + text.len(),
            Shown::Rich(rich) => 128 + bundle(&rich.data) + rich.metadata.0.len(),
            Shown::Error(e) => {
                128 + e.name.len() + e.value.len() + e.traceback.iter().map(|l| 32 + l.len()).sum::<usize>()
            }
        });
        let updates = self.updates.iter().map(|(id, data, metadata)| 128 + id.len() + bundle(data) + metadata.0.len());
        shown.chain(updates).sum::<usize>() + self.detail.as_ref().map_or(0, String::len)
    }
}

/// Blobs and notebooks. Clones are the same archive; the last one to go ends the thread, once all that waits is written.
#[derive(Debug, Clone)]
pub struct Archive {
    commands: mpsc::Sender<Command>,
    shared: Shared,
    blob_shares: Arc<Semaphore>,
    cell_shares: Arc<Semaphore>,
    spare_cells: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    largest_blob: u64,
    /// What is written for each tenant, of blobs and of notebooks.
    sums: [Sums; 2],
    patience: Duration,
}

impl Archive {
    /// Opens `blobs/` and `notebooks/` in the data folder, making them where they are missing, and starts the thread that writes. What is found there
    /// too old or broken is removed. Waits for the disk.
    ///
    /// # Errors
    /// When a folder cannot be made or read, or the thread cannot be started.
    pub fn open(folder: &Path, limits: ArchiveLimits) -> io::Result<Self> {
        let (archive, writer, commands) = Self::parts(folder, &limits)?;
        std::thread::Builder::new().name("archive".to_owned()).spawn(move || writer.run(commands))?;
        Ok(archive)
    }

    fn parts(folder: &Path, limits: &ArchiveLimits) -> io::Result<(Self, Writer, mpsc::Receiver<Command>)> {
        let now = Timestamp::now();
        let bounds =
            Bounds { one: limits.notebook_bytes, all: limits.notebooks_bytes, retention: limits.notebook_retention };
        let blobs = Blobs::open(folder.join("blobs"), limits.blob_bytes, limits.blob_retention, now)?;
        let notebooks = Notebooks::open(folder.join("notebooks"), bounds, now)?;
        let shared = Shared::default();
        let (sender, commands) = mpsc::channel(QUEUE);
        let archive = Self {
            commands: sender,
            shared: shared.clone(),
            blob_shares: Arc::new(Semaphore::new(WAITING_BYTES as usize)),
            cell_shares: Arc::new(Semaphore::new(WAITING_BYTES as usize)),
            spare_cells: Arc::new(Semaphore::new(SPARE_CELLS)),
            reads: Arc::new(Semaphore::new(READS)),
            largest_blob: blobs.largest().min(u64::from(WAITING_BYTES - LEAST_SHARE)),
            sums: [blobs.sums(), notebooks.sums()],
            patience: PATIENCE,
        };
        Ok((archive, Writer { blobs, notebooks, shared }, commands))
    }

    /// Bytes on the disk that are a tenant's.
    #[must_use]
    pub fn stored(&self, tenant: &str) -> u64 {
        self.sums.iter().map(|sums| sums.of(tenant)).sum()
    }

    /// Keeps a content. It can be read from now on, and is written later. Takes the time of a hash.
    ///
    /// # Errors
    /// When it is larger than one may be, or too much waits to be written.
    pub fn put_blob(&self, owner: &Owner, number: u32, mime: &str, bytes: Bytes) -> Result<BlobRef, Full> {
        let length = bytes.len() as u64;
        if length > self.largest_blob {
            return Err(Full::Larger { bytes: length, allowed: self.largest_blob });
        }
        let share = share_of(&self.blob_shares, bytes.len()).ok_or(Full::Waiting)?;
        let place = self.commands.try_reserve().map_err(|_| Full::Waiting)?;
        let sha256: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        let header = Header {
            tenant: owner.tenant.to_string(),
            session: owner.session.to_string(),
            mime: mime.to_owned(),
            sha256: sha256.clone(),
            bytes: length,
            kept_at: Timestamp::now(),
        };
        let key = (owner.execution, number);
        self.shared.waiting().insert(key, WaitingBlob { header, bytes, _share: share });
        place.send(Command::PutBlob(key));
        Ok(BlobRef { number, bytes: length, sha256 })
    }

    /// A tenant's blob, if it is kept.
    pub async fn blob(&self, tenant: &str, execution: ExecutionId, number: u32) -> Option<Blob> {
        let key = (execution, number);
        if let Some(blob) = self.waiting_blob(tenant, key) {
            return Some(blob);
        }
        let tenant = tenant.to_owned();
        self.ask(|reply| Command::FindBlob { tenant, key, reply }).await.flatten()
    }

    fn waiting_blob(&self, tenant: &str, key: blobs::Key) -> Option<Blob> {
        let waiting = self.shared.waiting();
        let WaitingBlob { header, bytes, .. } = waiting.get(&key).filter(|w| w.header.tenant == tenant)?;
        let (mime, sha256) = (header.mime.clone(), header.sha256.clone());
        Some(Blob { mime, sha256, bytes: header.bytes, body: BlobBody::Memory(bytes.clone()) })
    }

    /// Begins a session's notebook, or takes what more is known of its kernel. Never waits.
    pub fn open_notebook(&self, tenant: &str, session: SessionId, kernel: NotebookKernel) {
        let tenant = tenant.to_owned();
        self.tell("begin a notebook", session, Command::OpenNotebook { tenant, session, kernel });
    }

    /// Adds a cell to a session's notebook. Never waits; if too much waits to be written, the cell is kept without its outputs.
    pub fn add_cell(&self, session: SessionId, mut cell: NotebookCell) {
        let whole = cell.code.len().saturating_add(cell.output_bytes());
        let kept = if let Some(share) = share_of(&self.cell_shares, whole) {
            Some((Kept::All, share))
        } else {
            (cell.shown, cell.updates) = (Vec::new(), Vec::new());
            cell.detail = cell.detail.map(|detail| start_of(&detail, CODE_START).to_owned());
            self.share_without_outputs(&mut cell)
        };
        let place = self.commands.try_reserve();
        let (Some((kept, share)), Ok(place)) = (kept, place) else {
            self.miss(session, cell.execution);
            return;
        };
        place.send(Command::AddCell { session, cell: Box::new(cell), kept, share });
    }

    fn share_without_outputs(&self, cell: &mut NotebookCell) -> Option<(Kept, OwnedSemaphorePermit)> {
        if let Some(share) = share_of(&self.cell_shares, cell.code.len()) {
            return Some((Kept::Code, share));
        }
        let share = Arc::clone(&self.spare_cells).try_acquire_owned().ok()?;
        if cell.code.len() <= CODE_START {
            return Some((Kept::Code, share));
        }
        cell.code = start_of(&cell.code, CODE_START).to_owned();
        Some((Kept::CodeStart, share))
    }

    /// The notebook says how many cells it misses.
    fn miss(&self, session: SessionId, execution: ExecutionId) {
        tracing::warn!(%session, %execution, "a cell is not kept: too much waits to be written");
        let mut missed = self.shared.missed();
        if missed.len() < MOST_MISSED || missed.contains_key(&session) {
            let cells = missed.entry(session).or_default();
            *cells = cells.saturating_add(1);
        }
    }

    /// The session has ended: its notebook's retention starts. Never waits.
    pub fn end_notebook(&self, session: SessionId) {
        self.tell("end a notebook", session, Command::EndNotebook(session));
    }

    /// A tenant's notebook in nbformat 4.5, with all that was added before, if it is kept.
    pub async fn notebook(&self, tenant: &str, session: SessionId) -> Option<Bytes> {
        let tenant = tenant.to_owned();
        self.ask(|reply| Command::ReadNotebook { tenant, session, reply }).await.flatten()
    }

    /// Removes a tenant's notebook for good. A session that lives begins a new one with its next cell. Whether there was one; also false when
    /// the disk gave no answer in time, and then it may yet go.
    pub async fn delete_notebook(&self, tenant: &str, session: SessionId) -> bool {
        let tenant = tenant.to_owned();
        self.ask(|reply| Command::DeleteNotebook { tenant, session, reply }).await.unwrap_or(false)
    }

    /// Removes what has been kept for long enough. Never waits. What is over is not given out even before.
    pub fn prune(&self) {
        if self.commands.try_send(Command::Prune).is_err() {
            tracing::warn!("the data folder is not looked through: too much waits to be written");
        }
    }

    /// Waits until all that was asked for before is done.
    pub async fn flush(&self) {
        self.ask(Command::Flush).await;
    }

    /// The same for a thread that may wait. Gives up after a while: the folder's thread has said why by then.
    pub(in crate::store) fn flush_now(&self) {
        let (done, is_done) = std::sync::mpsc::channel();
        if self.commands.blocking_send(Command::FlushNow(done)).is_ok() {
            let _ = is_done.recv_timeout(self.patience);
        }
    }

    fn tell(&self, attempt: &str, session: SessionId, command: Command) {
        if self.commands.try_send(command).is_err() {
            tracing::error!(%session, "could not {attempt}: too much waits to be written");
        }
    }

    /// None when the answer does not come in time.
    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Option<T> {
        let answer = async {
            let turn = Arc::clone(&self.reads).acquire_owned().await.ok()?;
            let (reply, answer) = Reply::new(turn);
            self.commands.send(command(reply)).await.ok()?;
            answer.await.ok()
        };
        tokio::time::timeout(self.patience, answer).await.unwrap_or_else(|_| {
            tracing::error!("the data folder gave no answer in {:?}", self.patience);
            None
        })
    }
}

/// A share of what may wait.
fn share_of(shares: &Arc<Semaphore>, bytes: usize) -> Option<OwnedSemaphorePermit> {
    let share = u32::try_from(bytes).ok()?.checked_add(LEAST_SHARE)?;
    Arc::clone(shares).try_acquire_many_owned(share).ok()
}
