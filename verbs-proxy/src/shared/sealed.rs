//! Memory files of the proxies' own, which are sealed against resizing.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs, ftruncate, memfd_create,
};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use std::sync::OnceLock;

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A memory file whose size can no longer change.
#[derive(Debug)]
pub struct SealedFile {
    fd: OwnedFd,
    bytes: usize,
    /// Of the file, which may be longer than what it is for.
    length: u64,
}

/// The longest file that this process may make. Asked when the first is made, before the question is forbidden; a longer one
/// would be a signal.
static LONGEST: OnceLock<u64> = OnceLock::new();

impl SealedFile {
    /// A new file of zeros.
    pub fn create(name: &str, bytes: usize) -> Result<Self, Errno> {
        Self::create_longer(name, bytes, 0)
    }

    /// The same with up to `spare` bytes more at its end, in which nothing is and which [`Self::bytes`] does not count.
    pub fn create_longer(name: &str, bytes: usize, spare: u64) -> Result<Self, Errno> {
        let longest = *LONGEST.get_or_init(|| getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX));
        let length = (bytes as u64).max((bytes as u64).saturating_add(spare).min(longest));
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL)
            // Kernels before 6.3 do not know NOEXEC_SEAL.
            .or_else(|_| memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING))?;
        // Nobody opens it again but our warden: who was given it for reading could open it for writing otherwise.
        fchmod(&fd, Mode::RUSR)?;
        ftruncate(&fd, length)?;
        fcntl_add_seals(&fd, SEALS)?;
        Ok(Self { fd, bytes, length })
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
        Ok(Self { fd, bytes, length: bytes as u64 })
    }

    /// A file that cannot be sealed because it has a name, in a directory where only proxies write.
    pub fn trusted(fd: OwnedFd) -> Result<Self, Errno> {
        let bytes = usize::try_from(fstat(&fd)?.st_size).map_err(|_| Errno::INVAL)?;
        Ok(Self { fd, bytes, length: bytes as u64 })
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

    /// Bytes with those that are spare.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }
}

impl AsFd for SealedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::{Mapping, PAGE};

    #[test]
    fn a_sealed_file_cannot_be_resized() {
        let file = SealedFile::create("test", PAGE).unwrap();
        assert_eq!(ftruncate(&file, 0), Err(Errno::PERM));
        assert_eq!(ftruncate(&file, 2 * PAGE as u64), Err(Errno::PERM));
    }

    #[test]
    fn what_a_file_has_to_spare_does_not_count() {
        let file = SealedFile::create_longer("test", PAGE, 1 << 40).unwrap();
        assert_eq!((file.bytes(), file.length()), (PAGE, PAGE as u64 + (1 << 40)));
        assert_eq!(fstat(&file).unwrap().st_blocks, 0);
        assert_eq!(Mapping::of(&file).unwrap().bytes(), PAGE);
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
}
