//! A context: one kernel's place in a session, with its queue. A machine without I/O: it is told what happened and says what to do.
//!
//! It knows nothing of links or engines; [`Action`]s are carried out in order by the session's task. A kernel that is replaced
//! gets a new name, so nothing the old one says is ever taken for the new one's words.
//!
//! Code that does not end meets a ladder. Each step is for what the one before did not end; `Stop` in the execution's answer says which one
//! did, how long it took, and whether variables survived.
//!
//! ```text
//! time limit, or a cancel ──▶ interrupt: a message, a second later a signal     (left out with on_timeout: restart)
//!         interrupt_grace ──▶ Replacing: the guest ends the kernel with all its processes; a new one boots in the same cell
//!      the guest is silent ──▶ the session's task links it again, or finds it gone, which ends the session, or silent, which ends or replaces it (on_guest_lost)
//! ```
//!
//! After an interrupt nothing new begins until the kernel has answered a question after it (`Settling`): a late interrupt would hit the next
//! execution, whose request would be lost with it. A kernel that does not answer within ten seconds is replaced. One that does not say that it has begun
//! with what it was sent is asked too: it answers in order, so its answer means that the request is lost. A cell with one kernel is swept with `kill(-1)`, which no fork bomb survives; with others beside it,
//! what can be traced is killed first, and if that does not do, everything is, and the answer names the contexts that lost their kernels too.
//! A kernel that ends by itself takes the second step at once. Whether it was memory is told by the cgroup's count of killed processes, kept for
//! the whole cell, so that what ended one context's process is never taken for the end of another's.
//!
//! What runs or waits goes on with the next process: its request is sent again, which the guest refuses where it was sent before.

use std::collections::{BTreeMap, VecDeque};
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cellblock_wire::link::{Channel, CutStream, Event, Init, KernelDeleted, Outbound, OutputCap, Refusal};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::execution::{End, Execution, ExecutionRequest, OnTimeout, Place, Stdin};
use super::retelling::Mark;
use super::running::{Due, Input, Running, describe_death, others_ended, stopped};
use super::wiring::{Act, ActKind, UNKEPT};
use super::{fresh, instant};
use crate::domain::ids::{ContextId, ExecutionId};
use crate::domain::lifecycle::EndReason;
use crate::domain::output::{ExecutionEvent, JsonText, RestartCause, Status, StopStep, Truncated};
use crate::domain::spec::{OnKernelDeath, OutputLimits};
use crate::kernel::protocol::{self, Iopub, Request};
use crate::store::state::{ContextRecord, RunningRecord};
pub use clients::Aside;
use clients::Asides;

mod clients;

/// A `kernel_info_request` is repeated after this long without an iopub message: kernels of the older protocol lose the first.
const NUDGE_AFTER: Duration = Duration::from_millis(250);
/// A kernel has dealt with an interrupt within this time, or is asked whether it has; until then nothing new is begun, which it could hit.
const INTERRUPT_SETTLES: Duration = Duration::from_secs(1);
/// A kernel that was interrupted, answered its execution and says nothing more for so long hears nothing either, and is replaced: what came next would
/// wait for its whole time limit.
const SETTLES_MOST: Duration = Duration::from_secs(10);
/// Most bytes of code that may wait.
const MAX_QUEUED_BYTES: usize = 16 * 1024 * 1024;
/// Most times in a row that a kernel may die before it ran anything.
const MAX_FAILED_BOOTS: u32 = 3;
/// Most questions to a kernel that wait for its answer, whether anybody still waits for it or not, and most bytes of them. Fewer than a guest
/// holds for a kernel, so that an execution and an interrupt always find room.
const MAX_QUESTIONS: usize = 32;
const MAX_QUESTION_BYTES: usize = 8 * 1024 * 1024;
/// A kernel that would not take an execution is gone, which an event tells within this time, or is replaced.
const GONE_IS_TOLD: Duration = Duration::from_secs(2);
/// What a guest has kept while nobody heard it has come within this time of the link.
const CATCH_UP: Duration = Duration::from_secs(5);

/// Something for the session's task to do, in order.
#[derive(Debug, Clone)]
pub(super) enum Action {
    /// Start a kernel under this name.
    Start { kernel: String, kernelspec: Option<String>, cwd: Option<String> },
    /// End a kernel with all its processes.
    Delete { kernel: String },
    /// Pass a message on; one of an execution only once that is committed.
    Send { kernel: String, head: Outbound, parts: Vec<Bytes> },
    /// Say again how the cell is set up.
    SetUp(Init),
    /// Signal a kernel's process group.
    Signal { kernel: String, signal: &'static str },
}

/// What a context tells the session beside its actions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Notice {
    /// The kernel answers, and has said what it is.
    Answers,
    /// The kernel is prepared too.
    Ready,
    /// The kernel would not start; a sentence for people.
    BootFailed(String),
    /// The kernel could not be prepared; a sentence for people.
    SetupFailed(String),
    /// The kernel died, and the session is to end with it.
    Died(EndReason),
    /// The kernel was ended for want of memory: one of the processes of the whole cell that were, and not to be told of again.
    OomTold,
}

/// Times that a context keeps to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// A kernel answers within this time of its start, and is prepared.
    pub boot: Duration,
    /// An interrupt is obeyed within this time, or the kernel is replaced.
    pub interrupt_grace: Duration,
    /// An execution that waits longer ends without having run.
    pub queue: Duration,
}

/// What a context is made of.
#[derive(Debug, Clone)]
pub(super) struct Making {
    /// Where its executions belong; the language comes from the kernel.
    pub place: Place,
    pub pace: Pace,
    pub max_queue: usize,
    /// The image's kernelspec; the guest chooses when absent.
    pub kernelspec: Option<String>,
    /// Working folder of the kernel.
    pub cwd: Option<String>,
    /// Code that prepares each new kernel.
    pub setup: Arc<[String]>,
    /// What that may put out.
    pub setup_output: OutputLimits,
    pub on_kernel_death: OnKernelDeath,
    /// Its first setup code stands in the notebook.
    pub is_default: bool,
    /// Its session belongs to nobody yet.
    pub is_unclaimed: bool,
}

#[derive(Debug)]
enum State {
    Booting(Booting),
    /// An earlier process has left the kernel, and nothing of a caller's runs; it is asked something, which it answers when it is free.
    Adopting(Adopting),
    Idle,
    Running(Running),
    /// What ran was interrupted, and the kernel may not have got to that yet.
    Settling(Settling),
    /// The kernel would not take an execution, which waits again. Until then its end is to be heard of.
    Doubtful(Instant),
    /// The kernel is being ended; a new one is asked for when it is gone.
    Replacing(Replacing),
    /// The kernel is gone and no new one was asked for.
    Dead,
}

#[derive(Debug)]
struct Booting {
    connected: bool,
    replied: bool,
    iopub: bool,
    nudge_at: Instant,
    deadline: Instant,
}

#[derive(Debug)]
struct Adopting {
    probe: String,
    until: Instant,
}

#[derive(Debug)]
struct Settling {
    /// The request to interrupt that the kernel has not answered; then it is asked something, which it answers after that.
    interrupt: Option<String>,
    /// What it was asked; an interrupt that comes late may hit it while it answers, so it is asked again.
    probes: Vec<String>,
    until: Instant,
    /// It is replaced then.
    given_up: Instant,
}

#[derive(Debug)]
struct Replacing {
    running: Option<Running>,
    status: Status,
    cause: RestartCause,
    /// What has happened to it, for people.
    words: String,
    since: Instant,
}

/// A context.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) id: ContextId,
    pub(super) created_at: Timestamp,
    pub(super) kernelspec: String,
    pub(super) display_name: String,
    pub(super) language_info: Option<JsonText>,
    making: Making,
    client: String,
    kernel: String,
    born: u32,
    failed_boots: u32,
    /// Processes of the cell ended for want of memory, as far as this context has heard.
    oom_seen: u64,
    /// Kernels of the cell that were told to be among them.
    oom_told: u64,
    messages: u64,
    state: State,
    /// Code that this kernel has yet to run before it is ready.
    to_prepare: VecDeque<Preparation>,
    /// What has prepared it, as long as nobody has claimed its session.
    prepared: Vec<Arc<Execution>>,
    prepare_until: Instant,
    queue: VecDeque<Waiting>,
    questions: BTreeMap<String, Question>,
    /// What clients that speak Jupyter have asked.
    asides: Asides,
    /// The kernel was replaced while nothing ran: the next execution is told.
    replaced: Option<RestartCause>,
    /// The interrupt that is on its way to the guest; another one would say nothing more.
    interrupt: Option<String>,
    actions: Vec<Action>,
    notices: Vec<Notice>,
}

/// Code that prepares a kernel.
#[derive(Debug)]
enum Preparation {
    /// As template or caller have it.
    Setup(String),
    /// Ours, which nobody sees.
    Own(String),
}

/// An execution that waits for its turn.
#[derive(Debug)]
struct Waiting {
    since: Instant,
    execution: Arc<Execution>,
}

/// A question to the kernel.
#[derive(Debug)]
struct Question {
    bytes: usize,
    /// What is asked once the kernel has dealt with an interrupt.
    unsent: Option<Request>,
    answer: oneshot::Sender<JsonText>,
}

/// A bound on what may wait is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueFull;

/// How a context is, for people and programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContextState {
    /// Its kernel does not answer yet, or is being replaced.
    Starting,
    /// Code can run.
    Ready,
    /// Code runs.
    Busy,
}

/// Whoever waits for an execution learns of its end even if the session's task panics.
impl Drop for Context {
    fn drop(&mut self) {
        self.settle(Status::Lost, StopStep::End, "its session is gone");
    }
}

impl Context {
    pub(super) fn new(making: Making) -> Self {
        let id = making.place.context;
        Self {
            id,
            created_at: Timestamp::now(),
            kernelspec: making.kernelspec.clone().unwrap_or_default(),
            display_name: String::new(),
            language_info: None,
            making,
            client: id.to_string(),
            kernel: String::new(),
            born: 0,
            failed_boots: 0,
            oom_seen: 0,
            oom_told: 0,
            messages: 0,
            state: State::Dead,
            to_prepare: VecDeque::new(),
            prepared: Vec::new(),
            prepare_until: Instant::now(),
            queue: VecDeque::new(),
            questions: BTreeMap::new(),
            asides: Asides::default(),
            replaced: None,
            interrupt: None,
            actions: Vec::new(),
            notices: Vec::new(),
        }
    }

    /// One that is new, or gets a kernel in another cell than the one that an earlier process made.
    pub(super) fn again(making: Making, record: &ContextRecord) -> Self {
        let mut context = Self::new(making);
        (context.created_at, context.born) = (record.created_at, record.born);
        context
    }

    /// One that an earlier process has left, with its kernel.
    pub(super) fn adopt(making: Making, record: ContextRecord, now: Instant) -> Self {
        let mut context = Self::new(making);
        context.created_at = record.created_at;
        (context.kernelspec, context.display_name) = (record.kernelspec, record.display_name);
        context.making.place.language = record.language;
        context.language_info = record.language_info;
        (context.oom_seen, context.oom_told) = (record.oom_seen, record.oom_told);
        (context.born, context.replaced) = (record.born, record.replaced);
        context.kernel = format!("{}n{}", context.id, context.born);
        // The kernel takes no id twice, and knows those of the earlier process.
        context.messages = Timestamp::now().as_millisecond().unsigned_abs();
        if record.is_ready {
            let (probe, until) = (context.ask_what_it_is(), now + context.making.pace.boot);
            context.state = State::Adopting(Adopting { probe, until });
        } else {
            context.replace_kernel(Status::Cancelled, RestartCause::Requested, String::new(), now);
        }
        context
    }

    /// Takes over an execution that an earlier process has left, in the order in which they were accepted. `until` is its time limit, if it had begun.
    pub(super) fn take_over(
        &mut self,
        execution: Arc<Execution>,
        kept: Option<RunningRecord>,
        until: Option<Instant>,
        now: Instant,
    ) {
        let Some(until) = until else {
            self.queue.push_back(Waiting { since: now, execution });
            return;
        };
        let kept = kept.unwrap_or_default();
        let mut running = Running::restore(execution, until, &kept, now);
        match (&mut self.state, kept.replacing) {
            (State::Adopting(_), _) => {
                // It is asked after the code instead, or before.
                self.actions.clear();
                let (request, cap) = self.request_of(&running.execution);
                self.send(Channel::Shell, request, Some(cap));
                let line = running.asked_before();
                let grace = self.making.pace.interrupt_grace;
                let is_stopped = kept.verdict.is_some_and(|(status, _)| running.stop(status, grace, now));
                if let Some((_, since)) = kept.verdict {
                    running.stopped_since(instant(since));
                }
                self.state = State::Running(running);
                if let Some((line, asked)) = line {
                    self.send_line(&line, asked);
                }
                if is_stopped {
                    self.send_interrupt();
                }
            }
            (State::Replacing(replacing), Some((status, cause, words))) => {
                *replacing = Replacing { running: Some(running), status, cause, words, since: now };
            }
            // Its kernel is gone, and has not begun with it or has not been heard to end.
            _ => running.execution.finish(End::with(Status::Lost, "its kernel was lost while the server was away")),
        }
    }

    /// The guest is heard again, after it was not for so long. What it tells of the time before is on its way.
    pub(super) fn is_linked(&mut self, now: Instant, unheard: Duration) {
        let until = now + CATCH_UP;
        let is_interrupt_told = self.interrupt.is_none();
        self.prepare_until += unheard;
        match &mut self.state {
            State::Running(running) => running.catch_up(now, until, unheard, is_interrupt_told),
            State::Adopting(adopting) => adopting.until = now + self.making.pace.boot,
            State::Booting(booting) => {
                booting.deadline = (booting.deadline + unheard).max(until);
                booting.nudge_at += unheard;
            }
            State::Settling(settling) => {
                settling.until = settling.until.max(until);
                settling.given_up = settling.given_up.max(until + SETTLES_MOST);
            }
            State::Doubtful(told) => *told = (*told).max(until),
            State::Idle | State::Replacing(_) | State::Dead => {}
        }
    }

    /// Forgets what runs and what waits, which the next process goes on with.
    pub(super) fn leave(&mut self) {
        let state = std::mem::replace(&mut self.state, State::Dead);
        if let State::Running(running) | State::Replacing(Replacing { running: Some(running), .. }) = state {
            running.execution.leave();
        }
        self.queue.drain(..).for_each(|waiting| waiting.execution.leave());
    }

    /// What runs for a caller, and what of it the next process could not hear again; a mark that is different when that is.
    pub(super) fn running_record(&self, wall: fn(Instant) -> Timestamp) -> Option<(ExecutionId, RunningRecord)> {
        let (running, replacing) = match &self.state {
            State::Running(running) => (running, None),
            State::Replacing(Replacing { running: Some(running), status, cause, words, .. }) => {
                (running, Some((*status, cause.clone(), words.clone())))
            }
            _ => return None,
        };
        let record = RunningRecord { replacing, ..running.record(wall) };
        (!running.is_setup).then_some((running.execution.id, record))
    }

    /// What is different when [`Context::running_record`] is.
    pub(super) fn running_mark(&self) -> impl Hash + use<> {
        match &self.state {
            State::Running(running) => Some((running.mark(), false)),
            State::Replacing(Replacing { running: Some(running), .. }) => Some((running.mark(), true)),
            _ => None,
        }
    }

    /// Its session is claimed: what has prepared the kernel stands in the notebook now, the environment is changed, and what more the making has of
    /// setup code is run. Then the kernel is ready again. False when it is not free.
    pub(super) fn claim(
        &mut self,
        making: Making,
        env: &BTreeMap<String, String>,
        within: Duration,
        now: Instant,
    ) -> bool {
        if !matches!(self.state, State::Idle) || !making.setup.starts_with(&self.making.setup) {
            return false;
        }
        let done = self.making.setup.len();
        let language = std::mem::take(&mut self.making.place.language);
        self.making = Making { place: Place { language, ..making.place }, ..making };
        self.prepared.drain(..).for_each(|execution| execution.note_in(&self.making.place.keeping));
        let env = (!env.is_empty()).then(|| Preparation::Own(python_environment(env)));
        let setup = self.making.setup[done..].iter().cloned().map(Preparation::Setup);
        self.to_prepare = env.into_iter().chain(setup).collect();
        self.prepare_until = now + within;
        self.prepare(now);
        true
    }

    /// One of a paused session that an earlier process has left: nothing ran in it. What became of its kernel is told by events.
    pub(super) fn adopt_paused(making: Making, record: ContextRecord, now: Instant) -> Self {
        let is_ready = record.is_ready;
        let mut context = Self::adopt(making, record, now);
        if is_ready {
            context.actions.clear();
            context.state = State::Idle;
        }
        context
    }

    /// What it leaves for the next process.
    pub(super) fn record(&self) -> ContextRecord {
        ContextRecord {
            id: self.id,
            created_at: self.created_at,
            born: self.born,
            is_ready: self.is_up(),
            asked_kernelspec: self.making.kernelspec.clone(),
            cwd: self.making.cwd.clone(),
            kernelspec: self.kernelspec.clone(),
            display_name: self.display_name.clone(),
            language: self.making.place.language.clone(),
            language_info: self.language_info.clone(),
            oom_seen: self.oom_seen,
            oom_told: self.oom_told,
            replaced: self.untold(),
        }
    }

    /// Why the kernel is another one, as the next execution has not been told yet.
    fn untold(&self) -> Option<RestartCause> {
        let being_replaced = match &self.state {
            State::Replacing(Replacing { running: None, cause, .. }) if *cause != RestartCause::Requested => {
                Some(cause.clone())
            }
            _ => None,
        };
        being_replaced.or_else(|| self.replaced.clone())
    }

    /// What is different when [`Context::record`] is, but for what is known before a kernel is up.
    pub(super) fn mark(&self) -> impl Hash + use<> {
        (self.id, self.born, self.is_up(), self.oom_seen, self.oom_told, self.untold().is_some())
    }

    /// What is to be done, and what the session should know; both are handed out once.
    pub(super) fn take(&mut self) -> (Vec<Action>, Vec<Notice>) {
        (std::mem::take(&mut self.actions), std::mem::take(&mut self.notices))
    }

    /// The folder in which its kernel starts, if one was asked for.
    pub(super) fn cwd(&self) -> Option<&str> {
        self.making.cwd.as_deref()
    }

    pub(super) fn language(&self) -> &str {
        &self.making.place.language
    }

    /// Whether a kernel of this name is, or was, this context's.
    pub(super) fn owns(&self, kernel: &str) -> bool {
        kernel.strip_prefix(self.client.as_str()).is_some_and(|rest| rest.starts_with('n'))
    }

    /// Whether this is the kernel that it has.
    pub(super) fn has(&self, kernel: &str) -> bool {
        self.kernel == kernel
    }

    /// Whether something of a caller's runs or waits.
    pub(super) fn is_busy(&self) -> bool {
        let runs = match &self.state {
            State::Running(running) => !running.is_setup,
            State::Replacing(Replacing { running, .. }) => running.as_ref().is_some_and(|r| !r.is_setup),
            State::Adopting(_)
            | State::Booting(_)
            | State::Idle
            | State::Settling(_)
            | State::Doubtful(_)
            | State::Dead => false,
        };
        runs || !self.queue.is_empty()
    }

    /// Whether its kernel answers and is prepared.
    pub(super) fn is_up(&self) -> bool {
        match &self.state {
            State::Idle | State::Settling(_) | State::Doubtful(_) | State::Adopting(_) => true,
            State::Running(running) => !running.is_setup,
            State::Booting(_) | State::Replacing(_) | State::Dead => false,
        }
    }

    /// Whether its kernel is up, has nothing to do, and owes nobody an answer.
    pub(super) fn is_quiet(&self) -> bool {
        let answered = self.questions.values().all(|question| question.answer.is_closed());
        let answered = answered && self.asides.are_quiet();
        matches!(self.state, State::Idle) && self.queue.is_empty() && self.actions.is_empty() && answered
    }

    pub(super) fn state(&self) -> ContextState {
        match &self.state {
            State::Idle | State::Settling(_) => ContextState::Ready,
            State::Adopting(_) => ContextState::Busy,
            State::Running(running) if !running.is_setup => ContextState::Busy,
            _ => ContextState::Starting,
        }
    }

    /// How many executions wait.
    pub(super) fn queued(&self) -> usize {
        self.queue.len()
    }

    /// How many executions would be before a new one.
    pub(super) fn position(&self) -> usize {
        let runs = matches!(&self.state, State::Running(_) | State::Replacing(Replacing { running: Some(_), .. }));
        self.queue.len() + usize::from(runs)
    }

    /// When [`Context::on_time`] wants to be called next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let own = match &self.state {
            State::Booting(Booting { nudge_at, deadline, .. }) => Some(*nudge_at.min(deadline)),
            State::Running(running) => Some(running.next_deadline()),
            State::Settling(settling) => Some(settling.until),
            State::Doubtful(until) => Some(*until),
            State::Adopting(adopting) => Some(adopting.until),
            State::Idle | State::Replacing(_) | State::Dead => None,
        };
        let queued = self.queue.front().map(|waiting| waiting.since + self.making.pace.queue);
        own.into_iter().chain(queued).min()
    }

    /// Starts a kernel under a new name, which is to be ready within a time.
    pub(super) fn boot(&mut self, now: Instant, within: Duration) {
        self.born += 1;
        self.prepared.clear();
        self.interrupt = None;
        self.questions.clear();
        self.kernel = format!("{}n{}", self.id, self.born);
        let deadline = now + within;
        self.prepare_until = deadline;
        self.to_prepare = self.making.setup.iter().cloned().map(Preparation::Setup).collect();
        self.state =
            State::Booting(Booting { connected: false, replied: false, iopub: false, nudge_at: deadline, deadline });
        let Making { kernelspec, cwd, .. } = self.making.clone();
        self.actions.push(Action::Start { kernel: self.kernel.clone(), kernelspec, cwd });
        self.ask_kernel_info();
        self.pass_held(now);
    }

    /// Starts in a new container, which has that much time left to be ready.
    pub(super) fn move_to_new_cell(&mut self, now: Instant, left: Duration) {
        (self.oom_seen, self.oom_told, self.failed_boots) = (0, 0, 0);
        self.boot(now, left);
    }

    /// Takes an execution into the queue.
    pub(super) fn enqueue(
        &mut self,
        id: ExecutionId,
        request: ExecutionRequest,
        now: Instant,
    ) -> Result<Arc<Execution>, QueueFull> {
        let bytes: usize = self.queue.iter().map(|w| w.execution.request.len()).sum();
        if self.queue.len() >= self.making.max_queue || bytes + request.len() > MAX_QUEUED_BYTES {
            return Err(QueueFull);
        }
        let execution = Arc::new(Execution::new(id, self.making.place.clone(), request, self.position()));
        self.queue.push_back(Waiting { since: now, execution: Arc::clone(&execution) });
        self.advance(now);
        Ok(execution)
    }

    /// Interrupts what runs, without a verdict: the code may catch it.
    pub(super) fn interrupt(&mut self, now: Instant) {
        match &mut self.state {
            State::Running(running) => running.interrupt(now),
            _ => return,
        }
        self.send_interrupt();
    }

    /// Takes an execution back: out of the queue, or by an interrupt.
    pub(super) fn cancel(&mut self, id: ExecutionId, now: Instant) {
        if let Some(at) = self.queue.iter().position(|w| w.execution.id == id) {
            if let Some(waiting) = self.queue.remove(at) {
                waiting.execution.finish(End::with(Status::Cancelled, "it was cancelled before it began"));
            }
        } else if let State::Running(running) = &self.state
            && running.execution.id == id
        {
            self.stop(Status::Cancelled, now);
        }
    }

    /// Answers the running execution's request for a line, and says of which kernel that is and under which id; nothing when it asks for none.
    pub(super) fn answer_input(&mut self, id: ExecutionId, line: &str) -> Option<(String, String)> {
        let State::Running(running) = &mut self.state else { return None };
        let asked = (running.execution.id == id).then(|| running.take_asked()).flatten()?;
        let msg_id = running.line_id(&asked);
        self.send_line(line, asked);
        Some((self.kernel.clone(), msg_id))
    }

    /// Asks the kernel something; the content of its answer is sent on when it comes.
    pub(super) fn ask(
        &mut self,
        msg_type: &str,
        content: &Value,
        answer: oneshot::Sender<JsonText>,
    ) -> Result<(), QueueFull> {
        let bytes: usize = self.questions.values().map(|question| question.bytes).sum();
        let msg_id = self.next_id("ask");
        let request = protocol::request(&msg_id, &self.client, msg_type, content);
        let length = request.parts.iter().map(Bytes::len).sum();
        if !self.is_up() || self.questions.len() >= MAX_QUESTIONS || bytes + length > MAX_QUESTION_BYTES {
            return Err(QueueFull);
        }
        let is_settling = matches!(self.state, State::Settling(_));
        let (now, unsent) = if is_settling { (None, Some(request)) } else { (Some(request), None) };
        self.questions.insert(msg_id, Question { bytes: length, unsent, answer });
        if let Some(request) = now {
            self.send(Channel::Shell, request, None);
        }
        Ok(())
    }

    /// Replaces the kernel. What runs or waits is cancelled.
    pub(super) fn restart(&mut self, now: Instant) {
        let end = || End::with(Status::Cancelled, "its kernel was replaced before it began");
        self.queue.drain(..).for_each(|w| w.execution.finish(end()));
        self.failed_boots = 0;
        match &self.state {
            State::Replacing(_) => {}
            _ => self.replace_kernel(Status::Cancelled, RestartCause::Requested, String::new(), now),
        }
    }

    /// Ends everything that runs or waits, and the kernel.
    pub(super) fn close(&mut self) {
        self.settle(Status::Cancelled, StopStep::End, "its context was deleted");
        self.actions.push(Action::Delete { kernel: self.kernel.clone() });
    }

    /// Ends everything that runs or waits. What was being stopped ends with the verdict that it had.
    pub(super) fn settle(&mut self, status: Status, step: StopStep, detail: &str) {
        self.settle_running(status, step, detail);
        self.queue.drain(..).for_each(|w| w.execution.finish(End::with(status, detail)));
    }

    /// Ends what runs; what waits goes on waiting, for a kernel in another container.
    pub(super) fn settle_running(&mut self, status: Status, step: StopStep, detail: &str) {
        self.questions.clear();
        let (running, decided) = match std::mem::replace(&mut self.state, State::Dead) {
            State::Running(running) => (running, None),
            State::Replacing(Replacing { running: Some(running), status, since, .. }) => {
                (running, Some((status, since)))
            }
            _ => return,
        };
        let end = match decided.or(running.verdict()) {
            Some((verdict @ (Status::Timeout | Status::Cancelled), since)) => {
                stopped(&running.execution, verdict, step, since.elapsed(), Vec::new())
            }
            _ => End::with(status, detail),
        };
        running.execution.finish(end);
    }

    /// The next execution is told that its kernel is another one.
    pub(super) fn tell_replaced(&mut self, cause: RestartCause) {
        self.tell_restart();
        self.replaced = Some(cause);
    }

    /// Takes an event of the guest.
    pub(super) fn on_event(&mut self, kernel: &str, event: Event, parts: &[Bytes], now: Instant) {
        if kernel != self.kernel || matches!(self.state, State::Dead) {
            return;
        }
        match event {
            // It is being ended already; what it has said before still counts.
            // It is about no kernel.
            Event::Egress { .. } => {}
            Event::KernelConnected | Event::KernelFailed { .. } | Event::KernelExited { .. }
                if matches!(self.state, State::Replacing(_)) => {}
            Event::Message { channel, msg_type, parent_id } => {
                self.on_message(channel, &msg_type, &parent_id, parts, now)
            }
            Event::Gap { parent_id, stream, total_bytes, omitted_bytes } => {
                if let Some(running) = self.running(&parent_id) {
                    let what = truncated(stream);
                    running.output(ExecutionEvent::OutputTruncated { what, omitted_bytes, total_bytes }, now);
                    running.execution.tell_truncation();
                }
            }
            Event::Effects { parent_id, effects } => {
                let kills = effects.oom_kills;
                if let Some(running) = self.running(&parent_id) {
                    running.memory_hit = effects.memory_hit;
                    running.execution.effects(super::effects::read(*effects));
                    self.oom_seen = self.oom_seen.max(kills);
                }
            }
            Event::KernelConnected => {
                if let State::Booting(booting) = &mut self.state {
                    (booting.connected, booting.nudge_at) = (true, now + NUDGE_AFTER);
                }
                self.check_boot(now);
            }
            Event::KernelFailed { channel, reason, stderr_tail } => {
                let channel = channel.map(|c| format!("channel {c}: ")).unwrap_or_default();
                let cause = RestartCause::Died { status: None, signal: None };
                self.on_death(&format!("the kernel was ended: {channel}{reason}"), &stderr_tail, cause, now);
            }
            Event::KernelExited { status, signal, oom_kills, swept, stderr_tail } => {
                let is_hit = match &self.state {
                    State::Running(running) => running.memory_hit,
                    _ => oom_kills > self.oom_seen,
                };
                let cause = match signal {
                    _ if swept => RestartCause::Swept,
                    // One that is not the end of another kernel, which has been told already.
                    Some(9) if is_hit && oom_kills > self.oom_told => {
                        self.notices.push(Notice::OomTold);
                        RestartCause::Oom
                    }
                    _ => RestartCause::Died { status, signal },
                };
                self.oom_seen = self.oom_seen.max(oom_kills);
                self.on_death(&describe_death(&cause), &stderr_tail, cause, now);
            }
        }
    }

    /// A kernel was ended for want of memory, in whatever context.
    pub(super) fn note_oom_told(&mut self) {
        self.oom_told += 1;
    }

    /// Whether the kernel can still be told something.
    fn is_listening(&self) -> bool {
        !matches!(self.state, State::Replacing(_) | State::Dead)
    }

    /// The guest has taken a message over.
    pub(super) fn on_sent(&mut self, act: &Act) {
        let ActKind::Send(id) = &act.kind else { return };
        if self.interrupt.as_ref() == Some(id) {
            self.interrupt = None;
        }
        if let State::Running(running) = &mut self.state {
            running.was_sent(id);
        }
    }

    /// The guest was told this before, and its answer was not heard.
    pub(super) fn may_have_heard(&mut self, act: &Act) {
        if let (State::Running(running), ActKind::Send(id)) = (&mut self.state, &act.kind) {
            running.is_taken_over |= running.msg_id == *id;
        }
    }

    /// The guest would not start the kernel, or not pass a message on to it.
    pub(super) fn on_refusal(&mut self, act: &Act, refusal: &Refusal, now: Instant) {
        self.on_sent(act);
        // What was sent before is answered all the same.
        let was_sent = matches!(act.kind, ActKind::Send(_)) && refusal.code == "exists";
        if act.kernel != self.kernel || !self.is_listening() || was_sent {
            return;
        }
        let is_gone = refusal.code == "not-found";
        match &act.kind {
            // What becomes of the kernel is told by an event, or seen at a deadline.
            ActKind::Signal | ActKind::Delete | ActKind::SetUp => {}
            ActKind::Send(id) if self.questions.remove(id).is_some() || self.refuse_aside(id, refusal) => {}
            ActKind::Send(id) if matches!(&self.state, State::Adopting(adopting) if adopting.probe == *id) => {
                self.on_death(&refusal.message, "", RestartCause::Died { status: None, signal: None }, now);
            }
            ActKind::Send(id) => {
                let State::Running(running) = &mut self.state else { return };
                if running.msg_id != *id {
                    return;
                }
                if refusal.code == UNKEPT {
                    self.on_unkept(now);
                } else if is_gone && running.is_taken_over {
                    // It may have run there before, and its last words be on their way.
                    running.is_gone(now + CATCH_UP);
                } else if is_gone && !running.is_setup {
                    // It died before that; none of the code has run, and the next one gets it.
                    let execution = Arc::clone(&running.execution);
                    self.queue.push_front(Waiting { since: now, execution });
                    self.state = State::Doubtful(now + GONE_IS_TOLD);
                } else if !is_gone {
                    self.on_death(&refusal.message, "", RestartCause::Died { status: None, signal: None }, now);
                }
            }
            ActKind::Start => {
                self.on_death(&refusal.message, "", RestartCause::Died { status: None, signal: None }, now)
            }
        }
    }

    /// What was to be run could not be committed. It has not been sent, and the next process would not know of it.
    fn on_unkept(&mut self, now: Instant) {
        let State::Running(running) = &self.state else { return };
        if running.is_taken_over || running.is_setup {
            // An earlier process has committed it, or nobody waits for it by its id.
            let (request, cap) = self.request_of(&running.execution);
            self.send(Channel::Shell, request, Some(cap));
            return;
        }
        let words = "the server could not write what it has to know of it, so it was not run";
        running.execution.finish(End::with(Status::Lost, words));
        self.state = State::Idle;
        self.advance(now);
    }

    /// The guest has ended the kernel with all its processes, and those of these other contexts.
    pub(super) fn on_deleted(&mut self, kernel: &str, gone: KernelDeleted, also_ended: Vec<ContextId>, now: Instant) {
        if kernel != self.kernel || !matches!(self.state, State::Replacing(_)) {
            return;
        }
        let State::Replacing(replacing) = std::mem::replace(&mut self.state, State::Dead) else { return };
        let Replacing { running, status, cause, words, since } = replacing;
        // The end of the session, where its kernel died by itself and the template wants no other.
        let over = match (&cause, self.making.on_kernel_death) {
            (RestartCause::Oom, OnKernelDeath::End) => Some(EndReason::Oom),
            (RestartCause::Died { .. }, OnKernelDeath::End) => Some(EndReason::KernelDied),
            _ => None,
        };
        match running {
            Some(running) if running.is_setup => {
                let how =
                    if status == Status::Timeout { "did not end in time".to_owned() } else { describe_death(&cause) };
                self.fail(Notice::SetupFailed(format!("the setup code failed: {how}")));
                return;
            }
            Some(running) => {
                if let Some(effects) = gone.effects {
                    running.execution.effects(super::effects::read(effects));
                }
                match over {
                    Some(_) => running.execution.kernel_has_ended(cause.clone()),
                    None => running.execution.output_surely(ExecutionEvent::KernelRestarted { cause: cause.clone() }),
                }
                let end = match status {
                    Status::Timeout | Status::Cancelled => {
                        stopped(&running.execution, status, StopStep::Restart, now - since, also_ended)
                    }
                    _ if over.is_some() => End::with(status, format!("{words}, and the session ends with it")),
                    _ => {
                        let others = others_ended(also_ended.len());
                        End::with(status, format!("{words}; variables are gone, files are kept{others}"))
                    }
                };
                running.execution.finish(end);
            }
            None if cause != RestartCause::Requested => self.replaced = Some(cause.clone()),
            None => {}
        }
        match over {
            Some(reason) => self.notices.push(Notice::Died(reason)),
            None => {
                if cause == RestartCause::Requested {
                    self.note_restart();
                } else {
                    self.tell_restart();
                }
                self.boot(now, self.making.pace.boot);
            }
        }
    }

    /// Does what is due.
    pub(super) fn on_time(&mut self, now: Instant) {
        let patience = self.making.pace.queue;
        while let Some(waiting) = self.queue.pop_front_if(|w| now >= w.since + patience) {
            let words = format!("it waited {} s for its turn, and did not run", patience.as_secs_f64());
            waiting.execution.finish(End::with(Status::Timeout, words));
        }
        match &mut self.state {
            State::Booting(booting) if now >= booting.deadline => {
                let reason = "the kernel did not answer in time".to_owned();
                self.on_death(&reason, "", RestartCause::Died { status: None, signal: None }, now);
            }
            State::Booting(booting) if now >= booting.nudge_at => {
                booting.nudge_at = now + NUDGE_AFTER;
                self.ask_kernel_info();
            }
            State::Running(running) => {
                let due = running.due(now);
                self.on_due(due, now);
            }
            State::Settling(settling) if now >= settling.given_up => {
                self.replace_kernel(Status::KernelDied, RestartCause::Timeout, String::new(), now);
            }
            State::Settling(settling) if now >= settling.until => {
                settling.until = (now + INTERRUPT_SETTLES * (1 << settling.probes.len().min(8))).min(settling.given_up);
                self.probe_settling();
            }
            State::Doubtful(until) if now >= *until => {
                let cause = RestartCause::Died { status: None, signal: None };
                self.replace_kernel(Status::KernelDied, cause, String::new(), now);
            }
            State::Adopting(adopting) if now >= adopting.until => {
                self.replace_kernel(Status::Cancelled, RestartCause::Timeout, String::new(), now);
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
            Some(Due::Gone) => {
                let cause = RestartCause::Died { status: None, signal: None };
                self.on_death("the kernel ended", "", cause, now);
            }
            Some(Due::Kill(status)) => self.replace_kernel(status, RestartCause::Timeout, String::new(), now),
            None => {}
        }
    }

    fn on_message(&mut self, channel: Channel, msg_type: &str, parent_id: &str, parts: &[Bytes], now: Instant) {
        let Some(content) = parts.get(3) else { return };
        if parent_id.strip_prefix(&self.kernel).is_some_and(|rest| rest.starts_with("-info")) {
            self.on_boot_message(channel, msg_type, content, now);
            return;
        }
        if self.running(parent_id).is_none() {
            self.retell(channel, msg_type, parent_id, parts);
        }
        if channel == Channel::Shell && matches!(&self.state, State::Running(r) if r.is_probe(parent_id)) {
            if let State::Running(running) = &mut self.state {
                running.reply_is_lost();
            }
            self.complete(now);
            return;
        }
        let is_probe = match &self.state {
            State::Settling(settling) => settling.probes.iter().any(|probe| probe == parent_id),
            State::Adopting(adopting) => adopting.probe == parent_id,
            _ => false,
        };
        if is_probe {
            if channel == Channel::Shell {
                self.has_settled(now);
            }
            return;
        }
        match (channel, msg_type) {
            (Channel::Iopub, _) => self.on_iopub(msg_type, parent_id, parts, now),
            (Channel::Shell, "execute_reply") => self.on_reply(parent_id, content, parts, now),
            (Channel::Shell, _) => self.on_answer(parent_id, content),
            (Channel::Control, "interrupt_reply") => self.on_interrupt_reply(parent_id, content),
            (Channel::Stdin, "input_request") => self.on_input_request(parent_id, parts),
            (Channel::Control | Channel::Stdin, _) => {}
        }
    }

    fn probe(&mut self) {
        let msg_id = self.ask_what_it_is();
        if let State::Running(running) = &mut self.state {
            running.probe = Some(msg_id);
        }
    }

    /// A question that any kernel answers, after all that it was asked before.
    fn ask_what_it_is(&mut self) -> String {
        let msg_id = self.next_id("probe");
        let request = protocol::request(&msg_id, &self.client, "kernel_info_request", &json!({}));
        self.send(Channel::Shell, request, None);
        msg_id
    }

    fn on_interrupt_reply(&mut self, parent_id: &str, content: &[u8]) {
        let is_settling = match &mut self.state {
            State::Running(running) => {
                let is_done = protocol::read_execute_reply(content).is_ok_and(|reply| reply.ok);
                running.interrupt_is_answered(parent_id, is_done);
                false
            }
            State::Settling(settling) => settling.interrupt.take_if(|id| id == parent_id).is_some(),
            _ => false,
        };
        if is_settling {
            self.probe_settling();
        }
    }

    /// Begins nothing new before the kernel has dealt with an interrupt: it would hit what it is not meant for.
    fn settle_interrupt(&mut self, interrupt: Option<String>, now: Instant) {
        let answered = interrupt.is_none();
        let (until, given_up) = (now + INTERRUPT_SETTLES, now + SETTLES_MOST);
        self.state = State::Settling(Settling { interrupt, probes: Vec::new(), until, given_up });
        if answered {
            self.probe_settling();
        }
    }

    fn probe_settling(&mut self) {
        let msg_id = self.ask_what_it_is();
        if let State::Settling(settling) = &mut self.state {
            settling.probes.push(msg_id);
        }
    }

    fn has_settled(&mut self, now: Instant) {
        self.state = State::Idle;
        let unsent: Vec<_> = self.questions.values_mut().filter_map(|question| question.unsent.take()).collect();
        for request in unsent {
            self.send(Channel::Shell, request, None);
        }
        self.send_held(now);
        self.advance(now);
    }

    fn on_answer(&mut self, parent_id: &str, content: &[u8]) {
        if let Some(question) = self.questions.remove(parent_id)
            && let Some(content) = protocol::read_object(content)
        {
            // Whoever asked may have left.
            let _ = question.answer.send(content);
        }
    }

    fn on_input_request(&mut self, parent_id: &str, parts: &[Bytes]) {
        let (Some(header), Some(content)) = (parts.first(), parts.get(3)) else { return };
        if !self.is_listening() {
            return;
        }
        let Some(running) = self.running(parent_id) else { return };
        match running.asks(protocol::read_input_request(content), header.clone()) {
            Input::Line(line) => self.send_line(&line, header.clone()),
            Input::Ask => running.execution.tell(Channel::Stdin, "input_request", parts, Mark::Newest),
            Input::Ignore => {}
        }
    }

    fn send_line(&mut self, line: &str, asked: Bytes) {
        let State::Running(running) = &self.state else { return };
        let msg_id = running.line_id(&asked);
        let content = protocol::input_content(line);
        let reply = protocol::reply_to(&msg_id, &self.client, "input_reply", &content, asked);
        self.send(Channel::Stdin, reply, None);
    }

    fn on_boot_message(&mut self, channel: Channel, msg_type: &str, content: &[u8], now: Instant) {
        let State::Booting(booting) = &mut self.state else { return };
        match channel {
            Channel::Iopub => booting.iopub = true,
            Channel::Shell if msg_type == "kernel_info_reply" => {
                booting.replied = true;
                if let Some((name, info)) = protocol::language_of(content) {
                    self.making.place.language = name;
                    self.language_info = Some(info);
                }
            }
            _ => return,
        }
        self.check_boot(now);
    }

    fn on_iopub(&mut self, msg_type: &str, parent_id: &str, parts: &[Bytes], now: Instant) {
        let is_interrupt_told = self.interrupt.is_none();
        let Some(running) = self.running(parent_id) else { return };
        running.heard(now);
        let Some(content) = parts.get(3) else { return };
        let read = match protocol::read_comm(msg_type, parts) {
            Some(comm) => Ok(Iopub::Output(comm)),
            None => protocol::read_iopub(msg_type, content),
        };
        let mark = match read {
            Ok(Iopub::Output(event)) => running.output(event, now).then_some(Mark::Newest),
            Ok(Iopub::ExecutionCount(count)) => {
                running.execution.count(count);
                Some(Mark::Once("input"))
            }
            Ok(Iopub::Status { idle: true }) => {
                running.is_idle(now);
                // It is told with the end.
                return self.complete_if_done(now);
            }
            Ok(Iopub::Status { idle: false }) => {
                running.has_begun();
                Some(Mark::Once("busy"))
            }
            Ok(Iopub::Other) => Some(Mark::Other),
            Err(error) => {
                tracing::debug!(%error, "a kernel's message was dropped");
                None
            }
        };
        let is_at_its_code = matches!(mark, Some(Mark::Newest | Mark::Once("input")));
        if let Some(mark) = mark {
            running.execution.tell(Channel::Iopub, msg_type, parts, mark);
        }
        if is_at_its_code && running.gets_under_way(is_interrupt_told) && matches!(self.state, State::Running(_)) {
            self.send_interrupt();
        }
    }

    fn on_reply(&mut self, parent_id: &str, content: &Bytes, parts: &[Bytes], now: Instant) {
        let Some(running) = self.running(parent_id) else { return };
        match protocol::read_execute_reply(content) {
            Ok(reply) => {
                running.execution.keep_reply(parts);
                running.has_replied(reply, content.clone(), now);
                self.complete_if_done(now);
            }
            Err(error) => tracing::debug!(%error, "a kernel's reply was dropped"),
        }
    }

    /// The execution of this message, if its kernel works on it, or is being ended because of it.
    fn running(&mut self, msg_id: &str) -> Option<&mut Running> {
        match &mut self.state {
            State::Running(running) | State::Replacing(Replacing { running: Some(running), .. })
                if running.msg_id == msg_id =>
            {
                Some(running)
            }
            _ => None,
        }
    }

    fn check_boot(&mut self, now: Instant) {
        if let State::Booting(Booting { connected: true, replied: true, iopub: true, .. }) = self.state {
            self.state = State::Idle;
            self.notices.push(Notice::Answers);
            self.prepare(now);
        }
    }

    /// Runs the next setup code; after the last one the kernel is ready.
    fn prepare(&mut self, now: Instant) {
        let (code, is_own) = match self.to_prepare.pop_front() {
            Some(Preparation::Setup(code)) => (code, false),
            Some(Preparation::Own(code)) => (code, true),
            None => {
                self.notices.push(Notice::Ready);
                self.advance(now);
                return;
            }
        };
        let request = ExecutionRequest {
            code,
            timeout: self.prepare_until.saturating_duration_since(now),
            silent: is_own,
            store_history: false,
            output: self.making.setup_output,
            stdin: Stdin::Deny,
            user_expressions: BTreeMap::new(),
            on_timeout: OnTimeout::Restart,
            stop_on_error: false,
            asked_by: None,
            comm: None,
        };
        let mut place = self.making.place.clone();
        place.keeping = place.keeping.uncounted();
        if self.born > 1 || !self.making.is_default {
            // A notebook has it once.
            place.keeping = place.keeping.without_notebook();
        }
        // Nobody has asked for it.
        place.tap = None;
        let execution = Arc::new(Execution::new(fresh(), place, request, 0));
        if self.making.is_unclaimed {
            self.prepared.push(Arc::clone(&execution));
        }
        self.run(execution, true, now);
    }

    fn complete_if_done(&mut self, now: Instant) {
        if matches!(&self.state, State::Running(running) if running.is_done()) {
            self.complete(now);
        }
    }

    fn complete(&mut self, now: Instant) {
        let State::Running(running) = std::mem::replace(&mut self.state, State::Idle) else { return };
        let is_setup = running.is_setup;
        if running.is_leaving() && !is_setup {
            // It would take the next request and die with it.
            let cause = RestartCause::Died { status: Some(0), signal: None };
            running.execution.output_surely(ExecutionEvent::KernelRestarted { cause: cause.clone() });
            running.finish(now);
            self.replace_kernel(Status::KernelDied, RestartCause::Requested, String::new(), now);
            return;
        }
        let (interrupted, interrupt) = (running.interrupted, running.interrupt.clone());
        let request = Arc::clone(&running.execution.request);
        if let Some(asked) = &request.asked_by {
            self.remember_parent(&running.msg_id, &asked.header);
        }
        let aborted = self.queue.iter().take_while(|waiting| running.failed_after(waiting.since)).count();
        let finished = running.finish(now);
        if !finished.ok && request.stop_on_error {
            self.abort_queue(aborted);
        }
        match (is_setup, finished.ok) {
            (true, true) => self.prepare(now),
            (true, false) => {
                let error = finished.error.map(|e| format!(": {}: {}", e.name, e.value)).unwrap_or_default();
                self.fail(Notice::SetupFailed(format!("the setup code failed{error}")));
            }
            (false, _) => {
                self.failed_boots = 0;
                match interrupted {
                    true => self.settle_interrupt(interrupt, now),
                    false => self.advance(now),
                }
            }
        }
    }

    /// What has failed takes along what clients that speak Jupyter have sent after it, among the first so many.
    fn abort_queue(&mut self, first: usize) {
        let is_meant = |waiting: &Waiting| waiting.execution.request.asked_by.is_some();
        let stays = self.queue.split_off(first);
        let (aborted, mut kept): (VecDeque<Waiting>, VecDeque<Waiting>) =
            std::mem::replace(&mut self.queue, stays).into_iter().partition(is_meant);
        kept.append(&mut self.queue);
        self.queue = kept;
        let words = "what was before it has failed, with stop_on_error";
        aborted.into_iter().for_each(|waiting| waiting.execution.finish(End::with(Status::Cancelled, words)));
    }

    /// Starts the next execution, if the kernel is free.
    fn advance(&mut self, now: Instant) {
        if !matches!(self.state, State::Idle) {
            return;
        }
        let Some(Waiting { execution, .. }) = self.queue.pop_front() else { return };
        self.run(execution, false, now);
    }

    /// The message that has an execution run, and what that may put out.
    fn request_of(&self, execution: &Execution) -> (Request, OutputCap) {
        let asked = &execution.request;
        let msg_id = execution.id.to_string();
        let request = match &asked.comm {
            Some(comm) => protocol::comm(&msg_id, &self.client, comm),
            None => {
                let content = protocol::execute_content(&protocol::Execute {
                    code: &asked.code,
                    silent: asked.silent,
                    store_history: asked.store_history,
                    allow_stdin: asked.stdin != Stdin::Deny,
                    user_expressions: &asked.user_expressions,
                });
                protocol::request(&msg_id, &self.client, "execute_request", &content)
            }
        };
        (request, cap_of(&asked.output))
    }

    fn run(&mut self, execution: Arc<Execution>, is_setup: bool, now: Instant) {
        let (request, cap) = self.request_of(&execution);
        let deadline = now + execution.request.timeout;
        execution.start();
        if let Some(cause) = self.replaced.take_if(|_| !is_setup) {
            execution.output_surely(ExecutionEvent::KernelRestarted { cause });
        }
        let mut running = Running::new(execution, deadline, is_setup);
        running.is_to_begin(now);
        self.state = State::Running(running);
        self.send(Channel::Shell, request, Some(cap));
    }

    fn stop(&mut self, status: Status, now: Instant) {
        let State::Running(running) = &mut self.state else { return };
        if status == Status::Timeout && running.execution.request.on_timeout == OnTimeout::Restart {
            self.replace_kernel(status, RestartCause::Timeout, String::new(), now);
        } else if running.stop(status, self.making.pace.interrupt_grace, now) {
            self.send_interrupt();
        }
    }

    fn send_interrupt(&mut self) {
        if let State::Running(running) = &mut self.state {
            running.interrupted = true;
        }
        if self.interrupt.is_some() {
            return;
        }
        let msg_id = self.next_id("int");
        self.interrupt = Some(msg_id.clone());
        if let State::Running(running) = &mut self.state {
            running.is_asked_to_interrupt(msg_id.clone());
        }
        let request = protocol::request(&msg_id, &self.client, "interrupt_request", &json!({}));
        self.send(Channel::Control, request, None);
    }

    fn ask_kernel_info(&mut self) {
        let msg_id = self.next_id("info");
        let request = protocol::request(&msg_id, &self.client, "kernel_info_request", &json!({}));
        self.send(Channel::Shell, request, None);
    }

    fn next_id(&mut self, word: &str) -> String {
        self.messages += 1;
        format!("{}-{word}{}", self.kernel, self.messages)
    }

    fn send(&mut self, channel: Channel, request: Request, cap: Option<OutputCap>) {
        let head = Outbound { channel, msg_id: request.msg_id, cap, is_aside: false };
        self.actions.push(Action::Send { kernel: self.kernel.clone(), head, parts: request.parts });
    }

    fn on_death(&mut self, reason: &str, stderr_tail: &str, cause: RestartCause, now: Instant) {
        if matches!(self.state, State::Booting(_)) {
            self.failed_boots += 1;
            if self.born == 1 || self.failed_boots >= MAX_FAILED_BOOTS {
                self.fail(Notice::BootFailed(with_tail(reason, stderr_tail)));
                return;
            }
        }
        let status = if cause == RestartCause::Oom { Status::Oom } else { Status::KernelDied };
        self.replace_kernel(status, cause, reason.to_owned(), now);
    }

    /// There will be no kernel here.
    fn fail(&mut self, notice: Notice) {
        self.actions.push(Action::Delete { kernel: self.kernel.clone() });
        self.settle(Status::KernelDied, StopStep::End, "its kernel did not start again");
        self.notices.push(notice);
    }

    /// Has the kernel ended; the new one is asked for when it is gone.
    fn replace_kernel(&mut self, status: Status, cause: RestartCause, words: String, now: Instant) {
        self.questions.clear();
        let running = match std::mem::replace(&mut self.state, State::Dead) {
            State::Running(running) => Some(running),
            _ => None,
        };
        // What was being stopped keeps its verdict, whatever has ended the kernel meanwhile.
        let (status, since) = running.as_ref().and_then(Running::verdict).unwrap_or((status, now));
        self.state = State::Replacing(Replacing { running, status, cause, words, since });
        self.actions.push(Action::Delete { kernel: self.kernel.clone() });
    }
}

fn cap_of(output: &OutputLimits) -> OutputCap {
    OutputCap {
        text_bytes: output.text_bytes,
        result_bytes: output.result_bytes,
        total_bytes: output.total_bytes,
        messages: output.messages,
        messages_per_second: output.messages_per_second,
    }
}

/// Code that sets variables of a Python's environment and leaves no name behind.
fn python_environment(env: &BTreeMap<String, String>) -> String {
    // A JSON string of nothing but texts is a Python literal, too.
    let json = json!(env).to_string();
    format!("__import__('os').environ.update(__import__('json').loads({}))", json!(json))
}

fn truncated(stream: CutStream) -> Truncated {
    match stream {
        CutStream::Stdout => Truncated::Stdout,
        CutStream::Stderr => Truncated::Stderr,
        CutStream::Results => Truncated::Results,
    }
}

fn with_tail(reason: &str, stderr_tail: &str) -> String {
    let tail = stderr_tail.trim();
    if tail.is_empty() { reason.to_owned() } else { format!("{reason}; its last words: {tail}") }
}

#[cfg(test)]
mod tests;
