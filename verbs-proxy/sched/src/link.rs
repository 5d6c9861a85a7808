//! The clock of a link that containers share: one piece after another, in order of arrival.

use crate::units::{BitRate, Bytes, NANOS_PER_SECOND, Nanos};

/// How far back a piece may start on the link; longer than a worker oversleeps, shorter than a person notices.
///
/// A worker that reserves a little late, because it slept until the last piece was gone, must not make the link look slower
/// than it is.
pub const SLACK: Nanos = Nanos::micros(200);

/// When something that takes `airtime` and is ready at `now` leaves a link that is taken until `free_at`.
#[must_use]
pub fn finish(free_at: Nanos, now: Nanos, airtime: Nanos) -> Nanos {
    free_at.max(Nanos(now.0.saturating_sub(SLACK.0))).after(airtime)
}

/// How long a link takes for what goes over it, one piece after another: exact in the long run, because what is cut off one
/// piece's time is added to the next one's.
#[derive(Clone, Debug)]
pub struct Airtime {
    rate: BitRate,
    /// In bits times nanoseconds per second, less than `rate`.
    rest: u64,
}

impl Airtime {
    /// Of a link of this rate.
    #[must_use]
    pub const fn new(rate: BitRate) -> Self {
        Self { rate, rest: 0 }
    }

    /// How long the next piece takes.
    pub fn of(&mut self, bytes: Bytes) -> Nanos {
        let rate = u128::from(self.rate.bits());
        let work = u128::from(bytes.0) * 8 * NANOS_PER_SECOND + u128::from(self.rest);
        self.rest = (work % rate) as u64;
        Nanos(u64::try_from(work / rate).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn airtime_adds_up_to_the_link_s_rate(
            rate in 1_000_000u64..10_000_000_000_000,
            pieces in prop::collection::vec(0u64..1 << 21, 1..200),
        ) {
            let mut airtime = Airtime::new(BitRate::new(rate).unwrap());
            let total: u64 = pieces.iter().map(|bytes| airtime.of(Bytes(*bytes)).0).sum();
            let bits = pieces.iter().sum::<u64>() as u128 * 8;
            prop_assert_eq!(u128::from(total), bits * NANOS_PER_SECOND / u128::from(rate));
        }
    }

    #[test]
    fn a_late_reservation_within_the_slack_costs_no_bandwidth() {
        let airtime = Airtime::new(BitRate::new(8_000_000_000).unwrap()).of(Bytes(1_000));
        let at = |now| finish(Nanos::millis(10), now, airtime);
        assert_eq!(at(Nanos::millis(9)), Nanos(10_001_000));
        assert_eq!(at(Nanos(10_200_000)), Nanos(10_001_000));
        assert_eq!(at(Nanos(10_300_000)), Nanos(10_101_000));
    }
}
