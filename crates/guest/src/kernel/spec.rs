//! Finds the kernels that an image offers. Reads `kernel.json` files and starts nothing.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cellblock_wire::link::Transport;
use serde::Deserialize;

const MAX_SPEC: u64 = 64 * 1024;
const MAX_SPECS: usize = 64;
/// No kernel is waited for longer after it said that it is idle.
const MAX_LATE: Duration = Duration::from_secs(1);

/// A kernelspec as it stands on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundSpec {
    /// Its folder's name.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
    /// What is in its `kernel.json`.
    pub json: SpecJson,
}

/// The fields of a `kernel.json` that are used.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct SpecJson {
    /// The command, with `{connection_file}` and `{resource_dir}` in it.
    pub argv: Vec<String>,
    /// The kernel's language.
    #[serde(default)]
    pub language: String,
    /// The kernel's name for people.
    #[serde(default)]
    pub display_name: String,
    /// Added to the environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// What others have to say of it.
    #[serde(default)]
    pub metadata: Metadata,
}

/// The `metadata` of a `kernel.json`: a section for each program that reads it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Metadata {
    /// Ours.
    #[serde(default)]
    pub cellblock: Ours,
}

/// What an image's maker tells us of a kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Ours {
    /// How it is to be reached, where it knows one way only.
    #[serde(default)]
    pub transport: Option<Transport>,
    /// Languages that it runs beside its own.
    #[serde(default)]
    pub languages: Vec<String>,
    /// It sends output from a task of its own, so that some may come after the idle status: within so many milliseconds.
    #[serde(default)]
    pub late_output_ms: u64,
}

impl Ours {
    /// How long after the idle status output may come, if it may.
    #[must_use]
    pub fn late_output(&self) -> Option<Duration> {
        (self.late_output_ms > 0).then(|| Duration::from_millis(self.late_output_ms).min(MAX_LATE))
    }
}

/// All kernelspecs, `python3` first, then in the order of the folders; of two with one name the first.
#[must_use]
pub fn find_specs() -> Vec<FoundSpec> {
    find_in(&data_folders())
}

fn find_in(folders: &[PathBuf]) -> Vec<FoundSpec> {
    let mut specs: Vec<FoundSpec> = Vec::new();
    for folder in folders {
        let Ok(entries) = std::fs::read_dir(folder.join("kernels")) else { continue };
        let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).take(MAX_SPECS).collect();
        found.sort();
        for spec in found.iter().filter_map(|folder| read_spec(folder)) {
            if specs.len() < MAX_SPECS && specs.iter().all(|s| s.name != spec.name) {
                specs.push(spec);
            }
        }
    }
    specs.sort_by_key(|spec| spec.name != "python3");
    specs
}

fn read_spec(folder: &Path) -> Option<FoundSpec> {
    let mut bytes = Vec::new();
    let path = folder.join("kernel.json");
    if !path.metadata().ok()?.is_file() {
        return None;
    }
    std::fs::File::open(path).ok()?.take(MAX_SPEC).read_to_end(&mut bytes).ok()?;
    let json: SpecJson = serde_json::from_slice(&bytes).ok()?;
    let name = folder.file_name()?.to_str()?.to_ascii_lowercase();
    (!json.argv.is_empty()).then(|| FoundSpec { name, folder: folder.to_owned(), json })
}

fn data_folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        std::env::var_os("JUPYTER_PATH").map(|paths| std::env::split_paths(&paths).collect()).unwrap_or_default();
    let prefixes =
        std::env::var_os("PATH").map(|paths| python_prefixes(std::env::split_paths(&paths))).unwrap_or_default();
    let fixed = [PathBuf::from("/usr/local"), PathBuf::from("/usr")];
    let opt = std::fs::read_dir("/opt").into_iter().flatten().flatten().map(|entry| entry.path()).take(MAX_SPECS);
    let prefixes = prefixes.into_iter().chain(fixed).chain(opt);
    folders.extend(prefixes.map(|prefix| prefix.join("share/jupyter")));
    folders
}

/// Where the Pythons on the path are installed, as themselves and behind their links.
fn python_prefixes(paths: impl Iterator<Item = PathBuf>) -> Vec<PathBuf> {
    let pythons = paths.flat_map(|path| [path.join("python3"), path.join("python")]).filter(|path| path.is_file());
    let both = pythons.take(8).flat_map(|path| [path.canonicalize().unwrap_or_default(), path]);
    both.filter_map(|path| Some(path.parent()?.parent()?.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_a_name_wins_and_python_comes_first() {
        let root = std::env::temp_dir().join(format!("cellblock-spec-{}", std::process::id()));
        let write = |path: &str, json: &str| {
            let folder = root.join(path);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("kernel.json"), json).unwrap();
        };
        write("a/kernels/ir", r#"{"argv":["R"],"language":"R","display_name":"R","metadata":{}}"#);
        write("a/kernels/broken", "{");
        write("a/kernels/empty", r#"{"argv":[]}"#);
        write("b/kernels/ir", r#"{"argv":["other"]}"#);
        write("b/kernels/python3", r#"{"argv":["python"],"env":{"A":"b"},"metadata":{"debugger":true}}"#);
        write(
            "b/kernels/deno",
            r#"{"argv":["deno"],"metadata":{"cellblock":{"transport":"tcp","languages":["javascript"]}}}"#,
        );
        std::fs::create_dir_all(root.join("b/kernels/odd/kernel.json")).unwrap();
        let specs = find_in(&[root.join("a"), root.join("missing"), root.join("b")]);
        let names: Vec<_> = specs.iter().map(|s| (s.name.as_str(), s.json.argv[0].as_str())).collect();
        assert_eq!(names, [("python3", "python"), ("ir", "R"), ("deno", "deno")]);
        let ours = &specs[2].json.metadata.cellblock;
        assert_eq!((ours.transport, &ours.languages[..]), (Some(Transport::Tcp), &["javascript".to_owned()][..]));
        assert_eq!(specs[0].json.env["A"], "b");
        std::fs::remove_dir_all(root).unwrap();
    }
}
