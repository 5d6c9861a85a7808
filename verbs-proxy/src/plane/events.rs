//! Events on completion channels: sent when they are due, and again later where there was no room.

use super::cq::CqIndex;
use super::{CqEntry, Plane};
use crate::device::Device;
use crate::pacing::Nanos;
use crate::worker::now;
use std::collections::VecDeque;
use std::sync::Arc;

/// Between two tries: the first, and the longest. The container decides how many channels are full, and reads when it likes.
const FIRST_PAUSE: Nanos = 500_000;
const LONGEST_PAUSE: Nanos = 16_000_000;

/// Completion queues that owe an event, in the order in which the events were due.
#[derive(Debug, Default)]
pub(crate) struct Owed {
    queues: VecDeque<CqIndex>,
    at: Nanos,
    pause: Nanos,
}

impl Owed {
    #[inline(always)]
    pub(crate) fn any(&self) -> bool {
        !self.queues.is_empty()
    }

    /// When to try again.
    pub(crate) fn at(&self) -> Option<Nanos> {
        self.any().then_some(self.at)
    }
}

impl<D: Device> Plane<D> {
    /// Sends what is due for the completions of this turn.
    pub(crate) fn notify(&mut self) {
        let Self { touched, cqs, owed, .. } = self;
        // In the order of the completions: queues may share a channel.
        for index in touched.drain(..) {
            // What shares a channel with an event that is owed goes behind it.
            let wait = owed.queues.iter().any(|other| share_channel(cqs, *other, index));
            if let Some(entry) = &mut cqs[index.0]
                && !entry.cq.notify(wait)
            {
                if owed.queues.is_empty() {
                    owed.pause = FIRST_PAUSE;
                    owed.at = now() + owed.pause;
                }
                owed.queues.push_back(index);
            }
        }
    }

    /// Tries again to send what is owed, if it is time. True if something was sent.
    pub(crate) fn settle_events(&mut self) -> bool {
        let Self { cqs, owed, .. } = self;
        if !owed.any() || self.now < owed.at {
            return false;
        }
        let mut full = Vec::new();
        let mut sent = false;
        for _ in 0..owed.queues.len() {
            let Some(index) = owed.queues.pop_front() else { break };
            let Some(Some(entry)) = cqs.get_mut(index.0) else { continue };
            let channel = entry.cq.channel().map(Arc::as_ptr);
            if !full.contains(&channel) && entry.cq.settle() {
                sent = true;
                continue;
            }
            full.push(channel);
            owed.queues.push_back(index);
        }
        owed.pause = if sent { FIRST_PAUSE } else { (2 * owed.pause).min(LONGEST_PAUSE) };
        owed.at = self.now + owed.pause;
        sent
    }

    /// Takes a completion queue out, with the event that it may owe.
    pub fn remove_cq(&mut self, index: CqIndex) -> Option<Box<CqEntry>> {
        self.owed.queues.retain(|other| *other != index);
        self.cqs.get_mut(index.0)?.take()
    }
}

fn share_channel(cqs: &[Option<Box<CqEntry>>], a: CqIndex, b: CqIndex) -> bool {
    let channel = |index: CqIndex| cqs.get(index.0)?.as_ref()?.cq.channel();
    channel(a).zip(channel(b)).is_some_and(|(a, b)| Arc::ptr_eq(a, b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::soft::{Plane, Soft};
    use crate::memory::RegionTable;
    use crate::plane::channel::{Channel, event_sockets};
    use crate::plane::cq::Cq;
    use crate::plane::qp::Owner;
    use crate::shared::{Mapping, PAGE, SealedFile};
    use crate::stats::Counters;
    use ringfence_protocol::layout::{Arm, CqHeader, cq_bytes};
    use rustix::net::{RecvFlags, recv};

    #[test]
    fn events_without_room_come_later_and_in_order() {
        let mapping = |bytes| Arc::new(Mapping::of(&SealedFile::create("test", bytes).unwrap()).unwrap());
        let policy = ringfence_sched::Policy::default();
        let (regions, tally) = (RegionTable::alone(1).0, Counters::private().unwrap().tally);
        let mut plane = Plane::new(mapping(PAGE).header(0), regions, &policy, tally, Soft::default(), 0);
        let (ours, theirs) = event_sockets().unwrap();
        let channel = Arc::new(Channel::new(ours));
        let owner = Owner { connection: 1, context: 1 };
        let rings = [mapping(cq_bytes(64)), mapping(cq_bytes(64))];
        for (ring, cookie) in rings.iter().zip([7, 8]) {
            let cq = Cq::new(Arc::clone(ring), 64, Some(Arc::clone(&channel)), cookie);
            plane.cqs.push(Some(Box::new(CqEntry { cq, owner })));
        }
        let due = |plane: &mut Plane, index: usize| {
            rings[index].header::<CqHeader>(0).arm(Arm::Any);
            plane.touched.push(CqIndex(index));
            plane.notify();
        };
        let next = || {
            let mut cookie = [0; 8];
            recv(&theirs, &mut cookie, RecvFlags::DONTWAIT).ok().map(|_| u64::from_ne_bytes(cookie))
        };
        let mut sent = 0;
        while !plane.owed.any() {
            due(&mut plane, 0);
            sent += 1;
        }
        due(&mut plane, 1);
        // One more of a queue that owes one is the same event.
        due(&mut plane, 0);
        assert_eq!(plane.owed.queues, [CqIndex(0), CqIndex(1)]);
        plane.now = plane.owed.at;
        assert!(!plane.settle_events(), "there still is no room");
        assert!(plane.owed.pause > FIRST_PAUSE);
        for _ in 1..sent {
            assert_eq!(next(), Some(7));
        }
        // There is room now, but not before what is owed.
        due(&mut plane, 1);
        assert_eq!(next(), None);
        plane.now = plane.wake_at().unwrap();
        assert!(plane.settle_events());
        assert_eq!([next(), next(), next()], [Some(7), Some(8), None]);
        assert!(!plane.owed.any());
    }
}
