//! The front doors. Each translates between HTTP and [`Service`], and calls nothing below it.
//!
//! One router, one onion of layers: request id and log line outside, then pages of other sites, then panics. Bodies are bounded where they are read, and
//! connections in `listen`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

use crate::domain::ids::RequestId;
use crate::service::Service;
use crate::session;

pub mod docs;
pub mod door;
pub mod extract;
pub mod listen;
pub mod origins;
pub mod problem;
pub mod rate;
pub mod remote;
pub mod tls;
pub mod v1;

use door::Door;
use extract::Answer;
use listen::Connections;
use origins::Origins;
use problem::Problem;
use remote::{Proxies, Remote};

/// Longest request id taken from a caller.
const MAX_REQUEST_ID: usize = 128;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What handlers work with.
#[derive(Debug, Clone)]
pub struct App {
    /// The product.
    pub service: Arc<Service>,
    /// Who may ask.
    pub door: Arc<Door>,
    /// This server's name among others on the same engine.
    pub instance: Arc<str>,
    /// What a request may cost before it is understood.
    pub bounds: Bounds,
    /// Whose word about callers' addresses counts.
    pub proxies: Proxies,
    /// Pages of other sites that may use it.
    pub origins: Origins,
}

/// What a request may cost before it is understood.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes of its body.
    pub body: usize,
    /// Its body arrives within this time.
    pub body_time: Duration,
}

/// All routes.
pub fn router(app: App) -> Router {
    let (v1, document) = v1::routes().split_for_parts();
    let router = Router::new()
        .merge(v1)
        .merge(docs::routes(document))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .fallback(|| async { Problem::new(problem::NOT_FOUND, "there is no such path; /docs lists all") })
        .method_not_allowed_fallback(|| async {
            Problem::new(problem::METHOD_NOT_ALLOWED, "/docs lists the methods of each path")
        })
        .layer(CatchPanicLayer::custom(|_| {
            Problem::new(problem::INTERNAL, "the request made the server panic").into_response()
        }))
        .layer(middleware::from_fn_with_state(app.clone(), origins::check));
    let router = match app.origins.layer() {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router.layer(middleware::from_fn_with_state(app.proxies.clone(), finish)).with_state(app)
}

/// Serves until it is told to stop; requests under way may end.
pub async fn serve(listener: TcpListener, app: App, connections: Connections, stop: CancellationToken) {
    let proxies = app.proxies.clone();
    listen::run(listener, router(app), proxies, connections, stop).await;
}

/// Whether the process answers.
async fn livez(State(app): State<App>) -> Answer<serde_json::Value> {
    Answer(serde_json::json!({"status": "ok", "service": "cellblock", "instance": &*app.instance}))
}

/// Whether new work is accepted and the engine answers.
async fn readyz(State(app): State<App>) -> Result<Answer<serde_json::Value>, Problem> {
    app.service.ready().await?;
    Ok(Answer(serde_json::json!({"status": "ok"})))
}

/// Gives every request an id, every problem that id, every answer its headers, and the log one line.
async fn finish(State(proxies): State<Proxies>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(&request);
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(peer)| peer.ip());
    let remote = peer.map(|peer| proxies.caller(peer, request.headers()));
    if let Some(address) = remote {
        request.extensions_mut().insert(Remote(address));
    }
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let rate = rate::Slot::default();
    request.extensions_mut().insert(Arc::clone(&rate));
    let mut response = next.run(request).await;
    if let Some(problem) = response.extensions_mut().remove::<Arc<Problem>>() {
        let problem = Problem { request_id: id.clone(), ..Problem::clone(&problem) };
        // What other layers have added to its headers stays.
        let (mut head, _) = response.into_parts();
        head.headers.remove(header::CONTENT_LENGTH);
        response = Response::from_parts(head, problem.render().into_body());
    }
    let headers = response.headers_mut();
    if let Some(limit) = rate.get() {
        limit.write(headers);
    }
    if let Ok(value) = HeaderValue::from_str(&id) {
        headers.insert(REQUEST_ID, value);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    let (status, elapsed_ms) = (response.status().as_u16(), started.elapsed().as_secs_f64() * 1000.0);
    let remote = remote.map(tracing::field::display);
    tracing::info!(%method, path, status, remote, elapsed_ms, request_id = id, "request");
    response
}

/// The caller's id for the request if it is harmless, else one of ours.
fn request_id(request: &Request) -> String {
    let harmless = |id: &&str| {
        (1..=MAX_REQUEST_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    let given = request.headers().get(REQUEST_ID).and_then(|v| v.to_str().ok()).filter(harmless);
    given.map_or_else(|| session::fresh::<RequestId>().to_string(), str::to_owned)
}
