//! The world as the way out meets it: names become addresses, and addresses connections. Replaced by tests, so that they send nothing to anybody. Decides nothing.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

/// Names that are looked up at once: the system's resolver takes a thread each.
const LOOKUPS: usize = 32;
/// A lookup that takes longer has failed.
const LOOKUP_TIME: Duration = Duration::from_secs(8);
/// Any port will do to learn where packets would go.
const ANY_PORT: u16 = 9;

/// A connection to the outside.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Makes addresses of names.
#[async_trait]
pub trait Resolver: Send + Sync {
    /// All addresses of a name, of both families.
    ///
    /// # Errors
    /// When there are none, or nobody can tell.
    async fn resolve(&self, name: &str) -> io::Result<Vec<IpAddr>>;
}

/// Makes connections.
#[async_trait]
pub trait Dialer: Send + Sync {
    /// A connection to an address; whoever calls bounds the time.
    ///
    /// # Errors
    /// When nobody answers there.
    async fn dial(&self, address: SocketAddr) -> io::Result<Box<dyn Stream>>;

    /// Whether an address is this machine's own.
    fn is_own(&self, address: IpAddr) -> bool;
}

/// The world, or what stands for it.
#[derive(Clone)]
pub struct Outside {
    /// Makes addresses of names.
    pub resolver: Arc<dyn Resolver>,
    /// Makes connections.
    pub dialer: Arc<dyn Dialer>,
}

impl Default for Outside {
    /// The real one.
    fn default() -> Self {
        Self { resolver: Arc::new(SystemResolver::default()), dialer: Arc::new(SystemDialer) }
    }
}

impl fmt::Debug for Outside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Outside")
    }
}

/// The system's own resolver.
pub struct SystemResolver(Semaphore);

impl Default for SystemResolver {
    fn default() -> Self {
        Self(Semaphore::new(LOOKUPS))
    }
}

#[async_trait]
impl Resolver for SystemResolver {
    async fn resolve(&self, name: &str) -> io::Result<Vec<IpAddr>> {
        let look = async {
            let _place = self.0.acquire().await.map_err(io::Error::other)?;
            // With a dot at its end it is that name, and not one of a search list below it.
            let found = tokio::net::lookup_host((format!("{name}."), 0)).await?;
            Ok(found.map(|address| address.ip()).collect())
        };
        tokio::time::timeout(LOOKUP_TIME, look).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
}

/// The addresses of an operator's `host:port`, as far as they can be told.
pub async fn addresses_of(host: &str) -> Vec<IpAddr> {
    let found = tokio::time::timeout(LOOKUP_TIME, tokio::net::lookup_host(host)).await;
    let addresses = found.ok().and_then(Result::ok).into_iter().flatten();
    addresses.map(|address| address.ip().to_canonical()).collect()
}

/// TCP.
#[derive(Debug, Clone, Copy)]
pub struct SystemDialer;

#[async_trait]
impl Dialer for SystemDialer {
    async fn dial(&self, address: SocketAddr) -> io::Result<Box<dyn Stream>> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream))
    }

    /// A machine sends to itself from the very address that it sends to. Connecting a datagram socket sends nothing.
    fn is_own(&self, address: IpAddr) -> bool {
        let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        // Where that can't be found out it counts as such.
        let Ok(socket) = UdpSocket::bind((any, 0)) else { return true };
        // Where there is no way to it, nobody gets there.
        let from = socket.connect((address, ANY_PORT)).and_then(|()| socket.local_addr());
        from.is_ok_and(|from| from.ip() == address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_knows_itself() {
        assert!(SystemDialer.is_own([127, 0, 0, 1].into()));
        assert!(!SystemDialer.is_own([93, 184, 216, 34].into()));
    }
}
