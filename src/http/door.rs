//! Who may come in: the key of a request, and an end to guessing. What a key allows is the business of the service.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use jiff::Timestamp;

use super::problem::{self, Problem};
use super::remote::Remote;
use crate::domain::ids::KeyId;
use crate::service::keys::{KeyRing, Principal};
use crate::service::trail;

/// Most addresses whose failures are counted at one time. Those of others count once the time is over.
const MAX_ADDRESSES: usize = 10_000;

/// The door.
#[derive(Debug)]
pub struct Door {
    keys: Arc<KeyRing>,
    failures: Failures,
}

/// How many keys that are not valid may be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tries {
    /// So many from one address …
    pub most: u32,
    /// … within this time.
    pub within: Duration,
}

impl Door {
    /// One that these keys open.
    #[must_use]
    pub fn new(keys: Arc<KeyRing>, tries: Tries) -> Self {
        Self { keys, failures: Failures::new(tries, Instant::now()) }
    }

    /// Who stands behind a key, now.
    #[must_use]
    pub fn principal(&self, key: &str) -> Option<Principal> {
        self.keys.principal(key, Timestamp::now())
    }

    /// Who asks. A valid key is taken whatever others have tried from the same address: they may share it with a caller.
    ///
    /// # Errors
    /// The same problem whether there is no key, a wrong one or one that is over; another one after too many wrong keys.
    pub fn admit(&self, parts: &Parts) -> Result<Principal, Problem> {
        let is_guess = parts.headers.contains_key(AUTHORIZATION) || parts.headers.contains_key("x-api-key");
        self.admit_key(parts, key_of(parts), is_guess)
    }

    /// The same by a key that stands elsewhere in the request. `is_guess`: one was sent, whether or not it is of the form of one.
    ///
    /// # Errors
    /// See [`Door::admit`].
    pub fn admit_key(&self, parts: &Parts, key: Option<&str>, is_guess: bool) -> Result<Principal, Problem> {
        if let Some(who) = key.and_then(|key| self.principal(key)) {
            // Whatever becomes of the request, it is theirs.
            trail::note_caller(&who);
            return Ok(who);
        }
        let address = parts.extensions.get::<Remote>().map(|Remote(address)| *address);
        if let (true, Some(address)) = (is_guess, address)
            && let Err(wait) = self.failures.count(address, Instant::now())
        {
            let detail = "too many keys from this address were not valid; a valid one is taken at once";
            let seconds = wait.as_secs() + 1;
            return Err(Problem { retry_after_seconds: Some(seconds), ..Problem::new(problem::RATE_LIMITED, detail) });
        }
        Err(Problem::new(
            problem::UNAUTHENTICATED,
            "the key is not valid, or there is none: send a key of this server as \"Authorization: Bearer …\" or \
             \"X-API-Key: …\"",
        ))
    }

    /// Waits until a key that was taken is valid no more.
    pub(super) fn closed_to(&self, key: KeyId) -> impl Future<Output = ()> + Send + 'static {
        self.keys.lapsed(key)
    }
}

/// The key of a request, in its head. One that names more than one is refused: nobody should have to guess which counts.
fn key_of(parts: &Parts) -> Option<&str> {
    let bearer = parts.headers.get_all(AUTHORIZATION).iter().map(|value| {
        let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key)
    });
    let plain = parts.headers.get_all("x-api-key").iter().map(|value| value.to_str().ok());
    let mut keys = bearer.chain(plain);
    let key = keys.next()??;
    keys.next().is_none().then_some(key)
}

/// Failures by address. All begin anew at the same time, so that nothing has to be looked through.
#[derive(Debug)]
struct Failures {
    tries: Tries,
    counts: Mutex<Counts>,
}

#[derive(Debug)]
struct Counts {
    since: Instant,
    of: HashMap<IpAddr, u32>,
}

impl Failures {
    fn new(tries: Tries, now: Instant) -> Self {
        Self { tries, counts: Mutex::new(Counts { since: now, of: HashMap::new() }) }
    }

    /// Counts a failure; too many are told with the time until they are forgotten.
    fn count(&self, address: IpAddr, now: Instant) -> Result<(), Duration> {
        let Tries { most, within } = self.tries;
        // Every change is a single call, so a panic leaves nothing half done.
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if now.duration_since(counts.since) >= within {
            *counts = Counts { since: now, of: HashMap::new() };
        }
        let over = counts.since + within;
        let address = host_of(address);
        if counts.of.len() >= MAX_ADDRESSES && !counts.of.contains_key(&address) {
            return Ok(());
        }
        let count = counts.of.entry(address).or_default();
        *count = count.saturating_add(1);
        if *count > most { Err(over.saturating_duration_since(now)) } else { Ok(()) }
    }
}

/// One host has a whole /64 of IPv6 to come from.
pub(super) fn host_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::keys::{self, ConfiguredKey, Scope};
    use crate::service::trail::{Origin, Trail};

    const MINUTE: Duration = Duration::from_secs(60);

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn whose_a_request_is_is_known_once_it_is_in_whatever_becomes_of_it() {
        let (key, ring) = (keys::generate().unwrap(), KeyRing::default());
        let (hash, principal) = (keys::hash(&key).unwrap(), Principal::new("one", [Scope::Read]));
        ring.add(ConfiguredKey { hash, name: "n".to_owned(), principal, expires_at: None }).unwrap();
        let door = Door::new(Arc::new(ring), Tries { most: 2, within: MINUTE });
        let told = async |key: &str| {
            let request =
                axum::http::Request::builder().header(AUTHORIZATION, format!("Bearer {key}")).body(()).unwrap();
            let trail = Trail::new(Origin::default(), None, None);
            let is_in = trail.follow(async { door.admit(&request.into_parts().0).is_ok() }).await;
            (is_in, trail.told().tenant, trail.told().key.is_some())
        };
        assert_eq!(told(&key).await, (true, Some(Arc::from("one")), true));
        assert_eq!(told("cb_wrong").await, (false, None, false));
    }

    #[test]
    fn so_many_failures_are_let_pass_and_all_are_forgotten_in_time() {
        let start = Instant::now();
        let failures = Failures::new(Tries { most: 2, within: MINUTE }, start);
        let one = address("192.0.2.1");
        let at = |second| start + Duration::from_secs(second);
        assert_eq!(failures.count(one, at(0)), Ok(()));
        assert_eq!(failures.count(one, at(1)), Ok(()));
        assert_eq!(failures.count(one, at(10)), Err(Duration::from_secs(50)));
        assert_eq!(failures.count(address("192.0.2.2"), at(10)), Ok(()), "another address");
        assert_eq!(failures.count(one, at(60)), Ok(()));
    }

    #[test]
    fn a_host_counts_as_one_whatever_address_it_takes() {
        let start = Instant::now();
        let failures = Failures::new(Tries { most: 1, within: MINUTE }, start);
        assert_eq!(failures.count(address("2001:db8::1"), start), Ok(()));
        assert!(failures.count(address("2001:db8::ffff:2"), start).is_err());
        assert_eq!(failures.count(address("2001:db8:0:1::1"), start), Ok(()));
        assert_eq!(failures.count(address("192.0.2.1"), start), Ok(()));
        assert!(failures.count(address("::ffff:192.0.2.1"), start).is_err());
    }

    #[test]
    fn the_table_is_bounded() {
        let start = Instant::now();
        let failures = Failures::new(Tries { most: 1, within: MINUTE }, start);
        for n in 0..MAX_ADDRESSES as u32 + 10 {
            assert_eq!(failures.count(IpAddr::V4((0x0a00_0000 + n).into()), start), Ok(()));
        }
        assert_eq!(failures.counts.lock().unwrap().of.len(), MAX_ADDRESSES);
        assert!(failures.count(address("10.0.0.0"), start).is_err(), "those that were counted still are");
    }
}
