//! Listening to a kernel, for front doors whose clients speak Jupyter: who may, what they have missed, and what they say beside executions.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::io::AsyncReadExt;

use super::keys::Principal;
use super::{Error, Service, trail};
use crate::domain::ids::SessionId;
use crate::domain::output::JsonText;
use crate::session::execution::Execution;
use crate::session::tap::{Listener, Message};
use crate::session::{Aside, Session};
use crate::store::{BlobBody, content_text};

impl Service {
    /// Listens to the kernel of a session's default context, under a name of the client's if it has one. Nothing when `most` listen already.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn listen(
        &self,
        who: &Principal,
        id: SessionId,
        name: Option<&str>,
        most: usize,
    ) -> Result<Option<Listener>, Error> {
        who.require_sessions()?;
        Ok(self.session(who, id)?.tap.listen(name, most))
    }

    /// What a listener of this name has begun and may not have heard the end of: what runs, and what has ended while it can have been away.
    #[must_use]
    pub fn missed(&self, session: &Session, listener: &Listener) -> Vec<Arc<Execution>> {
        let (patience, asker) = (session.tap.patience(), &listener.asker);
        let is_own = |execution: &Arc<Execution>| {
            execution.request.asked_by.as_ref().is_some_and(|asked| asked.asker == *asker)
                && execution.finished().is_none_or(|at| at.elapsed() < patience)
        };
        self.registry.executions_of(session.id).into_iter().filter(is_own).collect()
    }

    /// All that can be told of an execution, from its record as it is now. What comes later is heard from the kernel.
    pub async fn retell(&self, who: &Principal, execution: &Execution) -> Vec<Message> {
        let (events, mut blobs) = (execution.events_after(0), HashMap::new());
        for (number, mime) in Execution::blobs(&events) {
            if let Some(text) = self.blob_text(who, execution, number, &mime).await {
                blobs.insert(number, text);
            }
        }
        execution.retold(&events, &blobs)
    }

    /// A long content as it stands in a message; nothing when it is not kept any more.
    async fn blob_text(&self, who: &Principal, execution: &Execution, number: u32, mime: &str) -> Option<JsonText> {
        let blob = self.archive.as_ref()?.blob(&who.tenant, execution.id, number).await?;
        let bytes = match blob.body {
            BlobBody::Memory(bytes) => bytes.to_vec(),
            BlobBody::File(file) => {
                let mut bytes = Vec::new();
                file.take(blob.bytes).read_to_end(&mut bytes).await.ok()?;
                bytes
            }
        };
        content_text(mime, bytes)
    }

    /// Passes a client's message on to the kernel.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn pass(&self, who: &Principal, id: SessionId, aside: Aside) -> Result<(), Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        trail::note_context(session.default_context);
        Ok(session.pass(aside).await?)
    }
}
