//! What the worker does while there is nothing to do.

use crate::pacing::Nanos;
use crate::sandbox::Slices;

/// What to do when a turn found nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// Look again at once.
    Spin,
    /// Let others run first.
    Yield,
    /// Until something comes.
    Sleep,
}

/// Decides between spinning, yielding and sleeping, and when to try another processor.
///
/// Work that comes within the budget is met spinning; the budget grows when sleeps turn out short and shrinks when they
/// turn out long. That busy threads outnumber processors shows when a yield comes back late, or when the worker has lost its
/// processor in the midst of spinning. What it waits for can then only come from a thread that needs this processor: for a while
/// the worker yields almost at once instead of spinning. Whoever polls through our library does the same, so that each has the
/// processor when it has work. An application that spins on memory itself would keep it for its whole slice: after such a one
/// the worker sleeps instead, because a sleeper with a short slice gets the processor back when it is woken.
///
/// Looks at the clock are [`APART`], however long a turn takes: on a slow processor, an emulated one say, as many turns as a quick one
/// makes in a microsecond would be more than the budget, and look like a processor that was lost.
#[derive(Debug)]
pub struct Spinner {
    max: Nanos,
    budget: Nanos,
    idle_since: Nanos,
    looked: Nanos,
    turns: u32,
    /// Turns between two looks at the clock.
    look: u32,
    /// The turn of the last look, of the next one, and of the next yield.
    looked_turn: u32,
    look_at: u32,
    yield_at: u32,
    crowded: bool,
    crowded_until: Nanos,
    greedy_until: Nanos,
    /// How long yields take of late.
    typical: Nanos,
    move_at: Nanos,
    move_pause: Nanos,
    trial: Option<Trial>,
}

/// Another processor is tried.
#[derive(Debug)]
struct Trial {
    /// How long yields took where the worker was before.
    before: Nanos,
    yields: u32,
    took: Nanos,
}

/// Between two looks at the clock.
const APART: Nanos = 1_000;
/// Idle turns between two looks, at most ...
const LOOK: u32 = 32;
/// ... and while processors are crowded.
const CROWDED_LOOK: u32 = 4;
/// Idle turns between two yields.
const YIELD: u32 = 1024;
/// A yield that takes longer than this gave the processor to somebody ...
const LONG_YIELD: Nanos = 1_500;
/// ... and one that takes longer than this, to somebody who did not give it back of his own will.
const GREEDY_YIELD: Nanos = 50_000;
/// Between two looks that are further apart, somebody else had the processor.
const PREEMPTED: Nanos = 20_000;
/// How long that is remembered.
const CROWDED: Nanos = 5_000_000;
/// Yields by which another processor is judged.
const TRIAL: u32 = 16;
/// Between two tries on another processor: at first, and when the tries before were of no use.
const MOVE_PAUSE: Nanos = 10_000_000;
const LONGEST_MOVE_PAUSE: Nanos = 1_000_000_000;
/// The budget for spinning while processors are crowded.
const CROWDED_BUDGET: Nanos = 1_000;

impl Spinner {
    pub fn new(max: Nanos) -> Self {
        Self {
            max,
            budget: max,
            idle_since: 0,
            looked: 0,
            turns: 0,
            look: LOOK,
            looked_turn: 0,
            look_at: LOOK,
            yield_at: YIELD,
            crowded: false,
            crowded_until: 0,
            greedy_until: 0,
            typical: 0,
            move_at: 0,
            move_pause: MOVE_PAUSE,
            trial: None,
        }
    }

    pub fn worked(&mut self) {
        self.turns = 0;
        self.look_at = self.turns_apart();
        self.yield_at = YIELD;
        self.idle_since = 0;
    }

    fn turns_apart(&self) -> u32 {
        if self.crowded { self.look.min(CROWDED_LOOK) } else { self.look }
    }

    /// So many turns took so long.
    fn timed(&mut self, turns: u32, took: Nanos) {
        // What took longest was not a turn, if the processor was lost.
        let turn = (took.min(PREEMPTED) / u64::from(turns.max(1))).max(1);
        self.look = ((APART / turn) as u32).clamp(1, LOOK);
    }

    pub fn idle(&mut self, clock: impl Fn() -> Nanos) -> Pause {
        self.turns += 1;
        if self.turns < self.look_at {
            return Pause::Spin;
        }
        let now = clock();
        if self.idle_since == 0 {
            self.idle_since = now;
        } else {
            let (turns, took) = (self.turns - self.looked_turn, now - self.looked);
            if took > PREEMPTED {
                self.crowded_until = now + CROWDED;
            }
            self.timed(turns, took);
        }
        (self.looked, self.looked_turn) = (now, self.turns);
        let idle = now - self.idle_since;
        self.crowded = now < self.crowded_until;
        self.look_at = self.turns + self.turns_apart();
        let budget = if now < self.greedy_until { CROWDED_BUDGET.min(self.budget) } else { self.budget };
        if idle >= budget {
            Pause::Sleep
        } else if self.crowded || self.turns >= self.yield_at {
            self.yield_at = self.turns + YIELD;
            Pause::Yield
        } else {
            Pause::Spin
        }
    }

    /// What the worker's time slices should be: the usual ones as long as it shares a processor by yields.
    pub fn slices(&self) -> Slices {
        if self.crowded && self.looked >= self.greedy_until { Slices::Usual } else { Slices::Short }
    }

    /// Yields. True if the worker should try its luck on another processor.
    pub fn yielded(&mut self, clock: impl Fn() -> Nanos, give_way: impl FnOnce()) -> bool {
        let before = clock();
        give_way();
        let after = clock();
        self.looked = after;
        let took = after - before;
        self.typical = (7 * self.typical + took) / 8;
        if self.tried(took) {
            return true;
        }
        if took <= LONG_YIELD {
            return false;
        }
        if took > GREEDY_YIELD {
            self.greedy_until = after + CROWDED;
        }
        self.crowded_until = after + CROWDED;
        let due = self.trial.is_none() && after >= self.move_at;
        if due {
            self.move_at = after + self.move_pause;
            self.trial = Some(Trial { before: self.typical, yields: 0, took: 0 });
        }
        due
    }

    /// A yield on the processor that is being tried. True if that is no better than the one before.
    fn tried(&mut self, took: Nanos) -> bool {
        let Some(trial) = &mut self.trial else { return false };
        trial.yields += 1;
        trial.took += took;
        if trial.yields < TRIAL {
            return false;
        }
        let better = trial.took / u64::from(TRIAL) < trial.before / 2;
        self.trial = None;
        self.move_pause = if better { MOVE_PAUSE } else { (2 * self.move_pause).min(LONGEST_MOVE_PAUSE) };
        !better
    }

    pub fn slept(&mut self, from: Nanos, to: Nanos) {
        self.worked();
        let slept = to.saturating_sub(from);
        self.budget = if slept < 2 * self.max { self.budget * 2 } else { self.budget / 2 };
        self.budget = self.budget.clamp(self.max / 8, self.max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn turns_until_sleep(spinner: &mut Spinner, step: Nanos) -> u32 {
        turns_until_sleep_at(spinner, &Cell::new(1), step)
    }

    fn turns_until_sleep_at(spinner: &mut Spinner, time: &Cell<Nanos>, step: Nanos) -> u32 {
        for turn in 1.. {
            time.set(time.get() + step);
            if spinner.idle(|| time.get()) == Pause::Sleep {
                return turn;
            }
        }
        unreachable!()
    }

    #[test]
    fn spins_for_the_budget_and_then_sleeps() {
        let turns = turns_until_sleep(&mut Spinner::new(50_000), 10);
        assert!((5_000..5_200).contains(&turns), "{turns} turns of 10 ns");
    }

    #[test]
    fn spins_for_the_budget_however_slow_a_turn() {
        let mut spinner = Spinner::new(50_000);
        // The first time, it learns how long a turn takes.
        turns_until_sleep(&mut spinner, 3_000);
        spinner.slept(0, 0);
        spinner.crowded_until = 0;
        let time = Cell::new(1_000_000_000);
        let turns = turns_until_sleep_at(&mut spinner, &time, 3_000);
        assert!((17..=18).contains(&turns), "{turns} turns of 3 µs");
        assert_eq!(spinner.crowded_until, 0, "slow turns are no lost processor");
        // And quick ones again.
        spinner.slept(0, 0);
        let turns = turns_until_sleep_at(&mut spinner, &time, 10);
        assert!((5_000..5_200).contains(&turns), "{turns} turns of 10 ns");
    }

    #[test]
    fn long_sleeps_make_it_spin_less_and_short_ones_more() {
        let mut spinner = Spinner::new(80_000);
        for _ in 0..10 {
            spinner.slept(0, 1_000_000_000);
        }
        assert_eq!(spinner.budget, 10_000);
        for _ in 0..10 {
            spinner.slept(0, 20_000);
        }
        assert_eq!(spinner.budget, 80_000);
    }

    #[test]
    fn sleeps_almost_at_once_after_somebody_kept_the_processor_and_for_a_while() {
        let mut spinner = Spinner::new(50_000);
        let time = Cell::new(1);
        assert!(spinner.yielded(|| time.get(), || time.set(MOVE_PAUSE)));
        assert!(!spinner.yielded(|| time.get(), || time.set(MOVE_PAUSE + 2 * GREEDY_YIELD)));
        let crowded = turns_until_sleep(&mut spinner, 10);
        assert!(crowded <= 2 * LOOK + CROWDED_BUDGET as u32 / 10, "{crowded} turns");
        assert_eq!(spinner.slices(), Slices::Short);
        spinner.worked();
        (spinner.crowded_until, spinner.greedy_until) = (0, 0);
        assert!(turns_until_sleep(&mut spinner, 10) > 4_000);
    }

    #[test]
    fn gives_way_almost_at_once_to_those_who_give_way() {
        let mut spinner = Spinner::new(50_000);
        let time = Cell::new(1);
        spinner.yielded(|| time.get(), || time.set(5_000));
        let first = (1..).find(|_| spinner.idle(|| time.get()) == Pause::Yield).unwrap();
        assert_eq!(spinner.slices(), Slices::Usual);
        assert!(first <= LOOK, "{first} turns");
        let next = (1..).find(|_| spinner.idle(|| time.get()) == Pause::Yield).unwrap();
        assert_eq!(next, CROWDED_LOOK);
        // It sleeps when the budget is used up nevertheless.
        assert!((5_000..5_200).contains(&turns_until_sleep_at(&mut spinner, &time, 10)));
    }

    /// Whether the worker is to move, of so many yields of this length.
    fn moves(spinner: &mut Spinner, time: &Cell<Nanos>, yields: u32, took: Nanos) -> Vec<u32> {
        let clock = || time.get();
        (0..yields).filter(|_| spinner.yielded(clock, || time.set(time.get() + took))).collect()
    }

    #[test]
    fn tries_another_processor_and_comes_back_if_that_is_no_better() {
        let mut spinner = Spinner::new(50_000);
        let time = Cell::new(MOVE_PAUSE);
        // There and back again, twice in so long a time.
        assert_eq!(moves(&mut spinner, &time, 1000, 5_000), [0, TRIAL]);
        assert_eq!(moves(&mut spinner, &time, 4000, 5_000).len(), 2);
        // The next one is better, and it stays.
        let gone = moves(&mut spinner, &time, 8000, 5_000).len() as u32;
        assert!(gone < 4, "the pauses grow: {gone}");
        time.set(time.get() + 10 * LONGEST_MOVE_PAUSE);
        assert_eq!(moves(&mut spinner, &time, 1, 5_000), [0]);
        assert!(moves(&mut spinner, &time, 10_000, 500).is_empty());
    }

    #[test]
    fn notices_that_it_has_lost_the_processor() {
        let mut spinner = Spinner::new(50_000);
        let time = Cell::new(1);
        for _ in 0..LOOK {
            assert_eq!(spinner.idle(|| time.get()), Pause::Spin);
        }
        time.set(PREEMPTED + 2);
        assert!((0..LOOK).any(|_| spinner.idle(|| time.get()) == Pause::Yield));
    }

    #[test]
    fn asks_now_and_then_whether_somebody_wants_the_processor() {
        let mut spinner = Spinner::new(1_000_000_000);
        let yields = (0..10 * YIELD).filter(|_| spinner.idle(|| 1) == Pause::Yield).count();
        assert_eq!(yields, 10);
    }
}
