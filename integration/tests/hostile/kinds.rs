//! Descriptors of every kind that a container can make, and memory that stops whoever touches it.

// UNSAFETY: system calls that no crate of the workspace offers, and a page that the kernel is told not to fill.
#![allow(unsafe_code)]

use anyhow::{Context, Result, ensure};
use nix::libc;
use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::thread::JoinHandle;
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

/// A page that stops whoever touches it, until [`Self::answer`].
pub struct StalledPage {
    faults: OwnedFd,
    address: usize,
}

const PAGE: usize = 4096;

impl StalledPage {
    pub fn new() -> Result<Self> {
        // `linux/userfaultfd.h`.
        const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
        const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
        const UFFD_API: u64 = 0xaa;
        const MISSING: u64 = 1;
        // SAFETY: a system call without pointers.
        let faults = owned(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) }).context("userfaultfd")?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping anywhere.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        ensure!(page != libc::MAP_FAILED, "no page: {}", std::io::Error::last_os_error());
        let mut api = [UFFD_API, 0, 0];
        let mut register = [page as u64, PAGE as u64, MISSING, 0];
        // SAFETY: the structures are as long as the requests' numbers say, and live across the calls.
        let done = unsafe {
            libc::ioctl(faults.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) == 0
                && libc::ioctl(faults.as_raw_fd(), UFFDIO_REGISTER, register.as_mut_ptr()) == 0
        };
        ensure!(done, "userfaultfd: {}", std::io::Error::last_os_error());
        Ok(Self { faults, address: page as usize })
    }

    /// A thread that writes the page into the file, and stands still in it.
    pub fn write_from(&self, file: File) -> Result<JoinHandle<()>> {
        let address = self.address;
        let thread = std::thread::spawn(move || {
            // SAFETY: the page is never unmapped. What the call answers does not matter.
            unsafe { libc::pwrite(file.as_raw_fd(), address as *const _, PAGE, 0) };
        });
        self.wait_for_fault().map(|()| thread)
    }

    /// A thread that will receive into the page, and stand still in it.
    pub fn read_into(&self, from: OwnedFd) -> Result<JoinHandle<()>> {
        let address = self.address;
        Ok(std::thread::spawn(move || {
            // SAFETY: the page is never unmapped. What the call answers does not matter.
            unsafe { libc::read(from.as_raw_fd(), address as *mut _, 8) };
        }))
    }

    fn wait_for_fault(&self) -> Result<()> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.faults, PollFlags::IN)];
        let ready = poll(&mut fds, Some(&Timespec { tv_sec: 10, tv_nsec: 0 }))?;
        ensure!(ready == 1, "nobody touches the page");
        Ok(())
    }

    /// Lets everybody go on.
    pub fn answer(self) {
        drop(self.faults);
    }
}
