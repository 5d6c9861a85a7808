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
//!
//! Urgent pieces have an account of their own, which nothing else of the container is charged to, and which counts at all times: as
//! long as there was less of them on the link than the window, more may go at once. So they wait for nothing while they ask
//! for no more than the share, and beyond that have what everybody has for its weight. The container's other pieces have
//! what is left of the window.

use crate::link::SLACK;
use crate::units::{BitRate, Bytes, Nanos, Weight};

/// Time of the link that a container of default weight may have on it.
pub const CALM: Nanos = Nanos::micros(100);
/// On slow links it has this much nevertheless: a few pieces are too coarse to be shared.
const LEAST: u64 = 6 << 10;
/// The same while a latency-class container is about: what others have on the link is what its requests wait for.
pub const ABOUT: Nanos = Nanos::micros(20);
/// On slow links that is this much, three pieces: of fewer, whoever has small ones would get too much.
const LEAST_ABOUT: u64 = 3 << 10;

/// What a container has on the link, and whether more may go.
#[derive(Clone, Debug)]
pub struct Window {
    link: BitRate,
    weight: Weight,
    /// Everything on the link, urgent pieces too; counted while the container wants more than fits.
    all: Account,
    /// Urgent pieces; counted at all times, so that what was not used is there for the next ones.
    urgent: Account,
    seen: Nanos,
    wants: bool,
    about: bool,
    size: u64,
    /// When the last piece left the link.
    left: Nanos,
    /// When last something of others' was found to have gone there since.
    others: Option<Nanos>,
    /// How long the link had had nothing to do when last looked at.
    late: Nanos,
}

/// What is on the link, and what was.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    /// Charged bytes.
    on_link: u64,
    /// Window less what was on the link, bytes times nanoseconds.
    missed: i128,
}

/// In this time an average that is off is mended.
const MEND: i128 = 1_000_000;
/// What was too much is not forgotten for longer than this.
const MEMORY: i128 = 1_000_000_000;

/// For so long a link that has nothing to do is left to those who have had too little of it and may not have woken up yet. Less
/// than [`SLACK`], so that nothing of the link is lost.
const GRACE: Nanos = Nanos::micros(100);
/// For so long others count as about after something of theirs was seen on the link.
const CONTENDED: Nanos = Nanos::millis(20);

impl Account {
    /// Adds up what was missed in this time, up to `most`.
    fn count(&mut self, size: u64, most: u64, time: Nanos) {
        let (size, most) = (i128::from(size), i128::from(most));
        let missed = self.missed + (size - i128::from(self.on_link)) * i128::from(time.0);
        self.missed = missed.clamp(-size * MEMORY, most * MEND);
    }

    /// Whether more may be on the link; `most`: whatever was missed.
    fn open(&self, size: u64, most: u64) -> bool {
        let allowed = (i128::from(size) + self.missed / MEND).min(i128::from(most));
        i128::from(self.on_link) < allowed
    }

    /// When that is so though nothing leaves before.
    fn opens_at(&self, size: u64, seen: Nanos) -> Option<Nanos> {
        let gain = i128::from(size) - i128::from(self.on_link);
        if gain <= 0 {
            return None;
        }
        // The least that makes the quotient, which is rounded towards zero, more than `-gain`.
        let needed = (1 - gain) * MEND;
        let wait = (needed - self.missed).max(0).unsigned_abs().div_ceil(gain.unsigned_abs());
        Some(seen.after(Nanos(u64::try_from(wait).unwrap_or(u64::MAX))))
    }
}

impl Window {
    /// Nothing is on the link, and nothing urgent was.
    #[must_use]
    pub fn new(link: BitRate, weight: Weight, now: Nanos) -> Self {
        let account = Account::default();
        let mut window = Self {
            link,
            weight,
            all: account,
            urgent: account,
            seen: now,
            wants: false,
            about: false,
            size: 0,
            left: now,
            others: None,
            late: Nanos(0),
        };
        window.size = window.bytes(CALM);
        window.urgent.missed = i128::from(window.size) * MEND;
        window
    }

    /// The window's size: a weight's part of the link for this time.
    fn bytes(&self, time: Nanos) -> u64 {
        let (weight, default) = (u64::from(self.weight.get()), u64::from(Weight::default().get()));
        let least = if time == CALM { LEAST } else { LEAST_ABOUT } * weight / default;
        (self.link.bytes_in(Nanos(time.0 * weight)).0 / default).max(least).max(1)
    }

    /// Data of one piece: so much that a window has twenty of them, within the bounds of what a device cuts.
    ///
    /// Whose window is full sends when a piece of its own leaves; whose window is smaller than a piece sends at any time, when
    /// half a piece of others has left already, and so waits less. That much it has too much: a fortieth. While a
    /// latency-class container is about, windows are shorter, and so are the pieces of those who weigh more.
    #[must_use]
    pub fn piece(&self) -> Bytes {
        let mut piece = self.bytes(CALM) / 20;
        if self.about {
            piece = piece.min(self.link.bytes_in(ABOUT).0 / 8);
        }
        Bytes(piece.clamp(1 << 10, crate::scheduler::DEVICE_PIECE.0))
    }

    /// Whether urgent pieces have had so much less than the share, up to `now`, that some more at once is no matter.
    #[must_use]
    pub fn has_credit(&self, now: Nanos) -> bool {
        let (calm, mut urgent) = (self.bytes(CALM), self.urgent);
        urgent.count(self.size, calm, now.since(self.seen));
        2 * urgent.missed > i128::from(calm) * MEND
    }

    /// Charged bytes on the link.
    #[must_use]
    pub fn on_link(&self) -> Bytes {
        Bytes(self.all.on_link)
    }

    /// Adds up what was missed until `now`.
    fn see(&mut self, now: Nanos) {
        let time = now.since(self.seen);
        self.seen = self.seen.max(now);
        self.urgent.count(self.size, self.bytes(CALM), time);
        if self.wants {
            self.all.count(self.size, self.size, time);
        }
    }

    /// Whether another piece may go now. `about`: a latency-class container is; `free_at`: when the link has nothing to do.
    ///
    /// On a link that has nothing to do whatever goes takes nothing from anybody, unless others are about. Then whoever has had
    /// too much waits a little nevertheless, or else it would depend on who wakes up first.
    pub fn open(&mut self, urgent: bool, about: bool, free_at: Nanos, now: Nanos) -> bool {
        self.see(now);
        self.about = about;
        self.size = self.bytes(if about { ABOUT } else { CALM });
        if self.all.on_link == 0 && free_at > self.left {
            self.others = Some(now);
        }
        let idle = free_at <= now;
        self.late = if idle { now.since(free_at).min(SLACK) } else { Nanos(0) };
        let contended = self.is_contended(now);
        let most = self.most(urgent);
        let account = if urgent { &mut self.urgent } else { &mut self.all };
        if idle && !contended {
            account.missed = account.missed.max(0);
            return true;
        }
        if free_at.after(GRACE) <= now {
            account.missed = account.missed.max(-2 * MEND * i128::from(self.size));
            return true;
        }
        let open = account.open(self.size, most);
        if urgent {
            return open;
        }
        // From the first refusal on the container wants more than fits.
        self.wants |= !open;
        open
    }

    /// What may be on the link at once, however much was missed.
    fn most(&self, urgent: bool) -> u64 {
        if urgent { self.bytes(CALM) } else { 2 * self.size }
    }

    /// Whether others have sent lately.
    fn is_contended(&self, now: Nanos) -> bool {
        self.others.is_some_and(|at| now.since(at) < CONTENDED)
    }

    /// When [`Self::open`] says yes though nothing arrives before; `None` if something must.
    #[must_use]
    pub fn opens_at(&self, urgent: bool, free_at: Nanos, now: Nanos) -> Option<Nanos> {
        let account = if urgent { &self.urgent } else { &self.all };
        // By what was missed more may be on the link than the window's size, which the account says nothing of.
        if account.open(self.size, self.most(urgent)) {
            return Some(now);
        }
        let grace = if self.is_contended(now) { GRACE } else { Nanos(0) };
        let idle = (self.all.on_link == 0).then_some(free_at.after(grace));
        idle.into_iter().chain(account.opens_at(self.size, self.seen)).min()
    }

    /// A piece goes; the link is charged this for it.
    pub fn sent(&mut self, charged: Bytes, urgent: bool, now: Nanos) {
        self.see(now);
        // Whoever waited has what the link did not do meanwhile: had it gone in time it would have been there since.
        let late = i128::from(charged.0) * i128::from(self.late.0);
        self.all.on_link = self.all.on_link.saturating_add(charged.0);
        if self.wants {
            self.all.missed -= late;
        }
        if urgent {
            if !self.has_credit(now) {
                self.urgent.missed -= late;
            }
            self.urgent.on_link = self.urgent.on_link.saturating_add(charged.0);
        }
    }

    /// A piece left the link at this time.
    pub fn arrived(&mut self, charged: Bytes, urgent: bool, at: Nanos) {
        self.see(at);
        self.left = self.left.max(at);
        self.all.on_link = self.all.on_link.saturating_sub(charged.0);
        if urgent {
            self.urgent.on_link = self.urgent.on_link.saturating_sub(charged.0);
        }
    }

    /// The container has nothing more to send that is not urgent: what it did not use is lost.
    pub fn content(&mut self, now: Nanos) {
        self.see(now);
        self.wants = false;
        self.all.missed = self.all.missed.min(0);
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
            while window.open(false, about, Nanos::NEVER, Nanos(0)) {
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
        while window.open(false, false, Nanos::NEVER, Nanos(0)) {
            window.sent(Bytes(16 << 10), false, Nanos(0));
        }
        assert!(window.open(true, false, Nanos::NEVER, Nanos(0)));
        // Nor have they more of the link than a window of their own.
        while window.open(true, false, Nanos::NEVER, Nanos(0)) {
            window.sent(Bytes(1000), true, Nanos(0));
        }
        assert_eq!(window.urgent.on_link, 125_000);
    }

    #[test]
    fn a_window_that_is_open_by_what_was_missed_says_so() {
        let mut window = window(10_000_000_000, 100);
        let mut by_credit = 0;
        while window.open(true, true, Nanos::NEVER, Nanos(0)) {
            by_credit += u32::from(window.urgent.on_link >= window.size);
            assert_eq!(window.opens_at(true, Nanos::NEVER, Nanos(0)), Some(Nanos(0)));
            window.sent(Bytes(1000), true, Nanos(0));
        }
        // Five windows' worth in all.
        assert_eq!(by_credit, 100);
        assert_eq!(window.opens_at(true, Nanos::NEVER, Nanos(0)), None);
    }

    #[test]
    fn urgent_pieces_beyond_the_share_have_a_window_as_the_others() {
        let mut window = window(10_000_000_000, 100);
        let (mut now, mut most) = (Nanos(0), 0);
        // All that goes stays for 50 µs.
        for _ in 0..2000 {
            let mut count = 0;
            while window.open(true, true, Nanos::NEVER, now) {
                window.sent(Bytes(1000), true, now);
                count += 1;
            }
            most = most.max(count);
            now = now.after(Nanos::micros(50));
            (0..count).for_each(|_| window.arrived(Bytes(1000), true, now));
        }
        assert_eq!(most, 125);
        assert!(
            (20..=30).contains(
                &(0..)
                    .take_while(|_| {
                        let open = window.open(true, true, Nanos::NEVER, now);
                        window.sent(Bytes(1000), true, now);
                        open
                    })
                    .count()
            )
        );
    }

    #[test]
    fn an_idle_link_takes_whatever_comes() {
        let mut window = window(10_000_000_000, 1);
        window.sent(Bytes(1 << 20), false, Nanos(0));
        assert!(!window.open(false, false, Nanos(2), Nanos(1)));
        assert!(window.open(false, false, Nanos(2), Nanos(2)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// A link on which everything stays for the same time: the average of what is on it is the window, and that of urgent
        /// pieces too.
        #[test]
        fn the_average_on_the_link_is_the_window(
            (urgent, about) in prop_oneof![Just((false, false)), Just((false, true)), Just((true, true))],
            weight in 1u32..=1000,
            sizes in prop::collection::vec(64u64..16_448, 1..20),
            delay in 20_000u64..5_000_000,
        ) {
            let mut window = window(10_000_000_000, weight);
            let (mut now, mut sizes) = (Nanos(0), sizes.into_iter().cycle());
            let mut flying = std::collections::VecDeque::new();
            let (mut area, mut measured) = (0i128, 0i128);
            for step in 0..20_000 {
                while window.open(urgent, about, Nanos::NEVER, now) {
                    let size = sizes.next().unwrap();
                    window.sent(Bytes(size), urgent, now);
                    flying.push_back((now.after(Nanos(delay)), size));
                    if flying.len() > 100_000 {
                        break;
                    }
                }
                let arrival: Option<Nanos> = flying.front().map(|(at, _)| *at);
                let next = [arrival, window.opens_at(urgent, Nanos::NEVER, now)].into_iter().flatten().min().unwrap().max(Nanos(now.0 + 1));
                if step > 5_000 {
                    area += i128::from(window.all.on_link) * i128::from(next.0 - now.0);
                    measured += i128::from(next.0 - now.0);
                }
                now = next;
                while let Some((at, size)) = flying.pop_front_if(|(at, _)| *at <= now) {
                    window.arrived(Bytes(size), urgent, at);
                }
            }
            let (average, due) = (area as f64 / measured as f64, window.size as f64);
            prop_assert!((average / due - 1.0).abs() < 0.03, "{average} instead of {due}");
        }
    }

    proptest! {
        #[test]
        fn it_opens_when_it_said_it_would(
            weight in 1u32..=1000,
            urgent: bool,
            charged in 64u64..1 << 20,
            stays in 0u64..10_000_000,
        ) {
            let mut window = window(1_000_000_000, weight);
            window.sent(Bytes(charged), urgent, Nanos(0));
            let _ = window.open(urgent, false, Nanos::NEVER, Nanos(0));
            window.arrived(Bytes(charged), urgent, Nanos(stays));
            if !window.open(urgent, false, Nanos::NEVER, Nanos(stays)) {
                let at = window.opens_at(urgent, Nanos::NEVER, Nanos(stays)).unwrap();
                prop_assert!(at > Nanos(stays));
                prop_assert!(window.clone().open(urgent, false, Nanos::NEVER, at));
            }
        }

        /// Whatever the container's other pieces have done, and whatever others have on the link: urgent ones of which there
        /// was less than the window go at once, as many as a calm window has.
        #[test]
        fn what_is_urgent_and_within_the_share_goes_at_once(
            weight in 1u32..=1000,
            steps in prop::collection::vec((64u64..1 << 20, 0u64..2_000_000, 1u64..90), 1..100),
        ) {
            let mut window = window(10_000_000_000, weight);
            let mut now = Nanos(0);
            for (bulk, stays, percent) in steps {
                let _ = window.open(false, true, Nanos::NEVER, now);
                window.sent(Bytes(bulk), false, now);
                // This much of the window, on average.
                let urgent = Bytes(window.bytes(ABOUT));
                let period = Nanos(stays * 100 / percent);
                prop_assert!(window.open(true, true, Nanos::NEVER, now), "{window:?}");
                window.sent(urgent, true, now);
                window.arrived(urgent, true, now.after(Nanos(stays)));
                window.arrived(Bytes(bulk), false, now.after(Nanos(stays)));
                now = now.after(period);
            }
        }

        /// Nothing is held against requests that come when the link has nothing to do.
        #[test]
        fn what_comes_late_by_itself_is_not_late(weight in 100u32..=1000, bytes in 64u64..4 << 10, times in 1u64..400) {
            let mut window = window(1_000_000_000, weight);
            let mut now = Nanos::millis(1);
            for _ in 0..times {
                let free_at = Nanos(now.0 - 500_000);
                prop_assert!(window.open(true, true, free_at, now));
                prop_assert!(window.has_credit(now));
                window.sent(Bytes(bytes), true, now);
                window.arrived(Bytes(bytes), true, now);
                now = now.after(Nanos::millis(1));
            }
        }

        /// A link that has nothing to do, among others: whoever has had too much lets them go first, for a while.
        #[test]
        fn whoever_had_too_much_waits_a_little(weight in 1u32..=1000, urgent: bool, much in 10_000_000u64..20_000_000) {
            let mut window = window(1_000_000_000, weight);
            window.wants = true;
            // Others are there, and leave behind it.
            let _ = window.open(urgent, true, Nanos(1), Nanos(0));
            window.sent(Bytes(much), urgent, Nanos(1));
            let left = Nanos::millis(10);
            window.arrived(Bytes(much), urgent, left);
            let free_at = left.after(Nanos(10));
            prop_assert!(!window.open(urgent, true, free_at, free_at));
            let at = window.opens_at(urgent, free_at, free_at).unwrap();
            prop_assert_eq!(at, free_at.after(GRACE));
            prop_assert!(window.open(urgent, true, free_at, at));
            // What the link does for it when nobody else wants it costs it two milliseconds of the others' at most.
            prop_assert!(window.open(urgent, true, Nanos::NEVER, at.after(Nanos::millis(3))));
        }
    }
}
