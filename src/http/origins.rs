//! What pages of other sites may do from a browser: nothing, unless the configuration lists their origin.

use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tower_http::cors::CorsLayer;

use super::App;
use super::problem::{self, Problem};

/// A browser asks again after this long whether it may.
const MAX_AGE: Duration = Duration::from_secs(600);

/// Origins whose pages may use the API: `https://app.example.com`.
#[derive(Debug, Clone, Default)]
pub struct Origins(Vec<HeaderValue>);

impl Origins {
    /// These, as browsers write them, and the server's own.
    #[must_use]
    pub fn new(allowed: &[impl AsRef<str>]) -> Self {
        // What no header can say, no browser says.
        Self(allowed.iter().filter_map(|origin| HeaderValue::from_str(origin.as_ref()).ok()).collect())
    }

    /// Answers browsers that ask; none where there is no other origin.
    pub(super) fn layer(&self) -> Option<CorsLayer> {
        const TAKEN: [HeaderName; 16] = [
            header::ACCEPT,
            header::AUTHORIZATION,
            header::CONTENT_TYPE,
            HeaderName::from_static("x-xsrftoken"),
            HeaderName::from_static("x-api-key"),
            HeaderName::from_static("x-request-id"),
            HeaderName::from_static("idempotency-key"),
            HeaderName::from_static("last-event-id"),
            HeaderName::from_static("mcp-protocol-version"),
            HeaderName::from_static("mcp-session-id"),
            HeaderName::from_static("mcp-method"),
            HeaderName::from_static("mcp-name"),
            HeaderName::from_static("mcp-param-session-id"),
            HeaderName::from_static("x-cellblock-session"),
            HeaderName::from_static("traceparent"),
            HeaderName::from_static("tracestate"),
        ];
        const SHOWN: [HeaderName; 6] = [
            header::LOCATION,
            header::RETRY_AFTER,
            HeaderName::from_static("mcp-session-id"),
            HeaderName::from_static("x-request-id"),
            HeaderName::from_static("ratelimit"),
            HeaderName::from_static("ratelimit-policy"),
        ];
        let layer = CorsLayer::new()
            .allow_origin(self.0.clone())
            .allow_methods([Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
            .allow_headers(TAKEN)
            .expose_headers(SHOWN)
            .max_age(MAX_AGE);
        (!self.0.is_empty()).then_some(layer)
    }

    /// Whether an origin is one of the configuration's list.
    pub(super) fn lists(&self, origin: &HeaderValue) -> bool {
        self.0.contains(origin)
    }

    /// Whether the page that a request comes from may change something. What comes from no page may: browsers always say which.
    pub(super) fn may_change(&self, headers: &HeaderMap, uri: &Uri) -> bool {
        let mut given = headers.get_all(header::ORIGIN).iter();
        let Some(origin) = given.next() else { return true };
        given.next().is_none() && (self.0.contains(origin) || is_own(origin, headers, uri))
    }
}

/// What pages are told that may not.
pub(super) fn refusal() -> Problem {
    let detail = "pages of this origin may not use this server; server.cors_origins lists those that may";
    Problem::new(problem::FORBIDDEN, detail)
}

/// Whether an origin is the server's own, by the name that it was asked under.
fn is_own(origin: &HeaderValue, headers: &HeaderMap, uri: &Uri) -> bool {
    let asked = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let asked = asked.or_else(|| uri.authority().map(|authority| authority.as_str()));
    let origin = origin.to_str().ok().and_then(|origin| origin.parse::<Uri>().ok());
    let origin = origin.as_ref().filter(|origin| origin.scheme().is_some()).and_then(Uri::authority);
    asked.zip(origin).is_some_and(|(asked, origin)| origin.as_str().eq_ignore_ascii_case(asked))
}

/// Refuses what a page of another site would change. Browsers send some of it without asking first.
pub(super) async fn check(State(app): State<App>, request: Request, next: Next) -> Response {
    let reads = [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE].contains(request.method());
    // A GET that opens a connection for more than reading asks for itself.
    if reads || app.origins.may_change(request.headers(), request.uri()) {
        return next.run(request).await;
    }
    refusal().into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    fn may(origins: &[&str], uri: &str, headers: &[(&'static str, &str)]) -> bool {
        let origins = Origins::new(origins);
        let mut request = Request::builder().uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::empty()).unwrap();
        origins.may_change(request.headers(), request.uri())
    }

    #[test]
    fn own_pages_and_listed_ones_may_change_things() {
        let listed = ["https://app.example.com"];
        assert!(may(&[], "/", &[("host", "box:8080")]), "no page");
        assert!(may(&[], "/", &[("host", "box:8080"), ("origin", "http://box:8080")]), "the page of the documentation");
        assert!(may(&[], "https://Box/v1", &[("origin", "https://box")]), "the same over HTTP/2");
        assert!(may(&listed, "/", &[("host", "box"), ("origin", "https://app.example.com")]));
        for wrong in
            ["https://evil.example", "http://app.example.com", "https://app.example.com:444", "null", "box", ""]
        {
            assert!(!may(&listed, "/", &[("host", "box"), ("origin", wrong)]), "{wrong}");
        }
        let twice = [("host", "box"), ("origin", "https://app.example.com"), ("origin", "https://evil.example")];
        assert!(!may(&listed, "/", &twice));
        assert!(!may(&[], "/", &[("origin", "http://box")]), "a name that nobody asked under");
    }
}
