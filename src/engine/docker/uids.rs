//! Which uid belongs to which cell, and to which workspace that outlives cells. Only bookkeeping; the labels of containers and volumes are the truth that it is
//! loaded from.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

/// The uids of a range, each held by at most one cell, or by a workspace and the cell that has it.
#[derive(Debug)]
pub(super) struct UidPool {
    range: RangeInclusive<u32>,
    held: BTreeMap<String, u32>,
    taken: BTreeSet<u32>,
    next: u32,
}

impl UidPool {
    /// All of them free. The first one handed out is at `seed` in the range, so that several control planes on one engine
    /// seldom meet.
    pub(super) fn new(range: RangeInclusive<u32>, seed: u32) -> Self {
        let size = range.end().saturating_sub(*range.start()).saturating_add(1);
        let next = range.start() + seed % size.max(1);
        Self { range, held: BTreeMap::new(), taken: BTreeSet::new(), next }
    }

    /// The uid of a cell or a workspace: the one it holds, or a free one; `None` when there is none. The search goes on behind the one given
    /// last, so a uid rests as long as possible before it comes again.
    pub(super) fn take(&mut self, cell: &str) -> Option<u32> {
        if let Some(uid) = self.held.get(cell) {
            return Some(*uid);
        }
        let (first, last) = (*self.range.start(), *self.range.end());
        let uid = (self.next..=last).chain(first..self.next).find(|uid| !self.taken.contains(uid))?;
        self.next = if uid == last { first } else { uid + 1 };
        self.hold(cell, uid);
        Some(uid)
    }

    /// The cell or workspace is known to have this uid.
    pub(super) fn hold(&mut self, cell: &str, uid: u32) {
        if let Some(other) = self.held.insert(cell.to_owned(), uid) {
            self.free(other);
        }
        self.taken.insert(uid);
    }

    /// The cell's uid, if it holds one.
    pub(super) fn held(&self, cell: &str) -> Option<u32> {
        self.held.get(cell).copied()
    }

    /// The cell or workspace is gone: its absence was seen.
    pub(super) fn release(&mut self, cell: &str) {
        if let Some(uid) = self.held.remove(cell) {
            self.free(uid);
        }
    }

    /// A uid goes on being taken as long as anything holds it: a workspace when its cell is gone, or a cell.
    fn free(&mut self, uid: u32) {
        if !self.held.values().any(|other| *other == uid) {
            self.taken.remove(&uid);
        }
    }

    /// Somebody else has the uid of this cell or workspace: it gets another one next time, and this one stays out of use.
    pub(super) fn avoid(&mut self, cell: &str) {
        self.held.remove(cell);
    }

    /// Somebody else's container or workspace has this uid.
    pub(super) fn exclude(&mut self, uid: u32) {
        self.taken.insert(uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_range_is_used_up_and_not_left() {
        let mut pool = UidPool::new(10..=12, 2);
        let uids: Vec<_> = ["a", "b", "c", "d"].iter().map(|cell| pool.take(cell)).collect();
        assert_eq!(uids, [Some(12), Some(10), Some(11), None]);
        pool.release("b");
        assert_eq!(pool.take("d"), Some(10));
    }

    #[test]
    fn a_workspaces_uid_stays_its_own_while_cells_come_and_go() {
        let mut pool = UidPool::new(10..=11, 0);
        assert_eq!(pool.take("workspace"), Some(10));
        pool.hold("cell", 10);
        pool.release("cell");
        assert_eq!([pool.take("a"), pool.take("b")], [Some(11), None]);
        pool.release("workspace");
        assert_eq!(pool.take("b"), Some(10));
    }

    #[test]
    fn an_avoided_uid_does_not_come_back() {
        let mut pool = UidPool::new(10..=11, 0);
        assert_eq!(pool.take("a"), Some(10));
        pool.avoid("a");
        assert_eq!(pool.take("a"), Some(11));
        assert_eq!(pool.take("b"), None);
    }

    proptest! {
        #[test]
        fn no_two_cells_ever_hold_one_uid(steps in proptest::collection::vec((0u8..3, 0u8..6), 0..200)) {
            let mut pool = UidPool::new(100..=104, 3);
            for (what, cell) in steps {
                let cell = format!("c{cell}");
                match what {
                    0 => { pool.take(&cell); }
                    1 => pool.release(&cell),
                    _ => { pool.held(&cell); }
                }
                let distinct: BTreeSet<_> = pool.held.values().collect();
                prop_assert_eq!(distinct.len(), pool.held.len());
                prop_assert_eq!(pool.taken.len(), pool.held.len());
            }
        }
    }
}
