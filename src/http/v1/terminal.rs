//! Terminals over a WebSocket: bytes both ways, and a few words about them. A terminal is a command with a `tty`, so all else about it is next door.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::http::{Extensions, HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use cellblock_wire::commands::{CommandEnd, CommandEvent, Size};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use serde::Deserialize;
use serde_json::json;

use super::commands::CommandBody;
use crate::domain::ids::{CommandId, SessionId};
use crate::domain::spec::FieldError;
use crate::http::App;
use crate::http::extract::{Caller, Id, Params};
use crate::http::listen::Held;
use crate::http::origins;
use crate::http::problem::{self, Problem};
use crate::service::Error;
use crate::service::commands::{Command, CommandFollow, CommandRequest, Followed, Heard, Program};
use crate::service::keys::Principal;

/// The size of a terminal whose caller does not say.
const DEFAULT: Size = Size { cols: 80, rows: 24 };
/// Longest message of a caller: what one paste may be.
const MAX_MESSAGE: usize = 64 * 1024;
/// Output that may wait for a connection that takes none.
const MAX_UNSENT: usize = 512 * 1024;
/// A connection is asked whether it lives this often, and its key whether it is one still.
const PING: Duration = Duration::from_secs(20);
/// One that has said nothing for so long is dead.
const SILENCE: Duration = Duration::from_secs(60);
/// One message is taken within this time, or its reader is too slow.
const SEND_TIME: Duration = Duration::from_secs(30);
/// A caller that was told the end hangs up within this time, or is hung up on.
const FAREWELL: Duration = Duration::from_secs(5);
/// The server restarts: come again (RFC 6455's registry).
const SERVICE_RESTART: u16 = 1012;

/// Open a terminal
///
/// A WebSocket (over HTTP/1.1). Binary messages are bytes, both ways; a text message `{"cols": …, "rows": …}` resizes it. The server's text messages
/// are events: `command.started` with the id to come back with, `output.truncated` and `command.completed`. Input that is not read within five seconds is dropped. It lives on when you hang up: attach again
/// with `id`, and hear what is kept of its output first. Close codes: 1000 the command ended, 1001 the session ended, 1003 a text message that is not understood, 1009 a message above 64 KiB, 1008 too
/// slow, or the key is none any more, 1011 the terminal is gone, 1012 the server stops.
#[utoipa::path(get, path = "/v1/sessions/{id}/terminal", operation_id = "open_terminal", tag = "commands",
    params(("id" = String, Path), ("cols" = Option<u16>, Query, description = "80 when absent"), ("rows" = Option<u16>, Query, description = "24 when absent"),
        ("command" = Option<String>, Query, description = "A line for a shell; an interactive shell when absent"),
        ("cwd" = Option<String>, Query, description = "Where it runs"),
        ("id" = Option<String>, Query, description = "A terminal that is there")),
    responses((status = 101, description = "The terminal"), (status = "4XX", body = Problem)))]
pub async fn open_terminal(
    State(app): State<App>,
    Caller(who): Caller,
    Id(session): Id<SessionId>,
    (headers, uri, extensions): (HeaderMap, Uri, Extensions),
    params: Params,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Problem> {
    who.require_sessions()?;
    app.service.session(&who, session)?;
    if !app.origins.may_change(&headers, &uri) {
        return Err(origins::refusal());
    }
    let wanted = Wanted::read(&params.only(&["cols", "rows", "command", "cwd", "id"])?)?;
    let upgrade = upgrade.map_err(|rejection| {
        let detail = format!("this is for a WebSocket over HTTP/1.1: {}", rejection.body_text());
        Problem { status: StatusCode::UPGRADE_REQUIRED.as_u16(), ..Problem::new(problem::INVALID_REQUEST, detail) }
    })?;
    let (command, follow) = wanted.open(&app, &who, session).await?;
    let upgrade = upgrade.max_message_size(MAX_MESSAGE).max_frame_size(MAX_MESSAGE).max_write_buffer_size(MAX_UNSENT);
    let held = Held::by(&extensions);
    let response = upgrade.on_upgrade(move |socket| async move {
        let viewer = Viewer { app, who, session, command, began: Instant::now(), heard: AtomicU64::new(0) };
        viewer.serve(socket, follow).await;
        drop(held);
    });
    Ok(response.into_response())
}

/// What is asked for.
struct Wanted {
    size: Option<Size>,
    command: Option<String>,
    cwd: Option<String>,
    id: Option<CommandId>,
}

impl Wanted {
    fn read(params: &Params) -> Result<Self, Problem> {
        let side = |name| params.parse::<u16>(name, "a number of characters");
        let (cols, rows) = (side("cols")?, side("rows")?);
        let size = match (cols, rows) {
            (None, None) => None,
            (cols, rows) => Some(Size { cols: cols.unwrap_or(DEFAULT.cols), rows: rows.unwrap_or(DEFAULT.rows) }),
        };
        let text = |name| params.get(name).map(str::to_owned);
        let id = match params.get("id").map(str::parse) {
            None => None,
            Some(Ok(id)) => Some(id),
            Some(Err(_)) => return Err(Error::NotFound("command").into()),
        };
        let wanted = Self { size, command: text("command"), cwd: text("cwd"), id };
        if wanted.id.is_some() && (wanted.command.is_some() || wanted.cwd.is_some()) {
            let field = FieldError::new("?id", "a terminal that is there has its command and its folder");
            return Err(Problem::new(problem::INVALID_REQUEST, "the query is not understood").with_fields(vec![field]));
        }
        Ok(wanted)
    }

    /// Starts it, or finds it.
    async fn open(self, app: &App, who: &Principal, session: SessionId) -> Result<(Command, CommandFollow), Problem> {
        let Some(id) = self.id else {
            let request = CommandRequest {
                program: self.command.map_or(Program::Shell, Program::Line),
                cwd: self.cwd,
                tty: Some(self.size.unwrap_or(DEFAULT)),
                is_background: true,
                ..CommandRequest::default()
            };
            return Ok(app.service.start_command(who, session, request, None).await?);
        };
        let command = app.service.command(who, session, id).await?;
        if !command.told.tty {
            return Err(
                Error::StateConflict("the command has no terminal; …/events tells its output".to_owned()).into()
            );
        }
        if let Some(size) = self.size.filter(|_| command.told.end.is_none()) {
            app.service.resize_command(who, session, id, size).await?;
        }
        let follow = app.service.follow_command(who, session, id, (0, true)).await?;
        Ok((command, follow))
    }
}

/// One connection to a terminal.
struct Viewer {
    app: App,
    who: Principal,
    session: SessionId,
    command: Command,
    began: Instant,
    /// When something was last heard from the caller, in milliseconds since it began.
    heard: AtomicU64,
}

/// Why it is over: a code, and a few words.
type Over = (u16, String);

/// A new size, as a caller says it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    cols: u16,
    rows: u16,
}

impl Viewer {
    async fn serve(self, socket: WebSocket, follow: CommandFollow) {
        let (mut to, mut from) = socket.split();
        let over = tokio::select! {
            over = self.show(&mut to, follow) => over,
            over = self.listen(&mut from) => over,
            () = self.lapsed() => Some((close_code::POLICY, "the key is not valid any more".to_owned())),
        };
        let close = over.map(|(code, reason)| CloseFrame { code, reason: reason.into() });
        // One that does not take even that is gone.
        let _ = tokio::time::timeout(SEND_TIME, to.send(Message::Close(close))).await;
        // What is still to come is taken: a connection that is closed over it takes the word before along.
        let taken = async { while let Some(Ok(_)) = from.next().await {} };
        let _ = tokio::time::timeout(FAREWELL, taken).await;
    }

    /// Shows what the terminal puts out. Nothing: the caller is gone, or too slow to be told so.
    async fn show(&self, to: &mut SplitSink<WebSocket, Message>, mut follow: CommandFollow) -> Option<Over> {
        let mut ping = tokio::time::interval(PING);
        let mut is_live = false;
        loop {
            let heard = tokio::select! {
                heard = follow.next() => heard,
                _ = ping.tick() => {
                    if self.is_gone() {
                        return None;
                    }
                    send(to, Message::Ping(Bytes::new())).await?;
                    continue;
                }
            };
            let Followed { event, bytes, .. } = match heard {
                Ok(Heard::Event(followed)) => followed,
                Ok(Heard::End | Heard::Lost) => return Some((close_code::ERROR, "the terminal is gone".to_owned())),
                Err(Error::SessionEnded(reason)) => {
                    return Some((close_code::AWAY, format!("the session has ended ({})", reason.word())));
                }
                Err(Error::Draining) => return Some((SERVICE_RESTART, "the server is stopping".to_owned())),
                Err(error) => return Some((close_code::ERROR, error.to_string())),
            };
            match event {
                CommandEvent::Started { pid } => send(to, self.hello(pid)).await?,
                CommandEvent::Output { .. } => send(to, Message::Binary(bytes)).await?,
                // What was there before is shown as far as it is kept; what comes now is shown whole, or not at all.
                CommandEvent::Gap { omitted_bytes, .. } if !is_live => {
                    send(to, self.hello(self.command.told.pid)).await?;
                    send(to, text(&json!({"type": "output.truncated", "bytes": omitted_bytes}))).await?;
                }
                CommandEvent::Gap { .. } => {
                    return Some((close_code::POLICY, "too slow for what the terminal puts out".to_owned()));
                }
                CommandEvent::Ended { end, stdout, stderr } => {
                    let mut command = self.command.clone();
                    (command.told.end, command.told.stdout, command.told.stderr) = (Some(end), stdout, stderr);
                    let completed = json!({"type": "command.completed", "command": CommandBody::of(&command)});
                    send(to, text(&completed)).await?;
                    return Some((close_code::NORMAL, how_it_ended(&end)));
                }
            }
            is_live = true;
        }
    }

    fn hello(&self, pid: i32) -> Message {
        text(&json!({"type": "command.started", "command_id": self.command.id.to_string(), "pid": pid}))
    }

    /// Whether the caller has been silent for so long that it is gone.
    fn is_gone(&self) -> bool {
        let heard = Duration::from_millis(self.heard.load(Ordering::Relaxed));
        self.began.elapsed().saturating_sub(heard) > SILENCE
    }

    /// Waits until the caller would not be let in again. Whoever is within this process needs no key.
    async fn lapsed(&self) {
        match self.who.key {
            Some(key) => self.app.door.closed_to(key).await,
            None => std::future::pending().await,
        }
    }

    /// Takes what the caller types.
    async fn listen(&self, from: &mut SplitStream<WebSocket>) -> Option<Over> {
        loop {
            let Ok(message) = from.next().await? else {
                let reason = format!("a message is longer than {MAX_MESSAGE} bytes, or none");
                return Some((close_code::SIZE, reason));
            };
            let heard = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.heard.store(heard, Ordering::Relaxed);
            match message {
                Message::Binary(bytes) => self.type_in(bytes).await,
                Message::Text(words) => match serde_json::from_str::<Resize>(&words) {
                    Ok(Resize { cols, rows }) => self.resize(Size { cols, rows }).await,
                    Err(_) => {
                        let reason = "a text message is {\"cols\": …, \"rows\": …}; what is typed is binary";
                        return Some((close_code::UNSUPPORTED, reason.to_owned()));
                    }
                },
                Message::Close(_) => return None,
                Message::Ping(_) | Message::Pong(_) => {}
            }
        }
    }

    /// What the terminal does not take in time is dropped, as a terminal does whose buffer is full.
    async fn type_in(&self, bytes: Bytes) {
        let written = self.app.service.write_command(&self.who, self.session, self.command.id, (bytes, false)).await;
        if let Err(error) = written {
            tracing::debug!(session = %self.session, command = %self.command.id, %error, "typed for nothing");
        }
    }

    async fn resize(&self, size: Size) {
        // A size that can't be is none, and the end of the terminal is told by its events.
        let _ = self.app.service.resize_command(&self.who, self.session, self.command.id, size).await;
    }
}

fn text(value: &serde_json::Value) -> Message {
    Message::Text(value.to_string().into())
}

async fn send(to: &mut SplitSink<WebSocket, Message>, message: Message) -> Option<()> {
    tokio::time::timeout(SEND_TIME, to.send(message)).await.ok()?.ok()
}

fn how_it_ended(end: &CommandEnd) -> String {
    match (end.status, end.signal) {
        (Some(status), _) => format!("exit status {status}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}
