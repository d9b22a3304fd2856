//! Connections to what code listens on: loopback only, and bytes only. What is spoken on them is not looked at.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use cellblock_wire::tunnel::{Outgoing, Tunnel, tunnel};
use hyper::body::Incoming;
use tokio::net::TcpStream;

use crate::api::Refused;

/// Loopback answers at once, unless a listener's queue is full.
const CONNECT: Duration = Duration::from_secs(5);
/// Bytes that are copied at a time, in each direction.
const PIECE: usize = 16 * 1024;

/// Connects to a port, and gives what the connection sends.
///
/// # Errors
/// When this is no port, nothing listens there, or it does not take the connection.
pub async fn open(port: &str, incoming: Incoming) -> Result<Outgoing, Refused> {
    let port = port.parse().ok().filter(|port: &u16| *port > 0);
    let port = port.ok_or_else(|| Refused::invalid("a port is a number from 1 to 65535"))?;
    let stream = connect(port).await?;
    // A request is small pieces that wait for answers.
    let _ = stream.set_nodelay(true);
    let (tunnel, outgoing) = tunnel(incoming);
    tokio::spawn(pass_on(tunnel, stream));
    Ok(outgoing)
}

async fn connect(port: u16) -> Result<TcpStream, Refused> {
    let mut first = None;
    for address in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        match tokio::time::timeout(CONNECT, TcpStream::connect((address, port))).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => drop(first.get_or_insert(error)),
            Err(_) => return Err(Refused::port_stuck(port)),
        }
    }
    match first {
        // There may be no other family: what the first one said counts.
        Some(error) if error.kind() != io::ErrorKind::ConnectionRefused => Err(Refused::busy(&error.to_string())),
        _ => Err(Refused::port_closed(port)),
    }
}

/// Until both have said all, or one is gone.
async fn pass_on(mut tunnel: Tunnel<Incoming>, mut stream: TcpStream) {
    // Whichever breaks takes the other along, which is all that there is to tell.
    let _ = tokio::io::copy_bidirectional_with_sizes(&mut tunnel, &mut stream, PIECE, PIECE).await;
}
