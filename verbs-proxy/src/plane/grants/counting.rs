//! What neighbours do by grants, counted by the responder, which takes no part in it.
//!
//! A requester counts for itself on its page; the responder looks there ten times a second for as long as something moves, and
//! then says that it does not look any more and sleeps on. Who begins anew wakes it once. So an idle responder is not woken,
//! and what a container's counters say is never older than some tenths of a second.
//!
//! The figures are a neighbour's claim. One that was taken over can say that it did less, or more, up to what memory can move in
//! the time.

use super::Grants;
use super::giving::Giving;
use crate::pacing::Nanos;
use crate::plane::Plane;
use crate::stats::Tally;
use ringfence_protocol::grants::{OPCODES, Use};
use ringfence_protocol::verbs::Opcode;
use std::sync::atomic::Ordering;

/// Between two looks.
const LOOK: Nanos = 100_000_000;
/// Between two rings, should the other end not come to look.
const TELL: Nanos = 10_000_000;
/// More than that is done by nobody, in a nanosecond: bytes ...
const MOST_BYTES: u64 = 64;
/// ... and of nanoseconds, one request takes so many at least.
const LEAST_TIME: Nanos = 4;

/// What goes by grants.
const KINDS: [Opcode; 4] = [Opcode::RDMA_WRITE, Opcode::RDMA_READ, Opcode::CMP_AND_SWP, Opcode::FETCH_AND_ADD];

/// When a plane looks next at what neighbours have done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Looks {
    /// At this time, if it is awake.
    at: Nanos,
    /// It is woken for that.
    wakes: bool,
}

impl Looks {
    /// When it must be woken.
    #[must_use]
    pub fn wake_at(&self) -> Option<Nanos> {
        self.wakes.then_some(self.at)
    }

    /// Whether it is time.
    #[inline(always)]
    #[must_use]
    pub fn due(&self, now: Nanos) -> bool {
        now >= self.at
    }

    /// Somebody has rung: perhaps because of that.
    pub fn hasten(&mut self) {
        if !self.wakes {
            self.at = 0;
        }
    }
}

/// Claims of one neighbour that have been counted.
#[derive(Debug, Default)]
pub(super) struct Counted {
    /// By opcode: operations and bytes.
    seen: [(u64, u64); OPCODES],
    /// When it was looked at them last; zero for never.
    at: Nanos,
}

impl Counted {
    /// Counts what is new. True if there was something.
    fn take(&mut self, used: &Use, now: Nanos, tally: &Tally) -> bool {
        let time = now.saturating_sub(std::mem::replace(&mut self.at, now));
        let mut moved = false;
        for opcode in KINDS {
            let place = usize::from(opcode.0) % OPCODES;
            let [operations, bytes] =
                [&used.work[place].operations, &used.work[place].bytes].map(|word| word.load(Ordering::Relaxed));
            let former = std::mem::replace(&mut self.seen[place], (operations, bytes));
            if former == (operations, bytes) {
                continue;
            }
            moved = true;
            let operations = plausible(former.0, operations, time / LEAST_TIME);
            let bytes = plausible(former.1, bytes, time.saturating_mul(MOST_BYTES));
            tally.received_whole(opcode, operations, bytes);
        }
        moved
    }
}

/// What a claim has grown by, if that can be.
fn plausible(former: u64, now: u64, most: u64) -> u64 {
    now.saturating_sub(former).min(most)
}

impl Giving {
    /// Whether there is, or was at the last look, something to be used.
    fn takes_part(&mut self) -> bool {
        let given = std::mem::replace(&mut self.has_given, self.live > 0);
        given || self.live > 0
    }
}

impl Grants {
    /// Requester: whether the other end must be woken to count what was done.
    #[inline(always)]
    pub fn must_tell(&mut self, now: Nanos) -> bool {
        let asleep = self.theirs.as_ref().is_some_and(|(theirs, _)| !theirs.watched.0.get());
        if !asleep || now < self.tell_at {
            return false;
        }
        self.tell_at = now + TELL;
        true
    }

    /// Responder: counts what the other end has done. True if it is to be looked at again soon.
    pub(super) fn count(&mut self, now: Nanos, tally: &Tally) -> bool {
        let (Some(ours), Some((theirs, _))) = (&self.ours, &self.theirs) else { return false };
        if !self.giving.takes_part() {
            ours.watched.0.set(false);
            return false;
        }
        let moved = self.counted.take(&theirs.used.0, now, tally);
        let watched = ours.watched.0.get();
        if moved != watched {
            ours.watched.0.set(moved);
        }
        // Once more after it was said that nobody looks, which somebody may have missed who was counting.
        moved || watched
    }

    /// Responder: from now on there is a grant; what the other end has counted before was not by any.
    pub(super) fn begin_counting(&mut self, now: Nanos) {
        if let Some((theirs, _)) = &self.theirs
            && !self.giving.has_given
        {
            self.giving.has_given = true;
            self.counted.at = now;
            for (seen, work) in self.counted.seen.iter_mut().zip(&theirs.used.0.work) {
                *seen = (work.operations.load(Ordering::Relaxed), work.bytes.load(Ordering::Relaxed));
            }
        }
    }
}

impl Plane {
    /// Looks at what neighbours have done by grants.
    #[cold]
    pub(in crate::plane) fn count_uses(&mut self) {
        let Self { links, tally, now, looks, .. } = self;
        let mut wakes = false;
        for link in links.iter_mut() {
            wakes |= link.grants.count(*now, tally);
        }
        *looks = Looks { at: *now + LOOK, wakes };
    }
}
