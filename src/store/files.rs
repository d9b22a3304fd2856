//! Files of the data folder: private folders, writing without a half-written moment, appending whole lines. Knows nothing of what is in them.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// What a file takes on disk at least. Budgets count in it, so that they bound the number of files, too.
pub(super) const BLOCK: u64 = 4096;
/// How much is read at once when the end of a file is looked for.
const STEP: u64 = 64 * 1024;

/// What a file of this length is counted as.
pub(super) fn charge(bytes: u64) -> u64 {
    bytes.max(1).div_ceil(BLOCK).saturating_mul(BLOCK)
}

/// Makes a folder that is for its owner alone.
pub(super) fn ensure_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    std::fs::set_permissions(folder, Permissions::from_mode(0o700))
}

/// Writes a file under a temporary name and gives it its own once the disk has all of it.
pub(super) fn write_whole(temporary: &Path, path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let written = write_parts(temporary, parts).and_then(|()| std::fs::rename(temporary, path));
    if written.is_err() {
        // What went wrong first is what is told.
        let _ = remove(temporary);
    }
    written
}

fn write_parts(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    remove(path)?;
    let mut file = create(path)?;
    for part in parts {
        file.write_all(part)?;
    }
    file.sync_data()
}

/// Writes a file that is not there yet. Nothing is left of a failed attempt.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = create(path)?;
    let written = file.write_all(bytes);
    if written.is_err() {
        let _ = remove(path);
    }
    written
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Removes a file. That it is not there is no error.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Appends to a file that is known to be `length` long; what an earlier attempt left behind that is cut off. Nothing is left of a failed one.
pub(super) fn append(path: &Path, length: u64, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).open(path)?;
    match file.metadata()?.len() {
        found if found > length => file.set_len(length)?,
        found if found < length => return Err(io::Error::other(format!("has {found} bytes, not {length}"))),
        _ => {}
    }
    let written = file.write_all(bytes);
    if written.is_err() {
        // If this fails as well, the next call does it.
        let _ = file.set_len(length);
    }
    written
}

/// Says what could not be done to a file.
pub(super) fn told(attempt: &str, path: &Path, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::error!(path = %path.display(), %error, "could not {attempt}");
    }
}

/// Cuts off what is beyond a length.
pub(super) fn cut(path: &Path, length: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    if file.metadata()?.len() > length { file.set_len(length) } else { Ok(()) }
}

/// The length of a file up to the end of its last whole line.
pub(super) fn whole_lines(file: &mut File) -> io::Result<u64> {
    let mut end = file.metadata()?.len();
    let mut step = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(STEP);
        file.seek(SeekFrom::Start(start))?;
        step.clear();
        file.take(end - start).read_to_end(&mut step)?;
        if let Some(at) = step.iter().rposition(|b| *b == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// The last whole line that ends at `end`, without its end; none if it is longer than `longest`.
pub(super) fn last_line(file: &mut File, end: u64, longest: u64) -> io::Result<Option<Vec<u8>>> {
    let start = end.saturating_sub(longest + 2);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(end - start).read_to_end(&mut bytes)?;
    bytes.pop();
    Ok(match bytes.iter().rposition(|b| *b == b'\n') {
        Some(at) => Some(bytes.split_off(at + 1)),
        None => (start == 0).then_some(bytes),
    })
}

/// The first line of a file, without its end; none if it is longer than `longest` or has no end.
pub(super) fn first_line(file: &mut File, longest: u64) -> io::Result<Option<Vec<u8>>> {
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(longest + 1).read_to_end(&mut bytes)?;
    Ok(bytes.iter().position(|b| *b == b'\n').map(|at| {
        bytes.truncate(at);
        bytes
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_from_both_ends_however_long_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let long = "x".repeat(200_000);
        for (text, whole, last) in [
            (String::new(), 0, None),
            ("torn".to_owned(), 0, None),
            ("a\n".to_owned(), 2, Some("a")),
            ("a\nbc\ntorn".to_owned(), 5, Some("bc")),
            (format!("a\n{long}"), 2, Some("a")),
            (format!("a\n{long}\n"), 200_003, None),
        ] {
            std::fs::write(&path, &text).unwrap();
            let mut file = File::open(&path).unwrap();
            assert_eq!(whole_lines(&mut file).unwrap(), whole);
            if whole > 0 {
                let found = last_line(&mut file, whole, 100).unwrap();
                assert_eq!(found.as_deref(), last.map(str::as_bytes));
                assert_eq!(first_line(&mut file, 100).unwrap().unwrap(), b"a");
            }
        }
        std::fs::write(&path, &long).unwrap();
        assert_eq!(first_line(&mut File::open(&path).unwrap(), 100).unwrap(), None);
    }

    #[test]
    fn what_is_appended_follows_what_is_known_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, "a\nhalf of an earlier atte").unwrap();
        append(&path, 2, b"b\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"a\nb\n");
        assert!(append(&path, 9, b"c\n").is_err());
    }

    #[test]
    fn a_budget_counts_blocks() {
        assert_eq!([0, 1, 4096, 4097].map(charge), [4096, 4096, 4096, 8192]);
    }
}
