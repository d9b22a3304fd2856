//! Pages that are held for cells until they are read: how many bytes of them there may be, and for how long. Does not know what they are.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

use crate::places::Place;

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

/// A page on its way to a cell. It has its room until the last piece of it is gone, whoever holds that.
struct Held {
    page: String,
    patience: Patience,
    _room: (Taken, Place<Arc<str>>),
}

/// A page that is to be read from now on, with its room in what the session and what all may hold.
pub(super) fn held(page: String, patience: Patience, own: Taken, all: Place<Arc<str>>) -> Bytes {
    patience.0.send_replace(Some(Instant::now() + READ_TIME));
    Bytes::from_owner(Held { page, patience, _room: (own, all) })
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        self.page.as_bytes()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.patience.0.send_replace(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    use http_body_util::Full;
    use hyper::{Request, Response};
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use crate::places::Places;

    /// How many bytes are free.
    fn free(room: &Room) -> usize {
        room.0.available_permits() * UNIT
    }

    #[tokio::test]
    async fn room_is_taken_until_a_page_was_read_from_its_connection() {
        const PAGE: usize = 200_000;
        let (own, all) = (Room::of(1 << 20), Places::new(1 << 20));
        let mut taken = own.take(1 << 20).await.unwrap();
        assert_eq!(free(&own), 0);
        taken.shrink(PAGE);
        let left = free(&own);
        assert!(left > (1 << 20) - PAGE - 2 * UNIT && left <= (1 << 20) - PAGE);
        let page = held("x".repeat(PAGE), Patience::default(), taken, all.take("one".into(), PAGE, PAGE).unwrap());
        let (mut near, far) = tokio::io::duplex(1024);
        let page = std::sync::Mutex::new(Some(page));
        let service = hyper::service::service_fn(move |_: Request<hyper::body::Incoming>| {
            let page = page.lock().unwrap().take().unwrap();
            async { Ok::<_, Infallible>(Response::new(Full::new(page))) }
        });
        let serving = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(far), service);
        let reading = async {
            near.write_all(b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n").await.unwrap();
            near.read_exact(&mut [0; 512]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(free(&own) == left && all.take("one".into(), 1, PAGE).is_err(), "most of it was not read yet");
            near.read_to_end(&mut Vec::new()).await.unwrap()
        };
        let (served, read) = tokio::join!(serving, reading);
        served.unwrap();
        assert!(read > PAGE - 512);
        assert!(free(&own) == 1 << 20 && all.take("one".into(), PAGE, PAGE).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_page_that_nobody_reads_is_not_waited_for_without_end() {
        let (room, all, patience) = (Room::of(4096), Places::new(2), Patience::default());
        let page = async || {
            let all = all.take("one".into(), 1, 1).unwrap();
            held("x".to_owned(), patience.clone(), room.take(1).await.unwrap(), all)
        };
        drop(page().await);
        let waiting = tokio::time::timeout(10 * READ_TIME, patience.is_over());
        assert!(waiting.await.is_err(), "a page that was read is not waited for");
        let _unread = page().await;
        assert!(tokio::time::timeout(2 * READ_TIME, patience.is_over()).await.is_ok());
    }
}
