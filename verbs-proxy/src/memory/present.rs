//! Which pages of a region are known to be there: what a neighbour is to copy from.
//!
//! A page that was never touched would be made by the neighbour's proxy when it copies, in its time and on its account. So the
//! region's own proxy makes it before it names it. Only memory that the container cannot take pages away from is named to neighbours;
//! so what was there once is there until the region ends.

use super::Piece;
use crate::shared::PAGE;

/// A bit for each page of a region's mapping, up to the last that a neighbour was told of.
#[derive(Debug, Default)]
pub(super) struct Present(Vec<u64>);

impl Present {
    /// Has the pages of `piece` made, which lies at `offset` of its mapping.
    #[inline]
    pub(super) fn cover(&mut self, piece: Piece<'_>, offset: usize) {
        if piece.bytes() == 0 {
            return;
        }
        let (first, last) = (offset / PAGE, (offset + piece.bytes() - 1) / PAGE);
        if last / 64 >= self.0.len() {
            self.0.resize(last / 64 + 1, 0);
        }
        for page in first..=last {
            let bit = 1 << (page % 64);
            if self.0[page / 64] & bit == 0 {
                piece.slice((page * PAGE).saturating_sub(offset), 1).touch();
                self.0[page / 64] |= bit;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::{Mapping, SealedFile};

    #[test]
    fn pages_are_made_once_and_no_others() {
        let file = SealedFile::create("test", 200 * PAGE).unwrap();
        let mapping = Mapping::of(&file).unwrap();
        let made = || rustix::fs::fstat(&file).unwrap().st_blocks as usize * 512 / PAGE;
        let mut present = Present::default();
        let mut cover = |offset: usize, bytes| present.cover(Piece::of(&mapping, offset, bytes).unwrap(), offset);
        cover(PAGE + 100, 0);
        assert_eq!(made(), 0);
        cover(PAGE + 100, 2 * PAGE);
        assert_eq!(made(), 3);
        cover(2 * PAGE, PAGE);
        assert_eq!(made(), 3);
        cover(63 * PAGE, 2 * PAGE);
        assert_eq!(made(), 5);
        cover(199 * PAGE + 4095, 1);
        assert_eq!(made(), 6);
    }
}
