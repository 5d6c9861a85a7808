//! Leave to reach memory without the responder: what is said of it between two proxies.
//!
//! Each end sends its page ([`ringfence_protocol::grants::Page`]) once, when either first has something to grant. Memory is shown
//! writable for this alone, by the same message and answer as memory that is shown for reading.

use super::hello::memory;
use super::{Foreign, LinkId, Means, Message, Neighbour, NeighbourFault, SharedRun, amount};
use crate::datagram::MAX_FDS;
use crate::device::soft::Worker;
use crate::device::soft::grants::giving::Wish;
use crate::device::soft::grants::{BYTES, Grant};
use crate::shared::{Mapping, Run, RunFile};
use crate::steps::{self, Step};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use std::collections::HashSet;
use std::sync::Arc;

/// How far granting over one link has come.
#[derive(Debug, Default)]
pub struct Granting {
    /// Our page was sent.
    pub sent: bool,
    /// Its page has come; whether it can copy by grants.
    pub copies: Option<bool>,
    /// What waits for either, or for memory to be mapped. The worker sees that there are not too many.
    pub wishes: Vec<Wish>,
    /// Memory that it was offered for grants, whether it wanted it or not, by name.
    pub offered: HashSet<u32>,
}

impl Neighbour {
    /// Sends our page, open for reading only. `copies`: we can copy by grants ourselves.
    pub fn send_page(&mut self, page: BorrowedFd<'_>, copies: bool) -> Result<(), NeighbourFault> {
        self.granting.sent = true;
        self.send(&Message::Page { copies }, &[page])?;
        steps::at(Step::PageSent);
        Ok(())
    }

    /// Says what it is granted.
    pub fn send_grant(&self, grant: Grant) -> Result<(), NeighbourFault> {
        self.send(&Message::Grant(grant), &[])?;
        steps::at(Step::GrantSent);
        Ok(())
    }

    /// Shows it some of our memory for writing, by this name. After [`NeighbourFault::Unshared`] nothing has been said.
    pub fn show_writable(&mut self, share: u32, runs: &[SharedRun]) -> Result<(), NeighbourFault> {
        if runs.len() > MAX_FDS {
            return Err(Errno::TOOBIG.into());
        }
        let files: Vec<BorrowedFd<'_>> = runs.iter().filter_map(|run| run.file.own().map(AsFd::as_fd)).collect();
        if files.len() != runs.len() {
            return Err(Errno::PERM.into());
        }
        let runs: Vec<(u64, u64)> = runs.iter().map(|run| (run.offset, run.bytes)).collect();
        self.send_memory(&Message::Share { share, runs, writable: true }, &files)?;
        self.given.offer(share, files.len());
        steps::at(Step::ShareSent);
        Ok(())
    }

    /// Its page.
    pub(super) fn take_page(
        &mut self,
        link: LinkId,
        copies: bool,
        fds: Vec<Foreign>,
        means: Means<'_>,
    ) -> Result<(), NeighbourFault> {
        let [fd]: [Foreign; 1] =
            fds.try_into().map_err(|_| NeighbourFault::Malformed("a page without its descriptor"))?;
        if self.granting.copies.is_some() {
            return Err(NeighbourFault::Malformed("a second page"));
        }
        let file = memory(fd).map_err(|error| NeighbourFault::Descriptor { message: "page", index: 0, error })?;
        if file.bytes() != BYTES {
            return Err(NeighbourFault::Malformed("a page of another size"));
        }
        self.granting.copies = Some(copies);
        let run = Run { file: RunFile::Sealed(&file), offset: 0, bytes: BYTES };
        let mapping = Arc::new(Mapping::of_runs(&[run], ProtFlags::READ, false)?);
        means.closer.close(file.into_fd());
        let Ok(lease) = self.account.take(amount([BYTES as u64])) else {
            // No room for it: everything goes by messages, both ways.
            self.granting.copies = Some(false);
            return Ok(());
        };
        let page = mapping.header(0);
        means.worker.call(move |plane| {
            if let Some(link) = plane.device.links.get_mut(link) {
                link.grants.set_theirs(page, lease);
            }
        });
        steps::at(Step::PageTaken);
        Ok(())
    }

    /// It grants us something.
    pub(super) fn take_grant(&self, link: LinkId, grant: Grant, worker: &Worker) -> Result<(), NeighbourFault> {
        steps::at(Step::GrantCome);
        worker.call(move |plane| plane.take_grant(link, grant))?;
        steps::at(Step::GrantTaken);
        Ok(())
    }
}
