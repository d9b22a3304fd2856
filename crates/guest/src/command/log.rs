//! What a command has put out: numbered events that any number of followers read, each from where it likes, and the bounds of what is kept.
//!
//! Nobody who reads slowly or not at all holds the command up: of output that is too much, head and tail are kept and the rest is counted; of a
//! terminal's, the end. Reads no pipe.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use cellblock_wire::commands::{CommandEnd, CommandEvent, CommandStream, NumberedCommandEvent, Totals};
use cellblock_wire::frame;
use futures_util::Stream;
use tokio::sync::watch;

/// What one event costs beside its bytes.
const OVERHEAD: usize = 128;
/// Output that nobody has been told yet is added to up to this length.
const PIECE: usize = 32 * 1024;
/// Most events with output of one command: above it, output counts as too much.
const MAX_EVENTS: usize = 20_000;
/// So much of a stream's end is kept even when there is no room for more.
const MIN_TAIL: usize = 4 * 1024;
/// So much is told in one chunk, or one event.
const CHUNK: usize = 64 * 1024;
/// Most bytes of one stream that are ever kept, whatever was asked for.
const MAX_TEXT: u64 = 1024 * 1024;

/// The memory of all logs together. Clones are the same.
#[derive(Debug, Clone)]
pub struct Budget {
    used: Arc<AtomicUsize>,
    limit: usize,
}

impl Budget {
    /// So many bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { used: Arc::default(), limit }
    }

    /// Takes some, if there is as much. The guest has one thread.
    pub fn take(&self, bytes: usize) -> bool {
        let fits = self.used.load(Ordering::Relaxed) + bytes <= self.limit;
        if fits {
            self.used.fetch_add(bytes, Ordering::Relaxed);
        }
        fits
    }

    /// Gives some back.
    pub fn give(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// What is left.
    #[must_use]
    pub fn left(&self) -> usize {
        self.limit.saturating_sub(self.used.load(Ordering::Relaxed))
    }
}

/// What is kept of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Head and tail of each stream, so many bytes together.
    HeadAndTail(u64),
    /// The last so many bytes.
    End(u64),
}

struct Entry {
    event: CommandEvent,
    bytes: Vec<u8>,
}

/// What becomes of one stream.
#[derive(Default)]
struct Kept {
    total: u64,
    told: u64,
    /// Its head is full, or there was no room for more.
    is_cut: bool,
    tail: VecDeque<u8>,
    tail_limit: usize,
    /// Bytes of a character whose rest is still to come.
    partial: Vec<u8>,
}

struct Inner {
    entries: VecDeque<Entry>,
    /// The number of the first entry.
    first: u64,
    /// The newest event that anybody was told.
    told: u64,
    stdout: Kept,
    stderr: Kept,
    /// Bytes of the budget that this log has.
    taken: usize,
    /// Bytes of output that a terminal's log has let go.
    gone: u64,
    end: Option<CommandEnd>,
}

/// A command's log.
pub struct Log {
    inner: Mutex<Inner>,
    keep: Keep,
    budget: Budget,
    changed: watch::Sender<()>,
}

impl Log {
    /// An empty one.
    #[must_use]
    pub fn new(keep: Keep, budget: Budget) -> Self {
        let kept = |limit: u64| Kept { tail_limit: (limit.min(MAX_TEXT) / 4) as usize, ..Kept::default() };
        let (stdout, stderr) = match keep {
            Keep::HeadAndTail(bytes) => (kept(bytes), kept(bytes)),
            Keep::End(_) => (Kept::default(), Kept::default()),
        };
        let entries = VecDeque::new();
        let inner = Inner { entries, first: 1, told: 0, stdout, stderr, taken: 0, gone: 0, end: None };
        Self { inner: Mutex::new(inner), keep, budget, changed: watch::channel(()).0 }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It runs.
    pub fn started(&self, pid: i32) {
        self.lock().put(&self.budget, CommandEvent::Started { pid }, Vec::new());
        self.changed.send_replace(());
    }

    /// It has put out something. After its end, nothing is taken any more.
    pub fn output(&self, stream: CommandStream, bytes: &[u8]) {
        let mut inner = self.lock();
        if inner.end.is_some() || bytes.is_empty() {
            return;
        }
        match self.keep {
            Keep::HeadAndTail(limit) => inner.output(&self.budget, stream, bytes, limit.min(MAX_TEXT)),
            Keep::End(limit) => inner.scroll(&self.budget, bytes, limit.min(MAX_TEXT) as usize),
        }
        drop(inner);
        self.changed.send_replace(());
    }

    /// It has ended: tells the tails, and how it ended. Says once.
    pub fn end(&self, end: CommandEnd) {
        let mut inner = self.lock();
        if inner.end.is_some() {
            return;
        }
        if let Keep::HeadAndTail(_) = self.keep {
            for stream in [CommandStream::Stdout, CommandStream::Stderr] {
                inner.tell_tail(&self.budget, stream);
            }
        }
        let (stdout, stderr) = inner.totals(self.keep);
        inner.put(&self.budget, CommandEvent::Ended { end, stdout, stderr }, Vec::new());
        inner.end = Some(end);
        drop(inner);
        self.changed.send_replace(());
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn ending(&self) -> Option<CommandEnd> {
        self.lock().end
    }

    /// Totals of stdout and stderr, and the number of the newest event.
    #[must_use]
    pub fn totals(&self) -> (Totals, Totals, u64) {
        let inner = self.lock();
        let (stdout, stderr) = inner.totals(self.keep);
        (stdout, stderr, inner.next() - 1)
    }

    /// Frames of the events after number `after`, and of new ones as they come, to the last one; or only of those that are there.
    pub fn follow(self: &Arc<Self>, after: u64, is_waiting: bool) -> impl Stream<Item = Bytes> + Send + use<> {
        let changed = self.changed.subscribe();
        let mut inner = self.lock();
        // Who asks from the newest event on has heard of it: what comes now is no part of that.
        if after == inner.next() - 1 {
            inner.told = inner.told.max(after);
        }
        drop(inner);
        let state = (Arc::clone(self), changed, after.saturating_add(1));
        futures_util::stream::unfold(state, move |(log, mut changed, mut next)| async move {
            loop {
                changed.mark_unchanged();
                let (chunk, is_over) = log.read(&mut next);
                if !chunk.is_empty() {
                    return Some((chunk, (log, changed, next)));
                }
                if is_over || !is_waiting || changed.changed().await.is_err() {
                    return None;
                }
            }
        })
    }

    /// The next events as frames, and whether there are no more to come behind them.
    fn read(&self, next: &mut u64) -> (Bytes, bool) {
        let mut inner = self.lock();
        let mut chunk = BytesMut::new();
        if *next < inner.first {
            // Only a terminal's log lets go of what it had.
            let (total_bytes, omitted_bytes) = (inner.stdout.total, inner.gone);
            let event = CommandEvent::Gap { stream: CommandStream::Stdout, total_bytes, omitted_bytes };
            encode(inner.first - 1, event, &[], &mut chunk);
            *next = inner.first;
        }
        let index = usize::try_from(*next - inner.first).unwrap_or(usize::MAX);
        for entry in inner.entries.iter().skip(index) {
            encode(*next, entry.event.clone(), &entry.bytes, &mut chunk);
            *next += 1;
            if chunk.len() >= CHUNK {
                break;
            }
        }
        // Who waits for the end only, far behind all there is, was told nothing.
        if !chunk.is_empty() {
            inner.told = inner.told.max(*next - 1);
        }
        (chunk.freeze(), inner.end.is_some() && *next >= inner.next())
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.budget.give(self.lock().taken);
    }
}

fn encode(seq: u64, event: CommandEvent, bytes: &[u8], chunk: &mut BytesMut) {
    let parts: &[Bytes] = &if bytes.is_empty() { Vec::new() } else { vec![Bytes::copy_from_slice(bytes)] };
    // Within every bound of a frame, so this can't fail.
    let _ = frame::encode(&NumberedCommandEvent { seq, event }, parts, chunk);
}

impl Inner {
    fn next(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    fn totals(&self, keep: Keep) -> (Totals, Totals) {
        let totals = |kept: &Kept| {
            let known = kept.told + (kept.tail.len() + kept.partial.len()) as u64;
            Totals { bytes: kept.total, omitted: kept.total.saturating_sub(known) }
        };
        let mut stdout = totals(&self.stdout);
        if matches!(keep, Keep::End(_)) {
            stdout.omitted = self.gone;
        }
        (stdout, totals(&self.stderr))
    }

    fn kept(&mut self, stream: CommandStream) -> &mut Kept {
        match stream {
            CommandStream::Stdout => &mut self.stdout,
            CommandStream::Stderr => &mut self.stderr,
        }
    }

    fn take(&mut self, budget: &Budget, bytes: usize) -> bool {
        let taken = budget.take(bytes);
        self.taken += if taken { bytes } else { 0 };
        taken
    }

    /// Appends an event. Those that are few come even if there is no room.
    fn put(&mut self, budget: &Budget, event: CommandEvent, bytes: Vec<u8>) {
        let _ = self.take(budget, OVERHEAD);
        self.entries.push_back(Entry { event, bytes });
    }

    /// Appends output, to what was not told yet if it can; false when there is no room.
    fn append(&mut self, budget: &Budget, stream: CommandStream, bytes: &[u8]) -> bool {
        let is_untold = self.next() - 1 > self.told;
        let last = self.entries.back().filter(|last| {
            let is_same = matches!(last.event, CommandEvent::Output { stream: of } if of == stream);
            is_untold && is_same && last.bytes.len() + bytes.len() <= PIECE
        });
        let is_new = last.is_none();
        if is_new && self.entries.len() >= MAX_EVENTS {
            return false;
        }
        if !self.take(budget, bytes.len() + if is_new { OVERHEAD } else { 0 }) {
            return false;
        }
        match self.entries.back_mut().filter(|_| !is_new) {
            Some(last) => last.bytes.extend_from_slice(bytes),
            None => self.entries.push_back(Entry { event: CommandEvent::Output { stream }, bytes: bytes.to_vec() }),
        }
        true
    }

    fn output(&mut self, budget: &Budget, stream: CommandStream, bytes: &[u8], limit: u64) {
        let kept = self.kept(stream);
        kept.total += bytes.len() as u64;
        if kept.is_cut {
            return self.keep_tail(budget, stream, bytes);
        }
        let mut whole = std::mem::take(&mut kept.partial);
        whole.extend_from_slice(bytes);
        let head_left = usize::try_from((limit - limit / 4).saturating_sub(kept.told)).unwrap_or(usize::MAX);
        let is_over = whole.len() > head_left;
        let fits = whole.len().min(head_left);
        let fits = fits - cut_character(&whole[..fits]);
        if fits > 0 {
            if !self.append(budget, stream, &whole[..fits]) {
                self.kept(stream).is_cut = true;
                return self.keep_tail(budget, stream, &whole);
            }
            self.kept(stream).told += fits as u64;
        }
        let kept = self.kept(stream);
        if is_over {
            kept.is_cut = true;
            // What the head has not used is the tail's.
            kept.tail_limit = usize::try_from(limit.saturating_sub(kept.told)).unwrap_or(usize::MAX);
            self.keep_tail(budget, stream, &whole[fits..]);
        } else {
            kept.partial = whole.split_off(fits);
        }
    }

    fn keep_tail(&mut self, budget: &Budget, stream: CommandStream, bytes: &[u8]) {
        let kept = self.kept(stream);
        let (limit, has) = (kept.tail_limit, kept.tail.len());
        let bytes = &bytes[bytes.len().saturating_sub(limit)..];
        let wanted = (has + bytes.len()).min(limit);
        let more = wanted.saturating_sub(has.max(MIN_TAIL.min(limit)));
        // Without room for more, what comes pushes out what there is.
        let most = if more == 0 || self.take(budget, more) { wanted } else { has.max(MIN_TAIL.min(limit)) };
        let kept = self.kept(stream);
        let bytes = &bytes[bytes.len().saturating_sub(most)..];
        kept.tail.drain(..(has + bytes.len()).saturating_sub(most).min(has));
        kept.tail.extend(bytes);
    }

    /// The gap, if there is one, and the tail behind it, from its first whole character on.
    fn tell_tail(&mut self, budget: &Budget, stream: CommandStream) {
        let kept = self.kept(stream);
        let mut rest = std::mem::take(&mut kept.partial);
        rest.extend(std::mem::take(&mut kept.tail));
        if kept.total > kept.told + rest.len() as u64 {
            let start = rest.iter().take(3).take_while(|byte| **byte & 0xc0 == 0x80).count();
            rest.drain(..start);
        }
        kept.told += rest.len() as u64;
        let (total_bytes, omitted_bytes) = (kept.total, kept.total - kept.told);
        if omitted_bytes > 0 {
            self.put(budget, CommandEvent::Gap { stream, total_bytes, omitted_bytes }, Vec::new());
        }
        for piece in rest.chunks(CHUNK) {
            self.put(budget, CommandEvent::Output { stream }, piece.to_vec());
        }
    }

    /// Keeps the end of a terminal's output.
    fn scroll(&mut self, budget: &Budget, bytes: &[u8], limit: usize) {
        self.stdout.total += bytes.len() as u64;
        while !self.append(budget, CommandStream::Stdout, bytes) {
            if !self.let_go(budget) {
                // There is no room at all: what comes is counted only.
                self.gone += bytes.len() as u64;
                return;
            }
        }
        while self.stdout.total - self.gone > limit as u64 && self.entries.len() > 1 && self.let_go(budget) {}
    }

    /// Forgets a terminal's oldest output, whole events of it.
    fn let_go(&mut self, budget: &Budget) -> bool {
        let Some(oldest) = self.entries.pop_front() else { return false };
        self.first += 1;
        self.gone += oldest.bytes.len() as u64;
        let size = (OVERHEAD + oldest.bytes.len()).min(self.taken);
        self.taken -= size;
        budget.give(size);
        true
    }
}

/// How many bytes at the end are the beginning of a character whose rest is missing.
fn cut_character(bytes: &[u8]) -> usize {
    for back in 1..=bytes.len().min(3) {
        let byte = bytes[bytes.len() - back];
        let length = match byte {
            0x80..=0xbf => continue,
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            _ => return 0,
        };
        return if length > back { back } else { 0 };
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use cellblock_wire::frame::{Decoder, Frame};
    use futures_util::StreamExt;
    use proptest::prelude::*;

    const OUT: CommandStream = CommandStream::Stdout;

    fn log(keep: Keep) -> (Arc<Log>, Budget) {
        let budget = Budget::new(16 * 1024 * 1024);
        (Arc::new(Log::new(keep, budget.clone())), budget)
    }

    fn read(log: &Arc<Log>, after: u64) -> Vec<Frame<NumberedCommandEvent>> {
        let mut decoder = Decoder::default();
        let mut next = after + 1;
        loop {
            let (chunk, _) = log.read(&mut next);
            decoder.push(&chunk);
            if chunk.is_empty() {
                break;
            }
        }
        std::iter::from_fn(|| decoder.next_frame().unwrap()).collect()
    }

    fn text(frames: &[Frame<NumberedCommandEvent>]) -> Vec<u8> {
        frames.iter().flat_map(|frame| frame.parts.iter().flatten().copied()).collect()
    }

    #[tokio::test]
    async fn who_asks_from_now_on_hears_what_comes() {
        let (log, _) = log(Keep::HeadAndTail(1000));
        log.output(OUT, b"before");
        let (.., newest) = log.totals();
        let mut events = Box::pin(log.follow(newest, true));
        log.output(OUT, b"after");
        let mut decoder = Decoder::default();
        decoder.push(&events.next().await.unwrap());
        let frame: Frame<NumberedCommandEvent> = decoder.next_frame().unwrap().unwrap();
        assert_eq!((frame.head.seq, text(&[frame])), (newest + 1, b"after".to_vec()));
    }

    proptest! {
        #[test]
        fn what_is_told_and_what_is_left_out_is_all_there_was(
            pieces in proptest::collection::vec("[aé€😀]{0,40}", 0..60), limit in 8u64..600,
        ) {
            let (log, budget) = log(Keep::HeadAndTail(limit));
            let all: String = pieces.concat();
            for (number, piece) in all.as_bytes().chunks(7).enumerate() {
                log.output(OUT, piece);
                if number % 3 == 0 {
                    let _ = read(&log, 0);
                }
            }
            log.end(CommandEnd::default());
            let frames = read(&log, 0);
            let gap = frames.iter().find_map(|frame| match frame.head.event {
                CommandEvent::Gap { total_bytes, omitted_bytes, .. } => Some((total_bytes, omitted_bytes)),
                _ => None,
            });
            let told = text(&frames);
            match gap {
                None => prop_assert_eq!(&told, all.as_bytes()),
                Some((total, omitted)) => {
                    prop_assert!(all.len() as u64 > limit - 8 && told.len() as u64 <= limit);
                    prop_assert_eq!((total, omitted), (all.len() as u64, (all.len() - told.len()) as u64));
                }
            }
            for frame in &frames {
                prop_assert!(frame.parts.iter().all(|part| std::str::from_utf8(part).is_ok()));
            }
            let seqs: Vec<u64> = frames.iter().map(|frame| frame.head.seq).collect();
            prop_assert_eq!(seqs, (1..=frames.len() as u64).collect::<Vec<_>>());
            drop(log);
            prop_assert_eq!(budget.left(), 16 * 1024 * 1024);
        }

        #[test]
        fn no_bytes_break_it(pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..40), limit in 1u64..300) {
            for keep in [Keep::HeadAndTail(limit), Keep::End(limit)] {
                let (log, budget) = log(keep);
                pieces.iter().for_each(|piece| log.output(OUT, piece));
                log.end(CommandEnd::default());
                let told = text(&read(&log, 0)).len() as u64;
                let (totals, ..) = log.totals();
                prop_assert_eq!(totals.bytes, told + totals.omitted);
                drop(log);
                prop_assert_eq!(budget.left(), 16 * 1024 * 1024);
            }
        }
    }

    #[tokio::test]
    async fn followers_begin_where_they_like_and_hear_the_end() {
        let (log, _) = log(Keep::HeadAndTail(1000));
        log.started(7);
        log.output(OUT, b"one");
        assert_eq!(text(&read(&log, 0)), b"one");
        let follow = Box::pin(log.follow(2, true));
        log.output(OUT, b"two");
        log.output(OUT, b"three");
        log.end(CommandEnd { status: Some(3), ..CommandEnd::default() });
        let chunks: Vec<Bytes> = follow.collect().await;
        let mut decoder = Decoder::default();
        chunks.iter().for_each(|chunk| decoder.push(chunk));
        let frames: Vec<Frame<NumberedCommandEvent>> = std::iter::from_fn(|| decoder.next_frame().unwrap()).collect();
        assert_eq!((text(&frames).as_slice(), frames[0].head.seq), (&b"twothree"[..], 3), "untold output is one event");
        assert!(matches!(frames[1].head.event, CommandEvent::Ended { end, .. } if end.status == Some(3)));
    }

    #[test]
    fn a_terminals_end_is_kept_and_the_rest_is_counted() {
        let (log, _) = log(Keep::End(1000));
        log.started(7);
        for number in 0..500 {
            log.output(OUT, format!("{number:>9}\n").as_bytes());
            let _ = read(&log, 0);
        }
        let frames = read(&log, 0);
        let CommandEvent::Gap { total_bytes, omitted_bytes, .. } = frames[0].head.event else { panic!("a gap") };
        let told = text(&frames);
        assert_eq!((total_bytes, omitted_bytes), (5000, 5000 - told.len() as u64));
        assert!(told.len() <= 1000 && told.len() > 900 && told.ends_with(b"499\n"));
    }

    #[test]
    fn without_room_heads_are_cut_and_tails_stay_small() {
        let budget = Budget::new(10_000);
        let log = Arc::new(Log::new(Keep::HeadAndTail(1024 * 1024), budget.clone()));
        for _ in 0..100 {
            log.output(OUT, &[b'x'; 1000]);
            let _ = read(&log, 0);
        }
        assert!(budget.left() < 1200);
        log.end(CommandEnd::default());
        let told = text(&read(&log, 0)).len() as u64;
        assert_eq!(log.totals().0, Totals { bytes: 100_000, omitted: 100_000 - told });
        assert!(told < 20_000, "{told}");
    }
}
