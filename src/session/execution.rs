//! One execution as a record: its events in order, for any number of readers at once.
//!
//! Only the task of its session writes; readers follow by sequence number and wait on a version, never on a timer. It holds at
//! most what its limits allow, whatever the guest says.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::watch;

use super::instant;
use super::keeping::Keeping;
use super::tap::Tap;
pub use crate::domain::execution::{ExecutionRequest, OnTimeout, Stdin};
use crate::domain::ids::{ContextId, ExecutionId, SessionId};
use crate::domain::output::{
    Effects, ErrorInfo, ExecutionEvent, Fold, JsonText, MimeBundle, NamedValues, Outcome, Report, RestartCause,
    RichOutput, Shown, Status, Stop, TextStream, Truncated,
};
pub use crate::store::state::Logged;
use crate::store::state::{Birth, ExecutionChange, ExecutionRecord, Progress, RunningRecord};
use crate::traces::{Executed, Trace};

/// What a guest may exceed the limits by before the control plane leaves output out: tails, marks and messages under way.
const SLACK_BYTES: u64 = 512 * 1024;
/// Most events of one execution beyond its limit of messages.
const SLACK_EVENTS: u64 = 256;
/// Bytes that an event takes beside its texts, and one content of a bundle.
const EVENT_BYTES: u64 = 256;
const PART_BYTES: u64 = 1024;

/// Where an execution belongs.
#[derive(Debug, Clone)]
pub struct Place {
    /// Its session.
    pub session: SessionId,
    /// Its context.
    pub context: ContextId,
    /// Its context's language.
    pub language: String,
    /// What is kept beside it and after it.
    pub keeping: Keeping,
    /// Where clients that speak Jupyter hear of it, if they can.
    pub tap: Option<Arc<Tap>>,
}

/// An execution.
#[derive(Debug)]
pub struct Execution {
    /// Its id.
    pub id: ExecutionId,
    /// Where it belongs.
    pub place: Place,
    /// What is to be run.
    pub request: Arc<ExecutionRequest>,
    /// When it was accepted.
    pub created_at: Timestamp,
    record: Mutex<Record>,
    version: watch::Sender<u64>,
}

#[derive(Debug)]
struct Record {
    events: Vec<Arc<Logged>>,
    status: Status,
    report: Report,
    accepted: Instant,
    started: Option<Instant>,
    finished: Option<Instant>,
    started_at: Option<Timestamp>,
    finished_at: Option<Timestamp>,
    /// This process leaves it to the next one.
    is_left: bool,
    saved: Saved,
    /// Bytes that were put out, with those that stand beside the record.
    bytes: u64,
    /// Bytes that the record takes.
    held: u64,
    blobs: u32,
    /// It waits for a line.
    asks: bool,
    /// When its kernel said that it works on it.
    busy: Option<Instant>,
    /// The trace of the request that has begun it, and its session's template.
    trace: Option<(Trace, String)>,
    /// The kernel's reply, until it is told.
    reply: Option<Vec<Bytes>>,
}

/// What of a record the database has been told.
#[derive(Debug, Clone, Copy, Default)]
struct Saved {
    birth: bool,
    progress: bool,
    events: usize,
}

/// How an execution ended.
#[derive(Debug, Clone)]
pub(super) struct End {
    pub(super) status: Status,
    /// For people; nothing where the status and the error say all.
    pub(super) detail: Option<String>,
    pub(super) stop: Option<Stop>,
}

impl End {
    /// An end that needs no words.
    pub(super) fn plain(status: Status) -> Self {
        Self { status, detail: None, stop: None }
    }

    /// An end and what to say of it.
    pub(super) fn with(status: Status, detail: impl Into<String>) -> Self {
        Self { status, detail: Some(detail.into()), stop: None }
    }
}

impl Execution {
    /// A new one, waiting behind `position` others.
    #[must_use]
    pub fn new(id: ExecutionId, place: Place, request: ExecutionRequest, position: usize) -> Self {
        let record = Record {
            events: Vec::new(),
            status: Status::Queued,
            report: Report::default(),
            accepted: Instant::now(),
            started: None,
            finished: None,
            started_at: None,
            finished_at: None,
            is_left: false,
            saved: Saved::default(),
            bytes: 0,
            held: 0,
            blobs: 0,
            asks: false,
            busy: None,
            trace: None,
            reply: None,
        };
        let (record, request) = (Mutex::new(record), Arc::new(request));
        let execution =
            Self { id, place, request, created_at: Timestamp::now(), record, version: watch::Sender::new(0) };
        execution.log(execution.record(), ExecutionEvent::Queued { position });
        execution
    }

    /// One that an earlier process has left.
    pub(super) fn restore(
        kept: ExecutionRecord,
        running: Option<&RunningRecord>,
        keeping: Keeping,
        tap: Option<Arc<Tap>>,
    ) -> Self {
        let ExecutionRecord { id, session, birth, progress, running: _, events } = kept;
        let Progress { status, started_at, finished_at, report } = progress;
        let blobs = events.iter().flat_map(|logged| logged.event.blobs()).max().unwrap_or_default();
        let record = Record {
            status,
            accepted: instant(birth.created_at),
            started: started_at.map(instant),
            finished: finished_at.map(instant),
            started_at,
            finished_at,
            is_left: false,
            saved: Saved { birth: true, progress: true, events: events.len() },
            bytes: events.iter().map(|logged| size_of_event(&logged.event)).sum(),
            held: events.iter().map(|logged| footprint(&logged.event)).sum::<u64>() + footprint_of_report(&report),
            blobs,
            asks: running.is_some_and(|running| running.asked.is_some()),
            busy: None,
            trace: None,
            reply: None,
            report,
            events,
        };
        let version = watch::Sender::new(record.events.len() as u64);
        let place = Place { session, context: birth.context, language: birth.language, keeping, tap };
        let (request, created_at) = (birth.request, birth.created_at);
        Self { id, place, request, created_at, record: Mutex::new(record), version }
    }

    /// What the database has not been told, if there is anything.
    pub(super) fn take_change(&self) -> Option<ExecutionChange> {
        let mut record = self.record();
        let saved = record.saved;
        if saved.progress && saved.events == record.events.len() {
            return None;
        }
        record.saved = Saved { birth: true, progress: true, events: record.events.len() };
        let birth = || Birth {
            context: self.place.context,
            language: self.place.language.clone(),
            created_at: self.created_at,
            request: Arc::clone(&self.request),
        };
        let progress = || Progress {
            status: record.status,
            started_at: record.started_at,
            finished_at: record.finished_at,
            report: record.report.clone(),
        };
        Some(ExecutionChange {
            id: self.id,
            birth: (!saved.birth).then(birth),
            progress: (!saved.progress).then(progress),
            running: None,
            events: record.events[saved.events..].to_vec(),
        })
    }

    /// Puts it into a notebook that was not there when it ended.
    pub(super) fn note_in(&self, keeping: &Keeping) {
        let record = self.record();
        keeping.add_cell(self, &record.events, record.status, &record.report, record.started_at);
    }

    /// This process tells nothing more of it.
    pub(super) fn leave(&self) {
        self.record().is_left = true;
        self.version.send_modify(|_| {});
    }

    /// Whether this process will tell more of it.
    #[must_use]
    pub fn is_followed(&self) -> bool {
        let record = self.record();
        !record.status.is_final() && !record.is_left
    }

    /// How far it is.
    #[must_use]
    pub fn status(&self) -> Status {
        self.record().status
    }

    /// When it ended, if it did.
    #[must_use]
    pub fn finished(&self) -> Option<Instant> {
        self.record().finished
    }

    /// Bytes its record holds, about.
    #[must_use]
    pub fn weight(&self) -> u64 {
        self.record().held + self.request.len() as u64 + 1024
    }

    /// Events after number `after`, in order.
    #[must_use]
    pub fn events_after(&self, after: u64) -> Vec<Arc<Logged>> {
        let record = self.record();
        let from = usize::try_from(after).unwrap_or(usize::MAX).min(record.events.len());
        record.events[from..].to_vec()
    }

    /// The number of the newest event.
    #[must_use]
    pub fn last_seq(&self) -> u64 {
        self.record().events.len() as u64
    }

    /// A watch that changes with every event.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Waits until it has ended, or goes on with the next process. Level-triggered.
    pub async fn ended(&self) {
        let mut version = self.subscribe();
        while self.is_followed() {
            // The sender lives in `self`, so this can't fail.
            let _ = version.changed().await;
        }
    }

    /// What its events add up to by now.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        let record = self.record();
        let now = Instant::now();
        let started = record.started.or(record.finished).unwrap_or(now);
        let mut fold = Fold::default();
        record.events.iter().for_each(|logged| fold.push(&logged.event));
        fold.finish(
            record.status,
            started - record.accepted,
            record.finished.unwrap_or(now).saturating_duration_since(started),
            record.report.clone(),
        )
    }

    /// What it has shown by now, in its order.
    #[must_use]
    pub fn shown(&self) -> Vec<Shown> {
        let record = self.record();
        let mut fold = Fold::default();
        record.events.iter().for_each(|logged| fold.push(&logged.event));
        fold.into_shown()
    }

    /// What its kernel, or this server, has said of it beside output; with the newest error of its output.
    pub(super) fn said(&self) -> (Status, Report, Option<ErrorInfo>) {
        let record = self.record();
        let error = record.events.iter().rev().find_map(|logged| match &logged.event {
            ExecutionEvent::Error(error) => Some(error.clone()),
            _ => None,
        });
        (record.status, record.report.clone(), error)
    }

    /// What it has used of CPUs, as far as its guest has told, and how long it ran; nothing of a run that has not ended.
    #[must_use]
    pub fn cpu_and_duration(&self) -> (Option<Duration>, Duration) {
        let record = self.record();
        let duration = record.started.zip(record.finished).map(|(started, end)| end.saturating_duration_since(started));
        (record.report.effects.cpu, duration.unwrap_or_default())
    }

    /// The kernel's count, once it is known.
    #[must_use]
    pub fn execution_count(&self) -> Option<u64> {
        self.record().report.execution_count
    }

    /// How it ended, for people, where its status does not say all.
    #[must_use]
    pub fn detail(&self) -> Option<String> {
        self.record().report.detail.clone()
    }

    /// When it began to run.
    #[must_use]
    pub fn started_at(&self) -> Option<Timestamp> {
        self.record().started_at
    }

    /// Whether it waits for a line.
    #[must_use]
    pub fn asks(&self) -> bool {
        self.record().asks
    }

    /// It begins, unless it has: a kernel that was gone by then took nothing of it.
    pub(super) fn start(&self) {
        let mut record = self.record();
        if record.started.is_some() {
            return;
        }
        record.status = Status::Running;
        record.saved.progress = false;
        record.started = Some(Instant::now());
        record.started_at = Some(Timestamp::now());
        if let Some(metrics) = self.place.keeping.metrics() {
            metrics.execution_began(record.accepted.elapsed());
        }
        self.log(record, ExecutionEvent::Started);
    }

    /// Its kernel works on it.
    pub(super) fn is_busy(&self) {
        self.record().busy.get_or_insert_with(Instant::now);
    }

    /// Its end is told to the trace of the request that has begun it, even if it has ended by now. `template` is its session's.
    pub fn trace_in(&self, trace: Trace, template: &str) {
        let mut record = self.record();
        record.trace = Some((trace, template.to_owned()));
        self.tell_trace(&mut record);
    }

    /// Makes the spans of what has ended, once.
    fn tell_trace(&self, record: &mut Record) {
        let Some(finished) = record.finished else { return };
        let Some((trace, template)) = record.trace.take() else { return };
        let at =
            |moment: Instant| SystemTime::from(self.created_at) + moment.saturating_duration_since(record.accepted);
        trace.execution_ended(&Executed {
            id: self.id,
            session: self.place.session,
            template: &template,
            status: record.status,
            accepted: self.created_at.into(),
            started: record.started.map(at),
            busy: record.busy.map(at),
            ended: at(finished),
        });
    }

    pub(super) fn count(&self, execution_count: u64) {
        let mut record = self.record();
        record.saved.progress &= record.report.execution_count == Some(execution_count);
        record.report.execution_count = Some(execution_count);
    }

    pub(super) fn effects(&self, effects: Effects) {
        let mut record = self.record();
        record.held += footprint_of_effects(&effects);
        record.saved.progress = false;
        record.report.effects = effects;
    }

    /// What the kernel gave back beside its output, as far as it fits.
    pub(super) fn give_back(&self, values: NamedValues, payloads: Vec<JsonText>) {
        let mut left = usize::try_from(self.request.output.result_bytes).unwrap_or(usize::MAX);
        let mut fits = |text: &JsonText| {
            let fits = text.0.len() <= left;
            left -= if fits { text.0.len() } else { 0 };
            fits
        };
        let is_asked = |name: &String| self.request.user_expressions.contains_key(name);
        let user_expressions = values.into_iter().filter(|(name, value)| is_asked(name) && fits(value)).collect();
        let payloads: Vec<_> = payloads.into_iter().filter(|payload| fits(payload)).collect();
        let mut record = self.record();
        record.saved.progress = false;
        record.held += (usize::try_from(self.request.output.result_bytes).unwrap_or(usize::MAX) - left) as u64;
        record.report.user_expressions = user_expressions;
        record.report.payloads = payloads;
    }

    /// The kernel's reply is told with the end, where somebody hears that.
    pub(super) fn keep_reply(&self, parts: &[Bytes]) {
        if self.request.asked_by.is_some() {
            self.record().reply = Some(parts.to_vec());
        }
    }

    /// Its kernel has ended, and no other comes.
    pub(super) fn kernel_has_ended(&self, cause: RestartCause) {
        let mut record = self.record();
        record.saved.progress = false;
        record.report.kernel_end = Some(cause);
    }

    /// It waits for a line, or does so no more.
    pub(super) fn set_asking(&self, asks: bool) {
        self.record().asks = asks;
    }

    /// Adds an event, or, above the limits, the fact that it was left out. Says whether it was added.
    pub(super) fn output(&self, event: ExecutionEvent) -> bool {
        let size = size_of_event(&event);
        let limits = &self.request.output;
        let most = limits.total_bytes.min(2 * limits.text_bytes + limits.result_bytes);
        let admitted = {
            let mut record = self.record();
            let within = record.bytes + size <= most.saturating_add(SLACK_BYTES)
                && (record.events.len() as u64) < limits.messages + SLACK_EVENTS;
            if within {
                record.bytes += size;
            }
            within
        };
        // Only what is within the limits is kept beside the record.
        if admitted {
            let event = self.without_long_parts(event);
            self.log(self.record(), event);
        } else if let Some(what) = what_is_left_out(&event) {
            self.leave_out(what, size);
        }
        admitted
    }

    /// Adds what the answer would be wrong without, whatever there is already: how a kernel ended, and the error that ended the code. There is one
    /// of it, or one a kernel.
    pub(super) fn output_surely(&self, mut event: ExecutionEvent) {
        let is_long = size_of_event(&event) > SLACK_BYTES;
        if let (ExecutionEvent::Error(error), true) = (&mut event, is_long) {
            error.traceback.clear();
            error.value.truncate(error.value.floor_char_boundary(SLACK_BYTES as usize));
        }
        self.log(self.record(), event);
    }

    /// Puts long contents beside the record.
    fn without_long_parts(&self, mut event: ExecutionEvent) -> ExecutionEvent {
        let (ExecutionEvent::Result(RichOutput { data, .. }) | ExecutionEvent::ResultUpdate { data, .. }) = &mut event
        else {
            return event;
        };
        let omitted = self.place.keeping.put_long_parts(self.id, data, || {
            let mut record = self.record();
            record.blobs += 1;
            record.blobs
        });
        if omitted > 0 {
            self.leave_out(Truncated::Results, omitted);
        }
        event
    }

    /// Ends it; only the first end counts.
    pub(super) fn finish(&self, end: End) {
        let mut record = self.record();
        if record.status.is_final() {
            return;
        }
        record.finished = Some(Instant::now());
        record.finished_at = Some(Timestamp::now());
        record.saved.progress = false;
        record.status = end.status;
        record.asks = false;
        record.report.detail = end.detail;
        record.report.stop = end.stop;
        self.tell_trace(&mut record);
        let has_run = record.started.is_some();
        if let Some(metrics) = self.place.keeping.metrics() {
            metrics.execution_ended(record.status, record.started.map(|at| at.elapsed()));
        }
        // Still locked: whoever sees the end sees the last event, and finds the cell in the notebook.
        if has_run && !self.request.silent {
            self.place.keeping.add_cell(self, &record.events, record.status, &record.report, record.started_at);
        }
        let reply = record.reply.take();
        self.log(record, ExecutionEvent::Completed);
        self.tell_end(reply);
        self.place.keeping.has_grown(self.weight());
    }

    fn log(&self, mut record: MutexGuard<'_, Record>, event: ExecutionEvent) {
        if let (ExecutionEvent::OutputTruncated { what, .. }, Some(metrics)) = (&event, self.place.keeping.metrics()) {
            metrics.output_truncated(*what);
        }
        let seq = record.events.len() as u64 + 1;
        record.held += footprint(&event);
        record.events.push(Arc::new(Logged { seq, at: Timestamp::now(), event }));
        drop(record);
        self.version.send_replace(seq);
    }

    /// Adds to the last mark of that kind, so that leaving out takes no room itself.
    fn leave_out(&self, what: Truncated, size: u64) {
        let mut record = self.record();
        let last = record.events.last_mut().map(Arc::make_mut);
        if let Some(Logged { event: ExecutionEvent::OutputTruncated { what: w, omitted_bytes, total_bytes }, .. }) =
            last
            && *w == what
        {
            *omitted_bytes = omitted_bytes.saturating_add(size);
            *total_bytes = total_bytes.saturating_add(size);
            record.saved.events = record.saved.events.min(record.events.len() - 1);
            return;
        }
        if record.events.len() as u64 >= self.request.output.messages + 2 * SLACK_EVENTS {
            return;
        }
        self.log(record, ExecutionEvent::OutputTruncated { what, omitted_bytes: size, total_bytes: size });
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        // A record is whole between its statements, so a panic elsewhere leaves nothing half done.
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that an event takes in a record, about.
fn footprint(event: &ExecutionEvent) -> u64 {
    let parts = match event {
        ExecutionEvent::Result(RichOutput { data, .. }) | ExecutionEvent::ResultUpdate { data, .. } => data.len(),
        _ => 0,
    };
    size_of_event(event) + EVENT_BYTES + parts as u64 * PART_BYTES
}

fn footprint_of_effects(effects: &Effects) -> u64 {
    let files = effects.files.iter().map(|file| file.path.len()).sum::<usize>() as u64;
    let processes = effects.processes.iter().map(|process| process.command.len()).sum::<usize>() as u64;
    let entries = (effects.files.len() + effects.processes.len()) as u64;
    files + processes + entries * EVENT_BYTES
}

fn footprint_of_report(report: &Report) -> u64 {
    let values = report.user_expressions.values().chain(&report.payloads);
    footprint_of_effects(&report.effects) + values.map(|value| value.0.len() as u64).sum::<u64>()
}

fn what_is_left_out(event: &ExecutionEvent) -> Option<Truncated> {
    match event {
        ExecutionEvent::Text { stream: TextStream::Stdout, .. } => Some(Truncated::Stdout),
        ExecutionEvent::Text { stream: TextStream::Stderr, .. } => Some(Truncated::Stderr),
        ExecutionEvent::Result(_) | ExecutionEvent::ResultUpdate { .. } | ExecutionEvent::Comm(_) => {
            Some(Truncated::Results)
        }
        _ => None,
    }
}

fn size_of_event(event: &ExecutionEvent) -> u64 {
    let bundle = |data: &MimeBundle| data.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>();
    let size = match event {
        ExecutionEvent::Text { text, .. } => text.len(),
        ExecutionEvent::Result(RichOutput { data, metadata, .. }) => bundle(data) + metadata.0.len(),
        ExecutionEvent::ResultUpdate { data, metadata, .. } => bundle(data) + metadata.0.len(),
        ExecutionEvent::Comm(comm) => comm.len(),
        ExecutionEvent::InputRequested { prompt, .. } => prompt.len(),
        ExecutionEvent::Error(error) => error.value.len() + error.traceback.iter().map(String::len).sum::<usize>(),
        _ => 0,
    };
    size as u64
}

#[cfg(test)]
impl Place {
    /// Nowhere.
    pub(crate) fn for_tests() -> Self {
        let id = uuid::Uuid::from_u128(1);
        let keeping = Keeping::nothing();
        Self { session: id.into(), context: id.into(), language: "python".to_owned(), keeping, tap: None }
    }
}

#[cfg(test)]
impl Execution {
    /// As the next process finds it.
    pub(super) fn left(&self) -> ExecutionRecord {
        self.record().saved = Saved::default();
        let ExecutionChange { id, birth, progress, events, .. } = self.take_change().expect("nothing was saved");
        let (birth, progress) = (birth.expect("the first time"), progress.expect("the first time"));
        ExecutionRecord { id, session: self.place.session, birth, progress, running: None, events }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::output::{MimePart, ResultKind};
    use crate::domain::spec::OutputLimits;
    use uuid::Uuid;

    const LIMITS: OutputLimits = OutputLimits {
        text_bytes: 1000,
        result_bytes: 1000,
        total_bytes: 4000,
        messages: 1000,
        messages_per_second: 1000,
    };

    fn execution(limits: OutputLimits) -> Execution {
        let id = Uuid::from_u128(1);
        Execution::new(id.into(), Place::for_tests(), ExecutionRequest::for_tests(limits), 0)
    }

    #[test]
    fn a_guest_that_ignores_the_limits_fills_nothing() {
        let execution = execution(OutputLimits { messages: 10, ..LIMITS });
        let chunk = "x".repeat(64 * 1024);
        for _ in 0..10_000 {
            execution.output(ExecutionEvent::Text { stream: TextStream::Stdout, text: chunk.clone() });
            execution.output(ExecutionEvent::OutputClear { wait: false });
        }
        execution.finish(End::plain(Status::Ok));
        let outcome = execution.outcome();
        assert!(execution.weight() < 1024 * 1024);
        assert!(execution.events_after(0).len() < 1000);
        assert!(outcome.stdout_totals.omitted > 0);
    }

    #[test]
    fn what_is_small_and_many_is_counted_as_what_it_takes() {
        let execution = execution(OutputLimits { messages: 2000, ..LIMITS });
        for _ in 0..2000 {
            let data = MimeBundle::from([("text/plain".to_owned(), MimePart::Inline(JsonText("\"\"".to_owned())))]);
            let result =
                RichOutput { kind: ResultKind::DisplayData, data, metadata: JsonText::object(), display_id: None };
            assert!(execution.output(ExecutionEvent::Result(result)));
        }
        assert!(execution.weight() > 1_000_000, "{}", execution.weight());
    }

    #[test]
    fn an_end_is_told_where_nothing_else_finds_room() {
        let execution = execution(OutputLimits { messages: 1, ..LIMITS });
        while execution.output(ExecutionEvent::OutputClear { wait: false }) {}
        let value = "x".repeat(2 * SLACK_BYTES as usize);
        let error = ErrorInfo { name: "E".to_owned(), value, traceback: vec!["line".to_owned()] };
        assert!(!execution.output(ExecutionEvent::Error(error.clone())));
        execution.output_surely(ExecutionEvent::Error(error));
        let cause = RestartCause::Died { status: Some(3), signal: None };
        execution.output_surely(ExecutionEvent::KernelRestarted { cause: cause.clone() });
        execution.finish(End::plain(Status::KernelDied));
        let outcome = execution.outcome();
        let error = outcome.error.unwrap();
        assert_eq!((error.value.len() as u64, error.traceback.len()), (SLACK_BYTES, 0));
        assert_eq!(outcome.restarted, Some(cause));
    }

    #[tokio::test]
    async fn every_reader_sees_every_event_in_order() {
        let execution = Arc::new(execution(LIMITS));
        let reader = |execution: Arc<Execution>| async move {
            let mut version = execution.subscribe();
            let mut seen = Vec::new();
            loop {
                seen.extend(execution.events_after(seen.len() as u64).iter().map(|l| l.seq));
                if execution.status().is_final() && execution.events_after(seen.len() as u64).is_empty() {
                    return seen;
                }
                version.changed().await.unwrap();
            }
        };
        let writer = async {
            execution.start();
            for n in 0..50 {
                execution.output(ExecutionEvent::Text { stream: TextStream::Stdout, text: n.to_string() });
                tokio::task::yield_now().await;
            }
            execution.finish(End::plain(Status::Ok));
            execution.finish(End::plain(Status::Lost));
        };
        let (first, second, ()) = tokio::join!(reader(execution.clone()), reader(execution.clone()), writer);
        assert_eq!(first, (1..=53).collect::<Vec<u64>>());
        assert_eq!(first, second);
        assert_eq!(execution.status(), Status::Ok);
    }
}
