//! Queries of `/files`: what they ask for, and signatures by which somebody may who has no token. What a signature covers is E2B's business.

use axum::http::Uri;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// What a signature is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
}

/// A query, decoded. What it has beside these is ignored, as E2B's agent does.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Query {
    pub(super) path: String,
    pub(super) username: String,
    pub(super) signature: Option<String>,
    pub(super) expiration: Option<String>,
}

impl Query {
    /// That of a request; of several values of a name the first counts.
    pub(super) fn of(uri: &Uri) -> Self {
        let pairs = |name: &str| {
            let mut pairs = url::form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
            pairs.find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
        };
        Self {
            path: pairs("path").unwrap_or_default(),
            username: pairs("username").unwrap_or_default(),
            signature: pairs("signature"),
            expiration: pairs("signature_expiration"),
        }
    }

    /// Whether a token has signed it for this.
    pub(super) fn is_signed_by(&self, token: &str, operation: Operation) -> bool {
        let Some(given) = &self.signature else { return false };
        let word = match operation {
            Operation::Read => "read",
            Operation::Write => "write",
        };
        let expiration = self.expiration.as_ref().map(|at| format!(":{at}")).unwrap_or_default();
        let signed = format!("{}:{word}:{}:{token}{expiration}", self.path, self.username);
        let expected = format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(signed)));
        expected.as_bytes().ct_eq(given.as_bytes()).into()
    }

    /// Whether its time is over, in seconds since 1970. What is no time is over.
    pub(super) fn is_expired(&self, now: i64) -> bool {
        self.expiration.as_ref().is_some_and(|at| at.parse::<i64>().map_or(true, |at| at < now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(text: &str) -> Query {
        Query::of(&format!("/files?{text}").parse().unwrap())
    }

    #[test]
    fn signatures_are_of_one_token_one_path_and_one_operation() {
        // As E2B's Python client makes it: get_signature("a b.txt", "read", "user", "token", …).
        let signature = format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest("a b.txt:read:user:token:99")));
        let encoded: String = url::form_urlencoded::byte_serialize(signature.as_bytes()).collect();
        let signed = query(&format!("path=a%20b.txt&username=user&signature={encoded}&signature_expiration=99"));
        assert!(signed.is_signed_by("token", Operation::Read));
        assert!(!signed.is_signed_by("token", Operation::Write) && !signed.is_signed_by("other", Operation::Read));
        for (field, other) in [("a%20b.txt", "b.txt"), ("=user", "=root"), ("=99", "=100")] {
            let text = format!("path=a%20b.txt&username=user&signature={encoded}&signature_expiration=99");
            assert!(!query(&text.replace(field, other)).is_signed_by("token", Operation::Read), "{other}");
        }
        assert!(!query("path=a").is_signed_by("token", Operation::Read));
    }

    #[test]
    fn times_that_are_over_or_none_do_not_count() {
        let expires = |at: &str| query(&format!("signature_expiration={at}")).is_expired(1000);
        assert!(expires("999") && expires("") && expires("x") && expires("99999999999999999999"));
        assert!(!expires("1000") && !expires("2000") && !query("path=a").is_expired(1000));
    }
}
