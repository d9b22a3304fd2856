//! `process.Process`: commands and terminals, by RPC. What is said on the wire stands in `messages`, what a command tells in `events`.
//!
//! A process is one of the session's commands, and its number is the one that it has in the container. Of several that had the same number, the one that runs is
//! meant, or else the last one.

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::response::Response;
use axum::routing::post;
use bytes::Bytes;
use cellblock_wire::commands::MAX_STDIN;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::super::connect::{self, Envelopes, Serving, answer_stream};
use super::super::error::{Code, Fault, Refusal};
use super::super::sandbox::{ForRpc, Sandbox};
use super::{Not, check_rpc_user, paths};
use crate::domain::ids::CommandId;
use crate::http::App;
use crate::service::Error;
use crate::service::commands::{Command, CommandFollow, CommandInput, CommandRequest, Program};

mod events;
mod messages;

use messages::{Connect, Of, Piece, SendInput, SendSignal, Start, StreamInput, Update};

/// Who streams input says something within this time, if only that it is there.
const INPUT_SILENCE: Duration = Duration::from_secs(180);

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/process.Process/Start", post(start))
        .route("/process.Process/Connect", post(connect_to))
        .route("/process.Process/List", post(list))
        .route("/process.Process/SendInput", post(send_input))
        .route("/process.Process/StreamInput", post(stream_input))
        .route("/process.Process/CloseStdin", post(close_stdin))
        .route("/process.Process/SendSignal", post(send_signal))
        .route("/process.Process/Update", post(update))
}

/// Starts a process and tells what it does. It goes on when nobody listens any more, and is ended when the caller's time is over, whether or not anybody does then.
async fn start(ForRpc(sandbox): ForRpc, request: Request) -> Result<Response, Refusal> {
    let headers = request.headers().clone();
    let envelopes = Envelopes::of(request, sandbox.app.bounds.body_time)?;
    let begun = async {
        let asked: Start = envelopes.only().await?;
        check_rpc_user(&headers)?;
        let deadline = connect::deadline(&headers)?;
        let cwd = asked.process.cwd.clone().unwrap_or_default();
        let wanted =
            CommandRequest { timeout_seconds: deadline.map(|at| left(&sandbox, at)), ..wanted(&sandbox, asked)? };
        let started = sandbox.app.service.start_command(&sandbox.who, sandbox.id(), wanted, None).await;
        let (command, follow) = started.map_err(|error| without_folder(error, &cwd)).map_err(Not::of(&sandbox))?;
        Ok((deadline, command, follow))
    };
    let (deadline, command, follow) = match begun.await {
        Ok(begun) => begun,
        Err(not) => return Not::streamed(not),
    };
    let serving = Serving { deadline, ..serving(&sandbox, &headers) };
    Ok(connect::stream(serving, events::of(&command, follow)))
}

/// The time that a process has, in seconds: a caller's, but no more than there may be.
fn left(sandbox: &Sandbox, deadline: Instant) -> f64 {
    let asked = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    asked.min(sandbox.session.spec.max_execution).as_secs_f64()
}

/// What a caller wants to be started.
fn wanted(sandbox: &Sandbox, asked: Start) -> Result<CommandRequest, Fault> {
    let Start { process, stdin, pty, tag } = asked;
    if process.cmd.is_empty() {
        return Err(Fault::new(Code::InvalidArgument, "process.cmd is empty; name a program"));
    }
    let cwd = process.cwd.filter(|cwd| !cwd.is_empty());
    let home = &sandbox.session.spec.workdir;
    let cwd = cwd.map(|cwd| paths::absolute(home, &cwd)).transpose();
    let cwd = cwd.map_err(|detail| Fault::new(Code::InvalidArgument, detail))?;
    let tty = pty.map(|pty| pty.size()).transpose()?;
    Ok(CommandRequest {
        program: Program::Argv(std::iter::once(process.cmd).chain(process.args).collect()),
        env: process.envs,
        cwd,
        is_cwd_free: true,
        // Who says nothing of it may want to write to it.
        input: if stdin.unwrap_or(true) { CommandInput::Open } else { CommandInput::Nothing },
        tty,
        // It may outlive this request.
        is_background: true,
        tag: tag.filter(|tag| !tag.is_empty()),
        ..CommandRequest::default()
    })
}

/// A folder that is not there, in words that programs know.
fn without_folder(error: Error, cwd: &str) -> Error {
    match error {
        Error::SpecRejected(mut fields) if fields.iter().any(|field| field.pointer == "/cwd") => {
            fields.iter_mut().filter(|field| field.pointer == "/cwd").for_each(|field| {
                field.message = format!("cwd '{:.200}' does not exist; {}", cwd, field.message);
            });
            Error::SpecRejected(fields)
        }
        other => other,
    }
}

/// Tells what a process does from now on, or how it ended.
async fn connect_to(ForRpc(sandbox): ForRpc, request: Request) -> Result<Response, Refusal> {
    let headers = request.headers().clone();
    let envelopes = Envelopes::of(request, sandbox.app.bounds.body_time)?;
    let found = async {
        let asked: Connect = envelopes.only().await?;
        check_rpc_user(&headers)?;
        let deadline = connect::deadline(&headers)?;
        let command = find(&sandbox, &asked.process).await?;
        let newest = command.told.last_seq;
        // Of one that has ended, the end is told again.
        let after = if command.told.end.is_some() { newest.saturating_sub(1) } else { newest };
        let follow = follow(&sandbox, command.id, after).await?;
        Ok((deadline, command, follow))
    };
    match found.await {
        Ok((deadline, command, follow)) => {
            let serving = Serving { deadline, ..serving(&sandbox, &headers) };
            Ok(connect::stream(serving, events::of(&command, follow)))
        }
        Err(not) => Not::streamed(not),
    }
}

async fn follow(sandbox: &Sandbox, command: CommandId, after: u64) -> Result<CommandFollow, Not> {
    let followed = sandbox.app.service.follow_command(&sandbox.who, sandbox.id(), command, (after, true)).await;
    followed.map_err(Not::of(sandbox))
}

fn serving(sandbox: &Sandbox, headers: &HeaderMap) -> Serving {
    let alive = json!({"event": {"keepalive": {}}});
    Serving { keepalive: Some((connect::keepalive(headers), alive)), ..Serving::until(sandbox.gone()) }
}

/// Processes that run.
async fn list(ForRpc(sandbox): ForRpc, headers: HeaderMap, body: Body) -> Result<Response, Refusal> {
    let listed = async {
        let Value::Object(_) = connect::unary(body, sandbox.app.bounds).await? else { return Err(no_message().into()) };
        check_rpc_user(&headers)?;
        let known = sandbox.app.service.commands(&sandbox.who, sandbox.id()).await.map_err(Not::of(&sandbox))?;
        let running = known.iter().filter(|command| command.told.end.is_none());
        Ok(json!({"processes": running.map(messages::process).collect::<Vec<_>>()}))
    };
    listed.await.map(connect::answer).map_err(Not::plain)
}

fn no_message() -> Fault {
    Fault::new(Code::InvalidArgument, "the message is no object")
}

async fn send_input(ForRpc(sandbox): ForRpc, headers: HeaderMap, body: Body) -> Result<Response, Refusal> {
    let sent = async {
        let asked: SendInput = connect::unary(body, sandbox.app.bounds).await?;
        check_rpc_user(&headers)?;
        let command = find_running(&sandbox, &asked.process).await?;
        write(&sandbox, &command, asked.input.bytes(command.told.tty)?, false).await
    };
    sent.await.map(|()| connect::answer(json!({}))).map_err(Not::plain)
}

/// Input as it comes. It stays open behind its last piece.
async fn stream_input(ForRpc(sandbox): ForRpc, request: Request) -> Result<Response, Refusal> {
    let headers = request.headers().clone();
    let mut envelopes = Envelopes::of(request, INPUT_SILENCE)?;
    let taken = async {
        check_rpc_user(&headers)?;
        let mut command = None;
        while let Some(StreamInput { piece }) = envelopes.next().await? {
            match (piece, &command) {
                (Piece::Start { process }, None) => command = Some(find_running(&sandbox, &process).await?),
                (Piece::Data { input }, Some(command)) => {
                    write(&sandbox, command, input.bytes(command.told.tty)?, false).await?;
                }
                (Piece::Keepalive {}, _) => {}
                (Piece::Start { .. }, Some(_)) => {
                    return Err(Fault::new(Code::InvalidArgument, "start comes once, first of all").into());
                }
                (Piece::Data { .. }, None) => {
                    return Err(Fault::new(Code::InvalidArgument, "start comes before data").into());
                }
            }
        }
        Ok(json!({}))
    };
    let taken = tokio::select! {
        taken = taken => taken,
        () = sandbox.gone() => Err(Not::Gone(sandbox.id())),
    };
    match taken {
        Ok(answer) => Ok(answer_stream(Ok(answer))),
        Err(Not::Done(fault)) => Ok(answer_stream::<Value>(Err(fault))),
        Err(Not::Gone(id)) => Err(Refusal::sandbox_missing(Some(id))),
    }
}

async fn close_stdin(ForRpc(sandbox): ForRpc, headers: HeaderMap, body: Body) -> Result<Response, Refusal> {
    let closed = async {
        let asked: Of = connect::unary(body, sandbox.app.bounds).await?;
        check_rpc_user(&headers)?;
        let command = find_running(&sandbox, &asked.process).await?;
        if command.told.tty {
            let detail = "a terminal has no end of its own to close; send it the character for that, 0x04";
            return Err(Fault::new(Code::InvalidArgument, detail).into());
        }
        match write(&sandbox, &command, Bytes::new(), true).await {
            // It is closed.
            Err(Not::Done(fault)) if fault.code == Code::FailedPrecondition => Ok(()),
            closed => closed,
        }
    };
    closed.await.map(|()| connect::answer(json!({}))).map_err(Not::plain)
}

async fn send_signal(ForRpc(sandbox): ForRpc, headers: HeaderMap, body: Body) -> Result<Response, Refusal> {
    let sent = async {
        let asked: SendSignal = connect::unary(body, sandbox.app.bounds).await?;
        check_rpc_user(&headers)?;
        let signal = asked.signal.name()?;
        let command = find_running(&sandbox, &asked.process).await?;
        match sandbox.app.service.signal_command(&sandbox.who, sandbox.id(), command.id, signal).await {
            // It has ended by itself meanwhile.
            Err(Error::StateConflict(_)) => Err(unknown(&asked.process).into()),
            sent => sent.map_err(Not::of(&sandbox)),
        }
    };
    sent.await.map(|()| connect::answer(json!({}))).map_err(Not::plain)
}

/// Gives a terminal another size.
async fn update(ForRpc(sandbox): ForRpc, headers: HeaderMap, body: Body) -> Result<Response, Refusal> {
    let updated = async {
        let asked: Update = connect::unary(body, sandbox.app.bounds).await?;
        check_rpc_user(&headers)?;
        let command = find_running(&sandbox, &asked.process).await?;
        let Some(pty) = asked.pty else { return Ok(()) };
        let size = pty.size()?;
        if !command.told.tty {
            return Err(Fault::new(Code::InvalidArgument, "the process has no terminal").into());
        }
        sandbox
            .app
            .service
            .resize_command(&sandbox.who, sandbox.id(), command.id, size)
            .await
            .map_err(Not::of(&sandbox))
    };
    updated.await.map(|()| connect::answer(json!({}))).map_err(Not::plain)
}

/// Writes all of it, in as many pieces as the service takes.
async fn write(sandbox: &Sandbox, command: &Command, mut bytes: Bytes, close: bool) -> Result<(), Not> {
    loop {
        let piece = bytes.slice(..bytes.len().min(MAX_STDIN));
        let is_last = piece.len() == bytes.len();
        let service = &sandbox.app.service;
        let taken = service.write_command(&sandbox.who, sandbox.id(), command.id, (piece, close && is_last)).await;
        let taken = taken.map_err(Not::of(sandbox))?;
        let written = usize::try_from(taken.bytes).unwrap_or(usize::MAX).min(bytes.len());
        bytes = bytes.slice(written..);
        if bytes.is_empty() {
            return Ok(());
        }
        if taken.closed {
            return Err(Fault::new(Code::FailedPrecondition, "the process has closed its stdin, or ended").into());
        }
    }
}

/// The process that is meant.
async fn find(sandbox: &Sandbox, which: &messages::Which) -> Result<Command, Not> {
    let known = sandbox.app.service.commands(&sandbox.who, sandbox.id()).await.map_err(Not::of(sandbox))?;
    let meant = known
        .into_iter()
        .filter(|command| which.means(command))
        .max_by_key(|command| (command.told.end.is_none(), command.told.started_at_ms));
    meant.ok_or_else(|| unknown(which).into())
}

/// The same, if it runs.
async fn find_running(sandbox: &Sandbox, which: &messages::Which) -> Result<Command, Not> {
    let command = find(sandbox, which).await?;
    if command.told.end.is_some() { Err(unknown(which).into()) } else { Ok(command) }
}

fn unknown(which: &messages::Which) -> Fault {
    Fault::new(Code::NotFound, format!("{which} not found"))
}
