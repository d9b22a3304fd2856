//! Tokens of single sessions, for doors whose clients have one instead of a key: what they are, and who stands behind one.
//!
//! They are derived, not kept: the same for a session as long as the data folder's secret is, after a restart too, and of no use for another session or another
//! purpose. Whoever has one may do with its session what a key of scope `sessions` may.

use std::sync::Arc;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::keys::{Principal, Scope};
use super::{Service, trail};
use crate::domain::ids::SessionId;
use crate::session::Session;
use crate::store::secret;

/// What a token is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Files, commands and what else is of the container's own.
    Agent,
    /// What is served on its ports, and its kernels.
    Traffic,
}

impl Purpose {
    /// What begins a token, so that people and scanners know one.
    fn prefix(self) -> &'static str {
        match self {
            Self::Agent => "cba_",
            Self::Traffic => "cbt_",
        }
    }
}

/// What tokens are derived from.
pub struct Tokens([u8; secret::BYTES]);

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokens")
    }
}

impl Tokens {
    /// Those of a secret.
    #[must_use]
    pub fn new(secret: [u8; secret::BYTES]) -> Self {
        Self(secret)
    }

    /// Those of a secret that ends with the process.
    #[must_use]
    pub fn passing() -> Self {
        let mut secret = [0; secret::BYTES];
        let halves = [Uuid::new_v4(), Uuid::new_v4()];
        secret.chunks_exact_mut(16).zip(&halves).for_each(|(half, random)| half.copy_from_slice(random.as_bytes()));
        Self(secret)
    }

    /// The token of a session.
    #[must_use]
    pub fn of(&self, purpose: Purpose, session: SessionId) -> String {
        let prefix = purpose.prefix();
        // HMAC takes a key of any length, so there is always one.
        let mac =
            Hmac::<Sha256>::new_from_slice(&self.0).map(|mac| mac.chain_update(prefix).chain_update(session.uuid()));
        let digest = mac.map(|mac| mac.finalize().into_bytes().to_vec()).unwrap_or_default();
        digest.iter().fold(prefix.to_owned(), |token, byte| format!("{token}{byte:02x}"))
    }

    fn is(&self, purpose: Purpose, session: SessionId, token: &str) -> bool {
        self.of(purpose, session).as_bytes().ct_eq(token.as_bytes()).into()
    }
}

impl Service {
    /// Gives it the tokens that outlive the process.
    #[must_use]
    pub fn with_tokens(self, tokens: Tokens) -> Self {
        Self { tokens, ..self }
    }

    /// A session's token. Whoever is told it must be allowed to work with the session.
    #[must_use]
    pub fn session_token(&self, purpose: Purpose, session: SessionId) -> String {
        self.tokens.of(purpose, session)
    }

    /// A session, whoever's it is, for doors that tell whether there is one before they look at its token. Nothing of it but that may be told.
    #[must_use]
    pub fn untold_session(&self, id: SessionId) -> Option<Session> {
        self.registry.claimed_session(id)
    }

    /// Who stands behind a session's token.
    #[must_use]
    pub fn bearer(&self, session: &Session, purpose: Purpose, token: &str) -> Option<Principal> {
        self.tokens.is(purpose, session.id, token).then(|| stand_in(session))
    }

    /// The live session whose agent token proves itself to this question, for what was signed without saying by whom; all are asked.
    pub fn signer(&self, is_by: impl Fn(&str) -> bool) -> Option<(Session, Principal)> {
        let mut found = None;
        for session in self.registry.claimed_sessions().into_iter().filter(|session| !session.is_over()) {
            if is_by(&self.tokens.of(Purpose::Agent, session.id)) {
                found = Some(session);
            }
        }
        let session = found?;
        let who = stand_in(&session);
        trail::note_caller(&who);
        Some((session, who))
    }
}

/// Who has a session's token: its tenant, without a key, as far as its template goes.
fn stand_in(session: &Session) -> Principal {
    let templates: Arc<[String]> = Arc::from([session.spec.template.clone()]);
    Principal { templates: Some(templates), ..Principal::new(Arc::clone(&session.tenant), [Scope::Sessions]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_of_one_secret_one_session_and_one_purpose() {
        let id = |n| SessionId::from_uuid(Uuid::from_u128(n));
        let (tokens, again, other) = (Tokens::new([7; 32]), Tokens::new([7; 32]), Tokens::new([8; 32]));
        let token = tokens.of(Purpose::Agent, id(1));
        assert_eq!(token, again.of(Purpose::Agent, id(1)), "it survives a restart");
        assert_eq!((token.len(), &token[..4]), (4 + 64, "cba_"));
        assert!(tokens.is(Purpose::Agent, id(1), &token));
        assert!(!tokens.is(Purpose::Agent, id(2), &token) && !tokens.is(Purpose::Traffic, id(1), &token));
        assert!(!other.is(Purpose::Agent, id(1), &token) && !tokens.is(Purpose::Agent, id(1), ""));
        assert_ne!(Tokens::passing().of(Purpose::Agent, id(1)), Tokens::passing().of(Purpose::Agent, id(1)));
    }
}
