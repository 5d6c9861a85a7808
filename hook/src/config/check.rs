//! What a configuration must keep to, beyond its form.

use super::{Config, Device, Inject, Kind, Proxy};
use crate::annotations::{DEVICE_NAME, Mode, is_device_name};
use crate::units;
use ringfence_launch::addresses::Gids;
use ringfence_launch::{Class, FIRST_PORT, MIN_LINK, pkeys};
use std::path::{Component, Path};

/// The longest path of a socket: `sun_path` without the zero at its end.
const MAX_SOCKET_PATH: usize = 107;

impl Config {
    /// Checks every value; the error names the first that is wrong.
    pub(super) fn check(&self) -> Result<(), String> {
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
            if device.rdma_cgroup && device.nodes.is_empty() && !self.policy.allows(Mode::Exclusive) {
                return Err(format!(
                    "device {}: rdma-cgroup is for containers that have its nodes (mode=passthrough), and it has none; or for such as have it \
                     for themselves, and no policy's bounds have exclusive among their modes",
                    device.name
                ));
            }
            if self.devices[..i].iter().any(|other| other.name == device.name) {
                return Err(format!("device name = {:?} is given twice", device.name));
            }
        }
        self.check_run_dir()?;
        self.policy.check()
    }

    /// Proxies meet at sockets in the run-dir, whose paths the kernel bounds (`unix(7)`).
    fn check_run_dir(&self) -> Result<(), String> {
        let longest = self.devices.iter().map(|device| device.name.len()).max().unwrap_or(0);
        let below = "/fabric/".len() + longest + "/sockets/".len() + "65535".len();
        let (length, most) = (self.run_dir.as_os_str().len(), MAX_SOCKET_PATH - below);
        if length > most {
            let path = &self.run_dir;
            return Err(format!(
                "run-dir = {path:?} has {length} bytes, and may have {most}: the paths of proxies' sockets in it would be too long"
            ));
        }
        Ok(())
    }
}

impl Proxy {
    /// A proxy that has less is killed before it is ready.
    const MIN_MEMORY: u64 = 16 << 20;
    /// Five of the proxy, five of its warden, and some that come and go: one that has fewer does not start.
    const MIN_THREADS: u32 = 12;

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

impl Inject {
    fn is_in_dev(&self) -> bool {
        let name = self.directory_name();
        self.container_dir == Path::new("/dev").join(name) && is_device_name(name)
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
            Kind::Soft if self.gids != Gids::Namespace => {
                return Err(format!(
                    "device {name}: gids is for kind = \"ibverbs\" only: a soft device has those of its container's addresses"
                ));
            }
            Kind::Soft if self.pkeys.is_some() => {
                return Err(format!(
                    "device {name}: pkeys is for kind = \"ibverbs\" only: a soft device has the default partition"
                ));
            }
            Kind::Soft if self.port != FIRST_PORT => {
                return Err(format!("device {name}: port is for kind = \"ibverbs\" only: a soft device has one"));
            }
            Kind::Ibverbs if self.port != FIRST_PORT && self.rdma_cm => {
                return Err(format!(
                    "device {name}: rdma-cm is for port = 1 only: the kernel speaks of port {} of the card to librdmacm, which containers \
                     have as port 1; leave out rdma-cm, or use port 1",
                    self.port
                ));
            }
            Kind::Soft if self.rdma_cm => {
                return Err(format!(
                    "device {name}: rdma-cm is for kind = \"ibverbs\" only: the kernel knows nothing of a soft device"
                ));
            }
            Kind::Soft if !self.marks(Class::Latency).are_none() => {
                return Err(format!(
                    "device {name}: service-level and traffic-class are for kind = \"ibverbs\" only: a soft device sends no packets"
                ));
            }
            Kind::Soft if self.rdma_cgroup => {
                return Err(format!(
                    "device {name}: rdma-cgroup is for containers that have its nodes (mode=passthrough), and it has none"
                ));
            }
            Kind::Ibverbs if self.gids == Gids::List(Vec::new()) => {
                return Err(format!(
                    "device {name}: gids = [] names no address; \"namespace\", \"host\" or some of the host's addresses are meant"
                ));
            }
            Kind::Ibverbs if self.link.is_some() => {
                return Err(format!("device {name}: link is for kind = \"soft\" only: a card has its own"));
            }
            _ => {}
        }
        if let Some(keys) = &self.pkeys {
            pkeys::check(keys).map_err(|error| format!("device {name}: {error}"))?;
        }
        if let Some(rate) = self.link.filter(|rate| *rate < MIN_LINK.bits()) {
            let (rate, least) = (units::show_rate(rate), units::show_rate(MIN_LINK.bits()));
            return Err(format!("device {name}: link = {rate:?} must be at least {least}"));
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
