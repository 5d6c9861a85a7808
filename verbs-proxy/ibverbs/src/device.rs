//! The worker's side of a real card: pieces become the card's work requests, its completions become answers.
//!
//! What a queue pair may send in one turn goes to the card together, and few of its requests are signaled: [`batch`]. Small requests
//! have the road inlined there: [`express`]. What is in flight is bounded by [`load`]: what waits does so here, where the scheduler
//! decides what comes next, and not in the card.
//!
//! Receive requests are given to the card as soon as the container has posted them, because a card has no other way to know of them.
//! So the container rings for each, and [`Device::rung`] hears it, unless the card has many: [`receives`].
//!
//! An error takes the card's queue pair to its error state by itself, and what is behind it comes back
//! flushed; the plane flushes the container's requests when the card has given back everything that it had
//! ([`Device::has_stopped`]). Where the plane is first, for a request that it does not admit, say, the control thread tells the card
//! ([`Task::Stop`]).

// UNSAFETY: posts requests, whose lists lie on the stack meanwhile, and takes completions into memory that the card's library fills.
#![allow(unsafe_code)]

mod batch;
mod completions;
mod express;
mod lists;
mod load;
mod loss;
mod receives;
#[cfg(test)]
mod speed;
#[cfg(test)]
mod ways;

use crate::card::{Card, CardQp, Cq, Mr};
use crate::names::{Kind, Lives, Name, Number};
use batch::{Batch, Refused, Request};
use completions::completed;
use load::Load;
use loss::Lost;
pub use loss::{forgotten, is_after, is_lost, lose, renew, resized};
use receives::{Receives, give_receives};
use ringfence_abi::{atomic, ibv_sge, ibv_wc, rdma, target};
use ringfence_protocol::verbs::{Access, Opcode, QpState, SendFlags, WcStatus};
use ringfence_protocol::work::Sge;
use ringfence_proxy::device::{Again, Answer, Cut, Device, Posted, WorkPiece};
use ringfence_proxy::memory::{AccessFault, PdId, RegionTable};
use ringfence_proxy::plane::claim::vendor;
use ringfence_proxy::plane::qp::{Data, Receiving};
use ringfence_proxy::plane::{self, Notice};
use ringfence_sched::Allowance;
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
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
    /// The card takes nothing any more: it is gone, which it may not have said yet.
    Gone {
        /// How many there have been before it.
        before: u32,
    },
}

/// The queue pairs that the control thread has made, by number.
pub type Made = Arc<Mutex<HashMap<u32, Arc<CardQp>>>>;

/// A receive request that the container has posted.
#[derive(Debug)]
struct Held {
    /// None if it has been completed, and one before it has not: no card does that on a connection.
    receiving: Option<Receiving>,
    /// The card has it.
    with_card: bool,
}

/// A piece that the card has.
#[derive(Debug)]
struct Sent {
    piece: WorkPiece,
    fetches: bool,
}

/// What is kept of a queue pair.
#[derive(Debug, Default)]
pub struct State {
    card: Option<Arc<CardQp>>,
    /// Pieces that the card has, oldest first, and the number of the first.
    sends: VecDeque<Sent>,
    first_send: Number,
    /// Receive requests, oldest first, and the number of the first. Those that the card has not are behind those that it has, unless it
    /// has flushed those before.
    receives: VecDeque<Held>,
    first_receive: Number,
    /// How many of them the card has.
    with_card: usize,
    /// What the first of them that cannot be given to the card fails with, when those before it are used.
    bad: Option<(WcStatus, u16)>,
    /// The container does not ring for those that it posts.
    unrung: bool,
    /// The card's queue pair is in error.
    stopped: bool,
    /// It waits for room on the card.
    waits: bool,
    /// The card is gone that it was made on.
    lost: Option<Lost>,
}

impl State {
    /// The card is done with everything: it gives nothing back any more, and reaches no memory for it.
    fn is_quiet(&self) -> bool {
        self.sends.is_empty() && self.with_card == 0
    }

    /// Takes out the oldest receive request.
    fn next_receive(&mut self) -> Option<Receiving> {
        while let Some(held) = self.receives.pop_front() {
            self.first_receive = self.first_receive.after(1);
            if let Some(receiving) = held.receiving {
                return Some(receiving);
            }
        }
        None
    }
}

#[derive(Debug)]
struct Queue {
    cq: Arc<Cq>,
    /// Its next completion makes an event, or has made one that has not been taken.
    armed: Cell<bool>,
    /// It had one since it was armed.
    due: Cell<bool>,
}

impl Queue {
    fn new(cq: &Arc<Cq>) -> Self {
        Self { cq: Arc::clone(cq), armed: Cell::new(false), due: Cell::new(false) }
    }
}

/// The device of one container.
#[derive(Debug)]
pub struct Ibverbs {
    /// None while it is gone.
    open: Option<Open>,
    /// How many cards have gone.
    before: u32,
    made: Made,
    queues: Vec<Queue>,
    lives: Lives,
    /// Requests of all kinds that the card has.
    given: usize,
    load: Load,
    /// What one queue pair has sent in this turn, and is not posted yet.
    batch: Batch,
    /// What the card did not take, by queue pair.
    refused: Vec<(u32, Refused)>,
    receives: Receives,
    /// Queues that the container has rung for.
    rung: Vec<u32>,
    /// What [`Device::prepare_sleep`] found.
    found: RefCell<Vec<ibv_wc>>,
    polled: Box<[ibv_wc]>,
    /// Everything goes the long way, so that the short one can be compared with it.
    #[cfg(test)]
    long_way_only: bool,
    /// Requests that went the short way.
    #[cfg(test)]
    went_short: usize,
}

/// A card, as the worker has it.
#[derive(Debug)]
pub struct Open {
    card: Arc<Card>,
    /// What stands for memory that a request may not reach.
    out_of_reach: Mr,
}

impl Open {
    /// The card with what the worker needs.
    ///
    /// # Errors
    /// What the card says.
    pub fn new(card: Arc<Card>) -> Result<Self, Errno> {
        Ok(Self { out_of_reach: Mr::out_of_reach(&card)?, card })
    }
}

// SAFETY: completions are numbers; the addresses in batches are of memory that is theirs.
unsafe impl Send for Ibverbs {}

fn no_completions(count: usize) -> Box<[ibv_wc]> {
    // SAFETY: plain data.
    std::iter::repeat_with(|| unsafe { std::mem::zeroed() }).take(count).collect()
}

impl Ibverbs {
    /// The device on this card, whose queue pairs are found in `made`.
    ///
    /// # Errors
    /// What the card says.
    pub fn new(card: Arc<Card>, made: Made) -> Result<Self, Errno> {
        let load = Load::of(&card.port()?);
        Ok(Self {
            open: Some(Open::new(card)?),
            before: 0,
            made,
            queues: Vec::new(),
            lives: Lives::default(),
            given: 0,
            load,
            batch: Batch::new(),
            refused: Vec::new(),
            receives: Receives::new(),
            rung: Vec::new(),
            found: RefCell::default(),
            polled: no_completions(BATCH),
            #[cfg(test)]
            long_way_only: false,
            #[cfg(test)]
            went_short: 0,
        })
    }

    /// What the card has of a queue pair is void: nobody waits for it, and its completions will name nothing.
    fn forget(&mut self, queue: u32, of: &mut State) -> Vec<WorkPiece> {
        self.lives.end(queue);
        self.given -= of.sends.len() + of.with_card;
        let sends = of.sends.drain(..).inspect(|sent| self.load.left(sent));
        let pieces = sends.map(|sent| sent.piece).collect();
        of.receives.clear();
        (of.with_card, of.bad) = (0, None);
        pieces
    }

    /// Takes the card's events: of each queue that is armed there is one at most.
    fn take_events(&self) {
        let Some(open) = &self.open else { return };
        while let Some(name) = open.card.completion_event() {
            self.queues.iter().filter(|queue| queue.cq.name == name).for_each(|queue| queue.armed.set(false));
            if !self.queues.iter().any(|queue| queue.armed.get()) {
                break;
            }
        }
    }

    /// Posts what there is of this queue pair.
    fn post_batch(&mut self, qp: &Qp) {
        if let Some(card) = &qp.device.card
            && let Err(refused) = self.batch.post(card)
        {
            self.refused.push((qp.queue, refused));
        }
    }
}

/// Posts what was not, whosever it is.
fn post_all(plane: &mut Plane) {
    let Plane { qps, device, .. } = plane;
    if !device.batch.is_empty()
        && let Some(qp) = &qps[device.batch.queue as usize]
    {
        device.post_batch(qp);
    }
    while let Some((queue, refused)) = plane.device.refused.pop() {
        take_back(plane, queue, refused);
    }
}

/// The card has not taken the last requests of a queue pair.
fn take_back(plane: &mut Plane, queue: u32, refused: Refused) {
    if matches!(refused.error, Errno::IO | Errno::NODEV) {
        // They end with everything else that it has.
        let before = plane.device.before;
        return plane.notices.push(Notice::Device(Task::Gone { before }));
    }
    let Plane { qps, device, .. } = plane;
    let Some(qp) = &mut qps[queue as usize] else { return };
    let sends = &mut qp.device.sends;
    let taken = sends.split_off(sends.len().saturating_sub(refused.count));
    device.given -= taken.len();
    taken.iter().for_each(|sent| device.load.left(sent));
    taken.iter().for_each(|sent| plane.departed(&sent.piece, plane.now));
    // What is behind the first is posted again, or fails, with it.
    if let Some(first) = taken.front() {
        let answer = match refused.error {
            // There is room for as many as are posted; the card may have other shortages, which pass.
            Errno::NOMEM | Errno::AGAIN => Answer::Again(Again::Later { first: 2_000, longest: 1_000_000 }),
            _ => Answer::Failed { status: WcStatus::LOC_QP_OP_ERR, vendor_err: vendor::OPCODE },
        };
        plane.answered(&first.piece, answer);
    }
}

/// Polls a queue, no more than [`BATCH`]. How many there were.
fn poll_queue(plane: &mut Plane, index: usize) -> usize {
    let mut polled = std::mem::take(&mut plane.device.polled);
    let completions = plane.device.queues[index].cq.poll(&mut polled);
    let count = completions.len();
    if count > 0 {
        plane.device.queues[index].due.set(true);
    }
    completions.iter().for_each(|wc| completed(plane, wc));
    plane.device.polled = polled;
    count
}

/// Lets those go on that waited for room on the card, if there is some.
fn let_go_on(plane: &mut Plane) {
    while let Some(queue) = plane.device.load.next_waiting() {
        if let Some(qp) = &mut plane.qps[queue as usize] {
            qp.device.waits = false;
            plane.activate(queue);
        }
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
    list: &mut [ibv_sge],
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
        list[count] = ibv_sge { addr, length, lkey: lkey.0 };
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

    #[inline(always)]
    fn express(plane: &mut Plane, queue: u32, allowance: Allowance) -> usize {
        #[cfg(test)]
        if plane.device.long_way_only {
            return 0;
        }
        let went = express::express(plane, queue, allowance);
        #[cfg(test)]
        {
            plane.device.went_short += went;
        }
        went
    }

    #[inline]
    fn holds_back(plane: &mut Plane, queue: u32, index: usize) -> bool {
        let Plane { qps, device, shaping, .. } = plane;
        let Some(qp) = &mut qps[queue as usize] else { return false };
        let Some(card) = &qp.device.card else { return false };
        if qp.device.sends.len() >= card.sends {
            return true;
        }
        let wqe = &qp.pending[index];
        if !device.load.is_full(wqe.fetches(), || shaping.is_urgent(0)) || shaping.is_urgent(wqe.total) {
            return false;
        }
        if !std::mem::replace(&mut qp.device.waits, true) {
            device.load.wait(queue);
        }
        true
    }

    fn post(plane: &mut Plane, index: usize, piece: &WorkPiece) -> Posted {
        if plane.device.batch.is_full() || (!plane.device.batch.is_empty() && plane.device.batch.queue != piece.queue) {
            post_all(plane);
            if plane.index_of(piece).is_none() {
                return Posted::Withdrawn;
            }
        }
        let fail = |status, vendor_err| Posted::Answered(Answer::Failed { status, vendor_err });
        let Plane { qps, regions, device, .. } = plane;
        let Some(qp) = &mut qps[piece.queue as usize] else { return Posted::Withdrawn };
        let Some(card) = &qp.device.card else { return fail(WcStatus::LOC_QP_OP_ERR, vendor::OPCODE) };
        let wqe = &qp.pending[index];
        let Some(work) = wqe.work.admitted() else { return fail(WcStatus::LOC_PROT_ERR, AccessFault::Key as u16) };
        let last = piece.offset + piece.bytes == piece.total;
        let fetches = work.fetches();
        let mut flags = SendFlags(0);
        if work.solicited && last {
            flags = flags | SendFlags::SOLICITED;
        }
        let sges = match &work.data {
            Data::Inline(bytes) if bytes.is_empty() => 0,
            Data::Inline(bytes) => {
                flags = flags | SendFlags::INLINE;
                device.batch.list_inline(bytes)
            }
            data => {
                let access = if fetches { Access::LOCAL_WRITE } else { Access(0) };
                let into = device.batch.list();
                match list(regions, qp.pd, data.sges(), piece.offset, piece.bytes, access, into) {
                    Ok(count) => count,
                    Err(fault) => return fail(WcStatus::LOC_PROT_ERR, fault as u16),
                }
            }
        };
        let remote_addr = work.remote_addr.wrapping_add(u64::from(piece.offset));
        let is_atomic = matches!(work.opcode, Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD);
        let number = qp.device.first_send.after(qp.device.sends.len());
        let name = Name { kind: Kind::Send, queue: piece.queue, life: device.lives.now(piece.queue), number };
        device.batch.queue = piece.queue;
        device.batch.add(&Request {
            wr_id: name.wr_id(),
            sges,
            opcode: u32::from(work.opcode.0),
            flags,
            imm_data: work.imm,
            to: if is_atomic {
                let (compare_add, swap, rkey) = (work.compare_add, work.swap, work.rkey);
                target { atomic: atomic { remote_addr, compare_add, swap, rkey } }
            } else {
                target { rdma: rdma { remote_addr, rkey: work.rkey } }
            },
            bytes: piece.bytes,
            awaited: work.signaled && last,
            // On other than 8 aligned bytes, or where the card has none.
            may_be_refused: is_atomic,
            room: card.sends,
        });
        let sent = Sent { piece: *piece, fetches };
        device.load.joined(&sent);
        device.given += 1;
        qp.device.sends.push_back(sent);
        Posted::InFlight
    }

    #[inline]
    fn commit(&mut self, qp: &Qp) {
        if !self.batch.is_empty() && self.batch.queue == qp.queue {
            self.post_batch(qp);
        }
    }

    #[inline]
    fn end_turn(plane: &mut Plane) {
        if !plane.device.batch.is_empty() || !plane.device.refused.is_empty() {
            post_all(plane);
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
            if plane.device.given == 0 {
                break;
            }
            worked |= poll_queue(plane, index) > 0;
        }
        if plane.device.load.has_waiting() {
            let_go_on(plane);
        }
        worked
    }

    fn unused_receive(qp: &mut Qp) -> Option<Receiving> {
        qp.device.next_receive()
    }

    fn has_stopped(qp: &Qp) -> bool {
        match qp.device.lost {
            Some(lost) => lost == Lost::Closed,
            None => qp.device.card.is_none() || (qp.device.stopped && qp.device.is_quiet()),
        }
    }

    fn modified(plane: &mut Plane, queue: u32, _: u32, _: Option<()>) {
        let Plane { qps, device, .. } = plane;
        let Some(qp) = &mut qps[queue as usize] else { return };
        if qp.device.card.is_none() && qp.device.lost.is_none() {
            let made = device.made.lock().unwrap_or_else(PoisonError::into_inner);
            qp.device.card = made.get(&qp.number).cloned();
            if let Some(card) = &qp.device.card
                && !device.queues.iter().any(|queue| queue.cq.name == card.cq.name)
            {
                device.queues.push(Queue::new(&card.cq));
            }
        }
        qp.device.unrung = false;
        qp.header.receive_bell.stop_polling();
        // What has been posted before it was known that somebody wants to hear of it. And before the program goes on: its peer may send
        // as soon as it says that it is ready, and with no RNR retries a message that finds no receive fails.
        give_receives(plane, queue);
    }

    fn reset(plane: &mut Plane, queue: u32) {
        let Some(qp) = &mut plane.qps[queue as usize] else { return };
        let mut state = std::mem::take(&mut qp.device);
        let pieces = plane.device.forget(queue, &mut state);
        pieces.iter().for_each(|piece| plane.departed(piece, plane.now));
        if let Some(qp) = &mut plane.qps[queue as usize] {
            (qp.device.card, qp.device.waits, qp.device.lost) = (state.card, state.waits, state.lost);
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
        let pieces = plane.device.forget(qp.queue, &mut qp.device);
        pieces.iter().for_each(|piece| plane.departed(piece, plane.now));
        plane.device.load.forget(qp.queue);
    }

    fn prepare_sleep(&self) -> bool {
        if self.given == 0 {
            return true;
        }
        // The event of a completion that was met awake would end the sleep as soon as it begins.
        if self.queues.iter().any(|queue| queue.armed.get() && queue.due.get()) {
            self.take_events();
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
            let polled = queue.cq.poll(&mut wc);
            // Or it came just after that.
            queue.due.set(!polled.is_empty());
            found.extend_from_slice(polled);
        }
        found.is_empty()
    }

    fn wakers(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.open.iter().filter_map(|open| open.card.completions())
    }

    fn woken(plane: &mut Plane) {
        plane.device.take_events();
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
    // Of the living there may come more all the time; what is left of former lives is within what fits.
    let most = plane.device.queues[index].cq.capacity as usize / BATCH + 1;
    for _ in 0..most {
        if poll_queue(plane, index) < BATCH {
            break;
        }
    }
}
