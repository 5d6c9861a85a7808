//! Requests to and from other proxies: what goes over a [`super::link`] and what its answers mean.

use super::intake::vendor;
use super::link::LinkFault;
use super::links::LinkId;
use super::qp::{Peer, Road, Waits};
use super::respond::Verdict;
use super::shaping::OnWire;
use super::source::{self, Source};
use super::transmit::{self, Handed};
use super::wire::{self, Kind, Response};
use super::{Notice, Plane};
use crate::pacing::{self, Nanos};
use crate::state;
use ringfence_protocol::verbs::{Opcode, QpState, WcStatus};

/// A neighbour that has lost its processor answers late, but is not gone.
pub(super) const MIN_REMOTE_TIMEOUT: Nanos = 50_000_000;
/// Nor one whose control thread has other regions to map first.
const MIN_SHARE_TIMEOUT: Nanos = 500_000_000;
/// Between the first two tries where no one will wake us: for memory that is to be shared ...
const SHARE_POLL: Nanos = 100_000;
/// ... and for room on the link; this long at most, for it is no one's fault.
const ROOM_POLL: Nanos = 25_000;
const LONGEST_ROOM_POLL: Nanos = 2_000_000;
/// When what could not be shared, for want of an answer of the warden's above all, is tried again.
const SHARE_AGAIN: Nanos = 100_000_000;
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

    pub(super) fn on_response(&mut self, at: LinkId, response: &Response) {
        let Some(&queue) = self.by_number.get(&response.to) else { return };
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        if qp.peer != Peer::Link(at) || qp.attr.dest_qp_num != response.from || qp.state == QpState::ERR {
            return;
        }
        if response.kind == Kind::ACK {
            return self.on_acknowledge(queue, response);
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
            // No more than a piece, whatever was asked for: it is copied at once.
            Kind::GRANT if opcode == Opcode::RDMA_READ && response.bytes <= wire::LONGEST => {
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
        let Self { qps, tally, .. } = self;
        let Some(qp) = &mut qps[queue as usize] else { return };
        let Some(index) = qp.find(qp.from_wire(response.sequence)) else { return };
        let Some(end) = response.offset.checked_add(response.bytes) else { return };
        let last = &qp.pending[index];
        // What was not sent, or is to be sent again, cannot be what this is about; nor what was acknowledged before.
        let due = if last.total == 0 { last.sent_all && end == 0 } else { end > last.done && end <= last.sent };
        if !due
            || qp.pending.range(..index).any(|wqe| !wqe.sent_all)
            || qp.pending.range(..=index).any(|wqe| wqe.road != Road::Long)
        {
            return;
        }
        // Data that were asked for are no acknowledge's to replace.
        if qp.pending.range(..=index).any(|wqe| wqe.fetches() && wqe.total > 0) {
            return self.fail(queue, WcStatus::BAD_RESP_ERR, vendor::REMOTE);
        }
        for (at, wqe) in qp.pending.range_mut(..=index).enumerate() {
            let before = std::mem::replace(&mut wqe.done, if at == index { end } else { wqe.total });
            let done_before = std::mem::replace(&mut wqe.done_all, wqe.done == wqe.total);
            tally.sent(wqe.opcode, wqe.done - before, wqe.done_all && !done_before);
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

    /// Memory of this name, or the buffer, cannot be shared over this link now: whoever waits for that asks again in a while.
    pub fn unshare(&mut self, at: LinkId, share: Option<u32>) {
        if let Some(link) = self.links.get_mut(at) {
            link.unshare(share);
        }
        let again = self.time() + SHARE_AGAIN;
        for queue in 0..self.qps.len() {
            let Some(qp) = &mut self.qps[queue] else { continue };
            if qp.peer == Peer::Link(at) && std::mem::take(&mut qp.waits.share) {
                qp.waits.until = again;
                self.alarm(again, queue as u32);
            }
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
