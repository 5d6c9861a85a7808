//! Parent and child do not disturb each other.

// UNSAFETY: forks, and looks at memory from several sides.
#![allow(unsafe_code)]

use super::tests::{Files, Memory, assert_same_memory, mappings};
use super::*;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};

/// Runs `work` in a child; its answer. A child that does not end within a minute is killed and fails the test.
pub fn in_child(work: impl FnOnce() -> i32) -> Child {
    // SAFETY: the child uses what the C library lets it use after a fork, and never returns.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: ends the child at once.
            unsafe {
                libc::alarm(60);
                libc::_exit(work())
            }
        }
        child => {
            assert!(child > 0);
            Child(child)
        }
    }
}

pub struct Child(i32);

impl Child {
    #[track_caller]
    pub fn answers(self, expected: i32) {
        let mut status = 0;
        // SAFETY: waits for our own child.
        assert_eq!(unsafe { libc::waitpid(self.0, &mut status, 0) }, self.0);
        assert!(libc::WIFEXITED(status), "status {status:#x}");
        assert_eq!(libc::WEXITSTATUS(status), expected);
    }
}

fn pipe() -> [i32; 2] {
    sys::pipe().unwrap()
}

/// Registers `address`, forks, lets both sides write to it in turn, and checks that neither sees the other.
#[inline(never)]
fn both_sides_write(files: &mut Files, address: usize, length: usize) {
    let acquired = acquire(address, length, true, files).unwrap();
    let byte = |at: usize| (address + at) as *mut u8;
    // SAFETY: the test's own memory.
    unsafe { (0..length).for_each(|at| byte(at).write_volatile(1)) };
    let (to_child, to_parent) = (pipe(), pipe());
    let child = in_child(|| {
        // SAFETY: the test's own memory.
        unsafe {
            if (0..length).any(|at| byte(at).read_volatile() != 1) {
                return 1;
            }
            (0..length).for_each(|at| byte(at).write_volatile(2));
            sys::write(to_parent[1], &[0]);
            if sys::read(to_child[0], &mut [0]) != Ok(1) {
                return 2;
            }
            if (0..length).any(|at| byte(at).read_volatile() != 2) {
                return 3;
            }
        }
        42
    });
    // Forks of other tests make this stack read-only for a moment, too, and the kernel does not wait for that.
    while sys::read(to_parent[0], &mut [0]).is_err_and(|error| error == libc::EFAULT) {}
    // SAFETY: the test's own memory.
    unsafe {
        assert!((0..length).all(|at| byte(at).read_volatile() == 1), "the child's writes appear");
        assert!(
            (0..length).all(|at| files.view(&acquired, at).read_volatile() == 1),
            "the child writes into the region"
        );
        (0..length).for_each(|at| byte(at).write_volatile(3));
        assert!(
            (0..length).all(|at| files.view(&acquired, at).read_volatile() == 3),
            "the region lost the parent's page"
        );
    }
    sys::write(to_child[1], &[0]);
    child.answers(42);
    assert_same_memory(files, &acquired, address, length);
    release(address, length, files);
    assert!(files.views.is_empty());
    to_child.into_iter().chain(to_parent).for_each(sys::close);
}

#[test]
fn heap_is_private_to_each_side() {
    let mut files = Files::new();
    // Small, so its neighbours on the page are the allocator's.
    let mut small = vec![0u8; 3000];
    both_sides_write(&mut files, small.as_mut_ptr() as usize, small.len());
    let mut large = vec![0u8; 5 << 20];
    both_sides_write(&mut files, large.as_mut_ptr() as usize + 17, large.len() - 17);
}

#[test]
fn stack_is_private_to_each_side() {
    both_sides_write_to_stack(&mut Files::new());
}

#[inline(never)]
pub fn both_sides_write_to_stack(files: &mut Files) {
    let mut buffer = [0u8; 3 * PAGE];
    both_sides_write(files, std::hint::black_box(&mut buffer).as_mut_ptr() as usize, 3 * PAGE);
}

/// Everything that the thread stands on: its stack from below its frame to the end, and its control block.
#[test]
fn a_thread_that_stands_on_shared_memory_forks() {
    let mut files = Files::new();
    for own in bystander::own() {
        // From some pages below to the pointer's own.
        let (start, length) = (own.end - (16 << 10) - 4 * PAGE, 4 * PAGE + 8);
        acquire(start, length, true, &mut files).unwrap();
        let shared = || mappings(start..start + length).iter().all(|mapping| mapping.shared);
        for round in 0..50 {
            in_child(|| round).answers(round);
        }
        assert!(shared(), "the parent's pages stay registered");
        release(start, length, &mut files);
    }
    assert!(files.views.is_empty());
}

/// The child starts with memory as it was at the fork, not with what other threads of the parent wrote later: two words
/// that one thread always writes in the same order are at most one apart.
#[test]
fn other_threads_wait_until_the_child_has_its_copies() {
    let (mut files, memory) = (Files::new(), Memory::new(600));
    let (stop, turns) = (AtomicBool::new(false), AtomicUsize::new(0));
    let word = |page: usize| (memory.address + page * PAGE) as *mut usize;
    let (first, last) = (word(0) as usize, word(599) as usize);
    // SAFETY: the test's own memory.
    unsafe {
        word(0).write_volatile(0);
        word(599).write_volatile(0);
    }
    let acquired = acquire(memory.address, memory.length, true, &mut files).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                let turn = turns.fetch_add(1, Relaxed) + 1;
                // SAFETY: the test's own memory; only this thread writes.
                unsafe {
                    (first as *mut usize).write_volatile(turn);
                    (last as *mut usize).write_volatile(turn);
                }
            }
        });
        while turns.load(Relaxed) < 1000 {
            std::thread::yield_now();
        }
        for _ in 0..100 {
            in_child(|| {
                // SAFETY: the test's own memory.
                let (first, last) =
                    unsafe { ((first as *const usize).read_volatile(), (last as *const usize).read_volatile()) };
                if first == last || first == last + 1 { 42 } else { 1 }
            })
            .answers(42);
        }
        stop.store(true, Relaxed);
    });
    // SAFETY: the writer has ended.
    unsafe { assert_eq!((first as *const usize).read_volatile(), turns.load(Relaxed), "the parent lost a write") };
    assert_same_memory(&files, &acquired, memory.address, 8);
    release(memory.address, memory.length, &mut files);
}

#[test]
fn a_child_registers_its_own_memory() {
    let (mut files, memory) = (Files::new(), Memory::new(4));
    let acquired = acquire(memory.address, memory.length, true, &mut files).unwrap();
    in_child(|| {
        let again = acquire(memory.address, memory.length, true, &mut files).unwrap();
        assert_ne!(again.segments, acquired.segments);
        assert_same_memory(&files, &again, memory.address, memory.length);
        memory.set(9, 1);
        release(memory.address, memory.length, &mut files);
        i32::from(memory.get(9))
    })
    .answers(1);
    memory.assert_untouched();
    assert_same_memory(&files, &acquired, memory.address, memory.length);
    release(memory.address, memory.length, &mut files);
    memory.assert_untouched();
}

/// Handlers run in the threads that they were meant for and nowhere else, may fork like anybody, and no child goes without
/// its memory because a signal came. In a process group of its own, all of which gets the signals.
#[test]
fn signals_that_come_during_a_fork_are_handled_by_the_program_alone() {
    static PROGRAM: AtomicUsize = AtomicUsize::new(0);
    static ELSEWHERE: AtomicUsize = AtomicUsize::new(0);
    static HERE: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn handler(_: i32) {
        if sys::process() as usize != PROGRAM.load(Relaxed) {
            // Nobody's but a process's with this memory: that of a forked child is its own.
            ELSEWHERE.fetch_add(1, Relaxed);
        } else if HERE.fetch_add(1, Relaxed).is_multiple_of(8) {
            in_child(|| 42).answers(42);
        }
    }
    let (mut files, memory) = (Files::new(), Memory::new(16));
    let child = in_child(|| {
        PROGRAM.store(sys::process() as usize, Relaxed);
        // SAFETY: zeros are a valid action.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as extern "C" fn(i32) as usize;
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: of this process and those that it makes.
        unsafe {
            libc::setpgid(0, 0);
            libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
        }
        acquire(memory.address, memory.length, true, &mut files).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _blocked = Blocked::new();
                while !done.load(Relaxed) {
                    // SAFETY: the group is this process's.
                    unsafe { libc::kill(0, libc::SIGUSR1) };
                    sys::sleep(100_000);
                }
            });
            for _ in 0..200 {
                in_child(|| i32::from(memory.get(0)) + 1).answers(i32::from(memory.get(0)) + 1);
            }
            done.store(true, Relaxed);
        });
        if HERE.load(Relaxed) == 0 { 2 } else { i32::from(ELSEWHERE.load(Relaxed) > 0) }
    });
    child.answers(0);
}

/// A thread that maps anew what it has registered does so at any moment of another one's fork: no child goes without memory,
/// and nothing is said about the new mapping that would keep it from later children.
#[test]
fn memory_is_mapped_anew_while_another_thread_forks() {
    let (mut files, memory, anew) = (Files::new(), Memory::new(16), Memory::new(16));
    let done = AtomicBool::new(false);
    acquire(memory.address, memory.length, true, &mut files).unwrap();
    std::thread::scope(|scope| {
        let forks = scope.spawn(|| {
            let result = std::panic::catch_unwind(|| {
                for _ in 0..300 {
                    in_child(|| {
                        for at in (0..16).map(|page| page * PAGE) {
                            std::hint::black_box((memory.get(at), anew.get(at)));
                        }
                        42
                    })
                    .answers(42);
                }
            });
            done.store(true, Relaxed);
            result
        });
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        while !done.load(Relaxed) {
            acquire(anew.address, anew.length, true, &mut files).unwrap();
            // SAFETY: the test's own memory.
            unsafe { sys::mmap(anew.address, anew.length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) }.unwrap();
            release(anew.address, anew.length, &mut files);
        }
        assert!(forks.join().unwrap().is_ok(), "a child came to harm");
    });
    release(memory.address, memory.length, &mut files);
    memory.assert_untouched();
}
