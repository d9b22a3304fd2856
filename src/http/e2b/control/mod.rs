//! E2B's control API: sandboxes made, found, changed and ended. Its routes; what each does stands beside it.

use axum::Router;
use axum::http::Method;
use axum::routing::{MethodRouter, any, delete, get, post, put};

use super::error::Refusal;
use super::sandbox::Account;
use super::{Change, nothing_there};
use crate::http::App;
use crate::http::problem::{self, Problem};

/// What changes something here, and what that is to the audit.
pub(super) const CHANGES: [Change; 11] = [
    (Method::POST, "/sandboxes", "create_session"),
    (Method::POST, "/v2/sandboxes", "create_session"),
    (Method::POST, "/sandboxes/{id}/connect", "resume_session"),
    (Method::POST, "/v2/sandboxes/{id}/connect", "resume_session"),
    (Method::DELETE, "/sandboxes/{id}", "delete_session"),
    (Method::POST, "/sandboxes/{id}/timeout", "patch_session"),
    (Method::POST, "/sandboxes/{id}/pause", "pause_session"),
    (Method::PUT, "/sandboxes/{id}/network", "patch_session"),
    (Method::POST, "/sandboxes/{id}/snapshots", "create_snapshot"),
    (Method::POST, "/sandboxes/{id}/fork", "fork_session"),
    (Method::DELETE, "/templates/{id}", "delete_snapshot"),
];

/// The routes, without the prefix that they have in one of their two places.
pub(super) fn routes() -> Router<App> {
    let routes: [(&str, MethodRouter<App>); 13] = [
        ("/sandboxes", get(unbuilt).post(unbuilt)),
        ("/v2/sandboxes", get(unbuilt).post(unbuilt)),
        ("/sandboxes/{id}", get(unbuilt).delete(unbuilt)),
        ("/sandboxes/{id}/connect", post(unbuilt)),
        ("/v2/sandboxes/{id}/connect", post(unbuilt)),
        ("/sandboxes/{id}/timeout", post(unbuilt)),
        ("/sandboxes/{id}/pause", post(unbuilt)),
        ("/sandboxes/{id}/metrics", get(unbuilt)),
        ("/sandboxes/{id}/network", put(unbuilt)),
        ("/sandboxes/{id}/snapshots", post(unbuilt)),
        ("/sandboxes/{id}/fork", post(unbuilt)),
        ("/snapshots", get(unbuilt)),
        ("/templates/{id}", delete(unbuilt)),
    ];
    // What else clients of E2B may ask for, so that they are told in words that they know.
    let others = ["/sandboxes/{id}/{*rest}", "/v2/{*rest}", "/v3/{*rest}", "/templates", "/templates/{id}/{*rest}"];
    let with = |router: Router<App>, (path, methods): (&str, MethodRouter<App>)| {
        router.route(path, methods.fallback(no_method))
    };
    let routes = routes.into_iter().fold(Router::new(), with);
    others.into_iter().fold(routes, |router, path| router.route(path, any(nothing_there)))
}

async fn no_method() -> Refusal {
    Refusal::of_control(Problem::new(problem::METHOD_NOT_ALLOWED, "the path does not know this method"))
}

async fn unbuilt(_: Account) -> Refusal {
    Refusal::of_control(Refusal::unbuilt("this request of E2B's control API"))
}
