//! Requests to and from other proxies: what goes over a [`super::link`] and what its answers mean.

use super::bounce::LARGEST;
use super::link::{LinkFault, Room};
use super::links::LinkId;
use super::qp::{Peer, Qp, Road, Waits};
use super::respond::Verdict;
use super::shaping::OnWire;
use super::source::{self, Source};
use super::transmit::{self, Handed};
use super::wire::{self, Kind, Request, Response};
use super::{Notice, Plane};
use crate::memory::Piece;
use crate::pacing::{self, Nanos};
use crate::state;
use ringfence_protocol::ring::Words;
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
        let Self { qps, regions, links, notices, from, .. } = self;
        let Some(qp) = &mut qps[queue as usize] else { return Handed::Stop };
        let Some(link) = links.get_mut(at) else {
            qp.peer = Peer::None;
            return self.settle(queue, index, piece, Verdict::Silent);
        };
        let wqe = &qp.pending[index];
        let mut extensions: Vec<Words> = Vec::new();
        let mut source = source::pack(qp, wqe, piece, regions, link, &mut extensions);
        if let Err(Source::Foreign) = source {
            source = source::bounce(qp, wqe, piece, regions, link, from, &mut extensions);
        }
        let (pieces, place) = match source {
            Ok(source) => source,
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
        let request = transmit::request(qp, wqe, piece, pieces);
        if let Some(place) = place {
            // There is room for the request, which `bounce_source` saw to.
            link.bounce_hold(place);
        }
        match link.request(&request, &extensions) {
            Ok(true) => {
                link.flush();
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
        let now = self.now;
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
        let now = self.now;
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        if qp.waits.deadline == 0
            && let Some(timeout) = state::ack_timeout_nanos(qp.attr.timeout)
        {
            let at = now + timeout.max(least);
            qp.waits.deadline = at;
            self.alarm(at, queue);
        }
    }

    /// Takes one message off a link. False if there was none.
    pub(super) fn receive(&mut self, at: LinkId) -> Result<bool, LinkFault> {
        let Some(link) = self.links.get_mut(at) else { return Ok(false) };
        let Some(words) = link.peek() else { return Ok(false) };
        if wire::kind(&words) != Kind::REQUEST {
            link.advance(1);
            link.outstanding = link.outstanding.saturating_sub(1);
            self.on_response(at, &Response::unpack(&words));
            self.publish(at, wire::kind(&words) == Kind::GRANT);
            return Ok(true);
        }
        let request = Request::unpack(&words);
        let port = link.port;
        let extensions = request.extensions().ok_or(LinkFault::Malformed)?;
        let mut inline = Vec::new();
        let known = source::read(link, &request, extensions, &mut self.from, &mut inline)?;
        link.advance(1 + extensions);
        let verdict = if !known {
            // Its memory region was deregistered while the request was under way.
            Verdict::Nak(WcStatus::REM_OP_ERR)
        } else if self.must_share(at, &request)? {
            self.publish(at, false);
            return self.answer(at, &request, Kind::LATER, WcStatus::SUCCESS, 0, 0).map(|()| true);
        } else if let Err(wait) = self.may_be_read(at, &request) {
            self.publish(at, false);
            return self.answer(at, &request, Kind::LATER, WcStatus::SUCCESS, 0, wait.max(1)).map(|()| true);
        } else {
            self.respond(port, &request)
        };
        self.publish(at, request.pieces != wire::INLINE && request.pieces > 0);
        if matches!(verdict, Verdict::Ack | Verdict::Data(..) | Verdict::Value(_)) {
            self.offer(at, &request);
        }
        let (kind, status, share, value) = match verdict {
            Verdict::Ack => (Kind::ACK, WcStatus::SUCCESS, 0, 0),
            Verdict::Silent => (Kind::DROPPED, WcStatus::SUCCESS, 0, 0),
            Verdict::Rnr(timer) => (Kind::RNR, WcStatus::SUCCESS, 0, u64::from(timer)),
            Verdict::Nak(status) => (Kind::NAK, status, 0, 0),
            Verdict::Value(former) => (Kind::ATOMIC, WcStatus::SUCCESS, 0, former),
            Verdict::Data(piece, key) => match self.regions.get(key) {
                Some(region) if region.may_fault() => self.bounce_data(at, &request, piece)?,
                Some(region) => (Kind::GRANT, WcStatus::SUCCESS, region.share, region.mapping_offset(&piece)),
                None => (Kind::NAK, WcStatus::REM_OP_ERR, 0, 0),
            },
            // What neighbours show us is there.
            Verdict::Lost => (Kind::NAK, WcStatus::REM_OP_ERR, 0, 0),
        };
        if kind == Kind::GRANT {
            self.shaping.was_read(request.bytes);
            self.renew_reads(at);
        }
        self.answer(at, &request, kind, status, share, value).map(|()| true)
    }

    fn answer(
        &mut self,
        at: LinkId,
        request: &Request,
        kind: Kind,
        status: WcStatus,
        share: u32,
        value: u64,
    ) -> Result<(), LinkFault> {
        let Some(link) = self.links.get_mut(at) else { return Ok(()) };
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

    fn publish(&mut self, at: LinkId, at_once: bool) {
        if let Some(link) = self.links.get_mut(at) {
            link.publish(at_once);
        }
    }

    /// The queue pair of ours that a READ is for, if it may make any.
    fn read_from(&self, at: LinkId, request: &Request) -> Option<&Qp> {
        if request.opcode != Opcode::RDMA_READ || request.total == 0 {
            return None;
        }
        let link = self.links.get(at)?;
        let qp = self.qps[*self.by_number.get(&request.to)? as usize].as_deref()?;
        let allowed = qp.responds()
            && qp.attr.dest_qp_num == request.from
            && qp.port == link.port
            && qp.attr.access.contains(Access::REMOTE_READ);
        allowed.then_some(qp)
    }

    /// Whether the container's rate lets out what a READ asks for; else how long its requester should wait.
    fn may_be_read(&mut self, at: LinkId, request: &Request) -> Result<(), Nanos> {
        if self.read_from(at, request).is_none() {
            return Ok(());
        }
        self.shaping.may_be_read(request.bytes, self.now)
    }

    /// Whether a READ asks for memory that its proxy cannot reach yet; then it is seen to.
    fn must_share(&mut self, at: LinkId, request: &Request) -> Result<bool, LinkFault> {
        let Some(pd) = self.read_from(at, request).map(|qp| qp.pd) else { return Ok(false) };
        let Self { links, regions, notices, .. } = self;
        let Some(link) = links.get_mut(at) else { return Ok(false) };
        let total = u64::from(request.total);
        if regions.admit(request.rkey, pd, request.remote_addr, total, Access::REMOTE_READ).is_err() {
            return Ok(false);
        }
        let Some(region) = regions.get(request.rkey) else { return Ok(false) };
        if !region.may_fault() {
            let shared = link.shared.get(&region.share).copied();
            if shared.is_none() {
                link.shared.insert(region.share, false);
                regions.lend(request.rkey);
                notices.push(Notice::Share { link: at, share: region.share });
            }
            return Ok(shared != Some(true));
        }
        if request.bytes > LARGEST {
            return Err(LinkFault::Malformed);
        }
        let room = link.bounce_room(request.bytes)?;
        if room == Room::NotShared && !std::mem::replace(&mut link.bounce_asked, true) {
            notices.push(Notice::Bounce { link: at });
        }
        Ok(!matches!(room, Room::At(_)))
    }

    /// Answers a READ of memory that the neighbour must not map, for which there is room.
    fn bounce_data(
        &mut self,
        at: LinkId,
        request: &Request,
        piece: Piece,
    ) -> Result<(Kind, WcStatus, u32, u64), LinkFault> {
        let refused = (Kind::NAK, WcStatus::REM_OP_ERR, 0, 0);
        let Some(link) = self.links.get_mut(at) else { return Ok(refused) };
        let (Room::At(place), Some(bounce)) = (link.bounce_room(request.bytes)?, &link.bounce) else {
            return Ok(refused);
        };
        if bounce.fill(place, &[piece]).is_ok() {
            let share = bounce.share;
            link.bounce_hold(place);
            return Ok((Kind::GRANT, WcStatus::SUCCESS, share, place.offset()));
        }
        if let Some(&queue) = self.by_number.get(&request.to) {
            self.refuse(queue, WcStatus::REM_ACCESS_ERR, EventType::QP_ACCESS_ERR);
        }
        Ok((Kind::NAK, WcStatus::REM_ACCESS_ERR, 0, 0))
    }

    fn on_response(&mut self, at: LinkId, response: &Response) {
        let Some(&queue) = self.by_number.get(&response.to) else { return };
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        if qp.peer != Peer::Link(at) || qp.attr.dest_qp_num != response.from || qp.state == QpState::ERR {
            return;
        }
        // Only the answer that is due counts; others belong to pieces that were sent twice.
        let sequence = qp.from_wire(response.sequence);
        let due = qp.pending.front().filter(|wqe| wqe.sequence == sequence && wqe.road == Road::Long);
        let Some(wqe) = due else { return };
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
            sequence,
            offset: response.offset,
            bytes: response.bytes,
            total,
        };
        let atomic = matches!(opcode, Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD);
        let verdict = match response.kind {
            Kind::ACK if !atomic && (opcode != Opcode::RDMA_READ || total == 0) => Verdict::Ack,
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
                let at = self.now + response.value.min(LONGEST_RATE_WAIT);
                qp.waits = Waits { until: at, ..Waits::default() };
                self.alarm(at, queue);
                return;
            }
            Kind::LATER => {
                // The share comes by another way, and may have come already.
                qp.rewind(0, response.offset);
                let at = qp.put_off(self.now, SHARE_POLL, pacing::LONGEST_PAUSE);
                qp.waits.until = at;
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

    /// Memory of this name, or the buffer, cannot be shared over this link.
    pub fn unshare(&mut self, at: LinkId, share: Option<u32>) {
        if let Some(link) = self.links.get_mut(at) {
            link.unshare(share);
        }
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
