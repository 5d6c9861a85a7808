//! What containers see in `/sys/class` and `/dev/infiniband`.

mod common;

use common::{Lab, succeeded, with_lab};
use ringfence_trials::{skip, tests};
use serde_json::{Value, json};
use std::fs::read_to_string;
use std::process::{Command, ExitCode, Stdio};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        a_device_is_shown,
        a_device_is_shown_by_crun,
        other_classes_are_as_without_it,
        what_comes_later_is_seen,
        nobody_writes_or_opens,
        it_is_the_administrators_to_give,
        containers_that_are_not_ours_are_left_alone,
        nodes_of_other_devices_are_hidden,
        a_read_only_root_is_no_obstacle,
        a_user_namespace_is_no_obstacle,
        a_container_without_sys_starts,
        a_volume_at_sys_is_left_alone,
        a_shared_sys_is_left_alone,
        volumes_below_stay,
    ])
}

/// Lists what the stand-in for the proxy shows.
const LOOK: &str = "ls -d /sys/class/infiniband/* /sys/class/infiniband_verbs; ls /dev/infiniband";
const SEEN: &str = "/sys/class/infiniband/fake0\n/sys/class/infiniband_verbs\n";
const WITH_NODE: &str = "uverbs = \"always\"";

fn a_device_is_shown() {
    with_lab(|lab| {
        lab.script(LOOK);
        assert_eq!(lab.output(), SEEN);
        lab.configure("ready", WITH_NODE);
        assert_eq!(lab.output(), format!("{SEEN}uverbs0\n"));
    });
}

fn a_device_is_shown_by_crun() {
    with_lab(|lab| {
        lab.configure("ready", WITH_NODE);
        lab.script(LOOK);
        assert_eq!(succeeded(&lab.crun(&["run", &lab.id])), format!("{SEEN}uverbs0\n"));
    });
}

/// Every name of every class, and where it leads; without InfiniBand's.
fn other_classes(lab: &mut Lab, more: &str) -> Vec<String> {
    lab.configure("ready", more);
    // Times are those of the looking.
    lab.script("cd /sys/class && for class in *; do for name in $class $class/*; do echo $name $(readlink -f $name); done; done");
    let output = lab.output();
    output.lines().filter(|line| !line.starts_with("infiniband")).map(str::to_owned).collect()
}

fn other_classes_are_as_without_it() {
    with_lab(|lab| {
        link(lab, "readlink");
        let without = other_classes(lab, "sysfs = false");
        assert!(without.len() > 20, "{without:?}");
        assert!(without.iter().any(|line| line == "net/lo /sys/devices/virtual/net/lo"), "{without:?}");
        assert_eq!(other_classes(lab, ""), without);
    });
}

/// Another of busybox's programs in the lab's containers.
fn link(lab: &mut Lab, applet: &str) {
    std::os::unix::fs::symlink("busybox", lab.path("rootfs/bin").join(applet)).unwrap();
    lab.expect_rootfs_as_is();
}

/// An overlay would remember that it was not there.
fn what_comes_later_is_seen() {
    with_lab(|lab| {
        lab.script("sleep 60");
        lab.create();
        let pid = state(lab)["pid"].to_string();
        let path = format!("/proc/{pid}/root/sys/class/net/late/mtu");
        assert!(read_to_string(&path).is_err());
        let mut command = Command::new("nsenter");
        command.args(["--target", &pid, "--net", "ip", "link", "add", "late", "mtu", "1234"]);
        let made = command.args(["type", "veth", "peer", "name", "later"]).output().unwrap();
        let read = read_to_string(&path);
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
        if !made.status.success() {
            skip(format!("no veth can be made: {}", String::from_utf8_lossy(&made.stderr).trim()));
        }
        assert_eq!(read.unwrap(), "1234\n");
    });
}

fn state(lab: &Lab) -> Value {
    serde_json::from_str(&succeeded(&lab.runc(&["state", &lab.id]))).unwrap()
}

fn nobody_writes_or_opens() {
    with_lab(|lab| {
        lab.configure("ready", WITH_NODE);
        lab.script(
            "(: >/sys/class/infiniband/x) 2>/dev/null || echo read-only; (: >/sys/class/x) 2>/dev/null || echo read-only; \
             (exec 3</dev/infiniband/uverbs0) 2>/dev/null || echo closed; (: >/dev/infiniband/x) 2>/dev/null || echo read-only; \
             [ -c /dev/infiniband/uverbs0 ] && [ -r /dev/infiniband/uverbs0 ] && [ -w /dev/infiniband/uverbs0 ] && echo promised",
        );
        let expected = "read-only\nread-only\nclosed\nread-only\npromised\n";
        assert_eq!(lab.output(), expected);
        // Nor who may do everything.
        lab.edit(|config| {
            let all = json!((0..=40).filter_map(capability).collect::<Vec<_>>());
            for set in ["bounding", "effective", "permitted"] {
                config["process"]["capabilities"][set] = all.clone();
            }
            let rule = json!({"allow": true, "access": "rwm"});
            config["linux"]["resources"]["devices"].as_array_mut().unwrap().push(rule);
        });
        assert_eq!(lab.output(), expected);
    });
}

/// Those by which files can be opened and mounts changed.
fn capability(number: u32) -> Option<&'static str> {
    match number {
        1 => Some("CAP_DAC_OVERRIDE"),
        21 => Some("CAP_SYS_ADMIN"),
        27 => Some("CAP_MKNOD"),
        _ => None,
    }
}

fn it_is_the_administrators_to_give() {
    with_lab(|lab| {
        lab.configure("ready", &format!("sysfs = false\n{WITH_NODE}"));
        lab.script(
            "grep -c -e /sys/class -e /dev/infiniband /proc/self/mountinfo; ls -d /dev/infiniband 2>/dev/null; true",
        );
        assert_eq!(lab.output(), "0\n");
    });
}

fn containers_that_are_not_ours_are_left_alone() {
    with_lab(|lab| {
        lab.configure("ready", WITH_NODE);
        lab.annotate(&[]);
        lab.script(
            "grep -c -e /sys/class -e /dev/infiniband /proc/self/mountinfo; ls -d /dev/infiniband 2>/dev/null; true",
        );
        assert_eq!(lab.output(), "0\n");
    });
}

/// As `--privileged` and `--device` give them.
fn nodes_of_other_devices_are_hidden() {
    with_lab(|lab| {
        lab.edit(|config| {
            let node =
                |name: &str| json!({"path": format!("/dev/infiniband/{name}"), "type": "c", "major": 1, "minor": 3});
            config["linux"]["devices"] = json!(["uverbs0", "uverbs1", "umad0", "issm0", "rdma_cm"].map(node));
        });
        lab.script("ls -A /dev/infiniband");
        assert_eq!(lab.output(), "");
        lab.configure("ready", WITH_NODE);
        assert_eq!(lab.output(), "uverbs0\n");
    });
}

fn a_read_only_root_is_no_obstacle() {
    with_lab(|lab| {
        lab.edit(|config| config["root"]["readonly"] = json!(true));
        lab.script(LOOK);
        assert_eq!(lab.output(), SEEN);
    });
}

fn a_user_namespace_is_no_obstacle() {
    with_lab(|lab| {
        lab.edit(|config| {
            let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
            config["linux"]["uidMappings"] = map.clone();
            config["linux"]["gidMappings"] = map;
            config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
        });
        lab.configure("ready", WITH_NODE);
        lab.script(LOOK);
        assert_eq!(lab.output(), format!("{SEEN}uverbs0\n"));
    });
}

/// Changes what is mounted at `/sys`.
fn at_sys(lab: &mut Lab, mount: Option<Value>) {
    lab.edit(|config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| mount["destination"] != "/sys" && mount["destination"] != "/sys/fs/cgroup");
        mounts.extend(mount);
    });
}

/// What is on record of a container that runs.
fn warnings(lab: &Lab) -> String {
    let record = lab.path("run/state").join(format!("{}.json", lab.id));
    let record: Value = serde_json::from_str(&read_to_string(record).unwrap()).unwrap();
    record["warnings"].to_string()
}

#[track_caller]
fn starts_with_a_warning(lab: &mut Lab, warning: &str) {
    lab.script("sleep 60");
    lab.create();
    let seen = warnings(lab);
    succeeded(&lab.runc(&["delete", "-f", &lab.id]));
    assert!(seen.contains(warning), "{seen}");
}

fn a_container_without_sys_starts() {
    with_lab(|lab| {
        at_sys(lab, None);
        starts_with_a_warning(lab, "/sys in the container is not mounted, or a volume");
        // What is not in /sys is shown.
        lab.configure("ready", WITH_NODE);
        lab.script("ls /dev/infiniband; ls -A /sys");
        assert_eq!(lab.output(), "uverbs0\n");
    });
}

/// Whose files are whoever's.
fn a_volume_at_sys_is_left_alone() {
    with_lab(|lab| {
        let volume = lab.path("volume");
        std::fs::create_dir_all(volume.join("class/net")).unwrap();
        std::os::unix::fs::symlink("/etc", volume.join("class/infiniband")).unwrap();
        at_sys(lab, Some(json!({"destination": "/sys", "type": "bind", "source": volume, "options": ["rbind", "rw"]})));
        starts_with_a_warning(lab, "/sys in the container is not mounted, or a volume");
        lab.script("ls -A /sys/class; ls -A /sys/class/net");
        assert_eq!(lab.output(), "infiniband\nnet\n");
    });
}

/// What is mounted there the host would see.
fn a_shared_sys_is_left_alone() {
    with_lab(|lab| {
        at_sys(
            lab,
            Some(json!({"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", "rshared"]})),
        );
        lab.script("sleep 60");
        lab.write_config();
        // As under systemd, which this machine need not have.
        let script = format!(
            "mount --make-shared /sys && runc --root runc create {id} && cat run/state/{id}.json; \
             grep -c /sys/class /proc/self/mountinfo; runc --root runc delete -f {id}",
            id = lab.id
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &script]).current_dir(lab.path(""));
        let file = std::fs::File::create(lab.path("said")).unwrap();
        let status = command.stdin(Stdio::null()).stdout(file).stderr(Stdio::null()).status().unwrap();
        let seen = read_to_string(lab.path("said")).unwrap();
        assert!(
            status.success() && seen.contains("is shared with the host") && seen.ends_with("0\n"),
            "{status} {seen}"
        );
    });
}

/// Such as a node's network interfaces, for a program that watches them.
fn volumes_below_stay() {
    with_lab(|lab| {
        let volume = lab.path("volume");
        std::fs::create_dir_all(volume.join("eth9")).unwrap();
        lab.edit(|config| {
            let mount =
                json!({"destination": "/sys/class/net", "type": "bind", "source": volume, "options": ["rbind", "ro"]});
            config["mounts"].as_array_mut().unwrap().push(mount);
        });
        lab.script("ls /sys/class/net; ls /sys/class/infiniband");
        assert_eq!(lab.output(), "eth9\nfake0\n");
    });
}
