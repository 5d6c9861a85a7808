//! One end of a queue pair's memory: how much of it is in use, and writing to it.

use crate::lock::Spin;
use alloc::boxed::Box;
use alloc::vec;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use ringfence_protocol::doorbell::Line;
use ringfence_protocol::ring::{Position, Producer, Words};

/// How many work requests are outstanding, and in which slots.
///
/// Completions say up to which position slots are free; how many requests those were, we have written down ourselves.
#[derive(Debug)]
pub struct Ledger {
    /// For each slot that ends a request: how many requests had been posted with it.
    counts: Box<[u32]>,
    limit: u32,
    posted: u32,
    freed: u32,
    freed_position: Position,
}

impl Ledger {
    /// For a ring of so many slots, a power of two, and at most `limit` requests outstanding.
    pub fn new(slots: u32, limit: u32) -> Self {
        Self { counts: vec![0; slots as usize].into_boxed_slice(), limit, posted: 0, freed: 0, freed_position: 0 }
    }

    /// Whether a request of `slots` slots fits at `position`.
    #[inline(always)]
    pub fn has_room(&self, position: Position, slots: u32) -> bool {
        self.posted.wrapping_sub(self.freed) < self.limit
            && position.wrapping_sub(self.freed_position) + slots <= self.counts.len() as u32
    }

    /// A request was written that ends before `end`.
    #[inline(always)]
    pub fn post(&mut self, end: Position) {
        self.posted = self.posted.wrapping_add(1);
        let slot = end.wrapping_sub(1) as usize & (self.counts.len() - 1);
        self.counts[slot] = self.posted;
    }

    /// Slots before `freed` are free. `position` is where the next request goes.
    #[cold]
    pub fn free_up_to(&mut self, freed: Position, position: Position) {
        let outstanding = position.wrapping_sub(self.freed_position);
        let newly = freed.wrapping_sub(self.freed_position);
        // What has been counted already, or was never posted, is not counted.
        if newly == 0 || newly > outstanding {
            return;
        }
        // The slot has not been written again: it has only become free now.
        self.freed = self.counts[freed.wrapping_sub(1) as usize & (self.counts.len() - 1)];
        self.freed_position = freed;
    }

    /// Everything before `position` is over.
    pub fn reset(&mut self, position: Position) {
        self.freed = self.posted;
        self.freed_position = position;
    }
}

/// What posting changes.
#[derive(Debug)]
pub struct Posting {
    producer: Producer<'static>,
    ledger: Ledger,
}

/// A send or receive queue.
#[derive(Debug)]
pub struct WorkQueue {
    /// One thread at a time posts.
    pub posting: Line<Spin<Posting>>,
    /// Up to where slots are free, by the completions that were polled.
    freed: Line<AtomicU32>,
    /// [`NOT_RESET`], or the position at which the queue was last reset: completions from before are to be ignored.
    reset: AtomicU64,
}

const NOT_RESET: u64 = u64::MAX;

impl WorkQueue {
    /// Over a ring, with at most `limit` requests outstanding.
    pub fn new(producer: Producer<'static>, limit: u32) -> Self {
        let ledger = Ledger::new(producer.capacity(), limit);
        Self {
            posting: Line(Spin::new(Posting { producer, ledger })),
            freed: Line(AtomicU32::new(0)),
            reset: AtomicU64::new(NOT_RESET),
        }
    }

    /// Poller: a completion says that slots before `freed` are free. False if it is from before a reset.
    #[inline(always)]
    pub fn complete(&self, freed: Position) -> bool {
        let reset = self.reset.load(Ordering::Relaxed);
        if reset != NOT_RESET {
            if (freed.wrapping_sub(reset as u32) as i32) <= 0 {
                return false;
            }
            // The first from after the reset: completions of one queue come in order.
            self.reset.store(NOT_RESET, Ordering::Relaxed);
        }
        // Release: the program has its completion before a poster takes the slots.
        self.freed.0.store(freed, Ordering::Release);
        true
    }

    /// Where the next request goes.
    pub fn position(&self) -> Position {
        self.posting.0.lock().producer.position()
    }

    /// The queue pair was reset. The caller has locked the completion queue.
    pub fn reset(&self, position: Position) {
        let mut posting = self.posting.0.lock();
        posting.ledger.reset(position);
        self.freed.0.store(position, Ordering::Release);
        self.reset.store(u64::from(position), Ordering::Relaxed);
    }

    /// Poster: whether a request of `slots` slots fits.
    #[inline(always)]
    pub fn has_room(&self, posting: &mut Posting, slots: u32) -> bool {
        let position = posting.producer.position();
        if posting.ledger.has_room(position, slots) {
            return true;
        }
        posting.ledger.free_up_to(self.freed.0.load(Ordering::Acquire), position);
        posting.ledger.has_room(position, slots)
    }
}

impl Posting {
    /// Writes a request for which there is room.
    #[inline(always)]
    pub fn push(&mut self, base: &Words) {
        self.producer.push(base);
        self.ledger.post(self.producer.position());
    }

    /// Writes a request of several slots, for which there is room.
    #[inline]
    pub fn push_extended(&mut self, base: &Words, extensions: &[Words]) {
        self.producer.push_extended(base, extensions);
        self.ledger.post(self.producer.position());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_protocol::ring::Slot;

    fn queue(slots: u32, limit: u32) -> WorkQueue {
        let memory: Vec<Slot> = (0..slots).map(|_| Slot::default()).collect();
        WorkQueue::new(Producer::new(memory.leak(), 0), limit)
    }

    fn post(queue: &WorkQueue, extensions: usize) -> bool {
        let mut posting = queue.posting.0.lock();
        if !queue.has_room(&mut posting, 1 + extensions as u32) {
            return false;
        }
        posting.push_extended(&[0; 8], &vec![[0; 8]; extensions]);
        true
    }

    #[test]
    fn only_polled_completions_make_room() {
        let queue = queue(16, 3);
        assert!(post(&queue, 0) && post(&queue, 2) && post(&queue, 0));
        assert!(!post(&queue, 0), "three are outstanding");
        // The second request ended at position 4; its completion frees the first as well.
        assert!(queue.complete(4));
        assert!(post(&queue, 0) && post(&queue, 0));
        assert!(!post(&queue, 0));
    }

    #[test]
    fn slots_limit_as_well() {
        let queue = queue(4, 100);
        assert!(post(&queue, 2));
        assert!(!post(&queue, 1));
        assert!(post(&queue, 0));
        assert!(queue.complete(3));
        assert!(post(&queue, 2));
        assert!(!post(&queue, 0));
    }

    #[test]
    fn full_turns_of_the_ring_are_counted_right() {
        let queue = queue(8, 8);
        for turn in 0..100_u32 {
            for _ in 0..8 {
                assert!(post(&queue, 0));
            }
            assert!(!post(&queue, 0), "turn {turn}");
            assert!(queue.complete((turn + 1) * 8));
        }
    }

    #[test]
    fn nonsense_from_the_proxy_frees_nothing() {
        let queue = queue(8, 2);
        assert!(post(&queue, 0) && post(&queue, 0));
        queue.complete(7);
        assert!(!post(&queue, 0));
    }

    #[test]
    fn completions_from_before_a_reset_are_ignored() {
        let queue = queue(8, 8);
        for _ in 0..5 {
            assert!(post(&queue, 0));
        }
        queue.reset(queue.position());
        assert!(!queue.complete(4));
        assert!(!queue.complete(5));
        for _ in 0..8 {
            assert!(post(&queue, 0), "all is free after a reset");
        }
        assert!(queue.complete(6));
        assert!(queue.complete(7));
    }
}
