//! Which addresses are of the public internet. It is judged by the address alone; whose it is besides is for others to know.
//!
//! The registries of special-purpose addresses are those of IANA (RFC 6890, with what was added since). What reaches an IPv4 address by way of an IPv6 one is
//! judged as that, or refused where it could lead anywhere.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Addresses of IPv4 that are not public: network, length of its prefix, what it is.
const V4: [([u8; 4], u32, &str); 19] = [
    ([0, 0, 0, 0], 8, "this network"),
    ([10, 0, 0, 0], 8, "private"),
    ([100, 64, 0, 0], 10, "shared by a provider"),
    ([127, 0, 0, 0], 8, "loopback"),
    // The metadata of most clouds among them.
    ([169, 254, 0, 0], 16, "link-local"),
    ([172, 16, 0, 0], 12, "private"),
    // The metadata of one cloud among them, 192.0.0.192.
    ([192, 0, 0, 0], 24, "reserved for protocols"),
    ([192, 0, 2, 0], 24, "documentation"),
    ([192, 31, 196, 0], 24, "reserved for AS112"),
    ([192, 52, 193, 0], 24, "reserved for AMT"),
    ([192, 88, 99, 0], 24, "a relay of 6to4"),
    ([192, 168, 0, 0], 16, "private"),
    ([192, 175, 48, 0], 24, "reserved for AS112"),
    ([198, 18, 0, 0], 15, "benchmarking"),
    ([198, 51, 100, 0], 24, "documentation"),
    ([203, 0, 113, 0], 24, "documentation"),
    ([224, 0, 0, 0], 4, "multicast"),
    ([240, 0, 0, 0], 4, "reserved"),
    // A public address that is one cloud's metadata on each of its machines.
    ([168, 63, 129, 16], 32, "a cloud's metadata"),
];

/// Addresses within 2000::/3, which are those given out, that are not public or could lead anywhere.
const V6: [([u16; 8], u32, &str); 4] = [
    // Teredo, benchmarking, ORCHID and the rest that is for protocols.
    ([0x2001, 0, 0, 0, 0, 0, 0, 0], 23, "reserved for protocols"),
    ([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32, "documentation"),
    ([0x2002, 0, 0, 0, 0, 0, 0, 0], 16, "6to4"),
    ([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20, "documentation"),
];

/// Why an address is not of the public internet; nothing if it is.
#[must_use]
pub fn why_not_public(address: IpAddr) -> Option<&'static str> {
    match address.to_canonical() {
        IpAddr::V4(address) => why_not_v4(address),
        IpAddr::V6(address) => why_not_v6(address),
    }
}

fn why_not_v4(address: Ipv4Addr) -> Option<&'static str> {
    let is_in = |network: [u8; 4], bits: u32| {
        let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
        address.to_bits() & mask == Ipv4Addr::from(network).to_bits()
    };
    V4.iter().find(|(network, bits, _)| is_in(*network, *bits)).map(|(_, _, what)| *what)
}

/// The IPv4 address that one of the well-known prefix of NAT64 (RFC 6052) leads to.
#[must_use]
pub fn translated(address: IpAddr) -> Option<IpAddr> {
    let IpAddr::V6(address) = address else { return None };
    let [.., a, b, c, d] = address.octets();
    let is_translated = address.segments()[..6] == [0x64, 0xff9b, 0, 0, 0, 0];
    is_translated.then(|| Ipv4Addr::new(a, b, c, d).into())
}

fn why_not_v6(address: Ipv6Addr) -> Option<&'static str> {
    let is_in = |network: [u16; 8], bits: u32| {
        let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
        address.to_bits() & mask == Ipv6Addr::from(network).to_bits()
    };
    // The well-known prefix of NAT64 (RFC 6052): on a network without IPv4 all of that is reached so.
    if is_in([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96) {
        let [.., a, b, c, d] = address.octets();
        return why_not_v4(Ipv4Addr::new(a, b, c, d));
    }
    if !is_in([0x2000, 0, 0, 0, 0, 0, 0, 0], 3) {
        return Some(match address {
            Ipv6Addr::LOCALHOST => "loopback",
            _ if address.is_multicast() => "multicast",
            _ if is_in([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10) => "link-local",
            _ if is_in([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7) => "private",
            _ => "reserved",
        });
    }
    V6.iter().find(|(network, bits, _)| is_in(*network, *bits)).map(|(_, _, what)| *what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_not_public_is_told_by_kind() {
        for (address, expected) in [
            ("93.184.216.34", None),
            ("1.1.1.1", None),
            ("172.15.255.255", None),
            ("172.32.0.0", None),
            ("100.63.255.255", None),
            ("100.128.0.0", None),
            ("2606:4700:4700::1111", None),
            ("2a00:1450:4001::1", None),
            ("64:ff9b::5db8:d822", None),
            ("0.0.0.0", Some("this network")),
            ("0.1.2.3", Some("this network")),
            ("10.255.0.1", Some("private")),
            ("100.100.100.200", Some("shared by a provider")),
            ("127.0.0.1", Some("loopback")),
            ("127.255.255.254", Some("loopback")),
            ("169.254.169.254", Some("link-local")),
            ("169.254.170.2", Some("link-local")),
            ("172.16.0.1", Some("private")),
            ("172.31.255.255", Some("private")),
            ("192.168.0.1", Some("private")),
            ("192.0.0.192", Some("reserved for protocols")),
            ("192.0.2.1", Some("documentation")),
            ("198.19.255.255", Some("benchmarking")),
            ("203.0.113.9", Some("documentation")),
            ("224.0.0.1", Some("multicast")),
            ("239.255.255.255", Some("multicast")),
            ("240.0.0.1", Some("reserved")),
            ("255.255.255.255", Some("reserved")),
            ("168.63.129.16", Some("a cloud's metadata")),
            ("::", Some("reserved")),
            ("::1", Some("loopback")),
            ("::ffff:127.0.0.1", Some("loopback")),
            ("::ffff:169.254.169.254", Some("link-local")),
            ("::127.0.0.1", Some("reserved")),
            ("::ffff:0:127.0.0.1", Some("reserved")),
            ("64:ff9b::7f00:1", Some("loopback")),
            ("64:ff9b::a9fe:a9fe", Some("link-local")),
            ("64:ff9b:1::a9fe:a9fe", Some("reserved")),
            ("100::1", Some("reserved")),
            ("2001::1", Some("reserved for protocols")),
            ("2001:0:7f00:1::", Some("reserved for protocols")),
            ("2001:2::1", Some("reserved for protocols")),
            ("2001:db8::1", Some("documentation")),
            ("2002:7f00:1::", Some("6to4")),
            ("2002:a9fe:a9fe::", Some("6to4")),
            ("3fff::1", Some("documentation")),
            ("fc00::1", Some("private")),
            ("fd00:ec2::254", Some("private")),
            ("fe80::1", Some("link-local")),
            ("fec0::1", Some("reserved")),
            ("ff02::1", Some("multicast")),
        ] {
            assert_eq!(why_not_public(address.parse().unwrap()), expected, "{address}");
        }
    }

    proptest! {
        #[test]
        fn an_ipv4_address_is_judged_the_same_in_every_form(bits: u32) {
            let v4 = Ipv4Addr::from_bits(bits);
            let expected = why_not_public(v4.into());
            prop_assert_eq!(why_not_public(v4.to_ipv6_mapped().into()), expected);
            let nat64 = Ipv6Addr::from_bits(0x64_ff9b_u128 << 96 | u128::from(bits));
            prop_assert_eq!(why_not_public(nat64.into()), expected);
            // What std calls special is never public.
            let is_special = v4.is_private() || v4.is_loopback() || v4.is_link_local() || v4.is_multicast()
                || v4.is_broadcast() || v4.is_documentation() || v4.is_unspecified();
            prop_assert!(!is_special || expected.is_some());
        }

        #[test]
        fn only_what_is_given_out_is_public(bits: u128) {
            let address = Ipv6Addr::from_bits(bits);
            if why_not_public(address.into()).is_none() {
                let [a, b, ..] = address.segments();
                let is_mapped = address.to_ipv4_mapped().is_some();
                prop_assert!(a >> 13 == 1 || (a, b) == (0x64, 0xff9b) || is_mapped);
            }
        }
    }
}
