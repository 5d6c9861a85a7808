//! What the device does not offer, with the answer that a device without the capability gives.
//!
//! In the shared library, [`crate::versions`] gives these functions all the names that they stand for.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::ibv_recv_wr;
use crate::sys;
use core::ffi::{c_int, c_void};
use core::ptr;
use core::sync::atomic::AtomicU8;

/// For functions that return an errno.
#[unsafe(no_mangle)]
pub extern "C" fn ringfence_errno() -> c_int {
    sys::zero_or_errno(Err(libc::EOPNOTSUPP))
}

/// For functions that return -1 and set errno.
#[unsafe(no_mangle)]
pub extern "C" fn ringfence_minus_one() -> c_int {
    sys::zero_or_minus_one(Err(libc::EOPNOTSUPP))
}

/// For functions that return a negative errno.
#[unsafe(no_mangle)]
pub extern "C" fn ringfence_negative_errno() -> c_int {
    -libc::EOPNOTSUPP
}

/// For functions that return a pointer.
#[unsafe(no_mangle)]
pub extern "C" fn ringfence_null() -> *mut c_void {
    sys::pointer_or_errno(Err(libc::EOPNOTSUPP))
}

/// For functions that have nothing to say, and for those whose answer is no.
#[unsafe(no_mangle)]
pub extern "C" fn ringfence_zero() -> c_int {
    0
}

/// In the table of inline verbs, where they call without asking: objects that cannot have been made.
pub unsafe extern "C" fn called_without_object() -> c_int {
    ringfence_errno()
}

/// `ibv_post_srq_recv(3)`.
pub unsafe extern "C" fn post_srq_recv(
    _srq: *mut c_void,
    first: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    if !bad.is_null() {
        // SAFETY: the caller gave a place for the bad request.
        unsafe { *bad = first };
    }
    ringfence_errno()
}

/// Read by provider libraries: whether objects of a device that is gone may be destroyed as if it were there. In memory that can
/// be written: a program may bring a libibverbs under another name, and what that one writes to its own variable comes here.
#[unsafe(no_mangle)]
pub static verbs_allow_disassociate_destroy: AtomicU8 = AtomicU8::new(0);

/// `ibv_get_device_list` of the interface of 2005, whose structures nobody uses any more: there are no devices.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringfence_no_devices(count: *mut c_int) -> *mut *mut c_void {
    if !count.is_null() {
        // SAFETY: the caller gave a place for the number.
        unsafe { *count = 0 };
    }
    sys::set_errno(libc::ENOSYS);
    ptr::null_mut()
}
