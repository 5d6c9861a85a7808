//! A mount namespace with nothing in it but the directory where proxies find each other.

// UNSAFETY: a system call that rustix does not have, and one that can take things from other threads.
#![allow(unsafe_code)]

use rustix::fd::{AsFd, AsRawFd, BorrowedFd};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use std::path::Path;

/// Makes `sockets` the root of a mount namespace of the process's own, read-only, and leaves everything else behind. Sockets
/// of that directory can still be connected to: what is read-only is the mount, not what answers. To be called while the
/// process has one thread and is root.
///
/// # Errors
/// What the kernel says; the process is of no use then.
pub fn enter_empty_root(sockets: &Path) -> Result<(), Errno> {
    // SAFETY: descriptors, which other flags would part from those of other threads, stay shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS)? };
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let root = open_tree(rustix::fs::CWD, sockets, clone)?;
    restrict(root.as_fd())?;
    move_mount(&root, "", rustix::fs::CWD, sockets, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    fchdir(&root)?;
    // The old root comes to lie upon the new one, and goes.
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")
}

/// Sets the attributes of a mount; what its original has beyond them stays, as a user namespace demands.
fn restrict(mount: BorrowedFd<'_>) -> Result<(), Errno> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: `attributes` outlives the call, and its size is the one that is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if result == 0 { Ok(()) } else { Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}
