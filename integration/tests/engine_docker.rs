//! docker on whole nodes of several Debian releases.

use anyhow::{Context, Result, ensure};
use ringfence_integration::command::wait_until;
use ringfence_integration::engines::cli::Container;
use ringfence_integration::engines::docker::{self, Docker, docker};
use ringfence_integration::engines::{ENABLE, exchange};
use ringfence_integration::node::{IMAGE, Node, Suite};
use ringfence_integration::perftest;
use ringfence_integration::suite::{self, NodeTest};
use std::process::ExitCode;
use std::time::Duration;

type Scene = suite::Scene<Docker>;

fn main() -> ExitCode {
    let prepare = |node: Node| {
        node.run(&["ringfence", "configure", "--engine", "docker"])?;
        let daemon = Docker::start(&node)?;
        docker::load(&node)?;
        Ok(Scene::new(node, daemon))
    };
    suite::on_nodes("ringfence-docker", prepare, |suite| {
        let mut tests = TESTS.to_vec();
        if suite != Suite::Bookworm {
            // docker 20.10 has neither shims by name nor --annotation.
            tests.extend(NEWER);
        }
        tests
    })
}

const TESTS: [NodeTest<Docker>; 10] = [
    ("containers of other runtimes are left alone", left_alone),
    ("two containers exchange data", two),
    ("the end of a container's program is the proxy's", program_ends),
    ("stop, kill and rm --force end the proxy", stops),
    ("a killed init ends the proxy", killed_init),
    ("restarted on failure", restarted_on_failure),
    ("pause and unpause", paused),
    ("too much memory", out_of_memory),
    ("dockerd restarts under running containers", dockerd_restarts),
    ("docker build is unaffected", build),
];

const NEWER: [NodeTest<Docker>; 2] =
    [("containers exchange data under the shim", under_the_shim), ("a malformed annotation is refused", malformed)];

/// Choosing this runtime is what gives a container RDMA.
const RINGFENCE: &str = "--runtime=ringfence";

fn start<'a>(node: &'a Node, options: &[&str], program: &[&str]) -> Result<Container<'a>> {
    docker(node).start(&[&[RINGFENCE], options].concat(), program)
}

fn left_alone(scene: &Scene) -> Result<()> {
    for runtime in ["runc", "crun"] {
        let container = docker(&scene.node).start(&["--runtime", runtime], &[])?;
        container.member().has_no_rdma().with_context(|| runtime)?;
    }
    Ok(())
}

fn two(scene: &Scene) -> Result<()> {
    let (a, b) = (start(&scene.node, &[], &[])?, start(&scene.node, &[], &[])?);
    ensure!(scene.node.proxies()? == 2, "{} proxies", scene.node.proxies()?);
    exchange(&a.member(), &b.member())?;
    a.remove()?;
    scene.node.proxies_are(1)?;
    b.member().has_rdma()
}

fn program_ends(scene: &Scene) -> Result<()> {
    for (program, status) in [("ibv_devices", 0), ("ibv_devices; exit 7", 7)] {
        let ended = docker(&scene.node).once(&[RINGFENCE], &["sh", "-c", program])?;
        ensure!(ended.status.code() == Some(status), "{}\n{}", ended.status, ended.output);
        ensure!(ended.output.contains("soft0"), "{}", ended.output);
    }
    let ended = docker(&scene.node).once(&[RINGFENCE], &["/no/such/program"])?;
    ensure!(ended.status.code() == Some(127), "{}\n{}", ended.status, ended.output);
    Ok(())
}

fn stops(scene: &Scene) -> Result<()> {
    for words in [&["stop"][..], &["kill"], &["stop", "--time=0"]] {
        let container = start(&scene.node, &[], &[])?;
        container.act(words)?;
        container.wait_for("exited")?;
        scene.node.is_clean().with_context(|| words.join(" "))?;
        container.act(&["start"])?;
        container.member().has_rdma().with_context(|| format!("started again after {words:?}"))?;
    }
    start(&scene.node, &[], &[])?.remove()
}

fn killed_init(scene: &Scene) -> Result<()> {
    let (a, b) = (start(&scene.node, &[], &[])?, start(&scene.node, &[], &[])?);
    let mut pair = perftest::start(&a.member(), &b.member(), "ib_write_bw", &["-F", "-D", "20"])?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(!pair.has_ended(), "the stream ended: {}", pair.stop());
    scene.node.kill("KILL", a.init()?)?;
    scene.node.proxies_are(1)?;
    drop(pair.stop());
    b.member().has_rdma()
}

fn restarted_on_failure(scene: &Scene) -> Result<()> {
    let container = start(&scene.node, &["--restart=on-failure:3"], &["sh", "-c", "ibv_devices; exit 3"])?;
    wait_until("three restarts", Duration::from_secs(30), || {
        container.inspect("{{.RestartCount}} {{.State.Status}}").is_ok_and(|now| now == "3 exited")
    })
    .with_context(|| container.inspect("{{.RestartCount}} {{.State.Status}}").unwrap_or_default())?;
    let logs = container.act(&["logs"])?;
    ensure!(logs.matches("soft0").count() == 4, "RDMA in {} of 4 runs:\n{logs}", logs.matches("soft0").count());
    Ok(())
}

fn paused(scene: &Scene) -> Result<()> {
    let (a, b) = (start(&scene.node, &[], &[])?, start(&scene.node, &[], &[])?);
    a.act(&["pause"])?;
    b.member().has_rdma()?;
    a.act(&["unpause"])?;
    exchange(&a.member(), &b.member())?;
    a.act(&["pause"])?;
    a.remove()
}

fn out_of_memory(scene: &Scene) -> Result<()> {
    let container = start(&scene.node, &["--memory=16m"], &["sh", "-c", "ibv_devices; exec tail /dev/zero"])?;
    container.wait_for("exited")?;
    ensure!(container.inspect("{{.State.ExitCode}}")? == "137", "{}", container.inspect("{{.State}}")?);
    scene.node.is_clean()
}

/// With `live-restore`.
fn dockerd_restarts(scene: &Scene) -> Result<()> {
    let (a, b) = (start(&scene.node, &[], &[])?, start(&scene.node, &[], &[])?);
    let mut daemon = scene.daemon.lock().expect("no test panics");
    daemon.take().context("a daemon runs")?.stop(&scene.node)?;
    ensure!(scene.node.proxies()? == 2, "the proxies ended with dockerd");
    *daemon = Some(Docker::start(&scene.node)?);
    exchange(&a.member(), &b.member())?;
    a.act(&["stop", "--time=0"])?;
    scene.node.proxies_are(1)?;
    a.act(&["start"])?;
    exchange(&a.member(), &b.member())
}

/// The containers of a build name no runtime and have no annotations.
fn build(scene: &Scene) -> Result<()> {
    let file = format!("FROM {IMAGE}\nRUN ls -d /dev/ringfence /etc/ld.so.preload || echo built without us\n");
    scene.node.write("/tmp/build/Dockerfile", file)?;
    let words = ["build", "--no-cache", "--network=host", "--tag=localhost/built", "/tmp/build"];
    let output = docker(&scene.node).run(&words)?;
    ensure!(output.contains("built without us"), "{output}");
    Ok(())
}

fn under_the_shim(scene: &Scene) -> Result<()> {
    let options = ["--runtime=io.containerd.ringfence.v2", "--annotation", ENABLE];
    let docker = docker(&scene.node);
    let (a, b) = (docker.start(&options, &[])?, docker.start(&options, &[])?);
    exchange(&a.member(), &b.member())?;
    docker.start(&options[..1], &[])?.member().has_no_rdma()
}

fn malformed(scene: &Scene) -> Result<()> {
    let neighbour = start(&scene.node, &[], &[])?;
    for runtime in [RINGFENCE, "--runtime=io.containerd.ringfence.v2"] {
        let options = [runtime, "--annotation", ENABLE, "--annotation", "ringfence.dev/bandwidth=10gbps"];
        let ended = docker(&scene.node).once(&options, &["echo", "it runs"])?;
        ensure!(!ended.status.success() && !ended.output.contains("it runs"), "it ran:\n{}", ended.output);
        for word in ["ringfence.dev/bandwidth", "10gbps"] {
            ensure!(ended.output.contains(word), "no {word} in:\n{}", ended.output);
        }
        ensure!(scene.node.proxies()? == 1, "{} proxies", scene.node.proxies()?);
    }
    neighbour.member().has_rdma()
}
