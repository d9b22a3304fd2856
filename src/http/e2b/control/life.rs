//! How long a sandbox is there: connect, timeout, pause, resume and kill.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::super::error::Refusal;
use super::view::SandboxView;
use super::{Named, in_their_words, missing, rests};
use crate::domain::spec::{FieldError, OnExpiry, seconds_within};
use crate::http::extract::{Answer, Body};
use crate::http::problem::{self, Problem};
use crate::service::{Error, NewEnd, SessionPatch};

/// What a pause is here.
pub(super) const KEEPS_MEMORY: &str =
    "a pause keeps memory and processes here, always: there is none that keeps files alone";
/// What a sandbox has that is connected to without a time.
const USUAL_TIMEOUT: f64 = 300.0;
/// What an end at once is.
const AT_ONCE: f64 = 0.001;
/// Our names of fields, and theirs.
const NAMES: [(&str, &str); 1] = [("/expires_in_seconds", "/timeout")];

/// Somebody comes back to a sandbox.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Connect {
    /// Seconds.
    timeout: Option<f64>,
    memory: Option<bool>,
}

/// The same from older clients, to one that is paused.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Resume {
    timeout: Option<f64>,
    auto_pause: Option<bool>,
}

/// Another end.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Timeout {
    /// Seconds from now.
    timeout: f64,
}

/// A pause.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Pause {
    memory: Option<bool>,
    /// A guest that does not answer is not paused, whatever is said here.
    #[serde(rename = "requireHealthyGuest")]
    _require_healthy_guest: Option<bool>,
}

/// Tells what a client works with, and resumes a paused sandbox. The time of one that runs is never made shorter.
pub(super) async fn connect(named: Named, body: Result<Body<Connect>, Problem>) -> Result<Response, Refusal> {
    let Body(asked) = body.map_err(Refusal::of_control)?;
    let rested = rests(&named.session);
    if rested {
        // To one that runs it means nothing.
        keeps_memory(asked.memory)?;
    }
    let sandbox = come_back(named, asked.timeout).await?;
    let status = if rested { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Answer(sandbox)).into_response())
}

/// Resumes a paused sandbox.
pub(super) async fn resume(named: Named, body: Result<Body<Resume>, Problem>) -> Result<Response, Refusal> {
    let Body(asked) = body.map_err(Refusal::of_control)?;
    let pauses = named.session.spec.on_expiry == OnExpiry::Pause;
    if asked.auto_pause.is_some_and(|asked| asked != pauses) {
        let message = format!("it stays what the sandbox was created with, {pauses}");
        return Err(Refusal::of_control(Error::SpecRejected(vec![FieldError::new("/autoPause", message)])));
    }
    if !rests(&named.session) {
        return Err(Refusal::of_control(Problem::new(problem::STATE_CONFLICT, "the sandbox is not paused")));
    }
    let sandbox = come_back(named, asked.timeout).await?;
    Ok((StatusCode::CREATED, Answer(sandbox)).into_response())
}

async fn come_back(Named { app, who, session }: Named, timeout: Option<f64>) -> Result<SandboxView, Refusal> {
    // Tokens are for who may work with it.
    who.require_sessions().map_err(Refusal::of_control)?;
    let refused = |error| in_their_words(error, &NAMES);
    let most = session.spec.max_lifetime;
    let seconds = timeout.unwrap_or(USUAL_TIMEOUT.min(most.as_secs_f64()));
    seconds_within(seconds, most)
        .map_err(|message| refused(Error::SpecRejected(vec![FieldError::new("/timeout", message)])))?;
    app.service.started(&session).await.map_err(refused)?;
    let rested = rests(&session);
    if rested {
        app.service.resume(&who, session.id).await.map_err(refused)?;
    }
    // Who comes to one that has rested says how long it is to be there; others wait for what they were promised.
    let end = if rested { NewEnd::Within } else { NewEnd::Later };
    let patch = SessionPatch { expires_in_seconds: Some(seconds), end, ..SessionPatch::default() };
    app.service.patch_session(&who, session.id, &patch).await.map_err(refused)?;
    if rests(&session) {
        // It was on its way to be paused.
        app.service.resume(&who, session.id).await.map_err(refused)?;
    }
    Ok(SandboxView::of(&app, &session))
}

/// Has a sandbox end, or be paused, at another time.
pub(super) async fn set_timeout(
    Named { app, who, session }: Named,
    body: Result<Body<Timeout>, Problem>,
) -> Result<StatusCode, Refusal> {
    let Body(asked) = body.map_err(Refusal::of_control)?;
    who.require_sessions().map_err(Refusal::of_control)?;
    if rests(&session) {
        return Err(missing("the sandbox is paused, and its time with it; connect to it, which resumes it"));
    }
    // An end at once is one that clients ask for.
    let seconds = if asked.timeout == 0.0 { AT_ONCE } else { asked.timeout };
    let patch = SessionPatch { expires_in_seconds: Some(seconds), ..SessionPatch::default() };
    let patched = app.service.patch_session(&who, session.id, &patch).await;
    patched.map_err(|error| in_their_words(error, &NAMES))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Pauses a sandbox in which nothing runs. Its time stands still meanwhile, as far as its template lets it.
pub(super) async fn pause(
    Named { app, who, session }: Named,
    body: Result<Body<Pause>, Problem>,
) -> Result<StatusCode, Refusal> {
    let Body(asked) = body.map_err(Refusal::of_control)?;
    keeps_memory(asked.memory)?;
    who.require_sessions().map_err(Refusal::of_control)?;
    if rests(&session) {
        return Err(Refusal::of_control(Problem::new(problem::STATE_CONFLICT, "the sandbox is paused already")));
    }
    app.service.pause(&who, session.id).await.map_err(|error| {
        let may_be_later = matches!(error, Error::StateConflict(_) | Error::NotReady);
        let refusal = Refusal::of_control(error);
        // To clients 409 is a sandbox that is paused already.
        if may_be_later { refusal.with_status(StatusCode::SERVICE_UNAVAILABLE) } else { refusal }
    })?;
    if session.spec.on_expiry == OnExpiry::Delete {
        let (seconds, end) = (Some(session.spec.max_lifetime.as_secs_f64()), NewEnd::Within);
        let patch = SessionPatch { expires_in_seconds: seconds, end, ..SessionPatch::default() };
        app.service.patch_session(&who, session.id, &patch).await.map_err(Refusal::of_control)?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Ends a sandbox. One that has ended is not there any more.
pub(super) async fn kill(Named { app, who, session }: Named) -> Result<StatusCode, Refusal> {
    app.service.delete_session(&who, session.id).await.map_err(Refusal::of_control)?;
    Ok(StatusCode::NO_CONTENT)
}

fn keeps_memory(asked: Option<bool>) -> Result<(), Refusal> {
    match asked {
        Some(false) => Err(Refusal::of_control(Error::SpecRejected(vec![FieldError::new("/memory", KEEPS_MEMORY)]))),
        _ => Ok(()),
    }
}
