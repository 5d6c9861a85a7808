//! libibverbs.so.1 as the container sees it.
#![cfg_attr(not(test), no_std)]
extern crate alloc;
mod pages;

#[cfg(not(test))]
mod freestanding {
    // UNSAFETY: memory comes from the C library's allocator.
    #![allow(unsafe_code)]
    use core::alloc::{GlobalAlloc, Layout};
    struct Libc;
    // SAFETY: `memalign` and `free` are the C library's allocator.
    unsafe impl GlobalAlloc for Libc {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            // SAFETY: a power of two and a size.
            unsafe { libc::memalign(layout.align().max(16), layout.size()).cast() }
        }
        unsafe fn dealloc(&self, pointer: *mut u8, _: Layout) {
            // SAFETY: from `alloc`.
            unsafe { libc::free(pointer.cast()) }
        }
    }
    #[global_allocator]
    static ALLOCATOR: Libc = Libc;
    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        // SAFETY: ends the process.
        unsafe { libc::abort() }
    }
}
