//! Shows the container its device in `/sys/class` and `/dev/infiniband`, and no other.
//!
//! Where the container has the two classes, because the host has, they are mounted upon. Where it has not, `/sys/class` is, by a
//! directory in which every other class is the container's own, mounted there again. An overlay would be one mount for
//! all of them, but wrong: it remembers names that it once did not find, so that a network interface which comes later is listed and
//! cannot be opened.
//!
//! All that is looked at here is the kernel's: a `/sys` that is no sysfs, such as a volume, is left alone.

use super::{Injection, clone, open_node};
use crate::failure::{Code, During, Failure};
use crate::mountinfo::Mountinfo;
use crate::rootfs::{Kind, Place};
use crate::sys;
use crate::sysfs::{NODE, Tree, Views};
use ringfence_proxy::sysfs::{DEVICES, PLACEHOLDER, VERBS};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::mount::{MoveMountFlags, OpenTreeFlags};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// `SYSFS_MAGIC` of `<linux/magic.h>`.
const SYSFS: i64 = 0x6265_6572;
/// Classes of one kernel; it has some eighty.
const MAX_CLASSES: usize = 1024;
/// Devices of all classes of InfiniBand's that are hidden; what there is beyond that is hidden in the classes alone.
const MAX_DEVICES: usize = 1024;
/// Directories between `/sys` and a device.
const MAX_DEPTH: usize = 32;

/// What the device is shown with.
pub struct Shown {
    /// The file system.
    pub tree: Tree,
    /// The host's node that stands for the device's own, mounted so that it cannot be opened; if the tree has a place for it.
    pub node: Option<OwnedFd>,
}

impl Shown {
    /// What `tree` is, with a node or without, as that was made.
    pub fn new(tree: Tree, with_node: bool) -> Result<Self, Failure> {
        Ok(Self { tree, node: if with_node { Some(placeholder()?) } else { None } })
    }
}

/// The node that stands for those of devices: the mount is one without devices, so that the kernel lets nobody open it.
fn placeholder() -> Result<OwnedFd, Failure> {
    const PATH: &str = "/dev/full";
    let node = open_node(Path::new(PATH))?;
    let found = rustix::fs::fstat(&node).during(Code::Injection, || PATH.into())?.st_rdev;
    let (major, minor) = PLACEHOLDER;
    if found != rustix::fs::makedev(major, minor) {
        let message =
            format!("{PATH} is not device {major}:{minor}; make it anew, or set uverbs = \"never\" under [inject]");
        return Err(Failure::new(Code::Device, message));
    }
    clone(&node, sys::NO_EXEC).during(Code::Injection, || PATH.into())
}

impl Injection<'_> {
    /// Attaches it. `scratch` is used for a moment. Answers why `/sys` shows nothing, if so: then the container has the verbs alone.
    pub(super) fn sysfs(&mut self, dev: &Place, scratch: &Place, shown: &Shown) -> Result<Option<String>, Failure> {
        let class = match self.class() {
            Ok(class) => class,
            Err(why) => return Ok(Some(format!("programs find no device in /sys/class: {why}"))),
        };
        let names = class.names(MAX_CLASSES).during(Code::Injection, || "/sys/class in the container".into())?;
        let (theirs, others): (Vec<&String>, Vec<&String>) =
            names.iter().filter(|name| !name.starts_with('.')).partition(|name| name.starts_with(DEVICES));
        let has_both = [DEVICES, VERBS].iter().all(|class| theirs.iter().any(|name| name == class));

        let directory = self.directory(Some(dev), "infiniband")?;
        self.refuse_shared(&directory)?;
        self.refuse_shared(scratch)?;
        let what = || "cannot show the device in the container's /sys".into();
        let devices = devices(&self.root, &class, &theirs);
        let mounts = shown.tree.views(scratch, |views| {
            let nodes = views.dev()?;
            let hidden = devices.into_iter().map(|place| Ok((place, views.nothing()?)));
            let hidden = hidden.collect::<io::Result<Vec<_>>>()?;
            let classes = if has_both { over(&class, &theirs, views)? } else { around(&class, &others, shown, views)? };
            Ok((nodes, hidden, classes))
        });
        let (nodes, hidden, classes) = mounts.during(Code::Injection, what)?;
        directory.attach(&nodes)?;
        if let Some(node) = &shown.node {
            put(node, &nodes, NODE).during(Code::Injection, what)?;
        }
        for (place, nothing) in hidden {
            place.attach(nothing)?;
        }
        match classes {
            Classes::Over(mounts) => mounts.iter().try_for_each(|(place, mount)| place.attach(mount))?,
            Classes::Around(mount, others) => {
                class.attach(&mount)?;
                let all = others.iter().try_for_each(|(name, tree)| put(tree, &mount, name));
                all.during(Code::Injection, what)?;
            }
        }
        Ok(None)
    }

    /// The container's `/sys/class`, or why there is none to mount upon.
    fn class(&self) -> Result<Place, String> {
        let find = |place: &Place, name| match place.find(name, Kind::Directory) {
            Ok(Some(found)) => Ok(found),
            Ok(None) => Err("the container has none".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        let sys = find(&self.root, "sys")?;
        let is_sysfs = |place: &Place| rustix::fs::fstatfs(&place.fd).is_ok_and(|found| found.f_type == SYSFS);
        if !is_sysfs(&sys) {
            return Err("/sys in the container is not mounted, or a volume".into());
        }
        let class = find(&sys, "class")?;
        if !is_sysfs(&class) {
            return Err("/sys/class in the container is a volume".into());
        }
        match Mountinfo::read() {
            Ok(mounts) if mounts.is_shared(class.mount) => {
                Err("/sys in the container is shared with the host, which would see it, too; set its propagation to private".into())
            }
            Ok(_) => Ok(class),
            Err(error) => Err(format!("mountinfo: {error}")),
        }
    }
}

/// What is mounted in `/sys/class`, or upon it.
enum Classes {
    /// Each upon one class.
    Over(Vec<(Place, OwnedFd)>),
    /// One upon all, and what is mounted in it, by name.
    Around(OwnedFd, Vec<(String, OwnedFd)>),
}

fn over(class: &Place, theirs: &[&String], views: &Views<'_>) -> io::Result<Classes> {
    let mut mounts = Vec::new();
    for name in theirs {
        let found = class.find(name, Kind::Directory).map_err(io::Error::other)?;
        if let Some(place) = found {
            mounts.push((place, views.class(name)?));
        }
    }
    Ok(Classes::Over(mounts))
}

fn around(class: &Place, others: &[&String], shown: &Shown, views: &Views<'_>) -> io::Result<Classes> {
    let classes = shown.tree.classes()?;
    let mut trees = Vec::new();
    for name in others {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = match rustix::fs::openat(&class.fd, name.as_str(), flags, Mode::empty()) {
            // A module was unloaded.
            Err(rustix::io::Errno::NOENT) => continue,
            result => result?,
        };
        // Kernels of old have links to other directories among the classes.
        if FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode) == FileType::Symlink {
            let target = rustix::fs::readlinkat(&found, "", Vec::new())?;
            rustix::fs::symlinkat(target, &classes, name.as_str())?;
            continue;
        }
        rustix::fs::mkdirat(&classes, name.as_str(), Mode::from_raw_mode(0o755))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | OpenTreeFlags::AT_RECURSIVE;
        trees.push(((*name).clone(), rustix::mount::open_tree(&found, "", flags)?));
    }
    Ok(Classes::Around(views.classes()?, trees))
}

/// The directories of `/sys/devices` that hold the devices of the classes `theirs` in the container, each once: where those would be
/// found who look from a network interface or a card.
fn devices(root: &Place, class: &Place, theirs: &[&String]) -> Vec<Place> {
    let mut found = Vec::<(Place, (u64, u64))>::new();
    let Ok(Some(sys)) = root.find("sys", Kind::Directory) else { return Vec::new() };
    for name in theirs {
        let Ok(Some(directory)) = class.find(name, Kind::Directory) else { continue };
        for device in directory.names(MAX_DEVICES).unwrap_or_default() {
            let Ok(link) = rustix::fs::readlinkat(&directory.fd, device.as_str(), Vec::new()) else { continue };
            let Some(place) = link.to_str().ok().and_then(|link| holder(&sys, link, name)) else { continue };
            match place.inode() {
                Ok(inode) if found.len() < MAX_DEVICES && found.iter().all(|(_, other)| *other != inode) => {
                    found.push((place, inode));
                }
                _ => {}
            }
        }
    }
    found.into_iter().map(|(place, _)| place).collect()
}

/// What holds the device of the class `class` to which `link` leads from there.
fn holder(sys: &Place, link: &str, class: &str) -> Option<Place> {
    let (holder, _device) = link.strip_prefix("../../")?.rsplit_once('/')?;
    // Nothing else of a card is hidden with it.
    if !holder.ends_with(&format!("/{class}")) {
        return None;
    }
    let mut place = None;
    for name in holder.split('/').take(MAX_DEPTH) {
        place = Some(place.as_ref().unwrap_or(sys).find(name, Kind::Directory).ok()??);
    }
    place
}

/// Attaches `tree` at `name` in the mount `directory`, which is attached itself.
fn put(tree: &OwnedFd, directory: &OwnedFd, name: &str) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, "", directory, name, flags)?)
}
