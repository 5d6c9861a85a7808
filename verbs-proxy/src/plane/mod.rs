//! The data plane: everything that a work request touches, owned by one thread.
//!
//! The control thread changes it only by sending closures that run between two turns, so that nothing here needs a
//! lock. A work request's way is: [`intake`] (claim → admit) → [`transmit`] (schedule → post) → [`respond`] (the
//! responder's own checks) → completion in the [`cq`].

pub mod bell;
pub mod bounce;
pub mod channel;
pub mod cq;
pub mod events;
pub mod grants;
pub mod intake;
pub mod link;
pub mod links;
pub mod numbers;
pub mod qp;
pub mod remote;
pub mod respond;
mod serve;
pub mod setup;
pub mod shaping;
mod source;
pub mod transmit;
pub mod wire;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod tests;

use crate::memory::{Piece, RegionTable};
use crate::pacing::Nanos;
use crate::shared::Held;
use crate::stats::Tally;
use cq::Cq;
use grants::Looks;
use grants::giving::{Ticket, Wish};
use link::{Link, LinkFault};
use links::{LinkId, Links};
use numbers::Numbers;
use qp::{Owner, Peer, Qp};
use ringfence_protocol::completion::Completion;
use ringfence_protocol::doorbell::{Doorbells, MAX_QUEUES};
use ringfence_protocol::verbs::{EventType, QpState, WcStatus};
use shaping::Shaping;
use std::collections::BTreeSet;

/// What the worker tells the control thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// An asynchronous event for an application.
    Event {
        /// Whom it goes to.
        owner: Owner,
        /// What happened.
        event: EventType,
        /// The queue's cookie.
        cookie: u64,
    },
    /// A region must be shared with the other end of a link.
    Share {
        /// The link.
        link: LinkId,
        /// The region's name.
        share: u32,
    },
    /// A link needs a buffer for memory that is not shared with neighbours.
    Bounce {
        /// The link.
        link: LinkId,
    },
    /// The other end of a link may be granted something.
    Grant {
        /// The link.
        link: LinkId,
        /// What.
        wish: Wish,
    },
    /// The other end of a link broke the protocol.
    Fault {
        /// The link.
        link: LinkId,
        /// How.
        fault: LinkFault,
    },
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
pub struct Plane {
    /// The container's doorbells.
    pub doorbells: Held<Doorbells>,
    /// Queue pairs by bell number.
    pub qps: Vec<Option<Box<Qp>>>,
    /// Bell numbers by QP number.
    pub by_number: Numbers,
    /// Completion queues.
    pub cqs: Vec<Option<Box<CqEntry>>>,
    /// Memory regions.
    pub regions: RegionTable,
    /// Links to other proxies.
    pub links: Links,
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
    touched: Vec<usize>,
    owed: events::Owed,
    notices: Vec<Notice>,
    /// For the next verb that takes grants back.
    tickets: Vec<Ticket>,
    /// When what neighbours do by themselves is counted.
    looks: Looks,
    /// The last question of the container's that was answered.
    answered: u64,
    /// The time of this turn, as far as it is known: [`Self::time`].
    pub now: Nanos,
    /// What reads the clock, given what it last said.
    pub clock: fn(Nanos) -> Nanos,
    /// Queue pairs that owe their peers an acknowledge at the end of a link's turn.
    acknowledges: Vec<u32>,
    from: Vec<Piece>,
    to: Vec<Piece>,
    outgoing: source::Staging,
    incoming: source::Staging,
}

/// Looks without work after which a queue is no longer looked at without a bell.
const IDLE_LOOKS: u32 = 4096;

impl Plane {
    /// A plane without queues.
    #[must_use]
    pub fn new(doorbells: Held<Doorbells>, regions: RegionTable, shaping: Shaping, tally: Tally) -> Self {
        Self {
            doorbells,
            qps: std::iter::repeat_with(|| None).take(MAX_QUEUES as usize).collect(),
            by_number: Numbers::default(),
            cqs: Vec::new(),
            regions,
            links: Links::default(),
            incarnations: 0,
            shaping,
            tally,
            throttled_at: 0,
            active: Vec::new(),
            timers: BTreeSet::new(),
            touched: Vec::new(),
            owed: events::Owed::default(),
            notices: Vec::new(),
            tickets: Vec::new(),
            looks: Looks::default(),
            answered: 0,
            now: 0,
            clock: |now| now,
            acknowledges: Vec::new(),
            from: Vec::new(),
            to: Vec::new(),
            outgoing: source::Staging::default(),
            incoming: source::Staging::default(),
        }
    }

    /// Whether the control thread must hear something.
    #[inline(always)]
    #[must_use]
    pub fn has_notices(&self) -> bool {
        !self.notices.is_empty()
    }

    /// What the control thread must hear; taken at the end of a turn.
    pub fn take_notices(&mut self) -> std::vec::Drain<'_, Notice> {
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
        if !self.links.is_empty() {
            worked |= self.serve_links();
            if self.looks.due(self.now) {
                self.count_uses();
            }
        }
        if self.shaping.on_wire() || !self.timers.is_empty() || self.shaping.any_parked() || self.owed.any() {
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
            if let Peer::Link(link) = qp.peer
                && let Some(link) = self.links.get_mut(link)
            {
                // Once for all that this queue sent, and not after all queues had their turns.
                link.flush();
            }
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
        if !self.links.is_empty() {
            self.links.iter_mut().for_each(Link::flush);
        }
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
        let Self { doorbells, qps, active, .. } = self;
        doorbells.take(|queue| {
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
        let looks = self.looks.wake_at().filter(|_| !self.links.is_empty());
        [timer, self.shaping.wake_at(self.now), self.owed.at(), looks].into_iter().flatten().min()
    }

    /// Whether a turn must know the time.
    #[inline(always)]
    #[must_use]
    pub fn needs_time(&self) -> bool {
        self.shaping.wants_clock() || !self.timers.is_empty() || !self.links.is_empty() || self.owed.any()
    }

    /// The time at this moment: for what is told to come again after a while. A turn may not have asked for the time, nor be
    /// at its beginning.
    fn time(&mut self) -> Nanos {
        self.now = (self.clock)(self.now);
        self.now
    }

    /// Announces sleep to all who might send work; false if some came meanwhile. [`Self::awake`] must follow.
    #[must_use]
    pub fn prepare_sleep(&self) -> bool {
        let quiet = self.doorbells.prepare_sleep();
        self.links.iter().fold(quiet, |quiet, link| link.prepare_sleep() && quiet)
    }

    /// Takes the announcement back.
    pub fn awake(&self) {
        self.doorbells.awake();
        for link in self.links.iter() {
            link.awake();
        }
    }

    /// Makes sure that a queue is looked at no later than at this time.
    fn alarm(&mut self, at: Nanos, queue: u32) {
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        if qp.alarm != 0 && qp.alarm <= at {
            // What it finds then sets the next alarm.
            return;
        }
        self.timers.remove(&(qp.alarm, queue));
        qp.alarm = at;
        self.timers.insert((at, queue));
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
        worked |= self.serve_wire();
        worked |= self.unpark();
        worked
    }

    /// Takes all rings of the links' bells.
    pub fn silence_links(&mut self) {
        self.looks.hasten();
        for place in 0..self.links.places() {
            let Some(id) = self.links.at(place) else { continue };
            if self.links.get(id).is_some_and(|link| link.bell.silence().is_err()) {
                self.fail_link(id, LinkFault::Baggage);
            }
        }
    }

    /// Ends a link whose other end broke the protocol; the control thread is told, and takes it out.
    fn fail_link(&mut self, id: LinkId, fault: LinkFault) {
        self.notices.push(Notice::Fault { link: id, fault });
        self.tally.link_failed();
        self.revoke_link(id);
        if let Some(port) = self.links.end(id) {
            self.leave_link(id, port);
            self.tally.links(self.links.count());
        }
    }

    /// Takes a link out. What it holds is given up by the caller, for which this thread has no time.
    #[must_use]
    pub fn remove_link(&mut self, id: LinkId) -> Option<Box<Link>> {
        self.revoke_link(id);
        let link = self.links.remove(id)?;
        self.leave_link(id, link.port);
        self.tally.links(self.links.count());
        Some(link)
    }

    /// Queue pairs that used a link go on over another to the same port, or without: then their requests are given up by
    /// their retry timers.
    fn leave_link(&mut self, id: LinkId, port: u16) {
        let peer = self.links.to(port).map_or(Peer::None, Peer::Link);
        self.change_peers(|qp| qp.peer == Peer::Link(id), peer);
    }

    fn change_peers(&mut self, which: impl Fn(&Qp) -> bool, peer: Peer) {
        for queue in 0..self.qps.len() {
            if let Some(qp) = self.qps[queue].as_mut().filter(|qp| which(qp)) {
                qp.change_peer(peer);
                self.activate(queue as u32);
            }
        }
    }

    /// Writes a completion. `solicited` counts for queues armed for solicited events.
    #[inline(always)]
    fn complete(&mut self, index: usize, completion: &Completion, solicited: bool) {
        let Some(Some(entry)) = self.cqs.get_mut(index) else { return };
        self.tally.completed(completion.status);
        match entry.cq.push(completion) {
            Ok(()) => {
                if entry.cq.has_channel() {
                    entry.cq.solicited |= solicited || completion.status != WcStatus::SUCCESS;
                    if !entry.cq.touched {
                        entry.cq.touched = true;
                        self.touched.push(index);
                    }
                }
            }
            Err(overrun) => {
                self.tally.completion_lost();
                if overrun.first {
                    let notice =
                        Notice::Event { owner: entry.owner, event: EventType::CQ_ERR, cookie: entry.cq.cookie };
                    self.notices.push(notice);
                }
            }
        }
    }

    fn event(&mut self, queue: u32, event: EventType) {
        if let Some(qp) = &self.qps[queue as usize] {
            self.notices.push(Notice::Event { owner: qp.owner, event, cookie: qp.event_cookie });
        }
    }

    /// Takes a queue pair to the error state; what it holds is flushed in the turns to come.
    pub fn to_error(&mut self, queue: u32) {
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        qp.state = QpState::ERR;
        qp.epoch += 1;
        qp.on_wire = 0;
        qp.waits = qp::Waits::default();
        // From now on every receive request posted is flushed at once.
        qp.header.receive_bell.stop_polling();
        self.revoke_queue(queue);
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
