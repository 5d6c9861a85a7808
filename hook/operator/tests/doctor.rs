//! `ringfence doctor` as its users see it.

use ringfence_trials::{needs_root, skip, tests};
use serde_json::Value;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        a_whole_installation_is_fine,
        what_is_missing_or_unsafe_is_told_with_its_remedy,
        a_broken_configuration_does_not_end_the_examination,
        what_a_card_s_proxy_lacks_is_told,
        engines_that_are_asked_for_must_be_there,
    ])
}

/// Ringfence installed in a directory, by a configuration of its own.
struct Node(tempfile::TempDir);

impl Node {
    fn new() -> Self {
        let node = Self(tempfile::tempdir().unwrap());
        for name in ["hook", "runtime", "shim", "proxy", "library"] {
            node.program(name);
        }
        std::fs::create_dir(node.path("links")).unwrap();
        for name in ["runc", "crun"] {
            symlink(node.path("runtime"), node.path("links").join(name)).unwrap();
        }
        std::fs::create_dir(node.path("run")).unwrap();
        let paths =
            ["hook", "runtime", "shim", "proxy"].map(|name| format!("[{name}]\npath = {:?}\n", node.path(name)));
        let rest = format!("links = {:?}\n[inject]\nlibrary = {:?}\n", node.path("links"), node.path("library"));
        let [hook, runtime, shim, proxy] = paths;
        let runtimes = "runtimes = [\"/bin/true\"]\n";
        let config = format!("run-dir = {:?}\n{hook}{runtime}{runtimes}{proxy}{shim}{rest}", node.path("run"));
        std::fs::write(node.path("config.toml"), config).unwrap();
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn program(&self, name: &str) {
        std::fs::write(self.path(name), "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(self.path(name), PermissionsExt::from_mode(0o755)).unwrap();
    }

    fn doctor(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringfence"));
        command.arg("doctor").args(arguments).env("RINGFENCE_CONFIG", self.path("config.toml")).output().unwrap()
    }

    /// The messages of the checks of `subject` that are not "ok", each with its status and remedy.
    fn complaints(&self, subject: &str) -> Vec<(String, String, String)> {
        let output = self.doctor(&["--json"]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let text = |check: &Value, key: &str| check[key].as_str().unwrap_or_default().to_owned();
        let checks = report["checks"].as_array().unwrap().iter();
        let problems = checks.clone().filter(|check| check["status"] == "problem").count();
        assert_eq!(report["problems"], problems);
        assert_eq!(output.status.code(), Some(i32::from(problems > 0)));
        let bad = checks.filter(|check| check["subject"] == subject && check["status"] != "ok");
        bad.map(|check| (text(check, "status"), text(check, "message"), text(check, "fix"))).collect()
    }

    #[track_caller]
    fn expect(&self, subject: &str, status: &str, message: &str, fix: &str) {
        let complaints = self.complaints(subject);
        let found = |(s, m, f): &(String, String, String)| s == status && m.contains(message) && f.contains(fix);
        assert!(complaints.iter().any(found), "{complaints:?}");
    }
}

const WHY: &str = "it makes a node whose files belong to root";

fn a_whole_installation_is_fine() {
    needs_root(WHY);
    let node = Node::new();
    for subject in ["config", "programs", "run-dir", "devices", "containers", "failures"] {
        assert_eq!(node.complaints(subject), [], "{subject}");
    }
}

fn what_is_missing_or_unsafe_is_told_with_its_remedy() {
    needs_root(WHY);
    let node = Node::new();
    std::fs::remove_file(node.path("proxy")).unwrap();
    node.expect("programs", "problem", "/proxy: No such file", "apt-get install --reinstall ringfence");
    node.program("proxy");
    for (mode, fix) in [(0o777, "chmod go-w"), (0o644, "chmod +x")] {
        std::fs::set_permissions(node.path("hook"), PermissionsExt::from_mode(mode)).unwrap();
        node.expect("programs", "problem", "hook", fix);
    }
    node.program("hook");
    std::fs::remove_file(node.path("links/crun")).unwrap();
    node.expect("programs", "problem", "links/crun is missing", "reinstall");
    symlink("/bin/true", node.path("links/crun")).unwrap();
    node.expect("programs", "problem", "links/crun is not", "ln -sfn");
    std::fs::set_permissions(node.path("run"), PermissionsExt::from_mode(0o777)).unwrap();
    node.expect("run-dir", "problem", "written by others", "chmod go-w");
}

fn a_broken_configuration_does_not_end_the_examination() {
    let node = Node::new();
    std::fs::write(node.path("config.toml"), "run-dir = 1\n").unwrap();
    node.expect("config", "problem", "line 1", "ringfence config validate");
    std::fs::write(
        node.path("config.toml"),
        "[[device]]\nname = \"mlx5_9\"\nkind = \"ibverbs\"\nnodes = [\"/dev/infiniband/uverbs9\"]\n",
    )
    .unwrap();
    node.expect("devices", "problem", "/dev/infiniband/uverbs9 is no device node", "driver");
}

fn what_a_card_s_proxy_lacks_is_told() {
    needs_root(WHY);
    let node = Node::new();
    let text = std::fs::read_to_string(node.path("config.toml")).unwrap();
    let device = "[[device]]\nname = \"rf-none\"\nkind = \"ibverbs\"\n";
    std::fs::write(node.path("config.toml"), format!("{text}{device}")).unwrap();
    node.expect("devices", "problem", "rf-none: the proxy for cards", "apt-get install ringfence-ibverbs");
    node.program("ringfence-proxy-ibverbs");
    let script = "#!/bin/sh\necho 'libibverbs.so.1: cannot open shared object file' >&2\nexit 1\n";
    std::fs::write(node.path("ringfence-proxy-ibverbs"), script).unwrap();
    node.expect(
        "devices",
        "problem",
        "cannot open shared object file",
        "apt-get install libibverbs1 ibverbs-providers",
    );
    // Whether this machine has cards or not.
    let complaints = node.complaints("devices");
    let about = |words: &str| complaints.iter().any(|(_, message, _)| message.contains(words));
    assert!(about("this kernel has no RDMA devices") || about("no RDMA device has the name rf-none"), "{complaints:?}");
    // Where no policy allows a proxy for it, it needs none.
    std::fs::write(
        node.path("config.toml"),
        format!("{text}{device}nodes = [\"/dev/null\"]\n[policy.bounds]\nmodes = [\"passthrough\"]\n"),
    )
    .unwrap();
    assert_eq!(node.complaints("devices").iter().filter(|(status, ..)| status == "problem").count(), 0);
}

fn engines_that_are_asked_for_must_be_there() {
    if Path::new("/usr/bin/crio").exists() {
        skip("this machine has CRI-O");
    }
    let output = Node::new().doctor(&["--engine", "crio"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("PROBLEM  crio") && text.contains("it is not installed"), "{text}");
    assert!(!text.contains("podman"), "{text}");
    assert_eq!(output.status.code(), Some(1));
}
