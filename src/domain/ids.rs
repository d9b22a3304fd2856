//! Typed ids: a prefix of three letters and a UUID in lower-case Crockford base 32, so that they are safe as DNS labels.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const DIGITS: usize = 26;

/// A text is not an id of the expected kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an id that begins with \"{0}\" and goes on with 26 letters and digits")]
pub struct InvalidId(&'static str);

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Uuid);

        impl $name {
            /// The id that stands for this UUID.
            #[must_use]
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// The UUID in this id.
            #[must_use]
            pub const fn uuid(self) -> Uuid {
                self.0
            }
        }

        impl From<Uuid> for $name {
            fn from(uuid: Uuid) -> Self {
                Self(uuid)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($prefix)?;
                f.write_str(&encode(self.0.as_u128()))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                text.strip_prefix($prefix)
                    .and_then(decode)
                    .map(|n| Self(Uuid::from_u128(n)))
                    .ok_or(InvalidId($prefix))
            }
        }
    };
}

id!(
    /// A session.
    SessionId,
    "ses"
);
id!(
    /// A context: one kernel's place in a session. It keeps its id when the kernel is restarted.
    ContextId,
    "ctx"
);
id!(
    /// One execution of code.
    ExecutionId,
    "exe"
);
id!(
    /// One command or terminal of a session.
    CommandId,
    "cmd"
);
id!(
    /// One request to the front door.
    RequestId,
    "req"
);
id!(
    /// One installation of a control plane: a data folder and what was made for it.
    InstallationId,
    "ins"
);
id!(
    /// A workspace that outlives sessions.
    WorkspaceId,
    "wsp"
);
id!(
    /// An API key.
    KeyId,
    "key"
);

fn encode(mut number: u128) -> String {
    let mut digits = [0_u8; DIGITS];
    for digit in digits.iter_mut().rev() {
        *digit = ALPHABET[(number & 31) as usize];
        number >>= 5;
    }
    digits.iter().map(|d| char::from(*d)).collect()
}

fn decode(text: &str) -> Option<u128> {
    // 26 digits hold 130 bits, so the first one may be 7 at most.
    if text.len() != DIGITS || text.as_bytes()[0] > b'7' {
        return None;
    }
    text.bytes().try_fold(0_u128, |number, byte| {
        let digit = ALPHABET.iter().position(|d| *d == byte)?;
        Some((number << 5) | digit as u128)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_id_is_read_back_and_is_a_dns_label(number in any::<u128>()) {
            let id = SessionId::from_uuid(Uuid::from_u128(number));
            let text = id.to_string();
            prop_assert_eq!(text.parse::<SessionId>(), Ok(id));
            prop_assert!(text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()));
            prop_assert!(text.parse::<ContextId>().is_err());
        }

        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = text.parse::<SessionId>();
            let _ = format!("ses{text}").parse::<SessionId>();
        }
    }

    #[test]
    fn one_id_has_one_spelling() {
        let text = SessionId::from_uuid(Uuid::from_u128(12)).to_string();
        assert!(text.to_uppercase().parse::<SessionId>().is_err());
        assert!("ses80000000000000000000000000".parse::<SessionId>().is_err());
    }
}
