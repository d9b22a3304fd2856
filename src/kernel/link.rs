//! The link: HTTP/2 over a cell's byte stream, with the guest as the server.
//!
//! A [`Link`] is a cheap handle; the connection itself is a task that ends, and closes the stream, once the last handle is gone,
//! the peer is dead, or somebody cuts it. It makes no decisions: it carries requests, bounded in size and time.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use cellblock_wire::frame::{self, Frame};
pub use cellblock_wire::link::escape_path;
use cellblock_wire::link::{
    Ack, Hello, Init, KernelDeleted, KernelSpec, KernelStarted, Numbered, Outbound, Refusal, Report, Signal,
    StartKernel, Stats,
};
use cellblock_wire::marker::{LinkSecret, Marker, MarkerScanner, Scanned};
use cellblock_wire::tunnel::{self, Tunnel};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Either, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http2::SendRequest;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::task;

/// A guest answers its reset marker within this time.
const RESET_TIMEOUT: Duration = Duration::from_secs(10);
/// An ordinary request is answered within this time.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest JSON answer accepted, in bytes.
const MAX_ANSWER: usize = 4 * 1024 * 1024;
/// Output that a guest may send before its echo, in bytes: what dockerd and the pipes held.
const MAX_DISCARDED: usize = 64 * 1024 * 1024;
/// Window of one stream of the connection, in bytes. Files come at its size in each round trip.
const STREAM_WINDOW: u32 = 4 * 1024 * 1024;
/// Window of the whole connection, in bytes: what all streams that may be open at once can have in flight, so that none of them stands in the way
/// of the kernels' messages. Bulk streams and tunnels are bounded by [`Visits`](crate::session::visits::Visits); tunnels by their own window too.
const CONNECTION_WINDOW: u32 = 128 * 1024 * 1024;
/// A peer that is silent for this long is asked whether it lives.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A peer that does not answer that within this time is dead.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(15);

/// Why a request to a guest failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The guest did not answer its marker in time, or its stream ended.
    #[error("the guest did not answer on its stream: {0}")]
    Unreachable(String),
    /// The connection broke.
    #[error("the link to the guest broke while it was asked to {attempt}: {source}")]
    Broken {
        /// What was attempted.
        attempt: String,
        /// Why.
        source: hyper::Error,
    },
    /// There was no answer in time.
    #[error("the guest did not {attempt} within {limit:?}")]
    TimedOut {
        /// What was attempted.
        attempt: String,
        /// The limit.
        limit: Duration,
    },
    /// The guest refused.
    #[error("the guest refused to {attempt}: {}", refusal.message)]
    Refused {
        /// What was attempted.
        attempt: String,
        /// Its words.
        refusal: Refusal,
    },
    /// The guest said something that is not of the protocol.
    #[error("the guest broke the protocol when asked to {attempt}: {detail}")]
    Protocol {
        /// What was attempted.
        attempt: String,
        /// What was wrong.
        detail: String,
    },
}

/// A body that goes to a guest: whole, or as it comes.
type Outgoing = Either<Full<Bytes>, UnsyncBoxBody<Bytes, io::Error>>;

/// A request that the guest is asked for its own sake: a file, a command, a connection.
#[derive(Debug)]
pub struct Asked<'a> {
    /// What is attempted, for errors: "write a file".
    pub attempt: &'a str,
    /// The method.
    pub method: Method,
    /// Path and query, escaped (see [`escape_path`]).
    pub path: &'a str,
    /// The guest's answer begins within this time; nothing where that depends on a body that is sent.
    pub within: Option<Duration>,
}

/// A handle on the link to one guest.
#[derive(Debug, Clone)]
pub struct Link {
    sender: SendRequest<Outgoing>,
    closed: watch::Receiver<bool>,
    cut: CancellationToken,
}

impl Link {
    /// Takes over a byte stream: resets it, and opens a connection.
    ///
    /// # Errors
    /// When the guest does not answer its marker or its first request in time.
    pub async fn open<S>(stream: S, secret: LinkSecret, init: &Init) -> Result<(Self, Hello), LinkError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let nonce = uuid::Uuid::new_v4().into_bytes();
        let stream = tokio::time::timeout(RESET_TIMEOUT, reset(stream, Marker { secret, nonce }))
            .await
            .map_err(|_| LinkError::Unreachable(format!("no echo of the reset marker within {RESET_TIMEOUT:?}")))?
            .map_err(|e| LinkError::Unreachable(e.to_string()))?;
        let link = Self::connect(stream).await?;
        let hello = link.set_up(init).await?;
        Ok((link, hello))
    }

    async fn connect<S>(stream: S) -> Result<Self, LinkError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (closing, closed) = watch::channel(false);
        let cut = CancellationToken::new();
        let stream = Severable { stream, cut: Box::pin(cut.clone().cancelled_owned()), _closing: Closing(closing) };
        let (sender, connection) = hyper::client::conn::http2::Builder::new(task::Executor)
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(256 * 1024)
            .max_header_list_size(16 * 1024)
            .max_concurrent_reset_streams(64)
            .max_send_buf_size(1024 * 1024)
            .keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|source| LinkError::Broken { attempt: "open a connection".to_owned(), source })?;
        task::spawn("link", async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a link broke");
            }
        });
        Ok(Self { sender, closed, cut })
    }

    /// Says again how the cell is set up: the environment counts for what is started from now on.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn set_up(&self, init: &Init) -> Result<Hello, LinkError> {
        self.call("set up its environment", Method::POST, "/init", json_body(init)).await
    }

    /// Breaks the connection off, whatever is on its way and whoever else holds a handle: while the stream is open, the engine opens no other.
    pub fn cut(&self) {
        self.cut.cancel();
    }

    /// Waits until the connection is gone and its stream closed.
    pub async fn closed(&self) {
        // An error means that the stream is gone too.
        let _ = self.closed.clone().wait_for(|closed| *closed).await;
    }

    /// What the guest sees of its own confinement.
    ///
    /// # Errors
    /// As every request: see [`LinkError`].
    pub async fn report(&self) -> Result<Report, LinkError> {
        self.call("report its confinement", Method::GET, "/report", Bytes::new()).await
    }

    /// The kernels that the image offers.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn kernelspecs(&self) -> Result<Vec<KernelSpec>, LinkError> {
        self.call("list kernelspecs", Method::GET, "/kernelspecs", Bytes::new()).await
    }

    /// The names of the kernels that are there: hostile text. A guest of an earlier version can't tell, and names none.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn kernels(&self) -> Result<Vec<String>, LinkError> {
        match self.call("list its kernels", Method::GET, "/kernels", Bytes::new()).await {
            Err(LinkError::Refused { refusal, .. }) if refusal.code == "not-found" => Ok(Vec::new()),
            listed => listed,
        }
    }

    /// Starts a kernel; its channels connect later, which an event tells.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn start_kernel(&self, start: &StartKernel) -> Result<KernelStarted, LinkError> {
        self.call("start a kernel", Method::POST, "/kernels", json_body(start)).await
    }

    /// Ends a kernel with all its processes.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn delete_kernel(&self, kernel: &str) -> Result<KernelDeleted, LinkError> {
        self.call("end a kernel", Method::DELETE, &format!("/kernels/{kernel}"), Bytes::new()).await
    }

    /// Sends a Jupyter message.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn send_message(&self, kernel: &str, head: &Outbound, parts: &[Bytes]) -> Result<(), LinkError> {
        let attempt = "pass on a message";
        let mut body = BytesMut::new();
        frame::encode(head, parts, &mut body)
            .map_err(|e| LinkError::Protocol { attempt: attempt.to_owned(), detail: e.to_string() })?;
        self.order(attempt, Method::POST, &format!("/kernels/{kernel}/messages"), body.freeze()).await
    }

    /// Signals a kernel's process group.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn signal(&self, kernel: &str, signal: &str) -> Result<(), LinkError> {
        let body = json_body(&Signal { signal: signal.to_owned() });
        self.order("signal a kernel", Method::POST, &format!("/kernels/{kernel}/signal"), body).await
    }

    /// Tells the guest that events up to `seq` need not be kept.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn ack(&self, seq: u64) -> Result<(), LinkError> {
        self.order("acknowledge events", Method::POST, "/ack", json_body(&Ack { seq })).await
    }

    /// The cell's figures.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn stats(&self) -> Result<Stats, LinkError> {
        self.call("tell its figures", Method::GET, "/stats", Bytes::new()).await
    }

    /// Events after number `after`, replayed and then as they happen.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn events(&self, after: u64) -> Result<Events, LinkError> {
        let attempt = "tell its events";
        let path = format!("/events?after={after}");
        let response = within(attempt, self.send(attempt, Method::GET, &path, whole(Bytes::new()))).await?;
        if !response.status().is_success() {
            return Err(refused_in_time(attempt, response).await);
        }
        Ok(Events { body: response.into_body(), decoder: frame::Decoder::default() })
    }

    pub(super) async fn call<T: DeserializeOwned>(
        &self,
        attempt: &str,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, LinkError> {
        let answer = async {
            let response = self.send(attempt, method, path, whole(body)).await?;
            if !response.status().is_success() {
                return Err(refused(attempt, response).await);
            }
            let bytes = read_bounded(attempt, response).await?;
            serde_json::from_slice(&bytes)
                .map_err(|e| LinkError::Protocol { attempt: attempt.to_owned(), detail: e.to_string() })
        };
        within(attempt, answer).await
    }

    pub(super) async fn order(&self, attempt: &str, method: Method, path: &str, body: Bytes) -> Result<(), LinkError> {
        let answer = async {
            let response = self.send(attempt, method, path, whole(body)).await?;
            if response.status().is_success() { Ok(()) } else { Err(refused(attempt, response).await) }
        };
        within(attempt, answer).await
    }

    /// Asks with a body that is sent as it comes, and gives the answer as it comes. Whoever asks bounds both in size, and in time between two pieces.
    ///
    /// # Errors
    /// A refusal, or a link that broke before the answer began: see [`LinkError`].
    pub async fn exchange<B>(&self, asked: Asked<'_>, body: B) -> Result<Response<Incoming>, LinkError>
    where
        B: Body<Data = Bytes, Error = io::Error> + Send + 'static,
    {
        let Asked { attempt, method, path, within: limit } = asked;
        let answer = self.send(attempt, method, path, Either::Right(UnsyncBoxBody::new(body)));
        let response = match limit {
            Some(limit) => within_time(attempt, limit, answer).await?,
            None => answer.await?,
        };
        if response.status().is_success() { Ok(response) } else { Err(refused_in_time(attempt, response).await) }
    }

    /// Opens a byte stream to what the path names.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn tunnel(&self, asked: Asked<'_>) -> Result<Tunnel<Incoming>, LinkError> {
        let (beginning, outgoing) = tunnel::begin();
        Ok(beginning.join(self.exchange(asked, outgoing).await?.into_body()))
    }

    /// The same with a window of [`tunnel::NARROW`].
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn narrow_tunnel(&self, asked: Asked<'_>) -> Result<Tunnel<Incoming>, LinkError> {
        let (beginning, outgoing) = tunnel::begin();
        Ok(beginning.join_narrow(self.exchange(asked, outgoing).await?.into_body()))
    }

    /// Asks with a small JSON body for a small JSON answer.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn ask<T: DeserializeOwned>(
        &self,
        attempt: &str,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, LinkError> {
        self.call(attempt, method, path, json_body(body)).await
    }

    async fn send(
        &self,
        attempt: &str,
        method: Method,
        path: &str,
        body: Outgoing,
    ) -> Result<Response<Incoming>, LinkError> {
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = format!("http://guest{path}")
            .parse()
            .map_err(|_| LinkError::Protocol { attempt: attempt.to_owned(), detail: "not a path".to_owned() })?;
        let mut sender = self.sender.clone();
        let answer = async {
            sender.ready().await?;
            sender.send_request(request).await
        };
        answer.await.map_err(|source| LinkError::Broken { attempt: attempt.to_owned(), source })
    }
}

/// The stream of a guest's events.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    decoder: frame::Decoder,
}

impl Events {
    /// The next event; `None` once the connection is gone. Safe to drop and call again.
    ///
    /// # Errors
    /// When the guest sends what is no event; the stream is of no further use then.
    pub async fn next(&mut self) -> Result<Option<Frame<Numbered>>, LinkError> {
        let broken = |detail: String| LinkError::Protocol { attempt: "tell its events".to_owned(), detail };
        loop {
            if let Some(event) = self.decoder.next_frame::<Numbered>().map_err(|e| broken(e.to_string()))? {
                return Ok(Some(event));
            }
            match self.body.frame().await {
                None | Some(Err(_)) => return Ok(None),
                Some(Ok(part)) => {
                    if let Some(data) = part.data_ref() {
                        self.decoder.push(data);
                    }
                }
            }
        }
    }
}

async fn within<T>(attempt: &str, answer: impl Future<Output = Result<T, LinkError>>) -> Result<T, LinkError> {
    within_time(attempt, REQUEST_TIMEOUT, answer).await
}

async fn within_time<T>(
    attempt: &str,
    limit: Duration,
    answer: impl Future<Output = Result<T, LinkError>>,
) -> Result<T, LinkError> {
    let late = |_| Err(LinkError::TimedOut { attempt: attempt.to_owned(), limit });
    tokio::time::timeout(limit, answer).await.unwrap_or_else(late)
}

fn whole(body: Bytes) -> Outgoing {
    Either::Left(Full::new(body))
}

async fn read_bounded(attempt: &str, response: Response<Incoming>) -> Result<Bytes, LinkError> {
    let collected = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
    collected
        .map(http_body_util::Collected::to_bytes)
        .map_err(|e| LinkError::Protocol { attempt: attempt.to_owned(), detail: e.to_string() })
}

/// The refusal of an answer that is awaited without a time limit otherwise.
async fn refused_in_time(attempt: &str, response: Response<Incoming>) -> LinkError {
    within(attempt, async { Err::<(), _>(refused(attempt, response).await) }).await.err().unwrap_or_else(|| {
        LinkError::Protocol { attempt: attempt.to_owned(), detail: "a refusal without a reason".to_owned() }
    })
}

async fn refused(attempt: &str, response: Response<Incoming>) -> LinkError {
    let status = response.status();
    let told = match read_bounded(attempt, response).await {
        Ok(bytes) => serde_json::from_slice::<Refusal>(&bytes).ok(),
        Err(error) => return error,
    };
    match told {
        Some(refusal) => LinkError::Refused { attempt: attempt.to_owned(), refusal },
        None => {
            LinkError::Protocol { attempt: attempt.to_owned(), detail: format!("status {status} without a reason") }
        }
    }
}

pub(super) fn json_body<T: Serialize>(body: &T) -> Bytes {
    // The bodies of the link are plain structures with text keys: writing them can't fail.
    Bytes::from(serde_json::to_vec(body).unwrap_or_default())
}

/// Writes the marker and reads until its echo. Gives back the stream, with what already came after the echo.
async fn reset<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, marker: Marker) -> io::Result<Prefixed<S>> {
    stream.write_all(&marker.to_bytes()).await?;
    stream.flush().await?;
    let mut scanner = MarkerScanner::default();
    let mut buffer = vec![0; 64 * 1024];
    let mut discarded = 0;
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "its stream ended"));
        }
        discarded += read;
        let pieces = scanner.push(&buffer[..read], |seen| seen == &marker);
        if let Some(echo) = pieces.iter().position(|p| matches!(p, Scanned::Marker(_))) {
            let mut prefix = BytesMut::new();
            for piece in &pieces[echo + 1..] {
                if let Scanned::Bytes(bytes) = piece {
                    prefix.extend_from_slice(bytes);
                }
            }
            prefix.extend_from_slice(scanner.held());
            return Ok(Prefixed { prefix: prefix.freeze(), stream });
        }
        if discarded > MAX_DISCARDED {
            return Err(io::Error::other("it sends without end, and no echo of the reset marker"));
        }
    }
}

/// A stream that breaks off when its link is cut, and tells when it is closed.
struct Severable<S> {
    stream: S,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Dropped after the stream.
    _closing: Closing,
}

/// Says that a stream is closed.
struct Closing(watch::Sender<bool>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

impl<S> Severable<S> {
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.cut.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the link was cut")),
            Poll::Pending => Ok(()),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Severable<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Severable<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A stream, with bytes that were already read from it.
struct Prefixed<S> {
    prefix: Bytes,
    stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let take = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix.split_to(take));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
