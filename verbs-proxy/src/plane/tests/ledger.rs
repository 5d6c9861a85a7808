//! What is due to a container, whoever wrote its requests.

use super::*;
use std::collections::VecDeque;

/// What a queue pair owes.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Identifiers and whether they are signaled, oldest first.
    pub(super) sends: VecDeque<(u64, bool)>,
    pub(super) receives: VecDeque<u64>,
}

impl Ledger {
    /// The completion is one that is due, and none before it was left out.
    pub(super) fn settle(&mut self, completion: &Completion) {
        let wr_id = completion.wr_id;
        if completion.opcode.0 & WcOpcode::RECV.0 != 0 {
            let due = self.receives.pop_front();
            assert_eq!(due, Some(wr_id), "a receive out of order: {completion:?}");
            return;
        }
        loop {
            let Some((due, signaled)) = self.sends.pop_front() else { panic!("{completion:?} is not due") };
            if due == wr_id {
                let said = signaled || completion.status != WcStatus::SUCCESS;
                return assert!(said, "an unsignaled request has completed: {completion:?}");
            }
            assert!(!signaled, "the request {due} has not completed, but {completion:?}");
        }
    }

    /// Nothing signaled has been left out.
    pub(super) fn is_settled(&self) {
        let left = self.sends.iter().find(|(_, signaled)| *signaled);
        assert_eq!(left, None, "a signaled request has never completed");
    }
}
