//! What a session leaves for the next process: when its record is committed, and what stands in it.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use super::super::execution::Execution;
use super::super::workspaces::Tenure;
use super::{Actor, Context, wall};
use crate::domain::ids::ContextId;
use crate::domain::lifecycle::Phase;
use crate::store::state::{ExecutionChange, Lasting, RunningRecord, SessionRecord, Stage, State, Turn};

/// A session's way to the database.
pub(super) struct Leaving {
    pub(super) state: Option<State>,
    tenant: Arc<str>,
    lasting: Lasting,
    pub(super) is_warm: bool,
    revision: u64,
    /// What the last record was told by.
    saved: Option<u64>,
    /// How far the guest of which cell was heard, as the database was told.
    heard: (u32, u64),
    /// Executions whose end it was not told.
    executions: Vec<Arc<Execution>>,
    /// What the last record of what runs in a context was told by.
    running: BTreeMap<ContextId, u64>,
}

impl Leaving {
    pub(super) fn new(state: Option<State>, record: &SessionRecord, heard: u64) -> Self {
        let SessionRecord { lasting, revision, cells, .. } = *record;
        Self {
            state,
            tenant: Arc::clone(&record.tenant),
            lasting,
            is_warm: record.is_warm,
            revision,
            saved: None,
            heard: (cells, heard),
            executions: Vec::new(),
            running: BTreeMap::new(),
        }
    }

    /// It is somebody's now.
    pub(super) fn claim(&mut self, tenant: Arc<str>, lasting: Lasting) {
        (self.tenant, self.lasting, self.is_warm) = (tenant, lasting, true);
        self.saved = None;
    }

    /// Has the database told what becomes of an execution.
    pub(super) fn follow(&mut self, execution: &Arc<Execution>) {
        if self.state.is_some() {
            self.executions.push(Arc::clone(execution));
        }
    }

    /// It is ready, and whoever waited for that will tell.
    pub(super) fn is_ready(&mut self) {
        if self.lasting == Lasting::OnceReady {
            self.lasting = Lasting::Always;
        }
    }
}

impl Actor {
    /// Has what the session and its executions leave committed, as far as it is different.
    pub(super) fn save(&mut self) {
        let Some(state) = self.leaving.state.clone() else { return };
        let mark = self.mark();
        let is_different = self.leaving.saved != Some(mark);
        if is_different {
            self.leaving.revision += 1;
            self.leaving.saved = Some(mark);
        }
        let record = is_different.then(|| self.record());
        let heard = (self.cells, self.wiring.last_seq());
        let executions = self.changes();
        if record.is_some() || heard != self.leaving.heard || !executions.is_empty() {
            self.leaving.heard = heard;
            state.put(Turn { session: self.cell.session, record, heard, executions });
        }
    }

    /// What has changed of executions since the database was told.
    fn changes(&mut self) -> Vec<ExecutionChange> {
        let mut changes: Vec<_> = self.leaving.executions.iter().filter_map(|e| e.take_change()).collect();
        self.leaving.executions.retain(|execution| !execution.status().is_final());
        for context in self.contexts.values() {
            let mut hasher = DefaultHasher::new();
            context.running_mark().hash(&mut hasher);
            let mark = hasher.finish();
            if self.leaving.running.insert(context.id, mark) == Some(mark) {
                continue;
            }
            let Some((id, running)) = context.running_record(wall) else { continue };
            match changes.iter_mut().find(|change| change.id == id) {
                Some(change) => change.running = Some(running),
                None if running == RunningRecord::default() => {}
                None => changes.push(ExecutionChange {
                    id,
                    birth: None,
                    progress: None,
                    running: Some(running),
                    events: Vec::new(),
                }),
            }
        }
        changes
    }

    fn mark(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.stage_without_time(), self.leaving.lasting, self.cells, self.expires).hash(&mut hasher);
        (self.attributes.idle, &self.attributes.labels, &self.attributes.network).hash(&mut hasher);
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
            workspace: self.tenure.as_ref().map(Tenure::id),
            lasting: self.leaving.lasting,
            is_warm: self.leaving.is_warm,
            secret: self.secret,
            created_at: self.created_at,
            expires_at: wall(self.expires),
            last_active: wall(self.last_active),
            idle: self.attributes.idle,
            labels: self.attributes.labels.clone(),
            network: self.attributes.network.clone(),
            // Nobody will need it, and it holds secrets.
            env: if is_over { BTreeMap::new() } else { self.env.clone() },
            cells: self.cells,
            loss: self.loss_told().map(str::to_owned),
            default_context: self.default_context,
            contexts: self.contexts.values().map(Context::record).collect(),
        }
    }
}
