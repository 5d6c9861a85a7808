//! Memory as the data path sees it: where the bytes are in this process, how long, and how they are copied. Keys and bounds are in
//! the modules below.

// UNSAFETY: computes addresses inside mappings and copies between them.
#![allow(unsafe_code)]

mod pieces;
mod present;
mod region;
mod table;

use crate::guarded::{self, Guard};
use crate::rseq::{Thread, Undone, While};
use crate::shared::Mapping;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

pub use pieces::Pieces;
pub use region::{AccessFault, DeviceKey, Hold, MemoryRegion, PdId};
pub use table::{Entrance, Granted, RegionTable, places};

/// Bytes that were checked to lie in a mapping, which stays for as long as what they are borrowed from.
///
/// The memory belongs to a container, which writes to it as it likes; nothing may be concluded from its contents.
///
/// A piece is used before its mapping goes:
///
/// ```
/// use ringfence_proxy::memory::{Piece, copy};
/// use ringfence_proxy::shared::Mapping;
///
/// fn first(mapping: Mapping, bytes: &mut [u8]) {
///     let piece = Piece::of(&mapping, 0, 8).unwrap();
///     copy(Piece::of_own_mut(bytes), piece).unwrap();
///     drop(mapping);
/// }
/// ```
///
/// It cannot be used afterwards:
///
/// ```compile_fail,E0505
/// use ringfence_proxy::memory::{Piece, copy};
/// use ringfence_proxy::shared::Mapping;
///
/// fn first(mapping: Mapping, bytes: &mut [u8]) {
///     let piece = Piece::of(&mapping, 0, 8).unwrap();
///     drop(mapping);
///     copy(Piece::of_own_mut(bytes), piece).unwrap();
/// }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    address: *mut u8,
    bytes: usize,
    /// Where the memory may be gone.
    guard: Option<Guard>,
    /// Of a [`Mapping`], of a [`RegionTable`] whose regions keep theirs, or of bytes of the proxy's own.
    borrowed: PhantomData<&'a ()>,
}

// SAFETY: an address of the process, not of a thread.
unsafe impl Send for Piece<'_> {}

/// The memory on this side of a copy is gone: the container took pages away from a file of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// What was to be read.
    Source,
    /// What was to be written.
    Target,
}

/// Why an atomic was not executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotAtomic {
    /// Not 8 aligned bytes.
    Misaligned,
    /// The memory is gone.
    Lost,
}

/// An atomic operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Atomic {
    /// FETCH_AND_ADD.
    Add(u64),
    /// CMP_AND_SWP.
    Swap {
        /// If it is this ...
        expected: u64,
        /// ... it becomes that.
        new: u64,
    },
}

impl Atomic {
    /// What becomes of this value.
    fn applied(self, old: u64) -> u64 {
        match self {
            Self::Add(addend) => old.wrapping_add(addend),
            Self::Swap { expected, new } if old == expected => new,
            Self::Swap { .. } => old,
        }
    }
}

impl<'a> Piece<'a> {
    /// Bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// `bytes` at `offset` of `mapping`.
    #[must_use]
    pub fn of(mapping: &'a Mapping, offset: usize, bytes: usize) -> Option<Self> {
        let end = offset.checked_add(bytes)?;
        // SAFETY: `offset <= end <= mapping.bytes()`.
        let address = |offset| unsafe { mapping.base().as_ptr().add(offset) };
        (end <= mapping.bytes()).then(|| Self {
            address: address(offset),
            bytes,
            guard: mapping.guard(),
            borrowed: PhantomData,
        })
    }

    /// Bytes of the proxy's own, to copy from.
    #[must_use]
    pub fn of_own(bytes: &'a [u8]) -> Self {
        Self { address: bytes.as_ptr().cast_mut(), bytes: bytes.len(), guard: None, borrowed: PhantomData }
    }

    /// The same, to copy to.
    #[must_use]
    pub fn of_own_mut(bytes: &'a mut [u8]) -> Self {
        Self { address: bytes.as_mut_ptr(), bytes: bytes.len(), guard: None, borrowed: PhantomData }
    }

    /// What remains after the first `offset` bytes, at most `bytes` of it.
    #[must_use]
    pub fn slice(self, offset: usize, bytes: usize) -> Self {
        let offset = offset.min(self.bytes);
        // SAFETY: `offset` is at most the piece's length.
        Self { address: unsafe { self.address.add(offset) }, bytes: bytes.min(self.bytes - offset), ..self }
    }

    /// What remains after the first `offset` bytes, if anything does.
    fn rest(self, offset: usize) -> Option<Self> {
        Some(self.slice(offset, usize::MAX)).filter(|piece| piece.bytes > 0)
    }

    /// Has the kernel make the page of the first byte, if it is not there.
    fn touch(&self) {
        // SAFETY: this one has a byte; what it is does not matter.
        unsafe { self.address.read_volatile() };
    }

    /// The atomic at this place, if it is 8 bytes long and aligned.
    #[must_use]
    fn atomic(&self) -> Option<&'a AtomicU64> {
        // SAFETY: the alignment and length are checked; shared memory holds any bytes.
        (self.bytes == 8 && self.address.addr().is_multiple_of(8))
            .then(|| unsafe { AtomicU64::from_ptr(self.address.cast()) })
    }

    /// Whether its memory may be gone.
    #[inline(always)]
    #[must_use]
    pub fn may_fault(&self) -> bool {
        self.guard.is_some()
    }

    /// Whether an atomic can be executed here.
    #[must_use]
    pub fn is_for_atomics(&self) -> bool {
        self.atomic().is_some() && !self.may_fault()
    }

    /// As [`Self::fetch_update`], while `condition` holds. The memory is there, and the place one for atomics.
    pub fn fetch_update_while(&self, atomic: Atomic, thread: Thread, condition: While) -> Result<u64, Undone> {
        if !self.is_for_atomics() {
            return Err(Undone::Gone);
        }
        // SAFETY: the memory is there and aligned, as was checked; the word is in a mapping that whoever made the condition keeps.
        unsafe {
            match atomic {
                Atomic::Add(addend) => thread.add(self.address, addend, condition),
                Atomic::Swap { expected, new } => thread.compare_exchange(self.address, expected, new, condition),
            }
        }
    }

    /// FETCH_AND_ADD or CMP_AND_SWP on this place: the former value.
    pub fn fetch_update(&self, operation: Atomic) -> Result<u64, NotAtomic> {
        let atomic = self.atomic().ok_or(NotAtomic::Misaligned)?;
        let Some(guard) = self.guard else {
            let order = Ordering::SeqCst;
            return Ok(match operation {
                Atomic::Add(addend) => atomic.fetch_add(addend, order),
                Atomic::Swap { expected, new } => {
                    atomic.compare_exchange(expected, new, order, order).unwrap_or_else(|found| found)
                }
            });
        };
        // The first guess is as good as any: a wrong one finds the value out.
        let mut expected = 0;
        loop {
            // SAFETY: aligned, as was checked.
            let found =
                unsafe { guarded::compare_exchange(guard, self.address, expected, operation.applied(expected)) };
            match found.map_err(|_| NotAtomic::Lost)? {
                found if found == expected => return Ok(found),
                found => expected = found,
            }
        }
    }
}

/// Copies `from` over `to`, as far as both go, the last byte last.
///
/// Applications wait for a WRITE by polling its last byte, as RNICs deliver in order; `memcpy` alone would not. If memory is
/// [`Lost`], a part may have been copied.
#[inline(always)]
pub fn copy(to: Piece<'_>, from: Piece<'_>) -> Result<(), Lost> {
    let bytes = to.bytes.min(from.bytes);
    if let Some(guard) = to.guard.or(from.guard) {
        return copy_guarded(guard, to, from, bytes);
    }
    let both = to.address.addr() | from.address.addr();
    // SAFETY (all blocks below): `bytes` is within both pieces, and nobody passes what [`Piece::of_own`] made for `to`. The peer
    // may write at the same time, in another process: what arrives is then a mix, and nothing here looks at it. Regions may
    // overlap only where the container asked for that.
    if bytes == 8 && both.is_multiple_of(8) {
        // SAFETY: as above; aligned, one store as on an RNIC.
        unsafe {
            let value = AtomicU64::from_ptr(from.address.cast()).load(Ordering::Relaxed);
            AtomicU64::from_ptr(to.address.cast()).store(value, Ordering::Release);
        }
    } else if bytes == 4 && both.is_multiple_of(4) {
        // SAFETY: as above.
        unsafe {
            let value = AtomicU32::from_ptr(from.address.cast()).load(Ordering::Relaxed);
            AtomicU32::from_ptr(to.address.cast()).store(value, Ordering::Release);
        }
    } else if bytes > 0 {
        // SAFETY: as above.
        unsafe {
            std::ptr::copy(from.address, to.address, bytes - 1);
            let value = AtomicU8::from_ptr(from.address.add(bytes - 1)).load(Ordering::Relaxed);
            AtomicU8::from_ptr(to.address.add(bytes - 1)).store(value, Ordering::Release);
        }
    }
    Ok(())
}

/// As [`copy`], of memory that is there, while `condition` holds. If it does not, a part may have been copied.
#[inline(always)]
pub fn copy_while(to: Piece<'_>, from: Piece<'_>, thread: Thread, condition: While) -> Result<(), Undone> {
    let bytes = to.bytes.min(from.bytes);
    if to.may_fault() || from.may_fault() {
        return Err(Undone::Gone);
    }
    // SAFETY: `bytes` is within both, and whoever shares them expects any bytes; the memory is there, as was checked; the word is in
    // a mapping that whoever made the condition keeps.
    unsafe { thread.copy(to.address, from.address, bytes, condition) }
}

#[inline(never)]
fn copy_guarded(guard: Guard, to: Piece<'_>, from: Piece<'_>, bytes: usize) -> Result<(), Lost> {
    // SAFETY: `bytes` is within both, and whoever shares them expects any bytes.
    let copied = unsafe { guarded::copy(guard, to.address, from.address, bytes) };
    copied.map_err(|fault| {
        let target = to.guard.is_some() && (from.guard.is_none() || fault.is_in(to.address, bytes));
        if target { Lost::Target } else { Lost::Source }
    })
}

/// Copies `bytes` from the gathered `from`, starting at `from_offset`, to the scattered `to`, starting at `to_offset`.
///
/// # Errors
/// As for [`copy`].
pub fn copy_list(
    to: &[Piece<'_>],
    mut to_offset: usize,
    from: &[Piece<'_>],
    mut from_offset: usize,
    mut bytes: usize,
) -> Result<(), Lost> {
    let (mut to, mut from) = (to.iter(), from.iter());
    let (mut target, mut source) = (to.next(), from.next());
    while bytes > 0 {
        let (Some(t), Some(s)) = (target, source) else { break };
        if to_offset >= t.bytes {
            to_offset -= t.bytes;
            target = to.next();
        } else if from_offset >= s.bytes {
            from_offset -= s.bytes;
            source = from.next();
        } else {
            let step = bytes.min(t.bytes - to_offset).min(s.bytes - from_offset);
            copy(t.slice(to_offset, step), s.slice(from_offset, step))?;
            to_offset += step;
            from_offset += step;
            bytes -= step;
        }
    }
    Ok(())
}

/// As [`copy_list`] from the beginning of both, while `condition` holds.
pub fn copy_list_while(to: &[Piece<'_>], from: &[Piece<'_>], thread: Thread, condition: While) -> Result<(), Undone> {
    let (mut to, mut from) = (to.iter().copied(), from.iter().copied());
    let (mut target, mut source) = (to.next(), from.next());
    while let (Some(t), Some(s)) = (target, source) {
        let step = t.bytes.min(s.bytes);
        copy_while(t.slice(0, step), s.slice(0, step), thread, condition)?;
        (target, source) = (t.rest(step).or_else(|| to.next()), s.rest(step).or_else(|| from.next()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut<'a>(whole: Piece<'a>, lengths: &[usize]) -> Vec<Piece<'a>> {
        let mut at = 0;
        let piece = |bytes: &usize| {
            let piece = whole.slice(at, *bytes);
            at += bytes;
            piece
        };
        lengths.iter().map(piece).collect()
    }

    proptest! {
        #[test]
        fn lists_are_copied_like_one_run(
            from in prop::collection::vec(0usize..40, 1..6),
            to in prop::collection::vec(0usize..40, 1..6),
            from_offset in 0usize..50,
            to_offset in 0usize..50,
            bytes in 0usize..120,
        ) {
            let source: Vec<u8> = (0..from.iter().sum::<usize>()).map(|i| i as u8 + 1).collect();
            let mut target = vec![0u8; to.iter().sum()];
            let mut expected = target.clone();
            let step = bytes.min(source.len().saturating_sub(from_offset)).min(target.len().saturating_sub(to_offset));
            if step > 0 {
                expected[to_offset..to_offset + step].copy_from_slice(&source[from_offset..from_offset + step]);
            }
            let from = cut(Piece::of_own(&source), &from);
            let to = cut(Piece::of_own_mut(&mut target), &to);
            copy_list(&to, to_offset, &from, from_offset, bytes).unwrap();
            prop_assert_eq!(target, expected);
        }
    }
}
