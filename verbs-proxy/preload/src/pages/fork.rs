//! A child of `fork` gets private copies of shared pages, as of other memory.
//!
//! Pages that are shared with the proxy are no child's, unless it is made by `fork`, which tells the library of it:
//! 1. When it is about to be made, nothing else may write to shared pages. A thread of its own has nothing to wait for. Of
//!    several threads, the others are stopped when the forking one enters the kernel for the fork ([`escort`]): by then it has
//!    all the locks that it wants, so nobody who is stopped has one of those. Where that is not to be had, pages are
//!    read-only from the beginning of the fork and other writers wait ([`fault`]), if none of them blocks SIGSEGV.
//! 2. The pages become read-only. Those that the forking thread must write to meanwhile (its stack, its control block) become
//!    private, and what they had is kept ([`windows`]).
//! 3. The child replaces all others by private copies, then says so.
//! 4. The parent puts back what was written to its private pages, and everybody goes on.
//!
//! The program's own handlers of forks run before and after ours, may wait for threads that register memory, and may do so
//! themselves: [`gate`].

// UNSAFETY: replaces the application's memory, in handlers that the C library calls.
#![allow(unsafe_code)]

use super::array::Array;
use super::escort::{self, Escort};
use super::lock::Lock;
use super::patch::Patch;
use super::signals::Blocked;
use super::state::State;
use super::windows::Windows;
use super::{GATE, PAGE, STATE, bystander, fault, hold, maps, signals, sys, threads, trace};
use crate::atfork;
use core::cell::UnsafeCell;
use core::ops::{ControlFlow, Range};
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering::*};

/// Process and thread for which pages are read-only, or in a child are its parent's still; zero if there are none. The child
/// finds its parent's numbers.
static PROCESS: AtomicU32 = AtomicU32::new(0);
static THREAD: AtomicU32 = AtomicU32::new(0);

/// Held from the first to the last handler of a fork.
static FORKS: Lock<()> = Lock::new(());
/// The thread and the process that hold it, or zero. Set with the gate held.
static FORKER: AtomicU32 = AtomicU32::new(0);
static FORKING: AtomicU32 = AtomicU32::new(0);

static WINDOWS: Windows = Windows::new();

/// The pipe by which the child says that it has its copies: both ends, or -1.
static READ_END: AtomicU32 = AtomicU32::new(u32::MAX);
static WRITE_END: AtomicU32 = AtomicU32::new(u32::MAX);

/// What only the forking thread touches, or who works for it while that is held.
struct Fork {
    patches: Array<Patch>,
    /// Changed with the gate held.
    escort: Option<Escort>,
    /// The thread has the gate as long as it forks, because nobody could take it at the right moment.
    has_gate: bool,
    /// No signal is delivered to the forking thread: its handler might fork, and wait for this fork; the escort, which is
    /// another process, would run it too; and the child has not got its memory yet.
    blocked: Option<Blocked>,
}

struct Global(UnsafeCell<Fork>);

// SAFETY: reached by the forking thread, and by who works for it meanwhile, as the type says.
unsafe impl Sync for Global {}

static FORK: Global =
    Global(UnsafeCell::new(Fork { patches: Array::new(), escort: None, has_gate: false, blocked: None }));

/// # Safety
/// The caller is who may touch it, and no other reference is in use.
unsafe fn fork() -> &'static mut Fork {
    // SAFETY: promised by the caller.
    unsafe { &mut *FORK.0.get() }
}

/// A write to a read-only page while this thread forks, or in the child before its turn: makes the page private.
/// `None` if this thread does not fork.
pub fn resolve(address: usize) -> Option<bool> {
    let process = PROCESS.load(Relaxed);
    if process == 0 || (process == sys::process() && THREAD.load(Relaxed) != sys::thread()) {
        return None;
    }
    // SAFETY: the forking thread has the gate, and is interrupted where it uses nothing of this.
    let patches = unsafe { &(*FORK.0.get()).patches };
    let patch = patches.iter().find(|patch| patch.contains(address))?;
    if patch.protection & libc::PROT_WRITE == 0 {
        return None;
    }
    Some(WINDOWS.open(patch, address & !(PAGE - 1)).is_ok())
}

/// What is shared at this moment, wherever the application has moved it.
fn gather(state: &State, patches: &mut Array<Patch>) {
    patches.clear();
    if !state.shares() {
        return;
    }
    let _ = maps::visit(&(0..usize::MAX), false, |mapping| {
        state.each_shown(&mapping, &mut |shown| {
            let patch = Patch { start: shown.start, end: shown.end, protection: shown.protection, aside: shown.aside };
            if patch.aside == 0 {
                patches.push(patch);
                return;
            }
            // What the application wants children to find may differ from mapping to mapping.
            let aside = patch.aside..patch.aside + (patch.end - patch.start);
            let _ = maps::visit(&aside, false, |mapping| {
                if let Some(part) = mapping.clip(&aside) {
                    let start = patch.start + (part.start - aside.start);
                    patches.push(Patch { start, end: start + part.length(), aside: part.start, ..patch });
                }
                ControlFlow::Continue(())
            });
        });
        ControlFlow::Continue(())
    });
}

extern "C" fn prepare() {
    let blocked = Blocked::new();
    core::mem::forget(FORKS.lock());
    core::mem::forget(GATE.lock());
    FORKER.store(sys::thread(), Relaxed);
    FORKING.store(sys::process(), Relaxed);
    // SAFETY: this thread forks.
    let fork = unsafe { fork() };
    fork.blocked = Some(blocked);
    signals::unblock(libc::SIGSEGV);
    fork.has_gate = threads::count() == 1;
    if !fork.has_gate && (!STATE.lock().shares() || escorted(fork)) {
        // SAFETY: locked above; who works for this thread takes it when the time has come.
        unsafe { GATE.unlock() };
        return;
    }
    fork.has_gate = true;
    freeze_own(fork);
}

/// Has the forking thread escorted. The gate is held.
fn escorted(fork: &mut Fork) -> bool {
    // One that was about to get a signal gets it first.
    const ATTEMPTS: u32 = 5;
    if fault::install().is_ok() && hold::may_stop() {
        fork.escort = (0..ATTEMPTS).find_map(|_| escort::start(FORKER.load(Relaxed)));
    }
    fork.escort.is_some()
}

/// Nobody writes to what is shared from now on, with no more help than the forking thread itself has.
fn freeze_own(fork: &mut Fork) {
    gather(&STATE.lock(), &mut fork.patches);
    if fork.patches.is_empty() {
        return;
    }
    if fault::install().is_err() || begin(sys::process(), sys::thread()).is_err() {
        fork.patches.clear();
        return;
    }
    if threads::count() > 1 {
        if !threads::nobody_blocks(libc::SIGSEGV) {
            // Nothing keeps others from the pages without harm: the child does not get them.
            finish();
            return;
        }
        fault::stay();
    }
    let own = bystander::own().map(|own| (own.start, own.end));
    let frozen = bystander::run_for(fork.patches.iter().map(|patch| patch.start..patch.end), move || {
        freeze(&own.map(|(start, end)| start..end));
        Ok(())
    });
    // Without a thread to do it the caller must be able to go on, and the child does not get these pages.
    if frozen.is_err() {
        finish();
    }
}

/// The forking thread's pages will be read-only.
fn begin(process: u32, thread: u32) -> Result<(), i32> {
    WINDOWS.begin()?;
    let [read, write] = sys::pipe().map_or([u32::MAX; 2], |ends| ends.map(|end| end as u32));
    READ_END.store(read, Relaxed);
    WRITE_END.store(write, Relaxed);
    THREAD.store(thread, Relaxed);
    PROCESS.store(process, Relaxed);
    Ok(())
}

/// For the forking thread, which enters the kernel while all others are stopped: false if the child has no pages to copy.
pub fn freeze_for(thread: u32) -> bool {
    // SAFETY: called for the forking thread.
    let is_empty = unsafe { fork() }.patches.is_empty();
    if is_empty || begin(FORKING.load(Relaxed), thread).is_err() {
        return false;
    }
    freeze(&trace::own_of(thread));
    true
}

/// Looks again at what is shared, for the forking thread: others may have unmapped it since, or mapped their own there. False
/// if one of those who are stopped was just about to change it.
pub fn gather_again() -> bool {
    let Some(state) = STATE.try_lock() else { return false };
    // SAFETY: called for the forking thread.
    gather(&state, &mut unsafe { fork() }.patches);
    true
}

/// Nobody writes to what is shared, and the forking thread, which uses `own`, can go on.
pub fn freeze(own: &[Range<usize>]) {
    // SAFETY: called by the forking thread, or for it.
    let fork = unsafe { fork() };
    fault::announce();
    for patch in fork.patches.iter() {
        patch.mark();
        // SAFETY: writers are stopped, or caught by the handler.
        unsafe {
            let _ = sys::madvise(patch.start, patch.end - patch.start, libc::MADV_DOFORK);
            let _ = sys::mprotect(patch.start, patch.end - patch.start, patch.frozen());
        }
        if patch.protection & libc::PROT_WRITE == 0 {
            continue;
        }
        for own in own {
            let start = patch.start.max(own.start & !(PAGE - 1));
            for page in (start..patch.end.min(own.end)).step_by(PAGE) {
                if !WINDOWS.contains(page) && WINDOWS.open(patch, page).is_err() {
                    // Without memory for a copy this page stays as it is, or the thread could not go on.
                    // SAFETY: its own protection.
                    let _ = unsafe { sys::mprotect(page, PAGE, patch.protection) };
                }
            }
        }
    }
}

/// In the parent, when the child has its copies or there is none: everything as it was.
pub fn thaw() {
    // SAFETY: called by the forking thread, or for it.
    let fork = unsafe { fork() };
    for patch in fork.patches.iter() {
        patch.unmark();
        // SAFETY: their own protection, or for the private pages in it the same.
        let _ = unsafe { sys::mprotect(patch.start, patch.end - patch.start, patch.protection) };
    }
    WINDOWS.close_all(&fork.patches);
    WINDOWS.forget_all();
    for patch in fork.patches.iter() {
        // SAFETY: as it was, for what is ours; what the application has mapped there meanwhile it has mapped itself.
        let _ = unsafe { sys::madvise(patch.start, patch.end - patch.start, libc::MADV_DONTFORK) };
    }
    fault::finish();
}

/// Waits until the child says that it has its copies, or has died.
pub fn wait_for_child() {
    close_end(&WRITE_END);
    let end = READ_END.load(Relaxed);
    if end != u32::MAX {
        let _ = sys::read(end as i32, &mut [0]);
    }
}

extern "C" fn parent() {
    // SAFETY: this thread forks.
    let fork = unsafe { fork() };
    if fork.has_gate {
        thaw_own(fork);
    } else {
        core::mem::forget(GATE.lock());
    }
    let escort = fork.escort.take();
    let blocked = fork.blocked.take();
    FORKER.store(0, Relaxed);
    FORKING.store(0, Relaxed);
    // Nobody is to find it there who looks: run times and crash reporters compare. Not by the escort, whose handlers are its own.
    fault::remove();
    // SAFETY: locked above, or by `prepare`.
    unsafe { GATE.unlock() };
    if let Some(escort) = escort {
        escort.end();
    }
    // SAFETY: locked by `prepare`.
    unsafe { FORKS.unlock() };
    drop(blocked);
}

/// Undoes [`freeze_own`], when the child, if there is one, has its copies.
fn thaw_own(fork: &Fork) {
    if PROCESS.load(Relaxed) == 0 {
        return;
    }
    wait_for_child();
    let patches = fork.patches.iter().map(|patch| patch.start..patch.end);
    let _ = bystander::run_for(patches, || {
        thaw();
        Ok(())
    });
    finish();
}

extern "C" fn child() {
    if FORKING.load(Relaxed) == 0 {
        return;
    }
    // SAFETY: the thread that this one is a copy of forked.
    let fork = unsafe { fork() };
    if PROCESS.load(Relaxed) != 0 {
        for patch in fork.patches.iter() {
            let wiped = patch.is_wiped();
            let mut start = patch.start;
            while start < patch.end {
                let end = WINDOWS.next(start).min(patch.end);
                patch.privatise(start, end, wiped);
                start = end + PAGE;
            }
        }
        let write = WRITE_END.load(Relaxed);
        if write != u32::MAX {
            sys::write(write as i32, &[1]);
        }
        fault::finish();
        finish();
    }
    fault::may_go();
    fault::remove();
    if let Some(escort) = fork.escort.take() {
        escort.forget();
    }
    let blocked = fork.blocked.take();
    FORKER.store(0, Relaxed);
    FORKING.store(0, Relaxed);
    // SAFETY: no other thread exists here, and nothing changes this state but who holds the gate.
    unsafe {
        STATE.reset();
        STATE.lock().forget_in_child();
        GATE.reset();
        FORKS.reset();
    }
    drop(blocked);
}

/// The fork is over, for either side.
pub fn finish() {
    PROCESS.store(0, Relaxed);
    THREAD.store(0, Relaxed);
    WINDOWS.end();
    close_end(&READ_END);
    close_end(&WRITE_END);
    // SAFETY: called by the forking thread, or for it.
    unsafe { fork() }.patches.clear();
}

/// The right to change what is shared.
pub struct Gate {
    /// Of a thread that has it anyway, because it forks.
    is_own: bool,
}

/// Waits for the gate. Threads may want it at any moment of a fork, the forking one and its child among them, in a handler of the
/// program's that comes before ours.
pub fn gate() -> Gate {
    let process = FORKING.load(Relaxed);
    if process != 0 && process != sys::process() {
        child();
    } else if process != 0 && FORKER.load(Relaxed) == sys::thread() {
        // SAFETY: this thread forks.
        let fork = unsafe { fork() };
        if fork.has_gate {
            // Whether there is a child already, nobody knows.
            thaw_own(fork);
            return Gate { is_own: true };
        }
    }
    core::mem::forget(GATE.lock());
    let forker = FORKER.load(Relaxed);
    // SAFETY: the gate is held, and the forking thread touches the rest without it only if it has been given all that.
    let fork = unsafe { fork() };
    if forker != 0 && fork.escort.is_none() {
        // What is shared from now on is shared before that thread forks. Without an escort the child does not get it.
        escorted(fork);
    }
    Gate { is_own: false }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if self.is_own {
            // SAFETY: this thread forks.
            freeze_own(unsafe { fork() });
        } else {
            // SAFETY: locked by `gate`, whose only guard this is.
            unsafe { GATE.unlock() };
        }
    }
}

fn close_end(end: &AtomicU32) {
    let file = end.swap(u32::MAX, Relaxed);
    if file != u32::MAX {
        sys::close(file as i32);
    }
}

/// Has the C library call the handlers above. To be called before anything is shared.
pub fn watch() {
    static WATCHED: AtomicBool = AtomicBool::new(false);
    if WATCHED.swap(true, Relaxed) {
        return;
    }
    atfork::register(Some(prepare), Some(parent), child);
}
