//! Where proxies are accounted, and what they may use.

mod common;

use common::{Lab, succeeded, with_lab};
use ringfence_trials::{skip, tests};
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        a_proxy_is_beside_its_container_with_limits_of_its_own,
        inherit_leaves_a_proxy_with_the_runtime,
        version_2_alone,
        the_containers_own_rdma_limits_are_the_proxys,
        a_proxy_that_takes_too_much_memory_is_killed_alone,
        the_score_is_the_containers_and_limits_are_no_engines,
    ])
}

/// Paths of the proxy's cgroups that are its own.
fn own_cgroups(lab: &Lab) -> Vec<String> {
    let cgroup = std::fs::read_to_string(format!("/proc/{}/cgroup", lab.proxies()[0])).unwrap();
    let name = format!("/ringfence-{}", lab.id);
    cgroup.lines().filter(|line| line.ends_with(&name)).map(str::to_owned).collect()
}

fn warnings(lab: &Lab) -> Vec<String> {
    serde_json::from_value(lab.record(&lab.id)["warnings"].clone()).unwrap()
}

fn version_1(controller: &str) -> bool {
    Path::new("/sys/fs/cgroup").join(controller).join("tasks").exists()
}

fn a_proxy_is_beside_its_container_with_limits_of_its_own() {
    with_lab(|lab| {
        if !version_1("memory") || !version_1("pids") {
            skip("needs the memory and pids controllers of cgroup version 1");
        }
        lab.set_proxy("memory-max = \"48MiB\"\npids-max = 7");
        lab.edit(|config| config["linux"]["cgroupsPath"] = json!("/rf-test-parent/x"));
        lab.create();
        assert_eq!(warnings(lab), [""; 0]);
        let own = own_cgroups(lab);
        assert!(own.len() >= 3 && own.iter().all(|line| line.contains(":/rf-test-parent/ringfence-")), "{own:?}");
        let read = |path: &str| {
            let directory = format!("/rf-test-parent/ringfence-{}", lab.id);
            std::fs::read_to_string(format!("/sys/fs/cgroup/{}", path.replace("DIR", &directory))).unwrap()
        };
        assert_eq!(read("memoryDIR/memory.limit_in_bytes"), "50331648\n");
        assert_eq!(read("pidsDIR/pids.max"), "7\n");
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
        // runc leaves a parent that it made: it is to be empty.
        for controller in std::fs::read_dir("/sys/fs/cgroup").unwrap() {
            let parent = controller.unwrap().path().join("rf-test-parent");
            if parent.exists() {
                std::fs::remove_dir(&parent).unwrap();
            }
        }
    });
}

fn inherit_leaves_a_proxy_with_the_runtime() {
    with_lab(|lab| {
        lab.set_proxy("cgroup = \"inherit\"");
        lab.create();
        let cgroups = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert_eq!(cgroups(&lab.proxies()[0].to_string()), cgroups("self"));
        assert_eq!((warnings(lab), lab.record(&lab.id)["cgroups"].clone()), (vec![], json!([])));
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
    });
}

fn version_2_alone() {
    with_lab(|lab| {
        lab.script("sleep 60");
        lab.write_config();
        let script = "umount -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && \
            runc --root runc create \"$0\" >/dev/null 2>&1 </dev/null && \
            grep -l . /sys/fs/cgroup/ringfence-$0/cgroup.procs && cat /sys/fs/cgroup/ringfence-$0/cgroup.procs && \
            cp run/state/$0.json record.json && runc --root runc delete -f \"$0\" && ! ls -d /sys/fs/cgroup/ringfence-$0";
        let output = std::process::Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", script, &lab.id])
            .current_dir(lab.path(""))
            .output()
            .unwrap();
        let text = succeeded(&output);
        let record: serde_json::Value =
            serde_json::from_slice(&std::fs::read(lab.path("record.json")).unwrap()).unwrap();
        let directory = format!("/sys/fs/cgroup/ringfence-{}", lab.id);
        assert_eq!(text, format!("{directory}/cgroup.procs\n{}\n", record["proxy"]["pid"]));
        assert_eq!(record["cgroups"], json!([directory]));
        // On hosts whose controllers are all bound to version 1.
        if version_1("pids") {
            let expected = format!("pids-max = 64 is not enforced: the pids controller is not enabled for {directory}");
            assert_eq!(record["warnings"], json!([expected]));
        }
    });
}

fn the_containers_own_rdma_limits_are_the_proxys() {
    with_lab(|lab| {
        if std::fs::read_to_string("/proc/cgroups").unwrap().contains("rdma") {
            skip("this kernel has the rdma controller, but no device mlx5_7 to limit");
        }
        // runc itself fails where it cannot set them: only the hook is to read of them.
        let limited = lab.path("limited.json");
        let copy = json!({"path": "/bin/cp", "args": ["cp", limited, lab.path("config.json")]});
        lab.edit(|config| config["hooks"]["createRuntime"].as_array_mut().unwrap().insert(0, copy));
        lab.edit(|config| {
            config["linux"]["resources"]["rdma"] =
                json!({"mlx5_7": {"hcaHandles": 3, "hcaObjects": 10000}, "../x": {"hcaHandles": 1}});
        });
        lab.write_config();
        std::fs::rename(lab.path("config.json"), &limited).unwrap();
        lab.edit(|config| _ = config["linux"]["resources"].as_object_mut().unwrap().remove("rdma"));
        lab.create();
        let what = "linux.resources.rdma = mlx5_7 hca_handle=3 hca_object=10000";
        let warnings = warnings(lab);
        // By version 2, which may have other controllers, or by version 1.
        let v2 = format!(
            "{what} is not enforced: the rdma controller is not enabled for /sys/fs/cgroup/ringfence-{}",
            lab.id
        );
        let expected =
            if version_1("pids") { format!("{what} is not enforced: the rdma controller is not there") } else { v2 };
        assert_eq!(warnings.last(), Some(&expected), "{warnings:?}");
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
    });
}

fn a_proxy_that_takes_too_much_memory_is_killed_alone() {
    with_lab(|lab| {
        if !version_1("memory") {
            skip("needs the memory controller of cgroup version 1");
        }
        lab.configure("hungry", "");
        lab.set_proxy("memory-max = \"16MiB\"");
        lab.script("sleep 60");
        lab.create();
        succeeded(&lab.runc(&["start", &lab.id]));
        assert!(lab.greet().is_err_or_empty());
        lab.assert_proxy_ends();
        // A process that is being killed has no program any more, and still some memory to give back.
        let listed = || ringfence_hook::containers(&lab.config()).unwrap().remove(0);
        lab.wait_until("the proxy's end", || !listed().proxy.unwrap().alive);
        let container = listed();
        assert!(container.init.unwrap().alive);
        assert!(container.warnings[0].contains("has ended, so that all its verbs fail"), "{container:?}");
        // A later client is refused at once.
        assert_eq!(lab.greet().unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        succeeded(&lab.runc(&["exec", &lab.id, "/bin/true"]));
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
    });
}

trait Greeting {
    fn is_err_or_empty(&self) -> bool;
}

impl Greeting for std::io::Result<String> {
    fn is_err_or_empty(&self) -> bool {
        self.as_ref().map_or(true, String::is_empty)
    }
}

fn the_score_is_the_containers_and_limits_are_no_engines() {
    for (said, expected) in [(None, "0"), (Some(500), "500")] {
        with_lab(|lab| {
            if let Some(said) = said {
                lab.edit(|config| config["process"]["oomScoreAdj"] = json!(said));
            }
            lab.write_config();
            // As an engine's service may have them.
            let script = "ulimit -S -n 64; ulimit -S -f 1000; ulimit -S -l 16; ulimit -S -c 1000; \
                echo 300 >/proc/self/oom_score_adj; exec runc --root runc create \"$0\" >/dev/null 2>&1 </dev/null";
            let mut command = std::process::Command::new("bash");
            assert!(command.args(["-c", script, &lab.id]).current_dir(lab.path("")).status().unwrap().success());
            let of = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", lab.proxies()[0])).unwrap();
            assert_eq!(of("oom_score_adj").trim(), expected);
            let limits = of("limits");
            for (name, file) in [
                ("Max open files", true),
                ("Max file size", true),
                ("Max locked memory", true),
                ("Max core file size", false),
            ] {
                let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                let mut words = line.split_whitespace();
                let (soft, hard) = (words.next().unwrap(), words.next().unwrap());
                assert_eq!((soft, soft == "0"), (hard, !file), "{name}: {line}");
            }
            succeeded(&lab.runc(&["delete", "-f", &lab.id]));
        });
    }
}
