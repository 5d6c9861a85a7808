//! A part of the application's memory that is a region's file.

// UNSAFETY: replaces the application's memory.
#![allow(unsafe_code)]

use super::sys;
use core::ops::Range;

/// Addresses of one protection that map consecutive bytes of a file.
#[derive(Clone, Debug)]
pub struct Patch {
    pub range: Range<usize>,
    /// `PROT_*`
    pub protection: i32,
    pub file: i32,
    /// Byte in the file where `range` starts.
    pub offset: u64,
}

impl Patch {
    /// Where in the file the address is.
    pub fn place(&self, address: usize) -> u64 {
        self.offset + (address - self.range.start) as u64
    }

    /// The protection that lets nobody write.
    pub fn frozen(&self) -> i32 {
        self.protection & !libc::PROT_WRITE
    }

    /// Copies what is at `address` to `target`, also if the application may not read it at present.
    ///
    /// # Safety
    /// Nothing else uses the memory at `target`.
    pub unsafe fn copy(&self, address: usize, length: usize, target: usize) -> Result<(), i32> {
        // SAFETY: promised by the caller.
        unsafe { sys::pread(self.file, target, length, self.place(address)) }
    }

    /// Replaces the memory at `address` by a private copy, which nobody may write to meanwhile.
    pub fn privatise(&self, address: usize, length: usize) -> Result<(), i32> {
        let aside = sys::anonymous(length)?;
        // SAFETY: `aside` is ours until it has been moved.
        unsafe {
            let moved = self.copy(address, length, aside).and_then(|()| {
                sys::mprotect(aside, length, self.protection)?;
                sys::move_pages(aside, length, address)
            });
            if moved.is_err() {
                sys::munmap(aside, length);
            }
            moved
        }
    }
}
