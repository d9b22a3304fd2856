//! The guest's scanner for strings of a JSON object: where `serde_json` takes the bytes, both find the same; and whatever the bytes
//! are, reads don't matter and nothing is held.
#![no_main]

use cellblock_fuzz::cap::{CaptureLimits, Captured};
use cellblock_fuzz::capture::{failure, stream_text};
use cellblock_fuzz::heap;
use cellblock_fuzz::json::{FieldScanner, FieldSink, short_fields};
use cellblock_fuzz::reads::Reads;
use libfuzzer_sys::fuzz_target;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

const NAMES: &[&str; 5] = &["name", "text", "status", "evalue", "traceback"];
const TEXT: usize = 1;
/// A scanner holds one name of an object's field, in pieces of a growing vector.
const HELD: usize = 256;
/// Longest name of a stream.
const MAX_NAME: usize = 256;

fuzz_target!(|input: &[u8]| {
    let Some((reads, bytes)) = Reads::split_off(input) else { return };
    let (found, complete) = scan(bytes, Reads::WHOLE);
    assert_eq!(scan(bytes, reads), (found.clone(), complete));
    let text: usize = found.iter().map(|(_, text)| text.len()).sum();
    assert!(text <= 3 * bytes.len(), "a byte becomes U+FFFD at most");
    heap::at_most(HELD, || {
        let mut scanner = FieldScanner::new(NAMES);
        reads.of(bytes).for_each(|read| scanner.push(read, &mut Nothing));
    });
    let text = mended(&String::from_utf8_lossy(bytes));
    if let Ok(value) = serde_json::from_str::<Value>(&text) {
        assert_eq!(complete, value.is_object());
        let fields = if complete { expected(&text) } else { Vec::new() };
        assert_eq!(found, fields);
    }
    check_short_fields(bytes, &found, complete, reads.choice(2));
    check_stream_text(bytes, &found, complete, CaptureLimits { head: reads.choice(0), tail: reads.choice(1) });
    check_failure(bytes, &found);
});

type Found = Vec<(usize, String)>;

#[derive(Default)]
struct All(Found);

impl FieldSink for All {
    fn begin(&mut self, field: usize) {
        self.0.push((field, String::new()));
    }

    fn text(&mut self, field: usize, text: &str) {
        let (begun, value) = self.0.last_mut().expect("a string that has begun");
        assert_eq!(*begun, field);
        value.push_str(text);
    }
}

struct Nothing;

impl FieldSink for Nothing {
    fn begin(&mut self, _: usize) {}
    fn text(&mut self, _: usize, _: &str) {}
}

fn scan(bytes: &[u8], reads: Reads) -> (Found, bool) {
    let mut all = All::default();
    let mut scanner = FieldScanner::new(NAMES);
    reads.of(bytes).for_each(|read| scanner.push(read, &mut all));
    (all.0, scanner.is_complete())
}

/// The fields in the order in which they stand; `serde_json` itself keeps only the last of a name.
struct Fields(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self(Vec::new()))
    }
}

impl<'de> Visitor<'de> for Fields {
    type Value = Self;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some(field) = map.next_entry()? {
            self.0.push(field);
        }
        Ok(self)
    }
}

/// The text with each escaped half of a pair of surrogates as U+FFFD: `serde_json` refuses those, kernels send them.
fn mended(mut text: &str) -> String {
    let unit = |text: &str| {
        let digits = text.strip_prefix("\\u")?.get(..4).filter(|digits| !digits.starts_with('+'))?;
        u16::from_str_radix(digits, 16).ok()
    };
    let mut mended = String::new();
    while let Some(next) = text.chars().next() {
        let second = text.get(6..).and_then(unit);
        let (taken, stands_for) = match (unit(text), second) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => (12, None),
            (Some(0xd800..=0xdfff), _) => (6, Some("\\ufffd")),
            (None, _) if next == '\\' => (text.ceil_char_boundary(2), None),
            _ => (next.len_utf8(), None),
        };
        mended.push_str(stands_for.unwrap_or(&text[..taken]));
        text = &text[taken..];
    }
    mended
}

fn expected(text: &str) -> Found {
    let Fields(fields) = serde_json::from_str(text).expect("an object, as was said before");
    let mut found = Found::new();
    for (name, value) in fields {
        let Some(field) = NAMES.iter().position(|n| *n == name) else { continue };
        match value {
            Value::String(text) => found.push((field, text)),
            Value::Array(items) => {
                found.extend(items.into_iter().filter_map(|item| Some((field, item.as_str()?.to_owned()))));
            }
            _ => {}
        }
    }
    found
}

fn last(found: &Found, field: usize) -> Option<&str> {
    found.iter().rev().find(|(f, _)| *f == field).map(|(_, text)| text.as_str())
}

fn check_short_fields(bytes: &[u8], found: &Found, complete: bool, limit: usize) {
    let fits = found.iter().all(|(_, text)| text.len() <= limit);
    let expected = (complete && fits).then(|| [0, 1, 2, 3, 4].map(|field| last(found, field).map(str::to_owned)));
    assert_eq!(short_fields(bytes, NAMES, limit), expected);
}

fn check_stream_text(bytes: &[u8], found: &Found, complete: bool, limits: CaptureLimits) {
    let captured = stream_text(bytes, limits);
    let Some(text) = last(found, TEXT).filter(|_| complete) else {
        assert!(captured.is_none());
        return;
    };
    let (name, Captured { head, tail, total }) = captured.expect("there is a text");
    assert!(name.len() <= MAX_NAME);
    assert!(name == last(found, 0).unwrap_or_default() || last(found, 0).is_some_and(|name| name.len() > MAX_NAME));
    assert_eq!((total, head.as_str()), (text.len() as u64, &text[..text.floor_char_boundary(limits.head)]));
    let rest = &text[head.len()..];
    assert_eq!(tail, rest[rest.ceil_char_boundary(rest.len().saturating_sub(limits.tail))..]);
}

fn check_failure(bytes: &[u8], found: &Found) {
    let failure = failure(bytes);
    assert_eq!(failure.is_error(), last(found, 2) == Some("error"));
    let told = serde_json::to_value(&failure).expect("plain data");
    assert_eq!(told["evalue"], last(found, 3).unwrap_or_default());
    let traceback: Vec<&str> = found.iter().filter(|(f, _)| *f == 4).map(|(_, text)| text.as_str()).collect();
    assert_eq!(told["traceback"], serde_json::json!(traceback));
}
