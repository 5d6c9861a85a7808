//! Queue pairs: making, changing, ending. Posting is in [`crate::post`].

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::{ibv_context, ibv_pd, ibv_qp, ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr, ibv_qp_init_attr_ex};
use crate::connection::{self, Connection};
use crate::context::Context;
use crate::cq::Cq;
use crate::events::Outstanding;
use crate::pd::Pd;
use crate::qp_attr;
use crate::registry::QUEUE_PAIRS;
use crate::shared::Shared;
use crate::sys::{self, Errno, Fd};
use crate::work_queue::WorkQueue;
use alloc::boxed::Box;
use core::ffi::{c_int, c_void};
use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};
use ringfence_protocol::control::{CreateQp, Handle, ModifyQp, Op, QpAttr, QpReply};
use ringfence_protocol::layout::{QpHeader, RINGS_OFFSET, qp_bytes};
use ringfence_protocol::ring::{Producer, SLOT_BYTES};
use ringfence_protocol::verbs::{QpAttrMask, QpState, QpType};
use zerocopy::IntoBytes;

/// `IBV_QP_INIT_ATTR_PD`.
const INIT_ATTR_PD: u32 = 1 << 0;
/// `IBV_QP_INIT_ATTR_CREATE_FLAGS`.
const INIT_ATTR_CREATE_FLAGS: u32 = 1 << 2;

/// Attributes that can be asked for; all of them are answered.
const QUERIED: u32 = (1 << 25) - 1;

/// What one work request may have.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Elements of a send request.
    pub max_send_sge: u32,
    /// Elements of a receive request.
    pub max_recv_sge: u32,
    /// Inline bytes.
    pub max_inline: u32,
}

/// A queue pair.
#[repr(C)]
pub struct Qp {
    /// What programs see.
    base: ibv_qp,
    state: AtomicU32,
    /// Of work requests.
    pub limits: Limits,
    /// What to ring.
    pub queue: u32,
    cookie: u32,
    /// Whether the worker must be told of sends.
    pub header: &'static QpHeader,
    /// Its process and proxy.
    pub connection: Connection,
    /// The send queue.
    pub send: WorkQueue,
    /// The receive queue.
    pub receive: WorkQueue,
    /// Events of its context.
    pub async_events: Outstanding,
    cap: ibv_qp_cap,
    sq_sig_all: c_int,
    /// Last, so that it outlives what points into it.
    _memory: Shared,
}

impl Qp {
    /// The queue pair behind a pointer that a program got from us.
    ///
    /// # Safety
    /// The pointer came from `ibv_create_qp` and has not been destroyed.
    #[inline(always)]
    pub unsafe fn from_raw<'a>(qp: *mut ibv_qp) -> &'a Self {
        // SAFETY: programs only get pointers to the first field of a `Qp`.
        unsafe { &*qp.cast::<Self>() }
    }

    /// As far as we know: the proxy may have moved it to the error state.
    #[inline(always)]
    pub fn state(&self) -> QpState {
        QpState(self.state.load(Ordering::Relaxed))
    }

    /// # Safety
    /// The domain and the completion queues are alive.
    unsafe fn create(pd: *mut ibv_pd, init: &mut ibv_qp_init_attr) -> Result<*mut ibv_qp, Errno> {
        match QpType(init.qp_type) {
            QpType::RC if init.srq.is_null() => {}
            QpType::RC | QpType::UC | QpType::UD | QpType::RAW_PACKET | QpType::XRC_SEND | QpType::DRIVER => {
                return Err(libc::EOPNOTSUPP);
            }
            // No type that a program can ask this verb for.
            _ => return Err(libc::EINVAL),
        }
        if pd.is_null() || init.send_cq.is_null() || init.recv_cq.is_null() {
            return Err(libc::EINVAL);
        }
        // SAFETY: by the caller's promise.
        let (domain, send_cq, recv_cq) =
            unsafe { (Pd::from_raw(pd), Cq::from_raw(init.send_cq), Cq::from_raw(init.recv_cq)) };
        // SAFETY: a domain's context outlives it.
        let connection = unsafe { Context::from_raw(domain.context()) }.connection;
        if !connection.generation.is_current() {
            return Err(libc::EIO);
        }
        let cookie = QUEUE_PAIRS.reserve()?;
        let request = CreateQp {
            pd: domain.handle(),
            send_cq: send_cq.base.handle,
            recv_cq: recv_cq.base.handle,
            qp_type: QpType(init.qp_type),
            max_send_wr: init.cap.max_send_wr,
            max_recv_wr: init.cap.max_recv_wr,
            max_send_sge: init.cap.max_send_sge,
            max_recv_sge: init.cap.max_recv_sge,
            max_inline: init.cap.max_inline_data,
            sq_sig_all: u32::from(init.sq_sig_all != 0),
            cookie,
            reserved: 0,
            event_cookie: u64::from(cookie),
        };
        let mut fds: [Option<Fd>; 1] = [None];
        let made = connection::call_with(connection.generation, Op::CREATE_QP, request.as_bytes(), &[], &mut fds);
        let [file] = fds;
        let (reply, memory) = match made.and_then(|reply: QpReply| {
            let file = file.ok_or(libc::EPROTO)?;
            let memory = Shared::map(&file, qp_bytes(reply.send_slots, reply.receive_slots)).inspect_err(|_| {
                let request = Handle { handle: reply.handle, reserved: 0 };
                let _: Result<(), Errno> = connection::call(connection.generation, Op::DESTROY_QP, &request);
            })?;
            Ok((reply, memory))
        }) {
            Ok(made) => made,
            Err(errno) => {
                QUEUE_PAIRS.remove(cookie);
                return Err(errno);
            }
        };
        init.cap = ibv_qp_cap {
            max_send_wr: reply.max_send_wr,
            max_recv_wr: reply.max_recv_wr,
            max_send_sge: reply.max_send_sge,
            max_recv_sge: reply.max_recv_sge,
            max_inline_data: reply.max_inline,
        };
        let receive_offset = RINGS_OFFSET + reply.send_slots as usize * SLOT_BYTES;
        // SAFETY: header and slots are dropped with the memory, which the queue pair keeps beside them.
        let (header, send, receive) = unsafe {
            let send = memory.slots(RINGS_OFFSET, reply.send_slots);
            let receive = memory.slots(receive_offset, reply.receive_slots);
            (memory.head(), Producer::new(send, 0), Producer::new(receive, 0))
        };
        // SAFETY: null pointers and zeros are valid in every field; zero mutexes and conditions are initialised ones.
        let mut base: ibv_qp = unsafe { mem::zeroed() };
        base.context = domain.context();
        base.qp_context = init.qp_context;
        base.pd = pd;
        base.send_cq = init.send_cq;
        base.recv_cq = init.recv_cq;
        base.handle = reply.handle;
        base.qp_num = reply.qp_num;
        base.state = QpState::RESET.0;
        base.qp_type = init.qp_type;
        let queue_pair = Box::into_raw(Box::new(Self {
            base,
            state: AtomicU32::new(QpState::RESET.0),
            limits: Limits {
                max_send_sge: reply.max_send_sge,
                max_recv_sge: reply.max_recv_sge,
                max_inline: reply.max_inline,
            },
            queue: reply.queue,
            cookie,
            header,
            connection,
            send: WorkQueue::new(send, reply.max_send_wr),
            receive: WorkQueue::new(receive, reply.max_recv_wr),
            async_events: Outstanding::default(),
            cap: init.cap,
            sq_sig_all: init.sq_sig_all,
            _memory: memory,
        }));
        QUEUE_PAIRS.set(cookie, queue_pair);
        Ok(queue_pair.cast())
    }

    /// Does something with both completion queues locked: nobody polls completions of this queue pair meanwhile.
    fn with_queues_locked<R>(&self, what: impl FnOnce() -> R) -> R {
        // SAFETY: completion queues outlive their queue pairs.
        let (send, receive) = unsafe { (Cq::from_raw(self.base.send_cq), Cq::from_raw(self.base.recv_cq)) };
        // In order of address, so that two queue pairs with crossed queues do not wait for each other.
        let (first, second) =
            if ptr::from_ref(send) <= ptr::from_ref(receive) { (send, receive) } else { (receive, send) };
        let _first = first.ring.lock();
        let _second = (!ptr::eq(first, second)).then(|| second.ring.lock());
        what()
    }

    fn modify(&self, attr: &ibv_qp_attr, mask: u32) -> Result<(), Errno> {
        let attr = qp_attr::to_wire(attr, QpAttrMask(mask))?;
        let resets = QpAttrMask(mask).contains(QpAttrMask::STATE) && attr.state == QpState::RESET;
        let (send_position, receive_position) = (self.send.position(), self.receive.position());
        let request = ModifyQp { handle: self.base.handle, reserved: 0, send_position, receive_position, attr };
        connection::call::<_, ()>(self.connection.generation, Op::MODIFY_QP, &request)?;
        if resets {
            self.with_queues_locked(|| {
                self.send.reset(send_position);
                self.receive.reset(receive_position);
            });
        }
        if QpAttrMask(mask).contains(QpAttrMask::STATE) {
            self.state.store(attr.state.0, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// `ibv_create_qp(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_create_qp(pd: *mut ibv_pd, init: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: the caller gave attributes, with a domain and queues of its own.
    sys::pointer_or_errno(unsafe { Qp::create(pd, &mut *init) })
}

/// `ibv_create_qp_ex(3)`, as far as it is `ibv_create_qp` in other words. Asked for the functions of the extended
/// interface, a device without them says so, and programs take the classic one.
pub unsafe extern "C" fn create_qp_ex(_context: *mut ibv_context, init: *mut ibv_qp_init_attr_ex) -> *mut ibv_qp {
    // SAFETY: the caller gave attributes.
    let (mask, flags, pd) = unsafe { ((*init).comp_mask, (*init).create_flags, (*init).pd) };
    let plain = mask & !(INIT_ATTR_PD | INIT_ATTR_CREATE_FLAGS) == 0
        && mask & INIT_ATTR_PD != 0
        && (mask & INIT_ATTR_CREATE_FLAGS == 0 || flags == 0);
    if !plain {
        return sys::pointer_or_errno(Err(libc::EOPNOTSUPP));
    }
    // SAFETY: the extended attributes begin with the plain ones.
    unsafe { ibv_create_qp(pd, init.cast()) }
}

/// `ibv_modify_qp(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int {
    // SAFETY: the caller created the queue pair and gave attributes.
    let result = unsafe { Qp::from_raw(qp).modify(&*attr, mask as u32) };
    if result.is_ok() && QpAttrMask(mask as u32).contains(QpAttrMask::STATE) {
        // SAFETY: a field that programs read; the call that changes it is not made from two threads at once.
        unsafe { (*qp).state = (*attr).qp_state };
    }
    sys::zero_or_errno(result)
}

/// `ibv_query_qp(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_query_qp(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    mask: c_int,
    init: *mut ibv_qp_init_attr,
) -> c_int {
    if mask as u32 & !QUERIED != 0 {
        return sys::zero_or_errno(Err(libc::EOPNOTSUPP));
    }
    // SAFETY: the caller created the queue pair.
    let queue_pair = unsafe { Qp::from_raw(qp) };
    let request = Handle { handle: queue_pair.base.handle, reserved: 0 };
    let reply: Result<QpAttr, Errno> = connection::call(queue_pair.connection.generation, Op::QUERY_QP, &request);
    sys::zero_or_errno(reply.map(|reply| {
        queue_pair.state.store(reply.state.0, Ordering::Relaxed);
        // SAFETY: the caller gave places for both kinds of attributes.
        unsafe {
            (*qp).state = reply.state.0;
            attr.write(qp_attr::from_wire(&reply, queue_pair.cap));
            init.write(ibv_qp_init_attr {
                qp_context: queue_pair.base.qp_context,
                send_cq: queue_pair.base.send_cq,
                recv_cq: queue_pair.base.recv_cq,
                srq: ptr::null_mut::<c_void>(),
                cap: queue_pair.cap,
                qp_type: queue_pair.base.qp_type,
                sq_sig_all: queue_pair.sq_sig_all,
            });
        }
    }))
}

/// `ibv_destroy_qp(3)`: waits until all its events are acknowledged.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_destroy_qp(qp: *mut ibv_qp) -> c_int {
    // SAFETY: the caller created the queue pair.
    let queue_pair = unsafe { Qp::from_raw(qp) };
    let request = Handle { handle: queue_pair.base.handle, reserved: 0 };
    let result: Result<(), Errno> = connection::call(queue_pair.connection.generation, Op::DESTROY_QP, &request);
    sys::zero_or_errno(result.map(|()| {
        // Pollers of its completions find it, or do not, but never while it ends.
        queue_pair.with_queues_locked(|| QUEUE_PAIRS.remove(queue_pair.cookie));
        queue_pair.async_events.wait();
        // SAFETY: allocated by `create`, and the caller gives it up.
        drop(unsafe { Box::from_raw(qp.cast::<Qp>()) });
    }))
}
