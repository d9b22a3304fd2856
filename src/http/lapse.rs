//! Answers that are still being made last no longer than the key that they were asked for with. How long a key counts is the business of the key ring.

use std::task::Poll;

use axum::body::Body;
use axum::response::Response;
use futures_util::stream::{self, StreamExt};
use futures_util::{FutureExt, future::FusedFuture};

/// Why a body breaks off.
#[derive(Debug, thiserror::Error)]
#[error("the key that this was asked for with counts no more")]
struct Lapsed;

/// Breaks an answer off when this is over: its connection or its stream ends without the end of the body, so nobody takes what has come for all.
pub(super) fn until(over: impl Future<Output = ()> + Send + 'static, response: Response) -> Response {
    let mut over = Box::pin(over.fuse());
    response.map(|body| {
        let mut data = body.into_data_stream();
        Body::from_stream(stream::poll_fn(move |context| {
            if over.is_terminated() {
                return Poll::Ready(None);
            }
            // First, so that one that always has something to say is heard no longer than others.
            if over.poll_unpin(context).is_ready() {
                tracing::debug!("an answer is broken off: its key counts no more");
                return Poll::Ready(Some(Err(axum::Error::new(Lapsed))));
            }
            data.poll_next_unpin(context)
        }))
    })
}
