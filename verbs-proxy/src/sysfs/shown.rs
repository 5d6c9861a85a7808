//! The part of the files that changes while the container runs: its addresses come and go, and with engines that make its network
//! after the hooks all but the first GID come then; and a card's port goes down and comes back.

use super::tree::{Changing, PortFiles, attributes, write_tree};
use super::{Device, Entry, text};
use crate::pacing::Nanos;
use ringfence_protocol::control::PortInfo;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::ftruncate;
use rustix::io::{Errno, pwrite};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

/// How long changes are not heard of after one: a container with rights over its network can make them as fast as it likes.
const QUIET: Nanos = 20_000_000;
/// Messages that are taken at once; the rest are heard of again.
const MOST_MESSAGES: usize = 64;
/// `RTMGRP_LINK`, for names, `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR` of `<linux/rtnetlink.h>`.
const GROUPS: u32 = 0x1 | 0x10 | 0x100;

/// A device that is shown, whose first port is kept up to date.
#[derive(Debug)]
pub struct Shown {
    /// Of the port's attributes, each with what it says.
    attributes: Vec<(OwnedFd, String)>,
    pkeys: Vec<(OwnedFd, u16)>,
    entries: Vec<(Changing, Entry)>,
    /// Where the kernel tells of changes in the network namespace that this process is in.
    changes: OwnedFd,
    quiet_until: Nanos,
}

impl Shown {
    /// Makes all files of `device` in the tree with the root `root`. To be called in the container's network namespace, while the
    /// process is root still and has one thread.
    ///
    /// # Errors
    /// What the kernel says of the file system, or of sockets.
    pub fn new(device: &Device, root: &OwnedFd) -> Result<Self, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Protocol 0 is routing.
        let changes = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&changes, &SocketAddrNetlink::new(0, GROUPS))?;
        let port = device.ports.first();
        let PortFiles { attributes: files, pkeys, gids } =
            write_tree(device, root)?.into_iter().next().unwrap_or_default();
        let said = port.map(|port| attributes(&port.info)).into_iter().flatten().map(|(_, content)| content);
        let attributes = files.into_iter().zip(said).collect();
        let entry = |index: usize| port.and_then(|port| port.gids.get(index).cloned()).unwrap_or_else(Entry::empty);
        let entries = gids.into_iter().enumerate().map(|(index, files)| (files, entry(index))).collect();
        let pkeys = pkeys.into_iter().zip(port.iter().flat_map(|port| port.pkeys.iter().copied())).collect();
        Ok(Self { attributes, pkeys, entries, changes, quiet_until: 0 })
    }

    /// When changes are heard of again.
    #[must_use]
    pub fn quiet_until(&self) -> Nanos {
        self.quiet_until
    }

    /// Takes what the kernel has told, which is not believed but looked up. Others may send here, too.
    pub fn hear(&mut self, now: Nanos) {
        self.quiet_until = now + QUIET;
        let mut message = [0_u8; 64];
        for _ in 0..MOST_MESSAGES {
            match recv(&self.changes, &mut message, RecvFlags::DONTWAIT) {
                // Too many for the socket: the kernel says so once.
                Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(_) => break,
            }
        }
    }

    /// Brings the files of the port up to date, but for its GID table.
    pub fn update_port(&mut self, info: &PortInfo, pkeys: &[u16]) {
        for ((file, shown), key) in self.pkeys.iter_mut().zip(pkeys) {
            if shown != key && write_line(file, &text::pkey(*key)).is_ok() {
                *shown = *key;
            }
        }
        for ((file, shown), (_, content)) in self.attributes.iter_mut().zip(attributes(info)) {
            if *shown != content && write_line(file, &content).is_ok() {
                *shown = content;
            }
        }
    }

    /// Brings the files up to date with the table's beginning `entries`; the rest of it is empty.
    pub fn update(&mut self, entries: impl IntoIterator<Item = Entry>) {
        let entries = entries.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
        for ((files, shown), entry) in self.entries.iter_mut().zip(entries) {
            let entry = entry.unwrap_or_else(Entry::empty);
            if *shown != entry && write_entry(files, &entry).is_ok() {
                *shown = entry;
            }
        }
    }
}

impl AsFd for Shown {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.changes.as_fd()
    }
}

/// If it fails, as on a full file system, it is tried again with the next change.
fn write_entry(files: &Changing, entry: &Entry) -> Result<(), Errno> {
    write_line(&files.gid, &text::gid(&entry.info.gid))?;
    write_line(&files.interface, &text::interface(&entry.interface))?;
    write_line(&files.kind, text::gid_type(entry))
}

/// Who reads meanwhile finds the new line, with the end of the old one behind it if that was longer.
fn write_line(file: &OwnedFd, line: &str) -> Result<(), Errno> {
    pwrite(file, line.as_bytes(), 0)?;
    ftruncate(file, line.len() as u64)
}
