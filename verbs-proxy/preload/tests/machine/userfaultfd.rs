//! What wants a userfaultfd, ours or the program's own.

// UNSAFETY: plays a program that has one.
#![allow(unsafe_code)]

use crate::pages::tests::{Files, Memory, assert_same_memory};
use crate::pages::tests_concurrent::{no_increment_is_lost as none_is_lost, zeroed};
use crate::pages::{PAGE, acquire, hold, interpose, release, sys};
use ringfence_trials::skip;

pub fn no_increment_is_lost() {
    let mut files = Files::new();
    hold::force(Some("userfaultfd"));
    let is_possible = matches!(hold::method(true), Ok(hold::Method::Userfaultfd(_)));
    if is_possible {
        none_is_lost(zeroed(16).address, 16, &mut files, 2000);
    }
    hold::force(None);
    if !is_possible {
        skip("this process may not use userfaultfd on shared memory");
    }
}

/// Memory that the program itself provides when it is touched, by a userfaultfd, is provided when it is registered; and the
/// thread that does it may call what it likes.
pub fn what_the_program_provides_on_demand_is_registered_as_it_provides_it() {
    const UFFDIO_API: u64 = 0xc018_aa3f;
    const UFFDIO_REGISTER: u64 = 0xc020_aa00;
    const UFFDIO_COPY: u64 = 0xc028_aa03;
    // SAFETY: makes a descriptor.
    let Ok(file) = (unsafe { sys::call(libc::SYS_userfaultfd, [libc::O_CLOEXEC as usize, 0, 0, 0, 0, 0]) }) else {
        skip("this process may not make a userfaultfd");
    };
    let file = file as i32;
    let (mut files, other) = (Files::new(), Memory::new(1));
    let length = 8 * PAGE;
    let address = sys::anonymous(length).unwrap();
    let mut api = [0xaa_u64, 0, 0];
    let mut range = [address as u64, length as u64, 1, 0];
    // SAFETY: a `struct uffdio_api` and a `struct uffdio_register` for missing pages.
    unsafe {
        sys::ioctl(file, UFFDIO_API, api.as_mut_ptr() as usize).unwrap();
        sys::ioctl(file, UFFDIO_REGISTER, range.as_mut_ptr() as usize).unwrap();
    }
    std::thread::spawn(move || {
        let page = vec![7u8; PAGE];
        for _ in 0..8 {
            // struct uffd_msg: the address in the third word.
            let mut message = [0u8; 32];
            sys::read(file, &mut message).unwrap();
            let at = u64::from_le_bytes(message[16..24].try_into().unwrap()) & !(PAGE as u64 - 1);
            interpose::advise(other.address, PAGE, libc::MADV_DONTNEED).unwrap();
            let mut copy = [at, page.as_ptr() as u64, PAGE as u64, 0, 0];
            // SAFETY: a `struct uffdio_copy` into the test's own memory.
            unsafe { sys::ioctl(file, UFFDIO_COPY, copy.as_mut_ptr() as usize) }.unwrap();
        }
    });
    let acquired = acquire(address, length, true, &mut files).unwrap();
    for at in (0..length).step_by(PAGE) {
        // SAFETY: the test's own memory.
        assert_eq!(unsafe { (address as *const u8).add(at).read_volatile() }, 7, "page {}", at / PAGE);
    }
    assert_same_memory(&files, &acquired, address, length);
    release(address, length, &mut files);
    // SAFETY: the test's own memory.
    unsafe { sys::munmap(address, length) };
    sys::close(file);
}
