//! A folder as an archive for a data volume: who owns files, and who may do what with them, is fixed here, and what is no data is refused. Where the archive goes
//! is not known here.
//!
//! The folder is read through descriptors and no link is followed, so that nobody who can write to a part of it has a file from elsewhere packed.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use futures_util::StreamExt;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use tar::{Builder, EntryType, Header};
use tokio::sync::mpsc;

use super::ArchiveStream;

/// Bytes of a piece.
const PIECE: usize = 256 * 1024;
/// Pieces that wait for whoever takes them.
const WAITING: usize = 8;
/// Folders within folders.
const DEEPEST: usize = 100;

/// Why a folder can't be packed.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct PackError {
    /// What of it.
    pub path: PathBuf,
    /// Why not.
    pub reason: String,
    /// Whether nobody took the archive any more, for a reason of their own.
    pub is_unwanted: bool,
}

/// What was packed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Packed {
    /// Regular files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Where an archive is written to; what is written comes out of the stream. Without [`pack`] having come to its end, the stream ends with an error.
pub struct Pipe {
    to: mpsc::Sender<io::Result<Bytes>>,
    piece: Vec<u8>,
}

impl fmt::Debug for Pipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipe").finish_non_exhaustive()
    }
}

/// Both ends of an archive on its way.
#[must_use]
pub fn pipe() -> (Pipe, ArchiveStream) {
    let (to, from) = mpsc::channel(WAITING);
    (Pipe { to, piece: Vec::with_capacity(PIECE) }, tokio_stream::wrappers::ReceiverStream::new(from).boxed())
}

impl Pipe {
    fn send(&mut self, piece: io::Result<Bytes>) -> io::Result<()> {
        self.to.blocking_send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.piece.extend_from_slice(bytes);
        if self.piece.len() >= PIECE {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE));
        self.send(Ok(piece.into()))
    }
}

/// Packs a folder: files that anybody may read, programs that anybody may run, folders, and links that stay within. Blocks.
///
/// # Errors
/// What can't be read, changes meanwhile, leads out of the folder, or is neither file, folder nor link.
pub fn pack(folder: &Path, mut to: Pipe) -> Result<Packed, PackError> {
    let mut packer = Packer { archive: Builder::new(&mut to), packed: Packed::default() };
    let packed = packer.whole(folder);
    let packed = packed.and_then(|()| packer.archive.finish().map_err(|e| failed(folder, &e))).map(|()| packer.packed);
    drop(packer);
    match packed.and_then(|packed| to.flush().map(|()| packed).map_err(|e| failed(folder, &e))) {
        Ok(packed) => Ok(packed),
        Err(error) => {
            // Whoever reads must not take what has come so far for all there is.
            let _ = to.send(Err(io::Error::other(error.to_string())));
            Err(error)
        }
    }
}

struct Packer<'a> {
    archive: Builder<&'a mut Pipe>,
    packed: Packed,
}

fn failed(path: &Path, error: &io::Error) -> PackError {
    let is_unwanted = error.kind() == io::ErrorKind::BrokenPipe;
    PackError { path: path.to_owned(), reason: error.to_string(), is_unwanted }
}

fn refused(path: &Path, reason: String) -> PackError {
    PackError { path: path.to_owned(), reason, is_unwanted: false }
}

impl Packer<'_> {
    fn whole(&mut self, folder: &Path) -> Result<(), PackError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(folder, flags, Mode::empty()).map_err(|e| failed(folder, &e.into()))?;
        self.folder(&opened, folder, Path::new(""))
    }

    /// What is in an open folder. `from` is where it is, for errors, and `at` where it comes to be.
    fn folder(&mut self, opened: &OwnedFd, from: &Path, at: &Path) -> Result<(), PackError> {
        if at.components().count() > DEEPEST {
            return Err(refused(from, format!("folders are {DEEPEST} deep at most")));
        }
        let io_failed = |e: rustix::io::Errno| failed(from, &e.into());
        let mut names = Vec::new();
        for entry in Dir::read_from(opened).map_err(io_failed)? {
            let name = entry.map_err(io_failed)?.file_name().to_owned();
            if name.as_bytes() != b"." && name.as_bytes() != b".." {
                names.push(name);
            }
        }
        // The same folder is the same archive.
        names.sort();
        for name in names {
            let part = Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
            self.entry(opened, part, &from.join(part), &at.join(part))?;
        }
        Ok(())
    }

    fn entry(&mut self, parent: &OwnedFd, name: &Path, from: &Path, at: &Path) -> Result<(), PackError> {
        let io_failed = |e: rustix::io::Errno| failed(from, &e.into());
        let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(io_failed)?;
        let open = |more: OFlags| {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | more;
            rustix::fs::openat(parent, name, flags, Mode::empty()).map_err(io_failed)
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let opened = open(OFlags::DIRECTORY)?;
                let mut header = header(EntryType::Directory, 0o555, &stat);
                self.archive.append_data(&mut header, at, io::empty()).map_err(|e| failed(from, &e))?;
                self.folder(&opened, from, at)
            }
            FileType::RegularFile => self.file(open(OFlags::empty())?.into(), from, at),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(parent, name, Vec::new()).map_err(io_failed)?;
                let target = Path::new(std::ffi::OsStr::from_bytes(target.as_bytes()));
                if !stays_within(at, target) {
                    let reason = format!("a link to {}, which leads out of the folder", target.display());
                    return Err(refused(from, reason));
                }
                let mut header = header(EntryType::Symlink, 0o777, &stat);
                self.archive.append_link(&mut header, at, target).map_err(|e| failed(from, &e))
            }
            other => Err(refused(from, format!("neither a file, a folder nor a link, but {other:?}"))),
        }
    }

    fn file(&mut self, file: File, from: &Path, at: &Path) -> Result<(), PackError> {
        // Of what was opened, whatever has its name by now.
        let stat = rustix::fs::fstat(&file).map_err(|e| failed(from, &e.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(refused(from, "changed while it was read".to_owned()));
        }
        let mode = if stat.st_mode & 0o111 == 0 { 0o444 } else { 0o555 };
        let bytes = u64::try_from(stat.st_size).unwrap_or_default();
        let mut header = header(EntryType::Regular, mode, &stat);
        header.set_size(bytes);
        let whole = Whole { file, left: bytes };
        self.archive.append_data(&mut header, at, whole).map_err(|e| failed(from, &e))?;
        self.packed.files += 1;
        self.packed.bytes += bytes;
        Ok(())
    }
}

/// Nobody's but root's, and without a bit that gives anybody rights.
fn header(kind: EntryType, mode: u32, stat: &Stat) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or_default());
    header
}

/// As many bytes of a file as it had: an archive says that before.
struct Whole {
    file: File,
    left: u64,
}

impl Read for Whole {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Ok(0);
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "became shorter while it was read"));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

/// Whether a link's target is below the folder, going by its words.
fn stays_within(link: &Path, target: &Path) -> bool {
    let mut depth = link.components().count().saturating_sub(1);
    for part in target.components() {
        match part {
            Component::Normal(_) => depth += 1,
            Component::CurDir => {}
            Component::ParentDir if depth > 0 => depth -= 1,
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// Packs, and reads the archive back: path to kind, mode and content or target.
    fn packed(folder: &Path) -> Result<BTreeMap<PathBuf, (EntryType, u32, String)>, PackError> {
        let (to, mut stream) = pipe();
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            while let Some(piece) = futures_util::FutureExt::now_or_never(stream.next()).unwrap_or_else(|| {
                std::thread::sleep(std::time::Duration::from_millis(1));
                Some(Ok(Bytes::new()))
            }) {
                bytes.extend_from_slice(&piece?);
            }
            io::Result::Ok(bytes)
        });
        let outcome = pack(folder, to);
        let bytes = reader.join().expect("a reader");
        outcome?;
        let bytes = bytes.expect("an archive");
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut all = BTreeMap::new();
        for entry in archive.entries().expect("entries") {
            let mut entry = entry.expect("an entry");
            assert_eq!((entry.header().uid().expect("a uid"), entry.header().gid().expect("a gid")), (0, 0));
            let mut content = String::new();
            entry.read_to_string(&mut content).expect("content");
            if let Some(link) = entry.link_name().expect("a link") {
                content = link.display().to_string();
            }
            let mode = entry.header().mode().expect("a mode");
            all.insert(entry.path().expect("a path").into_owned(), (entry.header().entry_type(), mode, content));
        }
        Ok(all)
    }

    #[test]
    fn owners_and_modes_are_fixed_and_links_within_stay_links() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("sub")).expect("a folder");
        let long = "n".repeat(200);
        for (name, mode) in [("plain", 0o600), ("sub/program", 0o4711), ("a b\n\u{1f600}", 0o666), (&long, 0o400)] {
            std::fs::write(at(name), name).expect("a file");
            std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(mode)).expect("a mode");
        }
        symlink("../plain", at("sub/link")).expect("a link");
        let all = packed(folder.path()).expect("an archive");
        let of = |name: &str| all.get(Path::new(name)).unwrap_or_else(|| panic!("{name} in {all:?}")).clone();
        assert_eq!(of("plain"), (EntryType::Regular, 0o444, "plain".to_owned()));
        assert_eq!(of("sub/program"), (EntryType::Regular, 0o555, "sub/program".to_owned()), "no setuid bit");
        assert_eq!(of("a b\n\u{1f600}").1, 0o444);
        assert_eq!(of(&long).2, long);
        assert_eq!(of("sub").0, EntryType::Directory);
        assert_eq!(of("sub/link"), (EntryType::Symlink, 0o777, "../plain".to_owned()));
        assert_eq!(all.len(), 6);
    }

    #[test]
    fn what_leads_out_or_is_no_data_is_refused() {
        for target in ["/etc/passwd", "..", "../x", "a/../../x", "sub/../.."] {
            let folder = tempfile::tempdir().expect("a folder");
            symlink(target, folder.path().join("link")).expect("a link");
            let refused = packed(folder.path()).expect_err(target);
            assert!(refused.to_string().contains("leads out"), "{refused}");
        }
        let folder = tempfile::tempdir().expect("a folder");
        let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("s")).expect("a socket");
        let refused = packed(folder.path()).expect_err("a socket");
        assert!(refused.to_string().contains("neither"), "{refused}");
        assert!(packed(&folder.path().join("missing")).is_err());
    }

    #[test]
    fn a_file_that_shrinks_is_a_failure_and_one_that_grows_is_cut() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        std::fs::write(&path, "12345").expect("a file");
        let open = |left| Whole { file: File::open(&path).expect("a file"), left };
        let mut text = String::new();
        open(3).read_to_string(&mut text).expect("three bytes");
        assert_eq!(text, "123");
        assert!(open(6).read_to_string(&mut text).is_err());
    }

    #[test]
    fn nobody_takes_half_an_archive_for_a_whole_one() {
        let (to, stream) = pipe();
        drop(stream);
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("file"), vec![0; 4 * PIECE]).expect("a file");
        assert!(pack(folder.path(), to).expect_err("nobody reads").is_unwanted);
    }
}
