//! The lock around this module's state.

// UNSAFETY: hands out the locked value from behind a shared reference.
#![allow(unsafe_code)]

use super::sys;
use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicU32, Ordering::*};

const FREE: u32 = 0;
const HELD: u32 = 1;
const CONTENDED: u32 = 2;

/// Spins shortly, then sleeps. Not a mutex of the C library, whose calls write to thread-local memory: that
/// may be among the pages that are being replaced.
pub struct Lock<T> {
    word: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached through `Locked` only, of which the word allows one.
unsafe impl<T: Send> Sync for Lock<T> {}

/// The right to use the value.
pub struct Locked<'a, T>(&'a Lock<T>);

impl<T> Lock<T> {
    pub const fn new(value: T) -> Self {
        Self { word: AtomicU32::new(FREE), value: UnsafeCell::new(value) }
    }

    pub fn lock(&self) -> Locked<'_, T> {
        for _ in 0..100 {
            if self.word.compare_exchange_weak(FREE, HELD, Acquire, Relaxed).is_ok() {
                return Locked(self);
            }
            core::hint::spin_loop();
        }
        while self.word.swap(CONTENDED, Acquire) != FREE {
            sys::futex_wait(&self.word, CONTENDED);
        }
        Locked(self)
    }

    /// The lock, if nobody has it.
    pub fn try_lock(&self) -> Option<Locked<'_, T>> {
        self.word.compare_exchange(FREE, HELD, Acquire, Relaxed).ok().map(|_| Locked(self))
    }

    /// Gives back a lock that was held, if at all, by a thread that this process does not have: in a forked child.
    ///
    /// # Safety
    /// This is the only thread, and what the lock guards is whole.
    pub unsafe fn reset(&self) {
        self.word.store(FREE, Release);
    }

    /// Gives back a lock whose guard was forgotten.
    ///
    /// # Safety
    /// The lock is held, its guard was forgotten, and no reference to the value remains.
    pub unsafe fn unlock(&self) {
        if self.word.swap(FREE, Release) == CONTENDED {
            sys::futex_wake(&self.word, 1);
        }
    }
}

impl<T> Deref for Locked<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the lock is held until `self` is dropped.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for Locked<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the lock is held until `self` is dropped.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for Locked<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this guard held it, and its borrows have ended.
        unsafe { self.0.unlock() }
    }
}
