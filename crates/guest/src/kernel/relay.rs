//! What of a kernel's messages goes on, and in which form: pure decisions over [`ExecutionCap`]s, no sockets.
//!
//! Replies, status, requests for input and the first errors always go on; output goes on as far as its execution's allowance
//! reaches, and what belongs to no running execution has a small allowance of its own.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;
use cellblock_wire::link::{Channel, CutStream, Event, OutputCap};
use serde::Deserialize;
use serde_json::json;

use crate::cap::{CaptureLimits, Captured, ExecutionCap, Stream, pieces};
use crate::capture::{MAX_ERROR, failure, stream_text};
use crate::json::short_fields;
use crate::message::{Content, Incoming};

const MAX_EXECUTIONS: usize = 256;
const MAX_STATUSES: u32 = 8;
const MAX_ERRORS: u32 = 4;
const MAX_INPUTS: u32 = 2;
/// Longest status, and longest echo of an execution's input, that goes on as it came without being counted.
const MAX_STATUS: u64 = 4096;
const MAX_INPUT: u64 = 1024 * 1024;
const BACKGROUND_BYTES: u64 = 256 * 1024;
const BACKGROUND_MESSAGES: u32 = 500;

/// An event that is to be told, with its parts.
#[derive(Debug)]
pub struct Out {
    /// What happened.
    pub event: Event,
    /// The message's parts, where it is one.
    pub parts: Vec<Bytes>,
}

/// A stream's name, and where its last message stood: what held-back text is told with.
struct Frame {
    name: String,
    parts: [Bytes; 3],
}

struct Execution {
    id: String,
    cap: ExecutionCap,
    frames: [Option<Frame>; 2],
    statuses: u32,
    errors: u32,
    inputs: u32,
    idle: bool,
    /// Its idle status was put off once.
    put_off: bool,
    replied: bool,
}

struct Background {
    bytes: u64,
    messages: u32,
    statuses: u32,
}

const FULL_BACKGROUND: Background =
    Background { bytes: BACKGROUND_BYTES, messages: BACKGROUND_MESSAGES, statuses: BACKGROUND_MESSAGES };

/// The state of one kernel's relay.
pub struct Relay {
    executions: VecDeque<Execution>,
    background: Background,
    dropped: u64,
    /// The execution that the last message from iopub belonged to.
    last: Option<usize>,
}

impl Default for Relay {
    fn default() -> Self {
        Self { executions: VecDeque::new(), background: FULL_BACKGROUND, dropped: 0, last: None }
    }
}

impl Relay {
    /// Takes note of a message to the kernel: renews what stands in no execution, and opens an execution's allowance.
    pub fn sent(&mut self, msg_id: &str, cap: Option<OutputCap>) {
        self.background = FULL_BACKGROUND;
        let Some(cap) = cap else { return };
        if self.executions.len() == MAX_EXECUTIONS {
            // What is done, and was not replied to, as messages of comms are not, goes before what runs.
            let done = self.executions.iter().position(|execution| execution.idle).unwrap_or(0);
            self.executions.remove(done);
        }
        self.executions.push_back(Execution {
            id: msg_id.to_owned(),
            cap: ExecutionCap::new(cap),
            frames: [None, None],
            statuses: 0,
            errors: 0,
            inputs: 0,
            idle: false,
            put_off: false,
            replied: false,
        });
    }

    /// Messages that were left out and belong to no execution.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// How much text of a message with this parent is of use.
    #[must_use]
    pub fn capture_limits(&self, parent: &str) -> CaptureLimits {
        match self.executions.iter().find(|e| e.id == parent && !e.idle) {
            Some(execution) => execution.cap.capture_limits(),
            None => CaptureLimits { head: self.background.bytes as usize, tail: 0 },
        }
    }

    /// Judges a message from iopub. `room` is how much more output can be kept, in bytes.
    pub fn iopub(&mut self, message: Incoming, room: usize) -> Vec<Out> {
        let mut out = Vec::new();
        self.last = None;
        match self.executions.iter().position(|e| e.id == message.parent_id && !e.idle) {
            _ if message.msg_type == "iopub_welcome" => {}
            Some(at) => {
                let execution = &mut self.executions[at];
                execution.take(message, room, &mut out);
                if execution.idle && execution.replied {
                    self.executions.remove(at);
                } else {
                    self.last = Some(at);
                }
            }
            None => self.in_background(message, room, &mut out),
        }
        out
    }

    /// Whether this is an execution's idle status, for the first time: of a kernel whose output may come after it, it is judged a little later.
    pub fn puts_off(&mut self, message: &Incoming) -> bool {
        let Some(execution) = self.executions.iter_mut().find(|e| e.id == message.parent_id && !e.idle) else {
            return false;
        };
        is_idle(message) && !std::mem::replace(&mut execution.put_off, true)
    }

    /// The kernel has ended: what was held back or left out of the executions that were under way.
    pub fn flush(&mut self, room: usize) -> Vec<Out> {
        let mut out = Vec::new();
        for mut execution in std::mem::take(&mut self.executions).into_iter().filter(|execution| !execution.idle) {
            execution.end(room, &mut out);
        }
        out
    }

    /// The kernel is interrupted: what it has said already is taken in as fast as it comes.
    pub fn rush(&mut self, now: Instant) {
        self.executions.iter_mut().for_each(|execution| execution.cap.rush(now));
    }

    /// When what [`iopub`](Self::iopub) has just judged may be told, unless it is now. To be asked before anything else changes.
    pub fn due(&mut self, now: Instant) -> Option<Instant> {
        let last = self.last.take()?;
        self.executions.get_mut(last)?.cap.due(now)
    }

    fn in_background(&mut self, message: Incoming, room: usize, out: &mut Vec<Out>) {
        let left = &mut self.background;
        let fits = if message.msg_type == "status" && message.size <= MAX_STATUS {
            take_one(&mut left.statuses)
        } else {
            message.size <= left.bytes.min(room as u64) && take_one(&mut left.messages)
        };
        if fits && message.msg_type != "status" {
            left.bytes -= message.size;
        }
        match whole(message, Channel::Iopub).filter(|_| fits) {
            Some(whole) => out.push(whole),
            None => self.dropped += 1,
        }
    }

    /// Judges a message from another channel: each of them goes on, if need be with a shorter content.
    pub fn reply(&mut self, channel: Channel, message: Incoming) -> Option<Out> {
        if matches!(channel, Channel::Shell | Channel::Control)
            && message.msg_type.ends_with("_reply")
            && let Some(at) = self.executions.iter().position(|e| e.id == message.parent_id)
        {
            self.executions[at].replied = true;
            if self.executions[at].idle {
                self.executions.remove(at);
            }
        }
        let size = message.size;
        let content = match &message.content {
            Content::Whole(_) => return whole(message, channel),
            Content::Failure(failure) if failure.is_error() => json!(failure),
            _ => json!({
                "status": "error", "ename": "ReplyTooLarge", "traceback": [],
                "evalue": format!("the kernel's answer of {size} bytes is above what the cell passes on"),
            }),
        };
        Some(with_content(&message, channel, content.to_string()))
    }
}

fn is_idle(message: &Incoming) -> bool {
    let Content::Whole(content) = &message.content else { return false };
    let fits = message.msg_type == "status" && message.size <= MAX_STATUS;
    let state = fits.then(|| short_fields(content, &["execution_state"], 64)).flatten().and_then(|[state]| state);
    state.as_deref() == Some("idle")
}

fn take_one(left: &mut u32) -> bool {
    let some = *left > 0;
    *left = left.saturating_sub(1);
    some
}

impl Execution {
    fn take(&mut self, message: Incoming, room: usize, out: &mut Vec<Out>) {
        match message.msg_type.as_str() {
            "status" if message.size <= MAX_STATUS => self.status(message, room, out),
            "stream" => self.stream(message, room, out),
            "error" if self.errors < MAX_ERRORS => {
                self.errors += 1;
                out.extend(error(message));
            }
            "execute_input" if self.inputs < MAX_INPUTS => {
                self.inputs += 1;
                out.push(input(message));
            }
            _ => self.result(message, room, out),
        }
    }

    fn status(&mut self, message: Incoming, room: usize, out: &mut Vec<Out>) {
        if !matches!(message.content, Content::Whole(_)) {
            return;
        }
        if is_idle(&message) {
            self.idle = true;
            self.end(room, out);
        } else if self.statuses == MAX_STATUSES {
            return;
        }
        self.statuses += 1;
        out.extend(whole(message, Channel::Iopub));
    }

    fn stream(&mut self, mut message: Incoming, room: usize, out: &mut Vec<Out>) {
        let found = match &mut message.content {
            Content::Text(name, text) => Some((std::mem::take(name), std::mem::replace(text, Captured::empty()))),
            Content::Whole(content) => stream_text(content, self.cap.capture_limits()),
            _ => None,
        };
        let Some((name, text)) = found else { return self.result(message, room, out) };
        let stream = if name == "stderr" { Stream::Stderr } else { Stream::Stdout };
        let (head, tail) = self.cap.text(stream, &text, room);
        if text.total == 0 {
            return;
        }
        let is_lean = message.size <= 64 + 6 * text.total;
        if is_lean && (head + tail) as u64 == text.total && matches!(message.content, Content::Whole(_)) {
            out.extend(whole(message, Channel::Iopub));
            return;
        }
        let frame = Frame { name, parts: [message.header, message.parent, message.metadata] };
        frame.tell(&self.id, &text.head[..head], out);
        frame.tell(&self.id, &text.tail[..tail], out);
        self.frames[stream as usize] = Some(frame);
    }

    fn result(&mut self, message: Incoming, room: usize, out: &mut Vec<Out>) {
        let room = if matches!(message.content, Content::Whole(_)) { room } else { 0 };
        if self.cap.result(message.size, room) {
            out.extend(whole(message, Channel::Iopub));
        }
    }

    /// Tells what was held back or left out, before the idle status goes on.
    fn end(&mut self, room: usize, out: &mut Vec<Out>) {
        let end = self.cap.finish(room);
        let streams = [CutStream::Stdout, CutStream::Stderr];
        for ((stream, text), frame) in streams.into_iter().zip(end.texts).zip(&self.frames) {
            let Some(text) = text else { continue };
            if text.omitted > 0 {
                out.push(self.gap(stream, (text.total, text.omitted)));
            }
            if let Some(frame) = frame {
                frame.tell(&self.id, &text.tail, out);
            }
        }
        out.extend(end.results.map(|counts| self.gap(CutStream::Results, counts)));
    }

    fn gap(&self, stream: CutStream, (total_bytes, omitted_bytes): (u64, u64)) -> Out {
        let event = Event::Gap { parent_id: self.id.clone(), stream, total_bytes, omitted_bytes };
        Out { event, parts: Vec::new() }
    }
}

impl Frame {
    /// Tells text as stream messages of this one's header, in pieces.
    fn tell(&self, parent_id: &str, text: &str, out: &mut Vec<Out>) {
        for text in pieces(text) {
            let content = json!({"name": self.name, "text": text}).to_string().into();
            let parts = self.parts.iter().cloned().chain([content]).collect();
            out.push(Out { event: told(Channel::Iopub, "stream", parent_id), parts });
        }
    }
}

fn told(channel: Channel, msg_type: &str, parent_id: &str) -> Event {
    Event::Message { channel, msg_type: msg_type.to_owned(), parent_id: parent_id.to_owned() }
}

/// The message as it came; `None` if it was too large to be held.
fn whole(message: Incoming, channel: Channel) -> Option<Out> {
    let Content::Whole(content) = message.content else { return None };
    let fixed = [message.header, message.parent, message.metadata, content];
    let event = Event::Message { channel, msg_type: message.msg_type, parent_id: message.parent_id };
    Some(Out { event, parts: fixed.into_iter().chain(message.buffers).collect() })
}

fn with_content(message: &Incoming, channel: Channel, content: String) -> Out {
    let parts = vec![message.header.clone(), message.parent.clone(), message.metadata.clone(), content.into()];
    Out { event: told(channel, &message.msg_type, &message.parent_id), parts }
}

/// The echo of an execution's input, without the code where that is long: who sent it has it.
fn input(message: Incoming) -> Out {
    #[derive(Deserialize)]
    struct Counted {
        execution_count: Option<u64>,
    }
    let count = match &message.content {
        Content::Whole(content) if message.size > MAX_INPUT => serde_json::from_slice::<Counted>(content).ok(),
        _ => None,
    };
    let shortened = json!({"code": "", "execution_count": count.and_then(|counted| counted.execution_count)});
    let shortened = with_content(&message, Channel::Iopub, shortened.to_string());
    if message.size > MAX_INPUT { shortened } else { whole(message, Channel::Iopub).unwrap_or(shortened) }
}

/// An error goes on with its traceback cut, and without buffers if they make it long.
fn error(message: Incoming) -> Option<Out> {
    let content = match &message.content {
        Content::Whole(_) if message.size <= MAX_ERROR as u64 => return whole(message, Channel::Iopub),
        Content::Whole(content) => json!(failure(content)),
        Content::Failure(failure) => json!(failure),
        _ => return None,
    };
    Some(with_content(&message, Channel::Iopub, content.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ROOM: usize = 1 << 20;
    const CAP: OutputCap = OutputCap {
        text_bytes: 400,
        result_bytes: 1000,
        total_bytes: u64::MAX,
        messages: 100,
        messages_per_second: u64::MAX,
    };

    fn message(msg_type: &str, parent_id: &str, content: &serde_json::Value) -> Incoming {
        let content = Bytes::from(content.to_string());
        Incoming {
            msg_type: msg_type.to_owned(),
            parent_id: parent_id.to_owned(),
            header: "{}".into(),
            parent: "{}".into(),
            metadata: "{}".into(),
            size: content.len() as u64,
            content: Content::Whole(content),
            buffers: Vec::new(),
        }
    }

    fn print(parent_id: &str, text: &str) -> Incoming {
        message("stream", parent_id, &json!({"name": "stdout", "text": text}))
    }

    fn idle(parent_id: &str) -> Incoming {
        message("status", parent_id, &json!({"execution_state": "idle"}))
    }

    /// What was told, in short: the text of streams, a gap's counts, or the message's type.
    fn short(out: &[Out]) -> Vec<String> {
        out.iter()
            .map(|out| match &out.event {
                Event::Message { msg_type, .. } if msg_type == "stream" => {
                    serde_json::from_slice::<serde_json::Value>(&out.parts[3]).unwrap()["text"]
                        .as_str()
                        .unwrap()
                        .to_owned()
                }
                Event::Message { msg_type, .. } => msg_type.clone(),
                Event::Gap { total_bytes, omitted_bytes, .. } => format!("gap {total_bytes} {omitted_bytes}"),
                other => format!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn what_is_asked_on_control_has_its_cap_and_leaves_nothing() {
        for channel in [Channel::Shell, Channel::Control] {
            let mut relay = Relay::default();
            relay.sent("c", Some(CAP));
            assert_eq!(short(&relay.iopub(print("c", &"a".repeat(1000)), ROOM)), ["a".repeat(300)]);
            let reply = message("kernel_info_reply", "c", &json!({"status": "ok"}));
            assert!(relay.reply(channel, reply).is_some() && relay.executions.len() == 1, "its idle is still to come");
            relay.iopub(idle("c"), ROOM);
            assert!(relay.executions.is_empty(), "{channel:?}");
        }
    }

    #[test]
    fn text_above_the_cap_comes_as_head_gap_tail_idle() {
        let mut relay = Relay::default();
        relay.sent("e", Some(CAP));
        assert_eq!(short(&relay.iopub(print("e", &"a".repeat(290)), ROOM)), ["a".repeat(290)]);
        assert_eq!(short(&relay.iopub(print("e", &"b".repeat(290)), ROOM)), ["b".repeat(10)]);
        assert_eq!(short(&relay.iopub(print("e", &"c".repeat(50)), ROOM)), [""; 0]);
        let tail = format!("{}{}", "b".repeat(50), "c".repeat(50));
        assert_eq!(short(&relay.iopub(idle("e"), ROOM)), ["gap 630 230".to_owned(), tail, "status".to_owned()]);
    }

    #[test]
    fn a_stream_message_is_worth_its_text() {
        let mut relay = Relay::default();
        relay.sent("e", Some(CAP));
        assert!(relay.iopub(print("e", ""), ROOM).is_empty(), "none is worth nothing");
        let padded = json!({"name": "stdout", "text": "x", "more": "y".repeat(5000)});
        let told = relay.iopub(message("stream", "e", &padded), ROOM);
        assert_eq!((short(&told), told[0].parts[3].len() < 100), (vec!["x".to_owned()], true));
        let mut buffers = print("e", "z");
        (buffers.size, buffers.buffers) = (9000, vec![vec![0; 8000].into()]);
        let told = relay.iopub(buffers, ROOM);
        assert_eq!((short(&told), told[0].parts.len()), (vec!["z".to_owned()], 4));
    }

    #[test]
    fn the_end_of_a_kernel_tells_what_was_held_back() {
        let mut relay = Relay::default();
        relay.sent("e", Some(CAP));
        relay.iopub(print("e", &"a".repeat(500)), ROOM);
        assert_eq!(short(&relay.flush(ROOM)), ["gap 500 100".to_owned(), "a".repeat(100)]);
        assert!(relay.flush(ROOM).is_empty());
    }

    #[test]
    fn without_room_everything_is_tail_and_results_are_counted() {
        let mut relay = Relay::default();
        relay.sent("e", Some(CAP));
        assert!(relay.iopub(print("e", "x"), 0).is_empty());
        assert!(relay.iopub(message("display_data", "e", &json!({"d": 1})), 0).is_empty());
        assert_eq!(short(&relay.iopub(message("error", "e", &json!({"ename": "E"})), 0)), ["error"]);
        assert_eq!(short(&relay.iopub(idle("e"), 0)), ["x", "gap 7 7", "status"]);
    }

    #[test]
    fn after_idle_and_for_strangers_only_the_background_is_left() {
        let mut relay = Relay::default();
        relay.sent("e", Some(OutputCap { text_bytes: 1 << 20, ..CAP }));
        relay.iopub(idle("e"), ROOM);
        let sent: usize = (0..600).map(|_| relay.iopub(print("e", "late"), ROOM).len()).sum();
        assert_eq!(sent, BACKGROUND_MESSAGES as usize);
        assert_eq!(relay.dropped(), 100);
        assert_eq!(short(&relay.iopub(idle("stranger"), ROOM)), ["status"]);
        relay.sent("k", None);
        assert_eq!(short(&relay.iopub(print("", "again"), ROOM)), ["again"]);
    }

    #[test]
    fn an_execution_is_forgotten_after_idle_and_reply() {
        let mut relay = Relay::default();
        for order in [true, false] {
            relay.sent("e", Some(CAP));
            if order {
                relay.iopub(idle("e"), ROOM);
            }
            assert!(relay.reply(Channel::Shell, message("execute_reply", "e", &json!({"status": "ok"}))).is_some());
            if !order {
                relay.iopub(idle("e"), ROOM);
            }
            assert!(relay.executions.is_empty());
        }
        (0..300).for_each(|n| relay.sent(&n.to_string(), Some(CAP)));
        assert_eq!(relay.executions.len(), MAX_EXECUTIONS);
        let mut relay = Relay::default();
        relay.sent("runs", Some(CAP));
        for n in 0..300 {
            relay.sent(&n.to_string(), Some(CAP));
            relay.iopub(idle(&n.to_string()), ROOM);
        }
        assert_eq!(short(&relay.iopub(print("runs", &"x".repeat(400)), ROOM)).len(), 1, "its cap is still known");
        assert_eq!(relay.dropped(), 0);
    }

    #[test]
    fn a_long_echo_of_the_code_goes_on_without_it_and_costs_nothing() {
        let mut relay = Relay::default();
        relay.sent("e", Some(CAP));
        let code = "x".repeat(2 << 20);
        let echo = message("execute_input", "e", &json!({"code": code, "execution_count": 7}));
        let out = relay.iopub(echo, 0);
        let content: serde_json::Value = serde_json::from_slice(&out[0].parts[3]).unwrap();
        assert_eq!(
            (short(&out), content),
            (vec!["execute_input".to_owned()], json!({"code": "", "execution_count": 7}))
        );
        let mut echo = message("execute_input", "e", &json!({}));
        (echo.content, echo.size) = (Content::LeftOut, 9 << 20);
        assert_eq!(short(&relay.iopub(echo, 0)), ["execute_input"]);
        assert_eq!(short(&relay.iopub(idle("e"), ROOM)), ["status"], "nothing was left out");
    }

    #[test]
    fn output_is_paced_and_status_errors_and_strangers_are_not() {
        let now = Instant::now();
        let mut relay = Relay::default();
        relay.sent("e", Some(OutputCap { messages_per_second: 1, ..CAP }));
        let mut due = |message| {
            let told = relay.iopub(message, ROOM).len();
            (told, relay.due(now).map(|due| due - now))
        };
        let second = std::time::Duration::from_secs(1);
        assert_eq!(due(print("e", "burst")), (1, None));
        assert_eq!(due(message("display_data", "e", &json!({}))), (1, Some(second)));
        assert_eq!(due(print("e", "third")), (1, Some(2 * second)));
        assert_eq!(due(message("error", "e", &json!({}))), (1, None));
        assert_eq!(due(message("execute_input", "e", &json!({}))), (1, None));
        assert_eq!(due(print("", "background")), (1, None));
        assert_eq!(due(idle("e")), (1, None));
    }

    #[test]
    fn a_reply_that_is_too_large_is_said_to_be() {
        let mut reply = message("execute_reply", "e", &json!({}));
        reply.content = Content::LeftOut;
        let out = Relay::default().reply(Channel::Shell, reply).unwrap();
        assert!(std::str::from_utf8(&out.parts[3]).unwrap().contains("ReplyTooLarge"));
    }

    #[test]
    fn an_idle_status_is_put_off_once_and_output_after_it_counts() {
        let mut relay = Relay::default();
        relay.sent("e", Some(CAP));
        assert!(!relay.puts_off(&idle("stranger")) && !relay.puts_off(&print("e", "x")));
        assert!(relay.puts_off(&idle("e")) && !relay.puts_off(&idle("e")));
        assert_eq!(short(&relay.iopub(print("e", "late"), ROOM)), ["late"]);
        assert_eq!(short(&relay.iopub(idle("e"), ROOM)), ["status"]);
        assert!(!relay.puts_off(&idle("e")));
    }

    proptest! {
        #[test]
        fn whatever_a_kernel_sends_output_stays_within_the_cap(kinds in proptest::collection::vec((0usize..7, 0usize..300, any::<bool>()), 0..200)) {
            let mut relay = Relay::default();
            relay.sent("e", Some(CAP));
            let (mut bytes, mut events) = (0, 0);
            for (kind, size, room) in kinds {
                let text = "é".repeat(size);
                let message = match kind {
                    0 => print("e", &text),
                    1 => message("stream", "e", &json!({"name": "stderr", "text": text})),
                    2 => message("display_data", "e", &json!({"x": text})),
                    3 => message("status", "e", &json!({"execution_state": "busy"})),
                    4 => idle("e"),
                    5 => message("comm_msg", "e", &json!([text])),
                    _ => message("stream", "e", &json!({"text": 3})),
                };
                let out = relay.iopub(message, if room { ROOM } else { 0 });
                events += out.len();
                bytes += out.iter().flat_map(|o| &o.parts[..]).map(Bytes::len).sum::<usize>();
            }
            prop_assert!(events <= 100 + 8 + 3 + 4 + 2 * BACKGROUND_MESSAGES as usize);
            prop_assert!(bytes <= BACKGROUND_BYTES as usize + 2 * 400 + 1000 + events * 60);
        }
    }
}
