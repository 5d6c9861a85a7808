//! Completion queues: making, resizing, ending. Polling is in [`crate::poll`].

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::{ibv_comp_channel, ibv_context, ibv_cq};
use crate::channel::Channel;
use crate::connection::{self, Connection};
use crate::context::Context;
use crate::events::Outstanding;
use crate::lock::Spin;
use crate::poll::{Idle, Ring};
use crate::registry::COMPLETION_QUEUES;
use crate::shared::Shared;
use crate::sys::{self, Errno, Fd};
use alloc::boxed::Box;
use core::ffi::{c_int, c_void};
use core::mem;
use core::sync::atomic::Ordering;
use ringfence_protocol::control::{CqReply, CreateCq, Handle, NO_HANDLE, Op, ResizeCq};
use ringfence_protocol::layout::{Arm, CqHeader, RINGS_OFFSET, cq_bytes};
use ringfence_protocol::ring::Consumer;
use zerocopy::IntoBytes;

/// A completion queue.
#[repr(C)]
pub struct Cq {
    /// What programs see.
    pub base: ibv_cq,
    /// Its process and proxy.
    pub connection: Connection,
    cookie: u32,
    /// Events of its channel.
    pub completion_events: Outstanding,
    /// Events of its context.
    pub async_events: Outstanding,
    /// Where completions come from.
    pub ring: Spin<Ring>,
}

/// Memory of a queue, as the proxy passed it.
pub fn ring_memory(reply: &CqReply, file: Option<Fd>) -> Result<(Shared, Consumer<'static>), Errno> {
    let file = file.ok_or(libc::EPROTO)?;
    let memory = Shared::map(&file, cq_bytes(reply.slots))?;
    // SAFETY: the consumer is dropped with the memory, which `Ring` keeps beside it.
    let slots = unsafe { memory.slots(RINGS_OFFSET, reply.slots) };
    Ok((memory, Consumer::new(slots, 0)))
}

impl Cq {
    /// The queue behind a pointer that a program got from us.
    ///
    /// # Safety
    /// The pointer came from `ibv_create_cq` or `ibv_create_cq_ex` and has not been destroyed.
    #[inline(always)]
    pub unsafe fn from_raw<'a>(cq: *mut ibv_cq) -> &'a Self {
        // SAFETY: programs only get pointers to the first field of a `Cq`.
        unsafe { &*cq.cast::<Self>() }
    }

    /// A new queue of at least `cqe` completions.
    ///
    /// # Safety
    /// The context is open; the channel is null or one of this context.
    pub unsafe fn create(
        context: *mut ibv_context,
        cqe: u32,
        cq_context: *mut c_void,
        channel: *mut ibv_comp_channel,
        vector: u32,
    ) -> Result<*mut Cq, Errno> {
        // SAFETY: by the caller's promise.
        let owner = unsafe { Context::from_raw(context) };
        if cqe == 0 || cqe > i32::MAX as u32 || vector >= owner.open.num_comp_vectors {
            return Err(libc::EINVAL);
        }
        // SAFETY: by the caller's promise.
        let used = (!channel.is_null()).then(|| unsafe { Channel::from_raw(channel) });
        let connection = owner.connection;
        if !connection.generation.is_current() {
            return Err(libc::EIO);
        }
        let cookie = COMPLETION_QUEUES.reserve()?;
        let request = CreateCq {
            context: owner.handle,
            cqe,
            channel: used.map_or(NO_HANDLE, Channel::handle),
            vector,
            cookie: u64::from(cookie),
            reserved: 0,
        };
        let mut fds: [Option<Fd>; 1] = [None];
        let made = connection::call_with(connection.generation, Op::CREATE_CQ, request.as_bytes(), &[], &mut fds);
        let [file] = fds;
        let (reply, memory, consumer) = match made.and_then(|reply: CqReply| {
            let made = ring_memory(&reply, file).inspect_err(|_| {
                let request = Handle { handle: reply.handle, reserved: 0 };
                let _: Result<(), Errno> = connection::call(connection.generation, Op::DESTROY_CQ, &request);
            });
            made.map(|(memory, consumer)| (reply, memory, consumer))
        }) {
            Ok(made) => made,
            Err(errno) => {
                COMPLETION_QUEUES.remove(cookie);
                return Err(errno);
            }
        };
        // SAFETY: null pointers and zeros are valid in every field; zero mutexes and conditions are initialised ones.
        let mut base: ibv_cq = unsafe { mem::zeroed() };
        base.context = context;
        base.channel = channel;
        base.cq_context = cq_context;
        base.handle = reply.handle;
        base.cqe = reply.cqe as c_int;
        let cq = Box::into_raw(Box::new(Self {
            base,
            connection,
            cookie,
            completion_events: Outstanding::default(),
            async_events: Outstanding::default(),
            ring: Spin::new(Ring::new(memory, consumer, Idle::new(connection.yield_at_once))),
        }));
        if let Some(channel) = used {
            channel.users().fetch_add(1, Ordering::AcqRel);
        }
        COMPLETION_QUEUES.set(cookie, cq);
        Ok(cq)
    }
}

/// `ibv_create_cq(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_create_cq(
    context: *mut ibv_context,
    cqe: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    vector: c_int,
) -> *mut ibv_cq {
    let (Ok(cqe), Ok(vector)) = (u32::try_from(cqe), u32::try_from(vector)) else {
        return sys::pointer_or_errno(Err(libc::EINVAL));
    };
    // SAFETY: the caller opened the device and created the channel.
    sys::pointer_or_errno(unsafe { Cq::create(context, cqe, cq_context, channel, vector) }.map(<*mut Cq>::cast))
}

/// `ibv_resize_cq(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_resize_cq(cq: *mut ibv_cq, cqe: c_int) -> c_int {
    // SAFETY: the caller created the queue.
    let queue = unsafe { Cq::from_raw(cq) };
    let Ok(cqe) = u32::try_from(cqe) else {
        return sys::zero_or_errno(Err(libc::EINVAL));
    };
    let request = ResizeCq { handle: queue.base.handle, cqe };
    let mut fds: [Option<Fd>; 1] = [None];
    let reply: Result<CqReply, Errno> =
        connection::call_with(queue.connection.generation, Op::RESIZE_CQ, request.as_bytes(), &[], &mut fds);
    let [file] = fds;
    sys::zero_or_errno(reply.and_then(|reply| {
        let (memory, consumer) = ring_memory(&reply, file)?;
        queue.ring.lock().follow_with(memory, consumer, reply.switch);
        // SAFETY: the caller may not use the queue's fields while it resizes.
        unsafe { (*cq).cqe = reply.cqe as c_int };
        Ok(())
    }))
}

/// `ibv_destroy_cq(3)`: `EBUSY` while a queue pair uses it; waits until all its events are acknowledged.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_destroy_cq(cq: *mut ibv_cq) -> c_int {
    // SAFETY: the caller created the queue.
    let queue = unsafe { Cq::from_raw(cq) };
    let request = Handle { handle: queue.base.handle, reserved: 0 };
    let result: Result<(), Errno> = connection::call(queue.connection.generation, Op::DESTROY_CQ, &request);
    sys::zero_or_errno(result.map(|()| {
        COMPLETION_QUEUES.remove(queue.cookie);
        queue.completion_events.wait();
        queue.async_events.wait();
        if !queue.base.channel.is_null() {
            // SAFETY: a channel cannot be destroyed while a queue uses it.
            unsafe { Channel::from_raw(queue.base.channel) }.users().fetch_sub(1, Ordering::AcqRel);
        }
        // SAFETY: allocated by `Cq::create`, and the caller gives it up.
        drop(unsafe { Box::from_raw(cq.cast::<Cq>()) });
    }))
}

/// `ibv_req_notify_cq(3)`.
pub unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: the caller created the queue.
    let queue = unsafe { Cq::from_raw(cq) };
    if !queue.connection.generation.is_current() {
        return sys::zero_or_errno(Err(libc::EIO));
    }
    let arm = if solicited_only == 0 { Arm::Any } else { Arm::Solicited };
    queue.ring.lock().arm(arm);
    0
}

/// The shared head of a queue's memory.
///
/// # Safety
/// The reference is not used after the mapping ends.
pub unsafe fn header(memory: &Shared) -> &'static CqHeader {
    // SAFETY: a `CqHeader` is made of atomics; the rest is the caller's promise.
    unsafe { memory.head() }
}
