//! Handlers of forks that the program has, which wait for threads that register memory, or do so themselves.
//!
//! Those that were there before the library's run after it when a fork begins, and before it afterwards. So each test is a process of
//! its own, in which nothing was registered before.

// UNSAFETY: has handlers called at forks.
#![allow(unsafe_code)]

use super::lock::Lock;
use super::tests::{Files, Memory, assert_same_memory};
use super::tests_fork::in_child;
use super::*;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::*};

const ALONE: &str = "RINGFENCE_TEST_OF_HANDLERS";

/// Runs `test`, which is the test `name`, in a process of its own; one that hangs is killed.
#[track_caller]
fn alone(name: &str, test: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some() {
        // SAFETY: ends this process if it hangs.
        unsafe { libc::alarm(300) };
        return test();
    }
    let mut program = std::process::Command::new(std::env::current_exe().unwrap());
    program.args(["--exact", "--nocapture"]).arg(format!("pages::tests_handlers::{name}")).env(ALONE, "1");
    let output = program.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{}: {text}", output.status);
}

fn call_at_forks(prepare: extern "C" fn(), parent: extern "C" fn(), child: extern "C" fn()) {
    crate::atfork::register(Some(prepare), Some(parent), child);
}

/// The program's own.
static LOCK: Lock<()> = Lock::new(());

extern "C" fn take_lock() {
    core::mem::forget(LOCK.lock());
}

extern "C" fn give_lock() {
    // SAFETY: taken by `take_lock`.
    unsafe { LOCK.unlock() };
}

/// What one thread after the other uses.
struct Common(Files);

// SAFETY: what it holds off is the tests of this process, of which there is one; no thread lets go of it but the last one.
unsafe impl Send for Common {}

/// The lock is held around registrations by one thread, and by another during its forks. `shared` is registered all the time.
fn register_and_fork(shared: bool) {
    let (mut files, memory, changed) = (Files::new(), Memory::new(16), Memory::new(16));
    let (done, rounds) = (AtomicBool::new(false), AtomicU32::new(0));
    let acquired = shared.then(|| acquire(memory.address, memory.length, true, &mut files).unwrap());
    let files = Mutex::new(Common(files));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Relaxed) {
                let _locked = LOCK.lock();
                let files = &mut files.lock().unwrap().0;
                acquire(changed.address, changed.length, true, files).unwrap();
                // The other thread begins to fork, and waits for the lock.
                sys::sleep(500_000);
                release(changed.address, changed.length, files);
                rounds.fetch_add(1, Relaxed);
            }
        });
        for _ in 0..20 {
            in_child(|| {
                memory.assert_untouched();
                // Never registered at the moment of the fork.
                changed.assert_untouched();
                42
            })
            .answers(42);
            sys::sleep(300_000);
        }
        done.store(true, Relaxed);
    });
    assert!(rounds.load(Relaxed) > 3);
    let files = &mut files.lock().unwrap().0;
    if let Some(acquired) = acquired {
        assert_same_memory(files, &acquired, memory.address, memory.length);
        release(memory.address, memory.length, files);
    }
    assert!(files.views.is_empty());
    memory.assert_untouched();
    changed.assert_untouched();
}

#[test]
fn one_may_wait_for_a_thread_that_registers() {
    alone("one_may_wait_for_a_thread_that_registers", || {
        call_at_forks(take_lock, give_lock, give_lock);
        for method in [None, Some("userfaultfd"), Some("stop")] {
            hold::force(method);
            register_and_fork(true);
            register_and_fork(false);
        }
        hold::force(None);
    });
}

static REGISTERED: Mutex<Option<(Common, Memory, Acquired)>> = Mutex::new(None);

/// Ends a registration and begins another. What is written to the memory meanwhile is the device's as well, when the fork is over.
extern "C" fn register_anew() {
    if let Some((Common(files), memory, acquired)) = &mut *REGISTERED.lock().unwrap() {
        release(memory.address, memory.length, files);
        memory.set(0, 0);
        memory.assert_untouched();
        *acquired = acquire(memory.address, memory.length, true, files).unwrap();
        memory.set(0, 1);
    }
}

/// In the child nothing is registered.
extern "C" fn register_in_child() {
    if let Some((Common(files), memory, _)) = &mut *REGISTERED.lock().unwrap() {
        assert_eq!(memory.get(0), 1);
        memory.set(0, 0);
        memory.assert_untouched();
        memory.set(5, 99);
        let acquired = acquire(memory.address, memory.length, true, files).unwrap();
        assert_same_memory(files, &acquired, memory.address, memory.length);
        release(memory.address, memory.length, files);
        assert_eq!(memory.get(5), 99);
    }
}

fn fork_often() {
    let (mut files, memory) = (Files::new(), Memory::new(16));
    let acquired = acquire(memory.address, memory.length, true, &mut files).unwrap();
    *REGISTERED.lock().unwrap() = Some((Common(files), memory, acquired));
    for _ in 0..10 {
        in_child(|| 42).answers(42);
        let mut registered = REGISTERED.lock().unwrap();
        let (Common(files), memory, acquired) = registered.as_mut().unwrap();
        assert_eq!(memory.get(0), 1);
        assert_same_memory(files, acquired, memory.address, memory.length);
        memory.set(0, 0);
    }
    let (Common(mut files), memory, _) = REGISTERED.lock().unwrap().take().unwrap();
    release(memory.address, memory.length, &mut files);
    memory.assert_untouched();
    assert!(files.views.is_empty());
}

#[test]
fn they_may_register_themselves() {
    alone("they_may_register_themselves", || {
        call_at_forks(register_anew, register_anew, register_in_child);
        for method in [None, Some("userfaultfd"), Some("stop")] {
            hold::force(method);
            fork_often();
            hold::force(None);
            // A process of one thread.
            in_child(|| {
                fork_often();
                42
            })
            .answers(42);
        }
    });
}
