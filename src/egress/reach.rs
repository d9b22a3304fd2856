//! From a host that a session may reach to a connection: its addresses, the judgement of all of them, and the dialling of one that was judged. Or through the operator's
//! proxy, which resolves names itself.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::DropGuard;

use super::{Egress, Refusal, Stream};
use crate::domain::egress::Host;

/// Addresses of one name that are tried.
const TRIES: usize = 4;
/// Addresses of one name that are judged; a name with more is refused, since not all of them would be.
const MOST_ADDRESSES: usize = 64;
/// Longest answer of a proxy to CONNECT, in bytes.
const MAX_ANSWER: usize = 8 * 1024;

/// A connection, and the address that it was made to, where that is known.
pub(super) struct Reached {
    pub(super) stream: Box<dyn Stream>,
    pub(super) address: Option<IpAddr>,
    /// What is done here for the connection ends when this is dropped, whatever it is at.
    pub(super) until: Option<DropGuard>,
}

/// Why there is none, and the address that is to blame, where there is one.
pub(super) struct NotReached {
    pub(super) refusal: Refusal,
    pub(super) address: Option<IpAddr>,
}

impl From<Refusal> for NotReached {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, address: None }
    }
}

impl Egress {
    /// Connects to a host that rules admit, for a session of this tenant.
    pub(super) async fn reach(&self, tenant: &Arc<str>, host: &Host, port: u16) -> Result<Reached, NotReached> {
        let within = self.0.settings.connect_timeout;
        let unreachable = || Refusal::Unreachable(host.clone(), port);
        let reaching = self.reach_in_time(tenant, host, port, Instant::now() + within);
        tokio::time::timeout(within, reaching).await.unwrap_or_else(|_| Err(unreachable().into()))
    }

    async fn reach_in_time(
        &self,
        tenant: &Arc<str>,
        host: &Host,
        port: u16,
        until: Instant,
    ) -> Result<Reached, NotReached> {
        let unreachable = || Refusal::Unreachable(host.clone(), port);
        if let Some(proxy) = &self.0.settings.proxy {
            // What a name leads to is the proxy's business; what an address leads to is known here.
            if let Host::Address(address) = host {
                self.judge(host, &[*address])?;
            }
            return match through(proxy, host, port).await {
                Ok(stream) => Ok(Reached { stream: Box::new(stream), address: None, until: None }),
                Err(error) => {
                    tracing::debug!(%host, port, %error, "the proxy made no connection");
                    Err(unreachable().into())
                }
            };
        }
        let addresses = self.addresses(tenant, host).await?;
        self.judge(host, &addresses)?;
        let tried = &addresses[..addresses.len().min(TRIES)];
        for (at, address) in tried.iter().enumerate() {
            let left = until.saturating_duration_since(Instant::now());
            let share: Duration = left / u32::try_from(tried.len() - at).unwrap_or(1);
            let dialled = self.0.outside.dialer.dial(SocketAddr::new(*address, port));
            if let Ok(Ok(stream)) = tokio::time::timeout(share, dialled).await {
                return Ok(Reached { stream, address: Some(*address), until: None });
            }
        }
        Err(NotReached { refusal: unreachable(), address: addresses.first().copied() })
    }

    async fn addresses(&self, tenant: &Arc<str>, host: &Host) -> Result<Vec<IpAddr>, Refusal> {
        let name = match host {
            Host::Address(address) => return Ok(vec![*address]),
            Host::Name(name) => name,
        };
        let found = self.0.outside.resolver.resolve(name, tenant).await.inspect_err(|error| {
            tracing::debug!(name, %error, "a name was not resolved");
        });
        let mut addresses: Vec<IpAddr> = Vec::new();
        for address in found.unwrap_or_default().into_iter().map(|address| address.to_canonical()) {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        match addresses.len() {
            1..=MOST_ADDRESSES => Ok(addresses),
            _ => Err(Refusal::NotResolved(host.clone())),
        }
    }

    /// All of them are to be public: a name that leads inside as well leads inside when that suits it.
    fn judge(&self, host: &Host, addresses: &[IpAddr]) -> Result<(), NotReached> {
        let wrong = addresses.iter().find_map(|address| Some((self.why_not(host, *address)?, *address)));
        wrong.map_or(Ok(()), |(refusal, address)| Err(NotReached { refusal, address: Some(address) }))
    }
}

/// Has a proxy connect (RFC 9110, section 9.3.6).
async fn through(proxy: &str, host: &Host, port: u16) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(proxy).await?;
    stream.set_nodelay(true)?;
    let asked = format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n");
    stream.write_all(asked.as_bytes()).await?;
    let mut answer = Vec::new();
    // Byte by byte, since what follows is the connection's own.
    while !answer.ends_with(b"\r\n\r\n") {
        if answer.len() >= MAX_ANSWER {
            return Err(io::Error::other("the proxy's answer is too long"));
        }
        answer.push(stream.read_u8().await?);
    }
    let line = answer.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let status = line.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1));
    match status.is_some_and(|status| status.len() == 3 && status.starts_with('2')) {
        true => Ok(stream),
        false => Err(io::Error::other(format!("the proxy says {line:?}"))),
    }
}
