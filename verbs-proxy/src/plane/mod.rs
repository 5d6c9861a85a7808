//! The data plane: everything that a work request touches, owned by one thread, whatever device moves the bytes.
//!
//! The control thread changes it only by sending closures that run between two turns, so that nothing here needs a
//! lock. A work request's way is: [`claim`] → [`admit`] → [`transmit`] (schedule → [`Device::post`]) → [`complete`]
//! (what the device answers → completion in the [`cq`]).

pub mod admit;
pub mod bell;
pub mod channel;
pub mod claim;
pub mod complete;
pub mod cq;
pub mod epochs;
pub mod events;
pub mod numbers;
pub mod qp;
pub mod receive;
mod retry;
pub mod setup;
pub mod shaping;
pub mod transmit;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod tests;

use crate::device::Device;
use crate::memory::RegionTable;
use crate::pacing::Nanos;
use crate::shared::Held;
use crate::stats::Tally;
use cq::{Cq, CqIndex};
use numbers::Numbers;
use qp::{Owner, Qp};
use ringfence_protocol::doorbell::{Doorbells, MAX_QUEUES};
use ringfence_protocol::verbs::{EventType, QpState};
use ringfence_sched::Policy;
use shaping::Shaping;
use std::collections::BTreeSet;

/// What the worker tells the control thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice<N> {
    /// An asynchronous event for an application.
    Event {
        /// Whom it goes to.
        owner: Owner,
        /// What happened.
        event: EventType,
        /// The queue's cookie.
        cookie: u64,
    },
    /// The device needs something.
    Device(N),
}

/// A completion queue and whom its errors concern.
#[derive(Debug)]
pub struct CqEntry {
    /// The queue.
    pub cq: Cq,
    /// Whom asynchronous events go to.
    pub owner: Owner,
}

/// The data plane of one container.
#[derive(Debug)]
pub struct Plane<D: Device> {
    /// The container's doorbells.
    pub doorbells: Held<Doorbells>,
    /// Queue pairs by bell number.
    pub qps: Vec<Option<Box<Qp<D>>>>,
    /// Bell numbers by QP number.
    pub by_number: Numbers,
    /// Completion queues.
    pub cqs: Vec<Option<Box<CqEntry>>>,
    /// Memory regions.
    pub regions: RegionTable,
    /// What moves the bytes.
    pub device: D,
    /// [`Qp::incarnation`] of the newest queue pair.
    incarnations: u64,
    /// What the policy makes of it.
    pub shaping: Shaping,
    /// What is counted.
    pub tally: Tally,
    /// When queue pairs that wait for rates or share were last counted as waiting; zero if there were none.
    throttled_at: Nanos,
    /// Queues looked at each turn.
    active: Vec<u32>,
    /// At most one alarm for each queue, its [`Qp::alarm`].
    timers: BTreeSet<(Nanos, u32)>,
    /// Completion queues with a channel that got something in this turn.
    pub(crate) touched: Vec<CqIndex>,
    owed: events::Owed,
    /// What the control thread must hear: [`Self::take_notices`].
    pub notices: Vec<Notice<D::Notice>>,
    /// The last question of the container's that was answered.
    answered: u64,
    /// The time of this turn, as far as it is known: [`Self::time`].
    pub now: Nanos,
    /// What reads the clock, given what it last said.
    pub clock: fn(Nanos) -> Nanos,
}

/// Looks without work after which a queue is no longer looked at without a bell.
const IDLE_LOOKS: u32 = 4096;

impl<D: Device> Plane<D> {
    /// A plane without queues.
    #[must_use]
    pub fn new(
        doorbells: Held<Doorbells>,
        regions: RegionTable,
        policy: &Policy,
        tally: Tally,
        device: D,
        now: Nanos,
    ) -> Self {
        Self {
            doorbells,
            qps: std::iter::repeat_with(|| None).take(MAX_QUEUES as usize).collect(),
            by_number: Numbers::default(),
            cqs: Vec::new(),
            regions,
            incarnations: 0,
            shaping: Shaping::new(policy, device.link_rate(), now),
            device,
            tally,
            throttled_at: 0,
            active: Vec::new(),
            timers: BTreeSet::new(),
            touched: Vec::new(),
            owed: events::Owed::default(),
            notices: Vec::new(),
            answered: 0,
            now,
            clock: |now| now,
        }
    }

    /// Whether the control thread must hear something.
    #[inline(always)]
    #[must_use]
    pub fn has_notices(&self) -> bool {
        !self.notices.is_empty()
    }

    /// What the control thread must hear; taken at the end of a turn.
    pub fn take_notices(&mut self) -> std::vec::Drain<'_, Notice<D::Notice>> {
        self.notices.drain(..)
    }

    /// One look at everything that may have work. True if there was some.
    #[inline]
    pub fn turn(&mut self) -> bool {
        // Every access of this plane begins and ends within a turn.
        self.doorbells.answer(&mut self.answered);
        let mut worked = false;
        self.shaping.begin(self.now);
        if self.shaping.any_parked() || self.throttled_at != 0 {
            self.count_throttled();
        }
        if self.doorbells.any() {
            worked = true;
            self.answer_bells();
        }
        worked |= D::poll(self);
        if !self.timers.is_empty() || self.shaping.any_parked() || self.owed.any() {
            worked |= self.serve_time();
        }
        let mut index = 0;
        while index < self.active.len() {
            let queue = self.active[index];
            let Some(qp) = &mut self.qps[queue as usize] else {
                self.active.swap_remove(index);
                continue;
            };
            let outcome = match qp.state {
                QpState::RTS => self.transmit(queue),
                QpState::ERR => self.flush(queue),
                QpState::SQD => self.drain(queue),
                _ => Outcome::Idle,
            };
            let Some(qp) = &mut self.qps[queue as usize] else { continue };
            // Once for all that this queue sent, and not after all queues had their turns.
            self.device.commit(qp);
            match outcome {
                Outcome::Worked => {
                    worked = true;
                    qp.idle = 0;
                    index += 1;
                }
                Outcome::Idle => {
                    qp.idle += 1;
                    if qp.idle > IDLE_LOOKS && self.rest(queue) {
                        self.active.swap_remove(index);
                    } else {
                        index += 1;
                    }
                }
                Outcome::Blocked => {
                    qp.active = false;
                    self.active.swap_remove(index);
                }
            }
        }
        if !self.touched.is_empty() {
            self.notify();
        }
        D::end_turn(self);
        worked
    }

    /// Whoever waits has the worker know the time in every turn.
    #[cold]
    fn count_throttled(&mut self) {
        let now = if self.shaping.any_parked() { self.now } else { 0 };
        let since = std::mem::replace(&mut self.throttled_at, now);
        if since != 0 {
            self.tally.throttled(self.now.saturating_sub(since));
        }
    }

    #[cold]
    fn answer_bells(&mut self) {
        let Self { doorbells, qps, active, device, .. } = self;
        doorbells.take(|queue| {
            device.rung(queue);
            // A container may ring for queues that it does not have.
            if let Some(qp) = &mut qps[queue as usize]
                && !qp.active
                && !qp.parked
            {
                qp.active = true;
                qp.idle = 0;
                qp.header.send_bell.start_polling();
                active.push(queue);
            }
        });
    }

    /// Has a queue looked at from the next turn on.
    pub fn activate(&mut self, queue: u32) {
        if let Some(qp) = &mut self.qps[queue as usize] {
            qp.idle = 0;
            if qp.parked && !matches!(qp.state, QpState::RTS | QpState::SQD) {
                // What it holds is flushed, for which no share is needed.
                qp.parked = false;
                self.shaping.leave(queue, self.now);
            }
            if !qp.active && !qp.parked {
                qp.active = true;
                qp.header.send_bell.start_polling();
                self.active.push(queue);
            }
        }
    }

    /// Stops looking at an idle queue unless its producer was faster. True if it now rests.
    fn rest(&mut self, queue: u32) -> bool {
        let Some(qp) = &mut self.qps[queue as usize] else { return true };
        qp.header.send_bell.stop_polling();
        if qp.send.peek().is_some() && matches!(qp.state, QpState::RTS | QpState::ERR) {
            qp.header.send_bell.start_polling();
            qp.idle = 0;
            return false;
        }
        qp.active = false;
        true
    }

    /// Whether nothing is in sight, so that the worker may sleep. All idle queues rest afterwards.
    pub fn rest_all(&mut self) -> bool {
        let mut index = 0;
        while index < self.active.len() {
            if self.rest(self.active[index]) {
                self.active.swap_remove(index);
            } else {
                index += 1;
            }
        }
        self.active.is_empty()
    }

    /// When the worker must look again at the latest.
    #[must_use]
    pub fn wake_at(&self) -> Option<Nanos> {
        let timer = self.timers.first().map(|(at, _)| *at);
        let share = self.shaping.wake_at(self.device.link_now(self.now), self.now);
        [timer, share, self.owed.at(), self.device.wake_at()].into_iter().flatten().min()
    }

    /// Whether a turn must know the time.
    #[inline(always)]
    #[must_use]
    pub fn needs_time(&self) -> bool {
        self.shaping.wants_clock() || !self.timers.is_empty() || self.device.wants_time() || self.owed.any()
    }

    /// The time at this moment: for what is told to come again after a while. A turn may not have asked for the time, nor be
    /// at its beginning.
    pub fn time(&mut self) -> Nanos {
        self.now = (self.clock)(self.now);
        self.now
    }

    /// Announces sleep to all who might send work; false if some came meanwhile. [`Self::awake`] must follow.
    #[must_use]
    pub fn prepare_sleep(&self) -> bool {
        let quiet = self.doorbells.prepare_sleep();
        self.device.prepare_sleep() && quiet
    }

    /// Takes the announcement back.
    pub fn awake(&self) {
        self.doorbells.awake();
        self.device.awake();
    }

    fn serve_time(&mut self) -> bool {
        let mut worked = false;
        while let Some((at, queue)) = self.timers.first().copied() {
            if at > self.now {
                break;
            }
            self.timers.pop_first();
            worked = true;
            if let Some(qp) = &mut self.qps[queue as usize] {
                qp.alarm = 0;
                self.on_alarm(queue);
            }
        }
        worked |= self.settle_events();
        worked |= self.unpark();
        worked
    }

    /// An asynchronous event of a queue pair.
    pub fn event(&mut self, queue: u32, event: EventType) {
        if let Some(qp) = &self.qps[queue as usize] {
            self.notices.push(Notice::Event { owner: qp.owner, event, cookie: qp.event_cookie });
        }
    }

    /// Takes a queue pair to the error state; what it holds is flushed in the turns to come.
    pub fn to_error(&mut self, queue: u32) {
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        qp.state = QpState::ERR;
        qp.epochs.renew();
        qp.waits = qp::Waits::default();
        // From now on every receive request posted is flushed at once.
        qp.header.receive_bell.stop_polling();
        D::failed(self, queue);
        self.activate(queue);
    }
}

/// What came of a look at a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Something moved; look again soon.
    Worked,
    /// There was nothing to do.
    Idle,
    /// There is something to do that must wait; whoever ends the wait activates the queue.
    Blocked,
}
