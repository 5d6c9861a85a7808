//! Goes along with a thread that forks, and stops all others while its child is made.
//!
//! A process of our own traces the thread from the first handler of the fork on, until it enters the kernel for it.

// UNSAFETY: traces a thread.
#![allow(unsafe_code)]

use super::stop::{self, Threads};
use super::trace::{self, Stop};
use super::{fault, fork};
use super::{sys, threads};
use core::sync::atomic::{AtomicU32, Ordering::*};

const STARTING: u32 = 0;
const READY: u32 = 1;
const FAILED: u32 = 2;
/// The forking thread is back, and needs nobody.
const LEAVE: u32 = 3;

/// The helper.
pub struct Escort {
    process: u32,
    memory: usize,
    bytes: usize,
}

/// At the start of the helper's memory.
struct Order {
    state: AtomicU32,
    thread: u32,
    tasks: i32,
    threads: Threads,
}

/// Has the calling thread escorted through its fork, if that can be.
pub fn start() -> Option<Escort> {
    stop::try_both(attempt)
}

fn attempt(leave: bool) -> Result<Escort, i32> {
    let room = stop::room();
    let bytes = stop::bytes(room) + super::PAGE;
    let memory = sys::anonymous(bytes)?;
    let started = threads::tasks().and_then(|tasks| {
        let threads = Threads::new(memory + super::PAGE, room);
        let order = Order { state: AtomicU32::new(STARTING), thread: sys::thread(), tasks, threads };
        // SAFETY: the mapping is ours, and longer than an order, which lives until the helper has ended.
        let result = unsafe {
            let place = memory as *mut Order;
            place.write(order);
            stop::give_leave(leave, usize::MAX).and_then(|()| {
                let process = stop::helper(memory + bytes, go_along, memory, 0)?;
                let state = &(*place).state;
                while state.load(Acquire) == STARTING {
                    sys::futex_wait(state, STARTING);
                }
                if state.load(Acquire) == READY {
                    return Ok(Escort { process, memory, bytes });
                }
                trace::wait_for_end(process);
                Err(libc::EPERM)
            })
        };
        let _ = stop::give_leave(leave, 0);
        if result.is_err() {
            sys::close(tasks);
        }
        result
    });
    if started.is_err() {
        // SAFETY: the helper has ended, or was never there.
        unsafe { sys::munmap(memory, bytes) };
    }
    started
}

impl Escort {
    fn order(&self) -> &Order {
        // SAFETY: written by `attempt`; the helper changes what is atomic.
        unsafe { &*(self.memory as *const Order) }
    }

    /// In the parent, after the fork: waits until everybody goes on.
    pub fn end(self) {
        self.order().state.store(LEAVE, Release);
        // If it is still waiting for a fork, this is where it looks.
        sys::give_way();
        trace::wait_for_end(self.process);
        sys::close(self.order().tasks);
        self.forget();
    }

    /// In the child, which has no helper.
    pub fn forget(self) {
        // SAFETY: made by `attempt`, and used by nobody here.
        unsafe { sys::munmap(self.memory, self.bytes) };
    }
}

extern "C" fn go_along(order: usize) {
    // SAFETY: `attempt` wrote an order there, which lives as long as this process.
    let order = unsafe { &*(order as *const Order) };
    let ready = trace::seize(order.thread);
    order.state.store(if ready.is_ok() { READY } else { FAILED }, Release);
    sys::futex_wake(&order.state, 1);
    if ready.is_err() {
        return;
    }
    let mut signal = 0;
    loop {
        match trace::next_stop(order.thread, signal) {
            Stop::Ended => return,
            Stop::Signal(next) => signal = next,
            Stop::Exit(_) => signal = 0,
            Stop::Entry(number) => {
                signal = 0;
                if order.state.load(Acquire) == LEAVE {
                    break;
                }
                if [libc::SYS_clone, SYS_CLONE3, libc::SYS_fork].contains(&number) && fork_of(order) {
                    break;
                }
            }
        }
    }
    trace::detach(order.thread, 0);
}

const SYS_CLONE3: i64 = 435;

/// How often all others are stopped, to find none of them in the middle of a change to what is shared.
const ATTEMPTS: u32 = 1000;

/// The thread is about to fork, and has all locks that it wants. False if it will try again.
fn fork_of(order: &Order) -> bool {
    let mut threads;
    let mut attempts = ATTEMPTS;
    loop {
        threads = order.threads;
        // A thread that cannot be stopped, because it waits in the kernel for its own child of `vfork`, say, runs on: the child
        // may then find what it writes in the meantime.
        let all = stop::stop_all(order.tasks, order.thread, &mut threads);
        attempts -= 1;
        if all.is_err() {
            fault::stay();
        }
        if fork::gather_again() || all.is_err() || attempts == 0 {
            break;
        }
        stop::resume(&threads);
        sys::sleep(10_000);
    }
    fork::freeze(&trace::own_of(order.thread));
    let result = loop {
        match trace::next_stop(order.thread, 0) {
            Stop::Exit(result) => break result,
            Stop::Ended => break -1,
            Stop::Signal(_) | Stop::Entry(_) => {}
        }
    };
    if result > 0 {
        fork::wait_for_child();
    }
    fork::thaw();
    stop::resume(&threads);
    // Interrupted before it began, it begins again.
    const ERESTARTNOINTR: i64 = 513;
    result != -ERESTARTNOINTR
}
