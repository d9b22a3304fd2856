//! Where a request comes from: its peer, or what a trusted proxy says of it. What others say is not believed.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderName};
use ipnet::IpNet;

/// The address that a request came from, as an extension of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remote(pub IpAddr);

/// Proxies whose word counts, and the header in which they give it.
#[derive(Debug, Clone)]
pub struct Proxies {
    networks: Vec<IpNet>,
    header: HeaderName,
}

impl Proxies {
    /// Those within networks, which set this header (`x-forwarded-for` or `forwarded`). Only one is read: a proxy that sets one passes the other on as it came.
    #[must_use]
    pub fn new(networks: Vec<IpNet>, header: &'static str) -> Self {
        Self { networks, header: HeaderName::from_static(header) }
    }

    /// Whether there is one at this address.
    #[must_use]
    pub fn include(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(&address.to_canonical()))
    }

    /// The caller behind a connection. From right to left: each proxy has added whom it was asked by, so the first address that is no proxy's is the last one
    /// that is vouched for. What can't be read ends the search, as whoever is beyond it may have written it.
    #[must_use]
    pub fn caller(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let mut caller = peer.to_canonical();
        for line in headers.get_all(&self.header).iter().rev() {
            for said in line.to_str().unwrap_or_default().rsplit(',') {
                if !self.include(caller) {
                    return caller;
                }
                let Some(before) = self.address(said.trim()) else { return caller };
                caller = before;
            }
        }
        caller
    }

    fn address(&self, said: &str) -> Option<IpAddr> {
        if self.header != "forwarded" {
            return node(said);
        }
        let pairs = said.split(';').filter_map(|pair| pair.split_once('='));
        let mut named =
            pairs.filter(|(name, _)| name.trim().eq_ignore_ascii_case("for")).map(|(_, value)| value.trim());
        let value = named.next()?;
        node(value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value))
    }
}

/// An address, with or without a port: `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:80`.
fn node(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse::<IpAddr>().ok().or_else(|| Some(text.parse::<std::net::SocketAddr>().ok()?.ip()))?;
    Some(address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn caller(header: &'static str, peer: &str, lines: &[&str]) -> String {
        let networks = ["10.0.0.0/8", "2001:db8:1::/48"].map(|network| network.parse().unwrap());
        let proxies = Proxies::new(networks.to_vec(), header);
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(header, HeaderValue::from_bytes(line.as_bytes()).unwrap());
        }
        proxies.caller(peer.parse().unwrap(), &headers).to_string()
    }

    #[test]
    fn the_last_address_that_a_proxy_vouches_for_is_the_callers() {
        for (peer, lines, expected) in [
            ("10.0.0.1", vec![], "10.0.0.1"),
            ("10.0.0.1", vec!["192.0.2.1"], "192.0.2.1"),
            ("::ffff:10.0.0.1", vec!["192.0.2.1:4711"], "192.0.2.1"),
            ("2001:db8:1::5", vec!["[2001:db8:2::1]:80"], "2001:db8:2::1"),
            ("10.0.0.1", vec!["2001:db8:2::1"], "2001:db8:2::1"),
            // What a caller has written before it stands on the left.
            ("10.0.0.1", vec!["127.0.0.1, 192.0.2.1"], "192.0.2.1"),
            ("10.0.0.1", vec!["127.0.0.1", "192.0.2.1"], "192.0.2.1"),
            ("10.0.0.1", vec!["127.0.0.1, 192.0.2.1, 10.0.0.2"], "192.0.2.1"),
            ("10.0.0.1", vec!["127.0.0.1, 192.0.2.1", "10.0.0.2, 10.9.9.9"], "192.0.2.1"),
            ("10.0.0.1", vec!["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
            // What is none can't be passed over.
            ("10.0.0.1", vec!["192.0.2.1, unknown"], "10.0.0.1"),
            ("10.0.0.1", vec!["192.0.2.1, é, 10.0.0.2"], "10.0.0.1"),
            ("10.0.0.1", vec!["192.0.2.1,"], "10.0.0.1"),
            // Nobody who is no proxy is believed.
            ("192.0.2.9", vec!["192.0.2.1"], "192.0.2.9"),
            ("192.0.2.9", vec!["10.0.0.1"], "192.0.2.9"),
        ] {
            assert_eq!(caller("x-forwarded-for", peer, &lines), expected, "{peer} {lines:?}");
        }
    }

    #[test]
    fn the_standard_header_is_read_too() {
        for (line, expected) in [
            ("for=192.0.2.1", "192.0.2.1"),
            ("proto=https; For=\"192.0.2.1:80\";by=10.0.0.1", "192.0.2.1"),
            ("for=127.0.0.1, for=\"[2001:db8:2::1]:80\", for=10.0.0.7", "2001:db8:2::1"),
            ("for=192.0.2.1, for=_hidden", "10.0.0.1"),
            ("for=192.0.2.1, proto=https", "10.0.0.1"),
            ("192.0.2.1", "10.0.0.1"),
        ] {
            assert_eq!(caller("forwarded", "10.0.0.1", &[line]), expected, "{line}");
        }
    }
}
