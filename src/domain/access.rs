//! What keys allow, and how their hashes are written. Pure; who holds a key is the business of `service`.

use std::fmt;
use std::str::FromStr;

/// What every key begins with.
pub const PREFIX: &str = "cb_";
/// What the same key begins with for clients of E2B.
pub const E2B_PREFIX: &str = "e2b_";

/// What a key allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Everything with what the key's tenant has.
    Sessions,
    /// Looking at what the key's tenant has, and nothing that changes anything.
    Read,
    /// The server itself, and the keys of all tenants.
    Admin,
}

impl Scope {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Sessions, Self::Read, Self::Admin];

    /// The public word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sessions => "sessions",
            Self::Read => "read",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text is no scope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no scope; allowed are \"sessions\", \"read\" and \"admin\"")]
pub struct UnknownScope(String);

impl FromStr for Scope {
    type Err = UnknownScope;

    fn from_str(text: &str) -> Result<Self, UnknownScope> {
        Self::ALL.into_iter().find(|scope| scope.name() == text).ok_or_else(|| UnknownScope(text.to_owned()))
    }
}

/// The SHA-256 of a key's digits. The key can't be had from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyHash(pub [u8; 32]);

/// A text is not a hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a hash is \"sha256:\" and 64 lower-case hexadecimal digits")]
pub struct MalformedHash;

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for KeyHash {
    type Err = MalformedHash;

    fn from_str(text: &str) -> Result<Self, MalformedHash> {
        let digits = text.strip_prefix("sha256:").map(str::as_bytes).ok_or(MalformedHash)?;
        let mut bytes = [0; 32];
        if digits.len() != 2 * bytes.len() || !digits.iter().all(|d| matches!(d, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(MalformedHash);
        }
        let value = |digit: u8| if digit.is_ascii_digit() { digit - b'0' } else { digit - b'a' + 10 };
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = value(pair[0]) << 4 | value(pair[1]);
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_hash_is_read_back(bytes in any::<[u8; 32]>()) {
            let hash = KeyHash(bytes);
            prop_assert_eq!(hash.to_string().parse(), Ok(hash));
        }

        #[test]
        fn no_text_panics(text in ".{0,80}") {
            let _ = text.parse::<KeyHash>();
            let _ = format!("sha256:{text}").parse::<KeyHash>();
        }
    }

    #[test]
    fn one_hash_has_one_spelling() {
        let text = KeyHash([0xab; 32]).to_string();
        for wrong in [text.to_uppercase(), text[7..].to_owned(), format!("{text}0"), text.replace("ab", "ag")] {
            assert_eq!(wrong.parse::<KeyHash>(), Err(MalformedHash), "{wrong}");
        }
    }

    #[test]
    fn scopes_are_read_back() {
        for scope in Scope::ALL {
            assert_eq!(scope.name().parse(), Ok(scope));
        }
        assert!("Sessions".parse::<Scope>().is_err());
    }
}
