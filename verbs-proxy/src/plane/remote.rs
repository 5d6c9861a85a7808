//! Requests to and from other proxies: what goes over a [`super::link`] and what its answers mean.

use super::intake::vendor;
use super::link::{LinkFault, Room};
use super::links::LinkId;
use super::qp::{Acknowledge, Peer, Qp, Waits};
use super::respond::Verdict;
use super::shaping::OnWire;
use super::source::{self, Source};
use super::transmit::{self, Handed};
use super::wire::{self, Kind, Request, Response};
use super::{Notice, Plane};
use crate::memory::Piece;
use crate::pacing::{self, Nanos};
use crate::state;
use ringfence_protocol::verbs::{Access, EventType, Opcode, QpState, WcStatus};

/// A neighbour that has lost its processor answers late, but is not gone.
pub(super) const MIN_REMOTE_TIMEOUT: Nanos = 50_000_000;
/// Nor one whose control thread has other regions to map first.
const MIN_SHARE_TIMEOUT: Nanos = 500_000_000;
/// Between the first two tries where no one will wake us: for memory that is to be shared ...
const SHARE_POLL: Nanos = 100_000;
/// ... and for room on the link; this long at most, for it is no one's fault.
const ROOM_POLL: Nanos = 25_000;
const LONGEST_ROOM_POLL: Nanos = 2_000_000;
/// A neighbour whose rate is used up is asked again after this long at most.
const LONGEST_RATE_WAIT: Nanos = 100_000_000;
/// What one link may cost in a turn, in bytes that are copied: as much as one piece, so that whoever else sends to this container
/// waits for no more than that of each link.
const TURN: u32 = wire::LONGEST;
/// What each slot of a message costs besides: 64 requests of nothing are as long as a piece.
const MESSAGE: u32 = TURN / 64;

/// What is said to a requester besides which of its requests it is about.
#[derive(Clone, Copy, Debug)]
struct Answer {
    kind: Kind,
    status: WcStatus,
    share: u32,
    value: u64,
}

impl Answer {
    fn of(kind: Kind) -> Self {
        Self { kind, status: WcStatus::SUCCESS, share: 0, value: 0 }
    }

    fn refusal(status: WcStatus) -> Self {
        Self { status, ..Self::of(Kind::NAK) }
    }
}

impl Plane {
    /// The link for a piece of a queue pair that uses link `at`: another from now on, if that has been superseded and nothing is
    /// under way that could be overtaken.
    fn link_for(&mut self, queue: u32, index: usize, piece: &OnWire, at: LinkId) -> LinkId {
        let Some(link) = self.links.get(at) else { return at };
        if !link.superseded || index > 0 {
            return at;
        }
        let better = self.links.to(link.port).unwrap_or(at);
        match &mut self.qps[queue as usize] {
            Some(qp) if qp.pending[index].done == piece.offset => {
                qp.peer = Peer::Link(better);
                better
            }
            _ => at,
        }
    }

    /// Sends a piece to the proxy at the other end of link `at`.
    pub(super) fn send_request(&mut self, queue: u32, index: usize, piece: &OnWire, at: LinkId) -> Handed {
        let at = self.link_for(queue, index, piece, at);
        let Self { qps, regions, links, notices, from, outgoing, .. } = self;
        let Some(qp) = &mut qps[queue as usize] else { return Handed::Stop };
        let Some(link) = links.get_mut(at) else {
            qp.peer = Peer::None;
            return self.settle(queue, index, piece, Verdict::Silent);
        };
        let wqe = &qp.pending[index];
        let packed = match source::pack(qp, wqe, piece, regions, link, from, outgoing) {
            Ok(packed) => packed,
            Err(Source::Fault(_)) if index > 0 => {
                // The region went after the request was admitted: it fails when those before it are complete.
                qp.rewind(index, piece.offset);
                qp.pending[index].admitted = false;
                return Handed::Stop;
            }
            Err(Source::Fault(vendor_err)) => return self.give_up(queue, index, WcStatus::LOC_PROT_ERR, vendor_err),
            Err(waits @ (Source::NotShared(..) | Source::Foreign)) => {
                match waits {
                    Source::NotShared(key, share) if link.shared.insert(share, false).is_none() => {
                        regions.lend(key);
                        notices.push(Notice::Share { link: at, share });
                    }
                    Source::Foreign if !std::mem::replace(&mut link.bounce_asked, true) => {
                        notices.push(Notice::Bounce { link: at });
                    }
                    _ => {}
                }
                qp.rewind(index, piece.offset);
                qp.waits.share = true;
                // A neighbour that never confirms, or refuses, is one that never answers.
                self.await_answer(queue, MIN_SHARE_TIMEOUT);
                return Handed::Stop;
            }
            Err(Source::NoRoom) => return self.wait_for_room(queue, index, piece),
            Err(Source::Link(fault)) => return self.fail_request(queue, at, fault),
        };
        let mut request = transmit::request(qp, wqe, piece, packed.pieces);
        if packed.pieces == wire::INLINE {
            [request.compare_add, request.swap] = packed.data;
        }
        if let Some(place) = packed.place {
            // There is room for the request, which `source::pack` saw to.
            link.bounce_hold(place);
        }
        match link.request(&request, &outgoing.extensions) {
            Ok(true) => {
                if qp.waits.deadline == 0 {
                    self.await_answer(queue, MIN_REMOTE_TIMEOUT);
                }
                Handed::On
            }
            Ok(false) => self.wait_for_room(queue, index, piece),
            Err(fault) => self.fail_request(queue, at, fault),
        }
    }

    fn wait_for_room(&mut self, queue: u32, index: usize, piece: &OnWire) -> Handed {
        let now = self.time();
        if let Some(qp) = &mut self.qps[queue as usize] {
            qp.rewind(index, piece.offset);
            let at = qp.put_off(now, ROOM_POLL, LONGEST_ROOM_POLL);
            qp.waits.until = at;
            self.alarm(at, queue);
        }
        Handed::Stop
    }

    fn fail_request(&mut self, queue: u32, at: LinkId, fault: LinkFault) -> Handed {
        self.fail_link(at, fault);
        // Looked at again in the next turn, it finds another link or none.
        self.alarm(self.now, queue);
        Handed::Stop
    }

    /// Sees that an answer which does not come is missed, unless that is seen to.
    fn await_answer(&mut self, queue: u32, least: Nanos) {
        let now = self.time();
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        if qp.waits.deadline == 0
            && let Some(timeout) = state::ack_timeout_nanos(qp.attr.timeout)
        {
            let at = now + timeout.max(least);
            qp.waits.deadline = at;
            self.alarm(at, queue);
        }
    }

    /// Gives each link its turn.
    pub(super) fn serve_links(&mut self) -> bool {
        let mut worked = false;
        for place in 0..self.links.places() {
            let Some(at) = self.links.at(place) else { continue };
            match self.serve_link(at) {
                Ok(served) => worked |= served,
                Err(fault) => self.fail_link(at, fault),
            }
            self.acknowledges.clear();
        }
        worked
    }

    /// Takes messages off a link, so many that no neighbour holds up others, nor the own container, for longer than some
    /// microseconds; what is said of all of them is said once. False if there was none.
    fn serve_link(&mut self, at: LinkId) -> Result<bool, LinkFault> {
        let mut left = TURN;
        while left > 0 {
            match self.receive(at)? {
                Some(cost) => left = left.saturating_sub(cost),
                None => break,
            }
        }
        if left == TURN {
            return Ok(false);
        }
        for index in 0..self.acknowledges.len() {
            self.acknowledge(at, self.acknowledges[index])?;
        }
        if let Some(link) = self.links.get_mut(at) {
            link.publish();
            link.flush();
        }
        Ok(true)
    }

    /// Takes one message off a link; what it took of the link's turn, or nothing if there was none.
    fn receive(&mut self, at: LinkId) -> Result<Option<u32>, LinkFault> {
        let Some(link) = self.links.get_mut(at) else { return Ok(None) };
        let Some(words) = link.peek() else { return Ok(None) };
        if wire::kind(&words) != Kind::REQUEST {
            link.advance(1);
            let response = Response::unpack(&words);
            link.outstanding = link.outstanding.saturating_sub(response.covers.max(1));
            self.on_response(at, &response);
            let copied = if response.kind == Kind::GRANT { response.bytes } else { 0 };
            return Ok(Some(MESSAGE.saturating_add(copied)));
        }
        let request = Request::unpack(&words);
        let port = link.port;
        let extensions = request.extensions().ok_or(LinkFault::Malformed)?;
        let cost = (MESSAGE * (1 + extensions)).saturating_add(request.bytes);
        let mut incoming = std::mem::take(&mut self.incoming);
        let known = source::read(link, &request, extensions, &mut self.from, &mut incoming)?;
        link.advance(1 + extensions);
        let done = self.execute(at, port, &request, known);
        self.incoming = incoming;
        done.map(|()| Some(cost))
    }

    /// Executes a request whose source is in `self.from`, if it is `known`, and sees that it is answered.
    fn execute(&mut self, at: LinkId, port: u16, request: &Request, known: bool) -> Result<(), LinkFault> {
        let queue = self.by_number.get(&request.to).copied();
        let verdict = if !known {
            // Its memory region was deregistered while the request was under way.
            Verdict::Nak(WcStatus::REM_OP_ERR)
        } else if self.must_share(at, request)? {
            return self.answer(at, queue, request, Answer::of(Kind::LATER));
        } else if let Err(wait) = self.may_be_fetched(at, request) {
            return self.answer(at, queue, request, Answer { value: wait.max(1), ..Answer::of(Kind::LATER) });
        } else {
            queue.map_or(Verdict::Silent, |queue| self.respond_as(queue, port, request))
        };
        let answer = match (verdict, queue) {
            (Verdict::Ack, Some(queue)) => return self.owe(at, queue, request),
            (Verdict::Ack | Verdict::Silent, _) => Answer::of(Kind::DROPPED),
            (Verdict::Rnr(timer), _) => Answer { value: u64::from(timer), ..Answer::of(Kind::RNR) },
            (Verdict::Nak(status), _) => Answer::refusal(status),
            (Verdict::Value(former), _) => Answer { value: former, ..Answer::of(Kind::ATOMIC) },
            (Verdict::Data(piece, key), _) => match self.regions.get(key) {
                Some(region) if region.is_copied() => self.bounce_data(at, request, piece)?,
                Some(region) => {
                    region.make_present(&piece);
                    Answer { share: region.share, value: region.mapping_offset(&piece), ..Answer::of(Kind::GRANT) }
                }
                None => Answer::refusal(WcStatus::REM_OP_ERR),
            },
            // What neighbours show us is there.
            (Verdict::Lost, _) => Answer::refusal(WcStatus::REM_OP_ERR),
        };
        if matches!(answer.kind, Kind::GRANT | Kind::ATOMIC) {
            self.shaping.was_read(request.bytes);
        }
        self.answer(at, queue, request, answer)
    }

    /// Has the acknowledge of a request wait for those behind it, which one may be for all.
    fn owe(&mut self, at: LinkId, queue: u32, request: &Request) -> Result<(), LinkFault> {
        let Request { from: to, sequence, offset, bytes, .. } = *request;
        let former = self.qps[queue as usize].as_ref().and_then(|qp| qp.responder.owed);
        let covers = match former {
            // Not one that was executed before, and is asked for again.
            Some(owed) if owed.to == to && sequence.wrapping_sub(owed.sequence).cast_signed() >= 0 => owed.covers + 1,
            Some(_) => {
                self.acknowledge(at, queue)?;
                1
            }
            None => 1,
        };
        if let Some(qp) = &mut self.qps[queue as usize]
            && qp.responder.owed.replace(Acknowledge { to, sequence, offset, bytes, covers }).is_none()
        {
            self.acknowledges.push(queue);
        }
        Ok(())
    }

    /// Sends the acknowledge that a queue pair owes.
    fn acknowledge(&mut self, at: LinkId, queue: u32) -> Result<(), LinkFault> {
        let Some(qp) = &mut self.qps[queue as usize] else { return Ok(()) };
        let Some(Acknowledge { to, sequence, offset, bytes, covers }) = qp.responder.owed.take() else { return Ok(()) };
        let from = qp.number;
        let Some(link) = self.links.get_mut(at) else { return Ok(()) };
        let (kind, status, share, value) = (Kind::ACK, WcStatus::SUCCESS, 0, 0);
        link.respond(&Response { kind, to, from, sequence, offset, bytes, status, share, value, covers })
    }

    /// Answers a request, after all that its queue pair, if it has one, owes for those before it.
    fn answer(&mut self, at: LinkId, queue: Option<u32>, request: &Request, answer: Answer) -> Result<(), LinkFault> {
        if let Some(queue) = queue {
            self.acknowledge(at, queue)?;
        }
        let Some(link) = self.links.get_mut(at) else { return Ok(()) };
        let Answer { kind, status, share, value } = answer;
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
            covers: 1,
        })
    }

    /// The queue pair of ours that a READ or an atomic is for, if it may make any.
    fn fetched_from(&self, at: LinkId, request: &Request) -> Option<&Qp> {
        let access = match request.opcode {
            Opcode::RDMA_READ => Access::REMOTE_READ,
            Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD => Access::REMOTE_ATOMIC,
            _ => return None,
        };
        let link = self.links.get(at)?;
        let qp = self.qps[*self.by_number.get(&request.to)? as usize].as_deref()?;
        let allowed = request.total > 0
            && qp.responds()
            && qp.attr.dest_qp_num == request.from
            && qp.port == link.port
            && qp.attr.access.contains(access);
        allowed.then_some(qp)
    }

    /// Whether the container's rate lets out what a READ or an atomic asks for; else how long its requester should wait.
    fn may_be_fetched(&mut self, at: LinkId, request: &Request) -> Result<(), Nanos> {
        if self.fetched_from(at, request).is_none() {
            return Ok(());
        }
        self.shaping.may_be_read(request.bytes, self.now)
    }

    /// Whether a READ asks for memory that its proxy cannot reach yet; then it is seen to.
    fn must_share(&mut self, at: LinkId, request: &Request) -> Result<bool, LinkFault> {
        let reads = request.opcode == Opcode::RDMA_READ;
        let Some(pd) = self.fetched_from(at, request).filter(|_| reads).map(|qp| qp.pd) else { return Ok(false) };
        let Self { links, regions, notices, .. } = self;
        let Some(link) = links.get_mut(at) else { return Ok(false) };
        let total = u64::from(request.total);
        if regions.admit(request.rkey, pd, request.remote_addr, total, Access::REMOTE_READ).is_err() {
            return Ok(false);
        }
        let Some(region) = regions.get(request.rkey) else { return Ok(false) };
        if !region.is_copied() {
            let shared = link.shared.get(&region.share).copied();
            if shared.is_none() {
                link.shared.insert(region.share, false);
                regions.lend(request.rkey);
                notices.push(Notice::Share { link: at, share: region.share });
            }
            return Ok(shared != Some(true));
        }
        let room = link.bounce_room(request.bytes)?;
        if room == Room::NotShared && !std::mem::replace(&mut link.bounce_asked, true) {
            notices.push(Notice::Bounce { link: at });
        }
        Ok(!matches!(room, Room::At(_)))
    }

    /// Answers a READ of memory that the neighbour must not map, for which there is room.
    fn bounce_data(&mut self, at: LinkId, request: &Request, piece: Piece) -> Result<Answer, LinkFault> {
        let refused = Answer::refusal(WcStatus::REM_OP_ERR);
        let Some(link) = self.links.get_mut(at) else { return Ok(refused) };
        let (Room::At(place), Some(bounce)) = (link.bounce_room(request.bytes)?, &link.bounce) else {
            return Ok(refused);
        };
        if bounce.fill(place, &[piece]).is_ok() {
            let share = bounce.share;
            link.bounce_hold(place);
            return Ok(Answer { share, value: place.offset(), ..Answer::of(Kind::GRANT) });
        }
        if let Some(&queue) = self.by_number.get(&request.to) {
            self.refuse(queue, WcStatus::REM_ACCESS_ERR, EventType::QP_ACCESS_ERR);
        }
        Ok(Answer::refusal(WcStatus::REM_ACCESS_ERR))
    }

    fn on_response(&mut self, at: LinkId, response: &Response) {
        let Some(&queue) = self.by_number.get(&response.to) else { return };
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        if qp.peer != Peer::Link(at) || qp.attr.dest_qp_num != response.from || qp.state == QpState::ERR {
            return;
        }
        if response.kind == Kind::ACK {
            return self.on_acknowledge(queue, response);
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
            incarnation: qp.incarnation,
            epoch: qp.epoch,
            sequence: response.sequence,
            offset: response.offset,
            bytes: response.bytes,
            total,
        };
        let atomic = matches!(opcode, Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD);
        let verdict = match response.kind {
            Kind::GRANT if opcode == Opcode::RDMA_READ => {
                let link = self.links.get(at);
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
            Kind::LATER if response.value > 0 => {
                // Its container's rate is used up. It has answered, and says for how long; that is believed up to a point.
                qp.rewind(0, response.offset);
                let at = (self.clock)(self.now) + response.value.min(LONGEST_RATE_WAIT);
                qp.waits = Waits { until: at, ..Waits::default() };
                self.alarm(at, queue);
                return;
            }
            Kind::LATER => {
                // The share comes by another way, and may have come already.
                qp.rewind(0, response.offset);
                let at = qp.put_off((self.clock)(self.now), SHARE_POLL, pacing::LONGEST_PAUSE);
                qp.waits.until = at;
                self.alarm(at, queue);
                return;
            }
            Kind::DROPPED => {
                // Lost, as a packet is: nothing goes before the retry timer, and then one piece first.
                qp.rewind(0, response.offset);
                qp.waits.until = Nanos::MAX;
                qp.probing = true;
                return self.await_answer(queue, MIN_REMOTE_TIMEOUT);
            }
            _ => Verdict::Nak(WcStatus::BAD_RESP_ERR),
        };
        if self.settle(queue, 0, &piece, verdict) == Handed::On {
            self.extend_deadline(queue);
            self.activate(queue);
        }
    }

    /// The responder has executed everything up to this piece.
    fn on_acknowledge(&mut self, queue: u32, response: &Response) {
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        let Some(index) = qp.find(response.sequence) else { return };
        let Some(end) = response.offset.checked_add(response.bytes) else { return };
        let last = &qp.pending[index];
        // What was not sent, or is to be sent again, cannot be what this is about; nor what was acknowledged before.
        let due = if last.total == 0 { last.sent_all } else { end > last.done && end <= last.sent };
        if !due || qp.pending.range(..index).any(|wqe| !wqe.sent_all) {
            return;
        }
        // Data that were asked for are no acknowledge's to replace.
        if qp.pending.range(..=index).any(|wqe| wqe.fetches() && wqe.total > 0) {
            return self.fail(queue, WcStatus::BAD_RESP_ERR, vendor::REMOTE);
        }
        for (at, wqe) in qp.pending.range_mut(..=index).enumerate() {
            wqe.done = if at == index { end } else { wqe.total };
            wqe.done_all = wqe.done == wqe.total;
            if wqe.done_all && wqe.fetches() {
                qp.fetching = qp.fetching.saturating_sub(1);
            }
        }
        qp.got_through();
        self.complete_front(queue);
        self.extend_deadline(queue);
        self.activate(queue);
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

    /// Memory of this name, or the buffer, cannot be shared over this link.
    pub fn unshare(&mut self, at: LinkId, share: Option<u32>) {
        if let Some(link) = self.links.get_mut(at) {
            link.unshare(share);
        }
    }

    /// The region with this key is none that a neighbour may see: whoever waits for that has it copied.
    pub fn withhold(&mut self, at: LinkId, key: u32) {
        if let Some(region) = self.regions.get(key) {
            region.withhold();
            if let Some(link) = self.links.get_mut(at) {
                link.shared.remove(&region.share);
            }
        }
        self.share_arrived(at);
    }

    /// Memory was shared over this link, in either direction: whoever waited for that goes on.
    pub fn share_arrived(&mut self, at: LinkId) {
        for queue in 0..self.qps.len() {
            let Some(qp) = &mut self.qps[queue] else { continue };
            if qp.peer == Peer::Link(at) && std::mem::take(&mut qp.waits.share) {
                self.activate(queue as u32);
            }
        }
    }
}
