//! Jupyter messages: building requests, and reading what a kernel answers.
//!
//! Written after "Messaging in Jupyter" (protocol 5.3). Only what the control plane acts on is read; bundles stay JSON text.

use std::borrow::Cow;
use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::domain::output::{ErrorInfo, ExecutionEvent, JsonText, MimeBundle, ResultKind, RichOutput, TextStream};

/// Most MIME types in one bundle; the rest is dropped.
const MAX_MIME_TYPES: usize = 32;
/// Longest name, prompt or display id taken from a kernel, in bytes.
const MAX_NAME: usize = 4096;
/// Most lines of a traceback.
const MAX_TRACEBACK: usize = 1000;

/// A request to a kernel, ready to be sent.
#[derive(Debug, Clone)]
pub struct Request {
    /// Its id, which its answers name as their parent.
    pub msg_id: String,
    /// Header, parent header, metadata, content.
    pub parts: Vec<Bytes>,
}

/// Builds a request. `session` names the client and must be the same on shell and stdin.
#[must_use]
pub fn request(msg_id: &str, session: &str, msg_type: &str, content: &Value) -> Request {
    reply_to(msg_id, session, msg_type, content, Bytes::from_static(b"{}"))
}

/// Builds a message that answers another one, whose header is given as it came.
#[must_use]
pub fn reply_to(msg_id: &str, session: &str, msg_type: &str, content: &Value, parent_header: Bytes) -> Request {
    let header = json!({
        "msg_id": msg_id,
        "session": session,
        "username": "cellblock",
        "date": jiff::Timestamp::now().to_string(),
        "msg_type": msg_type,
        "version": "5.3",
    });
    let parts = vec![
        Bytes::from(header.to_string()),
        parent_header,
        Bytes::from_static(b"{}"),
        Bytes::from(content.to_string()),
    ];
    Request { msg_id: msg_id.to_owned(), parts }
}

/// The content of an `execute_request`.
#[must_use]
pub fn execute_content(code: &str, silent: bool, store_history: bool, allow_stdin: bool) -> Value {
    json!({
        "code": code,
        "silent": silent,
        "store_history": store_history && !silent,
        "user_expressions": {},
        "allow_stdin": allow_stdin,
        "stop_on_error": false,
    })
}

/// What an iopub message means for the execution it belongs to.
#[derive(Debug, Clone, PartialEq)]
pub enum Iopub {
    /// Goes into the execution's record.
    Output(ExecutionEvent),
    /// The kernel began or ended something.
    Status {
        /// Whether it is idle now.
        idle: bool,
    },
    /// The kernel's count for this execution.
    ExecutionCount(u64),
    /// Nothing the control plane acts on.
    Other,
}

/// A shell reply to an `execute_request`.
#[derive(Debug, Clone, PartialEq)]
pub struct ExecuteReply {
    /// `ok`, `error` or `aborted`.
    pub ok: bool,
    /// The kernel's count.
    pub execution_count: Option<u64>,
    /// The exception, where there was one.
    pub error: Option<ErrorInfo>,
    /// The kernel is going to exit, as after `exit()`.
    pub leaving: bool,
}

/// Content that is not what its message type promises. It is dropped; the execution goes on.
#[derive(Debug, thiserror::Error)]
#[error("the content of a \"{msg_type}\" message is not understood: {source}")]
pub struct Unreadable {
    msg_type: String,
    source: serde_json::Error,
}

/// Reads an iopub message.
///
/// # Errors
/// When the content is not JSON of the type's form.
pub fn read_iopub(msg_type: &str, content: &[u8]) -> Result<Iopub, Unreadable> {
    let text = String::from_utf8_lossy(content);
    read_iopub_text(msg_type, &text).map_err(|source| Unreadable { msg_type: msg_type.to_owned(), source })
}

fn read_iopub_text(msg_type: &str, text: &str) -> Result<Iopub, serde_json::Error> {
    Ok(match msg_type {
        "stream" => Iopub::Output(from_json::<StreamContent>(text)?.into_event()),
        "display_data" => display(text, ResultKind::DisplayData)?,
        "execute_result" => display(text, ResultKind::ExecuteResult)?,
        "update_display_data" => update(from_json(text)?),
        "error" => Iopub::Output(ExecutionEvent::Error(from_json::<ErrorContent>(text)?.into_info())),
        "clear_output" => Iopub::Output(ExecutionEvent::OutputClear { wait: from_json::<ClearContent>(text)?.wait }),
        "status" => Iopub::Status { idle: from_json::<StatusContent>(text)?.execution_state == "idle" },
        "execute_input" => match from_json::<CountContent>(text)?.execution_count {
            Some(count) => Iopub::ExecutionCount(count),
            None => Iopub::Other,
        },
        _ => Iopub::Other,
    })
}

/// Reads an `execute_reply`.
///
/// # Errors
/// When the content is not JSON of its form.
pub fn read_execute_reply(content: &[u8]) -> Result<ExecuteReply, Unreadable> {
    let text = String::from_utf8_lossy(content);
    let reply: ReplyContent =
        from_json(&text).map_err(|source| Unreadable { msg_type: "execute_reply".to_owned(), source })?;
    let error = (reply.status == "error")
        .then(|| ErrorContent { ename: reply.ename, evalue: reply.evalue, traceback: reply.traceback }.into_info());
    let leaving = reply.payload.iter().any(|p| p.source == "ask_exit" && !p.keepkernel);
    Ok(ExecuteReply { ok: reply.status == "ok", execution_count: reply.execution_count, error, leaving })
}

/// The language that a `kernel_info_reply` names, if it names one.
#[must_use]
pub fn language_of(content: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Info {
        language_info: Language,
    }
    #[derive(Deserialize)]
    struct Language {
        name: String,
    }
    let info: Info = from_json(&String::from_utf8_lossy(content)).ok()?;
    Some(info.language_info.name)
        .filter(|name| name.len() <= 64 && name.chars().all(|c| c.is_ascii_graphic() || c == ' '))
}

fn from_json<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, serde_json::Error> {
    serde_json::from_str(text)
}

#[derive(Deserialize)]
struct StreamContent {
    #[serde(default)]
    name: String,
    text: String,
}

impl StreamContent {
    fn into_event(self) -> ExecutionEvent {
        let stream = if self.name == "stderr" { TextStream::Stderr } else { TextStream::Stdout };
        ExecutionEvent::Text { stream, text: self.text }
    }
}

#[derive(Deserialize)]
struct DisplayContent<'a> {
    #[serde(borrow, default)]
    data: BTreeMap<Cow<'a, str>, &'a RawValue>,
    #[serde(borrow, default)]
    metadata: Option<&'a RawValue>,
    #[serde(default)]
    transient: Option<Transient>,
}

#[derive(Deserialize)]
struct Transient {
    #[serde(default)]
    display_id: Option<String>,
}

impl DisplayContent<'_> {
    fn bundle(&self) -> MimeBundle {
        self.data
            .iter()
            .filter(|(mime, _)| is_mime(mime))
            .take(MAX_MIME_TYPES)
            .map(|(mime, value)| (mime.to_string(), JsonText(value.get().to_owned())))
            .collect()
    }

    fn metadata(&self) -> JsonText {
        self.metadata
            .filter(|m| m.get().starts_with('{'))
            .map_or_else(JsonText::object, |m| JsonText(m.get().to_owned()))
    }

    fn display_id(&self) -> Option<String> {
        self.transient.as_ref().and_then(|t| t.display_id.clone()).map(bounded)
    }
}

fn display(text: &str, kind: ResultKind) -> Result<Iopub, serde_json::Error> {
    let content: DisplayContent<'_> = from_json(text)?;
    Ok(Iopub::Output(ExecutionEvent::Result(RichOutput {
        kind,
        data: content.bundle(),
        metadata: content.metadata(),
        display_id: content.display_id(),
    })))
}

fn update(content: DisplayContent<'_>) -> Iopub {
    match content.display_id() {
        Some(display_id) => Iopub::Output(ExecutionEvent::ResultUpdate {
            display_id,
            data: content.bundle(),
            metadata: content.metadata(),
        }),
        None => Iopub::Other,
    }
}

/// `type/subtype` in lower case, as it may stand in an answer. A kernel could name anything.
fn is_mime(text: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty() && p.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b".+-_".contains(&b))
    };
    text.len() <= 128 && text.split_once('/').is_some_and(|(main, sub)| part(main) && part(sub))
}

#[derive(Deserialize)]
struct ErrorContent {
    #[serde(default)]
    ename: String,
    #[serde(default)]
    evalue: String,
    #[serde(default)]
    traceback: Vec<String>,
}

impl ErrorContent {
    fn into_info(mut self) -> ErrorInfo {
        self.traceback.truncate(MAX_TRACEBACK);
        ErrorInfo { name: bounded(self.ename), value: self.evalue, traceback: self.traceback }
    }
}

#[derive(Deserialize)]
struct ClearContent {
    #[serde(default)]
    wait: bool,
}

#[derive(Deserialize)]
struct StatusContent {
    execution_state: String,
}

#[derive(Deserialize)]
struct CountContent {
    #[serde(default)]
    execution_count: Option<u64>,
}

#[derive(Deserialize)]
struct ReplyContent {
    status: String,
    #[serde(default)]
    execution_count: Option<u64>,
    #[serde(default)]
    ename: String,
    #[serde(default)]
    evalue: String,
    #[serde(default)]
    traceback: Vec<String>,
    #[serde(default)]
    payload: Vec<Payload>,
}

#[derive(Deserialize)]
struct Payload {
    #[serde(default)]
    source: String,
    #[serde(default)]
    keepkernel: bool,
}

fn bounded(mut text: String) -> String {
    if text.len() > MAX_NAME {
        let end = (0..=MAX_NAME).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_bundle_keeps_its_json_and_drops_what_is_no_mime_type() {
        let content = br#"{"data":{"text/plain":"4","application/json":{"a":[1,2]},"text/html\r\nX: y":"no"},
            "metadata":{"image/png":{"width":3}},"transient":{"display_id":"d1"}}"#;
        let Ok(Iopub::Output(ExecutionEvent::Result(output))) = read_iopub("display_data", content) else {
            panic!("not read");
        };
        assert_eq!(output.data.len(), 2);
        assert_eq!(output.data["application/json"].0, r#"{"a":[1,2]}"#);
        assert_eq!(output.metadata.0, r#"{"image/png":{"width":3}}"#);
        assert_eq!(output.display_id.as_deref(), Some("d1"));
    }

    #[test]
    fn invalid_utf8_is_replaced_not_refused() {
        let read = read_iopub("stream", b"{\"name\":\"stdout\",\"text\":\"a\xed\xb2\x80b\"}");
        let Ok(Iopub::Output(ExecutionEvent::Text { text, .. })) = read else { panic!("not read") };
        assert!(text.starts_with('a') && text.ends_with('b'));
    }

    #[test]
    fn depth_costs_nothing() {
        let deep = format!(r#"{{"data":{{"application/json":{}{}}}}}"#, "[".repeat(90_000), "]".repeat(90_000));
        let _ = read_iopub("display_data", deep.as_bytes());
    }

    proptest! {
        #[test]
        fn no_content_panics(kind in 0usize..8, content in proptest::collection::vec(any::<u8>(), 0..200)) {
            let kinds = ["stream", "display_data", "execute_result", "update_display_data", "error", "clear_output", "status", "execute_input"];
            let _ = read_iopub(kinds[kind], &content);
            let _ = read_execute_reply(&content);
        }
    }
}
