//! E2B's code interpreter: executions as lines of JSON, and contexts. An execution here is one of the native API's.

use axum::Router;
use axum::http::Method;
use axum::routing::{any, delete, get, post};

use super::Change;
use super::error::Refusal;
use super::sandbox::{Aimed, ByTrafficToken};
use crate::http::App;
use crate::http::problem::{self, Problem};

/// What changes something here, and what that is to the audit.
pub(super) const CHANGES: [Change; 4] = [
    (Method::POST, "/execute", "create_execution"),
    (Method::POST, "/contexts", "create_context"),
    (Method::POST, "/contexts/{id}/restart", "restart_context"),
    (Method::DELETE, "/contexts/{id}", "delete_context"),
];

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/health", get(health))
        .route("/execute", post(unbuilt))
        .route("/contexts", get(unbuilt).post(unbuilt))
        .route("/contexts/{id}/restart", post(unbuilt))
        .route("/contexts/{id}", delete(unbuilt))
        .route("/{*rest}", any(nothing_there))
}

/// Whether it runs, in the words of its own server.
async fn health(_: Aimed) -> &'static str {
    "\"OK\""
}

pub(super) async fn nothing_there(_: ByTrafficToken) -> Refusal {
    Refusal::of_interpreter(Problem::new(problem::NOT_FOUND, "there is no such path here; docs/E2B.md lists all"))
}

async fn unbuilt(_: ByTrafficToken) -> Refusal {
    Refusal::of_interpreter(Refusal::unbuilt("the code interpreter"))
}
