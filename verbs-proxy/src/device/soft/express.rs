//! The road inlined within a container, and what that has in common with the one by grants.

use super::grants::using::atomic;
use super::qp::Peer;
use super::{Plane, Qp};
use crate::memory::{Piece, RegionTable, copy};
use crate::plane::admit::local_access;
use crate::plane::claim::{fetches, wc_opcode};
use crate::plane::transmit::{BATCH, BATCH_BYTES};
use ringfence_protocol::completion::Completion;
use ringfence_protocol::verbs::{Access, Opcode, QpState, SendFlags, WcStatus};
use ringfence_protocol::work::{self, SendBase, SendFields};
use ringfence_sched::scheduler::charged;
use ringfence_sched::{Allowance, Bytes, Ops};

/// The longest request that the inlined road takes: about as long as a look at another queue may wait.
const EXPRESS_BYTES: u32 = 64 << 10;

impl Plane {
    /// The road of a WRITE, a READ or an atomic to a queue pair of the same proxy, inlined for as many as there are in a row: claim,
    /// admit, schedule, post, deliver, respond, complete. What is asked and counted on the way is asked and counted here,
    /// once for all of them where that makes no difference:
    ///
    /// | step | there | here |
    /// |---|---|---|
    /// | claim | [`claim_send`](crate::plane::claim) | the ring entry's fields |
    /// | admit | [`Qp::admit`](crate::plane::admit) | `local`, which asks the same `local_access`, and `regions.admit` |
    /// | schedule | `Scheduler::ask` | `allowance`, what may go unasked; `Scheduler::spend` |
    /// | respond | `respond_as`, `take_write`, `give_data`, `take_atomic` | the states, numbers and rights of the other end; `regions.admit` of the target |
    /// | complete | `Plane::complete_piece`, `complete_front` | the completion, the counters of both ends, the responder's next sequence |
    ///
    /// Whatever is unusual is left in the ring for the road itself, which finds out again what is wrong with it. A test compares the
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
            || other.device.responder.sequence != qp.device.to_wire(qp.sequence)
            || qp.device.by_grant != 0
        {
            return 0;
        }
        let Some(Some(entry)) = cqs.get_mut(qp.send_cq.0) else { return 0 };
        let most = allowance.ops.0.min(BATCH as u64) as usize;
        let (mut count, mut moved, mut paid, mut fetched) = (0, 0, Bytes(0), Bytes(0));
        let mut row = Row::EMPTY;
        while count < most && moved < BATCH_BYTES {
            let Some(words) = qp.send.peek() else { break };
            let base = SendBase(words);
            let fields = base.fields();
            let head = base.inline_head();
            let Some((bytes, own)) = local(qp, regions, &fields, &head, allowance) else { break };
            let Some(access) = remote_rights(other, fields.opcode) else { break };
            let target = regions.admit(fields.rkey, other.pd, fields.remote_addr, u64::from(bytes), access);
            let Ok(target) = target else { break };
            // What a container fetches from itself leaves it as well.
            let cost = charged(Bytes(bytes.into()));
            let fetches = fetches(fields.opcode);
            let (due, fetching) = (paid.plus(cost), if fetches { fetched.plus(cost) } else { fetched });
            if due > allowance.out || fetching > allowance.fetched {
                break;
            }
            let operation = atomic(fields.opcode, fields.compare_add, fields.swap);
            let done = match fields.opcode {
                Opcode::RDMA_WRITE => copy(target, own).is_ok(),
                Opcode::RDMA_READ => copy(own, target).is_ok(),
                // What was executed cannot be left to the road itself: there must be no doubt that its answer has a place.
                _ if own.may_fault() || !target.is_for_atomics() || !fields.remote_addr.is_multiple_of(8) => false,
                _ => target.fetch_update(operation).is_ok_and(|former| {
                    let sequence = qp.device.to_wire(qp.sequence.wrapping_add(count as u32));
                    other.device.responder.remember(sequence, former);
                    copy(own, Piece::of_own(&former.to_ne_bytes())).is_ok()
                }),
            };
            if !done {
                break;
            }
            (paid, fetched) = (due, fetching);
            if let Some(former) = row.add(fields.opcode, bytes) {
                tally.sent_at_once(former.opcode, former.operations, former.bytes);
                tally.received_whole(former.opcode, former.operations, former.bytes);
            }
            qp.send.advance(1);
            count += 1;
            moved += bytes;
            if (qp.sq_sig_all || fields.flags.contains(SendFlags::SIGNALED))
                && entry.push(&completion(qp, &fields, bytes), tally, notices)
            {
                touched.push(qp.send_cq);
            }
        }
        shaping.spend(paid, fetched, Ops(count as u64));
        if count > 0 {
            tally.sent_at_once(row.opcode, row.operations, row.bytes);
            tally.received_whole(row.opcode, row.operations, row.bytes);
        }
        qp.sequence = qp.sequence.wrapping_add(count as u32);
        other.device.responder.sequence = qp.device.to_wire(qp.sequence);
        count
    }
}

/// Requests of one opcode that came one after the other: they are counted together.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub(super) opcode: Opcode,
    pub(super) operations: u64,
    pub(super) bytes: u64,
}

impl Row {
    /// None yet.
    pub(super) const EMPTY: Self = Self { opcode: Opcode::RDMA_WRITE, operations: 0, bytes: 0 };

    /// One more; those before it, if they were of another opcode.
    #[inline(always)]
    pub(super) fn add(&mut self, opcode: Opcode, bytes: u32) -> Option<Self> {
        let former = (self.opcode != opcode).then(|| std::mem::replace(self, Self { opcode, ..Self::EMPTY }));
        self.operations += 1;
        self.bytes += u64::from(bytes);
        former
    }
}

/// The container's side of a request that goes the inlined road, and its bytes.
#[inline(always)]
pub(super) fn local<'a>(
    qp: &Qp,
    regions: &'a RegionTable,
    fields: &SendFields,
    head: &'a [u64; 4],
    allowance: Allowance,
) -> Option<(u32, Piece<'a>)> {
    if fields.flags.contains(SendFlags::INLINE) {
        let bytes = u32::from(fields.inline_bytes);
        let short = bytes > 0 && bytes <= work::BASE_INLINE.min(qp.caps.max_inline);
        let short = short && !fetches(fields.opcode) && local_access(qp, fields.opcode, bytes).is_ok();
        return short.then(|| (bytes, Piece::of_own(zerocopy::IntoBytes::as_bytes(head)).slice(0, bytes as usize)));
    }
    let bytes = fields.sge.length;
    let most = allowance.longest.0.min(u64::from(EXPRESS_BYTES)) as u32;
    if fields.sges != 1 || bytes == 0 || bytes > most || qp.caps.max_send_sge == 0 {
        return None;
    }
    let access = local_access(qp, fields.opcode, bytes).ok()?;
    Some((bytes, regions.admit(fields.sge.lkey, qp.pd, fields.sge.addr, bytes.into(), access).ok()?))
}

/// The completion of a request that went.
#[inline(always)]
pub(super) fn completion(qp: &Qp, fields: &SendFields, bytes: u32) -> Completion {
    Completion {
        wr_id: fields.wr_id,
        status: WcStatus::SUCCESS,
        opcode: wc_opcode(fields.opcode),
        byte_len: if fields.opcode == Opcode::RDMA_WRITE { 0 } else { bytes },
        qp_num: qp.number,
        cookie: qp.cookie,
        freed: qp.send.position(),
        ..Completion::default()
    }
}

/// What the other end must allow for a one-sided operation; `None` for what is none, or wakes its application.
#[inline(always)]
pub(super) fn remote_access(opcode: Opcode) -> Option<Access> {
    match opcode {
        Opcode::RDMA_WRITE => Some(Access::REMOTE_WRITE),
        Opcode::RDMA_READ => Some(Access::REMOTE_READ),
        Opcode::CMP_AND_SWP | Opcode::FETCH_AND_ADD => Some(Access::REMOTE_ATOMIC),
        _ => None,
    }
}

/// The same, if this queue pair of the other end allows it.
#[inline(always)]
pub(super) fn remote_rights(qp: &Qp, opcode: Opcode) -> Option<Access> {
    let access = remote_access(opcode)?;
    let allowed = qp.attr.access.contains(access) && (!fetches(opcode) || qp.attr.max_dest_rd_atomic > 0);
    allowed.then_some(access)
}
