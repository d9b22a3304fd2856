//! Shows an execution's events on a terminal as they come, and knows the exit code in the end. Used by `exec` and `run`;
//! it fetches nothing.
//!
//! Events are the objects of the API's NDJSON stream: `type`, `seq` and the type's own fields. The last one is
//! `execution.completed`. What the code itself wrote to stdout and stderr, and its traceback, reach the terminal as
//! they are, which is what a terminal is for; everything else is escaped.

use std::io::{self, IsTerminal as _, Write};

use serde_json::Value;

use super::images::{Blob, Images};
use super::text::{escape, escape_line, size};

/// The code ended well.
pub const OK: u8 = 0;
/// The code raised an error.
pub const CODE_ERROR: u8 = 1;
/// Its time limit was reached, as `timeout(1)` has it.
pub const TIMED_OUT: u8 = 124;
/// Cellblock refused or failed.
pub const FAILED: u8 = 125;
/// It was cancelled, as a shell says of an interrupted program.
pub const CANCELLED: u8 = 130;
/// Its kernel ran out of memory or died, as a shell says of a killed program.
pub const KILLED: u8 = 137;

/// Renders one execution.
pub struct Renderer<O, E> {
    stdout: O,
    stderr: E,
    json: bool,
    images: Images,
    /// Whether both streams are seen on one terminal, so that notes must not begin in the middle of a line.
    one_terminal: bool,
    /// Whether the last byte on stdout ended a line.
    at_line_start: bool,
    execution: Option<Value>,
}

impl Renderer<io::Stdout, io::Stderr> {
    /// Renders to this process's output. With `json` only the final execution is printed.
    #[must_use]
    pub fn to_terminal(json: bool, images: Images) -> Self {
        let one_terminal = io::stdout().is_terminal() && io::stderr().is_terminal();
        Self { one_terminal, ..Self::new(io::stdout(), io::stderr(), json, images) }
    }
}

impl<O: Write, E: Write> Renderer<O, E> {
    /// Renders to any two streams.
    pub fn new(stdout: O, stderr: E, json: bool, images: Images) -> Self {
        Self { stdout, stderr, json, images, one_terminal: false, at_line_start: true, execution: None }
    }

    /// Takes the next event. Types that aren't known are passed over: the API may grow.
    ///
    /// # Errors
    /// The streams can't be written to, or an image can't be saved.
    pub fn event(&mut self, event: &Value) -> io::Result<()> {
        match event["type"].as_str().unwrap_or_default() {
            "stdout" => self.kernel_stdout(text(&event["text"]).as_ref()),
            "stderr" => self.kernel_stderr(text(&event["text"]).as_ref()),
            "result" | "result.update" => self.result(&event["data"]),
            "error" => self.error(event),
            "output.truncated" => {
                let bytes = event["omitted_bytes"].as_u64().or_else(|| event["bytes"].as_u64()).unwrap_or(0);
                self.note(&format!("{} of {} left out", size(bytes), escape_line(&text(&event["stream"]))))
            }
            "kernel.restarted" => {
                let cause = escape_line(&text(&event["cause"]));
                self.note(&format!("the kernel was restarted ({cause}): variables are gone, files are not"))
            }
            "execution.completed" => {
                self.execution = Some(event["execution"].clone());
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Whether the last event was there.
    #[must_use]
    pub fn is_completed(&self) -> bool {
        self.execution.is_some()
    }

    /// Images that were too large for an event, to be fetched by the caller and given to [`Blob::save`].
    pub fn take_blobs(&mut self) -> Vec<Blob> {
        self.images.take_blobs()
    }

    /// Says how it ended and gives the exit code. A stream without an end is a failure of ours.
    ///
    /// # Errors
    /// The streams can't be written to.
    pub fn finish(mut self) -> io::Result<u8> {
        let Some(execution) = self.execution.take() else {
            self.note("the connection ended before the execution did; the session goes on")?;
            return Ok(FAILED);
        };
        let status = execution["status"].as_str().unwrap_or_default();
        if self.json {
            serde_json::to_writer_pretty(&mut self.stdout, &execution)?;
            writeln!(self.stdout)?;
        } else if let Some(ending) = ending(status, execution["duration_ms"].as_u64()) {
            self.note(&ending)?;
        }
        self.stdout.flush()?;
        Ok(exit_code(status))
    }

    fn kernel_stdout(&mut self, text: &str) -> io::Result<()> {
        if self.json || text.is_empty() {
            return Ok(());
        }
        self.at_line_start = text.ends_with('\n');
        self.stdout.write_all(text.as_bytes())?;
        self.stdout.flush()
    }

    fn kernel_stderr(&mut self, text: &str) -> io::Result<()> {
        if self.json {
            return Ok(());
        }
        self.stderr.write_all(text.as_bytes())?;
        self.stderr.flush()
    }

    fn result(&mut self, data: &Value) -> io::Result<()> {
        let images = self.images.take(data)?;
        let mut lines: Vec<String> = Vec::new();
        match &data["text/plain"] {
            Value::Null if images.is_empty() => lines.extend(other_types(data)),
            Value::Null => {}
            plain => lines.push(escape(&text(plain))),
        }
        lines.extend(images);
        lines.iter().try_for_each(|line| self.print_line(line))
    }

    fn print_line(&mut self, line: &str) -> io::Result<()> {
        let break_line = if self.at_line_start { "" } else { "\n" };
        self.kernel_stdout(&format!("{break_line}{line}\n"))
    }

    fn error(&mut self, event: &Value) -> io::Result<()> {
        let traceback = text_lines(&event["traceback"]);
        let summary = || format!("{}: {}", escape_line(&text(&event["name"])), escape(&text(&event["value"])));
        let told = if traceback.trim().is_empty() { summary() } else { traceback };
        self.kernel_stderr(&format!("{}\n", told.trim_end_matches('\n')))
    }

    /// A line of ours. Also with `json`, whose standard error is for people.
    fn note(&mut self, note: &str) -> io::Result<()> {
        if self.one_terminal && !self.at_line_start {
            self.at_line_start = true;
            writeln!(self.stderr)?;
        }
        writeln!(self.stderr, "[{note}]")?;
        self.stderr.flush()
    }
}

/// The exit code that a status stands for; one that isn't known is a failure of ours.
#[must_use]
pub fn exit_code(status: &str) -> u8 {
    match status {
        "ok" => OK,
        "error" | "input_denied" => CODE_ERROR,
        "timeout" => TIMED_OUT,
        "cancelled" => CANCELLED,
        "oom" | "kernel_died" => KILLED,
        _ => FAILED,
    }
}

fn ending(status: &str, millis: Option<u64>) -> Option<String> {
    let after = millis.map(|ms| format!(" after {}.{} s", ms / 1000, ms % 1000 / 100)).unwrap_or_default();
    Some(match status {
        "ok" | "error" => return None,
        "input_denied" => "the code asked for input, and there is none".to_owned(),
        "timeout" => format!("the time limit was reached{after}"),
        "cancelled" => format!("cancelled{after}"),
        "oom" => format!("out of memory{after}: the kernel was ended"),
        "kernel_died" => format!("the kernel died{after}"),
        "lost" => format!("the session was lost{after}"),
        other => format!("ended with the unknown status \"{}\"", escape_line(other)),
    })
}

/// What is there when there is neither text nor an image.
fn other_types(data: &Value) -> Vec<String> {
    let parts = data.as_object().into_iter().flatten();
    parts.map(|(mime, part)| format!("[{} {}]", escape_line(mime), size(text(part).len() as u64))).collect()
}

/// A text, or a list of its lines as nbformat 4 permits; anything else as JSON.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        Value::Array(parts) if parts.iter().all(Value::is_string) => parts.iter().filter_map(Value::as_str).collect(),
        other => other.to_string(),
    }
}

/// A traceback: its entries are lines or blocks without a line end.
fn text_lines(value: &Value) -> String {
    match value {
        Value::Array(parts) => parts.iter().map(text).collect::<Vec<_>>().join("\n"),
        other => text(other),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(json: bool, events: &[Value]) -> (String, String, u8) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut renderer = Renderer::new(&mut out, &mut err, json, Images::new(None));
        for event in events {
            renderer.event(event).unwrap();
        }
        let code = renderer.finish().unwrap();
        (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap(), code)
    }

    fn completed(status: &str) -> Value {
        json!({"type": "execution.completed", "seq": 9, "execution": {"id": "exe1", "status": status, "duration_ms": 1250}})
    }

    #[test]
    fn output_goes_where_it_belongs() {
        let (out, err, code) = render(
            false,
            &[
                json!({"type": "execution.queued", "position": 0}),
                json!({"type": "execution.started"}),
                json!({"type": "stdout", "text": "\u{1b}[1mno newline\u{1b}[0m"}),
                json!({"type": "stderr", "text": "warning\n"}),
                json!({"type": "result", "kind": "execute_result", "data": {"text/plain": "4\u{1b}]0;x\u{7}"}}),
                json!({"type": "from.the.future"}),
                completed("ok"),
            ],
        );
        assert_eq!(out, "\u{1b}[1mno newline\u{1b}[0m\n4\\u{1b}]0;x\\u{7}\n");
        assert_eq!((err.as_str(), code), ("warning\n", 0));
    }

    #[test]
    fn tracebacks_keep_their_colours_and_summaries_do_not() {
        let traceback =
            json!({"type": "error", "name": "E", "value": "v", "traceback": ["\u{1b}[31mTraceback", "E: v"]});
        let (_, err, code) = render(false, &[traceback, completed("error")]);
        assert_eq!((err.as_str(), code), ("\u{1b}[31mTraceback\nE: v\n", 1));
        let summary = json!({"type": "error", "name": "E\u{1b}", "value": "v", "traceback": []});
        assert_eq!(render(false, &[summary, completed("error")]).1, "E\\u{1b}: v\n");
    }

    #[test]
    fn every_ending_has_its_code_and_its_word() {
        for (status, code, word) in [
            ("ok", 0, ""),
            ("error", 1, ""),
            ("input_denied", 1, "asked for input"),
            ("timeout", 124, "time limit was reached after 1.2 s"),
            ("cancelled", 130, "cancelled"),
            ("oom", 137, "out of memory"),
            ("kernel_died", 137, "kernel died"),
            ("lost", 125, "session was lost"),
            ("new\u{1b}", 125, "unknown status \"new\\u{1b}\""),
        ] {
            let (_, err, found) = render(false, &[completed(status)]);
            assert_eq!((found, err.contains(word), err.is_empty()), (code, true, word.is_empty()), "{status}: {err}");
        }
    }

    #[test]
    fn a_stream_without_an_end_is_our_failure() {
        let (out, err, code) = render(false, &[json!({"type": "stdout", "text": "half"})]);
        assert_eq!((out.as_str(), code), ("half", 125));
        assert!(err.contains("the connection ended"), "{err}");
    }

    #[test]
    fn json_is_the_execution_alone() {
        let (out, _, code) = render(true, &[json!({"type": "stdout", "text": "x"}), completed("timeout")]);
        let execution: Value = serde_json::from_str(&out).unwrap();
        assert_eq!((execution["id"].as_str(), code), (Some("exe1"), 124));
    }

    #[test]
    fn notes_name_what_is_missing() {
        let (_, err, _) = render(
            false,
            &[
                json!({"type": "output.truncated", "stream": "stdout", "bytes": 12_000}),
                json!({"type": "kernel.restarted", "cause": "timeout"}),
                completed("ok"),
            ],
        );
        assert!(err.starts_with("[12 kB of stdout left out]\n[the kernel was restarted (timeout)"), "{err}");
    }

    #[test]
    fn results_without_text_are_named() {
        let html = json!({"type": "result", "data": {"text/html": "<b>"}});
        let list = json!({"type": "result", "data": {"text/plain": ["a\n", "b"]}});
        assert_eq!(render(false, &[html, list, completed("ok")]).0, "[text/html 3 B]\na\nb\n");
    }
}
