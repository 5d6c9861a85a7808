//! Puts the library, the socket's directory, `/etc/ld.so.preload` or device nodes into a container that is being made.
//!
//! [`library`] says where the library goes.
//!
//! Sources are detached mounts, cloned in the host's mount namespace and made read-only there; they are attached in the
//! container's, to inodes that were checked. No path of the host is resolved in the container's namespace but that of its
//! root file system, and none of the container's on the host.

mod library;
mod sysfs;

pub use sysfs::Shown;

use crate::failure::{Code, During, Failure};
use crate::mountinfo::Mountinfo;
use crate::rdma_cm;
use crate::record::MountPoint;
use crate::rootfs::{Error, Kind, Place};
use crate::session::Session;
use crate::sys;
use crate::sysfs::Tree;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::mount::OpenTreeFlags;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Directories whose file systems belong to the host, also when a container sees them at its `/dev`.
const HOST_TMPFS: [&str; 4] = ["/dev", "/dev/shm", "/run", "/tmp"];

/// The container, as far as injection needs it.
pub struct Container {
    /// Its mount namespace.
    pub mount_namespace: OwnedFd,
    /// Its root file system.
    pub root: PathBuf,
    /// Whether its mounts may be seen elsewhere.
    pub shares_mounts: bool,
    /// Where its programs are told to look for libraries first.
    pub library_path: Vec<String>,
}

/// What a container gets, as detached mounts. Made in the host's mount namespace.
pub enum Sources {
    /// For a proxy.
    Proxied(Box<Proxied>),
    /// For mode passthrough.
    Passthrough(Passthrough),
}

/// Device nodes, and what `/sys` shows of their cards.
pub struct Passthrough {
    /// By their path under `/dev`.
    nodes: Vec<(String, OwnedFd)>,
    /// An empty file system for it, and what is to be seen, each with its class; if others are to be hidden.
    only: Option<(Tree, Vec<(String, String)>)>,
}

/// The sources for a proxy.
pub struct Proxied {
    /// The socket's directory, and its name under `/dev`.
    socket: (OwnedFd, String),
    /// The library's directory, and the same to be written to.
    directory: (OwnedFd, OwnedFd),
    library: OwnedFd,
    /// The node of `/dev/userfaultfd`.
    userfaultfd: Option<OwnedFd>,
    /// What `/sys` shows.
    shown: Option<Shown>,
    /// The node of the kernel's connection manager.
    rdma_cm: Option<OwnedFd>,
}

/// Device nodes that a container with a proxy may have.
#[derive(Clone, Copy, Default)]
pub struct Nodes<'a> {
    /// That of `/dev/userfaultfd`.
    pub userfaultfd: Option<&'a OwnedFd>,
    /// That of the kernel's connection manager.
    pub rdma_cm: Option<&'a OwnedFd>,
}

/// Notes a mount point that is about to be made in the container's root file system.
pub type Note<'a> = &'a mut dyn FnMut(MountPoint) -> io::Result<()>;

impl Sources {
    /// What a proxied container gets, with these nodes, and with the device in `/sys` or without.
    pub fn proxied(
        session: &Session,
        config: &crate::config::Inject,
        nodes: Nodes<'_>,
        tree: Option<Tree>,
    ) -> Result<Self, Failure> {
        let own = |what: &str| format!("cannot prepare {what} of {}", session.path().display());
        let socket = clone(&session.mount, sys::NO_EXEC).during(Code::Injection, || own("mount"))?;
        let directory = clone(&session.library, 0).during(Code::Injection, || own("library"))?;
        let writable = session.library.try_clone().during(Code::Injection, || own("library"))?;
        let prepare = |node: Option<&OwnedFd>, name: &str| {
            node.map(|node| device(node).during(Code::Injection, || own(name))).transpose()
        };
        Ok(Self::Proxied(Box::new(Proxied {
            socket: (socket, config.directory_name().to_owned()),
            directory: (directory, writable),
            library: library(&config.library)?,
            userfaultfd: prepare(nodes.userfaultfd, "userfaultfd")?,
            rdma_cm: prepare(nodes.rdma_cm, rdma_cm::NAME)?,
            shown: tree.map(|tree| Shown::new(tree, config.has_node())).transpose()?,
        })))
    }

    /// The device nodes `nodes`; and of all cards in `/sys` what `only` says.
    pub fn passthrough(
        nodes: &[(PathBuf, OwnedFd)],
        only: Option<(Tree, Vec<(String, String)>)>,
    ) -> Result<Self, Failure> {
        let trees = nodes.iter().map(|(path, node)| {
            let name = path.strip_prefix("/dev").ok().and_then(Path::to_str).ok_or_else(|| {
                Failure::new(Code::Config, format!("device node {} is not a path under /dev", path.display()))
            })?;
            let tree =
                device(node).during(Code::Injection, || format!("cannot prepare device node {}", path.display()))?;
            Ok((name.to_owned(), tree))
        });
        let nodes = trees.collect::<Result<_, Failure>>()?;
        Ok(Self::Passthrough(Passthrough { nodes, only }))
    }
}

fn library(path: &Path) -> Result<OwnedFd, Failure> {
    let what = || format!("preload library {} (inject.library)", path.display());
    let file = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).during(Code::Injection, what)?;
    let found = rustix::fs::fstat(&file).during(Code::Injection, what)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
        return Err(Failure::new(Code::Injection, format!("{} is not a regular file", what())));
    }
    clone(&file, 0).during(Code::Injection, what)
}

/// A detached, read-only mount of the inode `source`.
pub fn clone(source: impl AsFd, also: u64) -> io::Result<OwnedFd> {
    let tree = detach(source)?;
    sys::set_mount_attributes(tree.as_fd(), sys::READ_ONLY | sys::NO_SUID | sys::NO_DEV | also)?;
    Ok(tree)
}

/// A detached mount of the device node `source`. Opening it is what it is for, so it cannot be read-only or without devices, as
/// run-time directories are.
fn device(source: impl AsFd) -> io::Result<OwnedFd> {
    let tree = detach(source)?;
    match sys::change_mount_attributes(tree.as_fd(), sys::NO_SUID | sys::NO_EXEC, sys::NO_DEV) {
        // Without root in the host's user namespace what is there stays.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            sys::set_mount_attributes(tree.as_fd(), sys::NO_SUID | sys::NO_EXEC)?;
        }
        result => result?,
    }
    Ok(tree)
}

fn detach(source: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(rustix::mount::open_tree(source, "", flags)?)
}

/// Attaches `sources` in `container`. `note` hears of every mount point that will outlive the container's mounts. Answers what
/// could not be had, one line each.
pub fn inject(container: &Container, sources: Sources, note: Note<'_>) -> Result<Vec<String>, Failure> {
    let host_devices: Vec<u64> =
        HOST_TMPFS.iter().filter_map(|path| rustix::fs::stat(*path).ok()).map(|found| found.st_dev).collect();
    let host_root = rustix::fs::stat("/").during(Code::Internal, || "/".into())?;
    let _inside = Inside::enter(&container.mount_namespace)?;

    let shown = container.root.display();
    let root = match Place::root(&container.root) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let message = format!(
                "root file system {shown} is not there for the container's init; runtimes with a sandbox or a virtual machine \
                 of their own (gVisor's runsc, Kata) cannot give containers RDMA: use runc or crun"
            );
            return Err(Failure::new(Code::Injection, message));
        }
        result => result.during(Code::Injection, || format!("root file system {shown}"))?,
    };
    let found = rustix::fs::fstat(&root.fd).during(Code::Injection, || format!("root file system {shown}"))?;
    if !root.is_mount_root || (found.st_dev, found.st_ino) == (host_root.st_dev, host_root.st_ino) {
        return Err(Failure::new(
            Code::Injection,
            format!(
                "root file system {shown} is not a mount of the container's own; ringfence-hook must run as createRuntime or prestart hook"
            ),
        ));
    }
    let mut injection = Injection { root, host_devices, dev_tmpfs: None, shares_mounts: container.shares_mounts, note };
    match sources {
        Sources::Proxied(sources) => injection.proxied(*sources, &container.library_path),
        Sources::Passthrough(sources) => injection.passthrough(sources),
    }
}

/// Being in the container's mount namespace; dropping it leads back.
struct Inside {
    host: OwnedFd,
}

impl Inside {
    fn enter(namespace: &OwnedFd) -> Result<Self, Failure> {
        let host = rustix::fs::open("/proc/self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .during(Code::Injection, || "/proc/self/ns/mnt".into())?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
            .during(Code::Injection, || "cannot enter the container's mount namespace".into())?;
        Ok(Self { host })
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        if move_into_link_name_space(self.host.as_fd(), Some(LinkNameSpaceType::Mount)).is_err() {
            // Whatever followed would take the container's files for the host's.
            std::process::abort();
        }
    }
}

struct Injection<'a> {
    root: Place,
    host_devices: Vec<u64>,
    /// The mount at `/dev`, once it is known to be the container's own.
    dev_tmpfs: Option<u64>,
    shares_mounts: bool,
    note: Note<'a>,
}

impl Injection<'_> {
    fn passthrough(&mut self, sources: Passthrough) -> Result<Vec<String>, Failure> {
        let dev = self.dev()?;
        for (path, tree) in sources.nodes {
            let (parents, name) = path.rsplit_once('/').map_or((None, path.as_str()), |(a, b)| (Some(a), b));
            let mut directory = None;
            for parent in parents.into_iter().flat_map(|parents| parents.split('/')) {
                directory = Some(self.directory(Some(directory.as_ref().unwrap_or(&dev)), parent)?);
            }
            let directory = directory.as_ref().unwrap_or(&dev);
            let place = self.file(directory, name)?;
            self.attach(&place, &tree)?;
        }
        let why = sources.only.map_or(Ok(None), |(tree, seen)| self.only(&dev, &tree, &seen))?;
        Ok(why.into_iter().collect())
    }

    /// `/dev`, if something may be created there: in a tmpfs that the runtime mounted for this container, or in the root file
    /// system itself, but never in the host's own `/dev` bound into the container.
    fn dev(&mut self) -> Result<Place, Failure> {
        let dev = self.directory(None, "dev")?;
        if dev.mount == self.root.mount {
            return Ok(dev);
        }
        let own = dev.is_own_tmpfs(&self.root).and_then(|own| Ok(own && !self.host_devices.contains(&dev.device()?)));
        if !own.during(Code::Injection, || "/dev in the container".into())? {
            return Err(Failure::new(
                Code::Injection,
                "/dev in the container is a volume or the host's /dev, where nothing is created; \
                 start the container without mounting something at /dev",
            ));
        }
        self.dev_tmpfs = Some(dev.mount);
        Ok(dev)
    }

    /// The directory `name` in `parent` or the root, made if missing.
    fn directory(&mut self, parent: Option<&Place>, name: &str) -> Result<Place, MakeError> {
        let parent = parent.unwrap_or(&self.root);
        match parent.find(name, Kind::Directory)? {
            Some(place) => Ok(place),
            None => make(parent, name, Kind::Directory, &self.root, self.note),
        }
    }

    /// The file `name` in `parent`, made if missing.
    fn file(&mut self, parent: &Place, name: &str) -> Result<Place, MakeError> {
        match parent.find(name, Kind::File)? {
            Some(place) => Ok(place),
            None => make(parent, name, Kind::File, &self.root, self.note),
        }
    }

    /// Mounts `tree` at `place`, unless the host would see it there, too.
    fn attach(&self, place: &Place, tree: &OwnedFd) -> Result<(), Failure> {
        self.refuse_shared(place)?;
        Ok(place.attach(tree)?)
    }

    /// The runtime made the container's root file system and its tmpfs private; only volumes, and all if asked for, may not be.
    fn refuse_shared(&self, place: &Place) -> Result<(), Failure> {
        let private = [Some(self.root.mount), self.dev_tmpfs].contains(&Some(place.mount)) && !self.shares_mounts;
        if !private && Mountinfo::read().during(Code::Injection, || "mountinfo".into())?.is_shared(place.mount) {
            let message = format!(
                "the mount at /{} in the container is shared with the host, which would see ours; \
                 set its propagation to private or slave",
                place.path
            );
            return Err(Failure::new(Code::Injection, message));
        }
        Ok(())
    }
}

/// Why a mount point could not be made.
enum MakeError {
    Place(Error),
    Note(io::Error),
}

impl From<Error> for MakeError {
    fn from(error: Error) -> Self {
        Self::Place(error)
    }
}

impl From<MakeError> for Failure {
    fn from(error: MakeError) -> Self {
        match error {
            MakeError::Place(error) => error.into(),
            MakeError::Note(error) => {
                Failure::new(Code::Internal, format!("cannot write the container's record: {error}"))
            }
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::new(Code::Injection, error.to_string())
    }
}

/// Makes a mount point. Those in the root file system outlive the container and are noted first.
fn make(parent: &Place, name: &str, kind: Kind, root: &Place, note: Note<'_>) -> Result<Place, MakeError> {
    if parent.mount == root.mount {
        let path = if parent.path.is_empty() { name.to_owned() } else { format!("{}/{name}", parent.path) };
        note(MountPoint { path, directory: kind == Kind::Directory }).map_err(MakeError::Note)?;
    }
    Ok(parent.make(name, kind)?)
}

/// Opens the host's node at `path`, a character device.
pub fn open_node(path: &Path) -> Result<OwnedFd, Failure> {
    let what = || format!("device node {}", path.display());
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let node = rustix::fs::open(path, flags, Mode::empty()).during(Code::Device, what)?;
    let found = rustix::fs::fstat(&node).during(Code::Device, what)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::CharacterDevice {
        return Err(Failure::new(Code::Device, format!("{} is not a character device", what())));
    }
    Ok(node)
}
