//! Files outside of RPC: `GET` and `POST /files`, by token, or by a signature in the query.

use axum::extract::State;

use super::super::error::Refusal;
use super::super::sandbox::ByAgentToken;
use crate::http::App;

/// `GET /files?path=`: the bytes of a file.
pub(super) async fn read(_: ByAgentToken) -> Refusal {
    unbuilt()
}

/// `POST /files`: writes one file or several.
pub(super) async fn write(_: ByAgentToken) -> Refusal {
    unbuilt()
}

/// The same without a header that names the sandbox: whose token has signed the query is looked for.
pub(super) async fn read_signed(State(_): State<App>) -> Refusal {
    unbuilt()
}

/// The same for writing.
pub(super) async fn write_signed(State(_): State<App>) -> Refusal {
    unbuilt()
}

fn unbuilt() -> Refusal {
    Refusal::of_agent(Refusal::unbuilt("/files"))
}
