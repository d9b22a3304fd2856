//! JSON of a kernel made fit for others to read, in answers and files: on one line, no deeper and with no larger numbers than readers take, and without lone
//! surrogates. What cannot be made fit is refused, with a reason for people.

use serde_json::value::RawValue;

/// Deepest nesting. Readers end at 128, and a notebook is six levels itself.
const MAX_DEPTH: usize = 100;
/// What stands for half of a surrogate pair.
const REPLACEMENT: &str = "\\ufffd";

/// Why JSON of a kernel is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// Its nesting.
    #[error("it is nested more than {MAX_DEPTH} levels deep")]
    Deep,
    /// A number that is infinite as a double.
    #[error("a number in it is too large")]
    Number,
    /// Its form.
    #[error("it is not JSON")]
    Malformed,
    /// Its absence.
    #[error("it is not kept any more")]
    Gone,
}

/// The same value, fit to be read.
///
/// # Errors
/// When it can't be made fit.
pub fn clean(text: &str) -> Result<Box<RawValue>, Unfit> {
    // What is left of an invalid text may be anything; the parser has the last word.
    RawValue::from_string(minified(text)?).map_err(|_| Unfit::Malformed)
}

fn minified(text: &str) -> Result<String, Unfit> {
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut depth) = (text, 0_usize);
    while let Some(first) = rest.bytes().next() {
        match first {
            b'"' => {
                rest = string(&rest[1..], &mut out)?;
                continue;
            }
            b'-' | b'0'..=b'9' => {
                rest = number(rest, &mut out)?;
                continue;
            }
            b' ' | b'\t' | b'\n' | b'\r' => {}
            b'[' | b'{' if depth == MAX_DEPTH => return Err(Unfit::Deep),
            other if other.is_ascii() => {
                match other {
                    b'[' | b'{' => depth += 1,
                    b']' | b'}' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                out.push(char::from(other));
            }
            _ => return Err(Unfit::Malformed),
        }
        rest = &rest[1..];
    }
    Ok(out)
}

/// Takes a number. Readers refuse what is infinite as a double, or make something else of it.
fn number<'a>(text: &'a str, out: &mut String) -> Result<&'a str, Unfit> {
    let end = text.bytes().position(|b| !matches!(b, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E'));
    let (number, rest) = text.split_at(end.unwrap_or(text.len()));
    if !number.parse::<f64>().is_ok_and(f64::is_finite) {
        return Err(Unfit::Number);
    }
    out.push_str(number);
    Ok(rest)
}

/// Takes a string from behind its first quote.
fn string<'a>(mut rest: &'a str, out: &mut String) -> Result<&'a str, Unfit> {
    out.push('"');
    loop {
        let end = rest.find(['"', '\\']).ok_or(Unfit::Malformed)?;
        out.push_str(&rest[..end]);
        rest = &rest[end..];
        if let Some(after) = rest.strip_prefix('"') {
            out.push('"');
            return Ok(after);
        }
        let taken = match unit(rest) {
            Some(0xd800..0xdc00) if rest.get(6..).and_then(unit).is_some_and(|u| (0xdc00..0xe000).contains(&u)) => 12,
            Some(0xd800..0xe000) => {
                out.push_str(REPLACEMENT);
                rest = &rest[6..];
                continue;
            }
            Some(_) => 6,
            None => 2,
        };
        out.push_str(rest.get(..taken).ok_or(Unfit::Malformed)?);
        rest = &rest[taken..];
    }
}

/// The code unit of an escape in hexadecimal that the text begins with.
fn unit(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("\\u")?.get(..4)?;
    digits.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u16::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn cleaned(text: &str) -> Result<String, Unfit> {
        clean(text).map(|raw| raw.get().to_owned())
    }

    #[test]
    fn a_value_stays_what_it_is_but_stands_on_one_line() {
        let text = "{\r\n \"a b\\n\": [1.50, 123456789012345678901234567890, true, null, \"\\ud83d\\ude00 é\\\\\"]\t}";
        let expected = "{\"a b\\n\":[1.50,123456789012345678901234567890,true,null,\"\\ud83d\\ude00 é\\\\\"]}";
        assert_eq!(cleaned(text).unwrap(), expected);
    }

    #[test]
    fn half_a_surrogate_pair_is_replaced() {
        for (text, expected) in [
            (r#""\ud800""#, "\u{fffd}"),
            (r#""\uDFFFx""#, "\u{fffd}x"),
            (r#""\ud800\ud83d\ude00""#, "\u{fffd}\u{1f600}"),
            (r#""\ude00\ud83d""#, "\u{fffd}\u{fffd}"),
            (r#""\\ud800""#, "\\ud800"),
            (r#""\\\ud800\n""#, "\\\u{fffd}\n"),
        ] {
            assert_eq!(serde_json::from_str::<String>(&cleaned(text).unwrap()).unwrap(), expected, "{text}");
        }
        let key: Value = serde_json::from_str(&cleaned(r#"{"\udbff":"\ud800"}"#).unwrap()).unwrap();
        assert_eq!(key, serde_json::json!({"\u{fffd}": "\u{fffd}"}));
    }

    #[test]
    fn what_readers_do_not_take_is_refused_with_its_reason() {
        let deep = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(clean(&deep(MAX_DEPTH)).is_ok());
        let many_digits = "9".repeat(5000);
        for (text, why) in [
            (deep(MAX_DEPTH + 1).as_str(), Unfit::Deep),
            (&"{\"a\":".repeat(90_000), Unfit::Deep),
            ("1e999", Unfit::Number),
            ("[-1e999]", Unfit::Number),
            (&many_digits, Unfit::Number),
            ("NaN", Unfit::Malformed),
            ("-Infinity", Unfit::Number),
            ("[1,]", Unfit::Malformed),
            ("\"a\nb\"", Unfit::Malformed),
            ("\"open", Unfit::Malformed),
            ("\"\\u12\"", Unfit::Malformed),
            ("é", Unfit::Malformed),
            ("", Unfit::Malformed),
        ] {
            assert_eq!(cleaned(text), Err(why), "{}", &text[..text.len().min(20)]);
        }
    }

    proptest! {
        #[test]
        fn what_comes_out_is_read_by_a_strict_reader_and_is_one_line(text in "[\\[\\]{}\",:\\\\ud8c0-9e.\\- \n\\p{L}]{0,60}") {
            if let Ok(raw) = clean(&text) {
                prop_assert!(serde_json::from_str::<Value>(raw.get()).is_ok(), "{}", raw.get());
                prop_assert!(!raw.get().contains('\n'));
            }
        }

        #[test]
        fn any_string_comes_through(text in any::<String>()) {
            let json = serde_json::to_string(&text).unwrap();
            prop_assert_eq!(serde_json::from_str::<String>(&cleaned(&json).unwrap()).unwrap(), text);
        }
    }
}
