//! The life of a session, as a pure function: [`step`] is the only place where a phase changes.
//!
//! ```text
//! Provisioning ──▶ Connecting ──▶ Ready ──▶ Replacing ──▶ Provisioning, with a new cell
//!      │                │          │  ▲          │
//!      │                │          │  └─ Resuming ◀── Paused ◀─┐
//!      │                │          └──▶ Pausing ───────────────┘     a pause that fails is undone by Resuming
//!   Aborting            └─────── all of these ───┘
//!      └──────────▶ Ending(reason) ──▶ Ended(reason), once the engine has *seen* the cell gone
//! ```
//!
//! It knows nothing of kernels: whether a ready session is busy is a matter of its contexts.

/// Where a session is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The engine was asked for a cell and has not answered.
    Provisioning,
    /// The cell runs; its guest is being attested and its first kernel boots.
    Connecting,
    /// Code can run.
    Ready,
    /// Nothing runs in it, its link is cut, and its cell is being frozen.
    Pausing,
    /// Its cell is frozen.
    Paused,
    /// Its cell is being thawed and linked again.
    Resuming,
    /// Its cell is being removed, and a new one will take its place.
    Replacing,
    /// It is to end, but the engine has not answered yet: absence would prove nothing.
    Aborting(EndReason),
    /// Its cell is being removed.
    Ending(EndReason),
    /// Its cell was seen to be gone.
    Ended(EndReason),
}

impl Phase {
    /// The words of all phases of a session that has not ended.
    pub const LIVE: [&str; 9] =
        ["provisioning", "connecting", "ready", "pausing", "paused", "resuming", "replacing", "aborting", "ending"];

    /// A word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Provisioning => "provisioning",
            Self::Connecting => "connecting",
            Self::Ready => "ready",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Replacing => "replacing",
            Self::Aborting(_) => "aborting",
            Self::Ending(_) => "ending",
            Self::Ended(_) => "ended",
        }
    }
}

/// Why a session ended. The first reason stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EndReason {
    /// A caller ended it.
    Deleted,
    /// Nothing ran for its idle time.
    Idle,
    /// It reached its age.
    Lifetime,
    /// Memory ran out for its first process.
    Oom,
    /// Its kernel died and no new one would start.
    KernelDied,
    /// Its cell went away, or could no longer be reached.
    Lost,
    /// The control plane stopped.
    Drained,
    /// It never became ready.
    StartFailed,
}

impl EndReason {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Deleted,
        Self::Idle,
        Self::Lifetime,
        Self::Oom,
        Self::KernelDied,
        Self::Lost,
        Self::Drained,
        Self::StartFailed,
    ];

    /// The public word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Deleted => "deleted",
            Self::Idle => "idle",
            Self::Lifetime => "lifetime",
            Self::Oom => "oom",
            Self::KernelDied => "kernel_died",
            Self::Lost => "lost",
            Self::Drained => "drained",
            Self::StartFailed => "start_failed",
        }
    }
}

/// Something happened to a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The engine's answer: the cell runs.
    CellEnsured,
    /// The engine's answer: it failed. The cell may exist all the same.
    EnsureFailed,
    /// The guest is attested and the first kernel answers.
    KernelReady,
    /// The guest, the attestation or the first kernel failed.
    BootFailed,
    /// Somebody wants it paused, or nothing was asked of it for its idle time; nothing runs in it.
    PauseRequested,
    /// The cell is frozen.
    CellPaused,
    /// The cell could not be frozen. It may be all the same.
    PauseFailed,
    /// Something is asked of it that needs its cell, or its cell was thawed by others.
    ResumeRequested,
    /// The cell's link is gone because it was frozen by others.
    CellFrozen,
    /// The cell runs, and its guest answers.
    CellResumed,
    /// Somebody wants it to end, or a deadline passed.
    EndRequested(EndReason),
    /// It was made before anybody asked for it, and somebody has: their own preparations are still to be made.
    Claimed,
    /// The cell is gone or can't be reached any more.
    CellLost(EndReason),
    /// The cell's guest does not answer, and the session is to go on in a new cell.
    GuestLost,
    /// The cell's absence was seen.
    RemovalSeen,
    /// The cell could not be removed.
    RemovalFailed,
    /// It is time to try the removal again.
    RetryDue,
}

/// Something to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Ask the engine for the cell; after a removal for a new one under a new name.
    EnsureCell,
    /// Open the link to the cell that an earlier process has left.
    AdoptCell,
    /// Freeze the cell.
    PauseCell,
    /// Thaw the cell, and open the link to it.
    ResumeCell,
    /// Open the link, attest, start the first kernel.
    BootGuest,
    /// End every execution with what is known, and answer whoever waits.
    SettleExecutions,
    /// End the executions that run; those that wait go on waiting.
    SettleRunning,
    /// Remove the cell.
    RemoveCell,
    /// Come back with [`Event::RetryDue`] after a while.
    ScheduleRetry,
}

/// What a session begins with.
#[must_use]
pub fn begin() -> (Phase, Vec<Effect>) {
    (Phase::Provisioning, vec![Effect::EnsureCell])
}

/// What a session goes on with that an earlier process has left, and that was ready, or was not yet: then it gets another cell, since nobody
/// knows how far the first one came.
#[must_use]
pub fn go_on(was_ready: bool) -> (Phase, Vec<Effect>) {
    if was_ready { (Phase::Ready, vec![Effect::AdoptCell]) } else { (Phase::Replacing, vec![Effect::RemoveCell]) }
}

/// What a session goes on with that an earlier process has paused, or was about to: nothing ran in it.
#[must_use]
pub fn go_on_paused() -> (Phase, Vec<Effect>) {
    (Phase::Pausing, vec![Effect::PauseCell])
}

/// What a session goes on with that an earlier process was ending.
#[must_use]
pub fn go_on_ending(reason: EndReason) -> (Phase, Vec<Effect>) {
    end(reason)
}

/// What follows from an event. An event that has no meaning in a phase changes nothing.
#[must_use]
pub fn step(phase: Phase, event: Event) -> (Phase, Vec<Effect>) {
    use Effect as Do;
    use Event as On;
    use Phase as In;
    match (phase, event) {
        (In::Provisioning, On::CellEnsured) => (In::Connecting, vec![Do::BootGuest]),
        (In::Provisioning, On::EnsureFailed) => end(EndReason::StartFailed),
        (In::Provisioning, On::EndRequested(reason) | On::CellLost(reason)) => {
            (In::Aborting(reason), vec![Do::SettleExecutions])
        }
        (In::Aborting(reason), On::CellEnsured | On::EnsureFailed) => (In::Ending(reason), vec![Do::RemoveCell]),

        (In::Connecting, On::KernelReady) => (In::Ready, vec![]),
        (In::Connecting, On::BootFailed) => end(EndReason::StartFailed),
        (
            In::Connecting | In::Ready | In::Pausing | In::Paused | In::Resuming,
            On::EndRequested(reason) | On::CellLost(reason),
        ) => end(reason),

        (In::Ready, On::Claimed) => (In::Connecting, vec![]),
        (In::Ready, On::PauseRequested) => (In::Pausing, vec![Do::PauseCell]),
        (In::Pausing, On::CellPaused) => (In::Paused, vec![]),
        (In::Pausing, On::PauseFailed) | (In::Paused, On::ResumeRequested) | (In::Ready, On::CellFrozen) => {
            (In::Resuming, vec![Do::ResumeCell])
        }
        (In::Resuming, On::CellResumed) => (In::Ready, vec![]),

        (In::Ready | In::Resuming, On::GuestLost) => (In::Replacing, vec![Do::SettleRunning, Do::RemoveCell]),
        (In::Replacing, On::RemovalSeen) => (In::Provisioning, vec![Do::EnsureCell]),
        (In::Replacing, On::RemovalFailed) => (In::Replacing, vec![Do::ScheduleRetry]),
        (In::Replacing, On::RetryDue) => (In::Replacing, vec![Do::RemoveCell]),
        // The removal is under way already, or will be tried again.
        (In::Replacing, On::EndRequested(reason) | On::CellLost(reason)) => {
            (In::Ending(reason), vec![Do::SettleExecutions])
        }

        (In::Ending(reason), On::RemovalSeen) => (In::Ended(reason), vec![]),
        (In::Ending(reason), On::RemovalFailed) => (In::Ending(reason), vec![Do::ScheduleRetry]),
        (In::Ending(reason), On::RetryDue) => (In::Ending(reason), vec![Do::RemoveCell]),
        (phase, _) => (phase, vec![]),
    }
}

fn end(reason: EndReason) -> (Phase, Vec<Effect>) {
    (Phase::Ending(reason), vec![Effect::SettleExecutions, Effect::RemoveCell])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn events() -> impl Strategy<Value = Event> {
        let reason = prop_oneof![
            Just(EndReason::Deleted),
            Just(EndReason::Idle),
            Just(EndReason::Lifetime),
            Just(EndReason::Oom),
            Just(EndReason::Lost),
            Just(EndReason::Drained),
        ];
        prop_oneof![
            Just(Event::CellEnsured),
            Just(Event::EnsureFailed),
            Just(Event::KernelReady),
            Just(Event::BootFailed),
            Just(Event::GuestLost),
            Just(Event::Claimed),
            Just(Event::PauseRequested),
            Just(Event::CellPaused),
            Just(Event::PauseFailed),
            Just(Event::ResumeRequested),
            Just(Event::CellFrozen),
            Just(Event::CellResumed),
            reason.clone().prop_map(Event::EndRequested),
            reason.prop_map(Event::CellLost),
            Just(Event::RemovalSeen),
            Just(Event::RemovalFailed),
            Just(Event::RetryDue),
        ]
    }

    /// An engine as the world knows it: it answers `ensure` once, and a cell may exist from the question on.
    #[derive(Default)]
    struct World {
        ensure_open: bool,
        removal_open: bool,
        retry_open: bool,
        pause_open: bool,
        resume_open: bool,
        may_exist: bool,
    }

    impl World {
        fn perform(&mut self, effects: &[Effect]) {
            for effect in effects {
                match effect {
                    Effect::EnsureCell => (self.ensure_open, self.may_exist) = (true, true),
                    Effect::RemoveCell => self.removal_open = true,
                    Effect::ScheduleRetry => self.retry_open = true,
                    Effect::PauseCell => self.pause_open = true,
                    Effect::ResumeCell => self.resume_open = true,
                    _ => {}
                }
            }
        }

        /// Whether this event can happen now.
        fn allows(&self, event: Event) -> bool {
            match event {
                Event::CellEnsured | Event::EnsureFailed => self.ensure_open,
                Event::RemovalSeen | Event::RemovalFailed => self.removal_open,
                Event::RetryDue => self.retry_open,
                Event::CellPaused | Event::PauseFailed => self.pause_open,
                Event::CellResumed => self.resume_open,
                _ => true,
            }
        }
    }

    proptest! {
        #[test]
        fn a_session_never_ends_while_a_cell_may_still_appear(events in proptest::collection::vec(events(), 0..60)) {
            let mut world = World::default();
            let (mut phase, effects) = begin();
            world.perform(&effects);
            let mut first_reason = None;
            for event in events.into_iter() {
                if !world.allows(event) { continue; }
                match event {
                    Event::CellEnsured | Event::EnsureFailed => world.ensure_open = false,
                    Event::RemovalSeen => (world.removal_open, world.may_exist) = (false, world.ensure_open),
                    Event::RemovalFailed => world.removal_open = false,
                    Event::RetryDue => world.retry_open = false,
                    Event::CellPaused | Event::PauseFailed => world.pause_open = false,
                    Event::CellResumed => world.resume_open = false,
                    _ => {}
                }
                let (next, effects) = step(phase, event);
                world.perform(&effects);
                let reason = match next {
                    Phase::Aborting(r) | Phase::Ending(r) | Phase::Ended(r) => Some(r),
                    _ => None,
                };
                if let Some(first) = first_reason {
                    prop_assert_eq!(reason, Some(first), "an end is a one-way door, and its first reason stays");
                }
                first_reason = reason;
                if matches!(next, Phase::Ending(_) | Phase::Replacing) {
                    prop_assert!(world.removal_open || world.retry_open, "a removal is under way, or will be");
                }
                if next == Phase::Pausing {
                    prop_assert!(world.pause_open, "the engine is asked to freeze it");
                }
                if next == Phase::Resuming {
                    prop_assert!(world.resume_open, "the engine is asked to thaw it");
                }
                if matches!(next, Phase::Pausing | Phase::Paused) {
                    let came_from = matches!(phase, Phase::Ready | Phase::Pausing | Phase::Paused);
                    prop_assert!(came_from, "only what was ready is paused");
                }
                if matches!(next, Phase::Ended(_)) {
                    prop_assert!(!world.may_exist, "ended while a cell may exist");
                }
                if matches!(phase, Phase::Ended(_)) {
                    prop_assert_eq!(next, phase);
                    prop_assert!(effects.is_empty());
                }
                phase = next;
            }
        }

        #[test]
        fn every_end_can_be_reached_from_everywhere(events in proptest::collection::vec(events(), 0..30)) {
            let (mut phase, _) = begin();
            for event in events { (phase, _) = step(phase, event); }
            for event in [
                Event::EndRequested(EndReason::Deleted), Event::EnsureFailed, Event::RemovalFailed, Event::RetryDue, Event::RemovalSeen,
            ] { (phase, _) = step(phase, event); }
            prop_assert!(matches!(phase, Phase::Ended(_)));
        }
    }

    #[test]
    fn a_lost_guest_gets_a_new_cell_once_the_old_one_is_gone() {
        let (phase, effects) = step(Phase::Ready, Event::GuestLost);
        assert_eq!((phase, effects), (Phase::Replacing, vec![Effect::SettleRunning, Effect::RemoveCell]));
        assert_eq!(step(phase, Event::RemovalSeen), (Phase::Provisioning, vec![Effect::EnsureCell]));
        let (ending, effects) = step(phase, Event::EndRequested(EndReason::Deleted));
        assert_eq!((ending, effects), (Phase::Ending(EndReason::Deleted), vec![Effect::SettleExecutions]));
        assert_eq!(step(ending, Event::RemovalSeen).0, Phase::Ended(EndReason::Deleted));
    }

    #[test]
    fn a_pause_that_fails_is_undone_and_a_resume_that_fails_is_a_lost_guest() {
        let (phase, effects) = step(Phase::Ready, Event::PauseRequested);
        assert_eq!((phase, effects), (Phase::Pausing, vec![Effect::PauseCell]));
        assert_eq!(step(phase, Event::CellPaused), (Phase::Paused, vec![]));
        let (resuming, effects) = step(phase, Event::PauseFailed);
        assert_eq!((resuming, effects), (Phase::Resuming, vec![Effect::ResumeCell]));
        assert_eq!(step(resuming, Event::CellResumed), (Phase::Ready, vec![]));
        assert_eq!(step(resuming, Event::GuestLost).0, Phase::Replacing);
        assert_eq!(step(resuming, Event::CellLost(EndReason::Lost)).0, Phase::Ending(EndReason::Lost));
    }

    #[test]
    fn a_paused_session_is_resumed_and_ended_but_not_paused_again() {
        assert_eq!(step(Phase::Paused, Event::ResumeRequested), (Phase::Resuming, vec![Effect::ResumeCell]));
        assert_eq!(step(Phase::Paused, Event::PauseRequested), (Phase::Paused, vec![]));
        for phase in [Phase::Pausing, Phase::Paused, Phase::Resuming] {
            let ended = step(phase, Event::EndRequested(EndReason::Deleted));
            let removal = vec![Effect::SettleExecutions, Effect::RemoveCell];
            assert_eq!(ended, (Phase::Ending(EndReason::Deleted), removal), "{phase:?}");
        }
    }

    #[test]
    fn an_end_before_the_engine_answered_waits_for_the_answer() {
        let (phase, effects) = step(Phase::Provisioning, Event::EndRequested(EndReason::Deleted));
        assert_eq!((phase, effects), (Phase::Aborting(EndReason::Deleted), vec![Effect::SettleExecutions]));
        assert_eq!(step(phase, Event::RemovalSeen).0, phase);
        assert_eq!(step(phase, Event::CellEnsured), (Phase::Ending(EndReason::Deleted), vec![Effect::RemoveCell]));
    }
}
