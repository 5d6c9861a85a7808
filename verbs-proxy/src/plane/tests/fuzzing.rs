//! Containers and neighbours that write what a fuzzer likes into the rings of a rig, and what holds nevertheless.

mod grants;
mod link;
mod rings;

pub use grants::run as grants;
pub use link::run as link;
pub use rings::run as rings;

use super::ledger::Ledger;
use super::*;
use crate::shared::{Run, RunFile};
use arbitrary::Arbitrary;
use ringfence_protocol::layout::CqHeader;
use ringfence_protocol::ring::Words;
use rustix::mm::ProtFlags;
use std::ops::Range;
use std::sync::OnceLock;

/// What the container has registered: some pages in the middle of its memory, but for their edges.
pub(super) const FIRST: usize = 16 * PAGE + 100;
pub(super) const LENGTH: usize = 32 * PAGE - 300;

/// What of the region are whole pages, which neighbours see.
const SHOWN: Range<usize> = FIRST.next_multiple_of(PAGE)..(FIRST + LENGTH) / PAGE * PAGE;

/// What no request may read or write: a word for each place.
fn secret(at: usize) -> u64 {
    0x5ec2_e75e_c2e7_0000 | (at as u64 / 8)
}

/// A scatter/gather element, most of which lie in the region.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub struct Element {
    at: u32,
    length: u32,
    key: u8,
}

impl Element {
    /// Nearly always near the region.
    fn address(at: u32) -> u64 {
        match at >> 28 {
            15 => u64::from(at) << 32 | u64::from(at),
            _ => IOVA.wrapping_sub(64).wrapping_add(u64::from(at) % (LENGTH as u64 + 128)),
        }
    }

    fn bytes(length: u32) -> u32 {
        match length >> 29 {
            7 => length,
            6 => length % (LENGTH as u32 + 8),
            _ => length % 4096,
        }
    }

    fn key(&self, key: u32) -> u32 {
        // One in sixteen is of another generation or of nothing.
        if self.key & 15 == 15 { key ^ u32::from(self.key) << 24 ^ u32::from(self.key >> 4) } else { key }
    }

    fn sge(&self, key: u32) -> Sge {
        Sge { addr: Self::address(self.at), length: Self::bytes(self.length), lkey: self.key(key) }
    }
}

/// A work request as a library would write it, if not with these values.
#[derive(Clone, Debug, Arbitrary)]
pub struct Send {
    opcode: u8,
    flags: u8,
    remote: Element,
    elements: Vec<Element>,
    inline: Option<[u64; 4]>,
    operands: [u64; 2],
    imm: u32,
}

impl Send {
    /// Its slots, and whether it is signaled. `remote`: the responder's key.
    fn pack(&self, wr_id: u64, key: u32, remote: u32) -> (Words, Vec<Words>, bool) {
        const OPCODES: [Opcode; 8] = [
            Opcode::RDMA_WRITE,
            Opcode::RDMA_WRITE,
            Opcode::RDMA_WRITE_WITH_IMM,
            Opcode::SEND,
            Opcode::SEND_WITH_IMM,
            Opcode::RDMA_READ,
            Opcode::CMP_AND_SWP,
            Opcode::FETCH_AND_ADD,
        ];
        let opcode = match self.opcode {
            wild @ 240.. => Opcode(wild - 240),
            tame => OPCODES[usize::from(tame) % OPCODES.len()],
        };
        let flags = SendFlags(self.flags & !SendFlags::INLINE.0);
        let elements = &self.elements[..self.elements.len().min(5)];
        let mut list: Vec<Sge> = elements.iter().map(|element| element.sge(key)).collect();
        if matches!(opcode, Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD)
            && self.remote.key & 1 == 0
            && let Some(first) = list.first_mut()
        {
            first.length = 8;
            list.truncate(1);
        }
        let fields = SendFields {
            wr_id,
            opcode,
            flags,
            sges: list.len() as u8,
            remote_addr: Element::address(self.remote.at),
            rkey: self.remote.key(remote),
            imm: self.imm,
            sge: list.first().copied().unwrap_or_default(),
            compare_add: self.operands[0],
            swap: self.operands[1],
            ..SendFields::default()
        };
        let signaled = flags.contains(SendFlags::SIGNALED);
        let fetches = matches!(opcode, Opcode::RDMA_READ | Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD);
        // What fetches has no data to bring.
        if let Some(head) = self.inline.as_ref().filter(|_| !fetches) {
            let flags = SendFlags(flags.0 | SendFlags::INLINE.0);
            let inline_bytes = (Element::bytes(self.remote.length) % 33) as u16;
            let fields = SendFields { flags, sges: 0, inline_bytes, ..fields };
            return (SendBase::pack_inline(&fields, head).0, Vec::new(), signaled);
        }
        let more = list.get(1..).unwrap_or_default().chunks(3).map(ringfence_protocol::work::pack_sges).collect();
        (SendBase::pack(&fields).0, more, signaled)
    }
}

/// A receive request as a library would write it.
fn receive(wr_id: u64, elements: &[Element], key: u32) -> (Words, Vec<Words>) {
    let list: Vec<Sge> = elements.iter().take(5).map(|element| element.sge(key)).collect();
    let first = list.first().copied().unwrap_or_default();
    let more = list.get(1..).unwrap_or_default().chunks(3).map(ringfence_protocol::work::pack_sges).collect();
    (ReceiveBase::pack(wr_id, list.len() as u8, first).0, more)
}

/// A rig whose region has an outside.
pub(super) fn guarded((policy, link): Shape) -> Rig {
    let mut rig = Rig::shaped(&policy, link);
    drop(rig.plane.regions.remove(rig.granted));
    let run = Run { file: RunFile::Sealed(&rig.file), offset: SHOWN.start, bytes: SHOWN.len() };
    rig.shown = Arc::new(Mapping::of_runs(&[run], ProtFlags::READ | ProtFlags::WRITE, false).unwrap());
    register(&mut rig);
    rig.put(0, untouched());
    rig
}

/// Registers it, by the key that it always has.
fn register(rig: &mut Rig) {
    let region = MemoryRegion::new(Arc::clone(&rig.memory), FIRST, LENGTH as u64, IOVA, PD, ALL, 1).unwrap();
    rig.granted = rig.entrance.insert(region.shown(SHOWN.start as u64..SHOWN.end as u64), || 7).unwrap();
    rig.key = rig.granted.key;
}

/// The memory as a rig begins with it: secrets, and nothing where the region is.
fn untouched() -> &'static [u8] {
    static MEMORY_BEFORE: OnceLock<Vec<u8>> = OnceLock::new();
    MEMORY_BEFORE.get_or_init(|| {
        let mut bytes: Vec<u8> = (0..MEMORY).step_by(8).flat_map(|at| secret(at).to_ne_bytes()).collect();
        bytes[FIRST..FIRST + LENGTH].fill(0);
        bytes
    })
}

/// Nothing outside of the region was written to, and nothing of it was read into the region.
pub(super) fn is_untouched(rig: &Rig) {
    let (all, before) = (rig.take(0, MEMORY), untouched());
    let end = FIRST + LENGTH;
    assert!(
        all[..FIRST] == before[..FIRST] && all[end..] == before[end..],
        "what is outside of the region has changed"
    );
    // Of all secrets these bytes are alike, in whatever place of a word they come. Most of the region is as it was.
    let mark = &secret(0).to_ne_bytes()[2..];
    let (words, _) = all[FIRST..end].as_chunks::<8>();
    for (index, _) in words.iter().enumerate().filter(|(_, word)| **word != [0; 8]) {
        let at = FIRST + 8 * index;
        let around = &all[at.saturating_sub(8).max(FIRST)..(at + 16).min(end)];
        assert!(!around.windows(mark.len()).any(|window| window == mark), "a secret was read to {at}");
    }
}

/// A policy, and a modelled link.
pub(super) type Shape = (Policy, Option<(WireClock, BitRate)>);

/// All policies that change the way of a request.
pub(super) fn shaping(choice: u8) -> Shape {
    let capped = Policy { bandwidth: BitRate::new(80_000_000_000), ops: OpRate::new(1_000_000), ..Policy::default() };
    let policy = match choice % 4 {
        0 => Policy::default(),
        1 => capped,
        2 => Policy { class: Class::Latency, fetching: BitRate::new(8_000_000_000), ..capped },
        _ => BULK,
    };
    let link = (choice / 4 % 2 == 1).then(|| {
        let clock = WireClock::private().unwrap();
        BitRate::new(100_000_000_000).map(|rate| (clock, rate))
    });
    (policy, link.flatten())
}

/// Tells the plane what was polled, as the library does.
fn completions(rig: &mut Rig) -> Vec<Completion> {
    let list = rig.completions();
    rig._cq.header::<CqHeader>(0).set_consumed(rig.completions.position());
    list
}
