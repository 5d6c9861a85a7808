//! What is fair between containers that together want more than there is: weighted max-min shares.
//!
//! Water is filled into vessels whose widths are the weights. A vessel that is full, because its container wants or may have
//! no more, takes none, and one with a guarantee starts filled so far. The level rises until all water is used.

use crate::units::{BitRate, Weight};

/// What one container wants and may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contender {
    /// Its part of what is contended.
    pub weight: Weight,
    /// What it would send if nobody else was there, bits per second; never more than its cap counts.
    pub demand: u64,
    /// What it may have at most.
    pub cap: Option<BitRate>,
    /// What it has in any case, if it wants that much, bits per second.
    pub guarantee: u64,
}

impl Contender {
    fn most(&self) -> u64 {
        self.cap.map_or(self.demand, |cap| self.demand.min(cap.bits()))
    }

    fn least(&self) -> u64 {
        self.guarantee.min(self.most())
    }
}

/// Each contender's share of `capacity` bits per second, in order.
///
/// Nobody gets more than it wants, and nothing is left over while somebody wants more, but for less than one bit per contender
/// from rounding. Guarantees that together are beyond the capacity are all cut by the same factor.
#[must_use]
pub fn fill(capacity: BitRate, contenders: &[Contender]) -> Vec<u64> {
    let capacity = u128::from(capacity.bits());
    let guaranteed: u128 = contenders.iter().map(|contender| u128::from(contender.least())).sum();
    if guaranteed >= capacity {
        return contenders
            .iter()
            .map(|contender| (u128::from(contender.least()) * capacity / guaranteed.max(1)) as u64)
            .collect();
    }
    // A contender takes water from the level at which its guarantee is reached to that at which it is full. Between two
    // neighbours of these levels the amount rises evenly.
    let level_of =
        |bits: u64, contender: &Contender| Level { bits: u128::from(bits), weight: u128::from(contender.weight.get()) };
    let mut changes: Vec<(Level, i64)> = Vec::with_capacity(2 * contenders.len());
    for contender in contenders.iter().filter(|contender| contender.least() < contender.most()) {
        let weight = i64::from(contender.weight.get());
        changes.push((level_of(contender.least(), contender), weight));
        changes.push((level_of(contender.most(), contender), -weight));
    }
    changes.sort_by(|a, b| a.0.cmp(&b.0));
    // What is used at a level is `fixed + level × rising`: those that are full or at their guarantee, and the others.
    let (mut fixed, mut rising) = (guaranteed as i128, 0i128);
    for (level, change) in &changes {
        if level.used(fixed, rising) >= capacity as i128 * level.weight as i128 {
            break;
        }
        fixed -= level.bits as i128 * i128::from(change.signum());
        rising += i128::from(*change);
    }
    let left = (capacity as i128 - fixed).max(0) as u128;
    contenders
        .iter()
        .map(|contender| {
            let (least, most) = (contender.least(), contender.most());
            match u128::try_from(rising) {
                Ok(rising) if rising > 0 => {
                    let water = left * u128::from(contender.weight.get()) / rising;
                    u64::try_from(water).unwrap_or(u64::MAX).clamp(least, most)
                }
                // Everybody is full.
                _ => most,
            }
        })
        .collect()
}

/// `bits / weight`, exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Level {
    bits: u128,
    weight: u128,
}

impl Level {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.bits * other.weight).cmp(&(other.bits * self.weight))
    }

    /// What is used at this level, times its weight.
    fn used(&self, fixed: i128, rising: i128) -> i128 {
        fixed * self.weight as i128 + self.bits as i128 * rising
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn contenders() -> impl Strategy<Value = Vec<Contender>> {
        let contender = (
            1u32..=1000,
            prop_oneof![Just(0), 1u64..20_000_000_000, Just(u64::MAX)],
            prop::option::of(1u64..10_000_000_000),
            prop_oneof![3 => Just(0), 1 => 1u64..1_000_000_000],
        )
            .prop_map(|(weight, demand, cap, guarantee)| Contender {
                weight: Weight::new(weight).unwrap(),
                demand,
                cap: cap.and_then(BitRate::new),
                guarantee,
            });
        prop::collection::vec(contender, 0..60)
    }

    fn rate(bits: u64) -> BitRate {
        BitRate::new(bits).unwrap()
    }

    proptest! {
        #[test]
        fn everything_is_used_and_nothing_twice(capacity in 1_000_000u64..100_000_000_000, contenders in contenders()) {
            let shares = fill(rate(capacity), &contenders);
            let used: u128 = shares.iter().map(|share| u128::from(*share)).sum();
            let wanted: u128 = contenders.iter().map(|contender| u128::from(contender.most())).sum();
            let due = wanted.min(u128::from(capacity));
            prop_assert!(used <= due, "{used} of {due}");
            prop_assert!(used + contenders.len() as u128 >= due, "{used} of {due}");
            for (share, contender) in shares.iter().zip(&contenders) {
                prop_assert!(*share <= contender.most());
            }
        }

        #[test]
        fn guarantees_hold_where_they_can(capacity in 1_000_000u64..100_000_000_000, contenders in contenders()) {
            let guaranteed: u128 = contenders.iter().map(|contender| u128::from(contender.least())).sum();
            if guaranteed <= u128::from(capacity) {
                for (share, contender) in fill(rate(capacity), &contenders).iter().zip(&contenders) {
                    prop_assert!(*share >= contender.least());
                }
            }
        }

        /// Whoever is neither full nor held up by its guarantee has the same for its weight as all the others of that kind,
        /// and nobody who is not full has less.
        #[test]
        fn the_level_is_the_same_for_all(capacity in 1_000_000u64..100_000_000_000, contenders in contenders()) {
            let shares = fill(rate(capacity), &contenders);
            let level = |(share, contender): (&u64, &Contender)| *share as f64 / f64::from(contender.weight.get());
            let thirsty = shares.iter().zip(&contenders).filter(|(share, contender)| **share < contender.most());
            let lowest = thirsty.clone().map(level).fold(f64::INFINITY, f64::min);
            let above = |(share, contender): &(&u64, &Contender)| **share > contender.least();
            for (share, contender) in shares.iter().zip(&contenders).filter(above) {
                prop_assert!(level((share, contender)) <= lowest + 1.0 + lowest * 1e-9, "{share} of {contender:?}");
            }
        }

        #[test]
        fn more_capacity_takes_from_nobody(
            capacity in 1_000_000u64..50_000_000_000,
            more in 0u64..50_000_000_000,
            contenders in contenders(),
        ) {
            let (before, after) = (fill(rate(capacity), &contenders), fill(rate(capacity + more), &contenders));
            for (before, after) in before.iter().zip(&after) {
                prop_assert!(after >= before);
            }
        }

        #[test]
        fn more_weight_never_gets_less(
            capacity in 1_000_000u64..50_000_000_000,
            more in 0u32..999,
            mut contenders in contenders(),
        ) {
            prop_assume!(!contenders.is_empty());
            let before = fill(rate(capacity), &contenders)[0];
            contenders[0].weight = Weight::new((contenders[0].weight.get() + more).min(1000)).unwrap();
            prop_assert!(fill(rate(capacity), &contenders)[0] + 1 >= before);
        }
    }

    #[test]
    fn a_table() {
        let contender =
            |weight, demand| Contender { weight: Weight::new(weight).unwrap(), demand, cap: None, guarantee: 0 };
        assert_eq!(fill(rate(100), &[contender(1, 1000), contender(3, 1000)]), [25, 75]);
        assert_eq!(fill(rate(100), &[contender(1, 1000), contender(3, 15)]), [85, 15]);
        assert_eq!(fill(rate(100), &[contender(1, 10), contender(3, 15)]), [10, 15]);
        let guaranteed = Contender { guarantee: 60, ..contender(1, 1000) };
        assert_eq!(fill(rate(100), &[guaranteed, contender(3, 1000)]), [60, 40]);
        let capped = Contender { cap: BitRate::new(5), ..contender(1000, 1000) };
        assert_eq!(fill(rate(100), &[capped, contender(1, 1000)]), [5, 95]);
        assert_eq!(
            fill(
                rate(100),
                &[
                    Contender { guarantee: 300, ..contender(1, 1000) },
                    Contender { guarantee: 100, ..contender(1, 1000) }
                ]
            ),
            [75, 25]
        );
        assert_eq!(fill(rate(1), &[]), Vec::<u64>::new());
    }
}
