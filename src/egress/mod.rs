//! The outside half of the guarded way out: decides about each connection that code in a cell asks for, dials it, and carries it over the cell's link.
//!
//! What may be reached is said by [`domain::egress`](crate::domain::egress); here a name becomes addresses, all of which are judged, and the connection is made to one of
//! those that were judged, without asking again. A cell's guest is not trusted with any of it: it announces, and gets a byte stream or a refusal. Each session
//! has a [`Gate`]; what all of them share is in [`Egress`].

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::Semaphore;

use crate::domain::egress::Host;
use crate::domain::packages::Index;
use crate::metrics::Metrics;
use crate::store::state::State;

mod bucket;
mod carry;
pub mod gate;
mod held;
mod outside;
mod packages;
mod reach;
mod telling;
mod trust;
mod upstream;
mod veil;

pub use gate::{Decision, Gate, GateView};
pub use outside::addresses_of;
pub use outside::{Dialer, Outside, Resolver, Stream, SystemDialer, SystemResolver};
use telling::{Budgets, Pace};
pub use trust::Trust;

/// Audit events of a tenant's sessions together, of connections that were made and of refusals each.
const AUDIT_PACE: Pace = Pace { burst: 1000.0, per_second: 10.0 };

/// Bounds, and what of the world is not to be reached though it may be public.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Connections of all sessions at once.
    pub connections: usize,
    /// Those of one session.
    pub connections_per_session: usize,
    /// Connections that one session may ask for in a minute; as many at once.
    pub connections_per_minute: u32,
    /// Bytes that one session may send; nothing: no limit.
    pub sent_bytes: Option<u64>,
    /// Bytes that it may receive.
    pub received_bytes: Option<u64>,
    /// A connection is there within this time, its name resolved.
    pub connect_timeout: Duration,
    /// A connection on which nothing moves for so long is broken off.
    pub idle_timeout: Duration,
    /// Networks that nobody reaches.
    pub deny: Vec<IpNet>,
    /// The proxy that connections go through, as `host:port`.
    pub proxy: Option<String>,
    /// Where packages come from.
    pub index: Index,
    /// Largest file of a package, in bytes.
    pub package_bytes: u64,
}

/// Why a connection is not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The session has no way out.
    #[error("this session has no way out: its network mode is \"none\"")]
    Closed,
    /// What was asked for is no host.
    #[error("no host can be read here: {0}")]
    NoHost(&'static str),
    /// No rule admits it.
    #[error("{0}:{1} is not within what this session may reach (network.allow)")]
    NotAllowed(Host, u16),
    /// No packages may be installed.
    #[error("nothing may be installed here: the template's packages policy is \"none\"")]
    NoPackages,
    /// There is no upstream of that name, or it was asked for at another port.
    #[error("{0}:{1} is no upstream of this session; upstreams are asked at port 80, in plain HTTP")]
    NoUpstream(Host, u16),
    /// One of its addresses is not of the public internet.
    #[error("{0} is not at a public address ({1})")]
    NotPublic(Host, &'static str),
    /// One of its addresses is the server's own, or the operator has denied it.
    #[error("{0} is at an address that nobody may reach from here")]
    Denied(Host),
    /// Its name has no address.
    #[error("the name {0} can't be resolved")]
    NotResolved(Host),
    /// Nobody answers there.
    #[error("{0}:{1} can't be reached")]
    Unreachable(Host, u16),
    /// The session has as many connections as it may.
    #[error("as many connections as may be open at once, {0}, are open")]
    TooMany(usize),
    /// The session asks for connections too fast.
    #[error("more connections were asked for than the {0} that may be in a minute")]
    TooFast(u32),
    /// The session has sent or received as much as it may.
    #[error("this session has moved as many bytes as it may, {0} in this direction")]
    Spent(u64),
    /// The server has as many connections as it may.
    #[error("the server has as many connections to the outside as it may")]
    Full,
}

impl Refusal {
    /// A word for programs.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::NoHost(_) => "no-host",
            Self::NotAllowed(..) | Self::NoUpstream(..) | Self::NoPackages => "not-allowed",
            Self::NotPublic(..) => "not-public",
            Self::Denied(_) => "denied",
            Self::NotResolved(_) => "not-resolved",
            Self::Unreachable(..) => "unreachable",
            Self::TooMany(_) => "too-many-connections",
            Self::TooFast(_) => "too-fast",
            Self::Spent(_) => "too-many-bytes",
            Self::Full => "full",
        }
    }

    /// Every word there is.
    pub const WORDS: [&str; 11] = [
        "closed",
        "no-host",
        "not-allowed",
        "not-public",
        "denied",
        "not-resolved",
        "unreachable",
        "too-many-connections",
        "too-fast",
        "too-many-bytes",
        "full",
    ];

    /// The status that the proxy answers code with.
    #[must_use]
    pub fn status(&self) -> u16 {
        match self {
            Self::Closed
            | Self::NoHost(_)
            | Self::NotAllowed(..)
            | Self::NoUpstream(..)
            | Self::NoPackages
            | Self::NotPublic(..)
            | Self::Denied(_) => 403,
            Self::TooMany(_) | Self::TooFast(_) | Self::Spent(_) => 429,
            Self::NotResolved(_) | Self::Unreachable(..) => 502,
            Self::Full => 503,
        }
    }
}

/// What the gates of all sessions share. Clones are the same.
#[derive(Clone)]
pub struct Egress(Arc<Shared>);

struct Shared {
    settings: Settings,
    outside: Outside,
    trust: Trust,
    packages: packages::Shared,
    places: Arc<Semaphore>,
    audit_budgets: Budgets,
    metrics: Metrics,
    /// Where decisions are kept, if they are.
    state: Option<State>,
}

impl fmt::Debug for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Egress").field("settings", &self.0.settings).finish_non_exhaustive()
    }
}

impl Egress {
    /// The way out of all sessions of a server.
    #[must_use]
    pub fn new(settings: Settings, trust: Trust, outside: Outside, metrics: Metrics, state: Option<State>) -> Self {
        let places = Arc::new(Semaphore::new(settings.connections));
        Self(Arc::new(Shared {
            settings,
            outside,
            trust,
            packages: packages::Shared::new(),
            places,
            audit_budgets: Budgets::new(AUDIT_PACE),
            metrics,
            state,
        }))
    }

    /// One that makes no connection.
    #[must_use]
    pub fn none() -> Self {
        let settings = Settings {
            connections: 0,
            connections_per_session: 0,
            connections_per_minute: 1,
            sent_bytes: None,
            received_bytes: None,
            connect_timeout: Duration::ZERO,
            idle_timeout: Duration::ZERO,
            deny: Vec::new(),
            proxy: None,
            index: Index { host: String::new(), port: 443, path: String::new(), file_hosts: Vec::new() },
            package_bytes: 0,
        };
        Self::new(settings, Trust::default(), Outside::default(), Metrics::new(), None)
    }

    /// Why an address may not be reached, whatever the name; nothing if it may.
    fn why_not(&self, host: &Host, address: IpAddr) -> Option<Refusal> {
        let address = address.to_canonical();
        if let Some(what) = crate::domain::egress::address::why_not_public(address) {
            return Some(Refusal::NotPublic(host.clone(), what));
        }
        // What is reached through a translator is judged as itself, too.
        let meant = [Some(address), crate::domain::egress::address::translated(address)];
        let is_denied = |address: &IpAddr| {
            self.0.settings.deny.iter().any(|network| network.contains(address))
                || self.0.outside.dialer.is_own(*address)
        };
        meant.iter().flatten().any(is_denied).then(|| Refusal::Denied(host.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_denied_is_denied_through_a_translator_too() {
        let deny = vec!["93.184.216.0/24".parse().unwrap()];
        let settings = Settings { deny, ..Egress::none().0.settings.clone() };
        let egress = Egress::new(settings, Trust::default(), Outside::default(), Metrics::new(), None);
        let host = Host::Name("a.example.org".to_owned());
        let why = |address: &str| egress.why_not(&host, address.parse().unwrap());
        for denied in ["93.184.216.34", "::ffff:93.184.216.34", "64:ff9b::93.184.216.34", "64:ff9b::5db8:d8ff"] {
            assert_eq!(why(denied), Some(Refusal::Denied(host.clone())), "{denied}");
        }
        for free in ["93.184.217.34", "64:ff9b::93.184.217.34", "2606:2800::1"] {
            assert_eq!(why(free), None, "{free}");
        }
    }
}
