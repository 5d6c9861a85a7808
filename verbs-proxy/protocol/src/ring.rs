//! A single-producer, single-consumer ring of 64-byte slots in memory that the peer may scribble on.
//!
//! There is no shared head or tail. Each slot carries a *stamp*: the number of the lap in which it was written. The
//! consumer knows which lap it expects, so one cache line travels per entry instead of two, and a scribbling peer can
//! forge entries (which the consumer must validate anyway) but no index.
//!
//! How far the producer may run ahead is agreed outside the ring: a queue pair's by the number of work requests
//! outstanding (as `max_send_wr` does on a device), a completion queue's by [`crate::layout::CqHeader::consumed`].
//!
//! An entry may take several slots: a base and *extensions*. The extensions are written first, the base's stamp last,
//! so a consumer that sees the base sees all of it.

use crate::prefetch;
use crate::sync::{AtomicU64, Ordering};

/// 64-bit words in a slot.
pub const SLOT_WORDS: usize = 8;

/// Bytes in a slot: one cache line.
pub const SLOT_BYTES: usize = SLOT_WORDS * 8;

/// The word of a slot whose low 16 bits are the stamp; its other 48 bits belong to the entry.
pub const STAMP_WORD: usize = 1;

/// The most slots that one ring may have (16 MiB of memory).
pub const MAX_SLOTS: usize = 1 << 18;

const STAMP_MASK: u64 = 0xffff;

/// How far behind the slot that is dealt with the one is that is asked for: those between take longer than a line takes to come.
const AHEAD: u32 = 4;

/// The words of one slot, out of shared memory.
pub type Words = [u64; SLOT_WORDS];

/// One slot in shared memory.
///
/// The words are atomics so that a peer that writes while we read gives wrong words, never undefined behaviour.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct Slot([AtomicU64; SLOT_WORDS]);

#[cfg(not(loom))]
const _: () = assert!(size_of::<Slot>() == SLOT_BYTES && align_of::<Slot>() == 64);

impl Slot {
    /// Words in any order, then the stamp: whoever sees the stamp sees the words.
    #[inline(always)]
    fn publish(&self, words: &Words, stamp: u64) {
        for (index, word) in words.iter().enumerate() {
            if index != STAMP_WORD {
                self.0[index].store(*word, Ordering::Relaxed);
            }
        }
        // SYNC POINT slot: pairs with the Acquire in `Slot::read`.
        self.0[STAMP_WORD].store((words[STAMP_WORD] & !STAMP_MASK) | stamp, Ordering::Release);
    }

    /// Overwrites one word, as a peer can at any time. For tests of who reads.
    #[doc(hidden)]
    pub fn scribble(&self, word: usize, value: u64) {
        self.0[word].store(value, Ordering::Relaxed);
    }

    #[inline(always)]
    fn read(&self, stamp: u64) -> Option<Words> {
        // SYNC POINT slot: pairs with the Release in `Slot::publish`.
        let stamped = self.0[STAMP_WORD].load(Ordering::Acquire);
        if stamped & STAMP_MASK != stamp {
            return None;
        }
        let mut words = [0; SLOT_WORDS];
        for (index, word) in words.iter_mut().enumerate() {
            *word = if index == STAMP_WORD { stamped } else { self.0[index].load(Ordering::Relaxed) };
        }
        Some(words)
    }
}

/// A place in a ring, counted from the ring's creation; it wraps at 2^32.
///
/// Rings have a power of two of slots, so wrapping keeps places and laps in step.
pub type Position = u32;

/// The stamp that a slot carries after being written in the lap of `position`.
///
/// Never the stamp that the lap before left behind, and for the first lap never zero, which fresh memory holds.
#[inline(always)]
fn stamp(position: Position, shift: u32) -> u64 {
    u64::from(position >> shift).wrapping_add(1) & STAMP_MASK
}

/// Slots that a power-of-two ring must have to hold `entries` of `slots_per_entry` slots each; `None` past [`MAX_SLOTS`].
#[must_use]
pub fn slots_for(entries: u32, slots_per_entry: u32) -> Option<u32> {
    // Two at least: with one slot, a lap would be one position long and stamps would wrap within 2^16 entries.
    let slots = entries.checked_mul(slots_per_entry)?.max(2).checked_next_power_of_two()?;
    (slots as usize <= MAX_SLOTS).then_some(slots)
}

fn shift_of(slots: &[Slot]) -> u32 {
    assert!(slots.len().is_power_of_two() && (2..=MAX_SLOTS).contains(&slots.len()), "a ring of {} slots", slots.len());
    slots.len().trailing_zeros()
}

/// The writing end.
#[derive(Debug)]
pub struct Producer<'a> {
    slots: &'a [Slot],
    shift: u32,
    position: Position,
}

impl<'a> Producer<'a> {
    /// A producer that goes on at `position`.
    ///
    /// # Panics
    /// If the number of slots is no power of two between 2 and [`MAX_SLOTS`].
    #[must_use]
    pub fn new(slots: &'a [Slot], position: Position) -> Self {
        Self { slots, shift: shift_of(slots), position }
    }

    /// Where the next entry goes.
    #[must_use]
    #[inline(always)]
    pub fn position(&self) -> Position {
        self.position
    }

    /// Slots in the ring.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        1 << self.shift
    }

    #[inline(always)]
    fn publish(&self, position: Position, words: &Words) {
        self.slots[position as usize & (self.slots.len() - 1)].publish(words, stamp(position, self.shift));
    }

    /// Writes one entry of one slot. The caller has made sure that the consumer is done with the slot.
    #[inline(always)]
    pub fn push(&mut self, words: &Words) {
        self.publish(self.position, words);
        self.position = self.position.wrapping_add(1);
    }

    /// Writes one entry of `1 + extensions.len()` slots.
    #[inline]
    pub fn push_extended(&mut self, base: &Words, extensions: &[Words]) {
        let mut position = self.position;
        for extension in extensions {
            position = position.wrapping_add(1);
            self.publish(position, extension);
        }
        self.publish(self.position, base);
        self.position = position.wrapping_add(1);
    }
}

/// The reading end.
#[derive(Debug)]
pub struct Consumer<'a> {
    slots: &'a [Slot],
    shift: u32,
    position: Position,
}

impl<'a> Consumer<'a> {
    /// A consumer that goes on at `position`.
    ///
    /// # Panics
    /// If the number of slots is no power of two between 2 and [`MAX_SLOTS`].
    #[must_use]
    pub fn new(slots: &'a [Slot], position: Position) -> Self {
        Self { slots, shift: shift_of(slots), position }
    }

    /// Where the next entry is expected.
    #[must_use]
    #[inline(always)]
    pub fn position(&self) -> Position {
        self.position
    }

    /// Goes on at `position`, forgetting what lies between: a queue pair's reset.
    pub fn seek(&mut self, position: Position) {
        self.position = position;
    }

    /// Slots in the ring.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        1 << self.shift
    }

    /// A copy of the next entry's base slot, if it has been written. Does not advance.
    #[must_use]
    #[inline(always)]
    pub fn peek(&self) -> Option<Words> {
        self.slots[self.position as usize & (self.slots.len() - 1)].read(stamp(self.position, self.shift))
    }

    /// Asks for a slot behind the next entry, as who finds one is likely to find more. Not where none was found: that would take the line from
    /// who is about to write it.
    #[inline(always)]
    pub fn look_ahead(&self) {
        prefetch::to_read(&self.slots[self.position.wrapping_add(AHEAD) as usize & (self.slots.len() - 1)]);
    }

    /// A copy of the next entry's extension number `index` (from 0).
    ///
    /// `None` if it does not carry this lap's stamp: the producer broke the protocol.
    #[must_use]
    #[inline]
    pub fn extension(&self, index: u32) -> Option<Words> {
        let position = self.position.wrapping_add(1).wrapping_add(index);
        self.slots[position as usize & (self.slots.len() - 1)].read(stamp(position, self.shift))
    }

    /// Goes on past an entry of `slots` slots.
    #[inline(always)]
    pub fn advance(&mut self, slots: u32) {
        self.position = self.position.wrapping_add(slots);
    }
}
