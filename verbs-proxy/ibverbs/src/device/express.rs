//! The road inlined for small requests to the card.

use super::batch::Request;
use super::{LONGEST, Plane, Sent, list};
use crate::names::{Kind, Name};
use ringfence_abi::{rdma, target};
use ringfence_protocol::verbs::{Access, Opcode, QpState, SendFlags};
use ringfence_protocol::work::{self, SendBase};
use ringfence_proxy::device::WorkPiece;
use ringfence_proxy::plane::claim::Claim;
use ringfence_proxy::plane::qp::{Data, Inline, Wqe};
use ringfence_proxy::plane::transmit::{BATCH, BATCH_BYTES, PIPELINE};
use ringfence_sched::scheduler::charged;
use ringfence_sched::{Allowance, Bytes, Ops};

/// The road of a request that fits into one slot and one piece, inlined for as many as there are in a row: claim, admit, schedule,
/// post. How many went.
///
/// It is among the plane's requests afterwards as any other is, so what becomes of it there (completed, refused by the card, flushed,
/// forgotten) is the same. What is asked and counted on the way is asked and counted here, once for all of them where that makes no
/// difference:
///
/// | step | there | here |
/// |---|---|---|
/// | claim | `claim_send`, `Plane::claim_next` | `Claim::of`, the same bounds |
/// | admit | `Qp::admit` | the same |
/// | hold back | `fence`, `Ibverbs::holds_back` | the same conditions |
/// | schedule | `Scheduler::ask` | `allowance`, what may go unasked; `Scheduler::spend` |
/// | post | `Ibverbs::post` | the same, without what such a request cannot have |
///
/// The allowance is asked before `Qp::admit`, so that what it does not cover stays in the ring: what is not admitted takes nothing of
/// it.
///
/// Whatever is unusual is left for the road itself, in the ring or as the next of the requests that were claimed.
/// A test compares the two over random programs (`device/ways.rs`).
#[inline(always)]
pub(super) fn express(plane: &mut Plane, queue: u32, allowance: Allowance) -> usize {
    let Plane { qps, regions, device, shaping, tally, now, .. } = plane;
    let Some(qp) = &mut qps[queue as usize] else { return 0 };
    let qp = &mut **qp;
    let Some(room) = qp.device.card.as_ref().map(|card| card.sends) else { return 0 };
    if qp.state != QpState::RTS
        || qp.next != qp.pending.len()
        || qp.probing
        || qp.waits.device
        || qp.waits.until > *now
        || !device.refused.is_empty()
        || (!device.batch.is_empty() && device.batch.queue != queue)
    {
        return 0;
    }
    let most = allowance.ops.0.min(BATCH as u64) as usize;
    let longest = allowance.longest.0.min(LONGEST.into()) as u32;
    let held = PIPELINE.min(qp.caps.max_send_wr as usize);
    let life = device.lives.now(queue);
    let (incarnation, epoch) = (qp.incarnation, qp.epochs.now());
    let (mut count, mut moved, mut paid) = (0, 0, Bytes(0));
    device.batch.queue = queue;
    while count < most && moved < BATCH_BYTES && qp.pending.len() < held && qp.device.sends.len() < room {
        let Some(words) = qp.send.peek() else { break };
        let base = SendBase(words);
        let fields = base.fields();
        let flags = fields.flags;
        let goes = matches!(
            fields.opcode,
            Opcode::RDMA_WRITE | Opcode::RDMA_WRITE_WITH_IMM | Opcode::SEND | Opcode::SEND_WITH_IMM
        );
        if !goes || (flags.contains(SendFlags::FENCE) && qp.fetching > 0) || device.batch.is_full() {
            break;
        }
        let is_inline = flags.contains(SendFlags::INLINE);
        let bytes = if is_inline { u32::from(fields.inline_bytes) } else { fields.sge.length };
        let fits = match is_inline {
            true => bytes <= work::BASE_INLINE.min(qp.caps.max_inline),
            false => fields.sges == 1 && bytes <= longest && qp.caps.max_send_sge > 0,
        };
        if !fits || bytes == 0 || shaping.piece(bytes, bytes) != bytes {
            break;
        }
        if device.load.is_full(false, || shaping.is_urgent(0)) && !shaping.is_urgent(bytes) {
            break;
        }
        let due = paid.plus(charged(Bytes(bytes.into())));
        if due > allowance.out {
            break;
        }
        qp.send.look_ahead();
        qp.send.advance(1);
        let (index, sequence) = (qp.pending.len(), qp.sequence);
        let data = match is_inline {
            true => Data::Inline(Inline::Short(base.inline_head(), bytes as u8)),
            false => Data::One(fields.sge),
        };
        let claim = Claim::of(qp, &fields, bytes, data, qp.send.position());
        qp.pending.push_back(Wqe::new(claim, sequence));
        qp.sequence = sequence.wrapping_add(1);
        if qp.admit(index, regions).is_err() {
            break;
        }
        let wqe = &mut qp.pending[index];
        let mut sent_as = if wqe.solicited { SendFlags::SOLICITED } else { SendFlags(0) };
        let sges = match &wqe.data {
            Data::Inline(inline) => {
                sent_as = sent_as | SendFlags::INLINE;
                device.batch.list_inline(inline)
            }
            data => match list(regions, qp.pd, data.sges(), 0, bytes, Access(0), device.batch.list()) {
                Ok(sges) => sges,
                Err(_) => break,
            },
        };
        let number = qp.device.first_send.after(qp.device.sends.len());
        device.batch.add(&Request {
            wr_id: Name { kind: Kind::Send, queue, life, number }.wr_id(),
            sges,
            opcode: u32::from(fields.opcode.0),
            flags: sent_as,
            imm_data: fields.imm,
            to: target { rdma: rdma { remote_addr: fields.remote_addr, rkey: fields.rkey } },
            bytes,
            awaited: wqe.signaled,
            may_be_refused: false,
            room,
        });
        if let Some(delay) = wqe.release(*now) {
            tally.waited(delay);
        }
        (wqe.sent, wqe.sent_all) = (bytes, true);
        let piece = WorkPiece { queue, incarnation, epoch, sequence, offset: 0, bytes, total: bytes };
        let sent = Sent { piece, fetches: false };
        device.load.joined(&sent);
        qp.device.sends.push_back(sent);
        qp.next += 1;
        (count, moved, paid) = (count + 1, moved + bytes, due);
    }
    device.given += count;
    qp.in_flight += count as u32;
    shaping.spend(paid, Bytes(0), Ops(count as u64));
    count
}
