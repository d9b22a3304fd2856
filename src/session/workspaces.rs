//! Workspaces that outlive sessions: whose each is, which session has it, and when it goes. Values behind a lock; what is asked of the engine is asked by a
//! session's task, by the reconciler (`tidy`), and by whoever deletes one (`Workspaces::remove`).
//!
//! A record is put before the engine is asked for the volume, and goes when the volume was seen to be gone; so the next process knows every volume that may
//! exist. Which session has one is not in it: that stands in the session's own record.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;

use super::fresh;
use crate::domain::ids::{SessionId, WorkspaceId};
use crate::domain::quota::Exceeded;
use crate::domain::workspace::WorkspaceUse;
use crate::engine::{Engine, EngineError, WorkspaceName, WorkspaceSpec, WorkspaceVolume};
use crate::store::state::{AuditEvent, State, WorkspaceRecord};

/// The action of the audit where a workspace goes for its age.
const EXPIRE: &str = "expire_workspace";

/// All workspaces of an instance.
#[derive(Debug)]
pub struct Workspaces {
    instance: String,
    state: Option<State>,
    entries: Mutex<BTreeMap<WorkspaceId, Entry>>,
}

#[derive(Debug)]
struct Entry {
    record: WorkspaceRecord,
    holder: Holder,
    /// The engine may have been asked for it.
    may_exist: bool,
    /// What it would be made with now.
    quota_bytes: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    Nobody,
    /// A create that waits for a place.
    Create,
    Session(SessionId),
}

/// How many there may be.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Of the tenant.
    pub of_tenant: Option<u32>,
    /// Of all tenants.
    pub of_all: usize,
}

/// Why a session does not get a workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HoldRefused {
    /// Another session has it, or is about to.
    InUse {
        /// Which, if it is one already.
        session: Option<SessionId>,
    },
    /// It is of another template.
    OfTemplate(String),
    /// The tenant has as many as it may.
    TooMany(Exceeded),
    /// All tenants together have as many as may be.
    Full,
}

/// Why a workspace is not deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeleteRefused {
    /// There is none of that name.
    Absent,
    /// A session has it, or is about to; which, if it is one already.
    InUse(Option<SessionId>),
}

/// A workspace, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkspaceView {
    /// What is kept of it.
    pub record: WorkspaceRecord,
    /// Whether a session has it, or is about to.
    pub is_in_use: bool,
    /// Which.
    pub session: Option<SessionId>,
}

impl WorkspaceView {
    /// When it goes if no session has it until then; nothing while one does.
    #[must_use]
    pub fn expires_at(&self) -> Option<Timestamp> {
        (!self.is_in_use).then(|| expiry(&self.record))
    }
}

fn expiry(record: &WorkspaceRecord) -> Timestamp {
    record.last_used.saturating_add(record.max_age).unwrap_or(Timestamp::MAX)
}

impl Entry {
    fn view(&self) -> WorkspaceView {
        let session = match self.holder {
            Holder::Session(id) => Some(id),
            Holder::Nobody | Holder::Create => None,
        };
        WorkspaceView { record: self.record.clone(), is_in_use: self.holder != Holder::Nobody, session }
    }

    /// Whether its tenant can see it: not one whose making has failed.
    fn is_shown(&self) -> bool {
        !self.record.is_deleted && (self.record.uid.is_some() || self.holder != Holder::Nobody)
    }
}

/// A session's hold on its workspace. Dropped once the session's cell was seen to be gone, or with the process.
#[derive(Debug)]
pub(super) struct Tenure {
    workspaces: Arc<Workspaces>,
    id: WorkspaceId,
}

impl Tenure {
    pub(super) fn id(&self) -> WorkspaceId {
        self.id
    }

    /// It is this session's from now on.
    pub(super) fn belongs_to(&self, session: SessionId) {
        let workspaces = &self.workspaces;
        workspaces.change(self.id, |entry| {
            (entry.holder, entry.record.last_used) = (Holder::Session(session), Timestamp::now());
            workspaces.put(&entry.record);
        });
    }

    /// Has the engine make it, unless it is there.
    pub(super) fn making(
        &self,
        engine: Arc<dyn Engine>,
        image: &str,
    ) -> impl Future<Output = Result<(), EngineError>> + Send + use<> {
        let (workspaces, id, image) = (Arc::clone(&self.workspaces), self.id, image.to_owned());
        async move {
            let Some(spec) = workspaces.begin_making(id, image) else { return Ok(()) };
            let made = engine.ensure_workspace(&spec).await?;
            workspaces.was_made(id, made);
            Ok(())
        }
    }
}

impl Drop for Tenure {
    fn drop(&mut self) {
        self.workspaces.give_back(self.id);
    }
}

impl Workspaces {
    /// None yet.
    #[must_use]
    pub fn new(instance: &str, state: Option<State>) -> Arc<Self> {
        Arc::new(Self { instance: instance.to_owned(), state, entries: Mutex::default() })
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<WorkspaceId, Entry>> {
        // Every change is complete in itself.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that an earlier process has left.
    pub(super) fn take_over(&self, records: Vec<WorkspaceRecord>) {
        let entry = |record: WorkspaceRecord| {
            let quota_bytes = record.quota_bytes;
            Entry { record, holder: Holder::Nobody, may_exist: true, quota_bytes }
        };
        self.entries().extend(records.into_iter().map(|record| (record.id, entry(record))));
    }

    /// The hold of a session that an earlier process has left.
    pub(super) fn go_on(self: &Arc<Self>, id: WorkspaceId, session: SessionId, asked: Option<&WorkspaceUse>) -> Tenure {
        self.change(id, |entry| {
            entry.holder = Holder::Session(session);
            entry.quota_bytes = asked.and_then(|asked| asked.offer.quota_bytes);
        });
        Tenure { workspaces: Arc::clone(self), id }
    }

    /// Gives a tenant's workspace to a session that is about to be made, and makes a record of it if there is none of that name.
    pub(super) fn hold(
        self: &Arc<Self>,
        tenant: &Arc<str>,
        (asked, template): (&WorkspaceUse, &str),
        bounds: Bounds,
    ) -> Result<Tenure, HoldRefused> {
        let mut entries = self.entries();
        let found = entries.values_mut().find(|entry| is_of(entry, tenant, &asked.name));
        let id = match found {
            Some(entry) if entry.record.template != template => {
                return Err(HoldRefused::OfTemplate(entry.record.template.clone()));
            }
            Some(entry) if entry.holder != Holder::Nobody => {
                return Err(HoldRefused::InUse { session: entry.view().session });
            }
            Some(entry) => {
                (entry.holder, entry.quota_bytes) = (Holder::Create, asked.offer.quota_bytes);
                if entry.record.uid.is_none() {
                    entry.record.quota_bytes = asked.offer.quota_bytes;
                }
                entry.record.max_age = asked.offer.max_age;
                self.put(&entry.record);
                entry.record.id
            }
            None => {
                check_bounds(&entries, tenant, bounds)?;
                let now = Timestamp::now();
                let record = WorkspaceRecord {
                    id: fresh(),
                    tenant: Arc::clone(tenant),
                    name: asked.name.clone(),
                    template: template.to_owned(),
                    uid: None,
                    quota_bytes: asked.offer.quota_bytes,
                    max_age: asked.offer.max_age,
                    created_at: now,
                    last_used: now,
                    is_deleted: false,
                };
                self.put(&record);
                let id = record.id;
                let quota_bytes = asked.offer.quota_bytes;
                entries.insert(id, Entry { record, holder: Holder::Create, may_exist: false, quota_bytes });
                id
            }
        };
        Ok(Tenure { workspaces: Arc::clone(self), id })
    }

    /// What a tenant has, in the order of its making, after one of them.
    #[must_use]
    pub fn list(&self, tenant: &str, after: Option<WorkspaceId>) -> Vec<WorkspaceView> {
        use std::ops::Bound;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let entries = self.entries();
        let after = entries.range((from, Bound::Unbounded)).map(|(_, entry)| entry);
        after.filter(|entry| *entry.record.tenant == *tenant && entry.is_shown()).map(Entry::view).collect()
    }

    /// How many a tenant has, those included whose files are still to be removed.
    #[must_use]
    pub fn count(&self, tenant: &str) -> usize {
        count(&self.entries(), tenant)
    }

    /// How many there are.
    #[must_use]
    pub fn all(&self) -> usize {
        self.entries().len()
    }

    /// A tenant's workspace of a name.
    #[must_use]
    pub fn find(&self, tenant: &str, name: &str) -> Option<WorkspaceView> {
        let entries = self.entries();
        entries.values().find(|entry| is_of(entry, tenant, name) && entry.is_shown()).map(Entry::view)
    }

    /// Takes a workspace from its tenant, and says which; [`Workspaces::remove`] removes it.
    ///
    /// # Errors
    /// See [`DeleteRefused`].
    pub fn delete(&self, tenant: &str, name: &str) -> Result<WorkspaceId, DeleteRefused> {
        let mut entries = self.entries();
        let found = entries.values_mut().find(|entry| is_of(entry, tenant, name) && entry.is_shown());
        let entry = found.ok_or(DeleteRefused::Absent)?;
        if entry.holder != Holder::Nobody {
            return Err(DeleteRefused::InUse(entry.view().session));
        }
        self.mark_deleted(entry);
        Ok(entry.record.id)
    }

    fn mark_deleted(&self, entry: &mut Entry) {
        entry.record.is_deleted = true;
        self.put(&entry.record);
    }

    /// Marks what is too old, and what was never made.
    fn expire(&self, now: Timestamp) {
        for entry in self.entries().values_mut() {
            if entry.holder != Holder::Nobody || entry.record.is_deleted {
                continue;
            }
            let was_never_made = entry.record.uid.is_none();
            if !was_never_made && expiry(&entry.record) > now {
                continue;
            }
            self.mark_deleted(entry);
            if was_never_made {
                continue;
            }
            let WorkspaceRecord { id, tenant, name, .. } = &entry.record;
            tracing::info!(workspace = %id, %tenant, "a workspace goes for its age");
            if let Some(state) = &self.state {
                let target = format!("/v1/workspaces/{name}");
                let event = AuditEvent::now(EXPIRE, "ok");
                state.put_audit(AuditEvent { tenant: Some(tenant.to_string()), target, ..event });
            }
        }
    }

    fn deleted(&self) -> Vec<WorkspaceId> {
        let entries = self.entries();
        let meant = entries.values().filter(|entry| entry.record.is_deleted && entry.holder == Holder::Nobody);
        meant.map(|entry| entry.record.id).collect()
    }

    fn knows(&self, name: &WorkspaceName) -> bool {
        name.id(&self.instance).is_some_and(|id| self.entries().contains_key(&id))
    }

    fn change(&self, id: WorkspaceId, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.entries().get_mut(&id) {
            change(entry);
        }
    }

    fn begin_making(&self, id: WorkspaceId, image: String) -> Option<WorkspaceSpec> {
        let mut entries = self.entries();
        let entry = entries.get_mut(&id)?;
        entry.may_exist = true;
        let name = WorkspaceName::new(&self.instance, id);
        Some(WorkspaceSpec { name, image, quota_bytes: entry.quota_bytes })
    }

    fn was_made(&self, id: WorkspaceId, made: WorkspaceVolume) {
        self.change(id, |entry| {
            if made.is_new && entry.record.uid.is_some() {
                tracing::error!(workspace = %id, "a workspace was not on the engine any more, and is empty now");
            }
            if made.is_new {
                entry.record.quota_bytes = entry.quota_bytes;
            }
            if made.is_new || entry.record.uid != Some(made.uid) {
                entry.record.uid = Some(made.uid);
                self.put(&entry.record);
            }
        });
    }

    fn give_back(&self, id: WorkspaceId) {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(&id) else { return };
        let was_a_sessions = matches!(entry.holder, Holder::Session(_));
        entry.holder = Holder::Nobody;
        if was_a_sessions {
            // If nothing was made it goes with a round: the next process may go on with that session.
            entry.record.last_used = Timestamp::now();
            self.put(&entry.record);
        } else if !entry.may_exist {
            entries.remove(&id);
            self.forget(id);
        }
    }

    fn put(&self, record: &WorkspaceRecord) {
        if let Some(state) = &self.state {
            state.put_workspace(record.clone());
        }
    }

    fn forget(&self, id: WorkspaceId) {
        if let Some(state) = &self.state {
            state.forget_workspace(id);
        }
    }

    /// Has the engine remove one that was taken from its tenant.
    ///
    /// # Errors
    /// Why it is not removed; a later round tries again.
    pub async fn remove(&self, engine: &dyn Engine, id: WorkspaceId) -> Result<(), EngineError> {
        engine.remove_workspace(&WorkspaceName::new(&self.instance, id)).await?;
        self.entries().remove(&id);
        self.forget(id);
        Ok(())
    }
}

/// What a round has done about workspaces.
#[derive(Debug, Default)]
pub(super) struct Tidied {
    /// Those that no record knew, and that are gone now.
    pub(super) removed: Vec<String>,
    pub(super) errors: Vec<EngineError>,
}

/// One round: what is too old goes, and so does what no record knows.
pub(super) async fn tidy(workspaces: &Workspaces, engine: &dyn Engine) -> Tidied {
    let mut tidied = Tidied::default();
    // Before it is asked who knows them: a record is there before its volume.
    let there = match engine.list_workspaces().await {
        Ok(there) => there,
        Err(error) => {
            tidied.errors.push(error);
            return tidied;
        }
    };
    for name in there.into_iter().filter(|name| !workspaces.knows(name)) {
        if is_away(&tidied.errors) {
            return tidied;
        }
        match engine.remove_workspace(&name).await {
            Ok(()) => tidied.removed.push(name.to_string()),
            Err(error) => tidied.errors.push(error),
        }
    }
    workspaces.expire(Timestamp::now());
    for id in workspaces.deleted() {
        if is_away(&tidied.errors) {
            break;
        }
        tidied.errors.extend(workspaces.remove(engine, id).await.err());
    }
    tidied
}

/// It is not asked for the others. One that takes too long about a single workspace may well answer about the next.
fn is_away(errors: &[EngineError]) -> bool {
    errors.iter().any(|error| matches!(error, EngineError::Unavailable { .. }))
}

fn is_of(entry: &Entry, tenant: &str, name: &str) -> bool {
    let record = &entry.record;
    !record.is_deleted && *record.tenant == *tenant && record.name == name
}

fn count(entries: &BTreeMap<WorkspaceId, Entry>, tenant: &str) -> usize {
    entries.values().filter(|entry| *entry.record.tenant == *tenant).count()
}

fn check_bounds(entries: &BTreeMap<WorkspaceId, Entry>, tenant: &str, bounds: Bounds) -> Result<(), HoldRefused> {
    match bounds.of_tenant {
        Some(most) if count(entries, tenant) >= most as usize => {
            Err(HoldRefused::TooMany(Exceeded { name: "workspaces", limit: most.into() }))
        }
        _ if entries.len() >= bounds.of_all => Err(HoldRefused::Full),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::domain::workspace::WorkspaceOffer;

    const MADE: WorkspaceVolume = WorkspaceVolume { uid: 7, is_new: true };

    struct Bench {
        workspaces: Arc<Workspaces>,
        bounds: Bounds,
        offer: WorkspaceOffer,
    }

    impl Bench {
        fn new() -> Self {
            let bounds = Bounds { of_tenant: Some(2), of_all: 3 };
            let offer = WorkspaceOffer { max_age: Duration::from_secs(100), quota_bytes: None };
            Self { workspaces: Workspaces::new("one", None), bounds, offer }
        }

        fn hold(&self, tenant: &str, name: &str, template: &str) -> Result<Tenure, HoldRefused> {
            let asked = WorkspaceUse { name: name.to_owned(), offer: self.offer };
            self.workspaces.hold(&Arc::from(tenant), (&asked, template), self.bounds)
        }

        fn make(&self, tenure: &Tenure) {
            assert!(self.workspaces.begin_making(tenure.id, "image".to_owned()).is_some());
            self.workspaces.was_made(tenure.id, MADE);
        }
    }

    #[test]
    fn one_session_has_it_and_a_name_is_its_tenants_own() {
        let bench = Bench::new();
        let first = bench.hold("a", "w", "t").unwrap();
        bench.make(&first);
        assert_eq!(bench.hold("a", "w", "t").unwrap_err(), HoldRefused::InUse { session: None });
        let session = fresh();
        first.belongs_to(session);
        assert_eq!(bench.hold("a", "w", "t").unwrap_err(), HoldRefused::InUse { session: Some(session) });
        assert_eq!(bench.workspaces.delete("a", "w"), Err(DeleteRefused::InUse(Some(session))));
        let other = bench.hold("b", "w", "t").unwrap();
        assert_ne!(other.id(), first.id());
        assert_eq!(bench.workspaces.delete("c", "w"), Err(DeleteRefused::Absent));
        let id = first.id();
        drop(first);
        assert_eq!(bench.hold("a", "w", "u").unwrap_err(), HoldRefused::OfTemplate("t".to_owned()));
        assert_eq!(bench.hold("a", "w", "t").unwrap().id(), id, "the same one");
    }

    #[test]
    fn a_name_is_free_once_it_is_deleted_and_counts_until_its_files_are_gone() {
        let bench = Bench::new();
        let first = bench.hold("a", "w", "t").unwrap();
        bench.make(&first);
        let id = first.id();
        drop(first);
        bench.workspaces.delete("a", "w").unwrap();
        assert_eq!(bench.workspaces.find("a", "w"), None);
        assert_eq!(bench.workspaces.deleted(), [id]);
        let second = bench.hold("a", "w", "t").unwrap();
        assert_ne!(second.id(), id);
        let refused = bench.hold("a", "v", "t").unwrap_err();
        assert_eq!(refused, HoldRefused::TooMany(Exceeded { name: "workspaces", limit: 2 }));
        let _other = bench.hold("b", "w", "t").unwrap();
        assert_eq!(bench.hold("c", "w", "t").unwrap_err(), HoldRefused::Full);
    }

    #[test]
    fn it_goes_for_its_age_and_never_while_a_session_has_it() {
        let bench = Bench::new();
        let tenure = bench.hold("a", "w", "t").unwrap();
        bench.make(&tenure);
        let later = |seconds| Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
        bench.workspaces.expire(later(1000));
        assert!(bench.workspaces.deleted().is_empty());
        drop(tenure);
        bench.workspaces.expire(later(50));
        assert!(bench.workspaces.deleted().is_empty());
        bench.workspaces.expire(later(200));
        assert_eq!(bench.workspaces.deleted().len(), 1);
    }

    #[test]
    fn its_age_begins_when_a_session_gives_it_back_and_not_with_a_create_that_is_refused() {
        let bench = Bench::new();
        let ages_ago = Timestamp::now() - jiff::SignedDuration::from_secs(1000);
        let tenure = bench.hold("a", "w", "t").unwrap();
        tenure.belongs_to(fresh());
        bench.make(&tenure);
        bench.workspaces.change(tenure.id, |entry| entry.record.last_used = ages_ago);
        drop(tenure);
        bench.workspaces.expire(Timestamp::now());
        assert_eq!(bench.workspaces.deleted(), [], "a session had it until now");

        let last_used = || bench.workspaces.find("a", "w").unwrap().record.last_used;
        let id = bench.workspaces.find("a", "w").unwrap().record.id;
        bench.workspaces.change(id, |entry| entry.record.last_used = ages_ago);
        drop(bench.hold("a", "w", "t").unwrap());
        assert_eq!(last_used(), ages_ago, "no session got it");
        let tenure = bench.hold("a", "w", "t").unwrap();
        tenure.belongs_to(fresh());
        assert_ne!(last_used(), ages_ago);
    }

    #[test]
    fn it_is_what_its_template_says_now_and_has_the_quota_that_it_was_made_with() {
        let mut bench = Bench::new();
        let quota = |bench: &Bench| bench.workspaces.find("a", "w").unwrap().record.quota_bytes;
        bench.offer.quota_bytes = Some(1);
        let tenure = bench.hold("a", "w", "t").unwrap();
        bench.make(&tenure);
        drop(tenure);
        bench.offer = WorkspaceOffer { max_age: Duration::from_secs(5000), quota_bytes: Some(2) };
        let tenure = bench.hold("a", "w", "t").unwrap();
        assert!(bench.workspaces.begin_making(tenure.id, String::new()).is_some());
        bench.workspaces.was_made(tenure.id, WorkspaceVolume { is_new: false, ..MADE });
        assert_eq!(quota(&bench), Some(1), "it is there already");
        drop(tenure);
        bench.workspaces.expire(Timestamp::now() + jiff::SignedDuration::from_secs(1000));
        assert_eq!(bench.workspaces.deleted(), [], "it may be older now");
        let tenure = bench.hold("a", "w", "t").unwrap();
        bench.make(&tenure);
        assert_eq!(quota(&bench), Some(2), "it was made again");
    }

    #[test]
    fn a_page_begins_after_the_last_one_of_the_page_before() {
        let bench = Bench::new();
        let _held = ["v", "w"].map(|name| bench.hold("a", name, "t").unwrap());
        let names = |after| {
            let listed = bench.workspaces.list("a", after);
            listed.into_iter().map(|found| (found.record.name, found.record.id)).collect::<Vec<_>>()
        };
        let all = names(None);
        assert_eq!(all.len(), 2);
        assert_eq!(names(Some(all[0].1)), all[1..]);
        assert_eq!(names(Some(all[1].1)), []);
    }

    #[test]
    fn nothing_stays_of_what_was_never_made() {
        let bench = Bench::new();
        drop(bench.hold("a", "w", "t").unwrap());
        assert_eq!(bench.workspaces.all(), 0, "the engine was not asked for it");
        let tenure = bench.hold("a", "w", "t").unwrap();
        assert!(bench.workspaces.begin_making(tenure.id, String::new()).is_some());
        drop(tenure);
        assert_eq!(bench.workspaces.find("a", "w"), None, "it is nobody's to see");
        bench.workspaces.expire(Timestamp::now());
        assert_eq!(bench.workspaces.deleted().len(), 1, "a part of it may be there");
    }
}
