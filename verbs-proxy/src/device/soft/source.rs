//! Where the data of a piece are, said to another proxy and understood from one.

use super::Qp;
use super::bounce::Place;
use super::gather::{gather, trim};
use super::link::{Link, LinkFault, Room};
use super::links::{LinkId, Links};
use super::names::Uncopied;
use super::requester::LOST;
use super::wire::{self, Request};
use crate::device::WorkPiece;
use crate::memory::{AccessFault, Piece, Pieces, RegionTable, copy_list};
use crate::plane::admit::Admitted;
use crate::plane::claim::{fetches, vendor};
use crate::plane::qp::Data;
use ringfence_protocol::ring::Words;
use ringfence_protocol::verbs::Access;
use ringfence_protocol::work::{self, Sge};
use std::ops::Range;

/// Why the source of a piece cannot be said.
#[derive(Debug)]
pub(crate) enum Source {
    /// A local key does not hold any more.
    Fault(u16),
    /// The region with this key and name is not shared with the neighbour yet.
    NotShared(u32, u32),
    /// Some of it is memory that the neighbour must not map, and the buffer for that is not shared with it yet.
    Foreign,
    /// There is no room for it now.
    NoRoom,
    /// The other end broke the protocol.
    Link(LinkFault),
}

/// Data are sent in the message itself if there are no more of them: their memory need not be shared with the neighbour then, and
/// both sides copy less than they would look up.
const BY_VALUE: u32 = 512;

/// Data on their way into a message or out of one; kept between messages.
#[derive(Debug, Default)]
pub(crate) struct Staging {
    /// Room for [`work::MAX_INLINE`] bytes, or nothing before the first use.
    words: Vec<u64>,
    /// What goes behind the base slot of a request.
    pub extensions: Vec<Words>,
}

/// Words of the base slot that hold data.
const BASE_WORDS: usize = wire::BASE_DATA as usize / 8;
/// Words of an extension slot that do.
const EXTENSION_WORDS: usize = work::EXTENSION_INLINE as usize / 8;
const _: () = assert!(
    BASE_WORDS + wire::extensions_of_data(work::MAX_INLINE) as usize * EXTENSION_WORDS == work::MAX_INLINE as usize / 8
);

impl Staging {
    fn words(&mut self) -> &mut [u64] {
        self.words.resize(work::MAX_INLINE as usize / 8, 0);
        &mut self.words
    }

    fn bytes(&mut self) -> &mut [u8] {
        zerocopy::IntoBytes::as_mut_bytes(self.words())
    }

    /// The first `bytes` bytes, if there are so many.
    fn filled(&self, bytes: usize) -> Option<&[u8]> {
        zerocopy::IntoBytes::as_bytes(self.words.as_slice()).get(..bytes)
    }

    /// Makes a message's data of the first `bytes` bytes: the base slot's words come back. Nothing that was here before goes along.
    fn pack(&mut self, bytes: usize) -> [u64; BASE_WORDS] {
        let extensions = wire::extensions_of_data(bytes as u32) as usize;
        let end = BASE_WORDS + extensions * EXTENSION_WORDS;
        self.bytes()[bytes..end * 8].fill(0);
        let (base, rest) = self.words[..end].split_at(BASE_WORDS);
        let packed =
            rest.chunks_exact(EXTENSION_WORDS).map(|part| work::pack_inline(&std::array::from_fn(|at| part[at])));
        self.extensions.extend(packed);
        std::array::from_fn(|at| base[at])
    }
}

/// Where a neighbour finds the source of a piece.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Packed {
    /// How many pieces the source has, or [`wire::INLINE`].
    pub pieces: u8,
    /// With [`wire::INLINE`], what goes into the base slot.
    pub data: [u64; BASE_WORDS],
    /// The part of the link's buffer that some of it is in, if it is.
    pub place: Option<Place>,
    /// The key and name of a region of which more could be said by name, if it were shared with the neighbour.
    pub unshared: Option<(u32, u32)>,
}

/// Packs the source of a piece for another proxy: the data if they are few, else where they are.
pub(crate) fn pack(
    qp: &Qp,
    asked: Admitted<'_>,
    piece: &WorkPiece,
    regions: &RegionTable,
    link: &mut Link,
    from: &mut Pieces,
    staging: &mut Staging,
) -> Result<Packed, Source> {
    staging.extensions.clear();
    if asked.fetches() || piece.bytes == 0 {
        return Ok(Packed::default());
    }
    if piece.bytes <= BY_VALUE || matches!(asked.data, Data::Inline(_)) {
        let bytes = piece.bytes as usize;
        from.with(|from| {
            gather(qp, asked, regions, piece, from).map_err(Source::Fault)?;
            let to = Piece::of_own_mut(&mut staging.bytes()[..bytes]);
            copy_list(&[to], 0, from, 0, bytes).map_err(|_| Source::Fault(LOST))
        })?;
        return Ok(Packed { pieces: wire::INLINE, data: staging.pack(bytes), ..Packed::default() });
    }
    by_name(qp, asked, piece, regions, link, from, &mut staging.extensions)
}

/// The elements of a request that a piece of it is in, of each the part that is.
fn parts<'a>(asked: Admitted<'a>, piece: &WorkPiece) -> impl Iterator<Item = Sge> + 'a {
    let (mut offset, mut bytes) = (piece.offset, piece.bytes);
    asked.claim().data.sges().iter().filter_map(move |sge| {
        let skipped = offset.min(sge.length);
        offset -= skipped;
        let length = (sge.length - skipped).min(bytes);
        bytes -= length;
        (length > 0).then(|| Sge { addr: sge.addr + u64::from(skipped), length, lkey: sge.lkey })
    })
}

/// Elements of a message on their way into its extensions.
struct Elements {
    list: [Sge; work::MAX_SGE as usize],
    count: usize,
}

impl Elements {
    fn new() -> Self {
        Self { list: [Sge::default(); work::MAX_SGE as usize], count: 0 }
    }

    /// One more, or more of the last one, if it goes on where that ends.
    fn push(&mut self, sge: Sge) {
        if let Some(last) = self.list[..self.count].last_mut()
            && (last.lkey, last.addr + u64::from(last.length)) == (sge.lkey, sge.addr)
        {
            last.length += sge.length;
            return;
        }
        self.list[self.count] = sge;
        self.count += 1;
    }

    /// How many there are.
    fn finish(&self, extensions: &mut Vec<Words>) -> u8 {
        let list = &self.list[..self.count];
        extensions.extend(list.chunks(work::SGES_PER_EXTENSION as usize).map(work::pack_sges));
        self.count as u8
    }
}

/// What of an element's memory the neighbour does not see, sees, and does not see, by address, without what is empty.
fn portions(bytes: usize, shown: Range<usize>) -> impl Iterator<Item = (Range<usize>, bool)> {
    let all = [(0..shown.start, false), (shown.clone(), true), (shown.end..bytes, false)];
    all.into_iter().filter(|(part, _)| !part.is_empty())
}

/// Says where the source of a piece is: by name what of it the neighbour sees. The rest is copied to the link's buffer for it, which may
/// be the first and the last bytes of a region, or all.
fn by_name(
    qp: &Qp,
    asked: Admitted<'_>,
    piece: &WorkPiece,
    regions: &RegionTable,
    link: &mut Link,
    from: &mut Pieces,
    extensions: &mut Vec<Words>,
) -> Result<Packed, Source> {
    let find = |sge: &Sge| {
        let memory = regions.admit(sge.lkey, qp.pd, sge.addr, sge.length.into(), Access(0));
        let memory = memory.map_err(|fault| Source::Fault(fault as u16))?;
        let region = regions.get(sge.lkey).ok_or(Source::Fault(vendor::REMOTE))?;
        Ok((region, memory))
    };
    let (mut elements, mut copied, mut is_last_copied, mut unshared) = (0, 0, false, None);
    for sge in parts(asked, piece) {
        let (region, memory) = find(&sge)?;
        for (part, is_seen) in portions(memory.bytes(), region.shown_part(&memory).0) {
            elements += u32::from(is_seen || !is_last_copied);
            is_last_copied = !is_seen;
            if !is_seen {
                copied += part.len() as u32;
            } else if !link.has_mapped(region.share) {
                unshared = unshared.or(Some((sge.lkey, region.share)));
            }
        }
    }
    // All of it is copied if a message cannot list it; and as long as the neighbour has yet to see the rest, or has refused to.
    let is_mixed = copied > 0;
    let sees = !is_mixed || (elements <= work::MAX_SGE && unshared.is_none());
    if !sees {
        (elements, copied) = (1, piece.bytes);
    }
    // A region counts as named as soon as it is: not before all of the piece is known to have a place.
    let place = match copied {
        0 => None,
        bytes => Some(room(link, bytes, elements.div_ceil(work::SGES_PER_EXTENSION))?),
    };
    let mut list = Elements::new();
    from.with(|from| {
        let (buffer, mut at) = match (&link.bounce, place) {
            (Some(bounce), Some(place)) => (bounce.share, place.offset()),
            _ => (0, 0),
        };
        if !sees {
            gather(qp, asked, regions, piece, from).map_err(Source::Fault)?;
            list.push(Sge { addr: at, length: copied, lkey: buffer });
        }
        for sge in parts(asked, piece).filter(|_| sees) {
            let (region, memory) = find(&sge)?;
            let (shown, addr) = region.shown_part(&memory);
            for (part, is_seen) in portions(memory.bytes(), shown) {
                let part = memory.slice(part.start, part.len());
                let length = part.bytes() as u32;
                if is_seen {
                    if !link.name(region.share) {
                        return Err(Source::NotShared(sge.lkey, region.share));
                    }
                    region.make_present(&part);
                    list.push(Sge { addr, length, lkey: region.share });
                } else {
                    from.push(part);
                    list.push(Sge { addr: at, length, lkey: buffer });
                    at += u64::from(length);
                }
            }
        }
        match (&link.bounce, place) {
            (Some(bounce), Some(place)) => bounce.fill(place, from).map_err(|_| Source::Fault(LOST)),
            _ => Ok(()),
        }
    })?;
    Ok(Packed { pieces: list.finish(extensions), place, unshared, ..Packed::default() })
}

/// Room in the link's buffer, and for a message with so many extensions that names it.
fn room(link: &mut Link, bytes: u32, extensions: u32) -> Result<Place, Source> {
    match link.bounce_room(bytes, wire::LONGEST).map_err(Source::Link)? {
        Room::At(place) if link.has_room(extensions).map_err(Source::Link)? => Ok(place),
        Room::At(_) | Room::Later => Err(Source::NoRoom),
        Room::NotShared => Err(Source::Foreign),
    }
}

/// Where the data of a request are. Their memory is looked up when it is read.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Origin<'a> {
    /// They are this piece of the request at this index of a queue pair of the same proxy.
    Own(usize, &'a WorkPiece),
    /// The message that came over this link, and is being executed, has them or says where they are.
    Link(LinkId),
}

/// What the data of a request can be found in.
#[derive(Debug)]
pub(crate) struct Sources<'a> {
    pub qps: &'a [Option<Box<Qp>>],
    pub regions: &'a RegionTable,
    pub links: &'a Links,
    pub message: &'a Incoming,
}

impl<'a> Sources<'a> {
    /// The memory of a request's data.
    ///
    /// # Errors
    /// If they are not there any more; the vendor error of that.
    #[inline]
    pub fn find(&self, origin: Origin<'a>, request: &Request, from: &mut Vec<Piece<'a>>) -> Result<(), u16> {
        const GONE: u16 = AccessFault::Key as u16;
        match origin {
            Origin::Own(index, piece) => {
                let qp = self.qps[piece.queue as usize].as_deref().ok_or(GONE)?;
                let asked = qp.pending.get(index).and_then(|wqe| wqe.work.admitted()).ok_or(GONE)?;
                gather(qp, asked, self.regions, piece, from)
            }
            Origin::Link(link) => {
                let link = self.links.get(link).ok_or(GONE)?;
                self.message.find(link, request, from).ok_or(GONE)
            }
        }
    }

    /// Copies them, which [`Self::find`] found, to their place in the request's target.
    #[inline]
    pub fn copy(
        &self,
        origin: Origin<'_>,
        request: &Request,
        to: &mut Vec<Piece<'_>>,
        from: &[Piece<'_>],
        aside: &mut Vec<u8>,
    ) -> Result<(), Uncopied> {
        let (offset, bytes) = (request.offset as usize, request.bytes as usize);
        match origin {
            Origin::Link(link) if request.pieces != wire::INLINE => {
                let link = self.links.get(link).ok_or(Uncopied::Ended)?;
                trim(to, offset, bytes);
                link.lasting(request.from, request.compare_add).copy(to, from, bytes, aside)
            }
            _ => copy_list(to, offset, from, 0, bytes).map_err(Uncopied::Lost),
        }
    }
}

/// The source of a request from another proxy, in the neighbour's words.
#[derive(Debug, Default)]
pub(crate) struct Incoming {
    /// Data that came in the message itself.
    staging: Staging,
    /// Where they are if they did not.
    named: Vec<Sge>,
}

impl Incoming {
    /// Reads it out of the message.
    pub fn read(&mut self, link: &Link, request: &Request, extensions: u32) -> Result<(), LinkFault> {
        self.named.clear();
        if request.bytes > wire::LONGEST {
            return Err(LinkFault::Malformed);
        }
        if request.pieces == wire::INLINE {
            let words = self.staging.words();
            words[..BASE_WORDS].copy_from_slice(&[request.compare_add, request.swap]);
            for (index, part) in (0..extensions).zip(words[BASE_WORDS..].chunks_exact_mut(EXTENSION_WORDS)) {
                let words = link.extension(index).ok_or(LinkFault::Malformed)?;
                part.copy_from_slice(&work::extension_inline(&words));
            }
            return Ok(());
        }
        let mut total = 0;
        for index in 0..u32::from(request.pieces) {
            let words = link.extension(index / work::SGES_PER_EXTENSION).ok_or(LinkFault::Malformed)?;
            let sge = work::extension_sge(&words, index % work::SGES_PER_EXTENSION);
            total += u64::from(sge.length);
            self.named.push(sge);
        }
        if !fetches(request.opcode) && total != u64::from(request.bytes) {
            return Err(LinkFault::Malformed);
        }
        Ok(())
    }

    /// The memory. `None` if it is not shared (any more).
    fn find<'a>(&'a self, link: &'a Link, request: &Request, from: &mut Vec<Piece<'a>>) -> Option<()> {
        if request.pieces == wire::INLINE {
            from.push(Piece::of_own(self.staging.filled(request.bytes as usize)?));
            return Some(());
        }
        for sge in &self.named {
            from.push(link.shared_piece(sge.lkey, sge.addr, sge.length)?);
        }
        Some(())
    }
}
