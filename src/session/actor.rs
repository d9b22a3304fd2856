//! The task that owns one session. Effects are performed as owned futures whose completion is an event; it never awaits an engine
//! or a kernel inline, so it always answers.
//!
//! Phases change in [`lifecycle::step`], executions in [`Context`]; this file carries out what they say.

use std::collections::{BTreeMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock_wire::frame::Frame;
use cellblock_wire::link::{Numbered, StartKernel, Transport};
use cellblock_wire::marker::LinkSecret;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::{mpsc, oneshot, watch};

use super::boot::{self, Booted};
use super::context::{Action, Context, Notice, Pace};
use super::execution::Execution;
use super::{
    Attributes, COMMAND_QUEUE, Command, Patch, Refused, Session, Settings, Snapshot, StartFailure, StartFault, fresh,
};
use crate::domain::ids::{ContextId, SessionId};
use crate::domain::lifecycle::{self, Effect, EndReason, Event, Phase};
use crate::domain::output::Status;
use crate::domain::spec::{KernelTransport, SessionSpec};
use crate::engine::{ByteStream, CellName, CellSpec, CellState, Engine, EngineError};
use crate::kernel::link::{Events, Link, LinkError};
use crate::task;

/// Events are acknowledged after this many, or when nothing more is under way …
const ACK_EVERY: u64 = 128;
/// … which must last this long, so that it does not stand in the way of what follows at once;
const ACK_AFTER: Duration = Duration::from_millis(50);
/// or after this many bytes: a guest's ring holds a few MiB, and what does not fit is cut.
const ACK_BYTES: usize = 512 * 1024;
/// A failed removal is tried again after this long; doubled each time up to the maximum.
const RETRY_FIRST: Duration = Duration::from_millis(500);
/// The longest wait between two tries.
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Where an answer is awaited that has a time limit of its own, the timer is set this far off.
const FAR: Duration = Duration::from_secs(3600);

/// The completion of something that the task has started.
enum Done {
    Ensured(Result<ByteStream, StartFailure>),
    Booted(Result<Booted, StartFailure>),
    Acted { kernel: String, result: Result<(), LinkError> },
    Acked,
    Removed(Result<(), EngineError>),
    RetryDue,
    Diagnosed(Option<EndReason>),
}

/// What a session is made of; everything is decided already.
pub(super) struct Birth {
    pub(super) id: SessionId,
    pub(super) tenant: Arc<str>,
    pub(super) spec: SessionSpec,
    pub(super) instance: String,
    pub(super) settings: Settings,
    pub(super) engine: Arc<dyn Engine>,
}

struct Actor {
    cell: CellSpec,
    spec: Arc<SessionSpec>,
    env: BTreeMap<String, String>,
    settings: Settings,
    engine: Arc<dyn Engine>,
    secret: LinkSecret,
    phase: Phase,
    contexts: BTreeMap<ContextId, Context>,
    default_context: ContextId,
    link: Option<Link>,
    events: Option<Events>,
    last_seq: u64,
    acked: u64,
    unacked_bytes: usize,
    acking: bool,
    /// When a quiet session's events are acknowledged.
    ack_due: Option<Instant>,
    pending: VecDeque<Action>,
    acting: bool,
    work: FuturesUnordered<BoxFuture<'static, Done>>,
    retry_after: Duration,
    born: Instant,
    last_active: Instant,
    expires: Instant,
    attributes: Arc<Attributes>,
    start_failure: Option<Arc<StartFailure>>,
    restarts: Vec<oneshot::Sender<Result<(), Refused>>>,
    snapshot: watch::Sender<Snapshot>,
    commands: mpsc::Receiver<Command>,
    end: mpsc::Receiver<EndReason>,
}

/// Creates a session: its handle, and the task that owns it.
pub(super) fn spawn(birth: Birth) -> Session {
    let (commands_in, commands) = mpsc::channel(COMMAND_QUEUE);
    let (end_in, end) = mpsc::channel(1);
    let actor = Actor::new(birth.id, &birth, commands, end);
    let session = Session {
        id: birth.id,
        tenant: birth.tenant,
        spec: Arc::clone(&actor.spec),
        default_context: actor.default_context,
        created_at: Timestamp::now(),
        commands: commands_in,
        end: end_in,
        snapshot: actor.snapshot.subscribe(),
    };
    let snapshot = actor.snapshot.clone();
    task::spawn("session", async move {
        // A panic is a defect, and must cost this session only: it counts as ended, so the reconciler removes its cell.
        if AssertUnwindSafe(actor.run()).catch_unwind().await.is_err() {
            tracing::error!(session = %birth.id, "the task of a session panicked");
            snapshot.send_modify(|snapshot| snapshot.phase = Phase::Ended(EndReason::Lost));
        }
    });
    session
}

impl Actor {
    fn new(id: SessionId, birth: &Birth, commands: mpsc::Receiver<Command>, end: mpsc::Receiver<EndReason>) -> Self {
        let now = Instant::now();
        let mut spec = birth.spec.clone();
        // The guest is told once; what is kept of a session holds no environment.
        let env = std::mem::take(&mut spec.env);
        let spec = Arc::new(spec);
        let settings = birth.settings;
        let pace = Pace {
            // Before the session's own deadline, so that a kernel's last words are heard.
            boot: settings.start_timeout.mul_f64(0.9),
            interrupt_grace: settings.interrupt_grace,
            queue: settings.queue_timeout,
        };
        let default_context = fresh();
        let attributes = Arc::new(Attributes { labels: spec.labels.clone(), idle: spec.timeouts.idle });
        let snapshot = watch::Sender::new(Snapshot {
            generation: 0,
            phase: Phase::Provisioning,
            busy: false,
            attributes: Arc::clone(&attributes),
            last_active: Timestamp::now(),
            expires_at: Timestamp::now()
                .saturating_add(SignedDuration::try_from(spec.timeouts.lifetime).unwrap_or_default())
                .unwrap_or(Timestamp::MAX),
            idle_deadline: None,
            start_failure: None,
            language: Arc::from(""),
        });
        Self {
            cell: CellSpec {
                name: CellName::new(&birth.instance, id, 1),
                session: id,
                image: spec.image.clone(),
                runtime: spec.runtime.clone(),
                resources: spec.resources,
            },
            settings,
            engine: Arc::clone(&birth.engine),
            secret: LinkSecret(uuid::Uuid::new_v4().into_bytes()),
            phase: Phase::Provisioning,
            contexts: BTreeMap::from([(
                default_context,
                Context::new(default_context, pace, settings.queued_executions),
            )]),
            default_context,
            link: None,
            events: None,
            last_seq: 0,
            acked: 0,
            unacked_bytes: 0,
            acking: false,
            ack_due: None,
            pending: VecDeque::new(),
            acting: false,
            work: FuturesUnordered::new(),
            retry_after: RETRY_FIRST,
            born: now,
            last_active: now,
            expires: now + spec.timeouts.lifetime,
            attributes,
            start_failure: None,
            restarts: Vec::new(),
            snapshot,
            commands,
            end,
            spec,
            env,
        }
    }

    async fn run(mut self) {
        let (phase, effects) = lifecycle::begin();
        self.phase = phase;
        self.perform(effects);
        self.publish();
        while !matches!(self.phase, Phase::Ended(_)) {
            let deadline = tokio::time::Instant::from_std(self.next_deadline());
            tokio::select! {
                biased;
                Some(reason) = self.end.recv() => self.step(Event::EndRequested(reason)),
                Some(done) = self.work.next() => self.on_done(done),
                () = tokio::time::sleep_until(deadline) => self.on_time(),
                Some(command) = self.commands.recv() => self.on_command(command),
                // Last, so that a guest which never stops talking puts nothing off.
                event = next_event(&mut self.events) => self.on_guest_event(event),
            }
            tokio::task::coop::consume_budget().await;
            self.settle_turn();
        }
        self.refuse_the_rest();
    }

    /// Carries out what the contexts asked for in this turn, and tells everybody what has changed.
    fn settle_turn(&mut self) {
        self.take_from_contexts();
        self.act();
        self.acknowledge();
        self.publish();
    }

    fn step(&mut self, event: Event) {
        let (phase, effects) = lifecycle::step(self.phase, event);
        if phase != self.phase {
            tracing::debug!(session = %self.cell.session, from = ?self.phase, to = ?phase, ?event, "phase");
            self.phase = phase;
        }
        self.perform(effects);
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::EnsureCell => self.ensure_cell(),
                // The stream comes with the engine's answer, so booting starts there.
                Effect::BootGuest => {}
                Effect::SettleExecutions => self.settle_executions(),
                Effect::RemoveCell => self.remove_cell(),
                Effect::ScheduleRetry => {
                    let wait = self.retry_after;
                    self.retry_after = (wait * 2).min(RETRY_MAX);
                    self.work.push(Box::pin(async move {
                        tokio::time::sleep(wait).await;
                        Done::RetryDue
                    }));
                }
            }
        }
    }

    fn ensure_cell(&self) {
        let (engine, cell) = (Arc::clone(&self.engine), self.cell.clone());
        self.work.push(Box::pin(async move {
            Done::Ensured(engine.ensure(&cell).await.map_err(|e| boot::engine_failure(&cell, &e)))
        }));
    }

    fn boot_guest(&mut self, stream: ByteStream) {
        let booting = boot::boot(
            Arc::clone(&self.engine),
            self.cell.clone(),
            stream,
            self.secret,
            self.settings,
            std::mem::take(&mut self.env),
        );
        self.work.push(Box::pin(async move { Done::Booted(booting.await) }));
    }

    fn remove_cell(&mut self) {
        (self.link, self.events) = (None, None);
        let (engine, name) = (Arc::clone(&self.engine), self.cell.name.clone());
        self.work.push(Box::pin(async move { Done::Removed(engine.remove(&name).await) }));
    }

    fn settle_executions(&mut self) {
        let status = match self.phase {
            Phase::Aborting(EndReason::Oom) | Phase::Ending(EndReason::Oom) => Status::Oom,
            Phase::Aborting(EndReason::Lost) | Phase::Ending(EndReason::Lost) => Status::Lost,
            Phase::Aborting(EndReason::KernelDied) | Phase::Ending(EndReason::KernelDied) => Status::KernelDied,
            _ => Status::Cancelled,
        };
        self.contexts.values_mut().for_each(|c| c.settle(status));
        self.pending.clear();
        if let Err(refused) = self.not_over() {
            self.answer_restarts(Err(refused));
        }
    }

    fn on_done(&mut self, done: Done) {
        match done {
            Done::Ensured(Ok(stream)) => {
                self.step(Event::CellEnsured);
                if self.phase == Phase::Connecting {
                    self.boot_guest(stream);
                }
            }
            Done::Ensured(Err(failure)) => {
                self.fail_start(failure);
                self.step(Event::EnsureFailed);
            }
            Done::Booted(Ok(booted)) if self.phase == Phase::Connecting => self.start_kernels(booted),
            Done::Booted(Ok(_)) => {}
            Done::Booted(Err(failure)) => {
                self.fail_start(failure);
                self.step(Event::BootFailed);
            }
            Done::Acted { kernel, result } => self.on_acted(&kernel, result),
            Done::Acked => self.acking = false,
            Done::Removed(Ok(())) => self.step(Event::RemovalSeen),
            Done::Removed(Err(error)) => {
                tracing::warn!(cell = %self.cell.name, %error, "a cell could not be removed; it will be tried again");
                self.step(Event::RemovalFailed);
            }
            Done::RetryDue => self.step(Event::RetryDue),
            Done::Diagnosed(Some(reason)) => self.step(Event::CellLost(reason)),
            Done::Diagnosed(None) => {}
        }
    }

    fn fail_start(&mut self, failure: StartFailure) {
        if self.start_failure.is_none() && matches!(self.phase, Phase::Provisioning | Phase::Connecting) {
            self.start_failure = Some(Arc::new(failure));
        }
    }

    fn start_kernels(&mut self, booted: Booted) {
        self.link = Some(booted.link);
        self.events = Some(booted.events);
        let now = Instant::now();
        self.contexts.values_mut().for_each(|c| c.boot(now));
    }

    fn on_acted(&mut self, kernel: &str, result: Result<(), LinkError>) {
        self.acting = false;
        self.contexts.values_mut().for_each(Context::on_interrupt_sent);
        match result {
            Ok(()) => {}
            // It died in the meantime, which an event of its own tells.
            Err(LinkError::Refused { refusal, .. }) if refusal.code == "not-found" => {}
            Err(LinkError::Refused { refusal, .. }) => {
                let now = Instant::now();
                self.contexts.values_mut().for_each(|c| c.on_refusal(kernel, &refusal.message, now));
            }
            Err(error) => self.lose_link(&error.to_string()),
        }
    }

    fn on_guest_event(&mut self, event: Result<Option<Frame<Numbered>>, LinkError>) {
        match event {
            Ok(Some(Frame { head, parts })) => {
                if head.seq <= self.last_seq {
                    return;
                }
                self.last_seq = head.seq;
                self.unacked_bytes += parts.iter().map(bytes::Bytes::len).sum::<usize>();
                let now = Instant::now();
                for context in self.contexts.values_mut() {
                    context.on_event(&head.kernel, head.event.clone(), &parts, now);
                }
            }
            Ok(None) => self.lose_link("its event stream ended"),
            Err(error) => self.lose_link(&error.to_string()),
        }
    }

    /// The guest can't be reached any more: finds out why, and ends the session.
    fn lose_link(&mut self, why: &str) {
        if !matches!(self.phase, Phase::Connecting | Phase::Ready) || self.link.is_none() {
            return;
        }
        tracing::info!(session = %self.cell.session, why, "a session's link is gone");
        (self.link, self.events) = (None, None);
        self.diagnose(Some(EndReason::Lost));
    }

    /// Looks at the cell. `otherwise` is the verdict when it seems to be well.
    fn diagnose(&self, otherwise: Option<EndReason>) {
        let (engine, name) = (Arc::clone(&self.engine), self.cell.name.clone());
        self.work.push(Box::pin(async move {
            let verdict = match engine.observe(&name).await {
                Ok(None) => Some(EndReason::Lost),
                Ok(Some(seen)) => match seen.state {
                    CellState::Exited { oom: true, .. } => Some(EndReason::Oom),
                    CellState::Exited { .. } => Some(EndReason::Lost),
                    CellState::Running | CellState::Paused | CellState::Created => otherwise,
                },
                Err(_) => otherwise,
            };
            Done::Diagnosed(verdict)
        }));
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Execute { context, request, reply } => {
                let answer = self.execute(context, request);
                self.answer(reply, answer);
            }
            Command::Cancel { execution } => {
                let now = Instant::now();
                self.contexts.values_mut().for_each(|c| c.cancel(execution, now));
            }
            Command::Interrupt { reply } => {
                let answer = self.live().map(|now| {
                    self.last_active = now;
                    self.contexts.values_mut().for_each(|c| c.interrupt(now));
                });
                let _ = reply.send(answer);
            }
            Command::Restart { reply } => match self.live() {
                Ok(now) => {
                    self.last_active = now;
                    self.contexts.values_mut().for_each(|c| c.restart(now));
                    self.restarts.push(reply);
                }
                Err(refused) => drop(reply.send(Err(refused))),
            },
            Command::Patch { patch, reply } => {
                let answer = self.patch(patch);
                self.answer(reply, answer);
            }
            Command::KeepAlive { reply } => {
                let answer = self.not_over().map(|()| self.last_active = Instant::now());
                self.answer(reply, answer);
            }
            Command::Link { reply } => {
                let link = self.link.clone().ok_or(Refused::NotReady);
                drop(reply.send(self.live().and(link)));
            }
            Command::LookAtCell => {
                if matches!(self.phase, Phase::Ready | Phase::Connecting) {
                    self.diagnose(None);
                }
            }
        }
    }

    /// Answers a command that changed something. Whoever looks after the answer sees the change.
    fn answer<T>(&self, reply: oneshot::Sender<Result<T, Refused>>, answer: Result<T, Refused>) {
        self.publish();
        // A caller that went away needs no answer.
        let _ = reply.send(answer);
    }

    fn execute(
        &mut self,
        context: Option<ContextId>,
        request: super::ExecutionRequest,
    ) -> Result<Arc<Execution>, Refused> {
        let now = self.live()?;
        let context = context.unwrap_or(self.default_context);
        let context = self.contexts.get_mut(&context).ok_or(Refused::NoSuchContext)?;
        let position = context.position();
        let language = context.language.clone();
        let execution = Arc::new(Execution::new(fresh(), self.cell.session, context.id, language, request, position));
        context.enqueue(Arc::clone(&execution), now).map_err(|_| Refused::QueueFull)?;
        self.last_active = now;
        Ok(execution)
    }

    fn patch(&mut self, patch: Patch) -> Result<(), Refused> {
        self.not_over()?;
        let now = Instant::now();
        self.last_active = now;
        if let Some(expires_in) = patch.expires_in {
            self.expires = (now + expires_in).min(self.born + self.spec.max_lifetime);
        }
        let attributes = Arc::make_mut(&mut self.attributes);
        attributes.idle = patch.idle.unwrap_or(attributes.idle);
        if let Some(labels) = patch.labels {
            attributes.labels = labels;
        }
        Ok(())
    }

    fn not_over(&self) -> Result<(), Refused> {
        match self.phase {
            Phase::Provisioning | Phase::Connecting | Phase::Ready => Ok(()),
            Phase::Aborting(reason) | Phase::Ending(reason) | Phase::Ended(reason) => Err(Refused::Ended(reason)),
        }
    }

    fn live(&self) -> Result<Instant, Refused> {
        self.not_over()?;
        if self.phase == Phase::Ready { Ok(Instant::now()) } else { Err(Refused::NotReady) }
    }

    fn next_deadline(&self) -> Instant {
        let own = match self.phase {
            Phase::Provisioning | Phase::Connecting => self.born + self.settings.start_timeout,
            Phase::Ready => self.idle_deadline().unwrap_or(self.expires).min(self.expires),
            Phase::Aborting(_) | Phase::Ending(_) | Phase::Ended(_) => Instant::now() + FAR,
        };
        let ack = self.ack_due.filter(|_| !self.acking && self.link.is_some());
        self.contexts.values().filter_map(Context::next_deadline).chain(ack).min().unwrap_or(own).min(own)
    }

    fn idle_deadline(&self) -> Option<Instant> {
        (!self.is_busy()).then(|| self.last_active + self.attributes.idle)
    }

    fn is_busy(&self) -> bool {
        self.contexts.values().any(Context::is_busy)
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        match self.phase {
            Phase::Provisioning | Phase::Connecting if now >= self.born + self.settings.start_timeout => {
                let detail = format!("the session was not ready within {:?}", self.settings.start_timeout);
                self.fail_start(StartFailure { fault: StartFault::TimedOut, detail });
                self.step(Event::EndRequested(EndReason::StartFailed));
            }
            Phase::Ready if now >= self.expires => self.step(Event::EndRequested(EndReason::Lifetime)),
            Phase::Ready if self.idle_deadline().is_some_and(|at| now >= at) => {
                self.step(Event::EndRequested(EndReason::Idle));
            }
            _ => self.contexts.values_mut().for_each(|c| c.on_time(now)),
        }
    }

    fn take_from_contexts(&mut self) {
        let was_busy = self.snapshot.borrow().busy;
        let mut notices = Vec::new();
        for context in self.contexts.values_mut() {
            let (actions, told) = context.take();
            self.pending.extend(actions);
            notices.extend(told);
        }
        if was_busy && !self.is_busy() {
            self.last_active = Instant::now();
        }
        notices.into_iter().for_each(|notice| self.on_notice(notice));
    }

    fn on_notice(&mut self, notice: Notice) {
        match notice {
            Notice::Ready => {
                if self.phase == Phase::Connecting {
                    // Starting is not idling.
                    self.last_active = Instant::now();
                }
                self.step(Event::KernelReady);
                if self.contexts.values().all(Context::is_up) {
                    self.answer_restarts(Ok(()));
                }
            }
            Notice::BootFailed(detail) => {
                self.answer_restarts(Err(Refused::KernelLost));
                if self.phase == Phase::Connecting {
                    self.fail_start(StartFailure { fault: StartFault::KernelFailed, detail });
                    self.step(Event::BootFailed);
                } else {
                    self.step(Event::CellLost(EndReason::KernelDied));
                }
            }
        }
    }

    fn answer_restarts(&mut self, answer: Result<(), Refused>) {
        for reply in self.restarts.drain(..) {
            // A caller that went away needs no answer.
            let _ = reply.send(answer);
        }
    }

    /// Sends the next action, one at a time: their order is their meaning.
    fn act(&mut self) {
        if self.acting {
            return;
        }
        let (Some(link), Some(action)) = (self.link.clone(), self.pending.pop_front()) else { return };
        self.acting = true;
        let start = self.start_kernel_request();
        self.work.push(Box::pin(async move {
            let (kernel, result) = match action {
                Action::Start { kernel } => {
                    let start = StartKernel { kernel: kernel.clone(), ..start };
                    (kernel, link.start_kernel(&start).await.map(|_| ()))
                }
                Action::Delete { kernel } => {
                    let result = link.delete_kernel(&kernel).await;
                    (kernel, result)
                }
                Action::Send { kernel, head, parts } => {
                    let result = link.send_message(&kernel, &head, &parts).await;
                    (kernel, result)
                }
                Action::Signal { kernel, signal } => {
                    let result = link.signal(&kernel, signal).await;
                    (kernel, result)
                }
            };
            Done::Acted { kernel, result }
        }));
    }

    fn start_kernel_request(&self) -> StartKernel {
        StartKernel {
            kernel: String::new(),
            kernelspec: self.spec.kernelspec.clone(),
            transport: match self.spec.transport {
                KernelTransport::Ipc => Transport::Ipc,
                KernelTransport::Tcp => Transport::Tcp,
            },
            env: BTreeMap::new(),
            cwd: None,
            // Before the context's own deadline, for the same reason.
            connect_timeout_ms: u64::try_from(self.settings.start_timeout.mul_f64(0.8).as_millis()).unwrap_or(u64::MAX),
        }
    }

    fn acknowledge(&mut self) {
        let behind = self.last_seq - self.acked;
        let much = behind >= ACK_EVERY || self.unacked_bytes >= ACK_BYTES;
        if behind == 0 || self.is_busy() {
            self.ack_due = None;
        } else if self.ack_due.is_none() {
            self.ack_due = Some(Instant::now() + ACK_AFTER);
        }
        let due = self.ack_due.is_some_and(|at| Instant::now() >= at);
        if self.acking || !(due || much) {
            return;
        }
        let Some(link) = self.link.clone() else { return };
        (self.acking, self.acked, self.unacked_bytes, self.ack_due) = (true, self.last_seq, 0, None);
        let seq = self.last_seq;
        self.work.push(Box::pin(async move {
            // A link that fails here fails for its event stream too, which tells.
            let _ = link.ack(seq).await;
            Done::Acked
        }));
    }

    fn publish(&self) {
        let wall = |at: Instant| {
            let now = Instant::now();
            let distance = SignedDuration::try_from(at.saturating_duration_since(now)).unwrap_or_default()
                - SignedDuration::try_from(now.saturating_duration_since(at)).unwrap_or_default();
            Timestamp::now().saturating_add(distance).unwrap_or(Timestamp::MAX)
        };
        let busy = self.is_busy();
        let idle_deadline = (self.phase == Phase::Ready).then(|| self.idle_deadline()).flatten();
        let fingerprint = |s: &Snapshot| (s.phase, s.busy, Arc::as_ptr(&s.attributes), s.start_failure.is_some());
        self.snapshot.send_if_modified(|snapshot| {
            let before = fingerprint(snapshot);
            let language = self.contexts.get(&self.default_context).map(|c| c.language.as_str()).unwrap_or_default();
            if *snapshot.language != *language {
                snapshot.language = Arc::from(language);
            }
            snapshot.phase = self.phase;
            snapshot.busy = busy;
            snapshot.attributes = Arc::clone(&self.attributes);
            snapshot.start_failure.clone_from(&self.start_failure);
            snapshot.last_active = wall(self.last_active);
            snapshot.expires_at = wall(self.expires);
            snapshot.idle_deadline = idle_deadline.map(wall);
            let changed = before != fingerprint(snapshot);
            snapshot.generation += u64::from(changed);
            changed
        });
    }

    /// Answers whoever asked after the end.
    fn refuse_the_rest(mut self) {
        self.commands.close();
        // Dropping a command drops its reply, which its caller takes for the end.
        while self.commands.try_recv().is_ok() {}
    }
}

/// The guest's next event, or never while there is no link.
async fn next_event(events: &mut Option<Events>) -> Result<Option<Frame<Numbered>>, LinkError> {
    match events {
        Some(events) => events.next().await,
        None => std::future::pending().await,
    }
}
