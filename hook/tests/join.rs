//! Containers that are joined, by runc.

mod common;

use common::{Lab, succeeded, with_lab};
use ringfence_trials::{skip, tests};
use serde_json::json;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        a_container_is_joined,
        two_stages_join_once,
        containers_without_our_annotations_are_left_alone,
        switched_off_or_a_pods_sandbox_is_left_alone,
        the_engine_enables_a_container_without_annotations,
        annotations_refine_what_the_engine_enables,
        a_pods_annotation_speaks_to_one_of_its_containers,
        the_images_own_preload_file_is_kept,
        mounts_are_read_only_and_carry_nothing_else,
        a_read_only_root_is_no_obstacle,
        a_root_that_nobody_can_write_gets_an_overlay,
        a_volume_at_etc_is_not_written_to,
        user_namespaces,
        an_unprivileged_user_has_it_too,
        mounts_stay_within_a_container_that_shares_its_own,
        the_runtime_does_not_wait_for_the_proxy,
        the_proxy_ends_with_a_killed_container_and_without_poststop,
        poststop_may_come_twice_or_for_nothing,
        what_a_crash_left_under_the_same_id_is_replaced,
        an_id_in_use_is_refused_and_its_container_lives_on,
        containers_on_one_root_keep_their_mounts_when_another_ends,
        many_at_once_on_one_root,
        a_hook_killed_by_the_runtime_leaves_nothing_after_poststop,
        crun_joins_too,
        passthrough_grants_the_device_nodes,
        device_nodes_of_the_runtime_are_left_to_it,
        links_in_the_image_beside_our_places_do_not_matter,
    ])
}

/// Says that the dynamic loader has our library, and what stands where.
const LOOK: &str = "/bin/cat /proc/self/maps | grep -q /etc/ld.so.ringfence/libibverbs.so.1 && echo loaded; \
    cat /etc/ld.so.preload; ls -A /dev/ringfence; ls -A /etc/ld.so.ringfence";
const SEEN: &str = "loaded\n/etc/ld.so.ringfence/preload-like-libasan.so\nverbs.sock\nld.so.preload\nlibibverbs.so\n\
    libibverbs.so.1\npreload-like-libasan.so\n";

fn a_container_is_joined() {
    for stage in ["createRuntime", "prestart"] {
        with_lab(|lab| {
            lab.hooks(&[stage], true);
            lab.script(LOOK);
            assert_eq!(lab.output(), SEEN, "{stage}");
        });
    }
}

fn two_stages_join_once() {
    with_lab(|lab| {
        lab.hooks(&["prestart", "createRuntime"], true);
        lab.create();
        assert_eq!(lab.proxies().len(), 1);
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
    });
}

fn containers_without_our_annotations_are_left_alone() {
    with_lab(|lab| {
        lab.edit(|config| config["annotations"] = json!({"io.kubernetes.cri.sandbox-id": "x"}));
        // Nothing of the administrator's is even read.
        std::fs::write(lab.path("config.toml"), "nonsense").unwrap();
        lab.script("ls -d /dev/ringfence /etc/ld.so.*; true");
        assert_eq!(lab.output(), "");
        assert!(!lab.path("run").exists());
    });
}

fn switched_off_or_a_pods_sandbox_is_left_alone() {
    for annotations in [
        json!({"ringfence.dev/enable": "no", "ringfence.dev/bandwidth": "x"}),
        json!({"ringfence.dev/enable": "true", "io.kubernetes.cri.container-type": "sandbox"}),
    ] {
        with_lab(|lab| {
            lab.edit(|config| config["annotations"] = annotations);
            lab.script("ls -d /dev/ringfence; true");
            assert_eq!(lab.output(), "");
        });
    }
}

fn the_engine_enables_a_container_without_annotations() {
    with_lab(|lab| {
        std::fs::create_dir(lab.path("conf.d")).unwrap();
        let profile = "[policy.profiles.gold]\nnamespaces = [\"team-a\"]\ndefaults.max-qp = 7";
        std::fs::write(lab.path("conf.d/gold.toml"), profile).unwrap();
        lab.annotate(&[]);
        lab.hooks(&["prestart", "createRuntime"], true);
        lab.hook_policy(Some("gold"));
        lab.script("sleep 60");
        lab.create();
        let launch = lab.path("run/containers").join(&lab.id).join("launch.json");
        let launch: serde_json::Value = serde_json::from_slice(&std::fs::read(launch).unwrap()).unwrap();
        assert_eq!(launch["limits"]["max_qp"], 7);
        assert_eq!(lab.proxies().len(), 1);
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));

        lab.annotate(&[("enable", "false")]);
        lab.script("ls -d /dev/ringfence; true");
        assert_eq!(lab.output(), "");
    });
}

/// podman calls its hooks.d for whoever has an annotation of ours, beside what a CDI device has it call.
fn annotations_refine_what_the_engine_enables() {
    with_lab(|lab| {
        lab.annotate(&[("max-qp", "7")]);
        lab.hooks(&["prestart", "createRuntime"], true);
        let args = json!(["ringfence-hook", "createRuntime", "--policy", "default"]);
        lab.edit(|config| config["hooks"]["createRuntime"][0]["args"] = args);
        lab.script("sleep 60");
        lab.create();
        let launch = lab.path("run/containers").join(&lab.id).join("launch.json");
        let launch: serde_json::Value = serde_json::from_slice(&std::fs::read(launch).unwrap()).unwrap();
        assert_eq!(launch["limits"]["max_qp"], 7);
        assert_eq!(lab.record(&lab.id)["policy"], "default");
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
    });
}

fn a_pods_annotation_speaks_to_one_of_its_containers() {
    const NAME: &str = "io.kubernetes.cri.container-name";
    for (name, seen) in [("app", SEEN), ("db", "")] {
        with_lab(|lab| {
            lab.edit(|config| {
                config["annotations"] = json!({"enable.ringfence.dev/container.app": "true", NAME: name});
            });
            lab.script(&format!("{LOOK}; true"));
            assert_eq!(succeeded(&lab.run()), seen, "{name}");
        });
    }
}

fn the_images_own_preload_file_is_kept() {
    with_lab(|lab| {
        let etc = lab.path("rootfs/etc");
        std::fs::create_dir(&etc).unwrap();
        std::fs::write(etc.join("ld.so.preload"), "# theirs\n/lib/theirs.so").unwrap();
        lab.expect_rootfs_as_is();
        lab.script("cat /etc/ld.so.preload 2>/dev/null");
        assert_eq!(lab.output(), "/etc/ld.so.ringfence/preload-like-libasan.so\n# theirs\n/lib/theirs.so");
        assert_eq!(std::fs::read_to_string(etc.join("ld.so.preload")).unwrap(), "# theirs\n/lib/theirs.so");
    });
}

fn mounts_are_read_only_and_carry_nothing_else() {
    with_lab(|lab| {
        lab.script(
            "grep -E 'ringfence|preload' /proc/mounts; (: >/dev/ringfence/x); (: >/etc/ld.so.preload); \
            (: >/etc/ld.so.ringfence/x); true",
        );
        let output = lab.run();
        let text = succeeded(&output);
        let flags = |path: &str| {
            let line = text.lines().find(|line| line.split(' ').nth(1) == Some(path)).unwrap();
            line.split(' ').nth(3).unwrap().split(',').take(4).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(flags("/dev/ringfence"), ["ro", "nosuid", "nodev", "noexec"]);
        assert_eq!(flags("/etc/ld.so.preload"), ["ro", "nosuid", "nodev", "noexec"]);
        for path in ["/etc/ld.so.ringfence", "/etc/ld.so.ringfence/libibverbs.so.1"] {
            assert_eq!(flags(path)[..3], ["ro", "nosuid", "nodev"]);
            assert!(!flags(path).contains(&"noexec".to_owned()));
        }
        assert_eq!(String::from_utf8_lossy(&output.stderr).matches("Read-only file system").count(), 3);
    });
}

fn a_read_only_root_is_no_obstacle() {
    with_lab(|lab| {
        lab.edit(|config| config["root"]["readonly"] = json!(true));
        lab.script(LOOK);
        assert_eq!(lab.output(), SEEN);
    });
}

/// Runs the container with its root file system on a read-only mount.
fn output_on_read_only_mount(lab: &Lab) -> String {
    succeeded(&lab.run_after("mount --bind rootfs rootfs && mount -o remount,bind,ro rootfs"))
}

fn a_root_that_nobody_can_write_gets_an_overlay() {
    with_lab(|lab| {
        let etc = lab.path("rootfs/etc");
        std::fs::create_dir(&etc).unwrap();
        std::fs::write(etc.join("passwd"), "root:x:0:0::/:/bin/sh\n").unwrap();
        std::fs::write(etc.join("resolv.conf"), "").unwrap();
        std::fs::write(lab.path("resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
        lab.expect_rootfs_as_is();
        let source = lab.path("resolv.conf");
        lab.edit(|config| {
            config["root"]["readonly"] = json!(true);
            let mount =
                json!({"destination": "/etc/resolv.conf", "type": "bind", "source": source, "options": ["bind", "ro"]});
            config["mounts"].as_array_mut().unwrap().push(mount);
        });
        lab.script(&format!("{LOOK}; cat /etc/passwd /etc/resolv.conf; (: >/etc/x) || echo read-only"));
        let expected = format!("{SEEN}root:x:0:0::/:/bin/sh\nnameserver 192.0.2.1\nread-only\n");
        assert_eq!(output_on_read_only_mount(lab), expected);
    });
}

fn a_volume_at_etc_is_not_written_to() {
    with_lab(|lab| {
        let volume = lab.path("volume");
        std::fs::create_dir(&volume).unwrap();
        std::fs::write(volume.join("hosts"), "x\n").unwrap();
        std::fs::create_dir(lab.path("rootfs/etc")).unwrap();
        lab.expect_rootfs_as_is();
        lab.edit(|config| {
            let mount = json!({"destination": "/etc", "type": "bind", "source": volume, "options": ["rbind", "rw"]});
            config["mounts"].as_array_mut().unwrap().push(mount);
        });
        lab.script(&format!("{LOOK}; cat /etc/hosts"));
        assert_eq!(lab.output(), format!("{SEEN}x\n"));
        assert_eq!(std::fs::read_dir(lab.path("volume")).unwrap().count(), 1);
    });
}

fn user_namespaces() {
    for (owner, readonly) in [(0, false), (100_000, false), (100_000, true)] {
        with_lab(|lab| {
            let mut chown = Command::new("chown");
            chown.args(["-hR", &format!("{owner}:{owner}")]).arg(lab.path("rootfs"));
            assert!(chown.status().unwrap().success());
            std::fs::set_permissions(lab.path("rootfs"), std::fs::Permissions::from_mode(0o755)).unwrap();
            lab.edit(|config| {
                let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
                config["linux"]["uidMappings"] = map.clone();
                config["linux"]["gidMappings"] = map;
                config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
                config["root"]["readonly"] = json!(readonly);
            });
            lab.script(LOOK);
            assert_eq!(lab.output(), SEEN, "{owner} {readonly}");
        });
    }
}

fn an_unprivileged_user_has_it_too() {
    with_lab(|lab| {
        lab.edit(|config| {
            config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
            config["process"]["capabilities"] = json!({});
        });
        lab.script(LOOK);
        assert_eq!(lab.output(), SEEN);
    });
}

fn mounts_stay_within_a_container_that_shares_its_own() {
    for propagation in ["shared", "rshared", "rslave"] {
        with_lab(|lab| {
            lab.edit(|config| config["linux"]["rootfsPropagation"] = json!(propagation));
            lab.script(&format!("{LOOK}; sleep 0.2"));
            lab.write_config();
            let child = lab.runc_command().args(["run", &lab.id]).stdout(std::process::Stdio::piped()).spawn().unwrap();
            let deadline = Instant::now() + Duration::from_secs(5);
            while lab.proxies().is_empty() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(50));
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            let output = child.wait_with_output().unwrap();
            assert!(!mounts.contains("ringfence/lib") && !mounts.contains("ld.so.preload"), "{propagation}: {mounts}");
            assert_eq!(succeeded(&output), SEEN);
        });
    }
}

fn the_runtime_does_not_wait_for_the_proxy() {
    with_lab(|lab| {
        // One that waited would do so as long as the container lives; slow machines take seconds for a start.
        lab.script("sleep 1000");
        let begin = Instant::now();
        lab.create();
        assert!(begin.elapsed() < Duration::from_secs(300), "{:?}", begin.elapsed());
        assert_eq!(lab.proxies().len(), 1);
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
    });
}

fn the_proxy_ends_with_a_killed_container_and_without_poststop() {
    with_lab(|lab| {
        lab.hooks(&["createRuntime"], false);
        lab.create();
        assert_eq!(lab.proxies().len(), 1);
        succeeded(&lab.runc(&["kill", &lab.id, "KILL"]));
        lab.assert_proxy_ends();
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));

        // Another container's end sweeps up what was left on record.
        assert!(lab.path("run/state").join(format!("{}.json", lab.id)).exists());
        let mut other = lab.state(0);
        other["id"] = json!("other");
        assert!(lab.hook("poststop", other.to_string().as_bytes()).status.success());
    });
}

fn poststop_may_come_twice_or_for_nothing() {
    with_lab(|lab| {
        lab.output();
        for _ in 0..2 {
            let output = lab.hook("poststop", lab.state(0).to_string().as_bytes());
            assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
        }
    });
}

fn what_a_crash_left_under_the_same_id_is_replaced() {
    with_lab(|lab| {
        let stale = lab.path("run/containers").join(&lab.id).join("mount");
        std::fs::create_dir_all(&stale).unwrap();
        std::fs::write(stale.join("verbs.sock"), "").unwrap();
        std::fs::create_dir_all(lab.path("run/state")).unwrap();
        std::fs::write(lab.path("run/state").join(format!("{}.json", lab.id)), "{\"truncated").unwrap();
        lab.script(LOOK);
        assert_eq!(lab.output(), SEEN);
    });
}

fn an_id_in_use_is_refused_and_its_container_lives_on() {
    with_lab(|lab| {
        lab.script("sleep 60");
        lab.create();
        // As another runtime would, which keeps its own list of ids.
        let output = lab.runc(&["--root", lab.path("other").to_str().unwrap(), "run", &lab.id]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("is in use by a running container"), "{text}");
        assert_eq!(lab.proxies().len(), 1);
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
    });
}

fn containers_on_one_root_keep_their_mounts_when_another_ends() {
    with_lab(|lab| {
        lab.script(&format!("{LOOK}; sleep 1; {LOOK}"));
        lab.write_config();
        let long = lab.runc_command().args(["run", &lab.id]).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while lab.proxies().is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        lab.script("true");
        lab.write_config();
        let short = format!("{}-short", lab.id);
        succeeded(&lab.runc_command().args(["run", &short]).output().unwrap());
        assert_eq!(succeeded(&long.wait_with_output().unwrap()), SEEN.repeat(2));
    });
}

fn many_at_once_on_one_root() {
    with_lab(|lab| {
        lab.script(LOOK);
        lab.part_cgroups();
        lab.write_config();
        let ids: Vec<_> = (0..8).map(|i| format!("{}-{i}", lab.id)).collect();
        let start = |id: &String| {
            let mut command = lab.runc_command();
            command.args(["run", id]).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
            command.spawn().unwrap()
        };
        let containers: Vec<_> = ids.iter().map(start).collect();
        for container in containers {
            assert_eq!(succeeded(&container.wait_with_output().unwrap()), SEEN);
        }
    });
}

fn a_hook_killed_by_the_runtime_leaves_nothing_after_poststop() {
    with_lab(|lab| {
        lab.configure("mute", "");
        lab.edit(|config| config["hooks"]["createRuntime"][0]["timeout"] = json!(1));
        let output = lab.run();
        assert!(String::from_utf8_lossy(&output.stderr).contains("hook ran past specified timeout"), "{output:?}");
    });
}

fn crun_joins_too() {
    with_lab(|lab| {
        lab.script(LOOK);
        assert_eq!(succeeded(&lab.crun(&["run", &lab.id])), SEEN);
    });
}

fn passthrough_grants_the_device_nodes() {
    const NODE: &str = "/dev/fuse";
    with_lab(|lab| {
        if !std::path::Path::new(NODE).exists() || !std::path::Path::new("/sys/fs/cgroup/devices").exists() {
            skip("needs /dev/fuse as a device node, and the devices controller of cgroup version 1");
        }
        let more = format!(
            "[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\nnodes = [\"{NODE}\"]\n[policy.bounds]\nmodes = [\"proxied\", \"passthrough\"]"
        );
        lab.configure("ready", &more);
        lab.annotate(&[("enable", "true"), ("mode", "passthrough")]);
        // Reading an unmounted FUSE device answers EPERM; opening it is what the cgroup decides about.
        lab.script(&format!("exec 3<>{NODE} && echo opened; ls -d /dev/ringfence; true"));
        assert_eq!(lab.output(), "opened\n");
        assert_eq!(lab.proxies(), [0; 0]);
    });
}

fn device_nodes_of_the_runtime_are_left_to_it() {
    with_lab(|lab| {
        if !std::path::Path::new("/dev/fuse").exists() {
            skip("needs /dev/fuse as a device node");
        }
        lab.configure(
            "ready",
            "[[device]]\nname = \"mlx5_0\"\nkind = \"ibverbs\"\nnodes = [\"/dev/fuse\"]\n[policy.bounds]\nmodes = [\"passthrough\"]",
        );
        lab.edit(|config| {
            config["linux"]["devices"] = json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]);
            let rule = json!({"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"});
            config["linux"]["resources"]["devices"].as_array_mut().unwrap().push(rule);
        });
        lab.script("exec 3<>/dev/fuse && echo opened; grep -c fuse /proc/self/mounts; true");
        assert_eq!(lab.output(), "opened\n0\n");
    });
}

fn links_in_the_image_beside_our_places_do_not_matter() {
    with_lab(|lab| {
        symlink("/nowhere", lab.path("rootfs/run")).unwrap();
        lab.expect_rootfs_as_is();
        lab.script(LOOK);
        assert_eq!(lab.output(), SEEN);
    });
}
