//! Making, listing and revoking API keys: commands of operators, for the keys of all tenants.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use super::keys::{self, ApiKeyRecord, Key, KeyError, KeyRing, Principal, Scope};
use super::{Error, Service};
use crate::domain::ids::KeyId;
use crate::domain::spec::{self, FieldError};
use crate::session::fresh;

/// The longest time until a key expires that may be asked for.
const LONGEST: Duration = Duration::from_secs(3660 * 24 * 3600);
/// What names are.
const NAME: &str = "allowed are 1 to 64 letters, digits, \".\", \"_\" and \"-\"";

/// The key that is asked for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KeyRequest {
    /// For people.
    pub name: String,
    /// Whose it is to be; the asking key's own tenant when absent.
    pub tenant: Option<String>,
    /// What it is to allow.
    pub scopes: Vec<String>,
    /// The templates that it is to allow; all when absent.
    pub templates: Option<Vec<String>>,
    /// It is none any more after this long; it stays when absent.
    pub expires_in_seconds: Option<f64>,
}

impl Service {
    /// Gives it the keys that it makes and revokes.
    #[must_use]
    pub fn with_keys(self, keys: Arc<KeyRing>) -> Self {
        Self { keys, ..self }
    }

    /// Makes a key. It is told this once, and known to nobody afterwards.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn create_key(&self, who: &Principal, request: KeyRequest) -> Result<(Key, String), Error> {
        who.require_admin()?;
        self.accepts()?;
        let now = Timestamp::now();
        let secret = keys::generate().ok().and_then(|key| Some((keys::hash(&key)?, key)));
        let (hash, secret) = secret
            .ok_or_else(|| Error::StateConflict("the system gives no random bytes for a key; try again".to_owned()))?;
        let record = self.resolve_key(who, request, hash, now)?;
        self.keys.issue(record.clone()).map_err(|error| match error {
            KeyError::TooMany | KeyError::Known | KeyError::Malformed => Error::StateConflict(error.to_string()),
        })?;
        let kept = self.kept().await;
        if kept.is_err() {
            // Nobody is told of it.
            self.keys.revoke(record.id);
        }
        kept.map(|()| (Key { record, is_configured: false }, secret))
    }

    /// All keys, or a tenant's, in the order of their ids, after one of them.
    ///
    /// # Errors
    /// [`Error::Forbidden`].
    pub fn list_keys(&self, who: &Principal, tenant: Option<&str>, after: Option<KeyId>) -> Result<Vec<Key>, Error> {
        who.require_admin()?;
        let wanted = |key: &Key| {
            tenant.is_none_or(|tenant| *key.record.tenant == *tenant) && after.is_none_or(|after| after < key.record.id)
        };
        Ok(self.keys.list().into_iter().filter(wanted).collect())
    }

    /// Takes a key back. No request with it is accepted any more, and answers that go on to it break off; executions that it has begun go on.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn revoke_key(&self, who: &Principal, id: KeyId) -> Result<(), Error> {
        who.require_admin()?;
        let key = self.keys.revoke(id).ok_or(Error::NotFound("key"))?;
        if key.is_configured {
            let name = key.record.name;
            let message = format!("the key \"{name}\" comes from the server's configuration: remove it there");
            return Err(Error::StateConflict(message));
        }
        // It counts no more in this process, whatever becomes of this.
        self.kept().await
    }

    fn resolve_key(
        &self,
        who: &Principal,
        request: KeyRequest,
        hash: keys::KeyHash,
        now: Timestamp,
    ) -> Result<ApiKeyRecord, Error> {
        let KeyRequest { name, tenant, scopes: asked, templates, expires_in_seconds } = request;
        let mut errors = Vec::new();
        if !spec::is_name(&name) {
            errors.push(FieldError::new("/name", NAME));
        }
        if tenant.as_deref().is_some_and(|tenant| !spec::is_name(tenant)) {
            errors.push(FieldError::new("/tenant", NAME));
        }
        let mut scopes = Vec::new();
        for (at, scope) in asked.iter().enumerate().take(Scope::ALL.len() + 1) {
            match scope.parse::<Scope>() {
                Ok(scope) => scopes.push(scope),
                Err(error) => errors.push(FieldError::new(format!("/scopes/{at}"), error.to_string())),
            }
        }
        scopes.sort_unstable();
        scopes.dedup();
        if asked.is_empty() || asked.len() > Scope::ALL.len() {
            errors.push(FieldError::new("/scopes", "allowed are one to all of \"sessions\", \"read\" and \"admin\""));
        }
        if let Some(names) = &templates {
            let choice = self.offer.now();
            let known = choice.templates.keys().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
            if names.is_empty() || names.len() > choice.templates.len() {
                errors.push(FieldError::new("/templates", format!("allowed are one to all of {known}")));
            }
            let unknown = names.iter().take(choice.templates.len()).enumerate();
            for (at, _) in unknown.filter(|(_, name)| !choice.templates.contains_key(*name)) {
                let message = format!("there is no template of that name; there are {known}");
                errors.push(FieldError::new(format!("/templates/{at}"), message));
            }
        }
        let expires_in = expires_in_seconds.and_then(|asked| {
            let told = |message| errors.push(FieldError::new("/expires_in_seconds", message));
            spec::seconds_within(asked, LONGEST).map_err(told).ok()
        });
        if !errors.is_empty() {
            return Err(Error::SpecRejected(errors));
        }
        Ok(ApiKeyRecord {
            id: fresh(),
            tenant: tenant.map_or_else(|| Arc::clone(&who.tenant), Arc::from),
            name,
            scopes: scopes.into(),
            templates: templates.map(Arc::from),
            hash,
            created_at: now,
            expires_at: expires_in.map(|time| now.saturating_add(time).unwrap_or(Timestamp::MAX)),
        })
    }
}
