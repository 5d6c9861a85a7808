//! How a producer tells the worker that a send ring has work, without a system call unless the worker sleeps.
//!
//! Three levels, from cheap to dear:
//! 1. The worker polls the queues that were active a moment ago. It says so in the queue's [`QueueBell`]; the
//!    producer then does nothing beyond writing the entry.
//! 2. Otherwise the producer sets the queue's bit in the container's [`Doorbells`].
//! 3. If the worker sleeps, the producer also sends a byte on its socket.
//!
//! Each level is a store, a sequentially consistent fence, and a load of what the other side stores before *its*
//! fence and load: at least one of the two sees the other's store, so no work is left lying. io_uring's
//! `IORING_SQ_NEED_WAKEUP` rests on the same argument.
//!
//! The same memory carries the question by which the container learns that the worker has done with memory that it may no
//! longer touch: [`Doorbells::ask`].

use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// Words of queue bits.
pub const BELL_WORDS: usize = 64;

/// Queues that one container's doorbells can name.
pub const MAX_QUEUES: u32 = (BELL_WORDS * 64) as u32;

/// A value on a cache line of its own.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct Line<T>(pub T);

/// In a queue's shared header: whether its producer must ring. Written by the worker, read by the producer.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct QueueBell {
    /// Zero: ring. Fresh memory is zero, so a queue that the worker has not met yet rings.
    polled: AtomicU32,
}

impl QueueBell {
    /// Producer: after its entries are written, whether it must ring.
    #[inline(always)]
    #[must_use]
    pub fn must_ring(&self) -> bool {
        // SYNC POINT queue-bell: the entry's store, then this fence, then the load; against `stop_polling`.
        fence(Ordering::SeqCst);
        self.polled.load(Ordering::Relaxed) == 0
    }

    /// Worker: from now on it looks at the ring by itself.
    #[inline]
    pub fn start_polling(&self) {
        self.polled.store(1, Ordering::Relaxed);
    }

    /// Worker: from now on the producer must ring. The worker must look at the ring once more after this.
    #[inline]
    pub fn stop_polling(&self) {
        self.polled.store(0, Ordering::Relaxed);
        // SYNC POINT queue-bell: against `must_ring`.
        fence(Ordering::SeqCst);
    }
}

/// The doorbells of one container, shared by all its processes.
///
/// One process of a container can ring for, or silence, another of the same container: the fence is around the
/// container, not inside it.
#[repr(C)]
#[derive(Debug)]
pub struct Doorbells {
    asleep: Line<AtomicU32>,
    summary: Line<AtomicU64>,
    words: [AtomicU64; BELL_WORDS],
    /// Questions asked, and up to which of them they are answered.
    asked: Line<AtomicU64>,
    answered: Line<AtomicU64>,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Doorbells>() == 256 + BELL_WORDS * 8);

/// Where the queues' bits stand, a word for each 64 queues.
#[cfg(not(loom))]
pub const WORDS_OFFSET: u64 = core::mem::offset_of!(Doorbells, words) as u64;
/// Where one bit for each of those words stands.
#[cfg(not(loom))]
pub const SUMMARY_OFFSET: u64 = core::mem::offset_of!(Doorbells, summary) as u64;

impl Default for Doorbells {
    fn default() -> Self {
        Self {
            asleep: Line::default(),
            summary: Line::default(),
            words: core::array::from_fn(|_| AtomicU64::new(0)),
            asked: Line::default(),
            answered: Line::default(),
        }
    }
}

/// A question to the worker; see [`Doorbells::ask`].
#[derive(Clone, Copy, Debug)]
#[must_use = "nothing is over before it is answered"]
pub struct Question(u64);

impl Doorbells {
    /// Producer: queue number `queue` has work. True if the worker sleeps and must be woken by its socket.
    ///
    /// `queue` is taken modulo [`MAX_QUEUES`].
    #[inline]
    #[must_use]
    pub fn ring(&self, queue: u32) -> bool {
        let queue = queue as usize % MAX_QUEUES as usize;
        let word = queue / 64;
        // SYNC POINT bell-word: Release, so that who takes the bit sees the entries; against `take`.
        self.words[word].fetch_or(1 << (queue % 64), Ordering::Release);
        self.summary.0.fetch_or(1 << word, Ordering::Release);
        // SYNC POINT sleep: the bit's store, this fence, the load; against `prepare_sleep`.
        fence(Ordering::SeqCst);
        self.asleep.0.load(Ordering::Relaxed) != 0
    }

    /// Worker: whether any bit may be set; cheap enough for every turn.
    #[inline(always)]
    #[must_use]
    pub fn any(&self) -> bool {
        self.summary.0.load(Ordering::Relaxed) != 0
    }

    /// Worker: takes all set bits, calling `queue` for each.
    pub fn take(&self, mut queue: impl FnMut(u32)) {
        // Summary first: a bit set after this is announced by a summary bit set after this.
        let mut summary = self.summary.0.swap(0, Ordering::Acquire);
        while summary != 0 {
            let word = summary.trailing_zeros() as usize;
            summary &= summary - 1;
            // SYNC POINT bell-word: against `ring`.
            let mut bits = self.words[word].swap(0, Ordering::Acquire);
            while bits != 0 {
                queue((word * 64) as u32 + bits.trailing_zeros());
                bits &= bits - 1;
            }
        }
    }

    /// Worker: about to sleep. True if it may; false if a bell rang meanwhile. Call [`Self::awake`] afterwards.
    #[must_use]
    pub fn prepare_sleep(&self) -> bool {
        // SYNC POINT rest: Release, so that who sees this sees the last turn's accesses finished; against `is_answered`.
        self.asleep.0.store(1, Ordering::Release);
        // SYNC POINT sleep: against `ring`.
        fence(Ordering::SeqCst);
        self.summary.0.load(Ordering::Relaxed) == 0
    }

    /// Worker: it polls again.
    pub fn awake(&self) {
        self.asleep.0.store(0, Ordering::Relaxed);
        // SYNC POINT withdrawal: this store, the fence, the loads of key words in the turns to come; against `is_answered`.
        fence(Ordering::SeqCst);
    }

    /// Container: having withdrawn keys ([`crate::keys`]), asks when every access is over that was begun before.
    pub fn ask(&self) -> Question {
        // SYNC POINT turn: Release, so that a worker that has read this reads the withdrawn words; against `answer`.
        Question(self.asked.0.fetch_add(1, Ordering::AcqRel).wrapping_add(1))
    }

    /// Container: whether the answer is there, or is not needed because the worker sleeps: then it is in no access, and
    /// sees what was withdrawn when it wakes.
    #[must_use]
    pub fn is_answered(&self, question: Question) -> bool {
        // SYNC POINT turn: Acquire, so that the accesses are over; against `answer`.
        if self.answered.0.load(Ordering::Acquire).wrapping_sub(question.0) as i64 >= 0 {
            return true;
        }
        // SYNC POINT withdrawal: the words' stores, this fence, the load; against `awake`.
        fence(Ordering::SeqCst);
        // SYNC POINT rest: Acquire; against `prepare_sleep`.
        self.asleep.0.load(Ordering::Acquire) != 0
    }

    /// Worker: between two turns; `last` is what it answered last. Costs a load where nobody has asked.
    #[inline(always)]
    pub fn answer(&self, last: &mut u64) {
        // SYNC POINT turn: Acquire, against `ask`.
        let asked = self.asked.0.load(Ordering::Acquire);
        if asked != *last {
            *last = asked;
            // SYNC POINT turn: Release, against `is_answered`.
            self.answered.0.store(asked, Ordering::Release);
        }
    }
}
