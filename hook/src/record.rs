//! What the hook made for a container, kept for whoever has to undo it.
//!
//! Records are `<run-dir>/state/<id>.json`, outside of the container's directory: the proxy removes that when it ends, which
//! is usually before poststop asks what else there is to undo. A record is written before what it names is made, so that a
//! hook killed half-way leaves nothing unnamed.

use crate::process::Process;
use crate::trust;
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long to wait for others who make or remove containers. A stopped one must not keep all containers from starting
/// without a word.
const PATIENCE: Duration = Duration::from_secs(10);

/// All that outlives the container's namespaces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Record {
    pub container: String,
    /// The policy's name.
    #[serde(default = "default_policy")]
    pub policy: String,
    /// The container's init.
    pub init: Process,
    pub proxy: Option<Process>,
    /// The container's root file system on the host.
    pub root: PathBuf,
    /// Mount points made in it, in the order of their making, relative to it.
    pub mount_points: Vec<MountPoint>,
    /// cgroups made for the proxy.
    pub cgroups: Vec<PathBuf>,
    /// The unit that systemd made for the proxy, and removes when that ends.
    #[serde(default)]
    pub unit: Option<String>,
    /// The device's name.
    #[serde(default)]
    pub device: String,
    /// When the container was made, in seconds since 1970.
    #[serde(default)]
    pub since: u64,
    /// What could not be had, one line each.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// The card that was moved to the container's network namespace, or is about to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lent: Option<Lent>,
}

/// Records of before there were profiles name none.
fn default_policy() -> String {
    crate::annotations::DEFAULT_POLICY.into()
}

/// An empty file or directory that only serves to be mounted upon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountPoint {
    pub path: String,
    pub directory: bool,
}

/// A card that a container has for itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Lent {
    /// The kernel's name for it.
    pub name: String,
    /// As the kernel writes it.
    pub node_guid: String,
    /// The number of the network namespace that it is from, and is to come back to.
    pub from: u64,
    /// That of the container's.
    pub to: u64,
}

/// The records of this node.
pub struct Records {
    directory: OwnedFd,
}

impl Records {
    /// Opens `<run-dir>/state`, and makes it.
    pub fn open(run_dir: &OwnedFd) -> io::Result<Self> {
        match rustix::fs::mkdirat(run_dir, "state", Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => Self::find(run_dir),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens `<run-dir>/state`, if only we can write there and in the run-dir.
    pub fn find(run_dir: &OwnedFd) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(run_dir, "state", flags, Mode::empty())?;
        let not_believed = |name: &str| {
            let message = format!("{name} is not believed");
            move |error: io::Error| io::Error::new(error.kind(), format!("{message}: {error}"))
        };
        trust::ours(run_dir, FileType::Directory).map_err(not_believed("the directory"))?;
        trust::ours(&directory, FileType::Directory).map_err(not_believed("its directory state"))?;
        Ok(Self { directory })
    }

    /// Keeps [`Self::lock_exclusive`] from succeeding elsewhere, until dropped.
    pub fn lock_shared(&self) -> io::Result<Lock<'_>> {
        match lock(self.directory.as_fd(), FlockOperation::NonBlockingLockShared, PATIENCE)? {
            true => Ok(Lock { directory: &self.directory }),
            false => Err(held("state")),
        }
    }

    /// Excludes all others, until dropped; `None` if there still is one after `patience`.
    pub fn lock_exclusive(&self, patience: Duration) -> io::Result<Option<Lock<'_>>> {
        let locked = lock(self.directory.as_fd(), FlockOperation::NonBlockingLockExclusive, patience)?;
        Ok(locked.then_some(Lock { directory: &self.directory }))
    }

    /// The record of `container`; `None` if there is none. Whether the process that it names as proxy is one,
    /// [`trust::load`] says.
    pub fn load(&self, container: &str) -> io::Result<Option<Record>> {
        let bytes = match trust::read(&self.directory, file_name(container)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            result => result?,
        };
        let record = serde_json::from_slice(&bytes)?;
        trust::check(&record, container)?;
        Ok(Some(record))
    }

    /// Writes `record` so that a reader sees it whole or not at all.
    pub fn save(&self, record: &Record) -> io::Result<()> {
        // A leading dot is no container's id.
        let temporary = format!(".{}", file_name(&record.container));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, &temporary, flags, Mode::RUSR | Mode::WUSR)?;
        let written = std::fs::File::from(file).write_all(&serde_json::to_vec(record)?).and_then(|()| {
            Ok(rustix::fs::renameat(&self.directory, &temporary, &self.directory, file_name(&record.container))?)
        });
        written.inspect_err(|_| {
            // On a full file system it would take the room of the next one.
            let _ = rustix::fs::unlinkat(&self.directory, &temporary, AtFlags::empty());
        })
    }

    /// Forgets `container`.
    pub fn remove(&self, container: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.directory, file_name(container), AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes records whose writers were killed. The caller holds the lock, so that no writer is at work.
    pub fn remove_unfinished(&self) -> io::Result<()> {
        for entry in rustix::fs::Dir::read_from(self.directory.as_fd())? {
            let entry = entry?;
            let name = entry.file_name();
            if name.to_bytes().starts_with(b".") && name.to_bytes().ends_with(b".json") {
                rustix::fs::unlinkat(&self.directory, name, AtFlags::empty())?;
            }
        }
        Ok(())
    }

    /// The containers that have a record.
    pub fn containers(&self) -> io::Result<Vec<String>> {
        let mut containers = Vec::new();
        for entry in rustix::fs::Dir::read_from(self.directory.as_fd())? {
            let entry = entry?;
            let name = entry.file_name().to_str().ok().and_then(|name| name.strip_suffix(".json"));
            containers.extend(name.filter(|name| !name.starts_with('.')).map(str::to_owned));
        }
        Ok(containers)
    }
}

/// Excludes all others who are about to see whether an id is free and to take it, until dropped: runtimes with different root
/// directories may use the same one at once, and none would find the other's record.
pub fn claim_ids(run_dir: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let claim = rustix::fs::openat(run_dir, ".", flags, Mode::empty())?;
    match lock(claim.as_fd(), FlockOperation::NonBlockingLockExclusive, PATIENCE)? {
        true => Ok(claim),
        false => Err(held(".")),
    }
}

/// Excludes all others who lend cards or take them back, until dropped.
pub fn lock_cards(run_dir: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(run_dir, "cards.lock", flags, Mode::RUSR | Mode::WUSR)?;
    match lock(file.as_fd(), FlockOperation::NonBlockingLockExclusive, PATIENCE)? {
        true => Ok(file),
        false => Err(held("cards.lock")),
    }
}

/// Whether `directory` could be locked within `patience`.
fn lock(directory: BorrowedFd<'_>, operation: FlockOperation, patience: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        match rustix::fs::flock(directory, operation) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() >= deadline => return Ok(false),
            Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(2)),
            Err(error) => return Err(error.into()),
        }
    }
}

fn held(directory: &str) -> io::Error {
    let seconds = PATIENCE.as_secs();
    io::Error::other(format!("{directory} has been locked for {seconds} s; end the hook or ringfence gc that hangs"))
}

/// A lock on all records.
pub struct Lock<'a> {
    directory: &'a OwnedFd,
}

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        let _ = rustix::fs::flock(self.directory, FlockOperation::Unlock);
    }
}

fn file_name(container: &str) -> String {
    format!("{container}.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_until_removed() {
        let directory = tempfile::tempdir().unwrap();
        let run_dir = rustix::fs::open(directory.path(), OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        assert!(Records::find(&run_dir).is_err());
        let records = Records::open(&run_dir).unwrap();
        let record = Record {
            container: "c1".into(),
            policy: "gold".into(),
            init: Process { pid: 7, start: 8 },
            proxy: None,
            root: "/rootfs".into(),
            mount_points: vec![MountPoint { path: "etc/ld.so.preload".into(), directory: false }],
            cgroups: Vec::new(),
            unit: None,
            device: "soft0".into(),
            since: 9,
            warnings: vec!["w".into()],
            lent: Some(Lent { name: "rxe0".into(), node_guid: "0:0:0:1".into(), from: 1, to: 2 }),
        };
        assert_eq!(records.load("c1").unwrap(), None);
        records.save(&record).unwrap();
        assert_eq!(records.load("c1").unwrap(), Some(record));
        assert_eq!(records.containers().unwrap(), ["c1"]);
        records.remove("c1").unwrap();
        records.remove("c1").unwrap();
        assert_eq!(records.containers().unwrap(), Vec::<String>::new());
    }
}
