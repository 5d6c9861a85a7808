//! Reading sysfs on behalf of other libraries of rdma-core.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::PATH_MAX;
use crate::sys::{self, Fd};
use core::ffi::{CStr, c_char, c_int};
use core::ptr;
use core::slice;
use core::sync::atomic::{AtomicPtr, Ordering};

static PATH: AtomicPtr<c_char> = AtomicPtr::new(ptr::null_mut());

/// Where sysfs is mounted: `SYSFS_PATH` if set, without slashes at its end.
#[unsafe(no_mangle)]
pub extern "C" fn ibv_get_sysfs_path() -> *const c_char {
    let known = PATH.load(Ordering::Acquire);
    if !known.is_null() {
        return known;
    }
    let Some(path) = sys::environment(c"SYSFS_PATH") else {
        return c"/sys".as_ptr();
    };
    let path = &path[..path.len().min(PATH_MAX)];
    let length = path.iter().rposition(|&byte| byte != b'/').map_or(0, |last| last + 1);
    // SAFETY: `strndup` reads at most `length` bytes of the value.
    let copy = unsafe { libc::strndup(path.as_ptr().cast(), length) };
    match PATH.compare_exchange(ptr::null_mut(), copy, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => copy,
        Err(first) => {
            // SAFETY: allocated above, and nobody else has seen it.
            unsafe { libc::free(copy.cast()) };
            first
        }
    }
}

/// The contents of `dir`/`file`, without the newline at its end; its length, or -1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_read_sysfs_file(
    dir: *const c_char,
    file: *const c_char,
    to: *mut c_char,
    size: usize,
) -> c_int {
    // SAFETY: the caller gave terminated strings and a buffer of `size` bytes.
    let (dir, file, to) = unsafe {
        (
            CStr::from_ptr(dir).to_bytes(),
            CStr::from_ptr(file).to_bytes(),
            slice::from_raw_parts_mut(to.cast::<u8>(), size),
        )
    };
    let mut path = [0_u8; 4096];
    let length = dir.len() + 1 + file.len();
    if length >= path.len() {
        sys::set_errno(libc::ENAMETOOLONG);
        return -1;
    }
    path[..dir.len()].copy_from_slice(dir);
    path[dir.len()] = b'/';
    path[dir.len() + 1..length].copy_from_slice(file);
    // SAFETY: the path is terminated by the zeros behind it.
    let fd =
        unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC, 0) };
    if fd < 0 {
        return -1;
    }
    match Fd::adopt(fd as c_int).and_then(|file| sys::read(file.number()?, to)) {
        Ok(0) => 0,
        Ok(length) if to[length - 1] == b'\n' => {
            to[length - 1] = 0;
            (length - 1) as c_int
        }
        Ok(length) if length < size => {
            to[length] = 0;
            length as c_int
        }
        // There would be no end to the text.
        Ok(_) | Err(_) => -1,
    }
}
