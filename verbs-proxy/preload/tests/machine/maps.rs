//! Two ways to learn what is mapped where.

use crate::pages::maps::{Kind, MAPS, Mapping, visit, without_query};
use crate::pages::tests::Files;
use ringfence_trials::skip;
use std::ops::ControlFlow;

/// What the kernel answers is what its text says, for every mapping of this process that stays as it is meanwhile.
pub fn answers_and_text_agree() {
    // Others map and unmap.
    let _alone = Files::new();
    if MAPS.get().is_none() {
        skip("this kernel answers no questions about mappings; Linux 6.11 and later do");
    }
    let answered = all();
    without_query(true);
    let read = all();
    without_query(false);
    let mut compared = 0;
    for mapping in read.iter().filter(|mapping| stays(mapping)) {
        let found = answered.iter().find(|found| found.start == mapping.start);
        assert_eq!(found, Some(mapping));
        compared += 1;
    }
    assert!(compared > 3, "{read:?}");
}

fn all() -> Vec<Mapping> {
    // Else it would be mapped in the middle of the question.
    let mut mappings = Vec::with_capacity(4096);
    visit(&(0..usize::MAX / 2), true, |mapping| {
        mappings.push(mapping);
        ControlFlow::Continue(())
    })
    .unwrap();
    mappings
}

/// The program and its libraries, the first stack, and what the kernel has put there. (Other tests have shared mappings.)
fn stays(mapping: &Mapping) -> bool {
    !mapping.shared && (mapping.inode != 0 || mapping.kind != Kind::Plain)
}
