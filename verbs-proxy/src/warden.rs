//! The warden: a second process of the proxy, which keeps what the proxy gives up.
//!
//! The proxy serves under a user id of its own, in a file system without files. Some things still take more than that, and
//! are done by a process that no container and no neighbour can talk to:
//!
//! - A neighbour reads a region through a descriptor that cannot be written to, and to get one the file must be opened once
//!   more. The proxy sends the file, the warden sends it back, open for reading. It also makes the file immutable, which says
//!   that nobody, root in a container included, can open it for writing again; who has it open for writing goes on.
//! - An immutable file cannot be emptied, so the warden does that, too.
//! - When the proxy has ended, however that came about, its directory, its socket and its LID are given back. And when the
//!   container has ended, the proxy has to, even one that was taken over.
//! - What the proxy has to say is logged, a bounded number of lines: [`crate::voice`].
//!
//! The warden believes nothing: what is no memory file of its own proxy ends both. The container holds those files as well and
//! can keep their locks, so can neighbours those of files that they write to; so each service has a thread of its own, emptying what
//! neighbours could write to another, and the proxy waits for none for long. So has the log.
//!
//! ```text
//! hook ── starts ──► proxy (root) ── forks ──► warden (root; few capabilities, few system calls)
//!                      │ gives root up           │ watches: proxy, container's init, SIGTERM
//!                      ▼                         │
//!                    proxy (serves) ◄─ sockets ──┘
//! ```

// UNSAFETY: forks, and takes the descriptors over that the child is to keep.
#![allow(unsafe_code)]

mod duty;
mod log;
mod service;

use crate::datagram;
use crate::errors::passes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{PidfdFlags, pidfd_open};
use std::sync::{Arc, Mutex, PoisonError};

pub use duty::{Directory, Duties};
pub use log::Log;

/// What the proxy says, with a memory file: please.
const REQUEST: &[u8] = b"file";
/// What the warden says: done.
const DONE: &[u8] = b"done";
/// How long the control thread waits for a file to be opened. The warden takes some microseconds, unless the container keeps
/// the file's lock.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// How long a warden may take to come up: the hook gives its proxy five seconds by default, and this is the better message.
const START: Timespec = Timespec { tv_sec: 4, tv_nsec: 0 };

/// The proxy's hold on its warden.
#[derive(Debug)]
pub struct Warden {
    socket: OwnedFd,
    /// An answer is due that was not waited for.
    owes: bool,
    emptiers: [Emptier; 2],
}

/// What the warden listens on.
#[derive(Debug)]
struct Ends {
    /// For what is to be opened.
    opens: OwnedFd,
    /// For what is to be emptied: what neighbours cannot write to, and what they can.
    empties: [OwnedFd; 2],
}

/// Has the warden empty files. For threads that may wait.
#[derive(Clone, Debug)]
pub struct Emptier(Arc<Mutex<OwnedFd>>);

impl Warden {
    /// Starts the warden. The caller is root, and has one thread.
    ///
    /// # Errors
    /// What the kernel says of a fork.
    pub fn start(duties: Duties) -> Result<Self, Errno> {
        let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let ((socket, opens), own, granted) = (pair()?, pair()?, pair()?);
        let ends = Ends { opens, empties: [own.1, granted.1] };
        let emptiers = [own.0, granted.0];
        let proxy = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
        // SAFETY: no other thread exists whose locks the child could inherit.
        match unsafe { libc::fork() } {
            0 => {
                drop((socket, emptiers));
                duties.fulfil(ends, &proxy)
            }
            -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::AGAIN)),
            _ => Ok(Self { socket, owes: false, emptiers: emptiers.map(Emptier::over) }),
        }
    }

    /// One that does nothing: whoever asks it hears that it has ended.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn absent() -> Result<Self, Errno> {
        let half = || Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?.0);
        Ok(Self { socket: half()?, owes: false, emptiers: [half()?, half()?].map(Emptier::over) })
    }

    /// Waits until the warden has given up what it does not need. It comes up while the proxy does.
    ///
    /// # Errors
    /// `EPIPE` if it did not succeed, `EAGAIN` if it takes too long.
    pub fn await_up(&self) -> Result<(), Errno> {
        answer(&self.socket, Some(&START)).map(drop)
    }

    /// The memory file `file` once more, open for reading only, and never again for writing.
    ///
    /// # Errors
    /// `EAGAIN`, or another that passes ([`passes`]), if the warden is slow, the kernel is short of something, or somebody keeps the file's
    /// lock: that one is our own container, since what is immutable already takes none. `EPIPE` if the warden has ended: the proxy is
    /// about to.
    pub fn read_only(&mut self, file: impl AsFd) -> Result<OwnedFd, Errno> {
        if self.owes {
            // It comes too late for whoever wanted it.
            drop(answer(&self.socket, Some(&Timespec::default()))?);
            self.owes = false;
        }
        datagram::send(&self.socket, REQUEST, &[file.as_fd()])?;
        let fds = answer(&self.socket, Some(&PATIENCE)).inspect_err(|error| self.owes = passes(*error))?;
        match <[OwnedFd; 1]>::try_from(fds) {
            Ok([fd]) => Ok(fd),
            Err(fds) if fds.is_empty() => Err(Errno::AGAIN),
            Err(_) => Err(Errno::PIPE),
        }
    }

    /// For files that have been shared.
    #[must_use]
    pub fn emptier(&self) -> Emptier {
        self.emptiers[0].clone()
    }

    /// For files that neighbours can write to: one of them may keep such a file's lock, and hold up no others than those.
    #[must_use]
    pub fn emptier_of_granted(&self) -> Emptier {
        self.emptiers[1].clone()
    }
}

impl Emptier {
    fn over(socket: OwnedFd) -> Self {
        Self(Arc::new(Mutex::new(socket)))
    }

    /// Empties the memory file `file`, though it may be immutable; it is no more. If the warden has ended, nothing is done.
    pub fn empty(&self, file: impl AsFd) {
        let socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if datagram::send(&*socket, REQUEST, &[file.as_fd()]).is_ok() {
            let _ = answer(&socket, None);
        }
    }
}

/// The descriptors of the warden's next answer.
fn answer(socket: &OwnedFd, patience: Option<&Timespec>) -> Result<Vec<OwnedFd>, Errno> {
    let mut readable = [PollFd::new(socket, PollFlags::IN)];
    loop {
        match poll(&mut readable, patience) {
            Ok(0) => return Err(Errno::AGAIN),
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    let mut buffer = [0; DONE.len()];
    let received = datagram::receive(socket, &mut buffer)?;
    if received.bytes == DONE.len() && buffer == *DONE { Ok(received.fds) } else { Err(Errno::PIPE) }
}

impl AsFd for Warden {
    /// Readable once the warden has ended, or has an answer that was not waited for.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Warden {
    /// Whether the warden has ended, given that its descriptor is readable.
    pub fn has_ended(&mut self) -> bool {
        if !self.owes {
            // It says nothing unasked.
            return true;
        }
        let answer = answer(&self.socket, Some(&Timespec::default()));
        self.owes = answer.as_ref().is_err_and(|error| passes(*error));
        answer.is_err() && !self.owes
    }
}
