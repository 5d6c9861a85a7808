//! The first process of a container that is being made.

use crate::failure::{Code, During, Failure};
use crate::inject::Container;
use crate::process::{self, Process};
use crate::record::Record;
use crate::state::Bundle;
use rustix::fs::{Mode, OFlags};
use std::os::fd::{AsFd, OwnedFd};

/// The container's init, held by descriptors.
pub struct Init {
    pub process: Process,
    pub pidfd: OwnedFd,
    mount_namespace: OwnedFd,
    pub network_namespace: OwnedFd,
}

impl Init {
    /// Opens the process `pid`, and makes sure that it is one in a mount namespace of its own that lives.
    pub fn open(pid: i32) -> Result<Self, Failure> {
        let gone = || format!("the container state's pid {pid} is no running process");
        let (process, pidfd) = Process::open(pid).map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH | libc::ENOENT) => Failure::new(Code::State, gone()),
            _ => Failure::new(Code::Internal, format!("pid {pid} of the container state: {error}")),
        })?;
        let namespace = |of: &str, name: &str| {
            let path = format!("/proc/{of}/ns/{name}");
            rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).during(Code::State, || path)
        };
        let own = namespace("self", "mnt")?;
        let mount_namespace = namespace(&pid.to_string(), "mnt")?;
        let network_namespace = namespace(&pid.to_string(), "net")?;
        if process::has_ended(pidfd.as_fd()) {
            return Err(Failure::new(Code::State, gone()));
        }
        let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|found| found.st_ino);
        let same = inode(&own).and_then(|own| Ok(own == inode(&mount_namespace)?));
        if same.during(Code::State, || format!("/proc/{pid}/ns/mnt"))? {
            let message =
                format!("the container state's pid {pid} is no container's init: it has our own mount namespace");
            return Err(Failure::new(Code::State, message));
        }
        Ok(Self { process, pidfd, mount_namespace, network_namespace })
    }

    /// The container of `record`, for injection.
    pub fn container(&self, record: &Record, bundle: &Bundle) -> Result<Container, Failure> {
        let mount_namespace = self.mount_namespace.try_clone();
        let mount_namespace = mount_namespace.during(Code::Internal, || "mount namespace".into())?;
        Ok(Container {
            mount_namespace,
            root: record.root.clone(),
            shares_mounts: bundle.shares_mounts(),
            library_path: bundle.library_path(),
        })
    }
}
