//! The working folder's files: listing, reading, writing. Nothing outside it is reached, and no link is followed.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use cellblock_wire::link::FileEntry;
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, open, openat, openat2, renameat, statat,
    unlinkat,
};
use rustix::io::Errno;

const MAX_ENTRIES: usize = 10_000;
const MAX_FOLDERS: usize = 10_000;
const MAX_PATH: usize = 4096;
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

/// The regular files below the folder, at most ten thousand.
///
/// # Errors
/// When the folder itself can't be read.
pub async fn list_files(workdir: &Path) -> Result<Vec<FileEntry>, FileError> {
    let root = root(workdir)?;
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::new()];
    let mut seen = 0;
    while let Some(path) = folders.pop() {
        seen += 1;
        if seen > MAX_FOLDERS || files.len() >= MAX_ENTRIES {
            break;
        }
        list_folder(&root, &path, &mut files, &mut folders);
        tokio::task::yield_now().await;
    }
    files.sort_by(|a: &FileEntry, b: &FileEntry| a.path.cmp(&b.path));
    Ok(files)
}

/// What can't be read is left out: user code changes the folder meanwhile.
fn list_folder(root: &OwnedFd, path: &Path, files: &mut Vec<FileEntry>, folders: &mut Vec<PathBuf>) {
    let folder = if path.as_os_str().is_empty() {
        openat(root, ".", FOLDER, Mode::empty())
    } else {
        open_beneath(root, path, FOLDER)
    };
    let Ok(folder) = folder else { return };
    let Ok(entries) = Dir::read_from(&folder) else { return };
    for entry in entries.flatten().take(MAX_ENTRIES) {
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        let Ok(stat) = statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        let path = path.join(name);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory if name != "." && name != ".." && folders.len() < MAX_FOLDERS => folders.push(path),
            FileType::RegularFile if files.len() < MAX_ENTRIES => {
                files.extend(
                    path.to_str().map(|path| FileEntry { path: path.to_owned(), size_bytes: stat.st_size as u64 }),
                );
            }
            _ => {}
        }
    }
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
        let temporary = format!(".cellblock-upload-{:016x}", u64::from_ne_bytes(random));
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

    /// Puts the file in its place.
    ///
    /// # Errors
    /// When a folder stands there.
    pub fn finish(mut self) -> Result<(), FileError> {
        let temporary = std::mem::take(&mut self.temporary);
        renameat(&self.folder, &temporary, &self.folder, &self.name).map_err(|errno| {
            let _ = unlinkat(&self.folder, &temporary, AtFlags::empty());
            failed("written")(errno)
        })
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
        upload.finish()
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
