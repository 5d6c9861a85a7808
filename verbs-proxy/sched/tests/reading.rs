//! A container's own requests and neighbours who READ out of it, under one rate: what each gets.

use proptest::prelude::*;
use ringfence_sched::scheduler::charged;
use ringfence_sched::{BitRate, Bytes, Class, LinkNow, Nanos, OpRate, Ops, Piece, Policy, Scheduler};

const LINK: LinkNow = LinkNow { free_at: Nanos::NEVER, about: false };
const OWN: u32 = 1;
const STEP: Nanos = Nanos::micros(5);
const SECOND: Nanos = Nanos::millis(1000);

/// A neighbour.
#[derive(Clone, Copy, Debug)]
struct Reader {
    /// Of each READ.
    bytes: u64,
    /// How much later than it was told it comes again.
    late: Nanos,
    /// It wants one so often, whether it got those before or not.
    every: Nanos,
    wants: Nanos,
    comes: Nanos,
    got: u64,
}

fn reader(bytes: u64, late: u64, every: u64) -> Reader {
    let (late, every) = (Nanos::micros(late), Nanos::micros(every));
    Reader { bytes, late, every, wants: Nanos(0), comes: Nanos(0), got: 0 }
}

/// A second of own requests of so many bytes, as many as go, and of these neighbours: parts of what the rate allows.
fn shares(policy: &Policy, own: Option<u64>, readers: &[Reader]) -> (f64, Vec<f64>) {
    shares_of(policy, own, readers, |_| STEP)
}

/// The same, with a worker whose turns are so far apart.
fn shares_of(policy: &Policy, own: Option<u64>, readers: &[Reader], step: impl Fn(u64) -> Nanos) -> (f64, Vec<f64>) {
    let whole = policy.bandwidth.unwrap().bytes_in(SECOND).0 as f64;
    let (sent, got) = amounts(policy, own, readers, step, SECOND);
    (sent as f64 / whole, got.into_iter().map(|got| got as f64 / whole).collect())
}

/// Bytes in this time, instead of parts of what a second allows.
fn amounts(
    policy: &Policy,
    own: Option<u64>,
    readers: &[Reader],
    step: impl Fn(u64) -> Nanos,
    end: Nanos,
) -> (u64, Vec<u64>) {
    let mut scheduler = Scheduler::new(policy, None, Nanos(0));
    let mut readers = readers.to_vec();
    let (mut now, mut sent, mut waits, mut turn) = (Nanos(0), 0, false, 0);
    while now < end {
        now = now.after(step(turn));
        turn += 1;
        scheduler.begin(now);
        while let Some(own) = own {
            if waits && scheduler.next(LINK, now) != Some(OWN) {
                break;
            }
            let bytes = Bytes(own).min(scheduler.piece(Bytes(own), Bytes(own)));
            let piece = Piece { queue: OWN, bytes, total: bytes, first: true, fetches: false, own: false, on_link: 0 };
            waits = scheduler.ask(&piece, LINK, now).is_err();
            if waits {
                break;
            }
            sent += bytes.0;
        }
        for (port, reader) in (1..).zip(&mut readers) {
            while reader.comes <= now {
                match scheduler.may_be_read(port, Bytes(reader.bytes), now) {
                    Ok(()) => {
                        scheduler.was_read(port, Bytes(reader.bytes));
                        reader.got += reader.bytes;
                        reader.wants = reader.wants.after(reader.every);
                        reader.comes = reader.comes.max(reader.wants);
                    }
                    Err(at) => {
                        assert!(at > now, "{at:?} is not later than {now:?}");
                        reader.comes = at.after(reader.late);
                    }
                }
            }
        }
    }
    (sent, readers.iter().map(|reader| reader.got).collect())
}

fn rate(bits: u64) -> Policy {
    Policy { bandwidth: BitRate::new(bits), ..Policy::default() }
}

const RATES: [u64; 3] = [100_000_000, 1_000_000_000, 10_000_000_000];

#[test]
fn greedy_own_requests_leave_half_to_a_greedy_neighbour() {
    for bits in RATES {
        for late in [0, 100, 400] {
            for (own, bytes) in [(4096, 4096), (1 << 20, 4096), (4096, 65536), (65536, 512)] {
                let (sent, got) = shares(&rate(bits), Some(own), &[reader(bytes, late, 0)]);
                let all = sent + got[0];
                let what = format!("{sent:.3} and {:.3} at {bits}, {own} and {bytes} bytes, {late} µs late", got[0]);
                assert!((0.97..=1.05).contains(&all), "{what}");
                assert!((0.42..=0.58).contains(&sent), "{what}");
            }
        }
    }
}

#[test]
fn neighbours_have_equal_shares() {
    for bits in RATES {
        for late in [[0, 0], [50, 400]] {
            let (_, got) = shares(&rate(bits), None, &late.map(|late| reader(4096, late, 0)));
            assert!((0.97..=1.05).contains(&(got[0] + got[1])), "{got:?} at {bits}");
            assert!((0.42..=0.58).contains(&got[0]), "{got:?} at {bits}");
        }
        let (sent, got) = shares(&rate(bits), Some(65536), &[reader(4096, 100, 0), reader(16384, 200, 0)]);
        for share in [sent, got[0], got[1]] {
            assert!((0.27..=0.4).contains(&share), "{sent:.3} {got:?} at {bits}");
        }
    }
}

#[test]
fn whoever_wants_little_has_it_and_the_rest_is_the_others() {
    for bits in RATES {
        // A tenth of the rate.
        let every = 4096 * 8 * 10 * 1_000_000 / bits;
        let (sent, got) = shares(&rate(bits), Some(65536), &[reader(4096, 100, every)]);
        assert!(got[0] > 0.09, "{sent:.3} {got:?} at {bits}");
        assert!((0.97..=1.05).contains(&(sent + got[0])), "{sent:.3} {got:?} at {bits}");
    }
}

#[test]
fn whoever_holds_turns_and_takes_next_to_nothing_costs_the_others_nothing() {
    for bits in RATES {
        for late in [0, 100, 499, 501, 5000] {
            let hostile = reader(1, late, 0);
            let slow = Reader { every: Nanos::micros(900), ..hostile };
            let (sent, _) = shares(&rate(bits), Some(65536), &[slow; 8]);
            assert!(sent > 0.95, "{sent:.3} at {bits}, {late} µs late");
            let (_, got) = shares(&rate(bits), None, &[reader(4096, 50, 0), slow, slow, slow]);
            assert!(got[0] > 0.95, "{got:?} at {bits}, {late} µs late");
        }
    }
}

#[test]
fn nobody_waits_for_own_requests_that_wait_for_operations() {
    let policy = Policy { ops: OpRate::new(10), ..rate(1_000_000_000) };
    let (_, got) = shares(&policy, Some(4096), &[reader(4096, 100, 0)]);
    assert!(got[0] > 0.95, "{got:?}");
}

#[test]
fn a_worker_that_is_seldom_there_gives_turns_all_the_same() {
    for bits in [1_000_000_000, 10_000_000_000] {
        for apart in [300, 700, 1500, 4000] {
            let (sent, got) = shares_of(&rate(bits), Some(4096), &[reader(4096, 100, 0)], |_| Nanos::micros(apart));
            assert!(sent > 0.3 && got[0] > 0.3, "{sent:.3} {got:?} at {bits}, {apart} µs apart");
        }
    }
}

/// It has its processor for a slice, and then another has it.
#[test]
fn what_a_worker_loses_with_its_processor_is_made_up_for() {
    for bits in RATES {
        for (on, off) in [(3_000, 3_000), (4_000, 8_000), (20_000, 4_000)] {
            let step = |turn: u64| Nanos::micros(if turn.is_multiple_of(on / 10) { off } else { 10 });
            let (sent, got) = shares_of(&rate(bits), Some(4096), &[reader(4096, 100, 0)], step);
            let what = format!("{sent:.3} {got:?} at {bits}, {on} µs and then {off} without");
            assert!((0.97..=1.05).contains(&(sent + got[0])), "{what}");
            assert!(sent > 0.3 && got[0] > 0.3, "{what}");
        }
    }
}

/// A neighbour was refused once, and has ended or lost interest.
#[test]
fn a_neighbour_that_does_not_come_again_is_forgotten() {
    let read =
        Piece { queue: OWN, bytes: Bytes(8), total: Bytes(8), first: true, fetches: true, own: false, on_link: 0 };
    for does in [None, Some(read), Some(Piece { fetches: false, ..read })] {
        // Urgent requests take no turns either.
        let class = if does.is_some_and(|piece| !piece.fetches) { Class::Latency } else { Class::None };
        let mut scheduler = Scheduler::new(&Policy { class, ..rate(1_000_000_000) }, None, Nanos(0));
        let mut now = Nanos(1000);
        scheduler.begin(now);
        while scheduler.may_be_read(7, Bytes(4096), now).is_ok() {
            scheduler.was_read(7, Bytes(4096));
        }
        for _ in 0..1000 {
            now = now.after(Nanos::millis(1));
            scheduler.begin(now);
            if let Some(piece) = does {
                assert_eq!(scheduler.ask(&piece, LINK, now), Ok(()));
            }
        }
        assert!(scheduler.in_hand().is_some() && !scheduler.wants_clock(), "{does:?}");
    }
}

/// How much of the container's own goes while a neighbour waits who had 64 KiB, after which own requests went until there was nothing
/// left; `unasked` those that may.
fn overtakes(unasked: bool) -> u64 {
    const BYTES: Bytes = Bytes(4096);
    let own = Piece { queue: OWN, bytes: BYTES, total: BYTES, first: true, fetches: false, own: false, on_link: 0 };
    let mut scheduler = Scheduler::new(&rate(1_000_000_000), None, Nanos(0));
    let mut now = Nanos::micros(1);
    scheduler.begin(now);
    // It is remembered, as it waited and then had more than anybody.
    while let Ok(()) = scheduler.may_be_read(7, BYTES, now) {
        scheduler.was_read(7, BYTES);
    }
    now = scheduler.may_be_read(7, BYTES, now).unwrap_err();
    scheduler.begin(now);
    assert_eq!(scheduler.may_be_read(7, Bytes(65536), now), Ok(()));
    scheduler.was_read(7, Bytes(65536));
    now = now.after(Nanos::millis(2));
    scheduler.begin(now);
    loop {
        now = now.after(Nanos::micros(10));
        scheduler.begin(now);
        if unasked && scheduler.in_hand().is_some_and(|allowance| allowance.out >= charged(BYTES)) {
            scheduler.spend(charged(BYTES), Bytes(0), Ops(1));
        } else if scheduler.ask(&own, LINK, now).is_err() {
            break;
        }
    }
    let (mut went, mut comes) = (0, now);
    loop {
        if scheduler.next(LINK, now) == Some(OWN) && scheduler.ask(&own, LINK, now).is_ok() {
            went += BYTES.0;
        } else if comes <= now {
            match scheduler.may_be_read(7, BYTES, now) {
                Ok(()) => return went,
                Err(at) => comes = at,
            }
        }
        now = now.after(Nanos::micros(10));
        scheduler.begin(now);
    }
}

#[test]
fn own_requests_that_went_unasked_have_had_as_much_as_those_that_asked() {
    assert_eq!(overtakes(true), overtakes(false));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Own requests, or none, and up to eight neighbours, of whatever sizes, who all want more than there is and come again at once or
    /// almost half a millisecond late: together they have the rate and no more, and each its part, whatever the others' sizes.
    #[test]
    fn whoever_is_greedy_has_its_part_of_the_rate(
        bits in prop_oneof![Just(100_000_000u64), Just(1_000_000_000), Just(10_000_000_000)],
        own in prop::option::of(64u64..100_000),
        neighbours in prop::collection::vec((64u64..40_000, 0u64..450), 1..=8),
        apart in 5u64..50,
    ) {
        let end = Nanos::millis(300);
        let readers: Vec<Reader> = neighbours.iter().map(|(bytes, late)| reader(*bytes, *late, 0)).collect();
        let (sent, got) = amounts(&rate(bits), own, &readers, |_| Nanos::micros(apart), end);
        let parts: Vec<u64> = own.map(|_| sent).into_iter().chain(got).collect();
        let (all, count) = (parts.iter().sum::<u64>(), parts.len() as u64);
        let earned = rate(bits).bandwidth.unwrap().bytes_in(end.after(Nanos::micros(apart))).0;
        let burst = (bits / 8000).max(16 << 10);
        // What goes at once: a READ, as own requests are cut to what a burst pays for.
        let largest = neighbours.iter().map(|(bytes, _)| *bytes).max().unwrap();
        prop_assert!(all <= earned + burst * 5 / 4 + largest.max(burst), "{all} of {earned}");
        prop_assert!(all >= earned * 97 / 100, "{all} of {earned}");
        for part in &parts {
            prop_assert!(part + burst + largest >= earned / count * 95 / 100, "{part} of {earned}: {parts:?}");
        }
    }
}
