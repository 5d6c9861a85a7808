//! The card's completions, on their way to the plane.

use super::Plane;
use super::receives::give_receives;
use crate::names::{Kind, Name, Number};
use ringfence_abi::ibv_wc;
use ringfence_protocol::verbs::{QpState, WcFlags, WcOpcode, WcStatus};
use ringfence_proxy::device::{Answer, WorkPiece};
use ringfence_proxy::plane::receive::Received;

/// A completion of the card's.
pub(super) fn completed(plane: &mut Plane, wc: &ibv_wc) {
    let Name { kind, queue, life, number } = Name::of(wc.wr_id);
    // Of a former life.
    if plane.device.lives.now(queue) != life {
        return;
    }
    let status = WcStatus(wc.status.min(0xff) as u8);
    match kind {
        Kind::Send => send_completed(plane, wc, status, queue, number),
        Kind::Receive => receive_completed(plane, wc, status, queue, number),
    }
}

/// All before it that are not signaled have been carried out: a request that fails says so by itself.
fn send_completed(plane: &mut Plane, wc: &ibv_wc, status: WcStatus, queue: u32, number: Number) {
    let Some(Some(qp)) = plane.qps.get(queue as usize) else { return };
    let before = number.since(qp.device.first_send);
    if before >= qp.device.sends.len() {
        return;
    }
    let done = if status == WcStatus::SUCCESS { before + 1 } else { before };
    // With it all before it are.
    if let Some(piece) = leave(plane, queue, done)
        && let Some(index) = plane.index_of(&piece)
    {
        plane.done_up_to(queue, index, piece.offset + piece.bytes);
    }
    if status != WcStatus::SUCCESS
        && let Some(piece) = leave(plane, queue, 1)
    {
        plane.answered(&piece, Answer::Failed { status, vendor_err: wc.vendor_err as u16 });
    }
    // What waited for that goes on: behind a fence, for room among READs or on the card, or to be flushed when the card has nothing
    // of its queue pair any more.
    plane.activate(queue);
}

/// The card has so many of the oldest pieces no more. The last of them; whoever calls this activates the queue.
fn leave(plane: &mut Plane, queue: u32, count: usize) -> Option<WorkPiece> {
    let Plane { qps, device, shaping, now, .. } = plane;
    let qp = qps[queue as usize].as_mut()?;
    let mut last = None;
    for sent in qp.device.sends.drain(..count) {
        device.load.left(&sent);
        shaping.departed(&sent.piece, *now);
        last = Some(sent.piece);
    }
    qp.device.first_send = qp.device.first_send.after(count);
    qp.in_flight = qp.in_flight.saturating_sub(count as u32);
    device.given -= count;
    last
}

fn receive_completed(plane: &mut Plane, wc: &ibv_wc, status: WcStatus, queue: u32, number: Number) {
    let Some(Some(qp)) = plane.qps.get_mut(queue as usize) else { return };
    let at = number.since(qp.device.first_receive);
    let Some(held) = qp.device.receives.get_mut(at).filter(|held| held.with_card) else { return };
    held.with_card = false;
    let in_error = qp.state == QpState::ERR;
    // Flushed with everything else, it stays where it is until then.
    let used = if status == WcStatus::WR_FLUSH_ERR { None } else { held.receiving.take() };
    qp.device.with_card -= 1;
    plane.device.given -= 1;
    if let Some(receiving) = used {
        while qp.device.receives.pop_front_if(|held| held.receiving.is_none()).is_some() {
            qp.device.first_receive = qp.device.first_receive.after(1);
        }
        let flags = WcFlags(wc.wc_flags as u8);
        let with_imm = wc.opcode == u32::from(WcOpcode::RECV_RDMA_WITH_IMM.0);
        let end = Received {
            status,
            vendor_err: wc.vendor_err as u16,
            opcode: if with_imm { WcOpcode::RECV_RDMA_WITH_IMM } else { WcOpcode::RECV },
            bytes: wc.byte_len,
            imm: flags.contains(WcFlags::WITH_IMM).then_some(wc.imm_data),
            // A card does not say whether the sender asked for it.
            solicited: true,
        };
        plane.received(queue, &receiving, &end);
    }
    match (status, in_error) {
        (WcStatus::SUCCESS, false) => give_receives(plane, queue),
        (_, true) => plane.activate(queue),
        (_, false) => plane.to_error(queue),
    }
}
