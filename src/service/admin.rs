//! What operators command: the server itself, not the sessions of a tenant.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::keys::Principal;
use super::{Error, Service, carry_on};
use crate::engine::EngineError;
use crate::session::reconcile::{Reconciler, Report};
use crate::session::registry::AfterDrain;

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

    fn admin(&self, who: &Principal) -> Result<&Admin, Error> {
        who.require_admin()?;
        self.admin.as_ref().ok_or_else(|| Error::StateConflict("this server takes no commands of operators".to_owned()))
    }
}
