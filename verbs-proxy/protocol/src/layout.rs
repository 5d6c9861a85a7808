//! Where things lie in the memory files that the proxy makes, seals and passes to the container.

use crate::doorbell::{Line, QueueBell};
use crate::ring::SLOT_BYTES;
use crate::sync::{AtomicU32, Ordering, fence};

/// Offset of the key words ([`crate::keys::KeyWord`]) in the file of the doorbells, which lie before them.
pub const KEYS_OFFSET: usize = 4096;

/// Bytes of that file, where the proxy's table of regions has so many places.
#[must_use]
pub fn bells_bytes(places: u32) -> usize {
    KEYS_OFFSET + places as usize * size_of::<u64>()
}

/// Offset of the first ring in a queue pair's or completion queue's file; headers lie before it.
pub const RINGS_OFFSET: usize = 4096;

/// Head of a queue pair's file. The send ring follows at [`RINGS_OFFSET`], the receive ring right behind it.
#[repr(C)]
#[derive(Debug, Default)]
pub struct QpHeader {
    /// Whether a post to the send ring must ring the doorbell.
    pub send_bell: QueueBell,
    /// Whether a post to the receive ring must ring the doorbell: when a sender waits for a receive request, and when
    /// the queue pair is in the error state, where every request posted is flushed.
    pub receive_bell: QueueBell,
}

/// Bytes of a queue pair's file.
#[must_use]
pub fn qp_bytes(send_slots: u32, receive_slots: u32) -> usize {
    RINGS_OFFSET + (send_slots as usize + receive_slots as usize) * SLOT_BYTES
}

/// Bytes of a completion queue's file.
#[must_use]
pub fn cq_bytes(slots: u32) -> usize {
    RINGS_OFFSET + slots as usize * SLOT_BYTES
}

/// Head of a completion queue's file. The ring follows at [`RINGS_OFFSET`]; the proxy produces, the container consumes.
#[repr(C)]
#[derive(Debug, Default)]
pub struct CqHeader {
    consumed: Line<AtomicU32>,
    armed: Line<AtomicU32>,
}

/// What `ibv_req_notify_cq` asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arm {
    /// An event for the next completion.
    Any,
    /// An event for the next solicited receive completion or error.
    Solicited,
}

impl CqHeader {
    /// Container: completions before `position` have been polled.
    #[inline(always)]
    pub fn set_consumed(&self, position: u32) {
        // Release: the slots' words were read before the producer may overwrite them.
        self.consumed.0.store(position, Ordering::Release);
    }

    /// Proxy: what the container says that it polled; a claim.
    #[inline(always)]
    #[must_use]
    pub fn consumed(&self) -> u32 {
        self.consumed.0.load(Ordering::Acquire)
    }

    /// Container: asks for one event. Poll once more afterwards, as the man page of `ibv_req_notify_cq` says.
    pub fn arm(&self, arm: Arm) {
        let value = match arm {
            Arm::Any => 1,
            Arm::Solicited => 2,
        };
        // Asking for solicited events must not weaken an earlier demand for any.
        self.armed.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| (old != 1).then_some(value)).ok();
        // SYNC POINT arm: this store, the fence, the caller's next poll; against `disarm`.
        fence(Ordering::SeqCst);
    }

    /// Proxy: after writing completions, whether an event is due; if so, the demand is taken back.
    /// `solicited`: one of them was solicited or an error.
    #[must_use]
    pub fn disarm(&self, solicited: bool) -> bool {
        // SYNC POINT arm: the completion's store, this fence, the load; against `arm`.
        fence(Ordering::SeqCst);
        let armed = self.armed.0.load(Ordering::Relaxed);
        if armed == 0 || (armed == 2 && !solicited) {
            return false;
        }
        self.armed.0.compare_exchange(armed, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}
