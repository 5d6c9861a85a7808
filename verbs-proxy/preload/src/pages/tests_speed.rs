//! What registration costs; run with `--release -- --ignored --nocapture`.

// UNSAFETY: large memory, and copies of it.
#![allow(unsafe_code)]

use super::tests::Files;
use super::*;
use std::time::{Duration, Instant};

fn time<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = work();
    (start.elapsed(), result)
}

/// The median of several runs of `sample`.
fn median(runs: usize, mut sample: impl FnMut() -> Duration) -> Duration {
    let mut all: Vec<_> = (0..runs).map(|_| sample()).collect();
    all.sort();
    all[runs / 2]
}

fn touched(bytes: usize, huge: bool) -> usize {
    let align = 2 << 20;
    let address = sys::anonymous(bytes + align).unwrap().next_multiple_of(align);
    // SAFETY: the mapping just made.
    unsafe {
        if huge {
            libc::madvise(address as *mut _, bytes, libc::MADV_HUGEPAGE);
        }
        core::ptr::write_bytes(address as *mut u8, 7, bytes);
    }
    address
}

#[test]
#[ignore = "measures"]
fn acquire_beside_pwrite() {
    for (name, bytes, runs) in [("4 KiB", 4 << 10, 201), ("1 MiB", 1 << 20, 101), ("1 GiB", 1 << 30, 5)] {
        let mut files = Files::new();
        let address = touched(bytes, false);
        for method in [None, Some("userfaultfd"), Some("stop"), Some("signals")] {
            hold::force(method);
            let mut released = Vec::new();
            let mut touching = Vec::new();
            let mut written = Vec::new();
            let acquired = median(runs, || {
                // In turn, so that both meet the machine in the same state.
                let (region, file) = files.allocate(bytes as u64).unwrap();
                written.push(time(|| sys::pwrite(file, address, bytes, 0).unwrap()).0);
                files.free(region);
                sys::close(file);
                let (duration, result) = time(|| acquire(address, bytes, true, &mut files));
                result.unwrap();
                let touch = || {
                    for at in (address..address + bytes).step_by(PAGE) {
                        // SAFETY: the test's own memory.
                        unsafe { (at as *mut u8).write_volatile(9) };
                    }
                };
                touching.push(time(touch).0);
                released.push(time(|| release(address, bytes, &mut files)).0);
                duration
            });
            written.sort();
            released.sort();
            touching.sort();
            println!(
                "{name} {}: pwrite {:?}, acquire {acquired:?}, then first touch {:?}, release {:?}",
                method.unwrap_or("by itself"),
                written[runs / 2],
                touching[runs / 2],
                released[runs / 2]
            );
        }
        hold::force(None);
    }
}

#[test]
#[ignore = "measures"]
fn streaming_over_shared_memory() {
    const BYTES: usize = 64 << 20;
    let mut files = Files::new();
    let source = touched(BYTES, true);
    let stream = |target: usize| {
        // SAFETY: both are the test's own and as long.
        let copy = || unsafe { core::ptr::copy_nonoverlapping(source as *const u8, target as *mut u8, BYTES) };
        copy();
        let duration = median(9, || time(copy).0);
        BYTES as f64 / duration.as_secs_f64() / 1e9
    };
    let random = |target: usize| {
        let lines = BYTES / 64;
        let walk = || {
            let mut at = 1usize;
            for _ in 0..1 << 20 {
                at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                // SAFETY: inside the memory.
                unsafe { ((target + (at >> 33) % lines * 64) as *mut u64).write_volatile(1) };
            }
        };
        median(9, || time(walk).0).as_nanos() as f64 / (1 << 20) as f64
    };
    for (name, huge) in [("small", false), ("huge", true)] {
        let address = touched(BYTES, huge);
        println!("private, {name} pages: {:.2} GB/s, {:.1} ns a random write", stream(address), random(address));
        let (duration, acquired) = time(|| acquire(address, BYTES, true, &mut files).unwrap());
        println!("acquired in {duration:?}: {:.2} GB/s, {:.1} ns", stream(address), random(address));
        // SAFETY: asks for huge pages in the test's own memory.
        let (duration, result) = time(|| unsafe { sys::call(libc::SYS_madvise, [address, BYTES, 25, 0, 0, 0]) });
        println!("collapsed in {duration:?} ({result:?}): {:.2} GB/s, {:.1} ns", stream(address), random(address));
        let view = files.view(&acquired, 0) as usize;
        println!("other side's view: {:.2} GB/s, {:.1} ns", stream(view), random(view));
        release(address, BYTES, &mut files);
    }
}

/// Hundreds of threads, all of which are stopped while pages are replaced, and one.
#[test]
#[ignore = "measures"]
fn acquire_among_many_threads() {
    use std::sync::atomic::{AtomicBool, Ordering::*};
    const BYTES: usize = 256 << 20;
    let mut files = Files::new();
    let address = touched(BYTES, false);
    for threads in [1, 300] {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sleep = || {
                while !done.load(Relaxed) {
                    std::thread::park();
                }
            };
            let sleepers: Vec<_> = (0..threads).map(|_| scope.spawn(sleep)).collect();
            hold::force(Some("stop"));
            let (mut acquired, mut released) = (Duration::MAX, Duration::MAX);
            for _ in 0..5 {
                acquired = acquired.min(time(|| acquire(address, BYTES, true, &mut files).unwrap()).0);
                released = released.min(time(|| release(address, BYTES, &mut files)).0);
            }
            println!("256 MiB beside {threads} threads: acquired in {acquired:?}, released in {released:?}");
            hold::force(None);
            done.store(true, Relaxed);
            sleepers.iter().for_each(|sleeper| sleeper.thread().unpark());
        });
    }
    // SAFETY: the test's own memory, which nothing refers to.
    unsafe { sys::munmap(address, BYTES) };
}
