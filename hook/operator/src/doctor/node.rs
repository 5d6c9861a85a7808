//! cgroups, limits, devices, and what containers left.

use super::Report;
use crate::cards;
use ringfence_hook::annotations::Mode;
use ringfence_hook::card::{self, Card, Complaint};
use ringfence_hook::config::{Cgroup, Config, Device, Kind};
use ringfence_hook::{exclusive, rdma_cm, uids, userfaultfd};
use ringfence_proxy::launch::addresses::Gids;
use ringfence_proxy::sysfs::PLACEHOLDER;
use rustix::process::{Resource, getrlimit};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
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
    uids(report, config);
    devices(report, config);
    weights(report, config);
    userfaultfd(report, config, userfaultfd::Host::find(), rustix::process::geteuid().is_root());
    sysfs(report, config, Path::new("/dev/full"));
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

/// Proxies' user ids are nobody else's, as far as files say.
fn uids(report: &mut Report, config: &Config) {
    let ids = match uids::for_proxies(config.proxy.uids) {
        Ok(Some(ids)) => ids,
        Ok(None) => {
            let message = "all proxies here are one user: this user namespace has no ids for them, or denies setgroups";
            return report.warn("uids", message, "give the user 65536 ids in /etc/subuid and /etc/subgid");
        }
        Err(failure) => return report.fail("uids", failure.message, "set proxy.uids"),
    };
    let last = ids.first + (ids.count - 1);
    // Without root the files speak of other ids than those of the namespace.
    let files = if rustix::process::geteuid().is_root() { &USERS[..] } else { &[] };
    let taken = files.iter().find_map(|(file, ranges)| {
        let text = std::fs::read_to_string(file).ok()?;
        let line = text.lines().find(|line| overlaps(line, *ranges, ids.first, last))?;
        Some(format!("proxy.uids {}-{last} are not for proxies alone: {file} says {line:?}", ids.first))
    });
    match taken {
        Some(message) => report.warn("uids", message, "set proxy.uids to a range that nobody else has"),
        None => report.ok("uids", format!("proxies have the user ids {}-{last}", ids.first)),
    }
}

/// Files of users and groups, and whether each line has a range (`subuid(5)`) or one id (`passwd(5)`).
const USERS: [(&str, bool); 4] =
    [("/etc/passwd", false), ("/etc/group", false), ("/etc/subuid", true), ("/etc/subgid", true)];

fn overlaps(line: &str, is_range: bool, first: u32, last: u32) -> bool {
    let fields: Vec<&str> = line.split(':').collect();
    let number = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
    let range = match is_range {
        true => number(1).zip(number(2)),
        false => number(2).map(|id| (id, 1)),
    };
    range.is_some_and(|(start, count)| start <= u64::from(last) && start.saturating_add(count) > u64::from(first))
}

/// Whose ib_core is loaded, below `sys`: the kernel's own has no version, that of a driver package has.
fn core(report: &mut Report, sys: &Path) {
    let Ok(version) = std::fs::read_to_string(sys.join("module/ib_core/version")) else { return };
    report.ok(
        "devices",
        format!(
            "ib_core is version {}, of a driver package such as MLNX_OFED and not the kernel's own: it connects queue pairs only in the \
             network namespace that has their GID's interface, and elsewhere ibv_modify_qp to RTR fails with ENODEV: give containers an \
             interface of the card's (macvlan, ipvlan, a virtual function), or gids = \"host\" of the [[device]]",
            version.trim_end()
        ),
    );
}

/// A container that asks for a weight on a device without a modelled link is refused; one that is given it by default has nothing of it.
fn weights(report: &mut Report, config: &Config) {
    if config.devices.iter().any(|device| device.link.is_some()) {
        return;
    }
    for table in config.policy.weights_by_default() {
        report.warn(
            "policy",
            format!("{table}.weight does nothing: no [[device]] has a modelled link that containers share"),
            format!("remove weight from {table}, or set link of a [[device]] of kind soft"),
        );
    }
}

fn devices(report: &mut Report, config: &Config) {
    let mut has_card = false;
    let proxied = config.policy.allows(Mode::Proxied);
    for device in &config.devices {
        let name = &device.name;
        if device.kind == Kind::Soft {
            report.ok("devices", format!("{name}: soft, needs no card"));
            continue;
        }
        has_card = true;
        // Of what is not here nothing else can be said.
        if let Some(place) = cards::show_place(&exclusive::place(config, name)) {
            report.ok("devices", format!("{name}: {place}"));
            continue;
        }
        if proxied {
            card(report, config, device);
            if device.gids == Gids::Namespace && !Path::new(rdma_cm::PATH).exists() {
                report.warn(
                    "devices",
                    format!(
                        "{name}: containers with a network of their own have no GIDs, as there is no {}",
                        rdma_cm::PATH
                    ),
                    "modprobe rdma_ucm, and echo rdma_ucm >/etc/modules-load.d/ringfence.conf for the next start",
                );
            }
            match rdma_cm::Host::of(Path::new(card::SYS), device) {
                Ok(Some(_)) => report.ok("devices", format!("{name}: containers connect by {}, too", rdma_cm::PATH)),
                Ok(None) => {}
                Err(missing) => report.fail("devices", missing.to_string(), missing.remedy()),
            }
        }
        nodes(report, config, device, Path::new(card::SYS));
    }
    if has_card {
        core(report, Path::new(card::SYS));
    }
    if !has_card && Path::new("/sys/class/infiniband").read_dir().is_ok_and(|mut cards| cards.next().is_some()) {
        report.warn(
            "devices",
            "the node has an RDMA card that no [[device]] names",
            "add it to /etc/ringfence/config.toml",
        );
    }
    if has_card {
        netns_mode(report, config, card::is_of_one_namespace(Path::new(card::SYS)));
    }
}

/// Whether the nodes that the configuration names for `device` are there, and of no other card where containers may have them.
fn nodes(report: &mut Report, config: &Config, device: &Device, sys: &Path) {
    const SUBJECT: &str = "devices";
    let name = &device.name;
    let mut numbers = Vec::new();
    for node in &device.nodes {
        match node.metadata() {
            Ok(found) if found.file_type().is_char_device() => {
                numbers.push((node.as_path(), rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev())));
            }
            _ => {
                let message = format!("{name}: {} is no device node", node.display());
                return report.fail(SUBJECT, message, "load the card's driver, or correct the device's nodes");
            }
        }
    }
    if config.policy.allows(Mode::Passthrough)
        && let Err(other) = card::check_nodes(sys, name, numbers)
    {
        return report.fail(SUBJECT, format!("{name}: {other}"), other.remedy());
    }
    if !device.nodes.is_empty() {
        report.ok(SUBJECT, format!("{name}: its device nodes are there"));
    }
}

/// Whether the kernel shows cards to those whom policies give them.
fn netns_mode(report: &mut Report, config: &Config, is_of_one_namespace: bool) {
    const SUBJECT: &str = "devices";
    let exclusive = config.policy.allows(Mode::Exclusive);
    match (is_of_one_namespace, exclusive) {
        (false, false) => {}
        (true, true) => {
            report.ok(SUBJECT, "RDMA devices belong to one network namespace each, as mode exclusive needs it")
        }
        (false, true) => {
            let fix = "echo options ib_core netns_mode=0 >/etc/modprobe.d/ringfence.conf, and restart the host";
            report.fail(SUBJECT, exclusive::SHARED, fix);
        }
        (true, false) => report.warn(
            SUBJECT,
            "RDMA devices belong to one network namespace each: the host loses those that a container has",
            "rdma system set netns shared",
        ),
    }
}

/// Whether the card that `device` is can be had by proxies.
fn card(report: &mut Report, config: &Config, device: &Device) {
    const SUBJECT: &str = "devices";
    let (name, program) = (&device.name, config.proxy.program(Kind::Ibverbs));
    if !program.exists() {
        let message = format!("{name}: the proxy for cards, {}, is missing", program.display());
        return report.fail(SUBJECT, message, "apt-get install ringfence-ibverbs");
    }
    let found = Card::find(Path::new(card::SYS), name);
    match &found {
        Ok(card) => {
            if card::iwarp(Path::new(card::SYS)).contains(name) {
                let message = format!("{name}: {}", cards::IWARP);
                // Where it may be given away as it is, nothing is wrong with naming it.
                return match config.policy.allows(Mode::Passthrough) {
                    true => report.warn(SUBJECT, message, "ask for it with mode=passthrough only"),
                    false => {
                        report.fail(SUBJECT, message, "name another card in /etc/ringfence, or allow mode passthrough")
                    }
                };
            }
            report.ok(SUBJECT, format!("{name}: an RDMA card with node GUID {}", card.node_guid));
            for Complaint { what, remedy } in card.complaints(device.port) {
                report.warn(SUBJECT, what, remedy);
            }
        }
        Err(missing) => report.fail(SUBJECT, missing.to_string(), missing.remedy()),
    }
    match cards::describe(config, device) {
        Ok(card) => report.ok(SUBJECT, format!("{name}: opened by libibverbs; {}", cards::show(&card))),
        Err(error) if format!("{error:#}").contains("libibverbs") => {
            report.fail(SUBJECT, format!("{name}: {error:#}"), "apt-get install libibverbs1 ibverbs-providers");
        }
        // Told above.
        Err(_) if found.is_err() => {}
        Err(error) => report.fail(SUBJECT, format!("{name}: {error:#}"), "dmesg | grep -i -e rdma -e infiniband"),
    }
}

/// Whether containers get `/dev/userfaultfd`, which is `found` on this node.
fn userfaultfd(report: &mut Report, config: &Config, found: Option<userfaultfd::Host>, is_root: bool) {
    const SUBJECT: &str = "userfaultfd";
    let Some(host) = found else {
        let message = "the kernel has no /dev/userfaultfd: a system call into memory that is being registered may fail";
        return report.warn(SUBJECT, message, "upgrade to Linux 6.1 or later");
    };
    match config.inject.userfaultfd {
        false => report.ok(SUBJECT, "containers do not get /dev/userfaultfd: inject.userfaultfd is false"),
        true if is_root => report.ok(SUBJECT, "containers get /dev/userfaultfd"),
        true if host.is_open => report.ok(SUBJECT, "containers get /dev/userfaultfd, which everybody may open here"),
        true => {
            let rule = r#"echo 'KERNEL=="userfaultfd", MODE="0666"' >/etc/udev/rules.d/60-userfaultfd.rules"#;
            let fix = format!(
                "sudo sh -c '{}' && sudo udevadm control --reload && sudo udevadm trigger {}",
                rule.replace('\'', r"'\\''"),
                userfaultfd::PATH
            );
            report.warn(
                SUBJECT,
                "containers without root do not get /dev/userfaultfd, which only root may open here",
                fix,
            );
        }
    }
}

/// Whether containers see their device in `/sys` and `/dev/infiniband`, where `placeholder` stands for its node.
fn sysfs(report: &mut Report, config: &Config, placeholder: &Path) {
    const SUBJECT: &str = "sysfs";
    if !config.inject.sysfs {
        let message = "containers do not see their device in /sys and /dev/infiniband: inject.sysfs is false";
        return report.ok(SUBJECT, message);
    }
    if !config.inject.has_node() {
        return report.ok(SUBJECT, "containers see their device in /sys, and without a node in /dev/infiniband");
    }
    let (major, minor) = PLACEHOLDER;
    let number = rustix::fs::makedev(major, minor);
    match placeholder.symlink_metadata() {
        Ok(found) if found.file_type().is_char_device() && found.rdev() == number => {
            report.ok(SUBJECT, "containers see their device in /sys and /dev/infiniband");
        }
        _ => {
            let path = placeholder.display();
            let message = format!("{path} is not device {major}:{minor}: containers with a device do not start");
            report.fail(SUBJECT, message, format!("rm -f {path} && mknod -m 666 {path} c {major} {minor}"));
        }
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
    use ringfence_hook::config::Uverbs;

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
    fn a_weight_that_no_device_has_a_link_for_is_told() {
        let said = |text: &str| {
            let mut report = Report::default();
            weights(&mut report, &Config::parse(text).unwrap());
            report.checks.into_iter().map(|check| (check.status, check.message)).collect::<Vec<_>>()
        };
        const BOTH: &str =
            "[policy.defaults]\nweight = 3\n[policy.profiles.gold]\n[policy.profiles.bulk.defaults]\nweight = 1\n";
        let told = |table: &str| {
            let message =
                format!("{table}.weight does nothing: no [[device]] has a modelled link that containers share");
            (Status::Warning, message)
        };
        assert_eq!(said(BOTH), [told("policy.defaults"), told("policy.profiles.bulk.defaults")]);
        assert_eq!(said(&format!("[[device]]\nname = \"soft0\"\nkind = \"soft\"\nlink = \"10Gbit\"\n{BOTH}")), []);
        assert_eq!(said(""), []);
    }

    #[test]
    fn a_driver_packages_core_is_told_with_what_it_needs() {
        let sys = tempfile::tempdir().unwrap();
        let mut report = Report::default();
        core(&mut report, sys.path());
        assert!(report.checks.is_empty());
        std::fs::create_dir_all(sys.path().join("module/ib_core")).unwrap();
        std::fs::write(sys.path().join("module/ib_core/version"), "24.10-1.1.4\n").unwrap();
        core(&mut report, sys.path());
        let [check] = &report.checks[..] else { panic!("{:?}", report.checks) };
        assert_eq!(check.status, Status::Ok);
        for words in ["version 24.10-1.1.4, of a driver package", "RTR fails with ENODEV", "gids = \"host\""] {
            assert!(check.message.contains(words), "{}", check.message);
        }
    }

    #[test]
    fn a_node_of_another_card_is_told_where_containers_may_have_it() {
        let sys = tempfile::tempdir().unwrap();
        let verbs = sys.path().join("class/infiniband_verbs");
        // /dev/null stands for that of mlx5_1.
        for (node, dev, ibdev) in [("uverbs0", "1:3\n", "mlx5_1\n"), ("uverbs1", "231:193\n", "mlx5_0\n")] {
            std::fs::create_dir_all(verbs.join(node)).unwrap();
            std::fs::write(verbs.join(node).join("dev"), dev).unwrap();
            std::fs::write(verbs.join(node).join("ibdev"), ibdev).unwrap();
        }
        let others =
            "mlx5_0: /dev/null is mlx5_1's, not mlx5_0's, whose node is /dev/infiniband/uverbs1; correct nodes of";
        for (name, node, modes, status, message) in [
            ("mlx5_0", "/dev/null", "\"passthrough\"", Status::Problem, others),
            ("mlx5_0", "/dev/null", "\"proxied\"", Status::Ok, "mlx5_0: its device nodes are there"),
            ("mlx5_1", "/dev/null", "\"passthrough\"", Status::Ok, "mlx5_1: its device nodes are there"),
            ("mlx5_0", "/dev/zero", "\"passthrough\"", Status::Ok, "mlx5_0: its device nodes are there"),
            ("mlx5_0", "/dev/rf-none", "\"passthrough\"", Status::Problem, "mlx5_0: /dev/rf-none is no device node"),
        ] {
            let text = format!(
                "[[device]]\nname = \"{name}\"\nkind = \"ibverbs\"\nnodes = [\"{node}\"]\n[policy.bounds]\nmodes = [{modes}]"
            );
            let config = Config::parse(&text).unwrap();
            let mut report = Report::default();
            nodes(&mut report, &config, &config.devices[0], sys.path());
            let [check] = &report.checks[..] else { panic!("{:?}", report.checks) };
            assert_eq!(check.status, status, "{message}");
            assert!(check.message.starts_with(message), "{}", check.message);
        }
    }

    #[test]
    fn the_kernels_mode_is_told_as_policies_need_it() {
        let config = |modes: &str| {
            let card = "[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\n[policy.bounds]\nmodes = ";
            Config::parse(&format!("{card}[{modes}]")).unwrap()
        };
        let (without, with) = (config("\"proxied\""), config("\"proxied\", \"exclusive\""));
        for (config, is_of_one, expected) in [
            (&without, false, None),
            (&without, true, Some((Status::Warning, "the host loses those"))),
            (&with, true, Some((Status::Ok, "as mode exclusive needs it"))),
            (&with, false, Some((Status::Problem, "mode=exclusive needs the kernel to show"))),
        ] {
            let mut report = Report::default();
            netns_mode(&mut report, config, is_of_one);
            let found = report.checks.first();
            assert_eq!(found.map(|check| check.status), expected.map(|(status, _)| status), "{is_of_one}");
            let is_told =
                found.is_none_or(|check| expected.is_some_and(|(_, message)| check.message.contains(message)));
            assert!(is_told, "{:?}", report.checks);
        }
    }

    #[test]
    fn userfaultfd_is_told_as_containers_get_it() {
        let host = |is_open| Some(userfaultfd::Host { major: 10, minor: 257, is_open });
        let mut off = Config::default();
        off.inject.userfaultfd = false;
        for (config, found, is_root, status, message) in [
            (Config::default(), host(false), true, Status::Ok, "containers get"),
            (Config::default(), host(true), false, Status::Ok, "everybody may open"),
            (Config::default(), host(false), false, Status::Warning, "without root do not get"),
            (Config::default(), None, true, Status::Warning, "the kernel has no"),
            (off, host(false), false, Status::Ok, "inject.userfaultfd is false"),
        ] {
            let mut report = Report::default();
            userfaultfd(&mut report, &config, found, is_root);
            let [check] = &report.checks[..] else { panic!("{:?}", report.checks) };
            assert_eq!(check.status, status, "{message}");
            assert!(check.message.contains(message), "{}", check.message);
        }
    }

    #[test]
    fn what_sys_shows_is_told() {
        let with = |sysfs, uverbs| {
            let mut config = Config::default();
            (config.inject.sysfs, config.inject.uverbs) = (sysfs, uverbs);
            config
        };
        for (config, placeholder, status, message) in [
            (with(true, Uverbs::Always), "/dev/full", Status::Ok, "in /sys and /dev/infiniband"),
            (with(true, Uverbs::Never), "/dev/null", Status::Ok, "without a node"),
            (with(false, Uverbs::Always), "/dev/null", Status::Ok, "inject.sysfs is false"),
            (with(true, Uverbs::Always), "/dev/null", Status::Problem, "/dev/null is not device 1:7"),
            (with(true, Uverbs::Always), "/dev/missing", Status::Problem, "/dev/missing is not device 1:7"),
        ] {
            let mut report = Report::default();
            sysfs(&mut report, &config, Path::new(placeholder));
            let [check] = &report.checks[..] else { panic!("{:?}", report.checks) };
            assert_eq!(check.status, status, "{message}");
            assert!(check.message.contains(message), "{}", check.message);
        }
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

    #[test]
    fn ids_of_users_and_ranges_are_seen() {
        for (line, is_range, expected) in [
            ("a:x:2000000005:5::/:/bin/sh", false, true),
            ("a:x:1000:1000::/:/bin/sh", false, false),
            ("dockremap:100000:65536", true, false),
            ("x:1999999000:1001", true, true),
            ("x:2000001023:9", true, false),
            ("nonsense", true, false),
        ] {
            assert_eq!(overlaps(line, is_range, 2_000_000_000, 2_000_001_022), expected, "{line}");
        }
    }
}
