//! Commands over HTTP: as one JSON answer, as server-sent events, or as lines of JSON. Terminals are next door.

use std::collections::BTreeMap;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use cellblock_wire::commands::{CommandEnd, CommandEvent, CommandStream, EndedBy, Size, StdinTaken, Totals};
use futures_util::stream::{self, Stream};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::executions::TextView;
use super::sessions::{First, begin};
use super::stream::{Format, last_event, write};
use crate::domain::ids::{CommandId, SessionId};
use crate::domain::spec::{FieldError, MIB};
use crate::http::App;
use crate::http::extract::{Answer, Body, Caller, Id, Ids, Keyed, Params};
use crate::http::problem::{self, Problem};
use crate::service::Error;
use crate::service::commands::{
    Command, CommandFollow, CommandInput, CommandRequest, Followed, Heard, Program, stream_word,
};
use crate::service::keys::Principal;
use crate::session::once::Made;

/// Most bytes of one stream that are put into an answer, whatever a guest says: twice what it keeps.
const MAX_TEXT: usize = 2 * 1024 * 1024;

/// A command that is to be run: `argv`, or `command`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateCommand {
    /// The program and its arguments.
    #[serde(default)]
    argv: Option<Vec<String>>,
    /// A line for a shell: `bash` where the image has one, else `sh`.
    #[serde(default)]
    command: Option<String>,
    /// Added to the session's environment.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Where it runs: below `/workspace` or `/tmp`, or a path from the working folder on; the working folder when absent.
    #[serde(default)]
    cwd: Option<String>,
    /// It is ended with all its processes after this long. When absent, the session's limit for an execution, and with `background` or a `tty`
    /// the most that its template allows.
    #[serde(default)]
    timeout_seconds: Option<f64>,
    /// What it finds on its stdin: nothing (`false`), what you send to `…/stdin` (`true`), or a text.
    #[serde(default)]
    #[schema(value_type = CommandStdinSchema)]
    stdin: CommandStdin,
    /// Bytes of stdout and of stderr, each, before head and tail are kept; the template's limit when absent.
    #[serde(default)]
    max_output_bytes: Option<u64>,
    /// It runs in a terminal of this size. Its output is stdout then.
    #[serde(default)]
    tty: Option<TerminalSize>,
    /// Answer at once with 202; look at it, or at its events, later.
    #[serde(default)]
    background: bool,
    /// What happens when you hang up before its end.
    #[serde(default)]
    on_disconnect: OnHangUp,
    /// How output is told.
    #[serde(default)]
    encoding: Encoding,
}

/// What a command finds on its stdin.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "allowed are true, false and a text")]
pub enum CommandStdin {
    /// Nothing, or what is sent later.
    IsOpen(bool),
    /// This.
    Text(String),
}

impl Default for CommandStdin {
    fn default() -> Self {
        Self::IsOpen(false)
    }
}

/// Whether stdin is open, or what is on it.
#[derive(Debug, ToSchema)]
#[schema(as = CommandStdin)]
#[serde(untagged)]
pub enum CommandStdinSchema {
    /// Nothing, or what is sent later.
    IsOpen(bool),
    /// This.
    Text(String),
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Columns.
    cols: u16,
    /// Rows.
    rows: u16,
}

impl From<TerminalSize> for Size {
    fn from(size: TerminalSize) -> Self {
        Self { cols: size.cols, rows: size.rows }
    }
}

/// What happens to a command whose caller hangs up.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnHangUp {
    /// It goes on.
    #[default]
    Continue,
    /// It is ended with all its processes.
    Kill,
}

/// How output is told.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// As text; what is no UTF-8 becomes U+FFFD.
    #[default]
    Text,
    /// In base64, byte for byte.
    Base64,
}

/// A command.
#[derive(Debug, Serialize, ToSchema)]
pub struct CommandBody {
    /// Its id.
    id: String,
    /// Its session.
    session_id: String,
    /// The program and its arguments, with the shell if there is one; cut where they are long.
    argv: Vec<String>,
    /// Its working folder.
    cwd: String,
    /// Whether it runs in a terminal.
    tty: bool,
    /// `running`, `ended`, or `lost` with the container that it ran in.
    state: &'static str,
    /// What ended it: `exit`, by itself or a signal; its `timeout`; a `request`; or `swept`, with a kernel whose processes could not be told
    /// from others.
    ended_by: Option<&'static str>,
    /// Its process id in the container.
    pid: i32,
    /// Its exit status.
    exit_code: Option<i32>,
    /// The signal that ended it.
    signal: Option<i32>,
    /// Whether its time limit ended it.
    timed_out: bool,
    /// Whether it was ended for want of memory, as it seems.
    oom: bool,
    /// When it was started.
    created_at: String,
    /// Time it ran.
    duration_ms: Option<u64>,
    /// CPU time of its process, and of those below that it has waited for.
    cpu_ms: Option<u64>,
    /// The most memory that any one of these held, in MiB.
    peak_memory_mb: Option<f64>,
    /// Standard output, in its `encoding`; as text with a line where a part was left out. Absent in lists and events.
    #[serde(skip_serializing_if = "Option::is_none")]
    stdout: Option<String>,
    /// Standard error, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    stderr: Option<String>,
    /// How output is told.
    #[serde(skip_serializing_if = "Option::is_none")]
    encoding: Option<Encoding>,
    /// Totals of both.
    output: CommandOutput,
    /// The number of its newest event.
    last_event: u64,
}

/// Totals of a command's text.
#[derive(Debug, Serialize, ToSchema)]
pub struct CommandOutput {
    /// Standard output.
    stdout: TextView,
    /// Standard error.
    stderr: TextView,
}

impl CommandBody {
    pub(super) fn of(command: &Command) -> Self {
        let Command { id, session, told, is_lost } = command;
        let end = told.end.filter(|_| !is_lost);
        let view = |totals: Totals| TextView { bytes: totals.bytes, truncated: totals.omitted > 0 };
        let started = i64::try_from(told.started_at_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
        Self {
            id: id.to_string(),
            session_id: session.to_string(),
            argv: told.argv.clone(),
            cwd: told.cwd.clone(),
            tty: told.tty,
            state: match (is_lost, &end) {
                (true, _) => "lost",
                (false, Some(_)) => "ended",
                (false, None) => "running",
            },
            ended_by: end.map(|end| ended_by(&end)),
            pid: told.pid,
            exit_code: end.and_then(|end| end.status),
            signal: end.and_then(|end| end.signal),
            timed_out: end.is_some_and(|end| end.by == EndedBy::Timeout),
            oom: end.is_some_and(|end| end.oom),
            created_at: super::sessions::time(started.unwrap_or_default()),
            duration_ms: end.map(|end| end.duration_ms),
            cpu_ms: end.and_then(|end| end.cpu_usec).map(|cpu| cpu / 1000),
            peak_memory_mb: end
                .and_then(|end| end.peak_memory_bytes)
                .map(|bytes| (bytes as f64 / MIB as f64 * 10.0).round() / 10.0),
            stdout: None,
            stderr: None,
            encoding: None,
            output: CommandOutput { stdout: view(told.stdout), stderr: view(told.stderr) },
            last_event: told.last_seq,
        }
    }
}

fn ended_by(end: &CommandEnd) -> &'static str {
    match end.by {
        EndedBy::Itself => "exit",
        EndedBy::Timeout => "timeout",
        EndedBy::Request => "request",
        EndedBy::Swept => "swept",
    }
}

/// Run a command
///
/// Answers with the ended command; with `Accept: text/event-stream` or `application/x-ndjson`, with its events as they happen, of which
/// `command.completed` is the last. 200 whenever it was started, however it ended. What it leaves running in the background lives on; it is ended with a
/// command that is ended by its time limit or by request. A session with commands that nobody follows may become idle.
#[utoipa::path(post, path = "/v1/sessions/{id}/commands", operation_id = "create_command", tag = "commands",
    params(("id" = String, Path), ("Idempotency-Key" = Option<String>, Header, description = "With it the request can be sent again within a day and starts nothing twice")),
    request_body = CreateCommand,
    responses((status = 200, body = CommandBody), (status = 202, body = CommandBody, description = "In the background"),
        (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn create_command(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    headers: HeaderMap,
    Keyed(body, key): Keyed<CreateCommand>,
) -> Result<Response, Problem> {
    let (background, on_disconnect, encoding) = (body.background, body.on_disconnect, body.encoding);
    let request = command_request(body)?;
    let (command, follow) = match begin(&app, &who, key)? {
        First::New(once) => app.service.start_command(&who, id, request, once).await?,
        First::Made(Made::Command(session, made)) => {
            let command = app.service.command(&who, session, made).await?;
            (command, app.service.follow_command(&who, session, made, (0, true)).await?)
        }
        First::Made(_) => return Err(Error::NotFound("command").into()),
    };
    if background {
        return Ok(accepted(&command));
    }
    let listener = Listener { app: app.clone(), who, session: id, command: command.id, on_disconnect };
    if let Some(format) = Format::wanted(&headers) {
        return Ok(write(events(command, follow, encoding, Some(listener)), format));
    }
    let body = match collect(command.clone(), follow, encoding).await {
        // It goes on with the next server.
        Err(Error::Draining) => return Ok(accepted(&command)),
        other => other?,
    };
    listener.has_heard();
    Ok(Answer(body).into_response())
}

/// The answer about a command that goes on in the background.
fn accepted(command: &Command) -> Response {
    let location = format!("/v1/sessions/{}/commands/{}", command.session, command.id);
    (StatusCode::ACCEPTED, [(header::LOCATION, location)], Answer(CommandBody::of(command))).into_response()
}

fn command_request(body: CreateCommand) -> Result<CommandRequest, Problem> {
    let program = match (body.argv, body.command) {
        (Some(argv), None) => Program::Argv(argv),
        (None, Some(line)) => Program::Line(line),
        (None, None) if body.tty.is_some() => Program::Shell,
        _ => {
            let field = FieldError::new("/argv", "allowed is one of argv and command; with a tty, none of them");
            return Err(Error::SpecRejected(vec![field]).into());
        }
    };
    Ok(CommandRequest {
        program,
        env: body.env,
        cwd: body.cwd,
        timeout_seconds: body.timeout_seconds,
        input: match body.stdin {
            CommandStdin::IsOpen(false) => CommandInput::Nothing,
            CommandStdin::IsOpen(true) => CommandInput::Open,
            CommandStdin::Text(text) => CommandInput::Bytes(text.into()),
        },
        max_output_bytes: body.max_output_bytes,
        is_background: body.background || body.tty.is_some(),
        tty: body.tty.map(Size::from),
        ..CommandRequest::default()
    })
}

/// Ends a command when its caller hangs up, if that was asked for.
struct Listener {
    app: App,
    who: Principal,
    session: SessionId,
    command: CommandId,
    on_disconnect: OnHangUp,
}

impl Listener {
    /// Its caller has heard of the end.
    fn has_heard(mut self) {
        self.on_disconnect = OnHangUp::Continue;
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.on_disconnect == OnHangUp::Kill {
            self.app.service.end_command_unheard(&self.who, self.session, self.command);
        }
    }
}

/// What an event says beside its type and number.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Said {
    Started { command_id: String, pid: i32 },
    Text { text: String },
    Base64 { data_base64: String },
    Truncated { stream: &'static str, bytes: u64, total_bytes: u64 },
    Completed { command: Box<CommandBody> },
}

/// What becomes of a command while it is followed.
struct Telling {
    command: Command,
    follow: CommandFollow,
    encoding: Encoding,
    is_over: bool,
    listener: Option<Listener>,
}

fn events(
    command: Command,
    follow: CommandFollow,
    encoding: Encoding,
    listener: Option<Listener>,
) -> impl Stream<Item = (u64, &'static str, impl Serialize)> {
    let telling = Telling { command, follow, encoding, is_over: false, listener };
    stream::unfold(telling, |mut telling| async move {
        if telling.is_over {
            return None;
        }
        let (seq, name, said) = telling.next().await?;
        if telling.is_over
            && let Some(listener) = telling.listener.take()
        {
            listener.has_heard();
        }
        Some(((seq, name, said), telling))
    })
}

impl Telling {
    /// The next event; nothing when the stream breaks off without an end: whoever asks again, perhaps another server, hears how it goes on.
    async fn next(&mut self) -> Option<(u64, &'static str, Said)> {
        match self.follow.next().await {
            Ok(Heard::Event(followed)) => Some(self.tell(followed)),
            Ok(Heard::End | Heard::Lost) | Err(Error::SessionEnded(_)) => {
                self.command.is_lost = self.command.told.end.is_none();
                Some(self.complete(self.command.told.last_seq.saturating_add(1)))
            }
            Err(_) => None,
        }
    }

    fn tell(&mut self, followed: Followed) -> (u64, &'static str, Said) {
        let Followed { seq, event, bytes } = followed;
        note(&mut self.command, seq, &event);
        match event {
            CommandEvent::Started { pid } => {
                (seq, "command.started", Said::Started { command_id: self.command.id.to_string(), pid })
            }
            CommandEvent::Output { stream } => (seq, stream_word(stream), said(&bytes, self.encoding)),
            CommandEvent::Gap { stream, total_bytes, omitted_bytes } => {
                let stream = stream_word(stream);
                (seq, "output.truncated", Said::Truncated { stream, bytes: omitted_bytes, total_bytes })
            }
            CommandEvent::Ended { .. } => self.complete(seq),
        }
    }

    fn complete(&mut self, seq: u64) -> (u64, &'static str, Said) {
        self.is_over = true;
        (seq, "command.completed", Said::Completed { command: Box::new(CommandBody::of(&self.command)) })
    }
}

/// Keeps what is known of a command up to date with an event.
fn note(command: &mut Command, seq: u64, event: &CommandEvent) {
    let told = &mut command.told;
    told.last_seq = told.last_seq.max(seq);
    if let CommandEvent::Ended { end, stdout, stderr } = event {
        (told.end, told.stdout, told.stderr) = (Some(*end), *stdout, *stderr);
    }
}

fn said(bytes: &[u8], encoding: Encoding) -> Said {
    match encoding {
        Encoding::Text => Said::Text { text: String::from_utf8_lossy(bytes).into_owned() },
        Encoding::Base64 => Said::Base64 { data_base64: BASE64.encode(bytes) },
    }
}

/// Follows a command to its end, or to what there is of it, and puts it together with its output.
async fn collect(mut command: Command, mut follow: CommandFollow, encoding: Encoding) -> Result<CommandBody, Error> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        let Followed { seq, event, bytes } = match follow.next().await {
            Ok(Heard::Event(followed)) => followed,
            Ok(Heard::End) => break,
            Ok(Heard::Lost) | Err(Error::SessionEnded(_)) => {
                command.is_lost = true;
                break;
            }
            Err(error) => return Err(error),
        };
        note(&mut command, seq, &event);
        let mut put = |stream, bytes: &[u8]| {
            let to = if stream == CommandStream::Stdout { &mut stdout } else { &mut stderr };
            let room = MAX_TEXT.saturating_sub(to.len());
            to.extend_from_slice(&bytes[..bytes.len().min(room)]);
        };
        match event {
            CommandEvent::Output { stream } => put(stream, &bytes),
            CommandEvent::Gap { stream, omitted_bytes, .. } if encoding == Encoding::Text => {
                put(stream, format!("\n[… {omitted_bytes} bytes left out …]\n").as_bytes());
            }
            _ => {}
        }
    }
    let text = |bytes: Vec<u8>| match encoding {
        Encoding::Text => String::from_utf8_lossy(&bytes).into_owned(),
        Encoding::Base64 => BASE64.encode(bytes),
    };
    let body = CommandBody::of(&command);
    Ok(CommandBody { stdout: Some(text(stdout)), stderr: Some(text(stderr)), encoding: Some(encoding), ..body })
}

/// The commands of a session.
#[derive(Debug, Serialize, ToSchema)]
pub struct CommandList {
    /// Oldest first, without their output. Of those that have ended, the latest 256 at most.
    commands: Vec<CommandBody>,
}

/// List commands and terminals
#[utoipa::path(get, path = "/v1/sessions/{id}/commands", operation_id = "list_commands", tag = "commands",
    params(("id" = String, Path)),
    responses((status = 200, body = CommandList), (status = "4XX", body = Problem)))]
pub async fn list_commands(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
) -> Result<Answer<CommandList>, Problem> {
    let commands = app.service.commands(&who, id).await?;
    Ok(Answer(CommandList { commands: commands.iter().map(CommandBody::of).collect() }))
}

/// Look at a command
///
/// With what it has put out: all of it, or head and tail once it has ended.
#[utoipa::path(get, path = "/v1/sessions/{id}/commands/{command}", operation_id = "get_command", tag = "commands",
    params(("id" = String, Path), ("command" = String, Path),
        ("encoding" = Option<String>, Query, description = "`text` or `base64`")),
    responses((status = 200, body = CommandBody), (status = "4XX", body = Problem)))]
pub async fn get_command(
    State(app): State<App>,
    Caller(who): Caller,
    Ids(id, command): Ids<SessionId, CommandId>,
    params: Params,
) -> Result<Answer<CommandBody>, Problem> {
    let encoding = encoding(&params.only(&["encoding"])?)?;
    let known = app.service.command(&who, id, command).await?;
    let follow = app.service.follow_command(&who, id, command, (0, false)).await?;
    Ok(Answer(collect(known, follow, encoding).await?))
}

fn encoding(params: &Params) -> Result<Encoding, Problem> {
    match params.get("encoding") {
        None | Some("text") => Ok(Encoding::Text),
        Some("base64") => Ok(Encoding::Base64),
        Some(_) => Err(Problem::new(problem::INVALID_REQUEST, "a query parameter is not understood")
            .with_fields(vec![FieldError::new("?encoding", "allowed is text or base64")])),
    }
}

/// Follow a command
///
/// All its events from the beginning, or after `Last-Event-ID`, and then as they happen, to `command.completed`; for any number of readers.
#[utoipa::path(get, path = "/v1/sessions/{id}/commands/{command}/events", operation_id = "list_command_events", tag = "commands",
    params(("id" = String, Path), ("command" = String, Path),
        ("encoding" = Option<String>, Query, description = "`text` or `base64`"),
        ("Last-Event-ID" = Option<u64>, Header, description = "The last event that you have")),
    responses((status = 200, content_type = "text/event-stream", body = String), (status = "4XX", body = Problem)))]
pub async fn list_command_events(
    State(app): State<App>,
    Caller(who): Caller,
    Ids(id, command): Ids<SessionId, CommandId>,
    headers: HeaderMap,
    params: Params,
) -> Result<Response, Problem> {
    let encoding = encoding(&params.only(&["encoding"])?)?;
    let after = last_event(&headers)?;
    let known = app.service.command(&who, id, command).await?;
    // Whoever has the last event is told it again, as of executions.
    let newest = known.told.last_seq;
    let after = after.min(if known.told.end.is_some() { newest.saturating_sub(1) } else { newest });
    let follow = app.service.follow_command(&who, id, command, (after, true)).await?;
    Ok(write(events(known, follow, encoding, None), Format::wanted(&headers).unwrap_or(Format::Sse)))
}

/// Input for a command: `data`, or `data_base64`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CommandData {
    /// A text.
    #[serde(default)]
    data: Option<String>,
    /// Bytes.
    #[serde(default)]
    data_base64: Option<String>,
    /// Its stdin is at its end behind them. A terminal's has none: send it `\u0004`.
    #[serde(default)]
    close: bool,
}

/// What was taken of it.
#[derive(Debug, Serialize, ToSchema)]
pub struct CommandDataTaken {
    /// So many bytes, in order; fewer than you sent when the command did not read them in time: send the rest again.
    bytes: u64,
    /// Whether its stdin is at its end now.
    closed: bool,
}

/// Send input to a command
///
/// Answers when it has been written to the command's stdin, or within five seconds with how much of it was.
#[utoipa::path(post, path = "/v1/sessions/{id}/commands/{command}/stdin", operation_id = "write_command", tag = "commands",
    params(("id" = String, Path), ("command" = String, Path)), request_body = CommandData,
    responses((status = 200, body = CommandDataTaken), (status = "4XX", body = Problem)))]
pub async fn write_command(
    State(app): State<App>,
    Caller(who): Caller,
    Ids(id, command): Ids<SessionId, CommandId>,
    Body(body): Body<CommandData>,
) -> Result<Answer<CommandDataTaken>, Problem> {
    let wrong = |pointer: &str, allowed: &str| Error::SpecRejected(vec![FieldError::new(pointer, allowed)]);
    let bytes = match (body.data, body.data_base64) {
        (Some(_), Some(_)) => return Err(wrong("/data_base64", "allowed is one of data and data_base64").into()),
        (Some(text), None) => Bytes::from(text),
        (None, Some(data)) => match BASE64.decode(data) {
            Ok(bytes) => Bytes::from(bytes),
            Err(_) => return Err(wrong("/data_base64", "allowed is base64, with padding").into()),
        },
        (None, None) => Bytes::new(),
    };
    let StdinTaken { bytes, closed } = app.service.write_command(&who, id, command, (bytes, body.close)).await?;
    Ok(Answer(CommandDataTaken { bytes, closed }))
}

/// A signal for a command.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CommandSignal {
    /// `SIGINT`, `SIGTERM`, `SIGKILL`, `SIGHUP`, `SIGQUIT`, `SIGUSR1`, `SIGUSR2`, `SIGSTOP`, `SIGTSTP`, `SIGCONT` or `SIGWINCH`.
    signal: String,
}

/// Signal a command
///
/// Its process and those of its group get it.
#[utoipa::path(post, path = "/v1/sessions/{id}/commands/{command}/signal", operation_id = "signal_command", tag = "commands",
    params(("id" = String, Path), ("command" = String, Path)), request_body = CommandSignal,
    responses((status = 204), (status = "4XX", body = Problem)))]
pub async fn signal_command(
    State(app): State<App>,
    Caller(who): Caller,
    Ids(id, command): Ids<SessionId, CommandId>,
    Body(body): Body<CommandSignal>,
) -> Result<StatusCode, Problem> {
    app.service.signal_command(&who, id, command, &body.signal).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Resize a terminal
#[utoipa::path(post, path = "/v1/sessions/{id}/commands/{command}/resize", operation_id = "resize_command", tag = "commands",
    params(("id" = String, Path), ("command" = String, Path)), request_body = TerminalSize,
    responses((status = 204), (status = "4XX", body = Problem)))]
pub async fn resize_command(
    State(app): State<App>,
    Caller(who): Caller,
    Ids(id, command): Ids<SessionId, CommandId>,
    Body(body): Body<TerminalSize>,
) -> Result<StatusCode, Problem> {
    app.service.resize_command(&who, id, command, body.into()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// End a command
///
/// All its processes get SIGTERM, and SIGKILL when they have not ended two seconds later. Answers once they are gone. One that has ended stays
/// as it is, but what it has left running ends.
#[utoipa::path(delete, path = "/v1/sessions/{id}/commands/{command}", operation_id = "end_command", tag = "commands",
    params(("id" = String, Path), ("command" = String, Path)),
    responses((status = 200, body = CommandBody), (status = "4XX", body = Problem)))]
pub async fn end_command(
    State(app): State<App>,
    Caller(who): Caller,
    Ids(id, command): Ids<SessionId, CommandId>,
) -> Result<Answer<CommandBody>, Problem> {
    Ok(Answer(CommandBody::of(&app.service.end_command(&who, id, command).await?)))
}
