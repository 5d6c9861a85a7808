//! Puts other pages with the same contents under an address.

// UNSAFETY: replaces the application's memory while it runs.
#![allow(unsafe_code)]

use super::sys;
use core::ops::Range;

/// Writers wait at most for the copy of this much.
const CHUNK: usize = 1 << 20;

/// Addresses, page by page within one protection.
#[derive(Clone, Debug)]
pub struct Area {
    pub range: Range<usize>,
    /// `PROT_*`, which stays.
    pub protection: i32,
}

/// Moves the area's contents into `file` from `offset` on, and the file under the area. After an error the first
/// `done` bytes are the file's, the others as before.
pub fn share(area: &Area, file: i32, offset: u64, done: &mut usize) -> Result<(), i32> {
    while area.range.start + *done < area.range.end {
        let start = area.range.start + *done;
        let length = CHUNK.min(area.range.end - start);
        let place = offset + *done as u64;
        sys::pwrite(file, start, length, place)?;
        // SAFETY: the file has the same bytes as the pages that it replaces.
        unsafe { sys::mmap(start, length, area.protection, libc::MAP_SHARED | libc::MAP_FIXED, file, place)? };
        *done += length;
    }
    Ok(())
}

/// Replaces the area, which maps `file` from `offset` on, by private memory with the same contents.
pub fn privatise(area: &Area, file: i32, offset: u64) -> Result<(), i32> {
    let length = area.range.len();
    let aside = sys::anonymous(length)?;
    let mut done = 0;
    let mut step = || {
        while done < length {
            let chunk = CHUNK.min(length - done);
            // SAFETY: `aside` is ours, and has the same bytes as the pages that it replaces.
            unsafe {
                sys::pread(file, aside + done, chunk, offset + done as u64)?;
                sys::mprotect(aside + done, chunk, area.protection)?;
                sys::move_pages(aside + done, chunk, area.range.start + done)?;
            }
            done += chunk;
        }
        Ok(())
    };
    let result = step();
    if done < length {
        // SAFETY: what was not moved is still ours.
        unsafe { sys::munmap(aside + done, length - done) };
    }
    result
}
