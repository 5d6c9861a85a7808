//! The memory of requests: what their elements name in the container's regions, piece by piece.

use super::Qp;
use crate::device::WorkPiece;
use crate::memory::{AccessFault, Piece, RegionTable};
use crate::plane::admit::Admitted;
use crate::plane::qp::Data;
use ringfence_protocol::verbs::Access;
use ringfence_protocol::work::Sge;

/// The memory that these elements name.
pub(crate) fn resolve<'a>(
    qp: &Qp,
    sges: &[Sge],
    regions: &'a RegionTable,
    access: Access,
    pieces: &mut Vec<Piece<'a>>,
) -> Result<(), AccessFault> {
    pieces.clear();
    // An element of no bytes names no memory, whatever its key (InfiniBand Architecture Specification, 10.7.3.1).
    for sge in sges.iter().filter(|sge| sge.length > 0) {
        pieces.push(regions.admit(sge.lkey, qp.pd, sge.addr, u64::from(sge.length), access)?);
    }
    Ok(())
}

/// The memory of one piece of a request's source.
pub(crate) fn gather<'a>(
    qp: &Qp,
    work: Admitted<'a>,
    regions: &'a RegionTable,
    piece: &WorkPiece,
    from: &mut Vec<Piece<'a>>,
) -> Result<(), u16> {
    if let Data::Inline(data) = &work.claim().data {
        from.clear();
        from.push(Piece::of_own(data));
    } else {
        resolve(qp, work.data.sges(), regions, Access(0), from).map_err(|fault| fault as u16)?;
    }
    trim(from, piece.offset as usize, piece.bytes as usize);
    Ok(())
}

/// The memory of a READ's or atomic's target.
pub(crate) fn scatter<'a>(
    qp: &Qp,
    work: Admitted<'_>,
    regions: &'a RegionTable,
    to: &mut Vec<Piece<'a>>,
) -> Result<(), u16> {
    resolve(qp, work.data.sges(), regions, Access::LOCAL_WRITE, to).map_err(|fault| fault as u16)
}

/// Cuts a list of pieces down to `bytes` from `offset` on.
pub(crate) fn trim(pieces: &mut Vec<Piece<'_>>, mut offset: usize, mut bytes: usize) {
    pieces.retain_mut(|piece| {
        let skipped = offset.min(piece.bytes());
        offset -= skipped;
        *piece = piece.slice(skipped, bytes);
        bytes -= piece.bytes();
        piece.bytes() > 0
    });
}
