//! Memory that neighbours show each other.

use super::hello::memory;
use super::{Arc, Foreign, LinkId, Means, Message, Neighbour, NeighbourFault};
use crate::control::adopted::RegionFile;
use crate::control::quota::Taken;
use crate::datagram::MAX_FDS;
use crate::device::soft::Worker;
use crate::device::soft::link::Share;
use crate::errors::passes;
use crate::fabric::budget::{Amount, Lease};
use crate::memory::Granted;
use crate::shared::{Mapping, Run, RunFile, SealedFile};
use crate::steps::{self, Step};
use crate::warden::Warden;
use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use std::collections::{HashMap, VecDeque};

/// A region's pages, as its owner keeps them.
#[derive(Clone, Debug)]
pub struct SharedRun {
    /// The file.
    pub file: Arc<RegionFile>,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A region of the own container, as neighbours may come to share it.
#[derive(Debug)]
pub struct Backing {
    /// Its place among the container's.
    pub granted: Granted,
    /// What of it neighbours may see, if anything.
    pub shown: Vec<SharedRun>,
    /// What its own mapping takes.
    pub lease: Lease,
    /// What it takes of the quota.
    pub taken: [Taken; 2],
}

/// What mapping some runs takes.
#[must_use]
pub fn amount(runs: impl IntoIterator<Item = u64>) -> Amount {
    runs.into_iter().fold(Amount::default(), |sum, bytes| Amount {
        mappings: sum.mappings + 1,
        bytes: sum.bytes.saturating_add(bytes),
    })
}

/// Descriptors on their way to one neighbour: the kernel counts those of all proxies together, and a neighbour that does not
/// read would keep them.
const MAX_IN_FLIGHT: usize = 2 * MAX_FDS;

/// What must be shared with a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owed {
    /// The region with this name.
    Region(u32),
    /// What of the region with this name can be shown for writing.
    Writable(u32),
    /// The buffer for what it must not map: [`crate::device::soft::bounce`].
    Bounce,
}

/// The regions that were offered to a neighbour and not answered.
#[derive(Debug, Default)]
pub(super) struct Given {
    /// By name, with the descriptors of each.
    unanswered: HashMap<u32, usize>,
    in_flight: usize,
    /// What waits for its turn.
    owed: VecDeque<Owed>,
}

impl Given {
    /// So many descriptors went out under this name.
    pub(super) fn offer(&mut self, share: u32, fds: usize) {
        self.unanswered.insert(share, fds);
        self.in_flight += fds;
    }

    /// There is one answer to each offer. A neighbour that could refuse what waits for its turn could make the queue grow.
    fn answered(&mut self, share: u32) -> Result<(), NeighbourFault> {
        let fds = self.unanswered.remove(&share).ok_or(NeighbourFault::Malformed("an answer to no offer"))?;
        self.in_flight -= fds;
        Ok(())
    }
}

impl Neighbour {
    /// This must be shared with it.
    pub fn owe(&mut self, owed: Owed) {
        self.given.owed.push_back(owed);
    }

    /// The region with this name is gone.
    pub fn owe_no_more(&mut self, share: u32) {
        self.given.owed.retain(|owed| *owed != Owed::Region(share) && *owed != Owed::Writable(share));
    }

    /// What is to be shared with it next, if it has taken enough of what was before.
    pub fn next_owed(&mut self) -> Option<Owed> {
        if self.given.in_flight > MAX_IN_FLIGHT - MAX_FDS { None } else { self.given.owed.pop_front() }
    }

    /// Shares one of our regions with it. After [`NeighbourFault::Unshared`] nothing has been said.
    pub fn share(&mut self, share: u32, runs: &[SharedRun], warden: &mut Warden) -> Result<(), NeighbourFault> {
        if runs.len() > MAX_FDS {
            return Err(Errno::TOOBIG.into());
        }
        let open = |run: &SharedRun| warden.read_only(run.file.own().ok_or(Errno::PERM)?);
        let read_only = runs.iter().map(open).collect::<Result<Vec<_>, _>>();
        let read_only = read_only.map_err(NeighbourFault::Unshared)?;
        steps::at(Step::Immutable);
        let message =
            Message::Share { share, runs: runs.iter().map(|run| (run.offset, run.bytes)).collect(), writable: false };
        self.send_memory(&message, &read_only.iter().map(AsFd::as_fd).collect::<Vec<_>>())?;
        self.given.offer(share, runs.len());
        steps::at(Step::ShareSent);
        Ok(())
    }

    /// Takes a region back. If that cannot be said the link must end: the neighbour would go on using it.
    pub fn unshare(&self, share: u32) -> Result<(), NeighbourFault> {
        self.send(&Message::Unshare { share }, &[])
    }

    /// It has mapped a region of ours.
    pub(super) fn confirmed(&mut self, link: LinkId, share: u32, worker: &Worker) -> Result<(), NeighbourFault> {
        self.given.answered(share)?;
        worker.call(move |plane| {
            if let Some(entry) = plane.device.links.get_mut(link)
                // Only what was asked for and not taken back since.
                && let Some(shared) = entry.shared.get_mut(&share)
            {
                shared.confirmed = true;
                plane.share_arrived(link);
            }
        });
        steps::at(Step::ShareConfirmed);
        Ok(())
    }

    /// It has not. Requests that need the region go on waiting, and ask again when their retry timers have run out.
    pub(super) fn refused(&mut self, link: LinkId, share: u32, worker: &Worker) -> Result<(), NeighbourFault> {
        self.given.answered(share)?;
        worker.call(move |plane| {
            if let Some(entry) = plane.device.links.get_mut(link)
                && entry.shared.get(&share).is_some_and(|shared| !shared.confirmed)
            {
                entry.unshare(Some(share));
            }
        });
        Ok(())
    }

    /// Maps a region of the neighbour's, if there is a use and room for it.
    pub(super) fn take_share(
        &self,
        lid: u16,
        link: LinkId,
        (share, writable): (u32, bool),
        runs: &[(u64, u64)],
        fds: Vec<Foreign>,
        means: Means<'_>,
    ) -> Result<(), NeighbourFault> {
        if fds.len() != runs.len() || runs.is_empty() {
            return Err(NeighbourFault::Malformed("runs without descriptors"));
        }
        let connected = means.worker.call(move |plane| plane.is_connected_to(lid));
        let lease = self.account.take(amount(runs.iter().map(|(_, bytes)| *bytes)));
        let Some(lease) = lease.ok().filter(|_| connected) else {
            return self.send(&Message::Refused { share }, &[]);
        };
        let files = fds.into_iter().enumerate().map(|(index, fd)| {
            memory(fd).map_err(|error| NeighbourFault::Descriptor { message: "share", index, error })
        });
        let files = files.collect::<Result<Vec<_>, _>>()?;
        let parts: Vec<_> = files
            .iter()
            .zip(runs)
            .map(|(file, (offset, bytes))| Run {
                file: RunFile::Sealed(file),
                offset: *offset as usize,
                bytes: *bytes as usize,
            })
            .collect();
        // What is shown for writing is the neighbour's own, and nothing that it shows is believed.
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let mapping = Mapping::of_runs(&parts, protection, false);
        // With a last descriptor goes its file, which takes long if it is large.
        means.closer.close_all(files.into_iter().map(SealedFile::into_fd));
        let mapping = match mapping {
            Err(error) if passes(error) => return self.send(&Message::Refused { share }, &[]),
            mapping => mapping?,
        };
        let entry = Share { mapping: Arc::new(mapping), lease: Arc::new(lease), writable };
        steps::at(Step::ShareMapped);
        let former = means.worker.call(move |plane| {
            let of_link = plane.device.links.get_mut(link)?;
            // What was granted of other memory of this name is of no use any more, and would keep that.
            of_link.grants.using.forget_share(share);
            let former = of_link.shares.insert(share, entry);
            plane.share_arrived(link);
            former
        });
        drop(former);
        steps::at(Step::ShareTaken);
        self.send(&Message::Shared { share }, &[])
    }
}
