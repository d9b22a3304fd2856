//! What E2B's agent in a sandbox (envd) answers: its routes in one place, its users, and what is audited of them.

use axum::Router;
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::routing::{any, get};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::Change;
use super::error::{Code, Fault, Refusal};
use super::sandbox::{Aimed, ByAgentToken};
use crate::http::App;
use crate::http::problem::{self, Problem};

mod files;
mod filesystem;
#[allow(dead_code, reason = "the rooms beside it are built on it")]
mod paths;
mod process;

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
        .route("/files", get(files::read).post(files::write))
        .merge(filesystem::routes())
        .merge(process::routes())
        .route("/{*rest}", any(nothing_there))
}

/// What has no header that names a sandbox: clients' signed URLs lose the prefix of the server that they are for.
pub(super) fn signed_routes() -> Router<App> {
    Router::new().route("/files", get(files::read_signed).post(files::write_signed))
}

/// Whether the sandbox runs; clients ask without a token.
async fn health(_: Aimed) -> StatusCode {
    StatusCode::NO_CONTENT
}

pub(super) async fn nothing_there(_: ByAgentToken) -> Refusal {
    Refusal::of_agent(Problem::new(problem::NOT_FOUND, "there is no such path here; docs/E2B.md lists all"))
}

#[allow(dead_code, reason = "the rooms of RPCs are built on it")]
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

#[allow(dead_code, reason = "the rooms below are built on it")]
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
