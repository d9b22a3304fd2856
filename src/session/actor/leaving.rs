//! What a session leaves for the next process: when its record is committed, and what stands in it.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Actor, wall};
use crate::domain::lifecycle::Phase;
use crate::store::state::{SessionRecord, Stage, State};

/// A record that found no room is put again after this long.
const RETRY: Duration = Duration::from_millis(50);

/// A session's way to the database.
pub(super) struct Leaving {
    pub(super) state: Option<State>,
    tenant: Arc<str>,
    is_awaited: bool,
    revision: u64,
    /// What the last record was told by.
    saved: Option<u64>,
    retry_at: Option<Instant>,
}

impl Leaving {
    pub(super) fn new(state: Option<State>, record: &SessionRecord) -> Self {
        let SessionRecord { is_awaited, revision, .. } = *record;
        Self { state, tenant: Arc::clone(&record.tenant), is_awaited, revision, saved: None, retry_at: None }
    }

    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.retry_at
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
        if state.put(self.record()) {
            (self.leaving.saved, self.leaving.retry_at) = (Some(mark), None);
        } else {
            self.leaving.retry_at = Some(Instant::now() + RETRY);
        }
    }

    fn mark(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.stage_without_time(), self.cells, self.expires).hash(&mut hasher);
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
            Stage::Ending(reason) => (2, Some(reason)),
            Stage::Ended(reason, _) => (3, Some(reason)),
        }
    }

    fn stage(&self) -> Stage {
        match self.phase {
            Phase::Provisioning | Phase::Connecting | Phase::Replacing => Stage::Starting,
            Phase::Ready => Stage::Live,
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
            is_awaited: self.leaving.is_awaited,
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
