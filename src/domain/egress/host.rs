//! A host as code writes it: a name in one spelling, or an address in whatever spelling. What could be read in two ways is refused.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Longest name, in bytes, without a dot at its end (RFC 1035, section 2.3.4).
const MAX_NAME: usize = 253;
/// Longest part of a name, in bytes.
const MAX_LABEL: usize = 63;

/// Last parts of names that are not of the internet (RFC 6761, RFC 6762, RFC 8375, RFC 7686, RFC 9476), and what private networks use as such.
const NOT_OUTSIDE: [&str; 14] = [
    "localhost",
    "local",
    "localdomain",
    "internal",
    "intranet",
    "private",
    "corp",
    "home",
    "lan",
    "home.arpa",
    "onion",
    "alt",
    "invalid",
    "upstream",
];

/// A host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Host {
    /// A name in lower case, without a dot at its end.
    Name(String),
    /// An address; of IPv4 never in the form of IPv6.
    Address(IpAddr),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

impl Host {
    /// Reads a host.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if let Some(inner) = text.strip_prefix('[') {
            let inner = inner.strip_suffix(']').ok_or("a bracket is not closed")?;
            return v6(inner);
        }
        if text.contains(':') {
            return v6(text);
        }
        if !text.is_ascii() {
            return Err("a name is written in ASCII; international ones begin with xn-- there");
        }
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        if name.is_empty() || name.len() > MAX_NAME {
            return Err("a name has 1 to 253 characters");
        }
        if !name.split('.').all(is_label) {
            return Err("a name consists of letters, digits, \"-\" and \"_\" between dots, at most 63 in a row");
        }
        // Resolvers take what ends in a number for an address, in spellings of all kinds (inet_aton(3), and the URL standard's "ends in a number").
        let last = name.rsplit('.').next().unwrap_or_default();
        match is_number(last) {
            true => v4(&name).map(|address| Self::Address(address.into())),
            false => Ok(Self::Name(name)),
        }
    }

    /// Why a name can't be of the internet, whatever it resolves to; nothing if it can.
    #[must_use]
    pub fn why_not_outside(&self) -> Option<&'static str> {
        let Self::Name(name) = self else { return None };
        let ends_with = |end: &str| name.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        if NOT_OUTSIDE.into_iter().any(ends_with) {
            Some("names of this kind are not of the internet")
        } else if !name.contains('.') {
            Some("a name without a dot is not of the internet")
        } else {
            None
        }
    }
}

fn is_label(label: &str) -> bool {
    (1..=MAX_LABEL).contains(&label.len())
        && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
        && !label.starts_with('-')
        && !label.ends_with('-')
}

fn is_number(label: &str) -> bool {
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let hex = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit());
    digits(label) || label.strip_prefix("0x").is_some_and(hex)
}

fn v6(text: &str) -> Result<Host, &'static str> {
    let address: Ipv6Addr = text.parse().map_err(|_| "this is no address of IPv6")?;
    Ok(Host::Address(IpAddr::V6(address).to_canonical()))
}

/// One to four numbers, decimal, octal or hexadecimal, the last of which fills what is left.
fn v4(name: &str) -> Result<Ipv4Addr, &'static str> {
    const WRONG: &str = "this ends in a number, as an address does, and is none";
    let numbers: Option<Vec<u64>> = name.split('.').map(number).collect();
    let numbers = numbers.filter(|numbers| numbers.len() <= 4).ok_or(WRONG)?;
    let (last, first) = numbers.split_last().ok_or(WRONG)?;
    if first.iter().any(|part| *part > 255) || *last >= 256_u64.pow(5 - numbers.len() as u32) {
        return Err(WRONG);
    }
    let bits = first.iter().enumerate().fold(*last, |bits, (at, part)| bits | part << (8 * (3 - at)));
    u32::try_from(bits).map(Ipv4Addr::from_bits).map_err(|_| WRONG)
}

fn number(text: &str) -> Option<u64> {
    let (digits, radix) = match (text.strip_prefix("0x"), text.strip_prefix('0')) {
        (Some(hex), _) => (hex, 16),
        (None, Some(octal)) if !octal.is_empty() => (octal, 8),
        _ => (text, 10),
    };
    match digits {
        // As inet_aton(3) has it.
        "" if radix == 16 => Some(0),
        // `from_str_radix` would take a sign.
        digits if digits.bytes().all(|b| b.is_ascii_hexdigit()) => u64::from_str_radix(digits, radix).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(text: &str) -> Host {
        Host::Address(text.parse().unwrap())
    }

    #[test]
    fn every_spelling_of_an_address_is_that_address() {
        for (text, expected) in [
            ("127.0.0.1", "127.0.0.1"),
            ("127.0.0.1.", "127.0.0.1"),
            ("2130706433", "127.0.0.1"),
            ("0x7f000001", "127.0.0.1"),
            ("0X7F.1", "127.0.0.1"),
            ("017700000001", "127.0.0.1"),
            ("0177.0.0.01", "127.0.0.1"),
            ("127.1", "127.0.0.1"),
            ("127.0.1", "127.0.0.1"),
            ("0", "0.0.0.0"),
            ("0x", "0.0.0.0"),
            ("169.254.43518", "169.254.169.254"),
            ("0xa9fea9fe", "169.254.169.254"),
            ("[::1]", "::1"),
            ("::1", "::1"),
            ("[::ffff:127.0.0.1]", "127.0.0.1"),
            ("[0:0:0:0:0:FFFF:7F00:0001]", "127.0.0.1"),
            ("[FD00:EC2::254]", "fd00:ec2::254"),
        ] {
            assert_eq!(Host::parse(text), Ok(address(expected)), "{text}");
        }
    }

    #[test]
    fn names_have_one_spelling() {
        for (text, expected) in [
            ("example.org", "example.org"),
            ("EXAMPLE.Org.", "example.org"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("_dmarc.example.org", "_dmarc.example.org"),
            ("1.2.3.4.example.org", "1.2.3.4.example.org"),
            ("0x7f.0.0.1g", "0x7f.0.0.1g"),
        ] {
            assert_eq!(Host::parse(text), Ok(Host::Name(expected.to_owned())), "{text}");
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_none() {
        for text in [
            "",
            ".",
            "example..org",
            ".example.org",
            "example.org..",
            "user@example.org",
            "example.org:443",
            "exa mple.org",
            "example.org/x",
            "example.org\\x",
            "example.org#x",
            "example.org?x",
            "example.org%2e",
            "exa\0mple.org",
            "ex\r\nam.org",
            "b\u{fc}cher.example",
            "example\u{3002}org",
            "\u{ff11}27.0.0.1",
            "-example.org",
            "example-.org",
            "1.2.3.4.5",
            "256.0.0.1",
            "1.2.3.256",
            "1.2.3.08",
            "4294967296",
            "1.16777216",
            "0x1g.1",
            "0xffffffff0",
            "[::1",
            "::1]",
            "[127.0.0.1]",
            "[::1%lo]",
            "fe80::1%eth0",
            "1.+2",
            "0x+1",
            "[]",
            "a,b.org",
            "*.example.org",
        ] {
            assert!(Host::parse(text).is_err(), "{text:?}: {:?}", Host::parse(text));
        }
        assert!(Host::parse(&"a".repeat(64)).is_err());
        assert!(Host::parse(&"a.".repeat(200)).is_err());
    }

    #[test]
    fn some_names_are_of_no_internet() {
        for (name, is_outside) in [
            ("localhost", false),
            ("a.localhost", false),
            ("intranet", false),
            ("metadata.google.internal", false),
            ("printer.local", false),
            ("x.home.arpa", false),
            ("llm.upstream", false),
            ("notlocalhost.org", true),
            ("mylocal.example", true),
            ("example.org", true),
        ] {
            assert_eq!(Host::parse(name).unwrap().why_not_outside().is_none(), is_outside, "{name}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics_and_what_is_read_is_read_again_as_the_same(text in "\\PC{0,40}|[0-9a-fx.:\\[\\]]{0,20}|[a-z0-9.-]{0,30}") {
            if let Ok(host) = Host::parse(&text) {
                prop_assert_eq!(Host::parse(&host.to_string()), Ok(host.clone()));
                if let Host::Name(name) = &host {
                    prop_assert!(name.parse::<IpAddr>().is_err());
                    prop_assert!(name.bytes().all(|b| !b.is_ascii_uppercase() && b.is_ascii_graphic()));
                }
            }
        }

        #[test]
        fn numbers_of_all_kinds_are_the_address_they_stand_for(bits: u32, parts in 1_usize..=4, radix in 0..3) {
            let mut rest = u64::from(bits);
            let mut texts = Vec::new();
            for at in 0..parts {
                let shift = if at + 1 == parts { 0 } else { 8 * (3 - at) };
                let part = rest >> shift;
                rest -= part << shift;
                texts.push(match radix { 0 => format!("{part}"), 1 => format!("0x{part:X}"), _ => format!("0{part:o}") });
            }
            prop_assert_eq!(Host::parse(&texts.join(".")), Ok(Host::Address(Ipv4Addr::from_bits(bits).into())));
        }
    }
}
