//! Receive requests: taken when a device wants one, in advance or when a message has come, and completed when it is used.

use super::Plane;
use super::claim;
use super::qp::{Data, Receiving};
use crate::device::Device;
use ringfence_protocol::completion::Completion;
use ringfence_protocol::verbs::{WcFlags, WcOpcode, WcStatus};
use ringfence_protocol::work::Sge;

/// What became of a receive request.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// How it ended.
    pub status: WcStatus,
    /// More about an error.
    pub vendor_err: u16,
    /// What it was used by.
    pub opcode: WcOpcode,
    /// Bytes of the message.
    pub bytes: u32,
    /// Immediate data.
    pub imm: Option<u32>,
    /// The sender wants the receiver woken.
    pub solicited: bool,
}

impl<D: Device> Plane<D> {
    /// The next receive request of a queue pair, if there is one. As an error if its ring entry contradicts itself: the device
    /// completes it with one, and takes the queue pair to the error state.
    pub fn take_receive(&mut self, queue: u32) -> Option<Result<Receiving, Receiving>> {
        let qp = self.qps[queue as usize].as_mut()?;
        let receive = claim::take_receive(qp)?;
        let (wr_id, freed) = (receive.wr_id, qp.receive.position());
        Some(match receive.data {
            Ok(data) => Ok(Receiving { wr_id, data, freed }),
            Err(claim::Malformed) => Err(Receiving { wr_id, data: Data::One(Sge::default()), freed }),
        })
    }

    /// Takes the queue pair to the error state, in which this receive request completes so before all others are flushed: not before
    /// nothing of the queue pair is under way any more.
    pub fn fail_receive(&mut self, queue: u32, receiving: Receiving, end: Received) {
        if let Some(qp) = &mut self.qps[queue as usize] {
            qp.failed_receive = Some((receiving, end));
        }
        self.to_error(queue);
    }

    /// Completes the receive request that took a queue pair to the error state. False if none has.
    pub(super) fn complete_failed_receive(&mut self, queue: u32) -> bool {
        let failed = self.qps[queue as usize].as_mut().and_then(|qp| qp.failed_receive.take());
        failed.inspect(|(receiving, end)| self.received(queue, receiving, end)).is_some()
    }

    /// Completes a receive request.
    pub fn received(&mut self, queue: u32, receiving: &Receiving, end: &Received) {
        let Some(qp) = &self.qps[queue as usize] else { return };
        let completion = Completion {
            wr_id: receiving.wr_id,
            status: end.status,
            opcode: end.opcode,
            vendor_err: end.vendor_err,
            flags: if end.imm.is_some() { WcFlags::WITH_IMM } else { WcFlags(0) },
            byte_len: end.bytes,
            imm: end.imm.unwrap_or(0),
            qp_num: qp.number,
            src_qp: qp.attr.dest_qp_num,
            cookie: qp.cookie,
            freed: receiving.freed,
            ..Completion::default()
        };
        let cq = qp.recv_cq;
        self.complete(cq, &completion, end.solicited);
    }
}
