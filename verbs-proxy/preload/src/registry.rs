//! Numbers for objects, which the proxy gives back with completions and events.
//!
//! A number is a place and a generation, so that what an object left behind in a ring or socket is recognised after its
//! end, even when its place has been taken again.

// UNSAFETY: entries are reached through raw pointers.
#![allow(unsafe_code)]

use crate::lock::Spin;
use crate::sys::Errno;
use alloc::alloc::{Layout, alloc_zeroed};
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

const PLACE_BITS: u32 = 14;
const PLACES: usize = 1 << PLACE_BITS;
const GENERATION_MASK: u32 = u32::MAX >> PLACE_BITS;

#[derive(Debug)]
struct Entry<T> {
    object: AtomicPtr<T>,
    generation: AtomicU32,
}

/// Objects by number.
#[derive(Debug)]
pub struct Registry<T> {
    entries: AtomicPtr<Entry<T>>,
    /// Where to look for a free place first.
    hint: Spin<usize>,
}

impl<T> Registry<T> {
    /// Empty; no memory until the first object.
    pub const fn new() -> Self {
        Self { entries: AtomicPtr::new(ptr::null_mut()), hint: Spin::new(0) }
    }

    fn entries(&self) -> Option<&[Entry<T>]> {
        let entries = self.entries.load(Ordering::Acquire);
        // SAFETY: allocated by `insert` with this many, and never freed.
        (!entries.is_null()).then(|| unsafe { core::slice::from_raw_parts(entries, PLACES) })
    }

    /// Reserves a number; nothing is found under it until [`Self::set`]. `ENOMEM` when all are taken.
    pub fn reserve(&self) -> Result<u32, Errno> {
        let mut hint = self.hint.lock();
        if self.entries().is_none() {
            let layout = Layout::array::<Entry<T>>(PLACES).map_err(|_| libc::ENOMEM)?;
            // SAFETY: not of size zero; zeros are null pointers and generation zero.
            let fresh = unsafe { alloc_zeroed(layout) }.cast::<Entry<T>>();
            if fresh.is_null() {
                return Err(libc::ENOMEM);
            }
            self.entries.store(fresh, Ordering::Release);
        }
        let entries = self.entries().ok_or(libc::ENOMEM)?;
        for offset in 0..PLACES {
            let place = (*hint + offset) % PLACES;
            if entries[place].object.load(Ordering::Relaxed).is_null() {
                // Not null and never followed: the place is taken.
                entries[place].object.store(ptr::dangling_mut(), Ordering::Relaxed);
                let generation = entries[place].generation.load(Ordering::Relaxed);
                *hint = place + 1;
                return Ok(place as u32 | generation << PLACE_BITS);
            }
        }
        Err(libc::ENOMEM)
    }

    /// Puts the object in its reserved place.
    pub fn set(&self, number: u32, object: *mut T) {
        if let Some(entry) = self.entry(number) {
            entry.object.store(object, Ordering::Release);
        }
    }

    #[inline(always)]
    fn entry(&self, number: u32) -> Option<&Entry<T>> {
        let entry = &self.entries()?[number as usize % PLACES];
        (entry.generation.load(Ordering::Relaxed) & GENERATION_MASK == number >> PLACE_BITS).then_some(entry)
    }

    /// The object of that number, null or dangling if it is not there any more (or not yet).
    ///
    /// The caller excludes removal by a lock of its own, or compares only.
    #[inline(always)]
    pub fn find(&self, number: u32) -> Option<*mut T> {
        let object = self.entry(number)?.object.load(Ordering::Acquire);
        (!object.is_null() && object != ptr::dangling_mut()).then_some(object)
    }

    /// Finds an object and does something with it while it cannot be removed.
    pub fn with<R>(&self, number: u32, what: impl FnOnce(*mut T) -> R) -> Option<R> {
        let _held = self.hint.lock();
        self.find(number).map(what)
    }

    /// The number means nothing from now on.
    pub fn remove(&self, number: u32) {
        let mut hint = self.hint.lock();
        if let Some(entry) = self.entry(number) {
            entry.generation.fetch_add(1, Ordering::Relaxed);
            entry.object.store(ptr::null_mut(), Ordering::Release);
            // A place that was just given back comes last, so that its generation lasts longer.
            *hint = (number as usize + 1) % PLACES;
        }
    }

    /// In a new connection: all numbers of the old one mean nothing.
    fn forget(&self) {
        // SAFETY: called with the control lock held and only after a fork, when no other thread can be inside, or after
        // the proxy's end, when `unlock` of an open lock changes nothing.
        unsafe { self.hint.unlock() };
        for entry in self.entries().unwrap_or_default() {
            if !entry.object.swap(ptr::null_mut(), Ordering::AcqRel).is_null() {
                entry.generation.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Queue pairs, by completion cookie.
pub static QUEUE_PAIRS: Registry<crate::qp::Qp> = Registry::new();
/// Completion queues, by event cookie.
pub static COMPLETION_QUEUES: Registry<crate::cq::Cq> = Registry::new();

/// A new connection begins: whatever was registered belongs to an old one.
pub fn forget() {
    QUEUE_PAIRS.forget();
    COMPLETION_QUEUES.forget();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_numbers_find_nothing_even_when_the_place_is_taken_again() {
        let registry = Registry::<u64>::new();
        let (mut one, mut two) = (1, 2);
        let first = registry.reserve().unwrap();
        assert_eq!(registry.find(first), None, "reserved, not set");
        registry.set(first, &raw mut one);
        assert_eq!(registry.find(first), Some(&raw mut one));
        registry.remove(first);
        assert_eq!(registry.find(first), None);
        // Come round to the same place.
        let again = loop {
            let number = registry.reserve().unwrap();
            if number as usize % PLACES == first as usize % PLACES {
                break number;
            }
        };
        registry.set(again, &raw mut two);
        assert_ne!(again, first);
        assert_eq!(registry.find(first), None);
        assert_eq!(registry.find(again), Some(&raw mut two));
    }

    #[test]
    fn a_full_registry_refuses() {
        let registry = Registry::<u64>::new();
        for _ in 0..PLACES {
            registry.reserve().unwrap();
        }
        assert_eq!(registry.reserve(), Err(libc::ENOMEM));
    }
}
