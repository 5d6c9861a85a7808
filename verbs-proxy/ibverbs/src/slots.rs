//! What the card has been given and has not answered, by the number that its completion will bring back.
//!
//! A number says which place in a table, and which of those that had the place over time: what comes back for a former life, of a
//! queue pair that was reset or destroyed meanwhile, names nobody.

use ringfence_proxy::device::WorkPiece;

/// What was posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    /// A piece of a send request.
    Send(WorkPiece),
    /// A receive request of this queue pair.
    Receive {
        /// Bell number.
        queue: u32,
        /// [`ringfence_proxy::plane::qp::Qp::incarnation`].
        incarnation: u64,
    },
}

/// The `wr_id` of something that was posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(pub u64);

#[derive(Debug)]
struct Slot {
    life: u32,
    posted: Option<Posted>,
}

/// The table.
#[derive(Debug, Default)]
pub struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl Slots {
    /// Notes what is about to be posted. As many places as are in use at once are ever made: the completion queues bound them.
    pub fn note(&mut self, posted: Posted) -> Token {
        let place = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { life: 0, posted: None });
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[place as usize];
        slot.posted = Some(posted);
        Token(u64::from(slot.life) << 32 | u64::from(place))
    }

    /// Takes out what has this number. `None` if that was taken out before.
    pub fn take(&mut self, token: Token) -> Option<Posted> {
        let (place, life) = (token.0 as u32, (token.0 >> 32) as u32);
        let slot = self.slots.get_mut(place as usize).filter(|slot| slot.life == life)?;
        let posted = slot.posted.take()?;
        slot.life = slot.life.wrapping_add(1);
        self.free.push(place);
        Some(posted)
    }

    /// Whether the card has nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(queue: u32) -> Posted {
        Posted::Receive { queue, incarnation: 1 }
    }

    #[test]
    fn a_number_names_what_was_noted_with_it_and_nothing_later() {
        let mut slots = Slots::default();
        let (a, b) = (slots.note(receive(1)), slots.note(receive(2)));
        assert_eq!(slots.take(a), Some(receive(1)));
        assert_eq!(slots.take(a), None);
        let c = slots.note(receive(3));
        assert_eq!(c.0 as u32, a.0 as u32, "a place is used again");
        assert_eq!(slots.take(a), None, "of a former life");
        assert_eq!((slots.take(c), slots.take(b)), (Some(receive(3)), Some(receive(2))));
        assert!(slots.is_empty());
    }

    #[test]
    fn numbers_that_were_never_given_name_nothing() {
        let mut slots = Slots::default();
        assert_eq!(slots.take(Token(0)), None);
        slots.note(receive(1));
        assert_eq!(slots.take(Token(7)), None);
        assert_eq!(slots.take(Token(1 << 32)), None);
        assert!(!slots.is_empty());
    }
}
