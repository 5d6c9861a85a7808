//! Garbage collection: removes what containers left behind whose poststop never came, or could not do it all.
//!
//! The operator's counterpart of what each poststop does for a few other containers. A container that runs loses nothing.

use crate::config::Config;
use crate::failure::{Code, During, Failure};
use crate::process::Process;
use crate::proxy;
use crate::record::{Record, Records};
use crate::session;
use crate::stop;
use crate::trust::{self, Program};
use ringfence_launch::Launch;
use serde::Serialize;
use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

/// How long a proxy may take to end before it is killed.
const PROXY_PATIENCE: Duration = Duration::from_secs(1);
/// How long to wait for hooks that are making containers.
const HOOKS_PATIENCE: Duration = Duration::from_secs(10);

/// What [`collect`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Containers of which nothing is left now.
    pub removed: Vec<Removed>,
    /// Containers of which something is left, and why.
    pub left: Vec<Left>,
}

/// A container of which nothing is left now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// The container's id.
    pub container: String,
    /// What there was: `proxy 4242`, `RDMA device mlx5_0` that it had for itself, and paths: of the record, the directory, cgroups, mount points.
    pub what: Vec<String>,
}

/// A container of which something is left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Left {
    /// The container's id.
    pub container: String,
    /// One line.
    pub why: String,
}

/// Removes records, proxies, directories, cgroups and mount points of containers that are gone.
///
/// # Errors
/// If the run-time directory cannot be read. What cannot be removed is no error, but in [`Collected::left`].
pub fn collect(config: &Config) -> Result<Collected, Failure> {
    let what = || format!("records in {}", config.run_dir.display());
    let mut collected = Collected::default();
    let records = match session::open_run_dir(&config.run_dir).and_then(|run_dir| Records::open(&run_dir)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(collected),
        result => result.during(Code::Internal, what)?,
    };
    let with_record = records.containers().during(Code::Internal, what)?;
    let with_directory = session::containers(&config.run_dir).during(Code::Internal, what)?;
    for container in with_record.into_iter().chain(with_directory).collect::<BTreeSet<_>>() {
        match clean(config, &records, &container) {
            Ok(what) if what.is_empty() => {}
            Ok(what) => collected.removed.push(Removed { container, what }),
            Err(why) => collected.left.push(Left { container, why }),
        }
    }
    if let Some(_lock) = records.lock_exclusive(HOOKS_PATIENCE).during(Code::Internal, what)? {
        records.remove_unfinished().during(Code::Internal, what)?;
    }
    Ok(collected)
}

/// Removes all of `container` if it is gone, and returns what there was.
fn clean(config: &Config, records: &Records, container: &str) -> Result<Vec<String>, String> {
    // Ended before the lock is taken, which hooks wait for.
    let ended = end_orphan(config, records, container)?;
    let lock = records.lock_exclusive(HOOKS_PATIENCE).map_err(|error| format!("records: {error}"))?;
    let lock = lock.ok_or("other containers are being made all the time; try again")?;
    // Looked at again: another container of this id may have been made meanwhile.
    let mut doubt = None;
    let record = match trust::load(config, records, container) {
        Ok(Some(record)) if record.init.is_alive() => return Ok(ended),
        Ok(Some(record)) => record,
        // One that cannot be read or is not believed is of no use to anybody, and nothing that it says is done.
        result => {
            doubt = result.err();
            match proxy::running(config, container) {
                Some(proxy) => return Err(running_without_record(proxy)),
                None => nameless(container),
            }
        }
    };
    let mut what = ended;
    let file = config.run_dir.join("state").join(format!("{container}.json"));
    let places = [file, config.run_dir.join("containers").join(container)].into_iter();
    what.extend(places.filter(|path| path.symlink_metadata().is_ok()).map(|path| path.display().to_string()));
    what.extend(doubt.map(|doubt| format!("without doing what its record says, for {doubt}")));
    what.extend(record.cgroups.iter().filter(|path| path.exists()).map(|path| path.display().to_string()));
    what.extend(record.mount_points.iter().map(|point| record.root.join(&point.path).display().to_string()));
    what.extend(record.lent.as_ref().map(|lent| format!("RDMA device {}", lent.name)));
    stop::release(config, records, &record, stop::CARD_PATIENCE)
        .and_then(|()| stop::forget(config, records, &record, Some(&lock)))
        .map_err(|error| error.to_string())?;
    match records.load(container) {
        Ok(None) => Ok(what),
        _ => Err(format!("another container lives on its root file system {}", record.root.display())),
    }
}

/// Ends the proxy of `container`, if that is gone.
fn end_orphan(config: &Config, records: &Records, container: &str) -> Result<Vec<String>, String> {
    let orphan = match trust::load(config, records, container) {
        Ok(Some(record)) if record.init.is_alive() => None,
        Ok(Some(record)) => record.proxy.or_else(|| proxy::running(config, container)),
        Ok(None) | Err(_) => match proxy::running(config, container) {
            Some(proxy) if init_lives(config, container) => return Err(running_without_record(proxy)),
            orphan => orphan,
        },
    };
    Ok(match orphan.map(|orphan| (orphan, trust::end(config, container, orphan, PROXY_PATIENCE))) {
        Some((orphan, Program::Proxy)) => vec![format!("proxy {}", orphan.pid)],
        _ => Vec::new(),
    })
}

fn running_without_record(proxy: Process) -> String {
    format!("its record is gone or of no use, but its proxy {} runs; stop the container, and collect again", proxy.pid)
}

/// Whether the init that the proxy was started for may still be there; a later process of its pid cannot be told from it.
fn init_lives(config: &Config, container: &str) -> bool {
    let launch = session::read_launch(&config.run_dir, container);
    launch.map_or(true, |launch: Launch| Process::open(launch.init_pid).is_ok())
}

/// What is known of a container without a record.
fn nameless(container: &str) -> Record {
    Record {
        container: container.to_owned(),
        policy: String::new(),
        init: Process { pid: 0, start: 0 },
        proxy: None,
        root: "/".into(),
        mount_points: Vec::new(),
        cgroups: Vec::new(),
        unit: None,
        device: String::new(),
        since: 0,
        warnings: Vec::new(),
        lent: None,
    }
}
