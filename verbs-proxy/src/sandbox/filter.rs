//! The system calls that are left once a container can say something, and with which arguments. Everything else answers
//! `EPERM`.

use crate::shared::UFFDIO_REGISTER;
use anyhow::Result;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Compare, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use std::collections::BTreeMap;
use std::os::fd::RawFd;

/// An argument's number, and what its low 32 bits must be: one of these values.
type Argument = (u8, &'static [u64]);

/// What the proxy calls with any arguments.
///
/// There is no way here to open a path, to run a program or to start a thread, to look into or signal another process, or to
/// change namespaces, mounts, ids or limits. Nor `mremap`, by which the mapping of the port's own page could grow over its
/// neighbours'; `realloc` does without.
#[rustfmt::skip]
const PROXY: &[i64] = &[
    // Waiting and waking.
    libc::SYS_poll, libc::SYS_ppoll, libc::SYS_futex, libc::SYS_sched_yield, libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep, libc::SYS_restart_syscall, libc::SYS_eventfd2, libc::SYS_getcpu,
    // Sockets that are open.
    libc::SYS_read, libc::SYS_write, libc::SYS_readv, libc::SYS_writev,
    libc::SYS_sendmsg, libc::SYS_recvmsg, libc::SYS_sendto, libc::SYS_recvfrom, libc::SYS_accept4, libc::SYS_connect,
    libc::SYS_bind, libc::SYS_getsockname, libc::SYS_getsockopt, libc::SYS_shutdown, libc::SYS_close,
    // Memory files.
    libc::SYS_memfd_create, libc::SYS_ftruncate, libc::SYS_fallocate, libc::SYS_fchmod, libc::SYS_lseek,
    libc::SYS_fstat, libc::SYS_fstatfs, libc::SYS_pread64, libc::SYS_pwrite64,
    // Memory.
    libc::SYS_munmap, libc::SYS_madvise, libc::SYS_mincore, libc::SYS_brk, libc::SYS_getrandom,
    // Ends.
    libc::SYS_exit, libc::SYS_exit_group, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigaction, libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack, libc::SYS_gettid, libc::SYS_getpid,
];

/// `fcntl(2)` commands that concern nobody but the descriptor: no locks, no signals.
const FCNTL: &[u64] = &[
    libc::F_GETFD as u64,
    libc::F_SETFD as u64,
    libc::F_GETFL as u64,
    libc::F_SETFL as u64,
    libc::F_DUPFD_CLOEXEC as u64,
    libc::F_ADD_SEALS as u64,
    libc::F_GET_SEALS as u64,
];
/// `linux/fs.h`, `_IOW('f', 2, long)`.
const FS_IOC_SETFLAGS: u64 = 0x4008_6602;
/// `linux/fs.h`, `_IOR('f', 1, long)`.
const FS_IOC_GETFLAGS: u64 = 0x8008_6601;
/// `ioctl(2)`: without blocking, what waits in a socket to be read, and holes in a range of the proxy's own addresses.
const IOCTL: &[u64] = &[libc::FIONBIO, libc::TIOCOUTQ, UFFDIO_REGISTER];
/// `setsockopt(2)` at `SOL_SOCKET`: how much may wait to be read, and whether descriptors may come along (`SO_PASSRIGHTS` of
/// `asm-generic/socket.h`).
const SOCKET_OPTIONS: &[u64] = &[libc::SO_SNDBUF as u64, 83];
/// `linux/membarrier.h`.
pub(super) const MEMBARRIER_CMD_GLOBAL: u64 = 1;
/// With any flags.
const TYPES: u64 = 0xf;
/// For `getifaddrs(3)`.
const NETLINK: &[&[Argument]] = &[&[
    (0, &[libc::AF_NETLINK as u64]),
    (1, &[(libc::SOCK_RAW | libc::SOCK_CLOEXEC) as u64]),
    (2, &[libc::NETLINK_ROUTE as u64]),
]];

/// To find a device and to open it, in what the root and Landlock leave of files.
#[rustfmt::skip]
const OPENING: &[i64] = &[
    libc::SYS_open, libc::SYS_openat, libc::SYS_getdents64, libc::SYS_stat, libc::SYS_lstat, libc::SYS_newfstatat, libc::SYS_statx,
    libc::SYS_access, libc::SYS_faccessat, libc::SYS_faccessat2, libc::SYS_readlink, libc::SYS_readlinkat,
];

/// Confines all threads of the proxy. `ioctls`: requests that its device makes beyond those of every proxy. `opens`: whether it opens
/// files, of which the root and Landlock have left it some.
///
/// # Errors
/// If the kernel has no seccomp filters.
pub fn confine_proxy(ioctls: &'static [u64], opens: bool) -> Result<()> {
    let mut rules = free(PROXY);
    let pid = u64::from(std::process::id());
    allow(&mut rules, libc::SYS_fcntl, &[&[(1, FCNTL)]])?;
    allow(&mut rules, libc::SYS_ioctl, &[&[(1, IOCTL)], &[(1, ioctls)]])?;
    for (call, kind) in [
        (libc::SYS_socket, libc::SOCK_SEQPACKET),
        (libc::SYS_socketpair, libc::SOCK_SEQPACKET),
        (libc::SYS_socketpair, libc::SOCK_DGRAM),
    ] {
        let unix = SeccompCondition::new(0, Length::Dword, Compare::Eq, libc::AF_UNIX as u64)?;
        let kind = SeccompCondition::new(1, Length::Dword, Compare::MaskedEq(TYPES), kind as u64)?;
        rules.entry(call).or_default().push(SeccompRule::new(vec![unix, kind])?);
    }
    allow(&mut rules, libc::SYS_socket, NETLINK)?;
    allow(&mut rules, libc::SYS_setsockopt, &[&[(1, &[libc::SOL_SOCKET as u64]), (2, SOCKET_OPTIONS)]])?;
    // No more than to wait: of all processors, for nobody in particular.
    allow(&mut rules, libc::SYS_membarrier, &[&[(0, &[MEMBARRIER_CMD_GLOBAL]), (1, &[0])]])?;
    // Of a descriptor, not of a path.
    if opens {
        rules.extend(free(OPENING));
    } else {
        let empty = &[libc::AT_EMPTY_PATH as u64];
        allow(&mut rules, libc::SYS_newfstatat, &[&[(3, empty)]])?;
    }
    // Of the calling thread.
    allow(&mut rules, libc::SYS_sched_getaffinity, &[&[(0, &[0])]])?;
    allow(&mut rules, libc::SYS_sched_setaffinity, &[&[(0, &[0])]])?;
    // Of itself. Everything but the length of its slices needs a capability or a limit that it does not have, or makes it slower.
    allow(&mut rules, libc::SYS_sched_setattr, &[&[(0, &[0]), (2, &[0])]])?;
    // No code that was not there before.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let plain = SeccompCondition::new(2, Length::Dword, Compare::MaskedEq(libc::PROT_EXEC as u64), 0)?;
        rules.entry(call).or_default().push(SeccompRule::new(vec![plain])?);
    }
    // `abort(3)`.
    let own = SeccompCondition::new(0, Length::Dword, Compare::Eq, pid)?;
    rules.entry(libc::SYS_tgkill).or_default().push(SeccompRule::new(vec![own])?);
    seccompiler::apply_filter_all_threads(&program(rules)?)?;
    Ok(())
}

/// The flags with which the log's datagrams are sent: nobody waits.
const LOG: u64 = (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as u64;

/// What the warden calls: it opens and removes files that it knows, answers three sockets and sends from one.
#[rustfmt::skip]
const WARDEN: &[i64] = &[
    libc::SYS_poll, libc::SYS_ppoll, libc::SYS_restart_syscall, libc::SYS_clock_gettime, libc::SYS_futex,
    libc::SYS_clock_nanosleep, libc::SYS_recvmsg, libc::SYS_sendmsg, libc::SYS_pidfd_send_signal, libc::SYS_fallocate,
    libc::SYS_open, libc::SYS_openat, libc::SYS_close, libc::SYS_read, libc::SYS_write, libc::SYS_lseek, libc::SYS_fstat,
    libc::SYS_lstat, libc::SYS_newfstatat, libc::SYS_statx, libc::SYS_getdents64, libc::SYS_unlink, libc::SYS_unlinkat,
    libc::SYS_rmdir,
    libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mremap, libc::SYS_brk, libc::SYS_madvise, libc::SYS_getrandom,
    libc::SYS_exit, libc::SYS_exit_group, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigaction, libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack, libc::SYS_gettid, libc::SYS_getpid,
];

/// Confines all threads of the warden. `log_socket`: the one from which datagrams go to a path.
///
/// # Errors
/// As [`confine_proxy`].
pub fn confine_warden(log_socket: Option<RawFd>) -> Result<()> {
    let mut rules = free(WARDEN);
    if let Some(socket) = log_socket {
        let from = SeccompCondition::new(0, Length::Dword, Compare::Eq, socket as u64)?;
        let flags = SeccompCondition::new(3, Length::Dword, Compare::Eq, LOG)?;
        rules.entry(libc::SYS_sendto).or_default().push(SeccompRule::new(vec![from, flags])?);
    }
    allow(&mut rules, libc::SYS_fcntl, &[&[(1, FCNTL)]])?;
    allow(&mut rules, libc::SYS_ioctl, &[&[(1, &[FS_IOC_SETFLAGS, FS_IOC_GETFLAGS])]])?;
    seccompiler::apply_filter_all_threads(&program(rules)?)?;
    Ok(())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn free(calls: &[i64]) -> Rules {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

/// Allows `call` where for one of `ways` each argument has one of its values.
fn allow(rules: &mut Rules, call: i64, ways: &[&[Argument]]) -> Result<()> {
    for way in ways {
        // Every combination of values is a rule.
        let mut combinations: Vec<Vec<SeccompCondition>> = vec![Vec::new()];
        for (argument, values) in *way {
            let mut longer = Vec::new();
            for combination in &combinations {
                for value in *values {
                    let only = SeccompCondition::new(*argument, Length::Dword, Compare::Eq, *value)?;
                    longer.push([combination.as_slice(), &[only]].concat());
                }
            }
            combinations = longer;
        }
        for combination in combinations {
            rules.entry(call).or_default().push(SeccompRule::new(combination)?);
        }
    }
    Ok(())
}

fn program(rules: Rules) -> Result<BpfProgram> {
    let denied = SeccompAction::Errno(libc::EPERM as u32);
    Ok(SeccompFilter::new(rules, denied, SeccompAction::Allow, std::env::consts::ARCH.try_into()?)?.try_into()?)
}
