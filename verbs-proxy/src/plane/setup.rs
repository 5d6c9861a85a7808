//! What the control thread does to the data plane, between two turns.

use super::Plane;
use super::qp::{NewQp, Qp};
use crate::device::Device;
use crate::shared::Mapping;
use crate::state;
use ringfence_protocol::control::{ModifyQp, QpAttr};
use ringfence_protocol::verbs::{QpAttrMask as Mask, QpState};
use rustix::io::Errno;
use std::sync::Arc;

/// READs and atomics under way in each direction of a queue pair: `max_qp_rd_atom`.
pub const MAX_RD_ATOMIC: u32 = 16;
/// The port's largest MTU (`IBV_MTU_4096`).
const MAX_MTU: u32 = 5;

impl<D: Device> Plane<D> {
    /// Adds a queue pair; its number must be free.
    pub fn add_qp(&mut self, new: &NewQp, mapping: Arc<Mapping>) {
        self.by_number.insert(new.number, new.queue);
        self.incarnations += 1;
        self.qps[new.queue as usize] = Some(Box::new(Qp::new(new, self.incarnations, mapping)));
    }

    /// Takes a queue pair out; nothing of it is completed any more.
    pub fn remove_qp(&mut self, queue: u32) -> Option<Box<Qp<D>>> {
        let mut qp = self.qps.get_mut(queue as usize)?.take()?;
        // Of a device that was lost another one may have given the number away again.
        if self.by_number.get(&qp.number) == Some(&queue) {
            self.by_number.remove(&qp.number);
        }
        D::removed(self, &mut qp);
        self.timers.remove(&(qp.alarm, queue));
        self.shaping.forget(queue);
        Some(qp)
    }

    /// Whether [`Self::modify_qp`] would be refused for what is asked; otherwise the state before and that after it.
    pub fn check_modify(&self, queue: u32, request: &ModifyQp) -> Result<(QpState, QpState), Errno> {
        let qp = self.qps.get(queue as usize).and_then(Option::as_ref).ok_or(Errno::INVAL)?;
        let attr = &request.attr;
        let has = |bit: Mask| attr.mask & bit.0 != 0;
        let to = if has(Mask::STATE) { attr.state } else { qp.state };
        let claimed = has(Mask::CUR_STATE).then_some(attr.cur_state);
        state::check(qp.state, to, claimed, attr.mask).map_err(|_| Errno::INVAL)?;
        check_values(attr)?;
        if state::needs_drained(qp.state, to, attr.mask) && qp.is_draining() {
            return Err(Errno::INVAL);
        }
        Ok((qp.state, to))
    }

    /// `ibv_modify_qp`. `destination`: what the address vector names, resolved by the caller.
    pub fn modify_qp(
        &mut self,
        queue: u32,
        request: &ModifyQp,
        destination: Option<D::Destination>,
    ) -> Result<(), Errno> {
        let (from, to) = self.check_modify(queue, request)?;
        let qp = self.qps.get_mut(queue as usize).and_then(Option::as_mut).ok_or(Errno::INVAL)?;
        let attr = &request.attr;
        let has = |bit: Mask| attr.mask & bit.0 != 0;
        if has(Mask::AV) && destination.is_none() {
            return Err(Errno::NETUNREACH);
        }
        match to {
            QpState::RESET => {
                qp.reset(request.send_position, request.receive_position);
                D::reset(self, queue);
                return Ok(());
            }
            QpState::ERR => {
                self.to_error(queue);
                return Ok(());
            }
            _ => {}
        }
        merge(&mut qp.attr, attr);
        (qp.retries, qp.rnr_retries) = (qp.attr.retry_cnt, qp.attr.rnr_retry);
        qp.state = to;
        if from != to {
            let wanted = has(Mask::EN_SQD_ASYNC_NOTIFY) && attr.en_sqd_async_notify != 0;
            qp.attr.en_sqd_async_notify = u32::from(wanted);
        }
        D::modified(self, queue, attr.mask, destination);
        self.activate(queue);
        Ok(())
    }

    /// `ibv_query_qp`.
    pub fn query_qp(&self, queue: u32) -> Result<QpAttr, Errno> {
        let qp = self.qps.get(queue as usize).and_then(Option::as_ref).ok_or(Errno::INVAL)?;
        Ok(QpAttr { state: qp.state, cur_state: qp.state, sq_draining: u32::from(qp.is_draining()), ..qp.attr })
    }
}

/// Access flags that have a meaning somewhere. Those that mean nothing to a queue pair are kept for who asks, as drivers do:
/// bits of the interface, and `IBV_ACCESS_OPTIONAL_RANGE`.
const ACCESS: u32 = 0x3ff0_03ff;

fn check_values(attr: &QpAttr) -> Result<(), Errno> {
    let within =
        |bit: Mask, value: u32, range: std::ops::RangeInclusive<u32>| attr.mask & bit.0 == 0 || range.contains(&value);
    let fine = within(Mask::PORT, attr.port, 1..=1)
        && within(Mask::PATH_MTU, attr.path_mtu, 1..=MAX_MTU)
        && within(Mask::DEST_QPN, attr.dest_qp_num, 0..=0x00ff_ffff)
        && within(Mask::TIMEOUT, attr.timeout, 0..=31)
        && within(Mask::RETRY_CNT, attr.retry_cnt, 0..=7)
        && within(Mask::RNR_RETRY, attr.rnr_retry, 0..=7)
        && within(Mask::MIN_RNR_TIMER, attr.min_rnr_timer, 0..=31)
        && within(Mask::MAX_QP_RD_ATOMIC, attr.max_rd_atomic, 0..=MAX_RD_ATOMIC)
        && within(Mask::MAX_DEST_RD_ATOMIC, attr.max_dest_rd_atomic, 0..=MAX_RD_ATOMIC)
        && within(Mask::ACCESS_FLAGS, attr.access.0 & !ACCESS, 0..=0)
        // Alternate paths are InfiniBand's; the kernel refuses them on Ethernet with the same errno.
        && attr.mask & (Mask::ALT_PATH.0 | Mask::RATE_LIMIT.0 | Mask::CAP.0 | Mask::QKEY.0) == 0;
    if fine { Ok(()) } else { Err(Errno::INVAL) }
}

fn merge(into: &mut QpAttr, from: &QpAttr) {
    macro_rules! take {
        ($($bit:ident: $($field:ident),+;)*) => {
            $(if from.mask & Mask::$bit.0 != 0 { $(into.$field = from.$field;)+ })*
        };
    }
    take! {
        ACCESS_FLAGS: access;
        PKEY_INDEX: pkey_index;
        PORT: port;
        AV: av;
        PATH_MTU: path_mtu;
        TIMEOUT: timeout;
        RETRY_CNT: retry_cnt;
        RNR_RETRY: rnr_retry;
        RQ_PSN: rq_psn;
        MAX_QP_RD_ATOMIC: max_rd_atomic;
        MIN_RNR_TIMER: min_rnr_timer;
        SQ_PSN: sq_psn;
        MAX_DEST_RD_ATOMIC: max_dest_rd_atomic;
        PATH_MIG_STATE: path_mig_state;
        DEST_QPN: dest_qp_num;
    }
}
