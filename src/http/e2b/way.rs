//! Which part of the door a request is for, before any route is looked up: by the host that it came to, or by the headers that name a sandbox and a port. Whether
//! there is such a sandbox, and who asks, is not looked at here.
//!
//! A request for a sandbox is brought to a folder of routes of its port's own, so that logs, metrics and the audit know what it is; the sandbox goes along as an
//! `Aim`. Without one those routes answer nothing.

use std::sync::Arc;

use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, HeaderName, Request, Uri};

use crate::http::by_host::{self, host_of, label_in};

/// The control API, beside `/`.
pub(super) const CONTROL: &str = "/e2b/api";
/// All sandboxes, by headers, beside `/`.
pub(super) const SANDBOXES: &str = "/e2b/box";
/// Where requests go for what E2B's agent in a sandbox does.
pub(super) const AGENT: &str = "/e2b/envd";
/// Where those go for its code interpreter.
pub(super) const INTERPRETER: &str = "/e2b/interpreter";
/// Where those go for what code in it serves.
pub(super) const PORTS: &str = "/e2b/ports";
/// The port by which clients mean the agent.
pub(super) const AGENT_PORT: u16 = 49983;
/// The port by which they mean the code interpreter.
pub(super) const INTERPRETER_PORT: u16 = 49999;

pub(super) const SANDBOX: HeaderName = HeaderName::from_static("e2b-sandbox-id");
pub(super) const PORT: HeaderName = HeaderName::from_static("e2b-sandbox-port");
/// Longest text that is taken for a sandbox's id.
const MAX_ID: usize = 64;

/// What requests are told apart by.
#[derive(Debug, Clone, Default)]
pub struct Way {
    /// The domain whose hosts are the API and sandboxes, if there is one.
    pub domain: Option<Arc<str>>,
}

/// The sandbox and the port that a request is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Aim {
    /// As it was named; there may be none of that name.
    pub(super) sandbox: String,
    pub(super) port: u16,
}

impl Way {
    /// Brings a request to its part of the door; any other stays as it is.
    pub(in crate::http) fn bring_in<B>(&self, request: &mut Request<B>) {
        let label = self.domain.as_deref().and_then(|domain| {
            let host = host_of(request)?;
            label_in(&host, domain).map(str::to_owned)
        });
        match label.as_deref() {
            // The domain itself may be the server's own name.
            None | Some("") => self.by_headers(request),
            Some("api") => bring_below(request, CONTROL),
            Some("sandbox") => aim_by_headers(request),
            Some(label) => match by_host::port_in(label) {
                Some((port, sandbox)) if is_id(sandbox) => {
                    let aim = Aim { sandbox: sandbox.to_owned(), port };
                    bring_to(request, aim);
                }
                _ => set_path(request, by_host::NOWHERE),
            },
        }
    }

    fn by_headers<B>(&self, request: &mut Request<B>) {
        let (headers, path) = (request.headers(), request.uri().path());
        let is_below = path.strip_prefix(SANDBOXES).is_some_and(|rest| rest.starts_with('/'));
        if is_below || headers.contains_key(SANDBOX) || headers.contains_key(PORT) {
            aim_by_headers(request);
        }
    }
}

fn aim_by_headers<B>(request: &mut Request<B>) {
    match aim_in(request.headers()) {
        Some(aim) => bring_to(request, aim),
        // There it is said what is missing.
        None => bring_below(request, SANDBOXES),
    }
}

/// Both headers, each once.
fn aim_in(headers: &HeaderMap) -> Option<Aim> {
    let one = |name: &HeaderName| {
        let mut values = headers.get_all(name).iter();
        values.next().filter(|_| values.next().is_none())?.to_str().ok()
    };
    let (sandbox, port) = (one(&SANDBOX)?, one(&PORT)?);
    is_id(sandbox).then_some(())?;
    Some(Aim { sandbox: sandbox.to_owned(), port: by_host::port_of(port)? })
}

fn is_id(text: &str) -> bool {
    (1..=MAX_ID).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

fn bring_to<B>(request: &mut Request<B>, aim: Aim) {
    let folder = match aim.port {
        AGENT_PORT => AGENT,
        INTERPRETER_PORT => INTERPRETER,
        _ => PORTS,
    };
    let whole = request.uri().path_and_query().map_or("/", PathAndQuery::as_str);
    let rest = whole.strip_prefix(SANDBOXES).filter(|rest| rest.starts_with('/')).unwrap_or(whole);
    let slash = if rest.starts_with('/') { "" } else { "/" };
    let path = format!("{folder}{slash}{rest}");
    set_path(request, &path);
    request.extensions_mut().insert(aim);
}

fn bring_below<B>(request: &mut Request<B>, folder: &str) {
    let whole = request.uri().path_and_query().map_or("/", PathAndQuery::as_str);
    if whole.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/')) {
        return;
    }
    let slash = if whole.starts_with('/') { "" } else { "/" };
    let path = format!("{folder}{slash}{whole}");
    set_path(request, &path);
}

fn set_path<B>(request: &mut Request<B>, path: &str) {
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query =
        PathAndQuery::try_from(path).ok().or_else(|| Some(PathAndQuery::from_static(by_host::NOWHERE)));
    *request.uri_mut() = Uri::from_parts(parts).unwrap_or_else(|_| Uri::from_static(by_host::NOWHERE));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn brought(way: &Way, host: &str, target: &str, headers: &[(&str, &str)]) -> (String, Option<(String, u16)>) {
        let mut request = Request::builder().uri(target).header("host", host);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = request.body(()).unwrap();
        way.bring_in(&mut request);
        let aim = request.extensions().get::<Aim>().cloned();
        let aim = aim.map(|Aim { sandbox, port }| (sandbox, port));
        (request.uri().path_and_query().unwrap().to_string(), aim)
    }

    fn by_headers(target: &str, headers: &[(&str, &str)]) -> (String, Option<(String, u16)>) {
        brought(&Way::default(), "127.0.0.1:8080", target, headers)
    }

    #[test]
    fn headers_name_a_sandbox_and_a_port_wherever_the_request_goes() {
        let to = |port: &'static str| [("E2b-Sandbox-Id", "ses1"), ("E2b-Sandbox-Port", port)];
        let aim = |port| Some(("ses1".to_owned(), port));
        assert_eq!(by_headers("/health", &to("49983")), ("/e2b/envd/health".to_owned(), aim(49983)));
        assert_eq!(by_headers("/e2b/box/files?path=a%20b", &to("49983")).0, "/e2b/envd/files?path=a%20b");
        assert_eq!(by_headers("/execute", &to("49999")), ("/e2b/interpreter/execute".to_owned(), aim(49999)));
        assert_eq!(by_headers("/v1/sessions", &to("8000")), ("/e2b/ports/v1/sessions".to_owned(), aim(8000)));
        assert_eq!(by_headers("http://h", &to("8000")).0, "/e2b/ports/");
    }

    #[test]
    fn requests_without_headers_are_not_touched() {
        for path in [
            "/health",
            "/livez",
            "/v1/sessions",
            "/files?signature=x",
            "/v2/sandboxes",
            "/e2b/api/sandboxes",
            "/e2b/boxes",
        ] {
            assert_eq!(by_headers(path, &[]), (path.to_owned(), None));
        }
    }

    #[test]
    fn half_an_aim_is_none() {
        let (id, port) = (("E2b-Sandbox-Id", "ses1"), ("E2b-Sandbox-Port", "49983"));
        let cases: [&[(&str, &str)]; 9] = [
            &[id],
            &[port],
            &[id, id, port],
            &[id, port, port],
            &[id, ("E2b-Sandbox-Port", "0")],
            &[id, ("E2b-Sandbox-Port", "65536")],
            &[id, ("E2b-Sandbox-Port", "+80")],
            &[("E2b-Sandbox-Id", ""), port],
            &[("E2b-Sandbox-Id", "../x"), port],
        ];
        for headers in cases {
            assert_eq!(by_headers("/health", headers), ("/e2b/box/health".to_owned(), None), "{headers:?}");
        }
        assert_eq!(by_headers("/e2b/box/health", &[]), ("/e2b/box/health".to_owned(), None));
    }

    #[test]
    fn hosts_of_the_domain_are_the_api_and_ports_of_sandboxes() {
        let way = Way { domain: Some(Arc::from("sbx.example")) };
        let at = |host: &str, target: &str| brought(&way, host, target, &[]);
        assert_eq!(at("api.sbx.example", "/v2/sandboxes?x=1"), ("/e2b/api/v2/sandboxes?x=1".to_owned(), None));
        let aim = |port| Some(("ses1".to_owned(), port));
        assert_eq!(at("49983-ses1.sbx.example", "/health"), ("/e2b/envd/health".to_owned(), aim(49983)));
        assert_eq!(at("49999-SES1.sbx.example:8443", "/execute"), ("/e2b/interpreter/execute".to_owned(), aim(49999)));
        assert_eq!(at("3000-ses1.sbx.example", "/v1/sessions"), ("/e2b/ports/v1/sessions".to_owned(), aim(3000)));
        let nowhere = (by_host::NOWHERE.to_owned(), None);
        for host in ["x.sbx.example", "a.3000-ses1.sbx.example", "03000-ses1.sbx.example", "3000-s_s.sbx.example"] {
            assert_eq!(at(host, "/v1/sessions"), nowhere, "{host}");
        }
        for host in ["sbx.example", "xsbx.example", "localhost"] {
            assert_eq!(at(host, "/v1/sessions"), ("/v1/sessions".to_owned(), None), "{host}");
        }
        let headers = [("E2b-Sandbox-Id", "ses2"), ("E2b-Sandbox-Port", "49983")];
        assert_eq!(brought(&way, "sandbox.sbx.example", "/health", &headers).0, "/e2b/envd/health");
        // The host is what counts where it says which: nobody crosses over by a header.
        let crossed = brought(&way, "3000-ses1.sbx.example", "/", &headers);
        assert_eq!(crossed, ("/e2b/ports/".to_owned(), aim(3000)));
    }
}
