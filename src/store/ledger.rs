//! A budget's books: who holds how many bytes, for which tenant, and who goes first. Arithmetic only; files are the business of its users.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

/// Who holds how much. What ranks lower goes first.
#[derive(Debug)]
pub(super) struct Ledger<K, R> {
    held: HashMap<K, (R, u64, String)>,
    order: BTreeSet<(R, K)>,
    total: u64,
    sums: Sums,
}

/// What is held for each tenant. Clones are the same, for others to look into.
#[derive(Debug, Clone, Default)]
pub(super) struct Sums(Arc<Mutex<HashMap<String, u64>>>);

impl Sums {
    /// What is held for a tenant.
    pub(super) fn of(&self, tenant: &str) -> u64 {
        self.change(|sums| sums.get(tenant).copied().unwrap_or_default())
    }

    fn add(&self, tenant: &str, bytes: u64) {
        self.change(|sums| {
            let sum = sums.entry(tenant.to_owned()).or_default();
            *sum = sum.saturating_add(bytes);
        });
    }

    fn take(&self, tenant: &str, bytes: u64) {
        self.change(|sums| {
            if let Some(sum) = sums.get_mut(tenant) {
                *sum = sum.saturating_sub(bytes);
                if *sum == 0 {
                    sums.remove(tenant);
                }
            }
        });
    }

    fn change<T>(&self, change: impl FnOnce(&mut HashMap<String, u64>) -> T) -> T {
        // Every change is whole between its statements that can panic, of which there are none.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<K: Copy + Ord + Hash, R: Copy + Ord> Ledger<K, R> {
    /// Nobody holds anything.
    pub(super) fn new() -> Self {
        Self { held: HashMap::new(), order: BTreeSet::new(), total: 0, sums: Sums::default() }
    }

    /// What is held for each tenant.
    pub(super) fn sums(&self) -> Sums {
        self.sums.clone()
    }

    /// What is held in all.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// The rank of a holder.
    pub(super) fn rank(&self, key: K) -> Option<R> {
        self.held.get(&key).map(|(rank, ..)| *rank)
    }

    /// States what a holder holds for a tenant, in place of what it held before.
    pub(super) fn set(&mut self, key: K, rank: R, tenant: &str, bytes: u64) {
        self.remove(key);
        self.held.insert(key, (rank, bytes, tenant.to_owned()));
        self.sums.add(tenant, bytes);
        self.order.insert((rank, key));
        self.total = self.total.saturating_add(bytes);
    }

    /// It holds nothing any more.
    pub(super) fn remove(&mut self, key: K) {
        if let Some((rank, bytes, tenant)) = self.held.remove(&key) {
            self.sums.take(&tenant, bytes);
            self.order.remove(&(rank, key));
            self.total = self.total.saturating_sub(bytes);
        }
    }

    /// Who goes first.
    pub(super) fn first(&self) -> Option<K> {
        self.order.first().map(|(_, key)| *key)
    }

    /// Who goes first of all others.
    pub(super) fn first_but(&self, key: K) -> Option<K> {
        self.order.iter().map(|(_, k)| *k).find(|k| *k != key)
    }

    /// All that a test of the rank takes, from the first on until one is not taken.
    pub(super) fn first_while(&self, mut test: impl FnMut(R) -> bool) -> Vec<K> {
        self.order.iter().take_while(|(rank, _)| test(*rank)).map(|(_, key)| *key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_total_is_the_sum_of_what_is_held(steps in proptest::collection::vec((0u8..6, 0u8..4, 0u64..100, any::<bool>()), 0..60)) {
            let mut ledger = Ledger::new();
            let mut model = HashMap::new();
            for (key, rank, bytes, remove) in steps {
                if remove {
                    ledger.remove(key);
                    model.remove(&key);
                } else {
                    let tenant = ["a", "b"][usize::from(rank % 2)];
                    ledger.set(key, rank, tenant, bytes);
                    model.insert(key, (rank, bytes));
                }
                prop_assert_eq!(ledger.total(), model.values().map(|(_, b)| b).sum::<u64>());
                for (odd, tenant) in ["a", "b"].into_iter().enumerate() {
                    let of_tenant = model.values().filter(|(rank, _)| usize::from(rank % 2) == odd).map(|(_, b)| b);
                    prop_assert_eq!(ledger.sums().of(tenant), of_tenant.sum::<u64>());
                }
                prop_assert_eq!(ledger.first(), model.iter().map(|(k, (r, _))| (*r, *k)).min().map(|(_, k)| k));
                prop_assert!(ledger.first_but(key) != Some(key));
            }
        }
    }
}
