//! Commands and terminals of sessions: what may be asked for, starting, following, input, signals, ending.
//!
//! The guest has them, not this process: nothing here is lost with it, and nothing is kept of them but what the audit has. What the guest says of
//! them is hostile text. How they are told over HTTP is decided elsewhere.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cellblock_wire::commands::{
    CommandEnd, CommandEvent, CommandStream, CommandView, MAX_STDIN, Size, StartCommand, StdinTaken,
};
use cellblock_wire::files::TMP_DIR;
use cellblock_wire::frame::MAX_HEAD;
use jiff::Timestamp;

use super::quotas::Running;
use super::{CPU_SLACK, Error, Service, carry_on, keys::Principal, trail, unreachable_guest};
use crate::domain::ids::{CommandId, SessionId};
use crate::domain::lifecycle::Phase;
use crate::domain::spec::{self, FieldError, SessionSpec};
use crate::kernel::commands::CommandEvents;
use crate::kernel::link::LinkError;
use crate::session::once::{Made, Reservation};
use crate::session::visits::{Visit, Weight};
use crate::session::{Refused, Session, fresh};

/// Most arguments of one command.
const MAX_ARGUMENTS: usize = 4096;
/// Longest command line, in bytes: all arguments together. A single one may be no longer than a process takes.
const MAX_LINE: usize = 128 * 1024;
/// Longest tag, in bytes: the guest keeps no longer one.
const MAX_TAG: usize = 256;
/// Longest path of a folder, in bytes.
const MAX_CWD: usize = 1024;
/// Most bytes of a terminal's output that are kept for whoever attaches later.
pub const SCROLLBACK: u64 = 256 * 1024;
/// Most columns and rows of a terminal.
pub const MAX_SIDE: u16 = 1000;
/// A link that has broken is waited for this long.
const LINK_WAIT: Duration = Duration::from_secs(60);
/// … by asking again this often: what tells of the next one is the session's own business.
const LINK_STEP: Duration = Duration::from_millis(50);
/// The same for whoever is in no hurry.
const LINK_RETRY: Duration = Duration::from_secs(1);
/// Signals that may be sent.
pub const SIGNALS: [&str; 11] = [
    "SIGHUP", "SIGINT", "SIGQUIT", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGTERM", "SIGCONT", "SIGSTOP", "SIGTSTP",
    "SIGWINCH",
];

/// What is to be run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Program {
    /// An interactive shell.
    #[default]
    Shell,
    /// A program and its arguments.
    Argv(Vec<String>),
    /// A line for a shell.
    Line(String),
}

/// What a command finds on its stdin.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum CommandInput {
    /// Its end.
    #[default]
    Nothing,
    /// What is sent to it later.
    Open,
    /// This.
    Bytes(Bytes),
}

/// What is asked of a command.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CommandRequest {
    /// What is to be run.
    pub program: Program,
    /// Added to the session's environment.
    pub env: BTreeMap<String, String>,
    /// Where; the working folder when absent.
    pub cwd: Option<String>,
    /// That may be anywhere in the container, where the command itself can go anyway.
    pub is_cwd_free: bool,
    /// Its time limit; by default the session's for an execution, and for what nobody waits for the most that may be.
    pub timeout_seconds: Option<f64>,
    /// What it finds on its stdin.
    pub input: CommandInput,
    /// Bytes of stdout and of stderr, each; the template's limit when absent.
    pub max_output_bytes: Option<u64>,
    /// It runs in a terminal.
    pub tty: Option<Size>,
    /// Nobody waits for its end.
    pub is_background: bool,
    /// What somebody wants to know it by.
    pub tag: Option<String>,
}

/// A command of a session, as its guest tells of it.
#[derive(Debug, Clone)]
pub struct Command {
    /// Its id.
    pub id: CommandId,
    /// Its session.
    pub session: SessionId,
    /// What the guest says.
    pub told: CommandView,
    /// The guest that had it is gone, or has forgotten it.
    pub is_lost: bool,
}

/// An event of a command.
#[derive(Debug, Clone)]
pub struct Followed {
    /// Its number.
    pub seq: u64,
    /// What happened.
    pub event: CommandEvent,
    /// Output.
    pub bytes: Bytes,
}

/// What somebody who follows hears.
#[derive(Debug)]
pub enum Heard {
    /// An event.
    Event(Followed),
    /// There are no more.
    End,
    /// The guest that had the command is gone, or has forgotten it.
    Lost,
}

/// Somebody follows a command. Its session is in use as long as this lives.
#[derive(Debug)]
pub struct CommandFollow {
    session: Session,
    id: CommandId,
    seq: u64,
    is_waiting: bool,
    is_over: bool,
    stream: Option<(Visit, CommandEvents)>,
}

impl Service {
    /// Starts a command. It goes on whether or not anybody listens.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn start_command(
        self: &Arc<Self>,
        who: &Principal,
        id: SessionId,
        request: CommandRequest,
        once: Option<Reservation>,
    ) -> Result<(Command, CommandFollow), Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        self.accepts()?;
        trail::note_code(&told_line(&request.program));
        let (mut start, input) = resolve(&session.spec, &request)?;
        let running = self.quotas.begin_execution(&who.tenant, self.stored(&who.tenant), Timestamp::now())?;
        let service = Arc::clone(self);
        // What was started is kept even if its caller leaves at this moment.
        let started = carry_on("command", async move {
            let command: CommandId = fresh();
            start.id = command.to_string();
            if let Some(once) = &once {
                once.will_be(Made::Command(id, command));
            }
            let started = start_once(&session, &start, &input).await;
            if let Some(once) = once {
                service.settle_key(once, &started).await?;
            }
            let told = started?;
            count(running, session.clone(), command);
            let follow = CommandFollow::new(session, command, 0, true);
            Ok((Command { id: command, session: id, told, is_lost: false }, follow))
        });
        started.await.unwrap_or(Err(Error::GuestUnreachable))
    }

    /// The commands of a session, oldest first, as far as they are not forgotten.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn commands(&self, who: &Principal, id: SessionId) -> Result<Vec<Command>, Error> {
        let session = self.session(who, id)?;
        let visit = enter(&session).await?;
        let told = visit.link.commands().await.map_err(|error| refused(id, error))?;
        let known = told
            .into_iter()
            .filter_map(|told| Some(Command { id: told.id.parse().ok()?, session: id, told, is_lost: false }));
        Ok(known.collect())
    }

    /// A command as it is.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn command(&self, who: &Principal, id: SessionId, command: CommandId) -> Result<Command, Error> {
        let session = self.session(who, id)?;
        let visit = enter(&session).await?;
        let told = visit.link.command(&command.to_string()).await.map_err(|error| refused(id, error))?;
        Ok(Command { id: command, session: id, told, is_lost: false })
    }

    /// A command's events after a number; with `is_waiting` to its end, else to what there is.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn follow_command(
        &self,
        who: &Principal,
        id: SessionId,
        command: CommandId,
        (after, is_waiting): (u64, bool),
    ) -> Result<CommandFollow, Error> {
        let session = self.session(who, id)?;
        let mut follow = CommandFollow::new(session, command, after, is_waiting);
        // Whether there is such a command is answered before anything is streamed.
        follow.open().await?;
        Ok(follow)
    }

    /// Sends bytes to a command's stdin; says how many it took.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn write_command(
        &self,
        who: &Principal,
        id: SessionId,
        command: CommandId,
        (bytes, close): (Bytes, bool),
    ) -> Result<StdinTaken, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        if bytes.len() > MAX_STDIN {
            let message = format!("{} bytes; allowed are {MAX_STDIN} at once", bytes.len());
            return Err(Error::SpecRejected(vec![FieldError::new("/data", message)]));
        }
        let is_empty = bytes.is_empty();
        let visit = enter(&session).await?;
        let taken = visit.link.write_command(&command.to_string(), bytes, close).await;
        let taken = taken.map_err(|error| refused(id, error))?;
        if taken.bytes == 0 && !is_empty {
            let message = "the command did not read its stdin in time, and nothing of this was sent";
            return Err(Error::StateConflict(message.to_owned()));
        }
        Ok(taken)
    }

    /// Signals a command's process group.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn signal_command(
        &self,
        who: &Principal,
        id: SessionId,
        command: CommandId,
        signal: &str,
    ) -> Result<(), Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        if !SIGNALS.contains(&signal) {
            let message = format!("allowed are {}", SIGNALS.join(", "));
            return Err(Error::SpecRejected(vec![FieldError::new("/signal", message)]));
        }
        let visit = enter(&session).await?;
        visit.link.signal_command(&command.to_string(), signal).await.map_err(|error| refused(id, error))
    }

    /// Gives a command's terminal another size.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn resize_command(
        &self,
        who: &Principal,
        id: SessionId,
        command: CommandId,
        size: Size,
    ) -> Result<(), Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        let mut errors = Vec::new();
        check_size(size, "", &mut errors);
        if !errors.is_empty() {
            return Err(Error::SpecRejected(errors));
        }
        let visit = enter(&session).await?;
        visit.link.resize_command(&command.to_string(), size).await.map_err(|error| refused(id, error))
    }

    /// Ends a command with all its processes; answers once they are gone. One that has ended stays as it is, but what it has left running ends.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn end_command(&self, who: &Principal, id: SessionId, command: CommandId) -> Result<Command, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        let ended = carry_on("command", async move {
            let visit = enter(&session).await?;
            visit.link.end_command(&command.to_string()).await.map_err(|error| refused(id, error))
        });
        let told = ended.await.unwrap_or(Err(Error::GuestUnreachable))?;
        Ok(Command { id: command, session: id, told, is_lost: false })
    }

    /// Ends a command whose caller has hung up; nobody is there to hear an answer.
    pub fn end_command_unheard(self: &Arc<Self>, who: &Principal, id: SessionId, command: CommandId) {
        let (service, who) = (Arc::clone(self), who.clone());
        crate::task::spawn("command", async move {
            if let Err(error) = service.end_command(&who, id, command).await {
                tracing::debug!(session = %id, %command, %error, "a command whose caller hung up could not be ended");
            }
        });
    }
}

impl CommandFollow {
    /// Starts what the server itself wants to know of a session, and follows it. It is nobody's command, and counts for nobody.
    pub(super) async fn of(session: &Session, request: &CommandRequest) -> Result<Self, Error> {
        let id: CommandId = fresh();
        let (mut start, input) = resolve(&session.spec, request)?;
        start.id = id.to_string();
        start_once(session, &start, &input).await?;
        Ok(Self::new(session.clone(), id, 0, true))
    }

    fn new(session: Session, id: CommandId, after: u64, is_waiting: bool) -> Self {
        Self { session, id, seq: after, is_waiting, is_over: false, stream: None }
    }

    /// Begins anew, which is no activity of its own.
    async fn open(&mut self) -> Result<(), Error> {
        let visit = enter(&self.session).await?;
        let events = visit.link.follow_command(&self.id.to_string(), self.seq, self.is_waiting).await;
        self.stream = Some((visit, events.map_err(|error| refused(self.session.id, error))?));
        Ok(())
    }

    /// The next thing that happens. A link that breaks is waited for, and nothing is told twice or left out.
    ///
    /// # Errors
    /// When the session has ended, or its guest does not answer any more.
    pub async fn next(&mut self) -> Result<Heard, Error> {
        if self.is_over {
            return Ok(Heard::End);
        }
        let mut broken_since = None;
        loop {
            let Some((_, events)) = &mut self.stream else {
                let since = *broken_since.get_or_insert_with(std::time::Instant::now);
                match self.open().await {
                    Ok(()) => {}
                    Err(Error::NotFound(_)) => {
                        self.is_over = true;
                        return Ok(Heard::Lost);
                    }
                    Err(Error::GuestUnreachable | Error::VisitsFull) if since.elapsed() < LINK_WAIT => {
                        tokio::time::sleep(LINK_STEP).await;
                    }
                    Err(error) => return Err(error),
                }
                continue;
            };
            match events.next().await {
                Ok(Some(frame)) => {
                    let (seq, event) = (frame.head.seq, frame.head.event);
                    // What was told before is told again by nobody who means well.
                    if seq <= self.seq && !matches!(event, CommandEvent::Gap { .. }) {
                        continue;
                    }
                    self.seq = self.seq.max(seq);
                    self.is_over = matches!(event, CommandEvent::Ended { .. });
                    let bytes = frame.parts.into_iter().next().unwrap_or_default();
                    return Ok(Heard::Event(Followed { seq, event, bytes }));
                }
                Ok(None) if !self.is_waiting => {
                    self.is_over = true;
                    return Ok(Heard::End);
                }
                // The last event was not there, so it is the link that broke; or there is none after the number that was asked for.
                Ok(None) => {
                    self.stream = None;
                    let since = *broken_since.get_or_insert_with(std::time::Instant::now);
                    if since.elapsed() > LINK_WAIT {
                        self.is_over = true;
                        return Ok(Heard::Lost);
                    }
                    tokio::time::sleep(LINK_STEP).await;
                }
                Err(error) => {
                    self.is_over = true;
                    return Err(unreachable_guest(self.session.id, &error));
                }
            }
            broken_since.get_or_insert_with(std::time::Instant::now);
        }
    }

    /// The session that it belongs to.
    #[must_use]
    pub fn session(&self) -> SessionId {
        self.session.id
    }

    /// The command's id.
    #[must_use]
    pub fn id(&self) -> CommandId {
        self.id
    }
}

/// Behind every event: who asks from there on hears of the end only.
const END: u64 = u64::MAX - 1;

/// Counts a command until it ends, and what it has used of CPUs then. It is no visit: the session is not in use for it. The next process knows nothing
/// of it.
fn count(running: Running, session: Session, id: CommandId) {
    crate::task::spawn("usage", async move {
        let began = std::time::Instant::now();
        // With this server, it only stops being looked at.
        let Ok(end) = end_of(&session, &id.to_string()).await else { return };
        // What nobody has told is as much as it can have been.
        let ran = end.map_or(began.elapsed(), |end| Duration::from_millis(end.duration_ms).min(began.elapsed()));
        let most = ran.mul_f64(f64::from(session.spec.resources.cpu_millis) / 1000.0).saturating_add(CPU_SLACK);
        let told = end.and_then(|end| end.cpu_usec).map(Duration::from_micros);
        running.used(told.map_or(most, |told| told.min(most)), Timestamp::now());
    });
}

/// Waits for the end of a command, over as many links as it takes; nothing when nobody can say any more.
async fn end_of(session: &Session, id: &str) -> Result<Option<CommandEnd>, Refused> {
    loop {
        let is_there = |phase| matches!(phase, Phase::Ready | Phase::Aborting(_) | Phase::Ending(_) | Phase::Ended(_));
        session.wait_for(|snapshot| is_there(snapshot.phase)).await;
        match session.link().await {
            Ok(link) => {
                if let Ok(mut events) = link.follow_command(id, END, true).await {
                    while let Ok(Some(_)) = events.next().await {}
                }
                match link.command(id).await {
                    Ok(told) if told.end.is_some() => return Ok(told.end),
                    Err(LinkError::Refused { .. }) => return Ok(None),
                    _ => {}
                }
            }
            Err(Refused::NotReady) => {}
            Err(Refused::Ended(_)) => return Ok(None),
            Err(refused) => return Err(refused),
        }
        tokio::time::sleep(LINK_RETRY).await;
    }
}

/// Comes in for a command. A link that has just broken is waited for.
async fn enter(session: &Session) -> Result<Visit, Error> {
    let began = std::time::Instant::now();
    loop {
        match session.enter(Weight::Light).await {
            Err(Refused::NotReady) if session.phase() != Phase::Provisioning && began.elapsed() < LINK_WAIT => {
                tokio::time::sleep(LINK_STEP).await;
            }
            other => return other.map_err(Error::from),
        }
    }
}

/// Starts it, and if the link breaks before the answer, over the next one: the guest knows it by its id.
async fn start_once(session: &Session, start: &StartCommand, input: &Bytes) -> Result<CommandView, Error> {
    let began = std::time::Instant::now();
    loop {
        let visit = enter(session).await?;
        match visit.link.start_command(start, input).await {
            Err(LinkError::Broken { .. }) if began.elapsed() < LINK_WAIT => {
                drop(visit);
                tokio::time::sleep(LINK_STEP).await;
            }
            other => return other.map_err(|error| refused(session.id, error)),
        }
    }
}

/// What the guest's refusal means for a caller.
fn refused(id: SessionId, error: LinkError) -> Error {
    let LinkError::Refused { refusal, .. } = &error else { return unreachable_guest(id, &error) };
    let message: String = refusal.message.chars().take(500).collect();
    let field = |pointer: &str| Error::SpecRejected(vec![FieldError::new(pointer, message.clone())]);
    match refusal.code.as_str() {
        "not-found" => Error::NotFound("command"),
        "no-folder" => field("/cwd"),
        "no-program" => field("/argv/0"),
        "invalid" => field(""),
        "spawn-failed" => Error::SpawnFailed(message),
        "busy" => Error::CommandsFull(message),
        "closed" => Error::StateConflict(message),
        _ => unreachable_guest(id, &error),
    }
}

/// What the audit has of a command line.
fn told_line(program: &Program) -> String {
    match program {
        Program::Shell => String::new(),
        Program::Argv(argv) => argv.join(" "),
        Program::Line(line) => line.clone(),
    }
}

fn resolve(spec: &SessionSpec, request: &CommandRequest) -> Result<(StartCommand, Bytes), Error> {
    let mut errors = Vec::new();
    let default = match request.is_background {
        true => spec.max_execution,
        false => spec.timeouts.execution,
    };
    let timeout = request.timeout_seconds.map_or(default, |asked| {
        spec::seconds_within(asked, spec.max_execution).unwrap_or_else(|message| {
            errors.push(FieldError::new("/timeout_seconds", message));
            default
        })
    });
    let most = spec.output.text_bytes;
    let text_bytes = request.max_output_bytes.unwrap_or(most);
    if text_bytes == 0 || text_bytes > most {
        let message = format!("{text_bytes} was asked for; allowed are 1 to {most}");
        errors.push(FieldError::new("/max_output_bytes", message));
    }
    spec::check_env(&request.env, &mut errors);
    check_program(&request.program, &mut errors);
    check_folder(request, &spec.workdir, &mut errors);
    if let Some(tag) = request.tag.as_ref().filter(|tag| tag.is_empty() || tag.len() > MAX_TAG) {
        errors.push(FieldError::new("/tag", format!("{} bytes; allowed are 1 to {MAX_TAG}", tag.len())));
    }
    if let Some(size) = request.tty {
        check_size(size, "/tty", &mut errors);
    }
    let (stdin, input) = match &request.input {
        CommandInput::Nothing => (request.tty.is_some(), Bytes::new()),
        CommandInput::Open => (true, Bytes::new()),
        CommandInput::Bytes(bytes) => (request.tty.is_some(), bytes.clone()),
    };
    if input.len() > MAX_STDIN {
        let message = format!("{} bytes; allowed are {MAX_STDIN}, and more may be sent later", input.len());
        errors.push(FieldError::new("/stdin", message));
    }
    if !errors.is_empty() {
        return Err(Error::SpecRejected(errors));
    }
    let (argv, shell) = match &request.program {
        Program::Shell => (Vec::new(), None),
        Program::Argv(argv) => (argv.clone(), None),
        Program::Line(line) => (Vec::new(), Some(line.clone())),
    };
    let start = StartCommand {
        id: String::new(),
        argv,
        shell,
        env: request.env.clone(),
        cwd: request.cwd.clone(),
        timeout_ms: Some(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).max(1)),
        stdin,
        text_bytes: if request.tty.is_some() { SCROLLBACK } else { text_bytes },
        tty: request.tty,
        tag: request.tag.clone(),
    };
    // Its id comes with it.
    let length = serde_json::to_vec(&start).map_or(usize::MAX, |written| written.len() + 64);
    if length > MAX_HEAD {
        let message = format!("{length} bytes as JSON, with environment and folder; allowed are {MAX_HEAD}");
        let env: usize = start.env.iter().map(|(name, value)| name.len() + value.len()).sum();
        let program: usize = start.argv.iter().chain(&start.shell).map(String::len).sum();
        let pointer = match &start.shell {
            _ if env > program => "/env",
            Some(_) => "/command",
            None => "/argv",
        };
        return Err(Error::SpecRejected(vec![FieldError::new(pointer, message)]));
    }
    Ok((start, input))
}

fn check_program(program: &Program, errors: &mut Vec<FieldError>) {
    let check = |text: &str, pointer: String, errors: &mut Vec<FieldError>| {
        if text.contains('\0') {
            errors.push(FieldError::new(pointer, "allowed is what holds no zero byte"));
        } else if text.len() >= MAX_LINE {
            errors.push(FieldError::new(pointer, format!("{} bytes; allowed are {}", text.len(), MAX_LINE - 1)));
        }
    };
    match program {
        Program::Shell => {}
        Program::Line(line) if line.is_empty() => {
            errors.push(FieldError::new("/command", "allowed is a line for a shell, not nothing"));
        }
        Program::Line(line) => check(line, "/command".to_owned(), errors),
        Program::Argv(argv) => {
            if argv.first().is_none_or(String::is_empty) || argv.len() > MAX_ARGUMENTS {
                let message = format!("allowed are a program and its arguments, {MAX_ARGUMENTS} in all");
                return errors.push(FieldError::new("/argv", message));
            }
            argv.iter().enumerate().for_each(|(at, text)| check(text, format!("/argv/{at}"), errors));
        }
    }
}

/// A path below the working folder or that of temporary files, or relative to the former, that does not climb.
fn check_folder(request: &CommandRequest, workdir: &str, errors: &mut Vec<FieldError>) {
    let Some(cwd) = request.cwd.as_deref() else { return };
    let below = |root: &str| cwd.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let is_in = request.is_cwd_free || !cwd.starts_with('/') || [workdir, TMP_DIR].into_iter().any(below);
    let climbs = cwd.split('/').any(|part| part == "..");
    if cwd.is_empty() || cwd.len() > MAX_CWD || cwd.contains('\0') || !is_in || climbs {
        let message = format!(
            "allowed is a folder below {workdir} or {TMP_DIR}, or a path from the working folder on, without \"..\", of at most {MAX_CWD} bytes"
        );
        errors.push(FieldError::new("/cwd", message));
    }
}

fn check_size(size: Size, at: &str, errors: &mut Vec<FieldError>) {
    for (name, value) in [("cols", size.cols), ("rows", size.rows)] {
        if value == 0 || value > MAX_SIDE {
            let message = format!("{value} was asked for; allowed are 1 to {MAX_SIDE}");
            errors.push(FieldError::new(format!("{at}/{name}"), message));
        }
    }
}

/// Whether a stream is stdout, by which it is told to callers.
#[must_use]
pub fn stream_word(stream: CommandStream) -> &'static str {
    match stream {
        CommandStream::Stdout => "stdout",
        CommandStream::Stderr => "stderr",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_below_the_roots() {
        let check = |cwd: &str, is_cwd_free| {
            let mut errors = Vec::new();
            let request = CommandRequest { cwd: Some(cwd.to_owned()), is_cwd_free, ..CommandRequest::default() };
            check_folder(&request, "/workspace", &mut errors);
            errors.is_empty()
        };
        let is_allowed = |cwd: &str| check(cwd, false);
        for allowed in ["a", "a/b", ".", "/workspace", "/workspace/a", "/tmp", "/tmp/x y/é"] {
            assert!(is_allowed(allowed), "{allowed}");
        }
        for refused in ["", "/", "/etc", "..", "a/../..", "/workspace/../etc", "/workspaces", "/tmpx", "a\0b"] {
            assert!(!is_allowed(refused), "{refused}");
        }
        assert!(check("/", true) && check("/usr/bin", true) && !check("/usr/..", true) && !check("", true));
    }

    #[test]
    fn programs_have_bounds() {
        let mistakes = |program: Program| {
            let mut errors = Vec::new();
            check_program(&program, &mut errors);
            errors.into_iter().map(|error| error.pointer).collect::<Vec<_>>()
        };
        let argv = |argv: &[&str]| Program::Argv(argv.iter().map(|a| (*a).to_owned()).collect());
        assert_eq!(mistakes(argv(&["ls", "", "-l"])), [""; 0]);
        assert_eq!(mistakes(argv(&[])), ["/argv"]);
        assert_eq!(mistakes(argv(&[""])), ["/argv"]);
        assert_eq!(mistakes(argv(&["ls", "a\0"])), ["/argv/1"]);
        assert_eq!(mistakes(Program::Line("x".repeat(MAX_LINE))), ["/command"]);
        assert_eq!(mistakes(Program::Line(String::new())), ["/command"]);
    }
}
