//! What E2B's agent in a sandbox (envd) answers: its routes in one place, its users, and what is audited of them.

use std::collections::BTreeMap;

use axum::Router;
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::Response;
use axum::routing::{any, get};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::stream;

use super::Change;
use super::connect::{self, Serving};
use super::error::{Code, Fault, Refusal};
use super::sandbox::{Aimed, ByAgentToken, Sandbox};
use crate::domain::ids::SessionId;
use crate::http::App;
use crate::http::extract::Answer;
use crate::http::problem::{self, Problem};
use crate::service::Error;

mod files;
mod filesystem;
mod gzip;
mod paths;
mod process;
mod signature;
mod watching;

/// Who everything in a sandbox is.
pub(super) const USER: &str = "user";

/// What changes something here, and what that is to the audit.
pub(super) const CHANGES: [Change; 9] = [
    (Method::POST, "/files", "write_file"),
    (Method::POST, "/process.Process/Start", "create_command"),
    (Method::POST, "/process.Process/SendSignal", "signal_command"),
    (Method::POST, "/filesystem.Filesystem/MakeDir", "make_folder"),
    (Method::POST, "/filesystem.Filesystem/Move", "move_file"),
    (Method::POST, "/filesystem.Filesystem/Remove", "delete_file"),
    (Method::POST, "/process.Process/SendInput", "write_command"),
    (Method::POST, "/process.Process/StreamInput", "write_command"),
    (Method::POST, "/process.Process/CloseStdin", "write_command"),
];

/// The same of signed URLs, which name no sandbox.
pub(super) const SIGNED_CHANGES: [Change; 1] = [(Method::POST, "/files", "write_file")];

/// The routes of a sandbox's agent.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/health", get(health))
        .route("/envs", get(envs))
        .route("/files", get(files::read).post(files::write))
        .merge(filesystem::routes())
        .merge(process::routes())
        .route("/{*rest}", any(nothing_there))
        .method_not_allowed_fallback(no_method)
}

/// What has no header that names a sandbox: clients' signed URLs lose the prefix of the server that they are for.
pub(super) fn signed_routes() -> Router<App> {
    Router::new()
        .route("/files", get(files::read_signed).post(files::write_signed))
        .method_not_allowed_fallback(no_method)
}

async fn no_method() -> Refusal {
    Refusal::of_agent(Problem::new(problem::METHOD_NOT_ALLOWED, "the path does not know this method"))
}

/// The environment of everything in it.
async fn envs(ByAgentToken(sandbox): ByAgentToken) -> Answer<BTreeMap<String, String>> {
    Answer(sandbox.session.spec.env.clone())
}

/// Whether the sandbox runs; clients ask without a token.
async fn health(_: Aimed) -> StatusCode {
    StatusCode::NO_CONTENT
}

pub(super) async fn nothing_there(_: ByAgentToken) -> Refusal {
    Refusal::of_agent(Problem::new(problem::NOT_FOUND, "there is no such path here; docs/E2B.md lists all"))
}

/// Why something is not done: the sandbox is gone, which is no answer of an RPC, or a fault, which is.
enum Not {
    Gone(SessionId),
    Done(Fault),
}

impl From<Fault> for Not {
    fn from(fault: Fault) -> Self {
        Self::Done(fault)
    }
}

impl Not {
    fn of(sandbox: &Sandbox) -> impl Fn(Error) -> Self {
        let id = sandbox.id();
        move |error| match error {
            Error::SessionEnded(_) | Error::NotFound("session") => Self::Gone(id),
            error => Self::Done(error.into()),
        }
    }

    /// As the one answer of an RPC.
    fn plain(self) -> Refusal {
        match self {
            Self::Gone(id) => Refusal::sandbox_missing(Some(id)),
            Self::Done(fault) => Refusal::of_rpc(fault),
        }
    }

    /// As the end of an answer that streams.
    fn streamed(self) -> Result<Response, Refusal> {
        match self {
            Self::Gone(id) => Err(Refusal::sandbox_missing(Some(id))),
            Self::Done(fault) => {
                let serving = Serving::until(std::future::pending());
                Ok(connect::stream(serving, stream::iter([Err(fault)])))
            }
        }
    }
}

/// Holds the user that an RPC names against the one there is.
fn check_rpc_user(headers: &HeaderMap) -> Result<(), Fault> {
    let Some(given) = headers.get(AUTHORIZATION) else { return Ok(()) };
    let named = given.to_str().ok().and_then(|text| {
        let (scheme, rest) = text.split_once(' ')?;
        let decoded = scheme.eq_ignore_ascii_case("basic").then(|| BASE64.decode(rest.trim()).ok())??;
        let text = String::from_utf8(decoded).ok()?;
        Some(text.split(':').next().unwrap_or_default().to_owned())
    });
    match named {
        Some(name) => check_user(&name).map_err(|detail| Fault::new(Code::Unauthenticated, detail)),
        None => Err(Fault::new(Code::Unauthenticated, "Authorization names a user as Basic <base64 of \"user:\">")),
    }
}

/// Holds a user that a request names against the one there is.
fn check_user(name: &str) -> Result<(), String> {
    match name {
        "" | USER => Ok(()),
        other => Err(format!(
            "invalid username: {other:.40?}; everything in this server's sandboxes is \"{USER}\", and nobody in them is root"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_user() {
        let asks = |value: &str| {
            let headers = HeaderMap::from_iter([(AUTHORIZATION, value.parse().unwrap())]);
            check_rpc_user(&headers).map_err(|fault| fault.code)
        };
        let basic = |user: &str| format!("Basic {}", BASE64.encode(format!("{user}:")));
        assert_eq!(check_rpc_user(&HeaderMap::new()).map_err(|fault| fault.code), Ok(()));
        assert_eq!(asks(&basic("user")), Ok(()));
        for wrong in [basic("root"), basic("nobody"), "Bearer x".to_owned(), "Basic !".to_owned(), "x".to_owned()] {
            assert_eq!(asks(&wrong), Err(Code::Unauthenticated), "{wrong}");
        }
    }
}
