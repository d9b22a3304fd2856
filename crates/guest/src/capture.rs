//! Takes the strings of use out of a message's content while it passes: a stream's text, an error's traceback.
//!
//! Holds head and tail of them, never the content. Decides nothing about what becomes of them.

use crate::cap::{Capture, CaptureLimits, Captured};
use crate::json::{FieldScanner, FieldSink};

/// Above this, an error's traceback is cut.
pub const MAX_ERROR: usize = 256 * 1024;
/// Longest name of a stream, an error or a status.
const MAX_NAME: usize = 256;
const NAME: CaptureLimits = CaptureLimits { head: MAX_NAME, tail: 0 };

/// Reads the text of a `stream` message; `None` when the bytes hold none.
#[must_use]
pub fn stream_text(content: &[u8], limits: CaptureLimits) -> Option<(String, Captured)> {
    let mut capture = TextCapture::new(limits);
    capture.push(content);
    capture.finish()
}

/// Reads an error's strings, its traceback cut to [`MAX_ERROR`].
#[must_use]
pub fn failure(content: &[u8]) -> Failure {
    let mut capture = FailureCapture::new();
    capture.push(content);
    capture.finish()
}

/// The capture of a `stream` message's name and text.
pub(crate) struct TextCapture {
    scanner: FieldScanner,
    found: TextFound,
}

struct TextFound {
    name: Capture,
    text: Option<Capture>,
    limits: CaptureLimits,
}

impl TextCapture {
    pub(crate) fn new(limits: CaptureLimits) -> Self {
        Self {
            scanner: FieldScanner::new(&["name", "text"]),
            found: TextFound { name: Capture::new(NAME), text: None, limits },
        }
    }

    pub(crate) fn push(&mut self, content: &[u8]) {
        self.scanner.push(content, &mut self.found);
    }

    pub(crate) fn finish(self) -> Option<(String, Captured)> {
        let text = self.found.text.filter(|_| self.scanner.is_complete())?;
        Some((self.found.name.finish().head, text.finish()))
    }
}

impl FieldSink for TextFound {
    fn begin(&mut self, field: usize) {
        match field {
            0 => self.name = Capture::new(NAME),
            _ => self.text = Some(Capture::new(self.limits)),
        }
    }

    fn text(&mut self, field: usize, text: &str) {
        if field == 0 {
            self.name.push(text);
        } else if let Some(capture) = &mut self.text {
            capture.push(text);
        }
    }
}

/// The strings of an `error` message or a failed reply, cut where they were long.
#[derive(Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Failure {
    #[serde(skip_serializing_if = "String::is_empty")]
    status: String,
    pub(crate) ename: String,
    pub(crate) evalue: String,
    pub(crate) traceback: Vec<String>,
    #[serde(skip)]
    traceback_bytes: usize,
    /// The string that is being read did not fit: nothing more of it is taken, so that it has no hole.
    #[serde(skip)]
    is_cut: bool,
}

impl Failure {
    /// Whether it calls itself one.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.status == "error"
    }
}

/// The capture of an error's, or a failed reply's, strings.
pub(crate) struct FailureCapture {
    scanner: FieldScanner,
    found: Failure,
}

impl FailureCapture {
    pub(crate) fn new() -> Self {
        Self { scanner: FieldScanner::new(&["status", "ename", "evalue", "traceback"]), found: Failure::default() }
    }

    pub(crate) fn push(&mut self, content: &[u8]) {
        self.scanner.push(content, &mut self.found);
    }

    pub(crate) fn finish(self) -> Failure {
        self.found
    }
}

impl FieldSink for Failure {
    fn begin(&mut self, field: usize) {
        self.is_cut = false;
        match field {
            0 => self.status.clear(),
            1 => self.ename.clear(),
            2 => self.evalue.clear(),
            _ => {
                self.traceback_bytes += 32;
                if self.traceback_bytes < MAX_ERROR {
                    self.traceback.push(String::new());
                }
            }
        }
    }

    fn text(&mut self, field: usize, text: &str) {
        let (to, limit) = match field {
            0 => (Some(&mut self.status), MAX_NAME),
            1 => (Some(&mut self.ename), MAX_NAME),
            2 => (Some(&mut self.evalue), MAX_ERROR / 4),
            _ => (self.traceback.last_mut(), usize::MAX),
        };
        let Some(to) = to.filter(|_| !self.is_cut) else { return };
        let room = if field == 3 { MAX_ERROR.saturating_sub(self.traceback_bytes) } else { limit - to.len() };
        let fits = &text[..text.floor_char_boundary(room)];
        to.push_str(fits);
        self.is_cut = fits.len() < text.len();
        if field == 3 {
            self.traceback_bytes += fits.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: CaptureLimits = CaptureLimits { head: 10, tail: 10 };

    #[test]
    fn a_long_name_is_cut_however_it_arrives() {
        let content = format!("{{\"name\":\"{}\",\"text\":\"x\"}}", "n".repeat(2 * MAX_NAME));
        for size in [1, 100, content.len()] {
            let mut capture = TextCapture::new(LIMITS);
            content.as_bytes().chunks(size).for_each(|chunk| capture.push(chunk));
            assert_eq!(capture.finish().unwrap().0, "n".repeat(MAX_NAME), "{size}");
        }
    }

    #[test]
    fn a_cut_error_has_no_holes_however_it_arrives() {
        let value = format!("{}é{}", "a".repeat(MAX_ERROR / 4 - 1), "b".repeat(100));
        let content = format!("{{\"ename\":\"E\",\"evalue\":\"{value}\",\"traceback\":[\"t\"]}}");
        for size in [1, 7, content.len()] {
            let mut capture = FailureCapture::new();
            content.as_bytes().chunks(size).for_each(|chunk| capture.push(chunk));
            let found = capture.finish();
            assert_eq!((found.evalue.len(), found.traceback.len()), (MAX_ERROR / 4 - 1, 1), "{size}");
        }
    }
}
