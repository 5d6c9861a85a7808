//! What was found beside what was wanted.

use crate::model::{Outcome, Tenant};
use std::fmt::{self, Display, Formatter};

/// How far a share of the link may be from that by weight, in percent of it.
pub const SHARES_WITHIN: f64 = 3.0;

/// One figure, and how far from its goal it may be.
#[derive(Debug)]
pub struct Figure {
    pub name: String,
    /// In percent: of several, the worst.
    pub error: f64,
    pub goal: f64,
    /// What is to be said of each that is too far away.
    faults: Vec<String>,
}

impl Figure {
    pub fn new(name: &str, error: f64, goal: f64) -> Self {
        Self { name: name.into(), error, goal, faults: Vec::new() }
    }

    /// Each container's part of all that the link carried, against that by its weight.
    pub fn shares(name: &str, tenants: &[Tenant], outcomes: &[Outcome]) -> Self {
        let weights: f64 = tenants.iter().map(Tenant::weighs).sum();
        let wanted: Vec<f64> = tenants.iter().map(|tenant| tenant.weighs() / weights).collect();
        let mut figure = Self::new(name, 0.0, SHARES_WITHIN);
        for (index, (tenant, (wanted, found))) in tenants.iter().zip(wanted.iter().zip(shares(outcomes))).enumerate() {
            let error = percent(found, *wanted);
            // What is no number is no share.
            let error = if error.is_nan() { f64::INFINITY } else { error };
            if error.abs() > figure.error.abs() {
                figure.error = error;
            }
            if error.abs() > SHARES_WITHIN {
                figure.faults.push(format!(
                    "container {index} ({tenant}): expected {:.4} % of the link, got {:.4} %: {error:+.2} %, more than ±{SHARES_WITHIN} %",
                    wanted * 100.0,
                    found * 100.0,
                ));
            }
        }
        figure
    }

    fn is_met(&self) -> bool {
        self.error.abs() <= self.goal
    }

    /// A line for each thing that is beyond the goal.
    pub fn missed(self) -> Vec<String> {
        if self.is_met() {
            return Vec::new();
        }
        if self.faults.is_empty() {
            return vec![format!("{}: {:+.2} %, more than ±{} %", self.name, self.error, self.goal)];
        }
        self.faults.iter().map(|fault| format!("{}: {fault}", self.name)).collect()
    }
}

impl Display for Figure {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { name, error, goal, .. } = self;
        write!(f, "{name:<88} {error:>+7.2} %  (±{goal} %){}", if self.is_met() { "" } else { " MISSED" })
    }
}

/// What part of everything that the link carried each container had.
pub fn shares(outcomes: &[Outcome]) -> Vec<f64> {
    let all: u64 = outcomes.iter().map(|outcome| outcome.charged).sum();
    outcomes.iter().map(|outcome| outcome.charged as f64 / all as f64).collect()
}

/// How far from what was wanted.
pub fn percent(found: f64, wanted: f64) -> f64 {
    (found / wanted - 1.0) * 100.0
}
