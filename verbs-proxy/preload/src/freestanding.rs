//! What the standard library would otherwise bring: memory, and the end of the process on a panic.

// UNSAFETY: a global allocator is an unsafe trait over the C library's functions.
#![allow(unsafe_code)]

use core::alloc::{GlobalAlloc, Layout};
use core::ptr;

/// Alignment that `malloc` gives by itself on 64-bit machines.
const MALLOC_ALIGN: usize = 16;

struct CLibrary;

// SAFETY: the C library's functions keep what `GlobalAlloc` demands; over-aligned layouts go through `posix_memalign`,
// whose memory `free` takes back like any other.
unsafe impl GlobalAlloc for CLibrary {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.align() <= MALLOC_ALIGN {
            // SAFETY: `malloc` takes any size.
            return unsafe { libc::malloc(layout.size()) }.cast();
        }
        let mut memory = ptr::null_mut();
        // SAFETY: `memory` is writable; the alignment is a power of two and a multiple of a pointer's size.
        let failed = unsafe { libc::posix_memalign(&raw mut memory, layout.align(), layout.size()) };
        if failed == 0 { memory.cast() } else { ptr::null_mut() }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.align() <= MALLOC_ALIGN {
            // SAFETY: `calloc` takes any size. Large fresh memory comes from the kernel and costs nothing until touched.
            return unsafe { libc::calloc(1, layout.size()) }.cast();
        }
        // SAFETY: the same contract as this function's.
        let memory = unsafe { self.alloc(layout) };
        if !memory.is_null() {
            // SAFETY: just allocated with this size.
            unsafe { ptr::write_bytes(memory, 0, layout.size()) };
        }
        memory
    }

    unsafe fn dealloc(&self, memory: *mut u8, _layout: Layout) {
        // SAFETY: the caller got `memory` from this allocator.
        unsafe { libc::free(memory.cast()) };
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if layout.align() <= MALLOC_ALIGN {
            // SAFETY: the caller got `memory` from this allocator.
            return unsafe { libc::realloc(memory.cast(), size) }.cast();
        }
        // SAFETY: the caller promises a size that makes a valid layout with this alignment.
        let new = unsafe { self.alloc(Layout::from_size_align_unchecked(size, layout.align())) };
        if !new.is_null() {
            // SAFETY: both allocations hold the smaller of the two sizes and are distinct.
            unsafe {
                ptr::copy_nonoverlapping(memory, new, layout.size().min(size));
                self.dealloc(memory, layout);
            }
        }
        new
    }
}

#[global_allocator]
static ALLOCATOR: CLibrary = CLibrary;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // SAFETY: `abort` takes nothing and does not return. A panic is a bug of ours: better no process than wrong data.
    unsafe { libc::abort() }
}

/// The precompiled `core` names it in unwind tables; nothing unwinds through this library.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
