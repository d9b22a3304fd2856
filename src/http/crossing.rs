//! Which headers cross between a caller and a server that code in a session runs. Changes headers; sends nothing.
//!
//! Neither side may say anything to the other's neighbours: what is of one hop stays there, the caller's key never reaches the code, and the code's answer says
//! nothing on behalf of this server's origin. A redirection leads to the same port or nowhere: a program that follows one sends its key along.

use std::net::IpAddr;

use axum::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use axum::http::{StatusCode, Uri};

/// What is of one hop (RFC 9110, section 7.6.1), with what older programs say.
const OF_ONE_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// What a caller says of where it comes from, which is for this server to say, or to this server alone.
const NOT_FOR_CODE: [&str; 13] = [
    "authorization",
    "x-api-key",
    "content-length",
    "expect",
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-prefix",
    "x-forwarded-proto",
    "x-forwarded-server",
    "x-real-ip",
];

/// What an answer would say to browsers for the whole of an origin, or for its transport.
const OF_THE_ORIGIN: [&str; 12] = [
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "access-control-allow-private-network",
    "access-control-expose-headers",
    "access-control-max-age",
    "clear-site-data",
    "content-security-policy",
    "content-security-policy-report-only",
    "service-worker-allowed",
    "set-cookie",
];

/// The same, whatever host it is asked under.
const OF_THE_DOMAIN: [&str; 8] = [
    "alt-svc",
    "expect-ct",
    "nel",
    "public-key-pins",
    "refresh",
    "report-to",
    "reporting-endpoints",
    "strict-transport-security",
];

/// Where a port is for its callers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// What stands before its own paths, without a slash at its end; empty on a host of its own.
    pub(super) prefix: String,
    /// The host that it was asked under.
    pub(super) host: Option<HeaderValue>,
    /// Whether callers speak TLS, as far as is known.
    pub(super) is_tls: bool,
    /// Who asks.
    pub(super) caller: Option<IpAddr>,
    /// The port.
    pub(super) port: u16,
}

impl Place {
    /// Whether it has an origin of its own.
    pub(super) fn is_own_origin(&self) -> bool {
        self.prefix.is_empty()
    }

    /// A caller's headers as the code gets them. Says whether they ask for a WebSocket.
    pub(super) fn inwards(&self, headers: &mut HeaderMap) -> bool {
        let is_websocket = asks_for_websocket(headers);
        remove_hop(headers);
        NOT_FOR_CODE.iter().for_each(|name| drop(headers.remove(*name)));
        let origin = if self.is_own_origin() { self.host.clone() } else { None };
        if !self.is_own_origin() {
            // Cookies of the API's host are not this port's.
            headers.remove(header::COOKIE);
        }
        let mut set = |name: &'static str, value: Option<HeaderValue>| {
            if let Some(value) = value {
                headers.insert(HeaderName::from_static(name), value);
            }
        };
        let local = HeaderValue::from_str(&format!("localhost:{}", self.port)).ok();
        set("host", origin.or(local));
        set("x-forwarded-host", self.host.clone());
        set("x-forwarded-proto", Some(HeaderValue::from_static(if self.is_tls { "https" } else { "http" })));
        set("x-forwarded-for", self.caller.and_then(|caller| HeaderValue::from_str(&caller.to_string()).ok()));
        if !self.is_own_origin() {
            set("x-forwarded-prefix", HeaderValue::from_str(&self.prefix).ok());
        }
        match is_websocket {
            true => set_upgrade(headers),
            // One request a connection: the next one has its own.
            false => drop(headers.insert(header::CONNECTION, HeaderValue::from_static("close"))),
        }
        is_websocket
    }

    /// The code's headers as its caller gets them. `asked` is the path that the code was asked for.
    pub(super) fn outwards(&self, status: StatusCode, headers: &mut HeaderMap, asked: &str) {
        // A length beside another framing is nobody's word.
        if headers.contains_key(header::TRANSFER_ENCODING) {
            headers.remove(header::CONTENT_LENGTH);
        }
        remove_hop(headers);
        OF_THE_DOMAIN.iter().for_each(|name| drop(headers.remove(*name)));
        if status == StatusCode::SWITCHING_PROTOCOLS {
            set_upgrade(headers);
        }
        let location = headers.remove(header::LOCATION);
        if let Some(location) = location.and_then(|location| self.location(location.to_str().ok()?, asked)) {
            headers.insert(header::LOCATION, location);
        }
        if self.is_own_origin() {
            keep_to_host(headers);
            return;
        }
        OF_THE_ORIGIN.iter().for_each(|name| drop(headers.remove(*name)));
        // A page that is read here runs nothing, and is of no origin.
        headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox"));
    }

    /// Where a redirection leads, if that is within the port.
    fn location(&self, location: &str, asked: &str) -> Option<HeaderValue> {
        // Browsers and programs read backslashes and control characters each in their own way.
        if location.bytes().any(|b| b == b'\\' || b.is_ascii_control() || b == b' ') {
            return None;
        }
        let location = location.split('#').next().unwrap_or_default();
        let path = match location.parse::<Uri>() {
            Ok(uri) if uri.scheme().is_some() => {
                let authority = uri.authority()?.as_str();
                if !["http", "https"].contains(&uri.scheme_str()?) || !self.is_own(authority) {
                    return None;
                }
                uri.path_and_query().map_or("/", |path| path.as_str()).to_owned()
            }
            _ if location.starts_with("//") => return None,
            _ if location.starts_with('/') => location.to_owned(),
            _ if has_scheme(location) => return None,
            _ if location.starts_with('?') => format!("{asked}{location}"),
            _ => {
                let folder = asked.rsplit_once('/').map_or("", |(folder, _)| folder);
                format!("{folder}/{location}")
            }
        };
        HeaderValue::from_str(&format!("{}{}", self.prefix, within(&path))).ok()
    }

    fn is_own(&self, authority: &str) -> bool {
        let asked = if self.is_own_origin() { self.host.as_ref().and_then(|host| host.to_str().ok()) } else { None };
        let port = self.port;
        let local = ["localhost", "127.0.0.1", "[::1]"].map(|host| format!("{host}:{port}"));
        asked.is_some_and(|asked| asked.eq_ignore_ascii_case(authority)) || local.iter().any(|own| own == authority)
    }
}

/// Whether text begins with a scheme, such as `javascript:`.
fn has_scheme(text: &str) -> bool {
    let first = text.split(['/', '?']).next().unwrap_or_default();
    first.contains(':')
}

/// A path whose dots are followed, so that none is left that leads out of what stands before it. Escaped dots count too, since browsers follow them.
fn within(path: &str) -> String {
    let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
    let mut parts: Vec<&str> = Vec::new();
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        match segment.to_ascii_lowercase().replace("%2e", ".").as_str() {
            "." | ".." => {
                if segment.len() != 1 && !segment.eq_ignore_ascii_case("%2e") {
                    parts.pop();
                }
                if is_last {
                    parts.push("");
                }
            }
            _ => parts.push(segment),
        }
    }
    let path = format!("/{}", parts.join("/"));
    // Two slashes at the beginning would name a host.
    let path = format!("/{}", path.trim_start_matches('/'));
    query.map_or(path.clone(), |query| format!("{path}?{query}"))
}

/// A cookie is of the host that set it, and of no others of its domain.
fn keep_to_host(headers: &mut HeaderMap) {
    let cookies: Vec<HeaderValue> = headers.get_all(header::SET_COOKIE).iter().cloned().collect();
    headers.remove(header::SET_COOKIE);
    for cookie in cookies {
        let Ok(text) = cookie.to_str() else { continue };
        let of_domain =
            |part: &str| part.split('=').next().is_some_and(|name| name.trim().eq_ignore_ascii_case("domain"));
        if !text.split(';').skip(1).any(of_domain) {
            headers.append(header::SET_COOKIE, cookie);
        }
    }
}

/// Removes what is of one hop, and what that says is too.
fn remove_hop(headers: &mut HeaderMap) {
    let named: Vec<String> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    named.iter().for_each(|name| drop(headers.remove(name.as_str())));
    OF_ONE_HOP.iter().for_each(|name| drop(headers.remove(*name)));
}

fn asks_for_websocket(headers: &HeaderMap) -> bool {
    let upgrades = headers.get_all(header::UPGRADE).iter().filter_map(|value| value.to_str().ok());
    let of_connection = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let asks = |part: &str| part.trim().eq_ignore_ascii_case("upgrade");
    let mut of_connection = of_connection.flat_map(|value| value.split(','));
    of_connection.any(asks)
        && upgrades.into_iter().all(|value| value.eq_ignore_ascii_case("websocket"))
        && headers.contains_key(header::UPGRADE)
}

/// The one other protocol that is passed on.
fn set_upgrade(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(prefix: &str) -> Place {
        Place {
            prefix: prefix.to_owned(),
            host: Some(HeaderValue::from_static("api.example")),
            is_tls: true,
            caller: Some("192.0.2.1".parse().unwrap()),
            port: 8000,
        }
    }

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn neither_key_nor_hop_nor_a_callers_own_account_reaches_the_code() {
        let mut given = headers(&[
            ("authorization", "Bearer k"),
            ("x-api-key", "k"),
            ("cookie", "a=b"),
            ("connection", "x-secret, close"),
            ("x-secret", "1"),
            ("te", "trailers"),
            ("upgrade", "h2c"),
            ("x-forwarded-for", "127.0.0.1"),
            ("forwarded", "for=127.0.0.1"),
            ("x-real-ip", "127.0.0.1"),
            ("content-length", "3"),
            ("expect", "100-continue"),
            ("accept", "text/html"),
        ]);
        assert!(!place("/p").inwards(&mut given));
        let expected = headers(&[
            ("accept", "text/html"),
            ("connection", "close"),
            ("host", "localhost:8000"),
            ("x-forwarded-host", "api.example"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-prefix", "/p"),
        ]);
        assert_eq!(given, expected);

        let mut own = headers(&[("cookie", "a=b"), ("connection", "keep-alive, Upgrade"), ("upgrade", "WebSocket")]);
        assert!(place("").inwards(&mut own));
        assert_eq!((own["cookie"].as_bytes(), own["host"].as_bytes()), (&b"a=b"[..], &b"api.example"[..]));
        assert_eq!((own["connection"].as_bytes(), own["upgrade"].as_bytes()), (&b"upgrade"[..], &b"websocket"[..]));
    }

    #[test]
    fn an_answer_says_nothing_for_the_origin() {
        let of_code = || {
            let mut all = headers(&[
                ("access-control-allow-origin", "*"),
                ("strict-transport-security", "max-age=1"),
                ("clear-site-data", "*"),
                ("content-security-policy", "script-src *"),
                ("transfer-encoding", "chunked"),
                ("content-length", "5"),
                ("x-of-code", "1"),
            ]);
            for cookie in ["a=b; Path=/", "c=d; Domain=ports.example; Path=/", "e=f; domain =x"] {
                all.append("set-cookie", HeaderValue::from_static(cookie));
            }
            all
        };
        let mut by_path = of_code();
        place("/p").outwards(StatusCode::OK, &mut by_path, "/");
        assert_eq!(by_path, headers(&[("x-of-code", "1"), ("content-security-policy", "sandbox")]));
        let mut by_host = of_code();
        place("").outwards(StatusCode::OK, &mut by_host, "/");
        assert_eq!(by_host.get_all("set-cookie").iter().collect::<Vec<_>>(), ["a=b; Path=/"]);
        assert_eq!(by_host["content-security-policy"], "script-src *");
        assert!(!by_host.contains_key("strict-transport-security") && !by_host.contains_key("content-length"));
    }

    #[test]
    fn a_redirection_stays_within_the_port() {
        let led = |prefix: &str, location: &str| {
            let value = place(prefix).location(location, "/a/b");
            value.map(|value| value.to_str().unwrap().to_owned())
        };
        for (location, expected) in [
            ("/x?y=1#z", Some("/p/x?y=1")),
            ("x", Some("/p/a/x")),
            ("?q", Some("/p/a/b?q")),
            ("../../../../v1/sessions", Some("/p/v1/sessions")),
            ("/../../v1", Some("/p/v1")),
            ("/%2e%2E/%2e./v1", Some("/p/v1")),
            ("/a/..", Some("/p/")),
            ("/x/./y", Some("/p/x/y")),
            ("http://localhost:8000/x", Some("/p/x")),
            ("http://127.0.0.1:8000", Some("/p/")),
            ("http://localhost:8001/x", None),
            ("https://api.example/v1/sessions", None),
            ("https://elsewhere.example/", None),
            ("//elsewhere.example/", None),
            ("/\\elsewhere.example/", None),
            ("\\\\elsewhere.example/", None),
            ("javascript:alert(1)", None),
            ("ftp://localhost:8000/", None),
        ] {
            assert_eq!(led("/p", location).as_deref(), expected, "{location}");
        }
        assert_eq!(led("", "https://api.example/x").as_deref(), Some("/x"));
        assert_eq!(led("", "/..//elsewhere.example/").as_deref(), Some("/elsewhere.example/"));
        assert_eq!(led("", "https://elsewhere.example/"), None);
    }
}
