//! How much a tenant may have and do. Pure; what it has is counted elsewhere.

use std::collections::BTreeMap;

/// A tenant's quotas. Nothing: no limit but the server's own.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Quota {
    /// What it may have at once.
    pub share: Share,
    /// Executions that run or wait.
    pub executions: Option<u32>,
    /// Workspaces that outlive sessions.
    pub workspaces: Option<u32>,
    /// CPU time of executions that end within one day of UTC.
    pub cpu_seconds_a_day: Option<u64>,
    /// Bytes of blobs and notebooks.
    pub stored_bytes: Option<u64>,
    /// Requests.
    pub requests: Option<Rate>,
}

/// What a tenant may have at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// Sessions that have not ended.
    pub sessions: Option<u32>,
    /// What they were promised of CPUs, in thousandths.
    pub cpu_millis: Option<u64>,
    /// What they were promised of memory.
    pub memory_bytes: Option<u64>,
}

/// What a tenant has, of the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Sessions that have not ended.
    pub sessions: u32,
    /// What they were promised of CPUs, in thousandths.
    pub cpu_millis: u64,
    /// What they were promised of memory.
    pub memory_bytes: u64,
}

/// So many a second on average.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Above zero.
    pub per_second: f64,
    /// At most so many at once; one at least.
    pub burst: u32,
}

/// A quota that is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exceeded {
    /// The quota as the configuration names it.
    pub name: &'static str,
    /// How much it is.
    pub limit: u64,
}

impl Share {
    /// Whether what is held and one more, of these resources, is within it.
    ///
    /// # Errors
    /// The first of its quotas that is not enough.
    pub fn admits(&self, held: &Held, cpu_millis: u64, memory_bytes: u64) -> Result<(), Exceeded> {
        let rows = [
            ("sessions", u64::from(held.sessions), 1, self.sessions.map(u64::from)),
            ("cpu", held.cpu_millis, cpu_millis, self.cpu_millis),
            ("memory", held.memory_bytes, memory_bytes, self.memory_bytes),
        ];
        for (name, held, more, limit) in rows {
            if let Some(limit) = limit.filter(|limit| held.saturating_add(more) > *limit) {
                return Err(Exceeded { name, limit });
            }
        }
        Ok(())
    }
}

impl Held {
    /// One more session.
    pub fn add(&mut self, cpu_millis: u64, memory_bytes: u64) {
        self.sessions = self.sessions.saturating_add(1);
        self.cpu_millis = self.cpu_millis.saturating_add(cpu_millis);
        self.memory_bytes = self.memory_bytes.saturating_add(memory_bytes);
    }
}

/// The quotas of all tenants.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct QuotaTable {
    /// Of those that are not named.
    pub default: Quota,
    /// Of those that are.
    pub tenants: BTreeMap<String, Quota>,
}

impl QuotaTable {
    /// A tenant's.
    #[must_use]
    pub fn of(&self, tenant: &str) -> Quota {
        self.tenants.get(tenant).copied().unwrap_or(self.default)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_admitted_is_never_more_than_may_be(
            limits in (0..5_u32, 0..5000_u64, 0..500_u64),
            asked in proptest::collection::vec((1..2000_u64, 1..200_u64), 0..20)
        ) {
            let (sessions, cpu, memory) = limits;
            let share = Share { sessions: Some(sessions), cpu_millis: Some(cpu), memory_bytes: Some(memory) };
            let mut held = Held::default();
            for (cpu_millis, memory_bytes) in asked {
                let mut next = held;
                next.add(cpu_millis, memory_bytes);
                let fits = next.sessions <= sessions && next.cpu_millis <= cpu && next.memory_bytes <= memory;
                prop_assert_eq!(share.admits(&held, cpu_millis, memory_bytes).is_ok(), fits);
                prop_assert_eq!(Share::default().admits(&held, cpu_millis, memory_bytes), Ok(()));
                if fits {
                    held = next;
                }
            }
        }
    }

    #[test]
    fn the_quota_that_is_used_up_is_named() {
        let held = Held { sessions: 2, cpu_millis: 2000, memory_bytes: 10 };
        let share = Share { sessions: Some(3), cpu_millis: Some(2500), memory_bytes: None };
        assert_eq!(share.admits(&held, 500, u64::MAX), Ok(()));
        assert_eq!(share.admits(&held, 501, 0), Err(Exceeded { name: "cpu", limit: 2500 }));
        let share = Share { sessions: Some(2), ..Share::default() };
        assert_eq!(share.admits(&held, 0, 0), Err(Exceeded { name: "sessions", limit: 2 }));
    }
}
