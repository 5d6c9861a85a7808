//! Taking completions out of a queue's ring.

// UNSAFETY: entry points of a C interface.
#![allow(unsafe_code)]

use crate::abi::{ibv_cq, ibv_wc};
use crate::connection;
use crate::cq::{self, Cq};
use crate::registry::QUEUE_PAIRS;
use crate::shared::Shared;
use crate::sys;
use alloc::vec::Vec;
use core::ffi::{c_int, c_uint};
use ringfence_protocol::completion::Completion;
use ringfence_protocol::layout::{Arm, CqHeader};
use ringfence_protocol::ring::{Consumer, Position};
use ringfence_protocol::verbs::WcOpcode;

/// What a poller that found nothing does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// Returns at once.
    Spin,
    /// Lets others run first.
    Yield,
    /// As well, and says whether somebody did.
    Sample,
    /// Lets others run, and looks whether the proxy still lives.
    LookAround,
}

/// How long to spin on an empty queue before letting others run.
///
/// Where there are more spinning threads than processors, whoever spins keeps away the one that it waits for. Nobody tells us, but what
/// comes of yields does: the kernel counts how often a thread has lost its processor, and one that yields to nobody keeps it. Then a yield
/// takes longer than a fast round trip, and is not worth it until a spin has been in vain for long.
#[derive(Debug)]
pub struct Idle {
    empty: u32,
    limit: u32,
    most: u32,
    yields: u32,
    /// Whether somebody ran in the yields that were looked at, the last one lowest.
    lost: u8,
}

impl Idle {
    /// Empty polls that take a few microseconds: longer than a fast round trip.
    const MOST: u32 = 1024;
    /// Empty polls that take less than a change of threads does.
    const LEAST: u32 = 8;
    /// One of so many yields is looked at, as that costs as much as a yield ...
    const SAMPLED: u32 = 16;
    /// ... and in these of the last ones nobody may have run before spins are long again: before it is another's turn, the kernel may
    /// give a thread that yields its processor back several times.
    const RECENT: u8 = 0b1111;
    /// Polls with a yield in between, before asking the kernel about the proxy.
    const LOOK_AROUND: u32 = 4096;

    /// `yield_at_once`: there is one processor.
    pub fn new(yield_at_once: bool) -> Self {
        let most = if yield_at_once { 0 } else { Self::MOST };
        // The first yield is looked at.
        Self { empty: 0, limit: most, most, yields: Self::SAMPLED - 1, lost: 0 }
    }

    /// Nothing was there.
    #[inline]
    pub fn nothing(&mut self) -> Waiting {
        self.empty = self.empty.wrapping_add(1);
        if self.empty <= self.limit {
            return Waiting::Spin;
        }
        self.yields = self.yields.wrapping_add(1);
        if self.empty.is_multiple_of(Self::LOOK_AROUND) {
            Waiting::LookAround
        } else if self.yields.is_multiple_of(Self::SAMPLED) && self.most > 0 {
            Waiting::Sample
        } else {
            Waiting::Yield
        }
    }

    /// Something was there.
    #[inline(always)]
    pub fn something(&mut self) {
        self.empty = 0;
    }

    /// What became of [`Waiting::Sample`]: whether the thread lost its processor.
    fn sampled(&mut self, lost: bool) {
        self.lost = self.lost << 1 | u8::from(lost);
        let crowded = self.lost & Self::RECENT != 0;
        self.limit = if crowded { Self::LEAST } else { self.most };
    }
}

/// The consuming end of a completion queue, across resizes.
pub struct Ring {
    consumer: Consumer<'static>,
    header: &'static CqHeader,
    /// What the header last said to have been read.
    finished: Position,
    /// Rings that follow, each with the position at which its predecessor ends.
    successors: Vec<(Position, Consumer<'static>, Shared)>,
    idle: Idle,
    /// The completion that `ibv_start_poll` and `ibv_next_poll` stand at.
    pub current: Completion,
    armed: Option<Arm>,
    /// Last, so that it outlives what points into it.
    memory: Shared,
}

impl Ring {
    /// Over the memory in which `consumer` reads.
    pub fn new(memory: Shared, consumer: Consumer<'static>, idle: Idle) -> Self {
        // SAFETY: kept beside the memory.
        let header = unsafe { cq::header(&memory) };
        let current = Completion::default();
        Self { consumer, header, finished: 0, successors: Vec::new(), idle, current, armed: None, memory }
    }

    /// The queue was resized: after `switch`, completions are in another ring.
    pub fn follow_with(&mut self, memory: Shared, consumer: Consumer<'static>, switch: Position) {
        self.successors.push((switch, consumer, memory));
        // The demand for an event may have stayed in the old ring. One event too many does no harm.
        if let Some(arm) = self.armed {
            self.arm(arm);
        }
    }

    /// Asks for an event, in the ring to which the proxy writes.
    pub fn arm(&mut self, arm: Arm) {
        self.armed = Some(arm);
        match self.successors.last() {
            // SAFETY: used within this call only.
            Some((_, _, memory)) => unsafe { cq::header(memory) }.arm(arm),
            None => self.header.arm(arm),
        }
    }

    /// The next completion of a queue pair that is still there.
    #[inline(always)]
    pub fn next(&mut self) -> Option<Completion> {
        loop {
            let Some(words) = self.consumer.peek() else {
                if self.successors.is_empty() || !self.switch() {
                    return None;
                }
                continue;
            };
            self.consumer.advance(1);
            let completion = Completion::unpack(&words);
            if accept(&completion) {
                return Some(completion);
            }
        }
    }

    /// Goes on in the next ring, if this one has been read to its end.
    #[cold]
    fn switch(&mut self) -> bool {
        if self.successors[0].0 != self.consumer.position() {
            return false;
        }
        let (_, consumer, memory) = self.successors.remove(0);
        self.finish();
        // SAFETY: kept beside the memory.
        self.header = unsafe { cq::header(&memory) };
        self.consumer = consumer;
        self.finished = self.consumer.position();
        self.memory = memory;
        true
    }

    /// The proxy may overwrite what has been read.
    #[inline(always)]
    pub fn finish(&mut self) {
        let position = self.consumer.position();
        // Not without need: the proxy would have to fetch the cache line again.
        if position != self.finished {
            self.finished = position;
            self.header.set_consumed(position);
        }
    }

    /// How polling went: what to do before the next.
    #[inline(always)]
    pub fn polled(&mut self, found: bool) -> Waiting {
        if found {
            self.idle.something();
            Waiting::Spin
        } else {
            self.idle.nothing()
        }
    }
}

/// Gives the queue pair its slots back. False if the queue pair is gone, or was reset meanwhile.
#[inline(always)]
fn accept(completion: &Completion) -> bool {
    let Some(queue_pair) = QUEUE_PAIRS.find(completion.cookie) else {
        return false;
    };
    // SAFETY: a queue pair is removed from the registry with its completion queues locked, and one of them is ours.
    let queue_pair = unsafe { &*queue_pair };
    let queue = if completion.opcode.0 & WcOpcode::RECV.0 != 0 { &queue_pair.receive } else { &queue_pair.send };
    queue.complete(completion.freed)
}

/// After an empty poll, with the queue unlocked. False if the proxy is gone.
#[cold]
pub fn wait(queue: &Cq, waiting: Waiting) -> bool {
    if waiting == Waiting::LookAround && connection::is_gone(&queue.connection) {
        return false;
    }
    if waiting != Waiting::Sample {
        sys::sched_yield();
        return true;
    }
    let before = sys::lost_processor();
    sys::sched_yield();
    let lost = sys::lost_processor() != before;
    // Who polls the queue meanwhile may hold it for long, and its next sample is as good.
    if let Some(mut ring) = queue.ring.try_lock() {
        ring.idle.sampled(lost);
    }
    true
}

/// `ibv_poll_cq(3)`.
pub unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, most: c_int, to: *mut ibv_wc) -> c_int {
    // SAFETY: the caller created the queue.
    let queue = unsafe { Cq::from_raw(cq) };
    if !queue.connection.generation.is_current() {
        sys::set_errno(libc::EIO);
        return -1;
    }
    let mut ring = queue.ring.lock();
    let mut found = 0;
    while found < most {
        let Some(completion) = ring.next() else {
            break;
        };
        // SAFETY: the caller gave places for `most` completions.
        unsafe { to.add(found as usize).write(work_completion(&completion)) };
        found += 1;
    }
    ring.finish();
    let waiting = ring.polled(found > 0 || most <= 0);
    drop(ring);
    let gone = found == 0 && queue.connection.generation.is_dead();
    if gone || (waiting != Waiting::Spin && !wait(queue, waiting)) {
        sys::set_errno(libc::EIO);
        return -1;
    }
    found
}

#[inline(always)]
fn work_completion(completion: &Completion) -> ibv_wc {
    ibv_wc {
        wr_id: completion.wr_id,
        status: c_uint::from(completion.status.0),
        opcode: c_uint::from(completion.opcode.0),
        vendor_err: u32::from(completion.vendor_err),
        byte_len: completion.byte_len,
        imm_data: completion.imm,
        qp_num: completion.qp_num,
        src_qp: completion.src_qp,
        wc_flags: c_uint::from(completion.flags.0),
        pkey_index: 0,
        slid: 0,
        sl: 0,
        dlid_path_bits: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits `rounds` times in vain for a moment, in which each yield loses the processor if `crowded`. How long the last spin was.
    fn spin_after(idle: &mut Idle, rounds: u32, crowded: bool) -> u32 {
        let mut spun = 0;
        for _ in 0..rounds {
            spun = 0;
            loop {
                match idle.nothing() {
                    Waiting::Spin => spun += 1,
                    Waiting::Sample => break idle.sampled(crowded),
                    Waiting::Yield | Waiting::LookAround => break,
                }
            }
            idle.something();
        }
        spun
    }

    #[test]
    fn spins_are_short_where_yields_lose_the_processor_and_long_where_they_do_not() {
        let mut idle = Idle::new(false);
        assert_eq!(spin_after(&mut idle, 3 * Idle::SAMPLED, false), Idle::MOST);
        assert_eq!(spin_after(&mut idle, 2 * Idle::SAMPLED, true), Idle::LEAST);
        // One yield to nobody says little.
        assert_eq!(spin_after(&mut idle, 2 * Idle::SAMPLED, false), Idle::LEAST);
        assert_eq!(spin_after(&mut idle, 6 * Idle::SAMPLED, false), Idle::MOST);
    }

    #[test]
    fn one_processor_never_spins_and_sometimes_looks_around() {
        let mut idle = Idle::new(true);
        let looks = (0..3 * Idle::LOOK_AROUND).filter(|_| match idle.nothing() {
            Waiting::Spin | Waiting::Sample => panic!("spins, or might"),
            Waiting::Yield => false,
            Waiting::LookAround => true,
        });
        assert_eq!(looks.count(), 3);
    }
}
