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
