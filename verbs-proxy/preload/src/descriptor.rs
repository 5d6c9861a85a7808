//! Descriptors of ours in somebody else's process.
//!
//! Programs close descriptors that they did not open (daemons close all of them), and the numbers are given out again. So
//! a number alone says nothing: beside it stands who was behind it, and that is looked up again before anything is done
//! with it. What is behind another number now, or another file behind this one, is not ours to touch.
//!
//! Descriptors that the program knows nothing of are moved out of its way, above the numbers that `select(2)` can name and
//! that programs close in a loop. Those that are part of the interface stay where the kernel put them.

// UNSAFETY: system calls.
#![allow(unsafe_code)]

use crate::sys::{self, Errno};
use core::ffi::c_int;
use core::sync::atomic::{AtomicI32, AtomicU64, Ordering};

/// Where descriptors that the program knows nothing of go, if there are so many: past `FD_SETSIZE`, and low enough that the
/// kernel's table of descriptors, which each fork copies, stays small.
const HIGH: u64 = 1536;
/// Numbers above it that must be left for it to be used.
const SPARE: u64 = 64;

/// Device and inode of an open file: who it is, whatever happened to its number. Those of a socket or a memory file are its
/// own; those of an eventfd are shared by all of them, so the library has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    /// Of what is open under this number now.
    pub fn of(number: c_int) -> Option<Self> {
        let mut status = core::mem::MaybeUninit::<libc::stat>::uninit();
        // SAFETY: the kernel writes a `stat`. Not by the C library, whose `fstat` is younger than 2.17.
        let result = unsafe { libc::syscall(libc::SYS_fstat, number, status.as_mut_ptr()) };
        if result != 0 {
            return None;
        }
        // SAFETY: the call succeeded, so all of it is written.
        let status = unsafe { status.assume_init() };
        Some(Self { device: status.st_dev, inode: status.st_ino })
    }

    /// Whether that is open under this number now.
    pub fn is_at(self, number: c_int) -> bool {
        Self::of(number) == Some(self)
    }

    /// Closes the number, if that is open under it.
    pub fn close_at(self, number: c_int) {
        if self.is_at(number) {
            sys::close(number);
        }
    }

    /// Reads from the number, as [`sys::read`]; `EBADF` unless that is open under it.
    pub fn read_at(self, number: c_int, buffer: &mut [u8]) -> Result<usize, Errno> {
        if self.is_at(number) { sys::read(number, buffer) } else { Err(libc::EBADF) }
    }
}

/// A number, and who was behind it when we had it.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    number: c_int,
    identity: Identity,
}

impl Known {
    /// The number, to be used at once; `EBADF` if somebody else is behind it now, or nobody.
    pub fn number(self) -> Result<c_int, Errno> {
        if self.identity.is_at(self.number) { Ok(self.number) } else { Err(libc::EBADF) }
    }

    /// Closes it, if it still is what it was.
    pub fn close(self) {
        self.identity.close_at(self.number);
    }

    /// The number, whoever is behind it: for the program.
    pub fn as_raw(self) -> c_int {
        self.number
    }

    /// Who is behind it.
    pub fn identity(self) -> Identity {
        self.identity
    }
}

/// A descriptor that is closed when dropped.
#[derive(Debug)]
pub struct Fd(Known);

impl Fd {
    /// Takes over a descriptor that this call's thread has just got.
    pub fn adopt(number: c_int) -> Result<Self, Errno> {
        let identity = Identity::of(number).ok_or(libc::EBADF)?;
        Ok(Self(Known { number, identity }))
    }

    /// The same, without owning it.
    pub fn known(&self) -> Known {
        self.0
    }

    /// See [`Known::number`].
    pub fn number(&self) -> Result<c_int, Errno> {
        self.0.number()
    }

    /// Gives up ownership.
    pub fn into_known(self) -> Known {
        let known = self.0;
        core::mem::forget(self);
        known
    }

    /// Gives up ownership for the number alone, where others will know what it is.
    pub fn into_raw(self) -> c_int {
        self.into_known().as_raw()
    }

    /// Moves it out of the program's way, as far as the limit of open files allows. Where there is no room it stays.
    pub fn hidden(self) -> Self {
        let mut from = out_of_the_way();
        while from > self.0.number as u64 {
            // SAFETY: makes another descriptor of the same file.
            let result = unsafe { libc::syscall(libc::SYS_fcntl, self.0.number, libc::F_DUPFD_CLOEXEC, from) };
            if result >= 0 {
                // The identity is the same: dropping `self` closes the low number.
                return Self(Known { number: result as c_int, identity: self.0.identity });
            }
            // Everything from there on is taken.
            from /= 2;
        }
        self
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// The number from which on descriptors disturb nobody, if there is room.
pub fn out_of_the_way() -> u64 {
    let limit = open_files();
    if limit >= HIGH + SPARE { HIGH } else { limit.saturating_sub(limit / 8) }
}

/// How many numbers the process may use.
fn open_files() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes two numbers.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return 0;
    }
    limit.rlim_cur.min(c_int::MAX as u64)
}

/// A [`Known`] that a forked child may read whatever the parent's threads did to it meanwhile: half of one and half of
/// another is none.
#[derive(Debug)]
pub struct Inherited {
    number: AtomicI32,
    device: AtomicU64,
    inode: AtomicU64,
}

impl Inherited {
    /// None.
    pub const fn none() -> Self {
        Self { number: AtomicI32::new(-1), device: AtomicU64::new(0), inode: AtomicU64::new(0) }
    }

    /// A child would inherit this one.
    pub fn set(&self, known: Known) {
        self.number.store(-1, Ordering::Release);
        self.device.store(known.identity.device, Ordering::Release);
        self.inode.store(known.identity.inode, Ordering::Release);
        self.number.store(known.number, Ordering::Release);
    }

    /// In the child: closes it.
    pub fn close(&self) {
        let number = self.number.swap(-1, Ordering::Acquire);
        let identity =
            Identity { device: self.device.load(Ordering::Acquire), inode: self.inode.load(Ordering::Acquire) };
        if number >= 0 {
            Known { number, identity }.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    fn file() -> Fd {
        // SAFETY: makes a file; its inode number is not given out again at once.
        Fd::adopt(unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC) }).unwrap()
    }

    #[test]
    fn what_somebody_else_opened_under_the_number_is_left_alone() {
        let mine = file();
        let number = mine.number().unwrap();
        // As a daemon does: closes what it did not open, and opens something of its own.
        let other = File::open("/proc/self/status").unwrap();
        // SAFETY: replaces a descriptor of this test.
        assert_eq!(unsafe { libc::dup2(other.as_raw_fd(), number) }, number);
        assert_eq!(mine.number(), Err(libc::EBADF));
        drop(mine);
        assert!(Identity::of(number) == Identity::of(other.as_raw_fd()), "it was closed");
        sys::close(number);
    }

    #[test]
    fn what_still_is_there_is_closed_and_once() {
        let mine = file();
        let known = mine.into_known();
        let number = known.number().unwrap();
        known.close();
        assert_eq!(known.number(), Err(libc::EBADF));
        assert!(!known.identity().is_at(number));
    }

    #[test]
    fn hidden_descriptors_are_high_and_closed_on_exec() {
        let low = file();
        let identity = low.0.identity;
        let number = low.number().unwrap();
        let high = low.hidden();
        let moved = high.number().unwrap();
        assert!(!identity.is_at(number), "the low number remains");
        assert!(moved as u64 >= HIGH.min(open_files() / 2), "{moved}");
        // SAFETY: asks for the flags of a descriptor of this test.
        assert_eq!(unsafe { libc::fcntl(moved, libc::F_GETFD) }, libc::FD_CLOEXEC);
    }

    #[test]
    fn an_inherited_descriptor_is_closed_once_and_only_if_it_is_the_one() {
        let (one, other) = (file(), file());
        let inherited = Inherited::none();
        inherited.close();
        inherited.set(one.into_known());
        inherited.inode.store(other.0.identity.inode, Ordering::Relaxed);
        let number = inherited.number.load(Ordering::Relaxed);
        inherited.close();
        assert!(Identity::of(number).is_some(), "half of one and half of another was closed");
        sys::close(number);
        let theirs = other.0.identity;
        inherited.set(other.into_known());
        let number = inherited.number.load(Ordering::Relaxed);
        inherited.close();
        assert!(!theirs.is_at(number));
    }
}
