//! Uploads that can go on: what has come of them is kept for a while, under a name that whoever sends them has chosen.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cellblock_wire::files::{Conditions, Part};
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::path::Place;
use super::{FileError, Upload, failed};

/// Uploads that wait for their next part, in all.
const MAX_WAITING: usize = 16;
/// They wait for this long.
const WAITING: Duration = Duration::from_secs(600);
/// Longest name of an upload, in bytes.
const MAX_NAME: usize = 64;
/// Bytes that are hashed in one go.
const PIECE: usize = 64 * 1024;

type Key = (PathBuf, String);

struct Waiting {
    upload: Upload,
    /// It is forgotten then.
    until: Instant,
}

#[derive(Default)]
struct Table {
    waiting: HashMap<Key, Waiting>,
    /// A task forgets those whose time is over, as long as there are any.
    is_swept: bool,
}

/// The uploads that wait.
#[derive(Clone, Default)]
pub struct Resumable(Arc<Mutex<Table>>);

fn key(place: &Place, upload: &str) -> Result<Key, FileError> {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if upload.is_empty() || upload.len() > MAX_NAME || !upload.bytes().all(is_name) {
        return Err(FileError::Invalid("an upload's name is 1 to 64 letters, digits, \"-\" and \"_\""));
    }
    Ok((PathBuf::from(place.shown(&place.path).unwrap_or_default()), upload.to_owned()))
}

impl Resumable {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that are there of an upload.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn received(&self, place: &Place, upload: &str) -> Result<u64, FileError> {
        let key = key(place, upload)?;
        self.lock().waiting.get(&key).map(|waiting| waiting.upload.size).ok_or(FileError::Absent)
    }

    /// Begins an upload, or goes on with it. Dropped, it waits for its next part.
    ///
    /// # Errors
    /// When the part begins elsewhere.
    pub fn receive(&self, place: &Place, part: &Part, conditions: &Conditions) -> Result<Receiving, FileError> {
        let key = key(place, &part.upload)?;
        let mut table = self.lock();
        let found = table.waiting.remove(&key);
        if part.offset == 0 {
            drop(found);
            if table.waiting.len() >= MAX_WAITING {
                return Err(FileError::Busy(
                    "as many uploads wait to go on as may be; they are forgotten in ten minutes",
                ));
            }
            drop(table);
            let upload = Some(Upload::create(place, conditions)?);
            return Ok(Receiving { of: self.clone(), key, upload });
        }
        match found {
            Some(waiting) if waiting.upload.size == part.offset => {
                drop(table);
                Ok(Receiving { of: self.clone(), key, upload: Some(waiting.upload) })
            }
            Some(waiting) => {
                let received = waiting.upload.size;
                table.waiting.insert(key, waiting);
                Err(FileError::Offset { received })
            }
            None => Err(FileError::Offset { received: 0 }),
        }
    }

    fn keep(&self, key: Key, upload: Upload) {
        let mut table = self.lock();
        if table.waiting.len() < MAX_WAITING {
            table.waiting.insert(key, Waiting { upload, until: Instant::now() + WAITING });
        }
        if !std::mem::replace(&mut table.is_swept, true) {
            tokio::spawn(self.clone().sweep());
        }
    }

    async fn sweep(self) {
        while let Some(next) = self.forget_old(Instant::now()) {
            tokio::time::sleep_until(next).await;
        }
    }

    /// Forgets those whose time is over, and says when the next one's is.
    fn forget_old(&self, now: Instant) -> Option<Instant> {
        let mut table = self.lock();
        table.waiting.retain(|_, waiting| waiting.until > now);
        let next = table.waiting.values().map(|waiting| waiting.until).min();
        table.is_swept = next.is_some();
        next
    }
}

/// An upload whose part comes.
pub struct Receiving {
    of: Resumable,
    key: Key,
    upload: Option<Upload>,
}

impl Receiving {
    /// The file.
    ///
    /// # Errors
    /// Never while it is received.
    pub fn upload(&mut self) -> Result<&mut Upload, FileError> {
        self.upload.as_mut().ok_or(FileError::BrokeOff)
    }

    /// Gives the file out of hand.
    ///
    /// # Errors
    /// Never while it is received.
    pub fn take(mut self) -> Result<Upload, FileError> {
        self.upload.take().ok_or(FileError::BrokeOff)
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        if let Some(upload) = self.upload.take() {
            self.of.keep(self.key.clone(), upload);
        }
    }
}

/// SHA-256 of what is open, in hex.
///
/// # Errors
/// When it can't be read.
pub async fn hash(file: impl std::os::fd::AsFd) -> Result<String, FileError> {
    let (mut hash, mut at, mut buffer) = (Sha256::new(), 0, vec![0; PIECE]);
    loop {
        let read = rustix::io::retry_on_intr(|| rustix::io::pread(&file, &mut *buffer, at)).map_err(failed("read"))?;
        if read == 0 {
            return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hash.update(&buffer[..read]);
        at += read as u64;
        tokio::task::yield_now().await;
    }
}
