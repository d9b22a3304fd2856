//! Holds the layers: reads the sources and refuses a module that names one it must not know. No code is run.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use syn::visit::Visit;

/// Each top module and the others it may use. Lower layers only; what stands beside each other stays apart.
const LAYERS: [(&str, &[&str]); 21] = [
    ("domain", &[]),
    ("task", &[]),
    ("json", &[]),
    ("places", &[]),
    ("connect", &[]),
    ("metrics", &["domain"]),
    ("traces", &["domain", "task", "metrics"]),
    ("engine", &["domain", "task", "metrics"]),
    ("kernel", &["domain", "json", "task"]),
    ("store", &["domain", "json", "metrics"]),
    ("egress", &["domain", "task", "places", "metrics", "kernel", "store"]),
    ("session", &["domain", "task", "metrics", "traces", "egress", "engine", "kernel", "store"]),
    ("service", &["domain", "task", "places", "metrics", "traces", "engine", "kernel", "session", "store"]),
    ("http", &["domain", "task", "places", "connect", "json", "metrics", "traces", "session", "service"]),
    ("config", &["domain"]),
    ("cli", &["domain", "config", "connect"]),
    ("tuning", &["domain", "config", "http", "service", "session"]),
    (
        "app",
        &[
            "domain", "task", "metrics", "traces", "config", "egress", "engine", "http", "service", "session", "store",
            "tuning",
        ],
    ),
    ("run", &["domain", "cli", "config", "app", "http", "service", "session"]),
    ("doctor", &["domain", "cli", "config", "engine", "store", "app", "run"]),
    ("main", &["task", "cli", "config", "app", "run", "doctor", "http", "service"]),
];

/// Crates that only some modules may name. Paths are prefixes of a file's module path.
const CRATES: [(&str, &[&str]); 18] = [
    ("bollard", &["engine/docker", "engine/lockdown"]),
    ("tar", &["engine/docker", "engine/pack"]),
    ("docker_credential", &["engine/docker"]),
    ("prometheus", &["metrics"]),
    ("axum", &["http"]),
    ("utoipa", &["http"]),
    ("opentelemetry", &["traces"]),
    ("pep440_rs", &["domain/packages"]),
    ("opentelemetry_sdk", &["traces"]),
    ("opentelemetry_proto", &["traces"]),
    ("prost", &["traces"]),
    ("reqwest", &["cli", "traces"]),
    ("clap", &["cli", "main"]),
    ("toml", &["config"]),
    ("tokio_rustls", &["http/tls", "egress/trust"]),
    ("rmcp", &["http/mcp"]),
    ("tungstenite", &["http/jupyter"]),
    ("hyper", &["kernel", "egress", "service", "run", "task", "engine/docker", "http/listen", "http/forward"]),
];

/// What the domain does without: it is to be tested by calling it.
const NOT_IN_DOMAIN: [&str; 8] =
    ["tokio", "serde", "serde_json", "futures_util", "tracing", "jiff", "std::time::Instant", "std::time::SystemTime"];

#[derive(Default)]
struct Names {
    paths: BTreeSet<String>,
}

impl Names {
    fn tree(&mut self, before: &str, tree: &syn::UseTree) {
        let join = |name: &syn::Ident| if before.is_empty() { name.to_string() } else { format!("{before}::{name}") };
        match tree {
            syn::UseTree::Path(path) => self.tree(&join(&path.ident), &path.tree),
            syn::UseTree::Name(name) => drop(self.paths.insert(join(&name.ident))),
            syn::UseTree::Rename(rename) => drop(self.paths.insert(join(&rename.ident))),
            syn::UseTree::Glob(_) => drop(self.paths.insert(before.to_owned())),
            syn::UseTree::Group(group) => group.items.iter().for_each(|item| self.tree(before, item)),
        }
    }
}

impl<'ast> Visit<'ast> for Names {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.tree("", &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<_> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        self.paths.insert(segments.join("::"));
        syn::visit::visit_path(self, path);
    }

    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        let is_test = module.attrs.iter().any(|a| a.path().is_ident("cfg"));
        if !is_test {
            syn::visit::visit_item_mod(self, module);
        }
    }
}

struct Source {
    /// As `session/actor`.
    module: String,
    names: BTreeSet<String>,
}

impl Source {
    fn top(&self) -> &str {
        self.module.split('/').next().unwrap_or_default()
    }

    /// Top modules of ours that it names.
    fn uses(&self) -> BTreeSet<&str> {
        let inside = self.names.iter().filter_map(|path| {
            path.strip_prefix("crate::").or_else(|| path.strip_prefix("cellblock::").filter(|_| self.top() == "main"))
        });
        inside.filter_map(|path| path.split("::").next()).filter(|name| *name != self.top()).collect()
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let relative = path.strip_prefix(&root).unwrap().with_extension("");
                let module = relative.to_str().unwrap().trim_end_matches("/mod").to_owned();
                let mut names = Names::default();
                names.visit_file(&syn::parse_file(&std::fs::read_to_string(&path).unwrap()).unwrap());
                found.push(Source { module, names: names.paths });
            }
        }
    }
    assert!(found.len() > 30, "the sources were not found");
    found
}

fn is_test_file(module: &str) -> bool {
    module.ends_with("/tests")
}

#[test]
fn modules_use_lower_layers_only() {
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|s| s.module != "lib") {
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == source.top()) else {
            wrong.push(format!("{} is in no layer: give it one here", source.module));
            continue;
        };
        wrong.extend(
            source
                .uses()
                .into_iter()
                .filter(|used| !allowed.contains(used))
                .map(|used| format!("{} uses {used}", source.module)),
        );
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn each_foreign_crate_stays_in_its_place() {
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|s| !is_test_file(&s.module)) {
        for (name, places) in CRATES {
            let named = source.names.iter().any(|path| path == name || path.starts_with(&format!("{name}::")));
            if named && !places.iter().any(|place| source.module.starts_with(place)) {
                wrong.push(format!("{} names {name}, which belongs in {places:?}", source.module));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_domain_is_pure() {
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|s| s.top() == "domain") {
        for name in NOT_IN_DOMAIN {
            if source.names.iter().any(|path| path == name || path.starts_with(&format!("{name}::"))) {
                wrong.push(format!("{} names {name}", source.module));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_file_says_what_it_is_for() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let silent: Vec<_> = sources()
        .into_iter()
        .filter(|s| !is_test_file(&s.module))
        .filter(|s| {
            let file = root.join(format!("{}.rs", s.module));
            let file = if file.exists() { file } else { root.join(&s.module).join("mod.rs") };
            !std::fs::read_to_string(file).unwrap().starts_with("//! ")
        })
        .map(|s| s.module)
        .collect();
    assert!(silent.is_empty(), "no module comment: {silent:?}");
}

/// The visitor sees what it should: without this, the tests above could pass by being blind.
#[test]
fn the_reader_is_not_blind() {
    let sources = sources();
    let named = |module: &str| sources.iter().find(|s| s.module == module).map(|s| s.uses()).unwrap();
    assert!(named("session/actor").contains("engine") && named("session/actor").contains("kernel"));
    assert!(named("http/v1/executions").contains("service"));
    assert!(named("main").contains("app"));
}
