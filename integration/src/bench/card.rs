//! What the proxy costs beside a card: its card is one that is not there, and carries out what is posted at once, in memory. The
//! same program on that card without a proxy is the floor.

use crate::figure::{Figure, Goal};
use crate::programs::{self, Effort, Said};
use anyhow::{Context, Result};
use ringfence_integration::client;
use ringfence_integration::command::Running;
use ringfence_integration::direct::Node;
use ringfence_proxy::launch::{Class, Limits};
use std::path::Path;
use std::process::Command;

/// Every kind of policy, at rates that never bind.
fn unbinding() -> Limits {
    Limits {
        bandwidth: Some(1_000_000_000_000),
        ops: Some(1_000_000_000),
        weight: Some(100),
        class: Class::Latency,
        ..Limits::default()
    }
}

/// The card without a proxy.
fn bare(provider: &Path, program: &Path, words: &[&str], effort: Effort) -> Result<Said> {
    let mut command = Command::new(program);
    command.args(words).env("LD_LIBRARY_PATH", provider.parent().context("a library lies in a directory")?);
    // Its table has gaps, and this is its first entry.
    command.env("GID_INDEX", "1");
    if effort.quick {
        command.env("BENCH_QUICK", "1");
    }
    programs::finish(Running::start(command)?)
}

/// Time and rate.
pub fn figures(effort: Effort) -> Result<Vec<Figure>> {
    let provider = client::provider()?;
    let program = client::compile("bench_card", &["bench_time.c", "loop.c", "check.c"])?;
    let node = Node::with_card("test0", Some(&provider))?;
    let (plain, shaped) = (node.proxy(Limits::default())?, node.proxy(unbinding())?);
    let bare = |words: &[&str]| bare(&provider, &program, words, effort);
    let plain = |words: &[&str]| programs::run(&plain, &program, words, effort);
    let shaped = |words: &[&str]| programs::run(&shaped, &program, words, effort);
    let line = bare_line(effort)?;
    let mut figures = vec![Figure::new("cache line, round trip between two cores, median", line, "ns")];
    for (kind, words) in [("WRITE 8 B", &["latency"][..]), ("WRITE 8 B inline", &["latency", "inline"])] {
        let card = bare(words)?.one("p50")?;
        figures.push(Figure::new(&format!("{kind}, post to polled completion, median, the card alone"), card, "ns"));
        for (policy, said) in [("", plain(words)?), (", under policy", shaped(words)?)] {
            let cost = said.one("p50")? - card;
            let name = format!("{kind}, what the proxy adds to that{policy}");
            figures.push(Figure::new(&name, cost, "ns").beside(line).goal(Goal::RatioAtMost(2.5)));
        }
    }
    let card = bare(&["rate"])?.one("rate")? / 1e6;
    for (policy, said) in [("", plain(&["rate"])?), (", under policy", shaped(&["rate"])?)] {
        let name = format!("WRITE 8 B, batches of 32{policy}");
        let rate = Figure::new(&name, said.one("rate")? / 1e6, "M/s");
        figures.push(rate.beside(card).goal(Goal::AtLeast(10.0)));
    }
    Ok(figures)
}

fn bare_line(effort: Effort) -> Result<f64> {
    let mut command = Command::new(programs::alone()?);
    command.arg("cache-line");
    if effort.quick {
        command.env("BENCH_QUICK", "1");
    }
    programs::finish(Running::start(command)?)?.one("p50")
}
