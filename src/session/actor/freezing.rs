//! Pausing and resuming: who waits for it, what is held back meanwhile, and when a session may be paused.
//!
//! A session is paused only when its kernels are at rest, so that no timer of theirs runs while they can't answer, and without a link: the engine opens none to a
//! frozen cell, and its keepalive would find the guest dead. The record says so before the cell is frozen, and says the opposite before it is thawed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::oneshot;

use super::super::{COMMAND_QUEUE, Command, Refused, instant};
use super::{Actor, Booted, Context, Done, Verdict};
use crate::domain::lifecycle::{EndReason, Event, Phase};
use crate::domain::spec::{OnExpiry, OnIdle};
use crate::engine::EngineError;
use crate::kernel::link::Link;
use crate::store::state::State;

/// Kernels come to rest within this time, or the session is not paused: a boot or the answer to a question may be under way.
const REST: Duration = Duration::from_secs(15);

/// A link that was cut is closed within this time: its task only has to get its turn.
const CLOSED: Duration = Duration::from_secs(5);

/// What a session knows of its pauses.
pub(super) struct Freezing {
    /// When it was last told to freeze.
    pub(super) since: Instant,
    /// Until when kernels may come to rest, where a pause is wanted.
    rest_until: Option<Instant>,
    /// It is being thawed after others have frozen it, which must not undo a pause that is wanted.
    pub(super) thawing: bool,
    /// Who waits for it to be paused.
    pausers: Vec<oneshot::Sender<Result<(), Refused>>>,
    /// What was asked meanwhile and needs the cell.
    held: VecDeque<Command>,
}

impl Freezing {
    pub(super) fn new(since: Instant) -> Self {
        Self { since, rest_until: None, thawing: false, pausers: Vec::new(), held: VecDeque::new() }
    }

    /// Keeps a command until the session is ready again, or over.
    pub(super) fn hold(&mut self, command: Command) {
        self.held.push_back(command);
    }

    /// Whether one more command finds room.
    pub(super) fn has_room(&self) -> bool {
        self.held.len() < COMMAND_QUEUE
    }

    /// Whether a pause is wanted that has not begun.
    pub(super) fn is_wanted(&self) -> bool {
        self.rest_until.is_some()
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.rest_until
    }

    /// Tells everybody who waits for a pause.
    pub(super) fn answer(&mut self, answer: &Result<(), Refused>) {
        self.rest_until = None;
        for pauser in self.pausers.drain(..) {
            // A caller that went away needs no answer.
            let _ = pauser.send(answer.clone());
        }
    }
}

impl Actor {
    /// Whether its cell is frozen, or on the way there or back.
    pub(super) fn is_frozen(&self) -> bool {
        matches!(self.phase, Phase::Pausing | Phase::Paused | Phase::Resuming)
    }

    pub(super) fn ask_to_pause(&mut self, reply: oneshot::Sender<Result<(), Refused>>) {
        match self.phase {
            Phase::Paused => self.answer(reply, Ok(())),
            _ if self.freezing.pausers.len() >= COMMAND_QUEUE => self.answer(reply, Err(Refused::QueueFull)),
            Phase::Pausing => self.freezing.pausers.push(reply),
            Phase::Resuming => self.freezing.hold(Command::Pause { reply }),
            Phase::Ready => {
                self.last_active = Instant::now();
                self.freezing.pausers.push(reply);
                self.want_pause();
            }
            _ => {
                let refused = self.live().map(drop);
                self.answer(reply, refused);
            }
        }
    }

    /// Its idle time is over.
    pub(super) fn go_idle(&mut self) {
        match self.spec.on_idle {
            OnIdle::Delete => self.step(Event::EndRequested(EndReason::Idle)),
            OnIdle::Pause => self.want_pause(),
            // It has no idle time.
            OnIdle::Keep => {}
        }
    }

    /// When it ends for its age, or is paused instead. What expires while something runs in it, or is frozen, has until the greatest age that it may have.
    pub(super) fn last_moment(&self) -> Instant {
        let goes_on = match self.phase {
            Phase::Ready => self.is_in_use() || self.freezing.is_wanted(),
            phase => matches!(phase, Phase::Pausing | Phase::Paused | Phase::Resuming),
        };
        let waits = self.spec.on_expiry == OnExpiry::Pause && goes_on;
        if waits { self.expires.max(self.oldest()) } else { self.expires }
    }

    /// Its last moment has come.
    pub(super) fn expire(&mut self, now: Instant) {
        let may_rest = self.phase == Phase::Ready && now < self.oldest();
        match self.spec.on_expiry {
            OnExpiry::Pause if may_rest => self.want_pause(),
            _ => self.step(Event::EndRequested(EndReason::Lifetime)),
        }
    }

    /// When it is as old as it may be.
    fn oldest(&self) -> Instant {
        instant(self.created_at.saturating_add(self.spec.max_lifetime).unwrap_or(Timestamp::MAX))
    }

    /// One that has expired and is used again has as much time as it was made for.
    fn renew(&mut self, now: Instant) {
        if self.spec.on_expiry == OnExpiry::Pause && self.expires <= now {
            self.expires = (now + self.spec.timeouts.lifetime).min(self.oldest());
        }
    }

    fn want_pause(&mut self) {
        self.freezing.rest_until.get_or_insert_with(|| Instant::now() + REST);
    }

    /// Begins what is wanted and possible: a pause, a resume, or what was held back.
    pub(super) fn tend_freezing(&mut self) {
        if self.phase == Phase::Paused && !self.freezing.held.is_empty() {
            self.step(Event::ResumeRequested);
        }
        if !self.is_frozen() {
            for command in std::mem::take(&mut self.freezing.held) {
                self.on_command(command);
            }
        }
        if let Some(until) = self.freezing.rest_until {
            self.try_pause(until);
        }
    }

    fn try_pause(&mut self, until: Instant) {
        if self.phase != Phase::Ready {
            // It ends, or gets another cell; both tell who waits.
            self.freezing.rest_until = None;
        } else if self.is_in_use() {
            self.freezing.answer(&Err(Refused::Busy));
        } else if self.is_at_rest() {
            self.freezing.rest_until = None;
            self.freezing.since = Instant::now();
            self.step(Event::PauseRequested);
        } else if Instant::now() >= until {
            // Something goes on there, so it is not idle either.
            self.last_active = Instant::now();
            self.freezing.answer(&Err(Refused::Restless(REST)));
        }
    }

    fn is_at_rest(&self) -> bool {
        let is_quiet = self.wiring.is_quiet() && self.gone.is_empty() && !self.freezing.thawing;
        is_quiet && self.contexts.values().all(Context::is_quiet)
    }

    pub(super) fn pause_cell(&mut self) {
        let link = self.wiring.cut();
        self.save();
        let (engine, name, state) = (Arc::clone(&self.engine), self.cell.name.clone(), self.leaving.state.clone());
        self.start(async move {
            Done::Paused(
                async {
                    committed(state).await?;
                    close(link).await;
                    engine.pause(&name).await
                }
                .await,
            )
        });
    }

    pub(super) fn on_paused(&mut self, outcome: Result<(), EngineError>) {
        match outcome {
            Ok(()) => {
                self.step(Event::CellPaused);
                if self.phase == Phase::Paused {
                    // Whoever looks after the answer sees it.
                    self.publish();
                    self.freezing.answer(&Ok(()));
                }
            }
            // It ends anyway.
            Err(_) if self.phase != Phase::Pausing => {}
            Err(error) => {
                tracing::warn!(cell = %self.cell.name, %error, "a session could not be paused; it goes on");
                self.step(Event::PauseFailed);
                self.freezing.answer(&Err(Refused::NotPaused));
            }
        }
    }

    pub(super) fn resume_cell(&mut self) {
        self.save();
        let state = self.leaving.state.clone();
        let adoption = self.adoption(self.settings.start_timeout, "its container could not be resumed");
        self.start(async move {
            // Then the next process pauses it again, which is better than no answer now.
            if let Err(error) = committed(state).await {
                tracing::warn!(%error, "a session is resumed that the next server would take for paused");
            }
            Done::Resumed(adoption.adopt().await)
        });
    }

    pub(super) fn on_resumed(&mut self, outcome: Result<Booted, Verdict>) {
        match outcome {
            Ok(booted) if self.phase == Phase::Resuming => {
                self.connect_again(booted);
                // Frozen time is no idle time.
                self.last_active = Instant::now();
                self.renew(self.last_active);
                self.step(Event::CellResumed);
            }
            Ok(_) => {}
            Err(verdict) => self.on_verdict(verdict),
        }
    }

    /// The cell was found frozen. Where nobody here wanted that, it is thawed: callers were promised a session that answers.
    pub(super) fn on_found_frozen(&mut self) {
        match self.phase {
            // Whoever opens its link thaws it.
            Phase::Ready if self.linking.is_under_way => {}
            Phase::Ready if self.wiring.link().is_none() => {
                self.freezing.answer(&Err(Refused::NotPaused));
                self.step(Event::CellFrozen);
            }
            Phase::Ready | Phase::Connecting if self.freezing.thawing => {}
            Phase::Ready | Phase::Connecting => {
                tracing::warn!(cell = %self.cell.name, "a container was paused from outside; it is resumed");
                let (engine, name) = (Arc::clone(&self.engine), self.cell.name.clone());
                self.freezing.thawing = true;
                self.start(async move {
                    if let Err(error) = engine.resume(&name).await {
                        tracing::warn!(cell = %name, %error, "it could not be resumed; it will be tried again");
                    }
                    Done::Thawed
                });
            }
            _ => {}
        }
    }

    /// The cell was found to run. A paused one was thawed from outside, and is as good as resumed.
    pub(super) fn on_found_thawed(&mut self) {
        if self.phase == Phase::Paused {
            tracing::info!(cell = %self.cell.name, "a paused container was resumed from outside");
            self.step(Event::ResumeRequested);
        }
    }

    /// When a paused session ends.
    pub(super) fn paused_deadline(&self) -> Instant {
        self.freezing.since.max(self.last_active) + self.spec.timeouts.paused
    }
}

/// Waits until what was told to the database is there, if there is one.
async fn committed(state: Option<State>) -> Result<(), EngineError> {
    let Some(state) = state else { return Ok(()) };
    state.settle().await.map_err(|error| EngineError::Unavailable {
        attempt: "noting that a cell is paused or not",
        detail: error.to_string(),
    })
}

/// Waits until the stream of a link that was cut is closed: as long as it is open, the engine would open no other.
pub(super) async fn close(link: Option<Link>) {
    if let Some(link) = link {
        // One that is not is seen when the cell is linked again.
        let _ = tokio::time::timeout(CLOSED, link.closed()).await;
    }
}
