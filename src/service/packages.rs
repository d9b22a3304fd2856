//! Packages of a session: which may be asked for, installing them, and what is there.
//!
//! An installation is a command in the cell, which runs pip there as the code could; what may be fetched is decided where the index is asked. What the cell says of it
//! is hostile text, and is bounded here.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use cellblock_wire::commands::{CommandEnd, CommandEvent, CommandStream, EndedBy};
use cellblock_wire::packages::PYTHON_DIR;
use serde::Deserialize;

use super::commands::{CommandFollow, CommandInput, CommandRequest, Followed, Heard, Program};
use super::{Error, Service, keys::Principal};
use crate::domain::ids::{CommandId, SessionId};
use crate::domain::packages::Requirement;
use crate::domain::spec::{FieldError, SessionSpec};
use crate::session::Session;

/// The end of an installation's stdout, in which what was added is told, and of its stderr, in bytes; a list is longer.
const MAX_TAIL: usize = 64 * 1024;
const MAX_LIST: usize = 1024 * 1024;
/// Most packages that are told of, and the longest name or version, in characters.
const MAX_TOLD: (usize, usize) = (5000, 200);
/// Lines that a failure is explained with, and the longest, in characters.
const MAX_LINES: (usize, usize) = (8, 300);
/// Time to list what is there.
const LIST_TIME: f64 = 30.0;

/// A package, as the cell tells of it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// `session` if the session has installed it, else `image`.
    #[serde(default)]
    pub source: String,
}

/// What happens in an installation.
#[derive(Debug)]
pub enum InstallEvent {
    /// Progress, for people.
    Output(u64, CommandStream, Bytes),
    /// So many bytes of progress are left out here.
    Gap(u64, u64),
    /// It is over.
    Done(u64, Installed),
}

/// How an installation ended.
#[derive(Debug, Clone)]
pub struct Installed {
    /// What was added; nothing where it has failed.
    pub added: Vec<Package>,
    /// How long it took.
    pub duration: Duration,
    /// Why it has failed, if it has.
    pub failure: Option<String>,
}

/// An installation that runs.
#[derive(Debug)]
pub struct Install {
    command: CommandId,
    follow: CommandFollow,
    limit: Duration,
    stdout: Tail,
    stderr: Tail,
    is_over: bool,
}

/// The last bytes of a stream.
#[derive(Debug)]
struct Tail(BytesMut, usize);

impl Tail {
    fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        if self.0.len() > 2 * self.1 {
            let _ = self.0.split_to(self.0.len() - self.1);
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0).into_owned()
    }
}

impl Service {
    /// Installs packages into a session's own environment. It goes on whether or not anybody listens.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn install_packages(
        self: &Arc<Self>,
        who: &Principal,
        id: SessionId,
        (asked, upgrade): (&[String], bool),
    ) -> Result<Install, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        let wanted = choose(&session.spec, asked)?;
        let limit = self.registry.settings().package_timeout.min(session.spec.max_execution);
        let words = ["install".to_owned()].into_iter().chain(upgrade.then(|| "--upgrade".to_owned()));
        let words = words.chain(wanted.iter().map(ToString::to_string));
        let request = program(words.collect(), limit.as_secs_f64());
        let (command, follow) = self.start_command(who, id, request, None).await.map_err(no_python)?;
        let tail = || Tail(BytesMut::new(), MAX_TAIL);
        Ok(Install { command: command.id, follow, limit, stdout: tail(), stderr: tail(), is_over: false })
    }

    /// Has a new session install what it is to begin with; without, it ends.
    pub(super) async fn install_first(
        self: &Arc<Self>,
        who: &Principal,
        session: &Session,
        asked: &[String],
    ) -> Result<(), Error> {
        let installing = async {
            let mut install = self.install_packages(who, session.id, (asked, false)).await?;
            match install.finish().await?.failure {
                Some(failure) => Err(Error::InstallFailed(failure)),
                None => Ok(()),
            }
        };
        let installed = installing.await;
        if installed.is_err() {
            session.end(crate::domain::lifecycle::EndReason::StartFailed);
            super::wait_for_end(session).await;
        }
        installed
    }

    /// The packages of a session: what its image has, and what it has installed itself.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn packages(&self, who: &Principal, id: SessionId) -> Result<Vec<Package>, Error> {
        let session = self.session(who, id)?;
        let request = program(vec!["list".to_owned()], LIST_TIME.min(session.spec.max_execution.as_secs_f64()));
        let mut follow = CommandFollow::of(&session, &request).await.map_err(no_python)?;
        let mut stdout = Tail(BytesMut::new(), MAX_LIST);
        loop {
            let Followed { event, bytes, .. } = match follow.next().await? {
                Heard::Event(followed) => followed,
                Heard::End | Heard::Lost => return Err(Error::GuestUnreachable),
            };
            match event {
                CommandEvent::Output { stream: CommandStream::Stdout } => stdout.push(&bytes),
                CommandEvent::Ended { .. } => break,
                _ => {}
            }
        }
        #[derive(Deserialize)]
        struct Told {
            packages: Vec<Package>,
        }
        let told: Option<Told> = last_line(&stdout.text());
        let message = "the session's Python did not tell what is installed";
        told.map(|told| bounded(told.packages)).ok_or_else(|| Error::StateConflict(message.to_owned()))
    }
}

/// What is to be installed.
///
/// # Errors
/// Each mistake with its field.
fn choose(spec: &SessionSpec, asked: &[String]) -> Result<Vec<Requirement>, Error> {
    let wanted = spec.network.packages.choose(asked).map_err(Error::SpecRejected)?;
    match wanted.is_empty() {
        true => Err(Error::SpecRejected(vec![FieldError::new("/packages", "allowed are 1 to 64 packages")])),
        false => Ok(wanted),
    }
}

fn program(words: Vec<String>, timeout: f64) -> CommandRequest {
    let argv = ["python".to_owned(), format!("{PYTHON_DIR}/cellblock_packages.py")];
    CommandRequest {
        program: Program::Argv(argv.into_iter().chain(words).collect()),
        timeout_seconds: Some(timeout),
        input: CommandInput::Nothing,
        ..CommandRequest::default()
    }
}

fn no_python(error: Error) -> Error {
    match error {
        Error::SpecRejected(fields) if fields.iter().any(|field| field.pointer == "/argv/0") => {
            Error::StateConflict("the session's image has no Python, so that it has no packages".to_owned())
        }
        other => other,
    }
}

impl Install {
    /// The command that installs.
    #[must_use]
    pub fn command(&self) -> CommandId {
        self.command
    }

    /// The next thing that happens; nothing behind the last.
    ///
    /// # Errors
    /// When the session has ended, or its guest does not answer any more.
    pub async fn next(&mut self) -> Result<Option<InstallEvent>, Error> {
        while !self.is_over {
            let Followed { seq, event, bytes } = match self.follow.next().await? {
                Heard::Event(followed) => followed,
                Heard::End | Heard::Lost => return Err(Error::GuestUnreachable),
            };
            match event {
                CommandEvent::Output { stream } => {
                    match stream {
                        CommandStream::Stdout => self.stdout.push(&bytes),
                        CommandStream::Stderr => self.stderr.push(&bytes),
                    }
                    return Ok(Some(InstallEvent::Output(seq, stream, bytes)));
                }
                CommandEvent::Gap { omitted_bytes, .. } => return Ok(Some(InstallEvent::Gap(seq, omitted_bytes))),
                CommandEvent::Ended { end, .. } => {
                    self.is_over = true;
                    return Ok(Some(InstallEvent::Done(seq, self.installed(end))));
                }
                CommandEvent::Started { .. } => {}
            }
        }
        Ok(None)
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// See [`Install::next`].
    pub async fn finish(&mut self) -> Result<Installed, Error> {
        while let Some(event) = self.next().await? {
            if let InstallEvent::Done(_, installed) = event {
                return Ok(installed);
            }
        }
        Err(Error::GuestUnreachable)
    }

    fn installed(&self, end: CommandEnd) -> Installed {
        #[derive(Deserialize)]
        struct Told {
            added: Vec<Package>,
        }
        let duration = Duration::from_millis(end.duration_ms);
        let told: Option<Told> = last_line(&self.stdout.text());
        let failed = |failure: String| Installed { added: Vec::new(), duration, failure: Some(failure) };
        match (end.by, end.status, told) {
            (EndedBy::Itself, Some(0), Some(told)) => Installed { added: bounded(told.added), duration, failure: None },
            (EndedBy::Timeout, ..) => {
                failed(format!("it took longer than {} s and was ended; nothing was added", self.limit.as_secs_f64()))
            }
            (EndedBy::Request | EndedBy::Swept, ..) => failed("it was ended before its end".to_owned()),
            _ if end.oom => failed("memory ran out while it ran".to_owned()),
            _ => failed(explanation(&self.stderr.text())),
        }
    }
}

/// The last line, if it is what is expected.
fn last_line<T: for<'de> Deserialize<'de>>(text: &str) -> Option<T> {
    serde_json::from_str(text.lines().next_back()?).ok()
}

/// What a cell tells is shown to callers.
fn bounded(packages: Vec<Package>) -> Vec<Package> {
    let cut = |text: String| text.chars().filter(|c| !c.is_control()).take(MAX_TOLD.1).collect::<String>();
    let package = |told: Package| Package {
        name: cut(told.name),
        version: cut(told.version),
        source: if told.source == "session" { "session" } else { "image" }.to_owned(),
    };
    packages.into_iter().take(MAX_TOLD.0).map(package).collect()
}

/// The lines that say what went wrong: the server's own first, as far as the cell passes them on, then pip's.
fn explanation(stderr: &str) -> String {
    let lines = |prefix: &'static str| stderr.lines().filter_map(move |line| line.strip_prefix(prefix));
    let lines: Vec<String> = lines("cellblock: ")
        .chain(lines("ERROR: "))
        .take(MAX_LINES.0)
        .map(|line| line.chars().filter(|c| !c.is_control()).take(MAX_LINES.1).collect())
        .collect();
    let text = lines.join("\n");
    match text.contains("No space left on device") {
        true => format!("the session's disk is full, and nothing was added\n{text}"),
        false if text.is_empty() => "pip has failed without a word; its output is among the command's".to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_explained_within_bounds() {
        let stderr = "noise\nERROR: No matching distribution\ncellblock: x is offered as source code only\n";
        assert_eq!(explanation(stderr), "x is offered as source code only\nNo matching distribution");
        assert!(
            explanation("ERROR: [Errno 28] No space left on device: 'x'").starts_with("the session's disk is full")
        );
        assert!(explanation("").contains("without a word"));
        let long = explanation(&format!("ERROR: {}\n", "y\u{7}".repeat(1000)).repeat(100));
        assert_eq!((long.lines().count(), long.contains('\u{7}')), (MAX_LINES.0, false));
        assert!(long.lines().all(|line| line.len() <= MAX_LINES.1));
    }

    #[test]
    fn tails_are_bounded_and_hold_the_end() {
        let mut tail = Tail(BytesMut::new(), 10);
        (0..1000).for_each(|n| tail.push(format!("{n},").as_bytes()));
        assert!(tail.0.len() <= 20 && tail.text().ends_with("998,999,"), "{}", tail.text());
    }
}
