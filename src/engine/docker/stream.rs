//! A cell's stdin and stdout as one byte stream, over an attach connection.
//!
//! Docker sends stdout in frames of its own, which are taken off here. What the bytes mean is not known here.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use bollard::container::{AttachContainerResults, LogOutput};
use bytes::{Buf, Bytes};
use futures_util::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

type Output = Pin<Box<dyn Stream<Item = Result<LogOutput, bollard::errors::Error>> + Send>>;
type Input = Pin<Box<dyn AsyncWrite + Send>>;

/// The stream. Dropping it closes the connection whole: while any part of it is open, the engine answers no other attach.
pub(super) struct AttachStream {
    output: Output,
    input: Input,
    unread: Bytes,
}

impl AttachStream {
    pub(super) fn new(attached: AttachContainerResults) -> Self {
        Self { output: attached.output, input: attached.input, unread: Bytes::new() }
    }
}

impl Drop for AttachStream {
    fn drop(&mut self) {
        // The end of our stdin is what the engine notices at once, even when the cell is silent. The socket itself is
        // closed when both halves, which share it, are dropped with this struct.
        let _ = self.input.as_mut().poll_shutdown(&mut Context::from_waker(Waker::noop()));
    }
}

impl AsyncRead for AttachStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.unread.is_empty() {
            match ready!(self.output.as_mut().poll_next(cx)) {
                None => return Poll::Ready(Ok(())),
                Some(Ok(LogOutput::StdOut { message })) => self.unread = message,
                // Stderr was not asked for, and without a terminal there are no bytes outside frames.
                Some(Ok(_)) => {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "not a frame of stdout")));
                }
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
            }
        }
        let length = self.unread.len().min(buf.remaining());
        buf.put_slice(&self.unread[..length]);
        self.unread.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for AttachStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.input.as_mut().poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.input.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.input.as_mut().poll_shutdown(cx)
    }
}
