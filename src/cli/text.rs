//! Text for terminals: escapes, sizes, ages, tables. Decides nothing about what is shown.

use std::fmt::Write as _;

use serde_json::Value;

/// Makes text from the network harmless for a terminal: control characters, but for line ends and tabs, and characters
/// that turn the direction of writing, become escapes that can be read.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            c if c.is_control() || is_invisible(c) => {
                let _ = write!(out, "{}", c.escape_unicode());
            }
            c => out.push(c),
        }
    }
    out
}

/// The same on one line.
#[must_use]
pub fn escape_line(text: &str) -> String {
    escape(text).replace('\n', "\\n").replace('\t', "\\t")
}

fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// `12 kB`, `3.4 MB`, in powers of 1000.
#[must_use]
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1000 => format!("{bytes} B"),
        1000..1_000_000 => format!("{} kB", bytes.div_ceil(1000)),
        _ => format!("{}.{} MB", bytes / 1_000_000, bytes % 1_000_000 / 100_000),
    }
}

/// `45s`, `12m`, `3h`, `2d`.
#[must_use]
pub fn span(seconds: i64) -> String {
    match seconds.max(0) {
        s @ 0..120 => format!("{s}s"),
        s @ 120..7200 => format!("{}m", s / 60),
        s @ 7200..172_800 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

/// A string field of an object from the network, escaped; `-` where there is none.
#[must_use]
pub fn field(object: &Value, name: &str) -> String {
    match &object[name] {
        Value::String(text) if !text.is_empty() => escape_line(text),
        Value::Number(number) => number.to_string(),
        _ => "-".to_owned(),
    }
}

/// Columns with two blanks between them. Cells have been escaped.
#[must_use]
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width_of = |column: usize, name: &str| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([name.chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = head.iter().enumerate().map(|(column, name)| width_of(column, name)).collect();
    let mut out = String::new();
    let head: Vec<String> = head.iter().map(|name| (*name).to_owned()).collect();
    for row in std::iter::once(&head).chain(rows) {
        let line: String = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}  ")).collect();
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_what_a_terminal_would_obey() {
        assert_eq!(escape("a\u{1b}[2J\r\u{9b}\u{202e}\n\tä"), "a\\u{1b}[2J\\u{d}\\u{9b}\\u{202e}\n\tä");
        assert_eq!(escape_line("a\nb"), "a\\nb");
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([size(999), size(11_200), size(3_450_000)], ["999 B", "12 kB", "3.4 MB"]);
        assert_eq!([span(-3), span(90), span(900), span(14_400), span(200_000)], ["0s", "90s", "15m", "4h", "2d"]);
    }

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".to_owned(), "long cell".to_owned()], vec!["bcd".to_owned(), "x".to_owned()]];
        assert_eq!(table(&["N", "M"], &rows), "N    M\na    long cell\nbcd  x\n");
    }
}
