//! Which keys there are, derived from the defaults: a key exists if `default.toml` has it. Suggests the nearest one for a
//! misspelt key. Knows nothing of allowed values.

use std::collections::BTreeMap;

use toml::Value;

use super::source::{Key, dotted, key_of};

/// What a key names.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Known<'a> {
    /// A value; the default is an example of its type.
    Value(&'a Value),
    /// A section.
    Section,
    /// Nothing; perhaps this one was meant.
    Unknown(Option<String>),
}

/// The keys of the defaults.
#[derive(Debug)]
pub(super) struct Schema {
    values: BTreeMap<Key, Value>,
    text: Value,
}

impl Schema {
    /// `defaults` are the leaves of `default.toml`.
    pub(super) fn new<'a>(defaults: impl Iterator<Item = (&'a Key, &'a Value)>) -> Self {
        let outside_templates = defaults.filter(|(key, _)| key[0] != "templates");
        Self {
            values: outside_templates.map(|(key, value)| (key.clone(), value.clone())).collect(),
            text: Value::String(String::new()),
        }
    }

    pub(super) fn find(&self, key: &[String]) -> Known<'_> {
        let canonical = canonical(key);
        if is_env_entry(&canonical) || is_class_of_tenant(key) {
            return Known::Value(&self.text);
        }
        if let Some(value) = self.values.get(&canonical) {
            return Known::Value(value);
        }
        let env = key_of("template_defaults.env");
        let sections = self.values.keys().any(|known| known.starts_with(&canonical));
        match sections || canonical == env || canonical == ["templates"] || canonical == ["tenants"] {
            true => Known::Section,
            false => Known::Unknown(self.suggest(key)),
        }
    }

    /// The known key nearest to an unknown one: the same word in another section, or few letters away.
    fn suggest(&self, key: &[String]) -> Option<String> {
        let named =
            (["templates", "classes", "tenants"].contains(&key[0].as_str()) && key.len() > 2).then(|| &key[..2]);
        let canonical = canonical(key);
        let (wrong, last) = (dotted(&canonical), canonical.last()?);
        let near = |known: &Key| {
            let distance = edits(&wrong, &dotted(known));
            let same_word = known.last() == Some(last) && known.len() > 1;
            let letters = 1 + dotted(known).len() / 6;
            (distance <= letters || same_word).then_some((distance > 1 && !same_word, distance))
        };
        let whole = self.values.keys().chain(&self.sections()).filter_map(|k| Some((near(k)?, k.clone()))).min()?.1;
        match named {
            Some(section) if whole[0] == "template_defaults" => Some(dotted(&[section, &whole[1..]].concat())),
            Some(section) if whole[0] == "classes" => Some(dotted(&[section, &whole[2..]].concat())),
            _ => Some(dotted(&whole)),
        }
    }

    fn sections(&self) -> Vec<Key> {
        let prefixes = self.values.keys().flat_map(|key| (1..key.len()).map(|n| key[..n].to_vec()));
        prefixes.chain([key_of("templates"), key_of("template_defaults.env")]).collect()
    }
}

/// `templates.NAME.…` has the keys of `template_defaults.…`, and `classes.NAME.…` and `tenants.NAME.…` those of `classes.default.…`.
fn canonical(key: &[String]) -> Key {
    match key {
        [section, _, rest @ ..] if section == "classes" || section == "tenants" => {
            ["classes", "default"].map(str::to_owned).into_iter().chain(rest.iter().cloned()).collect()
        }
        [templates, _, rest @ ..] if templates == "templates" => {
            std::iter::once("template_defaults".to_owned()).chain(rest.iter().cloned()).collect()
        }
        _ => key.to_vec(),
    }
}

fn is_class_of_tenant(key: &[String]) -> bool {
    matches!(key, [section, _, class] if section == "tenants" && class == "class")
}

fn is_env_entry(canonical: &[String]) -> bool {
    matches!(canonical, [first, second, _] if first == "template_defaults" && second == "env")
}

/// Levenshtein's distance: insertions, removals and replacements of characters.
fn edits(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, l) in left.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, r) in right.iter().enumerate() {
            let replaced = diagonal + usize::from(l != *r);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_edits() {
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(edits("", "abc"), 3);
        assert_eq!(edits("same", "same"), 0);
    }
}
