//! Which process we are, since a fork may have made us another.
//!
//! One page of memory is marked so that the kernel zeroes it in a forked child. It holds the *generation* that every
//! object remembers from its making: a child sees zero, so that each inherited object is refused, by one load, before
//! any ring, lock or descriptor of the parent is touched. The control lock lies in the same page, so that a child does
//! not inherit it held.

// UNSAFETY: the page is reached through a raw pointer.
#![allow(unsafe_code)]

use crate::lock::Sleeping;
use crate::sys::{self, Errno};
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// Set in generations of a process whose kernel cannot wipe pages (before Linux 4.14): the pid decides.
const BY_PID: u32 = 1 << 31;

const PAGE_BYTES: usize = 4096;

/// The page; a child gets zeros.
#[derive(Debug)]
pub struct Process {
    generation: AtomicU32,
    dead: AtomicU32,
    pid: AtomicU32,
    /// Guards the connection, and the making and ending of objects.
    pub control: Sleeping,
}

static PAGE: AtomicPtr<Process> = AtomicPtr::new(ptr::null_mut());
static LAST: AtomicU32 = AtomicU32::new(0);

/// A connection of one process. Objects keep it to know whether they still mean anything.
#[derive(Clone, Copy, Debug)]
pub struct Generation {
    process: &'static Process,
    number: u32,
    pid: u32,
}

impl Generation {
    /// Whether the object that keeps this belongs to this process and its present connection.
    #[inline(always)]
    pub fn is_current(self) -> bool {
        self.process.generation.load(Ordering::Relaxed) == self.number
            && (self.number & BY_PID == 0 || self.process.pid.load(Ordering::Relaxed) == sys::getpid())
    }

    /// Whether the proxy behind it has gone.
    pub fn is_dead(self) -> bool {
        self.process.dead.load(Ordering::Relaxed) != 0
    }

    /// The proxy has gone: from now on verbs fail.
    pub fn set_dead(self) {
        self.process.dead.store(1, Ordering::Relaxed);
    }

    /// Whether the process is still the one in which it began, whatever became of the connection.
    pub fn is_of_this_process(self) -> bool {
        self.pid == sys::getpid()
    }

    /// What tells it from other generations of this process. Never zero.
    pub fn number(self) -> u32 {
        self.number
    }

    /// The process's page.
    pub fn process(self) -> &'static Process {
        self.process
    }
}

impl PartialEq for Generation {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Process {
    /// Begins a new generation: what older ones made is refused from now on. The caller holds the control lock.
    pub fn begin(&'static self) -> Generation {
        let wiped = sys::advise(ptr::from_ref(self).cast_mut().cast(), PAGE_BYTES, libc::MADV_WIPEONFORK).is_ok();
        let number = (LAST.fetch_add(1, Ordering::Relaxed).wrapping_add(1) & !BY_PID) | if wiped { 0 } else { BY_PID };
        let pid = sys::getpid();
        self.pid.store(pid, Ordering::Relaxed);
        self.dead.store(0, Ordering::Relaxed);
        self.generation.store(number, Ordering::Release);
        Generation { process: self, number, pid }
    }
}

/// The page, made on first use.
pub fn process() -> Result<&'static Process, Errno> {
    let mut page = PAGE.load(Ordering::Acquire);
    if page.is_null() {
        let fresh = sys::map(PAGE_BYTES, None)?.cast::<Process>();
        match PAGE.compare_exchange(ptr::null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => page = fresh,
            Err(first) => {
                // SAFETY: mapped above, and nobody else has seen it.
                unsafe { libc::munmap(fresh.cast(), PAGE_BYTES) };
                page = first;
            }
        }
    }
    // SAFETY: a page of zeros, or one that a fork zeroed, is a valid `Process`; it is never unmapped.
    Ok(unsafe { &*page })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forked_child_sees_no_generation() {
        let generation = process().unwrap().begin();
        assert!(generation.is_current());
        // SAFETY: the child only loads an atomic and leaves.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let code = i32::from(generation.is_current());
            // SAFETY: ends the child without running the test harness's exit handlers.
            unsafe { libc::_exit(code) };
        }
        let mut status = 0;
        // SAFETY: waits for the child made above.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert!(libc::WIFEXITED(status));
        assert_eq!(libc::WEXITSTATUS(status), 0, "the child believes that the parent's objects are its own");
        assert!(generation.is_current());
    }
}
