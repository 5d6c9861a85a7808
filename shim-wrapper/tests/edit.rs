//! What `ringfence-runtime` does to `config.json`, and what the real runtime gets.

mod common;

use common::{Lab, RUNTIME, succeeded};
use ringfence_trials::tests;
use serde_json::json;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::{ExitCode, Stdio};
use std::time::Instant;

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        the_bundle_is_found_in_every_form,
        the_hook_is_called_with_an_environment_of_its_own,
        the_rest_of_the_file_stays_as_it_was_written,
        owner_mode_and_link_stay,
        containers_that_are_not_ours,
        a_policy_of_the_engine,
        runtimes_are_found_by_the_name_that_the_engine_uses,
        a_mistake_elsewhere_does_not_change_the_runtime,
        the_file_is_whole_whenever_we_are_killed,
        one_bundle_at_many_times,
        depth_does_not_matter,
        signals_and_descriptors_are_the_callers,
    ])
}

/// The arguments that the real runtime got, without its name.
fn arguments(record: &[String]) -> Vec<&str> {
    record.iter().filter_map(|line| line.strip_prefix("argument ")).skip(1).collect()
}

fn the_bundle_is_found_in_every_form() {
    let lab = Lab::new();
    let before = lab.text();
    let bundle = lab.path("bundle");
    let bundle = bundle.to_str().unwrap();
    let (long, short, go) = (format!("--bundle={bundle}"), format!("-b={bundle}"), format!("-b{bundle}"));
    for line in [
        &["create", "--bundle", bundle, "c1"][..],
        &["create", &long, "c1"],
        &["create", "-b", bundle, "c1"],
        &["create", &short, "c1"],
        &["run", &go, "c1"],
        &["create", "-b", "../bundle", "c1"],
        &["create", "c1"],
        &["run", "c1"],
        // conmon, containerd 1.6 and 2.x, buildkit.
        &[
            "--systemd-cgroup",
            "--log-format=json",
            "--log",
            "/dev/null",
            "create",
            "--bundle",
            bundle,
            "--pid-file",
            "/p",
            "c1",
        ],
        &[
            "--root",
            "/r",
            "--log",
            "/dev/null",
            "--log-format",
            "json",
            "create",
            "--bundle",
            bundle,
            "--console-socket",
            "/s",
            "c1",
        ],
        &["--log", "/dev/null", "--log-format", "json", "run", "--bundle", bundle, "--keep", "c1"],
        &["--never-heard-of", "x", "create", "--neither", "-b", bundle, "c1"],
    ] {
        std::fs::write(lab.path("bundle/config.json"), &before).unwrap();
        assert_eq!(arguments(&lab.recorded(line)), line);
        assert!(lab.has_hook(), "{line:?}");
    }
}

fn the_hook_is_called_with_an_environment_of_its_own() {
    let lab = Lab::new();
    lab.recorded(&["create", "c1"]);
    let env = json!([
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
        format!("RINGFENCE_CONFIG={}", lab.path("config.toml").display())
    ]);
    let path = std::path::Path::new(RUNTIME).with_file_name("ringfence-hook");
    let entry = |stage: &str| json!([{"path": path, "args": ["ringfence-hook", stage], "env": env, "timeout": 20}]);
    assert_eq!(lab.value()["hooks"], json!({"createRuntime": entry("createRuntime"), "poststop": entry("poststop")}));
}

fn the_rest_of_the_file_stays_as_it_was_written() {
    let lab = Lab::new();
    let before = r#"{
  "ociVersion": "1.0.2", "process" : {"args":["\u0061"],"rlimits":[{"hard":18446744073709551616e10}]},
  "annotations": {"ringfence.dev\/enable": "true", "ä": "\ud83d\ude00"},
  "linux": {"resources": {"memory": {"limit": 9223372036854775808.50}}, "new": [1, 2 ,3]}
}
"#;
    std::fs::write(lab.path("bundle/config.json"), before).unwrap();
    lab.recorded(&["create", "c1"]);
    let after = String::from_utf8(lab.text()).unwrap();
    for kept in [
        r#""ociVersion":"1.0.2","process":{"args":["\u0061"],"rlimits":[{"hard":18446744073709551616e10}]},"annotations":"#,
        r#"{"ringfence.dev\/enable": "true", "ä": "\ud83d\ude00"}"#,
        r#""linux":{"resources": {"memory": {"limit": 9223372036854775808.50}}, "new": [1, 2 ,3]}"#,
    ] {
        assert!(after.contains(kept), "{kept}\nis not in\n{after}");
    }
    lab.recorded(&["create", "c1"]);
    assert_eq!(String::from_utf8(lab.text()).unwrap(), after);
}

fn owner_mode_and_link_stay() {
    let lab = Lab::new();
    let (config, elsewhere) = (lab.path("bundle/config.json"), lab.path("elsewhere.json"));
    std::fs::rename(&config, &elsewhere).unwrap();
    symlink(&elsewhere, &config).unwrap();
    std::fs::set_permissions(&elsewhere, std::fs::Permissions::from_mode(0o640)).unwrap();
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&elsewhere, Some(1234), Some(5678)).unwrap();
    }
    let before = elsewhere.metadata().unwrap();
    lab.recorded(&["create", "c1"]);
    assert!(lab.has_hook() && config.symlink_metadata().unwrap().is_symlink());
    let after = elsewhere.metadata().unwrap();
    assert_eq!((after.mode(), after.uid(), after.gid()), (before.mode(), before.uid(), before.gid()));
    assert_ne!(after.ino(), before.ino());
}

/// The file is not even written anew.
#[track_caller]
fn untouched(lab: &Lab, line: &[&str]) {
    let path = lab.path("bundle/config.json");
    let facts = || path.metadata().map(|found| (found.ino(), found.mtime_nsec(), found.ctime_nsec())).ok();
    let (before, text) = (facts(), std::fs::read(&path).ok());
    assert_eq!(arguments(&lab.recorded(line)), line);
    assert_eq!((facts(), std::fs::read(&path).ok()), (before, text), "{line:?}");
    assert_eq!(std::fs::read_dir(lab.path("bundle")).unwrap().count(), 1 + usize::from(path.exists()));
}

fn containers_that_are_not_ours() {
    let lab = Lab::new();
    for line in
        [&["start", "c1"][..], &["delete", "c1"], &["exec", "c1", "create"], &["create", "--help"], &["spec"], &[]]
    {
        untouched(&lab, line);
    }
    let create = ["create", "c1"];
    for annotations in [
        json!(null),
        json!({}),
        json!({"other": "x"}),
        json!({"ringfence.dev/enable": "false", "ringfence.dev/typo": "x"}),
        json!({"ringfence.dev/enable": "true", "io.kubernetes.cri.container-type": "sandbox"}),
        json!({"ringfence.dev/enable": "true", "io.kubernetes.cri-o.ContainerType": "sandbox"}),
    ] {
        lab.edit(|config| config["annotations"] = annotations);
        untouched(&lab, &create);
    }
    lab.edit(|config| drop(config.as_object_mut().unwrap().remove("process")));
    untouched(&lab, &create);
    lab.edit(|config| config["process"] = json!(null));
    untouched(&lab, &create);
    lab.edit(|config| drop(config.as_object_mut().unwrap().remove("annotations")));
    untouched(&lab, &create);
    untouched(&lab, &["restore", "c1"]);
    // Whatever is wrong with the administrator's configuration.
    for broken in ["typo = 1\n", "[runtime\n", "[policy.bounds]\nmax-qp = 0\n"] {
        std::fs::write(lab.path("config.toml"), broken).unwrap();
        untouched(&lab, &create);
    }
    std::fs::remove_file(lab.path("config.toml")).unwrap();
    untouched(&lab, &create);
    // Or with the container's own, which the real runtime is to judge.
    for text in [&b""[..], b"null", b"[]", b"{", b"{\"a\":\"\xff\"}", b"{} {}", br#"{"annotations":{"a":1}}"#] {
        std::fs::write(lab.path("bundle/config.json"), text).unwrap();
        untouched(&lab, &create);
    }
    std::fs::write(lab.path("bundle/config.json"), format!(r#"{{"x":"{}"}}"#, "x".repeat(9 << 20))).unwrap();
    untouched(&lab, &create);
    std::fs::remove_file(lab.path("bundle/config.json")).unwrap();
    untouched(&lab, &create);
}

fn a_policy_of_the_engine() {
    let lab = Lab::new();
    lab.edit(|config| config["annotations"] = json!(null));
    for line in [
        &["--ringfence-policy", "default", "--root", "/r", "create", "c1"],
        &["--root", "/r", "--ringfence-policy=default", "create", "c1"][..],
    ] {
        lab.edit(|config| config["annotations"] = json!(null));
        assert_eq!(arguments(&lab.recorded(line)), ["--root", "/r", "create", "c1"]);
        let expected = json!(["ringfence-hook", "createRuntime", "--policy", "default"]);
        assert_eq!(lab.value()["hooks"]["createRuntime"][0]["args"], expected);
    }
    // The other verbs are called with it, too.
    assert_eq!(arguments(&lab.recorded(&["--ringfence-policy", "default", "state", "c1"])), ["state", "c1"]);
    lab.edit(|config| config["annotations"] = json!({"ringfence.dev/enable": "false"}));
    lab.recorded(&["--ringfence-policy", "default", "create", "c1"]);
    assert!(!lab.has_hook());
}

fn runtimes_are_found_by_the_name_that_the_engine_uses() {
    let lab = Lab::new();
    let (runc, crun) = (lab.fake("runc"), lab.fake("crun"));
    let youki = lab.fake("youki");
    let became = |lab: &Lab, program: &std::path::Path| {
        succeeded(&lab.command(program, &["--version"]).output().unwrap());
        lab.record()[0].strip_prefix("argument ").unwrap().to_owned()
    };
    assert_eq!(became(&lab, RUNTIME.as_ref()), runc.to_str().unwrap());
    for link in ["runc", "crun"] {
        assert_eq!(became(&lab, &lab.path("links").join(link)), lab.path("fakes").join(link).to_str().unwrap());
    }
    lab.configure("[runtime]\nruntimes = [\"missing\", \"/nowhere/runc\", \"youki\", \"runc\"]");
    assert_eq!(became(&lab, RUNTIME.as_ref()), youki.to_str().unwrap());
    assert_eq!(became(&lab, &lab.path("links/crun")), crun.to_str().unwrap());
}

/// Who was made by one runtime cannot be stopped by another.
fn a_mistake_elsewhere_does_not_change_the_runtime() {
    let lab = Lab::new();
    lab.fake("runc");
    let youki = lab.fake("youki");
    lab.configure("[runtime]\nruntimes = [\"youki\"]");
    std::fs::create_dir(lab.path("conf.d")).unwrap();
    for mistake in ["[policy.bounds]\nweight = \"heavy\"\n", "[policy", "[runtime]\nruntimes = 7\n"] {
        std::fs::write(lab.path("conf.d/10.toml"), mistake).unwrap();
        succeeded(&lab.command(RUNTIME, &["kill", "c1"]).output().unwrap());
        assert_eq!(lab.record()[0], format!("argument {}", youki.display()), "{mistake}");
    }
}

fn the_file_is_whole_whenever_we_are_killed() {
    let lab = Lab::new();
    lab.script("runc", "#!/bin/sh\nexit 0\n");
    // Long enough to be written for a while.
    lab.edit(|config| config["annotations"]["x"] = "y".repeat(2 << 20).into());
    let before = lab.text();
    let start = Instant::now();
    succeeded(&lab.command(RUNTIME, &["create", "c1"]).output().unwrap());
    let whole = start.elapsed();
    let (mut edited, mut not_yet) = (0, 0);
    for i in 0..200 {
        std::fs::write(lab.path("bundle/config.json"), &before).unwrap();
        let mut child = lab.command(RUNTIME, &["create", "c1"]).spawn().unwrap();
        std::thread::sleep(whole * 2 * i / 200);
        let _ = child.kill();
        child.wait().unwrap();
        if lab.text() == before {
            not_yet += 1;
        } else {
            assert!(lab.has_hook());
            edited += 1;
        }
    }
    assert!(edited > 0 && not_yet > 0, "{edited} edited, {not_yet} not");
}

fn one_bundle_at_many_times() {
    let lab = Lab::new();
    lab.script("runc", "#!/bin/sh\nexit 0\n");
    let children: Vec<_> =
        (0..32).map(|_| lab.command(RUNTIME, &["create", "c1"]).stderr(Stdio::piped()).spawn().unwrap()).collect();
    for child in children {
        succeeded(&child.wait_with_output().unwrap());
    }
    assert_eq!(lab.value()["hooks"]["createRuntime"].as_array().unwrap().len(), 1);
    lab.assert_tidy();
}

fn depth_does_not_matter() {
    let lab = Lab::new();
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    let text = format!(r#"{{"process":{{}},"annotations":{{"ringfence.dev/enable":"1"}},"x":{deep}}}"#);
    std::fs::write(lab.path("bundle/config.json"), text).unwrap();
    lab.recorded(&["create", "c1"]);
    let after = String::from_utf8(lab.text()).unwrap();
    assert!(after.contains(&deep) && after.contains("createRuntime"));
}

fn signals_and_descriptors_are_the_callers() {
    let lab = Lab::new();
    lab.script("runc", "#!/bin/sh\ngrep -E '^Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd | tr '\\n' ' '; cat\n");
    let status = |program: &std::ffi::OsStr| {
        let mut shell = lab.command("/bin/sh", &["-c", "echo input | \"$0\" create c1 5</dev/null"]);
        succeeded(&shell.arg(program).output().unwrap())
    };
    let fake = lab.path("fakes/runc");
    assert_eq!(status(RUNTIME.as_ref()), status(fake.as_os_str()));
}
