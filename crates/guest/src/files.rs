//! The working folder's files: listing, reading, writing. Nothing outside it is reached, and no link is followed.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use cellblock_wire::link::FileEntry;
use cellblock_wire::packages::PACKAGES_NAME;
use rustix::fs::{
    AtFlags, Dir, DirEntry, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, mkdirat, open, openat, openat2,
    renameat, statat, statvfs, unlinkat,
};
use rustix::io::Errno;

const MAX_ENTRIES: usize = 10_000;
const MAX_FOLDERS: usize = 10_000;
const MAX_PATH: usize = 4096;
/// All paths of one look together: ten thousand of the longest would be more than a cell can spare.
const MAX_PATH_BYTES: usize = 2 * 1024 * 1024;
/// Entries of a folder that are looked at in one go.
const PAUSE: usize = 256;
const UPLOAD: &str = ".cellblock-upload-";
/// Bytes read at once. Files are read and written in the one thread there is, in pieces that take it microseconds.
const CHUNK: usize = 64 * 1024;
const FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::RDONLY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Why a file can't be had.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is none.
    #[error("there is no such file")]
    Absent,
    /// It is no regular file, or its path is none.
    #[error("{0}")]
    Invalid(&'static str),
    /// The file system refused.
    #[error("the file can't be {0}: {1}")]
    Failed(&'static str, Errno),
}

/// A path below the working folder, without `.` and `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelativePath(PathBuf);

impl RelativePath {
    /// The path as text, where it is UTF-8.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        self.0.to_str()
    }

    /// Checks a path.
    ///
    /// # Errors
    /// When it is empty, absolute, long, or leaves the folder.
    pub fn parse(bytes: &[u8]) -> Result<Self, FileError> {
        let path = Path::new(OsStr::from_bytes(bytes));
        let is_plain = path.components().all(|c| matches!(c, Component::Normal(_)));
        if bytes.is_empty() || bytes.len() > MAX_PATH || bytes.contains(&0) || !is_plain || bytes.ends_with(b"/") {
            return Err(FileError::Invalid("a file's path is relative and stays below the working folder"));
        }
        Ok(Self(path.to_owned()))
    }
}

fn failed(what: &'static str) -> impl Fn(Errno) -> FileError {
    move |errno| match errno {
        Errno::NOENT => FileError::Absent,
        Errno::LOOP | Errno::XDEV | Errno::NOTDIR => FileError::Invalid("the path leads through a link or a file"),
        Errno::ISDIR | Errno::NXIO => FileError::Invalid("it is no regular file"),
        errno => FileError::Failed(what, errno),
    }
}

fn root(workdir: &Path) -> Result<OwnedFd, FileError> {
    open(workdir, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed("reached"))
}

fn open_beneath(root: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match openat2(root, path, flags, Mode::empty(), resolve) {
        Err(Errno::NOSYS | Errno::PERM) => open_by_steps(root, path, flags),
        other => other,
    }
}

/// The same where the kernel has no `openat2`, or hides it.
fn open_by_steps(root: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let mut folder = openat(root, ".", FOLDER, Mode::empty())?;
    let mut steps = path.components().peekable();
    while let Some(step) = steps.next() {
        let last = steps.peek().is_none();
        folder =
            openat(&folder, step.as_os_str(), if last { flags | OFlags::NOFOLLOW } else { FOLDER }, Mode::empty())?;
    }
    Ok(folder)
}

/// Bytes in use of the file system that a folder is, if it has a bound.
#[must_use]
pub fn used_bytes(folder: &Path) -> Option<u64> {
    let stat = statvfs(folder).ok().filter(|stat| stat.f_blocks > 0)?;
    Some(stat.f_blocks.saturating_sub(stat.f_bfree).saturating_mul(stat.f_frsize))
}

/// The regular files below the folder, at most ten thousand.
///
/// # Errors
/// When the folder itself can't be read.
pub async fn list_files(workdir: &Path) -> Result<Vec<FileEntry>, FileError> {
    let entry = |(path, stamp): (String, Stamp)| FileEntry { path, size_bytes: stamp.size };
    let mut files: Vec<FileEntry> = look(workdir).await?.files.into_iter().map(entry).collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

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
    let root = root(workdir)?;
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
            true => openat(root, ".", FOLDER, Mode::empty()),
            false => open_beneath(root, path, FOLDER),
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
            (FileType::Directory, _) if name == "." || name == ".." => {}
            // What is installed is no file of the code's own.
            (FileType::Directory, _) if name == PACKAGES_NAME && path.as_os_str().is_empty() => {}
            (FileType::Directory, _) if self.folders.len() < MAX_FOLDERS => self.folders.push(path.join(name)),
            (FileType::Directory, _) => self.complete = false,
            (FileType::RegularFile, Some(stat)) if !is_upload(name) => {
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
    let Ok(root) = root(workdir) else { return false };
    let found = open_beneath(&root, Path::new(path), OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC);
    matches!(found, Err(Errno::NOENT | Errno::NOTDIR))
}

/// A file that is being read.
#[derive(Debug)]
pub struct Download(OwnedFd);

impl Download {
    /// Opens a regular file.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(workdir: &Path, path: &RelativePath) -> Result<Self, FileError> {
        // Without O_NONBLOCK a FIFO would hold up the whole guest.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = open_beneath(&root(workdir)?, &path.0, flags).map_err(failed("opened"))?;
        let stat = fstat(&file).map_err(failed("opened"))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok(Self(file)),
            _ => Err(FileError::Invalid("it is no regular file")),
        }
    }

    /// The file's state now.
    ///
    /// # Errors
    /// When it can't be asked for.
    pub fn stamp(&self) -> Result<Stamp, Errno> {
        fstat(&self.0).map(|stat| Stamp::from(&stat))
    }

    /// The next piece; empty at the end.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn read(&mut self) -> Result<Bytes, Errno> {
        let mut chunk = Vec::with_capacity(CHUNK);
        rustix::io::retry_on_intr(|| rustix::io::read(&self.0, rustix::buffer::spare_capacity(&mut chunk)))?;
        Ok(chunk.into())
    }
}

fn is_upload(name: &OsStr) -> bool {
    name.len() == UPLOAD.len() + 16 && name.as_bytes().starts_with(UPLOAD.as_bytes())
}

/// A file that is being written beside its place. Unless finished, it disappears.
#[derive(Debug)]
pub struct Upload {
    folder: OwnedFd,
    temporary: String,
    name: std::ffi::OsString,
    file: OwnedFd,
}

impl Upload {
    /// Makes the folders and an empty file.
    ///
    /// # Errors
    /// When they can't be made.
    pub fn create(workdir: &Path, path: &RelativePath) -> Result<Self, FileError> {
        let mut folder = root(workdir)?;
        let Some(name) = path.0.file_name() else { return Err(FileError::Invalid("the path names no file")) };
        for step in path.0.parent().into_iter().flat_map(Path::components) {
            match mkdirat(&folder, step.as_os_str(), Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed("written")(errno)),
            }
            folder = openat(&folder, step.as_os_str(), FOLDER, Mode::empty()).map_err(failed("written"))?;
        }
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|_| FileError::Failed("written", Errno::IO))?;
        let temporary = format!("{UPLOAD}{:016x}", u64::from_ne_bytes(random));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&folder, &temporary, flags, Mode::RUSR | Mode::WUSR).map_err(failed("written"))?;
        Ok(Self { folder, temporary, name: name.to_owned(), file })
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
        }
        Ok(())
    }

    /// Puts the file in its place, and says how it stands there.
    ///
    /// # Errors
    /// When a folder stands there.
    pub fn finish(mut self) -> Result<Stamp, FileError> {
        let temporary = std::mem::take(&mut self.temporary);
        renameat(&self.folder, &temporary, &self.folder, &self.name).map_err(|errno| {
            let _ = unlinkat(&self.folder, &temporary, AtFlags::empty());
            failed("written")(errno)
        })?;
        fstat(&self.file).map(|stat| Stamp::from(&stat)).map_err(failed("written"))
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.temporary.is_empty() {
            let _ = unlinkat(&self.folder, &self.temporary, AtFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;

    fn path(path: &str) -> RelativePath {
        RelativePath::parse(path.as_bytes()).unwrap()
    }

    fn put(root: &Path, at: &str, bytes: &[u8]) -> Result<(), FileError> {
        let mut upload = Upload::create(root, &path(at))?;
        upload.write(bytes)?;
        upload.finish().map(drop)
    }

    fn get(root: &Path, at: &str) -> Result<Vec<u8>, FileError> {
        let mut download = Download::open(root, &path(at))?;
        let mut all = Vec::new();
        while let Ok(chunk) = download.read() {
            if chunk.is_empty() {
                break;
            }
            all.extend(chunk);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn files_stay_below_the_folder_and_links_are_not_followed() {
        let base = std::env::temp_dir().join(format!("cellblock-files-{}", std::process::id()));
        let root = base.join("work");
        std::fs::create_dir_all(&root).unwrap();
        std::fs::write(base.join("secret"), "s").unwrap();
        let big = vec![7; 200_000];
        put(&root, "a/b/c.bin", &big).unwrap();
        put(&root, "a/b/c.bin", &big[1..]).unwrap();
        assert_eq!(get(&root, "a/b/c.bin").unwrap(), &big[1..]);
        symlink(base.join("secret"), root.join("link")).unwrap();
        symlink(&base, root.join("out")).unwrap();
        assert!(matches!(get(&root, "link"), Err(FileError::Invalid(_))));
        assert!(matches!(get(&root, "out/secret"), Err(FileError::Invalid(_))));
        assert!(matches!(put(&root, "out/new", b""), Err(FileError::Invalid(_))));
        assert!(matches!(put(&root, "a/b", b""), Err(FileError::Invalid(_))));
        assert!(matches!(get(&root, "a"), Err(FileError::Invalid(_))));
        assert!(matches!(get(&root, "no"), Err(FileError::Absent)));
        put(&root, "link", b"mine").unwrap();
        assert_eq!(std::fs::read(base.join("secret")).unwrap(), b"s");
        let by_steps = open_by_steps(&super::root(&root).unwrap(), Path::new("out/secret"), OFlags::RDONLY);
        assert!(matches!(by_steps, Err(Errno::NOTDIR | Errno::LOOP)));
        drop(Upload::create(&root, &path("a/unfinished")).unwrap());
        rustix::fs::mknodat(rustix::fs::CWD, root.join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert!(matches!(get(&root, "fifo"), Err(FileError::Invalid(_))));
        let listed: Vec<_> = list_files(&root).await.unwrap().into_iter().map(|f| (f.path, f.size_bytes)).collect();
        assert_eq!(listed, [("a/b/c.bin".to_owned(), 199_999), ("link".to_owned(), 4)]);
        std::fs::remove_dir_all(base).unwrap();
    }

    proptest! {
        #[test]
        fn no_path_leaves_the_folder(bytes in proptest::collection::vec(prop_oneof![Just(b'/'), Just(b'.'), Just(b'a'), any::<u8>()], 0..12)) {
            if let Ok(RelativePath(path)) = RelativePath::parse(&bytes) {
                prop_assert!(path.is_relative() && !path.components().any(|c| c == Component::ParentDir));
            }
        }
    }
}
