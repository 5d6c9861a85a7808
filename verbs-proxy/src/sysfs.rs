//! What programs read of a device beside verbs: `/sys/class/infiniband` and `/sys/class/infiniband_verbs`, as files that are
//! made from what the verbs answer.
//!
//! The hook makes a file system for it and hands its root down ([`crate::launch::FD_SYSFS`]); the proxy fills it while it is root
//! still, because it alone knows GUID, LID and GIDs; the hook mounts it, read-only, where programs look. Nothing in it depends on
//! the kind of device: whoever fills in a [`Device`] has it shown.
//!
//! ```text
//! class/infiniband/<name>            -> ../infiniband_verbs/.ringfence/<parent>/infiniband/<name>
//! class/infiniband_verbs/uverbs<n>   -> .ringfence/<parent>/infiniband_verbs/uverbs<n>
//! class/infiniband_verbs/abi_version
//! class/infiniband_verbs/.ringfence/<parent>/
//!   numa_node                        if there is no card whose directory says it
//!   infiniband/<name>/               node_guid, fw_ver, …, ports/1/{state, rate, gids/0, …}, device -> <parent>
//!   infiniband_verbs/uverbs<n>/      ibdev, abi_version, dev, device -> <parent>
//! ```
//!
//! As in the kernel's, the classes have links, so that whoever follows them to a device's directory, and from there up, finds where
//! it is; the directories cannot be in `/sys/devices`, where nothing can be made. They are hidden, in the class of the two that
//! fewest programs list, so that whoever lists a class sees devices and nothing else.

mod shown;
mod text;
mod tree;

#[cfg(test)]
mod tests;

pub use shown::Shown;
pub use text::guid;

use ringfence_protocol::control::{DeviceInfo, GidInfo, OpenReply, PortInfo};

/// What `/dev/infiniband/uverbs<n>` is in a container: the number of `/dev/full`, to which every container's cgroup lets it, so that
/// programs which ask whether they may open it hear that they may; mounted so that nobody can. Should somebody be able to change
/// that, as root of the host is, he has a device that takes nothing and gives zeros.
pub const PLACEHOLDER: (u32, u32) = (1, 7);

/// The directory of class directories in the tree, whose two are there from the beginning.
pub const CLASSES: &str = "class";
/// The class of devices.
pub const DEVICES: &str = "infiniband";
/// The class of their character devices.
pub const VERBS: &str = "infiniband_verbs";

/// Entries of a port's GID table whose files can change while the container runs; and those that are there from the beginning.
/// The other entries are one and the same file, and empty.
pub const CHANGING_GIDS: usize = 16;

/// The longest GID table that is shown.
const MAX_GID_TABLE: usize = 256;

/// A device as its container sees it.
#[derive(Clone, Debug)]
pub struct Device {
    /// As the verbs say it.
    pub info: DeviceInfo,
    /// As the verbs say it.
    pub attributes: OpenReply,
    /// What people are told of it.
    pub description: String,
    /// The kind of card, if it has one.
    pub hca_type: Option<String>,
    /// The kind of board, if it has one.
    pub board_id: Option<String>,
    /// Which `uverbs` it is.
    pub verbs: u32,
    /// Where it is.
    pub parent: Parent,
    /// From port 1 on.
    pub ports: Vec<Port>,
}

/// Where a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parent {
    /// Nowhere: it is no piece of hardware. On the given NUMA node, if on one.
    Software {
        /// The node.
        numa_node: Option<u32>,
    },
    /// In a card, which has this directory below `/sys/devices`: `pci0000:00/0000:00:03.0`.
    Card {
        /// The directory.
        directory: String,
    },
}

/// A port as its container sees it.
#[derive(Clone, Debug)]
pub struct Port {
    /// As the verbs say it.
    pub info: PortInfo,
    /// The partition keys.
    pub pkeys: Vec<u16>,
    /// The beginning of the GID table; the rest of it is empty.
    pub gids: Vec<Entry>,
    /// Those of `counters/`; with none there is no such directory, as with a kernel's device that does not count.
    pub counters: Vec<(String, u64)>,
    /// Likewise of `hw_counters/`.
    pub hw_counters: Vec<(String, u64)>,
}

/// An entry of the GID table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As the verbs say it.
    pub info: GidInfo,
    /// The name of the interface with that index, if it is known.
    pub interface: String,
}
