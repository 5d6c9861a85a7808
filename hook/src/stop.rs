//! poststop: removes what outlives a container.
//!
//! It may come late, twice, or never; the proxy ends with the container's init all the same.

use crate::annotations;
use crate::cgroup;
use crate::config::Config;
use crate::exclusive;
use crate::failure::{Code, During, Failure};
use crate::journal;
use crate::process;
use crate::record::{Lock, MountPoint, Record, Records};
use crate::rootfs::{Kind, Place};
use crate::rootless;
use crate::session;
use crate::state::State;
use crate::systemd;
use crate::trust;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

/// How long a proxy may take to end before it is killed.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the kernel may take to bring back the card of a container whose network namespace has ended.
pub(crate) const CARD_PATIENCE: Duration = Duration::from_secs(3);
/// How long to wait for hooks that are making other containers. Those end in time, or their own poststop cleans up for us.
const OTHERS: Duration = Duration::from_millis(300);
/// How many other containers are looked at.
const MAX_OTHERS: usize = 256;

/// Acts on the container whose state is `input`. Idempotent.
pub fn stop(input: impl Read) -> Result<(), Failure> {
    let state = State::read(input)?;
    // With another id it cannot have become one of ours.
    let Ok(id) = state.id() else { return Ok(()) };
    clean_up(&state, id).map_err(|failure| failure.of(id))
}

fn clean_up(state: &State, id: &str) -> Result<(), Failure> {
    let config = match Config::load() {
        Ok(config) => config,
        // Not our container, as far as can be told: its end is no occasion to complain.
        Err(_) if !state.annotations().any(|(key, _)| annotations::is_ours(key)) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let what = || format!("records in {}", config.run_dir.display());
    let records = match session::open_run_dir(&config.run_dir).and_then(|run_dir| Records::find(&run_dir)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result.during(Code::Internal, what)?,
    };
    let what = || format!("the record of container {id} is of no use, and ringfence gc removes it");
    let record = trust::load(&config, &records, id).during(Code::Internal, what)?;
    // A live init is another container's of the same id: the one that ended was refused for that.
    if let Some(record) = record.filter(|record| !record.init.is_alive()) {
        undo(&config, &records, &record).during(Code::Internal, || format!("cleaning up after {id}"))?;
    }
    sweep(&config, &records);
    Ok(())
}

/// Undoes all that `record` names, as far as it goes, and returns the first error. The record stays in that case, and while
/// another container lives on the same root file system: to unlink a mount point there takes away the mount upon it.
///
/// The caller must not hold a lock on `records`.
pub(crate) fn undo(config: &Config, records: &Records, record: &Record) -> io::Result<()> {
    release(config, records, record, CARD_PATIENCE)?;
    let lock = match record.mount_points.is_empty() {
        true => None,
        false => records.lock_exclusive(OTHERS)?,
    };
    forget(config, records, record, lock.as_ref())
}

/// The part of [`undo`] outside of the root file system: proxy, directory, cgroups, and what others may take `patience` to give back,
/// the card and systemd's scope.
pub(crate) fn release(config: &Config, records: &Records, record: &Record, patience: Duration) -> io::Result<()> {
    if let Some(proxy) = record.proxy {
        trust::end(config, &record.container, proxy, PATIENCE);
    }
    let removed = session::remove(&config.run_dir, &record.container);
    // Whatever the record says: systemd may have made it after its patience was at an end.
    if rootless::user().is_none() {
        // The id is free already: a container that has it by now has a scope of the same name.
        let is_meant =
            || records.load(&record.container).is_ok_and(|now| now.is_none_or(|now| now.init == record.init));
        if let Err(error) = systemd::end_scope(&record.container, patience, is_meant) {
            // Where a proxy is accounted fails nobody's start or end.
            journal::warn(&record.container, &error.to_string());
        }
    }
    let removed = record.cgroups.iter().map(|directory| cgroup::remove(directory)).fold(removed, Result::and);
    removed.and(exclusive::take_back(config, records, record, patience))
}

/// The rest of [`undo`]. Without `exclusive`, a container that is being made may be about to mount upon the same mount points,
/// and they stay, on record.
pub(crate) fn forget(
    config: &Config,
    records: &Records,
    record: &Record,
    exclusive: Option<&Lock<'_>>,
) -> io::Result<()> {
    if !record.mount_points.is_empty() {
        if exclusive.is_none() {
            return Ok(());
        }
        let Some(mount_points) = unused_mount_points(config, records, record)? else { return Ok(()) };
        remove_mount_points(&record.root, &mount_points)?;
    }
    records.remove(&record.container)
}

/// The mount points of `record` and of the others on its root file system, the outer ones first; `None` if another container lives there.
///
/// Those of the others as well, which have ended and are still on record: of containers that start at once one makes a directory and
/// another what is to be in it, and whichever is forgotten first, the directory is to go.
fn unused_mount_points(config: &Config, records: &Records, record: &Record) -> io::Result<Option<Vec<MountPoint>>> {
    let mut mount_points = record.mount_points.clone();
    for container in records.containers()?.into_iter().filter(|container| *container != record.container) {
        let other = records.load(&container).ok().flatten();
        let Some(other) = other.filter(|other| other.root == record.root) else { continue };
        if other.init.is_alive() {
            return Ok(None);
        }
        if let Ok(Some(other)) = trust::load(config, records, &container) {
            mount_points.extend(other.mount_points);
        }
    }
    mount_points.sort_by_key(|mount_point| mount_point.path.matches('/').count());
    Ok(Some(mount_points))
}

/// Removes those of `mount_points` that are still empty.
fn remove_mount_points(root: &Path, mount_points: &[MountPoint]) -> io::Result<()> {
    if mount_points.is_empty() {
        return Ok(());
    }
    let root = match Place::root(root) {
        // The engine has unmounted or removed it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    mount_points.iter().rev().try_for_each(|mount_point| {
        let (parents, name) = mount_point.path.rsplit_once('/').unwrap_or(("", &mount_point.path));
        let mut directory = None;
        for parent in parents.split('/').filter(|parent| !parent.is_empty()) {
            // Whatever else is there now, the container made it, and ours is gone.
            let Ok(Some(found)) = directory.as_ref().unwrap_or(&root).find(parent, Kind::Directory) else {
                return Ok(());
            };
            directory = Some(found);
        }
        let kind = if mount_point.directory { Kind::Directory } else { Kind::File };
        directory.as_ref().unwrap_or(&root).remove_empty(name, kind)
    })
}

/// Cleans up after containers whose poststop never came (crun runs none when another hook fails) or could not do it all.
fn sweep(config: &Config, records: &Records) {
    // No hook may be making a container meanwhile, perhaps under the id of one that is gone.
    let Ok(Some(lock)) = records.lock_exclusive(Duration::ZERO) else { return };
    let mut containers = records.containers().unwrap_or_default();
    // Not the same ones each time, when there are more.
    let first = std::process::id() as usize % containers.len().max(1);
    containers.rotate_left(first);
    for container in containers.into_iter().take(MAX_OTHERS) {
        let Ok(Some(record)) = trust::load(config, records, &container) else { continue };
        // A proxy that is still there is ending by itself.
        if !record.init.is_alive() && !record.proxy.is_some_and(process::Process::is_alive) {
            // The next sweep tries again.
            let _ = release(config, records, &record, Duration::ZERO)
                .and_then(|()| forget(config, records, &record, Some(&lock)));
        }
    }
}
