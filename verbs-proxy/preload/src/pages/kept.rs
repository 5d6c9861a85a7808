//! Descriptors that the module keeps for itself.
//!
//! The application may close every descriptor that it does not know, and may get the same number for a file of its own. So a
//! number is used only after the kernel has confirmed that it still is the file that was opened, and it is a high one, where
//! programs that count descriptors do not look.

use super::sys::{self, Identity};
use crate::descriptor;
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::*};

/// A file that is opened on first use, and again in a forked child or after the application has closed it. Only to be used
/// under the module's lock.
pub struct Kept {
    open: fn() -> Option<i32>,
    file: AtomicI32,
    /// The process that opened it: both kinds of files that are kept mean the memory of the process that opened them.
    owner: AtomicU32,
    device: AtomicU64,
    inode: AtomicU64,
    /// There is none to be had.
    refused: AtomicBool,
}

impl Kept {
    /// `open`: makes the descriptor, or says that this process cannot have one.
    pub const fn new(open: fn() -> Option<i32>) -> Self {
        Self {
            open,
            file: AtomicI32::new(-1),
            owner: AtomicU32::new(0),
            device: AtomicU64::new(0),
            inode: AtomicU64::new(0),
            refused: AtomicBool::new(false),
        }
    }

    /// The descriptor.
    pub fn get(&self) -> Option<i32> {
        let process = sys::process();
        if self.owner.load(Relaxed) != process {
            self.close();
            self.refused.store(false, Relaxed);
            self.owner.store(process, Relaxed);
        }
        if let Some(file) = self.verified() {
            return Some(file);
        }
        if self.refused.load(Relaxed) {
            return None;
        }
        let Some(file) = (self.open)().map(high) else {
            self.refused.store(has_room(), Relaxed);
            return None;
        };
        let Ok(identity) = sys::identify(file) else {
            sys::close(file);
            return None;
        };
        self.device.store(device(&identity), Relaxed);
        self.inode.store(identity.inode, Relaxed);
        self.file.store(file, Relaxed);
        Some(file)
    }

    /// In tests: it is not to be had.
    #[cfg(test)]
    pub fn refuse(&self) {
        self.close();
        self.refused.store(true, Relaxed);
    }

    /// In tests: it may be opened again.
    #[cfg(test)]
    pub fn allow(&self) {
        self.refused.store(false, Relaxed);
    }

    fn verified(&self) -> Option<i32> {
        let file = self.file.load(Relaxed);
        let identity = if file >= 0 { sys::identify(file).ok() } else { None }?;
        let same = device(&identity) == self.device.load(Relaxed) && identity.inode == self.inode.load(Relaxed);
        same.then_some(file)
    }

    /// Closes it. In a forked child without the lock, too: half of one and half of another is none.
    pub fn close(&self) {
        if let Some(file) = self.verified() {
            sys::close(file);
        }
        self.file.store(-1, Relaxed);
    }
}

fn device(identity: &Identity) -> u64 {
    u64::from(identity.device.0) << 32 | u64::from(identity.device.1)
}

/// Whether this process could have another descriptor at this moment. If not, nothing is known of what one would be of.
fn has_room() -> bool {
    sys::open(c"/", libc::O_PATH | libc::O_CLOEXEC).map(sys::close).is_ok()
}

/// The same file under a high number, or as it is where there is none.
fn high(file: i32) -> i32 {
    let mut lowest = descriptor::out_of_the_way() as i32;
    while lowest > file {
        if let Ok(higher) = sys::duplicate(file, lowest) {
            sys::close(file);
            return higher;
        }
        // Everything from there on is taken.
        lowest /= 2;
    }
    file
}

#[cfg(test)]
mod tests {
    // UNSAFETY: changes limits of a process of the tests' own.
    #![allow(unsafe_code)]

    use super::super::tests::{Files, Memory};
    use super::super::tests_fork::in_child;
    use super::super::{acquire, interpose, maps, release};
    use super::*;

    /// Does something with no descriptor left to be had.
    fn without_descriptors<R>(work: impl FnOnce() -> R) -> R {
        let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: reads and changes a limit of this process.
        unsafe {
            assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut before), 0);
            assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &libc::rlimit { rlim_cur: 0, ..before }), 0);
        }
        let result = work();
        // SAFETY: as above.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &before) }, 0);
        result
    }

    #[test]
    fn a_want_of_descriptors_is_not_for_ever() {
        in_child(|| {
            static FILE: Kept = Kept::new(null);
            let refused = without_descriptors(|| FILE.get()).is_none();
            i32::from(refused && FILE.get().is_some())
        })
        .answers(1);
    }

    #[test]
    fn without_descriptors_advice_about_other_memory_is_taken() {
        let mut files = Files::new();
        let (memory, other) = (Memory::new(4), Memory::new(4));
        in_child(|| {
            acquire(memory.address, memory.length, true, &mut files).unwrap();
            maps::MAPS.refuse();
            let advise = |of: &Memory| interpose::advise(of.address, of.length, libc::MADV_DONTNEED);
            let results = without_descriptors(|| (advise(&other), advise(&memory)));
            memory.assert_untouched();
            let dropped = other.get(1) == 0;
            maps::MAPS.allow();
            let again = advise(&memory);
            let all = results == (Ok(()), Err(libc::EAGAIN)) && dropped && again.is_ok() && memory.get(1) == 0;
            release(memory.address, memory.length, &mut files);
            i32::from(all)
        })
        .answers(1);
    }

    fn null() -> Option<i32> {
        sys::open(c"/dev/null", libc::O_RDONLY | libc::O_CLOEXEC).ok()
    }

    #[test]
    fn a_closed_descriptor_is_opened_again_and_a_strangers_is_left_alone() {
        static FILE: Kept = Kept::new(null);
        let first = FILE.get().unwrap();
        assert_eq!(FILE.get(), Some(first));
        sys::close(first);
        let stranger = sys::open(c"/dev/zero", libc::O_RDONLY).unwrap();
        let moved = sys::duplicate(stranger, first).unwrap();
        let again = FILE.get().unwrap();
        if moved == first {
            assert_ne!(again, first);
        }
        FILE.refuse();
        assert!(sys::identify(moved).is_ok(), "closed the application's descriptor");
        assert_eq!(FILE.get(), None);
        sys::close(moved);
        sys::close(stranger);
    }
}
