//! What changes in a folder, as it happens: from inotify, or by looking again and again where there is none. Holds up nobody: who listens too slowly is
//! told that something was lost.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use cellblock_wire::files::{Event, MAX_DEPTH};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{FileType, Mode, openat};
use rustix::io::Errno;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use super::list::{Walk, entry};
use super::path::{FOLDER, FOLDER_OR_LINK, Links, Place, open_beneath};
use super::{FileError, failed, is_hidden};

/// Events that may wait to be sent.
const AHEAD: usize = 64;
/// How often a folder is looked at where there is no inotify.
const POLL: Duration = Duration::from_secs(1);
/// Folders that are watched, and entries that are compared.
const MAX_WATCHED: usize = 4096;
const MAX_COMPARED: usize = 10_000;
const BUFFER: usize = 16 * 1024;

type Lines = mpsc::Sender<io::Result<Bytes>>;

/// Nobody listens any more, or the folder is gone.
struct Over;

/// Begins to watch a folder. Events come over the channel, a line of JSON each.
///
/// # Errors
/// When there is no such folder.
pub fn watch(place: Place, recursive: bool) -> Result<mpsc::Receiver<io::Result<Bytes>>, FileError> {
    let root = place.open(FOLDER_OR_LINK, Links::Follow)?;
    let (lines, events) = mpsc::channel(AHEAD);
    let watcher = Watcher::new(&root, place.clone(), recursive).map_err(failed("watched"));
    tokio::spawn(async move {
        // It ends when it is over.
        let _ = match watcher {
            Ok(watcher) => watcher.run(root, &lines).await,
            Err(_) => poll(&root, &place, recursive, &lines).await,
        };
    });
    Ok(events)
}

async fn tell(lines: &Lines, event: &Event) -> Result<(), Over> {
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    lines.send(Ok(line.into())).await.map_err(|_| Over)
}

struct Watcher {
    /// Not a pipe, but what is read of it is read the same way.
    inotify: pipe::Receiver,
    place: Place,
    recursive: bool,
    /// Folders below the place, by their watch.
    folders: HashMap<i32, PathBuf>,
}

/// An event as the kernel writes it: see inotify(7).
struct Told<'a> {
    watch: i32,
    flags: ReadFlags,
    cookie: u32,
    name: &'a OsStr,
}

impl<'a> Told<'a> {
    fn next(bytes: &mut &'a [u8]) -> Option<Self> {
        let (head, rest) = bytes.split_first_chunk::<16>()?;
        let number = |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (name, rest) = rest.split_at_checked(number(12) as usize)?;
        *bytes = rest;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        Some(Self {
            watch: number(0) as i32,
            flags: ReadFlags::from_bits_retain(number(4)),
            cookie: number(8),
            name: OsStr::from_bytes(name),
        })
    }
}

/// Events of one batch.
#[derive(Default)]
struct Batch {
    events: Vec<Event>,
    modified: HashSet<PathBuf>,
    /// Something has left for somewhere: its cookie, and whether it is worth telling.
    left: Option<(u32, PathBuf, bool)>,
    added: Vec<PathBuf>,
    lost: bool,
    is_gone: bool,
}

impl Watcher {
    fn new(root: &OwnedFd, place: Place, recursive: bool) -> Result<Self, Errno> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let inotify = pipe::Receiver::from_owned_fd_unchecked(inotify).map_err(|_| Errno::MFILE)?;
        let mut watcher = Self { inotify, place, recursive, folders: HashMap::new() };
        watcher.add(root, PathBuf::new())?;
        Ok(watcher)
    }

    fn add(&mut self, folder: &OwnedFd, path: PathBuf) -> Result<(), Errno> {
        if self.folders.len() >= MAX_WATCHED {
            return Err(Errno::NOSPC);
        }
        let flags = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MODIFY
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::ONLYDIR;
        // Not by its path, which may lead elsewhere by now.
        let number = inotify::add_watch(&self.inotify, format!("/proc/self/fd/{}", folder.as_raw_fd()), flags)?;
        self.folders.insert(number, path);
        Ok(())
    }

    async fn run(mut self, root: OwnedFd, lines: &Lines) -> Result<(), Over> {
        if self.recursive {
            let mut batch = Batch::default();
            self.add_all(&root, Path::new(""), &mut batch, false).await;
            tell(lines, &Event::Watching { polls_ms: None }).await?;
            if batch.lost {
                tell(lines, &Event::Overflow).await?;
            }
        } else {
            tell(lines, &Event::Watching { polls_ms: None }).await?;
        }
        loop {
            tokio::select! {
                () = lines.closed() => return Err(Over),
                ready = self.inotify.readable() => ready.map_err(|_| Over)?,
            }
            let mut batch = self.read()?;
            if batch.lost {
                // What was made meanwhile was not told either.
                batch.added.push(PathBuf::new());
            }
            for path in std::mem::take(&mut batch.added) {
                self.add_all(&root, &path, &mut batch, true).await;
            }
            if batch.lost {
                batch.events.push(Event::Overflow);
            }
            for event in &batch.events {
                tell(lines, event).await?;
            }
            if batch.is_gone {
                return Err(Over);
            }
        }
    }

    /// Reads what is there, a batch at most.
    fn read(&mut self) -> Result<Batch, Over> {
        let (mut buffer, mut batch, mut gone) = ([0; BUFFER], Batch::default(), Vec::new());
        let read = match self.inotify.try_read(&mut buffer) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(_) => return Err(Over),
        };
        let mut rest = &buffer[..read];
        while let Some(event) = Told::next(&mut rest) {
            let flags = event.flags;
            if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                batch.lost = true;
                continue;
            }
            if flags.contains(ReadFlags::IGNORED) {
                gone.push(event.watch);
                continue;
            }
            let Some(folder) = self.folders.get(&event.watch) else { continue };
            if flags.contains(ReadFlags::DELETE_SELF) {
                batch.is_gone |= folder.as_os_str().is_empty();
                continue;
            }
            if event.name.is_empty() {
                continue;
            }
            batch.take(&self.place, folder.join(event.name), is_hidden(event.name), flags, event.cookie);
        }
        batch.leave(&self.place);
        for number in gone {
            self.folders.remove(&number);
        }
        Ok(batch)
    }

    /// Watches a folder and those in it; tells what is in them if it is new.
    async fn add_all(&mut self, root: &OwnedFd, path: &Path, batch: &mut Batch, tells: bool) {
        if !self.recursive {
            return;
        }
        let folder = match path.as_os_str().is_empty() {
            true => openat(root, ".", FOLDER, Mode::empty()),
            false => open_beneath(root, path, FOLDER, Links::Refuse),
        };
        // It may be gone by now.
        let Ok(folder) = folder else { return };
        if self.add(&folder, path.to_owned()).is_err() {
            batch.lost = true;
            return;
        }
        let Ok(mut walk) = Walk::new(folder, MAX_DEPTH, MAX_COMPARED, None).await else { return };
        let mut count = 0;
        while let Some((below, stat)) = walk.next().await {
            let (inner, is_folder) = (path.join(below), FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
            count += 1;
            if count > MAX_COMPARED {
                batch.lost = true;
                return;
            }
            if tells && !path.as_os_str().is_empty() {
                batch.tell(&self.place, &inner, |path| Event::Created { path, is_folder, is_whole: false });
            }
            if is_folder
                && let Ok(folder) = open_beneath(root, &inner, FOLDER, Links::Refuse)
                && self.add(&folder, inner).is_err()
            {
                batch.lost = true;
            }
        }
    }
}

impl Batch {
    fn tell(&mut self, place: &Place, path: &Path, event: impl FnOnce(String) -> Event) {
        match place.shown(&place.path.join(path)) {
            Some(shown) => self.events.push(event(shown)),
            // A name that can't be told.
            None => self.lost = true,
        }
    }

    /// What has left has not come anywhere else.
    fn leave(&mut self, place: &Place) {
        if let Some((_, path, is_told)) = self.left.take()
            && is_told
        {
            self.tell(place, &path, |path| Event::Deleted { path });
        }
    }

    fn take(&mut self, place: &Place, path: PathBuf, hidden: bool, flags: ReadFlags, cookie: u32) {
        let is_folder = flags.contains(ReadFlags::ISDIR);
        if flags.contains(ReadFlags::MOVED_TO) {
            let from = self.left.take_if(|(left, ..)| *left == cookie);
            self.leave(place);
            if is_folder && !hidden {
                self.added.push(path.clone());
            }
            match from {
                Some((_, from, true)) if !hidden => {
                    match (place.shown(&place.path.join(&from)), place.shown(&place.path.join(&path))) {
                        (Some(path), Some(to)) => self.events.push(Event::Moved { path, to }),
                        _ => self.lost = true,
                    }
                }
                Some((_, from, true)) => self.tell(place, &from, |path| Event::Deleted { path }),
                from if !hidden => {
                    let is_whole = from.is_some();
                    self.tell(place, &path, |path| Event::Created { path, is_folder, is_whole });
                }
                _ => {}
            }
            return;
        }
        self.leave(place);
        if flags.contains(ReadFlags::MOVED_FROM) {
            self.left = Some((cookie, path, !hidden));
        } else if hidden {
            // Not finished.
        } else if flags.contains(ReadFlags::CREATE) {
            if is_folder {
                self.added.push(path.clone());
            }
            self.tell(place, &path, |path| Event::Created { path, is_folder, is_whole: false });
        } else if flags.contains(ReadFlags::DELETE) {
            self.modified.remove(&path);
            self.tell(place, &path, |path| Event::Deleted { path });
        } else if flags.contains(ReadFlags::MODIFY) && self.modified.insert(path.clone()) {
            self.tell(place, &path, |path| Event::Modified { path });
        }
    }
}

/// What is in a folder by path: its state, and whether it is a folder.
type Seen = BTreeMap<String, (String, bool)>;

async fn look(root: &OwnedFd, place: &Place, recursive: bool) -> Option<(Seen, bool)> {
    let folder = openat(root, ".", FOLDER, Mode::empty()).ok()?;
    let depth = if recursive { MAX_DEPTH } else { 1 };
    let mut walk = Walk::new(folder, depth, MAX_COMPARED, None).await.ok()?;
    let mut seen = Seen::new();
    while let Some((path, stat)) = walk.next().await {
        if seen.len() == MAX_COMPARED {
            return Some((seen, false));
        }
        let Some(path) = place.shown(&place.path.join(path)) else { continue };
        let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        // What is in a folder is told by itself.
        let state = if is_folder { String::new() } else { entry(String::new(), &stat).etag };
        seen.insert(path, (state, is_folder));
    }
    Some((seen, true))
}

async fn poll(root: &OwnedFd, place: &Place, recursive: bool, lines: &Lines) -> Result<(), Over> {
    let (mut before, mut was_whole) = look(root, place, recursive).await.ok_or(Over)?;
    tell(lines, &Event::Watching { polls_ms: u64::try_from(POLL.as_millis()).ok() }).await?;
    loop {
        if !was_whole {
            tell(lines, &Event::Overflow).await?;
        }
        tokio::select! {
            () = lines.closed() => return Err(Over),
            () = tokio::time::sleep(POLL) => {}
        }
        let (now, is_whole) = look(root, place, recursive).await.ok_or(Over)?;
        for (path, state) in &now {
            let path = path.clone();
            match before.get(&path) {
                None => tell(lines, &Event::Created { path, is_folder: state.1, is_whole: false }).await?,
                Some(old) if old != state => tell(lines, &Event::Modified { path }).await?,
                Some(_) => {}
            }
        }
        for path in before.into_keys().filter(|path| !now.contains_key(path)) {
            tell(lines, &Event::Deleted { path }).await?;
        }
        (before, was_whole) = (now, is_whole);
    }
}
