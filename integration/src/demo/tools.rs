//! Debian's verbs programs between two containers.

use crate::report::{Figure, Report};
use anyhow::{Context, Result};
use ringfence_integration::config::Config;
use ringfence_integration::container::{Builder, Container};
use ringfence_integration::rootfs::Image;
use ringfence_integration::{netns, perftest};

/// One run: the program, what it shows, its arguments, and how its figure is found.
struct Run {
    tool: &'static str,
    what: &'static str,
    args: &'static [&'static str],
    figure: fn(&str) -> Option<Figure>,
}

const RUNS: [Run; 9] = [
    Run { tool: "ibv_rc_pingpong", what: "4 KiB to and fro, checked", args: &["-g", "0", "-c"], figure: pingpong },
    Run { tool: "ib_write_bw", what: "RDMA WRITE of 64 KiB", args: &["-n", "5000"], figure: bandwidth },
    Run { tool: "ib_read_bw", what: "RDMA READ of 64 KiB", args: &["-n", "5000"], figure: bandwidth },
    Run { tool: "ib_send_bw", what: "SEND of 64 KiB", args: &["-n", "5000"], figure: bandwidth },
    Run {
        tool: "ib_write_bw",
        what: "RDMA WRITE of 1 MiB, 4 queue pairs",
        args: &["-s", "1048576", "-q", "4", "-n", "500"],
        figure: bandwidth,
    },
    Run { tool: "ib_write_lat", what: "RDMA WRITE of 8 bytes", args: &["-s", "8", "-n", "2000"], figure: latency },
    Run { tool: "ib_send_lat", what: "SEND of 8 bytes", args: &["-s", "8", "-n", "2000"], figure: latency },
    Run { tool: "ib_atomic_bw", what: "FETCH_AND_ADD", args: &["-A", "FETCH_AND_ADD", "-n", "5000"], figure: rate },
    Run { tool: "ib_atomic_bw", what: "CMP_AND_SWAP", args: &["-A", "CMP_AND_SWAP", "-n", "5000"], figure: rate },
];

/// Starts two containers and runs everything.
pub fn run(image: &Image, report: &Report) -> Result<()> {
    report.progress(
        "Two containers under runc, each with a proxy and a network namespace of its own; programs from Debian",
    );
    let config = Config::new("")?;
    let (left, right) = netns::pair()?;
    let server = Builder::with_rdma(&config, &left).start(image)?;
    let client = Builder::with_rdma(&config, &right).start(image)?;
    let info = client.exec(&["ibv_devinfo", "-v"])?;
    report.figure("ibv_devinfo", "the container's own device", &Figure::Seen(device(&info)));
    for run in RUNS {
        let figure = measure(&run, &server, &client).with_context(|| format!("{}, {}", run.tool, run.what))?;
        report.figure(run.tool, run.what, &figure);
    }
    Ok(())
}

fn measure(run: &Run, server: &Container, client: &Container) -> Result<Figure> {
    // perftest says what it thinks of the processor's clock; ibv_rc_pingpong knows no such options.
    let common: &[&str] = match run.tool {
        "ibv_rc_pingpong" => &[],
        tool if tool.ends_with("_lat") => &["-F"],
        _ => &["-F", "--report_gbits"],
    };
    let output = perftest::run(server, client, run.tool, &[common, run.args].concat())?;
    (run.figure)(&output).with_context(|| format!("no figure in:\n{output}"))
}

fn device(info: &str) -> String {
    let field = |name: &str| {
        let line = info.lines().map(str::trim).find_map(|line| line.strip_prefix(name));
        line.map_or("?", |rest| rest.trim_start_matches([':', ' ', '\t']).trim())
    };
    format!("{}, {}, node GUID {}", field("hca_id"), field("state"), field("node_guid"))
}

/// "1000 iters in 0.01 seconds = 10.82 usec/iter": there and back.
fn pingpong(output: &str) -> Option<Figure> {
    let line = output.lines().find(|line| line.contains("usec/iter"))?;
    let micros = line.split_whitespace().rev().nth(1)?;
    Some(Figure::Seen(format!("{:>8.2} µs for both ways", micros.parse::<f64>().ok()?)))
}

fn bandwidth(output: &str) -> Option<Figure> {
    perftest::bandwidths(output).first().map(|row| Figure::Bandwidth(row.gbits))
}

fn rate(output: &str) -> Option<Figure> {
    perftest::bandwidths(output).first().map(|row| Figure::Rate(row.mpps))
}

fn latency(output: &str) -> Option<Figure> {
    perftest::latencies(output).first().map(|row| Figure::Latency(row.typical, row.p99))
}
