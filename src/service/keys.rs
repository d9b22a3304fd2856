//! API keys, and who stands behind one. Keys are kept as hashes only; files and their modes are the business of `app`.

use std::sync::Arc;

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::Error;

/// What every key begins with.
pub const PREFIX: &str = "cb_";
/// What the same key begins with for clients of E2B.
pub const E2B_PREFIX: &str = "e2b_";
/// Lower-case hex digits after the prefix: 256 bits.
pub const DIGITS: usize = 64;

/// What a key allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Everything with sessions of the key's tenant.
    Sessions,
    /// The server itself.
    Admin,
}

/// Who asks.
#[derive(Debug, Clone)]
pub struct Principal {
    /// Whose sessions are meant.
    pub tenant: Arc<str>,
    /// What is allowed.
    pub scopes: Arc<[Scope]>,
}

impl Principal {
    /// Refuses a key that may not work with sessions.
    ///
    /// # Errors
    /// [`Error::Forbidden`].
    pub fn require_sessions(&self) -> Result<(), Error> {
        if self.scopes.contains(&Scope::Sessions) { Ok(()) } else { Err(Error::Forbidden("sessions")) }
    }

    /// Refuses a key that may not command the server itself.
    ///
    /// # Errors
    /// [`Error::Forbidden`].
    pub fn require_admin(&self) -> Result<(), Error> {
        if self.scopes.contains(&Scope::Admin) { Ok(()) } else { Err(Error::Forbidden("admin")) }
    }
}

/// The known keys.
#[derive(Debug, Default)]
pub struct KeyRing {
    keys: Vec<([u8; 32], Principal)>,
}

/// A text is not a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a key is \"{PREFIX}\" and {DIGITS} lower-case hexadecimal digits")]
pub struct MalformedKey;

impl KeyRing {
    /// Adds a key.
    ///
    /// # Errors
    /// When the text is not a key.
    pub fn add(&mut self, key: &str, principal: Principal) -> Result<(), MalformedKey> {
        self.keys.push((hash(key).ok_or(MalformedKey)?, principal));
        Ok(())
    }

    /// Whether there is no key at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Who stands behind a key. Every key is compared, each in constant time.
    #[must_use]
    pub fn principal(&self, key: &str) -> Option<&Principal> {
        let asked = hash(key)?;
        let mut found = None;
        for (known, principal) in &self.keys {
            if bool::from(known.ct_eq(&asked)) {
                found = Some(principal);
            }
        }
        found
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

fn hash(key: &str) -> Option<[u8; 32]> {
    let digits = key.strip_prefix(PREFIX).or_else(|| key.strip_prefix(E2B_PREFIX))?;
    let well_formed = digits.len() == DIGITS && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    well_formed.then(|| Sha256::digest(digits.as_bytes()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_known_under_both_prefixes_and_no_other() {
        let principal = Principal { tenant: Arc::from("t"), scopes: Arc::new([Scope::Sessions]) };
        let key = generate().unwrap();
        let mut ring = KeyRing::default();
        ring.add(&key, principal).unwrap();
        let digits = key.strip_prefix(PREFIX).unwrap();
        assert!(ring.principal(&key).is_some());
        assert!(ring.principal(&format!("e2b_{digits}")).is_some());
        for wrong in [digits.to_owned(), key.to_uppercase(), format!("{key}0"), generate().unwrap(), String::new()] {
            assert!(ring.principal(&wrong).is_none(), "{wrong}");
        }
        assert!(ring.add("cb_short", Principal { tenant: Arc::from("t"), scopes: Arc::new([]) }).is_err());
    }
}
