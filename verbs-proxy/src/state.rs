//! The RC queue pair's state machine: which transitions there are, and what each needs.
//!
//! ```text
//!            ┌────────────────────── any state ──────────────────────┐
//!            ▼                                    (but RESET to ERR)  ▼
//! RESET ─► INIT ─► RTR ─► RTS ◄─► SQD                               ERR ─► RESET
//! ```
//! InfiniBand Architecture Specification 1.4, 11.2.5.2 (tables 91 to 96), as `ib_modify_qp_is_ok` of the Linux kernel has it.

use ringfence_protocol::verbs::{QpAttrMask as Mask, QpState};

const INIT: u32 = Mask::PKEY_INDEX.0 | Mask::PORT.0 | Mask::ACCESS_FLAGS.0;
const RTR: u32 = Mask::AV.0
    | Mask::PATH_MTU.0
    | Mask::DEST_QPN.0
    | Mask::RQ_PSN.0
    | Mask::MAX_DEST_RD_ATOMIC.0
    | Mask::MIN_RNR_TIMER.0;
const RTS: u32 = Mask::TIMEOUT.0 | Mask::RETRY_CNT.0 | Mask::RNR_RETRY.0 | Mask::SQ_PSN.0 | Mask::MAX_QP_RD_ATOMIC.0;

/// What may change while a queue pair sends.
const SENDING: u32 = Mask::ALT_PATH.0 | Mask::ACCESS_FLAGS.0 | Mask::MIN_RNR_TIMER.0 | Mask::PATH_MIG_STATE.0;
/// What may change while it does not, and nothing of it is under way: anything but what both ends must agree on.
const DRAINED: u32 = SENDING
    | INIT
    | Mask::AV.0
    | Mask::TIMEOUT.0
    | Mask::RETRY_CNT.0
    | Mask::RNR_RETRY.0
    | Mask::MAX_QP_RD_ATOMIC.0
    | Mask::MAX_DEST_RD_ATOMIC.0;

/// Why a transition is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// There is no such transition.
    #[error("no transition from state {from:?} to {to:?}")]
    Transition {
        /// Present state.
        from: QpState,
        /// Wanted state.
        to: QpState,
    },
    /// A state that nobody may claim to be the present one.
    #[error("the present state cannot be claimed to be {0:?}")]
    Claim(QpState),
    /// Attributes are missing.
    #[error("attribute mask lacks {0:#x}")]
    Missing(u32),
    /// Attributes are not allowed in this transition.
    #[error("attribute mask has {0:#x}, which this transition does not take")]
    Surplus(u32),
}

/// Whether changing these attributes needs a send queue that is drained, and not merely draining: requests that are under way would go
/// on to another peer, or by other timers, than they began with.
#[must_use]
pub fn needs_drained(from: QpState, to: QpState, mask: u32) -> bool {
    (from, to) == (QpState::SQD, QpState::SQD) && mask & DRAINED & !SENDING != 0
}

/// Whether `mask` may take a queue pair from `from` to `to`.
///
/// `claimed` is the state in which the caller believes the queue pair to be. Drivers take his word for it; here the transition
/// must be one from either state.
pub fn check(from: QpState, to: QpState, claimed: Option<QpState>, mask: u32) -> Result<(), Denied> {
    match claimed {
        Some(QpState::RTR | QpState::RTS | QpState::SQD) | None => {}
        Some(other) => return Err(Denied::Claim(other)),
    }
    check_from(claimed.unwrap_or(from), to, mask)?;
    check_from(from, to, mask)
}

fn check_from(from: QpState, to: QpState, mask: u32) -> Result<(), Denied> {
    let (required, optional) = match (from, to) {
        // A queue pair that was never used has nothing to be in error about.
        (QpState::RESET, QpState::ERR) => return Err(Denied::Transition { from, to }),
        (_, QpState::RESET | QpState::ERR) => (0, 0),
        (QpState::RESET, QpState::INIT) => (INIT, 0),
        (QpState::INIT, QpState::INIT) => (0, INIT),
        (QpState::INIT, QpState::RTR) => (RTR, Mask::ALT_PATH.0 | Mask::ACCESS_FLAGS.0 | Mask::PKEY_INDEX.0),
        (QpState::RTR, QpState::RTS) => (RTS, Mask::CUR_STATE.0 | SENDING),
        (QpState::RTS | QpState::SQD, QpState::RTS) => (0, Mask::CUR_STATE.0 | SENDING),
        (QpState::RTS, QpState::SQD) => (0, Mask::EN_SQD_ASYNC_NOTIFY.0),
        (QpState::SQD, QpState::SQD) => (0, DRAINED),
        _ => return Err(Denied::Transition { from, to }),
    };
    let given = mask & !Mask::STATE.0;
    if required & !given != 0 {
        return Err(Denied::Missing(required & !given));
    }
    match given & !(required | optional) {
        0 => Ok(()),
        surplus => Err(Denied::Surplus(surplus)),
    }
}

/// Nanoseconds of an RNR NAK timer field (InfiniBand Architecture Specification, table 45); five bits count.
#[must_use]
pub fn rnr_nanos(field: u32) -> u64 {
    const MICROS_X100: [u32; 32] = [
        65_536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072,
        4096, 6144, 8192, 12_288, 16_384, 24_576, 32_768, 49_152,
    ];
    u64::from(MICROS_X100[field as usize % 32]) * 10_000
}

/// Nanoseconds of a local ACK timeout field: 4.096 µs × 2^field; `None` for zero, which means for ever.
#[must_use]
pub fn ack_timeout_nanos(field: u32) -> Option<u64> {
    (!field.is_multiple_of(32)).then(|| 4096u64 << (field % 32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn case(from: QpState, to: QpState, mask: u32, expected: Result<(), Denied>) {
        assert_eq!(check(from, to, None, mask), expected);
    }

    #[test]
    fn transitions_need_their_attributes() {
        let state = Mask::STATE.0;
        case(QpState::RESET, QpState::INIT, state | INIT, Ok(()));
        case(QpState::RESET, QpState::INIT, state | INIT & !Mask::PORT.0, Err(Denied::Missing(Mask::PORT.0)));
        case(QpState::INIT, QpState::RTR, state | RTR, Ok(()));
        case(QpState::INIT, QpState::RTR, state | RTR | Mask::QKEY.0, Err(Denied::Surplus(Mask::QKEY.0)));
        case(QpState::RTR, QpState::RTS, state | RTS, Ok(()));
        case(QpState::RTS, QpState::ERR, state, Ok(()));
        case(QpState::RTS, QpState::SQD, state | Mask::CUR_STATE.0, Err(Denied::Surplus(Mask::CUR_STATE.0)));
        case(QpState::SQD, QpState::SQD, state | Mask::AV.0 | Mask::PORT.0, Ok(()));
        case(QpState::SQD, QpState::SQD, state | Mask::PATH_MTU.0, Err(Denied::Surplus(Mask::PATH_MTU.0)));
        case(QpState::RTS, QpState::RTS, state | Mask::ALT_PATH.0 | Mask::PATH_MIG_STATE.0, Ok(()));
        case(QpState::ERR, QpState::RESET, state, Ok(()));
    }

    #[test]
    fn what_is_under_way_goes_on_as_it_began() {
        let sqd = |mask: u32| needs_drained(QpState::SQD, QpState::SQD, Mask::STATE.0 | mask);
        assert!(sqd(Mask::AV.0) && sqd(Mask::TIMEOUT.0 | Mask::ACCESS_FLAGS.0) && sqd(Mask::PKEY_INDEX.0));
        assert!(!sqd(0) && !sqd(Mask::ACCESS_FLAGS.0 | Mask::MIN_RNR_TIMER.0));
        assert!(!needs_drained(QpState::RTS, QpState::SQD, Mask::STATE.0 | Mask::EN_SQD_ASYNC_NOTIFY.0));
        assert!(!needs_drained(QpState::INIT, QpState::RTR, Mask::STATE.0 | RTR));
    }

    #[test]
    fn there_are_no_shortcuts() {
        for (from, to) in [
            (QpState::RESET, QpState::RTR),
            (QpState::RESET, QpState::RTS),
            (QpState::INIT, QpState::RTS),
            (QpState::RTS, QpState::INIT),
            (QpState::ERR, QpState::RTS),
            (QpState::RESET, QpState::ERR),
            (QpState::RESET, QpState(7)),
        ] {
            case(from, to, u32::MAX, Err(Denied::Transition { from, to }));
        }
    }

    #[test]
    fn a_claimed_state_must_fit_beside_the_present_one() {
        let mask = Mask::STATE.0 | Mask::CUR_STATE.0;
        let claim = |from, claimed, more| check(from, QpState::RTS, Some(claimed), mask | more);
        assert_eq!(claim(QpState::RTS, QpState::RTS, 0), Ok(()));
        assert_eq!(claim(QpState::RTS, QpState::SQD, 0), Ok(()));
        assert_eq!(claim(QpState::RTR, QpState::RTR, RTS), Ok(()));
        assert_eq!(claim(QpState::RTR, QpState::RTS, 0), Err(Denied::Missing(RTS)));
        assert_eq!(claim(QpState::RTS, QpState::RTR, RTS), Err(Denied::Surplus(RTS)));
        assert_eq!(claim(QpState::RTS, QpState::INIT, 0), Err(Denied::Claim(QpState::INIT)));
    }

    #[test]
    fn timers_follow_the_tables() {
        assert_eq!(rnr_nanos(0), 655_360_000);
        assert_eq!(rnr_nanos(1), 10_000);
        assert_eq!(rnr_nanos(12), 640_000);
        assert_eq!(ack_timeout_nanos(0), None);
        assert_eq!(ack_timeout_nanos(14), Some(67_108_864));
    }
}
