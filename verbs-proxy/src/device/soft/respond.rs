//! The responder: this proxy decides about its own container's memory, queues and states, whoever asks.

use super::gather::resolve;
use super::grants::using::atomic;
use super::names;
use super::source::{Origin, Sources};
use super::wire::Request;
use super::{Plane, Qp, Soft};
use crate::memory::{AccessFault, Lost, NotAtomic, PdId, Piece, RegionTable};
use crate::plane::claim::{self, vendor};
use crate::plane::receive::Received;
use ringfence_protocol::verbs::{Access, EventType, Opcode, QpState, WcOpcode, WcStatus};

/// The responder's word.
#[derive(Clone, Copy, Debug)]
pub enum Verdict {
    /// Executed.
    Ack,
    /// Vanished, as a packet to a queue pair in another state does.
    Silent,
    /// No receive request; the timer field says when to try again.
    Rnr(u32),
    /// Refused; the requester completes with this.
    Nak(WcStatus),
    /// Where a READ's data are.
    Data(Named),
    /// An atomic's former value.
    Value(u64),
    /// The requester has taken back the names of its data, of this queue pair or of another one: it may ask again.
    Unnamed,
    /// The requester's own memory is gone; the responder has nothing to do with that. The vendor error says more.
    Lost(u16),
}

/// Memory that a remote request may read, by its name: the region may be gone when it is read.
#[derive(Clone, Copy, Debug)]
pub struct Named {
    /// The region's key.
    pub key: u32,
    pd: PdId,
    addr: u64,
    bytes: u32,
}

impl Named {
    /// The memory, if it is there still.
    #[inline]
    pub(super) fn find(self, regions: &RegionTable) -> Result<Piece<'_>, AccessFault> {
        regions.admit(self.key, self.pd, self.addr, u64::from(self.bytes), Access::REMOTE_READ)
    }
}

/// Why a request's data did not reach their target.
#[derive(Clone, Copy, Debug)]
enum Uncopied {
    /// Their source is gone, with this vendor error.
    Source(u16),
    /// They are not to be had under the name that they were given.
    Unnamed,
    /// The target is not there, or not to be written.
    Target(AccessFault),
}

impl From<names::Uncopied> for Uncopied {
    fn from(uncopied: names::Uncopied) -> Self {
        match uncopied {
            names::Uncopied::Ended => Self::Unnamed,
            names::Uncopied::Lost(Lost::Source) => Self::Source(AccessFault::Lost as u16),
            names::Uncopied::Lost(Lost::Target) => Self::Target(AccessFault::Lost),
        }
    }
}

impl Plane {
    /// Answers a piece of a work request whose data come from `origin`.
    ///
    /// `port`: LID of the port that it came from, [`super::qp::OWN_PORT`] for our own. Not the link: two proxies that make a link to
    /// each other at the same time have two.
    pub(crate) fn respond(&mut self, port: u16, incoming: &Request, origin: Origin<'_>) -> Verdict {
        match self.by_number.get(&incoming.to) {
            Some(&queue) => self.respond_as(queue, port, incoming, origin),
            None => Verdict::Silent,
        }
    }

    /// The same, by the queue pair with this bell number.
    pub(crate) fn respond_as(&mut self, queue: u32, port: u16, incoming: &Request, origin: Origin<'_>) -> Verdict {
        let Some(qp) = &mut self.qps[queue as usize] else { return Verdict::Silent };
        if !qp.responds() || qp.attr.dest_qp_num != incoming.from || qp.device.port != port {
            return Verdict::Silent;
        }
        let ends = incoming.offset.checked_add(incoming.bytes).filter(|end| *end <= incoming.total);
        let Some(end) = ends.filter(|_| incoming.total <= claim::MAX_MESSAGE) else {
            return self.refuse(queue, WcStatus::REM_INV_REQ_ERR, EventType::QP_REQ_ERR);
        };
        let responder = &mut qp.device.responder;
        let (sequence, due) = (incoming.sequence, responder.sequence);
        if sequence != due || incoming.offset != responder.offset {
            // Behind what is expected: executed before, the requester gave up waiting for the answer too early.
            let repeated = if sequence == due { incoming.offset < responder.offset } else { sequence.is_before(due) };
            return if repeated { self.repeat(queue, incoming) } else { Verdict::Silent };
        }
        if !responder.established && qp.state == QpState::RTR {
            responder.established = true;
            self.event(queue, EventType::COMM_EST);
        }
        let last = end == incoming.total;
        let verdict = match incoming.opcode {
            Opcode::SEND | Opcode::SEND_WITH_IMM => self.take_message(queue, incoming, origin, last),
            Opcode::RDMA_WRITE | Opcode::RDMA_WRITE_WITH_IMM => self.take_write(queue, incoming, origin, last),
            Opcode::RDMA_READ => self.give_data(queue, incoming),
            Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD => self.take_atomic(queue, incoming),
            _ => self.refuse(queue, WcStatus::REM_INV_REQ_ERR, EventType::QP_REQ_ERR),
        };
        if matches!(verdict, Verdict::Ack | Verdict::Data(..) | Verdict::Value(_))
            && let Some(qp) = &mut self.qps[queue as usize]
        {
            self.tally.received(incoming.opcode, incoming.bytes, last);
            let responder = &mut qp.device.responder;
            if last {
                responder.sequence = responder.sequence.next();
                responder.offset = 0;
            } else {
                responder.offset = end;
            }
        }
        verdict
    }

    fn repeat(&mut self, queue: u32, incoming: &Request) -> Verdict {
        self.tally.repeated();
        match incoming.opcode {
            Opcode::RDMA_READ => self.give_data(queue, incoming),
            Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD => {
                let Some(qp) = &self.qps[queue as usize] else { return Verdict::Silent };
                let known = qp.device.responder.atomics.iter().find(|(sequence, _)| *sequence == incoming.sequence);
                known.map_or(Verdict::Silent, |(_, value)| Verdict::Value(*value))
            }
            _ => Verdict::Ack,
        }
    }

    /// Refuses a request that breaks the rules: the responder's queue pair is in error from then on
    /// (InfiniBand Architecture Specification, 9.9.3, responder error classes B, C and E).
    pub(crate) fn refuse(&mut self, queue: u32, status: WcStatus, event: EventType) -> Verdict {
        self.to_error(queue);
        self.event(queue, event);
        Verdict::Nak(status)
    }

    /// Completes a receive with an error, which takes the queue pair to the error state.
    fn refuse_receive(&mut self, queue: u32, local: WcStatus, vendor_err: u16, remote: WcStatus) -> Verdict {
        match self.qps[queue as usize].as_mut().and_then(|qp| qp.device.responder.receiving.take()) {
            Some(receiving) => {
                let opcode = WcOpcode::RECV;
                let end = Received { status: local, vendor_err, opcode, bytes: 0, imm: None, solicited: true };
                self.fail_receive(queue, receiving, end);
            }
            None => self.to_error(queue),
        }
        Verdict::Nak(remote)
    }

    /// Makes sure that a receive request is in use.
    fn ensure_receive(&mut self, queue: u32) -> Result<(), Verdict> {
        let Some(qp) = &self.qps[queue as usize] else { return Err(Verdict::Silent) };
        if qp.device.responder.receiving.is_some() {
            return Ok(());
        }
        let timer = qp.attr.min_rnr_timer;
        let Some(taken) = self.take_receive(queue) else {
            self.tally.rnr_sent();
            return Err(Verdict::Rnr(timer));
        };
        let Some(qp) = &mut self.qps[queue as usize] else { return Err(Verdict::Silent) };
        let malformed = taken.is_err();
        qp.device.responder.receiving = Some(taken.unwrap_or_else(|receiving| receiving));
        if malformed {
            return Err(self.refuse_receive(queue, WcStatus::LOC_QP_OP_ERR, vendor::MALFORMED, WcStatus::REM_OP_ERR));
        }
        Ok(())
    }

    fn finish_receive(&mut self, queue: u32, incoming: &Request, opcode: WcOpcode, with_imm: bool) {
        let receiving = self.qps[queue as usize].as_mut().and_then(|qp| qp.device.responder.receiving.take());
        let Some(receiving) = receiving else { return };
        let imm = with_imm.then_some(incoming.imm);
        let (status, bytes, solicited) = (WcStatus::SUCCESS, incoming.total, incoming.solicited);
        self.received(queue, &receiving, &Received { status, vendor_err: 0, opcode, bytes, imm, solicited });
    }

    fn take_message(&mut self, queue: u32, incoming: &Request, origin: Origin<'_>, last: bool) -> Verdict {
        if let Err(verdict) = self.ensure_receive(queue) {
            return verdict;
        }
        let Self { qps, regions, device: Soft { links, incoming: message, from, to, aside, .. }, .. } = self;
        let Some(qp) = &qps[queue as usize] else { return Verdict::Silent };
        let Some(receiving) = &qp.device.responder.receiving else { return Verdict::Silent };
        let sges = receiving.data.sges();
        let room: u64 = sges.iter().map(|sge| u64::from(sge.length)).sum();
        if room < u64::from(incoming.total) {
            return self.refuse_receive(queue, WcStatus::LOC_LEN_ERR, vendor::LENGTH, WcStatus::REM_INV_REQ_ERR);
        }
        if incoming.total > 0 {
            let sources = Sources { qps, regions, links, message };
            let copied = from.with(|from| {
                sources.find(origin, incoming, from).map_err(Uncopied::Source)?;
                to.with(|to| {
                    resolve(qp, sges, regions, Access::LOCAL_WRITE, to).map_err(Uncopied::Target)?;
                    Ok(sources.copy(origin, incoming, to, from, aside)?)
                })
            });
            match copied {
                Ok(()) => {}
                Err(Uncopied::Unnamed) => return Verdict::Unnamed,
                Err(Uncopied::Source(vendor)) => return Verdict::Lost(vendor),
                Err(Uncopied::Target(fault)) => {
                    return self.refuse_receive(queue, WcStatus::LOC_PROT_ERR, fault as u16, WcStatus::REM_OP_ERR);
                }
            }
        }
        if last {
            let with_imm = incoming.opcode == Opcode::SEND_WITH_IMM;
            self.finish_receive(queue, incoming, WcOpcode::RECV, with_imm);
        }
        Verdict::Ack
    }

    fn take_write(&mut self, queue: u32, incoming: &Request, origin: Origin<'_>, last: bool) -> Verdict {
        if incoming.total > 0 {
            let Self { qps, regions, device: Soft { links, incoming: message, from, to, aside, .. }, .. } = self;
            let Some(qp) = &qps[queue as usize] else { return Verdict::Silent };
            let sources = Sources { qps, regions, links, message };
            let copied = from.with(|from| {
                sources.find(origin, incoming, from).map_err(Uncopied::Source)?;
                let target = admit_remote(qp, regions, incoming, Access::REMOTE_WRITE).map_err(Uncopied::Target)?;
                to.with(|to| {
                    to.push(target);
                    Ok(sources.copy(origin, incoming, to, from, aside)?)
                })
            });
            match copied {
                Ok(()) => {}
                Err(Uncopied::Unnamed) => return Verdict::Unnamed,
                Err(Uncopied::Source(vendor)) => return Verdict::Lost(vendor),
                Err(Uncopied::Target(_)) => {
                    return self.refuse(queue, WcStatus::REM_ACCESS_ERR, EventType::QP_ACCESS_ERR);
                }
            }
        }
        if last && incoming.opcode == Opcode::RDMA_WRITE_WITH_IMM {
            // After the data, as on the wire, where the immediate data is in the last packet.
            if let Err(verdict) = self.ensure_receive(queue) {
                return verdict;
            }
            self.finish_receive(queue, incoming, WcOpcode::RECV_RDMA_WITH_IMM, true);
        }
        Verdict::Ack
    }

    fn give_data(&mut self, queue: u32, incoming: &Request) -> Verdict {
        let Some(qp) = &self.qps[queue as usize] else { return Verdict::Silent };
        if qp.attr.max_dest_rd_atomic == 0 {
            return self.refuse(queue, WcStatus::REM_INV_REQ_ERR, EventType::QP_REQ_ERR);
        }
        if incoming.total == 0 {
            return Verdict::Ack;
        }
        if admit_remote(qp, &self.regions, incoming, Access::REMOTE_READ).is_err() {
            return self.refuse(queue, WcStatus::REM_ACCESS_ERR, EventType::QP_ACCESS_ERR);
        }
        let Request { rkey: key, remote_addr, offset, bytes, .. } = *incoming;
        Verdict::Data(Named { key, pd: qp.pd, addr: remote_addr.wrapping_add(offset.into()), bytes })
    }

    fn take_atomic(&mut self, queue: u32, incoming: &Request) -> Verdict {
        let Some(qp) = &self.qps[queue as usize] else { return Verdict::Silent };
        if qp.attr.max_dest_rd_atomic == 0 || incoming.total != 8 || !incoming.remote_addr.is_multiple_of(8) {
            return self.refuse(queue, WcStatus::REM_INV_REQ_ERR, EventType::QP_REQ_ERR);
        }
        let Ok(target) = admit_remote(qp, &self.regions, incoming, Access::REMOTE_ATOMIC) else {
            return self.refuse(queue, WcStatus::REM_ACCESS_ERR, EventType::QP_ACCESS_ERR);
        };
        let operation = atomic(incoming.opcode, incoming.compare_add, incoming.swap);
        let former = match target.fetch_update(operation) {
            Ok(former) => former,
            // Aligned for the application, but not in memory, as with an `iova` of another alignment.
            Err(NotAtomic::Misaligned) => {
                return self.refuse(queue, WcStatus::REM_INV_REQ_ERR, EventType::QP_REQ_ERR);
            }
            Err(NotAtomic::Lost) => return self.refuse(queue, WcStatus::REM_ACCESS_ERR, EventType::QP_ACCESS_ERR),
        };
        if let Some(qp) = &mut self.qps[queue as usize] {
            qp.device.responder.remember(incoming.sequence, former);
        }
        Verdict::Value(former)
    }
}

/// The whole range that a remote request names, if the queue pair and the region allow it.
fn admit_remote<'a>(
    qp: &Qp,
    regions: &'a RegionTable,
    incoming: &Request,
    access: Access,
) -> Result<Piece<'a>, AccessFault> {
    if !qp.attr.access.contains(access) {
        return Err(AccessFault::Rights);
    }
    regions.admit(incoming.rkey, qp.pd, incoming.remote_addr, u64::from(incoming.total), access)
}
