//! What the application does to its memory while that is registered has the effect that it has on private memory.

// UNSAFETY: changes mappings under the module.
#![allow(unsafe_code)]

use super::tests::{Files, Memory, assert_same_memory, mappings};
use super::*;
use crate::pages::interpose::{advise, remap};

const CHUNK: usize = swap::CHUNK;

/// Every way that keeps the application's own mapping.
const METHODS: [Option<&str>; 3] = [Some("alone"), Some("userfaultfd"), Some("stop")];

/// How many mappings this process has.
fn mapped() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().count()
}

/// Flags of the mapping at an address, as the kernel abbreviates them.
fn flags(address: usize) -> Vec<String> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        if let Some((start, end)) = range
            && let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
        {
            inside = (start..end).contains(&address);
        }
        if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
            return flags.split_whitespace().map(String::from).collect();
        }
    }
    panic!("nothing is mapped at {address:#x}");
}

#[test]
fn mappings_are_as_many_as_before() {
    let (mut files, memory) = (Files::new(), Memory::new(4096));
    for method in METHODS {
        hold::force(method);
        acquire(memory.address, PAGE, true, &mut files).unwrap();
        release(memory.address, PAGE, &mut files);
        let before = mapped();
        for at in 0..200 {
            let address = memory.address + at * 20 * PAGE;
            acquire(address + 40, 3 * PAGE, true, &mut files).unwrap();
            release(address + 40, 3 * PAGE, &mut files);
        }
        // Other tests are held off, but their threads' allocator is not.
        assert!(mapped() <= before + 3, "{method:?}: {before} mappings, then {}", mapped());
        assert_eq!(memory.mappings().len(), 1, "{method:?}");
    }
    hold::force(None);
    memory.assert_untouched();
}

#[test]
fn what_was_never_touched_becomes_one_mapping_again() {
    let mut files = Files::new();
    let address = sys::anonymous(8 * CHUNK).unwrap();
    acquire(address + 5 * PAGE, 3 * CHUNK, true, &mut files).unwrap();
    release(address + 5 * PAGE, 3 * CHUNK, &mut files);
    assert_eq!(mappings(address..address + 8 * CHUNK).len(), 1);
    // SAFETY: the test's own.
    unsafe { sys::munmap(address, 8 * CHUNK) };
}

/// Also when many parts of it are registered at once.
#[test]
fn what_was_never_touched_becomes_one_mapping_again_from_many() {
    let mut files = Files::new();
    for method in METHODS {
        hold::force(method);
        let address = sys::anonymous(400 * PAGE).unwrap();
        for _ in 0..3 {
            for page in (0..400).step_by(2) {
                acquire(address + page * PAGE, PAGE, true, &mut files).unwrap();
            }
            for page in (0..400).step_by(2) {
                release(address + page * PAGE, PAGE, &mut files);
            }
            assert_eq!(mappings(address..address + 400 * PAGE).len(), 1, "{method:?}");
        }
        // SAFETY: the test's own.
        unsafe { sys::munmap(address, 400 * PAGE) };
        let address = sys::anonymous(400 * PAGE).unwrap();
        for turn in 0..1200 {
            acquire(address + turn * 2 % 400 * PAGE, PAGE, true, &mut files).unwrap();
            if turn >= 50 {
                release(address + (turn - 50) * 2 % 400 * PAGE, PAGE, &mut files);
            }
        }
        for turn in 1150..1200 {
            release(address + turn * 2 % 400 * PAGE, PAGE, &mut files);
        }
        assert_eq!(mappings(address..address + 400 * PAGE).len(), 1, "{method:?}");
        // SAFETY: the test's own.
        unsafe { sys::munmap(address, 400 * PAGE) };
    }
    hold::force(None);
}

/// A page is moved away, and another one is registered in its place: each is its own.
#[test]
fn what_was_moved_away_before_its_place_is_registered_again_is_kept() {
    let (mut files, memory, elsewhere) = (Files::new(), Memory::new(2), Memory::new(2));
    acquire(memory.address, 2 * PAGE, true, &mut files).unwrap();
    // SAFETY: the test's own pages.
    unsafe {
        sys::move_pages(memory.address, 2 * PAGE, elsewhere.address).unwrap();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        sys::mmap(memory.address, 2 * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0).unwrap();
    }
    let again = acquire(memory.address, 2 * PAGE, true, &mut files).unwrap();
    elsewhere.assert_untouched();
    assert_eq!(memory.get(9), 0);
    release(memory.address, 2 * PAGE, &mut files);
    elsewhere.assert_untouched();
    assert_same_memory(&files, &again, memory.address, 2 * PAGE);
    release(memory.address, 2 * PAGE, &mut files);
    elsewhere.assert_untouched();
    assert!(files.views.is_empty());
}

#[test]
fn attributes_survive() {
    let mut files = Files::new();
    let address = sys::anonymous(4 * CHUNK).unwrap().next_multiple_of(CHUNK);
    // SAFETY: the test's own memory.
    unsafe {
        core::ptr::write_bytes(address as *mut u8, 7, CHUNK);
        sys::lock(address, CHUNK);
        for advice in [libc::MADV_DONTDUMP, libc::MADV_HUGEPAGE, libc::MADV_WIPEONFORK, libc::MADV_RANDOM] {
            advise(address, CHUNK, advice).unwrap();
        }
    }
    let before = flags(address);
    for wanted in ["lo", "dd", "hg", "wf", "rr"] {
        assert!(before.iter().any(|flag| flag == wanted), "{wanted} in {before:?}");
    }
    for method in METHODS {
        hold::force(method);
        acquire(address + 100, CHUNK - 200, true, &mut files).unwrap();
        let meanwhile = flags(address);
        for wanted in ["sh", "lo", "dd", "dc"] {
            assert!(meanwhile.iter().any(|flag| flag == wanted), "{wanted} in {meanwhile:?}");
        }
        release(address + 100, CHUNK - 200, &mut files);
        assert_eq!(flags(address), before, "{method:?}");
    }
    hold::force(None);
    // SAFETY: the test's own memory.
    unsafe {
        assert!((0..CHUNK).all(|at| *((address + at) as *const u8) == 7));
        sys::munmap(address, CHUNK);
    }
}

/// Locks that the application sets or ends while memory is registered are as it left them.
#[test]
fn locks_of_registered_memory_stay_as_they_are_set() {
    let (mut files, memory) = (Files::new(), Memory::new(8));
    let is_locked = || flags(memory.address).iter().any(|flag| flag == "lo");
    let locked_memory = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap()
    };
    let before = locked_memory();
    for lock in [true, false] {
        acquire(memory.address, memory.length, true, &mut files).unwrap();
        if lock {
            sys::lock(memory.address, memory.length)
        } else {
            sys::unlock(memory.address, memory.length)
        }
        release(memory.address, memory.length, &mut files);
        assert_eq!(is_locked(), lock);
        assert_eq!(locked_memory(), before + if lock { memory.length / 1024 } else { 0 }, "KiB are locked");
        assert_eq!(memory.mappings().len(), 1);
        memory.assert_untouched();
    }
}

/// Advice that drops contents gives zeros at once, and the region keeps its pages.
#[test]
fn dropped_contents_are_gone() {
    for advice in [libc::MADV_DONTNEED, libc::MADV_FREE] {
        let (mut files, memory) = (Files::new(), Memory::new(12));
        let acquired = acquire(memory.address + 2 * PAGE, 8 * PAGE, true, &mut files).unwrap();
        advise(memory.address, 4 * PAGE, advice).unwrap();
        for page in 2..4 {
            assert_eq!(memory.get(page * PAGE + 5), 0, "advice {advice}");
            // SAFETY: the other side's view.
            assert_ne!(unsafe { *files.view(&acquired, (page - 2) * PAGE + 5) }, 0, "a pinned page stays");
        }
        assert_eq!(memory.get(4 * PAGE + 5), (4 * 31 + 4 * PAGE + 5) as u8);
        assert!(!still_acquired(memory.address + 2 * PAGE, 8 * PAGE, true, &acquired));
        memory.set(2 * PAGE, 77);
        // What is registered anew is what stands there now.
        let again = acquire(memory.address + 2 * PAGE, 8 * PAGE, true, &mut files).unwrap();
        assert_same_memory(&files, &again, memory.address + 2 * PAGE, 8 * PAGE);
        release(memory.address + 2 * PAGE, 8 * PAGE, &mut files);
        advise(memory.address + 6 * PAGE, PAGE, advice).unwrap();
        release(memory.address + 2 * PAGE, 8 * PAGE, &mut files);
        assert_eq!((memory.get(2 * PAGE), memory.get(3 * PAGE), memory.get(6 * PAGE)), (77, 0, 0));
        assert_eq!(memory.mappings().len(), 1, "advice {advice}");
        assert!(files.views.is_empty());
    }
}

#[test]
fn advice_about_private_memory_is_answered_as_for_private_memory() {
    let (mut files, memory) = (Files::new(), Memory::new(8));
    acquire(memory.address, 4 * PAGE, true, &mut files).unwrap();
    let all = |advice| advise(memory.address, 8 * PAGE, advice);
    assert_eq!(all(libc::MADV_REMOVE), Err(libc::EINVAL));
    assert_eq!(all(libc::MADV_WIPEONFORK), Ok(()));
    assert_eq!(all(libc::MADV_DONTFORK), Ok(()));
    assert_eq!(all(libc::MADV_DOFORK), Ok(()));
    assert!(flags(memory.address).iter().any(|flag| flag == "dc"), "a child would share the region");
    assert_eq!(all(libc::MADV_KEEPONFORK), Ok(()));
    assert_eq!(all(12345), Err(libc::EINVAL));
    assert_eq!(advise(memory.address + 1, PAGE, libc::MADV_DONTNEED), Err(libc::EINVAL));
    assert_eq!(advise(memory.address, 0, libc::MADV_DONTNEED), Ok(()));
    release(memory.address, 4 * PAGE, &mut files);
    memory.assert_untouched();
    assert_eq!(memory.mappings().len(), 1);
}

/// As `realloc` of the C library does it, which calls no function of ours: the region's file is what grows.
#[test]
fn a_mapping_that_was_moved_and_has_grown_keeps_its_contents() {
    for order in [false, true] {
        let (mut files, memory) = (Files::new(), Memory::new(16));
        acquire(memory.address, memory.length, true, &mut files).unwrap();
        // SAFETY: the test's own pages.
        let grown = unsafe { sys::grow(memory.address, memory.length, 64 * PAGE).unwrap() };
        let memory = core::mem::ManuallyDrop::new(memory);
        let byte = |at: usize| (grown + at) as *mut u8;
        // SAFETY: the mapping that has grown.
        unsafe {
            assert!((0..memory.length).all(|at| byte(at).read_volatile() == (at / PAGE * 31 + at) as u8));
            assert!((memory.length..64 * PAGE).all(|at| byte(at).read_volatile() == 0));
            (0..64 * PAGE).for_each(|at| byte(at).write_volatile(9));
        }
        if order {
            let again = acquire(grown, 64 * PAGE, true, &mut files).unwrap();
            assert_same_memory(&files, &again, grown, 64 * PAGE);
            release(memory.address, memory.length, &mut files);
            assert_same_memory(&files, &again, grown, 64 * PAGE);
        } else {
            release(memory.address, memory.length, &mut files);
            assert!(files.views.is_empty());
            acquire(grown, 64 * PAGE, true, &mut files).unwrap();
        }
        release(grown, 64 * PAGE, &mut files);
        // SAFETY: as above.
        unsafe {
            assert!((0..64 * PAGE).all(|at| byte(at).read_volatile() == 9));
            assert!(mappings(grown..grown + 64 * PAGE).iter().all(|mapping| !mapping.shared));
            sys::munmap(grown, 64 * PAGE);
        }
        assert!(files.views.is_empty());
    }
}

#[test]
fn the_programs_own_mremap_works_on_any_part() {
    let (mut files, memory) = (Files::new(), Memory::new(16));
    acquire(memory.address + 4 * PAGE, 4 * PAGE, true, &mut files).unwrap();
    // Part of it is shared: the kernel would refuse to enlarge three mappings as one.
    let grown = remap(memory.address, 16 * PAGE, 32 * PAGE, libc::MREMAP_MAYMOVE, 0).unwrap();
    let memory = core::mem::ManuallyDrop::new(memory);
    for at in 0..16 * PAGE {
        // SAFETY: the mapping that has grown.
        assert_eq!(unsafe { *((grown + at) as *const u8) }, (at / PAGE * 31 + at) as u8, "byte {at}");
    }
    assert_eq!(mappings(grown..grown + 32 * PAGE).len(), 1);
    assert_eq!(
        remap(grown, 0, PAGE, libc::MREMAP_MAYMOVE, 0),
        Err(libc::EINVAL),
        "private memory cannot be mapped twice"
    );
    release(memory.address + 4 * PAGE, 4 * PAGE, &mut files);
    // SAFETY: the test's own.
    unsafe { sys::munmap(grown, 32 * PAGE) };
    assert!(files.views.is_empty());
}

/// What is several mappings to the kernel is one to the program.
#[test]
fn the_programs_own_mremap_moves_regions_whose_ends_are_apart() {
    let (mut files, memory) = (Files::with_ends_apart(), Memory::new(16));
    let (address, length) = (memory.address + 16, 15 * PAGE);
    let acquired = acquire(address, length, true, &mut files).unwrap();
    assert_eq!(memory.mappings().len(), 3);
    let elsewhere = sys::anonymous(16 * PAGE).unwrap();
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    assert_eq!(remap(memory.address, 16 * PAGE, 16 * PAGE, flags, memory.address + PAGE), Err(libc::EINVAL));
    assert_eq!(remap(memory.address, 16 * PAGE, 16 * PAGE, flags, elsewhere), Ok(elsewhere));
    let memory = core::mem::ManuallyDrop::new(memory);
    let moved = core::mem::ManuallyDrop::new(Memory { address: elsewhere, length: memory.length });
    moved.assert_untouched();
    // Another thread of this process may have mapped something there.
    assert!(mappings(memory.address..memory.address + memory.length).iter().all(|mapping| !mapping.shared));
    assert_same_memory(&files, &acquired, elsewhere + 16, length);
    // Nothing is where the program's addresses end: all stays.
    let too_high = (1 << 47) - 3 * PAGE;
    assert!(remap(elsewhere, 16 * PAGE, 16 * PAGE, flags, too_high).is_err());
    moved.assert_untouched();
    assert_same_memory(&files, &acquired, elsewhere + 16, length);
    // It becomes shorter as it moves, or where it is.
    let again = sys::anonymous(16 * PAGE).unwrap();
    assert_eq!(remap(elsewhere, 16 * PAGE, 14 * PAGE - 1, flags, again), Ok(again));
    assert_same_memory(&files, &acquired, again + 16, 14 * PAGE - 16);
    let elsewhere = again;
    assert_eq!(remap(elsewhere, 14 * PAGE, 12 * PAGE, 0, 0), Ok(elsewhere));
    release(address, length, &mut files);
    assert!(files.views.is_empty());
    // SAFETY: the test's own.
    unsafe { sys::munmap(elsewhere, 12 * PAGE) };
}

#[test]
fn memory_that_was_protected_meanwhile_stays_so() {
    let (mut files, memory) = (Files::new(), Memory::new(8));
    acquire(memory.address, memory.length, true, &mut files).unwrap();
    // SAFETY: the test's own pages.
    unsafe {
        sys::mprotect(memory.address + PAGE, PAGE, libc::PROT_READ).unwrap();
        sys::mprotect(memory.address + 4 * PAGE, 2 * PAGE, libc::PROT_NONE).unwrap();
    }
    release(memory.address, memory.length, &mut files);
    let protections: Vec<i32> = memory.mappings().iter().map(|mapping| mapping.protection).collect();
    assert_eq!(protections, [3, 1, 3, 0, 3]);
    // SAFETY: as above.
    unsafe { sys::mprotect(memory.address, memory.length, libc::PROT_READ | libc::PROT_WRITE).unwrap() };
    memory.assert_untouched();
    assert!(files.views.is_empty());
}

/// A thousand regions cost no descriptor, and what is given back needs no more memory than a chunk.
#[test]
fn regions_need_no_descriptors() {
    let (mut files, memory) = (Files::new(), Memory::new(256));
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    acquire(memory.address, PAGE, true, &mut files).unwrap();
    let before = open();
    for page in 1..128 {
        acquire(memory.address + 2 * page * PAGE, PAGE, true, &mut files).unwrap();
    }
    assert_eq!(open(), before);
    for page in 0..128 {
        release(memory.address + 2 * page * PAGE, PAGE, &mut files);
    }
    assert_eq!(open(), before);
    memory.assert_untouched();
    assert_eq!(memory.mappings().len(), 1);
}

/// Sets a limit on files as soon as the proxy, which has none, has made one.
struct Limited(Files);

fn limit_files(bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a limit of this process, while other tests are held off.
    unsafe { assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0) };
}

impl Regions for Limited {
    fn allocate(&mut self, bytes: u64) -> Result<(u32, i32), i32> {
        self.0.allocate(bytes).inspect(|_| limit_files(0))
    }

    fn free(&mut self, region: u32) {
        self.0.free(region);
    }
}

#[test]
fn a_limit_on_files_does_not_matter() {
    let (mut files, memory) = (Limited(Files::new()), Memory::new(600));
    let acquired = acquire(memory.address, memory.length, true, &mut files);
    limit_files(libc::RLIM_INFINITY);
    assert_same_memory(&files.0, &acquired.unwrap(), memory.address, memory.length);
    release(memory.address, memory.length, &mut files);
    memory.assert_untouched();
}
