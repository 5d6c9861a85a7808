//! Memory files of the container's own: memory that its processes share already, which the proxy shares with them by mapping it
//! too.
//!
//! Such a file stays the container's. It may be shrunk, punched and resized at any time, so an access through a mapping may
//! fail ([`super::Mapping::may_fault`]) and is made by [`crate::guarded`] alone. It may have holes, and whoever looks into a hole makes a
//! page, which is charged to him and stays when the proxy has no more use for the file. So the proxy does not: [`Holes`].
//!
//! Which files they may be is decided without asking a file system that a hostile program may serve, and so that nobody can
//! make an access take as long as he likes: ordinary memory and huge pages, whose faults the kernel answers alone. (Locks that a
//! container can hold as long as it likes, of the inode of ordinary memory, are not taken by a mapping nor by an access. Those of
//! huge pages are held only while the kernel makes or frees pages.)

// UNSAFETY: system calls that rustix does not know.
#![allow(unsafe_code)]

use super::PAGE;
use crate::guarded::Guard;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::fs::{OFlags, fcntl_get_seals, fcntl_getfl, fstat, fstatfs};
use rustix::io::Errno;
use std::sync::Arc;

/// Which file it is, as long as somebody has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    device: u64,
    inode: u64,
}

/// A memory file that the container made.
#[derive(Debug)]
pub struct ForeignFile {
    fd: OwnedFd,
    identity: Identity,
    /// Bytes of its pages.
    page: usize,
}

impl ForeignFile {
    /// Which memory file this is, and the bytes of its pages.
    ///
    /// # Errors
    /// `EINVAL` or `EBADF` for what is no memory file, `EACCES` for one that is not open for reading and writing.
    pub fn inspect(fd: impl AsFd) -> Result<(Identity, usize), Errno> {
        const TMPFS_MAGIC: u64 = 0x0102_1994;
        const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
        // Only files of ordinary memory and of huge pages have seals, and the kernel answers for all others without asking them. An
        // `O_PATH` descriptor is refused here as well.
        fcntl_get_seals(&fd)?;
        // Who may only read could be given the right to write by a proxy that was taken over. Nor can a mapping that is never to be
        // written be watched for holes.
        if fcntl_getfl(&fd)? & OFlags::RWMODE != OFlags::RDWR {
            return Err(Errno::ACCESS);
        }
        let system = fstatfs(&fd)?;
        let page = match system.f_type as u64 {
            TMPFS_MAGIC => PAGE,
            HUGETLBFS_MAGIC => system.f_bsize as usize,
            _ => return Err(Errno::MEDIUMTYPE),
        };
        let status = fstat(&fd)?;
        Ok((Identity { device: status.st_dev, inode: status.st_ino }, page))
    }

    /// A file that [`Self::inspect`] finds nothing wrong with; else it comes back, to be closed where that may take its time.
    ///
    /// # Errors
    /// As [`Self::inspect`].
    pub fn adopt(fd: OwnedFd) -> Result<Self, (OwnedFd, Errno)> {
        match Self::inspect(&fd) {
            Ok((identity, page)) => Ok(Self { fd, identity, page }),
            Err(error) => Err((fd, error)),
        }
    }

    /// Which file it is.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Bytes of its pages: huge ones cannot be mapped in parts.
    #[must_use]
    pub fn page(&self) -> usize {
        self.page
    }

    /// Bytes at this moment.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn bytes_now(&self) -> Result<u64, Errno> {
        Ok(fstat(&self.fd)?.st_size.cast_unsigned())
    }

    /// The descriptor alone.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl AsFd for ForeignFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What keeps the proxy from making pages of files that are not its own: through a mapping that is watched, a page that is not
/// there is a SIGBUS.
///
/// It is a userfaultfd that is asked for signals instead of messages, so that nobody has to answer and nothing waits. RunFile that
/// were swapped out are there.
#[derive(Clone, Debug)]
pub struct Holes {
    // With its last descriptor nothing would be watched any more: mappings keep it.
    fd: Arc<OwnedFd>,
    guard: Guard,
}

/// `struct uffdio_api` of `linux/userfaultfd.h`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    bytes: u64,
    mode: u64,
    ioctls: u64,
}

const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
/// What a proxy asks of it once it is confined.
pub const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;

impl Holes {
    /// Makes one. Nothing needs a privilege, but the call is forbidden later.
    ///
    /// # Errors
    /// What the kernel says: before Linux 5.11, or built without `CONFIG_USERFAULTFD`.
    pub fn new() -> std::io::Result<Self> {
        const USER_MODE_ONLY: libc::c_int = 1;
        const MISSING_HUGETLBFS: u64 = 1 << 4;
        const MISSING_SHMEM: u64 = 1 << 5;
        const SIGBUS: u64 = 1 << 7;
        let guard = Guard::install()?;
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: makes a descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: just made, and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let mut api = Api { api: 0xaa, features: SIGBUS | MISSING_SHMEM | MISSING_HUGETLBFS, ioctls: 0 };
        // SAFETY: the structure that the request reads and writes lives across the call.
        if unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self { fd: Arc::new(fd), guard })
    }

    /// With what accesses to watched memory are guarded.
    pub(super) fn guard(&self) -> Guard {
        self.guard
    }

    /// Watches a range of a mapping of our own until it is unmapped.
    pub(super) fn watch_over(&self, start: *mut u8, bytes: usize) -> Result<(), Errno> {
        const MISSING: u64 = 1;
        let mut register = Register { start: start.addr() as u64, bytes: bytes as u64, mode: MISSING, ioctls: 0 };
        // SAFETY: the structure that the request reads and writes lives across the call; the kernel checks the range.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) } != 0 {
            return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Atomic, Lost, Piece, copy};
    use crate::shared::{Mapping, Run, RunFile};
    use rustix::fs::{
        FallocateFlags, MemfdFlags, Mode, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
    };
    use rustix::io::{pread, pwrite};
    use rustix::mm::ProtFlags;
    use std::os::unix::fs::OpenOptionsExt;

    fn file(pages: usize) -> ForeignFile {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, (pages * PAGE) as u64).unwrap();
        ForeignFile::adopt(fd).unwrap()
    }

    fn mapping(file: &ForeignFile, offset: usize, bytes: usize) -> Result<Arc<Mapping>, Errno> {
        let holes = Holes::new().unwrap();
        let runs = [Run { file: RunFile::Foreign(file, &holes), offset, bytes }];
        Mapping::of_runs(&runs, ProtFlags::READ | ProtFlags::WRITE, true).map(Arc::new)
    }

    fn blocks(file: &ForeignFile) -> i64 {
        fstat(file).unwrap().st_blocks
    }

    #[test]
    fn both_see_the_same_bytes_and_holes_are_errors_that_make_no_page() {
        let file = file(8);
        pwrite(&file, &[7; PAGE], PAGE as u64).unwrap();
        let mapping = mapping(&file, 0, 8 * PAGE).unwrap();
        assert!(mapping.may_fault());
        let (before, mut bytes) = (blocks(&file), [0u8; 16]);
        let there = Piece::of(&mapping, PAGE, 16).unwrap();
        let hole = Piece::of(&mapping, 4 * PAGE, 16).unwrap();
        copy(Piece::of_own_mut(&mut bytes), there).unwrap();
        assert_eq!(bytes, [7; 16]);
        copy(there, Piece::of_own(&[9; 16])).unwrap();
        pread(&file, &mut bytes, PAGE as u64).unwrap();
        assert_eq!(bytes, [9; 16]);
        assert_eq!(copy(Piece::of_own_mut(&mut bytes), hole), Err(Lost::Source));
        assert_eq!(copy(hole, Piece::of_own(&[1; 16])), Err(Lost::Target));
        assert_eq!(copy(hole, there), Err(Lost::Target));
        assert!(hole.fetch_update(Atomic::Add(1)).is_err());
        assert_eq!(blocks(&file), before);
        // Who has it may make the page, and then it is one.
        pwrite(&file, &[5; PAGE], 4 * PAGE as u64).unwrap();
        copy(Piece::of_own_mut(&mut bytes), hole).unwrap();
        assert_eq!(bytes, [5; 16]);
        fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 8 * PAGE as u64).unwrap();
        assert_eq!(copy(there, Piece::of_own(&[1; 16])), Err(Lost::Target));
        ftruncate(&file, 0).unwrap();
        assert_eq!(copy(Piece::of_own_mut(&mut bytes), there), Err(Lost::Source));
        assert_eq!(blocks(&file), 0);
    }

    #[test]
    fn files_of_every_kind_are_told_without_asking_them() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("file");
        let open = |flags| std::fs::OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path);
        std::fs::File::create(&path).unwrap();
        assert_eq!(ForeignFile::inspect(open(0).unwrap()).unwrap().1, PAGE);
        let refused = |fd: OwnedFd, expected| assert_eq!(ForeignFile::adopt(fd).unwrap_err().1, expected);
        refused(open(libc::O_PATH).unwrap().into(), Errno::BADF);
        refused(std::fs::File::open(&path).unwrap().into(), Errno::ACCESS);
        refused(std::fs::OpenOptions::new().write(true).open(&path).unwrap().into(), Errno::ACCESS);
        for path in [directory.path(), "/dev/zero".as_ref(), "/".as_ref(), "/proc/self/maps".as_ref()] {
            refused(std::fs::File::open(path).unwrap().into(), Errno::INVAL);
        }
        let (read, write) = rustix::pipe::pipe().unwrap();
        refused(read, Errno::INVAL);
        refused(write, Errno::INVAL);
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        let fifo = std::fs::OpenOptions::new().read(true).write(true).open(fifo).unwrap();
        refused(fifo.into(), Errno::INVAL);
    }

    #[test]
    fn a_file_that_is_sealed_against_writing_cannot_be_mapped() {
        let file = file(1);
        fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        assert_eq!(mapping(&file, 0, PAGE).unwrap_err(), Errno::PERM);
    }
}
