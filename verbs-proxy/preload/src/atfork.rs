//! Having the C library call us when it forks.

// UNSAFETY: calls a function of the C library that may not be there.
#![allow(unsafe_code)]

use core::arch::asm;
use core::ptr;

/// What the C library calls.
pub type Step = extern "C" fn();

/// Has these called at every `fork(3)` from now on: before it, and after it in the parent and in the child, as by
/// `pthread_atfork(3)`. Other ways to fork do not call them.
pub fn register(prepare: Option<Step>, parent: Option<Step>, child: Step) {
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
    type Register = extern "C" fn(Option<Step>, Option<Step>, Option<Step>, *const u8) -> i32;
    if let Some(address) = [glibc, other].into_iter().find(|&address| address != 0) {
        // SAFETY: both are C functions; the one with three parameters ignores the fourth: the library that is never unloaded.
        let register = unsafe { core::mem::transmute::<usize, Register>(address) };
        register(prepare, parent, Some(child), ptr::null());
    }
}
