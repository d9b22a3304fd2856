//! Commands and terminals over the link: their requests, and the bodies of those.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `POST /commands` | one frame: [`StartCommand`], and what it finds on its stdin, if anything | [`CommandView`] |
//! | `GET /commands` | | `[`[`CommandView`]`]`, oldest first |
//! | `GET /commands/{id}` | | [`CommandView`] |
//! | `GET /commands/{id}/events?after={seq}` | | a stream of frames: [`NumberedCommandEvent`] and the bytes, to the end; with `&follow=0` to what there is now |
//! | `POST /commands/{id}/follow?after={seq}` | | the same as a byte stream ([`tunnel::narrow`](crate::tunnel::narrow)) |
//! | `POST /commands/{id}/stdin?close={0,1}` | bytes | [`StdinTaken`] |
//! | `POST /commands/{id}/signal` | [`Signal`](crate::link::Signal) | 204 |
//! | `POST /commands/{id}/resize` | [`Size`] | 204 |
//! | `DELETE /commands/{id}` | | [`CommandView`], once its processes are gone |
//!
//! A command's id is chosen by the control plane. One that was started under an id is not started again: the answer is what the first one got, so
//! that whoever did not hear it may ask again. Ended commands can be asked for until newer ones have taken their room.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Most bytes of stdin in one request.
pub const MAX_STDIN: usize = 1024 * 1024;

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// Starts a command.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartCommand {
    /// The control plane's id for it; lower-case letters and digits, at most 64.
    pub id: String,
    /// The program and its arguments. Empty for what stands in `shell`, or else for an interactive shell.
    #[serde(default)]
    pub argv: Vec<String>,
    /// A line for the image's shell: `bash` where there is one, else `sh`.
    #[serde(default)]
    pub shell: Option<String>,
    /// Added to the environment of the session.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Its working folder; the session's when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// It is ended with all its processes after running for this long.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
    /// Its stdin stays open for what is sent later; without, it is at its end behind what comes with this request.
    #[serde(default)]
    pub stdin: bool,
    /// Bytes of stdout and of stderr, each, that are kept; of a terminal, of the last output.
    pub text_bytes: u64,
    /// It runs in a terminal of this size: stdout and stderr are one.
    #[serde(default)]
    pub tty: Option<Size>,
    /// What somebody wants to know it by; it means nothing here.
    #[serde(default)]
    pub tag: Option<String>,
}

/// A command, running or ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandView {
    /// Its id.
    pub id: String,
    /// The program and its arguments, with the shell if there is one.
    pub argv: Vec<String>,
    /// Its working folder.
    pub cwd: String,
    /// Whether it runs in a terminal.
    #[serde(default)]
    pub tty: bool,
    /// See [`StartCommand::tag`].
    #[serde(default)]
    pub tag: Option<String>,
    /// Its process id in the cell.
    pub pid: i32,
    /// When it was started, in milliseconds since 1970.
    pub started_at_ms: u64,
    /// Bytes of stdout so far; of a terminal, of both.
    #[serde(default)]
    pub stdout: Totals,
    /// Bytes of stderr so far.
    #[serde(default)]
    pub stderr: Totals,
    /// The number of its newest event.
    #[serde(default)]
    pub last_seq: u64,
    /// How it ended, if it has.
    #[serde(default)]
    pub end: Option<CommandEnd>,
}

/// How much a stream had.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Bytes in all.
    pub bytes: u64,
    /// How many of them are not kept. Of a running command's, its tail may still become known.
    pub omitted: u64,
}

/// What ended a command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndedBy {
    /// Itself, or a signal that was sent to it.
    #[default]
    Itself,
    /// Its time limit.
    Timeout,
    /// A request to end it.
    Request,
    /// The end of a kernel whose processes could not be told from others.
    Swept,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandEnd {
    /// Its exit status, if it exited.
    pub status: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// What ended it.
    #[serde(default)]
    pub by: EndedBy,
    /// CPU time of its process, and of those below that it has waited for.
    #[serde(default)]
    pub cpu_usec: Option<u64>,
    /// The most memory that any one of these held.
    #[serde(default)]
    pub peak_memory_bytes: Option<u64>,
    /// From its start.
    #[serde(default)]
    pub duration_ms: u64,
    /// Processes of the cell were ended for want of memory while it ran, and so was it, as it seems.
    #[serde(default)]
    pub oom: bool,
}

/// A stream of a command's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CommandStream {
    /// Standard output; of a terminal, all output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// An event of a command, and its number. Numbers rise by one from 1 in each command's life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumberedCommandEvent {
    /// The event's number.
    pub seq: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: CommandEvent,
}

/// What happens to a command, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum CommandEvent {
    /// It runs.
    Started {
        /// Its process id in the cell.
        pid: i32,
    },
    /// Output; the bytes are the frame's part. Characters of UTF-8 are not cut, but of a terminal's output they may be.
    Output {
        /// Of which stream.
        stream: CommandStream,
    },
    /// Output was left out here. What follows of this stream is its tail; of a terminal, what is still kept.
    Gap {
        /// Of which stream.
        stream: CommandStream,
        /// Bytes in all, with those left out.
        total_bytes: u64,
        /// Bytes left out.
        omitted_bytes: u64,
    },
    /// It has ended. Nothing follows.
    Ended {
        /// How.
        end: CommandEnd,
        /// Bytes of its stdout.
        #[serde(default)]
        stdout: Totals,
        /// Bytes of its stderr.
        #[serde(default)]
        stderr: Totals,
    },
}

/// What was taken of what was sent to a command's stdin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StdinTaken {
    /// So many bytes, in order; fewer than were sent when the command did not read them in time.
    pub bytes: u64,
    /// Whether its stdin is at its end behind them.
    #[serde(default)]
    pub closed: bool,
}
