//! The SIGSEGV handler that lets writers wait for the end of a swap.

// UNSAFETY: a signal handler, and the call of the one that was there before.
#![allow(unsafe_code)]

use super::{fork, sys};
use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::*};

/// Whether pages are being replaced; changed under the module's lock only.
static ACTIVE: AtomicBool = AtomicBool::new(false);
/// Changes when a swap ends.
static ENDED: AtomicU32 = AtomicU32::new(0);

/// The handler to call for faults that are not ours: two places, so that a handler that runs meanwhile keeps its own.
static PREVIOUS: [Previous; 2] = [Previous::new(), Previous::new()];
static CURRENT: AtomicUsize = AtomicUsize::new(0);

/// Whether the one before ours is to run once, as it asked for (`SA_RESETHAND`), and has run.
static SPENT: AtomicBool = AtomicBool::new(false);
/// Whether somebody may be on the way to the handler at any time.
static STAYS: AtomicBool = AtomicBool::new(false);

struct Previous(UnsafeCell<MaybeUninit<libc::sigaction>>);

// SAFETY: written under the module's lock, and only the place that `CURRENT` does not name.
unsafe impl Sync for Previous {}

impl Previous {
    const fn new() -> Self {
        Self(UnsafeCell::new(MaybeUninit::zeroed()))
    }
}

/// `si_code` of a fault on a page that is there; from asm-generic/siginfo.h.
const SEGV_ACCERR: i32 = 2;

type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

/// Puts the handler in place, also if the application has installed its own since. Not to be called within a swap.
pub fn install() -> Result<(), i32> {
    let ours = handle as Handler as usize;
    let mut present = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: `sigaction` reads and writes the structures that are given to it; the handler keeps to what is allowed in one.
    unsafe {
        if libc::sigaction(libc::SIGSEGV, ptr::null(), present.as_mut_ptr()) != 0 {
            return Err(libc::EINVAL);
        }
        let present = present.assume_init();
        if present.sa_sigaction == ours {
            return Ok(());
        }
        let next = 1 - CURRENT.load(Relaxed);
        *PREVIOUS[next].0.get() = MaybeUninit::new(present);
        CURRENT.store(next, Release);
        SPENT.store(false, Relaxed);
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = ours;
        // The application's alternate stack if it has one; as reentrant as the handler that may follow wants to be.
        action.sa_flags =
            libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER | (present.sa_flags & libc::SA_RESTART);
        if libc::sigaction(libc::SIGSEGV, &action, ptr::null_mut()) != 0 {
            return Err(libc::EINVAL);
        }
    }
    Ok(())
}

/// Threads that run have met read-only pages, or will: the handler stays, because one of them may be on the way to it whenever
/// the pages are as they were.
pub fn stay() {
    STAYS.store(true, Relaxed);
}

/// In a child, which has one thread, and whose pages are its own.
pub fn may_go() {
    STAYS.store(false, Relaxed);
}

/// Puts back what was there before [`install`], unless ours has to stay, or the application has put its own there.
pub fn remove() {
    if STAYS.load(Relaxed) {
        return;
    }
    let mut present = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: as in `install`. The place that `CURRENT` names was written before if ours is the handler.
    unsafe {
        let is_ours = |present: &MaybeUninit<libc::sigaction>| {
            present.assume_init_ref().sa_sigaction == handle as Handler as usize
        };
        if libc::sigaction(libc::SIGSEGV, ptr::null(), present.as_mut_ptr()) != 0 || !is_ours(&present) {
            return;
        }
        let mut before = (*PREVIOUS[CURRENT.load(Acquire)].0.get()).assume_init();
        if SPENT.load(Relaxed) {
            before.sa_sigaction = libc::SIG_DFL;
        }
        libc::sigaction(libc::SIGSEGV, &before, present.as_mut_ptr());
        // Another thread was quicker.
        if !is_ours(&present) {
            libc::sigaction(libc::SIGSEGV, present.as_ptr(), ptr::null_mut());
        }
    }
}

/// Writers that fault wait from now on.
pub fn announce() {
    ACTIVE.store(true, SeqCst);
}

/// Whoever waits goes on.
pub fn finish() {
    ACTIVE.store(false, SeqCst);
    ENDED.fetch_add(1, SeqCst);
    sys::futex_wake(&ENDED, i32::MAX);
}

extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel's arguments, as SA_SIGINFO promises.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if code == SEGV_ACCERR && is_write(context) && waited(address) {
        return;
    }
    chain(signal, info, context);
}

/// Whether the instruction should run again.
fn waited(address: usize) -> bool {
    if let Some(resolved) = fork::resolve(address) {
        return resolved;
    }
    loop {
        let ended = ENDED.load(SeqCst);
        // Wherever it is: swaps are short, and one on another page does no harm.
        if !ACTIVE.load(SeqCst) {
            break;
        }
        sys::futex_wait(&ENDED, ended);
    }
    // The swap may have ended before this signal was delivered, so ask the page and not the range.
    is_writable(address)
}

/// Asks the kernel to add zero atomically to the word at `address`.
fn is_writable(address: usize) -> bool {
    static NOBODY: AtomicU32 = AtomicU32::new(0);
    let operation = libc::FUTEX_WAKE_OP | libc::FUTEX_PRIVATE_FLAG;
    // FUTEX_OP(FUTEX_OP_ADD, 0, FUTEX_OP_CMP_EQ, 0)
    let add_zero = 1usize << 28;
    let arguments = [ptr::from_ref(&NOBODY) as usize, operation as usize, 0, 0, address & !3, add_zero];
    // SAFETY: the word keeps its value, and a page that cannot be written is an error. Threads that wait on a futex there may
    // be woken without reason, which they must expect.
    unsafe { sys::call(libc::SYS_futex, arguments) }.is_ok()
}

/// Bit 1 of the page fault's error code.
fn is_write(context: *mut libc::c_void) -> bool {
    // SAFETY: the kernel's argument, as SA_SIGINFO promises.
    let context = unsafe { &*context.cast::<libc::ucontext_t>() };
    context.uc_mcontext.gregs[libc::REG_ERR as usize] & 2 != 0
}

fn chain(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: `CURRENT` names a place that was written before.
    let previous = unsafe { (*PREVIOUS[CURRENT.load(Acquire)].0.get()).assume_init_ref() };
    let once = previous.sa_flags & libc::SA_RESETHAND != 0 && previous.sa_sigaction > libc::SIG_IGN;
    let present = if once && SPENT.swap(true, Relaxed) { libc::SIG_DFL } else { previous.sa_sigaction };
    match present {
        libc::SIG_IGN if is_sent(info) => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: the default action takes its course: at once for a signal that was sent, by running the instruction
            // again for a fault.
            unsafe {
                let mut default: libc::sigaction = MaybeUninit::zeroed().assume_init();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &default, ptr::null_mut());
                if is_sent(info) {
                    let arguments = [sys::process() as usize, sys::thread() as usize, signal as usize, 0, 0, 0];
                    let _ = sys::call(libc::SYS_tgkill, arguments);
                }
            }
        }
        // SAFETY: the application's handler, with what it would have got without us: its mask, its kind of arguments.
        handler => unsafe {
            let mut mask = previous.sa_mask;
            if previous.sa_flags & libc::SA_NODEFER == 0 {
                libc::sigaddset(&mut mask, signal);
            }
            // Not `pthread_sigmask`, which older versions of glibc have in another library; Linux does the same for both.
            // The handler's return restores the mask of the interrupted code.
            libc::sigprocmask(libc::SIG_BLOCK, &mask, ptr::null_mut());
            if previous.sa_flags & libc::SA_SIGINFO != 0 {
                core::mem::transmute::<usize, Handler>(handler)(signal, info, context);
            } else {
                core::mem::transmute::<usize, extern "C" fn(i32)>(handler)(signal);
            }
        },
    }
}

/// By `kill` or `raise`, not by an instruction.
fn is_sent(info: *mut libc::siginfo_t) -> bool {
    // SAFETY: the kernel's argument.
    unsafe { (*info).si_code <= 0 }
}
