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
    /// The part of the link's buffer that it is in, if it is.
    pub place: Option<Place>,
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
        return Ok(Packed { pieces: wire::INLINE, data: staging.pack(bytes), place: None });
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
struct Elements<'a> {
    extensions: &'a mut Vec<Words>,
    count: u8,
    /// The last ones, fewer than an extension holds.
    part: [Sge; work::SGES_PER_EXTENSION as usize],
}

impl<'a> Elements<'a> {
    fn new(extensions: &'a mut Vec<Words>) -> Self {
        Self { extensions, count: 0, part: Default::default() }
    }

    fn push(&mut self, sge: Sge) {
        let place = usize::from(self.count) % self.part.len();
        self.part[place] = sge;
        self.count += 1;
        if place + 1 == self.part.len() {
            self.extensions.push(work::pack_sges(&self.part));
        }
    }

    /// How many there are.
    fn finish(self) -> u8 {
        match usize::from(self.count) % self.part.len() {
            0 => {}
            left => self.extensions.push(work::pack_sges(&self.part[..left])),
        }
        self.count
    }
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
    let (mut elements, mut seen) = (0, 0);
    for sge in parts(asked, piece) {
        let (region, memory) = find(&sge)?;
        let (shown, _) = region.shown_part(&memory);
        seen += shown.len() as u32;
        elements += [!shown.is_empty(), shown.start > 0, shown.end < memory.bytes()].map(u32::from).iter().sum::<u32>();
    }
    // More than a message can list are copied.
    let sees = elements <= work::MAX_SGE;
    let copied = if sees { piece.bytes - seen } else { piece.bytes };
    // A region counts as named as soon as it is: not before all of the piece is known to have a place.
    let place = match copied {
        0 => None,
        bytes => Some(room(link, bytes, elements.min(work::MAX_SGE).div_ceil(work::SGES_PER_EXTENSION))?),
    };
    let mut list = Elements::new(extensions);
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
            let seen = memory.slice(shown.start, shown.len());
            let around = [memory.slice(0, shown.start), memory.slice(shown.end, usize::MAX)];
            for (part, is_seen) in [(around[0], false), (seen, true), (around[1], false)] {
                let length = part.bytes() as u32;
                if length == 0 {
                    continue;
                }
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
    Ok(Packed { pieces: list.finish(), place, ..Packed::default() })
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
