//! The one thread that touches the data folder's blobs and notebooks. It does one thing after another, so that what was added before is there
//! for what is read after. How much may wait for it is decided where it is asked.

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::blobs::{Blobs, Header, Key};
use super::cells::Kept;
use super::notebooks::Notebooks;
use super::{Blob, BlobBody, NotebookCell, NotebookKernel};
use crate::domain::ids::SessionId;

/// What the thread is asked for.
#[derive(Debug)]
pub(super) enum Command {
    /// Write a content that waits.
    PutBlob(Key),
    FindBlob {
        tenant: String,
        key: Key,
        reply: Reply<Option<Blob>>,
    },
    OpenNotebook {
        tenant: String,
        session: SessionId,
        kernel: NotebookKernel,
    },
    AddCell {
        session: SessionId,
        cell: Box<NotebookCell>,
        kept: Kept,
        /// Its share of what may wait, given back once it is written.
        share: OwnedSemaphorePermit,
    },
    EndNotebook(SessionId),
    ReadNotebook {
        tenant: String,
        session: SessionId,
        reply: Reply<Option<Bytes>>,
    },
    DeleteNotebook {
        tenant: String,
        session: SessionId,
        reply: Reply<bool>,
    },
    Prune,
    Flush(Reply<()>),
    FlushNow(std::sync::mpsc::Sender<()>),
}

/// The way back to who asked, with the turn that was taken for asking.
#[derive(Debug)]
pub(super) struct Reply<T> {
    sender: oneshot::Sender<T>,
    _turn: OwnedSemaphorePermit,
}

impl<T> Reply<T> {
    pub(super) fn new(turn: OwnedSemaphorePermit) -> (Self, oneshot::Receiver<T>) {
        let (sender, answer) = oneshot::channel();
        (Self { sender, _turn: turn }, answer)
    }

    fn is_awaited(&self) -> bool {
        !self.sender.is_closed()
    }

    /// Whoever asked may have gone: an answer that nobody takes is no error.
    fn send(self, answer: T) {
        let _ = self.sender.send(answer);
    }
}

/// A content that is not written yet.
#[derive(Debug)]
pub(super) struct WaitingBlob {
    pub header: Header,
    pub bytes: Bytes,
    /// Its share of what may wait, given back once it is written.
    pub _share: OwnedSemaphorePermit,
}

/// What the thread shares with those who ask. Locks are held for moments, never over a wait for the disk.
#[derive(Debug, Clone, Default)]
pub(super) struct Shared {
    waiting: Arc<Mutex<HashMap<Key, WaitingBlob>>>,
    missed: Arc<Mutex<BTreeMap<SessionId, u64>>>,
}

impl Shared {
    /// Contents that are not written yet. As many as have a share.
    pub(super) fn waiting(&self) -> MutexGuard<'_, HashMap<Key, WaitingBlob>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cells that could not even wait, by session.
    pub(super) fn missed(&self) -> MutexGuard<'_, BTreeMap<SessionId, u64>> {
        self.missed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread works on.
#[derive(Debug)]
pub(super) struct Writer {
    pub blobs: Blobs,
    pub notebooks: Notebooks,
    pub shared: Shared,
}

impl Writer {
    /// Does what is asked until nobody can ask any more.
    pub(super) fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        while let Some(command) = commands.blocking_recv() {
            if catch_unwind(AssertUnwindSafe(|| self.obey(command, Timestamp::now()))).is_err() {
                tracing::error!("the writer of the data folder panicked; it goes on");
            }
        }
    }

    pub(super) fn obey(&mut self, command: Command, now: Timestamp) {
        match command {
            Command::PutBlob(key) => self.put_blob(key),
            Command::FindBlob { tenant, key, reply } => reply.send(self.find_blob(&tenant, key, now)),
            Command::OpenNotebook { tenant, session, kernel } => {
                self.notebooks.open_one(&tenant, session, kernel, now);
            }
            Command::AddCell { session, cell, kept, share } => {
                self.take_missed(session);
                let Self { blobs, notebooks, .. } = self;
                let Some(tenant) = notebooks.tenant(session).map(str::to_owned) else { return };
                let read = |number| blobs.read(&tenant, (cell.execution, number), now);
                notebooks.add(session, &cell, kept, &read, now);
                drop(share);
            }
            Command::EndNotebook(session) => {
                self.take_missed(session);
                self.notebooks.end(session, now);
            }
            Command::ReadNotebook { tenant, session, reply } => {
                self.take_missed(session);
                if reply.is_awaited() {
                    reply.send(self.notebooks.read(&tenant, session, now).map(Bytes::from));
                }
            }
            Command::DeleteNotebook { tenant, session, reply } => {
                reply.send(self.notebooks.delete(&tenant, session));
            }
            Command::Prune => {
                self.blobs.prune(now);
                self.notebooks.prune(now);
            }
            Command::Flush(reply) => reply.send(()),
            // Whoever waited may have given up.
            Command::FlushNow(done) => drop(done.send(())),
        }
    }

    fn put_blob(&mut self, key: Key) {
        // The one that waits under this name may be a newer one, or be written already.
        let Some((header, bytes)) = self.shared.waiting().get(&key).map(|w| (w.header.clone(), w.bytes.clone())) else {
            return;
        };
        if let Err(error) = self.blobs.put(key, &header, &bytes) {
            tracing::error!(execution = %key.0, number = key.1, %error, "a blob could not be written");
        }
        let mut waiting = self.shared.waiting();
        if waiting.get(&key).is_some_and(|w| w.header == header) {
            waiting.remove(&key);
        }
    }

    fn find_blob(&self, tenant: &str, key: Key, now: Timestamp) -> Option<Blob> {
        let (header, file) = self.blobs.find(tenant, key, now)?;
        let body = BlobBody::File(tokio::fs::File::from_std(file));
        Some(Blob { mime: header.mime, sha256: header.sha256, bytes: header.bytes, body })
    }

    fn take_missed(&mut self, session: SessionId) {
        let missed = self.shared.missed().remove(&session);
        if let Some(cells) = missed {
            self.notebooks.leave_out(session, cells);
        }
    }
}
