//! The module against real memory. One process has one table, so each test keeps to its own addresses.

// UNSAFETY: maps memory twice to look at it from both sides.
#![allow(unsafe_code)]

use super::*;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Memory files; the second mapping of each is what the proxy would see.
pub struct Files {
    _alone: MutexGuard<'static, ()>,
    pub views: BTreeMap<u32, (usize, usize)>,
    /// See [`Regions::keeps_ends_apart`].
    keeps_ends_apart: bool,
}

impl Files {
    /// Holds off all other tests: they could map something where this one unmaps.
    pub fn new() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        Self { _alone: alone, views: BTreeMap::new(), keeps_ends_apart: false }
    }

    /// Those of a proxy that shows memory to others.
    pub fn with_ends_apart() -> Self {
        Self { keeps_ends_apart: true, ..Self::new() }
    }
}

static ALONE: Mutex<()> = Mutex::new(());
static NEXT: AtomicU32 = AtomicU32::new(1);

impl Regions for Files {
    fn allocate(&mut self, bytes: u64) -> Result<(u32, i32), i32> {
        // SAFETY: makes a file and maps it anywhere.
        unsafe {
            let file = libc::syscall(libc::SYS_memfd_create, c"region".as_ptr(), libc::MFD_ALLOW_SEALING) as i32;
            assert!(file >= 0);
            assert_eq!(libc::ftruncate(file, bytes as i64 + (1 << 40)), 0);
            assert_eq!(libc::fcntl(file, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW), 0);
            let (all, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
            let view = libc::mmap(core::ptr::null_mut(), bytes as usize, all, shared, file, 0);
            assert_ne!(view, libc::MAP_FAILED);
            // Region numbers are unique in the process, as the proxy's are in a connection.
            let region = NEXT.fetch_add(1, Ordering::Relaxed);
            self.views.insert(region, (view as usize, bytes as usize));
            Ok((region, file))
        }
    }

    fn free(&mut self, region: u32) {
        let (view, bytes) = self.views.remove(&region).expect("freed once");
        // As the proxy does: nobody may rely on the contents any more.
        // SAFETY: the view is the test's own.
        assert_eq!(unsafe { libc::madvise(view as *mut _, bytes, libc::MADV_REMOVE) }, 0);
        // SAFETY: the view is not used after the region is free.
        unsafe { libc::munmap(view as *mut _, bytes) };
    }

    fn keeps_ends_apart(&self, _: u64) -> bool {
        self.keeps_ends_apart
    }

    fn is_own(&self, address: usize) -> bool {
        self.views.values().any(|(view, _)| *view == address)
    }
}

impl Files {
    /// Where the other side sees the byte `at` of what was acquired.
    pub fn view(&self, acquired: &Acquired, at: usize) -> *mut u8 {
        let mut position = acquired.first_offset + at as u64;
        for segment in &acquired.segments {
            if position < segment.length {
                let (view, bytes) = self.views[&segment.region];
                assert!(segment.offset + segment.length <= bytes as u64);
                return (view + (segment.offset + position) as usize) as *mut u8;
            }
            position -= segment.length;
        }
        panic!("byte {at} is beyond {acquired:?}");
    }
}

/// Fresh pages, unmapped at the end.
pub struct Memory {
    pub address: usize,
    pub length: usize,
}

impl Memory {
    pub fn new(pages: usize) -> Self {
        let memory = Self { address: sys::anonymous(pages * PAGE).unwrap(), length: pages * PAGE };
        for at in 0..memory.length {
            memory.set(at, (at / PAGE * 31 + at) as u8);
        }
        memory
    }

    pub fn get(&self, at: usize) -> u8 {
        assert!(at < self.length);
        // SAFETY: inside the mapping.
        unsafe { ((self.address + at) as *const u8).read_volatile() }
    }

    pub fn set(&self, at: usize, value: u8) {
        assert!(at < self.length);
        // SAFETY: inside the mapping.
        unsafe { ((self.address + at) as *mut u8).write_volatile(value) }
    }

    #[track_caller]
    pub fn assert_untouched(&self) {
        for at in 0..self.length {
            assert_eq!(self.get(at), (at / PAGE * 31 + at) as u8, "byte {at}");
        }
    }

    pub fn mappings(&self) -> Vec<maps::Mapping> {
        mappings(self.address..self.address + self.length)
    }
}

pub fn mappings(range: Range<usize>) -> Vec<maps::Mapping> {
    let mut mappings = Array::new();
    // Its own memory would be mapped in the middle of the question otherwise.
    mappings.reserve(64).unwrap();
    maps::read(&range, &mut mappings).unwrap();
    mappings.to_vec()
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: ours alone.
        unsafe { sys::munmap(self.address, self.length) };
    }
}

/// Writes on either side appear on the other.
#[track_caller]
pub fn assert_same_memory(files: &Files, acquired: &Acquired, address: usize, length: usize) {
    for at in (0..length).step_by(509).chain([length - 1]) {
        let (here, there) = ((address + at) as *mut u8, files.view(acquired, at));
        // SAFETY: both are mapped; the test is the only user.
        unsafe {
            let before = here.read_volatile();
            assert_eq!(there.read_volatile(), before, "byte {at}");
            here.write_volatile(before ^ 0x55);
            assert_eq!(there.read_volatile(), before ^ 0x55, "byte {at}");
            there.write_volatile(before);
            assert_eq!(here.read_volatile(), before, "byte {at}");
        }
    }
}

#[test]
fn both_sides_see_the_same_memory() {
    let (mut files, memory) = (Files::new(), Memory::new(700));
    let (address, length) = (memory.address + 100, memory.length - 300);
    let acquired = acquire(address, length, true, &mut files).unwrap();
    assert_eq!(acquired.first_offset, 100);
    assert_eq!(acquired.segments.len(), 1);
    memory.assert_untouched();
    assert_same_memory(&files, &acquired, address, length);
    release(address, length, &mut files);
    memory.assert_untouched();
    assert!(files.views.is_empty());
    assert!(memory.mappings().iter().all(|mapping| !mapping.shared && mapping.inode == 0));
}

/// The inner pages are a region's that has nothing else.
#[test]
fn ends_are_kept_apart() {
    let (mut files, memory) = (Files::with_ends_apart(), Memory::new(700));
    #[track_caller]
    fn case(files: &mut Files, memory: &Memory, at: usize, length: usize, expected: &[usize]) {
        let acquired = acquire(memory.address + at, length, true, files).unwrap();
        assert_eq!(acquired.first_offset, (at % PAGE) as u64);
        let pages: Vec<_> = acquired.segments.iter().map(|segment| segment.length as usize / PAGE).collect();
        assert_eq!(pages, expected, "{at}, {length}");
        assert!(acquired.segments.iter().all(|segment| segment.offset == 0));
        assert_same_memory(files, &acquired, memory.address + at, length);
        assert!(still_acquired(memory.address + at, length, true, &acquired));
        release(memory.address + at, length, files);
        memory.assert_untouched();
        assert!(files.views.is_empty());
        assert_eq!(memory.mappings().len(), 1);
    }
    case(&mut files, &memory, 16, 600 * PAGE, &[1, 599, 1]);
    case(&mut files, &memory, 0, 600 * PAGE + 1, &[600, 1]);
    case(&mut files, &memory, PAGE - 1, 600 * PAGE + 1, &[1, 600]);
    case(&mut files, &memory, PAGE, 600 * PAGE, &[600]);
    case(&mut files, &memory, 16, PAGE, &[1, 1]);
    // Some is there already: of a part that cannot be had nothing stays.
    let whole = acquire(memory.address, 2 * PAGE, true, &mut files).unwrap();
    let more = acquire(memory.address + 16, 5 * PAGE, true, &mut files).unwrap();
    assert_eq!(more.segments[0].region, whole.segments[0].region);
    // SAFETY: the test's own page.
    unsafe { sys::mprotect(memory.address + 8 * PAGE, PAGE, libc::PROT_READ).unwrap() };
    let before = memory.mappings().len();
    assert_eq!(acquire(memory.address + 4 * PAGE + 16, 4 * PAGE, true, &mut files), Err(libc::EFAULT));
    assert_eq!(memory.mappings().len(), before);
    // What is read-only is not shared in parts.
    let read = acquire(memory.address + 6 * PAGE + 16, 3 * PAGE, false, &mut files).unwrap();
    assert_eq!(read.segments.len(), 1);
    release(memory.address + 6 * PAGE + 16, 3 * PAGE, &mut files);
    assert_same_memory(&files, &more, memory.address + 16, 5 * PAGE);
    release(memory.address, 2 * PAGE, &mut files);
    release(memory.address + 16, 5 * PAGE, &mut files);
    assert!(files.views.is_empty());
    memory.assert_untouched();
}

#[test]
fn overlapping_ranges_share_pages() {
    let (mut files, memory) = (Files::new(), Memory::new(12));
    let first = (memory.address + 2 * PAGE + 5, 3 * PAGE);
    let second = (memory.address + 7, 10 * PAGE);
    let small = acquire(first.0, first.1, true, &mut files).unwrap();
    let large = acquire(second.0, second.1, true, &mut files).unwrap();
    assert_eq!(large.segments.len(), 3);
    assert_eq!(files.view(&small, 0), files.view(&large, first.0 - second.0));
    assert_same_memory(&files, &large, second.0, second.1);
    release(first.0, first.1, &mut files);
    assert_same_memory(&files, &large, second.0, second.1);
    release(second.0, second.1, &mut files);
    memory.assert_untouched();
    assert!(files.views.is_empty());
}

#[test]
fn freed_parts_of_a_region_return_to_the_system() {
    let (mut files, memory) = (Files::new(), Memory::new(8));
    acquire(memory.address, memory.length, true, &mut files).unwrap();
    let kept = acquire(memory.address + PAGE, PAGE, true, &mut files).unwrap();
    release(memory.address, memory.length, &mut files);
    let (view, bytes) = files.views[&kept.segments[0].region];
    let mut resident = [0u8; 8];
    // SAFETY: one byte for each page.
    assert_eq!(unsafe { libc::mincore(view as *mut _, bytes, resident.as_mut_ptr()) }, 0);
    assert_eq!(resident.map(|byte| byte & 1), [0, 1, 0, 0, 0, 0, 0, 0]);
    memory.assert_untouched();
    release(memory.address + PAGE, PAGE, &mut files);
    memory.assert_untouched();
}

#[test]
fn memory_moved_while_registered_keeps_its_contents() {
    let (mut files, memory) = (Files::new(), Memory::new(4));
    acquire(memory.address, memory.length, true, &mut files).unwrap();
    let elsewhere = sys::anonymous(2 * PAGE).unwrap();
    // SAFETY: the test's own pages.
    unsafe { sys::move_pages(memory.address, 2 * PAGE, elsewhere).unwrap() };
    release(memory.address, memory.length, &mut files);
    for at in 0..memory.length {
        let address = if at < 2 * PAGE { elsewhere + at } else { memory.address + at };
        // SAFETY: mapped by this test.
        assert_eq!(unsafe { *(address as *const u8) }, (at / PAGE * 31 + at) as u8, "byte {at}");
    }
    // Wherever it is, it is private again, and the region is free.
    assert!(mappings(elsewhere..elsewhere + 2 * PAGE).iter().all(|mapping| !mapping.shared));
    assert!(files.views.is_empty());
    // SAFETY: as above.
    unsafe { sys::munmap(elsewhere, 2 * PAGE) };
}

#[test]
fn unusable_memory_is_refused_and_left_alone() {
    let (mut files, memory) = (Files::new(), Memory::new(6));
    let page = |number: usize| memory.address + number * PAGE;
    // SAFETY: the test's own pages.
    unsafe {
        sys::munmap(page(1), PAGE);
        sys::mprotect(page(3), PAGE, libc::PROT_NONE).unwrap();
        sys::mprotect(page(4), PAGE, libc::PROT_READ).unwrap();
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        sys::mmap(page(5), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0).unwrap();
    }
    assert_eq!(acquire(page(0), 2 * PAGE, true, &mut files), Err(libc::EFAULT));
    assert_eq!(acquire(page(2), 2 * PAGE, true, &mut files), Err(libc::EFAULT));
    assert_eq!(acquire(page(4), 1, true, &mut files), Err(libc::EFAULT));
    assert_eq!(acquire(page(5), 1, true, &mut files), Err(libc::EOPNOTSUPP));
    assert_eq!(acquire(page(0), 0, true, &mut files), Err(libc::EINVAL));
    assert_eq!(acquire(usize::MAX - 5, 20, true, &mut files), Err(libc::EINVAL));
    assert!(files.views.is_empty());
    acquire(page(4), 1, false, &mut files).unwrap();
    release(page(4), 1, &mut files);
    assert!(files.views.is_empty());
}

#[test]
fn memory_replaced_while_registered_is_shared_anew() {
    let (mut files, memory) = (Files::new(), Memory::new(4));
    acquire(memory.address, memory.length, true, &mut files).unwrap();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: the test's own pages.
    unsafe { sys::mmap(memory.address + PAGE, 2 * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0).unwrap() };
    let again = acquire(memory.address, memory.length, true, &mut files).unwrap();
    assert_eq!(again.segments.len(), 3);
    assert_eq!(memory.get(PAGE), 0);
    assert_same_memory(&files, &again, memory.address, memory.length);
    release(memory.address, memory.length, &mut files);
    assert_same_memory(&files, &again, memory.address, memory.length);
    release(memory.address, memory.length, &mut files);
    assert!(files.views.is_empty());
}

#[test]
fn memory_unmapped_while_registered_stays_unmapped() {
    let (mut files, memory) = (Files::new(), Memory::new(4));
    acquire(memory.address, memory.length, true, &mut files).unwrap();
    // SAFETY: the test's own pages.
    unsafe { sys::munmap(memory.address + PAGE, PAGE) };
    release(memory.address, memory.length, &mut files);
    // Another thread of this process may have mapped something there.
    assert!(memory.mappings().iter().all(|mapping| !mapping.shared));
    for page in [0, 2, 3] {
        assert_eq!(memory.get(page * PAGE + 7), (page * 31 + page * PAGE + 7) as u8);
    }
    assert!(files.views.is_empty());
}

#[test]
fn whether_memory_is_still_as_acquired_is_known() {
    for without in [false, true] {
        maps::without_query(without);
        let (mut files, memory) = (Files::new(), Memory::new(8));
        let (address, length) = (memory.address + 10, memory.length - 20);
        let first = acquire(address + 2 * PAGE, PAGE, true, &mut files).unwrap();
        let acquired = acquire(address, length, true, &mut files).unwrap();
        let still = |writable| still_acquired(address, length, writable, &acquired);
        assert!(still(true));
        assert!(still_acquired(address + 2 * PAGE, PAGE, true, &first));
        assert!(!still_acquired(address + 3 * PAGE, PAGE, true, &first), "other pages of the same files");
        // SAFETY: the test's own pages.
        unsafe {
            sys::mprotect(memory.address + PAGE, PAGE, libc::PROT_READ).unwrap();
            assert!(!still(true) && still(false));
            sys::mprotect(memory.address + PAGE, PAGE, libc::PROT_READ | libc::PROT_WRITE).unwrap();
            assert!(still(true));
            let elsewhere = sys::anonymous(PAGE).unwrap();
            sys::move_pages(memory.address + 5 * PAGE, PAGE, elsewhere).unwrap();
            assert!(!still(true) && !still(false), "a hole");
            sys::move_pages(elsewhere, PAGE, memory.address + 5 * PAGE).unwrap();
            assert!(still(true));
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            sys::mmap(memory.address + 7 * PAGE, PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0).unwrap();
            assert!(!still(true), "other memory");
        }
        assert!(still_acquired(address + 2 * PAGE, PAGE, true, &first));
        release(address + 2 * PAGE, PAGE, &mut files);
        release(address, length, &mut files);
    }
    maps::without_query(false);
}
