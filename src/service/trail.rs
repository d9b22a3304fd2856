//! What is known of a request while it is worked on: where it came from, who asks, and what it was about. It is for the log's line and for the audit; nothing is
//! decided by it.
//!
//! A request's future runs within its trail, so that whatever is learnt on the way can be noted without being handed through; work that goes on when the caller has left
//! takes the trail along. Each trail becomes one audit event at most: when the request is answered, or when nobody works on it any more.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};

use super::audit::Audit;
use super::keys::Principal;
use crate::domain::ids::{ContextId, ExecutionId, KeyId, SessionId};
use crate::session::execution::Execution;
use crate::store::state::AuditEvent;
use crate::traces::Trace;

tokio::task_local! {
    static TRAIL: Arc<Trail>;
}

/// So many bytes of code are recorded, where it is; its length and its hash are of all of it.
const MAX_CODE: usize = 64 * 1024;
/// The action of a request whose key is not valid, whatever it asked for.
pub const REFUSE_KEY: &str = "refuse_key";

/// Longest path that is told, in characters.
const MAX_TARGET: usize = 512;

/// Where a request came from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    /// The address of its sender.
    pub address: Option<IpAddr>,
    /// Its id.
    pub request: String,
    /// Its path.
    pub path: String,
    /// The operation that it asks for, if that is worth an event.
    pub action: Option<Arc<str>>,
}

/// What was learnt of a request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    /// Whose key it has.
    pub tenant: Option<Arc<str>>,
    /// Which key that is.
    pub key: Option<KeyId>,
    /// The session that it is about.
    pub session: Option<SessionId>,
    others: Vec<SessionId>,
    /// The context.
    pub context: Option<ContextId>,
    /// The execution.
    pub execution: Option<ExecutionId>,
    code: Option<Code>,
    has_changed: bool,
    /// What it has turned out to ask for, where its path does not say.
    action: Option<&'static str>,
    /// Why it was refused, where its status does not say, and whether that is its caller's doing.
    refused: Option<(&'static str, bool)>,
    /// Its body is still on its way, so nothing was begun.
    is_arriving: bool,
}

/// Code that was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Code {
    bytes: usize,
    sha256: String,
    text: Option<String>,
}

/// How a request was answered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answered {
    /// The HTTP status.
    pub status: u16,
    /// The code of the problem, if it was one.
    pub problem: Option<&'static str>,
    /// It had a key, which is not valid.
    pub is_key_refused: bool,
    /// The path of what it has made.
    pub made: Option<String>,
}

/// What is known of a request.
#[derive(Debug)]
pub struct Trail {
    origin: Origin,
    audit: Option<Arc<Audit>>,
    trace: Option<Trace>,
    told: Mutex<Told>,
    is_over: std::sync::atomic::AtomicBool,
}

impl Trail {
    /// A request comes in.
    #[must_use]
    pub fn new(origin: Origin, audit: Option<Arc<Audit>>, trace: Option<Trace>) -> Arc<Self> {
        Arc::new(Self { origin, audit, trace, told: Mutex::default(), is_over: false.into() })
    }

    /// Of a part of the same request, which is an event of its own.
    fn part(&self, action: &str) -> Arc<Self> {
        let (origin, told) = (Origin { action: Some(action.into()), ..self.origin.clone() }, self.lock());
        let told = Told { tenant: told.tenant.clone(), key: told.key, ..Told::default() };
        let (audit, trace) = (self.audit.clone(), self.trace.clone());
        Arc::new(Self { origin, audit, trace, told: Mutex::new(told), is_over: false.into() })
    }

    /// Works on the request.
    pub async fn follow<T>(self: &Arc<Self>, work: impl Future<Output = T>) -> T {
        TRAIL.scope(Arc::clone(self), work).await
    }

    /// Where it came from.
    #[must_use]
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Its place in a trace, if traces are told.
    #[must_use]
    pub fn trace(&self) -> Option<&Trace> {
        self.trace.as_ref()
    }

    /// What is known by now.
    #[must_use]
    pub fn told(&self) -> Told {
        self.lock().clone()
    }

    /// The request is answered, or is about to be: nothing more is learnt of it.
    pub fn end(&self, answered: Answered) {
        self.end_with(Some(answered));
    }

    fn end_with(&self, answered: Option<Answered>) {
        if self.is_over.swap(true, std::sync::atomic::Ordering::Relaxed) {
            return;
        }
        let Some(audit) = &self.audit else { return };
        let told = self.lock().clone();
        let is_key_refused = answered.as_ref().is_some_and(|answered| answered.is_key_refused);
        let action = told.action.map(Arc::from).or_else(|| self.origin.action.clone());
        let action = match (&action, &told.tenant) {
            _ if is_key_refused => REFUSE_KEY.to_owned(),
            (Some(action), Some(_)) => action.to_string(),
            // Nobody who is known has asked for anything that counts.
            _ => return,
        };
        let said = told.refused.map(|(code, _)| code);
        let outcome = answered.as_ref().map_or("unanswered", |answered| answered.problem.or(said).unwrap_or("ok"));
        let status = answered.as_ref().map(|answered| answered.status);
        let target = answered.and_then(|answered| answered.made).unwrap_or_else(|| self.origin.path.clone());
        let (code_bytes, code_sha256, code) = match told.code {
            Some(Code { bytes, sha256, text }) => (Some(bytes), Some(sha256), text),
            None => (None, None, None),
        };
        // Whoever leaves before a request is whole has asked for nothing.
        let is_refused = status.map_or(told.is_arriving, |status| (400..500).contains(&status));
        let is_refused = (is_refused || told.refused.is_some_and(|(_, by_caller)| by_caller)) && !told.has_changed;
        let event = AuditEvent {
            tenant: told.tenant.map(|tenant| tenant.to_string()),
            key: told.key.map(|id| id.to_string()),
            address: self.origin.address,
            request: self.origin.request.clone(),
            target: target.chars().take(MAX_TARGET).collect(),
            session: told.session.map(|id| id.to_string()),
            context: told.context.map(|id| id.to_string()),
            execution: told.execution.map(|id| id.to_string()),
            code_bytes,
            code_sha256,
            code,
            status,
            ..AuditEvent::now(&action, outcome)
        };
        for other in told.others {
            audit.put(AuditEvent { session: Some(other.to_string()), ..event.clone() });
        }
        if is_refused { audit.put_refused(event) } else { audit.put(event) }
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        // Every change is a single assignment, so a panic leaves nothing half done.
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Trail {
    fn drop(&mut self) {
        self.end_with(None);
    }
}

/// The trail of the request that is worked on here, if there is one.
#[must_use]
pub fn current() -> Option<Arc<Trail>> {
    TRAIL.try_with(Arc::clone).ok()
}

/// Works within a trail, where there is one.
pub async fn follow<T>(trail: Option<Arc<Trail>>, work: impl Future<Output = T>) -> T {
    match trail {
        Some(trail) => trail.follow(work).await,
        None => work.await,
    }
}

/// Does something that is an event of its own, where a request does more than one: with the word of its failure, and the status that this has, if it fails.
///
/// # Errors
/// Those of the work.
pub async fn apart<T, E>(
    action: &'static str,
    work: impl Future<Output = Result<T, E>>,
    failure: impl FnOnce(&E) -> (&'static str, u16),
) -> Result<T, E> {
    let Some(part) = current().map(|trail| trail.part(action)) else { return work.await };
    let done = part.follow(work).await;
    if part.lock().has_changed {
        note_change();
    }
    let (problem, status) = done.as_ref().err().map(failure).map_or((None, 200), |(word, status)| (Some(word), status));
    part.end(Answered { status, problem, is_key_refused: false, made: None });
    done
}

/// Notes who asks.
pub fn note_caller(who: &Principal) {
    note(|told| (told.tenant, told.key) = (Some(Arc::clone(&who.tenant)), who.key));
}

/// Reads what is still to come of a request.
pub async fn arriving<T>(read: impl Future<Output = T>) -> T {
    note(|told| told.is_arriving = true);
    let arrived = read.await;
    note(|told| told.is_arriving = false);
    arrived
}

/// Notes what a request asks for that comes by a door where paths don't say: it is worth an event then.
pub fn note_action(action: &'static str) {
    note(|told| told.action = Some(action));
}

/// Notes that a request was refused whose status does not say so: with which code, and the status that this has elsewhere.
pub fn note_refusal(code: &'static str, status: u16) {
    note(|told| told.refused = Some((code, (400..500).contains(&status))));
}

/// Notes that a request has changed something, so that its event is told however it is answered.
pub(super) fn note_change() {
    note(|told| told.has_changed = true);
}

/// Notes which session a request is about.
pub(super) fn note_session(id: SessionId) {
    note(|told| told.session = Some(id));
}

/// Notes which sessions a request has ended. Each is an event of its own.
pub(super) fn note_sessions(ids: impl IntoIterator<Item = SessionId>) {
    let mut ids = ids.into_iter();
    let (first, others) = (ids.next(), ids.collect());
    note(|told| (told.session, told.others) = (first, others));
}

/// Notes which context a request is about.
pub(super) fn note_context(id: ContextId) {
    note(|told| told.context = Some(id));
}

/// Notes which execution a request is about.
pub(super) fn note_execution(id: ExecutionId) {
    note(|told| told.execution = Some(id));
}

/// Has an execution of a template's session told in the trace of the request that has begun it.
pub(super) fn trace(execution: &Execution, template: &str) {
    if let Some(trace) = current().and_then(|trail| trail.trace.clone()) {
        execution.trace_in(trace, template);
    }
}

/// Notes what code a request has sent: how much and its hash, and the code itself only where the audit is to have it.
pub(super) fn note_code(code: &str) {
    let Some(trail) = current() else { return };
    let Some(audit) = &trail.audit else { return };
    let sha256 = Sha256::digest(code.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    let text = audit.records_code().then(|| code[..code.floor_char_boundary(MAX_CODE)].to_owned());
    trail.lock().code = Some(Code { bytes: code.len(), sha256, text });
}

fn note(change: impl FnOnce(&mut Told)) {
    // Without a request there is nobody to tell.
    let _ = TRAIL.try_with(|trail| change(&mut trail.lock()));
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt;

    use super::super::audit::{AuditBounds, AuditQuery};
    use super::super::keys::Scope;
    use super::super::refusals::TOLD;
    use super::*;
    use crate::store::state::State;

    const OK: Answered = Answered { status: 200, problem: None, is_key_refused: false, made: None };
    const REFUSED: Answered =
        Answered { status: 401, problem: Some("unauthenticated"), is_key_refused: true, made: None };

    struct Bench {
        state: State,
        audit: Arc<Audit>,
        _folder: tempfile::TempDir,
    }

    impl Bench {
        fn new(record_code: bool) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let state = State::open(folder.path(), None).unwrap().0;
            let bounds = AuditBounds { record_code, retention: Duration::from_secs(60), events: 1000 };
            Self { audit: Arc::new(Audit::new(state.clone(), bounds)), state, _folder: folder }
        }

        fn trail(&self, action: Option<&str>) -> Arc<Trail> {
            let (request, path) = ("req1".to_owned(), "/v1/sessions".to_owned());
            let origin = Origin { address: None, request, path, action: action.map(Arc::from) };
            Trail::new(origin, Some(Arc::clone(&self.audit)), None)
        }

        async fn events(&self) -> Vec<AuditEvent> {
            let query = AuditQuery { limit: 1000, ..AuditQuery::default() };
            self.state.audit(query).await.unwrap().events.into_iter().map(|(_, event)| event).collect()
        }
    }

    fn known() {
        note_caller(&Principal::new("one", [Scope::Sessions]));
    }

    #[tokio::test]
    async fn code_is_known_by_its_hash_unless_it_is_to_be_recorded() {
        for (record_code, text) in [(false, None), (true, Some("print('é')"))] {
            let bench = Bench::new(record_code);
            let trail = bench.trail(Some("create_execution"));
            let work = async {
                known();
                note_session(uuid::Uuid::from_u128(1).into());
                note_code("print('é')");
            };
            trail.follow(work).await;
            trail.end(OK);
            let event = bench.events().await.remove(0);
            let sha256 = "c2a522a8ce9d5f0fde261bd77faf83ab9c840393aec825246011fdd7afaee699";
            assert_eq!(event.code_sha256.as_deref(), Some(sha256));
            assert_eq!((event.code_bytes, event.code.as_deref()), (Some(11), text));
            assert_eq!((event.tenant.as_deref(), event.outcome.as_str(), event.status), (Some("one"), "ok", Some(200)));
            assert_eq!(event.session, Some(SessionId::from(uuid::Uuid::from_u128(1)).to_string()));
        }
    }

    #[tokio::test]
    async fn a_request_is_one_event_whether_or_not_its_caller_stays() {
        let bench = Bench::new(false);
        let trail = bench.trail(Some("create_session"));
        trail.follow(async { known() }).await;
        trail.end(OK);
        trail.end(REFUSED);
        drop(trail);
        assert_eq!(bench.events().await.len(), 1);

        let trail = bench.trail(Some("create_session"));
        let work = trail.follow(async {
            known();
            current()
        });
        let carried_on = work.await;
        drop(trail);
        assert_eq!(bench.events().await.len(), 1, "somebody still works on it");
        follow(carried_on, async { note_session(uuid::Uuid::from_u128(2).into()) }).await;
        let event = bench.events().await.remove(1);
        assert_eq!((event.outcome.as_str(), event.status), ("unanswered", None));
        assert!(event.session.is_some(), "what was made after the caller left is told");
    }

    #[tokio::test]
    async fn each_of_many_sessions_is_an_event_and_what_was_made_is_the_target() {
        let bench = Bench::new(false);
        let trail = bench.trail(Some("delete_sessions"));
        let ids = [1, 2, 3].map(|n| SessionId::from(uuid::Uuid::from_u128(n)));
        let work = async {
            known();
            note_sessions(ids);
        };
        trail.follow(work).await;
        trail.end(Answered { made: Some("/v1/x".repeat(MAX_TARGET)), ..OK });
        let events = bench.events().await;
        let mut told: Vec<_> = events.iter().filter_map(|event| event.session.clone()).collect();
        told.sort();
        assert_eq!(told, ids.map(|id| id.to_string()));
        assert!(events.iter().all(|event| event.target.len() == MAX_TARGET && event.target.starts_with("/v1/x")));
    }

    #[tokio::test]
    async fn a_request_that_does_two_things_is_an_event_for_each() {
        let bench = Bench::new(false);
        let trail = bench.trail(Some("patch_session"));
        let part = async |action, n, outcome: Result<(), ()>| {
            let work = async {
                note_session(uuid::Uuid::from_u128(n).into());
                outcome
            };
            apart(action, work, |()| ("not-found", 404)).await.is_ok()
        };
        let work = async {
            known();
            assert!(part("create_session", 1, Ok(())).await && !part("delete_session", 2, Err(())).await);
        };
        trail.follow(work).await;
        trail.end(OK);
        let told: Vec<_> = bench.events().await.into_iter().map(|e| (e.action, e.outcome, e.session)).collect();
        let id = |n| Some(SessionId::from(uuid::Uuid::from_u128(n)).to_string());
        let event = |action: &str, outcome: &str, session| (action.to_owned(), outcome.to_owned(), session);
        let expected = [
            event("create_session", "ok", id(1)),
            event("delete_session", "not-found", id(2)),
            event("patch_session", "ok", None),
        ];
        assert_eq!(told, expected);
    }

    #[tokio::test]
    async fn what_changes_nothing_or_comes_from_nobody_is_no_event() {
        let bench = Bench::new(false);
        let looks = bench.trail(None);
        looks.follow(async { known() }).await;
        looks.end(OK);
        bench.trail(Some("create_session")).end(Answered { problem: Some("unauthenticated"), status: 401, ..OK });
        assert_eq!(bench.events().await, []);
    }

    #[tokio::test]
    async fn refused_keys_do_not_wash_away_other_events() {
        let bench = Bench::new(false);
        for _ in 0..300 {
            bench.trail(None).end(REFUSED);
        }
        let events = bench.events().await;
        assert_eq!(events.len() as u64, TOLD);
        assert!(events.iter().all(|event| event.action == REFUSE_KEY && event.tenant.is_none()));
    }

    #[tokio::test]
    async fn a_tenant_that_is_refused_again_and_again_hides_nothing_that_is_carried_out() {
        let bench = Bench::new(false);
        let ask = async |tenant: &str, answered: Answered, changes: bool| {
            let trail = bench.trail(Some("create_session"));
            let work = async {
                note_caller(&Principal::new(tenant, [Scope::Sessions]));
                if changes {
                    note_change();
                }
            };
            trail.follow(work).await;
            trail.end(answered);
        };
        let refused = || Answered { status: 404, problem: Some("not-found"), is_key_refused: false, made: None };
        for _ in 0..TOLD + 20 {
            ask("one", refused(), false).await;
        }
        ask("one", OK, false).await;
        ask("one", refused(), true).await;
        // What a part of it has changed, it has.
        let whole = bench.trail(Some("patch_session"));
        let work = async {
            note_caller(&Principal::new("one", [Scope::Sessions]));
            let part = async {
                note_change();
                Err::<(), ()>(())
            };
            apart("delete_session", part, |()| ("busy", 409)).await
        };
        assert!(whole.follow(work).await.is_err());
        whole.end(refused());
        drop(whole);
        ask("one", Answered { status: 503, problem: Some("draining"), ..OK }, false).await;
        ask("two", refused(), false).await;
        // One that has never arrived whole, and one whose caller has left later.
        let (cut, left) = (bench.trail(Some("create_session")), bench.trail(Some("create_session")));
        let cut_off = cut.follow(async {
            known();
            arriving(std::future::pending::<()>()).await;
        });
        assert!(cut_off.now_or_never().is_none());
        left.follow(async {
            known();
            arriving(std::future::ready(())).await;
        })
        .await;
        drop((cut, left));
        let told = bench.events().await;
        let outcomes: Vec<_> = told.iter().skip(TOLD as usize).map(|event| event.outcome.as_str()).collect();
        assert_eq!(outcomes, ["ok", "not-found", "busy", "not-found", "draining", "not-found", "unanswered"]);
        // A server that stops tells what it has left out.
        let Bench { state, audit, _folder } = bench;
        drop(audit);
        let last =
            state.audit(AuditQuery { limit: 1000, ..AuditQuery::default() }).await.unwrap().events.pop().unwrap().1;
        let (tenant, count) = (last.tenant.as_deref(), last.count);
        assert_eq!((last.action.as_str(), tenant, count), ("leave_out_refused", Some("one"), Some(21)));
    }
}
