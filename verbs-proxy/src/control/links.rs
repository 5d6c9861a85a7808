//! Links to neighbours, as the control thread makes and ends them.

use super::Driver;
use super::adopted::RegionFile;
use super::lent::Lent;
use super::node::Node;
use crate::device::soft::bounce::{BYTES, Bounce};
use crate::device::soft::link::{LinkFault, Shared};
use crate::device::soft::links::LinkId;
use crate::errors::passes;
use crate::fabric::neighbours::{Means, Neighbour, NeighbourFault, Owed, SharedRun, amount};
use crate::pacing::Nanos;
use crate::shared::{Mapping, PAGE, SealedFile};
use crate::steps::{self, Step};
use crate::worker::now;
use rustix::fd::OwnedFd;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use std::sync::Arc;

/// Until another try with a proxy that has no room for a connection, or where there is no memory for one.
const RETRY: Nanos = 20_000_000;

/// Messages of one neighbour before something else has its turn.
const MOST_MESSAGES: usize = 16;

impl<D: Driver> Node<D> {
    /// Whether the container cannot take pages away from a file that a neighbour reads. Where it can, a neighbour that copies
    /// from the file would have to wait for it (Linux, `shmem_fault`: a fault waits until the hole is punched).
    ///
    /// # Errors
    /// One that passes ([`passes`]) if it cannot be told now, as the warden has not answered in time.
    pub(super) fn keeps_pages(&mut self) -> Result<bool, Errno> {
        if let Some(known) = self.neighbours.keeps_pages {
            return Ok(known);
        }
        let file = SealedFile::create("ringfence-probe", PAGE)?;
        self.warden.read_only(&file)?;
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let kept = match fallocate(&file, mode, 0, PAGE as u64) {
            Err(Errno::PERM) => true,
            Ok(()) => false,
            Err(error) => return Err(error),
        };
        self.neighbours.keeps_pages = Some(kept);
        Ok(kept)
    }
}

impl Node {
    fn with_means<R>(&mut self, position: usize, run: impl FnOnce(&mut Neighbour, Means<'_>) -> R) -> R {
        let means = Means { port: &self.port, worker: &self.worker, closer: &self.closers.neighbours };
        run(&mut self.neighbours.list[position], means)
    }

    /// Makes sure that there is a link to this port, if its proxy lives. A queue pair must be connected to it by now: if that
    /// of the other end is not, its proxy makes the link when it is.
    pub fn link_to(&mut self, lid: u16) {
        // A link that the other end has ended, but we have not heard of it, would be none.
        for position in (0..self.neighbours.list.len()).rev() {
            if self.neighbours.list[position].lid() == Some(lid) {
                self.end_if_gone(position);
            }
        }
        // Nor would that with a proxy that was killed and cannot end, which its warden does not wait for.
        for position in (0..self.neighbours.list.len()).rev() {
            let neighbour = &self.neighbours.list[position];
            if neighbour.lid() == Some(lid) && !self.port.belongs_to(lid, neighbour.process()) {
                self.end_neighbour(position, &NeighbourFault::Gone);
            }
        }
        if self.neighbours.list.iter().any(|neighbour| neighbour.lid() == Some(lid)) {
            return;
        }
        let now = now();
        if let Some(at) = self.neighbours.spared_until(lid, now) {
            return self.neighbours.try_again(lid, at);
        }
        let means = Means { port: &self.port, worker: &self.worker, closer: &self.closers.neighbours };
        match Neighbour::connect(lid, self.neighbours.budget.account(), means) {
            Ok(neighbour) => self.neighbours.list.push(neighbour),
            Err(NeighbourFault::System(error)) if passes(error) => self.neighbours.try_again(lid, now + RETRY),
            Err(error) => self.voice.say(&format!("cannot make a link to port {lid}: {error}")),
        }
    }

    /// Somebody has connected.
    pub fn let_neighbour_in(&mut self, socket: OwnedFd) {
        // Of the same process, those that it has ended count no more.
        if let Ok(credentials) = socket_peercred(&socket) {
            let of_process: Vec<usize> = self.neighbours.of_process(credentials.pid).collect();
            for position in of_process.into_iter().rev() {
                self.end_if_gone(position);
            }
        }
        // One too many is turned away without a word, which a neighbour could make us say endlessly.
        let _ = self.neighbours.let_in(socket, &self.closers.neighbours, now());
    }

    /// Ends a link that the other end has ended, whatever it said before that has not been heard yet.
    fn end_if_gone(&mut self, position: usize) {
        if self.neighbours.list[position].has_hung_up() {
            self.end_neighbour(position, &NeighbourFault::Gone);
        }
    }

    /// Takes what a neighbour has sent.
    pub fn serve_neighbour(&mut self, position: usize) {
        for _ in 0..MOST_MESSAGES {
            match self.with_means(position, Neighbour::serve) {
                Ok(true) => {}
                Ok(false) => break,
                Err(fault) => return self.end_neighbour(position, &fault),
            }
        }
        let link = self.neighbours.list[position].link();
        self.share_owed(position);
        if let Some(position) = self.neighbours.list.iter().position(|neighbour| neighbour.link() == link) {
            self.serve_wishes(position);
        }
    }

    pub(super) fn end_neighbour(&mut self, position: usize, fault: &NeighbourFault) {
        if !fault.is_ordinary() {
            let neighbour = match self.neighbours.list[position].lid() {
                Some(lid) => format!("link to port {lid} ends"),
                None => "a connection of another proxy ends".to_owned(),
            };
            // As often as the neighbour likes: the warden logs some of them.
            self.voice.say(&format!("{neighbour}: {fault}"));
        }
        let neighbour = self.neighbours.remove(position, fault);
        if let Some(link) = neighbour.link() {
            drop(self.worker.call(move |plane| plane.remove_link(link)));
        }
    }

    /// Does what is due by now.
    pub fn tend_neighbours(&mut self) {
        let now = now();
        for position in (0..self.neighbours.list.len()).rev() {
            if self.neighbours.list[position].must_speak_by().is_some_and(|until| until <= now) {
                self.end_neighbour(position, &NeighbourFault::Late);
            }
        }
        let due: Vec<u16> = self.neighbours.due.extract_if(.., |(_, at)| *at <= now).map(|(lid, _)| lid).collect();
        for lid in due {
            if self.worker.call(move |plane| plane.is_connected_to(lid)) {
                self.link_to(lid);
            }
        }
    }

    /// Shares something over a link.
    pub fn share(&mut self, link: LinkId, owed: Owed) {
        let position = self.neighbours.list.iter().position(|neighbour| neighbour.link() == Some(link));
        if let Some(position) = position {
            self.neighbours.list[position].owe(owed);
            self.share_owed(position);
        }
    }

    pub(super) fn share_owed(&mut self, position: usize) {
        while let Some(owed) = self.neighbours.list[position].next_owed() {
            let Some(link) = self.neighbours.list[position].link() else { return };
            let (name, runs) = match owed {
                Owed::Region(share) if self.keeps_pages().is_err_and(passes) => {
                    // It may be known when it is asked for again.
                    self.worker.call(move |plane| plane.unshare(link, Some(share)));
                    self.forget_wishes(position, share, false);
                    continue;
                }
                Owed::Region(share) if self.keeps_pages() != Ok(true) => {
                    if let Some(key) = self.shares.get(&share).map(|backing| backing.granted.key) {
                        self.worker.call(move |plane| plane.withhold(link, key));
                    }
                    continue;
                }
                Owed::Region(share) => match self.shares.get(&share) {
                    Some(backing) => (share, backing.shown.clone()),
                    // Deregistered meanwhile.
                    None => continue,
                },
                Owed::Writable(share) => {
                    // Deregistered meanwhile, if there is none.
                    let Some((name, runs)) = self.writable(share) else { continue };
                    match self.neighbours.list[position].show_writable(name, &runs) {
                        Ok(()) => continue,
                        Err(NeighbourFault::Unshared(_)) => {
                            // It is offered again when it is wished for again.
                            self.neighbours.list[position].granting.offered.remove(&name);
                            self.worker.call(move |plane| {
                                if let Some(link) = plane.device.links.get_mut(link) {
                                    link.shared.remove(&name);
                                }
                            });
                            self.forget_wishes(position, share, true);
                            continue;
                        }
                        Err(fault) => return self.end_neighbour(position, &fault),
                    }
                }
                Owed::Bounce => match self.bounce(link) {
                    Ok((name, run)) => (name, vec![run]),
                    Err(_) => {
                        // Whoever needs it asks again when its timers say so.
                        self.worker.call(move |plane| plane.unshare(link, None));
                        continue;
                    }
                },
            };
            match self.neighbours.list[position].share(name, &runs, &mut self.warden) {
                Ok(()) => {}
                Err(NeighbourFault::Unshared(_)) => {
                    // The same.
                    self.worker.call(move |plane| plane.unshare(link, Some(name)));
                    self.forget_wishes(position, name, false);
                }
                Err(fault) => return self.end_neighbour(position, &fault),
            }
        }
    }

    /// The link's buffer for what its neighbour must not map, made if there is none: its name and its pages.
    fn bounce(&mut self, link: LinkId) -> Result<(u32, SharedRun), Errno> {
        let made = self.worker.call(move |plane| {
            let link = plane.device.links.get_mut(link)?;
            let bounce = link.bounce.as_ref()?;
            link.shared.insert(bounce.share, Shared::ASKED);
            Some((bounce.share, bounce.run.clone()))
        });
        if let Some(made) = made {
            return Ok(made);
        }
        let lease = self.neighbours.budget.take_own(amount([BYTES as u64]))?;
        let emptier = Some(self.warden.emptier());
        let (file, _) = Lent::create("ringfence-bounce", BYTES, Vec::new(), &self.closers.neighbours, emptier, 0)?;
        let mapping = Mapping::of(&file)?;
        let share = self.next_share();
        let run = SharedRun { file: Arc::new(RegionFile::Lent(file)), offset: 0, bytes: BYTES as u64 };
        let bounce = Bounce::new(share, run.clone(), mapping, lease);
        let unused = self.worker.call(move |plane| match plane.device.links.get_mut(link) {
            Some(link) => {
                link.shared.insert(share, Shared::ASKED);
                link.bounce.replace(bounce)
            }
            None => Some(bounce),
        });
        drop(unused);
        Ok((share, run))
    }

    /// A region is gone: neighbours let go of it, and nothing of theirs lands in it any more.
    pub fn forget_share(&mut self, share: u32) {
        // Its files are emptied when nobody has them any more: not before neighbours are through with them, whose accesses would wait
        // for that, or find nothing.
        let (_backing, writable) = (self.shares.remove(&share), self.forget_writable(share));
        let names = [Some(share), writable.as_ref().map(|writable| writable.name)];
        if self.neighbours.list.is_empty() && !self.has_granted() {
            return;
        }
        self.neighbours.list.iter_mut().for_each(|neighbour| neighbour.owe_no_more(share));
        let links = self.neighbours.list.iter().filter_map(Neighbour::link).collect::<Vec<LinkId>>();
        let (had, tickets) = self.worker.call(move |plane| {
            plane.revoke_region(share);
            let mut had = Vec::new();
            for id in links {
                let Some(link) = plane.device.links.get_mut(id) else { continue };
                let names = names.into_iter().flatten();
                had.extend(names.filter(|name| link.shared.remove(name).is_some()).map(|name| (id, name)));
            }
            (had, plane.take_tickets())
        });
        for position in (0..self.neighbours.list.len()).rev() {
            let neighbour = &mut self.neighbours.list[position];
            let Some(link) = neighbour.link() else { continue };
            neighbour.granting.wishes.retain(|wish| wish.share != share);
            names.iter().flatten().for_each(|name| _ = neighbour.granting.offered.remove(name));
            let mut unshared = had.iter().filter(|(id, _)| *id == link).map(|(_, name)| *name);
            if let Err(fault) = unshared.try_for_each(|name| neighbour.unshare(name)) {
                self.end_neighbour(position, &fault);
            }
        }
        steps::at(Step::Unshared);
        self.settle(tickets);
    }

    /// A link broke the protocol of its rings.
    pub fn link_failed(&mut self, link: LinkId, fault: LinkFault) {
        let position = self.neighbours.list.iter().position(|neighbour| neighbour.link() == Some(link));
        if let Some(position) = position {
            self.end_neighbour(position, &fault.into());
        }
    }
}
