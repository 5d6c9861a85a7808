//! What a container holds, against what its policy allows. Exhaustion is `ENOMEM`, as on a full device.

use super::kept;
use crate::launch::Limits;
use crate::stats::Holdings;
use rustix::fd::{AsFd, AsRawFd, RawFd};
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A countable thing, by its place in [`ringfence_launch::counters::QUOTAS`].
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
    /// Bytes of the rings of queue pairs and completion queues.
    QueueBytes,
    /// Protection domains, contexts and channels together.
    Other,
    /// Handles of memory regions: those of regions that were revoked as well, until they are deregistered.
    MrHandle,
    /// Bytes of deregistered regions that connections may keep: [`crate::control::kept`].
    KeptBytes,
    /// How many such regions.
    Kept,
}

const KINDS: usize = ringfence_launch::counters::QUOTAS.len();
// The last of both.
const _: () = assert!(Resource::Kept as usize == KINDS - 1);

/// Contexts, protection domains and completion channels of one container: no device limit of this kind is smaller.
const MAX_OTHER: u64 = 4096;

/// Files of pages for one memory region that the policy allows. The library makes [`REGIONS_AT_ONCE`] at most for a registration, but
/// one that pages of several registrations came from lives as long as the last of them.
const REGIONS_PER_MR: u64 = 6;
/// The region's inner pages, and those at its ends.
const REGIONS_AT_ONCE: u64 = 3;

/// Bytes of queues for each byte of memory regions that the policy allows, and how many there are at least.
const QUEUE_SHARE: u64 = 4;
const LEAST_QUEUE_BYTES: u64 = 16 << 20;

/// Bytes that the policy allows to be registered, for each that may be kept after it was deregistered; and how many may be.
const KEPT_SHARE: u64 = 16;
const MOST_KEPT_BYTES: u64 = 256 << 20;
/// Regions that may be.
const MOST_KEPT: u64 = 2048;

/// Descriptors that stay free of the container's objects: for what is received, and what waits to be closed.
const RESERVED_DESCRIPTORS: u64 = 4096;

/// Counters of one container. What is held stands where operators read it, which nobody but the proxy writes.
#[derive(Debug)]
pub struct Quota {
    holdings: Arc<Holdings>,
    limits: [u64; KINDS],
    /// Descriptors of objects have lower numbers than the first, those of connections than the second.
    ceilings: [RawFd; 2],
}

/// What was taken of a quota. Given back when it is dropped.
#[derive(Debug)]
#[must_use = "it is given back at once"]
pub struct Taken {
    holdings: Arc<Holdings>,
    resource: Resource,
    amount: u64,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.holdings.used(self.resource as usize).fetch_sub(self.amount, Ordering::Relaxed);
    }
}

impl Quota {
    /// Nothing is held yet.
    #[must_use]
    pub fn new(limits: &Limits, holdings: Arc<Holdings>) -> Self {
        let bytes = limits.max_mr_bytes.0;
        // Regions are whole pages: each may have one more page than its bytes at either end.
        let pages = bytes.saturating_add(u64::from(limits.max_mr) * 2 * crate::shared::PAGE as u64);
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        // The file of each takes a descriptor, which nothing else must lack.
        let kept = u64::from(limits.max_mr).min(MOST_KEPT).min(descriptors / 16);
        // Of less no connection would have any.
        let kept = kept - kept % kept::PART;
        let kept_bytes = (bytes / KEPT_SHARE).min(MOST_KEPT_BYTES);
        let below = |reserved: u64| RawFd::try_from(descriptors - reserved).unwrap_or(RawFd::MAX);
        let limits: [u64; KINDS] = [
            u64::from(limits.max_qp),
            u64::from(limits.max_cq),
            u64::from(limits.max_mr),
            bytes,
            // Whatever is kept, a registration within the policy finds room for its pages.
            pages.saturating_add(kept_bytes),
            u64::from(limits.max_mr) * REGIONS_PER_MR + kept * REGIONS_AT_ONCE,
            (bytes / QUEUE_SHARE).max(LEAST_QUEUE_BYTES),
            MAX_OTHER,
            u64::from(limits.max_mr) + kept,
            kept_bytes,
            kept,
        ];
        limits.iter().enumerate().for_each(|(place, limit)| holdings.show_limit(place, *limit));
        Self {
            holdings,
            limits,
            ceilings: [
                below(RESERVED_DESCRIPTORS.min(descriptors / 2)),
                below((RESERVED_DESCRIPTORS / 2).min(descriptors / 4)),
            ],
        }
    }

    /// Takes `amount`.
    pub fn take(&self, resource: Resource, amount: u64) -> Result<Taken, Errno> {
        let (used, limit) = (self.holdings.used(resource as usize), self.limits[resource as usize]);
        let within = |used: u64| used.checked_add(amount).filter(|used| *used <= limit);
        used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).map_err(|_| Errno::NOMEM)?;
        Ok(Taken { holdings: Arc::clone(&self.holdings), resource, amount })
    }

    /// Gives the descriptor back, if an object of the container may keep it.
    ///
    /// The kernel gives the lowest free number, so as long as objects keep only low ones, there is room above for all that
    /// one message can bring. Without room the kernel would close the rest in our name, however long that takes.
    pub fn keep<T: AsFd>(&self, fd: T) -> Result<T, Errno> {
        if fd.as_fd().as_raw_fd() < self.ceilings[0] { Ok(fd) } else { Err(Errno::MFILE) }
    }

    /// The same for a connection: objects must not keep other processes out.
    #[must_use]
    pub fn may_keep_connection(&self, socket: impl AsFd) -> bool {
        socket.as_fd().as_raw_fd() < self.ceilings[1]
    }

    /// What is left.
    #[must_use]
    pub fn left(&self, resource: Resource) -> u64 {
        self.limit(resource).saturating_sub(self.holdings.used(resource as usize).load(Ordering::Relaxed))
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
    use crate::launch::Bytes;
    use crate::stats::Counters;

    fn quota(limits: &Limits) -> Quota {
        Quota::new(limits, Counters::private().unwrap().holdings)
    }

    #[test]
    fn a_full_quota_is_enomem_until_something_is_given_back() {
        let quota = quota(&Limits { max_qp: 2, ..Limits::default() });
        let first = quota.take(Resource::Qp, 1).unwrap();
        let _second = quota.take(Resource::Qp, 1).unwrap();
        assert_eq!(quota.take(Resource::Qp, 1).unwrap_err(), Errno::NOMEM);
        drop(first);
        let _third = quota.take(Resource::Qp, 1).unwrap();
        assert_eq!(quota.take(Resource::MrBytes, u64::MAX).unwrap_err(), Errno::NOMEM);
    }

    #[test]
    fn small_policies_have_usable_queues_and_large_ones_no_more_than_a_share() {
        let bytes =
            |most| quota(&Limits { max_mr_bytes: Bytes(most), ..Limits::default() }).limit(Resource::QueueBytes);
        assert_eq!(bytes(0), 16 << 20);
        assert_eq!(bytes(1 << 30), 256 << 20);
    }

    #[test]
    fn high_descriptors_are_not_for_objects() {
        let quota = Quota { ceilings: [3, 3], ..quota(&Limits::default()) };
        let (fd, _other) = rustix::pipe::pipe().unwrap();
        assert_eq!(quota.keep(fd).unwrap_err(), Errno::MFILE);
    }
}
