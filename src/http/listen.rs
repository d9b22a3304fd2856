//! Connections: how many there may be, how long each may take for what it says and hears, and their orderly end. What is said on them is the router's business.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::http::{Extensions, HeaderValue, Request, Version, header};
use axum::response::Response;
use futures_util::TryFutureExt;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::by_host::{self, ByHost};
use super::door::host_of;
use super::e2b::way::Way;
use super::problem::{self, Problem};
use super::remote::Proxies;
use super::tls::Tls;
use crate::domain::ids::RequestId;
use crate::places::{Full, Place, Places};
use crate::session;
use crate::task;

mod unread;

use unread::Streams;

/// Lines in the head of a request.
const MAX_HEADERS: usize = 100;
/// Requests at a time on one connection of HTTP/2.
const MAX_STREAMS: u32 = 200;
/// Bytes that wait on one stream of it for room. With the number of streams it bounds what a connection holds.
const MAX_SEND_BUFFER: usize = 64 * 1024;
/// Windows of HTTP/2, in bytes: what a caller may send before it is taken, on one stream and on all of a connection. Files come at their size in each round trip;
/// what is not taken is kept, so a connection's is no larger.
const STREAM_WINDOW: u32 = 4 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
/// Bytes of one frame: fewer turns for files.
const MAX_FRAME: u32 = 256 * 1024;
/// Streams that a caller has given up before they were looked at; more end the connection. So many after which it is taken for an attack.
const MAX_RESETS: usize = 20;
/// Streams that were ended here for what came on them; more end the connection.
const MAX_STREAM_ERRORS: usize = 100;
/// Connections that are told at the same time that there is no place for them; more are closed in silence.
const REFUSED_AT_ONCE: usize = 32;
/// Each of them has this long to hear it.
const REFUSING: Duration = Duration::from_secs(2);
/// After an accept that failed for want of something, such as files, none is tried for this long.
const WITHOUT_ACCEPTING: Duration = Duration::from_millis(200);

/// What connections may take.
#[derive(Debug, Clone)]
pub struct Connections {
    /// At the same time, in all.
    pub most: usize,
    /// At the same time from one address, unless it is a trusted proxy's.
    pub most_of_one: usize,
    /// The head of a request arrives within this time, the first one after the connection is there, others after the last answer; so does a TLS handshake.
    pub head_time: Duration,
    /// Bytes of a request's head.
    pub head_bytes: usize,
    /// Some of what is sent is taken within this time.
    pub write_time: Duration,
    /// The domain whose hosts are ports of sessions.
    pub ports_domain: Option<Arc<str>>,
    /// What requests of E2B's clients are told apart by, where they are served.
    pub e2b: Option<Way>,
    /// Only trusted proxies, and whoever is on this machine, may speak without TLS.
    pub plain_from_proxies_only: bool,
    /// The certificate, where TLS is spoken.
    pub tls: Option<Arc<Tls>>,
}

impl Connections {
    /// The same where anybody may speak without TLS.
    #[must_use]
    pub fn plain(&self) -> Self {
        Self { plain_from_proxies_only: false, tls: None, ..self.clone() }
    }
}

/// Takes connections until it is told to stop, and waits until what is under way on them has ended.
pub(super) async fn run(
    listener: TcpListener,
    router: Router,
    proxies: Proxies,
    connections: Connections,
    stop: CancellationToken,
) {
    if let Some(tls) = &connections.tls {
        task::spawn("certificate", Arc::clone(tls).watch(stop.clone()));
    }
    let host = Arc::new(Host {
        builder: builder(&connections),
        places: Places::new(connections.most),
        refusing: Semaphore::new(REFUSED_AT_ONCE),
        router,
        proxies,
        connections,
        stop: stop.clone(),
    });
    let open = TaskTracker::new();
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        match accepted {
            Ok((stream, peer)) => {
                // Here, so that places are given in the order of arrival.
                let place = host.admit(peer.ip());
                task::spawn("connection", open.track_future(Arc::clone(&host).receive(stream, peer, place)));
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "no connection can be taken for a moment; are there too few open files (ulimit -n)?");
                // Told to stop meanwhile, the next turn notices.
                let _ = stop.run_until_cancelled(tokio::time::sleep(WITHOUT_ACCEPTING)).await;
            }
        }
    }
    drop(listener);
    open.close();
    open.wait().await;
}

fn is_of_one_connection(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

fn builder(connections: &Connections) -> Builder<Streams> {
    let mut builder = Builder::new(Streams { patience: connections.write_time });
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(connections.head_time)
        .max_headers(MAX_HEADERS)
        .max_buf_size(connections.head_bytes);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_send_buf_size(MAX_SEND_BUFFER)
        .max_pending_accept_reset_streams(MAX_RESETS)
        .max_local_error_reset_streams(MAX_STREAM_ERRORS)
        .max_header_list_size(u32::try_from(connections.head_bytes).unwrap_or(u32::MAX))
        .keep_alive_interval(connections.head_time)
        .keep_alive_timeout(connections.head_time);
    builder
}

struct Host {
    connections: Connections,
    builder: Builder<Streams>,
    router: Router,
    proxies: Proxies,
    /// Of connections, by address.
    places: Arc<Places<IpAddr>>,
    refusing: Semaphore,
    stop: CancellationToken,
}

/// A connection's place among all, in the extensions of its requests: what a request makes of its connection (a WebSocket) holds it on.
#[derive(Debug, Clone, Default)]
pub(super) struct Held {
    _place: Option<Arc<Place<IpAddr>>>,
}

impl Held {
    /// That of a request's connection.
    pub(super) fn by(extensions: &Extensions) -> Self {
        extensions.get().cloned().unwrap_or_default()
    }
}

impl Host {
    async fn receive(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, place: Result<Place<IpAddr>, Problem>) {
        self.prepare(&stream);
        match place {
            Ok(place) => {
                let held = Held { _place: Some(Arc::new(place)) };
                let service = TowerToHyperService::new(self.router.clone());
                let (domain, e2b) = (self.connections.ports_domain.clone(), self.connections.e2b.clone());
                let answer = move |mut request: Request<Incoming>| {
                    request.extensions_mut().insert(ConnectInfo(peer));
                    request.extensions_mut().insert(held.clone());
                    if let Some(domain) = &domain {
                        by_host::bring_in(&mut request, domain);
                    }
                    if let Some(way) = e2b.as_ref().filter(|_| request.extensions().get::<ByHost>().is_none()) {
                        way.bring_in(&mut request);
                    }
                    service.call(request)
                };
                // Its place goes with the service, or with what the connection has become.
                self.shake_hands(stream, answer).await;
            }
            Err(problem) => self.refuse(stream, problem).await,
        }
    }

    fn prepare(&self, stream: &TcpStream) {
        // Without the first, small answers wait for the other side's delayed acknowledgement: 40 ms each. The second ends a connection that does not take what
        // was sent, or whose other side is gone.
        let set = stream
            .set_nodelay(true)
            .and_then(|()| socket2::SockRef::from(stream).set_tcp_user_timeout(Some(self.connections.write_time)));
        if let Err(error) = set {
            tracing::debug!(%error, "a connection keeps its delays");
        }
    }

    fn admit(&self, address: IpAddr) -> Result<Place<IpAddr>, Problem> {
        let is_proxy = self.proxies.include(address);
        if self.connections.plain_from_proxies_only && !is_proxy && !address.to_canonical().is_loopback() {
            let detail = "this server is asked through its proxy, which speaks TLS";
            return Err(Problem::new(problem::FORBIDDEN, detail));
        }
        let Connections { most, most_of_one, .. } = self.connections;
        let most_of_one = if is_proxy { most } else { most_of_one };
        self.places.take(host_of(address), 1, most_of_one).map_err(|full| match full {
            Full::OfOne => Problem::new(
                problem::RATE_LIMITED,
                format!(
                    "this address has {most_of_one} connections, as many as one may have: use fewer, or close some"
                ),
            ),
            Full::All => {
                tracing::warn!(most, "no place for another connection (server.connections)");
                Problem::new(problem::AT_CAPACITY, "the server has as many connections as it may")
            }
        })
    }

    /// Says why there is no place, in whatever form it is asked, but not to everybody and not for long.
    async fn refuse(&self, stream: TcpStream, problem: Problem) {
        let Ok(_telling) = self.refusing.try_acquire() else { return };
        let answer = move |_: Request<Incoming>| {
            let id = session::fresh::<RequestId>().to_string();
            let mut response = Problem { request_id: id, ..problem.clone() }.render();
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            std::future::ready(Ok(response))
        };
        // Whoever does not ask by then does not hear it.
        let _ = tokio::time::timeout(REFUSING, self.shake_hands(stream, answer)).await;
    }

    async fn shake_hands<A, F>(&self, stream: TcpStream, answer: A)
    where
        A: Fn(Request<Incoming>) -> F,
        F: Future<Output = Result<Response, Infallible>> + Send + 'static,
    {
        let Some(tls) = &self.connections.tls else { return self.talk(stream, answer).await };
        let shaking = tokio::time::timeout(self.connections.head_time, tls.accept(stream));
        match self.stop.run_until_cancelled(shaking).await {
            Some(Ok(Ok(stream))) => self.talk(stream, answer).await,
            Some(Ok(Err(error))) => tracing::debug!(%error, "a TLS handshake failed"),
            Some(Err(_)) => tracing::debug!("a TLS handshake took too long"),
            None => {}
        }
    }

    /// Serves a connection to its end. One that brings no request in time is closed; HTTP/1 watches over the requests after the first one by itself.
    async fn talk<I, A, F>(&self, stream: I, answer: A)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        A: Fn(Request<Incoming>) -> F,
        F: Future<Output = Result<Response, Infallible>> + Send + 'static,
    {
        let (requests, is_http2) = (AtomicU64::new(0), AtomicBool::new(false));
        let service = service_fn(|request: Request<Incoming>| {
            requests.fetch_add(1, Ordering::Relaxed);
            is_http2.store(request.version() == Version::HTTP_2, Ordering::Relaxed);
            answer(request).map_ok(unread::counted)
        });
        let connection = self.builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let mut looks = tokio::time::interval(self.connections.head_time);
        looks.reset();
        let (mut before, mut closing) = (0, false);
        loop {
            tokio::select! {
                // What has come is heard before it counts as late: it may be the server that is.
                biased;
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        tracing::debug!(error, "a connection ended early");
                    }
                    return;
                }
                () = self.stop.cancelled(), if !closing => {
                    connection.as_mut().graceful_shutdown();
                    closing = true;
                }
                _ = looks.tick() => {
                    let now = requests.load(Ordering::Relaxed);
                    if now == 0 {
                        return;
                    }
                    // Over HTTP/2, what is under way goes on, and a request that crosses this one's end is known not to have been taken.
                    if now == before && !closing && is_http2.load(Ordering::Relaxed) {
                        connection.as_mut().graceful_shutdown();
                        closing = true;
                    }
                    before = now;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_proxies_and_this_machine_may_speak_without_tls_where_that_is_asked() {
        let connections = Connections {
            most: 3,
            most_of_one: 1,
            head_time: Duration::from_secs(1),
            head_bytes: 8192,
            write_time: Duration::from_secs(1),
            ports_domain: None,
            e2b: None,
            plain_from_proxies_only: true,
            tls: None,
        };
        let host = Host {
            builder: builder(&connections),
            places: Places::new(connections.most),
            refusing: Semaphore::new(1),
            router: Router::new(),
            proxies: Proxies::new(vec!["192.0.2.0/24".parse().unwrap()], "x-forwarded-for"),
            connections,
            stop: CancellationToken::new(),
        };
        let admit = |address: &str| host.admit(address.parse().unwrap()).map_err(|problem| problem.code);
        let (_one, _two) =
            (admit("192.0.2.1").unwrap(), admit("192.0.2.1").expect("a proxy's are not counted by address"));
        assert_eq!(admit("198.51.100.1").unwrap_err(), "forbidden");
        let _own = admit("127.0.0.1").unwrap();
        assert_eq!(admit("127.0.0.1").unwrap_err(), "rate-limited");
        assert_eq!(admit("192.0.2.1").unwrap_err(), "at-capacity");
    }
}
