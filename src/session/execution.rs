//! One execution as a record: its events in order, for any number of readers at once.
//!
//! Only the task of its session writes; readers follow by sequence number and wait on a version, never on a timer. It holds at
//! most what its limits allow, whatever the guest says.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::watch;

use crate::domain::ids::{ContextId, ExecutionId, SessionId};
use crate::domain::output::{ExecutionEvent, Fold, Outcome, RichOutput, Status, Truncated};
use crate::domain::spec::OutputLimits;

/// What a guest may exceed the limits by before the control plane leaves output out: tails, marks and messages under way.
const SLACK_BYTES: u64 = 512 * 1024;
/// Most events of one execution beyond its limit of messages.
const SLACK_EVENTS: u64 = 256;

/// What is to be run, with every limit decided.
#[derive(Debug, Clone)]
pub struct ExecutionRequest {
    /// The code.
    pub code: String,
    /// It is interrupted after this long.
    pub timeout: Duration,
    /// Nothing is shown and nothing is counted.
    pub silent: bool,
    /// It takes part in the kernel's count.
    pub store_history: bool,
    /// What it may put out.
    pub output: OutputLimits,
}

/// An event with its place in the order.
#[derive(Debug, Clone, PartialEq)]
pub struct Logged {
    /// Rises by one from 1.
    pub seq: u64,
    /// When the control plane had it.
    pub at: Timestamp,
    /// What happened.
    pub event: ExecutionEvent,
}

/// An execution.
#[derive(Debug)]
pub struct Execution {
    /// Its id.
    pub id: ExecutionId,
    /// Its session.
    pub session: SessionId,
    /// Its context.
    pub context: ContextId,
    /// Its context's language.
    pub language: String,
    /// What is to be run.
    pub request: ExecutionRequest,
    /// When it was accepted.
    pub created_at: Timestamp,
    record: Mutex<Record>,
    version: watch::Sender<u64>,
}

#[derive(Debug)]
struct Record {
    events: Vec<Arc<Logged>>,
    status: Status,
    execution_count: Option<u64>,
    accepted: Instant,
    started: Option<Instant>,
    finished: Option<Instant>,
    bytes: u64,
}

impl Execution {
    /// A new one, waiting behind `position` others.
    #[must_use]
    pub fn new(
        id: ExecutionId,
        session: SessionId,
        context: ContextId,
        language: String,
        request: ExecutionRequest,
        position: usize,
    ) -> Self {
        let execution = Self {
            id,
            session,
            context,
            language,
            request,
            created_at: Timestamp::now(),
            record: Mutex::new(Record {
                events: Vec::new(),
                status: Status::Queued,
                execution_count: None,
                accepted: Instant::now(),
                started: None,
                finished: None,
                bytes: 0,
            }),
            version: watch::Sender::new(0),
        };
        execution.log(execution.record(), ExecutionEvent::Queued { position });
        execution
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
        self.record().bytes + self.request.code.len() as u64 + 1024
    }

    /// Events after number `after`, in order.
    #[must_use]
    pub fn events_after(&self, after: u64) -> Vec<Arc<Logged>> {
        let record = self.record();
        let from = usize::try_from(after).unwrap_or(usize::MAX).min(record.events.len());
        record.events[from..].to_vec()
    }

    /// A watch that changes with every event.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Waits until it has ended. Level-triggered.
    pub async fn ended(&self) {
        let mut version = self.subscribe();
        while !self.status().is_final() {
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
            record.execution_count,
            started - record.accepted,
            record.finished.unwrap_or(now).saturating_duration_since(started),
        )
    }

    pub(super) fn start(&self) {
        let mut record = self.record();
        record.status = Status::Running;
        record.started = Some(Instant::now());
        self.log(record, ExecutionEvent::Started);
    }

    pub(super) fn count(&self, execution_count: u64) {
        self.record().execution_count = Some(execution_count);
    }

    /// Adds an event, or, above the limits, the fact that it was left out.
    pub(super) fn output(&self, event: ExecutionEvent) {
        let size = size_of_event(&event);
        let limits = &self.request.output;
        let admitted = {
            let mut record = self.record();
            let within = record.bytes + size <= 2 * limits.text_bytes + limits.result_bytes + SLACK_BYTES
                && (record.events.len() as u64) < limits.messages + SLACK_EVENTS;
            if within {
                record.bytes += size;
            }
            within
        };
        if admitted {
            self.log(self.record(), event);
        } else if let Some(what) = what_is_left_out(&event) {
            self.leave_out(what, size);
        }
    }

    /// Ends it; only the first end counts.
    pub(super) fn finish(&self, status: Status) {
        let mut record = self.record();
        if record.status.is_final() {
            return;
        }
        record.finished = Some(Instant::now());
        record.status = status;
        // With the same lock: whoever sees the end sees the last event too.
        self.log(record, ExecutionEvent::Completed);
    }

    fn log(&self, mut record: MutexGuard<'_, Record>, event: ExecutionEvent) {
        let seq = record.events.len() as u64 + 1;
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

fn what_is_left_out(event: &ExecutionEvent) -> Option<Truncated> {
    use crate::domain::output::TextStream;
    match event {
        ExecutionEvent::Text { stream: TextStream::Stdout, .. } => Some(Truncated::Stdout),
        ExecutionEvent::Text { stream: TextStream::Stderr, .. } => Some(Truncated::Stderr),
        ExecutionEvent::Result(_) | ExecutionEvent::ResultUpdate { .. } => Some(Truncated::Results),
        _ => None,
    }
}

fn size_of_event(event: &ExecutionEvent) -> u64 {
    let bundle =
        |data: &crate::domain::output::MimeBundle| data.iter().map(|(k, v)| k.len() + v.0.len()).sum::<usize>();
    let size = match event {
        ExecutionEvent::Text { text, .. } => text.len(),
        ExecutionEvent::Result(RichOutput { data, metadata, .. }) => bundle(data) + metadata.0.len(),
        ExecutionEvent::ResultUpdate { data, metadata, .. } => bundle(data) + metadata.0.len(),
        ExecutionEvent::Error(error) => error.value.len() + error.traceback.iter().map(String::len).sum::<usize>(),
        _ => 0,
    };
    size as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::output::TextStream;
    use uuid::Uuid;

    fn execution(limits: OutputLimits) -> Execution {
        let id = Uuid::from_u128(1);
        let request = ExecutionRequest {
            code: String::new(),
            timeout: Duration::from_secs(1),
            silent: false,
            store_history: true,
            output: limits,
        };
        Execution::new(id.into(), id.into(), id.into(), "python".to_owned(), request, 0)
    }

    #[test]
    fn a_guest_that_ignores_the_limits_fills_nothing() {
        let execution = execution(OutputLimits { text_bytes: 1000, result_bytes: 1000, messages: 10 });
        let chunk = "x".repeat(64 * 1024);
        for _ in 0..10_000 {
            execution.output(ExecutionEvent::Text { stream: TextStream::Stdout, text: chunk.clone() });
            execution.output(ExecutionEvent::OutputClear { wait: false });
        }
        execution.finish(Status::Ok);
        let outcome = execution.outcome();
        assert!(execution.weight() < 1024 * 1024);
        assert!(execution.events_after(0).len() < 1000);
        assert!(outcome.stdout_totals.omitted > 0);
    }

    #[tokio::test]
    async fn every_reader_sees_every_event_in_order() {
        let execution = Arc::new(execution(OutputLimits { text_bytes: 1000, result_bytes: 1000, messages: 1000 }));
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
            execution.finish(Status::Ok);
            execution.finish(Status::Lost);
        };
        let (first, second, ()) = tokio::join!(reader(execution.clone()), reader(execution.clone()), writer);
        assert_eq!(first, (1..=53).collect::<Vec<u64>>());
        assert_eq!(first, second);
        assert_eq!(execution.status(), Status::Ok);
    }
}
