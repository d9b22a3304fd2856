//! One request passed on to an HTTP server that is not trusted, over a byte stream of its own, and its answer passed back. Which headers may cross is decided in
//! `crossing`; who may ask, elsewhere.
//!
//! Bodies flow both ways as fast as their readers read. Whatever the server does costs this request only: its head is bounded in lines, bytes and time, and the
//! connection ends with the answer or with its caller.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{Method, Request, Response, StatusCode, Version, header};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::task;

/// Lines in the head of an answer.
const MAX_HEADERS: usize = 100;
/// Bytes of it, and of what of a body is held here.
const MAX_BUFFER: usize = 64 * 1024;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// What is said is not HTTP/1.1, or too much.
    #[error("what it says is not an answer of HTTP/1.1: {0}")]
    Garbled(String),
    /// Nothing was answered, and no more of the body was taken.
    #[error("it has neither answered nor taken more of the request for {0:?}")]
    Silent(Duration),
}

/// Passes a request on; what the connection becomes when the server changes its protocol ends when it is `over` at the latest. Its target and headers are sent as they are, but for the framing of its body; the answer's come back as they are.
///
/// # Errors
/// See [`Failure`].
pub async fn forward<S>(
    stream: S,
    mut request: Request<Body>,
    within: Duration,
    over: impl Future<Output = ()> + Send + 'static,
) -> Result<Response<Body>, Failure>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) = http1::Builder::new()
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_BUFFER)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(garbled)?;
    let stop = CancellationToken::new();
    let (guard, stopped) = (stop.clone().drop_guard(), stop);
    task::spawn("port", async move {
        // Whether it ends by itself or is told to, nobody is left who could hear why.
        let _ = stopped.run_until_cancelled(connection.with_upgrades()).await;
    });
    let wants_upgrade = request.headers().contains_key(header::UPGRADE);
    let callers = wants_upgrade.then(|| hyper::upgrade::on(&mut request));
    *request.version_mut() = Version::HTTP_11;
    let is_head = request.method() == Method::HEAD;
    let progress = Progress::new();
    let (head, body) = request.into_parts();
    let sent = Request::from_parts(head, Watched { body, progress: progress.clone() });
    let response = progress.bounded(within, sender.send_request(sent)).await?.map_err(garbled)?;
    match (response.status(), callers) {
        (StatusCode::SWITCHING_PROTOCOLS, Some(callers)) => Ok(switch(response, callers, guard, over)),
        (StatusCode::SWITCHING_PROTOCOLS, None) => {
            Err(Failure::Garbled("it changes the protocol, which nobody has asked for".to_owned()))
        }
        _ => Ok(answer(response, is_head, guard)),
    }
}

fn garbled(error: hyper::Error) -> Failure {
    // Only what is wrong, and never what was said.
    Failure::Garbled(error.to_string())
}

/// The answer with its body as it comes. Framing is this server's own: of what the other one says of a length, only what was checked is kept.
fn answer(response: Response<Incoming>, is_head: bool, guard: DropGuard) -> Response<Body> {
    let (mut head, body) = response.into_parts();
    if body.size_hint().exact().is_none() && !is_head {
        head.headers.remove(header::CONTENT_LENGTH);
    }
    head.version = Version::HTTP_11;
    Response::from_parts(head, Body::new(Guarded { body, _guard: guard }))
}

/// Both sides have agreed on another protocol, whose bytes are passed on until one of them ends it.
fn switch(
    mut response: Response<Incoming>,
    callers: OnUpgrade,
    guard: DropGuard,
    over: impl Future<Output = ()> + Send + 'static,
) -> Response<Body> {
    let servers = hyper::upgrade::on(&mut response);
    task::spawn("port upgraded", async move {
        if let (Ok(servers), Ok(callers)) = (servers.await, callers.await) {
            tokio::select! {
                () = pass_on(servers, callers) => {}
                () = over => {}
            }
        }
        drop(guard);
    });
    response.map(|_| Body::empty())
}

async fn pass_on(servers: Upgraded, callers: Upgraded) {
    let (mut servers, mut callers) = (TokioIo::new(servers), TokioIo::new(callers));
    // Whichever breaks ends it all.
    let _ = tokio::io::copy_bidirectional(&mut servers, &mut callers).await;
}

/// When something last moved.
#[derive(Debug, Clone)]
struct Progress(Arc<Mutex<Instant>>);

impl Progress {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an answer as long as something moves within each such time.
    async fn bounded<T>(&self, within: Duration, answer: impl Future<Output = T>) -> Result<T, Failure> {
        let mut answer = std::pin::pin!(answer);
        loop {
            let deadline = self.last() + within;
            match tokio::time::timeout_at(deadline, answer.as_mut()).await {
                Ok(answer) => return Ok(answer),
                Err(_) if self.last() + within > deadline => {}
                Err(_) => return Err(Failure::Silent(within)),
            }
        }
    }
}

/// A request's body, whose every piece that is taken is progress.
struct Watched {
    body: Body,
    progress: Progress,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if polled.is_ready() {
            self.progress.note();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body. When it is dropped, to its end or not, the connection goes.
struct Guarded {
    body: Incoming,
    _guard: DropGuard,
}

impl HttpBody for Guarded {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        // Trailers are of one hop.
        Pin::new(&mut self.body).poll_frame(cx).map(|frame| match frame {
            Some(Ok(frame)) if frame.is_data() => Some(Ok(frame)),
            Some(Ok(_)) | None => None,
            Some(Err(error)) => Some(Err(io::Error::other(error))),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
