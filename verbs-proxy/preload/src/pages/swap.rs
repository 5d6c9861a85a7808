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

/// To stop hundreds of threads takes longer than to copy a chunk. So while they are stopped, more chunks are begun until so many
/// nanoseconds have passed since the first one was ...
const STOPPED: u64 = 2_000_000;
/// ... and so many are done at the most.
const MOST_CHUNKS: usize = 64;

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
        let chunks = at..chunks_end(at, area.end, method);
        let offset = offset + shared.bytes as u64;
        let step = match place {
            Some(target) => {
                each_chunk(&chunks, |chunk| touch(area, chunk.start));
                let target = if target == 0 { 0 } else { target + shared.bytes };
                share_by_moving(area, method, &chunks, target, file, offset)
            }
            None => {
                let chunk = at..next_chunk(at).min(area.end);
                share_by_copying(area, method, &chunk, file, offset).map(|()| (chunk.len(), 0))
            }
        };
        match step {
            Ok((bytes, aside)) => {
                if aside != 0 {
                    shared.aside = if shared.bytes == 0 { aside } else { shared.aside };
                    empty(aside, bytes);
                }
                shared.bytes += bytes;
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

/// Where what may be replaced at once ends that begins at `at`.
fn chunks_end(at: usize, end: usize, method: Method) -> usize {
    let more = if method == Method::Stopped { (MOST_CHUNKS - 1) * CHUNK } else { 0 };
    next_chunk(at).saturating_add(more).min(end)
}

fn each_chunk(range: &Range<usize>, mut each: impl FnMut(Range<usize>)) {
    let mut at = range.start;
    while at < range.end {
        let end = next_chunk(at).min(range.end);
        each(at..end);
        at = end;
    }
}

/// Replaces chunk by chunk, as long as threads may be stopped for that; the bytes of those that were. An error only if there are
/// none.
fn replace_some(range: &Range<usize>, mut replace: impl FnMut(Range<usize>) -> Result<(), i32>) -> Result<usize, i32> {
    let begun = if next_chunk(range.start) < range.end { sys::now() } else { 0 };
    let mut at = range.start;
    loop {
        let end = next_chunk(at).min(range.end);
        match replace(at..end) {
            Ok(()) => at = end,
            Err(error) if at == range.start => return Err(error),
            // It comes again, and first.
            Err(_) => break,
        }
        if at >= range.end || sys::now() - begun >= STOPPED {
            break;
        }
    }
    Ok(at - range.start)
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

/// How much was moved, and where it is.
fn share_by_moving(
    area: &Area,
    method: Method,
    chunks: &Range<usize>,
    target: usize,
    file: i32,
    offset: u64,
) -> Result<(usize, usize), Failure> {
    let (start, end, protection) = (chunks.start, chunks.end, area.protection);
    let dump = interpose::may_be_dumped();
    hold::perform(method, Who::Everybody, chunks, protection, move || {
        let (mut first, mut full) = (0, 0..0);
        let moved = replace_some(&(start..end), |chunk| {
            let (done, length) = (chunk.start - start, chunk.len());
            let target = if target == 0 { 0 } else { target + done };
            // No more than one chunk is in memory twice.
            if !full.is_empty() {
                empty(full.start, full.len());
                full = 0..0;
            }
            // SAFETY: everybody is kept from these pages until they are replaced by what has the same contents, or back.
            unsafe {
                let aside = sys::empty_into(chunk.start, length, target)?;
                // With nobody beside us who could take the address or fork, the file can be mapped where it belongs at once.
                let at = if method == Method::Alone { chunk.start } else { 0 };
                let view = fill(file, aside, length, offset + done as u64, protection, dump, at);
                let shown =
                    view.and_then(|view| if at == 0 { sys::move_pages(view, length, chunk.start) } else { Ok(()) });
                if let Err(error) = shown {
                    let _ = sys::move_pages(aside, length, chunk.start);
                    return Err(error);
                }
                first = if done == 0 { aside } else { first };
                full = aside..aside + length;
            }
            Ok(())
        })?;
        Ok((moved, first))
    })
}

fn share_by_copying(area: &Area, method: Method, chunk: &Range<usize>, file: i32, offset: u64) -> Result<(), Failure> {
    let (start, length, protection) = (chunk.start, chunk.len(), area.protection);
    let dump = interpose::may_be_dumped();
    hold::perform(method, Who::Writers, chunk, protection, move || {
        // SAFETY: the file has the same bytes as the pages that it replaces, and nobody can have changed them since.
        unsafe {
            let view = fill(file, start, length, offset, protection, dump, 0)?;
            sys::move_pages(view, length, start)
        }
    })
}

/// Writes memory to the file and maps that: where it is, which is `at`, or somewhere if that is zero. After an error nothing of ours is
/// there.
///
/// # Safety
/// Nobody writes to the memory; what is at `at` is not needed.
unsafe fn fill(
    file: i32,
    from: usize,
    length: usize,
    offset: u64,
    protection: i32,
    dump: bool,
    at: usize,
) -> Result<usize, i32> {
    // A limit on files would be a signal, and valgrind reports what is written if nobody has ever set it.
    let by_writing = sys::longest_file() >= offset + length as u64 && !sys::is_emulated();
    if by_writing {
        sys::pwrite(file, from, length, offset)?;
    }
    let at_first = if by_writing { protection } else { libc::PROT_READ | libc::PROT_WRITE };
    // Populated: else each page costs a fault later, which takes longer altogether.
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE | if at == 0 { 0 } else { libc::MAP_FIXED };
    // SAFETY: replaces nothing, or by the caller's promise what is not needed.
    let view = unsafe { sys::mmap(at, length, at_first, flags, file, offset)? };
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
    let removed = if remove { again } else { 0 };
    while done < length {
        let part =
            Shown { start: shown.start + done, aside: if shown.aside == 0 { 0 } else { shown.aside + done }, ..*shown };
        let source = if readable { part.start } else { again + done };
        let removed = if removed == 0 { 0 } else { removed + done };
        match some_back(&part, source, removed, rest == Rest::Kept) {
            Ok(bytes) => {
                if locked {
                    sys::lock(part.start, bytes);
                }
                done += bytes;
            }
            Err(error) => {
                result = Err(error);
                break;
            }
        }
    }
    if again != 0 {
        // SAFETY: ours.
        unsafe { sys::munmap(again, length) };
    }
    (done, result)
}

/// Replaces the first chunk, or some, of what is shown, whose contents are at `source`, too; how much. The file's pages, where they
/// are mapped at `removed`, go.
fn some_back(shown: &Shown, source: usize, removed: usize, keep: bool) -> Result<usize, i32> {
    let (start, protection, aside) = (shown.start, shown.protection, shown.aside);
    let one = next_chunk(start).min(shown.end);
    let target = if aside == 0 { sys::anonymous(one - start)? } else { aside };
    let step = |chunk: Range<usize>| {
        let (done, length) = (chunk.start - start, chunk.len());
        let all = libc::PROT_READ | libc::PROT_WRITE;
        // No more than one chunk is in memory twice.
        remove(removed, done - done.min(CHUNK)..done);
        // SAFETY: `target` is ours and gets what is in the pages that it replaces, which nobody can change meanwhile.
        unsafe {
            sys::mprotect(target + done, length, all)?;
            sys::copy(source + done, target + done, length);
            if protection != all {
                sys::mprotect(target + done, length, protection)?;
            }
            if keep && aside != 0 {
                sys::unlock(target + done, length);
                sys::empty_into(target + done, length, chunk.start)?;
            } else {
                sys::move_pages(target + done, length, chunk.start)?;
            }
        }
        Ok(())
    };
    // Who may not write does not.
    let mut method = if protection & libc::PROT_WRITE == 0 { Ok(Method::Alone) } else { hold::method(true) };
    let result = loop {
        let tried = match method {
            Ok(tried) => tried,
            Err(error) => break Err(error),
        };
        // Other memory takes the place of one chunk only.
        let end = if aside == 0 { one } else { chunks_end(start, shown.end, tried) };
        match hold::perform(tried, Who::Writers, &(start..end), protection, move || replace_some(&(start..end), step)) {
            Ok(bytes) => break Ok(bytes),
            Err(Failure::Work(error)) => break Err(error),
            Err(Failure::Method) => method = tried.next(),
        }
    };
    remove(removed, 0..result.unwrap_or(0));
    // SAFETY: ours, and what is in it, if anything, is not needed.
    unsafe {
        match result {
            _ if aside != 0 && keep => empty(aside, result.unwrap_or(one - start)),
            Ok(_) => {}
            Err(_) if aside == 0 => sys::munmap(target, one - start),
            Err(_) => empty(aside, one - start),
        }
    }
    result
}

/// Gives back pages of the file that are mapped at `removed`, unless that is zero, and not shown any more.
fn remove(removed: usize, part: Range<usize>) {
    if removed != 0 && !part.is_empty() {
        // SAFETY: a mapping of ours, which nobody reads any more.
        let _ = unsafe { sys::madvise(removed + part.start, part.len(), libc::MADV_REMOVE) };
    }
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
