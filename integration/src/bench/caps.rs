//! Whether caps hold, and give what they promise, in windows of 100 ms.

use crate::figure::{Figure, Goal};
use crate::programs::{Effort, Ends, Place};
use anyhow::{Context, Result};
use ringfence_proxy::launch::Limits;

/// What is capped.
#[derive(Clone, Copy)]
enum Capped {
    /// What leaves by WRITEs.
    Out,
    /// What READs bring in.
    Fetched,
    /// What leaves because another container READs it.
    ReadOut,
    /// Work requests of 8 bytes.
    Operations,
}

/// A cap: its name, what it is of, bits or operations per second, and bytes of a request.
type Cap = (&'static str, Capped, u64, &'static str);

const CAPS: [Cap; 8] = [
    ("bandwidth 100 Mbit/s", Capped::Out, 100_000_000, "4096"),
    ("bandwidth 1 Gbit/s", Capped::Out, 1_000_000_000, "16384"),
    ("bandwidth 10 Gbit/s", Capped::Out, 10_000_000_000, "65536"),
    ("bandwidth-rx 100 Mbit/s", Capped::Fetched, 100_000_000, "4096"),
    ("bandwidth-rx 1 Gbit/s", Capped::Fetched, 1_000_000_000, "16384"),
    ("bandwidth-rx 10 Gbit/s", Capped::Fetched, 10_000_000_000, "65536"),
    ("ops 10 k/s", Capped::Operations, 10_000, "8"),
    ("ops 1 M/s", Capped::Operations, 1_000_000, "8"),
];

const READ_OUT: [Cap; 3] = [
    ("bandwidth 100 Mbit/s, READ by another container", Capped::ReadOut, 100_000_000, "4096"),
    ("bandwidth 1 Gbit/s, READ by another container", Capped::ReadOut, 1_000_000_000, "16384"),
    ("bandwidth 10 Gbit/s, READ by another container", Capped::ReadOut, 10_000_000_000, "65536"),
];

/// The largest error of a window against each cap.
pub fn figures(place: Place, effort: Effort) -> Result<Vec<Figure>> {
    let read_out = if place == Place::Across { &READ_OUT[..] } else { &[] };
    // One of each kind shows that all can be measured.
    let chosen = CAPS.iter().step_by(if effort.quick { 3 } else { 1 }).chain(read_out);
    chosen.map(|cap| worst(cap, place, effort)).collect()
}

fn worst((name, capped, rate, bytes): &Cap, place: Place, effort: Effort) -> Result<Figure> {
    let free = Limits::default();
    let rate_of = Some(*rate);
    let (limits, goal) = match capped {
        Capped::Out | Capped::ReadOut => (Limits { bandwidth: rate_of, ..Limits::default() }, 2.0),
        Capped::Fetched => (Limits { bandwidth_rx: rate_of, ..Limits::default() }, 2.0),
        Capped::Operations => (Limits { ops: rate_of, ..Limits::default() }, 3.0),
    };
    let ends = match (place, capped) {
        (Place::Inside, _) => Ends::new(place, &limits, effort)?,
        (Place::Across, Capped::ReadOut) => Ends::on(None, free, Some(limits), effort)?,
        (Place::Across, _) => Ends::on(None, limits, Some(free), effort)?,
    };
    let seconds = if effort.quick { "1" } else { "2" };
    let words = ["cap", bytes, seconds, "read"];
    let reads = matches!(capped, Capped::Fetched | Capped::ReadOut);
    let said = ends.measure(if reads { &words } else { &words[..3] })?;
    let bytes_each: f64 = bytes.parse()?;
    let per_second = if matches!(capped, Capped::Operations) { *rate as f64 * bytes_each } else { *rate as f64 / 8.0 };
    let target = per_second / 10.0;
    let errors = said.all("window")?.iter().map(|window| (window - target) / target * 100.0);
    let worst = errors.max_by(|a, b| a.abs().total_cmp(&b.abs())).context("no windows")?;
    Ok(Figure::new(&format!("{name}, worst window"), worst, "%").goal(Goal::Within(goal)))
}
