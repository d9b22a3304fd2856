//! The execution that runs in a context: what is known of it, what it waits for, and how it is stopped. It says what is due; the context does it.

use std::collections::VecDeque;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use jiff::Timestamp;
use sha2::{Digest, Sha256};

use super::execution::{End, Execution, Stdin};
use crate::domain::ids::ContextId;
use crate::domain::output::{ErrorInfo, ExecutionEvent, RestartCause, Status, Stop, StopStep};
use crate::kernel::protocol::{self, InputRequest};
use crate::store::state::RunningRecord;

/// An interrupt by message is followed by a signal after this long.
const SIGNAL_AFTER: Duration = Duration::from_secs(1);
/// What was interrupted, or says that it is idle without having replied, is looked after when this long has passed.
const PROBE_AFTER: Duration = Duration::from_secs(1);
/// What does not say that it has begun, nor anything else, is asked for when this long has passed.
const BEGINS: Duration = Duration::from_secs(5);
/// The longest time between two probes: what is asked waits in the kernel until the code has ended.
const PROBE_MOST: Duration = Duration::from_secs(120);
/// A reply without an idle status counts as the end after this long without any output. A kernel answers before its output
/// has arrived: on a busy machine that takes seconds.
const IDLE_AFTER_REPLY: Duration = Duration::from_secs(10);

/// So often code is told that its input is at its end; after that its time limit ends it.
const MAX_ENDS: u32 = 100;

/// An execution that a kernel works on.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) execution: Arc<Execution>,
    pub(super) msg_id: String,
    /// Code that prepares the kernel, and belongs to no caller.
    pub(super) is_setup: bool,
    reply: Option<protocol::ExecuteReply>,
    /// The same as it came.
    reply_text: Option<Bytes>,
    /// When something was last heard of it, once it has replied: output that was under way may take its time.
    replied_at: Option<Instant>,
    idle: bool,
    deadline: Instant,
    /// When the kernel is asked whether it is done: it answers in order, so its answer without a reply before means that the reply is
    /// lost (an interrupt in the wrong moment does that).
    probe_at: Option<Instant>,
    /// How long the last probe may take until there is another one: an interrupt may hit the kernel while it answers.
    probe_wait: Duration,
    pub(super) probe: Option<String>,
    stopping: Option<Stopping>,
    /// It was interrupted, which the kernel may do late.
    pub(super) interrupted: bool,
    /// The request to interrupt that the kernel has not answered.
    pub(super) interrupt: Option<String>,
    /// The kernel was heard to be at its code: it echoes the code, or what that puts out comes.
    is_under_way: bool,
    /// It was interrupted before that: the kernel may have ignored it, as it does between two requests.
    is_interrupt_early: bool,
    error_told: bool,
    /// When its error came, which who has asked for it may act on at once.
    errored_at: Option<Instant>,
    /// A process of the cell was ended for want of memory while it ran.
    pub(super) memory_hit: bool,
    lines: VecDeque<String>,
    lines_given: usize,
    /// How often it was told that there are no more.
    ends_told: u32,
    /// Header of the request for input that waits for a caller.
    asked: Option<Bytes>,
    /// The line on its way to the guest.
    unsent: Option<Unsent>,
    /// The guest may have had the request to run it before: from an earlier process, or over a link that broke.
    pub(super) is_taken_over: bool,
    /// The guest has taken the request to run it.
    is_sent: bool,
    /// Its kernel is gone, which an event tells until then.
    gone_until: Option<Instant>,
}

/// A line of input that the guest has not taken yet.
#[derive(Debug)]
struct Unsent {
    msg_id: String,
    asked: Bytes,
    is_end: bool,
}

/// An execution is being stopped.
#[derive(Debug)]
struct Stopping {
    since: Instant,
    status: Option<Status>,
    signal_at: Option<Instant>,
    kill_at: Option<Instant>,
}

/// What is due for a running execution.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Nothing more will come.
    Complete,
    /// Its time is over.
    TimeLimit,
    /// The kernel is to be asked whether it is done.
    Probe,
    /// The kernel is to be signalled.
    Signal,
    /// The kernel is to be replaced.
    Kill(Status),
    /// The kernel is gone, and nothing has told how.
    Gone,
}

/// What becomes of a request for input.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// The code gets this line.
    Line(String),
    /// A caller is asked.
    Ask,
    /// Nothing: it has been told often enough that its input is at its end.
    Ignore,
}

impl Running {
    pub(super) fn new(execution: Arc<Execution>, deadline: Instant, is_setup: bool) -> Self {
        let lines = match &execution.request.stdin {
            Stdin::Lines(lines) => lines.iter().cloned().collect(),
            Stdin::Deny | Stdin::Interactive => VecDeque::new(),
        };
        Self {
            msg_id: execution.id.to_string(),
            execution,
            is_setup,
            reply: None,
            reply_text: None,
            replied_at: None,
            idle: false,
            deadline,
            probe_at: None,
            probe_wait: PROBE_AFTER,
            probe: None,
            stopping: None,
            interrupted: false,
            interrupt: None,
            is_under_way: false,
            is_interrupt_early: false,
            error_told: false,
            errored_at: None,
            memory_hit: false,
            lines,
            lines_given: 0,
            ends_told: 0,
            asked: None,
            unsent: None,
            is_taken_over: false,
            is_sent: false,
            gone_until: None,
        }
    }

    /// One that an earlier process has left. What it had heard is known; whether the kernel was told, and got to its end meanwhile, is not.
    pub(super) fn restore(execution: Arc<Execution>, deadline: Instant, kept: &RunningRecord, now: Instant) -> Self {
        let mut running = Self::new(execution, deadline, false);
        let reply = kept.reply.as_ref().and_then(|text| protocol::read_execute_reply(text.as_bytes()).ok());
        if let Some(reply) = reply {
            (running.reply, running.replied_at) = (Some(reply), Some(now));
            running.reply_text = kept.reply.clone().map(Bytes::from);
        }
        running.idle = kept.is_idle;
        (running.error_told, running.memory_hit) = (kept.error_told, kept.memory_hit);
        running.lines.drain(..kept.lines_given.min(running.lines.len()));
        running.lines_given = kept.lines_given;
        running.ends_told = kept.ends_told;
        running.asked = kept.asked.clone().map(Bytes::from);
        running.probe_at = Some(now + PROBE_AFTER);
        (running.is_taken_over, running.is_sent) = (true, true);
        running
    }

    /// The line for a request that an earlier process had heard, and may not have answered.
    pub(super) fn asked_before(&mut self) -> Option<(String, Bytes)> {
        if self.execution.request.stdin == Stdin::Interactive {
            return None;
        }
        let asked = self.asked.take()?;
        match self.next_line(&asked) {
            Input::Line(line) => Some((line, asked)),
            Input::Ask | Input::Ignore => None,
        }
    }

    /// What the next process could not hear again.
    pub(super) fn record(&self, wall: fn(Instant) -> Timestamp) -> RunningRecord {
        let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
        // What the guest has not taken is still to be said.
        let unsent = self.unsent.as_ref();
        let is_line = usize::from(unsent.is_some_and(|unsent| !unsent.is_end));
        let is_end = u32::from(unsent.is_some_and(|unsent| unsent.is_end));
        RunningRecord {
            reply: self.reply_text.as_ref().map(text),
            is_idle: self.idle,
            lines_given: self.lines_given - is_line,
            ends_told: self.ends_told - is_end,
            asked: self.asked.as_ref().or(unsent.map(|unsent| &unsent.asked)).map(text),
            error_told: self.error_told,
            memory_hit: self.memory_hit,
            verdict: self.verdict().map(|(status, since)| (status, wall(since))),
            replacing: None,
        }
    }

    /// What is different when [`Running::record`] is.
    pub(super) fn mark(&self) -> impl Hash + use<> {
        let told = (self.reply_text.is_some(), self.idle, self.error_told, self.memory_hit);
        let input = (self.lines_given, self.ends_told, self.asked.clone(), self.unsent.is_some());
        (told, input, self.verdict().map(|(status, _)| status))
    }

    /// What the kernel has said while nobody listened is on its way: until it has come, nothing is due. Code that was not sent, or prepares its kernel, has not run out of
    /// time in which it was `unheard`; nor has an interrupt that was not told.
    pub(super) fn catch_up(&mut self, now: Instant, until: Instant, unheard: Duration, is_interrupt_told: bool) {
        if !self.is_sent || self.is_setup {
            self.deadline += unheard;
        }
        self.deadline = self.deadline.max(until);
        self.replied_at = self.replied_at.map(|_| now);
        self.probe_at = Some(now + PROBE_AFTER);
        if let Some(stopping) = &mut self.stopping {
            let later = if is_interrupt_told { Duration::ZERO } else { unheard };
            stopping.signal_at = stopping.signal_at.map(|at| at + later);
            stopping.kill_at = stopping.kill_at.map(|at| (at + later).max(until));
        }
    }

    /// Since when it is being stopped, by what an earlier process knew.
    pub(super) fn stopped_since(&mut self, since: Instant) {
        if let Some(stopping) = &mut self.stopping {
            stopping.since = since;
        }
    }

    /// Its kernel is gone, and has perhaps run it: what has become of it is told until then.
    pub(super) fn is_gone(&mut self, until: Instant) {
        self.gone_until = Some(until);
    }

    pub(super) fn next_deadline(&self) -> Instant {
        let stopping = self.stopping.as_ref();
        let times = [
            self.replied_at.map(|t| t + IDLE_AFTER_REPLY),
            stopping.and_then(|s| s.signal_at),
            stopping.and_then(|s| s.kill_at),
            self.probe_at,
            self.gone_until,
        ];
        let limit = if stopping.is_some_and(|s| s.kill_at.is_some()) { None } else { Some(self.deadline) };
        times.into_iter().chain([limit]).flatten().min().unwrap_or(self.deadline)
    }

    pub(super) fn due(&mut self, now: Instant) -> Option<Due> {
        if self.replied_at.is_some_and(|t| now >= t + IDLE_AFTER_REPLY) {
            return Some(Due::Complete);
        }
        if self.gone_until.is_some_and(|at| now >= at) {
            return Some(Due::Gone);
        }
        if self.probe_at.is_some_and(|at| now >= at) {
            self.probe_at = None;
            if self.reply.is_none() {
                self.probe_wait = (self.probe_wait * 2).min(PROBE_MOST);
                self.probe_at = Some(now + self.probe_wait);
                return Some(Due::Probe);
            }
        }
        match &mut self.stopping {
            Some(Stopping { status: Some(status), kill_at: Some(at), .. }) if now >= *at => Some(Due::Kill(*status)),
            Some(Stopping { signal_at, .. }) if signal_at.is_some_and(|at| now >= at) => {
                *signal_at = None;
                Some(Due::Signal)
            }
            Some(Stopping { kill_at: Some(_), .. }) => None,
            _ if now >= self.deadline => Some(Due::TimeLimit),
            _ => None,
        }
    }

    /// Interrupts without a verdict: the code may catch it.
    pub(super) fn interrupt(&mut self, now: Instant) {
        let signal_at = Some(now + SIGNAL_AFTER);
        self.probe_at = Some(now + PROBE_AFTER);
        match &mut self.stopping {
            Some(stopping) => stopping.signal_at = signal_at,
            none => *none = Some(Stopping { since: now, status: None, signal_at, kill_at: None }),
        }
    }

    /// Begins to stop it with a verdict; false when that has been done before: the first verdict stays, and asking again puts
    /// nothing off.
    pub(super) fn stop(&mut self, status: Status, grace: Duration, now: Instant) -> bool {
        if self.stopping.as_ref().is_some_and(|s| s.kill_at.is_some()) {
            return false;
        }
        self.probe_at = Some(now + PROBE_AFTER);
        self.stopping = Some(Stopping {
            since: now,
            status: Some(status),
            signal_at: Some(now + SIGNAL_AFTER.min(grace / 2)),
            kill_at: Some(now + grace),
        });
        true
    }

    /// A request to interrupt it is on its way.
    pub(super) fn is_asked_to_interrupt(&mut self, msg_id: String) {
        self.interrupt = Some(msg_id);
        self.is_interrupt_early = !self.is_under_way;
    }

    /// The kernel has answered a request to interrupt. Where it has interrupted itself, a signal on top would interrupt what the code does to
    /// clean up; but what came too early may have hit nothing.
    pub(super) fn interrupt_is_answered(&mut self, msg_id: &str, is_done: bool) {
        let was_last = self.interrupt.take_if(|last| last == msg_id).is_some();
        if was_last
            && is_done
            && !self.is_interrupt_early
            && let Some(stopping) = &mut self.stopping
        {
            stopping.signal_at = None;
        }
    }

    /// The kernel is at its code now. Says whether an interrupt that came too early for that is to be said again; one that the guest has not
    /// taken yet is followed by the signal.
    pub(super) fn gets_under_way(&mut self, is_interrupt_told: bool) -> bool {
        self.is_under_way = true;
        is_interrupt_told && std::mem::take(&mut self.is_interrupt_early) && self.stopping.is_some()
    }

    /// It is sent now. A kernel whose request is lost, as an interrupt that comes late does it, would be waited for until the time limit.
    pub(super) fn is_to_begin(&mut self, now: Instant) {
        // Messages of comms are not replied to, so nothing would be learnt.
        self.probe_at = self.execution.request.comm.is_none().then(|| now + BEGINS);
    }

    /// The kernel says that it works on it.
    pub(super) fn has_begun(&mut self) {
        self.execution.is_busy();
        if self.stopping.is_none() && !self.idle && self.probe.is_none() {
            self.probe_at = None;
        }
    }

    /// Something was heard of it.
    pub(super) fn heard(&mut self, now: Instant) {
        self.replied_at = self.replied_at.map(|_| now);
    }

    /// Says whether it is in the record.
    pub(super) fn output(&mut self, event: ExecutionEvent, now: Instant) -> bool {
        let is_error = matches!(event, ExecutionEvent::Error(_));
        if is_error {
            self.errored_at.get_or_insert(now);
        }
        let is_told = self.execution.output(event);
        self.error_told |= is_error && is_told;
        is_told
    }

    /// Whether what was taken into the queue by then was asked for by somebody who could not know of its error.
    pub(super) fn failed_after(&self, since: Instant) -> bool {
        self.errored_at.is_none_or(|at| since <= at)
    }

    /// The kernel says that it has nothing to do.
    pub(super) fn is_idle(&mut self, now: Instant) {
        self.idle = true;
        self.probe_at = Some(now + PROBE_AFTER);
    }

    pub(super) fn has_replied(&mut self, reply: protocol::ExecuteReply, text: Bytes, now: Instant) {
        if let Some(count) = reply.execution_count {
            self.execution.count(count);
        }
        (self.reply, self.reply_text) = (Some(reply), Some(text));
        self.replied_at = Some(now);
    }

    /// The kernel is done with what it was asked before the probe.
    pub(super) fn reply_is_lost(&mut self) {
        let name = if self.stopping.is_some() { "KeyboardInterrupt" } else { "NoReply" }.to_owned();
        let value = "the kernel ended it without a reply".to_owned();
        let error = Some(ErrorInfo { name, value, traceback: Vec::new() }).filter(|_| !self.error_told);
        self.reply = Some(protocol::ExecuteReply { error, ..protocol::ExecuteReply::failed() });
    }

    /// Whether this message id is that of the probe, and its answer would say something.
    pub(super) fn is_probe(&self, msg_id: &str) -> bool {
        self.reply.is_none() && self.probe.as_deref() == Some(msg_id)
    }

    pub(super) fn is_done(&self) -> bool {
        // Messages of comms are not replied to.
        self.idle && (self.reply.is_some() || self.execution.request.comm.is_some())
    }

    /// Whether the kernel has said that it will exit.
    pub(super) fn is_leaving(&self) -> bool {
        self.reply.as_ref().is_some_and(|reply| reply.leaving)
    }

    /// The code asks for a line: the next one, or a caller is asked, or its input is at its end.
    pub(super) fn asks(&mut self, request: InputRequest, header: Bytes) -> Input {
        if self.execution.request.stdin == Stdin::Interactive {
            let InputRequest { prompt, password } = request;
            // Where nobody is told, nobody answers: the time limit ends it.
            if !self.execution.output(ExecutionEvent::InputRequested { prompt, password }) {
                return Input::Ignore;
            }
            self.asked = Some(header);
            self.execution.set_asking(true);
            return Input::Ask;
        }
        self.next_line(&header)
    }

    fn next_line(&mut self, asked: &Bytes) -> Input {
        let (line, is_end) = match self.lines.pop_front() {
            Some(line) => (line, false),
            // Each answer is a message that waits for its turn, and a kernel may ask without end.
            None if self.ends_told >= MAX_ENDS => return Input::Ignore,
            None => (protocol::END_OF_INPUT.to_owned(), true),
        };
        self.lines_given += usize::from(!is_end);
        self.ends_told += u32::from(is_end);
        self.unsent = Some(Unsent { msg_id: self.line_id(asked), asked: asked.clone(), is_end });
        Input::Line(line)
    }

    /// A caller answers; the header of the request it answers, if there is one.
    pub(super) fn take_asked(&mut self) -> Option<Bytes> {
        self.execution.set_asking(false);
        let asked = self.asked.take()?;
        self.lines_given += 1;
        self.unsent = Some(Unsent { msg_id: self.line_id(&asked), asked: asked.clone(), is_end: false });
        Some(asked)
    }

    /// The id of the message that answers a request for input: the guest passes none on twice, whichever process sends it.
    pub(super) fn line_id(&self, asked: &Bytes) -> String {
        let hash: String = Sha256::digest(asked).iter().take(8).map(|b| format!("{b:02x}")).collect();
        format!("{}-line-{hash}", self.msg_id)
    }

    /// The guest has taken a message.
    pub(super) fn was_sent(&mut self, msg_id: &str) {
        self.is_sent |= self.msg_id == msg_id;
        self.unsent.take_if(|unsent| unsent.msg_id == msg_id);
    }

    /// Why it is being stopped, and since when.
    pub(super) fn verdict(&self) -> Option<(Status, Instant)> {
        self.stopping.as_ref().and_then(|s| Some((s.status?, s.since)))
    }

    /// Ends it as the kernel did.
    pub(super) fn finish(mut self, now: Instant) -> Finished {
        // A kernel that leaves takes the variables with it.
        let step = if self.is_leaving() { StopStep::Restart } else { StopStep::Interrupt };
        let reply = self.reply.take().unwrap_or_else(protocol::ExecuteReply::done);
        if let (Some(error), false) = (&reply.error, self.error_told) {
            self.execution.output_surely(ExecutionEvent::Error(ErrorInfo::clone(error)));
        }
        self.execution.give_back(reply.user_expressions, reply.payloads);
        let by_itself = if reply.ok { Status::Ok } else { Status::Error };
        let denied = reply.error.as_ref().is_some_and(|e| e.name == "StdinNotImplementedError");
        let end = match self.verdict() {
            Some((status, since)) => stopped(&self.execution, status, step, now - since, Vec::new()),
            None if denied => End::with(Status::InputDenied, "it asked for input, which its caller does not give"),
            None => End::plain(by_itself),
        };
        self.execution.finish(end);
        Finished { ok: reply.ok, error: reply.error }
    }
}

/// How an execution ended that ran to its end.
pub(super) struct Finished {
    pub(super) ok: bool,
    pub(super) error: Option<ErrorInfo>,
}

/// The end of an execution that was stopped, with words for it.
pub(super) fn stopped(
    execution: &Execution,
    status: Status,
    step: StopStep,
    took: Duration,
    also_ended: Vec<ContextId>,
) -> End {
    let why = match status {
        Status::Timeout => format!("it reached its time limit of {} s", execution.request.timeout.as_secs_f64()),
        _ => "it was cancelled".to_owned(),
    };
    let (how, kept) = match step {
        StopStep::Interrupt => ("an interrupt ended it", "variables are kept"),
        StopStep::Restart => ("its kernel was replaced", "variables are gone, files are kept"),
        StopStep::Replace => ("its container was replaced", "variables and files are gone"),
        StopStep::End => ("its session ended", "variables and files are gone"),
    };
    let others = others_ended(also_ended.len());
    let detail = Some(format!("{why}; {how} within {} ms; {kept}{others}", took.as_millis()));
    End { status, detail, stop: Some(Stop { step, took, also_ended }) }
}

/// What more is to be said where other contexts' kernels were ended, too.
pub(super) fn others_ended(count: usize) -> String {
    match count {
        0 => String::new(),
        n => format!("; processes could not be told apart, so {n} other contexts lost their kernels too"),
    }
}

/// What the end of a kernel is to its execution, in words.
pub(super) fn describe_death(cause: &RestartCause) -> String {
    match cause {
        RestartCause::Oom => "memory ran out and the kernel was ended".to_owned(),
        RestartCause::Died { status: Some(status), .. } => format!("the kernel exited with status {status}"),
        RestartCause::Died { signal: Some(signal), .. } => format!("the kernel was ended by signal {signal}"),
        RestartCause::Died { .. } => "the kernel ended".to_owned(),
        RestartCause::Swept => "the kernel was ended with that of another context".to_owned(),
        RestartCause::GuestLost => "the container was replaced".to_owned(),
        RestartCause::Requested => "a caller had the kernel replaced".to_owned(),
        RestartCause::Timeout => "the kernel had to be replaced".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::spec::OutputLimits;
    use crate::session::execution::{ExecutionRequest, Place};

    #[test]
    fn lines_are_given_in_order_and_their_end_is_told_so_often_only() {
        let limits =
            OutputLimits { text_bytes: 1, result_bytes: 1, total_bytes: 1, messages: 1, messages_per_second: 1 };
        let stdin = Stdin::Lines(vec!["a".to_owned(), "b".to_owned()]);
        let request = ExecutionRequest { stdin, ..ExecutionRequest::for_tests(limits) };
        let execution = Execution::new(uuid::Uuid::from_u128(1).into(), Place::for_tests(), request, 0);
        let mut running = Running::new(Arc::new(execution), Instant::now(), false);
        let mut ask = || running.asks(InputRequest { prompt: String::new(), password: false }, Bytes::new());
        assert_eq!([ask(), ask()], ["a", "b"].map(|line| Input::Line(line.to_owned())));
        let ends = (0..1000).filter(|_| ask() == Input::Line(protocol::END_OF_INPUT.to_owned())).count();
        assert_eq!(ends, MAX_ENDS as usize);
        assert_eq!(ask(), Input::Ignore);
    }
}
