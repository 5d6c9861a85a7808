//! Leave to reach a neighbour's memory, and how it is taken back.
//!
//! For each link between two proxies, each end has a [`Page`] that it alone writes and the other end reads. In its *slots* a
//! responder grants: a slot holds the generation of the grant, or zero. By its *busy* word a requester says that it is using
//! grants of the other end's.
//!
//! ```text
//! requester                                   responder
//!   busy: odd                                   slot: zero
//!   fence                                       fence
//!   slot still the generation? ─ no: go away    busy odd? ─ no: it is taken back
//!   copy                                        else wait until busy changes
//!   busy: even (release)
//! ```
//!
//! Of the two fences one is the first. If it is the requester's the responder finds it busy and waits; if the responder's, the
//! requester finds the grant gone. A requester that is not honest does neither: it has what it was granted for as long as it
//! keeps the memory mapped.

use crate::doorbell::Line;
use crate::sync::{AtomicU64, Ordering, fence};
use crate::verbs::Opcode;

/// Grants of one end of a link.
pub const SLOTS: usize = 1024;

/// Whether a requester uses grants at this moment. Even: no.
#[repr(transparent)]
#[derive(Debug, Default)]
pub struct Busy(AtomicU64);

impl Busy {
    /// Requester: slots are looked at from now on.
    #[inline(always)]
    pub fn enter(&self) {
        self.0.store(self.0.load(Ordering::Relaxed) | 1, Ordering::Relaxed);
        // SYNC POINT grant-revoke: the store, this fence, the load of a slot; against `Slot::revoke` and `settled`.
        fence(Ordering::SeqCst);
    }

    /// Requester: what was begun is done.
    #[inline(always)]
    pub fn leave(&self) {
        self.0.store((self.0.load(Ordering::Relaxed) | 1).wrapping_add(1), Ordering::Release);
    }

    /// Responder, after [`settled`]: its word.
    #[inline]
    #[must_use]
    pub fn word(&self) -> u64 {
        // Acquire: what it has copied is seen.
        self.0.load(Ordering::Acquire)
    }

    /// Whether this word says that the requester is using grants.
    #[must_use]
    pub fn says(word: u64) -> bool {
        word & 1 != 0
    }
}

/// The place of one grant.
#[repr(transparent)]
#[derive(Debug, Default)]
pub struct Slot(AtomicU64);

impl Slot {
    /// Responder: from now on there is a grant, of a generation that this page never had before.
    pub fn grant(&self, generation: u64) {
        self.0.store(generation, Ordering::Release);
    }

    /// Responder: takes it back; [`settled`] must follow before [`Busy::word`] is believed.
    pub fn revoke(&self) {
        self.0.store(0, Ordering::Release);
    }

    /// Requester, between [`Busy::enter`] and [`Busy::leave`]: whether the grant still holds.
    #[inline(always)]
    #[must_use]
    pub fn holds(&self, generation: u64) -> bool {
        self.0.load(Ordering::Acquire) == generation
    }

    /// The word, for routines that compare it themselves.
    #[must_use]
    pub fn as_ptr(&self) -> *const u64 {
        (&raw const self.0).cast()
    }
}

/// Responder: the slots that were revoked are seen by every requester that enters from now on.
pub fn settled() {
    // SYNC POINT grant-revoke: the slots' stores, this fence, the load of the busy word; against `Busy::enter`.
    fence(Ordering::SeqCst);
}

/// Requests of one opcode that a requester has executed by grants, in all: a claim.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Work {
    /// Those that were executed whole.
    pub operations: AtomicU64,
    /// Their bytes.
    pub bytes: AtomicU64,
}

/// Places of [`Use::work`], by `enum ibv_wr_opcode`.
pub const OPCODES: usize = 8;

/// A requester's words.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Use {
    /// Whether it is at work.
    pub busy: Busy,
    /// Bytes that READs and atomics have made leave the responder, as a link charges them, in all, of requests that were executed in
    /// part, too: a claim.
    pub read: AtomicU64,
    /// What it has done.
    pub work: [Work; OPCODES],
}

/// Adds to a word that only the calling thread writes.
#[inline(always)]
fn add(word: &AtomicU64, more: u64) {
    word.store(word.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

impl Use {
    /// Requester: counts requests of one opcode that were executed whole.
    #[inline(always)]
    pub fn count(&self, opcode: Opcode, operations: u64, bytes: u64) {
        // No opcode that goes by a grant is larger; the mask tells the compiler.
        let work = &self.work[usize::from(opcode.0) % OPCODES];
        add(&work.operations, operations);
        add(&work.bytes, bytes);
    }

    /// Requester: counts what READs have fetched.
    #[inline(always)]
    pub fn has_read(&self, bytes: u64) {
        add(&self.read, bytes);
    }

    /// Requester: whether so many bytes more may be read, if in all so many may.
    #[inline(always)]
    #[must_use]
    pub fn may_read(&self, bytes: u64, allowance: u64) -> bool {
        self.read.load(Ordering::Relaxed).checked_add(bytes).is_some_and(|read| read <= allowance)
    }
}

/// Whether somebody looks at what is counted.
#[repr(transparent)]
#[derive(Debug, Default)]
pub struct Watched(AtomicU64);

impl Watched {
    /// Responder. After `false` it looks once more, later than any store is under way of a requester that has read `true`.
    pub fn set(&self, watched: bool) {
        self.0.store(watched.into(), Ordering::Release);
    }

    /// Requester: after it has counted.
    #[inline(always)]
    #[must_use]
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Acquire) != 0
    }
}

/// What one end of a link writes and the other reads.
#[repr(C)]
#[derive(Debug)]
pub struct Page {
    /// As a requester.
    pub used: Line<Use>,
    /// As a responder: bytes that the other end may make leave in all, by [`Use::read`]. Beyond that it asks.
    pub allowance: Line<AtomicU64>,
    /// As a responder: whether it looks at [`Use::work`] before long. If not, a requester that goes on wakes it.
    pub watched: Line<Watched>,
    /// As a responder: its grants.
    pub slots: [Slot; SLOTS],
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_requester_is_busy_between_entering_and_leaving() {
        let busy = Busy::default();
        assert!(!Busy::says(busy.word()));
        busy.enter();
        let word = busy.word();
        assert!(Busy::says(word));
        busy.leave();
        assert!(!Busy::says(busy.word()) && busy.word() != word);
        busy.enter();
        assert!(Busy::says(busy.word()) && busy.word() != word);
    }

    #[test]
    fn a_slot_holds_for_its_generation_only() {
        let slot = Slot::default();
        assert!(!slot.holds(1));
        slot.grant(1);
        assert!(slot.holds(1) && !slot.holds(2));
        slot.revoke();
        assert!(!slot.holds(1));
    }

    #[test]
    fn what_may_be_read_is_counted_in_all_and_never_wraps() {
        let used = Use::default();
        used.has_read(100);
        assert!(used.may_read(28, 128) && !used.may_read(29, 128) && used.may_read(1, u64::MAX));
        assert!(!used.may_read(u64::MAX, u64::MAX));
    }
}
