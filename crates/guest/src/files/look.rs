//! Looks at all regular files below the working folder, for what has changed since an earlier look. Reads none of them.

use std::ffi::OsStr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, DirEntry, FileType, OFlags, Stat, openat, statat};
use rustix::io::Errno;

use super::path::{FOLDER, Links, open_beneath, open_root};
use super::{FileError, is_hidden};

const MAX_ENTRIES: usize = 10_000;
const MAX_FOLDERS: usize = 10_000;
/// All paths of one look together: ten thousand of the longest would be more than a cell can spare.
const MAX_PATH_BYTES: usize = 2 * 1024 * 1024;
/// Entries of a folder that are looked at in one go.
const PAUSE: usize = 256;

/// What tells one state of a file from another. Times are nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Its length in bytes.
    pub size: u64,
    /// When its bytes were written last.
    pub modified: i64,
    /// When anything of it was changed last.
    pub changed: i64,
    /// Its number.
    pub inode: u64,
}

impl From<&Stat> for Stamp {
    fn from(stat: &Stat) -> Self {
        let nanoseconds = |seconds: i64, rest: u64| seconds.saturating_mul(1_000_000_000).saturating_add(rest as i64);
        Self {
            size: stat.st_size as u64,
            modified: nanoseconds(stat.st_mtime, stat.st_mtime_nsec),
            changed: nanoseconds(stat.st_ctime, stat.st_ctime_nsec),
            inode: stat.st_ino,
        }
    }
}

/// What one look at the folder found.
#[derive(Debug, Default)]
pub struct Look {
    /// Regular files by path, in no order.
    pub files: Vec<(String, Stamp)>,
    /// Whether these are all of them, those with names that are no UTF-8 too.
    pub complete: bool,
    folders: Vec<PathBuf>,
    path_bytes: usize,
}

/// Looks at the regular files below the folder, at most ten thousand. Paths that are no UTF-8 are left out, and so are unfinished
/// uploads.
///
/// # Errors
/// When the folder itself can't be read.
pub async fn look(workdir: &Path) -> Result<Look, FileError> {
    let root = open_root(workdir)?;
    let mut look = Look { complete: true, folders: vec![PathBuf::new()], ..Look::default() };
    let mut seen = 0;
    while let Some(path) = look.folders.pop() {
        seen += 1;
        if seen > MAX_FOLDERS || look.is_full() {
            look.complete = false;
            break;
        }
        look.at_folder(&root, &path).await;
        if !look.folders.is_empty() {
            tokio::task::yield_now().await;
        }
    }
    Ok(look)
}

impl Look {
    fn is_full(&self) -> bool {
        self.files.len() >= MAX_ENTRIES || self.path_bytes >= MAX_PATH_BYTES
    }

    /// What can't be read is left out: user code changes the folder meanwhile.
    async fn at_folder(&mut self, root: &OwnedFd, path: &Path) {
        let folder = match path.as_os_str().is_empty() {
            true => openat(root, ".", FOLDER, rustix::fs::Mode::empty()),
            false => open_beneath(root, path, FOLDER, Links::Refuse),
        };
        let entries = folder.and_then(Dir::new);
        let Ok(mut entries) = entries else {
            self.complete &= matches!(entries, Err(Errno::NOENT));
            return;
        };
        let mut count = 0;
        while let Some(Ok(entry)) = entries.read() {
            count += 1;
            if count > MAX_ENTRIES || self.is_full() {
                self.complete = false;
                return;
            }
            let Ok(folder) = entries.fd() else { return };
            self.at_entry(folder, path, &entry);
            if count % PAUSE == 0 {
                tokio::task::yield_now().await;
            }
        }
    }

    fn at_entry(&mut self, folder: BorrowedFd<'_>, path: &Path, entry: &DirEntry) {
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        // Most file systems say here what it is, and of folders nothing else is needed.
        let stat = match entry.file_type() {
            FileType::RegularFile | FileType::Unknown => statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).ok(),
            _ => None,
        };
        let kind = stat.as_ref().map_or(entry.file_type(), |stat| FileType::from_raw_mode(stat.st_mode));
        match (kind, stat) {
            (FileType::Directory, _) if name == "." || name == ".." || is_hidden(name) => {}
            (FileType::Directory, _) if self.folders.len() < MAX_FOLDERS => self.folders.push(path.join(name)),
            (FileType::Directory, _) => self.complete = false,
            (FileType::RegularFile, Some(stat)) if !is_hidden(name) => {
                match path.join(name).into_os_string().into_string() {
                    Ok(path) => {
                        self.path_bytes += path.len();
                        self.files.push((path, Stamp::from(&stat)));
                    }
                    Err(_) => self.complete = false,
                }
            }
            _ => {}
        }
    }
}

/// Whether there is nothing at this path. What can't be looked at may be there.
#[must_use]
pub fn is_absent(workdir: &Path, path: &str) -> bool {
    let Ok(root) = open_root(workdir) else { return false };
    let found = open_beneath(&root, Path::new(path), OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Links::Refuse);
    matches!(found, Err(Errno::NOENT | Errno::NOTDIR))
}
