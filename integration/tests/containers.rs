//! Unmodified Debian programs in containers under runc with our hook.

use anyhow::{Context, Result, bail, ensure};
use ringfence_integration::command::{is_warden, wait_until};
use ringfence_integration::config::Config;
use ringfence_integration::container::{Builder, Container};
use ringfence_integration::netns::Netns;
use ringfence_integration::rootfs::Image;
use ringfence_integration::suite::{Needs, test};
use ringfence_integration::{artifacts, netns, perftest, suite};
use ringfence_trials::Trial;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

type ImageTest = fn(&Image) -> Result<()>;

fn main() -> ExitCode {
    let needs = Needs {
        programs: &["runc", "ip"],
        built: &[artifacts::proxy, artifacts::hook, artifacts::library, Image::source],
    };
    suite::main("ringfence-containers", &needs, trials)
}

/// What perftest is run with, beside the options that every run has.
const BANDWIDTH: [(&str, &[&str]); 18] = [
    ("ib_write_bw", &["-n", "2000"]),
    ("ib_write_bw", &["-n", "2000", "-q", "4"]),
    ("ib_write_bw", &["-n", "1000", "-b"]),
    ("ib_write_bw", &["-n", "200", "-a"]),
    ("ib_write_bw", &["-n", "5000", "-s", "16", "-I", "64"]),
    ("ib_read_bw", &["-n", "2000"]),
    ("ib_read_bw", &["-n", "1000", "-q", "4", "-e"]),
    ("ib_read_bw", &["-n", "1000", "-b"]),
    ("ib_read_bw", &["-n", "200", "-a"]),
    ("ib_send_bw", &["-n", "2000"]),
    ("ib_send_bw", &["-n", "2000", "-q", "4"]),
    ("ib_send_bw", &["-n", "2000", "-e"]),
    ("ib_send_bw", &["-n", "1000", "-b"]),
    ("ib_send_bw", &["-n", "200", "-a"]),
    ("ib_send_bw", &["-n", "5000", "-s", "16", "-I", "64"]),
    ("ib_atomic_bw", &["-n", "5000", "-A", "FETCH_AND_ADD"]),
    ("ib_atomic_bw", &["-n", "5000", "-A", "CMP_AND_SWAP"]),
    ("ib_atomic_bw", &["-n", "2000", "-q", "4", "-e"]),
];

const LATENCY: [(&str, &[&str]); 10] = [
    ("ib_write_lat", &["-n", "1000", "-s", "8"]),
    ("ib_write_lat", &["-n", "500", "-s", "65536"]),
    ("ib_write_lat", &["-n", "100", "-a"]),
    ("ib_read_lat", &["-n", "1000", "-s", "8"]),
    ("ib_read_lat", &["-n", "500", "-s", "8", "-e"]),
    ("ib_send_lat", &["-n", "1000", "-s", "8"]),
    ("ib_send_lat", &["-n", "500", "-s", "8", "-e"]),
    ("ib_send_lat", &["-n", "100", "-a"]),
    ("ib_atomic_lat", &["-n", "1000", "-A", "FETCH_AND_ADD"]),
    ("ib_atomic_lat", &["-n", "1000", "-A", "CMP_AND_SWAP"]),
];

const PINGPONG: [&[&str]; 7] = [
    &[],
    &["-g", "0"],
    &["-g", "0", "-e"],
    &["-g", "0", "-c"],
    &["-g", "0", "-e", "-c"],
    &["-g", "0", "-s", "1000000", "-n", "50"],
    &["-g", "0", "-m", "4096", "-r", "16"],
];

/// What perftest reports at most where the client's annotation has this value.
#[derive(Clone, Copy)]
enum Most {
    Gbits(f64),
    Mpps(f64),
}

const RATES: [(&str, &str, &str, &[&str], Most); 4] = [
    ("bandwidth", "100Mbit", "ib_write_bw", &["-n", "200", "-s", "65536"], Most::Gbits(0.1)),
    ("bandwidth-rx", "100Mbit", "ib_read_bw", &["-n", "200", "-s", "65536"], Most::Gbits(0.1)),
    ("ops", "10k", "ib_write_bw", &["-n", "5000", "-s", "8"], Most::Mpps(0.01)),
    ("ops", "10k", "ib_send_bw", &["-n", "5000", "-s", "8"], Most::Mpps(0.01)),
];

fn trials() -> Result<Vec<Trial>> {
    let image = Image::debian()?;
    let mut trials = Vec::new();
    for (tool, args) in BANDWIDTH {
        let image = image.clone();
        trials.push(test(title(tool, args), move || bandwidth(&image, tool, args)));
    }
    for (tool, args) in LATENCY {
        let image = image.clone();
        trials.push(test(title(tool, args), move || latency(&image, tool, args)));
    }
    for args in PINGPONG {
        let image = image.clone();
        trials.push(test(title("ibv_rc_pingpong", args), move || pingpong(&image, args)));
    }
    let has_cpuset = Path::new("/sys/fs/cgroup/cpuset/tasks").exists()
        || std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").is_ok_and(|all| all.contains("cpuset"));
    if !has_cpuset {
        println!(
            "SKIPPED: ringfence-containers: work_for_a_container_stays_within_its_processors: no cpuset controller"
        );
    }
    let limited = image.clone();
    let limited = test("work_for_a_container_stays_within_its_processors", move || processors(&limited));
    trials.push(limited.with_ignored_flag(!has_cpuset));
    for (key, value, tool, args, most) in RATES {
        let image = image.clone();
        let name = format!("{key}_{value}_bounds {tool}");
        trials.push(test(name, move || rate(&image, (key, value), tool, args, most)));
    }
    let tests: [(&str, ImageTest); 14] = [
        ("the_device_is_seen", device_is_seen),
        ("pyverbs_sees_the_device", pyverbs),
        ("programs_without_verbs_are_untouched", without_verbs),
        ("a_container_without_annotations_is_untouched", without_annotations),
        ("prestart_works_as_createruntime", prestart),
        ("a_read_only_root_works", readonly),
        ("a_user_namespace_works", user_namespace),
        ("the_images_own_preload_file_is_kept", own_preload_file),
        ("delete_ends_the_proxy", delete_ends_the_proxy),
        ("a_killed_init_ends_the_proxy", killed_init),
        ("containers_of_other_nodes_are_out_of_reach", other_node),
        ("a_malformed_annotation_fails_the_start", malformed_annotation),
        ("bandwidth_beyond_the_bound_fails_the_start", beyond_the_bound),
        ("a_policy_that_would_do_nothing_fails_the_start", nothing_to_do),
    ];
    for (name, run) in tests {
        let image = image.clone();
        trials.push(test(name, move || run(&image)));
    }
    Ok(trials)
}

fn title(tool: &str, args: &[&str]) -> String {
    std::iter::once(&tool).chain(args).copied().collect::<Vec<_>>().join(" ")
}

/// Two containers of one node. Fields drop in order: containers first.
struct Two {
    a: Container,
    b: Container,
    _networks: (Netns, Netns),
    config: Config,
}

fn two(image: &Image) -> Result<Two> {
    let config = Config::new("")?;
    let networks = netns::pair()?;
    let a = Builder::with_rdma(&config, &networks.0).start(image)?;
    let b = Builder::with_rdma(&config, &networks.1).start(image)?;
    Ok(Two { a, b, _networks: networks, config })
}

/// One container without a peer. Fields drop in order: the container first.
struct One {
    container: Container,
    _networks: (Netns, Netns),
    config: Config,
}

fn one(image: &Image, change: impl FnOnce(Builder) -> Builder) -> Result<One> {
    let config = Config::new("")?;
    let networks = netns::pair()?;
    let container = change(Builder::with_rdma(&config, &networks.0)).start(image)?;
    Ok(One { container, _networks: networks, config })
}

fn bandwidth(image: &Image, tool: &str, args: &[&str]) -> Result<()> {
    let two = two(image)?;
    let output = perftest::run(&two.a, &two.b, tool, &[&["-F", "--report_gbits"], args].concat())?;
    let rows = perftest::bandwidths(&output);
    let expected = if args.contains(&"-a") { 23 } else { 1 };
    ensure!(rows.len() == expected, "{} result lines, expected {expected}:\n{output}", rows.len());
    // perftest measures the processor's clock for each line. Where it was interrupted it says so, and has no figures.
    let unmeasured = output.matches("Correlation coefficient r^2").count();
    let without = rows.iter().filter(|row| row.mpps <= 0.0).count();
    ensure!(without <= unmeasured && without < expected.max(2), "a rate of nothing:\n{output}");
    Ok(())
}

/// The bound holds for every container that the annotation names, from its first request on: a second's worth of work cannot be
/// had in a hundredth more than a second, however busy the machine is; how much less is had is the machine's affair.
fn rate(image: &Image, (key, value): (&str, &str), tool: &str, args: &[&str], most: Most) -> Result<()> {
    let config = Config::new("")?;
    let networks = netns::pair()?;
    let server = Builder::with_rdma(&config, &networks.0).start(image)?;
    let client = Builder::with_rdma(&config, &networks.1).annotation(key, value).start(image)?;
    let output = perftest::run(&server, &client, tool, &[&["-F", "--report_gbits"], args].concat())?;
    let [row] = perftest::bandwidths(&output)[..] else { bail!("not one result line:\n{output}") };
    let (is, bound) = match most {
        Most::Gbits(bound) => (row.gbits, bound),
        Most::Mpps(bound) => (row.mpps, bound),
    };
    // What may go at once, and that perftest's first requests are posted before its clock starts.
    ensure!(is > 0.0 && is <= bound * 1.05, "{is} where {bound} is the most:\n{output}");
    Ok(())
}

fn latency(image: &Image, tool: &str, args: &[&str]) -> Result<()> {
    let two = two(image)?;
    let output = perftest::run(&two.a, &two.b, tool, &[&["-F"], args].concat())?;
    let rows = perftest::latencies(&output);
    // Sizes from 2 bytes to 8 MiB.
    let expected = if args.contains(&"-a") { 23 } else { 1 };
    ensure!(rows.len() == expected, "{} result lines, expected {expected}:\n{output}", rows.len());
    ensure!(rows.iter().all(|row| row.typical > 0.0 && row.typical <= row.p999), "impossible figures:\n{output}");
    // Both programs and both proxies spin. Where they are more than the processors they have to give way: one that does not has the others
    // wait for the ends of its time slices, some milliseconds for each message.
    let is_slow = |row: &perftest::Latency| row.bytes <= 4096 && row.typical > 1000.0;
    let mut slow = rows.into_iter().any(|row| is_slow(&row));
    // Something else may run here for a while.
    for _ in 0..2 {
        if slow {
            let again = perftest::run(&two.a, &two.b, tool, &[&["-F"], args].concat())?;
            slow = perftest::latencies(&again).iter().any(is_slow);
        }
    }
    ensure!(!slow, "somebody does not give way:\n{output}");
    Ok(())
}

fn pingpong(image: &Image, args: &[&str]) -> Result<()> {
    let two = two(image)?;
    let output = perftest::run(&two.a, &two.b, "ibv_rc_pingpong", args)?;
    ensure!(output.contains("usec/iter"), "no result:\n{output}");
    Ok(())
}

fn device_is_seen(image: &Image) -> Result<()> {
    let two = two(image)?;
    let devices = two.a.exec(&["ibv_devices"])?;
    ensure!(devices.contains("soft0"), "no soft0 in:\n{devices}");
    let info = two.a.exec(&["ibv_devinfo", "-v"])?;
    for expected in ["soft0", "PORT_ACTIVE", "GID[  0]", "max_qp:", "ATOMIC_"] {
        ensure!(info.contains(expected), "no {expected} in:\n{info}");
    }
    let (a, b) = (guid(&info)?, guid(&two.b.exec(&["ibv_devinfo", "-v"])?)?);
    ensure!(a != b, "two containers share the node GUID {a}");
    Ok(())
}

fn guid(info: &str) -> Result<String> {
    let line = info.lines().find_map(|line| line.trim().strip_prefix("node_guid:"));
    line.map(|guid| guid.trim().to_owned()).ok_or_else(|| anyhow::anyhow!("no node_guid in:\n{info}"))
}

fn pyverbs(image: &Image) -> Result<()> {
    let one = one(image, |builder| builder)?;
    let script = "\
import pyverbs.device as d
from pyverbs.pd import PD
from pyverbs.mr import MR
from pyverbs.cq import CQ
import pyverbs.enums as e
ctx = d.Context(name=d.get_device_list()[0].name.decode())
assert ctx.query_device().max_qp > 0
pd = PD(ctx)
mr = MR(pd, 10000, e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE)
mr.write('x' * 10000, 10000)
assert mr.read(10000, 0) == b'x' * 10000
cq = CQ(ctx, 10)
print('pyverbs is content')
";
    let output = one.container.exec(&["python3", "-c", script])?;
    ensure!(output.contains("pyverbs is content"), "{output}");
    Ok(())
}

/// The library is mapped into every process and must not be noticed there.
fn without_verbs(image: &Image) -> Result<()> {
    let one = one(image, |builder| builder)?;
    let output = one.container.exec(&["sh", "-c", "echo hello; ls / | wc -l; python3 -c 'print(6*7)'"])?;
    ensure!(output.starts_with("hello\n") && output.ends_with("42\n"), "{output}");
    let open = one.container.exec(&["sh", "-c", "ls -l /proc/self/fd"])?;
    ensure!(!open.contains("socket:"), "an idle process holds a socket:\n{open}");
    Ok(())
}

fn without_annotations(image: &Image) -> Result<()> {
    let config = Config::new("")?;
    let container = Builder::default().hooked(&config).start(image)?;
    ensure!(container.exec(&["ls", "/dev/ringfence"]).is_err(), "/dev/ringfence exists");
    for file in ["/etc/ld.so.preload", "/etc/ld.so.ringfence"] {
        ensure!(container.exec(&["ls", file]).is_err(), "{file} exists");
    }
    ensure!(config.live_containers().is_empty(), "{:?}", config.live_containers());
    ensure!(proxies().is_empty(), "a proxy runs");
    Ok(())
}

fn works(container: &Container) -> Result<()> {
    let output = container.exec(&["ibv_devinfo"])?;
    ensure!(output.contains("PORT_ACTIVE"), "no active port:\n{output}");
    Ok(())
}

fn prestart(image: &Image) -> Result<()> {
    works(&one(image, Builder::at_prestart)?.container)
}

fn readonly(image: &Image) -> Result<()> {
    let one = one(image, Builder::readonly)?;
    works(&one.container)?;
    ensure!(one.container.exec(&["touch", "/etc/x"]).is_err(), "the root file system can be written to");
    Ok(())
}

fn user_namespace(image: &Image) -> Result<()> {
    let config = Config::new("")?;
    // With a network namespace of its own: runc cannot enter one that the host owns again.
    let container = Builder::default().hooked(&config).annotation("enable", "true").in_user_namespace().start(image)?;
    works(&container)?;
    let map = container.exec(&["cat", "/proc/self/uid_map"])?;
    ensure!(map.contains("100000"), "no user namespace: {map}");
    Ok(())
}

fn own_preload_file(image: &Image) -> Result<()> {
    let config = Config::new("")?;
    let networks = netns::pair()?;
    let builder = Builder::with_rdma(&config, &networks.0).args(&["cat", "/etc/ld.so.preload"]);
    let bundle = builder.bundle(image)?;
    std::fs::write(bundle.rootfs().dir().join("etc/ld.so.preload"), "/lib/x86_64-linux-gnu/libm.so.6\n")?;
    let output = bundle.run()?.success()?;
    ensure!(output.contains("/lib/x86_64-linux-gnu/libm.so.6"), "the image's own line is lost:\n{output}");
    ensure!(output.contains("/etc/ld.so.ringfence/"), "our line is missing:\n{output}");
    let after = std::fs::read_to_string(bundle.rootfs().dir().join("etc/ld.so.preload"))?;
    ensure!(after == "/lib/x86_64-linux-gnu/libm.so.6\n", "the image's file has become {after:?}");
    Ok(())
}

/// Pids of the proxies of this test's PID namespace; each has a warden.
fn proxies() -> Vec<String> {
    let is_warden = |pid: &String| is_warden(&Path::new("/proc").join(pid));
    proxies_and_wardens().into_iter().filter(|pid| !is_warden(pid)).collect()
}

fn proxies_and_wardens() -> Vec<String> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    pids.filter(|pid| {
        let command = std::fs::read(Path::new("/proc").join(pid).join("cmdline")).unwrap_or_default();
        command.split(|byte| *byte == 0).next().is_some_and(|word| word.ends_with(b"ringfence-proxy"))
    })
    .collect()
}

fn nothing_remains(config: &Config) -> Result<()> {
    wait_until("the proxies to end", Duration::from_secs(3), || proxies_and_wardens().is_empty())?;
    let left = config.live_containers();
    ensure!(left.is_empty(), "{left:?} remain in {}", config.run_dir().display());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let ours: Vec<&str> = mounts.lines().filter(|line| line.contains("/ld.so.")).collect();
    ensure!(ours.is_empty(), "mounts remain: {ours:?}");
    Ok(())
}

/// Two containers that may take a tenth of one CPU have their proxies copy without end: what they do for them is no way around
/// that.
fn processors(image: &Image) -> Result<()> {
    let status = |pid: &str, name: &str| -> Result<String> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(value.with_context(|| format!("no {name} of {pid}"))?.trim().to_owned())
    };
    let allowed = status("self", "Cpus_allowed_list")?;
    let cpu = allowed.rsplit([',', '-']).next().unwrap_or("0");
    let config = Config::new("")?;
    let networks = netns::pair()?;
    let start = |netns| Builder::with_rdma(&config, netns).processors(0.1, cpu).start(image);
    let (a, b) = (start(&networks.0)?, start(&networks.1)?);
    let mut pair = perftest::start(&a, &b, "ib_write_bw", &["-F", "-D", "60", "-s", "8388608"])?;
    let pids = proxies();
    ensure!(pids.len() == 2, "proxies {pids:?}");
    let used = || pids.iter().map(|pid| cpu_seconds(pid)).collect::<Result<Vec<_>>>();
    let idle: f64 = used()?.iter().sum();
    wait_until("data to flow", Duration::from_secs(240), || {
        used().is_ok_and(|now| now.iter().sum::<f64>() > idle + 0.1)
    })?;
    let (begin, before) = (Instant::now(), used()?);
    std::thread::sleep(Duration::from_secs(2));
    let (elapsed, after) = (begin.elapsed().as_secs_f64(), used()?);
    ensure!(!pair.has_ended(), "the stream ended: {}", pair.stop());
    for ((pid, before), after) in pids.iter().zip(before).zip(after) {
        let share = (after - before) / elapsed;
        ensure!(share < 0.3, "proxy {pid} took {share:.2} CPUs, and its container may take 0.1");
        let on = status(pid, "Cpus_allowed_list")?;
        ensure!(on == cpu, "proxy {pid} is on CPUs {on}, and its container on {cpu}");
    }
    drop(pair.stop());
    Ok(())
}

/// Processor time of a process so far.
fn cpu_seconds(pid: &str) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // utime and stime, in hundredths of a second.
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
}

fn delete_ends_the_proxy(image: &Image) -> Result<()> {
    let one = one(image, |builder| builder)?;
    works(&one.container)?;
    ensure!(proxies().len() == 1, "{} proxies", proxies().len());
    one.container.delete()?;
    nothing_remains(&one.config)?;
    let written = one.container.rootfs().written()?;
    ensure!(written == Vec::<PathBuf>::new(), "{written:?} remain in the root file system");
    Ok(())
}

fn killed_init(image: &Image) -> Result<()> {
    let two = two(image)?;
    let mut pair = perftest::start(&two.a, &two.b, "ib_write_bw", &["-F", "-D", "20"])?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(!pair.has_ended(), "the stream ended: {}", pair.stop());
    two.a.kill_init()?;
    wait_until("the proxy to end", Duration::from_secs(2), || proxies().len() == 1)?;
    // The other container lives on.
    works(&two.b)?;
    drop(pair.stop());
    drop(two.a);
    two.b.delete()?;
    nothing_remains(&two.config)
}

/// Another run-time directory is another node: its containers cannot be reached by their addresses.
fn other_node(image: &Image) -> Result<()> {
    let (here, there) = (Config::new("")?, Config::new("")?);
    let networks = netns::pair()?;
    let a = Builder::with_rdma(&here, &networks.0).start(image)?;
    let b = Builder::with_rdma(&there, &networks.1).start(image)?;
    let outcome = perftest::run(&a, &b, "ibv_rc_pingpong", &["-g", "0", "-n", "10"]);
    ensure!(outcome.is_err(), "{outcome:?}");
    Ok(())
}

fn refused(image: &Image, config: &Config, key: &str, value: &str, expected: &[&str]) -> Result<()> {
    let networks = netns::pair()?;
    let builder = Builder::with_rdma(config, &networks.0).annotation(key, value).args(&["echo", "it runs"]);
    let bundle = builder.bundle(image)?;
    let ended = bundle.run()?;
    ensure!(!ended.status.success(), "the container started:\n{}", ended.output);
    ensure!(!ended.output.contains("it runs"), "the container ran:\n{}", ended.output);
    for word in expected {
        ensure!(ended.output.contains(word), "no {word:?} in:\n{}", ended.output);
    }
    nothing_remains(config)?;
    let written = bundle.rootfs().written()?;
    ensure!(written == Vec::<PathBuf>::new(), "{written:?} remain in the root file system");
    Ok(())
}

fn malformed_annotation(image: &Image) -> Result<()> {
    let config = Config::new("")?;
    refused(image, &config, "bandwidth", "10gbps", &["ringfence.dev/bandwidth", "10gbps", "Gbit"])?;
    refused(image, &config, "band-width", "1Gbit", &["band-width", "unknown", "max-mr-bytes"])?;
    refused(image, &config, "device", "soft7", &["soft7", "soft0"])
}

fn beyond_the_bound(image: &Image) -> Result<()> {
    let config = Config::new("[policy.bounds]\nbandwidth = \"5Gbit\"\n")?;
    refused(image, &config, "bandwidth", "6Gbit", &["ringfence.dev/bandwidth", "6", "5"])
}

/// The software device has no link that it models unless the administrator says so: weights would mean nothing.
fn nothing_to_do(image: &Image) -> Result<()> {
    let config = Config::new("")?;
    refused(image, &config, "weight", "10", &["ringfence.dev/weight"])?;
    refused(image, &config, "class", "latency", &["ringfence.dev/class"])
}
