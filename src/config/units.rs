//! Durations and sizes as texts with a unit, and the other forms of values that serde has no words for. Parses single
//! values; knows no key.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use jiff::Timestamp;
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

use crate::domain::access::{KeyHash, Scope};

const DURATION: &str = "a duration with its unit, such as \"500ms\", \"30s\", \"15m\", \"4h\" or \"7d\"";
const ADDRESS: &str = "an IP address and a port, such as \"127.0.0.1:8080\" or \"[::1]:8080\"";
const SIZE: &str = "a size with its unit, such as \"64KiB\", \"512MiB\" or \"1GiB\"";

/// Parses `"30s"`, `"1h30m"`; units `ms`, `s`, `m`, `h`, `d`.
///
/// # Errors
/// A sentence that says what is allowed.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not {DURATION}");
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let (number, after) = leading_number(rest).ok_or_else(wrong)?;
        let letters = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
        let (unit, after) = after.split_at(letters);
        let millis: u64 = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60 * 1000,
            "h" => 3600 * 1000,
            "d" => 24 * 3600 * 1000,
            "" => return Err(format!("{text:?} has no unit; write {}", with_unit(text, "s", "m"))),
            _ => return Err(wrong()),
        };
        total = number
            .checked_mul(millis)
            .and_then(|ms| total.checked_add(Duration::from_millis(ms)))
            .filter(|total| *total <= LONGEST)
            .ok_or_else(|| format!("{text:?} is longer than 100 years"))?;
        rest = after;
    }
    Ok(total)
}

/// Longest duration: sums with points in time never overflow below it.
const LONGEST: Duration = Duration::from_secs(100 * 366 * 24 * 3600);

/// Parses `"512MiB"`; units `B`, `KiB`, `MiB`, `GiB`, `TiB`.
///
/// # Errors
/// A sentence that says what is allowed.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not {SIZE}");
    let (number, unit) = leading_number(text.trim()).ok_or_else(wrong)?;
    let shift = match unit.trim() {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        "" => return Err(format!("{text:?} has no unit; write {}", with_unit(text, "MiB", "GiB"))),
        "K" | "k" | "kB" | "KB" | "kb" => return Err(nearest_unit(text, number, "KiB")),
        "M" | "m" | "MB" | "mb" | "Mi" => return Err(nearest_unit(text, number, "MiB")),
        "G" | "g" | "GB" | "gb" | "Gi" => return Err(nearest_unit(text, number, "GiB")),
        _ => return Err(wrong()),
    };
    number
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes <= i64::MAX as u64)
        .ok_or_else(|| format!("{text:?} is too large"))
}

fn leading_number(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, rest) = text.split_at(digits);
    Some((number.parse().ok()?, rest))
}

fn nearest_unit(text: &str, number: u64, unit: &str) -> String {
    format!("{text:?} has no unit of powers of 1024; write \"{number}{unit}\"")
}

fn with_unit(number: impl fmt::Display, one: &str, other: &str) -> String {
    format!("\"{number}{one}\" or \"{number}{other}\"")
}

/// A text form with its parser and the answer to a bare number.
struct Text<T> {
    expecting: &'static str,
    units: Option<(&'static str, &'static str)>,
    parse: fn(&str) -> Result<T, String>,
}

impl<T> Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expecting)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).map_err(E::custom)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        match self.units {
            Some((one, other)) => {
                Err(E::custom(format!("a bare number has no unit; write {}", with_unit(number, one, other))))
            }
            None => Err(E::custom(format!("{number} is not {}", self.expecting))),
        }
    }
}

pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    deserializer.deserialize_any(Text { expecting: DURATION, units: Some(("s", "m")), parse: parse_duration })
}

pub(super) fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    deserializer.deserialize_any(Text { expecting: SIZE, units: Some(("MiB", "GiB")), parse: parse_size })
}

pub(super) fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    deserializer.deserialize_any(Text { expecting: ADDRESS, units: None, parse: parse_address })
}

/// An address; empty means none.
pub(super) fn optional_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let parse = |text: &str| if text.is_empty() { Ok(None) } else { parse_address(text).map(Some) };
    deserializer.deserialize_any(Text { expecting: ADDRESS, units: None, parse })
}

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is not {ADDRESS}"))
}

/// A path; empty means none.
pub(super) fn optional_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = String::deserialize(deserializer)?;
    Ok(Some(path).filter(|p| !p.is_empty()).map(PathBuf::from))
}

/// What a key allows.
pub(super) fn scopes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Scope>, D::Error> {
    let names = Vec::<String>::deserialize(deserializer)?;
    names.iter().map(|name| name.parse().map_err(D::Error::custom)).collect()
}

pub(super) fn key_hash<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<KeyHash>, D::Error> {
    String::deserialize(deserializer)?.parse().map(Some).map_err(D::Error::custom)
}

pub(super) fn moment<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let wrong = |_| D::Error::custom(format!("{text:?} is not a moment such as \"2027-01-01T00:00:00Z\""));
    text.parse().map(Some).map_err(wrong)
}

/// Texts as a list, or in one text between commas, which an environment variable can hold.
pub(super) fn texts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Texts;
    impl<'de> Visitor<'de> for Texts {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of texts, or one with commas between them")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Vec<String>, E> {
            Ok(text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect())
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<String>, A::Error> {
            let mut texts = Vec::new();
            while let Some(text) = items.next_element()? {
                texts.push(text);
            }
            Ok(texts)
        }
    }
    deserializer.deserialize_any(Texts)
}

/// Networks, a single address being one of its own.
pub(super) fn networks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    let network = |text: &String| {
        let address = text.parse::<std::net::IpAddr>().map(IpNet::from);
        let wrong = || {
            D::Error::custom(format!(
                "{text:?} is not a network or an address, such as \"10.0.0.0/8\" or \"192.0.2.1\""
            ))
        };
        address.or_else(|_| text.parse()).map_err(|_| wrong())
    };
    texts(deserializer)?.iter().map(network).collect()
}

/// A whole number in quotes; empty means none.
pub(super) fn optional_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let number = Some(text.trim()).filter(|text| !text.is_empty()).map(str::parse).transpose();
    number.map_err(|_| D::Error::custom(format!("{text:?} is not a whole number from 0 to 4294967295")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("7d"), Ok(Duration::from_secs(7 * 86400)));
        assert_eq!(parse_duration("30").unwrap_err(), "\"30\" has no unit; write \"30s\" or \"30m\"");
        for wrong in ["", "s", "1.5h", "-1s", "1w", "1h x", "99999999999999999999s", "18446744073709551615d"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        assert_eq!(parse_size("1 GiB"), Ok(1 << 30));
        assert_eq!(parse_size("512").unwrap_err(), "\"512\" has no unit; write \"512MiB\" or \"512GiB\"");
        assert_eq!(parse_size("512MB").unwrap_err(), "\"512MB\" has no unit of powers of 1024; write \"512MiB\"");
        for wrong in ["", "MiB", "1.5GiB", "-1MiB", "99999999999TiB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
