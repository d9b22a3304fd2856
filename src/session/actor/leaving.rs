//! What a session leaves for the next process: when its record is committed, and what stands in it.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use super::{Actor, wall};
use crate::domain::lifecycle::Phase;
use crate::store::state::{Lasting, SessionRecord, Stage, State};

/// A session's way to the database.
pub(super) struct Leaving {
    pub(super) state: Option<State>,
    tenant: Arc<str>,
    lasting: Lasting,
    revision: u64,
    /// What the last record was told by.
    saved: Option<u64>,
}

impl Leaving {
    pub(super) fn new(state: Option<State>, record: &SessionRecord) -> Self {
        let SessionRecord { lasting, revision, .. } = *record;
        Self { state, tenant: Arc::clone(&record.tenant), lasting, revision, saved: None }
    }

    /// It is ready, and whoever waited for that will tell.
    pub(super) fn is_ready(&mut self) {
        if self.lasting == Lasting::OnceReady {
            self.lasting = Lasting::Always;
        }
    }
}

impl Actor {
    /// Has what the session leaves committed, if it is different.
    pub(super) fn save(&mut self) {
        let Some(state) = self.leaving.state.clone() else { return };
        let mark = self.mark();
        if self.leaving.saved == Some(mark) {
            return;
        }
        self.leaving.revision += 1;
        self.leaving.saved = Some(mark);
        state.put(self.record());
    }

    fn mark(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.stage_without_time(), self.leaving.lasting, self.cells, self.expires).hash(&mut hasher);
        (self.attributes.idle, &self.attributes.labels).hash(&mut hasher);
        // To the second: a record for every request would say no more.
        wall(self.last_active).as_second().hash(&mut hasher);
        self.contexts.values().for_each(|context| context.mark().hash(&mut hasher));
        hasher.finish()
    }

    fn stage_without_time(&self) -> (u8, Option<crate::domain::lifecycle::EndReason>) {
        match self.stage() {
            Stage::Starting => (0, None),
            Stage::Live => (1, None),
            Stage::Paused(_) => (4, None),
            Stage::Ending(reason) => (2, Some(reason)),
            Stage::Ended(reason, _) => (3, Some(reason)),
        }
    }

    fn stage(&self) -> Stage {
        match self.phase {
            Phase::Provisioning | Phase::Connecting | Phase::Replacing => Stage::Starting,
            Phase::Ready | Phase::Resuming => Stage::Live,
            Phase::Pausing | Phase::Paused => Stage::Paused(wall(self.freezing.since)),
            Phase::Aborting(reason) | Phase::Ending(reason) => Stage::Ending(reason),
            Phase::Ended(reason) => Stage::Ended(reason, jiff::Timestamp::now()),
        }
    }

    fn record(&self) -> SessionRecord {
        let is_over = matches!(self.phase, Phase::Aborting(_) | Phase::Ending(_) | Phase::Ended(_));
        SessionRecord {
            id: self.cell.session,
            revision: self.leaving.revision,
            tenant: Arc::clone(&self.leaving.tenant),
            spec: Arc::clone(&self.spec),
            stage: self.stage(),
            lasting: self.leaving.lasting,
            secret: self.secret,
            created_at: self.created_at,
            expires_at: wall(self.expires),
            last_active: wall(self.last_active),
            idle: self.attributes.idle,
            labels: self.attributes.labels.clone(),
            // Nobody will need it, and it holds secrets.
            env: if is_over { BTreeMap::new() } else { self.env.clone() },
            cells: self.cells,
            default_context: self.default_context,
            contexts: self.contexts.values().map(|context| context.record(wall)).collect(),
        }
    }
}
