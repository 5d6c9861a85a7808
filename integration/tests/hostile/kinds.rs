//! Descriptors of every kind that a container can make.

// UNSAFETY: system calls that no crate of the workspace offers.
#![allow(unsafe_code)]

use anyhow::{Context, Result, ensure};
use nix::libc;
use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::Duration;

/// A connection with unsent data whose last close waits for so many seconds, and its other end.
pub fn lingering(seconds: u64) -> Result<(OwnedFd, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0").context("the loopback interface is needed")?;
    let stream = TcpStream::connect(listener.local_addr()?)?;
    let (peer, _) = listener.accept()?;
    stream.set_nonblocking(true)?;
    while (&stream).write(&[0; 65536]).is_ok() {}
    stream.set_nonblocking(false)?;
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::from_secs(seconds)))?;
    Ok((stream.into(), peer))
}

fn owned(fd: libc::c_long) -> Result<OwnedFd> {
    ensure!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the system call just made it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// What it is, and one of it.
pub type Kind = (&'static str, OwnedFd);

/// One of each kind, and what must live beside them. Kinds that this kernel does not have are left out.
pub fn every() -> Result<(Vec<Kind>, Vec<OwnedFd>)> {
    let mut kinds: Vec<Kind> = Vec::new();
    let mut beside: Vec<OwnedFd> = Vec::new();
    let (read, write) = rustix::pipe::pipe()?;
    kinds.extend([("an empty pipe to read", read), ("an empty pipe to write", write)]);
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK)?;
    while rustix::io::write(&write, &[0; 4096]).is_ok() {}
    kinds.extend([("a full pipe to read", read), ("a full pipe to write", write)]);
    let (lingering, peer) = lingering(60)?;
    kinds.push(("a TCP socket that lingers", lingering));
    beside.push(peer.into());
    let (a, b) = UnixStream::pair()?;
    kinds.push(("a Unix stream socket", a.into()));
    beside.push(b.into());
    let (a, b) = UnixDatagram::pair()?;
    a.set_nonblocking(true)?;
    while a.send(&[0; 1024]).is_ok() {}
    kinds
        .extend([("a full Unix datagram socket", OwnedFd::from(a)), ("a datagram socket with much to read", b.into())]);
    use std::os::linux::net::SocketAddrExt;
    let name = format!("ringfence-hostile-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
    kinds.push(("a Unix socket that listens", UnixListener::bind_addr(&address)?.into()));
    for (name, path) in
        [("/dev/null", "/dev/null"), ("/dev/full", "/dev/full"), ("a directory", "/"), ("a pty", "/dev/ptmx")]
    {
        if let Ok(file) = File::open(path) {
            kinds.push((name, file.into()));
        }
    }
    // SAFETY: the arguments are constants, and pointers to values that live across the calls.
    let made = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        let memory = |flags| libc::c_long::from(libc::memfd_create(c"hostile".as_ptr(), flags));
        let mut ring = [0u8; 120];
        [
            ("an eventfd", libc::c_long::from(libc::eventfd(0, 0))),
            ("an epoll", libc::epoll_create1(0).into()),
            ("a timerfd", libc::timerfd_create(libc::CLOCK_MONOTONIC, 0).into()),
            ("a signalfd", libc::signalfd(-1, &raw const set, 0).into()),
            ("a pidfd", libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0)),
            ("an inotify", libc::inotify_init1(0).into()),
            ("a memory file", memory(0)),
            ("a memory file that can be sealed", memory(libc::MFD_ALLOW_SEALING)),
            ("a memory file of huge pages", memory(libc::MFD_HUGETLB)),
            ("a path", libc::open(c"/".as_ptr(), libc::O_PATH).into()),
            ("a userfaultfd", libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC)),
            ("a netlink socket", libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0).into()),
            ("a Unix seqpacket socket", libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0).into()),
            ("an io_uring", libc::syscall(libc::SYS_io_uring_setup, 4, ring.as_mut_ptr())),
        ]
    };
    kinds.extend(made.into_iter().filter_map(|(name, fd)| Some((name, owned(fd).ok()?))));
    ensure!(kinds.len() >= 20, "only {} kinds of descriptors", kinds.len());
    Ok((kinds, beside))
}
