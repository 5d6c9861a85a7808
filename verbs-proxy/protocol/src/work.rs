//! Work requests as they stand in send and receive rings.
//!
//! A base slot holds everything of a one-SGE request or up to [`BASE_INLINE`] bytes of inline data; extension slots
//! hold more SGEs ([`SGES_PER_EXTENSION`] each) or more inline data ([`EXTENSION_INLINE`] bytes each), never both.

use crate::ring::{STAMP_WORD, Words};
use crate::verbs::{Opcode, SendFlags};

/// Inline bytes in a base slot (words 4 to 7).
pub const BASE_INLINE: u32 = 32;
/// Inline bytes in an extension slot (words 0 and 2 to 7).
pub const EXTENSION_INLINE: u32 = 56;
/// SGEs in an extension slot (words 2 to 7).
pub const SGES_PER_EXTENSION: u32 = 3;
/// The most scatter/gather elements of one work request.
pub const MAX_SGE: u32 = 32;
/// The most inline bytes of one work request.
pub const MAX_INLINE: u32 = 1024;
/// The most extension slots of one entry.
pub const MAX_EXTENSIONS: u32 = (MAX_INLINE - BASE_INLINE).div_ceil(EXTENSION_INLINE);

/// A scatter/gather element: `struct ibv_sge`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sge {
    /// Address in the application's address space.
    pub addr: u64,
    /// Bytes.
    pub length: u32,
    /// Local key of the memory region.
    pub lkey: u32,
}

impl Sge {
    #[inline(always)]
    fn to_words(self) -> [u64; 2] {
        [self.addr, u64::from(self.length) | u64::from(self.lkey) << 32]
    }

    #[inline(always)]
    fn from_words(addr: u64, rest: u64) -> Self {
        Self { addr, length: rest as u32, lkey: (rest >> 32) as u32 }
    }
}

/// Extension slots that a request with so many SGEs needs.
#[must_use]
#[inline(always)]
pub const fn extensions_for_sges(sges: u32) -> u32 {
    sges.saturating_sub(1).div_ceil(SGES_PER_EXTENSION)
}

/// Extension slots that a request with so many inline bytes needs.
#[must_use]
#[inline(always)]
pub const fn extensions_for_inline(bytes: u32) -> u32 {
    bytes.saturating_sub(BASE_INLINE).div_ceil(EXTENSION_INLINE)
}

/// Slots that one send request of a queue pair with these capabilities may take.
#[must_use]
pub const fn send_slots_per_request(max_sge: u32, max_inline: u32) -> u32 {
    let sges = extensions_for_sges(max_sge);
    let inline = extensions_for_inline(max_inline);
    1 + if sges > inline { sges } else { inline }
}

/// Slots that one receive request of a queue pair with this capability may take.
#[must_use]
pub const fn receive_slots_per_request(max_sge: u32) -> u32 {
    1 + extensions_for_sges(max_sge)
}

/// The base slot of a send request.
///
/// Words: 0 `wr_id`; 1 stamp, opcode (16..24), flags (24..32), SGEs (32..40), inline bytes (40..56); 2 remote address;
/// 3 rkey, immediate data or rkey to invalidate (32..64); 4 and 5 first SGE; 6 and 7 atomic operands; 4 to 7 inline data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendBase(pub Words);

/// The fields of a send request besides its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendFields {
    /// Comes back in the completion.
    pub wr_id: u64,
    /// What to do.
    pub opcode: Opcode,
    /// Fence, signaled, solicited, inline.
    pub flags: SendFlags,
    /// Scatter/gather elements; zero for inline requests.
    pub sges: u8,
    /// Bytes of inline data, at most [`MAX_INLINE`].
    pub inline_bytes: u16,
    /// Address in the responder's address space.
    pub remote_addr: u64,
    /// Remote key.
    pub rkey: u32,
    /// Immediate data (network order, untouched) or the rkey to invalidate.
    pub imm: u32,
    /// The only or first SGE.
    pub sge: Sge,
    /// Compare (CMP_AND_SWP) or add (FETCH_AND_ADD) operand.
    pub compare_add: u64,
    /// Swap operand.
    pub swap: u64,
}

impl SendBase {
    /// Packs a request with SGEs.
    #[must_use]
    #[inline(always)]
    pub fn pack(fields: &SendFields) -> Self {
        let [addr, rest] = fields.sge.to_words();
        Self([
            fields.wr_id,
            u64::from(fields.opcode.0) << 16
                | u64::from(fields.flags.0) << 24
                | u64::from(fields.sges) << 32
                | u64::from(fields.inline_bytes) << 40,
            fields.remote_addr,
            u64::from(fields.rkey) | u64::from(fields.imm) << 32,
            addr,
            rest,
            fields.compare_add,
            fields.swap,
        ])
    }

    /// Packs an inline request; `head` is the data's first [`BASE_INLINE`] bytes, zero-padded.
    #[must_use]
    #[inline(always)]
    pub fn pack_inline(fields: &SendFields, head: &[u64; 4]) -> Self {
        let mut base = Self::pack(fields);
        base.0[4..].copy_from_slice(head);
        base
    }

    /// Reads the fields of a claim. For an inline request `sge`, `compare_add` and `swap` are data, not fields.
    #[must_use]
    #[inline(always)]
    pub fn fields(&self) -> SendFields {
        let w = &self.0;
        SendFields {
            wr_id: w[0],
            opcode: Opcode((w[STAMP_WORD] >> 16) as u8),
            flags: SendFlags((w[STAMP_WORD] >> 24) as u8),
            sges: (w[STAMP_WORD] >> 32) as u8,
            inline_bytes: (w[STAMP_WORD] >> 40) as u16,
            remote_addr: w[2],
            rkey: w[3] as u32,
            imm: (w[3] >> 32) as u32,
            sge: Sge::from_words(w[4], w[5]),
            compare_add: w[6],
            swap: w[7],
        }
    }

    /// The first [`BASE_INLINE`] bytes of inline data.
    #[must_use]
    #[inline(always)]
    pub fn inline_head(&self) -> [u64; 4] {
        [self.0[4], self.0[5], self.0[6], self.0[7]]
    }
}

impl SendFields {
    /// Extension slots that follow the base of this request, or `None` if the claim exceeds every limit.
    #[must_use]
    #[inline(always)]
    pub fn extensions(&self) -> Option<u32> {
        if self.flags.contains(SendFlags::INLINE) {
            let bytes = u32::from(self.inline_bytes);
            (bytes <= MAX_INLINE).then(|| extensions_for_inline(bytes))
        } else {
            let sges = u32::from(self.sges);
            (sges <= MAX_SGE).then(|| extensions_for_sges(sges))
        }
    }
}

/// The base slot of a receive request. Words: 0 `wr_id`; 1 stamp, SGEs (32..40); 4 and 5 first SGE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiveBase(pub Words);

impl ReceiveBase {
    /// Packs a receive request with `sges` elements, the first of them `sge`.
    #[must_use]
    #[inline(always)]
    pub fn pack(wr_id: u64, sges: u8, sge: Sge) -> Self {
        let [addr, rest] = sge.to_words();
        Self([wr_id, u64::from(sges) << 32, 0, 0, addr, rest, 0, 0])
    }

    /// Comes back in the completion.
    #[must_use]
    #[inline(always)]
    pub fn wr_id(&self) -> u64 {
        self.0[0]
    }

    /// Scatter/gather elements: a claim, at most 255.
    #[must_use]
    #[inline(always)]
    pub fn sges(&self) -> u8 {
        (self.0[STAMP_WORD] >> 32) as u8
    }

    /// The only or first SGE.
    #[must_use]
    #[inline(always)]
    pub fn sge(&self) -> Sge {
        Sge::from_words(self.0[4], self.0[5])
    }

    /// Extension slots that follow, or `None` if the claim exceeds [`MAX_SGE`].
    #[must_use]
    #[inline(always)]
    pub fn extensions(&self) -> Option<u32> {
        let sges = u32::from(self.sges());
        (sges <= MAX_SGE).then(|| extensions_for_sges(sges))
    }
}

/// An extension slot with up to [`SGES_PER_EXTENSION`] SGEs.
#[must_use]
#[inline]
pub fn pack_sges(sges: &[Sge]) -> Words {
    let mut words = [0; 8];
    for (index, sge) in sges.iter().take(SGES_PER_EXTENSION as usize).enumerate() {
        let [addr, rest] = sge.to_words();
        words[2 + 2 * index] = addr;
        words[3 + 2 * index] = rest;
    }
    words
}

/// SGE number `index` of an extension slot; `index` below [`SGES_PER_EXTENSION`].
#[must_use]
#[inline]
pub fn extension_sge(words: &Words, index: u32) -> Sge {
    let at = 2 + 2 * (index % SGES_PER_EXTENSION) as usize;
    Sge::from_words(words[at], words[at + 1])
}

/// An extension slot with [`EXTENSION_INLINE`] bytes of inline data as seven words.
#[must_use]
#[inline]
pub fn pack_inline(data: &[u64; 7]) -> Words {
    [data[0], 0, data[1], data[2], data[3], data[4], data[5], data[6]]
}

/// The inline data of an extension slot.
#[must_use]
#[inline]
pub fn extension_inline(words: &Words) -> [u64; 7] {
    [words[0], words[2], words[3], words[4], words[5], words[6], words[7]]
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn send_fields_survive_packing() {
        let fields = SendFields {
            wr_id: u64::MAX - 1,
            opcode: Opcode::CMP_AND_SWP,
            flags: SendFlags(SendFlags::SIGNALED.0 | SendFlags::FENCE.0),
            sges: 30,
            inline_bytes: 1023,
            remote_addr: 0x7fff_1234_5678_9abc,
            rkey: 0xdead_beef,
            imm: 0x0102_0304,
            sge: Sge { addr: 0x1000, length: u32::MAX, lkey: 7 },
            compare_add: 1,
            swap: u64::MAX,
        };
        assert_eq!(SendBase::pack(&fields).fields(), fields);
    }

    #[test]
    fn extensions_hold_what_the_base_does_not() {
        for (sges, slots) in [(0, 0), (1, 0), (2, 1), (4, 1), (5, 2), (32, 11)] {
            assert_eq!(extensions_for_sges(sges), slots, "{sges} SGEs");
        }
        for (bytes, slots) in [(0, 0), (32, 0), (33, 1), (88, 1), (89, 2), (1024, 18)] {
            assert_eq!(extensions_for_inline(bytes), slots, "{bytes} inline bytes");
        }
        assert!(extensions_for_sges(MAX_SGE) <= MAX_EXTENSIONS);
    }

    #[test]
    fn claims_past_every_limit_have_no_extensions() {
        let sges = SendFields { sges: 33, ..SendFields::default() };
        assert_eq!(sges.extensions(), None);
        let inline = SendFields { inline_bytes: 1025, flags: SendFlags::INLINE, ..SendFields::default() };
        assert_eq!(inline.extensions(), None);
    }
}
