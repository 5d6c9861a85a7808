//! The worker's side of a real card: pieces become the card's work requests, its completions become answers.
//!
//! Receive requests are given to the card as soon as the container has posted them, because a card has no other way to know of them.
//! So the container rings for each, and [`Device::rung`] hears it.
//!
//! Every piece is signaled. An error takes the card's queue pair to its error state by itself, and what is behind it comes back
//! flushed; the plane flushes the container's requests when the card has given back everything that it had
//! ([`Device::has_stopped`]). Where the plane is first, for a request that it does not admit, say, the control thread tells the card
//! ([`Task::Stop`]).

// UNSAFETY: posts requests, whose lists lie on the stack meanwhile, and takes completions into memory that the card's library fills.
#![allow(unsafe_code)]

mod completions;
mod receives;

use crate::card::{Card, CardQp, Cq, Mr};
use crate::slots::{Posted as Given, Slots, Token};
use completions::completed;
use receives::give_receives;
use ringfence_abi::{atomic, ibv_send_wr, ibv_sge, ibv_wc, rdma, target};
use ringfence_protocol::verbs::{Access, Opcode, QpState, SendFlags, WcStatus};
use ringfence_protocol::work::{MAX_SGE, Sge};
use ringfence_proxy::device::{Again, Answer, Cut, Device, Posted, WorkPiece};
use ringfence_proxy::memory::{AccessFault, PdId, RegionTable};
use ringfence_proxy::plane::intake::vendor;
use ringfence_proxy::plane::qp::{Data, Receiving};
use ringfence_proxy::plane::{self, Notice};
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

/// A data plane on this device.
pub type Plane = plane::Plane<Ibverbs>;
/// A queue pair on it.
pub type Qp = plane::qp::Qp<Ibverbs>;
/// A send request on it.
pub type Wqe = plane::qp::Wqe<Ibverbs>;

/// Bytes of a piece: long enough that the card's pipeline stays full, short enough that others have their turn.
const LONGEST: u32 = 1 << 20;
/// Completions that are looked at of one queue before others have their turn.
const BATCH: usize = 32;

/// What the control thread must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// A queue pair is in error: the card's is to be, too.
    Stop {
        /// Bell number.
        queue: u32,
        /// Which of those that had it.
        incarnation: u64,
        /// The card's number.
        number: u32,
    },
}

/// The queue pairs that the control thread has made, by number.
pub type Made = Arc<Mutex<HashMap<u32, Arc<CardQp>>>>;

/// A receive request that the container has posted.
#[derive(Debug)]
struct Held {
    receiving: Receiving,
    /// The card has it.
    token: Option<Token>,
}

/// What is kept of a queue pair.
#[derive(Debug, Default)]
pub struct State {
    card: Option<Arc<CardQp>>,
    /// Pieces that the card has, oldest first.
    sends: VecDeque<Token>,
    /// Receive requests, oldest first.
    receives: VecDeque<Held>,
    /// How many of them the card has.
    with_card: usize,
    /// One that cannot be given to the card. It fails when those before it are used.
    bad: Option<(Receiving, WcStatus, u16)>,
    /// The card's queue pair is in error.
    stopped: bool,
}

impl State {
    /// The card is done with everything: it gives nothing back any more, and reaches no memory for it.
    fn is_quiet(&self) -> bool {
        self.sends.is_empty() && self.with_card == 0
    }
}

#[derive(Debug)]
struct Queue {
    cq: Arc<Cq>,
    armed: Cell<bool>,
}

/// The device of one container.
#[derive(Debug)]
pub struct Ibverbs {
    card: Arc<Card>,
    made: Made,
    /// What stands for memory that a request may not reach.
    out_of_reach: Mr,
    queues: Vec<Queue>,
    given: Slots,
    /// Queues that the container has rung for.
    rung: Vec<u32>,
    /// What [`Device::prepare_sleep`] found.
    found: RefCell<Vec<ibv_wc>>,
    batch: Vec<ibv_wc>,
}

// SAFETY: completions are numbers.
unsafe impl Send for Ibverbs {}

impl Ibverbs {
    /// The device on this card, whose queue pairs are found in `made`.
    ///
    /// # Errors
    /// What the card says.
    pub fn new(card: Arc<Card>, made: Made) -> Result<Self, Errno> {
        // SAFETY: plain data.
        let empty: ibv_wc = unsafe { std::mem::zeroed() };
        let out_of_reach = Mr::out_of_reach(&card)?;
        Ok(Self {
            card,
            made,
            out_of_reach,
            queues: Vec::new(),
            given: Slots::default(),
            rung: Vec::new(),
            found: RefCell::default(),
            batch: vec![empty; BATCH],
        })
    }

    fn poll_queue(&mut self, index: usize) -> Vec<ibv_wc> {
        let mut batch = std::mem::take(&mut self.batch);
        let count = self.queues[index].cq.poll(&mut batch).len();
        batch.truncate(count);
        batch
    }

    fn put_back(&mut self, mut batch: Vec<ibv_wc>) {
        // SAFETY: plain data.
        batch.resize(BATCH, unsafe { std::mem::zeroed() });
        self.batch = batch;
    }

    /// What the card has of a queue pair is void: nobody waits for it, and its completions will name nothing.
    fn forget(&mut self, of: &mut State) -> Vec<WorkPiece> {
        let sends = of.sends.drain(..).filter_map(|token| match self.given.take(token) {
            Some(Given::Send(piece)) => Some(piece),
            _ => None,
        });
        let pieces = sends.collect();
        for held in of.receives.drain(..) {
            held.token.map(|token| self.given.take(token));
        }
        (of.with_card, of.bad) = (0, None);
        pieces
    }
}

/// The card's list for `bytes` of `data` from byte `offset` on.
fn list(
    regions: &RegionTable,
    pd: PdId,
    data: &[Sge],
    mut offset: u32,
    mut bytes: u32,
    access: Access,
    list: &mut [ibv_sge; MAX_SGE as usize],
) -> Result<usize, AccessFault> {
    let mut count = 0;
    for sge in data {
        if offset >= sge.length {
            offset -= sge.length;
            continue;
        }
        let length = (sge.length - offset).min(bytes);
        if length == 0 {
            break;
        }
        let addr = sge.addr.wrapping_add(u64::from(offset));
        let lkey = regions.device_key(sge.lkey, pd, addr, u64::from(length), access)?;
        list[count] = ibv_sge { addr, length, lkey };
        (count, offset, bytes) = (count + 1, 0, bytes - length);
    }
    Ok(count)
}

const NO_SGE: ibv_sge = ibv_sge { addr: 0, length: 0, lkey: 0 };

impl Device for Ibverbs {
    type Qp = State;
    type Work = ();
    type Destination = ();
    type Notice = Task;

    fn cut(_: &Qp, wqe: &Wqe) -> Cut {
        match wqe.opcode {
            Opcode::RDMA_WRITE | Opcode::RDMA_READ if !matches!(wqe.data, Data::Inline(_)) => Cut::Into(LONGEST),
            // Each takes a receive request of the peer's, or is one operation.
            _ => Cut::Never,
        }
    }

    fn is_own(_: &Qp) -> bool {
        false
    }

    #[inline]
    fn holds_back(plane: &mut Plane, queue: u32, _: usize) -> bool {
        plane.qps[queue as usize]
            .as_ref()
            .is_some_and(|qp| qp.device.card.as_ref().is_some_and(|card| qp.device.sends.len() >= card.sends))
    }

    fn post(plane: &mut Plane, index: usize, piece: &WorkPiece) -> Posted {
        let fail = |status, vendor_err| Posted::Answered(Answer::Failed { status, vendor_err });
        let Plane { qps, regions, device, .. } = plane;
        let Some(qp) = &mut qps[piece.queue as usize] else { return Posted::Withdrawn };
        let Some(card) = &qp.device.card else { return fail(WcStatus::LOC_QP_OP_ERR, vendor::OPCODE) };
        let wqe = &qp.pending[index];
        let Some(work) = wqe.work.admitted() else { return fail(WcStatus::LOC_PROT_ERR, AccessFault::Key as u16) };
        let last = piece.offset + piece.bytes == piece.total;
        let mut flags = SendFlags::SIGNALED;
        if work.solicited && last {
            flags = flags | SendFlags::SOLICITED;
        }
        let mut sges = [NO_SGE; MAX_SGE as usize];
        let count = match &work.data {
            Data::Inline(bytes) if bytes.is_empty() => 0,
            Data::Inline(bytes) => {
                flags = flags | SendFlags::INLINE;
                sges[0] =
                    ibv_sge { addr: bytes.as_ptr().expose_provenance() as u64, length: bytes.len() as u32, lkey: 0 };
                1
            }
            data => {
                let access = if work.fetches() { Access::LOCAL_WRITE } else { Access(0) };
                match list(regions, qp.pd, data.sges(), piece.offset, piece.bytes, access, &mut sges) {
                    Ok(count) => count,
                    Err(fault) => return fail(WcStatus::LOC_PROT_ERR, fault as u16),
                }
            }
        };
        let remote_addr = work.remote_addr.wrapping_add(u64::from(piece.offset));
        let is_atomic = matches!(work.opcode, Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD);
        let token = device.given.note(Given::Send(*piece));
        let mut request = ibv_send_wr {
            wr_id: token.0,
            next: null_mut(),
            sg_list: sges.as_mut_ptr(),
            num_sge: count as i32,
            opcode: u32::from(work.opcode.0),
            send_flags: u32::from(flags.0),
            imm_data: work.imm,
            wr: if is_atomic {
                let (compare_add, swap, rkey) = (work.compare_add, work.swap, work.rkey);
                target { atomic: atomic { remote_addr, compare_add, swap, rkey } }
            } else {
                target { rdma: rdma { remote_addr, rkey: work.rkey } }
            },
            remote_srqn: 0,
            rest: [0; 6],
        };
        // SAFETY: `sges` has `count` entries that are filled; inline data is the request's own, which stays in `pending` meanwhile.
        match unsafe { card.post_send(&mut request) } {
            Ok(()) => {
                qp.device.sends.push_back(token);
                Posted::InFlight
            }
            Err(error) => {
                device.given.take(token);
                match error {
                    // There is room for as many as are posted; the card may have other shortages, which pass.
                    Errno::NOMEM | Errno::AGAIN => {
                        Posted::Answered(Answer::Again(Again::Later { first: 2_000, longest: 1_000_000 }))
                    }
                    _ => fail(WcStatus::LOC_QP_OP_ERR, vendor::OPCODE),
                }
            }
        }
    }

    #[inline]
    fn rung(&mut self, queue: u32) {
        self.rung.push(queue);
    }

    fn poll(plane: &mut Plane) -> bool {
        let mut worked = false;
        while let Some(queue) = plane.device.rung.pop() {
            worked = true;
            give_receives(plane, queue);
        }
        let found = std::mem::take(plane.device.found.get_mut());
        worked |= !found.is_empty();
        found.iter().for_each(|wc| completed(plane, wc));
        for index in 0..plane.device.queues.len() {
            if plane.device.given.is_empty() {
                break;
            }
            let batch = plane.device.poll_queue(index);
            worked |= !batch.is_empty();
            batch.iter().for_each(|wc| completed(plane, wc));
            plane.device.put_back(batch);
        }
        worked
    }

    fn unused_receive(qp: &mut Qp) -> Option<Receiving> {
        let held = qp.device.receives.pop_front().map(|held| held.receiving);
        held.or_else(|| qp.device.bad.take().map(|(receiving, ..)| receiving))
    }

    fn has_stopped(qp: &Qp) -> bool {
        qp.device.card.is_none() || (qp.device.stopped && qp.device.is_quiet())
    }

    fn modified(plane: &mut Plane, queue: u32, _: u32, _: Option<()>) {
        let Plane { qps, device, .. } = plane;
        let Some(qp) = &mut qps[queue as usize] else { return };
        if qp.device.card.is_none() {
            let made = device.made.lock().unwrap_or_else(PoisonError::into_inner);
            qp.device.card = made.get(&qp.number).cloned();
            if let Some(card) = &qp.device.card
                && !device.queues.iter().any(|queue| queue.cq.name == card.cq.name)
            {
                device.queues.push(Queue { cq: Arc::clone(&card.cq), armed: Cell::new(false) });
            }
        }
        qp.header.receive_bell.stop_polling();
        // What has been posted before it was known that somebody wants to hear of it.
        device.rung.push(queue);
    }

    fn reset(plane: &mut Plane, queue: u32) {
        let Some(qp) = &mut plane.qps[queue as usize] else { return };
        let mut state = std::mem::take(&mut qp.device);
        let pieces = plane.device.forget(&mut state);
        pieces.iter().for_each(|piece| plane.departed(piece, plane.now));
        if let Some(qp) = &mut plane.qps[queue as usize] {
            qp.device.card = state.card;
        }
    }

    fn failed(plane: &mut Plane, queue: u32) {
        let Some(qp) = &plane.qps[queue as usize] else { return };
        if qp.device.card.is_some() && !qp.device.stopped {
            let task = Task::Stop { queue, incarnation: qp.incarnation, number: qp.number };
            plane.notices.push(Notice::Device(task));
        }
    }

    fn removed(plane: &mut Plane, qp: &mut Qp) {
        let pieces = plane.device.forget(&mut qp.device);
        pieces.iter().for_each(|piece| plane.departed(piece, plane.now));
    }

    fn prepare_sleep(&self) -> bool {
        if self.given.is_empty() {
            return true;
        }
        let mut found = self.found.borrow_mut();
        for queue in &self.queues {
            if queue.armed.replace(true) {
                continue;
            }
            queue.cq.arm();
            // What came before it was armed makes no event.
            // SAFETY: plain data.
            let mut wc = [unsafe { std::mem::zeroed() }; 1];
            found.extend_from_slice(queue.cq.poll(&mut wc));
        }
        found.is_empty()
    }

    fn wakers(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(self.card.completions())
    }

    fn woken(plane: &mut Plane) {
        let device = &mut plane.device;
        while let Some(name) = device.card.completion_event() {
            device.queues.iter().filter(|queue| queue.cq.name == name).for_each(|queue| queue.armed.set(false));
        }
    }
}

/// Whether a queue pair is in error, and the card's is not yet: it may have been reset since that was asked for.
#[must_use]
pub fn is_to_stop(plane: &Plane, queue: u32, incarnation: u64) -> bool {
    let qp = plane.qps.get(queue as usize).and_then(Option::as_ref);
    qp.is_some_and(|qp| qp.incarnation == incarnation && qp.state == QpState::ERR && !qp.device.stopped)
}

/// What the plane does in a queue pair that the control thread has taken to the card's error state.
pub fn stopped(plane: &mut Plane, queue: u32, incarnation: u64) {
    if let Some(qp) = plane.qps.get_mut(queue as usize).and_then(Option::as_mut)
        && qp.incarnation == incarnation
    {
        qp.device.stopped = true;
        plane.activate(queue);
    }
}

/// Takes what is left of former lives out of a completion queue, so that it has room for those to come.
pub fn drain(plane: &mut Plane, name: usize) {
    let Some(index) = plane.device.queues.iter().position(|queue| queue.cq.name == name) else { return };
    loop {
        let batch = plane.device.poll_queue(index);
        let count = batch.len();
        batch.iter().for_each(|wc| completed(plane, wc));
        plane.device.put_back(batch);
        if count < BATCH {
            return;
        }
    }
}
