//! Puts other pages with the same contents under an address, while the application runs.
//!
//! [`share`] moves the application's mapping aside, chunk by chunk, copies what was in it into the region's file and maps that
//! in its place. The mapping that was moved is kept, empty: it has everything that the application and the kernel have ever
//! said about this memory (locks, advice, policy, its place in the kernel's bookkeeping). [`give_back`] fills it and moves it
//! back, where it becomes one with its neighbours again.

// UNSAFETY: replaces the application's memory.
#![allow(unsafe_code)]

use super::hold::{self, Failure, Method, Who};
use super::{PAGE, interpose, sys};
use core::ops::Range;

/// Others wait at most for the copy of this much, and no more memory than this is needed twice. The size and alignment of a
/// huge page, so that one stays one.
pub const CHUNK: usize = 2 << 20;

/// Addresses of one mapping.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    pub start: usize,
    pub end: usize,
    /// `PROT_*`, which stays.
    pub protection: i32,
    /// Whether it maps a file.
    pub file_backed: bool,
    /// Whether it may be of a stack that grows.
    pub is_stack: bool,
}

impl Area {
    pub fn length(&self) -> usize {
        self.end - self.start
    }
}

/// What became of an area.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shared {
    /// So much of it, from its start on, is the file's.
    pub bytes: usize,
    /// Where the application's own mapping is, or zero.
    pub aside: usize,
}

/// Moves the area's contents into `file` from `offset` on, and the file under the area. After an error what `shared` does not
/// tell of is as before.
pub fn share(area: &Area, file: i32, offset: u64, shared: &mut Shared) -> Result<(), i32> {
    // A userfaultfd watches no files.
    let mut method = hold::method(!area.file_backed)?;
    // Not locked for the moment: the program may have the right to lock this once, and kernels miscount what is locked when it
    // is moved aside.
    let locked = sys::is_locked(area.start);
    if locked {
        sys::unlock(area.start, area.length());
    }
    let mut place = if method == Method::Signals { None } else { reserve(area) };
    let mut result = Ok(());
    while shared.bytes < area.length() && result.is_ok() {
        let at = area.start + shared.bytes;
        let chunk = at..next_chunk(at).min(area.end);
        let offset = offset + shared.bytes as u64;
        let step = match place {
            Some(target) => {
                touch(area, at);
                let target = if target == 0 { 0 } else { target + shared.bytes };
                share_by_moving(area, method, &chunk, target, file, offset)
            }
            None => share_by_copying(area, method, &chunk, file, offset).map(|()| 0),
        };
        match step {
            Ok(aside) => {
                if aside != 0 {
                    shared.aside = if shared.bytes == 0 { aside } else { shared.aside };
                    empty(aside, chunk.len());
                }
                shared.bytes += chunk.len();
            }
            // The application watches these pages by a userfaultfd of its own, say, or there is a debugger.
            Err(Failure::Method) => match method.next() {
                Ok(Method::Signals) if place.is_some() && shared.bytes > 0 => result = Err(libc::EPERM),
                Ok(next) => {
                    method = next;
                    if method == Method::Signals {
                        release(place.take(), area, 0);
                    }
                }
                Err(error) => result = Err(error),
            },
            // Such a mapping cannot be kept twice (limits of the address space, of locked or of promised memory), or not so.
            Err(Failure::Work(libc::ENOMEM | libc::EINVAL | libc::EAGAIN)) if place.is_some() && shared.bytes == 0 => {
                release(place.take(), area, 0);
            }
            Err(Failure::Work(error)) => result = Err(error),
        }
    }
    if result.is_err() {
        release(place, area, shared.bytes);
    }
    if locked {
        sys::lock_on_fault(area.start, shared.bytes);
        sys::lock(area.start + shared.bytes, area.length() - shared.bytes);
    }
    result
}

/// The first address after `at` where a chunk ends.
fn next_chunk(at: usize) -> usize {
    (at / CHUNK + 1) * CHUNK
}

/// Where the area's own mapping shall be meanwhile: an address, or zero for wherever there is room, which is one chunk's only.
fn reserve(area: &Area) -> Option<usize> {
    if next_chunk(area.start) >= area.end {
        return Some(0);
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: replaces nothing.
    let map = |length: usize| unsafe { sys::mmap(0, length, libc::PROT_NONE, flags, -1, 0) };
    let length = area.length() + CHUNK;
    let start = match map(length) {
        Ok(all) => {
            // As far from a chunk's border as the area, so that a huge page can be moved as one.
            let start = all + area.start.wrapping_sub(all) % CHUNK;
            // SAFETY: ours, and unused.
            unsafe {
                if start > all {
                    sys::munmap(all, start - all);
                }
                sys::munmap(start + area.length(), all + length - (start + area.length()));
            }
            start
        }
        Err(_) => map(area.length()).ok()?,
    };
    // In case the program locks whatever it maps: this is nothing.
    sys::unlock(start, area.length());
    Some(start)
}

/// Ends a reservation, but for what has been moved there.
fn release(place: Option<usize>, area: &Area, moved: usize) {
    if let Some(start @ 1..) = place {
        // SAFETY: made by `reserve`, and nothing is there.
        unsafe { sys::munmap(start + moved, area.length() - moved) };
    }
}

/// Writes to a page, without changing it. A mapping that nobody ever wrote to has no place in the kernel's bookkeeping, and
/// would get one aside, with which it could never be one with its neighbours again.
fn touch(area: &Area, address: usize) {
    if area.protection & libc::PROT_WRITE != 0 {
        sys::touch(address);
    }
}

fn share_by_moving(
    area: &Area,
    method: Method,
    chunk: &Range<usize>,
    target: usize,
    file: i32,
    offset: u64,
) -> Result<usize, Failure> {
    let (start, length, protection) = (chunk.start, chunk.len(), area.protection);
    let dump = interpose::may_be_dumped();
    hold::perform(method, Who::Everybody, chunk, protection, move || {
        // SAFETY: everybody is kept from these pages until they are replaced by what has the same contents, or back.
        unsafe {
            let aside = sys::empty_into(start, length, target)?;
            let view = fill(file, aside, length, offset, protection, dump);
            match view.and_then(|view| sys::move_pages(view, length, start)) {
                Ok(()) => Ok(aside),
                Err(error) => {
                    let _ = sys::move_pages(aside, length, start);
                    Err(error)
                }
            }
        }
    })
}

fn share_by_copying(area: &Area, method: Method, chunk: &Range<usize>, file: i32, offset: u64) -> Result<(), Failure> {
    let (start, length, protection) = (chunk.start, chunk.len(), area.protection);
    let dump = interpose::may_be_dumped();
    hold::perform(method, Who::Writers, chunk, protection, move || {
        // SAFETY: the file has the same bytes as the pages that it replaces, and nobody can have changed them since.
        unsafe {
            let view = fill(file, start, length, offset, protection, dump)?;
            sys::move_pages(view, length, start)
        }
    })
}

/// Writes memory to the file and maps that somewhere: where it is.
///
/// # Safety
/// Nobody writes to the memory.
unsafe fn fill(file: i32, from: usize, length: usize, offset: u64, protection: i32, dump: bool) -> Result<usize, i32> {
    // A limit on files would be a signal, and valgrind reports what is written if nobody has ever set it.
    let by_writing = sys::longest_file() >= offset + length as u64 && !sys::is_emulated();
    if by_writing {
        sys::pwrite(file, from, length, offset)?;
    }
    let at_first = if by_writing { protection } else { libc::PROT_READ | libc::PROT_WRITE };
    // Populated: else each page costs a fault later, which takes longer altogether.
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
    // SAFETY: replaces nothing.
    let view = unsafe { sys::mmap(0, length, at_first, flags, file, offset)? };
    // SAFETY: `view` is ours, and as long as the memory; the advice changes no contents.
    let result = unsafe {
        if !by_writing {
            sys::copy(from, view, length);
        }
        let protected = if at_first == protection { Ok(()) } else { sys::mprotect(view, length, protection) };
        protected.and_then(|()| {
            // A child that is made without the C library must not share it.
            sys::madvise(view, length, libc::MADV_DONTFORK)?;
            if dump { Ok(()) } else { sys::madvise(view, length, libc::MADV_DONTDUMP) }
        })
    };
    if let Err(error) = result {
        // SAFETY: ours.
        unsafe { sys::munmap(view, length) };
        return Err(error);
    }
    Ok(view)
}

/// Gives back the memory of what was moved aside, whose contents are the file's now, and keeps it out of reach.
fn empty(aside: usize, length: usize) {
    // SAFETY: what is in it is not needed any more.
    unsafe {
        let _ = sys::madvise(aside, length, libc::MADV_DONTNEED);
        let _ = sys::mprotect(aside, length, libc::PROT_NONE);
    }
}

/// A part of the application's memory that shows a file.
#[derive(Clone, Copy, Debug)]
pub struct Shown {
    pub start: usize,
    pub end: usize,
    /// `PROT_*`
    pub protection: i32,
    /// The application's own mapping, or zero.
    pub aside: usize,
}

/// What is to become of what private memory leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// The file's pages stay as they are.
    Stays,
    /// The file's pages are given back as it goes.
    Removed,
    /// The file's pages stay, and what was kept aside also stays reserved: the table will still name it.
    Kept,
}

/// Replaces what is shown by private memory with the same contents. The bytes that are private now, from the start on.
pub fn give_back(shown: &Shown, rest: Rest) -> (usize, Result<(), i32>) {
    let remove = rest == Rest::Removed;
    let length = shown.end - shown.start;
    // As the application has it today. The pages of what is locked cannot be given back.
    let locked = sys::is_locked(shown.start);
    if locked {
        sys::unlock(shown.start, length);
    }
    let readable = shown.protection & libc::PROT_READ != 0;
    let again = if remove || !readable { sys::map_again(shown.start, length).unwrap_or(0) } else { 0 };
    let (mut done, mut result) = (0, Ok(()));
    if !readable {
        result = match again {
            0 => Err(libc::ENOMEM),
            // SAFETY: a mapping of ours.
            _ => unsafe { sys::mprotect(again, length, libc::PROT_READ) },
        };
    }
    while done < length && result.is_ok() {
        let start = shown.start + done;
        let chunk = start..next_chunk(start).min(shown.end);
        let source = if readable { start } else { again + done };
        let aside = if shown.aside == 0 { 0 } else { shown.aside + done };
        result = one_back(shown.protection, &chunk, source, aside, rest == Rest::Kept);
        if result.is_err() {
            break;
        }
        if locked {
            sys::lock(start, chunk.len());
        }
        if remove && again != 0 {
            // SAFETY: these pages of the file are not shown any more.
            let _ = unsafe { sys::madvise(again + done, chunk.len(), libc::MADV_REMOVE) };
        }
        done += chunk.len();
    }
    if again != 0 {
        // SAFETY: ours.
        unsafe { sys::munmap(again, length) };
    }
    (done, result)
}

fn one_back(protection: i32, chunk: &Range<usize>, source: usize, aside: usize, keep: bool) -> Result<(), i32> {
    let (start, length) = (chunk.start, chunk.len());
    let all = libc::PROT_READ | libc::PROT_WRITE;
    let target = if aside == 0 { sys::anonymous(length)? } else { aside };
    let step = move || {
        // SAFETY: `target` is ours and gets what is in the pages that it replaces, which nobody can change meanwhile.
        unsafe {
            sys::mprotect(target, length, all)?;
            sys::copy(source, target, length);
            if protection != all {
                sys::mprotect(target, length, protection)?;
            }
            if keep && aside != 0 {
                sys::unlock(target, length);
                return sys::empty_into(target, length, start).map(drop);
            }
            sys::move_pages(target, length, start)
        }
    };
    // Who may not write does not.
    let mut method = if protection & libc::PROT_WRITE == 0 { Ok(Method::Alone) } else { hold::method(true) };
    let result = loop {
        match method.map(|method| (method, hold::perform(method, Who::Writers, chunk, protection, step))) {
            Ok((_, Ok(()))) => break Ok(()),
            Ok((_, Err(Failure::Work(error)))) | Err(error) => break Err(error),
            Ok((tried, Err(Failure::Method))) => method = tried.next(),
        }
    };
    // SAFETY: ours, and what is in it, if anything, is not needed.
    unsafe {
        if aside == 0 {
            if result.is_err() {
                sys::munmap(target, length);
            }
        } else if result.is_err() || keep {
            empty(aside, length);
        }
    }
    result
}

/// The application dropped what was in its memory: empty private memory takes the place of what is shown. What was kept aside
/// stays there, and its copy goes in.
#[cfg_attr(not(any(test, feature = "freestanding")), allow(dead_code))] // As what calls it.
pub fn detach(shown: &Shown) -> Result<(), i32> {
    let length = shown.end - shown.start;
    let locked = sys::is_locked(shown.start);
    // SAFETY: replaces what the application has just said that it does not need.
    let result = unsafe {
        if shown.aside == 0 {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            sys::mmap(shown.start, length, shown.protection, flags, -1, 0).map(drop)
        } else {
            // All memory of the process may have been locked since.
            sys::unlock(shown.aside, length);
            let result = sys::mprotect(shown.aside, length, shown.protection)
                .and_then(|()| sys::empty_into(shown.aside, length, shown.start).map(drop));
            let _ = sys::mprotect(shown.aside, length, libc::PROT_NONE);
            result
        }
    };
    if locked {
        sys::lock_on_fault(shown.start, length);
    }
    result
}

const _: () = assert!(CHUNK.is_multiple_of(PAGE));
