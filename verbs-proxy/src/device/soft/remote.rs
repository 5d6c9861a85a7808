//! Requests to and from other proxies: what goes over a [`super::link`] and what its answers mean.

use super::link::{LinkFault, Shared};
use super::links::LinkId;
use super::qp::{Peer, Way};
use super::requester::{Data, request};
use super::respond::Verdict;
use super::source::{self, Source};
use super::wire::{self, Kind, Response};
use super::{Notice, Plane, Soft, Task};
use crate::device::{Again, Answer, Posted, WorkPiece};
use crate::pacing::{self, Nanos};
use crate::plane::transmit::Handed;
use ringfence_protocol::verbs::{Opcode, QpState, WcStatus};

/// A neighbour that has lost its processor answers late, but is not gone.
pub(crate) const MIN_REMOTE_TIMEOUT: Nanos = 50_000_000;
/// Nor one whose control thread has other regions to map first.
const MIN_SHARE_TIMEOUT: Nanos = 500_000_000;
/// Between the first two tries where no one will wake us: for memory that is to be shared, or named anew ...
const SHARE_POLL: Nanos = 100_000;
pub(super) const LATER: Answer = Answer::Again(Again::Later { first: SHARE_POLL, longest: pacing::LONGEST_PAUSE });
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
    fn link_for(&mut self, queue: u32, index: usize, piece: &WorkPiece, at: LinkId) -> LinkId {
        let Some(link) = self.device.links.get(at) else { return at };
        if !link.superseded || index > 0 {
            return at;
        }
        let better = self.device.links.to(link.port).unwrap_or(at);
        match &mut self.qps[queue as usize] {
            Some(qp) if qp.pending[index].done == piece.offset => {
                qp.device.peer = Peer::Link(better);
                better
            }
            _ => at,
        }
    }

    /// Sends a piece to the proxy at the other end of link `at`.
    pub(super) fn send_request(&mut self, queue: u32, index: usize, piece: &WorkPiece, at: LinkId) -> Posted {
        let at = self.link_for(queue, index, piece, at);
        let Self { qps, regions, device: Soft { links, from, outgoing, .. }, notices, .. } = self;
        let Some(qp) = &mut qps[queue as usize] else { return Posted::Withdrawn };
        let Some(link) = links.get_mut(at) else {
            qp.device.peer = Peer::None;
            return Posted::Answered(Answer::Lost { least: MIN_REMOTE_TIMEOUT });
        };
        let Some(asked) = qp.pending[index].work.admitted() else { return Posted::Withdrawn };
        let no_room = Posted::Answered(Answer::Again(Again::Later { first: ROOM_POLL, longest: LONGEST_ROOM_POLL }));
        let packed = match source::pack(qp, asked, piece, regions, link, from, outgoing) {
            Ok(packed) => packed,
            // The region went after the request was admitted.
            Err(Source::Fault(vendor_err)) => {
                return Posted::Answered(Answer::Failed { status: WcStatus::LOC_PROT_ERR, vendor_err });
            }
            Err(waits @ (Source::NotShared(..) | Source::Foreign)) => {
                match waits {
                    Source::NotShared(key, share) if link.shared.insert(share, Shared::ASKED).is_none() => {
                        regions.lend(key);
                        notices.push(Notice::Device(Task::Share { link: at, share }));
                    }
                    Source::Foreign if !std::mem::replace(&mut link.bounce_asked, true) => {
                        notices.push(Notice::Device(Task::Bounce { link: at }));
                    }
                    _ => {}
                }
                link.awaited = true;
                // A neighbour that never confirms, or refuses, is one that never answers.
                return Posted::Answered(Answer::Again(Again::Told { least: MIN_SHARE_TIMEOUT }));
            }
            Err(Source::NoRoom) => return no_room,
            Err(Source::Link(fault)) => return self.fail_request(queue, at, fault),
        };
        let mut request = request(qp, asked, piece, packed.pieces);
        match packed.pieces {
            0 => {}
            wire::INLINE => [request.compare_add, request.swap] = packed.data,
            _ => request.compare_add = link.generation(qp.number),
        }
        if let Some((key, share)) = packed.unshared
            && self.now >= link.shares_again_at
            && link.shared.insert(share, Shared::ASKED).is_none()
        {
            regions.lend(key);
            notices.push(Notice::Device(Task::Share { link: at, share }));
        }
        if let Some(place) = packed.place {
            // There is room for the request, which `source::pack` saw to.
            link.bounce_hold(place);
        }
        match link.request(&request, &outgoing.extensions) {
            Ok(true) => {
                self.await_answer(queue, MIN_REMOTE_TIMEOUT);
                Posted::Sent
            }
            Ok(false) => no_room,
            Err(fault) => self.fail_request(queue, at, fault),
        }
    }

    fn fail_request(&mut self, queue: u32, at: LinkId, fault: LinkFault) -> Posted {
        self.fail_link(at, fault);
        // Looked at again in the next turn, it finds another link or none.
        self.alarm(self.now, queue);
        Posted::Withdrawn
    }

    pub(crate) fn on_response(&mut self, at: LinkId, response: &Response) {
        let Some(&queue) = self.by_number.get(&response.to) else { return };
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        if qp.device.peer != Peer::Link(at) || qp.attr.dest_qp_num != response.from || qp.state == QpState::ERR {
            return;
        }
        if response.kind == Kind::ACK {
            return self.on_acknowledge(queue, response);
        }
        // Only the answer that is due counts; others belong to pieces that were sent twice.
        let sequence = qp.device.from_wire(response.sequence);
        let due = qp.pending.front().filter(|wqe| wqe.sequence == sequence && wqe.device == Way::ByResponder);
        let Some(wqe) = due else { return };
        let end = response.offset.checked_add(response.bytes);
        if response.offset != wqe.done || end.is_none_or(|end| end > wqe.total || (end > wqe.sent && wqe.total > 0)) {
            return;
        }
        let (opcode, total) = (wqe.opcode, wqe.total);
        let piece = WorkPiece {
            queue,
            incarnation: qp.incarnation,
            epoch: qp.epochs.now(),
            sequence,
            offset: response.offset,
            bytes: response.bytes,
            total,
        };
        let atomic = matches!(opcode, Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD);
        let verdict = match response.kind {
            // No more than a piece, whatever was asked for: it is copied at once.
            Kind::DATA if opcode == Opcode::RDMA_READ && response.bytes <= wire::LONGEST => {
                let data = Data::Shared {
                    link: at,
                    share: response.share,
                    offset: response.value,
                    generation: response.generation,
                };
                let answer = self.take_data(queue, 0, &piece, data);
                return self.carried_out(&piece, answer);
            }
            Kind::ATOMIC if atomic => Verdict::Value(response.value),
            Kind::RNR => Verdict::Rnr(response.value as u32 % 32),
            Kind::NAK => Verdict::Nak(match response.status {
                WcStatus::REM_ACCESS_ERR | WcStatus::REM_INV_REQ_ERR => response.status,
                _ => WcStatus::REM_OP_ERR,
            }),
            // Its container's rate is used up. It has answered, and says for how long; that is believed up to a point.
            Kind::LATER if response.value > 0 => {
                let at = (self.clock)(self.now) + response.value.min(LONGEST_RATE_WAIT);
                return self.answered(&piece, Answer::Again(Again::At(at)));
            }
            // What it waits for comes by another way, and may have come already. It has answered, and may need as long as for a
            // region that is to be shared: once, as one that says this for ever is one that never answers.
            Kind::LATER => {
                if qp.put_off == 0 {
                    self.extend_deadline(queue, MIN_SHARE_TIMEOUT);
                }
                return self.answered(&piece, LATER);
            }
            // As a packet is.
            Kind::DROPPED => return self.answered(&piece, Answer::Lost { least: MIN_REMOTE_TIMEOUT }),
            _ => Verdict::Nak(WcStatus::BAD_RESP_ERR),
        };
        let answer = self.carry_out(queue, 0, &piece, verdict);
        self.carried_out(&piece, answer);
    }

    /// What the other end said of a piece has been done.
    fn carried_out(&mut self, piece: &WorkPiece, answer: Answer) {
        if self.complete_piece(0, piece, answer) == Handed::On {
            self.extend_deadline(piece.queue, MIN_REMOTE_TIMEOUT);
            self.activate(piece.queue);
        }
    }

    /// The responder has executed everything up to this piece.
    fn on_acknowledge(&mut self, queue: u32, response: &Response) {
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        let Some(index) = qp.find(qp.device.from_wire(response.sequence)) else { return };
        let Some(end) = response.offset.checked_add(response.bytes) else { return };
        let last = &qp.pending[index];
        // What was not sent, or is to be sent again, cannot be what this is about; nor what was acknowledged before.
        let due = if last.total == 0 { last.sent_all && end == 0 } else { end > last.done && end <= last.sent };
        if !due
            || qp.pending.range(..index).any(|wqe| !wqe.sent_all)
            || qp.pending.range(..=index).any(|wqe| wqe.device != Way::ByResponder)
        {
            return;
        }
        // Data that were asked for are no acknowledge's to replace: whoever gets one beyond them asks for them again, and for what is
        // behind (InfiniBand Architecture Specification, 9.7.5.1.1, implied NAK).
        if let Some(fetching) = qp.pending.range(..=index).position(|wqe| wqe.fetches() && wqe.total > 0) {
            if fetching > 0 {
                let before = qp.pending[fetching - 1].total;
                self.done_up_to(queue, fetching - 1, before);
            }
            return self.ask_again(queue);
        }
        self.done_up_to(queue, index, end);
        self.extend_deadline(queue, MIN_REMOTE_TIMEOUT);
        self.activate(queue);
    }

    /// The oldest request, and all behind it, goes again in a moment.
    fn ask_again(&mut self, queue: u32) {
        let Some(qp) = &self.qps[queue as usize] else { return };
        let Some(wqe) = qp.pending.front() else { return };
        let piece = WorkPiece {
            queue,
            incarnation: qp.incarnation,
            epoch: qp.epochs.now(),
            sequence: wqe.sequence,
            offset: wqe.done,
            bytes: 0,
            total: wqe.total,
        };
        self.complete_piece(0, &piece, LATER);
    }

    /// Memory of this name, or the buffer, cannot be shared over this link now: whoever waits for that asks again in a while.
    pub fn unshare(&mut self, at: LinkId, share: Option<u32>) {
        let again = self.time() + SHARE_AGAIN;
        if let Some(link) = self.device.links.get_mut(at) {
            link.unshare(share);
            link.shares_again_at = again;
        }
        self.resume(Some(again), |qp| qp.device.peer == Peer::Link(at));
    }

    /// The region with this key is none that a neighbour may see: whoever waits for that has it copied.
    pub fn withhold(&mut self, at: LinkId, key: u32) {
        if let Some(region) = self.regions.get(key) {
            region.withhold();
            if let Some(link) = self.device.links.get_mut(at) {
                link.shared.remove(&region.share);
            }
        }
        self.share_arrived(at);
    }

    /// Memory was shared over this link, in either direction: whoever waited for that goes on.
    pub fn share_arrived(&mut self, at: LinkId) {
        let Some(link) = self.device.links.get_mut(at) else { return };
        // To look for whoever does costs more than all else that a message has this thread do.
        if !std::mem::take(&mut link.awaited) {
            return;
        }
        self.resume(None, |qp| qp.device.peer == Peer::Link(at));
    }
}
