//! When a piece of a work request may go: the container's scheduler, and the modelled link's clock.

use crate::fabric::clock::WireClock;
use crate::pacing::Nanos;
use ringfence_sched::link::{Airtime, finish};
use ringfence_sched::{Allowance, BitRate, Bytes, Closed, HEADERS, Nanos as Time, Ops, Piece, Policy, Road, Scheduler};
use std::collections::VecDeque;

/// A piece on the modelled link.
#[derive(Clone, Copy, Debug)]
pub struct OnWire {
    /// When it arrives.
    pub finish: Nanos,
    /// Bell number.
    pub queue: u32,
    /// [`super::qp::Qp::incarnation`], in case the bell number has been given to another queue pair.
    pub incarnation: u64,
    /// The queue pair's epoch when it was sent.
    pub epoch: u32,
    /// Work request.
    pub sequence: u32,
    /// Offset in the work request.
    pub offset: u32,
    /// Bytes.
    pub bytes: u32,
    /// Bytes of the whole work request.
    pub total: u32,
}

#[derive(Debug)]
struct Wire {
    clock: WireClock,
    airtime: Airtime,
    pieces: VecDeque<OnWire>,
}

/// The policy's grip on the data path.
#[derive(Debug)]
pub struct Shaping {
    scheduler: Scheduler,
    wire: Option<Wire>,
}

/// What the scheduler must know of a piece besides [`OnWire`].
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// A READ or an atomic.
    pub fetches: bool,
    /// The responder is this container.
    pub own: bool,
    /// Pieces of the queue pair that are on the link.
    pub on_wire: u32,
}

impl Shaping {
    /// Without a cap and a modelled link everything goes at once.
    #[must_use]
    pub fn new(policy: &Policy, link: Option<(WireClock, BitRate)>, now: Nanos) -> Self {
        let scheduler = Scheduler::new(policy, link.as_ref().map(|(_, rate)| *rate), Time(now));
        let wire = link.map(|(clock, rate)| Wire { clock, airtime: Airtime::new(rate), pieces: VecDeque::new() });
        Self { scheduler, wire }
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

    /// What may go by the short way unasked; [`Self::spend`] follows.
    #[inline(always)]
    #[must_use]
    pub fn in_hand(&self) -> Option<Allowance> {
        self.scheduler.in_hand()
    }

    /// Charges what went by the short way.
    #[inline(always)]
    pub fn spend(&mut self, out: Bytes, fetched: Bytes, ops: Ops) {
        self.scheduler.spend(out, fetched, ops);
    }

    /// Whether pieces are on the modelled link.
    #[inline(always)]
    #[must_use]
    pub fn on_wire(&self) -> bool {
        self.wire.as_ref().is_some_and(|wire| !wire.pieces.is_empty())
    }

    /// Whether queues are parked.
    #[inline(always)]
    #[must_use]
    pub fn any_parked(&self) -> bool {
        self.scheduler.any_waits()
    }

    /// Bytes of the next piece of a request of `total`, of which `left` has not been handed over.
    #[must_use]
    pub fn piece(&self, total: u32, left: u32) -> u32 {
        let piece = self.scheduler.piece(Bytes(total.into()), Bytes(left.into()));
        // No more than `left`, so that the conversion is exact.
        piece.0 as u32
    }

    fn road(&self, now: Nanos) -> Road {
        self.wire.as_ref().map_or_else(Road::default, |wire| Road {
            free_at: Time(wire.clock.free_at(now)),
            about: wire.clock.latency_about(now),
        })
    }

    /// Asks for a piece. Without a modelled link, it may be delivered at once (`Ok(true)`); else it is on the link now
    /// (`Ok(false)`). With [`Closed::Share`] its queue is parked.
    pub fn admit(&mut self, piece: OnWire, kind: Kind, now: Nanos) -> Result<bool, Closed> {
        let road = self.road(now);
        let asked = Piece {
            queue: piece.queue,
            bytes: Bytes(piece.bytes.into()),
            total: Bytes(piece.total.into()),
            first: piece.offset == 0,
            fetches: kind.fetches,
            own: kind.own,
            on_link: kind.on_wire,
        };
        self.scheduler.ask(&asked, road, Time(now))?;
        let Some(wire) = &mut self.wire else { return Ok(true) };
        if self.scheduler.is_urgent(asked.total) {
            wire.clock.note_latency(now);
        }
        let airtime = wire.airtime.of(asked.bytes.plus(HEADERS));
        let at = wire.clock.reserve(|free_at| finish(Time(free_at), Time(now), airtime).0, now);
        wire.pieces.push_back(OnWire { finish: at, ..piece });
        Ok(false)
    }

    /// The next piece that has arrived.
    pub fn arrived(&mut self, now: Nanos) -> Option<OnWire> {
        let wire = self.wire.as_mut()?;
        let piece = wire.pieces.pop_front_if(|piece| piece.finish <= now)?;
        self.scheduler.arrived(Bytes(piece.bytes.into()), Bytes(piece.total.into()), Time(piece.finish));
        Some(piece)
    }

    /// The parked queue whose turn it is, if the container may send now. It stays parked until [`Self::leave`].
    pub fn next_parked(&mut self, now: Nanos) -> Option<u32> {
        let road = self.road(now);
        self.scheduler.next(road, Time(now))
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

    /// A queue pair is gone; another may get its bell number.
    pub fn forget(&mut self, queue: u32) {
        self.scheduler.forget(queue);
    }

    /// Whether bytes may leave because another container READs them; else how long it should wait.
    pub fn may_be_read(&mut self, bytes: u32, now: Nanos) -> Result<(), Nanos> {
        self.scheduler.may_be_read(Bytes(bytes.into()), Time(now)).map_err(|at| at.since(Time(now)).0)
    }

    /// How many bytes another container may READ before it asks again; `None` if it need not ask.
    #[must_use]
    pub fn read_ahead(&self) -> Option<u64> {
        self.scheduler.read_ahead().map(|bytes| bytes.0)
    }

    /// Another container READ this.
    pub fn was_read(&mut self, bytes: u32) {
        self.scheduler.was_read(Bytes(bytes.into()));
    }

    /// When something here needs the worker.
    #[must_use]
    pub fn wake_at(&self, now: Nanos) -> Option<Nanos> {
        let arrives = self.wire.as_ref().and_then(|wire| wire.pieces.front()).map(|piece| piece.finish);
        let opens = self.scheduler.opens_at(self.road(now), Time(now)).map(|at| at.0);
        [arrives, opens].into_iter().flatten().min()
    }
}
