//! Data volumes as templates name them: what a name and a place may be. Where the data is, and how it got there, is the engine's business.

use std::fmt;

use super::spec::WORKDIR;

/// Most data volumes of one template.
pub const MAX_MOUNTS: usize = 8;
/// Longest name, which becomes a part of a volume's.
const LONGEST_NAME: usize = 40;
/// Longest path.
const LONGEST_PATH: usize = 200;

/// Folders that images and kernels live from, or that are the cell's own. Nothing is mounted there.
const TAKEN: [&str; 19] = [
    "bin",
    "boot",
    "cellblock",
    "dev",
    "etc",
    "home",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "tmp",
    "usr",
    "var",
    "workspace",
];

/// A data volume at a place in a cell, where it can be read and never written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct DataMount {
    /// The data's name.
    pub name: String,
    /// Where it is mounted.
    pub path: String,
}

impl fmt::Display for DataMount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.name, self.path)
    }
}

/// Checks a data volume's name.
///
/// # Errors
/// A sentence that says what is allowed.
pub fn check_name(name: &str) -> Result<(), String> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let fits = (1..=LONGEST_NAME).contains(&name.len()) && name.bytes().all(inner);
    if fits && !name.starts_with('-') && !name.ends_with('-') {
        return Ok(());
    }
    Err(format!(
        "{name:.80?} is not the name of a data volume: 1 to {LONGEST_NAME} of a-z, 0-9 and \"-\", with a letter or digit at both ends"
    ))
}

/// Checks all data volumes of one template: names, places, and that none is within another.
///
/// # Errors
/// A sentence about the first that can't be.
pub fn check_mounts(mounts: &[DataMount]) -> Result<(), String> {
    if mounts.len() > MAX_MOUNTS {
        return Err(format!("{} data volumes; allowed are {MAX_MOUNTS}", mounts.len()));
    }
    for (at, mount) in mounts.iter().enumerate() {
        check_name(&mount.name)?;
        check_path(&mount.path)?;
        let before = &mounts[..at];
        if let Some(other) = before.iter().find(|o| is_within(&o.path, &mount.path) || is_within(&mount.path, &o.path))
        {
            return Err(format!("{mount} and {other} are in each other's way"));
        }
    }
    Ok(())
}

fn is_within(inner: &str, outer: &str) -> bool {
    inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Checks a template's working folder beside its data: a folder below `/home`, or one that could hold data, and in the way of none that does.
///
/// # Errors
/// A sentence that says what is allowed.
pub fn check_workdir(workdir: &str, mounts: &[DataMount]) -> Result<(), String> {
    if !workdir.starts_with("/home/") && workdir != WORKDIR {
        check_path(workdir)?;
    }
    let parts = plain_parts(workdir)?;
    // What lies deeper would have folders above it that are nobody's.
    if parts.len() > 2 {
        return Err(format!("{workdir:?} is no working folder: two names at most, such as \"/home/user\""));
    }
    match mounts.iter().find(|mount| is_within(&mount.path, workdir) || is_within(workdir, &mount.path)) {
        Some(mount) => Err(format!("the working folder {workdir} and the data {mount} are in each other's way")),
        None => Ok(()),
    }
}

fn check_path(path: &str) -> Result<(), String> {
    let parts = plain_parts(path)?;
    if TAKEN.contains(&parts[0]) {
        return Err(format!(
            "{path:?} is within /{}, which is the system's; use a path such as \"/mnt/data\"",
            parts[0]
        ));
    }
    Ok(())
}

/// The names of an absolute path, one at least.
fn plain_parts(path: &str) -> Result<Vec<&str>, String> {
    let plain = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    let parts: Vec<&str> = path.strip_prefix('/').map(|rest| rest.split('/').collect()).unwrap_or_default();
    if parts.is_empty() || path.len() > LONGEST_PATH || !parts.iter().all(|part| plain(part)) {
        return Err(format!(
            "{path:.250?} is not an absolute path of letters, digits, \".\", \"_\" and \"-\" without \".\" and \"..\", such as \"/mnt/data\""
        ));
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(pairs: &[(&str, &str)]) -> Vec<DataMount> {
        let mount = |(name, path): &(&str, &str)| DataMount { name: (*name).to_owned(), path: (*path).to_owned() };
        pairs.iter().map(mount).collect()
    }

    #[test]
    fn data_stands_beside_the_system_and_beside_each_other() {
        assert_eq!(check_mounts(&[]), Ok(()));
        assert_eq!(check_mounts(&mounts(&[("a", "/mnt/a"), ("a", "/mnt/ab"), ("b-2", "/data")])), Ok(()));
        for (wrong, word) in [
            (("a", "mnt"), "absolute"),
            (("a", "/"), "absolute"),
            (("a", ""), "absolute"),
            (("a", "/mnt/"), "absolute"),
            (("a", "/mnt//a"), "absolute"),
            (("a", "/mnt/../etc"), "absolute"),
            (("a", "/./usr"), "absolute"),
            (("a", "/mnt/a,rw"), "absolute"),
            (("a", "/mnt/a:rw"), "absolute"),
            (("a", "/mnt/a b"), "absolute"),
            (("a", "/workspace/a"), "system"),
            (("a", "/tmp"), "system"),
            (("a", "/proc/self"), "system"),
            (("a", "/cellblock"), "system"),
            (("a", "/run/cellblock"), "system"),
            (("a", "/dev/shm"), "system"),
            (("", "/mnt/a"), "name"),
            (("A", "/mnt/a"), "name"),
            (("a.b", "/mnt/a"), "name"),
            (("-a", "/mnt/a"), "name"),
            (("a/b", "/mnt/a"), "name"),
        ] {
            let refused = check_mounts(&mounts(&[wrong])).unwrap_err();
            assert!(refused.contains(word), "{wrong:?}: {refused}");
        }
        for clash in
            [[("a", "/mnt"), ("b", "/mnt/b")], [("a", "/mnt/b/c"), ("b", "/mnt/b")], [("a", "/d"), ("b", "/d")]]
        {
            assert!(check_mounts(&mounts(&clash)).unwrap_err().contains("way"), "{clash:?}");
        }
        let many: Vec<_> = (0..9).map(|n| DataMount { name: "a".to_owned(), path: format!("/mnt/{n}") }).collect();
        assert!(check_mounts(&many).unwrap_err().contains("allowed are 8"));
    }
}
