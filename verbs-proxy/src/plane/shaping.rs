//! When a piece of a work request may go: the container's scheduler, in the data plane's words.

use crate::device::WorkPiece;
use crate::pacing::Nanos;
use ringfence_sched::{Allowance, BitRate, Bytes, Closed, LinkNow, Nanos as Time, Ops, Piece, Policy, Scheduler};

/// The policy's grip on the data path.
#[derive(Debug)]
pub struct Shaping {
    scheduler: Scheduler,
}

/// What the scheduler must know of a piece besides [`WorkPiece`].
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// A READ or an atomic.
    pub fetches: bool,
    /// The responder is this container.
    pub own: bool,
    /// Pieces of the queue pair that are in flight.
    pub in_flight: u32,
}

impl Shaping {
    /// Without a cap and a link everything goes at once. `link`: the rate of the link that containers share.
    #[must_use]
    pub fn new(policy: &Policy, link: Option<BitRate>, now: Nanos) -> Self {
        Self { scheduler: Scheduler::new(policy, link, Time(now)) }
    }

    /// Whether the next turn must know the time.
    #[inline(always)]
    #[must_use]
    pub fn wants_clock(&self) -> bool {
        self.scheduler.wants_clock()
    }

    /// Whether the time of this turn is right, where that matters here.
    #[must_use]
    pub fn knows_time(&self) -> bool {
        self.scheduler.knows_time()
    }

    /// A turn begins; the time is as in the last one if nobody wanted to know it.
    #[inline(always)]
    pub fn begin(&mut self, now: Nanos) {
        if !self.scheduler.is_open() {
            self.scheduler.begin(Time(now));
        }
    }

    /// What an inlined road may let go unasked; [`Self::spend`] follows.
    #[inline(always)]
    #[must_use]
    pub fn in_hand(&self) -> Option<Allowance> {
        self.scheduler.in_hand()
    }

    /// Charges what went unasked.
    #[inline(always)]
    pub fn spend(&mut self, out: Bytes, fetched: Bytes, ops: Ops) {
        self.scheduler.spend(out, fetched, ops);
    }

    /// Whether queues are parked.
    #[inline(always)]
    #[must_use]
    pub fn any_parked(&self) -> bool {
        self.scheduler.any_waits()
    }

    /// Bytes of the next piece of a request of `total`, of which `left` has not been posted.
    #[must_use]
    pub fn piece(&self, total: u32, left: u32) -> u32 {
        let piece = self.scheduler.piece(Bytes(total.into()), Bytes(left.into()));
        // No more than `left`, so that the conversion is exact.
        piece.0 as u32
    }

    /// Whether a request of so many bytes comes before the container's others.
    #[must_use]
    pub fn is_urgent(&self, total: u32) -> bool {
        self.scheduler.is_urgent(Bytes(total.into()))
    }

    /// Asks for a piece; if it may go, [`Self::departed`] follows some time. With [`Closed::Share`] its queue is parked.
    pub fn schedule(&mut self, piece: &WorkPiece, kind: Kind, link: LinkNow, now: Nanos) -> Result<(), Closed> {
        let asked = Piece {
            queue: piece.queue,
            bytes: Bytes(piece.bytes.into()),
            total: Bytes(piece.total.into()),
            first: piece.offset == 0,
            fetches: kind.fetches,
            own: kind.own,
            on_link: kind.in_flight,
        };
        self.scheduler.ask(&asked, link, Time(now))
    }

    /// A piece is in flight no more, since this time.
    #[inline(always)]
    pub fn departed(&mut self, piece: &WorkPiece, at: Nanos) {
        if !self.scheduler.is_open() {
            self.scheduler.arrived(Bytes(piece.bytes.into()), Bytes(piece.total.into()), Time(at));
        }
    }

    /// Bytes in flight on a link that containers share by weight, headers too.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.scheduler.on_link().0
    }

    /// The parked queue whose turn it is, if the container may send now. It stays parked until [`Self::leave`].
    pub fn next_parked(&mut self, link: LinkNow, now: Nanos) -> Option<u32> {
        self.scheduler.next(link, Time(now))
    }

    /// Whether the one queue that is parked may as well leave with requests to send: it has nobody to take turns with.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.scheduler.is_alone()
    }

    /// A queue is not parked any more.
    pub fn leave(&mut self, queue: u32, now: Nanos) {
        self.scheduler.leave(queue, Time(now));
    }

    /// Earns what the time since the last look is worth.
    #[cfg(test)]
    pub fn refill(&mut self, now: Nanos) {
        self.scheduler.refill(Time(now));
    }

    /// A queue pair is gone; another may get its bell number.
    pub fn forget(&mut self, queue: u32) {
        self.scheduler.forget(queue);
    }

    /// Whether bytes may leave because the neighbour with this port READs them; else how long it should wait.
    pub fn may_be_read(&mut self, port: u16, bytes: u32, now: Nanos) -> Result<(), Nanos> {
        self.scheduler.may_be_read(port, Bytes(bytes.into()), Time(now)).map_err(|at| at.since(Time(now)).0)
    }

    /// Whether it may READ so much more, though it has not asked for it.
    pub fn may_be_read_unasked(&mut self, port: u16, bytes: u32, now: Nanos) -> bool {
        self.scheduler.may_be_read_unasked(port, Bytes(bytes.into()), Time(now))
    }

    /// How many bytes another container may READ at a time before it asks again, if [`Self::may_be_read`]; `None` if it need not ask.
    #[must_use]
    pub fn read_ahead(&self) -> Option<u64> {
        self.scheduler.read_ahead().map(|bytes| bytes.0)
    }

    /// Whether [`Self::read_ahead`] may go together with the READ that asks.
    #[must_use]
    pub fn reads_ahead_with(&self) -> bool {
        self.scheduler.reads_ahead_with()
    }

    /// The neighbour with this port READ this.
    pub fn was_read(&mut self, port: u16, bytes: u32) {
        self.scheduler.was_read(port, Bytes(bytes.into()));
    }

    /// When something here needs the worker.
    #[must_use]
    pub fn wake_at(&self, link: LinkNow, now: Nanos) -> Option<Nanos> {
        self.scheduler.opens_at(link, Time(now)).map(|at| at.0)
    }
}
