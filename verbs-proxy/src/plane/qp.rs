//! A queue pair as the worker sees it.

use super::admit::Work;
use super::claim::Claim;
use super::cq::CqIndex;
use super::epochs::Epochs;
use super::receive::Received;
use crate::device::Device;
use crate::memory::PdId;
use crate::pacing::Nanos;
use crate::shared::{Held, Mapping, ring_slots};
use ringfence_protocol::control::QpAttr;
use ringfence_protocol::layout::{QpHeader, RINGS_OFFSET};
use ringfence_protocol::ring::{Consumer, Position, SLOT_BYTES};
use ringfence_protocol::verbs::{QpState, WcStatus};
use ringfence_protocol::work::{BASE_INLINE, Sge};
use ringfence_sched::{Nanos as Time, retry};
use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;

/// Capacities, as granted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caps {
    /// Work requests outstanding in the send queue.
    pub max_send_wr: u32,
    /// Work requests outstanding in the receive queue.
    pub max_recv_wr: u32,
    /// Scatter/gather elements of a send request.
    pub max_send_sge: u32,
    /// Scatter/gather elements of a receive request.
    pub max_recv_sge: u32,
    /// Inline bytes.
    pub max_inline: u32,
}

/// Who is told about asynchronous events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Connection.
    pub connection: u64,
    /// Context of that connection.
    pub context: u32,
}

/// The local data of a work request.
#[derive(Clone, Debug)]
pub enum Data {
    /// One element, or none (`length` zero).
    One(Sge),
    /// Several elements.
    List(Box<[Sge]>),
    /// Copied by the preload library when the request was posted.
    Inline(Inline),
}

/// Data that came in the ring.
#[derive(Clone, Debug)]
pub enum Inline {
    /// As many as the request's own slot holds, so that no small request allocates.
    Short([u64; BASE_INLINE as usize / 8], u8),
    /// More.
    Long(Box<[u8]>),
}

impl std::ops::Deref for Inline {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Short(words, bytes) => &zerocopy::IntoBytes::as_bytes(words)[..usize::from(*bytes)],
            Self::Long(bytes) => bytes,
        }
    }
}

/// A send request between its claim and its completion.
#[derive(Debug)]
pub struct Wqe<D: Device> {
    /// What is asked for.
    pub work: Work,
    /// Number of this request in its queue pair.
    pub sequence: u32,
    /// Bytes posted. A request of no bytes is posted once.
    pub sent: u32,
    /// Posted whole.
    pub sent_all: bool,
    /// Bytes acknowledged.
    pub done: u32,
    /// Acknowledged whole.
    pub done_all: bool,
    /// Bytes that were counted as carried out.
    pub counted: u32,
    /// Since when it is held back: zero if it is not, the end of time once it has gone.
    pub held: Nanos,
    /// What the device keeps of it.
    pub device: D::Work,
}

impl<D: Device> Wqe<D> {
    /// One that has just been claimed.
    pub fn new(claim: Claim, sequence: u32) -> Self {
        Self {
            work: Work::from(claim),
            sequence,
            sent: 0,
            sent_all: false,
            done: 0,
            done_all: false,
            counted: 0,
            held: 0,
            device: D::Work::default(),
        }
    }

    /// It is held back from now on, unless it was before.
    pub fn hold(&mut self, now: Nanos) {
        if self.held == 0 {
            self.held = now;
        }
    }

    /// It goes. The first time says how long it was held back.
    pub fn release(&mut self, now: Nanos) -> Option<Nanos> {
        match std::mem::replace(&mut self.held, Nanos::MAX) {
            Nanos::MAX => None,
            0 => Some(0),
            since => Some(now.saturating_sub(since)),
        }
    }
}

impl<D: Device> Deref for Wqe<D> {
    type Target = Claim;

    fn deref(&self) -> &Claim {
        self.work.claim()
    }
}

impl Data {
    /// Its elements; none of what came in the ring.
    #[must_use]
    pub fn sges(&self) -> &[Sge] {
        match self {
            Self::One(sge) => std::slice::from_ref(sge),
            Self::List(list) => list,
            Self::Inline(_) => &[],
        }
    }
}

/// A receive request in use.
#[derive(Debug)]
pub struct Receiving {
    /// Comes back in the completion.
    pub wr_id: u64,
    /// Where the message goes.
    pub data: Data,
    /// Ring position behind this request.
    pub freed: Position,
}

/// What its oldest request completes with when a queue pair in error is flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The status.
    pub status: WcStatus,
    /// More of it.
    pub vendor_err: u16,
}

/// What a requester waits for before it may go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    /// Not before this time (RNR), zero for none.
    pub until: Nanos,
    /// Until the device says so.
    pub device: bool,
    /// When the oldest request without an answer is given up, zero for never.
    pub deadline: Nanos,
}

/// A queue pair.
#[derive(Debug)]
pub struct Qp<D: Device> {
    /// QP number.
    pub number: u32,
    /// Bell number, the index in the plane's table.
    pub queue: u32,
    /// No other queue pair of this plane ever had or will have this one, as they may a bell number and a QP number.
    pub incarnation: u64,
    /// Protection domain.
    pub pd: PdId,
    /// What completions call it.
    pub cookie: u32,
    /// What asynchronous events call it.
    pub event_cookie: u64,
    /// Whom asynchronous events go to.
    pub owner: Owner,
    /// The send CQ.
    pub send_cq: CqIndex,
    /// The receive CQ.
    pub recv_cq: CqIndex,
    /// Every send request is signaled.
    pub sq_sig_all: bool,
    /// Capacities.
    pub caps: Caps,
    /// State.
    pub state: QpState,
    /// Attributes as last set.
    pub attr: QpAttr,
    /// What the device keeps of it.
    pub device: D::Qp,
    /// Send ring.
    pub send: Consumer<'static>,
    /// Receive ring.
    pub receive: Consumer<'static>,
    /// Shared header.
    pub header: Held<QpHeader>,
    _mapping: Arc<Mapping>,

    /// Requests claimed and not completed, oldest first.
    pub pending: VecDeque<Wqe<D>>,
    /// The first of `pending` that was not posted whole.
    pub next: usize,
    /// Number of the next request claimed.
    pub sequence: u32,
    /// Which of the pieces that the device has are void.
    pub epochs: Epochs,
    /// Pieces that are in flight, void ones too: only the device says when they are not.
    pub in_flight: u32,
    /// READs and atomics without an answer.
    pub fetching: u32,
    /// Why the queue pair is in error, until the request says so that made it.
    pub failure: Option<Failure>,
    /// The same of a receive request.
    pub failed_receive: Option<(Receiving, Received)>,
    /// Retries left before RETRY_EXC_ERR.
    pub retries: u32,
    /// Retries left before RNR_RETRY_EXC_ERR.
    pub rnr_retries: u32,
    /// Times in a row that the oldest request was told to come again later; each makes the next wait longer.
    pub put_off: u32,
    /// The last try was lost: no more than one piece goes before there is an answer. What is dropped again and again costs whoever
    /// drops it next to nothing then.
    pub probing: bool,
    /// What it waits for.
    pub waits: Waits,
    /// When the plane looks after it; zero for never.
    pub alarm: Nanos,
    /// In the worker's list of queues that it looks at each turn.
    pub active: bool,
    /// In the list of queues that wait for the container's share.
    pub parked: bool,
    /// Looks in a row that found nothing.
    pub idle: u32,
}

/// What [`Qp::new`] needs besides the memory.
#[derive(Clone, Copy, Debug)]
pub struct NewQp {
    /// QP number.
    pub number: u32,
    /// Bell number.
    pub queue: u32,
    /// Protection domain.
    pub pd: PdId,
    /// What completions call it.
    pub cookie: u32,
    /// What asynchronous events call it.
    pub event_cookie: u64,
    /// Whom asynchronous events go to.
    pub owner: Owner,
    /// The send CQ.
    pub send_cq: CqIndex,
    /// The receive CQ.
    pub recv_cq: CqIndex,
    /// Every send request is signaled.
    pub sq_sig_all: bool,
    /// Capacities.
    pub caps: Caps,
    /// Slots of the send ring.
    pub send_slots: u32,
    /// Slots of the receive ring.
    pub receive_slots: u32,
}

impl<D: Device> Qp<D> {
    /// A queue pair in state RESET.
    #[must_use]
    pub fn new(new: &NewQp, incarnation: u64, mapping: Arc<Mapping>) -> Self {
        let receive_at = RINGS_OFFSET + new.send_slots as usize * SLOT_BYTES;
        let header: Held<QpHeader> = mapping.header(0);
        // Receive requests are looked at when a message needs one.
        header.receive_bell.start_polling();
        Self {
            number: new.number,
            queue: new.queue,
            incarnation,
            pd: new.pd,
            cookie: new.cookie,
            event_cookie: new.event_cookie,
            owner: new.owner,
            send_cq: new.send_cq,
            recv_cq: new.recv_cq,
            sq_sig_all: new.sq_sig_all,
            caps: new.caps,
            state: QpState::RESET,
            attr: QpAttr::default(),
            device: D::Qp::default(),
            send: Consumer::new(ring_slots(&mapping, RINGS_OFFSET, new.send_slots), 0),
            receive: Consumer::new(ring_slots(&mapping, receive_at, new.receive_slots), 0),
            header,
            _mapping: mapping,
            pending: VecDeque::new(),
            next: 0,
            sequence: 0,
            epochs: Epochs::default(),
            in_flight: 0,
            fetching: 0,
            failure: None,
            failed_receive: None,
            retries: 0,
            rnr_retries: 0,
            put_off: 0,
            probing: false,
            waits: Waits::default(),
            alarm: 0,
            active: false,
            parked: false,
            idle: 0,
        }
    }

    /// Whether it takes requests from the other end.
    #[must_use]
    #[inline(always)]
    pub fn responds(&self) -> bool {
        matches!(self.state, QpState::RTR | QpState::RTS | QpState::SQD)
    }

    /// In SQD, with requests that were begun before and are not finished.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.state == QpState::SQD && !self.pending.is_empty()
    }

    /// Forgets all requests: the transition to RESET. The container goes on at the given ring positions.
    pub fn reset(&mut self, send: Position, receive: Position) {
        self.state = QpState::RESET;
        self.send.seek(send);
        self.receive.seek(receive);
        self.header.receive_bell.start_polling();
        self.pending.clear();
        self.next = 0;
        self.sequence = 0;
        self.epochs.renew();
        self.fetching = 0;
        self.failure = None;
        self.failed_receive = None;
        self.put_off = 0;
        self.probing = false;
        self.waits = Waits::default();
        self.attr = QpAttr::default();
    }

    /// Goes on as if nothing without an answer had been posted: it is posted again.
    pub fn restart(&mut self) {
        self.probing = false;
        if let Some(done) = self.pending.front().map(|wqe| wqe.done) {
            self.rewind(0, done);
        }
        self.waits = Waits::default();
    }

    /// When the oldest request is tried again, which was put off once more: [`retry::again`].
    pub fn put_off(&mut self, now: Nanos, first: Nanos, longest: Nanos) -> Nanos {
        let Time(at) = retry::again(Time(now), Time(first), Time(longest), self.put_off);
        self.put_off = self.put_off.saturating_add(1);
        at
    }

    /// The oldest request, or a part of it, was answered well: what comes is tried as often as the application asked.
    pub fn got_through(&mut self) {
        self.retries = self.attr.retry_cnt;
        self.rnr_retries = self.attr.rnr_retry;
        self.put_off = 0;
        self.probing = false;
    }

    /// Whether a piece is without an answer.
    #[must_use]
    pub fn awaits_answer(&self) -> bool {
        self.next > 0 || self.pending.front().is_some_and(|wqe| wqe.sent > wqe.done)
    }

    /// Where request number `sequence` is in `pending`.
    #[must_use]
    pub fn find(&self, sequence: u32) -> Option<usize> {
        let index = sequence.wrapping_sub(self.pending.front()?.sequence) as usize;
        (index < self.pending.len()).then_some(index)
    }

    /// Everything from `index` on, starting at its byte `offset`, must be posted again.
    pub fn rewind(&mut self, index: usize, offset: u32) {
        if let Some(wqe) = self.pending.get(index) {
            let oldest = self.pending.front().map_or((wqe.sequence, 0), |front| (front.sequence, front.done));
            self.epochs.renew_from((wqe.sequence, offset), oldest);
        }
        self.next = index;
        for (at, wqe) in self.pending.iter_mut().enumerate().skip(index) {
            wqe.sent = if at == index { offset } else { 0 };
            if wqe.fetches() && wqe.sent_all && !wqe.done_all {
                self.fetching = self.fetching.saturating_sub(1);
            }
            wqe.sent_all = false;
        }
    }
}
