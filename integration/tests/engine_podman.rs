//! podman, as root, on whole nodes of several Debian releases.

use anyhow::{Context, Result, ensure};
use ringfence_integration::command::wait_until;
use ringfence_integration::engines::cli::{Cli, Container};
use ringfence_integration::engines::podman::{self, podman};
use ringfence_integration::engines::{ENABLE, exchange};
use ringfence_integration::node::{IMAGE, Leftovers, Node, Suite};
use ringfence_integration::perftest;
use ringfence_integration::suite::{self, NodeTest};
use std::process::ExitCode;
use std::time::Duration;

type Scene = suite::Scene;

fn main() -> ExitCode {
    let prepare = |node| {
        podman::load(&node)?;
        Ok(Scene::new(node, ()))
    };
    suite::on_nodes("ringfence-podman", prepare, |_: Suite| TESTS.to_vec())
}

const TESTS: [NodeTest<()>; 24] = [
    ("containers without our annotations are left alone", left_alone),
    ("two containers exchange data under runc", |scene| two(&podman(&scene.node, "runc"), ENABLE)),
    ("two containers exchange data under crun", |scene| two(&podman(&scene.node, "crun"), ENABLE)),
    ("two containers exchange data under ringfence-runtime", under_our_runtime),
    ("what is read beside verbs", read_beside_verbs),
    ("the end of a container's program is the proxy's", program_ends),
    ("stop, kill and rm --force end the proxy", stops),
    ("a killed init ends the proxy", killed_init),
    ("a killed conmon leaves no proxy behind its container", killed_conmon),
    ("always restarted", restarted_always),
    ("restarted on failure", restarted_on_failure),
    ("pause and unpause", paused),
    ("stop and start again", started_again),
    ("sessions of exec", sessions),
    ("too much memory", out_of_memory),
    ("a read-only root and no capabilities", readonly),
    ("a user namespace", user_namespace),
    ("a pod of two containers", pod),
    ("a Kubernetes pod's file is played", kube),
    ("an init of podman's own", own_init),
    ("a CDI device", cdi),
    ("a malformed annotation is refused", malformed),
    ("a missing program fails the start and leaves nothing", missing_program),
    ("a hook whose binary is gone", missing_hook),
];

fn left_alone(scene: &Scene) -> Result<()> {
    for runtime in RUNTIMES {
        podman(&scene.node, runtime).start(&[], &[])?.member().has_no_rdma().with_context(|| runtime)?;
    }
    Ok(())
}

const RUNTIMES: [&str; 3] = ["runc", "crun", OURS];
const HOOKS_D: &str = "/usr/share/containers/oci/hooks.d";
const OURS: &str = "/usr/bin/ringfence-runtime";

fn start<'a>(podman: &Cli<'a>, options: &[&str], program: &[&str]) -> Result<Container<'a>> {
    podman.start(&[&["--annotation", ENABLE], options].concat(), program)
}

fn two(podman: &Cli<'_>, annotation: &str) -> Result<()> {
    let options = ["--annotation", annotation];
    let (a, b) = (podman.start(&options, &[])?, podman.start(&options, &[])?);
    ensure!(podman.node().proxies()? == 2, "{} proxies", podman.node().proxies()?);
    exchange(&a.member(), &b.member())?;
    a.remove()?;
    podman.node().proxies_are(1)?;
    b.member().has_rdma()?;
    b.remove()
}

/// The device in `/sys`, and all else there as without it.
fn read_beside_verbs(scene: &Scene) -> Result<()> {
    let list = ["sh", "-c", "for class in /sys/class/*; do echo $class; ls $class; done"];
    for runtime in RUNTIMES {
        let podman = podman(&scene.node, runtime);
        let (with, without) = (start(&podman, &[], &[])?, podman.start(&[], &[])?);
        let others = |listing: &str| -> Vec<String> {
            let mut classes: Vec<_> = listing.split("/sys/class/").map(str::to_owned).collect();
            classes.retain(|class| !class.starts_with("infiniband"));
            classes
        };
        let (shown, all) = (with.member().exec(&list)?, without.member().exec(&list)?);
        ensure!(others(&shown) == others(&all), "{runtime}:\n{shown}\nwithout a device:\n{all}");
        ensure!(
            shown.contains("/sys/class/infiniband\nsoft0\n/sys/class/infiniband_verbs\nabi_version\nuverbs0\n"),
            "{runtime}:\n{shown}"
        );
        let guid = with.member().exec(&["cat", "/sys/class/infiniband/soft0/node_guid"])?.trim().replace(':', "");
        let devices = with.member().exec(&["ibv_devices"])?;
        ensure!(guid.len() == 16 && devices.contains(&guid), "{runtime}: {guid}\n{devices}");
        let state = with.member().exec(&["cat", "/sys/class/infiniband/soft0/ports/1/state"])?;
        ensure!(state == "4: ACTIVE\n", "{runtime}: {state}");
        with.remove()?;
        without.remove()?;
    }
    Ok(())
}

/// Without hooks.d: the runtime puts the hook into config.json.
fn under_our_runtime(scene: &Scene) -> Result<()> {
    two(&without_hooks(&scene.node)?, ENABLE)
}

/// podman with our runtime and without hooks.d's files.
fn without_hooks(node: &Node) -> Result<Cli<'_>> {
    std::fs::create_dir_all(node.path("/etc/no-hooks.d"))?;
    Ok(podman(node, OURS).with(&["--hooks-dir", "/etc/no-hooks.d"]))
}

fn program_ends(scene: &Scene) -> Result<()> {
    for runtime in RUNTIMES {
        for (program, status) in [("ibv_devices", 0), ("ibv_devices; exit 7", 7)] {
            let ended = podman(&scene.node, runtime).once(&["--annotation", ENABLE], &["sh", "-c", program])?;
            ensure!(ended.status.code() == Some(status), "{runtime}: {}\n{}", ended.status, ended.output);
            ensure!(ended.output.contains("soft0"), "{runtime}:\n{}", ended.output);
            ensure!(!ended.output.contains("poststop"), "{runtime}: poststop complains:\n{}", ended.output);
        }
    }
    Ok(())
}

fn stops(scene: &Scene) -> Result<()> {
    for runtime in RUNTIMES {
        let podman = podman(&scene.node, runtime);
        for words in [&["stop"][..], &["kill"], &["stop", "--time=0"]] {
            let container = start(&podman, &[], &[])?;
            container.act(words)?;
            container.wait_for("exited")?;
            scene.node.is_clean().with_context(|| format!("{runtime}: {words:?}"))?;
        }
        start(&podman, &[], &[])?.remove()?;
        scene.node.is_clean().with_context(|| format!("{runtime}: rm --force"))?;
    }
    Ok(())
}

fn killed_init(scene: &Scene) -> Result<()> {
    let podman = podman(&scene.node, "runc");
    let (a, b) = (start(&podman, &[], &[])?, start(&podman, &[], &[])?);
    let mut pair = perftest::start(&a.member(), &b.member(), "ib_write_bw", &["-F", "-D", "20"])?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(!pair.has_ended(), "the stream ended: {}", pair.stop());
    scene.node.kill("KILL", a.init()?)?;
    scene.node.proxies_are(1)?;
    drop(pair.stop());
    b.member().has_rdma()
}

/// conmon is who tells podman of the container's end; without it nobody calls poststop until the container is removed.
fn killed_conmon(scene: &Scene) -> Result<()> {
    for runtime in ["runc", "crun"] {
        let container = start(&podman(&scene.node, runtime), &[], &[])?;
        let conmon = scene.node.pids("conmon")?;
        ensure!(conmon.len() == 1, "{conmon:?}");
        scene.node.kill("KILL", conmon[0])?;
        // The container lives on, and its proxy too.
        container.member().has_rdma().with_context(|| runtime)?;
        scene.node.kill("KILL", container.init()?)?;
        scene.node.proxies_are(0)?;
        // podman 5.4 first complains that it has no exit code, and removes it the second time.
        container.act(&["rm", "--force"]).ok();
        container.remove()?;
        swept(&scene.node)?;
    }
    Ok(())
}

/// Nothing is left but for the record and the control groups of a container whose poststop podman never called, and those go
/// with `ringfence gc` or the next container's poststop.
fn swept(node: &Node) -> Result<()> {
    let is_record = |file: &String| file.starts_with("state/");
    wait_until("all but records to go", Duration::from_secs(5), || {
        Leftovers::of(node)
            .is_ok_and(|left| left.files.iter().all(is_record) && left.processes.is_empty() && left.mounts.is_empty())
    })
    .with_context(|| Leftovers::of(node).map(|left| left.to_string()).unwrap_or_default())?;
    node.run(&["ringfence", "gc"])?;
    node.is_clean()
}

/// Every start has a proxy of its own, and no start is refused for what an earlier one left.
fn restarted_always(scene: &Scene) -> Result<()> {
    for runtime in ["runc", OURS] {
        let program = ["sh", "-c", "ibv_devices && echo round >> /count && sleep 0.2"];
        let container = start(&podman(&scene.node, runtime), &["--restart=always"], &program)?;
        let mut rounds = String::new();
        wait_until("five rounds", Duration::from_secs(30), || {
            rounds = container.inspect("{{.RestartCount}}").unwrap_or_default();
            rounds.parse::<u32>().is_ok_and(|rounds| rounds >= 5)
        })
        .with_context(|| format!("{runtime}: {rounds} restarts; {}", container.act(&["logs"]).unwrap_or_default()))?;
        ensure!(scene.node.proxies()? <= 1, "{} proxies", scene.node.proxies()?);
        container.act(&["stop", "--time=0"])?;
        container.remove()?;
        scene.node.is_clean()?;
    }
    Ok(())
}

fn restarted_on_failure(scene: &Scene) -> Result<()> {
    let program = ["sh", "-c", "ibv_devices; exit 3"];
    let container = start(&podman(&scene.node, "crun"), &["--restart=on-failure:3"], &program)?;
    wait_until("three restarts", Duration::from_secs(30), || {
        container.inspect("{{.RestartCount}} {{.State.Status}}").is_ok_and(|now| now == "3 exited")
    })
    .with_context(|| container.inspect("{{.RestartCount}} {{.State.Status}}").unwrap_or_default())?;
    let logs = container.act(&["logs"])?;
    ensure!(logs.matches("soft0").count() == 4, "RDMA in {} of 4 runs", logs.matches("soft0").count());
    ensure!(container.inspect("{{.State.ExitCode}}")? == "3");
    scene.node.is_clean()
}

fn paused(scene: &Scene) -> Result<()> {
    for runtime in ["runc", "crun"] {
        let podman = podman(&scene.node, runtime);
        let (a, b) = (start(&podman, &[], &[])?, start(&podman, &[], &[])?);
        a.act(&["pause"])?;
        // Its proxy is not paused: others are not held up by a paused neighbour.
        b.member().has_rdma()?;
        ensure!(scene.node.proxies()? == 2);
        a.act(&["unpause"])?;
        exchange(&a.member(), &b.member()).with_context(|| runtime)?;
        // Removed while paused.
        a.act(&["pause"])?;
        a.remove()?;
        b.remove()?;
        scene.node.is_clean()?;
    }
    Ok(())
}

fn started_again(scene: &Scene) -> Result<()> {
    for runtime in RUNTIMES {
        let container = start(&podman(&scene.node, runtime), &[], &[])?;
        for _ in 0..3 {
            container.member().has_rdma().with_context(|| runtime)?;
            container.act(&["stop", "--time=2"])?;
            scene.node.is_clean()?;
            container.act(&["start"])?;
        }
    }
    Ok(())
}

/// Programs of exec, some running when the container ends.
fn sessions(scene: &Scene) -> Result<()> {
    let podman = podman(&scene.node, "runc");
    let (a, b) = (start(&podman, &[], &[])?, start(&podman, &[], &[])?);
    let mut pairs = Vec::new();
    for _ in 0..2 {
        pairs.push(perftest::start(&a.member(), &b.member(), "ib_write_bw", &["-F", "-D", "30"])?);
    }
    std::thread::sleep(Duration::from_millis(300));
    for pair in &mut pairs {
        ensure!(!pair.has_ended(), "a session ended");
    }
    a.remove()?;
    b.remove()?;
    drop(pairs);
    scene.node.is_clean()
}

fn out_of_memory(scene: &Scene) -> Result<()> {
    for runtime in ["runc", "crun"] {
        let program = ["sh", "-c", "ibv_devices; tail /dev/zero; exec tail /dev/zero"];
        let container = start(&podman(&scene.node, runtime), &["--memory=16m"], &program)?;
        container.wait_for("exited")?;
        ensure!(container.inspect("{{.State.ExitCode}}")? == "137", "{}", container.inspect("{{.State}}")?);
        scene.node.is_clean().with_context(|| runtime)?;
    }
    Ok(())
}

fn readonly(scene: &Scene) -> Result<()> {
    for runtime in RUNTIMES {
        let options = ["--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--user=1000:1000"];
        start(&podman(&scene.node, runtime), &options, &[])?.member().has_rdma().with_context(|| runtime)?;
    }
    Ok(())
}

fn user_namespace(scene: &Scene) -> Result<()> {
    for runtime in RUNTIMES {
        let podman = podman(&scene.node, runtime);
        // The host's network is not the user namespace's own, and it may not mount a sysfs for it.
        let ended = podman.attempt(&[
            "run",
            "--rm",
            "--network=none",
            "--uidmap=0:100000:65536",
            "--annotation",
            ENABLE,
            IMAGE,
            "sh",
            "-c",
            "cat /proc/self/uid_map; ibv_devinfo",
        ])?;
        ensure!(
            ended.output.contains("100000") && ended.output.contains("PORT_ACTIVE"),
            "{runtime}:\n{}",
            ended.output
        );
    }
    Ok(())
}

fn pod(scene: &Scene) -> Result<()> {
    let podman = podman(&scene.node, "runc");
    podman.run(&["pod", "create", "--name", "two", "--network=host"])?;
    let removal = Removal { podman: &podman };
    let words = ["run", "--detach", "--pod=two", "--annotation", ENABLE];
    for name in ["one", "other"] {
        podman.run(&[&words[..], &["--name", name, IMAGE]].concat())?;
    }
    podman.run(&["run", "--detach", "--pod=two", "--name=plain", IMAGE])?;
    ensure!(scene.node.proxies()? == 2, "{} proxies for two containers", scene.node.proxies()?);
    exchange(&podman.member("one"), &podman.member("other"))?;
    podman.member("plain").has_no_rdma()?;
    drop(removal);
    scene.node.is_clean()
}

/// What `podman kube play` takes.
const KUBE: &str = r#"
apiVersion: v1
kind: Pod
metadata:
  name: two
  annotations:
    ringfence.dev/enable: "true"
spec:
  hostNetwork: true
  containers:
  - {name: one, image: "IMAGE", imagePullPolicy: Never}
  - {name: other, image: "IMAGE", imagePullPolicy: Never}
"#;

fn kube(scene: &Scene) -> Result<()> {
    scene.node.write("/two.yaml", KUBE.replace("IMAGE", IMAGE))?;
    for runtime in ["runc", "crun"] {
        let podman = podman(&scene.node, runtime);
        podman.run(&["kube", "play", "/two.yaml"])?;
        let removal = Removal { podman: &podman };
        exchange(&podman.member("two-one"), &podman.member("two-other")).with_context(|| runtime)?;
        podman.run(&["restart", "--time=0", "two-one"])?;
        exchange(&podman.member("two-one"), &podman.member("two-other")).with_context(|| runtime)?;
        podman.run(&["kube", "down", "/two.yaml"])?;
        drop(removal);
        scene.node.is_clean().with_context(|| runtime)?;
    }
    Ok(())
}

fn own_init(scene: &Scene) -> Result<()> {
    for runtime in RUNTIMES {
        let podman = podman(&scene.node, runtime);
        let (a, b) = (start(&podman, &["--init"], &[])?, start(&podman, &[], &[])?);
        exchange(&a.member(), &b.member()).with_context(|| runtime)?;
        a.remove()?;
        scene.node.proxies_are(1)?;
    }
    scene.node.is_clean()
}

/// Removes the pod `two`.
struct Removal<'p, 'a> {
    podman: &'p Cli<'a>,
}

impl Drop for Removal<'_, '_> {
    fn drop(&mut self) {
        self.podman.run(&["pod", "rm", "--force", "--time=0", "two"]).ok();
    }
}

fn cdi(scene: &Scene) -> Result<()> {
    scene.node.run(&["ringfence", "cdi", "generate"])?;
    for runtime in ["runc", "crun"] {
        let podman = podman(&scene.node, runtime);
        let device = ["--device", "ringfence.dev/rdma=default"];
        let (a, b) = (podman.start(&device, &[])?, podman.start(&device, &[])?);
        exchange(&a.member(), &b.member()).with_context(|| runtime)?;
    }
    scene.node.is_clean()
}

/// What the user of podman sees, and that a neighbour does not.
fn malformed(scene: &Scene) -> Result<()> {
    let neighbour = start(&podman(&scene.node, "runc"), &[], &[])?;
    for runtime in RUNTIMES {
        let podman = podman(&scene.node, runtime);
        let options = ["--annotation", ENABLE, "--annotation", "ringfence.dev/bandwidth=10gbps"];
        let ended = podman.once(&options, &["echo", "it runs"])?;
        ensure!(ended.status.code() == Some(126), "{runtime}: {}\n{}", ended.status, ended.output);
        ensure!(!ended.output.contains("it runs"), "{runtime}: it ran");
        // crun throws away what hooks say; our own runtime speaks before crun or runc is there.
        if runtime != "crun" {
            for word in ["ringfence.dev/bandwidth", "10gbps"] {
                ensure!(ended.output.contains(word), "{runtime}: no {word} in:\n{}", ended.output);
            }
        }
        ensure!(scene.node.proxies()? == 1, "{runtime}: {} proxies", scene.node.proxies()?);
    }
    neighbour.member().has_rdma()
}

/// podman calls no poststop for a container that it could not create.
fn missing_program(scene: &Scene) -> Result<()> {
    for runtime in RUNTIMES {
        let ended = podman(&scene.node, runtime).once(&["--annotation", ENABLE], &["/no/such/program"])?;
        ensure!(ended.status.code() == Some(127), "{runtime}: {}\n{}", ended.status, ended.output);
        swept(&scene.node).with_context(|| runtime)?;
    }
    Ok(())
}

/// The hooks.d file of a package that was removed by force: podman passes over it, and the container runs without RDMA.
fn missing_hook(scene: &Scene) -> Result<()> {
    let (hook, away) = (scene.node.path("/usr/bin/ringfence-hook"), scene.node.path("/usr/bin/away"));
    std::fs::rename(&hook, &away)?;
    let podman = podman(&scene.node, "runc");
    let told = podman.with(&["--hooks-dir", HOOKS_D]);
    let outcomes =
        [podman, told].map(|podman| podman.once(&["--annotation", ENABLE], &["sh", "-c", "ibv_devices; echo it runs"]));
    let doctor = scene.node.attempt(&["ringfence", "doctor"]);
    std::fs::rename(&away, &hook)?;
    for ended in outcomes {
        let output = ended?.success()?;
        ensure!(output.contains("it runs") && !output.contains("soft0"), "{output}");
    }
    let doctor = doctor?.output;
    ensure!(doctor.contains("/usr/bin/ringfence-hook"), "doctor does not name the hook:\n{doctor}");
    Ok(())
}
