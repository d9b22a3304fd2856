//! Work beside a session's kernels: files, commands, connections. Counts what is under way, so that a session in use is neither idle nor paused.
//!
//! Does not know what the work is, and carries none of it: that goes over the link, which a [`Visit`] comes with.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::kernel::link::Link;

/// Bulk streams (files, archives) of one session at once. Each may have a whole window of the link on its way, twice this many at most fit beside the rest.
const BULK: usize = 8;
/// Other visits of one session at once: commands that are followed, terminals, connections.
const LIGHT: usize = 160;

/// What kind of room a visit takes on the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// Much data, whose reader may be slow.
    Bulk,
    /// A request, or a byte stream with a window of its own.
    Light,
}

/// The visits of one session.
#[derive(Debug)]
pub struct Visits {
    bulk: Arc<Semaphore>,
    light: Arc<Semaphore>,
    /// How many there are now.
    present: AtomicU64,
    changed: Notify,
}

impl Default for Visits {
    fn default() -> Self {
        Self {
            bulk: Arc::new(Semaphore::new(BULK)),
            light: Arc::new(Semaphore::new(LIGHT)),
            present: AtomicU64::new(0),
            changed: Notify::new(),
        }
    }
}

impl Visits {
    /// Whether there are any now.
    #[must_use]
    pub fn are_any(&self) -> bool {
        self.present.load(Ordering::Acquire) > 0
    }

    /// Waits until the last of them has left. Level-triggered for one waiter: a leave that nobody waited for is told at once.
    pub(super) async fn left(&self) {
        self.changed.notified().await;
    }

    /// Room for one more; nothing when there are as many as may be.
    pub(super) fn try_enter(self: &Arc<Self>, weight: Weight, link: Link) -> Option<Visit> {
        let places = match weight {
            Weight::Bulk => &self.bulk,
            Weight::Light => &self.light,
        };
        let place = Arc::clone(places).try_acquire_owned().ok()?;
        self.present.fetch_add(1, Ordering::AcqRel);
        Some(Visit { link, visits: Arc::clone(self), _place: place })
    }
}

/// Work that is under way in a session, and the link that carries it. The session is in use until it is dropped.
#[derive(Debug)]
pub struct Visit {
    /// The link to the guest. It may break while the visit lasts; another visit gets the next one.
    pub link: Link,
    visits: Arc<Visits>,
    _place: OwnedSemaphorePermit,
}

impl Drop for Visit {
    fn drop(&mut self) {
        if self.visits.present.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.visits.changed.notify_one();
        }
    }
}
