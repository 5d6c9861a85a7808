//! A token bucket with debt.

use crate::units::{BitRate, Bytes, NANOS_PER_SECOND, Nanos, OpRate, Ops};

/// What a bucket limits.
pub trait Rate: Copy {
    /// What is taken out of it.
    type Amount: Copy;
    /// What every bucket holds at least, in units.
    const SMALLEST_BURST: u64;
    /// Units per second.
    fn per_second(self) -> u64;
    /// An amount in units.
    fn units(amount: Self::Amount) -> u64;
}

impl Rate for BitRate {
    type Amount = Bytes;
    /// Together with one millisecond at the rate it keeps the error over 100 ms near one percent from 100 Mbit/s up, while a
    /// worker that oversleeps by less than that loses nothing.
    const SMALLEST_BURST: u64 = 16 << 13;
    fn per_second(self) -> u64 {
        self.bits()
    }
    fn units(amount: Bytes) -> u64 {
        amount.0.saturating_mul(8)
    }
}

impl Rate for OpRate {
    type Amount = Ops;
    const SMALLEST_BURST: u64 = 8;
    fn per_second(self) -> u64 {
        self.ops()
    }
    fn units(amount: Ops) -> u64 {
        amount.0
    }
}

/// A token bucket that lets a request go on a positive balance and then charges the full cost, so that a request larger than the
/// burst passes and is paid for by waiting afterwards (FreeFlow's bucket never lets such a request go).
///
/// Balances are kept in billionths of a unit, so that no rate is quantised and nothing is lost in the long run. Over any
/// interval it grants at most the burst, what the rate makes of the time, and one request; besides, what it owes from
/// before: a worker that lost its processor while requests waited makes up for [`CATCH_UP`] of it at most.
///
/// Reading a clock costs as much as a small request. [`Self::in_hand`] is what may be taken without: a quarter of the burst
/// at most since the clock was last read, so that the burst counts five quarters for whoever makes the most of that.
#[derive(Clone, Debug)]
pub struct Bucket<R: Rate> {
    rate: R,
    /// Units.
    burst: u64,
    /// Negative while in debt. Without what was charged since: see [`Self::settle`].
    balance: i128,
    /// Units that were charged and are not taken off the balance yet, as wide numbers cost as much as a small request does.
    charged: u64,
    updated: Nanos,
    /// Somebody could not have what he wanted, and could from this time on.
    due: Option<Nanos>,
    /// Units that may still be taken without a clock.
    in_hand: u64,
}

/// Where those are who could not have what they wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// Their requests are kept here: as long as they are late, it is this process that is.
    Here,
    /// They ask again, if they still want anything. When they do they may have been held up, or had nothing to ask for.
    Elsewhere,
}

impl Waiting {
    /// What is made up for of so long a delay. Of those who ask again less and less from [`CATCH_UP`] on, and nothing after twice
    /// that: by then it was no processor that they lacked.
    fn made_up(self, late: Nanos) -> Nanos {
        match self {
            Self::Here => late.min(CATCH_UP),
            Self::Elsewhere => late.min(Nanos(2 * CATCH_UP.0).since(late)),
        }
    }
}

/// The longest delay of those who wait that is made up for. Hypervisors take a processor away for that long: 15 ms were measured.
pub const CATCH_UP: Nanos = Nanos::millis(16);

const SCALE: i128 = NANOS_PER_SECOND as i128;

impl<R: Rate> Bucket<R> {
    /// A full bucket.
    #[must_use]
    pub fn new(rate: R, now: Nanos) -> Self {
        let burst = (rate.per_second() / 1000).max(R::SMALLEST_BURST);
        let balance = i128::from(burst) * SCALE;
        Self { rate, burst, balance, charged: 0, updated: now, due: None, in_hand: burst / 4 }
    }

    /// The burst in units: bits or operations.
    #[must_use]
    pub fn burst(&self) -> u64 {
        self.burst
    }

    fn earned(&self, time: Nanos) -> i128 {
        i128::from(time.0).saturating_mul(i128::from(self.rate.per_second()))
    }

    /// Takes what was charged off the balance.
    fn settle(&mut self) {
        let charged = i128::from(std::mem::take(&mut self.charged));
        self.balance = self.balance.saturating_sub(charged * SCALE);
    }

    /// Earns what the time since the last look is worth.
    pub fn refill(&mut self, now: Nanos, waiting: Waiting) {
        self.settle();
        let elapsed = now.since(self.updated);
        self.updated = self.updated.max(now);
        let late = self.due.map_or(Nanos(0), |due| waiting.made_up(now.since(due)));
        if late == Nanos(0) && self.due.is_some_and(|due| due < now) {
            self.due = None;
        }
        let most = (i128::from(self.burst) * SCALE).saturating_add(self.earned(late));
        self.balance = self.balance.saturating_add(self.earned(elapsed)).min(most);
        self.in_hand = self.affordable();
    }

    /// What is left of the balance, a quarter of the burst at most.
    fn affordable(&self) -> u64 {
        let whole = u64::try_from((self.balance / SCALE).max(0)).unwrap_or(u64::MAX);
        whole.min(self.burst / 4)
    }

    /// Whether the balance is positive now; else when it will be, and the caller comes back then.
    pub fn open(&mut self, now: Nanos, waiting: Waiting) -> Result<(), Nanos> {
        self.refill(now, waiting);
        if self.balance > 0 {
            // Those who were kept waiting longer than promised are served until what they missed is spent.
            if waiting == Waiting::Here && self.balance <= i128::from(self.burst) * SCALE {
                self.due = None;
            }
            return Ok(());
        }
        let at = self.positive_at();
        self.due = Some(at);
        Err(at)
    }

    /// When the balance, which is not positive, will be.
    fn positive_at(&self) -> Nanos {
        let missing = (1 - self.balance).unsigned_abs();
        let wait = u64::try_from(missing.div_ceil(u128::from(self.rate.per_second()))).unwrap_or(u64::MAX);
        self.updated.after(Nanos(wait))
    }

    /// Whoever was charged last was not refused, and may want more all the same: if nothing is left he is late from when there is.
    pub fn expect(&mut self) {
        self.settle();
        if self.balance <= 0 {
            self.due = Some(self.positive_at());
        }
    }

    /// Somebody could have what is there, or could from when there is something, and must wait for somebody else: what is lost by that
    /// is made up for.
    pub fn hold(&mut self, now: Nanos) {
        self.settle();
        if self.due.is_none() {
            self.due = Some(if self.balance > 0 { now } else { self.positive_at() });
        }
    }

    /// What a millisecond is worth, in units.
    #[must_use]
    pub fn millisecond(&self) -> u64 {
        self.rate.per_second() / 1000
    }

    /// Charges what goes, whatever the balance.
    #[inline]
    pub fn charge(&mut self, amount: R::Amount) {
        let units = R::units(amount);
        self.charged = self.charged.saturating_add(units);
        self.in_hand = self.in_hand.saturating_sub(units);
    }

    /// Charges `amount` if the balance is positive; else says when it will be, and the caller comes back then.
    pub fn take(&mut self, amount: R::Amount, now: Nanos) -> Result<(), Nanos> {
        self.open(now, Waiting::Here)?;
        self.charge(amount);
        Ok(())
    }

    /// Units that may be charged without looking at a clock.
    #[inline]
    #[must_use]
    pub fn in_hand(&self) -> u64 {
        self.in_hand
    }

    /// Whether so little is in hand that the next turn should read the clock.
    #[inline]
    #[must_use]
    pub fn wants_clock(&self) -> bool {
        self.in_hand < self.burst / 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bits(rate: u64) -> Bucket<BitRate> {
        Bucket::new(BitRate::new(rate).unwrap(), Nanos(0))
    }

    fn ops(rate: u64) -> Bucket<OpRate> {
        Bucket::new(OpRate::new(rate).unwrap(), Nanos(0))
    }

    /// Rates from 1 bit/s to 10 Tbit/s, each order of magnitude as likely as the others.
    fn rates() -> impl Strategy<Value = u64> {
        let any = (0u32..13, 1u64..10).prop_map(|(order, digit)| digit * 10u64.pow(order));
        prop_oneof![8 => any, 1 => Just(1), 1 => Just(10_000_000_000_000)]
    }

    proptest! {
        #[test]
        fn never_more_than_burst_and_rate_times_time(
            rate in rates(),
            steps in prop::collection::vec((0u64..2_000_000, 1u64..2_000_000), 1..200),
        ) {
            let mut bucket = bits(rate);
            let (mut now, mut granted, mut last) = (Nanos(0), 0, 0);
            for (wait, bytes) in steps {
                now = now.after(Nanos(wait));
                if bucket.take(Bytes(bytes), now).is_ok() {
                    granted += u128::from(bytes) * 8;
                    last = u128::from(bytes) * 8;
                }
                let allowed = u128::from(bucket.burst) + u128::from(rate) * u128::from(now.0) / NANOS_PER_SECOND + 1;
                prop_assert!(granted - last <= allowed, "{granted} - {last} of {allowed}");
            }
        }

        #[test]
        fn never_more_than_five_quarters_of_the_burst_for_whoever_takes_without_a_clock(
            rate in 1u64..10_000_000_000,
            steps in prop::collection::vec((0u64..100_000, 1u64..10_000, any::<bool>()), 1..200),
        ) {
            let mut bucket = ops(rate);
            let (mut now, mut granted, mut last) = (Nanos(0), 0u128, 0u128);
            for (wait, count, clock) in steps {
                now = now.after(Nanos(wait));
                let goes = if clock {
                    bucket.open(now, Waiting::Here).is_ok()
                } else {
                    bucket.in_hand() >= count
                };
                if goes {
                    bucket.charge(Ops(count));
                    granted += u128::from(count);
                    last = u128::from(count);
                }
                let burst = u128::from(bucket.burst + bucket.burst / 4);
                let allowed = burst + u128::from(rate) * u128::from(now.0) / NANOS_PER_SECOND + 1;
                prop_assert!(granted - last <= allowed, "{granted} - {last} of {allowed}");
            }
        }

        #[test]
        fn opens_when_it_said_it_would_and_not_before(rate in rates(), bytes in 1u64..10_000_000) {
            let mut bucket = bits(rate);
            bucket.take(Bytes(bytes.max(bucket.burst / 8 + 1)), Nanos(0)).unwrap();
            if let Err(at) = bucket.take(Bytes(1), Nanos(1)) {
                prop_assert!(bucket.take(Bytes(1), Nanos(at.0 - 1)).is_err());
                prop_assert_eq!(bucket.take(Bytes(1), at), Ok(()));
            }
        }

        /// Whoever always has something to send gets the rate: after any number of pieces the clock has advanced by what
        /// they cost, less the burst, and plus at most one nanosecond of rounding in all.
        #[test]
        fn the_long_term_rate_is_exact(rate in rates(), pieces in prop::collection::vec(1u64..1_000_000, 1..500)) {
            let mut bucket = bits(rate);
            let (mut now, mut taken) = (Nanos(0), 0u128);
            for bytes in &pieces {
                if let Err(at) = bucket.take(Bytes(*bytes), now) {
                    now = at;
                    prop_assert_eq!(bucket.take(Bytes(*bytes), now), Ok(()));
                }
                taken += u128::from(*bytes) * 8;
            }
            let paid = taken - u128::from(*pieces.last().unwrap()) * 8;
            let due = paid.saturating_sub(u128::from(bucket.burst)) * NANOS_PER_SECOND / u128::from(rate);
            let off = u128::from(now.0).abs_diff(due);
            prop_assert!(off <= 2, "{now:?} instead of {due}");
        }
    }

    #[test]
    fn who_asks_again_later_than_he_could_was_held_up_or_had_nothing_to_ask_for() {
        // A millisecond is 12,500 bytes, and the burst 16 KiB.
        let mut bucket = bits(100_000_000);
        let mut now = Nanos(0);
        let mut taken_after = |late: u64| {
            // All is taken, and a millisecond more; nobody asks until then, but turns go by.
            while bucket.open(now, Waiting::Elsewhere).is_ok() {
                bucket.charge(Bytes(500));
            }
            bucket.charge(Bytes(12_500));
            bucket.expect();
            let begun = now;
            now = begun.after(Nanos::millis(1 + late));
            (1..10)
                .for_each(|turn| bucket.refill(begun.after(Nanos(now.since(begun).0 / 10 * turn)), Waiting::Elsewhere));
            let mut taken = 0;
            while bucket.open(now, Waiting::Elsewhere).is_ok() {
                bucket.charge(Bytes(500));
                taken += 500;
            }
            taken
        };
        for (late, made_up) in [(1, 1), (10, 10), (16, 16), (17, 15), (24, 8)] {
            let taken = taken_after(late);
            // The burst is had besides, as far as there was time for it.
            let (least, most) = (made_up * 12_500 - 1000, made_up * 12_500 + 16_384 + 1000);
            assert!((least..=most).contains(&taken), "{taken} bytes after {late} ms");
        }
        for late in [31, 33, 1000, 3_600_000] {
            let taken = taken_after(late);
            assert!(taken <= 16_384 + 12_500 + 1000, "{taken} bytes after {late} ms");
        }
    }

    #[test]
    fn who_leaves_something_is_not_late() {
        let mut bucket = bits(100_000_000);
        for ask in 0..1000 {
            let now = Nanos(ask * 5_000_000);
            bucket.open(now, Waiting::Elsewhere).unwrap();
            bucket.charge(Bytes(8192));
            bucket.expect();
        }
        let now = Nanos(1000 * 5_000_000);
        let taken = (0..).take_while(|_| bucket.take(Bytes(500), now).is_ok()).count() * 500;
        assert!(taken <= 16_384 + 500, "{taken}");
    }

    #[test]
    fn a_million_small_pieces_do_not_drift() {
        // 7 bit/s and 3 operations/s divide no power of ten.
        for rate in [7, 999_999_937, 9_999_999_999_971] {
            let mut bucket = bits(rate);
            let mut now = Nanos(0);
            for _ in 0..1_000_000 {
                if let Err(at) = bucket.take(Bytes(1), now) {
                    now = at;
                    bucket.take(Bytes(1), now).unwrap();
                }
            }
            let due = (8_000_000 - 8 - u128::from(bucket.burst).min(7_999_992)) * NANOS_PER_SECOND / u128::from(rate);
            assert!(u128::from(now.0).abs_diff(due) <= 2, "{now:?} instead of {due} at {rate} bit/s");
        }
    }

    #[test]
    fn the_extremes_do_not_overflow() {
        for rate in [1, u64::MAX] {
            let mut bucket = bits(rate);
            for now in [0, 1, u64::MAX / 2, u64::MAX, 0] {
                let _ = bucket.take(Bytes(u64::MAX), Nanos(now));
            }
            let mut bucket = ops(rate);
            for now in [u64::MAX, 0, u64::MAX] {
                let _ = bucket.take(Ops(u64::MAX), Nanos(now));
            }
        }
    }

    #[test]
    fn a_request_larger_than_the_burst_passes_and_is_paid_for() {
        let mut bucket = bits(8_000_000);
        assert_eq!(bucket.take(Bytes(1_000_000), Nanos(0)), Ok(()));
        let at = bucket.take(Bytes(1), Nanos(0)).unwrap_err();
        assert!((980_000_000..=1_000_000_000).contains(&at.0), "next at {at:?}");
    }

    #[test]
    fn a_delay_of_those_who_wait_is_made_up_for_and_idleness_is_not() {
        // 1 GB/s; requests of 10 kB.
        let drain = |bucket: &mut Bucket<BitRate>, now| {
            let mut granted = 0;
            loop {
                match bucket.take(Bytes(10_000), now) {
                    Ok(()) => granted += 10_000,
                    Err(at) => return (granted, at),
                }
            }
        };
        let mut bucket = bits(8_000_000_000);
        let (_, promised) = drain(&mut bucket, Nanos(0));
        let (granted, promised) = drain(&mut bucket, promised.after(Nanos::millis(5)));
        assert!((5_000_000..=5_020_000).contains(&granted), "{granted} bytes after a delay of 5 ms");
        let (granted, _) = drain(&mut bucket, promised.after(Nanos::millis(1000)));
        assert!(granted <= 1_000_000 + 16_000_000 + 10_000, "{granted} bytes after a delay of a second");
        assert_eq!(bucket.take(Bytes(0), Nanos::millis(2000)), Ok(()));
        let mut idle = bits(8_000_000_000);
        assert_eq!(idle.take(Bytes(1_000_000), Nanos(0)), Ok(()));
        let (granted, _) = drain(&mut idle, Nanos::millis(1000));
        assert!(granted <= 1_000_000 + 10_000, "{granted} bytes after idleness");
    }
}
