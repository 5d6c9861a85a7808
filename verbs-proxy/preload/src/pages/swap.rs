//! Puts other pages with the same contents under an address, while the application runs.

// UNSAFETY: replaces the application's memory.
#![allow(unsafe_code)]

use super::freeze::{Frozen, Method, method};
use super::{bystander, fault, sys};
use core::ops::Range;

/// Writers wait at most for the copy of this much.
const CHUNK: usize = 1 << 20;

/// Addresses, page by page within one protection.
#[derive(Clone, Debug)]
pub struct Area {
    pub range: Range<usize>,
    /// `PROT_*`, which stays.
    pub protection: i32,
    /// Whether it maps a file.
    pub file_backed: bool,
    /// Whether it may be of a stack that grows.
    pub is_stack: bool,
}

/// Moves the area's contents into `file` from `offset` on, and the file under the area. After an error the first
/// `done` bytes are the file's, the others as before.
pub fn share(area: &Area, file: i32, offset: u64, done: &mut usize) -> Result<(), i32> {
    let method = prepare(method(area, area.file_backed, false))?;
    each_chunk(area, method, done, |range, done| {
        let place = offset + done as u64;
        sys::pwrite(file, range.start, range.len(), place)?;
        // Populated: else each page costs a fault later, which takes longer altogether.
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        // SAFETY: the file has the same bytes as the pages that it replaces, and nobody can have changed them since.
        unsafe { sys::mmap(range.start, range.len(), area.protection, flags, file, place) }.map(drop)
    })
}

/// Replaces the area, which maps `file` from `offset` on, by private memory with the same contents.
pub fn privatise(area: &Area, file: i32, offset: u64) -> Result<(), i32> {
    let method = prepare(method(area, false, true))?;
    let length = area.range.len();
    let aside = sys::anonymous(length)?;
    let mut done = 0;
    let result = each_chunk(area, method, &mut done, |range, done| {
        // SAFETY: `aside` is ours, and has the same bytes as the pages that it replaces; nobody can have changed them since.
        unsafe {
            sys::pread(file, aside + done, range.len(), offset + done as u64)?;
            if area.protection != libc::PROT_READ | libc::PROT_WRITE {
                sys::mprotect(aside + done, range.len(), area.protection)?;
            }
            sys::move_pages(aside + done, range.len(), range.start)
        }
    });
    if done < length {
        // SAFETY: what was not moved is still ours.
        unsafe { sys::munmap(aside + done, length - done) };
    }
    result
}

fn prepare(method: Method) -> Result<Method, i32> {
    // Also as the second choice: whether the first works shows only where nothing can be installed any more.
    if method != Method::Nothing {
        fault::install()?;
    }
    Ok(method)
}

/// Calls `replace` for each chunk while nobody can write to it, until all is `done`.
fn each_chunk(
    area: &Area,
    method: Method,
    done: &mut usize,
    replace: impl Fn(Range<usize>, usize) -> Result<(), i32>,
) -> Result<(), i32> {
    let mut result = Ok(());
    let mut position = 0;
    let mut work = || {
        while area.range.start + position < area.range.end {
            let start = area.range.start + position;
            let range = start..(start + CHUNK).min(area.range.end);
            let length = range.len();
            let step = Frozen::new(range.clone(), area, method).and_then(|frozen| {
                replace(range, position)?;
                frozen.replaced();
                Ok(())
            });
            // Written only after the freeze has ended: the result may be in the range.
            if step.is_err() {
                result = step;
                break;
            }
            position += length;
        }
    };
    let ran = bystander::run(&area.range, &mut work);
    *done = position;
    ran.and(result)
}
