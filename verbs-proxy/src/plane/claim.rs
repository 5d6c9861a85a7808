//! From the rings to claims, which nobody believes, and what happens to requests of a queue pair in error.

use super::complete::flushed;
use super::qp::{Data, Inline, Qp, Wqe};
use super::{Outcome, Plane};
use crate::device::Device;
use ringfence_protocol::completion::Completion;
use ringfence_protocol::ring::{Consumer, Position};
use ringfence_protocol::verbs::{EventType, Opcode, QpState, SendFlags, WcOpcode, WcStatus};
use ringfence_protocol::work::{
    BASE_INLINE, EXTENSION_INLINE, ReceiveBase, SGES_PER_EXTENSION, SendBase, SendFields, Sge, extension_inline,
    extension_sge,
};

/// The longest message, bytes: what `max_msg_sz` says.
pub const MAX_MESSAGE: u32 = 1 << 30;

/// The container's library would not have written this entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// Vendor error codes beyond those of [`crate::memory::AccessFault`].
pub mod vendor {
    /// The ring entry contradicts itself or the queue pair's capabilities.
    pub const MALFORMED: u16 = 0x10;
    /// An opcode that the device does not offer.
    pub const OPCODE: u16 = 0x11;
    /// Longer than a message may be.
    pub const LENGTH: u16 = 0x12;
    /// An atomic on other than 8 aligned bytes.
    pub const ATOMIC: u16 = 0x13;
    /// READ or atomic without `max_rd_atomic`.
    pub const RD_ATOMIC: u16 = 0x14;
    /// The responder refused; its word is the status.
    pub const REMOTE: u16 = 0x20;
    /// No answer in time.
    pub const TIMEOUT: u16 = 0x21;
}

/// A work request as it was copied out of the ring. Nobody believes it: its keys and lengths are the container's word.
#[derive(Debug)]
pub struct Claim {
    /// Comes back in the completion.
    pub wr_id: u64,
    /// Operation.
    pub opcode: Opcode,
    /// Wants a completion on success.
    pub signaled: bool,
    /// The receiver's completion is solicited.
    pub solicited: bool,
    /// Waits for earlier READs and atomics.
    pub fence: bool,
    /// Immediate data.
    pub imm: u32,
    /// Remote address.
    pub remote_addr: u64,
    /// Remote key.
    pub rkey: u32,
    /// Atomic operand.
    pub compare_add: u64,
    /// Atomic operand.
    pub swap: u64,
    /// Bytes.
    pub total: u32,
    /// Local side.
    pub data: Data,
    /// Ring position behind this request.
    pub freed: Position,
}

impl Claim {
    /// READ or atomic: answered with data, and what a fence waits for.
    #[must_use]
    pub fn fetches(&self) -> bool {
        fetches(self.opcode)
    }

    /// What the fields of a ring entry say, of so many bytes, which are these; `freed`: the ring position behind it.
    #[inline(always)]
    #[must_use]
    pub fn of<D: Device>(qp: &Qp<D>, fields: &SendFields, total: u32, data: Data, freed: Position) -> Self {
        Self {
            wr_id: fields.wr_id,
            opcode: fields.opcode,
            signaled: qp.sq_sig_all || fields.flags.contains(SendFlags::SIGNALED),
            solicited: fields.flags.contains(SendFlags::SOLICITED),
            fence: fields.flags.contains(SendFlags::FENCE),
            imm: fields.imm,
            remote_addr: fields.remote_addr,
            rkey: fields.rkey,
            compare_add: fields.compare_add,
            swap: fields.swap,
            total,
            data,
            freed,
        }
    }
}

/// See [`Claim::fetches`].
#[inline(always)]
pub(crate) fn fetches(opcode: Opcode) -> bool {
    matches!(opcode, Opcode::RDMA_READ | Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD)
}

/// Copies the next send request out of the ring.
pub(crate) fn claim_send<D: Device>(qp: &mut Qp<D>) -> Option<Result<Claim, Malformed>> {
    let base = SendBase(qp.send.peek()?);
    let fields = base.fields();
    let claim = read_send(qp, &base, &fields);
    // A malformed entry has no length to trust; the queue pair goes to the error state behind its first slot.
    qp.send.advance(claim.as_ref().map_or(1, |(_, slots)| *slots));
    let freed = qp.send.position();
    Some(claim.map(|(claim, _)| Claim { freed, ..claim }))
}

fn read_send<D: Device>(qp: &Qp<D>, base: &SendBase, fields: &SendFields) -> Result<(Claim, u32), Malformed> {
    let extensions = fields.extensions().filter(|count| *count < qp.send.capacity()).ok_or(Malformed)?;
    let (data, total) = if fields.flags.contains(SendFlags::INLINE) {
        let bytes = u32::from(fields.inline_bytes);
        if bytes > qp.caps.max_inline || fetches(fields.opcode) {
            return Err(Malformed);
        }
        (Data::Inline(read_inline(&qp.send, base, bytes, extensions)?), u64::from(bytes))
    } else {
        let sges = u32::from(fields.sges);
        if sges > qp.caps.max_send_sge {
            return Err(Malformed);
        }
        if sges <= 1 {
            let sge = if sges == 0 { Sge::default() } else { fields.sge };
            (Data::One(sge), u64::from(sge.length))
        } else {
            let list = read_sges(&qp.send, fields.sge, sges)?;
            let total = list.iter().map(|sge| u64::from(sge.length)).sum();
            (Data::List(list.into()), total)
        }
    };
    // Saturated: `Claim::check` refuses everything above MAX_MESSAGE.
    let total = u32::try_from(total).unwrap_or(u32::MAX);
    Ok((Claim::of(qp, fields, total, data, 0), 1 + extensions))
}

fn read_inline(ring: &Consumer<'_>, base: &SendBase, bytes: u32, extensions: u32) -> Result<Inline, Malformed> {
    if bytes <= BASE_INLINE {
        return Ok(Inline::Short(base.inline_head(), bytes as u8));
    }
    let mut data = Vec::with_capacity((BASE_INLINE + extensions * EXTENSION_INLINE) as usize);
    data.extend(base.inline_head().iter().flat_map(|word| word.to_ne_bytes()));
    for index in 0..extensions {
        let words = extension_inline(&ring.extension(index).ok_or(Malformed)?);
        data.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    }
    data.truncate(bytes as usize);
    Ok(Inline::Long(data.into()))
}

fn read_sges(ring: &Consumer<'_>, first: Sge, count: u32) -> Result<Vec<Sge>, Malformed> {
    let mut list = Vec::with_capacity(count as usize);
    list.push(first);
    for index in 0..count - 1 {
        let words = ring.extension(index / SGES_PER_EXTENSION).ok_or(Malformed)?;
        list.push(extension_sge(&words, index % SGES_PER_EXTENSION));
    }
    Ok(list)
}

/// A receive request out of the ring.
#[derive(Debug)]
pub(crate) struct TakenReceive {
    pub wr_id: u64,
    pub data: Result<Data, Malformed>,
}

/// Copies the next receive request out of the ring.
pub(crate) fn take_receive<D: Device>(qp: &mut Qp<D>) -> Option<TakenReceive> {
    let base = ReceiveBase(qp.receive.peek()?);
    let data = base
        .extensions()
        .filter(|count| *count < qp.receive.capacity() && u32::from(base.sges()) <= qp.caps.max_recv_sge)
        .ok_or(Malformed)
        .and_then(|_| match u32::from(base.sges()) {
            0 => Ok(Data::One(Sge::default())),
            1 => Ok(Data::One(base.sge())),
            count => Ok(Data::List(read_sges(&qp.receive, base.sge(), count)?.into())),
        });
    qp.receive.advance(1 + data.as_ref().map_or(0, |_| base.extensions().unwrap_or(0)));
    Some(TakenReceive { wr_id: base.wr_id(), data })
}

/// What a requester's completion says that it was.
pub(crate) fn wc_opcode(opcode: Opcode) -> WcOpcode {
    match opcode {
        Opcode::SEND | Opcode::SEND_WITH_IMM | Opcode::SEND_WITH_INV => WcOpcode::SEND,
        Opcode::RDMA_READ => WcOpcode::RDMA_READ,
        Opcode::CMP_AND_SWP => WcOpcode::COMP_SWAP,
        Opcode::FETCH_AND_ADD => WcOpcode::FETCH_ADD,
        _ => WcOpcode::RDMA_WRITE,
    }
}

impl<D: Device> Plane<D> {
    /// Flushes what a queue pair in error holds, in order, a bounded number at a time.
    pub(crate) fn flush(&mut self, queue: u32) -> Outcome {
        if self.qps[queue as usize].as_ref().is_none_or(|qp| !D::has_stopped(qp)) {
            return Outcome::Blocked;
        }
        let mut worked = self.complete_failed_receive(queue) | self.complete_failed(queue);
        for _ in 0..64 {
            let Some(qp) = &mut self.qps[queue as usize] else { return Outcome::Blocked };
            let (wr_id, freed) = match qp.pending.pop_front() {
                Some(wqe) => (wqe.wr_id, wqe.freed),
                None => {
                    qp.next = 0;
                    match claim_send(qp) {
                        Some(Ok(claim)) => (claim.wr_id, claim.freed),
                        Some(Err(Malformed)) => (0, qp.send.position()),
                        None => break,
                    }
                }
            };
            worked = true;
            let (cq, completion) = (qp.send_cq, flushed(qp, wr_id, freed));
            self.complete(cq, &completion, true);
        }
        for _ in 0..64 {
            let Some(qp) = &mut self.qps[queue as usize] else { return Outcome::Blocked };
            let (wr_id, freed) = match D::unused_receive(qp) {
                Some(receiving) => (receiving.wr_id, receiving.freed),
                None => match take_receive(qp) {
                    Some(receive) => (receive.wr_id, qp.receive.position()),
                    None => break,
                },
            };
            worked = true;
            let (cq, completion) = (qp.recv_cq, flushed(qp, wr_id, freed));
            self.complete(cq, &Completion { opcode: WcOpcode::RECV, ..completion }, true);
        }
        if worked { Outcome::Worked } else { Outcome::Idle }
    }

    /// Send queue drained: nothing new is claimed, what was begun is finished.
    pub(crate) fn drain(&mut self, queue: u32) -> Outcome {
        let Some(qp) = &mut self.qps[queue as usize] else { return Outcome::Blocked };
        if qp.pending.is_empty() {
            if std::mem::take(&mut qp.attr.en_sqd_async_notify) != 0 {
                self.event(queue, EventType::SQ_DRAINED);
            }
            return Outcome::Idle;
        }
        self.transmit(queue)
    }

    /// Claims the next request, into `pending`. False if there is none or no more may be claimed.
    pub(crate) fn claim_next(&mut self, queue: u32) -> bool {
        let Some(qp) = &mut self.qps[queue as usize] else { return false };
        if qp.pending.len() >= qp.caps.max_send_wr as usize || qp.state != QpState::RTS {
            return false;
        }
        match claim_send(qp) {
            None => false,
            Some(Ok(claim)) => {
                let wqe = Wqe::new(claim, qp.sequence);
                qp.sequence = qp.sequence.wrapping_add(1);
                qp.pending.push_back(wqe);
                true
            }
            Some(Err(Malformed)) => {
                let freed = qp.send.position();
                let (cq, mut completion) = (qp.send_cq, flushed(qp, 0, freed));
                (completion.status, completion.vendor_err) = (WcStatus::LOC_QP_OP_ERR, vendor::MALFORMED);
                // What was posted before is flushed with everything else: its answers may never come in order now.
                self.complete(cq, &completion, true);
                self.to_error(queue);
                false
            }
        }
    }
}
