//! What a container holds, against what its policy allows. Exhaustion is `ENOMEM`, as on a full device.

use crate::launch::Limits;
use rustix::io::Errno;

/// A countable thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Queue pairs.
    Qp,
    /// Completion queues.
    Cq,
    /// Memory regions.
    Mr,
    /// Bytes of memory regions.
    MrBytes,
    /// Bytes of the pages that back memory regions.
    RegionBytes,
    /// Files of such pages.
    Region,
    /// Protection domains, contexts and channels together.
    Other,
}

const KINDS: usize = 7;

/// Contexts, protection domains and completion channels of one container: no device limit of this kind is smaller.
const MAX_OTHER: u64 = 4096;

/// Files of pages for one memory region that the policy allows. The library makes one at most for a registration, but one
/// that pages of several registrations came from lives as long as the last of them.
const REGIONS_PER_MR: u64 = 4;

/// Counters of one container.
#[derive(Debug)]
pub struct Quota {
    used: [u64; KINDS],
    limits: [u64; KINDS],
}

impl Quota {
    /// Nothing is held yet.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        // Regions are whole pages: each may have one more page than its bytes at either end.
        let pages = limits.max_mr_bytes.saturating_add(u64::from(limits.max_mr) * 2 * crate::shared::PAGE as u64);
        Self {
            used: [0; KINDS],
            limits: [
                u64::from(limits.max_qp),
                u64::from(limits.max_cq),
                u64::from(limits.max_mr),
                limits.max_mr_bytes,
                pages,
                u64::from(limits.max_mr) * REGIONS_PER_MR,
                MAX_OTHER,
            ],
        }
    }

    /// Takes `amount`.
    pub fn take(&mut self, resource: Resource, amount: u64) -> Result<(), Errno> {
        let used = self.used[resource as usize].checked_add(amount).ok_or(Errno::NOMEM)?;
        if used > self.limits[resource as usize] {
            return Err(Errno::NOMEM);
        }
        self.used[resource as usize] = used;
        Ok(())
    }

    /// Gives `amount` back.
    pub fn give(&mut self, resource: Resource, amount: u64) {
        let used = &mut self.used[resource as usize];
        debug_assert!(*used >= amount, "{resource:?}: {amount} given back of {used}");
        *used = used.saturating_sub(amount);
    }

    /// The limit.
    #[must_use]
    pub fn limit(&self, resource: Resource) -> u64 {
        self.limits[resource as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_quota_is_enomem_until_something_is_given_back() {
        let mut quota = Quota::new(&Limits { max_qp: 2, ..Limits::default() });
        assert_eq!(quota.take(Resource::Qp, 1), Ok(()));
        assert_eq!(quota.take(Resource::Qp, 1), Ok(()));
        assert_eq!(quota.take(Resource::Qp, 1), Err(Errno::NOMEM));
        quota.give(Resource::Qp, 1);
        assert_eq!(quota.take(Resource::Qp, 1), Ok(()));
        assert_eq!(quota.take(Resource::MrBytes, u64::MAX), Err(Errno::NOMEM));
    }
}
