//! Memory files of the proxy, mapped.

// UNSAFETY: references into mapped memory.
#![allow(unsafe_code)]

use crate::sys::{self, Errno, Fd};
use core::ffi::c_void;
use ringfence_protocol::keys::KeyWord;
use ringfence_protocol::ring::{SLOT_BYTES, Slot};

/// A mapping that ends when dropped.
#[derive(Debug)]
pub struct Shared {
    address: *mut c_void,
    bytes: usize,
}

// SAFETY: an address range; what is in it is made of atomics.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Maps the file's first `bytes`. A forked child does not get the mapping.
    pub fn map(file: &Fd, bytes: usize) -> Result<Self, Errno> {
        let address = sys::map(bytes, Some(file))?;
        let shared = Self { address, bytes };
        sys::advise(address, bytes, libc::MADV_DONTFORK)?;
        Ok(shared)
    }

    /// What stands at the start.
    ///
    /// # Safety
    /// `T` is made of atomics, valid for any bits, and the reference is not used after the mapping ends.
    pub unsafe fn head<T>(&self) -> &'static T {
        assert!(size_of::<T>() <= self.bytes, "a mapping of {} bytes", self.bytes);
        // SAFETY: in bounds by the check, aligned to a page, alive by the caller's promise.
        unsafe { &*self.address.cast::<T>() }
    }

    /// Key words from `offset` on.
    ///
    /// # Safety
    /// As for [`Self::slots`].
    pub unsafe fn words(&self, offset: usize, words: u32) -> &'static [KeyWord] {
        let end = (words as usize).checked_mul(size_of::<KeyWord>()).and_then(|bytes| bytes.checked_add(offset));
        assert!(end.is_some_and(|end| end <= self.bytes), "{words} key words at {offset} of {} bytes", self.bytes);
        // SAFETY: in bounds by the check, aligned because the offset is a multiple of a page, made of atomics.
        unsafe { core::slice::from_raw_parts(self.address.byte_add(offset).cast(), words as usize) }
    }

    /// Ring slots from `offset` on.
    ///
    /// # Safety
    /// The slice is not used after the mapping ends.
    pub unsafe fn slots(&self, offset: usize, slots: u32) -> &'static [Slot] {
        let end = (slots as usize).checked_mul(SLOT_BYTES).and_then(|bytes| bytes.checked_add(offset));
        assert!(end.is_some_and(|end| end <= self.bytes), "{slots} slots at {offset} of {} bytes", self.bytes);
        // SAFETY: in bounds by the check, aligned because offsets are multiples of a page or slot, made of atomics.
        unsafe { core::slice::from_raw_parts(self.address.byte_add(offset).cast(), slots as usize) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, with this size.
        unsafe { libc::munmap(self.address, self.bytes) };
    }
}
