//! Jupyter Server's REST and WebSocket API, for clients that speak nothing else: its routes in one place, and what is audited of them.
//!
//! A kernel is a session: what is asked here goes to the same [`Service`](crate::service::Service), and there is nothing behind it that the native API has not
//! got. Written after jupyter_server's REST reference and the specification of its two WebSocket subprotocols.

use std::time::Duration;

use axum::Router;
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, any, get, post};
use serde_json::{Value, json};

use super::App;
use super::extract::Answer;
use super::problem::{self, Problem};

pub mod asking;
mod channels;
pub mod codec;
mod contents;
mod kernels;
mod kernelspecs;
mod said;
mod sessions;
mod sockets;
mod talk;

use asking::{Asking, Refusal};
pub use sockets::Sockets;

/// Where the API is, beside `/`.
const FOLDER: &str = "/jupyter";
/// A key as the first part of a path: for clients that send a key nowhere else, at least not with a WebSocket.
const KEY: &str = "/t/{key}";
/// The version of Jupyter Server whose API this is.
const VERSION: &str = "2.17.0";
/// A kernel that takes longer to be ready is told as starting: clients give up after 40 s.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// How much of it there is.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Longest message of a client, in bytes.
    pub message: usize,
    /// Connections to one session.
    pub of_session: usize,
    /// Connections to all sessions of a tenant.
    pub of_tenant: usize,
}

/// What changes something here, and what that is to the audit.
const CHANGES: [(Method, &str, &str); 12] = [
    (Method::POST, "/api/kernels", "create_session"),
    (Method::DELETE, "/api/kernels/{kernel}", "delete_session"),
    (Method::POST, "/api/kernels/{kernel}/interrupt", "interrupt_session"),
    (Method::POST, "/api/kernels/{kernel}/restart", "restart_session"),
    (Method::POST, "/api/sessions", "create_session"),
    (Method::PATCH, "/api/sessions/{session}", "patch_session"),
    (Method::DELETE, "/api/sessions/{session}", "delete_session"),
    (Method::POST, "/api/contents/{path}", "write_file"),
    (Method::PUT, "/api/contents/{path}", "write_file"),
    (Method::PATCH, "/api/contents/{path}", "move_file"),
    (Method::DELETE, "/api/contents/{path}", "delete_file"),
    (Method::POST, "/api/contents", "write_file"),
];

/// All routes, wherever they are.
pub(super) fn routes() -> Router<App> {
    places().into_iter().fold(Router::new(), |routes, place| match place.as_str() {
        "" => routes.merge(api()),
        place => routes.nest(place, api()),
    })
}

/// Requests that change something: method, route and what is done.
pub(super) fn changes() -> impl Iterator<Item = (Method, String, &'static str)> {
    let of = |place: String| CHANGES.map(|(method, route, action)| (method, format!("{place}{route}"), action));
    places().into_iter().flat_map(of)
}

fn places() -> [String; 4] {
    [String::new(), FOLDER.to_owned(), KEY.to_owned(), format!("{KEY}{FOLDER}")]
}

fn api() -> Router<App> {
    let root = || get(contents::get_contents).post(contents::post_contents);
    let at = root().put(contents::put_contents).patch(contents::patch_contents).delete(contents::delete_contents);
    let routes: [(&str, MethodRouter<App>); 18] = [
        ("/api", get(get_version)),
        ("/api/", get(get_version)),
        ("/api/status", get(get_status)),
        ("/api/me", get(get_me)),
        ("/api/kernelspecs", get(kernelspecs::list_kernelspecs)),
        ("/api/kernelspecs/{name}", get(kernelspecs::get_kernelspec)),
        ("/kernelspecs/{name}/{file}", get(kernelspecs::get_resource)),
        ("/api/kernels", get(kernels::list_kernels).post(kernels::create_kernel)),
        ("/api/kernels/{kernel}", get(kernels::get_kernel).delete(kernels::delete_kernel)),
        ("/api/kernels/{kernel}/interrupt", post(kernels::interrupt_kernel)),
        ("/api/kernels/{kernel}/channels", get(channels::open_channels)),
        ("/api/kernels/{kernel}/restart", post(kernels::restart_kernel)),
        ("/api/sessions", get(sessions::list_sessions).post(sessions::create_session)),
        (
            "/api/sessions/{session}",
            get(sessions::get_session).patch(sessions::patch_session).delete(sessions::delete_session),
        ),
        ("/api/contents", root()),
        ("/api/contents/", root()),
        ("/api/contents/{*path}", at),
        ("/api/terminals", get(list_terminals)),
    ];
    let with = |router: Router<App>, (path, methods): (&str, MethodRouter<App>)| {
        router.route(path, methods.options(answer_preflight))
    };
    routes.into_iter().fold(Router::new(), with).route("/api/{*rest}", any(nothing_there))
}

/// Browsers ask this before they send a key along, so it has none. Whether a page of another site may do so is said elsewhere.
async fn answer_preflight() -> Response {
    let headers = [
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, PUT, POST, PATCH, DELETE, OPTIONS"),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, "accept, content-type, authorization, x-xsrftoken"),
        (header::ALLOW, "GET, PUT, POST, PATCH, DELETE, OPTIONS"),
    ];
    (StatusCode::NO_CONTENT, headers).into_response()
}

/// Clients look here, without a key, for whether there is a Jupyter Server.
async fn get_version() -> Answer<Value> {
    Answer(json!({"version": VERSION}))
}

async fn get_status(asking: Asking) -> Result<Answer<Value>, Refusal> {
    let models: Vec<_> = kernels::all(&asking)?.iter().map(kernels::Model::of).collect();
    let latest = models.iter().map(|model| model.last_activity.as_str()).max();
    let started = kernels::time(asking.app.started);
    Ok(Answer(json!({
        "started": started,
        "last_activity": latest.unwrap_or(&started),
        "kernels": models.len(),
        "connections": models.iter().map(|model| model.connections).sum::<usize>(),
    })))
}

/// Who asks: a tenant, which has no face.
async fn get_me(asking: Asking) -> Answer<Value> {
    let name = &*asking.who.tenant;
    let identity = json!({
        "username": name, "name": name, "display_name": name, "initials": null, "avatar_url": null, "color": null,
    });
    Answer(json!({"identity": identity, "permissions": {}}))
}

/// Terminals of sessions are in the native API.
async fn list_terminals(_: Asking) -> Answer<Value> {
    Answer(json!([]))
}

async fn nothing_there(_: Asking) -> Refusal {
    Problem::new(problem::NOT_FOUND, "there is no such path in this server's Jupyter API; docs/JUPYTER.md lists all")
        .into()
}
