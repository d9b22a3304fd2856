//! Jupyter messages: building requests, and reading what a kernel answers.
//!
//! Written after "Messaging in Jupyter" (protocol 5.3). Only what the control plane acts on is read. The rest stays JSON text, once it is fit
//! for whoever reads the answers: what is not is left out.

use std::borrow::Cow;
use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::domain::output::{
    Comm, CommKind, ErrorInfo, ExecutionEvent, JsonText, MimeBundle, MimePart, NamedValues, ResultKind, RichOutput,
    TextStream,
};
use crate::json;

/// Most MIME types in one bundle; the rest is dropped.
const MAX_MIME_TYPES: usize = 32;
/// Longest name, prompt or display id taken from a kernel, in bytes.
const MAX_NAME: usize = 4096;
/// Longest description of a language, in bytes.
const MAX_LANGUAGE_INFO: usize = 16 * 1024;
/// Most payloads of a reply.
const MAX_PAYLOADS: usize = 16;
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
    let header = Bytes::from(header(msg_id, session, msg_type).to_string());
    let parts = vec![header, parent_header, Bytes::from_static(b"{}"), Bytes::from(content.to_string())];
    Request { msg_id: msg_id.to_owned(), parts }
}

/// Builds a message of a comm, with its buffers.
#[must_use]
pub fn comm(msg_id: &str, session: &str, comm: &Comm) -> Request {
    let msg_type = match comm.kind {
        CommKind::Open => "comm_open",
        CommKind::Message => "comm_msg",
        CommKind::Close => "comm_close",
    };
    let text = |JsonText(text): &JsonText| Bytes::from(text.clone());
    let header = Bytes::from(header(msg_id, session, msg_type).to_string());
    let fixed = [header, Bytes::from_static(b"{}"), text(&comm.metadata), text(&comm.content)];
    let parts = fixed.into_iter().chain(comm.buffers.iter().cloned().map(Bytes::from)).collect();
    Request { msg_id: msg_id.to_owned(), parts }
}

/// A header of ours.
pub(super) fn header(msg_id: &str, session: &str, msg_type: &str) -> Value {
    json!({
        "msg_id": msg_id,
        "session": session,
        "username": "cellblock",
        "date": jiff::Timestamp::now().to_string(),
        "msg_type": msg_type,
        "version": "5.3",
    })
}

/// What an `execute_request` asks for.
#[derive(Debug, Clone, Copy)]
pub struct Execute<'a> {
    /// The code.
    pub code: &'a str,
    /// Nothing is shown and nothing is counted.
    pub silent: bool,
    /// It takes part in the kernel's count.
    pub store_history: bool,
    /// It may ask for input.
    pub allow_stdin: bool,
    /// Evaluated after it.
    pub user_expressions: &'a BTreeMap<String, String>,
}

/// The content of an `execute_request`.
#[must_use]
pub fn execute_content(asked: &Execute<'_>) -> Value {
    json!({
        "code": asked.code,
        "silent": asked.silent,
        "store_history": asked.store_history && !asked.silent,
        "user_expressions": asked.user_expressions,
        "allow_stdin": asked.allow_stdin,
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
    /// Values of the user expressions, as the kernel says them.
    pub user_expressions: NamedValues,
    /// Pages, the next input, as the kernel says them.
    pub payloads: Vec<JsonText>,
}

impl ExecuteReply {
    /// What stands for a reply that never came, of an execution that is done.
    #[must_use]
    pub fn done() -> Self {
        let (user_expressions, payloads) = (NamedValues::new(), Vec::new());
        Self { ok: true, execution_count: None, error: None, leaving: false, user_expressions, payloads }
    }

    /// The same of one that failed.
    #[must_use]
    pub fn failed() -> Self {
        Self { ok: false, ..Self::done() }
    }
}

/// A request for a line of input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputRequest {
    /// What the code asks.
    pub prompt: String,
    /// Whether the answer is to be hidden.
    pub password: bool,
}

/// What stands for the end of the input in an answer to an [`InputRequest`].
pub const END_OF_INPUT: &str = "\u{4}";

/// The content of an `input_reply`.
#[must_use]
pub fn input_content(line: &str) -> Value {
    json!({"status": "ok", "value": line})
}

/// Reads an `input_request`. One that is not understood asks for a line all the same.
#[must_use]
pub fn read_input_request(content: &[u8]) -> InputRequest {
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Asked {
        prompt: String,
        password: bool,
    }
    let asked: Asked = from_json(&String::from_utf8_lossy(content)).unwrap_or_default();
    InputRequest { prompt: bounded(asked.prompt), password: asked.password }
}

/// Reads a message of a comm from its parts: header, parent header, metadata, content, then buffers. `None` when it is none.
#[must_use]
pub fn read_comm(msg_type: &str, parts: &[Bytes]) -> Option<ExecutionEvent> {
    let kind = match msg_type {
        "comm_open" => CommKind::Open,
        "comm_msg" => CommKind::Message,
        "comm_close" => CommKind::Close,
        _ => return None,
    };
    let metadata = read_object(parts.get(2)?).unwrap_or_else(JsonText::object);
    let content = read_object(parts.get(3)?)?;
    let buffers = parts.iter().skip(4).map(|buffer| buffer.to_vec()).collect();
    Some(ExecutionEvent::Comm(Comm { kind, content, metadata, buffers }))
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
        "execute_input" => {
            count(from_json::<CountContent<'_>>(text)?.execution_count).map_or(Iopub::Other, Iopub::ExecutionCount)
        }
        _ => Iopub::Other,
    })
}

/// Reads an `execute_reply`.
///
/// # Errors
/// When the content is not JSON of its form.
pub fn read_execute_reply(content: &[u8]) -> Result<ExecuteReply, Unreadable> {
    let text = String::from_utf8_lossy(content);
    let reply: ReplyContent<'_> =
        from_json(&text).map_err(|source| Unreadable { msg_type: "execute_reply".to_owned(), source })?;
    let error = (reply.status == "error")
        .then(|| ErrorContent { ename: reply.ename, evalue: reply.evalue, traceback: reply.traceback }.into_info());
    let read = |raw: &RawValue| from_json::<Payload>(raw.get()).unwrap_or_default();
    let is_exit = |raw: &&RawValue| read(raw).source == "ask_exit";
    let leaving = reply.payload.iter().copied().filter(is_exit).any(|raw| !read(raw).keepkernel);
    let payloads = reply.payload.iter().copied().filter(|raw| !is_exit(raw)).take(MAX_PAYLOADS);
    let values = reply.user_expressions.into_iter();
    Ok(ExecuteReply {
        ok: reply.status == "ok",
        execution_count: count(reply.execution_count),
        error,
        leaving,
        user_expressions: values.filter_map(|(name, value)| Some((name.into_owned(), fit(value)?))).collect(),
        payloads: payloads.filter_map(fit).collect(),
    })
}

/// A count that may be any number.
fn count(raw: Option<&RawValue>) -> Option<u64> {
    raw?.get().parse().ok()
}

/// The language that a `kernel_info_reply` names, and all it says of it, if it names one.
#[must_use]
pub fn language_of(content: &[u8]) -> Option<(String, JsonText)> {
    #[derive(Deserialize)]
    struct Info<'a> {
        #[serde(borrow)]
        language_info: &'a RawValue,
    }
    #[derive(Deserialize)]
    struct Language {
        name: String,
    }
    let text = String::from_utf8_lossy(content);
    let info: Info<'_> = from_json(&text).ok()?;
    let language: Language = from_json(info.language_info.get()).ok()?;
    let info = Some(info.language_info).filter(|info| info.get().len() <= MAX_LANGUAGE_INFO).and_then(fit);
    let is_name = |name: &String| name.len() <= 64 && name.chars().all(|c| c.is_ascii_graphic() || c == ' ');
    Some(language.name).filter(is_name).map(|name| (name, info.unwrap_or_else(JsonText::object)))
}

/// Reads a content that is to be passed on as it is; `None` when it is no object.
#[must_use]
pub fn read_object(content: &[u8]) -> Option<JsonText> {
    let text = String::from_utf8_lossy(content);
    let raw: &RawValue = from_json(&text).ok()?;
    raw.get().starts_with('{').then(|| fit(raw)).flatten()
}

/// JSON of a kernel as others can read it. Most of it is a text without escapes, which is fit as it is.
fn fit(raw: &RawValue) -> Option<JsonText> {
    let text = raw.get();
    if text.starts_with('"') && !text.contains("\\u") {
        return Some(JsonText(text.to_owned()));
    }
    json::clean(text).ok().map(|clean| JsonText(clean.get().to_owned()))
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
            .filter_map(|(mime, value)| Some((mime.to_string(), MimePart::Inline(fit(value)?))))
            .collect()
    }

    fn metadata(&self) -> JsonText {
        self.metadata.filter(|m| m.get().starts_with('{')).and_then(fit).unwrap_or_else(JsonText::object)
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
struct CountContent<'a> {
    #[serde(borrow, default)]
    execution_count: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct ReplyContent<'a> {
    status: String,
    #[serde(borrow, default)]
    execution_count: Option<&'a RawValue>,
    #[serde(default)]
    ename: String,
    #[serde(default)]
    evalue: String,
    #[serde(default)]
    traceback: Vec<String>,
    #[serde(borrow, default)]
    payload: Vec<&'a RawValue>,
    #[serde(borrow, default)]
    user_expressions: BTreeMap<Cow<'a, str>, &'a RawValue>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Payload {
    source: String,
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
        let json = MimePart::Inline(JsonText(r#"{"a":[1,2]}"#.to_owned()));
        assert_eq!(output.data["application/json"], json);
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
    fn a_count_of_any_length_does_not_lose_the_reply() {
        let content = format!("{{\"status\":\"ok\",\"execution_count\":{}}}", "9".repeat(400));
        let reply = read_execute_reply(content.as_bytes()).unwrap();
        assert!(reply.ok && reply.execution_count.is_none());
        assert_eq!(read_iopub("execute_input", content.as_bytes()).unwrap(), Iopub::Other);
    }

    #[test]
    fn values_and_payloads_are_carried_as_they_are() {
        let content =
            br#"{"status":"ok","execution_count":3,"user_expressions":{"a":{"status":"ok","data":{"text/plain":"1"}}},
            "payload":[{"source":"page","start":0},{"source":"ask_exit","keepkernel":true}]}"#;
        let reply = read_execute_reply(content).unwrap();
        assert_eq!(reply.user_expressions["a"].0, r#"{"status":"ok","data":{"text/plain":"1"}}"#);
        assert_eq!(reply.payloads, [JsonText(r#"{"source":"page","start":0}"#.to_owned())]);
        assert!(!reply.leaving);
    }

    #[test]
    fn a_comm_is_carried_with_its_buffers() {
        let parts = ["{}", "{}", "{}", r#"{"comm_id":"c","data":{}}"#, "\0\u{1}"].map(|p| Bytes::from(p.to_owned()));
        let Some(ExecutionEvent::Comm(comm)) = read_comm("comm_msg", &parts) else { panic!("not read") };
        assert_eq!((comm.kind, comm.buffers), (CommKind::Message, vec![vec![0, 1]]));
        assert_eq!(read_comm("stream", &parts), None);
        assert_eq!(read_comm("comm_open", &parts[..3]), None);
    }

    #[test]
    fn what_no_reader_takes_is_left_out_or_mended_and_the_rest_stays() {
        let deep = |n| format!("{}{}", "[".repeat(n), "]".repeat(n));
        for (json, expected) in [
            (deep(90_000), None),
            ("9".repeat(400), None),
            ("[1e999]".to_owned(), None),
            (deep(3), Some(deep(3))),
            ("\"\\ud800\"".to_owned(), Some("\"\\ufffd\"".to_owned())),
        ] {
            let content =
                format!(r#"{{"data":{{"text/plain":"x","application/json":{json}}},"metadata":{{"a":{json}}}}}"#);
            let Ok(Iopub::Output(ExecutionEvent::Result(output))) = read_iopub("display_data", content.as_bytes())
            else {
                panic!("not read: {}", &json[..10]);
            };
            assert_eq!(output.data["text/plain"], MimePart::Inline(JsonText("\"x\"".to_owned())));
            let found = output.data.get("application/json");
            assert_eq!(found, expected.clone().map(|e| MimePart::Inline(JsonText(e))).as_ref());
            assert_eq!(output.metadata.0, expected.map_or("{}".to_owned(), |e| format!("{{\"a\":{e}}}")));
        }
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
