//! What a proxy takes while its container does nothing.

use crate::figure::{Figure, Goal};
use crate::programs::Effort;
use anyhow::{Context, Result};
use ringfence_integration::direct::Node;
use ringfence_proxy::launch::Limits;
use std::time::Duration;

/// Long enough for a tick of ten milliseconds to be a thousandth.
const WATCHED: Duration = Duration::from_secs(10);

/// Processor time and resident memory of an idle proxy.
pub fn figures(effort: Effort) -> Result<Vec<Figure>> {
    let watched = if effort.quick { WATCHED / 10 } else { WATCHED };
    let node = Node::new(None)?;
    let proxy = node.proxy(Limits::default())?;
    // What starting took is not idling.
    std::thread::sleep(Duration::from_millis(500));
    let before = processor_time(proxy.pid())?;
    std::thread::sleep(watched);
    let used = processor_time(proxy.pid())? - before;
    let status = std::fs::read_to_string(format!("/proc/{}/status", proxy.pid()))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let resident: f64 = resident.trim().trim_end_matches("kB").trim().parse()?;
    let percent = used.as_secs_f64() / watched.as_secs_f64() * 100.0;
    Ok(vec![
        Figure::new("idle proxy, processor over 10 s", percent, "%").goal(Goal::AtMost(0.0)),
        Figure::new("idle proxy, resident memory", resident / 1024.0, "MiB").goal(Goal::AtMost(6.0)),
    ])
}

/// Nanosecond-accurate time that all threads of a process have run (`schedstat`, kernel documentation sched-stats).
fn processor_time(pid: i32) -> Result<Duration> {
    let mut total = Duration::ZERO;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        let nanos = text.split_whitespace().next().context("an empty schedstat")?.parse()?;
        total += Duration::from_nanos(nanos);
    }
    Ok(total)
}
