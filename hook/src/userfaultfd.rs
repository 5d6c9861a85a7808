//! The node `/dev/userfaultfd` in a container.
//!
//! The library uses it while it makes pages shared: whoever touches them meanwhile waits, the kernel itself in system calls too.
//! Engines' system call filters deny `userfaultfd(2)`, but not the node, which Linux has from 6.1 on, for root alone unless a rule
//! of udev's says otherwise.

use crate::cgroup;
use crate::config::Inject;
use crate::device_filter;
use crate::failure::Failure;
use crate::inject::open_node;
use crate::rootless;
use crate::session::Session;
use crate::state::Bundle;
use rustix::fs::{FileType, major, minor};
use std::os::fd::OwnedFd;
use std::path::Path;

/// Where it is, on hosts and in containers.
pub const PATH: &str = "/dev/userfaultfd";

/// The host's node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its number, which may be another one each time that the host starts.
    pub major: u32,
    /// See `major`.
    pub minor: u32,
    /// Whether everybody may open it.
    pub is_open: bool,
}

impl Inject {
    /// The host's node, if containers are to have it.
    pub fn userfaultfd(&self) -> Option<Host> {
        Host::find().filter(|_| self.userfaultfd)
    }
}

impl Host {
    /// The host's own node, if it has one.
    pub fn find() -> Option<Self> {
        let found = rustix::fs::lstat(PATH).ok()?;
        let is_open = found.st_mode & 0o006 == 0o006;
        (FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice).then(|| Self {
            major: major(found.st_rdev),
            minor: minor(found.st_rdev),
            is_open,
        })
    }
}

/// What a container gets.
pub(crate) struct Granted {
    /// The node to be mounted.
    pub node: Option<OwnedFd>,
    /// Why there is none, if it was to be.
    pub warning: Option<String>,
}

/// Lets the container of `pid` open the node, if `config` has it and that is possible.
pub(crate) fn grant(session: &Session, config: &Inject, bundle: &Bundle, pid: i32) -> Result<Granted, Failure> {
    let none = |warning| Ok(Granted { node: None, warning });
    let Some(host) = config.userfaultfd() else { return none(None) };
    let is_rootless = rootless::user().is_some();
    let is_allowed = bundle.allows_device(host.major, host.minor) || is_rootless;
    match if is_allowed { Ok(true) } else { device_filter::grant(pid, host.major, host.minor) } {
        Ok(true) => {}
        Ok(false) => return none(Some(cgroup::unseen(PATH))),
        Err(error) => return none(Some(format!("no {PATH}: the container's cgroup does not allow it: {error}"))),
    }
    let node = match session.make_node("userfaultfd", host.major, host.minor) {
        // Without root there are no nodes but the host's, with its mode. `ringfence doctor` tells of that, once.
        Err(_) if is_rootless && !host.is_open => return none(None),
        Err(_) if is_rootless => open_node(Path::new(PATH)).map(Some)?,
        Err(error) => return none(Some(format!("no {PATH}: {error}"))),
        Ok(node) => Some(node),
    };
    Ok(Granted { node, warning: None })
}
