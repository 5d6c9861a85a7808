//! The software device: bytes are copied by processors, within a container and between those of one node.
//!
//! - [`requester`] brings pieces to their responders, over the [`modelled`] link if there is one; `express` is the road inlined.
//! - [`respond`] is the responder, whoever asks.
//! - [`link`], [`wire`], [`source`], [`bounce`], [`names`]: rings between two proxies, and what is said over them; [`remote`] is their
//!   requester's end, [`serve`] their responder's, [`connect`] joins queue pairs to them.
//! - [`grants`]: requests to neighbours that need no responder.

pub mod bounce;
mod connect;
pub mod control;
mod express;
mod gather;
pub mod grants;
pub mod link;
pub mod links;
pub mod modelled;
pub mod names;
pub mod qp;
mod remote;
mod requester;
pub mod respond;
mod serve;
pub(crate) mod source;
pub mod tickets;
pub mod wire;

use super::{Cut, Device, Posted, WorkPiece};
use crate::memory::Pieces;
use crate::pacing::Nanos;
use crate::plane::{self, qp::Receiving};
use grants::Looks;
use grants::giving::Wish;
use link::{Link, LinkFault};
use links::{LinkId, Links};
use modelled::ModelledLink;
use qp::{Peer, SoftQp, Way, WireSequence};
use ringfence_protocol::verbs::QpAttrMask as Mask;
use ringfence_sched::{Allowance, BitRate};
use rustix::fd::{AsFd, BorrowedFd};
use tickets::{Stop, Ticket};

/// A data plane on this device.
pub type Plane = plane::Plane<Soft>;
/// A queue pair on it.
pub type Qp = plane::qp::Qp<Soft>;
/// A send request on it.
pub type Wqe = plane::qp::Wqe<Soft>;
/// The worker thread of such a plane.
pub type Worker = crate::worker::Worker<Soft>;
/// What that tells the control thread.
pub type Notice = plane::Notice<Task>;

/// Where a queue pair is told to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// This port.
    Own,
    /// The port with this LID.
    Port(u16),
}

/// What a link needs of the control thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// A region must be shared with the other end of a link.
    Share {
        /// The link.
        link: LinkId,
        /// The region's name.
        share: u32,
    },
    /// A link needs a buffer for memory that is not shared with neighbours.
    Bounce {
        /// The link.
        link: LinkId,
    },
    /// The other end of a link may be granted something.
    Grant {
        /// The link.
        link: LinkId,
        /// What.
        wish: Wish,
    },
    /// The other end of a link broke the protocol.
    Fault {
        /// The link.
        link: LinkId,
        /// How.
        fault: LinkFault,
    },
}

/// The device of one container.
#[derive(Debug, Default)]
pub struct Soft {
    /// Links to other proxies.
    pub links: Links,
    pub(crate) modelled: Option<ModelledLink>,
    /// For the next verb that takes grants back.
    tickets: Vec<Ticket>,
    /// For queue pairs in error.
    stopping: Vec<Stop>,
    /// When what neighbours do by themselves is counted.
    pub(crate) looks: Looks,
    /// Queue pairs that owe their peers an acknowledge at the end of a link's turn.
    acknowledges: Vec<u32>,
    from: Pieces,
    to: Pieces,
    outgoing: source::Staging,
    incoming: source::Incoming,
    /// Room for a piece that is not copied to its place at once.
    aside: Vec<u8>,
    /// Nothing goes an inlined road, so that those can be compared with the road itself.
    #[cfg(test)]
    pub(crate) long_way_only: bool,
    /// Requests that went an inlined road.
    #[cfg(test)]
    pub(crate) went_short: usize,
}

impl Soft {
    /// The device, over this modelled link if there is to be one.
    #[must_use]
    pub fn new(modelled: Option<ModelledLink>) -> Self {
        Self { modelled, ..Self::default() }
    }
}

impl Device for Soft {
    type Qp = SoftQp;
    type Work = Way;
    type Destination = Destination;
    type Notice = Task;

    fn link_rate(&self) -> Option<BitRate> {
        self.modelled.as_ref().map(ModelledLink::rate)
    }

    #[inline]
    fn link_now(&self, now: Nanos) -> ringfence_sched::LinkNow {
        self.modelled.as_ref().map_or_else(Default::default, |link| link.link_now(now))
    }

    #[inline(always)]
    fn cut(qp: &Qp, _: &Wqe) -> Cut {
        Cut::Into(if qp.device.peer == Peer::Local { u32::MAX } else { wire::LONGEST })
    }

    #[inline(always)]
    fn is_own(qp: &Qp) -> bool {
        qp.device.peer == Peer::Local
    }

    #[inline(always)]
    fn express(plane: &mut Plane, queue: u32, allowance: Allowance) -> usize {
        #[cfg(test)]
        if plane.device.long_way_only {
            return 0;
        }
        let went = plane.express(queue, allowance);
        #[cfg(test)]
        {
            plane.device.went_short += went;
        }
        went
    }

    #[inline(always)]
    fn holds_back(plane: &mut Plane, queue: u32, index: usize) -> bool {
        match plane.qps[queue as usize].as_ref().map(|qp| qp.device.peer) {
            Some(Peer::Link(link)) => plane.waits_for_grant(queue, index, link),
            _ => false,
        }
    }

    #[inline(always)]
    fn post(plane: &mut Plane, index: usize, piece: &WorkPiece) -> Posted {
        plane.send_piece(index, piece)
    }

    #[inline(always)]
    fn commit(&mut self, qp: &Qp) {
        if let Peer::Link(link) = qp.device.peer
            && let Some(link) = self.links.get_mut(link)
        {
            link.flush();
        }
    }

    #[inline(always)]
    fn poll(plane: &mut Plane) -> bool {
        let mut worked = false;
        if !plane.device.links.is_empty() {
            worked |= plane.serve_links();
            if plane.device.looks.due(plane.now) {
                plane.count_uses();
            }
        }
        if plane.device.modelled.as_ref().is_some_and(ModelledLink::is_busy) {
            worked |= plane.serve_wire();
        }
        if !plane.device.stopping.is_empty() {
            worked |= plane.see_stops();
        }
        worked
    }

    #[inline(always)]
    fn end_turn(plane: &mut Plane) {
        if !plane.device.links.is_empty() {
            plane.device.links.iter_mut().for_each(Link::flush);
        }
    }

    fn unused_receive(qp: &mut Qp) -> Option<Receiving> {
        qp.device.responder.receiving.take()
    }

    fn has_stopped(qp: &Qp) -> bool {
        qp.device.stopping == 0
    }

    fn modified(plane: &mut Plane, queue: u32, mask: u32, destination: Option<Destination>) {
        if let (Some(destination), true) = (destination, mask & Mask::AV.0 != 0) {
            plane.connect(queue, destination);
        }
        if mask & (Mask::ACCESS_FLAGS.0 | Mask::AV.0 | Mask::DEST_QPN.0 | Mask::MAX_DEST_RD_ATOMIC.0) != 0 {
            // What was granted was by the former rights, to the former peer.
            plane.end_grants(queue);
        }
        if let Some(qp) = &mut plane.qps[queue as usize] {
            // Both are set once in a life, before there is a request.
            if mask & Mask::RQ_PSN.0 != 0 {
                qp.device.responder.sequence = WireSequence::first(qp.attr.rq_psn);
            }
            if mask & Mask::SQ_PSN.0 != 0 {
                qp.device.first = WireSequence::first(qp.attr.sq_psn);
            }
        }
        plane.adopt_peers(queue);
    }

    fn reset(plane: &mut Plane, queue: u32) {
        let Some(qp) = &mut plane.qps[queue as usize] else { return };
        qp.device = SoftQp::default();
        let number = qp.number;
        plane.forget_stops(queue);
        let tickets = plane.withdraw(queue, number);
        plane.keep_tickets(tickets);
        plane.forget_grants(number);
    }

    fn failed(plane: &mut Plane, queue: u32) {
        let Some(number) = plane.qps[queue as usize].as_ref().map(|qp| qp.number) else { return };
        let tickets = plane.withdraw(queue, number);
        plane.stop(queue, &tickets);
        plane.keep_tickets(tickets);
    }

    fn removed(plane: &mut Plane, qp: &mut Qp) {
        let tickets = plane.withdraw(qp.queue, qp.number);
        plane.keep_tickets(tickets);
        plane.forget_grants(qp.number);
    }

    #[inline(always)]
    fn wants_time(&self) -> bool {
        !self.links.is_empty() || !self.stopping.is_empty()
    }

    fn wake_at(&self) -> Option<Nanos> {
        let looks = self.looks.wake_at().filter(|_| !self.links.is_empty());
        let arrives = self.modelled.as_ref().and_then(ModelledLink::arrives);
        let stops = self.stopping.iter().map(Stop::ends).min();
        [looks, arrives, stops].into_iter().flatten().min()
    }

    fn prepare_sleep(&self) -> bool {
        // All of them, whatever the first says.
        self.links.iter().filter(|link| !link.prepare_sleep()).count() == 0
    }

    fn awake(&self) {
        self.links.iter().for_each(Link::awake);
    }

    fn wakers(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.links.iter().map(|link| link.bell.as_fd())
    }

    fn woken(plane: &mut Plane) {
        plane.device.looks.hasten();
        plane.silence_links();
    }
}
