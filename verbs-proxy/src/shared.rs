//! Memory that the proxy shares with others: sealed memory files and mappings of them.
//!
//! Every file is sealed against resizing before it is mapped, so that no access through a mapping can raise SIGBUS.

// UNSAFETY: mapping memory and handing out references into it; everything else uses the safe types of this module.
#![allow(unsafe_code)]

use ringfence_protocol::ring::{SLOT_BYTES, Slot};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    FallocateFlags, MemfdFlags, Mode, SealFlags, fallocate, fchmod, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs,
    ftruncate, memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::ptr::NonNull;
use std::sync::Arc;

/// Bytes of a page on every architecture that Ringfence runs on.
pub const PAGE: usize = 4096;

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A memory file whose size can no longer change.
#[derive(Debug)]
pub struct SealedFile {
    fd: OwnedFd,
    bytes: usize,
}

impl SealedFile {
    /// A new file of zeros.
    pub fn create(name: &str, bytes: usize) -> Result<Self, Errno> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL)
            // Kernels before 6.3 do not know NOEXEC_SEAL.
            .or_else(|_| memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING))?;
        // Nobody opens it again but our warden: who was given it for reading could open it for writing otherwise.
        fchmod(&fd, Mode::RUSR)?;
        ftruncate(&fd, bytes as u64)?;
        fcntl_add_seals(&fd, SEALS)?;
        Ok(Self { fd, bytes })
    }

    /// Whether somebody else's file can be taken in: sealed memory of ordinary pages.
    ///
    /// The seals come first: only memory files have any, and the kernel answers for all others without asking them, which a
    /// file system that a hostile program serves would answer when it likes. Huge pages are refused, because one that is not
    /// to be had is a SIGBUS to whoever touches it.
    pub fn inspect(fd: impl AsFd) -> Result<(), Errno> {
        const TMPFS_MAGIC: u64 = 0x0102_1994;
        if !fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(Errno::PERM);
        }
        if fstatfs(&fd)?.f_type as u64 == TMPFS_MAGIC { Ok(()) } else { Err(Errno::MEDIUMTYPE) }
    }

    /// Somebody else's file, accepted only if [`Self::inspect`] finds nothing wrong with it.
    pub fn adopt(fd: OwnedFd) -> Result<Self, Errno> {
        Self::inspect(&fd)?;
        let bytes = usize::try_from(fstat(&fd)?.st_size).map_err(|_| Errno::INVAL)?;
        Ok(Self { fd, bytes })
    }

    /// A file that cannot be sealed because it has a name, in a directory where only proxies write.
    pub fn trusted(fd: OwnedFd) -> Result<Self, Errno> {
        let bytes = usize::try_from(fstat(&fd)?.st_size).map_err(|_| Errno::INVAL)?;
        Ok(Self { fd, bytes })
    }

    /// The descriptor alone.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Bytes, fixed for good.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl AsFd for SealedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

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
}

// SAFETY: a mapping is an address range of the process, not bound to a thread; access goes through atomics or `copy`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base` and `bytes` are what mmap returned, and the owner is gone.
        // An error would mean that the range is no mapping, which cannot happen; nothing could be done about it.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// A run of pages of a file, for [`Mapping::of_runs`].
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// The file.
    pub file: &'a SealedFile,
    /// Byte offset, page aligned.
    pub offset: usize,
    /// Bytes, page aligned.
    pub bytes: usize,
}

impl Mapping {
    /// The whole file.
    pub fn of(file: &SealedFile) -> Result<Self, Errno> {
        Self::of_runs(
            &[Run { file, offset: 0, bytes: file.bytes().next_multiple_of(PAGE) }],
            ProtFlags::READ | ProtFlags::WRITE,
            false,
        )
    }

    /// Runs of files side by side in one range of addresses. `populate`: fill the page tables now, not fault by fault, but
    /// with pages only that are there.
    pub fn of_runs(runs: &[Run<'_>], protection: ProtFlags, populate: bool) -> Result<Self, Errno> {
        let bytes = runs.iter().try_fold(0usize, |sum, run| sum.checked_add(run.bytes)).ok_or(Errno::NOMEM)?;
        if bytes == 0 {
            return Err(Errno::INVAL);
        }
        if let [run] = runs {
            let end = run.offset.checked_add(run.bytes).ok_or(Errno::INVAL)?;
            if end > run.file.bytes().next_multiple_of(PAGE) {
                return Err(Errno::INVAL);
            }
            // SAFETY: a new mapping at an address of the kernel's choice touches no existing one.
            let base = unsafe {
                mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, run.file, run.offset as u64)?
            };
            let mapping = Self { base: NonNull::new(base.cast()).ok_or(Errno::NOMEM)?, bytes };
            if populate {
                mapping.populate();
            }
            return Ok(mapping);
        }
        // SAFETY: a fresh reservation at an address of the kernel's choice touches no existing mapping.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)?
        };
        let reservation = Self { base: NonNull::new(base.cast()).ok_or(Errno::NOMEM)?, bytes };
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        let mut at = 0;
        for run in runs {
            let end = run.offset.checked_add(run.bytes).ok_or(Errno::INVAL)?;
            if end > run.file.bytes().next_multiple_of(PAGE) || run.bytes == 0 {
                return Err(Errno::INVAL);
            }
            // SAFETY: the target lies inside our own reservation: `at + run.bytes <= bytes`.
            unsafe {
                mmap(base.cast::<u8>().add(at).cast(), run.bytes, protection, flags, run.file, run.offset as u64)?;
            }
            at += run.bytes;
        }
        if populate {
            reservation.populate();
        }
        Ok(reservation)
    }

    /// Fills the page tables for pages that are in memory. Others would be made, and charged to the proxy instead of the
    /// container that did not touch them.
    fn populate(&self) {
        const CHUNK: usize = 4096;
        let mut present = [0u8; CHUNK];
        for at in (0..self.bytes).step_by(CHUNK * PAGE) {
            let bytes = (self.bytes - at).min(CHUNK * PAGE);
            let present = &mut present[..bytes / PAGE];
            // SAFETY: the range lies in the mapping; there is a byte for each of its pages.
            let base = unsafe { self.base.add(at) }.as_ptr();
            // SAFETY: as above. Unlike `lseek` this takes no lock that another holder of the file could hold.
            if unsafe { libc::mincore(base.cast(), bytes, present.as_mut_ptr()) } != 0 {
                return;
            }
            for run in present.chunk_by(|a, b| a & 1 == b & 1) {
                if run[0] & 1 == 0 {
                    continue;
                }
                // Where `run` begins in `present`, in pages.
                let first = run.as_ptr().addr() - present.as_ptr().addr();
                // SAFETY: the range lies in the mapping; its contents are not changed.
                let start = unsafe { base.add(first * PAGE) };
                // SAFETY: as above. Kernels before 5.14 do not know the advice: there it is fault by fault.
                let _ = unsafe { libc::madvise(start.cast(), run.len() * PAGE, libc::MADV_POPULATE_READ) };
            }
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
    /// If it does not fit or is not aligned: offsets are constants of the protocol.
    #[must_use]
    pub fn header<T: Header>(self: &Arc<Self>, offset: usize) -> Held<T> {
        assert!(offset + size_of::<T>() <= self.bytes && offset.is_multiple_of(align_of::<T>()), "header at {offset}");
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
        offset.is_multiple_of(SLOT_BYTES) && offset + count * SLOT_BYTES <= mapping.bytes,
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

    #[test]
    fn a_sealed_file_cannot_be_resized() {
        let file = SealedFile::create("test", PAGE).unwrap();
        assert_eq!(ftruncate(&file, 0), Err(Errno::PERM));
        assert_eq!(ftruncate(&file, 2 * PAGE as u64), Err(Errno::PERM));
    }

    #[test]
    fn an_unsealed_file_is_not_adopted() {
        let fd = memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        assert_eq!(SealedFile::adopt(fd).unwrap_err(), Errno::PERM);
    }

    #[test]
    fn huge_pages_and_what_is_no_memory_file_are_not_adopted() {
        let sealed = SealFlags::SHRINK | SealFlags::GROW;
        // Needs no huge page as long as none is touched.
        if let Ok(fd) = memfd_create("test", MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB) {
            fcntl_add_seals(&fd, sealed).unwrap();
            assert_eq!(SealedFile::adopt(fd).unwrap_err(), Errno::MEDIUMTYPE);
        }
        for path in ["/dev/zero", "/", "/proc/self/maps"] {
            let file = std::fs::File::open(path).unwrap();
            assert_eq!(SealedFile::adopt(file.into()).unwrap_err(), Errno::INVAL, "{path}");
        }
    }

    #[test]
    fn runs_of_several_files_lie_side_by_side() {
        let a = SealedFile::create("a", 2 * PAGE).unwrap();
        let b = SealedFile::create("b", PAGE).unwrap();
        rustix::io::pwrite(&a, b"A", PAGE as u64).unwrap();
        rustix::io::pwrite(&b, b"B", 0).unwrap();
        let runs = [Run { file: &b, offset: 0, bytes: PAGE }, Run { file: &a, offset: PAGE, bytes: PAGE }];
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
        let runs = [Run { file: &file, offset: 0, bytes: 64 * PAGE }];
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
    fn runs_past_a_files_end_are_refused() {
        let file = SealedFile::create("test", PAGE).unwrap();
        let runs = [Run { file: &file, offset: PAGE, bytes: PAGE }];
        assert_eq!(Mapping::of_runs(&runs, ProtFlags::READ, false).unwrap_err(), Errno::INVAL);
    }
}
