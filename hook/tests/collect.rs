//! Listing containers, and collecting what is left of them.

mod common;

use common::{Lab, succeeded, with_lab};
use ringfence_trials::tests;
use serde_json::json;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        a_forged_record_makes_nobody_end_another_process,
        a_forged_record_removes_nothing_elsewhere,
        a_record_that_others_could_have_written_is_not_believed,
        orders_that_others_could_have_written_are_not_shown,
        a_running_container_is_listed_and_not_collected,
        what_a_container_left_is_listed_and_collected,
        records_that_cannot_be_read_and_directories_without_any,
        a_container_whose_record_is_lost_keeps_its_proxy,
        an_orphaned_proxy_is_ended,
        mount_points_under_a_living_container_wait,
        one_containers_mount_points_lie_in_anothers,
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

/// As when two start at once: one makes the directory and the other what is in it. In either order of their names.
fn one_containers_mount_points_lie_in_anothers() {
    for outer_is_first in [true, false] {
        with_lab(|lab| {
            abandoned(lab);
            let path = lab.path("run/state").join(format!("{}.json", lab.id));
            let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            let points = record["mount-points"].as_array().unwrap().clone();
            let (outer, inner): (Vec<_>, Vec<_>) =
                points.into_iter().partition(|point| !point["path"].as_str().unwrap().contains('/'));
            assert!(!outer.is_empty() && !inner.is_empty(), "{record}");
            let [first, second] = if outer_is_first { [outer, inner] } else { [inner, outer] };
            record["mount-points"] = first.into();
            std::fs::write(&path, record.to_string()).unwrap();
            let second_id = format!("{}-second", lab.id);
            (record["container"], record["cgroups"]) = (json!(second_id), json!([]));
            record["mount-points"] = second.into();
            std::fs::write(lab.path("run/state").join(format!("{second_id}.json")), record.to_string()).unwrap();
            assert_eq!(lab.collect().len(), 2);
        });
    }
}

/// A record of this lab's container as the hook would write it, were it not for `change`.
fn forge(lab: &Lab, id: &str, change: impl FnOnce(&mut serde_json::Value)) -> PathBuf {
    std::fs::create_dir_all(lab.path("run/state")).unwrap();
    let mut record = json!({"container": id, "init": {"pid": 1, "start": 1}, "proxy": null, "root": "/nonexistent",
        "mount-points": [], "cgroups": []});
    change(&mut record);
    let path = lab.path("run/state").join(format!("{id}.json"));
    std::fs::write(&path, record.to_string()).unwrap();
    path
}

/// What is listed of the one container, and what remains of its record once poststop came and once it was collected.
#[track_caller]
fn is_not_believed(lab: &Lab, id: &str, why: &str) {
    let listed = ringfence_hook::containers(&lab.config()).unwrap();
    let [container] = listed.as_slice() else { panic!("{listed:?}") };
    assert_eq!((container.id.as_str(), container.init, container.proxy), (id, None, None));
    assert!(container.warnings[0].starts_with("its record is not believed: "), "{listed:?}");
    assert!(container.warnings[0].contains(why), "{why}: {listed:?}");
    let mut state = lab.state(0);
    state["id"] = json!(id);
    let poststop = lab.hook("poststop", state.to_string().as_bytes());
    let said = String::from_utf8_lossy(&poststop.stderr).into_owned();
    assert!(!poststop.status.success() && said.contains(why), "{why}: {said}");
    let collected = lab.collect();
    let [removed] = collected.as_slice() else { panic!("{collected:?}") };
    assert_eq!(removed.container, id);
    assert!(removed.what.last().unwrap().contains(why), "{collected:?}");
    assert!(ringfence_hook::containers(&lab.config()).unwrap().is_empty());
    assert!(lab.path("run/state").join(format!("{id}.json")).symlink_metadata().is_err());
}

fn a_forged_record_makes_nobody_end_another_process() {
    with_lab(|lab| {
        let mut child = std::process::Command::new("/bin/sleep").arg("600").spawn().unwrap();
        let pid = child.id();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let start: u64 = stat.rsplit(')').next().unwrap().split_whitespace().nth(19).unwrap().parse().unwrap();
        lab.wait_until("the program's start", || {
            std::fs::read(format!("/proc/{pid}/cmdline")).unwrap().starts_with(b"/bin/sleep")
        });
        forge(lab, "forged", |record| record["proxy"] = json!({"pid": pid, "start": start}));
        is_not_believed(
            lab,
            "forged",
            &format!("it names process {pid} as its proxy, which is another program: /bin/sleep"),
        );
        // Neither does a hook that makes a container of that id.
        let id = lab.id.clone();
        forge(lab, &id, |record| record["proxy"] = json!({"pid": pid, "start": start}));
        lab.create();
        assert_eq!(lab.greet().unwrap(), "hello from the host");
        succeeded(&lab.runc(&["delete", "-f", &id]));
        assert!(child.try_wait().unwrap().is_none(), "it was ended");
        child.kill().unwrap();
        child.wait().unwrap();
    });
}

fn a_forged_record_removes_nothing_elsewhere() {
    with_lab(|lab| {
        let elsewhere = lab.path("elsewhere");
        let keep = elsewhere.join("ringfence-forged");
        std::fs::create_dir_all(&keep).unwrap();
        std::fs::create_dir(elsewhere.join("etc")).unwrap();
        std::fs::create_dir(elsewhere.join("home")).unwrap();
        forge(lab, "forged", |record| record["cgroups"] = json!([keep]));
        is_not_believed(lab, "forged", "it names the cgroup");
        for path in ["home", "etc/../home", "../elsewhere/home"] {
            forge(lab, "forged", |record| {
                record["root"] = json!(elsewhere);
                record["mount-points"] = json!([{"path": path, "directory": true}]);
            });
            is_not_believed(lab, "forged", "it names the mount point");
        }
        forge(lab, "forged", |record| record["unit"] = json!("ssh.service"));
        is_not_believed(lab, "forged", "it names the unit");
        forge(lab, "forged", |record| {
            record["container"] = json!("other");
            record["root"] = json!(elsewhere);
            record["mount-points"] = json!([{"path": "etc", "directory": true}]);
        });
        is_not_believed(lab, "forged", "it is of container \"other\"");
        assert!(keep.is_dir() && elsewhere.join("home").is_dir() && elsewhere.join("etc").is_dir());
        std::fs::remove_dir_all(elsewhere).unwrap();
    });
}

fn a_record_that_others_could_have_written_is_not_believed() {
    with_lab(|lab| {
        let path = forge(lab, "forged", |_| ());
        std::os::unix::fs::chown(&path, Some(65534), Some(65534)).unwrap();
        is_not_believed(lab, "forged", "it belongs to uid 65534");
        let path = forge(lab, "forged", |_| ());
        std::fs::set_permissions(&path, Permissions::from_mode(0o664)).unwrap();
        is_not_believed(lab, "forged", "mode 664");
        let path = forge(lab, "forged", |_| ());
        let elsewhere = lab.path("elsewhere.json");
        std::fs::rename(&path, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        is_not_believed(lab, "forged", "it is a symbolic link");
        assert!(elsewhere.exists());
        // A whole directory of them.
        std::fs::set_permissions(lab.path("run/state"), Permissions::from_mode(0o777)).unwrap();
        let said = ringfence_hook::containers(&lab.config()).unwrap_err().to_string();
        assert!(said.contains("its directory state is not believed: it belongs to uid 0 and has mode 777"), "{said}");
        assert!(ringfence_hook::collect(&lab.config()).is_err());
        lab.refused(1, &format!("records in {}: its directory state is not believed", lab.path("run").display()));
        std::fs::set_permissions(lab.path("run/state"), Permissions::from_mode(0o700)).unwrap();
    });
}

fn orders_that_others_could_have_written_are_not_shown() {
    with_lab(|lab| {
        lab.create();
        let limits = || ringfence_hook::containers(&lab.config()).unwrap().remove(0).limits;
        assert!(limits().is_some());
        let launch = lab.path("run/containers").join(&lab.id).join("launch.json");
        std::fs::set_permissions(&launch, Permissions::from_mode(0o622)).unwrap();
        assert!(limits().is_none());
        std::fs::set_permissions(&launch, Permissions::from_mode(0o600)).unwrap();
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
    });
}
