//! Shares of a contended link between two containers that both want all of it.

use crate::figure::{Figure, Goal};
use crate::programs::{self, Effort};
use anyhow::{Result, ensure};
use ringfence_integration::command::{Running, wait_until};
use ringfence_integration::direct::Node;
use ringfence_proxy::launch::Limits;
use ringfence_sched::{BitRate, Bytes, HEADERS, Nanos, Scheduler};
use std::process::Stdio;
use std::time::Duration;

/// Slow enough for the smallest requests to fill it on two cores.
const LINK: u64 = 200_000_000;

/// One of the two containers: its weight, bytes of its requests, its queue pairs.
#[derive(Clone, Copy)]
struct Sender {
    weight: u32,
    bytes: u32,
    qps: u32,
}

/// Two containers, what they differ in, and what part of the link is the first one's.
type Contest = (&'static str, [Sender; 2], f64);

const CONTESTS: [Contest; 4] = [
    ("weights 1:3", [Sender { weight: 100, bytes: 16384, qps: 1 }, Sender { weight: 300, bytes: 16384, qps: 1 }], 0.25),
    (
        "equal weights, 1 against 250 queue pairs",
        [Sender { weight: 100, bytes: 16384, qps: 1 }, Sender { weight: 100, bytes: 16384, qps: 250 }],
        0.5,
    ),
    (
        "equal weights, 64 KiB against empty requests",
        [Sender { weight: 100, bytes: 65536, qps: 1 }, Sender { weight: 100, bytes: 0, qps: 1 }],
        0.5,
    ),
    (
        "equal weights, 64 KiB against empty requests of 250 queue pairs",
        [Sender { weight: 100, bytes: 65536, qps: 1 }, Sender { weight: 100, bytes: 0, qps: 250 }],
        0.5,
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
    Limits { weight: Some(sender.weight), ..Limits::default() }
}

/// Bytes of the link that a request takes: headers count for each piece.
fn charged(sender: Sender) -> Result<f64> {
    let policy = limits(sender).policy().map_err(anyhow::Error::msg)?;
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
