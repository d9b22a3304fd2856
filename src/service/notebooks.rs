//! Notebooks of sessions, and the room that what is told whole takes in memory. How they are kept is the store's.

use std::sync::Arc;

use bytes::Bytes;

use super::keys::Principal;
use super::{Error, Service, trail};
use crate::domain::ids::SessionId;
use crate::places::{Full as NoPlace, Place};

/// KiB of notebooks on their way to callers at once, and those of one tenant: callers may read slowly.
pub(super) const NOTEBOOK_ROOM: (usize, usize) = (256 * 1024, 128 * 1024);

/// Room for an answer in memory.
#[derive(Debug)]
pub struct Room(Vec<Place<Arc<str>>>);

impl Room {
    /// More of it, for the same answer.
    pub fn join(&mut self, more: Self) {
        self.0.extend(more.0);
    }

    /// The answer, which gives the room back when it is taken.
    #[must_use]
    pub fn with(self, bytes: impl Into<Bytes>) -> Bytes {
        Bytes::from_owner(Fetched { bytes: bytes.into(), _room: self.0 })
    }
}

/// A notebook, or something else that is told whole, on its way to a caller. It has its part of the memory for those until the last piece of it is gone.
struct Fetched {
    bytes: Bytes,
    _room: Vec<Place<Arc<str>>>,
}

impl AsRef<[u8]> for Fetched {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Service {
    /// A session's notebook, as `nbformat` 4.5 has it; for a while after the session has ended too.
    ///
    /// # Errors
    /// [`Error::NotFound`] or [`Error::Forbidden`].
    pub async fn notebook(&self, who: &Principal, id: SessionId) -> Result<Bytes, Error> {
        who.require_read()?;
        self.require_notebook(who, id)?;
        let archive = self.archive.as_ref().ok_or(Error::NotFound("notebook"))?;
        let bytes = archive.notebook(&who.tenant, id).await.ok_or(Error::NotFound("notebook"))?;
        Ok(self.room(who, bytes.len() as u64)?.with(bytes))
    }

    /// Room for an answer that is in memory until it is taken.
    ///
    /// # Errors
    /// There is none, or none for its tenant.
    pub fn room(&self, who: &Principal, bytes: u64) -> Result<Room, Error> {
        // One that is larger than a tenant's part has that to itself.
        let (_, most) = NOTEBOOK_ROOM;
        let share = usize::try_from(bytes / 1024 + 1).unwrap_or(most).min(most);
        let room = self.notebook_room.take(Arc::clone(&who.tenant), share, most);
        room.map(|room| Room(vec![room])).map_err(|full| match full {
            NoPlace::OfOne => Error::OwnNotebooksBusy,
            NoPlace::All => Error::NotebooksBusy,
        })
    }

    /// Forgets a session's notebook.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn delete_notebook(&self, who: &Principal, id: SessionId) -> Result<(), Error> {
        who.require_sessions()?;
        trail::note_session(id);
        self.require_notebook(who, id)?;
        let archive = self.archive.as_ref().ok_or(Error::NotFound("notebook"))?;
        if archive.delete_notebook(&who.tenant, id).await { Ok(()) } else { Err(Error::NotFound("notebook")) }
    }

    /// A session that is not known any more is not known to be of a template that the key allows.
    fn require_notebook(&self, who: &Principal, id: SessionId) -> Result<(), Error> {
        let is_there = who.templates.is_none() || self.session(who, id).is_ok();
        if is_there { Ok(()) } else { Err(Error::NotFound("notebook")) }
    }
}
