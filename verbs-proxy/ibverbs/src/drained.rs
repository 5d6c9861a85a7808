//! Attributes that a card takes only of a queue pair whose send queue is drained (SQD).
//!
//! While the container's queue pair is in SQD the card's stays in RTS: the plane gives it nothing, and when that has finished what was
//! begun, the card has nothing. So it goes to SQD for a moment, in which it is told. Not all cards have that state.

use crate::card::CardQp;
use ringfence_abi::ibv_qp_attr;
use ringfence_protocol::verbs::{QpAttrMask as Mask, QpState};
use rustix::event::{Timespec, poll};
use rustix::io::Errno;

/// How often a card is asked whether it has drained what is empty, and what lies between.
const ASKED: usize = 20;
/// See [`ASKED`].
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

/// A queue pair of a card's.
pub trait Drainable {
    /// `ibv_modify_qp`.
    fn modify(&self, attr: &mut ibv_qp_attr, mask: u32) -> Result<(), Errno>;
    /// To SQD or RTS, without a word more.
    fn take_to(&self, state: QpState) -> Result<(), Errno>;
    /// To RTS, as one that is there in the caller's belief (`cur_qp_state`).
    fn take_back(&self) -> Result<(), Errno>;
    /// Whether it is in SQD and has not finished.
    fn is_draining(&self) -> Result<bool, Errno>;
    /// Whether it is in its error state.
    fn is_in_error(&self) -> Result<bool, Errno>;
}

impl Drainable for CardQp {
    fn modify(&self, attr: &mut ibv_qp_attr, mask: u32) -> Result<(), Errno> {
        CardQp::modify(self, attr, mask)
    }

    fn take_to(&self, state: QpState) -> Result<(), Errno> {
        CardQp::take_to(self, state)
    }

    fn take_back(&self) -> Result<(), Errno> {
        CardQp::take_back(self)
    }

    fn is_draining(&self) -> Result<bool, Errno> {
        CardQp::is_draining(self)
    }

    fn is_in_error(&self) -> Result<bool, Errno> {
        self.state().map(|state| state == QpState::ERR.0)
    }
}

/// What has not been changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Why: `EOPNOTSUPP` of a card that has no SQD.
    pub error: Errno,
    /// The queue pair is not in RTS, as it was, and does not go there.
    pub is_stuck: bool,
}

/// Changes what `mask` says of a queue pair in RTS that has nothing to send, and that is in RTS again afterwards.
///
/// # Errors
/// What the card says; nothing is changed then.
pub fn change(qp: &impl Drainable, attr: &mut ibv_qp_attr, mask: u32) -> Result<(), Refused> {
    match qp.take_to(QpState::SQD) {
        Ok(()) => {}
        Err(Errno::INVAL) if qp.is_in_error() == Ok(true) => {
            return Err(Refused { error: Errno::INVAL, is_stuck: true });
        }
        // What is asked for has been found to be in order, so it is the state that the card does not have.
        Err(Errno::INVAL) => return Err(Refused { error: Errno::OPNOTSUPP, is_stuck: false }),
        Err(error) => return Err(Refused { error, is_stuck: false }),
    }
    // Without a state: rxe begins to drain whenever one asks it for SQD, and would not go on until it has seen the end of that.
    let changed = settle(qp).and_then(|()| qp.modify(attr, mask & !(Mask::STATE.0 | Mask::CUR_STATE.0)));
    match (changed, go_on(qp)) {
        (Ok(()), Ok(())) => Ok(()),
        (Err(error), back) => Err(Refused { error, is_stuck: back.is_err() }),
        (Ok(()), Err(error)) => Err(Refused { error, is_stuck: true }),
    }
}

/// Waits until the card has seen that there is nothing to drain, but not for long: rxe from Linux 6.4 on never sees that of a queue
/// which has gone round once. One that minds says so when it is told of the change.
fn settle(qp: &impl Drainable) -> Result<(), Errno> {
    for _ in 0..ASKED {
        if !qp.is_draining()? {
            break;
        }
        match poll(&mut [], Some(&PAUSE)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// To RTS, also for one that still drains what is not there, and is not asked about that if it is taken for one in RTS.
fn go_on(qp: &impl Drainable) -> Result<(), Errno> {
    qp.take_to(QpState::RTS).or_else(|error| match error {
        Errno::INVAL => qp.take_back(),
        error => Err(error),
    })
}

#[cfg(test)]
mod tests {
    // UNSAFETY: attributes that say nothing.
    #![allow(unsafe_code)]

    use super::*;
    use std::cell::{Cell, RefCell};

    /// Says no to the call with this number, and drains after so many looks.
    #[derive(Default)]
    struct Recording {
        calls: RefCell<Vec<&'static str>>,
        refuses: Vec<(usize, Errno)>,
        looks: Cell<usize>,
        is_in_error: bool,
    }

    impl Recording {
        fn call(&self, what: &'static str) -> Result<(), Errno> {
            let mut calls = self.calls.borrow_mut();
            calls.push(what);
            let number = calls.len();
            self.refuses.iter().find(|(refused, _)| *refused == number).map_or(Ok(()), |(_, error)| Err(*error))
        }
    }

    impl Drainable for Recording {
        fn modify(&self, _: &mut ibv_qp_attr, mask: u32) -> Result<(), Errno> {
            assert_eq!(mask, Mask::TIMEOUT.0);
            self.call("change")
        }

        fn take_to(&self, state: QpState) -> Result<(), Errno> {
            self.call(if state == QpState::SQD { "SQD" } else { "RTS" })
        }

        fn take_back(&self) -> Result<(), Errno> {
            self.call("back")
        }

        fn is_in_error(&self) -> Result<bool, Errno> {
            Ok(self.is_in_error)
        }

        fn is_draining(&self) -> Result<bool, Errno> {
            self.looks.set(self.looks.get().saturating_sub(1));
            Ok(self.looks.get() > 0)
        }
    }

    fn changed(qp: &Recording) -> (Result<(), Refused>, Vec<&'static str>) {
        // SAFETY: plain data.
        let mut attr: ibv_qp_attr = unsafe { std::mem::zeroed() };
        let result = change(qp, &mut attr, Mask::STATE.0 | Mask::TIMEOUT.0);
        (result, qp.calls.borrow().clone())
    }

    #[test]
    fn a_card_is_told_when_it_has_drained_and_goes_on() {
        let qp = Recording { looks: Cell::new(3), ..Recording::default() };
        assert_eq!(changed(&qp), (Ok(()), vec!["SQD", "change", "RTS"]));
    }

    #[test]
    fn a_card_without_the_state_is_as_it_was() {
        let qp = Recording { refuses: vec![(1, Errno::INVAL)], ..Recording::default() };
        assert_eq!(changed(&qp), (Err(Refused { error: Errno::OPNOTSUPP, is_stuck: false }), vec!["SQD"]));
    }

    #[test]
    fn one_in_error_is_not_taken_for_one_without_the_state() {
        let qp = Recording { refuses: vec![(1, Errno::INVAL)], is_in_error: true, ..Recording::default() };
        assert_eq!(changed(&qp), (Err(Refused { error: Errno::INVAL, is_stuck: true }), vec!["SQD"]));
    }

    #[test]
    fn a_card_that_never_says_that_it_has_drained_is_told_and_taken_back() {
        let qp = Recording { looks: Cell::new(usize::MAX), refuses: vec![(3, Errno::INVAL)], ..Recording::default() };
        assert_eq!(changed(&qp), (Ok(()), vec!["SQD", "change", "RTS", "back"]));
    }

    #[test]
    fn what_the_card_refuses_leaves_it_in_rts_or_it_is_stuck() {
        let qp = Recording { refuses: vec![(2, Errno::NETUNREACH)], ..Recording::default() };
        let refused = Refused { error: Errno::NETUNREACH, is_stuck: false };
        assert_eq!(changed(&qp), (Err(refused), vec!["SQD", "change", "RTS"]));
        let refuses = vec![(2, Errno::NETUNREACH), (3, Errno::INVAL), (4, Errno::INVAL)];
        let qp = Recording { refuses, ..Recording::default() };
        assert_eq!(changed(&qp).0, Err(Refused { is_stuck: true, ..refused }));
        let qp = Recording { refuses: vec![(3, Errno::IO)], ..Recording::default() };
        assert_eq!(changed(&qp), (Err(Refused { error: Errno::IO, is_stuck: true }), vec!["SQD", "change", "RTS"]));
    }
}
