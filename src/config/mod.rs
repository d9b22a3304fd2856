//! The configuration: layers of defaults, files, environment and flags, merged and checked as one, every mistake
//! reported at once. The only reader of the environment. Builds nothing from what it reads.
//!
//! ```text
//! default.toml < DOCKER_HOST and its like < files < CELLBLOCK__SECTION__KEY < --set and other flags
//! ```
//!
//! Each layer is read into leaves that remember their source (`layers`); each leaf is checked by itself against the
//! sections as serde knows them (`merge`); then rules between keys are checked (`check`).

mod change;
mod check;
mod environment;
mod layers;
mod merge;
mod schema;
mod sections;
mod source;
#[cfg(test)]
mod tests;
mod units;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use change::Change;
pub use check::{MOST_SESSIONS, check_log_level, proxy_of};
pub use environment::Environment;
pub use sections::{
    Audit, Auth, Classic, Doors, Drain, DrainContainers, E2b, Egress, EngineSection, Executions, ForwardedHeader,
    GuardSection, Guest, Jupyter, KeySection, Limits, Log, LogFormat, McpTools, MetricsSection, Packages, PullPolicy,
    Server, Traces,
};
pub use source::{Mistake, Mistakes, Source};
pub use units::{parse_duration, parse_size};

use crate::domain::quota::QuotaTable;
use crate::domain::spec::Template;
use layers::{Entry, Given};
use merge::{DEFAULT_CLASS, Leaves, Merge, inherit, read};
use source::{dotted, key_of};

/// A configuration without mistakes.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Keys besides the first one.
    pub keys: Vec<KeySection>,
    /// The front door.
    pub server: Server,
    /// Keys that are not valid.
    pub auth: Auth,
    /// What happens when it stops.
    pub drain: Drain,
    /// The Docker engine.
    pub engine: EngineSection,
    /// What holds the engine for a server that does not.
    pub guard: GuardSection,
    /// PID 1 of sessions.
    pub guest: Guest,
    /// How much of everything.
    pub limits: Limits,
    /// How much of it each tenant may have.
    pub quotas: QuotaTable,
    /// Executions.
    pub executions: Executions,
    /// Connections of code to the outside.
    pub egress: Egress,
    /// Where packages come from.
    pub packages: Packages,
    /// How much there is of Jupyter Server's API.
    pub jupyter: Jupyter,
    /// Which doors are open beside the native API's.
    pub doors: Doors,
    /// What clients of E2B find.
    pub e2b: E2b,
    /// Who has asked for what.
    pub audit: Audit,
    /// What is counted.
    pub metrics: MetricsSection,
    /// Requests and executions as traces.
    pub traces: Traces,
    /// What the server says about itself.
    pub log: Log,
    /// The enabled templates by name.
    pub templates: BTreeMap<String, Template>,
    /// The one of a caller that names none; always among `templates`.
    pub default_template: String,
}

/// A value given by a flag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    /// The flag as mistakes name it: `--listen`, `--set`.
    pub flag: String,
    /// The key: `server.listen`.
    pub key: String,
    /// The value as text.
    pub value: String,
}

/// Where to read from.
#[derive(Debug, Clone, Default)]
pub struct Inputs {
    /// Files named by flags; if empty, `CELLBLOCK_CONFIG` and then [`Inputs::search`] say where to look.
    pub files: Vec<PathBuf>,
    /// Files that are read where they exist, later ones over earlier ones.
    pub search: Vec<PathBuf>,
    /// The environment.
    pub environment: Environment,
    /// Flags.
    pub overrides: Vec<Override>,
}

impl Inputs {
    /// The usual places: `/etc/cellblock/config.toml`, then `cellblock.toml` in the working directory.
    #[must_use]
    pub fn usual(environment: Environment) -> Self {
        let search = ["/etc/cellblock/config.toml", "cellblock.toml"].map(PathBuf::from).to_vec();
        Self { search, environment, ..Self::default() }
    }

    /// Adds the value of a flag.
    #[must_use]
    pub fn with(mut self, flag: &str, key: &str, value: impl Into<String>) -> Self {
        self.overrides.push(Override { flag: flag.to_owned(), key: key.to_owned(), value: value.into() });
        self
    }

    fn files(&self) -> Vec<PathBuf> {
        if !self.files.is_empty() {
            return self.files.clone();
        }
        match self.environment.get("CELLBLOCK_CONFIG") {
            Some(path) => vec![PathBuf::from(path)],
            None => self.search.iter().filter(|path| Path::exists(path)).cloned().collect(),
        }
    }
}

/// A value in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    /// The key: `server.listen`.
    pub key: String,
    /// The value as TOML; values from secret files aren't shown.
    pub value: String,
    /// Where it came from.
    pub source: Source,
}

/// A configuration and where each of its values came from.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What to run with.
    pub config: Config,
    /// Every value, by key.
    pub values: Vec<Effective>,
}

/// Reads every layer and checks the result.
///
/// # Errors
/// Every mistake in every layer, with its key, its source and what is allowed.
pub fn load(inputs: &Inputs) -> Result<Loaded, Mistakes> {
    let mut merge = Merge::new();
    merge.lay((layers::conventional(&inputs.environment), Vec::new()));
    for file in inputs.files() {
        merge.lay(layers::read_file(&file));
    }
    let variables = layers::read_environment(&inputs.environment, &merge.schema);
    let flags: Vec<Entry> = inputs.overrides.iter().map(entry_of).collect();
    if let Some(folder) = templates_folder(&merge, variables.0.iter().chain(&flags)) {
        merge.lay(layers::read_templates(&folder));
    }
    merge.lay(variables);
    merge.lay((flags, Vec::new()));
    finish(merge)
}

/// Where templates stand in files of their own, by what was laid and what is to be laid later.
fn templates_folder<'a>(merge: &Merge, later: impl Iterator<Item = &'a Entry>) -> Option<PathBuf> {
    let key = key_of("templates_dir");
    let said = later.filter(|entry| entry.key == key).last().and_then(|entry| match &entry.given {
        Given::Text(path) => Some((path.clone(), &entry.source)),
        Given::Typed(_) | Given::Section => None,
    });
    let (path, source) = match said {
        Some(said) => said,
        None => {
            let leaf = merge.leaves.get(&key)?;
            (leaf.value.as_str()?.to_owned(), &leaf.source)
        }
    };
    let beside = match source {
        Source::File(file, _) => file.parent(),
        _ => None,
    };
    (!path.is_empty()).then(|| beside.map_or_else(|| PathBuf::from(&path), |folder| folder.join(&path)))
}

fn entry_of(given: &Override) -> Entry {
    let source = Source::Flag(given.flag.clone());
    Entry { key: key_of(&given.key), given: Given::Text(given.value.clone()), source }
}

fn finish(mut merge: Merge) -> Result<Loaded, Mistakes> {
    layers::drop_foreign_certificates(&mut merge.leaves);
    inherit(&mut merge.leaves, &merge.templates);
    match read(&merge.leaves) {
        Ok(document) => {
            let found = check::check(&document, &merge);
            merge.mistakes.extend(found);
            if merge.mistakes.is_empty() {
                let values = effective(&merge.leaves);
                return Ok(Loaded { config: document.into(), values });
            }
        }
        // Each leaf has been read by itself, so this speaks of leaves that can't stand together.
        Err(message) => {
            merge.mistakes.push(Mistake { key: String::new(), source: Source::Default, message });
        }
    }
    Err(Mistakes(merge.mistakes))
}

impl From<sections::Document> for Config {
    fn from(document: sections::Document) -> Self {
        let enabled = document.templates.into_iter().filter(|(_, template)| template.enabled);
        Self {
            keys: document.keys,
            server: document.server,
            auth: document.auth,
            drain: document.drain,
            engine: document.engine,
            guard: document.guard,
            guest: document.guest,
            limits: document.limits,
            quotas: QuotaTable {
                default: document.classes.get(DEFAULT_CLASS).map(sections::Class::quota).unwrap_or_default(),
                tenants: document.tenants.into_iter().map(|(name, tenant)| (name, tenant.quota.quota())).collect(),
            },
            executions: document.executions,
            egress: document.egress,
            packages: document.packages,
            jupyter: document.jupyter,
            doors: document.doors,
            e2b: document.e2b,
            audit: document.audit,
            metrics: document.metrics,
            traces: document.traces,
            log: document.log,
            templates: enabled.map(|(name, template)| (name.clone(), template.into_template(name))).collect(),
            default_template: document.default_template,
        }
    }
}

fn effective(leaves: &Leaves) -> Vec<Effective> {
    let shown = |leaf: &merge::Leaf| match leaf.source {
        Source::Secret(_) => "(not shown)".to_owned(),
        _ => leaf.value.to_string(),
    };
    let line = |(key, leaf): (&source::Key, &merge::Leaf)| Effective {
        key: dotted(key),
        value: shown(leaf),
        source: leaf.source.clone(),
    };
    leaves.iter().filter(|(key, _)| key[0] != "template_defaults").map(line).collect()
}

impl Loaded {
    /// `key = value  # source`, a line each, in columns.
    #[must_use]
    pub fn describe(&self) -> String {
        let pairs: Vec<String> = self.values.iter().map(|v| format!("{} = {}", v.key, v.value)).collect();
        let width = pairs.iter().map(|p| p.chars().count()).max().unwrap_or(0).min(72);
        let lines = pairs.iter().zip(&self.values).map(|(pair, v)| format!("{pair:width$}  # {}\n", v.source));
        lines.collect()
    }
}
