//! The warden: a second process of the proxy, which keeps what the proxy gives up.
//!
//! The proxy serves under a user id of its own, in a file system without files. Two things still take more than that, and
//! both are done by a process that no container and no neighbour can talk to:
//!
//! - A neighbour reads a region through a descriptor that cannot be written to, and to get one the file must be opened once
//!   more. The proxy sends the file, the warden sends it back, open for reading. It believes nothing: what is no memory file
//!   of its own proxy ends both.
//! - When the proxy has ended, however that came about, its directory, its socket and its LID are given back. And when the
//!   container has ended, the proxy has to, even one that was taken over.
//!
//! ```text
//! hook ── starts ──► proxy (root) ── forks ──► warden (root; few capabilities, few system calls)
//!                      │ gives root up           │ watches: proxy, container's init, SIGTERM
//!                      ▼                         │
//!                    proxy (serves) ◄── socket ──┘
//! ```

// UNSAFETY: forks, and takes the descriptors over that the child is to keep.
#![allow(unsafe_code)]

mod duty;

use crate::datagram;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{PidfdFlags, pidfd_open};

pub use duty::Duties;

/// What the proxy says: please open this memory file for reading.
const REQUEST: &[u8] = b"read";
/// What the warden says to it, with the descriptor.
const GRANTED: &[u8] = b"done";

/// The proxy's hold on its warden.
#[derive(Debug)]
pub struct Warden {
    socket: OwnedFd,
}

impl Warden {
    /// Starts the warden. The caller is root, and has one thread.
    ///
    /// # Errors
    /// What the kernel says of a fork.
    pub fn start(duties: Duties) -> Result<Self, Errno> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let proxy = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
        // SAFETY: no other thread exists whose locks the child could inherit.
        match unsafe { libc::fork() } {
            0 => {
                drop(ours);
                duties.fulfil(&theirs, &proxy)
            }
            -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::AGAIN)),
            _ => Ok(Self { socket: ours }),
        }
    }

    /// The memory file `file` once more, open for reading only.
    ///
    /// # Errors
    /// `EPIPE` if the warden has ended: the proxy is about to.
    pub fn read_only(&self, file: impl AsFd) -> Result<OwnedFd, Errno> {
        datagram::send(&self.socket, REQUEST, &[file.as_fd()])?;
        let mut readable = [PollFd::new(&self.socket, PollFlags::IN)];
        while let Err(error) = poll(&mut readable, None) {
            if error != Errno::INTR {
                return Err(error);
            }
        }
        let mut buffer = [0; GRANTED.len()];
        let received = datagram::receive(&self.socket, &mut buffer)?;
        match <[OwnedFd; 1]>::try_from(received.fds) {
            Ok([fd]) if buffer == *GRANTED => Ok(fd),
            _ => Err(Errno::PIPE),
        }
    }
}

impl AsFd for Warden {
    /// Readable once the warden has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
