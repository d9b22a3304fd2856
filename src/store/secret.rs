//! A secret of the data folder's own, from which what must be the same after a restart and unguessable is derived. What that is, is not known here.

use std::io;
use std::path::{Path, PathBuf};

use super::files;

/// Its name in the data folder.
const FILE: &str = "session-secret";
/// Its length in bytes.
pub const BYTES: usize = 32;

/// Where it stands in a data folder.
#[must_use]
pub fn path_in(folder: &Path) -> PathBuf {
    folder.join(FILE)
}

/// Reads it, or makes it. Only one process may do this with a folder at one time.
///
/// # Errors
/// When the file can't be read or written, or holds something else, or the system gives no random bytes.
pub fn ensure(folder: &Path) -> io::Result<[u8; BYTES]> {
    let path = path_in(folder);
    match std::fs::read(&path) {
        Ok(bytes) => <[u8; BYTES]>::try_from(bytes.as_slice()).map_err(|_| {
            let message = format!("it has {} bytes, not {BYTES}; without it, a new one is made", bytes.len());
            io::Error::new(io::ErrorKind::InvalidData, message)
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut secret = [0; BYTES];
            getrandom::fill(&mut secret).map_err(io::Error::other)?;
            files::write_whole(&path.with_extension("new"), &path, &[&secret])?;
            Ok(secret)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_folder_keeps_its_secret_to_itself() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let secret = ensure(one.path()).unwrap();
        assert_eq!(ensure(one.path()).unwrap(), secret);
        assert_ne!(ensure(two.path()).unwrap(), secret);
        let mode = std::fs::metadata(path_in(one.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::write(path_in(one.path()), "short").unwrap();
        assert_eq!(ensure(one.path()).unwrap_err().kind(), io::ErrorKind::InvalidData, "it is not made anew");
    }
}
