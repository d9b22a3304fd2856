//! Lays entries over each other. Each is checked on its own as it arrives, so that one mistake doesn't hide another:
//! unknown keys, sections taken for values, types. Rules between keys are checked later.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use toml::{Table, Value};

use super::layers::{Entry, Given, parse_template, parse_toml};
use super::schema::{Known, Schema};
use super::sections::Document;
use super::source::{Key, Mistake, Source, dotted, key_of};

/// The compiled-in layer.
pub(super) const DEFAULTS: &str = include_str!("../../config/default.toml");

/// The class of tenants that are not named.
pub(super) const DEFAULT_CLASS: &str = "default";

/// The templates that are compiled in.
const TEMPLATES: [(&str, &str); 7] = [
    ("bash", include_str!("../../config/templates/bash.toml")),
    ("data", include_str!("../../config/templates/data.toml")),
    ("deno", include_str!("../../config/templates/deno.toml")),
    ("e2b", include_str!("../../config/templates/e2b.toml")),
    ("polyglot", include_str!("../../config/templates/polyglot.toml")),
    ("python", include_str!("../../config/templates/python.toml")),
    ("r", include_str!("../../config/templates/r.toml")),
];

/// A value with its source.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Leaf {
    pub value: Value,
    pub source: Source,
}

/// Leaves by key.
pub(super) type Leaves = BTreeMap<Key, Leaf>;

/// The layers so far.
#[derive(Debug)]
pub(super) struct Merge {
    pub schema: Schema,
    pub leaves: Leaves,
    /// Names of templates, those without any key included.
    pub templates: BTreeSet<String>,
    /// Keys with a mistake; what depends on them isn't judged.
    pub failed: BTreeSet<Key>,
    pub mistakes: Vec<Mistake>,
    defaults: Leaves,
}

impl Merge {
    /// The compiled-in defaults alone. A test holds that they have no mistakes.
    pub(super) fn new() -> Self {
        let (mut entries, mut mistakes) = parse_toml(DEFAULTS, |_| Source::Default);
        for (name, text) in TEMPLATES {
            let (own, wrong) = parse_template(name, text, |_| Source::Default);
            entries.extend(own);
            mistakes.extend(wrong);
        }
        let leaf = |entry: Entry| match entry.given {
            Given::Typed(value) => Some((entry.key, Leaf { value, source: entry.source })),
            Given::Text(_) | Given::Section => None,
        };
        let leaves: Leaves = entries.into_iter().filter_map(leaf).collect();
        let templates = leaves.keys().filter(|key| key[0] == "templates").map(|key| key[1].clone()).collect();
        let schema = Schema::new(leaves.iter().map(|(key, leaf)| (key, &leaf.value)));
        Self { schema, defaults: leaves.clone(), leaves, templates, failed: BTreeSet::new(), mistakes }
    }

    /// Lays a layer over those before.
    pub(super) fn lay(&mut self, (entries, mistakes): (Vec<Entry>, Vec<Mistake>)) {
        self.mistakes.extend(mistakes);
        let mut unknown: Vec<Key> = Vec::new();
        for entry in entries {
            if unknown.iter().any(|key| entry.key.starts_with(key)) {
                continue;
            }
            match (self.schema.find(&entry.key), &entry.given) {
                (Known::Value(_), Given::Section) => self.wrong(&entry, "is a value, not a section".to_owned()),
                (Known::Section, Given::Typed(_) | Given::Text(_)) => {
                    self.wrong(&entry, "is a section, not a value".to_owned());
                }
                (Known::Section, Given::Section) => self.note_template(&entry),
                (Known::Unknown(nearest), _) => {
                    let hint = nearest.map(|key| format!("; did you mean {key}?")).unwrap_or_default();
                    self.wrong(&entry, format!("there is no such key{hint}"));
                    unknown.push(entry.key);
                }
                (Known::Value(example), _) => {
                    let value = typed(&entry.given, example);
                    self.put(entry, value);
                }
            }
        }
    }

    fn put(&mut self, entry: Entry, value: Value) {
        let leaf = Leaf { value, source: entry.source.clone() };
        match self.check_type(&entry.key, &leaf) {
            Ok(()) => {
                self.note_template(&entry);
                self.leaves.insert(entry.key, leaf);
            }
            Err(message) => self.wrong(&entry, message),
        }
    }

    fn wrong(&mut self, entry: &Entry, message: String) {
        self.note_template(entry);
        self.failed.insert(entry.key.clone());
        self.mistakes.push(Mistake { key: dotted(&entry.key), source: entry.source.clone(), message });
    }

    fn note_template(&mut self, entry: &Entry) {
        if let [templates, name, ..] = entry.key.as_slice()
            && templates == "templates"
        {
            self.templates.insert(name.clone());
        }
    }

    /// Reads the defaults with this one leaf laid over them.
    fn check_type(&self, key: &Key, leaf: &Leaf) -> Result<(), String> {
        let mut leaves = self.defaults.clone();
        let mut templates: BTreeSet<String> = BTreeSet::new();
        if key[0] == "templates" {
            templates.insert(key[1].clone());
        }
        leaves.retain(|known, _| known[0] != "templates");
        leaves.insert(key.clone(), leaf.clone());
        inherit(&mut leaves, &templates);
        read(&leaves).map(|_| ())
    }
}

/// Gives each template the leaves of `template_defaults` that it has not, each class those of the default class, and each tenant those of its class.
pub(super) fn inherit(leaves: &mut Leaves, templates: &BTreeSet<String>) {
    for name in templates {
        lend(leaves, &key_of("template_defaults"), &["templates".to_owned(), name.clone()]);
    }
    let default = ["classes".to_owned(), DEFAULT_CLASS.to_owned()];
    for name in names_in(leaves, "classes") {
        lend(leaves, &default, &["classes".to_owned(), name]);
    }
    for name in names_in(leaves, "tenants") {
        let section = ["tenants".to_owned(), name];
        let class = [section.to_vec(), key_of("class")].concat();
        let by_default = || Leaf { value: Value::String(DEFAULT_CLASS.to_owned()), source: Source::Default };
        let class = leaves.entry(class).or_insert_with(by_default).value.as_str().unwrap_or_default().to_owned();
        let own = ["classes".to_owned(), class];
        // One that is not there is told elsewhere.
        let from = if leaves.keys().any(|key| key.starts_with(&own)) { &own } else { &default };
        lend(leaves, from, &section);
    }
}

/// The names of sections within one.
fn names_in(leaves: &Leaves, section: &str) -> BTreeSet<String> {
    leaves.keys().filter(|key| key[0] == section && key.len() > 2).map(|key| key[1].clone()).collect()
}

/// Gives a section the leaves of another that it has not.
fn lend(leaves: &mut Leaves, from: &[String], to: &[String]) {
    let lent: Vec<(Key, Leaf)> =
        leaves.iter().filter(|(key, _)| key.starts_with(from)).map(|(k, l)| (k.clone(), l.clone())).collect();
    for (key, leaf) in lent {
        let own = [to, &key[from.len()..]].concat();
        let source = match leaf.source {
            Source::Default => Source::Default,
            told @ Source::Inherited(..) => told,
            other => Source::Inherited(Box::new(other), dotted(from)),
        };
        leaves.entry(own).or_insert(Leaf { value: leaf.value, source });
    }
}

/// Reads leaves as a document.
pub(super) fn read(leaves: &Leaves) -> Result<Document, String> {
    let mut root = Table::new();
    let open = leaves.keys().filter(|key| key[0] == "templates").map(|key| vec![key[0].clone(), key[1].clone()]);
    let open: BTreeSet<Key> = open.chain([key_of("template_defaults")]).collect();
    for mut section in open {
        section.push("env".to_owned());
        section_at(&mut root, &section);
    }
    section_at(&mut root, &key_of("templates"));
    section_at(&mut root, &key_of("tenants"));
    for (key, leaf) in leaves {
        if let Some((last, section)) = key.split_last() {
            section_at(&mut root, section).insert(last.clone(), leaf.value.clone());
        }
    }
    Document::deserialize(Value::Table(root)).map_err(|error| readable(error.message()))
}

/// The table at a key, made where it is missing. Leaves never stand where a section is: [`Schema`] has refused them.
fn section_at<'a>(root: &'a mut Table, key: &[String]) -> &'a mut Table {
    key.iter().fold(root, |table, segment| {
        let slot = table.entry(segment.clone()).or_insert_with(|| Value::Table(Table::new()));
        if !slot.is_table() {
            *slot = Value::Table(Table::new());
        }
        slot.as_table_mut().unwrap_or_else(|| unreachable!("made a table above"))
    })
}

/// A text takes the type that its key's default has; what doesn't fit stays a text, for the type check to refuse.
fn typed(given: &Given, example: &Value) -> Value {
    let text = match given {
        Given::Typed(value) => return value.clone(),
        Given::Text(text) => text,
        Given::Section => return Value::Table(Table::new()),
    };
    let parsed = match example {
        Value::Integer(_) => text.trim().parse().ok().map(Value::Integer),
        Value::Float(_) => text.trim().parse().ok().map(Value::Float),
        Value::Boolean(_) => text.trim().parse().ok().map(Value::Boolean),
        _ => None,
    };
    parsed.unwrap_or_else(|| Value::String(text.clone()))
}

/// serde's words for types in words for people.
fn readable(message: &str) -> String {
    let words = [
        ("expected u32", "expected a whole number from 0 to 4294967295"),
        ("expected u64", "expected a whole number, 0 or more"),
        ("expected f64", "expected a number"),
        ("expected a boolean", "expected true or false"),
        ("expected a string", "expected a text in quotes"),
        ("expected path string", "expected a path in quotes"),
        ("unknown variant", "is not known:"),
    ];
    let message = message.trim().replace('\n', ", ");
    words.iter().fold(message, |message, (from, to)| message.replace(from, to))
}
