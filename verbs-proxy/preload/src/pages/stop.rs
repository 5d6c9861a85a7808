//! Stops all other threads of the process for a moment.
//!
//! A process of our own that shares this one's memory (a thread could not do it) attaches to each thread as a debugger does,
//! works while none of them runs, and lets them go. Nothing is held for long, and whatever a thread was doing goes on.

// UNSAFETY: starts processes without the C library, and traces threads.
#![allow(unsafe_code)]

use super::{escort, sys, threads, trace};
use core::sync::atomic::{AtomicU8, Ordering::*};

/// The helper's stack, in a mapping whose lower part lists the threads.
const STACK: usize = 96 << 10;
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
    /// The signal that it was about to get, or zero; [`ESCORTED`] if others trace it.
    signal: u32,
}

/// Of a thread that is kept by its escort. No signal has this number.
const ESCORTED: u32 = u32::MAX;

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
    let result = threads::tasks().and_then(|tasks| {
        let threads = Threads::new(memory, room);
        let (caller, again) = (sys::thread(), Err(libc::EAGAIN));
        let mut order = Order { work, tasks, caller, threads, stopped: again, result: Err(libc::EAGAIN) };
        let started = give_leave(leave, usize::MAX).and_then(|()| {
            // SAFETY: the order lives until the helper has ended, and nobody else uses its stack.
            unsafe { helper(memory + bytes, help::<R, F>, &raw mut order as usize, libc::CLONE_VFORK) }
        });
        if let Ok(process) = started {
            trace::wait_for_end(process);
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
    threads::count().min(1 << 20) as usize * 2 + 64
}

/// What a helper needs that stops so many threads: their list and, above it, its stack.
pub fn bytes(room: usize) -> usize {
    (STACK + room * size_of::<Thread>()).next_multiple_of(super::PAGE)
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
        match threads.get(at) {
            Thread { signal: ESCORTED, .. } => escort::let_go(),
            Thread { id, signal } => trace::detach(id, signal),
        }
    }
}

/// Stops all threads but `caller`, also those that begin meanwhile. After an error some are stopped.
pub fn stop_all(tasks: i32, caller: u32, stopped: &mut Threads) -> Result<(), i32> {
    loop {
        let first = stopped.count;
        let mut result = Ok(());
        threads::list(tasks, |id| {
            let known = (0..stopped.count).any(|at| stopped.get(at).id == id);
            if id == caller || known || result.is_err() {
                return;
            }
            if stopped.count == stopped.room {
                result = Err(libc::EAGAIN);
                return;
            }
            match escort::hold(id) {
                Ok(false) => {}
                Ok(true) => {
                    stopped.set(stopped.count, Thread { id, signal: ESCORTED });
                    stopped.count += 1;
                    return;
                }
                Err(error) => {
                    result = Err(error);
                    return;
                }
            }
            match trace::interrupt(id) {
                Ok(()) => {
                    stopped.set(stopped.count, Thread { id, signal: 0 });
                    stopped.count += 1;
                }
                Err(libc::ESRCH) => {}
                Err(_) if threads::has_ended(tasks, id) => {}
                Err(error) => result = Err(error),
            }
        })?;
        result?;
        if stopped.count == first {
            return Ok(());
        }
        let mut at = first;
        while at < stopped.count {
            let Thread { id, signal } = stopped.get(at);
            if signal == ESCORTED {
                at += 1;
                continue;
            }
            match trace::wait_for(id)? {
                Some(signal) => {
                    stopped.set(at, Thread { id, signal });
                    at += 1;
                }
                // It has ended.
                None => {
                    stopped.count -= 1;
                    let last = stopped.get(stopped.count);
                    stopped.set(at, last);
                }
            }
        }
    }
}

/// Starts a process that shares this one's memory and descriptors, and nobody hears of its end.
///
/// # Safety
/// `entry` may be called with `argument` in a process of its own, with thread-local memory that is not its own, on the stack
/// that ends at `stack`.
pub unsafe fn helper(stack: usize, entry: extern "C" fn(usize), argument: usize, flags: i32) -> Result<u32, i32> {
    let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS | flags;
    // SAFETY: promised by the caller.
    unsafe { sys::clone(stack, entry, argument, flags) }
}
