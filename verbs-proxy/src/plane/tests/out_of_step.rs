//! A device of another kind behind the same plane: it completes late, in another order than it was asked in, with errors, or not
//! at all, it refuses pieces, and it keeps what is void until it is done with that.

mod device;

use super::*;
use device::{OutOfStep, charged};
use proptest::prelude::*;
use ringfence_protocol::layout::CqHeader;
use std::collections::VecDeque;

type Bench = Rig<OutOfStep>;

/// Queue pairs, each of which sends to nobody in particular: the device does not ask.
const QUEUES: usize = 4;

#[derive(Clone, Copy, Debug)]
struct Request {
    opcode: Opcode,
    bytes: u32,
    signaled: bool,
    fence: bool,
    /// The local key is none.
    bad: bool,
}

#[derive(Clone, Debug)]
enum Step {
    Post(usize, Vec<Request>),
    /// Turns, and nanoseconds before each.
    Turns(u8, u32),
    Fail(usize),
    Reset(usize),
    /// Destroyed, and another is made under the same numbers.
    Remake(usize),
    /// No new requests are claimed, or are again.
    Drain(usize),
    Resume(usize),
}

fn request() -> impl Strategy<Value = Request> {
    let opcode = prop_oneof![
        4 => Just(Opcode::RDMA_WRITE),
        2 => Just(Opcode::SEND),
        2 => Just(Opcode::RDMA_READ),
        1 => Just(Opcode::FETCH_AND_ADD),
    ];
    let bytes = prop_oneof![Just(0u32), 1u32..64, 1u32..100_000];
    (opcode, bytes, any::<bool>(), 0u8..8, 0u8..60).prop_map(|(opcode, bytes, signaled, fence, bad)| Request {
        opcode,
        bytes: if opcode == Opcode::FETCH_AND_ADD { 8 } else { bytes },
        signaled,
        fence: fence == 0,
        bad: bad == 0,
    })
}

fn step() -> impl Strategy<Value = Step> {
    let queue = 0..QUEUES;
    prop_oneof![
        8 => (queue.clone(), prop::collection::vec(request(), 1..12)).prop_map(|(queue, list)| Step::Post(queue, list)),
        8 => (1u8..20, 1u32..200_000).prop_map(|(turns, nanos)| Step::Turns(turns, nanos)),
        1 => queue.clone().prop_map(Step::Fail),
        1 => queue.clone().prop_map(Step::Reset),
        1 => queue.clone().prop_map(Step::Remake),
        1 => queue.clone().prop_map(Step::Drain),
        1 => queue.prop_map(Step::Resume),
    ]
}

/// Policies, and whether there is a link.
fn shape() -> impl Strategy<Value = (Policy, Option<BitRate>)> {
    let cap = Policy { bandwidth: BitRate::new(8_000_000_000), ops: OpRate::new(1_000_000), ..Policy::default() };
    let policy =
        prop_oneof![Just(Policy::default()), Just(cap), Just(BULK), Just(Policy { class: Class::Latency, ..cap }),];
    (policy, any::<bool>()).prop_map(|(policy, link)| (policy, BitRate::new(10_000_000_000).filter(|_| link)))
}

/// What one queue pair is owed since it was made or reset.
#[derive(Debug, Default)]
struct Owed {
    /// Identifier and whether it is signaled, oldest first.
    requests: VecDeque<(u64, bool)>,
    /// A completion had an error.
    failed: bool,
}

struct Scene {
    bench: Bench,
    qps: Vec<RigQp>,
    owed: Vec<Owed>,
    next_id: u64,
}

impl Scene {
    fn new((policy, link): (Policy, Option<BitRate>), seed: u64) -> Self {
        let mut bench =
            Rig::on(&policy, OutOfStep::new(link, policy.weight.is_none() && policy.class == Class::None, seed));
        let qps: Vec<RigQp> = (0..QUEUES as u32).map(|queue| bench.qp(queue, 100 + queue)).collect();
        qps.iter().for_each(|qp| bench.ready(qp, 7, ()));
        Self { bench, qps, owed: (0..QUEUES).map(|_| Owed::default()).collect(), next_id: 1 }
    }

    fn post(&mut self, queue: usize, request: Request) {
        // What the send queue was made for, and what the completion queue has room for.
        if self.owed[queue].requests.len() >= 12 {
            return;
        }
        let Request { opcode, bytes, signaled, fence, bad } = request;
        let flags = [(signaled, SendFlags::SIGNALED.0), (fence, SendFlags::FENCE.0)];
        let mut fields = SendFields {
            wr_id: self.next_id,
            flags: SendFlags(flags.iter().filter(|(is, _)| *is).map(|(_, flag)| flag).sum()),
            ..self.bench.fields(opcode, 0, 0, bytes)
        };
        if bad && bytes > 0 {
            fields.sge.lkey ^= 0x8000_0000;
        }
        post(&mut self.qps[queue], &fields);
        self.owed[queue].requests.push_back((self.next_id, signaled));
        self.bench.plane.device.ids.insert((self.qps[queue].queue, self.next_id), bytes);
        self.next_id += 1;
        self.bench.plane.activate(queue as u32);
    }

    /// True if there was work, as for a worker.
    fn turn(&mut self, nanos: u64) -> bool {
        self.bench.plane.now += nanos;
        let worked = self.bench.plane.turn();
        self.bench.plane.take_notices();
        let plane = &self.bench.plane;
        // What the device has and what the scheduler counts is the same at all times, whatever became of queue pairs.
        if plane.device.shared_link() {
            assert_eq!(plane.shaping.in_flight(), plane.device.in_flight());
        }
        let completions = self.bench.completions();
        self.bench._cq.header::<CqHeader>(0).set_consumed(self.bench.completions.position());
        for completion in completions {
            self.completed(&completion);
        }
        worked
    }

    fn completed(&mut self, completion: &Completion) {
        let queue = completion.cookie as usize;
        let owed = &mut self.owed[queue];
        loop {
            let Some((wr_id, signaled)) = owed.requests.pop_front() else { panic!("{completion:?} is not due") };
            if wr_id != completion.wr_id {
                // Unsignaled, and successful by then: nothing before an error is left out of the flush.
                assert!(!signaled && !owed.failed, "{wr_id} has not completed, but {completion:?}");
                continue;
            }
            let success = completion.status == WcStatus::SUCCESS;
            assert!(signaled || !success, "{completion:?} is of an unsignaled request");
            assert!(!owed.failed || completion.status == WcStatus::WR_FLUSH_ERR, "{completion:?} comes after an error");
            let device = &self.bench.plane.device;
            if success {
                let bytes = device.ids[&(queue as u32, wr_id)];
                assert_eq!(device.executed(queue as u32, wr_id), Some(bytes), "{completion:?}");
            } else {
                owed.failed = true;
            }
            if completion.status == WcStatus::WR_FLUSH_ERR {
                assert_eq!(
                    self.bench.plane.device.held_by(self.bench.plane.qps[queue].as_ref().unwrap()),
                    0,
                    "flushed while the device has something: {completion:?}"
                );
            }
            return;
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Post(queue, list) => list.into_iter().for_each(|request| self.post(queue, request)),
            Step::Turns(turns, nanos) => (0..turns).for_each(|_| _ = self.turn(nanos.into())),
            Step::Fail(queue) => self.bench.plane.to_error(queue as u32),
            Step::Reset(queue) => {
                self.owed[queue] = Owed::default();
                self.bench.modify(&self.qps[queue], QpState::RESET, 0, QpAttr::default(), None);
                self.bench.ready(&self.qps[queue], 7, ());
            }
            Step::Remake(queue) => {
                self.owed[queue] = Owed::default();
                drop(self.bench.plane.remove_qp(queue as u32));
                self.qps[queue] = self.bench.qp(queue as u32, 100 + queue as u32);
                self.bench.ready(&self.qps[queue], 7, ());
            }
            Step::Drain(queue) if self.state(queue) == QpState::RTS => {
                self.bench.modify(&self.qps[queue], QpState::SQD, 0, QpAttr::default(), None);
            }
            Step::Resume(queue) if self.state(queue) == QpState::SQD => {
                self.bench.modify(&self.qps[queue], QpState::RTS, 0, QpAttr::default(), None);
            }
            Step::Drain(_) | Step::Resume(_) => {}
        }
    }

    fn state(&self, queue: usize) -> QpState {
        self.bench.plane.qps[queue].as_ref().unwrap().state
    }

    /// Until nobody waits for anything.
    fn end(&mut self) {
        (0..QUEUES).for_each(|queue| self.take(Step::Resume(queue)));
        for _ in 0..100_000 {
            if self.turn(1_000) {
                continue;
            }
            if let Some(at) = self.bench.plane.wake_at() {
                self.bench.plane.now = self.bench.plane.now.max(at);
            } else if self.bench.plane.rest_all() {
                return;
            }
        }
        panic!("it never ends: {:?}", self.bench.plane);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn a_device_out_of_step_completes_everything_once_and_in_order(
        shape in shape(),
        seed in any::<u64>(),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut scene = Scene::new(shape, seed);
        for step in steps {
            scene.take(step);
        }
        scene.end();
        for (queue, owed) in scene.owed.iter().enumerate() {
            let left = owed.requests.iter().find(|(_, signaled)| *signaled || owed.failed);
            prop_assert_eq!(left, None, "queue pair {} has never completed this", queue);
        }
        let Bench { plane, .. } = &scene.bench;
        prop_assert_eq!(plane.shaping.in_flight(), 0);
        prop_assert!(!plane.shaping.any_parked());
        prop_assert_eq!(plane.device.in_flight(), 0);
        for qp in plane.qps.iter().flatten() {
            prop_assert_eq!((qp.in_flight, plane.device.held_of(qp.queue)), (0, 0));
            prop_assert!(qp.fetching == 0 || qp.state == QpState::ERR);
        }
    }

    /// Whatever the device makes of pieces, and how often it has them posted again, no more goes to it than the rate allows.
    #[test]
    fn a_rate_is_kept_whatever_the_device_does(seed in any::<u64>(), sizes in prop::collection::vec(5_000u32..100_000, 1..10)) {
        const RATE: u64 = 1_000_000_000;
        let policy = Policy { bandwidth: BitRate::new(RATE), ..Policy::default() };
        let mut scene = Scene::new((policy, None), seed);
        scene.bench.plane.device.reliable = true;
        let begin = scene.bench.plane.now;
        for round in 0..1_000 {
            for queue in 0..QUEUES {
                if scene.state(queue) == QpState::ERR && round % 10 == 0 {
                    scene.take(Step::Reset(queue));
                }
                let bytes = sizes[(round + queue) % sizes.len()];
                let write = Request { opcode: Opcode::RDMA_WRITE, bytes, signaled: true, fence: false, bad: false };
                scene.post(queue, write);
            }
            scene.turn(10_000);
        }
        let time = u128::from(scene.bench.plane.now - begin);
        let allowed = (u128::from(RATE) * time / 8 / 1_000_000_000) as u64;
        let posted: u64 = scene.bench.plane.device.posted.iter().map(|bytes| charged(*bytes)).sum();
        // A burst of a millisecond, and the debt of one piece.
        let slack = RATE / 8 / 1_000 + 128_000;
        prop_assert!(posted <= allowed + slack, "{posted} of {allowed} bytes");
        prop_assert!(posted >= allowed / 4, "{posted} of {allowed} bytes: next to nothing went");
    }
}

#[test]
fn a_device_that_has_what_a_failed_queue_pair_posted_holds_up_its_flush_and_no_other() {
    let mut scene = Scene::new((Policy::default(), None), 1);
    scene.bench.plane.device.patient = true;
    let write = Request { opcode: Opcode::RDMA_WRITE, bytes: 8, signaled: true, fence: false, bad: false };
    scene.post(0, write);
    scene.turn(1);
    assert_eq!(scene.bench.plane.device.held_of(0), 1);
    scene.take(Step::Fail(0));
    scene.take(Step::Fail(1));
    scene.post(1, write);
    for _ in 0..10 {
        scene.turn(1);
    }
    assert_eq!((scene.owed[0].failed, scene.owed[1].failed), (false, true));
    scene.bench.plane.device.patient = false;
    scene.end();
    assert!(scene.owed[0].failed && scene.owed[0].requests.is_empty());
    assert_eq!(scene.bench.plane.device.executed(0, 1), None, "it was void");
}
