//! What a device's answers mean for work requests, and the completions that come of them.

use super::claim::{vendor, wc_opcode};
use super::cq::CqIndex;
use super::qp::{Failure, Qp, Waits, Wqe};
use super::transmit::Handed;
use super::{CqEntry, Notice, Plane};
use crate::device::{Again, Answer, Device, WorkPiece};
use crate::pacing::{self, Nanos};
use crate::stats::Tally;
use ringfence_protocol::completion::Completion;
use ringfence_protocol::verbs::{EventType, WcStatus};

impl<D: Device> Plane<D> {
    /// Where the request of a piece is in its queue pair, unless the piece is void.
    #[inline]
    #[must_use]
    pub fn index_of(&self, piece: &WorkPiece) -> Option<usize> {
        let qp = self.qps.get(piece.queue as usize)?.as_ref()?;
        if qp.incarnation != piece.incarnation || !qp.epochs.count(piece.epoch, (piece.sequence, piece.offset)) {
            return None;
        }
        qp.find(piece.sequence)
    }

    /// The device says that a piece is in flight no more, since this time.
    pub fn departed(&mut self, piece: &WorkPiece, at: Nanos) {
        self.shaping.departed(piece, at);
        if let Some(qp) = &mut self.qps[piece.queue as usize]
            && qp.incarnation == piece.incarnation
        {
            qp.in_flight = qp.in_flight.saturating_sub(1);
            // It may wait for this, or to be flushed.
            self.activate(piece.queue);
        }
    }

    /// The device has the answer to a piece that it took. Nothing comes of it if the piece is void.
    pub fn answered(&mut self, piece: &WorkPiece, answer: Answer) {
        if let Some(index) = self.index_of(piece)
            && self.complete_piece(index, piece, answer) == Handed::On
        {
            self.activate(piece.queue);
        }
    }

    /// Does what the answer to a piece means for its request, which is at this index.
    pub(crate) fn complete_piece(&mut self, index: usize, piece: &WorkPiece, answer: Answer) -> Handed {
        let queue = piece.queue;
        let now = if matches!(answer, Answer::NotReady { .. } | Answer::Again(_)) { self.time() } else { self.now };
        let Self { qps, tally, .. } = self;
        let Some(qp) = &mut qps[queue as usize] else { return Handed::Stop };
        match answer {
            Answer::Done | Answer::Provisional => {
                let wqe = &mut qp.pending[index];
                wqe.done = piece.offset + piece.bytes;
                wqe.done_all = wqe.done == wqe.total;
                if answer == Answer::Done {
                    wqe.count(tally);
                }
                if wqe.done_all && wqe.fetches() && wqe.sent_all {
                    qp.fetching = qp.fetching.saturating_sub(1);
                }
                qp.got_through();
                self.complete_front(queue);
                return Handed::On;
            }
            Answer::Failed { .. } if index > 0 => {
                // It fails when those before it are complete; the last of them activates the queue.
                qp.rewind(index, piece.offset);
                qp.pending[index].work.doubt();
            }
            Answer::Failed { status, vendor_err } => self.fail(queue, status, vendor_err),
            Answer::NotReady { pause } => {
                tally.rnr_received();
                if qp.attr.rnr_retry != 7 {
                    if qp.rnr_retries == 0 {
                        self.fail(queue, WcStatus::RNR_RETRY_EXC_ERR, vendor::REMOTE);
                        return Handed::Stop;
                    }
                    qp.rnr_retries -= 1;
                }
                qp.rewind(index, piece.offset);
                // Nothing is under way any more, so no answer can be overdue.
                let at = qp.put_off(now, pause, pacing::LONGEST_PAUSE);
                qp.waits = Waits { until: at, ..Waits::default() };
                self.alarm(at, queue);
            }
            Answer::Lost { least } => {
                // Nothing goes before the retry timer, and then one piece first.
                qp.rewind(index, piece.offset);
                qp.waits.until = Nanos::MAX;
                qp.probing = true;
                self.await_answer(queue, least);
            }
            Answer::Again(Again::At(at)) => {
                qp.rewind(index, piece.offset);
                qp.waits = Waits { until: at, ..Waits::default() };
                self.alarm(at, queue);
            }
            Answer::Again(Again::Later { first, longest }) => {
                qp.rewind(index, piece.offset);
                let at = qp.put_off(now, first, longest);
                qp.waits.until = at;
                self.alarm(at, queue);
            }
            Answer::Again(Again::Told { least }) => {
                qp.rewind(index, piece.offset);
                qp.waits.device = true;
                self.await_answer(queue, least);
            }
            Answer::Again(Again::Anew) => {
                qp.pending[index].done = 0;
                qp.rewind(index, 0);
                return Handed::On;
            }
        }
        Handed::Stop
    }

    /// The device says that everything is done up to byte `end` of the request at this index. It knows that so much was posted,
    /// and what is fetched is there.
    pub fn done_up_to(&mut self, queue: u32, index: usize, end: u32) {
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        for (at, wqe) in qp.pending.range_mut(..=index).enumerate() {
            wqe.done = if at == index { end } else { wqe.total };
            let done = wqe.done == wqe.total;
            let done_before = std::mem::replace(&mut wqe.done_all, done);
            if !done_before {
                wqe.count(&self.tally);
            }
            if !done_before && wqe.done_all && wqe.fetches() && wqe.sent_all {
                qp.fetching = qp.fetching.saturating_sub(1);
            }
        }
        qp.got_through();
        self.complete_front(queue);
    }

    /// Completes the requests at the front that are done.
    fn complete_front(&mut self, queue: u32) {
        loop {
            let Some(qp) = &mut self.qps[queue as usize] else { return };
            let Some(wqe) = qp.pending.front().filter(|wqe| wqe.done_all) else { return };
            // What is said of it is read where it is: requests are large, and each is here once.
            let completion = wqe.signaled.then(|| Completion {
                wr_id: wqe.wr_id,
                status: WcStatus::SUCCESS,
                opcode: wc_opcode(wqe.opcode),
                byte_len: if wqe.fetches() { wqe.total } else { 0 },
                qp_num: qp.number,
                cookie: qp.cookie,
                freed: wqe.freed,
                ..Completion::default()
            });
            qp.pending.pop_front();
            qp.next = qp.next.saturating_sub(1);
            if let Some(completion) = completion {
                let cq = qp.send_cq;
                self.complete(cq, &completion, false);
            }
        }
    }

    /// Takes the queue pair to the error state, in which the oldest request completes with this before all others are flushed:
    /// not before nothing of it is under way any more.
    pub fn fail(&mut self, queue: u32, status: WcStatus, vendor_err: u16) {
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        if !qp.pending.is_empty() {
            qp.failure = Some(Failure { status, vendor_err });
            self.to_error(queue);
        }
    }

    /// Completes the request that took a queue pair to the error state. False if none has.
    pub(super) fn complete_failed(&mut self, queue: u32) -> bool {
        let Some(qp) = &mut self.qps[queue as usize] else { return false };
        let Some(Failure { status, vendor_err }) = qp.failure.take() else { return false };
        let Some(wqe) = qp.pending.pop_front() else { return false };
        let completion =
            Completion { status, opcode: wc_opcode(wqe.opcode), vendor_err, ..flushed(qp, wqe.wr_id, wqe.freed) };
        let cq = qp.send_cq;
        self.complete(cq, &completion, true);
        true
    }

    /// Writes a completion. `solicited` counts for queues armed for solicited events.
    #[inline(always)]
    pub(crate) fn complete(&mut self, cq: CqIndex, completion: &Completion, solicited: bool) {
        let Some(Some(entry)) = self.cqs.get_mut(cq.0) else { return };
        self.tally.completed(completion.status);
        entry.cq.solicited |= solicited || completion.status != WcStatus::SUCCESS;
        if entry.push(completion, &self.tally, &mut self.notices) {
            self.touched.push(cq);
        }
    }
}

impl<D: Device> Wqe<D> {
    /// Counts what has been done of it since it was counted last.
    #[inline(always)]
    fn count(&mut self, tally: &Tally) {
        let bytes = self.done.saturating_sub(std::mem::replace(&mut self.counted, self.done));
        tally.sent(self.opcode, bytes, self.done_all);
    }
}

impl CqEntry {
    /// Writes a completion. True if the queue is to be looked at when the turn ends, as it has a channel.
    #[inline(always)]
    pub(crate) fn push<N>(&mut self, completion: &Completion, tally: &Tally, notices: &mut Vec<Notice<N>>) -> bool {
        match self.cq.push(completion) {
            Ok(()) => self.cq.has_channel() && !std::mem::replace(&mut self.cq.touched, true),
            Err(overrun) => {
                tally.completion_lost();
                if overrun.first {
                    let (owner, cookie) = (self.owner, self.cq.cookie);
                    notices.push(Notice::Event { owner, event: EventType::CQ_ERR, cookie });
                }
                false
            }
        }
    }
}

/// The completion of a request of a queue pair in error.
pub(super) fn flushed<D: Device>(qp: &Qp<D>, wr_id: u64, freed: u32) -> Completion {
    Completion {
        wr_id,
        status: WcStatus::WR_FLUSH_ERR,
        qp_num: qp.number,
        cookie: qp.cookie,
        freed,
        ..Completion::default()
    }
}
