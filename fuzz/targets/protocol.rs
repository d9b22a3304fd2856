//! The control plane's reading of what kernels say: any content gives what it says or is refused, within bounds, and what is passed on
//! as JSON can be read by anybody.
#![no_main]

// By path as the guest's decoders are, but here: both sides have a module `json`.
#[allow(dead_code, reason = "the rest of the control plane uses the rest")]
#[path = "../../src/domain/mod.rs"]
mod domain;
#[allow(dead_code, reason = "the rest of the control plane uses the rest")]
#[path = "../../src/json.rs"]
mod json;
#[allow(dead_code, reason = "the rest of the control plane uses the rest")]
#[path = "../../src/kernel/protocol.rs"]
mod protocol;

use bytes::Bytes;
use cellblock_fuzz::filler::Filler;
use cellblock_fuzz::heap;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

use domain::output::{ErrorInfo, ExecutionEvent, JsonText, MimeBundle, MimePart, TextStream};
use protocol::{ExecuteReply, Iopub, language_of, read_comm, read_execute_reply, read_input_request, read_iopub};

const KINDS: [&str; 15] = [
    "stream",
    "display_data",
    "execute_result",
    "update_display_data",
    "error",
    "clear_output",
    "status",
    "execute_input",
    "execute_reply",
    "kernel_info_reply",
    "input_request",
    "comm_open",
    "comm_msg",
    "comm_close",
    "unheard_of",
];
/// What reading may hold: entries of maps and lists cost more than their text.
const HELD: usize = 16 * 1024;
const HELD_PER_BYTE: usize = 64;
const MAX_NAME: usize = 4096;
const MAX_TRACEBACK: usize = 1000;
const MAX_MIME_TYPES: usize = 32;
const MAX_DEPTH: usize = 100;

fuzz_target!(|input: &[u8]| {
    let [kind, length, content @ ..] = input else { return };
    let kind = KINDS[usize::from(*kind) % KINDS.len()];
    let content = Filler::default().fill(content, *length);
    let text = String::from_utf8_lossy(&content);
    let read = heap::at_most(HELD + HELD_PER_BYTE * text.len(), || Read::of(kind, &content));
    read.check_bounds();
    // Written anew, fields have one value each and numbers one form: what is read then is known.
    if let Ok(value) = serde_json::from_str::<Value>(&text)
        && let Value::Object(_) = &value
    {
        let plain = value.to_string();
        assert_eq!(Read::of(kind, plain.as_bytes()).in_short(), expected(kind, &value), "{kind} {plain}");
    }
});

#[derive(Debug)]
enum Read {
    Iopub(Iopub),
    Reply(ExecuteReply),
    Refused,
}

impl Read {
    fn of(kind: &str, content: &[u8]) -> Self {
        let _ = language_of(content).inspect(|(name, info)| check_language(name, info));
        assert!(read_input_request(content).prompt.len() <= MAX_NAME);
        if kind == "execute_reply" {
            return read_execute_reply(content).map_or(Self::Refused, Self::Reply);
        }
        let part = || Bytes::copy_from_slice(content);
        if let Some(event) = read_comm(kind, &[part(), part(), part(), part(), part()]) {
            return Self::Iopub(Iopub::Output(event));
        }
        read_iopub(kind, content).map_or(Self::Refused, Self::Iopub)
    }

    fn check_bounds(&self) {
        match self {
            Self::Iopub(Iopub::Output(event)) => check_event(event),
            Self::Reply(reply) => {
                reply.error.iter().for_each(check_error);
                reply.user_expressions.values().chain(&reply.payloads).for_each(check_json);
            }
            Self::Iopub(_) | Self::Refused => {}
        }
    }

    /// What is of use in it, in a form that the expectation can have too.
    fn in_short(&self) -> Option<Vec<String>> {
        match self {
            Self::Refused => None,
            Self::Iopub(Iopub::Other) => Some(Vec::new()),
            Self::Iopub(Iopub::Status { idle }) => Some(vec![idle.to_string()]),
            Self::Iopub(Iopub::ExecutionCount(count)) => Some(vec![count.to_string()]),
            Self::Iopub(Iopub::Output(event)) => Some(event_in_short(event)),
            Self::Reply(reply) => {
                let mut short = vec![reply.ok.to_string(), format!("{:?}", reply.execution_count)];
                short.extend(reply.error.iter().flat_map(error_in_short));
                short.extend(reply.user_expressions.iter().map(|(name, value)| format!("{name} {}", value.0)));
                Some(short)
            }
        }
    }
}

fn check_event(event: &ExecutionEvent) {
    match event {
        ExecutionEvent::Result(output) => {
            check_bundle(&output.data, &output.metadata, output.display_id.as_deref().unwrap_or_default());
        }
        ExecutionEvent::ResultUpdate { display_id, data, metadata } => check_bundle(data, metadata, display_id),
        ExecutionEvent::Error(error) => check_error(error),
        ExecutionEvent::Comm(comm) => {
            assert!(comm.content.0.starts_with('{') && comm.metadata.0.starts_with('{') && comm.buffers.len() == 1);
            check_json(&comm.content);
            check_json(&comm.metadata);
        }
        _ => {}
    }
}

fn check_bundle(data: &MimeBundle, metadata: &JsonText, display_id: &str) {
    assert!(data.len() <= MAX_MIME_TYPES && display_id.len() <= MAX_NAME && metadata.0.starts_with('{'));
    check_json(metadata);
    for (mime, part) in data {
        assert!(is_mime(mime), "{mime:?} is no type");
        match part {
            MimePart::Inline(text) => check_json(text),
            MimePart::Blob(_) => panic!("nothing is kept elsewhere yet"),
        }
    }
}

/// Text that stands in answers as JSON is one value, on one line, that every reader takes.
fn check_json(text: &JsonText) {
    assert!(text.0.trim() == text.0 && !text.0.contains('\n'));
    assert!(serde_json::from_str::<Value>(&text.0).is_ok(), "not fit: {}", text.0);
}

fn check_error(error: &ErrorInfo) {
    assert!(error.name.len() <= MAX_NAME && error.traceback.len() <= MAX_TRACEBACK);
}

fn check_language(name: &str, info: &JsonText) {
    assert!(name.len() <= 64 && name.bytes().all(|b| (b' '..=b'~').contains(&b)) && info.0.len() <= 16 * 1024);
    check_json(info);
}

/// Said otherwise than in the decoder: a token of MIME without what would need quoting, in lower case.
fn is_mime(text: &str) -> bool {
    let (parts, is_token) =
        (text.split('/').count(), |c: char| matches!(c, 'a'..='z' | '0'..='9' | '.' | '+' | '-' | '_'));
    text.len() <= 128 && parts == 2 && text.split('/').all(|part| !part.is_empty() && part.chars().all(is_token))
}

fn event_in_short(event: &ExecutionEvent) -> Vec<String> {
    match event {
        ExecutionEvent::Text { stream, text } => vec![(*stream == TextStream::Stderr).to_string(), text.clone()],
        ExecutionEvent::OutputClear { wait } => vec![wait.to_string()],
        ExecutionEvent::Error(error) => error_in_short(error),
        ExecutionEvent::Result(output) => bundle_in_short(&output.data, &output.metadata, output.display_id.as_deref()),
        ExecutionEvent::ResultUpdate { display_id, data, metadata } => {
            bundle_in_short(data, metadata, Some(display_id))
        }
        ExecutionEvent::Comm(comm) => vec![comm.content.0.clone()],
        other => panic!("{other:?} is nothing a kernel says"),
    }
}

fn error_in_short(error: &ErrorInfo) -> Vec<String> {
    [&error.name, &error.value].into_iter().chain(&error.traceback).cloned().collect()
}

fn bundle_in_short(data: &MimeBundle, metadata: &JsonText, display_id: Option<&str>) -> Vec<String> {
    let mut short = vec![metadata.0.clone(), format!("{display_id:?}")];
    short.extend(data.iter().map(|(mime, part)| format!("{mime} {part:?}")));
    short
}

/// What "Messaging in Jupyter" says of an object, in the same form; `None` where a field is of a wrong type.
fn expected(kind: &str, content: &Value) -> Option<Vec<String>> {
    Some(match kind {
        "stream" => {
            let name = string(content, "name")?;
            vec![(name == "stderr").to_string(), content["text"].as_str()?.to_owned()]
        }
        "display_data" | "execute_result" => expected_bundle(content, expected_display_id(content)?.as_deref())?,
        "update_display_data" => match expected_display_id(content)? {
            Some(id) => expected_bundle(content, Some(&id))?,
            None => expected_bundle(content, None).map(|_| Vec::new())?,
        },
        "error" => expected_error(content)?,
        "clear_output" => vec![content.get("wait").map_or(Some(false), Value::as_bool)?.to_string()],
        "status" => vec![(content["execution_state"].as_str()? == "idle").to_string()],
        "execute_input" => expected_count(content).map(|count| count.to_string()).into_iter().collect(),
        "execute_reply" => expected_reply(content)?,
        "comm_open" | "comm_msg" | "comm_close" => fit(content).into_iter().collect(),
        _ => Vec::new(),
    })
}

fn string<'a>(content: &'a Value, field: &str) -> Option<&'a str> {
    content.get(field).map_or(Some(""), Value::as_str)
}

/// What is passed on as JSON: what is not too deep. Numbers and surrogates that are not fit never got here.
fn fit(value: &Value) -> Option<String> {
    (depth(value) <= MAX_DEPTH).then(|| value.to_string())
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

fn bounded(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_NAME)]
}

fn expected_bundle(content: &Value, display_id: Option<&str>) -> Option<Vec<String>> {
    let metadata = content.get("metadata").filter(|m| m.is_object()).and_then(fit).unwrap_or("{}".to_owned());
    let data = content.get("data").map_or(Some(Vec::new()), |data| Some(data.as_object()?.iter().collect()))?;
    let data = data.into_iter().filter(|(mime, _)| is_mime(mime)).take(MAX_MIME_TYPES);
    let mut short = vec![metadata, format!("{display_id:?}")];
    let part = |value: &Value| fit(value).map(|text| MimePart::Inline(JsonText(text)));
    short.extend(data.filter_map(|(mime, value)| Some(format!("{mime} {:?}", part(value)?))));
    Some(short)
}

/// A structure may stand as a list of its fields, which nobody means but `serde` takes.
fn expected_display_id(content: &Value) -> Option<Option<String>> {
    let id = match content.get("transient") {
        None | Some(Value::Null) => None,
        Some(Value::Object(transient)) => transient.get("display_id"),
        Some(Value::Array(transient)) if transient.len() < 2 => transient.first(),
        Some(_) => return None,
    };
    match id {
        None | Some(Value::Null) => Some(None),
        Some(id) => id.as_str().map(|id| Some(bounded(id).to_owned())),
    }
}

fn expected_error(content: &Value) -> Option<Vec<String>> {
    let traceback = content.get("traceback").map_or(Some([].as_slice()), |t| t.as_array().map(Vec::as_slice))?;
    let lines: Option<Vec<&str>> = traceback.iter().map(Value::as_str).collect();
    let (name, value) = (bounded(string(content, "ename")?), string(content, "evalue")?);
    Some([name, value].into_iter().chain(lines?.into_iter().take(MAX_TRACEBACK)).map(str::to_owned).collect())
}

fn expected_count(content: &Value) -> Option<u64> {
    content.get("execution_count")?.as_u64()
}

fn expected_reply(content: &Value) -> Option<Vec<String>> {
    let (status, error) = (content["status"].as_str()?, expected_error(content)?);
    content.get("payload").map_or(Some(()), |payload| payload.as_array().map(|_| ()))?;
    let nothing = serde_json::Map::new();
    let values = content.get("user_expressions").map_or(Some(&nothing), Value::as_object)?;
    let mut short = vec![(status == "ok").to_string(), format!("{:?}", expected_count(content))];
    short.extend(if status == "error" { error } else { Vec::new() });
    short.extend(values.iter().filter_map(|(name, value)| Some(format!("{name} {}", fit(value)?))));
    Some(short)
}
