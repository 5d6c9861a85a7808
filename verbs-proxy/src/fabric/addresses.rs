//! The addresses of the container's network namespace, which become GIDs.

use super::ports::Gid;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use rustix::fd::{AsFd, OwnedFd};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// A thread that lives in the container's network namespace and answers with its addresses.
///
/// A thread of its own, because a namespace is joined by a thread, and because joining takes a capability that the
/// proxy gives up before it listens to anybody.
#[derive(Debug)]
pub struct Addresses {
    ask: SyncSender<()>,
    answer: Receiver<Vec<Gid>>,
}

impl Addresses {
    /// Starts the thread in `netns`.
    pub fn of(netns: OwnedFd) -> std::io::Result<Self> {
        let (ask, asked) = sync_channel::<()>(1);
        let (reply, answer) = sync_channel(1);
        let (joined, result) = sync_channel(1);
        std::thread::Builder::new().name("addresses".into()).stack_size(128 << 10).spawn(move || {
            let join = join(&netns);
            drop(netns);
            let failed = join.is_err();
            let privileges = crate::sandbox::drop_privileges();
            let _ = joined.send(join);
            if failed || privileges.is_err() {
                return;
            }
            while asked.recv().is_ok() {
                if reply.send(list()).is_err() {
                    return;
                }
            }
        })?;
        result.recv().map_err(std::io::Error::other)??;
        Ok(Self { ask, answer })
    }

    /// The addresses now; none if they cannot be listed.
    #[must_use]
    pub fn list(&self) -> Vec<Gid> {
        self.ask.send(()).ok().and_then(|()| self.answer.recv().ok()).unwrap_or_default()
    }
}

/// Moves the thread into `netns`, unless it is there: a proxy without root may look at the host's namespace, but not join it.
fn join(netns: &OwnedFd) -> rustix::io::Result<()> {
    let inode = |found: rustix::fs::Stat| (found.st_dev, found.st_ino);
    if inode(rustix::fs::fstat(netns)?) == inode(rustix::fs::stat("/proc/thread-self/ns/net")?) {
        return Ok(());
    }
    move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))
}

fn list() -> Vec<Gid> {
    let Ok(addresses) = getifaddrs() else { return Vec::new() };
    addresses
        .filter(|address| !address.flags.contains(InterfaceFlags::IFF_LOOPBACK))
        .filter_map(|address| {
            let ifindex = nix::net::if_::if_nametoindex(address.interface_name.as_str()).ok()?;
            let storage = address.address?;
            let raw = match (storage.as_sockaddr_in(), storage.as_sockaddr_in6()) {
                (Some(v4), _) => v4.ip().to_ipv6_mapped().octets(),
                (_, Some(v6)) => v6.ip().octets(),
                _ => return None,
            };
            Some(Gid { raw, ifindex })
        })
        .collect()
}
