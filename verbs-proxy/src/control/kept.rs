//! Regions that the container has withdrawn and keeps: a program that registers the same buffer again then needs no message
//! ([`ringfence_protocol::keys`]).
//!
//! What is kept must never make anything fail. So each connection is told how much it may keep, for which there is room
//! beyond the policy's limits; and whoever registers more than the policy has room for revokes all that is withdrawn at
//! that time. The owner of a region learns of it when it wants to restore it. Its pages are its own until then.

use super::driver::Driver;
use super::node::Node;
use super::quota::{Quota, Resource, Taken};
use crate::memory::Granted;
use rustix::io::Errno;

/// One connection may keep this part of what is left, so that something is left for the next ...
pub const PART: u64 = 8;
/// ... and this at most.
const MOST_BYTES: u64 = 32 << 20;
const MOST_REGIONS: u64 = 256;

/// What one connection may keep, for as long as it lasts.
#[derive(Debug)]
pub struct Allowance {
    /// Bytes of whole pages.
    pub bytes: u64,
    /// Regions.
    pub regions: u32,
    _taken: [Taken; 2],
}

impl Allowance {
    /// The part of the next connection.
    pub fn of(quota: &Quota) -> Result<Self, Errno> {
        let bytes = (quota.left(Resource::KeptBytes) / PART).min(MOST_BYTES);
        let regions = (quota.left(Resource::Kept) / PART).min(MOST_REGIONS);
        let taken = [quota.take(Resource::KeptBytes, bytes)?, quota.take(Resource::Kept, regions)?];
        Ok(Self { bytes, regions: regions as u32, _taken: taken })
    }
}

impl<D: Driver> Node<D> {
    /// Does what may fail for want of something that regions hold; once more without the withdrawn ones, if it does.
    pub fn pressing<T>(&mut self, attempt: impl Fn(&mut Self) -> Result<T, Errno>) -> Result<T, Errno> {
        match attempt(self) {
            Err(Errno::NOMEM) if self.revoke_withdrawn() => attempt(self),
            result => result,
        }
    }

    /// Revokes all regions that are withdrawn. False if there were none.
    ///
    /// All, because to look for them takes longer than their owners lose: a registration each.
    fn revoke_withdrawn(&mut self) -> bool {
        let withdrawn = self.shares.iter().filter(|(_, backing)| self.entrance.revoke(backing.granted));
        let revoked: Vec<(u32, Granted)> = withdrawn.map(|(share, backing)| (*share, backing.granted)).collect();
        if revoked.is_empty() {
            return false;
        }
        let places: Vec<Granted> = revoked.iter().map(|(_, granted)| *granted).collect();
        drop(
            self.worker
                .call(move |plane| places.into_iter().map(|place| plane.regions.remove(place)).collect::<Vec<_>>()),
        );
        for (share, _) in revoked {
            D::forget_share(self, share);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::Limits;
    use crate::stats::Counters;

    #[test]
    fn every_connection_may_keep_something_and_all_together_no_more_than_there_is_room_for() {
        let quota = Quota::new(&Limits::default(), Counters::private().unwrap().holdings);
        let all: Vec<Allowance> = std::iter::from_fn(|| Allowance::of(&quota).ok()).take(1024).collect();
        assert_eq!(all.len(), 1024);
        let regions = (quota.limit(Resource::Kept) / PART).min(MOST_REGIONS) as u32;
        assert_eq!((all[0].bytes, all[0].regions), (MOST_BYTES, regions));
        assert!(regions > 0);
        assert!(all[9].bytes > 4 << 20);
        assert!(all.iter().map(|one| one.bytes).sum::<u64>() <= quota.limit(Resource::KeptBytes));
        assert!(all.iter().map(|one| u64::from(one.regions)).sum::<u64>() <= quota.limit(Resource::Kept));
        drop(all);
        assert_eq!(quota.left(Resource::KeptBytes), quota.limit(Resource::KeptBytes));
    }
}
