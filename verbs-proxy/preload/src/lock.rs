//! Locks that need no C library: a spinlock for the data path, a sleeping one for control.

// UNSAFETY: the spinlock hands out exclusive references to what it guards.
#![allow(unsafe_code)]

use crate::sys;
use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicU32, Ordering};

/// Turns before a spinner suspects that the holder does not run.
const SPINS_BEFORE_YIELD: u32 = 100;

/// A value that one thread at a time may touch, for a very short while.
#[derive(Debug, Default)]
pub struct Spin<T> {
    held: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the lock lets one thread at a time at the value, so it only needs to be sendable.
unsafe impl<T: Send> Sync for Spin<T> {}

impl<T> Spin<T> {
    /// An open lock.
    pub const fn new(value: T) -> Self {
        Self { held: AtomicU32::new(0), value: UnsafeCell::new(value) }
    }

    /// Waits for the value.
    #[inline(always)]
    pub fn lock(&self) -> SpinGuard<'_, T> {
        if self.held.swap(1, Ordering::Acquire) != 0 {
            self.wait();
        }
        SpinGuard { lock: self }
    }

    /// The value, if nobody has it.
    pub fn try_lock(&self) -> Option<SpinGuard<'_, T>> {
        (self.held.swap(1, Ordering::Acquire) == 0).then(|| SpinGuard { lock: self })
    }

    #[cold]
    fn wait(&self) {
        let mut spins = 0;
        loop {
            while self.held.load(Ordering::Relaxed) != 0 {
                spins += 1;
                if spins < SPINS_BEFORE_YIELD {
                    core::hint::spin_loop();
                } else {
                    sys::sched_yield();
                }
            }
            if self.held.swap(1, Ordering::Acquire) == 0 {
                return;
            }
        }
    }

    /// The value, for a caller that holds the lock by other means.
    pub fn as_ptr(&self) -> *mut T {
        self.value.get()
    }

    /// Opens the lock again after its guard was forgotten.
    ///
    /// # Safety
    /// The caller holds the lock.
    pub unsafe fn unlock(&self) {
        self.held.store(0, Ordering::Release);
    }
}

/// Access to the value of a [`Spin`].
#[derive(Debug)]
pub struct SpinGuard<'a, T> {
    lock: &'a Spin<T>,
}

impl<T> Deref for SpinGuard<'_, T> {
    type Target = T;
    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the lock.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this guard holds the lock, and is borrowed exclusively.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for SpinGuard<'_, T> {
    #[inline(always)]
    fn drop(&mut self) {
        self.lock.held.store(0, Ordering::Release);
    }
}

/// A lock that sleeps. It guards nothing by itself, because it lies in memory that a fork wipes.
///
/// Zero is open, one held, two held with sleepers; zeroed memory is an open lock.
#[derive(Debug, Default)]
pub struct Sleeping(AtomicU32);

impl Sleeping {
    /// Waits for the lock.
    pub fn lock(&self) -> SleepingGuard<'_> {
        if self.0.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            while self.0.swap(2, Ordering::Acquire) != 0 {
                sys::futex_wait(&self.0, 2);
            }
        }
        SleepingGuard(self)
    }
}

/// Holds a [`Sleeping`].
#[derive(Debug)]
pub struct SleepingGuard<'a>(&'a Sleeping);

impl Drop for SleepingGuard<'_> {
    fn drop(&mut self) {
        if self.0.0.swap(0, Ordering::Release) == 2 {
            sys::futex_wake(&self.0.0, 1);
        }
    }
}

/// Counts acknowledgements; who destroys an object waits until every event that was handed out came back.
#[derive(Debug, Default)]
pub struct Acknowledged(AtomicU32);

impl Acknowledged {
    /// `count` events came back.
    pub fn add(&self, count: u32) {
        self.0.fetch_add(count, Ordering::AcqRel);
        sys::futex_wake(&self.0, i32::MAX);
    }

    /// Waits until `reported` events came back.
    pub fn wait_for(&self, reported: u32) {
        loop {
            let acknowledged = self.0.load(Ordering::Acquire);
            if acknowledged.wrapping_sub(reported) as i32 >= 0 {
                return;
            }
            sys::futex_wait(&self.0, acknowledged);
        }
    }
}
