//! What moving data costs: time, rate and bandwidth, with a policy that never binds and without.

use crate::figure::{Figure, Goal};
use crate::programs::{Effort, Ends, Place, Said};
use anyhow::{Error, Result};
use ringfence_proxy::launch::{BitRate, Class, Limits, OpRate, Weight};

/// Every kind of policy that a device without a modelled link takes, at rates that never bind.
pub fn unbinding() -> Limits {
    Limits {
        bandwidth: BitRate::new(1_000_000_000_000),
        ops: OpRate::new(1_000_000_000),
        class: Class::Bulk,
        ..Limits::default()
    }
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

    /// What programs say without and with, in turns.
    fn measure(&self, words: &[&str], effort: Effort) -> Result<Turns> {
        in_turns(effort, || self.plain.measure(words), || self.shaped.measure(words))
    }
}

/// What two things that are to be compared have said, one turn after the other.
pub struct Turns(Vec<(Said, Said)>);

/// Measures two things that are to be compared in several turns: where the kernel finds a program's pages makes a fifth of the
/// difference that one turn of each shows, and the machine's mood changes within seconds.
pub fn in_turns(effort: Effort, one: impl Fn() -> Result<Said>, other: impl Fn() -> Result<Said>) -> Result<Turns> {
    take_turns(turns(effort), one, other)
}

fn take_turns(count: usize, one: impl Fn() -> Result<Said>, other: impl Fn() -> Result<Said>) -> Result<Turns> {
    Ok(Turns((0..count).map(|_| Ok((one()?, other()?))).collect::<Result<_>>()?))
}

/// How many turns there are.
pub fn turns(effort: Effort) -> usize {
    if effort.quick { 1 } else { 5 }
}

impl Turns {
    /// A figure of the first, beside another value of it, if that has one.
    fn first(&self, name: &str, said: &str, unit: Unit, floor: Option<&str>) -> Result<Figure> {
        figure(name, self.0.iter().map(|(first, _)| first), said, unit, floor)
    }

    /// A figure of the second, beside the same of the first.
    pub fn second(&self, name: &str, said: &str, unit: Unit) -> Result<Figure> {
        self.beside(name, said, unit, |first| first)
    }

    /// A figure of the second, beside the same of something that was measured once.
    fn second_beside(&self, once: &Said, name: &str, said: &str, unit: Unit) -> Result<Figure> {
        self.beside(name, said, unit, |_| once)
    }

    fn beside<'a>(
        &'a self,
        name: &str,
        said: &str,
        (scale, unit): Unit,
        floor: impl Fn(&'a Said) -> &'a Said,
    ) -> Result<Figure> {
        let sample =
            |(first, second): &'a (Said, Said)| Ok((second.one(said)? / scale, Some(floor(first).one(said)? / scale)));
        Ok(Figure::of(name, unit, self.0.iter().map(sample).collect::<Result<_>>()?))
    }
}

/// A figure of what was said in each turn, beside another value of it, if that has one.
fn figure<'a>(
    name: &str,
    turns: impl Iterator<Item = &'a Said>,
    value: &str,
    (scale, unit): Unit,
    floor: Option<&str>,
) -> Result<Figure> {
    let sample = |said: &Said| {
        Ok((said.one(value)? / scale, floor.map(|floor| Ok::<_, Error>(said.one(floor)? / scale)).transpose()?))
    };
    Ok(Figure::of(name, unit, turns.map(sample).collect::<Result<_>>()?))
}

/// What a program's values are divided by, and what they are then.
pub type Unit = (f64, &'static str);
const NS: Unit = (1.0, "ns");
const MILLIONS: Unit = (1e6, "M/s");
const GIGABYTES: Unit = (1e9, "GB/s");

/// The name of a figure with a policy.
pub fn under_policy(name: &str) -> String {
    format!("{name}, under policy")
}

/// Post to polled completion. The far program sleeps.
pub fn latency(place: Place, effort: Effort) -> Result<Vec<Figure>> {
    let both = Both::new(place, effort)?;
    let mut figures = Vec::new();
    for (kind, words) in [("WRITE 8 B", &["latency"][..]), ("WRITE 8 B inline", &["latency", "inline"])] {
        let turns = both.measure(words, effort)?;
        let name = format!("cache line, round trip between two cores, median, beside {kind}");
        figures.push(turns.first(&name, "line", NS, None)?);
        for (which, said, most) in [("median", "p50", 2.5), ("p99 of 10,000", "p99", 4.0)] {
            let name = format!("{kind}, post to polled completion, {which}");
            figures.push(turns.first(&name, said, NS, Some("line"))?.goal(Goal::RatioAtMost(most)));
            figures.push(turns.second(&under_policy(&name), said, NS)?.goal(Goal::RatioAtMost(1.15)));
        }
    }
    Ok(figures)
}

fn rates(place: Place, effort: Effort, kinds: &[(&str, &str, f64)]) -> Result<Vec<Figure>> {
    let both = Both::new(place, effort)?;
    let mut figures = Vec::new();
    for (name, opcode, least) in kinds {
        let turns = both.measure(&["rate", opcode], effort)?;
        figures.push(turns.first(name, "rate", MILLIONS, None)?.goal(Goal::AtLeast(*least)));
        figures.push(turns.second(&under_policy(name), "rate", MILLIONS)?.goal(Goal::RatioAtLeast(0.9)));
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
            let turns = both.measure(&["bandwidth", opcode, bytes], effort)?;
            let name = format!("{kind} {size} over 64 MiB");
            figures.push(turns.first(&name, "moved", GIGABYTES, Some("memcpy"))?.goal(Goal::RatioAtLeast(*least)));
            figures.push(turns.second(&under_policy(&name), "moved", GIGABYTES)?.goal(Goal::RatioAtLeast(0.9)));
        }
    }
    Ok(figures)
}

/// WRITEs and READs of several sizes beside `memcpy`.
pub fn bandwidth(place: Place, effort: Effort) -> Result<Vec<Figure>> {
    let all =
        [("4096", "4 KiB", 0.5), ("65536", "64 KiB", 0.85), ("262144", "256 KiB", 0.85), ("1048576", "1 MiB", 0.85)];
    let some = if effort.quick { &all[..1] } else { &all[..] };
    let mut figures = sizes(place, effort, &[("WRITE", "write"), ("READ", "read")], some)?;
    if place == Place::Across {
        figures.extend(within_pages(effort)?);
    }
    Ok(figures)
}

/// The same of regions that begin and end within a page, as `malloc` makes them: neighbours see none of those.
fn within_pages(effort: Effort) -> Result<Vec<Figure>> {
    let ends = Ends::new(Place::Across, &Limits::default(), effort)?;
    let mut figures = Vec::new();
    for (kind, opcode) in [("WRITE", "write"), ("READ", "read"), ("SEND", "send")] {
        for (bytes, size) in [("4096", "4 KiB"), ("65536", "64 KiB")] {
            let measure = |_| ends.measure(&["bandwidth", opcode, bytes, "16"]);
            let said = (0..turns(effort)).map(measure).collect::<Result<Vec<_>>>()?;
            let name = format!("{kind} {size} over 64 MiB, 16 bytes into a page");
            figures.push(figure(&name, said.iter(), "moved", GIGABYTES, Some("memcpy"))?);
        }
    }
    Ok(figures)
}

/// SENDs beside `memcpy`.
pub fn send_bandwidth(place: Place, effort: Effort) -> Result<Vec<Figure>> {
    sizes(place, effort, &[("SEND", "send")], &[("4096", "4 KiB", 0.25), ("65536", "64 KiB", 0.7)])
}

/// Something that is measured with a weight: its name, the program's words, what that says by the ends of figures' names, and the unit.
type Weighted = (&'static str, &'static [&'static str], &'static [(&'static str, &'static str)], Unit);

const TIMES: &[(&str, &str)] = &[(", median", "p50"), (", p99 of 10,000", "p99")];
const RATE: &[(&str, &str)] = &[("", "rate")];
const MOVED: &[(&str, &str)] = &[("", "moved")];

const WEIGHTED: [Weighted; 16] = [
    ("WRITE 8 B, post to polled completion", &["latency"], TIMES, NS),
    ("WRITE 8 B inline, post to polled completion", &["latency", "inline"], TIMES, NS),
    ("WRITE 8 B, batches of 32", &["rate", "write"], RATE, MILLIONS),
    ("READ 8 B, batches of 32", &["rate", "read"], RATE, MILLIONS),
    ("FETCH_AND_ADD, batches of 32", &["rate", "add"], RATE, MILLIONS),
    ("SEND 8 B, batches of 32, receiver polling", &["rate", "send"], RATE, MILLIONS),
    ("WRITE 4 KiB over 64 MiB", &["bandwidth", "write", "4096"], MOVED, GIGABYTES),
    ("WRITE 64 KiB over 64 MiB", &["bandwidth", "write", "65536"], MOVED, GIGABYTES),
    ("WRITE 256 KiB over 64 MiB", &["bandwidth", "write", "262144"], MOVED, GIGABYTES),
    ("WRITE 1 MiB over 64 MiB", &["bandwidth", "write", "1048576"], MOVED, GIGABYTES),
    ("READ 4 KiB over 64 MiB", &["bandwidth", "read", "4096"], MOVED, GIGABYTES),
    ("READ 64 KiB over 64 MiB", &["bandwidth", "read", "65536"], MOVED, GIGABYTES),
    ("READ 256 KiB over 64 MiB", &["bandwidth", "read", "262144"], MOVED, GIGABYTES),
    ("READ 1 MiB over 64 MiB", &["bandwidth", "read", "1048576"], MOVED, GIGABYTES),
    ("SEND 4 KiB over 64 MiB", &["bandwidth", "send", "4096"], MOVED, GIGABYTES),
    ("SEND 64 KiB over 64 MiB", &["bandwidth", "send", "65536"], MOVED, GIGABYTES),
];

/// A weight, which only a modelled link has a use for, beside everything else of a policy: beside the same link without a policy, and,
/// without a goal, beside no link, as a link alone has requests go the long way.
pub fn weighted(place: Place, effort: Effort) -> Result<Vec<Figure>> {
    let ends = |link, limits: Limits| {
        let far = (place == Place::Across).then(|| limits.clone());
        Ends::on(link, limits, far, effort)
    };
    let link = Some(1_000_000_000_000);
    let (plain, bare) = (ends(link, Limits::default())?, ends(None, Limits::default())?);
    let shaped = ends(link, Limits { weight: Weight::new(100), ..unbinding() })?;
    let mut figures = Vec::new();
    // Messages inside one container are measured nowhere else either.
    let is_measured = |(_, words, ..): &&Weighted| {
        (place == Place::Across || !words.contains(&"send"))
            && (!effort.quick || words.get(2).is_none_or(|bytes| *bytes == "4096"))
    };
    for (kind, words, values, unit) in WEIGHTED.iter().filter(is_measured) {
        let is_time = *unit == NS;
        // For more a run has no time, but of times, which take the least to measure and are the nearest to their goals.
        let count = if is_time { turns(effort) } else { turns(effort).min(3) };
        let without_link = bare.measure(words)?;
        let turns = take_turns(count, || plain.measure(words), || shaped.measure(words))?;
        for (ending, said) in *values {
            let name = under_policy(&format!("{kind}{ending}"));
            let goal = if is_time { Goal::RatioAtMost(1.15) } else { Goal::RatioAtLeast(0.9) };
            figures.push(turns.second(&name, said, *unit)?.goal(goal));
            let name = format!("{name}, beside neither policy nor link");
            figures.push(turns.second_beside(&without_link, &name, said, *unit)?);
        }
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
    let latency = beside(&["latency"])?.second("WRITE 8 B, median, beside 1,000 idle queue pairs", "p50", NS)?;
    let name = "WRITE 8 B, batches of 32, beside 1,000 idle queue pairs";
    let rate = beside(&["rate", "write"])?.second(name, "rate", MILLIONS)?;
    Ok(vec![latency.goal(Goal::RatioAtMost(1.1)), rate.goal(Goal::RatioAtLeast(1.0 / 1.1))])
}
