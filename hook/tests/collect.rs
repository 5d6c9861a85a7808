//! Listing containers, and collecting what is left of them.

mod common;

use common::{Lab, succeeded, with_lab};
use ringfence_trials::tests;
use serde_json::json;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        a_running_container_is_listed_and_not_collected,
        what_a_container_left_is_listed_and_collected,
        records_that_cannot_be_read_and_directories_without_any,
        a_container_whose_record_is_lost_keeps_its_proxy,
        an_orphaned_proxy_is_ended,
        mount_points_under_a_living_container_wait,
    ])
}

fn a_running_container_is_listed_and_not_collected() {
    with_lab(|lab| {
        lab.annotate(&[("enable", "true"), ("max-qp", "7")]);
        lab.create();
        let listed = ringfence_hook::containers(&lab.config()).unwrap();
        let [container] = listed.as_slice() else { panic!("{listed:?}") };
        assert_eq!((&container.id, container.device.as_str()), (&lab.id, "soft0"));
        assert!(container.init.unwrap().alive);
        let proxy = container.proxy.unwrap();
        assert_eq!((proxy.pid, proxy.alive), (lab.proxies()[0], true));
        assert_eq!(container.limits.as_ref().unwrap().max_qp, 7);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!((now - 60..=now).contains(&container.since));
        assert!(container.cgroups.iter().all(|path| path.is_dir()) && !container.cgroups.is_empty());
        assert!(container.memory.unwrap().own > 0);
        assert_eq!(container.warnings, [""; 0]);

        assert_eq!(lab.collect(), []);
        assert_eq!(lab.greet().unwrap(), "hello from the host");
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
    });
}

/// A container without poststop, whose end left all that there can be.
fn abandoned(lab: &mut Lab) {
    lab.hooks(&["createRuntime"], false);
    lab.create();
    succeeded(&lab.runc(&["delete", "-f", &lab.id]));
    lab.assert_proxy_ends();
}

fn what_a_container_left_is_listed_and_collected() {
    with_lab(|lab| {
        abandoned(lab);
        let listed = ringfence_hook::containers(&lab.config()).unwrap();
        assert!(listed[0].warnings[0].contains("ringfence gc removes what is left"), "{listed:?}");
        let collected = lab.collect();
        assert_eq!((collected.len(), &collected[0].container), (1, &lab.id));
        let what = collected[0].what.join("\n");
        for expected in ["run/state/", "/sys/fs/cgroup/", "rootfs/etc/ld.so.preload"] {
            assert!(what.contains(expected), "{expected} is not in\n{what}");
        }
        assert_eq!(lab.collect(), []);
    });
}

fn records_that_cannot_be_read_and_directories_without_any() {
    with_lab(|lab| {
        std::fs::create_dir_all(lab.path("run/containers/lost/mount")).unwrap();
        std::fs::create_dir_all(lab.path("run/state")).unwrap();
        std::fs::write(lab.path("run/containers/lost/launch.json"), "{").unwrap();
        std::fs::write(lab.path("run/state/broken.json"), "{\"container\":").unwrap();
        std::fs::write(lab.path("run/state/.half.json"), "{").unwrap();
        let names: Vec<_> = lab.collect().into_iter().map(|removed| removed.container).collect();
        assert_eq!(names, ["broken", "lost"]);
    });
}

fn a_container_whose_record_is_lost_keeps_its_proxy() {
    with_lab(|lab| {
        lab.script("sleep 60");
        lab.create();
        let record = lab.path("run/state").join(format!("{}.json", lab.id));
        let text = std::fs::read(&record).unwrap();
        for broken in [Some("{"), None] {
            match broken {
                Some(broken) => std::fs::write(&record, broken).unwrap(),
                None => std::fs::remove_file(&record).unwrap(),
            }
            let collected = ringfence_hook::collect(&lab.config()).unwrap();
            assert_eq!(collected.removed, []);
            assert!(
                collected.left[0].why.contains("its proxy") && collected.left[0].why.contains("runs"),
                "{collected:?}"
            );
            assert_eq!(lab.greet().unwrap(), "hello from the host");
        }
        std::fs::write(&record, text).unwrap();
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
    });
}

fn an_orphaned_proxy_is_ended() {
    with_lab(|lab| {
        // One that does not look after its container.
        lab.configure("mute", "");
        lab.set_proxy("");
        lab.hooks(&["createRuntime"], false);
        lab.edit(|config| config["hooks"]["createRuntime"][0]["timeout"] = json!(5));
        let path = lab.path("config.toml");
        std::fs::write(&path, std::fs::read_to_string(&path).unwrap().replace("= 2000", "= 60000")).unwrap();
        assert!(!lab.run().status.success());
        let proxies = lab.proxies();
        assert_eq!(proxies.len(), 1);
        let what = lab.collect().remove(0).what;
        assert!(what.contains(&format!("proxy {}", proxies[0])), "{what:?}");
        assert_eq!(lab.proxies(), [0; 0]);
    });
}

fn mount_points_under_a_living_container_wait() {
    with_lab(|lab| {
        lab.hooks(&["createRuntime"], false);
        lab.script("sleep 60");
        lab.create();
        let first = lab.id.clone();
        lab.id += "-second";
        lab.create();
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
        lab.id = first;
        // It noted no mount points: they were there.
        assert_eq!(lab.collect().len(), 1);
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
        assert_eq!(lab.collect().len(), 1);
    });
}
