//! The proxy shares its container's life, however that ends, and nothing is left.

mod common;

use common::{HOOK, Lab, succeeded, with_lab};
use ringfence_trials::tests;
use serde_json::{Value, json};
use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    ringfence_trials::main(tests![
        the_hook_twice_for_one_container_changes_nothing,
        one_id_for_two_containers_at_once_is_given_to_one,
        a_record_makes_no_container_joined_that_has_no_proxy,
        a_damaged_record_gives_nobody_the_id_of_a_running_container,
        a_lock_that_is_never_released_is_told,
        poststop_before_the_end_changes_nothing,
        a_hook_killed_at_any_moment_leaves_nothing_after_collection,
        an_init_killed_while_the_hook_waits_fails_the_hook,
        a_program_that_is_not_there,
        a_container_that_runs_out_of_memory,
        a_paused_container_keeps_its_proxy,
        exec_sessions_do_not_keep_the_proxy,
        containers_that_share_a_pid_namespace_end_on_their_own,
        other_hooks_that_fail_before_and_after_ours,
        other_hooks_beside_ours,
        standard_input_that_is_never_closed,
        a_bundle_that_nobody_can_write,
        links_on_the_way_to_the_bundle_and_the_root,
        every_proxy_ends_when_the_containers_runtime_is_killed_with_it,
    ])
}

fn delete(lab: &Lab) {
    succeeded(&lab.runc(&["delete", "-f", &lab.id]));
}

fn start(lab: &Lab) {
    lab.create();
    succeeded(&lab.runc(&["start", &lab.id]));
}

fn init(lab: &Lab) -> i64 {
    lab.record(&lab.id)["init"]["pid"].as_i64().unwrap()
}

fn kill(pid: i64) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

fn hook_ok(lab: &Lab, stage: &str, state: &Value) {
    let output = lab.hook(stage, state.to_string().as_bytes());
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}

fn the_hook_twice_for_one_container_changes_nothing() {
    with_lab(|lab| {
        lab.script("sleep 60");
        start(lab);
        let (proxies, record) = (lab.proxies(), lab.record(&lab.id));
        hook_ok(lab, "createRuntime", &lab.state(init(lab)));
        assert_eq!((lab.proxies(), lab.record(&lab.id)), (proxies, record));
        delete(lab);
    });
}

/// runc keeps ids apart within one `--root` only.
fn one_id_for_two_containers_at_once_is_given_to_one() {
    with_lab(|lab| {
        lab.write_config();
        for _ in 0..20 {
            let mut inits: Vec<_> = (0..2).map(|_| init_alone(lab)).collect();
            let states: Vec<_> = inits.iter().map(|init| lab.state(init.id().into()).to_string()).collect();
            let codes: Vec<_> = std::thread::scope(|scope| {
                let hooks: Vec<_> =
                    states.iter().map(|state| scope.spawn(|| lab.hook("createRuntime", state.as_bytes()))).collect();
                hooks.into_iter().map(|hook| hook.join().unwrap().status.code().unwrap()).collect()
            });
            let [joined, refused] = codes[..] else { unreachable!() };
            assert!([(0, 10), (10, 0)].contains(&(joined, refused)), "{codes:?}");
            let winner = usize::from(joined != 0);
            assert_eq!(init(lab), i64::from(inits[winner].id()));
            assert_eq!(lab.greet().unwrap(), "hello from the host");
            for init in &mut inits {
                init.kill().unwrap();
                init.wait().unwrap();
            }
            hook_ok(lab, "poststop", &lab.state(0));
        }
    });
}

/// As a hook that did not finish would leave it, and as only root could forge it.
fn a_record_makes_no_container_joined_that_has_no_proxy() {
    with_lab(|lab| {
        lab.write_config();
        let mut other = Command::new("/bin/sleep").arg("600").spawn().unwrap();
        lab.wait_until("the program's start", || {
            std::fs::read(format!("/proc/{}/cmdline", other.id())).unwrap().starts_with(b"/bin/sleep")
        });
        for named in [None, Some(other.id())] {
            let mut init = init_alone(lab);
            let process = |pid: u32| {
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
                let start = stat.rsplit(')').next().unwrap().split_whitespace().nth(19).unwrap().parse::<u64>();
                json!({"pid": pid, "start": start.unwrap()})
            };
            let record = json!({"container": lab.id, "init": process(init.id()), "proxy": named.map(process),
                "root": lab.path("rootfs"), "mount-points": [], "cgroups": []});
            std::fs::create_dir_all(lab.path("run/state")).unwrap();
            std::fs::write(lab.path("run/state").join(format!("{}.json", lab.id)), record.to_string()).unwrap();
            hook_ok(lab, "createRuntime", &lab.state(init.id().into()));
            assert_eq!(lab.greet().unwrap(), "hello from the host", "{named:?}");
            assert!(other.try_wait().unwrap().is_none(), "it was ended");
            init.kill().unwrap();
            init.wait().unwrap();
            hook_ok(lab, "poststop", &lab.state(0));
        }
        other.kill().unwrap();
        other.wait().unwrap();
    });
}

fn a_damaged_record_gives_nobody_the_id_of_a_running_container() {
    with_lab(|lab| {
        lab.script("sleep 60");
        start(lab);
        let path = lab.path("run/state").join(format!("{}.json", lab.id));
        let text = std::fs::read(&path).unwrap();
        std::fs::write(&path, "{").unwrap();
        let mut another = init_alone(lab);
        let output = lab.hook("createRuntime", lab.state(another.id().into()).to_string().as_bytes());
        let said = String::from_utf8_lossy(&output.stderr);
        let expected = format!("ringfence-hook: E10 container id {} has a proxy already (pid ", lab.id);
        assert!(output.status.code() == Some(10) && said.starts_with(&expected), "{said}");
        assert_eq!(lab.greet().unwrap(), "hello from the host");
        another.kill().unwrap();
        another.wait().unwrap();
        std::fs::write(&path, text).unwrap();
        delete(lab);
    });
}

/// A process with a mount namespace such as runc makes, for the hook to take for a container's init.
fn init_alone(lab: &Lab) -> std::process::Child {
    let script = "mount --bind rootfs rootfs && mount -t tmpfs tmpfs rootfs/dev && echo && exec sleep 60";
    let mut child = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .current_dir(lab.path(""))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    child
}

fn a_lock_that_is_never_released_is_told() {
    with_lab(|lab| {
        lab.output();
        let locked = std::fs::File::open(lab.path("run/state")).unwrap();
        rustix::fs::flock(&locked, rustix::fs::FlockOperation::LockExclusive).unwrap();
        lab.refused(1, &format!("records in {}: state has been locked for 10 s", lab.path("run").display()));
        drop(locked);
        lab.output();
    });
}

fn poststop_before_the_end_changes_nothing() {
    with_lab(|lab| {
        lab.script("sleep 60");
        start(lab);
        for pid in [init(lab), 0] {
            hook_ok(lab, "poststop", &lab.state(pid));
        }
        assert_eq!(lab.greet().unwrap(), "hello from the host");
        delete(lab);
        hook_ok(lab, "poststop", &lab.state(0));
    });
}

fn a_hook_killed_at_any_moment_leaves_nothing_after_collection() {
    with_lab(|lab| {
        lab.hooks(&["createRuntime"], false);
        let (mut killed, mut done) = (0, 0);
        for step in 0..60 {
            lab.edit(|config| {
                let hook = &mut config["hooks"]["createRuntime"][0];
                hook["path"] = json!("/usr/bin/timeout");
                let after = format!("{}", 0.0005 * f64::from(step));
                hook["args"] = json!(["timeout", "-s", "KILL", after, HOOK, "createRuntime"]);
            });
            match lab.run().status.success() {
                true => done += 1,
                false => killed += 1,
            }
            // Every other one is cleaned up after by the next hook of the same id.
            if step % 2 == 0 {
                lab.collect();
                lab.assert_clean();
            }
        }
        assert!(killed > 5 && done > 0, "{killed} hooks were killed, {done} were not");
        lab.collect();
    });
}

fn an_init_killed_while_the_hook_waits_fails_the_hook() {
    with_lab(|lab| {
        lab.configure("mute", "");
        lab.set_proxy("ready-timeout-ms = 20000");
        let path = lab.path("config.toml");
        std::fs::write(&path, std::fs::read_to_string(&path).unwrap().replace("ready-timeout-ms = 60000\n", ""))
            .unwrap();
        lab.write_config();
        let begin = Instant::now();
        let run = lab.runc_command().args(["run", &lab.id]).stderr(Stdio::piped()).spawn().unwrap();
        lab.wait_until("the proxy", || !lab.proxies().is_empty());
        kill(init(lab));
        let output = run.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("E10 the container's init ended while its proxy was starting"), "{text}");
        assert!(begin.elapsed() < Duration::from_secs(10));
    });
}

fn a_program_that_is_not_there() {
    with_lab(|lab| {
        lab.edit(|config| config["process"]["args"] = json!(["/nonexistent"]));
        let output = lab.run();
        assert!(!output.status.success());
        // runc has called poststop.
        lab.assert_clean();
        let output = lab.crun(&["run", &lab.id]);
        assert!(!output.status.success());
        lab.assert_proxy_ends();
        // crun has not.
        assert_eq!(lab.collect().len(), 1);
    });
}

fn a_container_that_runs_out_of_memory() {
    with_lab(|lab| {
        lab.edit(|config| config["linux"]["resources"]["memory"] = json!({"limit": 16 << 20}));
        // One line without end.
        lab.edit(|config| config["process"]["args"] = json!(["/bin/grep", "x", "/dev/zero"]));
        let output = lab.run();
        assert_eq!(output.status.code(), Some(137), "{output:?}");
    });
}

fn a_paused_container_keeps_its_proxy() {
    with_lab(|lab| {
        lab.script("sleep 60");
        start(lab);
        let proxies = lab.proxies();
        succeeded(&lab.runc(&["pause", &lab.id]));
        assert_eq!(lab.greet().unwrap(), "hello from the host");
        succeeded(&lab.runc(&["resume", &lab.id]));
        assert_eq!(lab.greet().unwrap(), "hello from the host");
        assert_eq!(lab.proxies(), proxies);
        delete(lab);
    });
}

fn exec_sessions_do_not_keep_the_proxy() {
    for host_pids in [false, true] {
        with_lab(|lab| {
            if host_pids {
                lab.edit(|config| {
                    config["linux"]["namespaces"]
                        .as_array_mut()
                        .unwrap()
                        .retain(|namespace| namespace["type"] != "pid");
                });
            }
            lab.script("sleep 60");
            start(lab);
            let mut command = lab.runc_command();
            command.args(["exec", &lab.id, "/bin/sh", "-c", "echo up; exec sleep 61"]).stdout(Stdio::piped());
            let mut session = command.spawn().unwrap();
            let mut up = [0; 3];
            session.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
            kill(init(lab));
            lab.assert_proxy_ends();
            delete(lab);
            session.wait().unwrap();
        });
    }
}

fn containers_that_share_a_pid_namespace_end_on_their_own() {
    with_lab(|lab| {
        lab.script("sleep 60");
        start(lab);
        let first = init(lab);
        let second = format!("{}-second", lab.id);
        lab.edit(|config| {
            for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
                if namespace["type"] == "pid" {
                    namespace["path"] = json!(format!("/proc/{first}/ns/pid"));
                }
            }
        });
        // runc ends all that is in the cgroup of a container without a PID namespace of its own.
        lab.edit(|config| config["linux"]["cgroupsPath"] = json!(format!("/{second}")));
        lab.script("true");
        lab.write_config();
        succeeded(&lab.runc_command().args(["run", &second]).output().unwrap());
        assert_eq!(lab.proxies().len(), 1);
        assert_eq!(lab.greet().unwrap(), "hello from the host");
        delete(lab);
    });
}

/// Like all hooks for crun it has to read the state: who writes to a closed pipe dies of SIGPIPE.
fn other_hook(script: &str) -> serde_json::Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"]})
}

fn other_hooks_that_fail_before_and_after_ours() {
    for before in [true, false] {
        with_lab(|lab| {
            let failing = other_hook("cat >/dev/null; false");
            lab.edit(|config| {
                let hooks = config["hooks"]["createRuntime"].as_array_mut().unwrap();
                hooks.insert(if before { 0 } else { 1 }, failing);
            });
            assert!(!lab.run().status.success());
            lab.assert_clean();
            let output = lab.crun(&["run", &lab.id]);
            assert!(!output.status.success());
            lab.assert_proxy_ends();
            // crun calls no poststop then.
            assert_eq!(lab.collect().len(), usize::from(!before));
        });
    }
}

fn other_hooks_beside_ours() {
    with_lab(|lab| {
        let other = other_hook("cat >/dev/null");
        lab.edit(|config| {
            for stage in ["createRuntime", "poststop"] {
                let hooks = config["hooks"][stage].as_array_mut().unwrap();
                hooks.insert(0, other.clone());
                hooks.push(other.clone());
            }
        });
        lab.script("cat /etc/ld.so.preload");
        assert_eq!(lab.output(), "/etc/ld.so.ringfence/preload-like-libasan.so\n");
        let output = lab.crun(&["run", &lab.id]);
        assert_eq!(succeeded(&output), "/etc/ld.so.ringfence/preload-like-libasan.so\n");
    });
}

fn standard_input_that_is_never_closed() {
    with_lab(|lab| {
        let begin = Instant::now();
        let mut child = Command::new(HOOK)
            .arg("createRuntime")
            .env("RINGFENCE_CONFIG", lab.path("config.toml"))
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let open = child.stdin.take();
        let output = child.wait_with_output().unwrap();
        drop(open);
        let expected = "ringfence-hook: E10 the container state on standard input cannot be read: \
            it was not closed within 5 s, as the OCI runtime must do after the state\n";
        assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(10), expected));
        assert!(begin.elapsed() < Duration::from_secs(8));
    });
}

/// A bundle elsewhere, whose root file system is this lab's.
fn other_bundle(lab: &mut Lab, name: &str) {
    std::fs::create_dir(lab.path(name)).unwrap();
    let root = lab.path("rootfs");
    lab.edit(|config| config["root"]["path"] = json!(root));
    lab.script("cat /etc/ld.so.preload");
    lab.write_config();
    std::fs::rename(lab.path("config.json"), lab.path(name).join("config.json")).unwrap();
}

fn a_bundle_that_nobody_can_write() {
    with_lab(|lab| {
        other_bundle(lab, "bundle");
        let output = lab.run_after(
            "mount --bind bundle bundle && mount -o remount,bind,ro bundle && cd bundle && set -- \"$0\" && \
             exec runc --root ../runc run \"$1\"",
        );
        assert_eq!(succeeded(&output), "/etc/ld.so.ringfence/preload-like-libasan.so\n");
    });
}

fn links_on_the_way_to_the_bundle_and_the_root() {
    with_lab(|lab| {
        let (link, rootfs) = (lab.path("link"), lab.path("rootfs"));
        std::os::unix::fs::symlink(lab.path(""), &link).unwrap();
        other_bundle(lab, "bundle");
        let run = |lab: &Lab| {
            let mut command = Command::new("runc");
            command.arg("--root").arg(lab.path("runc")).arg("run").arg("--bundle").arg(link.join("bundle"));
            command.arg(&lab.id).stdin(Stdio::null()).output().unwrap()
        };
        assert_eq!(succeeded(&run(lab)), "/etc/ld.so.ringfence/preload-like-libasan.so\n");
        // The root itself as a link is refused by runc, and followed by crun.
        std::os::unix::fs::symlink(&rootfs, lab.path("root-link")).unwrap();
        let root = lab.path("root-link");
        lab.edit(|config| config["root"]["path"] = json!(root));
        assert_eq!(succeeded(&lab.crun(&["run", &lab.id])), "/etc/ld.so.ringfence/preload-like-libasan.so\n");
    });
}

fn every_proxy_ends_when_the_containers_runtime_is_killed_with_it() {
    with_lab(|lab| {
        lab.hooks(&["createRuntime"], false);
        lab.script("sleep 60");
        lab.write_config();
        // In the foreground runc is the parent, as a shim is.
        let mut command = lab.runc_command();
        let mut run = command.args(["run", &lab.id]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let runs = || String::from_utf8_lossy(&lab.runc(&["state", &lab.id]).stdout).contains("\"running\"");
        lab.wait_until("the container", runs);
        run.kill().unwrap();
        run.wait().unwrap();
        // The container lives on, and so does its proxy.
        assert_eq!(lab.greet().unwrap(), "hello from the host");
        kill(init(lab));
        lab.assert_proxy_ends();
        delete(lab);
        assert_eq!(lab.collect().len(), 1);
    });
}
