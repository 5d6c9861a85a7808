//! How much the card has of one container's, at most.
//!
//! What the card has is out of the scheduler's hands: an urgent request waits for all of it, and so does what is sent when the policy
//! has changed. So the card has no more than keeps the link busy, and a piece: what the link carries in [`CALM`], which is
//! longer than an answer takes in the networks that such cards are used in, or in [`ABOUT`] if the container's class is `latency`.
//! Urgent requests themselves wait for nothing here.

use super::Sent;
use ringfence_abi::ibv_port_attr;
use ringfence_sched::window::{ABOUT, CALM};
use ringfence_sched::{BitRate, Nanos};
use std::collections::VecDeque;

/// So much whatever the link: a few pieces, without which a card waits for the proxy, and a link that says nothing of its rate.
const LEAST: u64 = 256 << 10;

/// What the card has, and who waits for room.
#[derive(Debug)]
pub(super) struct Load {
    calm: u64,
    about: u64,
    /// Bytes of the container's that leave.
    out: u64,
    /// Bytes that it fetches, which are on the link in the other direction.
    fetched: u64,
    /// Queue pairs that wait.
    waiting: VecDeque<u32>,
}

/// Bits per second of a port.
fn rate(port: &ibv_port_attr) -> Option<BitRate> {
    let lanes = match port.active_width {
        1 => 1,
        2 => 4,
        4 => 8,
        8 => 12,
        16 => 2,
        _ => return None,
    };
    // Megabits per second: SDR, DDR, QDR, FDR10, FDR, EDR, HDR, NDR. What comes later is faster than any limit here.
    let lane = match port.active_speed {
        1 => 2_500,
        2 => 5_000,
        4 | 8 => 10_000,
        16 => 14_000,
        32 => 25_000,
        64 => 50_000,
        128 => 100_000,
        _ => 200_000,
    };
    BitRate::new(lanes * lane * 1_000_000)
}

impl Load {
    /// Of a card with this port.
    pub(super) fn of(port: &ibv_port_attr) -> Self {
        let (calm, about) = Self::limits(port);
        Self { calm, about, out: 0, fetched: 0, waiting: VecDeque::new() }
    }

    /// The port's rate has changed.
    pub(super) fn port_changed(&mut self, port: &ibv_port_attr) {
        (self.calm, self.about) = Self::limits(port);
    }

    fn limits(port: &ibv_port_attr) -> (u64, u64) {
        let bytes = |time: Nanos| rate(port).map_or(LEAST, |rate| rate.bytes_in(time).0.max(LEAST));
        (bytes(CALM), bytes(ABOUT))
    }

    /// Whether nothing more is to be posted that is not urgent. `latency`: whether that is the container's class.
    #[inline]
    pub(super) fn is_full(&self, fetches: bool, latency: impl FnOnce() -> bool) -> bool {
        let there = if fetches { self.fetched } else { self.out };
        there >= self.about && (there >= self.calm || latency())
    }

    #[inline]
    pub(super) fn joined(&mut self, sent: &Sent) {
        *self.of_kind(sent) += u64::from(sent.piece.bytes);
    }

    #[inline]
    pub(super) fn left(&mut self, sent: &Sent) {
        let there = self.of_kind(sent);
        *there = there.saturating_sub(u64::from(sent.piece.bytes));
    }

    fn of_kind(&mut self, sent: &Sent) -> &mut u64 {
        if sent.fetches { &mut self.fetched } else { &mut self.out }
    }

    /// This queue pair is to go on when there is room.
    pub(super) fn wait(&mut self, queue: u32) {
        self.waiting.push_back(queue);
    }

    /// This queue pair waits for nothing any more.
    pub(super) fn forget(&mut self, queue: u32) {
        self.waiting.retain(|waiting| *waiting != queue);
    }

    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// One that waited, if there is room for either kind: who waits for the other will wait again.
    pub(super) fn next_waiting(&mut self) -> Option<u32> {
        if self.out.min(self.fetched) >= self.calm {
            return None;
        }
        self.waiting.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_proxy::device::WorkPiece;

    fn port(width: u8, speed: u8) -> ibv_port_attr {
        // SAFETY: plain data.
        #[allow(unsafe_code)]
        let port: ibv_port_attr = unsafe { std::mem::zeroed() };
        ibv_port_attr { active_width: width, active_speed: speed, ..port }
    }

    fn sent(bytes: u32, fetches: bool) -> Sent {
        let piece = WorkPiece { queue: 0, incarnation: 0, epoch: 0, sequence: 0, offset: 0, bytes, total: bytes };
        Sent { piece, fetches }
    }

    #[test]
    fn a_card_has_what_its_link_carries_in_a_moment_each_way() {
        // 100 Gbit/s: 1.25 MB in 100 µs, 250 KB in 20.
        let mut load = Load::of(&port(2, 32));
        (0..5).for_each(|_| load.joined(&sent(249_000, false)));
        assert!(!load.is_full(false, || false) && load.is_full(false, || true));
        load.joined(&sent(6000, false));
        assert!(load.is_full(false, || false) && !load.is_full(true, || true));
        load.left(&sent(6000, false));
        assert!(!load.is_full(false, || false));
    }

    #[test]
    fn a_slow_link_has_a_few_pieces_nevertheless() {
        for port in [port(1, 1), port(0, 0)] {
            let mut load = Load::of(&port);
            load.joined(&sent(200_000, true));
            assert!(!load.is_full(true, || true));
            load.joined(&sent(100_000, true));
            assert!(load.is_full(true, || false));
        }
    }

    #[test]
    fn who_waits_is_named_once_and_when_there_is_room() {
        let mut load = Load::of(&port(1, 1));
        load.joined(&sent(300_000, true));
        load.joined(&sent(300_000, false));
        load.wait(3);
        assert_eq!(load.next_waiting(), None);
        load.left(&sent(300_000, false));
        load.wait(4);
        load.forget(3);
        assert_eq!([load.next_waiting(), load.next_waiting()], [Some(4), None]);
    }
}
