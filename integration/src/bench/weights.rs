//! Shares of a contended link between two containers that both want all of it.

use crate::figure::{Figure, Goal};
use crate::programs::{self, Effort};
use anyhow::{Result, ensure};
use ringfence_integration::command::{Running, wait_until};
use ringfence_integration::direct::Node;
use ringfence_proxy::launch::{Class, Limits, Weight};
use ringfence_sched::{BitRate, Bytes, HEADERS, Nanos, Scheduler};
use std::process::Stdio;
use std::time::Duration;

/// Slow enough for the smallest requests to fill it on two cores.
const LINK: u64 = 200_000_000;

/// One of the two containers: its weight, bytes of its requests, its queue pairs, its class.
#[derive(Clone, Copy)]
struct Sender {
    weight: u32,
    bytes: u32,
    qps: u32,
    class: Class,
}

impl Sender {
    const fn new(weight: u32, bytes: u32, qps: u32) -> Self {
        Self { weight, bytes, qps, class: Class::None }
    }

    /// In class latency: of small requests, all are urgent.
    const fn urgent(self) -> Self {
        Self { class: Class::Latency, ..self }
    }
}

/// Two containers, what they differ in, and what part of the link is the first one's.
type Contest = (&'static str, [Sender; 2], f64);

const CONTESTS: [Contest; 7] = [
    ("weights 1:3", [Sender::new(100, 16384, 1), Sender::new(300, 16384, 1)], 0.25),
    ("equal weights, 1 against 250 queue pairs", [Sender::new(100, 16384, 1), Sender::new(100, 16384, 250)], 0.5),
    ("equal weights, 64 KiB against empty requests", [Sender::new(100, 65536, 1), Sender::new(100, 0, 1)], 0.5),
    (
        "equal weights, 64 KiB against empty requests of 250 queue pairs",
        [Sender::new(100, 65536, 1), Sender::new(100, 0, 250)],
        0.5,
    ),
    (
        "equal weights, class latency with 64 B against 64 KiB",
        [Sender::new(100, 64, 1).urgent(), Sender::new(100, 65536, 1)],
        0.5,
    ),
    (
        "weights 1:3, class latency with 64 B against 64 KiB",
        [Sender::new(100, 64, 1).urgent(), Sender::new(300, 65536, 1)],
        0.25,
    ),
    (
        "weights 1:3, class latency with 1 KiB of 16 queue pairs against 64 B in class latency",
        [Sender::new(100, 1024, 16).urgent(), Sender::new(300, 64, 1).urgent()],
        0.25,
    ),
];

/// How far each first container is from its part.
pub fn figures(effort: Effort) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (name, senders, part) in CONTESTS {
        let [first, second] = contest(senders, effort)?;
        ensure!(first + second > 0.0, "{name}: nothing got through");
        let error = (first / (first + second) / part - 1.0) * 100.0;
        figures
            .push(Figure::new(&format!("{name}: error of the first one's share"), error, "%").goal(Goal::Within(3.0)));
        let used = (first + second) * 100.0;
        figures.push(Figure::new(&format!("{name}: use of the link"), used, "%"));
    }
    Ok(figures)
}

/// What part of the link each has had.
fn contest(senders: [Sender; 2], effort: Effort) -> Result<[f64; 2]> {
    let node = Node::new(Some(LINK))?;
    let sink = node.proxy(Limits { max_qp: 1024, ..Limits::default() })?;
    let proxies = [node.proxy(limits(senders[0]))?, node.proxy(limits(senders[1]))?];
    let milliseconds = if effort.quick { 200 } else { 2000 };
    let program = programs::pair()?;
    // Both wait for the end of one pipe.
    let (reader, writer) = std::io::pipe()?;
    let mut running = Vec::new();
    for (sender, proxy) in senders.iter().zip(&proxies) {
        let words = ["share", &sender.bytes.to_string(), &sender.qps.to_string(), &milliseconds.to_string()];
        let command = programs::command(proxy, Some(&sink), &program, &words, effort)?;
        running.push(Running::start_reading(command, Stdio::from(reader.try_clone()?))?);
    }
    wait_until("both senders to be connected", Duration::from_secs(120), || {
        running.iter_mut().all(|running| running.output().contains("ready") || running.has_ended())
    })?;
    drop(writer);
    let mut parts = [0.0; 2];
    for ((sender, running), part) in senders.iter().zip(running).zip(&mut parts) {
        let requests = programs::finish(running)?.one("requests")?;
        *part = requests * charged(*sender)? * 8.0 * 1000.0 / f64::from(milliseconds) / LINK as f64;
    }
    Ok(parts)
}

fn limits(sender: Sender) -> Limits {
    Limits { weight: Weight::new(sender.weight), class: sender.class, ..Limits::default() }
}

/// Bytes of the link that a request takes: headers count for each piece.
fn charged(sender: Sender) -> Result<f64> {
    let policy = limits(sender).policy();
    let scheduler = Scheduler::new(&policy, BitRate::new(LINK), Nanos(0));
    let total = Bytes(sender.bytes.into());
    let (mut left, mut charged) = (total, HEADERS.0);
    while let piece = scheduler.piece(total, left).0
        && piece < left.0
        && piece > 0
    {
        left = Bytes(left.0 - piece);
        charged += HEADERS.0;
    }
    Ok((charged + total.0) as f64)
}
