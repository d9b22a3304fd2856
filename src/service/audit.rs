//! The audit: who has asked for what, and what came of it. Where events come from is the business of the trail of each request, where they are kept that of the store.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::keys::Principal;
use super::trail::REFUSE_KEY;
use super::{Error, Service};
pub use crate::store::state::{AuditEvent, AuditQuery};
use crate::store::state::{State, StateError};

/// Most events of keys that are not valid …
const REFUSED: u32 = 100;
/// … within this time: whoever guesses keys is not to wash away what others have done.
const REFUSED_WITHIN: Duration = Duration::from_secs(60);

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
    refused: Mutex<(Instant, u32)>,
}

impl Audit {
    /// One that is kept in this database.
    #[must_use]
    pub fn new(state: State, bounds: AuditBounds) -> Self {
        Self { state, bounds, refused: Mutex::new((Instant::now(), 0)) }
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
                }
            }
        }
    }

    /// Adds an event.
    pub(super) fn put(&self, event: AuditEvent) {
        if event.action == REFUSE_KEY && !self.may_tell_refusal(Instant::now()) {
            return;
        }
        if !self.state.put_audit(event) {
            tracing::error!("an audit event is lost: the database can't be written, and too many wait for it");
        }
    }

    fn may_tell_refusal(&self, now: Instant) -> bool {
        // Every change is whole between its statements that can panic, of which there are none.
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if now.duration_since(refused.0) >= REFUSED_WITHIN {
            *refused = (now, 0);
        }
        refused.1 = refused.1.saturating_add(1);
        refused.1 <= REFUSED
    }

    async fn events(&self, query: AuditQuery) -> Result<Vec<(i64, AuditEvent)>, StateError> {
        self.state.audit(query).await
    }
}

impl Service {
    /// Events of the audit in their order, each with its number, whoever's they are.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn list_audit(&self, who: &Principal, query: AuditQuery) -> Result<Vec<(i64, AuditEvent)>, Error> {
        who.require_admin()?;
        let audit = self.audit.as_ref().ok_or_else(|| Error::StateConflict("this server keeps no audit".to_owned()))?;
        audit.events(query).await.map_err(|error| {
            tracing::error!(%error, "the audit can't be read");
            Error::Unkept
        })
    }
}
