//! All rates of a container: bytes that leave it, bytes that it fetches, operations.

use crate::bucket::{Bucket, Waiting};
use crate::units::{BitRate, Bytes, Nanos, OpRate, Ops};

/// What a piece costs its container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes that leave the container's memory.
    pub out: Bytes,
    /// Bytes that it fetches.
    pub fetched: Bytes,
    /// Operations.
    pub ops: Ops,
}

/// The rates of a container, each of which must allow a piece.
#[derive(Clone, Debug, Default)]
pub struct Caps {
    out: Option<Bucket<BitRate>>,
    fetched: Option<Bucket<BitRate>>,
    ops: Option<Bucket<OpRate>>,
}

/// What may go without looking at a clock: a quarter of each burst since it was last looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// Bytes that leave.
    pub out: Bytes,
    /// Bytes that are fetched.
    pub fetched: Bytes,
    /// Operations.
    pub ops: Ops,
    /// Requests that are longer must ask.
    pub longest: Bytes,
}

impl Allowance {
    /// What may go by either.
    #[inline]
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        Self {
            out: self.out.min(other.out),
            fetched: self.fetched.min(other.fetched),
            ops: self.ops.min(other.ops),
            longest: self.longest.min(other.longest),
        }
    }
}

impl Caps {
    /// Full buckets.
    #[must_use]
    pub fn new(out: Option<BitRate>, fetched: Option<BitRate>, ops: Option<OpRate>, now: Nanos) -> Self {
        Self {
            out: out.map(|rate| Bucket::new(rate, now)),
            fetched: fetched.map(|rate| Bucket::new(rate, now)),
            ops: ops.map(|rate| Bucket::new(rate, now)),
        }
    }

    /// Whether nothing is limited.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.out.is_none() && self.fetched.is_none() && self.ops.is_none()
    }

    /// Earns what the time since the last look is worth.
    pub fn refill(&mut self, now: Nanos, waiting: Waiting) {
        for bucket in [&mut self.out, &mut self.fetched].into_iter().flatten() {
            bucket.refill(now, waiting);
        }
        if let Some(bucket) = &mut self.ops {
            bucket.refill(now, waiting);
        }
    }

    /// Whether every rate that a piece of this cost needs allows one now; else when.
    pub fn open(&mut self, cost: Cost, now: Nanos, waiting: Waiting) -> Result<(), Nanos> {
        let mut at = Nanos(0);
        let mut ask = |answer: Result<(), Nanos>| at = at.max(answer.err().unwrap_or_default());
        if let Some(bucket) = self.out.as_mut().filter(|_| cost.out.0 > 0) {
            ask(bucket.open(now, waiting));
        }
        if let Some(bucket) = self.fetched.as_mut().filter(|_| cost.fetched.0 > 0) {
            ask(bucket.open(now, waiting));
        }
        if let Some(bucket) = self.ops.as_mut().filter(|_| cost.ops.0 > 0) {
            ask(bucket.open(now, waiting));
        }
        if at == Nanos(0) { Ok(()) } else { Err(at) }
    }

    /// Charges what goes.
    #[inline]
    pub fn charge(&mut self, cost: Cost) {
        if let Some(bucket) = &mut self.out {
            bucket.charge(cost.out);
        }
        if let Some(bucket) = &mut self.fetched {
            bucket.charge(cost.fetched);
        }
        if let Some(bucket) = &mut self.ops {
            bucket.charge(cost.ops);
        }
    }

    /// Whoever READs what leaves asks for it, and waits elsewhere: see [`Bucket::expect`].
    pub fn expect_reads(&mut self) {
        if let Some(bucket) = &mut self.out {
            bucket.expect();
        }
    }

    /// Somebody must wait for another who shares what leaves: see [`Bucket::hold`].
    pub fn hold_out(&mut self, now: Nanos) {
        if let Some(bucket) = &mut self.out {
            bucket.hold(now);
        }
    }

    /// What may leave without a clock.
    #[inline]
    #[must_use]
    pub fn in_hand(&self) -> Allowance {
        Allowance {
            out: Bytes(self.out.as_ref().map_or(u64::MAX, |bucket| bucket.in_hand() / 8)),
            fetched: Bytes(self.fetched.as_ref().map_or(u64::MAX, |bucket| bucket.in_hand() / 8)),
            ops: Ops(self.ops.as_ref().map_or(u64::MAX, Bucket::in_hand)),
            longest: Bytes(u64::MAX),
        }
    }

    /// Whether a piece of this cost may go without a clock.
    #[inline]
    #[must_use]
    pub fn covers(&self, cost: Cost) -> bool {
        let Allowance { out, fetched, ops, .. } = self.in_hand();
        cost.out <= out && cost.fetched <= fetched && cost.ops <= ops
    }

    /// Whether so little is in hand that the next turn should read the clock.
    #[inline]
    #[must_use]
    pub fn wants_clock(&self) -> bool {
        self.out.as_ref().is_some_and(Bucket::wants_clock)
            || self.fetched.as_ref().is_some_and(Bucket::wants_clock)
            || self.ops.as_ref().is_some_and(Bucket::wants_clock)
    }

    /// What may leave at once, and in a millisecond, if a rate limits what leaves.
    #[must_use]
    pub fn burst_out(&self) -> Option<(Bytes, Bytes)> {
        self.out.as_ref().map(|bucket| (Bytes(bucket.burst() / 8), Bytes(bucket.millisecond() / 8)))
    }

    /// Bytes of a piece that one burst pays for.
    #[must_use]
    pub fn burst(&self) -> Option<Bytes> {
        let bursts = [&self.out, &self.fetched].into_iter().flatten().map(|bucket| Bytes(bucket.burst() / 8));
        bursts.min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What is left of one rate if nothing is ever made up for: a bucket cannot have less.
    struct Plain {
        per_second: u64,
        burst: u64,
        /// In billionths of a unit.
        balance: i128,
        /// Units, and those of the last one that went.
        spent: u128,
        last: u128,
    }

    impl Plain {
        fn new(per_second: Option<u64>, least: u64) -> Option<Self> {
            let burst = (per_second? / 1000).max(least);
            Some(Self { per_second: per_second?, burst, balance: i128::from(burst) * 1_000_000_000, spent: 0, last: 0 })
        }

        fn earn(&mut self, time: u64) {
            let earned = i128::from(self.per_second) * i128::from(time);
            self.balance = (self.balance + earned).min(i128::from(self.burst) * 1_000_000_000);
        }

        fn spend(&mut self, units: u64) {
            self.balance -= i128::from(units) * 1_000_000_000;
            self.spent += u128::from(units);
            self.last = if units > 0 { units.into() } else { self.last };
        }

        /// How long until something is there.
        fn wait(&self) -> u64 {
            (1 - self.balance).max(0).unsigned_abs().div_ceil(self.per_second.into()) as u64
        }

        /// No more than the rate, five quarters of the burst and what the last one took beyond.
        fn holds(&self, now: Nanos) -> bool {
            let earned = u128::from(self.per_second) * u128::from(now.0) / 1_000_000_000;
            self.spent - self.last <= earned + u128::from(self.burst) * 5 / 4 + 1
        }
    }

    /// Rates from `10^least` on, each order of magnitude as likely as the others.
    fn rates(least: u32, most: u32) -> impl Strategy<Value = Option<u64>> {
        prop::option::of((least..most, 1u64..10).prop_map(|(order, digit)| digit * 10u64.pow(order)))
    }

    proptest! {
        /// Any rates, and anything that asks, with a clock or without: each rate holds by itself and stops what costs it something for
        /// no longer than its own debt, nothing else stops anything, and what is stopped may go at the time that it is told and
        /// not before.
        #[test]
        fn each_rate_holds_and_whatever_waits_is_told_how_long(
            (out, fetched, ops) in (rates(5, 10), rates(5, 10), rates(1, 6)),
            steps in prop::collection::vec((0u64..2_000_000, 0u64..100_000, 0u64..100_000, 0u64..20, 0u8..8, any::<bool>()), 1..200),
        ) {
            let mut caps =
                Caps::new(out.and_then(BitRate::new), fetched.and_then(BitRate::new), ops.and_then(OpRate::new), Nanos(0));
            let mut plain = [Plain::new(out, 16 << 13), Plain::new(fetched, 16 << 13), Plain::new(ops, 8)];
            let mut now = Nanos(0);
            for (wait, out, fetched, ops, which, clock) in steps {
                let some = |bit: u8, amount| if which & bit == 0 { amount } else { 0 };
                let cost = Cost { out: Bytes(some(1, out)), fetched: Bytes(some(2, fetched)), ops: Ops(some(4, ops)) };
                let units = [cost.out.0 * 8, cost.fetched.0 * 8, cost.ops.0];
                now = now.after(Nanos(wait));
                plain.iter_mut().flatten().for_each(|plain| plain.earn(wait));
                let needed = plain.iter().zip(units).filter(|(_, units)| *units > 0);
                let longest = needed.filter_map(|(plain, _)| plain.as_ref()).map(Plain::wait).max().unwrap_or(0);
                if caps.covers(cost) {
                    let mut limits = plain.iter().zip(units).filter_map(|(plain, units)| Some((plain.as_ref()?.burst, units)));
                    prop_assert!(limits.all(|(burst, units)| units <= burst / 4), "{cost:?} without a clock");
                    prop_assert!(caps.clone().open(cost, now, Waiting::Here).is_ok(), "in hand, and may not go: {caps:?}");
                } else if !clock {
                    continue;
                } else if let Err(at) = caps.open(cost, now, Waiting::Here) {
                    prop_assert!(at > now && at <= now.after(Nanos(longest)), "{at:?} instead of {longest} after {now:?}");
                    prop_assert!(caps.clone().open(cost, Nanos(at.0 - 1), Waiting::Here).is_err());
                    prop_assert_eq!(caps.clone().open(cost, at, Waiting::Here), Ok(()));
                    continue;
                }
                caps.charge(cost);
                plain.iter_mut().zip(units).for_each(|(plain, units)| plain.iter_mut().for_each(|plain| plain.spend(units)));
                prop_assert!(plain.iter().flatten().all(|plain| plain.holds(now)), "{cost:?} at {now:?}: {caps:?}");
            }
        }
    }

    #[test]
    fn each_rate_stops_only_what_costs_it_something() {
        let (rate, ops) = (BitRate::new(8_000_000), OpRate::new(1_000));
        let mut caps = Caps::new(rate, rate, ops, Nanos(0));
        let read = Cost { fetched: Bytes(1 << 20), ops: Ops(1), ..Cost::default() };
        let write = Cost { out: Bytes(1), ops: Ops(1), ..Cost::default() };
        assert_eq!(caps.open(read, Nanos(0), Waiting::Here), Ok(()));
        caps.charge(read);
        assert!(caps.open(read, Nanos(1), Waiting::Here).is_err());
        assert_eq!(caps.open(write, Nanos(1), Waiting::Here), Ok(()));
        caps.charge(Cost { ops: Ops(100), ..Cost::default() });
        // 101 operations against a burst of 8: 93 are owed, and the balance must be positive.
        assert_eq!(caps.open(write, Nanos(1), Waiting::Here), Err(Nanos(93_000_001)));
    }

    #[test]
    fn what_is_not_limited_is_always_in_hand() {
        let caps = Caps::new(None, None, OpRate::new(1_000_000), Nanos(0));
        let longest = Bytes(u64::MAX);
        assert_eq!(
            caps.in_hand(),
            Allowance { out: Bytes(u64::MAX), fetched: Bytes(u64::MAX), ops: Ops(250), longest }
        );
        assert!(caps.covers(Cost { out: Bytes(u64::MAX), fetched: Bytes(u64::MAX), ops: Ops(250) }));
        assert!(!caps.covers(Cost { ops: Ops(251), ..Cost::default() }));
    }
}
