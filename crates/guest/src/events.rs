//! The ring of numbered events: kept until the control plane acknowledges them, told to one subscriber.
//!
//! Bounded by asking first: whoever reads from a kernel waits for [`Ring::room`], and output that finds
//! no [`Ring::output_room`] is cut by the relay. Nothing is ever pushed out from here.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use cellblock_wire::link::{Channel, Event, Numbered};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};

/// Events are kept up to this many bytes; above it kernels wait.
const LIMIT: usize = 16 * 1024 * 1024;
/// Output is kept up to this, which is all that one execution may put out by default; the rest is reserved for replies, status, gaps
/// and ends.
const OUTPUT_LIMIT: usize = 12 * 1024 * 1024;
/// What an event costs beside its bytes.
const OVERHEAD: usize = 256;
/// What a message costs beside its content, most of the time.
const MESSAGE: usize = 4096;
/// How long output waits for a control plane that has stopped acknowledging, or is being replaced, before it is cut.
const PATIENCE: Duration = Duration::from_secs(5);
/// An event that nobody can act on yet waits this long for the one that follows: each write wakes the engine and the control plane,
/// and those take their time from the kernel.
const LINGER: Duration = Duration::from_millis(1);
/// The same for what is of use only once its execution has ended.
const LONG_LINGER: Duration = Duration::from_millis(5);
/// Frames up to this length are told as one chunk.
const COPIED: usize = 8 * 1024;

struct Stored {
    head: Bytes,
    parts: Vec<Bytes>,
    size: usize,
}

struct Inner {
    events: VecDeque<Stored>,
    /// The number of the first event in `events`, or of the next one.
    first: u64,
    used: usize,
    subscriber: u64,
    /// The newest event that the subscriber was told.
    told: u64,
    waker: Option<Waker>,
    /// When untold events are told at the latest; `None` when there are none, or at once.
    linger: Option<Instant>,
    /// The execution that was idle last.
    idle: String,
    /// The last time the control plane showed that it takes events over; `None` before the first subscriber.
    progress: Option<Instant>,
}

/// The ring. Cheap to clone; all clones are the same ring.
#[derive(Clone)]
pub struct Ring {
    inner: Arc<Mutex<Inner>>,
    freed: Arc<Notify>,
    told: Arc<Notify>,
}

impl Default for Ring {
    fn default() -> Self {
        let inner = Inner {
            events: VecDeque::new(),
            first: 1,
            used: 0,
            subscriber: 0,
            told: 0,
            waker: None,
            linger: None,
            idle: String::new(),
            progress: None,
        };
        Self { inner: Arc::new(Mutex::new(inner)), freed: Arc::new(Notify::new()), told: Arc::new(Notify::new()) }
    }
}

impl Inner {
    /// How long the event may wait to be told. Of what an execution says, its end can't: the reply and the idle status, whichever
    /// comes last.
    fn may_linger(&mut self, event: &Event, parts: &[Bytes]) -> Duration {
        let (channel, msg_type, parent_id) = match event {
            Event::Message { channel, msg_type, parent_id } => (channel, msg_type, parent_id),
            // The reply, or the kernel's end, is next.
            Event::Effects { .. } => return LINGER,
            _ => return Duration::ZERO,
        };
        let says_idle =
            || parts.get(3).is_some_and(|content| content.len() < 256 && content.windows(6).any(|w| w == b"\"idle\""));
        match (channel, msg_type.as_str()) {
            (Channel::Stdin | Channel::Control, _) => Duration::ZERO,
            (Channel::Iopub, "status") if says_idle() => {
                self.idle.clone_from(parent_id);
                Duration::ZERO
            }
            (Channel::Iopub, "status" | "execute_input" | "execute_result") => LONG_LINGER,
            (Channel::Iopub, _) => LINGER,
            (Channel::Shell, "execute_reply") if self.idle != *parent_id => LINGER,
            (Channel::Shell, _) => Duration::ZERO,
        }
    }
}

impl Ring {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends an event.
    pub fn push(&self, kernel: &str, event: Event, parts: Vec<Bytes>) {
        let mut inner = self.lock();
        let seq = inner.first + inner.events.len() as u64;
        let numbered = Numbered { seq, kernel: kernel.to_owned(), event };
        let head = match serde_json::to_vec(&numbered) {
            Ok(head) => Bytes::from(head),
            Err(_) => unreachable!("an event is plain data"),
        };
        let size = OVERHEAD + head.len() + parts.iter().map(Bytes::len).sum::<usize>();
        inner.used += size;
        let wait = inner.may_linger(&numbered.event, &parts);
        let all_told = inner.told + 1 == seq;
        inner.linger = match (wait, inner.linger) {
            (Duration::ZERO, _) => None,
            (wait, Some(earlier)) => Some(earlier.min(Instant::now() + wait)),
            (wait, None) => all_told.then(|| Instant::now() + wait),
        };
        inner.events.push_back(Stored { head, parts, size });
        if let Some(waker) = inner.waker.take() {
            waker.wake();
        }
    }

    /// The number of the newest event; 0 before the first.
    #[must_use]
    pub fn last_seq(&self) -> u64 {
        let inner = self.lock();
        inner.first + inner.events.len() as u64 - 1
    }

    /// Forgets events up to and with `seq`; false when there never was such an event.
    #[must_use]
    pub fn acknowledge(&self, seq: u64) -> bool {
        let mut inner = self.lock();
        if seq >= inner.first + inner.events.len() as u64 {
            return false;
        }
        while inner.first <= seq
            && let Some(event) = inner.events.pop_front()
        {
            inner.first += 1;
            inner.used -= event.size;
        }
        if inner.events.is_empty() {
            inner.events.shrink_to(64);
        }
        if inner.progress.is_some() {
            inner.progress = Some(Instant::now());
        }
        self.freed.notify_waiters();
        true
    }

    /// How much more output can be kept, in bytes.
    #[must_use]
    pub fn output_room(&self) -> usize {
        OUTPUT_LIMIT.saturating_sub(self.lock().used)
    }

    /// Waits until events were told, or for a moment: an answer that goes out beside them costs nothing of its own.
    pub async fn beside_events(&self) {
        // Either way the answer goes out now.
        let _ = tokio::time::timeout(LONG_LINGER, self.told.notified()).await;
    }

    /// Waits until there is room for any event.
    pub async fn room(&self) {
        loop {
            let freed = self.freed.notified();
            if self.lock().used < LIMIT {
                return;
            }
            freed.await;
        }
    }

    /// Waits until there is room for so much output, or all the room there ever is, but only for a control plane that took events
    /// over a short while ago.
    pub async fn await_output_room(&self, size: u64) {
        let wanted = usize::try_from(size).unwrap_or(usize::MAX).saturating_add(MESSAGE).min(OUTPUT_LIMIT);
        loop {
            let freed = self.freed.notified();
            let deadline = {
                let inner = self.lock();
                match inner.progress {
                    Some(progress) if inner.used + wanted > OUTPUT_LIMIT => progress + PATIENCE,
                    _ => break,
                }
            };
            if tokio::time::timeout_at(deadline, freed).await.is_err() {
                break;
            }
        }
        self.room().await;
    }

    /// Tells all events after `after`, and then new ones as they come. An earlier subscription ends.
    #[must_use]
    pub fn subscribe(&self, after: u64) -> Subscription {
        let mut inner = self.lock();
        inner.subscriber += 1;
        inner.progress = Some(Instant::now());
        if let Some(waker) = inner.waker.take() {
            waker.wake();
        }
        Subscription {
            ring: self.clone(),
            id: inner.subscriber,
            next: after.saturating_add(1),
            chunks: VecDeque::new(),
            timer: Box::pin(tokio::time::sleep(LINGER)),
        }
    }
}

/// A stream of encoded events.
pub struct Subscription {
    ring: Ring,
    id: u64,
    next: u64,
    chunks: VecDeque<Bytes>,
    timer: Pin<Box<Sleep>>,
}

impl Subscription {
    /// The next chunk of the stream; `None` when another subscriber has taken over.
    pub fn poll_chunk(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if let Some(chunk) = self.chunks.pop_front() {
            return Poll::Ready(Some(chunk));
        }
        let mut inner = self.ring.lock();
        if inner.subscriber != self.id {
            return Poll::Ready(None);
        }
        if let Some(until) = inner.linger {
            inner.waker = Some(context.waker().clone());
            self.timer.as_mut().reset(until);
            if self.timer.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            inner.linger = None;
        }
        self.next = self.next.max(inner.first);
        let index = usize::try_from(self.next - inner.first).unwrap_or(usize::MAX);
        let mut batch = BytesMut::new();
        for event in inner.events.iter().skip(index) {
            self.next += 1;
            encode(event, &mut batch, &mut self.chunks);
            if batch.len() >= COPIED || !self.chunks.is_empty() {
                break;
            }
        }
        if !batch.is_empty() {
            self.chunks.push_back(batch.freeze());
        }
        if inner.told != self.next - 1 {
            inner.told = self.next - 1;
            self.ring.told.notify_waiters();
        }
        match self.chunks.pop_front() {
            Some(chunk) => Poll::Ready(Some(chunk)),
            None => {
                inner.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    /// The same as a future.
    pub async fn chunk(&mut self) -> Option<Bytes> {
        std::future::poll_fn(|context| Pin::new(&mut *self).get_mut().poll_chunk(context)).await
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut inner = self.ring.lock();
        if inner.subscriber == self.id {
            inner.waker = None;
        }
    }
}

/// Appends the event's frame as [`cellblock_wire::frame`] lays it out: small parts copied, large ones as chunks of their own.
fn encode(event: &Stored, batch: &mut BytesMut, chunks: &mut VecDeque<Bytes>) {
    let length = 4 + event.head.len() + event.parts.iter().map(|part| 4 + part.len()).sum::<usize>();
    batch.put_u32(length as u32);
    for part in std::iter::once(&event.head).chain(&event.parts) {
        batch.put_u32(part.len() as u32);
        if part.len() <= COPIED {
            batch.put_slice(part);
        } else {
            chunks.push_back(batch.split().freeze());
            chunks.push_back(part.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cellblock_wire::frame::Decoder;

    fn output(ring: &Ring, size: usize) {
        let event = Event::Message { channel: Channel::Iopub, msg_type: "stream".into(), parent_id: "p".into() };
        ring.push("k", event, vec![Bytes::from_static(b"{}"), vec![b'x'; size].into()]);
    }

    async fn seqs(subscription: &mut Subscription, count: usize) -> Vec<u64> {
        let mut decoder = Decoder::default();
        let mut seqs = Vec::new();
        while seqs.len() < count {
            decoder.push(&subscription.chunk().await.unwrap());
            while let Some(frame) = decoder.next_frame::<Numbered>().unwrap() {
                assert_eq!(frame.parts[0], "{}");
                seqs.push(frame.head.seq);
            }
        }
        seqs
    }

    #[tokio::test]
    async fn events_are_replayed_until_acknowledged() {
        let ring = Ring::default();
        [10, 9000, 0, 20_000].into_iter().for_each(|size| output(&ring, size));
        let mut first = ring.subscribe(0);
        assert_eq!(seqs(&mut first, 4).await, [1, 2, 3, 4]);
        assert!(ring.acknowledge(2));
        assert!(!ring.acknowledge(5));
        let mut second = ring.subscribe(0);
        assert_eq!(first.chunk().await, None);
        drop(first);
        assert_eq!(seqs(&mut second, 2).await, [3, 4]);
        let (live, ()) = tokio::join!(seqs(&mut second, 1), async { output(&ring, 5) });
        assert_eq!(live, [5]);
        assert_eq!(ring.last_seq(), 5);
        assert!(ring.acknowledge(5));
        assert_eq!(ring.lock().used, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_that_ends_nothing_waits_for_the_next_but_not_for_long() {
        let ring = Ring::default();
        let status = |state: &str| {
            let event = Event::Message { channel: Channel::Iopub, msg_type: "status".into(), parent_id: "p".into() };
            let content = format!("{{\"execution_state\": \"{state}\"}}");
            ring.push("k", event, ["{}", "{}", "{}", &content].map(|p| Bytes::from(p.to_owned())).to_vec());
        };
        let mut subscription = ring.subscribe(0);
        let started = Instant::now();
        output(&ring, 5);
        subscription.chunk().await.unwrap();
        assert_eq!(started.elapsed(), LINGER, "output alone");
        status("busy");
        output(&ring, 5);
        status("idle");
        let before = Instant::now();
        let chunk = subscription.chunk().await.unwrap();
        assert_eq!(before.elapsed(), Duration::ZERO, "the end tells all");
        let mut decoder = Decoder::default();
        decoder.push(&chunk);
        assert!((0..3).all(|_| decoder.next_frame::<Numbered>().unwrap().is_some()), "in one chunk");
    }

    #[tokio::test(start_paused = true)]
    async fn output_waits_only_for_a_control_plane_that_acknowledges() {
        let ring = Ring::default();
        output(&ring, OUTPUT_LIMIT);
        assert_eq!(ring.output_room(), 0);
        let started = Instant::now();
        ring.await_output_room(1).await;
        assert_eq!(started.elapsed(), Duration::ZERO);
        let subscription = ring.subscribe(0);
        ring.await_output_room(1).await;
        assert_eq!(started.elapsed(), PATIENCE);
        assert!(ring.acknowledge(1));
        output(&ring, OUTPUT_LIMIT);
        drop(subscription);
        tokio::join!(ring.await_output_room(1), async { assert!(ring.acknowledge(2)) });
        assert_eq!(started.elapsed(), PATIENCE);
    }

    #[tokio::test(start_paused = true)]
    async fn above_the_limit_even_replies_wait() {
        let ring = Ring::default();
        output(&ring, LIMIT);
        let waited = tokio::time::timeout(Duration::from_secs(60), ring.room()).await;
        assert!(waited.is_err());
        tokio::join!(ring.room(), async { assert!(ring.acknowledge(1)) });
    }
}
