//! Whose turn it is: deficit round robin over queue pairs, by bytes and by operations.
//!
//! Queue pairs wait in lanes. A lane is what one gate closes: the rate at which bytes may leave says nothing about fetching
//! some. Urgent lanes come before the others. Within a lane each queue pair has its turn, for a quantum of bytes or
//! of operations, whichever is spent first; what it takes beyond that is missing from its next turn. Of two lanes
//! that are open each has turns in proportion to how many queue pairs wait in it.

use crate::units::{Bytes, Ops};
use std::collections::VecDeque;

/// What a queue pair waits for with its next piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// To send, before everything else.
    UrgentOut,
    /// To fetch, before everything else.
    UrgentFetch,
    /// To send.
    Out,
    /// To fetch.
    Fetch,
}

impl Lane {
    /// How many there are.
    pub const COUNT: usize = 4;
    /// Those that come first, and those that come afterwards.
    pub const LEVELS: [[Self; 2]; 2] = [[Self::UrgentOut, Self::UrgentFetch], [Self::Out, Self::Fetch]];

    /// The lane of a piece.
    #[must_use]
    pub const fn of(urgent: bool, fetches: bool) -> Self {
        match (urgent, fetches) {
            (true, false) => Self::UrgentOut,
            (true, true) => Self::UrgentFetch,
            (false, false) => Self::Out,
            (false, true) => Self::Fetch,
        }
    }

    /// Whether it comes before the others.
    #[must_use]
    pub const fn is_urgent(self) -> bool {
        matches!(self, Self::UrgentOut | Self::UrgentFetch)
    }
}

/// How much a queue pair may send in one turn; `None`: what does not end a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantum {
    /// Bytes, headers among them. At least as much as a piece has, or else turns are passed over to pay for one.
    pub bytes: Option<Bytes>,
    /// Operations.
    pub ops: Option<Ops>,
}

/// The queue pairs that wait, and whose turn it is.
#[derive(Clone, Debug)]
pub struct Turns {
    quantum: Quantum,
    slots: Vec<Slot>,
    lanes: [Ring; Lane::COUNT],
    /// Over all lanes.
    members: u32,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    lane: Option<Lane>,
    /// Tells the newest entry in a ring from those that the queue pair has left behind.
    stamp: u32,
    /// It has been given the quantum of this turn.
    begun: bool,
    bytes: i64,
    ops: i64,
}

#[derive(Clone, Debug, Default)]
struct Ring {
    entries: VecDeque<(u32, u32)>,
    members: u32,
    /// Grows by [`ROUND`] with every round: the lane of a level that is behind comes first.
    progress: u64,
}

const ROUND: u64 = 1 << 20;

impl Turns {
    /// Nobody waits.
    #[must_use]
    pub fn new(quantum: Quantum) -> Self {
        Self { quantum, slots: Vec::new(), lanes: Default::default(), members: 0 }
    }

    /// Whether nobody waits.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members == 0
    }

    /// How many wait.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.members
    }

    /// Whether somebody waits in this lane.
    #[must_use]
    pub fn any_in(&self, lane: Lane) -> bool {
        self.lanes[lane as usize].members > 0
    }

    /// The lane that a queue pair waits in.
    #[must_use]
    pub fn lane_of(&self, queue: u32) -> Option<Lane> {
        self.slots.get(queue as usize)?.lane
    }

    /// A queue pair waits in this lane, behind all others; where it is already, it keeps its place.
    pub fn join(&mut self, queue: u32, lane: Lane) {
        if self.slots.len() <= queue as usize {
            self.slots.resize_with(queue as usize + 1, Slot::default);
        }
        if self.slots[queue as usize].lane == Some(lane) {
            return;
        }
        self.leave(queue);
        let slot = &mut self.slots[queue as usize];
        slot.lane = Some(lane);
        let ring = &mut self.lanes[lane as usize];
        ring.entries.push_back((queue, slot.stamp));
        ring.members += 1;
        self.members += 1;
        // Whoever joins and leaves all the time leaves entries behind; they never outnumber those that count.
        if ring.entries.len() > 2 * ring.members as usize + 16 {
            let slots = &self.slots;
            ring.entries.retain(|(queue, stamp)| slots[*queue as usize].stamp == *stamp);
        }
    }

    /// A queue pair waits no more. What it did not use is lost, what it took beyond its turn is still owed.
    pub fn leave(&mut self, queue: u32) {
        let Some(slot) = self.slots.get_mut(queue as usize) else { return };
        let Some(lane) = slot.lane.take() else { return };
        slot.stamp = slot.stamp.wrapping_add(1);
        slot.begun = false;
        (slot.bytes, slot.ops) = (slot.bytes.min(0), slot.ops.min(0));
        self.lanes[lane as usize].members -= 1;
        self.members -= 1;
    }

    /// A queue pair is gone; another may get its number and owes nothing.
    pub fn forget(&mut self, queue: u32) {
        self.leave(queue);
        if let Some(slot) = self.slots.get_mut(queue as usize) {
            (slot.bytes, slot.ops) = (0, 0);
        }
    }

    /// Whose turn it is in this lane.
    pub fn front(&mut self, lane: Lane) -> Option<u32> {
        let ring = &mut self.lanes[lane as usize];
        if ring.members == 0 {
            ring.entries.clear();
            return None;
        }
        while let Some((queue, stamp)) = ring.entries.front().copied() {
            let slot = &mut self.slots[queue as usize];
            if slot.stamp != stamp {
                ring.entries.pop_front();
                continue;
            }
            if slot.begun || slot.begin(self.quantum) {
                return Some(queue);
            }
            ring.next();
        }
        None
    }

    /// The lane of this level whose turn it is, of those that `open` says are open.
    pub fn choose(&mut self, level: [Lane; 2], open: impl Fn(Lane) -> bool) -> Option<Lane> {
        let [first, second] = level;
        let goes = |turns: &Self, lane: Lane| turns.any_in(lane) && open(lane);
        match (goes(self, first), goes(self, second)) {
            (true, true) => {
                let progress = |lane: Lane| self.lanes[lane as usize].progress;
                Some(if progress(first) <= progress(second) { first } else { second })
            }
            (false, false) => None,
            (one, _) => {
                // The other one has nothing to make up for.
                let (goes, waits) = if one { (first, second) } else { (second, first) };
                let progress = self.lanes[goes as usize].progress;
                let waits = &mut self.lanes[waits as usize].progress;
                *waits = progress.max(*waits);
                Some(goes)
            }
        }
    }

    /// A piece of a queue pair that waits goes. True if that ends its turn, and it waits again, behind the others.
    pub fn charge(&mut self, queue: u32, bytes: Bytes, ops: Ops) -> bool {
        let Some(slot) = self.slots.get_mut(queue as usize) else { return false };
        let Some(lane) = slot.lane else { return false };
        if self.quantum.bytes.is_some() {
            slot.bytes -= i64::try_from(bytes.0).unwrap_or(i64::MAX / 2);
        }
        if self.quantum.ops.is_some() {
            slot.ops -= i64::try_from(ops.0).unwrap_or(i64::MAX / 2);
        }
        if slot.begun && slot.may_go(self.quantum) {
            return false;
        }
        slot.begun = false;
        let stamp = slot.stamp;
        let ring = &mut self.lanes[lane as usize];
        if ring.entries.front() == Some(&(queue, stamp)) {
            ring.next();
        }
        true
    }
}

impl Slot {
    /// Gives it its quantum, and no more than that if it did not use the last one. False if that only pays for what it owes.
    fn begin(&mut self, quantum: Quantum) -> bool {
        let credit = |deficit: i64, quantum: u64| {
            let quantum = i64::try_from(quantum).unwrap_or(i64::MAX / 2);
            deficit.saturating_add(quantum).min(quantum)
        };
        if let Some(Bytes(bytes)) = quantum.bytes {
            self.bytes = credit(self.bytes, bytes.max(1));
        }
        if let Some(Ops(ops)) = quantum.ops {
            self.ops = credit(self.ops, ops.max(1));
        }
        self.begun = self.may_go(quantum);
        self.begun
    }

    fn may_go(&self, quantum: Quantum) -> bool {
        (quantum.bytes.is_none() || self.bytes > 0) && (quantum.ops.is_none() || self.ops > 0)
    }
}

impl Ring {
    /// The turn of the one in front is over.
    fn next(&mut self) {
        if let Some(entry) = self.entries.pop_front() {
            self.entries.push_back(entry);
            self.progress += ROUND / u64::from(self.members.max(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOTH: Quantum = Quantum { bytes: Some(Bytes(16 << 10)), ops: Some(Ops(32)) };

    /// Serves `count` pieces of the queue pairs, whose pieces have these sizes: bytes and operations of each.
    fn serve(turns: &mut Turns, sizes: &[u64], count: usize) -> Vec<(u64, u64)> {
        let mut served = vec![(0, 0); sizes.len()];
        for queue in 0..sizes.len() {
            turns.join(queue as u32, Lane::Out);
        }
        for _ in 0..count {
            let queue = turns.front(Lane::Out).expect("all wait");
            let bytes = sizes[queue as usize];
            turns.charge(queue, Bytes(bytes), Ops(1));
            served[queue as usize].0 += bytes;
            served[queue as usize].1 += 1;
        }
        served
    }

    proptest! {
        #[test]
        fn bytes_are_shared_whatever_the_sizes(sizes in prop::collection::vec(64u64..=16 << 10, 1..40), count in 1usize..4000) {
            let quantum = Quantum { ops: None, ..BOTH };
            let served = serve(&mut Turns::new(quantum), &sizes, count);
            let (least, most) = (served.iter().map(|of| of.0).min(), served.iter().map(|of| of.0).max());
            // Shreedhar and Varghese's bound: a quantum and two pieces.
            prop_assert!(most.unwrap() - least.unwrap() <= (16 << 10) + 2 * (16 << 10), "{served:?}");
        }

        #[test]
        fn operations_are_shared_whatever_the_sizes(sizes in prop::collection::vec(0u64..=1 << 20, 1..40), count in 1usize..4000) {
            let quantum = Quantum { bytes: None, ..BOTH };
            let served = serve(&mut Turns::new(quantum), &sizes, count);
            let (least, most) = (served.iter().map(|of| of.1).min(), served.iter().map(|of| of.1).max());
            prop_assert!(most.unwrap() - least.unwrap() <= 32 + 2, "{served:?}");
        }

        /// Each gets its quantum of one of the two: nobody with less than all others by more than a quantum and two pieces.
        #[test]
        fn whichever_is_spent_first_ends_a_turn(sizes in prop::collection::vec(0u64..=16 << 10, 1..40), count in 1usize..4000) {
            let served = serve(&mut Turns::new(BOTH), &sizes, count);
            let share = |(bytes, ops): &(u64, u64)| (bytes / 512).max(*ops);
            let (least, most) = (served.iter().map(share).min(), served.iter().map(share).max());
            prop_assert!(most.unwrap() - least.unwrap() <= 32 + 2 * 32 + 1, "{served:?}");
        }

        /// Any order of joining, leaving, serving and forgetting: whoever waits gets a turn within two rounds, whoever does
        /// not gets none, and what is kept is bounded.
        #[test]
        fn nobody_starves_and_nothing_grows(
            actions in prop::collection::vec((0u8..4, 0u32..20, 0u64..=16 << 10), 1..600),
        ) {
            let mut turns = Turns::new(BOTH);
            let mut waiting = std::collections::BTreeSet::new();
            for (action, queue, bytes) in actions {
                match action {
                    0 | 1 => {
                        turns.join(queue, Lane::Out);
                        waiting.insert(queue);
                    }
                    2 => {
                        turns.leave(queue);
                        waiting.remove(&queue);
                    }
                    _ => {
                        let front = turns.front(Lane::Out);
                        prop_assert_eq!(front.is_some(), !waiting.is_empty());
                        if let Some(front) = front {
                            prop_assert!(waiting.contains(&front));
                            turns.charge(front, Bytes(bytes), Ops(1));
                        }
                    }
                }
                prop_assert!(turns.lanes[Lane::Out as usize].entries.len() <= 2 * 20 + 17);
            }
            let mut served = std::collections::BTreeSet::new();
            for _ in 0..3 * waiting.len() {
                let front = turns.front(Lane::Out).unwrap();
                turns.charge(front, Bytes(16 << 10), Ops(1));
                served.insert(front);
            }
            prop_assert_eq!(served, waiting);
        }
    }

    #[test]
    fn an_empty_request_costs_an_operation() {
        let served = serve(&mut Turns::new(BOTH), &[0, 512], 32_000);
        assert_eq!(served[0].1, served[1].1);
    }

    #[test]
    fn idleness_loses_the_credit_and_keeps_the_debt() {
        let mut turns = Turns::new(BOTH);
        turns.join(0, Lane::Out);
        turns.join(1, Lane::Out);
        assert_eq!(turns.front(Lane::Out), Some(0));
        turns.charge(0, Bytes(48 << 10), Ops(1));
        turns.leave(0);
        turns.join(0, Lane::Out);
        // It owes two quanta: two turns of the other's come between.
        let mut order = Vec::new();
        for _ in 0..4 {
            let queue = turns.front(Lane::Out).unwrap();
            order.push(queue);
            turns.charge(queue, Bytes(16 << 10), Ops(1));
        }
        assert_eq!(order, [1, 1, 1, 0]);
        turns.forget(1);
        turns.join(1, Lane::Out);
        assert_eq!(turns.slots[1].bytes, 0);
    }

    #[test]
    fn two_open_lanes_have_turns_in_proportion_to_who_waits() {
        let mut turns = Turns::new(BOTH);
        for queue in 0..40 {
            turns.join(queue, if queue < 10 { Lane::Fetch } else { Lane::Out });
        }
        let mut served = [0; 40];
        for _ in 0..40_000 {
            let lane = turns.choose(Lane::LEVELS[1], |_| true).unwrap();
            let queue = turns.front(lane).unwrap();
            turns.charge(queue, Bytes(16 << 10), Ops(1));
            served[queue as usize] += 1;
        }
        assert!(served.iter().all(|turns| (980..=1020).contains(turns)), "{served:?}");
        // A lane that was closed does not make up for it.
        for _ in 0..1000 {
            let lane = turns.choose(Lane::LEVELS[1], |lane| lane == Lane::Out).unwrap();
            let queue = turns.front(lane).unwrap();
            turns.charge(queue, Bytes(16 << 10), Ops(1));
        }
        let fetches = (0..40).filter(|_| {
            let lane = turns.choose(Lane::LEVELS[1], |_| true).unwrap();
            let queue = turns.front(lane).unwrap();
            turns.charge(queue, Bytes(16 << 10), Ops(1));
            lane == Lane::Fetch
        });
        assert!((9..=12).contains(&fetches.count()));
    }

    #[test]
    fn thousands_that_wait_cost_no_more_for_each_decision() {
        let mut turns = Turns::new(BOTH);
        for queue in 0..4000 {
            turns.join(queue, Lane::Out);
        }
        // As many steps of the ring as turns: the ring's progress counts them.
        for _ in 0..40_000 {
            let queue = turns.front(Lane::Out).unwrap();
            turns.charge(queue, Bytes(16 << 10), Ops(1));
        }
        assert_eq!(turns.lanes[Lane::Out as usize].progress, 40_000 * (ROUND / 4000));
    }
}
