//! Which installation a data folder is: an id that is made with the folder's first use and stays. What it is good for is not known here.

use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::files;
use crate::domain::ids::InstallationId;

/// Its name in the data folder.
const FILE: &str = "installation";

/// Where the id stands in a data folder.
#[must_use]
pub fn path_in(folder: &Path) -> PathBuf {
    folder.join(FILE)
}

/// Reads the id, or makes it. Only one process may do this with a folder at one time.
///
/// # Errors
/// When the file can't be read or written, or holds something else.
pub fn ensure(folder: &Path) -> io::Result<InstallationId> {
    let path = path_in(folder);
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{error}"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let id = InstallationId::from_uuid(Uuid::new_v4());
            files::write_whole(&path.with_extension("new"), &path, &[id.to_string().as_bytes(), b"\n"])?;
            Ok(id)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_stays_the_same_installation_and_two_are_two() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = ensure(one.path()).unwrap();
        assert_eq!(ensure(one.path()).unwrap(), id);
        assert_ne!(ensure(two.path()).unwrap(), id);
        std::fs::write(path_in(one.path()), "something else").unwrap();
        assert_eq!(ensure(one.path()).unwrap_err().kind(), io::ErrorKind::InvalidData, "it is not made anew");
    }
}
