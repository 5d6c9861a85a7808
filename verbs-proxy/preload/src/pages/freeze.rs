//! Makes writers wait while the pages under them are replaced.

// UNSAFETY: changes what the application may do with its memory, for a moment.
#![allow(unsafe_code)]

use super::swap::Area;
use super::{fault, sys};
use core::ops::Range;
use core::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::*};

/// How writers are made to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The kernel lets them sleep in their page fault, also inside system calls. The descriptor of a userfaultfd.
    Userfaultfd(i32),
    /// Read-only pages; [`fault`] lets the writer sleep in its signal handler. A system call that writes fails with
    /// `EFAULT`, and a thread that blocks SIGSEGV dies: only where there is nothing better.
    Protection,
    /// Nobody writes to these.
    Nothing,
}

/// Ends when the pages have been replaced, or dropped as they were.
pub struct Frozen<'a> {
    range: Range<usize>,
    method: Method,
    area: &'a Area,
    replaced: bool,
}

// include/uapi/linux/userfaultfd.h
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: i32 = 1;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;

const UNKNOWN: i32 = -1;
const UNAVAILABLE: i32 = -2;

static DESCRIPTOR: AtomicI32 = AtomicI32::new(UNKNOWN);
static FEATURES: AtomicU64 = AtomicU64::new(0);
/// Whose memory the descriptor means: it survives a fork, and its meaning too.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// The method for an area: `file_backed` if it maps a file privately, `shared` if it maps a region.
pub fn method(area: &Area, file_backed: bool, shared: bool) -> Method {
    if area.protection & libc::PROT_WRITE == 0 {
        return Method::Nothing;
    }
    let possible = !file_backed && (!shared || features() & FEATURE_WP_HUGETLBFS_SHMEM != 0);
    match userfaultfd() {
        Some(file) if possible => Method::Userfaultfd(file),
        _ => Method::Protection,
    }
}

/// Forgets the userfaultfd of a parent.
pub fn forget() {
    let file = DESCRIPTOR.swap(UNKNOWN, Relaxed);
    if file >= 0 && OWNER.load(Relaxed) != sys::process() {
        sys::close(file);
    }
}

fn features() -> u64 {
    userfaultfd().map_or(0, |_| FEATURES.load(Relaxed))
}

fn userfaultfd() -> Option<i32> {
    #[cfg(test)]
    if without_userfaultfd() {
        return None;
    }
    if OWNER.load(Relaxed) != sys::process() {
        forget();
        OWNER.store(sys::process(), Relaxed);
    }
    if DESCRIPTOR.load(Relaxed) == UNKNOWN {
        DESCRIPTOR.store(open().unwrap_or(UNAVAILABLE), Relaxed);
    }
    Some(DESCRIPTOR.load(Relaxed)).filter(|&file| file >= 0)
}

/// What handles faults in system calls comes first; the last resort is what every user may have.
fn open() -> Option<i32> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let system_call = |flags: i32| {
        // SAFETY: makes a descriptor.
        unsafe { sys::call(libc::SYS_userfaultfd, [flags as usize, 0, 0, 0, 0, 0]) }.ok().map(|file| file as i32)
    };
    let device = || {
        let device = sys::open(c"/dev/userfaultfd", libc::O_RDWR | libc::O_CLOEXEC).ok()?;
        // SAFETY: makes a descriptor.
        let file = unsafe { sys::ioctl(device, USERFAULTFD_IOC_NEW, flags as usize) };
        sys::close(device);
        file.ok().map(|file| file as i32)
    };
    let file = system_call(flags).or_else(device).or_else(|| system_call(flags | UFFD_USER_MODE_ONLY))?;
    let wanted = FEATURE_PAGEFAULT_FLAG_WP;
    for more in [FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED, FEATURE_WP_HUGETLBFS_SHMEM, 0] {
        let mut api = [UFFD_API, wanted | more, 0];
        // SAFETY: `api` is a `struct uffdio_api`.
        if unsafe { sys::ioctl(file, UFFDIO_API, api.as_mut_ptr() as usize) }.is_ok() {
            FEATURES.store(wanted | more, Relaxed);
            return Some(file);
        }
    }
    sys::close(file);
    None
}

impl<'a> Frozen<'a> {
    /// Nobody changes `range`, a part of `area`, before the result is dropped. Where the method turns out not to work, the
    /// next lesser one is used. Writes to no memory but the result.
    pub fn new(range: Range<usize>, area: &'a Area, method: Method) -> Result<Self, i32> {
        let frozen = |method| Self { range: range.clone(), method, area, replaced: false };
        match method {
            Method::Nothing => Ok(frozen(method)),
            Method::Userfaultfd(file) => match write_protect(file, &range) {
                Ok(()) => Ok(frozen(method)),
                // The application watches these pages by its own userfaultfd, or closed ours.
                Err(_) => Self::new(range, area, Method::Protection),
            },
            Method::Protection => {
                fault::announce();
                let frozen = frozen(method);
                // SAFETY: writers are caught by the handler, which expects them already.
                unsafe { sys::mprotect(range.start, range.len(), area.protection & !libc::PROT_WRITE)? };
                Ok(frozen)
            }
        }
    }

    /// The pages have been replaced by others, which have their final protection.
    pub fn replaced(mut self) {
        self.replaced = true;
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        match self.method {
            Method::Nothing => {}
            Method::Userfaultfd(file) => {
                let mut range = [self.range.start as u64, self.range.len() as u64];
                let request = if self.replaced { UFFDIO_WAKE } else { UFFDIO_UNREGISTER };
                // SAFETY: `range` is a `struct uffdio_range`.
                let _ = unsafe { sys::ioctl(file, request, range.as_mut_ptr() as usize) };
            }
            Method::Protection => {
                if !self.replaced {
                    // SAFETY: gives the pages the protection that they had.
                    let _ = unsafe { sys::mprotect(self.range.start, self.range.len(), self.area.protection) };
                }
                fault::finish();
            }
        }
    }
}

fn write_protect(file: i32, range: &Range<usize>) -> Result<(), i32> {
    let (start, length) = (range.start as u64, range.len() as u64);
    let mut register = [start, length, REGISTER_MODE_WP, 0];
    let mut protect = [start, length, WRITEPROTECT_MODE_WP];
    // SAFETY: the structures are those of the requests.
    unsafe {
        sys::ioctl(file, UFFDIO_REGISTER, register.as_mut_ptr() as usize)?;
        if FEATURES.load(Relaxed) & FEATURE_WP_UNPOPULATED == 0 {
            // Older kernels protect only what is there.
            for page in range.clone().step_by(super::PAGE) {
                (page as *const u8).read_volatile();
            }
        }
        let result = sys::ioctl(file, UFFDIO_WRITEPROTECT, protect.as_mut_ptr() as usize);
        if let Err(error) = result {
            let _ = sys::ioctl(file, UFFDIO_UNREGISTER, protect.as_mut_ptr() as usize);
            return Err(error);
        }
    }
    Ok(())
}

#[cfg(test)]
pub static WITHOUT_USERFAULTFD: core::sync::atomic::AtomicBool = core::sync::atomic::AtomicBool::new(false);

#[cfg(test)]
fn without_userfaultfd() -> bool {
    WITHOUT_USERFAULTFD.load(Relaxed)
}
