//! A thousand containers on one link, in simulated time, by the scheduler that ships.
//!
//! `cargo run --release -p ringfence-sched --example simulation [DIRECTORY]` prints each figure beside its goal, draws them
//! as SVG into the directory (`target/simulation` if none is given), and fails if a goal is missed.

mod chart;
mod model;

use chart::Chart;
use model::{Flow, Model, Outcome, Tenant};
use ringfence_sched::{Class, Nanos};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const GBIT: u64 = 1_000_000_000;
const LINK: u64 = 10 * GBIT;
/// Workers wake up to this late, as on a machine with more to do.
const OVERSLEEP: Nanos = Nanos::micros(60);
const SHARES_WITHIN: f64 = 3.0;
const CAPS_WITHIN: f64 = 2.0;
const OPS_WITHIN: f64 = 3.0;

/// What was found beside what was wanted, in percent.
struct Figure {
    name: String,
    error: f64,
    goal: f64,
}

impl Figure {
    fn print(&self) -> bool {
        let met = self.error.abs() <= self.goal;
        println!("{:<88} {:>+7.2} %  (±{} %) {}", self.name, self.error, self.goal, if met { "" } else { "MISSED" });
        met
    }
}

fn main() -> ExitCode {
    let directory = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("target/simulation"), PathBuf::from);
    if let Err(error) = std::fs::create_dir_all(&directory) {
        eprintln!("simulation: cannot make {}: {error}", directory.display());
        return ExitCode::FAILURE;
    }
    let mut met = true;
    for part in [pairs, thousand, caps, latency] {
        let (figures, chart, name) = part();
        for figure in &figures {
            met &= figure.print();
        }
        let path: &Path = &directory.join(name);
        if let Err(error) = std::fs::write(path, chart.draw()) {
            eprintln!("simulation: cannot write {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
        println!("  {}", path.display());
    }
    if met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

type Part = (Vec<Figure>, Chart, &'static str);

/// What part of everything that the link carried each container had.
fn shares(outcomes: &[Outcome]) -> Vec<f64> {
    let all: u64 = outcomes.iter().map(|outcome| outcome.charged).sum();
    outcomes.iter().map(|outcome| outcome.charged as f64 / all as f64).collect()
}

fn percent(found: f64, wanted: f64) -> f64 {
    (found / wanted - 1.0) * 100.0
}

/// Two containers that both want the whole link.
fn pairs() -> Part {
    let bulk = |queues| Flow::new(queues, 64 << 10, 16);
    let cases: [(&str, Tenant, Tenant); 8] = [
        ("weights 1:3, 16 and 4 QPs of 64 KiB", Tenant::weighing(100, &[bulk(16)]), Tenant::weighing(300, &[bulk(4)])),
        (
            "weights 1:3, 1 MiB and 300 B",
            Tenant::weighing(100, &[Flow::new(4, 1 << 20, 4)]),
            Tenant::weighing(300, &[Flow::new(64, 300, 64)]),
        ),
        ("weights 1:1000, 64 KiB", Tenant::weighing(1, &[bulk(4)]), Tenant::weighing(1000, &[bulk(4)])),
        (
            "equal weights, 1 against 250 QPs of 64 KiB",
            Tenant::weighing(100, &[bulk(1)]),
            Tenant::weighing(100, &[bulk(250)]),
        ),
        (
            "equal weights, 64 KiB against 250 QPs of empty requests",
            Tenant::weighing(100, &[bulk(1)]),
            Tenant::weighing(100, &[Flow::new(250, 0, 32)]),
        ),
        (
            "equal weights, 64 KiB against 250 QPs of 8 B",
            Tenant::weighing(100, &[bulk(1)]),
            Tenant::weighing(100, &[Flow::new(250, 8, 32)]),
        ),
        (
            "equal weights, 5000 B against 64 KiB",
            Tenant::weighing(100, &[Flow::new(2, 5000, 64)]),
            Tenant::weighing(100, &[bulk(8)]),
        ),
        (
            "equal weights, WRITE 64 KiB against READ 64 KiB",
            Tenant::weighing(100, &[bulk(4)]),
            Tenant::weighing(100, &[Flow { fetches: true, ..bulk(4) }]),
        ),
    ];
    let mut figures = Vec::new();
    let mut chart = Chart::bars("Share of the link of the first of two containers: found, and by weight", "%");
    for (name, first, second) in cases {
        for link in [GBIT, LINK] {
            let (a, b) = (f64::from(first.weight.unwrap_or(100)), f64::from(second.weight.unwrap_or(100)));
            let tenants = [first.clone(), second.clone()];
            // As much data on either link.
            let time = Nanos::millis(3000 * GBIT / link);
            let found = shares(&Model::new(Some(link), &tenants, OVERSLEEP, Nanos::millis(200)).run(time))[0];
            let wanted = a / (a + b);
            let name = format!("{name}, {} Gbit/s", link / GBIT);
            chart.bar(&name, found * 100.0, wanted * 100.0);
            figures.push(Figure { name, error: percent(found, wanted), goal: SHARES_WITHIN });
        }
    }
    (figures, chart, "pairs.svg")
}

/// A thousand containers of different weights, sizes and numbers of queue pairs.
fn thousand() -> Part {
    const SIZES: [u64; 5] = [300, 1000, 5000, 16 << 10, 64 << 10];
    let tenants: Vec<_> = (0..1000usize)
        .map(|index| {
            // From 10 to 1000, as many in each order of magnitude.
            let weight = 10f64.powf(1.0 + 2.0 * index as f64 / 999.0).round() as u32;
            let bytes = if index % 50 == 0 { 0 } else { SIZES[index % SIZES.len()] };
            // Enough outstanding for its window, whatever its size.
            let queues = 1 + index as u32 % 8;
            let depth = (u64::from(weight) * 2_500 / (bytes + 64)) as u32 / queues + 8;
            Tenant::weighing(weight, &[Flow::new(queues, bytes, depth)])
        })
        .collect();
    let outcomes = Model::new(Some(LINK), &tenants, OVERSLEEP, Nanos::millis(2000)).run(Nanos::millis(12_000));
    let weights: f64 = tenants.iter().filter_map(|tenant| tenant.weight).map(f64::from).sum();
    let mut chart = Chart::points(
        "1,000 containers, 1 to 8 queue pairs, requests of 0 B to 64 KiB: error of each share",
        "weight",
        "%",
    );
    let (mut worst, mut used) = (0f64, 0);
    for (share, (tenant, outcome)) in shares(&outcomes).into_iter().zip(tenants.iter().zip(&outcomes)) {
        let weight = f64::from(tenant.weight.unwrap_or(100));
        let error = percent(share, weight / weights);
        chart.point(weight, error);
        used += outcome.charged;
        if error.abs() > worst.abs() {
            worst = error;
        }
    }
    let link = percent(used as f64 * 8.0 / 12.0, LINK as f64);
    let figures = vec![
        Figure { name: "1,000 containers, weights 10 to 1000: worst share".into(), error: worst, goal: SHARES_WITHIN },
        Figure { name: "1,000 containers: use of the link".into(), error: link, goal: 1.0 },
    ];
    (figures, chart, "thousand.svg")
}

/// The worst window of 100 ms against each cap, on a device that is as fast as memory.
fn caps() -> Part {
    let mut figures = Vec::new();
    let mut chart = Chart::bars("Caps: worst window of 100 ms, of the cap", "%");
    let mut note = |name: String, windows: Vec<f64>, wanted: f64, goal| {
        // The last window ends with the run, and the first may have the burst.
        let whole = &windows[..windows.len() - 1];
        let worst = whole.iter().map(|found| percent(*found, wanted)).max_by(|a, b| a.abs().total_cmp(&b.abs()));
        let error = worst.unwrap_or(-100.0);
        chart.bar(&name, 100.0 + error, 100.0);
        figures.push(Figure { name, error, goal });
    };
    let run = |tenant: &Tenant| {
        let outcomes =
            Model::new(None, std::slice::from_ref(tenant), OVERSLEEP, Nanos::millis(50)).run(Nanos::millis(1050));
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
    (figures, chart, "caps.svg")
}

/// Small requests of a container beside its own bulk and that of another, by the first one's class.
fn latency() -> Part {
    let small = Flow { pause: Nanos::micros(200), ..Flow::new(4, 64, 1) };
    let mut chart =
        Chart::bars("64-byte requests beside own and others' bulk on 10 Gbit/s: p99, and of the emptiest link", "µs");
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
        let outcomes = Model::new(Some(LINK), &tenants, Nanos(0), Nanos::millis(100)).run(Nanos::millis(1000));
        let mut times = outcomes[0].flows[0].times.clone();
        times.sort_unstable();
        let p99 = times[times.len() * 99 / 100] as f64 / 1e3;
        chart.bar(&format!("{name}: {:.0} µs in the middle", times[times.len() / 2] as f64 / 1e3), p99, 0.1);
        worst_of.push(p99);
        if let Some(rate) = bandwidth {
            let bytes: u64 = outcomes[0].flows.iter().map(|flow| flow.bytes).sum();
            let name = "class latency under a cap: all its requests together against the cap, over 1 s".into();
            figures.push(Figure { name, error: percent(bytes as f64 * 8.0, rate as f64), goal: CAPS_WITHIN });
        }
    }
    // Three windows that are short, and one small piece, are the most that is before an urgent request.
    let bound = 3.0 * 20.0 + 2.0 * 13.1;
    for (name, p99) in
        ["class latency: p99 beyond what three short windows take", "the same under a cap"].iter().zip(&worst_of[1..])
    {
        figures.push(Figure { name: (*name).into(), error: percent(p99.max(bound), bound), goal: 1.0 });
    }
    (figures, chart, "latency.svg")
}
