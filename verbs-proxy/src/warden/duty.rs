//! What the warden does, in its own process.

// UNSAFETY: closes the descriptors that were the proxy's, and leaves without running the proxy's destructors.
#![allow(unsafe_code)]

use super::{GRANTED, REQUEST};
use crate::datagram;
use crate::fabric::ports::Tenure;
use crate::sandbox::filter;
use crate::{cgroup, rdma_cgroup};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, SealFlags, fcntl_get_seals, fcntl_getfl, fstat, open};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a proxy may take to end by itself once its container has, or once it is told to.
const PATIENCE: Duration = Duration::from_secs(1);
/// When to see whether the proxy has been moved to another control group, as systemd does, and to follow it.
const FOLLOW: [Duration; 4] =
    [Duration::from_millis(20), Duration::from_millis(200), Duration::from_secs(2), Duration::from_secs(20)];
/// What it may do besides what root's files are open to: open the proxy's memory files, and signal the proxy.
const CAPABILITIES: [caps::Capability; 2] = [caps::Capability::CAP_DAC_OVERRIDE, caps::Capability::CAP_KILL];

/// What a warden is given.
#[derive(Debug)]
pub struct Duties {
    /// The pidfd of the container's init.
    pub init: OwnedFd,
    /// SIGTERM and SIGINT, as a descriptor.
    pub signals: OwnedFd,
    /// The proxy's port.
    pub tenure: Tenure,
    /// The container's directory.
    pub container_dir: PathBuf,
    /// The user id that the proxy is going to have.
    pub proxy_uid: u32,
}

impl Duties {
    /// Does them, and ends the process.
    pub(super) fn fulfil(self, socket: &OwnedFd, proxy: &OwnedFd) -> ! {
        self.become_warden(socket, proxy);
        self.watch(socket, proxy);
        // The proxy has ended.
        self.tidy();
        // SAFETY: `_exit` has no preconditions; what else this process inherited is the proxy's to clean up.
        unsafe { libc::_exit(0) }
    }

    fn become_warden(&self, socket: &OwnedFd, proxy: &OwnedFd) {
        // Sixteen bytes at most, the zero included.
        let _ = rustix::thread::set_name(c"ringfence-ward");
        close_all_but(&[self.init.as_fd(), self.signals.as_fd(), self.tenure.as_fd(), socket.as_fd(), proxy.as_fd()]);
        let keep: caps::CapsHashSet = CAPABILITIES.into_iter().collect();
        let _ = rustix::thread::set_no_new_privs(true);
        let dropped = caps::set(None, caps::CapSet::Effective, &keep)
            .and_then(|()| caps::set(None, caps::CapSet::Permitted, &keep))
            .and_then(|()| caps::clear(None, caps::CapSet::Inheritable))
            .and_then(|()| caps::clear(None, caps::CapSet::Ambient));
        if dropped.is_err() || filter::confine_warden().is_err() {
            // The proxy finds its warden gone, and says so.
            // SAFETY: as in `fulfil`.
            unsafe { libc::_exit(1) }
        }
    }

    /// Serves the proxy until it has ended.
    fn watch(&self, socket: &OwnedFd, proxy: &OwnedFd) {
        let began = Instant::now();
        let mut follow = FOLLOW.iter().map(|after| began + *after).peekable();
        let (mut ending, mut serving) = (None::<Instant>, true);
        loop {
            let next = ending.into_iter().chain(follow.peek().copied()).min();
            let timeout = next.map(|at| timespec(at.saturating_duration_since(Instant::now())));
            let wanted = |is: bool| if is { PollFlags::IN } else { PollFlags::empty() };
            let mut fds = [
                PollFd::new(proxy, PollFlags::IN),
                PollFd::new(&self.signals, wanted(ending.is_none())),
                PollFd::new(&self.init, wanted(ending.is_none())),
            ]
            .to_vec();
            if serving {
                fds.push(PollFd::new(socket, PollFlags::IN));
            }
            if poll(&mut fds, timeout.as_ref()).is_err() {
                continue;
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[0] {
                return;
            }
            if ready[1] && ending.is_none() {
                let _ = pidfd_send_signal(proxy, Signal::TERM);
            }
            if ready[1] || ready[2] {
                ending.get_or_insert_with(|| Instant::now() + PATIENCE);
            }
            if ready.get(3) == Some(&true) {
                serving = self.serve(socket) == Served::On;
                if !serving && ending.is_none() {
                    // It has closed the socket and ends, or it says what no proxy says.
                    ending = Some(Instant::now() + PATIENCE);
                }
            }
            let now = Instant::now();
            if ending.is_some_and(|at| at <= now) {
                let _ = pidfd_send_signal(proxy, Signal::KILL);
                ending = Some(now + PATIENCE);
            }
            if follow.next_if(|at| *at <= now).is_some()
                && let Some(proxy) = rustix::process::getppid()
            {
                cgroup::follow(proxy);
            }
        }
    }

    /// Answers one request.
    fn serve(&self, socket: &OwnedFd) -> Served {
        let mut buffer = [0; REQUEST.len() + 1];
        let received = match datagram::receive(socket, &mut buffer) {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Served::On,
            Err(_) => return Served::End,
        };
        let mut fds = received.fds;
        let opened = match fds.as_slice() {
            [fd] if buffer[..received.bytes] == *REQUEST => self.open(fd.as_fd()),
            _ => Err(Errno::INVAL),
        };
        match opened.and_then(|opened| datagram::send(socket, GRANTED, &[opened.as_fd()])) {
            Ok(()) => Served::On,
            Err(_) => {
                // Of a proxy that was taken over, or of nobody. To close what it sent could take as long as it likes.
                fds.drain(..).for_each(std::mem::forget);
                Served::End
            }
        }
    }

    /// The memory file `fd` for reading, if the proxy made it.
    fn open(&self, fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        // First, because everything but a memory file is refused here by the kernel, without a word to a file system.
        let sealed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        let is_ours = fcntl_get_seals(fd)?.contains(sealed)
            && fstat(fd)?.st_uid == self.proxy_uid
            && fcntl_getfl(fd)?.contains(OFlags::RDWR);
        if !is_ours {
            return Err(Errno::PERM);
        }
        // The container holds the file, too, and may hold a lease on it, which this would wait for otherwise.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags, Mode::empty())
    }

    fn tidy(&self) {
        // Nobody is there to be told; the hook does the same for the cgroups that it removes.
        let _ = rdma_cgroup::lift_own_limits();
        // If that is not possible, poststop or the next start of the same id does it.
        let _ = std::fs::remove_dir_all(&self.container_dir);
        self.tenure.end();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    On,
    End,
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: duration.subsec_nanos().into() }
}

/// Closes what the proxy had open: above all the container's socket, which must refuse when the proxy has ended.
fn close_all_but(keep: &[BorrowedFd<'_>]) {
    let mut keep: Vec<u32> = keep.iter().map(|fd| fd.as_raw_fd() as u32).collect();
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if fd > first {
            // SAFETY: nothing of this process uses a descriptor outside of `keep` any more.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd.saturating_add(1);
    }
}
