//! Sessions that are made before anybody asks for them: a container with a booted, prepared kernel that belongs to nobody until it is claimed, once. It
//! decides how many there are; a claim itself is the session's task's business.
//!
//! There is a shelf for what a caller gets of a template who asks for nothing, and one for each other size that an operator names. A request that wants something
//! else of the engine or of the kernel starts cold. What was asked for lately says how many are kept ready, between the shelf's least and most.
//! They are made one at a time, and only while no caller waits for a place or a start.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::Session;
use super::registry::Registry;
use crate::domain::ids::SessionId;
use crate::domain::lifecycle::{EndReason, Phase};
use crate::domain::spec::{PoolSize, Resources, SessionSpec};
use crate::engine::{Engine, Pull};
use crate::task;

/// Requests of so long ago still count as demand.
const DEMAND: Duration = Duration::from_secs(60);
/// The image that a template names is looked up this often.
const LOOK_AT_IMAGE: Duration = Duration::from_secs(30);
/// After a session that did not start, the next is tried after this long; doubled each time up to the maximum.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What a shelf holds.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What its sessions are, but for their image.
    pub spec: SessionSpec,
    /// The template's word for the image.
    pub image: String,
    /// How many there are.
    pub size: PoolSize,
}

/// How a pool is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolView {
    /// Its template.
    pub template: String,
    /// What each may use.
    pub resources: Resources,
    /// How many there are.
    pub size: PoolSize,
    /// How many there should be now.
    pub target: usize,
    /// Those that can be claimed.
    pub ready: usize,
    /// Those that start.
    pub starting: usize,
    /// Requests that got one.
    pub hits: u64,
    /// Requests that could have, and found none.
    pub misses: u64,
}

/// The pools.
#[derive(Debug)]
pub struct Pool {
    shelves: Mutex<Vec<Shelf>>,
    /// How many shelves there have been.
    numbered: AtomicU64,
    /// Sessions that were ended for callers who wait, until their places are free.
    given_up: Mutex<Vec<Session>>,
    changed: Notify,
}

#[derive(Debug)]
struct Shelf {
    /// No other has had it.
    number: u64,
    plan: Plan,
    ready: VecDeque<Session>,
    starting: Vec<Session>,
    /// Requests of lately, the oldest first.
    asked: VecDeque<Instant>,
    hits: u64,
    misses: u64,
    failed: u32,
    retry_at: Option<Instant>,
    looked_at: Option<Instant>,
}

impl Plan {
    /// Whether sessions of the other are as good.
    fn is_as(&self, other: &Self) -> bool {
        let image = String::new();
        let without_image = |spec: &SessionSpec| SessionSpec { image: image.clone(), ..spec.clone() };
        self.image == other.image && without_image(&self.spec) == without_image(&other.spec)
    }
}

impl Shelf {
    fn new(number: u64, plan: Plan) -> Self {
        Self {
            number,
            plan,
            ready: VecDeque::new(),
            starting: Vec::new(),
            asked: VecDeque::new(),
            hits: 0,
            misses: 0,
            failed: 0,
            retry_at: None,
            looked_at: None,
        }
    }

    fn target(&self) -> usize {
        let PoolSize { min, max } = self.plan.size;
        self.asked.len().max(min as usize).min(max as usize)
    }

    fn forget_old(&mut self, now: Instant) {
        while self.asked.pop_front_if(|at| now >= *at + DEMAND).is_some() {}
        // One that is not over is of no use either, while it gets another container.
        self.ready.retain(|session| {
            let is_of_use = session.phase() == Phase::Ready;
            if !is_of_use {
                session.end(EndReason::Lost);
            }
            is_of_use
        });
        self.starting.retain(|session| !session.is_over());
    }

    /// When time alone changes what there should be.
    fn next_deadline(&self) -> Option<Instant> {
        let shrinks = self.asked.front().map(|at| *at + DEMAND);
        let looks = self.looked_at.map(|at| at + LOOK_AT_IMAGE);
        [shrinks, looks, self.retry_at].into_iter().flatten().min()
    }

    /// Whether its sessions are what is asked for, as far as an engine and a kernel that runs are concerned.
    fn fits(&self, spec: &SessionSpec) -> bool {
        let own = &self.plan.spec;
        let engine = own.template == spec.template
            && own.runtime == spec.runtime
            && own.resources == spec.resources
            && own.network.packages == spec.network.packages
            && own.network.initial.is_open() == spec.network.initial.is_open()
            && own.data == spec.data
            && own.workdir == spec.workdir
            && own.ports == spec.ports
            // What was made ahead has a working folder of its own.
            && spec.workspace.is_none();
        let kernel = own.kernelspec == spec.kernelspec
            && own.transport == spec.transport
            && own.output == spec.output
            && spec.setup.starts_with(&own.setup);
        engine && kernel
    }
}

impl Pool {
    /// Empty shelves.
    #[must_use]
    pub fn new(plans: Vec<Plan>) -> Self {
        let pool = Self {
            shelves: Mutex::default(),
            numbered: AtomicU64::new(0),
            given_up: Mutex::default(),
            changed: Notify::new(),
        };
        pool.change(plans);
        pool
    }

    /// Goes on with other shelves. What is on one that stays, or only has another size, stays there.
    pub fn change(&self, plans: Vec<Plan>) {
        let mut shelves = self.shelves();
        let mut old = std::mem::take(&mut *shelves);
        for plan in plans {
            let same = old.iter().position(|shelf| shelf.plan.is_as(&plan));
            let kept = same.map(|at| old.swap_remove(at)).map(|shelf| {
                let spec = SessionSpec { image: shelf.plan.spec.image.clone(), ..plan.spec.clone() };
                Shelf { plan: Plan { spec, ..plan.clone() }, ..shelf }
            });
            shelves.push(kept.unwrap_or_else(|| Shelf::new(self.numbered.fetch_add(1, Ordering::Relaxed), plan)));
        }
        drop(shelves);
        let gone = old.iter().flat_map(|shelf| shelf.ready.iter().chain(&shelf.starting));
        gone.for_each(|session| session.end(EndReason::Drained));
        self.changed.notify_one();
    }

    /// A session that is what is asked for, taken off its shelf for ever.
    pub(super) fn take(&self, spec: &SessionSpec) -> Option<Session> {
        let mut shelves = self.shelves();
        let shelf = shelves.iter_mut().find(|shelf| shelf.fits(spec))?;
        shelf.forget_old(Instant::now());
        if shelf.asked.len() >= shelf.plan.size.max as usize {
            // More than that says nothing more.
            shelf.asked.pop_front();
        }
        shelf.asked.push_back(Instant::now());
        // How a kernel that runs is told of variables is known of one language.
        let can_be_told =
            |session: &mut Session| spec.env == shelf.plan.spec.env || &*session.snapshot().language == "python";
        let taken = shelf.ready.pop_front_if(can_be_told);
        shelf.hits += u64::from(taken.is_some());
        shelf.misses += u64::from(taken.is_none());
        drop(shelves);
        self.changed.notify_one();
        taken
    }

    /// Ends so many sessions on shelves, or all, so that callers who wait for a place get theirs: those that start first, which are of least use.
    pub(super) fn give_up(&self, count: usize) {
        let mut given_up = self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        // Those whose places are on their way already.
        given_up.retain(|session| !matches!(session.phase(), Phase::Ended(_)));
        let mut shelves = self.shelves();
        for _ in given_up.len()..count {
            let starting = shelves.iter_mut().find_map(|shelf| shelf.starting.pop());
            let largest = shelves.iter_mut().max_by_key(|shelf| shelf.ready.len());
            match starting.or_else(|| largest.and_then(|shelf| shelf.ready.pop_back())) {
                Some(session) => {
                    session.end(EndReason::Drained);
                    given_up.push(session);
                }
                None => return,
            }
        }
    }

    /// Something happened that may let one more be made.
    pub(super) fn wake(&self) {
        self.changed.notify_one();
    }

    /// A session on a shelf.
    pub(super) fn session(&self, id: SessionId) -> Option<Session> {
        self.sessions().into_iter().find(|session| session.id == id)
    }

    /// All sessions on shelves.
    pub(super) fn sessions(&self) -> Vec<Session> {
        let shelves = self.shelves();
        shelves.iter().flat_map(|shelf| shelf.ready.iter().chain(&shelf.starting)).cloned().collect()
    }

    /// How the pools are.
    #[must_use]
    pub fn views(&self) -> Vec<PoolView> {
        let view = |shelf: &mut Shelf| {
            shelf.forget_old(Instant::now());
            PoolView {
                template: shelf.plan.spec.template.clone(),
                resources: shelf.plan.spec.resources,
                size: shelf.plan.size,
                target: shelf.target(),
                ready: shelf.ready.len(),
                starting: shelf.starting.len(),
                hits: shelf.hits,
                misses: shelf.misses,
            }
        };
        self.shelves().iter_mut().map(view).collect()
    }

    fn shelves(&self) -> MutexGuard<'_, Vec<Shelf>> {
        // Every change is whole between its statements that can panic, of which there are none.
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends what is too much, and says of which shelves one is to be made next.
    fn plan(&self) -> Vec<(u64, Plan)> {
        let now = Instant::now();
        let mut shelves = self.shelves();
        let mut missing = Vec::new();
        for shelf in shelves.iter_mut() {
            shelf.forget_old(now);
            let (target, there) = (shelf.target(), shelf.ready.len() + shelf.starting.len());
            let surplus = there.saturating_sub(target).min(shelf.ready.len());
            shelf.ready.drain(..surplus).for_each(|session| session.end(EndReason::Drained));
            shelf.retry_at.take_if(|at| now >= *at);
            if there < target && shelf.retry_at.is_none() {
                missing.push((shelf.number, shelf.plan.clone()));
            }
        }
        if shelves.iter().all(|shelf| shelf.starting.is_empty()) { missing } else { Vec::new() }
    }

    /// Sessions of an image that the template does not name any more are of no use.
    fn has_image(&self, number: u64, image: &str) {
        let mut shelves = self.shelves();
        let Some(shelf) = with_number(&mut shelves, number) else { return };
        shelf.looked_at = Some(Instant::now());
        if shelf.plan.spec.image != image {
            image.clone_into(&mut shelf.plan.spec.image);
            shelf.ready.drain(..).for_each(|session| session.end(EndReason::Drained));
        }
    }

    fn starts(&self, number: u64, session: &Session) {
        match with_number(&mut self.shelves(), number) {
            Some(shelf) => shelf.starting.push(session.clone()),
            // The shelf was taken away meanwhile.
            None => session.end(EndReason::Drained),
        }
    }

    /// A session is ready, or will not be.
    fn has_started(&self, number: u64, session: &Session) {
        let mut shelves = self.shelves();
        let Some(shelf) = with_number(&mut shelves, number) else { return };
        let was_starting = shelf.starting.len();
        shelf.starting.retain(|other| other.id != session.id);
        // One that was to be ended meanwhile is not put on the shelf.
        if shelf.starting.len() == was_starting {
            return;
        }
        if session.phase() == Phase::Ready {
            shelf.failed = 0;
            // The template may name another by now.
            match session.spec.image == shelf.plan.spec.image {
                true => shelf.ready.push_back(session.clone()),
                false => session.end(EndReason::Drained),
            }
        } else {
            session.end(EndReason::Drained);
            shelf.has_failed();
        }
    }

    fn image_is_missing(&self, number: u64) {
        if let Some(shelf) = with_number(&mut self.shelves(), number) {
            shelf.looked_at = Some(Instant::now());
            shelf.has_failed();
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.shelves().iter().filter_map(Shelf::next_deadline).min()
    }

    /// Shelves whose image is to be looked up.
    fn to_look_at(&self) -> Vec<(u64, String)> {
        let now = Instant::now();
        let is_due = |shelf: &Shelf| shelf.looked_at.is_some_and(|at| now >= at + LOOK_AT_IMAGE);
        let shelves = self.shelves();
        shelves.iter().filter(|s| is_due(s)).map(|s| (s.number, s.plan.image.clone())).collect()
    }
}

impl Shelf {
    fn has_failed(&mut self) {
        let wait = RETRY.0.saturating_mul(1 << self.failed.min(6)).min(RETRY.1);
        (self.failed, self.retry_at) = (self.failed + 1, Some(Instant::now() + wait));
    }
}

fn with_number(shelves: &mut [Shelf], number: u64) -> Option<&mut Shelf> {
    shelves.iter_mut().find(|shelf| shelf.number == number)
}

/// Keeps the shelves filled until it is told to stop, and empties them then.
pub async fn run(engine: Arc<dyn Engine>, registry: Arc<Registry>, stop: CancellationToken) {
    let filled = async {
        loop {
            fill(engine.as_ref(), &registry).await;
            let pool = registry.pool();
            let deadline = pool.next_deadline().map(tokio::time::Instant::from_std);
            let due = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = pool.changed.notified() => {}
                () = registry.place_is_free() => {}
                () = due => {}
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = filled => {}
    }
}

/// Starts the next session that is missing, if nobody who asks for one has to wait for that.
async fn fill(engine: &dyn Engine, registry: &Arc<Registry>) {
    let pool = registry.pool();
    for (number, image) in pool.to_look_at() {
        match engine.resolve_image(&image, Pull::Never).await {
            Ok(image) => pool.has_image(number, &image.id),
            Err(_) => pool.image_is_missing(number),
        }
    }
    // One that came to be while somebody began to wait.
    pool.give_up(registry.short_of());
    for (number, plan) in pool.plan() {
        let Ok(image) = engine.resolve_image(&plan.image, Pull::Never).await else {
            tracing::warn!(template = plan.spec.template, "a pool is not filled: the template's image is not there");
            pool.image_is_missing(number);
            continue;
        };
        pool.has_image(number, &image.id);
        // One that does not fit leaves room for a smaller one of another template.
        if let Some(session) = registry.make_ahead(SessionSpec { image: image.id, ..plan.spec }) {
            return fill_with(registry, number, session);
        }
    }
}

fn fill_with(registry: &Arc<Registry>, number: u64, session: Session) {
    registry.pool().starts(number, &session);
    let registry = Arc::clone(registry);
    task::spawn("pool", async move {
        session.wait_for(|s| !matches!(s.phase, Phase::Provisioning | Phase::Connecting)).await;
        registry.pool().has_started(number, &session);
        registry.pool().wake();
        // One that ends on its shelf leaves a gap.
        session.wait_for(|s| s.phase != Phase::Ready).await;
        registry.pool().wake();
    });
}
