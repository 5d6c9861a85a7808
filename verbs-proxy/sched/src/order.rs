//! Whose turn it is where one rate is for several parties: a container's own requests, and its neighbours who READ out of it.
//!
//! The container's own requests wait here and are there at the very moment at which the rate opens; a neighbour has been told when
//! to come again, and needs a while. Without turns the rate is for whoever is quickest, which is never the neighbour.

use crate::units::{Bytes, Nanos};

/// Who wants bytes to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Party {
    /// The container's own requests.
    Own,
    /// The neighbour with this port.
    Reader(u16),
}

/// How long after the time that it was told a neighbour's turn is kept: enough for a process to wake up and a message to come. A
/// burst is a millisecond at least, so what is earned meanwhile is not lost.
pub const GRACE: Nanos = Nanos::micros(500);

/// How long the container's own requests take to go when they may.
const PROMPT: Nanos = Nanos::micros(50);

/// Whoever looks less often than this does not see who comes in time.
const HERE: Nanos = Nanos::micros(200);

/// Start-time fair queueing among those who were refused (Goyal, Vin and Cheng, 1996), with room of a burst: whoever has had that
/// much more than another one who waits lets him go first.
#[derive(Clone, Debug, Default)]
pub struct Order {
    parties: Vec<Entry>,
    /// What those who begin to wait are taken to have had.
    floor: u64,
    /// When it was looked last whether somebody is late.
    looked: Nanos,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    party: Party,
    /// Bytes that it has had, counted from when all began.
    had: u64,
    /// It was refused, and waits.
    waits: Option<Wait>,
}

#[derive(Clone, Copy, Debug)]
struct Wait {
    /// When it comes again.
    told: Nanos,
    /// A neighbour who is not there by then has lost his turn.
    until: Nanos,
    /// Nobody was here to see whether he came, and he has had more time for that.
    excused: bool,
}

impl Order {
    /// Whether any neighbour waits, as far as is known without a clock.
    #[inline]
    #[must_use]
    pub fn any_reader(&self) -> bool {
        self.parties.iter().any(|entry| entry.party != Party::Own && entry.waits.is_some())
    }

    /// Whether any other than this one waits, at `now`.
    pub fn any_but(&mut self, party: Party, now: Nanos) -> bool {
        self.forget_late(now);
        self.parties.iter().any(|entry| entry.party != party && entry.waits.is_some())
    }

    /// Whether it is the turn of this party, or nobody else's; else when it should ask again. `room`: see [`Order`].
    pub fn turn(&mut self, party: Party, room: Bytes, now: Nanos) -> Result<(), Nanos> {
        self.forget_late(now);
        let had = self.entry(party).map_or(self.floor, |entry| entry.had.max(self.floor));
        let before = |entry: &&Entry| entry.party != party && entry.had.saturating_add(room.0) <= had;
        let others = self.parties.iter().filter(before).filter_map(|entry| {
            let wait = entry.waits?;
            Some(match entry.party {
                // It goes as soon as the rate lets it, and then that is closed again.
                Party::Own => wait.told.max(now).after(PROMPT),
                Party::Reader(_) => wait.until,
            })
        });
        match others.max() {
            Some(at) => Err(at.max(now.after(Nanos(1)))),
            None => Ok(()),
        }
    }

    /// A party was refused, and comes again at this time.
    pub fn waits(&mut self, party: Party, told: Nanos) {
        let floor = self.floor;
        let entry = self.entry_or_new(party);
        if entry.waits.is_none() {
            entry.had = entry.had.max(floor);
        }
        entry.waits = Some(Wait { told, until: told.after(GRACE), excused: false });
    }

    /// A party has had this much, and waits no more. Counts while others wait, or did not have as much.
    pub fn had(&mut self, party: Party, bytes: Bytes) {
        if self.parties.is_empty() {
            return;
        }
        let floor = self.floor;
        let entry = self.entry_or_new(party);
        let begun = if entry.waits.take().is_some() { entry.had } else { entry.had.max(floor) };
        entry.had = begun.saturating_add(bytes.0);
        let waiting = self.parties.iter().filter(|entry| entry.waits.is_some()).map(|entry| entry.had);
        self.floor = self.floor.max(waiting.min().map_or(begun, |least| least.min(begun)));
        let floor = self.floor;
        self.parties.retain(|entry| entry.waits.is_some() || entry.had > floor);
    }

    /// A party wants nothing any more.
    pub fn gave_up(&mut self, party: Party) {
        if let Some(entry) = self.parties.iter_mut().find(|entry| entry.party == party) {
            entry.waits = None;
        }
    }

    fn entry(&self, party: Party) -> Option<&Entry> {
        self.parties.iter().find(|entry| entry.party == party)
    }

    fn entry_or_new(&mut self, party: Party) -> &mut Entry {
        let at = self.parties.iter().position(|entry| entry.party == party).unwrap_or_else(|| {
            self.parties.push(Entry { party, had: self.floor, waits: None });
            self.parties.len() - 1
        });
        &mut self.parties[at]
    }

    /// A neighbour who does not come when he was told to has lost his turn; but once he is given more time, if nobody was here when
    /// he was due. Own requests wait here, and are not late.
    pub fn forget_late(&mut self, now: Nanos) {
        let before = self.looked;
        self.looked = now.max(before);
        let absent = now.since(before) > HERE;
        for entry in self.parties.iter_mut().filter(|entry| entry.party != Party::Own) {
            match &mut entry.waits {
                Some(wait) if wait.until < now && absent && wait.until >= before && !wait.excused => {
                    (wait.until, wait.excused) = (now.after(HERE), true);
                }
                Some(wait) if wait.until < now => entry.waits = None,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ROOM: Bytes = Bytes(1000);
    const ONE: Party = Party::Reader(1);
    const TWO: Party = Party::Reader(2);

    /// What goes at once, less than this.
    const PIECE: u64 = 3000;

    /// Own requests are the first of some parties.
    fn party(number: usize) -> Party {
        if number == 0 { Party::Own } else { Party::Reader(number as u16) }
    }

    proptest! {
        /// Parties that want more from some time on and ask in whatever order, one much more often than the others: none has had more
        /// than another since both do by more than the room and what goes at once, and whoever has had least is never refused.
        #[test]
        fn whoever_always_wants_more_has_as_much_as_the_others(
            parties in 2usize..10,
            asks in prop::collection::vec((0usize..100, 1..PIECE), 1..500),
        ) {
            let mut order = Order::default();
            let mut had: Vec<Option<u64>> = vec![None; parties];
            for (now, (who, bytes)) in (1..).map(Nanos).zip(asks) {
                // Every other time the first one asks.
                let who = if who % 2 == 0 { 0 } else { who / 2 % parties };
                // What it did not ask for before is lost.
                let least = had.iter().flatten().min().copied().unwrap_or(0);
                let has = had[who].get_or_insert(least);
                match order.turn(party(who), ROOM, now) {
                    Ok(()) => {
                        order.had(party(who), Bytes(bytes));
                        *has += bytes;
                        order.waits(party(who), now);
                    }
                    Err(at) => {
                        prop_assert!(at > now);
                        order.waits(party(who), at);
                    }
                }
                let (least, most) = (had.iter().flatten().min().unwrap(), had.iter().flatten().max().unwrap());
                // Whoever begins may be taken to have had a piece less than it has.
                prop_assert!(most - least < ROOM.0 + 2 * PIECE, "{had:?}");
                let last = had.iter().position(|had| had.as_ref() == Some(least)).unwrap();
                prop_assert_eq!(order.turn(party(last), Bytes(ROOM.0 + PIECE), now), Ok(()));
                prop_assert!(order.parties.len() <= parties);
            }
        }

        /// Whatever has been before, and however seldom anybody looks: a party waits for neighbours who do not come any more until
        /// they are late, and have been excused once.
        #[test]
        fn nobody_waits_for_ever_for_who_does_not_come(
            steps in prop::collection::vec((0usize..10, 0u8..3, 1u64..5000, 0u64..1_000_000), 1..100),
            asks in 0usize..10,
            seldom in 0u64..2_000_000,
        ) {
            let mut order = Order::default();
            let (mut now, mut told) = (Nanos(0), Nanos(0));
            for (who, action, bytes, time) in steps {
                match action {
                    0 => order.had(party(who), Bytes(bytes)),
                    1 => {
                        told = told.max(now.after(Nanos(time)));
                        order.waits(party(who), now.after(Nanos(time)));
                    }
                    _ => now = now.after(Nanos(time)),
                }
            }
            order.gave_up(Party::Own);
            let late = told.max(now).after(GRACE).after(Nanos(seldom)).after(HERE).after(Nanos(10));
            while let Err(at) = order.turn(party(asks), ROOM, now) {
                prop_assert!(at > now && at <= late, "until {at:?}, and all are late from {late:?} on");
                order.waits(party(asks), at);
                now = at.after(Nanos(seldom));
            }
        }
    }

    #[test]
    fn whoever_is_ahead_by_the_room_waits_for_who_was_refused() {
        let mut order = Order::default();
        assert_eq!(order.turn(Party::Own, ROOM, Nanos(0)), Ok(()));
        order.waits(ONE, Nanos(100));
        assert_eq!(order.turn(Party::Own, ROOM, Nanos(0)), Ok(()));
        order.had(Party::Own, Bytes(999));
        assert_eq!(order.turn(Party::Own, ROOM, Nanos(0)), Ok(()));
        order.had(Party::Own, Bytes(1));
        assert_eq!(order.turn(Party::Own, ROOM, Nanos(0)), Err(Nanos(100).after(GRACE)));
        assert_eq!(order.turn(ONE, ROOM, Nanos(0)), Ok(()));
        order.had(ONE, Bytes(1));
        assert_eq!(order.turn(Party::Own, ROOM, Nanos(0)), Ok(()));
    }

    #[test]
    fn whoever_was_not_here_waits_once_more_and_not_for_ever() {
        let mut order = Order::default();
        order.waits(ONE, Nanos(100));
        order.had(Party::Own, ROOM);
        assert!(order.turn(Party::Own, ROOM, Nanos(0)).is_err());
        let back = Nanos::millis(5);
        assert_eq!(order.turn(Party::Own, ROOM, back), Err(back.after(HERE)));
        assert_eq!(order.turn(Party::Own, ROOM, Nanos::millis(9)), Ok(()));
    }

    #[test]
    fn own_requests_are_never_late() {
        let mut order = Order::default();
        order.waits(Party::Own, Nanos(100));
        order.had(ONE, ROOM);
        assert!(order.turn(ONE, ROOM, Nanos::millis(50)).is_err());
        order.gave_up(Party::Own);
        assert_eq!(order.turn(ONE, ROOM, Nanos::millis(50)), Ok(()));
    }

    #[test]
    fn who_comes_too_late_has_lost_its_turn_and_what_it_had_less() {
        let mut order = Order::default();
        order.waits(ONE, Nanos(100));
        order.had(Party::Own, Bytes(5000));
        let late = Nanos(101).after(GRACE);
        assert!(order.turn(Party::Own, ROOM, Nanos(99).after(GRACE)).is_err());
        assert_eq!(order.turn(Party::Own, ROOM, late), Ok(()));
        order.waits(Party::Own, late);
        order.had(Party::Own, Bytes(1));
        // It begins where the other is now.
        order.waits(ONE, late);
        order.had(ONE, Bytes(1));
        assert_eq!(order.turn(Party::Own, ROOM, late), Ok(()));
        order.waits(Party::Own, late);
        order.had(ONE, Bytes(1001));
        assert!(order.turn(ONE, ROOM, late).is_err());
    }

    #[test]
    fn nothing_is_kept_of_those_who_are_even() {
        let mut order = Order::default();
        for round in 0..1000 {
            for party in [ONE, TWO, Party::Own] {
                order.waits(party, Nanos(round));
                order.had(party, Bytes(10));
            }
        }
        assert!(order.parties.len() <= 3);
        order.waits(Party::Own, Nanos(1000));
        order.had(Party::Own, Bytes(1));
        order.waits(Party::Own, Nanos(1000));
        order.had(Party::Own, Bytes(10_000));
        order.waits(TWO, Nanos(1000));
        order.had(TWO, Bytes(1));
        assert!(order.parties.len() <= 2, "{order:?}");
    }

    #[test]
    fn the_extremes_do_not_overflow() {
        let mut order = Order::default();
        order.waits(ONE, Nanos::NEVER);
        for _ in 0..3 {
            order.had(Party::Own, Bytes(u64::MAX));
        }
        assert!(order.turn(Party::Own, ROOM, Nanos(0)).is_err());
        assert_eq!(order.turn(ONE, Bytes(u64::MAX), Nanos::NEVER), Ok(()));
    }
}
