//! A completion queue as its producer sees it.

use crate::shared::{Held, Mapping};
use ringfence_protocol::completion::Completion;
use ringfence_protocol::layout::CqHeader;
use ringfence_protocol::ring::Producer;
use rustix::fd::OwnedFd;
use std::sync::Arc;

/// A completion queue.
#[derive(Debug)]
pub struct Cq {
    ring: Producer<'static>,
    header: Held<CqHeader>,
    /// Keeps `ring`'s memory.
    _mapping: Arc<Mapping>,
    /// What the container had polled when we last looked: a claim.
    consumed: u32,
    channel: Option<Arc<OwnedFd>>,
    /// What the channel calls this queue.
    pub cookie: u64,
    overrun: bool,
    /// In the plane's list of queues that may owe an event.
    pub touched: bool,
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
    pub fn new(mapping: Arc<Mapping>, slots: u32, channel: Option<Arc<OwnedFd>>, cookie: u64) -> Self {
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
        let first = !std::mem::replace(&mut self.overrun, false);
        if produced.wrapping_sub(consumed) < self.ring.capacity() {
            self.consumed = consumed;
            return Ok(());
        }
        self.overrun = true;
        Err(Overrun { first })
    }

    /// Sends the event that is due, if one is.
    pub fn notify(&mut self) {
        self.touched = false;
        let solicited = std::mem::replace(&mut self.solicited, false);
        let Some(channel) = &self.channel else { return };
        if self.header.disarm(solicited) {
            // A full pipe is readable, which is all that the container waits for.
            let _ = rustix::io::write(channel, &self.cookie.to_ne_bytes());
        }
    }

    /// Goes on in another ring: what `ibv_resize_cq` asks for. Returns the old ring's last position.
    pub fn move_to(&mut self, mapping: Arc<Mapping>, slots: u32) -> u32 {
        let switch = self.ring.position();
        let mut next = Self::new(mapping, slots, self.channel.take(), self.cookie);
        (next.touched, next.solicited) = (self.touched, self.solicited);
        *self = next;
        switch
    }
}
