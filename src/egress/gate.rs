//! The way out of one session: what it may reach now, what is open, what was decided lately, how much has passed. Each announced connection is a task of its own, within
//! bounds; the session's task only tells of it and never waits.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cellblock_wire::egress::{EgressRefused, MAX_WAITING};
use jiff::{Timestamp, Unit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::bucket::Bucket;
use super::carry::{Ended, Meter, carry};
use super::held::Room;
use super::packages::{PAGES_OF_SESSION, Remarks};
use super::reach::{NotReached, Reached};
use super::telling::{Budget, Pace};
use super::{Egress, Refusal};
use crate::domain::egress::{Host, Network, NetworkOffer, PACKAGES, Upstream};
use crate::domain::ids::SessionId;
use crate::domain::packages::PackagePolicy;
use crate::kernel::link::Link;
use crate::store::state::AuditEvent;
use crate::task;

/// Decisions that can be looked at.
const KEPT: usize = 200;
/// Those of a session that has ended: it can be asked about for a while, and there may be many.
const KEPT_AFTER: usize = 20;
/// Announcements of one session that are worked on at once, those that are about to be refused included. A guest that announces more gets no answer.
const UNDER_WAY: usize = 2 * MAX_WAITING;
/// Connections of one session that are looked up and dialled at once; others wait for their turn.
const REACHING: usize = 6;
/// Audit events of one session, of connections that were made and of refusals each.
const AUDIT_PACE: Pace = Pace { burst: 100.0, per_second: 0.5 };
/// Longest text of a guest's that is shown or kept, in characters.
const MAX_SHOWN: usize = 256;

/// A decision about a connection, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// When.
    pub at: Timestamp,
    /// The host as it was understood, or as the code wrote it.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The address that was dialled, or that is to blame; nothing where none is known.
    pub address: Option<IpAddr>,
    /// Why it was refused; nothing where it was made.
    pub refusal: Option<Refusal>,
    /// How it has ended: `done`, `broken`, `idle`, `too-many-bytes`, `cut` or `wrong-name`; nothing while it is open, or where it never was.
    pub ended: Option<&'static str>,
    /// Bytes that it has sent out of the cell, once it has ended.
    pub sent: u64,
    /// Bytes that it has brought in.
    pub received: u64,
}

/// What can be seen of a session's way out.
#[derive(Debug, Clone)]
pub struct GateView {
    /// Upstreams that an operator has named for it.
    pub upstreams: Vec<String>,
    /// Connections that are open.
    pub open: usize,
    /// Bytes that were sent out of the cell.
    pub sent: u64,
    /// Bytes that came in.
    pub received: u64,
    /// Connections that were made.
    pub made: u64,
    /// Connections that were refused.
    pub refused: u64,
    /// The latest decisions, the newest last.
    pub decisions: Vec<Decision>,
}

/// The way out of one session.
pub struct Gate {
    egress: Egress,
    session: SessionId,
    places: Arc<Semaphore>,
    under_way: Arc<Semaphore>,
    /// Connections whose names are looked up, or that are dialled.
    reaching: Semaphore,
    pace: Bucket,
    audit_budget: Budget,
    sent: AtomicU64,
    received: AtomicU64,
    /// Why packages were not given.
    remarks: Arc<Remarks>,
    /// For pages of the index that the session has not read.
    pages: Room,
    inner: Mutex<Inner>,
}

struct Inner {
    tenant: Arc<str>,
    network: Network,
    upstreams: Arc<[Upstream]>,
    packages: PackagePolicy,
    decisions: VecDeque<Decision>,
    /// The number of the first of them.
    first: u64,
    open: HashMap<u64, Open>,
    /// How many were admitted.
    admitted: u64,
    made: u64,
    refused: u64,
    /// Decisions that the audit was not told of, for there were too many.
    untold: u64,
}

/// A connection that was admitted.
struct Open {
    host: Host,
    port: u16,
    cut: CancellationToken,
}

/// What a connection is to be.
enum Admitted {
    Plain,
    Upstream(Box<Upstream>),
    Packages(PackagePolicy),
}

/// A connection that was admitted, until this is dropped.
struct Admission<'a> {
    gate: &'a Gate,
    number: u64,
    cut: CancellationToken,
    /// What TLS is to name, if it is spoken.
    name: Option<String>,
    admitted: Admitted,
    _places: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        self.gate.inner().open.remove(&self.number);
    }
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").field("session", &self.session).finish_non_exhaustive()
    }
}

impl Inner {
    fn admit(&self, host: &Host, port: u16) -> Result<Admitted, Refusal> {
        if Upstream::named_by(host) == Some(PACKAGES) && port == 80 {
            return match self.packages.is_open() {
                true => Ok(Admitted::Packages(self.packages.clone())),
                false => Err(Refusal::NoPackages),
            };
        }
        if !self.network.is_open() {
            return Err(Refusal::Closed);
        }
        if let Some(name) = Upstream::named_by(host) {
            let named = self.upstreams.iter().find(|upstream| upstream.name == name && port == 80);
            let named = named.ok_or_else(|| Refusal::NoUpstream(host.clone(), port))?;
            return Ok(Admitted::Upstream(Box::new(named.clone())));
        }
        match self.network.admits(host, port) && host.why_not_outside().is_none() {
            true => Ok(Admitted::Plain),
            false => Err(Refusal::NotAllowed(host.clone(), port)),
        }
    }
}

impl Gate {
    /// The way out of a session of a tenant, which may reach this.
    #[must_use]
    pub fn new(
        egress: Egress,
        session: SessionId,
        tenant: Arc<str>,
        network: Network,
        offer: &NetworkOffer,
    ) -> Arc<Self> {
        let settings = &egress.0.settings;
        let a_minute = f64::from(settings.connections_per_minute);
        let inner = Inner {
            tenant,
            network,
            upstreams: Arc::clone(&offer.upstreams),
            packages: offer.packages.clone(),
            decisions: VecDeque::new(),
            first: 0,
            open: HashMap::new(),
            admitted: 0,
            made: 0,
            refused: 0,
            untold: 0,
        };
        Arc::new(Self {
            places: Arc::new(Semaphore::new(settings.connections_per_session)),
            under_way: Arc::new(Semaphore::new(UNDER_WAY)),
            reaching: Semaphore::new(REACHING),
            pace: Bucket::new(a_minute, a_minute / 60.0),
            audit_budget: Budget::new(AUDIT_PACE),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            remarks: Arc::default(),
            pages: Room::of(PAGES_OF_SESSION),
            inner: Mutex::new(inner),
            egress,
            session,
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Every change is whole between its statements that can panic, of which there are none.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session may reach this from now on; what is open and not within it is cut.
    pub fn change(&self, network: Network) {
        let mut inner = self.inner();
        inner.network = network;
        let cut = inner.open.values().filter(|open| inner.admit(&open.host, open.port).is_err());
        cut.for_each(|open| open.cut.cancel());
    }

    /// The session becomes somebody's.
    pub fn claim(&self, tenant: Arc<str>, network: Network, offer: &NetworkOffer) {
        let mut inner = self.inner();
        (inner.tenant, inner.upstreams) = (tenant, Arc::clone(&offer.upstreams));
        inner.packages = offer.packages.clone();
        drop(inner);
        self.change(network);
    }

    /// The session has ended, or goes on with the next process: nothing is reached from now on.
    pub fn close(&self) {
        self.inner().packages = PackagePolicy::None;
        self.change(Network::default());
        let mut inner = self.inner();
        let (untold, tenant) = (std::mem::take(&mut inner.untold), Arc::clone(&inner.tenant));
        if untold > 0 {
            let before = format!("{untold} more before this, which were too many to be told");
            self.tell(Timestamp::now(), &tenant, before, "untold", None);
        }
        let surplus = inner.decisions.len().saturating_sub(KEPT_AFTER);
        inner.decisions.drain(..surplus);
        inner.decisions.shrink_to_fit();
        inner.first += surplus as u64;
    }

    /// What can be seen of it.
    #[must_use]
    pub fn view(&self) -> GateView {
        let inner = self.inner();
        GateView {
            upstreams: inner.upstreams.iter().map(|upstream| upstream.name.clone()).collect(),
            open: inner.open.len(),
            sent: self.sent.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
            made: inner.made,
            refused: inner.refused,
            decisions: inner.decisions.iter().cloned().collect(),
        }
    }

    /// A guest announces a connection. Never waits.
    pub fn announced(self: &Arc<Self>, link: Link, id: u64, host: String, port: u16) {
        let Ok(place) = Arc::clone(&self.under_way).try_acquire_owned() else { return };
        let gate = Arc::clone(self);
        task::spawn("egress", async move {
            gate.work(&link, id, &host, port, place).await;
        });
    }

    async fn work(&self, link: &Link, id: u64, text: &str, port: u16, place: OwnedSemaphorePermit) {
        let host = Host::parse(text).map_err(Refusal::NoHost);
        let shown = host.as_ref().map_or_else(|_| shown(text), ToString::to_string);
        let made = async {
            let host = host?;
            let admission = self.admit(&host, port)?;
            let reached = self.reach(&host, port, &admission.admitted).await?;
            // The rules may be others by now.
            match admission.cut.is_cancelled() {
                true => Err(Refusal::NotAllowed(host, port).into()),
                false => Ok((admission, reached)),
            }
        };
        match made.await {
            Ok((admission, reached)) => {
                let number = self.note(shown, port, reached.address, None);
                drop(place);
                self.carry(link, id, number, admission, reached).await;
            }
            Err(NotReached { refusal, address }) => {
                let refused = EgressRefused { status: refusal.status(), reason: refusal.to_string() };
                self.note(shown, port, address, Some(refusal));
                // A guest that does not hear it forgets the connection by itself.
                let _ = link.refuse_egress(id, &refused).await;
                drop(place);
            }
        }
    }

    async fn reach(&self, host: &Host, port: u16, admitted: &Admitted) -> Result<Reached, NotReached> {
        let tenant = Arc::clone(&self.inner().tenant);
        match admitted {
            Admitted::Plain => {
                let within = self.egress.0.settings.connect_timeout;
                // Names that nobody answers for would keep the lookups of all sessions busy.
                let turn = tokio::time::timeout(within, self.reaching.acquire()).await;
                let _turn = turn.map_err(|_| Refusal::Unreachable(host.clone(), port))?;
                self.egress.reach(&tenant, host, port).await
            }
            Admitted::Upstream(upstream) => self.egress.reach_upstream(&tenant, upstream).await,
            Admitted::Packages(policy) => {
                Ok(self.egress.reach_packages(tenant, policy.clone(), Arc::clone(&self.remarks), self.pages.clone()))
            }
        }
    }

    /// Whether a connection may be tried; it counts as open from now on.
    fn admit(&self, host: &Host, port: u16) -> Result<Admission<'_>, Refusal> {
        let settings = &self.egress.0.settings;
        if !self.pace.take() {
            return Err(Refusal::TooFast(settings.connections_per_minute));
        }
        let is_spent =
            |passed: &AtomicU64, most: Option<u64>| most.filter(|most| passed.load(Ordering::Relaxed) >= *most);
        let spent = is_spent(&self.sent, settings.sent_bytes).or(is_spent(&self.received, settings.received_bytes));
        // Rules come first: what may not be is not to be tried later.
        let mut inner = self.inner();
        let admitted = inner.admit(host, port)?;
        if let Some(most) = spent {
            return Err(Refusal::Spent(most));
        }
        let own = Arc::clone(&self.places).try_acquire_owned();
        let own = own.map_err(|_| Refusal::TooMany(settings.connections_per_session))?;
        let of_all = Arc::clone(&self.egress.0.places).try_acquire_owned().map_err(|_| Refusal::Full)?;
        inner.admitted += 1;
        let number = inner.admitted;
        let cut = CancellationToken::new();
        inner.open.insert(number, Open { host: host.clone(), port, cut: cut.clone() });
        drop(inner);
        let name = match (host, &admitted) {
            (Host::Name(name), Admitted::Plain) => Some(name.clone()),
            _ => None,
        };
        Ok(Admission { gate: self, number, cut, name, admitted, _places: (own, of_all) })
    }

    async fn carry(&self, link: &Link, id: u64, number: u64, admission: Admission<'_>, reached: Reached) {
        let shared = &self.egress.0;
        let Reached { stream, until: _until, .. } = reached;
        let (out, into) = (|bytes| shared.metrics.egress_sent(bytes), |bytes| shared.metrics.egress_received(bytes));
        let (sent_most, received_most) = (shared.settings.sent_bytes, shared.settings.received_bytes);
        let sent = Meter { own: AtomicU64::new(0), session: &self.sent, most: sent_most, count: &out };
        let received = Meter { own: AtomicU64::new(0), session: &self.received, most: received_most, count: &into };
        let ended = match link.open_egress(id).await {
            Ok(tunnel) => {
                let (idle, cut) = (shared.settings.idle_timeout, &admission.cut);
                carry((tunnel, stream), (&sent, &received), admission.name.as_deref(), idle, cut).await
            }
            // Whoever asked for it has gone, or the link has.
            Err(_) => Ended::Broken,
        };
        let mut inner = self.inner();
        let at = number.checked_sub(inner.first).and_then(|at| usize::try_from(at).ok());
        if let Some(decision) = at.and_then(|at| inner.decisions.get_mut(at)) {
            decision.ended = Some(ended.word());
            (decision.sent, decision.received) =
                (sent.own.load(Ordering::Relaxed), received.own.load(Ordering::Relaxed));
        }
    }

    /// Keeps a decision, counts it and tells the audit; answers with its number.
    fn note(&self, host: String, port: u16, address: Option<IpAddr>, refusal: Option<Refusal>) -> u64 {
        let word = refusal.as_ref().map_or("ok", Refusal::word);
        self.egress.0.metrics.egress_decided(word);
        let now = Timestamp::now();
        let at = now.round(Unit::Millisecond).unwrap_or(now);
        let target = match address {
            Some(address) => format!("{host}:{port} ({address})"),
            None => format!("{host}:{port}"),
        };
        let status = refusal.as_ref().map(Refusal::status);
        let is_refused = refusal.is_some();
        let mut inner = self.inner();
        *(if refusal.is_some() { &mut inner.refused } else { &mut inner.made }) += 1;
        let decision = Decision { at, host, port, address, refusal, ended: None, sent: 0, received: 0 };
        inner.decisions.push_back(decision);
        if inner.decisions.len() > KEPT {
            inner.decisions.pop_front();
            inner.first += 1;
        }
        let number = inner.first + inner.decisions.len() as u64 - 1;
        let tenant = Arc::clone(&inner.tenant);
        if !(self.audit_budget.take(is_refused) && self.egress.0.audit_budgets.take(&tenant, is_refused)) {
            inner.untold += 1;
            return number;
        }
        let untold = std::mem::take(&mut inner.untold);
        drop(inner);
        if untold > 0 {
            let before = format!("{untold} more before this, which were too many to be told");
            self.tell(at, &tenant, before, "untold", None);
        }
        self.tell(at, &tenant, target, word, status);
        number
    }

    fn tell(&self, at: Timestamp, tenant: &str, target: String, outcome: &str, status: Option<u16>) {
        let Some(state) = &self.egress.0.state else { return };
        let event = AuditEvent {
            at,
            tenant: Some(tenant.to_owned()).filter(|tenant| !tenant.is_empty()),
            target,
            session: Some(self.session.to_string()),
            status,
            ..AuditEvent::now("egress", outcome)
        };
        if !state.put_audit(event) {
            tracing::error!("an audit event is lost: the database can't be written, and too many wait for it");
        }
    }
}

/// A guest's text, fit to be shown.
fn shown(text: &str) -> String {
    text.chars().take(MAX_SHOWN).flat_map(char::escape_default).take(MAX_SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::egress::{Outside, Resolver, Settings, SystemDialer};
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    /// Never answers, and counts who asks.
    #[derive(Default)]
    struct Mute(AtomicUsize);

    #[async_trait::async_trait]
    impl Resolver for Mute {
        async fn resolve(&self, _: &str, _: &Arc<str>) -> std::io::Result<Vec<IpAddr>> {
            self.0.fetch_add(1, Ordering::Relaxed);
            std::future::pending().await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_has_so_many_names_looked_up_at_once() {
        let mute = Arc::new(Mute::default());
        let outside = Outside { resolver: Arc::clone(&mute) as _, dialer: Arc::new(SystemDialer) };
        let connect_timeout = Duration::from_secs(10);
        let settings = Settings { connect_timeout, ..Egress::none().0.settings.clone() };
        let egress = Egress::new(settings, Default::default(), outside, crate::metrics::Metrics::new(), None);
        let id = SessionId::from_uuid(uuid::Uuid::from_u128(1));
        let gate = Gate::new(egress, id, Arc::from("one"), Network::default(), &NetworkOffer::default());
        let host = Host::Name("mute.example.org".to_owned());
        let asking = (0..4 * REACHING).map(|_| gate.reach(&host, 443, &Admitted::Plain));
        let all = futures_util::future::join_all(asking);
        let early = tokio::time::timeout(connect_timeout / 2, all).await;
        assert!(early.is_err() && mute.0.load(Ordering::Relaxed) == REACHING, "{:?}", mute.0);
    }
}
