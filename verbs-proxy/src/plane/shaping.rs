//! When a piece of a work request may go: the container's bandwidth cap and its place on the modelled link.

use crate::fabric::clock::WireClock;
use crate::launch::Class;
use crate::pacing::{Bucket, Nanos, Window, finish, window};
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
}

#[derive(Debug)]
struct Wire {
    clock: WireClock,
    link: u64,
    pieces: VecDeque<OnWire>,
    bytes: u64,
}

/// Bytes that a request costs besides its data: headers on the wire, and work for the device.
const OVERHEAD: u64 = 64;

/// How far back a piece may start on the link; longer than a worker oversleeps, shorter than a person notices.
const SLACK: Nanos = 200_000;

/// The policy's grip on the data path.
#[derive(Debug)]
pub struct Shaping {
    bucket: Option<Bucket>,
    bucket_closed_until: Nanos,
    wire: Option<Wire>,
    weight: Option<u32>,
    class: Class,
    parked: VecDeque<u32>,
}

/// Why a piece must wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// For the container's share: the queue parks.
    Container,
    /// For the queue pair's own piece on the link.
    Queue,
}

impl Shaping {
    /// Without a cap and a modelled link everything goes at once.
    #[must_use]
    pub fn new(
        bandwidth: Option<u64>,
        weight: Option<u32>,
        class: Class,
        link: Option<(WireClock, u64)>,
        now: Nanos,
    ) -> Self {
        Self {
            bucket: bandwidth.map(|rate| Bucket::new(rate, now)),
            bucket_closed_until: 0,
            wire: link.map(|(clock, link)| Wire { clock, link, pieces: VecDeque::new(), bytes: 0 }),
            weight,
            class,
            parked: VecDeque::new(),
        }
    }

    /// Whether nothing is shaped.
    #[inline(always)]
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.bucket.is_none() && self.wire.is_none()
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
        !self.parked.is_empty()
    }

    /// Bytes of one piece of a split request, now.
    #[must_use]
    pub fn chunk(&self, now: Nanos) -> u32 {
        match &self.wire {
            // Large enough that the bookkeeping does not show, small enough that no request holds up the others for
            // longer than some 20 µs.
            None => 256 << 10,
            Some(wire) => self.window(wire, now).chunk,
        }
    }

    fn window(&self, wire: &Wire, now: Nanos) -> Window {
        window(wire.link, self.weight, self.class, wire.clock.latency_about(now))
    }

    /// Asks for `bytes` of queue pair `piece.queue`, which has `own` pieces on the link. Without a modelled link, the
    /// piece may be delivered at once (`Ok(true)`); else it is on the link now (`Ok(false)`).
    pub fn admit(&mut self, piece: OnWire, own: u32, now: Nanos) -> Result<bool, Closed> {
        if self.bucket_closed_until > now {
            return Err(Closed::Container);
        }
        if let Some(wire) = &self.wire {
            match self.window(wire, now).bytes {
                // The queue pair's turn comes again when its piece has arrived.
                None if own > 0 => return Err(Closed::Queue),
                Some(bytes) if wire.bytes > 0 && wire.bytes + u64::from(piece.bytes) > u64::from(bytes) => {
                    return Err(Closed::Container);
                }
                _ => {}
            }
        }
        let cost = u64::from(piece.bytes) + OVERHEAD;
        if let Some(bucket) = &mut self.bucket {
            // The cap is about the application's bytes, as users measure it; a flood of empty requests still costs.
            let charged = u64::from(piece.bytes).max(OVERHEAD);
            if let Err(until) = bucket.take(charged, now) {
                self.bucket_closed_until = until;
                return Err(Closed::Container);
            }
        }
        let Some(wire) = &mut self.wire else { return Ok(true) };
        if self.class == Class::Latency {
            wire.clock.note_latency(now);
        }
        let at = wire.clock.reserve(|free_at| finish(free_at, now, SLACK, cost, wire.link), now);
        wire.bytes += u64::from(piece.bytes);
        wire.pieces.push_back(OnWire { finish: at, ..piece });
        Ok(false)
    }

    /// The next piece that has arrived.
    pub fn arrived(&mut self, now: Nanos) -> Option<OnWire> {
        let wire = self.wire.as_mut()?;
        let piece = wire.pieces.pop_front_if(|piece| piece.finish <= now)?;
        wire.bytes -= u64::from(piece.bytes);
        Some(piece)
    }

    /// Puts a queue behind those that already wait for the container's share.
    pub fn park(&mut self, queue: u32) {
        self.parked.push_back(queue);
    }

    /// The queue that has waited longest, if the container may send now.
    pub fn next_parked(&mut self, now: Nanos) -> Option<u32> {
        if self.bucket_closed_until > now {
            return None;
        }
        if let Some(wire) = &self.wire {
            let window = self.window(wire, now).bytes.map_or(u64::MAX, u64::from);
            if wire.bytes > 0 && wire.bytes >= window {
                return None;
            }
        }
        self.parked.pop_front()
    }

    /// When something here needs the worker.
    #[must_use]
    pub fn wake_at(&self, now: Nanos) -> Option<Nanos> {
        let piece = self.wire.as_ref().and_then(|wire| wire.pieces.front()).map(|piece| piece.finish);
        if self.parked.is_empty() {
            return piece;
        }
        if self.bucket_closed_until > now {
            return Some(piece.map_or(self.bucket_closed_until, |piece| piece.min(self.bucket_closed_until)));
        }
        // Parked for the window: the piece's arrival opens it.
        Some(piece.unwrap_or(now))
    }
}
