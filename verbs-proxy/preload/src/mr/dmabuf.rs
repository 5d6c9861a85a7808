//! Buffers of other devices, such as a GPU's memory, by their dma-buf descriptors: the card reaches them, and no process.

// UNSAFETY: an entry point of a C interface.
#![allow(unsafe_code)]

use super::{Mr, checked_access};
use crate::abi::{ibv_mr, ibv_pd};
use crate::adopt::Adopted;
use crate::connection;
use crate::pages::Acquired;
use crate::pd::Pd;
use crate::sys::{self, Errno};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ffi::c_int;
use ringfence_protocol::control::{MrReply, Op, RegDmabuf};
use ringfence_protocol::keys::Incarnation;
use zerocopy::IntoBytes;

/// # Safety
/// The domain was allocated by the program, and is at `pd`.
unsafe fn registered(domain: &Pd, pd: *mut ibv_pd, request: &RegDmabuf, fd: c_int) -> Result<*mut ibv_mr, Errno> {
    let generation = domain.generation();
    if fd < 0 {
        return Err(libc::EBADF);
    }
    let reply: MrReply =
        connection::call_passing(generation, Op::REG_DMABUF, &[request.as_bytes(), &[]], Some(fd), &mut [])?;
    // As in libibverbs: there is no address.
    let addr = core::ptr::without_provenance_mut(request.offset as usize);
    let length = request.length as usize;
    let MrReply { handle, lkey, rkey, incarnation } = reply;
    let mr = Mr {
        base: ibv_mr { context: domain.context(), pd, addr, length, handle, lkey, rkey },
        provider_private: [0; 4],
        generation,
        iova: request.iova,
        access: request.access,
        acquired: Acquired { first_offset: 0, segments: Vec::new() },
        adopted: Adopted::default(),
        first_key: lkey,
        turn: 0,
        incarnation: Incarnation::new(incarnation),
        // What the descriptor leads to next time nobody knows.
        comes_back: false,
    };
    Ok(Box::into_raw(Box::new(mr)).cast())
}

/// `ibv_reg_dmabuf_mr(3)`: `EOPNOTSUPP` from the software device, and from cards that cannot.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_reg_dmabuf_mr(
    pd: *mut ibv_pd,
    offset: u64,
    length: usize,
    iova: u64,
    fd: c_int,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: the caller allocated the domain.
    sys::pointer_or_errno(checked_access(access.cast_unsigned()).and_then(|access| unsafe {
        let domain = Pd::from_raw(pd);
        registered(domain, pd, &RegDmabuf { pd: domain.handle(), access, iova, length: length as u64, offset }, fd)
    }))
}
