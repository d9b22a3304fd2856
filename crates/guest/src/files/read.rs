//! A file's bytes, or a part of them, in pieces. Files are read in the one thread there is, and a piece takes it microseconds.

use std::os::fd::OwnedFd;
use std::path::Path;

use bytes::Bytes;
use cellblock_wire::files::{self as wire, Opened};
use rustix::fs::{FileType, OFlags, fstat};
use rustix::io::Errno;

use super::look::Stamp;
use super::path::{Links, Place, RelativePath, open_beneath, open_root};
use super::{FileError, failed, list};

/// Bytes read at once.
pub const CHUNK: usize = 256 * 1024;
// Without O_NONBLOCK a FIFO would hold up the whole guest.
const READ: OFlags = OFlags::RDONLY.union(OFlags::NONBLOCK).union(OFlags::NOCTTY).union(OFlags::CLOEXEC);

/// A file that is being read.
#[derive(Debug)]
pub struct Download {
    file: OwnedFd,
    at: u64,
    /// Bytes that are still to come; nothing when it is read to its end, wherever that is by then.
    left: Option<u64>,
}

impl Download {
    /// Opens a regular file of the working folder, whole.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(workdir: &Path, path: &RelativePath) -> Result<Self, FileError> {
        let file = open_beneath(open_root(workdir)?, &path.0, READ, Links::Refuse).map_err(failed("opened"))?;
        regular(&file)?;
        Ok(Self { file, at: 0, left: None })
    }

    /// Opens what is asked for, in the state that it is in now.
    ///
    /// # Errors
    /// When there is no such file, or what must be the case is not.
    pub fn asked(place: &Place, asked: &wire::Read) -> Result<(Self, Opened), FileError> {
        let file = place.open(READ, Links::Follow)?;
        let stat = regular(&file)?;
        let stat = list::entry(String::new(), &stat);
        if !asked.conditions.match_holds(Some(&stat.etag)) {
            return Err(FileError::Precondition);
        }
        let is_known = !asked.conditions.none_match_holds(Some(&stat.etag));
        let range = asked.range.filter(|_| asked.if_range.as_ref().is_none_or(|tag| *tag == stat.etag));
        let (first, length) = match range {
            _ if is_known => (0, 0),
            Some(range) => range.within(stat.size).ok_or(FileError::Range { size: stat.size })?,
            None => (0, stat.size),
        };
        let opened = Opened { stat, first, length, is_part: range.is_some() && !is_known, is_known };
        Ok((Self { file, at: first, left: Some(length) }, opened))
    }

    /// What is open already, whole, in the state that it is in now.
    pub(super) fn of(file: OwnedFd) -> Result<Self, FileError> {
        let size = u64::try_from(regular(&file)?.st_size).unwrap_or_default();
        Ok(Self { file, at: 0, left: Some(size) })
    }

    /// The file's state now.
    ///
    /// # Errors
    /// When it can't be asked for.
    pub fn stamp(&self) -> Result<Stamp, Errno> {
        fstat(&self.file).map(|stat| Stamp::from(&stat))
    }

    /// The next piece; empty at the end.
    ///
    /// # Errors
    /// When it can't be read, or is shorter by now than was said.
    pub fn read(&mut self) -> Result<Bytes, Errno> {
        let most = self.left.map_or(CHUNK, |left| usize::try_from(left).unwrap_or(CHUNK).min(CHUNK));
        if most == 0 {
            return Ok(Bytes::new());
        }
        let mut chunk = Vec::with_capacity(most);
        rustix::io::retry_on_intr(|| {
            rustix::io::pread(&self.file, rustix::buffer::spare_capacity(&mut chunk), self.at)
        })?;
        // Space may have been for more than was asked for.
        chunk.truncate(most);
        self.at += chunk.len() as u64;
        if let Some(left) = &mut self.left {
            *left -= chunk.len() as u64;
            if chunk.is_empty() {
                return Err(Errno::IO);
            }
        }
        Ok(chunk.into())
    }
}

fn regular(file: &OwnedFd) -> Result<rustix::fs::Stat, FileError> {
    let stat = fstat(file).map_err(failed("opened"))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(stat),
        FileType::Directory => Err(FileError::IsFolder),
        _ => Err(FileError::Invalid("it is no regular file")),
    }
}
