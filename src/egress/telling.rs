//! How many decisions the audit is told of: a part for each tenant, so that none takes what tells of others, and connections that were made apart from
//! refusals, so that none hides one behind many that are refused. Tells nothing itself.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::bucket::Bucket;

/// Tenants whose parts are known at once. With more, those of tenants that tell little are forgotten, and are full again when they come back.
const MOST_TENANTS: usize = 4096;

/// So many events at once, and so many a second, of each kind.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    pub(super) burst: f64,
    pub(super) per_second: f64,
}

/// What somebody may still tell.
#[derive(Debug)]
pub(super) struct Budget {
    made: Bucket,
    refused: Bucket,
}

impl Budget {
    pub(super) fn new(pace: Pace) -> Self {
        let bucket = || Bucket::new(pace.burst, pace.per_second);
        Self { made: bucket(), refused: bucket() }
    }

    /// Takes what one event costs, if there is enough.
    pub(super) fn take(&self, is_refused: bool) -> bool {
        if is_refused { self.refused.take() } else { self.made.take() }
    }

    fn is_full(&self) -> bool {
        self.made.is_full() && self.refused.is_full()
    }
}

/// The budgets of all tenants.
#[derive(Debug)]
pub(super) struct Budgets {
    pace: Pace,
    of: Mutex<HashMap<Arc<str>, Arc<Budget>>>,
}

impl Budgets {
    pub(super) fn new(pace: Pace) -> Self {
        Self { pace, of: Mutex::default() }
    }

    /// Takes what one event of a tenant costs, if there is enough.
    pub(super) fn take(&self, tenant: &Arc<str>, is_refused: bool) -> bool {
        self.of(tenant).is_some_and(|budget| budget.take(is_refused))
    }

    /// Nothing where too many others tell much.
    fn of(&self, tenant: &Arc<str>) -> Option<Arc<Budget>> {
        // Every change is a whole one, so a panic leaves nothing half done.
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(budget) = of.get(tenant) {
            return Some(Arc::clone(budget));
        }
        if of.len() >= MOST_TENANTS {
            of.retain(|_, budget| !budget.is_full());
        }
        if of.len() >= MOST_TENANTS {
            return None;
        }
        let budget = Arc::new(Budget::new(self.pace));
        of.insert(Arc::clone(tenant), Arc::clone(&budget));
        Some(budget)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace { burst: 3.0, per_second: 0.0 };

    fn told(budgets: &Budgets, tenant: &str, is_refused: bool) -> usize {
        let tenant: Arc<str> = Arc::from(tenant);
        (0..100).filter(|_| budgets.take(&tenant, is_refused)).count()
    }

    #[test]
    fn no_tenant_takes_what_is_anothers_and_no_refusal_what_tells_of_a_connection() {
        let budgets = Budgets::new(PACE);
        assert_eq!(told(&budgets, "greedy", true), 3);
        assert_eq!((told(&budgets, "other", true), told(&budgets, "other", false)), (3, 3));
        assert_eq!((told(&budgets, "greedy", false), told(&budgets, "greedy", true)), (3, 0));
    }

    #[test]
    fn tenants_that_tell_nothing_are_forgotten_for_others() {
        let budgets = Budgets::new(PACE);
        told(&budgets, "loud", true);
        for n in 0..3 * MOST_TENANTS {
            assert!(budgets.of(&Arc::from(n.to_string())).is_some());
        }
        assert!(budgets.of.lock().unwrap().len() <= MOST_TENANTS);
        assert_eq!(told(&budgets, "loud", true), 0, "what was used up is remembered");
    }
}
