//! Mount points in a directory in which nothing can be created: a read-only overlay of the two.

use crate::mountinfo::{Mountinfo, descriptor_path};
use crate::rootfs::{Kind, Place};
use crate::session;
use crate::sys;
use rustix::fs::{AtFlags, Gid, Mode, Uid};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

/// An overlay that is not attached yet.
pub struct Overlay {
    mount: OwnedFd,
    /// What is mounted below the directory, and has to be again.
    below: Vec<(PathBuf, OwnedFd)>,
}

impl Overlay {
    /// Prepares `directory` with `names` in it, empty. On `scratch` the upper layer is mounted for a moment, because the
    /// kernel wants layers to be mounted in our namespace.
    pub fn new(directory: &Place, names: &[(&str, Kind)], scratch: &Place) -> io::Result<Self> {
        // Runtimes mount resolv.conf and others below /etc; an overlay does not show what is mounted on its layers.
        let path = std::fs::read_link(descriptor_path(&directory.fd))?;
        let below = Mountinfo::read()?.below(&path).into_iter().map(|path| {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_RECURSIVE
                | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
            let tree = rustix::mount::open_tree(&directory.fd, &path, flags)?;
            Ok((path, tree))
        });
        let below = below.collect::<io::Result<_>>()?;
        let upper = new_mount("tmpfs", &[("mode", "0755"), ("size", "128k")])?;
        scratch.attach(&upper).map_err(io::Error::other)?;
        let mount = lay(directory, names, &upper);
        rustix::mount::unmount(descriptor_path(&upper), UnmountFlags::DETACH)?;
        Ok(Self { mount: mount?, below })
    }

    /// The mount, to be attached to the directory.
    pub fn mount(&self) -> &OwnedFd {
        &self.mount
    }

    /// Once the overlay is attached, attaches to it what was mounted below the directory.
    pub fn restore_below(&self) -> io::Result<()> {
        self.below.iter().try_for_each(|(path, tree)| {
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            Ok(rustix::mount::move_mount(tree, "", &self.mount, path, flags)?)
        })
    }
}

fn lay(directory: &Place, names: &[(&str, Kind)], upper: &OwnedFd) -> io::Result<OwnedFd> {
    for (name, kind) in names {
        match kind {
            Kind::File | Kind::Device => drop(session::create(upper, name, 0o644)?),
            Kind::Directory => rustix::fs::mkdirat(upper, *name, Mode::from_raw_mode(0o755))?,
        }
    }
    // The upper layer's root is what the container sees as the directory itself.
    let like = rustix::fs::fstat(&directory.fd)?;
    let (uid, gid) = (Uid::from_raw(like.st_uid), Gid::from_raw(like.st_gid));
    rustix::fs::chownat(upper, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
    rustix::fs::chmod(descriptor_path(upper), Mode::from_raw_mode(like.st_mode & 0o7777))?;
    let layers = format!("{}:{}", descriptor_path(upper).display(), descriptor_path(&directory.fd).display());
    let overlay = new_mount("overlay", &[("lowerdir", &layers)])?;
    sys::set_mount_attributes(overlay.as_fd(), sys::READ_ONLY | sys::NO_SUID | sys::NO_DEV)?;
    Ok(overlay)
}

/// A new, detached mount.
pub fn new_mount(kind: &str, options: &[(&str, &str)]) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        rustix::mount::fsconfig_set_string(&context, *key, *value)?;
    }
    rustix::mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    Ok(rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}
