//! The node /dev/userfaultfd in containers.

mod common;

use common::{succeeded, with_lab};
use ringfence_trials::{needs_root, skip, tests};
use serde_json::json;
use std::path::Path;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        everybody_may_open_it,
        it_is_the_administrators_to_give,
        with_cgroup_version_2,
        with_cgroup_version_2_by_crun,
    ])
}

/// A script that says whether userfaultfd can be opened, and what its mode is.
const USERFAULTFD: &str =
    "(exec 3<>/dev/userfaultfd) && echo opened; ls -l /dev/userfaultfd | /bin/busybox cut -c 1-10";

fn needs_userfaultfd() {
    if !Path::new("/dev/userfaultfd").exists() {
        skip("this kernel has no /dev/userfaultfd; Linux 6.1 and later have");
    }
}

fn everybody_may_open_it() {
    needs_userfaultfd();
    for user in [0, 1000] {
        with_lab(|lab| {
            lab.edit(|config| {
                config["process"]["user"] = json!({"uid": user, "gid": user});
                config["process"]["capabilities"] = json!({});
            });
            lab.script(USERFAULTFD);
            assert_eq!(lab.output(), "opened\ncrw-rw-rw-\n", "{user}");
            assert_eq!(succeeded(&lab.crun(&["run", &lab.id])), "opened\ncrw-rw-rw-\n", "crun, {user}");
            // As an engine gives it who was asked for it: for root, and with its own rule.
            lab.edit(|config| {
                let found = rustix::fs::stat("/dev/userfaultfd").unwrap().st_rdev;
                let (major, minor) = (rustix::fs::major(found), rustix::fs::minor(found));
                config["linux"]["devices"] =
                    json!([{"path": "/dev/userfaultfd", "type": "c", "major": major, "minor": minor, "fileMode": 0o600}]);
                let rule = json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"});
                config["linux"]["resources"]["devices"].as_array_mut().unwrap().push(rule);
            });
            assert_eq!(lab.output(), "opened\ncrw-rw-rw-\n", "with a node of the engine's, {user}");
        });
    }
}

fn it_is_the_administrators_to_give() {
    with_lab(|lab| {
        lab.configure("ready", "userfaultfd = false");
        lab.script("ls /dev/userfaultfd 2>/dev/null; true");
        assert_eq!(lab.output(), "");
    });
}

fn with_cgroup_version_2() {
    with_version_2("runc");
}

fn with_cgroup_version_2_by_crun() {
    with_version_2("crun");
}

fn with_version_2(runtime: &str) {
    needs_root("it mounts cgroups");
    needs_userfaultfd();
    if Command::new(runtime).arg("--version").output().is_err() {
        skip(format!("{runtime} is not installed"));
    }
    with_lab(|lab| {
        lab.script(USERFAULTFD);
        lab.write_config();
        // crun leaves the cgroup when it cannot attach programs.
        let script = format!(
            "umount -l /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && \
             {{ {runtime} --root state run \"$0\"; status=$?; rmdir \"/sys/fs/cgroup/$0\" 2>/dev/null; exit $status; }}"
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &script, &lab.id]);
        let output = command.current_dir(lab.path("")).stdin(std::process::Stdio::null()).output().unwrap();
        if String::from_utf8_lossy(&output.stderr).contains("RLIM_MEMLOCK") {
            skip("crun may not lift the limit for locked memory here, and cannot attach programs to cgroups");
        }
        assert_eq!(succeeded(&output), "opened\ncrw-rw-rw-\n");
    });
}
