//! RDMA devices over netlink: what there are in a network namespace, who uses them, and moving one to another (`rdma_netlink.h`).
//!
//! A socket speaks of the namespace that it was made in. The kernel does what it is asked before the request is sent: there is
//! nothing to wait for but its answer.

pub mod counters;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::fmt;
use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// `NETLINK_RDMA` of `<linux/netlink.h>`.
const NETLINK_RDMA: u32 = 20;
/// `RDMA_NL_NLDEV`, which a message's type has above the command.
const CLIENT: u16 = 5;
/// Commands, `RDMA_NLDEV_CMD_*`.
const GET: u16 = 1;
const SET: u16 = 2;
const RES_QP_GET: u16 = 10;
const GET_CHARDEV: u16 = 15;
const RES_CTX_GET: u16 = 22;
/// Attributes, `RDMA_NLDEV_ATTR_*`.
const DEV_INDEX: u16 = 1;
const DEV_NAME: u16 = 2;
const NODE_GUID: u16 = 6;
const RES_QP: u16 = 19;
const RES_QP_ENTRY: u16 = 20;
const RES_TYPE: u16 = 26;
const RES_PID: u16 = 28;
const RES_KERN_NAME: u16 = 29;
const NET_NS_FD: u16 = 68;
const CHARDEV_TYPE: u16 = 69;
const CHARDEV_NAME: u16 = 70;
const CHARDEV: u16 = 72;
const RES_CTX: u16 = 86;
const RES_CTX_ENTRY: u16 = 87;
/// `IB_QPT_RC` of `<rdma/ib_verbs.h>`.
const RELIABLE_CONNECTION: u8 = 2;

/// Flags of a message, and types that are the protocol's own (`netlink(7)`).
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// Of an attribute's type, what is no flag.
const KIND: u16 = 0x3fff;
/// `struct nlmsghdr` and `struct nlattr`.
const HEADER: usize = 16;
const ATTRIBUTE: usize = 4;

/// How long an answer may take. It is there when the request has been sent.
const PATIENCE: Duration = Duration::from_secs(5);
/// The kernel sends at most this much at once.
const BUFFER: usize = 64 << 10;

/// A node GUID, written as sysfs writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guid(pub u64);

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |shift: u32| (self.0 >> shift) as u16;
        write!(f, "{:04x}:{:04x}:{:04x}:{:04x}", part(48), part(32), part(16), part(0))
    }
}

/// An RDMA device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The kernel's number for it, as long as it is there.
    pub index: u32,
    /// Unique on the host, in whichever namespace it is.
    pub name: String,
    /// Its own; some virtual functions have 0.
    pub guid: Guid,
}

/// A device's character device for verbs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// `uverbs0`; another one, perhaps, after each move.
    pub name: String,
    /// Its number.
    pub major: u32,
    /// See `major`.
    pub minor: u32,
}

/// Who uses a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// A process that has it open.
    Process(i32),
    /// A part of the kernel, by its name, that has connections on it.
    Kernel(String),
}

/// A socket of a network namespace.
pub struct Socket {
    socket: OwnedFd,
}

impl Socket {
    /// One of the namespace that the calling thread is in.
    ///
    /// # Errors
    /// `EPROTONOSUPPORT` where the kernel has no RDMA devices.
    pub fn open() -> io::Result<Self> {
        let protocol = Protocol::from_raw(NonZeroU32::new(NETLINK_RDMA).expect("it is not 0"));
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(protocol))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        Ok(Self { socket })
    }

    /// The devices that are there.
    pub fn devices(&self) -> io::Result<Vec<Device>> {
        let answers = self.ask(GET, DUMP, &[])?;
        Ok(answers.iter().filter_map(|answer| device(answer)).collect())
    }

    /// The character device for verbs of the device with this index.
    ///
    /// # Errors
    /// Also without the module `ib_uverbs`.
    pub fn verbs(&self, index: u32) -> io::Result<Node> {
        let request = [attribute(DEV_INDEX, &index.to_ne_bytes()), attribute(CHARDEV_TYPE, b"uverbs\0")].concat();
        let answers = self.ask(GET_CHARDEV, 0, &request)?;
        let node = answers.iter().find_map(|answer| node(answer));
        node.ok_or_else(|| io::Error::other("the kernel names no character device for verbs"))
    }

    /// Who uses the device with this index. Kernels before 5.15 do not tell which processes do.
    pub fn users(&self, index: u32) -> io::Result<Vec<User>> {
        let request = attribute(DEV_INDEX, &index.to_ne_bytes());
        let contexts = match self.ask(RES_CTX_GET, DUMP, &request) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Vec::new(),
            result => result?,
        };
        let processes = contexts.iter().flat_map(|answer| entries(answer, RES_CTX, RES_CTX_ENTRY));
        let processes = processes.map(|entry| User::Process(number(entry, RES_PID).unwrap_or(0) as i32));
        let pairs = self.ask(RES_QP_GET, DUMP, &request)?;
        let pairs = pairs.iter().flat_map(|answer| entries(answer, RES_QP, RES_QP_ENTRY));
        // Every device has the kernel's own pairs for management, and on InfiniBand those of its interfaces.
        let connected = pairs.filter(|entry| find(entry, RES_TYPE).is_some_and(|kind| *kind == [RELIABLE_CONNECTION]));
        let kernel = connected.filter_map(|entry| text(entry, RES_KERN_NAME).map(User::Kernel));
        let mut users: Vec<User> = Vec::new();
        for user in processes.chain(kernel) {
            if !users.contains(&user) {
                users.push(user);
            }
        }
        Ok(users)
    }

    /// Moves the device with this index to the network namespace `namespace`. Whoever has it open loses it.
    ///
    /// The calling thread must be in the namespace of the socket.
    ///
    /// # Errors
    /// `EOPNOTSUPP` of drivers that cannot, and where the kernel shows devices in all namespaces.
    pub fn move_to(&self, index: u32, namespace: BorrowedFd<'_>) -> io::Result<()> {
        self.ask(SET, ACK, &moving(index, namespace.as_raw_fd() as u32)).map(drop)
    }

    /// Sends a request, and returns the attributes of each answer.
    fn ask(&self, command: u16, flags: u16, attributes: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let sequence = u32::from(command);
        rustix::net::send(&self.socket, &message(command, flags, sequence, attributes), SendFlags::empty())?;
        let (mut answers, mut buffer) = (Vec::new(), vec![0; BUFFER]);
        loop {
            let (length, _) = match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => {
                    return Err(io::Error::other(format!("the kernel has not answered within {PATIENCE:?}")));
                }
                result => result?,
            };
            match take(&buffer[..length], sequence, &mut answers)? {
                // A dump ends by a message of its own, a change by its acknowledgement, all else by the first answer.
                End::Told => return Ok(answers),
                End::Open if flags == 0 && !answers.is_empty() => return Ok(answers),
                End::Open => {}
            }
        }
    }
}

/// Whether the kernel has said that nothing more comes.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Told,
    Open,
}

/// Takes the messages of what was received in one piece.
fn take(mut bytes: &[u8], sequence: u32, answers: &mut Vec<Vec<u8>>) -> io::Result<End> {
    while bytes.len() >= HEADER {
        let length = word(&bytes[..4]) as usize;
        let kind = u16::from_ne_bytes([bytes[4], bytes[5]]);
        if length < HEADER || length > bytes.len() {
            return Err(io::Error::other(format!("the kernel's answer has {} bytes, and says {length}", bytes.len())));
        }
        let body = &bytes[HEADER..length];
        // What is left of an earlier request.
        let ours = word(&bytes[8..12]) == sequence;
        match kind {
            _ if !ours => {}
            ERROR | DONE => {
                // Negative, or 0 for an acknowledgement.
                let code = body.get(..4).map_or(0, |code| word(code) as i32);
                return if code < 0 { Err(io::Error::from_raw_os_error(-code)) } else { Ok(End::Told) };
            }
            _ => answers.push(body.to_vec()),
        }
        bytes = bytes.get(padded(length)..).unwrap_or_default();
    }
    Ok(End::Open)
}

fn message(command: u16, flags: u16, sequence: u32, attributes: &[u8]) -> Vec<u8> {
    let length = (HEADER + attributes.len()) as u32;
    let kind = CLIENT << 10 | command;
    // The sender is filled in by the kernel.
    let parts: [&[u8]; 6] = [
        &length.to_ne_bytes(),
        &kind.to_ne_bytes(),
        &(REQUEST | flags).to_ne_bytes(),
        &sequence.to_ne_bytes(),
        &[0; 4],
        attributes,
    ];
    parts.concat()
}

/// What a request to move a device has in it.
fn moving(index: u32, descriptor: u32) -> Vec<u8> {
    [attribute(DEV_INDEX, &index.to_ne_bytes()), attribute(NET_NS_FD, &descriptor.to_ne_bytes())].concat()
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (ATTRIBUTE + value.len()) as u16;
    let mut bytes = [&length.to_ne_bytes(), &kind.to_ne_bytes(), value].concat();
    bytes.resize(padded(bytes.len()), 0);
    bytes
}

/// The attributes in `bytes`, as far as they are well formed.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes([*bytes.first()?, *bytes.get(1)?]));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]) & KIND;
        let value = bytes.get(ATTRIBUTE..length)?;
        bytes = bytes.get(padded(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// The entries of a table.
fn entries(bytes: &[u8], table: u16, entry: u16) -> impl Iterator<Item = &[u8]> {
    let found = attributes(find(bytes, table).unwrap_or_default());
    found.filter(move |(kind, _)| *kind == entry).map(|(_, value)| value)
}

fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_ne_bytes(find(bytes, kind)?.try_into().ok()?))
}

fn long(bytes: &[u8], kind: u16) -> Option<u64> {
    Some(u64::from_ne_bytes(find(bytes, kind)?.try_into().ok()?))
}

fn text(bytes: &[u8], kind: u16) -> Option<String> {
    let value = find(bytes, kind)?;
    Some(String::from_utf8_lossy(value.strip_suffix(b"\0").unwrap_or(value)).into_owned())
}

fn device(answer: &[u8]) -> Option<Device> {
    Some(Device {
        index: number(answer, DEV_INDEX)?,
        name: text(answer, DEV_NAME)?,
        guid: Guid(long(answer, NODE_GUID)?),
    })
}

fn node(answer: &[u8]) -> Option<Node> {
    // As user space has it (`huge_encode_dev`), which for these numbers is how `stat` has it, too.
    let number = long(answer, CHARDEV)?;
    Some(Node { name: text(answer, CHARDEV_NAME)?, major: rustix::fs::major(number), minor: rustix::fs::minor(number) })
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Messages and attributes begin at multiples of four.
fn padded(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[cfg(test)]
mod tests;
