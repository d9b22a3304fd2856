//! An execution as Jupyter's clients are told of it: its kernel's messages as they come, what a kernel that was replaced did not say, and all of it again from
//! the record, for who was away while this server was another process.
//!
//! A message of an execution has the same id whenever it is told: the execution's, and the number of the event in the record, or a word for what is no event. So who
//! hears something twice can tell.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};

use super::execution::{Execution, Logged};
use super::tap::{Channel, Message, Tap};
use crate::domain::output::{
    Comm, CommKind, ErrorInfo, ExecutionEvent, JsonText, MimeBundle, MimePart, ResultKind, RichOutput, Status,
    TextStream,
};
use crate::kernel::client;

/// What a message of a kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    /// The newest event of the record.
    Newest,
    /// What is no event, and told once.
    Once(&'static str),
    /// Something else, under the kernel's own id.
    Other,
}

/// A message that no kernel has sent, or not as it is told.
struct Draft {
    channel: Channel,
    msg_type: &'static str,
    content: Value,
    buffers: Vec<Bytes>,
}

impl Draft {
    fn iopub(msg_type: &'static str, content: Value) -> Self {
        Self { channel: Channel::Iopub, msg_type, content, buffers: Vec::new() }
    }

    fn status(state: &str) -> Self {
        Self::iopub("status", json!({"execution_state": state}))
    }

    fn words(text: &str) -> Self {
        Self::iopub("stream", json!({"name": "stderr", "text": format!("[cellblock] {text}\n")}))
    }
}

impl Execution {
    fn tap(&self) -> Option<&Tap> {
        self.place.tap.as_deref().filter(|tap| tap.is_open())
    }

    /// Passes a message of its kernel on to those who listen.
    pub(super) fn tell(&self, channel: Channel, msg_type: &str, parts: &[Bytes], mark: Mark) {
        let Some(tap) = self.tap() else { return };
        let seq = self.last_seq();
        let msg_id = match mark {
            Mark::Newest => Some(format!("{}-{seq}", self.id)),
            Mark::Once(word) => Some(format!("{}-{word}", self.id)),
            Mark::Other => None,
        };
        let asked = self.request.asked_by.as_ref();
        let only = match (channel, asked) {
            (Channel::Iopub, _) => None,
            (_, Some(asked)) => Some(asked.asker.clone()),
            // Nobody here has asked.
            (_, None) => return,
        };
        let Some((msg_id, parts)) = client::retold(parts, asked.map(|asked| &asked.header), msg_id.as_deref()) else {
            tracing::debug!(execution = %self.id, msg_type, "a kernel's message is not told as it came: it is no JSON that could be read");
            return self.tell_newest(|_| mark == Mark::Newest);
        };
        // What no record has is not told from one.
        let of = (mark != Mark::Other).then_some((self.id, seq));
        tap.tell(Message { channel, msg_type: msg_type.to_owned(), msg_id, parts, of, only });
    }

    /// Says that something was left out, which the newest event tells.
    pub(super) fn tell_truncation(&self) {
        self.tell_newest(|event| matches!(event, ExecutionEvent::OutputTruncated { .. }));
    }

    /// Tells the newest event as the record has it, if it is meant.
    fn tell_newest(&self, is_meant: impl Fn(&ExecutionEvent) -> bool) {
        let Some(tap) = self.tap() else { return };
        let count = self.said().1.execution_count;
        for logged in self.events_after(self.last_seq().saturating_sub(1)) {
            let draft = self.draft_of(&logged.event, count, &HashMap::new()).filter(|_| is_meant(&logged.event));
            let message = draft.and_then(|draft| self.message(draft, &logged.seq.to_string(), logged.seq));
            message.into_iter().for_each(|message| tap.tell(message));
        }
    }

    /// Tells its end, with the kernel's reply if there was one.
    pub(super) fn tell_end(&self, reply: Option<Vec<Bytes>>) {
        let Some(tap) = self.tap() else { return };
        for message in self.end(reply.as_deref()) {
            tap.tell(message);
        }
    }

    /// Contents of results that stand beside it, of those events.
    #[must_use]
    pub fn blobs(events: &[Arc<Logged>]) -> Vec<(u32, String)> {
        let bundles = events.iter().filter_map(|logged| match &logged.event {
            ExecutionEvent::Result(RichOutput { data, .. }) | ExecutionEvent::ResultUpdate { data, .. } => Some(data),
            _ => None,
        });
        let of = |(mime, part): (&String, &MimePart)| match part {
            MimePart::Blob(blob) => Some((blob.number, mime.clone())),
            MimePart::Inline(_) => None,
        };
        bundles.flatten().filter_map(of).collect()
    }

    /// All that its first events tell again, with the contents that stand beside them. Those that are not given are left out. The events are the caller's, who has
    /// looked for the contents: one that came meanwhile would be told without its own, and not again.
    #[must_use]
    pub fn retold(&self, events: &[Arc<Logged>], blobs: &HashMap<u32, JsonText>) -> Vec<Message> {
        let count = self.said().1.execution_count;
        let mut told = Vec::new();
        for logged in events {
            let seq = logged.seq;
            match &logged.event {
                ExecutionEvent::Started => {
                    let input = json!({"code": self.request.code, "execution_count": count});
                    told.extend(self.message(Draft::status("busy"), "busy", seq));
                    let is_shown = !self.request.silent;
                    told.extend(
                        is_shown.then(|| self.message(Draft::iopub("execute_input", input), "input", seq)).flatten(),
                    );
                }
                // The line was given, or is not asked for any more.
                ExecutionEvent::InputRequested { .. } if !(self.asks() && seq == self.last_seq()) => {}
                ExecutionEvent::Completed => told.extend(self.end(None)),
                event => {
                    let draft = self.draft_of(event, count, blobs);
                    told.extend(draft.and_then(|draft| self.message(draft, &seq.to_string(), seq)));
                }
            }
        }
        told
    }

    fn message(&self, draft: Draft, word: &str, seq: u64) -> Option<Message> {
        let Draft { channel, msg_type, content, buffers } = draft;
        let asked = self.request.asked_by.as_ref();
        let only = asked.map(|asked| asked.asker.clone()).filter(|_| channel != Channel::Iopub);
        if asked.is_none() && channel != Channel::Iopub {
            return None;
        }
        let msg_id = format!("{}-{word}", self.id);
        let parts = client::told(&msg_id, msg_type, asked.map(|asked| &asked.header), &content, buffers);
        Some(Message { channel, msg_type: msg_type.to_owned(), msg_id, parts, of: Some((self.id, seq)), only })
    }

    fn draft_of(&self, event: &ExecutionEvent, count: Option<u64>, blobs: &HashMap<u32, JsonText>) -> Option<Draft> {
        Some(match event {
            ExecutionEvent::Text { stream, text } => {
                let name = if *stream == TextStream::Stdout { "stdout" } else { "stderr" };
                Draft::iopub("stream", json!({"name": name, "text": text}))
            }
            ExecutionEvent::Result(output) => {
                let (data, metadata) = (bundle(&output.data, blobs), value(&output.metadata));
                match output.kind {
                    ResultKind::ExecuteResult => Draft::iopub(
                        "execute_result",
                        json!({"execution_count": count, "data": data, "metadata": metadata}),
                    ),
                    ResultKind::DisplayData => Draft::iopub(
                        "display_data",
                        json!({"data": data, "metadata": metadata, "transient": transient(output.display_id.as_deref())}),
                    ),
                }
            }
            ExecutionEvent::ResultUpdate { display_id, data, metadata } => Draft::iopub(
                "update_display_data",
                json!({"data": bundle(data, blobs), "metadata": value(metadata), "transient": transient(Some(display_id))}),
            ),
            ExecutionEvent::OutputClear { wait } => Draft::iopub("clear_output", json!({"wait": wait})),
            ExecutionEvent::Error(error) => Draft::iopub("error", error_content(error)),
            ExecutionEvent::InputRequested { prompt, password } => Draft {
                channel: Channel::Stdin,
                ..Draft::iopub("input_request", json!({"prompt": prompt, "password": password}))
            },
            ExecutionEvent::OutputTruncated { what, omitted_bytes, total_bytes } => Draft::words(&format!(
                "{omitted_bytes} of {total_bytes} bytes of {} were left out here: it is more than one execution may put out",
                what.word()
            )),
            ExecutionEvent::Comm(comm) => comm_draft(comm),
            ExecutionEvent::Queued { .. }
            | ExecutionEvent::Started
            | ExecutionEvent::KernelRestarted { .. }
            | ExecutionEvent::Completed => return None,
        })
    }

    /// What ends it: words where the kernel has none, the reply, and that the kernel is idle.
    fn end(&self, reply: Option<&[Bytes]>) -> Vec<Message> {
        let (seq, (status, report, told_error)) = (self.last_seq(), self.said());
        let mut told = Vec::new();
        let is_by_kernel = matches!(status, Status::Ok | Status::Error | Status::InputDenied);
        let has_run = self.started_at().is_some();
        if !has_run {
            told.extend(self.message(Draft::status("busy"), "busy", seq));
        }
        if let (false, true, Some(detail)) = (is_by_kernel, has_run, &report.detail) {
            told.extend(self.message(Draft::words(detail), "end", seq));
        }
        let error = told_error.clone().unwrap_or_else(|| ErrorInfo {
            name: status.word().to_owned(),
            value: report.detail.clone().unwrap_or_default(),
            traceback: Vec::new(),
        });
        if !is_by_kernel && has_run && told_error.is_none() {
            told.extend(self.message(Draft::iopub("error", error_content(&error)), "error", seq));
        }
        let asked = self.request.asked_by.as_ref();
        let word = "reply";
        // What had to be stopped may say itself that all went well: it has caught its interrupt.
        let of_kernel = reply.filter(|_| is_by_kernel).zip(asked).and_then(|(parts, asked)| {
            let id = format!("{}-{word}", self.id);
            let (msg_id, parts) = client::retold(parts, Some(&asked.header), Some(&id))?;
            let (msg_type, only) = ("execute_reply".to_owned(), Some(asked.asker.clone()));
            Some(Message { channel: Channel::Shell, msg_type, msg_id, parts, of: Some((self.id, seq)), only })
        });
        let content = match status {
            Status::Ok => {
                let values = report.user_expressions.iter().map(|(name, text)| (name.clone(), value(text)));
                let payload: Vec<_> = report.payloads.iter().map(value).collect();
                let values: serde_json::Map<_, _> = values.collect();
                json!({"status": "ok", "execution_count": report.execution_count, "user_expressions": values, "payload": payload})
            }
            Status::Cancelled if !has_run => json!({"status": "aborted"}),
            _ => {
                let mut content = error_content(&error);
                content["status"] = "error".into();
                content["execution_count"] = json!(report.execution_count);
                content
            }
        };
        let made =
            || self.message(Draft { channel: Channel::Shell, ..Draft::iopub("execute_reply", content) }, word, seq);
        told.extend(of_kernel.or_else(made));
        told.extend(self.message(Draft::status("idle"), "idle", seq));
        told
    }
}

fn comm_draft(comm: &Comm) -> Draft {
    let msg_type = match comm.kind {
        CommKind::Open => "comm_open",
        CommKind::Message => "comm_msg",
        CommKind::Close => "comm_close",
    };
    let buffers = comm.buffers.iter().cloned().map(Bytes::from).collect();
    Draft { buffers, ..Draft::iopub(msg_type, value(&comm.content)) }
}

fn transient(display_id: Option<&str>) -> Value {
    display_id.map_or_else(|| json!({}), |id| json!({"display_id": id}))
}

fn error_content(error: &ErrorInfo) -> Value {
    json!({"ename": error.name, "evalue": error.value, "traceback": error.traceback})
}

fn bundle(data: &MimeBundle, blobs: &HashMap<u32, JsonText>) -> Value {
    let of = |(mime, part): (&String, &MimePart)| match part {
        MimePart::Inline(text) => Some((mime.clone(), value(text))),
        MimePart::Blob(blob) => blobs.get(&blob.number).map(|text| (mime.clone(), value(text))),
    };
    Value::Object(data.iter().filter_map(of).collect())
}

fn value(text: &JsonText) -> Value {
    // It is known to be JSON, no deeper than readers take.
    serde_json::from_str(&text.0).unwrap_or(Value::Null)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::super::execution::{ExecutionRequest, Place};
    use super::*;
    use crate::domain::output::BlobRef;
    use crate::domain::spec::OutputLimits;

    const LIMITS: OutputLimits = OutputLimits {
        text_bytes: 1000,
        result_bytes: 1000,
        total_bytes: 4000,
        messages: 100,
        messages_per_second: 100,
    };

    #[test]
    fn what_comes_while_contents_are_looked_for_is_not_told_without_its_own() {
        let request = ExecutionRequest::for_tests(LIMITS);
        let execution = Execution::new(Uuid::from_u128(1).into(), Place::for_tests(), request, 0);
        execution.start();
        execution.output(ExecutionEvent::Text { stream: TextStream::Stdout, text: "a".to_owned() });
        let before = execution.events_after(0);
        let blob = BlobRef { number: 1, bytes: 10, sha256: String::new() };
        let data = MimeBundle::from([("image/png".to_owned(), MimePart::Blob(blob))]);
        let plot = RichOutput { kind: ResultKind::DisplayData, data, metadata: JsonText::object(), display_id: None };
        execution.output(ExecutionEvent::Result(plot));
        assert!(Execution::blobs(&before).is_empty());
        let told = execution.retold(&before, &HashMap::new());
        assert!(told.iter().any(|message| message.msg_type == "stream"));
        let newest = told.iter().filter_map(|message| message.of).map(|(_, seq)| seq).max();
        assert_eq!(newest, Some(before.len() as u64), "the plot is still to be heard");
        let later = execution.events_after(0);
        assert_eq!(Execution::blobs(&later), [(1, "image/png".to_owned())]);
        let content = HashMap::from([(1, JsonText("\"aGk=\"".to_owned()))]);
        let told = execution.retold(&later, &content);
        let plot = told.last().map(|message| String::from_utf8_lossy(&message.parts[3]).into_owned());
        assert!(plot.is_some_and(|plot| plot.contains("aGk=")));
    }
}
