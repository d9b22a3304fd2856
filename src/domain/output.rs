//! What an execution puts out and how it ends: its events, and the outcome they add up to.
//!
//! JSON that came from a kernel stays text ([`JsonText`]): it is carried, never understood.

use std::collections::BTreeMap;
use std::time::Duration;

use super::ids::ContextId;

/// One JSON value as text, known to be well-formed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonText(pub String);

impl JsonText {
    /// The empty object.
    #[must_use]
    pub fn object() -> Self {
        Self("{}".to_owned())
    }
}

/// MIME type to content, as nbformat has it.
pub type MimeBundle = BTreeMap<String, MimePart>;

/// The content of one MIME type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MimePart {
    /// As JSON.
    Inline(JsonText),
    /// Kept beside the execution, because it is long.
    Blob(BlobRef),
}

impl MimePart {
    /// Bytes that it takes where it stands.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Inline(JsonText(text)) => text.len(),
            Self::Blob(blob) => 128 + blob.sha256.len(),
        }
    }

    /// Whether it takes none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A long content that is kept beside its execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobRef {
    /// Its number among those of its execution, from 1.
    pub number: u32,
    /// Its length, decoded.
    pub bytes: u64,
    /// SHA-256 of its bytes in hex.
    pub sha256: String,
}

/// How far an execution is, or how it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// It waits for its turn.
    Queued,
    /// It runs.
    Running,
    /// It ran to its end.
    Ok,
    /// It ended with an exception.
    Error,
    /// It reached its time limit.
    Timeout,
    /// A caller took it back.
    Cancelled,
    /// Memory ran out and the kernel was ended.
    Oom,
    /// The kernel's process ended.
    KernelDied,
    /// It asked for input that nobody would give, and did not catch the refusal.
    InputDenied,
    /// Its session went away.
    Lost,
}

impl Status {
    /// Those that nothing follows.
    pub const FINAL: [Self; 8] = [
        Self::Ok,
        Self::Error,
        Self::Timeout,
        Self::Cancelled,
        Self::Oom,
        Self::KernelDied,
        Self::InputDenied,
        Self::Lost,
    ];

    /// The public word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Ok => "ok",
            Self::Error => "error",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
            Self::Oom => "oom",
            Self::KernelDied => "kernel_died",
            Self::InputDenied => "input_denied",
            Self::Lost => "lost",
        }
    }

    /// Whether nothing follows.
    #[must_use]
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

/// An exception as the kernel told it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorInfo {
    /// Its class.
    pub name: String,
    /// Its message.
    pub value: String,
    /// Its traceback, a line or block each, with the colours the kernel gave it.
    pub traceback: Vec<String>,
}

/// Standard output or standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TextStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What kind of rich output this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResultKind {
    /// The value of the last expression.
    ExecuteResult,
    /// Shown by the code.
    DisplayData,
}

/// A rich output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RichOutput {
    /// Which kind.
    pub kind: ResultKind,
    /// Its representations.
    pub data: MimeBundle,
    /// About them.
    pub metadata: JsonText,
    /// For a later update.
    pub display_id: Option<String>,
}

/// What was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Truncated {
    /// Text of standard output.
    Stdout,
    /// Text of standard error.
    Stderr,
    /// Results and displays.
    Results,
}

impl Truncated {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Stdout, Self::Stderr, Self::Results];

    /// The public word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Results => "results",
        }
    }
}

/// What happens to an execution, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum ExecutionEvent {
    /// It waits; `position` executions are before it.
    Queued {
        /// How many are before it.
        position: usize,
    },
    /// It runs.
    Started,
    /// Text.
    Text {
        /// Where it was written.
        stream: TextStream,
        /// What was written.
        text: String,
    },
    /// A rich output.
    Result(RichOutput),
    /// A rich output that was shown before has changed.
    ResultUpdate {
        /// Which one.
        display_id: String,
        /// Its new representations.
        data: MimeBundle,
        /// About them.
        metadata: JsonText,
    },
    /// What was put out so far is to be cleared.
    OutputClear {
        /// Only once something new comes.
        wait: bool,
    },
    /// The code asks for a line.
    InputRequested {
        /// What it asks.
        prompt: String,
        /// Whether the answer is to be hidden.
        password: bool,
    },
    /// An exception ended it.
    Error(ErrorInfo),
    /// Output was left out here.
    OutputTruncated {
        /// Which.
        what: Truncated,
        /// Bytes left out.
        omitted_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// Its kernel was replaced: variables are gone.
    KernelRestarted {
        /// Why.
        cause: RestartCause,
    },
    /// A message of a comm, for front doors whose clients have widgets.
    Comm(Comm),
    /// It ended. Always the last event.
    Completed,
}

impl ExecutionEvent {
    /// Numbers of the contents that are kept beside it.
    pub fn blobs(&self) -> impl Iterator<Item = u32> {
        let data = match self {
            Self::Result(RichOutput { data, .. }) | Self::ResultUpdate { data, .. } => Some(data),
            _ => None,
        };
        data.into_iter().flat_map(|data| data.values()).filter_map(|part| match part {
            MimePart::Blob(blob) => Some(blob.number),
            MimePart::Inline(_) => None,
        })
    }
}

/// A message of a comm: a channel between objects of a kernel and those of its front end.
#[derive(Debug, Clone, PartialEq)]
pub struct Comm {
    /// Which message.
    pub kind: CommKind,
    /// Its content.
    pub content: JsonText,
    /// Its metadata.
    pub metadata: JsonText,
    /// Its binary buffers.
    pub buffers: Vec<Vec<u8>>,
}

impl Comm {
    /// Bytes that it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.content.0.len() + self.metadata.0.len() + self.buffers.iter().map(Vec::len).sum::<usize>()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The messages of a comm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommKind {
    /// It is opened.
    Open,
    /// Something is told.
    Message,
    /// It is closed.
    Close,
}

/// Why a kernel was replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RestartCause {
    /// An interrupt did not end the code in time.
    Timeout,
    /// Memory ran out.
    Oom,
    /// Its process ended by itself.
    Died {
        /// Its exit status.
        status: Option<i32>,
        /// The signal that ended it.
        signal: Option<i32>,
    },
    /// A caller asked for it.
    Requested,
    /// Another context's processes could not be told from its own, and all were ended.
    Swept,
    /// The guest in its container did not answer, and the container was replaced: files are gone too.
    GuestLost,
}

/// How an execution that had to be stopped was stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// What it took.
    pub step: StopStep,
    /// From the decision to its end.
    pub took: Duration,
    /// Contexts whose kernels were ended with it, because processes could not be told apart.
    pub also_ended: Vec<ContextId>,
}

/// The steps of stopping an execution, each for what the one before did not end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StopStep {
    /// An interrupt. Variables are kept.
    Interrupt,
    /// A new kernel in the same container. Files are kept.
    Restart,
    /// A new container.
    Replace,
    /// The end of the session.
    End,
}

/// What became of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It is new.
    Created,
    /// It has other content.
    Changed,
    /// It is gone.
    Deleted,
}

/// A file below the working folder that an execution has changed. Names come from inside: they are hostile text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileChange {
    /// Its path relative to the working folder.
    pub path: String,
    /// What became of it.
    pub change: Change,
    /// Its size.
    pub bytes: Option<u64>,
    /// SHA-256 of its bytes in hex, where it was taken.
    pub sha256: Option<String>,
}

/// A process that an execution left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id inside the cell.
    pub pid: i32,
    /// Its command line, cut.
    pub command: String,
}

/// What an execution has cost and changed, as the guest saw it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Effects {
    /// Files that are not as they were.
    pub files: Vec<FileChange>,
    /// How many more there are.
    pub files_omitted: u64,
    /// Processes that were started and still run.
    pub processes: Vec<Process>,
    /// How many more there are.
    pub processes_omitted: u64,
    /// CPU time of its kernel with all it started.
    pub cpu: Option<Duration>,
    /// Most memory that the kernel's processes held.
    pub peak_memory_bytes: Option<u64>,
    /// Others may be counted in.
    pub approximate: bool,
    /// Processes could not be started.
    pub pids_hit: bool,
    /// A folder is full.
    pub disk_hit: bool,
    /// A process was ended for want of memory.
    pub memory_hit: bool,
}

/// The answer to one of an execution's user expressions, and other values that a kernel gives back beside its output.
pub type NamedValues = BTreeMap<String, JsonText>;

/// One output as a notebook shows it, in the order in which they came.
#[derive(Debug, Clone, PartialEq)]
pub enum Shown {
    /// Text; neighbours of the same stream are one.
    Text {
        /// Where it was written.
        stream: TextStream,
        /// What was written; where a part was left out, a line says so.
        text: String,
    },
    /// A rich output.
    Rich(RichOutput),
    /// An exception.
    Error(ErrorInfo),
}

/// Bytes of one stream of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TextTotals {
    /// Bytes that the code wrote.
    pub bytes: u64,
    /// Bytes that were left out.
    pub omitted: u64,
}

/// What an execution's events add up to.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// How it ended, or how far it is.
    pub status: Status,
    /// The kernel's count.
    pub execution_count: Option<u64>,
    /// Time in the queue.
    pub queued: Duration,
    /// Time it ran.
    pub duration: Duration,
    /// Standard output; where a part was left out, a line says so.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
    /// Totals of standard output.
    pub stdout_totals: TextTotals,
    /// Totals of standard error.
    pub stderr_totals: TextTotals,
    /// Bytes of results that were left out.
    pub results_omitted: u64,
    /// Rich outputs in order, updates applied.
    pub results: Vec<RichOutput>,
    /// The exception.
    pub error: Option<ErrorInfo>,
    /// Why its kernel was replaced, if it was.
    pub restarted: Option<RestartCause>,
    /// Why its kernel ended, if it did and no other came.
    pub kernel_end: Option<RestartCause>,
    /// How it was stopped, if it had to be.
    pub stop: Option<Stop>,
    /// How it ended, for people, where its status does not say all.
    pub detail: Option<String>,
    /// What it has cost and changed.
    pub effects: Effects,
    /// Values of its user expressions.
    pub user_expressions: NamedValues,
    /// What else the kernel gives back: pages, the next input.
    pub payloads: Vec<JsonText>,
}

/// What is known of an execution beside its events.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// The kernel's count.
    pub execution_count: Option<u64>,
    /// Why its kernel ended, if it did and no other came.
    pub kernel_end: Option<RestartCause>,
    /// How it was stopped, if it had to be.
    pub stop: Option<Stop>,
    /// How it ended, for people.
    pub detail: Option<String>,
    /// What it has cost and changed.
    pub effects: Effects,
    /// Values of its user expressions.
    pub user_expressions: NamedValues,
    /// What else the kernel gives back.
    pub payloads: Vec<JsonText>,
}

/// Adds up output events, as a notebook would show them.
#[derive(Debug, Default)]
pub struct Fold {
    shown: Vec<Shown>,
    totals: [TextTotals; 2],
    results_omitted: u64,
    restarted: Option<RestartCause>,
    clear_pending: bool,
    updated_bytes: usize,
}

/// Most bytes that updates of what was shown come to, in all places together.
const MAX_UPDATED: usize = 32 * 1024 * 1024;

impl Fold {
    /// Takes the next event.
    pub fn push(&mut self, event: &ExecutionEvent) {
        match event {
            ExecutionEvent::Text { stream, text } => {
                self.clear_if_pending();
                let totals = &mut self.totals[*stream as usize];
                totals.bytes = totals.bytes.saturating_add(text.len() as u64);
                self.write(*stream, text);
            }
            ExecutionEvent::Result(output) => {
                self.clear_if_pending();
                self.shown.push(Shown::Rich(output.clone()));
            }
            ExecutionEvent::ResultUpdate { display_id, data, metadata } => self.update(display_id, data, metadata),
            ExecutionEvent::OutputClear { wait: true } => self.clear_pending = true,
            ExecutionEvent::OutputClear { wait: false } => self.clear(),
            ExecutionEvent::Error(error) => self.shown.push(Shown::Error(error.clone())),
            ExecutionEvent::OutputTruncated { what, omitted_bytes, .. } => self.truncate(*what, *omitted_bytes),
            ExecutionEvent::KernelRestarted { cause } => self.restarted = Some(cause.clone()),
            ExecutionEvent::Queued { .. }
            | ExecutionEvent::Started
            | ExecutionEvent::InputRequested { .. }
            | ExecutionEvent::Comm(_)
            | ExecutionEvent::Completed => {}
        }
    }

    /// What is shown, in order.
    #[must_use]
    pub fn into_shown(self) -> Vec<Shown> {
        self.shown
    }

    /// The sum.
    #[must_use]
    pub fn finish(self, status: Status, queued: Duration, duration: Duration, report: Report) -> Outcome {
        let (mut texts, mut results, mut error) = ([String::new(), String::new()], Vec::new(), None);
        for shown in self.shown {
            match shown {
                Shown::Text { stream, text } => texts[stream as usize].push_str(&text),
                Shown::Rich(output) => results.push(output),
                Shown::Error(told) => error = Some(told),
            }
        }
        let [stdout, stderr] = texts;
        let [stdout_totals, stderr_totals] = self.totals;
        Outcome {
            status,
            execution_count: report.execution_count,
            queued,
            duration,
            stdout,
            stderr,
            stdout_totals,
            stderr_totals,
            results_omitted: self.results_omitted,
            results,
            error,
            restarted: self.restarted,
            kernel_end: report.kernel_end,
            stop: report.stop,
            detail: report.detail,
            effects: report.effects,
            user_expressions: report.user_expressions,
            payloads: report.payloads,
        }
    }

    fn write(&mut self, stream: TextStream, more: &str) {
        match self.shown.last_mut() {
            Some(Shown::Text { stream: last, text }) if *last == stream => text.push_str(more),
            _ => self.shown.push(Shown::Text { stream, text: more.to_owned() }),
        }
    }

    fn truncate(&mut self, what: Truncated, omitted: u64) {
        let stream = match what {
            Truncated::Stdout => TextStream::Stdout,
            Truncated::Stderr => TextStream::Stderr,
            Truncated::Results => {
                self.results_omitted = self.results_omitted.saturating_add(omitted);
                return;
            }
        };
        let totals = &mut self.totals[stream as usize];
        totals.omitted = totals.omitted.saturating_add(omitted);
        totals.bytes = totals.bytes.saturating_add(omitted);
        self.write(stream, &format!("\n[… {omitted} bytes left out …]\n"));
    }

    /// Changes all that was shown under the id. It may stand in many places, so what that comes to has a bound of its own.
    fn update(&mut self, display_id: &str, data: &MimeBundle, metadata: &JsonText) {
        let size = data.iter().map(|(mime, part)| mime.len() + part.len()).sum::<usize>() + metadata.0.len();
        for shown in &mut self.shown {
            let Shown::Rich(output) = shown else { continue };
            if output.display_id.as_deref() != Some(display_id) {
                continue;
            }
            if self.updated_bytes + size > MAX_UPDATED {
                self.results_omitted = self.results_omitted.saturating_add(size as u64);
                continue;
            }
            self.updated_bytes += size;
            output.data.clone_from(data);
            output.metadata.clone_from(metadata);
        }
    }

    fn clear_if_pending(&mut self) {
        if std::mem::take(&mut self.clear_pending) {
            self.clear();
        }
    }

    /// What is cleared from view was still written: the totals stay. An exception ends a cell, so nothing clears it.
    fn clear(&mut self) {
        self.shown.retain(|shown| matches!(shown, Shown::Error(_)));
        self.clear_pending = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(stream: TextStream, text: &str) -> ExecutionEvent {
        ExecutionEvent::Text { stream, text: text.to_owned() }
    }

    fn fold(events: &[ExecutionEvent]) -> Outcome {
        let mut fold = Fold::default();
        events.iter().for_each(|e| fold.push(e));
        fold.finish(Status::Ok, Duration::ZERO, Duration::ZERO, Report::default())
    }

    fn shown(id: &str, html: &str) -> RichOutput {
        let html = MimePart::Inline(JsonText(format!("{html:?}")));
        let data = MimeBundle::from([("text/html".to_owned(), html)]);
        RichOutput {
            kind: ResultKind::DisplayData,
            data,
            metadata: JsonText::object(),
            display_id: Some(id.to_owned()),
        }
    }

    #[test]
    fn a_gap_is_marked_and_counted() {
        let outcome = fold(&[
            text(TextStream::Stdout, "head"),
            ExecutionEvent::OutputTruncated { what: Truncated::Stdout, omitted_bytes: 100, total_bytes: 108 },
            text(TextStream::Stdout, "tail"),
        ]);
        assert_eq!(outcome.stdout, "head\n[… 100 bytes left out …]\ntail");
        assert_eq!(outcome.stdout_totals, TextTotals { bytes: 108, omitted: 100 });
    }

    #[test]
    fn an_update_changes_what_was_shown_in_place() {
        let new = shown("d", "new");
        let update = ExecutionEvent::ResultUpdate {
            display_id: "d".to_owned(),
            data: new.data.clone(),
            metadata: JsonText::object(),
        };
        let outcome =
            fold(&[ExecutionEvent::Result(shown("d", "old")), ExecutionEvent::Result(shown("e", "x")), update]);
        assert_eq!(outcome.results, vec![new, shown("e", "x")]);
    }

    #[test]
    fn an_update_of_many_places_has_a_bound() {
        let mut fold = Fold::default();
        (0..100).for_each(|_| fold.push(&ExecutionEvent::Result(shown("d", "x"))));
        let data = shown("d", &"y".repeat(MAX_UPDATED / 10)).data;
        let update = ExecutionEvent::ResultUpdate { display_id: "d".to_owned(), data, metadata: JsonText::object() };
        fold.push(&update);
        let outcome = fold.finish(Status::Ok, Duration::ZERO, Duration::ZERO, Report::default());
        let bytes: usize = outcome.results.iter().flat_map(|r| r.data.values()).map(MimePart::len).sum();
        assert!((MAX_UPDATED / 2..=MAX_UPDATED).contains(&bytes), "{bytes}");
        assert!(outcome.results_omitted > 0);
    }

    #[test]
    fn clear_with_wait_clears_only_when_something_new_comes() {
        let before = [text(TextStream::Stdout, "50 %"), ExecutionEvent::OutputClear { wait: true }];
        assert_eq!(fold(&before).stdout, "50 %");
        let [first, clear] = before;
        assert_eq!(fold(&[first, clear, text(TextStream::Stdout, "100 %")]).stdout, "100 %");
    }

    #[test]
    fn what_is_shown_stands_in_its_order() {
        let mut fold = Fold::default();
        let (out, err) = (TextStream::Stdout, TextStream::Stderr);
        [text(out, "a"), text(out, "b"), ExecutionEvent::Result(shown("d", "x")), text(out, "c"), text(err, "e")]
            .iter()
            .for_each(|e| fold.push(e));
        let written = |stream, text: &str| Shown::Text { stream, text: text.to_owned() };
        let expected = [written(out, "ab"), Shown::Rich(shown("d", "x")), written(out, "c"), written(err, "e")];
        assert_eq!(fold.into_shown(), expected);
    }

    proptest! {
        #[test]
        fn nothing_written_is_lost_without_a_clear(pieces in proptest::collection::vec((any::<bool>(), ".{0,20}"), 0..30)) {
            let events: Vec<_> = pieces.iter()
                .map(|(err, t)| text(if *err { TextStream::Stderr } else { TextStream::Stdout }, t)).collect();
            let outcome = fold(&events);
            let expected = |want: bool| pieces.iter().filter(|(err, _)| *err == want).map(|(_, t)| t.as_str()).collect::<String>();
            prop_assert_eq!(outcome.stdout, expected(false));
            prop_assert_eq!(outcome.stderr, expected(true));
        }
    }
}
