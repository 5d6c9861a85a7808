//! A child of `fork` gets private copies of shared pages, as of other memory.
//!
//! Shared mappings stay shared across a fork, so:
//! 1. Before, all shared pages become read-only: other threads that write wait ([`fault`]). Pages that the forking thread
//!    must write to meanwhile (its stack, its control block) become private, and a copy of them is kept.
//! 2. The child replaces all others by private copies, then tells the parent.
//! 3. The parent, having waited, puts back what it wrote to its private pages, byte by byte where they differ from the
//!    copy: the device may have written to the same page. Then everybody goes on.

// UNSAFETY: replaces the application's memory, in handlers that the C library calls.
#![allow(unsafe_code)]

use super::patch::Patch;
use super::state::State;
use super::{PAGE, STATE, bystander, fault, sys};
use core::arch::asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::*};

/// Pages that may become private in the parent; more would be those of other fork handlers.
const WINDOWS: usize = 256;

/// Process and thread that are forking; zero if none. The child finds its parent's numbers.
static PROCESS: AtomicU32 = AtomicU32::new(0);
static THREAD: AtomicU32 = AtomicU32::new(0);

/// Pages that are private during the fork. Written by the forking thread only, or for it.
struct Windows {
    pages: UnsafeCell<[usize; WINDOWS]>,
    count: AtomicUsize,
    /// What each had, page after page.
    bases: AtomicUsize,
}

// SAFETY: used by the forking thread, or by the one that works while that is held.
unsafe impl Sync for Windows {}

static PRIVATE: Windows =
    Windows { pages: UnsafeCell::new([0; WINDOWS]), count: AtomicUsize::new(0), bases: AtomicUsize::new(0) };

/// The pipe by which the child says that it has its copies: both ends, or -1.
static READ_END: AtomicU32 = AtomicU32::new(u32::MAX);
static WRITE_END: AtomicU32 = AtomicU32::new(u32::MAX);

impl Windows {
    fn pages(&self) -> &[usize] {
        // SAFETY: the first `count` are written; only the forking thread adds more.
        unsafe { &(&*self.pages.get())[..self.count.load(Relaxed)] }
    }

    /// Replaces a page of `patch` by private memory and keeps what it had.
    fn open(&self, patch: &Patch, page: usize) -> Result<(), i32> {
        let count = self.count.load(Relaxed);
        if count == WINDOWS {
            return Err(libc::ENOMEM);
        }
        let aside = sys::anonymous(PAGE)?;
        let base = self.bases.load(Relaxed) + count * PAGE;
        // SAFETY: `aside` and `base` are ours; the page is read-only for all others.
        unsafe {
            let moved = patch.copy(page, PAGE, base).and_then(|()| {
                core::ptr::copy_nonoverlapping(base as *const u8, aside as *mut u8, PAGE);
                sys::mprotect(aside, PAGE, patch.protection)?;
                sys::move_pages(aside, PAGE, page)
            });
            if moved.is_err() {
                sys::munmap(aside, PAGE);
                return moved;
            }
            (*self.pages.get())[count] = page;
        }
        self.count.store(count + 1, Relaxed);
        Ok(())
    }

    /// Brings what was written to the private page `index` into the file, and the file back under its address.
    fn close(&self, patch: &Patch, index: usize) -> Result<(), i32> {
        let (page, base) = (self.pages()[index], self.bases.load(Relaxed) + index * PAGE);
        let place = patch.place(page);
        let all = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: `view` is ours; nobody writes to the page until it is the file's.
        unsafe {
            let view = sys::mmap(0, PAGE, all, libc::MAP_SHARED, patch.file, place)?;
            let frozen = sys::mprotect(page, PAGE, patch.protection & !libc::PROT_WRITE);
            for at in 0..PAGE {
                let byte = ((page + at) as *const u8).read_volatile();
                if byte != ((base + at) as *const u8).read_volatile() {
                    ((view + at) as *mut u8).write_volatile(byte);
                }
            }
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            let mapped = sys::mmap(page, PAGE, patch.protection, flags, patch.file, place);
            sys::munmap(view, PAGE);
            frozen.and(mapped).map(drop)
        }
    }
}

/// A write to a read-only page while this thread forks, or in the child before its turn: makes the page private.
/// `None` if this thread does not fork.
pub fn resolve(address: usize) -> Option<bool> {
    let process = PROCESS.load(Relaxed);
    if process == 0 || (process == sys::process() && THREAD.load(Relaxed) != sys::thread()) {
        return None;
    }
    // SAFETY: the forking thread holds the lock, and is interrupted.
    let patches = unsafe { STATE.held() }.patches();
    let patch = patches.iter().find(|patch| patch.range.contains(&address))?;
    if patch.protection & libc::PROT_WRITE == 0 {
        return None;
    }
    Some(PRIVATE.open(patch, address & !(PAGE - 1)).is_ok())
}

extern "C" fn prepare() {
    core::mem::forget(STATE.lock());
    // SAFETY: just locked; this thread keeps the lock until after the fork.
    let state = unsafe { STATE.held() };
    state.prepare_patches();
    if state.patches().is_empty() || fault::install().is_err() {
        state.clear_patches();
        return;
    }
    let Ok(bases) = sys::anonymous(WINDOWS * PAGE) else {
        state.clear_patches();
        return;
    };
    PRIVATE.bases.store(bases, Relaxed);
    PRIVATE.count.store(0, Relaxed);
    let [read, write] = sys::pipe().map_or([u32::MAX; 2], |ends| ends.map(|end| end as u32));
    READ_END.store(read, Relaxed);
    WRITE_END.store(write, Relaxed);
    THREAD.store(sys::thread(), Relaxed);
    PROCESS.store(sys::process(), Relaxed);
    let own = bystander::own();
    let patches = state.patches();
    fault::announce();
    let frozen = bystander::run_for(patches.iter().map(|patch| &patch.range), &mut || {
        for patch in patches.iter().filter(|patch| patch.protection & libc::PROT_WRITE != 0) {
            // SAFETY: writers are caught by the handler.
            let _ = unsafe { sys::mprotect(patch.range.start, patch.range.len(), patch.frozen()) };
            for own in &own {
                let start = patch.range.start.max(own.start & !(PAGE - 1));
                for page in (start..patch.range.end.min(own.end)).step_by(PAGE) {
                    if PRIVATE.pages().contains(&page) {
                        continue;
                    }
                    if PRIVATE.open(patch, page).is_err() {
                        // Without memory for a copy this page stays as it is, or the thread could not go on.
                        // SAFETY: its own protection.
                        let _ = unsafe { sys::mprotect(page, PAGE, patch.protection) };
                    }
                }
            }
        }
    });
    // Without a thread to do it, the caller must be able to go on; the child shares these pages then.
    if frozen.is_err() {
        thaw();
    }
}

extern "C" fn parent() {
    if PROCESS.load(Relaxed) != 0 {
        close_end(&WRITE_END);
        let end = READ_END.load(Relaxed);
        if end != u32::MAX {
            // One byte when the child has its copies; the end of the file if it died, or was never born.
            let _ = sys::read(end as i32, &mut [0]);
        }
        thaw();
    }
    // SAFETY: locked by `prepare`.
    unsafe { STATE.unlock() };
}

/// In the parent: everything as it was, and everybody goes on.
fn thaw() {
    // SAFETY: this thread holds the lock.
    let state = unsafe { STATE.held() };
    let patches = state.patches();
    let _ = bystander::run_for(patches.iter().map(|patch| &patch.range), &mut || {
        for patch in patches.iter().filter(|patch| patch.protection & libc::PROT_WRITE != 0) {
            // SAFETY: its own protection, or for the private pages in it the same.
            let _ = unsafe { sys::mprotect(patch.range.start, patch.range.len(), patch.protection) };
        }
        for (index, page) in PRIVATE.pages().iter().enumerate() {
            if let Some(patch) = patches.iter().find(|patch| patch.range.contains(page)) {
                // If it fails the page stays private, and the next registration shares it anew.
                let _ = PRIVATE.close(patch, index);
            }
        }
    });
    end(state);
}

extern "C" fn child() {
    // SAFETY: the lock is held by the thread that this one is a copy of.
    let state = unsafe { STATE.held() };
    if PROCESS.load(Relaxed) != 0 {
        for patch in state.patches() {
            // A page without memory for its copy stays read-only: better a fault than a write into the parent.
            let mut start = patch.range.start;
            while start < patch.range.end {
                let mut end = start;
                while end < patch.range.end && end - start < COPY && !PRIVATE.pages().contains(&end) {
                    end += PAGE;
                }
                if start < end {
                    let _ = patch.privatise(start, end - start);
                }
                start = if end < patch.range.end && PRIVATE.pages().contains(&end) { end + PAGE } else { end };
            }
        }
        let write = WRITE_END.load(Relaxed);
        if write != u32::MAX {
            sys::write(write as i32, &[1]);
        }
        end(state);
    }
    state.forget();
    // SAFETY: locked by `prepare`, and no reference remains.
    unsafe { STATE.unlock() };
}

/// What the child copies at once.
const COPY: usize = 16 << 20;

/// The fork is over, for either side.
fn end(state: &mut State) {
    PROCESS.store(0, Relaxed);
    THREAD.store(0, Relaxed);
    PRIVATE.count.store(0, Relaxed);
    // SAFETY: made by `prepare`, and used by the windows only, which are closed.
    unsafe { sys::munmap(PRIVATE.bases.swap(0, Relaxed), WINDOWS * PAGE) };
    close_end(&READ_END);
    close_end(&WRITE_END);
    fault::finish();
    state.clear_patches();
}

fn close_end(end: &AtomicU32) {
    let file = end.swap(u32::MAX, Relaxed);
    if file != u32::MAX {
        sys::close(file as i32);
    }
}

/// Has the C library call the handlers above. To be called before anything is shared.
pub fn watch() {
    static WATCHED: AtomicBool = AtomicBool::new(false);
    if WATCHED.swap(true, Relaxed) {
        return;
    }
    let (glibc, other): (usize, usize);
    // `pthread_atfork` is no symbol of older versions of glibc but part of each program; what it calls is one. Others have
    // it as standards say.
    // SAFETY: reads addresses that the linker leaves zero where there is no such symbol.
    unsafe {
        asm!(
            ".weak __register_atfork",
            ".weak pthread_atfork",
            "mov {}, qword ptr [rip + __register_atfork@GOTPCREL]",
            "mov {}, qword ptr [rip + pthread_atfork@GOTPCREL]",
            out(reg) glibc, out(reg) other, options(nostack, readonly, preserves_flags)
        );
    }
    type Step = extern "C" fn();
    type Register = extern "C" fn(Step, Step, Step, *const u8) -> i32;
    if let Some(address) = [glibc, other].into_iter().find(|&address| address != 0) {
        // SAFETY: both are C functions; the one with three parameters ignores the fourth: the library that is never unloaded.
        let register = unsafe { core::mem::transmute::<usize, Register>(address) };
        register(prepare, parent, child, core::ptr::null());
    }
}
