//! Has each Python in a cell find the packages that its session has installed, and the shell their programs. Installs nothing.

use std::collections::BTreeMap;
use std::path::Path;

use cellblock_wire::link::WORKDIR;
use cellblock_wire::packages::{PACKAGES_NAME, PYTHON_DIR, WORKDIR_VARIABLE};

const PATH: &str = "PATH";
const PYTHON_PATH: &str = "PYTHONPATH";

/// An environment in which installed packages are found; what is in it already comes first where it is the code's to say.
#[must_use]
pub fn offer(env: BTreeMap<String, String>, workdir: &Path) -> BTreeMap<String, String> {
    match Path::new(PYTHON_DIR).is_dir() {
        true => with(env, workdir, std::env::var(PATH).ok(), std::env::var(PYTHON_PATH).ok()),
        false => env,
    }
}

fn with(
    mut env: BTreeMap<String, String>,
    workdir: &Path,
    path: Option<String>,
    python_path: Option<String>,
) -> BTreeMap<String, String> {
    let value = |env: &BTreeMap<String, String>, name: &str, own: Option<String>| {
        env.get(name).cloned().or(own).filter(|value| !value.is_empty())
    };
    let python_path =
        value(&env, PYTHON_PATH, python_path).map_or(PYTHON_DIR.to_owned(), |rest| format!("{PYTHON_DIR}:{rest}"));
    env.insert(PYTHON_PATH.to_owned(), python_path);
    if let Some(path) = value(&env, PATH, path) {
        env.insert(PATH.to_owned(), format!("{path}:{}/{PACKAGES_NAME}/bin", workdir.display()));
    }
    if workdir != Path::new(WORKDIR) {
        env.insert(WORKDIR_VARIABLE.to_owned(), workdir.display().to_string());
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_already_stays() {
        let env = |pairs: &[(&str, &str)]| pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        let found: BTreeMap<String, String> =
            with(env(&[("A", "b")]), Path::new(WORKDIR), Some("/bin".to_owned()), None);
        let expected = [("A", "b"), ("PATH", "/bin:/workspace/.packages/bin"), ("PYTHONPATH", "/cellblock/python")];
        assert_eq!(found, env(&expected));
        let own = env(&[("PATH", "/own"), ("PYTHONPATH", "/mine")]);
        let found = with(own, Path::new("/home/user"), Some("/bin".to_owned()), Some("/p".to_owned()));
        let expected = [
            ("CELLBLOCK_WORKDIR", "/home/user"),
            ("PATH", "/own:/home/user/.packages/bin"),
            ("PYTHONPATH", "/cellblock/python:/mine"),
        ];
        assert_eq!(found, env(&expected));
    }
}
