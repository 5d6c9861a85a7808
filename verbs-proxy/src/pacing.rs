//! Pure decisions about time: token bucket, modelled link. No clock is read here; `now` is passed in.

/// Nanoseconds on the monotonic clock.
pub type Nanos = u64;

/// A token bucket that admits on a positive balance and then charges the full cost, so that a request larger than the
/// burst passes and is paid for by waiting afterwards (FreeFlow's bucket never admits such a request).
///
/// Over any interval it grants at most `burst + rate × time + one request`, and besides what it owes from before: a worker
/// that lost its processor while requests waited makes up for [`Bucket::CATCH_UP`] of it at most.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// Bytes per second.
    rate: u64,
    burst: u64,
    /// In units of 1 / 1e9 byte, so that no rate is quantised; negative while in debt.
    balance: i128,
    updated: Nanos,
    /// Requests wait, and were told this time.
    promised: Option<Nanos>,
}

const SCALE: i128 = 1_000_000_000;

impl Bucket {
    /// The smallest burst, bytes.
    ///
    /// Together with one millisecond at the rate it keeps the error over 100 ms near one percent from 100 Mbit/s up,
    /// while a worker that oversleeps by less than that loses nothing.
    pub const MIN_BURST: u64 = 16 << 10;

    /// The longest delay of those who wait that is made up for. Hypervisors take a processor away for that long.
    pub const CATCH_UP: Nanos = 8_000_000;

    /// A full bucket. `bits_per_second` is at least 8.
    #[must_use]
    pub fn new(bits_per_second: u64, now: Nanos) -> Self {
        let rate = (bits_per_second / 8).max(1);
        let burst = (rate / 1000).max(Self::MIN_BURST);
        Self { rate, burst, balance: i128::from(burst) * SCALE, updated: now, promised: None }
    }

    fn refill(&mut self, now: Nanos) {
        let elapsed = now.saturating_sub(self.updated);
        self.updated = self.updated.max(now);
        let late = self.promised.map_or(0, |promised| now.saturating_sub(promised).min(Self::CATCH_UP));
        let earned = i128::from(elapsed) * i128::from(self.rate);
        let most = i128::from(self.burst) * SCALE + i128::from(late) * i128::from(self.rate);
        self.balance = (self.balance + earned).min(most);
    }

    /// Charges `bytes` if the balance is positive; else says when it will be, and the caller comes back then.
    pub fn take(&mut self, bytes: u64, now: Nanos) -> Result<(), Nanos> {
        self.refill(now);
        if self.balance > 0 {
            // Those who were kept waiting longer than promised are served until what they missed is spent.
            let made_up = self.balance <= i128::from(self.burst) * SCALE;
            if made_up {
                self.promised = None;
            }
            self.balance -= i128::from(bytes) * SCALE;
            return Ok(());
        }
        let missing = (-self.balance + 1) as u128;
        let at = now + u64::try_from(missing.div_ceil(u128::from(self.rate))).unwrap_or(u64::MAX / 2);
        self.promised = Some(at);
        Err(at)
    }
}

/// How many bytes a container may have on the modelled link at once, and in what pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Bytes of one piece of a split request.
    pub chunk: u32,
    /// Bytes on the link at once over all queue pairs; `None`: one chunk per queue pair, as an RNIC arbitrates.
    pub bytes: Option<u32>,
}

/// The window of a container on a link of `link` bits per second.
///
/// The link serves in order of arrival. Containers that keep windows in proportion to their weights on it get shares
/// in proportion to their weights, whatever their number of queue pairs; who has nothing to send leaves no gap. What
/// others have on the link is what a latency-class request waits for, so windows shrink while one is about.
#[must_use]
pub fn window(link: u64, weight: Option<u32>, class: crate::launch::Class, latency_about: bool) -> Window {
    use crate::launch::Class;
    // A chunk of an RNIC's arbitration between queue pairs.
    const DEVICE_CHUNK: u32 = 16 << 10;
    if class == Class::None && weight.is_none() {
        return Window { chunk: DEVICE_CHUNK, bytes: None };
    }
    let weight = u64::from(weight.unwrap_or(DEFAULT_WEIGHT));
    // 100 µs of link for a container of default weight; a fifth of that while a latency-class container is active.
    let micros = if latency_about && class != Class::Latency { 20 } else { 100 };
    let bytes = link / 8 * micros / 1_000_000 * weight / u64::from(DEFAULT_WEIGHT);
    let bytes = bytes.clamp(1 << 10, 1 << 20) as u32;
    Window { chunk: (bytes / 2).clamp(1 << 10, DEVICE_CHUNK), bytes: Some(bytes) }
}

/// The weight of a container whose policy names none.
pub const DEFAULT_WEIGHT: u32 = 100;

/// The longest that a request is put off, unless it was told a longer time.
pub const LONGEST_PAUSE: Nanos = 8_000_000;

/// When a request that was told to come again after `first` is tried again, having been told so `before` times in a row.
///
/// Each time it waits twice as long, up to `longest`, or `first` if that is longer: a peer that is never ready costs less and
/// less, and one that is costs at most as long again as it took. Long waits end together, so that a thousand of
/// them do not wake the worker a thousand times.
#[must_use]
pub fn again(now: Nanos, first: Nanos, longest: Nanos, before: u32) -> Nanos {
    const TOGETHER: Nanos = 1_000_000;
    let pause = first.saturating_mul(1 << before.min(20)).min(longest.max(first));
    let at = now.saturating_add(pause);
    if before == 0 || pause < 2 * TOGETHER { at } else { at.next_multiple_of(TOGETHER) }
}

/// When something of `bytes` that is ready at `now` leaves a link that is taken until `free_at`.
///
/// `slack`: how far in the past it may start. A worker that reserves a little late, because it slept until the last
/// piece was gone, must not make the link look slower than it is.
#[must_use]
pub fn finish(free_at: Nanos, now: Nanos, slack: Nanos, bytes: u64, link: u64) -> Nanos {
    let duration = (u128::from(bytes) * 8 * 1_000_000_000).div_ceil(u128::from(link.max(1)));
    free_at.max(now.saturating_sub(slack)).saturating_add(u64::try_from(duration).unwrap_or(u64::MAX / 2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::Class;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bucket_never_grants_more_than_burst_and_rate_times_time(
            megabits in 1u64..100_000,
            steps in prop::collection::vec((0u64..2_000_000, 1u64..2_000_000), 1..200),
        ) {
            let rate = megabits * 1_000_000;
            let mut bucket = Bucket::new(rate, 0);
            let (mut now, mut granted, mut last) = (0, 0u64, 0);
            for (wait, bytes) in steps {
                now += wait;
                if bucket.take(bytes, now).is_ok() {
                    granted += bytes;
                    last = bytes;
                }
                let allowed = bucket.burst as u128 + u128::from(rate / 8) * u128::from(now) / 1_000_000_000 + 1;
                prop_assert!(u128::from(granted - last) <= allowed);
            }
        }

        #[test]
        fn bucket_grants_when_it_said_it_would(megabits in 1u64..100_000, bytes in 1u64..10_000_000) {
            let mut bucket = Bucket::new(megabits * 1_000_000, 0);
            bucket.take(bytes.max(bucket.burst), 0).unwrap();
            if let Err(at) = bucket.take(1, 1) {
                prop_assert_eq!(bucket.take(1, at), Ok(()));
            }
        }
    }

    #[test]
    fn a_delay_of_those_who_wait_is_made_up_for_and_idleness_is_not() {
        // 1 GB/s; requests of 10 kB.
        let drain = |bucket: &mut Bucket, now| {
            let mut granted = 0;
            loop {
                match bucket.take(10_000, now) {
                    Ok(()) => granted += 10_000,
                    Err(at) => return (granted, at),
                }
            }
        };
        let mut bucket = Bucket::new(8_000_000_000, 0);
        let (_, promised) = drain(&mut bucket, 0);
        let (granted, promised) = drain(&mut bucket, promised + 5_000_000);
        assert!((5_000_000..=5_020_000).contains(&granted), "{granted} bytes after a delay of 5 ms");
        let (granted, _) = drain(&mut bucket, promised + 1_000_000_000);
        assert!(granted <= bucket.burst + 8_000_000 + 10_000, "{granted} bytes after a delay of a second");
        assert_eq!(bucket.take(0, 2_000_000_000), Ok(()));
        let mut idle = Bucket::new(8_000_000_000, 0);
        assert_eq!(idle.take(1_000_000, 0), Ok(()));
        let (granted, _) = drain(&mut idle, 1_000_000_000);
        assert!(granted <= idle.burst + 10_000, "{granted} bytes after idleness");
    }

    #[test]
    fn whoever_is_never_taken_comes_less_and_less_often() {
        let pauses = |first, times| (0..times).map(|before| again(0, first, 8_000_000, before)).collect::<Vec<_>>();
        assert_eq!(pauses(10_000, 4), [10_000, 20_000, 40_000, 80_000]);
        assert_eq!(again(0, 10_000, 8_000_000, u32::MAX), 8_000_000);
        // What the receiver asks for is the least.
        assert_eq!(pauses(20_480_000, 2), [20_480_000, 21_000_000]);
        // Long pauses from different times end at the same.
        assert_eq!(again(1, 10_000, 8_000_000, 30), again(900_000, 10_000, 8_000_000, 30));
        let mut now = 0;
        let tries = (0..).take_while(|before| {
            now = again(now, 10_000, 8_000_000, *before);
            now < 2_000_000_000
        });
        assert!(tries.count() < 300);
    }

    #[test]
    fn a_request_larger_than_the_burst_passes_and_is_paid_for() {
        let mut bucket = Bucket::new(8_000_000, 0);
        assert_eq!(bucket.take(1_000_000, 0), Ok(()));
        let at = bucket.take(1, 0).unwrap_err();
        assert!((980_000_000..=1_000_000_000).contains(&at), "next at {at} ns");
    }

    #[test]
    fn without_policy_the_link_is_shared_by_queue_pair() {
        assert_eq!(window(1_000_000_000, None, Class::None, false).bytes, None);
    }

    #[test]
    fn windows_follow_weights() {
        let bytes = |weight| window(10_000_000_000, Some(weight), Class::Bulk, false).bytes.unwrap();
        assert_eq!(bytes(300), 3 * bytes(100));
    }

    #[test]
    fn bulk_shrinks_while_a_latency_container_is_about() {
        let calm = window(10_000_000_000, Some(100), Class::Bulk, false).bytes.unwrap();
        let about = window(10_000_000_000, Some(100), Class::Bulk, true).bytes.unwrap();
        assert_eq!(about, calm / 5);
    }

    #[test]
    fn a_late_reservation_within_the_slack_costs_no_bandwidth() {
        // 1000 bytes at 8 Gbit/s take 1 µs.
        assert_eq!(finish(10_000, 10_500, 1_000, 1_000, 8_000_000_000), 11_000);
        assert_eq!(finish(10_000, 20_000, 1_000, 1_000, 8_000_000_000), 20_000);
    }
}
