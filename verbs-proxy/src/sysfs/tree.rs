//! The files.

use super::{CHANGING_GIDS, CLASSES, DEVICES, Device, Entry, MAX_GID_TABLE, PLACEHOLDER, Parent, Port, VERBS, text};
use ringfence_protocol::control::{GidInfo, PortInfo};
use ringfence_protocol::verbs::GidType;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags, linkat, mkdirat, openat, symlinkat};
use rustix::io::{Errno, write};

/// Of `uverbs`, by the kernel's own.
const VERBS_ABI: &str = "6\n";
/// Of a device's provider; there is none for ours.
const PROVIDER_ABI: &str = "1\n";
/// Where directories of devices are, in the class [`VERBS`].
const HIDDEN: &str = ".ringfence";

/// Files of a port that can be written to.
#[derive(Debug, Default)]
pub struct PortFiles {
    /// Those of its attributes, in the order of [`attributes`].
    pub attributes: Vec<OwnedFd>,
    /// Those of its P_Keys.
    pub pkeys: Vec<OwnedFd>,
    /// The beginning of its GID table.
    pub gids: Vec<Changing>,
}

/// Files of an entry of the GID table that can be written to.
#[derive(Debug)]
pub struct Changing {
    pub gid: OwnedFd,
    pub interface: OwnedFd,
    pub kind: OwnedFd,
}

/// What a port's attributes are in their files; the names are always the same, in the same order.
pub fn attributes(info: &PortInfo) -> [(&'static str, String); 9] {
    [
        ("state", text::state(info.state)),
        ("phys_state", text::physical_state(info.phys_state)),
        ("rate", text::rate(info.active_width, info.active_speed)),
        ("lid", format!("0x{:x}\n", info.lid)),
        ("lid_mask_count", format!("{}\n", info.lmc)),
        ("sm_lid", format!("0x{:x}\n", info.sm_lid)),
        ("sm_sl", format!("{}\n", info.sm_sl)),
        ("cap_mask", format!("0x{:08x}\n", info.port_cap_flags)),
        ("link_layer", text::link_layer(info.link_layer).to_owned()),
    ]
}

/// Makes all files of `device` in the tree with the root `root`, and returns what may change of each port.
///
/// To be called while the process has one thread: files are readable for everybody, whatever its mask is.
///
/// # Errors
/// What the kernel says of the file system.
pub fn write_tree(device: &Device, root: &OwnedFd) -> Result<Vec<PortFiles>, Errno> {
    let mask = rustix::process::umask(Mode::empty());
    let result = all(device, root);
    rustix::process::umask(mask);
    result
}

fn all(device: &Device, root: &OwnedFd) -> Result<Vec<PortFiles>, Errno> {
    let name = text::terminated(&device.info.name);
    let verbs_name = format!("uverbs{}", device.verbs);
    let (parent, to_parent) = match &device.parent {
        Parent::Software { .. } => (name.clone(), "../..".to_owned()),
        Parent::Card { directory } => {
            // From the device's directory up to `/sys`.
            let depth = ["class", VERBS, HIDDEN, DEVICES, &name].len() + directory.split('/').count();
            (directory.clone(), format!("{}devices/{directory}", "../".repeat(depth)))
        }
    };

    let classes = Directory::of(root, CLASSES)?;
    let verbs = Directory::of(&classes.0, VERBS)?;
    verbs.file("abi_version", VERBS_ABI)?;
    let hidden = format!("{HIDDEN}/{parent}");
    verbs.link(&verbs_name, &format!("{hidden}/{VERBS}/{verbs_name}"))?;
    Directory::of(&classes.0, DEVICES)?.link(&name, &format!("../{VERBS}/{hidden}/{DEVICES}/{name}"))?;

    let mut place = verbs;
    for part in hidden.split('/') {
        place = place.make(part)?;
    }
    if let Parent::Software { numa_node } = &device.parent {
        let number = numa_node.map_or("-1".to_owned(), |node| node.to_string());
        place.file("numa_node", &format!("{number}\n"))?;
    }
    let character = place.make(VERBS)?.make(&verbs_name)?;
    character.file("ibdev", &format!("{name}\n"))?;
    character.file("abi_version", PROVIDER_ABI)?;
    character.file("dev", &format!("{}:{}\n", PLACEHOLDER.0, PLACEHOLDER.1))?;
    character.link("device", &to_parent)?;
    let own = place.make(DEVICES)?.make(&name)?;
    own.link("device", &to_parent)?;
    own.device(device)?;
    let ports = own.make("ports")?;
    device.ports.iter().zip(1..).map(|(port, number)| ports.make(&number.to_string())?.port(port)).collect()
}

/// A directory of the tree.
struct Directory(OwnedFd);

impl Directory {
    fn of(parent: &OwnedFd, name: &str) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(parent, name, flags, Mode::empty()).map(Self)
    }

    fn make(&self, name: &str) -> Result<Self, Errno> {
        mkdirat(&self.0, name, Mode::from_raw_mode(0o755))?;
        Self::of(&self.0, name)
    }

    fn file(&self, name: &str, content: &str) -> Result<OwnedFd, Errno> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(&self.0, name, flags, Mode::from_raw_mode(0o444))?;
        if !content.is_empty() {
            write(&file, content.as_bytes())?;
        }
        Ok(file)
    }

    fn link(&self, name: &str, target: &str) -> Result<(), Errno> {
        symlinkat(target, &self.0, name)
    }

    fn device(&self, device: &Device) -> Result<(), Errno> {
        let attributes = &device.attributes;
        for (name, content) in [
            ("node_type", text::node_type(device.info.node_type)),
            ("node_guid", text::guid(device.info.node_guid)),
            ("sys_image_guid", text::guid(attributes.sys_image_guid)),
            ("node_desc", format!("{}\n", device.description)),
            ("fw_ver", format!("{}\n", text::terminated(&attributes.fw_ver))),
            ("hw_rev", format!("{:x}\n", attributes.hw_ver)),
        ] {
            self.file(name, &content)?;
        }
        for (name, content) in [("hca_type", &device.hca_type), ("board_id", &device.board_id)] {
            if let Some(content) = content {
                self.file(name, &format!("{content}\n"))?;
            }
        }
        Ok(())
    }

    fn port(&self, port: &Port) -> Result<PortFiles, Errno> {
        let files = attributes(&port.info);
        let attributes = files.iter().map(|(name, content)| self.file(name, content)).collect::<Result<_, _>>()?;
        let directory = self.make("pkeys")?;
        let keys = port.pkeys.iter().enumerate();
        let pkeys = keys.map(|(index, key)| directory.file(&index.to_string(), &text::pkey(*key)));
        let pkeys = pkeys.collect::<Result<_, _>>()?;
        for (name, counters) in [("counters", &port.counters), ("hw_counters", &port.hw_counters)] {
            if !counters.is_empty() {
                let directory = self.make(name)?;
                for (name, value) in counters {
                    directory.file(name, &format!("{value}\n"))?;
                }
            }
        }
        let gids = self.gids(&port.gids, (port.info.gid_tbl_len as usize).min(MAX_GID_TABLE))?;
        Ok(PortFiles { attributes, pkeys, gids })
    }

    fn gids(&self, entries: &[Entry], length: usize) -> Result<Vec<Changing>, Errno> {
        let (gids, attributes) = (self.make("gids")?, self.make("gid_attrs")?);
        let (types, interfaces) = (attributes.make("types")?, attributes.make("ndevs")?);
        let empty = Entry::empty();
        let changing = entries.len().max(CHANGING_GIDS).min(length);
        let mut files = Vec::new();
        let mut first_of = Vec::<(&str, usize)>::new();
        for index in 0..length {
            let entry = entries.get(index).unwrap_or(&empty);
            let name = index.to_string();
            if index < changing {
                let gid = gids.file(&name, &text::gid(&entry.info.gid))?;
                let interface = interfaces.file(&name, &text::interface(&entry.interface))?;
                let kind = types.file(&name, text::gid_type(entry))?;
                files.push(Changing { gid, interface, kind });
                continue;
            }
            if index == changing {
                gids.file(&name, &text::gid(&entry.info.gid))?;
                interfaces.file(&name, "")?;
            } else {
                gids.same(changing, &name)?;
                interfaces.same(changing, &name)?;
            }
            // A page for each kind, not for each entry.
            let kind = text::gid_type(entry);
            match first_of.iter().find(|(other, _)| *other == kind) {
                Some((_, first)) => types.same(*first, &name)?,
                None => {
                    types.file(&name, kind)?;
                    first_of.push((kind, index));
                }
            }
        }
        Ok(files)
    }

    /// Gives the file `first` another name.
    fn same(&self, first: usize, name: &str) -> Result<(), Errno> {
        linkat(self.0.as_fd(), first.to_string(), self.0.as_fd(), name, AtFlags::empty())
    }
}

impl Entry {
    /// One that no address has.
    #[must_use]
    pub fn empty() -> Self {
        let info = GidInfo { gid: [0; 16], gid_type: GidType::ROCE_V2.0, ndev_ifindex: 0 };
        Self { info, interface: String::new() }
    }
}
