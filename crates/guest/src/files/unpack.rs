//! A tar archive is unpacked into a folder: first out of sight, and put in place when all of it has come and nothing of it was refused.
//!
//! Refused are names that are absolute or lead up, links that lead out, devices and sparse files, and more than there is room for. The archive's bytes are
//! hostile: its heads are read by a library, everything with a length is bounded here.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use cellblock_wire::files::Unpacked;
use flate2::write::MultiGzDecoder;
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, fchmod, fstat, futimens, linkat, mkdirat,
    openat, renameat, renameat_with, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use tar::{EntryType, Header, PaxExtensions};

use super::change::Removal;
use super::path::{FOLDER, Links, Place, RelativePath, make_folders, open_beneath};
use super::{FileError, Stamp, failed, free_bytes, hidden_name};

const BLOCK: usize = 512;
/// Entries of one archive.
const MAX_ENTRIES: u64 = 100_000;
/// Bytes of all its names.
const MAX_NAMES: usize = 16 * 1024 * 1024;
/// Bytes of one head's extensions: a path, a link's target, and more than programs write beside them.
const MAX_EXTENSION: u64 = 64 * 1024;
/// Bytes that are decompressed in one go: a thousand times as many may come of them.
const PIECE: usize = 1024;
const NO_LINK: AtFlags = AtFlags::SYMLINK_NOFOLLOW;

fn refused(why: impl Into<String>) -> FileError {
    FileError::Archive(why.into())
}

/// What comes next of an archive.
enum State {
    Head,
    /// Bytes of a file, and then those that fill up its last block.
    Body {
        file: Option<OwnedFd>,
        left: u64,
        fill: u64,
    },
    /// What a head has no room for.
    Extension {
        kind: EntryType,
        left: u64,
        fill: u64,
    },
    /// What follows does not count.
    End,
}

/// What extensions say of the next entry.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

/// An archive that comes in.
pub struct Unpacking {
    target: OwnedFd,
    hidden: OsString,
    staged: OwnedFd,
    gzip: Option<MultiGzDecoder<Vec<u8>>>,
    state: State,
    buffer: Vec<u8>,
    extended: Extended,
    /// Files that are to be in place, for whoever has to know of them.
    files: BTreeSet<PathBuf>,
    names: usize,
    done: Unpacked,
    /// The folder, if it was made for this.
    made: Option<Place>,
}

impl Unpacking {
    /// Makes the folder if it is not there, and one beside what is in it.
    ///
    /// # Errors
    /// When they can't be made.
    pub fn begin(place: &Place, gzip: bool) -> Result<Self, FileError> {
        let root = place.root()?;
        let is_there = place.is_root() || open_beneath(&root, &place.path, FOLDER, Links::Refuse).is_ok();
        let target = match place.is_root() {
            true => root,
            false => make_folders(&root, &place.path).map_err(failed("made"))?,
        };
        let hidden = OsString::from(hidden_name()?);
        mkdirat(&target, &hidden, Mode::RWXU).map_err(failed("made"))?;
        let staged = openat(&target, &hidden, FOLDER, Mode::empty()).map_err(failed("made"))?;
        Ok(Self {
            target,
            hidden,
            staged,
            gzip: gzip.then(|| MultiGzDecoder::new(Vec::new())),
            state: State::Head,
            buffer: Vec::new(),
            extended: Extended::default(),
            files: BTreeSet::new(),
            names: 0,
            done: Unpacked::default(),
            made: (!is_there).then(|| place.clone()),
        })
    }

    /// Takes the next bytes of the archive.
    ///
    /// # Errors
    /// When it is refused, or there is no room.
    pub async fn push(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        if self.gzip.is_none() {
            return self.take(bytes).await;
        }
        for piece in bytes.chunks(PIECE) {
            let Some(gzip) = &mut self.gzip else { break };
            gzip.write_all(piece).map_err(|_| refused("it is not compressed with gzip, or is broken"))?;
            let more = std::mem::take(gzip.get_mut());
            self.take(&more).await?;
        }
        Ok(())
    }

    async fn take(&mut self, mut bytes: &[u8]) -> Result<(), FileError> {
        while !bytes.is_empty() {
            match &mut self.state {
                State::End => return Ok(()),
                State::Head => {
                    let part = bytes.len().min(BLOCK - self.buffer.len());
                    self.buffer.extend_from_slice(&bytes[..part]);
                    bytes = &bytes[part..];
                    if self.buffer.len() == BLOCK {
                        let head = std::mem::take(&mut self.buffer);
                        self.state = self.head(&head)?;
                        tokio::task::yield_now().await;
                    }
                }
                State::Body { file, left, fill } => {
                    let part = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    if let Some(file) = file {
                        write_all(file, &bytes[..part])?;
                    }
                    *left -= part as u64;
                    bytes = &bytes[part..];
                    let skipped = bytes.len().min(*fill as usize) * usize::from(*left == 0);
                    *fill -= skipped as u64;
                    bytes = &bytes[skipped..];
                    if *left == 0 && *fill == 0 {
                        self.state = State::Head;
                    }
                }
                State::Extension { kind, left, fill } => {
                    let part = bytes.len().min(*left as usize);
                    self.buffer.extend_from_slice(&bytes[..part]);
                    *left -= part as u64;
                    bytes = &bytes[part..];
                    let skipped = bytes.len().min(*fill as usize) * usize::from(*left == 0);
                    *fill -= skipped as u64;
                    bytes = &bytes[skipped..];
                    if *left == 0 && *fill == 0 {
                        let (kind, content) = (*kind, std::mem::take(&mut self.buffer));
                        self.state = State::Head;
                        self.extend(kind, &content)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads a head, and begins with what it is of.
    fn head(&mut self, bytes: &[u8]) -> Result<State, FileError> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(State::End);
        }
        let head = Header::from_byte_slice(bytes);
        let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        let expected = sum(&bytes[..148]) + sum(&bytes[156..]) + 8 * 32;
        if head.cksum().ok() != Some(expected) {
            return Err(refused("it is no tar archive, or is broken"));
        }
        let size = head.entry_size().map_err(|_| refused("an entry has no size"))?;
        let kind = head.entry_type();
        let fill = |size: u64| (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
        if matches!(
            kind,
            EntryType::XHeader | EntryType::XGlobalHeader | EntryType::GNULongName | EntryType::GNULongLink
        ) {
            if size > MAX_EXTENSION {
                return Err(refused(format!("the extensions of a head have more than {MAX_EXTENSION} bytes")));
            }
            return Ok(match size {
                0 => State::Head,
                _ => State::Extension { kind, left: size, fill: fill(size) },
            });
        }
        self.done.entries += 1;
        if self.done.entries > MAX_ENTRIES {
            return Err(refused(format!("it has more than {MAX_ENTRIES} entries")));
        }
        let Extended { path, link, size: longer } = std::mem::take(&mut self.extended);
        let size = longer.unwrap_or(size);
        let path = name(&path.unwrap_or_else(|| head.path_bytes().into_owned()))?;
        let link = link.or_else(|| head.link_name_bytes().map(std::borrow::Cow::into_owned));
        let has_body = matches!(kind, EntryType::Regular | EntryType::Continuous);
        let file = match path {
            Some(path) => self.entry(kind, head, &path, link.as_deref(), size)?,
            None if kind.is_dir() => None,
            None => return Err(refused("an entry has no name")),
        };
        match if has_body { size } else { 0 } {
            0 => Ok(State::Head),
            size => Ok(State::Body { file, left: size, fill: fill(size) }),
        }
    }

    /// Makes what an entry is of; a file is to be filled.
    fn entry(
        &mut self,
        kind: EntryType,
        head: &Header,
        path: &Path,
        link: Option<&[u8]>,
        size: u64,
    ) -> Result<Option<OwnedFd>, FileError> {
        self.names += path.as_os_str().len();
        if self.names > MAX_NAMES {
            return Err(refused(format!("its names have more than {MAX_NAMES} bytes")));
        }
        self.check_target(path, kind.is_dir())?;
        let mode = head.mode().unwrap_or(0o644) & 0o777;
        if kind.is_dir() {
            let folder = make_folders(&self.staged, path).map_err(in_archive)?;
            fchmod(&folder, Mode::from_raw_mode(mode | 0o700)).map_err(failed("written"))?;
            return Ok(None);
        }
        let (parent, name) = self.parent(path)?;
        // A later entry of the same name counts.
        match unlinkat(&parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(in_archive(errno)),
        }
        match kind {
            EntryType::Regular | EntryType::Continuous => {
                if let Some(left) = free_bytes(&self.target).filter(|left| size > *left) {
                    return Err(FileError::NoSpace(Some(left)));
                }
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = openat(&parent, name, flags, Mode::RUSR | Mode::WUSR).map_err(in_archive)?;
                fchmod(&file, Mode::from_raw_mode(mode | 0o600)).map_err(failed("written"))?;
                set_time(&file, head);
                self.done.bytes = self.done.bytes.saturating_add(size);
                self.files.insert(path.to_owned());
                Ok(Some(file))
            }
            EntryType::Symlink => {
                let target = link.unwrap_or_default();
                check_link(path, target)?;
                symlinkat(OsStr::from_bytes(target), &parent, name).map_err(in_archive)?;
                Ok(None)
            }
            EntryType::Link => {
                self.hard_link(path, link.unwrap_or_default(), &parent, name)?;
                Ok(None)
            }
            kind => Err(refused(format!(
                "{} is of the type {:?}; allowed are files, folders and links",
                path.display(),
                char::from(kind.as_byte())
            ))),
        }
    }

    /// Another name of a file that is in the archive itself.
    fn hard_link(&mut self, path: &Path, target: &[u8], parent: &OwnedFd, new: &OsStr) -> Result<(), FileError> {
        let no_file = || refused(format!("{} is a link to what is no file of the archive", path.display()));
        let target = name(target)?.ok_or_else(no_file)?;
        if !self.files.contains(&target) {
            return Err(no_file());
        }
        let (folder, old) = self.parent(&target)?;
        let stat = statat(&folder, old, NO_LINK).map_err(in_archive)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(no_file());
        }
        linkat(&folder, old, parent, new, AtFlags::empty()).map_err(in_archive)?;
        self.files.insert(path.to_owned());
        Ok(())
    }

    /// What is there already must be of the same kind: files replace files, folders are added to.
    fn check_target(&self, path: &Path, is_folder: bool) -> Result<(), FileError> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let standing = match open_beneath(&self.target, path, flags, Links::Refuse) {
            Ok(found) => FileType::from_raw_mode(fstat(found).map_err(failed("looked at"))?.st_mode),
            Err(Errno::NOENT) => return Ok(()),
            // With O_PATH a link itself is opened, unless it is on the way.
            Err(errno) => return Err(in_archive(errno)),
        };
        match (is_folder, standing == FileType::Directory) {
            (true, false) => Err(FileError::NotFolder),
            (false, true) => Err(FileError::IsFolder),
            _ => Ok(()),
        }
    }

    fn parent<'a>(&self, path: &'a Path) -> Result<(OwnedFd, &'a OsStr), FileError> {
        let parent = path.parent().unwrap_or(Path::new(""));
        let folder = match parent.as_os_str().is_empty() {
            true => openat(&self.staged, ".", FOLDER, Mode::empty()),
            false => make_folders(&self.staged, parent),
        };
        Ok((folder.map_err(in_archive)?, path.file_name().unwrap_or_default()))
    }

    /// Takes what a head had no room for.
    fn extend(&mut self, kind: EntryType, content: &[u8]) -> Result<(), FileError> {
        let text = |bytes: &[u8]| bytes.strip_suffix(b"\0").unwrap_or(bytes).to_vec();
        match kind {
            EntryType::GNULongName => self.extended.path = Some(text(content)),
            EntryType::GNULongLink => self.extended.link = Some(text(content)),
            EntryType::XHeader => {
                for extension in PaxExtensions::new(content) {
                    let extension = extension.map_err(|_| refused("the extensions of a head are broken"))?;
                    let value = extension.value_bytes();
                    match extension.key_bytes() {
                        b"path" => self.extended.path = Some(value.to_vec()),
                        b"linkpath" => self.extended.link = Some(value.to_vec()),
                        b"size" => {
                            let size = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                            self.extended.size = Some(size.ok_or_else(|| refused("an entry has no size"))?);
                        }
                        key if key.starts_with(b"GNU.sparse.") => return Err(refused("it has sparse files")),
                        _ => {}
                    }
                }
            }
            // What is said of all entries is times and comments.
            _ => {}
        }
        Ok(())
    }

    /// The archive has come to its end. What was out of sight is put in place, whoever waits for that; then each file is told.
    ///
    /// # Errors
    /// When it has not, or something can't be put in place.
    pub async fn finish(mut self) -> Result<(Unpacked, Vec<(PathBuf, Stamp)>), FileError> {
        if let Err(error) = self.end().await {
            self.abandon().await;
            return Err(error);
        }
        let merging = tokio::spawn(async move {
            if let Err(error) = merge(&self.target, &self.staged).await {
                self.abandon().await;
                return Err(error);
            }
            self.made = None;
            let mut files = Vec::new();
            for path in std::mem::take(&mut self.files) {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                if let Ok(file) = open_beneath(&self.target, &path, flags, Links::Refuse)
                    && let Ok(stat) = fstat(file)
                {
                    files.push((path, Stamp::from(&stat)));
                }
            }
            let done = std::mem::take(&mut self.done);
            self.abandon().await;
            Ok::<_, FileError>((done, files))
        });
        merging.await.map_err(|_| FileError::Failed("unpacked", Errno::IO))?
    }

    /// Takes the last of it, and sees whether it is whole.
    async fn end(&mut self) -> Result<(), FileError> {
        if let Some(mut gzip) = self.gzip.take() {
            gzip.try_finish().map_err(|_| refused("it is not compressed with gzip, or broke off"))?;
            let rest = std::mem::take(gzip.get_mut());
            self.take(&rest).await?;
        }
        let is_whole = match self.state {
            State::End => true,
            State::Head => self.buffer.is_empty() && self.done.entries > 0,
            _ => false,
        };
        if is_whole { Ok(()) } else { Err(refused("it is no tar archive, or broke off")) }
    }
}

impl Unpacking {
    /// Removes what has come, whoever waits for that.
    pub async fn abandon(mut self) {
        if let Some(removing) = self.begin_removing() {
            // What can't be removed stays out of sight.
            let _ = removing.await;
        }
    }

    fn begin_removing(&mut self) -> Option<tokio::task::JoinHandle<()>> {
        let hidden = std::mem::take(&mut self.hidden);
        if hidden.is_empty() {
            return None;
        }
        let folder = openat(&self.target, ".", FOLDER, Mode::empty()).ok()?;
        let made = self.made.take();
        Some(tokio::spawn(async move {
            let _ = Removal::of_hidden(folder, hidden).finish().await;
            // Unless somebody has put something there meanwhile.
            if let Some(Ok((folder, name))) = made.as_ref().map(Place::parent) {
                let _ = unlinkat(&folder, name, AtFlags::REMOVEDIR);
            }
        }))
    }
}

impl Drop for Unpacking {
    fn drop(&mut self) {
        drop(self.begin_removing());
    }
}

/// Moves all that is in one folder into another.
async fn merge(target: &OwnedFd, staged: &OwnedFd) -> Result<(), FileError> {
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let open = |root: &OwnedFd| match folder.as_os_str().is_empty() {
            true => openat(root, ".", FOLDER, Mode::empty()),
            false => open_beneath(root, &folder, FOLDER, Links::Refuse),
        };
        let (from, to) = (open(staged).map_err(in_archive)?, open(target).map_err(in_archive)?);
        let mut entries = Dir::read_from(&from).map_err(failed("read"))?;
        let mut names = Vec::new();
        while let Some(Ok(entry)) = entries.read() {
            names.push(OsStr::from_bytes(entry.file_name().to_bytes()).to_owned());
        }
        for name in names.into_iter().filter(|name| name != "." && name != "..") {
            let stat = statat(&from, &name, NO_LINK).map_err(failed("moved"))?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                renameat(&from, &name, &to, &name).map_err(failed("written"))?;
                continue;
            }
            match renameat_with(&from, &name, &to, &name, RenameFlags::NOREPLACE) {
                Ok(()) => {}
                Err(_) => match mkdirat(&to, &name, Mode::from_raw_mode(stat.st_mode & 0o777)) {
                    Ok(()) | Err(Errno::EXIST) => folders.push(folder.join(name)),
                    Err(errno) => return Err(failed("written")(errno)),
                },
            }
        }
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// A name in an archive as a path; nothing for the folder itself.
fn name(bytes: &[u8]) -> Result<Option<PathBuf>, FileError> {
    let mut rest = bytes;
    while let Some(shorter) = rest.strip_prefix(b"./") {
        rest = shorter;
    }
    while let Some(shorter) = rest.strip_suffix(b"/").filter(|shorter| !shorter.is_empty()) {
        rest = shorter;
    }
    if rest.is_empty() || rest == b"." {
        return Ok(None);
    }
    let path = RelativePath::parse(rest).map_err(|_| {
        let shown: String = String::from_utf8_lossy(bytes).chars().take(100).collect();
        refused(format!("{shown:?} is no path below the folder"))
    })?;
    if path.0.components().any(|step| super::is_hidden(step.as_os_str())) {
        return Err(refused("a name is kept for what is not finished"));
    }
    Ok(Some(path.0))
}

/// Refuses a link that leads out: one that is absolute, or leads up further than it is deep, or up after it has led down, where another link may be.
fn check_link(path: &Path, target: &[u8]) -> Result<(), FileError> {
    let depth = path.components().count() - 1;
    let mut steps =
        Path::new(OsStr::from_bytes(target)).components().filter(|step| *step != Component::CurDir).peekable();
    let mut up = 0;
    while steps.next_if_eq(&Component::ParentDir).is_some() {
        up += 1;
    }
    if target.is_empty() || target.contains(&0) || up > depth || !steps.all(|step| matches!(step, Component::Normal(_)))
    {
        return Err(refused(format!("{} is a link that leads, or may lead, out of the folder", path.display())));
    }
    Ok(())
}

/// What the file system says of a path in an archive.
fn in_archive(errno: Errno) -> FileError {
    match errno {
        Errno::LOOP | Errno::XDEV => refused("a name leads through a link"),
        errno => failed("written")(errno),
    }
}

fn set_time(file: &OwnedFd, head: &Header) {
    let seconds = head.mtime().ok().and_then(|time| i64::try_from(time).ok()).unwrap_or_default();
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    // What the time says is of no importance.
    let _ = futimens(file, &Timestamps { last_access: time, last_modification: time });
}

fn write_all(file: &OwnedFd, mut bytes: &[u8]) -> Result<(), FileError> {
    while !bytes.is_empty() {
        let wrote = rustix::io::retry_on_intr(|| rustix::io::write(file, bytes)).map_err(failed("written"))?;
        bytes = &bytes[wrote..];
    }
    Ok(())
}
