//! A container's directory on the host, `<run-dir>/containers/<id>`.
//!
//! ```text
//! <id>/                  0700
//!   launch.json          for the proxy
//!   counters             0600, the proxy makes it and counts there
//!   userfaultfd          0666, bound to the container's /dev
//!   mount/               0755, what the container sees at /dev/ringfence
//!     verbs.sock         0666, the proxy listens here
//!   library/             0755, what it sees at /etc/ld.so.ringfence
//!     libibverbs.so.1    empty, the library is bound over it; or that library without its name
//!     libibverbs.so      a link to it
//!     preload-like-libasan.so   another, see [`crate::preload_file`]
//!     ld.so.preload, …   bound over the container's
//! ```

use crate::failure::{Code, During, Failure};
use crate::preload_file;
use crate::trust;
use ringfence_launch::Launch;
use ringfence_launch::counters;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// The library's name in the container.
pub const LIBRARY: &str = "libibverbs.so.1";
/// Its name to compilers, and to programs that open it by that.
const DEVELOPERS: &str = "libibverbs.so";
/// The socket's name in the container.
const SOCKET: &str = "verbs.sock";
/// The proxy's orders' name on the host.
const LAUNCH: &str = "launch.json";

/// The directory of one container.
pub struct Session {
    path: PathBuf,
    directory: OwnedFd,
    /// `mount/`.
    pub mount: OwnedFd,
    /// `library/`.
    pub library: OwnedFd,
}

/// Opens the node's run-time directory.
pub fn open_run_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Makes the node's run-time directory, for root only, and opens it.
pub fn make_run_dir(path: &Path) -> Result<OwnedFd, Failure> {
    let what = || format!("run-dir {}", path.display());
    let directory = match open_run_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            private(true).create(path).and_then(|()| open_run_dir(path))
        }
        result => result,
    };
    let directory = directory.during(Code::Internal, what)?;
    // Who can write there can have the next hook mount and remove what he likes.
    let found = rustix::fs::fstat(&directory).during(Code::Internal, what)?;
    if found.st_uid != rustix::process::geteuid().as_raw() || found.st_mode & 0o022 != 0 {
        let (uid, mode) = (found.st_uid, found.st_mode & 0o7777);
        let message = format!("{} belongs to uid {uid} and has mode {mode:o}; chown it to root and chmod go-w", what());
        return Err(Failure::new(Code::Config, message));
    }
    Ok(directory)
}

fn private(recursive: bool) -> std::fs::DirBuilder {
    let mut builder = std::fs::DirBuilder::new();
    std::os::unix::fs::DirBuilderExt::mode(builder.recursive(recursive), 0o700);
    builder
}

impl Session {
    /// Makes the directory of `container`, which must not exist.
    pub fn make(run_dir: &Path, container: &str) -> io::Result<Self> {
        // The runtime's mask is no concern of the modes that clients and the proxy depend on.
        rustix::process::umask(Mode::empty());
        let path = directory(run_dir, container);
        let containers = path.parent().expect("it has two components more than run_dir");
        match private(false).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                private(true).create(containers)?;
                private(false).create(&path)?;
            }
            result => result?,
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&path, flags, Mode::empty())?;
        let below = |name: &str| -> io::Result<OwnedFd> {
            rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o755))?;
            Ok(rustix::fs::openat(&directory, name, flags, Mode::empty())?)
        };
        let (mount, library) = (below("mount")?, below("library")?);
        create(&library, LIBRARY, 0o755)?;
        rustix::fs::symlinkat(LIBRARY, &library, DEVELOPERS)?;
        rustix::fs::symlinkat(LIBRARY, &library, preload_file::NAME)?;
        Ok(Self { path, directory, mount, library })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The socket, bound and listening: a client that connects early waits for the proxy to accept.
    pub fn listen(&self) -> io::Result<OwnedFd> {
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // A socket's path has at most 107 bytes; this one is short wherever the directory is.
        let address = SocketAddrUnix::new(format!("/proc/self/fd/{}/{SOCKET}", self.mount.as_raw_fd()))?;
        rustix::net::bind(&socket, &address)?;
        rustix::fs::chmodat(&self.mount, SOCKET, Mode::from_raw_mode(0o666), AtFlags::empty())?;
        rustix::net::listen(&socket, 128)?;
        Ok(socket)
    }

    /// Writes the proxy's orders, and returns their path.
    pub fn write_launch(&self, launch: &Launch) -> io::Result<PathBuf> {
        create(&self.directory, LAUNCH, 0o600)?.write_all(&serde_json::to_vec_pretty(launch)?)?;
        Ok(self.path.join(LAUNCH))
    }

    /// A node for the character device `major:minor` that everybody may open, whatever the host's own has for its mode.
    pub fn make_node(&self, name: &str, major: u32, minor: u32) -> io::Result<OwnedFd> {
        let mode = Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(&self.directory, name, FileType::CharacterDevice, mode, rustix::fs::makedev(major, minor))?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.directory, name, flags, Mode::empty())?)
    }
}

/// Makes the file `name` in `directory` of a session.
pub fn create(directory: &OwnedFd, name: &str, mode: u32) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(mode))?.into())
}

/// Removes the directory of `container`, if there is one. A proxy that ends may be removing it, too.
pub fn remove(run_dir: &Path, container: &str) -> io::Result<()> {
    let path = directory(run_dir, container);
    loop {
        match std::fs::remove_dir_all(&path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.exists() => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
}

/// The containers that have a directory.
pub fn containers(run_dir: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(run_dir.join("containers")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result?,
    };
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// The orders that the proxy of `container` was started with, if only we can have written them.
pub fn read_launch(run_dir: &Path, container: &str) -> io::Result<Launch> {
    Ok(serde_json::from_slice(&read(run_dir, container, LAUNCH)?)?)
}

/// What the proxy of `container` has counted, in a file that only we, or a proxy while it was us, can have made.
pub fn read_counters(run_dir: &Path, container: &str) -> io::Result<counters::Page> {
    let bytes = read(run_dir, container, counters::FILE)?;
    counters::Page::read(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

fn read(run_dir: &Path, container: &str, name: &str) -> io::Result<Vec<u8>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory(run_dir, container), flags, Mode::empty())?;
    trust::read(&directory, name)
}

/// Where these orders are.
pub fn launch_path(run_dir: &Path, container: &str) -> PathBuf {
    directory(run_dir, container).join(LAUNCH)
}

fn directory(run_dir: &Path, container: &str) -> PathBuf {
    run_dir.join("containers").join(container)
}
