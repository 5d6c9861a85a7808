//! What moving data costs: time, rate and bandwidth, with a policy that never binds and without.

use crate::figure::{Figure, Goal};
use crate::programs::{Effort, Ends, Place, Said};
use anyhow::Result;
use ringfence_proxy::launch::{Class, Limits};

/// Every kind of policy that a device without a modelled link takes, at rates that never bind.
pub fn unbinding() -> Limits {
    Limits { bandwidth: Some(1_000_000_000_000), ops: Some(1_000_000_000), class: Class::Bulk, ..Limits::default() }
}

/// The same two ends without a policy and with one.
struct Both {
    plain: Ends,
    shaped: Ends,
}

impl Both {
    fn new(place: Place, effort: Effort) -> Result<Self> {
        let ends = |limits: &Limits| Ends::new(place, limits, effort);
        Ok(Self { plain: ends(&Limits::default())?, shaped: ends(&unbinding())? })
    }

    /// What programs say without and with.
    fn measure(&self, words: &[&str], effort: Effort) -> Result<(Said, Said)> {
        in_turns(effort, || self.plain.measure(words), || self.shaped.measure(words))
    }

    /// One value of that.
    fn value(&self, words: &[&str], name: &str, effort: Effort) -> Result<(f64, f64)> {
        let (plain, shaped) = self.measure(words, effort)?;
        Ok((plain.one(name)?, shaped.one(name)?))
    }
}

/// Measures two things that are to be compared, the medians of several turns: where the kernel finds a program's pages makes a fifth of
/// the difference that one turn of each shows, and a change of the machine's mood meets both.
fn in_turns(effort: Effort, one: impl Fn() -> Result<Said>, other: impl Fn() -> Result<Said>) -> Result<(Said, Said)> {
    let turns = if effort.quick { 1 } else { TURNS };
    let (mut ones, mut others) = (Vec::new(), Vec::new());
    for _ in 0..turns {
        ones.push(one()?);
        others.push(other()?);
    }
    Ok((Said::median(&ones), Said::median(&others)))
}

const TURNS: usize = 3;

fn under_policy(name: &str) -> String {
    format!("{name}, under policy")
}

/// Post to polled completion. The far program sleeps.
pub fn latency(place: Place, effort: Effort) -> Result<Vec<Figure>> {
    let both = Both::new(place, effort)?;
    let line = both.plain.floor(&["cache-line"])?.one("p50")?;
    let mut figures = vec![Figure::new("cache line, round trip between two cores, median", line, "ns")];
    for (kind, words) in [("WRITE 8 B", &["latency"][..]), ("WRITE 8 B inline", &["latency", "inline"])] {
        let (plain, shaped) = both.measure(words, effort)?;
        for (which, name, most) in [("median", "p50", 2.5), ("p99", "p99", 4.0)] {
            let (plain, shaped) = (plain.one(name)?, shaped.one(name)?);
            let name = format!("{kind}, post to polled completion, {which}");
            figures.push(Figure::new(&name, plain, "ns").beside(line).goal(Goal::RatioAtMost(most)));
            let name = under_policy(&name);
            figures.push(Figure::new(&name, shaped, "ns").beside(plain).goal(Goal::RatioAtMost(1.15)));
        }
    }
    Ok(figures)
}

fn rates(place: Place, effort: Effort, kinds: &[(&str, &str, f64)]) -> Result<Vec<Figure>> {
    let both = Both::new(place, effort)?;
    let mut figures = Vec::new();
    for (name, opcode, least) in kinds {
        let (plain, shaped) = both.value(&["rate", opcode], "rate", effort)?;
        let (plain, shaped) = (plain / 1e6, shaped / 1e6);
        figures.push(Figure::new(name, plain, "M/s").goal(Goal::AtLeast(*least)));
        let shaped = Figure::new(&under_policy(name), shaped, "M/s").beside(plain);
        figures.push(shaped.goal(Goal::RatioAtLeast(0.9)));
    }
    Ok(figures)
}

/// One-sided operations of 8 bytes. The far program sleeps.
pub fn rate(place: Place, effort: Effort) -> Result<Vec<Figure>> {
    let kinds = [
        ("WRITE 8 B, batches of 32", "write", 15.0),
        ("READ 8 B, batches of 32", "read", 8.0),
        ("FETCH_AND_ADD, batches of 32", "add", 8.0),
    ];
    rates(place, effort, &kinds)
}

/// Messages of 8 bytes to a program that polls for them: two programs and, between two containers, two workers spin.
pub fn sends(place: Place, effort: Effort) -> Result<Vec<Figure>> {
    rates(place, effort, &[("SEND 8 B, batches of 32, receiver polling", "send", 3.0)])
}

fn sizes(place: Place, effort: Effort, kinds: &[(&str, &str)], sizes: &[(&str, &str, f64)]) -> Result<Vec<Figure>> {
    let both = Both::new(place, effort)?;
    let mut figures = Vec::new();
    for (kind, opcode) in kinds {
        for (bytes, size, least) in sizes {
            let words = ["bandwidth", opcode, bytes];
            let (plain, shaped) = both.measure(&words, effort)?;
            let (memcpy, moved) = (plain.one("memcpy")? / 1e9, plain.one("moved")? / 1e9);
            let name = format!("{kind} {size} over 64 MiB");
            figures.push(Figure::new(&name, moved, "GB/s").beside(memcpy).goal(Goal::RatioAtLeast(*least)));
            let shaped = Figure::new(&under_policy(&name), shaped.one("moved")? / 1e9, "GB/s").beside(moved);
            figures.push(shaped.goal(Goal::RatioAtLeast(0.9)));
        }
    }
    Ok(figures)
}

/// WRITEs and READs of several sizes beside `memcpy`.
pub fn bandwidth(place: Place, effort: Effort) -> Result<Vec<Figure>> {
    let all =
        [("4096", "4 KiB", 0.5), ("65536", "64 KiB", 0.85), ("262144", "256 KiB", 0.85), ("1048576", "1 MiB", 0.85)];
    let some = if effort.quick { &all[..1] } else { &all[..] };
    sizes(place, effort, &[("WRITE", "write"), ("READ", "read")], some)
}

/// SENDs beside `memcpy`.
pub fn send_bandwidth(place: Place, effort: Effort) -> Result<Vec<Figure>> {
    sizes(place, effort, &[("SEND", "send")], &[("4096", "4 KiB", 0.25), ("65536", "64 KiB", 0.7)])
}

/// A weight, which only a modelled link has a use for, beside everything else of a policy.
pub fn weighted(effort: Effort) -> Result<Vec<Figure>> {
    let link = Some(1_000_000_000_000);
    let on = |limits: Limits| Ends::on(link, limits.clone(), Some(limits), effort);
    let both = Both { plain: on(Limits::default())?, shaped: on(Limits { weight: Some(100), ..unbinding() })? };
    let mut figures = Vec::new();
    for (name, words, said, scale, unit) in [
        ("WRITE 8 B, post to polled completion, median", &["latency"][..], "p50", 1.0, "ns"),
        ("WRITE 8 B, batches of 32", &["rate", "write"], "rate", 1e6, "M/s"),
        ("WRITE 64 KiB over 64 MiB", &["bandwidth", "write", "65536"], "moved", 1e9, "GB/s"),
        ("READ 64 KiB over 64 MiB", &["bandwidth", "read", "65536"], "moved", 1e9, "GB/s"),
    ] {
        let (plain, shaped) = both.value(words, said, effort)?;
        let goal = if unit == "ns" { Goal::RatioAtMost(1.15) } else { Goal::RatioAtLeast(0.9) };
        figures.push(Figure::new(&under_policy(name), shaped / scale, unit).beside(plain / scale).goal(goal));
    }
    Ok(figures)
}

/// A thousand queue pairs that nobody uses, beside one that is busy.
pub fn idle_queues(effort: Effort) -> Result<Vec<Figure>> {
    let limits = Limits { max_qp: 2048, ..Limits::default() };
    let ends = Ends::new(Place::Across, &limits, effort)?;
    let idle = if effort.quick { "100" } else { "1000" };
    let beside = |words: &[&str]| {
        let crowd = [words, &["idle", idle]].concat();
        in_turns(effort, || ends.measure(words), || ends.measure(&crowd))
    };
    let (alone, crowd) = beside(&["latency"])?;
    let (alone, crowd) = (alone.one("p50")?, crowd.one("p50")?);
    let latency = Figure::new("WRITE 8 B, median, beside 1,000 idle queue pairs", crowd, "ns");
    let (alone_rate, crowd_rate) = beside(&["rate", "write"])?;
    let (alone_rate, crowd_rate) = (alone_rate.one("rate")? / 1e6, crowd_rate.one("rate")? / 1e6);
    let rate = Figure::new("WRITE 8 B, batches of 32, beside 1,000 idle queue pairs", crowd_rate, "M/s");
    Ok(vec![
        latency.beside(alone).goal(Goal::RatioAtMost(1.1)),
        rate.beside(alone_rate).goal(Goal::RatioAtLeast(1.0 / 1.1)),
    ])
}
