//! Asynchronous events, and waiting for their acknowledgement before an object ends.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::{ibv_async_event, ibv_context};
use crate::connection::is_gone;
use crate::context::Context;
use crate::cq::Cq;
use crate::lock::Acknowledged;
use crate::qp::Qp;
use crate::registry::{COMPLETION_QUEUES, QUEUE_PAIRS};
use crate::sys::{self, Errno};
use core::ffi::{c_int, c_void};
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};
use ringfence_protocol::control::AsyncEvent;
use ringfence_protocol::verbs::EventType;
use zerocopy::{FromZeros, IntoBytes};

/// Events of one object: how many the program was given, how many it gave back.
#[derive(Debug, Default)]
pub struct Outstanding {
    reported: AtomicU32,
    acknowledged: Acknowledged,
}

impl Outstanding {
    /// One more is given. The caller makes sure that the object is not being destroyed.
    pub fn report(&self) {
        self.reported.fetch_add(1, Ordering::Relaxed);
    }

    /// Some are back.
    pub fn acknowledge(&self, count: u32) {
        self.acknowledged.add(count);
    }

    /// Waits until all are back. Nobody reports any more.
    pub fn wait(&self) {
        self.acknowledged.wait_for(self.reported.load(Ordering::Relaxed));
    }
}

/// Whom an event is about.
enum About {
    Cq,
    Qp,
    Port,
}

fn about(event: EventType) -> About {
    match event {
        EventType::CQ_ERR => About::Cq,
        event if event.is_of_qp() => About::Qp,
        _ => About::Port,
    }
}

/// The connection of a context is gone: the program hears it once as an event, as of any device that is gone.
fn gone(owner: &Context, errno: Errno, to: *mut ibv_async_event) -> c_int {
    if owner.told.swap(true, Ordering::Relaxed) {
        return sys::zero_or_minus_one(Err(errno));
    }
    // SAFETY: the caller of `ibv_get_async_event` gave a place for the event.
    unsafe { *to = ibv_async_event { element: ptr::null_mut(), event_type: EventType::DEVICE_FATAL.0 } };
    0
}

/// `ibv_get_async_event(3)`: waits, unless the program made the descriptor non-blocking.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_get_async_event(context: *mut ibv_context, to: *mut ibv_async_event) -> c_int {
    // SAFETY: the caller opened the device.
    let (owner, fd) = unsafe { (Context::from_raw(context), (*context).async_fd) };
    // A child reads nothing of its parent's; whoever lost his connection is told so.
    if !owner.connection.generation.is_of_this_process() {
        return sys::zero_or_minus_one(Err(libc::EIO));
    }
    loop {
        let mut event = AsyncEvent::new_zeroed();
        match owner.events.read_at(fd, event.as_mut_bytes()) {
            Ok(length) if length == size_of::<AsyncEvent>() => {}
            // The proxy closed its end.
            Ok(_) => return gone(owner, libc::EIO, to),
            Err(libc::EBADF) if is_gone(&owner.connection) => return gone(owner, libc::EBADF, to),
            Err(errno) => return sys::zero_or_minus_one(Err(errno)),
        }
        let element: Option<*mut c_void> = match about(event.event) {
            About::Cq => COMPLETION_QUEUES.with(event.cookie as u32, |queue| {
                // SAFETY: registered queues are alive, and stay so while the registry is held.
                unsafe { (*queue).async_events.report() };
                queue.cast()
            }),
            About::Qp => QUEUE_PAIRS.with(event.cookie as u32, |queue_pair| {
                // SAFETY: as above.
                unsafe { (*queue_pair).async_events.report() };
                queue_pair.cast()
            }),
            About::Port => Some(ptr::without_provenance_mut(event.port as usize)),
        };
        // What is about a destroyed object means nothing.
        if let Some(element) = element {
            // SAFETY: the caller gave a place for the event.
            unsafe { *to = ibv_async_event { element, event_type: event.event.0 } };
            return 0;
        }
    }
}

/// `ibv_ack_async_event(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_ack_async_event(event: *mut ibv_async_event) {
    // SAFETY: the caller got the event from `ibv_get_async_event`; objects outlive their unacknowledged events.
    unsafe {
        match about(EventType((*event).event_type)) {
            About::Cq => Cq::from_raw((*event).element.cast()).async_events.acknowledge(1),
            About::Qp => Qp::from_raw((*event).element.cast()).async_events.acknowledge(1),
            About::Port => {}
        }
    }
}
