//! Class latency: what small requests wait for, and what not.

use proptest::prelude::*;
use ringfence_sched::scheduler::{URGENT, charged};
use ringfence_sched::{BitRate, Bytes, Class, HEADERS, LinkNow, Nanos, OpRate, Piece, Policy, Scheduler, Weight};
use std::collections::VecDeque;

const LINK: LinkNow = LinkNow { free_at: Nanos::NEVER, about: true };
/// Queue pairs from here on have large requests.
const LARGE: u32 = 10;

/// A request or, of a large one, a piece.
fn piece(queue: u32, bytes: u64, fetches: bool) -> Piece {
    let total = Bytes(if queue < LARGE { bytes } else { 1 << 20 });
    Piece { queue, bytes: Bytes(bytes), total, first: queue < LARGE, fetches, own: false, on_link: 0 }
}

/// One rate, and what urgent requests alone have left of it if nothing is ever made up for.
#[derive(Clone, Copy, Debug)]
struct Debt {
    per_second: u64,
    burst: u64,
    /// In billionths of a unit.
    balance: i128,
}

impl Debt {
    fn of(per_second: Option<u64>, least: u64) -> Option<Self> {
        let per_second = per_second?;
        let burst = (per_second / 1000).max(least);
        Some(Self { per_second, burst, balance: i128::from(burst) * 1_000_000_000 })
    }

    fn earn(&mut self, time: u64) {
        let earned = i128::from(self.per_second) * i128::from(time);
        self.balance = (self.balance + earned).min(i128::from(self.burst) * 1_000_000_000);
    }

    fn spend(&mut self, units: u64) {
        self.balance -= i128::from(units) * 1_000_000_000;
    }

    /// How long until something is there.
    fn wait(&self) -> u64 {
        (1 - self.balance).max(0).unsigned_abs().div_ceil(self.per_second.into()) as u64
    }
}

/// A container of class latency without a modelled link, and what its urgent requests owe.
struct Container {
    scheduler: Scheduler,
    now: Nanos,
    /// What leaves, what is fetched, operations.
    debts: [Option<Debt>; 3],
    /// Urgent requests that wait, by queue pair.
    waiting: [VecDeque<(u64, bool)>; LARGE as usize],
}

impl Container {
    /// How long an urgent request waits for debts of its kind.
    fn owes(&self, fetches: bool) -> u64 {
        let needed = [self.debts[usize::from(fetches)], self.debts[2]];
        needed.iter().flatten().map(Debt::wait).max().unwrap_or(0)
    }

    fn ask(&mut self, queue: u32, bytes: u64, fetches: bool) -> bool {
        let goes = self.scheduler.ask(&piece(queue, bytes, fetches), LINK, self.now).is_ok();
        if goes && queue < LARGE {
            let bits = charged(Bytes(bytes)).0 * 8;
            let units = if fetches { [0, bits, 1] } else { [bits, 0, 1] };
            self.debts
                .iter_mut()
                .zip(units)
                .for_each(|(debt, units)| debt.iter_mut().for_each(|debt| debt.spend(units)));
        }
        goes
    }

    /// Whether any urgent request waits though its kind owes nothing.
    fn waits_for_nothing(&self) -> bool {
        self.waiting.iter().filter_map(VecDeque::front).any(|(_, fetches)| self.owes(*fetches) == 0)
    }

    /// A turn of the worker after this time.
    fn turn(&mut self, time: u64) -> Result<(), TestCaseError> {
        self.now = self.now.after(Nanos(time));
        self.debts.iter_mut().flatten().for_each(|debt| debt.earn(time));
        self.scheduler.begin(self.now);
        let mut large = 0;
        while let Some(queue) = self.scheduler.next(LINK, self.now) {
            if queue >= LARGE {
                prop_assert!(!self.waits_for_nothing(), "bulk goes before {:?}", self.waiting);
                large += 1;
                if large > 20 || self.ask(queue, 4096, queue % 2 == 1) {
                    self.scheduler.leave(queue, self.now);
                }
                continue;
            }
            while let Some((bytes, fetches)) = self.waiting[queue as usize].front().copied()
                && self.ask(queue, bytes, fetches)
            {
                self.waiting[queue as usize].pop_front();
            }
            if self.waiting[queue as usize].is_empty() {
                self.scheduler.leave(queue, self.now);
            }
        }
        prop_assert!(!self.waits_for_nothing(), "{:?} wait for nothing: {:?}", self.waiting, self.scheduler);
        Ok(())
    }
}

/// Rates from `10^least` on, each order of magnitude as likely as the others.
fn rates(least: u32, most: u32) -> impl Strategy<Value = Option<u64>> {
    prop::option::of((least..most, 1u64..10).prop_map(|(order, digit)| digit * 10u64.pow(order)))
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Time(u64),
    Urgent { queue: u32, bytes: u64, fetches: bool },
    Large { queue: u32, pieces: u32 },
    Read { port: u16, bytes: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1u64..1_000_000).prop_map(Step::Time),
        (0..4u32, 0..=URGENT.0, any::<bool>()).prop_map(|(queue, bytes, fetches)| Step::Urgent {
            queue,
            bytes,
            fetches
        }),
        (LARGE..LARGE + 4, 1u32..20).prop_map(|(queue, pieces)| Step::Large { queue, pieces }),
        (1u16..4, 1u64..100_000).prop_map(|(port, bytes)| Step::Read { port, bytes }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Whatever the container's large requests and its neighbours' READs have taken: an urgent request goes whole and at once, or as
    /// soon as what urgent ones have taken is paid for, and large ones wait until then.
    #[test]
    fn an_urgent_request_waits_for_what_urgent_ones_owe_and_nothing_else(
        (bandwidth, fetching, ops) in (rates(5, 11), rates(5, 11), rates(1, 7)),
        steps in prop::collection::vec(step(), 1..300),
    ) {
        let policy = Policy {
            bandwidth: bandwidth.and_then(BitRate::new),
            fetching: fetching.and_then(BitRate::new),
            ops: ops.and_then(OpRate::new),
            weight: None,
            class: Class::Latency,
        };
        let debts = [Debt::of(bandwidth, 16 << 13), Debt::of(fetching, 16 << 13), Debt::of(ops, 8)];
        let scheduler = Scheduler::new(&policy, None, Nanos(0));
        let mut container = Container { scheduler, now: Nanos(0), debts, waiting: Default::default() };
        for step in steps {
            match step {
                Step::Time(time) => container.turn(time)?,
                Step::Large { queue, pieces } => {
                    for _ in 0..pieces {
                        container.ask(queue, 4096, queue % 2 == 1);
                    }
                }
                Step::Read { port, bytes } => {
                    if container.scheduler.may_be_read(port, Bytes(bytes), container.now).is_ok() {
                        container.scheduler.was_read(port, Bytes(bytes));
                    }
                }
                Step::Urgent { queue, bytes, fetches } => {
                    prop_assert_eq!(container.scheduler.piece(Bytes(bytes), Bytes(bytes)), Bytes(bytes));
                    container.turn(1)?;
                    let idle = container.waiting.iter().all(VecDeque::is_empty);
                    if !container.waiting[queue as usize].is_empty() || !container.ask(queue, bytes, fetches) {
                        container.waiting[queue as usize].push_back((bytes, fetches));
                        let owes = container.owes(fetches);
                        prop_assert!(!idle || owes > 0, "{step:?} waits for nothing");
                        let opens = container.scheduler.opens_at(LINK, container.now);
                        prop_assert!(opens.is_some_and(|at| !idle || at <= container.now.after(Nanos(owes))), "{opens:?}");
                    }
                }
            }
        }
        // Whatever waits has gone when its debts are paid.
        while container.waiting.iter().any(|requests| !requests.is_empty()) {
            let kinds = container.waiting.iter().filter_map(VecDeque::front);
            let owes = kinds.map(|(_, fetches)| container.owes(*fetches)).min().unwrap();
            container.turn(owes.max(1))?;
        }
    }

    /// The same on a link, whatever large requests have on it: as many as a calm window has at once, while they ask for no more than
    /// the share on average.
    #[test]
    fn urgent_requests_within_the_share_go_at_once_and_whole(
        weight in 1u32..=1000,
        rate in prop_oneof![Just(1_000_000_000u64), Just(10_000_000_000), Just(100_000_000_000)],
        steps in prop::collection::vec(
            (prop::collection::vec(0..=URGENT.0, 1..6), 0u32..30, 0u64..2_000_000, 1u64..90, any::<bool>()), 1..60),
    ) {
        let policy = Policy { weight: Weight::new(weight), class: Class::Latency, ..Policy::default() };
        let mut scheduler = Scheduler::new(&policy, BitRate::new(rate), Nanos(0));
        // Bytes of a window: for 100 µs if all is calm, for 20 µs if not, and so many at least.
        let window = |micros: u64, least: u64| (rate / 8_000_000 * micros).max(least) * u64::from(weight) / 100;
        let (calm, about) = (window(100, 6 << 10), window(20, 3 << 10).max(1));
        let mut now = Nanos(1);
        for (urgent, large, stays, percent, idle) in steps {
            scheduler.begin(now);
            let asked = piece(LARGE, 4096, false);
            let large = (0..large).filter(|_| scheduler.ask(&asked, LINK, now).is_ok()).count();
            let link = LinkNow { free_at: if idle { Nanos(0) } else { Nanos::NEVER }, ..LINK };
            let (mut on_link, mut sent) = (0, Vec::new());
            for bytes in urgent {
                if on_link > 0 && on_link >= calm {
                    break;
                }
                prop_assert_eq!(scheduler.piece(Bytes(bytes), Bytes(bytes)), Bytes(bytes));
                prop_assert_eq!(scheduler.ask(&piece(sent.len() as u32, bytes, false), link, now), Ok(()));
                on_link += bytes + HEADERS.0;
                sent.push(bytes);
            }
            // They are this part of the window, on average.
            let pause = Nanos((u128::from(stays * on_link) * 100 / u128::from(percent * about)) as u64);
            let gone = now.after(Nanos(stays));
            sent.iter().for_each(|bytes| scheduler.arrived(Bytes(*bytes), Bytes(*bytes), gone));
            (0..large).for_each(|_| scheduler.arrived(Bytes(4096), Bytes(1 << 20), gone));
            now = gone.after(pause).after(Nanos(1));
        }
    }

    /// Beyond the share urgent requests are divided as others are, until they have asked for less for a while.
    #[test]
    fn urgent_requests_beyond_the_share_are_divided(
        weight in 10u32..=1000,
        sizes in prop::collection::vec(64..=URGENT.0, 1..10),
        flood in 3_000u64..10_000,
    ) {
        let policy = Policy { weight: Weight::new(weight), class: Class::Latency, ..Policy::default() };
        let mut scheduler = Scheduler::new(&policy, BitRate::new(10_000_000_000), Nanos(0));
        let (mut now, mut on_link) = (Nanos(0), Vec::new());
        let long = Bytes(1 << 20);
        for (queue, bytes) in (0..).zip(sizes.into_iter().cycle()) {
            // Everything stays on the link.
            now = now.after(Nanos::micros(1));
            scheduler.begin(now);
            while scheduler.ask(&piece(queue % 5, bytes, false), LINK, now).is_ok() {
                on_link.push(bytes);
            }
            scheduler.leave(queue % 5, now);
            if now > Nanos::micros(flood) {
                break;
            }
        }
        prop_assert_eq!(scheduler.piece(URGENT, URGENT), scheduler.piece(long, long).min(URGENT));
        on_link.iter().for_each(|bytes| scheduler.arrived(Bytes(*bytes), Bytes(*bytes), now));
        // For so long they had a calm window and a request, some twelve times as much at most as a window is meanwhile.
        now = now.after(Nanos::micros(15 * flood));
        scheduler.begin(now);
        prop_assert_eq!(scheduler.piece(URGENT, URGENT), URGENT);
    }
}
