//! Requests that wait for a time: because they are to be posted again then, or because an answer is overdue.

use super::Plane;
use super::claim::vendor;
use super::qp::{Qp, Waits};
use crate::device::Device;
use crate::pacing::Nanos;
use crate::state;
use ringfence_protocol::verbs::{QpState, WcStatus};

impl<D: Device> Plane<D> {
    /// Makes sure that a queue is looked at no later than at this time.
    pub fn alarm(&mut self, at: Nanos, queue: u32) {
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        if qp.alarm != 0 && qp.alarm <= at {
            // What it finds then sets the next alarm.
            return;
        }
        self.timers.remove(&(qp.alarm, queue));
        qp.alarm = at;
        self.timers.insert((at, queue));
    }

    /// Sees that an answer which does not come is missed, unless that is seen to. `least`: the shortest timeout.
    pub fn await_answer(&mut self, queue: u32, least: Nanos) {
        if self.qps[queue as usize].as_ref().is_none_or(|qp| qp.waits.deadline != 0) {
            return;
        }
        let now = self.time();
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        // No alarm without a timeout: the request waits for ever, as the application asked.
        if let Some(timeout) = state::ack_timeout_nanos(qp.attr.timeout) {
            let at = now + timeout.max(least);
            qp.waits.deadline = at;
            self.alarm(at, queue);
        }
    }

    /// An answer has come: the next, if one is due, may take as long.
    pub fn extend_deadline(&mut self, queue: u32, least: Nanos) {
        let now = self.now;
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        let waiting = qp.pending.front().is_some_and(|wqe| wqe.sent_all || wqe.sent > wqe.done);
        qp.waits.deadline = match state::ack_timeout_nanos(qp.attr.timeout) {
            // The alarm that is already set finds the new deadline and sets itself again.
            Some(timeout) if waiting => now + timeout.max(least),
            _ => 0,
        };
    }

    /// What queue pairs of which `which` is true wait for at the device ([`crate::device::Again::Told`]) has come, or with `at` is
    /// asked for again at that time.
    pub fn resume(&mut self, at: Option<Nanos>, which: impl Fn(&Qp<D>) -> bool) {
        for queue in 0..self.qps.len() {
            let Some(qp) = &mut self.qps[queue] else { continue };
            if !which(qp) || !std::mem::take(&mut qp.waits.device) {
                continue;
            }
            match at {
                Some(at) => {
                    qp.waits.until = at;
                    self.alarm(at, queue as u32);
                }
                None => self.activate(queue as u32),
            }
        }
    }

    /// An alarm of this queue pair went off: a pause is over, or an answer is overdue.
    pub(super) fn on_alarm(&mut self, queue: u32) {
        let now = self.now;
        let Some(qp) = &mut self.qps[queue as usize] else { return };
        if qp.state != QpState::RTS && qp.state != QpState::SQD {
            return;
        }
        // Nothing is under way of what only its own container's rate holds back: it is nobody's answer that is overdue.
        let overdue = qp.awaits_answer() || qp.waits.device || qp.waits.until > now;
        if qp.waits.deadline != 0 && qp.waits.deadline <= now && !overdue {
            qp.waits.deadline = 0;
        }
        if qp.waits.deadline != 0 && qp.waits.deadline <= now {
            let Some(done) = qp.pending.front().map(|wqe| wqe.done) else {
                qp.waits = Waits::default();
                return;
            };
            if qp.retries == 0 {
                self.fail(queue, WcStatus::RETRY_EXC_ERR, vendor::TIMEOUT);
                return;
            }
            qp.retries -= 1;
            self.tally.timed_out();
            qp.rewind(0, done);
            qp.waits = Waits::default();
            qp.probing = true;
        }
        let Waits { until, deadline, .. } = qp.waits;
        let next = [until, deadline].into_iter().filter(|at| *at > now && *at != Nanos::MAX).min();
        if let Some(at) = next {
            self.alarm(at, queue);
        }
        self.activate(queue);
    }
}
