//! The modelled link: what a software device lacks to be shared as an RNIC is, a rate. All proxies of a device advance one clock.

use crate::device::WorkPiece;
use crate::fabric::clock::WireClock;
use crate::pacing::Nanos;
use ringfence_sched::link::{Airtime, finish};
use ringfence_sched::{BitRate, Bytes, HEADERS, LinkNow, Nanos as Time};
use std::collections::VecDeque;

/// The link as one proxy sees it, and its own pieces on it.
#[derive(Debug)]
pub struct ModelledLink {
    clock: WireClock,
    rate: BitRate,
    airtime: Airtime,
    pieces: VecDeque<OnWire>,
}

#[derive(Clone, Copy, Debug)]
struct OnWire {
    /// When it arrives.
    finish: Nanos,
    piece: WorkPiece,
}

impl ModelledLink {
    /// A link of this rate.
    #[must_use]
    pub fn new(clock: WireClock, rate: BitRate) -> Self {
        Self { clock, rate, airtime: Airtime::new(rate), pieces: VecDeque::new() }
    }

    pub(super) fn rate(&self) -> BitRate {
        self.rate
    }

    pub(super) fn link_now(&self, now: Nanos) -> LinkNow {
        LinkNow { free_at: Time(self.clock.free_at(now)), about: self.clock.latency_about(now) }
    }

    /// Whether pieces are on it.
    #[inline(always)]
    pub(crate) fn is_busy(&self) -> bool {
        !self.pieces.is_empty()
    }

    /// A piece goes on it; `urgent`: others are to keep what they have on it short.
    pub(super) fn send(&mut self, piece: &WorkPiece, urgent: bool, now: Nanos) {
        if urgent {
            self.clock.note_latency(now);
        }
        let airtime = self.airtime.of(Bytes(piece.bytes.into()).plus(HEADERS));
        let finish = self.clock.reserve(|free_at| finish(Time(free_at), Time(now), airtime).0, now);
        self.pieces.push_back(OnWire { finish, piece: *piece });
    }

    /// The next piece that has arrived, and when.
    pub(super) fn arrived(&mut self, now: Nanos) -> Option<(WorkPiece, Nanos)> {
        let on_wire = self.pieces.pop_front_if(|on_wire| on_wire.finish <= now)?;
        Some((on_wire.piece, on_wire.finish))
    }

    /// When the next piece arrives.
    pub(super) fn arrives(&self) -> Option<Nanos> {
        self.pieces.front().map(|on_wire| on_wire.finish)
    }
}
