//! Containers on one modelled link, each with its own plane: what part of it they get. Time is the tests'.

use super::*;
use ringfence_sched::{HEADERS, Weight};
use std::path::Path;

/// Pieces are of 1 KiB on this link.
const LINK: u64 = 200_000_000;
const LARGE: u32 = 29 << 10;

/// What an application keeps outstanding in a queue pair.
const DEPTH: u32 = 32;

/// A container that keeps its queue pairs full of requests of one size, each of two to the other.
struct Sender {
    rig: Rig,
    qps: Vec<RigQp>,
    posted: Vec<u32>,
    bytes: u32,
}

impl Sender {
    fn new(clock: &Path, weight: u32, class: Class, bytes: u32, qps: u32) -> Self {
        let policy = Policy { weight: Weight::new(weight), class, ..Policy::default() };
        let clock = WireClock::open(clock).unwrap();
        let mut rig = Rig::shaped(&policy, BitRate::new(LINK).map(|rate| (clock, rate)));
        let qps: Vec<_> = (0..qps).map(|queue| rig.qp(queue, 100 + queue)).collect();
        qps.iter().for_each(|qp| rig.ready(qp, 100 + (qp.queue ^ 1), Destination::Own));
        Self { rig, posted: vec![0; qps.len()], qps, bytes }
    }

    /// Requests of each queue pair that have been executed.
    fn executed(&self) -> Vec<u32> {
        let by_other =
            |qp: &RigQp| self.rig.plane.qps[qp.queue as usize ^ 1].as_ref().unwrap().device.responder.sequence.0;
        self.qps.iter().map(by_other).collect()
    }

    /// The application looks, and the worker wakes up.
    fn turn(&mut self) {
        let executed = self.executed();
        for (index, qp) in self.qps.iter_mut().enumerate() {
            while self.posted[index] < executed[index] + DEPTH {
                let fields = self.rig.fields(Opcode::RDMA_WRITE, 0, 100_000, self.bytes);
                post(qp, &SendFields { flags: SendFlags(0), ..fields });
                self.posted[index] += 1;
            }
            self.rig.plane.activate(qp.queue);
        }
        self.rig.plane.turn();
    }

    /// What the link was charged for them.
    fn charged(&self) -> u64 {
        let pieces = u64::from(self.bytes.div_ceil(1024).max(1));
        self.executed().into_iter().map(u64::from).sum::<u64>() * (u64::from(self.bytes) + pieces * HEADERS.0)
    }
}

/// What part of the link the first has had, and what both together, once they have settled.
fn compete(mut senders: [Sender; 2]) -> (f64, f64) {
    const SETTLED: u64 = 200_000_000;
    const END: u64 = 2_200_000_000;
    let (mut random, mut before) = (0x9e37_79b9_7f4a_7c15u64, [0; 2]);
    loop {
        let next = usize::from(senders[1].rig.plane.now < senders[0].rig.plane.now);
        senders[next].turn();
        let now = senders[next].rig.plane.now;
        if now > END {
            break;
        }
        if now < SETTLED {
            before = [0, 1].map(|index: usize| senders[index].charged());
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // A worker that sleeps until then wakes up later than it wanted to.
        let wake = senders[next].rig.plane.wake_at().unwrap_or(now).clamp(now + 1_000, now + 100_000);
        senders[next].rig.plane.now = wake + random % 60_000;
    }
    let [first, second] = [0, 1].map(|index: usize| (senders[index].charged() - before[index]) as f64);
    (first / (first + second), (first + second) * 8e9 / (END - SETTLED) as f64 / LINK as f64)
}

#[test]
fn a_flood_of_urgent_requests_has_no_more_than_its_weights_share() {
    for (weights, urgent, class, size) in [
        ([100, 100], 64, Class::Bulk, LARGE),
        ([100, 300], 64, Class::Bulk, LARGE),
        ([300, 100], 512, Class::Bulk, LARGE),
        ([100, 300], 64, Class::Latency, 1024),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let clock = directory.path().join("clock");
        let first = Sender::new(&clock, weights[0], Class::Latency, urgent, 2);
        are_just([first, Sender::new(&clock, weights[1], class, size, 2)], weights);
    }
}

/// Headers are on the link, too.
#[test]
fn a_flood_of_empty_requests_by_many_queue_pairs_has_no_more_than_its_weights_share() {
    for (weights, qps) in [([100, 100], 32), ([300, 100], 64)] {
        let directory = tempfile::tempdir().unwrap();
        let clock = directory.path().join("clock");
        let flood = Sender::new(&clock, weights[0], Class::Bulk, 0, qps);
        are_just([flood, Sender::new(&clock, weights[1], Class::Bulk, LARGE, 2)], weights);
    }
}

/// What they have of the link is as their weights say, and all of it.
fn are_just(senders: [Sender; 2], weights: [u32; 2]) {
    let (found, used) = compete(senders);
    let due = f64::from(weights[0]) / f64::from(weights[0] + weights[1]);
    assert!((found / due - 1.0).abs() < 0.03, "{weights:?}: {found:.4} of the link instead of {due}");
    assert!((0.98..1.02).contains(&used), "{used:.4} of the link used");
}
