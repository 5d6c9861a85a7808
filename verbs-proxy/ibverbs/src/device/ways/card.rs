//! A card that carries nothing out before it is told to, in the place of libibverbs: it keeps what it is given.

// UNSAFETY: a card's side of libibverbs' interface: structures that begin with the interface's own, behind its pointers.
#![allow(unsafe_code)]

use crate::card::{About, Card, CardQp};
use crate::library::Library;
use ringfence_abi::*;
use ringfence_protocol::control::NO_INDEX;
use ringfence_protocol::verbs::{Opcode, QpAttrMask as Mask, QpState, SendFlags, WcStatus};
use ringfence_proxy::launch::FIRST_PORT;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::{c_int, c_uint, c_void};
use std::mem::zeroed;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::Arc;

const SIGNALED: u32 = SendFlags::SIGNALED.0 as u32;

/// The card's own part of a context, which it begins with. One thread has it.
#[repr(C)]
struct Inside {
    context: ibv_context,
    channel: ibv_comp_channel,
    made: u32,
    completions: VecDeque<ibv_wc>,
}

/// The card's own part of a queue pair.
#[repr(C)]
struct InsideQp {
    qp: ibv_qp,
    state: QpState,
    sends: VecDeque<(u64, bool)>,
    receives: VecDeque<u64>,
    /// After how many requests more it refuses one, and with what.
    refuses: Option<(usize, Errno)>,
    posted: Vec<String>,
}

/// The card, as its test has it.
pub(super) struct Fake {
    pub(super) card: Arc<Card>,
    inside: *mut Inside,
    _fds: [OwnedFd; 2],
}

/// One of its queue pairs.
#[derive(Clone, Copy)]
pub(super) struct FakeQp(*mut InsideQp);

impl Fake {
    pub(super) fn new() -> Self {
        let fds = [(); 2].map(|()| eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        // SAFETY: plain data, and pointers that may be null.
        let (context, channel) = unsafe { (zeroed::<ibv_context>(), zeroed::<ibv_comp_channel>()) };
        let mut inside = Box::new(Inside { context, channel, made: 0, completions: VecDeque::new() });
        inside.context.async_fd = fds[0].as_raw_fd();
        inside.channel.fd = fds[1].as_raw_fd();
        inside.context.ops.poll_cq = Some(poll_cq);
        inside.context.ops.req_notify_cq = Some(req_notify_cq);
        inside.context.ops.post_send = Some(post_send);
        inside.context.ops.post_recv = Some(post_recv);
        let inside = Box::into_raw(inside);
        let nowhere = PathBuf::from("/nonexistent");
        let about = About {
            name: "fake0".into(),
            guid: 0,
            node_type: 1,
            transport: 0,
            index: NO_INDEX,
            sysfs: nowhere.clone(),
            node: None,
            device: nowhere,
        };
        let context = NonNull::new(inside.cast::<ibv_context>()).unwrap();
        let card = Arc::new(Card::of(Arc::new(library()), context, about, FIRST_PORT).unwrap());
        Self { card, inside, _fds: fds }
    }

    /// A queue pair that was made on it.
    pub(super) fn of(&self, qp: &CardQp) -> FakeQp {
        FakeQp(qp.raw().cast())
    }

    /// Carries out so many requests of a queue pair's, or all that there are; with `fail` the last of them fails, and what is behind
    /// it is flushed. Of the last it says so, signaled or not: how far it has come must not depend on which requests went together.
    pub(super) fn carry_out(&mut self, qp: FakeQp, count: usize, fail: bool) {
        // SAFETY: one thread has the card, and nothing of it is borrowed elsewhere.
        let (inside, qp) = unsafe { (&mut *self.inside, &mut *qp.0) };
        for left in (0..count.min(qp.sends.len())).rev() {
            let (wr_id, signaled) = qp.sends.pop_front().unwrap();
            if fail && left == 0 {
                inside.complete(wr_id, WcStatus::REM_ACCESS_ERR);
                return inside.fail(qp);
            }
            if signaled || left == 0 {
                inside.complete(wr_id, WcStatus::SUCCESS);
            }
        }
    }

    /// A message arrives.
    pub(super) fn receive(&mut self, qp: FakeQp) {
        // SAFETY: as above.
        let (inside, qp) = unsafe { (&mut *self.inside, &mut *qp.0) };
        if let Some(wr_id) = qp.receives.pop_front() {
            inside.complete(wr_id, WcStatus::SUCCESS);
        }
    }

    /// Refuses a request when it has taken so many more.
    pub(super) fn refuse(&mut self, qp: FakeQp, after: usize, error: Errno) {
        // SAFETY: as above.
        unsafe { (*qp.0).refuses = Some((after, error)) };
    }

    /// What it has been given since it was asked last.
    pub(super) fn posted(&mut self, qp: FakeQp) -> Vec<String> {
        // SAFETY: as above.
        std::mem::take(unsafe { &mut (*qp.0).posted })
    }
}

impl Inside {
    fn complete(&mut self, wr_id: u64, status: WcStatus) {
        // SAFETY: plain data.
        let wc = ibv_wc { wr_id, status: status.0.into(), byte_len: 8, ..unsafe { zeroed() } };
        self.completions.push_back(wc);
    }

    fn fail(&mut self, qp: &mut InsideQp) {
        qp.state = QpState::ERR;
        let sends = qp.sends.drain(..).map(|(wr_id, _)| wr_id);
        for wr_id in sends.chain(qp.receives.drain(..)) {
            self.complete(wr_id, WcStatus::WR_FLUSH_ERR);
        }
    }
}

/// A request, in words. Where it was put on the way is left out, and whether the card is to say that it is done: that depends on which
/// requests go together.
fn said(wr: &ibv_send_wr) -> String {
    // SAFETY: the list is as long as it says; inline data are of this process; which of the union's members it is the opcode says.
    unsafe {
        let list = std::slice::from_raw_parts(wr.sg_list, if wr.num_sge > 0 { wr.num_sge as usize } else { 0 });
        let inline = wr.send_flags & u32::from(SendFlags::INLINE.0) != 0;
        let data: Vec<String> = list
            .iter()
            .map(|sge| match inline {
                true => {
                    let bytes = std::ptr::with_exposed_provenance::<u8>(sge.addr as usize);
                    format!("{:?}", std::slice::from_raw_parts(bytes, sge.length as usize))
                }
                false => format!("{:#x}+{} {:#x}", sge.addr, sge.length, sge.lkey),
            })
            .collect();
        let is_atomic =
            [Opcode::CMP_AND_SWP, Opcode::FETCH_AND_ADD].iter().any(|opcode| u32::from(opcode.0) == wr.opcode);
        let to = match is_atomic {
            true => {
                let to = wr.wr.atomic;
                format!("{:#x} {:#x} {} {}", to.remote_addr, to.rkey, to.compare_add, to.swap)
            }
            false => format!("{:#x} {:#x}", wr.wr.rdma.remote_addr, wr.wr.rdma.rkey),
        };
        format!(
            "{:#x}: {} flags {} imm {} {data:?} to {to}",
            wr.wr_id,
            wr.opcode,
            wr.send_flags & !SIGNALED,
            wr.imm_data
        )
    }
}

unsafe extern "C" fn post_send(qp: *mut ibv_qp, first: *mut ibv_send_wr, bad: *mut *mut ibv_send_wr) -> c_int {
    // SAFETY: of a queue pair of this card; the caller promises the list.
    unsafe {
        let (inside, qp) = (&mut *(*qp).context.cast::<Inside>(), &mut *qp.cast::<InsideQp>());
        let mut next = first;
        while let Some(wr) = next.as_ref() {
            match &mut qp.refuses {
                Some((0, error)) => {
                    let error = error.raw_os_error();
                    (qp.refuses, *bad) = (None, next);
                    return error;
                }
                Some((after, _)) => *after -= 1,
                None => {}
            }
            assert!(!wr.next.is_null() || wr.send_flags & SIGNALED != 0, "nobody will hear of the last");
            qp.posted.push(said(wr));
            match qp.state {
                QpState::ERR => inside.complete(wr.wr_id, WcStatus::WR_FLUSH_ERR),
                _ => qp.sends.push_back((wr.wr_id, wr.send_flags & SIGNALED != 0)),
            }
            next = wr.next;
        }
        0
    }
}

unsafe extern "C" fn post_recv(qp: *mut ibv_qp, first: *mut ibv_recv_wr, _: *mut *mut ibv_recv_wr) -> c_int {
    // SAFETY: as above.
    unsafe {
        let (inside, qp) = (&mut *(*qp).context.cast::<Inside>(), &mut *qp.cast::<InsideQp>());
        let mut next = first;
        while let Some(wr) = next.as_ref() {
            match qp.state {
                QpState::ERR => inside.complete(wr.wr_id, WcStatus::WR_FLUSH_ERR),
                _ => qp.receives.push_back(wr.wr_id),
            }
            next = wr.next;
        }
        0
    }
}

unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, most: c_int, into: *mut ibv_wc) -> c_int {
    // SAFETY: a queue of this card; there is room for as many.
    unsafe {
        let inside = &mut *(*cq).context.cast::<Inside>();
        let count = inside.completions.len().min(most as usize);
        inside.completions.drain(..count).enumerate().for_each(|(at, wc)| into.add(at).write(wc));
        count as c_int
    }
}

unsafe extern "C" fn req_notify_cq(_: *mut ibv_cq, _: c_int) -> c_int {
    0
}

unsafe extern "C" fn query_port(_: *mut ibv_context, _: u8, _: *mut ibv_port_attr) -> c_int {
    0
}

unsafe extern "C" fn alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    // SAFETY: plain data.
    Box::into_raw(Box::new(ibv_pd { context, ..unsafe { zeroed() } }))
}

/// Its keys are numbers in the order of registering.
unsafe extern "C" fn reg_mr(pd: *mut ibv_pd, addr: *mut c_void, length: usize, _: u64, _: c_uint) -> *mut ibv_mr {
    // SAFETY: of a domain of this card; plain data.
    unsafe {
        let context = (*pd).context;
        let inside = &mut *context.cast::<Inside>();
        inside.made += 1;
        let (lkey, rkey) = (0x1000 + inside.made, 0x2000 + inside.made);
        Box::into_raw(Box::new(ibv_mr { context, pd, addr, length, lkey, rkey, ..zeroed() }))
    }
}

unsafe extern "C" fn create_channel(context: *mut ibv_context) -> *mut ibv_comp_channel {
    // SAFETY: the context of this card.
    unsafe { &raw mut (*context.cast::<Inside>()).channel }
}

unsafe extern "C" fn create_cq(
    context: *mut ibv_context,
    cqe: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    _: c_int,
) -> *mut ibv_cq {
    // SAFETY: plain data.
    Box::into_raw(Box::new(ibv_cq { context, cqe, cq_context, channel, ..unsafe { zeroed() } }))
}

unsafe extern "C" fn create_qp(pd: *mut ibv_pd, _: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: as above.
    unsafe {
        let context = (*pd).context;
        let inside = &mut *context.cast::<Inside>();
        inside.made += 1;
        let qp = InsideQp {
            qp: ibv_qp { context, pd, qp_num: 100 + inside.made, ..zeroed() },
            state: QpState::RESET,
            sends: VecDeque::new(),
            receives: VecDeque::new(),
            refuses: None,
            posted: Vec::new(),
        };
        Box::into_raw(Box::new(qp)).cast()
    }
}

unsafe extern "C" fn modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int {
    // SAFETY: of this card; `attr` lives across the call.
    unsafe {
        let (inside, qp) = (&mut *(*qp).context.cast::<Inside>(), &mut *qp.cast::<InsideQp>());
        if mask.cast_unsigned() & Mask::STATE.0 == 0 {
            return 0;
        }
        match QpState((*attr).qp_state) {
            QpState::ERR => inside.fail(qp),
            state => qp.state = state,
        }
        if qp.state == QpState::RESET {
            // What has completed already stays in the queue.
            (qp.sends, qp.receives, qp.refuses) = (VecDeque::new(), VecDeque::new(), None);
        }
        0
    }
}

macro_rules! freed {
    ($($name:ident($what:ty as $whole:ty);)*) => {$(
        unsafe extern "C" fn $name(what: *mut $what) -> c_int {
            // SAFETY: made by this card, and destroyed once.
            drop(unsafe { Box::from_raw(what.cast::<$whole>()) });
            0
        }
    )*};
}

freed! {
    close_device(ibv_context as Inside);
    dealloc_pd(ibv_pd as ibv_pd);
    dereg_mr(ibv_mr as ibv_mr);
    destroy_cq(ibv_cq as ibv_cq);
    destroy_qp(ibv_qp as InsideQp);
}

unsafe extern "C" fn destroy_channel(_: *mut ibv_comp_channel) -> c_int {
    0
}

/// What the data path does not call.
macro_rules! uncalled {
    ($($name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {$(
        unsafe extern "C" fn $name($(_: $argument),*) $(-> $result)? {
            panic!(concat!(stringify!($name), " is not of the data path"))
        }
    )*};
}

uncalled! {
    get_device_list(*mut c_int) -> *mut *mut ibv_device;
    free_device_list(*mut *mut ibv_device);
    get_device_guid(*mut ibv_device) -> u64;
    open_device(*mut ibv_device) -> *mut ibv_context;
    query_device(*mut ibv_context, *mut ibv_device_attr) -> c_int;
    query_gid_table(*mut ibv_context, *mut ibv_gid_entry, usize, u32, usize) -> isize;
    query_pkey(*mut ibv_context, u8, c_int, *mut u16) -> c_int;
    get_cq_event(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
    ack_cq_events(*mut ibv_cq, c_uint);
    query_qp(*mut ibv_qp, *mut ibv_qp_attr, c_int, *mut ibv_qp_init_attr) -> c_int;
    get_async_event(*mut ibv_context, *mut ibv_async_event) -> c_int;
    ack_async_event(*mut ibv_async_event);
}

fn library() -> Library {
    Library {
        get_device_list,
        free_device_list,
        get_device_guid,
        open_device,
        close_device,
        query_device,
        query_port,
        query_gid_table,
        query_pkey,
        alloc_pd,
        dealloc_pd,
        reg_mr_iova: reg_mr,
        dereg_mr,
        create_comp_channel: create_channel,
        destroy_comp_channel: destroy_channel,
        create_cq,
        destroy_cq,
        get_cq_event,
        ack_cq_events,
        create_qp,
        modify_qp,
        query_qp,
        destroy_qp,
        get_async_event,
        ack_async_event,
        get_device_index: None,
        reg_dmabuf_mr: None,
    }
}
