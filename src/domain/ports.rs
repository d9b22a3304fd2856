//! Ports of a cell's loopback that may be reached from outside, as templates name them. Reaches none.

use std::fmt;
use std::ops::RangeInclusive;

/// Most ranges of one template.
const MAX_RANGES: usize = 32;

/// Ports that callers may reach; none by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ports(Vec<RangeInclusive<u16>>);

impl Ports {
    /// Reads ports and ranges: `8000`, `8000-8010`.
    ///
    /// # Errors
    /// A sentence about the first that is none.
    pub fn parse(texts: &[impl AsRef<str>]) -> Result<Self, String> {
        if texts.len() > MAX_RANGES {
            return Err(format!("{} ranges; allowed are {MAX_RANGES}", texts.len()));
        }
        texts.iter().map(|text| range(text.as_ref())).collect::<Result<_, _>>().map(Self)
    }

    /// Whether a port is one of them.
    #[must_use]
    pub fn allow(&self, port: u16) -> bool {
        self.0.iter().any(|range| range.contains(&port))
    }

    /// Each port or range, in the form that [`Ports::parse`] reads.
    #[must_use]
    pub fn texts(&self) -> Vec<String> {
        let text = |range: &RangeInclusive<u16>| match (range.start(), range.end()) {
            (first, last) if first == last => first.to_string(),
            (first, last) => format!("{first}-{last}"),
        };
        self.0.iter().map(text).collect()
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { f.write_str("none") } else { f.write_str(&self.texts().join(", ")) }
    }
}

fn range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let port = |text: &str| {
        let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        text.parse().ok().filter(|port: &u16| is_number && *port > 0)
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (port(first), port(last)) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        _ => Err(format!("{text:.40?} is neither a port (1 to 65535) nor a range such as \"8000-8010\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_what_is_named_and_nothing_else() {
        assert!(!Ports::default().allow(80));
        let ports = Ports::parse(&["3000", "8000-8002"]).unwrap();
        let allowed: Vec<u16> = (0..=u16::MAX).filter(|port| ports.allow(*port)).collect();
        assert_eq!(allowed, [3000, 8000, 8001, 8002]);
        assert_eq!(ports.texts(), ["3000", "8000-8002"]);
        assert_eq!(Ports::parse(&ports.texts()), Ok(ports));
        for wrong in ["", "0", "65536", "80-", "-80", "90-80", "+80", "80,81", " 80", "0-80", "a", "1-2-3"] {
            assert!(Ports::parse(&[wrong]).is_err(), "{wrong}");
        }
        assert!(Ports::parse(&[""; 33]).unwrap_err().contains("allowed are 32"));
    }
}
