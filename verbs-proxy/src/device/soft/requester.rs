//! The requester: brings pieces to their responders, within the proxy or in another, and its word back to the plane.

use super::gather::{scatter, trim};
use super::links::LinkId;
use super::names::Uncopied;
use super::qp::{OWN_PORT, Peer};
use super::remote::{LATER, MIN_REMOTE_TIMEOUT};
use super::respond::{Named, Verdict};
use super::source::Origin;
use super::wire::Request;
use super::{Plane, Qp, Soft};
use crate::device::{Answer, Posted, WorkPiece};
use crate::memory::{AccessFault, Lost, Piece, copy_list};
use crate::pacing::Nanos;
use crate::plane::admit::Admitted;
use crate::plane::claim::vendor;
use crate::plane::transmit::Handed;
use crate::state;
use ringfence_protocol::verbs::{EventType, WcStatus};

/// Local memory that was taken away.
pub(super) const LOST: u16 = AccessFault::Lost as u16;
/// The shortest timeout of a request to nobody: a fraction of that would keep the worker busy with nothing else.
const MIN_TIMEOUT: Nanos = 1_000_000;

/// The request fails, and that is its requester's affair.
fn protection(vendor_err: u16) -> Answer {
    Answer::Failed { status: WcStatus::LOC_PROT_ERR, vendor_err }
}

/// Where the data of a READ are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Data {
    /// In a region of the same container.
    Own(Named),
    /// In memory that a neighbour shares.
    Shared {
        /// Over this link.
        link: LinkId,
        /// By its name for it.
        share: u32,
        /// Where in it.
        offset: u64,
        /// The generation of that name.
        generation: u64,
    },
}

impl Plane {
    /// Takes a piece: to its responder, or to the modelled link, if there is one.
    #[inline]
    pub(super) fn send_piece(&mut self, index: usize, piece: &WorkPiece) -> Posted {
        let urgent = self.shaping.is_urgent(piece.total);
        match &mut self.device.modelled {
            Some(link) => {
                link.send(piece, urgent, self.now);
                Posted::InFlight
            }
            None => self.deliver(index, piece),
        }
    }

    /// Delivers the pieces that have arrived at the far end of the modelled link.
    pub(super) fn serve_wire(&mut self) -> bool {
        let mut worked = false;
        while let Some((piece, at)) = self.device.modelled.as_mut().and_then(|link| link.arrived(self.now)) {
            worked = true;
            self.departed(&piece, at);
            let Some(index) = self.index_of(&piece) else { continue };
            let handed = match self.deliver(index, &piece) {
                Posted::InFlight | Posted::Sent => Handed::On,
                // Not as one that comes late: the responder may have taken this very queue pair to the error state.
                Posted::Answered(answer) => self.complete_piece(index, &piece, answer),
                Posted::Withdrawn => Handed::Stop,
            };
            if handed == Handed::On {
                self.activate(piece.queue);
            }
        }
        worked
    }

    /// Brings a piece to its responder.
    fn deliver(&mut self, index: usize, piece: &WorkPiece) -> Posted {
        let queue = piece.queue;
        let Some(qp) = &self.qps[queue as usize] else { return Posted::Withdrawn };
        let Some(asked) = qp.pending[index].work.admitted() else { return Posted::Withdrawn };
        match qp.device.peer {
            Peer::None => Posted::Answered(self.carry_out(queue, index, piece, Verdict::Silent)),
            Peer::Local => {
                let request = request(qp, asked, piece, 0);
                let verdict = self.respond(OWN_PORT, &request, Origin::Own(index, piece));
                Posted::Answered(self.carry_out(queue, index, piece, verdict))
            }
            Peer::Link(link) => match self.by_grant(queue, index, piece, link) {
                Some(answer) => Posted::Answered(answer),
                None => self.send_request(queue, index, piece, link),
            },
        }
    }

    /// Does what the responder's word asks for in the container's memory, and says what it means for request `index`.
    pub(super) fn carry_out(&mut self, queue: u32, index: usize, piece: &WorkPiece, verdict: Verdict) -> Answer {
        let Self { qps, regions, device: Soft { to, .. }, .. } = self;
        let Some(qp) = &qps[queue as usize] else { return Answer::Done };
        let Some(asked) = qp.pending[index].work.admitted() else { return Answer::Done };
        match verdict {
            Verdict::Ack => Answer::Done,
            Verdict::Data(data) => self.take_data(queue, index, piece, Data::Own(data)),
            Verdict::Value(former) => to.with(|to| {
                if scatter(qp, asked, regions, to).is_err() {
                    return protection(vendor::REMOTE);
                }
                match copy_list(to, 0, &[Piece::of_own(&former.to_ne_bytes())], 0, 8) {
                    Ok(()) => Answer::Done,
                    Err(_) => protection(LOST),
                }
            }),
            Verdict::Lost(vendor_err) => protection(vendor_err),
            Verdict::Unnamed => LATER,
            Verdict::Nak(status) => Answer::Failed { status, vendor_err: vendor::REMOTE },
            Verdict::Rnr(timer) => Answer::NotReady { pause: state::rnr_nanos(timer) },
            Verdict::Silent => {
                Answer::Lost { least: if qp.device.port == OWN_PORT { MIN_TIMEOUT } else { MIN_REMOTE_TIMEOUT } }
            }
        }
    }

    /// Copies a READ's data to where request `index` wants them.
    pub(super) fn take_data(&mut self, queue: u32, index: usize, piece: &WorkPiece, data: Data) -> Answer {
        let Self { qps, regions, device: Soft { links, to, aside, .. }, .. } = self;
        let Some(qp) = &qps[queue as usize] else { return Answer::Done };
        let Some(asked) = qp.pending[index].work.admitted() else { return Answer::Done };
        let source = match data {
            Data::Own(named) => named.find(regions).ok().map(|source| (source, None)),
            Data::Shared { link, share, offset, generation } => links.get(link).and_then(|link| {
                let source = link.shared_piece(share, offset, piece.bytes)?;
                Some((source, Some(link.lasting_answer(generation))))
            }),
        };
        let Some((source, lasting)) = source else {
            return match data {
                // The container has taken the region back since its responder looked.
                Data::Own(_) => self.refuse_read(queue),
                Data::Shared { .. } => Answer::Failed { status: WcStatus::BAD_RESP_ERR, vendor_err: vendor::REMOTE },
            };
        };
        let copied = to.with(|to| {
            scatter(qp, asked, regions, to).map_err(|_| vendor::REMOTE)?;
            let (offset, bytes) = (piece.offset as usize, piece.bytes as usize);
            Ok(match lasting {
                Some(lasting) => {
                    trim(to, offset, bytes);
                    lasting.copy(to, &[source], bytes, aside)
                }
                None => copy_list(to, offset, &[source], 0, bytes).map_err(Uncopied::Lost),
            })
        });
        match copied {
            Ok(Ok(())) => Answer::Done,
            // The responder's proxy has ended the link, and with it its buffer: the answer is lost.
            Ok(Err(Uncopied::Ended)) => Answer::Lost { least: MIN_REMOTE_TIMEOUT },
            Ok(Err(Uncopied::Lost(Lost::Source))) => self.refuse_read(queue),
            Ok(Err(Uncopied::Lost(Lost::Target))) => protection(LOST),
            Err(vendor_err) => protection(vendor_err),
        }
    }

    /// The responder of a READ finds its memory gone. It is a queue pair of this proxy: neighbours show no such memory.
    fn refuse_read(&mut self, queue: u32) -> Answer {
        let local = self.qps[queue as usize].as_ref().filter(|qp| qp.device.peer == Peer::Local);
        if let Some(&peer) = local.and_then(|qp| self.by_number.get(&qp.attr.dest_qp_num)) {
            self.refuse(peer, WcStatus::REM_ACCESS_ERR, EventType::QP_ACCESS_ERR);
        }
        Answer::Failed { status: WcStatus::REM_ACCESS_ERR, vendor_err: LOST }
    }
}

/// A piece of a work request as its responder gets it; `pieces` says where its source is, for another proxy.
pub(super) fn request(qp: &Qp, asked: Admitted<'_>, piece: &WorkPiece, pieces: u8) -> Request {
    Request {
        to: qp.attr.dest_qp_num,
        from: qp.number,
        opcode: asked.opcode,
        solicited: asked.solicited,
        pieces,
        sequence: qp.device.to_wire(piece.sequence),
        imm: asked.imm,
        offset: piece.offset,
        bytes: piece.bytes,
        total: asked.total,
        remote_addr: asked.remote_addr,
        rkey: asked.rkey,
        compare_add: asked.compare_add,
        swap: asked.swap,
    }
}
