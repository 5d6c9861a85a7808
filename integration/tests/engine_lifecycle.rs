//! Many containers, one after the other and all at once, on whole nodes of several Debian releases: nothing accumulates.

use anyhow::{Context, Result, ensure};
use ringfence_integration::command::wait_until;
use ringfence_integration::engines::containerd::{self, Containerd};
use ringfence_integration::engines::podman::{self, podman};
use ringfence_integration::engines::{ENABLE, exchange};
use ringfence_integration::node::{Cgroups, IMAGE, Node, Suite};
use ringfence_integration::suite::{self, NodeTest};
use std::process::ExitCode;
use std::time::Duration;

type Scene = suite::Scene<Containerd>;

fn main() -> ExitCode {
    let prepare = |node| {
        podman::load(&node)?;
        let daemon = Containerd::start(&node)?;
        containerd::load_default(&node)?;
        Ok(Scene::new(node, daemon))
    };
    // One at a time: 64 containers that start at once are enough.
    suite::on_nodes_at_a_time(1, "ringfence-lifecycle", prepare, |_: Suite| TESTS.to_vec())
}

const TESTS: [NodeTest<Containerd>; 3] = [
    ("170 starts in a row", in_a_row),
    ("64 containers at once", at_once),
    ("control groups of the second version alone", second_version),
];

const OURS: &str = "/usr/bin/ringfence-runtime";

/// Says by its exit code whether the device is there: of what a short program writes, `ctr run` has lost all.
const SEES: [&str; 3] = ["sh", "-c", "ibv_devices | grep soft0"];

/// 510 of three releases. Seven of ten by podman under runc, crun and ringfence-runtime, the rest by ctr with our shim.
fn in_a_row(scene: &Scene) -> Result<()> {
    let node = &scene.node;
    let containerd = *node.pids("containerd")?.first().context("containerd runs")?;
    let mut descriptors = None;
    for round in 0..170 {
        let ended = match round % 10 {
            0 | 3 | 6 => {
                let options = ["--runtime", "io.containerd.ringfence.v2", "--annotation", ENABLE];
                containerd::once(node, &options, &SEES)?
            }
            n => podman(node, ["runc", "crun", OURS][n % 3]).once(&["--annotation", ENABLE], &SEES)?,
        };
        ended.success().with_context(|| format!("start {round}: it failed, or saw no soft0"))?;
        if round == 19 {
            descriptors = Some(node.descriptors(containerd)?);
        }
    }
    node.is_clean()?;
    let (before, after) = (descriptors.context("there were 20 rounds")?, node.descriptors(containerd)?);
    ensure!(after <= before + 4, "containerd had {before} descriptors after 20 starts, {after} after 170");
    Ok(())
}

fn at_once(scene: &Scene) -> Result<()> {
    const CONTAINERS: usize = 64;
    let node = &scene.node;
    let podman = podman(node, "crun");
    let names: Vec<String> = (0..CONTAINERS).map(|number| format!("crowd{number}")).collect();
    let outcome = (|| {
        let start = |name: &String| {
            let words = ["podman", "--runtime", "crun", "run", "--detach", "--network=host", "--name", name];
            node.spawn(&[&words[..], &["--annotation", ENABLE, IMAGE]].concat())
        };
        let starting = names.iter().map(start).collect::<Result<Vec<_>>>()?;
        for start in starting {
            start.wait(Duration::from_secs(120))?.success()?;
        }
        let proxies = node.pids("ringfence-proxy")?.len();
        ensure!(proxies == CONTAINERS, "{proxies} proxies for {CONTAINERS} containers");
        exchange(&podman.member("crowd0"), &podman.member("crowd63"))?;
        podman.member("crowd31").has_rdma()
    })();
    podman.run(&["rm", "--all", "--force", "--time=0"])?;
    outcome
}

/// On a node of its own. What this machine's first version has, such as limits on memory, is not there.
fn second_version(scene: &Scene) -> Result<()> {
    let node = Node::start_with(scene.node.suite(), Cgroups::V2)?;
    podman::load(&node)?;
    for runtime in ["runc", OURS] {
        let podman = podman(&node, runtime);
        let options = ["--pids-limit=0", "--annotation", ENABLE];
        let (a, b) = (podman.start(&options, &[])?, podman.start(&options, &[])?);
        exchange(&a.member(), &b.member()).with_context(|| runtime)?;
        a.remove()?;
        let gone = || node.pids("ringfence-proxy").is_ok_and(|proxies| proxies.len() == 1);
        wait_until("one proxy", Duration::from_secs(5), gone)?;
        b.act(&["stop", "--time=0"])?;
        b.remove()?;
        node.is_clean().with_context(|| runtime)?;
    }
    Ok(())
}
