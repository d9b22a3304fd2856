//! All sessions and executions that can still be asked about, and the bounds on their number.
//!
//! It holds handles and never waits: what takes time is the business of a session's own task.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use cellblock_wire::marker::LinkSecret;
use jiff::Timestamp;
use uuid::Uuid;

use super::actor::{self, Birth};
use super::capacity::{Capacity, Ceilings, Full, Need, Place};
use super::execution::Execution;
use super::keeping::{Growth, Keeping};
use super::once::{Requests, Reservation};
use super::pool::{Pool, PoolView};
use super::tap::Tap;
use super::workspaces::{Bounds, HoldRefused, Tenure, Workspaces};
use super::{Claim, Session, Settings, first_files, fresh};
use crate::domain::ids::{ExecutionId, SessionId};
use crate::domain::lifecycle::{EndReason, Phase};
use crate::domain::output::Status;
use crate::domain::quota::{Exceeded, Held, Share};
use crate::domain::spec::{FieldError, NewFile, Resources, SessionSpec};
use crate::egress::{Egress, Gate};
use crate::engine::{CellName, Engine};
use crate::metrics::{Levels, Metrics, PoolLevel};
use crate::store::Archive;
use crate::store::state::{
    ContextRecord, ExecutionRecord, Lasting, Left, Made, RunningRecord, SessionRecord, Stage, State,
};

/// How much is kept.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// What may be promised at once.
    pub ceilings: Ceilings,
    /// An ended session can be asked about for this long.
    pub session_retention: Duration,
    /// A finished execution can be asked about for this long.
    pub execution_retention: Duration,
    /// Finished executions that are kept, all together.
    pub executions: usize,
    /// Bytes that the records of finished executions may hold, all together.
    pub execution_bytes: u64,
    /// Workspaces that outlive sessions, of all tenants.
    pub workspaces: usize,
}

/// What becomes of sessions when the control plane stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterDrain {
    /// They go on with the next process.
    Keep,
    /// They end.
    Remove,
}

/// Why a session is not created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateRefused {
    /// There is no place for it.
    Full(Full),
    /// It is larger than all sessions together may be.
    TooLarge(Vec<FieldError>),
    /// The tenant has as much as it may.
    OverShare(Exceeded),
    /// The tenant has a live session of that name.
    NameInUse(SessionId),
    /// The workspace can't be had.
    Workspace(HoldRefused),
    /// The control plane is stopping.
    Draining,
}

/// The tenant of sessions that nobody has asked for yet. No key is of it.
const NOBODY: &str = "";

/// Executions that have not ended, each with what is known of it while it runs.
type Unfinished = Vec<(Arc<Execution>, Option<RunningRecord>)>;

/// Kept executions are looked through after this many new ones, or when this part of what they may hold has come.
const PRUNE_EVERY: usize = 64;
const PRUNE_PART: u64 = 8;
/// Most ended sessions that are kept, whatever their age.
const MAX_ENDED: usize = 2000;

/// What was created, or found.
#[derive(Debug)]
pub enum Created {
    /// A new session.
    New(Session),
    /// The live session of that name.
    Reused(Session),
}

/// What an operator can change while sessions live.
#[derive(Debug, Clone, Copy)]
struct Tuning {
    settings: Settings,
    limits: Limits,
}

/// The registry.
pub struct Registry {
    engine: Arc<dyn Engine>,
    archive: Option<Archive>,
    state: Option<State>,
    instance: String,
    tuning: RwLock<Tuning>,
    growth: Growth,
    capacity: Capacity,
    pool: Pool,
    requests: Requests,
    metrics: Metrics,
    egress: Egress,
    workspaces: Arc<Workspaces>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    sessions: BTreeMap<SessionId, Session>,
    over_since: HashMap<SessionId, Instant>,
    executions: HashMap<ExecutionId, Arc<Execution>>,
    order: VecDeque<ExecutionId>,
    draining: bool,
    /// Creates that wait for a place, and what they will hold.
    promised: HashMap<Uuid, (Arc<str>, Resources)>,
}

/// A create that counts as a session until there is one, or this is dropped.
struct Promise<'a> {
    registry: &'a Registry,
    number: Uuid,
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        self.registry.inner().promised.remove(&self.number);
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("instance", &self.instance).finish_non_exhaustive()
    }
}

/// How a session is asked for, beside what it is to be.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The live one of that name will do.
    pub reuse: bool,
    /// Whether it outlives the process.
    pub lasting: Lasting,
    /// The request may come twice.
    pub once: Option<&'a Reservation>,
    /// Files that it begins with.
    pub files: &'a Arc<[NewFile]>,
    /// Workspaces that its tenant may have.
    pub workspaces: Option<u32>,
}

impl Registry {
    /// An empty one. Without an archive, long contents and notebooks are not kept; without a database, sessions end with the process.
    #[must_use]
    pub fn new(
        engine: Arc<dyn Engine>,
        archive: Option<Archive>,
        state: Option<State>,
        instance: String,
        settings: Settings,
        limits: Limits,
        pool: Pool,
    ) -> Self {
        let (growth, capacity) = (Growth::default(), Capacity::new(limits.ceilings));
        let (requests, inner) = (Requests::new(state.clone()), Mutex::default());
        let (tuning, metrics) = (RwLock::new(Tuning { settings, limits }), Metrics::new());
        let egress = Egress::none();
        let workspaces = Workspaces::new(&instance, state.clone());
        Self {
            engine,
            archive,
            state,
            instance,
            tuning,
            growth,
            capacity,
            pool,
            requests,
            metrics,
            egress,
            workspaces,
            inner,
        }
    }

    /// The same, whose sessions have a way out. Before the first session.
    #[must_use]
    pub fn reaching(self, egress: Egress) -> Self {
        Self { egress, ..self }
    }

    /// The same, which counts where others count too. Before the first session.
    #[must_use]
    pub fn counting(self, metrics: Metrics) -> Self {
        if let Some(state) = &self.state {
            metrics.include(state.commits());
        }
        Self { metrics, ..self }
    }

    /// For how long an execution is known after its end, at most.
    #[must_use]
    pub fn executions_are_kept(&self) -> Duration {
        self.tuning().limits.execution_retention
    }

    /// Goes on with other bounds. Sessions that are there keep their settings, and their places where there are fewer now.
    pub fn tune(&self, settings: Settings, limits: Limits) {
        *self.tuning.write().unwrap_or_else(PoisonError::into_inner) = Tuning { settings, limits };
        self.capacity.change(limits.ceilings);
    }

    /// Bounds and times of sessions, as they are now.
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.tuning().settings
    }

    fn tuning(&self) -> Tuning {
        *self.tuning.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates a session within the tenant's share, or finds its live one of that name if it may be `reuse`d. Waits for a place, for as long as a
    /// create may.
    ///
    /// # Errors
    /// See [`CreateRefused`].
    pub async fn create(
        &self,
        (tenant, share): (&Arc<str>, &Share),
        spec: SessionSpec,
        asked: Asked<'_>,
    ) -> Result<Created, CreateRefused> {
        let Asked { reuse, lasting, once, files, workspaces } = asked;
        let need = Need::from(&spec.resources);
        self.capacity.can_ever_hold(need).map_err(CreateRefused::TooLarge)?;
        let (promise, tenure) = {
            let mut inner = self.inner();
            // What is there is no more of the tenant's.
            if let Some(found) = inner.named(tenant, &spec, reuse)? {
                will_be(once, found.id);
                return Ok(Created::Reused(found));
            }
            inner.check_share(tenant, share, &spec.resources)?;
            let tenure = self.hold_workspace(tenant, &spec, workspaces)?;
            let number = Uuid::new_v4();
            inner.promised.insert(number, (Arc::clone(tenant), spec.resources));
            (Promise { registry: self, number }, tenure)
        };
        self.pool.give_up(self.capacity.short_of(need));
        let began = Instant::now();
        let place = self.capacity.place(tenant, need).await;
        self.metrics.create_waited(began.elapsed(), place.is_ok());
        let place = place.map_err(CreateRefused::Full)?;
        let mut inner = self.inner();
        // Another may have come first.
        if let Some(found) = inner.named(tenant, &spec, reuse)? {
            will_be(once, found.id);
            return Ok(Created::Reused(found));
        }
        let mut record = first_record(tenant, spec, lasting);
        if let Some(tenure) = &tenure {
            record.workspace = Some(tenure.id());
            tenure.belongs_to(record.id);
        }
        let birth = Birth { files: Arc::clone(files), tenure, ..self.birth(record, true, place) };
        will_be(once, birth.record.id);
        inner.make_room_for_ended();
        let session = actor::spawn(birth);
        inner.sessions.insert(session.id, session.clone());
        // At the same moment, so that it is counted once.
        inner.promised.remove(&promise.number);
        Ok(Created::New(session))
    }

    /// The workspace of a session that is about to be made, if it is to have one.
    fn hold_workspace(
        &self,
        tenant: &Arc<str>,
        spec: &SessionSpec,
        of_tenant: Option<u32>,
    ) -> Result<Option<Tenure>, CreateRefused> {
        let Some(asked) = &spec.workspace else { return Ok(None) };
        let bounds = Bounds { of_tenant, of_all: self.tuning().limits.workspaces };
        let held = self.workspaces.hold(tenant, (asked, &spec.template), bounds);
        held.map(Some).map_err(CreateRefused::Workspace)
    }

    /// Workspaces that outlive sessions.
    #[must_use]
    pub fn workspaces(&self) -> &Arc<Workspaces> {
        &self.workspaces
    }

    /// What a tenant holds, creates that wait included.
    #[must_use]
    pub fn held(&self, tenant: &str) -> Held {
        self.inner().held(tenant)
    }

    /// Executions that run or wait, with their sessions.
    #[must_use]
    pub fn unfinished_executions(&self) -> Vec<(Session, Arc<Execution>)> {
        let inner = self.inner();
        let unfinished = inner.executions.values().filter(|e| !e.status().is_final());
        unfinished.filter_map(|e| Some((inner.sessions.get(&e.place.session)?.clone(), Arc::clone(e)))).collect()
    }

    /// Finds a session that is there already: the tenant's live one of that name if it may be `reuse`d, or one that was made before it was asked for. The
    /// image of what is asked for need not be known. `lasting` says whether it outlives the process.
    ///
    /// # Errors
    /// See [`CreateRefused`].
    pub async fn find(
        &self,
        (tenant, share): (&Arc<str>, &Share),
        spec: &SessionSpec,
        asked: Asked<'_>,
    ) -> Result<Option<Created>, CreateRefused> {
        let Asked { reuse, lasting, once, files, .. } = asked;
        loop {
            let (session, spec, env, created_at) = {
                // Held over both, so that whoever looks at the shelves first and then here misses none.
                let mut inner = self.inner();
                // Another may have come first.
                if let Some(found) = inner.named(tenant, spec, reuse)? {
                    will_be(once, found.id);
                    return Ok(Some(Created::Reused(found)));
                }
                inner.check_share(tenant, share, &spec.resources)?;
                let Some(made) = self.pool.take(spec) else { return Ok(None) };
                let mut own = SessionSpec { image: made.spec.image.clone(), ..spec.clone() };
                // What others can see of a session holds no environment.
                let env = std::mem::take(&mut own.env);
                let (spec, created_at) = (Arc::new(own), Timestamp::now());
                let session =
                    Session { tenant: Arc::clone(tenant), spec: Arc::clone(&spec), created_at, is_warm: true, ..made };
                will_be(once, session.id);
                inner.make_room_for_ended();
                inner.sessions.insert(session.id, session.clone());
                (session, spec, env, created_at)
            };
            let keeping = self.keeping(tenant, session.id);
            let settings = self.tuning().settings;
            let claim = Claim { tenant: Arc::clone(tenant), spec, env, lasting, keeping, settings, created_at };
            let claimed = match begin_with(&session, files).await {
                Ok(()) => session.claim(claim).await.map_err(|refused| refused.to_string()),
                Err(why) => Err(why),
            };
            let Err(why) = claimed else { return Ok(Some(Created::New(session))) };
            tracing::info!(session = %session.id, why, "a session of a pool could not be claimed");
            session.end(EndReason::Drained);
            self.inner().sessions.remove(&session.id);
            if !files.is_empty() {
                // What can't be put in place there can't be elsewhere, and a new one says why.
                return Ok(None);
            }
        }
    }

    /// Begins a session that nobody has asked for, if there is a place that nobody waits for.
    pub(super) fn make_ahead(&self, spec: SessionSpec) -> Option<Session> {
        if self.inner().draining {
            return None;
        }
        let place = self.capacity.spare_place(Need::from(&spec.resources))?;
        let record = first_record(&Arc::from(NOBODY), spec, Lasting::Never);
        let keeping = Keeping::new(None, Arc::from(NOBODY), record.id, usize::MAX).counted(self.metrics.clone());
        Some(actor::spawn(Birth { is_unclaimed: true, keeping, ..self.birth(record, true, place) }))
    }

    /// The sessions that nobody has asked for yet.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// How many sessions of pools those who wait for a place need the places of.
    pub(super) fn short_of(&self) -> usize {
        self.capacity.awaited().map_or(0, |need| self.capacity.short_of(need).saturating_sub(1))
    }

    /// Waits until a session's place was given back.
    pub(super) async fn place_is_free(&self) {
        self.capacity.place_is_free().await;
    }

    fn birth(&self, record: SessionRecord, is_new: bool, place: Place) -> Birth {
        Birth {
            gate: self.gate(&record),
            keeping: self.keeping(&record.tenant, record.id),
            record,
            is_new,
            instance: self.instance.clone(),
            settings: self.tuning().settings,
            engine: Arc::clone(&self.engine),
            state: self.state.clone(),
            place,
            executions: Vec::new(),
            heard: 0,
            is_unclaimed: false,
            files: Arc::default(),
            tap: Tap::new(self.tuning().settings.tap),
            tenure: None,
        }
    }

    fn gate(&self, record: &SessionRecord) -> Arc<Gate> {
        Gate::new(
            self.egress.clone(),
            record.id,
            Arc::clone(&record.tenant),
            record.network.clone(),
            &record.spec.network,
        )
    }

    fn keeping(&self, tenant: &Arc<str>, id: SessionId) -> Keeping {
        let archive = self.archive.clone();
        let keeping = Keeping::new(archive, Arc::clone(tenant), id, self.tuning().settings.inline);
        keeping.growing(self.growth.clone()).counted(self.metrics.clone())
    }

    /// Takes over what an earlier process has left: sessions that live go on, with what runs and waits in them; what has ended can be asked about
    /// for what is left of its time.
    pub fn take_over(&self, left: Left) {
        let (now, limits) = (Timestamp::now(), self.tuning().limits);
        let Left { sessions, executions, heard, keys, workspaces, .. } = left;
        self.workspaces.take_over(workspaces);
        let mut of_sessions: HashMap<SessionId, Vec<ExecutionRecord>> = HashMap::new();
        for execution in executions {
            of_sessions.entry(execution.session).or_default().push(execution);
        }
        let mut contexts = HashSet::new();
        for record in sessions {
            let id = record.id;
            contexts.extend(record.contexts.iter().map(|context| (id, context.id)));
            let tap = Tap::new(self.tuning().settings.tap);
            let (kept, unfinished) = self.restore(&record, of_sessions.remove(&id).unwrap_or_default(), &tap);
            let session = match record.stage {
                Stage::Ended(reason, at) => {
                    let age = Duration::try_from(now.duration_since(at)).unwrap_or_default();
                    if age >= limits.session_retention {
                        continue;
                    }
                    let since = Instant::now().checked_sub(age).unwrap_or_else(Instant::now);
                    self.inner().over_since.insert(id, since);
                    let gate = self.gate(&record);
                    actor::ended(record, reason, gate)
                }
                _ => {
                    let place = self.capacity.place_of_a_session(Need::from(&record.spec.resources));
                    let heard = heard.get(&id).filter(|(cell, _)| *cell == record.cells).map_or(0, |(_, seq)| *seq);
                    let is_run = record.lasting == Lasting::Never;
                    let of_run = unfinished.first().map(|(execution, _)| Arc::clone(execution)).filter(|_| is_run);
                    let tenure =
                        record.workspace.map(|held| self.workspaces.go_on(held, id, record.spec.workspace.as_ref()));
                    let birth =
                        Birth { executions: unfinished, heard, tap, tenure, ..self.birth(record, false, place) };
                    let session = actor::spawn(birth);
                    if let Some(execution) = of_run {
                        session.end_after(execution);
                    }
                    session
                }
            };
            let mut inner = self.inner();
            inner.sessions.insert(id, session);
            for execution in kept {
                inner.order.push_back(execution.id);
                inner.executions.insert(execution.id, execution);
            }
        }
        let inner = self.inner();
        self.requests.take_over(keys, |record| match record.made {
            Made::Session(id) => {
                let is_own = |session: &Session| session.tenant == record.tenant && !session.is_over();
                inner.sessions.get(&id).is_some_and(is_own)
            }
            Made::Execution(id) => inner.executions.contains_key(&id),
            Made::Context(session, context) => contexts.contains(&(session, context)),
            // Whether it was started is known to the guest only, and it is not to be started twice.
            Made::Command(session, _) => inner.sessions.get(&session).is_some_and(|session| !session.is_over()),
        });
    }

    /// Requests that may come twice.
    #[must_use]
    pub fn requests(&self) -> &Requests {
        &self.requests
    }

    /// The executions that a session has left, and those among them that have not ended.
    fn restore(
        &self,
        record: &SessionRecord,
        left: Vec<ExecutionRecord>,
        tap: &Arc<Tap>,
    ) -> (Vec<Arc<Execution>>, Unfinished) {
        let keeping = self.keeping(&record.tenant, record.id);
        let (mut kept, mut unfinished) = (Vec::new(), Vec::new());
        for mut execution in left {
            let running = execution.running.take();
            let execution = {
                let tap = (execution.birth.context == record.default_context).then(|| Arc::clone(tap));
                Arc::new(Execution::restore(execution, running.as_ref(), keeping.clone(), tap))
            };
            kept.push(Arc::clone(&execution));
            if !execution.status().is_final() {
                unfinished.push((execution, running));
            }
        }
        (kept, unfinished)
    }

    /// Waits until what was told of sessions before is committed, so that it is there after the end of the process. Says whether it could be.
    pub async fn settle(&self) -> bool {
        let Some(state) = &self.state else { return true };
        let settled = state.settle().await;
        if let Err(error) = &settled {
            tracing::error!(%error, "the sessions' database can't be written; sessions would be lost with this process");
        }
        settled.is_ok()
    }

    /// Whether the database could be written the last time.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.state.as_ref().is_none_or(State::is_written)
    }

    /// A session of a tenant, live or kept.
    #[must_use]
    pub fn session(&self, tenant: &str, id: SessionId) -> Option<Session> {
        self.inner().sessions.get(&id).filter(|s| *s.tenant == *tenant).cloned()
    }

    /// The name of the cell that a session has, or is to have, if it has not ended.
    #[must_use]
    pub fn cell_of(&self, id: SessionId) -> Option<CellName> {
        let snapshot = self.any_session(id)?.snapshot();
        (!matches!(snapshot.phase, Phase::Ended(_))).then(|| CellName::new(&self.instance, id, snapshot.cells))
    }

    /// A session that is somebody's, whoever's.
    #[must_use]
    pub fn claimed_session(&self, id: SessionId) -> Option<Session> {
        self.inner().sessions.get(&id).cloned()
    }

    /// All that are somebody's.
    #[must_use]
    pub fn claimed_sessions(&self) -> Vec<Session> {
        self.inner().sessions.values().cloned().collect()
    }

    /// A session, whoever's it is.
    #[must_use]
    pub fn any_session(&self, id: SessionId) -> Option<Session> {
        // In this order: what is claimed leaves the shelves while it comes here.
        self.pool.session(id).or_else(|| self.inner().sessions.get(&id).cloned())
    }

    /// A tenant's sessions in the order of their creation, after one of them.
    #[must_use]
    pub fn sessions(&self, tenant: &str, after: Option<SessionId>) -> Vec<Session> {
        use std::ops::Bound;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let inner = self.inner();
        inner
            .sessions
            .range((from, Bound::Unbounded))
            .map(|(_, s)| s)
            .filter(|s| *s.tenant == *tenant)
            .cloned()
            .collect()
    }

    /// All sessions that have not ended.
    #[must_use]
    pub fn live(&self) -> Vec<Session> {
        self.inner().sessions.values().filter(|s| !matches!(s.phase(), Phase::Ended(_))).cloned().collect()
    }

    /// The same with those that nobody has asked for yet.
    #[must_use]
    pub fn all(&self) -> Vec<Session> {
        let mut all = self.pool.sessions();
        all.extend(self.live());
        all
    }

    /// Keeps an execution, so that it can be asked about.
    pub fn keep(&self, execution: &Arc<Execution>) {
        let limits = self.tuning().limits;
        let mut inner = self.inner();
        inner.executions.insert(execution.id, Arc::clone(execution));
        inner.order.push_back(execution.id);
        // It looks at all that is kept; the reconciler's timer does it as well.
        let has_grown = self.growth.take_above(limits.execution_bytes / PRUNE_PART);
        if has_grown || inner.order.len().is_multiple_of(PRUNE_EVERY) {
            let forgotten = inner.prune_executions(&limits, Instant::now());
            drop(inner);
            self.forget(&forgotten);
        }
    }

    /// An execution of one of a tenant's sessions.
    #[must_use]
    pub fn execution(&self, tenant: &str, id: ExecutionId) -> Option<Arc<Execution>> {
        let inner = self.inner();
        let execution = inner.executions.get(&id)?;
        let session = inner.sessions.get(&execution.place.session)?;
        (*session.tenant == *tenant).then(|| Arc::clone(execution))
    }

    /// The executions of a session that can still be asked about, in the order in which they were accepted.
    #[must_use]
    pub fn executions_of(&self, session: SessionId) -> Vec<Arc<Execution>> {
        let inner = self.inner();
        let is_meant = |execution: &&Arc<Execution>| execution.place.session == session;
        let mut found: Vec<_> = inner.executions.values().filter(is_meant).cloned().collect();
        found.sort_by_key(|execution| execution.id);
        found
    }

    /// Forgets what has been kept long enough.
    pub fn prune(&self) {
        if let Some(archive) = &self.archive {
            archive.prune();
        }
        let (now, limits) = (Instant::now(), self.tuning().limits);
        if let Some(state) = &self.state {
            let retention = limits.session_retention;
            state.forget_ended(Timestamp::now().saturating_sub(retention).unwrap_or(Timestamp::MIN));
        }
        self.requests.prune(Timestamp::now());
        let mut inner = self.inner();
        inner.prune_sessions(&limits, now);
        let forgotten = inner.prune_executions(&limits, now);
        drop(inner);
        self.forget(&forgotten);
    }

    fn forget(&self, executions: &[ExecutionId]) {
        if let Some(state) = &self.state {
            state.forget_executions(executions);
        }
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// How much there is of everything now.
    #[must_use]
    pub fn levels(&self) -> Levels {
        let mut levels = Levels::default();
        let snapshots: Vec<_> = self.all().iter().map(Session::snapshot).collect();
        let in_phase = |word: &&str| snapshots.iter().filter(|s| s.phase.word() == *word).count();
        levels.sessions = Phase::LIVE.iter().map(|word| (*word, in_phase(word))).collect();
        levels.busy = snapshots.iter().filter(|s| s.busy).count();
        for execution in self.inner().executions.values() {
            match execution.status() {
                Status::Queued => levels.queued += 1,
                Status::Running => levels.running += 1,
                _ => {}
            }
        }
        levels.tenants = self.metrics.tenant_levels(self.live().iter().map(|session| &*session.tenant));
        self.capacity.look(&mut levels);
        levels.workspaces = self.workspaces.all();
        let pools = self.pool.views().into_iter();
        let pool = |PoolView { template, target, ready, starting, hits, misses, .. }| PoolLevel {
            template,
            ready,
            starting,
            target,
            hits,
            misses,
        };
        levels.pools = pools.map(pool).collect();
        levels
    }

    /// Takes nothing new from now on.
    pub fn begin_drain(&self) {
        self.inner().draining = true;
    }

    /// Executions that run or wait, whoever's they are.
    #[must_use]
    pub fn unfinished(&self) -> usize {
        self.inner().executions.values().filter(|e| !e.status().is_final()).count()
    }

    /// Takes nothing new, gives what runs a grace, and ends every session, or leaves them to the next process; waits until all are gone, or left, or
    /// the time is over. Returns how many containers are there that should be gone.
    pub async fn drain(&self, grace: impl Future<Output = ()>, within: Duration, after: AfterDrain) -> usize {
        self.begin_drain();
        let (live, unclaimed) = (self.live(), self.pool.sessions());
        unclaimed.iter().for_each(|session| session.end(EndReason::Drained));
        let quiet = async {
            for session in &live {
                session.wait_for(|s| !s.busy).await;
            }
        };
        tokio::select! {
            () = quiet => {}
            () = grace => {}
        }
        if after == AfterDrain::Remove {
            live.iter().for_each(|s| s.end(EndReason::Drained));
        }
        let gone = async {
            for session in &live {
                match after {
                    AfterDrain::Remove => drop(session.wait_for(|s| matches!(s.phase, Phase::Ended(_))).await),
                    AfterDrain::Keep => session.leave().await,
                }
            }
            for session in &unclaimed {
                session.wait_for(|s| matches!(s.phase, Phase::Ended(_))).await;
            }
        };
        let _ = tokio::time::timeout(within, gone).await;
        self.settle().await;
        let lives = |session: &&Session| !matches!(session.phase(), Phase::Ended(_));
        let unclaimed = unclaimed.iter().filter(lives).count();
        unclaimed + if after == AfterDrain::Keep { 0 } else { self.live().len() }
    }

    /// Whether nothing new is accepted.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.inner().draining
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Every change is a single call on a map, so a panic leaves nothing half done.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn will_be(once: Option<&Reservation>, id: SessionId) {
    if let Some(once) = once {
        once.will_be(Made::Session(id));
    }
}

/// What there is of a session that nobody has begun to make.
/// Puts files in place of a session that is about to be claimed. Whatever comes of it, nobody else gets that session.
async fn begin_with(session: &Session, files: &[NewFile]) -> Result<(), String> {
    if files.is_empty() {
        return Ok(());
    }
    let link = session.link().await.map_err(|refused| refused.to_string())?;
    first_files::put(&link, files).await.map_err(|failure| failure.detail)
}

fn first_record(tenant: &Arc<str>, mut spec: SessionSpec, lasting: Lasting) -> SessionRecord {
    let now = Timestamp::now();
    let default_context = fresh();
    // What others can see of a session holds no environment.
    let env = std::mem::take(&mut spec.env);
    SessionRecord {
        id: fresh(),
        revision: 0,
        tenant: Arc::clone(tenant),
        stage: Stage::Starting,
        lasting,
        workspace: None,
        is_warm: false,
        secret: LinkSecret(Uuid::new_v4().into_bytes()),
        created_at: now,
        expires_at: now.saturating_add(spec.timeouts.lifetime).unwrap_or(Timestamp::MAX),
        last_active: now,
        idle: spec.timeouts.idle,
        labels: spec.labels.clone(),
        network: spec.network.initial.clone(),
        env,
        cells: 1,
        loss: None,
        default_context,
        contexts: vec![ContextRecord::new(default_context, now, spec.kernelspec.clone())],
        spec: Arc::new(spec),
    }
}

impl Inner {
    /// The tenant's live session of the name that is asked for, if it may be reused.
    fn named(&self, tenant: &Arc<str>, spec: &SessionSpec, reuse: bool) -> Result<Option<Session>, CreateRefused> {
        if self.draining {
            return Err(CreateRefused::Draining);
        }
        let Some(name) = &spec.name else { return Ok(None) };
        let same = |s: &&Session| !s.is_over() && s.tenant == *tenant && s.spec.name.as_ref() == Some(name);
        match self.sessions.values().find(same) {
            Some(session) if reuse => Ok(Some(session.clone())),
            Some(session) => Err(CreateRefused::NameInUse(session.id)),
            None => Ok(None),
        }
    }

    fn held(&self, tenant: &str) -> Held {
        let live = self.sessions.values().filter(|s| *s.tenant == *tenant && !matches!(s.phase(), Phase::Ended(_)));
        let promised = self.promised.values().filter(|(whose, _)| **whose == *tenant).map(|(_, resources)| resources);
        let mut held = Held::default();
        for resources in live.map(|s| &s.spec.resources).chain(promised) {
            held.add(resources.cpu_millis.into(), resources.memory_bytes);
        }
        held
    }

    /// Whether another session is within a tenant's share.
    fn check_share(&self, tenant: &str, share: &Share, resources: &Resources) -> Result<(), CreateRefused> {
        if *share == Share::default() {
            return Ok(());
        }
        let (cpu_millis, memory_bytes) = (resources.cpu_millis.into(), resources.memory_bytes);
        share.admits(&self.held(tenant), cpu_millis, memory_bytes).map_err(CreateRefused::OverShare)
    }

    fn make_room_for_ended(&mut self) {
        let live = self.sessions.values().filter(|s| !matches!(s.phase(), Phase::Ended(_))).count();
        if self.sessions.len() >= live + MAX_ENDED {
            self.forget_oldest_ended();
        }
    }

    fn forget_oldest_ended(&mut self) {
        let ended = self.sessions.values().find(|s| matches!(s.phase(), Phase::Ended(_))).map(|s| s.id);
        if let Some(id) = ended {
            self.sessions.remove(&id);
            self.over_since.remove(&id);
        }
    }

    fn prune_sessions(&mut self, limits: &Limits, now: Instant) {
        let over = self.sessions.values().filter(|s| matches!(s.phase(), Phase::Ended(_))).map(|s| s.id);
        for id in over {
            self.over_since.entry(id).or_insert(now);
        }
        let expired = |since: &Instant| now.duration_since(*since) >= limits.session_retention;
        for id in self.over_since.extract_if(|_, since| expired(since)).map(|(id, _)| id) {
            self.sessions.remove(&id);
        }
    }

    /// The oldest go first: those finished too long ago, and as many more as it takes to hold the bound on bytes. Says which.
    fn prune_executions(&mut self, limits: &Limits, now: Instant) -> Vec<ExecutionId> {
        let mut forgotten = Vec::new();
        let finished = || self.executions.values().filter(|e| e.status().is_final());
        let mut bytes: u64 = finished().map(|e| e.weight()).sum();
        let mut count = finished().count();
        let executions = &mut self.executions;
        let sessions = &self.sessions;
        self.order.retain(|id| {
            let Some(execution) = executions.get(id) else { return false };
            let Some(finished) = execution.finished() else { return true };
            let keep = bytes <= limits.execution_bytes
                && count <= limits.executions
                && now.duration_since(finished) < limits.execution_retention
                && sessions.contains_key(&execution.place.session);
            if !keep {
                bytes -= execution.weight().min(bytes);
                count -= 1;
                executions.remove(id);
                forgotten.push(*id);
            }
            keep
        });
        forgotten
    }
}
