//! Messages between the proxies of one node, in the slots of a link's rings.
//!
//! The proxy at the other end is a neighbour, not a friend: its messages are claims too.

use super::qp::WireSequence;
use ringfence_protocol::ring::Words;
use ringfence_protocol::verbs::{Opcode, WcStatus};
use ringfence_protocol::work::{EXTENSION_INLINE, MAX_INLINE, MAX_SGE, SGES_PER_EXTENSION};

/// The longest piece of a SEND or WRITE that one message asks for: some 6 µs of copying, so that neither a client nor a hostile
/// proxy holds up whoever else the responder serves. What asks for more breaks the protocol.
pub const LONGEST: u32 = 64 << 10;

/// Bytes that the base slot of a request has room for, in place of an atomic's operands.
pub const BASE_DATA: u32 = 16;

/// What a message is. Each request is answered exactly once; [`Response::covers`] says how many an answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind(pub u8);

#[allow(missing_docs)]
impl Kind {
    /// A piece of a work request.
    pub const REQUEST: Self = Self(1);
    /// The piece was executed, and all pieces of the queue pair's SENDs and WRITEs before it, as by an acknowledge of RC.
    pub const ACK: Self = Self(2);
    /// The piece was not looked at: wrong state, or out of order.
    pub const DROPPED: Self = Self(3);
    /// Receiver not ready; `value` is its timer field.
    pub const RNR: Self = Self(4);
    /// Negative acknowledge; `status` is what the requester completes with.
    pub const NAK: Self = Self(5);
    /// The data of a READ are in the link's buffer `share` at `value`, as they were.
    pub const DATA: Self = Self(6);
    /// The former value of an atomic is `value`.
    pub const ATOMIC: Self = Self(7);
    /// Ask again: if `value` is zero the memory is not shared with the requester yet, else in so many nanoseconds, when the
    /// responder's rate lets it out.
    pub const LATER: Self = Self(8);
    /// Of what may be READ by grants little is left, and more would be of use. There is no answer but that more may be READ.
    pub const MORE: Self = Self(9);
}

/// A piece of a work request. The source of a WRITE or SEND follows in extension slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Destination QP number.
    pub to: u32,
    /// Source QP number.
    pub from: u32,
    /// Operation.
    pub opcode: Opcode,
    /// The receiver's completion is solicited.
    pub solicited: bool,
    /// Source pieces in the extensions; [`INLINE`] if they hold the data itself.
    pub pieces: u8,
    /// The requester's number of this work request.
    pub sequence: WireSequence,
    /// Immediate data.
    pub imm: u32,
    /// Offset of this piece in the work request.
    pub offset: u32,
    /// Bytes of this piece.
    pub bytes: u32,
    /// Bytes of the work request.
    pub total: u32,
    /// Remote address of the work request's first byte.
    pub remote_addr: u64,
    /// Remote key.
    pub rkey: u32,
    /// Compare or add operand; with [`INLINE`] the first bytes of the data, with pieces the generation of their names
    /// ([`super::names`]).
    pub compare_add: u64,
    /// Swap operand; with [`INLINE`] the next ones.
    pub swap: u64,
}

/// In place of a number of pieces: the message holds the data, the first [`BASE_DATA`] bytes in its base, the rest in extensions.
pub const INLINE: u8 = u8::MAX;

impl Request {
    /// As slot words.
    #[must_use]
    pub fn pack(&self) -> Words {
        [
            u64::from(self.to) | u64::from(self.from) << 32,
            u64::from(Kind::REQUEST.0) << 16
                | u64::from(self.opcode.0) << 24
                | u64::from(self.solicited) << 32
                | u64::from(self.pieces) << 40,
            u64::from(self.sequence.0) | u64::from(self.imm) << 32,
            u64::from(self.offset) | u64::from(self.bytes) << 32,
            self.remote_addr,
            u64::from(self.rkey) | u64::from(self.total) << 32,
            self.compare_add,
            self.swap,
        ]
    }

    /// From slot words.
    #[must_use]
    pub fn unpack(w: &Words) -> Self {
        Self {
            to: w[0] as u32,
            from: (w[0] >> 32) as u32,
            opcode: Opcode((w[1] >> 24) as u8),
            solicited: (w[1] >> 32) & 1 != 0,
            pieces: (w[1] >> 40) as u8,
            sequence: WireSequence(w[2] as u32),
            imm: (w[2] >> 32) as u32,
            offset: w[3] as u32,
            bytes: (w[3] >> 32) as u32,
            remote_addr: w[4],
            rkey: w[5] as u32,
            total: (w[5] >> 32) as u32,
            compare_add: w[6],
            swap: w[7],
        }
    }

    /// Extension slots behind this request; `None` if the claim exceeds every limit.
    #[must_use]
    pub fn extensions(&self) -> Option<u32> {
        match self.pieces {
            INLINE => (self.bytes <= MAX_INLINE).then(|| extensions_of_data(self.bytes)),
            pieces => (u32::from(pieces) <= MAX_SGE).then(|| u32::from(pieces).div_ceil(SGES_PER_EXTENSION)),
        }
    }
}

/// Extension slots that so many bytes need which go in the message.
#[must_use]
pub const fn extensions_of_data(bytes: u32) -> u32 {
    bytes.saturating_sub(BASE_DATA).div_ceil(EXTENSION_INLINE)
}

/// The kind of a message.
#[must_use]
pub fn kind(w: &Words) -> Kind {
    Kind((w[1] >> 16) as u8)
}

/// A message that is nothing but its kind.
#[must_use]
pub fn bare(kind: Kind) -> Words {
    let mut words = Words::default();
    words[1] = u64::from(kind.0) << 16;
    words
}

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// What happened.
    pub kind: Kind,
    /// QP number of the requester.
    pub to: u32,
    /// QP number of the responder.
    pub from: u32,
    /// From the request.
    pub sequence: WireSequence,
    /// From the request.
    pub offset: u32,
    /// From the request.
    pub bytes: u32,
    /// With [`Kind::NAK`].
    pub status: WcStatus,
    /// With [`Kind::DATA`].
    pub share: u32,
    /// With [`Kind::DATA`], [`Kind::ATOMIC`] and [`Kind::RNR`].
    pub value: u64,
    /// With [`Kind::DATA`], the generation of the name ([`super::names`]).
    pub generation: u64,
    /// Requests that this is the answer to: one, and with [`Kind::ACK`] those before it that were executed and not answered.
    pub covers: u32,
}

impl Response {
    /// As slot words.
    #[must_use]
    pub fn pack(&self) -> Words {
        [
            u64::from(self.to) | u64::from(self.from) << 32,
            u64::from(self.kind.0) << 16 | u64::from(self.status.0) << 24,
            u64::from(self.sequence.0) | u64::from(self.share) << 32,
            u64::from(self.offset) | u64::from(self.bytes) << 32,
            self.value,
            u64::from(self.covers),
            self.generation,
            0,
        ]
    }

    /// From slot words.
    #[must_use]
    pub fn unpack(w: &Words) -> Self {
        Self {
            kind: kind(w),
            to: w[0] as u32,
            from: (w[0] >> 32) as u32,
            status: WcStatus((w[1] >> 24) as u8),
            sequence: WireSequence(w[2] as u32),
            share: (w[2] >> 32) as u32,
            offset: w[3] as u32,
            bytes: (w[3] >> 32) as u32,
            value: w[4],
            generation: w[6],
            covers: w[5] as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_packing() {
        let request = Request {
            to: 1,
            from: 0x00ff_ffff,
            opcode: Opcode::RDMA_READ,
            solicited: true,
            pieces: 32,
            sequence: WireSequence(u32::MAX),
            imm: 5,
            offset: 1 << 30,
            bytes: 4096,
            total: 1 << 31,
            remote_addr: u64::MAX,
            rkey: 7,
            compare_add: 8,
            swap: 9,
        };
        assert_eq!(Request::unpack(&request.pack()), request);
        let response = Response {
            kind: Kind::DATA,
            to: 3,
            from: 4,
            sequence: WireSequence(5),
            offset: 6,
            bytes: 7,
            status: WcStatus::REM_OP_ERR,
            share: 8,
            value: u64::MAX,
            generation: 11,
            covers: 10,
        };
        assert_eq!(Response::unpack(&response.pack()), response);
    }

    #[test]
    fn requests_past_every_limit_have_no_extensions() {
        assert_eq!(Request { pieces: 33, ..Request::default() }.extensions(), None);
        assert_eq!(Request { pieces: INLINE, bytes: 1025, ..Request::default() }.extensions(), None);
    }
}
