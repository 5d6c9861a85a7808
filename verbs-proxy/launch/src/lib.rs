//! What the hook and a proxy agree on: its orders, here, and the page of its [`counters`].
//!
//! The hook runs `ringfence-proxy --launch <container_dir>/launch.json` with the descriptors below and waits for one line
//! on [`FD_READY`]: `ready`, or the reason why not, after which the proxy has ended. Everything here has already been
//! checked against the administrator's bounds.

pub mod addresses;
pub mod card;
pub mod counters;
pub mod marks;
pub mod operator;
pub mod pkeys;

use addresses::{Gids, Peers};
use marks::Marks;
use pkeys::Pkey;
use ringfence_sched::Policy;
pub use ringfence_sched::{BitRate, Bytes, OpRate, Weight};
use serde::{Deserialize, Serialize};
use std::num::NonZeroU8;
use std::path::PathBuf;

/// The listening SEQPACKET socket, bound by the hook to `<container_dir>/mount/verbs.sock`, mode 0666.
pub const FD_LISTENER: i32 = 3;
/// pidfd of the container's init: when it becomes readable, the proxy ends.
pub const FD_INIT: i32 = 4;
/// The writing end of a pipe for one line, `ready` or an error. The proxy closes it afterwards.
pub const FD_READY: i32 = 5;
/// The container's network namespace, whose addresses become GIDs unless [`Device::gids`] says otherwise.
pub const FD_NETNS: i32 = 6;
/// Only if [`Launch::sysfs`]: the root of an empty file system, for [`crate::sysfs`].
pub const FD_SYSFS: i32 = 7;

/// The contents of `launch.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// The container's id, for messages.
    pub container: String,
    /// Host pid of the container's init, for messages; the truth is [`FD_INIT`].
    pub init_pid: i32,
    /// Node-wide directory, mode 0700: the proxies meet under `<run_dir>/fabric`.
    pub run_dir: PathBuf,
    /// This container's directory, `<run_dir>/containers/<id>`; removed by the proxy's warden when it ends.
    pub container_dir: PathBuf,
    /// The ids of which the proxy takes one, as user and as group; `None` to stay who it is, where the user namespace has
    /// no ids to spare.
    #[serde(default)]
    pub uids: Option<Uids>,
    /// What the container sees as its RDMA device.
    pub device: Device,
    /// What the container may do.
    pub limits: Limits,
    /// How the worker waits.
    #[serde(default)]
    pub worker: Worker,
    /// Whether the device is shown in the container's `/sys`, in the file system of [`FD_SYSFS`].
    #[serde(default)]
    pub sysfs: bool,
}

/// User ids, and group ids with the same numbers, that nobody on the node has but proxies. Each port has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Uids {
    /// The lowest.
    pub first: u32,
    /// How many: no more proxies than that run at once.
    pub count: u32,
}

impl Uids {
    /// That of the port `lid`, which is between 1 and [`Self::count`].
    #[must_use]
    pub fn of(self, lid: u16) -> u32 {
        self.first + u32::from(lid) - 1
    }
}

/// The slowest modelled link: on a slower one a packet takes longer than a retry timer.
pub const MIN_LINK: BitRate = BitRate::new(1_000_000).expect("more than none");

/// A device of the administrator's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// As `ibv_get_device_name` shows it.
    pub name: String,
    /// The backend.
    pub kind: DeviceKind,
    /// The rate of the modelled link that all containers of the device share; `None` for as fast as memory.
    pub link: Option<BitRate>,
    /// Which of a card's ports the container has, as its port 1.
    #[serde(default = "first_port")]
    pub port: NonZeroU8,
    /// Which of a card's GIDs are the container's. Those of the software device are always of the container's network namespace.
    #[serde(default)]
    pub gids: Gids,
    /// Which of a card's partitions the container is in, as its table has them; `None`: the first of the port's, whichever that is.
    #[serde(default)]
    pub pkeys: Option<Vec<Pkey>>,
    /// What a card's packets are marked with.
    #[serde(default)]
    pub marks: Marks,
}

/// What a card has one of at least.
pub const FIRST_PORT: NonZeroU8 = NonZeroU8::MIN;

fn first_port() -> NonZeroU8 {
    FIRST_PORT
}

/// Backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// No RNIC: memory copies between the node's containers.
    Soft,
    /// An RNIC, through libibverbs.
    Ibverbs,
}

/// Scheduling class: [`ringfence_sched::Class`] says what each changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Small requests first, undivided, under a cap of their own.
    Latency,
    /// Queue pairs take turns by operations.
    Ops,
    /// Queue pairs take turns by bytes.
    Bulk,
    /// No policy: the device arbitrates by queue pair, as an RNIC would.
    #[default]
    None,
}

impl From<Class> for ringfence_sched::Class {
    fn from(class: Class) -> Self {
        match class {
            Class::Latency => Self::Latency,
            Class::Ops => Self::Ops,
            Class::Bulk => Self::Bulk,
            Class::None => Self::None,
        }
    }
}

/// The resolved policy of one container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// What, over all queue pairs, leaves the container's memory: its SENDs and WRITEs, and what is READ out
    /// of it, by whomever; `None` for no cap.
    pub bandwidth: Option<BitRate>,
    /// What its READs and atomics bring in; `None` for no cap.
    #[serde(default)]
    pub bandwidth_rx: Option<BitRate>,
    /// Work requests over all queue pairs, of any opcode; `None` for no cap.
    #[serde(default)]
    pub ops: Option<OpRate>,
    /// Share of a contended link; `None` to compete by queue pair instead of by container.
    pub weight: Option<Weight>,
    /// Scheduling class.
    pub class: Class,
    /// Queue pairs.
    pub max_qp: u32,
    /// Memory regions.
    pub max_mr: u32,
    /// Registered memory.
    pub max_mr_bytes: Bytes,
    /// Completion queues.
    pub max_cq: u32,
    /// Work requests outstanding in one queue.
    pub max_qp_depth: u32,
    /// Whom queue pairs may be connected to; `None` for everybody.
    #[serde(default)]
    pub peers: Option<Peers>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bandwidth: None,
            bandwidth_rx: None,
            ops: None,
            weight: None,
            class: Class::None,
            max_qp: 256,
            max_mr: 4096,
            max_mr_bytes: Bytes(16 << 30),
            max_cq: 256,
            max_qp_depth: 16384,
            peers: None,
        }
    }
}

impl Limits {
    /// What the scheduler enforces of it.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy {
            bandwidth: self.bandwidth,
            fetching: self.bandwidth_rx,
            ops: self.ops,
            weight: self.weight,
            class: self.class.into(),
        }
    }
}

/// How the worker waits for work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Worker {
    /// Microseconds to spin, at most, before sleeping.
    pub spin_us: u32,
}

impl Default for Worker {
    fn default() -> Self {
        Self { spin_us: 50 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As proxies that run were told, and as `ringfence list` reads it of them.
    #[test]
    fn limits_are_plain_numbers_in_the_launch_file() {
        let text =
            r#"{"bandwidth":10000000000,"bandwidth_rx":null,"ops":10000,"weight":1000,"class":"bulk","max_qp":256,"#
                .to_owned()
                + r#""max_mr":4096,"max_mr_bytes":17179869184,"max_cq":256,"max_qp_depth":16384,"peers":null}"#;
        let limits = Limits {
            bandwidth: BitRate::new(10_000_000_000),
            ops: OpRate::new(10_000),
            weight: Weight::new(1000),
            class: Class::Bulk,
            ..Limits::default()
        };
        assert_eq!(serde_json::to_string(&limits).unwrap(), text);
        assert_eq!(serde_json::from_str::<Limits>(&text).unwrap(), limits);
    }

    #[test]
    fn what_the_scheduler_cannot_keep_is_no_launch_file() {
        let text = serde_json::to_string(&Limits { bandwidth: BitRate::new(7), ..Limits::default() }).unwrap();
        assert!(serde_json::from_str::<Limits>(&text.replace("\"bandwidth\":7", "\"bandwidth\":0")).is_err());
        for (weight, said) in
            [(0, "a weight of 0; it is from 1 to 1000"), (1001, "a weight of 1001; it is from 1 to 1000")]
        {
            let text = text.replace("\"weight\":null", &format!("\"weight\":{weight}"));
            let error = serde_json::from_str::<Limits>(&text).unwrap_err().to_string();
            assert!(error.starts_with(said), "{error}");
        }
    }
}
