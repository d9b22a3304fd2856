//! What others see of a session. Nothing changes here.

use std::sync::Arc;
use std::time::Instant;

use jiff::{SignedDuration, Timestamp};

use super::super::{Attributes, ContextView, Snapshot, instant};
use super::{Actor, Context, wall};
use crate::domain::ids::ContextId;
use crate::domain::lifecycle::Phase;
use crate::domain::spec::SessionSpec;
use crate::store::state::Stage;

impl Actor {
    pub(super) fn view(&self, id: ContextId) -> Option<ContextView> {
        let context = self.contexts.get(&id)?;
        Some(ContextView {
            id,
            state: context.state(),
            language: context.language().to_owned(),
            kernelspec: context.kernelspec.clone(),
            is_default: id == self.default_context,
            queued: context.queued(),
            created_at: context.created_at,
        })
    }

    pub(super) fn publish(&self) {
        let busy = self.is_busy();
        let idle_deadline = match self.phase {
            Phase::Ready => self.idle_deadline(),
            Phase::Paused => Some(self.paused_deadline()),
            _ => None,
        };
        let fingerprint =
            |s: &Snapshot| (s.phase, s.busy, Arc::as_ptr(&s.attributes), s.start_failure.is_some(), s.loss.is_some());
        let loss = self.loss_told();
        self.snapshot.send_if_modified(|snapshot| {
            let before = fingerprint(snapshot);
            let language = self.contexts.get(&self.default_context).map(Context::language).unwrap_or_default();
            if *snapshot.language != *language {
                snapshot.language = Arc::from(language);
            }
            snapshot.phase = self.phase;
            (snapshot.busy, snapshot.cells) = (busy, self.cells);
            snapshot.attributes = Arc::clone(&self.attributes);
            snapshot.start_failure.clone_from(&self.start_failure);
            if snapshot.loss.as_deref() != loss {
                snapshot.loss = loss.map(Arc::from);
            }
            snapshot.last_active = wall(self.last_active);
            snapshot.expires_at = wall(self.expires);
            snapshot.idle_deadline = idle_deadline.map(wall);
            let changed = before != fingerprint(snapshot);
            snapshot.generation += u64::from(changed);
            changed
        });
    }
}

pub(super) fn first_snapshot(spec: &SessionSpec, attributes: &Arc<Attributes>) -> Snapshot {
    Snapshot {
        generation: 0,
        phase: Phase::Provisioning,
        busy: false,
        cells: 1,
        attributes: Arc::clone(attributes),
        last_active: Timestamp::now(),
        expires_at: Timestamp::now()
            .saturating_add(SignedDuration::try_from(spec.timeouts.lifetime).unwrap_or_default())
            .unwrap_or(Timestamp::MAX),
        idle_deadline: None,
        start_failure: None,
        language: Arc::from(""),
        loss: None,
    }
}

pub(super) fn frozen_since(stage: Stage) -> Option<Instant> {
    match stage {
        Stage::Paused(since) => Some(instant(since)),
        _ => None,
    }
}
