//! What is counted of a session: its starts, and its end.

use super::Actor;
use crate::domain::lifecycle::{EndReason, Phase};
use crate::metrics::{Source, Started};

impl Actor {
    /// Its phase is another one than `before`.
    pub(super) fn count(&self, before: Phase) {
        let Some(metrics) = self.keeping.metrics() else { return };
        let outcome = match (before, self.phase) {
            (Phase::Connecting, Phase::Ready) => Some(Started::Ok),
            (Phase::Provisioning | Phase::Connecting, Phase::Aborting(reason) | Phase::Ending(reason)) => {
                Some(how_it_failed(reason))
            }
            _ => None,
        };
        if let Some(outcome) = outcome {
            metrics.session_started(self.source(), outcome, self.starting_since.elapsed());
        }
        if let Phase::Ended(reason) = self.phase {
            metrics.session_ended(reason);
        }
    }

    fn source(&self) -> Source {
        match (self.cells, self.is_unclaimed, self.leaving.is_warm) {
            (2.., _, _) => Source::Replacement,
            (_, true, _) => Source::Pool,
            (_, false, true) => Source::Warm,
            (_, false, false) => Source::Cold,
        }
    }
}

fn how_it_failed(reason: EndReason) -> Started {
    match reason {
        EndReason::Deleted | EndReason::Idle | EndReason::Lifetime | EndReason::Drained => Started::Ended,
        EndReason::StartFailed | EndReason::Oom | EndReason::KernelDied | EndReason::Lost => Started::Failed,
    }
}
