//! How many connections clients have, by tenant, and their end with the server's. What is said on them is told elsewhere.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::task::TaskTracker;

/// What is still to be said when the server ends is said within this time.
const CLOSING: Duration = Duration::from_secs(5);

/// The connections.
#[derive(Debug, Clone, Default)]
pub struct Sockets {
    counts: Arc<Mutex<HashMap<Arc<str>, usize>>>,
    open: TaskTracker,
}

/// A connection's place, for as long as it lives.
#[derive(Debug)]
pub(super) struct Place {
    sockets: Sockets,
    tenant: Arc<str>,
}

impl Sockets {
    /// A place for one more of a tenant's, if there may be.
    pub(super) fn take(&self, tenant: &Arc<str>, most: usize) -> Option<Place> {
        let mut counts = self.counts();
        let count = counts.entry(Arc::clone(tenant)).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Place { sockets: self.clone(), tenant: Arc::clone(tenant) })
    }

    /// Works on a connection, which the server's end waits for.
    pub(super) async fn serve(&self, work: impl Future<Output = ()>) {
        self.open.track_future(work).await;
    }

    /// Waits until all are closed, but not long.
    pub(in crate::http) async fn closed(&self) {
        self.open.close();
        if tokio::time::timeout(CLOSING, self.open.wait()).await.is_err() {
            tracing::debug!("connections of clients did not close in time");
        }
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<Arc<str>, usize>> {
        // Every change is whole between two statements.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.sockets.counts();
        if let Some(count) = counts.get_mut(&self.tenant) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_a_tenants_and_come_back() {
        let sockets = Sockets::default();
        let (one, two) = (Arc::from("one"), Arc::from("two"));
        let place = sockets.take(&one, 1).unwrap();
        assert!(sockets.take(&one, 1).is_none() && sockets.take(&two, 1).is_some());
        drop(place);
        assert!(sockets.take(&one, 1).is_some());
        assert!(sockets.counts().is_empty());
    }
}
