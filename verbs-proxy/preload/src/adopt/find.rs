//! Finds the file behind a mapping.
//!
//! The kernel gives it to the privileged only (`/proc/self/map_files`). So it is looked for among the process's descriptors, and
//! where its path leads to; what is found must be the same file.

use crate::pages::Shown;
use crate::sys::{self, Errno, Fd};
use core::ffi::{CStr, c_int};
use core::fmt::{self, Write};

/// Device (major and minor number) and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub device: (u32, u32),
    pub inode: u64,
}

impl Identity {
    fn of(status: &libc::stat) -> Self {
        Self { device: (libc::major(status.st_dev), libc::minor(status.st_dev)), inode: status.st_ino }
    }

    /// Whether this is what is open under a number now.
    fn is_at(self, number: c_int) -> bool {
        sys::stat(number).is_ok_and(|status| Self::of(&status) == self)
    }
}

/// The file behind the mapping, open for reading and writing.
///
/// `EOPNOTSUPP` if it cannot be had, or is one that the proxy cannot map safely; `EFAULT` if a driver could not pin it: a
/// device's memory, or a writable mapping of a file that must know when it is written.
pub fn file(shown: &Shown, identity: Identity) -> Result<Fd, Errno> {
    if let Some(file) = among_descriptors(identity) {
        return Ok(file);
    }
    let link = Path::of(format_args!("/proc/self/map_files/{:x}-{:x}", shown.range.start, shown.range.end))?;
    let here = |file: &Fd| file.number().is_ok_and(|number| identity.is_at(number) && is_memory(number));
    if let Ok(file) = sys::open(link.as_c(), libc::O_RDWR | libc::O_NONBLOCK)
        && here(&file)
    {
        return Ok(file);
    }
    let mut target = [0; 4096];
    // Before Linux 4.3 only the privileged may read it.
    let length = sys::read_link(link.as_c(), &mut target).map_err(|_| libc::EOPNOTSUPP)?;
    at_path(&target[..length], identity, shown.protection & libc::PROT_WRITE != 0, here)
}

/// Whether it is a memory file, whose pages the kernel alone provides. Asks no file system.
fn is_memory(number: c_int) -> bool {
    sys::fcntl(number, libc::F_GET_SEALS, 0).is_ok()
}

fn among_descriptors(identity: Identity) -> Option<Fd> {
    let directory = sys::open(c"/proc/self/fd", libc::O_RDONLY | libc::O_DIRECTORY).ok()?;
    let mut read_only = None;
    let found = sys::each_entry(directory.number().ok()?, |name| {
        let number = name.iter().try_fold(0, |number: c_int, digit| {
            let digit = c_int::from(digit.checked_sub(b'0').filter(|digit| *digit < 10)?);
            number.checked_mul(10)?.checked_add(digit)
        })?;
        // In this order: others might have to be asked for their status, by whoever serves them.
        if !is_memory(number) || !identity.is_at(number) {
            return None;
        }
        match sys::fcntl(number, libc::F_GETFL, 0).ok()? & libc::O_ACCMODE {
            // Of our own, since the program may close its at any time, or have another file there by now.
            libc::O_RDWR => {
                sys::duplicate(number).ok().filter(|file| file.known().number().is_ok_and(|n| identity.is_at(n)))
            }
            _ => {
                read_only = Some(number);
                None
            }
        }
    });
    found.or_else(|| reopened(read_only?, identity))
}

/// The file of a descriptor once more, for writing as well, if the process may.
fn reopened(number: c_int, identity: Identity) -> Option<Fd> {
    let path = Path::of(format_args!("/proc/self/fd/{number}")).ok()?;
    let file = sys::open(path.as_c(), libc::O_RDWR | libc::O_NONBLOCK).ok()?;
    file.number().is_ok_and(|number| identity.is_at(number) && is_memory(number)).then_some(file)
}

/// The file that a mapping's name leads to.
fn at_path(name: &[u8], identity: Identity, writable: bool, here: impl Fn(&Fd) -> bool) -> Result<Fd, Errno> {
    const TMPFS: u64 = 0x0102_1994;
    const HUGETLBFS: u64 = 0x9584_58f6;
    const OVERLAYFS: u64 = 0x794c_7630;
    // What has no path is no file system's: the rings of a socket or a device, say.
    if !name.starts_with(b"/") {
        return Err(libc::EFAULT);
    }
    let path = Path::of_bytes(name)?;
    // Without following a link, and without opening what may be a device.
    let place = sys::open(path.as_c(), libc::O_PATH | libc::O_NOFOLLOW).map_err(|_| libc::EOPNOTSUPP)?;
    let number = place.number()?;
    let (status, system) = (sys::stat(number)?, sys::file_system(number)?);
    let kind = status.st_mode & libc::S_IFMT;
    // A file of an overlay is mapped as the one below it, which has the same number.
    let same = Identity::of(&status) == identity || (system == OVERLAYFS && status.st_ino == identity.inode);
    match (same, system) {
        (false, _) => Err(libc::EOPNOTSUPP),
        (true, TMPFS | HUGETLBFS) if kind == libc::S_IFREG => {
            let again = Path::of(format_args!("/proc/self/fd/{number}"))?;
            let file = sys::open(again.as_c(), libc::O_RDWR | libc::O_NONBLOCK).map_err(|_| libc::EOPNOTSUPP)?;
            if here(&file) { Ok(file) } else { Err(libc::EOPNOTSUPP) }
        }
        // As the kernel does since Linux 6.5: it must know when such a file is written.
        (true, _) if kind != libc::S_IFREG || writable => Err(libc::EFAULT),
        _ => Err(libc::EOPNOTSUPP),
    }
}

/// A path with its terminating zero.
struct Path {
    bytes: [u8; 4097],
    length: usize,
}

impl Path {
    fn of(text: fmt::Arguments<'_>) -> Result<Self, Errno> {
        let mut path = Self { bytes: [0; 4097], length: 0 };
        path.write_fmt(text).map_err(|_| libc::ENAMETOOLONG)?;
        Ok(path)
    }

    fn of_bytes(bytes: &[u8]) -> Result<Self, Errno> {
        let mut path = Self { bytes: [0; 4097], length: 0 };
        path.push(bytes).map_err(|_| libc::EOPNOTSUPP)?;
        Ok(path)
    }

    fn push(&mut self, bytes: &[u8]) -> fmt::Result {
        let room = self.bytes.len() - 1 - self.length;
        if bytes.len() > room || bytes.contains(&0) {
            return Err(fmt::Error);
        }
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
        Ok(())
    }

    fn as_c(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or_default()
    }
}

impl Write for Path {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text.as_bytes())
    }
}
