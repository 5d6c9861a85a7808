//! Threads that write while pages are swapped under them, and memory that the caller stands on.

// UNSAFETY: maps memory twice to look at it from both sides.
#![allow(unsafe_code)]

use super::tests::{Files, Memory, assert_same_memory, mappings};
use super::tests_fork::both_sides_write_to_stack;
use super::*;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*};

/// Threads increment counters on a few pages, each its own counters, without atomics: a lost page is a lost increment.
pub fn no_increment_is_lost(address: usize, pages: usize, files: &mut Files, rounds: usize) {
    let stop = AtomicBool::new(false);
    let ready = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3usize)
            .map(|writer| {
                let (stop, ready) = (&stop, &ready);
                scope.spawn(move || {
                    let mut turns = 0u64;
                    while !stop.load(Relaxed) {
                        for page in 0..pages {
                            let counter = (address + page * PAGE + writer * 8) as *mut u64;
                            // SAFETY: this thread's word in the test's memory.
                            unsafe { counter.write_volatile(counter.read_volatile() + 1) };
                        }
                        turns += 1;
                        ready.fetch_or(1 << writer, Relaxed);
                    }
                    turns
                })
            })
            .collect();
        while ready.load(Relaxed) != 7 {
            std::thread::yield_now();
        }
        for round in 0..rounds {
            // Not page-aligned, and neighbours on the same pages are written as well.
            let (start, length) = (address + 64 + round % 3 * PAGE, (pages - 3) * PAGE);
            acquire(start, length, true, files).unwrap();
            release(start, length, files);
        }
        stop.store(true, Relaxed);
        let turns: Vec<u64> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        for page in 0..pages {
            for (writer, turns) in turns.iter().enumerate() {
                // SAFETY: the writers have ended.
                let counted = unsafe { ((address + page * PAGE + writer * 8) as *const u64).read_volatile() };
                assert_eq!(counted, *turns, "counter {writer} of page {page}");
            }
        }
    });
    assert!(files.views.is_empty());
}

/// Everything that can be forced, and what is chosen by itself.
const METHODS: [Option<&str>; 4] = [None, Some("userfaultfd"), Some("stop"), Some("signals")];

pub fn zeroed(pages: usize) -> Memory {
    let memory = Memory::new(pages);
    (0..memory.length).for_each(|at| memory.set(at, 0));
    memory
}

#[test]
fn no_increment_is_lost_with_signals() {
    let mut files = Files::new();
    hold::force(Some("signals"));
    no_increment_is_lost(zeroed(16).address, 16, &mut files, 300);
    hold::force(None);
}

#[test]
fn no_increment_is_lost_with_threads_stopped() {
    let mut files = Files::new();
    hold::force(Some("stop"));
    no_increment_is_lost(zeroed(16).address, 16, &mut files, 300);
    hold::force(None);
}

/// Initialised, so it is a private mapping of the program's file.
#[repr(align(4096))]
struct Data(#[allow(dead_code)] [AtomicU64; 8 * 512]);
static DATA: Data = Data([const { AtomicU64::new(7) }; 8 * 512]);

#[test]
fn no_increment_is_lost_in_initialised_data() {
    let mut files = Files::new();
    DATA.0.iter().for_each(|word| word.store(0, Relaxed));
    no_increment_is_lost(&raw const DATA as usize, 8, &mut files, 300);
}

static CHAINED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_and_open(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    CHAINED.fetch_add(1, Relaxed);
    // SAFETY: the test's own page.
    unsafe {
        sys::mprotect((*info).si_addr() as usize & !(PAGE - 1), PAGE, libc::PROT_READ | libc::PROT_WRITE).unwrap()
    };
}

#[test]
fn other_faults_reach_the_handler_before() {
    let (mut files, memory, other) = (Files::new(), Memory::new(4), Memory::new(1));
    hold::force(Some("signals"));
    // SAFETY: an ordinary handler; the page is the test's own.
    unsafe {
        let mut before: libc::sigaction = core::mem::zeroed();
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = count_and_open as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSEGV, &action, &mut before);
        acquire(memory.address, memory.length, true, &mut files).unwrap();
        sys::mprotect(other.address, PAGE, libc::PROT_READ).unwrap();
        other.set(0, 99);
        sys::mprotect(other.address, PAGE, libc::PROT_NONE).unwrap();
        assert_eq!(other.get(0), 99);
        release(memory.address, memory.length, &mut files);
        libc::sigaction(libc::SIGSEGV, &before, core::ptr::null_mut());
    }
    hold::force(None);
    assert_eq!(CHAINED.load(Relaxed), 2);
}

#[inline(never)]
fn share_own_stack(files: &mut Files) {
    let mut buffer = [0u8; 3 * PAGE];
    buffer.iter_mut().enumerate().for_each(|(at, byte)| *byte = at as u8);
    let (address, length) = (buffer.as_mut_ptr() as usize, buffer.len());
    for _ in 0..200 {
        let acquired = acquire(address, length, true, files).unwrap();
        assert_same_memory(files, &acquired, address, length);
        release(address, length, files);
    }
    assert!(buffer.iter().enumerate().all(|(at, byte)| *byte == at as u8));
}

#[test]
fn a_spawned_threads_stack_can_be_shared() {
    let mut files = Files::new();
    for method in METHODS {
        hold::force(method);
        share_own_stack(&mut files);
    }
    hold::force(None);
}

/// The page of the thread's control block, which the kernel writes to.
#[test]
fn thread_local_memory_can_be_shared() {
    let mut files = Files::new();
    for method in METHODS {
        hold::force(method);
        let page = bystander::own()[1].end - (16 << 10);
        for _ in 0..500 {
            let acquired = acquire(page, 8, true, &mut files).unwrap();
            std::thread::yield_now();
            assert_eq!(acquired.segments.len(), 1);
            release(page, 8, &mut files);
        }
    }
    hold::force(None);
}

/// Before `main`, so on the first thread, whose stack grows on demand. Test functions run on others.
#[used]
#[unsafe(link_section = ".init_array")]
static ON_THE_FIRST_THREAD: extern "C" fn() = {
    extern "C" fn first_thread() {
        if std::env::var_os(FIRST_THREAD).is_some() {
            let mut files = Files::new();
            for (turn, method) in METHODS.into_iter().enumerate() {
                hold::force(method);
                share_own_stack(&mut files);
                both_sides_write_to_stack(&mut files);
                share_lowest_and_grow(&mut files, (turn + 1) << 19);
            }
            std::process::exit(77);
        }
    }
    first_thread
};
const FIRST_THREAD: &str = "RINGFENCE_TEST_ON_FIRST_THREAD";

/// The stack's lowest pages, down to where the kernel has extended it, are shared while it grows further.
#[inline(never)]
fn share_lowest_and_grow(files: &mut Files, depth: usize) {
    let own = bystander::own()[0].clone();
    let sp = own.end - (16 << 10);
    // Earlier swaps have split it.
    let below = mappings(sp - (8 << 20)..sp);
    let lowest = below.iter().rev().fold(sp, |low, mapping| if low <= mapping.end { mapping.start } else { low });
    let length = sp + PAGE - lowest;
    let acquired = acquire(lowest, length, true, files).unwrap();
    assert_eq!(grow(depth), depth / PAGE);
    assert_eq!(acquired.segments.iter().map(|segment| segment.length).sum::<u64>(), acquired_length(lowest, length));
    release(lowest, length, files);
    assert_eq!(grow(depth + (1 << 20)), (depth + (1 << 20)) / PAGE);
}

fn acquired_length(address: usize, length: usize) -> u64 {
    (pages(address, length).unwrap().len() * PAGE) as u64
}

/// Uses at least so much stack, in a debug build twice that; the number of pages.
#[inline(never)]
fn grow(depth: usize) -> usize {
    let frame = std::hint::black_box([1u8; PAGE]);
    if depth <= PAGE { usize::from(frame[7]) } else { usize::from(frame[9]) + grow(depth - PAGE) }
}

#[test]
fn the_first_threads_stack_can_be_shared_and_still_grows() {
    let output = std::process::Command::new(std::env::current_exe().unwrap()).env(FIRST_THREAD, "1").output().unwrap();
    assert_eq!(output.status.code(), Some(77), "{}", String::from_utf8_lossy(&output.stderr));
}
