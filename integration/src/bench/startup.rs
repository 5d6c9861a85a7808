//! What hook, runtime and shim add to a container's start under each engine, on a node of the machine's own release.

use crate::figure::{Figure, Goal, median};
use anyhow::{Context, Result, bail, ensure};
use ringfence_integration::engines::ENABLE;
use ringfence_integration::engines::containerd::{self, Containerd};
use ringfence_integration::engines::cri::{Cri, NAMESPACE, Options};
use ringfence_integration::engines::docker::{self, Docker, docker};
use ringfence_integration::engines::podman::{self, podman};
use ringfence_integration::machine;
use ringfence_integration::node::{ARCHIVE, Node, Suite};
use serde_json::{Value, json};
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// An engine, and how to start a container under it with Ringfence or without.
type Way = (&'static str, fn(&Scene, bool) -> Result<Times>);

/// Milliseconds since the engine was asked for a container.
struct Times {
    /// Till the container's program said something.
    start: f64,
    /// Till the engine had removed the container again.
    whole: f64,
}

const WAYS: [Way; 9] = [
    ("runc with the hook", |scene, with| bundle(scene, with, "runc", "hooked")),
    ("crun with the hook", |scene, with| bundle(scene, with, "crun", "hooked")),
    ("ringfence-runtime, which becomes runc", |scene, with| {
        bundle(scene, with, if with { OURS } else { "runc" }, "annotated")
    }),
    ("podman with hooks.d", |scene, with| {
        let options: &[&str] = if with { &["--annotation", ENABLE] } else { &[] };
        timed(with, podman(&scene.node, "runc").once_command(options, &PROGRAM))
    }),
    ("podman --runtime ringfence-runtime", |scene, with| {
        let podman = podman(&scene.node, if with { OURS } else { "runc" }).with(&["--hooks-dir", NO_HOOKS]);
        let options: &[&str] = if with { &["--annotation", ENABLE] } else { &[] };
        timed(with, podman.once_command(options, &PROGRAM))
    }),
    ("ctr with the shim", |scene, with| ctr(scene, with, ["--runtime", "io.containerd.ringfence.v2"])),
    ("ctr with ringfence-runtime", |scene, with| ctr(scene, with, ["--runc-binary", OURS])),
    ("a pod's container by CRI", cri),
    ("docker with the runtime ringfence", |scene, with| {
        let runtime = if with { "--runtime=ringfence" } else { "--runtime=runc" };
        timed(with, docker(&scene.node).once_command(&[runtime], &PROGRAM))
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

/// The medians of `starts` starts each with us and without, taking turns.
pub fn figures(starts: usize) -> Result<Vec<Figure>> {
    ensure!(starts > 0, "no starts, no median");
    let name = machine::debian_suite().context("/etc/os-release has no VERSION_CODENAME")?;
    let Some(suite) = Suite::ALL.into_iter().find(|suite| suite.name() == name) else {
        bail!("no nodes of Debian's {name}");
    };
    let scene = Scene::prepare(suite)?;
    let mut figures = Vec::new();
    for (name, start) in WAYS {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for run in 0..=starts {
            for (times, ours) in [(&mut without, false), (&mut with, true)] {
                let time = start(&scene, ours).with_context(|| name)?;
                // The first start fills caches.
                if run > 0 {
                    times.push(time);
                }
            }
        }
        let start = Compared::of(&with, &without, |times| times.start);
        let whole = Compared::of(&with, &without, |times| times.whole);
        figures.push(Figure::new(&format!("{name}: start"), start.with, "ms").beside(start.without));
        figures.push(Figure::new(&format!("{name}: added to it"), start.adds, "ms").goal(Goal::AtMost(20.0)));
        figures
            .push(Figure::new(&format!("{name}: until it is removed again"), whole.with, "ms").beside(whole.without));
        figures.push(Figure::new(&format!("{name}: added to that"), whole.adds, "ms"));
    }
    Ok(figures)
}

/// Medians.
struct Compared {
    with: f64,
    without: f64,
    /// Of the differences of neighbours, so that a change of the machine's mood meets both.
    adds: f64,
}

impl Compared {
    fn of(with: &[Times], without: &[Times], what: fn(&Times) -> f64) -> Self {
        let differences = with.iter().zip(without).map(|(with, without)| what(with) - what(without));
        Self {
            with: median(with.iter().map(what).collect()),
            without: median(without.iter().map(what).collect()),
            adds: median(differences.collect()),
        }
    }
}

impl Scene {
    fn prepare(suite: Suite) -> Result<Self> {
        let mut node = Node::start(suite)?;
        node.enter_cgroups()?;
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

/// Milliseconds from now on.
fn stopwatch() -> impl Fn() -> f64 {
    let begin = Instant::now();
    move || begin.elapsed().as_secs_f64() * 1e3
}

/// Times `command`, which runs [`PROGRAM`] in a container and then removes that.
fn timed(with: bool, mut command: Command) -> Result<Times> {
    let since = stopwatch();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut output = child.stdout.take().context("the output is piped")?;
    let mut said = vec![0; 4096];
    let read = output.read(&mut said)?;
    let start = since();
    said.truncate(read);
    output.read_to_end(&mut said)?;
    let status = child.wait()?;
    let whole = since();
    ensure!(status.success(), "{command:?}: {status}");
    has_rdma(with, &String::from_utf8_lossy(&said))?;
    Ok(Times { start, whole })
}

/// Whether what [`PROGRAM`] said is what it should say.
fn has_rdma(with: bool, said: &str) -> Result<()> {
    ensure!(said.contains("ringfence") == with, "with Ringfence: {with}, but /dev has\n{said}");
    Ok(())
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

fn bundle(scene: &Scene, with: bool, runtime: &str, ours: &str) -> Result<Times> {
    let bundle = format!("/bundles/{}", if with { ours } else { "plain" });
    timed(with, scene.node.command(&[runtime, "run", "--bundle", &bundle, "measured"]))
}

fn ctr(scene: &Scene, with: bool, way: [&str; 2]) -> Result<Times> {
    let options = [&way[..], &["--annotation", ENABLE]].concat();
    timed(with, containerd::once_command(&scene.node, if with { &options } else { &[] }, &PROGRAM))
}

/// Creating, starting and removing a container in a pod that is there.
fn cri(scene: &Scene, with: bool) -> Result<Times> {
    let cri = Cri::connect(&scene.node)?;
    let pod = match with {
        true => cri.pod("ringfence", &[("ringfence.dev/enable", "true")])?,
        false => cri.pod("", &[])?,
    };
    // Within a few milliseconds the container would be spared the wait for all processors that the pod's own start paid for.
    std::thread::sleep(Duration::from_millis(50));
    let since = stopwatch();
    let id = pod.start("main", &Options::default())?;
    let start = since();
    has_rdma(with, &pod.exec_sync(&id, &PROGRAM)?)?;
    let looked = since() - start;
    pod.remove_container(&id)?;
    let whole = since() - looked;
    pod.remove()?;
    Ok(Times { start, whole })
}
