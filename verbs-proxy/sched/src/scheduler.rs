//! All decisions for one container together: its rates, the turns of its queue pairs, its window on the link.

use crate::HEADERS;
use crate::bucket::Waiting;
use crate::caps::{Allowance, Caps, Cost};
use crate::order::{Order, Party};
use crate::turns::{Lane, Quantum, Turns};
use crate::units::{BitRate, Bytes, Nanos, OpRate, Ops, Weight};
use crate::window::Window;

/// What a class changes. None of them is faster in itself: a class says what a container wants of its share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Class {
    /// Small requests first: up to [`URGENT`], undivided, before the container's own larger requests and under a cap and a
    /// window of their own, so that they never wait for what the larger ones have taken. Other containers keep their
    /// windows short meanwhile. What small requests ask for beyond the container's share of the link is shared by weight as
    /// everybody's: it is divided and waits.
    Latency,
    /// Queue pairs take turns by operations: each has as many, whatever their sizes.
    Ops,
    /// Queue pairs take turns by bytes: each has as many, whatever the number of operations.
    Bulk,
    /// By both, whichever is spent first. Without a weight, queue pairs compete on the link singly, as on an RNIC.
    #[default]
    None,
}

/// What a container may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Rate at which bytes leave its memory.
    pub bandwidth: Option<BitRate>,
    /// Rate at which it fetches bytes.
    pub fetching: Option<BitRate>,
    /// Rate of its operations.
    pub ops: Option<OpRate>,
    /// Its part of a contended link; `None` to compete by queue pair.
    pub weight: Option<Weight>,
    /// What it wants of its share.
    pub class: Class,
}

/// The longest request that is urgent in class latency.
pub const URGENT: Bytes = Bytes(16 << 10);
/// A piece as an RNIC arbitrates between queue pairs.
pub const DEVICE_PIECE: Bytes = Bytes(16 << 10);
/// The longest piece on a device without a modelled link: large enough that the bookkeeping does not show, small enough that no
/// request holds up the others for longer than some 20 µs.
pub const LONGEST_PIECE: Bytes = Bytes(256 << 10);
/// The shortest piece that a low rate makes.
const SHORTEST_PIECE: Bytes = Bytes(4 << 10);
/// Operations of one turn.
const TURN: Ops = Ops(32);
/// What another container may READ without asking for each, at least: a page, and something for the next.
const READ_AHEAD: Bytes = Bytes(8 << 10);

/// A piece of a work request that would go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The queue pair.
    pub queue: u32,
    /// Its data.
    pub bytes: Bytes,
    /// The data of the whole request.
    pub total: Bytes,
    /// It is the first of its request, which then counts as an operation.
    pub first: bool,
    /// A READ or an atomic.
    pub fetches: bool,
    /// The responder is the same container.
    pub own: bool,
    /// Pieces of this queue pair that are on the link.
    pub on_link: u32,
}

/// The link at this moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkNow {
    /// When all that is on it has left it.
    pub free_at: Nanos,
    /// A latency-class container sent lately.
    pub about: bool,
}

/// Why a piece must wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// For the container's share: the queue pair waits for its turn, which [`Scheduler::next`] names.
    Share,
    /// For the queue pair's own piece on the link.
    Queue,
}

/// The scheduler of one container.
#[derive(Clone, Debug)]
pub struct Scheduler {
    class: Class,
    caps: Caps,
    /// Class latency: the caps of urgent pieces, which are charged to the others as well.
    urgent_caps: Caps,
    capped: bool,
    /// Whose what leaves is, while several want more of it than the rate allows.
    order: Order,
    turns: Turns,
    shut_until: [Nanos; Lane::COUNT],
    link: Option<Link>,
    clock: Nanos,
    fresh: bool,
}

#[derive(Clone, Debug)]
enum Link {
    /// One piece of each queue pair.
    ByQueue,
    /// As much as the container's weight gives it.
    Shared(Window),
}

impl Scheduler {
    /// Nothing waits and all buckets are full. `link`: the rate of the link that containers share.
    #[must_use]
    pub fn new(policy: &Policy, link: Option<BitRate>, now: Nanos) -> Self {
        let Policy { bandwidth, fetching, ops, weight, class } = *policy;
        let caps = Caps::new(bandwidth, fetching, ops, now);
        let urgent_caps = if class == Class::Latency { caps.clone() } else { Caps::default() };
        let by_queue = class == Class::None && weight.is_none();
        let link = link.map(|rate| match by_queue {
            true => Link::ByQueue,
            false => Link::Shared(Window::new(rate, weight.unwrap_or_default(), now)),
        });
        // A turn is one full piece: queue pairs alternate as often as they can at no more than a piece's debt.
        let turn = longest(&link, &caps).max(URGENT).plus(HEADERS);
        let quantum =
            Quantum { bytes: (class != Class::Ops).then_some(turn), ops: (class != Class::Bulk).then_some(TURN) };
        Self {
            class,
            capped: !caps.is_empty(),
            caps,
            urgent_caps,
            order: Order::default(),
            turns: Turns::new(quantum),
            shut_until: [Nanos(0); Lane::COUNT],
            link,
            clock: now,
            fresh: true,
        }
    }

    /// Whether nothing is ever held back.
    #[inline]
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.capped && self.link.is_none()
    }

    /// Whether queue pairs wait for their turn.
    #[inline]
    #[must_use]
    pub fn any_waits(&self) -> bool {
        !self.turns.is_empty()
    }

    /// Whether the next turn of the worker must know the time.
    #[inline]
    #[must_use]
    pub fn wants_clock(&self) -> bool {
        self.link.is_some()
            || (self.capped
                && (self.caps.wants_clock()
                    || self.urgent_caps.wants_clock()
                    || self.any_waits()
                    || self.order.any_reader()))
    }

    /// What an inlined road may let go, without a clock and without [`Self::ask`]; it must be charged by [`Self::spend`] afterwards. `None`
    /// if every piece must ask.
    #[inline]
    #[must_use]
    pub fn in_hand(&self) -> Option<Allowance> {
        if self.link.is_some() || self.any_waits() || self.order.any_reader() {
            return None;
        }
        let allowance = self.caps.in_hand();
        if self.class == Class::Latency {
            // What is not urgent must not use up what is kept for urgent requests.
            return Some(Allowance { longest: URGENT, ..allowance.min(self.urgent_caps.in_hand()) });
        }
        Some(allowance)
    }

    /// How many bytes another container may READ at a time without asking for each, if [`Self::may_be_read`] lets them go; none while
    /// requests of the container's own wait, as they would wait for all of these. `None` if no rate limits that.
    #[must_use]
    pub fn read_ahead(&self) -> Option<Bytes> {
        let (burst, _) = self.caps.burst_out().filter(|_| self.capped)?;
        Some(if self.any_waits() { Bytes(0) } else { Bytes(burst.0 / 4).max(READ_AHEAD) })
    }

    /// Whether these may go together with the READ that asks, though that alone may leave nothing: it is a matter of less than a
    /// millisecond.
    #[must_use]
    pub fn reads_ahead_with(&self) -> bool {
        self.caps.burst_out().is_some_and(|(_, millisecond)| millisecond >= READ_AHEAD)
    }

    fn waiting(&self) -> Waiting {
        if self.any_waits() { Waiting::Here } else { Waiting::Elsewhere }
    }

    /// Charges what went without [`Self::ask`].
    #[inline]
    pub fn spend(&mut self, out: Bytes, fetched: Bytes, ops: Ops) {
        if self.capped {
            let cost = Cost { out, fetched, ops };
            self.caps.charge(cost);
            self.urgent_caps.charge(cost);
            if out.0 > 0 {
                self.order.had(Party::Own, out);
            }
        }
    }

    /// Whether the clock was read for this turn, or need not be for anything that is held back.
    #[must_use]
    pub fn knows_time(&self) -> bool {
        self.is_open() || self.fresh
    }

    /// A turn of the worker begins. If `now` is no later than in the last one the clock may not have been read, and nothing
    /// is earned.
    #[inline]
    pub fn begin(&mut self, now: Nanos) {
        self.fresh = now > self.clock;
        if self.fresh {
            self.clock = now;
            if self.order.any_reader() {
                self.order.forget_late(now);
            }
            if self.capped && (self.caps.wants_clock() || self.urgent_caps.wants_clock()) {
                self.refill(now);
            }
        }
    }

    /// Earns what the time since the last look is worth, whether anything needs it yet or not.
    pub fn refill(&mut self, now: Nanos) {
        let waiting = self.waiting();
        self.caps.refill(now, waiting);
        self.urgent_caps.refill(now, waiting);
    }

    /// Data of the next piece of a request of `total`, of which `left` has not gone. An urgent request is not divided, as long as
    /// the container's urgent requests ask for no more than its share.
    #[must_use]
    pub fn piece(&self, total: Bytes, left: Bytes) -> Bytes {
        // Of this turn: nobody may have looked at the window since the last request.
        let now = self.clock;
        let whole =
            self.is_urgent(total) && !matches!(&self.link, Some(Link::Shared(window)) if !window.has_credit(now));
        if whole { left } else { left.min(longest(&self.link, &self.caps)) }
    }

    /// Whether a request of `total` comes before the container's others.
    #[inline]
    #[must_use]
    pub fn is_urgent(&self, total: Bytes) -> bool {
        self.class == Class::Latency && total <= URGENT
    }

    /// Schedules a piece: lets it go and charges it, or has its queue pair wait.
    pub fn ask(&mut self, piece: &Piece, link: LinkNow, now: Nanos) -> Result<(), Closed> {
        let urgent = self.is_urgent(piece.total);
        let lane = Lane::of(urgent, piece.fetches);
        let own_turn = match self.turns.any_in(lane) {
            true => self.turns.front(lane) == Some(piece.queue),
            false => true,
        };
        if !own_turn {
            self.turns.join(piece.queue, lane);
            return Err(Closed::Share);
        }
        match &mut self.link {
            None => {}
            Some(Link::ByQueue) if piece.on_link > 0 => {
                self.turns.leave(piece.queue);
                return Err(Closed::Queue);
            }
            Some(Link::ByQueue) => {}
            Some(Link::Shared(window)) => {
                let open = window.open(urgent, link.about, link.free_at, now);
                if !open {
                    self.turns.join(piece.queue, lane);
                    // What waits for the link holds nobody up who wants of the rate.
                    self.order.gave_up(Party::Own);
                    return Err(Closed::Share);
                }
            }
        }
        let cost = cost(piece);
        if self.capped {
            if let Err(until) = self.affords(cost, urgent, now) {
                self.shut_until[lane as usize] = until;
                self.turns.join(piece.queue, lane);
                return Err(Closed::Share);
            }
            self.caps.charge(cost);
            if urgent {
                self.urgent_caps.charge(cost);
            }
            if cost.out.0 > 0 {
                self.order.had(Party::Own, cost.out);
            }
        }
        if let Some(Link::Shared(window)) = &mut self.link {
            window.sent(piece.bytes.plus(HEADERS), urgent, now);
        }
        self.turns.charge(piece.queue, piece.bytes.plus(HEADERS), Ops(u64::from(piece.first)));
        Ok(())
    }

    fn affords(&mut self, cost: Cost, urgent: bool, now: Nanos) -> Result<(), Nanos> {
        let (fresh, waiting) = (self.fresh, self.waiting());
        // Urgent requests have a rate of their own, by which none of them waits for anything else.
        let shares = cost.out.0 > 0 && !urgent;
        if shares && self.order.any_reader() {
            // Whether one is late needs a clock that is right.
            let turn = if fresh { self.order.turn(Party::Own, self.room(), now) } else { Err(now.after(Nanos(1))) };
            if let Err(at) = turn {
                self.waits_for_rate(cost, at, now);
                self.caps.hold_out(now);
                return Err(at);
            }
        }
        let caps = if urgent { &mut self.urgent_caps } else { &mut self.caps };
        if caps.covers(cost) {
            return Ok(());
        }
        // What is not in hand needs a clock that is right.
        if !fresh {
            return Err(now.after(Nanos(1)));
        }
        let open = caps.open(cost, now, waiting);
        if let (true, Err(at)) = (shares, open) {
            self.waits_for_rate(cost, at, now);
        }
        open
    }

    /// Own requests of this cost come again at this time. Nobody waits for them if they wait for something else than what leaves.
    fn waits_for_rate(&mut self, cost: Cost, at: Nanos, now: Nanos) {
        let rest = Cost { out: Bytes(0), ..cost };
        match self.caps.open(rest, now, self.waiting()) {
            Ok(()) => self.order.waits(Party::Own, at),
            Err(_) => self.order.gave_up(Party::Own),
        }
    }

    /// How much more than another one who waits a party may have had: what the rate lets go at once.
    fn room(&self) -> Bytes {
        self.caps.burst_out().map_or(Bytes(0), |(burst, _)| burst)
    }

    /// The queue pair whose turn it is, if it may send something. It stays in front until [`Self::ask`] ends its turn, has it
    /// wait in another lane, or [`Self::leave`] says that it has nothing more to send.
    pub fn next(&mut self, link: LinkNow, now: Nanos) -> Option<u32> {
        for level in Lane::LEVELS {
            if !level.iter().any(|lane| self.turns.any_in(*lane)) {
                continue;
            }
            if let Some(Link::Shared(window)) = &mut self.link
                && !window.open(level[0].is_urgent(), link.about, link.free_at, now)
            {
                continue;
            }
            let shut = &self.shut_until;
            if let Some(lane) = self.turns.choose(level, |lane| shut[lane as usize] <= now) {
                return self.turns.front(lane);
            }
        }
        None
    }

    /// Whether no more than one queue pair waits, for a rate: when that lets it go, it has nobody to take turns with and may
    /// leave with more to send. On a link it stays, because whoever leaves wants nothing more of the share.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.link.is_none() && self.turns.waiting() <= 1
    }

    /// A queue pair waits for nothing here any more.
    pub fn leave(&mut self, queue: u32, now: Nanos) {
        self.turns.leave(queue);
        if !Lane::LEVELS[1].iter().any(|lane| self.turns.any_in(*lane))
            && let Some(Link::Shared(window)) = &mut self.link
        {
            window.content(now);
        }
    }

    /// A queue pair is gone.
    pub fn forget(&mut self, queue: u32) {
        self.turns.forget(queue);
    }

    /// A piece of a request of `total` has left the link at this time.
    pub fn arrived(&mut self, bytes: Bytes, total: Bytes, at: Nanos) {
        let urgent = self.is_urgent(total);
        if let Some(Link::Shared(window)) = &mut self.link {
            window.arrived(bytes.plus(HEADERS), urgent, at);
        }
    }

    /// Bytes on a link that is shared by weight, headers too.
    #[must_use]
    pub fn on_link(&self) -> Bytes {
        match &self.link {
            Some(Link::Shared(window)) => window.on_link(),
            _ => Bytes(0),
        }
    }

    /// Whether bytes may leave because the neighbour with this port READs them; else when, which it is told. Charged by
    /// [`Self::was_read`].
    pub fn may_be_read(&mut self, port: u16, bytes: Bytes, now: Nanos) -> Result<(), Nanos> {
        if !self.capped {
            return Ok(());
        }
        let party = Party::Reader(port);
        if !self.any_waits() {
            self.order.gave_up(Party::Own);
        }
        let turn = self.order.turn(party, self.room(), now);
        if turn.is_err() {
            self.caps.hold_out(now);
        }
        let may = turn.and_then(|()| self.lets_out(bytes, now));
        if let Err(at) = may {
            self.order.waits(party, at);
        }
        may
    }

    /// Whether the neighbour with this port may READ so much more, though it has not asked for it.
    pub fn may_be_read_unasked(&mut self, port: u16, bytes: Bytes, now: Nanos) -> bool {
        !self.capped || (!self.order.any_but(Party::Reader(port), now) && self.lets_out(bytes, now).is_ok())
    }

    fn lets_out(&mut self, bytes: Bytes, now: Nanos) -> Result<(), Nanos> {
        let cost = Cost { out: charged(bytes), ..Cost::default() };
        if self.caps.covers(cost) {
            return Ok(());
        }
        self.caps.open(cost, now, self.waiting())
    }

    /// The neighbour with this port READ this.
    pub fn was_read(&mut self, port: u16, bytes: Bytes) {
        if self.capped {
            self.caps.charge(Cost { out: charged(bytes), ..Cost::default() });
            self.order.had(Party::Reader(port), charged(bytes));
            // Requests that wait here were told a time, which holds, or waited for this very neighbour.
            if self.any_waits() {
                self.shut_until = [Nanos(0); Lane::COUNT];
            } else {
                self.caps.expect_reads();
            }
        }
    }

    /// When somebody who waits may go, if nothing arrives before.
    #[must_use]
    pub fn opens_at(&self, link: LinkNow, now: Nanos) -> Option<Nanos> {
        // Both a rate and the link must be open, and for the same: what either says of others wakes nobody up.
        let opens = |level: &[Lane; 2]| {
            let lanes = level.iter().filter(|lane| self.turns.any_in(**lane));
            let shut = lanes.map(|lane| self.shut_until[*lane as usize]).min()?;
            let closed = match &self.link {
                Some(Link::Shared(window)) => window.opens_at(level[0].is_urgent(), link.free_at, now)?,
                _ => now,
            };
            Some(shut.max(closed).max(now))
        };
        Lane::LEVELS.iter().filter_map(opens).min()
    }
}

fn longest(link: &Option<Link>, caps: &Caps) -> Bytes {
    let by_link = match link {
        None => LONGEST_PIECE,
        Some(Link::ByQueue) => DEVICE_PIECE,
        Some(Link::Shared(window)) => window.piece(),
    };
    // A burst is a millisecond: a piece that takes longer makes the others wait, and the rate uneven.
    caps.burst().map_or(by_link, |burst| by_link.min(burst.max(SHORTEST_PIECE)))
}

/// A cap is about the application's bytes, as users measure it; a flood of empty requests still costs.
#[must_use]
pub fn charged(bytes: Bytes) -> Bytes {
    bytes.max(HEADERS)
}

fn cost(piece: &Piece) -> Cost {
    let bytes = charged(piece.bytes);
    let leaves = !piece.fetches || piece.own;
    Cost {
        out: if leaves { bytes } else { Bytes(0) },
        fetched: if piece.fetches { bytes } else { Bytes(0) },
        ops: Ops(u64::from(piece.first)),
    }
}
