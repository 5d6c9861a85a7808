//! Memory that the proxy shares with others: memory files and mappings of them.
//!
//! Every file of the proxies' own is sealed against resizing before it is mapped, so that no access through a mapping can raise
//! SIGBUS. Mappings of what the container shares among its processes itself ([`ForeignFile`]) say that theirs may.

// UNSAFETY: mapping memory and handing out references into it; everything else uses the safe types of this module.
#![allow(unsafe_code)]

mod foreign;
mod sealed;

use crate::guarded::Guard;
use ringfence_protocol::ring::{SLOT_BYTES, Slot};
use rustix::fd::AsFd;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::ops::{ControlFlow, Range};
use std::ptr::NonNull;
use std::sync::Arc;

pub use foreign::{ForeignFile, Holes, Identity, UFFDIO_REGISTER};
pub use sealed::SealedFile;

/// Bytes of a page on every architecture that Ringfence runs on.
pub const PAGE: usize = 4096;

/// Makes sure that these bytes of a file with a name can be written through a mapping: where the file system is full, that would
/// be a SIGBUS. A file system that cannot tell is believed to have room.
pub fn allocate(file: impl AsFd, offset: usize, bytes: usize) -> Result<(), Errno> {
    match fallocate(file, FallocateFlags::empty(), offset as u64, bytes as u64) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        result => result,
    }
}

/// A mapping, unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
    /// What is unmapped: more than the bytes asked for, where pages are huge.
    whole: (NonNull<u8>, usize),
    /// Where an access may fail.
    holes: Option<Holes>,
}

// SAFETY: a mapping is an address range of the process, not bound to a thread; access goes through atomics or `copy`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is what mmap returned, and the owner is gone.
        // An error would mean that the range is no mapping, which cannot happen; nothing could be done about it.
        let _ = unsafe { munmap(self.whole.0.as_ptr().cast(), self.whole.1) };
    }
}

/// Whose pages.
#[derive(Clone, Copy, Debug)]
pub enum RunFile<'a> {
    /// A file of a proxy's.
    Sealed(&'a SealedFile),
    /// One of the container's own.
    Foreign(&'a ForeignFile, &'a Holes),
}

/// A run of pages of a file, for [`Mapping::of_runs`].
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// The file.
    pub file: RunFile<'a>,
    /// Byte offset, page aligned.
    pub offset: usize,
    /// Bytes, page aligned.
    pub bytes: usize,
}

impl Run<'_> {
    /// Bytes of the file's pages.
    fn page(&self) -> usize {
        match self.file {
            RunFile::Sealed(_) => PAGE,
            RunFile::Foreign(file, _) => file.page(),
        }
    }

    /// Maps it at this address, which the caller has reserved.
    ///
    /// # Safety
    /// Nothing uses what is there.
    unsafe fn map_at(&self, at: *mut u8, protection: ProtFlags) -> Result<Option<Holes>, Errno> {
        let end = self.offset.checked_add(self.bytes).ok_or(Errno::INVAL)?;
        if self.bytes == 0 {
            return Err(Errno::INVAL);
        }
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        match self.file {
            RunFile::Sealed(file) => {
                if end > file.bytes().next_multiple_of(PAGE) {
                    return Err(Errno::INVAL);
                }
                // SAFETY: promised by the caller.
                unsafe { mmap(at.cast(), self.bytes, protection, flags, file, self.offset as u64)? };
                Ok(None)
            }
            RunFile::Foreign(file, holes) => {
                // Huge pages are reserved for whoever needs them, which is never the proxy.
                let flags = flags | MapFlags::NORESERVE;
                // SAFETY: promised by the caller.
                unsafe { mmap(at.cast(), self.bytes, protection, flags, file, self.offset as u64)? };
                holes.watch_over(at, self.bytes)?;
                Ok(Some(holes.clone()))
            }
        }
    }
}

impl Mapping {
    /// The whole file.
    pub fn of(file: &SealedFile) -> Result<Self, Errno> {
        let run = Run { file: RunFile::Sealed(file), offset: 0, bytes: file.bytes().next_multiple_of(PAGE) };
        Self::of_runs(&[run], ProtFlags::READ | ProtFlags::WRITE, false)
    }

    /// Runs of files side by side in one range of addresses. `populate`: fill the page tables now, not fault by fault, but
    /// with pages only that are there.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for huge pages beside others; what the kernel says.
    pub fn of_runs(runs: &[Run<'_>], protection: ProtFlags, populate: bool) -> Result<Self, Errno> {
        match runs {
            [run] if run.page() > PAGE => return Self::of_huge(run, protection),
            runs if runs.iter().any(|run| run.page() > PAGE) => return Err(Errno::OPNOTSUPP),
            _ => {}
        }
        let bytes = runs.iter().try_fold(0usize, |sum, run| sum.checked_add(run.bytes)).ok_or(Errno::NOMEM)?;
        let mut mapping = Self::reserve(bytes)?;
        let mut at = 0;
        for run in runs {
            // SAFETY: the target lies inside our own reservation, which nobody uses yet: `at + run.bytes <= bytes`.
            let holes = unsafe { run.map_at(mapping.base.as_ptr().add(at), protection)? };
            mapping.holes = mapping.holes.take().or(holes);
            at += run.bytes;
        }
        if populate {
            mapping.populate();
        }
        Ok(mapping)
    }

    /// A run of huge pages, which are mapped whole at an address that is a multiple of them.
    fn of_huge(run: &Run<'_>, protection: ProtFlags) -> Result<Self, Errno> {
        let page = run.page();
        let first = run.offset / page * page;
        let end = run.offset.checked_add(run.bytes).and_then(|end| end.checked_next_multiple_of(page));
        let bytes = end.and_then(|end| end.checked_sub(first)).ok_or(Errno::INVAL)?;
        let mut mapping = Self::reserve(bytes.checked_add(page).ok_or(Errno::NOMEM)?)?;
        let start = mapping.base.as_ptr().addr();
        // SAFETY: as many bytes as a page more than needed are reserved.
        let aligned = unsafe { mapping.base.add(start.next_multiple_of(page) - start) };
        let whole = Run { offset: first, bytes, ..*run };
        // SAFETY: inside our own reservation, as above, which nobody uses yet.
        mapping.holes = unsafe { whole.map_at(aligned.as_ptr(), protection)? };
        // SAFETY: `run` begins in the first page of `whole`.
        mapping.base = unsafe { aligned.add(run.offset - first) };
        mapping.bytes = run.bytes;
        Ok(mapping)
    }

    /// Addresses at which there is nothing, for memory that a card alone reaches: whoever else does ends with the process.
    ///
    /// # Errors
    /// `EINVAL` for none; what the kernel says.
    pub fn of_nothing(bytes: usize) -> Result<Self, Errno> {
        Self::reserve(bytes)
    }

    /// Addresses without memory.
    fn reserve(bytes: usize) -> Result<Self, Errno> {
        if bytes == 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: a fresh reservation at an address of the kernel's choice touches no existing mapping.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)?
        };
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { base, bytes, whole: (base, bytes), holes: None })
    }

    /// With what an access must be guarded, since its memory may be gone.
    #[inline(always)]
    #[must_use]
    pub fn guard(&self) -> Option<Guard> {
        self.holes.as_ref().map(Holes::guard)
    }

    /// Whether an access may fail.
    #[must_use]
    pub fn may_fault(&self) -> bool {
        self.holes.is_some()
    }

    /// Fills the page tables for pages that are in memory. Others would be made, and charged to the proxy instead of the
    /// container that did not touch them.
    fn populate(&self) {
        // Kernels before 5.14 do not know the advice: there it is fault by fault.
        let _ = self.look(0..self.bytes, |pages, present| {
            if present {
                let _ = self.fault_in(pages);
            }
            ControlFlow::Continue(())
        });
    }

    /// Sees that all pages of a range are in memory, and makes or brings back those that are not if they are no more than `most` bytes;
    /// else none, so that trying again does not come closer. How many bytes they were; `None` if not all are there now. The kernel may
    /// take some back to swap space.
    #[must_use]
    pub fn make_present(&self, range: Range<usize>, most: usize) -> Option<usize> {
        let range = range.start / PAGE * PAGE..range.end.min(self.bytes);
        let mut missing = 0;
        let counted = self.look(range.clone(), |pages, present| {
            missing += if present { 0 } else { pages.len() };
            if missing <= most { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        if missing == 0 || counted.is_break() {
            return counted.is_continue().then_some(missing);
        }
        let made = self.look(range, |pages, present| match present || self.fault_in(pages) {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        });
        made.is_continue().then_some(missing)
    }

    /// Calls `each` with runs of pages of a range of bytes that begins with a page, and whether they are in memory.
    fn look(
        &self,
        range: Range<usize>,
        mut each: impl FnMut(Range<usize>, bool) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        const CHUNK: usize = 4096;
        assert!(range.end <= self.bytes && range.start.is_multiple_of(PAGE), "{range:?} of a mapping");
        let mut present = [0u8; CHUNK];
        for at in range.clone().step_by(CHUNK * PAGE) {
            let bytes = (range.end - at).min(CHUNK * PAGE);
            let present = &mut present[..bytes.div_ceil(PAGE)];
            // SAFETY: the range lies in the mapping.
            let base = unsafe { self.base.add(at) }.as_ptr();
            // SAFETY: as above; there is a byte for each page. Unlike `lseek` this takes no lock that another holder of the file
            // could hold.
            if unsafe { libc::mincore(base.cast(), bytes, present.as_mut_ptr()) } != 0 {
                return ControlFlow::Break(());
            }
            let mut first = at;
            for run in present.chunk_by(|a, b| a & 1 == b & 1) {
                let end = (first + run.len() * PAGE).min(range.end);
                each(first..end, run[0] & 1 != 0)?;
                first = end;
            }
        }
        ControlFlow::Continue(())
    }

    /// Has the kernel map pages, and make those that are not there. Whether it did: none before 5.14 knows how.
    fn fault_in(&self, pages: Range<usize>) -> bool {
        // SAFETY: `look` calls with parts of the mapping only, whose contents are not changed.
        unsafe {
            let start = self.base.as_ptr().add(pages.start);
            libc::madvise(start.cast(), pages.len(), libc::MADV_POPULATE_READ) == 0
        }
    }

    /// Bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first byte.
    #[must_use]
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// A structure of atomics at `offset`.
    ///
    /// # Panics
    /// If it does not fit or is not aligned, or the memory may be gone: offsets are constants of the protocol.
    #[must_use]
    pub fn header<T: Header>(self: &Arc<Self>, offset: usize) -> Held<T> {
        assert!(offset + size_of::<T>() <= self.bytes && offset.is_multiple_of(align_of::<T>()), "header at {offset}");
        assert!(!self.may_fault(), "a header in memory that may be gone");
        // SAFETY: the assertion; `T: Header` is valid for any bytes and only holds atomics; `Held` keeps the mapping.
        Held { of: unsafe { self.base.add(offset).cast() }, _mapping: Arc::clone(self) }
    }

    /// Several structures of atomics, side by side from `offset` on.
    ///
    /// # Panics
    /// As [`Self::header`].
    #[must_use]
    pub fn headers<T: Header>(self: &Arc<Self>, offset: usize, count: usize) -> HeldSlice<T> {
        let end = count.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(offset));
        let fits = end.is_some_and(|end| end <= self.bytes) && offset.is_multiple_of(align_of::<T>());
        assert!(fits, "{count} headers at {offset} of {} bytes", self.bytes);
        // SAFETY: as in `header`.
        HeldSlice { of: unsafe { self.base.add(offset).cast() }, count, _mapping: Arc::clone(self) }
    }
}

/// `count` ring slots at `offset`, for a holder that keeps `mapping` beside them.
///
/// The lifetime is not the compiler's to check: every caller stores the `Arc` in the same structure as the ring, which
/// is the reason for the crate-private visibility.
///
/// # Panics
/// If they do not fit: the counts are the proxy's own.
#[must_use]
pub(crate) fn ring_slots(mapping: &Arc<Mapping>, offset: usize, count: u32) -> &'static [Slot] {
    let count = count as usize;
    assert!(
        offset.is_multiple_of(SLOT_BYTES) && offset + count * SLOT_BYTES <= mapping.bytes && !mapping.may_fault(),
        "{count} slots at {offset}"
    );
    // SAFETY: the assertion; slots are atomics, valid for any bytes; the caller keeps the mapping alive.
    unsafe { std::slice::from_raw_parts(mapping.base.add(offset).cast::<Slot>().as_ptr(), count) }
}

/// Types that may be overlaid on shared memory: valid for any bytes, interior mutability through atomics only.
///
/// # Safety
/// The implementor guarantees the sentence above.
pub unsafe trait Header {}
// SAFETY: atomics only.
unsafe impl Header for ringfence_protocol::layout::QpHeader {}
// SAFETY: atomics only.
unsafe impl Header for ringfence_protocol::layout::CqHeader {}
// SAFETY: atomics only.
unsafe impl Header for ringfence_protocol::doorbell::Doorbells {}
// SAFETY: atomics only.
unsafe impl Header for ringfence_protocol::keys::KeyWord {}

/// A reference into a mapping, with the mapping.
#[derive(Debug)]
pub struct Held<T> {
    of: NonNull<T>,
    _mapping: Arc<Mapping>,
}

impl<T> Clone for Held<T> {
    fn clone(&self) -> Self {
        Self { of: self.of, _mapping: Arc::clone(&self._mapping) }
    }
}

// SAFETY: `T: Header` is made of atomics.
unsafe impl<T: Header> Send for Held<T> {}
// SAFETY: as above.
unsafe impl<T: Header> Sync for Held<T> {}

impl<T: Header> std::ops::Deref for Held<T> {
    type Target = T;
    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: made by `Mapping::header` from a checked place; the mapping lives as long as `self`.
        unsafe { self.of.as_ref() }
    }
}

/// As [`Held`], of several side by side.
#[derive(Debug)]
pub struct HeldSlice<T> {
    of: NonNull<T>,
    count: usize,
    _mapping: Arc<Mapping>,
}

// SAFETY: `T: Header` is made of atomics.
unsafe impl<T: Header> Send for HeldSlice<T> {}
// SAFETY: as above.
unsafe impl<T: Header> Sync for HeldSlice<T> {}

impl<T: Header> std::ops::Deref for HeldSlice<T> {
    type Target = [T];
    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: made by `Mapping::headers` from a checked place; the mapping lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.of.as_ptr(), self.count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::fstat;

    #[test]
    fn runs_of_several_files_lie_side_by_side() {
        let a = SealedFile::create("a", 2 * PAGE).unwrap();
        let b = SealedFile::create("b", PAGE).unwrap();
        rustix::io::pwrite(&a, b"A", PAGE as u64).unwrap();
        rustix::io::pwrite(&b, b"B", 0).unwrap();
        let runs = [
            Run { file: RunFile::Sealed(&b), offset: 0, bytes: PAGE },
            Run { file: RunFile::Sealed(&a), offset: PAGE, bytes: PAGE },
        ];
        let mapping = Mapping::of_runs(&runs, ProtFlags::READ, true).unwrap();
        // SAFETY: both offsets lie in the mapping, which nobody writes.
        let (first, second) = unsafe { (*mapping.base().as_ptr(), *mapping.base().as_ptr().add(PAGE)) };
        assert_eq!((first, second), (b'B', b'A'));
    }

    #[test]
    fn populating_fills_page_tables_but_makes_no_pages() {
        let file = SealedFile::create("test", 64 * PAGE).unwrap();
        for page in [0, 1, 40] {
            rustix::io::pwrite(&file, b"x", page * PAGE as u64).unwrap();
        }
        let runs = [Run { file: RunFile::Sealed(&file), offset: 0, bytes: 64 * PAGE }];
        let mapping = Mapping::of_runs(&runs, ProtFlags::READ | ProtFlags::WRITE, true).unwrap();
        assert_eq!(fstat(&file).unwrap().st_blocks * 512, 3 * PAGE as i64);
        let resident = |line: &str| {
            let (start, _) = line.split_once('-')?;
            (usize::from_str_radix(start, 16).ok()? == mapping.base().as_ptr().addr()).then_some(())
        };
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let rss = smaps.lines().skip_while(|line| resident(line).is_none()).find(|line| line.starts_with("Rss:"));
        assert!(rss.is_some_and(|rss| rss.ends_with(" 12 kB")), "{rss:?}");
    }

    #[test]
    fn pages_are_made_as_far_as_is_said() {
        let file = SealedFile::create("test", 5000 * PAGE).unwrap();
        let made = || fstat(&file).unwrap().st_blocks as usize * 512 / PAGE;
        for page in [0, 1, 4500] {
            rustix::io::pwrite(&file, b"x", page * PAGE as u64).unwrap();
        }
        let runs = [Run { file: RunFile::Sealed(&file), offset: 0, bytes: 5000 * PAGE }];
        let mapping = Mapping::of_runs(&runs, ProtFlags::READ, false).unwrap();
        assert_eq!(mapping.make_present(0..2 * PAGE, 0), Some(0));
        assert_eq!(mapping.make_present(0..2 * PAGE + 1, 0), None);
        assert_eq!(made(), 3);
        assert_eq!(mapping.make_present(PAGE..4 * PAGE, 2 * PAGE), Some(2 * PAGE));
        assert_eq!(made(), 5);
        // What is too much is not begun, and comes no closer however often it is tried.
        for (first, most) in [(4090, 100), (0, 4500), (0, 4500)] {
            assert_eq!(mapping.make_present(first * PAGE..5000 * PAGE, most * PAGE), None);
            assert_eq!(made(), 5);
        }
        assert_eq!(mapping.make_present(0..5000 * PAGE, 5000 * PAGE), Some(4995 * PAGE));
        assert_eq!(made(), 5000);
    }

    #[test]
    fn runs_past_a_files_end_are_refused() {
        let file = SealedFile::create("test", PAGE).unwrap();
        let runs = [Run { file: RunFile::Sealed(&file), offset: PAGE, bytes: PAGE }];
        assert_eq!(Mapping::of_runs(&runs, ProtFlags::READ, false).unwrap_err(), Errno::INVAL);
    }
}
