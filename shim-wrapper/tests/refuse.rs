//! What `ringfence-runtime` refuses: the message, where it is told, and that nothing was done.

mod common;

use common::{Lab, RUNTIME, assert_failed};
use ringfence_trials::{needs_root, tests};
use serde_json::{Value, json};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        annotations_and_bounds,
        configurations_of_the_container,
        configurations_of_the_administrator,
        restoring_from_a_checkpoint,
        configurations_that_do_not_end,
        a_policy_without_a_name,
        the_runtimes_log,
        no_runtime,
        a_copy_of_ourselves,
        a_bundle_that_is_read_only,
        a_bundle_without_room,
    ])
}

const CREATE: [&str; 2] = ["create", "c1"];

fn annotations_and_bounds() {
    let lab = Lab::new();
    for (annotations, message) in [
        (
            json!({"ringfence.dev/enable": "on"}),
            r#"E12 annotation ringfence.dev/enable="on" is malformed; allowed is true, 1, yes, false, 0 or no"#,
        ),
        (
            json!({"ringfence.dev/enable": "true", "ringfence.dev/device": "mlx5_9"}),
            "E14 ringfence.dev/device=mlx5_9 is not configured; there is soft0",
        ),
        (
            json!({"ringfence.dev/enable": "true", "ringfence.dev/mode": "passthrough"}),
            "E13 ringfence.dev/mode=passthrough is beyond the administrator's bound; allowed is proxied",
        ),
    ] {
        lab.edit(|config| config["annotations"] = annotations);
        for line in [CREATE, ["run", "c1"]] {
            lab.refused(&line, message);
        }
    }
}

fn configurations_of_the_container() {
    let lab = Lab::new();
    let path = lab.path("bundle/config.json");
    let shown = path.display();
    let ours = r#""process":{},"annotations":{"ringfence.dev/enable":"true"}"#;
    for (text, problem) in [
        (format!("{{{ours}"), "is not a valid OCI configuration: EOF while parsing an object at line 1 column 59"),
        (
            format!("{{{ours},\"hooks\":[]}}"),
            "is not a valid OCI configuration: hooks is no object; the engine that wrote it must make it one",
        ),
        // Some runtimes would run our hook then, and others not.
        (
            format!("{{{ours},\"annotations\":{{}}}}"),
            "is not a valid OCI configuration: annotations is there twice; the engine that wrote it must give it once",
        ),
        (
            format!("{{{ours},\"hooks\":{{}},\"Hooks\":{{}}}}"),
            "is not a valid OCI configuration: hooks is there twice; the engine that wrote it must give it once",
        ),
        (
            format!("{{{ours},\"hooks\":{{\"poststop\":[],\"poststop\":[]}}}}"),
            "is not a valid OCI configuration: hooks.poststop is there twice; the engine that wrote it must give it once",
        ),
        (
            format!("{{{ours},\"hooks\":{{\"poststop\":{{}}}}}}"),
            "is not a valid OCI configuration: hooks.poststop is no array; the engine that wrote it must make it one",
        ),
        (
            r#"{"process":{},"annotations":{"ringfence.dev/enable":true}}"#.to_owned(),
            "is not a valid OCI configuration: annotations is no object of strings; the engine that wrote it must make it one",
        ),
    ] {
        std::fs::write(&path, text).unwrap();
        lab.refused(&CREATE, &format!("E10 {shown} {problem}"));
    }
    std::fs::write(&path, [format!("{{{ours},\"x\":\"").as_bytes(), b"\xff\"}"].concat()).unwrap();
    lab.refused(&CREATE, &format!("E10 {shown} is not UTF-8"));
    // Also where only the very end of it says that it is ours.
    for length in [4 << 20, (4 << 20) - 200, 8 << 20] {
        std::fs::write(&path, format!("{{\"x\":\"{}\",{ours}}}", "x".repeat(length))).unwrap();
        if length >= 4 << 20 {
            lab.refused(&CREATE, &format!("E10 {shown} exceeds 4194304 bytes; make it shorter"));
        } else {
            lab.recorded(&CREATE);
            assert!(lab.has_hook());
        }
    }
    std::fs::write(&path, "{}}").unwrap();
    lab.refused(
        &["--ringfence-policy", "default", "create", "c1"],
        &format!("E10 {shown} is not a valid OCI configuration: trailing characters at line 1 column 3"),
    );
}

fn configurations_of_the_administrator() {
    let lab = Lab::new();
    let path = lab.path("config.toml");
    std::fs::write(&path, "\nrun-dri = \"/run\"\n").unwrap();
    lab.fake("runc");
    let output = lab.command(RUNTIME, &CREATE).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    let expected =
        format!("ringfence-runtime: E11 configuration {}: line 2: unknown field `run-dri`, ", path.display());
    assert!(text.starts_with(&expected) && text.lines().count() == 1, "{text}");
    assert_eq!((output.status.code(), lab.path("record").exists()), (Some(1), false));
    std::fs::remove_file(&path).unwrap();
    lab.refused(&CREATE, &format!("E11 configuration {}: No such file or directory (os error 2)", path.display()));
}

fn restoring_from_a_checkpoint() {
    Lab::new().refused(
        &["restore", "c1"],
        "E13 a container with RDMA cannot be restored: its connections and memory registrations are in no checkpoint; \
         start it anew, or restore it with ringfence.dev/enable=false",
    );
}

/// Neither is waited for, nor read to its end; without a policy the real runtime may say what it thinks of them.
fn configurations_that_do_not_end() {
    let lab = Lab::new();
    let path = lab.path("bundle/config.json");
    let policy = ["--ringfence-policy", "default", "create", "c1"];
    let fails = |problem: &str| {
        lab.fake("runc");
        let output = lab.command(RUNTIME, &policy).output().unwrap();
        assert_failed(&output, &format!("ringfence-runtime: E10 {problem}\n"));
    };
    std::fs::remove_file(&path).unwrap();
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    lab.recorded(&CREATE);
    fails(&format!("{} is no regular file; the bundle must hold one", path.display()));
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    lab.recorded(&CREATE);
    fails("/dev/zero is no regular file; the bundle must hold one");
    std::fs::remove_file(&path).unwrap();
    std::fs::File::create(&path).unwrap().set_len(8 << 40).unwrap();
    let begin = std::time::Instant::now();
    lab.recorded(&CREATE);
    assert!(begin.elapsed() < std::time::Duration::from_secs(10));
    fails(&format!("{} exceeds 4194304 bytes; make it shorter", path.display()));
}

fn a_policy_without_a_name() {
    let lab = Lab::new();
    // What runs must be stoppable, whatever became of the engine's configuration.
    for line in [["--ringfence-policy=", "kill", "c1"], ["--ringfence-policy=", "delete", "c1"]] {
        lab.recorded(&line);
    }
    lab.refused(
        &["--ringfence-policy=", "create", "c1"],
        "E2 --ringfence-policy \"\" is no profile's name; give it one of the administrator's profiles, or default",
    );
}

/// The engine reads the last line of the file to tell its user.
fn the_runtimes_log() {
    let lab = Lab::new();
    lab.edit(|config| config["annotations"] = json!({"ringfence.dev/enable": "\"on\""}));
    let message =
        r#"E12 annotation ringfence.dev/enable="\"on\"" is malformed; allowed is true, 1, yes, false, 0 or no"#;
    let log = lab.path("log");
    let name = log.to_str().unwrap();
    let (equals, crun) = (format!("--log={name}"), format!("file:{name}"));
    for line in [
        &["--log", name, "--log-format", "json", "create", "c1"][..],
        &[&equals, "--log-format=json", "create", "c1"],
        &["--log", &crun, "--log-format=json", "create", "c1"],
    ] {
        std::fs::write(&log, "{\"level\":\"info\"}\n").unwrap();
        lab.refused(line, message);
        let text = std::fs::read_to_string(&log).unwrap();
        let [first, last] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text}") };
        assert_eq!(first, "{\"level\":\"info\"}");
        let last: Value = serde_json::from_str(last).unwrap();
        assert_eq!((&last["level"], &last["msg"]), (&json!("error"), &json!(format!("ringfence-runtime: {message}"))));
        let time = last["time"].as_str().unwrap();
        assert!(time.len() == 20 && time.starts_with("20") && time.ends_with('Z'), "{time}");
    }
    std::fs::remove_file(&log).unwrap();
    lab.refused(&["--log", name, "create", "c1"], message);
    let text = std::fs::read_to_string(&log).unwrap();
    let expected = format!("level=error msg={}\n", Value::from(format!("ringfence-runtime: {message}")));
    assert!(text.starts_with("time=\"20") && text.ends_with(&expected), "{text}");
    // A log that cannot be written takes nothing from what the user sees.
    lab.refused(&["--log", "/nowhere/log", "create", "c1"], message);
}

/// With only these directories to find programs in.
#[track_caller]
fn not_found(lab: &Lab, directories: &[&str], looked_for: &str) {
    let paths: Vec<_> = directories.iter().map(|name| lab.path(name)).collect();
    let mut path = vec![lab.path("links")];
    path.extend(paths.iter().cloned());
    let before = lab.text();
    let output = lab.command(RUNTIME, &CREATE).env("PATH", std::env::join_paths(path).unwrap()).output().unwrap();
    let message = format!(
        "ringfence-runtime: E11 no OCI runtime found: looked for {looked_for} in {}; \
         install one, or name it in [runtime] runtimes of {}\n",
        std::env::join_paths(paths).unwrap().display(),
        lab.path("config.toml").display()
    );
    assert_failed(&output, &message);
    assert_eq!(lab.text(), before);
}

fn no_runtime() {
    let lab = Lab::new();
    not_found(&lab, &[], "runc, crun");
    not_found(&lab, &["fakes"], "runc, crun");
    // A link in PATH, a hard link, and the configuration: all ourselves.
    std::os::unix::fs::symlink(RUNTIME, lab.path("fakes/runc")).unwrap();
    std::fs::hard_link(RUNTIME, lab.path("fakes/crun")).unwrap();
    not_found(&lab, &["fakes"], "runc, crun");
    lab.configure(&format!("[runtime]\nruntimes = [\"{RUNTIME}\", \"youki\"]"));
    not_found(&lab, &["fakes"], &format!("{RUNTIME} (which is ringfence-runtime itself), youki"));
}

fn a_copy_of_ourselves() {
    let lab = Lab::new();
    std::fs::copy(RUNTIME, lab.path("fakes/runc")).unwrap();
    std::fs::create_dir(lab.path("more")).unwrap();
    std::fs::copy(RUNTIME, lab.path("more/runc")).unwrap();
    let path = std::env::join_paths([lab.path("fakes"), lab.path("more")]).unwrap();
    let output = lab.command(RUNTIME, &["--version"]).env("PATH", path).output().unwrap();
    let message = format!(
        "ringfence-runtime: E11 the OCI runtime that it becomes is again ringfence-runtime, 8 times over; \
         name the real one in [runtime] runtimes of {}\n",
        lab.path("config.toml").display()
    );
    assert_failed(&output, &message);
}

/// The bundle on a tmpfs that `options` make unusable.
#[track_caller]
fn unwritable(options: &str, fill: &str, problem: &str) {
    needs_root("it mounts");
    let lab = Lab::new();
    lab.fake("runc");
    let before = lab.text();
    let script = format!(
        "cp config.json .. && mount -t tmpfs -o size=64k tmpfs \"$1\" && cd \"$1\" && cp ../config.json . && {fill} && \
         mount -o remount,{options} \"$1\" && {{ \"$0\" create c1; code=$?; cmp config.json ../config.json && ls -A >../left; exit $code; }}"
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script, RUNTIME]).arg(lab.path("bundle"));
    command.env("RINGFENCE_CONFIG", lab.path("config.toml")).env("RECORD", lab.path("record"));
    command.env("PATH", format!("{}:{}", lab.path("fakes").display(), std::env::var("PATH").unwrap()));
    let output = command.current_dir(lab.path("bundle")).output().unwrap();
    let path = lab.path("bundle/config.json");
    assert_failed(&output, &format!("ringfence-runtime: E10 cannot add the hook to {}: {problem}\n", path.display()));
    assert!(!lab.path("record").exists());
    assert_eq!(lab.text(), before);
    let left = std::fs::read_to_string(lab.path("left")).unwrap();
    assert!(left.lines().all(|name| name == "config.json" || name == "filling"), "{left}");
}

fn a_bundle_that_is_read_only() {
    unwritable("ro", "true", "Read-only file system (os error 30); the bundle must be writable");
}

fn a_bundle_without_room() {
    let fill = "{ head -c 1M /dev/zero >filling 2>/dev/null || true; }";
    unwritable("rw", fill, "No space left on device (os error 28); make room in its file system");
}
