//! What is counted of a session: its starts, and its end. An end that nobody has asked for is told in the audit too.

use super::Actor;
use crate::domain::lifecycle::{EndReason, Phase};
use crate::metrics::{Source, Started};
use crate::store::state::AuditEvent;

/// The action of an event of a session's end.
const END_SESSION: &str = "end_session";

impl Actor {
    /// Its phase is another one than `before`.
    pub(super) fn count(&self, before: Phase) {
        if let Phase::Ended(reason) = self.phase {
            self.tell_end(reason);
        }
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

    /// What was asked for is told with the request; what is nobody's yet concerns nobody.
    fn tell_end(&self, reason: EndReason) {
        let is_asked_for = matches!(reason, EndReason::Deleted | EndReason::Drained);
        let Some(state) = self.leaving.state.as_ref().filter(|_| !is_asked_for && !self.is_unclaimed) else { return };
        let id = self.cell.session;
        let event = AuditEvent {
            tenant: Some(self.keeping.tenant().to_owned()),
            target: format!("/v1/sessions/{id}"),
            session: Some(id.to_string()),
            ..AuditEvent::now(END_SESSION, reason.word())
        };
        if !state.put_audit(event) {
            tracing::error!(session = %id, "an audit event is lost: the database can't be written, and too many wait for it");
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
