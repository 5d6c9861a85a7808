//! What a neighbour gets to see instead of memory: what its READs ask for, and what a work request takes out of memory that is not the
//! proxy's own, or lies on a page with bytes that are not the region's.
//!
//! The data of a READ are as they were when the responder came to it. And a file of the container's own is no neighbour's to map:
//! its proxy could open it again for writing, and neither could rely on the file. So both are copied into a file of our own, which
//! the neighbour reads like any region that is shared with it. Each link has one, made when it is first needed.
//!
//! A part of it is in use from the message that names it until the neighbour's word says that it has read past that message,
//! which it does when it has copied. One that lies about it harms nobody: the bytes were for it.

use crate::fabric::budget::Lease;
use crate::fabric::neighbours::SharedRun;
use crate::memory::{Lost, Piece, copy_list};
use crate::shared::Mapping;
use ringfence_protocol::ring::Position;
use std::collections::VecDeque;

/// Bytes of a link's buffer: some pieces of the largest size.
pub const BYTES: usize = 2 << 20;

#[derive(Clone, Copy, Debug)]
struct Use {
    /// Of the message that names it.
    message: Position,
    start: usize,
    end: usize,
}

/// Bytes that are free at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    start: usize,
    bytes: usize,
}

impl Place {
    /// Where in the buffer.
    #[must_use]
    pub fn offset(self) -> u64 {
        self.start as u64
    }
}

/// The buffer of one link.
#[derive(Debug)]
pub struct Bounce {
    /// What the neighbour calls it.
    pub share: u32,
    /// Its pages, for the neighbour.
    pub run: SharedRun,
    mapping: Mapping,
    /// Oldest first, one after the other but for the last bytes, which one that did not fit there left.
    uses: VecDeque<Use>,
    _lease: Lease,
}

impl Bounce {
    /// An empty one of [`BYTES`] bytes.
    #[must_use]
    pub fn new(share: u32, run: SharedRun, mapping: Mapping, lease: Lease) -> Self {
        Self { share, run, mapping, uses: VecDeque::new(), _lease: lease }
    }

    /// The neighbour has read all messages before `consumed`.
    pub fn release(&mut self, consumed: Position) {
        let read = |used: &mut Use| consumed.wrapping_sub(used.message).cast_signed() > 0;
        while self.uses.pop_front_if(read).is_some() {}
    }

    /// Room for so many bytes, if there is, and for `spare` more behind them: own requests leave a piece's to what others READ.
    #[must_use]
    pub fn room(&self, bytes: u32, spare: u32) -> Option<Place> {
        let place = self.room_for(bytes as usize + spare as usize)?;
        Some(Place { bytes: bytes as usize, ..place })
    }

    fn room_for(&self, bytes: usize) -> Option<Place> {
        let (Some(oldest), Some(newest)) = (self.uses.front(), self.uses.back()) else {
            return (bytes <= BYTES).then_some(Place { start: 0, bytes });
        };
        let place = |start, end: usize| (bytes <= end - start).then_some(Place { start, bytes });
        if newest.start >= oldest.start {
            place(newest.end, BYTES).or_else(|| place(0, oldest.start))
        } else {
            place(newest.end, oldest.start)
        }
    }

    /// Copies what `from` names to `place`, which nobody looks at yet.
    ///
    /// # Errors
    /// If the memory is gone.
    pub fn fill(&self, place: Place, from: &[Piece<'_>]) -> Result<(), Lost> {
        match Piece::of(&self.mapping, place.start, place.bytes) {
            Some(to) => copy_list(&[to], 0, from, 0, place.bytes),
            None => Err(Lost::Target),
        }
    }

    /// `place` is in use by the message at this position.
    pub fn hold(&mut self, place: Place, message: Position) {
        self.uses.push_back(Use { message, start: place.start, end: place.start + place.bytes });
    }
}
