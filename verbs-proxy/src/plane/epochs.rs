//! Which of a queue pair's pieces are void, though the device still has them.
//!
//! A piece carries the epoch in which it was posted. An epoch ends when the plane takes requests back, all from some place on: what
//! lies before that place is as good as before, however old it is.

/// A byte of a request: the request's number and the byte's.
pub type Place = (u32, u32);

/// The epochs of one queue pair.
#[derive(Debug, Default)]
pub struct Epochs {
    now: u64,
    /// From this epoch on pieces may count at all.
    since: u64,
    /// From this place on, those from this epoch on. Both grow.
    from: Vec<(Place, u64)>,
}

/// Whether `a` is behind `b` or the same. Numbers wrap around, and all that are compared are near each other.
fn reaches(a: Place, b: Place) -> bool {
    match a.0.wrapping_sub(b.0).cast_signed() {
        0 => a.1 >= b.1,
        ahead => ahead > 0,
    }
}

impl Epochs {
    /// The present epoch.
    #[inline(always)]
    #[must_use]
    pub fn now(&self) -> u64 {
        self.now
    }

    /// All pieces are void.
    pub fn renew(&mut self) {
        self.now += 1;
        self.since = self.now;
        self.from.clear();
    }

    /// All pieces are void that are not before `place`. `oldest`: the first byte that is without an answer.
    pub fn renew_from(&mut self, place: Place, oldest: Place) {
        if reaches(oldest, place) {
            return self.renew();
        }
        self.now += 1;
        // No piece is before the oldest: of the places there only the last matters.
        let answered = self.from.iter().take_while(|(from, _)| reaches(oldest, *from)).count();
        self.from.drain(..answered.saturating_sub(1));
        while self.from.pop_if(|(from, _)| reaches(*from, place)).is_some() {}
        self.from.push((place, self.now));
    }

    /// Whether a piece counts that was posted in this epoch and begins at this place.
    #[inline]
    #[must_use]
    pub fn count(&self, epoch: u64, place: Place) -> bool {
        let from = self.from.iter().rev().find(|(from, _)| reaches(place, *from));
        epoch >= from.map_or(self.since, |(_, epoch)| *epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a list of all pieces that are under way, each of which is struck out when it becomes void.
        #[test]
        fn what_was_taken_back_is_void_and_nothing_else(
            first in any::<u32>(),
            steps in prop::collection::vec((0u8..6, 0usize..12), 1..200),
        ) {
            let mut epochs = Epochs::default();
            // Place, epoch, and whether it counts; in order of places, but for those that are void.
            let mut pieces: Vec<(Place, u64, bool)> = Vec::new();
            let mut next: Place = (first, 0);
            for (what, which) in steps {
                let counting: Vec<usize> = (0..pieces.len()).filter(|at| pieces[*at].2).collect();
                match what {
                    // Three pieces to a request.
                    0..=2 => {
                        pieces.push((next, epochs.now(), true));
                        next = if next.1 == 2 { (next.0.wrapping_add(1), 0) } else { (next.0, next.1 + 1) };
                    }
                    3 | 4 if !counting.is_empty() => {
                        let place = pieces[counting[which % counting.len()]].0;
                        epochs.renew_from(place, pieces[counting[0]].0);
                        prop_assert!(epochs.from.len() <= counting.len());
                        for piece in pieces.iter_mut().filter(|piece| reaches(piece.0, place)) {
                            piece.2 = false;
                        }
                        next = place;
                    }
                    5 if which == 0 => {
                        epochs.renew();
                        pieces.iter_mut().for_each(|piece| piece.2 = false);
                    }
                    // The oldest is answered.
                    _ => {
                        if let Some(oldest) = counting.first() {
                            pieces.remove(*oldest);
                        }
                    }
                }
                for (place, epoch, counts) in &pieces {
                    // A void piece of before the oldest is none that anybody asks about: its request has its answer.
                    let oldest = pieces.iter().find(|piece| piece.2).map_or(next, |piece| piece.0);
                    if *counts || reaches(*place, oldest) {
                        prop_assert_eq!(epochs.count(*epoch, *place), *counts, "{:?} of epoch {}", place, epoch);
                    }
                }
            }
        }
    }
}
