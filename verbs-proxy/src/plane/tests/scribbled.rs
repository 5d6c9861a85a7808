//! Send rings that another thread of the container scribbles on while the worker takes the short way: what it has scribbled goes, as
//! far as a library could have asked for it, and nothing that no request may reach is read or written.

use super::fuzzing::{LENGTH, guarded, is_untouched, shaping};
use super::grants::Scene;
use super::*;
use ringfence_protocol::layout::CqHeader;
use ringfence_protocol::ring::Slot;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Of a request's number: it was written over the one that was posted.
const SCRIBBLED: u64 = 1 << 63;
/// Requests that are to have gone the short way with what was scribbled.
const ENOUGH: usize = 200;
/// Bursts after which they will not come any more.
const PATIENCE: usize = 5_000;
/// Requests of a burst.
const BURST: u32 = 8;

/// Scribbles on a ring until it is told to stop, and counts the words.
struct Scribbler<'a> {
    slots: &'a [Slot],
    key: u32,
    written: AtomicU64,
    /// It writes now.
    runs: AtomicBool,
    stop: AtomicBool,
}

impl Scribbler<'_> {
    fn run(&self) {
        let mut random = 0x5eed_1234_5678_9abcu64;
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        while !self.stop.load(Ordering::Relaxed) {
            if !self.runs.load(Ordering::Relaxed) {
                std::thread::yield_now();
                continue;
            }
            let (choice, value) = (next(), next());
            let slot = &self.slots[choice as usize % self.slots.len()];
            let near = IOVA.wrapping_sub(64).wrapping_add(value % (LENGTH as u64 + 128));
            match choice >> 32 & 1023 {
                // Anything: the stamp, the opcode, a key, a length.
                0..2 => slot.scribble(choice as usize >> 40 & 7, value),
                2..100 => slot.scribble(2, near),
                100..200 => slot.scribble(4, near),
                // The length and the key of what is here.
                200..300 => slot.scribble(5, (value % 64) | (u64::from(self.key) << 32)),
                _ => slot.scribble(0, value | SCRIBBLED),
            }
            self.written.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Has it go on, and waits until there are some words more than now.
    fn go_on(&self) {
        self.runs.store(true, Ordering::Relaxed);
        let before = self.written.load(Ordering::Relaxed);
        while self.written.load(Ordering::Relaxed) < before + 4 * u64::from(SLOTS) {
            std::thread::yield_now();
        }
    }
}

/// What a world of two queue pairs is to this test.
trait Ends {
    /// The container that posts, and its queue pair.
    fn own(&mut self) -> (&mut Rig, &mut RigQp);
    /// The key of the memory that it reaches.
    fn rkey(&self) -> u32;
    /// One turn of everybody.
    fn turn(&mut self);
    /// Both queue pairs begin anew.
    fn renew(&mut self);
}

/// One container.
struct Alone(Rig, RigQp, RigQp);

impl Ends for Alone {
    fn own(&mut self) -> (&mut Rig, &mut RigQp) {
        (&mut self.0, &mut self.1)
    }

    fn rkey(&self) -> u32 {
        self.0.key
    }

    fn turn(&mut self) {
        self.0.plane.now += 1_000;
        self.0.plane.activate(self.1.queue);
        self.0.plane.turn();
        drop(self.0.plane.take_notices());
    }

    fn renew(&mut self) {
        let Self(rig, a, b) = self;
        for (qp, peer) in [(&*a, b.number), (&*b, a.number)] {
            rig.modify(qp, QpState::RESET, 0, QpAttr::default(), None);
            rig.ready(qp, peer, Destination::Own);
        }
    }
}

impl Ends for Scene {
    fn own(&mut self) -> (&mut Rig, &mut RigQp) {
        (&mut self.two.rigs[0], &mut self.a)
    }

    fn rkey(&self) -> u32 {
        self.two.rigs[1].key
    }

    fn turn(&mut self) {
        self.two.rigs[0].plane.activate(self.a.queue);
        for wish in self.two.some_turns() {
            let _ = self.grant(wish);
        }
    }

    fn renew(&mut self) {
        for (index, port) in [(0, 2), (1, 1)] {
            let (qp, peer) = [(&self.a, self.b.number), (&self.b, self.a.number)][index];
            self.two.rigs[index].modify(qp, QpState::RESET, 0, QpAttr::default(), None);
            self.two.rigs[index].ready(qp, peer, Destination::Port(port));
        }
    }
}

/// Posts bursts while somebody scribbles, until enough of what he wrote has gone the short way.
fn scribbled(ends: &mut impl Ends) {
    let (rig, qp) = ends.own();
    let mapping = Arc::clone(&qp._mapping);
    let slots = crate::shared::ring_slots(&mapping, RINGS_OFFSET, SLOTS);
    let scribbler = Scribbler {
        slots,
        key: rig.key,
        written: AtomicU64::new(0),
        runs: AtomicBool::new(false),
        stop: AtomicBool::new(false),
    };
    std::thread::scope(|scope| {
        scope.spawn(|| scribbler.run());
        // Whatever fails here, the other thread must end for it to be said.
        let came = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| count(ends, &scribbler)));
        scribbler.stop.store(true, Ordering::Relaxed);
        match came {
            Ok(gone) => assert!(gone >= ENOUGH, "{gone} requests that were scribbled on went the short way"),
            Err(failure) => std::panic::resume_unwind(failure),
        }
    });
}

fn count(ends: &mut impl Ends, scribbler: &Scribbler<'_>) -> usize {
    const OPCODES: [Opcode; 4] = [Opcode::RDMA_WRITE, Opcode::RDMA_READ, Opcode::FETCH_AND_ADD, Opcode::RDMA_WRITE];
    let mut gone = 0;
    warm(ends);
    for burst in 0..PATIENCE {
        if gone >= ENOUGH {
            break;
        }
        let rkey = ends.rkey();
        let (rig, qp) = ends.own();
        let fields = SendFields { rkey, ..rig.fields(OPCODES[burst % 4], 0, 64, 8) };
        (0..BURST).for_each(|_| post(qp, &fields));
        scribbler.go_on();
        let before = ends.own().0.plane.device.went_short;
        ends.turn();
        scribbler.runs.store(false, Ordering::Relaxed);
        let (rig, qp) = ends.own();
        let short = rig.plane.device.went_short - before;
        let list = rig.completions();
        rig._cq.header::<CqHeader>(0).set_consumed(rig.completions.position());
        let is_scribbled = |done: &&Completion| done.wr_id & SCRIBBLED != 0 && done.status == WcStatus::SUCCESS;
        // Where nothing has gone the long way all completions are of requests that went the short one.
        if short >= list.len() {
            gone += list.iter().filter(is_scribbled).count();
        }
        // A stamp that was lost, or an error: the container begins anew.
        let plane = rig.plane.qps[qp.queue as usize].as_ref().unwrap();
        if plane.state != QpState::RTS || plane.send.position() != qp.send.position() {
            (0..3).for_each(|_| ends.turn());
            ends.renew();
            warm(ends);
        }
    }
    gone
}

/// Requests of each kind go, until they go the short way.
fn warm(ends: &mut impl Ends) {
    for opcode in [Opcode::RDMA_WRITE, Opcode::RDMA_READ] {
        let before = ends.own().0.plane.device.went_short;
        for _ in 0..100 {
            if ends.own().0.plane.device.went_short > before {
                break;
            }
            let rkey = ends.rkey();
            let (rig, qp) = ends.own();
            let fields = SendFields { rkey, ..rig.fields(opcode, 0, 64, 8) };
            post(qp, &fields);
            (0..8).for_each(|_| ends.turn());
        }
    }
    let (rig, _) = ends.own();
    rig.completions();
    rig._cq.header::<CqHeader>(0).set_consumed(rig.completions.position());
}

#[test]
fn within_a_container_nothing_else_is_reached() {
    for choice in 0..3 {
        let mut rig = guarded(shaping(choice));
        let (a, b) = rig.pair();
        let mut ends = Alone(rig, a, b);
        scribbled(&mut ends);
        is_untouched(&ends.0);
    }
}

#[test]
fn by_grants_nothing_else_is_reached() {
    let mut scene = Scene::with(guarded(shaping(0)), guarded(shaping(0)));
    scribbled(&mut scene);
    scene.two.rigs.iter().for_each(is_untouched);
}
