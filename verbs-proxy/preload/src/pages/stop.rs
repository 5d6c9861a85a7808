//! Stops all other threads of the process for a moment.
//!
//! A process of our own that shares this one's memory (a thread could not do it) attaches to each thread as a debugger does,
//! works while none of them runs, and lets them go. Nothing is held for long, and whatever a thread was doing goes on.

// UNSAFETY: starts processes without the C library, and traces threads.
#![allow(unsafe_code)]

use super::{bystander, sys};
use core::arch::asm;
use core::ops::Range;
use core::sync::atomic::{AtomicU8, Ordering::*};

/// The helper's stack, in a mapping whose lower part lists the threads.
const STACK: usize = 96 << 10;
/// So long a thread may take to stop. One that sleeps in the kernel and cannot be woken would take longer, as one whose child
/// of `vfork` lives.
const PATIENCE: u64 = 1_000_000_000;

const PTRACE_GETREGS: usize = 12;
const PTRACE_DETACH: usize = 17;
const PTRACE_SYSCALL: usize = 24;
const PTRACE_SEIZE: usize = 0x4206;
const PTRACE_INTERRUPT: usize = 0x4207;
const PTRACE_GET_SYSCALL_INFO: usize = 0x420e;

const WNOHANG: usize = 1;
const WALL: usize = 0x4000_0000;

const UNKNOWN: u8 = 0;
const POSSIBLE: u8 = 1;
const NEEDS_LEAVE: u8 = 2;
const IMPOSSIBLE: u8 = 3;

/// What an attempt has shown.
static STATE: AtomicU8 = AtomicU8::new(UNKNOWN);

/// A thread, stopped.
#[derive(Clone, Copy)]
struct Thread {
    id: u32,
    /// The signal that it was about to get, or zero.
    signal: u32,
}

/// The threads that the helper has stopped: in its own mapping, as nothing of the process may be used meanwhile.
#[derive(Clone, Copy)]
pub struct Threads {
    address: usize,
    room: usize,
    count: usize,
}

impl Threads {
    pub fn new(address: usize, room: usize) -> Self {
        Self { address, room, count: 0 }
    }

    fn get(&self, at: usize) -> Thread {
        // SAFETY: the first `count` are written.
        unsafe { (self.address as *const Thread).add(at).read() }
    }

    fn set(&mut self, at: usize, thread: Thread) {
        // SAFETY: `at` is less than `room`.
        unsafe { (self.address as *mut Thread).add(at).write(thread) }
    }
}

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

/// Whether threads can be stopped, as far as is known: an attempt may show that they cannot.
pub fn is_possible() -> bool {
    STATE.load(Relaxed) != IMPOSSIBLE
}

/// Does `work` while all other threads are stopped, and this one waits. Nothing if they cannot be stopped.
pub fn run<R: Copy, F: Fn() -> Result<R, i32> + Copy>(work: F) -> Option<Result<R, i32>> {
    try_both(|leave| attempt(work, leave))
}

/// Has threads traced by `attempt`, which gives the kernel leave for it (see [`give_leave`]) if it says `EPERM` otherwise.
pub fn try_both<R>(attempt: impl Fn(bool) -> Result<R, i32>) -> Option<R> {
    let state = STATE.load(Relaxed);
    if state == IMPOSSIBLE {
        return None;
    }
    match attempt(state == NEEDS_LEAVE) {
        Ok(result) => {
            if state == UNKNOWN {
                STATE.store(POSSIBLE, Relaxed);
            }
            Some(result)
        }
        Err(libc::EPERM) if state == UNKNOWN => match attempt(true) {
            Ok(result) => {
                STATE.store(NEEDS_LEAVE, Relaxed);
                Some(result)
            }
            Err(error) => {
                if error == libc::EPERM {
                    STATE.store(IMPOSSIBLE, Relaxed);
                }
                None
            }
        },
        Err(_) => None,
    }
}

struct Order<R, F> {
    work: F,
    tasks: i32,
    caller: u32,
    threads: Threads,
    stopped: Result<(), i32>,
    result: Result<R, i32>,
}

/// An error if there is no room for a process, a thread does not stop, or (`EPERM`) the kernel does not allow it. `leave`: Yama
/// asks for the word of the process that is to be traced.
fn attempt<R: Copy, F: Fn() -> Result<R, i32> + Copy>(work: F, leave: bool) -> Result<Result<R, i32>, i32> {
    let room = room();
    let bytes = bytes(room);
    let memory = sys::anonymous(bytes)?;
    let result = tasks().and_then(|tasks| {
        let threads = Threads::new(memory, room);
        let (caller, again) = (sys::thread(), Err(libc::EAGAIN));
        let mut order = Order { work, tasks, caller, threads, stopped: again, result: Err(libc::EAGAIN) };
        let started = give_leave(leave, usize::MAX).and_then(|()| {
            // SAFETY: the order lives until the helper has ended, and nobody else uses its stack.
            unsafe { helper(memory + bytes, help::<R, F>, &raw mut order as usize, libc::CLONE_VFORK) }
        });
        if let Ok(process) = started {
            wait_for_end(process);
        }
        let _ = give_leave(leave, 0);
        sys::close(tasks);
        started.and(order.stopped).map(|()| order.result)
    });
    // SAFETY: the helper has ended.
    unsafe { sys::munmap(memory, bytes) };
    result
}

/// For how many threads there should be room.
pub fn room() -> usize {
    sys::threads().min(1 << 20) as usize * 2 + 64
}

/// What a helper needs that stops so many threads: their list and, above it, its stack.
pub fn bytes(room: usize) -> usize {
    (STACK + room * size_of::<Thread>()).next_multiple_of(super::PAGE)
}

/// Waits for the end of a helper, of which nobody else hears.
pub fn wait_for_end(process: u32) {
    while wait(process, 0) == Err(libc::EINTR) {}
}

/// This process's threads as the kernel lists them.
pub fn tasks() -> Result<i32, i32> {
    sys::open(c"/proc/self/task", libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC)
}

/// Who may trace this process: everybody who could without Yama, or, with zero, nobody.
pub fn give_leave(wanted: bool, who: usize) -> Result<(), i32> {
    const PR_SET_PTRACER: usize = 0x5961_6d61;
    if !wanted {
        return Ok(());
    }
    // SAFETY: says who may trace this process.
    let result = unsafe { sys::call(libc::SYS_prctl, [PR_SET_PTRACER, who, 0, 0, 0, 0]) };
    result.map(drop).map_err(|_| libc::EPERM)
}

extern "C" fn help<R: Copy, F: Fn() -> Result<R, i32> + Copy>(order: usize) {
    // SAFETY: `attempt` passed a pointer to an order, and waits. What is needed while its stack may be out of reach is
    // copied to this one first.
    unsafe {
        let order = order as *mut Order<R, F>;
        let (work, mut threads) = ((*order).work, (*order).threads);
        let stopped = stop_all((*order).tasks, (*order).caller, &mut threads);
        let result = if stopped.is_ok() { work() } else { Err(libc::EAGAIN) };
        (*order).stopped = stopped;
        (*order).result = result;
        resume(&threads);
    }
}

/// Lets stopped threads go.
pub fn resume(threads: &Threads) {
    for at in 0..threads.count {
        let thread = threads.get(at);
        // SAFETY: lets a thread go that this process has stopped.
        let _ = unsafe { ptrace(PTRACE_DETACH, thread.id, 0, thread.signal as usize) };
    }
}

/// Stops all threads but `caller`, also those that begin meanwhile. After an error some are stopped.
pub fn stop_all(tasks: i32, caller: u32, threads: &mut Threads) -> Result<(), i32> {
    loop {
        let first = threads.count;
        let mut result = Ok(());
        list(tasks, |id| {
            let known = (0..threads.count).any(|at| threads.get(at).id == id);
            if id == caller || known || result.is_err() {
                return;
            }
            if threads.count == threads.room {
                result = Err(libc::EAGAIN);
                return;
            }
            // SAFETY: a thread that is asked to stop notices nothing else.
            match unsafe { ptrace(PTRACE_SEIZE, id, 0, 0) } {
                Ok(_) => {
                    // SAFETY: as above.
                    let _ = unsafe { ptrace(PTRACE_INTERRUPT, id, 0, 0) };
                    threads.set(threads.count, Thread { id, signal: 0 });
                    threads.count += 1;
                }
                Err(libc::ESRCH) => {}
                Err(_) if has_ended(tasks, id) => {}
                Err(error) => result = Err(error),
            }
        })?;
        result?;
        if threads.count == first {
            return Ok(());
        }
        let mut at = first;
        while at < threads.count {
            let id = threads.get(at).id;
            match wait_for(id)? {
                Some(signal) => {
                    threads.set(at, Thread { id, signal });
                    at += 1;
                }
                // It has ended.
                None => {
                    threads.count -= 1;
                    let last = threads.get(threads.count);
                    threads.set(at, last);
                }
            }
        }
    }
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
            // SAFETY: lets the thread go.
            let _ = unsafe { ptrace(PTRACE_DETACH, id, 0, signal as usize) };
            Err(libc::EAGAIN)
        }
        None => Err(libc::ESRCH),
    }
}

/// Why a thread that is followed has stopped.
pub enum Stop {
    /// It is about to enter the kernel for this system call.
    Entry(i64),
    /// It is about to leave it with this result.
    Exit(i64),
    /// It is about to get this signal, or zero.
    Signal(u32),
    /// It has ended.
    Ended,
}

/// Lets a stopped thread go on, with the signal that it was about to get, until it stops again.
pub fn next_stop(id: u32, signal: u32) -> Stop {
    const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;
    // SAFETY: lets the thread go on.
    if unsafe { ptrace(PTRACE_SYSCALL, id, 0, signal as usize) }.is_err() {
        return Stop::Ended;
    }
    let status = loop {
        match wait(id, 0) {
            Ok((_, status)) => break status,
            Err(libc::EINTR) => {}
            Err(_) => return Stop::Ended,
        }
    };
    if !libc::WIFSTOPPED(status) {
        return Stop::Ended;
    }
    match libc::WSTOPSIG(status) {
        SYSCALL_STOP => {
            // struct ptrace_syscall_info: the kind in the first byte; number or result in the fourth word.
            let mut info = [0u64; 11];
            let size = size_of_val(&info);
            // SAFETY: writes no more than so much.
            let _ = unsafe { ptrace(PTRACE_GET_SYSCALL_INFO, id, size, info.as_mut_ptr() as usize) };
            if info[0] & 0xff == 1 { Stop::Entry(info[3] as i64) } else { Stop::Exit(info[3] as i64) }
        }
        _ if status >> 16 != 0 => Stop::Signal(0),
        signal => Stop::Signal(signal as u32),
    }
}

/// Lets a thread go.
pub fn detach(id: u32) {
    // SAFETY: as it says.
    let _ = unsafe { ptrace(PTRACE_DETACH, id, 0, 0) };
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
fn wait_for(id: u32) -> Result<Option<u32>, i32> {
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

/// Calls `each` with the number of each thread.
fn list(tasks: i32, mut each: impl FnMut(u32)) -> Result<(), i32> {
    #[repr(C, align(8))]
    struct Entries([u8; 4096]);
    let mut entries = Entries([0; 4096]);
    // SAFETY: moves the position of a descriptor of ours.
    unsafe { sys::call(libc::SYS_lseek, [tasks as usize, 0, 0, 0, 0, 0])? };
    loop {
        let arguments = [tasks as usize, entries.0.as_mut_ptr() as usize, entries.0.len(), 0, 0, 0];
        // SAFETY: writes into the buffer.
        let filled = unsafe { sys::call(libc::SYS_getdents64, arguments)? };
        if filled == 0 {
            return Ok(());
        }
        let mut at = 0;
        // struct linux_dirent64: inode and offset, 8 bytes each; length, 2; type, 1; the name.
        while at + 19 < filled {
            let length = usize::from(u16::from_le_bytes([entries.0[at + 16], entries.0[at + 17]]));
            let name = &entries.0[at + 19..filled.min(at + length)];
            let digits = name.iter().take_while(|byte| byte.is_ascii_digit());
            let id = digits.fold(0u32, |id, digit| id.wrapping_mul(10).wrapping_add(u32::from(digit - b'0')));
            if id != 0 {
                each(id);
            }
            at += length.max(19);
        }
    }
}

/// Reads a file of a thread's directory.
fn read_of<'a>(tasks: i32, id: u32, name: &[u8], buffer: &'a mut [u8]) -> &'a [u8] {
    let mut path = [0u8; 32];
    let mut digits = [0u8; 10];
    let mut at = digits.len();
    let mut rest = id;
    while rest > 0 || at == digits.len() {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    let length = digits.len() - at;
    path[..length].copy_from_slice(&digits[at..]);
    path[length..length + name.len()].copy_from_slice(name);
    let flags = libc::O_RDONLY | libc::O_CLOEXEC;
    // SAFETY: reads a path, which ends with a zero.
    let file =
        unsafe { sys::call(libc::SYS_openat, [tasks as usize, path.as_ptr() as usize, flags as usize, 0, 0, 0]) };
    let Ok(file) = file else { return &[] };
    let length = sys::read(file as i32, buffer).unwrap_or(0);
    sys::close(file as i32);
    &buffer[..length]
}

/// Whether a thread that cannot be traced has ended: the first one stays on the list until the last has.
fn has_ended(tasks: i32, id: u32) -> bool {
    let mut buffer = [0; 512];
    let status = read_of(tasks, id, b"/stat", &mut buffer);
    // pid (name) state; the name may contain anything.
    let after = status.iter().rposition(|&byte| byte == b')').map_or(&[][..], |at| &status[at..]);
    matches!(after, [b')', b' ', b'Z' | b'X', ..] | [])
}

/// Whether no thread of this process blocks the signal.
pub fn nobody_blocks(signal: i32) -> bool {
    let Ok(tasks) = tasks() else { return false };
    let mut blocked = false;
    let listed = list(tasks, |id| {
        let mut buffer = [0; 4096];
        let status = read_of(tasks, id, b"/status", &mut buffer);
        let line = b"\nSigBlk:\t";
        let Some(at) = status.windows(line.len()).position(|part| part == line) else { return };
        let digits = status[at + line.len()..].iter().map_while(|&byte| (byte as char).to_digit(16));
        let mask = digits.fold(0u64, |mask, digit| mask << 4 | u64::from(digit));
        blocked |= mask & 1 << (signal - 1) != 0;
    });
    sys::close(tasks);
    listed.is_ok() && !blocked
}

/// Starts a process that shares this one's memory and descriptors, and nobody hears of its end.
///
/// # Safety
/// `entry` may be called with `argument` in a process of its own, with thread-local memory that is not its own, on the stack
/// that ends at `stack`.
pub unsafe fn helper(stack: usize, entry: extern "C" fn(usize), argument: usize, flags: i32) -> Result<u32, i32> {
    let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS | flags;
    let mut result = libc::SYS_clone as isize;
    // SAFETY: as in `bystander`, where the same is done for a thread.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "xor edi, edi",
            "mov eax, {exit}",
            "syscall",
            "ud2",
            "2:",
            exit = const libc::SYS_exit,
            inlateout("rax") result,
            in("rdi") flags, in("rsi") stack, in("rdx") 0, in("r10") 0, in("r8") 0,
            in("r12") argument, in("r13") entry,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    if result < 0 { Err(-result as i32) } else { Ok(result as u32) }
}
