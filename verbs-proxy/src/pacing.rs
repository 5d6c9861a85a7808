//! Time as the proxy keeps it. What decides when something goes is `ringfence_sched`.

/// Nanoseconds on the monotonic clock.
pub type Nanos = u64;

/// The longest that a request is put off, unless it was told a longer time.
pub const LONGEST_PAUSE: Nanos = ringfence_sched::retry::LONGEST_PAUSE.0;
