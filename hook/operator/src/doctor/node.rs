//! cgroups, limits, devices, and what containers left.

use super::Report;
use ringfence_hook::config::{Cgroup, Config, Kind};
use rustix::process::{Resource, getrlimit};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const CGROUPS: &str = "/sys/fs/cgroup";
/// A proxy with as many queues as one container may have needs a few thousand.
const MIN_FILES: u64 = 4096;
/// Failures are worth a line for so long.
const RECENT: Duration = Duration::from_secs(24 * 3600);

/// Checks the node.
pub fn check(report: &mut Report, config: &Config) {
    cgroups(report, config);
    limits(report);
    devices(report, config);
    failures(report, &config.run_dir);
    left_behind(report, config);
}

fn cgroups(report: &mut Report, config: &Config) {
    let root = Path::new(CGROUPS);
    let (version, directory) = if root.join("cgroup.controllers").exists() {
        ("v2", root.to_owned())
    } else if root.join("memory").is_dir() {
        (if root.join("unified").is_dir() { "v1 and v2 (hybrid)" } else { "v1" }, root.join("memory"))
    } else {
        return report.warn(
            "cgroups",
            format!("no cgroups at {CGROUPS}"),
            format!("mount -t cgroup2 cgroup2 {CGROUPS}"),
        );
    };
    let is_writable = rustix::fs::access(&directory, rustix::fs::Access::WRITE_OK).is_ok();
    if config.proxy.cgroup == Cgroup::Sibling && !is_writable && rustix::process::geteuid().is_root() {
        let message =
            format!("cgroups {version}, but {} is read-only: proxies get none of their own", directory.display());
        return report.warn("cgroups", message, format!("mount -o remount,rw {}", directory.display()));
    }
    report.ok("cgroups", format!("cgroups {version}"));
}

fn limits(report: &mut Report) {
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    if hard < MIN_FILES {
        let message = format!(
            "this shell may have no more than {hard} files open; if the engine's unit has that limit, proxies run out"
        );
        report.warn("limits", message, "set LimitNOFILE=infinity in the engine's unit");
    } else {
        report.ok("limits", "enough open files are allowed");
    }
}

fn devices(report: &mut Report, config: &Config) {
    let mut has_card = false;
    for device in &config.devices {
        let name = &device.name;
        if device.kind == Kind::Soft {
            report.ok("devices", format!("{name}: soft, needs no card"));
            continue;
        }
        has_card = true;
        let missing = device
            .nodes
            .iter()
            .find(|node| !node.metadata().is_ok_and(|metadata| metadata.file_type().is_char_device()));
        match missing {
            Some(node) => {
                let message = format!("{name}: {} is no device node", node.display());
                report.fail("devices", message, "load the card's driver, or correct the device's nodes");
            }
            None => report.ok("devices", format!("{name}: its device nodes are there")),
        }
    }
    if !has_card && Path::new("/sys/class/infiniband").read_dir().is_ok_and(|mut cards| cards.next().is_some()) {
        report.warn(
            "devices",
            "the node has an RDMA card that no [[device]] names",
            "add it to /etc/ringfence/config.toml",
        );
    }
    let mode = std::fs::read_to_string("/sys/module/ib_core/parameters/netns_mode").unwrap_or_default();
    if has_card && mode.trim() == "N" {
        report.warn(
            "devices",
            "RDMA devices belong to one network namespace each: the host loses those that a container has",
            "rdma system set netns shared",
        );
    }
}

fn failures(report: &mut Report, run_dir: &Path) {
    let entries = match ringfence_hook::failures::read(run_dir) {
        Ok(entries) => entries,
        // Without root; told already.
        Err(_) => return,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let recent: Vec<_> =
        entries.iter().filter(|entry| entry.time.saturating_add(RECENT.as_secs()) >= now.as_secs()).collect();
    if let Some(last) = recent.last() {
        let container = last.container.as_deref().unwrap_or("unknown");
        let message = format!("in 24 h hooks failed {} times, last for {container}: {}", recent.len(), last.message);
        report.warn("failures", message, "journalctl -t ringfence-hook --since -24h");
    }
}

fn left_behind(report: &mut Report, config: &Config) {
    match ringfence_hook::containers(config) {
        Err(error) => report.warn("containers", format!("cannot be listed: {error}"), "sudo ringfence doctor"),
        Ok(containers) => {
            for container in containers.iter().filter(|container| container.init.is_none()) {
                let message = format!("{}: {}", container.id, container.warnings.join("; "));
                report.warn("containers", message, "ringfence gc");
            }
            let ended = containers.iter().filter(|container| container.init.is_some_and(|init| !init.alive)).count();
            let known = containers.iter().filter(|container| container.init.is_some()).count();
            match ended {
                0 if known < containers.len() => {}
                0 => report.ok("containers", format!("{known} have RDMA, nothing is left of others")),
                _ => report.warn("containers", format!("something is left of {ended} that have ended"), "ringfence gc"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn a_record_that_is_not_believed_is_told() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("state")).unwrap();
        let record =
            r#"{"container":"c2","init":{"pid":1,"start":1},"proxy":null,"root":"/x","mount-points":[],"cgroups":[]}"#;
        std::fs::write(directory.path().join("state/c1.json"), record).unwrap();
        let mut report = Report::default();
        left_behind(&mut report, &Config { run_dir: directory.path().into(), ..Config::default() });
        let [check] = &report.checks[..] else { panic!("{:?}", report.checks) };
        assert_eq!((check.status, check.fix.as_deref()), (Status::Warning, Some("ringfence gc")));
        assert!(
            check.message.starts_with("c1: its record is not believed: it is of container \"c2\""),
            "{}",
            check.message
        );
    }

    #[test]
    fn only_recent_failures_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let lines = format!(
            "{{\"time\":{},\"container\":\"old\",\"code\":1,\"message\":\"old\"}}\nrubbish\n\
             {{\"time\":{now},\"container\":\"c1\",\"code\":13,\"message\":\"too\\u001b much\"}}\n",
            now - 100_000
        );
        std::fs::write(directory.path().join("failures.jsonl"), lines).unwrap();
        let mut report = Report::default();
        failures(&mut report, directory.path());
        let [check] = &report.checks[..] else { panic!("{:?}", report.checks) };
        assert_eq!(check.status, Status::Warning);
        assert_eq!(check.message, "in 24 h hooks failed 1 times, last for c1: too\u{fffd} much");
    }
}
