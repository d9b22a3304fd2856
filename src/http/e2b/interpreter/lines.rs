//! An execution as E2B's clients hear of it: a JSON object a line, in nothing but ASCII, since they cut at what Unicode takes for ends of lines and read each piece by
//! itself. Decides nothing about the execution.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream, StreamExt};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use tokio::io::AsyncReadExt as _;

use crate::domain::output::{
    ErrorInfo, ExecutionEvent, JsonText, MimePart, RestartCause, ResultKind, RichOutput, Status, TextStream, Truncated,
};
use crate::http::e2b::sandbox::Sandbox;
use crate::http::v1::executions::Listener;
use crate::http::v1::stream::follow;
use crate::json::{Unfit, clean};
use crate::service::{BlobBody, content_text};
use crate::session::execution::{Execution, Logged};

/// A silent execution says that it lives this often.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// What ended with its sandbox is told as that: whether the sandbox goes is seen within this time.
const GONE_IS_SEEN: Duration = Duration::from_millis(300);
/// MIME types that have fields of their own, and those.
const FIELDS: [(&str, &str); 14] = [
    ("text/plain", "text"),
    ("text/html", "html"),
    ("text/markdown", "markdown"),
    ("image/svg+xml", "svg"),
    ("image/png", "png"),
    ("image/jpeg", "jpeg"),
    ("application/pdf", "pdf"),
    ("text/latex", "latex"),
    ("application/json", "json"),
    ("application/javascript", "javascript"),
    ("e2b/data", "data"),
    ("e2b/chart", "chart"),
    // The same in a form that notebooks take.
    ("application/vnd.e2b.data+json", "data"),
    ("application/vnd.e2b.chart+json", "chart"),
];

/// A line.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line {
    NumberOfExecutions {
        execution_count: u64,
    },
    Stdout {
        text: String,
        timestamp: String,
    },
    Stderr {
        text: String,
        timestamp: String,
    },
    Result {
        #[serde(flatten)]
        fields: BTreeMap<&'static str, Box<RawValue>>,
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        extra: BTreeMap<String, Box<RawValue>>,
        is_main_result: bool,
    },
    Error {
        name: String,
        value: String,
        traceback: String,
    },
    Keepalive,
    EndOfExecution,
}

/// Why a body breaks off.
#[derive(Debug, thiserror::Error)]
#[error("the sandbox that this comes from is gone")]
struct Gone;

/// Answers with all that an execution tells. Its caller's hanging up takes it back; its sandbox's end breaks the answer off, by which clients know.
pub(super) fn told(sandbox: Sandbox, execution: Arc<Execution>) -> Response {
    let listener = Listener::of(sandbox.app.clone(), sandbox.who.clone(), &execution);
    let telling = Telling {
        events: Box::pin(follow(Arc::clone(&execution), 0, Some(listener))),
        gone: Box::pin(sandbox.gone()),
        sandbox,
        execution,
        is_counted: false,
        has_failed: false,
        restarted: None,
        is_over: false,
    };
    let body = Body::from_stream(stream::unfold(telling, |mut telling| async move {
        let piece = telling.next().await?;
        Some((piece, telling))
    }));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

struct Telling {
    events: Pin<Box<dyn Stream<Item = Arc<Logged>> + Send>>,
    gone: Pin<Box<dyn Future<Output = ()> + Send>>,
    sandbox: Sandbox,
    execution: Arc<Execution>,
    is_counted: bool,
    has_failed: bool,
    restarted: Option<RestartCause>,
    is_over: bool,
}

impl Telling {
    /// The next lines that there are.
    async fn next(&mut self) -> Option<Result<Bytes, Gone>> {
        while !self.is_over {
            let event = tokio::select! {
                biased;
                () = self.gone.as_mut() => return Some(self.break_off()),
                event = self.events.next() => event,
                () = tokio::time::sleep(KEEPALIVE) => return Some(Ok(written(&[Line::Keepalive]))),
            };
            let lines = match event.as_deref() {
                Some(Logged { event: ExecutionEvent::Completed, .. }) => self.end().await,
                // The next process goes on with it, which its caller cannot hear.
                None => self.end().await,
                Some(logged) => self.lines(logged).await,
            };
            match lines {
                Some(lines) if lines.is_empty() => {}
                Some(lines) => return Some(Ok(written(&lines))),
                None => return Some(self.break_off()),
            }
        }
        None
    }

    fn break_off(&mut self) -> Result<Bytes, Gone> {
        self.is_over = true;
        Err(Gone)
    }

    async fn lines(&mut self, logged: &Logged) -> Option<Vec<Line>> {
        let mut lines = Vec::new();
        let timestamp = || logged.at.to_string();
        match &logged.event {
            ExecutionEvent::Text { stream, text } => {
                self.count(&mut lines);
                lines.push(of_text(*stream, text.clone(), timestamp()));
            }
            ExecutionEvent::Result(output) => {
                self.count(&mut lines);
                let (result, left_out) = result(&self.sandbox, &self.execution, output).await;
                lines.push(result);
                lines.extend(left_out.map(|text| Line::Stderr { text, timestamp: timestamp() }));
            }
            ExecutionEvent::Error(error) => {
                self.count(&mut lines);
                self.has_failed = true;
                lines.push(of_error(error));
            }
            ExecutionEvent::OutputTruncated { what, omitted_bytes, .. } => {
                let stream = if *what == Truncated::Stdout { TextStream::Stdout } else { TextStream::Stderr };
                let kind = if *what == Truncated::Results { " of results" } else { "" };
                let text = format!("\n[… {omitted_bytes} bytes{kind} left out …]\n");
                lines.push(of_text(stream, text, timestamp()));
            }
            ExecutionEvent::KernelRestarted { cause } => self.restarted = Some(cause.clone()),
            // It is not told here what changes in what was shown; nor do clients answer.
            ExecutionEvent::Queued { .. }
            | ExecutionEvent::Started
            | ExecutionEvent::ResultUpdate { .. }
            | ExecutionEvent::OutputClear { .. }
            | ExecutionEvent::InputRequested { .. }
            | ExecutionEvent::Comm(_)
            | ExecutionEvent::Completed => {}
        }
        Some(lines)
    }

    /// The count comes before all output, once.
    fn count(&mut self, lines: &mut Vec<Line>) {
        if let (false, Some(execution_count)) = (self.is_counted, self.execution.execution_count()) {
            self.is_counted = true;
            lines.push(Line::NumberOfExecutions { execution_count });
        }
    }

    /// The last lines; none when its sandbox has gone with it.
    async fn end(&mut self) -> Option<Vec<Line>> {
        let status = self.execution.status();
        let may_be_gone = matches!(status, Status::Lost | Status::Cancelled);
        if may_be_gone && tokio::time::timeout(GONE_IS_SEEN, self.gone.as_mut()).await.is_ok() {
            return None;
        }
        self.is_over = true;
        let mut lines = Vec::new();
        self.count(&mut lines);
        let why = failure(status, self.restarted.as_ref()).filter(|_| !self.has_failed);
        lines.extend(why.map(|(name, otherwise)| {
            let value = self.execution.detail().unwrap_or_else(|| otherwise.to_owned());
            Line::Error { name: name.to_owned(), value, traceback: String::new() }
        }));
        lines.push(Line::EndOfExecution);
        Some(lines)
    }
}

/// A rich output, and what is to be said of those parts that cannot be told.
async fn result(sandbox: &Sandbox, execution: &Execution, output: &RichOutput) -> (Line, Option<String>) {
    let (mut fields, mut extra, mut left_out) = (BTreeMap::new(), BTreeMap::new(), String::new());
    for (mime, part) in &output.data {
        match content(sandbox, execution, mime, part).await {
            Ok(content) => {
                match FIELDS.iter().find(|(known, _)| known == mime) {
                    Some((_, "text")) => fields.insert("text", unquoted(content)),
                    Some((_, field)) => fields.insert(*field, content),
                    None => extra.insert(mime.clone(), content),
                };
            }
            Err(unfit) => left_out.push_str(&format!("[a result's {mime} is left out: {unfit}]\n")),
        }
    }
    let is_main_result = output.kind == ResultKind::ExecuteResult;
    (Line::Result { fields, extra, is_main_result }, (!left_out.is_empty()).then_some(left_out))
}

/// A content, wherever it stands.
async fn content(
    sandbox: &Sandbox,
    execution: &Execution,
    mime: &str,
    part: &MimePart,
) -> Result<Box<RawValue>, Unfit> {
    let blob = match part {
        MimePart::Inline(JsonText(text)) => return clean(text),
        MimePart::Blob(blob) => blob,
    };
    let found = sandbox.app.service.blob(&sandbox.who, execution.id, blob.number).await;
    let bytes = match found.map_err(|_| Unfit::Gone)?.body {
        BlobBody::Memory(bytes) => bytes.to_vec(),
        BlobBody::File(mut file) => {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).await.map_err(|_| Unfit::Gone)?;
            bytes
        }
    };
    clean(&content_text(mime, bytes).ok_or(Unfit::Malformed)?.0)
}

/// How an execution ended that did not fail by itself: the name that clients know, and words if there are no others.
fn failure(status: Status, restarted: Option<&RestartCause>) -> Option<(&'static str, &'static str)> {
    match (status, restarted) {
        (Status::Ok | Status::Error, _) => None,
        (_, Some(RestartCause::Requested)) => Some(("ContextRestarting", "its context was restarted")),
        (Status::Cancelled, _) => Some(("ExecutionAborted", "it was taken back")),
        (Status::Timeout, _) => Some(("ExecutionAborted", "it reached its time limit")),
        (Status::InputDenied, _) => Some(("StdinNotImplementedError", "it asked for input, and there is none here")),
        (Status::Oom, _) => Some(("UnexpectedEndOfExecution", "memory ran out and the kernel was ended")),
        (Status::KernelDied, _) => Some(("UnexpectedEndOfExecution", "the kernel's process ended")),
        (Status::Queued | Status::Running, _) => {
            Some(("UnexpectedEndOfExecution", "this server stops; the execution goes on with the next one"))
        }
        (Status::Lost, _) => Some(("UnexpectedEndOfExecution", "its kernel was lost")),
    }
}

fn of_text(stream: TextStream, text: String, timestamp: String) -> Line {
    match stream {
        TextStream::Stdout => Line::Stdout { text, timestamp },
        TextStream::Stderr => Line::Stderr { text, timestamp },
    }
}

fn of_error(error: &ErrorInfo) -> Line {
    let plain = |block: &String| anstream::adapter::strip_str(block).to_string();
    let traceback = error.traceback.iter().map(plain).collect();
    Line::Error { name: error.name.clone(), value: error.value.clone(), traceback }
}

/// A text without the quotes that Python puts around one.
fn unquoted(content: Box<RawValue>) -> Box<RawValue> {
    let Ok(text) = serde_json::from_str::<String>(content.get()) else { return content };
    let inner = ['\'', '"'].into_iter().find_map(|quote| text.strip_prefix(quote)?.strip_suffix(quote));
    inner.and_then(|inner| to_raw_value(inner).ok()).unwrap_or(content)
}

fn written(lines: &[Line]) -> Bytes {
    let mut text = String::new();
    for line in lines {
        // Texts, numbers and JSON that was read: writing them cannot fail.
        push_ascii(&mut text, &serde_json::to_string(line).unwrap_or_default());
        text.push('\n');
    }
    text.into()
}

/// Appends JSON on one line. What is no ASCII stands in strings only, and is escaped there.
fn push_ascii(out: &mut String, json: &str) {
    out.reserve(json.len());
    let mut rest = json;
    while let Some(at) = rest.find(|c: char| !c.is_ascii()) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let Some(other) = rest.chars().next() else { break };
        for unit in other.encode_utf16(&mut [0; 2]) {
            // Writing into a string cannot fail.
            let _ = write!(out, "\\u{unit:04x}");
        }
        rest = &rest[other.len_utf8()..];
    }
    out.push_str(rest);
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn raw(text: &str) -> Box<RawValue> {
        RawValue::from_string(text.to_owned()).unwrap()
    }

    #[test]
    fn lines_are_ascii_and_say_what_was_said() {
        let text = "a\u{2028}b\u{85}c\u{1f600}\u{b}d\r\n\u{7f}é";
        let line = |text: &str| Line::Stdout { text: text.to_owned(), timestamp: "t".to_owned() };
        let bytes = written(&[line(text), Line::EndOfExecution]);
        assert!(bytes.is_ascii());
        let read: Vec<Value> =
            std::str::from_utf8(&bytes).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let expected = [json!({"type": "stdout", "text": text, "timestamp": "t"}), json!({"type": "end_of_execution"})];
        assert_eq!(read, expected);
        assert!(std::str::from_utf8(&bytes).unwrap().contains("\\ud83d\\ude00"));
    }

    #[test]
    fn a_result_has_its_fields_beside_its_type() {
        let result = Line::Result {
            fields: BTreeMap::from([("text", raw("\"é\"")), ("json", raw("{\"a\":[1.50]}"))]),
            extra: BTreeMap::from([("x/y".to_owned(), raw("1"))]),
            is_main_result: true,
        };
        let text = String::from_utf8(written(&[result]).to_vec()).unwrap();
        assert!(text.contains("\"json\":{\"a\":[1.50]}") && text.contains("\"text\":\"\\u00e9\""), "{text}");
        let read: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&read["type"], &read["is_main_result"], &read["extra"]),
            (&json!("result"), &json!(true), &json!({"x/y": 1}))
        );
    }

    #[test]
    fn quotes_around_a_text_go_once() {
        for (text, expected) in
            [("'a'", "a"), ("\"it's\"", "it's"), ("''a''", "'a'"), ("'", "'"), ("'a\"", "'a\""), ("a", "a"), ("''", "")]
        {
            let content = to_raw_value(text).unwrap();
            assert_eq!(serde_json::from_str::<String>(unquoted(content).get()).unwrap(), expected, "{text}");
        }
        assert_eq!(unquoted(raw("[1]")).get(), "[1]");
    }

    #[test]
    fn every_end_that_is_no_good_one_has_a_name() {
        for status in Status::FINAL {
            assert_eq!(failure(status, None).is_none(), matches!(status, Status::Ok | Status::Error), "{status:?}");
        }
        assert_eq!(failure(Status::Cancelled, Some(&RestartCause::Requested)).unwrap().0, "ContextRestarting");
        assert!(failure(Status::Running, None).is_some(), "the next server goes on with it");
    }
}
