//! Quantities as types: none of them can be taken for another.

use serde::{Deserialize, Serialize};
use std::num::NonZeroU64;

/// A time on the monotonic clock, or a stretch of it, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nanos(pub u64);

impl Nanos {
    /// So far away that it never comes.
    pub const NEVER: Self = Self(u64::MAX);

    /// This many microseconds.
    #[must_use]
    pub const fn micros(count: u64) -> Self {
        Self(count * 1_000)
    }

    /// This many milliseconds.
    #[must_use]
    pub const fn millis(count: u64) -> Self {
        Self(count * 1_000_000)
    }

    /// From `earlier` to here, nothing if that is not earlier.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }

    /// `more` later.
    #[must_use]
    pub const fn after(self, more: Self) -> Self {
        Self(self.0.saturating_add(more.0))
    }
}

/// An amount of data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// Both together.
    #[must_use]
    pub const fn plus(self, more: Self) -> Self {
        Self(self.0.saturating_add(more.0))
    }
}

/// A number of operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ops(pub u64);

/// Bits per second, more than none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BitRate(NonZeroU64);

impl BitRate {
    /// `None` for a rate of nothing.
    #[must_use]
    pub const fn new(bits_per_second: u64) -> Option<Self> {
        match NonZeroU64::new(bits_per_second) {
            Some(rate) => Some(Self(rate)),
            None => None,
        }
    }

    /// Bits per second.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0.get()
    }

    /// The data that `time` is enough for, rounded down.
    #[must_use]
    pub fn bytes_in(self, time: Nanos) -> Bytes {
        let bits = u128::from(self.bits()) * u128::from(time.0) / NANOS_PER_SECOND;
        Bytes(u64::try_from(bits / 8).unwrap_or(u64::MAX))
    }
}

/// Operations per second, more than none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OpRate(NonZeroU64);

impl OpRate {
    /// `None` for a rate of nothing.
    #[must_use]
    pub const fn new(operations_per_second: u64) -> Option<Self> {
        match NonZeroU64::new(operations_per_second) {
            Some(rate) => Some(Self(rate)),
            None => None,
        }
    }

    /// Operations per second.
    #[must_use]
    pub const fn ops(self) -> u64 {
        self.0.get()
    }
}

/// A container's part of what is contended, beside others' weights: 1 to 1000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Weight(u32);

impl Weight {
    /// `None` for a weight that is not from 1 to 1000.
    #[must_use]
    pub const fn new(weight: u32) -> Option<Self> {
        if weight >= 1 && weight <= 1000 { Some(Self(weight)) } else { None }
    }

    /// 1 to 1000.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Weight {
    type Error = String;

    fn try_from(weight: u32) -> Result<Self, String> {
        Self::new(weight).ok_or_else(|| format!("a weight of {weight}; it is from 1 to 1000"))
    }
}

impl From<Weight> for u32 {
    fn from(weight: Weight) -> Self {
        weight.get()
    }
}

impl Default for Weight {
    /// That of a container whose policy names none.
    fn default() -> Self {
        Self(100)
    }
}

pub(crate) const NANOS_PER_SECOND: u128 = 1_000_000_000;
