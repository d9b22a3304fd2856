//! The five routes of a small FastAPI sandbox that many have copied, an upload and the notebook, for its clients: the routes in one place, and what is audited of them.
//!
//! A `user_id` is a session of its own: what is asked here goes to the same [`Service`](crate::service::Service), and there is nothing behind it that the native API
//! has not got. Nothing is kept here either: a session is found again by its name, which is made of the `user_id`. What is answered stands in `docs/CLASSIC.md`.

use std::time::Duration;

use axum::Router;
use axum::http::Method;
use axum::routing::{MethodRouter, get, post};

use super::App;

mod asking;
mod body;
mod files;
mod install;
mod run;
mod sessions;

/// What is before the paths: nothing, or the key of a client that sends no headers; with a slash for clients whose base URL ends with one.
const PLACES: [&str; 4] = ["", "/", "/t/{key}", "/t/{key}/"];

/// What sessions of this door are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classic {
    /// Their template; nothing: the default one.
    pub template: Option<String>,
    /// Code that prepares their kernels.
    pub setup: Option<String>,
    /// They end after this long without work.
    pub idle: Duration,
}

/// What changes something here, and what that is to the audit.
const CHANGES: [(Method, &str, &str); 6] = [
    (Method::POST, "/start_session", "create_session"),
    (Method::POST, "/execute", "create_execution"),
    (Method::POST, "/install_package", "install_packages"),
    (Method::POST, "/reset", "restart_session"),
    (Method::POST, "/end_session", "delete_session"),
    (Method::POST, "/upload_file", "upload_files"),
];

/// All routes, wherever they are.
pub(super) fn routes() -> Router<App> {
    let routes: [(&str, MethodRouter<App>); 8] = [
        ("/start_session", post(sessions::start_session)),
        ("/execute", post(run::execute)),
        ("/install_package", post(install::install_package)),
        ("/reset", post(sessions::reset)),
        ("/end_session", post(sessions::end_session)),
        ("/upload_file", post(files::upload_file)),
        ("/notebook/{user_id}", get(files::get_notebook)),
        ("/notebook/{user_id}/{file}", get(files::get_notebook)),
    ];
    let with = |router: Router<App>, (path, methods): (&str, MethodRouter<App>)| {
        PLACES.iter().fold(router, |router, place| router.route(&format!("{place}{path}"), methods.clone()))
    };
    routes.into_iter().fold(Router::new(), with)
}

/// Requests that change something: method, route and what is done.
pub(super) fn changes() -> impl Iterator<Item = (Method, String, &'static str)> {
    let of = |place: &'static str| CHANGES.map(|(method, route, action)| (method, format!("{place}{route}"), action));
    PLACES.into_iter().flat_map(of)
}
