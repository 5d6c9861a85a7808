//! What the proxy asks of the kernel, and what it gives up, before it listens to a container.

// UNSAFETY: one system call that neither rustix nor nix offers.
#![allow(unsafe_code)]

use rustix::process::{Resource, getrlimit, setrlimit};

/// Descriptors cost a container up to three each; the soft limit that the engine happened to have must not decide.
pub fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // With the old limit the proxy works as well, only for fewer objects.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Gives up every capability of the calling thread and of those that it starts, and the way to gain new ones.
///
/// What is left is what a process with the administrator's user id may do to files: the proxy reads its launch file,
/// makes sockets in the run directory, and needs nothing else.
pub fn drop_privileges() -> Result<(), caps::errors::CapsError> {
    // It can only fail for a flag that the kernel does not know, which is older than all that this runs on.
    let _ = rustix::thread::set_no_new_privs(true);
    for set in [caps::CapSet::Ambient, caps::CapSet::Effective, caps::CapSet::Permitted, caps::CapSet::Inheritable] {
        caps::clear(None, set)?;
    }
    Ok(())
}

/// What the proxy still calls once it listens; everything else answers `EPERM`, on all threads.
///
/// There is no way here to run a program, to look into another process, to change namespaces or mounts, or to reach a
/// network: sockets can only be Unix ones and the one netlink family that lists addresses.
pub fn confine() -> anyhow::Result<()> {
    use seccompiler::{
        SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Compare, SeccompCondition, SeccompFilter,
        SeccompRule,
    };
    #[rustfmt::skip]
    const CALLS: &[i64] = &[
        // Waiting and waking.
        libc::SYS_poll, libc::SYS_ppoll, libc::SYS_futex, libc::SYS_sched_yield, libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep, libc::SYS_restart_syscall, libc::SYS_eventfd2,
        libc::SYS_sched_getaffinity, libc::SYS_sched_setaffinity, libc::SYS_getcpu,
        // Sockets that are open, and new Unix ones.
        libc::SYS_read, libc::SYS_write, libc::SYS_readv, libc::SYS_writev, libc::SYS_preadv2,
        libc::SYS_sendmsg, libc::SYS_recvmsg, libc::SYS_sendto, libc::SYS_accept4, libc::SYS_connect, libc::SYS_bind,
        libc::SYS_getsockname, libc::SYS_getsockopt, libc::SYS_socketpair, libc::SYS_shutdown,
        libc::SYS_close, libc::SYS_fcntl, libc::SYS_ioctl, libc::SYS_dup, libc::SYS_dup3,
        // Files below the run directory; memory files.
        libc::SYS_openat, libc::SYS_open, libc::SYS_pread64, libc::SYS_pwrite64, libc::SYS_ftruncate, libc::SYS_flock,
        libc::SYS_fallocate,
        libc::SYS_fstat, libc::SYS_fstatfs, libc::SYS_lstat, libc::SYS_stat, libc::SYS_newfstatat, libc::SYS_statx, libc::SYS_lseek,
        libc::SYS_getdents64, libc::SYS_unlink, libc::SYS_unlinkat, libc::SYS_rmdir, libc::SYS_memfd_create,
        // Memory.
        libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mprotect, libc::SYS_mremap, libc::SYS_madvise, libc::SYS_mincore,
        libc::SYS_brk,
        libc::SYS_getrandom,
        // Ends.
        libc::SYS_exit, libc::SYS_exit_group, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigaction, libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack, libc::SYS_gettid, libc::SYS_getpid, libc::SYS_tgkill,
    ];
    let mut rules: std::collections::BTreeMap<i64, Vec<SeccompRule>> =
        CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let families = [libc::AF_UNIX, libc::AF_NETLINK].map(|family| {
        SeccompCondition::new(0, Length::Dword, Compare::Eq, family as u64)
            .and_then(|only| SeccompRule::new(vec![only]))
    });
    rules.insert(libc::SYS_socket, families.into_iter().collect::<Result<_, _>>()?);
    let send_buffer = [(1, libc::SOL_SOCKET), (2, libc::SO_SNDBUF)]
        .map(|(argument, value)| SeccompCondition::new(argument, Length::Dword, Compare::Eq, value as u64));
    let send_buffer = send_buffer.into_iter().collect::<Result<_, _>>()?;
    rules.insert(libc::SYS_setsockopt, vec![SeccompRule::new(send_buffer)?]);
    let denied = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules, denied, SeccompAction::Allow, std::env::consts::ARCH.try_into()?)?;
    let program: seccompiler::BpfProgram = filter.try_into()?;
    seccompiler::apply_filter_all_threads(&program)?;
    Ok(())
}

/// Asks for short time slices for the calling thread: 100 µs, the least there is.
///
/// Applications spin on memory, where no yield can be had from them. A thread with a short slice that wakes up takes the
/// processor from one that has been running, instead of waiting for the end of its slice, which is milliseconds away
/// (EEVDF; `sched_setattr(2)`, `sched_runtime` of SCHED_OTHER, kernel 6.12). Older kernels ignore it.
pub fn prefer_short_slices() {
    /// `struct sched_attr` (`linux/sched/types.h`), first version.
    #[repr(C)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let attributes = Attributes {
        size: size_of::<Attributes>() as u32,
        policy: libc::SCHED_OTHER as u32,
        flags: 0,
        nice: 0,
        priority: 0,
        runtime: 100_000,
        deadline: 0,
        period: 0,
    };
    // SAFETY: the structure is as long as it says and lives across the call; it concerns the calling thread only.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}
