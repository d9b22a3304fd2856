//! Notebooks as Jupyter's clients read and write them. What is in one comes from the code inside: it is passed on field by field, so reading takes no more memory than the
//! text itself, whatever stands in it; and its word that it is to be trusted is not passed on.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};
use serde_json::value::RawValue;

use crate::json;

/// What a notebook begins as.
pub(super) const EMPTY_NOTEBOOK: &str =
    "{\n \"cells\": [],\n \"metadata\": {},\n \"nbformat\": 4,\n \"nbformat_minor\": 5\n}\n";

/// A file's notebook as clients take it: lines that stand in lists are joined, and it is not trusted, whatever it says itself: its outputs run in nobody's browser
/// before somebody has run its cells. Nothing where it is none.
pub(super) fn read_notebook(bytes: Vec<u8>) -> Option<Box<RawValue>> {
    let text = {
        let file = String::from_utf8(bytes).ok()?;
        json::clean(&file).ok()?
    };
    let mut out = String::with_capacity(text.get().len());
    let mut is_notebook = false;
    object(text.get(), &mut out, |name, value, out| {
        is_notebook |= name == "nbformat";
        match name {
            "cells" => list(value, out, |cell, out| mend_cell(cell.get(), out)),
            _ => pass(value, out),
        }
    })?;
    drop(text);
    if is_notebook { RawValue::from_string(out).ok() } else { None }
}

/// A notebook that is saved, as it is written; else what is wrong with it.
pub(super) fn write_notebook(content: &RawValue) -> Result<Vec<u8>, &'static str> {
    #[derive(Deserialize)]
    struct Notebook {
        #[serde(rename = "nbformat")]
        _nbformat: u32,
    }
    serde_json::from_str::<Notebook>(content.get())
        .map_err(|_| "the content of a notebook is an object with a number \"nbformat\"")?;
    Ok(format!("{}\n", content.get()).into_bytes())
}

fn mend_cell(cell: &str, out: &mut String) -> Option<()> {
    #[derive(Deserialize)]
    struct Cell<'a> {
        #[serde(borrow)]
        cell_type: Option<&'a RawValue>,
    }
    // What says twice what it is, is not taken for code: then it is not trusted either.
    let kind = serde_json::from_str::<Cell<'_>>(cell).ok().and_then(|cell| cell.cell_type);
    let is_code = kind.is_some_and(|kind| kind.get() == "\"code\"");
    object(cell, out, |name, value, out| match name {
        "source" => lines(value, out),
        "metadata" => or_as_it_is(value, out, |out| mend_metadata(value, is_code, out)),
        "attachments" => {
            or_as_it_is(value, out, |out| object(value.get(), out, |_, bundle, out| mend_bundle(bundle, out)))
        }
        "outputs" => or_as_it_is(value, out, |out| list(value, out, mend_output)),
        _ => pass(value, out),
    })
}

fn mend_metadata(metadata: &RawValue, is_code: bool, out: &mut String) -> Option<()> {
    let begin = out.len();
    object_without(metadata.get(), out, "trusted")?;
    if is_code {
        out.pop();
        out.push_str(if out.len() == begin + 1 { "\"trusted\":false}" } else { ",\"trusted\":false}" });
    }
    Some(())
}

fn mend_output(output: &RawValue, out: &mut String) -> Option<()> {
    object(output.get(), out, |name, value, out| match name {
        "text" => lines(value, out),
        "data" => or_as_it_is(value, out, |out| mend_bundle(value, out)),
        _ => pass(value, out),
    })
}

fn mend_bundle(bundle: &RawValue, out: &mut String) -> Option<()> {
    object(bundle.get(), out, |mime, value, out| {
        let is_json = mime == "application/json" || (mime.starts_with("application/") && mime.ends_with("+json"));
        if is_json { pass(value, out) } else { lines(value, out) }
    })
}

/// A text; one that stands as a list of its lines is joined.
fn lines(value: &RawValue, out: &mut String) -> Option<()> {
    if !value.get().starts_with('[') {
        return pass(value, out);
    }
    or_as_it_is(value, out, |out| {
        out.push('"');
        // The ends of each are quotes, and nothing but its own text is between them.
        each(value.get(), |line| {
            out.push_str(line.get().strip_prefix('"')?.strip_suffix('"')?);
            Some(())
        })?;
        out.push('"');
        Some(())
    })
}

fn pass(value: &RawValue, out: &mut String) -> Option<()> {
    out.push_str(value.get());
    Some(())
}

/// Writes a field that is what it should be; what is not stays.
fn or_as_it_is(value: &RawValue, out: &mut String, write: impl FnOnce(&mut String) -> Option<()>) -> Option<()> {
    let begin = out.len();
    if write(out).is_none() {
        out.truncate(begin);
        out.push_str(value.get());
    }
    Some(())
}

/// Writes an object, of which each value is written by another. Nothing where it is none.
fn object(
    text: &str,
    out: &mut String,
    mut write: impl FnMut(&str, &RawValue, &mut String) -> Option<()>,
) -> Option<()> {
    fields(text, out, |name, value, out| {
        begin_field(name, out)?;
        write(name, value, out)
    })
}

/// The same as it is, but for one field.
fn object_without(text: &str, out: &mut String, left_out: &str) -> Option<()> {
    fields(text, out, |name, value, out| {
        if name == left_out {
            return Some(());
        }
        begin_field(name, out)?;
        pass(value, out)
    })
}

fn begin_field(name: &str, out: &mut String) -> Option<()> {
    if !out.ends_with('{') {
        out.push(',');
    }
    out.push_str(&serde_json::to_string(name).ok()?);
    out.push(':');
    Some(())
}

fn fields(
    text: &str,
    out: &mut String,
    mut write: impl FnMut(&str, &RawValue, &mut String) -> Option<()>,
) -> Option<()> {
    out.push('{');
    let mut each = |name: &str, value: &RawValue| write(name, value, out);
    walk(text, '{', Fields(&mut each))?;
    out.push('}');
    Some(())
}

/// Writes a list, of which each value is written by another. Nothing where it is none.
fn list(value: &RawValue, out: &mut String, mut write: impl FnMut(&RawValue, &mut String) -> Option<()>) -> Option<()> {
    out.push('[');
    each(value.get(), |value| {
        if !out.ends_with('[') {
            out.push(',');
        }
        write(value, out)
    })?;
    out.push(']');
    Some(())
}

fn each(text: &str, mut see: impl FnMut(&RawValue) -> Option<()>) -> Option<()> {
    walk(text, '[', Values(&mut see))
}

fn walk<'a>(text: &'a str, begin: char, seed: impl DeserializeSeed<'a, Value = ()>) -> Option<()> {
    // A refusal would repeat all of a text.
    if !text.starts_with(begin) {
        return None;
    }
    seed.deserialize(&mut serde_json::Deserializer::from_str(text)).ok()
}

/// Shows the fields of an object one at a time, and keeps none.
struct Fields<'f>(&'f mut dyn FnMut(&str, &RawValue) -> Option<()>);

impl<'de> DeserializeSeed<'de> for Fields<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some((name, value)) = map.next_entry::<Cow<'de, str>, &'de RawValue>()? {
            (self.0)(&name, value).ok_or_else(unlike::<A::Error>)?;
        }
        Ok(())
    }
}

/// The same of a list.
struct Values<'f>(&'f mut dyn FnMut(&RawValue) -> Option<()>);

impl<'de> DeserializeSeed<'de> for Values<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Values<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(value) = list.next_element::<&'de RawValue>()? {
            (self.0)(value).ok_or_else(unlike::<A::Error>)?;
        }
        Ok(())
    }
}

fn unlike<E: de::Error>() -> E {
    Error::custom("it is no part of a notebook")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_notebook_is_joined_and_never_trusted() {
        let file = json!({"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": {"name": "x"}}, "cells": [
            {"cell_type": "code", "source": ["a\n", "b"], "metadata": {"trusted": true, "tags": ["t"]}, "outputs": [
                {"output_type": "stream", "name": "stdout", "text": ["1\n", "2"]},
                {"output_type": "display_data", "data": {"text/html": ["<b>", "</b>"], "application/json": ["x"]}}]},
            {"cell_type": "markdown", "source": "c", "metadata": {"trusted": true}, "attachments": {"i": {"image/png": ["aG", "k="]}}},
            {"metadata": 3, "outputs": {}},
        ]});
        let read: Value = serde_json::from_str(read_notebook(file.to_string().into_bytes()).unwrap().get()).unwrap();
        let cells = &read["cells"];
        assert_eq!(
            (&cells[0]["source"], &cells[0]["metadata"]),
            (&json!("a\nb"), &json!({"trusted": false, "tags": ["t"]}))
        );
        assert_eq!(cells[0]["outputs"][0]["text"], "1\n2");
        assert_eq!(cells[0]["outputs"][1]["data"], json!({"text/html": "<b></b>", "application/json": ["x"]}));
        assert_eq!(
            (&cells[1]["metadata"], &cells[1]["attachments"]),
            (&json!({}), &json!({"i": {"image/png": "aGk="}}))
        );
        assert_eq!(cells[2], file["cells"][2]);
        for wrong in ["", "[]", "{}", "{\"nbformat\": 4, \"cells\": [1]}", "{\"nbformat\": 4"] {
            assert!(read_notebook(wrong.into()).is_none(), "{wrong}");
        }
        assert!(read_notebook(EMPTY_NOTEBOOK.into()).is_some());
        let raw = |text: &str| RawValue::from_string(text.to_owned()).unwrap();
        assert_eq!(write_notebook(&raw("{\"nbformat\":4}")).unwrap(), b"{\"nbformat\":4}\n");
        assert!(write_notebook(&raw("{}")).is_err() && write_notebook(&raw("[]")).is_err());
    }

    #[test]
    fn nothing_but_lines_of_text_is_joined_and_what_is_said_twice_is_no_way_around() {
        let read = |cells: &str| {
            let file = format!("{{\"nbformat\":4,\"cells\":{cells}}}");
            serde_json::from_str::<Value>(read_notebook(file.into_bytes()).unwrap().get()).unwrap()["cells"].take()
        };
        let same =
            r#"[{"source":["a",1],"outputs":[{"text":[["a"]]},{"data":3}],"attachments":{"i":1},"metadata":[]}]"#;
        assert_eq!(read(same), serde_json::from_str::<Value>(same).unwrap());
        assert_eq!(read(r#"[{"source":[]},{"source":["\"","\\"]},{"outputs":[]}]"#)[1]["source"], "\"\\");
        let code = |metadata: &str| format!(r#"[{{"cell_type":"code","metadata":{metadata}}}]"#);
        for metadata in [r#"{"trusted":true,"trusted":true}"#, r#"{"\u0074rusted":true}"#, "{}"] {
            assert_eq!(read(&code(metadata))[0]["metadata"], json!({"trusted": false}), "{metadata}");
        }
        for twice in [
            r#"[{"cell_type":"code","cell_type":"code","metadata":{"trusted":true}}]"#,
            r#"[{"metadata":{"trusted":true},"metadata":{"trusted":true},"cell_type":"raw"}]"#,
        ] {
            assert_eq!(read(twice)[0]["metadata"], json!({}), "{twice}");
        }
    }

    /// The most memory that this process has had, in bytes.
    fn peak() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
    }

    #[test]
    fn a_notebook_takes_a_few_times_its_length_whatever_stands_in_it() {
        const LENGTH: usize = 4 << 20;
        let before = peak();
        let filled = |begin: &str, part: &str, end: &str| {
            let parts = format!("{part},").repeat(LENGTH / (part.len() + 1));
            format!("{{\"nbformat\":4,\"cells\":[{begin}{parts}{part}{end}]}}").into_bytes()
        };
        for (begin, part, end) in [
            ("", "{\"a\":0}", ""),
            ("{", "\"a\":0", "}"),
            ("{\"outputs\":[", "{}", "]}"),
            ("{\"source\":[", "\"\"", "]}"),
            ("{\"metadata\":{", "\"b\":0", "}}"),
            ("", "{\"cell_type\":\"code\",\"metadata\":{}}", ""),
        ] {
            assert!(read_notebook(filled(begin, part, end)).is_some(), "{part}");
        }
        let taken = peak() - before;
        assert!(taken < 12 * LENGTH, "{} MiB", taken >> 20);
    }
}
