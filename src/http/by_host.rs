//! Hosts of the ports' domain: a request to one is brought into the form that names the session and the port in its path. No such host serves anything else.

use axum::http::uri::PathAndQuery;
use axum::http::{HeaderValue, Request, Uri, header};

use crate::domain::ids::SessionId;

/// The request came to a host of its port's own.
#[derive(Debug, Clone, Copy)]
pub(super) struct ByHost;

/// Where requests to hosts of the domain go that name no port of a session: there is nothing.
pub(super) const NOWHERE: &str = "/nothing-on-this-host";

/// Rewrites a request to a host of the domain; any other stays as it is.
pub(super) fn bring_in<B>(request: &mut Request<B>, domain: &str) {
    let Some(label) = host_of(request).as_deref().and_then(|host| label_in(host, domain).map(str::to_owned)) else {
        return;
    };
    let uri = request.uri();
    let named = port_in(&label).and_then(|(port, session)| Some((port, session.parse::<SessionId>().ok()?)));
    let path = match named {
        Some((port, session)) => {
            let rest = uri.path_and_query().map_or("/", PathAndQuery::as_str);
            // A target such as `*` is no path.
            let slash = if rest.starts_with('/') { "" } else { "/" };
            format!("/v1/sessions/{session}/ports/{port}{slash}{rest}")
        }
        None => NOWHERE.to_owned(),
    };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = PathAndQuery::try_from(path).ok().or_else(|| Some(PathAndQuery::from_static(NOWHERE)));
    *request.uri_mut() = Uri::from_parts(parts).unwrap_or_else(|_| Uri::from_static(NOWHERE));
    request.extensions_mut().insert(ByHost);
}

/// The host that is asked, in lower case and without a port. Of two that differ, the one of the target counts, as HTTP has it.
pub(super) fn host_of<B>(request: &Request<B>) -> Option<String> {
    let named = request.headers().get(header::HOST).map(HeaderValue::as_bytes);
    let named = named.and_then(|name| std::str::from_utf8(name).ok());
    let host = request.uri().authority().map(|authority| authority.as_str()).or(named)?;
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    let bare = host.split(':').next().unwrap_or_default();
    Some(bare.trim_end_matches('.').to_ascii_lowercase())
}

/// What stands before the domain; empty for the domain itself.
pub(super) fn label_in<'a>(host: &'a str, domain: &str) -> Option<&'a str> {
    let before = host.strip_suffix(domain)?;
    if before.is_empty() { Some("") } else { before.strip_suffix('.') }
}

/// A label that names a port, and what of.
pub(super) fn port_in(label: &str) -> Option<(u16, &str)> {
    let (port, named) = label.split_once('-')?;
    Some((port_of(port)?, named))
}

/// A port in its one spelling.
pub(super) fn port_of(text: &str) -> Option<u16> {
    let is_port = !text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| is_port)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn brought(host: &str, target: &str) -> (String, bool) {
        let mut request = Request::builder().uri(target).header("host", host).body(()).unwrap();
        bring_in(&mut request, "ports.example");
        let is_by_host = request.extensions().get::<ByHost>().is_some();
        (request.uri().path_and_query().unwrap().to_string(), is_by_host)
    }

    #[test]
    fn a_host_of_the_domain_is_a_port_of_a_session_or_nothing() {
        let session = SessionId::from_uuid(uuid::Uuid::from_u128(7));
        let at = |rest: &str| (format!("/v1/sessions/{session}/ports/8000{rest}"), true);
        let host = format!("8000-{session}.ports.example");
        assert_eq!(brought(&host, "/a/b?c=%2F"), at("/a/b?c=%2F"));
        assert_eq!(brought(&format!("{host}:8443"), "/"), at("/"));
        assert_eq!(brought(&format!("{}.", host.to_uppercase()), "/"), at("/"));
        assert_eq!(brought("elsewhere", &format!("http://{host}/x")), at("/x"));
        assert_eq!(brought(&host, "/v1/sessions"), at("/v1/sessions"), "the API is not there");
        let nowhere = (NOWHERE.to_owned(), true);
        for odd in ["ports.example", "x.ports.example", "8000-x.ports.example", "0-x.ports.example"] {
            assert_eq!(brought(odd, "/v1/sessions"), nowhere, "{odd}");
        }
        for odd in
            [format!("a.{host}"), format!("08000-{session}.ports.example"), format!("80000-{session}.ports.example")]
        {
            assert_eq!(brought(&odd, "/"), nowhere, "{odd}");
        }
        for other in ["api.example", "xports.example", "ports.example.evil", "localhost:8080", ""] {
            assert_eq!(brought(other, "/v1/sessions"), ("/v1/sessions".to_owned(), false), "{other}");
        }
    }
}
