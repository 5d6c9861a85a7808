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
            self.refused.store(true, Relaxed);
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
    use super::*;

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
