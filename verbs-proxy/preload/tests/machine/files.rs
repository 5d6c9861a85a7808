//! Shared memory of kinds that not every machine has.

// UNSAFETY: maps memory as programs do.
#![allow(unsafe_code)]

use crate::adopt::tests::{Mapped, Named, Proxy, memory_file};
use crate::adopt::{acquire, release};
use crate::pages::{PAGE, Segment};
use crate::sys;
use ringfence_trials::{huge_pages, skip};
use std::fs::File;
use std::os::fd::AsRawFd;

pub fn huge_pages_are_registered_as_they_are() {
    const HUGE: usize = 2 << 20;
    let _reserved = huge_pages::reserve(2);
    let Some(file) = memory_file(2 * HUGE, libc::MFD_HUGETLB) else { skip("files of huge pages are not to be had") };
    let map = |file: &File| {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        unsafe { libc::mmap(std::ptr::null_mut(), 2 * HUGE, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) }
    };
    let address = map(&file);
    if address == libc::MAP_FAILED {
        skip("this machine has no two huge pages");
    }
    let mapped = Mapped { address: address as usize, bytes: 2 * HUGE };
    let mut proxy = Proxy::default();
    let (acquired, mut adopted) = acquire(mapped.address + HUGE - 10, 20, true, &mut proxy).unwrap();
    let around = Segment { region: 0, offset: (HUGE - PAGE) as u64, length: 2 * PAGE as u64 };
    assert_eq!((acquired.first_offset, acquired.segments), (PAGE as u64 - 10, vec![around]));
    mapped.write(HUGE, b"seen");
    // Such a file cannot be read but by mapping it.
    let theirs = Mapped { address: map(proxy.file(0)) as usize, bytes: 2 * HUGE };
    assert_eq!(theirs.read(HUGE), b's');
    adopted.settle(&mut proxy);
    release(mapped.address + HUGE - 10, 20, &adopted, &mut proxy);
    assert_eq!(mapped.read(HUGE), b's');
}

pub fn what_a_disk_has_is_not_registered() {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    let (_named, file) = Named::new("/var/tmp", PAGE);
    if sys::file_system(file.as_raw_fd()).unwrap() == TMPFS_MAGIC {
        skip("/var/tmp is memory");
    }
    let written = Mapped::shared(PAGE, &file, 0);
    let read = Mapped::new(PAGE, libc::PROT_READ, libc::MAP_SHARED, Some(&file), 0);
    let mut proxy = Proxy::default();
    assert_eq!(written.acquire(true, &mut proxy).unwrap_err(), libc::EFAULT, "a file that must know");
    let error = read.acquire(false, &mut proxy).unwrap_err();
    assert_eq!(error, libc::EOPNOTSUPP, "a file that could keep the proxy waiting");
    assert_eq!(proxy.adopted, 0);
}
