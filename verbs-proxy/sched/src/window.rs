//! How much a container may have on a link that others share.
//!
//! The link serves in order of arrival. All that is on it waits equally long, so a container's share of the link is its share
//! of what is on it (Little's law): containers that keep windows in proportion to their weights get shares in
//! proportion to their weights, whatever their number of queue pairs and the sizes of their requests; who has nothing to
//! send leaves no gap. What counts is what the link is charged, headers too.
//!
//! Pieces do not fit a window evenly, and a small weight's window is smaller than one piece. So what is kept equal to the
//! window is the *average* of what is on the link while the container wants more: too little for a while is followed by
//! too much, and the other way round.

use crate::units::{BitRate, Bytes, Nanos, Weight};

/// Time of the link that a container of default weight may have on it.
pub const CALM: Nanos = Nanos::micros(100);
/// On slow links it has this much nevertheless: a few pieces are too coarse to be shared.
const LEAST: u64 = 6 << 10;
/// The same while a latency-class container is about: what others have on the link is what its requests wait for.
pub const ABOUT: Nanos = Nanos::micros(20);

/// What a container has on the link, and whether more may go.
#[derive(Clone, Debug)]
pub struct Window {
    link: BitRate,
    weight: Weight,
    /// Charged bytes on the link, urgent ones too.
    on_link: u64,
    urgent: u64,
    /// Window less what was on the link, bytes times nanoseconds, since the container wants more than fits.
    missed: i128,
    seen: Nanos,
    wants: bool,
    size: u64,
}

/// In this time an average that is off is mended.
const MEND: i128 = 1_000_000;
/// What was too much is not forgotten for longer than this.
const MEMORY: i128 = 1_000_000_000;

impl Window {
    /// Nothing is on the link.
    #[must_use]
    pub fn new(link: BitRate, weight: Weight, now: Nanos) -> Self {
        let mut window = Self { link, weight, on_link: 0, urgent: 0, missed: 0, seen: now, wants: false, size: 0 };
        window.size = window.bytes(CALM);
        window
    }

    /// The window's size: a weight's part of the link for this time.
    fn bytes(&self, time: Nanos) -> u64 {
        let (weight, default) = (u64::from(self.weight.get()), u64::from(Weight::default().get()));
        let least = if time == CALM { LEAST * weight / default } else { 1 };
        (self.link.bytes_in(Nanos(time.0 * weight)).0 / default).max(least).max(1)
    }

    /// Data of one piece: so much that a window has twenty of them, within the bounds of what a device cuts.
    ///
    /// Whose window is full sends when a piece of its own leaves; whose window is smaller than a piece sends at any time, when
    /// half a piece of others has left already, and so waits less. That much it has too much: a fortieth. While a
    /// latency-class container is about pieces stay as they are: shorter ones would cost the worker more than they help.
    #[must_use]
    pub fn piece(&self) -> Bytes {
        let window = self.bytes(CALM);
        Bytes((window / 20).clamp(1 << 10, crate::scheduler::DEVICE_PIECE.0))
    }

    /// Charged bytes on the link.
    #[must_use]
    pub fn on_link(&self) -> Bytes {
        Bytes(self.on_link)
    }

    /// Adds up what was missed until `now`.
    fn see(&mut self, now: Nanos) {
        let time = i128::from(now.since(self.seen).0);
        self.seen = self.seen.max(now);
        if self.wants {
            let size = i128::from(self.size);
            let missed = self.missed + (size - i128::from(self.on_link)) * time;
            self.missed = missed.clamp(-size * MEMORY, size * MEND);
        }
    }

    /// Whether another piece may go now. `about`: a latency-class container is; `idle`: the link has nothing to do, so that
    /// whatever goes takes nothing from anybody.
    pub fn open(&mut self, urgent: bool, about: bool, idle: bool, now: Nanos) -> bool {
        self.see(now);
        self.size = self.bytes(if about { ABOUT } else { CALM });
        if urgent {
            return self.urgent < self.bytes(CALM);
        }
        if idle {
            self.missed = 0;
            return true;
        }
        let size = i128::from(self.size);
        let allowed = size + (self.missed / MEND).clamp(-size, size);
        let open = i128::from(self.on_link) < allowed;
        // From the first refusal on the container wants more than fits.
        self.wants |= !open;
        open
    }

    /// When [`Self::open`] says yes though nothing arrives before; `None` if something must.
    #[must_use]
    pub fn opens_at(&self) -> Option<Nanos> {
        let size = i128::from(self.size);
        let gain = size - i128::from(self.on_link);
        if gain <= 0 {
            return None;
        }
        // The least that makes the quotient, which is rounded towards zero, more than `-gain`.
        let needed = (1 - gain) * MEND;
        let wait = (needed - self.missed).max(0).unsigned_abs().div_ceil(gain.unsigned_abs());
        Some(self.seen.after(Nanos(u64::try_from(wait).unwrap_or(u64::MAX))))
    }

    /// A piece goes; the link is charged this for it.
    pub fn sent(&mut self, charged: Bytes, urgent: bool, now: Nanos) {
        self.see(now);
        self.on_link = self.on_link.saturating_add(charged.0);
        if urgent {
            self.urgent = self.urgent.saturating_add(charged.0);
        }
    }

    /// A piece left the link at this time.
    pub fn arrived(&mut self, charged: Bytes, urgent: bool, at: Nanos) {
        self.see(at);
        self.on_link = self.on_link.saturating_sub(charged.0);
        if urgent {
            self.urgent = self.urgent.saturating_sub(charged.0);
        }
    }

    /// The container has nothing more to send: what it did not use is lost.
    pub fn content(&mut self, now: Nanos) {
        self.see(now);
        self.wants = false;
        self.missed = self.missed.min(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn window(bits: u64, weight: u32) -> Window {
        Window::new(BitRate::new(bits).unwrap(), Weight::new(weight).unwrap(), Nanos(0))
    }

    #[test]
    fn windows_follow_weights() {
        let bytes = |weight| window(10_000_000_000, weight).bytes(CALM);
        assert_eq!(bytes(100), 125_000);
        assert_eq!(bytes(300), 3 * bytes(100));
        assert_eq!(bytes(1000), 1000 * bytes(1));
    }

    #[test]
    fn bulk_shrinks_while_a_latency_container_is_about() {
        let mut window = window(10_000_000_000, 100);
        let fill = |window: &mut Window, about| {
            let mut pieces = 0;
            while window.open(false, about, false, Nanos(0)) {
                window.sent(Bytes(1000), false, Nanos(0));
                pieces += 1;
            }
            (0..pieces).for_each(|_| window.arrived(Bytes(1000), false, Nanos(0)));
            pieces
        };
        assert_eq!(fill(&mut window, false), 125);
        assert_eq!(fill(&mut window, true), 25);
    }

    #[test]
    fn urgent_pieces_do_not_wait_for_the_container_s_own_bulk() {
        let mut window = window(10_000_000_000, 100);
        while window.open(false, false, false, Nanos(0)) {
            window.sent(Bytes(16 << 10), false, Nanos(0));
        }
        assert!(window.open(true, false, false, Nanos(0)));
        // Nor have they more of the link than a window of their own.
        while window.open(true, false, false, Nanos(0)) {
            window.sent(Bytes(1000), true, Nanos(0));
        }
        assert_eq!(window.urgent, 125_000);
    }

    #[test]
    fn an_idle_link_takes_whatever_comes() {
        let mut window = window(10_000_000_000, 1);
        window.sent(Bytes(1 << 20), false, Nanos(0));
        assert!(!window.open(false, false, false, Nanos(1)));
        assert!(window.open(false, false, true, Nanos(2)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// A link on which everything stays for the same time: the average of what is on it is the window.
        #[test]
        fn the_average_on_the_link_is_the_window(
            weight in 1u32..=1000,
            sizes in prop::collection::vec(64u64..16_448, 1..20),
            delay in 20_000u64..5_000_000,
        ) {
            let mut window = window(10_000_000_000, weight);
            let (mut now, mut sizes) = (Nanos(0), sizes.into_iter().cycle());
            let mut flying = std::collections::VecDeque::new();
            let (mut area, mut measured) = (0i128, 0i128);
            for step in 0..20_000 {
                while window.open(false, false, false, now) {
                    let size = sizes.next().unwrap();
                    window.sent(Bytes(size), false, now);
                    flying.push_back((now.after(Nanos(delay)), size));
                    if flying.len() > 100_000 {
                        break;
                    }
                }
                let arrival: Option<Nanos> = flying.front().map(|(at, _)| *at);
                let next = [arrival, window.opens_at()].into_iter().flatten().min().unwrap().max(Nanos(now.0 + 1));
                if step > 5_000 {
                    area += i128::from(window.on_link) * i128::from(next.0 - now.0);
                    measured += i128::from(next.0 - now.0);
                }
                now = next;
                while let Some((at, size)) = flying.pop_front_if(|(at, _)| *at <= now) {
                    window.arrived(Bytes(size), false, at);
                }
            }
            let (average, due) = (area as f64 / measured as f64, window.bytes(CALM) as f64);
            prop_assert!((average / due - 1.0).abs() < 0.03, "{average} instead of {due}");
        }
    }

    proptest! {
        #[test]
        fn it_opens_when_it_said_it_would(
            weight in 1u32..=1000,
            charged in 64u64..1 << 20,
            stays in 0u64..10_000_000,
        ) {
            let mut window = window(1_000_000_000, weight);
            window.sent(Bytes(charged), false, Nanos(0));
            let _ = window.open(false, false, false, Nanos(0));
            window.arrived(Bytes(charged), false, Nanos(stays));
            if !window.open(false, false, false, Nanos(stays)) {
                let at = window.opens_at().unwrap();
                prop_assert!(at > Nanos(stays));
                prop_assert!(window.clone().open(false, false, false, at));
            }
        }
    }
}
