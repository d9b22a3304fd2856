//! Files: what callers do with those of a session. Nothing outside the working folder and the one for temporary files is reached.
//!
//! ```text
//! api ─┬─ list, read, write, change     path: where all of it is
//!      ├─ resume ─ write
//!      ├─ pack, unpack ─ write, change  archives
//!      └─ watch ─ list
//! look: what `changes` compares
//! ```
//!
//! All of it is hostile at once: the paths, which callers send, and the files, which code inside makes, links and swaps meanwhile. So every step is taken
//! relative to an open folder, and what is written is put in its place in one step.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{fstatvfs, statvfs};
use rustix::io::Errno;

pub mod api;
mod attributes;
pub mod change;
pub mod list;
pub mod look;
pub mod pack;
pub mod path;
pub mod read;
pub mod resume;
pub mod unpack;
pub mod watch;
pub mod write;

pub use look::{Stamp, is_absent, look};
pub use path::{Place, RelativePath, Roots};
pub use read::Download;
pub use write::Upload;

/// How names begin of what is not finished. They are not told, whatever they are.
const HIDDEN: &str = ".cellblock-upload-";

/// Why something can't be done with a file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is none.
    #[error("there is no such file or folder")]
    Absent,
    /// The path is none, or what is there is not what can be meant.
    #[error("{0}")]
    Invalid(&'static str),
    /// It is a folder.
    #[error("it is a folder")]
    IsFolder,
    /// It is none, or a part of its path is none.
    #[error("it is no folder, or a part of its path is none")]
    NotFolder,
    /// Something is there already.
    #[error("{0}")]
    Exists(&'static str),
    /// It may not be reached.
    #[error("{0}")]
    Denied(&'static str),
    /// There is no room. How much there is, where that is known.
    #[error("there is no room: {}", left(*.0))]
    NoSpace(Option<u64>),
    /// It is longer than a file may be.
    #[error("it is larger than a file may be here")]
    TooLarge,
    /// What must be the case isn't.
    #[error("what is there is not what the conditions ask for")]
    Precondition,
    /// None of the part that is asked for is there.
    #[error("the file has {size} bytes, and none of those that were asked for")]
    Range {
        /// The file's size.
        size: u64,
    },
    /// The upload is at another place.
    #[error("{received} bytes of the upload are here, and the next part begins there")]
    Offset {
        /// Bytes that are there.
        received: u64,
    },
    /// It is not the content that was announced.
    #[error("the content has another SHA-256 than was announced")]
    Digest,
    /// An archive that is not taken.
    #[error("the archive is refused: {0}")]
    Archive(String),
    /// As much of this is under way as may be.
    #[error("{0}")]
    Busy(&'static str),
    /// The body did not come, or broke off.
    #[error("the body broke off")]
    BrokeOff,
    /// The file system refused.
    #[error("it can't be {0}: {1}")]
    Failed(&'static str, Errno),
}

fn left(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "the disk is full".to_owned(), |bytes| format!("{bytes} bytes are left"))
}

/// What the file system says, as it is told.
fn failed(what: &'static str) -> impl Fn(Errno) -> FileError {
    move |errno| match errno {
        Errno::NOENT => FileError::Absent,
        Errno::LOOP | Errno::XDEV => FileError::Denied("the path leads through a link, or out of the folder"),
        Errno::ACCESS | Errno::PERM => FileError::Denied("its permissions don't allow it"),
        Errno::NOTDIR => FileError::NotFolder,
        Errno::ISDIR => FileError::IsFolder,
        Errno::EXIST => FileError::Exists("something is there already"),
        Errno::NOTEMPTY => FileError::Exists("a folder is there that is not empty"),
        Errno::NOSPC | Errno::DQUOT => FileError::NoSpace(None),
        Errno::FBIG => FileError::TooLarge,
        Errno::NAMETOOLONG => FileError::Invalid("a path has at most 4095 bytes, each name in it at most 255"),
        Errno::NXIO => FileError::Invalid("it is no regular file"),
        errno => FileError::Failed(what, errno),
    }
}

/// Whether a name is of something that is not finished.
pub(crate) fn is_hidden(name: &OsStr) -> bool {
    name.len() == HIDDEN.len() + 16 && name.as_bytes().starts_with(HIDDEN.as_bytes())
}

fn hidden_name() -> Result<String, FileError> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|_| FileError::Failed("written", Errno::IO))?;
    Ok(format!("{HIDDEN}{:016x}", u64::from_ne_bytes(random)))
}

/// Bytes in use of the file system that a folder is, if it has a bound.
#[must_use]
pub fn used_bytes(folder: &Path) -> Option<u64> {
    let stat = statvfs(folder).ok().filter(|stat| stat.f_blocks > 0)?;
    Some(stat.f_blocks.saturating_sub(stat.f_bfree).saturating_mul(stat.f_frsize))
}

/// Bytes that are left of the file system that a folder is in, if it has a bound.
fn free_bytes(folder: impl AsFd) -> Option<u64> {
    let stat = fstatvfs(folder).ok().filter(|stat| stat.f_blocks > 0)?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests;
