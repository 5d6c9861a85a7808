//! A test build's steps: it stops, or dies, where it is told to.
//!
//! A test gives the proxy a file of a page that both map, and writes its order there while the proxy runs. The proxy's filter
//! of system calls lets it signal itself, as `abort(3)` does; so it is in the midst of the step for as long as it is stopped.

use crate::steps::Step;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::fs::OpenOptions;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// The variable of the environment that names the file.
pub const FILE: &str = "RINGFENCE_STEPS";

/// What the file begins with, as `integration/clients/steps.h` has it.
#[repr(C)]
#[derive(Debug)]
struct Order {
    /// The rest is an order. Written last by the test; the proxy takes it away when it has obeyed.
    given: AtomicU32,
    /// At which time that the proxy comes there, from one.
    passes: AtomicU32,
    /// What it sends itself; zero for nothing.
    signal: AtomicU32,
    /// It has come there.
    reached: AtomicU32,
    /// The step's name, and zeros.
    name: [AtomicU8; 32],
}

static ORDER: OnceLock<&'static Order> = OnceLock::new();

impl Order {
    fn is_for(&self, step: Step) -> bool {
        let name = format!("{step:?}");
        let bytes = name.bytes().chain([0]);
        bytes.zip(&self.name).all(|(byte, written)| written.load(Ordering::Relaxed) == byte)
    }
}

/// Takes the file of the environment, while the process can open files.
pub fn open() {
    let Some(path) = std::env::var_os(FILE) else { return };
    let file = OpenOptions::new().read(true).write(true).open(path).expect("a test names a file that is there");
    // SAFETY: a new mapping, of a file as long as that, which is never unmapped.
    let mapped = unsafe {
        mmap(std::ptr::null_mut(), size_of::<Order>(), ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
    };
    let mapped = mapped.expect("it can be mapped");
    // SAFETY: the mapping begins with a page, is that long, and stays; atomics are sound whatever the test writes.
    let _ = ORDER.set(unsafe { &*mapped.cast::<Order>() });
}

/// The calling thread is at this step.
pub(crate) fn at(step: Step) {
    let Some(order) = ORDER.get() else { return };
    // Acquire: the order is whole.
    if order.given.load(Ordering::Acquire) == 0
        || !order.is_for(step)
        || order.passes.fetch_sub(1, Ordering::Relaxed) != 1
    {
        return;
    }
    order.given.store(0, Ordering::Relaxed);
    order.reached.store(1, Ordering::Release);
    let signal = order.signal.load(Ordering::Relaxed);
    if signal != 0 {
        // SAFETY: three calls that take numbers. A signal to this thread stops, or ends, the process before the return.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal) };
    }
}
