//! A completion queue as its producer sees it.

use super::channel::Channel;
use crate::shared::{Held, Mapping};
use ringfence_protocol::completion::Completion;
use ringfence_protocol::layout::CqHeader;
use ringfence_protocol::ring::Producer;
use std::sync::Arc;

/// Where a completion queue is among the plane's: [`super::Plane::cqs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CqIndex(pub usize);

/// A completion queue.
#[derive(Debug)]
pub struct Cq {
    ring: Producer<'static>,
    header: Held<CqHeader>,
    /// Keeps `ring`'s memory.
    _mapping: Arc<Mapping>,
    /// What the container had polled when we last looked: a claim.
    consumed: u32,
    channel: Option<Arc<Channel>>,
    /// What the channel calls this queue.
    pub cookie: u64,
    /// Was full once. That is said once, however often the container makes room again: what it says of that is a claim.
    overrun: bool,
    /// In the plane's list of queues that may owe an event.
    pub touched: bool,
    /// There was no room for an event in the channel; it is in the plane's list of those that owe one.
    pub owes: bool,
    /// One of the completions since the last event was solicited or an error.
    pub solicited: bool,
}

/// The queue was full: the completion is lost and the queue is in error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overrun {
    /// It was not in error before.
    pub first: bool,
}

impl Cq {
    /// A queue over the ring of `slots` slots in `mapping`.
    #[must_use]
    pub fn new(mapping: Arc<Mapping>, slots: u32, channel: Option<Arc<Channel>>, cookie: u64) -> Self {
        let header = mapping.header(0);
        let ring =
            Producer::new(crate::shared::ring_slots(&mapping, ringfence_protocol::layout::RINGS_OFFSET, slots), 0);
        Self {
            ring,
            header,
            _mapping: mapping,
            consumed: 0,
            channel,
            cookie,
            overrun: false,
            touched: false,
            owes: false,
            solicited: false,
        }
    }

    /// Whether events can be asked for.
    #[inline(always)]
    #[must_use]
    pub fn has_channel(&self) -> bool {
        self.channel.is_some()
    }

    /// Writes a completion.
    #[inline(always)]
    pub fn push(&mut self, completion: &Completion) -> Result<(), Overrun> {
        if self.ring.position().wrapping_sub(self.consumed) >= self.ring.capacity() {
            self.make_room()?;
        }
        self.ring.push(&completion.pack());
        Ok(())
    }

    #[cold]
    fn make_room(&mut self) -> Result<(), Overrun> {
        // A claim outside what was produced leaves the queue full, which harms its container only.
        let consumed = self.header.consumed();
        let produced = self.ring.position();
        if produced.wrapping_sub(consumed) < self.ring.capacity() {
            self.consumed = consumed;
            return Ok(());
        }
        let first = !std::mem::replace(&mut self.overrun, true);
        Err(Overrun { first })
    }

    /// The channel.
    #[must_use]
    pub fn channel(&self) -> Option<&Arc<Channel>> {
        self.channel.as_ref()
    }

    /// Sends the event that is due, if one is. False if it must be tried again, by [`Self::settle`]. `wait`: do not try.
    #[must_use]
    pub fn notify(&mut self, wait: bool) -> bool {
        self.touched = false;
        let solicited = std::mem::replace(&mut self.solicited, false);
        let Some(channel) = &self.channel else { return true };
        // An event that is owed already will come after this, and be for both.
        if !self.header.disarm(solicited) || self.owes {
            return true;
        }
        self.owes = wait || !channel.send(self.cookie);
        !self.owes
    }

    /// Sends the event that it owes. False if there still is no room.
    #[must_use]
    pub fn settle(&mut self) -> bool {
        self.owes = self.owes && self.channel.as_ref().is_some_and(|channel| !channel.send(self.cookie));
        !self.owes
    }

    /// Goes on in another ring: what `ibv_resize_cq` asks for. Returns the old ring's last position.
    pub fn move_to(&mut self, mapping: Arc<Mapping>, slots: u32) -> u32 {
        let switch = self.ring.position();
        let mut next = Self::new(mapping, slots, self.channel.take(), self.cookie);
        (next.touched, next.owes, next.solicited) = (self.touched, self.owes, self.solicited);
        *self = next;
        switch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::SealedFile;
    use ringfence_protocol::layout::cq_bytes;

    #[test]
    fn an_overrun_is_said_once_whatever_the_container_says_it_has_read() {
        const SLOTS: u32 = 64;
        let mapping = Arc::new(Mapping::of(&SealedFile::create("test", cq_bytes(SLOTS)).unwrap()).unwrap());
        let mut cq = Cq::new(Arc::clone(&mapping), SLOTS, None, 7);
        for round in 0..10 {
            for _ in 0..SLOTS {
                cq.push(&Completion::default()).unwrap();
            }
            for again in 0..2 {
                let first = (round, again) == (0, 0);
                assert_eq!(cq.push(&Completion::default()), Err(Overrun { first }), "round {round}");
            }
            mapping.header::<CqHeader>(0).set_consumed(cq.ring.position());
        }
    }
}
