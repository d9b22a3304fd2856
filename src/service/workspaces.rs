//! Workspaces that outlive sessions: what a tenant has of them, and their deletion. They come to be with the sessions that name them.

use std::sync::Arc;

use super::{Error, LATER, Principal, Service, carry_on, trail};
use crate::domain::ids::WorkspaceId;
use crate::domain::spec::FieldError;
use crate::session::workspaces::{DeleteRefused, HoldRefused, WorkspaceView};

impl Service {
    /// A tenant's workspaces in the order of their making, after one of them.
    ///
    /// # Errors
    /// [`Error::Forbidden`].
    pub fn list_workspaces(&self, who: &Principal, after: Option<WorkspaceId>) -> Result<Vec<WorkspaceView>, Error> {
        who.require_read()?;
        let found = self.registry.workspaces().list(&who.tenant, after);
        Ok(found.into_iter().filter(|found| who.admits(&found.record.template)).collect())
    }

    /// A tenant's workspace.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn workspace(&self, who: &Principal, name: &str) -> Result<WorkspaceView, Error> {
        who.require_read()?;
        let found = self.registry.workspaces().find(&who.tenant, name);
        found.filter(|found| who.admits(&found.record.template)).ok_or(Error::NotFound("workspace"))
    }

    /// Deletes a workspace with all that is in it. Its name is free at once; what the engine does not remove now it removes later.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete_workspace(&self, who: &Principal, name: &str) -> Result<(), Error> {
        who.require_sessions()?;
        self.workspace(who, name)?;
        let workspaces = Arc::clone(self.registry.workspaces());
        let id = workspaces.delete(&who.tenant, name).map_err(|refused| match refused {
            DeleteRefused::Absent => Error::NotFound("workspace"),
            DeleteRefused::InUse(session) => Error::WorkspaceInUse(session),
        })?;
        trail::note_change();
        // It is not to come back with the next process.
        self.kept().await?;
        let engine = Arc::clone(&self.engine);
        let removal = carry_on("workspace", async move { workspaces.remove(engine.as_ref(), id).await });
        if let Some(Err(error)) = removal.await {
            tracing::warn!(workspace = %id, %error, "a deleted workspace is not removed yet; it is tried again");
        }
        Ok(())
    }
}

/// Why a session does not get the workspace that it is to have.
pub(super) fn not_held(refused: HoldRefused) -> Error {
    match refused {
        HoldRefused::InUse { session } => Error::WorkspaceInUse(session),
        HoldRefused::OfTemplate(template) => rejected(format!(
            "the workspace of this name is of template \"{template}\"; name that template, or another workspace"
        )),
        HoldRefused::TooMany(exceeded) => Error::OverQuota { exceeded, retry_after: LATER },
        HoldRefused::Full => Error::WorkspacesFull,
    }
}

/// The same to a key that does not allow to know of the template.
pub(super) fn of_another_template() -> Error {
    rejected("the workspace of this name is of another template, which the key does not allow; name another".to_owned())
}

fn rejected(message: String) -> Error {
    Error::SpecRejected(vec![FieldError::new("/workspace", message)])
}
