//! Stops threads, and follows their system calls, as a debugger does.

// UNSAFETY: traces threads.
#![allow(unsafe_code)]

use super::{bystander, sys};
use core::ops::Range;

/// So long a thread may take to stop. One that sleeps in the kernel and cannot be woken would take longer, as one whose child
/// of `vfork` lives.
pub const PATIENCE: u64 = 1_000_000_000;

const PTRACE_GETREGS: usize = 12;
const PTRACE_DETACH: usize = 17;
const PTRACE_SYSCALL: usize = 24;
const PTRACE_SEIZE: usize = 0x4206;
const PTRACE_INTERRUPT: usize = 0x4207;
const PTRACE_GET_SYSCALL_INFO: usize = 0x420e;

const WNOHANG: usize = 1;
const WALL: usize = 0x4000_0000;

/// # Safety
/// As for `ptrace(2)`.
unsafe fn ptrace(request: usize, thread: u32, address: usize, data: usize) -> Result<usize, i32> {
    // SAFETY: promised by the caller.
    unsafe { sys::call(libc::SYS_ptrace, [request, thread as usize, address, data, 0, 0]) }
}

fn wait(thread: u32, options: usize) -> Result<(u32, i32), i32> {
    let mut status = 0i32;
    // SAFETY: writes a status.
    let result =
        unsafe { sys::call(libc::SYS_wait4, [thread as usize, &raw mut status as usize, options | WALL, 0, 0, 0]) };
    result.map(|id| (id as u32, status))
}

/// Asks a thread to stop. It notices nothing else.
pub fn interrupt(id: u32) -> Result<(), i32> {
    // SAFETY: as it says.
    unsafe {
        ptrace(PTRACE_SEIZE, id, 0, 0)?;
        let _ = ptrace(PTRACE_INTERRUPT, id, 0, 0);
    }
    Ok(())
}

/// Stops a thread whose system calls are to be followed.
pub fn seize(id: u32) -> Result<(), i32> {
    const PTRACE_O_TRACESYSGOOD: usize = 1;
    // SAFETY: a thread that is asked to stop notices nothing else.
    unsafe {
        ptrace(PTRACE_SEIZE, id, 0, PTRACE_O_TRACESYSGOOD)?;
        ptrace(PTRACE_INTERRUPT, id, 0, 0)?;
    }
    match wait_for(id)? {
        Some(0) => Ok(()),
        // It would get a signal first, which is not ours to hold back.
        Some(signal) => {
            detach(id, signal);
            Err(libc::EAGAIN)
        }
        None => Err(libc::ESRCH),
    }
}

/// Why a thread that is followed has stopped.
pub enum Stop {
    /// It is about to enter the kernel for this system call, with this first argument.
    Entry(i64, u64),
    /// It is about to leave it with this result.
    Exit(i64),
    /// It is about to get this signal, or zero.
    Signal(u32),
    /// It has ended.
    Ended,
}

static SIGCHLD_MASK: u64 = 1 << (libc::SIGCHLD - 1);

/// Has a process of one thread, which blocks all signals, hear of what it traces, and of others, by [`libc::SIGCHLD`].
pub fn listen() {
    // The default action, and no flags, a word each with the restorer and a mask.
    let action = [0usize; 4];
    let arguments = [libc::SIGCHLD as usize, action.as_ptr() as usize, 0, 8, 0, 0];
    // SAFETY: changes what this process does with a signal; none other has its list.
    let _ = unsafe { sys::call(libc::SYS_rt_sigaction, arguments) };
}

/// Wakes a process that listens.
pub fn wake(process: u32) {
    // SAFETY: sends a signal that is blocked there.
    let _ = unsafe { sys::call(libc::SYS_kill, [process as usize, libc::SIGCHLD as usize, 0, 0, 0, 0]) };
}

/// Waits until there is something to hear; not long, whatever becomes of the signal.
fn hear() {
    let time = libc::timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    let (mask, time) = (&raw const SIGCHLD_MASK as usize, &raw const time as usize);
    // SAFETY: reads a mask of the kernel's size and a time.
    let _ = unsafe { sys::call(libc::SYS_rt_sigtimedwait, [mask, 0, time, 8, 0, 0]) };
}

/// Lets a stopped thread go on, with the signal that it was about to get, until it stops again; stops it when `is_wanted`. For a
/// process that listens.
pub fn next_stop(id: u32, signal: u32, is_wanted: impl Fn() -> bool) -> Stop {
    const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;
    // SAFETY: lets the thread go on.
    if unsafe { ptrace(PTRACE_SYSCALL, id, 0, signal as usize) }.is_err() {
        return Stop::Ended;
    }
    let mut interrupted = false;
    let status = loop {
        match wait(id, WNOHANG) {
            Ok((0, _)) | Err(libc::EINTR) => {}
            Ok((_, status)) => break status,
            Err(_) => return Stop::Ended,
        }
        if !interrupted && is_wanted() {
            interrupted = true;
            // SAFETY: a thread that is asked to stop notices nothing else.
            let _ = unsafe { ptrace(PTRACE_INTERRUPT, id, 0, 0) };
        }
        hear();
    };
    if !libc::WIFSTOPPED(status) {
        return Stop::Ended;
    }
    match libc::WSTOPSIG(status) {
        SYSCALL_STOP => {
            // struct ptrace_syscall_info: the kind in the first byte; number or result in the fourth word, then arguments.
            let mut info = [0u64; 11];
            let size = size_of_val(&info);
            // SAFETY: writes no more than so much.
            let _ = unsafe { ptrace(PTRACE_GET_SYSCALL_INFO, id, size, info.as_mut_ptr() as usize) };
            if info[0] & 0xff == 1 { Stop::Entry(info[3] as i64, info[4]) } else { Stop::Exit(info[3] as i64) }
        }
        _ if status >> 16 != 0 => Stop::Signal(0),
        signal => Stop::Signal(signal as u32),
    }
}

/// A word of a stopped thread's memory.
pub fn word_of(id: u32, address: u64) -> Option<u64> {
    const PTRACE_PEEKDATA: usize = 2;
    let mut word = 0u64;
    // SAFETY: the kernel's own call, unlike the C library's, writes the word where it is told.
    let result = unsafe { ptrace(PTRACE_PEEKDATA, id, address as usize, &raw mut word as usize) };
    result.is_ok().then_some(word)
}

/// Lets a stopped thread go, with the signal that it was about to get, or zero.
pub fn detach(id: u32, signal: u32) {
    // SAFETY: as it says.
    let _ = unsafe { ptrace(PTRACE_DETACH, id, 0, signal as usize) };
}

/// Memory that a stopped thread writes to as it runs, as [`bystander::own`] says of the calling one.
pub fn own_of(id: u32) -> [Range<usize>; 2] {
    // struct user_regs_struct
    const RSP: usize = 19;
    const FS_BASE: usize = 21;
    let mut registers = [0u64; 27];
    // SAFETY: writes one structure.
    match unsafe { ptrace(PTRACE_GETREGS, id, 0, registers.as_mut_ptr() as usize) } {
        Ok(_) => bystander::around(registers[RSP] as usize, registers[FS_BASE] as usize),
        Err(_) => [0..0, 0..0],
    }
}

/// Waits until a thread has stopped: the signal that it was about to get, or zero; or nothing if it has ended.
pub fn wait_for(id: u32) -> Result<Option<u32>, i32> {
    let begun = sys::now();
    let mut turns = 0;
    loop {
        match wait(id, WNOHANG) {
            Ok((0, _)) => {}
            Ok((_, status)) if libc::WIFSTOPPED(status) => {
                let is_event = status >> 16 != 0;
                return Ok(Some(if is_event { 0 } else { libc::WSTOPSIG(status) as u32 }));
            }
            Ok(_) | Err(libc::ECHILD) => return Ok(None),
            Err(error) => return Err(error),
        }
        if sys::now() - begun > PATIENCE {
            return Err(libc::EAGAIN);
        }
        turns += 1;
        if turns < 100 { sys::give_way() } else { sys::sleep(100_000) }
    }
}

/// Waits for the end of a helper, of which nobody else hears.
pub fn wait_for_end(process: u32) {
    while wait(process, 0) == Err(libc::EINTR) {}
}
