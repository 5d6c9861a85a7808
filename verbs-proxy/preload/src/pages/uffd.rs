//! The userfaultfd: the kernel lets whoever touches a page sleep in its fault, also inside system calls.
//!
//! Only the full kind will do, which also stops the kernel's own accesses: that of `/dev/userfaultfd`, or of the system call
//! where the process may have it.

// UNSAFETY: requests to the kernel by numbers and structures.
#![allow(unsafe_code)]

use super::kept::Kept;
use super::{PAGE, sys};
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering::*};

// include/uapi/linux/userfaultfd.h
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
const UFFD_API: u64 = 0xaa;
const REGISTER_MODE_MISSING: u64 = 1 << 0;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;

static FILE: Kept = Kept::new(open);
/// Whether pages that are not there can be write-protected, too (Linux 6.4).
static UNPOPULATED: AtomicBool = AtomicBool::new(false);

/// The descriptor. Only to be asked for under the module's lock.
pub fn file() -> Option<i32> {
    FILE.get()
}

/// Closes it, in a forked child.
pub fn close() {
    FILE.close();
}

fn open() -> Option<i32> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let device = || {
        let device = sys::open(c"/dev/userfaultfd", libc::O_RDWR | libc::O_CLOEXEC).ok()?;
        // SAFETY: makes a descriptor.
        let file = unsafe { sys::ioctl(device, USERFAULTFD_IOC_NEW, flags as usize) };
        sys::close(device);
        file.ok().map(|file| file as i32)
    };
    let system_call = || {
        // A filter of system calls may end the process instead of refusing.
        if !is_unfiltered() {
            return None;
        }
        // SAFETY: makes a descriptor.
        unsafe { sys::call(libc::SYS_userfaultfd, [flags as usize, 0, 0, 0, 0, 0]) }.ok().map(|file| file as i32)
    };
    let file = device().or_else(system_call)?;
    let wanted = FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM;
    for more in [FEATURE_WP_UNPOPULATED, 0] {
        let mut api = [UFFD_API, wanted | more, 0];
        // SAFETY: `api` is a `struct uffdio_api`.
        if unsafe { sys::ioctl(file, UFFDIO_API, api.as_mut_ptr() as usize) }.is_ok() {
            UNPOPULATED.store(more != 0, Relaxed);
            return Some(file);
        }
    }
    sys::close(file);
    None
}

fn is_unfiltered() -> bool {
    const PR_GET_SECCOMP: usize = 21;
    // SAFETY: only answers. Filters without it end most programs at their start.
    let answer = unsafe { sys::call(libc::SYS_prctl, [PR_GET_SECCOMP, 0, 0, 0, 0, 0]) };
    answer == Ok(0)
}

/// Whoever touches a page of the range that is not there waits. The range is of private memory without a file.
pub fn hold_all(file: i32, range: &Range<usize>) -> Result<(), i32> {
    register(file, range, REGISTER_MODE_MISSING)
}

/// Whoever writes to the range waits.
pub fn hold_writers(file: i32, range: &Range<usize>) -> Result<(), i32> {
    register(file, range, REGISTER_MODE_WP)?;
    if !UNPOPULATED.load(Relaxed) {
        // Older kernels protect only private pages that are there.
        for page in range.clone().step_by(PAGE) {
            // SAFETY: the caller looked that it may be read.
            unsafe { (page as *const u8).read_volatile() };
        }
    }
    let mut protect = [range.start as u64, range.len() as u64, WRITEPROTECT_MODE_WP];
    // SAFETY: a `struct uffdio_writeprotect`.
    let result = unsafe { sys::ioctl(file, UFFDIO_WRITEPROTECT, protect.as_mut_ptr() as usize) };
    result.map(drop).inspect_err(|_| forget(file, range))
}

fn register(file: i32, range: &Range<usize>, mode: u64) -> Result<(), i32> {
    let mut register = [range.start as u64, range.len() as u64, mode, 0];
    // SAFETY: a `struct uffdio_register`.
    unsafe { sys::ioctl(file, UFFDIO_REGISTER, register.as_mut_ptr() as usize) }.map(drop)
}

/// The same mapping as before goes on as before.
pub fn forget(file: i32, range: &Range<usize>) {
    request(file, range, UFFDIO_UNREGISTER);
}

/// Another mapping has taken the place: whoever waited looks again.
pub fn wake(file: i32, range: &Range<usize>) {
    request(file, range, UFFDIO_WAKE);
}

fn request(file: i32, range: &Range<usize>, request: u64) {
    let mut range = [range.start as u64, range.len() as u64];
    // SAFETY: a `struct uffdio_range`.
    let _ = unsafe { sys::ioctl(file, request, range.as_mut_ptr() as usize) };
}
