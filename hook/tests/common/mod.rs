//! A bundle, a configuration and a stand-in for the proxy, in a directory of their own.

// Each test program uses some of this.
#![allow(dead_code)]

use ringfence_trials::{needs_root, skip};
use serde_json::{Value, json};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub const HOOK: &str = env!("CARGO_BIN_EXE_ringfence-hook");

/// The library that is injected; any without dependencies of its own will do.
const LIBRARY: &str = "/lib/x86_64-linux-gnu/libanl.so.1";

pub struct Lab {
    directory: tempfile::TempDir,
    pub id: String,
    config: Value,
    clean: Vec<String>,
}

/// Runs `test` in a lab, if containers can be made here.
#[track_caller]
pub fn with_lab(test: impl FnOnce(&mut Lab)) {
    needs_root("it makes containers");
    let mut lab = Lab::new();
    test(&mut lab);
    lab.assert_clean();
}

impl Lab {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let directory = tempfile::Builder::new().prefix("ringfence-hook-").tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let id = format!("rf-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mut lab = Self { directory, id, config: Value::Null, clean: Vec::new() };
        lab.make_rootfs();
        let made = Command::new("runc").arg("spec").current_dir(lab.path("")).output().expect("runc is installed");
        assert!(made.status.success(), "{made:?}");
        lab.config = serde_json::from_slice(&std::fs::read(lab.path("config.json")).unwrap()).unwrap();
        lab.config["process"]["terminal"] = json!(false);
        lab.config["root"]["readonly"] = json!(false);
        // In no slice: under systemd the proxy would be in a scope, as integration/vm/tests/runtimes.sh has it.
        lab.config["linux"]["cgroupsPath"] = json!(format!("/{}", lab.id));
        lab.annotate(&[("enable", "true")]);
        lab.hooks(&["createRuntime"], true);
        lab.script("true");
        lab.configure("ready", "");
        lab.clean = lab.listing();
        lab
    }

    fn make_rootfs(&self) {
        for directory in ["bin", "proc", "dev", "sys", "lib64", "lib/x86_64-linux-gnu", "tmp"] {
            std::fs::create_dir_all(self.path("rootfs").join(directory)).unwrap();
        }
        for (from, to) in [
            ("/bin/busybox", "bin/busybox"),
            ("/bin/cat", "bin/cat"),
            ("/lib64/ld-linux-x86-64.so.2", "lib64/ld-linux-x86-64.so.2"),
            ("/lib/x86_64-linux-gnu/libc.so.6", "lib/x86_64-linux-gnu/libc.so.6"),
        ] {
            std::fs::copy(from, self.path("rootfs").join(to)).unwrap_or_else(|error| panic!("{from}: {error}"));
        }
        for applet in ["sh", "ls", "grep", "head", "sleep", "true"] {
            symlink("busybox", self.path("rootfs/bin").join(applet)).unwrap();
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Changes `config.json` of the bundle.
    pub fn edit(&mut self, edit: impl FnOnce(&mut Value)) {
        edit(&mut self.config);
    }

    /// Gives each container of this bundle a control group of its own, named by its id: runc fails where two set the device rules
    /// of one at once.
    pub fn part_cgroups(&mut self) {
        self.config["linux"].as_object_mut().unwrap().remove("cgroupsPath");
    }

    /// Sets the annotations, whose prefix is added.
    pub fn annotate(&mut self, annotations: &[(&str, &str)]) {
        let pairs = annotations.iter().map(|(key, value)| (format!("ringfence.dev/{key}"), json!(value)));
        self.config["annotations"] = Value::Object(pairs.collect());
    }

    /// Registers the hook for `stages` and perhaps for poststop.
    pub fn hooks(&mut self, stages: &[&str], poststop: bool) {
        let environment = format!("RINGFENCE_CONFIG={}", self.path("config.toml").display());
        let mut hooks = serde_json::Map::new();
        for stage in stages.iter().copied().chain(poststop.then_some("poststop")) {
            let entry = json!([{"path": HOOK, "args": ["ringfence-hook", stage], "env": [environment], "timeout": 20}]);
            hooks.insert(stage.into(), entry);
        }
        self.config["hooks"] = Value::Object(hooks);
    }

    /// Has the hook called with `--policy` at all stages, or at none.
    pub fn hook_policy(&mut self, policy: Option<&str>) {
        for (stage, entries) in self.config["hooks"].as_object_mut().unwrap() {
            let mut arguments = vec!["ringfence-hook", stage];
            arguments.extend(policy.iter().flat_map(|policy| ["--policy", policy]));
            entries[0]["args"] = json!(arguments);
        }
    }

    /// What the container runs.
    pub fn script(&mut self, script: &str) {
        self.config["process"]["args"] = json!(["/bin/sh", "-c", script]);
    }

    /// Writes the administrator's configuration: the stand-in `proxy`, and `more`.
    pub fn configure(&self, proxy: &str, more: &str) {
        let example = Path::new(HOOK).with_file_name("examples").join("fake-proxy");
        if !self.path(proxy).exists() && proxy != "missing" {
            std::fs::copy(&example, self.path(proxy)).unwrap_or_else(|error| {
                panic!("{}: {error}; `cargo build -p ringfence-hook --examples` makes it", example.display())
            });
        }
        let here = self.directory.path().display();
        let text = format!(
            "run-dir = \"{here}/run\"\n[inject]\nlibrary = \"{LIBRARY}\"\n{more}\n[proxy]\npath = \"{here}/{proxy}\"\nready-timeout-ms = 60000\n"
        );
        std::fs::write(self.path("config.toml"), text).unwrap();
    }

    /// Adds a line to `[proxy]` of the configuration.
    pub fn set_proxy(&self, line: &str) {
        let path = self.path("config.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{text}{line}\n")).unwrap();
    }

    /// The configuration, as the hook reads it.
    pub fn config(&self) -> ringfence_hook::config::Config {
        let text = std::fs::read_to_string(self.path("config.toml")).unwrap();
        ringfence_hook::config::Config::parse(&text).unwrap()
    }

    /// Removes what is left of containers, of which nothing may remain.
    #[track_caller]
    pub fn collect(&self) -> Vec<ringfence_hook::Removed> {
        let collected = ringfence_hook::collect(&self.config()).unwrap();
        assert_eq!(collected.left, []);
        collected.removed
    }

    /// The record of `id`.
    pub fn record(&self, id: &str) -> Value {
        let path = self.path("run/state").join(format!("{id}.json"));
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    /// The socket of this lab's container, seen from the host.
    pub fn socket(&self) -> PathBuf {
        self.path("run/containers").join(&self.id).join("mount/verbs.sock")
    }

    /// What a client of the proxy gets to read.
    pub fn greet(&self) -> std::io::Result<String> {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &SocketAddrUnix::new(self.socket())?)?;
        let mut buffer = [0; 64];
        let read = rustix::io::read(&socket, &mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..read]).into_owned())
    }

    /// Waits for `condition`.
    #[track_caller]
    pub fn wait_until(&self, what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < deadline, "{what} has not come about");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The container by runc, until it ends.
    pub fn run(&self) -> Output {
        self.runc(&["run", &self.id])
    }

    /// runc in the bundle.
    pub fn runc(&self, arguments: &[&str]) -> Output {
        self.write_config();
        self.runc_command().args(arguments).output().unwrap()
    }

    /// A container that is made but not started. It holds the runtime's output open.
    #[track_caller]
    pub fn create(&self) {
        self.write_config();
        let status =
            self.runc_command().args(["create", &self.id]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(status.unwrap().success());
    }

    pub fn runc_command(&self) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.path("runc")).current_dir(self.path("")).stdin(Stdio::null());
        command
    }

    /// Leaves a file alone that is as it should be: a runtime or a hook may be reading it.
    pub fn write_config(&self) {
        let text = serde_json::to_vec_pretty(&self.config).unwrap();
        if std::fs::read(self.path("config.json")).ok().as_ref() != Some(&text) {
            std::fs::write(self.path("config.json"), text).unwrap();
        }
    }

    /// The container by runc, in a mount namespace that `prepare` has changed.
    pub fn run_after(&self, prepare: &str) -> Output {
        self.write_config();
        let script = format!("{prepare} && exec runc --root runc run \"$0\"");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &script, &self.id]);
        command.current_dir(self.path("")).output().unwrap()
    }

    /// crun in the bundle; without it the test is skipped.
    pub fn crun(&self, arguments: &[&str]) -> Output {
        if Command::new("crun").arg("--version").output().is_err() {
            skip("crun is not installed");
        }
        self.write_config();
        let mut command = Command::new("crun");
        command.args(["--root", "crun"]).args(arguments).current_dir(self.path("")).stdin(Stdio::null());
        command.output().unwrap()
    }

    /// What the container wrote, which must have been all well.
    #[track_caller]
    pub fn output(&self) -> String {
        succeeded(&self.run())
    }

    /// Runs the container, which must fail with `code` and `message`.
    #[track_caller]
    pub fn refused(&self, code: u8, message: &str) {
        Self::assert_refused(&self.run(), code, message);
    }

    /// The container failed to start with `code` and `message`.
    #[track_caller]
    pub fn assert_refused(output: &Output, code: u8, message: &str) {
        let text = String::from_utf8_lossy(&output.stderr).replace("\\\"", "\"");
        assert!(!output.status.success(), "{text}");
        for expected in [format!("exit status {code}"), format!("ringfence-hook: E{code} {message}")] {
            assert!(text.contains(&expected), "{expected}\nis not in\n{text}");
        }
    }

    /// Calls the hook itself.
    pub fn hook(&self, stage: &str, state: &[u8]) -> Output {
        let mut child = Command::new(HOOK)
            .arg(stage)
            .env_clear()
            .env("RINGFENCE_CONFIG", self.path("config.toml"))
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(state).unwrap();
        child.wait_with_output().unwrap()
    }

    /// Calls the hook itself, which must fail with exactly this.
    #[track_caller]
    pub fn hook_refuses(&self, state: &[u8], code: i32, message: &str) {
        let output = self.hook("createRuntime", state);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*text), (Some(code), &*format!("ringfence-hook: E{code} {message}\n")));
    }

    /// The state of this lab's container, for `pid`.
    pub fn state(&self, pid: i64) -> Value {
        json!({"ociVersion": "1.0.2", "id": self.id, "status": "creating", "pid": pid,
            "bundle": self.path("").to_str().unwrap().trim_end_matches('/'), "annotations": self.config["annotations"]})
    }

    /// Pids of this lab's proxies.
    pub fn proxies(&self) -> Vec<i32> {
        let here = self.directory.path();
        std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.parent() == Some(here)))
            .collect()
    }

    /// Waits until no proxy is left.
    #[track_caller]
    pub fn assert_proxy_ends(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.proxies().is_empty() {
            assert!(Instant::now() < deadline, "proxy {:?} is still there", self.proxies());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// All files of the root file system.
    fn listing(&self) -> Vec<String> {
        let output = Command::new("find").arg(self.path("rootfs")).output().unwrap();
        let mut lines: Vec<_> = String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
        lines.sort();
        lines
    }

    /// Takes the root file system as it is now for what it must be in the end.
    pub fn expect_rootfs_as_is(&mut self) {
        self.clean = self.listing();
    }

    /// Nothing of the container may be left: process, mount, directory, record, cgroup, mount point.
    #[track_caller]
    pub fn assert_clean(&self) {
        self.assert_proxy_ends();
        let here = self.directory.path().to_str().unwrap();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let left: Vec<_> = mounts.lines().filter(|line| line.contains(here)).collect();
        assert!(left.is_empty(), "{left:?}");
        for directory in ["run/containers", "run/state"] {
            let left: Vec<_> = std::fs::read_dir(self.path(directory)).into_iter().flatten().collect();
            assert!(left.is_empty(), "{left:?}");
        }
        assert_eq!(self.listing(), self.clean);
        let name = format!("*{}*", self.id);
        let found = Command::new("find").args(["/sys/fs/cgroup", "-type", "d", "-name", &name]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&found.stdout), "");
    }
}

#[track_caller]
pub fn succeeded(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}
