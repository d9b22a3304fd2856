//! Files over a long way, beside a raw TCP copy over the same: once the caller is far from the server, once the server from its engine.
//!
//! The way is a relay: on loopback before the server, and on a socket in a folder of the bench's own before the engine, for who reaches the
//! engine has the machine. What a TCP connection has under way and not acknowledged is bounded, as Linux bounds it (`tcp_wmem`); without
//! that a long way would cost a raw copy nothing.

#![expect(clippy::disallowed_methods, reason = "a panic of the bench ends it, and tasks of its own end with it")]

use std::collections::VecDeque;
use std::fs::Permissions;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep_until};

use crate::Result;
use crate::figures::Figures;
use crate::measure::say;
use crate::server::Server;

const ROUNDS: usize = 5;
/// Half a second's worth of what the way bears, or more.
const BYTES: usize = 64 << 20;
/// One way; the round trip is twice this.
const ONE_WAY: Duration = Duration::from_millis(25);
/// What is under way at most: the largest that Linux lets a socket's send buffer grow to by itself.
const UNDER_WAY: usize = 4 << 20;
const PIECE: usize = 64 << 10;
/// What a raw copy may be faster at most.
const TARGET: f64 = 2.0;
const ENGINE: &str = "/var/run/docker.sock";

/// Both ways, in turns with a raw copy over each.
pub async fn far(figures: &mut Figures) -> Result<()> {
    say("far");
    let raw = raw().await?;
    {
        let mut server = Server::start("").await?;
        server.reach_by(relay(server.address()?).await?);
        let names = ["file, in, the caller 50 ms away", "file, out, the caller 50 ms away"];
        measure(&server, raw, names, figures).await?;
        server.stop().await?;
    }
    let folder = tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir()?;
    let engine = folder.path().join("engine.sock");
    relay_engine(&engine)?;
    let server = Server::start(&format!("[engine]\nhost = \"unix://{}\"\n", engine.display())).await?;
    let names = ["file, in, the engine 50 ms away", "file, out, the engine 50 ms away"];
    measure(&server, raw, names, figures).await?;
    server.stop().await
}

async fn measure(server: &Server, raw: SocketAddr, names: [&'static str; 2], figures: &mut Figures) -> Result<()> {
    let session = server.create_with(512, 256).await?;
    let mut found = [const { Vec::new() }; 4];
    for round in 0..=ROUNDS {
        let rates = [
            rate(server.put_file(&session, BYTES)).await?,
            rate(server.get_file(&session, BYTES)).await?,
            rate(copy_in(raw)).await?,
            rate(copy_out(raw)).await?,
        ];
        if round > 0 {
            found.iter_mut().zip(rates).for_each(|(found, rate)| found.push(rate));
        }
    }
    server.delete(&session).await?;
    let [put, get, copied_in, copied_out] = found;
    for (name, direction, ours, theirs) in
        [(names[0], "raw TCP copy, in", put, copied_in), (names[1], "raw TCP copy, out", get, copied_out)]
    {
        figures.add(name, "MB/s", ours);
        figures.add(direction, "MB/s", theirs);
        figures.compare(name, direction, name, Some(TARGET));
    }
    Ok(())
}

async fn rate(work: impl Future<Output = Result<()>>) -> Result<f64> {
    let started = Instant::now();
    work.await?;
    Ok(BYTES as f64 / 1e6 / started.elapsed().as_secs_f64())
}

/// A relay to a peer that takes `BYTES` after an `i` and answers a byte, and sends as many after an `o`.
async fn raw() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                match stream.read_u8().await? {
                    b'i' => {
                        take(&mut stream).await?;
                        stream.write_all(b".").await
                    }
                    _ => give(&mut stream).await,
                }
            });
        }
    });
    relay(address).await
}

async fn copy_in(raw: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(raw).await?;
    stream.write_all(b"i").await?;
    give(&mut stream).await?;
    stream.read_u8().await?;
    Ok(())
}

async fn copy_out(raw: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(raw).await?;
    stream.write_all(b"o").await?;
    Ok(take(&mut stream).await?)
}

async fn give(stream: &mut TcpStream) -> std::io::Result<()> {
    let piece = vec![b'x'; PIECE];
    for _ in 0..BYTES / PIECE {
        stream.write_all(&piece).await?;
    }
    Ok(())
}

async fn take(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; PIECE];
    let mut left = BYTES;
    while left > 0 {
        let most = left.min(PIECE);
        left -= match stream.read(&mut buffer[..most]).await? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            read => read,
        };
    }
    Ok(())
}

/// Listens on loopback, and leads each connection over the long way.
async fn relay(to: SocketAddr) -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            tokio::spawn(async move {
                let far = TcpStream::connect(to).await?;
                near.set_nodelay(true)?;
                far.set_nodelay(true)?;
                lead(near.into_split(), far.into_split()).await;
                std::io::Result::Ok(())
            });
        }
    });
    Ok(address)
}

/// The same to the engine, on a socket at a path.
fn relay_engine(at: &Path) -> Result<()> {
    let listener = UnixListener::bind(at)?;
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            tokio::spawn(async move {
                let far = UnixStream::connect(ENGINE).await?;
                lead(near.into_split(), far.into_split()).await;
                std::io::Result::Ok(())
            });
        }
    });
    Ok(())
}

async fn lead<R, W>((near_read, near_write): (R, W), (far_read, far_write): (R, W))
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    tokio::join!(carry(near_read, far_write), carry(far_read, near_write));
}

/// A piece under way: when it arrives, what it is, and its part of what may be under way.
type UnderWay = (Instant, Bytes, OwnedSemaphorePermit);

/// One direction: what is read arrives after [`ONE_WAY`], and makes room for more as long after that, when its acknowledgement is back.
async fn carry(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let room = Arc::new(Semaphore::new(UNDER_WAY));
    let (send, mut receive) = mpsc::channel::<UnderWay>(UNDER_WAY / PIECE * 16);
    let reading = async move {
        let mut buffer = vec![0; PIECE];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            let piece = Bytes::copy_from_slice(&buffer[..read]);
            let Ok(part) = Arc::clone(&room).acquire_many_owned(u32::try_from(read).unwrap_or(1)).await else { return };
            if send.send((Instant::now() + ONE_WAY, piece, part)).await.is_err() {
                return;
            }
        }
    };
    let writing = async move {
        let mut acknowledged = VecDeque::new();
        loop {
            let first = acknowledged.front().map(|(due, _): &(Instant, OwnedSemaphorePermit)| *due);
            tokio::select! {
                () = async { sleep_until(first.unwrap_or_else(Instant::now)).await }, if first.is_some() => drop(acknowledged.pop_front()),
                next = receive.recv() => {
                    let Some((due, piece, part)) = next else { break };
                    sleep_until(due).await;
                    if to.write_all(&piece).await.is_err() { break }
                    acknowledged.push_back((Instant::now() + ONE_WAY, part));
                }
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}
