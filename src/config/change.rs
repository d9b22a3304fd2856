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
/// What of a template the engine is asked about at the start.
const ASKED_ABOUT: [&str; 4] = [".runtime", ".accept_unenforced", ".workspace.kind", ".workspace.quota"];
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
        // A template that comes or goes asks for nothing of its own, unless it names something.
        let after = self
            .after
            .as_deref()
            .filter(|after| self.before.is_some() || !["\"\"", "[]", "\"tmpfs\"", "\"0MiB\"", "false"].contains(after));
        self.key.starts_with("templates.") && is_asked_about(&self.key) && after.is_some()
    }
}

fn is_asked_about(key: &str) -> bool {
    ASKED_ABOUT.iter().any(|field| key.ends_with(field))
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".to_owned());
        write!(f, "{}: {} -> {}", self.key, shown(&self.before), shown(&self.after))
    }
}

impl Loaded {
    /// What the keys of templates begin with that are not offered.
    fn switched_off(&self) -> Vec<&str> {
        let off = self.values.iter().filter(|v| v.key.starts_with("templates.") && v.value == "false");
        off.filter_map(|v| v.key.strip_suffix("enabled").filter(|before| before.ends_with('.'))).collect()
    }

    /// What is different in a later one, in the order of the keys. Secrets are not compared. What the engine is asked about for a template does not count while that
    /// is not offered: nobody has asked.
    #[must_use]
    pub fn changes(&self, later: &Self) -> Vec<Change> {
        let by_key = |loaded: &'_ Self| -> BTreeMap<String, (String, Source)> {
            let off = loaded.switched_off();
            let shown =
                loaded.values.iter().filter(|v| !off.iter().any(|of| v.key.starts_with(of) && is_asked_about(&v.key)));
            shown.map(|v| (v.key.clone(), (v.value.clone(), v.source.clone()))).collect()
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
    use crate::config::{Inputs, load};

    fn loaded(settings: &str) -> Loaded {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("test.toml");
        let data = folder.path().join("data");
        std::fs::write(&file, format!("{settings}[server]\ndata_dir = {data:?}\n")).unwrap();
        load(&Inputs { files: vec![file], ..Inputs::default() }).unwrap_or_else(|wrong| panic!("{wrong}"))
    }

    #[test]
    fn a_template_that_is_switched_on_is_confined_as_the_engine_was_not_asked_about() {
        let refused = |more: &str| {
            let with =
                |enabled: bool| loaded(&format!("[templates.late]\nimage = \"late\"\nenabled = {enabled}\n{more}"));
            let changes = with(false).changes(&with(true));
            assert!(changes.iter().any(|change| change.key == "templates.late.enabled"), "{changes:?}");
            let refused = changes.into_iter().filter(|change| !change.is_live() && !change.key.starts_with("server."));
            refused.map(|change| change.key).collect::<Vec<_>>()
        };
        assert_eq!(refused(""), Vec::<String>::new(), "it asks for nothing of its own");
        assert_eq!(refused("runtime = \"runsc\"\n"), ["templates.late.runtime"]);
        let volume = "[templates.late.workspace]\nkind = \"volume\"\nquota = \"1GiB\"\n";
        assert_eq!(refused(volume), ["templates.late.workspace.kind", "templates.late.workspace.quota"]);
    }

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
