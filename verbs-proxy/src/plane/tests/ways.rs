//! The short way against the long one: the same programs on two worlds, one of which knows no short way, and nothing that anybody
//! could tell the difference by. And what each of them owes on its own: each signaled request completes once and in order, whatever
//! was posted to receive as well, and in the end nothing is held of any rate.

mod world;

use super::*;
use proptest::prelude::*;
use ringfence_sched::Bytes;
use ringfence_sched::scheduler::charged;
use world::World;

/// What is posted to a queue pair.
#[derive(Clone, Copy, Debug)]
struct Request {
    opcode: Opcode,
    local: u32,
    remote: u32,
    bytes: u32,
    flags: u8,
    wrong: Wrong,
}

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    LocalKey,
    RemoteKey,
    /// It ends behind the region.
    Range,
}

/// What happens to the world when everything has its answer, or when nothing has been looked at yet.
#[derive(Clone, Copy, Debug)]
enum Change {
    Nothing,
    Fail(usize),
    /// Back to RTS, with nothing of what it had.
    Reset(usize),
    ResetBoth,
    Drain(usize),
    Resume(usize),
    /// Remote rights, as `ibv_modify_qp` gives them.
    Access(usize, u32),
    /// The key word says that the container wants its region back, or again.
    Withdraw(usize),
    Restore(usize),
    /// `ibv_dereg_mr`, `ibv_reg_mr`.
    Deregister(usize),
    Register(usize),
    /// Destroyed, and made anew under the same numbers.
    Remake(usize),
    /// The neighbours' link ends, or there is another.
    Part,
    Join,
}

/// How much of a burst is done before the next change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    /// Nothing of it was looked at.
    Posted,
    /// What goes without waiting for anything has gone.
    Gone,
    /// Everything has its answer.
    Settled,
}

#[derive(Clone, Debug)]
struct Step {
    /// The end that posts.
    end: usize,
    /// Receive requests that the other has ready before.
    receives: Vec<(u32, u32)>,
    requests: Vec<Request>,
    until: Until,
    change: Change,
}

/// More would not go in one turn of the long way.
const MOST: usize = 12;

fn request() -> impl Strategy<Value = Request> {
    let opcode = prop_oneof![
        12 => Just(Opcode::RDMA_WRITE),
        6 => Just(Opcode::RDMA_READ),
        2 => Just(Opcode::FETCH_AND_ADD),
        2 => Just(Opcode::CMP_AND_SWP),
        1 => Just(Opcode::SEND),
        1 => Just(Opcode::RDMA_WRITE_WITH_IMM),
    ];
    let bytes = prop_oneof![1 => Just(0u32), 8 => 1u32..=32, 4 => 1u32..4096, 1 => 1u32..30_000];
    let wrong = prop_oneof![
        40 => Just(Wrong::Nothing),
        1 => Just(Wrong::LocalKey),
        1 => Just(Wrong::RemoteKey),
        1 => Just(Wrong::Range),
    ];
    let flags = (any::<bool>(), 0u8..6, 0u8..12, any::<bool>());
    (opcode, 0u32..60_000, 0u32..60_000, bytes, flags, wrong).prop_map(
        |(opcode, local, remote, bytes, flags, wrong)| {
            let (signaled, inline, fence, solicited) = flags;
            let atomic = matches!(opcode, Opcode::FETCH_AND_ADD | Opcode::CMP_AND_SWP);
            let fetches = atomic || opcode == Opcode::RDMA_READ;
            let inline = inline == 0 && bytes <= 32 && !fetches;
            let set = |is: bool, flag: SendFlags| if is { flag.0 } else { 0 };
            Request {
                opcode,
                local,
                remote: if atomic { remote & !7 } else { remote },
                bytes: if atomic { 8 } else { bytes },
                flags: set(signaled, SendFlags::SIGNALED)
                    | set(inline, SendFlags::INLINE)
                    | set(fence == 0, SendFlags::FENCE)
                    | set(solicited, SendFlags::SOLICITED),
                wrong,
            }
        },
    )
}

fn change() -> impl Strategy<Value = Change> {
    let end = 0usize..2;
    prop_oneof![
        12 => Just(Change::Nothing),
        1 => end.clone().prop_map(Change::Fail),
        1 => end.clone().prop_map(Change::Reset),
        4 => Just(Change::ResetBoth),
        1 => end.clone().prop_map(Change::Drain),
        2 => end.clone().prop_map(Change::Resume),
        2 => (end.clone(), prop_oneof![Just(ALL.0), 0u32..16]).prop_map(|(end, access)| Change::Access(end, access)),
        1 => end.clone().prop_map(Change::Withdraw),
        2 => end.clone().prop_map(Change::Restore),
        1 => end.clone().prop_map(Change::Deregister),
        2 => end.clone().prop_map(Change::Register),
        1 => end.prop_map(Change::Remake),
        1 => Just(Change::Part),
        2 => Just(Change::Join),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let receives = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec((0u32..60_000, 0u32..5_000), 1..4)];
    let until = prop_oneof![1 => Just(Until::Posted), 2 => Just(Until::Gone), 3 => Just(Until::Settled)];
    let requests = prop::collection::vec(request(), 0..MOST);
    (prop_oneof![3 => Just(0usize), 1 => Just(1)], receives, requests, until, change())
        .prop_map(|(end, receives, requests, until, change)| Step { end, receives, requests, until, change })
}

/// Rates that have much in hand, little, and none.
fn policy() -> impl Strategy<Value = Policy> {
    let cap = |bits, ops| Policy { bandwidth: BitRate::new(bits), ops: OpRate::new(ops), ..Policy::default() };
    let capped = cap(80_000_000_000, 1_000_000);
    prop_oneof![
        4 => Just(Policy::default()),
        1 => Just(cap(10_000_000_000_000, 1_000_000_000)),
        1 => Just(capped),
        1 => Just(Policy { fetching: BitRate::new(1_000_000_000), class: Class::Latency, ..capped }),
        1 => Just(Policy { fetching: BitRate::new(1_000_000_000), class: Class::Ops, ..capped }),
        1 => Just(Policy { fetching: BitRate::new(1_000_000_000), class: Class::Bulk, ..capped }),
    ]
}

/// Runs a program on two worlds, which must not differ at any step.
fn compare(world: impl Fn() -> World, steps: &[Step]) {
    let [mut short, mut long, mut untouched] = [world(), world(), world()];
    long.forget_the_short_way();
    for (number, step) in steps.iter().enumerate() {
        for world in [&mut short, &mut long] {
            world.take(step);
        }
        let said = format!("after step {number}, {step:?}");
        assert_eq!(short.news(), long.news(), "{said}");
        assert_eq!(short.states(), long.states(), "{said}");
        if step.until != Until::Posted {
            assert!(short.memory() == long.memory(), "memory differs {said}");
        }
    }
    for world in [&mut short, &mut long] {
        world.end();
    }
    assert_eq!(short.news(), long.news());
    assert!(short.memory() == long.memory());
    assert_eq!(short.counters(), long.counters());
    let whole = untouched.quotas();
    assert_eq!(short.quotas(), whole, "the short way keeps something of a rate");
    assert_eq!(long.quotas(), whole, "the long way keeps something of a rate");
    assert_eq!(long.went_short(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, ..ProptestConfig::default() })]
    #[test]
    fn within_a_container_the_short_way_is_the_long_one(policy in policy(), steps in prop::collection::vec(step(), 1..30)) {
        compare(|| World::alone(&policy), &steps);
    }
}

proptest! {
    // Each ends and begins links, and waits for what then has no answer.
    #![proptest_config(ProptestConfig { cases: 30, ..ProptestConfig::default() })]
    #[test]
    fn between_neighbours_the_short_way_is_the_long_one(policy in policy(), steps in prop::collection::vec(step(), 1..30)) {
        compare(|| World::of_neighbours(&policy), &steps);
    }
}

const ONE_SIDED: [Opcode; 4] = [Opcode::RDMA_WRITE, Opcode::RDMA_READ, Opcode::FETCH_AND_ADD, Opcode::CMP_AND_SWP];

/// Ten requests of the usual kind.
fn burst(opcode: Opcode) -> Step {
    let request = |place: u32| Request {
        opcode,
        local: 0,
        remote: 8 * place,
        bytes: 8,
        flags: SendFlags::SIGNALED.0,
        wrong: Wrong::Nothing,
    };
    Step {
        end: 0,
        receives: Vec::new(),
        requests: (0..10).map(request).collect(),
        until: Until::Settled,
        change: Change::Nothing,
    }
}

/// Which clock a turn reads may differ between the two: what is compared is what is left while none is read.
#[test]
fn both_ways_cost_the_same() {
    let policy = Policy {
        bandwidth: BitRate::new(80_000_000_000),
        fetching: BitRate::new(80_000_000_000),
        ops: OpRate::new(1_000_000),
        ..Policy::default()
    };
    for opcode in ONE_SIDED {
        let [mut short, mut long] = [World::alone(&policy), World::alone(&policy)];
        let whole = short.in_hand();
        long.forget_the_short_way();
        for world in [&mut short, &mut long] {
            world.take(&burst(opcode));
        }
        assert_eq!(short.went_short(), 10, "{opcode:?}");
        assert_eq!(short.in_hand(), long.in_hand(), "{opcode:?}");
        assert!(short.in_hand() != whole, "{opcode:?}");
    }
}

/// Between two containers, it is the one whose request it is that pays.
#[test]
fn what_goes_by_grant_is_charged() {
    let cap = BitRate::new(80_000_000_000);
    for opcode in ONE_SIDED {
        let fetching = opcode != Opcode::RDMA_WRITE;
        // Who is READ has no cap here of what leaves, for which a reader would have to ask.
        let caps = if fetching { [None, cap] } else { [cap, None] };
        let policy = Policy { bandwidth: caps[0], fetching: caps[1], ops: OpRate::new(1_000_000), ..Policy::default() };
        let mut world = World::of_neighbours(&policy);
        // They bring the grant.
        (0..2).for_each(|_| world.take(&burst(opcode)));
        let (before, went) = (world.in_hand().unwrap(), world.went_short());
        world.take(&burst(opcode));
        let after = world.in_hand().unwrap();
        assert_eq!(world.went_short(), went + 10, "{opcode:?}");
        let spent =
            [(before.out, after.out), (before.fetched, after.fetched)].map(|(before, after)| before.0 - after.0);
        let due = 10 * charged(Bytes(8)).0;
        assert_eq!(spent, if fetching { [0, due] } else { [due, 0] }, "{opcode:?}");
        assert_eq!(before.ops.0 - after.ops.0, 10, "{opcode:?}");
    }
}

/// The property would hold if nothing ever went the short way.
#[test]
fn what_is_usual_goes_the_short_way() {
    let mut alone = World::alone(&Policy::default());
    for (bursts, opcode) in (1..).zip(ONE_SIDED) {
        alone.take(&burst(opcode));
        assert_eq!(alone.went_short(), 10 * bursts, "{opcode:?}");
    }
    for opcode in ONE_SIDED {
        let mut neighbours = World::of_neighbours(&Policy::default());
        for _ in 0..3 {
            neighbours.take(&burst(opcode));
        }
        // The first burst brings the grant.
        assert!(neighbours.went_short() >= 20, "{opcode:?}: {}", neighbours.went_short());
    }
}
