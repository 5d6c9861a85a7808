//! Where the data of a piece are, said to another proxy and understood from one.

use super::bounce::Place;
use super::intake::vendor;
use super::link::{Link, LinkFault, Room};
use super::qp::{Data, Qp, Wqe};
use super::shaping::OnWire;
use super::transmit::{LOST, gather, sges};
use super::wire::{self, Request};
use crate::memory::{Piece, RegionTable};
use ringfence_protocol::ring::Words;
use ringfence_protocol::verbs::{Access, Opcode};
use ringfence_protocol::work::{self, Sge};

/// Why the source of a piece cannot be said.
#[derive(Debug)]
pub(super) enum Source {
    /// A local key does not hold any more.
    Fault(u16),
    /// The region with this key and name is not shared with the neighbour yet.
    NotShared(u32, u32),
    /// It is memory that the neighbour must not map, and the buffer for that is not shared with it yet.
    Foreign,
    /// There is no room for it now.
    NoRoom,
    /// The other end broke the protocol.
    Link(LinkFault),
}

/// How many pieces the source has, and the part of the buffer that it is in, if it is.
pub(super) type Packed = (u8, Option<Place>);

/// Packs the source of a piece for another proxy: the data if they were inline, else where they are.
pub(super) fn pack(
    qp: &Qp,
    wqe: &Wqe,
    piece: &OnWire,
    regions: &RegionTable,
    link: &Link,
    extensions: &mut Vec<Words>,
) -> Result<Packed, Source> {
    if wqe.fetches() || piece.bytes == 0 {
        return Ok((0, None));
    }
    if let Data::Inline(data) = &wqe.data {
        let data = &data[piece.offset as usize..(piece.offset + piece.bytes) as usize];
        for part in data.chunks(work::EXTENSION_INLINE as usize) {
            let mut words = [0u64; 7];
            zerocopy::IntoBytes::as_mut_bytes(&mut words)[..part.len()].copy_from_slice(part);
            extensions.push(work::pack_inline(&words));
        }
        return Ok((wire::INLINE, None));
    }
    let (mut offset, mut bytes) = (u64::from(piece.offset), u64::from(piece.bytes));
    let mut list: Vec<Sge> = Vec::new();
    for sge in sges(&wqe.data).iter().filter(|sge| sge.length > 0) {
        let skipped = offset.min(u64::from(sge.length));
        offset -= skipped;
        let length = (u64::from(sge.length) - skipped).min(bytes);
        if length == 0 {
            continue;
        }
        bytes -= length;
        let memory = regions
            .admit(sge.lkey, qp.pd, sge.addr + skipped, length, Access(0))
            .map_err(|fault| Source::Fault(fault as u16))?;
        let region = regions.get(sge.lkey).ok_or(Source::Fault(vendor::REMOTE))?;
        if region.may_fault() {
            return Err(Source::Foreign);
        }
        if link.shared.get(&region.share) != Some(&true) {
            return Err(Source::NotShared(sge.lkey, region.share));
        }
        list.push(Sge { addr: region.mapping_offset(&memory), length: length as u32, lkey: region.share });
    }
    extensions.extend(list.chunks(work::SGES_PER_EXTENSION as usize).map(work::pack_sges));
    Ok((list.len() as u8, None))
}

/// The same for a piece that is memory of the container's own, if only in part: all of it is copied to the link's buffer.
pub(super) fn bounce(
    qp: &Qp,
    wqe: &Wqe,
    piece: &OnWire,
    regions: &RegionTable,
    link: &mut Link,
    from: &mut Vec<Piece>,
    extensions: &mut Vec<Words>,
) -> Result<Packed, Source> {
    let place = match link.bounce_room(piece.bytes).map_err(Source::Link)? {
        Room::At(place) if link.has_room(1).map_err(Source::Link)? => place,
        Room::At(_) | Room::Later => return Err(Source::NoRoom),
        Room::NotShared => return Err(Source::Foreign),
    };
    let Some(bounce) = &link.bounce else { return Err(Source::Foreign) };
    gather(qp, wqe, regions, piece, from).map_err(Source::Fault)?;
    bounce.fill(place, from).map_err(|_| Source::Fault(LOST))?;
    let sge = Sge { addr: place.offset(), length: piece.bytes, lkey: bounce.share };
    extensions.clear();
    extensions.push(work::pack_sges(&[sge]));
    Ok((1, Some(place)))
}

/// The source of a request from another proxy. False if it names memory that is not shared (any more).
pub(super) fn read(
    link: &Link,
    request: &Request,
    extensions: u32,
    from: &mut Vec<Piece>,
    inline: &mut Vec<u8>,
) -> Result<bool, LinkFault> {
    from.clear();
    if request.pieces == wire::INLINE {
        for index in 0..extensions {
            let words = work::extension_inline(&link.extension(index).ok_or(LinkFault::Malformed)?);
            inline.extend_from_slice(zerocopy::IntoBytes::as_bytes(&words));
        }
        inline.truncate(request.bytes as usize);
        from.push(Piece::of_own(inline));
        return Ok(true);
    }
    let mut total = 0;
    for index in 0..u32::from(request.pieces) {
        let words = link.extension(index / work::SGES_PER_EXTENSION).ok_or(LinkFault::Malformed)?;
        let sge = work::extension_sge(&words, index % work::SGES_PER_EXTENSION);
        let Some(piece) = link.shared_piece(sge.lkey, sge.addr, sge.length) else { return Ok(false) };
        total += u64::from(sge.length);
        from.push(piece);
    }
    let fetches = matches!(request.opcode, Opcode::RDMA_READ | Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD);
    if !fetches && total != u64::from(request.bytes) {
        return Err(LinkFault::Malformed);
    }
    Ok(true)
}
