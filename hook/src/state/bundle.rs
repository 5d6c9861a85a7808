//! The bundle's `config.json`, as far as the hook needs it.

use super::{Annotations, Error, MAX_BYTES, State};
use crate::registered::Hooks;
use rustix::fs::{Mode, OFlags};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

#[derive(Debug, Default, Deserialize)]
struct Config {
    root: Option<Root>,
    annotations: Option<Annotations>,
    linux: Option<Linux>,
    process: Option<Process>,
    hooks: Option<Hooks>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Process {
    oom_score_adj: Option<i32>,
    env: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
struct Root {
    path: PathBuf,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Linux {
    rootfs_propagation: Option<String>,
    devices: Option<Vec<Device>>,
    resources: Option<Resources>,
}

#[derive(Debug, Default, Deserialize)]
struct Resources {
    devices: Option<Vec<DeviceRule>>,
    rdma: Option<BTreeMap<String, Rdma>>,
    cpu: Option<Cpu>,
}

/// `linux.resources.cpu`; what is not there is not limited.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Cpu {
    /// As `cpu.shares` of version 1.
    pub shares: Option<u64>,
    /// Microseconds of each period; none if it is not above 0.
    pub quota: Option<i64>,
    /// Microseconds.
    pub period: Option<u64>,
    /// Only what others leave, if 1.
    pub idle: Option<i64>,
    /// A list of CPUs.
    pub cpus: Option<String>,
    /// A list of memory nodes.
    pub mems: Option<String>,
}

/// Limits of the rdma controller for one device; `None` for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rdma {
    /// Open handles of the device.
    pub hca_handles: Option<u32>,
    /// Objects made with them.
    pub hca_objects: Option<u32>,
}

impl Rdma {
    /// As `rdma.max` takes it.
    pub fn line(&self, device: &str) -> String {
        let handles = self.hca_handles.map(|limit| format!(" hca_handle={limit}")).unwrap_or_default();
        let objects = self.hca_objects.map(|limit| format!(" hca_object={limit}")).unwrap_or_default();
        format!("{device}{handles}{objects}")
    }
}

#[derive(Debug, Deserialize)]
struct Device {
    path: PathBuf,
    #[serde(default)]
    major: i64,
    #[serde(default)]
    minor: i64,
}

/// What the container may do with some devices, an element of `linux.resources.devices` (OCI runtime specification,
/// config-linux.md, "Allowed Device list").
#[derive(Debug, Deserialize)]
pub struct DeviceRule {
    #[serde(default)]
    allow: bool,
    #[serde(rename = "type")]
    kind: Option<String>,
    major: Option<i64>,
    minor: Option<i64>,
    access: Option<String>,
}

impl DeviceRule {
    /// Whether it lets the container read and write the character device `major:minor`, and is for that alone.
    pub fn is_for(&self, major: u32, minor: u32) -> bool {
        self.allow
            && self.kind.as_deref() == Some("c")
            && (self.major, self.minor) == (Some(i64::from(major)), Some(i64::from(minor)))
            && self.access.as_deref().is_some_and(|access| access.contains('r') && access.contains('w'))
    }
}

/// What the hook needs from `config.json`.
#[derive(Debug)]
pub struct Bundle {
    path: PathBuf,
    directory: PathBuf,
    config: Config,
}

impl Bundle {
    /// Loads `config.json` of the bundle of `state`. Before 1.27 crun gives `/` to createRuntime hooks, which it runs in
    /// the bundle, as its own working directory: `runtime_cwd` is tried when the bundle has no such file. What is found
    /// there must agree with `state`.
    pub fn load(state: &State, runtime_cwd: &Path) -> Result<Self, Error> {
        match Self::read(&state.bundle) {
            Err(Error::Bundle { path, error }) if error.kind() == io::ErrorKind::NotFound => {
                let Ok(other) = Self::read(runtime_cwd) else { return Err(Error::Bundle { path, error }) };
                let ours = |(key, _): &(&str, &str)| crate::annotations::is_ours(key);
                if !other.annotations().filter(ours).eq(state.annotations().filter(ours)) {
                    return Err(Error::OtherBundle { path: other.path });
                }
                Ok(other)
            }
            result => result,
        }
    }

    fn read(directory: &Path) -> Result<Self, Error> {
        let path = directory.join("config.json");
        let mut bytes = Vec::with_capacity(16 << 10);
        open_regular(&path)
            .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
            .map_err(|error| Error::Bundle { path: path.clone(), error })?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(Error::BundleTooLong { path });
        }
        Self::parse(directory, &bytes)
    }

    /// The bundle in `directory` whose `config.json` has these bytes.
    pub fn parse(directory: &Path, bytes: &[u8]) -> Result<Self, Error> {
        let path = directory.join("config.json");
        match serde_json::from_slice(bytes) {
            Ok(config) => Ok(Self { path, directory: directory.to_owned(), config }),
            Err(error) => Err(Error::BundleMalformed { path, error }),
        }
    }

    /// The annotations of `config.json`.
    pub fn annotations(&self) -> impl Iterator<Item = (&str, &str)> {
        self.config.annotations.iter().flatten().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// Where it is.
    pub fn directory(&self) -> PathBuf {
        // `/proc/PPID/cwd` names another directory once the runtime is gone.
        self.directory.canonicalize().unwrap_or_else(|_| self.directory.clone())
    }

    /// The administrator's choice for the container, if a call of the hook is given one.
    pub fn policy(&self) -> Option<&str> {
        self.config.hooks.as_ref().and_then(Hooks::policy)
    }

    /// The container's root file system, as the host and the container's mount namespace before the pivot name it.
    pub fn root(&self) -> Result<PathBuf, Error> {
        let root = self.config.root.as_ref().ok_or_else(|| Error::NoRoot(self.path.clone()))?;
        Ok(self.directory().join(&root.path))
    }

    /// The container's own limits of the rdma controller, for devices whose names can be such.
    pub fn rdma_limits(&self) -> BTreeMap<String, Rdma> {
        let resources = self.config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
        let limits = resources.and_then(|resources| resources.rdma.clone()).unwrap_or_default();
        limits.into_iter().filter(|(device, _)| crate::annotations::is_device_name(device)).collect()
    }

    /// The container's own limits of processors, as far as `config.json` says.
    pub fn cpu(&self) -> Cpu {
        let resources = self.config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
        resources.and_then(|resources| resources.cpu.clone()).unwrap_or_default()
    }

    /// How soon the kernel is to kill the container's proxy for want of memory: as soon as the container, whose registered
    /// memory counts for both. Never is not offered, because limits of the proxy's own could not be kept then; without a word in
    /// `config.json` it is 0, whatever the engine's service has.
    pub fn oom_score_adj(&self) -> i32 {
        self.config.process.as_ref().and_then(|process| process.oom_score_adj).unwrap_or(0).clamp(-999, 1000)
    }

    /// The directories of `LD_LIBRARY_PATH` with which the container begins, relative to its root.
    pub fn library_path(&self) -> Vec<String> {
        let environment = self.config.process.iter().filter_map(|process| process.env.as_ref()).flatten();
        let path = environment.filter_map(|variable| variable.strip_prefix("LD_LIBRARY_PATH=")).next_back();
        let directories = path.unwrap_or_default().split([':', ';']).filter_map(|path| path.strip_prefix('/'));
        directories.filter(|directory| !directory.is_empty()).map(str::to_owned).collect()
    }

    /// Whether the container asked that its mounts be seen elsewhere.
    pub fn shares_mounts(&self) -> bool {
        let propagation = self.config.linux.as_ref().and_then(|linux| linux.rootfs_propagation.as_deref());
        matches!(propagation, Some("shared" | "rshared"))
    }

    /// Whether the runtime itself makes the character device `major:minor` at `path`.
    pub fn has_device(&self, path: &Path, major: u32, minor: u32) -> bool {
        let devices = self.config.linux.iter().filter_map(|linux| linux.devices.as_ref()).flatten();
        let numbers = (i64::from(major), i64::from(minor));
        devices.into_iter().any(|device| device.path == path && (device.major, device.minor) == numbers)
    }

    /// Whether the runtime itself lets the container read and write the character device `major:minor`, by a rule for it.
    pub fn allows_device(&self, major: u32, minor: u32) -> bool {
        let resources = self.config.linux.iter().filter_map(|linux| linux.resources.as_ref());
        resources.filter_map(|resources| resources.devices.as_ref()).flatten().any(|rule| rule.is_for(major, minor))
    }
}

/// Opens a file, and waits for nobody: of a pipe there may be no writer, and a device may never end.
fn open_regular(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no regular file")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_the_runtime() {
        let directory = tempfile::tempdir().unwrap();
        let bundle = |linux: &str| {
            std::fs::write(directory.path().join("config.json"), format!(r#"{{"linux":{linux}}}"#)).unwrap();
            Bundle::read(directory.path()).unwrap()
        };
        let none = bundle(r#"{"devices":null,"resources":{"devices":null}}"#);
        assert!(!none.has_device(Path::new("/dev/x"), 10, 229) && !none.allows_device(10, 229));
        let bundle = bundle(
            r#"{"devices":[{"path":"/dev/x","type":"c","major":10,"minor":229}],"resources":{"devices":[
                {"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":10,"minor":229,"access":"rwm"},
                {"allow":true,"type":"c","major":10,"minor":1,"access":"r"},{"allow":false,"type":"c","major":10,"minor":2,"access":"rw"}]}}"#,
        );
        assert!(bundle.has_device(Path::new("/dev/x"), 10, 229) && bundle.allows_device(10, 229));
        assert!(!bundle.has_device(Path::new("/dev/y"), 10, 229) && !bundle.has_device(Path::new("/dev/x"), 10, 1));
        assert!(!bundle.allows_device(10, 1) && !bundle.allows_device(10, 2) && !bundle.allows_device(10, 3));
    }

    #[test]
    fn what_is_no_regular_file_is_refused_without_waiting() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        let refused = || Bundle::read(directory.path()).unwrap_err().to_string();
        assert!(refused().contains("config.json: it is no regular file; "), "{}", refused());
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(refused().contains("config.json: it is no regular file; "), "{}", refused());
    }

    #[test]
    fn the_runtimes_directory_serves_when_the_bundle_is_wrong() {
        let (empty, real) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(
            real.path().join("config.json"),
            r#"{"root":{"path":"rootfs"},"annotations":{"ringfence.dev/enable":"true"}}"#,
        )
        .unwrap();
        let state = |annotations: &str| {
            let bundle = empty.path().to_str().unwrap();
            State::parse(format!(r#"{{"id":"a","bundle":"{bundle}","annotations":{annotations}}}"#).as_bytes()).unwrap()
        };
        let found = Bundle::load(&state(r#"{"ringfence.dev/enable":"true"}"#), real.path()).unwrap();
        assert_eq!(found.root().unwrap(), real.path().join("rootfs"));
        let error = Bundle::load(&state(r#"{"ringfence.dev/enable":"1"}"#), real.path()).unwrap_err();
        assert!(matches!(error, Error::OtherBundle { .. }), "{error}");
        let error = Bundle::load(&state("{}"), empty.path()).unwrap_err();
        assert!(matches!(error, Error::Bundle { .. }), "{error}");
    }
}
