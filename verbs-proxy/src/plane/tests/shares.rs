//! Containers on one modelled link, each with its own plane: what part of it they get. Time is the tests'.

use super::*;
use ringfence_sched::{HEADERS, Weight};
use std::path::Path;

/// Pieces are of 1 KiB on this link.
const LINK: u64 = 200_000_000;
const LARGE: u32 = 29 << 10;

/// What an application keeps outstanding in a queue pair.
const DEPTH: u32 = 32;

/// A container that keeps two queue pairs full of requests of one size, each to the other.
struct Sender {
    rig: Rig,
    pair: [RigQp; 2],
    posted: [u32; 2],
    bytes: u32,
}

impl Sender {
    fn new(clock: &Path, weight: u32, class: Class, bytes: u32) -> Self {
        let policy = Policy { weight: Weight::new(weight), class, ..Policy::default() };
        let clock = WireClock::open(clock).unwrap();
        let mut rig = Rig::shaped(&policy, BitRate::new(LINK).map(|rate| (clock, rate)));
        let (a, b) = rig.pair();
        Self { rig, pair: [a, b], posted: [0; 2], bytes }
    }

    /// Requests of each queue pair that have been executed.
    fn executed(&self) -> [u32; 2] {
        [1, 0].map(|other: usize| self.rig.plane.qps[other].as_ref().unwrap().device.responder.sequence.0)
    }

    /// The application looks, and the worker wakes up.
    fn turn(&mut self) {
        let executed = self.executed();
        for (index, qp) in self.pair.iter_mut().enumerate() {
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
        let [a, b] = self.executed().map(u64::from);
        (a + b) * (u64::from(self.bytes) + u64::from(self.bytes.div_ceil(1024)) * HEADERS.0)
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
        let first = Sender::new(&clock, weights[0], Class::Latency, urgent);
        let (found, used) = compete([first, Sender::new(&clock, weights[1], class, size)]);
        let due = f64::from(weights[0]) / f64::from(weights[0] + weights[1]);
        assert!((found / due - 1.0).abs() < 0.03, "{weights:?} {class:?}: {found:.4} of the link instead of {due}");
        assert!((0.98..1.02).contains(&used), "{used:.4} of the link used");
    }
}
