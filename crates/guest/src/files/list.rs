//! What is in a folder, in the order of names, a page at a time: each folder comes before what is in it. Holds no more names than it tells.

use std::collections::{BTreeMap, BinaryHeap};
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cellblock_wire::files::{self as wire, Kind, Listing, MAX_DEPTH, MAX_LISTED};
use rustix::fs::{AtFlags, Dir, FileType, OFlags, fstat, openat, readlinkat, statat};
use rustix::io::Errno;

use super::look::Stamp;
use super::path::{FOLDER, FOLDER_OR_LINK, Links, Place, RelativePath, open_beneath};
use super::{FileError, attributes, failed, is_hidden};

/// Names that are looked at in one go.
const PAUSE: usize = 256;
/// Bytes of all paths of one page: the answer has a bound, and any byte may take six there.
const MAX_PATHS: usize = 384 * 1024;

/// An entry as it is told.
pub(super) fn entry(path: String, stat: &rustix::fs::Stat) -> wire::Stat {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        _ => Kind::Other,
    };
    let Stamp { size, modified, changed, inode } = Stamp::from(stat);
    let etag = format!("{inode:x}-{size:x}-{:x}-{:x}", modified as u64, changed as u64);
    wire::Stat { path, kind, size, mode: stat.st_mode & 0o7777, modified, etag, ..wire::Stat::default() }
}

/// What is there. A link itself, not what it leads to.
///
/// # Errors
/// When there is nothing, or it can't be reached.
pub fn stat(place: &Place) -> Result<wire::Stat, FileError> {
    let stat = match place.is_root() {
        true => fstat(place.root()?).map_err(failed("looked at"))?,
        false => {
            let parent = place.path.parent().unwrap_or(Path::new(""));
            let (root, name) = (place.root()?, place.path.file_name().unwrap_or_default());
            let folder = match parent.as_os_str().is_empty() {
                true => root,
                false => open_beneath(&root, parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Links::Follow)
                    .map_err(failed("looked at"))?,
            };
            statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed("looked at"))?
        }
    };
    let told = entry(place.shown(&place.path).unwrap_or_default(), &stat);
    Ok(if told.kind == Kind::Symlink { with_target(told, &place.root()?, &place.path) } else { told })
}

/// The same, with its attributes if they are asked for.
///
/// # Errors
/// See [`stat`].
pub fn stat_of(place: &Place, with_attributes: bool) -> Result<wire::Stat, FileError> {
    let told = stat(place)?;
    let attributes = if with_attributes { attributes::read(place.root()?, &place.path) } else { BTreeMap::new() };
    Ok(wire::Stat { attributes, ..told })
}

/// A link with where it leads, as far as that can be told.
fn with_target(told: wire::Stat, root: &OwnedFd, path: &Path) -> wire::Stat {
    let link = open_beneath(root, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Links::Follow);
    let target = link.and_then(|link| readlinkat(link, "", Vec::new()));
    let there = open_beneath(root, path, OFlags::PATH | OFlags::CLOEXEC, Links::Follow).and_then(fstat);
    wire::Stat {
        target: target
            .ok()
            .and_then(|target| target.into_string().ok())
            .filter(|target| target.len() <= wire::MAX_PATH),
        target_kind: there.ok().map(|stat| entry(String::new(), &stat).kind),
        ..told
    }
}

/// What is in a folder; of something else, that itself.
///
/// # Errors
/// When there is nothing.
pub async fn list(place: &Place, asked: &wire::List) -> Result<Listing, FileError> {
    let own = stat(place)?;
    let limit = asked.limit.clamp(1, MAX_LISTED);
    if !matches!(own.kind, Kind::Directory | Kind::Symlink) {
        return Ok(Listing { entries: vec![own], ..Listing::default() });
    }
    let root = match place.open(FOLDER_OR_LINK, Links::Follow) {
        Err(FileError::NotFolder | FileError::Denied(_)) if own.kind == Kind::Symlink => {
            return Ok(Listing { entries: vec![own], ..Listing::default() });
        }
        opened => opened?,
    };
    let after = asked.after.as_ref().map(|after| below(place, after)).transpose()?;
    // One more says whether there are more, and one of each folder may only lead to where the last page has ended.
    let mut walk = Walk::new(root, asked.depth.clamp(1, MAX_DEPTH), limit + 2, after).await?;
    let (mut listing, mut bytes) = (Listing::default(), 0);
    while let Some((path, stat)) = walk.next().await {
        let Some(shown) = place.shown(&place.path.join(&path)).filter(|path| path.len() <= wire::MAX_PATH) else {
            listing.omitted += 1;
            continue;
        };
        let mut told = entry(shown, &stat);
        if told.kind == Kind::Symlink {
            told = with_target(told, &walk.root, &path);
        }
        if asked.attributes {
            told.attributes = attributes::read(&walk.root, &path);
        }
        bytes += told.attributes.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
        bytes += told.path.len() + told.target.as_ref().map_or(0, String::len);
        if listing.entries.len() == limit || bytes > MAX_PATHS {
            listing.truncated = true;
            break;
        }
        listing.entries.push(told);
    }
    listing.omitted += walk.omitted;
    Ok(listing)
}

/// The part of a path that is below a place.
fn below(place: &Place, path: &str) -> Result<PathBuf, FileError> {
    let shown = place.shown(&place.path).unwrap_or_default();
    let rest =
        Path::new(path).strip_prefix(&shown).map_err(|_| FileError::Invalid("the cursor is of another folder"))?;
    RelativePath::parse(rest.as_os_str().as_bytes()).map(|path| path.0)
}

/// A folder that is being walked through.
struct Level {
    path: PathBuf,
    /// Names that are still to come, the next one last.
    names: Vec<OsString>,
}

/// Walks through a folder and those in it. What goes away meanwhile is left out.
pub(super) struct Walk {
    root: OwnedFd,
    depth: usize,
    /// Most names of one folder that are kept.
    keep: usize,
    after: Option<PathBuf>,
    levels: Vec<Level>,
    /// What could not be looked at.
    pub(super) omitted: u64,
}

impl Walk {
    /// Begins with the folder's first names, after a path if there is one.
    pub(super) async fn new(
        root: OwnedFd,
        depth: usize,
        keep: usize,
        after: Option<PathBuf>,
    ) -> Result<Self, FileError> {
        let mut walk = Self { root, depth, keep, after, levels: Vec::new(), omitted: 0 };
        let names = walk.names(Path::new("")).await.map_err(failed("listed"))?;
        walk.levels.push(Level { path: PathBuf::new(), names });
        Ok(walk)
    }

    /// The next entry, and its path below the folder.
    pub(super) async fn next(&mut self) -> Option<(PathBuf, rustix::fs::Stat)> {
        loop {
            let level = self.levels.last_mut()?;
            let Some(name) = level.names.pop() else {
                self.levels.pop();
                continue;
            };
            let path = level.path.join(name);
            let Ok(stat) = self.look(&path) else {
                self.omitted += 1;
                continue;
            };
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory && self.levels.len() < self.depth {
                match self.names(&path).await {
                    Ok(names) => self.levels.push(Level { path: path.clone(), names }),
                    Err(_) => self.omitted += 1,
                }
            }
            // A folder that leads to what comes next was told before.
            if self.after.as_ref().is_none_or(|after| path > *after) {
                return Some((path, stat));
            }
        }
    }

    fn look(&self, path: &Path) -> Result<rustix::fs::Stat, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        fstat(open_beneath(&self.root, path, flags, Links::Refuse)?)
    }

    /// The first names of a folder, the very first one last.
    async fn names(&self, path: &Path) -> Result<Vec<OsString>, Errno> {
        let folder = match path.as_os_str().is_empty() {
            true => openat(&self.root, ".", FOLDER, rustix::fs::Mode::empty())?,
            false => open_beneath(&self.root, path, FOLDER, Links::Refuse)?,
        };
        let mut entries = Dir::new(folder)?;
        let (mut first, mut count) = (BinaryHeap::new(), 0);
        while let Some(entry) = entries.read() {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            count += 1;
            if count % PAUSE == 0 {
                tokio::task::yield_now().await;
            }
            if name == "." || name == ".." || is_hidden(name) || !self.is_wanted(path, name) {
                continue;
            }
            if first.len() < self.keep {
                first.push(name.to_owned());
            } else if first.peek().is_some_and(|last: &OsString| name < last.as_os_str()) {
                first.pop();
                first.push(name.to_owned());
            }
        }
        let mut names = first.into_sorted_vec();
        names.reverse();
        Ok(names)
    }

    /// Whether it comes after where the walk begins, or leads there.
    fn is_wanted(&self, folder: &Path, name: &OsStr) -> bool {
        let Some(after) = &self.after else { return true };
        let path = folder.join(name);
        path > *after || after.starts_with(&path)
    }
}
