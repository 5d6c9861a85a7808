//! A mount namespace with next to nothing in it: the directory where proxies find each other, or what opening a card takes.

// UNSAFETY: a system call that rustix does not have, and one that can take things from other threads.
#![allow(unsafe_code)]

use rustix::fd::{AsFd, AsRawFd, BorrowedFd};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, Uid, chownat, mkdirat, mknodat, open};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, move_mount,
    open_tree, unmount,
};
use rustix::process::{chdir, fchdir, pivot_root, umask};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use std::path::{Path, PathBuf};

/// What the process sees of file systems.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum View {
    /// The sockets by which proxies find each other.
    Sockets,
    /// `/sys`, for the library that opens a card, and character devices at their paths: the card's, if it has one.
    Card {
        /// Below `/dev`.
        nodes: Vec<PathBuf>,
    },
}

/// Makes what `view` says the root of a mount namespace of the process's own, read-only, and leaves everything else behind. Sockets
/// of the directory `sockets` can still be connected to: what is read-only is the mount, not what answers. A card's device is for
/// the user `id`, whom the host's may not be for. To be called while the process has one thread and is root.
///
/// # Errors
/// What the kernel says; the process is of no use then.
pub fn enter_root(view: &View, sockets: &Path, id: Option<u32>) -> Result<(), Errno> {
    // SAFETY: descriptors, which other flags would part from those of other threads, stay shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS)? };
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    match view {
        View::Sockets => enter_sockets(sockets),
        View::Card { nodes } => enter_card(nodes, sockets, id),
    }
}

/// A file system of a few nodes upon `place`, which becomes the root.
fn enter_card(nodes: &[PathBuf], place: &Path, id: Option<u32>) -> Result<(), Errno> {
    let devices =
        nodes.iter().map(|node| Ok((node.as_path(), rustix::fs::stat(node)?))).collect::<Result<Vec<_>, Errno>>()?;
    let sys = open_tree(rustix::fs::CWD, "/sys", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    let nothing = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    restrict(sys.as_fd(), nothing | libc::MOUNT_ATTR_NODEV)?;
    mount("tmpfs", place, "tmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, c"size=64k,mode=0755")?;
    let root = open(place, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // Hooks start proxies with a mask that leaves others nothing, and another user is to find his way to the device.
    let mask = umask(Mode::empty());
    let made = make_devices(root.as_fd(), &devices, id);
    umask(mask);
    made?;
    move_mount(&sys, "", &root, "sys", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    restrict(root.as_fd(), nothing)?;
    become_root(root.as_fd())
}

/// Makes the places for `/sys` and the devices, and those.
fn make_devices(root: BorrowedFd<'_>, devices: &[(&Path, Stat)], id: Option<u32>) -> Result<(), Errno> {
    let directory = Mode::from_raw_mode(0o755);
    mkdirat(root, "sys", directory)?;
    mkdirat(root, "dev", directory)?;
    for (node, device) in devices {
        let path = node.strip_prefix("/").map_err(|_| Errno::INVAL)?;
        let parents: Vec<&Path> = path.ancestors().skip(1).collect();
        for parent in parents.iter().rev().filter(|parent| parent.components().count() > 1) {
            match mkdirat(root, *parent, directory) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
        }
        mknodat(root, path, FileType::CharacterDevice, Mode::from_raw_mode(0o600), device.st_rdev)?;
        if let Some(id) = id {
            chownat(root, path, Some(Uid::from_raw(id)), Some(Gid::from_raw(id)), AtFlags::empty())?;
        }
    }
    Ok(())
}

fn enter_sockets(sockets: &Path) -> Result<(), Errno> {
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let root = open_tree(rustix::fs::CWD, sockets, clone)?;
    restrict(
        root.as_fd(),
        libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC,
    )?;
    move_mount(&root, "", rustix::fs::CWD, sockets, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    become_root(root.as_fd())
}

fn become_root(root: BorrowedFd<'_>) -> Result<(), Errno> {
    fchdir(root)?;
    // The old root comes to lie upon the new one, and goes.
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")
}

/// Sets the attributes of a mount; what its original has beyond them stays, as a user namespace demands.
fn restrict(mount: BorrowedFd<'_>, attr_set: u64) -> Result<(), Errno> {
    let attributes = libc::mount_attr { attr_set, attr_clr: 0, propagation: 0, userns_fd: 0 };
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
