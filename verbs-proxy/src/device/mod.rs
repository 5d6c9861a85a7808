//! The seam between the data plane and what moves the bytes of work requests.
//!
//! [`Plane`] claims requests, admits them, has the scheduler say when a piece of one goes, counts, times, completes and
//! flushes, and knows nothing of how a piece gets to its responder. A device does nothing else:
//!
//! ```text
//!              claim → admit → schedule ─► post ──► Answered ─────────────────────┐
//!                                           │                                     ▼
//!                                           ├─────► Sent ────────► answered ──► complete
//!                                           │                        ▲
//!                                           └─────► InFlight ─► departed
//! ```
//!
//! One device is compiled into a proxy: the plane is generic over it, and nothing on the data path is looked up. So the
//! functions that need the plane get it whole, `&mut Plane<Self>`, with the device in [`Plane::device`], what it keeps of a queue
//! pair in [`Qp::device`] and of a request in [`Wqe::device`].
//!
//! What every device keeps to:
//!
//! - A piece that it has taken ([`Posted::InFlight`], [`Posted::Sent`]) is answered once, or is void: its queue pair was
//!   reset, destroyed or is in error, or the plane has taken the request back. [`Plane::index_of`] tells. Of what is
//!   void nothing is read from the container's memory or written to it any more when the verb that made it so has returned, nor when
//!   its request has been completed ([`Device::has_stopped`]).
//! - Of each piece that is [`Posted::InFlight`] it says once that it has departed ([`Plane::departed`]), void or not: until then
//!   the scheduler counts its bytes, whatever became of the queue pair.
//! - Pieces of one queue pair are answered in the order in which they were posted, as on an RC connection. Of different
//!   queue pairs, in any order.
//!
//! [`soft`] is the software device. The tests have another one (`plane/tests/out_of_step.rs`), which completes late, in another
//! order, with errors, or not at all.

pub mod control;
pub mod soft;

use crate::pacing::Nanos;
use crate::plane::Plane;
use crate::plane::qp::{Qp, Receiving, Wqe};
use ringfence_protocol::verbs::WcStatus;
use ringfence_sched::{Allowance, BitRate, LinkNow};
use rustix::fd::BorrowedFd;
use std::fmt::Debug;

/// A piece of a work request, as it is posted to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkPiece {
    /// Bell number.
    pub queue: u32,
    /// [`Qp::incarnation`], in case the bell number has been given to another queue pair.
    pub incarnation: u64,
    /// [`Qp::epochs`] when it was posted.
    pub epoch: u64,
    /// The work request: [`Wqe::sequence`].
    pub sequence: u32,
    /// Offset in the work request.
    pub offset: u32,
    /// Bytes.
    pub bytes: u32,
    /// Bytes of the whole work request.
    pub total: u32,
}

/// What became of a piece that was posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    /// The device has it, and its bytes count until [`Plane::departed`]. Its answer comes by [`Plane::answered`].
    InFlight,
    /// The device has it, and its bytes count no more. Its answer comes by [`Plane::answered`].
    Sent,
    /// It has its answer.
    Answered(Answer),
    /// By what the device did to the plane meanwhile, the piece has been taken back already.
    Withdrawn,
}

/// The answer to a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Executed; what a READ or an atomic fetches is in the container's memory.
    Done,
    /// The same for a piece that is not the request's last, but [`Again::Anew`] may follow: it counts when the last is done.
    Provisional,
    /// Its request completes with this, and the queue pair is in error. If there are requests before it without an answer, it is
    /// admitted and posted again when they have theirs, and fails then.
    Failed {
        /// The status.
        status: WcStatus,
        /// More of it, from [`crate::plane::claim::vendor`] or the device's own.
        vendor_err: u16,
    },
    /// The receiver has no receive request, and asks for a pause: one of as many retries as the application allows.
    NotReady {
        /// How long.
        pause: Nanos,
    },
    /// Nobody will answer. The retry timer decides when it is posted again, or given up.
    Lost {
        /// The shortest timeout that makes sense, whatever the application asks for.
        least: Nanos,
    },
    /// It was not executed, which is nobody's fault and no retry: the piece, and all behind it, is posted again.
    Again(Again),
}

/// When a piece is posted again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// At this time. This was an answer: no other is overdue before.
    At(Nanos),
    /// After a while, longer each time in a row, but for the retry timer if that is set.
    Later {
        /// The first time.
        first: Nanos,
        /// The longest.
        longest: Nanos,
    },
    /// When the device says so ([`Plane::resume`]), but for the retry timer.
    Told {
        /// The shortest timeout.
        least: Nanos,
    },
    /// Now, and from the request's first byte: what of it has been done, which was [`Answer::Provisional`], is done again.
    Anew,
}

/// How a request may be divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Into pieces of no more bytes than this, as the scheduler likes.
    Into(u32),
    /// Not at all: it goes as one piece, as a SEND on a device that has a receive request for each.
    Never,
}

/// The worker's side of a device: everything that happens on the data path.
pub trait Device: Debug + Sized + 'static {
    /// What it keeps of a queue pair.
    type Qp: Debug + Default + Send;
    /// What it keeps of a work request.
    type Work: Debug + Default + Send;
    /// What an address vector names.
    type Destination: Copy + Debug + Send;
    /// What the control thread must do for it.
    type Notice: Debug + Send;

    /// The rate of the link that containers share, if the scheduler is to keep what is in flight on it short.
    fn link_rate(&self) -> Option<BitRate> {
        None
    }

    /// That link at this moment.
    fn link_now(&self, now: Nanos) -> LinkNow {
        let _ = now;
        LinkNow::default()
    }

    /// How a request may be divided.
    fn cut(qp: &Qp<Self>, wqe: &Wqe<Self>) -> Cut;

    /// Whether the responder is this container: what is fetched then leaves it as well.
    fn is_own(qp: &Qp<Self>) -> bool;

    /// The road inlined for as many as possible of a queue pair's next requests; how many went, no more than the allowance. It
    /// takes the road's decisions and has its effects, or leaves a request in the ring.
    #[inline(always)]
    fn express(plane: &mut Plane<Self>, queue: u32, allowance: Allowance) -> usize {
        let _ = (plane, queue, allowance);
        0
    }

    /// Whether the next request, which is at this index, had better not go before those ahead of it are complete.
    #[inline(always)]
    fn holds_back(plane: &mut Plane<Self>, queue: u32, index: usize) -> bool {
        let _ = (plane, queue, index);
        false
    }

    /// Takes a piece of the request at this index.
    fn post(plane: &mut Plane<Self>, index: usize, piece: &WorkPiece) -> Posted;

    /// All that was posted for a queue pair in this turn has been: whoever is to look at it is told once.
    #[inline(always)]
    fn commit(&mut self, qp: &Qp<Self>) {
        let _ = qp;
    }

    /// The container has rung for this queue, which it may not have: there may be requests in its rings. For devices that are
    /// given receive requests in advance; of send requests the plane knows.
    #[inline(always)]
    fn rung(&mut self, queue: u32) {
        let _ = queue;
    }

    /// Looks at what has come of pieces. A bounded amount; true if there was something.
    fn poll(plane: &mut Plane<Self>) -> bool;

    /// A turn ends.
    #[inline(always)]
    fn end_turn(plane: &mut Plane<Self>) {
        let _ = plane;
    }

    /// The oldest receive request of a queue pair in error that the device has taken ([`Plane::take_receive`]) and has not used.
    fn unused_receive(qp: &mut Qp<Self>) -> Option<Receiving> {
        let _ = qp;
        None
    }

    /// Whether nothing of a queue pair in error reaches the container's memory any more, so that its requests may be flushed. If
    /// not, [`Plane::activate`] says when.
    fn has_stopped(qp: &Qp<Self>) -> bool {
        let _ = qp;
        true
    }

    /// Attributes of a queue pair were set, as `mask` says, with [`ringfence_protocol::verbs::QpAttrMask::AV`] also where it sends.
    fn modified(plane: &mut Plane<Self>, queue: u32, mask: u32, destination: Option<Self::Destination>);

    /// A queue pair has gone to RESET.
    fn reset(plane: &mut Plane<Self>, queue: u32);

    /// A queue pair has gone to the error state.
    fn failed(plane: &mut Plane<Self>, queue: u32);

    /// A queue pair has been taken out.
    fn removed(plane: &mut Plane<Self>, qp: &mut Qp<Self>);

    /// Whether a turn must know the time for this device.
    fn wants_time(&self) -> bool {
        false
    }

    /// When it must be polled at the latest.
    fn wake_at(&self) -> Option<Nanos> {
        None
    }

    /// Announces sleep to all who might have something for it; false if there is something. [`Self::awake`] follows.
    fn prepare_sleep(&self) -> bool {
        true
    }

    /// Takes the announcement back.
    fn awake(&self) {}

    /// What wakes a sleeping worker, when it is readable.
    fn wakers(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::empty()
    }

    /// One of [`Self::wakers`] was readable.
    fn woken(plane: &mut Plane<Self>) {
        let _ = plane;
    }
}
