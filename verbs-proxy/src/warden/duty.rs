//! What the warden does, in its own process.

// UNSAFETY: closes the descriptors that were the proxy's, and leaves without running the proxy's destructors.
#![allow(unsafe_code)]

use super::service::{Kind, Service};
use super::{DONE, Ends, Log};
use crate::datagram;
use crate::fabric::ports::Tenure;
use crate::sandbox::filter;
use crate::{cgroup, rdma_cgroup};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, pidfd_send_signal};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a proxy may take to end by itself once its container has, or once it is told to.
const PATIENCE: Duration = Duration::from_secs(1);
/// When to see whether the proxy has been moved to another control group, as systemd does, and to follow it.
const FOLLOW: [Duration; 4] =
    [Duration::from_millis(20), Duration::from_millis(200), Duration::from_secs(2), Duration::from_secs(20)];
/// What it may do besides what root's files are open to: open the proxy's memory files and set their flags, and signal the proxy.
const CAPABILITIES: [caps::Capability; 4] = [
    caps::Capability::CAP_DAC_OVERRIDE,
    caps::Capability::CAP_FOWNER,
    caps::Capability::CAP_KILL,
    caps::Capability::CAP_LINUX_IMMUTABLE,
];

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
    pub container_dir: Directory,
    /// The proxy itself: whoever makes the warden.
    pub proxy: Pid,
    /// The user id that the proxy is going to have.
    pub proxy_uid: u32,
    /// What it says.
    pub log: Arc<Log>,
}

impl Duties {
    /// Does them, and ends the process.
    pub(super) fn fulfil(self, ends: Ends, proxy: &OwnedFd) -> ! {
        let ended = self.become_warden(ends, proxy);
        let Ok(ended) = ended else {
            // The proxy finds its warden gone, and says so.
            // SAFETY: `_exit` has no preconditions.
            unsafe { libc::_exit(1) }
        };
        let expected = self.watch(&ended, proxy);
        self.log.hear();
        if !expected && self.log.proxy_serves() {
            self.log.note(
                "the proxy has ended before its container, all of whose verbs fail from now on: see the kernel's log",
            );
        }
        self.tidy();
        // SAFETY: `_exit` has no preconditions; what else this process inherited is the proxy's to clean up.
        unsafe { libc::_exit(0) }
    }

    /// Gives up what a warden does not need, and starts its services. What it returns becomes readable when one of them ends.
    fn become_warden(&self, ends: Ends, proxy: &OwnedFd) -> anyhow::Result<OwnedFd> {
        let Ends { opens, empties: [empties, of_granted] } = ends;
        // Sixteen bytes at most, the zero included.
        let _ = rustix::thread::set_name(c"ringfence-ward");
        close_all_but(&[
            self.init.as_fd(),
            self.signals.as_fd(),
            self.tenure.as_fd(),
            opens.as_fd(),
            empties.as_fd(),
            of_granted.as_fd(),
            proxy.as_fd(),
        ]);
        // A container that is a whole system has not all of them to give.
        let has = caps::read(None, caps::CapSet::Permitted)?;
        let keep: caps::CapsHashSet = CAPABILITIES.into_iter().filter(|capability| has.contains(capability)).collect();
        let _ = rustix::thread::set_no_new_privs(true);
        caps::set(None, caps::CapSet::Effective, &keep)?;
        caps::set(None, caps::CapSet::Permitted, &keep)?;
        caps::clear(None, caps::CapSet::Inheritable)?;
        caps::clear(None, caps::CapSet::Ambient)?;
        let (ended, end) = pipe_with(PipeFlags::CLOEXEC)?;
        let up = fcntl_dupfd_cloexec(&opens, 3)?;
        for (kind, socket) in [(Kind::Open, opens), (Kind::Empty, empties), (Kind::Empty, of_granted)] {
            let service = Service { proxy_uid: self.proxy_uid, kind };
            let end = fcntl_dupfd_cloexec(&end, 3)?;
            let (begins, begun) = std::sync::mpsc::channel();
            std::thread::Builder::new().name("service".into()).stack_size(64 << 10).spawn(move || {
                let _ = begins.send(());
                service.run(&socket);
                let _ = rustix::io::write(&end, b"e");
            })?;
            // When the thread runs, what it asked of the kernel for itself is done, and may be forbidden afterwards.
            begun.recv()?;
        }
        let log_socket = self.log.open();
        let (begins, begun) = std::sync::mpsc::channel();
        let log = Arc::clone(&self.log);
        std::thread::Builder::new().name("log".into()).stack_size(128 << 10).spawn(move || {
            let _ = begins.send(());
            log.run()
        })?;
        begun.recv()?;
        filter::confine_warden(log_socket)?;
        datagram::send(&up, DONE, &[])?;
        Ok(ended)
    }

    /// Waits until the proxy has ended, and sees that it does when it must. Returns whether it had to.
    ///
    /// One that was killed does nothing more of its own, but it is there until the kernel has done what it was asked for last.
    /// That can be to take a memory file's lock, which somebody keeps who got the file from the container and outlives it. He
    /// is not waited for: otherwise he could keep one LID after another.
    fn watch(&self, ended: &OwnedFd, proxy: &OwnedFd) -> bool {
        let began = Instant::now();
        let mut follow = FOLLOW.iter().map(|after| began + *after).peekable();
        let mut ending = None::<Instant>;
        // Its container has ended, or it was told to end. That its services have is no reason: a proxy that is killed closes their
        // sockets before it has ended.
        let mut due = false;
        let mut killed = false;
        loop {
            let next = ending.into_iter().chain(follow.peek().copied()).min();
            let timeout = next.map(|at| timespec(at.saturating_duration_since(Instant::now())));
            // A service ends when the proxy has closed its socket and ends, or says what no proxy says.
            let mut fds = [proxy, &self.signals, &self.init, ended].map(|fd| PollFd::new(fd, PollFlags::IN));
            // What made it end is readable from then on.
            let awaited = if ending.is_none() { &mut fds[..] } else { &mut fds[..1] };
            if poll(awaited, timeout.as_ref()).is_err() {
                continue;
            }
            let ready = fds.each_ref().map(|fd| !fd.revents().is_empty());
            due |= ready[1] || ready[2];
            if ready[0] {
                return due;
            }
            if ending.is_none() && ready.contains(&true) {
                if ready[1] {
                    let _ = pidfd_send_signal(proxy, Signal::TERM);
                }
                ending = Some(Instant::now() + PATIENCE);
            }
            let now = Instant::now();
            if ending.is_some_and(|at| at <= now) {
                if killed {
                    return due;
                }
                killed = pidfd_send_signal(proxy, Signal::KILL).is_ok();
                ending = Some(now + PATIENCE);
            }
            if follow.next_if(|at| *at <= now).is_some() {
                cgroup::follow(self.proxy, || has_ended(proxy));
            }
        }
    }

    fn tidy(&self) {
        // Nobody is there to be told; the hook does the same for the cgroups that it removes.
        let _ = rdma_cgroup::lift_own_limits();
        // If that is not possible, poststop or the next start of the same id does it.
        self.container_dir.remove();
        self.tenure.end();
    }
}

/// A directory, and not a later one of the same name: the next container of this id may be made before we clear up.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Directory {
    /// The directory that is there now.
    ///
    /// # Errors
    /// If there is none.
    pub fn at(path: &Path) -> std::io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: Self::identity(path)? })
    }

    fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
        let found = std::fs::symlink_metadata(path)?;
        Ok((found.dev(), found.ino()))
    }

    fn remove(&self) {
        if Self::identity(&self.path).is_ok_and(|found| found == self.identity) {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Whether the process of a pidfd has ended.
fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut ended = [PollFd::new(pidfd, PollFlags::IN)];
    poll(&mut ended, Some(&Timespec::default())) != Ok(0)
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
