//! How much of what a neighbour says on its socket is listened to.
//!
//! Most messages stop the data plane's thread for a moment, and one that was taken over could send them without end. So each is
//! charged, and who has said too much is not listened to until that is paid off with time: its messages wait in its socket.
//! Answers are not charged, as there is one to each offer of ours; nor is the end of what was offered before. So an honest neighbour
//! is not held up by them, nor does its socket fill up, by which it would lose the link.

use super::Message;
use crate::pacing::Nanos;

/// What memory that is shown costs, and whatever is not counted otherwise: 16 messages a millisecond, about as many as an honest proxy
/// can say.
const COST: Nanos = 1_000_000 / 16;
/// What a grant costs: more of them may follow one another, and none of them has queue pairs looked for that wait.
const COST_OF_GRANT: Nanos = COST / 4;
/// What may be said at once.
const BURST: Nanos = 64 * COST;

/// What a neighbour has said of late.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Hearing {
    /// When all of it is paid off.
    paid_at: Nanos,
    /// What it has offered and not taken back.
    offers: u64,
}

impl Hearing {
    /// Of a process that owes so much for what it said over links that have ended.
    pub fn owing(paid_at: Nanos) -> Self {
        Self { paid_at, offers: 0 }
    }

    /// When all that was said is paid off.
    pub fn paid_at(self) -> Nanos {
        self.paid_at
    }

    /// From when on it is listened to.
    pub fn again_at(self) -> Nanos {
        self.paid_at.saturating_sub(BURST)
    }

    pub fn charge(&mut self, message: &Message, now: Nanos) {
        let cost = match message {
            Message::Shared { .. } | Message::Refused { .. } => 0,
            Message::Unshare { .. } if self.offers > 0 => {
                self.offers -= 1;
                0
            }
            Message::Share { .. } => {
                self.offers += 1;
                COST
            }
            Message::Grant(_) => COST_OF_GRANT,
            Message::Hello { .. } | Message::Welcome {} | Message::Unshare { .. } | Message::Page { .. } => COST,
        };
        self.paid_at = self.paid_at.max(now) + cost;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARE: Message = Message::Share { share: 1, runs: Vec::new(), writable: false };
    const UNSHARE: Message = Message::Unshare { share: 1 };
    const START: Nanos = 1_000_000_000;

    /// How many are listened to within so long, of one that says them whenever it is listened to.
    fn heard(hearing: &mut Hearing, message: &Message, within: Nanos) -> usize {
        let times = (START..START + within).step_by(1000);
        let may_speak = |at: &Nanos, hearing: &Hearing| hearing.again_at() <= *at;
        times.filter(|at| may_speak(at, hearing) && (hearing.charge(message, *at), true).1).count()
    }

    #[test]
    fn who_says_too_much_is_heard_at_a_rate() {
        let many = heard(&mut Hearing::default(), &SHARE, 1_000_000_000);
        assert!((16_000..16_100).contains(&many), "{many} in a second");
        assert!(heard(&mut Hearing::default(), &SHARE, 64_000) >= 64, "some are heard at once");
        let many = heard(&mut Hearing::default(), &UNSHARE, 1_000_000_000);
        assert!((16_000..16_100).contains(&many), "{many} ends of nothing in a second");
    }

    #[test]
    fn the_end_of_what_was_offered_costs_nothing() {
        let mut hearing = Hearing::default();
        (0..64).for_each(|_| hearing.charge(&SHARE, START));
        (0..64).for_each(|_| hearing.charge(&UNSHARE, START));
        assert!(hearing.again_at() <= START);
        (0..2).for_each(|_| hearing.charge(&UNSHARE, START));
        assert!(hearing.again_at() > START);
        hearing.charge(&Message::Shared { share: 1 }, START);
        assert_eq!(hearing.again_at(), START + 2 * COST);
        assert_eq!(Hearing::owing(hearing.paid_at()).again_at(), hearing.again_at(), "another link is no way out");
    }
}
