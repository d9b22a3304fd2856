//! Reads one layer after the other into leaves: a key, its value, its source. Types and rules are checked elsewhere.

use std::path::{Path, PathBuf};

use toml::Value;
use toml::de::{DeTable, DeValue};

use super::environment::Environment;
use super::merge::{Leaf, Leaves};
use super::schema::{Known, Schema};
use super::source::{Key, Mistake, Source, key_of};

/// Prefix of variables that set a key.
const PREFIX: &str = "CELLBLOCK__";

/// What a layer says about one key.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub key: Key,
    pub given: Given,
    pub source: Source,
}

/// The form in which a value was given.
#[derive(Debug, Clone)]
pub(super) enum Given {
    /// With a type, in a file.
    Typed(Value),
    /// As a text, in a variable or flag: the key decides on its type.
    Text(String),
    /// A section's head.
    Section,
}

/// The entries of a TOML text, and its syntax errors.
pub(super) fn parse_toml(text: &str, source_at: impl Fn(usize) -> Source) -> (Vec<Entry>, Vec<Mistake>) {
    let line_of = |at: usize| text.as_bytes()[..at.min(text.len())].iter().filter(|b| **b == b'\n').count() + 1;
    let (table, errors) = DeTable::parse_recoverable(text);
    let mistakes = errors.iter().map(|error| Mistake {
        key: String::new(),
        source: source_at(error.span().map_or(0, |span| line_of(span.start))),
        message: format!("not TOML: {}", error.message().trim().replace('\n', ", ")),
    });
    let mut entries = Vec::new();
    walk(table.get_ref(), &[], &mut |key, at, given| {
        entries.push(Entry { key, given, source: source_at(line_of(at)) });
    });
    (entries, mistakes.collect())
}

/// The entries of a template's own file.
pub(super) fn parse_template(
    name: &str,
    text: &str,
    source_at: impl Fn(usize) -> Source,
) -> (Vec<Entry>, Vec<Mistake>) {
    let section = ["templates".to_owned(), name.to_owned()];
    let (mut entries, mistakes) = parse_toml(text, &source_at);
    entries.iter_mut().for_each(|entry| entry.key.splice(..0, section.clone()).for_each(drop));
    entries.insert(0, Entry { key: section.to_vec(), given: Given::Section, source: source_at(1) });
    (entries, mistakes)
}

fn walk(table: &DeTable<'_>, prefix: &[String], found: &mut impl FnMut(Key, usize, Given)) {
    for (name, value) in table {
        let mut key = prefix.to_vec();
        key.push(name.get_ref().to_string());
        match value.get_ref() {
            DeValue::Table(inner) => {
                found(key.clone(), name.span().start, Given::Section);
                walk(inner, &key, found);
            }
            leaf => found(key, name.span().start, Given::Typed(owned(leaf))),
        }
    }
}

fn owned(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_| Value::String(number.to_string()), Value::Integer),
        DeValue::Float(number) => {
            number.as_str().parse().map_or_else(|_| Value::String(number.to_string()), Value::Float)
        }
        DeValue::Boolean(yes) => Value::Boolean(*yes),
        DeValue::Datetime(time) => Value::Datetime(*time),
        DeValue::Array(items) => Value::Array(items.iter().map(|item| owned(item.get_ref())).collect()),
        DeValue::Table(table) => {
            Value::Table(table.iter().map(|(k, v)| (k.get_ref().to_string(), owned(v.get_ref()))).collect())
        }
    }
}

/// The entries of a file.
pub(super) fn read_file(path: &Path) -> (Vec<Entry>, Vec<Mistake>) {
    read_with(path, |text| parse_toml(text, |line| Source::File(path.to_owned(), line)))
}

/// The entries of a folder of templates, in the order of their names.
pub(super) fn read_templates(folder: &Path) -> (Vec<Entry>, Vec<Mistake>) {
    let found = std::fs::read_dir(folder).and_then(|entries| {
        let paths: std::io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
        paths
    });
    let mut paths = match found {
        Ok(paths) => paths,
        Err(error) => return (Vec::new(), vec![unreadable(folder, &error)]),
    };
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    let (mut entries, mut mistakes) = (Vec::new(), Vec::new());
    for path in paths {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let parse = |text: &str| parse_template(&name, text, |line| Source::File(path.clone(), line));
        let (own, wrong) = read_with(&path, parse);
        entries.extend(own);
        mistakes.extend(wrong);
    }
    (entries, mistakes)
}

fn read_with(path: &Path, parse: impl Fn(&str) -> (Vec<Entry>, Vec<Mistake>)) -> (Vec<Entry>, Vec<Mistake>) {
    match std::fs::read_to_string(path) {
        Ok(text) => parse(&text),
        Err(error) => (Vec::new(), vec![unreadable(path, &error)]),
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Mistake {
    let source = Source::File(path.to_owned(), 0);
    Mistake { key: String::new(), source, message: format!("can't be read: {error}") }
}

/// What other programs' variables say about Docker and the user's folders; weaker than any file of ours.
pub(super) fn conventional(environment: &Environment) -> Vec<Entry> {
    let home = environment.get("HOME");
    let in_home = |name: &str, rest: &str| home.map(|home| (name.to_owned(), format!("{home}/{rest}")));
    let named = |name: &str, rest: &str| environment.get(name).map(|value| (name.to_owned(), format!("{value}{rest}")));
    let verified = environment.get("DOCKER_TLS_VERIFY").is_some();
    let over_tcp = environment.get("DOCKER_HOST").is_some_and(|host| !host.starts_with("unix:"));
    let certificates = || named("DOCKER_CERT_PATH", "").or_else(|| in_home("HOME", ".docker"));
    let found = [
        (
            "engine.host",
            named("DOCKER_HOST", "")
                .or_else(|| rootless_socket(environment, Path::new(DEFAULT_SOCKET)))
                .or_else(default_socket),
        ),
        ("engine.tls_cert_dir", (verified && over_tcp).then(certificates).flatten()),
        ("engine.docker_config", named("DOCKER_CONFIG", "").or_else(|| in_home("HOME", ".docker"))),
        ("server.data_dir", named("XDG_DATA_HOME", "/cellblock").or_else(|| in_home("HOME", ".local/share/cellblock"))),
    ];
    let entry = |(key, found): (&str, Option<(String, String)>)| {
        let (name, value) = found?;
        let source = if name.is_empty() { Source::Default } else { Source::Variable(name) };
        Some(Entry { key: key_of(key), given: Given::Text(value), source })
    };
    found.into_iter().filter_map(entry).collect()
}

/// Certificates of Docker's variables belong to the host of Docker's variables: a host from elsewhere has none of them.
pub(super) fn drop_foreign_certificates(leaves: &mut Leaves) {
    let is_from =
        |leaf: &Leaf, names: &[&str]| matches!(&leaf.source, Source::Variable(name) if names.contains(&name.as_str()));
    if leaves.get(&key_of("engine.host")).is_some_and(|host| is_from(host, &["DOCKER_HOST"])) {
        return;
    }
    if let Some(certificates) = leaves.get_mut(&key_of("engine.tls_cert_dir"))
        && is_from(certificates, &["DOCKER_CERT_PATH", "HOME"])
    {
        *certificates = Leaf { value: Value::String(String::new()), source: Source::Default };
    }
}

const DEFAULT_SOCKET: &str = "/var/run/docker.sock";

fn default_socket() -> Option<(String, String)> {
    Some((String::new(), format!("unix://{DEFAULT_SOCKET}")))
}

/// The socket of an engine that this user runs without root, where the machine has not the usual one.
pub(super) fn rootless_socket(environment: &Environment, usual: &Path) -> Option<(String, String)> {
    let socket = format!("{}/docker.sock", environment.get("XDG_RUNTIME_DIR")?);
    let is_meant = !usual.exists() && Path::new(&socket).exists();
    is_meant.then(|| ("XDG_RUNTIME_DIR".to_owned(), format!("unix://{socket}")))
}

/// The entries of `CELLBLOCK__SECTION__KEY` and `CELLBLOCK__SECTION__KEY_FILE`.
pub(super) fn read_environment(environment: &Environment, schema: &Schema) -> (Vec<Entry>, Vec<Mistake>) {
    let (mut entries, mut mistakes): (Vec<Entry>, Vec<Mistake>) = Default::default();
    for (rest, value) in environment.with_prefix(PREFIX) {
        let (name, key) = (format!("{PREFIX}{rest}"), variable_key(rest));
        let Some(plain) = secret_key(&key, schema) else {
            entries.push(Entry { key, given: Given::Text(value.to_owned()), source: Source::Variable(name) });
            continue;
        };
        let source = Source::Secret(name.clone());
        let mut wrong = |message: String| {
            mistakes.push(Mistake { key: plain.join("."), source: source.clone(), message });
        };
        let direct = &name[..name.len() - "_FILE".len()];
        if environment.get(direct).is_some() {
            wrong(format!("{direct} is set too; keep one of them"));
        }
        match std::fs::read_to_string(value) {
            Ok(text) => entries.push(Entry { key: plain, given: Given::Text(text.trim().to_owned()), source }),
            Err(error) => wrong(format!("the file {value:?} can't be read: {error}")),
        }
    }
    (entries, mistakes)
}

/// Lower case, but names below a template's `env` stay as they are.
fn variable_key(rest: &str) -> Key {
    let segments: Vec<&str> = rest.split("__").collect();
    let lower: Key = segments.iter().map(|s| s.to_lowercase()).collect();
    let env = match lower.first().map(String::as_str) {
        Some("template_defaults") => 1,
        Some("templates") => 2,
        _ => return lower,
    };
    if lower.get(env).is_none_or(|s| s != "env") || lower.len() == env + 1 {
        return lower;
    }
    let mut key = lower[..=env].to_vec();
    key.push(segments[env + 1..].join("__"));
    key
}

/// The key whose value stands in a file, if this one isn't a key itself but is with `_file` at its end.
fn secret_key(key: &Key, schema: &Schema) -> Option<Key> {
    if !matches!(schema.find(key), Known::Unknown(_)) {
        return None;
    }
    let (last, prefix) = key.split_last()?;
    let mut plain = prefix.to_vec();
    plain.push(last.strip_suffix("_file")?.to_owned());
    matches!(schema.find(&plain), Known::Value(_)).then_some(plain)
}
