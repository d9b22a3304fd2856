//! Requests that may come twice: a caller gives one a key, and one with the same key gets what the first has made instead of another.
//!
//! What will be made is known by its id before it is made, and committed before it, so that a process which ends in between leaves no second way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;

pub use crate::store::state::Made;
use crate::store::state::{KeyRecord, State};

/// A key counts for this long.
pub const RETENTION: Duration = Duration::from_secs(24 * 3600);
/// Most keys of one tenant.
pub const MAX_KEYS: usize = 20_000;

/// A caller's key for a request, and what the request is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Once {
    /// As the caller gives it.
    pub key: String,
    /// The same for the same request, and different for others.
    pub fingerprint: String,
}

/// Why a request is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotOnce {
    /// The first one is still being answered.
    InFlight,
    /// The first one was another.
    Mismatch,
    /// The tenant has as many keys as it may, and one is free again after this long.
    TooMany(Duration),
}

/// What comes of a request with a key.
#[derive(Debug)]
pub enum Begun {
    /// It is the first.
    First(Reservation),
    /// This is what the first has made.
    Again(Made),
}

/// All keys. Clones are the same.
#[derive(Debug, Clone)]
pub struct Requests {
    state: Option<State>,
    known: Arc<Mutex<Known>>,
}

/// The keys of each tenant.
type Known = HashMap<Arc<str>, HashMap<String, Entry>>;

#[derive(Debug)]
struct Entry {
    fingerprint: String,
    made: Option<Made>,
    at: Timestamp,
    in_flight: bool,
}

/// A key whose request is being answered. Dropped before it was said what will be made, it is free again.
#[derive(Debug)]
pub struct Reservation {
    requests: Requests,
    tenant: Arc<str>,
    key: String,
    is_settled: bool,
}

impl Requests {
    /// With those that an earlier process has kept.
    #[must_use]
    pub fn new(state: Option<State>) -> Self {
        Self { state, known: Arc::default() }
    }

    /// Takes over what an earlier process has kept. What it had not answered counts only if it `is_there`.
    pub(super) fn take_over(&self, kept: Vec<KeyRecord>, is_there: impl Fn(&KeyRecord) -> bool) {
        for record in kept {
            if !record.is_answered && !is_there(&record) {
                self.forget(&record.tenant, &record.key);
                continue;
            }
            if let (Some(state), false) = (&self.state, record.is_answered) {
                // What becomes of it later does not free the key.
                state.put_key(KeyRecord { is_answered: true, ..record.clone() });
            }
            let KeyRecord { tenant, key, fingerprint, made, at, .. } = record;
            let entry = Entry { fingerprint, made: Some(made), at, in_flight: false };
            self.known().entry(tenant).or_default().insert(key, entry);
        }
    }

    /// Begins a request.
    ///
    /// # Errors
    /// See [`NotOnce`].
    pub fn begin(&self, tenant: &Arc<str>, once: Once) -> Result<Begun, NotOnce> {
        let mut known = self.known();
        let of_tenant = known.entry(Arc::clone(tenant)).or_default();
        if let Some(entry) = of_tenant.get(&once.key) {
            return match &entry.made {
                _ if entry.fingerprint != once.fingerprint => Err(NotOnce::Mismatch),
                Some(made) if !entry.in_flight => Ok(Begun::Again(*made)),
                _ => Err(NotOnce::InFlight),
            };
        }
        if of_tenant.len() >= MAX_KEYS {
            let oldest = of_tenant.values().map(|entry| entry.at).min().unwrap_or_else(Timestamp::now);
            let age = Duration::try_from(Timestamp::now().duration_since(oldest)).unwrap_or_default();
            return Err(NotOnce::TooMany(RETENTION.saturating_sub(age)));
        }
        let Once { key, fingerprint } = once;
        let entry = Entry { fingerprint, made: None, at: Timestamp::now(), in_flight: true };
        of_tenant.insert(key.clone(), entry);
        Ok(Begun::First(Reservation { requests: self.clone(), tenant: Arc::clone(tenant), key, is_settled: false }))
    }

    /// Forgets what is too old.
    pub(super) fn prune(&self, now: Timestamp) {
        let oldest = now.saturating_sub(RETENTION).unwrap_or(Timestamp::MIN);
        self.known().retain(|_, of_tenant| {
            of_tenant.retain(|_, entry| entry.in_flight || entry.at >= oldest);
            !of_tenant.is_empty()
        });
        if let Some(state) = &self.state {
            state.forget_keys(oldest);
        }
    }

    fn forget(&self, tenant: &Arc<str>, key: &str) {
        if let Some(state) = &self.state {
            state.forget_key(Arc::clone(tenant), key.to_owned());
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Every change is a single call on a map, so a panic leaves nothing half done.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reservation {
    /// Says what will be made, before it is.
    pub fn will_be(&self, made: Made) {
        self.put(Some(made), false);
    }

    /// It was not made, or is gone again: the key is free.
    pub fn release(mut self) {
        let mut known = self.requests.known();
        if let Some(of_tenant) = known.get_mut(&self.tenant) {
            of_tenant.remove(&self.key);
        }
        // Still locked: whoever takes the key next has it put after this.
        self.requests.forget(&self.tenant, &self.key);
        drop(known);
        self.is_settled = true;
    }

    /// It is made, and its caller is about to be told.
    pub fn keep(mut self) {
        self.put(None, true);
        self.is_settled = true;
    }

    fn put(&self, made: Option<Made>, is_answered: bool) {
        let mut known = self.requests.known();
        let Some(entry) = known.get_mut(&self.tenant).and_then(|of_tenant| of_tenant.get_mut(&self.key)) else {
            return;
        };
        entry.made = made.or(entry.made);
        entry.in_flight = !is_answered;
        if let (Some(state), Some(made)) = (&self.requests.state, entry.made) {
            let (tenant, key, fingerprint) = (Arc::clone(&self.tenant), self.key.clone(), entry.fingerprint.clone());
            state.put_key(KeyRecord { tenant, key, fingerprint, made, at: entry.at, is_answered });
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.is_settled {
            return;
        }
        let mut known = self.requests.known();
        let Some(of_tenant) = known.get_mut(&self.tenant) else { return };
        match of_tenant.get_mut(&self.key) {
            // What was begun may live on, with this process or the next one.
            Some(entry) if entry.made.is_some() => entry.in_flight = false,
            Some(_) => drop(of_tenant.remove(&self.key)),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn once(key: &str, fingerprint: &str) -> Once {
        Once { key: key.to_owned(), fingerprint: fingerprint.to_owned() }
    }

    fn made(n: u128) -> Made {
        Made::Session(uuid::Uuid::from_u128(n).into())
    }

    #[test]
    fn the_second_gets_what_the_first_made_once_that_is_answered() {
        let (requests, tenant) = (Requests::new(None), Arc::from("one"));
        let Ok(Begun::First(first)) = requests.begin(&tenant, once("k", "a")) else { panic!("it is the first") };
        assert_eq!(requests.begin(&tenant, once("k", "a")).unwrap_err(), NotOnce::InFlight);
        first.will_be(made(1));
        assert_eq!(requests.begin(&tenant, once("k", "a")).unwrap_err(), NotOnce::InFlight);
        assert_eq!(requests.begin(&tenant, once("k", "b")).unwrap_err(), NotOnce::Mismatch);
        first.keep();
        let Ok(Begun::Again(again)) = requests.begin(&tenant, once("k", "a")) else { panic!("it was made") };
        assert_eq!(again, made(1));
        assert_eq!(requests.begin(&tenant, once("k", "b")).unwrap_err(), NotOnce::Mismatch);
        let other = Arc::from("two");
        assert!(matches!(requests.begin(&other, once("k", "b")), Ok(Begun::First(_))), "keys are a tenant's own");
        requests.prune(Timestamp::now() + RETENTION + Duration::from_secs(1));
        assert!(matches!(requests.begin(&tenant, once("k", "b")), Ok(Begun::First(_))));
    }

    #[test]
    fn what_failed_may_be_tried_again_and_keys_have_a_bound() {
        let (requests, tenant) = (Requests::new(None), Arc::from("one"));
        let Ok(Begun::First(first)) = requests.begin(&tenant, once("k", "a")) else { panic!("it is the first") };
        drop(first);
        let Ok(Begun::First(first)) = requests.begin(&tenant, once("k", "a")) else { panic!("it is free") };
        first.will_be(made(1));
        first.release();
        // What may live on keeps its key.
        let Ok(Begun::First(first)) = requests.begin(&tenant, once("j", "a")) else { panic!("it is the first") };
        first.will_be(made(2));
        drop(first);
        assert!(matches!(requests.begin(&tenant, once("j", "a")), Ok(Begun::Again(again)) if again == made(2)));
        for n in 1..MAX_KEYS {
            let Ok(Begun::First(first)) = requests.begin(&tenant, once(&n.to_string(), "a")) else { panic!("{n}") };
            first.will_be(made(1));
            first.keep();
        }
        let Err(NotOnce::TooMany(wait)) = requests.begin(&tenant, once("k", "a")) else { panic!("there are enough") };
        assert!(wait <= RETENTION && wait > RETENTION - Duration::from_secs(60), "{wait:?}");
    }
}
