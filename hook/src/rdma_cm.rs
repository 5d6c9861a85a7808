//! The kernel's connection manager, `/dev/infiniband/rdma_cm`, in a container whose card is behind a proxy.
//!
//! The image's own librdmacm speaks to it, and the kernel answers for the addresses of the container's network namespace. It only makes
//! connections: what is connected are queue pairs of the proxy's, and each transition of theirs is a verb of the container's, which the
//! proxy checks. So it is for cards whose queue pairs are moved by verbs. On iWARP the kernel moves them itself, any that the
//! program names, whoever made it: a container that reaches such a card by rdma_cm is round every proxy.

use crate::card::{self, Card};
use crate::cgroup;
use crate::config::Device;
use crate::device_filter;
use crate::failure::{Code, During, Failure};
use crate::session::Session;
use crate::state::Bundle;
use rustix::fs::{FileType, major, minor};
use std::os::fd::OwnedFd;
use std::path::Path;

/// Where it is, on hosts and in containers.
pub const PATH: &str = "/dev/infiniband/rdma_cm";
/// Within `/dev/infiniband`.
pub const NAME: &str = "rdma_cm";

/// Why containers cannot have it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Missing {
    #[error(
        "device {device} has rdma-cm = true, and this kernel has no {PATH}: modprobe rdma_ucm, or set rdma-cm = false"
    )]
    NoNode { device: String },
    #[error(
        "device {device} has rdma-cm = true, and this host has the iWARP card {card}: by rdma_cm a container could connect any queue \
         pair of that card, also others'; set rdma-cm = false, or take {card} away (rdma link delete, modprobe -r)"
    )]
    Iwarp { device: String, card: String },
}

impl Missing {
    /// What to do, as a command.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoNode { .. } => "modprobe rdma_ucm",
            Self::Iwarp { .. } => "rdma link, then set rdma-cm = false or take the iWARP card away",
        }
    }
}

/// The host's node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its number, which may be another one each time that the module is loaded.
    pub major: u32,
    /// See `major`.
    pub minor: u32,
}

impl Host {
    /// The node, for containers that have `device`; `None` if they are not to have it.
    ///
    /// # Errors
    /// Why they cannot.
    pub fn of(sys: &Path, device: &Device) -> Result<Option<Self>, Missing> {
        if !device.rdma_cm {
            return Ok(None);
        }
        let device = device.name.clone();
        // Not only that of the container: a program listens on all that there are.
        if let Some(card) = card::iwarp(sys).into_iter().next() {
            return Err(Missing::Iwarp { device, card });
        }
        match rustix::fs::lstat(PATH) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice => {
                Ok(Some(Self { major: major(found.st_rdev), minor: minor(found.st_rdev) }))
            }
            _ => Err(Missing::NoNode { device }),
        }
    }
}

/// What a container gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// The node.
    Node(Host),
    /// Nothing, and what it is told, if it was to have it.
    Nothing(Option<String>),
}

/// What a container gets that has `device`, whose card is `card`, and perhaps a network of its own.
pub(crate) fn decide(device: &Device, card: &Card, has_own_network: bool) -> Result<Decision, Failure> {
    let found = Host::of(Path::new(card::SYS), device);
    let host = found.map_err(|missing| Failure::new(Code::Device, missing.to_string()))?;
    let Some(host) = host else { return Ok(Decision::Nothing(None)) };
    // The kernel looks for addresses in the namespace of who asks, and the GIDs are of another's. InfiniBand's are of no
    // namespace, and the container may have an interface of the card's all the same.
    let is_ethernet = card.port(device.port).is_ok_and(|port| port.link_layer != "InfiniBand");
    if device.gids.are_of_host() && has_own_network && is_ethernet {
        return Ok(Decision::Nothing(Some(format!(
            "no {PATH}: it knows the addresses of the container's own network, and those of {} are the host's; give the container \
             the host's network, or an interface of the card's and gids = \"namespace\"",
            device.name
        ))));
    }
    Ok(Decision::Node(host))
}

/// The node for the container of `pid`, which may open it from then on; or why it has none.
pub(crate) fn grant(session: &Session, host: Host, bundle: &Bundle, pid: i32) -> Result<OwnedFd, Failure> {
    if !bundle.allows_device(host.major, host.minor) {
        let allowed = device_filter::grant_for_good(pid, host.major, host.minor);
        let what = || format!("{PATH} in the container's cgroup");
        if !allowed.during(Code::Injection, what)? {
            return Err(Failure::new(Code::Injection, cgroup::unseen(PATH)));
        }
    }
    session.make_node(NAME, host.major, host.minor).during(Code::Injection, || format!("a node for {PATH}"))
}
