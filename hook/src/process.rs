//! Processes that must not be confused with later ones of the same pid.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// A process, by pid and start time in clock ticks since boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: i32,
    pub start: u64,
}

impl Process {
    /// The live process that has `pid` now.
    pub fn open(pid: i32) -> io::Result<(Self, OwnedFd)> {
        let gone = || io::Error::from_raw_os_error(libc::ESRCH);
        let (process, pidfd) = Self::open_child(Pid::from_raw(pid).ok_or_else(gone)?)?;
        // Only a process that lives on after its /proc files were read was surely the one that they describe.
        if has_ended(pidfd.as_fd()) { Err(gone()) } else { Ok((process, pidfd)) }
    }

    /// A child of ours, whose pid is not reused before we reap it.
    pub fn open_child(pid: Pid) -> io::Result<(Self, OwnedFd)> {
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let pid = pid.as_raw_nonzero().get();
        let stat = std::fs::read(format!("/proc/{pid}/stat"))?;
        let start = start_time(&stat).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is malformed")))?;
        Ok((Self { pid, start }, pidfd))
    }

    /// A descriptor of this very process; `None` if it has ended.
    pub fn reopen(self) -> Option<OwnedFd> {
        Self::open(self.pid).ok().filter(|(found, _)| *found == self).map(|(_, pidfd)| pidfd)
    }

    /// Whether it still runs. Where that cannot be found out, as for want of descriptors or memory, it does: what belongs to a
    /// process that lives must not be removed.
    pub fn is_alive(self) -> bool {
        match Self::open(self.pid) {
            Ok((found, _)) => found == self,
            Err(error) => !means_gone(&error),
        }
    }
}

/// Whether opening a process failed because there is none of that pid: EINVAL is said of a pid that is a mere thread's now.
fn means_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT | libc::EINVAL))
}

/// Whether the process of `pidfd` has ended, reaped or not.
pub fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    wait(pidfd, Duration::ZERO)
}

/// Waits until the process of `pidfd` has ended; false after `patience`.
pub fn wait(pidfd: BorrowedFd<'_>, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        match poll(&mut fds, Some(&timespec(deadline.saturating_duration_since(Instant::now())))) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(ready) => return ready > 0,
            Err(_) => return false,
        }
    }
}

/// Ends the process of `pidfd`: asks, waits for `patience`, then kills.
pub fn end(pidfd: BorrowedFd<'_>, patience: Duration) {
    // An error means that it has ended by itself.
    let _ = pidfd_send_signal(pidfd, Signal::TERM);
    if !wait(pidfd, patience) {
        let _ = pidfd_send_signal(pidfd, Signal::KILL);
        wait(pidfd, Duration::from_secs(1));
    }
}

/// For [`poll`].
pub fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: duration.subsec_nanos().into() }
}

/// Field 22 of `/proc/PID/stat`. The name in field 2 may hold anything, so fields count from its last parenthesis.
fn start_time(stat: &[u8]) -> Option<u64> {
    let after_name = &stat[stat.iter().rposition(|b| *b == b')')? + 1..];
    std::str::from_utf8(after_name).ok()?.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_shift_the_fields() {
        let tail = "S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 10000 200";
        for name in ["sh", "a b", ") 1 2 3 (", "\u{ff})"] {
            assert_eq!(start_time(format!("42 ({name}) {tail}").as_bytes()), Some(987_654), "{name}");
        }
        assert_eq!(start_time(b"42 (sh) S 1"), None);
        assert_eq!(start_time(b""), None);
    }

    #[test]
    fn a_reused_pid_is_another_process() {
        let (me, _) = Process::open(std::process::id() as i32).unwrap();
        assert!(me.is_alive());
        assert!(!Process { start: me.start + 1, ..me }.is_alive());
    }

    #[test]
    fn a_process_that_cannot_be_looked_at_is_not_gone() {
        for (errno, gone) in [
            (libc::ESRCH, true),
            (libc::ENOENT, true),
            (libc::EINVAL, true),
            (libc::EMFILE, false),
            (libc::ENFILE, false),
            (libc::ENOMEM, false),
            (libc::EPERM, false),
        ] {
            assert_eq!(means_gone(&io::Error::from_raw_os_error(errno)), gone, "{errno}");
        }
        // No process at all, and a thread that leads none.
        assert!(!Process { pid: 0, start: 0 }.is_alive());
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let (end, ended) = std::sync::mpsc::channel::<()>();
            scope.spawn(move || {
                sender.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
                let _ = ended.recv();
            });
            assert!(!Process { pid: receiver.recv().unwrap(), start: 0 }.is_alive());
            drop(end);
        });
    }

    #[test]
    fn an_ended_child_is_gone_even_before_it_is_reaped() {
        let mut child = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let (process, pidfd) = Process::open(child.id() as i32).unwrap();
        end(pidfd.as_fd(), Duration::from_secs(5));
        assert!(!process.is_alive());
        child.wait().unwrap();
        assert!(!process.is_alive());
    }
}
