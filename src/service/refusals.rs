//! How many refused requests of each tenant are told of one by one within a minute; those beyond are counted. Arithmetic only: what is told, and where, is the audit's business.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// So many of a tenant are told one by one, and so many of those whose keys are not valid together …
pub(super) const TOLD: u64 = 30;
/// … within this time.
const WITHIN: Duration = Duration::from_secs(60);

/// Refused requests of the minute by tenant; of nobody, where the key is not valid. There are no more tenants with keys than keys. All begin anew at the same time, so that
/// nothing has to be looked through.
#[derive(Debug)]
pub(super) struct Refusals {
    since: Instant,
    of: HashMap<Option<String>, u64>,
}

impl Refusals {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, of: HashMap::new() }
    }

    /// Counts one. Says whether it may be told.
    pub(super) fn count(&mut self, tenant: Option<&str>) -> bool {
        let count = self.of.entry(tenant.map(str::to_owned)).or_default();
        *count = count.saturating_add(1);
        *count <= TOLD
    }

    /// Of a minute that is over, how many were not told, by tenant. Another begins then.
    pub(super) fn over(&mut self, now: Instant) -> Vec<(Option<String>, u64)> {
        if now.saturating_duration_since(self.since) < WITHIN {
            return Vec::new();
        }
        self.since = now;
        self.take()
    }

    /// The same, though the minute is not over.
    pub(super) fn take(&mut self) -> Vec<(Option<String>, u64)> {
        let counts = std::mem::take(&mut self.of).into_iter();
        counts.filter(|(_, count)| *count > TOLD).map(|(tenant, count)| (tenant, count - TOLD)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tenant_has_so_many_a_minute_and_the_others_are_counted() {
        let start = Instant::now();
        let mut refusals = Refusals::new(start);
        let told = |refusals: &mut Refusals, tenant| (0..TOLD + 7).filter(|_| refusals.count(tenant)).count() as u64;
        assert_eq!((told(&mut refusals, Some("one")), told(&mut refusals, None)), (TOLD, TOLD));
        assert!(refusals.count(Some("two")));
        assert_eq!(refusals.over(start + WITHIN / 2), []);
        let mut left_out = refusals.over(start + WITHIN);
        left_out.sort();
        assert_eq!(left_out, [(None, 7), (Some("one".to_owned()), 7)]);
        assert!(refusals.count(Some("one")), "another minute");
        assert_eq!(refusals.over(start + 2 * WITHIN), []);
    }
}
