//! The device itself. What it does with a piece is drawn from a seed.

use crate::device::{Again, Answer, Cut, Device, Posted, WorkPiece};
use crate::pacing::Nanos;
use crate::plane;
use ringfence_protocol::verbs::{Opcode, WcStatus};
use ringfence_sched::{BitRate, HEADERS, LinkNow, Nanos as Time};
use std::collections::HashMap;

type Plane = plane::Plane<OutOfStep>;
type Qp = plane::qp::Qp<OutOfStep>;
type Wqe = plane::qp::Wqe<OutOfStep>;

/// The longest piece that it takes of what it takes in pieces.
const LONGEST: u32 = 20_000;

/// What a piece is charged to a rate.
pub(super) fn charged(bytes: u32) -> u64 {
    u64::from(bytes).max(HEADERS.0)
}

#[derive(Clone, Copy, Debug)]
struct Held {
    piece: WorkPiece,
    wr_id: u64,
    fetches: bool,
    /// It is counted as in flight, until this time.
    departs: Option<Nanos>,
    ready: Nanos,
    answer: Answer,
}

/// What it keeps of a queue pair.
#[derive(Debug, Default)]
pub(super) struct Slot {
    /// Pieces of this incarnation that it has, void ones too.
    held: u32,
}

/// The device.
#[derive(Debug, Default)]
pub(super) struct OutOfStep {
    link: Option<BitRate>,
    /// The link takes one piece of each queue pair.
    by_queue: bool,
    random: u64,
    /// In the order in which they were posted.
    held: Vec<Held>,
    /// Queue pairs that wait for its word.
    refused: Vec<u32>,
    /// Bytes of each request that were executed since it began last, in order and without a gap.
    done: HashMap<(u32, u64), u32>,
    /// By bell number and identifier, the bytes of each request: the test's.
    pub(super) ids: HashMap<(u32, u64), u32>,
    /// Bytes of all pieces that it was given.
    pub(super) posted: Vec<u32>,
    /// It takes everything and answers nothing.
    pub(super) patient: bool,
    /// Nothing fails or is lost.
    pub(super) reliable: bool,
}

impl OutOfStep {
    pub(super) fn new(link: Option<BitRate>, by_queue: bool, seed: u64) -> Self {
        Self { link, by_queue, random: seed | 1, ..Self::default() }
    }

    /// One of `many`.
    fn draw(&mut self, many: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % many
    }

    /// Whether the scheduler counts bytes on the link.
    pub(super) fn shared_link(&self) -> bool {
        self.link.is_some() && !self.by_queue
    }

    /// Bytes that have not departed, as a link is charged.
    pub(super) fn in_flight(&self) -> u64 {
        let flying = self.held.iter().filter(|held| held.departs.is_some());
        flying.map(|held| u64::from(held.piece.bytes) + HEADERS.0).sum()
    }

    pub(super) fn held_of(&self, queue: u32) -> usize {
        self.held.iter().filter(|held| held.piece.queue == queue).count()
    }

    /// Pieces that it has of a queue pair as it is now.
    pub(super) fn held_by(&self, qp: &Qp) -> u32 {
        qp.device.held
    }

    /// Bytes of a request that have been executed; nothing if it never was.
    pub(super) fn executed(&self, queue: u32, wr_id: u64) -> Option<u32> {
        self.done.get(&(queue, wr_id)).copied()
    }

    fn execute(&mut self, piece: &WorkPiece, wr_id: u64) {
        let done = self.done.entry((piece.queue, wr_id)).or_default();
        assert_eq!(*done, piece.offset, "{piece:?} is executed out of order, or twice");
        *done += piece.bytes;
    }

    /// How a piece will be answered. Of some requests nothing counts before all is done, so that they may begin anew.
    fn answer(&mut self, piece: &WorkPiece, opcode: Opcode, now: Nanos) -> Answer {
        let provisional = piece.sequence.is_multiple_of(4);
        let last = piece.offset + piece.bytes == piece.total;
        match self.draw(40) {
            0 | 3 if self.reliable => Answer::Done,
            0 => Answer::Failed { status: WcStatus::REM_ACCESS_ERR, vendor_err: 3 },
            1 | 2 if opcode == Opcode::SEND => Answer::NotReady { pause: 10_000 },
            3 => Answer::Lost { least: 1_000_000 },
            4..=6 => Answer::Again(Again::At(now + self.draw(50_000))),
            7 => Answer::Again(Again::Later { first: 1_000, longest: 8_000 }),
            8 | 9 => Answer::Again(Again::Told { least: 100_000_000 }),
            10..=12 if provisional => Answer::Again(Again::Anew),
            _ if provisional && !last => Answer::Provisional,
            _ => Answer::Done,
        }
    }

    /// What the answer means for the device: it has done the piece, or has not.
    fn note(&mut self, piece: &WorkPiece, wr_id: u64, answer: Answer) {
        match answer {
            Answer::Done | Answer::Provisional => self.execute(piece, wr_id),
            Answer::Again(Again::Anew) => drop(self.done.remove(&(piece.queue, wr_id))),
            Answer::Again(Again::Told { .. }) => self.refused.push(piece.queue),
            _ => {}
        }
    }

    /// The next piece that is ready: in any order, but for those of one queue pair.
    fn next_ready(&mut self, now: Nanos) -> Option<Held> {
        if self.patient {
            return None;
        }
        let first = |at: usize| !self.held[..at].iter().any(|other| other.piece.queue == self.held[at].piece.queue);
        let ready: Vec<usize> = (0..self.held.len()).filter(|at| self.held[*at].ready <= now && first(*at)).collect();
        let chosen = *ready.get(self.draw(ready.len().max(1) as u64) as usize)?;
        Some(self.held.remove(chosen))
    }
}

impl Device for OutOfStep {
    type Qp = Slot;
    type Work = ();
    type Destination = ();
    type Notice = ();

    fn link_rate(&self) -> Option<BitRate> {
        self.link
    }

    fn link_now(&self, now: Nanos) -> LinkNow {
        let last = self.held.iter().filter_map(|held| held.departs).max();
        LinkNow { free_at: Time(last.unwrap_or(now)), about: false }
    }

    fn cut(_: &Qp, wqe: &Wqe) -> Cut {
        match wqe.opcode {
            Opcode::RDMA_WRITE | Opcode::RDMA_READ => Cut::Into(LONGEST),
            _ => Cut::Never,
        }
    }

    fn is_own(_: &Qp) -> bool {
        false
    }

    fn post(plane: &mut Plane, index: usize, piece: &WorkPiece) -> Posted {
        let now = plane.now;
        let qp = plane.qps[piece.queue as usize].as_mut().unwrap();
        let wqe = &qp.pending[index];
        let (opcode, wr_id, fetches) = (wqe.opcode, wqe.wr_id, wqe.fetches());
        match opcode {
            Opcode::RDMA_WRITE | Opcode::RDMA_READ => assert!(piece.bytes <= LONGEST),
            _ => assert_eq!((piece.offset, piece.bytes), (0, piece.total), "cut"),
        }
        let device = &mut plane.device;
        device.posted.push(piece.bytes);
        let same = |held: &&Held| held.piece.queue == piece.queue && held.piece.epoch == piece.epoch;
        let mut fetching: Vec<u32> =
            device.held.iter().filter(same).filter(|held| held.fetches).map(|held| held.piece.sequence).collect();
        fetching.retain(|sequence| *sequence != piece.sequence);
        fetching.dedup();
        assert!(!fetches || fetching.len() < 4, "more READs and atomics than max_rd_atomic");
        assert!(!wqe.fence || fetching.is_empty() || piece.offset > 0, "a fence was not kept");
        if device.by_queue && device.link.is_some() {
            let flying = device.held.iter().filter(|held| held.departs.is_some());
            let own =
                flying.filter(|held| held.piece.queue == piece.queue && held.piece.incarnation == piece.incarnation);
            assert_eq!(own.count(), 0, "two pieces of a queue pair are in flight");
        }
        let waits = device
            .held
            .iter()
            .any(|held| held.piece.queue == piece.queue && held.piece.incarnation == piece.incarnation);
        match device.draw(10) {
            // It has no room.
            _ if device.patient => {}
            0 => {
                device.refused.push(piece.queue);
                return Posted::Answered(Answer::Again(Again::Told { least: 100_000_000 }));
            }
            1 => return Posted::Answered(Answer::Again(Again::Later { first: 2_000, longest: 20_000 })),
            // At once, unless there is something before it.
            2 | 3 if !waits => {
                let answer = device.answer(piece, opcode, now);
                device.note(piece, wr_id, answer);
                return Posted::Answered(answer);
            }
            _ => {}
        }
        qp.device.held += 1;
        let answer = device.answer(piece, opcode, now);
        let ready = now + device.draw(60_000);
        let departs = (device.draw(4) > 0).then(|| now + device.draw(ready - now + 1));
        device.held.push(Held { piece: *piece, wr_id, fetches, departs, ready, answer });
        if departs.is_some() { Posted::InFlight } else { Posted::Sent }
    }

    fn poll(plane: &mut Plane) -> bool {
        let now = plane.now;
        let mut worked = false;
        for at in 0..plane.device.held.len() {
            let held = &mut plane.device.held[at];
            if let Some(departed) = held.departs.take_if(|departs| *departs <= now) {
                let piece = held.piece;
                plane.departed(&piece, departed);
                worked = true;
            }
        }
        while let Some(Held { piece, wr_id, departs, answer, .. }) = plane.device.next_ready(now) {
            worked = true;
            if departs.is_some() {
                plane.departed(&piece, now);
            }
            if let Some(qp) = plane.qps[piece.queue as usize].as_mut().filter(|qp| qp.incarnation == piece.incarnation)
            {
                qp.device.held -= 1;
            }
            if plane.index_of(&piece).is_some() {
                plane.device.note(&piece, wr_id, answer);
                plane.answered(&piece, answer);
            } else {
                plane.activate(piece.queue);
            }
        }
        if !plane.device.refused.is_empty() && plane.device.draw(4) == 0 {
            worked = true;
            for queue in std::mem::take(&mut plane.device.refused) {
                plane.resume(None, |qp| qp.queue == queue);
            }
        }
        worked
    }

    fn has_stopped(qp: &Qp) -> bool {
        qp.device.held == 0
    }

    fn modified(_: &mut Plane, _: u32, _: u32, _: Option<()>) {}

    fn reset(_: &mut Plane, _: u32) {}

    fn failed(_: &mut Plane, _: u32) {}

    fn removed(_: &mut Plane, _: &mut Qp) {}

    fn wants_time(&self) -> bool {
        true
    }

    fn wake_at(&self) -> Option<Nanos> {
        let held =
            self.held.iter().filter(|_| !self.patient).flat_map(|held| [Some(held.ready), held.departs]).flatten();
        // Refused ones are told at any time.
        held.chain(self.refused.first().map(|_| 0)).min()
    }
}
