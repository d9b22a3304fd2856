//! What became of the working folder's files since an earlier look: the looks, and their comparison. Judges by what the file system
//! says of a file, and reads only those that are another state than before, for their hash.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cellblock_wire::link::{Change, FileChange};
use rustix::time::{ClockId, clock_gettime};
use sha2::{Digest, Sha256};

use crate::files::{Download, RelativePath, Stamp, is_absent, look};

/// Most changes that are told; the rest is counted.
const MAX_CHANGES: usize = 200;
/// Bytes of all paths that are told, as JSON: the head of a frame has room for more, and for other things beside them.
const MAX_TOLD: usize = 96 * 1024;
/// Bytes that are hashed for one execution.
const MAX_HASHED: u64 = 32 * 1024 * 1024;
/// Files that callers have taken away and that are remembered.
const MAX_TAKEN: usize = 10_000;
/// Entries that are compared in one go.
const PAUSE: usize = 2048;

#[derive(Debug, Clone, Copy)]
struct Entry {
    stamp: Stamp,
    /// The number of the upload that made this state of it; 0 when code did.
    upload: u64,
}

/// The folder's files at a time.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    files: HashMap<String, Entry>,
    /// Not all of them are here.
    partial: bool,
    /// Files that callers have taken away, which is nobody's change, with the number of that. Bounded: beyond, it is told as a change.
    taken: HashMap<String, u64>,
}

/// What later looks are compared with.
#[derive(Debug, Clone)]
pub struct Since {
    /// The files as far as they were known.
    pub files: Arc<Snapshot>,
    /// The file system's time, in nanoseconds.
    pub time: i64,
}

/// What was found to be different.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// By path.
    pub told: Vec<FileChange>,
    /// How many more there are, or may be.
    pub omitted: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Difference {
    path: String,
    /// How the file stands now; `None` when it is gone.
    now: Option<Stamp>,
    is_new: bool,
}

struct Known {
    latest: Arc<Snapshot>,
    uploads: u64,
}

/// The working folder, and how it stood when it was looked at last.
pub struct Files {
    workdir: PathBuf,
    known: Mutex<Known>,
}

impl Files {
    /// A folder that was not looked at yet.
    #[must_use]
    pub fn new(workdir: &Path) -> Self {
        let known = Known { latest: Arc::default(), uploads: 0 };
        Self { workdir: workdir.to_owned(), known: Mutex::new(known) }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known now.
    #[must_use]
    pub fn since_now(&self) -> Since {
        // Files get their times from this clock, which is behind the exact one.
        let time = clock_gettime(ClockId::RealtimeCoarse);
        let time = (time.tv_sec as i64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec as i64);
        Since { files: self.lock().latest.clone(), time }
    }

    /// Takes note of uploads, which are nobody's change.
    pub fn uploaded(&self, files: impl IntoIterator<Item = (PathBuf, Stamp)>) {
        let mut known = self.lock();
        known.uploads += 1;
        let upload = known.uploads;
        let latest = Arc::make_mut(&mut known.latest);
        for (path, stamp) in files {
            let Ok(path) = path.into_os_string().into_string() else { continue };
            latest.taken.remove(&path);
            latest.files.insert(path, Entry { stamp, upload });
        }
    }

    /// Takes note that a caller has taken away a file, or a folder with all that was in it, and perhaps put it elsewhere.
    pub fn taken(&self, from: &Path, to: Option<&Path>) {
        let mut known = self.lock();
        known.uploads += 1;
        let upload = known.uploads;
        let latest = Arc::make_mut(&mut known.latest);
        let paths: Vec<String> =
            latest.files.keys().filter(|path| Path::new(path).starts_with(from)).cloned().collect();
        for path in paths {
            let Some(entry) = latest.files.remove(&path) else { continue };
            let moved = to.and_then(|to| {
                let below = Path::new(&path).strip_prefix(from).ok()?;
                let whole = if below.as_os_str().is_empty() { to.to_owned() } else { to.join(below) };
                whole.into_os_string().into_string().ok()
            });
            if let Some(moved) = moved {
                latest.taken.remove(&moved);
                latest.files.insert(moved, Entry { upload, ..entry });
            }
            if latest.taken.len() < MAX_TAKEN {
                latest.taken.insert(path, upload);
            }
        }
    }

    /// Looks at the folder; what was found is what is known from now on.
    pub async fn look(&self) -> Arc<Snapshot> {
        let before = self.lock().uploads;
        let found = look(&self.workdir).await;
        let mut snapshot = Snapshot::default();
        let latest = self.lock().latest.clone();
        match found {
            Ok(look) => {
                snapshot.partial = !look.complete;
                snapshot.files.reserve(look.files.len());
                for (number, (path, stamp)) in look.files.into_iter().enumerate() {
                    let uploaded = latest.files.get(&path).filter(|known| known.stamp == stamp);
                    snapshot.files.insert(path, Entry { stamp, upload: uploaded.map_or(0, |known| known.upload) });
                    if number % PAUSE == PAUSE - 1 {
                        tokio::task::yield_now().await;
                    }
                }
            }
            Err(_) => snapshot = Snapshot { partial: true, ..(*latest).clone() },
        }
        drop(latest);
        let mut known = self.lock();
        if known.uploads > before {
            // The look may have come too early for them.
            let missed = known.latest.files.iter().filter(|(_, entry)| entry.upload > before);
            snapshot.files.extend(missed.map(|(path, entry)| (path.clone(), *entry)));
            let gone = known.latest.taken.iter().filter(|(_, number)| **number > before);
            for (path, _) in gone {
                snapshot.files.remove(path);
            }
        }
        let gone = known.latest.taken.iter().filter(|(path, _)| !snapshot.files.contains_key(*path));
        snapshot.taken = gone.map(|(path, number)| (path.clone(), *number)).collect();
        known.latest = Arc::new(snapshot);
        known.latest.clone()
    }

    /// What has changed, with hashes as far as they may cost.
    pub async fn changes(&self, since: &Since) -> Changes {
        let now = self.look().await;
        let mut found = compare(since, &now).await;
        let mut changes = Changes { told: Vec::new(), omitted: u64::from(now.partial || since.files.partial) };
        // What lies near the top is what somebody looks for.
        found.sort_unstable_by(|a, b| (a.depth(), &a.path).cmp(&(b.depth(), &b.path)));
        let (mut room, mut hashable) = (MAX_TOLD, MAX_HASHED);
        for difference in found {
            let is_full = changes.told.len() == MAX_CHANGES;
            if difference.now.is_none() && now.partial {
                tokio::task::yield_now().await;
                if is_full || !is_absent(&self.workdir, &difference.path) {
                    continue;
                }
            }
            let size = serde_json::to_string(&difference.path).map_or(usize::MAX, |path| path.len());
            if is_full || size > room {
                changes.omitted += 1;
                continue;
            }
            room -= size;
            changes.told.push(self.tell(difference, &mut hashable).await);
        }
        changes.told.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        changes
    }

    async fn tell(&self, difference: Difference, hashable: &mut u64) -> FileChange {
        let Difference { path, now, is_new } = difference;
        let Some(stamp) = now else {
            return FileChange { path, change: Change::Deleted, size_bytes: None, sha256: None };
        };
        let sha256 = self.hash(&path, stamp, hashable).await;
        let change = if is_new { Change::Created } else { Change::Changed };
        FileChange { path, change, size_bytes: Some(stamp.size), sha256 }
    }

    /// The hash of a file that is in this state before and after.
    async fn hash(&self, path: &str, stamp: Stamp, hashable: &mut u64) -> Option<String> {
        if stamp.size > *hashable {
            return None;
        }
        let mut file = Download::open(&self.workdir, &RelativePath::parse(path.as_bytes()).ok()?).ok()?;
        let mut hash = Sha256::new();
        let mut left = stamp.size;
        while file.stamp().is_ok_and(|now| now == stamp) {
            if left == 0 {
                return Some(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
            }
            let chunk = file.read().ok().filter(|chunk| !chunk.is_empty())?;
            hash.update(&chunk);
            left = left.checked_sub(chunk.len() as u64)?;
            *hashable = hashable.saturating_sub(chunk.len() as u64);
            tokio::task::yield_now().await;
        }
        None
    }
}

impl Difference {
    fn depth(&self) -> usize {
        self.path.bytes().filter(|byte| *byte == b'/').count()
    }
}

async fn compare(since: &Since, now: &Snapshot) -> Vec<Difference> {
    let before = &since.files.files;
    let mut found = Vec::new();
    for (number, (path, entry)) in now.files.iter().enumerate() {
        if number % PAUSE == PAUSE - 1 {
            tokio::task::yield_now().await;
        }
        let old = before.get(path);
        // Where not all were known, one that was not may still be old.
        let is_old = || old.is_none() && since.files.partial && entry.stamp.changed < since.time;
        if old.is_none_or(|old| old.stamp != entry.stamp) && entry.upload == 0 && !is_old() {
            found.push(Difference { path: path.clone(), now: Some(entry.stamp), is_new: old.is_none() });
        }
    }
    let gone = before.keys().filter(|path| !now.files.contains_key(*path) && !now.taken.contains_key(*path));
    found.extend(gone.map(|path| Difference { path: path.clone(), now: None, is_new: false }));
    found
}

#[cfg(test)]
mod tests;
