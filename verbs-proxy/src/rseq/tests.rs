//! Sequences that are interrupted, and not.

use super::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn thread() -> Thread {
    Thread::current().expect("this kernel and C library have restartable sequences")
}

fn copy(to: &mut [u8], from: &[u8], word: &AtomicU64, is: u64) -> Result<(), Undone> {
    assert!(from.len() <= to.len());
    // SAFETY: the assertion; all three live across the call.
    unsafe { thread().copy(to.as_mut_ptr(), from.as_ptr(), from.len(), While { word: word.as_ptr(), is }) }
}

#[test]
fn copies_of_every_length_and_alignment_are_whole() {
    let word = AtomicU64::new(7);
    let lengths = (0..80).chain([LONGEST - 1, LONGEST, LONGEST + 1, 3 * LONGEST + 5]);
    for bytes in lengths {
        for shift in 0..9 {
            let data: Vec<u8> = (0..bytes).map(|i| (i as u8).wrapping_add(1)).collect();
            let mut to = vec![0; bytes + 10];
            copy(&mut to[shift..], &data, &word, 7).unwrap();
            assert_eq!((&to[shift..shift + bytes], to[shift + bytes]), (&data[..], 0), "{bytes} at {shift}");
        }
    }
}

#[test]
fn nothing_is_done_once_the_word_has_another_value() {
    let word = AtomicU64::new(8);
    for bytes in [1, 4, 8, 100, 2 * LONGEST] {
        let mut to = vec![0; bytes];
        assert_eq!(copy(&mut to, &vec![1; bytes], &word, 7), Err(Undone::Gone));
        assert!(to.iter().all(|byte| *byte == 0));
    }
    let place = AtomicU64::new(5);
    let gone = While { word: word.as_ptr(), is: 7 };
    // SAFETY: aligned, and both live across the calls.
    unsafe {
        assert_eq!(thread().add(place.as_ptr().cast(), 1, gone), Err(Undone::Gone));
        assert_eq!(thread().compare_exchange(place.as_ptr().cast(), 5, 1, gone), Err(Undone::Gone));
    }
    assert_eq!(place.load(Ordering::Relaxed), 5);
}

#[test]
fn atomics_say_what_was_there() {
    let (word, place) = (AtomicU64::new(7), AtomicU64::new(5));
    let holds = While { word: word.as_ptr(), is: 7 };
    let at = place.as_ptr().cast();
    // SAFETY: aligned, and both live across the calls.
    unsafe {
        assert_eq!(thread().add(at, 3, holds), Ok(5));
        assert_eq!(thread().compare_exchange(at, 5, 1, holds), Ok(8));
        assert_eq!(thread().compare_exchange(at, 8, 1, holds), Ok(8));
    }
    assert_eq!(place.load(Ordering::Relaxed), 1);
}

/// A thread that is interrupted by a signal wherever it may be adds exactly as often as it says.
#[test]
fn interruptions_neither_lose_nor_repeat_an_atomic() {
    extern "C" fn nothing(_: i32) {}
    let (word, place) = (AtomicU64::new(7), AtomicU64::new(0));
    let ended = AtomicBool::new(false);
    let (identify, identity) = std::sync::mpsc::channel();
    // SAFETY: a handler that does nothing.
    unsafe { libc::signal(libc::SIGURG, nothing as *const () as usize) };
    std::thread::scope(|scope| {
        let adder = scope.spawn(|| {
            // SAFETY: it has no preconditions.
            identify.send(unsafe { libc::pthread_self() }).unwrap();
            let holds = While { word: word.as_ptr(), is: 7 };
            let mut done = 0;
            while !ended.load(Ordering::Relaxed) {
                // SAFETY: aligned, and both live across the call.
                let before = unsafe { thread().add(place.as_ptr().cast(), 1, holds) };
                if let Ok(before) = before {
                    assert_eq!(before, done);
                    done += 1;
                }
            }
            done
        });
        let id = identity.recv().unwrap();
        let until = Instant::now() + Duration::from_millis(300);
        while Instant::now() < until {
            // SAFETY: the thread is joined after this.
            unsafe { libc::pthread_kill(id, libc::SIGURG) };
            std::thread::yield_now();
        }
        ended.store(true, Ordering::Relaxed);
        assert_eq!(adder.join().unwrap(), place.load(Ordering::Relaxed));
    });
}

/// A copier that is stopped over and over: once the word has changed and it is not running, nothing lands.
#[test]
fn nothing_lands_after_a_stop_that_the_change_came_in() {
    // SAFETY: anonymous memory that parent and child share.
    let shared = unsafe {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        libc::mmap(std::ptr::null_mut(), 1 << 20, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    assert_ne!(shared, libc::MAP_FAILED);
    let base: *mut u8 = shared.cast();
    // SAFETY: aligned, at the start of the mapping.
    let word = unsafe { AtomicU64::from_ptr(base.cast()) };
    const AT: usize = 4096;
    const BYTES: usize = 10_000;
    // SAFETY: the child makes no call but `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let Some(thread) = Thread::current() else {
            // SAFETY: it has no preconditions.
            unsafe { libc::_exit(1) }
        };
        for count in 0u64.. {
            let is = word.load(Ordering::Relaxed);
            if is == u64::MAX {
                // SAFETY: it has no preconditions.
                unsafe { libc::_exit(0) };
            }
            if is % 2 == 1 {
                // Each copy can be told from the last.
                // SAFETY: both ranges are in the mapping.
                unsafe {
                    base.add(AT + 2 * BYTES).write_bytes(count as u8, BYTES);
                    let _ = thread.copy(base.add(AT), base.add(AT + 2 * BYTES), BYTES, While { word: base.cast(), is });
                }
            }
        }
    }
    // Where a stop meets it is the kernel's affair: as many as it takes until some came inside a copy.
    let (mut inside, mut round, until) = (0, 0u64, Instant::now() + Duration::from_secs(60));
    while round < 400 || (inside < 3 && Instant::now() < until) {
        round += 1;
        word.store(2 * round + 1, Ordering::SeqCst);
        let pause = Instant::now() + Duration::from_micros(20 + round % 37 * 7);
        while Instant::now() < pause {
            std::hint::spin_loop();
        }
        let mut status = 0;
        // SAFETY: our own child.
        unsafe {
            libc::kill(child, libc::SIGSTOP);
            libc::waitpid(child, &raw mut status, libc::WUNTRACED);
        }
        word.store(2 * round + 2, Ordering::SeqCst);
        // SAFETY: in the mapping; the child is stopped.
        let area = unsafe { std::slice::from_raw_parts_mut(base.add(AT), BYTES) };
        inside += u32::from(area.iter().any(|byte| *byte != area[0]));
        area.fill(0xee);
        // SAFETY: our own child.
        unsafe { libc::kill(child, libc::SIGCONT) };
        std::thread::sleep(Duration::from_micros(100));
        assert!(area.iter().all(|byte| *byte == 0xee), "something landed in round {round}");
    }
    word.store(u64::MAX, Ordering::SeqCst);
    let mut status = 0;
    // SAFETY: our own child.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0);
    println!("stopped inside a copy {inside} times of {round}");
    assert!(inside > 0, "never stopped inside a copy, {round} times");
}
