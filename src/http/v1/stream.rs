//! Events on the wire, an execution's and others': server-sent events, or one JSON object a line. Both carry the same objects.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body as RawBody, Bytes};
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::stream::{self, Stream, StreamExt};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::sync::watch;

use super::executions::{ErrorView, ExecutionView, Listener, ResultView, bundle, raw, restart_cause};
use crate::domain::output::{Comm, CommKind, ExecutionEvent, TextStream};
use crate::domain::spec::FieldError;
use crate::http::problem::{self, Problem};
use crate::session::execution::{Execution, Logged};

/// A silent stream says that it lives this often.
const PING: Duration = Duration::from_secs(15);

/// How events are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// `text/event-stream`.
    Sse,
    /// `application/x-ndjson`.
    Ndjson,
}

impl Format {
    /// The stream that a caller accepts, if it asks for one.
    pub(super) fn wanted(headers: &HeaderMap) -> Option<Self> {
        let accept = headers.get(header::ACCEPT)?.to_str().ok()?;
        let known = accept.split(',').find_map(|part| match part.split(';').next()?.trim() {
            "text/event-stream" => Some(Some(Self::Sse)),
            "application/x-ndjson" | "application/ndjson" => Some(Some(Self::Ndjson)),
            "application/json" => Some(None),
            _ => None,
        });
        known.flatten()
    }
}

/// Answers with an execution's events after number `after`, to the last one. `listener` lives as long as the answer.
pub(super) fn respond(execution: Arc<Execution>, after: u64, format: Format, listener: Option<Listener>) -> Response {
    write(events(execution, after, listener), format)
}

/// Answers with events: their numbers, their names, and what they say beside these.
pub(super) fn write<B>(events: impl Stream<Item = (u64, &'static str, B)> + Send + 'static, format: Format) -> Response
where
    B: Serialize,
{
    match format {
        Format::Sse => {
            let events = events.map(|(seq, name, body)| {
                Ok::<_, Infallible>(Event::default().id(seq.to_string()).event(name).data(text_of(&body)))
            });
            Sse::new(events).keep_alive(KeepAlive::new().interval(PING).text("ping")).into_response()
        }
        Format::Ndjson => {
            let lines = events.map(|(seq, name, body)| {
                let mut line = text_of(&Object { name, seq, body });
                line.push('\n');
                Ok::<_, Infallible>(Bytes::from(line))
            });
            ([(header::CONTENT_TYPE, "application/x-ndjson")], RawBody::from_stream(lines)).into_response()
        }
    }
}

/// The last event that a caller has, who takes a stream up again.
pub(super) fn last_event(headers: &HeaderMap) -> Result<u64, Problem> {
    match headers.get("last-event-id").map(|v| v.to_str().unwrap_or_default().parse::<u64>()) {
        None => Ok(0),
        Some(Ok(after)) => Ok(after),
        Some(Err(_)) => {
            let field = FieldError::new("Last-Event-ID", "allowed is the id of an event of this stream");
            Err(Problem::new(problem::INVALID_REQUEST, "a header is not understood").with_fields(vec![field]))
        }
    }
}

/// An event as a line of NDJSON has it, without the end of the line.
#[must_use]
pub fn event_line(execution: &Execution, logged: &Logged) -> String {
    let (name, body) = describe(execution, &logged.event, logged.at);
    text_of(&Object { name, seq: logged.seq, body })
}

struct Follow {
    execution: Arc<Execution>,
    version: watch::Receiver<u64>,
    seq: u64,
    ready: VecDeque<Arc<Logged>>,
    done: bool,
    _listener: Option<Listener>,
}

fn events(
    execution: Arc<Execution>,
    after: u64,
    listener: Option<Listener>,
) -> impl Stream<Item = (u64, &'static str, Body)> {
    let told = Arc::clone(&execution);
    follow(execution, after, listener).map(move |logged| {
        let (name, body) = describe(&told, &logged.event, logged.at);
        (logged.seq, name, body)
    })
}

/// An execution's events after number `after`, as they happen, to the last one or to this process's end. `listener` lives as long as they are listened to.
pub(in crate::http) fn follow(
    execution: Arc<Execution>,
    after: u64,
    listener: Option<Listener>,
) -> impl Stream<Item = Arc<Logged>> {
    let version = execution.subscribe();
    let follow = Follow { execution, version, seq: after, ready: VecDeque::new(), done: false, _listener: listener };
    stream::unfold(follow, |mut follow| async move {
        if follow.done {
            return None;
        }
        loop {
            if let Some(logged) = follow.ready.pop_front() {
                follow.seq = logged.seq;
                follow.done = logged.event == ExecutionEvent::Completed;
                return Some((logged, follow));
            }
            // Looked at before the events, so that one which comes in between wakes us.
            follow.version.mark_unchanged();
            follow.ready = follow.execution.events_after(follow.seq).into();
            if follow.ready.is_empty() {
                if !follow.execution.is_followed() {
                    // Nobody can have seen what has not happened: who says so is told the end again.
                    let last = follow.execution.last_seq();
                    if follow.seq <= last {
                        return None;
                    }
                    follow.seq = last.saturating_sub(1);
                    continue;
                }
                follow.version.changed().await.ok()?;
            }
        }
    })
}

/// What an event says beside its type and number. Written as it is: JSON of a kernel is copied through, never read, since it may
/// be what a reader of JSON refuses.
#[derive(Serialize)]
#[serde(untagged)]
enum Body {
    Queued { position: usize, execution_id: String },
    Started { execution_id: String },
    Text { text: String, at: String },
    Result(ResultView),
    Update { display_id: String, data: BTreeMap<String, Box<RawValue>>, metadata: Box<RawValue> },
    Clear { wait: bool },
    Input { prompt: String, password: bool },
    Comm { msg_type: &'static str, content: Box<RawValue>, metadata: Box<RawValue>, buffers_base64: Vec<String> },
    Error(ErrorView),
    Truncated { stream: &'static str, bytes: u64, total_bytes: u64 },
    Restarted { cause: &'static str },
    Completed { execution: Box<ExecutionView> },
}

/// An event as one object.
#[derive(Serialize)]
struct Object<B> {
    #[serde(rename = "type")]
    name: &'static str,
    seq: u64,
    #[serde(flatten)]
    body: B,
}

/// Structures of texts, numbers and well-formed JSON: writing them can't fail.
fn text_of<T: Serialize>(body: &T) -> String {
    serde_json::to_string(body).unwrap_or_default()
}

fn describe(execution: &Execution, event: &ExecutionEvent, at: Timestamp) -> (&'static str, Body) {
    let execution_id = || execution.id.to_string();
    match event.clone() {
        ExecutionEvent::Queued { position } => {
            ("execution.queued", Body::Queued { position, execution_id: execution_id() })
        }
        ExecutionEvent::Started => ("execution.started", Body::Started { execution_id: execution_id() }),
        ExecutionEvent::Text { stream, text } => {
            let name = if stream == TextStream::Stdout { "stdout" } else { "stderr" };
            (name, Body::Text { text, at: super::sessions::time(at) })
        }
        ExecutionEvent::Result(output) => ("result", Body::Result(ResultView::of(execution, &output))),
        ExecutionEvent::ResultUpdate { display_id, data, metadata } => {
            ("result.update", Body::Update { display_id, data: bundle(execution, &data), metadata: raw(&metadata) })
        }
        ExecutionEvent::OutputClear { wait } => ("output.clear", Body::Clear { wait }),
        ExecutionEvent::InputRequested { prompt, password } => ("input.requested", Body::Input { prompt, password }),
        ExecutionEvent::Comm(comm) => ("comm", comm_body(&comm)),
        ExecutionEvent::Error(error) => ("error", Body::Error(ErrorView::of(error))),
        ExecutionEvent::OutputTruncated { what, omitted_bytes, total_bytes } => {
            ("output.truncated", Body::Truncated { stream: what.word(), bytes: omitted_bytes, total_bytes })
        }
        ExecutionEvent::KernelRestarted { cause } => {
            ("kernel.restarted", Body::Restarted { cause: restart_cause(&cause) })
        }
        ExecutionEvent::Completed => {
            ("execution.completed", Body::Completed { execution: Box::new(ExecutionView::of(execution)) })
        }
    }
}

fn comm_body(comm: &Comm) -> Body {
    let msg_type = match comm.kind {
        CommKind::Open => "comm_open",
        CommKind::Message => "comm_msg",
        CommKind::Close => "comm_close",
    };
    let buffers_base64 = comm.buffers.iter().map(|buffer| BASE64.encode(buffer)).collect();
    Body::Comm { msg_type, content: raw(&comm.content), metadata: raw(&comm.metadata), buffers_base64 }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::domain::output::{JsonText, MimeBundle, MimePart, ResultKind, RichOutput};
    use crate::domain::spec::OutputLimits;
    use crate::session::execution::{ExecutionRequest, Place};

    #[test]
    fn json_of_a_kernel_is_written_as_it_is() {
        let limits =
            OutputLimits { text_bytes: 1, result_bytes: 1, total_bytes: 1, messages: 1, messages_per_second: 1 };
        let request = ExecutionRequest::for_tests(limits);
        let execution = Execution::new(Uuid::from_u128(1).into(), Place::for_tests(), request, 0);
        for json in [format!("{}1{}", "[".repeat(300), "]".repeat(300)), "9".repeat(400), "\"\\ud800\"".to_owned()] {
            let data = MimeBundle::from([("application/json".to_owned(), MimePart::Inline(JsonText(json.clone())))]);
            let metadata = JsonText::object();
            let event =
                ExecutionEvent::Result(RichOutput { kind: ResultKind::DisplayData, data, metadata, display_id: None });
            let line = event_line(&execution, &Logged { seq: 7, at: Timestamp::now(), event });
            assert!(line.contains(&format!("\"application/json\":{json}")), "{line}");
            assert!(line.contains("\"type\":\"result\"") && line.contains("\"seq\":7"), "{line}");
        }
    }
}
