//! Protection domains.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::{ibv_context, ibv_pd};
use crate::connection;
use crate::context::Context;
use crate::mr::kept;
use crate::process::Generation;
use crate::sys::{self, Errno};
use alloc::boxed::Box;
use core::ffi::c_int;
use ringfence_protocol::control::{Handle, Op};

/// A protection domain.
#[repr(C)]
pub struct Pd {
    base: ibv_pd,
    generation: Generation,
}

impl Pd {
    /// The domain behind a pointer that a program got from us.
    ///
    /// # Safety
    /// The pointer came from [`ibv_alloc_pd`] and has not been given back.
    pub unsafe fn from_raw<'a>(pd: *mut ibv_pd) -> &'a Self {
        // SAFETY: programs only get pointers to the first field of a `Pd`.
        unsafe { &*pd.cast::<Self>() }
    }

    /// The device.
    pub fn context(&self) -> *mut ibv_context {
        self.base.context
    }

    /// What the proxy calls it.
    pub fn handle(&self) -> u32 {
        self.base.handle
    }

    /// Which process made it.
    pub fn generation(&self) -> Generation {
        self.generation
    }
}

/// `ibv_alloc_pd(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    // SAFETY: the caller opened the device.
    let owner = unsafe { Context::from_raw(context) };
    let generation = owner.connection.generation;
    let request = Handle { handle: owner.handle, reserved: 0 };
    let reply: Result<Handle, Errno> = connection::call(generation, Op::ALLOC_PD, &request);
    sys::pointer_or_errno(reply.map(|reply| {
        let base = ibv_pd { context, handle: reply.handle };
        Box::into_raw(Box::new(Pd { base, generation })).cast()
    }))
}

/// `ibv_dealloc_pd(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int {
    // SAFETY: the caller allocated the domain.
    let domain = unsafe { Pd::from_raw(pd) };
    kept::give_up(domain.generation, |region| region.pd == pd);
    let request = Handle { handle: domain.handle(), reserved: 0 };
    let result: Result<(), Errno> = connection::call(domain.generation, Op::DEALLOC_PD, &request);
    sys::zero_or_errno(result.map(|()| {
        // SAFETY: allocated by `ibv_alloc_pd`, and the caller gives it up.
        drop(unsafe { Box::from_raw(pd.cast::<Pd>()) });
    }))
}
