//! Carries one open connection both ways, counts what passes, and breaks it off when it is cut, idle for too long, or has moved too much.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::domain::egress::hello::{FirstWords, Look};

/// Bytes that are read at once.
const PIECE: usize = 64 * 1024;

/// What passes in one direction: of this connection, and of the whole session.
pub(super) struct Meter<'a> {
    pub(super) own: AtomicU64,
    pub(super) session: &'a AtomicU64,
    pub(super) most: Option<u64>,
    /// Told of each piece.
    pub(super) count: &'a (dyn Fn(usize) + Sync),
}

impl Meter<'_> {
    fn pass(&self, bytes: usize) -> Result<(), Stop> {
        let before = self.session.fetch_add(bytes as u64, Ordering::Relaxed);
        if self.most.is_some_and(|most| before.saturating_add(bytes as u64) > most) {
            self.session.fetch_sub(bytes as u64, Ordering::Relaxed);
            return Err(Stop::Spent);
        }
        self.own.fetch_add(bytes as u64, Ordering::Relaxed);
        (self.count)(bytes);
        Ok(())
    }
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// Both sides have said all.
    Done,
    /// One side broke it off.
    Broken,
    /// Nothing moved for too long.
    Idle,
    /// As many bytes have passed as may.
    Spent,
    /// It may not be any more.
    Cut,
    /// Its first words are for a server of another name, or can't be read.
    WrongName,
}

impl Ended {
    /// A word for programs.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Broken => "broken",
            Self::Idle => "idle",
            Self::Spent => "too-many-bytes",
            Self::Cut => "cut",
            Self::WrongName => "wrong-name",
        }
    }
}

/// Why carrying ends early.
enum Stop {
    Broken,
    Spent,
    WrongName,
}

impl From<io::Error> for Stop {
    fn from(_: io::Error) -> Self {
        Self::Broken
    }
}

/// Carries until both sides have ended, or one of the other ends comes.
pub(super) async fn carry(
    (cell, out): (impl AsyncRead + AsyncWrite + Unpin, impl AsyncRead + AsyncWrite + Unpin),
    (sent, received): (&Meter<'_>, &Meter<'_>),
    name: Option<&str>,
    idle: Duration,
    cut: &CancellationToken,
) -> Ended {
    let moved = Notify::new();
    let (mut cell_in, mut cell_out) = tokio::io::split(cell);
    let (mut out_in, mut out_out) = tokio::io::split(out);
    let both = async {
        tokio::try_join!(
            pump_checked(&mut cell_in, &mut out_out, sent, &moved, name),
            pump(&mut out_in, &mut cell_out, received, &moved)
        )
    };
    let idles = async { while tokio::time::timeout(idle, moved.notified()).await.is_ok() {} };
    tokio::select! {
        ended = both => match ended {
            Ok(_) => Ended::Done,
            Err(Stop::Spent) => Ended::Spent,
            Err(Stop::WrongName) => Ended::WrongName,
            Err(Stop::Broken) => Ended::Broken,
        },
        () = idles => Ended::Idle,
        () = cut.cancelled() => Ended::Cut,
    }
}

/// The same as [`pump`], but what begins like TLS gets nowhere before it has named the server that was asked for, or nobody.
async fn pump_checked(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    meter: &Meter<'_>,
    moved: &Notify,
    name: Option<&str>,
) -> Result<(), Stop> {
    let Some(name) = name else { return pump(from, to, meter, moved).await };
    let (mut begun, mut words, mut seen) = (Vec::new(), FirstWords::default(), 0);
    loop {
        let is_over = from.read_buf(&mut begun).await? == 0;
        let look = words.look(&begun[seen..]);
        seen = begun.len();
        match look {
            Look::More if !is_over => continue,
            Look::Name(meant) if !meant.trim_end_matches('.').eq_ignore_ascii_case(name) => {
                return Err(Stop::WrongName);
            }
            Look::Wrong => return Err(Stop::WrongName),
            Look::More | Look::NotTls | Look::NoName | Look::Name(_) => break,
        }
    }
    if !begun.is_empty() {
        meter.pass(begun.len())?;
        moved.notify_one();
        to.write_all(&begun).await?;
        to.flush().await?;
    }
    drop(begun);
    pump(from, to, meter, moved).await
}

async fn pump(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    meter: &Meter<'_>,
    moved: &Notify,
) -> Result<(), Stop> {
    let mut piece = vec![0; PIECE];
    loop {
        let read = from.read(&mut piece).await?;
        if read == 0 {
            return Ok(to.shutdown().await?);
        }
        meter.pass(read)?;
        moved.notify_one();
        to.write_all(&piece[..read]).await?;
        to.flush().await?;
        moved.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ended(most: Option<u64>, idle: Duration, send: usize, cut: bool) -> (Ended, u64) {
        let (mut code, cell) = tokio::io::duplex(1024);
        let (mut server, out) = tokio::io::duplex(1024);
        let (all_sent, all_received) = (AtomicU64::new(0), AtomicU64::new(0));
        let count = |_| {};
        let sent = Meter { own: AtomicU64::new(0), session: &all_sent, most, count: &count };
        let received = Meter { own: AtomicU64::new(0), session: &all_received, most: None, count: &count };
        let token = CancellationToken::new();
        let talk = async {
            let mut told = Vec::new();
            let say = async {
                // It may be broken off in the middle.
                let _ = code.write_all(&vec![7; send]).await;
                if cut {
                    token.cancel();
                }
                if idle > Duration::from_secs(60) && !cut {
                    let _ = code.shutdown().await;
                }
                let _ = code.read_to_end(&mut Vec::new()).await;
            };
            let hear = async {
                let _ = server.read_to_end(&mut told).await;
                let _ = server.shutdown().await;
            };
            tokio::join!(say, hear);
        };
        let carried = carry((cell, out), (&sent, &received), Some("example.org"), idle, &token);
        let (ended, ()) = tokio::join!(carried, talk);
        (ended, all_sent.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn a_connection_ends_in_each_of_its_ways() {
        let long = Duration::from_secs(600);
        assert_eq!(ended(None, long, 100_000, false).await, (Ended::Done, 100_000));
        assert_eq!(ended(Some(100_000), long, 100_000, false).await, (Ended::Done, 100_000));
        let (how, bytes) = ended(Some(50_000), long, 100_000, false).await;
        assert_eq!(how, Ended::Spent);
        assert!(bytes <= 50_000);
        assert_eq!(ended(None, Duration::from_millis(50), 10, false).await.0, Ended::Idle);
        assert_eq!(ended(None, long, 10, true).await.0, Ended::Cut);
    }
}
