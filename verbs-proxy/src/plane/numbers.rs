//! Queue pairs by their numbers, which are looked up for each message.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Bell numbers by QP number.
pub type Numbers = HashMap<u32, u32, BuildHasherDefault<Spread>>;

/// Numbers are given by the proxy, by chance: neither the container nor a neighbour has a say in how they collide, so nothing has to be
/// secret about where they go.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u32(u32::from(*byte)));
    }

    fn write_u32(&mut self, number: u32) {
        // Fibonacci hashing: the table looks at the highest bits and at the lowest.
        let mixed = (self.0 ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}
