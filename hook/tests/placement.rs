//! Where proxies are accounted, and what they may use.

mod common;

use common::{Lab, succeeded, with_lab};
use ringfence_trials::{skip, tests};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        a_proxy_has_the_processors_of_its_container,
        the_administrators_processors_go_before_the_containers,
        a_busy_proxy_stays_within_its_containers_limit_and_cpus,
        a_proxy_with_hardly_any_processor_goes_with_its_container,
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
        lab.set_proxy("memory-max = \"48MiB\"\npids-max = 12");
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
        assert_eq!(read("pidsDIR/pids.max"), "12\n");
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

/// The last CPU that we may use ourselves: not the one on which everything else begins.
fn last_cpu() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    list.trim().rsplit([',', '-']).next().unwrap().to_owned()
}

/// What stands in the file `name` of the proxy's cgroup of version 1.
fn of_cgroup(lab: &Lab, controller: &str, name: &str) -> String {
    std::fs::read_to_string(cgroup_of(lab, controller).join(name)).unwrap().trim().to_owned()
}

/// The proxy's cgroup of version 1.
fn cgroup_of(lab: &Lab, controller: &str) -> PathBuf {
    let cgroup = std::fs::read_to_string(format!("/proc/{}/cgroup", lab.proxies()[0])).unwrap();
    let is_of = |line: &&str| line.split(':').nth(1).unwrap().split(',').any(|bound| bound == controller);
    let directory = cgroup.lines().find(is_of).unwrap().rsplit(':').next().unwrap().to_owned();
    PathBuf::from(format!("/sys/fs/cgroup/{controller}{directory}"))
}

/// By runc and by crun, which make and fill cgroups in ways of their own.
fn by_each_runtime(prepare: impl Fn(&mut Lab), test: impl Fn(&Lab)) {
    for runtime in ["runc", "crun"] {
        with_lab(|lab| {
            if !["cpu", "cpuset"].into_iter().all(version_1) {
                skip("needs the cpu and cpuset controllers of cgroup version 1");
            }
            prepare(lab);
            lab.script("sleep 60");
            let lab = &*lab;
            if runtime == "runc" {
                lab.create();
                test(lab);
                succeeded(&lab.runc(&["delete", "-f", &lab.id]));
                return;
            }
            std::thread::scope(|scope| {
                // Its output is open as long as the container lives.
                let run = scope.spawn(|| lab.crun(&["run", &lab.id]));
                let is_running = || {
                    let record = std::fs::read(lab.path("run/state").join(format!("{}.json", lab.id)));
                    let record = serde_json::from_slice(&record.unwrap_or_default()).unwrap_or(serde_json::Value::Null);
                    let program = std::fs::read(format!("/proc/{}/cmdline", record["init"]["pid"]));
                    program.is_ok_and(|program| program.starts_with(b"/bin/sh\0") || program.starts_with(b"sleep\0"))
                };
                lab.wait_until("the container's start", || run.is_finished() || is_running());
                if run.is_finished() {
                    let output = run.join().unwrap_or_else(|skipped| std::panic::resume_unwind(skipped));
                    panic!("{output:?}");
                }
                test(lab);
                // The one that runs it deletes it.
                succeeded(&lab.crun(&["kill", &lab.id, "KILL"]));
            });
        });
    }
}

fn a_proxy_has_the_processors_of_its_container() {
    let prepare = |lab: &mut Lab| {
        lab.edit(|config| {
            let cpu = json!({"quota": 10000, "period": 50000, "shares": 512, "cpus": last_cpu(), "mems": "0"});
            config["linux"]["resources"]["cpu"] = cpu;
        });
    };
    by_each_runtime(prepare, |lab| {
        assert_eq!(warnings(lab), [""; 0]);
        assert_eq!(of_cgroup(lab, "cpu", "cpu.cfs_quota_us"), "10000");
        assert_eq!(of_cgroup(lab, "cpu", "cpu.cfs_period_us"), "50000");
        assert_eq!(of_cgroup(lab, "cpu", "cpu.shares"), "512");
        assert_eq!(of_cgroup(lab, "cpuset", "cpuset.cpus"), last_cpu());
        assert_eq!(of_cgroup(lab, "cpuset", "cpuset.mems"), "0");
    });
}

fn the_administrators_processors_go_before_the_containers() {
    let prepare = |lab: &mut Lab| {
        lab.set_proxy(&format!("cpus = 0.25\ncpuset = \"{}\"\ncpu-weight = 50", last_cpu()));
        lab.edit(|config| config["linux"]["resources"]["cpu"] = json!({"quota": 10000, "shares": 256}));
    };
    by_each_runtime(prepare, |lab| {
        assert_eq!(warnings(lab), [""; 0]);
        assert_eq!(of_cgroup(lab, "cpu", "cpu.cfs_quota_us"), "25000");
        assert_eq!(of_cgroup(lab, "cpu", "cpu.shares"), "512");
        assert_eq!(of_cgroup(lab, "cpuset", "cpuset.cpus"), last_cpu());
    });
    // A CPU that is not there: the proxy starts with those of the parent, and it is said.
    let prepare = |lab: &mut Lab| lab.set_proxy("cpuset = \"8191\"\ncpus = \"unlimited\"");
    by_each_runtime(prepare, |lab| {
        let [warning] = &warnings(lab)[..] else { panic!("{:?}", warnings(lab)) };
        assert!(warning.starts_with("cpuset.cpus = 8191 is not enforced: /sys/fs/cgroup/cpuset/"), "{warning}");
        assert_eq!(of_cgroup(lab, "cpu", "cpu.cfs_quota_us"), "-1");
    });
}

/// The work that a container gives its proxy is no way around its own limits.
fn a_busy_proxy_stays_within_its_containers_limit_and_cpus() {
    let prepare = |lab: &mut Lab| {
        lab.configure("busy", "");
        lab.edit(|config| config["linux"]["resources"]["cpu"] = json!({"quota": 10000, "cpus": last_cpu()}));
    };
    by_each_runtime(prepare, |lab| {
        let proxy = lab.proxies()[0];
        // utime and stime in ticks, of which there are 100 in a second, and the CPU that it was last on.
        let stat = || {
            let stat = std::fs::read_to_string(format!("/proc/{proxy}/stat")).unwrap();
            let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().map(str::to_owned).collect();
            (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap(), fields[36].clone())
        };
        let (begin, (before, _)) = (Instant::now(), stat());
        std::thread::sleep(Duration::from_secs(2));
        let (elapsed, (after, cpu)) = (begin.elapsed(), stat());
        let used = (after - before) / 100.0 / elapsed.as_secs_f64();
        assert!(used < 0.3, "the limit is 0.1 CPUs, but the proxy took {used}");
        assert!(used > 0.0, "it did nothing: what is measured here?");
        assert_eq!(cpu, last_cpu());
        for task in std::fs::read_dir(format!("/proc/{proxy}/task")).unwrap() {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
            assert_eq!(allowed.trim(), last_cpu());
        }
    });
}

/// A process needs the processor even to be killed, and gets none while its limit is used up.
fn a_proxy_with_hardly_any_processor_goes_with_its_container() {
    with_lab(|lab| {
        if !version_1("cpu") {
            skip("needs the cpu controller of cgroup version 1");
        }
        lab.configure("busy", "");
        lab.create();
        let directory = cgroup_of(lab, "cpu");
        for (file, microseconds) in [("cpu.cfs_period_us", "1000000"), ("cpu.cfs_quota_us", "1000")] {
            std::fs::write(directory.join(file), microseconds).unwrap();
        }
        std::thread::sleep(Duration::from_secs(1));
        let begin = Instant::now();
        succeeded(&lab.runc(&["delete", "-f", &lab.id]));
        // A second for a proxy to do as it is told, and another for its being killed.
        assert!(begin.elapsed() < Duration::from_millis(1900), "{:?}", begin.elapsed());
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
    // With CAP_SYS_RESOURCE, that is.
    let mut shell = std::process::Command::new("bash");
    let lifts = shell.args(["-c", "ulimit -H -u unlimited 2>/dev/null"]).status().unwrap().success();
    for (said, expected) in [(None, "0"), (Some(500), "500")] {
        with_lab(|lab| {
            if let Some(said) = said {
                lab.edit(|config| config["process"]["oomScoreAdj"] = json!(said));
            }
            lab.write_config();
            // As an engine's service may have them; runc copies itself into memory, which counts as a file.
            let script = "ulimit -S -n 64; ulimit -S -f 100000; ulimit -S -l 16; ulimit -S -c 1000; ulimit -S -u 999; \
                echo 300 >/proc/self/oom_score_adj; exec runc --root runc create \"$0\" >said 2>&1 </dev/null";
            let mut command = std::process::Command::new("bash");
            let status = command.args(["-c", script, &lab.id]).current_dir(lab.path("")).status().unwrap();
            assert!(status.success(), "{}", std::fs::read_to_string(lab.path("said")).unwrap());
            let of = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", lab.proxies()[0])).unwrap();
            assert_eq!(of("oom_score_adj").trim(), expected);
            let limits = of("limits");
            for (name, file) in [
                ("Max open files", true),
                ("Max file size", true),
                ("Max locked memory", true),
                ("Max processes", true),
                ("Max core file size", false),
            ] {
                let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                let mut words = line.split_whitespace();
                let (soft, hard) = (words.next().unwrap(), words.next().unwrap());
                assert_eq!((soft, soft == "0"), (hard, !file), "{name}: {line}");
                // Others may count as the proxy's user.
                assert!(name != "Max processes" || hard == "unlimited" || !lifts, "{line}");
            }
            succeeded(&lab.runc(&["delete", "-f", &lab.id]));
        });
    }
}
