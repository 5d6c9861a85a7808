//! Who may take how many of the mappings that the kernel allows one process.
//!
//! Each run of pages of a region is a mapping. What neighbours share must neither take those that the own container needs,
//! nor may the first neighbour take those of the next: of what is free for neighbours, each may hold an eighth, so that
//! there is always something left. The own container has half to itself, and more while it is free.

use rustix::io::Errno;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the kernel allows (`vm.max_map_count`) where it does not say.
const DEFAULT_MAPPINGS: u64 = 65_530;
/// Kept out of the budget: every queue pair (4096 bells), completion queue and link has one, and the program some.
const ASIDE: u64 = 10_000;
/// Bytes of addresses for regions: a quarter of what a process has.
const ADDRESSES: u64 = 1 << 45;

/// Mappings and the addresses that they cover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// How many.
    pub mappings: u64,
    /// Bytes of addresses.
    pub bytes: u64,
}

impl Amount {
    fn plus(self, other: Self) -> Self {
        // Both were taken within limits far below where this could overflow.
        Self { mappings: self.mappings + other.mappings, bytes: self.bytes + other.bytes }
    }

    fn minus(self, other: Self) -> Self {
        Self { mappings: self.mappings.saturating_sub(other.mappings), bytes: self.bytes.saturating_sub(other.bytes) }
    }

    fn part(self, parts: u64) -> Self {
        Self { mappings: self.mappings / parts, bytes: self.bytes / parts }
    }

    fn holds(self, asked: Self) -> bool {
        asked.mappings <= self.mappings && asked.bytes <= self.bytes
    }
}

/// Of what is free for neighbours, this part may be one neighbour's.
const PART: u64 = 8;

#[derive(Debug, Default)]
struct Used {
    own: Amount,
    neighbours: Amount,
}

/// The budget of a process.
#[derive(Clone, Debug)]
pub struct Budget {
    limit: Amount,
    used: Arc<Mutex<Used>>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that holds the lock can panic halfway through a change.
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Budget {
    /// What this machine allows.
    #[must_use]
    pub fn of_this_process() -> Self {
        let said = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
        Self::new(said.and_then(|said| said.trim().parse().ok()).unwrap_or(DEFAULT_MAPPINGS))
    }

    /// Where the kernel allows this many mappings.
    #[must_use]
    pub fn new(mappings: u64) -> Self {
        let limit = Amount { mappings: mappings.saturating_sub(ASIDE), bytes: ADDRESSES };
        Self { limit, used: Arc::default() }
    }

    /// Takes mappings for a region of the own container.
    pub fn take_own(&self, amount: Amount) -> Result<Lease, Errno> {
        let mut used = lock(&self.used);
        if !self.limit.minus(used.own).minus(used.neighbours).holds(amount) {
            return Err(Errno::NOMEM);
        }
        used.own = used.own.plus(amount);
        Ok(Lease { amount, used: Arc::clone(&self.used), neighbour: None })
    }

    /// What a neighbour has taken, which is nothing yet.
    #[must_use]
    pub fn account(&self) -> Account {
        Account { budget: self.clone(), held: Arc::default() }
    }
}

/// One neighbour's part.
#[derive(Clone, Debug)]
pub struct Account {
    budget: Budget,
    held: Arc<Mutex<Amount>>,
}

impl Account {
    /// Takes mappings for what the neighbour shares.
    pub fn take(&self, amount: Amount) -> Result<Lease, Errno> {
        let mut used = lock(&self.budget.used);
        let mut held = lock(&self.held);
        let limit = self.budget.limit;
        let for_all = limit.part(2);
        let free = |used: &Used| {
            let left = limit.minus(used.own).minus(used.neighbours);
            let theirs = for_all.minus(used.neighbours);
            Amount { mappings: left.mappings.min(theirs.mappings), bytes: left.bytes.min(theirs.bytes) }
        };
        let free = free(&used);
        if !free.holds(amount) || !free.plus(*held).part(PART).holds(held.plus(amount)) {
            return Err(Errno::NOMEM);
        }
        *held = held.plus(amount);
        used.neighbours = used.neighbours.plus(amount);
        Ok(Lease { amount, used: Arc::clone(&self.budget.used), neighbour: Some(Arc::clone(&self.held)) })
    }
}

/// Mappings that were taken; given back when dropped.
#[derive(Debug)]
pub struct Lease {
    amount: Amount,
    used: Arc<Mutex<Used>>,
    neighbour: Option<Arc<Mutex<Amount>>>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut used = lock(&self.used);
        let Some(held) = &self.neighbour else {
            used.own = used.own.minus(self.amount);
            return;
        };
        used.neighbours = used.neighbours.minus(self.amount);
        let mut held = lock(held);
        *held = held.minus(self.amount);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runs(mappings: u64) -> Amount {
        Amount { mappings, bytes: mappings << 12 }
    }

    fn fill(account: &Account, kept: &mut Vec<Lease>) -> u64 {
        let before = kept.len();
        kept.extend(std::iter::from_fn(|| account.take(runs(1)).ok()));
        (kept.len() - before) as u64
    }

    #[test]
    fn greedy_neighbours_leave_something_to_the_next_and_half_to_the_container() {
        let budget = Budget::new(DEFAULT_MAPPINGS);
        let mut kept = Vec::new();
        let taken: Vec<u64> = (0..9).map(|_| fill(&budget.account(), &mut kept)).collect();
        assert!(taken.windows(2).all(|pair| pair[1] < pair[0]), "{taken:?}");
        assert!(taken[8] > 1000, "{taken:?}");
        let mut own = 0;
        while let Ok(lease) = budget.take_own(runs(1)) {
            kept.push(lease);
            own += 1;
        }
        assert!(own >= (DEFAULT_MAPPINGS - ASIDE) / 2, "{own}");
        drop(kept);
        assert_eq!(fill(&budget.account(), &mut Vec::new()), taken[0]);
    }

    #[test]
    fn addresses_are_counted_too() {
        let account = Budget::new(DEFAULT_MAPPINGS).account();
        let large = Amount { mappings: 1, bytes: ADDRESSES / 16 };
        let first = account.take(large);
        assert!(first.is_ok());
        assert!(account.take(large).is_err());
        assert!(account.take(runs(1)).is_err() || first.is_ok());
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_granted_twice(steps in prop::collection::vec((0usize..5, 0u64..9000, any::<bool>()), 1..200)) {
            let budget = Budget::new(DEFAULT_MAPPINGS);
            let accounts: Vec<_> = (0..4).map(|_| budget.account()).collect();
            let mut kept = Vec::new();
            for (who, count, give) in steps {
                if give && !kept.is_empty() {
                    kept.swap_remove(count as usize % kept.len());
                }
                kept.extend(match accounts.get(who) {
                    Some(account) => account.take(runs(count)),
                    None => budget.take_own(runs(count)),
                });
                let sum: u64 = kept.iter().map(|lease: &Lease| lease.amount.mappings).sum();
                prop_assert!(sum <= DEFAULT_MAPPINGS - ASIDE);
            }
            kept.clear();
            let used = lock(&budget.used);
            prop_assert_eq!(used.own.plus(used.neighbours), Amount::default());
        }
    }
}
