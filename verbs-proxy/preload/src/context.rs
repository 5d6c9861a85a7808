//! Opening and closing a device; the table of functions that inline verbs call.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::{ABI_IS_EXTENDED, ibv_context, ibv_device, ibv_device_attr, ibv_device_attr_ex, verbs_context};
use crate::connection::{self, Connection};
use crate::descriptor::Identity;
use crate::device::Device;
use crate::mr::kept;
use crate::sys::{self, Errno, Fd};
use crate::{cq, cq_ex, pages, poll, port, post, qp, unsupported};
use alloc::boxed::Box;
use core::ffi::{c_char, c_int};
use core::mem;
use core::ptr;
use core::sync::atomic::AtomicBool;
use ringfence_protocol::control::{Handle, Index, Op, OpenReply};
use zerocopy::IntoBytes;

/// An open device.
#[repr(C)]
pub struct Context {
    verbs: verbs_context,
    /// In which it was opened.
    pub connection: Connection,
    /// Who is behind the descriptor of asynchronous events, which the program may close or duplicate.
    pub events: Identity,
    /// The program has been told that the device is gone.
    pub told: AtomicBool,
    /// What the proxy calls it.
    pub handle: u32,
    /// What the proxy said when it was opened.
    pub open: OpenReply,
}

impl Context {
    /// The context behind a pointer that a program got from us.
    ///
    /// # Safety
    /// The pointer came from [`ibv_open_device`] and has not been closed.
    pub unsafe fn from_raw<'a>(context: *mut ibv_context) -> &'a Self {
        // SAFETY: programs only get pointers to the `ibv_context` inside a `Context`.
        unsafe { &*context.byte_sub(mem::offset_of!(Context, verbs.context)).cast::<Self>() }
    }

    fn open(device: &Device) -> Result<*mut ibv_context, Errno> {
        let request = Index { index: device.index, reserved: 0 };
        let mut fds: [Option<Fd>; 1] = [None];
        // Not that by which the device was listed: it may have been the parent's.
        let connection = connection::connect()?;
        let open: OpenReply =
            connection::call_with(connection.generation, Op::OPEN, request.as_bytes(), &[], &mut fds)?;
        let [Some(events)] = fds else {
            return Err(libc::EPROTO);
        };
        if open.node_guid != device.guid {
            let request = Handle { handle: open.context, reserved: 0 };
            let _: Result<(), Errno> = connection::call(connection.generation, Op::CLOSE, &request);
            return Err(libc::ENODEV);
        }
        let events = events.into_known();
        // SAFETY: null pointers and zeros are valid in every field; a zero `pthread_mutex_t` is an open mutex.
        let mut verbs: verbs_context = unsafe { mem::zeroed() };
        verbs.sz = size_of::<verbs_context>();
        verbs.query_port = Some(port::query_port);
        verbs.query_device_ex = Some(query_device_ex);
        verbs.create_cq_ex = Some(cq_ex::create_cq_ex);
        verbs.create_qp_ex = Some(qp::create_qp_ex);
        verbs.close_xrcd = Some(unsupported::called_without_object);
        verbs.context.device = device.as_raw();
        verbs.context.cmd_fd = -1;
        verbs.context.async_fd = events.as_raw();
        verbs.context.num_comp_vectors = open.num_comp_vectors as c_int;
        verbs.context.abi_compat = ABI_IS_EXTENDED;
        let ops = &mut verbs.context.ops;
        ops.compat_query_device = Some(ibv_query_device);
        ops.compat_query_port = Some(port::ibv_query_port);
        ops.poll_cq = Some(poll::poll_cq);
        ops.req_notify_cq = Some(cq::req_notify_cq);
        ops.post_send = Some(post::post_send);
        ops.post_recv = Some(post::post_recv);
        ops.post_srq_recv = Some(unsupported::post_srq_recv);
        ops.bind_mw = Some(unsupported::called_without_object);
        ops.dealloc_mw = Some(unsupported::called_without_object);
        pages::open_files();
        let context = Box::into_raw(Box::new(Self {
            verbs,
            connection,
            events: events.identity(),
            told: AtomicBool::new(false),
            handle: open.context,
            open,
        }));
        // SAFETY: just made; projecting to a field.
        Ok(unsafe { &raw mut (*context).verbs.context })
    }

    fn device_attr(&self) -> ibv_device_attr {
        let open = &self.open;
        // SAFETY: all fields are numbers.
        let mut attr: ibv_device_attr = unsafe { mem::zeroed() };
        for (to, from) in attr.fw_ver.iter_mut().zip(open.fw_ver) {
            *to = from as c_char;
        }
        attr.node_guid = open.node_guid;
        attr.sys_image_guid = open.sys_image_guid;
        attr.max_mr_size = open.max_mr_size;
        attr.page_size_cap = open.page_size_cap;
        attr.vendor_id = open.vendor_id;
        attr.vendor_part_id = open.vendor_part_id;
        attr.hw_ver = open.hw_ver;
        attr.max_qp = open.max_qp as c_int;
        attr.max_qp_wr = open.max_qp_wr as c_int;
        attr.device_cap_flags = open.device_cap_flags;
        attr.max_sge = open.max_sge as c_int;
        attr.max_sge_rd = open.max_sge_rd as c_int;
        attr.max_cq = open.max_cq as c_int;
        attr.max_cqe = open.max_cqe as c_int;
        attr.max_mr = open.max_mr as c_int;
        attr.max_pd = open.max_pd as c_int;
        attr.max_qp_rd_atom = open.max_qp_rd_atom as c_int;
        attr.max_res_rd_atom = open.max_res_rd_atom as c_int;
        attr.max_qp_init_rd_atom = open.max_qp_init_rd_atom as c_int;
        attr.atomic_cap = open.atomic_cap;
        attr.max_ah = open.max_ah as c_int;
        attr.max_srq = open.max_srq as c_int;
        attr.max_srq_wr = open.max_srq_wr as c_int;
        attr.max_srq_sge = open.max_srq_sge as c_int;
        attr.max_pkeys = open.max_pkeys as u16;
        attr.local_ca_ack_delay = open.local_ca_ack_delay as u8;
        attr.phys_port_cnt = open.phys_port_cnt as u8;
        attr
    }
}

/// `ibv_open_device(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context {
    // SAFETY: the caller got the device from the list.
    sys::pointer_or_errno(Context::open(unsafe { Device::from_raw(device) }))
}

/// `ibv_close_device(3)`: always succeeds, as rdma-core's does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_close_device(context: *mut ibv_context) -> c_int {
    // SAFETY: the caller opened the device.
    let generation = unsafe { Context::from_raw(context) }.connection.generation;
    kept::give_up(generation, |region| region.context == context);
    // SAFETY: the caller opened the device and gives it up here.
    let context = unsafe { Box::from_raw(ptr::from_ref(Context::from_raw(context)).cast_mut()) };
    let request = Handle { handle: context.handle, reserved: 0 };
    // In a forked child, or after the connection's end, there is nobody to tell.
    let _: Result<(), Errno> = connection::call(context.connection.generation, Op::CLOSE, &request);
    context.events.close_at(context.verbs.context.async_fd);
    0
}

/// `ibv_query_device(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_query_device(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int {
    // SAFETY: the caller opened the device and gave a place for the attributes.
    unsafe { attr.write(Context::from_raw(context).device_attr()) };
    0
}

/// `ibv_query_device_ex(3)`, called by the inline function with the size that the program knows.
unsafe extern "C" fn query_device_ex(
    context: *mut ibv_context,
    input: *const u32,
    attr: *mut ibv_device_attr_ex,
    size: usize,
) -> c_int {
    // SAFETY: a null or readable input, of which `comp_mask` is the first field.
    if !input.is_null() && unsafe { *input } != 0 {
        return sys::zero_or_errno(Err(libc::EINVAL));
    }
    // SAFETY: the caller opened the device.
    let context = unsafe { Context::from_raw(context) };
    // SAFETY: all fields are numbers.
    let mut all: ibv_device_attr_ex = unsafe { mem::zeroed() };
    all.orig_attr = context.device_attr();
    all.device_cap_flags_ex = u64::from(context.open.device_cap_flags);
    all.phys_port_cnt_ex = context.open.phys_port_cnt;
    // SAFETY: the caller's structure has `size` bytes; beyond ours, fields that we do not know are zero.
    unsafe {
        ptr::write_bytes(attr.cast::<u8>(), 0, size);
        ptr::copy_nonoverlapping((&raw const all).cast::<u8>(), attr.cast::<u8>(), size.min(size_of_val(&all)));
    }
    0
}
