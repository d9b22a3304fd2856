//! Paths as E2B's clients write them: from home on, or absolute. Whether one can be reached is decided where it is.

use std::fmt::Write as _;

/// Longest path that is taken, in bytes.
const MAX_PATH: usize = 4095;

/// Where a path leads, as an absolute one without `.` and `..`: `~` and what is not absolute begin at home.
///
/// # Errors
/// A sentence, when it is no path.
pub(super) fn absolute(home: &str, path: &str) -> Result<String, String> {
    if path.len() > MAX_PATH || path.contains('\0') {
        return Err(format!("a path has at most {MAX_PATH} bytes, none of them zero"));
    }
    let from_home = path.strip_prefix('~').filter(|rest| rest.is_empty() || rest.starts_with('/'));
    let (start, rest) = match from_home {
        Some(rest) => (home, rest),
        None if path.starts_with('/') => ("", path),
        None if path.starts_with('~') => {
            return Err(format!("{path:.60?} names another user's home; there is one user"));
        }
        None => (home, path),
    };
    let mut names: Vec<&str> = Vec::new();
    for name in start.split('/').chain(rest.split('/')) {
        match name {
            "" | "." => {}
            ".." => drop(names.pop()),
            name => names.push(name),
        }
    }
    let mut absolute = names.iter().fold(String::new(), |mut absolute, name| {
        // Writing to a text can't fail.
        let _ = write!(absolute, "/{name}");
        absolute
    });
    if absolute.is_empty() {
        absolute.push('/');
    }
    Ok(absolute)
}

/// A path as the service tells it, from the working folder on or absolute, as clients read it.
pub(super) fn shown(home: &str, path: &str) -> String {
    match path {
        "" | "." => home.to_owned(),
        path if path.starts_with('/') => path.to_owned(),
        path => format!("{home}/{path}"),
    }
}

/// The last name of a path.
pub(super) fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOME: &str = "/home/user";

    #[test]
    fn paths_begin_at_home_unless_they_are_absolute() {
        for (path, expected) in [
            ("", HOME),
            ("~", HOME),
            ("~/a", "/home/user/a"),
            ("a/b", "/home/user/a/b"),
            ("./a/../b/", "/home/user/b"),
            ("../x", "/home/x"),
            ("/tmp//x/.", "/tmp/x"),
            ("/../..", "/"),
            ("/home/user/~", "/home/user/~"),
            ("a~b", "/home/user/a~b"),
        ] {
            assert_eq!(absolute(HOME, path).as_deref(), Ok(expected), "{path}");
        }
        assert!(absolute(HOME, "~root/x").is_err() && absolute(HOME, "a\0b").is_err());
        assert!(absolute(HOME, &"x".repeat(5000)).is_err());
    }

    #[test]
    fn what_is_told_is_absolute() {
        assert_eq!(shown(HOME, "a/b"), "/home/user/a/b");
        assert_eq!((shown(HOME, ""), shown(HOME, "/tmp/x")), (HOME.to_owned(), "/tmp/x".to_owned()));
        assert_eq!((name("/home/user/a.txt"), name("a"), name("/")), ("a.txt", "a", ""));
    }

    proptest! {
        #[test]
        fn no_path_leads_out_by_steps(path in "[/a.~]{0,40}") {
            if let Ok(absolute) = absolute(HOME, &path) {
                prop_assert!(absolute.starts_with('/'));
                prop_assert!(absolute.split('/').all(|name| name != ".." && name != "."));
            }
        }
    }
}
