//! The responder: what it grants, and how it takes that back.

use super::Grant;
use crate::device::soft::links::LinkId;
use crate::device::soft::tickets::Ticket;
use crate::device::soft::wire::Request;
use crate::device::soft::{Notice, Plane, Qp, Soft, Task};
use crate::memory::MemoryRegion;
use crate::pacing::Nanos;
use crate::shared::Mapping;
use crate::steps::{self, Step};
use ringfence_protocol::grants::{Page, SLOTS, settled};
use ringfence_protocol::verbs::{Access, Opcode};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A requester that was found stopped in the midst of copies more often than this in so long gets no grants for the rest of it: who
/// takes them back waits for it, and others wait for him. Now and then it may have lost its processor.
const STRIKES: u32 = 3;
const PERIOD: Nanos = 1_000_000_000;
/// The request of its kind that brings a grant: a region that is registered, used once or twice and deregistered is not worth it.
const REPEATS: u8 = 3;
/// After what could not be granted, the control thread is left alone for so long.
const AGAIN: Nanos = 50_000_000;
/// Regions and queue pairs at a time for which requests are counted.
const COUNTED: u32 = 64;
/// In advance, bytes: what a requester may READ, or fetch by atomics, before it asks again, at most.
const MOST_AHEAD: u64 = 16 << 20;

/// What a neighbour may be granted: a request of the kind has succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wish {
    /// Bell number of our queue pair ...
    pub queue: u32,
    /// ... and which of those that have had it.
    pub incarnation: u64,
    /// The region's key ...
    pub key: u32,
    /// ... and name.
    pub share: u32,
    /// To write; else to read.
    pub writes: bool,
}

/// Grants of ours that one neighbour has.
#[derive(Debug, Default)]
pub struct Giving {
    /// It gets none.
    refused: bool,
    /// Requests of a kind, as long as no other has the same place.
    counted: HashMap<u32, (Wish, u8)>,
    /// What the control thread was told of.
    asked: HashSet<Wish>,
    /// By slot.
    given: Vec<Option<Wish>>,
    pub(super) live: usize,
    /// There was something to be used since its use was looked at last.
    pub(super) has_given: bool,
    generation: u64,
    /// Nothing is asked of the control thread before this time.
    asks_at: Nanos,
    /// How often it was found stopped ...
    strikes: u32,
    /// ... before this time.
    period_ends: Nanos,
}

impl Giving {
    /// No more grants, ever; those that are given are taken back by the caller.
    pub fn refuse(&mut self) {
        self.refused = true;
        self.asked = HashSet::new();
        self.counted = HashMap::new();
    }

    /// Whether it was waited for in vain too often of late.
    pub(in crate::device::soft) fn is_paused(&self, now: Nanos) -> bool {
        self.strikes > STRIKES && now < self.period_ends
    }

    /// Whether the control thread must be told.
    fn wants(&mut self, wish: Wish, now: Nanos) -> bool {
        if self.refused
            || self.is_paused(now)
            || now < self.asks_at
            || self.asked.len() >= SLOTS
            || self.asked.contains(&wish)
        {
            return false;
        }
        let place = ((wish.key ^ wish.queue) << 1 | u32::from(wish.writes)) % COUNTED;
        let (counted, times) = self.counted.entry(place).or_insert((wish, 0));
        if *counted != wish {
            (*counted, *times) = (wish, 0);
        }
        *times += 1;
        *times >= REPEATS && self.asked.insert(wish)
    }

    /// As if enough requests of the kind had come, whatever the wish says.
    #[cfg(test)]
    pub fn ask(&mut self, wish: Wish) {
        self.asked.insert(wish);
    }

    /// A free slot, and a generation that this page never had.
    fn place(&mut self, wish: Wish) -> Option<(usize, u64)> {
        if self.refused || self.given.contains(&Some(wish)) {
            return None;
        }
        let slot = self.given.iter().position(Option::is_none).unwrap_or(self.given.len());
        if slot >= SLOTS {
            return None;
        }
        if slot == self.given.len() {
            self.given.push(None);
        }
        self.given[slot] = Some(wish);
        self.live += 1;
        self.generation += 1;
        Some((slot, self.generation))
    }

    fn forget(&mut self, which: impl Fn(&Wish) -> bool) {
        self.asked.retain(|wish| !which(wish));
        self.counted.retain(|_, (wish, _)| !which(wish));
    }

    /// Takes back what `which` says. True if there was something.
    fn revoke(&mut self, page: &Page, which: impl Fn(&Wish) -> bool) -> bool {
        self.forget(&which);
        if self.live == 0 {
            return false;
        }
        let mut any = false;
        for (slot, given) in page.slots.iter().zip(&mut self.given) {
            if given.take_if(|wish| which(wish)).is_some() {
                steps::at(Step::Clearing);
                slot.revoke();
                steps::at(Step::Cleared);
                self.live -= 1;
                any = true;
            }
        }
        any
    }
}

/// What one kind of grant is about.
fn rights(writes: bool) -> u32 {
    if writes { (Access::REMOTE_WRITE | Access::REMOTE_ATOMIC).0 } else { Access::REMOTE_READ.0 }
}

/// What a queue pair and a region of its domain allow of a kind.
fn grantable(qp: &Qp, region: &MemoryRegion, writes: bool) -> u32 {
    let mut access = qp.attr.access.0 & region.access().0 & rights(writes);
    if qp.attr.max_dest_rd_atomic == 0 {
        access &= Access::REMOTE_WRITE.0;
    }
    access
}

impl Plane {
    /// A request over link `at` has succeeded: the next of its kind may need no responder.
    pub(crate) fn offer(&mut self, at: LinkId, request: &Request) {
        let writes = match request.opcode {
            Opcode::RDMA_WRITE | Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD => true,
            Opcode::RDMA_READ => false,
            _ => return,
        };
        let now = self.now;
        let Self { device: Soft { links, .. }, regions, qps, by_number, notices, .. } = self;
        let Some(link) = links.get_mut(at) else { return };
        let Some(qp) = by_number.get(&request.to).and_then(|queue| qps[*queue as usize].as_deref()) else { return };
        let Some(region) =
            regions.get(request.rkey).filter(|region| request.total > 0 && region.shown_extent().is_some())
        else {
            return;
        };
        let (queue, incarnation, key, share) = (qp.queue, qp.incarnation, request.rkey, region.share);
        let wish = Wish { queue, incarnation, key, share, writes };
        if link.grants.giving.wants(wish, now) {
            // From now on a region that its container takes back needs a message, upon which the grant is taken back.
            regions.lend(key);
            notices.push(Notice::Device(Task::Grant { link: at, wish }));
        }
    }

    /// A wish could not be granted now: in a while requests of its kind bring it once more.
    pub fn forget_wish(&mut self, at: LinkId, wish: &Wish) {
        let now = self.now;
        if let Some(link) = self.device.links.get_mut(at) {
            let giving = &mut link.grants.giving;
            giving.forget(|other| other == wish);
            giving.asks_at = now + AGAIN;
        }
    }

    /// With what of the region can be granted: the application's address, and bytes.
    fn still_wanted(&self, at: LinkId, wish: &Wish) -> Option<(&Qp, &MemoryRegion, (u64, u64))> {
        let link = self.device.links.get(at)?;
        let qp = self.qps.get(wish.queue as usize)?.as_deref().filter(|qp| qp.incarnation == wish.incarnation)?;
        let region = self.regions.get(wish.key)?;
        let holds = qp.responds()
            && qp.device.port == link.port
            && region.share == wish.share
            && region.pd() == qp.pd
            && grantable(qp, region, wish.writes) != 0
            && link.grants.giving.asked.contains(wish);
        holds.then_some((qp, region, region.shown_extent()?))
    }

    /// The memory that a wish is for, if it still is one: a mapping, and what of it neighbours may see.
    #[must_use]
    pub fn wished_for(&self, at: LinkId, wish: &Wish) -> Option<(Arc<Mapping>, Range<u64>)> {
        self.still_wanted(at, wish).map(|(_, region, _)| region.shown_bytes())
    }

    /// Grants a wish over what the neighbour has mapped of the region, by the name `share`; what it must be told. `None` if it does
    /// not hold any more.
    #[must_use]
    pub fn give(&mut self, at: LinkId, wish: &Wish, share: u32) -> Option<Grant> {
        let (qp, region, (iova, length)) = self.still_wanted(at, wish)?;
        let grant = Grant {
            slot: 0,
            generation: 0,
            to: qp.number,
            from: qp.attr.dest_qp_num,
            key: wish.key,
            access: grantable(qp, region, wish.writes),
            iova,
            length,
            share,
        };
        let link = self.device.links.get_mut(at)?;
        if !link.has_mapped(share) {
            return None;
        }
        link.grants.theirs.as_ref()?;
        link.grants.begin_counting(self.now);
        let page = link.grants.ours.as_ref()?;
        let (slot, generation) = link.grants.giving.place(*wish)?;
        page.slots[slot].grant(generation);
        steps::at(Step::SlotWritten);
        Some(Grant { slot: slot as u32, generation, ..grant })
    }

    /// Lets the neighbour READ on without asking, as far as the container's rate allows. Called when it asked.
    pub(crate) fn renew_reads(&mut self, at: LinkId) {
        let Some(ahead) = self.shaping.read_ahead() else { return };
        let Some(link) = self.device.links.get_mut(at) else { return };
        let Some((ours, theirs)) = link.grants.pages().filter(|_| link.grants.giving.live > 0) else { return };
        let bytes = ahead.min(MOST_AHEAD);
        let allowance = &ours.allowance.0;
        let allowed = allowance.load(Ordering::Relaxed);
        let port = link.port;
        // What it has left counts, so that nobody saves up. If it says that it has used more than it may, it has none.
        let left = allowed.saturating_sub(theirs.used.0.read.load(Ordering::Relaxed));
        if left < bytes && self.shaping.may_be_read_unasked(port, bytes as u32, self.now) {
            self.shaping.was_read(port, bytes as u32);
            allowance.store(allowed.saturating_add(bytes), Ordering::Relaxed);
        }
    }

    pub(in crate::device::soft) fn revoke_where(&mut self, which: impl Fn(LinkId, &Wish) -> bool) -> Vec<Ticket> {
        let mut tickets = Vec::new();
        for place in 0..self.device.links.places() {
            let Some(id) = self.device.links.at(place) else { continue };
            let Some(link) = self.device.links.get_mut(id) else { continue };
            let grants = &mut link.grants;
            let Some(page) = &grants.ours else {
                grants.giving.forget(|wish| which(id, wish));
                continue;
            };
            if !grants.giving.revoke(page, |wish| which(id, wish)) {
                continue;
            }
            settled();
            let Some((theirs, _)) = &grants.theirs else { continue };
            let Some(ticket) = Ticket::of_grants(id, theirs, self.now) else { continue };
            steps::at(Step::FoundBusy);
            tickets.push(ticket);
        }
        tickets
    }

    /// Takes back all grants of a region, and what messages named of it.
    pub fn revoke_region(&mut self, share: u32) {
        let mut tickets = self.revoke_where(|_, wish| wish.share == share);
        tickets.extend(self.end_names(|_, link| link.end_names_in(share)));
        self.keep_tickets(tickets);
    }

    /// Takes back all grants of a queue pair.
    pub fn revoke_queue(&mut self, queue: u32) {
        if !self.device.links.is_empty() {
            let tickets = self.revoke_where(|_, wish| wish.queue == queue);
            self.keep_tickets(tickets);
        }
    }

    /// Takes back all grants of a link, which gets no more.
    pub fn revoke_link(&mut self, at: LinkId) {
        let tickets = self.revoke_where(|id, _| id == at);
        self.keep_tickets(tickets);
        let Self { device: Soft { links, .. }, tally, now, .. } = self;
        if let Some(link) = links.get_mut(at) {
            link.grants.giving.refuse();
            // The last look may be the last there is.
            let _ = link.grants.count(*now, tally);
        }
    }

    /// A requester was stopped in the midst of a copy, and somebody had to wait for it.
    pub fn strike(&mut self, at: LinkId) {
        let now = self.now;
        let Some(link) = self.device.links.get_mut(at) else { return };
        let giving = &mut link.grants.giving;
        if now >= giving.period_ends {
            (giving.strikes, giving.period_ends) = (0, now + PERIOD);
        }
        giving.strikes += 1;
        if giving.is_paused(now) {
            let tickets = self.revoke_where(|id, _| id == at);
            self.keep_tickets(tickets);
        }
    }
}
