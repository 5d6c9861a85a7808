//! Names of memory in messages, and how long they hold.
//!
//! A request names memory of the end that sends it: where the data of a SEND or a WRITE are. The other end copies them from there
//! when it comes to it. By then the queue pair can have ended, or the region be deregistered, and what the application keeps there
//! is nobody else's any more. So each message says the *generation* of its queue pair's names, and they hold as long as that
//! stands in the sender's word. As with grants ([`ringfence_protocol::grants`]), whoever copies is busy first, and checks within
//! the copy ([`crate::rseq`]).
//!
//! An answer to a READ names the sender's buffer, where the data are as they were. They stay there, whatever becomes of the queue
//! pair or the region that they were taken from, until the other end has them or the link ends: so answers have a word of their own.
//!
//! Queue pairs share words. Who loses a name because another queue pair has ended asks again, and loses nothing else.

use crate::memory::{Lost, Piece, copy_list, copy_list_while};
use crate::rseq::{Thread, Undone, While};
use ringfence_protocol::grants::{Busy, Slot};
use ringfence_protocol::ring::Position;
use std::sync::atomic::{Ordering, fence};

/// Words of one end for its requests.
pub const GROUPS: usize = 64;

/// The word of a queue pair of this number.
fn group(number: u32) -> usize {
    number as usize % GROUPS
}

/// The words of one end, which it alone writes.
#[repr(C)]
#[derive(Debug)]
pub struct Words {
    /// For what its requests name, by group of queue pairs.
    requests: [Slot; GROUPS],
    /// For what its answers name.
    answers: Slot,
}

#[derive(Clone, Copy, Debug, Default)]
struct Group {
    generation: u64,
    /// The last message with a name.
    last: Option<Position>,
}

#[cfg(test)]
impl Words {
    /// As one does that does not own them.
    pub(super) fn scribble(&self, generation: u64) {
        self.requests.iter().chain([&self.answers]).for_each(|word| word.grant(generation));
    }
}

impl Group {
    /// The message at this position names something: the generation to say.
    #[inline(always)]
    fn say(&mut self, message: Position) -> u64 {
        self.last = Some(message);
        self.generation
    }

    /// What was named holds no more. False if nothing of it is under way.
    fn end(&mut self, word: &Slot, consumed: Position) -> bool {
        // Also if another queue pair has ended it already: the other end may be at work on this one's.
        let under_way = self.last.is_some_and(|last| is_unread(last, consumed));
        if under_way {
            self.generation += 1;
            word.grant(self.generation);
        }
        under_way
    }
}

/// What one end has named.
#[derive(Debug)]
pub struct Names {
    requests: [Group; GROUPS],
    answers: Group,
}

impl Default for Names {
    fn default() -> Self {
        Self { requests: [Group::default(); GROUPS], answers: Group::default() }
    }
}

/// Whether the other end, which has read up to `consumed`, may still come to the message at this position.
pub(super) fn is_unread(message: Position, consumed: Position) -> bool {
    consumed.wrapping_sub(message).cast_signed() <= 0
}

impl Names {
    /// The request at this position names memory for the queue pair `number`: the generation to say.
    #[inline(always)]
    pub(super) fn say(&mut self, number: u32, message: Position) -> u64 {
        self.requests[group(number)].say(message)
    }

    /// The answer at this position names a place of the buffer: the generation to say.
    pub(super) fn say_answer(&mut self, message: Position) -> u64 {
        self.answers.say(message)
    }

    /// What requests of a queue pair have named holds no more. False if nothing of that is under way.
    pub(super) fn end_of(&mut self, number: u32, words: &Words, consumed: Position) -> bool {
        let ended = group(number);
        self.requests[ended].end(&words.requests[ended], consumed)
    }

    /// As [`Self::end_of`], for all requests.
    pub(super) fn end_requests(&mut self, words: &Words, consumed: Position) -> bool {
        let groups = self.requests.iter_mut().zip(&words.requests);
        groups.fold(false, |any, (group, word)| group.end(word, consumed) | any)
    }

    /// As [`Self::end_requests`], and for answers: the buffer goes.
    pub(super) fn end_all(&mut self, words: &Words, consumed: Position) -> bool {
        self.answers.end(&words.answers, consumed) | self.end_requests(words, consumed)
    }
}

/// What must hold while memory is copied that the other end named.
#[derive(Clone, Copy, Debug)]
pub struct Lasting<'a> {
    reading: &'a Busy,
    word: &'a Slot,
    generation: u64,
}

/// Why named memory was not copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uncopied {
    /// The name holds no more. What is copied in part is as it was while it held.
    Ended,
    /// Memory is gone.
    Lost(Lost),
}

impl<'a> Lasting<'a> {
    /// Of a request that says `generation` for the other end's queue pair `number`.
    #[inline(always)]
    pub(super) fn of_request(reading: &'a Busy, words: &'a Words, number: u32, generation: u64) -> Self {
        Self { reading, word: &words.requests[group(number)], generation }
    }

    /// Of an answer that says `generation`.
    #[inline(always)]
    pub(super) fn of_answer(reading: &'a Busy, words: &'a Words, generation: u64) -> Self {
        Self { reading, word: &words.answers, generation }
    }

    /// Copies `bytes` from the beginning of `from`, which was named, to the beginning of `to`, both of at least so many.
    ///
    /// # Errors
    /// If the name does not hold, or memory is gone.
    pub fn copy(
        &self,
        to: &[Piece<'_>],
        from: &[Piece<'_>],
        bytes: usize,
        aside: &mut Vec<u8>,
    ) -> Result<(), Uncopied> {
        let is_there = |pieces: &[Piece<'_>]| !pieces.iter().any(Piece::may_fault);
        if let Some(thread) = Thread::current()
            && is_there(to)
            && is_there(from)
        {
            self.reading.enter();
            let condition = While { word: self.word.as_ptr(), is: self.generation };
            let copied = copy_list_while(to, from, thread, condition);
            self.reading.leave();
            match copied {
                Ok(()) => return Ok(()),
                Err(Undone::Gone) => return Err(Uncopied::Ended),
                Err(Undone::Interrupted) => {}
            }
        }
        self.copy_aside(to, from, bytes, aside)
    }

    /// The same where a copy cannot be restarted: what was read while the name held is that, whoever was stopped meanwhile.
    #[inline(never)]
    fn copy_aside(
        &self,
        to: &[Piece<'_>],
        from: &[Piece<'_>],
        bytes: usize,
        aside: &mut Vec<u8>,
    ) -> Result<(), Uncopied> {
        aside.resize(bytes, 0);
        copy_list(&[Piece::of_own_mut(aside)], 0, from, 0, bytes).map_err(|_| Uncopied::Lost(Lost::Source))?;
        // What the other end's application wrote after the word changed is seen with the word, or not at all.
        fence(Ordering::Acquire);
        if !self.word.holds(self.generation) {
            return Err(Uncopied::Ended);
        }
        copy_list(to, 0, &[Piece::of_own(aside)], 0, bytes).map_err(|_| Uncopied::Lost(Lost::Target))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words() -> Words {
        Words { requests: std::array::from_fn(|_| Slot::default()), answers: Slot::default() }
    }

    #[test]
    fn what_has_been_read_needs_no_end() {
        let (mut names, words) = (Names::default(), words());
        assert!(!names.end_of(7, &words, 0), "nothing was named");
        assert_eq!(names.say(7, 100), 0);
        assert!(!names.end_of(7, &words, 101));
        assert!(!names.end_of(8, &words, 100), "of another word");
        assert!(names.end_of(7, &words, 100));
        assert!(words.requests[7].holds(1) && words.requests[8].holds(0));
        assert!(names.end_of(71, &words, 100), "the other end may be at it");
        assert_eq!(names.say(7, u32::MAX), 2);
        assert!(!names.end_all(&words, 0), "positions wrap");
    }

    #[test]
    fn answers_end_with_the_link_alone() {
        let (mut names, words) = (Names::default(), words());
        assert_eq!((names.say(7, 99), names.say_answer(100)), (0, 0));
        assert!(names.end_of(7, &words, 99) && names.end_requests(&words, 99));
        assert!(words.answers.holds(0));
        assert!(names.end_all(&words, 100), "the answer is unread");
        assert!(words.answers.holds(1));
    }

    #[test]
    fn names_are_copied_only_while_they_hold() {
        let (busy, words, mut aside) = (Busy::default(), words(), Vec::new());
        let source = [7u8; 5000];
        for restartable in [true, false] {
            let mut target = [0u8; 5000];
            let mut copy = |generation, target: &mut [u8]| {
                let lasting = Lasting::of_request(&busy, &words, 3, generation);
                let (to, from) = ([Piece::of_own_mut(target)], [Piece::of_own(&source)]);
                match restartable {
                    true => lasting.copy(&to, &from, 5000, &mut aside),
                    false => lasting.copy_aside(&to, &from, 5000, &mut aside),
                }
            };
            let generation = u64::from(!restartable);
            assert_eq!(copy(generation + 1, &mut target), Err(Uncopied::Ended));
            assert_eq!(target, [0; 5000]);
            assert_eq!(copy(generation, &mut target), Ok(()));
            assert_eq!(target, source);
            words.requests[3].grant(generation + 1);
            assert!(!Busy::says(busy.word()));
        }
    }
}
