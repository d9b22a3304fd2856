//! Folders are made, things are moved and removed. Contents are the business of other rooms.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use cellblock_wire::files::{Conditions, Made};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, chmodat, fstat, mkdirat, openat, renameat, renameat_with,
    statat, unlinkat,
};
use rustix::io::Errno;

use super::look::Stamp;
use super::path::{FOLDER, Links, Place, make_folders};
use super::write::{Upload, check, rename, standing};
use super::{Download, FileError, failed, hidden_name, list};

/// Names that are tried for something whose own has been taken.
const OTHER_NAMES: u32 = 100;
/// A folder to which code adds all the while is left, out of sight, after this time.
const REMOVAL_TIME: Duration = Duration::from_secs(10 * 60);
/// Entries that are removed in one go.
const PAUSE: usize = 64;

/// Makes a folder, and those that it is in. One that is there is no error.
///
/// # Errors
/// When something else is there.
pub fn make_folder(place: &Place) -> Result<Made, FileError> {
    if place.is_root() {
        return Ok(Made { stat: list::stat(place)?, is_new: false });
    }
    let (folder, name) = place.made_parent()?;
    let is_new = match mkdirat(&folder, name, Mode::from_raw_mode(0o755)) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(errno) => return Err(failed("made")(errno)),
    };
    match openat(&folder, name, FOLDER, Mode::empty()) {
        Ok(made) => {
            let stat = fstat(made).map_err(failed("made"))?;
            Ok(Made { stat: list::entry(place.shown(&place.path).unwrap_or_default(), &stat), is_new })
        }
        Err(Errno::NOTDIR | Errno::LOOP) => Err(FileError::Exists("something that is no folder is there")),
        Err(errno) => Err(failed("made")(errno)),
    }
}

/// What is being removed: out of sight already.
#[derive(Debug)]
pub struct Removal {
    folder: OwnedFd,
    /// Hidden folders that are still to be emptied.
    left: Vec<OsString>,
}

/// Takes something out of sight. A folder that is not empty goes only with all that is in it.
///
/// # Errors
/// When it is not there, or may not go.
pub fn remove(place: &Place, recursive: bool, conditions: &Conditions) -> Result<Removal, FileError> {
    let (folder, name) = match place.parent() {
        Err(FileError::Absent) => {
            check(conditions, None)?;
            return Err(FileError::Absent);
        }
        parent => parent?,
    };
    let standing = standing(&folder, name);
    check(conditions, standing.as_ref())?;
    let Some(stat) = standing else { return Err(FileError::Absent) };
    let left = if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        unlinkat(&folder, name, AtFlags::empty()).map_err(failed("removed"))?;
        Vec::new()
    } else if recursive {
        let hidden = OsString::from(hidden_name()?);
        renameat(&folder, name, &folder, &hidden).map_err(failed("removed"))?;
        vec![hidden]
    } else {
        match unlinkat(&folder, name, AtFlags::REMOVEDIR) {
            Ok(()) => Vec::new(),
            Err(Errno::NOTEMPTY | Errno::EXIST) => return Err(FileError::IsFolder),
            Err(errno) => return Err(failed("removed")(errno)),
        }
    };
    Ok(Removal { folder, left })
}

impl Removal {
    /// One of a folder that nobody is told of.
    pub(super) fn of_hidden(folder: OwnedFd, name: OsString) -> Self {
        Self { folder, left: vec![name] }
    }

    /// Removes what is in folders. Those in them are moved up to where the first one is, so that no depth is too much.
    ///
    /// # Errors
    /// When something can't be removed; it stays out of sight.
    pub async fn finish(mut self) -> Result<(), FileError> {
        let (mut count, until) = (0, Instant::now() + REMOVAL_TIME);
        while let Some(name) = self.left.last().cloned() {
            let inner = match openat(&self.folder, &name, FOLDER, Mode::empty()) {
                // Its owner may take it from themselves, and so from us.
                Err(Errno::ACCESS) => {
                    chmodat(&self.folder, &name, Mode::RWXU, AtFlags::empty()).map_err(failed("removed"))?;
                    openat(&self.folder, &name, FOLDER, Mode::empty())
                }
                opened => opened,
            };
            let inner = match inner {
                Ok(inner) => inner,
                Err(Errno::NOENT) => {
                    self.left.pop();
                    continue;
                }
                Err(errno) => return Err(failed("removed")(errno)),
            };
            let mut up = Vec::new();
            let mut entries = Dir::read_from(&inner).map_err(failed("removed"))?;
            while let Some(Ok(entry)) = entries.read() {
                let name = OsStr::from_bytes(entry.file_name().to_bytes());
                if name == "." || name == ".." {
                    continue;
                }
                self.remove_entry(&inner, name, &mut up)?;
                count += 1;
                if count % PAUSE == 0 {
                    if Instant::now() > until {
                        return Err(failed("removed")(Errno::TIMEDOUT));
                    }
                    tokio::task::yield_now().await;
                }
            }
            match unlinkat(&self.folder, &name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => {
                    self.left.pop();
                }
                // Code inside adds to it; it is looked at again after the others.
                Err(Errno::NOTEMPTY | Errno::EXIST) if Instant::now() <= until => {
                    tokio::task::yield_now().await;
                }
                Err(errno) => return Err(failed("removed")(errno)),
            }
            self.left.extend(up);
        }
        Ok(())
    }

    fn remove_entry(&self, inner: &OwnedFd, name: &OsStr, up: &mut Vec<OsString>) -> Result<(), FileError> {
        let removed = match unlinkat(inner, name, AtFlags::empty()) {
            Err(Errno::ISDIR | Errno::PERM) => unlinkat(inner, name, AtFlags::REMOVEDIR),
            Err(Errno::ACCESS) => {
                chmodat(inner, ".", Mode::RWXU, AtFlags::empty()).map_err(failed("removed"))?;
                match unlinkat(inner, name, AtFlags::empty()) {
                    Err(Errno::ISDIR | Errno::PERM) => unlinkat(inner, name, AtFlags::REMOVEDIR),
                    other => other,
                }
            }
            other => other,
        };
        match removed {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                let hidden = OsString::from(hidden_name()?);
                let moved = match renameat(inner, name, &self.folder, &hidden) {
                    // A folder that can't be written can't be moved, since its `..` changes.
                    Err(Errno::ACCESS) => {
                        chmodat(inner, name, Mode::RWXU, AtFlags::empty()).map_err(failed("removed"))?;
                        renameat(inner, name, &self.folder, &hidden)
                    }
                    moved => moved,
                };
                moved.map_err(failed("removed"))?;
                up.push(hidden);
                Ok(())
            }
            Err(errno) => Err(failed("removed")(errno)),
        }
    }
}

/// Moves something; a file that stands there is replaced if it may be.
///
/// # Errors
/// When there is nothing to be moved, or something is in the way.
pub async fn move_to(from: &Place, to: &Place, overwrite: bool) -> Result<Made, FileError> {
    let (old_folder, old) = from.parent()?;
    let Some(stat) = standing(&old_folder, old) else { return Err(FileError::Absent) };
    let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    if !from.shares_root_with(to) {
        return match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => copy_away(from, to, overwrite).await,
            _ => Err(FileError::Invalid("only files can be moved between the working folder and /tmp")),
        };
    }
    if is_folder && to.path.starts_with(&from.path) {
        return Err(FileError::Invalid("a folder can't be moved into itself"));
    }
    let (root, parent) = (to.root()?, to.path.parent().filter(|parent| !parent.as_os_str().is_empty()));
    let Some(new) = to.path.file_name() else {
        return Err(FileError::Denied("this folder itself stays where and what it is"));
    };
    let new_folder = match parent {
        Some(parent) => make_folders(&root, parent).map_err(failed("moved"))?,
        None => root,
    };
    let is_new = standing(&new_folder, new).is_none();
    if !is_new && !overwrite {
        return Err(FileError::Exists("something is there already; \"overwrite\" replaces a file"));
    }
    rename((&old_folder, old), (&new_folder, new), overwrite).map_err(failed("moved"))?;
    let stat = statat(&new_folder, new, AtFlags::SYMLINK_NOFOLLOW).map_err(failed("moved"))?;
    Ok(Made { stat: list::entry(to.shown(&to.path).unwrap_or_default(), &stat), is_new })
}

/// Moves a file to another file system.
async fn copy_away(from: &Place, to: &Place, overwrite: bool) -> Result<Made, FileError> {
    let conditions = match overwrite {
        true => Conditions::default(),
        false => Conditions { if_none_match: Some(vec!["*".to_owned()]), ..Conditions::default() },
    };
    let in_the_way = |error| match error {
        FileError::Precondition => FileError::Exists("something is there already; \"overwrite\" replaces a file"),
        other => other,
    };
    let source = from.open(OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC, Links::Refuse)?;
    let stat = fstat(&source).map_err(failed("moved"))?;
    let (mode, before) = (stat.st_mode, Stamp::from(&stat));
    let mut download = Download::of(source)?;
    let mut upload = Upload::create(to, &conditions).map_err(in_the_way)?;
    loop {
        let chunk = download.read().map_err(failed("moved"))?;
        if chunk.is_empty() {
            break;
        }
        upload.write(&chunk)?;
        tokio::task::yield_now().await;
    }
    let (_, stat, is_new) = upload.finish(Some(mode), &conditions).map_err(in_the_way)?;
    take_away(from, before).map_err(failed("moved"))?;
    Ok(Made { stat, is_new })
}

/// Removes a file that was copied, in the state in which it was. What code has put there meanwhile, or written to it, was not copied and stays.
fn take_away(from: &Place, copied: Stamp) -> Result<(), Errno> {
    let Ok((folder, name)) = from.parent() else { return Ok(()) };
    let Ok(hidden) = hidden_name() else { return Err(Errno::IO) };
    // Once it is out of sight, nobody puts another one in its place.
    match renameat(&folder, name, &folder, &hidden) {
        Ok(()) => {}
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno),
    }
    let is_it = |now: Stamp| (now.inode, now.size, now.modified) == (copied.inode, copied.size, copied.modified);
    let removed = match statat(&folder, &hidden, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if is_it(Stamp::from(&stat)) => unlinkat(&folder, &hidden, AtFlags::empty()),
        Ok(_) => return put_back(&folder, &hidden, name),
        Err(errno) => Err(errno),
    };
    if removed.is_err() {
        put_back(&folder, &hidden, name)?;
    }
    removed
}

/// Gives what is out of sight its name again, or one that nothing has: something newer may be at its own by now.
fn put_back(folder: &OwnedFd, hidden: &str, name: &OsStr) -> Result<(), Errno> {
    let others = (1..=OTHER_NAMES).map(|n| {
        let mut other = name.to_owned();
        other.push(format!(".{n}"));
        other
    });
    for name in std::iter::once(name.to_owned()).chain(others) {
        match renameat_with(folder, hidden, folder, &name, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            put_back => return put_back,
        }
    }
    Err(Errno::EXIST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_stands_where_a_moved_file_was_is_never_lost() {
        let root = std::env::temp_dir().join(format!("cellblock-put-back-{}", std::process::id()));
        fs::create_dir_all(root.join("hidden")).unwrap();
        fs::write(root.join("hidden/inner"), "1").unwrap();
        let folder = openat(rustix::fs::CWD, &root, FOLDER, Mode::empty()).unwrap();
        fs::write(root.join("name"), "newer").unwrap();
        put_back(&folder, "hidden", OsStr::new("name")).unwrap();
        fs::write(root.join("again"), "2").unwrap();
        put_back(&folder, "again", OsStr::new("name")).unwrap();
        fs::write(root.join("alone"), "3").unwrap();
        put_back(&folder, "alone", OsStr::new("own")).unwrap();
        let read = |name: &str| fs::read_to_string(root.join(name)).unwrap();
        assert_eq!(["name", "name.1/inner", "name.2", "own"].map(read), ["newer", "1", "2", "3"]);
        fs::remove_dir_all(&root).unwrap();
    }
}
