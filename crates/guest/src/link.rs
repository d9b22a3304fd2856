//! The link: HTTP/2 over the container's own stdin and stdout, begun anew at every reset marker, and the lease.
//!
//! One task reads stdin and never waits for stdout. It hands bytes to the present connection's bounded inbox and gives the
//! connection up when that overflows; only a new marker begins another.
//!
//! ```text
//! stdin ─▶ scanner ─┬─ bytes ──▶ inbox ─▶ connection n (hyper) ─▶ stdout
//!                   └─ marker ─▶ n is dropped; n+1 echoes the marker, then serves
//! ```

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use cellblock_wire::marker::{LinkSecret, MARKER_LEN, Marker, MarkerScanner, Scanned};
use hyper::rt::ReadBufCursor;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::TokioExecutor;
use rustix::fs::OFlags;
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::api::Guest;

/// Streams that may be open at once: events, requests, and what lasts (files on their way, commands that are followed or waited for,
/// connections).
const MAX_STREAMS: u32 = 512;
/// Files come at this size in each round trip.
const STREAM_WINDOW: u32 = 4 * 1024 * 1024;
/// What all streams together can have on the way, as far as the control plane lets them: few of them are files, and byte streams have
/// [a window of their own](cellblock_wire::tunnel::WINDOW).
const CONNECTION_WINDOW: u32 = 128 * 1024 * 1024;
/// What a peer who keeps to the windows can ever have on the way, and some room for heads and control frames.
const MAX_INBOX: usize = CONNECTION_WINDOW as usize + 4 * 1024 * 1024;
const READ: usize = 256 * 1024;
/// What the pipes to the engine are asked to hold: fewer turns for files.
const PIPE: usize = 1024 * 1024;
/// The end of a marker follows its beginning at once; bytes that only look like a beginning wait no longer than this.
const MARKER_TIME: Duration = Duration::from_millis(2);
/// How often a closed stdin is looked at: an engine may open it again.
const CLOSED_POLL: Duration = Duration::from_millis(100);
/// Silence is counted in steps of at most this long.
const TICK: Duration = Duration::from_secs(5);

/// How long nothing was heard, as far as this process ran meanwhile: the clock goes on while a container is frozen, and a guest that can't hear has
/// not been left alone. So no step counts for more than it was meant to take.
#[derive(Debug)]
struct Silence {
    counted: Duration,
    since: Instant,
}

impl Silence {
    fn begins(now: Instant) -> Self {
        Self { counted: Duration::ZERO, since: now }
    }

    /// Counts the step up to now.
    fn pass(&mut self, now: Instant, lease: Duration) {
        let step = self.step(lease);
        self.counted += now.saturating_duration_since(self.since).min(step);
        self.since = now;
    }

    /// How long the next step is meant to take; nothing once the lease is over.
    fn step(&self, lease: Duration) -> Duration {
        lease.saturating_sub(self.counted).min(TICK)
    }
}

/// A copy of a descriptor that kernels don't inherit and that is never waited for inside a call.
fn own(fd: impl AsFd) -> io::Result<OwnedFd> {
    let fd = rustix::io::fcntl_dupfd_cloexec(fd, 3)?;
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    // It goes with less, and what is no pipe has none.
    let _ = rustix::pipe::fcntl_setpipe_size(&fd, PIPE);
    Ok(fd)
}

#[derive(Default)]
struct Inbox {
    pieces: VecDeque<Vec<u8>>,
    /// Bytes of the first piece that were read already.
    used: usize,
    bytes: usize,
    waker: Option<Waker>,
}

/// What the reading task and a connection share.
struct Shared {
    stdout: Mutex<pipe::Sender>,
    /// The number of the present connection; another one's writes are refused.
    current: AtomicU64,
}

struct Wire {
    shared: Arc<Shared>,
    number: u64,
    inbox: Arc<Mutex<Inbox>>,
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wire {
    fn is_current(&self) -> bool {
        self.shared.current.load(Ordering::Relaxed) == self.number
    }

    fn poll_send(&self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.is_current() {
            true => Pin::new(&mut *lock(&self.shared.stdout)).poll_write(context, bytes),
            false => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    async fn send_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let wrote = std::future::poll_fn(|context| self.poll_send(context, bytes)).await?;
            bytes = &bytes[wrote..];
        }
        Ok(())
    }
}

impl hyper::rt::Read for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inbox = lock(&self.inbox);
        let Some(piece) = inbox.pieces.front() else {
            inbox.waker = Some(context.waker().clone());
            return Poll::Pending;
        };
        let rest = &piece[inbox.used..];
        let count = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..count]);
        let finished = count == rest.len();
        inbox.bytes -= count;
        inbox.used += count;
        if finished {
            inbox.pieces.pop_front();
            inbox.used = 0;
        }
        Poll::Ready(Ok(()))
    }
}

impl hyper::rt::Write for Wire {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_send(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The link's end in the container.
pub struct Link {
    guest: Arc<Guest>,
    stdin: pipe::Receiver,
    shared: Arc<Shared>,
    orphan_timeout: watch::Receiver<Duration>,
    secret: Cell<Option<LinkSecret>>,
    /// The present connection's inbox; dropping the sender ends the connection.
    connection: Option<(Arc<Mutex<Inbox>>, watch::Sender<()>)>,
}

impl Link {
    /// Takes over stdin and stdout.
    ///
    /// # Errors
    /// When they can't be waited for, as files can't.
    pub fn open(guest: Guest) -> io::Result<Self> {
        let orphan_timeout = guest.orphan_timeout.subscribe();
        // Unchecked: they may be sockets too, and are read and written the same way.
        let stdin = pipe::Receiver::from_owned_fd_unchecked(own(rustix::stdio::stdin())?)?;
        let stdout = pipe::Sender::from_owned_fd_unchecked(own(rustix::stdio::stdout())?)?;
        Ok(Self {
            guest: Arc::new(guest),
            stdin,
            shared: Arc::new(Shared { stdout: Mutex::new(stdout), current: AtomicU64::new(0) }),
            orphan_timeout,
            secret: Cell::new(None),
            connection: None,
        })
    }

    /// Serves until nothing was heard for the time of the lease.
    pub async fn serve(mut self) {
        let mut scanner = MarkerScanner::default();
        let mut buffer = vec![0; READ];
        let mut silence = Silence::begins(Instant::now());
        let mut closed = false;
        loop {
            let lease = *self.orphan_timeout.borrow_and_update();
            if closed {
                tokio::time::sleep(CLOSED_POLL).await;
            }
            silence.pass(Instant::now(), lease);
            let step = silence.step(lease);
            if step.is_zero() {
                return;
            }
            tokio::select! {
                read = self.stdin.read(&mut buffer) => {
                    let read = read.unwrap_or(0);
                    closed = read == 0;
                    if !closed {
                        silence = Silence::begins(Instant::now());
                        self.take(&mut scanner, &buffer[..read]);
                    }
                }
                () = tokio::time::sleep(MARKER_TIME), if scanner.is_holding() => self.feed(scanner.release()),
                () = tokio::time::sleep_until(silence.since + step) => {}
                _ = self.orphan_timeout.changed() => {}
            }
        }
    }

    fn take(&mut self, scanner: &mut MarkerScanner, read: &[u8]) {
        let secret = &self.secret;
        let pieces = scanner.push(read, |marker| match secret.get() {
            None => {
                secret.set(Some(marker.secret));
                true
            }
            Some(secret) => same(&secret, &marker.secret),
        });
        for piece in pieces {
            match piece {
                Scanned::Bytes(bytes) => self.feed(bytes),
                Scanned::Marker(marker) => self.reset(&marker),
            }
        }
    }

    fn feed(&mut self, bytes: Vec<u8>) {
        let Some((inbox, _)) = &self.connection else { return };
        let mut inbox = lock(inbox);
        inbox.bytes += bytes.len();
        inbox.pieces.push_back(bytes);
        if let Some(waker) = inbox.waker.take() {
            waker.wake();
        }
        let overflows = inbox.bytes > MAX_INBOX;
        drop(inbox);
        if overflows {
            self.drop_connection();
        }
    }

    fn drop_connection(&mut self) {
        self.connection = None;
        self.shared.current.fetch_add(1, Ordering::Relaxed);
    }

    fn reset(&mut self, marker: &Marker) {
        self.drop_connection();
        let inbox = Arc::<Mutex<Inbox>>::default();
        let (alive, ended) = watch::channel(());
        let number = self.shared.current.load(Ordering::Relaxed);
        let wire = Wire { shared: self.shared.clone(), number, inbox: inbox.clone() };
        self.connection = Some((inbox, alive));
        tokio::spawn(serve_connection(self.guest.clone(), wire, marker.to_bytes(), ended));
    }
}

/// Compares without telling by its time where the difference is.
fn same(a: &LinkSecret, b: &LinkSecret) -> bool {
    a.0.iter().zip(b.0).fold(0, |different, (a, b)| different | (a ^ b)) == 0
}

async fn serve_connection(guest: Arc<Guest>, wire: Wire, echo: [u8; MARKER_LEN], mut ended: watch::Receiver<()>) {
    let serving = async {
        if wire.send_all(&echo).await.is_err() {
            return;
        }
        let service = service_fn(|request| guest.clone().serve(request));
        // A connection that breaks is followed by the control plane's next marker; there is nobody to tell here.
        let _ = server().serve_connection(wire, service).await;
    };
    tokio::select! {
        () = serving => {}
        _ = ended.changed() => {}
    }
}

fn server() -> http2::Builder<TokioExecutor> {
    let mut server = http2::Builder::new(TokioExecutor::new());
    server
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(256 * 1024)
        .max_header_list_size(64 * 1024)
        .max_pending_accept_reset_streams(MAX_STREAMS as usize)
        .max_local_error_reset_streams(MAX_STREAMS as usize)
        .max_send_buf_size(1024 * 1024)
        .keep_alive_interval(None)
        .auto_date_header(false);
    server
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(60);

    #[test]
    fn a_lease_is_over_after_its_time_of_running() {
        let began = Instant::now();
        let mut silence = Silence::begins(began);
        let mut now = began;
        while !silence.step(LEASE).is_zero() {
            now += silence.step(LEASE);
            silence.pass(now, LEASE);
        }
        assert_eq!(now - began, LEASE);
    }

    #[test]
    fn frozen_time_counts_for_one_step_at_most() {
        let began = Instant::now();
        let mut silence = Silence::begins(began);
        let thawed = began + Duration::from_secs(86_400);
        silence.pass(thawed, LEASE);
        assert_eq!(silence.counted, TICK);
        silence.pass(thawed + Duration::from_secs(1), LEASE);
        assert_eq!(silence.counted, TICK + Duration::from_secs(1));
    }

    #[test]
    fn a_shorter_lease_may_be_over_at_once() {
        let began = Instant::now();
        let mut silence = Silence::begins(began);
        silence.pass(began + TICK, LEASE);
        assert!(silence.step(TICK).is_zero());
        assert!(!silence.step(LEASE).is_zero());
    }
}
