//! Where a path leads: below which folder it is, and how it is opened without leaving that folder. Reads and writes nothing.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use cellblock_wire::files::{MAX_PATH, TMP_DIR};
use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, open, openat, openat2};
use rustix::io::Errno;

use super::{FileError, failed};

pub(super) const FOLDER: OFlags =
    OFlags::DIRECTORY.union(OFlags::RDONLY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// A folder, or a link to one. Where links are refused, only this way it is told that one was there.
pub(super) const FOLDER_OR_LINK: OFlags = OFlags::DIRECTORY.union(OFlags::RDONLY).union(OFlags::CLOEXEC);
/// Longest name, in bytes: Linux knows no longer one.
const MAX_NAME: usize = 255;

/// A path below a folder, without `.` and `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelativePath(pub(super) PathBuf);

impl RelativePath {
    /// The path as text, where it is UTF-8.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        self.0.to_str()
    }

    /// Checks a path. It is taken as it is, or not at all.
    ///
    /// # Errors
    /// When it is empty, absolute, long, or has steps that are no names.
    pub fn parse(bytes: &[u8]) -> Result<Self, FileError> {
        let is_name = |name: &[u8]| !matches!(name, b"" | b"." | b"..") && name.len() <= MAX_NAME;
        if bytes.len() > MAX_PATH || bytes.contains(&0) || !bytes.split(|byte| *byte == b'/').all(is_name) {
            return Err(FileError::Invalid(
                "a path is one or more names of at most 255 bytes between single slashes, none of them \".\" or \"..\"",
            ));
        }
        Ok(Self(Path::new(OsStr::from_bytes(bytes)).to_owned()))
    }
}

/// Folders that callers reach.
#[derive(Debug, Clone)]
pub struct Roots {
    workdir: PathBuf,
    tmp: PathBuf,
}

/// A path as somebody asks for it: below one of the folders, or one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    root: PathBuf,
    /// Below the folder; empty for the folder itself.
    pub(super) path: PathBuf,
    is_in_workdir: bool,
}

/// What becomes of links on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Links {
    /// They are no way.
    Refuse,
    /// They are followed as long as they stay below the folder.
    Follow,
}

impl Roots {
    /// The working folder, and the one for temporary files.
    #[must_use]
    pub fn new(workdir: &Path) -> Self {
        Self { workdir: workdir.to_owned(), tmp: PathBuf::from(TMP_DIR) }
    }

    /// Where a path leads.
    ///
    /// # Errors
    /// When it is none, or below no folder that callers reach.
    pub fn place(&self, path: &str) -> Result<Place, FileError> {
        let workdir = |path: PathBuf| Place { root: self.workdir.clone(), path, is_in_workdir: true };
        if path.is_empty() || path == "." {
            return Ok(workdir(PathBuf::new()));
        }
        let Some(absolute) = path.strip_prefix('/') else {
            return Ok(workdir(RelativePath::parse(path.as_bytes())?.0));
        };
        let whole = Path::new("/").join(RelativePath::parse(absolute.as_bytes())?.0);
        let below = |root: &Path| whole.strip_prefix(root).ok().map(Path::to_owned);
        // Where one of them is in the other, the inner one is meant: only tests have that.
        match (below(&self.workdir), below(&self.tmp)) {
            (Some(path), _) => Ok(workdir(path)),
            (_, Some(path)) => Ok(Place { root: self.tmp.clone(), path, is_in_workdir: false }),
            _ => Err(FileError::Denied("only the working folder and /tmp, and what is below them, can be reached")),
        }
    }
}

impl Place {
    /// Whether it is one of the folders itself.
    pub(super) fn is_root(&self) -> bool {
        self.path.as_os_str().is_empty()
    }

    /// Whether two places are below the same folder.
    pub(super) fn shares_root_with(&self, other: &Self) -> bool {
        self.root == other.root
    }

    pub(super) fn root(&self) -> Result<OwnedFd, FileError> {
        open_root(&self.root)
    }

    /// How callers write a path below the same folder.
    pub(super) fn shown(&self, path: &Path) -> Option<String> {
        let whole = if self.is_in_workdir { path.to_owned() } else { self.root.join(path) };
        whole.into_os_string().into_string().ok()
    }

    /// The path in the working folder, if it is one.
    pub(super) fn in_workdir(&self) -> Option<&Path> {
        self.is_in_workdir.then_some(&*self.path)
    }

    /// Opens it for a look.
    pub(super) fn open(&self, flags: OFlags, links: Links) -> Result<OwnedFd, FileError> {
        let root = self.root()?;
        let opened = match self.is_root() {
            true => openat(&root, ".", flags, Mode::empty()),
            false => open_beneath(&root, &self.path, flags, links),
        };
        opened.map_err(failed("opened"))
    }

    /// The folder that it is in, and its name there.
    ///
    /// # Errors
    /// When it has none, being one of the folders itself, or when that folder isn't there.
    pub(super) fn parent(&self) -> Result<(OwnedFd, &OsStr), FileError> {
        self.parent_with(|root, parent| open_beneath(root, parent, FOLDER_OR_LINK, Links::Refuse))
    }

    /// The same; the folder is made if it isn't there.
    pub(super) fn made_parent(&self) -> Result<(OwnedFd, &OsStr), FileError> {
        self.parent_with(make_folders)
    }

    fn parent_with(
        &self,
        open: impl FnOnce(&OwnedFd, &Path) -> Result<OwnedFd, Errno>,
    ) -> Result<(OwnedFd, &OsStr), FileError> {
        let Some(name) = self.path.file_name() else {
            return Err(FileError::Denied("this folder itself stays where and what it is"));
        };
        let (root, parent) = (self.root()?, self.path.parent().unwrap_or(Path::new("")));
        let folder = if parent.as_os_str().is_empty() { Ok(root) } else { open(&root, parent) };
        Ok((folder.map_err(failed("reached"))?, name))
    }
}

pub(super) fn open_root(root: &Path) -> Result<OwnedFd, FileError> {
    open(root, FOLDER_OR_LINK, Mode::empty()).map_err(failed("reached"))
}

/// Opens what is below a folder, or at least not outside it.
pub(super) fn open_beneath(root: impl AsFd, path: &Path, flags: OFlags, links: Links) -> Result<OwnedFd, Errno> {
    let mut resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    if links == Links::Refuse {
        resolve |= ResolveFlags::NO_SYMLINKS;
    }
    match openat2(&root, path, flags, Mode::empty(), resolve) {
        Err(Errno::NOSYS | Errno::PERM) => open_by_steps(&root, path, flags),
        // A folder was renamed meanwhile, so the kernel can't tell. Whoever goes on doing that is not served.
        Err(Errno::AGAIN) => openat2(&root, path, flags, Mode::empty(), resolve),
        other => other,
    }
}

/// The same where the kernel has no `openat2`, or hides it. No link is followed at all.
pub(super) fn open_by_steps(root: impl AsFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let mut folder = openat(root, ".", FOLDER, Mode::empty())?;
    let mut steps = path.components().peekable();
    while let Some(step) = steps.next() {
        let Component::Normal(name) = step else { return Err(Errno::INVAL) };
        let last = steps.peek().is_none();
        folder = openat(&folder, name, if last { flags | OFlags::NOFOLLOW } else { FOLDER }, Mode::empty())?;
    }
    Ok(folder)
}

/// Makes the folders of a path that aren't there, and opens the last one. No link is followed.
pub(super) fn make_folders(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    match open_beneath(root, path, FOLDER_OR_LINK, Links::Refuse) {
        Err(Errno::NOENT) => {}
        other => return other,
    }
    let mut folder = openat(root, ".", FOLDER, Mode::empty())?;
    for step in path.components() {
        match mkdirat(&folder, step.as_os_str(), Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
        folder = openat(&folder, step.as_os_str(), FOLDER, Mode::empty())?;
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_are_below_the_folders_or_none() {
        let roots = Roots::new(Path::new("/workspace"));
        let place = |path: &str| roots.place(path).map(|place| (place.root, place.path));
        let (work, tmp) = (PathBuf::from("/workspace"), PathBuf::from("/tmp"));
        for (path, root, below) in [
            ("", &work, ""),
            (".", &work, ""),
            ("a", &work, "a"),
            ("a b/\n/é😀", &work, "a b/\n/é😀"),
            ("...", &work, "..."),
            ("/workspace", &work, ""),
            ("/workspace/x/y", &work, "x/y"),
            ("/tmp", &tmp, ""),
            ("/tmp/x", &tmp, "x"),
        ] {
            assert_eq!(place(path).unwrap(), (root.clone(), PathBuf::from(below)), "{path:?}");
        }
        for path in
            ["..", "a/..", "../a", "a/../b", "a//b", "a/", "./a", "a/./b", "/", "//tmp", "/tmp/", "/tmp/../etc", "a\0b"]
        {
            assert!(matches!(place(path), Err(FileError::Invalid(_))), "{path:?}");
        }
        for path in ["/etc/passwd", "/workspaces", "/tmpx/a", "/proc/self/root", "/cellblock/guest", "/run/cellblock"] {
            assert!(matches!(place(path), Err(FileError::Denied(_))), "{path:?}");
        }
        assert!(matches!(place(&"x".repeat(256)), Err(FileError::Invalid(_))));
        assert!(matches!(place(&["x"; 2100].join("/")), Err(FileError::Invalid(_))));
    }

    proptest! {
        #[test]
        fn no_path_leaves_the_folder(bytes in proptest::collection::vec(prop_oneof![Just(b'/'), Just(b'.'), Just(b'a'), any::<u8>()], 0..12)) {
            if let Ok(RelativePath(path)) = RelativePath::parse(&bytes) {
                prop_assert!(path.is_relative() && path.components().all(|c| matches!(c, Component::Normal(_))));
            }
            if let Ok(text) = std::str::from_utf8(&bytes)
                && let Ok(place) = Roots::new(Path::new("/workspace")).place(text)
            {
                prop_assert!(place.path.is_relative() && place.path.components().all(|c| matches!(c, Component::Normal(_))));
            }
        }
    }
}
