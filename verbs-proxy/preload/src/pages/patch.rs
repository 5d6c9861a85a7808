//! A part of the application's memory that shows a region's file, during a fork.

// UNSAFETY: replaces the application's memory.
#![allow(unsafe_code)]

use super::sys;

/// Addresses of one protection.
#[derive(Clone, Copy, Debug)]
pub struct Patch {
    pub start: usize,
    pub end: usize,
    /// `PROT_*`
    pub protection: i32,
    /// Where the application's own mapping is kept, empty, or zero.
    pub aside: usize,
}

/// What the child copies at once.
const COPY: usize = 2 << 20;

impl Patch {
    pub fn contains(&self, address: usize) -> bool {
        self.start <= address && address < self.end
    }

    /// The protection that lets nobody write.
    pub fn frozen(&self) -> i32 {
        self.protection & !libc::PROT_WRITE | libc::PROT_READ
    }

    fn aside_at(&self, address: usize) -> usize {
        if self.aside == 0 { 0 } else { self.aside + (address - self.start) }
    }

    /// In the parent: so that the child can see whether the application wants it to find zeros here.
    pub fn mark(&self) {
        if self.aside != 0 {
            // SAFETY: memory that is kept aside, and empty.
            unsafe {
                if sys::mprotect(self.aside, super::PAGE, libc::PROT_READ | libc::PROT_WRITE).is_ok() {
                    (self.aside as *mut u8).write_volatile(1);
                }
            }
        }
    }

    /// In the parent, afterwards.
    pub fn unmark(&self) {
        if self.aside != 0 {
            // SAFETY: as above.
            unsafe {
                let _ = sys::madvise(self.aside, super::PAGE, libc::MADV_DONTNEED);
                let _ = sys::mprotect(self.aside, super::PAGE, libc::PROT_NONE);
            }
        }
    }

    /// In the child: whether the application wants it to find zeros here. The patch was marked.
    pub fn is_wiped(&self) -> bool {
        // SAFETY: memory that is kept aside, if the child has it, which the first call finds out.
        self.aside != 0
            && unsafe {
                sys::mprotect(self.aside, super::PAGE, libc::PROT_READ).is_ok()
                    && (self.aside as *const u8).read_volatile() == 0
            }
    }

    /// In the child: replaces the memory from `start` to `end` by a private copy, or, `wiped`, by zeros. What the application
    /// wanted no child to have goes. Memory for which there is no copy stays read-only: better a fault than a write into the
    /// parent.
    pub fn privatise(&self, start: usize, end: usize, wiped: bool) {
        let mut at = start;
        while at < end {
            // Because of the mark, the first page of what is kept aside is a mapping of its own in a child, which Linux
            // before 6.17 does not move together with another.
            let length = if at == self.start { super::PAGE } else { (end - at).min(COPY) };
            let aside = self.aside_at(at);
            let target = if aside == 0 { sys::anonymous(length).unwrap_or(0) } else { aside };
            let all = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: `target` is ours until it is moved; there is no other thread.
            unsafe {
                match if target == 0 { Err(libc::ENOMEM) } else { sys::mprotect(target, length, all) } {
                    Ok(()) => {
                        if !wiped {
                            sys::copy(at, target, length);
                        }
                        let _ = sys::mprotect(target, length, self.protection);
                        let _ = sys::move_pages(target, length, at);
                    }
                    // The application keeps this memory from its children.
                    Err(_) if aside != 0 => sys::munmap(at, length),
                    Err(_) => {}
                }
            }
            at += length;
        }
    }
}
