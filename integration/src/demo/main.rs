//! The demonstration that `examples/demo.sh` builds and starts.

mod chart;
mod contention;
mod report;
mod tools;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use report::Report;
use ringfence_integration::rootfs::Image;
use ringfence_integration::{artifacts, machine, sandbox};
use std::path::PathBuf;
use std::process::ExitCode;

/// Two containers with RDMA behind their own fences, on a machine without an RDMA card.
#[derive(Parser)]
struct Options {
    /// Where to write the chart.
    #[arg(long, default_value = "ringfence-demo.svg")]
    chart: PathBuf,
    /// One JSON object a line on standard output instead of text; progress goes to standard error.
    #[arg(long)]
    json: bool,
    /// Only one of the two parts.
    #[arg(long)]
    only: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Verbs programs between two containers.
    Tools,
    /// Three tenants on one link.
    Contention,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Err(error) = check() {
        eprintln!("ringfence-demo: {error:#}");
        return ExitCode::FAILURE;
    }
    sandbox::run("ringfence-demo", || match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringfence-demo: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn check() -> Result<()> {
    if let Some(obstacle) = machine::obstacle(&["runc", "ip", "mmdebstrap"]) {
        bail!("{obstacle}");
    }
    if !machine::has_overlayfs() {
        bail!("the kernel has no overlay file system");
    }
    for built in [artifacts::proxy, artifacts::hook, artifacts::library] {
        built()?;
    }
    Ok(())
}

fn run(options: &Options) -> Result<()> {
    let report = Report::new(options.json);
    if !Image::is_cached() {
        report.progress("Making a Debian root file system for the containers (once, some 15 s)");
    }
    let image = Image::debian()?;
    if options.only != Some(Part::Contention) {
        tools::run(&image, &report)?;
    }
    if options.only != Some(Part::Tools) {
        let outcomes = contention::run(&image, &report)?;
        let svg = chart::draw(&outcomes);
        std::fs::write(&options.chart, svg)
            .with_context(|| format!("cannot write the chart to {}", options.chart.display()))?;
        report.progress(&format!("Chart: {}", options.chart.display()));
    }
    Ok(())
}
