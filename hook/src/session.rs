//! A container's directory on the host, `<run-dir>/containers/<id>`.
//!
//! ```text
//! <id>/                  0700
//!   launch.json          for the proxy
//!   ld.so.preload        bound over the container's
//!   mount/               0755, what the container sees at /dev/ringfence
//!     verbs.sock         0666, the proxy listens here
//!     libibverbs.so.1    empty, the library is bound over it
//! ```

use crate::failure::{Code, During, Failure};
use crate::trust;
use ringfence_proxy::launch::Launch;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// The library's name in the container.
pub const LIBRARY: &str = "libibverbs.so.1";
/// The socket's name in the container.
const SOCKET: &str = "verbs.sock";
/// The merged file's name on the host.
const PRELOAD: &str = "ld.so.preload";
/// The proxy's orders' name on the host.
const LAUNCH: &str = "launch.json";

/// The directory of one container.
pub struct Session {
    path: PathBuf,
    directory: OwnedFd,
    /// `mount/`.
    pub mount: OwnedFd,
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
        rustix::fs::mkdirat(&directory, "mount", Mode::from_raw_mode(0o755))?;
        let mount = rustix::fs::openat(&directory, "mount", flags, Mode::empty())?;
        let session = Self { path, directory, mount };
        session.create(&session.mount, LIBRARY, 0o755)?;
        Ok(session)
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
        self.create(&self.directory, LAUNCH, 0o600)?.write_all(&serde_json::to_vec_pretty(launch)?)?;
        Ok(self.path.join(LAUNCH))
    }

    /// An empty file to become the container's `/etc/ld.so.preload`.
    pub fn create_preload(&self) -> io::Result<std::fs::File> {
        self.create(&self.directory, PRELOAD, 0o644)
    }

    fn create(&self, directory: &OwnedFd, name: &str, mode: u32) -> io::Result<std::fs::File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(mode))?.into())
    }
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
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory(run_dir, container), flags, Mode::empty())?;
    Ok(serde_json::from_slice(&trust::read(&directory, LAUNCH)?)?)
}

/// Where these orders are.
pub fn launch_path(run_dir: &Path, container: &str) -> PathBuf {
    directory(run_dir, container).join(LAUNCH)
}

fn directory(run_dir: &Path, container: &str) -> PathBuf {
    run_dir.join("containers").join(container)
}
