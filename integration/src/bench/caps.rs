//! Whether caps hold, and give what they promise, in windows of 100 ms.

use crate::figure::{Figure, Goal};
use crate::programs::{Effort, Ends, Place};
use anyhow::Result;
use ringfence_proxy::launch::{BitRate, Limits, OpRate};

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

/// From here on a processor counts as taken away, nanoseconds in a window: half of what the goals allow.
const AWAY: f64 = 1e6;

/// The largest error of a window against each cap; and of those windows in which, and before which, no processor was taken away from the
/// machine. How long one was away at most, as far as can be seen, stands beside them: a window at whose end that happens is off by it.
pub fn figures(place: Place, effort: Effort) -> Result<Vec<Figure>> {
    let read_out = if place == Place::Across { &READ_OUT[..] } else { &[] };
    // One of each kind shows that all can be measured.
    let chosen = CAPS.iter().step_by(if effort.quick { 3 } else { 1 }).chain(read_out);
    let mut figures = Vec::new();
    let mut longest = None::<f64>;
    for cap in chosen {
        let windows = windows(cap, place, effort)?;
        figures.extend(worst(cap, &windows));
        longest = windows.iter().filter_map(|window| window.away).chain(longest).max_by(f64::total_cmp);
    }
    figures.extend(
        longest.map(|away| Figure::new("a processor taken away from the machine in a window", away / 1e6, "ms")),
    );
    Ok(figures)
}

/// A hundred milliseconds under a cap.
struct Window {
    /// Per cent of what was due.
    error: f64,
    /// For how long a processor was taken away, nanoseconds, if that could be seen.
    away: Option<f64>,
}

fn worst((name, capped, ..): &Cap, windows: &[Window]) -> Vec<Figure> {
    let goal = Goal::Within(if matches!(capped, Capped::Operations) { 3.0 } else { 2.0 });
    let there = |window: &Window| window.away.is_some_and(|away| away < AWAY);
    // What was missed in one window is made up for in the next.
    let undisturbed = windows.windows(2).filter(|pair| pair.iter().all(there)).map(|pair| pair[1].error);
    let errors =
        [("", windows.iter().map(|window| window.error).collect()), (", all processors there", undisturbed.collect())];
    let largest = |errors: Vec<f64>| errors.into_iter().max_by(|a, b| a.abs().total_cmp(&b.abs()));
    let figure =
        |(which, errors)| Some(Figure::new(&format!("{name}, worst window{which}"), largest(errors)?, "%").goal(goal));
    errors.into_iter().filter_map(figure).collect()
}

fn windows((_, capped, rate, bytes): &Cap, place: Place, effort: Effort) -> Result<Vec<Window>> {
    let free = Limits::default();
    let limits = match capped {
        Capped::Out | Capped::ReadOut => Limits { bandwidth: BitRate::new(*rate), ..Limits::default() },
        Capped::Fetched => Limits { bandwidth_rx: BitRate::new(*rate), ..Limits::default() },
        Capped::Operations => Limits { ops: OpRate::new(*rate), ..Limits::default() },
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
    let moved = said.all("window")?;
    let away = said.all("away").unwrap_or_default();
    let windows = moved
        .iter()
        .enumerate()
        .map(|(at, moved)| Window { error: (moved - target) / target * 100.0, away: away.get(at).copied() });
    Ok(windows.collect())
}
