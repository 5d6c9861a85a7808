//! `madvise` and `mremap`, as the program calls them.
//!
//! The library is loaded before all others, so these are the functions that the program and its libraries find. For memory
//! that is shared with the proxy they do what they would do to private memory; for all other memory, and in programs that
//! never register any, they are the system calls. What the C library calls for itself comes by another way: it does not count
//! on zeros, and a mapping of ours that it moves or enlarges finds file pages beyond the region ([`super::Regions`]).

// UNSAFETY: functions of the C library by their names.
#![allow(unsafe_code)]
// Only the library has these names, so that nothing calls them without it but tests.
#![cfg_attr(not(any(test, feature = "freestanding")), allow(dead_code))]

use super::state::State;
use super::swap::{self, Rest, Shown};
use super::{PAGE, STATE, maps, sys};
use crate::pages::signals::Blocked;
use core::ops::{ControlFlow, Range};
use core::sync::atomic::{AtomicBool, Ordering::*};

/// Whether any memory may show a region's file.
static SHARED: AtomicBool = AtomicBool::new(false);
/// Whether the program has ever asked for memory that is not dumped.
static UNDUMPED: AtomicBool = AtomicBool::new(false);

/// There is shared memory from now on, or there is none.
pub fn set_shared(shared: bool) {
    SHARED.store(shared, Relaxed);
}

/// Whether a core dump may have what is shared. What the program has asked for a mapping cannot be read from it cheaply; so
/// if it ever wanted some memory left out, all that is shared is.
pub fn may_be_dumped() -> bool {
    !UNDUMPED.load(Relaxed)
}

const MADV_DONTNEED_LOCKED: i32 = 24;
const MADV_COLLAPSE: i32 = 25;
const MADV_GUARD_INSTALL: i32 = 102;

/// What advice about private memory means for a part of it that is shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    /// For the pages: the kernel does the same to a file's.
    Pages,
    /// The contents are dropped.
    Drop,
    /// For the mapping: the application's own one has to know.
    Mapping,
    /// For the mapping and for what stands in for it.
    Both,
    /// Private memory refuses it.
    Refused,
}

fn meaning(advice: i32) -> Meaning {
    match advice {
        libc::MADV_DONTNEED | libc::MADV_FREE | MADV_DONTNEED_LOCKED | MADV_GUARD_INSTALL => Meaning::Drop,
        libc::MADV_DONTFORK
        | libc::MADV_DOFORK
        | libc::MADV_MERGEABLE
        | libc::MADV_UNMERGEABLE
        | libc::MADV_WIPEONFORK
        | libc::MADV_KEEPONFORK => Meaning::Mapping,
        libc::MADV_NORMAL
        | libc::MADV_RANDOM
        | libc::MADV_SEQUENTIAL
        | libc::MADV_HUGEPAGE
        | libc::MADV_NOHUGEPAGE
        | libc::MADV_DONTDUMP
        | libc::MADV_DODUMP => Meaning::Both,
        libc::MADV_REMOVE => Meaning::Refused,
        // Among them what gathers pages to a huge one, which a file may refuse and the program need not notice.
        _ => Meaning::Pages,
    }
}

/// `madvise(2)`, for the program.
pub fn advise(address: usize, length: usize, advice: i32) -> Result<(), i32> {
    if advice == libc::MADV_DONTDUMP {
        UNDUMPED.store(true, Relaxed);
    }
    // SAFETY: the program's own call.
    let call = |start: usize, end: usize| unsafe { sys::madvise(start, end - start, advice) };
    let end = length.checked_next_multiple_of(PAGE).and_then(|length| address.checked_add(length));
    let meaning = meaning(advice);
    let (Some(end), true) = (end, address.is_multiple_of(PAGE)) else {
        return call(address, address.wrapping_add(length));
    };
    if !SHARED.load(Relaxed) || meaning == Meaning::Pages && advice != MADV_COLLAPSE || address >= end {
        // SAFETY: as above.
        return unsafe { sys::madvise(address, length, advice) };
    }
    let _blocked = Blocked::new();
    let state = STATE.lock();
    let mut result = Ok(());
    let mut next = address;
    let mut note = |new: Result<(), i32>| {
        if result.is_ok() {
            result = new;
        }
    };
    let looked = each_shown(&state, &(address..end), |shown| {
        if next < shown.start {
            note(call(next, shown.start));
        }
        next = shown.end;
        note(advise_shown(shown, advice, meaning));
    });
    match looked {
        Err(libc::EMFILE | libc::ENFILE) if state.has_any_of(&(address..end)) => return Err(libc::EAGAIN),
        // Of memory that is not registered the answer is known without the descriptor that the program does not leave us; only
        // what it has moved here is mistaken for its own.
        Err(libc::EMFILE | libc::ENFILE) => {}
        looked => looked?,
    }
    if next < end {
        note(call(next, end));
    }
    result
}

fn advise_shown(shown: &Shown, advice: i32, meaning: Meaning) -> Result<(), i32> {
    let length = shown.end - shown.start;
    // SAFETY: the program's own call about its own memory, or about what is kept of it.
    unsafe {
        match meaning {
            Meaning::Refused => Err(libc::EINVAL),
            Meaning::Drop => {
                let needs_unlocked = advice == libc::MADV_DONTNEED || advice == libc::MADV_FREE;
                if needs_unlocked && sys::is_locked(shown.start) {
                    return Err(libc::EINVAL);
                }
                swap::detach(shown)?;
                sys::madvise(shown.start, length, advice)
            }
            Meaning::Mapping if shown.aside == 0 => Ok(()),
            Meaning::Mapping => sys::madvise(shown.aside, length, advice),
            Meaning::Both => {
                let here = sys::madvise(shown.start, length, advice);
                if shown.aside == 0 { here } else { sys::madvise(shown.aside, length, advice) }
            }
            Meaning::Pages => {
                let _ = sys::madvise(shown.start, length, advice);
                Ok(())
            }
        }
    }
}

/// Calls `each` with the parts of the range that show a region's file, by address.
fn each_shown(state: &State, range: &Range<usize>, mut each: impl FnMut(&Shown)) -> Result<(), i32> {
    maps::visit(range, false, |mapping| {
        if let Some(mapping) = mapping.clip(range) {
            state.each_shown(&mapping, &mut each);
        }
        ControlFlow::Continue(())
    })
}

/// `mremap(2)`, for the program.
pub fn remap(address: usize, before: usize, after: usize, flags: i32, target: usize) -> Result<usize, i32> {
    if SHARED.load(Relaxed) {
        let range = address..address.saturating_add(before.max(1)).saturating_add(PAGE - 1) & !(PAGE - 1);
        let _blocked = Blocked::new();
        let state = STATE.lock();
        let (mut mappings, mut shown) = (0, 0);
        let looked = maps::visit(&range, false, |mapping| {
            mappings += 1;
            if let Some(mapping) = mapping.clip(&range) {
                state.each_shown(&mapping, &mut |part| shown += part.end - part.start);
            }
            ControlFlow::Continue(())
        });
        match looked {
            Err(libc::EMFILE | libc::ENFILE) if state.has_any_of(&range) => return Err(libc::ENOMEM),
            // As for advice.
            Err(libc::EMFILE | libc::ENFILE) => {}
            looked => looked?,
        }
        if shown > 0 && before == 0 {
            // Private memory cannot be mapped twice.
            return Err(libc::EINVAL);
        }
        // A move takes the region's pages along, as those that a driver has pinned. Whatever else needs private memory.
        let is_move = after <= before && flags & !(libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) == 0;
        let elsewhere = flags & libc::MREMAP_FIXED != 0;
        if is_move && elsewhere && mappings > 1 && shown == range.len() && after > 0 {
            // To the program it is one mapping, and no kernel before 6.17 moves several.
            let moved = move_each(&range, after, flags, target)?;
            let kept = range.start + after.next_multiple_of(PAGE);
            if kept < range.end {
                // SAFETY: the program's own call, which says that it needs this no more.
                unsafe { sys::munmap(kept, range.end - kept) };
            }
            return Ok(moved);
        }
        // Where it is, it can only become shorter, however many mappings it is.
        let keeps_pages = is_move && (mappings == 1 || !elsewhere);
        if shown > 0 && !keeps_pages {
            let mut result = Ok(());
            each_shown(&state, &range, |shown| {
                if result.is_ok() {
                    result = swap::give_back(shown, Rest::Kept).1;
                }
            })?;
            result?;
        }
    }
    // SAFETY: the program's own call.
    unsafe { sys::mremap(address, before, after, flags, target) }
}

/// Moves the mappings of the first `after` bytes of a range, one after the other.
fn move_each(range: &Range<usize>, after: usize, flags: i32, target: usize) -> Result<usize, i32> {
    let length = after.checked_next_multiple_of(PAGE).ok_or(libc::EINVAL)?.min(range.len());
    let range = range.start..range.start + length;
    let target_end = target.checked_add(length).ok_or(libc::EINVAL)?;
    let overlaps = target < range.end && range.start < target_end;
    if !range.start.is_multiple_of(PAGE) || !target.is_multiple_of(PAGE) || overlaps {
        return Err(libc::EINVAL);
    }
    let nothing = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: a move replaces what is at its target. All of it is there, or nothing is moved.
    unsafe { sys::mmap(target, length, libc::PROT_NONE, nothing, -1, 0)? };
    let mut next = range.start;
    while next < range.end {
        let mut part = next..range.end;
        maps::visit(&(next..next + PAGE), false, |mapping| {
            part.end = mapping.end.min(range.end);
            ControlFlow::Break(())
        })?;
        let to = target + (part.start - range.start);
        // SAFETY: the program's own call, in parts.
        unsafe { sys::mremap(part.start, part.len(), part.len(), flags, to)? };
        next = part.end;
    }
    Ok(target)
}

/// The functions under their names, in the library only: tests shall not call themselves.
#[cfg(all(feature = "freestanding", not(test)))]
mod names {
    use super::{advise, remap};
    use core::ffi::{c_int, c_void};

    /// `madvise(2)`.
    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int {
        crate::sys::zero_or_minus_one(advise(address as usize, length, advice))
    }

    /// `mremap(2)`. In C its last argument is optional, and comes in the same register if it is there.
    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn mremap(
        address: *mut c_void,
        before: usize,
        after: usize,
        flags: c_int,
        target: *mut c_void,
    ) -> *mut c_void {
        match remap(address as usize, before, after, flags, target as usize) {
            Ok(address) => address as *mut c_void,
            Err(errno) => {
                crate::sys::set_errno(errno);
                libc::MAP_FAILED
            }
        }
    }
}
