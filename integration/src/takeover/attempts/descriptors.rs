//! What the proxy holds: each of its descriptors, handed to the container and looked at there.

use super::sockets::is_foreign;
use super::{Attack, judge};
use crate::takeover::table::{Attempt, Seen};
use anyhow::Result;
use nix::libc;
use std::fs::{FileType, Metadata};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

/// Numbers that are looked at: as many as Linux gives a process unless it is told otherwise.
const NUMBERS: std::ops::Range<i32> = 0..1024;

/// The device number of /dev/null.
const NULL: u64 = 1 << 8 | 3;

/// A descriptor of the proxy's, in this process.
pub(super) struct Held {
    /// Its number in the proxy.
    pub(super) number: i32,
    /// A copy.
    pub(super) fd: OwnedFd,
}

impl Held {
    fn link(&self) -> Result<PathBuf> {
        Ok(std::fs::read_link(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))?)
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(std::fs::File::from(self.fd.try_clone()?).metadata()?)
    }

    /// What `/proc` says of it.
    fn information(&self) -> Result<String> {
        Ok(std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd()))?)
    }

    /// Whether it is a file of what the container reads of its device, which is mounted in the container and nowhere else.
    fn is_shown(&self) -> bool {
        self.link().is_ok_and(|link| link.to_string_lossy().starts_with("/class/infiniband_verbs/.ringfence/"))
    }

    pub(super) fn is_memory(&self) -> bool {
        self.link().is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:"))
    }
}

/// All of them.
pub(super) fn all(attack: &mut Attack) -> Result<Vec<Held>> {
    let mut found = Vec::new();
    for number in NUMBERS {
        found.extend(attack.hands.fetch(number)?.map(|fd| Held { number, fd }));
    }
    Ok(found)
}

/// One attempt for each kind of thing that it must not hold.
pub(in crate::takeover) fn held() -> Vec<Attempt> {
    let attempt = |name, run| Attempt { name, run, control: false };
    vec![
        attempt("directories", |a| first(a, |held| Ok(held.metadata()?.is_dir()))),
        attempt("files that have a name", |a| {
            first(a, |held| Ok(held.metadata()?.is_file() && held.metadata()?.nlink() > 0 && !held.is_shown()))
        }),
        attempt("devices and terminals", |a| first(a, |held| held.metadata().map(|found| is_device(&found)))),
        attempt("named pipes", |a| {
            first(a, |held| {
                Ok(held.metadata()?.file_type().is_fifo() && !held.link()?.to_string_lossy().starts_with("pipe:"))
            })
        }),
        attempt("sockets of another network, free for use", |a| first(a, is_free_socket)),
        attempt("processes", |a| first(a, is_foreign_process)),
        attempt("namespaces", |a| first(a, is_foreign_namespace)),
    ]
}

/// To write to what the container reads of its device.
pub(in crate::takeover) fn shown() -> Vec<Attempt> {
    let run = |attack: &mut Attack| {
        let Some(held) = all(attack)?.into_iter().find(Held::is_shown) else {
            return Ok(Seen::Nothing("no file of /sys".into()));
        };
        let text = attack.hands.text("0");
        Ok(judge(attack.hands.call(libc::SYS_pwrite64, &[held.number as u64, text, 1, 0])?, &[]))
    };
    vec![Attempt { name: "a GID", run, control: false }]
}

/// The first of its descriptors that is one of a kind.
fn first(attack: &mut Attack, is_one: fn(&Held) -> Result<bool>) -> Result<Seen> {
    let all = all(attack)?;
    anyhow::ensure!(all.len() >= 6, "only {} descriptors: a proxy has a listener, a pidfd, eventfds, …", all.len());
    for held in &all {
        if is_one(held)? {
            return Ok(Seen::Reached(format!("{} is {}", held.number, held.link()?.display())));
        }
    }
    Ok(Seen::Nothing(format!("none of {}", all.len())))
}

fn is_device(found: &Metadata) -> bool {
    let kind: FileType = found.file_type();
    kind.is_block_device() || (kind.is_char_device() && found.rdev() != NULL)
}

/// One that could still be connected to something: neither listening nor connected, in a network that is not ours.
fn is_free_socket(held: &Held) -> Result<bool> {
    let socket = held.fd.as_fd();
    Ok(held.metadata()?.file_type().is_socket()
        && rustix::net::getpeername(socket).is_err()
        && !rustix::net::sockopt::socket_acceptconn(socket)?
        && is_foreign(socket)?)
}

/// A pidfd of a process that is not the container's: its number is not known here.
fn is_foreign_process(held: &Held) -> Result<bool> {
    let information = held.information()?;
    let pid = information.lines().find_map(|line| line.strip_prefix("Pid:"));
    Ok(pid.is_some_and(|pid| pid.trim().parse::<i32>().is_ok_and(|pid| pid <= 0)))
}

fn is_foreign_namespace(held: &Held) -> Result<bool> {
    let link = held.link()?;
    let is_namespace = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"]
        .iter()
        .any(|kind| link.to_string_lossy().starts_with(&format!("{kind}:[")));
    Ok(is_namespace && link != std::fs::read_link("/proc/self/ns/net")?)
}
