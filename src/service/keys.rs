//! API keys, and who stands behind one. Keys are kept as hashes only; files and their modes are the business of `app`.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use jiff::Timestamp;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::Error;
pub use crate::domain::access::{E2B_PREFIX, KeyHash, PREFIX, Scope};
use crate::domain::ids::KeyId;
pub use crate::store::state::ApiKeyRecord;
use crate::store::state::State;

/// Lower-case hex digits after the prefix: 256 bits.
pub const DIGITS: usize = 64;
/// Most keys of all tenants: each request is compared with every one.
pub const MAX_KEYS: usize = 10_000;

/// Who asks.
#[derive(Debug, Clone)]
pub struct Principal {
    /// Whose sessions are meant.
    pub tenant: Arc<str>,
    /// What is allowed.
    pub scopes: Arc<[Scope]>,
    /// The templates whose sessions are meant; nothing: all.
    pub templates: Option<Arc<[String]>>,
    /// The key that was sent; nothing within this process.
    pub key: Option<KeyId>,
}

impl Principal {
    /// Somebody within this process.
    #[must_use]
    pub fn new(tenant: impl Into<Arc<str>>, scopes: impl Into<Arc<[Scope]>>) -> Self {
        Self { tenant: tenant.into(), scopes: scopes.into(), templates: None, key: None }
    }

    /// Refuses a key that may not work with sessions.
    ///
    /// # Errors
    /// [`Error::Forbidden`].
    pub fn require_sessions(&self) -> Result<(), Error> {
        if self.scopes.contains(&Scope::Sessions) { Ok(()) } else { Err(Error::Forbidden("sessions")) }
    }

    /// Refuses a key that may not look at what the tenant has.
    ///
    /// # Errors
    /// [`Error::Forbidden`].
    pub fn require_read(&self) -> Result<(), Error> {
        let may = self.scopes.iter().any(|scope| matches!(scope, Scope::Sessions | Scope::Read));
        if may { Ok(()) } else { Err(Error::Forbidden("read")) }
    }

    /// Refuses a key that may not command the server itself.
    ///
    /// # Errors
    /// [`Error::Forbidden`].
    pub fn require_admin(&self) -> Result<(), Error> {
        if self.scopes.contains(&Scope::Admin) { Ok(()) } else { Err(Error::Forbidden("admin")) }
    }

    /// Whether sessions of a template are meant. Those of others are not there for this key.
    #[must_use]
    pub fn admits(&self, template: &str) -> bool {
        self.templates.as_ref().is_none_or(|allowed| allowed.iter().any(|name| name == template))
    }
}

/// A key that is known, but for the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// What it is.
    pub record: ApiKeyRecord,
    /// It comes from the configuration, and goes with it.
    pub is_configured: bool,
}

/// The known keys. What is made and revoked at run time is in the database too.
#[derive(Debug, Default)]
pub struct KeyRing {
    state: Option<State>,
    keys: RwLock<Vec<Known>>,
}

/// A key of the ring.
#[derive(Debug)]
struct Known {
    key: Key,
    /// Cancelled when it is taken out of the ring.
    taken_out: CancellationToken,
}

impl From<Key> for Known {
    fn from(key: Key) -> Self {
        Self { key, taken_out: CancellationToken::new() }
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        self.taken_out.cancel();
    }
}

/// A key of the configuration.
#[derive(Debug, Clone)]
pub struct ConfiguredKey {
    /// Of the key.
    pub hash: KeyHash,
    /// For people.
    pub name: String,
    /// Who stands behind it.
    pub principal: Principal,
    /// It is none any more from then on.
    pub expires_at: Option<Timestamp>,
}

/// Why a key is not added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// It is not of the form of one.
    #[error("a key is \"{PREFIX}\" and {DIGITS} lower-case hexadecimal digits")]
    Malformed,
    /// Whose it is would not be clear.
    #[error("the same key is there already, under another name")]
    Known,
    /// There are as many as there may be.
    #[error("there are {MAX_KEYS} keys, which is all that may be; revoke some")]
    TooMany,
}

impl KeyRing {
    /// The keys that an earlier process has kept, and the database that keeps what comes to them.
    #[must_use]
    pub fn new(state: Option<State>, kept: Vec<ApiKeyRecord>) -> Self {
        let keys = kept.into_iter().map(|record| Key { record, is_configured: false }.into()).collect();
        Self { state, keys: RwLock::new(keys) }
    }

    /// Adds a key of the configuration.
    ///
    /// # Errors
    /// See [`KeyError`].
    pub fn add(&self, key: ConfiguredKey) -> Result<(), KeyError> {
        let ConfiguredKey { hash, name, principal, expires_at } = key;
        let Principal { tenant, scopes, templates, .. } = principal;
        // The same at every start.
        let mut of_hash = [0; 16];
        of_hash.copy_from_slice(&hash.0[..16]);
        let id = KeyId::from_uuid(Uuid::from_bytes(of_hash));
        let created_at = Timestamp::now();
        let record = ApiKeyRecord { id, tenant, name, scopes, templates, hash, created_at, expires_at };
        self.insert(Key { record, is_configured: true })
    }

    /// Who stands behind a key. Every key is compared, each in constant time.
    #[must_use]
    pub fn principal(&self, key: &str, now: Timestamp) -> Option<Principal> {
        let asked = hash(key)?;
        let mut found = None;
        let keys = self.keys();
        for known in keys.iter() {
            if bool::from(known.key.record.hash.0.ct_eq(&asked.0)) {
                found = Some(&known.key.record);
            }
        }
        let record = found.filter(|record| record.expires_at.is_none_or(|end| now < end))?;
        let ApiKeyRecord { id, tenant, scopes, templates, .. } = record;
        Some(Principal {
            tenant: Arc::clone(tenant),
            scopes: Arc::clone(scopes),
            templates: templates.clone(),
            key: Some(*id),
        })
    }

    /// Waits until a key counts no more: it has expired, or was revoked.
    pub fn lapsed(&self, id: KeyId) -> impl Future<Output = ()> + Send + 'static {
        let keys = self.keys();
        let known = keys.iter().find(|known| known.key.record.id == id);
        let known = known.map(|known| (known.taken_out.clone(), known.key.record.expires_at));
        drop(keys);
        async move {
            let Some((taken_out, expires_at)) = known else { return };
            let Some(end) = expires_at else { return taken_out.cancelled().await };
            // The clock of the wall may be set back meanwhile.
            while let Ok(left) = Duration::try_from(end.duration_since(Timestamp::now()))
                && !left.is_zero()
                && taken_out.run_until_cancelled(tokio::time::sleep(left)).await.is_some()
            {}
        }
    }

    /// All keys in the order of their ids.
    pub(super) fn list(&self) -> Vec<Key> {
        let mut keys: Vec<_> = self.keys().iter().map(|known| known.key.clone()).collect();
        keys.sort_by_key(|key| key.record.id);
        keys
    }

    /// Adds a key that counts from then on, and is in the database once that is settled.
    pub(super) fn issue(&self, record: ApiKeyRecord) -> Result<(), KeyError> {
        self.insert(Key { record: record.clone(), is_configured: false })?;
        if let Some(state) = &self.state {
            state.put_api_key(record);
        }
        Ok(())
    }

    /// Takes a key away that is not of the configuration: it counts no more. Says what it was.
    pub(super) fn revoke(&self, id: KeyId) -> Option<Key> {
        let mut keys = self.keys_mut();
        let at = keys.iter().position(|known| known.key.record.id == id)?;
        let revoked = keys[at].key.clone();
        if revoked.is_configured {
            return Some(revoked);
        }
        keys.swap_remove(at);
        drop(keys);
        if let Some(state) = &self.state {
            state.forget_api_key(id);
        }
        Some(revoked)
    }

    /// Nobody can use them any more, and others need their places.
    fn forget_expired(&self, keys: &mut Vec<Known>, now: Timestamp) {
        let is_over =
            |Known { key, .. }: &mut Known| !key.is_configured && key.record.expires_at.is_some_and(|end| end <= now);
        for over in keys.extract_if(.., is_over) {
            if let Some(state) = &self.state {
                state.forget_api_key(over.key.record.id);
            }
        }
    }

    fn insert(&self, key: Key) -> Result<(), KeyError> {
        let mut keys = self.keys_mut();
        if keys.iter().any(|known| known.key.record.hash == key.record.hash) {
            return Err(KeyError::Known);
        }
        if keys.len() >= MAX_KEYS {
            self.forget_expired(&mut keys, Timestamp::now());
        }
        // One of the configuration always has its place, or the server would not start.
        if keys.len() >= MAX_KEYS && !key.is_configured {
            return Err(KeyError::TooMany);
        }
        keys.push(key.into());
        Ok(())
    }

    fn keys(&self) -> RwLockReadGuard<'_, Vec<Known>> {
        // Every change is a single call, so a panic leaves nothing half done.
        self.keys.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn keys_mut(&self) -> RwLockWriteGuard<'_, Vec<Known>> {
        self.keys.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a new key.
///
/// # Errors
/// When the system gives no random bytes.
pub fn generate() -> Result<String, getrandom::Error> {
    let mut bytes = [0; DIGITS / 2];
    getrandom::fill(&mut bytes)?;
    Ok(bytes.iter().fold(PREFIX.to_owned(), |key, byte| format!("{key}{byte:02x}")))
}

/// The hash of a key, if the text is one.
#[must_use]
pub fn hash(key: &str) -> Option<KeyHash> {
    let digits = key.strip_prefix(PREFIX).or_else(|| key.strip_prefix(E2B_PREFIX))?;
    let well_formed = digits.len() == DIGITS && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    well_formed.then(|| KeyHash(Sha256::digest(digits.as_bytes()).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configured(key: &str, scopes: &[Scope]) -> ConfiguredKey {
        let hash = hash(key).expect("a key");
        ConfiguredKey { hash, name: "n".to_owned(), principal: Principal::new("t", scopes), expires_at: None }
    }

    fn record(n: u128, key: &str) -> ApiKeyRecord {
        ApiKeyRecord {
            id: KeyId::from_uuid(Uuid::from_u128(n)),
            tenant: Arc::from("t"),
            name: "n".to_owned(),
            scopes: Arc::new([Scope::Read]),
            templates: Some(Arc::new(["python".to_owned()])),
            hash: hash(key).expect("a key"),
            created_at: Timestamp::UNIX_EPOCH,
            expires_at: None,
        }
    }

    #[test]
    fn a_key_is_known_under_both_prefixes_and_no_other() {
        let (key, ring, now) = (generate().unwrap(), KeyRing::default(), Timestamp::now());
        ring.add(configured(&key, &[Scope::Sessions])).unwrap();
        let digits = key.strip_prefix(PREFIX).unwrap();
        assert!(ring.principal(&key, now).is_some());
        assert!(ring.principal(&format!("e2b_{digits}"), now).is_some());
        for wrong in [digits.to_owned(), key.to_uppercase(), format!("{key}0"), generate().unwrap(), String::new()] {
            assert!(ring.principal(&wrong, now).is_none(), "{wrong}");
        }
        assert_eq!(ring.add(configured(&key, &[Scope::Admin])), Err(KeyError::Known));
        assert_eq!(hash("cb_short"), None);
    }

    #[test]
    fn a_key_counts_until_it_expires_or_is_revoked() {
        let (one, two) = (generate().unwrap(), generate().unwrap());
        let end = Timestamp::from_second(100).unwrap();
        let ring = KeyRing::new(None, vec![ApiKeyRecord { expires_at: Some(end), ..record(1, &one) }]);
        assert!(ring.principal(&one, Timestamp::from_second(99).unwrap()).is_some());
        assert!(ring.principal(&one, end).is_none());
        ring.issue(record(2, &two)).unwrap();
        assert_eq!(ring.issue(record(3, &two)), Err(KeyError::Known));
        assert!(ring.principal(&two, end).is_some());
        assert_eq!(ring.revoke(KeyId::from_uuid(Uuid::from_u128(2))).map(|key| key.record), Some(record(2, &two)));
        assert!(ring.principal(&two, end).is_none());
        assert_eq!(ring.revoke(KeyId::from_uuid(Uuid::from_u128(2))), None);
    }

    #[test]
    fn a_key_of_the_configuration_is_not_revoked_and_keeps_its_id() {
        let (key, now) = (generate().unwrap(), Timestamp::now());
        let ids = [KeyRing::default(), KeyRing::default()].map(|ring| {
            ring.add(configured(&key, &[Scope::Admin])).unwrap();
            let id = ring.list()[0].record.id;
            assert!(ring.revoke(id).is_some_and(|key| key.is_configured));
            assert!(ring.principal(&key, now).is_some());
            id
        });
        assert_eq!(ids[0], ids[1]);
    }

    #[test]
    fn the_number_of_keys_is_bounded() {
        let ring = KeyRing::default();
        let nth = |n: usize| {
            let key = format!("{PREFIX}{n:064x}");
            record(n as u128, &key)
        };
        (0..MAX_KEYS).for_each(|n| ring.keys_mut().push(Key { record: nth(n), is_configured: false }.into()));
        assert_eq!(ring.issue(nth(MAX_KEYS)), Err(KeyError::TooMany));
        ring.revoke(nth(0).id).unwrap();
        assert_eq!(ring.issue(nth(MAX_KEYS)), Ok(()));
        // One that is over makes room.
        ring.keys_mut()[0].key.record.expires_at = Some(Timestamp::UNIX_EPOCH);
        assert_eq!(ring.issue(nth(MAX_KEYS + 1)), Ok(()));
    }

    #[test]
    fn scopes_and_templates_are_what_a_key_allows() {
        let may = |scopes: &[Scope]| {
            let who = Principal::new("t", scopes);
            [who.require_read(), who.require_sessions(), who.require_admin()].map(|refused| refused.is_ok())
        };
        assert_eq!(may(&[]), [false, false, false]);
        assert_eq!(may(&[Scope::Read]), [true, false, false]);
        assert_eq!(may(&[Scope::Sessions]), [true, true, false]);
        assert_eq!(may(&[Scope::Admin]), [false, false, true]);
        let all = Principal::new("t", []);
        let some = Principal { templates: Some(Arc::new(["python".to_owned()])), ..all.clone() };
        assert!(all.admits("data") && some.admits("python") && !some.admits("data") && !some.admits("pyth"));
    }
}
