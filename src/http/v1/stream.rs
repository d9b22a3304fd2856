//! An execution's events on the wire: server-sent events, or one JSON object a line. Both carry the same objects.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream, StreamExt};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::executions::{ErrorView, ExecutionView, Listener, ResultView, bundle, raw, restart_cause, truncated};
use crate::domain::output::{ExecutionEvent, TextStream};
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
        accept.split(',').find_map(|part| match part.split(';').next()?.trim() {
            "text/event-stream" => Some(Self::Sse),
            "application/x-ndjson" | "application/ndjson" => Some(Self::Ndjson),
            _ => None,
        })
    }
}

/// Answers with an execution's events after number `after`, to the last one. `listener` lives as long as the answer.
pub(super) fn respond(execution: Arc<Execution>, after: u64, format: Format, listener: Option<Listener>) -> Response {
    let events = events(execution, after, listener);
    match format {
        Format::Sse => {
            let events = events.map(|(seq, name, body)| {
                Ok::<_, Infallible>(Event::default().id(seq.to_string()).event(name).data(body.to_string()))
            });
            Sse::new(events).keep_alive(KeepAlive::new().interval(PING).text("ping")).into_response()
        }
        Format::Ndjson => {
            let lines = events.map(|(seq, name, body)| {
                let mut line = object(seq, name, body).to_string();
                line.push('\n');
                Ok::<_, Infallible>(Bytes::from(line))
            });
            ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
        }
    }
}

/// An event as one object, as a line of NDJSON has it.
#[must_use]
pub fn event_object(execution: &Execution, logged: &Logged) -> Value {
    let (name, body) = describe(execution, logged);
    object(logged.seq, name, body)
}

fn object(seq: u64, name: &str, mut body: Value) -> Value {
    body["type"] = name.into();
    body["seq"] = seq.into();
    body
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
) -> impl Stream<Item = (u64, &'static str, Value)> {
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
                let (name, body) = describe(&follow.execution, &logged);
                return Some(((logged.seq, name, body), follow));
            }
            // Looked at before the events, so that one which comes in between wakes us.
            follow.version.mark_unchanged();
            follow.ready = follow.execution.events_after(follow.seq).into();
            if follow.ready.is_empty() {
                if follow.execution.status().is_final() && follow.execution.events_after(follow.seq).is_empty() {
                    return None;
                }
                follow.version.changed().await.ok()?;
            }
        }
    })
}

fn describe(execution: &Execution, logged: &Logged) -> (&'static str, Value) {
    match &logged.event {
        ExecutionEvent::Queued { position } => {
            ("execution.queued", json!({"position": position, "execution_id": execution.id.to_string()}))
        }
        ExecutionEvent::Started => ("execution.started", json!({"execution_id": execution.id.to_string()})),
        ExecutionEvent::Text { stream, text } => {
            let name = if *stream == TextStream::Stdout { "stdout" } else { "stderr" };
            (name, json!({"text": text, "at": super::sessions::time(logged.at)}))
        }
        ExecutionEvent::Result(output) => ("result", json!(ResultView::of(output))),
        ExecutionEvent::ResultUpdate { display_id, data, metadata } => {
            ("result.update", json!({"display_id": display_id, "data": bundle(data), "metadata": raw(metadata)}))
        }
        ExecutionEvent::OutputClear { wait } => ("output.clear", json!({"wait": wait})),
        ExecutionEvent::InputRequested { prompt, password } => {
            ("input.requested", json!({"prompt": prompt, "password": password}))
        }
        ExecutionEvent::Error(error) => ("error", json!(ErrorView::of(error.clone()))),
        ExecutionEvent::OutputTruncated { what, omitted_bytes, total_bytes } => (
            "output.truncated",
            json!({"stream": truncated(*what), "bytes": omitted_bytes, "total_bytes": total_bytes}),
        ),
        ExecutionEvent::KernelRestarted { cause } => ("kernel.restarted", json!({"cause": restart_cause(cause)})),
        ExecutionEvent::Completed => ("execution.completed", json!({"execution": ExecutionView::of(execution)})),
    }
}
