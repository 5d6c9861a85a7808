//! Lists that live in memory of their own.
//!
//! Not the C library's: an allocator may call `madvise` with its own locks held, and that waits for this module's lock. And
//! what is registered may be heap, which nobody can use while its pages are replaced.

// UNSAFETY: hands out a mapping as a slice.
#![allow(unsafe_code)]

use super::{PAGE, sys};
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut, Range};

/// A list of plain values that grows by whole pages, and keeps them until it is dropped.
pub struct Array<T: Copy> {
    address: usize,
    bytes: usize,
    length: usize,
    of: PhantomData<T>,
}

impl<T: Copy> Array<T> {
    /// Empty; no memory until the first value.
    pub const fn new() -> Self {
        Self { address: 0, bytes: 0, length: 0, of: PhantomData }
    }

    /// Makes room, so that so many more values can be added without fail.
    pub fn reserve(&mut self, more: usize) -> Result<(), i32> {
        let wanted = self.length.checked_add(more).and_then(|length| length.checked_mul(size_of::<T>()));
        let wanted = wanted.ok_or(libc::ENOMEM)?;
        if wanted <= self.bytes {
            return Ok(());
        }
        let bytes = (wanted.max(2 * self.bytes)).next_multiple_of(PAGE);
        self.address = match self.bytes {
            0 => sys::anonymous(bytes)?,
            // SAFETY: the mapping is this list's own, and no reference into it remains while it is borrowed mutably.
            _ => unsafe { sys::grow(self.address, self.bytes, bytes)? },
        };
        self.bytes = bytes;
        Ok(())
    }

    /// Adds a value at the end. Without memory the process ends, as with any allocation that has no answer: see
    /// [`Self::reserve`].
    pub fn push(&mut self, value: T) {
        self.insert(self.length, value);
    }

    /// Adds a value before the one at `at`.
    pub fn insert(&mut self, at: usize, value: T) {
        assert!(at <= self.length && self.reserve(1).is_ok(), "no memory for a list of {}", self.length);
        // SAFETY: `reserve` made room for one more; `at` is no further than the end.
        unsafe {
            let place = (self.address as *mut T).add(at);
            core::ptr::copy(place, place.add(1), self.length - at);
            place.write(value);
        }
        self.length += 1;
    }

    /// Takes the values at these places out.
    pub fn remove(&mut self, range: Range<usize>) {
        let length = self.length;
        self.copy_within(range.end..length, range.start);
        self.length -= range.len();
    }

    /// Takes everything out, and keeps the memory.
    pub fn clear(&mut self) {
        self.length = 0;
    }
}

impl<T: Copy> Deref for Array<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        if self.length == 0 {
            return &[];
        }
        // SAFETY: so many values were written; a page is aligned for any of them.
        unsafe { core::slice::from_raw_parts(self.address as *const T, self.length) }
    }
}

impl<T: Copy> DerefMut for Array<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        if self.length == 0 {
            return &mut [];
        }
        // SAFETY: as above, and borrowed mutably.
        unsafe { core::slice::from_raw_parts_mut(self.address as *mut T, self.length) }
    }
}

impl<T: Copy> Drop for Array<T> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: this list's own mapping.
            unsafe { sys::munmap(self.address, self.bytes) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn behaves_like_a_vector(steps in proptest::collection::vec((0usize..3, any::<prop::sample::Index>()), 0..2000)) {
            let mut array = Array::<u64>::new();
            let mut model = Vec::new();
            for (number, (step, index)) in (0u64..).zip(steps) {
                match step {
                    0 => {
                        array.push(number);
                        model.push(number);
                    }
                    1 => {
                        let at = index.index(model.len() + 1);
                        array.insert(at, number);
                        model.insert(at, number);
                    }
                    _ => {
                        let at = index.index(model.len() + 1);
                        let end = (at + 3).min(model.len());
                        array.remove(at..end);
                        model.drain(at..end);
                    }
                }
            }
            prop_assert_eq!(&array[..], &model[..]);
            array.clear();
            prop_assert!(array.is_empty());
        }
    }
}
