//! The world as the way out meets it: names become addresses, and addresses connections. Replaced by tests, so that they send nothing to anybody. Decides nothing.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::task;

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
pub struct SystemResolver(Arc<Semaphore>);

impl Default for SystemResolver {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(LOOKUPS)))
    }
}

#[async_trait]
impl Resolver for SystemResolver {
    async fn resolve(&self, name: &str) -> io::Result<Vec<IpAddr>> {
        // With a dot at its end it is that name, and not one of a search list below it.
        let name = format!("{name}.");
        let look = look_up(Arc::clone(&self.0), move || Ok((name.as_str(), 0).to_socket_addrs()?.collect::<Vec<_>>()));
        let look = async { Ok(look.await?.into_iter().map(|address| address.ip()).collect()) };
        tokio::time::timeout(LOOKUP_TIME, look).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
}

/// Looks up on a thread, of which there are so many. A place is taken until the thread is done, whether or not anybody waits for it any more.
async fn look_up<T: Send + 'static>(
    places: Arc<Semaphore>,
    look: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let place = places.acquire_owned().await.map_err(io::Error::other)?;
    let looked = task::blocking(move || {
        let found = look();
        drop(place);
        found
    });
    looked.await.unwrap_or_else(|| Err(io::Error::other("the lookup failed")))
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

    #[tokio::test]
    async fn a_lookup_that_nobody_waits_for_keeps_its_place_until_it_is_done() {
        let places = Arc::new(Semaphore::new(1));
        let (go, may_go) = std::sync::mpsc::channel::<()>();
        let slow = look_up(Arc::clone(&places), move || may_go.recv().map_err(io::Error::other));
        assert!(tokio::time::timeout(Duration::from_millis(50), slow).await.is_err());
        assert_eq!(places.available_permits(), 0, "its thread still runs");
        go.send(()).unwrap();
        let place = tokio::time::timeout(Duration::from_secs(10), places.acquire()).await;
        assert!(place.is_ok(), "it gives its place back");
    }

    #[test]
    fn this_machine_knows_itself() {
        assert!(SystemDialer.is_own([127, 0, 0, 1].into()));
        assert!(!SystemDialer.is_own([93, 184, 216, 34].into()));
    }
}
