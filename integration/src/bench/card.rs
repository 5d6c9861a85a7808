//! What the proxy costs beside a card: its card is one that is not there, and carries out what is posted at once, in memory. The
//! same program on that card without a proxy is the floor.

use crate::figure::{Figure, Goal, Sample};
use crate::moving;
use crate::programs::{self, Effort, Said};
use anyhow::{Context, Error, Result};
use ringfence_integration::client;
use ringfence_integration::command::Running;
use ringfence_integration::direct::Node;
use ringfence_proxy::launch::{BitRate, Class, Limits, OpRate, Weight};
use std::path::Path;
use std::process::Command;

/// Every kind of policy, at rates that never bind.
fn unbinding() -> Limits {
    Limits {
        bandwidth: BitRate::new(1_000_000_000_000),
        ops: OpRate::new(1_000_000_000),
        weight: Weight::new(100),
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

/// What the card alone, a proxy without a policy and one with a policy said in a turn.
struct Turn {
    card: Said,
    plain: Said,
    shaped: Said,
}

/// What a [`Turn`] makes of a figure.
type OfTurn = fn(&Turn) -> Result<Sample>;

/// Time and rate.
pub fn figures(effort: Effort) -> Result<Vec<Figure>> {
    let provider = client::provider()?;
    let program = client::compile("bench_card", &["bench_time.c", "loop.c", "check.c"])?;
    let node = Node::with_card("test0", Some(&provider))?;
    let (plain, shaped) = (node.proxy(Limits::default())?, node.proxy(unbinding())?);
    let in_turns = |words: &[&str]| {
        let turn = |_| {
            Ok(Turn {
                card: bare(&provider, &program, words, effort)?,
                plain: programs::run(&plain, &program, words, effort)?,
                shaped: programs::run(&shaped, &program, words, effort)?,
            })
        };
        (0..moving::turns(effort)).map(turn).collect::<Result<Vec<_>>>()
    };
    let figure = |name: &str, unit, turns: &[Turn], of: OfTurn| {
        Ok::<_, Error>(Figure::of(name, unit, turns.iter().map(of).collect::<Result<_>>()?))
    };
    let mut figures = Vec::new();
    for (kind, words) in [("WRITE 8 B", &["latency"][..]), ("WRITE 8 B inline", &["latency", "inline"])] {
        let turns = in_turns(words)?;
        let name = format!("cache line, round trip between two cores, median, beside {kind}");
        figures.push(figure(&name, "ns", &turns, |turn| Ok((turn.plain.one("line")?, None)))?);
        let name = format!("{kind}, post to polled completion, median, the card alone");
        figures.push(figure(&name, "ns", &turns, |turn| Ok((turn.card.one("p50")?, None)))?);
        let costs: [(&str, OfTurn); 2] =
            [("", |turn| turn.cost(&turn.plain)), (", under policy", |turn| turn.cost(&turn.shaped))];
        for (policy, cost) in costs {
            let name = format!("{kind}, what the proxy adds to that{policy}");
            figures.push(figure(&name, "ns", &turns, cost)?.goal(Goal::RatioAtMost(2.5)));
        }
    }
    let turns = in_turns(&["rate"])?;
    let rates: [(&str, OfTurn); 2] =
        [("", |turn| turn.rate(&turn.plain)), (", under policy", |turn| turn.rate(&turn.shaped))];
    for (policy, rate) in rates {
        let name = format!("WRITE 8 B, batches of 32{policy}");
        figures.push(figure(&name, "M/s", &turns, rate)?.goal(Goal::AtLeast(10.0)));
    }
    Ok(figures)
}

impl Turn {
    /// What is added to the card's time, beside a cache line's at that time.
    fn cost(&self, proxied: &Said) -> Result<Sample> {
        Ok((proxied.one("p50")? - self.card.one("p50")?, Some(proxied.one("line")?)))
    }

    /// A rate beside the card's.
    fn rate(&self, proxied: &Said) -> Result<Sample> {
        Ok((proxied.one("rate")? / 1e6, Some(self.card.one("rate")? / 1e6)))
    }
}
