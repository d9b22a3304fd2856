//! What is different between two configurations, and what of it a server that runs can take over.

use std::collections::{BTreeMap, BTreeSet};

use super::Loaded;
use super::source::Source;

/// Keys, or what they begin with, whose values are looked at each time they are needed, or can be exchanged.
const LIVE: [&str; 15] = [
    "limits.sessions",
    "limits.memory",
    "limits.cpu",
    "limits.create_wait",
    "limits.queued_",
    "limits.contexts",
    "executions.interrupt_grace",
    "executions.queue_timeout",
    "executions.retention_",
    "executions.inline",
    "default_template",
    "templates",
    "classes.",
    "tenants.",
    "log.level",
];
/// What another process reads.
const OTHERS: &str = "guard.";

/// A value that is another now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The key: `limits.sessions`.
    pub key: String,
    /// As TOML; nothing where there was no such key.
    pub before: Option<String>,
    /// As TOML; nothing where there is no such key any more.
    pub after: Option<String>,
    /// Where the new value came from.
    pub source: Option<Source>,
}

impl Change {
    /// Whether a server that runs can take it over.
    #[must_use]
    pub fn is_live(&self) -> bool {
        let key = self.key.as_str();
        key.starts_with(OTHERS) || LIVE.iter().any(|live| key.starts_with(live))
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".to_owned());
        write!(f, "{}: {} -> {}", self.key, shown(&self.before), shown(&self.after))
    }
}

impl Loaded {
    /// What is different in a later one, in the order of the keys. Secrets are not compared.
    #[must_use]
    pub fn changes(&self, later: &Self) -> Vec<Change> {
        let by_key = |loaded: &'_ Self| -> BTreeMap<String, (String, Source)> {
            loaded.values.iter().map(|v| (v.key.clone(), (v.value.clone(), v.source.clone()))).collect()
        };
        let (old, new) = (by_key(self), by_key(later));
        let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        let change = |key: &String| {
            let (before, after) = (old.get(key), new.get(key));
            let value = |found: &(String, Source)| found.0.clone();
            Change {
                key: key.clone(),
                before: before.map(value),
                after: after.map(value),
                source: after.map(|found| found.1.clone()),
            }
        };
        keys.into_iter().map(change).filter(|change| change.before != change.after).collect()
    }
}
