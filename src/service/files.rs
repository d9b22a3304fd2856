//! The files of a session: who may, what is asked of the guest, and what its refusals are to a caller. Paths are checked by the guest, which alone can.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use cellblock_wire::files::{
    Archive, At, Conditions, Delete, Known, List, Listing, Made, Move, Opened, Part, Read, Stat, Unpacked, Upload,
    Watch, Write, Written,
};
use futures_util::Stream;
use tokio::sync::oneshot;

use super::keys::Principal;
use super::transfer::{self, Pieces, STALLED, Sent};
use super::{Error, Service, unreachable_guest};
use crate::domain::ids::SessionId;
use crate::kernel::link::LinkError;
use crate::places::Place;
use crate::session::visits::{Visit, Weight};

/// When all of a body has gone out, its guest answers within this time: an archive is put in place by then.
const FINISHING: Duration = Duration::from_secs(120);
/// Longest reason of a guest's that is passed on, in characters.
const MAX_REASON: usize = 300;

/// What can't be done with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileFault {
    /// It is not there.
    Absent,
    /// The path is none, or what is there can't be meant.
    Invalid,
    /// It is a folder.
    IsFolder,
    /// It is no folder.
    NotFolder,
    /// Something is there already.
    Exists,
    /// It may not be reached.
    Denied,
    /// There is no room.
    NoSpace,
    /// It is too large.
    TooLarge,
    /// The conditions don't hold.
    Precondition,
    /// None of the part is there; the file's size.
    Range(u64),
    /// The upload is elsewhere; bytes that are there.
    Offset(u64),
    /// The content is another one.
    Digest,
    /// The archive is not taken.
    Archive,
    /// As much is under way as may be.
    Busy,
    /// The body came too slowly.
    Stalled,
    /// The body broke off.
    BrokeOff,
    /// The session's container did not do it.
    Failed,
}

impl FileFault {
    fn of(code: &str, number: Option<u64>) -> Self {
        match code {
            "not-found" => Self::Absent,
            "invalid" => Self::Invalid,
            "is-a-directory" => Self::IsFolder,
            "not-a-directory" => Self::NotFolder,
            "exists" => Self::Exists,
            "permission-denied" => Self::Denied,
            "no-space" => Self::NoSpace,
            "too-large" => Self::TooLarge,
            "precondition" => Self::Precondition,
            "range" => Self::Range(number.unwrap_or_default()),
            "offset" => Self::Offset(number.unwrap_or_default()),
            "digest" => Self::Digest,
            "archive" => Self::Archive,
            "busy" => Self::Busy,
            _ => Self::Failed,
        }
    }

    /// What is said where the guest has said nothing.
    fn words(self) -> &'static str {
        match self {
            Self::Digest => "the content has another SHA-256 than was announced; nothing was written",
            Self::Stalled => "nothing of the body came for 30 s; nothing was written",
            Self::BrokeOff => "the body broke off; nothing was written",
            _ => "the session's container took nothing for 30 s; nothing was written",
        }
    }
}

/// A file to be written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WriteFile {
    /// Where.
    pub path: String,
    /// Its permissions.
    pub mode: Option<u32>,
    /// Its length, where it is known.
    pub size: Option<u64>,
    /// Its SHA-256 in hex: what is there already is not written again, and other content not at all.
    pub sha256: Option<String>,
    /// What must be the case.
    pub conditions: Conditions,
    /// It can go on when it breaks off: the upload's name, where this part begins, and whether it is the last one.
    pub part: Option<(String, u64, bool)>,
    /// All attributes that it has then, by name. Code inside can change them.
    pub attributes: BTreeMap<String, String>,
}

/// A file is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileWritten {
    /// The file; nothing when a part of it has come.
    pub stat: Option<Stat>,
    /// There was none before.
    pub is_new: bool,
    /// Bytes that are there by now.
    pub received: u64,
    /// Its SHA-256 in hex, where it was announced or the file came in parts.
    pub sha256: Option<String>,
}

/// What a transfer holds while it lasts.
struct Held {
    visit: Visit,
    _place: Place<std::sync::Arc<str>>,
}

impl Service {
    /// What is in a folder. Names come from the code inside: they are hostile text.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn list_files(&self, who: &Principal, id: SessionId, asked: &List) -> Result<Listing, Error> {
        let visit = self.look(who, id).await?;
        visit.link.list_files(asked).await.map_err(|error| refused(id, error))
    }

    /// What is at a path.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn stat_file(&self, who: &Principal, id: SessionId, path: &str) -> Result<Stat, Error> {
        self.stat_file_with(who, id, &At { path: path.to_owned(), attributes: false }).await
    }

    /// The same, with its attributes if they are asked for.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn stat_file_with(&self, who: &Principal, id: SessionId, asked: &At) -> Result<Stat, Error> {
        let visit = self.look(who, id).await?;
        visit.link.stat_file(asked).await.map_err(|error| refused(id, error))
    }

    /// The bytes of a file, as they come. A link that breaks ends them with an error.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn read_file(&self, who: &Principal, id: SessionId, asked: &Read) -> Result<(Opened, Pieces), Error> {
        self.session(who, id)?;
        let held = self.carry(who, id).await?;
        let (opened, body) = held.visit.link.read_file(asked).await.map_err(|error| refused(id, error))?;
        let length = opened.length;
        Ok((opened, transfer::receive(body, Some(length), Some(STALLED), held)))
    }

    /// Writes a file, or a part of one. Whatever happens meanwhile, it is there whole or not at all.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn write_file<S, E>(
        &self,
        who: &Principal,
        id: SessionId,
        asked: WriteFile,
        body: S,
    ) -> Result<FileWritten, Error>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
        E: Send + 'static,
    {
        who.require_sessions()?;
        let held = self.carry(who, id).await?;
        let link = &held.visit.link;
        let WriteFile { path, mode, size, sha256, conditions, part, attributes } = asked;
        if let Some(sha256) = sha256.clone() {
            let known = Known { path: path.clone(), sha256: sha256.clone(), conditions: conditions.clone() };
            // Before anything is read, so that whoever waits to be told to go on need not send it.
            if let Some(stat) = link.is_file_known(&known).await.map_err(|error| refused(id, error))? {
                let received = stat.size;
                return Ok(FileWritten { stat: Some(stat), is_new: false, received, sha256: Some(sha256) });
            }
        }
        // Of a part only the guest has all of it.
        let announced = sha256.clone().filter(|_| part.is_none());
        let part = part.map(|(upload, offset, is_last)| Part { upload, offset, is_last, sha256 });
        let write = Write { path, mode, size, conditions, part, attributes };
        let (pieces, told) = transfer::send(body, announced.clone());
        let Written { stat, is_new, received, sha256 } = sent(id, link.write_file(&write, pieces), told).await?;
        Ok(FileWritten { stat, is_new, received, sha256: sha256.or(announced) })
    }

    /// How much of an upload that can go on is there.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn upload_received(&self, who: &Principal, id: SessionId, asked: &Upload) -> Result<u64, Error> {
        let visit = self.look(who, id).await?;
        visit.link.upload_received(asked).await.map_err(|error| refused(id, error))
    }

    /// Removes a file or a folder.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete_file(&self, who: &Principal, id: SessionId, asked: &Delete) -> Result<(), Error> {
        let visit = self.change(who, id).await?;
        visit.link.delete_file(asked).await.map_err(|error| refused(id, error))
    }

    /// Makes a folder.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn make_folder(&self, who: &Principal, id: SessionId, path: &str) -> Result<Made, Error> {
        let visit = self.change(who, id).await?;
        visit.link.make_folder(path).await.map_err(|error| refused(id, error))
    }

    /// Moves a file or a folder.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn move_file(&self, who: &Principal, id: SessionId, asked: &Move) -> Result<Made, Error> {
        let visit = self.change(who, id).await?;
        visit.link.move_file(asked).await.map_err(|error| refused(id, error))
    }

    /// What changes in a folder, a line of JSON each, for as long as somebody listens.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn watch_files(&self, who: &Principal, id: SessionId, asked: &Watch) -> Result<Pieces, Error> {
        let visit = self.look(who, id).await?;
        let body = visit.link.watch_files(asked).await.map_err(|error| refused(id, error))?;
        Ok(transfer::receive(body, None, None, visit))
    }

    /// A folder as a tar archive, as it comes.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn pack_files(&self, who: &Principal, id: SessionId, asked: &Archive) -> Result<Pieces, Error> {
        let held = self.carry(who, id).await?;
        let body = held.visit.link.pack_files(asked).await.map_err(|error| refused(id, error))?;
        Ok(transfer::receive(body, None, Some(STALLED), held))
    }

    /// Unpacks a tar archive into a folder, all of it or nothing.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn unpack_files<S, E>(
        &self,
        who: &Principal,
        id: SessionId,
        asked: &Archive,
        body: S,
    ) -> Result<Unpacked, Error>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
        E: Send + 'static,
    {
        who.require_sessions()?;
        let held = self.carry(who, id).await?;
        let (pieces, told) = transfer::send(body, None);
        sent(id, held.visit.link.unpack_files(asked, pieces), told).await
    }

    /// Refuses whoever may not change a session's files, before anything of a form is read.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn may_change_files(&self, who: &Principal, id: SessionId) -> Result<(), Error> {
        who.require_sessions()?;
        self.session(who, id).map(drop)
    }

    async fn look(&self, who: &Principal, id: SessionId) -> Result<Visit, Error> {
        Ok(self.session(who, id)?.enter(Weight::Light).await?)
    }

    async fn change(&self, who: &Principal, id: SessionId) -> Result<Visit, Error> {
        who.require_sessions()?;
        self.look(who, id).await
    }

    async fn carry(&self, who: &Principal, id: SessionId) -> Result<Held, Error> {
        let session = self.session(who, id)?;
        let tenant = std::sync::Arc::clone(&who.tenant);
        let place = self.transfers.take_within(tenant, 1, transfer::MOST_OF_ONE, transfer::PATIENCE).await;
        let place = place.map_err(|_| Error::TransfersBusy)?;
        Ok(Held { visit: session.enter(Weight::Bulk).await?, _place: place })
    }
}

/// Waits for the answer to a body that is being sent; with the SHA-256 of what was sent, if all of it was.
async fn sent<T>(
    id: SessionId,
    answer: impl Future<Output = Result<T, LinkError>>,
    told: oneshot::Receiver<Sent>,
) -> Result<T, Error> {
    let mut answer = std::pin::pin!(answer);
    let mut told = std::pin::pin!(told);
    let (early, outcome) = tokio::select! {
        answer = &mut answer => (Some(answer), None),
        outcome = &mut told => (None, outcome.ok()),
    };
    let answer = match early {
        Some(answer) => answer,
        None => match tokio::time::timeout(FINISHING, answer).await {
            Ok(answer) => answer,
            Err(_) => return Err(Error::GuestUnreachable),
        },
    };
    match answer {
        Ok(answer) => Ok(answer),
        // A guest's own reason comes first: it may have refused what then broke off.
        Err(error @ LinkError::Refused { .. }) if !matches!(outcome, Some(Sent::Failed(_))) => Err(refused(id, error)),
        Err(error) => {
            let outcome = match outcome {
                Some(outcome) => Some(outcome),
                None => told.try_recv().ok(),
            };
            match outcome {
                Some(Sent::Failed(fault)) => Err(Error::File(fault, fault.words().to_owned())),
                _ => Err(refused(id, error)),
            }
        }
    }
}

/// What a guest's refusal is to a caller. Its words are hostile, but harmless as text.
fn refused(id: SessionId, error: LinkError) -> Error {
    let LinkError::Refused { refusal, .. } = error else { return unreachable_guest(id, &error) };
    let reason: String = refusal.message.chars().filter(|c| !c.is_control()).take(MAX_REASON).collect();
    Error::File(FileFault::of(&refusal.code, refusal.number), reason)
}
