//! Goes along with a thread that forks, and stops all others while its child is made.
//!
//! A process of our own traces the thread from the first handler of the fork on, until it enters the kernel for it. It holds
//! nothing that others could want before that: handlers of the program's may wait for a thread that registers memory. Who must
//! stop all threads meanwhile asks the escort to keep this one ([`hold`]), since nobody can be traced twice.

// UNSAFETY: traces a thread.
#![allow(unsafe_code)]

use super::stop::{self, Threads};
use super::trace::{self, Stop};
use super::{GATE, fault, fork, sys, threads};
use core::sync::atomic::{AtomicU32, Ordering::*};

const STARTING: u32 = 0;
const READY: u32 = 1;
const FAILED: u32 = 2;
/// The kernel does not allow it.
const REFUSED: u32 = 4;
/// The forking thread is back, and needs nobody.
const LEAVE: u32 = 3;

/// The thread that is escorted; zero if none is.
static ESCORTED: AtomicU32 = AtomicU32::new(0);
/// The process that escorts it.
static PROCESS: AtomicU32 = AtomicU32::new(0);
/// What somebody who holds the gate wants of the escort.
static HOLD: AtomicU32 = AtomicU32::new(NOTHING);

const NOTHING: u32 = 0;
/// To keep the thread the next time that it stops ...
const ASKED: u32 = 1;
/// ... which it does.
const KEPT: u32 = 2;
/// The thread has stopped on its way into the kernel, and the escort waits for the gate.
const ENTERING: u32 = 3;

/// Whether its escort keeps this thread from running until [`let_go`]; false if it has none. The gate is held for the caller.
pub fn hold(thread: u32) -> Result<bool, i32> {
    let begun = sys::now();
    let mut turns = 0;
    loop {
        if ESCORTED.load(Acquire) != thread {
            let _ = HOLD.compare_exchange(ASKED, NOTHING, AcqRel, Acquire);
            return Ok(false);
        }
        match HOLD.compare_exchange(NOTHING, ASKED, AcqRel, Acquire) {
            Ok(_) => trace::wake(PROCESS.load(Relaxed)),
            Err(KEPT | ENTERING) => return Ok(true),
            Err(_) => {}
        }
        if sys::now() - begun > trace::PATIENCE {
            let taken_back = HOLD.compare_exchange(ASKED, NOTHING, AcqRel, Acquire).is_ok();
            return if taken_back { Err(libc::EAGAIN) } else { Ok(true) };
        }
        turns += 1;
        if turns < 100 { sys::give_way() } else { sys::sleep(100_000) }
    }
}

/// The escorted thread may go on.
pub fn let_go() {
    // One that enters the kernel goes on when its escort has the gate.
    if HOLD.compare_exchange(KEPT, NOTHING, AcqRel, Acquire).is_ok() {
        sys::futex_wake(&HOLD, 1);
    }
}

/// Keeps the thread, which has stopped, as long as somebody wants that.
fn keep() {
    if HOLD.compare_exchange(ASKED, KEPT, AcqRel, Acquire).is_ok() {
        while HOLD.load(Acquire) == KEPT {
            sys::futex_wait(&HOLD, KEPT);
        }
    }
}

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

/// Has a thread of this process escorted through its fork, if that can be. The gate is held, and the thread forks or is about to.
pub fn start(thread: u32) -> Option<Escort> {
    stop::try_both(|leave| attempt(thread, leave))
}

fn attempt(thread: u32, leave: bool) -> Result<Escort, i32> {
    let room = stop::room();
    let bytes = stop::bytes(room) + super::PAGE;
    let memory = sys::anonymous(bytes)?;
    let started = threads::tasks().and_then(|tasks| {
        let threads = Threads::new(memory + super::PAGE, room);
        let order = Order { state: AtomicU32::new(STARTING), thread, tasks, threads };
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
                let failed = match state.load(Acquire) {
                    READY => return Ok(Escort { process, memory, bytes }),
                    REFUSED => libc::EPERM,
                    _ => libc::EAGAIN,
                };
                trace::wait_for_end(process);
                Err(failed)
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
        // Whatever became of it.
        let _ = ESCORTED.compare_exchange(self.order().thread, 0, AcqRel, Acquire);
        self.forget();
    }

    /// In the child, which has no helper.
    pub fn forget(self) {
        sys::close(self.order().tasks);
        // SAFETY: made by `attempt`, and used by nobody here.
        unsafe { sys::munmap(self.memory, self.bytes) };
    }
}

extern "C" fn go_along(order: usize) {
    // SAFETY: `attempt` wrote an order there, which lives as long as this process.
    let order = unsafe { &*(order as *const Order) };
    trace::listen();
    let ready = trace::seize(order.thread);
    if ready.is_ok() {
        PROCESS.store(sys::process(), Relaxed);
        HOLD.store(NOTHING, Release);
        ESCORTED.store(order.thread, Release);
    }
    let state = match ready {
        Ok(()) => READY,
        Err(libc::EPERM) => REFUSED,
        Err(_) => FAILED,
    };
    order.state.store(state, Release);
    sys::futex_wake(&order.state, 1);
    if ready.is_err() {
        return;
    }
    go_along_until_forked(order);
    trace::detach(order.thread, 0);
    ESCORTED.store(0, Release);
}

fn go_along_until_forked(order: &Order) {
    let mut signal = 0;
    loop {
        match trace::next_stop(order.thread, signal, || HOLD.load(Relaxed) == ASKED) {
            Stop::Ended => return,
            Stop::Signal(next) => signal = next,
            Stop::Exit(_) => signal = 0,
            Stop::Entry(number, first) => {
                signal = 0;
                if order.state.load(Acquire) == LEAVE || is_fork(order.thread, number, first) && fork_of(order) {
                    return;
                }
            }
        }
        keep();
    }
}

/// Whether the system call makes a child with memory of its own. Handlers may also start threads, and programs.
fn is_fork(thread: u32, number: i64, first: u64) -> bool {
    const SYS_CLONE3: i64 = 435;
    let flags = match number {
        libc::SYS_fork => Some(0),
        libc::SYS_clone => Some(first),
        // `struct clone_args` begins with them.
        SYS_CLONE3 => trace::word_of(thread, first),
        _ => None,
    };
    flags.is_some_and(|flags| flags & libc::CLONE_VM as u64 == 0)
}

/// How often all others are stopped, to find none of them in the middle of a change to what is shared.
const ATTEMPTS: u32 = 1000;

/// The thread is about to fork, and has all locks that it wants: this is the time to take the gate. False if it will try again.
fn fork_of(order: &Order) -> bool {
    HOLD.store(ENTERING, Release);
    core::mem::forget(GATE.lock());
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
    let frozen = fork::freeze_for(order.thread);
    let result = loop {
        match trace::next_stop(order.thread, 0, || false) {
            Stop::Exit(result) => break result,
            Stop::Ended => break -1,
            Stop::Signal(_) | Stop::Entry(..) => {}
        }
    };
    if frozen {
        if result > 0 {
            fork::wait_for_child();
        }
        fork::thaw();
        fork::finish();
    }
    stop::resume(&threads);
    HOLD.store(NOTHING, Release);
    // SAFETY: locked above.
    unsafe { GATE.unlock() };
    // Interrupted before it began, it begins again.
    const ERESTARTNOINTR: i64 = 513;
    result != -ERESTARTNOINTR
}
