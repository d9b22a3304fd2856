//! A context: one kernel's place in a session, with its queue. A machine without I/O: it is told what happened and says what to do.
//!
//! It knows nothing of links or engines; [`Action`]s are carried out in order by the session's task. A kernel that is replaced
//! gets a new name, so nothing the old one says is ever taken for the new one's words.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cellblock_wire::link::{Channel, CutStream, Event, Outbound, OutputCap};

use super::execution::Execution;
use crate::domain::ids::{ContextId, ExecutionId};
use crate::domain::output::{ErrorInfo, ExecutionEvent, RestartCause, Status, Truncated};
use crate::kernel::protocol::{self, Iopub, Request};

/// A `kernel_info_request` is repeated after this long without an iopub message: kernels of the older protocol lose the first.
const NUDGE_AFTER: Duration = Duration::from_millis(250);
/// An interrupt by message is followed by a signal after this long.
const SIGNAL_AFTER: Duration = Duration::from_secs(1);
/// What was interrupted, or says that it is idle without having replied, is looked after when this long has passed.
const PROBE_AFTER: Duration = Duration::from_secs(1);
/// A reply without an idle status counts as the end after this long without any output. A kernel answers before its output
/// has arrived: on a busy machine that takes seconds.
const IDLE_AFTER_REPLY: Duration = Duration::from_secs(10);
/// Most bytes of code that may wait.
const MAX_QUEUED_BYTES: usize = 16 * 1024 * 1024;
/// Most times in a row that a kernel may die before it ran anything.
const MAX_FAILED_BOOTS: u32 = 3;

/// Something for the session's task to do, in order.
#[derive(Debug, Clone)]
pub(super) enum Action {
    /// Start a kernel under this name.
    Start { kernel: String },
    /// End a kernel with all its processes.
    Delete { kernel: String },
    /// Pass a message on.
    Send { kernel: String, head: Outbound, parts: Vec<Bytes> },
    /// Signal a kernel's process group.
    Signal { kernel: String, signal: &'static str },
}

/// What a context tells the session beside its actions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Notice {
    /// The kernel answers.
    Ready,
    /// The kernel would not start; a sentence for people.
    BootFailed(String),
}

/// Times that a context keeps to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// A kernel answers within this time of its start.
    pub boot: Duration,
    /// An interrupt is obeyed within this time, or the kernel is replaced.
    pub interrupt_grace: Duration,
    /// An execution that waits longer ends without having run.
    pub queue: Duration,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a context has one of it, and most of the time the large one")]
enum State {
    Booting {
        connected: bool,
        replied: bool,
        iopub: bool,
        nudge_at: Instant,
        deadline: Instant,
    },
    Idle,
    Running(Running),
    /// The kernel is gone and no new one was asked for.
    Dead,
}

#[derive(Debug)]
struct Running {
    execution: Arc<Execution>,
    msg_id: String,
    reply: Option<protocol::ExecuteReply>,
    /// When something was last heard of it, once it has replied: output that was under way may take its time.
    replied_at: Option<Instant>,
    idle: bool,
    deadline: Instant,
    /// When the kernel is asked whether it is done: it answers in order, so its answer without a reply before means that the reply is
    /// lost (an interrupt in the wrong moment does that).
    probe_at: Option<Instant>,
    probe: Option<String>,
    stop: Option<Stop>,
    error_told: bool,
}

/// An execution is being stopped.
#[derive(Debug)]
struct Stop {
    status: Option<Status>,
    signal_at: Option<Instant>,
    kill_at: Option<Instant>,
}

/// A context.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) id: ContextId,
    pub(super) language: String,
    client: String,
    pace: Pace,
    kernel: String,
    born: u32,
    failed_boots: u32,
    oom_kills: u64,
    messages: u64,
    state: State,
    queue: VecDeque<Waiting>,
    max_queue: usize,
    /// The kernel was replaced while nothing ran: the next execution is told.
    replaced: Option<RestartCause>,
    /// An interrupt is on its way to the guest; another one would say nothing more.
    interrupting: bool,
    actions: Vec<Action>,
    notices: Vec<Notice>,
}

/// An execution that waits for its turn.
#[derive(Debug)]
struct Waiting {
    since: Instant,
    execution: Arc<Execution>,
}

/// The queue of a context is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueFull;

/// Whoever waits for an execution learns of its end even if the session's task panics.
impl Drop for Context {
    fn drop(&mut self) {
        self.settle(Status::Lost);
    }
}

impl Context {
    pub(super) fn new(id: ContextId, pace: Pace, max_queue: usize) -> Self {
        Self {
            id,
            language: String::new(),
            client: id.to_string(),
            pace,
            kernel: String::new(),
            born: 0,
            failed_boots: 0,
            oom_kills: 0,
            messages: 0,
            state: State::Dead,
            queue: VecDeque::new(),
            max_queue,
            replaced: None,
            interrupting: false,
            actions: Vec::new(),
            notices: Vec::new(),
        }
    }

    /// What is to be done, and what the session should know; both are handed out once.
    pub(super) fn take(&mut self) -> (Vec<Action>, Vec<Notice>) {
        (std::mem::take(&mut self.actions), std::mem::take(&mut self.notices))
    }

    /// Whether something runs or waits.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self.state, State::Running(_)) || !self.queue.is_empty()
    }

    /// Whether its kernel answers.
    pub(super) fn is_up(&self) -> bool {
        matches!(self.state, State::Idle | State::Running(_))
    }

    /// How many executions would be before a new one.
    pub(super) fn position(&self) -> usize {
        self.queue.len() + usize::from(matches!(self.state, State::Running(_)))
    }

    /// When [`Context::on_time`] wants to be called next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let own = match &self.state {
            State::Booting { nudge_at, deadline, .. } => Some(*nudge_at.min(deadline)),
            State::Running(running) => Some(running.next_deadline()),
            State::Idle | State::Dead => None,
        };
        let queued = self.queue.front().map(|waiting| waiting.since + self.pace.queue);
        own.into_iter().chain(queued).min()
    }

    /// Starts a kernel under a new name.
    pub(super) fn boot(&mut self, now: Instant) {
        self.born += 1;
        self.interrupting = false;
        self.kernel = format!("{}n{}", self.id, self.born);
        self.state = State::Booting {
            connected: false,
            replied: false,
            iopub: false,
            nudge_at: now + self.pace.boot,
            deadline: now + self.pace.boot,
        };
        self.actions.push(Action::Start { kernel: self.kernel.clone() });
        self.ask_kernel_info();
    }

    /// Takes an execution into the queue.
    pub(super) fn enqueue(&mut self, execution: Arc<Execution>, now: Instant) -> Result<(), QueueFull> {
        let bytes: usize = self.queue.iter().map(|w| w.execution.request.code.len()).sum();
        if self.queue.len() >= self.max_queue || bytes + execution.request.code.len() > MAX_QUEUED_BYTES {
            return Err(QueueFull);
        }
        self.queue.push_back(Waiting { since: now, execution });
        self.advance(now);
        Ok(())
    }

    /// Interrupts what runs, without a verdict: the code may catch it.
    pub(super) fn interrupt(&mut self, now: Instant) {
        let State::Running(running) = &mut self.state else { return };
        let signal_at = Some(now + SIGNAL_AFTER);
        running.probe_at = Some(now + PROBE_AFTER);
        match &mut running.stop {
            Some(stop) => stop.signal_at = signal_at,
            none => *none = Some(Stop { status: None, signal_at, kill_at: None }),
        }
        self.send_interrupt();
    }

    /// Takes an execution back: out of the queue, or by an interrupt.
    pub(super) fn cancel(&mut self, id: ExecutionId, now: Instant) {
        if let Some(at) = self.queue.iter().position(|w| w.execution.id == id) {
            if let Some(waiting) = self.queue.remove(at) {
                waiting.execution.finish(Status::Cancelled);
            }
        } else if let State::Running(running) = &self.state
            && running.execution.id == id
        {
            self.stop(Status::Cancelled, now);
        }
    }

    /// Replaces the kernel. What runs or waits is cancelled.
    pub(super) fn restart(&mut self, now: Instant) {
        self.queue.drain(..).for_each(|w| w.execution.finish(Status::Cancelled));
        self.failed_boots = 0;
        self.replace_kernel(Status::Cancelled, &RestartCause::Requested, now);
    }

    /// Ends everything that runs or waits.
    pub(super) fn settle(&mut self, status: Status) {
        if let State::Running(running) = std::mem::replace(&mut self.state, State::Dead) {
            running.execution.finish(status);
        }
        self.queue.drain(..).for_each(|w| w.execution.finish(status));
    }

    /// Takes an event of the guest.
    pub(super) fn on_event(&mut self, kernel: &str, event: Event, parts: &[Bytes], now: Instant) {
        if kernel != self.kernel {
            return;
        }
        match event {
            Event::Message { channel, msg_type, parent_id } => {
                self.on_message(channel, &msg_type, &parent_id, parts, now)
            }
            Event::Gap { parent_id, stream, total_bytes, omitted_bytes } => {
                if let Some(running) = self.running(&parent_id) {
                    let what = truncated(stream);
                    running.execution.output(ExecutionEvent::OutputTruncated { what, omitted_bytes, total_bytes });
                }
            }
            Event::KernelConnected => {
                if let State::Booting { connected, nudge_at, .. } = &mut self.state {
                    (*connected, *nudge_at) = (true, now + NUDGE_AFTER);
                }
                self.check_boot(now);
            }
            Event::KernelFailed { channel, reason, stderr_tail } => {
                let channel = channel.map(|c| format!("channel {c}: ")).unwrap_or_default();
                let cause = RestartCause::Died { status: None, signal: None };
                self.on_death(&format!("{channel}{reason}"), &stderr_tail, Status::KernelDied, &cause, now);
            }
            Event::KernelExited { status, signal, oom_kills, stderr_tail } => {
                let oom = oom_kills > self.oom_kills && signal == Some(9);
                self.oom_kills = self.oom_kills.max(oom_kills);
                let (verdict, cause) = if oom {
                    (Status::Oom, RestartCause::Oom)
                } else {
                    (Status::KernelDied, RestartCause::Died { status, signal })
                };
                self.on_death(&describe_exit(status, signal, oom), &stderr_tail, verdict, &cause, now);
            }
        }
    }

    /// The guest has taken an interrupt over.
    pub(super) fn on_interrupt_sent(&mut self) {
        self.interrupting = false;
    }

    /// The guest would not start the kernel, or not pass a message on to it.
    pub(super) fn on_refusal(&mut self, kernel: &str, reason: &str, now: Instant) {
        if kernel == self.kernel && !matches!(self.state, State::Dead) {
            let cause = RestartCause::Died { status: None, signal: None };
            self.on_death(reason, "", Status::KernelDied, &cause, now);
        }
    }

    /// Does what is due.
    pub(super) fn on_time(&mut self, now: Instant) {
        while let Some(waiting) = self.queue.pop_front_if(|w| now >= w.since + self.pace.queue) {
            waiting.execution.finish(Status::Timeout);
        }
        match &mut self.state {
            State::Booting { deadline, .. } if now >= *deadline => {
                let reason = format!("the kernel did not answer within {:?}", self.pace.boot);
                let cause = RestartCause::Died { status: None, signal: None };
                self.on_death(&reason, "", Status::KernelDied, &cause, now);
            }
            State::Booting { nudge_at, .. } if now >= *nudge_at => {
                *nudge_at = now + NUDGE_AFTER;
                self.ask_kernel_info();
            }
            State::Running(running) => {
                let due = running.due(now);
                self.on_due(due, now);
            }
            _ => {}
        }
    }

    fn on_due(&mut self, due: Option<Due>, now: Instant) {
        match due {
            Some(Due::Complete) => self.complete(now),
            Some(Due::TimeLimit) => self.stop(Status::Timeout, now),
            Some(Due::Probe) => self.probe(),
            Some(Due::Signal) => self.actions.push(Action::Signal { kernel: self.kernel.clone(), signal: "SIGINT" }),
            Some(Due::Kill(status)) => self.replace_kernel(status, &RestartCause::Timeout, now),
            None => {}
        }
    }

    fn on_message(&mut self, channel: Channel, msg_type: &str, parent_id: &str, parts: &[Bytes], now: Instant) {
        let Some(content) = parts.get(3) else { return };
        if parent_id.strip_prefix(&self.kernel).is_some_and(|rest| rest.starts_with("-info")) {
            self.on_boot_message(channel, msg_type, content, now);
            return;
        }
        let is_probe = |running: &Running| running.reply.is_none() && running.probe.as_deref() == Some(parent_id);
        if channel == Channel::Shell && matches!(&self.state, State::Running(running) if is_probe(running)) {
            self.on_probe_reply(now);
            return;
        }
        match channel {
            Channel::Iopub => self.on_iopub(msg_type, parent_id, content, now),
            Channel::Shell if msg_type == "execute_reply" => self.on_reply(parent_id, content, now),
            Channel::Control if msg_type == "interrupt_reply" => self.on_interrupt_reply(content),
            Channel::Shell | Channel::Control | Channel::Stdin => {}
        }
    }

    fn probe(&mut self) {
        let msg_id = self.next_id("probe");
        let request = protocol::request(&msg_id, &self.client, "kernel_info_request", &serde_json::json!({}));
        if let State::Running(running) = &mut self.state {
            running.probe = Some(msg_id);
        }
        self.send(Channel::Shell, request, None);
    }

    /// The kernel is done with what it was asked before the probe.
    fn on_probe_reply(&mut self, now: Instant) {
        if let State::Running(running) = &mut self.state {
            let name = if running.stop.is_some() { "KeyboardInterrupt" } else { "NoReply" }.to_owned();
            let value = "the kernel ended it without a reply".to_owned();
            let error = Some(ErrorInfo { name, value, traceback: Vec::new() }).filter(|_| !running.error_told);
            running.reply = Some(protocol::ExecuteReply { ok: false, execution_count: None, error, leaving: false });
            self.complete(now);
        }
    }

    /// The kernel has interrupted itself: a signal on top would interrupt what the code does to clean up.
    fn on_interrupt_reply(&mut self, content: &[u8]) {
        if let State::Running(Running { stop: Some(stop), .. }) = &mut self.state
            && protocol::read_execute_reply(content).is_ok_and(|reply| reply.ok)
        {
            stop.signal_at = None;
        }
    }

    fn on_boot_message(&mut self, channel: Channel, msg_type: &str, content: &[u8], now: Instant) {
        let State::Booting { replied, iopub, .. } = &mut self.state else { return };
        match channel {
            Channel::Iopub => *iopub = true,
            Channel::Shell if msg_type == "kernel_info_reply" => {
                *replied = true;
                if let Some(language) = protocol::language_of(content) {
                    self.language = language;
                }
            }
            _ => return,
        }
        self.check_boot(now);
    }

    fn on_iopub(&mut self, msg_type: &str, parent_id: &str, content: &[u8], now: Instant) {
        let Some(running) = self.running(parent_id) else { return };
        running.replied_at = running.replied_at.map(|_| now);
        match protocol::read_iopub(msg_type, content) {
            Ok(Iopub::Output(event)) => {
                running.error_told |= matches!(event, ExecutionEvent::Error(_));
                running.execution.output(event);
            }
            Ok(Iopub::ExecutionCount(count)) => running.execution.count(count),
            Ok(Iopub::Status { idle: true }) => {
                running.idle = true;
                running.probe_at = Some(now + PROBE_AFTER);
                self.complete_if_done(now);
            }
            Ok(Iopub::Status { idle: false } | Iopub::Other) => {}
            Err(error) => tracing::debug!(%error, "a kernel's message was dropped"),
        }
    }

    fn on_reply(&mut self, parent_id: &str, content: &[u8], now: Instant) {
        let Some(running) = self.running(parent_id) else { return };
        match protocol::read_execute_reply(content) {
            Ok(reply) => {
                if let Some(count) = reply.execution_count {
                    running.execution.count(count);
                }
                running.reply = Some(reply);
                running.replied_at = Some(now);
                self.complete_if_done(now);
            }
            Err(error) => tracing::debug!(%error, "a kernel's reply was dropped"),
        }
    }

    fn running(&mut self, msg_id: &str) -> Option<&mut Running> {
        match &mut self.state {
            State::Running(running) if running.msg_id == msg_id => Some(running),
            _ => None,
        }
    }

    fn check_boot(&mut self, now: Instant) {
        if let State::Booting { connected: true, replied: true, iopub: true, .. } = self.state {
            self.state = State::Idle;
            self.notices.push(Notice::Ready);
            self.advance(now);
        }
    }

    fn complete_if_done(&mut self, now: Instant) {
        if let State::Running(Running { idle: true, reply: Some(_), .. }) = &self.state {
            self.complete(now);
        }
    }

    fn complete(&mut self, now: Instant) {
        let State::Running(running) = std::mem::replace(&mut self.state, State::Idle) else { return };
        self.failed_boots = 0;
        if running.reply.as_ref().is_some_and(|reply| reply.leaving) {
            // It would take the next request and die with it.
            let cause = RestartCause::Died { status: Some(0), signal: None };
            running.execution.output(ExecutionEvent::KernelRestarted { cause });
            running.finish();
            self.actions.push(Action::Delete { kernel: self.kernel.clone() });
            self.boot(now);
            return;
        }
        running.finish();
        self.advance(now);
    }

    /// Starts the next execution, if the kernel is free.
    fn advance(&mut self, now: Instant) {
        if !matches!(self.state, State::Idle) {
            return;
        }
        let Some(Waiting { execution, .. }) = self.queue.pop_front() else { return };
        let msg_id = execution.id.to_string();
        let asked = &execution.request;
        let content = protocol::execute_content(&asked.code, asked.silent, asked.store_history, false);
        let request = protocol::request(&msg_id, &self.client, "execute_request", &content);
        let cap = OutputCap {
            text_bytes: asked.output.text_bytes,
            result_bytes: asked.output.result_bytes,
            messages: asked.output.messages,
        };
        let deadline = now + asked.timeout;
        execution.start();
        if let Some(cause) = self.replaced.take() {
            execution.output(ExecutionEvent::KernelRestarted { cause });
        }
        self.state = State::Running(Running {
            execution,
            msg_id,
            reply: None,
            replied_at: None,
            idle: false,
            deadline,
            probe_at: None,
            probe: None,
            stop: None,
            error_told: false,
        });
        self.send(Channel::Shell, request, Some(cap));
    }

    fn stop(&mut self, status: Status, now: Instant) {
        let State::Running(running) = &mut self.state else { return };
        // The first verdict stays, and asking again puts nothing off.
        if running.stop.as_ref().is_some_and(|stop| stop.kill_at.is_some()) {
            return;
        }
        running.probe_at = Some(now + PROBE_AFTER);
        running.stop = Some(Stop {
            status: Some(status),
            signal_at: Some(now + SIGNAL_AFTER.min(self.pace.interrupt_grace / 2)),
            kill_at: Some(now + self.pace.interrupt_grace),
        });
        self.send_interrupt();
    }

    fn send_interrupt(&mut self) {
        if self.interrupting {
            return;
        }
        self.interrupting = true;
        let msg_id = self.next_id("int");
        let request = protocol::request(&msg_id, &self.client, "interrupt_request", &serde_json::json!({}));
        self.send(Channel::Control, request, None);
    }

    fn ask_kernel_info(&mut self) {
        let msg_id = self.next_id("info");
        let request = protocol::request(&msg_id, &self.client, "kernel_info_request", &serde_json::json!({}));
        self.send(Channel::Shell, request, None);
    }

    fn next_id(&mut self, word: &str) -> String {
        self.messages += 1;
        format!("{}-{word}{}", self.kernel, self.messages)
    }

    fn send(&mut self, channel: Channel, request: Request, cap: Option<OutputCap>) {
        let head = Outbound { channel, msg_id: request.msg_id, cap };
        self.actions.push(Action::Send { kernel: self.kernel.clone(), head, parts: request.parts });
    }

    fn on_death(&mut self, reason: &str, stderr_tail: &str, status: Status, cause: &RestartCause, now: Instant) {
        if matches!(self.state, State::Booting { .. }) {
            self.failed_boots += 1;
            if self.born == 1 || self.failed_boots >= MAX_FAILED_BOOTS {
                self.actions.push(Action::Delete { kernel: self.kernel.clone() });
                self.settle(Status::KernelDied);
                self.notices.push(Notice::BootFailed(with_tail(reason, stderr_tail)));
                return;
            }
        }
        self.replace_kernel(status, cause, now);
    }

    fn replace_kernel(&mut self, status: Status, cause: &RestartCause, now: Instant) {
        if let State::Running(running) = std::mem::replace(&mut self.state, State::Dead) {
            running.execution.output(ExecutionEvent::KernelRestarted { cause: cause.clone() });
            running.execution.finish(status);
        } else if *cause != RestartCause::Requested {
            self.replaced = Some(cause.clone());
        }
        self.actions.push(Action::Delete { kernel: self.kernel.clone() });
        self.boot(now);
    }
}

/// What is due for a running execution.
enum Due {
    Complete,
    TimeLimit,
    Probe,
    Signal,
    Kill(Status),
}

impl Running {
    fn next_deadline(&self) -> Instant {
        let stop = self.stop.as_ref();
        let times = [
            self.replied_at.map(|t| t + IDLE_AFTER_REPLY),
            stop.and_then(|s| s.signal_at),
            stop.and_then(|s| s.kill_at),
            self.probe_at,
        ];
        let limit = if stop.is_some_and(|s| s.kill_at.is_some()) { None } else { Some(self.deadline) };
        times.into_iter().chain([limit]).flatten().min().unwrap_or(self.deadline)
    }

    fn due(&mut self, now: Instant) -> Option<Due> {
        if self.replied_at.is_some_and(|t| now >= t + IDLE_AFTER_REPLY) {
            return Some(Due::Complete);
        }
        if self.probe_at.is_some_and(|at| now >= at) {
            self.probe_at = None;
            if self.reply.is_none() && self.probe.is_none() {
                return Some(Due::Probe);
            }
        }
        match &mut self.stop {
            Some(Stop { status: Some(status), kill_at: Some(at), .. }) if now >= *at => Some(Due::Kill(*status)),
            Some(Stop { signal_at, .. }) if signal_at.is_some_and(|at| now >= at) => {
                *signal_at = None;
                Some(Due::Signal)
            }
            Some(Stop { kill_at: Some(_), .. }) => None,
            _ if now >= self.deadline => Some(Due::TimeLimit),
            _ => None,
        }
    }

    fn finish(self) {
        let reply = self.reply.unwrap_or(protocol::ExecuteReply {
            ok: true,
            execution_count: None,
            error: None,
            leaving: false,
        });
        if let (Some(error), false) = (&reply.error, self.error_told) {
            self.execution.output(ExecutionEvent::Error(ErrorInfo::clone(error)));
        }
        let by_itself = if reply.ok { Status::Ok } else { Status::Error };
        let denied = reply.error.as_ref().is_some_and(|e| e.name == "StdinNotImplementedError");
        let verdict = self.stop.and_then(|s| s.status).unwrap_or(if denied { Status::InputDenied } else { by_itself });
        self.execution.finish(verdict);
    }
}

fn truncated(stream: CutStream) -> Truncated {
    match stream {
        CutStream::Stdout => Truncated::Stdout,
        CutStream::Stderr => Truncated::Stderr,
        CutStream::Results => Truncated::Results,
    }
}

fn describe_exit(status: Option<i32>, signal: Option<i32>, oom: bool) -> String {
    match (status, signal) {
        _ if oom => "the kernel was ended because memory ran out".to_owned(),
        (Some(status), _) => format!("the kernel exited with status {status}"),
        (None, Some(signal)) => format!("the kernel was ended by signal {signal}"),
        (None, None) => "the kernel ended".to_owned(),
    }
}

fn with_tail(reason: &str, stderr_tail: &str) -> String {
    let tail = stderr_tail.trim();
    if tail.is_empty() { reason.to_owned() } else { format!("{reason}; its last words: {tail}") }
}
