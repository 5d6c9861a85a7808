//! Which key each memory region answers to.
//!
//! The proxy has a table of regions. To each place in it belongs a [`KeyWord`], in the same memory as the container's
//! doorbells ([`crate::layout::KEYS_OFFSET`]): a region is reached only by the key that stands in its word. So the
//! container takes a key back, and gives the region a new one, without a message: that is how a program which registers,
//! uses and deregisters the same buffer over and over gets along without one.
//!
//! All that the container can do by writing here is to withdraw, or restore, access to what it has registered within its
//! quota. Protection domain, range, rights and place are the proxy's own, out of its reach.
//!
//! ```text
//!              grant                 withdraw               revoke
//!   (nothing) ───────► key, inc ◄──────────────► 0, inc ───────────────► (nothing)
//!                         │  lend      restore
//!                         ▼
//!                  key, lent, inc          goes only by deregistration, as all do at any time
//! ```
//!
//! `inc` is the region's *incarnation*: no other region of the same place has it, so that nobody restores what has gone.

use crate::sync::{AtomicU64, Ordering};

/// The most incarnations before numbers repeat.
const INCARNATIONS: u32 = 1 << 31;
const LENT: u64 = 1 << 32;
const NOTHING: u64 = 0;

/// Which of the regions that a place has had over time. Never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incarnation(u32);

impl Incarnation {
    /// From a number, of which not all bits count.
    #[must_use]
    pub fn new(number: u32) -> Self {
        Self((number % INCARNATIONS).max(1))
    }

    /// The number.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0
    }

    /// The one after it.
    #[must_use]
    pub fn next(self) -> Self {
        Self::new(self.0 + 1)
    }

    fn with(self, key: u32) -> u64 {
        u64::from(self.0) << 33 | u64::from(key)
    }
}

/// The word of one place.
#[repr(transparent)]
#[derive(Debug, Default)]
pub struct KeyWord(AtomicU64);

impl KeyWord {
    /// Proxy: a region is there from now on, reached by `key`.
    pub fn grant(&self, incarnation: Incarnation, key: u32) {
        self.0.store(incarnation.with(key), Ordering::Release);
    }

    /// Proxy: the region is gone.
    pub fn clear(&self) {
        self.0.store(NOTHING, Ordering::Release);
    }

    /// Proxy: whether the region is reached by `key`. Of no key it is if that is zero.
    #[inline(always)]
    #[must_use]
    pub fn answers_to(&self, key: u32) -> bool {
        // Acquire: what the container did before it restored the region is seen.
        key != 0 && self.0.load(Ordering::Acquire) as u32 == key
    }

    /// Proxy: a neighbour may read the region from now on, so that it can no longer be taken back without a message.
    pub fn lend(&self) {
        self.0.fetch_or(LENT, Ordering::AcqRel);
    }

    /// Proxy: takes a region that is withdrawn for good. False if it is in use, or was lent, or is gone.
    #[must_use]
    pub fn revoke(&self, incarnation: Incarnation) -> bool {
        self.0.compare_exchange(incarnation.with(0), NOTHING, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Container: takes `key` back. False if that cannot be done without a message. Accesses that were begun may go on until a
    /// question of [`crate::doorbell::Doorbells::ask`] is answered; then [`Self::is_withdrawn`] says whether it still holds.
    #[must_use]
    pub fn withdraw(&self, incarnation: Incarnation, key: u32) -> bool {
        let (from, to) = (incarnation.with(key), incarnation.with(0));
        self.0.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Container: whether the region is the container's to restore: not lent, and not revoked.
    #[must_use]
    pub fn is_withdrawn(&self, incarnation: Incarnation) -> bool {
        self.0.load(Ordering::Acquire) == incarnation.with(0)
    }

    /// Container: has a region that was withdrawn reached by `key`. False if the proxy has taken it.
    #[must_use]
    pub fn restore(&self, incarnation: Incarnation, key: u32) -> bool {
        let (from, to) = (incarnation.with(0), incarnation.with(key));
        self.0.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

/// The keys of one place, one after the other: all that there are of its number of bits, in an order that nobody knows
/// who does not know the secret, before one comes again.
///
/// A key is the place in its low bits and chance above, so that the keys of other regions do not follow from one.
#[derive(Clone, Copy, Debug)]
pub struct Keys {
    places: u32,
    secret: u64,
}

impl Keys {
    /// For a table of so many places, a power of two below 2^31.
    #[must_use]
    pub fn new(places: u32, secret: u64) -> Self {
        Self { places, secret }
    }

    /// The next key of the place that `first` names: not zero, and none of the former ones.
    ///
    /// `first` is the region's first key, which the proxy chose; `turn` begins with zero and is only for this.
    #[must_use]
    pub fn next(self, first: u32, turn: &mut u32) -> u32 {
        let shift = self.places.trailing_zeros();
        let bits = 32 - shift;
        // The first key is somewhere in the order: steps are counted from there, so that it comes last.
        let origin = self.unmix(first >> shift, bits);
        loop {
            *turn = turn.wrapping_add(1);
            let key = self.mix(origin.wrapping_add(*turn), bits) << shift | first & (self.places - 1);
            if key != 0 {
                return key;
            }
        }
    }

    fn mask(bits: u32) -> u32 {
        (1u64 << bits).wrapping_sub(1) as u32
    }

    fn multiplier(self) -> u32 {
        (self.secret >> 32) as u32 | 1
    }

    /// A permutation of the numbers of so many bits.
    fn mix(self, number: u32, bits: u32) -> u32 {
        let (mask, half) = (Self::mask(bits), bits.div_ceil(2));
        let mut number = (number ^ self.secret as u32) & mask;
        for _ in 0..3 {
            number = number.wrapping_mul(self.multiplier()) & mask;
            // Of `bits` bits, half of them and more away: its own inverse.
            number ^= number >> half;
        }
        number
    }

    fn unmix(self, number: u32, bits: u32) -> u32 {
        let (mask, half) = (Self::mask(bits), bits.div_ceil(2));
        // Newton's iteration for the inverse modulo a power of two: each step doubles the bits that are right.
        let mut inverse = self.multiplier();
        for _ in 0..5 {
            inverse = inverse.wrapping_mul(2u32.wrapping_sub(self.multiplier().wrapping_mul(inverse)));
        }
        let mut number = number & mask;
        for _ in 0..3 {
            number ^= number >> half;
            number = number.wrapping_mul(inverse) & mask;
        }
        (number ^ self.secret as u32) & mask
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    extern crate std;

    use super::*;
    use std::collections::HashSet;

    const INC: Incarnation = Incarnation(7);

    #[test]
    fn a_word_goes_round_and_each_step_only_from_its_own_state() {
        let word = KeyWord::default();
        assert!(!word.answers_to(0) && !word.restore(INC, 5) && !word.withdraw(INC, 5) && !word.revoke(INC));
        word.grant(INC, 5);
        assert!(word.answers_to(5) && !word.answers_to(6) && !word.answers_to(0));
        assert!(!word.revoke(INC) && !word.restore(INC, 6) && !word.withdraw(INC, 6));
        assert!(word.withdraw(INC, 5) && word.is_withdrawn(INC) && !word.answers_to(5) && !word.answers_to(0));
        assert!(!word.restore(INC.next(), 6) && word.restore(INC, 6) && word.answers_to(6) && !word.answers_to(5));
        assert!(word.withdraw(INC, 6) && word.revoke(INC) && !word.restore(INC, 7) && !word.is_withdrawn(INC));
    }

    #[test]
    fn what_was_lent_is_not_withdrawn_without_a_message_nor_revoked() {
        let word = KeyWord::default();
        word.grant(INC, 5);
        word.lend();
        assert!(word.answers_to(5) && !word.withdraw(INC, 5));
        word.grant(INC, 5);
        assert!(word.withdraw(INC, 5));
        // The worker was in the midst of an access.
        word.lend();
        assert!(!word.is_withdrawn(INC) && !word.restore(INC, 6) && !word.revoke(INC) && !word.answers_to(5));
    }

    #[test]
    fn every_key_of_a_place_comes_before_one_comes_again() {
        for (places, first) in [(1 << 21, 0x0020_0003), (1 << 20, 0xfff0_0000), (1 << 24, 0x0500_0009)] {
            let keys = Keys::new(places, 0x9e37_79b9_7f4a_7c15);
            let mut seen = HashSet::from([first]);
            let mut turn = 0;
            // Of place zero one key is none.
            let all = (1u64 << 32) / u64::from(places) - u64::from(first & (places - 1) == 0);
            for _ in 1..all {
                let key = keys.next(first, &mut turn);
                assert_eq!(key & (places - 1), first & (places - 1));
                assert!(key != 0 && seen.insert(key), "{key:#x} again");
            }
            assert_eq!(keys.next(first, &mut turn), first);
        }
    }

    #[test]
    fn keys_of_small_tables_differ_too_and_by_the_secret() {
        let (mut turn, first) = (0, 0xdead_bee5);
        let keys = Keys::new(16, 1);
        let seen: HashSet<u32> = (0..100_000).map(|_| keys.next(first, &mut turn)).collect();
        assert_eq!(seen.len(), 100_000);
        let by = |secret| Keys::new(8192, secret).next(first, &mut 0);
        assert_ne!(by(0x1234_5678_9abc_def0), by(0x0fed_cba9_8765_4321));
    }
}
