//! Neighbours that were at work in memory when their leave was taken back: who waits for them, and how long.

use super::link::{Link, RingHeader};
use super::links::LinkId;
use super::{Plane, Soft};
use crate::pacing::Nanos;
use crate::shared::Held;
use ringfence_protocol::grants::{Busy, Page, settled};
use ringfence_protocol::verbs::QpState;

/// Tickets are not kept for longer than that if there are many: by then a copy that was under way is over.
const OVERDUE: Nanos = 1_000_000_000;
const MANY: usize = 16;
/// A queue pair in error flushes what it holds after this long at the latest. A copy whose thread lost its processor starts over
/// with its check ([`crate::rseq`]); one that has not ended by now does not run.
const LONGEST_STOP: Nanos = 20_000_000;

/// Where a neighbour says whether it is at work.
#[derive(Clone, Debug)]
enum Word {
    /// By grants.
    Grants(Held<Page>),
    /// On what messages named.
    Names(Held<RingHeader>),
}

impl Word {
    fn busy(&self) -> &Busy {
        match self {
            Self::Grants(page) => &page.used.0.busy,
            Self::Names(header) => &header.reading.0,
        }
    }
}

/// Somebody was at work over this link when leave was taken back.
#[derive(Clone, Debug)]
pub struct Ticket {
    /// The link.
    pub link: LinkId,
    word: Word,
    seen: u64,
    since: Nanos,
    /// It has been waited for in vain several times of late, and is not waited for long again: it is stopped, or does not say what
    /// is true. If it is not, what it does takes microseconds.
    pub brief: bool,
}

impl Ticket {
    fn of(link: LinkId, word: Word, since: Nanos, brief: bool) -> Option<Self> {
        let seen = word.busy().word();
        Busy::says(seen).then_some(Self { link, word, seen, since, brief })
    }

    /// If the neighbour is using grants, of which some were taken back; [`ringfence_protocol::grants::settled`] comes before.
    #[must_use]
    pub fn of_grants(link: LinkId, page: &Held<Page>, since: Nanos) -> Option<Self> {
        Self::of(link, Word::Grants(page.clone()), since, false)
    }

    /// If the neighbour copies what messages named, of which some were taken back; as above.
    #[must_use]
    pub fn of_names(link: LinkId, header: &Held<RingHeader>, since: Nanos, brief: bool) -> Option<Self> {
        Self::of(link, Word::Names(header.clone()), since, brief)
    }

    /// Whether that is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.word.busy().word() != self.seen
    }

    fn replaces(&self, older: &Self) -> bool {
        self.link == older.link && std::mem::discriminant(&self.word) == std::mem::discriminant(&older.word)
    }
}

/// A queue pair in error that is not flushed before somebody is through.
#[derive(Debug)]
pub(super) struct Stop {
    queue: u32,
    incarnation: u64,
    ticket: Ticket,
}

impl Stop {
    /// When it is over at the latest.
    pub(super) fn ends(&self) -> Nanos {
        self.ticket.since + LONGEST_STOP
    }
}

impl Plane {
    /// Keeps tickets for the next verb.
    pub(super) fn keep_tickets(&mut self, tickets: Vec<Ticket>) {
        let now = self.now;
        let kept = &mut self.device.tickets;
        for ticket in tickets {
            // A word that differs from that of an older ticket says that what that was about is over.
            kept.retain(|older| !ticket.replaces(older) && !older.is_over());
            if kept.len() >= MANY {
                kept.retain(|older| now.saturating_sub(older.since) < OVERDUE);
            }
            kept.push(ticket);
        }
    }

    /// What a verb that takes leave back must wait for, outside the worker.
    #[must_use]
    pub fn take_tickets(&mut self) -> Vec<Ticket> {
        std::mem::take(&mut self.device.tickets)
    }

    /// A queue pair is in error: it is flushed when nobody is at work for it any more.
    pub(super) fn stop(&mut self, queue: u32, tickets: &[Ticket]) {
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        qp.device.stopping += tickets.len() as u32;
        let incarnation = qp.incarnation;
        let stops = tickets.iter().map(|ticket| Stop { queue, incarnation, ticket: ticket.clone() });
        self.device.stopping.extend(stops);
    }

    /// A queue pair begins anew.
    pub(super) fn forget_stops(&mut self, queue: u32) {
        self.device.stopping.retain(|stop| stop.queue != queue);
    }

    /// Lets queue pairs be flushed of which nobody is at work any more. True if there is one.
    pub(super) fn see_stops(&mut self) -> bool {
        let before = self.device.stopping.len();
        let mut at = 0;
        while let Some(stop) = self.device.stopping.get(at) {
            if !stop.ticket.is_over() && self.now < stop.ends() {
                at += 1;
                continue;
            }
            let Stop { queue, incarnation, .. } = self.device.stopping.swap_remove(at);
            if let Some(qp) = self.qps[queue as usize].as_mut().filter(|qp| qp.incarnation == incarnation) {
                qp.device.stopping = qp.device.stopping.saturating_sub(1);
                if qp.state == QpState::ERR {
                    self.activate(queue);
                }
            }
        }
        self.device.stopping.len() < before
    }

    /// Takes back what a queue pair lets neighbours do: grants of its own, and the memory that its messages named.
    pub(super) fn withdraw(&mut self, queue: u32, number: u32) -> Vec<Ticket> {
        if self.device.links.is_empty() {
            return Vec::new();
        }
        let mut tickets = self.revoke_where(|_, wish| wish.queue == queue);
        tickets.extend(self.end_names(|_, link| link.end_names_of(number)));
        tickets
    }

    /// Ends names of each link as `end` does it, which says whether something was under way.
    pub(super) fn end_names(&mut self, mut end: impl FnMut(LinkId, &mut Link) -> bool) -> Vec<Ticket> {
        let Self { device: Soft { links, .. }, now, .. } = self;
        let mut tickets = Vec::new();
        for place in 0..links.places() {
            let Some(id) = links.at(place) else { continue };
            let Some(link) = links.get_mut(id) else { continue };
            if end(id, link) {
                settled();
                let brief = link.grants.giving.is_paused(*now);
                tickets.extend(Ticket::of_names(id, link.their_reading(), *now, brief));
            }
        }
        tickets
    }
}
