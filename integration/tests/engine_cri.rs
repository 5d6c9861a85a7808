//! Kubernetes' way: containerd's CRI plugin with a RuntimeClass's handler, on whole nodes of several Debian releases.

use anyhow::{Context, Result, bail, ensure};
use ringfence_integration::command::wait_until;
use ringfence_integration::engines::containerd::{self, Containerd};
use ringfence_integration::engines::cri::{Cri, NAMESPACE, Options};
use ringfence_integration::engines::exchange;
use ringfence_integration::node::{Node, Suite};
use ringfence_integration::suite::{self, NodeTest};
use std::process::ExitCode;
use std::time::Duration;

type Scene = suite::Scene<Containerd>;

fn main() -> ExitCode {
    suite::on_nodes("ringfence-cri", prepare, |suite: Suite| match suite {
        // containerd 1.6 knows nothing of CDI.
        Suite::Bookworm => TESTS.to_vec(),
        _ => TESTS.into_iter().chain([("a CDI device", cdi as fn(&Scene) -> Result<()>)]).collect(),
    })
}

/// What `configure` registers, and beside it a handler that goes by our shim.
fn prepare(node: Node) -> Result<Scene> {
    node.run(&["ringfence", "configure", "--engine", "containerd"])?;
    let way = match Containerd::version(&node)? {
        // It has no runtime_path, and gives options of other types than runc's to no shim of runc's kind.
        (1, ..7) => "runtime_type = \"io.containerd.ringfence.v2\"",
        _ => "runtime_type = \"io.containerd.runc.v2\"\nruntime_path = \"/usr/bin/containerd-shim-ringfence-v2\"",
    };
    // The file is of the second version, which containerd 2 understands.
    let plugin = "plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.ringfence-shim";
    let annotations = "[\"ringfence.dev/*\", \"*.ringfence.dev/*\"]";
    let more = format!("\n[{plugin}]\n{way}\npod_annotations = {annotations}\ncontainer_annotations = {annotations}\n");
    let file = node.path("/etc/containerd/config.toml");
    // 1.7 has to be told; earlier and later versions take no notice.
    let header = "[plugins.\"io.containerd.grpc.v1.cri\"]\n";
    let text = std::fs::read_to_string(&file)?.replacen(header, &format!("{header}enable_cdi = true\n"), 1) + &more;
    std::fs::write(&file, text)?;
    node.run(&["ringfence", "cdi", "generate"])?;

    let daemon = Containerd::start(&node)?;
    containerd::load(&node, NAMESPACE)?;
    Ok(Scene::new(node, daemon))
}

const TESTS: [NodeTest<Containerd>; 10] = [
    ("pods of other runtimes are left alone", left_alone),
    ("two pods exchange data", two_pods),
    ("a pod with an init container and two containers", pod),
    ("annotations for one container of a pod", per_container),
    ("beyond the bounds", beyond_the_bounds),
    ("containers restart in their pod", restarts),
    ("too much memory", out_of_memory),
    ("containerd restarts under a pod", containerd_restarts),
    ("a killed shim leaves nothing behind", killed_shim),
    ("a removed pod leaves nothing, however many", many),
];

const HANDLERS: [&str; 2] = ["ringfence", "ringfence-shim"];
const ENABLED: (&str, &str) = ("ringfence.dev/enable", "true");

fn left_alone(scene: &Scene) -> Result<()> {
    let cri = Cri::connect(&scene.node)?;
    for handler in HANDLERS {
        let pod = cri.pod(handler, &[])?;
        let container = pod.start("main", &Options::default())?;
        pod.member(&scene.node, &container).has_no_rdma().with_context(|| handler)?;
        pod.remove()?;
    }
    // The default runtime is not ours, and does not even see the annotations.
    let pod = cri.pod("", &[ENABLED])?;
    let container = pod.start("main", &Options::default())?;
    pod.member(&scene.node, &container).has_no_rdma()?;
    ensure!(scene.node.proxies()? == 0);
    pod.remove()
}

fn two_pods(scene: &Scene) -> Result<()> {
    let cri = Cri::connect(&scene.node)?;
    for handler in HANDLERS {
        let (a, b) = (cri.pod(handler, &[ENABLED])?, cri.pod(handler, &[ENABLED])?);
        ensure!(scene.node.proxies()? == 0, "{handler}: a sandbox has a proxy");
        let (in_a, in_b) = (a.start("main", &Options::default())?, b.start("main", &Options::default())?);
        ensure!(scene.node.proxies()? == 2, "{handler}: {} proxies", scene.node.proxies()?);
        exchange(&a.member(&scene.node, &in_a), &b.member(&scene.node, &in_b)).with_context(|| handler)?;
        let said = a.exec_sync(&in_a, &["ibv_devices"])?;
        ensure!(said.contains("soft0"), "{handler}: a probe sees\n{said}");
        a.remove()?;
        scene.node.proxies_are(1)?;
        b.member(&scene.node, &in_b).has_rdma()?;
        b.remove()?;
    }
    Ok(())
}

fn pod(scene: &Scene) -> Result<()> {
    let cri = Cri::connect(&scene.node)?;
    for handler in HANDLERS {
        let pod = cri.pod(handler, &[ENABLED])?;
        let program = ["sh", "-c", "ibv_devices | grep -q soft0"];
        let init = pod.start("init", &Options { program: &program, ..Options::default() })?;
        wait_until("the init container to exit", Duration::from_secs(10), || {
            pod.status(&init).is_ok_and(|status| status.state == 2)
        })?;
        ensure!(pod.status(&init)?.exit_code == 0, "{handler}: no soft0 in the init container");
        scene.node.proxies_are(0)?;
        let one = pod.start("one", &Options::default())?;
        let other = pod.start("other", &Options::default())?;
        ensure!(scene.node.proxies()? == 2, "{handler}: {} proxies for two containers", scene.node.proxies()?);
        exchange(&pod.member(&scene.node, &one), &pod.member(&scene.node, &other)).with_context(|| handler)?;
        pod.remove()?;
        scene.node.is_clean().with_context(|| handler)?;
    }
    Ok(())
}

/// Under the default runtime, which knows nothing of us.
fn cdi(scene: &Scene) -> Result<()> {
    let cri = Cri::connect(&scene.node)?;
    let pod = cri.pod("", &[])?;
    let device = [("cdi.k8s.io/test_rdma", "ringfence.dev/rdma=default")];
    let with = pod.start("with", &Options { annotations: &device, ..Options::default() })?;
    pod.member(&scene.node, &with).has_rdma()?;
    pod.start("without", &Options::default())?;
    scene.node.proxies_are(1)?;
    let unknown = [("cdi.k8s.io/test_rdma", "ringfence.dev/rdma=nothing")];
    let error = pod.start("unknown", &Options { annotations: &unknown, ..Options::default() });
    ensure!(error.is_err(), "a device that is not there is given");
    pod.remove()
}

fn per_container(scene: &Scene) -> Result<()> {
    let cri = Cri::connect(&scene.node)?;
    for handler in HANDLERS {
        let annotations = [
            ("enable.ringfence.dev/container.with", "true"),
            ("max-qp.ringfence.dev/container.with", "17"),
            ("max-qp.ringfence.dev/pod", "33"),
        ];
        let pod = cri.pod(handler, &annotations)?;
        let with = pod.start("with", &Options::default())?;
        let info = pod.member(&scene.node, &with).exec(&["ibv_devinfo", "-v"])?;
        let line = info.lines().find(|line| line.contains("max_qp:")).unwrap_or_default();
        ensure!(line.split_whitespace().last() == Some("17"), "{handler}: {line:?}");
        // A limit of the whole pod's enables nothing.
        let without = pod.start("without", &Options::default())?;
        pod.member(&scene.node, &without).has_no_rdma().with_context(|| handler)?;
        ensure!(scene.node.proxies()? == 1, "{handler}: {} proxies", scene.node.proxies()?);
        pod.remove()?;
    }
    Ok(())
}

/// The refused container's error has our line, and no other container hears of it.
fn beyond_the_bounds(scene: &Scene) -> Result<()> {
    let file = scene.node.path("/etc/ringfence/config.toml");
    let before = std::fs::read_to_string(&file)?;
    scene.node.write("/etc/ringfence/config.toml", "[policy.bounds]\nbandwidth = \"5Gbit\"\n")?;
    let outcome = (|| {
        let cri = Cri::connect(&scene.node)?;
        for handler in HANDLERS {
            let annotations = [ENABLED, ("bandwidth.ringfence.dev/container.greedy", "6Gbit")];
            let pod = cri.pod(handler, &annotations)?;
            let modest = pod.start("modest", &Options::default())?;
            let Err(error) = pod.start("greedy", &Options::default()) else { bail!("{handler}: it started") };
            let text = format!("{error:#}");
            for word in ["bandwidth.ringfence.dev/container.greedy", "6", "5"] {
                ensure!(text.contains(word), "{handler}: no {word} in {text}");
            }
            ensure!(scene.node.proxies()? == 1, "{handler}: {} proxies", scene.node.proxies()?);
            pod.member(&scene.node, &modest).has_rdma()?;
            pod.remove()?;
        }
        Ok(())
    })();
    std::fs::write(&file, before)?;
    outcome
}

/// As the kubelet restarts a container that has ended: a new one, of the next attempt.
fn restarts(scene: &Scene) -> Result<()> {
    let cri = Cri::connect(&scene.node)?;
    for handler in HANDLERS {
        let pod = cri.pod(handler, &[ENABLED])?;
        let neighbour = pod.start("neighbour", &Options::default())?;
        for attempt in 0..3 {
            let id = pod.start("main", &Options { attempt, ..Options::default() })?;
            pod.member(&scene.node, &id).has_rdma().with_context(|| format!("{handler}, attempt {attempt}"))?;
            pod.stop(&id, if attempt == 0 { 2 } else { 0 })?;
            pod.remove_container(&id)?;
            scene.node.proxies_are(1)?;
        }
        pod.member(&scene.node, &neighbour).has_rdma()?;
        pod.remove()?;
    }
    Ok(())
}

fn out_of_memory(scene: &Scene) -> Result<()> {
    let cri = Cri::connect(&scene.node)?;
    for handler in HANDLERS {
        let pod = cri.pod(handler, &[ENABLED])?;
        let program = ["sh", "-c", "ibv_devices; exec tail /dev/zero"];
        let id = pod.start("main", &Options { program: &program, memory: 16 << 20, ..Options::default() })?;
        wait_until("the container to exit", Duration::from_secs(20), || {
            pod.status(&id).is_ok_and(|status| status.state == 2)
        })?;
        let status = pod.status(&id)?;
        ensure!(status.exit_code == 137, "{handler}: {status:?}");
        scene.node.proxies_are(0)?;
        pod.remove()?;
    }
    Ok(())
}

fn containerd_restarts(scene: &Scene) -> Result<()> {
    for handler in HANDLERS {
        let cri = Cri::connect(&scene.node)?;
        let pod = cri.pod(handler, &[ENABLED])?;
        let id = pod.start("main", &Options::default())?;
        let mut daemon = scene.daemon.lock().expect("no test panics");
        daemon.take().context("a daemon runs")?.stop(&scene.node)?;
        ensure!(scene.node.proxies()? == 1, "{handler}: the proxy ended with containerd");
        *daemon = Some(Containerd::start(&scene.node)?);
        drop(daemon);
        cri.wait()?;
        pod.member(&scene.node, &id).has_rdma().with_context(|| handler)?;
        // The pod lives on under the new daemon: its next container starts as before.
        let next = pod.start("next", &Options::default())?;
        exchange(&pod.member(&scene.node, &id), &pod.member(&scene.node, &next)).with_context(|| handler)?;
        pod.remove()?;
        scene.node.is_clean().with_context(|| handler)?;
    }
    Ok(())
}

/// containerd 1 kills what the shim leaves. containerd 2 deletes only the sandbox, whatever the runtime: the pod's containers
/// run on without a parent, each with its proxy, until somebody ends them.
fn killed_shim(scene: &Scene) -> Result<()> {
    let node = &scene.node;
    let cri = Cri::connect(node)?;
    for handler in HANDLERS {
        let pod = cri.pod(handler, &[ENABLED])?;
        for name in ["one", "other"] {
            pod.start(name, &Options::default())?;
        }
        for pid in node.pids("containerd-shim-runc-v2")? {
            node.kill("KILL", pid)?;
        }
        if Containerd::version(node)? >= (2, 0) {
            let mut inits = Vec::new();
            wait_until("the sandbox to be deleted", Duration::from_secs(10), || {
                let idle = |words: &[String]| words.get(1).is_some_and(|word| word == "/bin/idle");
                let processes = node.processes().unwrap_or_default();
                inits = processes.iter().filter(|(_, words)| idle(words)).map(|(pid, _)| *pid).collect();
                inits.len() == 2
            })?;
            ensure!(node.proxies()? == 2, "{} proxies for two containers", node.proxies()?);
            for pid in inits {
                node.kill("KILL", pid)?;
            }
        }
        node.proxies_are(0).with_context(|| handler)?;
        pod.remove()?;
        // Nobody has called poststop.
        node.run(&["ringfence", "gc"])?;
        node.is_clean().with_context(|| handler)?;
    }
    Ok(())
}

fn many(scene: &Scene) -> Result<()> {
    let cri = Cri::connect(&scene.node)?;
    let pid = *scene.node.pids("containerd")?.first().context("containerd runs")?;
    let mut before = 0;
    for round in 0..10 {
        let pod = cri.pod(HANDLERS[round % 2], &[ENABLED])?;
        pod.start("main", &Options::default())?;
        pod.remove()?;
        if round == 1 {
            before = scene.node.descriptors(pid)?;
        }
    }
    let after = scene.node.descriptors(pid)?;
    ensure!(after <= before + 4, "containerd had {before} descriptors, now {after}");
    Ok(())
}
