//! The administrator's configuration, `/etc/ringfence/config.toml` and `/etc/ringfence/conf.d/*.toml`.

mod load;

use crate::annotations::{DEVICE_NAME, is_device_name};
use crate::policy::Policy;
use crate::units;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::path::{Component, Path, PathBuf};

pub use load::{part, paths};

/// Where the configuration is unless [`ENVIRONMENT`] says otherwise.
pub const DEFAULT_PATH: &str = "/etc/ringfence/config.toml";
/// The run-dir of root's engines.
pub const DEFAULT_RUN_DIR: &str = "/run/ringfence";
/// Names another configuration file, which must then exist; its drop-ins are in `conf.d` beside it.
pub const ENVIRONMENT: &str = "RINGFENCE_CONFIG";

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("configuration {path}: {error}")]
    Unreadable { path: PathBuf, error: std::io::Error },
    #[error(
        "configuration {path} can be written by everybody (mode {mode:o}); it decides what containers may do: chmod o-w"
    )]
    Writable { path: PathBuf, mode: u32 },
    #[error("configuration {path}: {message}")]
    Invalid { path: PathBuf, message: String },
    #[error(
        "without root the run-dir is in the own directory of the user, whose uid is {user}, but {reason}; \
         `loginctl enable-linger` makes it, or set run-dir in the configuration"
    )]
    NoUserDir { user: u32, reason: String },
}

/// The whole file; every part has a default.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[allow(missing_docs)]
pub struct Config {
    /// Node-wide run-time directory. For an engine without root the default is `/run/user/<uid>/ringfence` instead.
    pub run_dir: PathBuf,
    pub hook: Hook,
    pub runtime: Runtime,
    pub shim: Shim,
    pub proxy: Proxy,
    pub inject: Inject,
    /// The devices that containers may name; the first is what they get otherwise.
    #[serde(rename = "device", deserialize_with = "some_devices")]
    pub devices: Vec<Device>,
    pub policy: Policy,
}

/// `[hook]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Hook {
    /// Our hook's program, as it is registered in `config.json`, `hooks.d` and CDI.
    pub path: PathBuf,
    /// Seconds that runtimes give it.
    pub timeout: u32,
}

/// `[runtime]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Runtime {
    /// `ringfence-runtime`, as engines are told of it.
    pub path: PathBuf,
    /// OCI runtimes that it may become: names, looked up in `PATH`, or absolute paths; the first that is there.
    pub runtimes: Vec<PathBuf>,
}

/// `[shim]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Shim {
    /// `containerd-shim-ringfence-v2`, as containerd is told of it.
    pub path: PathBuf,
    /// The shim that it becomes; otherwise the `containerd-shim-runc-v2` beside the calling containerd, or in `PATH`.
    pub real: Option<PathBuf>,
    /// Directory in which `runc` and `crun` are links to `ringfence-runtime`.
    pub links: PathBuf,
}

/// `[proxy]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Proxy {
    /// The program.
    pub path: PathBuf,
    /// How long its start may take.
    pub ready_timeout_ms: u64,
    /// Microseconds that its worker spins before it sleeps.
    pub spin_us: u32,
    /// Where its memory and time are accounted.
    pub cgroup: Cgroup,
    /// Bytes of memory that a proxy in a cgroup of its own may be charged for; `None` for no limit but the parent's.
    #[serde(deserialize_with = "optional_size", serialize_with = "show_optional_size")]
    pub memory_max: Option<u64>,
    /// Threads that a proxy in a cgroup of its own may have.
    pub pids_max: u32,
}

/// Which cgroups a proxy runs in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Cgroup {
    /// Those of the runtime that called the hook.
    Inherit,
    /// One beside the container's own, under the same parent. Never the container's: runc fails to delete that then.
    #[default]
    Sibling,
}

/// `[inject]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Inject {
    /// The preload library on the host.
    pub library: PathBuf,
    /// Where the container sees the library and the socket: a directory of `/dev`, which is the container's own tmpfs.
    pub container_dir: PathBuf,
}

/// `[[device]]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Device {
    /// As containers see it.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Bits per second of the modelled link; `None` for as fast as memory.
    #[serde(default, deserialize_with = "optional_rate", serialize_with = "show_optional_rate")]
    pub link: Option<u64>,
    /// Device nodes for containers in mode passthrough, at the same path there.
    #[serde(default)]
    pub nodes: Vec<PathBuf>,
}

/// Kinds of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// No RNIC: memory copies between the node's containers.
    Soft,
    /// An RNIC, by its device nodes; only for mode passthrough yet.
    Ibverbs,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            run_dir: DEFAULT_RUN_DIR.into(),
            hook: Hook::default(),
            runtime: Runtime::default(),
            shim: Shim::default(),
            proxy: Proxy::default(),
            inject: Inject::default(),
            devices: vec![Device { name: "soft0".into(), kind: Kind::Soft, link: None, nodes: Vec::new() }],
            policy: Policy::default(),
        }
    }
}

impl Default for Hook {
    fn default() -> Self {
        Self { path: "/usr/bin/ringfence-hook".into(), timeout: 30 }
    }
}

impl Default for Runtime {
    fn default() -> Self {
        Self { path: "/usr/bin/ringfence-runtime".into(), runtimes: vec!["runc".into(), "crun".into()] }
    }
}

impl Default for Shim {
    fn default() -> Self {
        Self {
            path: "/usr/bin/containerd-shim-ringfence-v2".into(),
            real: None,
            links: "/usr/libexec/ringfence/bin".into(),
        }
    }
}

impl Default for Proxy {
    fn default() -> Self {
        Self {
            path: "/usr/libexec/ringfence/ringfence-proxy".into(),
            ready_timeout_ms: 5000,
            spin_us: ringfence_proxy::launch::Worker::default().spin_us,
            cgroup: Cgroup::default(),
            memory_max: None,
            pids_max: 64,
        }
    }
}

impl Default for Inject {
    fn default() -> Self {
        Self { library: "/usr/lib/ringfence/libibverbs.so.1".into(), container_dir: "/dev/ringfence".into() }
    }
}

impl Config {
    /// The file that the environment names, if it does; an empty name is none.
    pub fn named() -> Option<PathBuf> {
        std::env::var_os(ENVIRONMENT).filter(|path| !path.is_empty()).map(PathBuf::from)
    }

    /// Parses and checks a whole file.
    pub fn parse(text: &str) -> Result<Self, String> {
        let config: Self = parse_unchecked(text)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        for (key, path) in [
            ("run-dir", &self.run_dir),
            ("hook.path", &self.hook.path),
            ("runtime.path", &self.runtime.path),
            ("shim.path", &self.shim.path),
            ("shim.real", self.shim.real.as_ref().unwrap_or(&self.shim.path)),
            ("shim.links", &self.shim.links),
            ("proxy.path", &self.proxy.path),
            ("inject.library", &self.inject.library),
            ("inject.container-dir", &self.inject.container_dir),
        ] {
            if !is_plain_absolute(path) {
                return Err(format!("{key} = {path:?} must be an absolute path without . and .."));
            }
        }
        if !self.inject.is_in_dev() {
            let path = &self.inject.container_dir;
            return Err(format!(
                "inject.container-dir = {path:?} must be one directory under /dev, such as /dev/ringfence"
            ));
        }
        if !(1..=600).contains(&self.hook.timeout) {
            return Err(format!("hook.timeout = {} must be from 1 to 600 seconds", self.hook.timeout));
        }
        if let Some(runtime) = self.runtime.runtimes.iter().find(|path| !is_plain_absolute(path) && !is_name(path)) {
            return Err(format!("runtime.runtimes: {runtime:?} must be a program's name or an absolute path"));
        }
        if self.runtime.runtimes.is_empty() {
            return Err("runtime.runtimes must name at least one OCI runtime, such as runc".into());
        }
        self.proxy.check()?;
        for (i, device) in self.devices.iter().enumerate() {
            device.check()?;
            if self.devices[..i].iter().any(|other| other.name == device.name) {
                return Err(format!("device name = {:?} is given twice", device.name));
            }
        }
        self.policy.check()
    }
}

impl Proxy {
    /// A proxy that has less is killed before it is ready.
    const MIN_MEMORY: u64 = 16 << 20;
    /// Its main thread, its worker, and one that looks up addresses.
    const MIN_THREADS: u32 = 3;

    fn check(&self) -> Result<(), String> {
        if !(1..=600_000).contains(&self.ready_timeout_ms) {
            return Err(format!("proxy.ready-timeout-ms = {} must be from 1 to 600000", self.ready_timeout_ms));
        }
        if let Some(bytes) = self.memory_max.filter(|bytes| *bytes < Self::MIN_MEMORY) {
            let bytes = units::show_size(bytes);
            return Err(format!("proxy.memory-max = {bytes} must be at least {}", units::show_size(Self::MIN_MEMORY)));
        }
        if !(Self::MIN_THREADS..=4096).contains(&self.pids_max) {
            return Err(format!("proxy.pids-max = {} must be from {} to 4096", self.pids_max, Self::MIN_THREADS));
        }
        Ok(())
    }
}

/// Parses `text`; errors begin with the line.
fn parse_unchecked<T: de::DeserializeOwned>(text: &str) -> Result<T, String> {
    toml::from_str(text).map_err(|error| {
        let line = error.span().map(|span| text[..span.start].matches('\n').count() + 1);
        let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
        format!("{place}{}", error.message())
    })
}

impl Inject {
    fn is_in_dev(&self) -> bool {
        let name = self.directory_name();
        self.container_dir == Path::new("/dev").join(name) && is_device_name(name)
    }

    /// The container directory within `/dev`.
    pub fn directory_name(&self) -> &str {
        self.container_dir.file_name().and_then(|name| name.to_str()).unwrap_or("")
    }
}

impl Device {
    fn check(&self) -> Result<(), String> {
        let name = &self.name;
        if !is_device_name(name) {
            return Err(format!("device name = {name:?} must be {DEVICE_NAME}"));
        }
        match self.kind {
            Kind::Soft if !self.nodes.is_empty() => {
                return Err(format!("device {name}: kind = \"soft\" has no device nodes; remove nodes"));
            }
            Kind::Ibverbs if self.nodes.is_empty() => {
                return Err(format!(
                    "device {name}: kind = \"ibverbs\" needs nodes, such as [\"/dev/infiniband/uverbs0\"]"
                ));
            }
            Kind::Ibverbs if self.link.is_some() => {
                return Err(format!("device {name}: link is for kind = \"soft\" only"));
            }
            _ => {}
        }
        match self.nodes.iter().find(|node| !is_plain_absolute(node) || node.strip_prefix("/dev").is_err()) {
            Some(node) => Err(format!("device {name}: node {node:?} must be a path under /dev")),
            None => Ok(()),
        }
    }
}

fn is_name(path: &Path) -> bool {
    let mut components = path.components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
}

fn is_plain_absolute(path: &Path) -> bool {
    let mut components = path.components();
    components.next() == Some(Component::RootDir)
        && components.all(|component| matches!(component, Component::Normal(_)))
        && path.file_name().is_some()
        && !path.as_os_str().as_encoded_bytes().contains(&0)
}

fn some_devices<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Device>, D::Error> {
    let devices = Vec::deserialize(deserializer)?;
    if devices.is_empty() { Err(de::Error::custom("at least one [[device]] is needed")) } else { Ok(devices) }
}

/// A bit rate, `"10Gbit"`.
pub(crate) fn optional_rate<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let wrong = || de::Error::custom(format!("{text:?} is not a bit rate; expected {}", units::RATE_EXPECTED));
    units::rate(&text).map(Some).ok_or_else(wrong)
}

/// As [`optional_rate`] reads it.
pub(crate) fn show_optional_rate<S: Serializer>(rate: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    rate.map(units::show_rate).serialize(serializer)
}

/// A size, `"4GiB"`.
pub(crate) fn optional_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let wrong = || de::Error::custom(format!("{text:?} is not a size; expected {}", units::SIZE_EXPECTED));
    units::size(&text).map(Some).ok_or_else(wrong)
}

/// As [`optional_size`] reads it.
pub(crate) fn show_optional_size<S: Serializer>(size: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    size.map(units::show_size).serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::annotations::Mode;
    use proptest::prelude::*;
    use ringfence_proxy::launch::Class;

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(Config::parse(""), Ok(Config::default()));
    }

    #[test]
    fn the_example_file_is_the_default() {
        let example = include_str!("../config.example.toml");
        assert_eq!(Config::parse(example), Ok(Config::default()));
        // What it shows commented out is no less valid.
        let all: String =
            example.lines().map(|line| format!("{}\n", line.strip_prefix("#: ").unwrap_or(line))).collect();
        let all = Config::parse(&all).unwrap();
        assert_eq!(all.devices.len(), 2);
        assert!(all.policy.bounds.classes.is_some() && all.policy.bounds.max_qp_depth.is_some());
        assert_eq!(all.policy.names().collect::<Vec<_>>(), ["default", "gold"]);
    }

    const ALL: &str = r#"
            run-dir = "/run/rf"
            [proxy]
            path = "/opt/proxy"
            ready-timeout-ms = 100
            spin-us = 7
            cgroup = "inherit"
            memory-max = "1GiB"
            pids-max = 9
            [inject]
            library = "/opt/lib.so"
            container-dir = "/dev/rf"
            [[device]]
            name = "soft0"
            kind = "soft"
            link = "25Gbit"
            [[device]]
            name = "mlx5_0"
            kind = "ibverbs"
            nodes = ["/dev/infiniband/uverbs0"]
            [policy.defaults]
            bandwidth = "1Gbit"
            weight = 100
            class = "bulk"
            max-qp = 16
            max-mr = 32
            max-mr-bytes = "1GiB"
            max-cq = 33
            max-qp-depth = 34
            [policy.bounds]
            bandwidth = "10Gbit"
            weight = 500
            classes = ["ops", "bulk"]
            modes = ["proxied", "passthrough"]
            max-qp = 64
            max-mr = 65
            max-mr-bytes = "4GiB"
            max-cq = 66
            max-qp-depth = 67
            "#;

    #[test]
    fn what_is_shown_reads_back() {
        for text in ["", ALL] {
            let config = Config::parse(text).unwrap();
            assert_eq!(Config::parse(&toml::to_string(&config).unwrap()), Ok(config));
        }
    }

    #[test]
    fn every_key_is_read() {
        let config = Config::parse(ALL).unwrap();
        assert_eq!(config.proxy.cgroup, Cgroup::Inherit);
        assert_eq!((config.proxy.memory_max, config.proxy.pids_max), (Some(1 << 30), 9));
        assert_eq!(config.inject.directory_name(), "rf");
        assert_eq!(config.devices[0].link, Some(25_000_000_000));
        assert_eq!(config.devices[1].nodes, [PathBuf::from("/dev/infiniband/uverbs0")]);
        assert_eq!(config.policy.defaults.class, Some(Class::Bulk));
        assert_eq!(config.policy.bounds.modes, Some(vec![Mode::Proxied, Mode::Passthrough]));
        assert_eq!(config.policy.bounds.max_mr_bytes, Some(4 << 30));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, expected) in [
            ("run-dri = \"/x\"", "line 1: unknown field `run-dri`"),
            ("\n[proxy]\nspin = 1", "line 3: unknown field `spin`"),
            ("run-dir = \"run\"", "run-dir = \"run\" must be an absolute path"),
            ("run-dir = \"/run/../etc\"", "must be an absolute path without . and .."),
            ("[inject]\ncontainer-dir = \"/run/rf\"", "must be one directory under /dev"),
            ("[inject]\ncontainer-dir = \"/dev/a/b\"", "must be one directory under /dev"),
            ("[proxy]\nready-timeout-ms = 0", "proxy.ready-timeout-ms = 0 must be from 1 to 600000"),
            ("[proxy]\nmemory-max = \"15MiB\"", "proxy.memory-max = 15MiB must be at least 16MiB"),
            ("[proxy]\nmemory-max = 99", "line 2: invalid type: integer `99`"),
            ("[proxy]\npids-max = 2", "proxy.pids-max = 2 must be from 3 to 4096"),
            ("[proxy]\ncgroup = \"container\"", "line 2: unknown variant `container`"),
            ("[[device]]\nname = \"a\"\nkind = \"hard\"", "line 3: unknown variant `hard`"),
            ("[[device]]\nname = \"a/b\"\nkind = \"soft\"", "device name = \"a/b\" must be"),
            ("[[device]]\nname = \"a\"\nkind = \"soft\"\nlink = \"25\"", "\"25\" is not a bit rate"),
            ("[[device]]\nname = \"a\"\nkind = \"soft\"\nlink = 25", "line 4: invalid type: integer `25`"),
            ("[[device]]\nname = \"a\"\nkind = \"ibverbs\"", "needs nodes"),
            ("[[device]]\nname = \"a\"\nkind = \"ibverbs\"\nnodes = [\"/etc/x\"]", "must be a path under /dev"),
            ("[[device]]\nname = \"a\"\nkind = \"soft\"\n[[device]]\nname = \"a\"\nkind = \"soft\"", "given twice"),
            ("device = []", "at least one [[device]] is needed"),
            ("[policy.bounds]\nweight = 1001", "policy.bounds.weight = 1001 must be from 1 to 1000"),
            ("[policy.bounds]\nmodes = [\"exclusive\"]", "exclusive is not offered yet"),
            ("[policy.bounds]\nmodes = []", "policy.bounds.modes must name at least one mode"),
            ("[policy.bounds]\nclasses = [\"none\"]", "policy.bounds.classes"),
            ("[policy.bounds]\nmax-qp = 0", "policy.bounds.max-qp must be above 0"),
            (
                "[policy.defaults]\nbandwidth = \"2Gbit\"\n[policy.bounds]\nbandwidth = \"1Gbit\"",
                "policy.defaults.bandwidth = 2Gbit is beyond policy.bounds.bandwidth = 1Gbit",
            ),
            ("[policy.profiles.gold]\nbandwidth = \"1Gbit\"", "line 2: unknown field `bandwidth`"),
            ("[policy.profiles.gold.defaults]\nbandwith = \"1Gbit\"", "line 2: unknown field `bandwith`"),
            ("[policy.profiles.\"a/b\"]", "policy.profiles: \"a/b\" must be a profile's name"),
            ("[policy.profiles.default]", "write it there"),
            ("[policy.profiles.gold]\nnamespaces = []", "policy.profiles.gold.namespaces = [] denies"),
            ("[policy.profiles.gold]\nnamespaces = [\"a*b\"]", "policy.profiles.gold.namespaces: \"a*b\" must be"),
            ("[policy.profiles.gold]\nnamespaces = [\"\"]", "policy.profiles.gold.namespaces: \"\" must be"),
            ("[policy.profiles.gold.bounds]\nmax-qp = 0", "policy.profiles.gold.bounds.max-qp must be above 0"),
            (
                "[policy.defaults]\nmax-qp = 100\n[policy.profiles.low.bounds]\nmax-qp = 50",
                "policy.defaults.max-qp = 100 is beyond policy.profiles.low.bounds.max-qp = 50",
            ),
            (
                "[policy.bounds]\nclasses = [\"bulk\"]\n[policy.profiles.fast.defaults]\nclass = \"latency\"",
                "policy.profiles.fast.defaults.class = latency is not in policy.bounds.classes = bulk",
            ),
        ] {
            let message = Config::parse(text).unwrap_err();
            assert!(message.contains(expected), "{text}: {message}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[a-z=\"\\[\\]\n .-]{0,60}") {
            let _ = Config::parse(&text);
        }
    }
}
