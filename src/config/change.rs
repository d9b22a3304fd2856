//! What is different between two configurations, and what of it a server that runs can take over.

use std::collections::{BTreeMap, BTreeSet};

use super::Loaded;
use super::source::Source;

/// Keys, or what they begin with, whose values are looked at each time they are needed, or can be exchanged.
const LIVE: [&str; 16] = [
    "limits.sessions",
    "limits.memory",
    "limits.cpu",
    "limits.create_wait",
    "limits.queued_",
    "limits.contexts",
    "limits.workspaces",
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
/// What of a template's workspaces the engine is asked about at the start.
const WORKSPACE: [&str; 3] = [".workspace.kind", ".workspace.quota", ".workspace.accept_unenforced"];
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
        !self.is_of_confinement() && (key.starts_with(OTHERS) || LIVE.iter().any(|live| key.starts_with(live)))
    }

    /// Whether a template is to be confined otherwise than the engine was asked about at the start.
    #[must_use]
    pub fn is_of_confinement(&self) -> bool {
        let is_meant = self.key.ends_with(".runtime") || self.key.ends_with(".accept_unenforced");
        let is_meant = is_meant || WORKSPACE.iter().any(|field| self.key.ends_with(field));
        // A template that comes or goes asks for nothing of its own, unless it names something.
        let after = self
            .after
            .as_deref()
            .filter(|after| self.before.is_some() || !["\"\"", "[]", "\"tmpfs\"", "\"0MiB\"", "false"].contains(after));
        self.key.starts_with("templates.") && is_meant && after.is_some()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_runtime_needs_a_restart_and_a_plain_template_does_not() {
        let is_live = |key: &str, before: Option<&str>, after: Option<&str>| {
            let (before, after) = (before.map(str::to_owned), after.map(str::to_owned));
            Change { key: key.to_owned(), before, after, source: None }.is_live()
        };
        assert!(is_live("templates.new.runtime", None, Some("\"\"")));
        assert!(is_live("templates.new.accept_unenforced", None, Some("[]")));
        assert!(is_live("templates.old.runtime", Some("\"runsc\""), None));
        assert!(is_live("templates.old.image", Some("\"a\""), Some("\"b\"")));
        assert!(!is_live("templates.new.runtime", None, Some("\"runsc\"")));
        assert!(!is_live("templates.old.runtime", Some("\"runsc\""), Some("\"\"")));
        assert!(!is_live("templates.old.accept_unenforced", Some("[]"), Some("[\"pids\"]")));
        assert!(is_live("templates.new.workspace.kind", None, Some("\"tmpfs\"")));
        assert!(!is_live("templates.new.workspace.kind", None, Some("\"volume\"")));
        assert!(!is_live("templates.old.workspace.quota", Some("\"1GiB\""), Some("\"\"")));
        assert!(is_live("templates.old.workspace.max_age", Some("\"1d\""), Some("\"2d\"")));
    }
}
