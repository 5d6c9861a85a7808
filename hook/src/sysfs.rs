//! The file system of what a container sees of its device in `/sys` and `/dev`: made here, filled by its proxy
//! ([`ringfence_proxy::sysfs`]), attached by [`crate::inject`].
//!
//! It is a tmpfs of the container's own, so that nothing of it has to be removed: it ends with the container's mount namespace and
//! its proxy. What is attached are read-only clones of its directories; the proxy goes on writing to some of its files.
//!
//! ```text
//! class/                    over the container's /sys/class, with the host's other classes, if that has not the two below
//! class/infiniband/         or over its namesake there
//! class/infiniband_verbs/   likewise
//! nothing/                  over what shows other devices
//! dev/                      over /dev/infiniband
//! dev/uverbs0               under the host's /dev/full, which nobody can open there; not in every container
//! dev/rdma_cm               under a node that can be opened; in few containers
//! ```

use crate::inject::clone;
use crate::mountinfo::descriptor_path;
use crate::overlay::new_mount;
use crate::rootfs::Place;
use crate::session;
use crate::sys;
use ringfence_proxy::sysfs::{CLASSES, DEVICES, VERBS};
use rustix::fs::{Mode, OFlags};
use rustix::mount::UnmountFlags;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A device is some eighty files of a page each, and its GID table three names for each entry. The proxy can write to it.
const LIMITS: [(&str, &str); 3] = [("mode", "0755"), ("size", "4m"), ("nr_inodes", "4k")];
/// The character device of the tree's device.
pub const NODE: &str = "uverbs0";
/// An empty directory.
const NOTHING: &str = "nothing";
/// What is seen in `/dev/infiniband`.
const DEV: &str = "dev";

/// The file system, not attached to anything.
pub struct Tree {
    mount: OwnedFd,
}

impl Tree {
    /// Makes it, with the directories that are known, and places for `nodes`.
    pub fn new(nodes: impl IntoIterator<Item = &'static str>) -> io::Result<Self> {
        let tree = Self { mount: new_mount("tmpfs", &LIMITS)? };
        let mode = Mode::from_raw_mode(0o755);
        for directory in [CLASSES, &format!("{CLASSES}/{DEVICES}"), &format!("{CLASSES}/{VERBS}"), NOTHING, DEV] {
            rustix::fs::mkdirat(&tree.mount, directory, mode)?;
        }
        for node in nodes {
            session::create(&tree.mount, &format!("{DEV}/{node}"), 0o444)?;
        }
        Ok(tree)
    }

    /// Its root, for the proxy.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }

    /// The directory of classes, to be written to.
    pub fn classes(&self) -> io::Result<OwnedFd> {
        self.open(CLASSES)
    }

    /// Has `take` take views of it. On `scratch` it is mounted for that moment, because only mounts of our namespace can be cloned.
    pub fn views<T>(&self, scratch: &Place, take: impl FnOnce(&Views<'_>) -> io::Result<T>) -> io::Result<T> {
        scratch.attach(&self.mount).map_err(io::Error::other)?;
        let taken = take(&Views(self));
        rustix::mount::unmount(descriptor_path(&self.mount), UnmountFlags::DETACH)?;
        taken
    }

    fn open(&self, path: &str) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.mount, path, flags, Mode::empty())?)
    }
}

/// A [`Tree`] of which clones can be made: read-only mounts, not attached to anything.
pub struct Views<'a>(&'a Tree);

impl Views<'_> {
    /// All classes.
    pub fn classes(&self) -> io::Result<OwnedFd> {
        self.view(CLASSES)
    }

    /// One class of the container: as far as it is none of ours, nothing.
    pub fn class(&self, name: &str) -> io::Result<OwnedFd> {
        match name {
            DEVICES | VERBS => self.view(&format!("{CLASSES}/{name}")),
            _ => self.nothing(),
        }
    }

    /// One class, whatever has been made of it.
    pub fn made(&self, name: &str) -> io::Result<OwnedFd> {
        self.view(&format!("{CLASSES}/{name}"))
    }

    /// An empty directory.
    pub fn nothing(&self) -> io::Result<OwnedFd> {
        self.view(NOTHING)
    }

    /// What is in `/dev/infiniband`.
    pub fn dev(&self) -> io::Result<OwnedFd> {
        self.view(DEV)
    }

    fn view(&self, path: &str) -> io::Result<OwnedFd> {
        clone(self.0.open(path)?, sys::NO_EXEC)
    }
}
