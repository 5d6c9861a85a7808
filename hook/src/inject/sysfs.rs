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
use crate::rdma_cm;
use crate::rootfs::{Kind, Place};
use crate::session;
use crate::sys;
use crate::sysfs::{NODE, Tree};
use ringfence_proxy::sysfs::{DEVICES, PLACEHOLDER, VERBS};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

/// `SYSFS_MAGIC` of `<linux/magic.h>`.
const SYSFS: i64 = 0x6265_6572;
/// Classes of one kernel; it has some eighty.
const MAX_CLASSES: usize = 1024;
/// Devices of all classes of InfiniBand's that are hidden; what there is beyond that is hidden in the classes alone.
const MAX_DEVICES: usize = 1024;
/// Bytes of a class's file.
const MAX_FILE: usize = 4096;
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
    ///
    /// `rdma_cm`: a node that is to be beside it in `/dev/infiniband`.
    pub(super) fn sysfs(
        &mut self,
        dev: &Place,
        scratch: &Place,
        shown: &Shown,
        rdma_cm: Option<&OwnedFd>,
    ) -> Result<Option<String>, Failure> {
        match self.kernels_own() {
            Ok(sys) => self.show(Some(&sys), dev, scratch, shown, rdma_cm).map(|()| None),
            Err(why) => {
                self.show(None, dev, scratch, shown, rdma_cm)?;
                Ok(Some(format!("programs find no device in /sys/class: {why}")))
            }
        }
    }

    /// Attaches it to `sys`, if that can be, and to `/dev/infiniband`.
    fn show(
        &mut self,
        sys: Option<&Sys>,
        dev: &Place,
        scratch: &Place,
        shown: &Shown,
        rdma_cm: Option<&OwnedFd>,
    ) -> Result<(), Failure> {
        let directory = self.directory(Some(dev), "infiniband")?;
        self.refuse_shared(&directory)?;
        self.refuse_shared(scratch)?;
        let what = || "cannot show the device in the container's /sys".into();
        let holders = sys.map(|sys| sys.holders(&[])).unwrap_or_default();
        let mounts = shown.tree.views(scratch, |views| {
            let Some(sys) = sys else { return Ok((views.dev()?, Vec::new(), None)) };
            let mut over = Vec::new();
            for place in &holders {
                over.push((place, views.nothing()?));
            }
            if !sys.has_both() {
                sys.make_places(&shown.tree)?;
                return Ok((views.dev()?, over, Some(views.classes()?)));
            }
            for (name, place) in &sys.theirs {
                over.push((place, views.class(name)?));
            }
            Ok((views.dev()?, over, None))
        });
        let (nodes, over, classes) = mounts.during(Code::Injection, what)?;
        directory.attach(&nodes)?;
        for (node, name) in [(shown.node.as_ref(), NODE), (rdma_cm, rdma_cm::NAME)] {
            node.map_or(Ok(()), |node| put(node, &nodes, name)).during(Code::Injection, what)?;
        }
        over.iter().try_for_each(|(place, mount)| place.attach(mount))?;
        if let Some((sys, classes)) = sys.zip(classes) {
            sys.cover(&classes).during(Code::Injection, what)?;
        }
        Ok(())
    }

    /// Has `/sys` show of all cards `seen` alone, each with its class; by `tree`, which is empty. `dev` is used for a moment. Answers why
    /// it cannot, if so: then the others are seen, and cannot be opened.
    pub(super) fn only(
        &mut self,
        dev: &Place,
        tree: &Tree,
        seen: &[(String, String)],
    ) -> Result<Option<String>, Failure> {
        let sys = match self.kernels_own() {
            Ok(sys) => sys,
            Err(why) => return Ok(Some(format!("other cards are seen in /sys/class: {why}"))),
        };
        self.only_of(&sys, dev, tree, seen).map(|()| None)
    }

    fn only_of(&mut self, sys: &Sys, dev: &Place, tree: &Tree, seen: &[(String, String)]) -> Result<(), Failure> {
        if sys.theirs.is_empty() {
            return Ok(());
        }
        let scratch = self.directory(Some(dev), "infiniband")?;
        self.refuse_shared(&scratch)?;
        let what = || "cannot hide other cards in the container's /sys".into();
        sys.copy(tree, seen).during(Code::Injection, what)?;
        let holders = sys.holders(seen);
        let mounts = tree.views(&scratch, |views| {
            let mut over = Vec::new();
            for place in &holders {
                over.push((place, views.nothing()?));
            }
            for (name, place) in &sys.theirs {
                over.push((place, views.made(name)?));
            }
            Ok(over)
        });
        mounts.during(Code::Injection, what)?.iter().try_for_each(|(place, mount)| place.attach(mount))?;
        Ok(())
    }

    /// The container's `/sys`, or why there is none to mount upon.
    fn kernels_own(&self) -> Result<Sys, String> {
        let find = |place: &Place, name| match place.find(name, Kind::Directory) {
            Ok(Some(found)) => Ok(found),
            Ok(None) => Err(format!("the container has no {name}")),
            Err(error) => Err(error.to_string()),
        };
        let is_sysfs = |place: &Place| rustix::fs::fstatfs(&place.fd).is_ok_and(|found| found.f_type == SYSFS);
        let root = find(&self.root, "sys")?;
        if !is_sysfs(&root) {
            return Err("/sys in the container is not mounted, or a volume".into());
        }
        let class = find(&root, "class")?;
        if !is_sysfs(&class) {
            return Err("/sys/class in the container is a volume".into());
        }
        let sys = Sys::new(root, class)?;
        let mounts = Mountinfo::read().map_err(|error| format!("mountinfo: {error}"))?;
        let shared = sys.mounted_upon().find(|place| mounts.is_shared(place.mount)).map(|place| &place.path);
        if let Some(path) = shared {
            return Err(format!(
                "/{path} in the container is shared with the host, which would see ours; set its propagation to private or slave"
            ));
        }
        Ok(sys)
    }
}

/// A `/sys` of the kernel's.
struct Sys {
    root: Place,
    class: Place,
    /// The host's classes of InfiniBand's.
    theirs: Vec<(String, Place)>,
    /// The names of the others.
    others: Vec<String>,
}

impl Sys {
    fn new(root: Place, class: Place) -> Result<Self, String> {
        let (mut theirs, mut others) = (Vec::new(), Vec::new());
        for name in class.names(MAX_CLASSES).map_err(|error| format!("/{}: {error}", class.path))? {
            if !name.starts_with(DEVICES) {
                others.extend(Some(name).filter(|name| !name.starts_with('.')));
            } else if let Some(place) = class.find(&name, Kind::Directory).map_err(|error| error.to_string())? {
                theirs.push((name, place));
            }
        }
        Ok(Self { root, class, theirs, others })
    }

    fn has_both(&self) -> bool {
        [DEVICES, VERBS].iter().all(|class| self.theirs.iter().any(|(name, _)| name == class))
    }

    /// All upon which something may be mounted; volumes may be among them.
    fn mounted_upon(&self) -> impl Iterator<Item = &Place> {
        [&self.root, &self.class].into_iter().chain(self.theirs.iter().map(|(_, place)| place))
    }

    /// The directories of `/sys/devices` that hold devices of those classes, each once: who looks from a network interface or a
    /// card finds them there. Not those that hold one of `kept`, each with its class.
    fn holders(&self, kept: &[(String, String)]) -> Vec<Place> {
        let mut found = Vec::<(Place, (u64, u64))>::new();
        let mut spared = Vec::new();
        for (class, directory) in &self.theirs {
            for device in directory.names(MAX_DEVICES).unwrap_or_default() {
                let Ok(link) = rustix::fs::readlinkat(&directory.fd, device.as_str(), Vec::new()) else { continue };
                let Some(place) = link.to_str().ok().and_then(|link| self.holder(link, class)) else { continue };
                match place.inode() {
                    Ok(inode) if kept.iter().any(|(of, name)| (of, name) == (class, &device)) => spared.push(inode),
                    Ok(inode) if found.len() < MAX_DEVICES && found.iter().all(|(_, other)| *other != inode) => {
                        found.push((place, inode));
                    }
                    _ => {}
                }
            }
        }
        found.into_iter().filter(|(_, inode)| !spared.contains(inode)).map(|(place, _)| place).collect()
    }

    /// What holds the device to which `link` leads from the class `class`.
    fn holder(&self, link: &str, class: &str) -> Option<Place> {
        let (holder, _device) = link.strip_prefix("../../")?.rsplit_once('/')?;
        // Nothing else of a card is hidden with it.
        let (_, name) = holder.rsplit_once('/')?;
        if name != class || holder.split('/').count() > MAX_DEPTH {
            return None;
        }
        let mut place = None;
        for name in holder.split('/') {
            place = Some(place.as_ref().unwrap_or(&self.root).find(name, Kind::Directory).ok()??);
        }
        place.filter(|place| place.mount == self.root.mount)
    }

    /// Makes in `tree` what those classes have of `seen`, and their files, such as the version of an interface.
    fn copy(&self, tree: &Tree, seen: &[(String, String)]) -> io::Result<()> {
        let classes = tree.classes()?;
        for (class, directory) in &self.theirs {
            match rustix::fs::mkdirat(&classes, class.as_str(), Mode::from_raw_mode(0o755)) {
                Err(Errno::EXIST) => {}
                result => result?,
            }
            for name in directory.names(MAX_DEVICES)? {
                let path = format!("{class}/{name}");
                if let Ok(link) = rustix::fs::readlinkat(&directory.fd, name.as_str(), Vec::new()) {
                    if seen.iter().any(|(of, card)| (of, card) == (class, &name)) {
                        rustix::fs::symlinkat(link, &classes, path)?;
                    }
                } else if let Ok(Some(file)) = directory.find(&name, Kind::File) {
                    let text = file.read(MAX_FILE)?;
                    session::create(&classes, &path, 0o444)?.write_all(&text)?;
                }
            }
        }
        Ok(())
    }

    /// Makes a place for each of the other classes in `tree`.
    fn make_places(&self, tree: &Tree) -> io::Result<()> {
        let classes = tree.classes()?;
        for name in &self.others {
            // Kernels of old have links to other directories among the classes.
            match rustix::fs::readlinkat(&self.class.fd, name.as_str(), Vec::new()) {
                Ok(target) => rustix::fs::symlinkat(target, &classes, name.as_str())?,
                Err(_) => rustix::fs::mkdirat(&classes, name.as_str(), Mode::from_raw_mode(0o755))?,
            }
        }
        Ok(())
    }

    /// Mounts `classes` upon all classes, and in it each of the others again, with what is mounted there. Our descriptor leads to
    /// what is below.
    fn cover(&self, classes: &OwnedFd) -> io::Result<()> {
        self.class.attach(classes).map_err(io::Error::other)?;
        for name in &self.others {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let found = match rustix::fs::openat(&self.class.fd, name.as_str(), flags, Mode::empty()) {
                // A module was unloaded; or it is a link.
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                result => result?,
            };
            let flags = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_EMPTY_PATH
                | OpenTreeFlags::AT_RECURSIVE;
            put(&rustix::mount::open_tree(&found, "", flags)?, classes, name)?;
        }
        Ok(())
    }
}

/// Attaches `tree` at `name` in the mount `directory`, which is attached itself.
fn put(tree: &OwnedFd, directory: &OwnedFd, name: &str) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, "", directory, name, flags)?)
}

#[cfg(test)]
mod tests;
