//! What the real shim gets from `containerd-shim-ringfence-v2`, in the forms of containerd 1.6 to 2.3.

mod common;

use common::{Lab, RUNTIME, SHIM, assert_failed};
use ringfence_trials::tests;
use std::io::Write;
use std::process::{ExitCode, Stdio};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        every_call_reaches_the_real_shim_as_it_is,
        the_name_is_the_real_shims,
        the_links_lead_to_the_runtime,
        systemd_paths_mean_systemd_by_way_of_the_shim,
        the_configured_shim_comes_first,
        without_a_real_shim,
        without_links_nothing_starts_but_all_can_be_deleted,
        a_broken_configuration_does_not_stop_the_shim,
    ])
}

const REAL: &str = "containerd-shim-runc-v2";
/// Says what it was called with, and copies its input.
const RECORDER: &str = r#"#!/bin/sh
{ for argument in "$0" "$@"; do echo "argument $argument"; done; env; } >"$RECORD"
exec cat
"#;

/// A lab with a containerd, beside which the real shim is.
fn lab() -> (Lab, String) {
    let lab = Lab::new();
    let real = lab.script(REAL, RECORDER);
    let containerd = real.with_file_name("containerd").to_str().unwrap().to_owned();
    (lab, containerd)
}

fn every_call_reaches_the_real_shim_as_it_is() {
    let (lab, containerd) = lab();
    let publish = format!("-publish-binary={containerd}");
    let bundle = lab.path("bundle");
    let bundle = bundle.to_str().unwrap();
    let start =
        ["-namespace", "k8s.io", "-address", "/run/x.sock", "-publish-binary", &containerd, "-id", "c1", "start"];
    let debug =
        ["-namespace", "moby", "-address", "/x", "-publish-binary", &containerd, "-id", "c1", "-debug", "start"];
    let delete = ["-namespace", "k8s.io", &publish, "-id", "c1", "-bundle", bundle, "-debug", "delete"];
    for arguments in
        [&start[..], &debug, &delete, &["-v"], &["-info"], &["-publish-binary", "containerd", "-new", "start"]]
    {
        let mut child = lab.command(SHIM, arguments);
        child
            .env("PATH", format!("{}:/usr/bin:/bin", lab.path("fakes").display()))
            .env("TTRPC_ADDRESS", "/t")
            .env("MAX_SHIM_VERSION", "2");
        let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Options and bootstrap parameters are protocol buffers.
        let input: Vec<u8> = (0..=255).cycle().take(70_000).collect();
        let mut stdin = child.stdin.take().unwrap();
        let sent = input.clone();
        let writer = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(output.stderr.is_empty() && output.stdout == input, "{arguments:?}");

        let record = lab.record();
        let given: Vec<_> = record.iter().filter_map(|line| line.strip_prefix("argument ")).skip(1).collect();
        assert_eq!(given, arguments);
        let path = format!("PATH={}:{}:/usr/bin:/bin", lab.path("links").display(), lab.path("fakes").display());
        for expected in [path.as_str(), "RINGFENCE_SHIM=1", "TTRPC_ADDRESS=/t", "MAX_SHIM_VERSION=2"] {
            assert!(record.iter().any(|line| line == expected), "{expected} is not in {record:?}");
        }
        let directory = record.iter().find_map(|line| line.strip_prefix("PWD=")).unwrap();
        assert_eq!(directory, bundle);
    }
}

fn the_name_is_the_real_shims() {
    let lab = Lab::new();
    // A script is called by its interpreter's name; busybox shows its own.
    std::fs::copy("/bin/busybox", lab.path("fakes").join(REAL)).expect("busybox-static is installed");
    let output = lab.command(SHIM, &["-info"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "containerd-shim-runc-v2: applet not found\n");
}

fn the_links_lead_to_the_runtime() {
    let (lab, containerd) = lab();
    // What the real shim does with its PATH.
    lab.script(REAL, "#!/bin/sh\nexec runc create -b . c1\n");
    lab.fake("runc");
    let arguments = ["-publish-binary", &containerd, "-id", "c1", "start"];
    for _ in 0..2 {
        common::succeeded(&lab.command(SHIM, &arguments).output().unwrap());
        let record = lab.record();
        assert_eq!(record[0], format!("argument {}", lab.path("fakes/runc").display()));
        assert!(lab.has_hook());
        // The runtime's own children find no link of ours.
        let path = format!("PATH={}:/bin", lab.path("fakes").display());
        assert!(record.contains(&path), "{record:?}");
    }
}

fn systemd_paths_mean_systemd_by_way_of_the_shim() {
    let lab = Lab::new();
    let flags = |shim: bool, arguments: &[&str], path: &str| {
        lab.edit(|config| {
            config["annotations"] = serde_json::json!({});
            config["linux"]["cgroupsPath"] = path.into();
        });
        lab.fake("runc");
        let mut command = lab.command(RUNTIME, arguments);
        if shim {
            command.env("RINGFENCE_SHIM", "1");
        }
        common::succeeded(&command.output().unwrap());
        let record = lab.record();
        let given: Vec<_> = record.iter().filter_map(|line| line.strip_prefix("argument ")).skip(1).collect();
        given.join(" ")
    };
    let path = "kubepods-pod1.slice:cri-containerd:c1";
    assert_eq!(flags(true, &["--root", "/r", "create", "c1"], path), "--root /r --systemd-cgroup create c1");
    assert_eq!(flags(true, &["create", "c1"], "/kubepods/pod1/c1"), "create c1");
    assert_eq!(flags(true, &["--systemd-cgroup", "create", "c1"], path), "--systemd-cgroup create c1");
    assert_eq!(flags(true, &["--cgroup-manager=cgroupfs", "run", "c1"], path), "--cgroup-manager=cgroupfs run c1");
    assert_eq!(flags(true, &["delete", "c1"], path), "delete c1");
    assert_eq!(flags(false, &["create", "c1"], path), "create c1");
}

fn the_configured_shim_comes_first() {
    let (lab, containerd) = lab();
    let other = lab.script("other-shim", RECORDER);
    let configured = |real: &std::path::Path| {
        let text = lab.configuration("").replace("[shim]\n", &format!("[shim]\nreal = \"{}\"\n", real.display()));
        std::fs::write(lab.path("config.toml"), text).unwrap();
    };
    configured(&other);
    let arguments = ["-publish-binary", &containerd, "-id", "c1", "start"];
    common::succeeded(&lab.command(SHIM, &arguments).output().unwrap());
    assert_eq!(lab.record()[0], format!("argument {}", other.display()));
    for wrong in [SHIM.into(), lab.path("nothing")] {
        configured(&wrong);
        let output = lab.command(SHIM, &arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), text.lines().count()), (Some(1), 1));
        let expected = format!(
            "containerd-shim-ringfence-v2: E11 no containerd shim found: looked for {} with PATH=",
            wrong.display()
        );
        assert!(text.starts_with(&expected) && text.contains("[shim] real must name a"), "{text}");
    }
}

fn without_a_real_shim() {
    let lab = Lab::new();
    let arguments = ["-publish-binary", "/nowhere/containerd", "-id", "c1", "start"];
    let message = format!(
        "containerd-shim-ringfence-v2: E11 no containerd shim found: looked for /nowhere/{REAL}, {REAL} with PATH={}; \
         [shim] real must name a {REAL}",
        lab.path("fakes").display()
    );
    let mut command = lab.command(SHIM, &arguments);
    command.env("PATH", lab.path("fakes"));
    assert_failed(&command.output().unwrap(), &message);
    // Neither is our own, by whatever name.
    std::os::unix::fs::symlink(SHIM, lab.path("fakes").join(REAL)).unwrap();
    assert_failed(&command.output().unwrap(), &message);
}

fn without_links_nothing_starts_but_all_can_be_deleted() {
    let (lab, containerd) = lab();
    std::fs::remove_file(lab.path("links/runc")).unwrap();
    let arguments = ["-publish-binary", &containerd, "-id", "c1", "start"];
    let message = format!(
        "containerd-shim-ringfence-v2: E11 {}: No such file or directory (os error 2); \
         it must be a link to ringfence-runtime, or [shim] links must name its directory",
        lab.path("links/runc").display()
    );
    assert_failed(&lab.command(SHIM, &arguments).output().unwrap(), &message);
    for arguments in [&["-publish-binary", &containerd, "-id", "c1", "delete"][..], &["-v"], &["-info"]] {
        common::succeeded(&lab.command(SHIM, arguments).output().unwrap());
        lab.record();
    }
}

fn a_broken_configuration_does_not_stop_the_shim() {
    let (lab, containerd) = lab();
    for broken in ["typo = 1\n".to_owned() + &lab.configuration(""), "[runtime\n".to_owned()] {
        std::fs::write(lab.path("config.toml"), broken).unwrap();
        // The links of the default configuration are of no concern to `delete`.
        common::succeeded(
            &lab.command(SHIM, &["-publish-binary", &containerd, "-id", "c1", "delete"]).output().unwrap(),
        );
        lab.record();
    }
}
