//! Threads that nothing may happen to: they block signals, sleep in system calls, hold locks.

// UNSAFETY: threads and children that touch memory while it is replaced.
#![allow(unsafe_code)]

use super::tests::{Files, Memory, assert_same_memory};
use super::tests_fork::in_child;
use super::*;
use crate::pages::interpose::advise;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};

const METHODS: [&str; 2] = ["userfaultfd", "stop"];

fn block_all_signals() {
    // SAFETY: the calling thread's mask.
    unsafe {
        let mut all: libc::sigset_t = core::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &all, core::ptr::null_mut());
    }
}

/// Runs `work` while one thread, which blocks all signals, writes to the memory, another reads from a file into it, and a third
/// writes from it to a pipe.
fn beside_threads(address: usize, length: usize, work: impl FnOnce()) {
    let (stop, turns) = (AtomicBool::new(false), [const { AtomicUsize::new(0) }; 3]);
    let zeros = sys::open(c"/dev/zero", libc::O_RDONLY).unwrap();
    let [drain, source] = sys::pipe().unwrap();
    let half = length / 2;
    std::thread::scope(|scope| {
        let counter = scope.spawn(|| {
            block_all_signals();
            let word = address as *mut usize;
            let mut count = 0usize;
            while !stop.load(Relaxed) {
                count += 1;
                // SAFETY: the test's own memory; only this thread writes to this word.
                unsafe {
                    word.write_volatile(count);
                    assert_eq!(word.read_volatile(), count, "a write was lost");
                }
                turns[0].fetch_add(1, Relaxed);
            }
        });
        let reader = scope.spawn(|| {
            block_all_signals();
            while !stop.load(Relaxed) {
                // SAFETY: the second half of the test's memory.
                let read = unsafe { libc::read(zeros, (address + half) as *mut _, half) };
                assert!(read > 0, "read: {}", std::io::Error::last_os_error());
                turns[1].fetch_add(1, Relaxed);
            }
        });
        let writer = scope.spawn(|| {
            block_all_signals();
            let mut out = vec![1u8; half];
            while !stop.load(Relaxed) {
                // SAFETY: the second half of the test's memory, which holds zeros; less than a pipe takes.
                let wrote = unsafe { libc::write(source, (address + half) as *const _, half.min(16 << 10)) };
                assert!(wrote > 0, "write: {}", std::io::Error::last_os_error());
                let mut left = wrote as usize;
                while left > 0 {
                    // SAFETY: a buffer of its own.
                    let read = unsafe { libc::read(drain, out.as_mut_ptr().cast(), left) };
                    assert!(read > 0);
                    assert!(out[..read as usize].iter().all(|&byte| byte == 0), "bytes that nobody wrote");
                    left -= read as usize;
                }
                turns[2].fetch_add(1, Relaxed);
            }
        });
        while turns.iter().any(|turns| turns.load(Relaxed) < 10) && !reader.is_finished() && !writer.is_finished() {
            std::thread::yield_now();
        }
        work();
        stop.store(true, Relaxed);
        for thread in [counter, reader, writer] {
            thread.join().unwrap();
        }
    });
    [zeros, drain, source].into_iter().for_each(sys::close);
}

fn zeroed(pages: usize) -> Memory {
    let memory = Memory::new(pages);
    (0..memory.length).for_each(|at| memory.set(at, 0));
    memory
}

#[test]
fn system_calls_and_blocked_signals_notice_no_registration() {
    for method in METHODS {
        let (mut files, memory) = (Files::new(), zeroed(8));
        hold::force(Some(method));
        beside_threads(memory.address, memory.length, || {
            for round in 0..200 {
                let (start, pages) = (memory.address + round % 3 * PAGE + 8, 1 + round % 5);
                acquire(start, pages * PAGE, true, &mut files).unwrap();
                release(start, pages * PAGE, &mut files);
            }
        });
        hold::force(None);
        assert!(files.views.is_empty());
    }
}

#[test]
fn system_calls_and_blocked_signals_notice_no_fork() {
    let (mut files, memory) = (Files::new(), zeroed(64));
    let acquired = acquire(memory.address, memory.length, true, &mut files).unwrap();
    beside_threads(memory.address, memory.length, || {
        for _ in 0..50 {
            in_child(|| 42).answers(42);
        }
    });
    assert_same_memory(&files, &acquired, memory.address, 8);
    release(memory.address, memory.length, &mut files);
}

/// Threads that allocate hold the allocator's locks when they are stopped, and the fork wants them, too.
#[test]
fn a_fork_waits_for_nobody_who_waits_for_it() {
    let (mut files, stop) = (Files::new(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let small: Vec<_> = (0..3)
            .map(|seed| {
                let stop = &stop;
                scope.spawn(move || {
                    let mut kept: Vec<Vec<u8>> = Vec::new();
                    let mut turn = seed;
                    // The first allocations of a thread lie beside its arena's own data.
                    let first = Box::new([7u8; 64]);
                    while !stop.load(Relaxed) {
                        turn = turn * 7 % 1009 + 1;
                        kept.push(vec![turn as u8; turn]);
                        if kept.len() > 50 {
                            kept.swap_remove(turn % 50);
                        }
                    }
                    assert!(first.iter().all(|&byte| byte == 7));
                    drop(kept);
                })
            })
            .collect();
        // All heaps of threads, and the first one's.
        let heap = vec![1u8; 3000];
        let registered: Vec<(usize, usize)> = super::tests::mappings(0..usize::MAX)
            .iter()
            .filter(|mapping| mapping.start.is_multiple_of(64 << 20) && mapping.protection == 3 && mapping.inode == 0)
            .map(|mapping| (mapping.start, PAGE))
            .chain([(heap.as_ptr() as usize, heap.len())])
            .collect();
        for &(address, length) in &registered {
            acquire(address, length, true, &mut files).unwrap();
        }
        for _ in 0..60 {
            in_child(|| {
                // The child's heap is whole.
                let lists: Vec<Vec<u8>> = (1..200).map(|length| vec![3; length * 5]).collect();
                lists.len() as i32
            })
            .answers(199);
        }
        stop.store(true, Relaxed);
        small.into_iter().for_each(|thread| thread.join().unwrap());
        for &(address, length) in &registered {
            release(address, length, &mut files);
        }
    });
    assert!(files.views.is_empty());
}

/// A child that is made without the C library has no part of what is registered, so it cannot write to its parent's.
#[test]
fn a_raw_child_does_not_share_registered_memory() {
    let (mut files, memory) = (Files::new(), Memory::new(4));
    let acquired = acquire(memory.address + PAGE, PAGE, true, &mut files).unwrap();
    // SAFETY: the child touches memory, and ends.
    let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    if child == 0 {
        let intact = memory.get(5) == 5 && memory.get(2 * PAGE) == (2 * 31 + 2 * PAGE) as u8;
        // The default action, not this test program's handler, and no core.
        // SAFETY: the child's own.
        unsafe {
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::setrlimit(libc::RLIMIT_CORE, &none);
            if intact {
                memory.set(PAGE, 99);
            }
            libc::_exit(1);
        }
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    unsafe { libc::waitpid(child as i32, &mut status, 0) };
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "status {status:#x}");
    memory.assert_untouched();
    assert_same_memory(&files, &acquired, memory.address + PAGE, PAGE);
    release(memory.address + PAGE, PAGE, &mut files);
}

/// What the application wants its children to find, they find.
#[test]
fn advice_about_children_is_kept() {
    let (mut files, memory) = (Files::new(), Memory::new(12));
    let page = |number: usize| memory.address + number * PAGE;
    acquire(page(0), memory.length, true, &mut files).unwrap();
    advise(page(2), 2 * PAGE, libc::MADV_WIPEONFORK).unwrap();
    advise(page(6), 2 * PAGE, libc::MADV_DONTFORK).unwrap();
    in_child(|| {
        let mut there = [0u8; 12];
        // SAFETY: asks about pages, a byte for each.
        let all = unsafe { libc::mincore(page(0) as *mut _, memory.length, there.as_mut_ptr()) };
        // SAFETY: as above.
        let two = unsafe { libc::mincore(page(6) as *mut _, 2 * PAGE, there.as_mut_ptr()) };
        let kept = |number: usize| memory.get(number * PAGE + 1) == (number * 31 + number * PAGE + 1) as u8;
        let wiped = |number: usize| (0..PAGE).all(|at| memory.get(number * PAGE + at) == 0);
        i32::from(all == -1 && two == -1 && kept(1) && wiped(2) && wiped(3) && kept(4) && kept(8) && kept(11))
    })
    .answers(1);
    memory.assert_untouched();
    release(page(0), memory.length, &mut files);
    memory.assert_untouched();
    advise(page(2), 2 * PAGE, libc::MADV_KEEPONFORK).unwrap();
    advise(page(6), 2 * PAGE, libc::MADV_DOFORK).unwrap();
    assert_eq!(memory.mappings().len(), 1);
}

/// Two threads fork at once, while a third registers.
#[test]
fn forks_and_registrations_at_once() {
    let (mut files, memory) = (Files::new(), Memory::new(300));
    acquire(memory.address, 100 * PAGE, true, &mut files).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..30 {
                    in_child(|| {
                        memory.assert_untouched();
                        // SAFETY: a grandchild, which ends at once.
                        match unsafe { libc::fork() } {
                            // SAFETY: as above.
                            0 => unsafe { libc::_exit(0) },
                            child => {
                                let mut status = 1;
                                // SAFETY: waits for our own child.
                                unsafe { libc::waitpid(child, &mut status, 0) };
                                status + 7
                            }
                        }
                    })
                    .answers(7);
                }
            });
        }
        for round in 0..200 {
            let start = memory.address + (100 + round % 50) * PAGE;
            acquire(start, 20 * PAGE, true, &mut files).unwrap();
            release(start, 20 * PAGE, &mut files);
        }
    });
    release(memory.address, 100 * PAGE, &mut files);
    memory.assert_untouched();
    assert!(files.views.is_empty());
}

/// A system call that sleeps in registered memory goes on after a stop.
#[test]
fn sleeping_system_calls_go_on() {
    let (mut files, memory) = (Files::new(), zeroed(4));
    let [from, to] = sys::pipe().unwrap();
    let began = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| {
            began.store(true, Release);
            // SAFETY: the test's own memory.
            unsafe { libc::read(from, memory.address as *mut _, 64) }
        });
        while !began.load(Acquire) {
            std::thread::yield_now();
        }
        for method in METHODS {
            hold::force(Some(method));
            acquire(memory.address, memory.length, true, &mut files).unwrap();
            in_child(|| 42).answers(42);
            release(memory.address, memory.length, &mut files);
        }
        hold::force(None);
        sys::write(to, &[5; 64]);
        assert_eq!(sleeper.join().unwrap(), 64);
    });
    assert!((0..64).all(|at| memory.get(at) == 5));
    [from, to].into_iter().for_each(sys::close);
}
