//! What changes in folders of sessions: as it happens, and kept for those who come for it from time to time. A watch that nobody comes to for long is over, since
//! a session is in use as long as there is one.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use cellblock_wire::files::{Event, Watch};
use http_body_util::BodyExt;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::keys::Principal;
use super::transfer::Pieces;
use super::{Error, Service};
use crate::domain::ids::SessionId;
use crate::task;

/// Longest event of a guest's: two paths, each byte of which may take six.
const MAX_LINE: usize = 64 * 1024;
/// Kept watches of one session at once.
const MAX_KEPT: usize = 32;
/// Events that wait for who comes for them, and bytes of their paths.
const MAX_WAITING: (usize, usize) = (4096, 512 * 1024);
/// One that nobody has come to for so long is over.
const FORGOTTEN: Duration = Duration::from_secs(3600);

/// The events of a watch, as they come.
#[derive(Debug)]
pub struct Changes {
    pieces: Pieces,
    lines: Lines,
}

impl Changes {
    /// The next event; nothing behind the last, and what is none counts as that. Safe to drop and call again.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(line) = self.lines.next() {
                return serde_json::from_slice(&line).ok();
            }
            if self.lines.buffer.len() > MAX_LINE {
                return None;
            }
            let piece = self.pieces.frame().await?.ok()?.into_data().ok()?;
            self.lines.buffer.extend_from_slice(&piece);
        }
    }
}

/// Lines that come in pieces, however small: each byte is looked at once.
#[derive(Debug, Default)]
struct Lines {
    buffer: BytesMut,
    /// Bytes at its beginning that hold no line's end.
    looked: usize,
}

impl Lines {
    fn next(&mut self) -> Option<BytesMut> {
        let looked = std::mem::replace(&mut self.looked, self.buffer.len());
        let end = looked + self.buffer[looked..].iter().position(|byte| *byte == b'\n')? + 1;
        self.looked = 0;
        Some(self.buffer.split_to(end))
    }
}

/// A watch that is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WatchId(Uuid);

impl std::fmt::Display for WatchId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.simple().fmt(f)
    }
}

impl std::str::FromStr for WatchId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        text.parse().map(Self)
    }
}

#[derive(Debug)]
struct Waiting {
    events: VecDeque<Event>,
    bytes: usize,
    /// Some were lost since somebody came.
    is_lost: bool,
    came: Instant,
}

#[derive(Debug)]
struct Kept {
    session: SessionId,
    waiting: Mutex<Waiting>,
    stop: CancellationToken,
}

impl Kept {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, event: Event) {
        let mut waiting = self.lock();
        let bytes = match &event {
            Event::Watching { .. } => return,
            Event::Overflow => {
                waiting.is_lost = true;
                return;
            }
            Event::Created { path, .. } | Event::Modified { path } | Event::Deleted { path } => path.len(),
            Event::Moved { path, to } => path.len() + to.len(),
        };
        if waiting.events.len() == MAX_WAITING.0 || waiting.bytes + bytes > MAX_WAITING.1 {
            waiting.is_lost = true;
            return;
        }
        waiting.bytes += bytes;
        waiting.events.push_back(event);
    }

    /// How long it may still be left alone.
    fn left(&self) -> Option<Duration> {
        FORGOTTEN.checked_sub(self.lock().came.elapsed())
    }
}

/// All kept watches.
#[derive(Debug, Clone, Default)]
pub(super) struct Watches(Arc<Mutex<HashMap<WatchId, Arc<Kept>>>>);

impl Watches {
    fn lock(&self) -> MutexGuard<'_, HashMap<WatchId, Arc<Kept>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place.
    fn begin(&self, session: SessionId) -> Result<(WatchId, Arc<Kept>), Error> {
        let mut all = self.lock();
        if all.values().filter(|kept| kept.session == session).count() >= MAX_KEPT {
            return Err(Error::VisitsFull);
        }
        let waiting = Waiting { events: VecDeque::new(), bytes: 0, is_lost: false, came: Instant::now() };
        let kept = Kept { session, waiting: Mutex::new(waiting), stop: CancellationToken::new() };
        let (id, kept) = (WatchId(Uuid::new_v4()), Arc::new(kept));
        all.insert(id, Arc::clone(&kept));
        Ok((id, kept))
    }

    fn find(&self, session: SessionId, id: WatchId) -> Result<Arc<Kept>, Error> {
        self.lock().get(&id).filter(|kept| kept.session == session).cloned().ok_or(Error::NotFound("watcher"))
    }

    fn end(&self, id: WatchId) {
        if let Some(kept) = self.lock().remove(&id) {
            kept.stop.cancel();
        }
    }

    /// Listens until it is stopped, forgotten, or there is nothing more to hear.
    async fn listen(self, id: WatchId, kept: Arc<Kept>, mut changes: Changes) {
        while let Some(left) = kept.left() {
            tokio::select! {
                () = kept.stop.cancelled() => break,
                () = tokio::time::sleep(left) => {}
                event = changes.next() => match event {
                    Some(event) => kept.put(event),
                    None => break,
                },
            }
        }
        self.end(id);
    }
}

impl Service {
    /// What changes in a folder, for as long as somebody listens.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn changes(&self, who: &Principal, id: SessionId, asked: &Watch) -> Result<Changes, Error> {
        let pieces = self.watch_files(who, id, asked).await?;
        Ok(Changes { pieces, lines: Lines::default() })
    }

    /// Begins to keep what changes in a folder, from the moment on at which this answers.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn begin_watch(&self, who: &Principal, id: SessionId, asked: &Watch) -> Result<WatchId, Error> {
        self.session(who, id)?;
        let (watch, kept) = self.watches.begin(id)?;
        // Given back if its caller leaves at this moment.
        let begun = Begun { watches: self.watches.clone(), id: Some(watch) };
        let mut changes = self.changes(who, id, asked).await?;
        changes.next().await.ok_or(Error::GuestUnreachable)?;
        begun.stays();
        task::spawn("watch", self.watches.clone().listen(watch, kept, changes));
        Ok(watch)
    }

    /// What has changed since the last time, and whether something was lost meanwhile.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn watched(&self, who: &Principal, id: SessionId, watch: WatchId) -> Result<(Vec<Event>, bool), Error> {
        self.session(who, id)?;
        let kept = self.watches.find(id, watch)?;
        let mut waiting = kept.lock();
        (waiting.bytes, waiting.came) = (0, Instant::now());
        let is_lost = std::mem::take(&mut waiting.is_lost);
        Ok((std::mem::take(&mut waiting.events).into(), is_lost))
    }

    /// Ends a watch.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn end_watch(&self, who: &Principal, id: SessionId, watch: WatchId) -> Result<(), Error> {
        self.session(who, id)?;
        self.watches.find(id, watch)?;
        self.watches.end(watch);
        Ok(())
    }
}

/// A place that is given back unless it is taken.
struct Begun {
    watches: Watches,
    id: Option<WatchId>,
}

impl Begun {
    fn stays(mut self) {
        self.id = None;
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.watches.end(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(n: u128) -> SessionId {
        SessionId::from_uuid(Uuid::from_u128(n))
    }

    #[test]
    fn watches_are_their_sessions_and_not_too_many() {
        let watches = Watches::default();
        let ids: Vec<_> = (0..MAX_KEPT).map(|_| watches.begin(session(1)).unwrap().0).collect();
        assert!(watches.begin(session(1)).is_err() && watches.begin(session(2)).is_ok());
        assert!(watches.find(session(1), ids[0]).is_ok() && watches.find(session(2), ids[0]).is_err());
        watches.end(ids[0]);
        assert!(watches.find(session(1), ids[0]).is_err() && watches.begin(session(1)).is_ok());
        assert_eq!(ids[1].to_string().parse(), Ok(ids[1]));
    }

    #[test]
    fn what_nobody_comes_for_is_lost_within_bounds() {
        let watches = Watches::default();
        let (_, kept) = watches.begin(session(1)).unwrap();
        let event = |length| Event::Modified { path: "x".repeat(length) };
        let state = |kept: &Kept| {
            let waiting = kept.lock();
            (waiting.events.len(), waiting.is_lost)
        };
        (0..5000).for_each(|_| kept.put(event(1)));
        assert_eq!(state(&kept), (MAX_WAITING.0, true));
        {
            let mut waiting = kept.lock();
            waiting.events.clear();
            (waiting.bytes, waiting.is_lost) = (0, false);
        }
        (0..200).for_each(|_| kept.put(event(4000)));
        assert_eq!(state(&kept), (131, true));
    }

    #[test]
    fn lines_are_the_same_in_whatever_pieces_they_come() {
        let text = b"{\"a\": 1}\n\n{}\nrest";
        for step in 1..text.len() {
            let (mut lines, mut seen) = (Lines::default(), Vec::new());
            for piece in text.chunks(step) {
                lines.buffer.extend_from_slice(piece);
                seen.extend(std::iter::from_fn(|| lines.next()).map(|line| line.to_vec()));
            }
            assert_eq!(seen, [&b"{\"a\": 1}\n"[..], b"\n", b"{}\n"], "in pieces of {step}");
            assert_eq!(&lines.buffer[..], b"rest");
        }
    }

    #[test]
    fn many_lines_in_one_piece_and_a_line_in_many_pieces_cost_no_more_than_their_length() {
        let began = std::time::Instant::now();
        let mut lines = Lines::default();
        lines.buffer.extend_from_slice(&[b'\n'; 1 << 20]);
        assert_eq!(std::iter::from_fn(|| lines.next()).count(), 1 << 20);
        for _ in 0..200_000 {
            lines.buffer.extend_from_slice(b"x");
            assert!(lines.next().is_none());
        }
        // What looks at all of it again, or moves it, takes minutes.
        assert!(began.elapsed() < std::time::Duration::from_secs(5), "{:?}", began.elapsed());
    }
}
