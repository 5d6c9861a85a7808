//! What requests are called on the card: the number that a completion brings back as `wr_id`.
//!
//! A name says which queue pair, which of its lives, and which request of that life, counted in the order of posting. What comes back
//! of a former life, of a queue pair that was reset or destroyed meanwhile, names nobody.

/// Whether a request sends or receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A piece of a send request.
    Send,
    /// A receive request.
    Receive,
}

/// A queue pair's life: from one RESET to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Life(u32);

/// What a request is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    /// What it is.
    pub kind: Kind,
    /// Bell number of its queue pair.
    pub queue: u32,
    /// In which life.
    pub life: Life,
    /// Which request of its kind.
    pub number: Number,
}

/// Bits of a request's number, far more than a queue holds requests; and of a life's, far more than there are while one completion
/// lies in a completion queue, which is emptied at the end of each life.
const NUMBER_BITS: u32 = 24;
const LIFE_BITS: u32 = 24;
const LOW: u32 = (1 << NUMBER_BITS) - 1;
const RECEIVE: u64 = 1 << 63;

/// The number of a request in a queue pair's life. It wraps around.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Number(u32);

impl Number {
    /// The one that comes so much later.
    #[must_use]
    pub fn after(self, count: usize) -> Self {
        Self(self.0.wrapping_add(count as u32) & LOW)
    }

    /// How much later it is than `first`.
    #[must_use]
    pub fn since(self, first: Self) -> usize {
        (self.0.wrapping_sub(first.0) & LOW) as usize
    }
}

impl Name {
    /// For the card.
    #[must_use]
    pub fn wr_id(self) -> u64 {
        let kind = if self.kind == Kind::Receive { RECEIVE } else { 0 };
        kind | u64::from(self.queue) << (LIFE_BITS + NUMBER_BITS)
            | u64::from(self.life.0) << NUMBER_BITS
            | u64::from(self.number.0)
    }

    /// From the card.
    #[must_use]
    pub fn of(wr_id: u64) -> Self {
        Self {
            kind: if wr_id & RECEIVE == 0 { Kind::Send } else { Kind::Receive },
            queue: ((wr_id & !RECEIVE) >> (LIFE_BITS + NUMBER_BITS)) as u32,
            life: Life((wr_id >> NUMBER_BITS) as u32 & ((1 << LIFE_BITS) - 1)),
            number: Number(wr_id as u32 & LOW),
        }
    }
}

/// The present life of each queue pair, by bell number.
#[derive(Debug, Default)]
pub struct Lives(Vec<u32>);

impl Lives {
    /// The life that this queue pair, or whoever has its bell number, leads now.
    #[must_use]
    pub fn now(&self, queue: u32) -> Life {
        Life(self.0.get(queue as usize).copied().unwrap_or(0))
    }

    /// It is over.
    pub fn end(&mut self, queue: u32) {
        let index = queue as usize;
        if self.0.len() <= index {
            self.0.resize(index + 1, 0);
        }
        self.0[index] = self.0[index].wrapping_add(1) & ((1 << LIFE_BITS) - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_protocol::doorbell::MAX_QUEUES;

    #[test]
    fn a_name_comes_back_as_it_went() {
        for kind in [Kind::Send, Kind::Receive] {
            for (queue, life, number) in [(0, 0, 0), (MAX_QUEUES - 1, (1 << LIFE_BITS) - 1, LOW), (7, 1, 2)] {
                let name = Name { kind, queue, life: Life(life), number: Number(number) };
                assert_eq!(Name::of(name.wr_id()), name);
            }
        }
    }

    #[test]
    fn a_life_that_is_over_is_no_more_and_others_go_on() {
        let mut lives = Lives::default();
        let (one, other) = (lives.now(3), lives.now(4));
        lives.end(3);
        assert_ne!(lives.now(3), one);
        assert_eq!(lives.now(4), other);
    }

    #[test]
    fn numbers_wrap_around() {
        let last = Number::default().after(LOW as usize);
        assert_eq!(last.after(1), Number::default());
        assert_eq!(last.after(3).since(last), 3);
    }
}
