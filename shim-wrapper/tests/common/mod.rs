//! A bundle, a configuration, and stand-ins for the real programs, in a directory of their own.

// Each test program uses some of this.
#![allow(dead_code)]

use serde_json::{Value, json};
use std::ffi::OsStr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub const RUNTIME: &str = env!("CARGO_BIN_EXE_ringfence-runtime");
pub const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-ringfence-v2");

/// The library that is injected; any without dependencies of its own will do.
const LIBRARY: &str = "/lib/x86_64-linux-gnu/libanl.so.1";

/// Says what it was called with, for [`Lab::record`].
const RECORDER: &str = r#"#!/bin/sh
{ for argument in "$0" "$@"; do echo "argument $argument"; done; env; } >"$RECORD"
"#;

pub struct Lab {
    directory: tempfile::TempDir,
    pub id: String,
}

impl Lab {
    /// With a bundle of a container that asks for RDMA.
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let directory = tempfile::Builder::new().prefix("ringfence-wrapper-").tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let id = format!("rf-wrap-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let lab = Self { directory, id };
        for directory in
            ["bundle/rootfs/bin", "bundle/rootfs/proc", "bundle/rootfs/dev", "bundle/rootfs/sys", "fakes", "links"]
        {
            std::fs::create_dir_all(lab.path(directory)).unwrap();
        }
        for link in ["runc", "crun"] {
            symlink(RUNTIME, lab.path("links").join(link)).unwrap();
        }
        std::fs::write(lab.path("config.toml"), lab.configuration("")).unwrap();
        lab.write(&lab.config());
        lab
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The administrator's configuration, with `more` in front.
    pub fn configuration(&self, more: &str) -> String {
        let (here, hook) = (self.directory.path().display(), Path::new(RUNTIME).with_file_name("ringfence-hook"));
        format!(
            "run-dir = \"{here}/run\"\n{more}\n[inject]\nlibrary = \"{LIBRARY}\"\n[hook]\npath = \"{}\"\ntimeout = 20\n\
             [shim]\nlinks = \"{here}/links\"\n[proxy]\npath = \"{here}/ready\"\nready-timeout-ms = 60000\n",
            hook.display()
        )
    }

    pub fn configure(&self, more: &str) {
        std::fs::write(self.path("config.toml"), self.configuration(more)).unwrap();
    }

    /// As `runc spec` makes it, with what runc writes in its own style replaced.
    fn config(&self) -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin"],
                "args": ["/bin/busybox", "sh", "-c", "/bin/busybox cat /etc/ld.so.preload; /bin/busybox ls /dev/ringfence"],
                "capabilities": {"bounding": [], "effective": [], "permitted": []}
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}
            ],
            "annotations": {"ringfence.dev/enable": "true"},
            "linux": {
                // In no slice: under systemd the proxy would be in a scope.
                "cgroupsPath": format!("/{}", self.id),
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]
            }
        })
    }

    pub fn edit(&self, edit: impl FnOnce(&mut Value)) {
        let mut config = self.config();
        edit(&mut config);
        self.write(&config);
    }

    pub fn write(&self, config: &Value) {
        std::fs::write(self.path("bundle/config.json"), serde_json::to_vec_pretty(config).unwrap()).unwrap();
    }

    pub fn text(&self) -> Vec<u8> {
        std::fs::read(self.path("bundle/config.json")).unwrap()
    }

    pub fn value(&self) -> Value {
        serde_json::from_slice(&self.text()).unwrap()
    }

    /// Whether the bundle's `config.json` calls our hook.
    pub fn has_hook(&self) -> bool {
        self.value()["hooks"]["createRuntime"][0]["args"][0] == "ringfence-hook"
    }

    /// A program in `fakes` that records its call.
    pub fn fake(&self, name: &str) -> PathBuf {
        self.script(name, RECORDER)
    }

    pub fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path("fakes").join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// `program` in the bundle, with the lab's configuration, finding only what is in `links` and `fakes`, and /bin.
    pub fn command(&self, program: impl AsRef<OsStr>, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        let path = std::env::join_paths([self.path("links"), self.path("fakes"), "/bin".into()]).unwrap();
        command
            .args(arguments)
            .env_clear()
            .env("PATH", path)
            .env("RINGFENCE_CONFIG", self.path("config.toml"))
            .env("RECORD", self.path("record"))
            .current_dir(self.path("bundle"))
            .stdin(Stdio::null());
        command
    }

    /// `ringfence-runtime` with a fake runc.
    #[track_caller]
    pub fn recorded(&self, arguments: &[&str]) -> Vec<String> {
        self.fake("runc");
        succeeded(&self.command(RUNTIME, arguments).output().unwrap());
        self.record()
    }

    /// What the last fake was called with: `argument X` for each, and `NAME=value` of its environment.
    #[track_caller]
    pub fn record(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.path("record")).expect("the real program was executed");
        std::fs::remove_file(self.path("record")).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// `ringfence-runtime` with these arguments must fail with exactly this, execute nothing and leave the bundle alone.
    #[track_caller]
    pub fn refused(&self, arguments: &[&str], message: &str) {
        self.fake("runc");
        let before = self.text();
        let output = self.command(RUNTIME, arguments).output().unwrap();
        assert_failed(&output, &format!("ringfence-runtime: {message}\n"));
        assert!(!self.path("record").exists(), "the real runtime was executed");
        assert_eq!(self.text(), before);
        self.assert_tidy();
    }

    /// Nothing of ours is left in the bundle but `config.json`.
    #[track_caller]
    pub fn assert_tidy(&self) {
        let entries = std::fs::read_dir(self.path("bundle")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "rootfs" && name != "config.json");
        assert_eq!(names, [""; 0]);
    }

    /// Makes the root file system and the proxy, for containers that really run.
    pub fn populate(&self) {
        std::fs::copy("/bin/busybox", self.path("bundle/rootfs/bin/busybox")).expect("busybox-static is installed");
        let hook = Path::new(RUNTIME).with_file_name("ringfence-hook");
        let proxy = Path::new(RUNTIME).with_file_name("examples").join("fake-proxy");
        for program in [&hook, &proxy] {
            assert!(
                program.exists(),
                "{}: `cargo build -p ringfence-hook --bins --examples` makes it",
                program.display()
            );
        }
        std::fs::copy(proxy, self.path("ready")).unwrap();
    }

    /// `ringfence-runtime` as the engines call it, with the real runtime `name`.
    pub fn real(&self, name: &str, arguments: &[&str]) -> Command {
        self.configure("");
        let mut text = std::fs::read_to_string(self.path("config.toml")).unwrap();
        text.push_str(&format!("[runtime]\nruntimes = [\"{name}\"]\n"));
        std::fs::write(self.path("config.toml"), text).unwrap();
        let mut command = Command::new(RUNTIME);
        command.arg("--root").arg(self.path("state")).args(arguments);
        command.env("RINGFENCE_CONFIG", self.path("config.toml")).current_dir(self.path("bundle")).stdin(Stdio::null());
        command
    }

    /// Waits until nothing of the container is left: process, directory, record, mount.
    #[track_caller]
    pub fn assert_clean(&self) {
        let here = self.directory.path();
        let proxies = || {
            let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
            entries
                .filter(|entry| std::fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == here.join("ready")))
                .count()
        };
        let deadline = Instant::now() + Duration::from_secs(5);
        while proxies() > 0 {
            assert!(Instant::now() < deadline, "the proxy is still there");
            std::thread::sleep(Duration::from_millis(5));
        }
        for directory in ["run/containers", "run/state"] {
            let left: Vec<_> = std::fs::read_dir(self.path(directory)).into_iter().flatten().collect();
            assert!(left.is_empty(), "{left:?}");
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(here.to_str().unwrap()), "{mounts}");
    }
}

#[track_caller]
pub fn succeeded(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Exit code 1, this on standard error, nothing on standard output.
#[track_caller]
pub fn assert_failed(output: &Output, message: &str) {
    assert_eq!((output.status.code(), &*String::from_utf8_lossy(&output.stderr)), (Some(1), message));
    assert!(output.stdout.is_empty());
}
