//! Finds strings of a JSON object's top level while its bytes pass by, in memory that does not grow with them.
//!
//! Made for what kernels send: messages of 50 MB, invalid UTF-8, lone surrogates, duplicate keys, `NaN`, any depth. It takes
//! what looks like a value and does not judge whether the rest is JSON.

/// Receives the strings that a [`FieldScanner`] finds.
pub trait FieldSink {
    /// A string of the field begins; a later one of the same name begins anew. An array's strings begin one by one.
    fn begin(&mut self, field: usize);
    /// More of its text, decoded; what is no Unicode has become U+FFFD.
    fn text(&mut self, field: usize, text: &str);
}

/// Longest name of a field that is compared.
const MAX_KEY: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Skip,
    Key,
    Field(usize),
}

/// The scanner. Feed it with [`FieldScanner::push`] in any pieces.
#[derive(Debug)]
pub struct FieldScanner {
    names: &'static [&'static str],
    depth: u32,
    is_object: bool,
    at_key: bool,
    key: Key,
    current: Option<usize>,
    array: Option<usize>,
    inside: Option<Target>,
    string: StringDecoder,
    complete: bool,
}

impl FieldScanner {
    /// A scanner for string values, or arrays of strings, under these names.
    #[must_use]
    pub fn new(names: &'static [&'static str]) -> Self {
        Self {
            names,
            depth: 0,
            is_object: false,
            at_key: false,
            key: Key::default(),
            current: None,
            array: None,
            inside: None,
            string: StringDecoder::default(),
            complete: false,
        }
    }

    /// Takes the next bytes.
    pub fn push(&mut self, mut bytes: &[u8], sink: &mut impl FieldSink) {
        while !bytes.is_empty() {
            let used = match self.inside {
                None => self.outside(bytes, sink),
                Some(target) => self.inside(target, bytes, sink),
            };
            bytes = &bytes[used..];
        }
    }

    /// Whether the top-level object was closed.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    fn outside(&mut self, bytes: &[u8], sink: &mut impl FieldSink) -> usize {
        for (at, byte) in bytes.iter().enumerate() {
            match byte {
                b'"' => {
                    self.open_string(sink);
                    return at + 1;
                }
                b'{' | b'[' => self.open(*byte),
                b'}' | b']' => self.close(),
                b':' if self.depth == 1 && self.is_object => {
                    self.at_key = false;
                    self.current = self.names.iter().position(|n| self.key.is(n));
                }
                b',' if self.depth == 1 && self.is_object => {
                    self.at_key = true;
                    self.current = None;
                }
                _ => {}
            }
        }
        bytes.len()
    }

    fn open(&mut self, byte: u8) {
        self.depth = self.depth.saturating_add(1);
        match self.depth {
            1 => {
                self.is_object = byte == b'{';
                self.at_key = self.is_object;
            }
            2 if byte == b'[' && !self.at_key => self.array = self.current,
            _ => {}
        }
    }

    fn close(&mut self) {
        self.complete |= self.depth == 1 && self.is_object;
        self.depth = self.depth.saturating_sub(1);
        if self.depth == 1 {
            self.array = None;
        }
    }

    fn open_string(&mut self, sink: &mut impl FieldSink) {
        let field = match self.depth {
            1 => self.current,
            2 => self.array,
            _ => None,
        };
        let target = match field {
            _ if self.depth == 1 && self.at_key => {
                self.key.clear();
                Target::Key
            }
            Some(field) => {
                sink.begin(field);
                Target::Field(field)
            }
            None => Target::Skip,
        };
        self.string = StringDecoder::default();
        self.inside = Some(target);
    }

    fn inside(&mut self, target: Target, bytes: &[u8], sink: &mut impl FieldSink) -> usize {
        let key = &mut self.key;
        let (used, closed) = self.string.push(bytes, &mut |text| match target {
            Target::Skip => {}
            Target::Key => key.push(text),
            Target::Field(field) => sink.text(field, text),
        });
        if closed {
            self.inside = None;
        }
        used
    }
}

#[derive(Debug, Default)]
struct Key {
    bytes: Vec<u8>,
    too_long: bool,
}

impl Key {
    fn clear(&mut self) {
        self.bytes.clear();
        self.too_long = false;
    }

    fn push(&mut self, text: &str) {
        self.too_long |= self.bytes.len() + text.len() > MAX_KEY;
        if !self.too_long {
            self.bytes.extend_from_slice(text.as_bytes());
        }
    }

    fn is(&self, name: &str) -> bool {
        !self.too_long && self.bytes == name.as_bytes()
    }
}

#[derive(Debug, Default, Clone, Copy)]
enum Escape {
    #[default]
    None,
    Started,
    Unicode {
        digits: u8,
        value: u16,
    },
}

/// Decodes the inside of a JSON string up to and with its closing quote.
#[derive(Debug, Default)]
struct StringDecoder {
    escape: Escape,
    high: Option<u16>,
    utf8: LossyUtf8,
}

const UNKNOWN: &str = "\u{fffd}";

impl StringDecoder {
    /// Returns how many bytes were used, and whether the string was closed.
    fn push(&mut self, bytes: &[u8], emit: &mut impl FnMut(&str)) -> (usize, bool) {
        let mut at = 0;
        while at < bytes.len() {
            match self.escape {
                Escape::None => {
                    let rest = &bytes[at..];
                    let plain = rest.iter().position(|b| matches!(b, b'"' | b'\\')).unwrap_or(rest.len());
                    if plain > 0 {
                        self.flush_surrogate(emit);
                        self.utf8.push(&rest[..plain], emit);
                    }
                    at += plain;
                    match rest.get(plain) {
                        Some(b'"') => {
                            self.flush_surrogate(emit);
                            self.utf8.finish(emit);
                            return (at + 1, true);
                        }
                        Some(_) => {
                            self.utf8.finish(emit);
                            self.escape = Escape::Started;
                            at += 1;
                        }
                        None => {}
                    }
                }
                Escape::Started => at += self.started(bytes[at], emit),
                Escape::Unicode { digits, value } => at += self.unicode(bytes[at], digits, value, emit),
            }
        }
        (bytes.len(), false)
    }

    fn started(&mut self, byte: u8, emit: &mut impl FnMut(&str)) -> usize {
        self.escape = Escape::None;
        if byte == b'u' {
            self.escape = Escape::Unicode { digits: 0, value: 0 };
            return 1;
        }
        self.flush_surrogate(emit);
        match byte {
            b'n' => emit("\n"),
            b't' => emit("\t"),
            b'r' => emit("\r"),
            b'b' => emit("\u{8}"),
            b'f' => emit("\u{c}"),
            b'"' => emit("\""),
            b'\\' => emit("\\"),
            b'/' => emit("/"),
            _ => {
                emit(UNKNOWN);
                return 0;
            }
        }
        1
    }

    fn unicode(&mut self, byte: u8, digits: u8, value: u16, emit: &mut impl FnMut(&str)) -> usize {
        let Some(digit) = char::from(byte).to_digit(16) else {
            self.escape = Escape::None;
            self.flush_surrogate(emit);
            emit(UNKNOWN);
            return 0;
        };
        let value = value << 4 | digit as u16;
        if digits < 3 {
            self.escape = Escape::Unicode { digits: digits + 1, value };
        } else {
            self.escape = Escape::None;
            self.unit(value, emit);
        }
        1
    }

    fn unit(&mut self, unit: u16, emit: &mut impl FnMut(&str)) {
        if (0xdc00..0xe000).contains(&unit)
            && let Some(high) = self.high.take()
        {
            let code = 0x10000 + ((u32::from(high) - 0xd800) << 10) + (u32::from(unit) - 0xdc00);
            emit(char::from_u32(code).unwrap_or('\u{fffd}').encode_utf8(&mut [0; 4]));
            return;
        }
        self.flush_surrogate(emit);
        if (0xd800..0xdc00).contains(&unit) {
            self.high = Some(unit);
        } else {
            emit(char::from_u32(u32::from(unit)).unwrap_or('\u{fffd}').encode_utf8(&mut [0; 4]));
        }
    }

    fn flush_surrogate(&mut self, emit: &mut impl FnMut(&str)) {
        if self.high.take().is_some() {
            emit(UNKNOWN);
        }
    }
}

/// `String::from_utf8_lossy` in pieces.
#[derive(Debug, Default)]
struct LossyUtf8 {
    carry: [u8; 4],
    carried: usize,
}

impl LossyUtf8 {
    fn push(&mut self, mut bytes: &[u8], emit: &mut impl FnMut(&str)) {
        while self.carried > 0 {
            let Some((byte, rest)) = bytes.split_first() else { return };
            self.carry[self.carried] = *byte;
            match std::str::from_utf8(&self.carry[..=self.carried]) {
                Ok(text) => emit(text),
                Err(e) if e.error_len().is_none() => {
                    self.carried += 1;
                    bytes = rest;
                    continue;
                }
                Err(_) => {
                    emit(UNKNOWN);
                    self.carried = 0;
                    continue;
                }
            }
            self.carried = 0;
            bytes = rest;
        }
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            if !chunk.valid().is_empty() {
                emit(chunk.valid());
            }
            let invalid = chunk.invalid();
            let unfinished = std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if chunks.peek().is_none() && unfinished {
                self.carry[..invalid.len()].copy_from_slice(invalid);
                self.carried = invalid.len();
            } else if !invalid.is_empty() {
                emit(UNKNOWN);
            }
        }
    }

    fn finish(&mut self, emit: &mut impl FnMut(&str)) {
        if std::mem::take(&mut self.carried) > 0 {
            emit(UNKNOWN);
        }
    }
}

struct Short<const N: usize> {
    values: [Option<String>; N],
    limit: usize,
    too_long: bool,
}

impl<const N: usize> FieldSink for Short<N> {
    fn begin(&mut self, field: usize) {
        self.values[field] = Some(String::new());
    }

    fn text(&mut self, field: usize, text: &str) {
        if let Some(value) = &mut self.values[field] {
            if value.len() + text.len() > self.limit {
                self.too_long = true;
            } else {
                value.push_str(text);
            }
        }
    }
}

/// The values of short string fields; `None` when the bytes hold no whole object, or one of the values is above `limit` bytes.
#[must_use]
pub fn short_fields<const N: usize>(
    bytes: &[u8],
    names: &'static [&'static str; N],
    limit: usize,
) -> Option<[Option<String>; N]> {
    let mut sink = Short { values: [const { None }; N], limit, too_long: false };
    let mut scanner = FieldScanner::new(names);
    scanner.push(bytes, &mut sink);
    (scanner.is_complete() && !sink.too_long).then_some(sink.values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[derive(Default)]
    struct All(Vec<(usize, String)>);

    impl FieldSink for All {
        fn begin(&mut self, field: usize) {
            self.0.push((field, String::new()));
        }
        fn text(&mut self, field: usize, text: &str) {
            let (begun, value) = self.0.last_mut().unwrap();
            assert_eq!(*begun, field);
            value.push_str(text);
        }
    }

    fn scan(bytes: &[u8], step: usize) -> Vec<(usize, String)> {
        let mut all = All::default();
        let mut scanner = FieldScanner::new(&["name", "text"]);
        bytes.chunks(step).for_each(|c| scanner.push(c, &mut all));
        all.0
    }

    fn ascii(value: &Value) -> Vec<u8> {
        let mut out = String::new();
        for c in value.to_string().chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
        out.into_bytes()
    }

    #[test]
    fn takes_the_top_level_only_and_survives_what_json_forbids() {
        let odd = br#"{"a":{"text":"no"},"b":[{"text":"no"}],"x":NaN,"text":"one","t\u0065xt":"tw\udc80o","name":["p",["q"],"r"]}"#;
        let found = scan(odd, 3);
        let expected = [(1, "one"), (1, "tw\u{fffd}o"), (0, "p"), (0, "r")];
        assert_eq!(found, expected.map(|(f, t)| (f, t.to_owned())));
        assert_eq!(scan(b"[\"text\",\"a\"]", 2), []);
        assert_eq!(scan(b"{\"text\":\"\xff\xf0\x9f\x98\"}", 1)[0].1, "\u{fffd}\u{fffd}");
    }

    #[test]
    fn short_fields_need_a_whole_object() {
        assert_eq!(short_fields(br#"{"a":"x"}"#, &["a", "b"], 9), Some([Some("x".to_owned()), None]));
        assert_eq!(short_fields(br#"{"a":"x""#, &["a"], 9), None);
        assert_eq!(short_fields(br#"{"a":"0123456789"}"#, &["a"], 9), None);
    }

    proptest! {
        #[test]
        fn finds_what_serde_finds_in_any_pieces(name in any::<String>(), text in "\\PC*|[\u{0}-\u{2f}😀é\"\\\\]*", step in 1usize..40, escaped in any::<bool>()) {
            let value = json!({"n": [1, {"text": 3}], "name": name, "other": {"name": text}, "text": text});
            let bytes = if escaped { ascii(&value) } else { value.to_string().into_bytes() };
            prop_assert_eq!(scan(&bytes, step), vec![(0, name), (1, text)]);
        }

        #[test]
        fn bytes_that_are_no_utf8_become_what_the_library_makes_of_them(bytes in proptest::collection::vec(any::<u8>().prop_filter("plain", |b| !matches!(b, b'"' | b'\\')), 0..60), step in 1usize..7) {
            let content = [b"{\"text\":\"", bytes.as_slice(), b"\"}"].concat();
            prop_assert_eq!(&scan(&content, step)[0].1, &String::from_utf8_lossy(&bytes).into_owned());
        }

        #[test]
        fn garbage_gives_the_same_in_any_pieces(bytes in proptest::collection::vec(prop_oneof![any::<u8>(), proptest::sample::select(b"{}[]:,\"\\utexn".to_vec())], 0..200), step in 1usize..9) {
            prop_assert_eq!(scan(&bytes, step), scan(&bytes, 1000));
        }
    }
}
