//! Shares of the link.

use super::{GBIT, LINK, OVERSLEEP, Part};
use crate::chart::Chart;
use crate::figure::{Figure, percent, shares};
use crate::model::{Flow, Model, Outcome, Tenant};
use ringfence_sched::{BitRate, Nanos};

/// What containers that all want the whole link get, after a while.
fn compete(tenants: &[Tenant], link: u64, time: Nanos) -> Vec<Outcome> {
    let settled = Nanos::millis(if link < LINK { 200 } else { 50 });
    Model::new(Some(link), tenants, OVERSLEEP, settled).run(time)
}

/// What part of the link was used.
fn used(outcomes: &[Outcome], link: u64, time: Nanos) -> f64 {
    let bytes: u64 = outcomes.iter().map(|outcome| outcome.charged).sum();
    bytes as f64 * 8e9 / time.0 as f64 / link as f64
}

/// Two containers that both want the whole link.
pub fn pairs(quick: bool) -> Part {
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
            let tenants = [first.clone(), second.clone()];
            // As much data on either link.
            let time = Nanos::millis(if quick { 500 } else { 3000 } * GBIT / link);
            let outcomes = compete(&tenants, link, time);
            let name = format!("{name}, {} Gbit/s", link / GBIT);
            let wanted = tenants[0].weighs() / (tenants[0].weighs() + tenants[1].weighs());
            chart.bar(&name, shares(&outcomes)[0] * 100.0, wanted * 100.0);
            figures.push(Figure::shares(&name, &tenants, &outcomes));
        }
    }
    Part { figures, chart, file: "pairs.svg" }
}

/// Requests of these bytes, and so many of them that their container always wants more.
fn flood(weight: u32, queues: u32, bytes: u64, link: u64) -> Flow {
    // Ten times what a calm window of the weight holds.
    let enough = u64::from(weight) * BitRate::new(link).map_or(0, |link| link.bytes_in(Nanos::micros(10)).0);
    Flow::new(queues, bytes, (enough / (bytes + 64) / u64::from(queues)) as u32 + 32)
}

/// Latency-class containers that ask for more than their share.
pub fn floods(quick: bool) -> Part {
    let mut figures = Vec::new();
    let mut chart =
        Chart::bars("Share of the link of a latency-class container that wants all of it: found, and due", "%");
    for link in [GBIT / 5, GBIT, LINK] {
        let time = Nanos::millis(if quick { 400 } else { 2000 } * GBIT / link.max(GBIT));
        let urgent =
            |weight, queues, bytes| Tenant::weighing(weight, &[flood(weight, queues, bytes, link)]).in_a_hurry();
        let bulk = |weight| Tenant::weighing(weight, &[flood(weight, 4, 64 << 10, link)]);
        let little = Flow { pause: Nanos::micros(200), ..Flow::new(4, 64, 1) };
        let with_own = |flow: Flow| Tenant::weighing(100, &[flow, Flow::new(4, 1 << 20, 4)]).in_a_hurry();
        let cases = [
            ("64 B beside bulk", vec![urgent(100, 16, 64), bulk(100)]),
            ("1 QP of 1 KiB beside bulk", vec![urgent(100, 1, 1 << 10), bulk(100)]),
            ("16 KiB beside bulk", vec![urgent(100, 16, 16 << 10), bulk(100)]),
            ("empty requests of 250 QPs beside bulk", vec![urgent(100, 250, 0), bulk(100)]),
            ("64 B beside bulk that weighs 3 times as much", vec![urgent(100, 16, 64), bulk(300)]),
            ("64 B beside bulk that weighs a third", vec![urgent(300, 16, 64), bulk(100)]),
            ("two of them, and bulk", vec![urgent(100, 16, 64), urgent(300, 8, 4096), bulk(200)]),
            ("three of them", vec![urgent(100, 16, 64), urgent(300, 8, 4096), urgent(200, 8, 16 << 10)]),
            ("with bulk of its own, beside bulk", vec![with_own(flood(100, 16, 64, link)), bulk(100)]),
            ("with bulk of its own and few urgent, beside bulk", vec![with_own(little), bulk(100)]),
        ];
        for (name, tenants) in cases {
            let outcomes = compete(&tenants, link, time);
            let name = format!("class latency: {name}, {} Gbit/s", link as f64 / GBIT as f64);
            let weights: f64 = tenants.iter().map(Tenant::weighs).sum();
            chart.bar(&name, shares(&outcomes)[0] * 100.0, tenants[0].weighs() / weights * 100.0);
            figures.push(Figure::shares(&name, &tenants, &outcomes));
        }
        // Who has nobody to share with, and who has somebody that wants little.
        let modest = Tenant { bandwidth: Some(link / 10), ..bulk(1000) };
        for (name, tenants) in
            [("alone", vec![urgent(1, 16, 64)]), ("beside bulk capped at a tenth", vec![urgent(1, 16, 64), modest])]
        {
            let part = used(&compete(&tenants, link, time), link, time);
            let name =
                format!("class latency: {name}, weight 1, {} Gbit/s: use of the link", link as f64 / GBIT as f64);
            figures.push(Figure::new(&name, percent(part, 1.0), 1.0));
        }
    }
    Part { figures, chart, file: "floods.svg" }
}

/// Containers of different weights, sizes and numbers of queue pairs, which all want more than they get.
fn crowd(count: usize, link: u64) -> Vec<Tenant> {
    const SIZES: [u64; 5] = [300, 1000, 5000, 16 << 10, 64 << 10];
    let tenant = |index: usize| {
        // From 10 to 1000, as many in each order of magnitude.
        let weight = 10f64.powf(1.0 + 2.0 * index as f64 / (count - 1) as f64).round() as u32;
        let bytes = if index.is_multiple_of(50) { 0 } else { SIZES[index % SIZES.len()] };
        Tenant::weighing(weight, &[flood(weight, 1 + index as u32 % 8, bytes, link / 5)])
    };
    (0..count).map(tenant).collect()
}

/// How many there are on which link, until when they have settled, and for how long they are looked at.
fn extent(quick: bool) -> (usize, u64, Nanos, Nanos) {
    if quick {
        (60, GBIT, Nanos::millis(500), Nanos::millis(4000))
    } else {
        (1000, LINK, Nanos::millis(2000), Nanos::millis(12_000))
    }
}

fn judge(name: &str, file: &'static str, quick: bool, tenants: &[Tenant]) -> Part {
    let (count, link, settled, time) = extent(quick);
    let outcomes = Model::new(Some(link), tenants, OVERSLEEP, settled).run(time);
    let weights: f64 = tenants.iter().map(Tenant::weighs).sum();
    let title =
        format!("{count} containers, {name}, 1 to 8 queue pairs, requests of 0 B to 64 KiB: error of each share");
    let mut chart = Chart::points(&title, "weight", "%");
    for (share, tenant) in shares(&outcomes).into_iter().zip(tenants) {
        chart.point(tenant.weighs(), percent(share, tenant.weighs() / weights));
    }
    let name = format!("{count} containers, {name}, weights 10 to 1000");
    let worst = Figure::shares(&format!("{name}: worst share"), tenants, &outcomes);
    let use_of = Figure::new(&format!("{name}: use of the link"), percent(used(&outcomes, link, time), 1.0), 1.0);
    Part { figures: vec![worst, use_of], chart, file }
}

/// All of them in class bulk.
pub fn thousand(quick: bool) -> Part {
    let (count, link, ..) = extent(quick);
    judge("class bulk", "thousand.svg", quick, &crowd(count, link))
}

/// Every third of them in class latency.
pub fn flooded(quick: bool) -> Part {
    let (count, link, ..) = extent(quick);
    let hurry = |(index, tenant): (usize, Tenant)| if index % 3 == 0 { tenant.in_a_hurry() } else { tenant };
    let tenants: Vec<Tenant> = crowd(count, link).into_iter().enumerate().map(hurry).collect();
    judge("every third in class latency", "flooded.svg", quick, &tenants)
}
