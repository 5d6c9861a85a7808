//! The requester: what it is granted, and requests that need nobody else.

use super::{Grant, Grants};
use crate::device::soft::express::remote_access;
use crate::device::soft::gather::{gather, scatter, trim};
use crate::device::soft::link::Share;
use crate::device::soft::links::LinkId;
use crate::device::soft::qp::Way;
use crate::device::soft::respond::Verdict;
use crate::device::soft::{Plane, Qp, Soft};
use crate::device::{Again, Answer, WorkPiece};
use crate::memory::{Atomic, Piece, copy_list_while};
use crate::plane::admit::Admitted;
use crate::rseq::{Thread, Undone, While};
use crate::shared::Mapping;
use crate::steps::{self, Step};
use ringfence_protocol::grants::{Page, SLOTS};
use ringfence_protocol::verbs::{Access, Opcode};
use ringfence_sched::Bytes;
use ringfence_sched::scheduler::charged;
use std::collections::HashMap;
use std::sync::atomic::Ordering;

/// Requests in a row that could have gone by a grant, had those before them not been under way by the responder. After so many
/// the queue pair waits until it is empty; where they alternate with others, it goes on as it is.
const STREAK: u32 = 32;

#[derive(Debug)]
struct Usable {
    grant: Grant,
    memory: Share,
}

/// What a grant is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Name {
    /// Number of our queue pair.
    from: u32,
    key: u32,
    writes: bool,
}

/// Grants that we have of one neighbour.
#[derive(Debug, Default)]
pub struct Using {
    slots: Vec<Option<Usable>>,
    by_name: HashMap<Name, u32>,
    /// What was used last: most programs use one queue pair and region at a time.
    last: Option<(Name, u32)>,
}

/// What is wrong with a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantFault {
    /// There is no such place.
    #[error("a grant in slot {0}, of {SLOTS}")]
    Slot(u32),
    /// No generation is zero.
    #[error("a grant of no generation")]
    Generation,
    /// It is of memory that is not shared, or not there.
    #[error("a grant of {length} bytes of memory {share}, which has not been shared with them")]
    Memory {
        /// Its name.
        share: u32,
        /// How much.
        length: u64,
    },
    /// It is to write what is shared for reading.
    #[error("a grant to write memory {0}, which is shared for reading")]
    ReadOnly(u32),
}

impl Using {
    /// Whether there are none.
    #[inline(always)]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    fn insert(&mut self, grant: Grant, memory: Share) {
        let slot = grant.slot as usize;
        self.remove(grant.slot);
        if self.slots.len() <= slot {
            self.slots.resize_with(slot + 1, || None);
        }
        let name = Name { from: grant.from, key: grant.key, writes: grant.writes() };
        if let Some(former) = self.by_name.insert(name, grant.slot) {
            self.slots[former as usize] = None;
        }
        self.slots[slot] = Some(Usable { grant, memory });
        self.last = None;
    }

    pub(crate) fn remove(&mut self, slot: u32) {
        if let Some(usable) = self.slots.get_mut(slot as usize).and_then(Option::take) {
            let Grant { from, key, .. } = usable.grant;
            self.by_name.remove(&Name { from, key, writes: usable.grant.writes() });
            self.last = None;
        }
    }

    fn remove_where(&mut self, which: impl Fn(&Grant) -> bool) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].as_ref().is_some_and(|usable| which(&usable.grant)) {
                self.remove(slot as u32);
            }
        }
    }

    /// The other end takes memory back.
    pub fn forget_share(&mut self, share: u32) {
        self.remove_where(|grant| grant.share == share);
    }

    #[inline(always)]
    fn find(&mut self, name: Name) -> Option<&Usable> {
        let slot = match self.last {
            Some((last, slot)) if last == name => slot,
            _ => {
                let slot = *self.by_name.get(&name)?;
                self.last = Some((name, slot));
                slot
            }
        };
        self.slots.get(slot as usize)?.as_ref()
    }
}

impl Grant {
    fn writes(&self) -> bool {
        self.access & Access::REMOTE_READ.0 == 0
    }

    /// The memory that a request names, if this is for it.
    #[inline(always)]
    fn piece<'a>(&self, mapping: &'a Mapping, to: u32, access: Access, addr: u64, bytes: u64) -> Option<Piece<'a>> {
        let at = addr.wrapping_sub(self.iova);
        if self.to != to || !Access(self.access).contains(access) || at > self.length || bytes > self.length - at {
            return None;
        }
        // Within the mapping, as was checked when the grant came.
        Piece::of(mapping, at as usize, bytes as usize)
    }
}

/// A request that a grant may be for: what it needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    name: Name,
    to: u32,
    access: Access,
    addr: u64,
    bytes: u32,
}

impl Wanted {
    #[inline(always)]
    pub(crate) fn of(qp: &Qp, opcode: Opcode, rkey: u32, addr: u64, bytes: u32) -> Option<Self> {
        let access = remote_access(opcode)?;
        let name = Name { from: qp.number, key: rkey, writes: access != Access::REMOTE_READ };
        (bytes > 0).then_some(Self { name, to: qp.attr.dest_qp_num, access, addr, bytes })
    }

    fn of_admitted(qp: &Qp, asked: Admitted<'_>) -> Option<Self> {
        Self::of(qp, asked.opcode, asked.rkey, asked.remote_addr, asked.total)
    }

    /// The memory, and what must hold while it is used.
    #[inline(always)]
    pub(crate) fn find<'a>(&self, using: &'a mut Using, theirs: &Page) -> Option<(Piece<'a>, While, u32)> {
        let Usable { grant, memory } = using.find(self.name)?;
        let memory = grant.piece(&memory.mapping, self.to, self.access, self.addr, self.bytes.into())?;
        let slot = theirs.slots.get(grant.slot as usize)?;
        Some((memory, While { word: slot.as_ptr(), is: grant.generation }, grant.slot))
    }
}

/// What the other end lets this one READ by grants.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// In all, as of the last look.
    allowed: u64,
    /// What came last.
    portion: u64,
    /// More was asked for since.
    asked: bool,
}

impl Ahead {
    /// Whether to ask for more: half of what came last is used. So there is more before nothing is left.
    #[inline(always)]
    fn must_ask(&mut self, allowed: u64, used: u64) -> bool {
        if allowed != self.allowed {
            self.portion = allowed.saturating_sub(std::mem::replace(&mut self.allowed, allowed));
            self.asked = false;
        }
        let little = allowed != u64::MAX && allowed.saturating_sub(used) < self.portion / 2;
        little && !std::mem::replace(&mut self.asked, true)
    }
}

/// Why a piece did not go by a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NoGrant {
    /// There is none for it, or none that holds.
    None,
    /// What may be READ without asking has been: whoever asks gets more.
    UsedUp,
}

impl Grants {
    /// Whether the other end had better be asked now for more of what may be READ.
    #[inline(always)]
    pub fn must_ask(&mut self) -> bool {
        let (Some(ours), Some((theirs, _))) = (&self.ours, &self.theirs) else { return false };
        self.ahead.must_ask(theirs.allowance.0.load(Ordering::Relaxed), ours.used.0.read.load(Ordering::Relaxed))
    }

    /// Whether a grant covers this; nothing is said of whether it still holds.
    fn covers(&mut self, wanted: &Wanted) -> bool {
        let Some((theirs, _)) = &self.theirs else { return false };
        wanted.find(&mut self.using, theirs).is_some()
    }

    /// Executes a piece of a request. `local`: the container's memory for it.
    fn execute(
        &mut self,
        asked: Admitted<'_>,
        wanted: &Wanted,
        piece: &WorkPiece,
        local: &[Piece<'_>],
    ) -> Result<Verdict, NoGrant> {
        let thread = Thread::current().ok_or(NoGrant::None)?;
        let ((ours, theirs), using) = match (&self.ours, &self.theirs) {
            (Some(ours), Some((theirs, _))) => ((ours, theirs), &mut self.using),
            _ => return Err(NoGrant::None),
        };
        let (memory, condition, slot) = wanted.find(using, theirs).ok_or(NoGrant::None)?;
        if local.iter().any(Piece::may_fault) {
            return Err(NoGrant::None);
        }
        let memory = memory.slice(piece.offset as usize, piece.bytes as usize);
        // All that leaves their container is counted with its first piece.
        let leaves = if asked.fetches() && piece.offset == 0 { charged(Bytes(asked.total.into())).0 } else { 0 };
        if leaves > 0 && !ours.used.0.may_read(leaves, theirs.allowance.0.load(Ordering::Relaxed)) {
            return Err(NoGrant::UsedUp);
        }
        ours.used.0.busy.enter();
        steps::at(Step::PieceBusy);
        let done = match asked.opcode {
            Opcode::RDMA_WRITE => copy_list_while(&[memory], local, thread, condition).map(|()| Verdict::Ack),
            Opcode::RDMA_READ => copy_list_while(local, &[memory], thread, condition).map(|()| Verdict::Ack),
            _ if !memory.is_for_atomics() || !asked.remote_addr.is_multiple_of(8) => Err(Undone::Interrupted),
            _ => {
                let atomic = atomic(asked.opcode, asked.compare_add, asked.swap);
                memory.fetch_update_while(atomic, thread, condition).map(Verdict::Value)
            }
        };
        if done.is_ok() {
            steps::at(Step::PieceCopied);
        }
        ours.used.0.busy.leave();
        steps::at(Step::PieceLeft);
        if matches!(done, Err(Undone::Gone)) {
            steps::at(Step::Gone);
            using.remove(slot);
        }
        let verdict = done.map_err(|_| NoGrant::None)?;
        ours.used.0.has_read(leaves);
        if piece.offset + piece.bytes == asked.total {
            ours.used.0.count(asked.opcode, 1, asked.total.into());
        }
        Ok(verdict)
    }
}

pub(crate) fn atomic(opcode: Opcode, compare_add: u64, swap: u64) -> Atomic {
    if opcode == Opcode::FETCH_AND_ADD {
        Atomic::Add(compare_add)
    } else {
        Atomic::Swap { expected: compare_add, new: swap }
    }
}

impl Plane {
    /// A neighbour grants us something: a claim. Whether it is of use now shows when it is used.
    pub fn take_grant(&mut self, at: LinkId, grant: Grant) -> Result<(), GrantFault> {
        let Some(link) = self.device.links.get_mut(at) else { return Ok(()) };
        let Grant { slot, generation, share, length, .. } = grant;
        if slot as usize >= SLOTS {
            return Err(GrantFault::Slot(slot));
        }
        if generation == 0 {
            return Err(GrantFault::Generation);
        }
        let shared = link.shares.get(&share).filter(|shared| (1..=shared.mapping.bytes() as u64).contains(&length));
        let Some(shared) = shared else { return Err(GrantFault::Memory { share, length }) };
        if grant.writes() && !shared.writable {
            return Err(GrantFault::ReadOnly(share));
        }
        let port = link.port;
        let connected = self.by_number.get(&grant.from).and_then(|queue| self.qps[*queue as usize].as_ref());
        // Our queue pair may be gone, or connected elsewhere, by now.
        if connected.is_some_and(|qp| qp.attr.dest_qp_num == grant.to && qp.device.port == port) {
            let memory = shared.clone();
            link.grants.using.insert(grant, memory);
        }
        Ok(())
    }

    /// A queue pair of ours ends, or begins anew: its grants were those of its former life.
    pub(crate) fn forget_grants(&mut self, number: u32) {
        for link in self.device.links.iter_mut() {
            link.grants.using.remove_where(|grant| grant.from == number);
        }
    }

    /// Executes a piece by a grant, if there is one and nothing before it is under way by the responder. `None`: it goes by the
    /// responder.
    pub(crate) fn by_grant(&mut self, queue: u32, index: usize, piece: &WorkPiece, at: LinkId) -> Option<Answer> {
        let Self { qps, regions, device: Soft { links, from, to, .. }, now, .. } = self;
        let qp = qps[queue as usize].as_deref_mut()?;
        let wqe = &qp.pending[index];
        if wqe.device == Way::ByResponder {
            return None;
        }
        let asked = wqe.work.admitted()?;
        let wanted = Wanted::of_admitted(qp, asked);
        let mut done = Err(NoGrant::None);
        if let (Some(wanted), Some(link), 0) = (&wanted, links.get_mut(at), index)
            && !link.grants.using.is_empty()
            && wqe.done == piece.offset
        {
            done = if asked.fetches() {
                to.with(|to| {
                    scatter(qp, asked, regions, to).map_err(|_| NoGrant::None)?;
                    trim(to, piece.offset as usize, piece.bytes as usize);
                    link.grants.execute(asked, wanted, piece, to)
                })
            } else {
                from.with(|from| {
                    gather(qp, asked, regions, piece, from).map_err(|_| NoGrant::None)?;
                    link.grants.execute(asked, wanted, piece, from)
                })
            };
            if done.is_ok() {
                link.tell_of_use(*now, asked.fetches(), piece.offset + piece.bytes == asked.total);
            }
        }
        let wqe = &mut qp.pending[index];
        match done {
            Ok(verdict) => {
                wqe.device = Way::ByGrant;
                let last = piece.offset + piece.bytes == wqe.total;
                qp.device.by_grant = qp.device.by_grant.wrapping_add(u32::from(last));
                qp.device.streak = 0;
                // Nothing is under way by the responder, so no answer can be overdue.
                qp.waits.deadline = 0;
                match self.carry_out(queue, 0, piece, verdict) {
                    // Until all of it has gone it may be done again by the responder.
                    Answer::Done if !last => Some(Answer::Provisional),
                    answer => Some(answer),
                }
            }
            Err(why) => {
                let begun = std::mem::replace(&mut wqe.device, Way::ByResponder) == Way::ByGrant;
                qp.device.streak = match why {
                    // Its answer brings more, for those behind it too.
                    NoGrant::UsedUp => STREAK,
                    NoGrant::None if wanted.is_some() && index > 0 => qp.device.streak.saturating_add(1),
                    NoGrant::None => 0,
                };
                // The responder knows nothing of what has been done: all of it is done again.
                begun.then_some(Answer::Again(Again::Anew))
            }
        }
    }

    /// Whether request `index`, which is behind others under way, had better wait for them to go by a grant.
    pub(crate) fn waits_for_grant(&mut self, queue: u32, index: usize, at: LinkId) -> bool {
        let Some(qp) = &self.qps[queue as usize] else { return false };
        let wqe = &qp.pending[index];
        if qp.device.streak < STREAK || index == 0 || wqe.device != Way::Open {
            return false;
        }
        let Some(wanted) = wqe.work.admitted().and_then(|asked| Wanted::of_admitted(qp, asked)) else { return false };
        self.device.links.get_mut(at).is_some_and(|link| link.grants.covers(&wanted))
    }
}
