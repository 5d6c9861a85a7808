//! Receive requests, on their way to the card.

// UNSAFETY: posts requests, whose lists lie on the stack meanwhile.
#![allow(unsafe_code)]

use super::{Held, NO_SGE, Plane, list};
use crate::slots::Posted;
use ringfence_abi::{ibv_recv_wr, ibv_sge};
use ringfence_protocol::verbs::{Access, QpState, WcOpcode, WcStatus};
use ringfence_protocol::work::MAX_SGE;
use ringfence_proxy::plane::intake::vendor;
use ringfence_proxy::plane::receive::Received;
use std::ptr::null_mut;

/// Gives the card the receive requests that the container has posted.
pub(super) fn give_receives(plane: &mut Plane, queue: u32) {
    let Some(Some(qp)) = plane.qps.get(queue as usize) else { return };
    let Some(card) = qp.device.card.clone() else { return };
    loop {
        let Some(qp) = &plane.qps[queue as usize] else { return };
        let takes = matches!(qp.state, QpState::INIT | QpState::RTR | QpState::RTS | QpState::SQD);
        if !takes || qp.device.bad.is_some() || qp.device.with_card >= card.receives {
            break;
        }
        let Some(taken) = plane.take_receive(queue) else { break };
        let Plane { qps, regions, device, .. } = plane;
        let Some(qp) = &mut qps[queue as usize] else { return };
        let receiving = match taken {
            Ok(receiving) => receiving,
            Err(receiving) => {
                qp.device.bad = Some((receiving, WcStatus::LOC_QP_OP_ERR, vendor::MALFORMED));
                break;
            }
        };
        let mut sges = [NO_SGE; MAX_SGE as usize];
        let data = receiving.data.sges();
        let count = match list(regions, qp.pd, data, 0, u32::MAX, Access::LOCAL_WRITE, &mut sges) {
            Ok(count) => count,
            // It fails when a message comes for it, which is for the card to find.
            Err(_) => {
                let (addr, lkey) = (device.out_of_reach.address(), device.out_of_reach.lkey());
                for (to, sge) in sges.iter_mut().zip(data) {
                    *to = ibv_sge { addr, length: sge.length, lkey };
                }
                data.len().min(sges.len())
            }
        };
        let token = device.given.note(Posted::Receive { queue, incarnation: qp.incarnation });
        let mut request =
            ibv_recv_wr { wr_id: token.0, next: null_mut(), sg_list: sges.as_mut_ptr(), num_sge: count as i32 };
        // SAFETY: `sges` has `count` entries that are filled.
        match unsafe { card.post_receive(&mut request) } {
            Ok(()) => {
                qp.device.receives.push_back(Held { receiving, token: Some(token) });
                qp.device.with_card += 1;
            }
            Err(_) => {
                device.given.take(token);
                qp.device.bad = Some((receiving, WcStatus::LOC_QP_OP_ERR, vendor::OPCODE));
                break;
            }
        }
    }
    fail_bad(plane, queue);
}

/// Fails a receive request that could not be given to the card, if it is the next to be used.
fn fail_bad(plane: &mut Plane, queue: u32) {
    let Some(qp) = &mut plane.qps[queue as usize] else { return };
    if !qp.device.receives.is_empty() || qp.state == QpState::ERR {
        return;
    }
    let Some((receiving, status, vendor_err)) = qp.device.bad.take() else { return };
    let end = Received { status, vendor_err, opcode: WcOpcode::RECV, bytes: 0, imm: None, solicited: true };
    plane.received(queue, &receiving, &end);
    plane.to_error(queue);
}
