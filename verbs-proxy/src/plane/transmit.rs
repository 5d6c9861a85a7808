//! The requester: hands admitted work requests to their responders, in order, as the container's share allows.

use super::intake::{self, vendor, wc_opcode};
use super::link::{Link, LinkFault};
use super::qp::{Data, Peer, Qp, Waits, Wqe};
use super::respond::{Incoming, OWN_PORT, Verdict};
use super::shaping::{Closed, OnWire};
use super::wire::{self, Kind, Request, Response};
use super::{Notice, Outcome, Plane};
use crate::memory::{Piece, RegionTable, copy, copy_list};
use crate::pacing::Nanos;
use crate::state;
use ringfence_protocol::completion::Completion;
use ringfence_protocol::ring::Words;
use ringfence_protocol::verbs::{Access, Opcode, QpState, SendFlags, WcOpcode, WcStatus};
use ringfence_protocol::work::{self, SendBase, Sge};

/// Work requests of one queue before the others have their turn.
const BATCH: usize = 32;
/// Requests of one queue pair under way to another proxy.
const PIPELINE: usize = 128;
/// A neighbour that has lost its processor answers late, but is not gone.
const MIN_REMOTE_TIMEOUT: Nanos = 50_000_000;
/// Between two tries where no one will wake us.
const POLL: Nanos = 100_000;

/// What came of handing over a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Handed {
    /// It is under way or done.
    On,
    /// The queue pair must wait, or is in error.
    Stop,
}

impl Plane {
    /// Moves a queue pair's requests on.
    #[inline]
    pub(super) fn transmit(&mut self, queue: u32) -> Outcome {
        let mut worked = false;
        if self.shaping.is_open() {
            let count = self.express(queue);
            if count == BATCH {
                return Outcome::Worked;
            }
            worked = count > 0;
        }
        let empty =
            self.qps[queue as usize].as_ref().is_none_or(|qp| qp.pending.is_empty() && qp.send.peek().is_none());
        if empty {
            return if worked { Outcome::Worked } else { Outcome::Idle };
        }
        if self.shaping.any_parked() {
            return self.park(queue);
        }
        self.advance(queue, worked)
    }

    /// The short way for the commonest request, a small WRITE to a queue pair of the same proxy with nothing before it.
    /// Returns how many went it. Whatever is unusual is left in the ring for [`Self::advance`], which finds out again
    /// what is wrong with it.
    #[inline]
    fn express(&mut self, queue: u32) -> usize {
        let Self { qps, regions, cqs, touched, .. } = self;
        let Some(peer) = qps[queue as usize].as_ref().filter(|qp| qp.peer == Peer::Local).map(|qp| qp.peer_queue)
        else {
            return 0;
        };
        let Ok([Some(qp), Some(other)]) = qps.get_disjoint_mut([queue as usize, peer as usize]) else { return 0 };
        if !qp.pending.is_empty()
            || qp.state != QpState::RTS
            || other.number != qp.attr.dest_qp_num
            || !matches!(other.state, QpState::RTS | QpState::SQD)
            || other.attr.dest_qp_num != qp.number
            || other.peer != Peer::Local
            || other.responder.offset != 0
            || other.responder.sequence != qp.sequence
            || !other.attr.access.contains(Access::REMOTE_WRITE)
        {
            return 0;
        }
        let Some(Some(entry)) = cqs.get_mut(qp.send_cq) else { return 0 };
        let mut count = 0;
        while count < BATCH {
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
                if fields.sges != 1 || bytes == 0 || bytes > EXPRESS_BYTES || qp.caps.max_send_sge == 0 {
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
            copy(target, source);
            qp.send.advance(1);
            count += 1;
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
                    if overrun.first {
                        let event = ringfence_protocol::verbs::EventType::CQ_ERR;
                        self.notices.push(Notice::Event { owner: entry.owner, event, cookie: entry.cq.cookie });
                    }
                } else if entry.cq.has_channel() && !entry.cq.touched {
                    entry.cq.touched = true;
                    touched.push(qp.send_cq);
                }
            }
        }
        qp.sequence = qp.sequence.wrapping_add(count as u32);
        other.responder.sequence = qp.sequence;
        count
    }

    fn park(&mut self, queue: u32) -> Outcome {
        if let Some(qp) = &mut self.qps[queue as usize] {
            qp.parked = true;
            self.shaping.park(queue);
        }
        Outcome::Blocked
    }

    /// Lets parked queues go on, the longest waiting first, as far as the container's share goes.
    pub(super) fn unpark(&mut self) {
        while let Some(queue) = self.shaping.next_parked(self.now) {
            let Some(qp) = &mut self.qps[queue as usize] else { continue };
            if !std::mem::take(&mut qp.parked) {
                continue;
            }
            let outcome = if qp.state == QpState::RTS { self.advance(queue, false) } else { Outcome::Worked };
            if outcome != Outcome::Blocked {
                self.activate(queue);
            }
        }
    }

    /// Takes requests in and hands them over, a bounded number of pieces.
    fn advance(&mut self, queue: u32, mut worked: bool) -> Outcome {
        for _ in 0..BATCH {
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
            let (index, chunk) = (qp.next, self.shaping.chunk(self.now));
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
                return Outcome::Blocked;
            }
            let piece = OnWire {
                finish: 0,
                queue,
                number: qp.number,
                epoch: qp.epoch,
                sequence: wqe.sequence,
                offset: wqe.sent,
                bytes: (wqe.total - wqe.sent).min(chunk),
            };
            let at_once = match self.shaping.admit(piece, qp.on_wire, self.now) {
                Ok(at_once) => at_once,
                Err(Closed::Container) => return self.park(queue),
                Err(Closed::Queue) => return Outcome::Blocked,
            };
            qp.hand_over(index, piece.bytes);
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

    /// Delivers the pieces that have arrived at the far end of the modelled link.
    pub(super) fn serve_wire(&mut self) -> bool {
        let mut worked = false;
        while let Some(piece) = self.shaping.arrived(self.now) {
            worked = true;
            let Some(qp) = &mut self.qps[piece.queue as usize] else { continue };
            if qp.number != piece.number || qp.epoch != piece.epoch {
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
        let wqe = &qp.pending[index];
        let incoming = incoming(qp, wqe, piece);
        let to = qp.attr.dest_qp_num;
        match qp.peer {
            Peer::None => self.settle(queue, index, piece, Verdict::Silent),
            Peer::Local => {
                if !wqe.fetches() {
                    let Self { qps, regions, from, .. } = self;
                    let Some(qp) = &qps[queue as usize] else { return Handed::Stop };
                    if let Err(vendor_err) = gather(qp, &qp.pending[index], regions, piece, from) {
                        return self.give_up(queue, index, WcStatus::LOC_PROT_ERR, vendor_err);
                    }
                }
                let verdict = self.respond(to, &incoming);
                self.settle(queue, index, piece, verdict)
            }
            Peer::Link(link) => self.send_request(queue, index, piece, link),
        }
    }

    fn send_request(&mut self, queue: u32, index: usize, piece: &OnWire, at: usize) -> Handed {
        let Self { qps, regions, links, notices, .. } = self;
        let Some(qp) = &mut qps[queue as usize] else { return Handed::Stop };
        let Some(Some(link)) = links.get_mut(at) else {
            qp.peer = Peer::None;
            return self.settle(queue, index, piece, Verdict::Silent);
        };
        let wqe = &qp.pending[index];
        let mut extensions: Vec<Words> = Vec::new();
        let pieces = match pack_source(qp, wqe, piece, regions, link, &mut extensions) {
            Ok(pieces) => pieces,
            Err(Source::Fault(_)) if index > 0 => {
                // The region went after the request was admitted: it fails when those before it are complete.
                qp.rewind(index, piece.offset);
                qp.pending[index].admitted = false;
                return Handed::Stop;
            }
            Err(Source::Fault(vendor_err)) => return self.give_up(queue, index, WcStatus::LOC_PROT_ERR, vendor_err),
            Err(Source::NotShared(key, share)) => {
                if link.shared.insert(share, false).is_none() {
                    notices.push(Notice::Share { link: at, key });
                }
                qp.rewind(index, piece.offset);
                qp.waits.share = true;
                return Handed::Stop;
            }
        };
        let request = Request {
            to: qp.attr.dest_qp_num,
            from: qp.number,
            opcode: wqe.opcode,
            solicited: wqe.solicited,
            pieces,
            sequence: wqe.sequence,
            imm: wqe.imm,
            offset: piece.offset,
            bytes: piece.bytes,
            total: wqe.total,
            remote_addr: wqe.remote_addr,
            rkey: wqe.rkey,
            compare_add: wqe.compare_add,
            swap: wqe.swap,
        };
        match link.request(&request, &extensions) {
            Ok(true) => {
                link.flush();
                if qp.waits.deadline == 0 {
                    if let Some(timeout) = state::ack_timeout_nanos(qp.attr.timeout) {
                        let at = self.now + timeout.max(MIN_REMOTE_TIMEOUT);
                        qp.waits.deadline = at;
                        self.alarm(at, queue);
                    }
                }
                Handed::On
            }
            Ok(false) => {
                qp.rewind(index, piece.offset);
                qp.waits.until = self.now + POLL / 4;
                let at = qp.waits.until;
                self.alarm(at, queue);
                Handed::Stop
            }
            Err(fault) => {
                notices.push(Notice::Fault { link: at, fault });
                self.remove_link(at);
                self.settle(queue, index, piece, Verdict::Silent)
            }
        }
    }

    /// Does what the responder's word means for request `index`.
    fn settle(&mut self, queue: u32, index: usize, piece: &OnWire, verdict: Verdict) -> Handed {
        let now = self.now;
        let Self { qps, regions, to, .. } = self;
        let Some(qp) = &mut qps[queue as usize] else { return Handed::Stop };
        match verdict {
            Verdict::Ack => {}
            Verdict::Data(data, _) => {
                if scatter(qp, index, regions, to).is_err() {
                    return self.give_up(queue, index, WcStatus::LOC_PROT_ERR, vendor::REMOTE);
                }
                copy_list(to, piece.offset as usize, &[data], 0, piece.bytes as usize);
            }
            Verdict::Value(former) => {
                if scatter(qp, index, regions, to).is_err() {
                    return self.give_up(queue, index, WcStatus::LOC_PROT_ERR, vendor::REMOTE);
                }
                copy_list(to, 0, &[Piece::of_own(&former.to_ne_bytes())], 0, 8);
            }
            Verdict::Nak(status) => return self.give_up(queue, index, status, vendor::REMOTE),
            Verdict::Rnr(timer) => {
                if qp.attr.rnr_retry != 7 {
                    if qp.rnr_retries == 0 {
                        return self.give_up(queue, index, WcStatus::RNR_RETRY_EXC_ERR, vendor::REMOTE);
                    }
                    qp.rnr_retries -= 1;
                }
                qp.rewind(index, piece.offset);
                qp.waits.until = now + state::rnr_nanos(timer);
                let at = qp.waits.until;
                self.alarm(at, queue);
                return Handed::Stop;
            }
            Verdict::Silent => {
                qp.rewind(index, piece.offset);
                // No alarm without a timeout: the request waits for ever, as the application asked.
                qp.waits.until = Nanos::MAX;
                if let Some(timeout) = state::ack_timeout_nanos(qp.attr.timeout) {
                    qp.waits.deadline = now + timeout.max(1_000_000);
                    let at = qp.waits.deadline;
                    self.alarm(at, queue);
                }
                return Handed::Stop;
            }
        }
        let wqe = &mut qp.pending[index];
        wqe.done = piece.offset + piece.bytes;
        wqe.done_all = wqe.done == wqe.total;
        let fetched = wqe.done_all && wqe.fetches() && wqe.sent_all;
        if fetched {
            qp.fetching = qp.fetching.saturating_sub(1);
        }
        qp.retries = qp.attr.retry_cnt;
        qp.rnr_retries = qp.attr.rnr_retry;
        self.complete_front(queue);
        Handed::On
    }

    fn give_up(&mut self, queue: u32, index: usize, status: WcStatus, vendor_err: u16) -> Handed {
        // Answers come in order, so all before this one are complete; if a neighbour says otherwise, the oldest pays.
        debug_assert!(index == 0, "request {index} answered before those in front of it");
        self.fail(queue, status, vendor_err);
        Handed::Stop
    }

    /// Completes the requests at the front that are done.
    fn complete_front(&mut self, queue: u32) {
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

    /// Takes one message off a link. False if there was none.
    pub(super) fn receive(&mut self, at: usize) -> Result<bool, LinkFault> {
        let Some(Some(link)) = self.links.get_mut(at) else { return Ok(false) };
        let Some(words) = link.peek() else { return Ok(false) };
        if wire::kind(&words) != Kind::REQUEST {
            link.advance(1);
            link.outstanding = link.outstanding.saturating_sub(1);
            self.on_response(at, &Response::unpack(&words));
            return Ok(true);
        }
        let request = Request::unpack(&words);
        let port = link.port;
        let extensions = request.extensions().ok_or(LinkFault::Malformed)?;
        let mut inline = Vec::new();
        let known = read_source(link, &request, extensions, &mut self.from, &mut inline)?;
        link.advance(1 + extensions);
        let verdict = if !known {
            // Its memory region was deregistered while the request was under way.
            Verdict::Nak(WcStatus::REM_OP_ERR)
        } else if let Some((share, key)) = self.must_share(at, &request) {
            if let Some(Some(link)) = self.links.get_mut(at)
                && link.shared.insert(share, false).is_none()
            {
                self.notices.push(Notice::Share { link: at, key });
            }
            return self.answer(at, &request, Kind::LATER, WcStatus::SUCCESS, 0, 0).map(|()| true);
        } else {
            self.respond(request.to, &request_incoming(&request, port))
        };
        let (kind, status, share, value) = match verdict {
            Verdict::Ack => (Kind::ACK, WcStatus::SUCCESS, 0, 0),
            Verdict::Silent => (Kind::DROPPED, WcStatus::SUCCESS, 0, 0),
            Verdict::Rnr(timer) => (Kind::RNR, WcStatus::SUCCESS, 0, u64::from(timer)),
            Verdict::Nak(status) => (Kind::NAK, status, 0, 0),
            Verdict::Value(former) => (Kind::ATOMIC, WcStatus::SUCCESS, 0, former),
            Verdict::Data(piece, key) => match self.regions.get(key) {
                Some(region) => (Kind::GRANT, WcStatus::SUCCESS, region.share, region.mapping_offset(&piece)),
                None => (Kind::NAK, WcStatus::REM_OP_ERR, 0, 0),
            },
        };
        self.answer(at, &request, kind, status, share, value).map(|()| true)
    }

    fn answer(
        &mut self,
        at: usize,
        request: &Request,
        kind: Kind,
        status: WcStatus,
        share: u32,
        value: u64,
    ) -> Result<(), LinkFault> {
        let Some(Some(link)) = self.links.get_mut(at) else { return Ok(()) };
        link.respond(&Response {
            kind,
            to: request.from,
            from: request.to,
            sequence: request.sequence,
            offset: request.offset,
            bytes: request.bytes,
            status,
            share,
            value,
        })
    }

    /// Whether a READ asks for memory that its proxy cannot reach yet: the region's name and key.
    fn must_share(&self, at: usize, request: &Request) -> Option<(u32, u32)> {
        if request.opcode != Opcode::RDMA_READ || request.total == 0 {
            return None;
        }
        let qp = self.qps[*self.by_number.get(&request.to)? as usize].as_ref()?;
        let allowed = qp.responds()
            && qp.attr.dest_qp_num == request.from
            && Some(qp.port) == self.links[at].as_ref().map(|link| link.port)
            && qp.attr.access.contains(Access::REMOTE_READ);
        let total = u64::from(request.total);
        if !allowed || self.regions.admit(request.rkey, qp.pd, request.remote_addr, total, Access::REMOTE_READ).is_err()
        {
            return None;
        }
        let region = self.regions.get(request.rkey)?;
        let link = self.links[at].as_ref()?;
        (link.shared.get(&region.share) != Some(&true)).then_some((region.share, request.rkey))
    }

    fn on_response(&mut self, at: usize, response: &Response) {
        let Some(&queue) = self.by_number.get(&response.to) else { return };
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        if qp.peer != Peer::Link(at) || qp.attr.dest_qp_num != response.from || qp.state == QpState::ERR {
            return;
        }
        // Only the answer that is due counts; others belong to pieces that were sent twice.
        let Some(wqe) = qp.pending.front().filter(|wqe| wqe.sequence == response.sequence) else { return };
        let end = response.offset.checked_add(response.bytes);
        if response.offset != wqe.done || end.is_none_or(|end| end > wqe.total || (end > wqe.sent && wqe.total > 0)) {
            return;
        }
        let (opcode, total) = (wqe.opcode, wqe.total);
        let piece = OnWire {
            finish: 0,
            queue,
            number: qp.number,
            epoch: qp.epoch,
            sequence: response.sequence,
            offset: response.offset,
            bytes: response.bytes,
        };
        let atomic = matches!(opcode, Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD);
        let verdict = match response.kind {
            Kind::ACK if !atomic && (opcode != Opcode::RDMA_READ || total == 0) => Verdict::Ack,
            Kind::GRANT if opcode == Opcode::RDMA_READ => {
                let link = self.links[at].as_ref();
                match link.and_then(|link| link.shared_piece(response.share, response.value, response.bytes)) {
                    Some(data) => Verdict::Data(data, 0),
                    None => Verdict::Nak(WcStatus::BAD_RESP_ERR),
                }
            }
            Kind::ATOMIC if atomic => Verdict::Value(response.value),
            Kind::RNR => Verdict::Rnr(response.value as u32 % 32),
            Kind::NAK => Verdict::Nak(match response.status {
                WcStatus::REM_ACCESS_ERR | WcStatus::REM_INV_REQ_ERR => response.status,
                _ => WcStatus::REM_OP_ERR,
            }),
            Kind::LATER => {
                // The share comes by another way, and may have come already.
                qp.rewind(0, response.offset);
                qp.waits.until = self.now + POLL;
                let at = qp.waits.until;
                self.alarm(at, queue);
                return;
            }
            // The deadline decides.
            Kind::DROPPED => return,
            _ => Verdict::Nak(WcStatus::BAD_RESP_ERR),
        };
        if self.settle(queue, 0, &piece, verdict) == Handed::On {
            self.extend_deadline(queue);
            self.activate(queue);
        }
    }

    fn extend_deadline(&mut self, queue: u32) {
        let now = self.now;
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        let waiting = qp.pending.front().is_some_and(|wqe| wqe.sent_all || wqe.sent > wqe.done);
        qp.waits.deadline = match state::ack_timeout_nanos(qp.attr.timeout) {
            // The alarm that is already set finds the new deadline and sets itself again.
            Some(timeout) if waiting => now + timeout.max(MIN_REMOTE_TIMEOUT),
            _ => 0,
        };
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
            qp.rewind(0, done);
            qp.waits = Waits::default();
        }
        let Waits { until, deadline, .. } = qp.waits;
        let next = [until, deadline].into_iter().filter(|at| *at > now && *at != Nanos::MAX).min();
        if let Some(at) = next {
            self.alarm(at, queue);
        }
        self.activate(queue);
    }

    /// Memory was shared over this link, in either direction: whoever waited for that goes on.
    pub fn share_arrived(&mut self, at: usize) {
        for queue in 0..self.qps.len() {
            let Some(qp) = &mut self.qps[queue] else { continue };
            if qp.peer == Peer::Link(at) && std::mem::take(&mut qp.waits.share) {
                self.activate(queue as u32);
            }
        }
    }
}

/// The longest WRITE that goes the short way: about as long as a look at another queue may wait.
const EXPRESS_BYTES: u32 = 64 << 10;

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

fn incoming(qp: &Qp, wqe: &Wqe, piece: &OnWire) -> Incoming {
    Incoming {
        port: OWN_PORT,
        from: qp.number,
        opcode: wqe.opcode,
        solicited: wqe.solicited,
        sequence: wqe.sequence,
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

fn request_incoming(request: &Request, port: u16) -> Incoming {
    Incoming {
        port,
        from: request.from,
        opcode: request.opcode,
        solicited: request.solicited,
        sequence: request.sequence,
        imm: request.imm,
        offset: request.offset,
        bytes: request.bytes,
        total: request.total,
        remote_addr: request.remote_addr,
        rkey: request.rkey,
        compare_add: request.compare_add,
        swap: request.swap,
    }
}

fn sges(data: &Data) -> &[Sge] {
    match data {
        Data::One(sge) => std::slice::from_ref(sge),
        Data::List(list) => list,
        Data::Inline(_) => &[],
    }
}

/// The memory of one piece of a request's source.
fn gather(qp: &Qp, wqe: &Wqe, regions: &RegionTable, piece: &OnWire, from: &mut Vec<Piece>) -> Result<(), u16> {
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
fn scatter(qp: &Qp, index: usize, regions: &RegionTable, to: &mut Vec<Piece>) -> Result<(), u16> {
    let wqe = &qp.pending[index];
    intake::resolve(qp, sges(&wqe.data), regions, Access::LOCAL_WRITE, to).map_err(|fault| fault as u16)
}

/// Cuts a list of pieces down to `bytes` from `offset` on.
fn trim(pieces: &mut Vec<Piece>, mut offset: usize, mut bytes: usize) {
    pieces.retain_mut(|piece| {
        let skipped = offset.min(piece.bytes());
        offset -= skipped;
        *piece = piece.slice(skipped, bytes);
        bytes -= piece.bytes();
        piece.bytes() > 0
    });
}

enum Source {
    /// A local key does not hold any more.
    Fault(u16),
    /// The region with this key and name is not shared with the neighbour yet.
    NotShared(u32, u32),
}

/// Packs the source of a piece for another proxy: the data if they were inline, else where they are.
fn pack_source(
    qp: &Qp,
    wqe: &Wqe,
    piece: &OnWire,
    regions: &RegionTable,
    link: &Link,
    extensions: &mut Vec<Words>,
) -> Result<u8, Source> {
    if wqe.fetches() || piece.bytes == 0 {
        return Ok(0);
    }
    if let Data::Inline(data) = &wqe.data {
        let data = &data[piece.offset as usize..(piece.offset + piece.bytes) as usize];
        for part in data.chunks(work::EXTENSION_INLINE as usize) {
            let mut words = [0u64; 7];
            zerocopy::IntoBytes::as_mut_bytes(&mut words)[..part.len()].copy_from_slice(part);
            extensions.push(work::pack_inline(&words));
        }
        return Ok(wire::INLINE);
    }
    let (mut offset, mut bytes) = (u64::from(piece.offset), u64::from(piece.bytes));
    let mut list: Vec<Sge> = Vec::new();
    for sge in sges(&wqe.data).iter().filter(|sge| sge.length > 0) {
        let skipped = offset.min(u64::from(sge.length));
        offset -= skipped;
        let length = (u64::from(sge.length) - skipped).min(bytes);
        if length == 0 {
            continue;
        }
        bytes -= length;
        let memory = regions
            .admit(sge.lkey, qp.pd, sge.addr + skipped, length, Access(0))
            .map_err(|fault| Source::Fault(fault as u16))?;
        let region = regions.get(sge.lkey).ok_or(Source::Fault(vendor::REMOTE))?;
        if link.shared.get(&region.share) != Some(&true) {
            return Err(Source::NotShared(sge.lkey, region.share));
        }
        list.push(Sge { addr: region.mapping_offset(&memory), length: length as u32, lkey: region.share });
    }
    extensions.extend(list.chunks(work::SGES_PER_EXTENSION as usize).map(work::pack_sges));
    Ok(list.len() as u8)
}

/// The source of a request from another proxy. False if it names memory that is not shared (any more).
fn read_source(
    link: &Link,
    request: &Request,
    extensions: u32,
    from: &mut Vec<Piece>,
    inline: &mut Vec<u8>,
) -> Result<bool, LinkFault> {
    from.clear();
    if request.pieces == wire::INLINE {
        for index in 0..extensions {
            let words = work::extension_inline(&link.extension(index).ok_or(LinkFault::Malformed)?);
            inline.extend_from_slice(zerocopy::IntoBytes::as_bytes(&words));
        }
        inline.truncate(request.bytes as usize);
        from.push(Piece::of_own(inline));
        return Ok(true);
    }
    let mut total = 0;
    for index in 0..u32::from(request.pieces) {
        let words = link.extension(index / work::SGES_PER_EXTENSION).ok_or(LinkFault::Malformed)?;
        let sge = work::extension_sge(&words, index % work::SGES_PER_EXTENSION);
        let Some(piece) = link.shared_piece(sge.lkey, sge.addr, sge.length) else { return Ok(false) };
        total += u64::from(sge.length);
        from.push(piece);
    }
    let fetches = matches!(request.opcode, Opcode::RDMA_READ | Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD);
    if !fetches && total != u64::from(request.bytes) {
        return Err(LinkFault::Malformed);
    }
    Ok(true)
}
