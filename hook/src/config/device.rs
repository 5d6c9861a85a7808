//! `[[device]]`

use super::{optional_rate, show_optional_rate};
use crate::annotations::Mode;
use ringfence_launch::addresses::Gids;
use ringfence_launch::marks::{Marks, ServiceLevel, TrafficClass};
use ringfence_launch::pkeys::Pkey;
use ringfence_launch::{Class, FIRST_PORT};
use serde::{Deserialize, Serialize};
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};

/// `[[device]]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Device {
    /// As containers see it; that of a card is the card's own.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Bits per second of the modelled link; `None` for as fast as memory.
    #[serde(default, deserialize_with = "optional_rate", serialize_with = "show_optional_rate")]
    pub link: Option<u64>,
    /// Device nodes for containers in mode passthrough, at the same path there; in mode exclusive those that are not for verbs.
    #[serde(default)]
    pub nodes: Vec<PathBuf>,
    /// Which of a card's ports containers with a proxy have; they see it as port 1.
    #[serde(default = "first_port")]
    pub port: NonZeroU8,
    /// Which of a card's GIDs containers see, and speak under.
    #[serde(default)]
    pub gids: Gids,
    /// Which of a card's partitions containers with a proxy are in; `None`: the first of the port's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pkeys: Option<Vec<Pkey>>,
    /// Whether containers have the kernel's rdma_cm, to connect by.
    #[serde(default)]
    pub rdma_cm: bool,
    /// Whether the kernel's rdma controller holds containers in modes passthrough and exclusive to the policy's limits.
    #[serde(default)]
    pub rdma_cgroup: bool,
    /// The service level that all of a card's address vectors have, whatever applications say.
    #[serde(default)]
    pub service_level: Option<ServiceLevel>,
    /// The traffic class, likewise.
    #[serde(default)]
    pub traffic_class: Option<TrafficClass>,
    /// Both, of containers of class `latency`, where they differ.
    #[serde(default, skip_serializing_if = "Marks::are_none")]
    pub latency: Marks,
}

fn first_port() -> NonZeroU8 {
    FIRST_PORT
}

/// Kinds of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// No RNIC: memory copies between the node's containers.
    Soft,
    /// An RNIC, through libibverbs; or, in mode passthrough, its device nodes.
    Ibverbs,
}

impl From<Kind> for ringfence_launch::DeviceKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Soft => Self::Soft,
            Kind::Ibverbs => Self::Ibverbs,
        }
    }
}

impl Device {
    /// Whether containers can have it in `mode`.
    pub fn serves(&self, mode: Mode) -> bool {
        match mode {
            Mode::Proxied => true,
            Mode::Passthrough => !self.nodes.is_empty(),
            Mode::Exclusive => self.kind == Kind::Ibverbs,
        }
    }

    /// Its nodes, without those for verbs: in mode exclusive the card's own comes by itself, under the name that it has in the
    /// container's network namespace.
    pub fn nodes_beside_verbs(&self) -> impl Iterator<Item = &Path> {
        self.nodes.iter().map(PathBuf::as_path).filter(|path| {
            let name = path.strip_prefix("/dev/infiniband").ok().and_then(Path::to_str);
            !name.is_some_and(|name| name.starts_with("uverbs"))
        })
    }

    /// What the packets of a container of this class are marked with.
    pub fn marks(&self, class: Class) -> Marks {
        let all = Marks { service_level: self.service_level, traffic_class: self.traffic_class };
        if class == Class::Latency { self.latency.or(all) } else { all }
    }
}
