//! A container's root file system, by descriptors only.
//!
//! Every path in it was written by the image's author or by a volume's other users, while we work if they are quick. So no
//! path is resolved twice, no symbolic link is followed to where something is made, and what is mounted upon is the very inode
//! that was checked. The image's own libraries are found over links ([`Place::follow`]), which the kernel keeps within the root
//! file system.

use crate::mountinfo::descriptor_path;
use crate::sys;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// How often a path is looked up while somebody else renames parts of it.
const TRIES: usize = 16;

/// Why a place in the container cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error(
        "{path} in the container is or contains a symbolic link, through which nothing is mounted; replace it in the image"
    )]
    Symlink { path: String },
    #[error("{path} in the container is a {found}, but must be a {needed}; change it in the image")]
    WrongType { path: String, found: &'static str, needed: &'static str },
    #[error("{path} in the container: {error}")]
    System { path: String, error: io::Error },
}

impl Error {
    /// Whether nothing can be created there.
    pub fn is_read_only(&self) -> bool {
        matches!(self, Self::System { error, .. } if error.raw_os_error() == Some(libc::EROFS))
    }
}

/// What can be mounted upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    Directory,
    /// A device node, which is never made here.
    Device,
}

impl Kind {
    fn file_type(self) -> FileType {
        match self {
            Self::File => FileType::RegularFile,
            Self::Directory => FileType::Directory,
            Self::Device => FileType::CharacterDevice,
        }
    }
}

/// An opened place in the container.
pub struct Place {
    pub fd: OwnedFd,
    /// The mount that it is on.
    pub mount: u64,
    /// Whether it is the root of that mount.
    pub is_mount_root: bool,
    /// Its path in the container, for messages and for [`crate::record`]; relative.
    pub path: String,
}

impl Place {
    /// The root file system, in the mount namespace that we are in.
    pub fn root(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Self::examine(rustix::fs::open(path, flags, Mode::empty())?, String::new())
    }

    fn examine(fd: OwnedFd, path: String) -> io::Result<Self> {
        let found = rustix::fs::statx(&fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
        if found.stx_mask & StatxFlags::MNT_ID.bits() == 0
            || !found.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT)
        {
            return Err(io::Error::other("the kernel does not tell mounts apart; Linux 5.8 or later is needed"));
        }
        let is_mount_root = found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        Ok(Self { fd, mount: found.stx_mnt_id, is_mount_root, path })
    }

    /// What `name` in this directory is; `None` if there is nothing.
    pub fn find(&self, name: &str, kind: Kind) -> Result<Option<Self>, Error> {
        let path = self.path_of(name);
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let system = |error: Errno| Error::System { path: self.shown(name), error: error.into() };
        let fd = loop {
            match rustix::fs::openat2(&self.fd, name, flags, Mode::empty(), resolve) {
                Ok(fd) => break fd,
                Err(Errno::NOENT) => return Ok(None),
                Err(Errno::LOOP) => return Err(Error::Symlink { path: self.shown(name) }),
                // The kernel asks to try again when a rename elsewhere raced with the lookup.
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(system(error)),
            }
        };
        let found = FileType::from_raw_mode(rustix::fs::fstat(&fd).map_err(system)?.st_mode);
        let needed = kind.file_type();
        if found == FileType::Symlink {
            return Err(Error::Symlink { path: self.shown(name) });
        }
        if found != needed {
            let (found, needed) = (type_name(found), type_name(needed));
            return Err(Error::WrongType { path: self.shown(name), found, needed });
        }
        Self::examine(fd, path).map(Some).map_err(|error| Error::System { path: self.shown(name), error })
    }

    /// What `path` leads to, over symbolic links too, all taken to be within this directory and its own mount: a volume is none
    /// of it. `None` for nothing, and for what is not of `kind`.
    pub fn follow(&self, path: &str, kind: Kind) -> Option<Self> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let mut tries = (0..TRIES).map(|_| rustix::fs::openat2(&self.fd, path, flags, Mode::empty(), resolve));
        let fd = tries.find(|result| !matches!(result, Err(Errno::AGAIN | Errno::INTR)))?.ok()?;
        let found = FileType::from_raw_mode(rustix::fs::fstat(&fd).ok()?.st_mode);
        let place = Self::examine(fd, path.trim_start_matches('/').to_owned()).ok()?;
        (found == kind.file_type() && place.mount == self.mount).then_some(place)
    }

    /// The names in this directory, `most` of them at most.
    pub fn names(&self, most: usize) -> io::Result<Vec<String>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(descriptor_path(&self.fd), flags, Mode::empty())?;
        let entries = rustix::fs::Dir::new(directory)?.take(most).filter_map(Result::ok);
        Ok(entries.filter_map(|entry| entry.file_name().to_str().ok().map(str::to_owned)).collect())
    }

    /// All of this regular file, unless it has more than `most` bytes.
    pub fn read(&self, most: usize) -> io::Result<Vec<u8>> {
        // The descriptor cannot be read from; what it stands for was checked to be a regular file. Who has a lease on it is not
        // waited for.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(descriptor_path(&self.fd), flags, Mode::empty())?);
        let mut bytes = Vec::new();
        file.take(most as u64 + 1).read_to_end(&mut bytes)?;
        let message = || io::Error::new(io::ErrorKind::FileTooLarge, format!("it exceeds {most} bytes; shorten it"));
        if bytes.len() > most { Err(message()) } else { Ok(bytes) }
    }

    /// Its file system's and its own number, which no other file has.
    pub fn inode(&self) -> io::Result<(u64, u64)> {
        let found = rustix::fs::fstat(&self.fd)?;
        Ok((found.st_dev, found.st_ino))
    }

    /// Makes `name` here, empty, and opens it. If another container of the same root file system was quicker, it is as if
    /// found.
    ///
    /// It is made as the owner of this directory: in a user namespace's file system host root does not exist, and elsewhere
    /// nothing is gained by being root.
    pub fn make(&self, name: &str, kind: Kind) -> Result<Self, Error> {
        let system = |error: io::Error| Error::System { path: self.shown(name), error };
        let owner = rustix::fs::fstat(&self.fd).map_err(|error| system(error.into()))?;
        let result = match as_owner(owner.st_uid, owner.st_gid, || self.create(name, kind)) {
            Err(Errno::PERM | Errno::ACCESS | Errno::OVERFLOW) if owner.st_uid != 0 => self.create(name, kind),
            result => result,
        };
        match result {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(system(error.into())),
        }
        let gone = || system(io::Error::other("it vanished while the container was being made"));
        self.find(name, kind)?.ok_or_else(gone)
    }

    fn create(&self, name: &str, kind: Kind) -> Result<(), Errno> {
        match kind {
            Kind::Directory => rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(0o755)),
            Kind::File => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                rustix::fs::openat(&self.fd, name, flags, Mode::from_raw_mode(0o644)).map(drop)
            }
            Kind::Device => Err(Errno::OPNOTSUPP),
        }
    }

    /// Removes `name` here if it is still the empty mount point of `kind` that we made.
    pub fn remove_empty(&self, name: &str, kind: Kind) -> io::Result<()> {
        let found = match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            result => result?,
        };
        let flags = match (kind, FileType::from_raw_mode(found.st_mode)) {
            (Kind::File, FileType::RegularFile) if found.st_size == 0 => AtFlags::empty(),
            (Kind::Directory, FileType::Directory) => AtFlags::REMOVEDIR,
            _ => return Ok(()),
        };
        match rustix::fs::unlinkat(&self.fd, name, flags) {
            Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Mounts the detached `tree` here.
    pub fn attach(&self, tree: impl AsFd) -> Result<(), Error> {
        use rustix::mount::MoveMountFlags as Flags;
        let flags = Flags::MOVE_MOUNT_F_EMPTY_PATH | Flags::MOVE_MOUNT_T_EMPTY_PATH;
        rustix::mount::move_mount(tree, "", &self.fd, "", flags)
            .map_err(|error| Error::System { path: self.shown(""), error: error.into() })
    }

    /// Whether this is a tmpfs of its own.
    pub fn is_own_tmpfs(&self, root: &Self) -> io::Result<bool> {
        let tmpfs = rustix::fs::fstatfs(&self.fd)?.f_type == libc::TMPFS_MAGIC;
        Ok(tmpfs && self.is_mount_root && self.mount != root.mount)
    }

    /// The number of its file system.
    pub fn device(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.fd)?.st_dev)
    }

    fn path_of(&self, name: &str) -> String {
        match (self.path.is_empty(), name.is_empty()) {
            (true, _) => name.to_owned(),
            (_, true) => self.path.clone(),
            _ => format!("{}/{name}", self.path),
        }
    }

    fn shown(&self, name: &str) -> String {
        format!("/{}", self.path_of(name))
    }
}

fn as_owner<T>(uid: u32, gid: u32, action: impl FnOnce() -> T) -> T {
    let (uid, gid) = sys::set_file_owner(uid, gid);
    let result = action();
    sys::set_file_owner(uid, gid);
    result
}

fn type_name(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "regular file",
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        FileType::Fifo => "FIFO",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::Unknown => "file of unknown type",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn place() -> (tempfile::TempDir, Place) {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::root(directory.path()).unwrap();
        (directory, place)
    }

    #[test]
    fn only_the_needed_type_is_found() {
        let (directory, root) = place();
        let path = directory.path();
        std::fs::write(path.join("file"), "").unwrap();
        std::fs::create_dir(path.join("directory")).unwrap();
        symlink("file", path.join("link")).unwrap();
        symlink("/nowhere", path.join("dangling")).unwrap();
        assert!(root.find("missing", Kind::File).unwrap().is_none());
        assert!(root.find("file", Kind::File).unwrap().is_some());
        assert!(matches!(root.find("file", Kind::Directory), Err(Error::WrongType { .. })));
        assert!(matches!(root.find("directory", Kind::File), Err(Error::WrongType { .. })));
        assert!(matches!(root.find("link", Kind::File), Err(Error::Symlink { .. })));
        assert!(matches!(root.find("dangling", Kind::File), Err(Error::Symlink { .. })));
    }

    #[test]
    fn making_never_follows_or_replaces() {
        let (directory, root) = place();
        let outside = tempfile::tempdir().unwrap();
        symlink(outside.path().join("x"), directory.path().join("link")).unwrap();
        assert!(root.make("link", Kind::File).is_err());
        assert!(root.make("link", Kind::Directory).is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        let made = root.make("etc", Kind::Directory).unwrap().make("ld.so.preload", Kind::File).unwrap();
        assert_eq!(made.path, "etc/ld.so.preload");
        assert!(root.make("etc", Kind::Directory).is_ok());
        assert!(root.make("etc", Kind::File).is_err());
    }

    #[test]
    fn only_empty_mount_points_are_removed() {
        let (directory, root) = place();
        let path = directory.path();
        for (name, content) in [("empty", ""), ("full", "x")] {
            std::fs::write(path.join(name), content).unwrap();
            std::fs::create_dir(path.join(format!("{name}-directory"))).unwrap();
        }
        std::fs::write(path.join("full-directory/x"), "").unwrap();
        symlink("empty", path.join("link")).unwrap();
        for name in ["empty", "full", "link", "missing", "empty-directory"] {
            root.remove_empty(name, Kind::File).unwrap();
        }
        for name in ["empty-directory", "full-directory", "full"] {
            root.remove_empty(name, Kind::Directory).unwrap();
        }
        let mut left: Vec<_> = std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["full", "full-directory", "link"]);
    }
}
