//! The ports of a node: one per proxy, named by LID, which say what GIDs they have.
//!
//! ```text
//! <run-dir>/fabric/
//!   lids/<lid>             locked by the port's warden, as long as it lives
//!   identities             who each port is: written by root alone, mapped for reading by every proxy
//!   gids                   a page for each port: mapped for writing by its own proxy, for reading by all others
//!   <device>/sockets/<lid> where the port takes links; all that a proxy sees of any file system
//! ```
//!
//! All of it is opened and mapped while the proxy is root still. Afterwards it can neither write another port's page nor
//! any identity, and needs to open nothing to find a port.

// UNSAFETY: declares what may be overlaid on shared memory.
#![allow(unsafe_code)]

use crate::shared::{Header, Held, Mapping, PAGE, Run, RunFile, SealedFile, allocate};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, ftruncate, open};
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use rustix::process::Pid;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// The most ports of one node: what the high bits of a QP number can name.
pub const MAX_PORTS: u16 = (1 << (24 - QPN_SHIFT)) - 1;
/// A QP number is its port's LID and, in this many low bits, chance. It is unique in the fabric, as on one RNIC, and
/// says which port is meant where several have the same address: containers that share a network namespace do, and
/// nobody keeps two with networks of their own from using the same.
pub const QPN_SHIFT: u32 = 14;
/// The most GIDs of one port.
pub const MAX_GIDS: usize = 64;

const PLACES: usize = MAX_PORTS as usize + 1;

/// An entry of a GID table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gid {
    /// Network order: an IPv6 address, or an IPv4-mapped one.
    pub raw: [u8; 16],
    /// Interface index in the container's network namespace; zero for the port's own.
    pub ifindex: u32,
}

/// Who the ports are, by LID: the pid of the proxy, zero for none.
#[repr(C)]
#[derive(Debug)]
struct Identities([AtomicU32; PLACES]);
// SAFETY: atomics only.
unsafe impl Header for Identities {}

/// What a port says of itself: the claims of its proxy, which may have been taken over.
#[repr(C, align(4096))]
#[derive(Debug)]
struct Page {
    /// Odd while the page is being written.
    version: AtomicU32,
    count: AtomicU32,
    gids: [[AtomicU64; 2]; MAX_GIDS],
}
// SAFETY: atomics only.
unsafe impl Header for Page {}
const _: () = assert!(size_of::<Page>() == PAGE);

/// The pages of all ports, by LID.
#[repr(C)]
#[derive(Debug)]
struct Pages([Page; PLACES]);
// SAFETY: atomics only.
unsafe impl Header for Pages {}

impl Page {
    fn write(&self, gids: &[Gid]) {
        let version = self.version.load(Ordering::Relaxed) | 1;
        self.version.store(version, Ordering::Relaxed);
        // SYNC POINT port-page: the odd version before the entries, the entries before the even one.
        fence(Ordering::Release);
        for (place, gid) in self.gids.iter().zip(gids) {
            let [high, low] = halves(&gid.raw);
            place[0].store(high, Ordering::Relaxed);
            place[1].store(low, Ordering::Relaxed);
        }
        self.count.store(gids.len().min(MAX_GIDS) as u32, Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Release);
    }

    /// Whether the port says that it has this GID. One that never finishes writing has none.
    fn has(&self, raw: &[u8; 16]) -> bool {
        let wanted = halves(raw);
        for _ in 0..1000 {
            let before = self.version.load(Ordering::Acquire);
            let count = (self.count.load(Ordering::Relaxed) as usize).min(MAX_GIDS);
            let found =
                self.gids[..count].iter().any(|gid| gid.each_ref().map(|half| half.load(Ordering::Relaxed)) == wanted);
            // SYNC POINT port-page: against `write`.
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == before {
                return found;
            }
            std::hint::spin_loop();
        }
        false
    }
}

fn halves(raw: &[u8; 16]) -> [u64; 2] {
    let half = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| raw[at + byte]));
    [half(0), half(8)]
}

/// A port that this process owns.
#[derive(Debug)]
pub struct Port {
    lid: u16,
    gids: Vec<Gid>,
    own: Held<Page>,
    pages: Held<Pages>,
    identities: Held<Identities>,
    /// Where the sockets are, as this process sees it now.
    sockets: PathBuf,
    /// Keeps the LID until the warden alone does.
    lock: Option<OwnedFd>,
}

/// What it takes, besides the port itself, to be a port: for [`crate::warden`].
#[derive(Debug)]
pub struct Tenure {
    lid: u16,
    /// The same lock as the port's: it holds as long as either is there.
    lock: OwnedFd,
    lock_path: PathBuf,
    socket_path: PathBuf,
    identities: Held<Identities>,
}

/// A port that has just been taken.
#[derive(Debug)]
pub struct Taken {
    /// For the proxy.
    pub port: Port,
    /// Listens for links.
    pub listener: OwnedFd,
    /// The directory of all ports' sockets.
    pub sockets: PathBuf,
    /// For whoever clears up when the port's proxy has ended.
    pub tenure: Tenure,
}

impl Taken {
    /// Takes the lowest free LID of the node for a port on `device`. `most`: the highest LID that may be taken.
    ///
    /// # Errors
    /// `EUSERS` if all are taken; otherwise what the kernel says of the files in `run_dir`.
    pub fn take(run_dir: &Path, device: &str, guid: u64, most: u16) -> Result<Self, Errno> {
        let fabric = run_dir.join("fabric");
        let (lids, sockets) = (fabric.join("lids"), fabric.join(device).join("sockets"));
        make_directory(&lids, 0o700)?;
        make_directory(&sockets, 0o711)?;
        let (lid, lock) = lock_lowest(&lids, most.min(MAX_PORTS))?;

        let identities = table(&fabric.join("identities"), size_of::<Identities>())?;
        let gids = table(&fabric.join("gids"), size_of::<Pages>())?;
        let whole = |file: &SealedFile, protection| {
            let run = Run { file: RunFile::Sealed(file), offset: 0, bytes: file.bytes().next_multiple_of(PAGE) };
            Mapping::of_runs(&[run], protection, false).map(Arc::new)
        };
        let own = Run { file: RunFile::Sealed(&gids.writable), offset: usize::from(lid) * PAGE, bytes: PAGE };
        allocate(&gids.writable, own.offset, own.bytes)?;
        allocate(&identities.writable, 0, size_of::<Identities>())?;
        let own = Arc::new(Mapping::of_runs(&[own], ProtFlags::READ | ProtFlags::WRITE, false)?).header(0);
        let tenure = Tenure {
            lid,
            lock: rustix::io::fcntl_dupfd_cloexec(&lock, 0)?,
            lock_path: lids.join(lid.to_string()),
            socket_path: sockets.join(lid.to_string()),
            identities: whole(&identities.writable, ProtFlags::READ | ProtFlags::WRITE)?.header(0),
        };
        // Through descriptors that are open for reading only: such mappings can never be made writable.
        let pages = whole(&gids.readable, ProtFlags::READ)?.header(0);
        let identities = whole(&identities.readable, ProtFlags::READ)?.header(0);
        let listener = listen_at(&sockets, lid)?;

        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&[0xfe, 0x80, 0, 0, 0, 0, 0, 0]);
        raw[8..].copy_from_slice(&guid.to_be_bytes());
        let gids = vec![Gid { raw, ifindex: 0 }];
        let port = Port { lid, gids, own, pages, identities, sockets: sockets.clone(), lock: Some(lock) };
        port.own.write(&port.gids);
        tenure.identities.0[usize::from(lid)].store(std::process::id(), Ordering::Release);
        Ok(Self { port, listener, sockets, tenure })
    }
}

impl AsFd for Tenure {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }
}

impl Tenure {
    /// The port's proxy has ended: nobody is this port any more, until the LID is taken again.
    pub fn end(&self) {
        self.identities.0[usize::from(self.lid)].store(0, Ordering::Release);
        // While the lock is held: nobody else can have taken the LID.
        let _ = std::fs::remove_file(&self.socket_path);
        let _ = std::fs::remove_file(&self.lock_path);
    }
}

impl Port {
    /// The port's LID, unique among the node's living ports.
    #[must_use]
    pub fn lid(&self) -> u16 {
        self.lid
    }

    /// The GID table; the port's own is the first.
    #[must_use]
    pub fn gids(&self) -> &[Gid] {
        &self.gids
    }

    /// Leaves the lock on the LID to the port's tenure: whoever holds the descriptor can let it go, and a proxy that was taken
    /// over could hand it to its container.
    pub fn leave_lock(&mut self) {
        self.lock = None;
    }

    /// The sockets are in `directory` from now on: the process sees other mounts.
    pub fn find_sockets_in(&mut self, directory: &Path) {
        self.sockets = directory.to_owned();
    }

    /// Brings the table up to date with the container's addresses.
    ///
    /// Addresses that stay keep their place; a new one takes the first empty place, as in a kernel's GID table. A GID is
    /// that of whoever has the address: if several ports do, all show it, and a QP number says which is meant.
    pub fn set_addresses(&mut self, addresses: &[Gid]) {
        const EMPTY: Gid = Gid { raw: [0; 16], ifindex: 0 };
        let mut table = self.gids.clone();
        for entry in table.iter_mut().skip(1).filter(|entry| !addresses.contains(entry)) {
            *entry = EMPTY;
        }
        for address in addresses {
            if table.contains(address) {
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
            self.own.write(&self.gids);
        }
    }

    /// The port that `qp_num` belongs to, if it has this GID.
    #[must_use]
    pub fn find(&self, raw: &[u8; 16], qp_num: u32) -> Option<u16> {
        let lid = u16::try_from(qp_num >> QPN_SHIFT).ok().filter(|lid| self.lives(*lid) && *raw != [0; 16])?;
        let has = match lid == self.lid {
            true => self.gids.iter().any(|gid| gid.raw == *raw),
            false => self.pages.0[usize::from(lid)].has(raw),
        };
        has.then_some(lid)
    }

    /// Whether a port has this LID. One whose proxy and warden were both killed has it until the LID is taken again; its
    /// socket then answers nobody.
    #[must_use]
    pub fn lives(&self, lid: u16) -> bool {
        lid == self.lid || self.proxy_of(lid).is_some()
    }

    /// Whether the process `pid` is the proxy of the port `lid`.
    #[must_use]
    pub fn belongs_to(&self, lid: u16, pid: Pid) -> bool {
        self.proxy_of(lid) == Some(pid)
    }

    fn proxy_of(&self, lid: u16) -> Option<Pid> {
        let pid = self.identities.0.get(usize::from(lid))?.load(Ordering::Acquire);
        Pid::from_raw(i32::try_from(pid).ok()?)
    }

    /// Where the proxy of another port takes links.
    #[must_use]
    pub fn socket_of(&self, lid: u16) -> PathBuf {
        self.sockets.join(lid.to_string())
    }
}

/// Makes a directory for proxies, whatever the mask of the process.
fn make_directory(path: &Path, mode: u32) -> Result<(), Errno> {
    let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    std::fs::create_dir_all(path).map_err(errno)?;
    rustix::fs::chmod(path, Mode::from_raw_mode(mode))
}

fn lock_lowest(directory: &Path, most: u16) -> Result<(u16, OwnedFd), Errno> {
    for lid in 1..=most {
        let path = directory.join(lid.to_string());
        // For reading, so that whoever inherits the descriptor can do nothing by it.
        let flags = OFlags::RDONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = open(&path, flags, Mode::RUSR | Mode::WUSR)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // Its last owner removed the file between our opening and locking it: the name is another file's now.
            Ok(()) if !is_at(&file, &path) => {}
            Ok(()) => return Ok((lid, file)),
            Err(Errno::WOULDBLOCK) => {}
            Err(error) => return Err(error),
        }
    }
    Err(Errno::USERS)
}

fn is_at(file: &OwnedFd, path: &Path) -> bool {
    let of = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    matches!((rustix::fs::fstat(file), rustix::fs::lstat(path)), (Ok(a), Ok(b)) if of(a) == of(b))
}

/// A file that all proxies of the node map.
struct Table {
    writable: SealedFile,
    readable: SealedFile,
}

fn table(path: &Path, bytes: usize) -> Result<Table, Errno> {
    let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let writable = open(path, flags | OFlags::RDWR | OFlags::CREATE, Mode::RUSR | Mode::WUSR)?;
    // Only root writes in this directory, and nothing makes the file shorter.
    if (rustix::fs::fstat(&writable)?.st_size as u64) < bytes as u64 {
        ftruncate(&writable, bytes.next_multiple_of(PAGE) as u64)?;
    }
    let readable = open(path, flags | OFlags::RDONLY, Mode::empty())?;
    Ok(Table { writable: SealedFile::trusted(writable)?, readable: SealedFile::trusted(readable)? })
}

fn listen_at(directory: &Path, lid: u16) -> Result<OwnedFd, Errno> {
    let name = lid.to_string();
    // The LID is ours, so a socket of this name is a dead proxy's.
    let _ = std::fs::remove_file(directory.join(&name));
    let directory = open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    // A socket's path has at most 107 bytes; this one is short wherever the directory is.
    let path = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
    bind(&socket, &SocketAddrUnix::new(&path)?)?;
    // Other proxies have other user ids; only they see the directory.
    rustix::fs::chmodat(&directory, &name, Mode::from_raw_mode(0o666), rustix::fs::AtFlags::empty())?;
    listen(&socket, 128)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> Gid {
        let mut raw = [0; 16];
        raw[10..].copy_from_slice(&[0xff, 0xff, 10, 0, 0, last]);
        Gid { raw, ifindex: 2 }
    }

    fn take(directory: &Path, guid: u64) -> Taken {
        Taken::take(directory, "soft0", guid, MAX_PORTS).unwrap()
    }

    fn queue_pair_of(lid: u16) -> u32 {
        u32::from(lid) << QPN_SHIFT | 77
    }

    #[test]
    fn ports_are_found_by_gid_while_they_live() {
        let directory = tempfile::tempdir().unwrap();
        let mut a = take(directory.path(), 1);
        let b = take(directory.path(), 2).port;
        assert_eq!((a.port.lid(), b.lid()), (1, 2));
        a.port.set_addresses(&[address(1)]);
        assert_eq!(b.find(&address(1).raw, queue_pair_of(1)), Some(1));
        assert_eq!(b.find(&b.gids()[0].raw, queue_pair_of(2)), Some(2));
        assert!(b.lives(1) && b.belongs_to(1, rustix::process::getpid()));
        a.tenure.end();
        drop(a);
        assert_eq!(b.find(&address(1).raw, queue_pair_of(1)), None);
        assert!(!b.lives(1) && !b.belongs_to(1, rustix::process::getpid()));
        let c = take(directory.path(), 3).port;
        assert_eq!(c.lid(), 1);
        assert_eq!(b.find(&address(1).raw, queue_pair_of(1)), None, "the page is its last owner's");
    }

    #[test]
    fn an_address_is_that_of_whoever_has_it_and_a_qp_number_says_who_is_meant() {
        let directory = tempfile::tempdir().unwrap();
        let (mut a, mut b) = (take(directory.path(), 1).port, take(directory.path(), 2).port);
        a.set_addresses(&[address(1)]);
        b.set_addresses(&[address(1), address(2)]);
        assert_eq!(b.gids()[1..], [address(1), address(2)]);
        for port in [&a, &b] {
            assert_eq!(port.find(&address(1).raw, queue_pair_of(1)), Some(1));
            assert_eq!(port.find(&address(1).raw, queue_pair_of(2)), Some(2));
            assert_eq!(port.find(&address(2).raw, queue_pair_of(1)), None);
            assert_eq!(port.find(&address(1).raw, queue_pair_of(3)), None);
        }
    }

    #[test]
    fn addresses_keep_their_index() {
        let directory = tempfile::tempdir().unwrap();
        let mut port = take(directory.path(), 1).port;
        port.set_addresses(&[address(1), address(2), address(3)]);
        port.set_addresses(&[address(1), address(3)]);
        assert_eq!(port.gids()[3], address(3));
        port.set_addresses(&[address(1), address(3), address(4)]);
        assert_eq!(port.gids()[2], address(4));
    }

    #[test]
    fn lids_end_where_user_ids_do() {
        let directory = tempfile::tempdir().unwrap();
        let taken = [1, 2].map(|guid| Taken::take(directory.path(), "soft0", guid, 2).unwrap());
        assert_eq!(Taken::take(directory.path(), "soft0", 3, 2).unwrap_err(), Errno::USERS);
        drop(taken);
    }

    #[test]
    fn a_page_that_is_never_finished_or_says_too_much_harms_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (take(directory.path(), 1).port, take(directory.path(), 2).port);
        a.own.count.store(u32::MAX, Ordering::Relaxed);
        assert_eq!(b.find(&address(1).raw, queue_pair_of(1)), None);
        assert_eq!(b.find(&a.gids()[0].raw, queue_pair_of(1)), Some(1));
        a.own.version.store(1, Ordering::Relaxed);
        assert_eq!(b.find(&a.gids()[0].raw, queue_pair_of(1)), None);
    }

    #[test]
    fn sockets_may_be_deep_in_the_file_system() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("d".repeat(120));
        assert_eq!(take(&deep, 1).port.lid(), 1);
    }
}
