//! Makes application memory reachable by the proxy: its pages become pages of a memory file that both map.
//!
//! [`acquire`] copies the pages into a region's file once and maps the file over them; [`release`] gives private memory
//! with the same contents back when the last registration of a page ends. A child of `fork` has private copies, and nothing
//! registered. Contents and addresses never change for the application, and what it does to its memory meanwhile
//! ([`interpose`]) has the effect that it has on private memory: a region keeps its pages, as those that a driver has pinned.
//!
//! - [`state`], [`table`]: which pages are shared, and what is to be done.
//! - [`swap`]: replaces pages; [`hold`], [`uffd`], [`stop`] (with [`threads`], [`trace`]), [`fault`], [`bystander`]: keeps everybody from them meanwhile.
//! - [`maps`]: what is mapped where; [`fork`], [`escort`], [`patch`], [`windows`]: forks.
//! - [`array`], [`kept`], [`lock`], [`signals`], [`sys`]: memory, descriptors, locks and system calls that disturb nobody.

mod array;
mod bystander;
mod escort;
mod fault;
mod fork;
pub mod hold;
pub mod interpose;
mod kept;
mod lock;
pub mod maps;
mod patch;
pub mod signals;
mod state;
mod stop;
mod swap;
pub mod sys;
mod table;
#[cfg(test)]
pub mod tests;
#[cfg(test)]
mod tests_changes;
#[cfg(test)]
pub mod tests_concurrent;
#[cfg(test)]
mod tests_fork;
#[cfg(test)]
mod tests_handlers;
#[cfg(test)]
mod tests_speed;
#[cfg(test)]
mod tests_threads;
mod threads;
mod trace;
mod uffd;
mod windows;

use alloc::vec::Vec;
use array::Array;
use core::ops::{ControlFlow, Range};
use lock::Lock;
use signals::Blocked;
use state::{Offer, Outcome, State};

pub const PAGE: usize = 4096;

/// Held from the beginning of a registration, or of its end, to the end of it, and while a child of `fork` is made: see
/// [`fork::gate`]. Who holds it may ask the proxy, and allocates nothing, nor does whoever holds the lock of the proxy's connection: a
/// thread that forks has the C library's allocator when it waits for the gate.
static GATE: Lock<()> = Lock::new(());

/// Held for no longer than pages are replaced. Who holds it calls nothing of the C library, because an allocator that calls
/// [`interpose`] waits for it, with locks of its own.
static STATE: Lock<State> = Lock::new(State::new());

/// How often a registration begins anew because the application changes its mappings meanwhile.
const TURNS: u32 = 16;

/// A run of pages of one region, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// As [`Regions::allocate`] named it.
    pub region: u32,
    /// Where in the region.
    pub offset: u64,
    /// How long; a multiple of the page size.
    pub length: u64,
}

/// Where acquired memory is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acquired {
    /// From the start of the first segment to the first byte asked for.
    pub first_offset: u64,
    /// By address, without gaps.
    pub segments: Vec<Segment>,
}

/// Where memory that the proxy reaches comes from.
pub trait Regions {
    /// A region of so many bytes and the file behind it, sealed against resizing, which the caller will own; or `errno`. The file
    /// is longer than the region: where the C library enlarges a mapping of it (`realloc`) there must be pages.
    fn allocate(&mut self, bytes: u64) -> Result<(u32, i32), i32>;
    /// Whether one of so many bytes is at hand, so that little is lost if it is not needed.
    fn is_ready(&self, _bytes: u64) -> bool {
        false
    }
    /// Waits for what [`Self::allocate`] may have begun and not waited for: the pages have been moved, or not.
    fn settle(&mut self) {}
    /// Nothing refers to the region any more; what it contains is lost.
    fn free(&mut self, region: u32);
    /// Whether the first and the last page of a range, which hold other bytes as well, had better be regions of their own: who is shown
    /// a region's file can reach all of it.
    fn keeps_ends_apart(&self, _bytes: u64) -> bool {
        false
    }
    /// Whether the mapping at this address is the source's own, which the application knows nothing of.
    fn is_own(&self, _address: usize) -> bool {
        false
    }
}

/// Makes the pages of `length` bytes at `addr` reachable by the proxy, until as many calls of [`release`].
///
/// `EINVAL` for an empty range, `EFAULT` for one that is not all mapped, readable and (if asked for) writable,
/// `EOPNOTSUPP` for memory that is shared already or made of huge pages; else what the kernel or `regions` answered.
pub fn acquire(addr: usize, length: usize, writable: bool, regions: &mut dyn Regions) -> Result<Acquired, i32> {
    let all = pages(addr, length)?;
    let apart = regions.keeps_ends_apart((all.len() * PAGE) as u64) && {
        let _blocked = Blocked::new();
        // Before anything is done: a range that cannot be registered stays as it is.
        STATE.lock().is_apart(&all, writable)?
    };
    if apart {
        match acquire_apart(addr, length, writable, regions) {
            // Three regions take more mappings, and descriptors of the proxy's, than one.
            Err(libc::ENOMEM | libc::EMFILE) => {}
            result => return result,
        }
    }
    acquire_together(addr, length, writable, regions)
}

/// [`acquire`], with regions of their own for the first and the last page, if they hold other bytes as well.
fn acquire_apart(addr: usize, length: usize, writable: bool, regions: &mut dyn Regions) -> Result<Acquired, i32> {
    let (first, last) = (addr.next_multiple_of(PAGE), (addr + length) / PAGE * PAGE);
    let mut acquired = Acquired { first_offset: (addr % PAGE) as u64, segments: Vec::new() };
    for part in [addr..first, first..last, last..addr + length].into_iter().filter(|part| !part.is_empty()) {
        match acquire_together(part.start, part.len(), writable, regions) {
            Ok(more) => acquired.segments.extend(more.segments),
            Err(error) => {
                if part.start > addr {
                    release(addr, part.start - addr, regions);
                }
                return Err(error);
            }
        }
    }
    Ok(acquired)
}

/// [`acquire`], with one region for all that is not shared yet.
fn acquire_together(addr: usize, length: usize, writable: bool, regions: &mut dyn Regions) -> Result<Acquired, i32> {
    let pages = pages(addr, length)?;
    fork::watch();
    // With no lock held, and no signal held back: who brings it in may be a thread of this process, which does what it likes.
    sys::bring_in(pages.start * PAGE, pages.len() * PAGE)?;
    let _blocked = Blocked::new();
    let gate = fork::gate();
    let mut offer: Option<Offer> = None;
    let mut segments = {
        let mut state = STATE.lock();
        core::mem::replace(&mut state.segments, Array::new())
    };
    let (mut result, mut taken) = (Err(libc::EAGAIN), false);
    // Memory of which nothing is registered yet needs as many pages as it has: then one look at it is enough.
    let whole = (pages.len() * PAGE) as u64;
    let is_new = regions.is_ready(whole) && !STATE.lock().has_any_of(&(pages.start * PAGE..pages.end * PAGE));
    let mut needs = is_new.then_some(whole);
    for _ in 0..TURNS {
        if let Some(bytes) = needs.take() {
            if let Some(unfit) = offer.take() {
                sys::close(unfit.file);
                regions.free(unfit.region);
            }
            match regions.allocate(bytes) {
                Ok((region, file)) => offer = Some(Offer { region, file, bytes }),
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        let mut state = STATE.lock();
        match state.acquire(&pages, writable, offer, regions) {
            Ok(Outcome::Needs(bytes)) => needs = Some(bytes),
            done => {
                if done == Ok(Outcome::Done) {
                    state.segments(pages.clone(), &mut segments);
                }
                (result, taken) = (done, true);
                break;
            }
        }
    }
    // Mapped, or of no use: a mapping needs no descriptor.
    if let Some(offer) = &offer {
        sys::close(offer.file);
        if !taken {
            regions.free(offer.region);
        }
    }
    regions.settle();
    free_unused(regions);
    // What the kernel says where it may lock no more memory; of verbs it is this.
    let result = result.map_err(|error| if error == libc::EAGAIN { libc::ENOMEM } else { error });
    drop(gate);
    // Not before: a fork has the locks of the C library's allocator while it waits for the gate.
    let acquired = result.map(|_| Acquired { first_offset: (addr % PAGE) as u64, segments: segments.to_vec() });
    segments.clear();
    STATE.lock().segments = segments;
    acquired
}

/// Opens what registrations need, as long as the program has the paths: it may confine itself to a directory before it registers
/// anything.
pub fn open_files() {
    let _blocked = Blocked::new();
    let _state = STATE.lock();
    maps::open();
    threads::open();
    hold::open();
}

/// In a forked child: closes the parent's. By them a child with fewer rights could reach the parent's memory.
pub fn close_files() {
    maps::close();
    threads::close();
    uffd::close();
}

/// Ends what [`acquire`] of the same range began.
pub fn release(addr: usize, length: usize, regions: &mut dyn Regions) {
    let Ok(pages) = pages(addr, length) else { return };
    let _blocked = Blocked::new();
    let _gate = fork::gate();
    STATE.lock().release(pages, regions);
    free_unused(regions);
}

/// Tells the source of regions that nothing refers to any more. The gate is held, so nobody else takes them.
fn free_unused(regions: &mut dyn Regions) {
    loop {
        let freed = {
            let mut state = STATE.lock();
            let last = state.freed.len().checked_sub(1);
            last.map(|last| {
                let region = state.freed[last];
                state.freed.remove(last..last + 1);
                region
            })
        };
        match freed {
            Some(region) => regions.free(region),
            None => break,
        }
    }
}

/// Whether every page of the range still shows what [`acquire`] put there: the application has neither unmapped nor replaced
/// nor moved it, and may still read and (if asked for) write it.
///
/// To be asked between `acquire` of the same range and its `release` only. Costs one question to the kernel for each mapping of
/// the range (before Linux 6.11: reading `/proc/self/maps`), and allocates nothing.
#[cfg_attr(not(test), allow(dead_code))] // For whoever keeps registrations.
pub fn still_acquired(addr: usize, length: usize, writable: bool, acquired: &Acquired) -> bool {
    let Ok(pages) = pages(addr, length) else { return false };
    let _blocked = Blocked::new();
    STATE.lock().still_shows(&pages, writable, &acquired.segments)
}

/// A mapping of a file, whole, as the program made it.
#[derive(Clone, Debug)]
pub struct Shown {
    pub range: Range<usize>,
    /// `PROT_*`.
    pub protection: i32,
    pub shared: bool,
    /// Byte in the file where it starts.
    pub offset: u64,
    /// Major and minor number.
    pub device: (u32, u32),
    pub inode: u64,
}

/// The mappings that reach into a range of addresses, in their order: for memory that is shared already.
pub fn mappings(range: &Range<usize>) -> Result<Vec<Shown>, i32> {
    let mut all = Vec::new();
    maps::visit(range, false, |mapping| {
        let maps::Mapping { protection, shared, offset, device, inode, .. } = mapping;
        all.push(Shown { range: mapping.range(), protection, shared, offset, device, inode });
        ControlFlow::Continue(())
    })?;
    Ok(all)
}

/// What is shared becomes private memory, if it is mapped here: the regions are gone, or they are those of a parent.
pub fn forget() {
    struct Gone;
    impl Regions for Gone {
        fn allocate(&mut self, _: u64) -> Result<(u32, i32), i32> {
            Err(libc::EIO)
        }
        fn free(&mut self, _: u32) {}
    }
    let _blocked = Blocked::new();
    STATE.lock().forget(&Gone);
}

fn pages(addr: usize, length: usize) -> Result<Range<usize>, i32> {
    let end = addr.checked_add(length).and_then(|end| end.checked_next_multiple_of(PAGE)).ok_or(libc::EINVAL)?;
    if length == 0 { Err(libc::EINVAL) } else { Ok(addr / PAGE..end / PAGE) }
}
