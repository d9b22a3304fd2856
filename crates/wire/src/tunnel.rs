//! Byte streams within the link: one request is one stream, with both bodies open, and a window of its own.
//!
//! HTTP/2 has windows too, and they would do if every reader read: but code in a cell that leaves a connection unread, or a remote host that does,
//! would hold a part of the connection's window, which the kernels' messages need. So neither side sends more than [`WINDOW`] bytes that the
//! other's reader has not taken, and what is on its way is always read into a buffer of that size.
//!
//! A body is a sequence of frames: a byte of kind, three bytes of a number (big-endian), and for data as many bytes.
//!
//! | kind | number | |
//! |---|---|---|
//! | 0 | length | data |
//! | 1 | bytes | credit: so many more may be sent |
//! | 2 | 0 | no more data follows; credit may |
//!
//! A body that ends without a frame of kind 2 broke off. Connections, terminals and whatever else is a byte stream run over this; it does not know what it carries.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::task::AtomicWaker;
use http_body::{Body, Frame};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that may be on their way in one direction without having been taken.
pub const WINDOW: usize = 512 * 1024;
/// The same for what many may leave unread at once, such as a command's events: all that one session's callers may follow fit into the connection's
/// window, and leave most of it to the kernels. Both sides have to mean the same, which the path of the request says.
pub const NARROW: usize = 128 * 1024;
/// Most bytes of one frame of data.
const CHUNK: usize = 64 * 1024;
/// Credit is given back in pieces of at least this part of a window.
const CREDIT_STEPS: usize = 4;
const HEAD: usize = 4;

const DATA: u8 = 0;
const CREDIT: u8 = 1;
const END: u8 = 2;

/// What one body's frames say, in order.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Data(Bytes),
    Credit(usize),
    End,
}

/// Takes frames out of what arrives. Holds less than one frame's head.
#[derive(Debug, Default)]
struct Decoder {
    head: BytesMut,
    /// Bytes of data that are still to come of the present frame.
    data_left: usize,
}

impl Decoder {
    /// The next piece of `bytes`, which is shortened by it; nothing when more is needed.
    fn next(&mut self, bytes: &mut Bytes) -> io::Result<Option<Told>> {
        if self.data_left > 0 && !bytes.is_empty() {
            let data = bytes.split_to(self.data_left.min(bytes.len()));
            self.data_left -= data.len();
            return Ok(Some(Told::Data(data)));
        }
        while self.head.len() < HEAD && !bytes.is_empty() {
            self.head.put_u8(bytes.get_u8());
        }
        if self.head.len() < HEAD {
            return Ok(None);
        }
        let head = self.head.split().get_u32();
        let (kind, number) = ((head >> 24) as u8, (head & 0x00ff_ffff) as usize);
        match kind {
            DATA if (1..=CHUNK).contains(&number) => {
                self.data_left = number;
                self.next(bytes)
            }
            CREDIT if (1..=WINDOW).contains(&number) => Ok(Some(Told::Credit(number))),
            END if number == 0 => Ok(Some(Told::End)),
            _ => Err(broken("a frame that is none")),
        }
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the stream holds {what}"))
}

fn head(kind: u8, number: usize) -> [u8; HEAD] {
    ((u32::from(kind) << 24) | number as u32).to_be_bytes()
}

/// What both ends of this side share: frames that wait to be sent.
#[derive(Debug, Default)]
struct Outbox {
    frames: VecDeque<Bytes>,
    /// Bytes of data among them.
    waiting: usize,
    body_waker: Option<Waker>,
    /// All has been said.
    ended: bool,
    /// The tunnel was dropped before it was closed.
    dropped: bool,
    /// The body was dropped: the peer hears nothing any more.
    deaf: bool,
    wakers: Arc<Both>,
}

fn lock(outbox: &Mutex<Outbox>) -> MutexGuard<'_, Outbox> {
    outbox.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Outbox {
    fn push(&mut self, frame: Bytes) {
        self.frames.push_back(frame);
        self.wake();
    }

    fn wake(&mut self) {
        if let Some(waker) = self.body_waker.take() {
            waker.wake();
        }
    }
}

/// Reader and writer may be polled by two tasks, and both wait for what comes over the one body.
#[derive(Debug, Default)]
struct Both {
    reader: AtomicWaker,
    writer: AtomicWaker,
}

impl Wake for Both {
    fn wake(self: Arc<Self>) {
        self.reader.wake();
        self.writer.wake();
    }
}

/// One side's end of a byte stream. Dropping it before it was shut down breaks the stream off.
#[derive(Debug)]
pub struct Tunnel<B> {
    incoming: B,
    decoder: Decoder,
    /// What has arrived and was not decoded, of one frame of the body.
    undecoded: Bytes,
    /// Data that waits for the reader: at most [`WINDOW`] bytes, in one piece, since the peer may send it in pieces of one byte.
    unread: BytesMut,
    /// Bytes that were read and not given back as credit.
    taken: usize,
    peer_ended: bool,
    /// The body is over, or broken.
    incoming_over: bool,
    /// Bytes that may be on their way in one direction.
    window: usize,
    /// Bytes that may be sent.
    credit: usize,
    shut: bool,
    outbox: Arc<Mutex<Outbox>>,
    wakers: Arc<Both>,
}

/// The body that carries what a [`Tunnel`] sends.
#[derive(Debug)]
pub struct Outgoing(Arc<Mutex<Outbox>>);

/// Makes this side's end of a byte stream out of the body that comes in, and the body that is to go out. For a client, whose answer's body comes
/// later, there is [`begin`].
#[must_use]
pub fn tunnel<B>(incoming: B) -> (Tunnel<B>, Outgoing) {
    let (beginning, outgoing) = begin();
    (beginning.join(incoming), outgoing)
}

/// The same with a window of [`NARROW`].
#[must_use]
pub fn narrow<B>(incoming: B) -> (Tunnel<B>, Outgoing) {
    let (beginning, outgoing) = begin();
    (beginning.join_narrow(incoming), outgoing)
}

/// A byte stream whose incoming body is not there yet.
#[derive(Debug)]
pub struct Beginning(Option<Arc<Mutex<Outbox>>>);

/// Begins a byte stream: the body that is to go out, and what becomes the tunnel once there is the other one.
#[must_use]
pub fn begin() -> (Beginning, Outgoing) {
    let outbox = Arc::<Mutex<Outbox>>::default();
    (Beginning(Some(Arc::clone(&outbox))), Outgoing(outbox))
}

impl Beginning {
    /// The tunnel, with the body that comes in.
    #[must_use]
    pub fn join<B>(self, incoming: B) -> Tunnel<B> {
        self.join_within(incoming, WINDOW)
    }

    /// The same with a window of [`NARROW`].
    #[must_use]
    pub fn join_narrow<B>(self, incoming: B) -> Tunnel<B> {
        self.join_within(incoming, NARROW)
    }

    fn join_within<B>(mut self, incoming: B, window: usize) -> Tunnel<B> {
        let outbox = self.0.take().unwrap_or_default();
        let wakers = Arc::clone(&lock(&outbox).wakers);
        Tunnel {
            incoming,
            decoder: Decoder::default(),
            undecoded: Bytes::new(),
            unread: BytesMut::new(),
            taken: 0,
            peer_ended: false,
            incoming_over: false,
            window,
            credit: window,
            shut: false,
            outbox,
            wakers,
        }
    }
}

impl Drop for Beginning {
    fn drop(&mut self) {
        if let Some(outbox) = &self.0 {
            let mut outbox = lock(outbox);
            outbox.dropped = true;
            outbox.wake();
        }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Tunnel<B> {
    /// Takes what has come, until there is nothing more or the body is over. What data there may be is bounded by the window.
    fn take_in(&mut self) -> io::Result<()> {
        // After a mistake of the peer's nothing more is heard of it.
        self.take_frames().inspect_err(|_| self.incoming_over = true)
    }

    fn take_frames(&mut self) -> io::Result<()> {
        let waker = Waker::from(Arc::clone(&self.wakers));
        let mut context = Context::from_waker(&waker);
        loop {
            while let Some(told) = self.decoder.next(&mut self.undecoded)? {
                self.take_note(told)?;
            }
            if self.incoming_over {
                return Ok(());
            }
            match Pin::new(&mut self.incoming).poll_frame(&mut context) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Some(Ok(frame))) => self.undecoded = frame.into_data().unwrap_or_default(),
                Poll::Ready(Some(Err(_)) | None) => self.incoming_over = true,
            }
        }
    }

    fn take_note(&mut self, told: Told) -> io::Result<()> {
        match told {
            Told::Data(_) if self.peer_ended => return Err(broken("data after its end")),
            Told::Data(data) => {
                if self.unread.len() + data.len() + self.taken > self.window {
                    return Err(broken("more than was allowed to be on its way"));
                }
                self.unread.extend_from_slice(&data);
            }
            Told::Credit(bytes) => {
                self.credit += bytes;
                // What still waits here the peer has not taken: it may not be given credit for, however little of it the peer lets through.
                if self.credit + lock(&self.outbox).waiting > self.window {
                    return Err(broken("credit for what was not sent"));
                }
            }
            Told::End => self.peer_ended = true,
        }
        Ok(())
    }

    fn give_credit(&mut self) {
        if self.taken >= self.window / CREDIT_STEPS && !self.peer_ended {
            let credit = Bytes::copy_from_slice(&head(CREDIT, self.taken));
            self.taken = 0;
            lock(&self.outbox).push(credit);
        }
    }

    fn is_deaf(&self) -> bool {
        lock(&self.outbox).deaf
    }
}

fn broke_off() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the other side broke the stream off")
}

impl<B: Body<Data = Bytes> + Unpin> AsyncRead for Tunnel<B> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.wakers.reader.register(cx.waker());
        if this.unread.is_empty() {
            this.take_in()?;
        }
        if this.unread.is_empty() {
            return match (this.peer_ended, this.incoming_over) {
                (true, _) => Poll::Ready(Ok(())),
                (false, true) => Poll::Ready(Err(broke_off())),
                (false, false) => Poll::Pending,
            };
        }
        let length = this.unread.len().min(buf.remaining());
        buf.put_slice(&this.unread[..length]);
        this.unread.advance(length);
        this.taken += length;
        this.give_credit();
        Poll::Ready(Ok(()))
    }
}

impl<B: Body<Data = Bytes> + Unpin> AsyncWrite for Tunnel<B> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.wakers.writer.register(cx.waker());
        // Credit must be heard of also while nobody reads.
        this.take_in()?;
        if this.shut || this.is_deaf() || (this.incoming_over && !this.peer_ended) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let length = bytes.len().min(this.credit).min(CHUNK);
        if length == 0 && !bytes.is_empty() {
            return Poll::Pending;
        }
        if length > 0 {
            let mut frame = BytesMut::with_capacity(HEAD + length);
            frame.put_slice(&head(DATA, length));
            frame.put_slice(&bytes[..length]);
            this.credit -= length;
            let mut outbox = lock(&this.outbox);
            outbox.waiting += length;
            outbox.push(frame.freeze());
        }
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !std::mem::replace(&mut this.shut, true) {
            lock(&this.outbox).push(Bytes::copy_from_slice(&head(END, 0)));
        }
        Poll::Ready(Ok(()))
    }
}

impl<B> Drop for Tunnel<B> {
    fn drop(&mut self) {
        let mut outbox = lock(&self.outbox);
        match self.shut && self.peer_ended {
            true => outbox.ended = true,
            // What was shut down still goes out, and then the peer, who may go on sending, learns that nobody listens.
            false => outbox.dropped = true,
        }
        outbox.wake();
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let mut outbox = lock(&self.0);
        if let Some(frame) = outbox.frames.pop_front() {
            if frame.first() == Some(&DATA) {
                outbox.waiting = outbox.waiting.saturating_sub(frame.len() - HEAD);
            }
            return Poll::Ready(Some(Ok(Frame::data(frame))));
        }
        if outbox.ended {
            return Poll::Ready(None);
        }
        if outbox.dropped {
            return Poll::Ready(Some(Err(broke_off())));
        }
        outbox.body_waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        let mut outbox = lock(&self.0);
        outbox.deaf = true;
        outbox.frames.clear();
        outbox.waiting = 0;
        Arc::clone(&outbox.wakers).wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Two ends that hear each other.
    fn pair() -> (Tunnel<Outgoing>, Tunnel<Outgoing>) {
        let ((left, from_left), (right, from_right)) = (begin(), begin());
        (left.join(from_right), right.join(from_left))
    }

    /// A body of these bytes, in pieces, without an end.
    fn fed(pieces: Vec<Vec<u8>>) -> Tunnel<Outgoing> {
        let (_, outgoing) = begin();
        let mut outbox = lock(&outgoing.0);
        outbox.dropped = false;
        pieces.into_iter().for_each(|piece| outbox.frames.push_back(piece.into()));
        outbox.ended = true;
        drop(outbox);
        tunnel(outgoing).0
    }

    #[tokio::test]
    async fn bytes_arrive_in_both_directions_and_ends_are_told() {
        let (mut left, mut right) = pair();
        let sent: Vec<u8> = (0..3 * WINDOW + 7).map(|n| (n % 251) as u8).collect();
        let echoing = async {
            let (mut reader, mut writer) = tokio::io::split(&mut right);
            tokio::io::copy(&mut reader, &mut writer).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let asking = async {
            let (mut reader, mut writer) = tokio::io::split(&mut left);
            let writing = async {
                writer.write_all(&sent).await.unwrap();
                writer.shutdown().await.unwrap();
            };
            let mut heard = Vec::new();
            let reading = reader.read_to_end(&mut heard);
            tokio::join!(writing, reading).1.unwrap();
            heard
        };
        assert!(tokio::join!(echoing, asking).1 == sent);
    }

    #[tokio::test]
    async fn what_nobody_reads_is_bounded() {
        let ((left, from_left), (right, from_right)) = (begin(), begin());
        let narrow = (left.join_narrow(from_right), right.join_narrow(from_left));
        for ((mut left, mut right), window) in [(pair(), WINDOW), (narrow, NARROW)] {
            let mut written = 0;
            while let Some(more) = futures_util::FutureExt::now_or_never(left.write(&[7; 1000])) {
                written += more.unwrap();
            }
            assert_eq!(written, window);
            let mut taken = vec![0; window / CREDIT_STEPS];
            right.read_exact(&mut taken).await.unwrap();
            assert_eq!(left.write(&[7; 1000]).await.unwrap(), 1000, "what was read is made good");
        }
    }

    #[tokio::test]
    async fn a_writer_hears_of_credit_while_nobody_reads_on_its_side() {
        let (mut left, mut right) = pair();
        right.write_all(b"unread").await.unwrap();
        let reading = async {
            let mut all = vec![0; 4 * WINDOW];
            right.read_exact(&mut all).await.unwrap();
        };
        let writing = async { left.write_all(&vec![1; 4 * WINDOW]).await.unwrap() };
        tokio::join!(reading, writing);
    }

    #[tokio::test]
    async fn a_dropped_end_is_no_proper_end() {
        let (left, mut right) = pair();
        drop(left);
        assert_eq!(right.read(&mut [0; 8]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert!(right.write(b"x").await.is_err());
    }

    #[tokio::test]
    async fn what_breaks_the_rules_is_refused() {
        let too_much = (0..9).map(|_| [&head(DATA, CHUNK)[..], &[0; CHUNK]].concat()).collect();
        for (name, pieces) in [
            ("a kind that is none", vec![head(9, 0).to_vec()]),
            ("empty data", vec![head(DATA, 0).to_vec()]),
            ("a frame too long", vec![head(DATA, CHUNK + 1).to_vec()]),
            ("credit for nothing", vec![head(CREDIT, 1).to_vec()]),
            ("data after the end", vec![head(END, 0).to_vec(), head(DATA, 1).to_vec(), b"x".to_vec()]),
            ("more than the window", too_much),
        ] {
            let mut tunnel = fed(pieces);
            let mut all = Vec::new();
            let error = tunnel.read_to_end(&mut all).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{name}");
        }
    }

    #[tokio::test]
    async fn nobody_is_given_credit_for_what_has_not_left() {
        let credit = || Bytes::copy_from_slice(&head(CREDIT, WINDOW / CREDIT_STEPS));
        let (_, incoming) = begin();
        let told = Arc::clone(&incoming.0);
        lock(&told).dropped = false;
        let (mut tunnel, _unread) = tunnel(incoming);
        tunnel.write_all(&[1; 2 * WINDOW / CREDIT_STEPS]).await.unwrap();
        lock(&told).push(credit());
        assert_eq!(tunnel.write(b"x").await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    proptest! {
        #[test]
        fn whatever_comes_is_bounded(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..50)) {
            let mut tunnel = fed(pieces);
            let mut all = Vec::new();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            // It has no end, so it is an error at the latest where it stops, unless it told of one.
            let _ = runtime.block_on(tunnel.read_to_end(&mut all));
            prop_assert!(all.len() <= 50 * 200);
        }
    }
}
