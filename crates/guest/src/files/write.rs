//! A file that is written beside its place and put there whole. Unless finished, it disappears.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};

use cellblock_wire::files::{self as wire, Conditions};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, fchmod, fstat, openat, renameat, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

use super::path::Place;
use super::{FileError, attributes, failed, hidden_name, list};

/// Permissions of a new file.
const NEW: u32 = 0o644;

/// What stands at a name now.
pub(super) fn standing(folder: &OwnedFd, name: &OsStr) -> Option<rustix::fs::Stat> {
    statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).ok()
}

/// Refuses what the conditions don't admit.
pub(super) fn check(conditions: &Conditions, standing: Option<&rustix::fs::Stat>) -> Result<(), FileError> {
    let etag = standing.map(|stat| list::entry(String::new(), stat).etag);
    if conditions.hold(etag.as_deref()) { Ok(()) } else { Err(FileError::Precondition) }
}

/// Renames; what stands there is replaced only if it may be.
pub(super) fn rename(
    (from, old): (&OwnedFd, &OsStr),
    (to, new): (&OwnedFd, &OsStr),
    may_replace: bool,
) -> Result<(), Errno> {
    if may_replace {
        return renameat(from, old, to, new);
    }
    match renameat_with(from, old, to, new, RenameFlags::NOREPLACE) {
        // Some kernels, and some file systems, can't do it in one step.
        Err(Errno::NOSYS | Errno::INVAL) if standing(to, new).is_none() => renameat(from, old, to, new),
        Err(Errno::NOSYS) => Err(Errno::EXIST),
        other => other,
    }
}

/// A file that is being written.
#[derive(Debug)]
pub struct Upload {
    folder: OwnedFd,
    temporary: String,
    name: OsString,
    file: OwnedFd,
    shown: String,
    /// Bytes written.
    pub size: u64,
}

impl Upload {
    /// Makes the folders and an empty file.
    ///
    /// # Errors
    /// When they can't be made, or what must be the case isn't.
    pub fn create(place: &Place, conditions: &Conditions) -> Result<Self, FileError> {
        // Nothing is made for what is refused anyway.
        match place.parent() {
            Ok((folder, name)) => {
                let standing = standing(&folder, name);
                check(conditions, standing.as_ref())?;
                let is_folder = |stat: &rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
                if standing.as_ref().is_some_and(is_folder) {
                    return Err(FileError::IsFolder);
                }
            }
            Err(FileError::Absent) => check(conditions, None)?,
            Err(error) => return Err(error),
        }
        let (folder, name) = place.made_parent()?;
        let temporary = hidden_name()?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&folder, &temporary, flags, Mode::RUSR | Mode::WUSR).map_err(failed("written"))?;
        let shown = place.shown(&place.path).unwrap_or_default();
        Ok(Self { name: name.to_owned(), folder, temporary, file, shown, size: 0 })
    }

    /// The file itself, for a look at what is there.
    pub(super) fn reopen(&self) -> Result<OwnedFd, FileError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(&self.folder, &self.temporary, flags, Mode::empty()).map_err(failed("read"))?;
        let same = |a: &rustix::fs::Stat, b: &rustix::fs::Stat| (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino);
        let (own, found) = (fstat(&self.file).map_err(failed("read"))?, fstat(&file).map_err(failed("read"))?);
        // Code inside can see it, and put another in its place.
        if same(&own, &found) { Ok(file) } else { Err(FileError::Absent) }
    }

    /// Where it is going to be, for a look at its file system.
    pub(super) fn folder(&self) -> &OwnedFd {
        &self.folder
    }

    /// Appends.
    ///
    /// # Errors
    /// When there is no room, for one.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), FileError> {
        while !bytes.is_empty() {
            let wrote =
                rustix::io::retry_on_intr(|| rustix::io::write(self.file.as_fd(), bytes)).map_err(failed("written"))?;
            bytes = &bytes[wrote..];
            self.size += wrote as u64;
        }
        Ok(())
    }

    /// Says what it is beside its bytes.
    ///
    /// # Errors
    /// When that can't be kept.
    pub(super) fn describe(&self, attributes: &BTreeMap<String, String>) -> Result<(), FileError> {
        attributes::write(&self.file, attributes)
    }

    /// Puts the file in its place, and says how it stands there, and whether nothing stood there before.
    ///
    /// # Errors
    /// When a folder stands there, or what must be the case isn't.
    pub fn finish(
        mut self,
        mode: Option<u32>,
        conditions: &Conditions,
    ) -> Result<(rustix::fs::Stat, wire::Stat, bool), FileError> {
        let standing = standing(&self.folder, &self.name);
        check(conditions, standing.as_ref())?;
        let own = standing.as_ref().filter(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
        let mode = mode.or(own.map(|stat| stat.st_mode)).unwrap_or(NEW) & 0o777;
        fchmod(&self.file, Mode::from_raw_mode(mode)).map_err(failed("written"))?;
        let (from, to) = ((&self.folder, OsStr::new(&self.temporary)), (&self.folder, &*self.name));
        match rename(from, to, !conditions.want_new()) {
            Ok(()) => self.temporary.clear(),
            Err(Errno::EXIST) => return Err(FileError::Precondition),
            Err(errno) => return Err(failed("written")(errno)),
        }
        let stat = fstat(&self.file).map_err(failed("written"))?;
        let entry = list::entry(std::mem::take(&mut self.shown), &stat);
        Ok((stat, entry, standing.is_none()))
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.temporary.is_empty() {
            let _ = unlinkat(&self.folder, &self.temporary, AtFlags::empty());
        }
    }
}
