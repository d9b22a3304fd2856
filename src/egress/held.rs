//! Pages that are held for cells until they are read: how many bytes of them there may be, and for how long. Does not know what they are.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

/// Bytes that are given at once: what was given is not held any more.
const PIECE: usize = 16 * 1024;
/// What a permit is for, in bytes.
const UNIT: usize = 1024;
/// A page is read within this time.
pub(super) const READ_TIME: Duration = Duration::from_secs(60);

/// Room for so many bytes.
#[derive(Debug, Clone)]
pub(super) struct Room(Arc<Semaphore>);

/// Room that is taken until this is dropped.
#[derive(Debug)]
pub(super) struct Taken(OwnedSemaphorePermit);

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

impl Room {
    pub(super) fn of(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes.div_ceil(UNIT))))
    }

    /// Takes room, and waits for it.
    pub(super) async fn take(&self, bytes: usize) -> Option<Taken> {
        Arc::clone(&self.0).acquire_many_owned(units(bytes)).await.ok().map(Taken)
    }

    /// Takes room if there is some.
    pub(super) fn try_take(&self, bytes: usize) -> Option<Taken> {
        Arc::clone(&self.0).try_acquire_many_owned(units(bytes)).ok().map(Taken)
    }
}

impl Taken {
    /// Gives back what is more than needed.
    pub(super) fn shrink(&mut self, bytes: usize) {
        let surplus = self.0.num_permits().saturating_sub(units(bytes) as usize);
        drop(self.0.split(surplus));
    }
}

/// Until when the page on a connection is to be read.
#[derive(Debug, Clone)]
pub(super) struct Patience(watch::Sender<Option<Instant>>);

impl Default for Patience {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Patience {
    /// Waits until a page was not read in time.
    pub(super) async fn is_over(&self) {
        let mut until = self.0.subscribe();
        loop {
            let at = *until.borrow_and_update();
            match at {
                Some(at) if tokio::time::timeout_at(at, until.changed()).await.is_err() => return,
                Some(_) => {}
                // It can't fail, since this end keeps the other one.
                None => {
                    let _ = until.changed().await;
                }
            }
        }
    }
}

/// A page on its way to a cell.
pub(super) struct Held {
    left: Bytes,
    patience: Patience,
    _room: [Taken; 2],
}

impl Held {
    /// Begins the time in which it is to be read.
    pub(super) fn new(page: String, patience: Patience, room: [Taken; 2]) -> Self {
        patience.0.send_replace(Some(Instant::now() + READ_TIME));
        Self { left: page.into(), patience, _room: room }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.patience.0.send_replace(None);
    }
}

impl Body for Held {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let left = &mut self.get_mut().left;
        let piece = left.split_to(left.len().min(PIECE));
        Poll::Ready((!piece.is_empty()).then_some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn room_is_taken_until_a_page_was_read() {
        let (own, all) = (Room::of(4096), Room::of(8192));
        let mut taken = own.take(4096).await.unwrap();
        assert!(own.try_take(1).is_none());
        taken.shrink(2000);
        let page = Held::new("x".repeat(2000), Patience::default(), [taken, all.try_take(2000).unwrap()]);
        assert!(own.try_take(2048).is_some() && own.try_take(2049).is_none());
        assert_eq!(page.collect().await.unwrap().to_bytes().len(), 2000);
        assert!(own.try_take(4096).is_some() && all.try_take(8192).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_page_that_nobody_reads_is_not_waited_for_without_end() {
        let (room, patience) = (Room::of(4096), Patience::default());
        let page = |patience: &Patience| {
            Held::new("x".to_owned(), patience.clone(), [room.try_take(1).unwrap(), room.try_take(1).unwrap()])
        };
        drop(page(&patience));
        let waiting = tokio::time::timeout(10 * READ_TIME, patience.is_over());
        assert!(waiting.await.is_err(), "a page that was read is not waited for");
        let _unread = page(&patience);
        assert!(tokio::time::timeout(2 * READ_TIME, patience.is_over()).await.is_ok());
    }
}
