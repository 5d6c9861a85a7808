//! Rates, turns and windows together, as the data plane drives them.

use proptest::prelude::*;
use ringfence_sched::link::{Airtime, finish};
use ringfence_sched::{
    BitRate, Bytes, Class, Closed, HEADERS, LinkNow, Nanos, OpRate, Piece, Policy, Scheduler, Weight,
};
use std::collections::VecDeque;

const LINK: LinkNow = LinkNow { free_at: Nanos::NEVER, about: false };

fn piece(queue: u32, bytes: u64) -> Piece {
    let bytes = Bytes(bytes);
    Piece { queue, bytes, total: bytes, first: true, fetches: false, own: false, on_link: 0 }
}

fn rate(bits: u64) -> Option<BitRate> {
    BitRate::new(bits)
}

/// Asks until refused; how often it went.
fn drain(scheduler: &mut Scheduler, piece: &Piece, now: Nanos) -> u32 {
    let mut count = 0;
    while scheduler.ask(piece, LINK, now).is_ok() {
        count += 1;
    }
    count
}

#[test]
fn fetching_waits_for_its_own_rate_and_holds_nobody_up() {
    let policy = Policy { bandwidth: rate(8_000_000_000), fetching: rate(8_000), ..Policy::default() };
    let mut scheduler = Scheduler::new(&policy, None, Nanos(0));
    scheduler.begin(Nanos(1));
    let read = Piece { fetches: true, ..piece(1, 20_000) };
    assert_eq!(scheduler.ask(&read, LINK, Nanos(1)), Ok(()));
    assert_eq!(scheduler.ask(&read, LINK, Nanos(1)), Err(Closed::Share));
    assert_eq!(scheduler.ask(&piece(2, 1000), LINK, Nanos(1)), Ok(()));
    assert_eq!(scheduler.next(LINK, Nanos(1)), None);
    let at = scheduler.opens_at(LINK, Nanos(1)).unwrap();
    scheduler.begin(at);
    assert_eq!(scheduler.next(LINK, at), Some(1));
}

#[test]
fn an_own_read_leaves_and_is_fetched() {
    let policy = Policy { bandwidth: rate(8_000), ..Policy::default() };
    let mut scheduler = Scheduler::new(&policy, None, Nanos(0));
    scheduler.begin(Nanos(1));
    let read = Piece { fetches: true, own: true, ..piece(1, 1 << 20) };
    assert_eq!(scheduler.ask(&read, LINK, Nanos(1)), Ok(()));
    assert!(scheduler.may_be_read(1, Bytes(1), Nanos(2)).is_err());
}

#[test]
fn what_others_read_counts() {
    let policy = Policy { bandwidth: rate(8_000_000), ..Policy::default() };
    let mut scheduler = Scheduler::new(&policy, None, Nanos(0));
    assert_eq!(scheduler.may_be_read(1, Bytes(1 << 20), Nanos(1)), Ok(()));
    scheduler.was_read(1, Bytes(1 << 20));
    // A MiB at a megabyte per second, less the burst of 16 KiB.
    let at = scheduler.may_be_read(1, Bytes(1), Nanos(1)).unwrap_err();
    assert!((1_030_000_000..1_034_000_000).contains(&at.0), "{at:?}");
    scheduler.begin(Nanos(2));
    assert_eq!(scheduler.ask(&piece(0, 8), LINK, Nanos(2)), Err(Closed::Share));
}

#[test]
fn urgent_requests_go_before_own_bulk_that_has_used_the_cap_up() {
    let policy = Policy { bandwidth: rate(8_000_000), class: Class::Latency, ..Policy::default() };
    let mut scheduler = Scheduler::new(&policy, None, Nanos(0));
    scheduler.begin(Nanos(1));
    assert_eq!(drain(&mut scheduler, &piece(1, 64 << 10), Nanos(1)), 1);
    // Bulk owes 48 KiB, which is 48 ms; small requests have the cap's burst for themselves, and no more than that.
    let small = drain(&mut scheduler, &piece(2, 1024), Nanos(1));
    assert!((16..=17).contains(&small), "{small}");
    // Together they have no more than the cap: a second later 1 MB has gone in all, and the burst twice.
    let (mut total, mut now) = (0, Nanos(1));
    while now < Nanos::millis(1000) {
        now = scheduler.opens_at(LINK, now).unwrap().max(Nanos(now.0 + 1));
        scheduler.begin(now);
        while let Some(queue) = scheduler.next(LINK, now) {
            let bytes = if queue == 1 { 4096 } else { 64 };
            let of = if queue == 1 { 64 << 10 } else { 64 };
            if scheduler.ask(&Piece { total: Bytes(of), ..piece(queue, bytes) }, LINK, now).is_ok() {
                total += bytes;
            }
        }
    }
    assert!(total <= 1_000_000 + 2 * (16 << 10), "{total}");
}

#[test]
fn an_urgent_request_is_not_divided() {
    let policy = Policy { bandwidth: rate(8_000_000), class: Class::Latency, ..Policy::default() };
    let scheduler = Scheduler::new(&policy, rate(1_000_000_000), Nanos(0));
    assert_eq!(scheduler.piece(Bytes(16 << 10), Bytes(16 << 10)), Bytes(16 << 10));
    assert_eq!(scheduler.piece(Bytes(17 << 10), Bytes(17 << 10)), Bytes(1 << 10));
}

#[test]
fn nobody_is_woken_for_a_link_that_is_closed_and_a_rate_that_is_open_for_others() {
    let policy = Policy { ops: OpRate::new(1000), class: Class::Latency, ..Policy::default() };
    let mut scheduler = Scheduler::new(&policy, rate(10_000_000_000), Nanos(0));
    scheduler.begin(Nanos(1));
    // Large requests wait for the link, which is open to small ones; those wait for operations, of which large ones need no more.
    drain(&mut scheduler, &Piece { total: Bytes(1 << 20), first: false, ..piece(1, 4096) }, Nanos(1));
    assert!(drain(&mut scheduler, &piece(2, 64), Nanos(1)) >= 8);
    assert_eq!(scheduler.next(LINK, Nanos(2)), None);
    let at = scheduler.opens_at(LINK, Nanos(2)).unwrap();
    assert!(at > Nanos::micros(900), "{at:?}");
    scheduler.begin(at);
    assert_eq!(scheduler.next(LINK, at), Some(2));
}

#[test]
fn without_weight_and_class_the_link_is_shared_by_queue_pair() {
    let mut scheduler = Scheduler::new(&Policy::default(), rate(1_000_000_000), Nanos(0));
    let on_link = Piece { on_link: 1, ..piece(1, 100) };
    assert_eq!(scheduler.ask(&on_link, LINK, Nanos(0)), Err(Closed::Queue));
    assert_eq!(scheduler.ask(&piece(2, 100), LINK, Nanos(0)), Ok(()));
    assert!(!scheduler.any_waits());
}

#[test]
fn classes_say_what_a_turn_is() {
    // Queue pair 1 has requests of 16 KiB, queue pair 2 of 64 bytes, and both always have some.
    let served = |class| {
        let policy = Policy { bandwidth: rate(1_000_000_000), ops: OpRate::new(100_000), class, ..Policy::default() };
        let mut scheduler = Scheduler::new(&policy, None, Nanos(0));
        let (mut now, mut counts) = (Nanos(0), [0u64; 2]);
        let sizes = [16 << 10, 64];
        for queue in [1, 2] {
            scheduler.begin(now);
            drain(&mut scheduler, &piece(queue, sizes[queue as usize - 1]), now);
        }
        while now < Nanos::millis(2000) {
            now = scheduler.opens_at(LINK, now).unwrap().max(Nanos(now.0 + 1));
            scheduler.begin(now);
            while let Some(queue) = scheduler.next(LINK, now) {
                if scheduler.ask(&piece(queue, sizes[queue as usize - 1]), LINK, now).is_ok() {
                    counts[queue as usize - 1] += 1;
                }
            }
        }
        counts
    };
    let [large, small] = served(Class::Ops);
    assert!(large.abs_diff(small) <= 64, "{large} and {small} operations");
    let [large, small] = served(Class::Bulk);
    let (large, small) = (large * (16 * 1024 + 64), small * 128);
    assert!(large.abs_diff(small) <= 4 * (128 << 10), "{large} and {small} bytes");
}

#[test]
fn a_clock_that_was_not_read_earns_and_spends_no_more_than_is_in_hand() {
    let policy = Policy { ops: OpRate::new(1_000_000), ..Policy::default() };
    let mut scheduler = Scheduler::new(&policy, None, Nanos(0));
    // The burst is a thousand, of which a quarter may go unseen.
    scheduler.begin(Nanos(0));
    assert_eq!(drain(&mut scheduler, &piece(1, 8), Nanos(0)), 250);
    assert!(scheduler.wants_clock());
    scheduler.begin(Nanos(1));
    assert_eq!(scheduler.next(LINK, Nanos(1)), Some(1));
    // Turns of 32 operations; alone, the queue pair has them all.
    assert_eq!(drain(&mut scheduler, &piece(1, 8), Nanos(1)), 751);
}

#[test]
fn an_idle_container_that_was_capped_wants_no_clock_for_ever() {
    let policy = Policy { ops: OpRate::new(1_000_000), ..Policy::default() };
    let mut scheduler = Scheduler::new(&policy, None, Nanos(0));
    scheduler.spend(Bytes(8), Bytes(0), ringfence_sched::Ops(240));
    assert!(scheduler.wants_clock());
    scheduler.begin(Nanos::millis(1));
    assert!(!scheduler.wants_clock());
    assert_eq!(scheduler.in_hand().unwrap().ops.0, 250);
}

/// Requests of one queue pair, all alike.
#[derive(Clone, Copy, Debug)]
struct Requests {
    bytes: u64,
    fetches: bool,
    /// How many there are left, and how much of the first.
    left: u32,
    rest: u64,
    on_link: u32,
    waits: bool,
}

/// A container that has some requests to do, on a link or not.
struct Run {
    scheduler: Scheduler,
    queues: Vec<Requests>,
    link: Option<Airtime>,
    /// Bytes that others keep on the link.
    others: u64,
    now: LinkNow,
    /// What is on the link, oldest first: until when, of which queue pair, and bytes.
    flying: VecDeque<(Nanos, u32, Bytes)>,
    /// Bits that left, bits that were fetched, operations.
    spent: [u128; 3],
    /// Bits of a piece.
    largest: u128,
}

impl Run {
    /// Sends pieces of a queue pair until it must wait.
    fn advance(&mut self, queue: u32, now: Nanos) {
        let of = &mut self.queues[queue as usize];
        of.waits = false;
        while of.left > 0 {
            let total = Bytes(of.bytes);
            let bytes = self.scheduler.piece(total, Bytes(of.rest));
            let first = of.rest == of.bytes;
            let piece = Piece { queue, bytes, total, first, fetches: of.fetches, own: false, on_link: of.on_link };
            if let Err(closed) = self.scheduler.ask(&piece, self.now, now) {
                of.waits = closed == Closed::Share;
                return;
            }
            let charged = u128::from(bytes.max(HEADERS).0) * 8;
            self.spent[usize::from(of.fetches)] += charged;
            self.spent[2] += u128::from(first);
            self.largest = self.largest.max(charged);
            of.rest -= bytes.0;
            if of.rest == 0 {
                (of.left, of.rest) = (of.left - 1, of.bytes);
            }
            if let Some(airtime) = &mut self.link {
                self.now.free_at = finish(self.now.free_at, now, airtime.of(bytes.plus(HEADERS)));
                self.flying.push_back((self.now.free_at, queue, bytes));
                of.on_link += 1;
            }
        }
    }

    /// A turn of the worker.
    fn turn(&mut self, now: Nanos) -> Result<(), TestCaseError> {
        self.scheduler.begin(now);
        if let Some(airtime) = self.link.as_mut().filter(|_| self.others > 0 && self.now.free_at <= now) {
            self.now.free_at = finish(self.now.free_at, now, airtime.of(Bytes(self.others)));
        }
        let mut arrived = Vec::new();
        while let Some((at, queue, bytes)) = self.flying.pop_front_if(|(at, ..)| *at <= now) {
            let of = &mut self.queues[queue as usize];
            of.on_link -= 1;
            self.scheduler.arrived(bytes, Bytes(of.bytes), at);
            arrived.push(queue);
        }
        for queue in arrived {
            if !self.queues[queue as usize].waits {
                self.advance(queue, now);
            }
        }
        while let Some(queue) = self.scheduler.next(self.now, now) {
            prop_assert!(self.queues[queue as usize].waits);
            self.advance(queue, now);
            if !self.queues[queue as usize].waits {
                self.scheduler.leave(queue, now);
            }
        }
        Ok(())
    }

    /// When something is to be done.
    fn next(&self, now: Nanos) -> Option<Nanos> {
        let arrives = self.flying.front().map(|(at, ..)| *at);
        [self.scheduler.opens_at(self.now, now), arrives].into_iter().flatten().min()
    }
}

/// Rates from `10^least` on, each order of magnitude as likely as the others.
fn rates(least: u32, most: u32) -> impl Strategy<Value = Option<u64>> {
    prop::option::of((least..most, 1u64..10).prop_map(|(order, digit)| digit * 10u64.pow(order)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the policy and whoever asks in whatever order, on a link or not, alone there or not: no rate is exceeded, everybody
    /// who waits gets something, and when all have gone nobody waits and nothing is held to be on the link.
    #[test]
    fn rates_hold_and_nobody_starves(
        (bandwidth, fetching, ops) in (rates(6, 11), rates(6, 11), rates(2, 7)),
        weight in prop::option::of(1u32..=1000),
        class in prop_oneof![Just(Class::None), Just(Class::Ops), Just(Class::Bulk), Just(Class::Latency)],
        link in prop::option::of((100_000_000u64..100_000_000_000, prop_oneof![Just(0), 1u64..1 << 20], any::<bool>())),
        queues in prop::collection::vec((0u64..40_000, any::<bool>(), 1u32..20), 1..30),
    ) {
        let policy = Policy {
            bandwidth: bandwidth.and_then(BitRate::new),
            fetching: fetching.and_then(BitRate::new),
            ops: ops.and_then(OpRate::new),
            weight: weight.and_then(Weight::new),
            class,
        };
        let (rate, others, about) = link.map_or((None, 0, false), |(rate, others, about)| (BitRate::new(rate), others, about));
        let of = |(bytes, fetches, left)| Requests { bytes, fetches, left, rest: bytes, on_link: 0, waits: false };
        let mut run = Run {
            scheduler: Scheduler::new(&policy, rate, Nanos(0)),
            queues: queues.into_iter().map(of).collect(),
            link: rate.map(Airtime::new),
            others,
            now: LinkNow { free_at: Nanos(0), about },
            flying: VecDeque::new(),
            spent: [0; 3],
            largest: 0,
        };
        let mut now = Nanos(1);
        run.scheduler.begin(now);
        for queue in 0..run.queues.len() {
            run.advance(queue as u32, now);
        }
        let mut steps = 0;
        while let Some(at) = run.next(now) {
            steps += 1;
            prop_assert!(steps < 100_000, "no end");
            now = at.max(Nanos(now.0 + 1));
            run.turn(now)?;
        }
        prop_assert!(!run.scheduler.any_waits() && run.queues.iter().all(|of| of.left == 0 && !of.waits));
        prop_assert_eq!(run.scheduler.on_link(), Bytes(0));
        let limits = [(bandwidth, 16 << 13, run.largest), (fetching, 16 << 13, run.largest), (ops, 8, 1)];
        for (spent, (rate, least, largest)) in run.spent.into_iter().zip(limits) {
            let Some(rate) = rate else { continue };
            // Twice the burst, once for urgent requests; what one piece takes beyond; a quarter without a clock.
            let burst = u128::from((rate / 1000).max(least)) * 9 / 4;
            let earned = u128::from(rate) * u128::from(now.0) / 1_000_000_000;
            prop_assert!(spent <= earned + burst + 2 * largest + 1, "{spent} at {rate} in {now:?}");
        }
    }
}
