//! Memory that is shared in the ways in which programs share it.

// UNSAFETY: maps memory as programs do.
#![allow(unsafe_code)]

use super::*;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// Plays the proxy: what it gives out and takes in, by region.
#[derive(Default)]
pub struct Proxy {
    files: Vec<Option<File>>,
    pub adopted: usize,
}

pub fn memory_file(bytes: usize, flags: u32) -> Option<File> {
    // SAFETY: makes a descriptor, which nobody else has.
    let file = unsafe {
        let fd = libc::memfd_create(c"adopt-test".as_ptr(), libc::MFD_CLOEXEC | flags);
        (fd >= 0).then(|| File::from_raw_fd(fd))
    }?;
    file.set_len(bytes as u64).unwrap();
    Some(file)
}

impl Proxy {
    fn insert(&mut self, file: File) -> u32 {
        self.files.push(Some(file));
        self.files.len() as u32 - 1
    }

    /// The file of a region, which nobody needs to have freed for it.
    pub fn file(&self, region: u32) -> &File {
        self.files[region as usize].as_ref().unwrap()
    }
}

impl Regions for Proxy {
    fn allocate(&mut self, bytes: u64) -> Result<(u32, i32), i32> {
        let file = memory_file(bytes as usize, 0).unwrap();
        let theirs = file.try_clone().unwrap();
        Ok((self.insert(file), std::os::fd::IntoRawFd::into_raw_fd(theirs)))
    }

    fn free(&mut self, region: u32) {
        assert!(self.files[region as usize].take().is_some(), "region {region} is freed twice");
    }
}

impl Files for Proxy {
    fn adopt(&mut self, file: c_int) -> Result<u32, Errno> {
        self.adopted += 1;
        // SAFETY: the caller's descriptor, which is open during the call.
        let file = unsafe { BorrowedFd::borrow_raw(file) }.try_clone_to_owned().unwrap();
        Ok(self.insert(file.into()))
    }
}

/// Pages that are mapped for a test.
pub struct Mapped {
    pub address: usize,
    pub bytes: usize,
}

impl Mapped {
    pub fn new(bytes: usize, protection: i32, flags: i32, file: Option<&File>, offset: usize) -> Self {
        let fd = file.map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, offset as i64) };
        assert_ne!(address, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self { address: address as usize, bytes }
    }

    pub fn shared(bytes: usize, file: &File, offset: usize) -> Self {
        Self::new(bytes, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, Some(file), offset)
    }

    /// Registers all of it.
    pub fn acquire(&self, writable: bool, proxy: &mut Proxy) -> Result<(Acquired, Adopted), Errno> {
        acquire(self.address, self.bytes, writable, proxy)
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.bytes);
        // SAFETY: within the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (self.address + at) as *mut u8, bytes.len()) };
    }

    pub fn read(&self, at: usize) -> u8 {
        assert!(at < self.bytes);
        // SAFETY: within the mapping; others may write it.
        unsafe { ((self.address + at) as *const u8).read_volatile() }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: made by this test, and nothing refers to it.
        unsafe { libc::munmap(self.address as *mut _, self.bytes) };
    }
}

/// A file with a name, which is gone with the test.
pub struct Named(PathBuf);

impl Named {
    pub fn new(directory: &str, bytes: usize) -> (Self, File) {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("ringfence-adopt-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let path = PathBuf::from(directory).join(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(bytes as u64).unwrap();
        (Self(path), file)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Checks that what the proxy has of a mapping's first page is what the program sees, and ends the registration.
fn is_shared(mapped: &Mapped, acquired: &Acquired, mut adopted: Adopted, proxy: &mut Proxy) {
    assert!(!adopted.is_empty());
    let Segment { region, offset, .. } = acquired.segments[0];
    mapped.write(5, b"seen");
    let mut bytes = [0; 4];
    proxy.file(region).read_exact_at(&mut bytes, offset + 5).unwrap();
    assert_eq!(&bytes, b"seen");
    proxy.file(region).write_all_at(b"S", offset + 5).unwrap();
    assert_eq!(mapped.read(5), b'S');
    adopted.settle(proxy);
    release(mapped.address, mapped.bytes, &adopted, proxy);
    assert_eq!(mapped.read(5), b'S');
    assert!(proxy.files.iter().all(Option::is_none), "a region is left");
}

#[test]
fn a_memory_file_is_found_among_the_descriptors() {
    let file = memory_file(8 * PAGE, 0).unwrap();
    let mapped = Mapped::shared(4 * PAGE, &file, 2 * PAGE);
    let mut proxy = Proxy::default();
    let (acquired, mut adopted) = acquire(mapped.address + PAGE + 7, 2 * PAGE, true, &mut proxy).unwrap();
    assert_eq!((acquired.first_offset, acquired.segments.len(), proxy.adopted), (7, 1, 1));
    assert_eq!((acquired.segments[0].offset, acquired.segments[0].length), (3 * PAGE as u64, 3 * PAGE as u64));
    // Made by whoever registers them, and no others.
    assert_eq!(file.metadata().unwrap().blocks() * 512, 3 * PAGE as u64);
    adopted.settle(&mut proxy);
    release(mapped.address + PAGE + 7, 2 * PAGE, &adopted, &mut proxy);
    let (acquired, adopted) = mapped.acquire(true, &mut proxy).unwrap();
    is_shared(&mapped, &acquired, adopted, &mut proxy);
}

#[test]
fn a_file_of_tmpfs_is_found_by_its_name_or_by_a_descriptor_for_reading() {
    let (named, file) = Named::new("/dev/shm", 2 * PAGE);
    let mapped = Mapped::shared(2 * PAGE, &file, 0);
    drop(file);
    let mut proxy = Proxy::default();
    let (acquired, adopted) = mapped.acquire(true, &mut proxy).unwrap();
    is_shared(&mapped, &acquired, adopted, &mut proxy);
    let _reading = File::open(&named.0).unwrap();
    let (acquired, adopted) = mapped.acquire(true, &mut proxy).unwrap();
    is_shared(&mapped, &acquired, adopted, &mut proxy);
    // Another file of that name is another file.
    drop(_reading);
    std::fs::remove_file(&named.0).unwrap();
    let other = OpenOptions::new().read(true).write(true).create_new(true).open(&named.0).unwrap();
    other.set_len(2 * PAGE as u64).unwrap();
    match mapped.acquire(true, &mut proxy) {
        // Whoever may ask the kernel for the file gets it.
        Ok((acquired, adopted)) => is_shared(&mapped, &acquired, adopted, &mut proxy),
        Err(error) => assert_eq!(error, libc::EOPNOTSUPP),
    }
}

#[test]
fn memory_without_a_name_or_descriptor_needs_a_privilege() {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let mapped = Mapped::new(3 * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, None, 0);
    let mut proxy = Proxy::default();
    let link = format!("/proc/self/map_files/{:x}-{:x}", mapped.address, mapped.address + mapped.bytes);
    match (mapped.acquire(true, &mut proxy), File::open(&link)) {
        (Ok((acquired, adopted)), Ok(_)) => is_shared(&mapped, &acquired, adopted, &mut proxy),
        (result, may) => {
            assert_eq!(result.unwrap_err(), libc::EOPNOTSUPP);
            assert!(may.is_err(), "the kernel gives it to us");
        }
    }
}

#[test]
fn what_a_driver_cannot_pin_is_efault() {
    let mut proxy = Proxy::default();
    let file = memory_file(PAGE, 0).unwrap();
    let beyond = Mapped::shared(2 * PAGE, &file, 0);
    assert_eq!(beyond.acquire(true, &mut proxy).unwrap_err(), libc::EFAULT, "past the end of the file");
    let read_only = Mapped::new(PAGE, libc::PROT_READ, libc::MAP_SHARED, Some(&file), 0);
    assert_eq!(read_only.acquire(true, &mut proxy).unwrap_err(), libc::EFAULT, "without the right to write");
    let (acquired, mut adopted) = read_only.acquire(false, &mut proxy).unwrap();
    assert_eq!(acquired.segments.len(), 1);
    adopted.settle(&mut proxy);
    assert_eq!(proxy.adopted, 1);
}

#[test]
fn private_memory_between_shared_is_registered_with_it() {
    let (first, second) = (memory_file(2 * PAGE, 0).unwrap(), memory_file(4 * PAGE, 0).unwrap());
    let all =
        Mapped::new(9 * PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None, 0);
    let place = |page: usize, pages: usize, file: &File, offset: usize| {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        let (address, fd) = ((all.address + page * PAGE) as *mut libc::c_void, file.as_raw_fd());
        // SAFETY: replaces pages of this test's own mapping.
        let mapped = unsafe {
            libc::mmap(address, pages * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, fd, (offset * PAGE) as i64)
        };
        assert_eq!(mapped, address);
    };
    place(1, 2, &first, 0);
    place(5, 1, &second, 1);
    // The same file goes on, with a mapping of its own.
    place(6, 1, &second, 2);
    // SAFETY: as above.
    unsafe {
        libc::mprotect((all.address + 6 * PAGE) as *mut _, PAGE, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)
    };
    for page in 0..9 {
        all.write(page * PAGE, &[page as u8 + 1]);
    }
    let mut proxy = Proxy::default();
    let (acquired, mut adopted) = acquire(all.address + 10, 9 * PAGE - 20, true, &mut proxy).unwrap();
    assert_eq!(acquired.first_offset, 10);
    assert_eq!(acquired.segments.iter().map(|segment| segment.length).sum::<u64>(), 9 * PAGE as u64);
    assert_eq!((acquired.segments.len(), proxy.adopted), (5, 2));
    let mut page = 0;
    for segment in &acquired.segments {
        for at in (0..segment.length).step_by(PAGE) {
            let mut byte = [0];
            proxy.file(segment.region).read_exact_at(&mut byte, segment.offset + at).unwrap();
            assert_eq!(byte[0], page + 1, "page {page}");
            proxy.file(segment.region).write_all_at(&[page + 101], segment.offset + at).unwrap();
            page += 1;
        }
    }
    adopted.settle(&mut proxy);
    release(all.address + 10, 9 * PAGE - 20, &adopted, &mut proxy);
    assert!((0..9).all(|page| all.read(page * PAGE) == page as u8 + 101));
    let mut byte = [0];
    first.read_exact_at(&mut byte, PAGE as u64).unwrap();
    assert_eq!(byte, [103], "what was shared before is shared still");
    assert!(proxy.files.iter().all(Option::is_none), "a region is left");
}

#[test]
fn nothing_is_left_of_what_fails_halfway() {
    let file = memory_file(2 * PAGE, 0).unwrap();
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let all = Mapped::new(6 * PAGE, libc::PROT_READ | libc::PROT_WRITE, private, None, 0);
    // Two pages of private memory, two of a file, of which the second is past its end, two of private memory.
    file.set_len(PAGE as u64).unwrap();
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let address = (all.address + 2 * PAGE) as *mut libc::c_void;
    // SAFETY: replaces pages of this test's own mapping.
    unsafe { libc::mmap(address, 2 * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, file.as_raw_fd(), 0) };
    all.write(0, b"stays");
    let mut proxy = Proxy::default();
    assert_eq!(all.acquire(true, &mut proxy).unwrap_err(), libc::EFAULT);
    assert!(proxy.files.iter().all(Option::is_none), "a region is left");
    assert_eq!(all.read(4), b's');
    let shown = pages::mappings(&(all.address..all.address + PAGE)).unwrap();
    assert!(!shown[0].shared, "its pages are shared with nobody");
}

#[test]
fn a_descriptor_that_is_not_the_mappings_file_is_not_taken() {
    let files: Vec<OwnedFd> = (0..50).map(|_| memory_file(PAGE, 0).unwrap().into()).collect();
    let file = memory_file(PAGE, 0).unwrap();
    let mapped = Mapped::shared(PAGE, &file, 0);
    let mut proxy = Proxy::default();
    let (acquired, adopted) = mapped.acquire(true, &mut proxy).unwrap();
    let found = proxy.file(acquired.segments[0].region).metadata().unwrap();
    assert_eq!(found.ino(), file.metadata().unwrap().ino());
    is_shared(&mapped, &acquired, adopted, &mut proxy);
    drop(files);
}
