//! The requester: hands admitted work requests to their responders, in order, as the container's share allows.

use super::intake::{self, vendor, wc_opcode};
use super::qp::{Data, Peer, Qp, Waits, Wqe};
use super::remote::MIN_REMOTE_TIMEOUT;
use super::respond::{OWN_PORT, Verdict};
use super::shaping::{Kind, OnWire};
use super::wire::{self, Request};
use super::{Notice, Outcome, Plane};
use crate::memory::{AccessFault, Lost, Piece, RegionTable, copy, copy_list};
use crate::pacing::{self, Nanos};
use crate::state;
use ringfence_protocol::completion::Completion;
use ringfence_protocol::verbs::{Access, EventType, Opcode, QpState, SendFlags, WcOpcode, WcStatus};
use ringfence_protocol::work::{self, SendBase, Sge};
use ringfence_sched::scheduler::charged;
use ringfence_sched::{Allowance, Bytes, Closed, Ops};

/// Work requests of one queue before the others have their turn ...
pub(super) const BATCH: usize = 32;
/// ... or bytes: some 30 µs of copying.
pub(super) const BATCH_BYTES: u32 = 256 << 10;
/// Turns of parked queues before everything else is looked at again.
const UNPARKED: usize = 64;
/// Requests of one queue pair under way to another proxy.
const PIPELINE: usize = 256;
/// Local memory that was taken away.
pub(super) const LOST: u16 = AccessFault::Lost as u16;
/// The shortest timeout of a request to nobody: a fraction of that would keep the worker busy with nothing else.
const MIN_TIMEOUT: Nanos = 1_000_000;

/// What came of handing over a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handed {
    /// It is under way or done.
    On,
    /// The queue pair must wait, or is in error.
    Stop,
}

impl Plane {
    /// Moves a queue pair's requests on.
    #[inline]
    pub(super) fn transmit(&mut self, queue: u32) -> Outcome {
        if let Some(allowance) = self.shaping.in_hand()
            && self.express(queue, allowance) > 0
        {
            return Outcome::Worked;
        }
        let Some(qp) = &self.qps[queue as usize] else { return Outcome::Blocked };
        if qp.pending.is_empty() && qp.send.peek().is_none() {
            return Outcome::Idle;
        }
        self.advance(queue)
    }

    /// The short way for the commonest request, a small WRITE to a queue pair of the same proxy with nothing before it.
    /// Returns how many went it, no more than the policy allows without a look at the clock. Whatever is unusual is left in the
    /// ring for [`Self::advance`], which finds out again what is wrong with it.
    #[inline]
    fn express(&mut self, queue: u32, allowance: Allowance) -> usize {
        let Some(qp) = &self.qps[queue as usize] else { return 0 };
        let peer = match qp.peer {
            Peer::Local => qp.peer_queue,
            Peer::Link(link) => return self.express_by_grant(queue, link, allowance),
            Peer::None => return 0,
        };
        let Self { qps, regions, cqs, touched, shaping, tally, .. } = self;
        let Ok([Some(qp), Some(other)]) = qps.get_disjoint_mut([queue as usize, peer as usize]) else { return 0 };
        if !qp.pending.is_empty()
            || qp.state != QpState::RTS
            || other.number != qp.attr.dest_qp_num
            || !matches!(other.state, QpState::RTS | QpState::SQD)
            || other.attr.dest_qp_num != qp.number
            || other.peer != Peer::Local
            || other.responder.offset != 0
            || other.responder.sequence != qp.sequence
            || qp.by_grant != 0
            || !other.attr.access.contains(Access::REMOTE_WRITE)
        {
            return 0;
        }
        let Some(Some(entry)) = cqs.get_mut(qp.send_cq) else { return 0 };
        let most = allowance.ops.0.min(BATCH as u64) as usize;
        let longest = allowance.longest.0.min(EXPRESS_BYTES.into()) as u32;
        let (mut count, mut moved, mut paid) = (0, 0, Bytes(0));
        while count < most && moved < BATCH_BYTES {
            let Some(words) = qp.send.peek() else { break };
            let base = SendBase(words);
            let fields = base.fields();
            if fields.opcode != Opcode::RDMA_WRITE {
                break;
            }
            let head = base.inline_head();
            let (source, bytes) = if fields.flags.contains(SendFlags::INLINE) {
                let bytes = u32::from(fields.inline_bytes);
                if bytes == 0 || bytes > work::BASE_INLINE.min(qp.caps.max_inline) {
                    break;
                }
                (Piece::of_own(zerocopy::IntoBytes::as_bytes(&head)).slice(0, bytes as usize), bytes)
            } else {
                let bytes = fields.sge.length;
                if fields.sges != 1 || bytes == 0 || bytes > longest || qp.caps.max_send_sge == 0 {
                    break;
                }
                match regions.admit(fields.sge.lkey, qp.pd, fields.sge.addr, u64::from(bytes), Access(0)) {
                    Ok(piece) => (piece, bytes),
                    Err(_) => break,
                }
            };
            let target =
                regions.admit(fields.rkey, other.pd, fields.remote_addr, u64::from(bytes), Access::REMOTE_WRITE);
            let Ok(target) = target else { break };
            let due = paid.plus(charged(Bytes(bytes.into())));
            if due > allowance.out || copy(target, source).is_err() {
                break;
            }
            paid = due;
            qp.send.advance(1);
            count += 1;
            moved += bytes;
            if qp.sq_sig_all || fields.flags.contains(SendFlags::SIGNALED) {
                let completion = Completion {
                    wr_id: fields.wr_id,
                    status: WcStatus::SUCCESS,
                    opcode: WcOpcode::RDMA_WRITE,
                    qp_num: qp.number,
                    cookie: qp.cookie,
                    freed: qp.send.position(),
                    ..Completion::default()
                };
                if let Err(overrun) = entry.cq.push(&completion) {
                    tally.completion_lost();
                    if overrun.first {
                        let event = EventType::CQ_ERR;
                        self.notices.push(Notice::Event { owner: entry.owner, event, cookie: entry.cq.cookie });
                    }
                } else if entry.cq.has_channel() && !entry.cq.touched {
                    entry.cq.touched = true;
                    touched.push(qp.send_cq);
                }
            }
        }
        shaping.spend(paid, Bytes(0), Ops(count as u64));
        if count > 0 {
            tally.sent_at_once(Opcode::RDMA_WRITE, count as u64, moved.into());
            tally.received_whole(Opcode::RDMA_WRITE, count as u64, moved.into());
        }
        qp.sequence = qp.sequence.wrapping_add(count as u32);
        other.responder.sequence = qp.sequence;
        count
    }

    /// Lets parked queues go on, each in its turn, as far as the container's share goes. True if something moved.
    pub(super) fn unpark(&mut self) -> bool {
        let mut worked = false;
        for _ in 0..UNPARKED {
            let Some(queue) = self.shaping.next_parked(self.now) else { break };
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

    /// Takes requests in and hands them over, a bounded number of pieces.
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
            if qp.waits.until > self.now || qp.waits.share {
                return Outcome::Blocked;
            }
            if qp.next >= qp.pending.len() {
                if qp.pending.len() >= PIPELINE || !self.take_in(queue) {
                    return if worked { Outcome::Worked } else { Outcome::Idle };
                }
                worked = true;
                continue;
            }
            let index = qp.next;
            let wqe = &qp.pending[index];
            if !wqe.admitted {
                if let Err((status, vendor_err)) = intake::admit(qp, wqe, &self.regions) {
                    if index > 0 {
                        // Those before it complete first; the last of them activates the queue.
                        return Outcome::Blocked;
                    }
                    self.fail(queue, status, vendor_err);
                    return Outcome::Worked;
                }
                qp.pending[index].admitted = true;
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
            if let Peer::Link(link) = qp.peer
                && self.waits_for_grant(queue, index, link)
            {
                // Those before it activate the queue when they are complete.
                return if worked { Outcome::Worked } else { Outcome::Blocked };
            }
            let Some(qp) = &mut self.qps[queue as usize] else { return Outcome::Blocked };
            let wqe = &qp.pending[index];
            let bytes = self.shaping.piece(wqe.total, wqe.total - wqe.sent);
            let piece = OnWire {
                finish: 0,
                queue,
                incarnation: qp.incarnation,
                epoch: qp.epoch,
                sequence: wqe.sequence,
                offset: wqe.sent,
                bytes: if qp.peer == Peer::Local { bytes } else { bytes.min(wire::LONGEST) },
                total: wqe.total,
            };
            let kind = Kind { fetches: wqe.fetches(), own: qp.peer == Peer::Local, on_wire: qp.on_wire };
            let at_once = match self.shaping.admit(piece, kind, self.now) {
                Ok(at_once) => at_once,
                Err(Closed::Share) => {
                    qp.parked = true;
                    self.hold(queue, index);
                    return Outcome::Blocked;
                }
                Err(Closed::Queue) => {
                    self.hold(queue, index);
                    return Outcome::Blocked;
                }
            };
            if let Some(delay) = qp.pending[index].release(self.now) {
                self.tally.waited(delay);
            }
            qp.hand_over(index, piece.bytes);
            moved += piece.bytes;
            worked = true;
            if !at_once {
                qp.on_wire += 1;
            } else if self.deliver(&piece) == Handed::Stop {
                let failed = self.qps[queue as usize].as_ref().is_some_and(|qp| qp.state == QpState::ERR);
                return if failed { Outcome::Worked } else { Outcome::Blocked };
            }
        }
        Outcome::Worked
    }

    /// A request is held back from now on. The turn may not know the time, nor does a queue pair that waits have another one.
    fn hold(&mut self, queue: u32, index: usize) {
        let now = if self.shaping.knows_time() { self.now } else { crate::worker::now() };
        if let Some(qp) = &mut self.qps[queue as usize] {
            qp.pending[index].hold(now);
        }
    }

    /// Delivers the pieces that have arrived at the far end of the modelled link.
    pub(super) fn serve_wire(&mut self) -> bool {
        let mut worked = false;
        while let Some(piece) = self.shaping.arrived(self.now) {
            worked = true;
            let Some(qp) = &mut self.qps[piece.queue as usize] else { continue };
            if qp.incarnation != piece.incarnation || qp.epoch != piece.epoch {
                continue;
            }
            qp.on_wire = qp.on_wire.saturating_sub(1);
            if self.deliver(&piece) == Handed::On {
                self.activate(piece.queue);
            }
        }
        worked
    }

    /// Brings a piece to its responder.
    fn deliver(&mut self, piece: &OnWire) -> Handed {
        let queue = piece.queue;
        let Some(qp) = &self.qps[queue as usize] else { return Handed::Stop };
        let Some(index) = qp.find(piece.sequence) else { return Handed::On };
        match qp.peer {
            Peer::None => self.settle(queue, index, piece, Verdict::Silent),
            Peer::Local => {
                if !qp.pending[index].fetches() {
                    let Self { qps, regions, from, .. } = self;
                    let Some(qp) = &qps[queue as usize] else { return Handed::Stop };
                    if let Err(vendor_err) = gather(qp, &qp.pending[index], regions, piece, from) {
                        return self.give_up(queue, index, WcStatus::LOC_PROT_ERR, vendor_err);
                    }
                }
                let Some(qp) = &self.qps[queue as usize] else { return Handed::Stop };
                let request = request(qp, &qp.pending[index], piece, 0);
                let verdict = self.respond(OWN_PORT, &request);
                self.settle(queue, index, piece, verdict)
            }
            Peer::Link(link) => match self.by_grant(queue, index, piece, link) {
                Some(handed) => handed,
                None => self.send_request(queue, index, piece, link),
            },
        }
    }

    /// Does what the responder's word means for request `index`.
    pub(super) fn settle(&mut self, queue: u32, index: usize, piece: &OnWire, verdict: Verdict) -> Handed {
        let now = if matches!(verdict, Verdict::Rnr(_) | Verdict::Silent) { self.time() } else { self.now };
        let Self { qps, regions, to, tally, .. } = self;
        let Some(qp) = &mut qps[queue as usize] else { return Handed::Stop };
        match verdict {
            Verdict::Ack => {}
            Verdict::Data(data, _) => {
                if scatter(qp, index, regions, to).is_err() {
                    return self.give_up(queue, index, WcStatus::LOC_PROT_ERR, vendor::REMOTE);
                }
                match copy_list(to, piece.offset as usize, &[data], 0, piece.bytes as usize) {
                    Ok(()) => {}
                    Err(Lost::Target) => return self.give_up(queue, index, WcStatus::LOC_PROT_ERR, LOST),
                    Err(Lost::Source) => return self.refuse_read(queue, index),
                }
            }
            Verdict::Value(former) => {
                if scatter(qp, index, regions, to).is_err() {
                    return self.give_up(queue, index, WcStatus::LOC_PROT_ERR, vendor::REMOTE);
                }
                if copy_list(to, 0, &[Piece::of_own(&former.to_ne_bytes())], 0, 8).is_err() {
                    return self.give_up(queue, index, WcStatus::LOC_PROT_ERR, LOST);
                }
            }
            Verdict::Lost => return self.give_up(queue, index, WcStatus::LOC_PROT_ERR, LOST),
            Verdict::Nak(status) => return self.give_up(queue, index, status, vendor::REMOTE),
            Verdict::Rnr(timer) => {
                tally.rnr_received();
                if qp.attr.rnr_retry != 7 {
                    if qp.rnr_retries == 0 {
                        return self.give_up(queue, index, WcStatus::RNR_RETRY_EXC_ERR, vendor::REMOTE);
                    }
                    qp.rnr_retries -= 1;
                }
                qp.rewind(index, piece.offset);
                // Nothing is under way any more, so no answer can be overdue.
                let at = qp.put_off(now, state::rnr_nanos(timer), pacing::LONGEST_PAUSE);
                qp.waits = Waits { until: at, ..Waits::default() };
                self.alarm(at, queue);
                return Handed::Stop;
            }
            Verdict::Silent => {
                qp.rewind(index, piece.offset);
                // No alarm without a timeout: the request waits for ever, as the application asked.
                qp.waits.until = Nanos::MAX;
                if let Some(timeout) = state::ack_timeout_nanos(qp.attr.timeout) {
                    let least = if qp.port == OWN_PORT { MIN_TIMEOUT } else { MIN_REMOTE_TIMEOUT };
                    qp.waits.deadline = now + timeout.max(least);
                    let at = qp.waits.deadline;
                    self.alarm(at, queue);
                }
                return Handed::Stop;
            }
        }
        let wqe = &mut qp.pending[index];
        wqe.done = piece.offset + piece.bytes;
        wqe.done_all = wqe.done == wqe.total;
        tally.sent(wqe.opcode, piece.bytes, wqe.done_all);
        let fetched = wqe.done_all && wqe.fetches() && wqe.sent_all;
        if fetched {
            qp.fetching = qp.fetching.saturating_sub(1);
        }
        qp.got_through();
        self.complete_front(queue);
        Handed::On
    }

    /// The responder of a READ finds its memory gone. It is a queue pair of this proxy: neighbours show no such memory.
    fn refuse_read(&mut self, queue: u32, index: usize) -> Handed {
        let local = self.qps[queue as usize].as_ref().filter(|qp| qp.peer == Peer::Local);
        if let Some(&peer) = local.and_then(|qp| self.by_number.get(&qp.attr.dest_qp_num)) {
            self.refuse(peer, WcStatus::REM_ACCESS_ERR, EventType::QP_ACCESS_ERR);
        }
        self.give_up(queue, index, WcStatus::REM_ACCESS_ERR, LOST)
    }

    pub(super) fn give_up(&mut self, queue: u32, index: usize, status: WcStatus, vendor_err: u16) -> Handed {
        // Answers come in order, so all before this one are complete; if a neighbour says otherwise, the oldest pays.
        debug_assert!(index == 0, "request {index} answered before those in front of it");
        self.fail(queue, status, vendor_err);
        Handed::Stop
    }

    /// Completes the requests at the front that are done.
    pub(super) fn complete_front(&mut self, queue: u32) {
        loop {
            let Some(qp) = &mut self.qps[queue as usize] else { return };
            let Some(wqe) = qp.pending.pop_front_if(|wqe| wqe.done_all) else { return };
            qp.next = qp.next.saturating_sub(1);
            if wqe.signaled {
                let completion = Completion {
                    wr_id: wqe.wr_id,
                    status: WcStatus::SUCCESS,
                    opcode: wc_opcode(wqe.opcode),
                    byte_len: if wqe.fetches() { wqe.total } else { 0 },
                    qp_num: qp.number,
                    cookie: qp.cookie,
                    freed: wqe.freed,
                    ..Completion::default()
                };
                let cq = qp.send_cq;
                self.complete(cq, &completion, false);
            }
        }
    }

    /// An alarm of this queue pair went off: an RNR delay is over, or an answer is overdue.
    pub(super) fn on_alarm(&mut self, queue: u32) {
        let now = self.now;
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        if qp.state != QpState::RTS && qp.state != QpState::SQD {
            return;
        }
        if qp.waits.deadline != 0 && qp.waits.deadline <= now {
            let Some(done) = qp.pending.front().map(|wqe| wqe.done) else {
                qp.waits = Waits::default();
                return;
            };
            if qp.retries == 0 {
                self.fail(queue, WcStatus::RETRY_EXC_ERR, vendor::TIMEOUT);
                return;
            }
            qp.retries -= 1;
            self.tally.timed_out();
            qp.rewind(0, done);
            qp.waits = Waits::default();
            qp.probing = true;
        }
        let Waits { until, deadline, .. } = qp.waits;
        let next = [until, deadline].into_iter().filter(|at| *at > now && *at != Nanos::MAX).min();
        if let Some(at) = next {
            self.alarm(at, queue);
        }
        self.activate(queue);
    }
}

/// The longest WRITE that goes the short way: about as long as a look at another queue may wait.
pub(super) const EXPRESS_BYTES: u32 = 64 << 10;

impl Qp {
    fn hand_over(&mut self, index: usize, bytes: u32) {
        let wqe = &mut self.pending[index];
        wqe.sent += bytes;
        if wqe.sent == wqe.total {
            wqe.sent_all = true;
            self.fetching += u32::from(wqe.fetches());
            self.next += 1;
        }
    }
}

/// A piece of a work request as its responder gets it; `pieces` says where its source is, for another proxy.
pub(super) fn request(qp: &Qp, wqe: &Wqe, piece: &OnWire, pieces: u8) -> Request {
    Request {
        to: qp.attr.dest_qp_num,
        from: qp.number,
        opcode: wqe.opcode,
        solicited: wqe.solicited,
        pieces,
        sequence: qp.to_wire(wqe.sequence),
        imm: wqe.imm,
        offset: piece.offset,
        bytes: piece.bytes,
        total: wqe.total,
        remote_addr: wqe.remote_addr,
        rkey: wqe.rkey,
        compare_add: wqe.compare_add,
        swap: wqe.swap,
    }
}

pub(super) fn sges(data: &Data) -> &[Sge] {
    match data {
        Data::One(sge) => std::slice::from_ref(sge),
        Data::List(list) => list,
        Data::Inline(_) => &[],
    }
}

/// The memory of one piece of a request's source.
pub(super) fn gather(
    qp: &Qp,
    wqe: &Wqe,
    regions: &RegionTable,
    piece: &OnWire,
    from: &mut Vec<Piece>,
) -> Result<(), u16> {
    if let Data::Inline(data) = &wqe.data {
        from.clear();
        from.push(Piece::of_own(data));
    } else {
        intake::resolve(qp, sges(&wqe.data), regions, Access(0), from).map_err(|fault| fault as u16)?;
    }
    trim(from, piece.offset as usize, piece.bytes as usize);
    Ok(())
}

/// The memory of a READ's or atomic's target.
pub(super) fn scatter(qp: &Qp, index: usize, regions: &RegionTable, to: &mut Vec<Piece>) -> Result<(), u16> {
    let wqe = &qp.pending[index];
    intake::resolve(qp, sges(&wqe.data), regions, Access::LOCAL_WRITE, to).map_err(|fault| fault as u16)
}

/// Cuts a list of pieces down to `bytes` from `offset` on.
pub(super) fn trim(pieces: &mut Vec<Piece>, mut offset: usize, mut bytes: usize) {
    pieces.retain_mut(|piece| {
        let skipped = offset.min(piece.bytes());
        offset -= skipped;
        *piece = piece.slice(skipped, bytes);
        bytes -= piece.bytes();
        piece.bytes() > 0
    });
}
