//! The kernel's connection manager, which is asked for one thing: whether an address of this network namespace is on an interface of the
//! card's.
//!
//! A GID is an address, and root in a container may give interfaces of its own any address, those of others among them. What the card's
//! table says of an entry's interface is a number, which means something in that interface's namespace only, and can be chosen.
//! The kernel knows: it binds an address to a card only if an entry of the card's is of the very interface that has the address in the
//! caller's namespace (`cma_validate_port` of `drivers/infiniband/core/cma.c`). Nothing is connected.

// UNSAFETY: system calls whose arguments have the address of what they answer in them.
#![allow(unsafe_code)]

use ringfence_proxy::fabric::ports::Gid;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use std::net::Ipv6Addr;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Its character device, of the module `rdma_ucm`.
pub const NODE: &str = "/dev/infiniband/rdma_cm";

/// `RDMA_USER_CM_CMD_CREATE_ID` and others of `rdma/rdma_user_cm.h`.
const CREATE_ID: u32 = 0;
const DESTROY_ID: u32 = 1;
const QUERY: u32 = 19;
const BIND: u32 = 20;

/// `RDMA_PS_TCP`, and `IBV_QPT_RC`.
const TCP: u16 = 0x0106;
const RC: u8 = 2;

/// `struct rdma_ucm_cmd_hdr`.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    command: u32,
    /// Bytes that follow, and that are answered.
    request: u16,
    answer: u16,
}

/// `struct rdma_ucm_create_id`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct CreateId {
    header: Header,
    uid: u64,
    response: u64,
    port_space: u16,
    qp_type: u8,
    reserved: [u8; 5],
}

/// `struct rdma_ucm_destroy_id`; `struct rdma_ucm_query`, in which zero asks for addresses and the card.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct OfId {
    header: Header,
    response: u64,
    id: u32,
    zero: u32,
}

/// `struct rdma_ucm_bind`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Bind {
    header: Header,
    id: u32,
    address_bytes: u16,
    reserved: u16,
    /// `struct __kernel_sockaddr_storage`.
    address: [u8; 128],
}

/// `struct rdma_ucm_query_addr_resp`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Bound {
    /// In network order.
    node_guid: u64,
    port: u8,
    reserved: u8,
    pkey: u16,
    address_bytes: [u16; 2],
    addresses: [[u64; 16]; 2],
    device_index: u32,
    reserved_too: u32,
}

/// Words that the kernel answers with.
trait Said: FromBytes + IntoBytes + Immutable {}
impl Said for u32 {}
impl Said for Bound {}

/// A port of a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// The card's GUID, in network order.
    pub guid: u64,
    /// Which of its ports.
    pub number: u8,
}

/// The connection manager, opened in the network namespace that it is asked of, by the user who asks: the kernel takes what is
/// written from no other (`ib_safe_file_access`).
#[derive(Debug)]
pub struct ConnectionManager(OwnedFd);

impl ConnectionManager {
    /// Opens it.
    ///
    /// # Errors
    /// `ENOENT` where the module `rdma_ucm` is not loaded; else what the kernel says.
    pub fn open() -> Result<Self, Errno> {
        open(NODE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map(Self)
    }

    /// The port of a card on whose interface this address is, in the network namespace of the calling process.
    ///
    /// # Errors
    /// `ENODEV` or `EADDRNOTAVAIL` if it is on none; else what the kernel says.
    pub fn port_of(&self, address: &Gid) -> Result<Port, Errno> {
        let id = self.ask(|header, response| CreateId {
            header: Header { command: CREATE_ID, ..header },
            uid: 0,
            response,
            port_space: TCP,
            qp_type: RC,
            reserved: [0; 5],
        })?;
        let bound = self.bind(id, address);
        let events: Result<u32, Errno> = self.ask(|header, response| OfId {
            header: Header { command: DESTROY_ID, ..header },
            response,
            id,
            zero: 0,
        });
        let (bound, _) = (bound?, events?);
        Ok(Port { guid: bound.node_guid, number: bound.port })
    }

    fn bind(&self, id: u32, address: &Gid) -> Result<Bound, Errno> {
        let (address, address_bytes) = socket_address(address);
        let header = Header { command: BIND, request: body::<Bind>(), answer: 0 };
        self.say(&Bind { header, id, address_bytes, reserved: 0, address })?;
        self.ask(|header, response| OfId { header: Header { command: QUERY, ..header }, response, id, zero: 0 })
    }

    /// Says something that is answered. `request` is told how long question and answer are, and where the answer goes.
    fn ask<T: IntoBytes + Immutable, R: Said>(&self, request: impl FnOnce(Header, u64) -> T) -> Result<R, Errno> {
        let mut answer = R::new_zeroed();
        let header = Header { command: 0, request: body::<T>(), answer: size_of::<R>() as u16 };
        let place = (&raw mut answer).expose_provenance() as u64;
        self.say(&request(header, place))?;
        // SAFETY: a variable of ours, which the kernel may have written to since it was last looked at; any bytes are a value.
        Ok(unsafe { (&raw const answer).read_volatile() })
    }

    fn say<T: IntoBytes + Immutable>(&self, request: &T) -> Result<(), Errno> {
        let bytes = request.as_bytes();
        // SAFETY: reads so many bytes of ours; the kernel writes no more than the header says to where the request says, which is a
        // variable of the caller's.
        let written = unsafe { libc::write(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
        match usize::try_from(written) {
            Ok(written) if written == bytes.len() => Ok(()),
            Ok(_) => Err(Errno::IO),
            Err(_) => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
        }
    }
}

/// Bytes of a request behind its header.
const fn body<T>() -> u16 {
    (size_of::<T>() - size_of::<Header>()) as u16
}

/// `struct sockaddr_in` or `struct sockaddr_in6` of no port, and its bytes.
fn socket_address(address: &Gid) -> ([u8; 128], u16) {
    let mut raw = [0; 128];
    let v6 = Ipv6Addr::from(address.raw);
    let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
    let bytes = match v6.to_ipv4_mapped() {
        Some(v4) => {
            put(0, &(libc::AF_INET as u16).to_ne_bytes());
            put(4, &v4.octets());
            size_of::<libc::sockaddr_in>()
        }
        None => {
            put(0, &(libc::AF_INET6 as u16).to_ne_bytes());
            put(8, &v6.octets());
            if v6.is_unicast_link_local() {
                put(24, &address.ifindex.to_ne_bytes());
            }
            size_of::<libc::sockaddr_in6>()
        }
    };
    (raw, bytes as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_as_long_as_the_kernels() {
        // As of `rdma/rdma_user_cm.h`.
        assert_eq!((body::<CreateId>(), body::<OfId>(), body::<Bind>(), size_of::<Bound>()), (24, 16, 136, 280));
    }

    #[test]
    fn addresses_are_told_as_to_a_socket() {
        let said = |address: &str, ifindex| {
            let raw = match address.parse().unwrap() {
                std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                std::net::IpAddr::V6(v6) => v6.octets(),
            };
            let (raw, bytes) = socket_address(&Gid { raw, ifindex });
            (raw[..bytes as usize].to_vec(), raw[bytes as usize..].iter().all(|byte| *byte == 0))
        };
        assert_eq!(said("10.9.3.1", 7), (vec![2, 0, 0, 0, 10, 9, 3, 1, 0, 0, 0, 0, 0, 0, 0, 0], true));
        let v6 = |address: &str, scope: u8| {
            let address: Ipv6Addr = address.parse().unwrap();
            ([&[10, 0, 0, 0, 0, 0, 0, 0], &address.octets()[..], &[scope, 0, 0, 0]].concat(), true)
        };
        assert_eq!(said("fd00::7", 7), v6("fd00::7", 0));
        assert_eq!(said("fe80::7", 7), v6("fe80::7", 7));
    }
}
