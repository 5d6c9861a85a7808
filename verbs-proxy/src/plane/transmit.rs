//! The requester: posts admitted work requests to the device, in order, as the container's share allows.

use super::qp::Qp;
use super::shaping::Kind;
use super::{Outcome, Plane};
use crate::device::{Cut, Device, Posted, WorkPiece};
use ringfence_protocol::verbs::QpState;
use ringfence_sched::Closed;

/// Work requests of one queue before the others have their turn ...
pub const BATCH: usize = 32;
/// ... or bytes: some 30 µs of copying.
pub const BATCH_BYTES: u32 = 256 << 10;
/// Turns of parked queues before everything else is looked at again.
const UNPARKED: usize = 64;
/// Requests of one queue pair that have been claimed and are not complete.
pub const PIPELINE: usize = 256;

/// Whether a queue pair goes on after a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Handed {
    /// The piece is under way or done.
    On,
    /// The queue pair must wait, or is in error.
    Stop,
}

impl<D: Device> Plane<D> {
    /// Moves a queue pair's requests on.
    #[inline]
    pub(crate) fn transmit(&mut self, queue: u32) -> Outcome {
        if let Some(allowance) = self.shaping.in_hand()
            && D::express(self, queue, allowance) > 0
        {
            return Outcome::Worked;
        }
        let Some(qp) = &self.qps[queue as usize] else { return Outcome::Blocked };
        if qp.pending.is_empty() && qp.send.peek().is_none() {
            return Outcome::Idle;
        }
        self.advance(queue)
    }

    /// Lets parked queues go on, each in its turn, as far as the container's share goes. True if something moved.
    pub(crate) fn unpark(&mut self) -> bool {
        let mut worked = false;
        for _ in 0..UNPARKED {
            let link = self.device.link_now(self.now);
            let Some(queue) = self.shaping.next_parked(link, self.now) else { break };
            let parked = match &mut self.qps[queue as usize] {
                Some(qp) => std::mem::take(&mut qp.parked) && matches!(qp.state, QpState::RTS | QpState::SQD),
                None => false,
            };
            let outcome = if parked { self.advance(queue) } else { Outcome::Idle };
            worked |= outcome == Outcome::Worked;
            if let Some(qp) = &mut self.qps[queue as usize]
                && (qp.parked || (parked && outcome == Outcome::Worked && !self.shaping.is_alone()))
            {
                // It waits for its next turn, or goes on with this one.
                qp.parked = true;
                continue;
            }
            self.shaping.leave(queue, self.now);
            if outcome != Outcome::Blocked {
                self.activate(queue);
            }
        }
        worked
    }

    /// Claims requests and posts them, a bounded number of pieces.
    fn advance(&mut self, queue: u32) -> Outcome {
        let (mut worked, mut moved) = (false, 0);
        for _ in 0..BATCH {
            if moved >= BATCH_BYTES {
                break;
            }
            let Some(qp) = &mut self.qps[queue as usize] else { return Outcome::Blocked };
            if qp.state != QpState::RTS && qp.state != QpState::SQD {
                return Outcome::Worked;
            }
            if qp.waits.until > self.now || qp.waits.device {
                return Outcome::Blocked;
            }
            if qp.next >= qp.pending.len() {
                if qp.pending.len() >= PIPELINE || !self.claim_next(queue) {
                    return if worked { Outcome::Worked } else { Outcome::Idle };
                }
                worked = true;
                continue;
            }
            let index = qp.next;
            if let Err(refusal) = qp.admit(index, &self.regions) {
                if index > 0 {
                    // Those before it complete first; the last of them activates the queue.
                    return Outcome::Blocked;
                }
                self.fail(queue, refusal.status, refusal.vendor_err);
                return Outcome::Worked;
            }
            let wqe = &qp.pending[index];
            let waits = qp.fetching > 0 && (wqe.fence || (wqe.fetches() && qp.fetching >= qp.attr.max_rd_atomic));
            if waits && wqe.sent == 0 {
                self.hold(queue, index);
                return Outcome::Blocked;
            }
            if qp.probing && qp.awaits_answer() {
                return Outcome::Blocked;
            }
            if D::holds_back(self, queue, index) {
                // Those before it activate the queue when they are complete.
                return if worked { Outcome::Worked } else { Outcome::Blocked };
            }
            let Some(qp) = &mut self.qps[queue as usize] else { return Outcome::Blocked };
            let wqe = &qp.pending[index];
            let left = wqe.total - wqe.sent;
            let bytes = match D::cut(qp, wqe) {
                Cut::Into(longest) => self.shaping.piece(wqe.total, left).min(longest),
                Cut::Never => left,
            };
            let piece = WorkPiece {
                queue,
                incarnation: qp.incarnation,
                epoch: qp.epochs.now(),
                sequence: wqe.sequence,
                offset: wqe.sent,
                bytes,
                total: wqe.total,
            };
            let kind = Kind { fetches: wqe.fetches(), own: D::is_own(qp), in_flight: qp.in_flight };
            match self.shaping.schedule(&piece, kind, self.device.link_now(self.now), self.now) {
                Ok(()) => {}
                Err(Closed::Share) => {
                    qp.parked = true;
                    self.hold(queue, index);
                    return Outcome::Blocked;
                }
                Err(Closed::Queue) => {
                    self.hold(queue, index);
                    return Outcome::Blocked;
                }
            }
            if let Some(delay) = qp.pending[index].release(self.now) {
                self.tally.waited(delay);
            }
            qp.note_posted(index, piece.bytes);
            moved += piece.bytes;
            worked = true;
            if self.post(index, &piece) == Handed::Stop {
                let failed = self.qps[queue as usize].as_ref().is_some_and(|qp| qp.state == QpState::ERR);
                return if failed { Outcome::Worked } else { Outcome::Blocked };
            }
        }
        Outcome::Worked
    }

    /// Gives a piece to the device.
    #[inline]
    fn post(&mut self, index: usize, piece: &WorkPiece) -> Handed {
        let posted = D::post(self, index, piece);
        if posted == Posted::InFlight {
            if let Some(qp) = &mut self.qps[piece.queue as usize] {
                qp.in_flight += 1;
            }
            return Handed::On;
        }
        self.shaping.departed(piece, self.now);
        match posted {
            Posted::InFlight | Posted::Sent => Handed::On,
            Posted::Answered(answer) => self.complete_piece(index, piece, answer),
            Posted::Withdrawn => Handed::Stop,
        }
    }

    /// A request is held back from now on. The turn may not know the time, nor does a queue pair that waits have another one.
    fn hold(&mut self, queue: u32, index: usize) {
        let now = if self.shaping.knows_time() { self.now } else { crate::worker::now() };
        if let Some(qp) = &mut self.qps[queue as usize] {
            qp.pending[index].hold(now);
        }
    }
}

impl<D: Device> Qp<D> {
    fn note_posted(&mut self, index: usize, bytes: u32) {
        let wqe = &mut self.pending[index];
        wqe.sent += bytes;
        if wqe.sent == wqe.total {
            wqe.sent_all = true;
            self.fetching += u32::from(wqe.fetches());
            self.next += 1;
        }
    }
}
