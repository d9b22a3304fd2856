//! What operators command: the server itself, not the sessions of a tenant.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::keys::Principal;
use super::{Error, Service, carry_on};
use crate::engine::EngineError;
use crate::session::reconcile::{Reconciler, Report};
use crate::session::registry::AfterDrain;
use crate::task;

/// What commands of operators work with.
#[derive(Debug)]
pub struct Admin {
    /// Compares the engine with the sessions.
    pub reconciler: Arc<Reconciler>,
    /// Cancelled when the server is to drain and end.
    pub drain: CancellationToken,
    /// Time that running executions get then.
    pub grace: Duration,
    /// What becomes of sessions then.
    pub after: AfterDrain,
    /// Reads the configuration again, where it was read from somewhere.
    pub reload: Option<Arc<dyn Reload>>,
}

/// Reads the configuration again.
pub trait Reload: std::fmt::Debug + Send + Sync {
    /// Takes over what is different by now: all of it, or nothing. It reads files.
    ///
    /// # Errors
    /// A line for each mistake, and for each change that a server which runs can't take over.
    fn reload(&self) -> Result<Vec<Changed>, Vec<String>>;
}

/// A value of the configuration that is another now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// Its key: `limits.sessions`. Of `server.tls_cert_file` it is what is in the file.
    pub key: String,
    /// As TOML; nothing where there was no such key.
    pub before: Option<String>,
    /// As TOML; nothing where there is no such key any more.
    pub after: Option<String>,
}

impl std::fmt::Display for Changed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".to_owned());
        write!(f, "{}: {} -> {}", self.key, shown(&self.before), shown(&self.after))
    }
}

/// What a server that begins to drain leaves unfinished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draining {
    /// Sessions that have not ended.
    pub sessions: usize,
    /// Executions that run or wait.
    pub executions: usize,
    /// They have this long.
    pub grace: Duration,
    /// What becomes of the sessions.
    pub after: AfterDrain,
}

impl Service {
    /// Lets operators command this server.
    #[must_use]
    pub fn administered(self, admin: Admin) -> Self {
        Self { admin: Some(admin), ..self }
    }

    /// Takes nothing new from now on, and has the server end as it does on SIGTERM; answers at once. Asking again changes nothing.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn drain(&self, who: &Principal) -> Result<Draining, Error> {
        let admin = self.admin(who)?;
        self.registry.begin_drain();
        admin.drain.cancel();
        Ok(Draining {
            sessions: self.registry.live().len(),
            executions: self.registry.unfinished(),
            grace: admin.grace,
            after: admin.after,
        })
    }

    /// Compares the engine with the sessions now, and acts. It goes on to its end if its caller leaves.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn reconcile(&self, who: &Principal) -> Result<Report, Error> {
        let reconciler = Arc::clone(&self.admin(who)?.reconciler);
        let round = carry_on("reconcile", async move { reconciler.round().await });
        round.await.ok_or(Error::EngineUnavailable)?.map_err(|error| {
            tracing::warn!(%error, "the engine's cells could not be compared with the sessions");
            match error {
                EngineError::Claimed { .. } => Error::StateConflict(
                    "another installation has taken this instance's name on the engine; the server's log says which"
                        .to_owned(),
                ),
                _ => Error::EngineUnavailable,
            }
        })
    }

    /// Reads the configuration again and takes over what is different by now: all of it, or nothing. Sessions that are there keep what they have.
    ///
    /// # Errors
    /// [`Error::ConfigRejected`] with every mistake; see [`Error`].
    pub async fn reload(&self, who: &Principal) -> Result<Vec<Changed>, Error> {
        if self.admin(who)?.reload.is_none() {
            return Err(Error::StateConflict("this server was not started from configuration files".to_owned()));
        }
        self.reload_by_signal().await.map_err(Error::ConfigRejected)
    }

    /// The same for whoever may signal the process.
    ///
    /// # Errors
    /// Every mistake, a line each.
    pub async fn reload_by_signal(&self) -> Result<Vec<Changed>, Vec<String>> {
        let reload = self.admin.as_ref().and_then(|admin| admin.reload.clone());
        let reload = reload.ok_or_else(|| vec!["there is no configuration to read again".to_owned()])?;
        let read = task::blocking(move || reload.reload()).await;
        read.unwrap_or_else(|| Err(vec!["reading it failed".to_owned()]))
    }

    fn admin(&self, who: &Principal) -> Result<&Admin, Error> {
        who.require_admin()?;
        self.admin.as_ref().ok_or_else(|| Error::StateConflict("this server takes no commands of operators".to_owned()))
    }
}
