//! containerd by `ctr`, with our shim and with our runtime, on whole nodes of several Debian releases.

use anyhow::{Context, Result, bail, ensure};
use ringfence_integration::engines::containerd::{self, Container, Containerd, ctr, once};
use ringfence_integration::engines::{ENABLE, exchange};
use ringfence_integration::node::{Node, Suite};
use ringfence_integration::perftest;
use ringfence_integration::suite::{self, NodeTest};
use ringfence_trials::Skipped;
use std::process::ExitCode;
use std::time::Duration;

type Scene = suite::Scene<Containerd>;

fn main() -> ExitCode {
    let prepare = |node| {
        let daemon = Containerd::start(&node)?;
        containerd::load_default(&node)?;
        Ok(Scene::new(node, daemon))
    };
    suite::on_nodes("ringfence-containerd", prepare, |_: Suite| TESTS.to_vec())
}

const TESTS: [NodeTest<Containerd>; 12] = [
    ("containers without our annotations are left alone", left_alone),
    ("two containers exchange data", two),
    ("only containerd's own shim stays", nothing_resident),
    ("the end of a container's program is the proxy's", program_ends),
    ("task kill ends the proxy", task_kill),
    ("a killed init ends the proxy", killed_init),
    ("a killed shim leaves nothing behind", killed_shim),
    ("containerd restarts under running containers", restarted),
    ("pause and resume", paused),
    ("metrics of a container with RDMA", metrics),
    ("too much memory", out_of_memory),
    ("a malformed annotation is refused", malformed),
];

const SHIM: [&str; 2] = ["--runtime", "io.containerd.ringfence.v2"];
const BINARY: [&str; 2] = ["--runc-binary", "/usr/bin/ringfence-runtime"];
const WAYS: [[&str; 2]; 2] = [SHIM, BINARY];

fn start<'a>(node: &'a Node, way: [&str; 2], program: &[&str]) -> Result<Container<'a>> {
    containerd::start(node, &[&way[..], &["--annotation", ENABLE]].concat(), program)
}

fn left_alone(scene: &Scene) -> Result<()> {
    for way in WAYS {
        let container = containerd::start(&scene.node, &way, &[])?;
        container.member().has_no_rdma().with_context(|| way.join(" "))?;
        container.remove()?;
    }
    Ok(())
}

fn two(scene: &Scene) -> Result<()> {
    for way in WAYS {
        let (a, b) = (start(&scene.node, way, &[])?, start(&scene.node, way, &[])?);
        scene.node.proxies_are(2)?;
        exchange(&a.member(), &b.member()).with_context(|| way.join(" "))?;
        a.remove()?;
        scene.node.proxies_are(1)?;
        b.member().has_rdma()?;
        b.remove()?;
    }
    Ok(())
}

fn nothing_resident(scene: &Scene) -> Result<()> {
    for way in WAYS {
        let container = start(&scene.node, way, &[])?;
        let processes = scene.node.processes()?;
        let ours = processes.iter().filter(|(_, words)| words[0].contains("ringfence")).collect::<Vec<_>>();
        // The proxy and its warden.
        let only_proxies = ours.iter().all(|(_, words)| words[0].ends_with("ringfence-proxy"));
        ensure!(ours.len() == 2 && only_proxies, "{way:?}: {ours:?}");
        ensure!(scene.node.pids("containerd-shim-runc-v2")?.len() == 1, "{way:?}: {processes:?}");
        container.remove()?;
    }
    Ok(())
}

fn program_ends(scene: &Scene) -> Result<()> {
    for way in WAYS {
        for (program, status) in [("ibv_devices", 0), ("ibv_devices; exit 7", 7)] {
            let options = [&way[..], &["--annotation", ENABLE]].concat();
            let ended = once(&scene.node, &options, &["sh", "-c", program])?;
            ensure!(ended.status.code() == Some(status), "{way:?}: {}\n{}", ended.status, ended.output);
            ensure!(ended.output.contains("soft0"), "{way:?}:\n{}", ended.output);
        }
    }
    Ok(())
}

fn task_kill(scene: &Scene) -> Result<()> {
    for way in WAYS {
        for signal in ["TERM", "KILL"] {
            let container = start(&scene.node, way, &[])?;
            container.task(&["kill", "--signal", signal])?;
            scene.node.proxies_are(0).with_context(|| format!("{way:?}: {signal}"))?;
            container.remove()?;
        }
    }
    Ok(())
}

fn killed_init(scene: &Scene) -> Result<()> {
    let (a, b) = (start(&scene.node, SHIM, &[])?, start(&scene.node, SHIM, &[])?);
    let mut pair = perftest::start(&a.member(), &b.member(), "ib_write_bw", &["-F", "-D", "20"])?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(!pair.has_ended(), "the stream ended: {}", pair.stop());
    scene.node.kill("KILL", a.init()?)?;
    scene.node.proxies_are(1)?;
    drop(pair.stop());
    b.member().has_rdma()?;
    a.remove()?;
    b.remove()
}

/// containerd finds the shim gone, and has it delete what it left: by our shim, which leads to our runtime.
fn killed_shim(scene: &Scene) -> Result<()> {
    for way in WAYS {
        let container = start(&scene.node, way, &[])?;
        for pid in scene.node.pids("containerd-shim-runc-v2")? {
            scene.node.kill("KILL", pid)?;
        }
        scene.node.proxies_are(0).with_context(|| way.join(" "))?;
        scene.node.is_clean().with_context(|| way.join(" "))?;
        drop(container);
    }
    Ok(())
}

fn restarted(scene: &Scene) -> Result<()> {
    for way in WAYS {
        let (a, b) = (start(&scene.node, way, &[])?, start(&scene.node, way, &[])?);
        let mut daemon = scene.daemon.lock().expect("no test panics");
        daemon.take().context("a daemon runs")?.stop(&scene.node)?;
        ensure!(scene.node.pids("ringfence-proxy")?.len() == 2, "the proxies ended with containerd");
        *daemon = Some(Containerd::start(&scene.node)?);
        exchange(&a.member(), &b.member()).with_context(|| way.join(" "))?;
        a.remove()?;
        b.remove()?;
        scene.node.is_clean().with_context(|| way.join(" "))?;
    }
    Ok(())
}

fn paused(scene: &Scene) -> Result<()> {
    for way in WAYS {
        let (a, b) = (start(&scene.node, way, &[])?, start(&scene.node, way, &[])?);
        a.task(&["pause"])?;
        b.member().has_rdma()?;
        a.task(&["resume"])?;
        exchange(&a.member(), &b.member()).with_context(|| way.join(" "))?;
        a.remove()?;
        b.remove()?;
    }
    Ok(())
}

fn metrics(scene: &Scene) -> Result<()> {
    let plain = containerd::start(&scene.node, &[], &[])?;
    // containerd wants a mount of every hierarchy that there is, and this machine's hugetlb may be mounted nowhere.
    let has_metrics = plain.task(&["metrics"]);
    for way in WAYS {
        let container = start(&scene.node, way, &[])?;
        if has_metrics.is_ok() {
            let output = container.task(&["metrics"]).with_context(|| format!("{way:?}: only ours has no metrics"))?;
            ensure!(output.contains("memory"), "{way:?}: no memory in:\n{output}");
        }
        // The proxy is not one of the container's processes.
        let pids = container.task(&["ps"])?;
        let init = container.init()?;
        let proxy = scene.node.pids("ringfence-proxy")?;
        let listed = |pid: i32| pids.lines().any(|line| line.split_whitespace().next() == Some(&pid.to_string()));
        ensure!(listed(init) && proxy.len() == 1 && !listed(proxy[0]), "{proxy:?} is a process of {pids}");
        container.remove()?;
    }
    plain.remove()?;
    let Err(error) = has_metrics else { return Ok(()) };
    let why = format!("{error:#}");
    let why = why.lines().last().unwrap_or_default();
    bail!(Skipped(format!("only that proxies are no processes of containers: none has metrics here: {why}")))
}

fn out_of_memory(scene: &Scene) -> Result<()> {
    for way in WAYS {
        let options = [&way[..], &["--annotation", ENABLE, "--memory-limit", "16777216"]].concat();
        let ended = once(&scene.node, &options, &["sh", "-c", "ibv_devices; exec tail /dev/zero"])?;
        ensure!(ended.status.code() == Some(137), "{way:?}: {}\n{}", ended.status, ended.output);
        scene.node.is_clean().with_context(|| way.join(" "))?;
    }
    Ok(())
}

fn malformed(scene: &Scene) -> Result<()> {
    let neighbour = start(&scene.node, SHIM, &[])?;
    for way in WAYS {
        let options = [&way[..], &["--annotation", ENABLE, "--annotation", "ringfence.dev/bandwidth=10gbps"]].concat();
        let ended = once(&scene.node, &options, &["echo", "it runs"])?;
        ensure!(!ended.status.success() && !ended.output.contains("it runs"), "{way:?}: it ran:\n{}", ended.output);
        for word in ["ringfence.dev/bandwidth", "10gbps"] {
            ensure!(ended.output.contains(word), "{way:?}: no {word} in:\n{}", ended.output);
        }
        let left = ctr(&scene.node, &["task", "list", "--quiet"])?.success()?;
        ensure!(left.lines().count() == 1, "{way:?}: tasks are left: {left}");
    }
    scene.node.proxies_are(1)?;
    neighbour.member().has_rdma()?;
    neighbour.remove()
}
