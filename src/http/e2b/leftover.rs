//! What a request still sends when its answer is there. A refusal that is made before a body was read, for want of a token or of the sandbox, closes the connection under a
//! caller that does not look up while it sends, and takes the answer along; so the rest is taken first, within the bounds of [`discard`]. Bodies that a room has
//! read to their end, or still reads, are not its business.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};
use tokio::sync::oneshot;

use crate::http::Bounds;
use crate::http::extract::discard;

/// Answers, and has taken what nobody has read of the request before that is sent.
pub(super) async fn take(State(bounds): State<Bounds>, request: Request, next: Next) -> Response {
    // Who waits to be told to go on has sent nothing, and hears the answer.
    if request.body().is_end_stream() || request.headers().contains_key(header::EXPECT) {
        return next.run(request).await;
    }
    let (back, mut given_back) = oneshot::channel();
    let response = next.run(request.map(|body| Body::new(Lent { body, back: Some(back) }))).await;
    if let Ok(mut rest) = given_back.try_recv() {
        discard(&mut rest, bounds).await;
    }
    response
}

/// A body that is given back once nobody reads it any more, if there is something left of it.
struct Lent {
    body: Body,
    back: Option<oneshot::Sender<Body>>,
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.back = None;
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

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(back) = self.back.take().filter(|_| !self.body.is_end_stream()) {
            // Nobody takes it any more when the answer is on its way.
            let _ = back.send(std::mem::take(&mut self.body));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use axum::Router;
    use axum::routing::post;
    use futures_util::stream::{self, StreamExt};
    use tower_service::Service as _;

    use super::*;

    const PIECES: usize = 8;

    /// A body of some pieces, and how many of them were taken.
    fn pieces() -> (Body, Arc<AtomicUsize>) {
        let taken = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&taken);
        let pieces = stream::iter(0..PIECES).map(move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
            Ok::<_, std::io::Error>(vec![0; 1000])
        });
        (Body::from_stream(pieces), taken)
    }

    async fn answered(body: Body, expect: Option<&str>, most: usize) -> u16 {
        let bounds = Bounds { body: most, body_time: Duration::from_secs(5) };
        let mut router = Router::<()>::new()
            .route("/unread", post(async || axum::http::StatusCode::UNAUTHORIZED))
            .layer(axum::middleware::from_fn_with_state(bounds, take));
        let mut request = Request::post("/unread").body(body).unwrap();
        if let Some(expect) = expect {
            request.headers_mut().insert(header::EXPECT, expect.parse().unwrap());
        }
        router.call(request).await.unwrap().status().as_u16()
    }

    #[tokio::test]
    async fn what_nobody_has_read_is_taken_before_the_answer() {
        let (body, taken) = pieces();
        assert_eq!((answered(body, None, 1_000_000).await, taken.load(Ordering::Relaxed)), (401, PIECES));
        let (body, taken) = pieces();
        assert_eq!(answered(body, None, 2500).await, 401);
        assert_eq!(taken.load(Ordering::Relaxed), 3, "no more than a body may have");
        let (body, taken) = pieces();
        assert_eq!((answered(body, Some("100-continue"), 1_000_000).await, taken.load(Ordering::Relaxed)), (401, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_waited_for_long() {
        let began = tokio::time::Instant::now();
        let body = Body::from_stream(stream::pending::<Result<Vec<u8>, std::io::Error>>());
        assert_eq!(answered(body, None, 1000).await, 401);
        assert_eq!(began.elapsed().as_secs(), 1);
    }
}
