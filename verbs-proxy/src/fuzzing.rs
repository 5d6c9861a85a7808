//! What fuzzers run: whoever is hostile says what the fuzzer likes, to the code that a proxy consists of, and what must hold
//! nevertheless is checked. `integration/fuzz.sh` builds and runs them; their corpora are tests, too.

mod control;
mod neighbours;
mod node;
mod wire;

pub use crate::plane::tests::fuzzing::{grants, link, rings};
pub use control::run as control;
pub use neighbours::run as neighbours;
pub use wire::run as wire;

/// What runs an input.
pub type Target = fn(&[u8]);

/// All of them, by the names of their corpora.
pub const TARGETS: [(&str, Target); 6] = [
    ("rings", rings),
    ("wire", wire),
    ("link", link),
    ("grants", grants),
    ("control", control),
    ("neighbours", neighbours),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corpora_hold() {
        ringfence_trials::replay(&TARGETS);
    }
}
