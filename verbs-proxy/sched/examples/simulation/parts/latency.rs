//! How long small requests take.

use super::{CAPS_WITHIN, GBIT, LINK, Part};
use crate::chart::Chart;
use crate::figure::{Figure, percent};
use crate::model::{Flow, Model, Tenant};
use ringfence_sched::{Class, Nanos};

/// Small requests of a container beside its own bulk and that of another, by the first one's class.
pub fn latency(quick: bool) -> Part {
    let small = Flow { pause: Nanos::micros(200), ..Flow::new(4, 64, 1) };
    let mut chart =
        Chart::bars("64-byte requests beside own and others' bulk on 10 Gbit/s: p99, and of the emptiest link", "µs");
    let time = Nanos::millis(if quick { 200 } else { 1000 });
    let mut figures = Vec::new();
    let mut worst_of = Vec::new();
    for (name, class, bandwidth) in [
        ("class bulk", Class::Bulk, None),
        ("class latency", Class::Latency, None),
        ("class latency, bandwidth 1 Gbit/s", Class::Latency, Some(GBIT)),
    ] {
        let own = Tenant {
            class,
            bandwidth,
            weight: Some(100),
            flows: vec![small, Flow::new(4, 1 << 20, 4)],
            ..Tenant::default()
        };
        let others = Tenant::weighing(100, &[Flow::new(16, 64 << 10, 16)]);
        let tenants = [own, others.clone(), others];
        let outcomes = Model::new(Some(LINK), &tenants, Nanos(0), Nanos::millis(100)).run(time);
        let mut times = outcomes[0].flows[0].times.clone();
        times.sort_unstable();
        let p99 = times[times.len() * 99 / 100] as f64 / 1e3;
        chart.bar(&format!("{name}: {:.0} µs in the middle", times[times.len() / 2] as f64 / 1e3), p99, 0.1);
        worst_of.push(p99);
        if let Some(rate) = bandwidth {
            let bytes: u64 = outcomes[0].flows.iter().map(|flow| flow.bytes).sum();
            let name = "class latency under a cap: all its requests together against the cap";
            figures.push(Figure::new(
                name,
                percent(bytes as f64 * 8.0 * 1e9 / time.0 as f64, rate as f64),
                CAPS_WITHIN,
            ));
        }
    }
    // Three windows that are short, and one small piece, are the most that is before an urgent request.
    let bound = 3.0 * 20.0 + 2.0 * 13.1;
    for (name, p99) in
        ["class latency: p99 beyond what three short windows take", "the same under a cap"].iter().zip(&worst_of[1..])
    {
        figures.push(Figure::new(name, percent(p99.max(bound), bound), 1.0));
    }
    // 100 queue pairs that ask for four tenths of the link, of which half is due: two windows, and what came at once.
    let (name, bound) = ("class latency, 0.4 of the link beside bulk of equal weight", 2.0 * 20.0 + 2.0 * 13.1);
    let many = Tenant::weighing(100, &[Flow { pause: Nanos::micros(200), ..Flow::new(100, 1 << 10, 1) }]).in_a_hurry();
    let tenants = [many, Tenant::weighing(100, &[Flow::new(16, 64 << 10, 16)])];
    let outcomes = Model::new(Some(LINK), &tenants, Nanos(0), Nanos::millis(100)).run(time);
    let mut times = outcomes[0].flows[0].times.clone();
    times.sort_unstable();
    let p99 = times[times.len() * 99 / 100] as f64 / 1e3;
    chart.bar(&format!("{name}: {:.0} µs in the middle", times[times.len() / 2] as f64 / 1e3), p99, 0.1);
    figures.push(Figure::new(&format!("{name}: p99 beyond two short windows"), percent(p99.max(bound), bound), 1.0));
    Part { figures, chart, file: "latency.svg" }
}
