//! What the software device keeps of queue pairs and requests.

use super::links::LinkId;
use crate::plane::qp::Receiving;
use crate::plane::setup::MAX_RD_ATOMIC;
use std::collections::VecDeque;

/// What [`SoftQp::port`] says of a queue pair that is connected within its own port.
pub const OWN_PORT: u16 = 0;

/// Where a queue pair's requests go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Peer {
    /// Not connected, or the other end is gone: requests vanish, as packets to nowhere do.
    #[default]
    None,
    /// A queue pair of this proxy.
    Local,
    /// A queue pair behind this link.
    Link(LinkId),
}

/// How a request to another proxy goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// Nothing of it has gone.
    #[default]
    Open,
    /// What has gone of it went by a grant, and the responder knows nothing of it.
    ByGrant,
    /// By the responder.
    ByResponder,
}

/// A request's number as its responder counts: from `sq_psn` on, without those that went by a grant, which it knows nothing of.
/// [`SoftQp::to_wire`] makes one of ours, and [`SoftQp::from_wire`] one of ours of it.
///
/// Numbers are compared as packet sequence numbers are, by 24 bits; here they count requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct WireSequence(pub u32);

impl PartialEq for WireSequence {
    fn eq(&self, other: &Self) -> bool {
        self.0.wrapping_sub(other.0) << 8 == 0
    }
}

impl Eq for WireSequence {}

impl WireSequence {
    /// Of the first request, by a packet sequence number; of what is longer adapters take 24 bits.
    #[must_use]
    pub fn first(psn: u32) -> Self {
        Self(psn & 0x00ff_ffff)
    }

    /// Of the request behind this.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }

    /// Whether this comes before the other.
    #[must_use]
    pub fn is_before(self, other: Self) -> bool {
        (self.0.wrapping_sub(other.0) << 8).cast_signed() < 0
    }
}

/// Everything that a connection's end keeps about the requests that it answers.
#[derive(Debug, Default)]
pub struct Responder {
    /// The next piece must be of this request ...
    pub sequence: WireSequence,
    /// ... and start here.
    pub offset: u32,
    /// The SEND in progress.
    pub receiving: Option<Receiving>,
    /// Answers of the last atomics, for repeated requests.
    pub atomics: VecDeque<(WireSequence, u64)>,
    /// `IBV_EVENT_COMM_EST` was raised.
    pub established: bool,
    /// Requests of another proxy that were executed in this turn of its link and not acknowledged yet.
    pub owed: Option<Acknowledge>,
}

impl Responder {
    /// Keeps the answer to an atomic, as long as its requester may have that one repeated.
    pub fn remember(&mut self, sequence: WireSequence, value: u64) {
        if self.atomics.len() >= MAX_RD_ATOMIC as usize {
            self.atomics.pop_front();
        }
        self.atomics.push_back((sequence, value));
    }
}

/// What an acknowledge will say.
#[derive(Clone, Copy, Debug)]
pub struct Acknowledge {
    /// QP number of the requester.
    pub to: u32,
    /// The last request that was executed ...
    pub sequence: WireSequence,
    /// ... where its last piece begins, ...
    pub offset: u32,
    /// ... and its bytes.
    pub bytes: u32,
    /// Requests that it is the answer to.
    pub covers: u32,
}

/// What the software device keeps of a queue pair.
#[derive(Debug, Default)]
pub struct SoftQp {
    /// The other end.
    pub peer: Peer,
    /// LID of the other end's port; [`OWN_PORT`] for our own. Not the link: two proxies that make a link to each other at the
    /// same time have two.
    pub port: u16,
    /// With [`Peer::Local`], the bell number of the other end, if it still has the number that this one is connected to.
    pub peer_queue: u32,
    /// What a responder calls the first request: `sq_psn`.
    pub first: WireSequence,
    /// How many of the requests that were claimed went by grants: the responder counts the others.
    pub by_grant: u32,
    /// Requests in a row that went by the responder only because those before them did.
    pub streak: u32,
    /// Neighbours that are not known to be through with what this queue pair let them do, when it is in error.
    pub stopping: u32,
    /// The other role.
    pub responder: Responder,
}

impl SoftQp {
    /// What a responder calls request number `sequence`.
    #[must_use]
    pub fn to_wire(&self, sequence: u32) -> WireSequence {
        WireSequence(sequence.wrapping_sub(self.by_grant).wrapping_add(self.first.0))
    }

    /// What we call the request to which a responder gave this number: for those that are under way, which none went by a grant
    /// after.
    #[must_use]
    pub fn from_wire(&self, sequence: WireSequence) -> u32 {
        sequence.0.wrapping_sub(self.first.0).wrapping_add(self.by_grant)
    }
}
