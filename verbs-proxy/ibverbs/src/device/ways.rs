//! The short way to the card against the long one: the same programs on two worlds, one of which knows no short way. The card is given
//! the same, the container hears the same, each signaled request completes once and in order, and in the end nothing is held.

mod card;
mod world;

use super::*;
use proptest::prelude::*;
use ringfence_sched::{BitRate, Class, OpRate, Policy};
use world::World;

/// What is posted to a queue pair.
#[derive(Clone, Copy, Debug)]
struct Asked {
    opcode: Opcode,
    at: u32,
    bytes: u32,
    flags: u8,
    /// It names a key that there is not.
    wrong: bool,
    /// It has two elements.
    two: bool,
}

/// What happens to a queue pair.
#[derive(Clone, Copy, Debug)]
enum Change {
    Nothing,
    /// The card carries out so many requests.
    CarriedOut(usize),
    /// The same, and the last of them fails.
    Failed(usize),
    /// Messages arrive.
    Arrived(usize),
    /// The card's library refuses the request after so many, for want of room that there will be, or for what it is.
    Refuses(usize, bool),
    /// The container's own verbs.
    ToError,
    Reset,
    Drain,
    Resume,
    /// The key word says that the container wants its region back, or again.
    Withdraw,
    Restore,
    Deregister,
    Register,
}

#[derive(Clone, Debug)]
struct Step {
    queue: usize,
    receives: usize,
    asked: Vec<Asked>,
    /// The change comes before anything of it was looked at.
    at_once: bool,
    change: Change,
}

fn asked() -> impl Strategy<Value = Asked> {
    let opcode = prop_oneof![
        12 => Just(Opcode::RDMA_WRITE),
        6 => Just(Opcode::SEND),
        2 => Just(Opcode::RDMA_WRITE_WITH_IMM),
        2 => Just(Opcode::SEND_WITH_IMM),
        2 => Just(Opcode::RDMA_READ),
        1 => Just(Opcode::FETCH_AND_ADD),
    ];
    let bytes = prop_oneof![1 => Just(0u32), 10 => 1u32..=32, 4 => 1u32..4096, 2 => 1u32..60_000];
    let flags = (any::<bool>(), 0u8..5, 0u8..12, any::<bool>());
    (opcode, 0u32..60_000, bytes, flags, 0u8..40, 0u8..10).prop_map(|(opcode, at, bytes, flags, wrong, two)| {
        let (signaled, inline, fence, solicited) = flags;
        let atomic = opcode == Opcode::FETCH_AND_ADD;
        let inline = inline == 0 && bytes <= 32 && !atomic && opcode != Opcode::RDMA_READ;
        let set = |is: bool, flag: SendFlags| if is { flag.0 } else { 0 };
        Asked {
            opcode,
            at,
            bytes: if atomic { 8 } else { bytes },
            flags: set(signaled, SendFlags::SIGNALED)
                | set(inline, SendFlags::INLINE)
                | set(fence == 0, SendFlags::FENCE)
                | set(solicited, SendFlags::SOLICITED),
            wrong: wrong == 0,
            two: two == 0 && !inline && !atomic,
        }
    })
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => Just(Change::Nothing),
        8 => (1usize..40).prop_map(Change::CarriedOut),
        1 => (1usize..10).prop_map(Change::Failed),
        2 => (1usize..4).prop_map(Change::Arrived),
        2 => (0usize..6, prop_oneof![3 => Just(true), 1 => Just(false)]).prop_map(|(after, passes)| Change::Refuses(after, passes)),
        1 => Just(Change::ToError),
        4 => Just(Change::Reset),
        1 => Just(Change::Drain),
        2 => Just(Change::Resume),
        1 => Just(Change::Withdraw),
        2 => Just(Change::Restore),
        1 => Just(Change::Deregister),
        2 => Just(Change::Register),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let receives = prop_oneof![3 => Just(0usize), 1 => 1usize..4];
    let at_once = prop_oneof![3 => Just(false), 1 => Just(true)];
    (0usize..2, receives, prop::collection::vec(asked(), 0..24), at_once, change())
        .prop_map(|(queue, receives, asked, at_once, change)| Step { queue, receives, asked, at_once, change })
}

/// Rates that have much in hand, and none.
fn policy() -> impl Strategy<Value = Policy> {
    let bound =
        Policy { bandwidth: BitRate::new(10_000_000_000_000), ops: OpRate::new(1_000_000_000), ..Policy::default() };
    prop_oneof![
        3 => Just(Policy::default()),
        1 => Just(bound),
        1 => Just(Policy { class: Class::Latency, ..bound }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]
    #[test]
    fn the_short_way_is_the_long_one(policy in policy(), steps in prop::collection::vec(step(), 1..30)) {
        let [mut short, mut long, untouched] = [(); 3].map(|()| World::new(&policy));
        long.forget_the_short_way();
        for (number, step) in steps.iter().enumerate() {
            for world in [&mut short, &mut long] {
                world.take(step);
            }
            let said = format!("after step {number}, {step:?}");
            assert_eq!(short.posted(), long.posted(), "{said}");
            assert_eq!(short.news(), long.news(), "{said}");
            assert_eq!(short.states(), long.states(), "{said}");
        }
        for world in [&mut short, &mut long] {
            world.end();
        }
        assert_eq!(short.news(), long.news());
        assert_eq!(short.counters(), long.counters());
        // Behind one that the card's library refuses for what it is, and that fails, others may have been to go by the same doorbell or not.
        if !steps.iter().any(|step| matches!(step.change, Change::Refuses(_, false))) {
            assert_eq!(short.gone(), long.gone());
        }
        let held = untouched.held();
        assert_eq!(short.held(), held, "the short way keeps something");
        assert_eq!(long.held(), held, "the long way keeps something");
        assert_eq!(long.went_short(), 0);
    }
}

/// The property would hold if nothing ever went the short way.
#[test]
fn what_is_usual_goes_the_short_way() {
    let ways = [Opcode::RDMA_WRITE, Opcode::RDMA_WRITE_WITH_IMM, Opcode::SEND, Opcode::SEND_WITH_IMM];
    for (opcode, inline) in ways.into_iter().flat_map(|opcode| [(opcode, false), (opcode, true)]) {
        let mut world = World::new(&Policy::default());
        let flags = SendFlags::SIGNALED.0 | if inline { SendFlags::INLINE.0 } else { 0 };
        let asked = vec![Asked { opcode, at: 0, bytes: 8, flags, wrong: false, two: false }; 10];
        world.take(&Step { queue: 0, receives: 0, asked, at_once: false, change: Change::CarriedOut(10) });
        assert_eq!(world.went_short(), 10, "{opcode:?}, inline: {inline}");
        world.end();
    }
}
