//! A server that an operator has named, asked on behalf of code that does not know the secret which is shown to it: plain HTTP/1.1 from the cell, TLS to the server, the
//! header added between. What the code sends is written anew; what comes back is passed on without the secret.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::reach::{NotReached, Reached};
use super::veil::{Secrets, Veiled};
use super::{Egress, Refusal, Stream};
use crate::domain::egress::{Host, Upstream};
use crate::task;

/// Bytes between the cell's connection and what reads it here.
const BETWEEN: usize = 64 * 1024;
/// Longest head of a request, in bytes.
const MAX_HEAD: usize = 32 * 1024;
/// Largest file with a secret, in bytes.
const MAX_SECRET: u64 = 16 * 1024;
const LEADS_OUT: &str = "the path leads out of the upstream's";
/// Headers of a request or an answer.
const MAX_HEADERS: usize = 100;
/// What is between two hops only (RFC 9110, section 7.6.1), or says how long a body is, or how it is packed: that is said anew.
const NOT_PASSED_ON: [HeaderName; 13] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::HOST,
    header::EXPECT,
    header::ACCEPT_ENCODING,
    // Some servers take the path from there instead.
    HeaderName::from_static("x-original-url"),
    HeaderName::from_static("x-rewrite-url"),
];

type Body = Either<Full<Bytes>, Veiled>;

/// A server that is asked on behalf of a cell.
struct Asked {
    upstream: Upstream,
    header: HeaderName,
    value: HeaderValue,
    secrets: Arc<Secrets>,
    server: Mutex<SendRequest<Incoming>>,
}

impl Egress {
    /// Connects to an upstream, for a session of this tenant. What comes back for the cell takes HTTP/1.1 requests in the clear.
    pub(super) async fn reach_upstream(&self, tenant: &Arc<str>, upstream: &Upstream) -> Result<Reached, NotReached> {
        // Code knows it by this name, and by no other.
        let alias = || Host::Name(format!("{}.upstream", upstream.name));
        let told = || Refusal::Unreachable(alias(), 80);
        let (header, value) = secret_of(upstream).await.map_err(|error| {
            tracing::error!(upstream = upstream.name, file = %upstream.secret_file.display(), %error, "an upstream's secret can't be used");
            told()
        })?;
        let reached = self.reach(tenant, &Host::Name(upstream.host.clone()), upstream.port).await;
        let Reached { stream, address, .. } = reached.map_err(|not| NotReached {
            refusal: match not.refusal {
                Refusal::NotPublic(_, what) => Refusal::NotPublic(alias(), what),
                Refusal::Denied(_) => Refusal::Denied(alias()),
                _ => told(),
            },
            ..not
        })?;
        let server = tokio::time::timeout(self.0.settings.connect_timeout, self.speak(upstream, stream)).await;
        let server = server.map_err(io::Error::other).flatten().map_err(|error| {
            tracing::warn!(upstream = upstream.name, %error, "an upstream can't be asked");
            NotReached { refusal: told(), address }
        })?;
        let secrets = Arc::new(Secrets::of(value.as_bytes()));
        let asked = Asked { upstream: upstream.clone(), header, value, secrets, server: Mutex::new(server) };
        let (cell, here) = tokio::io::duplex(BETWEEN);
        let over = CancellationToken::new();
        let is_over = over.clone();
        // It ends with the cell's connection, even while it waits for the upstream.
        task::spawn("upstream", async move {
            tokio::select! {
                () = serve(Arc::new(asked), here) => {}
                () = is_over.cancelled() => {}
            }
        });
        Ok(Reached { stream: Box::new(cell), address, until: Some(over.drop_guard()) })
    }

    async fn speak(&self, upstream: &Upstream, stream: Box<dyn Stream>) -> io::Result<SendRequest<Incoming>> {
        let stream = self.0.trust.secure(&upstream.host, stream).await?;
        let mut client = hyper::client::conn::http1::Builder::new();
        client.max_headers(MAX_HEADERS);
        let (sender, connection) = client.handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        task::spawn("upstream connection", async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "an upstream's connection broke");
            }
        });
        Ok(sender)
    }
}

/// The header and its value, as the operator's file has it now.
async fn secret_of(upstream: &Upstream) -> io::Result<(HeaderName, HeaderValue)> {
    let file = upstream.secret_file.clone();
    let text = task::blocking(move || read_secret(&file)).await.unwrap_or_else(|| Err(io::Error::other("unread")))?;
    let header = upstream.header.parse().map_err(io::Error::other)?;
    let mut value = HeaderValue::from_str(text.trim()).map_err(io::Error::other)?;
    if value.is_empty() {
        return Err(io::Error::other("there is nothing in it"));
    }
    value.set_sensitive(true);
    Ok((header, value))
}

fn read_secret(file: &PathBuf) -> io::Result<String> {
    let about = std::fs::metadata(file)?;
    if about.permissions().mode() & 0o077 != 0 {
        return Err(io::Error::other("others may read it: `chmod 600` it"));
    }
    if about.len() > MAX_SECRET {
        return Err(io::Error::other(format!("it is longer than {MAX_SECRET} bytes")));
    }
    std::fs::read_to_string(file)
}

async fn serve(asked: Arc<Asked>, cell: tokio::io::DuplexStream) {
    let service = service_fn(move |request| {
        let asked = Arc::clone(&asked);
        async move { Ok::<_, Infallible>(asked.answer(request).await) }
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(cell), service);
    // Code that breaks its connection off need not be told.
    let _ = serving.await;
}

impl Asked {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let request = match self.rewrite(request) {
            Ok(request) => request,
            Err((status, reason)) => return said(status, reason),
        };
        let mut server = self.server.lock().await;
        let sent = async {
            server.ready().await?;
            server.send_request(request).await
        };
        match sent.await {
            Ok(response) => self.veil(response),
            Err(error) => {
                tracing::debug!(upstream = self.upstream.name, %error, "an upstream did not answer");
                said(StatusCode::BAD_GATEWAY, "the upstream broke the connection off before its answer")
            }
        }
    }

    /// The request as the server is to see it; nothing of it says where it goes but the path below the operator's.
    fn rewrite(&self, request: Request<Incoming>) -> Result<Request<Incoming>, (StatusCode, &'static str)> {
        let (mut head, body) = request.into_parts();
        if matches!(head.method, Method::CONNECT | Method::TRACE) {
            return Err((StatusCode::METHOD_NOT_ALLOWED, "an upstream is not asked with this method"));
        }
        let own = format!("{}.upstream", self.upstream.name);
        let is_own = |host: &str| {
            let host = host.strip_suffix(":80").unwrap_or(host);
            host.trim_end_matches('.').eq_ignore_ascii_case(&own)
        };
        let hosts: Vec<_> = head.headers.get_all(header::HOST).iter().map(|host| host.to_str().unwrap_or("")).collect();
        let target = head.uri.authority().map(|authority| authority.as_str());
        if hosts.len() > 1 || !hosts.iter().copied().chain(target).all(is_own) {
            return Err((StatusCode::BAD_REQUEST, "the request names another host than the upstream's"));
        }
        let asked = head.uri.path_and_query().map_or("/", |asked| asked.as_str());
        let wrong = if asked.starts_with('/') { wrong_with(head.uri.path()) } else { Some(LEADS_OUT) };
        if let Some(wrong) = wrong {
            return Err((StatusCode::BAD_REQUEST, wrong));
        }
        let path = format!("{}{asked}", self.upstream.path);
        head.uri = path.parse::<Uri>().map_err(|_| (StatusCode::BAD_REQUEST, "the path is none"))?;
        head.version = hyper::Version::HTTP_11;
        head.extensions = hyper::http::Extensions::new();
        pass_on(&mut head.headers);
        head.headers.remove(header::CONTENT_LENGTH);
        let host = match self.upstream.port {
            443 => self.upstream.host.clone(),
            port => format!("{}:{port}", self.upstream.host),
        };
        let host = HeaderValue::try_from(host).map_err(|_| (StatusCode::BAD_GATEWAY, "the upstream has no name"))?;
        head.headers.insert(header::HOST, host);
        // What is packed could hold the secret in a form that nobody here reads.
        head.headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        // Whatever the code has put there, and under a name that servers take for the same.
        let means_it = |name: &HeaderName| name.as_str().replace('_', "-") == self.header.as_str().replace('_', "-");
        let alike: Vec<_> = head.headers.keys().filter(|name| means_it(name)).cloned().collect();
        alike.iter().for_each(|name| drop(head.headers.remove(name)));
        head.headers.insert(self.header.clone(), self.value.clone());
        Ok(Request::from_parts(head, body))
    }

    fn veil(&self, response: Response<Incoming>) -> Response<Body> {
        let (mut head, body) = response.into_parts();
        pass_on(&mut head.headers);
        let shows = |value: &HeaderValue| self.secrets.are_in(value.as_bytes());
        let telling: Vec<_> =
            head.headers.iter().filter(|(_, value)| shows(value)).map(|(name, _)| name.clone()).collect();
        telling.iter().for_each(|name| drop(head.headers.remove(name)));
        head.version = hyper::Version::HTTP_11;
        head.extensions = hyper::http::Extensions::new();
        Response::from_parts(head, Either::Right(Veiled::new(body, Arc::clone(&self.secrets))))
    }
}

/// Why a path is not passed on, however it is written: a part of it leads up, or it has something that servers cut paths off at or leave out.
fn wrong_with(path: &str) -> Option<&'static str> {
    let mut decoded = path.as_bytes().to_vec();
    // What is decoded once more by somebody is to lead nowhere either.
    for _ in 0..3 {
        decoded = percent_decoded(&decoded);
    }
    let leads = |part: &[u8]| {
        // Some servers take parameters of a part off it, and some the spaces around it.
        let name = part.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
        matches!(name, b"." | b"..")
    };
    // What is no UTF-8 some read as what it is not: `%c0%ae` is a dot to them.
    let is_odd = std::str::from_utf8(&decoded).is_err() || decoded.iter().any(u8::is_ascii_control);
    if is_odd {
        return Some("a path has no control characters, and is UTF-8, escaped ones included");
    }
    decoded.split(|byte| matches!(byte, b'/' | b'\\')).any(leads).then_some(LEADS_OUT)
}

fn percent_decoded(path: &[u8]) -> Vec<u8> {
    let digit = |at: usize| path.get(at).and_then(|byte| char::from(*byte).to_digit(16));
    let (mut decoded, mut at) = (Vec::with_capacity(path.len()), 0);
    while let Some(&byte) = path.get(at) {
        let escaped = digit(at + 1).zip(digit(at + 2)).filter(|_| byte == b'%');
        let byte = escaped.map_or(byte, |(high, low)| (high * 16 + low) as u8);
        decoded.push(byte);
        at += if escaped.is_some() { 3 } else { 1 };
    }
    decoded
}

fn pass_on(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .filter(|name| *name != header::CONTENT_LENGTH)
        .collect();
    for name in NOT_PASSED_ON.iter().chain(&named) {
        headers.remove(name);
    }
}

fn said(status: StatusCode, reason: &'static str) -> Response<Body> {
    let mut response = Response::new(Either::Left(Full::from(format!("cellblock: {reason}\n"))));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_lead_up_are_seen_in_every_spelling() {
        for path in [
            "/..",
            "/../x",
            "/a/../../x",
            "/%2e%2e/x",
            "/%2E./x",
            "/a%2f..%2fx",
            "/a%5c..%5cx",
            "/%252e%252e/x",
            "/a\\..\\x",
            "/./x",
            "/..;/x",
            "/..%3b/x",
            "/..%3Bv=1/x",
            "/.%3b/x",
            "/..%253b/x",
            "/..%00/x",
            "/x%00",
            "/..%09/x",
            "/..%20/x",
            "/x%0d%0aHost:%20y",
            "/%c0%ae%c0%ae/x",
            "/a%ff/x",
        ] {
            assert!(wrong_with(path).is_some(), "{path}");
        }
        for path in [
            "/",
            "/v1/chat",
            "/a..b",
            "/...",
            "/a%2fb",
            "/.well-known/x",
            "/~x",
            "/a;b=1/c",
            "/a%3bb",
            "/gr%c3%bc%c3%9fe",
            "/a%20b",
            "/100%",
        ] {
            assert_eq!(wrong_with(path), None, "{path}");
        }
    }
}
