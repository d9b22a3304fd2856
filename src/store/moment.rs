//! Moments in files: written as RFC 3339 has them. For `#[serde(with = "super::moment")]`.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// As text, to the microsecond.
pub(super) fn text(moment: Timestamp) -> String {
    format!("{moment:.6}")
}

/// Whether something has been kept for the given time.
pub(super) fn is_over(since: Timestamp, retention: Duration, now: Timestamp) -> bool {
    Duration::try_from(now.duration_since(since)).is_ok_and(|age| age >= retention)
}

pub(super) fn serialize<S: Serializer>(moment: &Timestamp, to: S) -> Result<S::Ok, S::Error> {
    text(*moment).serialize(to)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Timestamp, D::Error> {
    String::deserialize(from)?.parse().map_err(de::Error::custom)
}
