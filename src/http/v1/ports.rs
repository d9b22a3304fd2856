//! Ports of a session over HTTP: any request to one is passed on to what the code in the session serves there, as is a WebSocket. What may cross is decided in
//! `crossing`, and the passing is done in `forward`.

use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, Method, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use crate::domain::ids::SessionId;
use crate::http::App;
use crate::http::by_host::ByHost;
use crate::http::crossing::Place;
use crate::http::extract::Caller;
use crate::http::forward::{self, Failure};
use crate::http::listen::Held;
use crate::http::problem::{self, Problem};
use crate::http::remote::Remote;
use crate::service::Error;
use crate::service::keys::Principal;

/// What of the document is here: the routes take any method, for which a document has no word.
#[derive(OpenApi)]
#[openapi(paths(ask_port))]
struct Document;

/// The routes, with what of the document is here.
pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Document::openapi())
        .route("/v1/sessions/{id}/ports/{port}", any(ask_port))
        .route("/v1/sessions/{id}/ports/{port}/", any(ask_port))
        .route("/v1/sessions/{id}/ports/{port}/{*path}", any(ask_port))
}

/// Ask what a session serves on a port
///
/// Any method, and WebSockets, are passed on to an HTTP server that code in the session runs on the container's loopback, if the template allows the port. The key
/// is in a header and is not passed on; neither are cookies. What comes back is untrusted: `Content-Security-Policy: sandbox`, no cookies, and redirections
/// within the port only. Nothing listens there: 502 `port-closed`. It does not speak HTTP/1.1: 502 `port-failed`. It does not answer in time: 504 `port-silent`.
/// With `server.ports_domain` the port is also the host `<port>-<session>.<domain>`, with paths and cookies of its own.
#[utoipa::path(get, path = "/v1/sessions/{id}/ports/{port}/{path}", operation_id = "ask_port", tag = "ports",
    params(("id" = String, Path, description = "The session's id"), ("port" = u16, Path, description = "The port"),
        ("path" = String, Path, description = "Path of the request that the server gets; it may be empty, or have slashes")),
    responses((status = "default", description = "Whatever the code answers"), (status = "4XX", body = Problem),
        (status = "5XX", body = Problem)))]
pub async fn ask_port(State(app): State<App>, Caller(who): Caller, request: Request) -> Result<Response, Problem> {
    let target = Target::of(&request)?;
    pass(&app, &who, target, request).await.map_err(|unpassed| match unpassed {
        Unpassed::Refused(error) => error.into(),
        Unpassed::Problem(problem) => problem,
    })
}

/// Why a request is not passed on.
pub(in crate::http) enum Unpassed {
    /// There is no connection.
    Refused(Error),
    /// It is not to be, or was not answered.
    Problem(Problem),
}

impl From<Problem> for Unpassed {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

/// Passes a request on to what a session serves on a port.
///
/// # Errors
/// See [`Unpassed`].
pub(in crate::http) async fn pass(
    app: &App,
    who: &Principal,
    target: Target,
    request: Request,
) -> Result<Response, Unpassed> {
    if [Method::CONNECT, Method::TRACE].contains(request.method()) {
        return Err(Problem::new(problem::METHOD_NOT_ALLOWED, "CONNECT and TRACE are not passed on").into());
    }
    // A browser sends a page's cookies and no key, but says which page it was: not even with a key may another site's open one.
    if request.headers().contains_key(header::UPGRADE) && !app.origins.may_change(request.headers(), request.uri()) {
        let detail = "pages of this origin may not open connections here; server.cors_origins lists those that may";
        return Err(Problem::new(problem::FORBIDDEN, detail).into());
    }
    let stream = app.service.open_port(who, target.session, target.port).await.map_err(Unpassed::Refused)?;
    let (mut head, body) = request.into_parts();
    let place = place(app, &head, &target);
    let asked = target.path.clone();
    place.inwards(&mut head.headers);
    head.uri = uri(&target, head.uri.query())?;
    // Only what the connection becomes outlives the answer.
    let (held, lapsed) = (Held::by(&head.extensions), who.key.map(|key| app.door.closed_to(key)));
    let over = async move {
        match lapsed {
            Some(lapsed) => lapsed.await,
            None => std::future::pending().await,
        }
        drop(held);
    };
    let passed = forward::forward(stream, Request::from_parts(head, body), app.ports.within, over).await;
    let mut response = passed.map_err(|failure| refusal(&failure, target.port))?;
    let status = response.status();
    place.outwards(status, response.headers_mut(), &asked);
    Ok(response.into_response())
}

/// What is asked for.
pub(in crate::http) struct Target {
    session: SessionId,
    port: u16,
    /// Escaped, as it came.
    path: String,
    is_own_host: bool,
}

impl Target {
    /// A port that is asked under a host, or otherwise as if it were all there is.
    pub(in crate::http) fn own_host(session: SessionId, port: u16, path: String) -> Self {
        Self { session, port, path, is_own_host: true }
    }

    /// Out of the path as it came, of which nothing is decoded on the way.
    fn of(request: &Request) -> Result<Self, Problem> {
        let missing = || Problem::new(problem::NOT_FOUND, "there is no such session, or no such port");
        let mut parts = request.uri().path().splitn(7, '/').skip(3);
        let session = parts.next().and_then(|id| id.parse().ok()).ok_or_else(missing)?;
        let port = parts.nth(1).ok_or_else(missing)?;
        let is_port = port.bytes().all(|b| b.is_ascii_digit());
        let port = port.parse().ok().filter(|port| is_port && *port > 0).ok_or_else(missing)?;
        let path = format!("/{}", parts.next().unwrap_or_default());
        Ok(Self { session, port, path, is_own_host: request.extensions().get::<ByHost>().is_some() })
    }
}

fn place(app: &App, head: &Parts, target: &Target) -> Place {
    let host = head.headers.get(header::HOST).cloned();
    let authority = head.uri.authority().and_then(|authority| HeaderValue::from_str(authority.as_str()).ok());
    let prefix = format!("/v1/sessions/{}/ports/{}", target.session, target.port);
    Place {
        prefix: if target.is_own_host { String::new() } else { prefix },
        host: host.or(authority),
        is_tls: app.is_tls(head),
        caller: head.extensions.get::<Remote>().map(|Remote(address)| *address),
        port: target.port,
    }
}

fn uri(target: &Target, query: Option<&str>) -> Result<Uri, Problem> {
    let text = query.map_or_else(|| target.path.clone(), |query| format!("{}?{query}", target.path));
    text.parse().map_err(|_| Problem::new(problem::INVALID_REQUEST, "the path can't be passed on"))
}

fn refusal(failure: &Failure, port: u16) -> Problem {
    let code = match failure {
        Failure::Garbled(_) => problem::PORT_FAILED,
        Failure::Silent(_) => problem::PORT_SILENT,
    };
    Problem::new(code, format!("what the session serves on port {port} gave no answer: {failure}"))
}
