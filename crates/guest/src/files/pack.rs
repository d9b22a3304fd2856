//! A folder as a tar archive, as it is read. Files, folders and links as such; whatever else there is, is left out.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::fs::{FileType, OFlags, Stat, fstat, readlinkat};
use rustix::io::Errno;
use tar::{Builder, EntryType, Header};
use tokio::sync::mpsc;

use super::FileError;
use super::list::Walk;
use super::path::{FOLDER, FOLDER_OR_LINK, Links, Place, open_beneath};
use super::read::CHUNK;

/// Pieces that may wait to be sent.
const AHEAD: usize = 2;
/// Bytes that are compressed in one go.
const PIECE: usize = 16 * 1024;
/// Names of one folder.
const MAX_NAMES: usize = 100_000;
const BLOCK: u64 = 512;

/// Begins to read a folder. The archive comes over the channel; when nobody listens any more, it ends.
///
/// # Errors
/// When there is no such folder.
pub async fn pack(place: &Place, gzip: bool) -> Result<mpsc::Receiver<io::Result<Bytes>>, FileError> {
    let root = place.open(FOLDER_OR_LINK, Links::Follow)?;
    let again = rustix::fs::openat(&root, ".", FOLDER, rustix::fs::Mode::empty()).map_err(super::failed("read"))?;
    let walk = Walk::new(again, usize::MAX, MAX_NAMES, None).await?;
    let (out, archive) = mpsc::channel(AHEAD);
    let gzip = gzip.then(|| GzEncoder::new(Vec::new(), Compression::fast()));
    tokio::spawn(async move {
        let mut sink = Sink { out, gzip, small: Vec::new() };
        if let Err(error) = pack_all(root, walk, &mut sink).await {
            // Whoever listened may have left: that is how it ends early.
            let _ = sink.out.send(Err(error)).await;
        }
    });
    Ok(archive)
}

async fn pack_all(root: OwnedFd, mut walk: Walk, sink: &mut Sink) -> io::Result<()> {
    let mut heads = Builder::new(Vec::new());
    while let Some((path, stat)) = walk.next().await {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => pack_file(&root, &path, &mut heads, sink).await?,
            FileType::Directory => {
                let mut head = head(&stat, EntryType::Directory, 0);
                heads.append_data(&mut head, &path, io::empty())?;
            }
            FileType::Symlink => {
                if let Ok(target) = read_link(&root, &path) {
                    let mut head = head(&stat, EntryType::Symlink, 0);
                    heads.append_link(&mut head, &path, target)?;
                }
            }
            _ => {}
        }
        sink.put(std::mem::take(heads.get_mut())).await?;
    }
    sink.put(vec![0; 2 * BLOCK as usize]).await?;
    sink.finish().await
}

async fn pack_file(root: &OwnedFd, path: &Path, heads: &mut Builder<Vec<u8>>, sink: &mut Sink) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match open_beneath(root, path, flags, Links::Refuse) {
        Ok(file) => file,
        // It went away meanwhile, or its owner has closed it to themselves.
        Err(Errno::NOENT | Errno::ACCESS | Errno::LOOP | Errno::NOTDIR | Errno::NXIO) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    let stat = fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(());
    }
    let size = stat.st_size as u64;
    heads.append_data(&mut head(&stat, EntryType::Regular, size), path, io::empty())?;
    sink.put(std::mem::take(heads.get_mut())).await?;
    let mut at = 0;
    while at < size {
        let most = usize::try_from(size - at).unwrap_or(CHUNK).min(CHUNK);
        let mut chunk = Vec::with_capacity(most);
        rustix::io::retry_on_intr(|| rustix::io::pread(file.as_fd(), rustix::buffer::spare_capacity(&mut chunk), at))?;
        chunk.truncate(most);
        if chunk.is_empty() {
            return Err(io::Error::other("a file has become shorter while it was read"));
        }
        at += chunk.len() as u64;
        sink.put(chunk).await?;
    }
    sink.put(vec![0; (size.next_multiple_of(BLOCK) - size) as usize]).await
}

fn head(stat: &Stat, kind: EntryType, size: u64) -> Header {
    let mut head = Header::new_gnu();
    head.set_entry_type(kind);
    head.set_size(size);
    head.set_mode(stat.st_mode & 0o777);
    head.set_mtime(u64::try_from(stat.st_mtime).unwrap_or_default());
    head.set_uid(0);
    head.set_gid(0);
    head
}

fn read_link(root: &OwnedFd, path: &Path) -> Result<std::path::PathBuf, Errno> {
    use std::os::unix::ffi::OsStringExt;
    let link = open_beneath(root, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Links::Refuse)?;
    let target = readlinkat(&link, "", Vec::new())?;
    Ok(std::ffi::OsString::from_vec(target.into_bytes()).into())
}

/// Where the archive's bytes go, compressed or not, in pieces that are worth sending.
struct Sink {
    out: mpsc::Sender<io::Result<Bytes>>,
    gzip: Option<GzEncoder<Vec<u8>>>,
    small: Vec<u8>,
}

impl Sink {
    async fn put(&mut self, bytes: Vec<u8>) -> io::Result<()> {
        let Some(gzip) = &mut self.gzip else {
            if bytes.len() < PIECE && self.small.len() + bytes.len() <= CHUNK {
                self.small.extend_from_slice(&bytes);
                return Ok(());
            }
            let before = std::mem::take(&mut self.small);
            self.send(before).await?;
            return self.send(bytes).await;
        };
        for piece in bytes.chunks(PIECE) {
            gzip.write_all(piece)?;
            if gzip.get_ref().len() >= CHUNK / 4 {
                let full = std::mem::take(gzip.get_mut());
                send(&self.out, full).await?;
            }
            // What waits for the one thread there is has its turn.
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    async fn send(&self, bytes: Vec<u8>) -> io::Result<()> {
        send(&self.out, bytes).await
    }

    async fn finish(&mut self) -> io::Result<()> {
        let rest = match self.gzip.take() {
            Some(gzip) => gzip.finish()?,
            None => std::mem::take(&mut self.small),
        };
        self.send(rest).await
    }
}

async fn send(out: &mpsc::Sender<io::Result<Bytes>>, bytes: Vec<u8>) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    out.send(Ok(bytes.into())).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
}
