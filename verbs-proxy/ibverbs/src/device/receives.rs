//! Receive requests, on their way to the card: all that there are, with one call.
//!
//! As long as the card has half of what the queue holds, the container need not ring: each completion of a receive request has its
//! queue looked at, and wakes the worker if it sleeps. A worker that was woken for each request that is posted anew would be in the way
//! of what the application does next, which is to answer.

// UNSAFETY: posts C structures with addresses of the lists beside them.
#![allow(unsafe_code)]

use super::lists::{link, not_taken};
use super::{Held, NO_SGE, Plane, list};
use crate::card::CardQp;
use crate::names::{Kind, Name};
use ringfence_abi::{ibv_recv_wr, ibv_sge};
use ringfence_protocol::verbs::{Access, QpState, WcOpcode, WcStatus};
use ringfence_protocol::work::MAX_SGE;
use ringfence_proxy::plane::claim::vendor;
use ringfence_proxy::plane::receive::Received;
use std::fmt::{self, Debug, Formatter};
use std::ptr::null_mut;

/// Requests that go together.
const MOST: usize = 32;
/// Fewer than these are given to the card at once, however short the queue.
const FEW: usize = 8;

/// Receive requests of one queue pair that were not posted yet, with room for [`MOST`].
pub(super) struct Receives {
    requests: Box<[ibv_recv_wr]>,
    count: usize,
    /// Of all requests, one behind the other.
    sges: Box<[ibv_sge]>,
    listed: usize,
}

impl Debug for Receives {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receives").field("count", &self.count).finish_non_exhaustive()
    }
}

impl Receives {
    pub(super) fn new() -> Self {
        let nothing = ibv_recv_wr { wr_id: 0, next: null_mut(), sg_list: null_mut(), num_sge: 0 };
        Self {
            requests: std::iter::repeat_n(nothing, MOST).collect(),
            count: 0,
            sges: vec![NO_SGE; MOST * MAX_SGE as usize].into(),
            listed: 0,
        }
    }

    fn list(&mut self) -> &mut [ibv_sge] {
        &mut self.sges[self.listed..][..MAX_SGE as usize]
    }

    /// Adds a request whose list of so many is in [`Self::list`]. There is room.
    fn add(&mut self, wr_id: u64, sges: usize) {
        let place = &mut self.requests[self.count];
        (place.wr_id, place.num_sge) = (wr_id, sges as i32);
        self.count += 1;
        self.listed += sges;
    }

    /// Posts what there is, and is empty. How many the card has not taken.
    fn post(&mut self, qp: &CardQp) -> usize {
        let count = std::mem::take(&mut self.count);
        self.listed = 0;
        if count == 0 {
            return 0;
        }
        let first = link(&mut self.requests[..count], &mut self.sges);
        // SAFETY: the requests are linked to each other as above, and their lists lie in `sges`, which does not move meanwhile.
        let Err((bad, _)) = (unsafe { qp.post_receive(first) }) else { return 0 };
        not_taken(first, bad, count)
    }
}

/// Gives the card the receive requests that the container has posted.
pub(super) fn give_receives(plane: &mut Plane, queue: u32) {
    loop {
        while give_some(plane, queue) {}
        if !must_look_again(plane, queue) {
            break;
        }
    }
    fail_bad(plane, queue);
}

/// Whether the card, which has so many receive requests of a queue of this length, can do without those that the container posts now
/// until one of them has been used.
fn is_enough(with_card: usize, room: usize) -> bool {
    with_card >= FEW && with_card >= room.div_ceil(2)
}

/// Decides whether the container is to ring for the next that it posts. True if it may have posted some that it has not rung for.
fn must_look_again(plane: &mut Plane, queue: u32) -> bool {
    let Some(Some(qp)) = plane.qps.get_mut(queue as usize) else { return false };
    let Some(card) = &qp.device.card else { return false };
    let unrung = takes(qp.state) && qp.device.bad.is_none() && is_enough(qp.device.with_card, card.receives);
    // The container reads that word for each request: it is written only if it changes.
    if std::mem::replace(&mut qp.device.unrung, unrung) == unrung {
        return false;
    }
    if unrung {
        qp.header.receive_bell.start_polling();
    } else {
        qp.header.receive_bell.stop_polling();
    }
    !unrung
}

fn takes(state: QpState) -> bool {
    matches!(state, QpState::INIT | QpState::RTR | QpState::RTS | QpState::SQD)
}

/// No more than [`MOST`] of them. True if there may be more.
fn give_some(plane: &mut Plane, queue: u32) -> bool {
    let mut more = false;
    for count in 0.. {
        let Some(Some(qp)) = plane.qps.get(queue as usize) else { return false };
        let Some(card) = &qp.device.card else { return false };
        if !takes(qp.state) || qp.device.bad.is_some() || qp.device.with_card >= card.receives {
            break;
        }
        if count == MOST {
            more = true;
            break;
        }
        let Some(taken) = plane.take_receive(queue) else { break };
        let Plane { qps, regions, device, .. } = plane;
        let Some(qp) = &mut qps[queue as usize] else { return false };
        let receiving = match taken {
            Ok(receiving) => receiving,
            Err(receiving) => {
                qp.device.bad = Some((WcStatus::LOC_QP_OP_ERR, vendor::MALFORMED));
                qp.device.receives.push_back(Held { receiving: Some(receiving), with_card: false });
                break;
            }
        };
        let data = receiving.data.sges();
        let Some(open) = &device.open else { return false };
        let (addr, lkey) = (open.out_of_reach.address(), open.out_of_reach.lkey().0);
        let into = device.receives.list();
        let sges = match list(regions, qp.pd, data, 0, u32::MAX, Access::LOCAL_WRITE, into) {
            Ok(count) => count,
            // It fails when a message comes for it, which is for the card to find.
            Err(_) => {
                for (to, sge) in into.iter_mut().zip(data) {
                    *to = ibv_sge { addr, length: sge.length, lkey };
                }
                data.len().min(into.len())
            }
        };
        let number = qp.device.first_receive.after(qp.device.receives.len());
        let name = Name { kind: Kind::Receive, queue, life: device.lives.now(queue), number };
        device.receives.add(name.wr_id(), sges);
        qp.device.receives.push_back(Held { receiving: Some(receiving), with_card: true });
        qp.device.with_card += 1;
        device.given += 1;
    }
    let Plane { qps, device, .. } = plane;
    let Some(qp) = &mut qps[queue as usize] else { return false };
    let Some(card) = &qp.device.card else { return false };
    let refused = device.receives.post(card);
    if refused > 0 {
        // Behind them is at most one that is not for the card either, and fails after them.
        let given = qp.device.receives.iter_mut().rev().filter(|held| held.with_card);
        given.take(refused).for_each(|held| held.with_card = false);
        qp.device.with_card -= refused;
        device.given -= refused;
        qp.device.bad = Some((WcStatus::LOC_QP_OP_ERR, vendor::OPCODE));
        return false;
    }
    more
}

/// Fails a receive request that could not be given to the card, if it is the next to be used.
fn fail_bad(plane: &mut Plane, queue: u32) {
    let Some(Some(qp)) = plane.qps.get_mut(queue as usize) else { return };
    if qp.device.with_card > 0 || qp.state == QpState::ERR {
        return;
    }
    let Some((status, vendor_err)) = qp.device.bad.take() else { return };
    let Some(receiving) = qp.device.next_receive() else { return };
    let end = Received { status, vendor_err, opcode: WcOpcode::RECV, bytes: 0, imm: None, solicited: true };
    plane.received(queue, &receiving, &end);
    plane.to_error(queue);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_are_needed_until_the_card_has_half_of_the_queue() {
        assert!(is_enough(256, 512) && !is_enough(255, 512));
        assert!(is_enough(512, 512));
        // Of an odd number, more than half.
        assert!(is_enough(9, 17) && !is_enough(8, 17));
    }

    #[test]
    fn a_card_with_few_is_given_each_at_once() {
        assert!((0..FEW).all(|with_card| !is_enough(with_card, with_card)));
        assert!(is_enough(FEW, FEW));
    }
}
