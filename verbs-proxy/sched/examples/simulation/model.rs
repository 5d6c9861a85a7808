//! Containers on one link, event by event: everything that decides is the scheduler that ships, the rest is this file.

use ringfence_sched::link::{Airtime, finish};
use ringfence_sched::{
    BitRate, Bytes, Class, Closed, HEADERS, LinkNow, Nanos, OpRate, Piece, Policy, Scheduler, Weight,
};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet, VecDeque};
use std::fmt::{self, Display, Formatter};

/// Queue pairs of one kind.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// How many queue pairs.
    pub queues: u32,
    /// Data of a request.
    pub bytes: u64,
    /// Requests that the application keeps outstanding in each.
    pub depth: u32,
    /// Between the completion of a request and the next one.
    pub pause: Nanos,
    /// READs.
    pub fetches: bool,
}

impl Flow {
    /// WRITEs, without a pause.
    pub const fn new(queues: u32, bytes: u64, depth: u32) -> Self {
        Self { queues, bytes, depth, pause: Nanos(0), fetches: false }
    }
}

/// A container and what it sends.
#[derive(Clone, Debug, Default)]
pub struct Tenant {
    pub bandwidth: Option<u64>,
    pub fetching: Option<u64>,
    pub ops: Option<u64>,
    pub weight: Option<u32>,
    pub class: Class,
    pub flows: Vec<Flow>,
}

impl Tenant {
    /// With a weight, and nothing else.
    pub fn weighing(weight: u32, flows: &[Flow]) -> Self {
        Self { weight: Some(weight), class: Class::Bulk, flows: flows.to_vec(), ..Self::default() }
    }

    /// The same container in class latency.
    pub fn in_a_hurry(self) -> Self {
        Self { class: Class::Latency, ..self }
    }

    /// Its weight, or that of whoever names none.
    pub fn weighs(&self) -> f64 {
        f64::from(self.policy().weight.unwrap_or_default().get())
    }

    fn policy(&self) -> Policy {
        Policy {
            bandwidth: self.bandwidth.and_then(BitRate::new),
            fetching: self.fetching.and_then(BitRate::new),
            ops: self.ops.and_then(OpRate::new),
            weight: self.weight.and_then(Weight::new),
            class: self.class,
        }
    }
}

impl Display for Tenant {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let class = match self.class {
            Class::Latency => "latency",
            Class::Ops => "ops",
            Class::Bulk => "bulk",
            Class::None => "none",
        };
        write!(f, "weight {}, class {class}", self.weighs())?;
        self.flows.iter().try_for_each(|Flow { queues, bytes, .. }| write!(f, ", {queues} QPs of {bytes} B"))
    }
}

/// What a container got.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// What the link was charged, headers among it.
    pub charged: u64,
    /// Of each flow: data, requests, and how long each of these took.
    pub flows: Vec<FlowOutcome>,
    /// Data and requests in each 100 ms.
    pub windows: Vec<(u64, u64)>,
}

#[derive(Clone, Debug, Default)]
pub struct FlowOutcome {
    pub bytes: u64,
    pub requests: u64,
    pub times: Vec<u64>,
}

struct Queue {
    flow: usize,
    waiting: VecDeque<Nanos>,
    under_way: VecDeque<Nanos>,
    sent: u64,
    begun: bool,
    on_link: u32,
}

struct Container {
    scheduler: Scheduler,
    airtime: Airtime,
    flows: Vec<Flow>,
    queues: Vec<Queue>,
    parked: HashSet<u32>,
    /// On the link, oldest first.
    flying: VecDeque<Flying>,
    /// When its worker looks at the clock next.
    alarm: Nanos,
    outcome: Outcome,
}

struct Flying {
    finish: Nanos,
    queue: u32,
    bytes: u64,
    last: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Posted { container: usize, queue: u32 },
    Alarm { container: usize },
}

/// The link, and everything that is to happen.
pub struct Model {
    link: Option<BitRate>,
    free_at: Nanos,
    latency_at: Option<Nanos>,
    containers: Vec<Container>,
    events: BinaryHeap<Reverse<(Nanos, u64, Event)>>,
    number: u64,
    random: u64,
    oversleep: u64,
    count_from: Nanos,
}

/// Without a link, pieces move at the speed of memory.
const MEMORY: u64 = 80_000_000_000;
/// A latency-class container counts as about for so long after its last request.
const ABOUT: Nanos = Nanos::millis(20);
const WINDOW: Nanos = Nanos::millis(100);

impl Model {
    /// `oversleep`: workers wake up to this late. Counting starts after `warm_up`.
    pub fn new(link: Option<u64>, tenants: &[Tenant], oversleep: Nanos, warm_up: Nanos) -> Self {
        let rate = link.and_then(BitRate::new);
        let mut model = Self {
            link: rate,
            free_at: Nanos(0),
            latency_at: None,
            containers: Vec::new(),
            events: BinaryHeap::new(),
            number: 0,
            random: 0x9e37_79b9_7f4a_7c15,
            oversleep: oversleep.0,
            count_from: warm_up,
        };
        for (container, tenant) in tenants.iter().enumerate() {
            let mut queues = Vec::new();
            for (flow, of) in tenant.flows.iter().enumerate() {
                for _ in 0..of.queues {
                    for _ in 0..of.depth {
                        // Not all at the same nanosecond.
                        let at = Nanos(model.random() % 50_000);
                        model.push(at, Event::Posted { container, queue: queues.len() as u32 });
                    }
                    queues.push(Queue {
                        flow,
                        waiting: VecDeque::new(),
                        under_way: VecDeque::new(),
                        sent: 0,
                        begun: false,
                        on_link: 0,
                    });
                }
            }
            model.containers.push(Container {
                scheduler: Scheduler::new(&tenant.policy(), rate, Nanos(0)),
                airtime: Airtime::new(rate.unwrap_or(BitRate::new(MEMORY).expect("not zero"))),
                flows: tenant.flows.clone(),
                queues,
                parked: HashSet::new(),
                flying: VecDeque::new(),
                alarm: Nanos::NEVER,
                outcome: Outcome { flows: vec![FlowOutcome::default(); tenant.flows.len()], ..Outcome::default() },
            });
        }
        model
    }

    /// Runs for so long, and says what each container got.
    pub fn run(mut self, time: Nanos) -> Vec<Outcome> {
        let end = self.count_from.after(time);
        while let Some(Reverse((now, _, event))) = self.events.pop() {
            if now > end {
                break;
            }
            let container = match event {
                Event::Posted { container, queue } => {
                    self.containers[container].queues[queue as usize].waiting.push_back(now);
                    self.arrivals(container, now);
                    self.work(container, queue, now);
                    container
                }
                Event::Alarm { container } => {
                    if self.containers[container].alarm > now {
                        continue;
                    }
                    self.containers[container].alarm = Nanos::NEVER;
                    self.arrivals(container, now);
                    container
                }
            };
            self.serve(container, now);
        }
        self.containers.into_iter().map(|container| container.outcome).collect()
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn push(&mut self, at: Nanos, event: Event) {
        self.number += 1;
        self.events.push(Reverse((at, self.number, event)));
    }

    fn late(&mut self) -> Nanos {
        Nanos(if self.oversleep == 0 { 0 } else { self.random() % self.oversleep })
    }

    fn link_now(&self, now: Nanos) -> LinkNow {
        LinkNow { free_at: self.free_at, about: self.latency_at.is_some_and(|at| now.since(at) < ABOUT) }
    }

    /// All that has left the link by now, as a worker that wakes up finds it.
    fn arrivals(&mut self, container: usize, now: Nanos) {
        let flying = &mut self.containers[container].flying;
        let count = flying.iter().take_while(|piece| piece.finish <= now).count();
        let arrived: Vec<Flying> = flying.drain(..count).collect();
        for piece in &arrived {
            self.arrived(container, piece, now);
        }
        for piece in &arrived {
            self.work(container, piece.queue, now);
        }
    }

    fn arrived(&mut self, container: usize, piece: &Flying, now: Nanos) {
        let Flying { finish, queue, bytes, last } = *piece;
        let count_from = self.count_from;
        let of = &mut self.containers[container];
        let flow = of.flows[of.queues[queue as usize].flow];
        of.scheduler.begin(now);
        of.scheduler.arrived(Bytes(bytes), Bytes(flow.bytes), finish);
        let state = &mut of.queues[queue as usize];
        state.on_link -= 1;
        let posted = if last { state.under_way.pop_front() } else { None };
        if finish >= count_from {
            let counted = &mut of.outcome;
            counted.charged += bytes + HEADERS.0;
            let window = (finish.since(count_from).0 / WINDOW.0) as usize;
            counted.windows.resize(counted.windows.len().max(window + 1), (0, 0));
            counted.windows[window].0 += bytes;
            let counts = &mut counted.flows[of.queues[queue as usize].flow];
            counts.bytes += bytes;
            if let Some(posted) = posted {
                counted.windows[window].1 += 1;
                counts.requests += 1;
                counts.times.push(now.since(posted).0);
            }
        }
        if last {
            if flow.pause == Nanos(0) {
                self.containers[container].queues[queue as usize].waiting.push_back(now);
            } else {
                self.push(now.after(flow.pause), Event::Posted { container, queue });
            }
        }
    }

    /// Sends what a queue pair has, unless it waits for its turn.
    fn work(&mut self, container: usize, queue: u32, now: Nanos) {
        if !self.containers[container].parked.contains(&queue) {
            self.containers[container].scheduler.begin(now);
            self.advance(container, queue, now);
        }
    }

    /// Lets those that wait go on, as far as the share goes: what the data plane does after each arrival.
    fn serve(&mut self, container: usize, now: Nanos) {
        let mut link = self.link_now(now);
        self.containers[container].scheduler.begin(now);
        while let Some(queue) = self.containers[container].scheduler.next(link, now) {
            self.containers[container].parked.remove(&queue);
            if !self.advance(container, queue, now) {
                self.containers[container].scheduler.leave(queue, now);
            }
            link = self.link_now(now);
        }
        let opens = self.containers[container].scheduler.opens_at(link, now);
        let arrives = self.containers[container].flying.front().map(|piece| piece.finish);
        if let Some(at) = [opens, arrives].into_iter().flatten().min() {
            // An alarm that is set stays: only what comes earlier wakes a worker earlier.
            if at < self.containers[container].alarm {
                let at = at.max(now.after(Nanos(1))).after(self.late());
                self.containers[container].alarm = at;
                self.push(at, Event::Alarm { container });
            }
        }
    }

    /// Sends pieces of a queue pair until it must wait (true) or has nothing more.
    fn advance(&mut self, container: usize, queue: u32, now: Nanos) -> bool {
        loop {
            let link = self.link_now(now);
            let of = &mut self.containers[container];
            let state = &mut of.queues[queue as usize];
            let flow = of.flows[state.flow];
            if state.waiting.is_empty() {
                return false;
            }
            let total = Bytes(flow.bytes);
            let bytes = of.scheduler.piece(total, Bytes(flow.bytes - state.sent));
            let piece = Piece {
                queue,
                bytes,
                total,
                first: !state.begun,
                fetches: flow.fetches,
                own: false,
                on_link: state.on_link,
            };
            match of.scheduler.ask(&piece, link, now) {
                Ok(()) => {}
                Err(Closed::Share) => {
                    of.parked.insert(queue);
                    return true;
                }
                Err(Closed::Queue) => return false,
            }
            state.sent += bytes.0;
            state.begun = true;
            state.on_link += 1;
            let last = state.sent == flow.bytes;
            if last {
                (state.sent, state.begun) = (0, false);
                state.under_way.extend(state.waiting.pop_front());
            }
            let airtime = of.airtime.of(bytes.plus(HEADERS));
            let finish = match self.link {
                None => now.after(airtime),
                Some(_) => {
                    self.free_at = finish(self.free_at, now, airtime);
                    self.free_at
                }
            };
            if of.scheduler.is_urgent(total) {
                self.latency_at = Some(now);
            }
            of.flying.push_back(Flying { finish, queue, bytes: bytes.0, last });
        }
    }
}
