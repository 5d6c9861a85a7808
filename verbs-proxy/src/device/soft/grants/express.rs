//! The road inlined by grants, for the commonest requests: as many as there are, while nothing of their queue pair is under way.

use super::Grants;
use super::using::{Wanted, atomic};
use crate::device::soft::express::{Row, completion, local};
use crate::device::soft::link::Link;
use crate::device::soft::links::LinkId;
use crate::device::soft::{Plane, Soft};
use crate::memory::{Piece, copy, copy_while};
use crate::plane::claim::fetches;
use crate::plane::transmit::{BATCH, BATCH_BYTES};
use crate::rseq::{Thread, Undone};
use crate::stats::Tally;
use crate::steps::{self, Step};
use ringfence_protocol::grants::Use;
use ringfence_protocol::verbs::{Opcode, QpState, SendFlags};
use ringfence_protocol::work::SendBase;
use ringfence_sched::scheduler::charged;
use ringfence_sched::{Allowance, Bytes, Ops};
use std::sync::atomic::Ordering;

impl Plane {
    /// The road inlined by grants: as [`Plane::express`], to a queue pair of a neighbour's, for all one-sided operations.
    pub(crate) fn express_by_grant(&mut self, queue: u32, at: LinkId, allowance: Allowance) -> usize {
        let Self { qps, regions, device: Soft { links, .. }, cqs, touched, shaping, notices, tally, now, .. } = self;
        let Some(qp) = qps[queue as usize].as_deref_mut() else { return 0 };
        if !qp.pending.is_empty() || qp.state != QpState::RTS {
            return 0;
        }
        let Some(Some(entry)) = cqs.get_mut(qp.send_cq.0) else { return 0 };
        let Some(Link { grants: Grants { ours: Some(ours), theirs: Some((theirs, _)), using, .. }, .. }) =
            links.get_mut(at)
        else {
            return 0;
        };
        let Some(thread) = Thread::current().filter(|_| !using.is_empty()) else { return 0 };
        let used = &ours.used.0;
        let most = allowance.ops.0.min(BATCH as u64) as usize;
        let (mut count, mut moved, mut paid, mut fetched, mut left) = (0, 0, Bytes(0), Bytes(0), 0);
        let mut row = Row::EMPTY;
        while count < most && moved < BATCH_BYTES {
            let Some(words) = qp.send.peek() else { break };
            let base = SendBase(words);
            let fields = base.fields();
            let head = base.inline_head();
            // A copy that a condition guards cannot be guarded against missing pages as well.
            let own = local(qp, regions, &fields, &head, allowance).filter(|(_, own)| !own.may_fault());
            let Some((bytes, own)) = own else { break };
            let Some(wanted) = Wanted::of(qp, fields.opcode, fields.rkey, fields.remote_addr, bytes) else { break };
            let Some((memory, condition, slot)) = wanted.find(using, theirs) else { break };
            let fetches = fetches(fields.opcode);
            let cost = charged(Bytes(bytes.into()));
            let due = if fetches { fetched } else { paid }.plus(cost);
            if due > (if fetches { allowance.fetched } else { allowance.out }) {
                break;
            }
            let leaves = if fetches { cost.0 } else { 0 };
            if leaves > 0 && !used.may_read(left + leaves, theirs.allowance.0.load(Ordering::Relaxed)) {
                break;
            }
            if count == 0 {
                used.busy.enter();
                steps::at(Step::Busy);
            }
            let done = match fields.opcode {
                Opcode::RDMA_WRITE => copy_while(memory, own, thread, condition),
                Opcode::RDMA_READ => copy_while(own, memory, thread, condition),
                _ if !memory.is_for_atomics() || !fields.remote_addr.is_multiple_of(8) => Err(Undone::Interrupted),
                _ => memory
                    .fetch_update_while(atomic(fields.opcode, fields.compare_add, fields.swap), thread, condition)
                    .map(|former| {
                        // The container's memory is there, or the piece would not have been taken.
                        let _ = copy(own, Piece::of_own(&former.to_ne_bytes()));
                    }),
            };
            if let Err(undone) = done {
                if count == 0 {
                    used.busy.leave();
                }
                if undone == Undone::Gone {
                    steps::at(Step::Gone);
                    using.remove(slot);
                }
                break;
            }
            steps::at(Step::Copied);
            if fetches {
                fetched = due;
            } else {
                paid = due;
            }
            left += leaves;
            if let Some(former) = row.add(fields.opcode, bytes) {
                count_row(&former, used, tally);
            }
            count += 1;
            moved += bytes;
            qp.send.advance(1);
            if (qp.sq_sig_all || fields.flags.contains(SendFlags::SIGNALED))
                && entry.push(&completion(qp, &fields, bytes), tally, notices)
            {
                touched.push(qp.send_cq);
            }
        }
        if count > 0 {
            used.busy.leave();
            steps::at(Step::Left);
            count_row(&row, used, tally);
            used.has_read(left);
            shaping.spend(paid, fetched, Ops(count as u64));
            if let Some(link) = links.get_mut(at) {
                link.tell_of_use(*now, left > 0, true);
            }
        }
        count
    }
}

#[inline(always)]
fn count_row(row: &Row, used: &Use, tally: &Tally) {
    used.count(row.opcode, row.operations, row.bytes);
    tally.sent_at_once(row.opcode, row.operations, row.bytes);
}
