//! The card's completions, on their way to the plane.

use super::Plane;
use super::receives::give_receives;
use crate::slots::{Posted, Token};
use ringfence_abi::ibv_wc;
use ringfence_protocol::verbs::{QpState, WcFlags, WcOpcode, WcStatus};
use ringfence_proxy::device::{Answer, WorkPiece};
use ringfence_proxy::plane::receive::Received;

/// A completion of the card's.
pub(super) fn completed(plane: &mut Plane, wc: &ibv_wc) {
    let status = WcStatus(wc.status.min(0xff) as u8);
    match plane.device.given.take(Token(wc.wr_id)) {
        Some(Posted::Send(piece)) => send_completed(plane, wc, status, &piece),
        Some(Posted::Receive { queue, incarnation }) => receive_completed(plane, wc, status, queue, incarnation),
        // Of a former life.
        None => {}
    }
}

fn send_completed(plane: &mut Plane, wc: &ibv_wc, status: WcStatus, piece: &WorkPiece) {
    if let Some(qp) = &mut plane.qps[piece.queue as usize]
        && qp.incarnation == piece.incarnation
    {
        let sends = &mut qp.device.sends;
        if let Some(at) = sends.iter().position(|token| token.0 == wc.wr_id) {
            sends.remove(at);
        }
    }
    plane.departed(piece, plane.now);
    let answer = match status {
        WcStatus::SUCCESS => Answer::Done,
        status => Answer::Failed { status, vendor_err: wc.vendor_err as u16 },
    };
    plane.answered(piece, answer);
}

fn receive_completed(plane: &mut Plane, wc: &ibv_wc, status: WcStatus, queue: u32, incarnation: u64) {
    let Some(qp) = &mut plane.qps[queue as usize] else { return };
    if qp.incarnation != incarnation {
        return;
    }
    let receives = &mut qp.device.receives;
    let Some(at) = receives.iter().position(|held| held.token == Some(Token(wc.wr_id))) else { return };
    qp.device.with_card -= 1;
    let in_error = qp.state == QpState::ERR;
    if status == WcStatus::WR_FLUSH_ERR {
        // It is flushed with everything else.
        receives[at].token = None;
        if in_error {
            plane.activate(queue)
        } else {
            plane.to_error(queue)
        }
        return;
    }
    let Some(held) = receives.remove(at) else { return };
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
    plane.received(queue, &held.receiving, &end);
    if status != WcStatus::SUCCESS {
        if in_error {
            plane.activate(queue)
        } else {
            plane.to_error(queue)
        }
        return;
    }
    if !in_error {
        give_receives(plane, queue);
    }
}
