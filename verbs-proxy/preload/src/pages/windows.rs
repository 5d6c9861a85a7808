//! Pages that are private during a fork, because the forking thread writes to them.

// UNSAFETY: replaces the application's memory.
#![allow(unsafe_code)]

use super::patch::Patch;
use super::{PAGE, sys};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicUsize, Ordering::*};

/// More would be those of other fork handlers.
const MOST: usize = 256;

#[derive(Clone, Copy)]
struct Window {
    page: usize,
    /// The file's page, mapped elsewhere.
    view: usize,
}

/// The windows of a fork. Used by the forking thread, by the one that works while that is held, and in the child.
pub struct Windows {
    windows: UnsafeCell<[Window; MOST]>,
    count: AtomicUsize,
    /// What each page had, one after the other.
    bases: AtomicUsize,
}

// SAFETY: used by one thread at a time, as the type says.
unsafe impl Sync for Windows {}

impl Windows {
    pub const fn new() -> Self {
        let none = Window { page: 0, view: 0 };
        Self { windows: UnsafeCell::new([none; MOST]), count: AtomicUsize::new(0), bases: AtomicUsize::new(0) }
    }

    /// Before a fork.
    pub fn begin(&self) -> Result<(), i32> {
        self.bases.store(sys::anonymous(MOST * PAGE)?, Relaxed);
        self.count.store(0, Relaxed);
        Ok(())
    }

    /// After it, on either side.
    pub fn end(&self) {
        self.count.store(0, Relaxed);
        // SAFETY: made by `begin`, and used by the windows only, which are closed.
        unsafe { sys::munmap(self.bases.swap(0, Relaxed), MOST * PAGE) };
    }

    fn all(&self) -> &[Window] {
        // SAFETY: the first `count` are written; only the forking thread adds more.
        unsafe { &(&*self.windows.get())[..self.count.load(Relaxed)] }
    }

    pub fn contains(&self, page: usize) -> bool {
        self.all().iter().any(|window| window.page == page)
    }

    /// The first window at or after `page`.
    pub fn next(&self, page: usize) -> usize {
        self.all().iter().map(|window| window.page).filter(|&other| other >= page).min().unwrap_or(usize::MAX)
    }

    /// Replaces a page of `patch`, which is frozen, by private memory, and keeps what it had.
    pub fn open(&self, patch: &Patch, page: usize) -> Result<(), i32> {
        let count = self.count.load(Relaxed);
        if count == MOST {
            return Err(libc::ENOMEM);
        }
        let base = self.bases.load(Relaxed) + count * PAGE;
        let aside = sys::anonymous(PAGE)?;
        // SAFETY: `aside`, `base` and `view` are ours; the page is read-only for all others.
        unsafe {
            // In a child there is nothing to go back to.
            let view = sys::map_again(page, PAGE).unwrap_or(0);
            if view != 0 {
                let _ = sys::madvise(view, PAGE, libc::MADV_DONTFORK);
            }
            sys::copy(page, base, PAGE);
            sys::copy(base, aside, PAGE);
            let moved = sys::mprotect(aside, PAGE, patch.protection).and_then(|()| sys::move_pages(aside, PAGE, page));
            if moved.is_err() {
                sys::munmap(aside, PAGE);
                sys::munmap(view, PAGE);
                return moved;
            }
            (*self.windows.get())[count] = Window { page, view };
        }
        self.count.store(count + 1, Relaxed);
        Ok(())
    }

    /// They are closed.
    pub fn forget_all(&self) {
        self.count.store(0, Relaxed);
    }

    /// In the parent: brings what was written to the private pages into the file, byte by byte where it is new, because the
    /// device may have written to the same page; and the file back under their addresses. A page with which that fails stays
    /// private, and the next registration shares it anew.
    pub fn close_all(&self, patches: &[Patch]) {
        for (index, window) in self.all().iter().enumerate() {
            let Some(patch) = patches.iter().find(|patch| patch.contains(window.page)) else { continue };
            let Window { page, view } = *window;
            if view == 0 {
                continue;
            }
            let base = self.bases.load(Relaxed) + index * PAGE;
            // SAFETY: `view` is ours; nobody writes to the page until it is the file's.
            unsafe {
                let _ = sys::mprotect(page, PAGE, patch.frozen());
                if sys::mprotect(view, PAGE, libc::PROT_READ | libc::PROT_WRITE).is_ok() {
                    for at in 0..PAGE {
                        let byte = ((page + at) as *const u8).read_volatile();
                        if byte != ((base + at) as *const u8).read_volatile() {
                            ((view + at) as *mut u8).write_volatile(byte);
                        }
                    }
                    let _ = sys::mprotect(view, PAGE, patch.protection);
                    let _ = sys::move_pages(view, PAGE, page);
                }
            }
        }
    }
}
