//! `ringfence list`

use crate::output::{self, plain};
use anyhow::{Context, Result};
use ringfence_hook::config::Config;
use ringfence_hook::units::{show_ops, show_rate, show_size};
use ringfence_hook::{Container, containers, failures};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

/// Lists the containers that were given RDMA, or those that were refused
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringfence list
  ringfence list --failures
  ringfence list --json | jq -r '.[].proxy.pid'

STATE is \"running\"; \"ended\", if the container's clean-up is still to come (see ringfence gc); \"no proxy\", if that has ended
before its container; or \"unknown\", if its record cannot be read or is not believed, as a warning says. CODE is the hook's exit
status, see ringfence-hook(8).")]
pub struct Args {
    /// The last failures of the hook instead, the oldest first
    #[arg(long)]
    failures: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl Args {
    pub fn run(self) -> Result<ExitCode> {
        let config = Config::load()?;
        let now = SystemTime::now();
        if self.failures {
            let path = config.run_dir.display().to_string();
            let found = failures::read(&config.run_dir).with_context(|| format!("failures in {path}"))?;
            match self.json {
                true => output::json(&found)?,
                false => output::print(&show_failures(&found, now))?,
            }
        } else {
            let found = containers(&config)?;
            match self.json {
                true => output::json(&found)?,
                false => output::print(&show(&found, now))?,
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn show(containers: &[Container], now: SystemTime) -> String {
    let header = [
        "CONTAINER",
        "INIT",
        "PROXY",
        "DEVICE",
        "POLICY",
        "BANDWIDTH",
        "BANDWIDTH-RX",
        "OPS",
        "WEIGHT",
        "CLASS",
        "MEMORY",
        "AGE",
        "STATE",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(containers.iter().map(|container| row(container, now)));
    let warnings = containers.iter().flat_map(|container| {
        let of = plain(&container.id);
        container.warnings.iter().map(move |warning| format!("warning: {of}: {}\n", plain(warning)))
    });
    output::table(&rows) + &warnings.collect::<String>()
}

fn show_failures(failures: &[failures::Entry], now: SystemTime) -> String {
    let mut rows = vec![["AGE", "CONTAINER", "CODE", "MESSAGE"].map(str::to_owned)];
    rows.extend(failures.iter().map(|failure| {
        let container = failure.container.as_deref().map_or("-".into(), plain);
        [age(now, failure.time), container, format!("E{}", failure.code), plain(&failure.message)]
    }));
    output::table(&rows)
}

fn row(container: &Container, now: SystemTime) -> [String; 13] {
    let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { plain(text) };
    let limits = container.limits.as_ref();
    let limit = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    let class = limits.and_then(|limits| serde_json::to_value(limits.class).ok()?.as_str().map(str::to_owned));
    [
        plain(&container.id),
        limit(container.init.map(|init| init.pid.to_string())),
        limit(container.proxy.map(|proxy| proxy.pid.to_string())),
        or_dash(&container.device),
        or_dash(&container.policy),
        limit(limits.and_then(|limits| limits.bandwidth).map(|rate| show_rate(rate.bits()))),
        limit(limits.and_then(|limits| limits.bandwidth_rx).map(|rate| show_rate(rate.bits()))),
        limit(limits.and_then(|limits| limits.ops).map(|rate| show_ops(rate.ops()))),
        limit(limits.and_then(|limits| limits.weight).map(|weight| weight.get().to_string())),
        limit(class),
        limit(container.memory.map(|memory| show_size(memory.own.next_multiple_of(1 << 10)))),
        limit((container.since > 0).then(|| age(now, container.since))),
        state(container).into(),
    ]
}

fn state(container: &Container) -> &'static str {
    match (container.init, container.proxy) {
        (None, _) => "unknown",
        (Some(init), _) if !init.alive => "ended",
        (_, Some(proxy)) if !proxy.alive => "no proxy",
        _ => "running",
    }
}

/// How long ago `since`, in seconds since 1970, was: in the largest unit of which there are two, as kubectl shows it.
fn age(now: SystemTime, since: u64) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().saturating_sub(since);
    let units = [("d", 86400), ("h", 3600), ("m", 60)];
    match units.iter().find(|(_, factor)| seconds >= 2 * factor) {
        Some((unit, factor)) => format!("{}{unit}", seconds / factor),
        None => format!("{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_hook::Status;
    use ringfence_launch::{BitRate, OpRate};
    use std::time::Duration;

    #[test]
    fn ages() {
        for (seconds, expected) in
            [(0, "0s"), (119, "119s"), (120, "2m"), (7199, "119m"), (7200, "2h"), (172_800, "2d")]
        {
            assert_eq!(age(UNIX_EPOCH + Duration::from_secs(1000 + seconds), 1000), expected);
        }
        assert_eq!(age(UNIX_EPOCH, 1), "0s", "a clock that went back");
    }

    #[test]
    fn a_container_is_one_line_and_its_warnings_others() {
        let container = Container {
            id: "c1".into(),
            init: Some(Status { pid: 10, alive: true }),
            proxy: Some(Status { pid: 11, alive: false }),
            device: "soft0".into(),
            policy: "gold".into(),
            limits: Some(ringfence_launch::Limits {
                bandwidth: BitRate::new(10_000_000_000),
                bandwidth_rx: BitRate::new(2_500_000_000),
                ops: OpRate::new(10_000),
                ..Default::default()
            }),
            since: 100,
            cgroups: Vec::new(),
            unit: None,
            memory: None,
            warnings: vec!["its\nproxy".into()],
        };
        let shown = show(&[container], UNIX_EPOCH + Duration::from_secs(105));
        let lines: Vec<Vec<_>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            lines[1],
            ["c1", "10", "11", "soft0", "gold", "10Gbit", "2.5Gbit", "10k", "-", "none", "-", "5s", "no", "proxy"]
        );
        assert_eq!(lines[2].join(" "), "warning: c1: its\u{fffd}proxy");
        assert_eq!(lines.len(), 3);
    }
}
