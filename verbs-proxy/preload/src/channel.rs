//! Completion channels: a socket on which the proxy sends the cookies of queues with news, one in each message.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::{ibv_comp_channel, ibv_context, ibv_cq};
use crate::connection;
use crate::context::Context;
use crate::cq::Cq;
use crate::descriptor::Identity;
use crate::process::Generation;
use crate::registry::COMPLETION_QUEUES;
use crate::sys::{self, Errno, Fd};
use alloc::boxed::Box;
use core::ffi::{c_int, c_uint, c_void};
use core::sync::atomic::{AtomicI32, Ordering};
use ringfence_protocol::control::{Handle, Op};
use zerocopy::IntoBytes;

/// A completion channel.
#[repr(C)]
pub struct Channel {
    base: ibv_comp_channel,
    /// Who is behind the descriptor, which the program may close or duplicate.
    events: Identity,
    handle: u32,
    generation: Generation,
}

impl Channel {
    /// The channel behind a pointer that a program got from us.
    ///
    /// # Safety
    /// The pointer came from [`ibv_create_comp_channel`] and has not been destroyed.
    pub unsafe fn from_raw<'a>(channel: *mut ibv_comp_channel) -> &'a Self {
        // SAFETY: programs only get pointers to the first field of a `Channel`.
        unsafe { &*channel.cast::<Self>() }
    }

    /// What the proxy calls it.
    pub fn handle(&self) -> u32 {
        self.handle
    }

    /// How many queues use it; a field that programs may read.
    pub fn users(&self) -> &AtomicI32 {
        let refcnt = (&raw const self.base.refcnt).cast_mut();
        // SAFETY: an aligned field that lives as long as `self`, and that we only touch as an atomic.
        unsafe { AtomicI32::from_ptr(refcnt) }
    }
}

/// `ibv_create_comp_channel(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel {
    // SAFETY: the caller opened the device.
    let owner = unsafe { Context::from_raw(context) };
    let generation = owner.connection.generation;
    let request = Handle { handle: owner.handle, reserved: 0 };
    let mut fds: [Option<Fd>; 1] = [None];
    let reply: Result<Handle, Errno> =
        connection::call_with(generation, Op::CREATE_COMP_CHANNEL, request.as_bytes(), &[], &mut fds);
    let [socket] = fds;
    sys::pointer_or_errno(reply.and_then(|reply| {
        let socket = socket.ok_or(libc::EPROTO)?.into_known();
        let base = ibv_comp_channel { context, fd: socket.as_raw(), refcnt: 0 };
        let channel = Channel { base, events: socket.identity(), handle: reply.handle, generation };
        Ok(Box::into_raw(Box::new(channel)).cast())
    }))
}

/// `ibv_destroy_comp_channel(3)`: `EBUSY` while a queue uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int {
    // SAFETY: the caller created the channel.
    let this = unsafe { Channel::from_raw(channel) };
    if this.users().load(Ordering::Acquire) != 0 {
        return sys::zero_or_errno(Err(libc::EBUSY));
    }
    let request = Handle { handle: this.handle, reserved: 0 };
    let result: Result<(), Errno> = connection::call(this.generation, Op::DESTROY_COMP_CHANNEL, &request);
    sys::zero_or_errno(result.map(|()| {
        this.events.close_at(this.base.fd);
        // SAFETY: allocated by `ibv_create_comp_channel`, and the caller gives it up.
        drop(unsafe { Box::from_raw(channel.cast::<Channel>()) });
    }))
}

/// `ibv_get_cq_event(3)`: waits, unless the program made the descriptor non-blocking.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_get_cq_event(
    channel: *mut ibv_comp_channel,
    cq: *mut *mut ibv_cq,
    cq_context: *mut *mut c_void,
) -> c_int {
    // SAFETY: the caller created the channel.
    let this = unsafe { Channel::from_raw(channel) };
    if !this.generation.is_current() {
        return sys::zero_or_minus_one(Err(libc::EIO));
    }
    loop {
        let mut cookie = 0_u64;
        match this.events.read_at(this.base.fd, cookie.as_mut_bytes()) {
            Ok(length) if length == size_of::<u64>() => {}
            // The proxy closed its end.
            Ok(_) => return sys::zero_or_minus_one(Err(libc::EIO)),
            Err(errno) => return sys::zero_or_minus_one(Err(errno)),
        }
        let found = COMPLETION_QUEUES.with(cookie as u32, |queue| {
            // SAFETY: registered queues are alive, and stay so while the registry is held.
            unsafe {
                (*queue).completion_events.report();
                *cq = queue.cast();
                *cq_context = (*queue).base.cq_context;
            }
        });
        // What a destroyed queue left in the socket means nothing.
        if found.is_some() {
            return 0;
        }
    }
}

/// `ibv_ack_cq_events(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_ack_cq_events(cq: *mut ibv_cq, count: c_uint) {
    // SAFETY: the caller created the queue, and may not destroy it before its events are acknowledged.
    let queue = unsafe { Cq::from_raw(cq) };
    queue.completion_events.acknowledge(count);
}
