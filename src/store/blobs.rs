//! Long contents of executions, a file each: one line of JSON about it, then its bytes. Runs on the writer's thread and waits for the disk.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::files::{self, told};
use super::ledger::{Ledger, Sums};
use super::moment::is_over;
use crate::domain::ids::ExecutionId;

/// Longest first line of a file.
const LONGEST_HEADER: u64 = 8 * 1024;
/// What a name begins with until the file is whole.
const UNFINISHED: &str = "unfinished-";

/// Which content: of which execution, and which of its own.
pub(super) type Key = (ExecutionId, u32);

/// What a file says of its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    pub tenant: String,
    pub session: String,
    pub mime: String,
    pub sha256: String,
    pub bytes: u64,
    #[serde(with = "super::moment")]
    pub kept_at: Timestamp,
}

/// The contents that are kept. The oldest go when there are too many bytes, and each when its time is over.
#[derive(Debug)]
pub(super) struct Blobs {
    folder: PathBuf,
    allowed: u64,
    retention: Duration,
    kept: Ledger<Key, Timestamp>,
}

impl Blobs {
    /// Looks through the folder; what is broken in it is removed.
    pub(super) fn open(folder: PathBuf, allowed: u64, retention: Duration, now: Timestamp) -> io::Result<Self> {
        files::ensure_folder(&folder)?;
        let mut blobs = Self { folder, allowed, retention, kept: Ledger::new() };
        for entry in std::fs::read_dir(&blobs.folder)? {
            blobs.look_at(&entry?.path());
        }
        blobs.prune(now);
        blobs.make_room(0);
        Ok(blobs)
    }

    /// What is kept for each tenant.
    pub(super) fn sums(&self) -> Sums {
        self.kept.sums()
    }

    /// The longest content for which there can be room.
    pub(super) fn largest(&self) -> u64 {
        (self.allowed / files::BLOCK * files::BLOCK).saturating_sub(LONGEST_HEADER)
    }

    fn look_at(&mut self, path: &Path) {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let Some(key) = key_of(name) else {
            if name.starts_with(UNFINISHED) {
                told("remove what was not finished", path, files::remove(path));
            } else {
                tracing::warn!(path = %path.display(), "a file among the blobs is not ours; it is left alone");
            }
            return;
        };
        match File::open(path).and_then(|mut file| Ok((read_header(&mut file)?, file.metadata()?.len()))) {
            Ok((Some((header, start)), length)) if start.saturating_add(header.bytes) == length => {
                self.kept.set(key, header.kept_at, &header.tenant, files::charge(length));
            }
            Ok(_) => {
                tracing::warn!(path = %path.display(), "a blob is broken; it is removed");
                told("remove a broken blob", path, files::remove(path));
            }
            Err(error) => tracing::warn!(path = %path.display(), %error, "a blob cannot be read; it is left alone"),
        }
    }

    /// Keeps a content. The caller has seen that it is no larger than all may be.
    pub(super) fn put(&mut self, key: Key, header: &Header, bytes: &[u8]) -> io::Result<()> {
        let mut line = serde_json::to_vec(header)?;
        line.push(b'\n');
        if line.len() as u64 > LONGEST_HEADER {
            return Err(io::Error::other("what is to be said of it is too long"));
        }
        let charge = files::charge((line.len() + bytes.len()) as u64);
        if charge > self.allowed {
            return Err(io::Error::other(format!("it takes {charge} bytes, and all may take {}", self.allowed)));
        }
        self.drop_one(key);
        self.make_room(charge);
        let name = name_of(key);
        let temporary = self.folder.join(format!("{UNFINISHED}{name}"));
        files::write_whole(&temporary, &self.folder.join(name), &[&line, bytes])?;
        self.kept.set(key, header.kept_at, &header.tenant, charge);
        Ok(())
    }

    /// A tenant's content: what is said of it, and its file, where the next byte to be read is the first of the content.
    pub(super) fn find(&self, tenant: &str, key: Key, now: Timestamp) -> Option<(Header, File)> {
        let kept_at = self.kept.rank(key)?;
        if is_over(kept_at, self.retention, now) {
            return None;
        }
        let path = self.folder.join(name_of(key));
        let opened = File::open(&path).and_then(|mut file| {
            let header = read_header(&mut file)?;
            if let Some((_, start)) = header {
                file.seek(SeekFrom::Start(start))?;
            }
            Ok((header, file))
        });
        match opened {
            Ok((Some((header, _)), file)) => (header.tenant == tenant).then_some((header, file)),
            Ok((None, _)) => {
                tracing::warn!(path = %path.display(), "a blob is broken");
                None
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a blob cannot be read");
                None
            }
        }
    }

    /// The bytes of a tenant's content.
    pub(super) fn read(&self, tenant: &str, key: Key, now: Timestamp) -> Option<Vec<u8>> {
        let (header, file) = self.find(tenant, key, now)?;
        let mut bytes = Vec::with_capacity(usize::try_from(header.bytes.min(self.allowed)).ok()?);
        file.take(header.bytes).read_to_end(&mut bytes).ok()?;
        (bytes.len() as u64 == header.bytes).then_some(bytes)
    }

    /// Removes what has been kept for long enough.
    pub(super) fn prune(&mut self, now: Timestamp) {
        for key in self.kept.first_while(|kept_at| is_over(kept_at, self.retention, now)) {
            self.drop_one(key);
        }
    }

    fn make_room(&mut self, bytes: u64) {
        while self.kept.total().saturating_add(bytes) > self.allowed {
            let Some(key) = self.kept.first() else { return };
            self.drop_one(key);
        }
    }

    fn drop_one(&mut self, key: Key) {
        if self.kept.rank(key).is_some() {
            let path = self.folder.join(name_of(key));
            told("remove a blob", &path, files::remove(&path));
            self.kept.remove(key);
        }
    }
}

/// What the file says of its content, and where that begins.
fn read_header(file: &mut File) -> io::Result<Option<(Header, u64)>> {
    let Some(line) = files::first_line(file, LONGEST_HEADER)? else { return Ok(None) };
    Ok(serde_json::from_slice(&line).ok().map(|header| (header, line.len() as u64 + 1)))
}

fn name_of((execution, number): Key) -> String {
    format!("{execution}-{number}")
}

fn key_of(name: &str) -> Option<Key> {
    let (execution, number) = name.split_once('-')?;
    let key = (execution.parse().ok()?, number.parse().ok()?);
    (name_of(key) == name).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::SignedDuration;
    use uuid::Uuid;

    const HOUR: Duration = Duration::from_secs(3600);

    fn key(n: u128) -> Key {
        (ExecutionId::from_uuid(Uuid::from_u128(n)), 1)
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + seconds).unwrap()
    }

    fn header(bytes: &[u8], kept_at: Timestamp) -> Header {
        Header {
            tenant: "t".to_owned(),
            session: "s".to_owned(),
            mime: "image/png".to_owned(),
            sha256: String::new(),
            bytes: bytes.len() as u64,
            kept_at,
        }
    }

    fn put(blobs: &mut Blobs, n: u128, bytes: &[u8]) {
        blobs.put(key(n), &header(bytes, at(n as i64)), bytes).unwrap();
    }

    fn kept(blobs: &Blobs) -> Vec<u128> {
        (1..10).filter(|n| blobs.read("t", key(*n), at(10)).is_some()).collect()
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many() {
        let folder = tempfile::tempdir().unwrap();
        let mut blobs = Blobs::open(folder.path().to_owned(), 3 * 4096, HOUR, at(0)).unwrap();
        for n in [2, 1, 3, 4] {
            put(&mut blobs, n, b"x");
        }
        assert_eq!(kept(&blobs), [2, 3, 4]);
        put(&mut blobs, 5, &[0; 5000]);
        assert_eq!(kept(&blobs), [4, 5]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        let large = [0; 3 * 4096];
        assert!(blobs.put(key(6), &header(&large, at(6)), &large).is_err(), "nothing is removed for what never fits");
        assert_eq!(kept(&blobs), [4, 5]);
        let smaller = Blobs::open(folder.path().to_owned(), 8192, HOUR, at(0)).unwrap();
        assert_eq!(kept(&smaller), [5], "a smaller budget holds from the start");
    }

    #[test]
    fn a_content_can_be_read_until_its_time_is_over_even_before_it_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let mut blobs = Blobs::open(folder.path().to_owned(), 1 << 20, HOUR, at(0)).unwrap();
        put(&mut blobs, 1, b"one");
        put(&mut blobs, 2, b"two");
        let over = at(1) + SignedDuration::try_from(HOUR).unwrap();
        assert_eq!(blobs.read("t", key(1), over), None);
        assert_eq!(blobs.read("t", key(2), over).unwrap(), b"two");
        assert_eq!(blobs.read("other", key(2), over), None);
        blobs.prune(over);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let again = Blobs::open(folder.path().to_owned(), 1 << 20, HOUR, over).unwrap();
        assert_eq!(again.read("t", key(2), over).unwrap(), b"two");
    }

    #[test]
    fn what_is_broken_is_removed_at_the_start_and_what_is_not_ours_stays() {
        let folder = tempfile::tempdir().unwrap();
        let mut blobs = Blobs::open(folder.path().to_owned(), 1 << 20, HOUR, at(0)).unwrap();
        (1..=4).for_each(|n| put(&mut blobs, n, b"whole"));
        let path = |n| folder.path().join(name_of(key(n)));
        std::fs::write(path(1), std::fs::read(path(1)).unwrap().split_last().unwrap().1).unwrap();
        std::fs::write(path(2), b"").unwrap();
        std::fs::write(path(3), vec![0; 100_000]).unwrap();
        std::fs::write(folder.path().join(format!("{UNFINISHED}{}", name_of(key(9)))), b"half").unwrap();
        std::fs::write(folder.path().join("README"), b"").unwrap();
        let again = Blobs::open(folder.path().to_owned(), 1 << 20, HOUR, at(5)).unwrap();
        assert_eq!(kept(&again), [4]);
        let mut left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["README", name_of(key(4)).as_str()]);
    }
}
