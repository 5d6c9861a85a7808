//! What is fair between containers that together want more than there is: weighted max-min shares.
//!
//! Water is filled into vessels whose widths are the weights. A vessel that is full, because its container wants or may have
//! no more, takes none, and one with a guarantee starts filled so far. The level rises until all water is used.

use crate::units::{BitRate, Weight};

/// What one container wants and may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Its part of what is contended.
    pub weight: Weight,
    /// What it would send if nobody else was there, bits per second; never more than its cap counts.
    pub demand: u64,
    /// What it may have at most.
    pub cap: Option<BitRate>,
    /// What it has in any case, if it wants that much, bits per second.
    pub guarantee: u64,
}

impl Claim {
    fn most(&self) -> u64 {
        self.cap.map_or(self.demand, |cap| self.demand.min(cap.bits()))
    }

    fn least(&self) -> u64 {
        self.guarantee.min(self.most())
    }
}

/// Each claim's share of `capacity` bits per second, in order.
///
/// Nobody gets more than it wants, and nothing is left over while somebody wants more, but for less than one bit per claim
/// from rounding. Guarantees that together are beyond the capacity are all cut by the same factor.
#[must_use]
pub fn fill(capacity: BitRate, claims: &[Claim]) -> Vec<u64> {
    let capacity = u128::from(capacity.bits());
    let guaranteed: u128 = claims.iter().map(|claim| u128::from(claim.least())).sum();
    if guaranteed >= capacity {
        return claims.iter().map(|claim| (u128::from(claim.least()) * capacity / guaranteed.max(1)) as u64).collect();
    }
    // A claim takes water from the level at which its guarantee is reached to that at which it is full. Between two
    // neighbours of these levels the amount rises evenly.
    let level_of = |bits: u64, claim: &Claim| Level { bits: u128::from(bits), weight: u128::from(claim.weight.get()) };
    let mut changes: Vec<(Level, i64)> = Vec::with_capacity(2 * claims.len());
    for claim in claims.iter().filter(|claim| claim.least() < claim.most()) {
        let weight = i64::from(claim.weight.get());
        changes.push((level_of(claim.least(), claim), weight));
        changes.push((level_of(claim.most(), claim), -weight));
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
    claims
        .iter()
        .map(|claim| {
            let (least, most) = (claim.least(), claim.most());
            match u128::try_from(rising) {
                Ok(rising) if rising > 0 => {
                    let water = left * u128::from(claim.weight.get()) / rising;
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

    fn claims() -> impl Strategy<Value = Vec<Claim>> {
        let claim = (
            1u32..=1000,
            prop_oneof![Just(0), 1u64..20_000_000_000, Just(u64::MAX)],
            prop::option::of(1u64..10_000_000_000),
            prop_oneof![3 => Just(0), 1 => 1u64..1_000_000_000],
        )
            .prop_map(|(weight, demand, cap, guarantee)| Claim {
                weight: Weight::new(weight).unwrap(),
                demand,
                cap: cap.and_then(BitRate::new),
                guarantee,
            });
        prop::collection::vec(claim, 0..60)
    }

    fn rate(bits: u64) -> BitRate {
        BitRate::new(bits).unwrap()
    }

    proptest! {
        #[test]
        fn everything_is_used_and_nothing_twice(capacity in 1_000_000u64..100_000_000_000, claims in claims()) {
            let shares = fill(rate(capacity), &claims);
            let used: u128 = shares.iter().map(|share| u128::from(*share)).sum();
            let wanted: u128 = claims.iter().map(|claim| u128::from(claim.most())).sum();
            let due = wanted.min(u128::from(capacity));
            prop_assert!(used <= due, "{used} of {due}");
            prop_assert!(used + claims.len() as u128 >= due, "{used} of {due}");
            for (share, claim) in shares.iter().zip(&claims) {
                prop_assert!(*share <= claim.most());
            }
        }

        #[test]
        fn guarantees_hold_where_they_can(capacity in 1_000_000u64..100_000_000_000, claims in claims()) {
            let guaranteed: u128 = claims.iter().map(|claim| u128::from(claim.least())).sum();
            if guaranteed <= u128::from(capacity) {
                for (share, claim) in fill(rate(capacity), &claims).iter().zip(&claims) {
                    prop_assert!(*share >= claim.least());
                }
            }
        }

        /// Whoever is neither full nor held up by its guarantee has the same for its weight as all the others of that kind,
        /// and nobody who is not full has less.
        #[test]
        fn the_level_is_the_same_for_all(capacity in 1_000_000u64..100_000_000_000, claims in claims()) {
            let shares = fill(rate(capacity), &claims);
            let level = |(share, claim): (&u64, &Claim)| *share as f64 / f64::from(claim.weight.get());
            let thirsty = shares.iter().zip(&claims).filter(|(share, claim)| **share < claim.most());
            let lowest = thirsty.clone().map(level).fold(f64::INFINITY, f64::min);
            for (share, claim) in shares.iter().zip(&claims).filter(|(share, claim)| **share > claim.least()) {
                prop_assert!(level((share, claim)) <= lowest + 1.0 + lowest * 1e-9, "{share} of {claim:?}");
            }
        }

        #[test]
        fn more_capacity_takes_from_nobody(capacity in 1_000_000u64..50_000_000_000, more in 0u64..50_000_000_000, claims in claims()) {
            let (before, after) = (fill(rate(capacity), &claims), fill(rate(capacity + more), &claims));
            for (before, after) in before.iter().zip(&after) {
                prop_assert!(after >= before);
            }
        }

        #[test]
        fn more_weight_never_gets_less(capacity in 1_000_000u64..50_000_000_000, more in 0u32..999, mut claims in claims()) {
            prop_assume!(!claims.is_empty());
            let before = fill(rate(capacity), &claims)[0];
            claims[0].weight = Weight::new((claims[0].weight.get() + more).min(1000)).unwrap();
            prop_assert!(fill(rate(capacity), &claims)[0] + 1 >= before);
        }
    }

    #[test]
    fn a_table() {
        let claim = |weight, demand| Claim { weight: Weight::new(weight).unwrap(), demand, cap: None, guarantee: 0 };
        assert_eq!(fill(rate(100), &[claim(1, 1000), claim(3, 1000)]), [25, 75]);
        assert_eq!(fill(rate(100), &[claim(1, 1000), claim(3, 15)]), [85, 15]);
        assert_eq!(fill(rate(100), &[claim(1, 10), claim(3, 15)]), [10, 15]);
        let guaranteed = Claim { guarantee: 60, ..claim(1, 1000) };
        assert_eq!(fill(rate(100), &[guaranteed, claim(3, 1000)]), [60, 40]);
        let capped = Claim { cap: BitRate::new(5), ..claim(1000, 1000) };
        assert_eq!(fill(rate(100), &[capped, claim(1, 1000)]), [5, 95]);
        assert_eq!(
            fill(rate(100), &[Claim { guarantee: 300, ..claim(1, 1000) }, Claim { guarantee: 100, ..claim(1, 1000) }]),
            [75, 25]
        );
        assert_eq!(fill(rate(1), &[]), Vec::<u64>::new());
    }
}
