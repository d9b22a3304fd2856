//! The world as the way out meets it: names become addresses, and addresses connections. Replaced by tests, so that they send nothing to anybody. Decides nothing.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::task;

/// Names that are looked up at once: the system's resolver takes a thread each.
const LOOKUPS: usize = 32;
/// And of one tenant's sessions.
const LOOKUPS_OF_TENANT: usize = 8;
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
    /// All addresses of a name, of both families, for a session of this tenant.
    ///
    /// # Errors
    /// When there are none, or nobody can tell.
    async fn resolve(&self, name: &str, tenant: &Arc<str>) -> io::Result<Vec<IpAddr>>;
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
#[derive(Default)]
pub struct SystemResolver(Turns);

#[async_trait]
impl Resolver for SystemResolver {
    async fn resolve(&self, name: &str, tenant: &Arc<str>) -> io::Result<Vec<IpAddr>> {
        // With a dot at its end it is that name, and not one of a search list below it.
        let name = format!("{name}.");
        let look = look_up(&self.0, tenant, move || Ok((name.as_str(), 0).to_socket_addrs()?.collect::<Vec<_>>()));
        let look = async { Ok(look.await?.into_iter().map(|address| address.ip()).collect()) };
        tokio::time::timeout(LOOKUP_TIME, look).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
}

/// Threads that look up: so many, and so many of them for one tenant.
struct Turns {
    all: Arc<Semaphore>,
    /// Those of tenants for whom something is looked up.
    parts: Mutex<HashMap<Arc<str>, Weak<Semaphore>>>,
}

impl Default for Turns {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(LOOKUPS)), parts: Mutex::default() }
    }
}

impl Turns {
    /// Waits for a turn.
    async fn take(&self, tenant: &Arc<str>) -> io::Result<[OwnedSemaphorePermit; 2]> {
        let own = self.part(tenant).acquire_owned().await.map_err(io::Error::other)?;
        let all = Arc::clone(&self.all).acquire_owned().await.map_err(io::Error::other)?;
        Ok([own, all])
    }

    fn part(&self, tenant: &Arc<str>) -> Arc<Semaphore> {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.retain(|_, part| part.strong_count() > 0);
        parts.get(tenant).and_then(Weak::upgrade).unwrap_or_else(|| {
            let part = Arc::new(Semaphore::new(LOOKUPS_OF_TENANT));
            parts.insert(Arc::clone(tenant), Arc::downgrade(&part));
            part
        })
    }
}

/// Looks up on a thread. Its turn lasts until the thread is done, whether or not anybody waits for it any more.
async fn look_up<T: Send + 'static>(
    turns: &Turns,
    tenant: &Arc<str>,
    look: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let turn = turns.take(tenant).await?;
    let looked = task::blocking(move || {
        let found = look();
        drop(turn);
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
    async fn a_lookup_that_nobody_waits_for_keeps_its_turn_until_it_is_done_and_no_tenant_takes_anothers() {
        let (turns, [one, other]) = (Turns::default(), [Arc::from("one"), Arc::from("other")]);
        let mut slow = Vec::new();
        for _ in 0..2 * LOOKUPS {
            let (go, may_go) = std::sync::mpsc::channel::<()>();
            let lookup = look_up(&turns, &one, move || may_go.recv().map_err(io::Error::other));
            assert!(tokio::time::timeout(Duration::from_millis(5), lookup).await.is_err());
            slow.push(go);
        }
        assert_eq!(turns.all.available_permits(), LOOKUPS - LOOKUPS_OF_TENANT, "their threads still run");
        let lookup = tokio::time::timeout(Duration::from_secs(10), look_up(&turns, &other, || Ok(7)));
        assert_eq!(lookup.await.unwrap().unwrap(), 7);
        drop(slow);
        let again = tokio::time::timeout(Duration::from_secs(10), look_up(&turns, &one, || Ok(8)));
        assert_eq!(again.await.unwrap().unwrap(), 8, "they give their turns back");
    }

    #[test]
    fn this_machine_knows_itself() {
        assert!(SystemDialer.is_own([127, 0, 0, 1].into()));
        assert!(!SystemDialer.is_own([93, 184, 216, 34].into()));
    }
}
