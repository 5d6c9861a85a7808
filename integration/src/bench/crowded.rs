//! More spinning parties than processors: a WRITE's round trip between two containers' programs, as perftest has it.

use crate::figure::{Figure, Goal};
use crate::programs::Effort;
use anyhow::{Context, Result};
use ringfence_integration::direct::Node;
use ringfence_integration::{machine, perftest};
use ringfence_proxy::launch::Limits;

/// Two applications that spin and two workers, on two cores.
pub fn figures(effort: Effort) -> Result<Vec<Figure>> {
    if !machine::is_installed("ib_write_lat") {
        eprintln!("SKIPPED: crowded: ib_write_lat is not installed (package perftest)");
        return Ok(Vec::new());
    }
    let node = Node::new(None)?;
    let (server, client) = (node.proxy(Limits::default())?, node.proxy(Limits::default())?);
    let count = if effort.quick { "100" } else { "5000" };
    let said = perftest::run(&server, &client, "ib_write_lat", &["-n", count, "-x", "0"])?;
    let latency = perftest::latencies(&said).first().copied().with_context(|| format!("no figures in:\n{said}"))?;
    Ok(vec![
        // 2.2 and 12 µs is what was reached when the workers began to give way.
        Figure::new("ib_write_lat, 4 spinning parties on 2 cores, typical", latency.typical, "µs")
            .goal(Goal::AtMost(10.0)),
        Figure::new("ib_write_lat, 4 spinning parties on 2 cores, p99", latency.p99, "µs").goal(Goal::AtMost(100.0)),
    ])
}
