//! The inside half of the way out: an HTTP proxy on the container's loopback. It announces each connection and carries what the control plane opens; it decides nothing,
//! resolves nothing and dials nothing.
//!
//! `CONNECT host:port` becomes a byte stream. A plain request (`GET http://host/…`) becomes one request in origin form over a stream of its own, with the host of its
//! target as `Host` and without what is meant for a proxy only. What the control plane refuses is answered with its words.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use cellblock_wire::egress::{
    EXPIRES, EgressRefused, MAX_HOST, MAX_WAITING, NO_PROXY, NO_PROXY_VARIABLES, PROXY_PORT, PROXY_VARIABLES,
};
use cellblock_wire::link::Event;
use cellblock_wire::tunnel::{Outgoing, Tunnel, tunnel};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::ext::ReasonPhrase;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::http::uri::{Authority, Scheme};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::api::Refused;
use crate::events::Ring;

/// Connections of code to the proxy at once.
const MAX_CONNECTIONS: usize = 128;
/// The head of a request arrives within this time, and the next one on the same connection.
const HEAD_TIME: Duration = Duration::from_secs(20);
/// Longest head of a request, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// Longest head of a server's answer, in bytes.
const MAX_ANSWER_HEAD: usize = 64 * 1024;
/// Headers of a request.
const MAX_HEADERS: usize = 100;
/// A listener that fails is asked again after this time.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// The answer to one connection too many.
const FULL: &[u8] = b"HTTP/1.1 503 Too many connections to the proxy\r\ncontent-type: text/plain\r\ncontent-length: 50\r\nconnection: close\r\n\r\ncellblock: too many connections to the proxy wait\n";
/// What is for the next hop only, beside what `Connection` names (RFC 9110, section 7.6.1). Bodies are framed anew.
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

type Body = Either<Full<Bytes>, Incoming>;

/// What became of an announced connection.
enum Decided {
    Open(Box<Tunnel<Incoming>>),
    Refused(EgressRefused),
}

#[derive(Default)]
struct Table {
    last: u64,
    waiting: HashMap<u64, oneshot::Sender<Decided>>,
}

/// The way out. Clones are the same.
#[derive(Clone)]
pub struct Egress {
    ring: Ring,
    table: Arc<Mutex<Table>>,
    listens: Arc<AtomicBool>,
}

/// An announcement whose number is forgotten when nobody waits for the decision any more.
struct Waiting<'a> {
    egress: &'a Egress,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.egress.lock().waiting.remove(&self.id);
    }
}

impl Egress {
    /// Nothing is offered yet.
    #[must_use]
    pub fn new(ring: Ring) -> Self {
        Self { ring, table: Arc::default(), listens: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens, if it does not yet, and gives an environment back with what names the proxy. What is in it already stays.
    #[must_use]
    pub fn offer(&self, mut env: BTreeMap<String, String>) -> BTreeMap<String, String> {
        // Only a container's loopback is the guest's to listen on.
        if rustix::process::getpid().is_init() && !self.listens.swap(true, Ordering::Relaxed) {
            tokio::spawn(self.clone().listen());
        }
        let proxy = format!("http://127.0.0.1:{PROXY_PORT}");
        let named = PROXY_VARIABLES.map(|name| (name, proxy.as_str()));
        let direct = NO_PROXY_VARIABLES.map(|name| (name, NO_PROXY));
        for (name, value) in named.into_iter().chain(direct) {
            env.entry(name.to_owned()).or_insert_with(|| value.to_owned());
        }
        env
    }

    /// The control plane has opened a connection: what it sends is in `body`, and what is to be sent to it comes back.
    ///
    /// # Errors
    /// When nobody waits for it any more.
    pub fn open(&self, id: u64, body: Incoming) -> Result<Outgoing, Refused> {
        let (tunnel, outgoing) = tunnel(body);
        self.decide(id, Decided::Open(Box::new(tunnel))).map(|()| outgoing)
    }

    /// The control plane refuses a connection.
    ///
    /// # Errors
    /// When nobody waits for it any more.
    pub fn refuse(&self, id: u64, refused: EgressRefused) -> Result<(), Refused> {
        self.decide(id, Decided::Refused(refused))
    }

    fn decide(&self, id: u64, decided: Decided) -> Result<(), Refused> {
        let waiting = self.lock().waiting.remove(&id);
        let told = waiting.ok_or(()).and_then(|waiting| waiting.send(decided).map_err(|_| ()));
        told.map_err(|()| Refused::not_found("connection that waits"))
    }

    /// Announces a connection and waits for what becomes of it.
    async fn ask(&self, host: &str, port: u16) -> Decided {
        if host.len() > MAX_HOST {
            return refused(403, "the name of the host is longer than any name can be");
        }
        let (tell, told) = oneshot::channel();
        let id = {
            let mut table = self.lock();
            if table.waiting.len() >= MAX_WAITING {
                return refused(503, "too many connections wait for their decision");
            }
            table.last += 1;
            let id = table.last;
            table.waiting.insert(id, tell);
            id
        };
        let _waiting = Waiting { egress: self, id };
        let decided = async {
            self.ring.room().await;
            self.ring.push("", Event::Egress { id, host: host.to_owned(), port }, Vec::new());
            told.await.ok()
        };
        match tokio::time::timeout(EXPIRES, decided).await {
            Ok(Some(decided)) => decided,
            _ => refused(504, "nobody has decided about this connection in time"),
        }
    }

    async fn listen(self) {
        let listener = loop {
            match TcpListener::bind((Ipv4Addr::LOCALHOST, PROXY_PORT)).await {
                Ok(listener) => break listener,
                // Code may have taken the port, which costs nobody but itself.
                Err(_) => tokio::time::sleep(HEAD_TIME).await,
            }
        };
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            };
            match Arc::clone(&places).try_acquire_owned() {
                Ok(place) => drop(tokio::spawn(self.clone().serve(stream, Arc::new(place)))),
                // What does not fit into its socket's buffer at once it does without.
                Err(_) => drop(stream.try_write(FULL)),
            }
        }
    }

    /// One connection of code's. Its place is given back once all that it has begun is over.
    async fn serve(self, stream: TcpStream, place: Arc<OwnedSemaphorePermit>) {
        // Each write is whole.
        let _ = stream.set_nodelay(true);
        let service = service_fn(|request| {
            let (egress, place) = (self.clone(), Arc::clone(&place));
            async move { Ok::<_, std::convert::Infallible>(egress.answer(request, place).await) }
        });
        let serving = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIME)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_HEADERS)
            .auto_date_header(false)
            .half_close(true)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        // Code that breaks its own connection need not be told.
        let _ = serving.await;
    }

    async fn answer(&self, request: Request<Incoming>, place: Arc<OwnedSemaphorePermit>) -> Response<Body> {
        let Target { authority, port } = match Target::of(&request) {
            Ok(target) => target,
            Err(reason) => return text(&EgressRefused { status: 400, reason: reason.to_owned() }),
        };
        let tunnel = match self.ask(authority.host(), port).await {
            Decided::Open(tunnel) => *tunnel,
            Decided::Refused(refused) => return text(&refused),
        };
        if request.method() == Method::CONNECT {
            tokio::spawn(carry(request, tunnel, place));
            return Response::new(Either::Left(Full::default()));
        }
        forward(request, &authority, tunnel).await.unwrap_or_else(|error| {
            let reason = format!("{authority} broke the connection off before its answer: {error}");
            text(&EgressRefused { status: 502, reason })
        })
    }
}

fn refused(status: u16, reason: &str) -> Decided {
    Decided::Refused(EgressRefused { status, reason: reason.to_owned() })
}

/// What a request asks to be connected to.
struct Target {
    authority: Authority,
    port: u16,
}

impl Target {
    fn of(request: &Request<Incoming>) -> Result<Self, &'static str> {
        let uri = request.uri();
        let is_connect = request.method() == Method::CONNECT;
        let authority = uri.authority().ok_or(
            "this is the proxy of the session's way out: it takes CONNECT host:port, and requests whose target begins with http://",
        )?;
        if authority.as_str().contains('@') {
            return Err("a name and password before the host are not allowed");
        }
        let port = match (authority.port(), is_connect) {
            (Some(port), _) => port.as_u16(),
            (None, true) => return Err("CONNECT needs a port"),
            (None, false) if authority.as_str().ends_with(':') => return Err("there is no port after the colon"),
            (None, false) => 80,
        };
        match (is_connect, uri.scheme()) {
            (true, None) => {}
            (false, Some(scheme)) if *scheme == Scheme::HTTP => {}
            _ => return Err("only http:// is asked for as a whole; for https:// use CONNECT host:443"),
        }
        Ok(Self { authority: authority.clone(), port })
    }
}

/// Carries a byte stream both ways until one side breaks it off or both have ended.
async fn carry(request: Request<Incoming>, mut tunnel: Tunnel<Incoming>, place: Arc<OwnedSemaphorePermit>) {
    if let Ok(upgraded) = hyper::upgrade::on(request).await {
        let mut upgraded = TokioIo::new(upgraded);
        if tokio::io::copy_bidirectional(&mut upgraded, &mut tunnel).await.is_ok() {
            // Both have ended, so there is nothing to be lost.
            let _ = tunnel.shutdown().await;
        }
    }
    drop(place);
}

/// Sends a plain request over a stream that is for it alone, and gives the answer as it comes.
async fn forward(
    request: Request<Incoming>,
    authority: &Authority,
    tunnel: Tunnel<Incoming>,
) -> Result<Response<Body>, hyper::Error> {
    let (mut head, body) = request.into_parts();
    let path = head.uri.path_and_query().cloned().map(Uri::from);
    head.uri = path.unwrap_or_else(|| Uri::from_static("/"));
    head.extensions = hyper::http::Extensions::new();
    keep_for_the_end(&mut head.headers);
    // The target says who is asked, whatever the header says (RFC 9112, section 3.2.2).
    if let Ok(host) = HeaderValue::from_str(authority.as_str()) {
        head.headers.insert(header::HOST, host);
    }
    head.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    head.version = hyper::Version::HTTP_11;
    let mut client = hyper::client::conn::http1::Builder::new();
    client.max_buf_size(MAX_ANSWER_HEAD).max_headers(MAX_HEADERS);
    let (mut sender, connection) = client.handshake(TokioIo::new(tunnel)).await?;
    // It ends with the answer, or with whoever waits for it.
    tokio::spawn(connection);
    let (mut head, body) = sender.send_request(Request::from_parts(head, body)).await?.into_parts();
    keep_for_the_end(&mut head.headers);
    head.version = hyper::Version::HTTP_11;
    Ok(Response::from_parts(head, Either::Right(body)))
}

/// Removes what is for one hop only.
fn keep_for_the_end(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // How long a body is does not depend on the hop.
        .filter(|name| *name != header::CONTENT_LENGTH && *name != header::HOST)
        .collect();
    for name in HOP_BY_HOP.iter().chain(&named) {
        headers.remove(name);
    }
}

/// An answer in words, in the status line too: for CONNECT that is all that many clients show.
fn text(refused: &EgressRefused) -> Response<Body> {
    let plain: String =
        refused.reason.chars().map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' }).collect();
    let body = Full::from(format!("cellblock: {plain}\n"));
    let mut response = Response::new(Either::Left(body));
    *response.status_mut() = StatusCode::from_u16(refused.status).unwrap_or(StatusCode::FORBIDDEN);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    let short: String = plain.chars().take(200).collect();
    if let Ok(phrase) = ReasonPhrase::try_from(short) {
        response.extensions_mut().insert(phrase);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_for_one_hop_goes_no_further() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Secret"),
            ("x-secret", "1"),
            ("proxy-authorization", "Basic eA=="),
            ("proxy-connection", "keep-alive"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("content-length", "3"),
            ("accept", "*/*"),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        keep_for_the_end(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["accept", "content-length"]);
    }

    #[test]
    fn the_environment_that_was_asked_for_stays() {
        let egress = Egress::new(Ring::default());
        let env = egress.offer([("HTTP_PROXY".to_owned(), "mine".to_owned())].into());
        assert_eq!(env["HTTP_PROXY"], "mine");
        assert_eq!(env["https_proxy"], "http://127.0.0.1:3128");
        assert_eq!(env["NO_PROXY"], NO_PROXY);
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_is_bounded_and_forgotten_in_time() {
        let egress = Egress::new(Ring::default());
        let asked: Vec<_> = (0..MAX_WAITING)
            .map(|_| {
                let egress = egress.clone();
                tokio::spawn(async move {
                    matches!(egress.ask("example.org", 443).await, Decided::Refused(r) if r.status == 504)
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(matches!(egress.ask("example.org", 443).await, Decided::Refused(r) if r.status == 503));
        for asked in asked {
            assert!(asked.await.unwrap());
        }
        assert!(egress.lock().waiting.is_empty());
        let refusal = EgressRefused { status: 403, reason: String::new() };
        assert!(egress.refuse(1, refusal).is_err(), "nobody waits for it any more");
    }

    #[test]
    fn the_answer_to_one_too_many_is_as_long_as_it_says() {
        let text = std::str::from_utf8(FULL).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())));
    }
}
