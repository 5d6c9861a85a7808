//! What is simulated.

mod caps;
mod latency;
mod shares;

use crate::chart::Chart;
use crate::figure::Figure;
use ringfence_sched::Nanos;

/// Figures of one kind, and their drawing.
pub struct Part {
    pub figures: Vec<Figure>,
    pub chart: Chart,
    pub file: &'static str,
}

/// All of them. They are told whether to be quick.
pub const ALL: [fn(bool) -> Part; 6] =
    [shares::pairs, shares::floods, shares::thousand, shares::flooded, caps::caps, latency::latency];

const GBIT: u64 = 1_000_000_000;
const LINK: u64 = 10 * GBIT;
/// Workers wake up to this late, as on a machine with more to do.
const OVERSLEEP: Nanos = Nanos::micros(60);
const CAPS_WITHIN: f64 = 2.0;
const OPS_WITHIN: f64 = 3.0;
