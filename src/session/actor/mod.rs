//! The task that owns one session. Effects are performed as owned futures whose completion is an event; it never awaits an engine
//! or a kernel inline, so it always answers.
//!
//! Phases change in [`lifecycle::step`], executions in [`Context`]; this room carries out what they say.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock_wire::frame::Frame;
use cellblock_wire::link::{self, KernelDeleted, Numbered, Refusal};
use cellblock_wire::marker::LinkSecret;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::{mpsc, oneshot, watch};

use super::boot::{self, Booted};
use super::capacity;
use super::context::{Context, Making, Notice, Pace};
use super::execution::{End, Execution, Place};
use super::keeping::Keeping;
use super::tap::{Silence, Tap, TapBounds};
use super::visits::Visits;
use super::wiring::{Act, ActKind, Acted, Settled, Starting, Wiring};
use super::workspaces::Tenure;
use super::{
    Attributes, COMMAND_QUEUE, Command, ContextView, Refused, Session, Settings, Snapshot, StartFailure, StartFault,
    instant,
};
use crate::domain::ids::ContextId;
use crate::domain::lifecycle::{self, Effect, EndReason, Event, Phase};
use crate::domain::output::{Status, StopStep};
use crate::domain::spec::{NewFile, OnGuestLost, SessionSpec};
use crate::egress::Gate;
use crate::engine::{ByteStream, CellName, CellSpec, CellState, Engine, EngineError, WorkspaceName};
use crate::kernel::link::LinkError;
use crate::store::state::{ContextRecord, Lasting, RunningRecord, SessionRecord, Stage, State};
use crate::task;

mod commands;
mod figures;
mod freezing;
mod leaving;
mod linking;
mod showing;
mod starting;

use freezing::Freezing;
use leaving::Leaving;
use linking::Linking;
use showing::{first_snapshot, frozen_since};
use starting::{cell, transport};

/// A failed removal is tried again after this long; doubled each time up to the maximum.
const RETRY_FIRST: Duration = Duration::from_millis(500);
/// The longest wait between two tries.
const RETRY_MAX: Duration = Duration::from_secs(30);
/// A kernel's last events come within this time of its end, or don't count.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Where an answer is awaited that has a time limit of its own, the timer is set this far off.
const FAR: Duration = Duration::from_secs(3600);

/// The completion of something that the task has started.
enum Done {
    Adopted(Result<Booted, Verdict>),
    Ensured(Result<ByteStream, StartFailure>),
    Booted(Result<Booted, StartFailure>),
    /// With the link that has carried it.
    Acted(u32, Act, Result<Acted, LinkError>),
    Acked,
    Removed(Result<(), EngineError>),
    Paused(Result<(), EngineError>),
    Resumed(Result<Booted, Verdict>),
    Thawed,
    RetryDue,
    /// With the phase in which the look began.
    Diagnosed(Phase, Verdict),
}

/// The completion of something, and the number of the cell that it was about.
struct DoneIn {
    cell: u32,
    done: Done,
}

/// What a look at a cell has shown.
pub(super) enum Verdict {
    /// There is nothing to do about it.
    Well,
    /// It is frozen.
    Frozen,
    /// It runs, where it should be frozen.
    Thawed,
    /// It runs, and its guest does not answer.
    Unreachable(&'static str),
    /// Nothing can be said of it, since the engine does not answer.
    EngineAway,
    /// It does not run any more.
    Gone(EndReason, &'static str),
}

/// What a session is made of; everything is decided already.
pub(super) struct Birth {
    /// What there is of it: of a new one as well.
    pub(super) record: SessionRecord,
    pub(super) is_new: bool,
    pub(super) instance: String,
    pub(super) settings: Settings,
    pub(super) engine: Arc<dyn Engine>,
    pub(super) keeping: Keeping,
    pub(super) state: Option<State>,
    pub(super) gate: Arc<Gate>,
    pub(super) place: capacity::Place,
    /// What an earlier process has left running or waiting, in the order in which it was accepted.
    pub(super) executions: Vec<(Arc<Execution>, Option<RunningRecord>)>,
    /// The last event that an earlier process has heard of the present cell's guest.
    pub(super) heard: u64,
    /// It is made before anybody has asked for it.
    pub(super) is_unclaimed: bool,
    /// Files that its first cell begins with.
    pub(super) files: Arc<[NewFile]>,
    /// Where its default context is heard.
    pub(super) tap: Arc<Tap>,
    /// Its hold on a working folder that outlives it.
    pub(super) tenure: Option<Tenure>,
}

/// What somebody wants of a session's task, before anything else.
#[derive(Debug, Clone, Copy)]
pub(super) enum Wish {
    /// The session is to end.
    End(EndReason),
    /// The task is to end, and the session to go on with the next process.
    Leave,
}

/// Whoever waits for a kernel that is being replaced, or for all of them.
struct Restart {
    context: Option<ContextId>,
    reply: oneshot::Sender<Result<(), Refused>>,
}

/// A line of input on its way to the guest, and who waits for that.
struct Line {
    kernel: String,
    msg_id: String,
    reply: oneshot::Sender<Result<(), Refused>>,
}

/// A kernel that the guest has ended.
struct Gone {
    kernel: String,
    gone: KernelDeleted,
    /// Its last events are waited for until then.
    until: Instant,
}

struct Actor {
    instance: String,
    cell: CellSpec,
    /// How many cells it has had.
    cells: u32,
    spec: Arc<SessionSpec>,
    env: BTreeMap<String, String>,
    settings: Settings,
    engine: Arc<dyn Engine>,
    secret: LinkSecret,
    /// Nobody has asked for it yet.
    is_unclaimed: bool,
    /// Files that its first cell begins with; another one has none.
    files: Arc<[NewFile]>,
    phase: Phase,
    keeping: Keeping,
    contexts: BTreeMap<ContextId, Context>,
    default_context: ContextId,
    /// Contexts whose kernels start for the first time, and who waits for them.
    creating: BTreeMap<ContextId, oneshot::Sender<Result<ContextView, Refused>>>,
    wiring: Wiring,
    /// What goes on beside the kernels.
    visits: Arc<Visits>,
    /// The way out.
    gate: Arc<Gate>,
    /// Kernels that the guest has ended, and whose last events have not come yet.
    gone: Vec<Gone>,
    work: FuturesUnordered<BoxFuture<'static, DoneIn>>,
    retry_after: Duration,
    leaving: Leaving,
    freezing: Freezing,
    linking: Linking,
    /// Its share of the machine, given back with the task: its cell has been seen to be gone by then, or is the next process's.
    place: capacity::Place,
    /// Its working folder, if that outlives it; given back with the task as well.
    tenure: Option<Tenure>,
    tap: Arc<Tap>,
    created_at: Timestamp,
    /// Since when the present cell is being started.
    starting_since: Instant,
    last_active: Instant,
    expires: Instant,
    attributes: Arc<Attributes>,
    start_failure: Option<Arc<StartFailure>>,
    /// Why its cell was lost, for people.
    loss: &'static str,
    restarts: Vec<Restart>,
    lines: Vec<Line>,
    snapshot: watch::Sender<Snapshot>,
    commands: mpsc::Receiver<Command>,
    wishes: mpsc::Receiver<Wish>,
}

/// Creates a session, or takes it over from an earlier process: its handle, and the task that owns it.
pub(super) fn spawn(birth: Birth) -> Session {
    let (commands_in, commands) = mpsc::channel(COMMAND_QUEUE);
    let (wishes_in, wishes) = mpsc::channel(2);
    let (id, is_new) = (birth.record.id, birth.is_new);
    let (stage, tenant) = (birth.record.stage, Arc::clone(&birth.record.tenant));
    let (phase, effects) = match stage {
        Stage::Starting if is_new => lifecycle::begin(),
        Stage::Starting if birth.record.lasting != Lasting::Always => lifecycle::go_on_ending(EndReason::StartFailed),
        Stage::Live | Stage::Paused(_) if birth.record.lasting == Lasting::Never && birth.executions.is_empty() => {
            lifecycle::go_on_ending(EndReason::Drained)
        }
        Stage::Starting => lifecycle::go_on(false),
        Stage::Live => lifecycle::go_on(true),
        Stage::Paused(_) => lifecycle::go_on_paused(),
        Stage::Ending(reason) | Stage::Ended(reason, _) => lifecycle::go_on_ending(reason),
    };
    let mut actor = Actor::new(birth, commands, wishes);
    actor.phase = phase;
    // Before anybody hears of it, so that whoever waits for the database then waits for this.
    actor.save();
    actor.publish();
    let tap = Arc::clone(&actor.tap);
    let session = Session {
        tap: Arc::clone(&tap),
        id,
        tenant,
        spec: Arc::clone(&actor.spec),
        default_context: actor.default_context,
        created_at: actor.created_at,
        is_warm: actor.leaving.is_warm,
        by_language: Arc::default(),
        gate: Arc::clone(&actor.gate),
        commands: commands_in,
        wishes: wishes_in,
        snapshot: actor.snapshot.subscribe(),
    };
    let snapshot = actor.snapshot.clone();
    task::spawn("session", async move {
        // A panic is a defect, and must cost this session only: it counts as ended, so the reconciler removes its cell.
        if AssertUnwindSafe(actor.run(effects)).catch_unwind().await.is_err() {
            tracing::error!(session = %id, "the task of a session panicked");
            snapshot.send_modify(|snapshot| snapshot.phase = Phase::Ended(EndReason::Lost));
        }
        // Whatever it has not said by now it does not say any more.
        tap.fall_silent(Silence::Over);
    });
    session
}

/// A handle on a session that an earlier process has ended.
pub(super) fn ended(record: SessionRecord, reason: EndReason, gate: Arc<Gate>) -> Session {
    let attributes = Arc::new(Attributes { labels: record.labels, idle: record.idle, network: record.network });
    let first = first_snapshot(&record.spec, &attributes);
    let snapshot = Snapshot {
        phase: Phase::Ended(reason),
        loss: record.loss.map(Arc::from),
        last_active: record.last_active,
        expires_at: record.expires_at,
        ..first
    };
    // Nobody hears what is asked of it, which is answered with its end.
    let (commands, wishes) = (mpsc::channel(1).0, mpsc::channel(1).0);
    let tap = Tap::new(TapBounds { bytes: 0, time: Duration::ZERO });
    tap.fall_silent(Silence::Over);
    Session {
        tap,
        id: record.id,
        tenant: record.tenant,
        spec: record.spec,
        default_context: record.default_context,
        created_at: record.created_at,
        is_warm: record.is_warm,
        by_language: Arc::default(),
        gate,
        commands,
        wishes,
        snapshot: watch::Sender::new(snapshot).subscribe(),
    }
}

impl Actor {
    fn new(birth: Birth, commands: mpsc::Receiver<Command>, wishes: mpsc::Receiver<Wish>) -> Self {
        let Birth {
            record,
            is_new,
            instance,
            settings,
            engine,
            keeping,
            state,
            gate,
            place,
            executions,
            heard,
            is_unclaimed,
            files,
            tap,
            tenure,
        } = birth;
        let now = Instant::now();
        let leaving = Leaving::new(state.clone(), &record, heard);
        let (id, spec) = (record.id, record.spec);
        let attributes = Arc::new(Attributes { labels: record.labels, idle: record.idle, network: record.network });
        let snapshot = watch::Sender::new(first_snapshot(&spec, &attributes));
        let transport = transport(&spec);
        // Before the context's own deadline, so that a kernel's last words are heard.
        let connect_timeout = settings.start_timeout.mul_f64(0.8);
        let starting = Starting { transport, connect_timeout, state };
        let mut actor = Self {
            cell: CellSpec {
                workspace: record.workspace.map(|workspace| WorkspaceName::new(&instance, workspace)),
                ..cell(CellName::new(&instance, id, record.cells), id, &spec)
            },
            instance,
            cells: record.cells,
            keeping,
            settings,
            engine,
            secret: record.secret,
            is_unclaimed,
            files,
            phase: Phase::Provisioning,
            contexts: BTreeMap::new(),
            default_context: record.default_context,
            creating: BTreeMap::new(),
            wiring: Wiring::new(starting, heard),
            visits: Arc::default(),
            gate,
            gone: Vec::new(),
            work: FuturesUnordered::new(),
            retry_after: RETRY_FIRST,
            leaving,
            freezing: Freezing::new(frozen_since(record.stage).unwrap_or(now)),
            linking: Linking::new(now),
            place,
            tenure,
            tap,
            created_at: record.created_at,
            starting_since: now,
            last_active: instant(record.last_active),
            expires: instant(record.expires_at),
            attributes,
            start_failure: None,
            loss: "its session ended",
            restarts: Vec::new(),
            lines: Vec::new(),
            snapshot,
            commands,
            wishes,
            spec,
            env: record.env,
        };
        for context in record.contexts {
            actor.make_context(context, record.stage, is_new);
        }
        for (execution, kept) in executions {
            actor.go_on(execution, kept, now);
        }
        actor
    }

    fn make_context(&mut self, record: ContextRecord, stage: Stage, is_new: bool) {
        let now = Instant::now();
        let making = self.making(record.id, record.asked_kernelspec.clone(), record.cwd.clone());
        let context = match stage {
            Stage::Live if !is_new => Context::adopt(making, record, now),
            Stage::Paused(_) if !is_new => Context::adopt_paused(making, record, now),
            _ => Context::again(making, &record),
        };
        self.contexts.insert(context.id, context);
    }

    /// Goes on with an execution that an earlier process has left.
    fn go_on(&mut self, execution: Arc<Execution>, kept: Option<RunningRecord>, now: Instant) {
        self.leaving.follow(&execution);
        let until = execution.started_at().map(|at| instant(at) + execution.request.timeout);
        match self.contexts.get_mut(&execution.place.context) {
            Some(context) => context.take_over(execution, kept, until, now),
            None => execution.finish(End::with(Status::Cancelled, "its context was deleted")),
        }
    }

    fn making(&self, id: ContextId, kernelspec: Option<String>, cwd: Option<String>) -> Making {
        let settings = &self.settings;
        Making {
            place: Place {
                session: self.cell.session,
                context: id,
                language: String::new(),
                keeping: self.keeping.clone(),
                tap: (id == self.default_context).then(|| Arc::clone(&self.tap)),
            },
            pace: Pace {
                boot: settings.start_timeout,
                interrupt_grace: settings.interrupt_grace,
                queue: settings.queue_timeout,
            },
            max_queue: settings.queued_executions,
            kernelspec,
            cwd,
            setup: Arc::clone(&self.spec.setup),
            setup_output: self.spec.output,
            on_kernel_death: self.spec.on_kernel_death,
            is_default: id == self.default_context,
            is_unclaimed: self.is_unclaimed,
        }
    }

    async fn run(mut self, effects: Vec<Effect>) {
        self.perform(effects);
        self.settle_turn();
        let mut leaves = false;
        while !matches!(self.phase, Phase::Ended(_)) && !leaves {
            let deadline = tokio::time::Instant::from_std(self.next_deadline());
            tokio::select! {
                biased;
                Some(wish) = self.wishes.recv() => match wish {
                    Wish::End(reason) => self.step(Event::EndRequested(reason)),
                    Wish::Leave => leaves = self.may_leave(),
                },
                Some(DoneIn { cell, done }) = self.work.next() => {
                    // What a link or a look says of an earlier cell says nothing of this one.
                    if cell == self.cells || matches!(done, Done::Removed(_) | Done::RetryDue | Done::Thawed) {
                        self.on_done(done);
                    }
                }
                () = tokio::time::sleep_until(deadline) => self.on_time(),
                () = self.visits.left() => self.last_active = Instant::now(),
                Some(command) = self.commands.recv(), if self.freezing.has_room() => self.on_command(command),
                // Last, so that a guest which never stops talking puts nothing off.
                event = self.wiring.next_event() => self.on_guest_event(event),
            }
            tokio::task::coop::consume_budget().await;
            self.settle_turn();
        }
        self.gate.close();
        if leaves {
            self.leave();
            self.tap.fall_silent(Silence::Left);
        } else {
            self.keeping.end_notebook();
        }
        self.refuse_the_rest();
    }

    /// Whether nobody wants it to end instead.
    fn may_leave(&mut self) -> bool {
        match self.wishes.try_recv() {
            Ok(Wish::End(reason)) => {
                self.step(Event::EndRequested(reason));
                false
            }
            _ => true,
        }
    }

    /// The session goes on with the next process, and so does what runs or waits.
    fn leave(&mut self) {
        // Whoever waits for these is told where they go on.
        self.lines.clear();
        self.contexts.values_mut().for_each(Context::leave);
        self.wiring.cut();
        self.refuse_waiting(&Refused::Left);
    }

    /// Carries out what the contexts asked for in this turn, and tells everybody what has changed.
    fn settle_turn(&mut self) {
        self.tend_freezing();
        self.take_from_contexts();
        if let Some(acting) = self.wiring.act() {
            self.start(acting.map(|(round, act, result)| Done::Acted(round, act, result)));
        }
        if let Some(acking) = self.wiring.acknowledge(self.is_busy()) {
            self.start(acking.map(|()| Done::Acked));
        }
        self.save();
        if matches!(self.phase, Phase::Ended(_)) {
            // Whoever waits for the end may give the workspace to another session, or delete it.
            self.tenure = None;
        }
        self.publish();
    }

    /// Starts something whose completion is an event.
    fn start(&self, work: impl Future<Output = Done> + Send + 'static) {
        let cell = self.cells;
        self.work.push(Box::pin(work.map(move |done| DoneIn { cell, done })));
    }

    fn step(&mut self, event: Event) {
        let (phase, effects) = lifecycle::step(self.phase, event);
        if phase != self.phase {
            tracing::debug!(session = %self.cell.session, from = ?self.phase, to = ?phase, ?event, "phase");
            let before = std::mem::replace(&mut self.phase, phase);
            self.count(before);
        }
        self.perform(effects);
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::EnsureCell => self.ensure_cell(),
                Effect::AdoptCell => self.adopt_cell(),
                Effect::PauseCell => self.pause_cell(),
                Effect::ResumeCell => self.resume_cell(),
                // The stream comes with the engine's answer, so booting starts there.
                Effect::BootGuest => {}
                Effect::SettleExecutions => self.settle_executions(),
                Effect::SettleRunning => self.settle_running(),
                Effect::RemoveCell => self.remove_cell(),
                Effect::ScheduleRetry => {
                    let wait = self.retry_after;
                    self.retry_after = (wait * 2).min(RETRY_MAX);
                    self.start(async move {
                        tokio::time::sleep(wait).await;
                        Done::RetryDue
                    });
                }
            }
        }
    }

    fn remove_cell(&mut self) {
        self.place.has_started();
        self.wiring.forget();
        self.gone.clear();
        let (engine, name) = (Arc::clone(&self.engine), self.cell.name.clone());
        self.start(async move { Done::Removed(engine.remove(&name).await) });
    }

    fn settle_executions(&mut self) {
        let (status, detail) = match self.phase {
            Phase::Aborting(EndReason::Oom) | Phase::Ending(EndReason::Oom) => {
                (Status::Oom, "memory ran out, and the session ended")
            }
            Phase::Aborting(EndReason::Lost) | Phase::Ending(EndReason::Lost) => (Status::Lost, self.loss),
            Phase::Aborting(EndReason::KernelDied) | Phase::Ending(EndReason::KernelDied) => {
                (Status::KernelDied, "its kernel died, and the session ended")
            }
            _ => (Status::Cancelled, "its session ended"),
        };
        self.contexts.values_mut().for_each(|c| c.settle(status, StopStep::End, detail));
        self.wiring.forget();
        if let Err(refused) = self.not_over() {
            self.refuse_waiting(&refused);
        }
    }

    /// The cell is to be replaced: what runs in it ends, and what waits goes on waiting.
    fn settle_running(&mut self) {
        let loss = self.loss;
        self.contexts.values_mut().for_each(|c| c.settle_running(Status::Lost, StopStep::Replace, loss));
        // Those whose creation fails with that get no kernel in the next cell.
        self.contexts.retain(|id, _| !self.creating.contains_key(id));
        self.refuse_waiting(&Refused::KernelLost);
    }

    fn refuse_waiting(&mut self, refused: &Refused) {
        self.freezing.answer(&Err(refused.clone()));
        for restart in self.restarts.drain(..) {
            // A caller that went away needs no answer.
            let _ = restart.reply.send(Err(refused.clone()));
        }
        for (_, reply) in std::mem::take(&mut self.creating) {
            let _ = reply.send(Err(refused.clone()));
        }
        for line in self.lines.drain(..) {
            let _ = line.reply.send(Err(refused.clone()));
        }
    }

    fn on_done(&mut self, done: Done) {
        match done {
            Done::Adopted(outcome) => self.on_adopted(outcome),
            Done::Ensured(Ok(stream)) => {
                self.step(Event::CellEnsured);
                if self.phase == Phase::Connecting {
                    self.boot_guest(stream);
                }
            }
            Done::Ensured(Err(failure)) => {
                self.fail_start(failure);
                self.lose_replacement();
                self.step(Event::EnsureFailed);
            }
            Done::Booted(Ok(booted)) if self.phase == Phase::Connecting => self.start_kernels(booted),
            Done::Booted(Ok(_)) => {}
            Done::Booted(Err(failure)) => {
                self.fail_start(failure);
                self.lose_replacement();
                self.step(Event::BootFailed);
            }
            Done::Acted(round, act, result) => self.on_acted(round, &act, result),
            Done::Acked => self.wiring.has_acked(),
            Done::Removed(Ok(())) => {
                self.cells += u32::from(self.phase == Phase::Replacing);
                self.step(Event::RemovalSeen);
            }
            Done::Removed(Err(error)) => {
                tracing::warn!(cell = %self.cell.name, %error, "a cell could not be removed; it will be tried again");
                self.step(Event::RemovalFailed);
            }
            Done::Paused(outcome) => self.on_paused(outcome),
            Done::Resumed(outcome) => self.on_resumed(outcome),
            Done::Thawed => self.freezing.thawing = false,
            Done::RetryDue => self.step(Event::RetryDue),
            // It was the session's own doing since.
            Done::Diagnosed(began, Verdict::Frozen | Verdict::Thawed) if began != self.phase => {}
            Done::Diagnosed(_, Verdict::EngineAway) if self.phase == Phase::Ready => self.link_again(None),
            Done::Diagnosed(_, verdict) => self.on_verdict(verdict),
        }
    }

    fn on_verdict(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Well => {}
            Verdict::Frozen => self.on_found_frozen(),
            Verdict::Thawed => self.on_found_thawed(),
            Verdict::Gone(reason, words) => {
                self.loss = words;
                self.step(Event::CellLost(reason));
            }
            Verdict::Unreachable(_) | Verdict::EngineAway => {
                self.loss = match verdict {
                    Verdict::Unreachable(words) => words,
                    _ => "the container engine could not be reached",
                };
                let replace = self.spec.on_guest_lost == OnGuestLost::Replace
                    && matches!(self.phase, Phase::Ready | Phase::Resuming);
                self.step(if replace { Event::GuestLost } else { Event::CellLost(EndReason::Lost) });
            }
        }
    }

    /// A session that was ready once has not failed to start: it is lost.
    fn lose_replacement(&mut self) {
        if self.cells > 1 {
            self.loss = "its container was lost, and a new one could not be started";
            self.step(Event::EndRequested(EndReason::Lost));
        }
    }

    fn on_acted(&mut self, round: u32, act: &Act, result: Result<Acted, LinkError>) {
        let settled = self.wiring.has_acted(round, &result);
        let answer = match result {
            Ok(acted) => Ok(acted),
            Err(LinkError::Refused { refusal, .. }) => Err(refusal),
            Err(error) => return self.on_unanswered(settled, &error),
        };
        self.answer_lines(act, &answer);
        let now = Instant::now();
        // It was deleted meanwhile.
        let Some(context) = self.contexts.values_mut().find(|c| c.owns(&act.kernel)) else { return };
        match answer {
            Ok(Acted::Sent) => context.on_sent(act),
            Ok(Acted::Started(started)) => {
                (context.kernelspec, context.display_name) = (started.kernelspec, started.display_name);
            }
            Ok(Acted::Deleted(gone)) => {
                // What the kernel has said may still be on its way.
                self.gone.push(Gone { kernel: act.kernel.clone(), gone, until: now + LAST_WORDS });
                self.settle_gone(now);
            }
            Err(refusal) if act.kind == ActKind::Delete && refusal.code == "not-found" => {
                // It was never there, or is gone since it was said the first time: then nobody knows what its last words are.
                let last_seq = if settled == (Settled::Over { was_tried: true }) { u64::MAX } else { 0 };
                let gone = KernelDeleted { last_seq, ..KernelDeleted::default() };
                self.gone.push(Gone { kernel: act.kernel.clone(), gone, until: now + LAST_WORDS });
                self.settle_gone(now);
            }
            Err(refusal) => {
                if settled == (Settled::Over { was_tried: true }) {
                    context.may_have_heard(act);
                }
                context.on_refusal(act, &refusal, now);
            }
        }
    }

    fn answer_lines(&mut self, act: &Act, result: &Result<Acted, Refusal>) {
        let is_it = |line: &mut Line| line.kernel == act.kernel && act.kind == ActKind::Send(line.msg_id.clone());
        for line in self.lines.extract_if(.., is_it) {
            let answer = match result {
                Ok(_) => Ok(()),
                Err(refusal) if refusal.code == "exists" => Ok(()),
                Err(_) => Err(Refused::NothingAsked),
            };
            // A caller that went away needs no answer.
            let _ = line.reply.send(answer);
        }
    }

    /// Goes on with the kernels that are gone and whose last words were heard.
    fn settle_gone(&mut self, now: Instant) {
        let heard = self.wiring.last_seq();
        let settled: Vec<_> = self.gone.extract_if(.., |g| g.gone.last_seq <= heard || now >= g.until).collect();
        for Gone { kernel, gone, .. } in settled {
            self.on_deleted(&kernel, gone, now);
        }
    }

    fn on_deleted(&mut self, kernel: &str, gone: KernelDeleted, now: Instant) {
        for line in self.lines.extract_if(.., |line| line.kernel == kernel) {
            let _ = line.reply.send(Err(Refused::NothingAsked));
        }
        let owner = |name: &String| self.contexts.values().find(|c| c.owns(name)).map(|c| c.id);
        let also_ended = gone.ended_kernels.iter().filter_map(owner).collect();
        if let Some(context) = self.contexts.values_mut().find(|c| c.owns(kernel)) {
            context.on_deleted(kernel, gone, also_ended, now);
        }
    }

    fn on_guest_event(&mut self, event: Result<Option<Frame<Numbered>>, LinkError>) {
        match event {
            Ok(Some(Frame { head, parts })) => {
                if !self.wiring.note(head.seq, &parts) {
                    return;
                }
                let now = Instant::now();
                if let link::Event::Egress { id, host, port } = head.event {
                    // It is of the link that it came over; over another one nobody waits for it.
                    if let Some(link) = self.wiring.link().cloned() {
                        self.gate.announced(link, id, host, port);
                    }
                } else if let Some(context) = self.contexts.values_mut().find(|c| c.owns(&head.kernel)) {
                    context.on_event(&head.kernel, head.event, &parts, now);
                }
                self.settle_gone(now);
            }
            Ok(None) => self.lose_link("its event stream ended"),
            Err(error) => self.lose_link(&error.to_string()),
        }
    }

    /// Looks at the cell. `otherwise` is the verdict when it seems to run.
    fn diagnose(&self, otherwise: Verdict) {
        let (engine, name, began) = (Arc::clone(&self.engine), self.cell.name.clone(), self.phase);
        self.start(async move { Done::Diagnosed(began, look_at(engine.as_ref(), &name, otherwise).await) });
    }

    fn not_over(&self) -> Result<(), Refused> {
        match self.phase {
            Phase::Aborting(reason) | Phase::Ending(reason) | Phase::Ended(reason) => Err(Refused::Ended(reason)),
            _ => Ok(()),
        }
    }

    fn live(&self) -> Result<Instant, Refused> {
        self.not_over()?;
        if self.phase == Phase::Ready { Ok(Instant::now()) } else { Err(Refused::NotReady) }
    }

    fn next_deadline(&self) -> Instant {
        let own = match self.phase {
            Phase::Provisioning | Phase::Connecting => self.starting_since + self.settings.start_timeout,
            Phase::Replacing => self.expires.max(Instant::now() + RETRY_FIRST),
            Phase::Paused => self.paused_deadline().min(self.expires),
            // An answer is under way.
            Phase::Pausing | Phase::Resuming => self.expires,
            Phase::Ready => self.idle_deadline().unwrap_or(self.expires).min(self.expires),
            Phase::Aborting(_) | Phase::Ending(_) | Phase::Ended(_) => Instant::now() + FAR,
        };
        let is_heard = self.is_heard();
        let contexts = self.contexts.values().filter(|_| is_heard).filter_map(Context::next_deadline);
        let others = contexts
            .chain(self.wiring.next_deadline())
            .chain(self.freezing.next_deadline())
            .chain(self.gone.iter().filter(|_| is_heard).map(|gone| gone.until));
        others.min().unwrap_or(own).min(own)
    }

    /// What is not heard is not judged: taking it over, or linking it again, has a time limit of its own.
    fn is_heard(&self) -> bool {
        self.phase != Phase::Ready || self.wiring.link().is_some()
    }

    fn idle_deadline(&self) -> Option<Instant> {
        let waits = !self.is_in_use() && !self.is_unclaimed && !self.freezing.is_wanted();
        waits.then(|| self.last_active + self.attributes.idle)
    }

    /// Whether anything runs or waits, in a kernel or beside it.
    fn is_in_use(&self) -> bool {
        self.is_busy() || self.visits.are_any()
    }

    fn is_busy(&self) -> bool {
        self.contexts.values().any(Context::is_busy)
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        if self.is_heard() {
            self.settle_gone(now);
        }
        match self.phase {
            Phase::Provisioning | Phase::Connecting if now >= self.starting_since + self.settings.start_timeout => {
                let detail = format!("the session was not ready within {:?}", self.settings.start_timeout);
                self.fail_start(StartFailure { fault: StartFault::TimedOut, detail });
                self.lose_replacement();
                self.step(Event::EndRequested(EndReason::StartFailed));
            }
            Phase::Ready | Phase::Replacing | Phase::Pausing | Phase::Paused | Phase::Resuming
                if now >= self.expires =>
            {
                self.step(Event::EndRequested(EndReason::Lifetime))
            }
            Phase::Ready if self.idle_deadline().is_some_and(|at| now >= at) => self.go_idle(),
            Phase::Paused if now >= self.paused_deadline() => self.step(Event::EndRequested(EndReason::Idle)),
            _ if !self.is_heard() => {}
            _ => self.contexts.values_mut().for_each(|c| c.on_time(now)),
        }
    }

    fn take_from_contexts(&mut self) {
        let was_busy = self.snapshot.borrow().busy;
        let mut notices = Vec::new();
        for context in self.contexts.values_mut() {
            let (actions, told) = context.take();
            self.wiring.plan(actions);
            notices.extend(told.into_iter().map(|notice| (context.id, notice)));
        }
        if was_busy && !self.is_busy() {
            self.last_active = Instant::now();
        }
        notices.into_iter().for_each(|(context, notice)| self.on_notice(context, notice));
    }

    fn on_notice(&mut self, context: ContextId, notice: Notice) {
        match notice {
            Notice::Answers if context == self.default_context => {
                // What its setup does is its own affair, and takes what it takes.
                self.place.has_started();
                if !self.is_unclaimed {
                    self.open_notebook();
                }
            }
            Notice::Answers => {}
            Notice::Ready => self.on_ready(context),
            Notice::BootFailed(detail) => {
                self.on_boot_failed(context, StartFailure { fault: StartFault::KernelFailed, detail })
            }
            Notice::SetupFailed(detail) => {
                self.on_boot_failed(context, StartFailure { fault: StartFault::SetupFailed, detail })
            }
            Notice::OomTold => self.contexts.values_mut().for_each(Context::note_oom_told),
            Notice::Died(reason) => {
                self.loss = "its kernel died";
                self.step(Event::EndRequested(reason));
            }
        }
    }

    /// What became of its cell, if that has ended it.
    pub(super) fn loss_told(&self) -> Option<&'static str> {
        let (Phase::Aborting(reason) | Phase::Ending(reason) | Phase::Ended(reason)) = self.phase else { return None };
        matches!(reason, EndReason::Lost | EndReason::Oom | EndReason::KernelDied).then_some(self.loss)
    }

    /// Answers whoever asked after the end.
    fn refuse_the_rest(mut self) {
        self.commands.close();
        // Dropping a command drops its reply, which its caller takes for the end.
        while self.commands.try_recv().is_ok() {}
    }
}

/// Looks at a cell. `otherwise` is the verdict when it seems to run.
pub(super) async fn look_at(engine: &dyn Engine, name: &CellName, otherwise: Verdict) -> Verdict {
    match engine.observe(name).await {
        Ok(None) => Verdict::Gone(EndReason::Lost, "its container was removed from outside"),
        Ok(Some(seen)) => match seen.state {
            CellState::Exited { oom: true, .. } => Verdict::Gone(EndReason::Oom, "memory ran out"),
            CellState::Exited { .. } => Verdict::Gone(EndReason::Lost, "its container was stopped from outside"),
            CellState::Paused => Verdict::Frozen,
            CellState::Running | CellState::Created => otherwise,
        },
        Err(_) => match otherwise {
            Verdict::Unreachable(_) => Verdict::EngineAway,
            Verdict::Thawed => Verdict::Well,
            otherwise => otherwise,
        },
    }
}

/// A moment of the process's clock on the wall's.
fn wall(at: Instant) -> Timestamp {
    let now = Instant::now();
    let distance = SignedDuration::try_from(at.saturating_duration_since(now)).unwrap_or_default()
        - SignedDuration::try_from(now.saturating_duration_since(at)).unwrap_or_default();
    Timestamp::now().saturating_add(distance).unwrap_or(Timestamp::MAX)
}
