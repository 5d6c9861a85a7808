//! Containers that must not start: the message, the exit code, and that nothing remains.

mod common;

use common::{Lab, with_lab};
use serde_json::json;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[test]
fn an_empty_state() {
    with_lab(|lab| {
        lab.hook_refuses(
            b"",
            10,
            "the container state on standard input is empty; the OCI runtime must write it there",
        );
    });
}

#[test]
fn a_truncated_state() {
    with_lab(|lab| {
        lab.hook_refuses(
            br#"{"ociVersion":"1.0.2","id":"c1","#,
            10,
            "the container state on standard input is not valid: EOF while parsing a value at line 1 column 32",
        );
    });
}

#[test]
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

#[test]
fn a_state_of_a_process_that_is_no_container() {
    with_lab(|lab| {
        lab.write_config();
        let pid = std::process::id();
        let message = format!("the container state's pid {pid} is no container's init: it has our own mount namespace");
        lab.hook_refuses(lab.state(pid.into()).to_string().as_bytes(), 10, &message);
        for pid in [0, 1] {
            let message = format!("the container state has no pid of a container's init, but Some({pid})");
            lab.hook_refuses(lab.state(pid).to_string().as_bytes(), 10, &message);
        }
    });
}

#[test]
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

#[test]
fn annotations_that_are_wrong() {
    for (key, value, message) in [
        (
            "bandwidth",
            "10gbps",
            r#"annotation ringfence.dev/bandwidth="10gbps" is malformed; allowed is a number and one of bit, kbit"#,
        ),
        ("bandwith", "10Gbit", r#"annotation ringfence.dev/"bandwith" is unknown; allowed are enable, mode, device"#),
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

#[test]
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

#[test]
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

#[test]
fn a_configuration_that_is_wrong() {
    with_lab(|lab| {
        let path = lab.path("config.toml");
        std::fs::write(&path, "\nrun-dri = \"/run\"\n").unwrap();
        lab.refused(11, &format!("configuration {}: line 2: unknown field `run-dri`", path.display()));
        std::fs::remove_file(&path).unwrap();
        lab.refused(11, &format!("configuration {}: No such file or directory", path.display()));
    });
}

#[test]
fn a_proxy_that_is_missing() {
    with_lab(|lab| {
        lab.configure("missing", "");
        let path = lab.path("missing");
        let message = format!("proxy {0} did not start: cannot execute {0} (proxy.path): No such file", path.display());
        lab.refused(17, &message);
    });
}

#[test]
fn a_proxy_that_says_why_not() {
    with_lab(|lab| {
        lab.configure("refusing", "");
        let path = lab.path("refusing");
        lab.refused(17, &format!("proxy {} did not start: device soft0 is on fire", path.display()));
    });
}

#[test]
fn a_proxy_that_ends_without_a_word() {
    with_lab(|lab| {
        lab.configure("dying", "");
        let path = lab.path("dying");
        lab.refused(17, &format!("proxy {} ended before it was ready: exit status 3", path.display()));
    });
}

#[test]
fn a_proxy_that_is_not_ready_in_time() {
    with_lab(|lab| {
        lab.configure("mute", "");
        let path = lab.path("config.toml");
        let text = std::fs::read_to_string(&path).unwrap().replace("= 2000", "= 300");
        std::fs::write(&path, text).unwrap();
        let begin = Instant::now();
        let message =
            format!("proxy {} was not ready within 300 ms (proxy.ready-timeout-ms)", lab.path("mute").display());
        lab.refused(16, &message);
        assert!(begin.elapsed() < Duration::from_secs(5));
    });
}

#[test]
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

#[test]
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

#[test]
fn an_endless_preload_file() {
    with_lab(|lab| {
        std::fs::create_dir(lab.path("rootfs/etc")).unwrap();
        std::fs::write(lab.path("rootfs/etc/ld.so.preload"), vec![b' '; 65537]).unwrap();
        lab.expect_rootfs_as_is();
        lab.refused(15, "/etc/ld.so.preload in the container exceeds 65536 bytes; shorten it");
    });
}

#[test]
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

#[test]
fn a_library_that_is_not_there() {
    with_lab(|lab| {
        let path = lab.path("config.toml");
        let text = std::fs::read_to_string(&path).unwrap().replace("libanl", "librf-none");
        std::fs::write(&path, text).unwrap();
        lab.refused(15, "preload library /lib/x86_64-linux-gnu/librf-none.so.1 (inject.library): No such file");
    });
}
