//! Keeps signal handlers from running in the middle of a swap.

// UNSAFETY: changes the thread's signal mask.
#![allow(unsafe_code)]

use super::sys;

/// Signals that instructions raise stay deliverable: a thread that waits for the lock may itself write to what another
/// one replaces.
const RAISED: u64 = bit(libc::SIGSEGV) | bit(libc::SIGBUS) | bit(libc::SIGILL) | bit(libc::SIGFPE) | bit(libc::SIGTRAP);

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// No other signal is delivered to this thread until this is dropped.
pub struct Blocked(u64);

impl Blocked {
    pub fn new() -> Self {
        let (mask, mut before) = (!RAISED, 0u64);
        let arguments = [libc::SIG_BLOCK as usize, &raw const mask as usize, &raw mut before as usize, 8, 0, 0];
        // SAFETY: reads and writes two masks of the kernel's size. It cannot fail.
        let _ = unsafe { sys::call(libc::SYS_rt_sigprocmask, arguments) };
        Self(before)
    }

    /// Has those signals delivered after all for which no handler runs: they end or stop the program, if its user wants that.
    pub fn let_defaults_through(&self) {
        let mut through = 0;
        for signal in 1..=64 {
            let mut action = [0usize; 4];
            let arguments = [signal as usize, 0, action.as_mut_ptr() as usize, 8, 0, 0];
            // SAFETY: writes the present action: the handler, flags, the restorer and a mask, a word each.
            if unsafe { sys::call(libc::SYS_rt_sigaction, arguments) }.is_ok() && action[0] == libc::SIG_DFL {
                through |= bit(signal);
            }
        }
        let mask = through & !self.0;
        let arguments = [libc::SIG_UNBLOCK as usize, &raw const mask as usize, 0, 8, 0, 0];
        // SAFETY: reads a mask of the kernel's size.
        let _ = unsafe { sys::call(libc::SYS_rt_sigprocmask, arguments) };
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        let arguments = [libc::SIG_SETMASK as usize, &raw const self.0 as usize, 0, 8, 0, 0];
        // SAFETY: reads a mask of the kernel's size.
        let _ = unsafe { sys::call(libc::SYS_rt_sigprocmask, arguments) };
    }
}

/// Lets the thread take one signal, whatever it blocks, until a [`Blocked`] from before is dropped.
pub fn unblock(signal: i32) {
    let mask = bit(signal);
    let arguments = [libc::SIG_UNBLOCK as usize, &raw const mask as usize, 0, 8, 0, 0];
    // SAFETY: reads a mask of the kernel's size.
    let _ = unsafe { sys::call(libc::SYS_rt_sigprocmask, arguments) };
}
