//! Replaces memory that the calling thread itself stands on.

// UNSAFETY: starts a thread without the C library.
#![allow(unsafe_code)]

use super::sys;
use core::arch::asm;
use core::ops::Range;

/// A few frames, and what a debug build makes of them.
const STACK: usize = 64 << 10;
/// How far below the stack pointer calls may reach, and above it what they still write.
const BELOW: usize = 64 << 10;
const ABOVE: usize = 16 << 10;

/// Runs `work`, which changes the pages in `range`, where it does not stand on them.
///
/// The thread's stack or thread-local memory may be in the range, and the kernel writes there too (`rseq`) whenever it
/// resumes the thread. So then a second thread does the work on a stack of its own while the kernel holds the first. What
/// the work needs it must own: the first thread's stack may be out of reach before it ends.
pub fn run<R: Copy, F: Fn() -> Result<R, i32> + Copy>(range: &Range<usize>, work: F) -> Result<R, i32> {
    run_for([range.clone()].into_iter(), work)
}

/// The same for several ranges.
pub fn run_for<R: Copy, F: Fn() -> Result<R, i32> + Copy>(
    mut ranges: impl Iterator<Item = Range<usize>>,
    work: F,
) -> Result<R, i32> {
    let own = own();
    if !ranges.any(|range| own.iter().any(|own| overlap(own, &range))) {
        return work();
    }
    // valgrind ends with a program that makes such a thread.
    if sys::is_emulated() {
        return Err(libc::EOPNOTSUPP);
    }
    let stack = sys::anonymous(STACK)?;
    let mut order = Order { work, result: Err(libc::EAGAIN) };
    // SAFETY: the order lives until the clone has ended, and nobody else uses the stack.
    let result = unsafe { clone_and_wait(stack + STACK, call::<R, F>, &raw mut order as usize) };
    // SAFETY: the clone has ended.
    unsafe { sys::munmap(stack, STACK) };
    result.and(order.result)
}

struct Order<R, F> {
    work: F,
    result: Result<R, i32>,
}

/// Memory that this thread writes to as it runs: around its stack pointer, and around its thread pointer.
pub fn own() -> [Range<usize>; 2] {
    let (stack, thread): (usize, usize);
    // SAFETY: reads two registers; the thread control block starts with its own address in every ABI for x86-64.
    unsafe { asm!("mov {}, rsp", "mov {}, fs:[0]", out(reg) stack, out(reg) thread, options(nostack, readonly)) };
    around(stack, thread)
}

/// The same of a thread with these stack and thread pointers.
pub fn around(stack: usize, thread: usize) -> [Range<usize>; 2] {
    [stack, thread].map(|pointer| pointer.saturating_sub(BELOW)..pointer.saturating_add(ABOVE))
}

/// Whether this thread's stack is in the range.
pub fn is_own_stack(range: &Range<usize>) -> bool {
    overlap(&own()[0], range)
}

fn overlap(one: &Range<usize>, other: &Range<usize>) -> bool {
    one.start < other.end && other.start < one.end
}

extern "C" fn call<R: Copy, F: Fn() -> Result<R, i32> + Copy>(order: usize) {
    // SAFETY: `run` passed a pointer to an order, and waits. The work is copied to this stack first, and its result to the
    // other one when that can be reached again.
    unsafe {
        let order = order as *mut Order<R, F>;
        let work = (*order).work;
        let result = work();
        (*order).result = result;
    }
}

/// # Safety
/// `entry` may be called with `argument` on another thread, with thread-local memory that is not its own.
unsafe fn clone_and_wait(stack: usize, entry: extern "C" fn(usize), argument: usize) -> Result<(), i32> {
    let flags = libc::CLONE_VM
        | libc::CLONE_VFORK
        | libc::CLONE_THREAD
        | libc::CLONE_SIGHAND
        | libc::CLONE_FILES
        | libc::CLONE_FS
        | libc::CLONE_SYSVSEM;
    // SAFETY: promised by the caller; CLONE_VFORK keeps this thread in the kernel until the clone has ended.
    unsafe { sys::clone(stack, entry, argument, flags) }.map(drop)
}
