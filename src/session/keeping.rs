//! What is kept beside executions and after sessions: long contents, the notebook, and what is counted of them. Decides what goes there; the store decides how long.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use jiff::Timestamp;

use super::execution::{Execution, Logged};
use crate::domain::ids::{ExecutionId, SessionId};
use crate::domain::output::{ExecutionEvent, Fold, MimeBundle, MimePart, Report, Status};
use crate::metrics::Metrics;
use crate::store::{Archive, NotebookCell, NotebookKernel, Owner, decoded};

/// What a session keeps. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Keeping {
    archive: Option<Archive>,
    tenant: Arc<str>,
    session: SessionId,
    inline: usize,
    has_notebook: bool,
    growth: Growth,
    metrics: Option<Metrics>,
}

/// Bytes of records that were finished since it was last asked, of all sessions.
#[derive(Clone, Debug, Default)]
pub struct Growth(Arc<AtomicU64>);

impl Growth {
    /// Whether it is above a bound; then it begins anew.
    #[must_use]
    pub fn take_above(&self, bound: u64) -> bool {
        let is_above = self.0.load(Ordering::Relaxed) > bound;
        if is_above {
            self.0.store(0, Ordering::Relaxed);
        }
        is_above
    }
}

impl Keeping {
    /// Keeps for a session of a tenant: contents of more than `inline` bytes, and its notebook. Without an archive nothing is kept, and
    /// everything stays where it stands.
    #[must_use]
    pub fn new(archive: Option<Archive>, tenant: Arc<str>, session: SessionId, inline: usize) -> Self {
        Self { archive, tenant, session, inline, has_notebook: true, growth: Growth::default(), metrics: None }
    }

    /// The same, whose finished records count in `growth`.
    #[must_use]
    pub fn growing(self, growth: Growth) -> Self {
        Self { growth, ..self }
    }

    /// The same, whose sessions and executions are counted.
    #[must_use]
    pub fn counted(self, metrics: Metrics) -> Self {
        Self { metrics: Some(metrics), ..self }
    }

    /// The same for code that nobody has sent as an execution.
    #[must_use]
    pub fn uncounted(self) -> Self {
        Self { metrics: None, ..self }
    }

    /// Whose session it is.
    pub(super) fn tenant(&self) -> &str {
        &self.tenant
    }

    /// Where it is counted, if it is.
    pub(super) fn metrics(&self) -> Option<&Metrics> {
        self.metrics.as_ref()
    }

    /// A record of that many bytes is finished.
    pub(super) fn has_grown(&self, bytes: u64) {
        self.growth.0.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Keeps nothing.
    #[cfg(test)]
    pub(crate) fn nothing() -> Self {
        Self::new(None, Arc::from(""), uuid::Uuid::from_u128(1).into(), usize::MAX)
    }

    /// The same for code that is not to stand in the notebook.
    #[must_use]
    pub fn without_notebook(self) -> Self {
        Self { has_notebook: false, ..self }
    }

    /// Begins the notebook, once the kernel is known.
    pub(super) fn open_notebook(&self, kernel: NotebookKernel) {
        if let Some(archive) = &self.archive {
            archive.open_notebook(&self.tenant, self.session, kernel);
        }
    }

    /// Nothing more comes.
    pub(super) fn end_notebook(&self) {
        if let Some(archive) = &self.archive {
            archive.end_notebook(self.session);
        }
    }

    /// Moves long contents out of a bundle, each under the `next` number. Returns how many bytes there was no room for, or that were
    /// not what their type promises.
    pub(super) fn put_long_parts(
        &self,
        execution: ExecutionId,
        data: &mut MimeBundle,
        mut next: impl FnMut() -> u32,
    ) -> u64 {
        let Some(archive) = &self.archive else { return 0 };
        let owner = Owner { tenant: Arc::clone(&self.tenant), session: self.session, execution };
        let mut omitted = 0;
        data.retain(|mime, part| {
            let MimePart::Inline(text) = part else { return true };
            if text.0.len() <= self.inline {
                return true;
            }
            let kept = decoded(mime, text).and_then(|bytes| archive.put_blob(&owner, next(), mime, bytes).ok());
            if kept.is_none() {
                omitted += text.0.len() as u64;
            }
            kept.map(|blob| *part = MimePart::Blob(blob)).is_some()
        });
        omitted
    }

    /// Adds an execution that has run to the notebook.
    pub(super) fn add_cell(
        &self,
        execution: &Execution,
        events: &[Arc<Logged>],
        status: Status,
        report: &Report,
        started_at: Option<Timestamp>,
    ) {
        let Some(archive) = self.archive.as_ref().filter(|_| self.has_notebook) else { return };
        let mut fold = Fold::default();
        let mut updates = Vec::new();
        for logged in events {
            fold.push(&logged.event);
            if let ExecutionEvent::ResultUpdate { display_id, data, metadata } = &logged.event {
                updates.push((display_id.clone(), data.clone(), metadata.clone()));
            }
        }
        let cell = NotebookCell {
            execution: execution.id,
            context: execution.place.context,
            code: execution.request.code.clone(),
            language: execution.place.language.clone(),
            // What is not stored is not counted: the number would be that of another cell.
            execution_count: report.execution_count.filter(|_| execution.request.store_history),
            status,
            shown: fold.into_shown(),
            updates,
            detail: report.detail.clone(),
            queued_at: execution.created_at,
            started_at,
            finished_at: Timestamp::now(),
        };
        archive.add_cell(self.session, cell);
    }
}
