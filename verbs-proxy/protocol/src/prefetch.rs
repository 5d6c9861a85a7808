//! Cache lines that are asked for before they are needed: what the other side of a ring has written is in its processor's cache, some
//! hundred nanoseconds away.

// UNSAFETY: a prefetch, which reads nothing.
#![allow(unsafe_code)]

/// This line is about to be read. On processors other than x86 nothing is asked for.
#[inline(always)]
pub(crate) fn to_read<T>(line: &T) {
    #[cfg(all(target_arch = "x86_64", not(loom)))]
    // SAFETY: every x86-64 has SSE, whose prefetch is a hint that cannot fault, and the memory is there.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(core::ptr::from_ref(line).cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(loom))))]
    let _ = line;
}
