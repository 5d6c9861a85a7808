//! System calls that rustix does not have or, as with `fork`, does not wrap as safe.
#![allow(unsafe_code)]
// UNSAFETY: the kernel interface; each function checks or documents what its call needs and is otherwise safe to use.

use std::ffi::{CStr, c_char};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// `MOUNT_ATTR_*` of `<linux/mount.h>`.
pub const READ_ONLY: u64 = 0x1;
pub const NO_SUID: u64 = 0x2;
pub const NO_DEV: u64 = 0x4;
pub const NO_EXEC: u64 = 0x8;

/// Sets attributes of the mount that `mount` is the root of, and makes it private: a clone is its original's peer where that
/// is shared, as all of systemd's hosts' are, and what is mounted upon the one would appear upon the other.
pub fn set_mount_attributes(mount: BorrowedFd<'_>, set: u64) -> io::Result<()> {
    change_mount_attributes(mount, set, 0)
}

/// As [`set_mount_attributes`], and takes away those of `clear`.
pub fn change_mount_attributes(mount: BorrowedFd<'_>, set: u64, clear: u64) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: clear, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    // SAFETY: `attributes` outlives the call, and its size is the one that is passed.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of_val(&attributes),
        )
    })
    .map(drop)
}

/// The two sides of a fork.
pub enum Forked {
    Child,
    Parent(rustix::process::Pid),
}

/// Forks. The hook has one thread, so the child may do all that the parent may.
pub fn fork() -> io::Result<Forked> {
    // SAFETY: no other thread exists whose locks the child could inherit.
    let pid = check(unsafe { libc::fork() }.into())? as i32;
    Ok(rustix::process::Pid::from_raw(pid).map_or(Forked::Child, Forked::Parent))
}

/// Forks into `cgroup`, a directory of version 2: the only way there that waits for no grace period. Kernel 5.7 or later. The
/// child must soon [`execute`]: the C library does not learn that it is another thread now.
pub fn fork_into(cgroup: BorrowedFd<'_>) -> io::Result<Forked> {
    // SAFETY: all zero is a valid value, as with `fork`.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = 0x2_0000_0000; // CLONE_INTO_CGROUP of <linux/sched.h>
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: as `fork`, without its handlers: no other thread exists, memory and stack are the child's own copies.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of_val(&arguments)) })? as i32;
    Ok(rustix::process::Pid::from_raw(pid).map_or(Forked::Child, Forked::Parent))
}

/// Ends the process without running destructors, which are the parent's to run.
pub fn exit_child(code: i32) -> ! {
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Replaces the program. Returns only when that fails.
pub fn execute(path: &CStr, arguments: &[&CStr], environment: &[&CStr]) -> io::Error {
    let pointers = |strings: &[&CStr]| -> Vec<*const c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: both arrays end with a null pointer and, like the strings, live until the call returns or never does.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Makes `descriptors` the descriptors from 3 on, in order, and closes all others above 2. Only for a child that is about to
/// [`execute`]: it takes descriptors from under their owners.
pub fn keep_only(descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let first = 3;
    let past = first + descriptors.len() as RawFd;
    let mut parked = Vec::with_capacity(descriptors.len());
    for descriptor in descriptors {
        // SAFETY: duplicates a descriptor that the caller has borrowed; no memory is involved.
        parked
            .push(check(unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_DUPFD_CLOEXEC, past) }.into())? as RawFd);
    }
    for (target, source) in (first..).zip(parked) {
        // SAFETY: as above; what `target` was is given up by contract.
        check(unsafe { libc::dup2(source, target) }.into())?;
    }
    // SAFETY: closes by contract all that nobody was promised to keep.
    check(unsafe { libc::syscall(libc::SYS_close_range, past, u32::MAX, 0) }).map(drop)
}

/// Writes to a descriptor that [`keep_only`] placed.
pub fn write_kept(descriptor: RawFd, bytes: &[u8]) {
    // SAFETY: the pointer and length are those of `bytes`. A failure cannot be told to anybody.
    unsafe { libc::write(descriptor, bytes.as_ptr().cast(), bytes.len()) };
}

/// Gives all signals their default action and unblocks them: Rust ignores SIGPIPE, crun blocks SIGCHLD, and both would be
/// inherited.
pub fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL is a valid action; numbers that cannot be set answer with an error, which changes nothing.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: an all-zero sigset_t is the empty set on Linux, and it outlives the call.
    unsafe {
        let empty: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, std::ptr::null_mut());
    }
}

/// Sets the identity with which files are created, and returns the one before. The kernel takes file capabilities away with it
/// while it is not root's.
pub fn set_file_owner(uid: u32, gid: u32) -> (u32, u32) {
    // SAFETY: plain numbers; an invalid one is ignored by the kernel. Group first: it needs root's capability.
    unsafe {
        let gid_before = libc::setfsgid(gid) as u32;
        (libc::setfsuid(uid) as u32, gid_before)
    }
}

/// The user namespace that owns the namespace `descriptor`. Refused if that is neither ours nor below ours, so that we have no
/// rights over it.
pub fn owner_of_namespace(descriptor: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: takes no argument; the descriptor is borrowed, and the kernel refuses those that are no namespace.
    let owner = check(unsafe { libc::ioctl(descriptor.as_raw_fd(), libc::NS_GET_USERNS) }.into())?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(owner as RawFd) })
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
