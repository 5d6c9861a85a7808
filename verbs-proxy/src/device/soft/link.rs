//! A link to another proxy of the node: two rings in one memory file, and the memory that the other end shares with us.

// UNSAFETY: declares that the ring header may be overlaid on shared memory.
#![allow(unsafe_code)]

use super::bounce::{Bounce, Place};
use super::grants::Grants;
use super::names::{Lasting, Names, Words as NameWords, is_unread};
use super::wire::{self, Kind, Request, Response};
use crate::fabric::budget::Lease;
use crate::memory::Piece;
use crate::pacing::Nanos;
use crate::plane::bell::{Bell, Ringer};
use crate::shared::{Header, Held, Mapping, ring_slots};
use ringfence_protocol::doorbell::Line;
use ringfence_protocol::grants::Busy;
use ringfence_protocol::ring::{Consumer, Position, Producer, SLOT_BYTES, Words};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

/// Slots of each ring.
pub const SLOTS: u32 = 2048;
/// Requests without an answer that one end may have on a link.
pub const MAX_OUTSTANDING: u32 = 384;
/// Slots that requests leave free: every answer that the other end may be owed has a place, so that two full rings
/// never wait for each other.
const RESERVED: u32 = 512;
/// Turns without a ring: four pieces, some 25 µs.
const MOST_UNRUNG: u32 = 3;
const HEADER: usize = 4096;
const RING_BYTES: usize = HEADER + SLOTS as usize * SLOT_BYTES;
/// Where the slots begin that the end writes which made the link, and those of the other; the head of each is a page before.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) const SLOTS_AT: [usize; 2] = [HEADER, RING_BYTES + HEADER];
/// Which messages go over it. Another number is another size of the file, by which proxies of different versions that run on one
/// node after an upgrade turn each other away.
const VERSION: usize = 7;
/// Bytes of a link's memory file.
pub const BYTES: usize = 2 * RING_BYTES + VERSION * HEADER;

/// Head of one direction of a link. The words are the receiver's, but for the last ones.
#[repr(C)]
#[derive(Debug)]
pub struct RingHeader {
    consumed: Line<AtomicU32>,
    asleep: Line<AtomicU32>,
    /// Whether it copies what the sender's messages name.
    pub(super) reading: Line<Busy>,
    /// The sender's: which generation of names holds.
    named: NameWords,
}
const _: () = assert!(size_of::<RingHeader>() <= HEADER);
// SAFETY: atomics only.
unsafe impl Header for RingHeader {}

/// Which end of the link we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// We made the memory file.
    Initiator,
    /// The other end did.
    Acceptor,
}

/// The ports that a link is between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Ours.
    pub own: u16,
    /// The other end's.
    pub port: u16,
}

/// Memory of ours that the other end can reach, or is to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// It has mapped it.
    pub confirmed: bool,
    /// The last message that names it.
    named: Option<Position>,
}

impl Shared {
    /// It has not said yet that it has.
    pub const ASKED: Self = Self { confirmed: false, named: None };
    /// It has.
    pub const CONFIRMED: Self = Self { confirmed: true, named: None };
}

/// Memory that the other end shares with us. Grants have it as well, for which it may stay longer than under its name.
#[derive(Clone, Debug)]
pub struct Share {
    /// The mapping, which begins with the first page that is shown.
    pub mapping: Arc<Mapping>,
    /// What it takes of the mappings that the kernel allows us; given back after the mapping is gone.
    pub lease: Arc<Lease>,
    /// It is mapped for writing.
    pub writable: bool,
}

/// The other end broke the protocol; the link ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkFault {
    /// Its idea of how far it has read is impossible.
    #[error("the neighbour says it read up to {consumed} where {produced} were written")]
    Consumed {
        /// Its word.
        consumed: u32,
        /// Ours.
        produced: u32,
    },
    /// There is no room for an answer, which an honest neighbour leaves.
    #[error("the neighbour leaves no room for answers")]
    NoRoom,
    /// A message that says something impossible.
    #[error("malformed message")]
    Malformed,
    /// Descriptors where only rings are expected.
    #[error("the neighbour sends descriptors with its rings")]
    Baggage,
}

/// A link.
#[derive(Debug)]
pub struct Link {
    /// The port at the other end.
    pub port: u16,
    /// LID of the port whose proxy made the link.
    pub maker: u16,
    /// There is another to the same port, and both ends prefer that: see [`super::links::Links::to`].
    pub superseded: bool,
    send: Producer<'static>,
    send_header: Held<RingHeader>,
    receive: Consumer<'static>,
    receive_header: Held<RingHeader>,
    _mapping: Arc<Mapping>,
    /// Wakes the worker at the other end. None until the other end has welcomed us.
    wake: Option<Ringer>,
    /// Wakes us.
    pub bell: Bell,
    consumed: Position,
    published: Position,
    /// Requests without an answer.
    pub outstanding: u32,
    /// By the other end's name.
    pub shares: HashMap<u32, Share>,
    /// Our regions that the other end can reach, by our name.
    pub shared: HashMap<u32, Shared>,
    names: Names,
    /// What the other end reads in place of memory that it must not map, once there is one.
    pub bounce: Option<Bounce>,
    /// One is being made, or offered to the other end.
    pub bounce_asked: bool,
    /// A queue pair may wait for memory that is to be shared over it.
    pub awaited: bool,
    /// What either end may do without the other's worker.
    pub grants: Grants,
    /// Requests were pushed since the last [`Self::flush`] ...
    asks: bool,
    /// ... or answers.
    answers: bool,
    /// Before, the other end is asked for no memory to be shared that nothing waits for.
    pub(super) shares_again_at: Nanos,
    /// Turns in a row after which the other end was not woken for answers, since more of its messages were there.
    unrung: u32,
}

/// How far the buffer is for what a message needs of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// There.
    At(Place),
    /// Full, until the other end has read what is in it.
    Later,
    /// The other end does not have it yet.
    NotShared,
}

impl Link {
    /// The link over `mapping`, which has [`BYTES`] bytes.
    #[must_use]
    pub fn new(ends: Ends, end: End, mapping: Arc<Mapping>, wake: Option<Ringer>, bell: Bell) -> Self {
        let Ends { own, port } = ends;
        let (send, receive, maker) = match end {
            End::Initiator => (0, RING_BYTES, own),
            End::Acceptor => (RING_BYTES, 0, port),
        };
        Self {
            port,
            maker,
            superseded: false,
            send: Producer::new(ring_slots(&mapping, send + HEADER, SLOTS), 0),
            send_header: mapping.header(send),
            receive: Consumer::new(ring_slots(&mapping, receive + HEADER, SLOTS), 0),
            receive_header: mapping.header(receive),
            _mapping: mapping,
            wake,
            bell,
            consumed: 0,
            published: 0,
            outstanding: 0,
            shares: HashMap::new(),
            shared: HashMap::new(),
            names: Names::default(),
            bounce: None,
            bounce_asked: false,
            awaited: false,
            grants: Grants::default(),
            asks: false,
            answers: false,
            shares_again_at: 0,
            unrung: 0,
        }
    }

    /// Whether the other end has taken the link: queue pairs may use it.
    #[inline(always)]
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.wake.is_some()
    }

    /// The other end has taken the link, and this rings it.
    pub(crate) fn open(&mut self, wake: Ringer) {
        // What came before this could not ring: the other end may sleep over an answer.
        wake.ring();
        self.wake = Some(wake);
    }

    fn free(&mut self, needed: u32) -> Result<bool, LinkFault> {
        if SLOTS - self.send.position().wrapping_sub(self.consumed) >= needed {
            return Ok(true);
        }
        self.look()?;
        Ok(SLOTS - self.send.position().wrapping_sub(self.consumed) >= needed)
    }

    /// How far the other end has read.
    fn look(&mut self) -> Result<(), LinkFault> {
        let produced = self.send.position();
        let consumed = self.send_header.consumed.0.load(Ordering::Acquire);
        if produced.wrapping_sub(consumed) > SLOTS {
            return Err(LinkFault::Consumed { consumed, produced });
        }
        self.consumed = consumed;
        Ok(())
    }

    /// Room in the buffer for `bytes` that the next message names.
    pub fn bounce_room(&mut self, bytes: u32, spare: u32) -> Result<Room, LinkFault> {
        let Some(bounce) = self.bounce.as_ref().filter(|bounce| self.has_mapped(bounce.share)) else {
            return Ok(Room::NotShared);
        };
        if let Some(place) = bounce.room(bytes, spare) {
            return Ok(Room::At(place));
        }
        self.look()?;
        let consumed = self.consumed;
        let place = self.bounce.as_mut().and_then(|bounce| {
            bounce.release(consumed);
            bounce.room(bytes, spare)
        });
        Ok(place.map_or(Room::Later, Room::At))
    }

    /// The next message names this place of the buffer.
    pub fn bounce_hold(&mut self, place: Place) {
        let message = self.send.position();
        if let Some(bounce) = &mut self.bounce {
            bounce.hold(place, message);
        }
    }

    /// The other end cannot reach memory of this name, or there is none to make the buffer of: whoever needs it asks again.
    pub fn unshare(&mut self, share: Option<u32>) {
        if let Some(share) = share {
            self.shared.remove(&share);
        }
        if self.bounce.as_ref().map(|bounce| bounce.share) == share {
            self.bounce_asked = false;
        }
    }

    /// Whether the other end can reach memory of this name.
    #[inline(always)]
    #[must_use]
    pub fn has_mapped(&self, share: u32) -> bool {
        self.shared.get(&share).is_some_and(|shared| shared.confirmed)
    }

    /// The next message may name this memory, if the other end can reach it.
    #[inline(always)]
    pub fn name(&mut self, share: u32) -> bool {
        let message = self.send.position();
        match self.shared.get_mut(&share) {
            Some(shared) if shared.confirmed => {
                shared.named = Some(message);
                true
            }
            _ => false,
        }
    }

    /// The next message is a request that names memory for our queue pair `number`: the generation that it says.
    #[inline(always)]
    pub fn generation(&mut self, number: u32) -> u64 {
        self.names.say(number, self.send.position())
    }

    /// The next message is an answer that names this place of the buffer: the generation that it says.
    pub fn answer_from(&mut self, place: Place) -> u64 {
        self.bounce_hold(place);
        self.names.say_answer(self.send.position())
    }

    /// What must hold while memory is copied that a request named for the other end's queue pair `number`.
    #[inline(always)]
    pub(crate) fn lasting(&self, number: u32, generation: u64) -> Lasting<'_> {
        Lasting::of_request(&self.receive_header.reading.0, &self.receive_header.named, number, generation)
    }

    /// The same of an answer.
    #[inline(always)]
    pub(crate) fn lasting_answer(&self, generation: u64) -> Lasting<'_> {
        Lasting::of_answer(&self.receive_header.reading.0, &self.receive_header.named, generation)
    }

    /// Ends names of ours that are under way: what `end` says of them. False if there are none.
    fn end_names(&mut self, end: impl FnOnce(&mut Names, &NameWords, Position) -> bool) -> bool {
        // One that says what cannot be has read nothing.
        let _ = self.look();
        end(&mut self.names, &self.send_header.named, self.consumed)
    }

    /// What our queue pair `number` named holds no more.
    pub(super) fn end_names_of(&mut self, number: u32) -> bool {
        self.end_names(|names, words, consumed| names.end_of(number, words, consumed))
    }

    /// No name of this memory holds any more. Which queue pairs named it is not kept: the names of all requests end, if one of it
    /// is under way.
    pub(super) fn end_names_in(&mut self, share: u32) -> bool {
        let named = self.shared.get(&share).and_then(|shared| shared.named);
        self.end_names(|names, words, consumed| {
            named.is_some_and(|message| is_unread(message, consumed)) && names.end_requests(words, consumed)
        })
    }

    /// No name holds any more.
    pub(super) fn end_all_names(&mut self) -> bool {
        self.end_names(Names::end_all)
    }

    /// Where the other end says whether it copies what we named.
    pub(super) fn their_reading(&self) -> &Held<RingHeader> {
        &self.send_header
    }

    /// Where we say whether we copy what the other end named.
    #[cfg(test)]
    pub(crate) fn reading(&self) -> &Busy {
        &self.receive_header.reading.0
    }

    /// As an other end does that writes where it should not.
    #[cfg(test)]
    pub(crate) fn scribble_names(&self, generation: u64) {
        self.receive_header.named.scribble(generation);
    }

    /// Whether a request with so many extensions can be sent now.
    pub fn has_room(&mut self, extensions: u32) -> Result<bool, LinkFault> {
        Ok(self.outstanding < MAX_OUTSTANDING && self.free(1 + extensions + RESERVED)?)
    }

    /// Sends a request; false if there is no room now.
    pub fn request(&mut self, request: &Request, extensions: &[Words]) -> Result<bool, LinkFault> {
        if !self.has_room(extensions.len() as u32)? {
            return Ok(false);
        }
        self.send.push_extended(&request.pack(), extensions);
        self.outstanding += 1;
        self.asks = true;
        Ok(true)
    }

    /// Sends an answer.
    pub fn respond(&mut self, response: &Response) -> Result<(), LinkFault> {
        if !self.free(1)? {
            return Err(LinkFault::NoRoom);
        }
        self.send.push(&response.pack());
        self.answers = true;
        Ok(())
    }

    /// The next message, if there is one.
    pub fn peek(&self) -> Option<Words> {
        self.receive.peek()
    }

    /// Extension `index` of the next message.
    pub fn extension(&self, index: u32) -> Option<Words> {
        self.receive.extension(index)
    }

    /// Goes on past a message of `slots` slots.
    pub fn advance(&mut self, slots: u32) {
        self.receive.advance(slots);
    }

    /// All messages up to here have been dealt with: the other end may use their slots, and the memory that they named, again.
    pub fn publish(&mut self) {
        if self.receive.position() != self.published {
            self.published = self.receive.position();
            self.receive_header.consumed.0.store(self.published, Ordering::Release);
        }
    }

    /// A turn is over. If there is more to come of the other end it is not woken for the answers so far, which it finds when it
    /// looks: to be woken for each piece costs both ends more than the piece.
    pub fn end_turn(&mut self) {
        let goes_on = self.unrung < MOST_UNRUNG && self.receive.peek().is_some();
        self.unrung = if goes_on { self.unrung + 1 } else { 0 };
    }

    /// Wakes the other end if it sleeps and something was sent that [`Self::end_turn`] does not put off.
    pub fn flush(&mut self) {
        if !self.asks && (!self.answers || self.unrung > 0) {
            return;
        }
        (self.asks, self.answers) = (false, false);
        // SYNC POINT link-sleep: the slots' stores, this fence, the load; against `prepare_sleep`.
        fence(Ordering::SeqCst);
        if self.send_header.asleep.0.load(Ordering::Relaxed) != 0
            && let Some(wake) = &self.wake
        {
            wake.ring();
        }
    }

    /// Something was done by grants of the other end's, which is woken to count it unless it looks anyway. `fetched`: by READs and
    /// the like, so that more of them may have to be allowed. `counted`: there is something to be counted. Whoever was woken for less
    /// would sleep on, and not be woken again for a while.
    #[inline(always)]
    pub fn tell_of_use(&mut self, now: Nanos, fetched: bool, counted: bool) {
        if fetched && self.grants.must_ask() {
            self.ask_for_more();
        }
        if counted
            && self.grants.must_tell(now)
            && let Some(wake) = &self.wake
        {
            wake.ring();
        }
    }

    /// If there is no room for that, the next READ asks.
    #[cold]
    pub(crate) fn ask_for_more(&mut self) {
        if self.has_room(0) == Ok(true) {
            self.send.push(&wire::bare(Kind::MORE));
            self.asks = true;
            self.flush();
        }
    }

    /// About to sleep; false if a message came meanwhile.
    #[must_use]
    pub fn prepare_sleep(&self) -> bool {
        self.receive_header.asleep.0.store(1, Ordering::Relaxed);
        // SYNC POINT link-sleep: against `flush`.
        fence(Ordering::SeqCst);
        self.receive.peek().is_none()
    }

    /// We poll again.
    pub fn awake(&self) {
        self.receive_header.asleep.0.store(0, Ordering::Relaxed);
    }

    /// `bytes` at `offset` of what the other end calls `share`.
    #[must_use]
    pub fn shared_piece(&self, share: u32, offset: u64, bytes: u32) -> Option<Piece<'_>> {
        Piece::of(&self.shares.get(&share)?.mapping, usize::try_from(offset).ok()?, bytes as usize)
    }
}
