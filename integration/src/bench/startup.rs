//! What hook, runtime and shim add to a container's start under each engine, on a node of the machine's own release.

use crate::figure::{Figure, Goal};
use crate::median;
use anyhow::{Context, Result, bail, ensure};
use ringfence_integration::engines::ENABLE;
use ringfence_integration::engines::containerd::{self, Containerd};
use ringfence_integration::engines::cri::{Cri, NAMESPACE, Options};
use ringfence_integration::engines::docker::{self, Docker, docker};
use ringfence_integration::engines::podman::{self, podman};
use ringfence_integration::machine;
use ringfence_integration::node::{ARCHIVE, Node, Suite};
use serde_json::{Value, json};
use std::time::Instant;

/// An engine, and how to start a container under it with Ringfence or without: how long that took, in milliseconds.
type Way = (&'static str, fn(&Scene, bool) -> Result<f64>);

const WAYS: [Way; 9] = [
    ("runc with the hook", |scene, with| bundle(scene, "runc", with.then_some("hooked"))),
    ("crun with the hook", |scene, with| bundle(scene, "crun", with.then_some("hooked"))),
    ("ringfence-runtime, which becomes runc", |scene, with| match with {
        true => bundle(scene, OURS, Some("annotated")),
        false => bundle(scene, "runc", None),
    }),
    ("podman with hooks.d", |scene, with| {
        let options: &[&str] = if with { &["--annotation", ENABLE] } else { &[] };
        timed(with, || podman(&scene.node, "runc").once(options, &PROGRAM)?.success())
    }),
    ("podman --runtime ringfence-runtime", |scene, with| {
        let podman = podman(&scene.node, if with { OURS } else { "runc" }).with(&["--hooks-dir", NO_HOOKS]);
        let options: &[&str] = if with { &["--annotation", ENABLE] } else { &[] };
        timed(with, || podman.once(options, &PROGRAM)?.success())
    }),
    ("ctr with the shim", |scene, with| ctr(scene, with, ["--runtime", "io.containerd.ringfence.v2"])),
    ("ctr with ringfence-runtime", |scene, with| ctr(scene, with, ["--runc-binary", OURS])),
    ("a pod's container by CRI", cri),
    ("docker with the runtime ringfence", |scene, with| {
        let runtime = if with { "--runtime=ringfence" } else { "--runtime=runc" };
        timed(with, || docker(&scene.node).once(&[runtime], &PROGRAM)?.success())
    }),
];

/// Says whether the container has RDMA.
const PROGRAM: [&str; 2] = ["ls", "/dev"];
const OURS: &str = "/usr/bin/ringfence-runtime";
const NO_HOOKS: &str = "/etc/no-hooks.d";

/// The fields drop in order: the daemons before the node.
struct Scene {
    _daemons: (Containerd, Docker),
    node: Node,
}

/// The medians of `runs` starts each with us and without, taking turns.
pub fn figures(runs: usize) -> Result<Vec<Figure>> {
    ensure!(runs > 0, "no runs, no median");
    let name = machine::debian_suite().context("/etc/os-release has no VERSION_CODENAME")?;
    let Some(suite) = Suite::ALL.into_iter().find(|suite| suite.name() == name) else {
        bail!("no nodes of Debian's {name}");
    };
    let scene = Scene::prepare(suite)?;
    let mut figures = Vec::new();
    for (name, start) in WAYS {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for run in 0..=runs {
            for (times, ours) in [(&mut without, false), (&mut with, true)] {
                let time = start(&scene, ours).with_context(|| name)?;
                // The first start fills caches.
                if run > 0 {
                    times.push(time);
                }
            }
        }
        let (with, without) = (median(with), median(without));
        figures.push(Figure::new(&format!("start: {name}"), with, "ms").beside(without));
        figures.push(Figure::new("  adds, median", with - without, "ms").goal(Goal::AtMost(20.0)));
    }
    Ok(figures)
}

impl Scene {
    fn prepare(suite: Suite) -> Result<Self> {
        let node = Node::start(suite)?;
        for engine in ["containerd", "docker"] {
            node.run(&["ringfence", "configure", "--engine", engine])?;
        }
        let daemons = (Containerd::start(&node)?, Docker::start(&node)?);
        podman::load(&node)?;
        docker::load(&node)?;
        containerd::load_default(&node)?;
        containerd::load(&node, NAMESPACE)?;
        std::fs::create_dir_all(node.path(NO_HOOKS))?;
        bundles(&node)?;
        Ok(Self { _daemons: daemons, node })
    }
}

/// Times `start`, which says what [`PROGRAM`] said.
fn timed(with: bool, start: impl FnOnce() -> Result<String>) -> Result<f64> {
    let begin = Instant::now();
    let said = start()?;
    let took = begin.elapsed();
    ensure!(said.contains("ringfence") == with, "with Ringfence: {with}, but /dev has\n{said}");
    Ok(took.as_secs_f64() * 1e3)
}

/// Bundles of the image for [`PROGRAM`]: `/bundles/plain`, `annotated`, and `hooked`, which is annotated, too.
fn bundles(node: &Node) -> Result<()> {
    let script = "mkdir -p /bundles/root && cd /bundles && tar -xOf $0 layer.tar | tar -C root -x && runc spec && cat config.json";
    let mut config: Value = serde_json::from_str(&node.run(&["sh", "-c", script, ARCHIVE])?)?;
    config["root"] = json!({"path": "/bundles/root"});
    config["process"]["terminal"] = json!(false);
    config["process"]["args"] = json!(PROGRAM);
    node.write("/bundles/plain/config.json", config.to_string())?;
    let (key, value) = ENABLE.split_once('=').context("a key and a value")?;
    config["annotations"] = json!({ key: value });
    node.write("/bundles/annotated/config.json", config.to_string())?;
    let hook = |stage| json!([{"path": "/usr/bin/ringfence-hook", "args": ["ringfence-hook", stage], "env": ["PATH=/usr/bin:/bin"]}]);
    config["hooks"] = json!({"createRuntime": hook("createRuntime"), "poststop": hook("poststop")});
    node.write("/bundles/hooked/config.json", config.to_string())
}

fn bundle(scene: &Scene, runtime: &str, ours: Option<&str>) -> Result<f64> {
    let bundle = format!("/bundles/{}", ours.unwrap_or("plain"));
    timed(ours.is_some(), || scene.node.run(&[runtime, "run", "--bundle", &bundle, "measured"]))
}

fn ctr(scene: &Scene, with: bool, way: [&str; 2]) -> Result<f64> {
    let options = [&way[..], &["--annotation", ENABLE]].concat();
    timed(with, || containerd::once(&scene.node, if with { &options } else { &[] }, &PROGRAM)?.success())
}

/// Creating and starting a container in a pod that is there.
fn cri(scene: &Scene, with: bool) -> Result<f64> {
    let cri = Cri::connect(&scene.node)?;
    let pod = match with {
        true => cri.pod("ringfence", &[("ringfence.dev/enable", "true")])?,
        false => cri.pod("", &[])?,
    };
    let begin = Instant::now();
    let id = pod.start("main", &Options::default())?;
    let took = begin.elapsed();
    let said = pod.exec_sync(&id, &PROGRAM)?;
    ensure!(said.contains("ringfence") == with, "with Ringfence: {with}, but /dev has\n{said}");
    pod.remove()?;
    Ok(took.as_secs_f64() * 1e3)
}
