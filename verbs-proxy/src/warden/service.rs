//! What the warden does for its proxy: two services, each on a thread of its own.

use super::{DONE, REQUEST};
use crate::datagram;
use crate::errors::passes;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    FallocateFlags, IFlags, Mode, OFlags, SealFlags, fallocate, fcntl_get_seals, fcntl_getfl, fstat, ioctl_getflags,
    ioctl_setflags, open,
};
use rustix::io::Errno;
use std::time::{Duration, Instant};

/// It takes a microsecond to set a file's flags while nobody else has the file's lock. Longer than this, and somebody may have.
const UNDISTURBED: Duration = Duration::from_micros(500);
/// Until the lock is taken again that others want. Whoever has waited for one longer than 4 ms gets it before whoever comes later
/// (Linux, `RWSEM_WAIT_TIMEOUT`).
const TURN: Duration = Duration::from_millis(10);
/// How often a file is tried to be emptied that is made immutable meanwhile.
const TURNS: u32 = 100;

/// A service for the proxy whose user id is `proxy_uid`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Service {
    pub proxy_uid: u32,
    pub kind: Kind,
}

/// Which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Makes files immutable, and opens them for reading.
    Open,
    /// Empties them.
    Empty,
}

impl Service {
    /// Serves until the proxy closes its end, or says what no proxy says.
    pub(super) fn run(self, socket: &OwnedFd) {
        loop {
            let mut readable = [PollFd::new(socket, PollFlags::IN)];
            let mut buffer = [0; REQUEST.len() + 1];
            let received = match poll(&mut readable, None).and_then(|_| datagram::receive(socket, &mut buffer)) {
                Ok(received) => received,
                Err(Errno::AGAIN | Errno::INTR) => continue,
                Err(_) => return,
            };
            let mut fds = received.fds;
            let done = match fds.as_slice() {
                [fd] if buffer[..received.bytes] == *REQUEST && self.is_ours(fd.as_fd()) == Ok(true) => {
                    self.serve(fd.as_fd())
                }
                // There is no room for what was sent.
                [] if received.truncated && buffer[..received.bytes] == *REQUEST => Err(Errno::MFILE),
                _ => Err(Errno::INVAL),
            };
            // Nothing at all is what the proxy is sent where the kernel is short of something: it asks again.
            let opened = match done {
                Err(error) if passes(error) => Ok(None),
                done => done,
            };
            let answered = opened.and_then(|opened| {
                match datagram::send(socket, DONE, opened.as_ref().map(AsFd::as_fd).as_slice()) {
                    Err(error) if passes(error) => datagram::send(socket, DONE, &[]),
                    sent => sent,
                }
            });
            if answered.is_err() {
                // Of a proxy that was taken over, or of nobody. To close what it sent could take as long as it likes.
                fds.drain(..).for_each(std::mem::forget);
                return;
            }
        }
    }

    /// Whether `fd` is a memory file that the proxy made.
    fn is_ours(self, fd: BorrowedFd<'_>) -> Result<bool, Errno> {
        // First, because everything but a memory file is refused here by the kernel, without a word to a file system.
        let sealed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        Ok(fcntl_get_seals(fd)?.contains(sealed)
            && fstat(fd)?.st_uid == self.proxy_uid
            && fcntl_getfl(fd)?.contains(OFlags::RDWR))
    }

    fn serve(self, fd: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
        match self.kind {
            Kind::Open => {
                // Not for root of a user namespace, nor before Linux 6.0. Then whoever may override modes, such as root in the
                // container of a neighbour that was taken over and without a user namespace of its own, can write to it.
                //
                // Once it is, nobody waits for the file's lock again, which a neighbour can keep that may write to the file.
                if !ioctl_getflags(fd).is_ok_and(|flags| flags.contains(IFlags::IMMUTABLE)) {
                    make_immutable(fd);
                }
                // The container may hold a lease on it, which this would wait for otherwise.
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags, Mode::empty()).map(Some)
            }
            Kind::Empty => {
                let bytes = fstat(fd)?.st_size as u64;
                let empty = || {
                    let _ = ioctl_setflags(fd, IFlags::empty());
                    fallocate(fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, bytes)
                };
                // The other service may just be making it immutable, which it was asked for before.
                for _ in 0..TURNS {
                    if empty() != Err(Errno::PERM) {
                        break;
                    }
                    std::thread::sleep(TURN);
                }
                Ok(None)
            }
        }
    }
}

/// Makes a file immutable, and sees that what was let pass before is over.
///
/// The kernel asks whether a file is immutable before it takes the file's lock, which somebody can keep: a hole that waits for the lock
/// by then is punched later. So the lock is taken again until nobody else wants it, however long that is: it is the proxy's own
/// container that does, whose memory is not shown meanwhile.
fn make_immutable(fd: BorrowedFd<'_>) {
    let disturbed = || {
        let began = Instant::now();
        ioctl_setflags(fd, IFlags::IMMUTABLE).is_ok() && began.elapsed() > UNDISTURBED
    };
    while disturbed() {
        std::thread::sleep(TURN);
    }
}
