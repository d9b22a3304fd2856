//! What callers say of a file beside its bytes: extended attributes of the user's. They live and go with the file, and code inside can change them.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{OFlags, XattrFlags, fsetxattr, lgetxattr, llistxattr};
use rustix::io::Errno;

use super::path::{Links, open_beneath};
use super::{FileError, failed};

/// Those that anybody may have.
const USER: &str = "user.";
/// Longest list of names, and most bytes of one file's attributes that are told: what is more was not written from outside.
const MAX_NAMES: usize = 8 * 1024;
const MAX_BYTES: usize = 8 * 1024;

/// Writes them to a file that has none.
///
/// # Errors
/// When its file system keeps none, or not as many.
pub(super) fn write(file: impl AsFd, attributes: &BTreeMap<String, String>) -> Result<(), FileError> {
    for (name, value) in attributes {
        let written = fsetxattr(&file, format!("{USER}{name}"), value.as_bytes(), XattrFlags::empty());
        written.map_err(|errno| match errno {
            Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS => {
                FileError::Invalid("this session's file system keeps no attributes of files")
            }
            Errno::RANGE | Errno::TOOBIG | Errno::INVAL => {
                FileError::Invalid("an attribute's name or value is too long, or none")
            }
            errno => failed("written")(errno),
        })?;
    }
    Ok(())
}

/// Those of something below a folder; none where they can't be told. A link's own, not those of what it leads to.
pub(super) fn read(root: impl AsFd, path: &std::path::Path) -> BTreeMap<String, String> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Some(name) = path.file_name() else { return BTreeMap::new() };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let opened = parent.map(|parent| open_beneath(&root, parent, flags, Links::Follow)).transpose();
    let Ok(opened) = opened else { return BTreeMap::new() };
    // There is no call that takes a folder and a name.
    let folder = opened.as_ref().map_or_else(|| root.as_fd().as_raw_fd(), |folder| folder.as_raw_fd());
    let at = std::path::Path::new("/proc/self/fd").join(folder.to_string()).join(name);
    let mut names = vec![0; MAX_NAMES];
    let Ok(length) = llistxattr(&at, names.as_mut_slice()) else { return BTreeMap::new() };
    let (mut found, mut bytes) = (BTreeMap::new(), 0);
    for whole in names[..length].split(|byte| *byte == 0).filter_map(|name| std::str::from_utf8(name).ok()) {
        let Some(name) = whole.strip_prefix(USER).filter(|name| !name.is_empty()) else { continue };
        let mut value = vec![0; MAX_BYTES - bytes];
        let Ok(length) = lgetxattr(&at, whole, value.as_mut_slice()) else { continue };
        value.truncate(length);
        let Ok(value) = String::from_utf8(value) else { continue };
        bytes += (name.len() + value.len()).min(MAX_BYTES - bytes);
        found.insert(name.to_owned(), value);
        if bytes == MAX_BYTES {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rustix::fs::{Mode, open};

    use super::super::path::FOLDER_OR_LINK;
    use super::*;

    #[test]
    fn what_is_said_of_a_file_is_kept_with_it() {
        let folder = std::env::temp_dir().join(format!("cellblock-attributes-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("a")).unwrap();
        let file = std::fs::File::create(folder.join("a/x")).unwrap();
        let said =
            BTreeMap::from([("e2b.author".to_owned(), "me".to_owned()), ("e2b.empty".to_owned(), String::new())]);
        match write(&file, &said) {
            Ok(()) => {}
            // Where the tests run it may be so.
            Err(FileError::Invalid(_)) => return,
            Err(error) => panic!("{error:?}"),
        }
        let root = open(&folder, FOLDER_OR_LINK, Mode::empty()).unwrap();
        assert_eq!(read(&root, Path::new("a/x")), said);
        assert_eq!(read(&root, Path::new("a/none")), BTreeMap::new());
        assert_eq!(read(&root, Path::new("")), BTreeMap::new());
        let long = BTreeMap::from([("x".repeat(300), "1".to_owned())]);
        assert!(matches!(write(&file, &long), Err(FileError::Invalid(_))));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
