//! `ringfence-bench`: what Ringfence costs, each figure beside its floor and measured in the same run.

mod caps;
mod card;
mod chart;
mod crowded;
mod figure;
mod hook;
mod idle;
mod moving;
mod programs;
mod register;
mod report;
mod startup;
mod weights;

use anyhow::{Context, Result, bail};
use clap::Parser;
use figure::Figure;
use programs::{Effort, Place};
use report::{Circumstances, Group, Report};
use ringfence_integration::{machine, sandbox};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Measures what Ringfence costs, each figure beside its floor in the same run, and prints a table in Markdown.
///
/// Two cores that nobody else uses, and nothing else running: figures of latency mean little otherwise. The status says whether
/// everything could be measured, not whether goals were met.
#[derive(Debug, Parser)]
#[command(name = "integration/bench.sh")]
struct Arguments {
    /// Lists the groups of figures, and measures nothing.
    #[arg(long)]
    list: bool,
    /// Measures this group only; may be given several times.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// How often each group is measured; the table has the medians of all turns. Groups that start containers are measured once.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// How many containers of each kind the groups `hook` and `startup` start, with Ringfence and without.
    #[arg(long, value_name = "N", default_value_t = 21, value_parser = clap::value_parser!(u16).range(1..))]
    starts: u16,
    /// Writes all figures, of each turn too, to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draws how far the figures are from their goals into this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// One run of a fraction of a second each, to see that everything can be measured: the figures mean nothing.
    #[arg(long)]
    quick: bool,
}

/// What makes the figures of a group.
type Measure = fn(Effort) -> Result<Vec<Figure>>;

/// A group: its name, its title, how it is measured, and whether that is repeated.
type Entry = (&'static str, &'static str, Measure, bool);

const GROUPS: [Entry; 20] = [
    ("across-latency", "Between two containers: time", |effort| moving::latency(Place::Across, effort), true),
    ("across-rate", "Between two containers: operations", |effort| moving::rate(Place::Across, effort), true),
    ("across-send", "Between two containers: messages", |effort| moving::sends(Place::Across, effort), true),
    ("across-bandwidth", "Between two containers: data", |effort| moving::bandwidth(Place::Across, effort), true),
    (
        "across-send-bandwidth",
        "Between two containers: data in messages",
        |effort| moving::send_bandwidth(Place::Across, effort),
        true,
    ),
    ("across-cap", "Between two containers: caps, over 100 ms", |effort| caps::figures(Place::Across, effort), true),
    ("weights", "Two containers on a modelled link of 200 Mbit/s", weights::figures, true),
    (
        "across-weight",
        "Between two containers, with a weight, on a modelled link of 1 Tbit/s",
        |effort| moving::weighted(Place::Across, effort),
        true,
    ),
    ("idle-queues", "Between two containers: queue pairs that nobody uses", moving::idle_queues, true),
    ("crowded", "Between two containers, on crowded processors", crowded::figures, true),
    ("latency", "Inside one container: time", |effort| moving::latency(Place::Inside, effort), true),
    ("rate", "Inside one container: operations", |effort| moving::rate(Place::Inside, effort), true),
    ("bandwidth", "Inside one container: data", |effort| moving::bandwidth(Place::Inside, effort), true),
    ("cap", "Inside one container: caps, over 100 ms", |effort| caps::figures(Place::Inside, effort), true),
    (
        "weight",
        "Inside one container, with a weight, on a modelled link of 1 Tbit/s",
        |effort| moving::weighted(Place::Inside, effort),
        true,
    ),
    ("ibverbs", "The proxy with a card, which is one that is not there", card::figures, true),
    ("register", "Registering memory", register::figures, true),
    ("idle", "A proxy whose container does nothing", idle::figures, true),
    ("hook", "runc run", hook::figures, false),
    ("startup", "A container's start", |effort| startup::figures(effort.starts), false),
];

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        for (name, title, ..) in GROUPS {
            println!("{name:<22} {title}");
        }
        return ExitCode::SUCCESS;
    }
    if let Some(obstacle) = machine::obstacle(&["cc", "runc"]) {
        eprintln!("ringfence-bench: {obstacle}");
        return ExitCode::FAILURE;
    }
    sandbox::run("ringfence-bench", || match measure(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ringfence-bench: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn chosen(only: &[String]) -> Result<Vec<Entry>> {
    for name in only {
        if !GROUPS.iter().any(|group| group.0 == name) {
            let names: Vec<_> = GROUPS.iter().map(|group| group.0).collect();
            bail!("there is no group {name:?}; there are {}", names.join(", "));
        }
    }
    Ok(GROUPS.into_iter().filter(|group| only.is_empty() || only.iter().any(|name| name == group.0)).collect())
}

/// The runs are one after the other: a bad minute of the machine's meets one run of many figures, not all runs of one.
fn measure(arguments: &Arguments) -> Result<ExitCode> {
    let chosen = chosen(&arguments.only)?;
    let runs = if arguments.quick { 1 } else { usize::from(arguments.runs) };
    let starts = if arguments.quick { 1 } else { usize::from(arguments.starts) };
    let effort = Effort { quick: arguments.quick, starts };
    let of = |(name, title, ..): &Entry| Group { name, title, figures: Vec::new(), failures: Vec::new() };
    let groups = chosen.iter().map(of).collect();
    let mut report = Report { circumstances: Circumstances::find(), runs, groups };
    for run in 1..=runs {
        for ((name, _, measure, repeated), group) in chosen.iter().zip(&mut report.groups) {
            if run > 1 && !repeated {
                continue;
            }
            eprintln!("run {run} of {runs}: {name}");
            match measure(effort) {
                Ok(figures) => Figure::join(&mut group.figures, figures),
                // The others can be had nevertheless.
                Err(error) => {
                    eprintln!("ringfence-bench: run {run} of {name}: {error:#}");
                    group.failures.push(format!("run {run}: {error:#}"));
                }
            }
        }
        // Whoever interrupts a long measurement has what there was.
        write(&arguments.json, || Ok(serde_json::to_string_pretty(&report.json())? + "\n"))?;
        write(&arguments.svg, || Ok(chart::draw(&report)))?;
    }
    print!("{}", report.markdown());
    let (met, missed, failed) = report.sums();
    eprintln!("{met} figures met their goals, {missed} missed them; {failed} runs of groups failed");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn write(file: &Option<PathBuf>, content: impl FnOnce() -> Result<String>) -> Result<()> {
    let Some(file): Option<&Path> = file.as_deref() else { return Ok(()) };
    std::fs::write(file, content()?).with_context(|| format!("cannot write {}", file.display()))
}
