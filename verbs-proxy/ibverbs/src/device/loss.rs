//! A card that goes, and one that comes.
//!
//! What the card had of a queue pair will not come back: the plane takes it to the error state, and flushes when the control thread has
//! closed the card ([`forgotten`]), because what reaches the container's memory may not be told finished. From then on the queue pair is
//! one without a card, for good.

use super::{Open, Plane, no_completions};
use crate::device::BATCH;
use crate::device::load::Load;
use ringfence_abi::ibv_port_attr;
use ringfence_protocol::verbs::{QpState, WcStatus};

/// How far the loss of a queue pair has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// The card may still reach memory for it.
    Closing,
    /// The card is closed.
    Closed,
}

/// Lets go of the card and of everything that has been made on it: the worker calls nothing of it when this returns.
pub fn lose(plane: &mut Plane) {
    let queues: Vec<u32> = plane.qps.iter().flatten().map(|qp| qp.queue).collect();
    for queue in queues {
        let Some(qp) = &mut plane.qps[queue as usize] else { continue };
        if qp.device.lost.is_some() {
            continue;
        }
        let mut state = std::mem::take(&mut qp.device);
        let receives = std::mem::take(&mut state.receives);
        let with_card = std::mem::take(&mut state.with_card);
        plane.device.given -= with_card;
        let pieces = plane.device.forget(queue, &mut state);
        pieces.iter().for_each(|piece| plane.departed(piece, plane.now));
        let Some(qp) = &mut plane.qps[queue as usize] else { continue };
        // They are flushed in their order.
        qp.device.receives = receives;
        qp.device.receives.iter_mut().for_each(|held| held.with_card = false);
        qp.device.lost = Some(Lost::Closing);
        let number = qp.number;
        // Another queue pair may get the number from the next card.
        plane.by_number.remove(&number);
        if matches!(plane.qps[queue as usize].as_ref().map(|qp| qp.state), Some(QpState::RESET | QpState::ERR)) {
            continue;
        }
        if !pieces.is_empty() {
            plane.fail(queue, WcStatus::FATAL_ERR, 0);
        }
        if plane.qps[queue as usize].as_ref().is_some_and(|qp| qp.state != QpState::ERR) {
            plane.to_error(queue);
        }
    }
    let device = &mut plane.device;
    device.queues.clear();
    device.rung.clear();
    device.found.get_mut().clear();
    device.polled = no_completions(BATCH);
    device.open = None;
    device.before += 1;
}

/// The card is closed, and reaches nothing any more: what it had is flushed now.
pub fn forgotten(plane: &mut Plane) {
    let queues: Vec<u32> = plane.qps.iter().flatten().map(|qp| qp.queue).collect();
    for queue in queues {
        if let Some(qp) = &mut plane.qps[queue as usize]
            && qp.device.lost.is_some()
        {
            qp.device.lost = Some(Lost::Closed);
            plane.activate(queue);
        }
    }
}

/// Goes on with this card.
pub fn renew(plane: &mut Plane, open: Open, port: &ibv_port_attr) {
    plane.device.open = Some(open);
    plane.device.load = Load::of(port);
}

/// The port may have another rate now.
pub fn resized(plane: &mut Plane, port: &ibv_port_attr) {
    plane.device.load.port_changed(port);
}

/// Whether the card is gone that a queue pair was made on.
#[must_use]
pub fn is_lost(plane: &Plane, queue: u32) -> bool {
    plane.qps.get(queue as usize).and_then(Option::as_ref).is_some_and(|qp| qp.device.lost.is_some())
}

/// Whether the present card is the one after so many.
#[must_use]
pub fn is_after(plane: &Plane, before: u32) -> bool {
    plane.device.before == before
}
