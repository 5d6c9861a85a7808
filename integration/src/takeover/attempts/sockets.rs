//! Sockets: families, networks, and who listens on the node.

use super::{Attack, attempt, judge};
use crate::takeover::hands::Hands;
use crate::takeover::table::{Attempt, Seen};
use anyhow::{Context, Result};
use nix::libc::{
    self, AF_NETLINK, AF_UNIX, NETLINK_ROUTE, SOCK_CLOEXEC, SOCK_DGRAM, SOCK_NONBLOCK, SOCK_RAW, SOCK_SEQPACKET,
    SOCK_STREAM,
};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// Families that the kernel may know (`AF_MAX` is 46).
const FAMILIES: std::ops::Range<i32> = 0..46;
/// Netlink protocols that it may know.
const PROTOCOLS: std::ops::Range<i32> = 0..32;

/// Making sockets.
pub(in crate::takeover) fn families() -> Vec<Attempt> {
    vec![
        attempt!("TCP", SYS_socket, |_a| [libc::AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0]),
        attempt!("UDP over IPv6", SYS_socket, |_a| [libc::AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0], also AFNOSUPPORT),
        attempt!("raw IP", SYS_socket, |_a| [libc::AF_INET, SOCK_RAW | SOCK_CLOEXEC, libc::IPPROTO_ICMP]),
        attempt!("packets", SYS_socket, |_a| [libc::AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0x0300]),
        Attempt {
            name: "every other family, of every type",
            run: |a| {
                let wanted = FAMILIES.filter(|family| ![AF_UNIX, AF_NETLINK].contains(family));
                let types = [SOCK_STREAM, SOCK_DGRAM, SOCK_NONBLOCK, SOCK_RAW, SOCK_SEQPACKET];
                first_made(a, wanted.flat_map(|family| types.map(|kind| [family, kind, 0])))
            },
            control: true,
        },
        Attempt {
            name: "every other netlink protocol",
            run: |a| {
                let wanted = PROTOCOLS.filter(|protocol| *protocol != NETLINK_ROUTE);
                first_made(a, wanted.map(|protocol| [AF_NETLINK, SOCK_RAW, protocol]))
            },
            control: true,
        },
    ]
}

/// The first socket that is made, if any is.
fn first_made(attack: &mut Attack, wanted: impl Iterator<Item = [i32; 3]>) -> Result<Seen> {
    let mut refused = Errno::PERM;
    for words in wanted {
        match attack.hands.call(libc::SYS_socket, &words.map(|word| word as u64))? {
            Ok(_) => return Ok(Seen::Reached(format!("{words:?}"))),
            Err(errno) => refused = errno,
        }
    }
    Ok(Seen::Refused(refused))
}

/// Whose network new sockets are in.
pub(in crate::takeover) fn network() -> Vec<Attempt> {
    vec![
        Attempt {
            name: "a new Unix socket's network",
            run: |a| foreign(a, AF_UNIX, SOCK_SEQPACKET, 0),
            control: false,
        },
        Attempt {
            name: "a new netlink socket's network",
            run: |a| foreign(a, AF_NETLINK, SOCK_RAW, NETLINK_ROUTE),
            control: false,
        },
        Attempt {
            name: "a daemon's abstract socket",
            run: |a| {
                let name = format!("\0{}", a.target.abstract_name);
                connect(a, SOCK_STREAM, name.as_bytes(), &[Errno::CONNREFUSED])
            },
            control: true,
        },
    ]
}

/// Whether a socket of the proxy's making is in another network namespace than the container.
fn foreign(attack: &mut Attack, family: i32, kind: i32, protocol: i32) -> Result<Seen> {
    let made =
        attack.hands.fetch_result(libc::SYS_socket, &[family as u64, (kind | SOCK_CLOEXEC) as u64, protocol as u64])?;
    let Ok(socket) = made else { return Ok(Seen::Nothing("no such socket can be made".to_owned())) };
    Ok(if is_foreign(&socket)? {
        Seen::Reached("it is not the container's".to_owned())
    } else {
        Seen::Nothing("it is the container's".to_owned())
    })
}

/// Whether a socket is in another network namespace than this process.
pub(super) fn is_foreign(socket: impl AsFd) -> Result<bool> {
    let own = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    Ok(network_of(socket.as_fd())? != network_of(own.as_fd())?)
}

/// Tells apart the network namespaces of sockets.
fn network_of(socket: BorrowedFd<'_>) -> Result<Vec<u8>> {
    /// `asm-generic/socket.h`.
    const SO_NETNS_COOKIE: u64 = 71;
    let mut hands = Hands::own();
    let (cookie, length) = (hands.room(8), hands.words(&[8]));
    let arguments = [socket.as_raw_fd() as u64, libc::SOL_SOCKET as u64, SO_NETNS_COOKIE, cookie, length];
    hands.call(libc::SYS_getsockopt, &arguments)?.context("the kernel does not tell network namespaces apart")?;
    Ok(hands.get(cookie, 8).to_vec())
}

/// Sockets at paths.
pub(in crate::takeover) fn daemons() -> Vec<Attempt> {
    vec![
        Attempt {
            name: "connect, at a path",
            run: |a| {
                let path = a.target.daemon.to_string_lossy().into_owned();
                connect(a, SOCK_STREAM, path.as_bytes(), &[Errno::NOENT])
            },
            control: true,
        },
        Attempt {
            name: "connect, datagrams",
            run: |a| {
                let path = a.target.datagram.to_string_lossy().into_owned();
                connect(a, SOCK_DGRAM, path.as_bytes(), &[Errno::NOENT])
            },
            control: true,
        },
        Attempt { name: "sendto, a path", run: |a| send(a, false), control: true },
        Attempt { name: "sendmsg, a path", run: |a| send(a, true), control: true },
        Attempt {
            name: "bind, at a path",
            run: |a| {
                let path = a.target.canary.with_file_name("bound");
                let socket = socket(a, SOCK_SEQPACKET)?;
                let (address, bytes) = address(a, path.to_string_lossy().as_bytes());
                Ok(judge(a.hands.call(libc::SYS_bind, &[socket, address, bytes])?, &[Errno::NOENT, Errno::ROFS]))
            },
            control: true,
        },
    ]
}

/// A Unix socket of the proxy's, of the wanted type or, if it may not, of the one that it has for links.
pub(super) fn socket(attack: &mut Attack, kind: i32) -> Result<u64> {
    if kind == SOCK_DGRAM {
        // Those of a pair can be connected again, and send to whom they like.
        let pair = attack.hands.room(8);
        let kind = (kind | SOCK_CLOEXEC | SOCK_NONBLOCK) as u64;
        if attack.hands.call(libc::SYS_socketpair, &[AF_UNIX as u64, kind, 0, pair])?.is_ok() {
            return Ok(attack.hands.number(pair) as u64);
        }
    }
    let mut made = Err(Errno::PERM);
    for kind in [kind, SOCK_SEQPACKET] {
        made = attack.hands.call(libc::SYS_socket, &[AF_UNIX as u64, (kind | SOCK_CLOEXEC) as u64, 0])?;
        if made.is_ok() {
            break;
        }
    }
    made.context("a proxy can make the sockets that links are made of")
}

/// A Unix socket's address, and its length. A name that begins with a zero byte is abstract.
pub(super) fn address(attack: &mut Attack, name: &[u8]) -> (u64, u64) {
    let mut bytes = (AF_UNIX as u16).to_ne_bytes().to_vec();
    bytes.extend(name);
    if name.first() != Some(&0) {
        bytes.push(0);
    }
    (attack.hands.put(&bytes), bytes.len() as u64)
}

fn connect(attack: &mut Attack, kind: i32, name: &[u8], also: &[Errno]) -> Result<Seen> {
    let socket = socket(attack, kind)?;
    let (address, bytes) = address(attack, name);
    Ok(judge(attack.hands.call(libc::SYS_connect, &[socket, address, bytes])?, also))
}

/// Sends a datagram to the daemon without connecting.
fn send(attack: &mut Attack, by_message: bool) -> Result<Seen> {
    let socket = socket(attack, SOCK_DGRAM)?;
    let path = attack.target.datagram.to_string_lossy().into_owned();
    let (address, bytes) = address(attack, path.as_bytes());
    let text = attack.hands.put(b"hello");
    let answer = if by_message {
        let vector = attack.hands.words(&[text, 5]);
        let message = attack.hands.words(&[address, bytes, vector, 1, 0, 0, 0]);
        attack.hands.call(libc::SYS_sendmsg, &[socket, message, libc::MSG_NOSIGNAL as u64])?
    } else {
        attack.hands.call(libc::SYS_sendto, &[socket, text, 5, libc::MSG_NOSIGNAL as u64, address, bytes])?
    };
    // A socket of the links' type sends only where it is connected to.
    Ok(judge(answer, &[Errno::NOENT, Errno::NOTCONN]))
}
