//! Keeps everybody from pages while they are replaced.

// UNSAFETY: changes what the application may do with its memory, for a moment.
#![allow(unsafe_code)]

use super::{bystander, fault, stop, sys, threads, uffd};
use core::ops::Range;
use core::sync::atomic::{AtomicU8, Ordering::*};

/// How others are kept from the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// There are none.
    Alone,
    /// The kernel lets them sleep in their page fault, also inside system calls. The descriptor of a userfaultfd.
    Userfaultfd(i32),
    /// All other threads are stopped. Their system calls go on afterwards, but for the few that a stop interrupts (`epoll_wait`,
    /// `sigtimedwait`, `semop` and the like answer `EINTR`, as they do under a debugger).
    Stopped,
    /// Read-only pages; [`fault`] lets the writer sleep in its signal handler. A system call that writes fails with `EFAULT`,
    /// and a thread that blocks SIGSEGV would die: only where there is nothing better, and no such thread.
    Signals,
}

/// Who is to be kept from the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Whoever touches them: they will be gone for a moment.
    Everybody,
    /// Whoever writes to them: they are copied.
    Writers,
}

/// Bits of [`allowed`].
const ALONE: u8 = 1;
const USERFAULTFD: u8 = 2;
const STOPPED: u8 = 4;
const SIGNALS: u8 = 8;
const ALL: u8 = ALONE | USERFAULTFD | STOPPED | SIGNALS;

/// Names one method that is to be used wherever others have to be kept away, for tests of each.
const VARIABLE: &core::ffi::CStr = c"RINGFENCE_HOLD";

/// Which methods may be used; zero before anybody has asked.
static ALLOWED: AtomicU8 = AtomicU8::new(0);

fn allowed() -> u8 {
    match ALLOWED.load(Relaxed) {
        0 => {
            let allowed = match crate::sys::environment(VARIABLE) {
                Some(b"userfaultfd") => USERFAULTFD,
                Some(b"stop") => STOPPED,
                Some(b"signals") => SIGNALS,
                // valgrind runs one thread at a time, and seldom another in the middle of this: whoever slept in a page fault
                // would keep all from running, and no process of ours can be beside it.
                _ if sys::is_emulated() => ALONE,
                _ => ALL,
            };
            ALLOWED.store(allowed, Relaxed);
            allowed
        }
        allowed => allowed,
    }
}

/// Whether other threads may be stopped, for a fork: it has no other way but signals.
pub fn may_stop() -> bool {
    allowed() & STOPPED != 0 || allowed() == USERFAULTFD
}

/// In tests: only this method, or any.
#[cfg(test)]
pub fn force(name: Option<&str>) {
    let allowed = match name {
        None => ALL,
        // For memory that no other thread of the test uses.
        Some("alone") => ALONE,
        Some("userfaultfd") => USERFAULTFD,
        Some("stop") => STOPPED,
        Some("signals") => SIGNALS,
        Some(other) => panic!("no method {other}"),
    };
    ALLOWED.store(allowed, Relaxed);
}

/// Opens what is kept.
pub fn open() {
    if allowed() & USERFAULTFD != 0 {
        let _ = uffd::file();
    }
}

/// What keeps others away; `faults` says whether a userfaultfd can watch such pages. `EPERM` if there is nothing that
/// loses no data.
pub fn method(faults: bool) -> Result<Method, i32> {
    let allowed = allowed();
    if allowed == ALONE || allowed & ALONE != 0 && threads::count() == 1 {
        return Ok(Method::Alone);
    }
    if faults
        && allowed & USERFAULTFD != 0
        && let Some(file) = uffd::file()
    {
        return Ok(Method::Userfaultfd(file));
    }
    if may_stop() && stop::is_possible() {
        return Ok(Method::Stopped);
    }
    signals()
}

impl Method {
    /// What is left where this one does not work.
    pub fn next(self) -> Result<Self, i32> {
        match self {
            Self::Userfaultfd(_) if stop::is_possible() => Ok(Self::Stopped),
            Self::Userfaultfd(_) | Self::Stopped => signals(),
            Self::Alone | Self::Signals => Err(libc::EPERM),
        }
    }
}

/// The last resort, if it does no harm.
fn signals() -> Result<Method, i32> {
    if !threads::nobody_blocks(libc::SIGSEGV) {
        return Err(libc::EPERM);
    }
    fault::install()?;
    fault::stay();
    Ok(Method::Signals)
}

/// Why nothing was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The work could not be done.
    Work(i32),
    /// The method does not work for these pages, or not now.
    Method,
}

/// Does `work`, which puts another mapping over `range`, while `who` is kept from it. `work` answers an error if it has left
/// the mapping in place, as it was. It owns what it needs, and uses nothing else.
///
/// `protection`: that of the range.
pub fn perform<R: Copy, F: Fn() -> Result<R, i32> + Copy>(
    method: Method,
    who: Who,
    range: &Range<usize>,
    protection: i32,
    work: F,
) -> Result<R, Failure> {
    let (start, end) = (range.start, range.end);
    match method {
        Method::Alone => bystander::run(range, work).map_err(Failure::Work),
        Method::Userfaultfd(file) => {
            let held = bystander::run(range, move || {
                let range = start..end;
                let held = match who {
                    Who::Everybody => uffd::hold_all(file, &range),
                    Who::Writers => uffd::hold_writers(file, &range),
                };
                if held.is_err() {
                    return Ok(Err(Failure::Method));
                }
                let result = work();
                match result {
                    Ok(_) => uffd::wake(file, &range),
                    Err(_) => uffd::forget(file, &range),
                }
                Ok(result.map_err(Failure::Work))
            });
            held.map_err(Failure::Work)?
        }
        Method::Stopped => stop::run(work).ok_or(Failure::Method)?.map_err(Failure::Work),
        Method::Signals => {
            debug_assert_eq!(who, Who::Writers, "readers cannot be kept away by signals");
            let held = bystander::run(range, move || {
                fault::announce();
                // SAFETY: writers are caught by the handler, which expects them already.
                let held = unsafe { sys::mprotect(start, end - start, protection & !libc::PROT_WRITE) };
                let result = held.and_then(|()| work());
                if result.is_err() {
                    // SAFETY: gives the pages the protection that they had.
                    let _ = unsafe { sys::mprotect(start, end - start, protection) };
                }
                fault::finish();
                result
            });
            held.map_err(Failure::Work)
        }
    }
}
