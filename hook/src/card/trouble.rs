//! What is wrong with a card, and what to do.

use std::fmt;
use std::io;
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};

/// Why a card cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Missing {
    #[error(
        "device {name}: this kernel has no RDMA devices ({class} is missing): load the card's driver, such as modprobe mlx5_ib, \
         irdma or bnxt_re; without a card use a device of kind soft"
    )]
    NoClass { name: String, class: PathBuf },
    #[error(
        "no RDMA device has the name {name}: there is {others}; correct the name of the [[device]] (`rdma link` lists them), or \
         load the card's driver"
    )]
    NoSuchName { name: String, others: String },
    #[error(
        "RDMA device {name} is in another network namespace, where a container has it for itself (mode=exclusive; `ringfence list`) or \
         somebody else has moved it; use another device, or end what has it"
    )]
    Elsewhere { name: String },
    #[error("RDMA device {name} has no character device for verbs: modprobe ib_uverbs")]
    NoVerbs { name: String },
    #[error(
        "RDMA device {name} has no port {port}: its last is {last}; correct port of the [[device]] (`rdma link` lists them)"
    )]
    NoSuchPort { name: String, port: NonZeroU8, last: u32 },
    #[error("{} is {owner}'s, not {name}'s, {}", .node.display(), right(.its.as_deref()))]
    OthersNode { name: String, node: PathBuf, owner: String, its: Option<PathBuf> },
    #[error("RDMA device {name} cannot be looked at: {error}")]
    Unreadable { name: String, error: io::Error },
}

/// What a device's own node is, and what to correct.
fn right(its: Option<&Path>) -> String {
    match its {
        Some(its) => format!("whose node is {}; correct nodes of the [[device]]", its.display()),
        None => "of which this kernel has no node; correct name or nodes of the [[device]], or load the card's driver"
            .into(),
    }
}

/// Something that is not as programs need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// What.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.remedy)
    }
}

impl Missing {
    /// What to do, as a command.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoClass { .. } => "modprobe mlx5_ib, or the driver of the card",
            Self::NoSuchName { .. } => "rdma link, then correct the name of the [[device]]",
            Self::Elsewhere { .. } => "ringfence list, then end the container that has it",
            Self::NoVerbs { .. } => "modprobe ib_uverbs",
            Self::NoSuchPort { .. } => "rdma link, then correct port of the [[device]]",
            Self::OthersNode { .. } => {
                "grep . /sys/class/infiniband_verbs/*/ibdev, then correct nodes of the [[device]]"
            }
            Self::Unreadable { .. } => "dmesg | grep -i rdma",
        }
    }
}
