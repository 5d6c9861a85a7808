//! Containers that must not start: the message, the exit code, and that nothing remains.

mod common;

use common::{Lab, with_lab};
use ringfence_trials::tests;
use serde_json::json;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        an_empty_state,
        a_truncated_state,
        a_state_of_a_dead_process,
        an_id_that_cannot_be_ours_concerns_our_containers_only,
        a_state_of_a_process_that_is_no_container,
        a_state_of_a_sandbox,
        a_bundle_without_config,
        annotations_that_are_wrong,
        more_than_the_administrator_allows,
        policies_that_are_not_for_this_container,
        two_policies_for_one_container,
        failures_are_kept_for_the_operator,
        usage,
        a_device_that_is_not_there,
        a_configuration_that_is_wrong,
        a_proxy_that_is_missing,
        a_proxy_that_says_why_not,
        a_proxy_that_says_why_not_while_the_image_is_no_better,
        a_proxy_that_ends_without_a_word,
        a_proxy_that_is_not_ready_in_time,
        symbolic_links_where_we_mount,
        other_things_than_files_where_we_mount,
        an_endless_preload_file,
        the_hosts_dev_in_the_container,
        a_library_that_is_not_there,
        a_volume_that_the_host_shares,
        a_run_dir_that_others_can_write,
        without_root_it_says_so,
        a_run_dir_without_room,
        want_of_descriptors,
    ])
}

fn an_empty_state() {
    with_lab(|lab| {
        lab.hook_refuses(
            b"",
            10,
            "the container state on standard input is empty; the OCI runtime must write it there",
        );
    });
}

fn a_truncated_state() {
    with_lab(|lab| {
        lab.hook_refuses(
            br#"{"ociVersion":"1.0.2","id":"c1","#,
            10,
            "the container state on standard input is not valid: EOF while parsing a value at line 1 column 32",
        );
    });
}

fn a_state_of_a_dead_process() {
    with_lab(|lab| {
        lab.write_config();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        let message = format!("the container state's pid {pid} is no running process");
        // First as a zombie, then gone.
        while !std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") Z ") {}
        lab.hook_refuses(lab.state(pid.into()).to_string().as_bytes(), 10, &message);
        child.wait().unwrap();
        lab.hook_refuses(lab.state(pid.into()).to_string().as_bytes(), 10, &message);
    });
}

/// runc and crun take ids that are no names for our files.
fn an_id_that_cannot_be_ours_concerns_our_containers_only() {
    with_lab(|lab| {
        lab.id = "a,b".into();
        lab.refused(
            10,
            "the container id \"a,b\" is not usable: allowed are 1 to 200 of A-Z a-z 0-9 _ . + - and no leading dot",
        );
        lab.annotate(&[]);
        lab.output();
    });
}

fn a_state_of_a_process_that_is_no_container() {
    with_lab(|lab| {
        lab.write_config();
        let pid = std::process::id();
        let message = format!("the container state's pid {pid} is no container's init: it has our own mount namespace");
        lab.hook_refuses(lab.state(pid.into()).to_string().as_bytes(), 10, &message);
        for pid in [0, 1] {
            let message = format!("the container state has no pid of a container's init, but {pid}");
            lab.hook_refuses(lab.state(pid).to_string().as_bytes(), 10, &message);
        }
    });
}

/// As gVisor's: its first process, which serves the container's system calls, has a root file system of its own.
fn a_state_of_a_sandbox() {
    with_lab(|lab| {
        lab.write_config();
        let lab_path = lab.path("");
        let script = "mount -t tmpfs sandbox \"$1\" && touch \"$1/mounted\" && exec sleep 60";
        let mut command = std::process::Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh"]).arg(&lab_path);
        let mut child = command.spawn().unwrap();
        let seen = PathBuf::from(format!("/proc/{}/root{}/mounted", child.id(), lab_path.display()));
        lab.wait_until("the mount", || seen.exists());
        lab.hook_refuses(
            lab.state(child.id().into()).to_string().as_bytes(),
            15,
            &format!(
                "root file system {} is not there for the container's init; runtimes with a sandbox or a virtual machine of \
                 their own (gVisor's runsc, Kata) cannot give containers RDMA: use runc or crun",
                lab.path("rootfs").display()
            ),
        );
        child.kill().unwrap();
        child.wait().unwrap();
        lab.assert_clean();
    });
}

fn a_bundle_without_config() {
    with_lab(|lab| {
        let _ = std::fs::remove_file(lab.path("config.json"));
        let message = format!(
            "{}/config.json: No such file or directory (os error 2); the bundle named by the container state must hold a config.json",
            lab.path("").to_str().unwrap().trim_end_matches('/')
        );
        lab.hook_refuses(lab.state(i64::from(std::process::id())).to_string().as_bytes(), 10, &message);
    });
}

fn annotations_that_are_wrong() {
    for (key, value, message) in [
        (
            "bandwidth",
            "10gbps",
            r#"annotation ringfence.dev/bandwidth="10gbps" is malformed; allowed is a number and one of bit, kbit"#,
        ),
        (
            "bandwith",
            "10Gbit",
            r#"annotation ringfence.dev/bandwith is unknown; allowed are enable, policy, mode, device"#,
        ),
        (
            "enable",
            "on",
            r#"annotation ringfence.dev/enable="on" is malformed; allowed is true, 1, yes, false, 0 or no"#,
        ),
    ] {
        with_lab(|lab| {
            lab.annotate(&[("enable", "true"), (key, value)]);
            lab.refused(12, message);
        });
    }
}

fn more_than_the_administrator_allows() {
    with_lab(|lab| {
        lab.configure("ready", "[policy.bounds]\nbandwidth = \"10Gbit\"");
        lab.annotate(&[("enable", "true"), ("bandwidth", "40Gbit")]);
        let message = "ringfence.dev/bandwidth=40Gbit is beyond the administrator's bound; allowed is at most 10Gbit";
        lab.refused(13, message);
        lab.annotate(&[("enable", "true"), ("mode", "passthrough")]);
        lab.refused(13, "ringfence.dev/mode=passthrough is beyond the administrator's bound; allowed is proxied");
    });
}

const GOLD: &str = "[policy.profiles.gold]\nnamespaces = [\"team-*\"]\nbounds.max-qp = 1024";

fn policies_that_are_not_for_this_container() {
    with_lab(|lab| {
        lab.configure("ready", GOLD);
        lab.annotate(&[("enable", "true"), ("policy", "gold")]);
        let only = "it is for namespaces team-* only";
        lab.refused(13, &format!("policy gold is denied to a container without a Kubernetes namespace; {only}"));
        // Whoever may call runc may write any annotation.
        lab.edit(|config| config["annotations"]["io.kubernetes.cri.sandbox-namespace"] = json!("team-a"));
        let whom = "a container that claims to be of namespace \"team-a\" but was not made through CRI";
        lab.refused(13, &format!("policy gold is denied to {whom}; {only}"));
        lab.annotate(&[("enable", "true"), ("policy", "silver")]);
        lab.refused(
            12,
            "annotation ringfence.dev/policy=silver names no policy of the administrator's; there is default, gold",
        );
        lab.annotate(&[("policy", "default")]);
        lab.hook_policy(Some("gold"));
        lab.refused(12, "annotation ringfence.dev/policy=default contradicts the policy gold that the engine gives");
        lab.annotate(&[]);
        lab.hook_policy(Some("silver"));
        lab.refused(11, "the engine gives this container the policy silver (--policy), which is not configured; there is default, gold");
    });
}

fn two_policies_for_one_container() {
    with_lab(|lab| {
        lab.configure("ready", GOLD);
        lab.annotate(&[]);
        lab.hooks(&["prestart", "createRuntime"], true);
        lab.edit(|config| {
            for (stage, policy) in [("prestart", "gold"), ("createRuntime", "default")] {
                config["hooks"][stage][0]["args"] = json!(["ringfence-hook", stage, "--policy", policy]);
            }
        });
        lab.refused(
            13,
            "the container has the policy gold already, and now the engine gives it default (--policy); use one CDI device",
        );
    });
}

fn failures_are_kept_for_the_operator() {
    with_lab(|lab| {
        lab.annotate(&[("enable", "on")]);
        let message = "annotation ringfence.dev/enable=\"on\" is malformed; allowed is true, 1, yes, false, 0 or no";
        lab.refused(12, message);
        lab.hook_refuses(
            b"",
            10,
            "the container state on standard input is empty; the OCI runtime must write it there",
        );
        let entries = ringfence_hook::failures::read(&lab.path("run")).unwrap();
        let of = |i: usize| (entries[i].container.as_deref(), entries[i].code);
        assert_eq!((of(0), of(1)), ((Some(lab.id.as_str()), 12), (None, 10)));
        assert_eq!((entries[0].message.as_str(), entries.len()), (message, 2));
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        assert!(entries.iter().all(|entry| now.abs_diff(entry.time) < 60));
    });
}

fn usage() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.toml");
    std::fs::write(&config, format!("run-dir = \"{}/run\"", directory.path().display())).unwrap();
    let hook = || {
        let mut hook = std::process::Command::new(common::HOOK);
        hook.env("RINGFENCE_CONFIG", &config);
        hook
    };
    for arguments in [
        &[][..],
        &["create"],
        &["createRuntime", "x"],
        &["createRuntime", "--policy"],
        &["--policy", "gold"],
        &["poststop", "x", "y"],
    ] {
        let output = hook().args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
        assert!(text.starts_with("ringfence-hook: E2 usage: ringfence-hook "), "{arguments:?}: {text}");
    }
    // More than a pipe holds: crun would die of SIGPIPE if nobody read it.
    let mut unread = hook().arg("create").stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    unread.stdin.take().unwrap().write_all(&[b' '; 1 << 18]).unwrap();
    assert_eq!(unread.wait().unwrap().code(), Some(2));
    for (argument, expected) in [("--help", "usage: ringfence-hook createRuntime"), ("--version", "ringfence-hook 0.")]
    {
        let output = hook().arg(argument).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{argument}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).starts_with(expected), "{argument}: {output:?}");
    }
    let bad = hook().args(["createRuntime", "--policy=a/b"]).output().unwrap();
    assert!(String::from_utf8_lossy(&bad.stderr).contains("E2 --policy \"a/b\" is no profile's name"), "{bad:?}");
}

fn a_device_that_is_not_there() {
    with_lab(|lab| {
        lab.annotate(&[("enable", "true"), ("device", "mlx5_9")]);
        lab.refused(14, "ringfence.dev/device=mlx5_9 is not configured; there is soft0");
        lab.configure(
            "ready",
            "[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\nnodes = [\"/dev/infiniband/rf-none\"]\n[policy.bounds]\nmodes = [\"passthrough\"]",
        );
        lab.annotate(&[("enable", "true")]);
        lab.refused(14, "device node /dev/infiniband/rf-none: No such file or directory");
    });
}

fn a_configuration_that_is_wrong() {
    with_lab(|lab| {
        let path = lab.path("config.toml");
        std::fs::write(&path, "\nrun-dri = \"/run\"\n").unwrap();
        lab.refused(11, &format!("configuration {}: line 2: unknown field `run-dri`", path.display()));
        std::fs::remove_file(&path).unwrap();
        lab.refused(11, &format!("configuration {}: No such file or directory", path.display()));
    });
}

fn a_proxy_that_is_missing() {
    with_lab(|lab| {
        lab.configure("missing", "");
        let path = lab.path("missing");
        let message = format!("proxy {0} did not start: cannot execute {0} (proxy.path): No such file", path.display());
        lab.refused(17, &message);
    });
}

fn a_proxy_that_says_why_not() {
    with_lab(|lab| {
        lab.configure("refusing", "");
        let path = lab.path("refusing");
        lab.refused(17, &format!("proxy {} did not start: device soft0 is on fire", path.display()));
    });
}

/// It takes its directory with it while the hook makes files there: what comes of that is not the cause.
fn a_proxy_that_says_why_not_while_the_image_is_no_better() {
    with_lab(|lab| {
        lab.configure("refusing", "");
        let preload = lab.path("rootfs/etc/ld.so.preload");
        std::fs::create_dir_all(preload).unwrap();
        lab.expect_rootfs_as_is();
        lab.refused(17, &format!("proxy {} did not start: device soft0 is on fire", lab.path("refusing").display()));
    });
}

fn a_proxy_that_ends_without_a_word() {
    with_lab(|lab| {
        lab.configure("dying", "");
        let path = lab.path("dying");
        lab.refused(17, &format!("proxy {} ended before it was ready: exit status 3", path.display()));
    });
}

fn a_proxy_that_is_not_ready_in_time() {
    with_lab(|lab| {
        lab.configure("mute", "");
        let path = lab.path("config.toml");
        let text = std::fs::read_to_string(&path).unwrap().replace("= 60000", "= 300");
        std::fs::write(&path, text).unwrap();
        let begin = Instant::now();
        let message =
            format!("proxy {} was not ready within 300 ms (proxy.ready-timeout-ms)", lab.path("mute").display());
        lab.refused(16, &message);
        assert!(begin.elapsed() < Duration::from_secs(5));
    });
}

fn symbolic_links_where_we_mount() {
    fn case(path: &str, shown: &str, prepare: impl FnOnce(&Lab, &PathBuf)) {
        with_lab(|lab| {
            let outside = lab.path("outside");
            std::fs::create_dir(&outside).unwrap();
            prepare(lab, &outside);
            lab.expect_rootfs_as_is();
            let message =
                format!("{shown} in the container is or contains a symbolic link, through which nothing is mounted");
            lab.refused(15, &message);
            assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0, "{path}");
        });
    }
    case("etc", "/etc", |lab, outside| symlink(outside, lab.path("rootfs/etc")).unwrap());
    case("etc", "/etc", |lab, _| symlink("tmp", lab.path("rootfs/etc")).unwrap());
    for target in ["x", "/tmp/x", "../../../../../../../../../etc/passwd", "/proc/1/root/etc/x"] {
        case(target, "/etc/ld.so.preload", |lab, _| {
            std::fs::create_dir(lab.path("rootfs/etc")).unwrap();
            symlink(target, lab.path("rootfs/etc/ld.so.preload")).unwrap();
        });
    }
}

fn other_things_than_files_where_we_mount() {
    for kind in ["directory", "FIFO"] {
        with_lab(|lab| {
            let path = lab.path("rootfs/etc/ld.so.preload");
            std::fs::create_dir(lab.path("rootfs/etc")).unwrap();
            match kind {
                "directory" => std::fs::create_dir(&path).unwrap(),
                _ => assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success()),
            }
            lab.expect_rootfs_as_is();
            lab.refused(15, &format!("/etc/ld.so.preload in the container is a {kind}, but must be a regular file"));
        });
    }
}

fn an_endless_preload_file() {
    with_lab(|lab| {
        std::fs::create_dir(lab.path("rootfs/etc")).unwrap();
        std::fs::write(lab.path("rootfs/etc/ld.so.preload"), vec![b' '; 65537]).unwrap();
        lab.expect_rootfs_as_is();
        lab.refused(15, "/etc/ld.so.preload in the container: it exceeds 65536 bytes; shorten it");
    });
}

fn the_hosts_dev_in_the_container() {
    with_lab(|lab| {
        lab.edit(|config| {
            let mounts = config["mounts"].as_array_mut().unwrap();
            mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
            mounts.push(json!({"destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind", "rw"]}));
        });
        lab.refused(15, "/dev in the container is a volume or the host's /dev, where nothing is created");
        assert!(!std::path::Path::new("/dev/ringfence").exists());
    });
}

fn a_library_that_is_not_there() {
    with_lab(|lab| {
        let path = lab.path("config.toml");
        let text = std::fs::read_to_string(&path).unwrap().replace("libanl", "librf-none");
        std::fs::write(&path, text).unwrap();
        lab.refused(15, "preload library /lib/x86_64-linux-gnu/librf-none.so.1 (inject.library): No such file");
    });
}

fn a_volume_that_the_host_shares() {
    with_lab(|lab| {
        let volume = lab.path("volume");
        std::fs::create_dir(&volume).unwrap();
        std::fs::write(volume.join("ld.so.preload"), "").unwrap();
        std::fs::create_dir(lab.path("rootfs/etc")).unwrap();
        lab.expect_rootfs_as_is();
        lab.edit(|config| {
            let options = ["rbind", "rshared"];
            let mount = json!({"destination": "/etc", "type": "bind", "source": volume, "options": options});
            config["mounts"].as_array_mut().unwrap().push(mount);
            config["linux"]["rootfsPropagation"] = json!("rshared");
        });
        let output = lab.run_after("mount --bind volume volume && mount --make-shared volume");
        Lab::assert_refused(&output, 15, "the mount at /etc in the container is shared with the host");
    });
}

fn a_run_dir_that_others_can_write() {
    use std::os::unix::fs::PermissionsExt;
    with_lab(|lab| {
        let path = lab.path("run");
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        let message = format!("run-dir {} belongs to uid 0 and has mode 777; chown it to root", path.display());
        lab.refused(11, &message);
    });
}

fn without_root_it_says_so() {
    use std::os::unix::process::CommandExt;
    with_lab(|lab| {
        lab.write_config();
        let mut child = std::process::Command::new("unshare").args(["-m", "sleep", "60"]).spawn().unwrap();
        // Until it is in a mount namespace of its own.
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap();
        while namespace(&child.id().to_string()) == namespace("self") {}
        let state = lab.state(child.id().into()).to_string();
        std::fs::write(lab.path("state.json"), state).unwrap();
        let output = std::process::Command::new(common::HOOK)
            .arg("createRuntime")
            .env_clear()
            .env("RINGFENCE_CONFIG", lab.path("config.toml"))
            .stdin(std::fs::File::open(lab.path("state.json")).unwrap())
            .uid(65534)
            .output()
            .unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(18), "{text}");
        assert!(
            text.contains("Permission denied (os error 13); the hook needs root in the host's user namespace"),
            "{text}"
        );
    });
}

/// The run-dir on a file system that has less room each time: every step fails once.
fn a_run_dir_without_room() {
    with_lab(|lab| {
        std::fs::create_dir(lab.path("run")).unwrap();
        let script = "mount -t tmpfs -o mode=700,$0 tmpfs run || exit 99; runc --root runc run \"$1\"; code=$?; \
            ls -A run/containers run/state 2>/dev/null | grep -v : >&2; exit $code";
        lab.script("cat /etc/ld.so.preload");
        lab.write_config();
        let (mut refused, mut joined) = (0, 0);
        let options = (2..20).map(|inodes| format!("nr_inodes={inodes}"));
        for options in options.chain((1..10).map(|pages| format!("size={}k", 4 * pages))) {
            let mut command = std::process::Command::new("unshare");
            command.args(["--mount", "--propagation", "private", "sh", "-c", script, &options, &lab.id]);
            let output = command.current_dir(lab.path("")).output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            match output.status.code() {
                Some(0) => {
                    assert_eq!((&*text, output.stdout.starts_with(b"/etc/ld.so.ringfence/")), ("", true), "{options}");
                    joined += 1;
                }
                Some(1) => {
                    assert!(text.contains("No space left on device") && text.lines().count() == 1, "{options}: {text}");
                    refused += 1;
                }
                _ => panic!("{options}: {output:?}"),
            }
            lab.assert_proxy_ends();
        }
        assert!(refused > 5 && joined > 2, "{refused} refused, {joined} joined");
    });
}

/// One more descriptor each time: every step fails once, and undoes those before it.
fn want_of_descriptors() {
    with_lab(|lab| {
        lab.script("cat /etc/ld.so.preload");
        let (mut refused, mut joined) = (0, 0);
        for descriptors in 3..56 {
            lab.edit(|config| {
                let hook = &mut config["hooks"]["createRuntime"][0];
                hook["path"] = json!("/usr/bin/prlimit");
                hook["args"] = json!(["prlimit", format!("--nofile={descriptors}"), common::HOOK, "createRuntime"]);
            });
            let output = lab.run();
            match output.status.success() {
                true => {
                    assert!(output.stdout.starts_with(b"/etc/ld.so.ringfence/"), "{descriptors}: {output:?}");
                    joined += 1;
                }
                false => refused += 1,
            }
            lab.assert_clean();
        }
        assert!(refused > 5 && joined > 5, "{refused} refused, {joined} joined");
    });
}
