//! Registers memory that is shared already as what it is: the file behind it goes to the proxy, and nothing is copied, so that
//! what the proxy writes is seen by every process that has it.
//!
//! [`pages`] is asked first, and knows ordinary memory. Only what it has no way for is looked at here. The pages of a file are
//! made when it is registered, by the program that registers them, as a kernel driver would: the proxy never makes one. Nothing
//! is remembered of an adopted file but which addresses [`pages`] knows nothing of.

mod find;
#[cfg(test)]
pub mod tests;

use crate::pages::{self, Acquired, Regions, Segment, Shown};
use crate::sys::{self, Errno};
use alloc::vec::Vec;
use core::ffi::c_int;
use core::ops::Range;
use find::Identity;

const PAGE: usize = 4096;

/// Where files are taken in, besides giving some out.
pub trait Files: Regions {
    /// A region of the pages of this memory file.
    fn adopt(&mut self, file: c_int) -> Result<u32, Errno>;
}

/// What [`acquire`] did that [`pages`] does not know of.
#[derive(Debug, Default)]
pub struct Adopted {
    /// Addresses of memory that was shared already.
    ranges: Vec<Range<usize>>,
    /// What the proxy calls the files until they are registered.
    regions: Vec<u32>,
}

impl Adopted {
    /// Whether all of the memory is ordinary.
    #[cfg_attr(not(test), allow(dead_code))] // For whoever keeps registrations.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The memory has been registered, or could not be: its regions keep the pages that they are made of.
    pub fn settle(&mut self, files: &mut impl Files) {
        for region in core::mem::take(&mut self.regions) {
            files.free(region);
        }
    }
}

/// As [`pages::acquire`], also of memory that is shared already.
///
/// `EOPNOTSUPP` for memory whose file cannot be had, or is no memory; `EFAULT` for what a driver cannot pin.
pub fn acquire(
    addr: usize,
    length: usize,
    writable: bool,
    files: &mut impl Files,
) -> Result<(Acquired, Adopted), Errno> {
    match pages::acquire(addr, length, writable, files) {
        Err(libc::EOPNOTSUPP) => {}
        result => return result.map(|acquired| (acquired, Adopted::default())),
    }
    let mut parts = Parts { segments: Vec::new(), done: addr..addr, adopted: Adopted::default(), last: None };
    match parts.acquire(addr, length, writable, files) {
        Ok(()) => Ok((Acquired { first_offset: (addr % PAGE) as u64, segments: parts.segments }, parts.adopted)),
        Err(error) => {
            release(parts.done.start, parts.done.len(), &parts.adopted, files);
            parts.adopted.settle(files);
            Err(error)
        }
    }
}

/// Ends what [`acquire`] of the same range began.
pub fn release(addr: usize, length: usize, adopted: &Adopted, regions: &mut impl Files) {
    let mut start = addr;
    for range in &adopted.ranges {
        if start < range.start {
            pages::release(start, range.start - start, regions);
        }
        start = start.max(range.end);
    }
    if start < addr + length {
        pages::release(start, addr + length - start, regions);
    }
}

/// A range, mapping by mapping.
struct Parts {
    segments: Vec<Segment>,
    /// What has been acquired.
    done: Range<usize>,
    adopted: Adopted,
    /// The file of the last segment, if that was adopted.
    last: Option<Identity>,
}

impl Parts {
    fn acquire(&mut self, addr: usize, length: usize, writable: bool, files: &mut impl Files) -> Result<(), Errno> {
        let end = addr + length;
        for shown in pages::mappings(&(addr..end))? {
            if shown.range.start > self.done.end {
                return Err(libc::EFAULT);
            }
            let until = shown.range.end.min(end);
            let part = self.done.end..until;
            // Also what was shared by us, which looks like any other.
            match pages::acquire(part.start, part.len(), writable, files) {
                Ok(acquired) => {
                    self.segments.extend(acquired.segments);
                    self.last = None;
                }
                Err(libc::EOPNOTSUPP) if shown.shared => self.adopt(&shown, &part, writable, files)?,
                Err(error) => return Err(error),
            }
            self.done.end = until;
        }
        if self.done.end == end { Ok(()) } else { Err(libc::EFAULT) }
    }

    fn adopt(
        &mut self,
        shown: &Shown,
        part: &Range<usize>,
        writable: bool,
        files: &mut impl Files,
    ) -> Result<(), Errno> {
        let pages = part.start & !(PAGE - 1)..part.end.next_multiple_of(PAGE);
        let offset = shown.offset + (pages.start - shown.range.start) as u64;
        let identity = Identity { device: shown.device, inode: shown.inode };
        let length = pages.len() as u64;
        let region = match (self.last, self.segments.last_mut()) {
            // The same file goes on, with another protection perhaps.
            (Some(last), Some(segment)) if last == identity && segment.offset + segment.length == offset => {
                sys::populate(&pages, writable)?;
                segment.length += length;
                None
            }
            _ => {
                let file = find::file(shown, identity)?;
                sys::populate(&pages, writable)?;
                Some(files.adopt(file.number()?)?)
            }
        };
        if let Some(region) = region {
            self.adopted.regions.push(region);
            self.segments.push(Segment { region, offset, length });
        }
        self.adopted.ranges.push(part.clone());
        self.last = Some(identity);
        Ok(())
    }
}
