//! The audit: who has asked for what, and what came of it, with refusals told one by one for as long as they are few. Where events come from is the business of the trail of
//! each request, where they are kept that of the store.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::keys::Principal;
use super::refusals::Refusals;
use super::{Error, Service};
pub use crate::store::state::{AuditEvent, AuditFound, AuditQuery};
use crate::store::state::{State, StateError};

/// The action of an event that stands for those that were left out.
const LEAVE_OUT: &str = "leave_out_refused";

/// What is over is forgotten so often.
const FORGET: Duration = Duration::from_secs(60);

/// What is kept, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditBounds {
    /// Whether code stands in its events.
    pub record_code: bool,
    /// Events go after this long.
    pub retention: Duration,
    /// The oldest beyond so many go earlier.
    pub events: u64,
}

/// Where events go.
#[derive(Debug)]
pub struct Audit {
    state: State,
    bounds: AuditBounds,
    refusals: Mutex<Refusals>,
}

impl Audit {
    /// One that is kept in this database.
    #[must_use]
    pub fn new(state: State, bounds: AuditBounds) -> Self {
        Self { state, bounds, refusals: Mutex::new(Refusals::new(Instant::now())) }
    }

    /// Whether code is to stand in its events.
    #[must_use]
    pub fn records_code(&self) -> bool {
        self.bounds.record_code
    }

    /// Forgets now and then what has been kept for long enough, until it is told to stop.
    pub async fn stay_within_bounds(&self, stop: CancellationToken) {
        let mut timer = tokio::time::interval(FORGET);
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = timer.tick() => {
                    let before = Timestamp::now().saturating_sub(self.bounds.retention).unwrap_or(Timestamp::MIN);
                    self.state.forget_audit(before, self.bounds.events);
                    let left_out = self.refusals().over(Instant::now());
                    self.tell_left_out(left_out);
                }
            }
        }
    }

    /// Adds an event of what was carried out, or may have been.
    pub(super) fn put(&self, event: AuditEvent) {
        if !self.state.put_audit(event) {
            tracing::error!("an audit event is lost: the database can't be written, and too many wait for it");
        }
    }

    /// Adds an event of a request that has changed nothing, or counts it, where its tenant has had many of them: whoever is refused again and again is not to wash away what
    /// others have done.
    pub(super) fn put_refused(&self, event: AuditEvent) {
        let now = Instant::now();
        let (left_out, may_be_told) = {
            let mut refusals = self.refusals();
            (refusals.over(now), refusals.count(event.tenant.as_deref()))
        };
        self.tell_left_out(left_out);
        if may_be_told {
            self.put(event);
        }
    }

    fn tell_left_out(&self, left_out: Vec<(Option<String>, u64)>) {
        for (tenant, count) in left_out {
            tracing::warn!(tenant, count, "more requests were refused than the audit tells of one by one");
            self.put(AuditEvent { tenant, count: Some(count), ..AuditEvent::now(LEAVE_OUT, "refused") });
        }
    }

    fn refusals(&self) -> MutexGuard<'_, Refusals> {
        // Every change is whole between its statements that can panic, of which there are none.
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn events(&self, query: AuditQuery) -> Result<AuditFound, StateError> {
        self.state.audit(query).await
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        let left_out = self.refusals().take();
        self.tell_left_out(left_out);
    }
}

impl Service {
    /// Events of the audit, whoever's they are.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn list_audit(&self, who: &Principal, query: AuditQuery) -> Result<AuditFound, Error> {
        who.require_admin()?;
        let audit = self.audit.as_ref().ok_or_else(|| Error::StateConflict("this server keeps no audit".to_owned()))?;
        audit.events(query).await.map_err(|error| {
            tracing::error!(%error, "the audit can't be read");
            Error::Unkept
        })
    }
}
