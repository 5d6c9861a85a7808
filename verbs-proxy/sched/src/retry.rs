//! When a request that was put off comes again.

use crate::units::Nanos;

/// The longest that a request is put off, unless it was told a longer time.
pub const LONGEST_PAUSE: Nanos = Nanos::millis(8);

/// Waits of at least two of these end at a multiple of it.
const TOGETHER: Nanos = Nanos::millis(1);

/// When a request that was told to come again after `first` is tried again, having been told so `before` times in a row.
///
/// Each time it waits twice as long, up to `longest`, or `first` if that is longer: a peer that is never ready costs less and
/// less, and one that is costs at most as long again as it took. Long waits end together, so that a thousand of
/// them do not wake the worker a thousand times.
#[must_use]
pub fn again(now: Nanos, first: Nanos, longest: Nanos, before: u32) -> Nanos {
    let pause = Nanos(first.0.saturating_mul(1 << before.min(20))).min(longest.max(first));
    let at = now.after(pause);
    if before == 0 || pause.0 < 2 * TOGETHER.0 {
        return at;
    }
    Nanos(at.0.checked_next_multiple_of(TOGETHER.0).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_never_taken_comes_less_and_less_often() {
        let longest = LONGEST_PAUSE;
        let pauses = |first, times| {
            (0..times).map(|before| again(Nanos(0), Nanos(first), longest, before).0).collect::<Vec<_>>()
        };
        assert_eq!(pauses(10_000, 4), [10_000, 20_000, 40_000, 80_000]);
        assert_eq!(again(Nanos(0), Nanos(10_000), longest, u32::MAX), longest);
        // What the receiver asks for is the least.
        assert_eq!(pauses(20_480_000, 2), [20_480_000, 21_000_000]);
        // Long pauses from different times end at the same.
        let late = |now| again(Nanos(now), Nanos(10_000), longest, 30);
        assert_eq!(late(1), late(900_000));
        let mut now = Nanos(0);
        let tries = (0..).take_while(|before| {
            now = again(now, Nanos(10_000), longest, *before);
            now < Nanos::millis(2_000)
        });
        assert!(tries.count() < 300);
    }

    #[test]
    fn the_end_of_time_is_no_overflow() {
        assert_eq!(again(Nanos::NEVER, Nanos::NEVER, Nanos::NEVER, 40), Nanos::NEVER);
    }
}
