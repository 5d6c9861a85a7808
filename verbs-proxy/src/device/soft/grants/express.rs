//! The short way by grants, for the commonest requests: as many as there are, while nothing of their queue pair is under way.

use super::Grants;
use super::using::{Wanted, atomic};
use crate::device::soft::express::EXPRESS_BYTES;
use crate::device::soft::link::Link;
use crate::device::soft::links::LinkId;
use crate::device::soft::{Plane, Qp, Soft};
use crate::memory::{Piece, RegionTable, copy, copy_while};
use crate::plane::intake::wc_opcode;
use crate::plane::transmit::{BATCH, BATCH_BYTES};
use crate::rseq::{Thread, Undone};
use crate::stats::Tally;
use ringfence_protocol::completion::Completion;
use ringfence_protocol::grants::Use;
use ringfence_protocol::verbs::{Access, Opcode, QpState, SendFlags, WcStatus};
use ringfence_protocol::work::{self, SendBase, SendFields};
use ringfence_sched::scheduler::charged;
use ringfence_sched::{Allowance, Bytes, Ops};
use std::sync::atomic::Ordering;

impl Plane {
    /// The short way by grants: as [`Plane::express`], to a queue pair of a neighbour's, for all one-sided operations.
    pub(crate) fn express_by_grant(&mut self, queue: u32, at: LinkId, allowance: Allowance) -> usize {
        let Self { qps, regions, device: Soft { links, .. }, cqs, touched, shaping, notices, tally, now, .. } = self;
        let Some(qp) = qps[queue as usize].as_deref_mut() else { return 0 };
        if !qp.pending.is_empty() || qp.state != QpState::RTS {
            return 0;
        }
        let Some(Some(entry)) = cqs.get_mut(qp.send_cq) else { return 0 };
        let Some(Link { grants: Grants { ours: Some(ours), theirs: Some((theirs, _)), using, .. }, .. }) =
            links.get_mut(at)
        else {
            return 0;
        };
        let Some(thread) = Thread::current().filter(|_| !using.is_empty()) else { return 0 };
        let used = &ours.used.0;
        let most = allowance.ops.0.min(BATCH as u64) as usize;
        let (mut count, mut moved, mut paid, mut fetched, mut left) = (0, 0, Bytes(0), Bytes(0), 0);
        let mut row = Row { opcode: Opcode::RDMA_WRITE, operations: 0, bytes: 0 };
        while count < most && moved < BATCH_BYTES {
            let Some(words) = qp.send.peek() else { break };
            let base = SendBase(words);
            let fields = base.fields();
            let head = base.inline_head();
            let Some((bytes, own)) = local(qp, regions, &fields, &head, allowance) else { break };
            let Some(wanted) = Wanted::of(qp, fields.opcode, fields.rkey, fields.remote_addr, bytes) else { break };
            let Some((memory, condition, slot)) = wanted.find(using, theirs) else { break };
            let fetches = fields.opcode != Opcode::RDMA_WRITE;
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
                    using.remove(slot);
                }
                break;
            }
            if fetches {
                fetched = due;
            } else {
                paid = due;
            }
            left += leaves;
            if row.opcode != fields.opcode {
                row.count(used, tally);
                row = Row { opcode: fields.opcode, operations: 0, bytes: 0 };
            }
            row.operations += 1;
            row.bytes += u64::from(bytes);
            count += 1;
            moved += bytes;
            qp.send.advance(1);
            if qp.sq_sig_all || fields.flags.contains(SendFlags::SIGNALED) {
                let completion = Completion {
                    wr_id: fields.wr_id,
                    status: WcStatus::SUCCESS,
                    opcode: wc_opcode(fields.opcode),
                    byte_len: if fetches { bytes } else { 0 },
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
        if count > 0 {
            used.busy.leave();
            row.count(used, tally);
            used.has_read(left);
            shaping.spend(paid, fetched, Ops(count as u64));
            if let Some(link) = links.get_mut(at) {
                link.tell_of_use(*now, left > 0, true);
            }
        }
        count
    }
}

/// Requests of one opcode that came one after the other: they are counted together.
struct Row {
    opcode: Opcode,
    operations: u64,
    bytes: u64,
}

impl Row {
    #[inline(always)]
    fn count(&self, used: &Use, tally: &Tally) {
        used.count(self.opcode, self.operations, self.bytes);
        tally.sent_at_once(self.opcode, self.operations, self.bytes);
    }
}

/// The container's side of a request that goes the short way, and its bytes.
#[inline(always)]
fn local<'a>(
    qp: &Qp,
    regions: &'a RegionTable,
    fields: &SendFields,
    head: &'a [u64; 4],
    allowance: Allowance,
) -> Option<(u32, Piece<'a>)> {
    let fetches = fields.opcode != Opcode::RDMA_WRITE;
    if fields.flags.contains(SendFlags::INLINE) {
        let bytes = u32::from(fields.inline_bytes);
        let short = bytes > 0 && bytes <= work::BASE_INLINE.min(qp.caps.max_inline) && !fetches;
        return short.then(|| (bytes, Piece::of_own(zerocopy::IntoBytes::as_bytes(head)).slice(0, bytes as usize)));
    }
    let bytes = fields.sge.length;
    let most = allowance.longest.0.min(u64::from(EXPRESS_BYTES)) as u32;
    if fields.sges != 1 || bytes == 0 || bytes > most || qp.caps.max_send_sge == 0 {
        return None;
    }
    if fetches && (qp.attr.max_rd_atomic == 0 || (fields.opcode != Opcode::RDMA_READ && bytes != 8)) {
        return None;
    }
    let access = if fetches { Access::LOCAL_WRITE } else { Access(0) };
    let piece = regions.admit(fields.sge.lkey, qp.pd, fields.sge.addr, bytes.into(), access).ok()?;
    (!piece.may_fault()).then_some((bytes, piece))
}
