//! The short way within a container.

use super::Plane;
use super::qp::Peer;
use crate::memory::{Piece, copy};
use crate::plane::transmit::{BATCH, BATCH_BYTES};
use ringfence_protocol::completion::Completion;
use ringfence_protocol::verbs::{Access, Opcode, QpState, SendFlags, WcOpcode, WcStatus};
use ringfence_protocol::work::{self, SendBase};
use ringfence_sched::scheduler::charged;
use ringfence_sched::{Allowance, Bytes, Ops};

/// The longest WRITE that goes the short way: about as long as a look at another queue may wait.
pub(crate) const EXPRESS_BYTES: u32 = 64 << 10;

impl Plane {
    /// The road of a WRITE to a queue pair of the same proxy, inlined for as many as there are in a row: take in, admit,
    /// schedule, post, deliver, respond, settle, complete. What is asked and counted on the way is asked and counted here, once
    /// for all of them where that makes no difference:
    ///
    /// | step | there | here |
    /// |---|---|---|
    /// | take in | [`intake::take_send`](crate::plane::intake) | the ring entry's fields |
    /// | admit | [`intake::admit`](crate::plane::intake) | `regions.admit` of the source |
    /// | schedule | `Scheduler::ask` | `allowance`, what may go unasked; `Scheduler::spend` |
    /// | respond | `respond_as`, `take_write` | the states, numbers and rights of the other end; `regions.admit` of the target |
    /// | settle, complete | `Plane::settle`, `complete_front` | the completion, the counters of both ends, the responder's next sequence |
    ///
    /// Whatever is unusual is left in the ring for the long way, which finds out again what is wrong with it. A test compares the
    /// two over random programs (`plane/tests/ways.rs`).
    #[inline(always)]
    pub(super) fn express(&mut self, queue: u32, allowance: Allowance) -> usize {
        let Some(qp) = &self.qps[queue as usize] else { return 0 };
        let peer = match qp.device.peer {
            Peer::Local => qp.device.peer_queue,
            Peer::Link(link) => return self.express_by_grant(queue, link, allowance),
            Peer::None => return 0,
        };
        let Self { qps, regions, cqs, touched, shaping, tally, notices, .. } = self;
        let Ok([Some(qp), Some(other)]) = qps.get_disjoint_mut([queue as usize, peer as usize]) else { return 0 };
        if !qp.pending.is_empty()
            || qp.state != QpState::RTS
            || other.number != qp.attr.dest_qp_num
            || !matches!(other.state, QpState::RTS | QpState::SQD)
            || other.attr.dest_qp_num != qp.number
            || other.device.peer != Peer::Local
            || other.device.responder.offset != 0
            || other.device.responder.sequence != qp.sequence
            || qp.device.by_grant != 0
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
                if entry.push(&completion, tally, notices) {
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
        other.device.responder.sequence = qp.sequence;
        count
    }
}
