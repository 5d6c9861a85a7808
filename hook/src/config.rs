//! The administrator's configuration, `/etc/ringfence/config.toml` and `/etc/ringfence/conf.d/*.toml`.

mod check;
mod cpu;
mod device;
mod load;

#[cfg(test)]
mod tests;

use crate::policy::Policy;
use crate::units;
use ringfence_launch::FIRST_PORT;
use ringfence_launch::addresses::Gids;
use ringfence_launch::marks::Marks;
use ringfence_proxy::device::soft::control::SoftDevice;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::path::PathBuf;

pub use cpu::{Cpus, Cpuset, Limit, Own, Weight};
pub use device::{Device, Kind};
pub use load::{part, paths};

/// Where the configuration is unless [`ENVIRONMENT`] says otherwise.
pub const DEFAULT_PATH: &str = "/etc/ringfence/config.toml";
/// The run-dir of root's engines.
pub const DEFAULT_RUN_DIR: &str = "/run/ringfence";
/// Names another configuration file, which must then exist; its drop-ins are in `conf.d` beside it.
pub const ENVIRONMENT: &str = "RINGFENCE_CONFIG";

/// The name of the proxy's program for cards.
pub const CARD_PROXY: &str = "ringfence-proxy-ibverbs";

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
    /// The program. That of a device of [`Kind::Ibverbs`] lies beside it: [`Self::program`].
    pub path: PathBuf,
    /// How long its start may take.
    pub ready_timeout_ms: u64,
    /// Microseconds that its worker spins before it sleeps.
    pub spin_us: u32,
    /// The user ids of which each proxy has one; `None` for those of [`crate::uids`].
    pub uids: Option<crate::uids::Range>,
    /// Where its memory and time are accounted.
    pub cgroup: Cgroup,
    /// Bytes of memory that a proxy in a cgroup of its own may be charged for; `None` for no limit but the parent's.
    #[serde(deserialize_with = "optional_size", serialize_with = "show_optional_size")]
    pub memory_max: Option<u64>,
    /// Threads that a proxy in a cgroup of its own may have.
    pub pids_max: u32,
    /// Processor time that a proxy in a cgroup of its own may take.
    pub cpus: Limit<Cpus>,
    /// Processors that it runs on, and memory nodes.
    pub cpuset: Limit<Cpuset>,
    /// Its share where processors are contended.
    pub cpu_weight: Limit<Weight>,
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
    /// Where the container sees the socket: a directory of `/dev`, which is the container's own tmpfs.
    pub container_dir: PathBuf,
    /// Whether containers get `/dev/userfaultfd`, if the host has it.
    pub userfaultfd: bool,
    /// Whether their `/sys` and `/dev/infiniband` show their device, and no other.
    pub sysfs: bool,
    /// Whether the latter has a node, then.
    pub uverbs: Uverbs,
}

/// Whether there is a node for a device whose verbs need none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Uverbs {
    /// If the device has all that programs expect which look for one.
    #[default]
    Auto,
    /// In any case.
    Always,
    /// In no case.
    Never,
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
            devices: vec![Device {
                name: "soft0".into(),
                kind: Kind::Soft,
                link: None,
                nodes: Vec::new(),
                port: FIRST_PORT,
                gids: Gids::Namespace,
                pkeys: None,
                rdma_cm: false,
                rdma_cgroup: false,
                service_level: None,
                traffic_class: None,
                latency: Marks::default(),
            }],
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
            spin_us: ringfence_launch::Worker::default().spin_us,
            uids: None,
            cgroup: Cgroup::default(),
            memory_max: None,
            pids_max: 64,
            cpus: Limit::default(),
            cpuset: Limit::default(),
            cpu_weight: Limit::default(),
        }
    }
}

impl Default for Inject {
    fn default() -> Self {
        Self {
            library: "/usr/lib/ringfence/libibverbs.so.1".into(),
            container_dir: "/dev/ringfence".into(),
            userfaultfd: true,
            sysfs: true,
            uverbs: Uverbs::default(),
        }
    }
}

impl Proxy {
    /// The program that serves devices of `kind`. That for cards is a package of its own, which has to be installed beside this
    /// one, and so is its file.
    pub fn program(&self, kind: Kind) -> PathBuf {
        match kind {
            Kind::Soft => self.path.clone(),
            Kind::Ibverbs => self.path.with_file_name(CARD_PROXY),
        }
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
}

/// Parses `text`; errors begin with the line, and with the key whose value is wrong.
fn parse_unchecked<T: de::DeserializeOwned>(text: &str) -> Result<T, String> {
    toml::from_str(text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start));
        let place = before.map(|before| {
            let (line, begun) = (before.matches('\n').count() + 1, before.rsplit('\n').next().unwrap_or_default());
            let key = begun.split_once('=').map(|(key, _)| format!("{}: ", key.trim())).unwrap_or_default();
            format!("line {line}: {key}")
        });
        format!("{}{}", place.unwrap_or_default(), error.message())
    })
}

impl Inject {
    /// Whether there is a node in `/dev/infiniband` for what [`Self::sysfs`] shows.
    pub fn has_node(&self) -> bool {
        match self.uverbs {
            Uverbs::Auto => SoftDevice::SUITS_A_NODE,
            Uverbs::Always => true,
            Uverbs::Never => false,
        }
    }

    /// The container directory within `/dev`.
    pub fn directory_name(&self) -> &str {
        self.container_dir.file_name().and_then(|name| name.to_str()).unwrap_or("")
    }
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

/// Operations per second, `"10k"`.
pub(crate) fn optional_ops<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let wrong = || de::Error::custom(format!("{text:?} is not a rate of operations; expected {}", units::OPS_EXPECTED));
    units::ops(&text).map(Some).ok_or_else(wrong)
}

/// As [`optional_ops`] reads it.
pub(crate) fn show_optional_ops<S: Serializer>(ops: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    ops.map(units::show_ops).serialize(serializer)
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
