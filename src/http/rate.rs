//! How much is left of a quota, in the fields that clients look for (`RateLimit-Policy` and `RateLimit`, draft-ietf-httpapi-ratelimit-headers).

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};

use crate::domain::quota::{Exceeded, Rate};
use crate::service::quotas::RateState;

const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const LEFT: HeaderName = HeaderName::from_static("ratelimit");

/// What the door learns of a request's rate, for the answer's fields.
pub type Slot = Arc<OnceLock<Limit>>;

/// A quota, and what is left of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    name: &'static str,
    quota: u64,
    /// Seconds in which all of it comes back, where it does.
    window: Option<u64>,
    left: u64,
    /// Seconds until there is more.
    reset: u64,
}

impl Limit {
    /// A rate of requests of which nothing is left.
    pub(super) fn exhausted(rate: Rate, retry_after: Duration) -> Self {
        Self { left: 0, reset: seconds(retry_after), ..Self::of_rate(rate) }
    }

    /// A quota of something else, of which nothing is left.
    pub(super) fn exceeded(exceeded: Exceeded, retry_after: Duration) -> Self {
        let Exceeded { name, limit } = exceeded;
        Self { name, quota: limit, window: None, left: 0, reset: seconds(retry_after) }
    }

    fn of_rate(rate: Rate) -> Self {
        let all = Duration::try_from_secs_f64(f64::from(rate.burst) / rate.per_second).unwrap_or(Duration::MAX);
        Self { name: "requests", quota: rate.burst.into(), window: Some(seconds(all)), left: 0, reset: 0 }
    }

    /// Adds the fields to an answer's.
    pub(super) fn write(&self, headers: &mut HeaderMap) {
        let Self { name, quota, window, left, reset } = self;
        let window = window.map(|seconds| format!(";w={seconds}")).unwrap_or_default();
        let fields =
            [(POLICY, format!("\"{name}\";q={quota}{window}")), (LEFT, format!("\"{name}\";r={left};t={reset}"))];
        for (field, text) in fields {
            if let Ok(value) = HeaderValue::from_str(&text) {
                headers.append(field, value);
            }
        }
    }
}

impl From<RateState> for Limit {
    fn from(state: RateState) -> Self {
        let RateState { rate, remaining, full_in } = state;
        let reset = if full_in.is_zero() { 0 } else { seconds(full_in) };
        Self { left: remaining.into(), reset, ..Self::of_rate(rate) }
    }
}

/// Whole seconds, one at least: who comes earlier comes in vain.
pub(super) fn seconds(time: Duration) -> u64 {
    (time.as_secs() + u64::from(time.subsec_nanos() > 0)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(limit: Limit) -> [String; 2] {
        let mut headers = HeaderMap::new();
        limit.write(&mut headers);
        [POLICY, LEFT].map(|name| headers[name].to_str().unwrap().to_owned())
    }

    #[test]
    fn fields_are_of_the_form_of_the_draft() {
        let rate = Rate { per_second: 2.0, burst: 5 };
        let state = RateState { rate, remaining: 3, full_in: Duration::from_millis(750) };
        assert_eq!(fields(state.into()), ["\"requests\";q=5;w=3", "\"requests\";r=3;t=1"]);
        let none = Limit::exhausted(rate, Duration::from_millis(1));
        assert_eq!(fields(none), ["\"requests\";q=5;w=3", "\"requests\";r=0;t=1"]);
        let exceeded = Limit::exceeded(Exceeded { name: "sessions", limit: 7 }, Duration::from_secs(5));
        assert_eq!(fields(exceeded), ["\"sessions\";q=7", "\"sessions\";r=0;t=5"]);
    }
}
