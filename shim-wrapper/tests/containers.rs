//! Containers that really run, under `ringfence-runtime` as engines call it, with runc, crun, our hook and a stand-in for the
//! proxy.

mod common;

use common::{Lab, succeeded};
use ringfence_trials::{needs_root, skip, tests};
use serde_json::json;
use std::process::{Command, ExitCode, Stdio};

type RuntimeTest = fn(&Lab, &str);

/// Each is run with each runtime.
const TESTS: [(&str, RuntimeTest); 7] = [
    ("run", run),
    ("create_start_delete", create_start_delete),
    ("a_container_that_is_not_ours", a_container_that_is_not_ours),
    ("the_exit_code_is_the_containers", the_exit_code_is_the_containers),
    ("device_nodes_for_mode_passthrough", device_nodes_for_mode_passthrough),
    ("what_engines_ask_before_anything_else", what_engines_ask_before_anything_else),
    ("without_an_environment", without_an_environment),
];

fn main() -> ExitCode {
    let mut trials = tests![device_nodes_with_cgroup_version_2];
    for (name, run) in TESTS {
        for runtime in ["runc", "crun"] {
            trials.push(ringfence_trials::test(format!("{runtime}: {name}"), move || with_runtime(runtime, run)));
        }
    }
    ringfence_trials::main(trials)
}

const SEEN: &str = "/etc/ld.so.ringfence/preload-like-libasan.so\nverbs.sock\n";

fn with_runtime(runtime: &str, test: RuntimeTest) {
    needs_root("it makes containers");
    if Command::new(runtime).arg("--version").output().is_err() {
        skip(format!("{runtime} is not installed"));
    }
    let lab = Lab::new();
    lab.populate();
    test(&lab, runtime);
    lab.assert_clean();
}

fn run(lab: &Lab, runtime: &str) {
    // Twice: the second time the hook is already there.
    for _ in 0..2 {
        assert_eq!(succeeded(&lab.real(runtime, &["run", &lab.id]).output().unwrap()), SEEN, "{runtime}");
    }
    assert_eq!(lab.value()["hooks"]["createRuntime"].as_array().unwrap().len(), 1);
}

fn create_start_delete(lab: &Lab, runtime: &str) {
    lab.edit(|config| {
        config["process"]["args"] = json!(["/bin/busybox", "sleep", "60"]);
    });
    let bundle = lab.path("bundle");
    // As containerd and conmon call it.
    let (log, pid_file) = (lab.path("log.json"), lab.path("pid"));
    let [bundle, log, pid_file] = [&bundle, &log, &pid_file].map(|path| path.to_str().unwrap());
    let create = ["--log", log, "--log-format", "json", "create", "--bundle", bundle, "--pid-file", pid_file, &lab.id];
    // A container that was only created holds the runtime's output open.
    let mut create = lab.real(runtime, &create);
    assert!(create.current_dir("/").stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    let run = |arguments: &[&str]| succeeded(&lab.real(runtime, arguments).output().unwrap());
    let sockets = lab.path("run/containers").join(&lab.id);
    assert!(sockets.exists(), "{runtime}");
    run(&["start", &lab.id]);
    assert!(run(&["state", &lab.id]).contains("running"));
    let inside = run(&["exec", &lab.id, "/bin/busybox", "ls", "/dev/ringfence"]);
    assert_eq!(inside, "verbs.sock\n");
    run(&["delete", "--force", &lab.id]);
    assert!(!sockets.exists(), "{runtime}");
}

fn a_container_that_is_not_ours(lab: &Lab, runtime: &str) {
    lab.edit(|config| {
        config["annotations"] = json!({});
        config["process"]["args"] = json!(["/bin/busybox", "ls", "/dev/ringfence"]);
    });
    let before = lab.text();
    let output = lab.real(runtime, &["run", &lab.id]).output().unwrap();
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("No such file"), "{output:?}");
    assert_eq!(lab.text(), before);
}

fn the_exit_code_is_the_containers(lab: &Lab, runtime: &str) {
    lab.edit(|config| config["process"]["args"] = json!(["/bin/busybox", "sh", "-c", "exit 42"]));
    assert_eq!(lab.real(runtime, &["run", &lab.id]).status().unwrap().code(), Some(42));
}

fn device_nodes_for_mode_passthrough(lab: &Lab, runtime: &str) {
    if !std::path::Path::new("/dev/fuse").exists() {
        skip("needs /dev/fuse as a device node");
    }
    lab.edit(|config| {
        config["process"]["args"] = json!(["/bin/busybox", "sh", "-c", "exec 3<>/dev/fuse && echo opened"]);
    });
    let mut command = lab.real(runtime, &["run", &lab.id]);
    let device = "[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\nnodes = [\"/dev/fuse\"]\n[policy.bounds]\nmodes = [\"passthrough\"]\n";
    let text = std::fs::read_to_string(lab.path("config.toml")).unwrap() + device;
    std::fs::write(lab.path("config.toml"), text).unwrap();
    assert_eq!(succeeded(&command.output().unwrap()), "opened\n", "{runtime}");
    assert_eq!(lab.value()["linux"]["devices"][0]["path"], "/dev/fuse");
}

fn device_nodes_with_cgroup_version_2() {
    needs_root("it makes containers");
    let lab = Lab::new();
    lab.populate();
    if !std::path::Path::new("/dev/fuse").exists() {
        skip("needs /dev/fuse as a device node");
    }
    lab.edit(|config| {
        config["process"]["args"] = json!(["/bin/busybox", "sh", "-c", "exec 3<>/dev/fuse && echo opened"]);
    });
    lab.configure("[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\nnodes = [\"/dev/fuse\"]\n[policy.bounds]\nmodes = [\"passthrough\"]\n");
    let script =
        "umount -l /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec \"$0\" --root \"$1\" run \"$2\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", script, common::RUNTIME]);
    command.arg(lab.path("state")).arg(&lab.id).env("RINGFENCE_CONFIG", lab.path("config.toml"));
    let output = command.current_dir(lab.path("bundle")).stdin(Stdio::null()).output().unwrap();
    assert_eq!(succeeded(&output), "opened\n");
    lab.assert_clean();
}

fn what_engines_ask_before_anything_else(lab: &Lab, runtime: &str) {
    for arguments in [&["--version"][..], &["features"], &["--help"], &["list"]] {
        let direct =
            Command::new(runtime).args(["--root", lab.path("state").to_str().unwrap()]).args(arguments).output();
        let (direct, ours) = (direct.unwrap(), lab.real(runtime, arguments).output().unwrap());
        let shown = |text: &[u8]| String::from_utf8_lossy(text).into_owned();
        assert_eq!(shown(&ours.stdout), shown(&direct.stdout), "{runtime} {arguments:?}");
        assert_eq!(ours.status, direct.status, "{runtime} {arguments:?}");
    }
}

/// As podman calls `state`: with hardly an environment, and without the flags that it was told to give.
fn without_an_environment(lab: &Lab, runtime: &str) {
    let direct = Command::new(runtime).arg("--version").output().unwrap();
    let mut ours = Command::new(lab.path("links").join(runtime));
    ours.arg("--version").env_clear().env("XDG_RUNTIME_DIR", lab.path("state"));
    let version = |text: String| text.lines().next().map(str::to_owned);
    assert_eq!(version(succeeded(&ours.output().unwrap())), version(succeeded(&direct)));
}
