//! The seccomp profile of every cell: `config/seccomp/default.json`, compiled in. What each rule is for stands there.

use std::sync::LazyLock;

use serde_json::{Value, json};

const SOURCE: &str = include_str!("../../../config/seccomp/default.json");

/// Parsed once; a profile that is no JSON would be sent as it is, and the engine would refuse every start.
static PROFILES: LazyLock<[String; 2]> =
    LazyLock::new(|| [minified(SOURCE, |_| true), minified(SOURCE, |name| !name.starts_with("inotify_"))]);

/// The profile as the engine takes it, without comments and white space.
///
/// Where users are remapped, inotify is blocked: the kernel charges its instances to the one user of the machine that owns
/// all cells, and one cell could take them all.
#[must_use]
pub fn profile(remapped_users: bool) -> &'static str {
    &PROFILES[usize::from(remapped_users)]
}

fn minified(source: &str, keeps: impl Fn(&str) -> bool) -> String {
    let Ok(mut profile) = serde_json::from_str::<Value>(source) else { return source.to_owned() };
    if let Some(top) = profile.as_object_mut() {
        top.remove("comment");
    }
    if let Some(rules) = profile.get_mut("syscalls").and_then(Value::as_array_mut) {
        *rules = std::mem::take(rules).into_iter().flat_map(expanded).collect();
    }
    for rule in profile.get_mut("syscalls").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(rule) = rule.as_object_mut() {
            rule.remove("comment");
        }
        if let Some(names) = rule.get_mut("names").and_then(Value::as_array_mut) {
            names.retain(|name| name.as_str().is_some_and(&keeps));
        }
    }
    profile.to_string()
}

/// A rule for any process but the first as rules that engines know: one for each bit by which an id differs from 1. The kernel takes
/// the lower half of the argument, so the upper one may be anything.
fn expanded(mut rule: Value) -> Vec<Value> {
    let Some(index) = rule.as_object_mut().and_then(|rule| rule.remove("exceptFirstProcess")) else {
        return vec![rule];
    };
    let differs = |bit: u32| {
        let (mask, value) = (1_u64 << bit, if bit == 0 { 0 } else { 1_u64 << bit });
        let mut rule = rule.clone();
        rule["args"] = json!([{"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}]);
        rule
    };
    (0..32).map(differs).collect()
}

#[cfg(test)]
mod tests;
