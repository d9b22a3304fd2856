//! What a kernel says, for clients that speak Jupyter: a ring of its newest messages, and any number of listeners that read it at their own pace.
//!
//! It costs nothing as long as nobody listens. Memory is bounded by the ring, whoever reads slowly: who is further behind is cut off. A listener that has a name
//! may leave and come back: it hears again what came after the last message that it is known to have. Only of a kernel that was replaced meanwhile it hears nothing
//! again that it was told, if it took leave, or comes back while it still seems to be here. It decides nothing about what is told, and does not know WebSockets.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
pub use cellblock_wire::link::Channel;
use tokio::sync::watch;
use uuid::Uuid;

use crate::domain::execution::Asker;
use crate::domain::ids::ExecutionId;
use crate::domain::output::JsonText;
use crate::kernel::client;
use crate::task;

/// What a message takes beside its bytes.
const OVERHEAD: usize = 512;
/// Most listeners that are remembered after they have left.
const MAX_LEFT: usize = 64;

/// How much is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TapBounds {
    /// Bytes of messages.
    pub bytes: usize,
    /// For a listener that has left, for so long.
    pub time: Duration,
}

/// A message for listeners.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Where it belongs.
    pub channel: Channel,
    /// What it is.
    pub msg_type: String,
    /// Its id: the same whenever it is told again.
    pub msg_id: String,
    /// Header, parent header, metadata, content, then buffers. The first four are JSON objects.
    pub parts: Vec<Bytes>,
    /// The execution that it tells of, and the number of its newest event by then.
    pub of: Option<(ExecutionId, u64)>,
    /// The one listener that it is for; nothing: all.
    pub only: Option<Asker>,
}

impl Message {
    /// One that no kernel has sent, for one listener.
    #[must_use]
    pub fn made(channel: Channel, msg_type: &str, parent: Option<&JsonText>, content: &serde_json::Value) -> Self {
        let msg_id = Uuid::new_v4().to_string();
        let parts = client::told(&msg_id, msg_type, parent, content, Vec::new());
        Self { channel, msg_type: msg_type.to_owned(), msg_id, parts, of: None, only: None }
    }

    fn size(&self) -> usize {
        OVERHEAD + self.parts.iter().map(Bytes::len).sum::<usize>()
    }
}

/// Why there will be no more messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// The session has ended.
    Over,
    /// It goes on with the next process.
    Left,
}

/// What a listener hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// Messages in their order; the last one's number.
    Messages(Vec<Arc<Message>>, u64),
    /// It is so far behind that something was not kept for it.
    Behind,
    /// Another one listens under its name.
    Replaced,
    /// Nothing more comes.
    Silence(Silence),
}

/// The ring and its listeners.
#[derive(Debug)]
pub struct Tap {
    bounds: TapBounds,
    /// Whether anybody listens, or may come back.
    is_open: AtomicBool,
    inner: Mutex<Inner>,
    version: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Inner {
    ring: VecDeque<Arc<Message>>,
    /// Messages that are not in the ring any more.
    gone: u64,
    bytes: usize,
    listeners: HashMap<Asker, Place>,
    silence: Option<Silence>,
    /// The newest message when the kernel was last replaced.
    replaced: u64,
    /// Somebody waits to forget who has left.
    is_watched: bool,
}

/// How far a listener is.
#[derive(Debug)]
struct Place {
    /// Which of those that had its name; nothing: it has left.
    number: Option<u64>,
    left_at: Instant,
    /// The newest message that it is known to have.
    has: u64,
    /// The newest message that it was told.
    told: u64,
    /// It has also what it could be told of the time before the first message that was kept for it.
    is_whole: bool,
}

impl Inner {
    fn last(&self) -> u64 {
        self.gone + self.ring.len() as u64
    }

    fn live(&self) -> usize {
        self.listeners.values().filter(|place| place.number.is_some()).count()
    }

    /// Forgets messages that all have.
    fn trim(&mut self) {
        let needed = self.listeners.values().map(|place| place.has).min().unwrap_or(u64::MAX);
        while self.gone < needed && self.forget() {}
    }

    fn forget(&mut self) -> bool {
        let Some(message) = self.ring.pop_front() else { return false };
        self.bytes -= message.size();
        self.gone += 1;
        true
    }

    /// Takes it that a listener wants nothing again of the kernels before this one that it was told.
    fn lets_go(&mut self, asker: &Asker) {
        let replaced = self.replaced;
        if let Some(place) = self.listeners.get_mut(asker).filter(|place| place.is_whole) {
            place.has = place.has.max(replaced.min(place.told));
            self.trim();
        }
    }

    fn forget_left(&mut self, time: Duration) {
        let now = Instant::now();
        self.listeners.retain(|_, place| place.number.is_some() || now < place.left_at + time);
        while self.listeners.len() - self.live() > MAX_LEFT {
            let left = self.listeners.iter().filter(|(_, place)| place.number.is_none());
            let Some(oldest) = left.min_by_key(|(_, place)| place.left_at).map(|(asker, _)| asker.clone()) else {
                break;
            };
            self.listeners.remove(&oldest);
        }
        self.trim();
    }
}

impl Tap {
    /// One that nobody listens to.
    #[must_use]
    pub fn new(bounds: TapBounds) -> Arc<Self> {
        let (is_open, inner, version) = (AtomicBool::new(false), Mutex::default(), watch::Sender::new(0));
        Arc::new(Self { bounds, is_open, inner, version })
    }

    /// Whether anybody listens, or may come back. Where not, nothing needs to be told.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.is_open.load(Ordering::Relaxed)
    }

    /// How many listen.
    #[must_use]
    pub fn listeners(&self) -> usize {
        self.inner().live()
    }

    /// How long messages are kept for who has left.
    #[must_use]
    pub fn patience(&self) -> Duration {
        self.bounds.time
    }

    /// Tells all, or the one that it is for.
    pub(super) fn tell(&self, message: Message) {
        let mut inner = self.inner();
        if !self.is_open() {
            return;
        }
        inner.bytes += message.size();
        inner.ring.push_back(Arc::new(message));
        while inner.bytes > self.bounds.bytes && inner.ring.len() > 1 && inner.forget() {}
        let last = inner.last();
        drop(inner);
        self.version.send_replace(last);
    }

    /// Takes note that the kernel is replaced: what was told so far is of the one before.
    pub(super) fn is_replaced(&self) {
        let mut inner = self.inner();
        inner.replaced = inner.last();
    }

    /// Says that nothing more comes.
    pub(super) fn fall_silent(&self, silence: Silence) {
        self.inner().silence.get_or_insert(silence);
        self.version.send_modify(|_| {});
    }

    /// Listens, from now on or from where the same name has left off. Nothing when `most` listen already.
    pub fn listen(self: &Arc<Self>, name: Option<&str>, most: usize) -> Option<Listener> {
        let number = Uuid::new_v4().as_u64_pair().0;
        let asker = name.map_or(Asker::Nameless(number), |name| Asker::Named(name.to_owned()));
        let mut inner = self.inner();
        inner.forget_left(self.bounds.time);
        let is_there = inner.listeners.get(&asker).is_some_and(|place| place.number.is_some());
        if !is_there && inner.live() >= most {
            return None;
        }
        let (last, gone) = (inner.last(), inner.gone);
        if is_there {
            // It may have taken leave just now, which is on its way.
            inner.lets_go(&asker);
        }
        let place = inner.listeners.entry(asker.clone()).or_insert(Place {
            number: None,
            left_at: Instant::now(),
            has: last,
            told: last,
            is_whole: false,
        });
        place.number = Some(number);
        if place.has < gone {
            (place.has, place.told, place.is_whole) = (last, last, false);
        }
        let (next, is_whole) = (place.has, place.is_whole);
        self.is_open.store(true, Ordering::Relaxed);
        drop(inner);
        // Who had the name looks up.
        self.version.send_modify(|_| {});
        Some(Listener { tap: Arc::clone(self), asker, number, next, is_whole, version: self.version.subscribe() })
    }

    fn leave(self: &Arc<Self>, asker: &Asker, number: u64) {
        let mut inner = self.inner();
        let is_own = |place: &&mut Place| place.number == Some(number);
        let Some(place) = inner.listeners.get_mut(asker).filter(is_own) else { return };
        (place.number, place.left_at) = (None, Instant::now());
        if matches!(asker, Asker::Nameless(_)) {
            inner.listeners.remove(asker);
        }
        inner.trim();
        if inner.live() == 0 && !std::mem::replace(&mut inner.is_watched, true) {
            task::spawn("tap", Arc::clone(self).close_when_left());
        }
    }

    /// Closes when nobody has come back in time.
    async fn close_when_left(self: Arc<Self>) {
        loop {
            let until = {
                let mut inner = self.inner();
                inner.forget_left(self.bounds.time);
                let until = inner.listeners.values().map(|place| place.left_at + self.bounds.time).max();
                match until {
                    Some(until) if inner.live() == 0 && inner.silence.is_none() => until,
                    _ => {
                        inner.is_watched = false;
                        if inner.live() == 0 {
                            self.is_open.store(false, Ordering::Relaxed);
                            inner.gone = inner.last();
                            (inner.ring, inner.bytes) = (VecDeque::new(), 0);
                        }
                        return;
                    }
                }
            };
            let mut version = self.version.subscribe();
            // A session that ends meanwhile is not kept for it.
            let ends = version.wait_for(|_| self.inner().silence.is_some());
            let _ = tokio::time::timeout_at(until.into(), ends).await;
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // It is whole between its statements, so a panic elsewhere leaves nothing half done.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody who listens.
#[derive(Debug)]
pub struct Listener {
    tap: Arc<Tap>,
    /// Who it is.
    pub asker: Asker,
    number: u64,
    next: u64,
    /// It hears all that it has not heard under this name. Else something was not kept for it, or there was nobody of its name.
    pub is_whole: bool,
    version: watch::Receiver<u64>,
}

impl Listener {
    /// The next messages, of about so many bytes at most. Safe to drop and call again.
    pub async fn hear(&mut self, bytes: usize) -> Heard {
        loop {
            self.version.mark_unchanged();
            if let Some(heard) = self.try_hear(bytes) {
                return heard;
            }
            // The sender lives in the tap, so this can't fail.
            let _ = self.version.changed().await;
        }
    }

    fn try_hear(&mut self, most: usize) -> Option<Heard> {
        let mut inner = self.tap.inner();
        let is_own = inner.listeners.get(&self.asker).is_some_and(|place| place.number == Some(self.number));
        if !is_own {
            return Some(Heard::Replaced);
        }
        if self.next < inner.gone {
            return Some(Heard::Behind);
        }
        let (mut messages, mut bytes) = (Vec::new(), 0);
        let from = usize::try_from(self.next - inner.gone).unwrap_or(usize::MAX);
        for message in inner.ring.iter().skip(from) {
            if bytes >= most {
                break;
            }
            self.next += 1;
            if message.only.as_ref().is_none_or(|only| *only == self.asker) {
                bytes += message.size();
                messages.push(Arc::clone(message));
            }
        }
        if let Some(place) = inner.listeners.get_mut(&self.asker) {
            place.told = self.next;
        }
        if matches!(self.asker, Asker::Nameless(_)) {
            // It can't come back for anything.
            self.tap.has(&mut inner, &self.asker, self.next);
        }
        match (messages.is_empty(), inner.silence) {
            (false, _) => Some(Heard::Messages(messages, self.next)),
            (true, Some(silence)) => Some(Heard::Silence(silence)),
            (true, None) => None,
        }
    }

    /// It has what can be told of the time before it listened.
    pub fn is_made_whole(&mut self) {
        self.is_whole = true;
        self.has_all_to(0);
    }

    /// It is known to have all messages up to this number, and what it was told of the time before it listened.
    pub fn has_all_to(&self, number: u64) {
        let mut inner = self.tap.inner();
        let place = inner.listeners.get_mut(&self.asker).filter(|place| place.number == Some(self.number));
        if let Some(place) = place {
            place.is_whole = true;
            self.tap.has(&mut inner, &self.asker, number.min(self.next));
        }
    }

    /// It leaves of its own will, and may come back. Of the kernel before this one it hears nothing again that it was told: who is told that a kernel is replaced
    /// drops what it had of it and opens another connection, and would do so for ever if it were told once more.
    pub fn takes_leave(&self) {
        let mut inner = self.tap.inner();
        if inner.listeners.get(&self.asker).is_some_and(|place| place.number == Some(self.number)) {
            inner.lets_go(&self.asker);
        }
    }

    /// The number of the newest message that it was told.
    #[must_use]
    pub fn told(&self) -> u64 {
        self.next
    }
}

impl Tap {
    fn has(&self, inner: &mut Inner, asker: &Asker, number: u64) {
        if let Some(place) = inner.listeners.get_mut(asker)
            && place.has < number
        {
            place.has = number;
            inner.trim();
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.tap.leave(&self.asker, self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUNDS: TapBounds = TapBounds { bytes: 10 * (OVERHEAD + 10), time: Duration::from_secs(60) };

    fn message(n: usize, only: Option<Asker>) -> Message {
        let parts = vec![Bytes::from(format!("{n:010}"))];
        let (msg_id, msg_type) = (n.to_string(), "stream".to_owned());
        Message { channel: Channel::Iopub, msg_type, msg_id, parts, of: None, only }
    }

    fn ids(heard: Option<Heard>) -> Vec<String> {
        match heard {
            Some(Heard::Messages(messages, _)) => messages.iter().map(|message| message.msg_id.clone()).collect(),
            None => Vec::new(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn who_takes_leave_hears_nothing_again_of_a_kernel_that_was_replaced() {
        let tap = Tap::new(BOUNDS);
        let mut first = tap.listen(Some("a"), 9).unwrap();
        let mut cut = tap.listen(Some("b"), 9).unwrap();
        first.is_made_whole();
        cut.is_made_whole();
        (1..=2).for_each(|n| tap.tell(message(n, None)));
        tap.is_replaced();
        tap.tell(message(3, None));
        assert_eq!(ids(first.try_hear(1)), ["1"]);
        first.takes_leave();
        drop(first);
        let mut first = tap.listen(Some("a"), 9).unwrap();
        assert_eq!(ids(first.try_hear(usize::MAX)), ["2", "3"], "what it was never told is told");
        assert_eq!(ids(cut.try_hear(usize::MAX)), ["1", "2", "3"]);
        first.takes_leave();
        drop((first, cut));
        assert_eq!(ids(tap.listen(Some("a"), 9).unwrap().try_hear(usize::MAX)), ["3"]);
        let mut cut = tap.listen(Some("b"), 9).unwrap();
        assert_eq!(ids(cut.try_hear(usize::MAX)), ["1", "2", "3"], "it was cut off");
        let mut again = tap.listen(Some("b"), 9).unwrap();
        assert_eq!(ids(again.try_hear(usize::MAX)), ["3"], "it was there still, as far as is known");
    }

    #[tokio::test]
    async fn who_was_not_told_of_the_time_before_lets_nothing_go() {
        let tap = Tap::new(BOUNDS);
        let mut early = tap.listen(Some("a"), 9).unwrap();
        tap.tell(message(1, None));
        tap.is_replaced();
        assert_eq!(ids(early.try_hear(usize::MAX)), ["1"]);
        early.takes_leave();
        drop(early);
        assert_eq!(ids(tap.listen(Some("a"), 9).unwrap().try_hear(usize::MAX)), ["1"]);
    }

    #[tokio::test]
    async fn nothing_is_kept_before_somebody_listens_and_a_name_goes_on_where_it_was_known_to_be() {
        let tap = Tap::new(BOUNDS);
        tap.tell(message(0, None));
        assert_eq!(tap.inner().ring.len(), 0);
        let mut first = tap.listen(Some("a"), 9).unwrap();
        assert!(!first.is_whole);
        first.is_made_whole();
        (1..=4).for_each(|n| tap.tell(message(n, None)));
        assert_eq!(ids(first.try_hear(1)), ["1"], "about so many bytes");
        assert_eq!(ids(first.try_hear(usize::MAX)), ["2", "3", "4"]);
        first.has_all_to(2);
        assert_eq!(tap.inner().ring.len(), 2, "what all have is forgotten");
        drop(first);
        tap.tell(message(5, None));
        let mut again = tap.listen(Some("a"), 9).unwrap();
        assert!(again.is_whole);
        assert_eq!(ids(again.try_hear(usize::MAX)), ["3", "4", "5"]);
        let mut third = tap.listen(Some("a"), 9).unwrap();
        assert_eq!(again.hear(1).await, Heard::Replaced);
        drop(again);
        assert_eq!((ids(third.try_hear(usize::MAX)).len(), tap.listeners()), (3, 1));
        tap.fall_silent(Silence::Left);
        assert_eq!(third.hear(1).await, Heard::Silence(Silence::Left));
    }

    #[tokio::test]
    async fn it_closes_when_nobody_comes_back() {
        let tap = Tap::new(TapBounds { time: Duration::from_millis(50), ..BOUNDS });
        drop(tap.listen(Some("a"), 9).unwrap());
        tap.tell(message(1, None));
        assert!(tap.is_open() && tap.inner().ring.len() == 1);
        let began = Instant::now();
        while tap.is_open() {
            assert!(began.elapsed() < Duration::from_secs(10), "it stays open");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(began.elapsed() >= Duration::from_millis(40) && tap.inner().ring.is_empty());
        assert!(!tap.listen(Some("a"), 9).unwrap().is_whole, "it is forgotten");
    }

    #[tokio::test]
    async fn who_is_behind_is_told_so_and_there_are_only_so_many() {
        let tap = Tap::new(BOUNDS);
        let (mut slow, mut quick) = (tap.listen(None, 2).unwrap(), tap.listen(Some("q"), 2).unwrap());
        assert!(tap.listen(Some("r"), 2).is_none() && tap.listen(Some("q"), 2).is_some());
        let mut quick_again = tap.listen(Some("q"), 2).unwrap();
        for n in 0..30 {
            tap.tell(message(n, (n % 2 == 1).then(|| slow.asker.clone())));
            ids(quick_again.try_hear(usize::MAX));
        }
        assert!(tap.inner().bytes <= BOUNDS.bytes);
        assert_eq!(slow.hear(1).await, Heard::Behind);
        assert_eq!(quick.hear(1).await, Heard::Replaced);
    }

    proptest! {
        #[test]
        fn a_name_that_comes_back_misses_nothing_and_hears_nothing_twice_that_it_was_known_to_have(
            steps in proptest::collection::vec((0usize..4, 0u64..30), 1..60),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let _inside = runtime.enter();
            let tap = Tap::new(TapBounds { bytes: 1 << 20, ..BOUNDS });
            let mut listener = tap.listen(Some("a"), 1);
            listener.as_mut().unwrap().is_made_whole();
            let (mut told, mut heard, mut has) = (0, Vec::new(), 0);
            for (step, n) in steps {
                match (step, &mut listener) {
                    (0, _) => { told += 1; tap.tell(message(told, None)); }
                    (1, Some(listener)) => heard.extend(ids(listener.try_hear(usize::MAX)).iter().map(|id| id.parse::<u64>().unwrap())),
                    (2, Some(listener)) => { listener.has_all_to(n); has = has.max(n.min(listener.told())); }
                    (3, some) if some.is_some() => *some = None,
                    (_, none) => {
                        let mut again = tap.listen(Some("a"), 1).unwrap();
                        prop_assert!(again.is_whole);
                        let missed: Vec<u64> = ids(again.try_hear(usize::MAX)).iter().map(|id| id.parse().unwrap()).collect();
                        prop_assert_eq!(&missed, &(has + 1..=told as u64).collect::<Vec<_>>());
                        heard.extend(missed);
                        *none = Some(again);
                    }
                }
            }
            heard.sort_unstable();
            heard.dedup();
            prop_assert_eq!(&heard, &(1..=heard.len() as u64).collect::<Vec<_>>());
        }
    }
}
