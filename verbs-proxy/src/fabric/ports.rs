//! The ports of a fabric: one per proxy, found by LID or GID.
//!
//! A port is a file `<lid>.port` in the fabric's directory, locked by the proxy that owns it. The lock goes with the
//! process, however it ends, so a port of a dead proxy is free again at once and nothing needs to be swept.

use rustix::fd::OwnedFd;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, ftruncate, open};
use rustix::io::Errno;
use std::path::{Path, PathBuf};

/// The most ports of one fabric: what the high bits of a QP number can name.
pub const MAX_PORTS: u16 = (1 << (24 - QPN_SHIFT)) - 1;
/// A QP number is its port's LID and, in this many low bits, chance. It is unique in the fabric, as on one RNIC, and
/// tells apart the ports of containers that share a network namespace and with it their GIDs.
pub const QPN_SHIFT: u32 = 14;
/// The most GIDs of one port.
pub const MAX_GIDS: usize = 64;

/// An entry of a GID table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gid {
    /// Network order: an IPv6 address, or an IPv4-mapped one.
    pub raw: [u8; 16],
    /// Interface index in the container's network namespace; zero for the port's own.
    pub ifindex: u32,
}

const ENTRY: usize = 20;
const HEAD: usize = 24;

/// A port that this process owns.
#[derive(Debug)]
pub struct Port {
    lid: u16,
    guid: u64,
    /// The container's network namespace, by inode.
    netns: u64,
    directory: PathBuf,
    file: OwnedFd,
    gids: Vec<Gid>,
}

fn path(directory: &Path, lid: u16, extension: &str) -> PathBuf {
    directory.join(format!("{lid}.{extension}"))
}

impl Port {
    /// Takes the lowest free LID of the fabric in `directory`.
    pub fn take(directory: &Path, guid: u64, netns: u64) -> Result<Self, Errno> {
        for lid in 1..=MAX_PORTS {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let file = open(path(directory, lid, "port"), flags, Mode::RUSR | Mode::WUSR)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // Its last owner removed the file between our opening and locking it: the name is another file's now.
                Ok(()) if !is_at(&file, &path(directory, lid, "port")) => {}
                Ok(()) => {
                    let mut raw = [0; 16];
                    raw[..8].copy_from_slice(&[0xfe, 0x80, 0, 0, 0, 0, 0, 0]);
                    raw[8..].copy_from_slice(&guid.to_be_bytes());
                    let mut port = Self {
                        lid,
                        guid,
                        netns,
                        directory: directory.to_owned(),
                        file,
                        gids: vec![Gid { raw, ifindex: 0 }],
                    };
                    port.publish()?;
                    return Ok(port);
                }
                Err(Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Errno::NOSPC)
    }

    /// The port's LID, unique among the fabric's living ports.
    #[must_use]
    pub fn lid(&self) -> u16 {
        self.lid
    }

    /// The GID table; the port's own is the first.
    #[must_use]
    pub fn gids(&self) -> &[Gid] {
        &self.gids
    }

    /// Where this port's proxy takes links.
    #[must_use]
    pub fn socket_path(&self) -> PathBuf {
        path(&self.directory, self.lid, "sock")
    }

    /// Brings the table up to date with the container's addresses.
    ///
    /// Addresses that stay keep their place; a new one takes the first empty place, as in a kernel's GID table. One
    /// that a living port in another network namespace has already is not shown: two containers may use the same address
    /// in networks of their own, but on one fabric it can only name one of them.
    pub fn set_addresses(&mut self, addresses: &[Gid]) -> Result<(), Errno> {
        const EMPTY: Gid = Gid { raw: [0; 16], ifindex: 0 };
        let mut table = self.gids.clone();
        for entry in table.iter_mut().skip(1).filter(|entry| !addresses.contains(entry)) {
            *entry = EMPTY;
        }
        for address in addresses {
            if table.contains(address) || self.is_taken(&address.raw) {
                continue;
            }
            match table.iter().skip(1).position(|entry| *entry == EMPTY) {
                Some(index) => table[index + 1] = *address,
                None if table.len() < MAX_GIDS => table.push(*address),
                None => break,
            }
        }
        while table.last() == Some(&EMPTY) {
            table.pop();
        }
        if table != self.gids {
            self.gids = table;
            self.publish()?;
        }
        Ok(())
    }

    fn publish(&mut self) -> Result<(), Errno> {
        let pid = u64::from(std::process::id());
        let mut bytes = [self.guid.to_be_bytes(), self.netns.to_ne_bytes(), pid.to_ne_bytes()].concat();
        for gid in &self.gids {
            bytes.extend(gid.raw);
            bytes.extend(gid.ifindex.to_ne_bytes());
        }
        rustix::io::pwrite(&self.file, &bytes, 0)?;
        ftruncate(&self.file, bytes.len() as u64)
    }

    fn is_taken(&self, raw: &[u8; 16]) -> bool {
        living(&self.directory).any(|(lid, port)| lid != self.lid && port.netns != self.netns && port.has(raw))
    }

    /// The living port with this GID; among several in one network namespace, the one that `qp_num` belongs to.
    #[must_use]
    pub fn find(&self, raw: &[u8; 16], qp_num: u32) -> Option<u16> {
        let named = (qp_num >> QPN_SHIFT) as u16;
        let own = self.gids.iter().any(|gid| gid.raw == *raw).then_some(self.lid);
        let others =
            living(&self.directory).filter(|(lid, port)| *lid != self.lid && port.has(raw)).map(|(lid, _)| lid);
        let found: Vec<u16> = own.into_iter().chain(others).collect();
        found.iter().find(|lid| **lid == named).or(found.first()).copied().filter(|_| *raw != [0; 16])
    }

    /// Whether a living port has this LID.
    #[must_use]
    pub fn lives(&self, lid: u16) -> bool {
        lid == self.lid || read(&self.directory, lid).is_some()
    }

    /// Whether a living port is this process's: what a process that says so must be.
    #[must_use]
    pub fn belongs_to(&self, lid: u16, pid: rustix::process::Pid) -> bool {
        read(&self.directory, lid).is_some_and(|port| port.pid == pid.as_raw_nonzero().get() as u64)
    }

    /// Where the proxy of another port takes links.
    #[must_use]
    pub fn socket_of(&self, lid: u16) -> PathBuf {
        path(&self.directory, lid, "sock")
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.socket_path());
        // While the lock is held: nobody else can have taken the LID.
        let _ = std::fs::remove_file(path(&self.directory, self.lid, "port"));
    }
}

fn is_at(file: &OwnedFd, path: &Path) -> bool {
    let of = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    matches!((rustix::fs::fstat(file), rustix::fs::lstat(path)), (Ok(a), Ok(b)) if of(a) == of(b))
}

/// What a port's file says.
#[derive(Debug)]
struct Published {
    netns: u64,
    pid: u64,
    gids: Vec<Gid>,
}

impl Published {
    fn has(&self, raw: &[u8; 16]) -> bool {
        self.gids.iter().any(|gid| gid.raw == *raw)
    }
}

fn living(directory: &Path) -> impl Iterator<Item = (u16, Published)> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let lids = entries.filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".port")?.parse().ok());
    let directory = directory.to_owned();
    lids.filter_map(move |lid| Some((lid, read(&directory, lid)?)))
}

/// What a port's file says, if its owner lives.
fn read(directory: &Path, lid: u16) -> Option<Published> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = open(path(directory, lid, "port"), flags, Mode::empty()).ok()?;
    if flock(&file, FlockOperation::NonBlockingLockShared) != Err(Errno::WOULDBLOCK) {
        return None;
    }
    let mut bytes = vec![0; HEAD + MAX_GIDS * ENTRY];
    let length = rustix::io::pread(&file, &mut bytes[..], 0).ok()?;
    let netns = u64::from_ne_bytes(bytes.get(8..16)?.try_into().ok()?);
    let pid = u64::from_ne_bytes(bytes.get(16..HEAD)?.try_into().ok()?);
    let entries = bytes.get(HEAD..length)?.chunks_exact(ENTRY);
    let gids = entries.filter_map(|entry| {
        let (raw, ifindex) = entry.split_at(16);
        let raw: [u8; 16] = raw.try_into().ok()?;
        (raw != [0; 16]).then_some(Gid { raw, ifindex: u32::from_ne_bytes(ifindex.try_into().ok()?) })
    });
    Some(Published { netns, pid, gids: gids.collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> Gid {
        let mut raw = [0; 16];
        raw[10..].copy_from_slice(&[0xff, 0xff, 10, 0, 0, last]);
        Gid { raw, ifindex: 2 }
    }

    #[test]
    fn ports_are_found_by_gid_while_they_live() {
        let directory = tempfile::tempdir().unwrap();
        let mut a = Port::take(directory.path(), 1, 1).unwrap();
        let b = Port::take(directory.path(), 2, 2).unwrap();
        assert_eq!((a.lid(), b.lid()), (1, 2));
        a.set_addresses(&[address(1)]).unwrap();
        assert_eq!(b.find(&address(1).raw, 0), Some(1));
        assert_eq!(b.find(&b.gids()[0].raw, 0), Some(2));
        assert!(b.lives(1));
        drop(a);
        assert_eq!(b.find(&address(1).raw, 0), None);
        assert!(!b.lives(1));
        assert_eq!(Port::take(directory.path(), 3, 3).unwrap().lid(), 1);
    }

    #[test]
    fn an_address_names_one_port_only() {
        let directory = tempfile::tempdir().unwrap();
        let mut a = Port::take(directory.path(), 1, 1).unwrap();
        let mut b = Port::take(directory.path(), 2, 2).unwrap();
        a.set_addresses(&[address(1)]).unwrap();
        b.set_addresses(&[address(1), address(2)]).unwrap();
        assert_eq!(b.gids()[1..], [address(2)]);
        a.set_addresses(&[]).unwrap();
        b.set_addresses(&[address(1), address(2)]).unwrap();
        assert_eq!(b.gids()[1..], [address(2), address(1)]);
    }

    #[test]
    fn ports_of_one_network_namespace_share_addresses_and_are_told_apart_by_qp_number() {
        let directory = tempfile::tempdir().unwrap();
        let mut ports = [(); 2].map(|()| Port::take(directory.path(), 1, 9).unwrap());
        for port in &mut ports {
            port.set_addresses(&[address(1)]).unwrap();
        }
        let [a, b] = ports;
        assert_eq!(a.find(&address(1).raw, 1 << QPN_SHIFT), Some(1));
        assert_eq!(a.find(&address(1).raw, 2 << QPN_SHIFT | 77), Some(2));
        assert_eq!(b.find(&address(1).raw, 2 << QPN_SHIFT | 77), Some(2));
    }

    #[test]
    fn addresses_keep_their_index() {
        let directory = tempfile::tempdir().unwrap();
        let mut port = Port::take(directory.path(), 1, 1).unwrap();
        port.set_addresses(&[address(1), address(2), address(3)]).unwrap();
        port.set_addresses(&[address(1), address(3)]).unwrap();
        assert_eq!(port.gids()[3], address(3));
        port.set_addresses(&[address(1), address(3), address(4)]).unwrap();
        assert_eq!(port.gids()[2], address(4));
    }
}
