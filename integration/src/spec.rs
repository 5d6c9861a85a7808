//! The `config.json` of a test container: what Docker gives an unprivileged one, as far as it matters to us.

use serde_json::{Value, json};
use std::path::Path;

/// Docker's default set: no CAP_IPC_LOCK, no CAP_SYS_ADMIN.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Denied by Docker's default seccomp profile and of interest to anyone who shares memory with a container.
const DENIED: [&str; 5] = ["userfaultfd", "bpf", "perf_event_open", "io_uring_setup", "keyctl"];

/// What differs from container to container.
pub(crate) struct Parts<'a> {
    pub(crate) rootfs: &'a Path,
    pub(crate) args: &'a [String],
    pub(crate) netns: Option<&'a Path>,
    pub(crate) annotations: &'a [(String, String)],
    pub(crate) mounts: &'a [Bind],
    pub(crate) hook: Option<Hook<'a>>,
    pub(crate) readonly: bool,
    pub(crate) user_namespace: bool,
    pub(crate) cgroups_path: String,
    /// As `linux.resources.cpu`.
    pub(crate) processors: Option<&'a Value>,
}

/// A host's file or directory in the container.
#[derive(Clone, Debug)]
pub(crate) struct Bind {
    pub(crate) source: std::path::PathBuf,
    pub(crate) destination: String,
    pub(crate) writable: bool,
}

pub(crate) struct Hook<'a> {
    pub(crate) program: &'a Path,
    pub(crate) config: &'a Path,
    pub(crate) start_stage: &'a str,
}

impl Hook<'_> {
    fn entry(&self, stage: &str) -> Value {
        json!([{
            "path": self.program,
            "args": ["ringfence-hook", stage],
            "env": [format!("RINGFENCE_CONFIG={}", self.config.display())],
            "timeout": 30,
        }])
    }
}

impl Parts<'_> {
    pub(crate) fn config_json(&self) -> Value {
        let mut network = json!({"type": "network"});
        if let Some(path) = self.netns {
            network["path"] = json!(path);
        }
        let mut namespaces = vec![
            json!({"type": "pid"}),
            json!({"type": "ipc"}),
            json!({"type": "uts"}),
            json!({"type": "mount"}),
            network,
        ];
        let mut linux = json!({
            "cgroupsPath": self.cgroups_path,
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": DENIED, "action": "SCMP_ACT_ERRNO"}],
            },
        });
        if let Some(processors) = self.processors {
            linux["resources"]["cpu"] = processors.clone();
        }
        if self.user_namespace {
            namespaces.push(json!({"type": "user"}));
            linux["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
            linux["gidMappings"] = linux["uidMappings"].clone();
        }
        linux["namespaces"] = json!(namespaces);

        let annotations: serde_json::Map<String, Value> =
            self.annotations.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        let mut spec = json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false,
                "user": {"uid": 0, "gid": 0},
                "args": self.args,
                "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
                "cwd": "/",
                "capabilities": {
                    "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
                },
                "rlimits": [
                    {"type": "RLIMIT_MEMLOCK", "hard": 65536, "soft": 65536},
                    {"type": "RLIMIT_NOFILE", "hard": 4096, "soft": 1024},
                ],
                "noNewPrivileges": true,
            },
            "root": {"path": self.rootfs, "readonly": self.readonly},
            "hostname": "container",
            "mounts": self.mounts(),
            "annotations": annotations,
            "linux": linux,
        });
        if let Some(hook) = &self.hook {
            spec["hooks"] =
                json!({ hook.start_stage: hook.entry(hook.start_stage), "poststop": hook.entry("poststop") });
        }
        spec
    }

    fn mounts(&self) -> Vec<Value> {
        let mut mounts = vec![
            json!({"destination": "/proc", "type": "proc", "source": "proc"}),
            json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
            json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]}),
            json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=1g"]}),
            json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]}),
        ];
        if !self.user_namespace {
            // A user namespace may mount sysfs only together with a network namespace that it owns.
            mounts.push(json!({"destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"]}));
        }
        for bind in self.mounts {
            let options = ["bind", if bind.writable { "rw" } else { "ro" }];
            let (source, destination) = (&bind.source, &bind.destination);
            mounts.push(json!({"destination": destination, "type": "bind", "source": source, "options": options}));
        }
        mounts
    }
}
