//! What an execution puts out and how it ends: its events, and the outcome they add up to.
//!
//! JSON that came from a kernel stays text ([`JsonText`]): it is carried, never understood.

use std::collections::BTreeMap;
use std::time::Duration;

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
pub type MimeBundle = BTreeMap<String, JsonText>;

/// How far an execution is, or how it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// It ended. Always the last event.
    Completed,
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
}

/// Adds up output events, as a notebook would show them.
#[derive(Debug, Default)]
pub struct Fold {
    stdout: Text,
    stderr: Text,
    results: Vec<RichOutput>,
    results_omitted: u64,
    error: Option<ErrorInfo>,
    restarted: Option<RestartCause>,
    clear_pending: bool,
}

#[derive(Debug, Default)]
struct Text {
    text: String,
    totals: TextTotals,
}

impl Fold {
    /// Takes the next event.
    pub fn push(&mut self, event: &ExecutionEvent) {
        match event {
            ExecutionEvent::Text { stream, text } => {
                self.clear_if_pending();
                let target = self.text_mut(*stream);
                target.text.push_str(text);
                target.totals.bytes = target.totals.bytes.saturating_add(text.len() as u64);
            }
            ExecutionEvent::Result(output) => {
                self.clear_if_pending();
                self.results.push(output.clone());
            }
            ExecutionEvent::ResultUpdate { display_id, data, metadata } => self.update(display_id, data, metadata),
            ExecutionEvent::OutputClear { wait: true } => self.clear_pending = true,
            ExecutionEvent::OutputClear { wait: false } => self.clear(),
            ExecutionEvent::Error(error) => self.error = Some(error.clone()),
            ExecutionEvent::OutputTruncated { what, omitted_bytes, .. } => self.truncate(*what, *omitted_bytes),
            ExecutionEvent::KernelRestarted { cause } => self.restarted = Some(cause.clone()),
            ExecutionEvent::Queued { .. }
            | ExecutionEvent::Started
            | ExecutionEvent::InputRequested { .. }
            | ExecutionEvent::Completed => {}
        }
    }

    /// The sum.
    #[must_use]
    pub fn finish(self, status: Status, execution_count: Option<u64>, queued: Duration, duration: Duration) -> Outcome {
        Outcome {
            status,
            execution_count,
            queued,
            duration,
            stdout: self.stdout.text,
            stderr: self.stderr.text,
            stdout_totals: self.stdout.totals,
            stderr_totals: self.stderr.totals,
            results_omitted: self.results_omitted,
            results: self.results,
            error: self.error,
            restarted: self.restarted,
        }
    }

    fn text_mut(&mut self, stream: TextStream) -> &mut Text {
        match stream {
            TextStream::Stdout => &mut self.stdout,
            TextStream::Stderr => &mut self.stderr,
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
        let target = self.text_mut(stream);
        target.totals.omitted = target.totals.omitted.saturating_add(omitted);
        target.totals.bytes = target.totals.bytes.saturating_add(omitted);
        target.text.push_str(&format!("\n[… {omitted} bytes left out …]\n"));
    }

    fn update(&mut self, display_id: &str, data: &MimeBundle, metadata: &JsonText) {
        for shown in self.results.iter_mut().filter(|r| r.display_id.as_deref() == Some(display_id)) {
            shown.data.clone_from(data);
            shown.metadata.clone_from(metadata);
        }
    }

    fn clear_if_pending(&mut self) {
        if std::mem::take(&mut self.clear_pending) {
            self.clear();
        }
    }

    /// What is cleared from view was still written: the totals stay.
    fn clear(&mut self) {
        self.stdout.text.clear();
        self.stderr.text.clear();
        self.results.clear();
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
        fold.finish(Status::Ok, None, Duration::ZERO, Duration::ZERO)
    }

    fn shown(id: &str, html: &str) -> RichOutput {
        let data = MimeBundle::from([("text/html".to_owned(), JsonText(format!("{html:?}")))]);
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
    fn clear_with_wait_clears_only_when_something_new_comes() {
        let before = [text(TextStream::Stdout, "50 %"), ExecutionEvent::OutputClear { wait: true }];
        assert_eq!(fold(&before).stdout, "50 %");
        let [first, clear] = before;
        assert_eq!(fold(&[first, clear, text(TextStream::Stdout, "100 %")]).stdout, "100 %");
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
