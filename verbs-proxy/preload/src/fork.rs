//! Fork support, as programs ask for it. Ours needs no preparation: see [`crate::process`].

// UNSAFETY: exported under names of the C interface.
#![allow(unsafe_code)]

use core::ffi::c_int;
use core::sync::atomic::{AtomicI32, Ordering};

/// `IBV_FORK_DISABLED`, `IBV_FORK_ENABLED`.
static STATUS: AtomicI32 = AtomicI32::new(0);

/// `ibv_fork_init(3)`.
#[unsafe(no_mangle)]
pub extern "C" fn ibv_fork_init() -> c_int {
    STATUS.store(1, Ordering::Relaxed);
    0
}

/// `ibv_is_fork_initialized(3)`.
#[unsafe(no_mangle)]
pub extern "C" fn ibv_is_fork_initialized() -> c_int {
    STATUS.load(Ordering::Relaxed)
}
