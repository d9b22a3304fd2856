//! Bytes on their way between a caller and a guest. A task of its own carries them, so that neither side holds anything for longer than its time: whoever
//! brings or takes nothing for [`STALLED`] is cut off. Holds a few pieces; knows nothing of what they are.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use hyper::body::{Body, Frame, SizeHint};
use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, oneshot};

use super::files::FileFault;
use crate::task;

/// Files and archives on their way at once, in all. Each may hold a window of the link, 4 MiB, and the pieces that wait here.
pub(super) const MOST: usize = 64;
/// Those of one tenant, so that nobody has all of them.
pub(super) const MOST_OF_ONE: usize = 24;
/// Who finds no place waits this long for one: many that come at once are served in turn.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// Who brings or takes nothing for this long is cut off.
pub const STALLED: Duration = Duration::from_secs(30);
/// Pieces that wait.
const AHEAD: usize = 4;
/// Pieces that wait for the link go as one until there is this much: each costs the engine a few turns however short it is.
const JOINED: usize = 192 * 1024;
/// What is not wanted any more of a body is taken for this long, and up to so many bytes, so that its sender hears the answer.
const DISCARDED: (Duration, usize) = (Duration::from_secs(1), 8 * 1024 * 1024);

/// Pieces as a body.
#[derive(Debug)]
pub struct Pieces {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    /// Bytes that are still to come, where that is known.
    left: Option<u64>,
    /// Whether pieces that wait become one.
    joins: bool,
    /// An error that came behind pieces that have become one.
    failed: Option<io::Error>,
}

impl Pieces {
    fn with_what_waits(&mut self, first: Bytes) -> Bytes {
        let mut joined = BytesMut::new();
        while first.len().max(joined.len()) < JOINED {
            match self.pieces.try_recv() {
                Ok(Ok(next)) => {
                    if joined.is_empty() {
                        joined.extend_from_slice(&first);
                    }
                    joined.extend_from_slice(&next);
                }
                Ok(Err(error)) => {
                    self.failed = Some(error);
                    break;
                }
                Err(_) => break,
            }
        }
        if joined.is_empty() { first } else { joined.freeze() }
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Some(Err(error)));
        }
        let piece = match std::task::ready!(self.pieces.poll_recv(cx)) {
            Some(Ok(first)) if self.joins => Some(Ok(self.with_what_waits(first))),
            piece => piece,
        };
        if let (Some(Ok(piece)), Some(left)) = (&piece, &mut self.left) {
            *left = left.saturating_sub(piece.len() as u64);
        }
        Poll::Ready(piece.map(|piece| piece.map(Frame::data)))
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map(SizeHint::with_exact).unwrap_or_default()
    }
}

/// What is received of a guest for a caller, whose time is limited. `held` is what the transfer has taken, and gives back when it ends.
pub(super) fn receive<B>(
    mut source: B,
    length: Option<u64>,
    patience: Option<Duration>,
    held: impl Send + 'static,
) -> Pieces
where
    B: Body<Data = Bytes, Error = hyper::Error> + Send + Unpin + 'static,
{
    let (out, pieces) = mpsc::channel(AHEAD);
    task::spawn("download", async move {
        let _held = held;
        let mut left = length;
        loop {
            let next = next_piece(&mut source, patience);
            let piece = tokio::select! {
                () = out.closed() => return,
                piece = next => piece,
            };
            let piece = match (piece, &mut left) {
                (Some(Ok(piece)), Some(left)) => match left.checked_sub(piece.len() as u64) {
                    Some(rest) => {
                        *left = rest;
                        Ok(piece)
                    }
                    None => Err(io::Error::other("the guest sends more than it said")),
                },
                (Some(piece), None) => piece,
                (Some(Err(error)), _) => Err(error),
                (None, None | Some(0)) => return,
                (None, Some(_)) => Err(io::ErrorKind::UnexpectedEof.into()),
            };
            let is_over = piece.is_err();
            // A caller that takes nothing is cut off: the body ends without its end.
            if out.send_timeout(piece, STALLED).await.is_err() || is_over {
                return;
            }
        }
    });
    Pieces { pieces, left: length, joins: false, failed: None }
}

async fn next_piece<B>(source: &mut B, patience: Option<Duration>) -> Option<io::Result<Bytes>>
where
    B: Body<Data = Bytes, Error = hyper::Error> + Unpin,
{
    loop {
        let next = std::future::poll_fn(|cx| Pin::new(&mut *source).poll_frame(cx));
        let frame = match patience {
            Some(patience) => match tokio::time::timeout(patience, next).await {
                Ok(frame) => frame,
                Err(_) => return Some(Err(io::ErrorKind::TimedOut.into())),
            },
            None => next.await,
        };
        match frame? {
            Ok(frame) => {
                if let Ok(data) = frame.into_data() {
                    return Some(Ok(data));
                }
            }
            Err(error) => return Some(Err(io::Error::other(error))),
        }
    }
}

/// What becomes of a body that is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sent {
    /// All of it went out.
    Whole,
    /// It was not wanted any more.
    Unwanted,
    /// It came too slowly, broke off, or is not what was announced.
    Failed(FileFault),
}

/// Sends what comes from a caller to a guest. With `sha256`, content of another one never comes to its end.
pub(super) fn send<S, E>(source: S, sha256: Option<String>) -> (Pieces, oneshot::Receiver<Sent>)
where
    S: Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
    E: Send + 'static,
{
    let (out, pieces) = mpsc::channel(AHEAD);
    let (tell, told) = oneshot::channel();
    task::spawn("upload", async move {
        let mut source = source;
        let sent = carry(&mut source, &out, sha256).await;
        if matches!(sent, Sent::Failed(_)) {
            // Before it is told why, so that what is asked next finds it broken. Whoever would hear it may be gone.
            let _ = out.send_timeout(Err(io::ErrorKind::ConnectionAborted.into()), STALLED).await;
        }
        let is_unwanted = sent == Sent::Unwanted;
        drop(out);
        let _ = tell.send(sent);
        if is_unwanted {
            discard(source).await;
        }
    });
    (Pieces { pieces, left: None, joins: true, failed: None }, told)
}

async fn carry<S, E>(source: &mut S, out: &mpsc::Sender<io::Result<Bytes>>, sha256: Option<String>) -> Sent
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    // It takes an eighth of all that an upload takes of the CPUs.
    let mut hash = sha256.is_some().then(Sha256::new);
    loop {
        let next = tokio::select! {
            () = out.closed() => return Sent::Unwanted,
            next = tokio::time::timeout(STALLED, source.next()) => next,
        };
        match next {
            Ok(Some(Ok(piece))) if piece.is_empty() => {}
            Ok(Some(Ok(piece))) => {
                if let Some(hash) = &mut hash {
                    hash.update(&piece);
                }
                match out.send_timeout(Ok(piece), STALLED).await {
                    Ok(()) => {}
                    Err(mpsc::error::SendTimeoutError::Closed(_)) => return Sent::Unwanted,
                    Err(mpsc::error::SendTimeoutError::Timeout(_)) => return Sent::Failed(FileFault::Failed),
                }
            }
            Ok(Some(Err(_))) => return Sent::Failed(FileFault::BrokeOff),
            Ok(None) => break,
            Err(_) => return Sent::Failed(FileFault::Stalled),
        }
    }
    let found = hash.map(|hash| hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    if found == sha256 { Sent::Whole } else { Sent::Failed(FileFault::Digest) }
}

/// Lets a caller that does not look up while it sends come to its end, within bounds.
async fn discard<S, E>(mut source: S)
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    let mut left = DISCARDED.1;
    let taking = async {
        while let Some(Ok(piece)) = source.next().await {
            left = left.saturating_sub(piece.len());
            if left == 0 {
                return;
            }
        }
    };
    // What is still to come is cut off with the connection.
    let _ = tokio::time::timeout(DISCARDED.0, taking).await;
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    fn pieces(of: &[&'static str]) -> impl Stream<Item = Result<Bytes, ()>> + Send + Unpin + 'static + use<> {
        futures_util::stream::iter(of.iter().map(|text| Ok(Bytes::from_static(text.as_bytes()))).collect::<Vec<_>>())
    }

    #[tokio::test]
    async fn content_that_was_not_announced_never_ends_well() {
        let right = "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9";
        for (sha256, is_whole) in [(None, true), (Some(right.to_owned()), true), (Some("0".repeat(64)), false)] {
            let (body, told) = send(pieces(&["hello ", "world"]), sha256);
            let all = body.collect().await.map(|all| all.to_bytes());
            assert_eq!(all.is_ok(), is_whole);
            let expected = if is_whole { Sent::Whole } else { Sent::Failed(FileFault::Digest) };
            assert_eq!(told.await.unwrap(), expected);
        }
    }

    #[tokio::test]
    async fn what_waits_goes_as_one_and_an_error_behind_it_is_told() {
        let (out, pieces) = mpsc::channel(AHEAD);
        for piece in [Ok("a"), Ok("b"), Err(io::ErrorKind::ConnectionAborted), Ok("c")] {
            out.try_send(piece.map(|text| Bytes::from_static(text.as_bytes())).map_err(io::Error::from)).unwrap();
        }
        drop(out);
        let mut body = Pieces { pieces, left: None, joins: true, failed: None };
        let mut next = async || body.frame().await.map(|frame| frame.map(|frame| frame.into_data().unwrap()));
        assert_eq!(next().await.unwrap().unwrap(), "ab");
        assert_eq!(next().await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(next().await.unwrap().unwrap(), "c");
        assert!(next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn neither_side_is_waited_for_without_end() {
        let silent = futures_util::stream::pending::<Result<Bytes, ()>>();
        let (body, told) = send(silent, None);
        assert!(body.collect().await.is_err());
        assert_eq!(told.await.unwrap(), Sent::Failed(FileFault::Stalled));

        let endless = futures_util::stream::repeat_with(|| Ok::<_, ()>(Bytes::from_static(b"x")));
        let (_unread, told) = send(endless, None);
        assert_eq!(told.await.unwrap(), Sent::Failed(FileFault::Failed));

        let (body, told) = send(pieces(&["x"; 100]), None);
        drop(body);
        assert_eq!(told.await.unwrap(), Sent::Unwanted);
    }
}
