//! The front doors. Each translates between HTTP and [`Service`], and calls nothing below it.
//!
//! One router, one onion of layers: request id and log line outside, then pages of other sites, then panics. Bodies are bounded where they are read, and
//! connections in `listen`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::HttpBody;
use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

use crate::domain::ids::RequestId;
use crate::service::Service;
use crate::service::trail::{Answered, Origin, Trail};
use crate::session;
use crate::traces::{Trace, Traces};

pub mod admin;
mod by_host;
pub mod classic;
mod connect;
mod crossing;
pub mod docs;
pub mod door;
pub mod e2b;
pub mod extract;
mod form;
mod forward;
pub mod jupyter;
mod lapse;
mod line;
pub mod listen;
pub mod local;
pub mod mcp;
mod operations;
pub mod origins;
pub mod problem;
pub mod rate;
pub mod remote;
pub mod tls;
pub mod v1;

use door::Door;
use extract::Answer;
use line::Line;
use listen::Connections;
use operations::Operations;
use origins::Origins;
use problem::Problem;
use remote::{Proxies, Remote};

/// Longest request id taken from a caller.
const MAX_REQUEST_ID: usize = 128;

/// The route of a request that none matches.
const NO_ROUTE: &str = "none";

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
    /// How ports of sessions are asked.
    pub ports: Ports,
    /// Jupyter Server's API, where it is on.
    pub jupyter: Option<jupyter::Bounds>,
    /// Connections of its clients.
    pub sockets: jupyter::Sockets,
    /// When it began.
    pub started: Timestamp,
    /// The door for clients of the Model Context Protocol, where it is open.
    pub mcp: Option<mcp::Mcp>,
    /// The door for clients of E2B, where it is open.
    pub e2b: Option<e2b::E2b>,
    /// The classic routes, where they are on.
    pub classic: Option<Arc<classic::Classic>>,
    /// Whether there is a page that says how clients connect.
    pub connect: bool,
}

impl App {
    /// Whether the caller speaks TLS: with this server, or with a proxy whose word counts.
    fn is_tls(&self, head: &Parts) -> bool {
        let is_said = head.headers.get("x-forwarded-proto").is_some_and(|value| value == "https");
        let peer = head.extensions.get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(peer)| peer.ip());
        self.ports.is_tls || (is_said && peer.is_some_and(|peer| self.proxies.include(peer)))
    }
}

/// How ports of sessions are asked.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    /// An answer begins, or more of the request is taken, within this time.
    pub within: Duration,
    /// Whether this server itself speaks TLS.
    pub is_tls: bool,
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
    let (v1, document) = docs::parts();
    let mut operations = Operations::of(&document);
    let jupyter = match app.jupyter {
        Some(_) => {
            operations.add(jupyter::changes());
            jupyter::routes()
        }
        None => Router::new(),
    };
    let mcp = if app.mcp.is_some() { mcp::routes() } else { Router::new() };
    let e2b = match app.e2b {
        Some(_) => {
            operations.add(e2b::changes());
            e2b::routes(app.bounds)
        }
        None => Router::new(),
    };
    let classic = match app.classic {
        Some(_) => {
            operations.add(classic::changes());
            classic::routes()
        }
        None => Router::new(),
    };
    let connect = if app.connect { connect::routes() } else { Router::new() };
    let routes = Router::new()
        .merge(v1)
        .merge(jupyter)
        .merge(mcp)
        .merge(e2b)
        .merge(classic)
        .merge(connect)
        .merge(docs::routes(document))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .fallback(|| async { Problem::new(problem::NOT_FOUND, "there is no such path; /docs lists all") })
        .method_not_allowed_fallback(|| async {
            Problem::new(problem::METHOD_NOT_ALLOWED, "/docs lists the methods of each path")
        })
        .layer(middleware::from_fn_with_state(app.clone(), origins::check));
    let routes = match app.origins.layer() {
        Some(cors) => routes.layer(cors),
        None => routes,
    };
    layered(routes, app, operations)
}

/// What every request goes through, whichever door it comes in by.
fn layered(routes: Router<App>, app: App, operations: Operations) -> Router {
    routes
        .layer(CatchPanicLayer::custom(|_| {
            Problem::new(problem::INTERNAL, "the request made the server panic").into_response()
        }))
        .layer(middleware::from_fn_with_state((app.clone(), Arc::new(operations)), finish))
        .with_state(app)
}

/// Serves until it is told to stop; requests under way may end.
pub async fn serve(listener: TcpListener, app: App, connections: Connections, stop: CancellationToken) {
    let (proxies, sockets) = (app.proxies.clone(), app.sockets.clone());
    listen::run(listener, router(app), proxies, connections, stop).await;
    sockets.closed().await;
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

/// Gives every request an id and a trail, every problem that id, every answer its headers, and the log one line.
async fn finish(State((app, operations)): State<(App, Arc<Operations>)>, mut request: Request, next: Next) -> Response {
    let id = request_id(&request);
    let method = request.method().clone();
    let matched = request.extensions().get::<MatchedPath>();
    let route: Arc<str> = matched.map_or_else(|| Arc::from(NO_ROUTE), |matched| Arc::from(matched.as_str()));
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(peer)| peer.ip());
    let address = peer.map(|peer| app.proxies.caller(peer, request.headers()));
    if let Some(address) = address {
        request.extensions_mut().insert(Remote(address));
    }
    let has_key = request.headers().contains_key(header::AUTHORIZATION) || request.headers().contains_key("x-api-key");
    let has_key = has_key || jupyter::asking::has_key(request.uri());
    let (action, path) = (operations.worth_an_event(&method, &route), jupyter::asking::redacted(request.uri().path()));
    let trace = app.service.traces().map(|traces| begin_trace(traces, request.headers()));
    let trail = Trail::new(Origin { address, request: id.clone(), path, action }, app.service.audit(), trace);
    let mut line = Line::new(method, route, Arc::clone(&trail), request.body().size_hint().exact());
    let rate = rate::Slot::default();
    request.extensions_mut().insert(Arc::clone(&rate));
    let mut response = trail.follow(next.run(request)).await;
    let mut code = None;
    if let Some(problem) = response.extensions_mut().remove::<Arc<Problem>>() {
        let problem = Problem { request_id: id.clone(), ..Problem::clone(&problem) };
        code = Some(problem.code);
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
    let made = headers.get(header::LOCATION).and_then(|path| path.to_str().ok()).map(jupyter::asking::redacted);
    let status = response.status();
    let took = line.answered(status.as_u16(), code, response.body().size_hint().exact());
    app.service.metrics().request_answered(&line.route, line.method.as_str(), status.as_u16(), took);
    let is_key_refused = code == Some(problem::UNAUTHENTICATED.word()) && has_key;
    trail.end(Answered { status: status.as_u16(), problem: code, is_key_refused, made });
    // What is there as a whole is given out.
    let is_whole = response.body().size_hint().exact().is_some();
    match if is_whole { None } else { trail.told().key } {
        Some(key) => lapse::until(app.door.closed_to(key), response),
        None => response,
    }
}

/// Begins to trace a request, below the span that its caller names.
fn begin_trace(traces: &Traces, headers: &HeaderMap) -> Trace {
    let values = |name: &str| headers.get_all(name).iter().map(|value| value.to_str().ok()).collect::<Option<Vec<_>>>();
    // Of two parents neither is believed; a state may be in several parts.
    let parent = values("traceparent").filter(|values| values.len() == 1).map(|values| values[0]);
    let state = values("tracestate").map(|values| values.join(","));
    traces.begin(parent, state.as_deref())
}

/// The caller's id for the request if it is harmless, else one of ours.
fn request_id(request: &Request) -> String {
    let harmless = |id: &&str| {
        (1..=MAX_REQUEST_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    let given = request.headers().get(REQUEST_ID).and_then(|v| v.to_str().ok()).filter(harmless);
    given.map_or_else(|| session::fresh::<RequestId>().to_string(), str::to_owned)
}
