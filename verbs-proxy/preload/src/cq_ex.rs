//! The other way to poll: `ibv_start_poll`, `ibv_next_poll`, `ibv_end_poll` and the functions that read one completion.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::{ibv_context, ibv_cq_ex, ibv_cq_init_attr_ex};
use crate::cq::Cq;
use crate::poll::{self, Waiting};
use crate::sys;
use core::ffi::{c_int, c_uint};
use core::mem;
use ringfence_protocol::completion::Completion;

/// `IBV_WC_STANDARD_FLAGS`: everything but timestamps, VLANs, flow tags and tag matching.
const STANDARD_FLAGS: u64 = 0x7f;
/// `IBV_CQ_INIT_ATTR_MASK_FLAGS`.
const MASK_FLAGS: u32 = 1;
/// `IBV_CQ_INIT_ATTR_MASK_PD`.
const MASK_PD: u32 = 2;
/// `IBV_CREATE_CQ_ATTR_SINGLE_THREADED`: the program promises what our lock would see to; it may be taken anyway.
const SINGLE_THREADED: u32 = 1;

/// `ibv_create_cq_ex(3)`.
pub unsafe extern "C" fn create_cq_ex(context: *mut ibv_context, attr: *mut ibv_cq_init_attr_ex) -> *mut ibv_cq_ex {
    // SAFETY: the caller gave attributes.
    let attr = unsafe { &*attr };
    let flags = if attr.comp_mask & MASK_FLAGS != 0 { attr.flags } else { 0 };
    // There are no parent domains to be named.
    let domain = attr.comp_mask & MASK_PD != 0 && !attr.parent_domain.is_null();
    if attr.wc_flags & !STANDARD_FLAGS != 0
        || attr.comp_mask & !(MASK_FLAGS | MASK_PD) != 0
        || domain
        || flags & !SINGLE_THREADED != 0
    {
        return sys::pointer_or_errno(Err(libc::EOPNOTSUPP));
    }
    // SAFETY: the caller opened the device and created the channel.
    let made = unsafe { Cq::create(context, attr.cqe, attr.cq_context, attr.channel, attr.comp_vector) };
    sys::pointer_or_errno(made.map(|cq| {
        // SAFETY: just made, and known to nobody else.
        let base = unsafe { &mut (*cq).base };
        base.start_poll = Some(start_poll);
        base.next_poll = Some(next_poll);
        base.end_poll = Some(end_poll);
        base.read_opcode = Some(read_opcode);
        base.read_vendor_err = Some(read_vendor_err);
        base.read_byte_len = Some(read_byte_len);
        base.read_imm_data = Some(read_imm_data);
        base.read_qp_num = Some(read_qp_num);
        base.read_src_qp = Some(read_src_qp);
        base.read_wc_flags = Some(read_wc_flags);
        base.read_slid = Some(read_slid);
        base.read_sl = Some(read_zero);
        base.read_dlid_path_bits = Some(read_zero);
        cq.cast()
    }))
}

/// Keeps the queue locked when it finds something, until [`end_poll`].
unsafe extern "C" fn start_poll(cq: *mut ibv_cq_ex, attr: *mut u32) -> c_int {
    // SAFETY: null, or attributes of which `comp_mask` is the first field.
    if !attr.is_null() && unsafe { *attr } != 0 {
        return libc::EINVAL;
    }
    // SAFETY: the caller created the queue.
    let queue = unsafe { Cq::from_raw(cq) };
    if !queue.connection.generation.is_current() {
        return libc::EIO;
    }
    let mut ring = queue.ring.lock();
    let next = ring.next();
    let waiting = ring.polled(next.is_some());
    if let Some(completion) = next {
        ring.current = completion;
        mem::forget(ring);
        // SAFETY: the queue is locked.
        unsafe { show(cq, &completion) };
        return 0;
    }
    ring.finish();
    drop(ring);
    let gone = queue.connection.generation.is_dead();
    if gone || (waiting != Waiting::Spin && !poll::wait(queue, waiting)) {
        return libc::EIO;
    }
    libc::ENOENT
}

unsafe extern "C" fn next_poll(cq: *mut ibv_cq_ex) -> c_int {
    // SAFETY: the caller created the queue; `start_poll` has locked it.
    let ring = unsafe { &mut *Cq::from_raw(cq).ring.as_ptr() };
    let Some(completion) = ring.next() else {
        return libc::ENOENT;
    };
    ring.current = completion;
    // SAFETY: the queue is locked.
    unsafe { show(cq, &completion) };
    0
}

unsafe extern "C" fn end_poll(cq: *mut ibv_cq_ex) {
    // SAFETY: the caller created the queue; `start_poll` has locked it.
    unsafe {
        let queue = Cq::from_raw(cq);
        (*queue.ring.as_ptr()).finish();
        queue.ring.unlock();
    }
}

/// The fields that programs read without a function.
///
/// # Safety
/// The queue is locked.
unsafe fn show(cq: *mut ibv_cq_ex, completion: &Completion) {
    // SAFETY: the queue is locked, and programs read these fields between start and end only.
    unsafe {
        (*cq).wr_id = completion.wr_id;
        (*cq).status = c_uint::from(completion.status.0);
    }
}

fn current<'a>(cq: *mut ibv_cq_ex) -> &'a Completion {
    // SAFETY: the read functions are for between start and end, when the queue is locked.
    unsafe { &(*Cq::from_raw(cq).ring.as_ptr()).current }
}

unsafe extern "C" fn read_opcode(cq: *mut ibv_cq_ex) -> c_uint {
    c_uint::from(current(cq).opcode.0)
}

unsafe extern "C" fn read_vendor_err(cq: *mut ibv_cq_ex) -> u32 {
    u32::from(current(cq).vendor_err)
}

unsafe extern "C" fn read_byte_len(cq: *mut ibv_cq_ex) -> u32 {
    current(cq).byte_len
}

unsafe extern "C" fn read_imm_data(cq: *mut ibv_cq_ex) -> u32 {
    current(cq).imm
}

unsafe extern "C" fn read_qp_num(cq: *mut ibv_cq_ex) -> u32 {
    current(cq).qp_num
}

unsafe extern "C" fn read_src_qp(cq: *mut ibv_cq_ex) -> u32 {
    current(cq).src_qp
}

unsafe extern "C" fn read_wc_flags(cq: *mut ibv_cq_ex) -> c_uint {
    c_uint::from(current(cq).flags.0)
}

unsafe extern "C" fn read_slid(_cq: *mut ibv_cq_ex) -> u32 {
    0
}

/// Service level and path bits, which have no meaning without a subnet manager.
unsafe extern "C" fn read_zero(_cq: *mut ibv_cq_ex) -> u8 {
    0
}
