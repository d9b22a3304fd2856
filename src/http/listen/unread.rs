//! Answers over HTTP/2 that their callers do not take: the stream of one is ended. Over HTTP/1 the connection ends, which is the business of `listen`.
//!
//! hyper asks a body for data, and then holds what it has got until the caller gives room for it; meanwhile it asks for nothing. So what can end a stream is not its
//! body but whoever has its task. Each task keeps an account of what its body has handed out and the connection has not written yet, and ends when nothing of
//! that moves: h2 resets a stream that nobody holds any more, and forgets what was to be sent on it. A body that has nothing to say owes nothing.

use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::response::Response;
use futures_util::task::AtomicWaker;
use hyper::body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::task;

/// Bytes that are handed out at a time, as many as a frame may have at least (RFC 9113, section 4.2): a caller who takes fewer in time is as one who takes none.
const PIECE: usize = 16 * 1024;

tokio::task_local! {
    static ACCOUNT: Arc<Account>;
}

/// Runs streams, each with an account of what it has not got rid of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Streams {
    /// How long a caller may take nothing.
    pub(super) patience: Duration,
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let account = Arc::<Account>::default();
        task::spawn("stream", ACCOUNT.scope(Arc::clone(&account), run(stream, account, self.patience)));
    }
}

/// Runs a stream to its end, or until nothing of it was taken for too long.
async fn run(stream: impl Future<Output = ()>, account: Arc<Account>, patience: Duration) {
    let mut stream = pin!(stream);
    let mut alarm: Option<Pin<Box<Sleep>>> = None;
    std::future::poll_fn(|context| {
        if stream.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        while let Some(since) = account.unread_since() {
            let late = since + patience;
            if Instant::now() >= late {
                tracing::debug!(?patience, "a stream is ended: nothing of its answer was taken");
                return Poll::Ready(());
            }
            // It may be set too early, as pieces are taken while it runs; it is set anew when it rings, not with each of them.
            let alarm = alarm.get_or_insert_with(|| Box::pin(sleep_until(late)));
            ready!(alarm.as_mut().poll(context));
            alarm.as_mut().reset(late);
        }
        Poll::Pending
    })
    .await;
}

/// Has an answer counted, where that is to be done.
pub(super) fn counted(response: Response) -> Response {
    match ACCOUNT.try_with(Arc::clone) {
        Ok(account) => response.map(|body| Body::new(Counted { body, rest: Bytes::new(), has_ended: false, account })),
        // Over HTTP/1 there are no streams.
        Err(_) => response,
    }
}

/// What a stream's body has handed out and the connection has not written.
#[derive(Debug, Default)]
struct Account {
    open: Mutex<Open>,
    /// Who waits until all is written.
    waiting: AtomicWaker,
}

#[derive(Debug, Default)]
struct Open {
    pieces: usize,
    /// Since when none of them was written; nothing when there are none.
    since: Option<Instant>,
}

impl Account {
    fn open(&self) -> MutexGuard<'_, Open> {
        // No step can panic halfway.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unread_since(&self) -> Option<Instant> {
        self.open().since
    }

    fn hand_out(self: &Arc<Self>, bytes: Bytes) -> Bytes {
        let mut open = self.open();
        open.pieces += 1;
        open.since.get_or_insert_with(Instant::now);
        drop(open);
        Bytes::from_owner(Piece { bytes, account: Arc::clone(self) })
    }

    fn written(&self) {
        let mut open = self.open();
        open.pieces -= 1;
        open.since = (open.pieces > 0).then(Instant::now);
        let is_all = open.pieces == 0;
        drop(open);
        if is_all {
            self.waiting.wake();
        }
    }

    fn poll_all_written(&self, context: &Context<'_>) -> Poll<()> {
        self.waiting.register(context.waker());
        if self.unread_since().is_none() { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// Data on its way. It goes when it is written, or when its stream is ended.
struct Piece {
    bytes: Bytes,
    account: Arc<Account>,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.account.written();
    }
}

/// A body that is handed out in pieces, and ends when the last one is written: a stream whose body has ended is out of everybody's hands.
struct Counted {
    body: Body,
    rest: Bytes,
    has_ended: bool,
    account: Arc<Account>,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        loop {
            if !this.rest.is_empty() {
                let piece = this.rest.split_to(this.rest.len().min(PIECE));
                return Poll::Ready(Some(Ok(Frame::data(this.account.hand_out(piece)))));
            }
            if this.has_ended {
                ready!(this.account.poll_all_written(context));
                return Poll::Ready(None);
            }
            match ready!(Pin::new(&mut this.body).poll_frame(context)) {
                None => this.has_ended = true,
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream() && self.account.unread_since().is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let (mut hint, rest) = (self.body.size_hint(), self.rest.len() as u64);
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + rest);
        }
        hint.set_lower(hint.lower() + rest);
        hint
    }
}
