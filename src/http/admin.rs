//! The admin listener: what those ask who look after the server, without a key. It is on an address of its own, so that whoever reaches the API does not reach this.
//!
//! It answers with figures and never with anything of a tenant's.

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::listen::{self, Connections};
use super::operations::Operations;
use super::problem::{self, Problem};
use super::{App, livez, readyz};
use crate::metrics;

/// All routes of the admin listener.
pub fn router(app: App) -> Router {
    let routes = Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(show_metrics))
        .fallback(|| async { Problem::new(problem::NOT_FOUND, "here are /livez, /readyz and /metrics only") });
    super::layered(routes, app, Operations::default())
}

/// Serves until it is told to stop.
pub async fn serve(listener: TcpListener, app: App, connections: Connections, stop: CancellationToken) {
    let proxies = app.proxies.clone();
    listen::run(listener, router(app), proxies, connections, stop).await;
}

/// The figures, in the text format of Prometheus.
async fn show_metrics(State(app): State<App>) -> impl IntoResponse {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], app.service.exposition())
}
