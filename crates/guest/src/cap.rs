//! What an execution's output may cost: pure bookkeeping of head, tail and what was left out between them.
//!
//! Knows text and byte counts, nothing of messages or sockets. Text is cut at characters only.

use std::time::{Duration, Instant};

use cellblock_wire::link::OutputCap;

/// Most text of one stream that is ever let through for an execution, whatever was asked for. Bounds the guest's memory.
pub const MAX_TEXT: u64 = 8 * 1024 * 1024;
/// So much of a tail is told even when there is no room for more output.
const MIN_TAIL: usize = 64 * 1024;
/// Longest text of one relayed stream message.
pub const MAX_PIECE: usize = 256 * 1024;
/// Nanoseconds of a second.
const NANOS: u64 = 1_000_000_000;

/// Keeps the last bytes of a text of any length.
#[derive(Debug, Default)]
struct Tail {
    bytes: Vec<u8>,
    limit: usize,
}

impl Tail {
    fn push(&mut self, text: &str) {
        let text = text.as_bytes();
        let text = &text[text.len().saturating_sub(self.limit)..];
        self.bytes.extend_from_slice(text);
        if self.bytes.len() > self.limit.saturating_mul(2) {
            self.trim();
        }
    }

    fn trim(&mut self) {
        self.bytes.drain(..self.bytes.len().saturating_sub(self.limit));
    }

    /// The kept text from its first whole character on; the tail is empty afterwards.
    fn take(&mut self) -> String {
        self.trim();
        let mut bytes = std::mem::take(&mut self.bytes);
        let start = bytes.iter().take_while(|b| **b & 0xc0 == 0x80).count();
        bytes.drain(..start);
        String::from_utf8(bytes).unwrap_or_default()
    }
}

/// The beginning and the end of a text of any length, taken in pieces.
#[derive(Debug)]
pub struct Capture {
    head: String,
    head_limit: usize,
    head_full: bool,
    tail: Tail,
    total: u64,
}

/// What a [`Capture`] kept.
#[derive(Debug, PartialEq, Eq)]
pub struct Captured {
    /// The text's beginning.
    pub head: String,
    /// Its end, where it did not fit whole into `head`.
    pub tail: String,
    /// Its length in bytes.
    pub total: u64,
}

impl Captured {
    /// No text.
    #[must_use]
    pub fn empty() -> Self {
        Self { head: String::new(), tail: String::new(), total: 0 }
    }
}

/// How much a [`Capture`] keeps, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CaptureLimits {
    /// At the beginning.
    pub head: usize,
    /// At the end.
    pub tail: usize,
}

impl Capture {
    /// An empty capture.
    #[must_use]
    pub fn new(limits: CaptureLimits) -> Self {
        let tail = Tail { bytes: Vec::new(), limit: limits.tail };
        Self { head: String::new(), head_limit: limits.head, head_full: false, tail, total: 0 }
    }

    /// Takes more text.
    pub fn push(&mut self, text: &str) {
        self.total += text.len() as u64;
        let mut rest = text;
        if !self.head_full {
            let (fits, over) = text.split_at(text.floor_char_boundary(self.head_limit - self.head.len()));
            self.head.push_str(fits);
            self.head_full = !over.is_empty();
            rest = over;
        }
        self.tail.push(rest);
    }

    /// What was kept.
    #[must_use]
    pub fn finish(mut self) -> Captured {
        Captured { head: self.head, tail: self.tail.take(), total: self.total }
    }
}

/// The allowance of one stream of one execution: three quarters are let through as they come, the last quarter is kept as tail.
#[derive(Debug)]
pub struct TextCap {
    cap: u64,
    relayed: u64,
    total: u64,
    cut: bool,
    tail: Tail,
}

/// What is said and sent of a stream when its execution ends.
#[derive(Debug, PartialEq, Eq)]
pub struct TextEnd {
    /// Text that was held back.
    pub tail: String,
    /// Bytes of the stream in all.
    pub total: u64,
    /// Bytes that stand neither in what was let through nor in `tail`.
    pub omitted: u64,
}

impl TextCap {
    fn new(cap: u64) -> Self {
        Self { cap: cap.min(MAX_TEXT), relayed: 0, total: 0, cut: false, tail: Tail::default() }
    }

    fn head_left(&self) -> usize {
        if self.cut { 0 } else { (self.cap - self.cap / 4).saturating_sub(self.relayed) as usize }
    }

    fn limits(&self) -> CaptureLimits {
        CaptureLimits { head: self.head_left(), tail: (self.cap / 4) as usize + 4 }
    }

    /// From now on nothing more is let through; a quarter of the allowance is kept.
    fn cut(&mut self) {
        if !self.cut {
            self.cut = true;
            let head = self.cap - self.cap / 4;
            let unused = if self.relayed + 4 > head { self.cap - self.relayed } else { self.cap / 4 };
            self.tail.limit = unused as usize;
        }
    }

    /// Takes text and returns how many of its first bytes may go on now, for which there is room.
    fn push(&mut self, text: &str, room: usize) -> usize {
        self.total += text.len() as u64;
        let fits = text.floor_char_boundary(self.head_left().min(room));
        self.relayed += fits as u64;
        if fits < text.len() {
            self.cut();
            self.tail.push(&text[fits..]);
        }
        fits
    }

    /// Takes a captured text and returns how much of its head, and of its tail, may go on now.
    fn take(&mut self, text: &Captured, room: usize) -> (usize, usize) {
        let head = self.push(&text.head, room);
        let left_out = text.total - (text.head.len() + text.tail.len()) as u64;
        if left_out > 0 {
            self.cut();
            self.total += left_out;
            self.tail.bytes.clear();
        }
        (head, self.push(&text.tail, room - head))
    }

    /// `left` is what the execution may still put out in all.
    fn finish(&mut self, room: usize, left: u64) -> Option<TextEnd> {
        if !self.cut {
            return None;
        }
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        self.tail.limit = self.tail.limit.min(room.max(MIN_TAIL)).min(left);
        let tail = self.tail.take();
        let omitted = self.total - self.relayed - tail.len() as u64;
        Some(TextEnd { tail, total: self.total, omitted })
    }
}

/// Which of the two streams a text belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Spreads messages over time: so many at once, and then so many a second.
#[derive(Debug)]
pub struct Pace {
    interval: Duration,
    burst: Duration,
    /// When all messages so far would have gone on, had they come at the rate from the first.
    paid: Option<Instant>,
}

impl Pace {
    /// The pace of so many messages a second, and no less than one.
    #[must_use]
    pub fn new(per_second: u64) -> Self {
        let interval = Duration::from_nanos(NANOS.div_ceil(per_second.max(1)));
        let burst = interval.saturating_mul(u32::try_from(per_second).unwrap_or(u32::MAX).max(1));
        Self { interval, burst, paid: None }
    }

    /// Takes messages that go on together and returns when, unless it is now.
    pub fn take(&mut self, messages: u64, now: Instant) -> Option<Instant> {
        let cost = self.interval.saturating_mul(u32::try_from(messages).unwrap_or(u32::MAX));
        let paid = self.paid.unwrap_or(now).max(now) + cost;
        self.paid = Some(paid);
        paid.checked_sub(self.burst).filter(|due| *due > now)
    }
}

/// Text is printed for nobody once it is cut. Who goes on with that for so long …
const VOID_PATIENCE: Duration = Duration::from_secs(10);
/// … prints so many bytes a second from then on, and waits the rest of the time instead of working on it …
const VOID_RATE: f64 = 256.0 * 1024.0;
/// … but for each message no longer than this, so that an end is never far.
const VOID_WAIT: Duration = Duration::from_secs(1);
/// Somebody wants it to end: it may print as fast as it can for so long.
const RUSH: Duration = Duration::from_secs(10);

/// Slows down who prints for nobody.
#[derive(Debug, Default)]
struct Void {
    since: Option<Instant>,
    /// Bytes that did not go on and were not waited for yet.
    bytes: u64,
    rushed_until: Option<Instant>,
}

impl Void {
    fn due(&mut self, now: Instant) -> Option<Instant> {
        let bytes = std::mem::take(&mut self.bytes);
        if bytes == 0 || self.rushed_until.is_some_and(|until| now < until) {
            return None;
        }
        let since = *self.since.get_or_insert(now);
        let wait = Duration::from_secs_f64(bytes as f64 / VOID_RATE).min(VOID_WAIT);
        (now >= since + VOID_PATIENCE).then(|| now + wait)
    }
}

/// The allowance of one execution.
#[derive(Debug)]
pub struct ExecutionCap {
    texts: [TextCap; 2],
    /// Of text and results together.
    total_left: u64,
    results_left: u64,
    results_total: u64,
    results_omitted: u64,
    messages_left: u64,
    pace: Pace,
    /// Messages that went on and are not paced yet.
    unpaced: u64,
    void: Void,
}

/// What is said at the end of an execution.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ExecutionEnd {
    /// By [`Stream`]; `None` where all of it was let through.
    pub texts: [Option<TextEnd>; 2],
    /// Total and omitted bytes of results, where some were omitted.
    pub results: Option<(u64, u64)>,
}

impl ExecutionCap {
    /// A fresh allowance.
    #[must_use]
    pub fn new(cap: OutputCap) -> Self {
        Self {
            texts: [(); 2].map(|()| TextCap::new(cap.text_bytes.min(cap.total_bytes))),
            total_left: cap.total_bytes,
            results_left: cap.result_bytes,
            results_total: 0,
            results_omitted: 0,
            messages_left: cap.messages,
            pace: Pace::new(cap.messages_per_second),
            unpaced: 0,
            void: Void::default(),
        }
    }

    /// The execution is to end soon, so nothing holds its output up.
    pub fn rush(&mut self, now: Instant) {
        self.void.rushed_until = Some(now + RUSH);
    }

    /// How much of one message's text could matter, for either stream.
    #[must_use]
    pub fn capture_limits(&self) -> CaptureLimits {
        let (a, b) = (self.texts[0].limits(), self.texts[1].limits());
        CaptureLimits { head: a.head.max(b.head), tail: a.tail.max(b.tail) }
    }

    /// Takes a stream message's text and returns how much of its head, and of its tail, may go on now. `room` is how much more
    /// output can be kept at all, in bytes.
    pub fn text(&mut self, stream: Stream, text: &Captured, room: usize) -> (usize, usize) {
        let messages = (text.head.len() + text.tail.len()).div_ceil(MAX_PIECE) as u64;
        let cap = &mut self.texts[stream as usize];
        if messages > self.messages_left {
            cap.cut();
        }
        // In JSON a byte of text may take six.
        let is_dense = escaped_len(&text.head) + escaped_len(&text.tail) > room;
        let room = if is_dense { room / 6 } else { room };
        let fits = cap.take(text, room.min(usize::try_from(self.total_left).unwrap_or(usize::MAX)));
        self.void.bytes += text.total - (fits.0 + fits.1) as u64;
        if fits != (0, 0) {
            self.total_left -= (fits.0 + fits.1) as u64;
            self.count(messages);
        }
        fits
    }

    /// Takes a result of so many bytes and says whether it may go on; if not, it counts as omitted.
    pub fn result(&mut self, bytes: u64, room: usize) -> bool {
        self.results_total = self.results_total.saturating_add(bytes);
        let fits = bytes <= room as u64 && self.messages_left > 0 && bytes <= self.results_left.min(self.total_left);
        if fits {
            self.results_left -= bytes;
            self.total_left -= bytes;
            self.count(1);
        } else {
            self.results_omitted = self.results_omitted.saturating_add(bytes);
        }
        fits
    }

    fn count(&mut self, messages: u64) {
        self.messages_left -= messages;
        self.unpaced += messages;
    }

    /// When what came since the last call may be told, or forgotten, unless it is now.
    pub fn due(&mut self, now: Instant) -> Option<Instant> {
        let paced = match std::mem::take(&mut self.unpaced) {
            0 => None,
            messages => self.pace.take(messages, now),
        };
        paced.max(self.void.due(now))
    }

    /// The end: what was held back, as far as there is `room` for it, and the totals of what was left out.
    pub fn finish(&mut self, room: usize) -> ExecutionEnd {
        let results = (self.results_omitted > 0).then_some((self.results_total, self.results_omitted));
        let texts = self.texts.each_mut().map(|text| {
            let end = text.finish(room, self.total_left);
            self.total_left -= end.as_ref().map_or(0, |end| end.tail.len() as u64);
            end
        });
        ExecutionEnd { texts, results }
    }
}

fn escaped_len(text: &str) -> usize {
    text.bytes().map(|byte| if byte < 0x20 || matches!(byte, b'"' | b'\\') { 6 } else { 1 }).sum()
}

/// Cuts a text into pieces of at most [`MAX_PIECE`] bytes, at characters.
pub fn pieces(mut text: &str) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let (piece, rest) = text.split_at(text.floor_char_boundary(MAX_PIECE));
        text = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cap(text_bytes: u64, result_bytes: u64, messages: u64) -> ExecutionCap {
        let (total_bytes, messages_per_second) = (u64::MAX, u64::MAX);
        ExecutionCap::new(OutputCap { text_bytes, result_bytes, total_bytes, messages, messages_per_second })
    }

    /// Feeds texts through the cap as the relay does and returns all that went on, the end, and the whole text.
    fn run(cap: &mut ExecutionCap, texts: &[String], room: usize) -> (String, Option<TextEnd>, String) {
        let mut out = String::new();
        for text in texts {
            let mut capture = Capture::new(cap.capture_limits());
            capture.push(text);
            let captured = capture.finish();
            let (head, tail) = cap.text(Stream::Stdout, &captured, room);
            out.push_str(&captured.head[..head]);
            out.push_str(&captured.tail[..tail]);
        }
        let [end, _] = cap.finish(room).texts;
        (out, end, texts.concat())
    }

    #[test]
    fn results_that_do_not_fit_are_counted() {
        let mut cap = cap(0, 10, 2);
        assert!(cap.result(6, 9));
        assert!(!cap.result(6, 9));
        assert!(!cap.result(1, 0));
        assert!(cap.result(4, 4));
        assert!(!cap.result(0, 9));
        assert_eq!(cap.finish(0).results, Some((17, 7)));
    }

    #[test]
    fn beyond_the_total_results_are_omitted_and_text_is_cut() {
        let cap = OutputCap {
            text_bytes: 100,
            result_bytes: 100,
            total_bytes: 40,
            messages: 99,
            messages_per_second: u64::MAX,
        };
        let mut cap = ExecutionCap::new(cap);
        assert!(cap.result(30, 999));
        assert!(!cap.result(11, 999));
        let (out, end, _) = run(&mut cap, &["a".repeat(8), "b".repeat(8), "c".repeat(8)], 999);
        assert_eq!((out.as_str(), end), ("aaaaaaaabb", Some(TextEnd { tail: String::new(), total: 24, omitted: 14 })));
        assert!(!cap.result(1, 999));
        assert_eq!(cap.finish(999).results, Some((42, 12)));
    }

    #[test]
    fn a_burst_is_not_paced_and_what_follows_is() {
        let now = Instant::now();
        let mut pace = Pace::new(4);
        assert!((0..4).all(|_| pace.take(1, now).is_none()));
        assert_eq!(pace.take(1, now), Some(now + Duration::from_millis(250)));
        assert_eq!(pace.take(2, now), Some(now + Duration::from_millis(750)));
        let later = now + Duration::from_secs(60);
        assert!((0..4).all(|_| pace.take(1, later).is_none()) && pace.take(1, later).is_some());
        let mut unlimited = Pace::new(u64::MAX);
        assert!((0..100_000).all(|_| unlimited.take(1, now).is_none()));
        assert_eq!(Pace::new(0).take(2, now), Some(now + Duration::from_secs(1)));
    }

    #[test]
    fn only_what_goes_on_is_paced() {
        let now = Instant::now();
        let cap =
            OutputCap { text_bytes: 100, result_bytes: 5, total_bytes: u64::MAX, messages: 3, messages_per_second: 1 };
        let mut cap = ExecutionCap::new(cap);
        assert!(cap.result(1, 99) && cap.due(now).is_none() && cap.due(now).is_none());
        assert!(!cap.result(9, 99) && cap.due(now).is_none(), "left out");
        assert!(cap.result(1, 99) && cap.due(now).is_some());
        assert!(cap.result(1, 99) && cap.due(now).is_some());
        assert!(!cap.result(1, 99) && cap.due(now).is_none(), "no messages are left");
        let text = Captured { head: "x".into(), tail: String::new(), total: 1 };
        assert_eq!((cap.text(Stream::Stdout, &text, 99), cap.due(now)), ((0, 0), None));
    }

    #[test]
    fn who_prints_for_nobody_is_slowed_down_until_somebody_wants_an_end() {
        let mut cap = cap(100, 0, 1000);
        let start = Instant::now();
        let mut print = |bytes: usize, after: Duration, rush: bool| {
            let (mut capture, now) = (Capture::new(cap.capture_limits()), start + after);
            capture.push(&"x".repeat(bytes));
            cap.text(Stream::Stdout, &capture.finish(), 1 << 20);
            if rush {
                cap.rush(now);
            }
            cap.due(now).map(|due| due - now)
        };
        assert_eq!(print(10, Duration::ZERO, false), None, "it is not cut yet");
        assert_eq!(print(1 << 20, Duration::from_secs(1), false), None);
        assert_eq!(print(1 << 20, VOID_PATIENCE, false), None);
        let later = Duration::from_secs(1) + VOID_PATIENCE;
        assert_eq!(print(64 * 1024, later, false), Some(Duration::from_millis(250)));
        assert_eq!(print(1 << 30, later, false), Some(VOID_WAIT));
        assert_eq!(print(1 << 30, later, true), None);
        assert_eq!(print(1 << 20, later + RUSH, false), Some(VOID_WAIT));
    }

    #[test]
    fn the_bound_on_messages_cuts_text_too() {
        let (out, end, _) = run(&mut cap(1000, 0, 2), &["a".into(), "b".into(), "c".into(), "d".into()], 99);
        assert_eq!((out.as_str(), end), ("ab", Some(TextEnd { tail: "cd".into(), total: 4, omitted: 0 })));
    }

    proptest! {
        #[test]
        fn text_within_the_cap_is_never_lost(texts in proptest::collection::vec("[a-zé😀]{0,30}", 0..20), slack in 0u64..9) {
            let total: usize = texts.iter().map(String::len).sum();
            let (mut out, end, whole) = run(&mut cap(total as u64 + slack, 0, 1000), &texts, 9999);
            if let Some(end) = end {
                prop_assert_eq!(end.omitted, 0);
                out.push_str(&end.tail);
            }
            prop_assert_eq!(out, whole);
        }

        #[test]
        fn text_above_the_cap_keeps_head_and_tail_with_exact_counts(texts in proptest::collection::vec("[a-zé😀]{0,30}", 0..20), cap_bytes in 0u64..400, room in prop_oneof![Just(9999usize), 0usize..40]) {
            let (out, end, whole) = run(&mut cap(cap_bytes, 0, 1000), &texts, room);
            prop_assert!(whole.starts_with(&out));
            prop_assert!(out.len() as u64 <= cap_bytes);
            if let Some(end) = end {
                prop_assert!(whole.ends_with(&end.tail));
                prop_assert_eq!(end.total, whole.len() as u64);
                prop_assert_eq!(end.omitted, (whole.len() - out.len() - end.tail.len()) as u64);
                prop_assert!((out.len() + end.tail.len()) as u64 <= cap_bytes);
                if end.omitted > 0 && room > 400 {
                    prop_assert!((out.len() + end.tail.len()) as u64 + 8 > cap_bytes);
                }
            } else {
                prop_assert_eq!(out, whole);
            }
        }

        #[test]
        fn all_together_stays_within_the_total_and_loses_nothing_below_it(
            puts in proptest::collection::vec((0usize..3, "[a-zé😀]{0,30}"), 0..30), total_bytes in 0u64..600, messages in 0u64..40,
        ) {
            let mut cap = ExecutionCap::new(OutputCap {
                text_bytes: 400, result_bytes: 400, total_bytes, messages, messages_per_second: u64::MAX,
            });
            let (mut out, mut whole) = ([0u64; 3], [0u64; 3]);
            for (kind, text) in &puts {
                let size = text.len() as u64;
                whole[*kind] += size;
                out[*kind] += match kind {
                    2 => if cap.result(size, 9999) { size } else { 0 },
                    kind => {
                        let mut capture = Capture::new(cap.capture_limits());
                        capture.push(text);
                        let stream = [Stream::Stdout, Stream::Stderr][*kind];
                        let (head, tail) = cap.text(stream, &capture.finish(), 9999);
                        (head + tail) as u64
                    }
                };
            }
            let end = cap.finish(9999);
            for (stream, text) in end.texts.iter().enumerate() {
                if let Some(text) = text {
                    out[stream] += text.tail.len() as u64;
                    prop_assert_eq!((text.total, text.omitted), (whole[stream], whole[stream] - out[stream]));
                }
            }
            prop_assert_eq!(end.results.map_or(0, |(_, omitted)| omitted), whole[2] - out[2]);
            prop_assert!(out.iter().sum::<u64>() <= total_bytes);
            if whole.iter().sum::<u64>() <= total_bytes && whole.iter().all(|one| *one <= 400) && messages >= 30 {
                prop_assert_eq!(out, whole);
            }
        }

        #[test]
        fn in_no_time_more_goes_on_than_the_burst_and_the_rate(
            rate in 1u64..2000, comes in proptest::collection::vec((0u64..400, 1u64..4), 1..200),
        ) {
            let begin = Instant::now();
            let mut pace = Pace::new(rate);
            let (mut now, mut went) = (begin, Vec::new());
            for (wait, messages) in comes {
                now += Duration::from_millis(wait);
                let due = pace.take(messages, now);
                now = due.unwrap_or(now);
                went.push((now, messages));
            }
            for from in 0..went.len() {
                let mut count = 0;
                for (at, messages) in &went[from..] {
                    count += messages;
                    // A nanosecond for each message is lost to rounding.
                    let allowed = rate as f64 * (1.0 + (*at - went[from].0).as_secs_f64() + 1e-6);
                    prop_assert!(count as f64 <= allowed + went[from].1 as f64, "{count} > {allowed}");
                }
            }
        }

        #[test]
        fn who_keeps_to_the_rate_never_waits(rate in 1u64..2000, count in 1usize..300) {
            let mut pace = Pace::new(rate);
            let interval = Duration::from_nanos(NANOS.div_ceil(rate));
            let begin = Instant::now();
            for number in 0..count {
                prop_assert_eq!(pace.take(1, begin + interval * number as u32), None);
            }
        }

        #[test]
        fn pieces_are_the_text(text in "[a😀é]{0,50}", times in 1usize..9000) {
            let text = text.repeat(times.min(3_000_000 / (text.len() + 1)));
            prop_assert!(pieces(&text).all(|p| p.len() <= MAX_PIECE));
            prop_assert_eq!(pieces(&text).collect::<String>(), text);
        }
    }
}
