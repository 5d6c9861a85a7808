//! Caps.

use super::{CAPS_WITHIN, OPS_WITHIN, OVERSLEEP, Part};
use crate::chart::Chart;
use crate::figure::{Figure, percent};
use crate::model::{Flow, Model, Tenant};
use ringfence_sched::Nanos;

/// The worst window of 100 ms against each cap, on a device that is as fast as memory.
pub fn caps(quick: bool) -> Part {
    let mut figures = Vec::new();
    let mut chart = Chart::bars("Caps: worst window of 100 ms, of the cap", "%");
    let mut note = |name: String, windows: Vec<f64>, wanted: f64, goal| {
        // The last window ends with the run, and the first may have the burst.
        let whole = &windows[..windows.len() - 1];
        let worst = whole.iter().map(|found| percent(*found, wanted)).max_by(|a, b| a.abs().total_cmp(&b.abs()));
        let error = worst.unwrap_or(-100.0);
        chart.bar(&name, 100.0 + error, 100.0);
        figures.push(Figure::new(&name, error, goal));
    };
    let run = |tenant: &Tenant| {
        let time = Nanos::millis(if quick { 350 } else { 1050 });
        let outcomes = Model::new(None, std::slice::from_ref(tenant), OVERSLEEP, Nanos::millis(50)).run(time);
        outcomes[0].windows.clone()
    };
    for megabits in [100, 1_000, 10_000] {
        for (bytes, fetches) in [(4096, false), (64 << 10, false), (1 << 20, false), (64 << 10, true)] {
            let rate = Some(megabits * 1_000_000);
            let flows = vec![Flow { fetches, ..Flow::new(4, bytes, 16) }];
            let (bandwidth, fetching) = if fetches { (None, rate) } else { (rate, None) };
            let windows = run(&Tenant { bandwidth, fetching, flows, ..Tenant::default() });
            let bytes_of = windows.iter().map(|window| window.0 as f64).collect();
            let verb = if fetches { "READ" } else { "WRITE" };
            let name = format!("{megabits} Mbit/s, 4 QPs, {verb} {bytes} B");
            note(name, bytes_of, megabits as f64 * 1e6 / 8.0 / 10.0, CAPS_WITHIN);
        }
    }
    for thousands in [10, 100, 1_000] {
        for bytes in [0, 8, 4096] {
            let flows = vec![Flow::new(4, bytes, 64)];
            let windows = run(&Tenant { ops: Some(thousands * 1_000), flows, ..Tenant::default() });
            let requests = windows.iter().map(|window| window.1 as f64).collect();
            note(
                format!("{thousands} k operations/s, 4 QPs of {bytes} B"),
                requests,
                thousands as f64 * 100.0,
                OPS_WITHIN,
            );
        }
    }
    Part { figures, chart, file: "caps.svg" }
}
