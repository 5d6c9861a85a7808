//! Descriptors of every kind, as a hostile neighbour would prepare them: full, blocking, slow to close.

use anyhow::Result;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, fcntl_setfl, ftruncate, memfd_create, open};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, listen, send, socket,
    socket_with, socketpair, sockopt,
};
use rustix::pipe::pipe;
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
use std::any::Any;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

/// A descriptor, and what must live as long.
pub type Made = (OwnedFd, Box<dyn Any>);

pub struct Kind {
    pub name: &'static str,
    /// None where the machine has none of the kind.
    pub make: fn() -> Result<Option<Made>>,
}

macro_rules! kinds {
    ($($name:literal: $make:expr),+ $(,)?) => { &[$(Kind { name: $name, make: || $make }),+] };
}

pub const ALL: &[Kind] = kinds! {
    "full blocking eventfd": full_eventfd(),
    "empty blocking eventfd": alone(eventfd(0, EventfdFlags::empty())?),
    "full pipe's writing end": full_pipe(),
    "empty pipe's reading end": { let (read, write) = pipe()?; with(read, write) },
    "pty": pty(),
    "TCP connection that lingers": lingering(),
    "UDP socket": alone(UdpSocket::bind("127.0.0.1:0")?.into()),
    "stream socket": pair(SocketType::STREAM),
    "sequenced packet socket": pair(SocketType::SEQPACKET),
    "datagram socket": pair(SocketType::DGRAM),
    "full stream socket": full_pair(SocketType::STREAM),
    "full sequenced packet socket": full_pair(SocketType::SEQPACKET),
    "full datagram socket": full_pair(SocketType::DGRAM),
    "datagram socket without a peer": alone(socket(AddressFamily::UNIX, SocketType::DGRAM, None)?),
    "listening socket": listening(),
    "netlink socket": alone(socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?),
    "epoll": alone(epoll::create(epoll::CreateFlags::CLOEXEC)?),
    "timerfd": alone(timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::empty())?),
    "pidfd": alone(pidfd_open(getpid(), PidfdFlags::empty())?),
    "inotify": alone(rustix::fs::inotify::init(rustix::fs::inotify::CreateFlags::empty())?),
    "memory file without seals": memory(MemfdFlags::empty(), SealFlags::empty(), 1 << 20),
    "memory file that can grow": memory(MemfdFlags::empty(), SealFlags::SHRINK, 1 << 20),
    "memory file of no bytes": memory(MemfdFlags::empty(), SHUT, 0),
    "memory file of a byte": memory(MemfdFlags::empty(), SHUT, 1),
    "memory file of an exbibyte": memory(MemfdFlags::empty(), SHUT, 1 << 60),
    "memory file of huge pages": memory(MemfdFlags::HUGETLB, SHUT, 2 << 20),
    "directory": alone(open("/", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?),
    "path without access": alone(open("/etc/passwd", OFlags::PATH, Mode::empty())?),
    "path of a device": alone(open("/dev/zero", OFlags::PATH, Mode::empty())?),
    "zeros": alone(open("/dev/zero", OFlags::RDWR, Mode::empty())?),
    "ordinary file": alone(open("/etc/passwd", OFlags::RDONLY, Mode::empty())?),
    "file of proc": alone(open("/proc/self/maps", OFlags::RDONLY, Mode::empty())?),
    "userfaultfd": userfaultfd(),
};

const SHUT: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

#[allow(clippy::unnecessary_wraps, reason = "what `kinds` expects")]
fn alone(fd: OwnedFd) -> Result<Option<Made>> {
    Ok(Some((fd, Box::new(()))))
}

#[allow(clippy::unnecessary_wraps, reason = "what `kinds` expects")]
fn with(fd: OwnedFd, kept: impl Any) -> Result<Option<Made>> {
    Ok(Some((fd, Box::new(kept))))
}

fn full_eventfd() -> Result<Option<Made>> {
    let fd = eventfd(0, EventfdFlags::empty())?;
    rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes())?;
    alone(fd)
}

fn full_pipe() -> Result<Option<Made>> {
    let (read, write) = pipe()?;
    fcntl_setfl(&write, OFlags::NONBLOCK)?;
    while rustix::io::write(&write, &[0; 4096]).is_ok() {}
    fcntl_setfl(&write, OFlags::empty())?;
    with(write, read)
}

fn pty() -> Result<Option<Made>> {
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    // A sandbox may have no pseudo terminals.
    open("/dev/ptmx", flags, Mode::empty()).map_or(Ok(None), alone)
}

/// With data that nobody takes, closing it waits for an hour.
fn lingering() -> Result<Option<Made>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let stream = TcpStream::connect(listener.local_addr()?)?;
    let (peer, _) = listener.accept()?;
    while send(&stream, &[0; 4096], SendFlags::DONTWAIT).is_ok() {}
    sockopt::set_socket_linger(&stream, Some(Duration::from_secs(3600)))?;
    with(stream.into(), peer)
}

fn pair(kind: SocketType) -> Result<Option<Made>> {
    let (a, b) = socketpair(AddressFamily::UNIX, kind, SocketFlags::empty(), None)?;
    with(a, b)
}

fn full_pair(kind: SocketType) -> Result<Option<Made>> {
    let (a, b) = socketpair(AddressFamily::UNIX, kind, SocketFlags::empty(), None)?;
    while send(&a, &[0], SendFlags::DONTWAIT).is_ok() {}
    with(a, b)
}

/// A bell that is full, and whoever rings it without asking not to wait would.
pub fn full_datagrams() -> Result<(OwnedFd, OwnedFd)> {
    let (a, b) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::empty(), None)?;
    while send(&a, &[0], SendFlags::DONTWAIT).is_ok() {}
    // Nothing of it is taken: it stays full.
    rustix::net::recv(&b, &mut [0; 1], RecvFlags::PEEK)?;
    Ok((a, b))
}

fn listening() -> Result<Option<Made>> {
    let fd = socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
    bind(&fd, &SocketAddrUnix::new_abstract_name(format!("hostile-{}", getpid()).as_bytes())?)?;
    listen(fd.as_fd(), 1)?;
    alone(fd)
}

fn memory(flags: MemfdFlags, seals: SealFlags, bytes: u64) -> Result<Option<Made>> {
    let Ok(fd) = memfd_create("hostile", flags | MemfdFlags::ALLOW_SEALING) else { return Ok(None) };
    // There may be no huge pages; a file of them needs none yet.
    ftruncate(&fd, bytes)?;
    fcntl_add_seals(&fd, seals)?;
    alone(fd)
}

fn userfaultfd() -> Result<Option<Made>> {
    // SAFETY: makes a descriptor, which is not made to watch any memory.
    let made = unsafe { rustix::mm::userfaultfd(rustix::mm::UserfaultfdFlags::CLOEXEC) };
    made.map_or(Ok(None), alone)
}
