//! The content of a MIME type in its two places: as JSON in a bundle, and as bytes of its own. Says which type is what; keeps nothing.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::value::{RawValue, to_raw_value};

use crate::domain::output::JsonText;
use crate::json::{Unfit, clean};

/// What stands in a bundle for a MIME type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Any JSON value.
    Json,
    /// A string that is the content.
    Text,
    /// A string that is the content in base 64.
    Base64,
}

impl Form {
    /// The form of a MIME type: JSON where nbformat's schema has any value, base 64 for what is known to be binary.
    #[must_use]
    pub fn of(mime: &str) -> Self {
        if mime == "application/json" || (mime.starts_with("application/") && mime.ends_with("+json")) {
            return Self::Json;
        }
        let binary = match mime.split_once('/') {
            Some(("image" | "audio" | "video" | "font", kind)) => !kind.ends_with("xml") && !kind.ends_with("json"),
            Some(("application", kind)) => matches!(kind, "pdf" | "octet-stream" | "zip" | "gzip"),
            _ => false,
        };
        if binary { Self::Base64 } else { Self::Text }
    }
}

/// The bytes that a part of a bundle stands for; none when it is not what its type promises.
#[must_use]
pub fn decoded(mime: &str, part: &JsonText) -> Option<Bytes> {
    let text = || serde_json::from_str::<String>(clean(&part.0).ok()?.get()).ok();
    match Form::of(mime) {
        Form::Json => Some(Bytes::copy_from_slice(part.0.as_bytes())),
        Form::Text => text().map(Bytes::from),
        Form::Base64 => {
            let mut digits = text()?.into_bytes();
            digits.retain(|b| !b.is_ascii_whitespace());
            STANDARD.decode(digits).ok().map(Bytes::from)
        }
    }
}

/// What a bundle has for such bytes; nothing when they are not what their type promises.
#[must_use]
pub fn content_text(mime: &str, bytes: Vec<u8>) -> Option<JsonText> {
    encoded(mime, bytes).ok().map(|text| JsonText(text.get().to_owned()))
}

/// What a notebook has for such bytes.
pub(super) fn encoded(mime: &str, bytes: Vec<u8>) -> Result<Box<RawValue>, Unfit> {
    let text = match Form::of(mime) {
        Form::Json => return clean(&String::from_utf8(bytes).map_err(|_| Unfit::Malformed)?),
        Form::Text => String::from_utf8_lossy(&bytes).into_owned(),
        Form::Base64 => STANDARD.encode(bytes),
    };
    as_string(&text)
}

/// What a notebook has for such a part: any value for types of JSON, and a string for all others.
pub(super) fn inlined(mime: &str, part: &JsonText) -> Result<Box<RawValue>, Unfit> {
    let text = part.0.trim_ascii();
    if Form::of(mime) == Form::Json || text.starts_with('"') {
        return clean(text);
    }
    // Some kernels give a list of lines, as files have it.
    match clean(text).ok().and_then(|raw| serde_json::from_str::<Vec<String>>(raw.get()).ok()) {
        Some(lines) => as_string(&lines.concat()),
        None => as_string(text),
    }
}

fn as_string(text: &str) -> Result<Box<RawValue>, Unfit> {
    to_raw_value(text).map_err(|_| Unfit::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_type_has_the_form_that_the_schema_wants() {
        for (mime, form) in [
            ("application/json", Form::Json),
            ("application/vnd.vega.v5+json", Form::Json),
            ("application/geo+json", Form::Json),
            ("text/x+json", Form::Text),
            ("model/gltf+json", Form::Text),
            ("application/xjson", Form::Text),
            ("text/plain", Form::Text),
            ("text/html", Form::Text),
            ("image/svg+xml", Form::Text),
            ("image/png", Form::Base64),
            ("audio/x-wav", Form::Base64),
            ("application/pdf", Form::Base64),
            ("application/javascript", Form::Text),
            ("nonsense", Form::Text),
        ] {
            assert_eq!(Form::of(mime), form, "{mime}");
        }
    }

    #[test]
    fn a_part_that_is_no_string_becomes_one_where_a_string_belongs() {
        let inlined = |mime, text: &str| inlined(mime, &JsonText(text.to_owned())).unwrap().get().to_owned();
        assert_eq!(inlined("text/plain", "[\"a\\n\", \"b\"]"), "\"a\\nb\"");
        assert_eq!(inlined("text/plain", "{\"a\": 1e999}"), "\"{\\\"a\\\": 1e999}\"");
        assert_eq!(inlined("text/plain", &"[".repeat(90_000)).len(), 90_002);
        assert_eq!(inlined("text/html", " null "), "\"null\"");
        assert_eq!(inlined("text/plain", "\"\\ud800\""), "\"\\ufffd\"");
        assert_eq!(inlined("application/json", "{\n\"a\": [1, 2] }"), "{\"a\":[1,2]}");
    }

    #[test]
    fn what_is_not_what_its_type_promises_has_no_bytes() {
        for (mime, text) in [("image/png", "\"not base 64\""), ("image/png", "7"), ("text/html", "{}")] {
            assert_eq!(decoded(mime, &JsonText(text.to_owned())), None, "{mime}");
        }
        assert_eq!(decoded("image/png", &JsonText("\"aGk=\\n\"".to_owned())).unwrap(), "hi");
    }

    proptest! {
        #[test]
        fn bytes_come_back_as_they_were(bytes in proptest::collection::vec(any::<u8>(), 0..100), text in any::<String>()) {
            for (mime, bytes) in [("image/png", bytes), ("text/html", text.clone().into_bytes())] {
                let part = JsonText(encoded(mime, bytes.clone()).unwrap().get().to_owned());
                prop_assert_eq!(decoded(mime, &part).unwrap(), bytes);
            }
            let json = serde_json::to_string(&text).unwrap();
            let back = encoded("application/json", json.clone().into_bytes()).unwrap();
            prop_assert_eq!(back.get(), json);
        }
    }
}
