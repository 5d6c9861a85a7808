//! The addresses of the container's network namespace, which become GIDs.

use super::ports::Gid;
use crate::errors::numbered;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::collections::HashMap;

/// Moves the process, which has one thread yet, into `netns`, unless it is there: a proxy without root may look at the
/// host's namespace, but not join it. Returns whether it was elsewhere.
///
/// All of it, not only what asks for addresses: abstract Unix sockets belong to network namespaces, and the host's daemons
/// have some that trust whoever can connect.
///
/// # Errors
/// What the kernel says of the namespace.
pub fn join(netns: &OwnedFd) -> rustix::io::Result<bool> {
    let inode = |found: rustix::fs::Stat| (found.st_dev, found.st_ino);
    if inode(rustix::fs::fstat(netns)?) == inode(rustix::fs::stat("/proc/self/ns/net")?) {
        return Ok(false);
    }
    move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(true)
}

/// Addresses, and the names of their interfaces.
#[derive(Debug, Default)]
pub struct Addresses {
    /// As GIDs.
    pub gids: Vec<Gid>,
    interfaces: HashMap<u32, String>,
}

impl Addresses {
    /// The interface with the index `index`, if it has an address.
    #[must_use]
    pub fn interface(&self, index: u32) -> Option<&str> {
        self.interfaces.get(&index).map(String::as_str)
    }
}

/// The addresses now.
///
/// # Errors
/// What the kernel says, which may be short of memory; any at all where one interface has more to say than the C library has room for.
pub fn list() -> Result<Addresses, Errno> {
    let addresses = getifaddrs().map_err(|error| numbered(error as i32))?;
    let addresses: Vec<_> = addresses.filter(|address| !address.flags.contains(InterfaceFlags::IFF_LOOPBACK)).collect();
    // Each interface has an entry of its own, which knows its index; asking for it would take another socket.
    let indices: HashMap<&str, u32> = addresses
        .iter()
        .filter_map(|address| {
            let index = address.address.as_ref()?.as_link_addr()?.ifindex();
            Some((address.interface_name.as_str(), u32::try_from(index).ok()?))
        })
        .collect();
    let mut interfaces = HashMap::new();
    let gids = addresses.iter().filter_map(|address| {
        let storage = address.address.as_ref()?;
        let raw = match (storage.as_sockaddr_in(), storage.as_sockaddr_in6()) {
            (Some(v4), _) => v4.ip().to_ipv6_mapped().octets(),
            (_, Some(v6)) => v6.ip().octets(),
            _ => return None,
        };
        // An alias such as eth0:1 is an address of eth0.
        let interface = address.interface_name.split(':').next()?;
        let ifindex = *indices.get(interface)?;
        interfaces.entry(ifindex).or_insert_with(|| interface.to_owned());
        Some(Gid { raw, ifindex })
    });
    Ok(Addresses { gids: gids.collect(), interfaces })
}
